"""Renames of directories that were there before a run: as on a plain disk, where the overlay alone refuses them.

What a program sees is compared with the same in a plain directory, the sandbox's /tmp; and what is kept with that.
"""

from __future__ import annotations

import asyncio
import json
import os
import random
from pathlib import Path
from typing import Any

import pytest

from corral.actions import Verdict
from corral.policy.model import Filesystem, Policy, Resources, Syscalls
from corral.sandbox.apply.proposing import propose
from corral.sandbox.box import Sandbox
from corral.sandbox.changes import ChangeKind
from corral.sandbox.layer import KeptLayer
from tests.contain.attacks import PRELUDE, PYTHON, numbers
from tests.contain.conftest import Compile, MakeBox

IS_ROOT = os.geteuid() == 0
OLD = 1_000_000_000
"""Seconds since the epoch of all that was there before."""
MANY = 3000
PLACE = ".corral-move-"

# A tree as `told` says it: what a rename must not change, and of times those that nothing has changed since.
TELL = """
import stat
def told(top):
    found = {}
    def tell(path):
        status = os.lstat(path)
        kind = stat.S_IFMT(status.st_mode)
        row = [status.st_mode, status.st_mtime_ns if status.st_mtime < 1_100_000_000 else "now"]
        if kind == stat.S_IFLNK:
            row = [os.readlink(path)]
        elif kind == stat.S_IFREG:
            with open(path, "rb") as file:
                row += [status.st_size, hash(file.read())]
        if kind != stat.S_IFLNK:
            row.append({name: os.getxattr(path, name).hex() for name in os.listxattr(path)})
        found[path] = row
        if kind == stat.S_IFDIR:
            for name in sorted(os.listdir(path)):
                tell(path + "/" + name)
    os.chdir(top)
    tell(".")
    return found
"""


def make_tree(top: Path) -> None:
    """Of everything that a tree may hold, and old."""
    tree = top / "tree"
    (tree / "sub" / "deep").mkdir(parents=True)
    (tree / "closed").mkdir()
    (tree / "group").mkdir()
    (tree / "file").write_text("content")
    (tree / "closed" / "file").write_text("closed")
    (tree / "sub" / "script").write_text("#!/bin/sh\n")
    (tree / "sub" / "script").chmod(0o751)
    (tree / "sub" / "link").symlink_to("../file")
    os.mkfifo(tree / "sub" / "fifo")
    (tree / ("n" * 255)).write_text("long")
    with (tree / "sparse").open("wb") as file:
        file.seek(1 << 24)
        file.write(b"end")
    (top / "empty").mkdir()
    (top / "full" / "x").mkdir(parents=True)
    (top / "other").write_text("other")
    os.setxattr(tree / "sub", "user.note", b"directory")
    os.setxattr(tree / "file", "user.note", b"file")
    (tree / "group").chmod(0o2775)
    (tree / "sub" / "deep").chmod(0o1700)
    (tree / "closed").chmod(0o555)
    for directory, directories, files in os.walk(top, topdown=False):
        for name in (*directories, *files):
            os.utime(f"{directory}/{name}", (OLD, OLD), follow_symlinks=False)


async def inside(box: Sandbox, code: str, *arguments: object, **options: Any) -> Any:
    result = await box.exec(
        [PYTHON, "-c", f"{PRELUDE}{TELL}\nARGS = json.loads(sys.argv[1])\n{code}", json.dumps(arguments)],
        env={"PYTHONHASHSEED": "0"},
        timeout=60,
        **options,
    )
    assert result.exit_code == 0, result.stderr.decode()
    return json.loads(result.stdout)


async def kept(box: Sandbox) -> KeptLayer:
    await box.close()
    assert box.kept is not None
    return box.kept


def of(layer: KeptLayer, workspace: Path) -> dict[str, ChangeKind]:
    """What it changes of the workspace, by the path there."""
    prefix = f"{workspace}/"
    return {
        change.path.removeprefix(prefix): change.kind for change in layer.changes() if change.path.startswith(prefix)
    }


PLAIN = """
import shutil
plain, real = "/tmp/plain", ARGS[0]
def copy(old, new):  # without what shutil does not know
    os.mkdir(new)
    for entry in os.scandir(old):
        to = new + "/" + entry.name
        if entry.is_dir(follow_symlinks=False):
            copy(entry.path, to)
        elif stat.S_ISFIFO(entry.stat(follow_symlinks=False).st_mode):
            os.mkfifo(to)
            shutil.copystat(entry.path, to)
        else:
            subprocess.run(["cp", "-a", "--sparse=always", entry.path, to], check=True)
    shutil.copystat(old, new)
copy(real, plain)
"""


# ---- as on a plain disk ----


async def test_every_rename_is_as_on_a_plain_disk(make_box: MakeBox, workspace: Path) -> None:
    make_tree(workspace)
    rename = numbers("renameat2")["renameat2"]
    box = await make_box()
    steps: list[tuple[str, str, int]] = [
        ("tree", "full", 0),  # ENOTEMPTY
        ("tree", "other", 0),  # ENOTDIR
        ("tree", "tree/sub/x", 0),  # EINVAL
        ("tree/sub", "tree", 0),  # ENOTEMPTY
        ("tree", "tree", 0),  # nothing
        ("tree/.", "x", 0),  # EBUSY
        ("other", "tree", 0),  # EISDIR
        ("missing", "x", 0),
        ("linked/", "x", 0),  # ENOTDIR: the link is none
        ("tree", "linked/", 0),
        ("tree", "missing/x", 0),
        ("tree", "full", 1),  # EEXIST
        ("tree", "x" * 256, 0),  # ENAMETOOLONG
        ("tree", "x", 8),  # EINVAL
        ("tree/closed", "tree/still", 0),
        ("tree/still", "elsewhere", 0),  # EACCES: it is not to be written, and its parent would change
        ("tree/sub/", "tree/renamed/", 1),
        ("tree/renamed/deep", "deep", 0),
        ("tree", "empty", 0),
        ("empty/group", "group", 0),
        ("full", "empty/full", 0),
        ("empty", "tree", 0),
        ("tree", "empty", 1),
    ]
    got = await inside(
        box,
        f"""{PLAIN}
def run(top):
    os.chdir(top)
    os.symlink("empty", "linked")
    answers = [call({rename}, -100, old.encode(), -100, new.encode(), flags) for old, new, flags in ARGS[1]]
    return answers, told(top)
tell([run(plain), run(real)])
""",
        str(workspace),
        steps,
    )
    assert got[1][0] == got[0][0]
    assert got[1][1] == got[0][1]
    assert {"ENOTEMPTY", "ENOTDIR", "EINVAL", "EBUSY", "EEXIST", "EACCES", ""} <= set(got[0][0])
    assert "EXDEV" not in got[0][0]


@pytest.mark.parametrize("seed", range(4))
async def test_whatever_is_renamed_is_as_on_a_plain_disk(make_box: MakeBox, workspace: Path, seed: int) -> None:
    """With what else programs do to a tree in between."""
    make_tree(workspace)
    choice = random.Random(seed)
    names = "tree tree/sub tree/sub/deep a a/b tree/c full full/x empty d a/sub d/sub".split()
    files = ["file", "sub/script", "new", "sub/new"]
    steps = [
        (choice.choice(["rename", "rename", "rename", "mkdir", "write", "rmdir", "chmod"]), *choice.choices(names, k=2),
         choice.choice(files))
        for _ in range(150)
    ]  # fmt: skip
    got = await inside(
        (await make_box()),
        f"""{PLAIN}
def run(top):
    os.chdir(top)
    answers = []
    for what, name, other, file in ARGS[1]:
        if what == "rename": answers.append(attempt(os.rename, name, other))
        elif what == "mkdir": answers.append(attempt(os.mkdir, name))
        elif what == "rmdir": answers.append(attempt(os.rmdir, name))
        elif what == "chmod": answers.append(attempt(os.chmod, name, 0o750))
        else: answers.append(attempt(lambda: open(name + "/" + file, "a").write("more")))
    return answers, told(top)
tell([run(plain), run(real)])
""",
        str(workspace),
        steps,
    )
    assert got[1] == got[0]
    assert got[0][0].count("") > 20


async def test_the_callers_umask_is_not_asked(make_box: MakeBox, workspace: Path) -> None:
    make_tree(workspace)
    code = "os.umask(0o777); tell([attempt(os.rename, 'tree', 'x'), os.stat('x/sub').st_mode & 0o777])"
    assert await inside(await make_box(), code) == ["", (workspace / "tree" / "sub").stat().st_mode & 0o777]


async def test_by_mv_and_by_a_static_program(make_box: MakeBox, workspace: Path, compile_c: Compile) -> None:
    make_tree(workspace)
    program = compile_c(
        "#include <stdio.h>\n#include <errno.h>\n#include <fcntl.h>\n#include <sys/syscall.h>\n#include <unistd.h>\n"
        "int main(int n, char **a) { int d = open(a[1], O_PATH | O_DIRECTORY);"
        'long r = syscall(SYS_renameat2, d, a[2], d, a[3], 0); printf("%d", r ? errno : 0); return 0; }'
    )
    box = await make_box(keep=True)
    script = (
        f"mv tree moved; mv moved empty/; {program} empty moved/sub 'x y'; cat empty/moved/file; stat -c %Y 'empty/x y'"
    )
    got = await box.exec(["sh", "-ec", script])
    assert got.text == f"0content{OLD}\n", got
    changes = of(await kept(box), workspace)
    assert changes["empty/moved/file"] is ChangeKind.ADDED
    assert not any(PLACE in path for path in changes)


# ---- what is kept ----


async def test_what_is_kept_is_what_was_renamed(make_box: MakeBox, workspace: Path, state: Path) -> None:
    """Also of a directory that an earlier run has made, of which a layer is made and applied."""
    make_tree(workspace)
    (workspace / "tree" / "sub" / "fifo").unlink()  # is not applied
    first = await make_box(keep=True)
    await inside(
        first, "os.makedirs('made/below'); open('made/below/x', 'w').write('x'); os.rename('tree', 't'); tell(0)"
    )
    one = await kept(first)
    changes = of(one, workspace)
    assert changes["tree"] is ChangeKind.DELETED and changes["t/sub/script"] is ChangeKind.ADDED
    assert not any(path.startswith("tree/") and kind is not ChangeKind.DELETED for path, kind in changes.items())
    second = await make_box(keep=True, on=one)
    code = "os.rename('t', 'u'); os.rename('made', 'u/made'); os.rename('u/sub', 'made'); tell(told('.'))"
    shown = await inside(second, code)
    two = await kept(second)
    proposal = propose(two)
    assert proposal.conflicts == ()
    proposal.apply(proposal.hash)
    assert not (workspace / "tree").exists() and not (workspace / "t").exists()
    assert (workspace / "u" / "made" / "below" / "x").read_text() == "x"
    assert (workspace / "made" / "script").stat().st_mode & 0o777 == 0o751
    assert (workspace / "u" / "sparse").stat().st_size == (1 << 24) + 3
    assert {path.removeprefix("./") for path in shown} == {
        ".",
        *(str(path.relative_to(workspace)) for path in workspace.rglob("*")),
    }


async def test_a_rename_there_and_back_changes_nothing(make_box: MakeBox, workspace: Path, state: Path) -> None:
    make_tree(workspace)
    box = await make_box(keep=True)
    await inside(box, "os.rename('tree', 'x'); os.rename('x', 'tree'); tell(0)")
    await box.close()
    assert box.kept is None or of(box.kept, workspace) == {}


# ---- rights ----


async def test_what_the_caller_may_not_stays_refused(make_box: MakeBox, workspace: Path) -> None:
    make_tree(workspace)
    (workspace / "locked").mkdir()
    (workspace / "locked" / "in").mkdir()
    (workspace / "locked").chmod(0o555)
    other = workspace.parent / "other-tree"
    other.mkdir()
    shown = workspace.parent / "shown"
    (shown / "in").mkdir(parents=True)
    (workspace / "denied" / "keys").mkdir(parents=True)
    (workspace / "denied" / "keys" / "key").write_text("secret")
    files = Filesystem(write=(str(other),), read=(str(shown),), deny=(str(workspace / "denied" / "keys" / "key"),))
    exchange = numbers("renameat2")["renameat2"]
    got = await inside(
        await make_box(policy=Policy(filesystem=files)),
        f"""
other, shown = ARGS
tell([attempt(os.rename, "locked/in", "in"), attempt(os.rename, "tree", "locked/tree"),
      attempt(os.rename, "tree", other + "/tree"), attempt(os.rename, "tree", "/tmp/tree"),
      attempt(os.rename, shown + "/in", shown + "/out"), attempt(os.rename, shown + "/in", "in"),
      attempt(os.rename, "denied", "x"), attempt(os.rename, "/usr/lib", "/usr/x"), attempt(os.rename, "/etc", "/x"),
      call({exchange}, -100, b"tree", -100, b"full", 2), sorted(os.listdir(".")), sorted(os.listdir("locked")),
      open("denied/keys/key").read()])
""",
        str(other),
        str(shown),
    )
    assert got[:6] == ["EACCES", "EACCES", "EXDEV", "EXDEV", "EROFS", "EXDEV"]
    assert got[6] == "EXDEV"  # something is mounted in it
    assert got[7] in ("EACCES", "EXDEV") and got[8] in ("EACCES", "EBUSY", "EXDEV", "EROFS")
    assert got[9] == "EXDEV"  # two directories of before do not change places in one moment
    assert got[10] == sorted(path.name for path in workspace.iterdir())
    assert got[11:] == [["in"], ""]


@pytest.mark.root  # has several users inside
async def test_other_users_directories(make_box: MakeBox, workspace: Path) -> None:
    """Root inside has no more rights over the agent's than an ordinary user, and the sticky bit holds."""
    for name, mode in (("sticky", 0o1777), ("open", 0o777), ("closed", 0o755)):
        (workspace / name).mkdir()
        make_tree(workspace / name)
        (workspace / name).chmod(mode)
    box = await make_box()
    rename = "tell([attempt(os.rename, name + '/tree', name + '/x') for name in ('sticky', 'open', 'closed')])"
    # The second is his right. But nobody could make it anew for its owner.
    assert await inside(box, rename, user=0) == ["EPERM", "EXDEV", "EACCES"]
    assert await inside(box, rename) == ["", "", ""]
    assert await inside(box, "tell(sorted(os.listdir('open')))") == ["empty", "full", "other", "x"]


LANDLOCK = """
def lock(path, rights=(1 << 14) - 1):
    ruleset = libc.syscall(444, ctypes.byref((ctypes.c_uint64 * 1)(rights)), ctypes.c_size_t(8), 0)
    fd = os.open(path, os.O_PATH)
    rule = ctypes.create_string_buffer(struct.pack("=Qi", rights, fd))
    assert libc.syscall(445, ruleset, 1, rule, 0) == 0
    libc.prctl(38, 1, 0, 0, 0)
    assert libc.syscall(446, ruleset, 0) == 0
"""


@pytest.mark.parametrize("asked", [False, True], ids=["free", "asked"])
async def test_rules_that_a_program_makes_for_itself_hold(make_box: MakeBox, workspace: Path, asked: bool) -> None:
    """The deputy would not have them, so the kernel alone answers it and its children; not the others."""
    make_tree(workspace)
    code = f"""{LANDLOCK}
if os.fork() == 0:
    lock("full")
    try: resource.setrlimit(10, (-1, -1))
    except ValueError: pass
    if os.fork() == 0:
        os._exit(bool(attempt(os.rename, "tree", "full/tree")) + 2 * bool(attempt(os.rename, "full/x", "full/y")))
    os._exit(os.waitstatus_to_exitcode(os.wait()[1]))
ended = os.waitstatus_to_exitcode(os.wait()[1])
tell([ended, os.path.isdir("tree"), attempt(os.rename, "tree", "full/tree"), attempt(os.rename, "full/x", "full/y")])
"""
    calls = Syscalls(ask=("landlock_restrict_self",) if asked else ())
    box = await make_box(policy=Policy(syscalls=calls))
    running = asyncio.ensure_future(inside(box, code))
    while not running.done():
        for question in box.core.supervision.approvals.waiting():
            box.core.supervision.approvals.answer(question.number, Verdict.ALLOW, "the test")
        await asyncio.sleep(0.01)
    assert await running == [3, True, "", ""]


# ---- several at once, the end in the middle, no room ----


def make_many(workspace: Path, count: int = MANY) -> None:
    for number in range(count):
        directory = workspace / "many" / f"d{number % 20}"
        directory.mkdir(parents=True, exist_ok=True)
        (directory / f"f{number}").write_text(f"{number}\n")


COUNT = """
def count(top):
    return sum(len(files) for _, _, files in os.walk(top))
"""


async def test_of_two_who_want_the_same_one_gets_it(make_box: MakeBox, workspace: Path) -> None:
    """And what else is called does not wait for them."""
    make_many(workspace, 600)
    (workspace / "second" / "x").mkdir(parents=True)
    got = await inside(
        await make_box(),
        f"""{COUNT}
answers, renamed = {{}}, 0
def rename(old, new):
    answers[new] = attempt(os.rename, old, new)
pairs = [("second", "third"), *(("many", f"to{{n}}") for n in range(4))]
threads = [threading.Thread(target=rename, args=pair) for pair in pairs]
for thread in threads: thread.start()
while any(thread.is_alive() for thread in threads):
    os.rename("file.txt", "file2.txt"); os.rename("file2.txt", "file.txt")
    renamed += 1
left = [name for name in os.listdir(".") if name.startswith("{PLACE}")]
counts = [count(f"to{{n}}") for n in range(4)]
tell([sorted(answers.values()), renamed, os.path.exists("many"), counts, os.listdir("third"), left])
""",
    )
    assert got[0] == ["", "", "ENOENT", "ENOENT", "ENOENT"]
    assert got[1] > 5
    assert got[2] is False and sorted(got[3]) == [0, 0, 0, 600] and got[4:] == [["x"], []]


async def test_a_caller_that_is_killed_in_the_middle(make_box: MakeBox, workspace: Path) -> None:
    make_many(workspace)
    got = await inside(
        await make_box(),
        f"""{COUNT}
found = []
def places():
    return [name for name in os.listdir(".") if name.startswith("{PLACE}")]
for pause in (0, 0.005, 0.02, 0.05):
    pid = os.fork()
    if pid == 0:
        os.rename("many", "other")
        os._exit(0)
    while not places() and os.path.exists("many") and not os.path.exists("other"):
        pass
    time.sleep(pause)
    os.kill(pid, 9)
    os.waitpid(pid, 0)
    while places() or (os.path.exists("many") and os.path.exists("other")):
        time.sleep(0.01)
    found.append([os.path.exists("many") != os.path.exists("other"), count("many") + count("other")])
    if os.path.exists("other"):
        os.rename("other", "many")
tell(found)
""",
    )
    assert got == [[True, MANY]] * 4


async def test_an_end_in_the_middle_leaves_a_whole_tree(make_box: MakeBox, workspace: Path, state: Path) -> None:
    make_many(workspace)
    before = {path.name for path in (workspace / "many").rglob("f*")}
    for pause in (0.0, 0.02, 0.1):
        box = await make_box(keep=True)
        await box.start_process([PYTHON, "-c", "import os; os.rename('many', 'other')"])
        root = f"/proc/self/fd/{box.core.root_fd}{workspace}"
        while not any(name.startswith(PLACE) or name == "other" for name in os.listdir(root)):
            await asyncio.sleep(0.001)
        await asyncio.sleep(pause)
        box.kill()
        await box.close()
        changes = of(box.kept, workspace) if box.kept else {}
        assert not any(PLACE in path for path in changes)
        gone = {os.path.basename(path) for path, kind in changes.items() if kind is ChangeKind.DELETED}
        new = {os.path.basename(path) for path, kind in changes.items() if path.startswith("other/")}
        assert "many" in gone or not gone or before <= new  # whole there, or whole here
        assert (before <= new) == ("other" in changes)


async def test_no_room_is_said_and_nothing_has_changed(make_box: MakeBox, workspace: Path, state: Path) -> None:
    (workspace / "big" / "sub").mkdir(parents=True)
    for number in range(4):
        (workspace / "big" / "sub" / str(number)).write_bytes(b"x" * 10_000_000)
    box = await make_box(keep=True, policy=Policy(resources=Resources(disk=32 << 20)))
    got = await inside(
        box,
        """
free = os.statvfs(".").f_bavail
found = [attempt(os.rename, "big", "x"), attempt(os.rename, "big/sub", "big/x"), free - os.statvfs(".").f_bavail < 50]
tell([*found, sorted(os.listdir(".")), os.stat("big/sub/3").st_size])
""",
    )
    assert got == ["ENOSPC", "ENOSPC", True, ["big", "file.txt"], 10_000_000]
    await box.close()
    assert box.kept is None or of(box.kept, workspace) == {}


async def test_what_is_written_meanwhile_is_not_lost(make_box: MakeBox, workspace: Path) -> None:
    """By an open file, by a new one that takes the name, and under names that were not there."""
    make_many(workspace, 1000)
    got = await inside(
        await make_box(),
        """
last, stop = {}, False
held = open("many/d0/f0", "a")
def write():
    number = 0
    while not stop:
        number += 1
        held.write("+"); held.flush()
        for path in ("d1/f1", "d2/f2", "d3/new", "new/deep"):
            for top in ("many", "moved"):
                try:
                    if "deep" in path and not os.path.exists(f"{top}/new"): os.mkdir(f"{top}/new")
                    with open(f"{top}/{path}.tmp", "w") as file: file.write(str(number))
                    os.rename(f"{top}/{path}.tmp", f"{top}/{path}")
                except FileNotFoundError:
                    continue
                last[path] = number
                break
thread = threading.Thread(target=write)
thread.start()
time.sleep(0.05)
os.rename("many", "moved")
stop = True
thread.join()
def newest(path):
    found = [f"{top}/{path}" for top in ("many", "moved")]
    return max([int(open(name).read()) for name in found if os.path.exists(name)], default=0)
held.close()
tell([{path: [newest(path), value] for path, value in last.items()}, os.path.exists("moved/d0/f0"),
      "+" in open("moved/d0/f0").read()])
""",
    )
    assert got[1:] == [True, True]
    for path, (found, written) in got[0].items():
        assert found == written, path


async def test_names_that_change_in_the_old_tree_meanwhile(make_box: MakeBox, workspace: Path) -> None:
    """As of an editor that puts the file of before aside, and writes it anew."""
    make_many(workspace, 2000)
    got = await inside(
        await make_box(),
        """
thread = threading.Thread(target=os.rename, args=("many", "moved"))
thread.start()
done = []
while thread.is_alive():
    for number in range(0, 2000, 40):
        # Linked already, and not taken away yet.
        if number not in done and glob.glob(f".corral-move-*/tree/d{number % 20}/f{number}"):
            try:
                os.rename(f"many/d{number % 20}/f{number}", f"many/d19/b{number}")
                with open(f"many/d{number % 20}/f{number}", "w") as file: file.write("new")
            except FileNotFoundError:
                continue
            done.append(number)
thread.join()
def content(path):
    found = [f"{top}/{path}" for top in ("many", "moved") if os.path.exists(f"{top}/{path}")]
    return open(found[0]).read() if found else ""
tell([len(done), [number for number in done
     if content(f"d19/b{number}") != f"{number}\\n" or content(f"d{number % 20}/f{number}") != "new"]])
""",
    )
    assert got[0] > 5 and got[1] == []


async def test_a_target_that_is_put_into_the_tree_meanwhile(make_box: MakeBox, workspace: Path) -> None:
    """What is new lies in what is taken away then."""
    for number in range(6):
        make_many(workspace, 1000)
        (workspace / "many").rename(workspace / f"many{number}")
    got = await inside(
        await make_box(),
        f"""{COUNT}
found = []
for number in range(6):
    many, up, answers = f"many{{number}}", f"up{{number}}", []
    os.mkdir(up)
    thread = threading.Thread(target=lambda: answers.append(attempt(os.rename, many, up + "/x")))
    thread.start()
    while not os.listdir(up):
        pass
    time.sleep(number * 0.005)
    put = attempt(os.rename, up, many + "/up")
    thread.join()
    found.append([answers[0] in ("", "EXDEV", "ENOENT"), put, sum(count(top) for top in (many, up))])
tell(found)
""",
    )
    assert [[known, many] for known, _, many in got] == [[True, 1000]] * 6
    assert "" in [put for _, put, _ in got]


async def test_a_snapshot_in_the_middle_has_a_whole_tree(make_box: MakeBox, workspace: Path, state: Path) -> None:
    make_many(workspace)
    box = await make_box()
    running = asyncio.ensure_future(inside(box, "os.rename('many', 'other'); tell(sorted(os.listdir('.')))"))
    root = f"/proc/self/fd/{box.core.root_fd}{workspace}"
    while not any(name.startswith(PLACE) or name == "other" for name in os.listdir(root)):
        await asyncio.sleep(0.001)
    changes = of(await box.snapshot(), workspace)
    assert not any(PLACE in path for path in changes)
    assert ("many" in changes) == ("other" in changes)
    assert await running == ["file.txt", "other"]


# ---- policies that are about files, or about this call ----


async def test_where_files_are_watched(make_box: MakeBox, workspace: Path) -> None:
    make_tree(workspace)
    policy = Policy(filesystem=Filesystem(watch=(f"{workspace}/tree/file",)))
    box = await make_box(policy=policy)
    assert await inside(box, "os.rename('tree', 'x'); tell(open('x/file').read())") == "content"


async def test_a_policy_may_still_ask_for_the_call(make_box: MakeBox, workspace: Path) -> None:
    make_tree(workspace)
    box = await make_box(policy=Policy(syscalls=Syscalls(deny=("rename", "renameat", "renameat2"))))
    assert await inside(box, "tell(attempt(os.rename, 'tree', 'x'))") == "EPERM"


async def test_a_policy_may_want_the_kernels_answer(make_box: MakeBox, workspace: Path) -> None:
    """Then no rename is notified, and ``mv`` copies."""
    make_tree(workspace)
    box = await make_box(policy=Policy(filesystem=Filesystem(rename_directories=False)))
    code = "tell([attempt(os.rename, 'tree', 'x'), subprocess.run(['mv', 'full', 'y']).returncode, os.listdir('y')])"
    assert await inside(box, code) == ["EXDEV", 0, ["x"]]


async def test_what_cannot_be_made_anew_stays_as_it_is(make_box: MakeBox, workspace: Path) -> None:
    """Deeper than descriptors reach, and what its owner may not read."""
    make_tree(workspace)
    (workspace / "dark" / "in").mkdir(parents=True)
    deep = workspace / "deep"
    for _ in range(130):
        deep /= "d"
    deep.mkdir(parents=True)
    (deep / "file").write_text("deep")
    (workspace / "dark" / "in").chmod(0o300)
    code = """
got = [attempt(os.rename, name, name + "2") for name in ("deep", "dark", "tree")]
tell([got, sorted(os.listdir(".")), open("deep" + "/d" * 130 + "/file").read()])
"""
    got = await inside(await make_box(), code)
    assert got == [["EXDEV", "EXDEV", ""], sorted("dark deep empty file.txt full other tree2".split()), "deep"]


async def test_nothing_comes_to_a_watched_name_behind_a_move(make_box: MakeBox, workspace: Path) -> None:
    """The new tree is renamed once more, which is allowed, to where a name is asked for; then somebody puts that name
    into the old tree, where it is free."""
    make_many(workspace)
    (workspace / "free").mkdir()
    box = await make_box(policy=Policy(filesystem=Filesystem(ask=(str(workspace / "asked" / "key"),))))
    code = """
thread = threading.Thread(target=os.rename, args=("many", "free/b"))
thread.start()
while not os.path.exists("free/b"): pass
os.rename("free/b", "asked")
answer = attempt(lambda: open("many/key", "w").close())
thread.join()
tell([answer, os.path.exists("asked/d0/f0"), os.path.exists("asked/key"), os.path.exists("many")])
"""
    running = asyncio.ensure_future(inside(box, code))
    asked = 0
    while not running.done():
        for question in box.core.supervision.approvals.waiting():
            asked += 1
            box.core.supervision.approvals.answer(question.number, Verdict.ALLOW, "the test")
        await asyncio.sleep(0.001)
    assert (await running, asked) == (["ENOENT", True, False, False], 1)
