"""`corral run` as a user meets it: exit codes, options, and what becomes of bad input."""

from __future__ import annotations

import json
import os
import shlex
import shutil
import stat
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

import corral
from corral.cli import foreground
from corral.cli import run as run_module
from corral.cli.options import Arguments
from corral.errors import RequestError
from tests.contain.command_line import CommandLine, adopting_orphans
from tests.contain.conftest import Compile, MakeBox

SOURCES = os.path.dirname(os.path.dirname(os.path.abspath(corral.__file__)))


@pytest.fixture
def cli(tmp_path: Path, workspace: Path) -> Iterator[CommandLine]:
    with adopting_orphans():
        yield CommandLine(tmp_path, workspace)


def is_plain(output: bytes) -> bool:
    """Whether nothing in it could move a cursor, and it is no traceback."""
    return all(byte >= 32 or byte == 10 for byte in output) and b"Traceback" not in output


# ---- exit codes ----


@pytest.mark.parametrize("code", [0, 1, 2, 3, 42, 125, 126, 127, 255])
def test_the_exit_code_is_the_commands(cli: CommandLine, code: int) -> None:
    done = cli.run("--", "sh", "-c", f"exit {code}")
    assert (done.returncode, done.stdout, done.stderr) == (code, b"", b"")


@pytest.mark.parametrize("number", [1, 2, 3, 6, 9, 11, 15])
def test_a_command_that_a_signal_ends_gives_128_and_the_signal(cli: CommandLine, number: int) -> None:
    assert cli.run("--", "sh", "-c", f"kill -{number} $$").returncode == 128 + number


@pytest.mark.parametrize(
    ("command", "reason"),
    [
        ("no-such-program", "No such file or directory"),
        ("/no/such/program", "No such file or directory"),
        ("./file.txt", "Permission denied"),
        ("/", "Permission denied"),
        ("x" * 5000, "File name too long"),
    ],
)
def test_a_command_that_cannot_start_is_an_error_of_corrals(cli: CommandLine, command: str, reason: str) -> None:
    done = cli.run("--", command)
    assert done.returncode == 125
    assert done.stderr.decode().startswith("corral: cannot start the command: exec: ")
    assert done.stderr.decode().endswith(f": {reason}\n")
    assert not list(cli.state.glob("corral/layers/*"))


@pytest.mark.parametrize("limit", ["user/max_user_namespaces", "user/max_mnt_namespaces", "user/max_net_namespaces"])
def test_without_walls_the_command_never_runs(cli: CommandLine, limit: str) -> None:
    marker = cli.workspace / "it-ran"
    line = shlex.join([*cli.command, "run", "--", "touch", str(marker)])
    # In a user namespace of its own a limit can be set to 0 by anybody, for what is below it. Its mounts stay.
    script = f"echo 0 >/proc/sys/{limit} && exec {line}"
    uid, gid = os.geteuid(), os.getegid()
    wrapper = ["unshare", "--user", "--map-root-user", "sh", "-c", script]
    env = cli.env | {"XDG_CACHE_HOME": str(cli.state)}
    done = subprocess.run(wrapper, cwd=cli.workspace, env=env, capture_output=True, timeout=60)
    assert done.returncode == 126, (uid, gid, done)
    assert b"corral: cannot build the walls: " in done.stderr and b"corral doctor" in done.stderr
    assert not marker.exists() and is_plain(done.stderr)
    assert not list(cli.runtime.glob("corral/[0-9]*"))


def test_wall_time_ends_it_and_says_so(cli: CommandLine) -> None:
    started = time.monotonic()
    done = cli.run("--wall-time", "1s", "--", "sh", "-c", "trap '' TERM INT HUP; echo begun; sleep 1000; echo never")
    assert (done.returncode, done.stdout) == (137, b"begun\n")
    assert done.stderr == b"corral: the sandbox was ended: out of wall time\n"
    assert 1 <= time.monotonic() - started < 30


def test_the_work_of_a_run_that_was_killed_is_kept(cli: CommandLine) -> None:
    done = cli.run("--wall-time", "1s", "--", "sh", "-c", "echo work >result; sleep 1000")
    assert done.returncode == 137 and b"1 change kept" in done.stderr
    assert b"result" in cli("diff").stdout


def test_nested_sandboxes_are_a_clear_error(cli: CommandLine) -> None:
    inner = [sys.executable, "-c", "from corral.cli import main; main()", "run", "--", "true"]
    done = cli.run("--read", SOURCES, "--env", f"PYTHONPATH={SOURCES}", "--", *inner)
    assert done.returncode in (125, 126), done
    assert done.stderr.startswith(b"corral: ") and is_plain(done.stderr), done.stderr


# ---- bad input ----

BAD = {
    "no such option": (["--no-such", "--", "true"], "No such option: --no-such"),
    "no command": ([], "Missing argument 'COMMAND'"),
    "no command after the dashes": (["--"], "Missing argument 'COMMAND'"),
    "no value": (["--label"], "--label"),
    "empty command": (["--", ""], "no command was given"),
    "unknown policy field": (["--policy", "{dir}/unknown.yaml", "--", "true"], "2: resources.memry: unknown field"),
    "policy that is no YAML": (["--policy", "{dir}/broken.yaml", "--", "true"], "broken.yaml"),
    "policy that is a directory": (["--policy", "{dir}", "--", "true"], "Is a directory"),
    "policy that is not there": (["--policy", "{dir}/none.yaml", "--", "true"], "No such file or directory"),
    "workspace that is not there": (["-w", "{dir}/none", "--", "true"], "No such file or directory"),
    "workspace that is a file": (["-w", "{dir}/unknown.yaml", "--", "true"], "is not a directory"),
    "workspace / ": (["-w", "/", "--", "true"], "part of the system"),
    "workspace /usr": (["-w", "/usr", "--", "true"], "part of the system"),
    "workspace in disguise": (["-w", "{dir}/link-to-usr", "--", "true"], "part of the system"),
    "workspace /proc": (["-w", "/proc", "--", "true"], "part of the system"),
    "workspace /dev/shm": (["-w", "/dev/shm", "--", "true"], "part of the system"),
    "workspace home": (["-w", "{home}", "--", "true"], "workspace {home}"),
    "workspace empty": (["-w", "", "--", "true"], "--workspace: the path is empty"),
    "workspace with a newline": (["-w", "a\nb", "--", "true"], "'a\\nb' holds control characters"),
    "workspace with an escape": (["-w", "\x1b[2J", "--", "true"], "'\\x1b[2J' holds control characters"),
    "workspace with an escape inside a path": (["-w", "{dir}/\x1b]0;x\x07", "--", "true"], "control characters"),
    "root that is not there": (["--root", "relative", "--", "true"], "root relative: No such file"),
    "root that dangles": (["--root", "{dir}/dangling", "--", "true"], "No such file or directory"),
    "root /": (["--root", "/", "--", "true"], "the host itself"),
    "root empty": (["--root", "", "--", "true"], "--root: the path is empty"),
    "read that is not there": (["--read", "/no/such", "--", "true"], "path /no/such: No such file or directory"),
    "read empty": (["--read", "", "--", "true"], "--read: the path is empty"),
    "read of everything": (["--read", "/", "--", "true"], "the whole host"),
    "user unknown": (["--user", "nosuch", "--", "true"], "'nosuch' is unknown"),
    "user too large": (["--user", "70000", "--", "true"], "not an id"),
    "user negative": (["--user", "-1", "--", "true"], "'-1' is unknown"),
    "user with an escape": (["--user", "\x1b[31m", "--", "true"], "'\\x1b[31m' is unknown"),
    "service garbage": (["--service", "garbage", "--", "true"], "write PORT=IP:PORT"),
    "service without port": (["--service", "80=1.2.3.4", "--", "true"], "write PORT=IP:PORT"),
    "service by name": (["--service", "80=localhost:80", "--", "true"], "'localhost' is not an IP address"),
    "service port too large": (["--service", "65536=1.2.3.4:1", "--", "true"], "write PORT=IP:PORT"),
    "service twice": (["--service", "80=1.2.3.4:1", "--service", "80=1.2.3.4:2", "--", "true"], "two places"),
    "variable name": (["--env", "1x=2", "--", "true"], "'1x'"),
    "variable name with an escape": (["--env", "\x1b[31m=2", "--", "true"], "'\\x1b[31m'"),
    "memory garbage": (["--memory", "garbage", "--", "true"], "memory: 'garbage'"),
    "memory zero": (["--memory", "0", "--", "true"], "memory"),
    "cpu negative": (["--cpu=-1", "--", "true"], "cpu"),
    "wall time garbage": (["--wall-time", "soon", "--", "true"], "'soon'"),
}


@pytest.mark.parametrize(("words", "message"), BAD.values(), ids=BAD.keys())
def test_bad_input_is_a_clear_error_and_builds_nothing(
    cli: CommandLine, tmp_path: Path, words: list[str], message: str
) -> None:
    (tmp_path / "unknown.yaml").write_text("resources:\n  memry: 1GiB\n")
    (tmp_path / "broken.yaml").write_text("resources: [\n")
    (tmp_path / "dangling").symlink_to(tmp_path / "nowhere")
    (tmp_path / "link-to-usr").symlink_to("/usr")
    names = {"dir": str(tmp_path), "home": os.path.expanduser("~")}
    done = cli.run(*(word.format(**names) for word in words))
    assert done.returncode == 125, done
    assert message.format(**names) in done.stderr.decode() and is_plain(done.stderr), done.stderr
    assert done.stdout == b""


@pytest.mark.user
def test_a_workspace_that_cannot_be_read_is_a_clear_error(cli: CommandLine, tmp_path: Path) -> None:
    closed = tmp_path / "closed"
    closed.mkdir(mode=0)
    done = cli.run("-w", str(closed), "--", "true")
    assert done.returncode == 125 and b"is not readable for you" in done.stderr


@pytest.mark.parametrize("words", [["a\0b"], ["true", "\0"]], ids=["program", "argument"])
async def test_nul_in_a_command_is_refused(make_box: MakeBox, words: list[str]) -> None:
    box = await make_box()
    with pytest.raises(RequestError, match="NUL"):
        await box.exec(words)
    assert (await box.exec(["true"])).exit_code == 0


@pytest.mark.parametrize("what", ["workspace", "root"])
async def test_nul_in_a_path_is_refused(make_box: MakeBox, workspace: Path, what: str) -> None:
    with pytest.raises(RequestError, match="control characters"):
        await make_box(**({"path": f"{workspace}\0"} if what == "workspace" else {"root": "/x\0y"}))


def test_a_command_line_of_a_mebibyte_arrives_whole(cli: CommandLine) -> None:
    words = ["x" * 65_536] * 16 + [""]
    done = cli.run("--", "sh", "-c", 'echo $#; printf %s "$@" | wc -c', "sh", *words)
    assert done.stdout == b"17\n1048576\n"


def test_corrals_messages_are_escaped_but_the_commands_output_is_its_own(cli: CommandLine) -> None:
    done = cli.run("--", "\x1b]0;title\x07")
    assert done.returncode == 125 and b"\\x1b]0;title\\x07" in done.stderr and is_plain(done.stderr)
    done = cli.run("--label", "\x1b[2J", "--", "printf", "\\033[31mred\\000\\377")
    assert (done.returncode, done.stdout) == (0, b"\x1b[31mred\0\xff")


# ---- options ----


def test_help_shows_examples(cli: CommandLine) -> None:
    for words in (["--help"], ["run", "--help"]):
        text = cli(*words).stdout.decode()
        assert "Examples:" in text and "\n    corral run " in text
    assert cli("--version").stdout.decode() == f"corral {corral.__version__}\n"


def test_env_sets_or_passes_a_variable(cli: CommandLine) -> None:
    env = {"TOKEN": "passes", "OTHER": "stays out"}
    words = ["--env", "TOKEN", "-e", "MADE=a=b c", "--env", "ABSENT"]
    done = cli.run(*words, "--", "sh", "-c", 'echo "$TOKEN|$MADE|${OTHER-unset}|${ABSENT-unset}"', env=env)
    assert done.stdout == b"passes|a=b c|unset|unset\n"


def test_read_shows_a_file_and_it_stays_as_it_is(cli: CommandLine, tmp_path: Path) -> None:
    shown, hidden = tmp_path / "shown", tmp_path / "hidden"
    for path in (shown, hidden):
        path.write_text("content\n")
    done = cli.run("-r", str(shown), "--", "sh", "-c", f"cat {shown}; cat {hidden}; echo x >{shown}")
    assert done.stdout == b"content\n" and done.returncode != 0
    assert b"No such file or directory" in done.stderr and shown.read_text() == "content\n"


def test_json_tells_what_happened(cli: CommandLine, tmp_path: Path) -> None:
    done = cli.run("--json", "--quiet", "--", "sh", "-c", "echo new >added; exit 3")
    told = json.loads(done.stderr)
    assert (told["exit_code"], told["ended"], told["error"], told["changes"]) == (3, "exited", None, 1)
    assert told["layer"] == told["sandbox"] and told["max_rss"] > 0 and told["seconds"] > 0
    path = tmp_path / "result.json"
    assert cli.run("--json-result", str(path), "--wall-time", "1s", "--", "sleep", "60").returncode == 137
    told = json.loads(path.read_text())
    assert (told["exit_code"], told["ended"], told["layer"], told["changes"]) == (137, "out of wall time", None, 0)


def test_quiet_and_discard(cli: CommandLine) -> None:
    done = cli.run("--quiet", "--", "touch", "a")
    assert (done.returncode, done.stderr) == (0, b"")
    assert len(list(cli.state.glob("corral/layers/*"))) == 1
    done = cli.run("--discard", "--", "touch", "b")
    assert (done.returncode, done.stderr) == (0, b"")
    assert len(list(cli.state.glob("corral/layers/*"))) == 1
    done = cli.run("--", "true")
    assert (done.returncode, done.stderr) == (0, b"")
    assert not (cli.workspace / "a").exists() and not (cli.workspace / "b").exists()


def test_a_policy_file_is_obeyed_and_the_command_line_is_stronger(cli: CommandLine, tmp_path: Path) -> None:
    policy = tmp_path / "policy.yaml"
    policy.write_text("resources:\n  open_files: 100\nenvironment:\n  set:\n    FROM_POLICY: yes-it-is\n")
    done = cli.run("--policy", str(policy), "--", "sh", "-c", "ulimit -n; echo $FROM_POLICY")
    assert done.stdout == b"100\nyes-it-is\n"
    assert cli.run("-p", str(policy), "--open-files", "50", "--", "sh", "-c", "ulimit -n").stdout == b"50\n"


def test_root_is_the_whole_system_inside(cli: CommandLine, tmp_path: Path, compile_c: Compile) -> None:
    program = compile_c(
        "#include <stdio.h>\n#include <fcntl.h>\n#include <unistd.h>\n#include <errno.h>\n"
        "int main(void){char d[4096];puts(getcwd(d,4096));"
        'printf("%d %d\\n",access("/usr",F_OK),access("/bin/only",X_OK));'
        'int f=open("/marker",O_WRONLY|O_CREAT,0644);printf("%d\\n",f>=0?0:errno);return 5;}',
        "only",
    )
    root = tmp_path / "root"
    (root / "bin").mkdir(parents=True)
    shutil.copy(program, root / "bin/only")
    for path in (root, root / "bin", root / "bin/only"):
        path.chmod(0o755)
    done = cli.run("--root", str(root), "--user", "root", "--quiet", "--", "/bin/only")
    assert done.stdout.decode().splitlines() == [str(cli.workspace), "-1 0", "0"], done
    assert done.returncode == 5
    assert not (root / "marker").exists() and sorted(os.listdir(root)) == ["bin"]
    assert stat.S_IMODE((root / "bin").stat().st_mode) == 0o755
    # A relative path is one too.
    assert cli.run("--root", "../root", "-q", "--", "/bin/only").returncode == 5


def test_a_command_that_ignores_sigterm_is_ended_after_the_grace(
    tmp_path: Path, workspace: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    # In a forked child, because `corral run` changes the handlers of its process for good.
    monkeypatch.setattr(foreground, "GRACE", 0.3)
    monkeypatch.setenv("XDG_RUNTIME_DIR", str(tmp_path))
    reader, writer = os.pipe()
    pid = os.fork()
    if pid == 0:
        os.close(reader)
        os.dup2(writer, 1)
        arguments = Arguments(
            {"workspace": str(workspace)},
            {},
            frozenset(),
            ("sh", "-c", "trap '' TERM; echo ready; while :; do sleep 0.1; done"),
        )
        try:
            os._exit(run_module.run(arguments))
        finally:
            os._exit(99)
    os.close(writer)
    assert os.read(reader, 100) == b"ready\n", capfd.readouterr().err
    os.kill(pid, 15)
    assert os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]) == 137
    os.close(reader)
    assert "corral: the sandbox was ended: did not end after SIGTERM" in capfd.readouterr().err


# ---- the record ----


def with_bound(cli: CommandLine, setting: str) -> CommandLine:
    """`corral` with another bound of its record."""
    start = f"from corral import diskspace; from corral.monitor import jsonl; {setting}"
    cli.command = [sys.executable, "-c", f"{start}; from corral.cli import main; main()"]
    return cli


def test_a_full_record_ends_the_run(cli: CommandLine) -> None:
    """Each of endless programs is a decision; what cannot be recorded does not happen (I3)."""
    with_bound(cli, "jsonl.MAX_FILE = 20_000")
    done = cli.run("--record", "r.jsonl", "--", "sh", "-c", "while :; do /bin/true; done")
    assert done.returncode == 137
    assert b"ended: its records cannot be written (the record has reached its 20000 bytes)" in done.stderr
    content = (cli.workspace / "r.jsonl").read_bytes()
    assert 15_000 < len(content) <= 20_000 and content.endswith(b"\n")


def test_no_record_is_begun_on_a_full_disk(cli: CommandLine) -> None:
    with_bound(cli, "diskspace.KEEP_BYTES = 1 << 60")
    done = cli.run("--discard", "--record", "r.jsonl", "--", "touch", "ran")
    assert (done.returncode, done.stdout) == (125, b"")
    assert done.stderr.startswith(b"corral: --record r.jsonl: ") and b"make room" in done.stderr
    assert sorted(path.name for path in cli.workspace.iterdir()) == ["file.txt"]
