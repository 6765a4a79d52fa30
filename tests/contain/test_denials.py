"""Reasons reach the agent: with the result, on stderr, and in a file that nothing inside can touch."""

from __future__ import annotations

import asyncio
import json
import os
import re
from pathlib import Path
from typing import Any

import pytest

from corral import Denial, ExecError, Sandbox, SyncSandbox
from corral.actions import Action, Decision, Endpoint, Kind, Origin, Transport, Verdict
from corral.policy.load import parse_policy
from corral.sandbox.denials import PLACE
from corral.sandbox.notices import MAX_BYTES
from tests.contain.command_line import CommandLine, adopting_orphans
from tests.contain.conftest import Compile, MakeBox

CONNECT = (
    "import socket\ntry: socket.create_connection(('192.0.2.1', 443), 5)\nexcept OSError as error: print(error.errno)"
)


@pytest.fixture(autouse=True)
def own_directories(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("XDG_STATE_HOME", str(tmp_path))
    monkeypatch.setenv("XDG_RUNTIME_DIR", str(tmp_path))


async def lines(box: Sandbox) -> list[dict[str, Any]]:
    """The file, as the agent reads it."""
    result = await box.exec(["cat", PLACE], check=True)
    return [json.loads(line) for line in result.stdout.splitlines()]


# ---- the result ----


async def test_a_refused_connection_is_told_three_times(box: Sandbox) -> None:
    result = await box.exec(["python3", "-c", CONNECT])
    (denial,) = result.denials
    assert result.denials_dropped == 0
    assert denial.action == "net.connect 192.0.2.1:443" and denial.count == 1
    assert denial.refused == "Connecting to 192.0.2.1:443 (tcp) was refused."
    assert denial.rule and denial.reason and denial.instead and denial.pid > 1 and denial.exec > 0
    line = result.stderr.decode()
    assert line.startswith(f"corral: 1 action was refused: {denial.action} ({denial.rule}: ")
    assert line.endswith(f"Details: {PLACE}\n") and line.count("\n") == 1
    assert denial.instead.rstrip(".") in line
    (told,) = await lines(box)
    assert told == {name: getattr(denial, name) for name in Denial.__slots__}


async def test_refused_calls_are_told_with_what_to_do(box: Sandbox) -> None:
    result = await box.exec(
        ["sh", "-c", "mount -t tmpfs x /mnt; unshare -U true; printf end >&2; exit 7"], user="agent"
    )
    assert result.exit_code == 7
    told = {denial.action: denial for denial in result.denials}
    assert "workspace" in told["kernel.unshare"].instead or "contained" in told["kernel.unshare"].instead
    written, _, line = result.stderr.rpartition(b"\ncorral: ")
    assert written.endswith(b"end") and b"kernel.unshare" in line


async def test_each_exec_is_told_its_own(box: Sandbox) -> None:
    both = await asyncio.gather(
        box.exec(["python3", "-c", CONNECT]), box.exec(["python3", "-c", CONNECT.replace("443", "80")])
    )
    assert [[denial.action for denial in result.denials] for result in both] == [
        ["net.connect 192.0.2.1:443"],
        ["net.connect 192.0.2.1:80"],
    ]
    assert both[0].denials[0].exec != both[1].denials[0].exec


@pytest.mark.parametrize(
    "argv",
    [
        ["true"],
        ["sh", "-c", "true"],
        ["bash", "-c", "ls | cat"],
        ["python3", "-c", "import threading, asyncio, socket"],
    ],
)
async def test_where_nothing_was_refused_nothing_is_said(box: Sandbox, argv: list[str]) -> None:
    result = await box.exec(argv)
    assert result.stderr == b"" and result.denials == ()


async def test_quiet_refusals_are_not_told(box: Sandbox) -> None:
    source = "import threading; [t.start() for t in [threading.Thread(target=print) for _ in range(20)]]"
    result = await box.exec(["python3", "-c", source])
    assert result.stderr == b"" and result.denials == ()
    assert any(decision.action.name == "kernel.clone3" for decision in box.core.supervision.recent.all())
    assert (await box.exec(["test", "-e", PLACE])).exit_code == 1


async def test_the_line_comes_after_an_output_that_was_cut(make_box: MakeBox) -> None:
    box = await make_box(policy=parse_policy("version: 1\nresources: {output: 1KiB}", source="test"))
    seen: list[bytes] = []
    result = await box.exec(
        ["sh", "-c", f"head -c 5000 /dev/zero | tr '\\0' x >&2; python3 -c \"{CONNECT}\""], on_stderr=seen.append
    )
    assert result.stderr_truncated and result.stderr.startswith(b"x" * 1024 + b"\ncorral: 1 action was refused: ")
    assert b"".join(seen) == result.stderr


# ---- streams and terminals ----


async def test_a_stream_ends_with_the_line(box: Sandbox) -> None:
    process = await box.start_process(["python3", "-c", CONNECT + "\nimport sys; sys.stderr.write('half')"])
    out, err = await asyncio.gather(process.stdout.read(), process.stderr.read())
    assert out.strip().isdigit()
    assert err.startswith(b"half\ncorral: 1 action was refused: net.connect") and err.endswith(b".jsonl\n")
    assert [denial.action for denial in (await process.wait()).denials] == ["net.connect 192.0.2.1:443"]


async def test_a_stream_without_refusals_ends_as_it_was(box: Sandbox) -> None:
    process = await box.start_process(["sh", "-c", "echo out; printf err >&2"])
    out, err = await asyncio.gather(process.stdout.read(), process.stderr.read())
    assert (out, err) == (b"out\n", b"err")
    assert (await process.wait()).denials == ()


async def test_a_stream_that_a_daemon_holds_ends_with_the_line_too(box: Sandbox) -> None:
    process = await box.start_process(["sh", "-c", f'(sleep 0.3; echo late >&2) & python3 -c "{CONNECT}"'])
    await process.wait()
    assert re.fullmatch(rb"late\ncorral: 1 action was refused: .*\n", await process.stderr.read())


async def test_a_terminal_ends_with_the_line(box: Sandbox) -> None:
    process = await box.start_process(["python3", "-c", CONNECT], terminal=(24, 80))
    seen = await process.stdout.read()
    assert re.fullmatch(rb"\d+\r\ncorral: 1 action was refused: [^\r\n]*\r\n", seen)


async def test_a_killed_sandbox_ends_its_streams(box: Sandbox) -> None:
    process = await box.start_process(["sh", "-c", "exec sleep 1000"])
    box.kill()
    assert await process.stderr.read() == b""


# ---- the file ----

# Each tries to write, remove, replace or cover the file; 0 would be success. The mounts are tried as calls too.
ATTACKS = r"""
import ctypes, os, sys
file, place = "/run/corral/denials.jsonl", "/run/corral"
libc = ctypes.CDLL(None, use_errno=True)
def call(name, *words):
    if getattr(libc, name)(*words) != 0:
        raise OSError(ctypes.get_errno(), name)
def reopen(flags):
    fd = os.open(file, os.O_RDONLY)
    os.write(os.open(f"/proc/self/fd/{fd}", flags), b"x")
tries = {
    "write": lambda: open(file, "a"),
    "truncate": lambda: os.truncate(file, 0),
    "create": lambda: open(place + "/other", "x"),
    "unlink": lambda: os.unlink(file),
    "rename": lambda: os.rename(file, "/run/moved"),
    "link": lambda: os.link(file, "/run/linked"),
    "replace": lambda: os.rename("/run/mine", file),
    "rmdir": lambda: os.rmdir(place),
    "move the place": lambda: os.rename(place, "/run/elsewhere"),
    "move /run": lambda: os.rename("/run", "/elsewhere"),
    "swap the place": lambda: call("renameat2", -100, b"/run/mine.d", -100, b"/run/corral", 2),
    "chmod": lambda: os.chmod(file, 0o666),
    "chmod the place": lambda: os.chmod(place, 0o777),
    "chown": lambda: os.chown(file, os.getuid(), os.getgid()),
    "xattr": lambda: os.setxattr(file, "user.x", b"x"),
    "utime": lambda: os.utime(file),
    "by /proc/self/root": lambda: open("/proc/self/root" + file, "a"),
    "by /proc/1/root": lambda: open("/proc/1/root" + file, "a"),
    "by its descriptor": lambda: reopen(os.O_WRONLY),
    "by its descriptor, anew": lambda: reopen(os.O_RDWR | os.O_TRUNC),
    "lease": lambda: __import__("fcntl").fcntl(os.open(file, os.O_RDONLY), 1024, 1),
    "mount over": lambda: call("mount", b"none", b"/run/corral", b"tmpfs", 0, None),
    "bind over": lambda: call("mount", b"/tmp", b"/run/corral", None, 4096, None),
    "remount": lambda: call("mount", None, b"/run/corral", None, 32 | 4096, None),
    "umount": lambda: call("umount2", b"/run/corral", 2),
    "a namespace": lambda: call("unshare", 0x10020000),
}
open("/run/mine", "w").write("forged")
os.mkdir("/run/mine.d")
for name, attempt in tries.items():
    try:
        attempt()
    except OSError:
        continue
    print(name)
"""


@pytest.mark.parametrize("user", ["agent", "root"])
async def test_nothing_inside_can_touch_the_file(make_box: MakeBox, user: str) -> None:
    box = await make_box(user=user)
    # Whatever the directory that it is mounted in allows.
    owner = "root" if box.core.prepared.identity.has(0) else None
    await box.exec(["chmod", "777", "/run"], user=owner, check=True)
    await box.exec(["python3", "-c", CONNECT])
    before = await lines(box)
    assert [line["action"] for line in before] == ["net.connect 192.0.2.1:443"]
    result = await box.exec(["python3", "-c", ATTACKS], directory="/tmp")
    assert result.stdout == b"" and b"Traceback" not in result.stderr, result
    after = await lines(box)
    assert after[: len(before)] == before
    assert {line["action"] for line in after[len(before) :]} >= {"kernel.mount", "kernel.umount2", "kernel.unshare"}


@pytest.mark.root
async def test_root_inside_the_agents_sandbox_cannot_either(box: Sandbox) -> None:
    await box.exec(["python3", "-c", CONNECT])
    before = await lines(box)
    result = await box.exec(["python3", "-c", ATTACKS], directory="/tmp", user="root")
    assert result.stdout == b"" and b"Traceback" not in result.stderr, result
    assert (await lines(box))[: len(before)] == before


async def test_the_file_is_nobodys_change(make_box: MakeBox) -> None:
    box = await make_box(keep=True)
    await box.exec(["python3", "-B", "-c", CONNECT])
    assert len(await lines(box)) == 1
    assert await box.changes() == []
    await box.close()
    assert box.kept is None


async def test_before_the_first_refusal_there_is_no_file(box: Sandbox) -> None:
    assert (await box.exec(["ls", "-A", os.path.dirname(PLACE)])).stdout == b""


async def test_a_full_layer_loses_lines_and_no_denials(make_box: MakeBox) -> None:
    box = await make_box(policy=parse_policy("version: 1\nresources: {disk: 16MiB}", source="test"))
    await box.exec(["sh", "-c", "head -c 100M /dev/zero > /tmp/full"])
    result = await box.exec(["python3", "-c", CONNECT])
    assert [denial.action for denial in result.denials] == ["net.connect 192.0.2.1:443"]
    await box.exec(["rm", "/tmp/full"])
    await box.exec(["python3", "-c", CONNECT.replace("443", "80")])
    more, told = await lines(box)
    assert more["more"] == 1 and told["action"] == "net.connect 192.0.2.1:80"


async def test_a_flood_is_bounded_and_counted(box: Sandbox, compile_c: Compile) -> None:
    source = r"""
        #include <arpa/inet.h>
        #include <sys/mount.h>
        #include <sys/socket.h>
        int main(void) {
            for (int i = 0; i < 50000; i++) mount("a", "/b", "c", 0, 0);
            for (int i = 0; i < 50000; i++) {
                struct sockaddr_in to = {.sin_family = AF_INET, .sin_port = htons(1 + i % 60000)};
                inet_pton(AF_INET, "192.0.2.1", &to.sin_addr);
                connect(socket(AF_INET, SOCK_DGRAM, 0), (void *)&to, sizeof to);
                if (i % 500 == 499) for (int fd = 3; fd < 600; fd++) close(fd);
            }
            return 0;
        }
    """
    result = await box.exec([compile_c(source)], timeout=300)
    assert result.exit_code == 0 and len(result.denials) == 100
    assert result.denials[0].action == "kernel.mount" and result.denials[0].count == 50_000
    assert sum(denial.count for denial in result.denials) + result.denials_dropped == 100_000
    assert len(result.stderr) < 4_000 and result.stderr.count(b"\n") == 1
    told = await lines(box)
    size = int((await box.exec(["stat", "-c", "%s", PLACE])).stdout)
    assert MAX_BYTES - 1_000 < size <= MAX_BYTES
    assert sum(line["count"] for line in told[:-1]) + told[-1]["more"] == 100_000


# ---- what is not told ----


async def test_a_private_rule_leaks_nothing(box: Sandbox) -> None:
    process = await box.start_process(["sh", "-c", "cat; true"])
    number = process._number
    action = Action(Kind.NET_CONNECT, Endpoint(Transport.TCP, "192.0.2.9", 22), Origin(box.id, "s", exec=number))
    decision = Decision(
        action, Verdict.DENY, "SECRET-rule", "SECRET-reason", "SECRET-advice", "policy", 1, 1.0, private=True
    )
    box.core.notices.write(decision)
    process.close_stdin()
    seen = await process.stderr.read()
    (denial,) = (await process.wait()).denials
    content = await box.read_file(PLACE)
    assert denial.refused == "This is not allowed in this sandbox." and b"not allowed in this sandbox" in seen
    assert "SECRET" not in repr(denial) and b"SECRET" not in seen + content


async def test_a_name_from_inside_cannot_draw_on_a_terminal(box: Sandbox) -> None:
    name = r"/tmp/\x1b[2J\n\u202e"
    source = f"import socket\nsocket.socket(socket.AF_UNIX).connect_ex('{name}')\n" + CONNECT
    await box.exec(["python3", "-c", source])
    process = await box.start_process(["true"])
    path = "/tmp/\x1b[2J\n\u202e"
    action = Action(Kind.NET_CONNECT, Endpoint(Transport.UNIX, path=path), Origin(box.id, "s", exec=process._number))
    box.core.notices.write(Decision(action, Verdict.DENY, path, path, path, "policy", 1, 1.0))
    seen = await process.stderr.read()
    assert seen.decode().removesuffix("\n").isprintable()


async def test_a_program_that_may_not_run_says_why(make_box: MakeBox) -> None:
    policy = parse_policy(
        "version: 1\nprocess: {deny: [{path: /usr/bin/env, reason: env tells too much, advice: Name the variable.}]}",
        source="test",
    )
    box = await make_box(policy=policy)
    with pytest.raises(ExecError, match=r"process\.exec /usr/bin/env.*env tells too much.*Name the variable"):
        await box.exec(["/usr/bin/env"])


# ---- the other faces ----


def test_the_blocking_face_has_them(workspace: Path) -> None:
    with SyncSandbox(workspace) as box:
        assert [denial.action for denial in box.exec(["python3", "-c", CONNECT]).denials] == [
            "net.connect 192.0.2.1:443"
        ]


def test_the_command_line_says_it_unless_it_is_quiet(tmp_path: Path, workspace: Path) -> None:
    with adopting_orphans():
        cli = CommandLine(tmp_path, workspace)
        command = ("python3", "-B", "-c", CONNECT + "\nopen('new', 'w')")
        seen = cli("run", "--", *command).stderr.decode().splitlines()
        assert len(seen) == 2
        assert seen[0].startswith("corral: 1 action was refused: net.connect 192.0.2.1:443 (")
        assert PLACE not in seen[0], "the sandbox is gone, and its file"
        assert "1 change kept" in seen[1]
        assert cli("run", "--quiet", "--", *command).stderr == b""
        told = json.loads(cli("run", "--quiet", "--json", "--", *command).stderr)
        assert told["refused"] == 1
        with cli.live("--", "sleep", "1000") as (name, _):
            seen = cli("exec", name, "--", *command).stderr.decode().splitlines()
            assert len(seen) == 1 and seen[0].startswith("corral: 1 action was refused: ") and PLACE in seen[0]
