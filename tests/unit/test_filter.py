"""Each row of the seccomp table against the running kernel, and ordinary programs under the whole filter."""

from __future__ import annotations

import ctypes
import errno
import os
import shutil
import signal
import struct
import subprocess
import sys
from collections.abc import Iterable
from pathlib import Path

import pytest

from corral.supervisor.allowed import allowed_names
from corral.supervisor.filter import RET_ALLOW, find_table
from corral.supervisor.syscalls import COMMON_NUMBERS, DECIDED, MOVED_DIRECTORIES, REFUSALS
from tests.unit.filter_probe import (
    BAD_FD,
    BAD_POINTER,
    CONDITIONAL,
    HERE,
    LIBC,
    SENTINEL,
    SENTINEL_DECIDED,
    Case,
    answers,
    compare,
    holds,
    install,
    judge_by,
    numbers,
    run_under,
    sentinel_table,
    under,
)

on_x86 = pytest.mark.skipif(HERE.name != "x86_64", reason="this ABI exists on x86-64 only")
ALLOW_ALL = struct.pack("<HBBI", 0x06, 0, 0, RET_ALLOW)

NEWUSER, NEWNS, NEWNET, SIGHAND = 0x10000000, 0x20000, 0x40000000, 0x800
CLOEXEC, NONBLOCK = 0o2000000, 0o4000

# (call, arguments, errno) that a condition must refuse. Several of one call: rows in the order of the table.
REFUSED_WITH: tuple[Case, ...] = (
    *(("unshare", (1 << bit,), errno.EPERM) for bit in (7, 17, 20, 25, 26, 27, 28, 29, 30, 31)),
    ("unshare", (1 << 37,), errno.EPERM),
    *(("clone", (1 << bit | signal.SIGCHLD,), errno.EPERM) for bit in (17, 25, 26, 27, 28, 29, 30)),
    ("clone", (NEWUSER | NEWNET | SIGHAND,), errno.EPERM),
    ("seccomp", (1, 8, BAD_POINTER), errno.EPERM),
    ("seccomp", (1, 8 | 16 | 2, BAD_POINTER), errno.EPERM),
    *(("personality", (value,), errno.EPERM) for value in (0x40000, 0x100000, 0x400000, 0x20000, 0xFFFFFFFE, 1)),
    *(("socket", (family, 2, 0), errno.EAFNOSUPPORT) for family in (0, 3, 9, 15, 17, 21, 29, 30, 31, 38, 40, 44, 45)),
    ("socket", (0x80000001, 1, 0), errno.EAFNOSUPPORT),
    *(("socket", (16, 3 | CLOEXEC, protocol), errno.EPROTONOSUPPORT) for protocol in (4, 6, 9, 12, 15, 16, 21)),
    *(("socket", (family, 3 | CLOEXEC, protocol), errno.EPERM) for family in (2, 10) for protocol in (0, 1, 6, 255)),
    *(("socket", (family, kind, 0), errno.ESOCKTNOSUPPORT) for family in (2, 10) for kind in (0, 4, 5, 6, 10, 15)),
    *(("socket", (family, 2 | NONBLOCK, protocol), errno.EACCES) for family in (2, 10) for protocol in (1, 58)),
    *(("socket", (2, 1, protocol), errno.EPROTONOSUPPORT) for protocol in (132, 256, 262, 2, 255)),
    *(("socket", (10, 2, protocol), errno.EPROTONOSUPPORT) for protocol in (136, 115, 33, 262)),
    *(("socketpair", (family, 1, 0, BAD_POINTER), errno.EAFNOSUPPORT) for family in (0, 2, 10, 16, 30, 40)),
    ("setsockopt", (BAD_FD, 6, 31, BAD_POINTER, 4), errno.ENOENT),
    ("setsockopt", (BAD_FD, 0, 4, BAD_POINTER, 4), errno.EPERM),
    *(("setsockopt", (BAD_FD, 41, option, BAD_POINTER, 4), errno.EPERM) for option in (6, 32, 57)),
    *(("ioctl", (BAD_FD, command, BAD_POINTER), errno.EPERM) for command in (0x5412, 0x541C)),
    ("ioctl", (BAD_FD, 0x5423, BAD_POINTER), errno.EPERM),
    *(("mknod", (BAD_POINTER, kind | 0o600, 0), errno.EPERM) for kind in (0x2000, 0x6000)),
    *(("mknodat", (BAD_FD, BAD_POINTER, kind | 0o600, 0), errno.EPERM) for kind in (0x2000, 0x6000)),
)  # fmt: skip

# (call, arguments) that conditions make one to be decided.
DECIDED_WITH: tuple[tuple[str, tuple[int, ...]], ...] = (
    *(("sendto", (BAD_FD, BAD_POINTER, 1, 0, address, 16)) for address in (1, 0x80000000, 0x7FFF00000001)),
    *(("sendto", (BAD_FD, BAD_POINTER, 1, 0, 1 << bit, 16)) for bit in (32, 33, 46, 63)),
    *(("setrlimit", (4 | high, BAD_POINTER)) for high in (0, 1 << 32, 1 << 63)),
    *(("prlimit64", (0, 4 | high, BAD_POINTER, 0)) for high in (0, 1 << 32, 1 << 63)),
    ("prlimit64", (0, 4, 1 << 40, 0)),
)

# (call, arguments, errno) that must reach the kernel, which answers 0 or its own errno. The last of each call have an
# argument that is not one of those refused by a single bit or step.
PASSED_WITH: tuple[Case, ...] = (
    ("unshare", (0,), 0),
    ("unshare", (0x200 | 0x400,), 0),
    ("clone", (SIGHAND,), errno.EINVAL),  # without CLONE_VM: makes no child
    ("seccomp", (1, 0, BAD_POINTER), errno.EFAULT),
    ("seccomp", (1, 1 | 2 | 4, BAD_POINTER), errno.EFAULT),
    ("seccomp", (2, 8, BAD_POINTER), errno.EINVAL),  # SECCOMP_GET_ACTION_AVAIL takes no flags
    *(("personality", (value,), 0) for value in (0xFFFFFFFF, 8, 0)),
    *(("socket", (family, kind, 0), 0) for family in (1, 2, 10) for kind in (1, 2, 1 | CLOEXEC, 2 | NONBLOCK)),
    *(("socket", (family, 1, 6), 0) for family in (2, 10)),
    *(("socket", (family, 2, 17), 0) for family in (2, 10)),
    ("socket", (1, 5, 0), 0),
    ("socket", (1, 3, 0), 0),  # the kernel makes a datagram socket of it
    ("socket", (16, 3 | CLOEXEC, 0), 0),
    ("socket", (16, 2, 0), 0),
    ("socketpair", (1, 1, 0, BAD_POINTER), errno.EFAULT),
    ("setsockopt", (BAD_FD, 6, 30, BAD_POINTER, 4), errno.EBADF),
    ("setsockopt", (BAD_FD, 1, 31, BAD_POINTER, 4), errno.EBADF),
    *(("setsockopt", (BAD_FD, 0, option, BAD_POINTER, 4), errno.EBADF) for option in (1, 2, 6, 12)),
    *(("setsockopt", (BAD_FD, 41, option, BAD_POINTER, 4), errno.EBADF) for option in (4, 26, 56, 67)),
    *(("setsockopt", (BAD_FD, level, option, BAD_POINTER, 4), errno.EBADF) for level, option in ((6, 4), (17, 57))),
    ("sendto", (BAD_FD, BAD_POINTER, 1, 0, 0, 16), errno.EBADF),
    *(("setrlimit", (number, BAD_POINTER), errno.EFAULT) for number in (3, 5, 7)),
    *(("prlimit64", (0, number, BAD_POINTER, 0), errno.EFAULT) for number in (3, 5, 7)),
    ("prlimit64", (0, 4, 0, BAD_POINTER), errno.EFAULT),  # reading the limit of core dumps
    ("sendto", (BAD_FD, BAD_POINTER, 1, 0x20000000, 0, 0), errno.EBADF),  # MSG_FASTOPEN
    *(("ioctl", (BAD_FD, command, BAD_POINTER), errno.EBADF) for command in (0x5411, 0x5413, 0x541B, 0x5422, 0x5401)),
    *(("mknod", (BAD_POINTER, kind | 0o600, 0), errno.EFAULT) for kind in (0, 0x1000, 0x8000, 0xC000)),
    *(("mknodat", (BAD_FD, BAD_POINTER, kind | 0o600, 0), errno.EFAULT) for kind in (0, 0x1000, 0x8000, 0xC000)),
)  # fmt: skip


def present(cases: Iterable[Case]) -> list[Case]:
    return [case for case in cases if case[0] in numbers()]


def test_unconditional_refusals_answer_their_errno() -> None:
    rows = [row for row in REFUSALS if not row.when and row.name in numbers()]
    assert len(rows) > 55
    arguments = (BAD_FD,) * 6
    compare(find_table(), [(row.name, arguments, row.errno) for row in rows])
    # The kernel refuses many of these by itself: show that it was the row.
    compare(sentinel_table(), [(row.name, arguments, SENTINEL + REFUSALS.index(row)) for row in rows])


def deciding_row(name: str, arguments: tuple[int, ...]) -> int:
    padded = (*arguments, *[0] * (6 - len(arguments)))
    return next(
        index
        for index, row in enumerate(REFUSALS)
        if row.name == name and all(holds(condition, padded) for condition in row.when)
    )


def test_conditional_refusals_answer_their_errno() -> None:
    cases = present(REFUSED_WITH)
    compare(find_table(), cases)
    by_row = [(name, arguments, SENTINEL + deciding_row(name, arguments)) for name, arguments, _ in cases]
    compare(sentinel_table(), by_row)
    tried = {row for _, _, row in by_row}
    assert tried == {SENTINEL + i for i, row in enumerate(REFUSALS) if row.when and row.name in numbers()}


def test_decided_calls_are_notified() -> None:
    rows = [(index, row) for index, row in enumerate(DECIDED) if not row.when]
    assert {row.name for _, row in rows} >= {"connect", "bind", "sendmsg", "sendmmsg", "execve", "execveat", "setsid"}
    compare(sentinel_table(), [(row.name, (BAD_FD,) * 6, SENTINEL_DECIDED + index) for index, row in rows])
    wanted = find_table(watched=True, asked=("getpid", "memfd_create"), denied=("gettid", "socket"))
    asked: list[Case] = [(name, (BAD_POINTER,), SENTINEL_DECIDED) for name in ("getpid", "memfd_create", "unlinkat")]
    denied: list[Case] = [("gettid", (), errno.EPERM), ("socket", (1, 1, 0), errno.EPERM)]
    hardest: list[Case] = [("socket", (40, 1, 0), errno.EAFNOSUPPORT), ("setxattr", (BAD_POINTER,), errno.EOPNOTSUPP)]
    compare(wanted, [*asked, *denied, *hardest, ("getppid", (), 0)])


def test_conditionally_decided_calls_are_notified() -> None:
    assert {name for name, _ in DECIDED_WITH} == {row.name for row in DECIDED if row.when}
    rows = {SENTINEL_DECIDED + index for index, row in enumerate(DECIDED) if row.when}
    assert set(answers(sentinel_table(), DECIDED_WITH)) == rows
    compare(find_table(), [(name, arguments, SENTINEL_DECIDED) for name, arguments in DECIDED_WITH])


def test_high_bits_do_not_hide_a_refused_argument() -> None:
    """CVE-2019-10063: the kernel ignores bits 32-63 of an int, so a filter must too."""
    cases = []
    for name, arguments, code in present(REFUSED_WITH):
        # Only what conditions look at: the others may be pointers.
        looked_at = {condition.argument for row in REFUSALS if row.name == name for condition in row.when}
        for bit in (32, 47, 63):
            raised = tuple(value | (1 << bit) * (at in looked_at) for at, value in enumerate(arguments))
            cases.append((name, raised, code))
    compare(find_table(), cases)


def test_high_bits_do_not_refuse_an_allowed_argument() -> None:
    passed = [
        ("socket", (2 | 1 << 40, 1 | 1 << 63, 6 | 1 << 33), 0),
        ("ioctl", (BAD_FD, 0x5411 | 1 << 32), errno.EBADF),
    ]
    compare(find_table(), passed)


def test_other_arguments_reach_the_kernel() -> None:
    compare(find_table(), present(PASSED_WITH))
    compare(sentinel_table(), present(PASSED_WITH))
    assert {name for name, _, _ in PASSED_WITH} == set(CONDITIONAL)


def test_allowed_calls_reach_the_kernel() -> None:
    on_bad_fd = "read write lseek fsync fdatasync fstat dup getdents64 fchdir accept ftruncate flock".split()
    cases: list[Case] = [(name, (BAD_FD, BAD_POINTER, 1), errno.EBADF) for name in on_bad_fd]
    cases += [(name, (BAD_POINTER, 1), errno.EFAULT) for name in "uname sysinfo times".split()]
    compare(find_table(), [*cases, ("getpid", (), 0), ("gettid", (), 0), ("sched_yield", (), 0)])


def test_allowed_new_calls_answer_as_without_the_filter() -> None:
    """Also shows that the table's own numbers mean what it says: the kernel has them."""
    free = allowed_names() - {row.name for row in MOVED_DIRECTORIES}
    calls = [(name, (BAD_FD,) * 6) for name in COMMON_NUMBERS if name in free]
    without = answers(find_table(), calls, ALLOW_ALL)
    assert answers(find_table(), calls) == without
    release = tuple(int(part) for part in os.uname().release.split(".")[:2])
    if release >= (6, 17):
        absent = {name for (name, _), code in zip(calls, without, strict=True) if code == errno.ENOSYS}
        assert absent <= {"map_shadow_stack"}  # depends on the processor


def test_calls_without_a_name_do_not_exist() -> None:
    obsolete = {"x86_64": (134, 136, 139, 156, 174, 180, 205, 211, 236), "aarch64": (244, 259)}[HERE.name]
    unnamed = [number for number in obsolete if number not in numbers().values()]
    unnamed += [470, 471, 480, 500, 1000, 0x3FFFFFFF, 0xFFFFFFFFFFFFFFFF]
    assert answers(find_table(), [(number, (0,) * 6) for number in unnamed]) == [errno.ENOSYS] * len(unnamed)


@on_x86
def test_x32_calls_are_killed() -> None:
    for number in (39, 16, 520, 0):

        def body(number: int = number) -> int:
            return int(LIBC.syscall(ctypes.c_long(0x40000000 | number), 0, 0, 0))

        answer, status = under(find_table(), body)
        assert answer is None
        assert os.WIFSIGNALED(status)
        assert os.WTERMSIG(status) == signal.SIGSYS


@on_x86
def test_i386_calls_are_killed(tmp_path: Path) -> None:
    compiler = shutil.which("cc")
    if not compiler:
        pytest.skip("no C compiler (cc): the i386 entry cannot be tried")
    source, helper = tmp_path / "i386.c", tmp_path / "i386"
    source.write_text('int main(void) { long r; __asm__ volatile("int $0x80" : "=a"(r) : "a"(20)); return r <= 0; }')
    subprocess.run([compiler, "-o", helper, source], check=True)
    if subprocess.run([helper], check=False).returncode != 0:
        pytest.skip("this kernel has no i386 entry: nothing to refuse")
    status = run_filtered((str(helper),), tmp_path)[0]
    assert os.WIFSIGNALED(status)
    assert os.WTERMSIG(status) == signal.SIGSYS


def test_filters_of_ones_own_still_work() -> None:
    def body() -> str:
        install(ALLOW_ALL)
        return "installed"

    assert under(find_table(), body)[0] == "installed"


# --- programs --------------------------------------------------------------------------------------------------------

PYTHON_WORK = """
import asyncio, concurrent.futures, multiprocessing, socket, sqlite3, subprocess, sys, tempfile, threading

def square(n):
    return n * n

def main():
    seen = []
    threads = [threading.Thread(target=seen.append, args=(n,)) for n in range(8)]
    [t.start() for t in threads]
    [t.join() for t in threads]
    assert sorted(seen) == list(range(8))
    assert subprocess.check_output(["/bin/echo", "x"]) == b"x\\n"
    assert subprocess.check_output(["/bin/echo", "x"], close_fds=False) == b"x\\n"  # vfork path
    for method in ("fork", "spawn", "forkserver"):
        with multiprocessing.get_context(method).Pool(2) as pool:
            assert pool.map(square, range(5)) == [0, 1, 4, 9, 16]
    lock = multiprocessing.Lock()
    with lock, tempfile.TemporaryDirectory() as where:
        sqlite3.connect(where + "/db").execute("create table t (x)")

    async def served():
        async def serve(reader, writer):
            writer.write(await reader.read(2))
            writer.close()
        server = await asyncio.start_server(serve, "127.0.0.1", 0)
        reader, writer = await asyncio.open_connection(*server.sockets[0].getsockname())
        writer.write(b"hi")
        assert await reader.read() == b"hi"
        process = await asyncio.create_subprocess_exec("/bin/true")
        assert await process.wait() == 0
    asyncio.run(served())
    socket.getaddrinfo("localhost", 80)

if __name__ == "__main__":
    main()
"""
GIT = "git init -q . && git -c user.name=a -c user.email=a@b commit -q --allow-empty -m x && git gc -q && git log"
NODE = (
    "const n=require('net'),{Worker}=require('worker_threads');require('child_process').execFileSync('/bin/true');"
    "new Worker('0',{eval:true}).on('exit',()=>{const s=n.createServer(c=>c.end('hi')).listen(0,'127.0.0.1',()=>"
    "n.connect(s.address().port,'127.0.0.1').on('data',d=>process.exit(d=='hi'?0:1)))})"
)
TMUX = "tmux -S s -f /dev/null new-session -d 'sleep 20' && tmux -S s list-sessions && tmux -S s kill-server"
COMPILE = "echo 'int main(void){return 0;}' >a.c && cc -o a a.c && ./a"
PROGRAMS: dict[str, tuple[str, ...]] = {
    "git": ("sh", "-c", GIT),
    "node": ("node", "-e", NODE),
    "java": ("java", "-version"),
    "vim": ("vim", "-es", "-u", "NONE", "-c", "call system('true')", "-c", "q"),
    "tmux": ("sh", "-c", TMUX),
    "ssh": ("sh", "-c", "ssh-keygen -q -t ed25519 -N '' -f k && ssh -V"),
    "cc": ("sh", "-c", COMPILE),
    "bash": ("bash", "-c", "set -m; sleep 0.01 & wait; echo $(cat <(echo x))"),
}


def run_filtered(command: tuple[str, ...], where: Path) -> tuple[int, str]:
    """A program's wait status and what it wrote, under the whole filter; what is to be decided is allowed."""
    environment = {"PATH": os.environ["PATH"], "HOME": str(where), "TERM": "xterm", "SHELL": "/bin/sh"}

    def body() -> bytes:
        os.chdir(where)
        os.execvpe(command[0], command, environment)  # noqa: S606

    output, status = run_under(find_table().compile(), judge_by(find_table(), proceed=True), body, drop=False)
    return status, output.decode("utf-8", "replace")


def test_threads_processes_and_sockets_work_without_clone3(tmp_path: Path) -> None:
    assert answers(find_table(), [("clone3", (BAD_POINTER, 88))]) == [errno.ENOSYS]
    script = tmp_path / "work.py"
    script.write_text(PYTHON_WORK)
    status, output = run_filtered((sys.executable, str(script)), tmp_path)
    assert status == 0, output


@pytest.mark.parametrize("program", PROGRAMS)
def test_ordinary_programs_work(program: str, tmp_path: Path) -> None:
    if not shutil.which(program):
        pytest.skip(f"{program} is not installed")
    status, output = run_filtered(PROGRAMS[program], tmp_path)
    assert status == 0, output
