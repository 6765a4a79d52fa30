"""What lies so deep that the kernel itself cannot tell its path: no rule could know it, so nothing is done there.

A path of more than 4,095 bytes is made by going on from directory to directory. What is put there would have no name
for the policy, and be moved afterwards to where it has one.
"""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from corral.actions import Decision, Verdict
from corral.policy.model import Approvals, Filesystem, Policy
from corral.sandbox.box import Sandbox
from tests.contain.attacks import inside
from tests.contain.conftest import MakeBox

HOOKS = Policy(filesystem=Filesystem(ask=("/**/.git/hooks/**",)), approvals=Approvals(timeout=0.01))
HOOK = "x/.git/hooks/pre-commit"
DESCEND = """
def descend():
    for _ in range(18):
        os.mkdir("d" * 250)
        os.chdir("d" * 250)
base = os.open(".", os.O_PATH)
"""
WAYS = {
    "open": "os.close(os.open(HOOK, os.O_CREAT | os.O_WRONLY, 0o755))",
    "descriptor": "os.open('pre-commit', os.O_CREAT | os.O_WRONLY, dir_fd=os.open('x/.git/hooks', os.O_PATH))",
    "by way of proc": "os.open('/proc/self/cwd/' + HOOK, os.O_CREAT | os.O_WRONLY)",
    "by its number": "os.open(f'/proc/self/fd/{hooks()}/pre-commit', os.O_CREAT | os.O_WRONLY)",
    "dangling link": "os.open('/tmp/to-hook', os.O_CREAT | os.O_WRONLY)",
    "link": "os.link('file.txt', HOOK, src_dir_fd=base)",
    "rename": "os.rename('file.txt', HOOK, src_dir_fd=base)",
    "symlink": "os.symlink('/bin/sh', HOOK)",
    "mknod": "os.mknod(HOOK, 0o100755)",
    "unnamed": "os.link(f'/proc/self/fd/{unnamed()}', HOOK, src_dir_fd=base, follow_symlinks=True)",
    "bind": "socket.socket(socket.AF_UNIX).bind(HOOK)",
}
ATTACK = """
HOOK, way = sys.argv[1:]
def hooks():
    return os.open("x/.git/hooks", os.O_PATH)
def unnamed():
    return os.open(".", os.O_TMPFILE | os.O_WRONLY, 0o755)
def plant():
    exec(way)
open("file.txt", "w").close()  # one of the layer, which can be linked
descend()
os.makedirs("x/.git/hooks")
os.symlink("/proc/self/cwd/" + HOOK, "/tmp/to-hook")
planted = attempt(plant)
tell([planted, attempt(lambda: os.rename("x", "x", dst_dir_fd=base))])
"""


def refusals(box: Sandbox) -> list[Decision]:
    box.core.supervision.flush()
    return [one for one in box.core.supervision.recent.all() if "so deep that its path cannot be told" in one.reason]


@pytest.mark.parametrize("way", WAYS)
async def test_nothing_watched_is_planted_where_it_has_no_name(way: str, make_box: MakeBox, workspace: Path) -> None:
    """Nor moved to where it has one; it is refused, and there is a record. Without rules all of this works."""
    box = await make_box(policy=HOOKS)
    how = {"directory": str(workspace)}
    refused = await inside(box, DESCEND + ATTACK, HOOK, WAYS[way], **how)
    root = f"/proc/self/fd/{box.core.root_fd}{workspace}"
    assert not os.path.lexists(f"{root}/{HOOK}")
    assert not os.path.lexists(f"{root}/x")
    assert refused == ["ENAMETOOLONG"] * 2
    found = refusals(box)
    assert len(found) == 2 and all(one.verdict is Verdict.DENY for one in found)
    plain = await make_box()
    if way not in ("bind", "by way of proc", "dangling link"):
        assert await inside(plain, DESCEND + ATTACK, HOOK, WAYS[way], **how) == ["", ""]
        assert os.path.lexists(f"/proc/self/fd/{plain.core.root_fd}{workspace}/{HOOK}")


REST = """
descend()
os.makedirs("x/y")
tell([
    attempt(lambda: os.open("x", os.O_RDONLY)), attempt(lambda: os.open(".", os.O_RDONLY)),
    attempt(lambda: os.rmdir("x/y")), attempt(lambda: os.unlink("x/y")), attempt(lambda: os.chmod("x", 0o700)),
    attempt(lambda: os.truncate("x/z", 0)), attempt(lambda: os.rename("x", "z")),
    attempt(lambda: os.link("x", "z")), attempt(lambda: os.fchmod(os.open("/tmp/shallow", os.O_RDONLY), 0o600)),
    attempt(lambda: os.listdir("/proc/self/cwd/..")), attempt(lambda: os.open("absent", os.O_RDONLY)),
    attempt(lambda: os.open("n" * 300, os.O_RDONLY)),
])
"""


async def test_whatever_is_wanted_there_is_refused_and_the_rest_is_not(make_box: MakeBox, workspace: Path) -> None:
    box = await make_box(policy=HOOKS)
    assert (await box.exec(["/bin/sh", "-c", "echo x > /tmp/shallow"])).exit_code == 0
    answers = await inside(box, DESCEND + REST, directory=str(workspace))
    long = "ENAMETOOLONG"
    assert answers == [long, long, long, long, long, "ENOENT", long, long, "", long, "ENOENT", long]
    assert len(refusals(box)) == 8  # the last one is the kernel's own word, and the one for a missing name too


SOCKETS = """
os.mkdir("x")
listener = socket.socket(socket.AF_UNIX)
listener.bind("x/s")
listener.listen(5)
receiver = socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM)
receiver.bind("x/d")
descend()
os.rename("x", "x", src_dir_fd=base)
os.chdir("x")
def connect(path):
    socket.socket(socket.AF_UNIX).connect(path)
sender = socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM)
deep = [attempt(connect, "s"), attempt(sender.sendto, b"x", "d"), attempt(sender.sendmsg, [b"x"], [], 0, "d"),
    attempt(sender.connect, "d"), attempt(lambda: socket.socket(socket.AF_UNIX).bind("new"))]
there = os.open("s", os.O_PATH)
os.unlink("s")
receiver.setblocking(False)
listener.setblocking(False)
tell([deep, sorted(os.listdir()), attempt(connect, f"/proc/self/fd/{there}"), attempt(receiver.recv, 9),
    attempt(listener.accept)])
"""


async def test_sockets_without_a_name_are_not_used_by_another(box: Sandbox, workspace: Path) -> None:
    """The record, and who is asked, would see what the caller says of it instead of what it is."""
    answers = await inside(box, DESCEND + SOCKETS, directory=str(workspace))
    assert answers == [["ENAMETOOLONG"] * 5, ["d"], "ENOENT", "EAGAIN", "EAGAIN"]
    assert len(refusals(box)) == 5
    (nameless,) = [one for one in box.core.supervision.recent.all() if "has no path" in one.reason]
    assert nameless.verdict is Verdict.DENY and nameless.action.name == "kernel.connect"
