"""`corral run` as a part of a pipeline: bytes, signals, and what of its caller does not pass in."""

from __future__ import annotations

import fcntl
import hashlib
import os
import random
import shlex
import signal
import subprocess
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.contain.command_line import CommandLine, adopting_orphans, descendants
from tests.contain.conftest import wait_until

SIZE = 64 << 20


@pytest.fixture
def cli(tmp_path: Path, workspace: Path) -> Iterator[CommandLine]:
    with adopting_orphans():
        yield CommandLine(tmp_path, workspace)


def shell(cli: CommandLine, script: str, *, timeout: float = 60) -> subprocess.CompletedProcess[bytes]:
    """A script in which `corral` is the command under test."""
    script = f'corral() {{ {shlex.join(cli.command)} "$@"; }}\n{script}'
    return subprocess.run(["bash", "-c", script], cwd=cli.workspace, env=cli.env, capture_output=True, timeout=timeout)


# ---- pipes ----


def test_a_pipeline(cli: CommandLine) -> None:
    done = shell(cli, "echo x | corral run -- cat | wc -c")
    assert (done.stdout, done.stderr) == (b"2\n", b"")


def test_64_mebibytes_of_anything_pass_both_ways(cli: CommandLine, tmp_path: Path) -> None:
    data = random.Random(1).randbytes(1 << 20) * (SIZE >> 20)
    source = tmp_path / "source"
    source.write_bytes(data)
    expected = hashlib.sha256(data).hexdigest()
    with open(source, "rb") as file:
        done = cli.run("--", "sh", "-c", "tee /dev/stderr | sha256sum", stdin=file)
    assert done.stdout.split()[0].decode() == expected
    assert hashlib.sha256(done.stderr).hexdigest() == expected
    done = shell(cli, f"cat {source} | corral run -- cat | sha256sum")
    assert done.stdout.split()[0].decode() == expected and done.stderr == b""


def test_stdout_and_stderr_are_two_streams(cli: CommandLine) -> None:
    done = cli.run("--", "sh", "-c", "echo out; echo err >&2; echo out")
    assert (done.stdout, done.stderr) == (b"out\nout\n", b"err\n")


def test_a_reader_that_closes_early_ends_the_command_quietly(cli: CommandLine) -> None:
    started = time.monotonic()
    done = shell(cli, "corral run -- yes | head -1; echo ${PIPESTATUS[0]}")
    assert done.stdout == b"y\n141\n", done  # 128 + SIGPIPE, as without walls
    assert done.stderr == b"" and time.monotonic() - started < 20
    done = shell(cli, "corral run -- sh -c 'while echo x >&2; do :; done' 2>&1 >/dev/null | head -1")
    assert done.stdout == b"x\n"


def test_a_reader_that_never_reads_does_not_hold_it_after_sigterm(cli: CommandLine) -> None:
    done = shell(cli, "timeout 2 " + shlex.join(cli.command) + " run -- yes | { sleep 8; echo waited; }")
    assert (done.stdout, done.stderr) == (b"waited\n", b"")
    process = cli.start("run", "--", "yes")
    assert process.stdout is not None
    os.read(process.stdout.fileno(), 1)
    process.terminate()
    assert process.wait(20) == 143


@pytest.mark.parametrize("fd", [0, 1, 2])
def test_closed_standard_descriptors(cli: CommandLine, fd: int) -> None:
    script = "cat; echo out; echo err >&2; for n in 0 1 2; do test -e /proc/self/fd/$n || exit 1; done"
    closed = "<&-" if fd == 0 else f"{fd}>&-"
    done = shell(cli, f"echo in | corral run -- sh -c {shlex.quote(script)} {closed}")
    expected = {0: (b"out\n", b"err\n"), 1: (b"", b"err\n"), 2: (b"in\nout\n", b"")}
    assert (done.returncode, done.stdout, done.stderr) == (0, *expected[fd])


def test_all_standard_descriptors_closed_at_once(cli: CommandLine) -> None:
    done = shell(cli, "corral run --env X=1 -- sh -c 'echo ran >proof; exit 7' <&- >&- 2>&-; echo $?")
    assert done.stdout == b"7\n"
    assert b"proof" in cli("diff").stdout


def test_stdin_from_files(cli: CommandLine, tmp_path: Path) -> None:
    source = tmp_path / "source"
    source.write_bytes(b"line\n" * 1000)
    with open(source, "rb") as file:
        assert cli.run("--", "wc", "-l", stdin=file).stdout == b"1000\n"
    assert cli.run("--", "wc", "-c", stdin=subprocess.DEVNULL).stdout == b"0\n"


def test_a_command_that_does_not_read_does_not_wait_for_its_input(cli: CommandLine) -> None:
    process = cli.start("run", "--", "true")  # nobody ever closes or writes stdin
    assert process.wait(20) == 0
    process.communicate()


def test_nonblocking_descriptors_of_the_caller_lose_nothing(cli: CommandLine) -> None:
    in_reader, in_writer = os.pipe()
    out_reader, out_writer = os.pipe()
    for fd in (in_reader, out_writer):
        os.set_blocking(fd, False)
    process = cli.start("run", "--", "sh", "-c", "cat; head -c 1000000 /dev/zero", stdin=in_reader, stdout=out_writer)
    os.close(out_writer)
    time.sleep(0.5)  # empty at first, and nobody reads
    os.write(in_writer, b"late")
    os.close(in_writer)
    time.sleep(0.5)
    with open(out_reader, "rb") as output:
        data = output.read()
    assert data[:4] == b"late" and len(data) == 1_000_004
    assert process.wait(20) == 0
    assert not os.get_blocking(in_reader)  # and they stay as the caller made them
    os.close(in_reader)
    process.communicate()


def test_a_daemon_that_keeps_the_output_open_ends_with_the_command(cli: CommandLine) -> None:
    done = cli.run("--", "sh", "-c", "setsid sleep 1000 & echo done")
    assert (done.returncode, done.stdout) == (0, b"done\n")


# ---- signals ----


@pytest.mark.parametrize("name", ["TERM", "HUP", "INT", "QUIT", "USR1", "USR2"])
def test_a_signal_reaches_the_command_which_decides(cli: CommandLine, name: str) -> None:
    script = f"trap 'echo got {name}; exit 7' {name}; echo ready; while :; do sleep 0.05; done"
    process = cli.start("run", "--", "sh", "-c", script)
    assert process.stdout is not None
    assert process.stdout.readline() == b"ready\n"
    process.send_signal(getattr(signal, f"SIG{name}"))
    out, err = process.communicate(timeout=30)
    assert (process.returncode, out) == (7, f"got {name}\n".encode())
    assert b"corral" not in err and b"Traceback" not in err  # the shell may say what became of its `sleep`
    cli.left_by(process.pid)


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGHUP, signal.SIGINT])
def test_a_signal_ends_a_command_that_does_nothing_about_it(cli: CommandLine, number: signal.Signals) -> None:
    process = cli.start("run", "--", "sh", "-c", "echo ready; exec sleep 1000")
    assert process.stdout is not None
    process.stdout.readline()
    process.send_signal(number)
    _, err = process.communicate(timeout=30)
    assert (process.returncode, err) == (128 + number, b"")
    cli.left_by(process.pid)


def test_many_harmless_signals_end_nothing(cli: CommandLine) -> None:
    script = "trap : USR1 USR2 QUIT; echo ready; n=0; while [ $n -lt 100 ]; do sleep 0.02; n=$((n+1)); done; echo alive"
    process = cli.start("run", "--", "sh", "-c", script)
    assert process.stdout is not None
    process.stdout.readline()
    for _ in range(5):
        for number in (signal.SIGUSR1, signal.SIGUSR2, signal.SIGQUIT):
            process.send_signal(number)
            time.sleep(0.02)
    out, _ = process.communicate(timeout=30)
    assert (process.returncode, out) == (0, b"alive\n")


def test_the_fourth_ctrl_c_is_the_last(cli: CommandLine) -> None:
    process = cli.start("run", "--", "sh", "-c", "trap 'echo no' INT; echo ready; while :; do sleep 0.05; done")
    assert process.stdout is not None
    process.stdout.readline()
    for _ in range(3):
        process.send_signal(signal.SIGINT)
        assert process.stdout.readline() == b"no\n"
    process.send_signal(signal.SIGINT)
    _, err = process.communicate(timeout=30)
    assert process.returncode == 130 and err == b"corral: the sandbox was ended: interrupted by SIGINT\n"


def test_a_signal_to_a_job_takes_children_along(cli: CommandLine) -> None:
    process = cli.start("run", "--", "sh", "-c", "sleep 1001 & sleep 1002 & echo ready; wait")
    assert process.stdout is not None
    process.stdout.readline()
    below = descendants(process.pid)
    assert len(below) >= 4  # keeper, first process, shell, sleeps
    process.terminate()
    process.communicate(timeout=30)
    assert process.returncode == 143
    assert wait_until(lambda: not any(os.path.exists(f"/proc/{pid}") for pid in below))


# ---- what does not pass in ----


def environment(output: bytes) -> dict[str, str]:
    return dict(line.split("=", 1) for line in output.decode().split("\0") if line)


def test_nothing_of_the_callers_environment_passes_but_the_allow_list(cli: CommandLine) -> None:
    secrets = {
        "AWS_SECRET_ACCESS_KEY": "s3cret",
        "SSH_AUTH_SOCK": "/run/s3cret",
        "LD_PRELOAD": "",
        "PYTHONSTARTUP": "s3cret",
        "BASH_ENV": "s3cret",
        "PROMPT_COMMAND": "echo s3cret",
        "HTTP_PROXY": "http://s3cret",
        "DISPLAY": ":s3cret",
    }
    shown = {"LANG": "C.UTF-8", "LC_TIME": "C", "TZ": "Asia/Tokyo", "NO_COLOR": "1"}
    done = cli.run("--", "env", "-0", env=secrets | shown | {"PATH": "/usr/bin:/bin"})
    assert b"s3cret" not in done.stdout
    got = environment(done.stdout)
    assert {name: got.get(name) for name in shown} == shown
    assert {name: got[name] for name in ("HOME", "USER", "LOGNAME", "SHELL", "TMPDIR")} == {
        "HOME": "/home/agent",
        "USER": "agent",
        "LOGNAME": "agent",
        "SHELL": "/bin/bash",
        "TMPDIR": "/tmp",
    }
    own = {"CORRAL", "HOME", "USER", "LOGNAME", "SHELL", "TMPDIR", "PATH", "TERM", "PWD"}
    assert set(got) <= own | set(shown)
    assert got["PATH"].startswith("/usr/bin:/bin")


def test_root_inside_has_roots_home(cli: CommandLine) -> None:
    got = environment(cli.run("--user", "root", "--", "env", "-0").stdout)
    assert (got["HOME"], got["USER"], got["LOGNAME"]) == ("/root", "root", "root")


@pytest.mark.parametrize("mask", [0, 0o077, 0o777])
def test_umask_and_directory_are_sane_whatever_the_callers(cli: CommandLine, mask: int) -> None:
    done = cli.run("--", "sh", "-c", "umask; pwd; pwd -P; ls", umask=mask)
    assert done.stdout.decode().split() == ["0022", str(cli.workspace), str(cli.workspace), "file.txt"], done


def test_the_workspace_named_is_where_it_starts(cli: CommandLine, tmp_path: Path) -> None:
    other = tmp_path / "other place"
    other.mkdir(mode=0o755)
    assert cli.run("-w", str(other), "--", "pwd").stdout.decode() == f"{other}\n"
    assert cli.run("-w", "../other place", "--", "pwd").stdout.decode() == f"{other}\n"


def test_the_callers_descriptors_do_not_pass_in(cli: CommandLine, tmp_path: Path) -> None:
    secret = tmp_path / "secret"
    secret.write_text("s3cret")
    fd = os.open(secret, os.O_RDWR)
    high = fcntl.fcntl(fd, fcntl.F_DUPFD, 57)  # a free number: another could be one of Corral's own here
    os.set_inheritable(high, True)
    done = cli.run("--", "sh", "-c", f"ls -l /proc/self/fd /proc/$$/fd; cat </proc/self/fd/{high}", pass_fds=(high,))
    os.close(fd)
    os.close(high)
    assert done.returncode != 0 and b"s3cret" not in done.stdout and str(secret).encode() not in done.stdout
    numbers = {line.split(b" -> ")[0].split()[-1] for line in done.stdout.splitlines() if b" -> " in line}
    assert {b"0", b"1", b"2"} <= numbers <= {b"0", b"1", b"2", b"3", b"4"}  # ls opens the directory it lists


def test_stdin_cannot_be_reopened_for_writing(cli: CommandLine) -> None:
    """Whoever has a descriptor of a file can open the file anew through /proc; so commands get pipes."""
    target = cli.workspace.parent / "log"
    target.write_text("caller's\n")
    with open(target, "rb") as file:
        done = cli.run("--", "sh", "-c", "cat; echo overwritten >/proc/self/fd/0; readlink /proc/self/fd/0", stdin=file)
    assert target.read_text() == "caller's\n"
    assert done.stdout.startswith(b"caller's\n") and b"pipe:[" in done.stdout


def test_the_callers_terminal_is_absent(cli: CommandLine) -> None:
    master, slave = os.openpty()
    try:
        # A session whose controlling terminal this is, with only stderr on it.
        script = f'exec 3<>{os.ttyname(slave)}; exec "$@"'
        words = ["setsid", "--ctty", "--wait", "sh", "-c", script, "sh", *cli.command, "run", "--"]
        inside = "ls -l /proc/self/fd; tty; (: </dev/tty) && echo has a terminal; ps -o tty= -p $$; exit 0"
        words += ["sh", "-c", inside]
        pipe = subprocess.PIPE
        done = subprocess.run(words, stdin=slave, stdout=pipe, stderr=slave, cwd=cli.workspace, env=cli.env, timeout=30)
    finally:
        os.close(master)
        os.close(slave)
    assert done.returncode == 0
    assert b"/dev/pts" not in done.stdout and b"has a terminal" not in done.stdout
    assert b"not a tty" in done.stdout and done.stdout.endswith(b"?\n")
