"""Whose deed it was: every record names the exec and the process, whatever a program does to be somebody else.

The program says of itself, over its own standard output, who it is inside; the record must say the same. What it is
outside is looked up on the host.
"""

from __future__ import annotations

import asyncio
import os
import signal
from collections import Counter
from pathlib import Path
from typing import NamedTuple

import pytest

from corral.actions import Decision, Kind, Process, Program
from corral.policy.model import Policy, Syscalls
from corral.sandbox.box import Sandbox
from corral.supervisor.processes import SESSION_MARK
from tests.contain.attacks import PYTHON, inside, numbers, still_serves
from tests.contain.conftest import Compile, MakeBox

# A program that makes itself somebody else in several ways at once. Each actor makes one call with a number that no
# other one uses, and says: NUMBER PID PPID PATH.
ACTORS = r"""
#include <errno.h>
#include <fcntl.h>
#include <pthread.h>
#include <sched.h>
#include <signal.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/prctl.h>
#include <sys/syscall.h>
#include <sys/wait.h>
#include <unistd.h>
static long base;
static char **arguments;
static void act(int which) {
    char self[4096] = {0}, line[4300];
    readlink("/proc/self/exe", self, sizeof self - 1);
    long result = syscall(base + which, 0, 0, 0, 0, 0);
    int length = snprintf(line, sizeof line, "%ld %d %d %s\n", result == -1 && errno == ENOSYS ? base + which : -1,
                          getpid(), getppid(), self);
    write(1, line, length);
}
static void *threaded(void *unused) { act(7); return unused; }
static int cloned(void *unused) { act(8); return 0; }
static void adopted(void) {  /* until somebody else is its parent */
    for (int i = 0; i < 5000 && getppid() != 1; i++) usleep(1000);
}
int main(int argc, char **argv) {
    static char stack[65536];
    base = atol(argv[1]);
    if (argc > 2) { act(atoi(argv[2])); return 0; }
    char number[32];
    snprintf(number, sizeof number, "%ld", base);
    act(0);
    if (fork() == 0) { act(1); _exit(0); }
    wait(0);
    if (fork() == 0) {  /* a daemon: forks twice, with a session of its own and a new parent */
        setsid();
        if (fork() == 0) { adopted(); act(2); _exit(0); }
        _exit(0);
    }
    wait(0);
    if (fork() == 0) {  /* renamed, without a command line */
        prctl(PR_SET_NAME, "corral-init");
        memset(argv[0], 0, strlen(argv[0]) + 1 + strlen(number));
        act(3);
        _exit(0);
    }
    wait(0);
    if (vfork() == 0) { execl("/proc/self/exe", "[kworker/0:1]", number, "4", (char *)0); _exit(1); }
    wait(0);
    if (fork() == 0) {  /* adopted, in the old session */
        if (fork() == 0) { adopted(); act(5); _exit(0); }
        _exit(0);
    }
    wait(0);
    if (fork() == 0) {  /* several sessions, one after the other */
        for (int i = 0; i < 4; i++) { if (fork()) { wait(0); _exit(0); } setsid(); }
        execl("/proc/self/exe", "sshd", number, "6", (char *)0);
    }
    wait(0);
    pthread_t thread;
    pthread_create(&thread, 0, threaded, 0);
    pthread_join(thread, 0);
    clone(cloned, stack + sizeof stack, CLONE_VM | SIGCHLD, 0);
    wait(0);
    if (fork() == 0) { setpgid(0, 0); chroot("/"); act(9); _exit(0); }
    wait(0);
    usleep(200000);
    return 0;
}
"""
COUNT = 10


class Claim(NamedTuple):
    """What an actor says of itself."""

    number: int
    pid: int
    parent: int
    exe: str


def claims(text: str) -> list[Claim]:
    found = []
    for line in text.splitlines():
        number, pid, parent, exe = line.split(maxsplit=3)
        found.append(Claim(int(number), int(pid), int(parent), exe))
    return found


def unnamed(box: Sandbox, first: int, count: int = COUNT) -> dict[int, Decision]:
    """The records of calls without a name, by their number."""
    box.core.supervision.flush()
    found = {}
    for one in box.core.supervision.recent.all():
        word = one.action.name.rpartition(" ")[2]
        if one.action.name.startswith("kernel.unknown call ") and first <= int(word) < first + count:
            assert int(word) not in found
            found[int(word)] = one
    return found


def process_of(one: Decision) -> Process:
    assert one.action.origin.process is not None
    return one.action.origin.process


async def test_two_execs_are_told_apart_whatever_their_processes_do(box: Sandbox, compile_c: Compile) -> None:
    program = compile_c(ACTORS, "actors")
    bases = (600, 700, 800)
    results = await asyncio.gather(*(box.exec([program, str(base)], timeout=60) for base in bases))
    for exec_number, (base, result) in enumerate(zip(bases, results, strict=True), 1):
        assert result.exit_code == 0
        said = {claim.number: claim for claim in claims(result.text)}
        found = unnamed(box, base)
        assert sorted(said) == sorted(found) == list(range(base, base + COUNT))
        started = process_of(found[base]).started
        for number, claim in said.items():
            origin, process = found[number].action.origin, process_of(found[number])
            assert (origin.sandbox, origin.session, origin.exec) == (box.id, box.id, exec_number), claim
            assert (process.inner_pid, process.exe) == (claim.pid, claim.exe), claim
            assert process.pid != process.inner_pid
            assert process.started >= started > 0
        outer = {process_of(one).pid for one in found.values()}
        assert len(outer) == COUNT - 1  # the thread is the first process's
        main = process_of(found[base])
        assert process_of(found[base + 7]).pid == main.pid
        chains = {number: [ancestor.pid for ancestor in process_of(one).ancestors] for number, one in found.items()}
        assert chains[base] == []
        assert chains[base + 1] == chains[base + 4] == chains[base + 9] == [main.inner_pid]
        assert {a.exe for a in process_of(found[base + 1]).ancestors} == {program}
        # Adopted by the sandbox's first process, which is nobody's deed.
        assert chains[base + 2] == chains[base + 5] == []
        assert process_of(found[base + 4]).argv == ("[kworker/0:1]", str(base), "4")
        assert process_of(found[base + 6]).argv[0] == "sshd"
    # Told to each exec: its own denials, and nobody else's.
    for base, result in zip(bases, results, strict=True):
        assert [denial.action for denial in result.denials] == ["kernel.chroot"]
        assert result.denials[0].exec == unnamed(box, base)[base].action.origin.exec


async def test_start_time_and_numbers_are_the_hosts(box: Sandbox) -> None:
    """``pid`` and ``started`` name the process on the host: whoever looks there finds it."""
    script = (
        "import ctypes, os, sys\nctypes.CDLL(None).syscall(600)\nprint(os.getpid(), flush=True)\nsys.stdin.readline()"
    )
    process = await box.start_process([PYTHON, "-c", script])
    inner = int(await process.stdout.readline())
    (one,) = unnamed(box, 600).values()
    found = process_of(one)
    stat = Path(f"/proc/{found.pid}/stat").read_text().rpartition(")")[2].split()
    status = Path(f"/proc/{found.pid}/status").read_text()
    assert int(stat[19]) == found.started
    assert f"\t{inner}\n" in next(line + "\n" for line in status.split("\n") if line.startswith("NSpid:"))
    assert found.inner_pid == inner
    assert os.path.realpath(f"/proc/{found.pid}/exe") == found.exe == os.path.realpath(PYTHON)
    await process.write(b"\n")
    await process.wait()


# ---- forged marks ----

FORGE = f"""
import ctypes, os, sys, time
libc = ctypes.CDLL(None, use_errno=True)
SETSID = {numbers("setsid")["setsid"]}
def forge(number):
    return libc.syscall(ctypes.c_long(SETSID), ctypes.c_long({SESSION_MARK}), ctypes.c_long(number))
def child(work):
    pid = os.fork()
    if pid == 0:
        try:
            work()
        finally:
            os._exit(0)
    os.waitpid(pid, 0)
"""


async def test_a_forged_mark_changes_nothing(box: Sandbox) -> None:
    """The mark of an exec's leader, made by anybody else: one gets a session, as setsid(2) says, and no other exec."""
    victim = await box.start_process(["/bin/sleep", "600"])
    script = f"""{FORGE}
def one():
    assert forge(1) == os.getpid() == os.getsid(0)
    libc.syscall(600)
def two():
    forge(99)
    child(lambda: (forge(1), libc.syscall(601)))
def three():  # orphaned by its own kind, adopted by the first process
    forge(1)
    if os.fork() == 0:
        while os.getppid() != 1:
            time.sleep(0.001)
        forge(1)
        libc.syscall(602)
        os._exit(0)
def four():  # its first one fails: a leader of a group cannot make a session
    os.setpgid(0, 0)
    assert forge(1) == -1
    libc.syscall(603)
[child(work) for work in (one, two, three, four)]
time.sleep(0.2)
libc.syscall(604)
print("done", flush=True)
"""
    result = await box.exec([PYTHON, "-c", script], timeout=60)
    assert result.text == "done\n", result.stderr
    found = unnamed(box, 600)
    assert sorted(found) == list(range(600, 605))
    assert {one.action.origin.exec for one in found.values()} == {2}
    later = await box.exec([PYTHON, "-c", "import ctypes; ctypes.CDLL(None).syscall(700)"], timeout=60)
    assert later.exit_code == 0
    assert unnamed(box, 700)[700].action.origin.exec == 3
    # What is told to an exec follows the same numbers.
    victim.kill()
    assert (await victim.wait()).code == 128 + signal.SIGKILL


async def test_sessions_can_still_be_ended(box: Sandbox) -> None:
    """A command that has others make forged marks is killed like any other, and only that one."""
    script = f"""{FORGE}
child(lambda: forge(1))
print("ready", flush=True)
time.sleep(600)
"""
    one = await box.start_process([PYTHON, "-c", script])
    two = await box.start_process([PYTHON, "-c", script])
    for process in (one, two):
        assert await process.stdout.readline() == b"ready\n"
    box.core.kill_session(2)
    assert (await two.wait()).code == 128 + signal.SIGKILL
    assert await inside(box, "tell(os.kill(int(sys.argv[1]), 0))", str(inner_pid_of(box, 1))) is None
    box.core.kill_session(1)
    assert (await one.wait()).code == 128 + signal.SIGKILL
    await still_serves(box)


def inner_pid_of(box: Sandbox, exec_number: int) -> int:
    """The first process of an exec, as its exec was recorded."""
    for one in box.core.supervision.recent.all():
        if one.action.kind is Kind.PROCESS_EXEC and one.action.origin.exec == exec_number:
            return process_of(one).inner_pid
    raise AssertionError("no record")


async def test_a_terminals_command_belongs_to_its_exec(box: Sandbox, compile_c: Compile) -> None:
    """There the leader of the session is not the command itself."""
    program = compile_c(ACTORS, "actors")
    process = await box.start_process([program, "600"], terminal=(24, 80))
    await process.stdout.read()
    assert (await process.wait()).code == 0
    found = unnamed(box, 600)
    assert len(found) == COUNT
    assert {one.action.origin.exec for one in found.values()} == {1}


# ---- another program under the same number ----

SUCCESSION = r"""
#include <pthread.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/prctl.h>
#include <sys/syscall.h>
#include <sys/wait.h>
#include <unistd.h>
/* Runs another program under the same pid while other threads, or children, go on calling as the old one. */
static char **arguments;
static void *calls(void *unused) { for (;;) syscall(600, 0); }
static void *executes(void *unused) { usleep(rand() % 3000); execv(arguments[1], arguments + 1); _exit(9); }
int main(int argc, char **argv) {
    if (argc == 1) {  /* the successor */
        for (int i = 0; i < 20; i++) syscall(700, 0);
        return 0;
    }
    arguments = argv;
    pthread_t thread;
    srand(atoi(argv[0]));
    switch (atoi(argv[0]) % 3) {
    case 0:  /* another than the first thread executes, while the first one calls */
        pthread_create(&thread, 0, executes, 0);
        calls(0);
    case 1:  /* the first one executes, while another one calls */
        pthread_create(&thread, 0, calls, 0);
        executes(0);
    default:  /* it executes while a child calls, of which it is an ancestor */
        if (fork() == 0) {
            prctl(PR_SET_PDEATHSIG, 9);
            alarm(1);
            for (int i = 0; i < 400; i++) syscall(600, 0);
            _exit(0);
        }
        executes(0);
    }
}
"""


async def test_a_program_is_never_taken_for_the_one_before_it(box: Sandbox, compile_c: Compile) -> None:
    """execve(2) keeps the pid. Whatever calls at that moment, the new program's deeds are recorded as its own."""
    before, after = compile_c(SUCCESSION, "before"), compile_c(SUCCESSION, "after")
    script = f"""
import subprocess, sys
for number in range(240):
    subprocess.run([str(number), {after!r}], executable={before!r}, stdin=subprocess.DEVNULL)
"""
    result = await box.exec([PYTHON, "-c", script], timeout=120)
    assert result.exit_code == 0, result.stderr
    box.core.supervision.flush()
    old, new = set(), Counter[int]()
    for one in box.core.supervision.recent.all():
        process = process_of(one)
        if one.action.name == "kernel.unknown call 700":
            assert (process.exe, process.argv) == (after, (after,))
            new[process.inner_pid] += one.count
        elif one.action.name == "kernel.unknown call 600":
            assert process.exe == before
            old.add(process.inner_pid)
    assert len(new) == 240 and set(new.values()) == {20}
    assert old


@pytest.mark.root
async def test_a_number_that_is_used_again_is_another_process(box: Sandbox, compile_c: Compile) -> None:
    """Numbers come round. The host's next one is set, so that a new process gets that of one that has died."""
    last = Path("/proc/sys/kernel/ns_last_pid")
    if not os.access(last, os.W_OK):
        pytest.skip("this machine does not let the next process number be set")
    source = r"""
    #include <stdio.h>
    #include <sys/syscall.h>
    #include <sys/wait.h>
    #include <unistd.h>
    int main(int argc, char **argv) {
        char go;
        while (read(0, &go, 1) == 1) {
            if (fork() == 0) { syscall(600, 0); _exit(0); }
            wait(0);
            write(1, "done\n", 5);
        }
    }
    """
    programs = [compile_c(source, "first"), compile_c(source, "second")]
    processes = [await box.start_process([program]) for program in programs]
    met = 0
    for _ in range(60):
        outer = 0
        for program, process in zip(programs, processes, strict=True):
            if outer:
                last.write_text(str(outer - 1))
            await process.write(b"x")
            assert await process.stdout.readline() == b"done\n"
            box.core.supervision.flush()
            # The start of the other program may be recorded only now.
            refused = [each for each in box.core.supervision.recent.all() if each.action.kind is Kind.KERNEL]
            found = process_of(refused[-1])
            assert found.exe == program
            met += found.pid == outer
            outer = found.pid
        if met >= 5:
            break
    for process in processes:
        process.kill()
        await process.wait()
    assert met >= 1, "no number came round, so nothing was tried"


RENAME = r"""
#include <fcntl.h>
#include <stdio.h>
#include <string.h>
#include <sys/mman.h>
#include <sys/prctl.h>
#include <sys/syscall.h>
#include <unistd.h>
int main(int argc, char **argv) {
    int other = open("/bin/true", O_RDONLY);
    long link = prctl(PR_SET_MM, PR_SET_MM_EXE_FILE, other, 0, 0);
    struct prctl_mm_map map = {.exe_fd = other};
    long all = prctl(PR_SET_MM, PR_SET_MM_MAP, &map, sizeof map, 0);
    prctl(PR_SET_NAME, "true");
    memset(argv[0], 'x', strlen(argv[0]));
    unlink(argv[1]);
    syscall(600, 0);
    printf("%ld %ld\n", link, all);
    return 0;
}
"""


async def test_no_program_can_call_itself_another(box: Sandbox, compile_c: Compile) -> None:
    """``exe`` is the kernel's word. A program that is gone from its place is shown as that."""
    program = compile_c(RENAME, "renamed")
    assert (await box.exec([program, program], timeout=60)).text == "-1 -1\n"
    (one,) = unnamed(box, 600).values()
    assert process_of(one).exe == f"{program} (deleted)"
    assert process_of(one).argv[0] == "x" * len(program)


async def test_held_calls_name_their_exec_too(make_box: MakeBox) -> None:
    box = await make_box(policy=Policy(syscalls=Syscalls(ask=("getpriority",))))
    script = "import os\nif os.fork() == 0:\n    os.setsid()\n    os.getpriority(0, 0)\n    os._exit(0)\nos.wait()"
    tasks = [asyncio.create_task(box.exec([PYTHON, "-c", script], timeout=60)) for _ in range(5)]
    approvals = box.core.supervision.approvals
    async with asyncio.timeout(30):
        while approvals.held < 5:
            await asyncio.sleep(0.01)
    origins = [question.action.origin for question in approvals.waiting()]
    assert sorted(origin.exec for origin in origins) == [1, 2, 3, 4, 5]
    for origin in origins:
        assert origin.process is not None
        assert [ancestor.pid for ancestor in origin.process.ancestors] == [inner_pid_of(box, origin.exec)]
    for task in tasks:
        task.cancel()
    await asyncio.gather(*tasks, return_exceptions=True)


async def test_every_exec_of_a_shell_session_is_its_own_record(box: Sandbox) -> None:
    """The chain of parents, for a tree of shells: who ran what, from the inside out."""
    script = "sh -c 'sh -c \"cat /dev/null; true\"; true'; true"
    await box.exec(["/bin/sh", "-c", script], check=True)
    chains = {}
    for one in box.core.supervision.recent.all():
        if one.action.kind is Kind.PROCESS_EXEC:
            assert isinstance(one.action.subject, Program)
            chains[one.action.subject.argv[-1]] = process_of(one).ancestors
    shell = os.path.realpath("/bin/sh")
    assert [len(chain) for chain in chains.values()] == [0, 1, 2, 3]
    assert [ancestor.exe for ancestor in chains["/dev/null"]] == [shell] * 3
    # From the parent outwards: each one's chain is its parent's, with the parent before it.
    for inner, outer in zip(list(chains.values())[1:], chains.values(), strict=False):
        assert inner[1:] == outer
