"""Vectors 25 to 36 (group C): reaching the host's files, and another sandbox's.

Each test plants a canary on the host, attacks it from inside, and then compares the host: a tree counts as untouched
only if every name, byte, mode, owner, time, link count, flag and attribute is what it was.
"""

from __future__ import annotations

import errno
import fcntl
import json
import os
import shutil
import stat
import uuid
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path
from typing import Any

import pytest

from corral.errors import CorralError
from corral.policy.model import Filesystem, Policy
from corral.sandbox import paths
from corral.sandbox.box import Sandbox
from corral.sandbox.layer import discard
from tests.contain.conftest import Compile, MakeBox

PYTHON = "/usr/bin/python3"
IS_ROOT = os.geteuid() == 0
MARK = "corral-canary-51d0"
FS_IOC_GETFLAGS, FS_IOC_SETFLAGS = 0x80086601, 0x40086602

# What every attack below starts with: `attempt` gives "DONE" or the errno's name, `answer` is what the test gets.
PRELUDE = r"""
import array, ctypes, errno, fcntl, json, os, shutil, socket, stat, struct, subprocess, sys
ARGS = json.loads(sys.argv[1])
libc = ctypes.CDLL(None, use_errno=True)
def attempt(function, *arguments):
    try:
        function(*arguments)
    except OSError as error:
        return errno.errorcode.get(error.errno, str(error.errno))
    return "DONE"
def answer(value):
    print(json.dumps(value))
def write(path, text="attack"):
    with open(path, "w") as file:
        file.write(text)
def find(mark, *roots):
    found = []
    for root in roots:
        for place, directories, files in os.walk(root, onerror=lambda error: None):
            if place == "/":
                directories[:] = [name for name in directories if name not in ("proc", "sys", "usr", "dev")]
            found += [place + "/" + name for name in directories + files if mark in name]
    return found
"""


async def attack(box: Sandbox, code: str, *arguments: object, **how: Any) -> Any:
    """Runs Python code inside, which must come to its own end; returns what it answers."""
    result = await box.exec([PYTHON, "-c", PRELUDE + code, json.dumps(arguments)], timeout=60, **how)
    assert result.exit_code == 0, result.stderr.decode()
    return json.loads(result.stdout)


def picture(root: Path) -> dict[str, tuple[object, ...]]:
    """All that can be known about a tree of the host, to be compared later."""
    found: dict[str, tuple[object, ...]] = {}
    for path in (root, *sorted(root.rglob("*"))):
        status = path.lstat()
        content: object = None
        flags = 0
        if stat.S_ISLNK(status.st_mode):
            content = os.readlink(path)
        elif stat.S_ISREG(status.st_mode) or stat.S_ISDIR(status.st_mode):
            fd = os.open(path, os.O_RDONLY | os.O_NOATIME)
            with suppress(OSError):  # not every file system has flags
                flags = int.from_bytes(fcntl.ioctl(fd, FS_IOC_GETFLAGS, bytes(8)), "little")
            content = os.read(fd, 1 << 20) if stat.S_ISREG(status.st_mode) else None
            os.close(fd)
        attributes = {name: os.getxattr(path, name, follow_symlinks=False)
                      for name in os.listxattr(path, follow_symlinks=False)}  # fmt: skip
        found[str(path)] = (status.st_mode, status.st_uid, status.st_gid, status.st_ino, status.st_nlink,
                            status.st_mtime_ns, status.st_ctime_ns, content, flags, sorted(attributes.items()),
                            status.st_atime_ns if stat.S_ISREG(status.st_mode) else None)  # fmt: skip
    return found


def difference(before: dict[str, tuple[object, ...]], root: Path) -> list[tuple[str, object, object]]:
    """What of a tree is not as it was: empty, or the attack has reached the host."""
    now = picture(root)
    changed = [path for path in sorted({*before, *now}) if before.get(path) != now.get(path)]
    return [(path, str(before.get(path)), str(now.get(path))) for path in changed]


@pytest.fixture
def host(tmp_path: Path) -> Path:
    """A tree of the host beside the workspace, which nothing shows by itself."""
    tree = tmp_path / "host"
    (tree / "sub").mkdir(parents=True)
    (tree / "secret").write_text(MARK)
    (tree / "sub" / "inner").write_text(MARK)
    (tree / "link").symlink_to("secret")
    for path in (tree, tree / "sub"):
        path.chmod(0o777)
    for path in (tree / "secret", tree / "sub" / "inner"):
        path.chmod(0o666)
        os.utime(path, (1, 1))
    return tree


@pytest.fixture
def state(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """Kept layers of a test lie in its own place."""
    place = tmp_path / "state"
    place.mkdir(mode=0o700)
    monkeypatch.setenv("XDG_STATE_HOME", str(place))
    yield place / "corral" / "layers"
    shutil.rmtree(place, ignore_errors=True)


# ---- 25, 26, 27: links ----

SWAP = """
import os, sys
target, place = sys.argv[1:3]
os.makedirs(place + "/dir", exist_ok=True)
open(place + "/file", "w").write("inside")
print("ready", flush=True)
for _ in range(200_000):
    os.symlink(target, place + "/l"); os.rename(place + "/l", place + "/file")
    open(place + "/f", "w").write("inside"); os.rename(place + "/f", place + "/file")
    os.rename(place + "/dir", place + "/away"); os.symlink(os.path.dirname(target), place + "/dir")
    os.unlink(place + "/dir"); os.rename(place + "/away", place + "/dir")
"""


async def test_v25_swapping_files_for_links_misleads_no_verb(make_box: MakeBox, workspace: Path, host: Path) -> None:
    before, before_workspace = picture(host), picture(workspace)
    box = await make_box()
    place = f"{workspace}/race"
    process = await box.start_process([PYTHON, "-c", SWAP, str(host / "secret"), place])
    assert await process.stdout.readline() == b"ready\n"
    upload = workspace.parent / "upload"
    upload.write_text("uploaded")
    outcomes = {"read": 0, "written": 0, "refused": 0}
    for round_ in range(150):
        for path in (f"{place}/file", f"{place}/dir/secret"):
            with suppress(CorralError):
                assert MARK.encode() not in await box.read_file(path)
                outcomes["read"] += 1
            try:
                if round_ % 3:
                    await box.write_file(path, b"from outside")
                else:
                    await box.upload(upload, path)
                outcomes["written"] += 1
            except CorralError:
                outcomes["refused"] += 1
        with suppress(CorralError):
            assert all(entry.name != "inner" for entry in await box.list_files(f"{place}/dir"))
        target = workspace.parent / f"down{round_}"
        with suppress(CorralError):
            await box.download(f"{place}/dir", target)
        assert not list(target.rglob("inner"))
    process.kill()
    await process.wait()
    assert outcomes["read"] and outcomes["written"], outcomes  # both sides of the race were seen
    assert not difference(before, host) and not difference(before_workspace, workspace)


@pytest.mark.parametrize("user", ["agent", "root"])
async def test_v26_hard_links_reach_no_inode_of_the_host(
    user: str, make_box: MakeBox, workspace: Path, host: Path
) -> None:
    place = workspace / "open"  # `root` has no capability to pass over modes, as root of the host would
    place.mkdir()
    place.chmod(0o777)
    os.link(host / "secret", place / "hard")  # made on the host: shown, and to be copied on the first write
    before, before_workspace = picture(host), picture(workspace)
    box = await make_box(user=user, policy=Policy(filesystem=Filesystem(read=(str(host),))))
    got = await attack(
        box,
        """
workspace, host = ARGS
found = [attempt(os.link, source, target) for source, target in (
    (host + "/secret", workspace + "/a"), (host + "/secret", "/tmp/a"), (host + "/secret", host + "/b"),
    ("/usr/bin/env", workspace + "/c"), ("/proc/self/root" + host + "/secret", workspace + "/d"))]
fd = os.open(host + "/secret", os.O_RDONLY)
found.append(attempt(os.link, f"/proc/self/fd/{fd}", workspace + "/e"))
found.append("DONE" if libc.linkat(fd, b"", -100, (workspace + "/f").encode(), 0x1000) == 0
             else errno.errorcode[ctypes.get_errno()])
os.link(workspace + "/hard", workspace + "/again")
with open(workspace + "/again", "a") as file:
    file.write("attack")
os.utime(workspace + "/hard")
answer([found, open(workspace + "/hard").read(), open(host + "/secret").read()])
""",
        str(place),
        str(host),
    )
    assert got[0] == ["EXDEV", "EXDEV", "EROFS", "EXDEV", "EXDEV", "EXDEV", "EXDEV"]
    assert got[1:] == [f"{MARK}attack", MARK]
    assert not difference(before, host) and not difference(before_workspace, workspace)


@pytest.mark.parametrize("user", ["agent", "root"])
async def test_v27_proc_shows_no_way_to_the_host(user: str, make_box: MakeBox, host: Path) -> None:
    before = picture(host)
    box = await make_box(user=user)
    keeper, controller = box.core.keeper, os.getpid()
    got = await attack(
        box,
        """
host, pids = ARGS
roots = ["/proc/self/root", "/proc/self/task/self/root", f"/proc/{os.getpid()}/root", "/proc/thread-self/root",
         "/proc/self/cwd/../../../../../../../..", "/proc/self/fd/0/../../..", "/dev/fd/..", "/proc/self/ns/mnt/..",
         *(f"/proc/{pid}/{what}" for pid in pids for what in ("root", "cwd", "fd/3", "fd/4", "map_files"))]
files = [f"/proc/{pid}/{name}" for pid in pids for name in
         ("mem", "maps", "environ", "auxv", "stack", "syscall", "cmdline", "fdinfo/3", "ns/mnt", "exe", "status", "io")]
def bend():
    with open("/proc/self/mem", "r+b", 0) as memory:  # its own is its own
        memory.seek(id(bend)); memory.read(8)
def through_map_files():
    for name in os.listdir("/proc/self/map_files"):
        os.close(os.open("/proc/self/map_files/" + name, os.O_RDWR))
answer([[attempt(os.open, root + host + "/secret", os.O_RDONLY) for root in roots],
        [attempt(os.open, path, os.O_RDONLY) for path in files], attempt(bend), attempt(through_map_files),
        sorted(name for name in os.listdir("/proc") if name.isdigit() and int(name) != os.getpid())])
""",
        str(host),
        [1, keeper, controller],
    )
    assert set(got[0]) <= {"ENOENT", "ENOTDIR"} and set(got[1]) == {"ENOENT"}, got
    assert got[2:] == ["DONE", "EPERM", []]  # PID 1 is not even listed
    assert not difference(before, host)


# ---- 28, 29, 30, 36: what makes others execute, and what must not be lost ----

PLANTED = (
    ".git/hooks/pre-commit", ".git/hooks/post-checkout", ".git/config", ".git/modules/sub/hooks/post-merge",
    ".git/worktrees/tree/config.worktree", "vendor/lib/.git/hooks/pre-push", "tree/.git", "sub/.git", ".gitmodules",
    ".gitattributes", ".husky/pre-commit", ".envrc", ".bashrc", ".profile", ".vscode/tasks.json",
    ".vscode/settings.json", ".claude/settings.json", ".idea/workspace.xml", "conftest.py", "sitecustomize.py",
    "evil.pth", "setup.cfg", "package.json", "node_modules/.bin/tsc", ".npmrc", "Makefile", ".github/workflows/ci.yml",
)  # fmt: skip
HOME_PLANTED = (".bashrc", ".ssh/authorized_keys", ".config/autostart/x.desktop", ".gitconfig", ".local/bin/ls",
                ".config/systemd/user/x.service", ".local/lib/python3.11/site-packages/x.pth")  # fmt: skip
SYSTEM_PLANTED = ("/etc/cron.d/x", "/etc/profile.d/x.sh", "/etc/ld.so.preload", "/usr/local/bin/ls", "/var/spool/x",
                  "/usr/lib/python3/dist-packages/x.pth", "/run/x", "/dev/shm/x", "/tmp/x", "/etc/passwd")  # fmt: skip


@pytest.mark.parametrize("user", ["agent", "root"])
async def test_v28_v29_v30_what_others_would_execute_stays_in_the_layer(
    user: str, make_box: MakeBox, workspace: Path, tmp_path: Path
) -> None:
    for name in (".git/hooks", ".git/modules/sub/hooks", ".git/worktrees/tree", "vendor/lib/.git/hooks", "tree"):
        (workspace / name).mkdir(parents=True)
    for name in (".git/hooks/pre-commit", ".git/config", "tree/.git", "conftest.py", "package.json", ".envrc"):
        (workspace / name).write_text("the host's\n")  # the others are missing at the start
        os.utime(workspace / name, (1, 1))
    os.setxattr(workspace / "conftest.py", "user.kept", b"1")
    for path in (workspace, *workspace.rglob("*")):  # for `root`, who has no capability to pass over modes
        path.chmod(0o777)
    home = Path(os.path.expanduser("~"))
    before, before_home = picture(workspace), sorted(os.listdir(home))
    system = {path: os.lstat(path).st_ctime_ns for path in SYSTEM_PLANTED if os.path.lexists(path)}
    box = await make_box(user=user)
    got = await attack(
        box,
        """
workspace, names, host_home, home_names, system = ARGS
def plant(path):
    os.makedirs(os.path.dirname(path), exist_ok=True)
    write(path)
    os.chmod(path, 0o755)
    os.setxattr(path, "user.attack", b"1")
answer([{name: attempt(plant, workspace + "/" + name) for name in names},
        {name: attempt(plant, os.environ["HOME"] + "/" + name) for name in home_names},
        {name: attempt(plant, host_home + "/" + name) for name in home_names},
        {path: attempt(plant, path) for path in system}])
""",
        str(workspace),
        PLANTED,
        str(home),
        HOME_PLANTED,
        SYSTEM_PLANTED,
    )
    # Writing works, that is what the layer is for. Only as root are there two ids inside, who may not all.
    assert {got[1][name] for name in HOME_PLANTED} == {"DONE"} and got[3]["/tmp/x"] == got[3]["/dev/shm/x"] == "DONE"
    if user == "agent" or not IS_ROOT:
        assert set(got[0].values()) == {"DONE"}, got[0]
        changed = {change.path for change in await box.changes()}
        assert {f"{workspace}/{name}" for name in PLANTED} <= {p for c in changed for p in (c, *_below(c, workspace))}
    else:
        assert {got[3][path] for path in SYSTEM_PLANTED} == {"DONE"}, got[3]
    assert not difference(before, workspace)
    assert sorted(os.listdir(home)) == before_home
    now = {path: os.lstat(path).st_ctime_ns for path in SYSTEM_PLANTED if os.path.lexists(path)}
    assert now == system


def _below(changed: str, workspace: Path) -> list[str]:
    """What is planted below a new directory, which is listed as one change."""
    return [f"{workspace}/{name}" for name in PLANTED if f"{workspace}/{name}".startswith(f"{changed}/")]


async def test_v28_what_is_denied_stays_absent_when_it_appears_or_is_replaced(
    make_box: MakeBox, workspace: Path, host: Path
) -> None:
    (workspace / ".env").write_text("old")
    missing = workspace / "settings.json"
    denied = (str(workspace / ".env"), str(missing), str(host / "secret"))
    box = await make_box(policy=Policy(filesystem=Filesystem(read=(str(host),), deny=denied)))
    look = """
answer([[open(path).read(), attempt(write, path), attempt(os.unlink, path), attempt(os.rename, ARGS[1], path)]
        for path in ARGS[0]])
"""
    spare = f"{workspace}/file.txt"
    refused = [["", "DONE", "EBUSY", "EBUSY"], ["", "DONE", "EBUSY", "EBUSY"], ["", "DONE", "EROFS", "EXDEV"]]
    assert await attack(box, look, denied, spare) == refused  # a write goes where /dev/null puts it
    for path in map(Path, denied):  # as editors save: another file takes the name
        new = path.with_name("new")
        new.write_text(MARK)
        os.rename(new, path)
    before = picture(workspace)
    assert await attack(box, look, denied, spare) == refused
    assert not [change for change in await box.changes() if change.path in denied]
    assert not difference(before, workspace) and missing.read_text() == MARK


async def test_v36_corrals_own_directories_are_absent(make_box: MakeBox, workspace: Path, state: Path) -> None:
    box = await make_box()
    places = [paths.state_directory(), paths.runtime_directory(), paths.cache_directory(), "/sys/fs/cgroup"]
    Path(places[0], MARK).mkdir()
    marked = [Path(places[0], MARK), Path(paths.controller_paths()[1]), Path(box.core.prepared.view.parts[1].lowers[0])]
    assert all(path.exists() for path in marked)
    got = await attack(
        box,
        """
places, ledger, control, mark = ARGS
def connect(path):
    socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET).connect(path)
answer([[attempt(shutil.rmtree, place + "/" + mark) for place in places], os.path.exists(ledger),
        [name for place in places if os.path.isdir(place) for name in os.listdir(place)], attempt(connect, control),
        attempt(os.makedirs, "/sys/fs/cgroup/x"), find(mark, "/"), open("/proc/self/mountinfo").read(),
        open("/proc/self/cgroup").read()])
""",
        places,
        f"{places[0]}/layers",
        paths.controller_paths()[1],
        MARK,
    )
    assert set(got[0]) == {"ENOENT"} and got[1] is False and got[2] == [] and got[3] == "ENOENT"
    assert got[4] in ("EROFS", "EACCES", "ENOENT") and got[5] == []
    # The mount table tells no place of the host. Root's runtime directory has the name of the sandbox's own notices.
    assert not any(place in got[6] for place in places[:3] if place != "/run/corral")
    assert str(os.getpid()) not in got[7]
    assert all(path.exists() for path in marked)


# ---- 31: /tmp ----


async def test_v31_predictable_names_in_tmp_are_the_sandboxs_own(make_box: MakeBox) -> None:
    names = [f"/{place}/{MARK}-{uuid.uuid4().hex}" for place in ("tmp", "var/tmp", "dev/shm")]
    try:
        for name in names[:2]:
            Path(name).write_text("the host's")
        box = await make_box()
        got = await attack(
            box,
            """
found = [os.path.lexists(name) for name in ARGS]
for name in ARGS:
    os.symlink("/etc/passwd", name)
    os.symlink("/etc/passwd", name + ".later")
answer(found + find("corral-canary", "/tmp", "/var/tmp", "/dev/shm"))
""",
            *names,
        )
        assert got[:3] == [False] * 3
        assert [Path(name).read_text() for name in names[:2]] == ["the host's"] * 2
        assert not os.path.lexists(names[2]) and not any(os.path.lexists(f"{name}.later") for name in names)
    finally:
        for name in names:
            Path(name).unlink(missing_ok=True)


# ---- 32, and denied paths ----


@pytest.mark.parametrize("user", ["agent", "root"])
async def test_v32_denied_paths_stay_absent_whatever_is_renamed(
    user: str, make_box: MakeBox, workspace: Path, host: Path
) -> None:
    for tree in (workspace, host):
        (tree / "keys" / "deep").mkdir(parents=True)
        (tree / "keys" / "deep" / "id").write_text(MARK)
        (tree / "token").write_text(MARK)
        (tree / "to-token").symlink_to("token")
        (tree / "to-keys").symlink_to(tree / "keys")
    before, before_workspace = picture(host), picture(workspace)
    denied = [str(tree / name) for tree in (workspace, host) for name in ("keys/deep", "token")]
    policy = Policy(filesystem=Filesystem(read=(str(host),), deny=(*denied, "/etc/shadow", "/nowhere/at/all")))
    box = await make_box(user=user, policy=policy)
    got = await attack(
        box,
        """
def reads(where):
    found = []
    for place, _, files in os.walk(where, followlinks=True):
        for name in files:
            try:
                with open(place + "/" + name) as file:
                    found.append([place + "/" + name, file.read(64)])
            except OSError:
                pass
    return found
def tries(tree):
    yield attempt(os.rename, tree + "/token", tree + "/x")
    yield attempt(os.rename, tree + "/file.txt" if tree == ARGS[0] else tree + "/secret", tree + "/token")
    yield attempt(os.link, tree + "/token", ARGS[0] + "/y")
    yield attempt(os.unlink, tree + "/token")
    yield attempt(os.rename, tree + "/keys/deep", tree + "/z")
    yield attempt(os.rmdir, tree + "/keys/deep")
    yield attempt(os.rename, tree + "/keys", tree + "/moved")
    yield attempt(write, tree + "/keys/deep/new")
    yield attempt(os.symlink, tree + "/token", "/tmp/token" + str(len(tree)))
    yield attempt(libc_mount, tree, "/tmp")
def libc_mount(source, target):
    if libc.mount(source.encode(), target.encode(), None, 4096, None) < 0:
        raise OSError(ctypes.get_errno(), "mount")
found = {tree: list(tries(tree)) for tree in ARGS}
for tree in ARGS:
    subprocess.run(["mv", tree + "/keys", ARGS[0] + "/copied" + str(len(tree))], stderr=subprocess.DEVNULL)
    subprocess.run(["cp", "-aL", tree, ARGS[0] + "/all" + str(len(tree))], stderr=subprocess.DEVNULL)
answer([found, [row for tree in (*ARGS, "/tmp") for row in reads(tree)]])
""",
        str(workspace),
        str(host),
    )
    ours, theirs = got[0][str(workspace)], got[0][str(host)]
    # Moving the directory around a denied place takes the place's cover along, where it can be moved at all.
    if user == "agent" or not IS_ROOT:  # else the workspace is another id's
        assert ours[:6] == ["EBUSY", "EBUSY", "EXDEV", "EBUSY", "EBUSY", "EBUSY"], ours
    assert "DONE" not in ours[:6] and ours[6] in ("EXDEV", "EACCES") and ours[7:] == ["EROFS", "DONE", "EPERM"], ours
    assert theirs == ["EROFS", "EROFS", "EXDEV", *["EROFS"] * 5, "DONE", "EPERM"], theirs
    allowed = {"secret", "inner", "link"}  # of the shown tree; not denied
    leaks = [path for path, text in got[1] if MARK in text and os.path.basename(path) not in allowed]
    assert leaks == [] and any(MARK in text for _, text in got[1])
    assert not difference(before, host) and not difference(before_workspace, workspace)


# ---- 33, 34: devices and mounts ----

CALLS = r"""
#include <errno.h>
#include <fcntl.h>
#include <sched.h>
#include <stdio.h>
#include <sys/mount.h>
#include <sys/stat.h>
#include <sys/syscall.h>
#include <sys/sysmacros.h>
#include <unistd.h>
#define TRY(name, call) do { errno = 0; long r = (long)(call); printf("%s %d\n", name, r < 0 ? errno : 0); } while (0)
int main(void) {
  struct { unsigned bytes; int type; unsigned char space[128]; } handle = {128};
  int id, here = open("/", O_PATH | O_DIRECTORY), tree;
  TRY("mknod_null", mknod("/tmp/n", S_IFCHR | 0666, makedev(1, 3)));
  TRY("mknod_disk", mknod("/tmp/d", S_IFBLK | 0666, makedev(254, 0)));
  TRY("mknod_whiteout", mknod("/tmp/w", S_IFCHR, makedev(0, 0)));
  TRY("mknodat_mem", mknodat(here, "tmp/m", S_IFCHR | 0666, makedev(1, 1)));
  TRY("mknodat_disk", mknodat(AT_FDCWD, "/dev/shm/d", S_IFBLK | 0666, makedev(8, 0)));
  TRY("name_to_handle_at", name_to_handle_at(AT_FDCWD, "/usr", (void *)&handle, &id, 0));
  handle.bytes = 8; handle.type = 1; *(long *)handle.space = 2;
  TRY("open_by_handle_at", open_by_handle_at(here, (void *)&handle, O_RDONLY));
  TRY("mount_tmpfs", mount("none", "/tmp", "tmpfs", 0, ""));
  TRY("mount_proc", mount("proc", "/proc", "proc", 0, ""));
  TRY("mount_bind", mount("/", "/tmp", 0, MS_BIND | MS_REC, 0));
  TRY("mount_remount", mount(0, "/usr", 0, MS_REMOUNT | MS_BIND, 0));
  TRY("mount_move", mount("/usr", "/tmp", 0, MS_MOVE, 0));
  TRY("umount", umount2("/proc/sys", MNT_DETACH));
  TRY("umount_root", umount2("/", MNT_DETACH));
  TRY("pivot_root", syscall(SYS_pivot_root, "/tmp", "/tmp"));
  TRY("chroot", chroot("/tmp"));
  TRY("fsopen", syscall(SYS_fsopen, "tmpfs", 0));
  TRY("fspick", syscall(433, AT_FDCWD, "/usr", 0));
  TRY("fsconfig", syscall(431, 0, 6, 0, 0, 0));
  TRY("fsmount", syscall(432, 0, 0, 0));
  TRY("open_tree", tree = syscall(428, AT_FDCWD, "/", 0));
  TRY("open_tree_clone", syscall(428, AT_FDCWD, "/", 1 /* OPEN_TREE_CLONE */));
  TRY("move_mount", syscall(429, here, "", AT_FDCWD, "/tmp", 4));
  TRY("mount_setattr", syscall(442, AT_FDCWD, "/usr", 0, (unsigned long[]){0, 1, 0, 0}, 32));
  TRY("open_tree_attr", syscall(467, AT_FDCWD, "/", 1, (unsigned long[]){0, 1, 0, 0}, 32));
  TRY("setns_mnt", setns(open("/proc/self/ns/mnt", O_RDONLY), CLONE_NEWNS));
  TRY("setns_user", setns(open("/proc/self/ns/user", O_RDONLY), CLONE_NEWUSER));
  TRY("setns_init", setns(syscall(SYS_pidfd_open, 1, 0), CLONE_NEWNS | CLONE_NEWNET));
  TRY("unshare_user", unshare(CLONE_NEWUSER));
  TRY("unshare_mnt", unshare(CLONE_NEWNS));
  TRY("swapon", syscall(SYS_swapon, "/tmp/x", 0));
  TRY("quotactl", syscall(SYS_quotactl, 0, "/dev/vda", 0, 0));
  TRY("regular", mknod("/tmp/r", S_IFREG | 0600, 0));
  TRY("fifo", mknod("/tmp/f", S_IFIFO | 0600, 0));
}
"""


@pytest.mark.parametrize("user", ["agent", "root"])
async def test_v33_v34_devices_handles_and_mounts_are_refused(
    user: str, make_box: MakeBox, compile_c: Compile, workspace: Path
) -> None:
    program = compile_c(CALLS, "calls")
    mounts = Path("/proc/self/mountinfo").read_bytes()
    box = await make_box(user=user)
    inside = await attack(box, 'answer(open("/proc/self/mountinfo").read())')
    result = await box.exec([program], timeout=30)
    got = {name: int(number) for name, number in (line.split() for line in result.text.splitlines())}
    assert got.pop("regular") == 0 and got.pop("fifo") == 0  # the program does make what it may
    assert len(got) == 32 and set(got.values()) == {errno.EPERM}, got
    assert await attack(box, 'answer(open("/proc/self/mountinfo").read())') == inside
    assert Path("/proc/self/mountinfo").read_bytes() == mounts
    made = await attack(box, 'answer([os.path.lexists(p) for p in ("/tmp/n", "/tmp/d", "/tmp/w", "/dev/shm/d")])')
    assert made == [False] * 4


@pytest.mark.parametrize("user", ["agent", "root"])
async def test_v33_the_only_devices_are_harmless_and_cannot_be_changed(user: str, make_box: MakeBox) -> None:
    before = [os.lstat(f"/dev/{name}") for name in ("null", "zero", "full", "random", "urandom", "tty")]
    got = await attack(
        await make_box(user=user),
        """
devices = {}
for place, directories, files in os.walk("/", onerror=lambda error: None):
    directories[:] = [name for name in directories if place + name not in ("/proc", "/sys", "/usr")]
    for name in files:
        status = os.lstat(place + "/" + name)
        if stat.S_ISCHR(status.st_mode) or stat.S_ISBLK(status.st_mode):
            devices[os.path.join(place, name)] = status.st_rdev
def changes():
    yield attempt(os.chmod, "/dev/null", 0o600)
    yield attempt(os.chown, "/dev/null", os.getuid(), os.getgid())
    yield attempt(os.utime, "/dev/zero", (2, 2))
    yield attempt(os.unlink, "/dev/null")
    yield attempt(os.setxattr, "/dev/null", "user.x", b"1")
    yield attempt(os.setxattr, "/dev/null", "trusted.x", b"1")
answer([devices, list(changes())])
""",
    )
    null = before[0].st_rdev
    assert {path.rpartition("/")[2] for path in got[0]} == {"null", "zero", "full", "random", "urandom", "tty", "ptmx"}
    assert got[0]["/dev/null"] == null
    assert got[1] == ["EPERM", "EPERM", "EPERM", "EBUSY", "EPERM", "EPERM"] or got[1][3] == "EROFS", got[1]
    for name, status in zip(("null", "zero", "full", "random", "urandom", "tty"), before, strict=True):
        now = os.lstat(f"/dev/{name}")
        assert (now.st_mode, now.st_uid, now.st_gid) == (status.st_mode, status.st_uid, status.st_gid)


# ---- 35, and the layer ----


@pytest.mark.parametrize("user", ["agent", "root"])
async def test_v35_the_layer_below_an_overlay_is_not_reachable(user: str, make_box: MakeBox, workspace: Path) -> None:
    (workspace / "lower").mkdir()
    (workspace / "lower" / "kept").write_text(MARK)
    before = picture(workspace)
    box = await make_box(user=user)
    names = sorted(os.listdir(box.core.layer_fd))
    assert {"workspace", "workspace.work", "usr.work"} <= set(names)
    got = await attack(
        box,
        """
points = [line.split(" ")[4] for line in open("/proc/self/mountinfo")]
seen = []
for point in (*points, "/", "/dev", "/proc/self/fd", "/proc/self/map_files", "/proc/self/root", "/proc/self/cwd"):
    for way in ("", "/..", "/../..", "/../../.."):
        try:
            seen += os.listdir(point + way)
        except OSError:
            pass
here = ARGS[0] + "/lower"
forged = {}
for name in ("user.overlay.opaque", "user.overlay.whiteout", "user.overlay.redirect", "trusted.overlay.opaque",
             "trusted.overlay.redirect", "security.capability", "system.posix_acl_access"):
    for place in (here, here + "/kept", os.environ["HOME"]):
        forged.setdefault(name, []).append(attempt(os.setxattr, place, name, b"y"))
whiteouts = [attempt(os.mknod, place + "/white", stat.S_IFCHR, os.makedev(0, 0))
             for place in (here, "/tmp", os.environ["HOME"], "/etc")]
answer([[name for name in seen if name.endswith(".work") or name in ("nothing", "root-home", "work")], forged,
        whiteouts, os.listdir(here), open(here + "/kept").read()])
""",
        str(workspace),
    )
    assert got[0] == []
    for name in ("trusted.overlay.opaque", "trusted.overlay.redirect", "security.capability"):
        assert set(got[1][name]) <= {"EPERM", "EOPNOTSUPP", "EINVAL"}, got[1]
    assert set(got[2]) == {"EPERM"}
    assert got[3:] == [["kept"], MARK]
    assert not difference(before, workspace)  # before `changes` reads the host's file to compare
    # What was set is kept apart by the kernel: in the layer it is no attribute of overlayfs.
    for path in ("workspace/lower", "workspace/lower/kept"):
        with suppress(FileNotFoundError):
            fd = os.open(path, os.O_RDONLY | os.O_NOFOLLOW, dir_fd=box.core.layer_fd)
            assert not {"user.overlay.opaque", "user.overlay.whiteout", "user.overlay.redirect"} & set(os.listxattr(fd))
            os.close(fd)
    assert not [change for change in await box.changes() if change.kind.value == "deleted"]
    assert sorted(os.listdir(box.core.layer_fd)) == names


READ_ONLY = """
tree, = ARGS
file, inner = tree + "/secret", tree + "/sub/inner"
def ioctl(path, number, value):
    fd = os.open(path, os.O_RDONLY)
    try:
        fcntl.ioctl(fd, number, array.array("I", [value, 0]))
    finally:
        os.close(fd)
def remount(path, flags):
    if libc.mount(b"none", path.encode(), None, flags, None) < 0:
        raise OSError(ctypes.get_errno(), "mount")
found = {
    "write": attempt(write, file), "append": attempt(os.open, file, os.O_WRONLY | os.O_APPEND),
    "truncate": attempt(os.truncate, file, 0), "new": attempt(write, tree + "/new"),
    "mkdir": attempt(os.mkdir, tree + "/d"), "symlink": attempt(os.symlink, "x", tree + "/s"),
    "mkfifo": attempt(os.mkfifo, tree + "/f"), "unlink": attempt(os.unlink, file),
    "rename": attempt(os.rename, file, inner), "rmdir": attempt(os.rmdir, tree + "/sub"),
    "chmod": attempt(os.chmod, file, 0), "chown": attempt(os.chown, file, 0, 0),
    "utime": attempt(os.utime, file), "xattr": attempt(os.setxattr, file, "user.x", b"1"),
    "acl": attempt(os.setxattr, file, "system.posix_acl_access",
                   struct.pack("=I" + "HHI" * 3, 2, 1, 7, 0, 4, 7, 0, 32, 7, 0)),
    "flags": attempt(ioctl, file, 0x40086602, 0x10), "fsxattr": attempt(ioctl, tree, 0x40086602, 0x20),
    "remount": attempt(remount, tree, 32 | 4096), "bind over": attempt(remount, tree, 4096),
}
for path in (file, inner):
    attempt(open(path).read) if os.path.exists(path) else None
answer([found, os.listdir(tree)])
"""


@pytest.mark.parametrize("user", ["agent", "root"])
async def test_v34_read_only_trees_cannot_be_changed_in_any_way(user: str, make_box: MakeBox, host: Path) -> None:
    before = picture(host)
    box = await make_box(user=user, policy=Policy(filesystem=Filesystem(read=(str(host),))))
    got, left = await attack(box, READ_ONLY, str(host))
    assert sorted(left) == ["link", "secret", "sub"]
    assert got.pop("remount") == got.pop("bind over") == "EPERM"
    assert set(got.values()) == {"EROFS"}, got
    assert not difference(before, host)


@pytest.mark.parametrize("user", ["agent", "root"])
async def test_v34_changing_the_lower_files_of_a_layer_changes_only_the_layer(
    user: str, make_box: MakeBox, workspace: Path, host: Path
) -> None:
    tree = workspace / "host"
    shutil.copytree(host, tree, symlinks=True)
    tree.chmod(0o777)
    before = picture(workspace)
    box = await make_box(user=user)
    got, _ = await attack(box, READ_ONLY, str(tree))
    assert got["write"] == got["truncate"] == got["new"] == "DONE" and got["remount"] == "EPERM"
    assert not difference(before, workspace)


async def test_v54_setuid_devices_and_capabilities_never_reach_the_host(
    make_box: MakeBox, workspace: Path, state: Path
) -> None:
    before = picture(workspace)
    box = await make_box(keep=True)
    got = await attack(
        box,
        """
found = []
for place in (ARGS[0], os.environ["HOME"]):
    for name, mode in (("suid", 0o4755), ("sgid", 0o2755), ("both", 0o6777)):
        shutil.copy("/usr/bin/id", f"{place}/{name}")
        os.chmod(f"{place}/{name}", mode)
    os.mkdir(place + "/dir"); os.chmod(place + "/dir", 0o2777)
    shutil.copy("/usr/bin/id", place + "/caps")
    capability = struct.pack("<IIIII", 0x2000001, 1, 0, 0, 0)
    found.append(attempt(os.setxattr, place + "/caps", "security.capability", capability))
    found.append(attempt(os.mknod, place + "/null", 0o20666, os.makedev(1, 3)))
    attempt(os.setxattr, place + "/dir", "user.overlay.opaque", b"y")
    attempt(os.setxattr, place + "/caps", "user.kept", b"1")
    os.mkfifo(place + "/fifo")
    socket.socket(socket.AF_UNIX).bind(place + "/socket")
    found.append(stat.S_IMODE(os.stat(place + "/suid").st_mode))
ran = subprocess.run([ARGS[0] + "/suid", "-u"], capture_output=True, text=True).stdout
answer([found, ran, os.getuid()])
""",
        str(workspace),
    )
    assert got[0] == ["EPERM", "EPERM", 0o4755] * 2  # set inside, where it means nothing
    assert got[1] == f"{got[2]}\n"
    await box.close()
    assert box.kept is not None
    stored = list((state / box.kept.id).rglob("*"))
    assert {"suid", "sgid", "both", "caps", "dir"} <= {path.name for path in stored}
    for path in stored:
        status = path.lstat()
        assert not status.st_mode & (stat.S_ISUID | stat.S_ISGID), path
        assert stat.S_IFMT(status.st_mode) in (stat.S_IFREG, stat.S_IFDIR, stat.S_IFLNK, stat.S_IFIFO), path
        attributes = set(os.listxattr(path, follow_symlinks=False))
        assert not {name for name in attributes if not name.startswith("user.")}, (path, attributes)
        assert "user.overlay.opaque" not in attributes, path
    assert stat.S_IMODE((state / box.kept.id).stat().st_mode) == 0o700
    discard(box.kept.id)
    assert not difference(before, workspace)


# ---- what must be absent ----


@pytest.mark.parametrize("user", ["agent", "root"])
async def test_secrets_of_the_host_are_absent(user: str, make_box: MakeBox, monkeypatch: pytest.MonkeyPatch) -> None:
    name = f"{MARK}-{uuid.uuid4().hex[:8]}"
    homes = [Path("/home"), Path("/root"), Path("/srv"), Path("/opt/../var/lib")] if IS_ROOT else [Path.home()]
    for variable in ("AWS_SECRET_ACCESS_KEY", "GITHUB_TOKEN", "LD_PRELOAD_CANARY", "PYTHONPATH_CANARY", "HTTPS_PROXY"):
        monkeypatch.setenv(variable, name)
    try:
        for home in homes:
            (home / name / ".ssh").mkdir(parents=True)
            (home / name / ".ssh" / f"id_{name}").write_text(name)
        people = [line.split(":") for line in Path("/etc/passwd").read_text().splitlines()]
        box = await make_box(user=user)
        got = await attack(
            box,
            """
paths = ["/etc/shadow", "/etc/shadow-", "/etc/gshadow", "/etc/sudoers", "/etc/sudoers.d", "/etc/ssl/private",
         "/etc/ssh", "/etc/machine-id.host", "/etc/krb5.keytab", "/var/log/auth.log", "/var/lib/docker", "/boot",
         "/root/.ssh", "/root/.bash_history", "/proc/kcore.host", "/dev/mem", "/dev/kmsg", "/dev/vda", "/dev/kvm",
         "/sys/kernel", "/sys/firmware", "/sys/fs", "/mnt", "/media", "/lost+found"]
answer([[path for path in paths if os.path.lexists(path)], find(ARGS[0], "/"), os.listdir("/home"),
        open("/etc/passwd").read(), dict(os.environ), open("/proc/self/environ").read(),
        attempt(os.open, "/proc/1/environ", os.O_RDONLY), len(open("/proc/keys").read()), os.uname().nodename])
""",
            name,
        )
        assert got[0] == [] and got[1] == [], got[:2]
        assert got[2] == ["agent"]
        for person in people:
            if int(person[2]) >= 1000 and person[0] != "nobody":
                assert f"\\n{person[0]}:" not in got[3] and f"{person[5]}:" not in got[3]
        assert name not in str(got[4]) and name not in got[5]
        assert got[6:] == ["ENOENT", 0, "corral"]
    finally:
        for home in homes:
            shutil.rmtree(home / name, ignore_errors=True)


# ---- another sandbox of the same user ----

VICTIM = """
import ctypes, mmap, os, socket, sys, time
mark, place = sys.argv[1:3]
libc = ctypes.CDLL(None)
open("/tmp/" + mark, "w").write(mark); open(place + "/" + mark, "w").write(mark)
open(os.environ["HOME"] + "/" + mark, "w").write(mark); open("/dev/shm/" + mark, "w").write(mark)
shm = libc.shmget(0x51d0, 4096, 0o1666); queue = libc.msgget(0x51d0, 0o1666); sem = libc.semget(0x51d0, 1, 0o1666)
mq = ctypes.CDLL("librt.so.1").mq_open(b"/" + mark.encode(), os.O_CREAT | os.O_RDWR, 0o666, None)
abstract = socket.socket(socket.AF_UNIX); abstract.bind("\\0" + mark); abstract.listen()
path = socket.socket(socket.AF_UNIX); path.bind("/tmp/" + mark + ".sock"); path.listen()
tcp = socket.socket(); tcp.bind(("127.0.0.1", 9191)); tcp.listen()
print(min(shm, queue, sem, mq), os.getpid(), flush=True)
sys.stdin.read()
came = []
for s in (abstract, path, tcp):
    s.setblocking(False)
    try:
        s.accept(); came.append(s)
    except BlockingIOError:
        pass
print("came", len(came), open("/tmp/" + mark).read() == mark, open(place + "/" + mark).read() == mark, flush=True)
"""


@pytest.mark.parametrize("user", ["agent", "root"])
async def test_another_sandbox_of_the_same_user_is_out_of_reach(user: str, make_box: MakeBox, workspace: Path) -> None:
    # Both on one workspace and, for an ordinary user, with one and the same id on the host: as near as they can be.
    victim, attacker = await make_box(user=user), await make_box(user=user)
    place = "/tmp" if IS_ROOT and user == "root" else str(workspace)
    process = await victim.start_process([PYTHON, "-c", VICTIM, MARK, place])
    first = await process.stdout.readline()
    assert first, (await process.stderr.read()).decode()
    least, inner = map(int, first.split())
    assert least >= 0  # it has all of them
    outer = _host_pid(victim.core.keeper, MARK)
    got = await attack(
        attacker,
        """
mark, place, pids = ARGS
def reach(family, address):
    socket.socket(family).connect(address)
def number(call, *arguments):
    ctypes.set_errno(0)
    return "DONE" if call(*arguments) >= 0 else errno.errorcode[ctypes.get_errno()]
rt = ctypes.CDLL("librt.so.1", use_errno=True)
own = os.getpid()
answer({
    "files": find(mark, "/", "/tmp", "/dev/shm", "/dev/mqueue", place),
    "pids": sorted(name for name in os.listdir("/proc") if name.isdigit() and int(name) != own),
    "signal": [attempt(os.kill, pid, 9) for pid in pids if pid != own],
    "group": attempt(os.killpg, pids[-1], 9),
    "ptrace": [number(libc.ptrace, 16, pid, 0, 0) for pid in pids],
    "vm": [number(libc.syscall, 310, pid, 0, 0, 0, 0, 0) for pid in pids],
    "mem": [attempt(os.open, f"/proc/{pid}/mem", os.O_RDWR) for pid in pids if pid != own],
    "ipc": [number(libc.shmget, 0x51d0, 0, 0), number(libc.msgget, 0x51d0, 0), number(libc.semget, 0x51d0, 0, 0)],
    "tables": [len(open("/proc/sysvipc/" + name).readlines()) for name in ("shm", "msg", "sem")],
    "mq": number(rt.mq_open, b"/" + mark.encode(), 2),
    "sockets": [attempt(reach, 1, "\\0" + mark), attempt(reach, 1, "/tmp/" + mark + ".sock"),
                attempt(reach, 2, ("127.0.0.1", 9191))],
    "net": [mark in open("/proc/net/unix").read(), open("/proc/net/tcp").read().count("\\n")],
})
""",
        MARK,
        place,
        [inner, outer] if inner != 2 else [outer],
    )
    assert got["files"] == [] and got["pids"] == []
    assert set(got["signal"]) | {got["group"]} <= {"ESRCH"}
    assert set(got["ptrace"]) == set(got["vm"]) == {"EPERM"} and set(got["mem"]) <= {"ENOENT"}
    assert got["ipc"] == ["ENOENT"] * 3 and got["mq"] == "ENOENT" and got["tables"] == [1, 1, 1]
    assert got["sockets"] == ["ECONNREFUSED", "ENOENT", "ECONNREFUSED"] and got["net"] == [False, 1]
    process.close_stdin()  # it lives, nobody came, and its files are its own
    assert (await process.stdout.readline()).split() == [b"came", b"0", b"True", b"True"]
    assert (await process.wait()).code == 0


def _host_pid(keeper: int, mark: str) -> int:
    """The host's number of the process below a keeper whose command line holds ``mark``."""
    parents = {}
    for pid in (int(name) for name in os.listdir("/proc") if name.isdecimal()):
        with suppress(OSError):
            parents[pid] = int(Path(f"/proc/{pid}/stat").read_text().rpartition(") ")[2].split()[1])
    for pid in parents:
        ancestor = pid
        while ancestor in parents and ancestor != keeper:
            ancestor = parents[ancestor]
        with suppress(OSError):
            if ancestor == keeper and mark in Path(f"/proc/{pid}/cmdline").read_text():
                return pid
    raise AssertionError("the victim is not there")


async def test_two_sandboxes_of_root_share_no_id(make_box: MakeBox) -> None:
    first, second = await make_box(), await make_box()
    ids = [box.core.prepared.identity.outside(1000) for box in (first, second)]
    assert (ids[0] != ids[1]) is IS_ROOT and (IS_ROOT or ids[0] == os.geteuid())
