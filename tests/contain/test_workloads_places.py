"""Workspaces of all kinds: by name, place, owner and mode, and with things in them that are no files."""

from __future__ import annotations

import os
import socket
import stat
import subprocess
import tempfile
from pathlib import Path

import pytest

from corral.errors import RequestError
from corral.sandbox.box import Sandbox
from corral.sandbox.changes import ChangeKind
from corral.sandbox.layer import discard, open_layer
from tests.contain.test_workloads import PATH, contained, tree


async def _work(workspace: Path, **options: str) -> None:
    """What every workspace must allow; leaves nothing."""
    (workspace / "given").write_text("given\n")
    (workspace / "sub" / "dir").mkdir(parents=True)
    (workspace / "sub" / "dir" / "file").write_text("deep\n")
    async with contained(workspace, **options) as inside:
        real = os.path.realpath(workspace)
        assert await inside.sh("pwd -P; cat given sub/dir/file") == f"{real}\ngiven\ndeep"
        await inside.sh("echo more >>given; echo new >sub/dir/new; rm sub/dir/file; chmod 700 sub; mv given moved")
        assert await inside.sh("stat -c '%u %U' . moved sub sub/dir/new") == "\n".join(["1000 agent"] * 4)
        kinds = {change.path.removeprefix(f"{real}/"): change.kind for change in await inside.box.changes()}
        assert kinds == {
            **{"given": ChangeKind.DELETED, "moved": ChangeKind.ADDED, "sub": ChangeKind.MODE},
            **{"sub/dir/new": ChangeKind.ADDED, "sub/dir/file": ChangeKind.DELETED},
        }


_NAMES = ("two  spaces 'and\" quotes", "ünïcode-名前-\U0001f600", "back\\slash:co,lon=%n$x", "-rf", "d/" * 99)


@pytest.mark.parametrize("name", _NAMES, ids=["spaces", "unicode", "punctuation", "dash", "deep"])
async def test_workspace_by_any_name(tmp_path: Path, name: str) -> None:
    workspace = tmp_path / name
    workspace.mkdir(parents=True)
    await _work(workspace)


async def test_workspace_below_home_and_tmp() -> None:
    for parent in (os.path.expanduser("~"), "/tmp", "/var/tmp"):
        with tempfile.TemporaryDirectory(dir=parent, prefix="corral-test-") as place:
            (Path(place) / "w").mkdir()
            (Path(place) / "beside").write_text("private")
            await _work(Path(place) / "w")
            async with contained(Path(place) / "w") as inside:
                assert await inside.sh(f"ls -A {place}") == "w"


async def test_workspace_through_a_link(tmp_path: Path) -> None:
    (tmp_path / "real").mkdir()
    (tmp_path / "link").symlink_to("real")
    await _work(tmp_path / "link")


async def test_workspace_with_modes_that_forbid(workspace: Path) -> None:
    (workspace / "frozen").mkdir()
    (workspace / "frozen" / "file").write_text("frozen\n")
    (workspace / "file.txt").chmod(0o444)
    (workspace / "frozen").chmod(0o555)
    try:
        async with contained(workspace) as inside:
            script = "! (echo x >>file.txt) 2>/dev/null; ! touch frozen/new 2>/dev/null; cat file.txt frozen/file"
            assert await inside.sh(script) == "original\nfrozen"
            await inside.sh("chmod u+w file.txt frozen; echo x >>file.txt; rm frozen/file; rmdir frozen")
    finally:
        (workspace / "frozen").chmod(0o755)


@pytest.mark.root
async def test_workspace_of_another_user(workspace: Path) -> None:
    """The agent sees itself as the owner, everybody else keeps their number; the kept changes name them."""
    (workspace / "sub").mkdir()
    (workspace / "sub" / "theirs").write_text("theirs\n")
    (workspace / "roots").write_text("root's\n")
    (workspace / "shared").write_text("group\n")
    for path in (workspace, *workspace.rglob("*")):
        os.chown(path, 1234, 1234)
    os.chown(workspace / "roots", 0, 0)
    os.chown(workspace / "shared", 1234, 4321)
    before = tree(workspace)
    async with Sandbox(workspace, environment={"PATH": PATH}, keep=True) as box:
        result = await box.exec(["stat", "-c", "%u:%g", ".", "file.txt", "shared", "roots"], check=True)
        assert result.text.split() == ["1000:1000", "1000:1000", "1000:4321", "0:0"]
        script = (
            "echo more >>file.txt; echo new >sub/new; rm sub/theirs; cat roots shared; id -u; "
            "! (echo x >>roots) 2>/dev/null; echo x >>shared; chmod 666 shared"
        )
        assert (await box.exec(["bash", "-euc", script], check=True)).text == "root's\ngroup\n1000\n"
    assert tree(workspace) == before
    assert box.kept is not None
    try:
        kept = open_layer(box.kept.id).changes()
        assert {(os.path.basename(change.path), change.kind) for change in kept} == {
            *(
                ("file.txt", ChangeKind.CHANGED),
                ("shared", ChangeKind.CHANGED),
                ("new", ChangeKind.ADDED),
                ("theirs", ChangeKind.DELETED),
            )
        }
        assert not [change for change in kept if change.owner_after not in (None, (1000, 1000), (1000, 4321))]
    finally:
        discard(box.kept.id)


@pytest.mark.root
async def test_workspace_on_a_tmpfs(tmp_path: Path) -> None:
    mount = tmp_path / "mount"
    mount.mkdir()
    subprocess.run(["mount", "-t", "tmpfs", "-o", "size=16m", "none", mount], check=True, timeout=60)
    try:
        (mount / "w").mkdir()
        await _work(mount / "w")
    finally:
        subprocess.run(["umount", mount], check=True, timeout=60)


async def test_workspace_in_a_place_that_the_sandbox_has_itself() -> None:
    """/dev/shm is the sandbox's own inside, so nothing of the host's can be shown there; it says so."""
    with tempfile.TemporaryDirectory(dir="/dev/shm", prefix="corral-test-") as place:
        with pytest.raises(RequestError, match="is a part of the system"):
            await Sandbox(place).start()


async def test_workspace_with_sockets_and_fifos(workspace: Path) -> None:
    """They are there, but lead nowhere: the overlay's inode is not the one that the host's service is bound to."""
    os.mkfifo(workspace / "fifo")
    reader = os.open(workspace / "fifo", os.O_RDONLY | os.O_NONBLOCK)
    with socket.socket(socket.AF_UNIX) as server:
        here = os.getcwd()
        os.chdir(workspace)  # the name of a socket may be 107 bytes long
        try:
            server.bind("socket")
        finally:
            os.chdir(here)
        server.listen()
        server.setblocking(False)
        for path in ("fifo", "socket"):
            (workspace / path).chmod(0o777)
        script = """
import errno, os, socket, stat
assert stat.S_ISFIFO(os.stat('fifo').st_mode) and stat.S_ISSOCK(os.stat('socket').st_mode)
try: socket.socket(socket.AF_UNIX).connect('socket')
except OSError as error: print(errno.errorcode[error.errno])
try: os.open('fifo', os.O_WRONLY | os.O_NONBLOCK)
except OSError as error: print(errno.errorcode[error.errno])
if os.fork() == 0: open('fifo', 'w').write('inside'); os._exit(0)
print(open('fifo').read()); os.unlink('fifo'); os.unlink('socket')
"""
        async with contained(workspace) as inside:
            assert await inside.python(script) == "ECONNREFUSED\nENXIO\ninside"
        with pytest.raises(BlockingIOError):
            server.accept()
    assert os.read(reader, 10) == b""
    os.close(reader)
    assert stat.S_ISSOCK(os.stat(workspace / "socket").st_mode)
