"""Files that a policy asks for or watches: what is recorded and held, and that all else works as without."""

from __future__ import annotations

import asyncio
import gc
import os
import re
from collections import Counter
from contextlib import suppress
from pathlib import Path

import pytest

from corral.actions import Access, Decision, File, Kind, Verdict
from corral.policy.model import ExecRule, Filesystem, Policy, Processes
from corral.sandbox.box import Sandbox
from corral.sandbox.identity import RANGE_FIRST
from tests.contain.attacks import PYTHON, inside, users
from tests.contain.conftest import MakeBox, wait_until

HOOKS = Policy(filesystem=Filesystem(watch=("/**/.git/hooks/**",)))


def files(box: Sandbox) -> list[tuple[Kind, File]]:
    """The records of files, in their order."""
    found = []
    for decision in box.core.supervision.recent.all():
        if isinstance(decision.action.subject, File):
            found.append((decision.action.kind, decision.action.subject))
    return found


async def held(box: Sandbox) -> int:
    """Waits until something is held, and returns its number."""
    approvals = box.core.supervision.approvals
    async with asyncio.timeout(30):
        while not approvals.waiting():
            await asyncio.sleep(0.005)
    return approvals.waiting()[0].number


# ---- everything else ----

AS_OUTSIDE = Path(__file__).with_name("file_calls.py").read_text()


async def test_every_call_on_files_works_and_fails_as_outside(make_box: MakeBox, tmp_path: Path) -> None:
    box = await make_box(policy=HOOKS)
    plain = await make_box(tmp_path)
    directory = "/tmp/here"
    results = []
    for each in (box, plain):
        await each.exec(["/bin/mkdir", directory])
        result = await each.exec([PYTHON, "-c", AS_OUTSIDE], directory=directory, timeout=300)
        assert result.exit_code == 0, result.stderr
        results.append(result.text.splitlines())
    supervised, unsupervised = results
    assert len(supervised) > 400
    assert [pair for pair in zip(supervised, unsupervised, strict=False) if pair[0] != pair[1]] == []
    assert len(supervised) == len(unsupervised)


def descriptors() -> Counter[str]:
    """What this process holds open, by kind or name."""
    gc.collect()  # what a call knew of its process is closed with it
    found: Counter[str] = Counter()
    for name in os.listdir("/proc/self/fd"):
        with suppress(OSError):
            found[re.sub(r":\[\d+\]", "", os.readlink(f"/proc/self/fd/{name}"))] += 1
    return found


async def test_no_descriptor_is_left_open_by_any_call(make_box: MakeBox) -> None:
    """Of what is opened, of what fails on the way, and of what programs that end there."""
    await (await make_box()).close()
    before = descriptors()
    ruled = Processes(deny=(ExecRule("/nowhere"),))
    box = await make_box(policy=Policy(filesystem=HOOKS.filesystem, process=ruled))
    await box.exec(["/bin/mkdir", "/tmp/here"])
    assert (await box.exec([PYTHON, "-c", AS_OUTSIDE], directory="/tmp/here", timeout=120)).exit_code == 0
    for _ in range(5):
        await box.exec(["/bin/sh", "-c", "mkfifo fifo; (cat fifo & cat < fifo & sleep 0.1; kill -9 0)"])
    await box.close()
    assert wait_until(lambda: not (descriptors() - before)), descriptors() - before


WORK = """
set -e
git init -q project
cd project
git config user.email agent@example.org
git config user.name agent
printf 'int main(void) { return 0; }' > main.c
git add main.c
git commit -q -m first
git checkout -q -b other
git gc -q
git log --oneline | wc -l
if command -v gcc > /dev/null; then gcc -O1 main.c -o main && ./main; fi
/usr/bin/python3 -m venv --without-pip venv
venv/bin/python -c 'import json, sqlite3, subprocess; subprocess.run(["true"], check=True)'
find / -xdev -name "*.none" > /dev/null 2>&1 || true
tar cf ../archive.tar . && mkdir ../copy && tar xf ../archive.tar -C ../copy && diff -r . ../copy && rm -r ../copy
sh -c 'cat < /dev/stdin' < main.c > /dev/null
ps ax > /dev/null
cat /proc/self/maps > /dev/null
bash -c 'cat <(echo on)'
"""


@pytest.mark.skipif(not os.path.exists("/usr/bin/git"), reason="no git on this machine")
async def test_git_compilers_and_python_work_and_the_hooks_are_recorded(make_box: MakeBox, workspace: Path) -> None:
    box = await make_box(policy=HOOKS)
    result = await box.exec(["/bin/bash", "-c", WORK], directory=str(workspace), timeout=300)
    assert result.exit_code == 0, result.stderr
    assert result.stdout.endswith(b"on\n")
    await box.exec(["/bin/sh", "-c", "echo x > .git/hooks/pre-commit"], directory=f"{workspace}/project")
    expected = (Kind.FILE_OPEN, File(f"{workspace}/project/.git/hooks/pre-commit", Access.WRITE))
    assert files(box)[-1] == expected
    assert all("/.git/hooks" in file.path + file.other for _, file in files(box))


IDS = """
receivers = [socket.socket(socket.AF_INET, kind) for kind in (socket.SOCK_STREAM, socket.SOCK_DGRAM)]
for receiver in receivers:
    receiver.bind(("127.0.0.1", 20001))
receivers[0].listen(1)
own = "/proc/self"
shown = {name: open(f"{own}/{name}").read() for name in ("gid_map", "loginuid", "projid_map", "uid_map", "setgroups")}
for place in (own, f"/proc/{os.getpid()}", "/proc/thread-self", f"{own}/task/{os.getpid()}"):
    lines = [line.split() for line in open(f"{place}/status")]
    shown[place.replace(str(os.getpid()), "N")] = [
        line for line in lines if line[0][:-1] in ("Uid", "Gid", "Groups", "CapEff", "NoNewPrivs", "Umask")]
for name in ("tcp", "udp"):
    users = [[line.split()[7] for line in open(f"{place}/net/{name}")] for place in ("/proc", own, "/proc/thread-self")]
    shown[name] = users
assert shown["tcp"] and shown["udp"]
read = {}
for place in (own, own + "/net", own + "/fdinfo", "/proc/net"):
    for name in sorted(os.listdir(place)):
        try:
            with open(f"{place}/{name}", "rb") as file:
                read[f"{place}/{name}"] = file.read(1 << 14).decode("latin-1")
        except OSError as error:
            read[f"{place}/{name}"] = errno.errorcode[error.errno]
tell([shown, read, os.getuid(), os.getgid()])
"""


async def test_ids_are_those_inside_whoever_opens(make_box: MakeBox) -> None:
    """What /proc shows of users depends on who has opened it, and that is not the caller itself."""
    watched, plain = await make_box(policy=HOOKS), await make_box()
    for user in users(watched):
        (shown, read, uid, gid), (expected, readable, *_) = [
            await inside(box, IDS, user=user) for box in (watched, plain)
        ]
        for each in (shown, expected):
            for name in ("uid_map", "gid_map"):  # each sandbox has its own range
                each[name] = re.sub(r"\d{7,}", "first", each[name])
        assert shown == expected
        assert {name for name, text in readable.items() if text != "EACCES"} >= set(read) - {
            name for name, text in read.items() if text == "EACCES"
        }
        # What names the host's ids to everybody (uid_map, mounts) does so here, and nothing else does.
        assert host_ids(watched, read, uid, gid) <= host_ids(plain, readable, uid, gid)


def host_ids(box: Sandbox, read: dict[str, str], *ids: int) -> set[str]:
    """Files in which the host's numbers for these ids are; where they are such that nothing else is by chance."""
    outside = {box.core.prepared.identity.outside(each) for each in ids}
    return {
        name
        for name, text in read.items()
        for each in outside
        if each >= RANGE_FIRST and re.search(rf"\b{each}\b", text)
    }


LIMITED = """
import resource, signal
seen = []
signal.signal(signal.SIGXFSZ, lambda *_: seen.append("SIGXFSZ"))
open("long", "w").write("x" * 100)
resource.setrlimit(resource.RLIMIT_FSIZE, (10, 100))
answers = [attempt(os.truncate, "long", length) for length in (101, 100, 50, 51, 10, 11, 5, 10)]
tell([answers, seen, os.path.getsize("long")])
"""


async def test_nobody_makes_a_file_longer_than_it_may(make_box: MakeBox, workspace: Path) -> None:
    """The limit is the caller's, not that of whoever does it."""
    answers = [
        await inside(await make_box(policy=policy), LIMITED, directory=str(workspace)) for policy in (HOOKS, Policy())
    ]
    assert answers[0] == answers[1]
    assert answers[0] == [["EFBIG", "", "", "EFBIG", "", "EFBIG", "", ""], ["SIGXFSZ"] * 3, 10]


LEASED = """
lease = os.open("leased", os.O_CREAT | os.O_RDONLY)
breaks = threading.Event()
signal.signal(signal.SIGIO, lambda *_: breaks.set())
fcntl.fcntl(lease, fcntl.F_SETLEASE, fcntl.F_RDLCK)
def write():
    try:
        open("leased", "a").write("x")
    except OSError:
        os._exit(1)
    os._exit(0)
writers = [os.fork() or write() for _ in range(80)]
breaks.wait(60)
time.sleep(1)  # for as many of them as can to wait there
fcntl.fcntl(lease, fcntl.F_SETLEASE, fcntl.F_UNLCK)
tell([sum(os.waitpid(writer, 0)[1] == 0 for writer in writers), os.path.getsize("leased")])
"""


async def test_whoever_finds_the_deputy_busy_waits(make_box: MakeBox, workspace: Path) -> None:
    """More opens wait for somebody than it has places for: the rest is late, and none fails."""
    box = await make_box(policy=HOOKS)
    assert await inside(box, LEASED, directory=str(workspace), timeout=120) == [80, 80]


# ---- what is watched ----


@pytest.mark.parametrize(
    ("command", "kind", "path", "access", "other"),
    [
        ("cat secret", Kind.FILE_OPEN, "secret", Access.READ, ""),
        ("echo x >> secret", Kind.FILE_OPEN, "secret", Access.WRITE, ""),
        ("echo x > other/../secret", Kind.FILE_OPEN, "secret", Access.WRITE, ""),
        ("cat link", Kind.FILE_OPEN, "secret", Access.READ, ""),
        ("cat /proc/self/cwd/secret", Kind.FILE_OPEN, "secret", Access.READ, ""),
        ("cat < link", Kind.FILE_OPEN, "secret", Access.READ, ""),
        ("truncate -c -s 0 secret", Kind.FILE_OPEN, "secret", Access.WRITE, ""),
        ("mv secret away", Kind.FILE_RENAME, "secret", Access.WRITE, "away"),
        ("mv file.txt secret", Kind.FILE_RENAME, "file.txt", Access.WRITE, "secret"),
        ("rm -f secret", Kind.FILE_UNLINK, "secret", Access.WRITE, ""),
        ("ln secret away", Kind.FILE_LINK, "secret", Access.WRITE, "away"),
        ("chmod 600 link", Kind.FILE_CHMOD, "secret", Access.WRITE, ""),
        ("echo x > keys/new", Kind.FILE_OPEN, "keys/new", Access.WRITE, ""),
        ("ln -s elsewhere keys/new", Kind.FILE_LINK, "keys/new", Access.WRITE, ""),
        ("mv other .config", Kind.FILE_RENAME, "other", Access.WRITE, ".config/keys"),
        ("ln -s other .config", Kind.FILE_LINK, ".config/keys", Access.WRITE, ""),
        ("mv keys locks", Kind.FILE_RENAME, "keys", Access.WRITE, "locks"),
        ("mkfifo keys/pipe", Kind.FILE_OPEN, "keys/pipe", Access.WRITE, ""),
        (f"{PYTHON} -B -c 'import os; os.open(\"keys/new\", 65)'", Kind.FILE_OPEN, "keys/new", Access.WRITE, ""),
    ],
)
async def test_what_is_asked_for_is_held_and_refused_by_whatever_way(
    command: str, kind: Kind, path: str, access: Access, other: str, make_box: MakeBox, workspace: Path
) -> None:
    (workspace / "secret").write_text("secret\n")
    (workspace / "keys").mkdir()
    (workspace / "other").mkdir()
    (workspace / "link").symlink_to("secret")
    globs = tuple(f"{workspace}/{name}" for name in ("secret", "keys/**", ".config/keys"))
    box = await make_box(policy=Policy(filesystem=Filesystem(ask=globs)))

    before = await box.changes()
    running = asyncio.ensure_future(box.exec(["/bin/sh", "-c", command], directory=str(workspace), timeout=60))
    number = await held(box)
    question = box.core.supervision.approvals.waiting()[0]
    expected = File(f"{workspace}/{path}", access, f"{workspace}/{other}" if other else "")
    assert (question.action.kind, question.action.subject) == (kind, expected)
    assert not running.done()
    answer = box.core.supervision.approvals.answer
    answer(number, Verdict.DENY, "a person")
    while not running.done():  # mv, and others, try another way
        if waiting := box.core.supervision.approvals.waiting():
            answer(waiting[0].number, Verdict.DENY, "a person")
        await asyncio.sleep(0.005)
    assert running.result().exit_code != 0
    assert await box.changes() == before

    running = asyncio.ensure_future(box.exec(["/bin/sh", "-c", command], directory=str(workspace), timeout=60))
    while not running.done():
        if waiting := box.core.supervision.approvals.waiting():
            answer(waiting[0].number, Verdict.ALLOW, "a person")
        await asyncio.sleep(0.005)
    if "pipe" not in command:
        assert running.result().exit_code == 0, running.result().stderr


async def test_what_would_be_truncated_is_whole_until_somebody_says_yes(make_box: MakeBox, workspace: Path) -> None:
    policy = Policy(filesystem=Filesystem(ask=(f"{workspace}/file.txt",)))
    box = await make_box(policy=policy)
    running = asyncio.ensure_future(box.exec(["/bin/sh", "-c", ": > file.txt"], directory=str(workspace), timeout=60))
    number = await held(box)
    with open(f"/proc/self/fd/{box.core.root_fd}{workspace}/file.txt") as file:
        assert file.read() == "original\n"
    box.core.supervision.approvals.answer(number, Verdict.ALLOW, "a person")
    assert (await running).exit_code == 0
    assert await box.read_file(f"{workspace}/file.txt") == b""


async def test_others_go_on_while_one_is_held(make_box: MakeBox, workspace: Path) -> None:
    policy = Policy(filesystem=Filesystem(ask=(f"{workspace}/file.txt",)))
    box = await make_box(policy=policy)
    running = asyncio.ensure_future(box.exec(["/bin/cat", "file.txt"], directory=str(workspace), timeout=60))
    number = await held(box)
    assert (await box.exec(["/bin/cat", "/etc/passwd"], timeout=30)).exit_code == 0
    box.core.supervision.approvals.answer(number, Verdict.ALLOW, "a person")
    assert (await running).text == "original\n"


async def test_a_terminal_of_its_own_can_be_opened_by_its_name(make_box: MakeBox) -> None:
    box = await make_box(policy=HOOKS)
    process = await box.start_process(["/bin/sh", "-c", "echo spoken > /dev/tty; exit 4"], terminal=(24, 80))
    output = await process.stdout.read()
    assert (await process.wait()).code == 4
    assert b"spoken" in output
    assert (await box.exec(["/bin/sh", "-c", "echo spoken > /dev/tty"])).exit_code != 0


def decisions(box: Sandbox) -> list[Decision]:
    """All."""
    return list(box.core.supervision.recent.all())


async def test_entries_of_proc_that_depend_on_who_opens_are_not_lent(make_box: MakeBox) -> None:
    box = await make_box(policy=HOOKS)
    code = """
import os
for name in ("mem", "pagemap", "stack", "uid_map", "attr/current", "ns/user", "1/environ"):
    path = "/proc/1/environ" if name == "1/environ" else "/proc/self/" + name
    for flags in ((os.O_RDONLY, os.O_RDWR) if name in ("mem", "pagemap", "stack") else (os.O_RDWR,)):
        try:
            os.close(os.open(path, flags))
            print(name, flags)
        except OSError:
            pass
print("none")
"""
    assert (await box.exec([PYTHON, "-c", code])).text == "none\n"
