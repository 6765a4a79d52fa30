"""Held calls: the caller sleeps in its system call until somebody answers, whatever happens around it.

The call that is asked for by name is getpriority(2): it changes nothing, has a result to check, and no program makes
it by itself. connect(2) stands for the calls that the supervisor makes itself.
"""

from __future__ import annotations

import asyncio
import hashlib
import json
import mmap
import os
import signal
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import closing
from dataclasses import replace
from pathlib import Path

import pytest

from corral.actions import Kind, Program, Verdict
from corral.approvals.queue import Question, Queue, Scope
from corral.errors import ExecError, RequestError, SandboxClosed
from corral.policy.model import (
    Approvals,
    ExecRule,
    Filesystem,
    Network,
    Policy,
    Processes,
    Resources,
    Syscalls,
)
from corral.sandbox import paths, resolver
from corral.sandbox.box import Sandbox
from corral.sandbox.process import Process
from corral.supervisor.execs import _Attempt
from tests.contain.command_line import CommandLine, adopting_orphans
from tests.contain.conftest import Compile, MakeBox, wait_until

PYTHON = "/usr/bin/python3"
PATIENCE = 20.0
ASKED = Policy(syscalls=Syscalls(ask=("getpriority",)), resources=Resources(processes=4096))
LOOPBACK = Policy(network=Network(loopback=Verdict.ASK))

ASK = "import os; print(os.getpriority(os.PRIO_PROCESS, 0), flush=True)"


def queue_of(box: Sandbox) -> Queue:
    return box.core.supervision.approvals


async def until(condition: Callable[[], bool]) -> None:
    for _ in range(int(PATIENCE / 0.005)):
        if condition():
            return
        await asyncio.sleep(0.005)
    raise AssertionError("it did not come to be")


async def held(box: Sandbox, count: int = 1) -> tuple[Question, ...]:
    """What is held, once that many are."""
    await until(lambda: queue_of(box).held >= count)
    assert queue_of(box).held == count
    return queue_of(box).waiting()


def sleeps(pid: int) -> bool:
    """Whether a process of the host sleeps (proc_pid_stat(5)); until the first signal comes it does so as S."""
    return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] in "SD"


def answer(box: Sandbox, question: Question, verdict: Verdict, **how: object) -> None:
    queue_of(box).answer(question.number, verdict, "the test", **how)  # type: ignore[arg-type]


# ---- one call ----


async def test_a_held_call_sleeps_while_the_rest_goes_on(make_box: MakeBox) -> None:
    box, other = await make_box(policy=ASKED), await make_box(policy=ASKED)
    asking = asyncio.create_task(box.exec([PYTHON, "-c", ASK]))
    (question,) = await held(box)
    action = question.action
    assert action.kind is Kind.KERNEL and action.name == "kernel.getpriority"
    assert action.origin.sandbox == box.id and action.origin.process is not None
    assert "python" in action.origin.process.exe and question.opinion.rule == "syscalls.ask[0]"
    assert sleeps(action.origin.process.pid)
    for place in (box, other):
        assert (await place.exec(["sh", "-c", "echo on; sleep 0.1"])).stdout == b"on\n"
    assert not asking.done() and queue_of(box).held == 1 and queue_of(other).held == 0
    answer(box, question, Verdict.ALLOW)
    result = await asking
    assert (result.exit_code, result.stdout) == (0, b"0\n"), result.stderr


async def test_an_approved_call_does_what_it_does_outside(make_box: MakeBox) -> None:
    box = await make_box(policy=ASKED)
    asking = asyncio.create_task(box.exec(["nice", "-n", "7", PYTHON, "-c", ASK]))
    while not asking.done():  # nice(1) asks, too
        for question in queue_of(box).waiting():
            answer(box, question, Verdict.ALLOW)
        await asyncio.sleep(0.01)
    assert (await asking).stdout == b"7\n"


async def test_a_denied_call_fails_and_the_reason_is_recorded(make_box: MakeBox) -> None:
    box = await make_box(policy=ASKED)
    asking = asyncio.create_task(box.exec([PYTHON, "-c", ASK]))
    (question,) = await held(box)
    answer(box, question, Verdict.DENY, reason="not today")
    result = await asking
    assert result.exit_code == 1 and b"PermissionError" in result.stderr
    (decision,) = [one for one in box.core.supervision.recent.all() if one.action.name == "kernel.getpriority"]
    assert (decision.verdict, decision.decider, decision.answered_by) == (Verdict.DENY, "approvals", "the test")
    assert decision.reason == "not today" and decision.held > 0


async def test_an_answer_may_end_the_sandbox(make_box: MakeBox) -> None:
    box = await make_box(policy=ASKED)
    asking = asyncio.create_task(box.exec([PYTHON, "-c", ASK]))
    (question,) = await held(box)
    answer(box, question, Verdict.KILL, reason="enough")
    with pytest.raises(SandboxClosed, match="enough"):
        await asking
    assert "enough" in await box.wait_ended()


async def test_no_answer_in_time_means_no(make_box: MakeBox) -> None:
    box = await make_box(policy=replace(ASKED, approvals=Approvals(timeout=0.3)))
    result = await box.exec([PYTHON, "-c", ASK])
    assert result.exit_code == 1 and b"PermissionError" in result.stderr
    assert queue_of(box).held == 0
    with pytest.raises(RequestError, match="nobody answered in time"):
        queue_of(box).answer(1, Verdict.ALLOW, "the test")


async def test_for_the_session_nobody_is_asked_again(make_box: MakeBox) -> None:
    box = await make_box(policy=ASKED)
    asking = asyncio.create_task(box.exec([PYTHON, "-c", ASK]))
    (question,) = await held(box)
    answer(box, question, Verdict.ALLOW, scope=Scope.SESSION)
    assert (await asking).stdout == b"0\n"
    assert (await box.exec([PYTHON, "-c", f"{ASK}; {ASK}"])).stdout == b"0\n0\n"
    assert queue_of(box).held == 0


# ---- calls that the supervisor makes ----

CONNECT = """
import errno, os, socket, sys
server = socket.create_server(("127.0.0.1", 0))
server.settimeout(0.5)
client = socket.socket()
if "nonblocking" in sys.argv:
    client.setblocking(False)
print("connect", errno.errorcode.get(client.connect_ex(server.getsockname()), "DONE"), flush=True)
try:
    arrived = 0
    while True:
        connection, _ = server.accept()
        arrived += 1
        client.setblocking(True)
        client.sendall(b"hello")
        print("heard", connection.recv(5).decode())
except OSError:
    print("arrived", arrived)
"""


@pytest.mark.parametrize("mode", ["blocking", "nonblocking"])
async def test_an_approved_connection_is_made(make_box: MakeBox, mode: str) -> None:
    box = await make_box(policy=LOOPBACK)
    asking = asyncio.create_task(box.exec([PYTHON, "-c", CONNECT, mode]))
    (question,) = await held(box)
    assert question.action.kind is Kind.NET_CONNECT and str(question.action.subject).startswith("127.0.0.1:")
    answer(box, question, Verdict.ALLOW)
    words = (await asking).stdout.decode().split()
    assert words[1] in (("DONE",) if mode == "blocking" else ("DONE", "EINPROGRESS"))
    assert words[2:] == ["heard", "hello", "arrived", "1"]


@pytest.mark.parametrize("mode", ["blocking", "nonblocking"])
async def test_a_denied_connection_is_not_made(make_box: MakeBox, mode: str) -> None:
    box = await make_box(policy=LOOPBACK)
    asking = asyncio.create_task(box.exec([PYTHON, "-c", CONNECT, mode]))
    (question,) = await held(box)
    answer(box, question, Verdict.DENY)
    assert (await asking).stdout.decode().split() == ["connect", "EACCES", "arrived", "0"]


# ---- signals and death ----

SIGNALS = """
import errno, os, signal, socket, sys, time
count = 0
def handler(*_):
    global count
    count += 1
signal.signal(signal.SIGALRM, handler)
signal.siginterrupt(signal.SIGALRM, "restart" not in sys.argv)
server = socket.create_server(("127.0.0.1", 0))
client = socket.socket()
signal.setitimer(signal.ITIMER_REAL, 0.002, 0.002)
if "connect" in sys.argv:
    got = errno.errorcode.get(client.connect_ex(server.getsockname()), "DONE")
else:
    try:
        got = os.getpriority(os.PRIO_PROCESS, 0)
    except OSError as error:
        got = errno.errorcode[error.errno]
while not count:
    time.sleep(0.01)
signal.setitimer(signal.ITIMER_REAL, 0)
server.settimeout(0.3)
arrived = 0
try:
    while server.accept():
        arrived += 1
except OSError:
    print(got, arrived)
"""


@pytest.mark.parametrize("restart", ["restart", "interrupt"])
@pytest.mark.parametrize(("call", "outcome"), [("getpriority", "0 0"), ("connect", "DONE 1")])
async def test_signals_neither_lose_nor_double_a_held_call(
    make_box: MakeBox, call: str, outcome: str, restart: str
) -> None:
    """Without WAIT_KILLABLE_RECV each of the signals would make the kernel file the call anew, or fail it by EINTR."""
    box = await make_box(policy=replace(ASKED, network=LOOPBACK.network))
    asking = asyncio.create_task(box.exec([PYTHON, "-c", SIGNALS, call, restart]))
    (question,) = await held(box)
    await asyncio.sleep(0.3)  # some hundred signals
    assert queue_of(box).waiting() == (question,)
    answer(box, question, Verdict.ALLOW)
    result = await asking
    assert result.stdout.decode().strip() == outcome, result.stderr
    records = [one for one in box.core.supervision.recent.all() if one.action.kind is question.action.kind]
    assert len(records) == 1 and records[0].count == 1


async def start(box: Sandbox, code: str, *words: str) -> Process:
    return await box.start_process([PYTHON, "-c", code, *words])


async def test_a_caller_that_dies_withdraws_its_question(make_box: MakeBox) -> None:
    box = await make_box(policy=ASKED)
    process = await start(box, ASK)
    (question,) = await held(box)
    process.signal(signal.SIGKILL)
    await process.wait()
    await until(lambda: queue_of(box).held == 0)
    with pytest.raises(RequestError, match="gone before the answer"):
        answer(box, question, Verdict.ALLOW)
    (decision,) = [one for one in box.core.supervision.recent.all() if one.action == question.action]
    assert decision.verdict is Verdict.DENY and decision.answered_by == "nobody"
    asking = asyncio.create_task(box.exec([PYTHON, "-c", ASK]))
    (question,) = await held(box)
    answer(box, question, Verdict.ALLOW)
    assert (await asking).stdout == b"0\n"


async def test_a_caller_whose_other_thread_ends_the_process_withdraws_its_question(make_box: MakeBox) -> None:
    box = await make_box(policy=ASKED)
    # Through ctypes, which lets other threads of Python run meanwhile.
    code = (
        "import ctypes, os, threading; threading.Timer(0.3, os._exit, [3]).start(); ctypes.CDLL(None).getpriority(0, 0)"
    )
    result = await box.exec([PYTHON, "-c", code])
    assert (result.exit_code, result.stdout) == (3, b"")
    await until(lambda: queue_of(box).held == 0)


async def test_a_command_out_of_time_withdraws_its_question(make_box: MakeBox) -> None:
    box = await make_box(policy=ASKED)
    result = await box.exec([PYTHON, "-c", ASK], timeout=0.5)
    assert result.timed_out and result.stdout == b""
    await until(lambda: queue_of(box).held == 0)


async def test_a_sandbox_ends_with_what_it_holds(make_box: MakeBox) -> None:
    box = await make_box(policy=ASKED)
    asking = asyncio.create_task(box.exec([PYTHON, "-c", ASK]))
    (question,) = await held(box)
    queue = queue_of(box)
    await box.close()
    with pytest.raises(SandboxClosed):
        await asking
    assert queue.held == 0
    with pytest.raises(RequestError, match="not held"):
        queue.answer(question.number, Verdict.ALLOW, "the test")


# ---- many ----

MANY = r"""
#include <errno.h>
#include <pthread.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/resource.h>
#include <sys/syscall.h>
#include <sys/wait.h>
#include <unistd.h>

static int done, refused, strange;

static int ask(void) {
    long got = syscall(SYS_getpriority, PRIO_PROCESS, 0);  /* the system call itself gives 20 - nice */
    return got == 20 ? 0 : got == -1 && errno == EPERM ? 1 : 2;
}

static void *one(void *nothing) {
    int got = ask();
    __sync_fetch_and_add(got == 0 ? &done : got == 1 ? &refused : &strange, 1);
    return NULL;
}

int main(int argc, char **argv) {
    int count = atoi(argv[2]);
    if (strcmp(argv[1], "threads") == 0) {
        pthread_t *threads = calloc(count, sizeof *threads);
        pthread_attr_t small;
        pthread_attr_init(&small);
        pthread_attr_setstacksize(&small, 65536);
        for (int i = 0; i < count; i++)
            if (pthread_create(&threads[i], &small, one, NULL) != 0)
                return 9;
        for (int i = 0; i < count; i++)
            pthread_join(threads[i], NULL);
    } else {
        for (int i = 0; i < count; i++) {
            pid_t child = fork();
            if (child < 0)
                return 9;
            if (child == 0)
                _exit(ask());
        }
        for (int i = 0, status; i < count && wait(&status) > 0; i++) {
            int got = WIFEXITED(status) ? WEXITSTATUS(status) : 2;
            *(got == 0 ? &done : got == 1 ? &refused : &strange) += 1;
        }
    }
    printf("%d %d %d\n", done, refused, strange);
    return 0;
}
"""


@pytest.mark.parametrize("what", ["threads", "processes"])
async def test_thousands_of_held_calls_are_all_answered(make_box: MakeBox, compile_c: Compile, what: str) -> None:
    count = 2000
    program = compile_c(MANY, "many")
    box = await make_box(policy=ASKED)
    asking = asyncio.create_task(box.exec([program, what, str(count)]))
    before = len(os.listdir("/proc/self/fd"))
    questions = await held(box, count)
    assert len({question.number for question in questions}) == count
    # Not one for each: ordinary users may have 1024 in all, and others need them.
    assert len(os.listdir("/proc/self/fd")) <= before + 100
    assert (await box.exec(["echo", "on"])).stdout == b"on\n"
    for question in questions:
        answer(box, question, Verdict.ALLOW if question.number % 2 else Verdict.DENY)
    result = await asking
    assert result.stdout == b"%d %d 0\n" % (count / 2, count / 2), result
    verdicts = Counter(one.verdict for one in box.core.supervision.recent.all() if one.held)
    assert verdicts == {Verdict.ALLOW: count // 2, Verdict.DENY: count // 2}


async def test_one_answer_for_the_session_wakes_thousands(make_box: MakeBox, compile_c: Compile) -> None:
    program = compile_c(MANY, "many")
    box = await make_box(policy=ASKED)
    asking = asyncio.create_task(box.exec([program, "threads", "2000"]))
    question, *_ = await held(box, 2000)
    answer(box, question, Verdict.ALLOW, scope=Scope.SESSION)
    assert (await asking).stdout == b"2000 0 0\n"


async def test_thousands_of_held_calls_die_with_their_callers(make_box: MakeBox, compile_c: Compile) -> None:
    program = compile_c(MANY, "many")
    box = await make_box(policy=ASKED)
    process = await box.start_process([program, "threads", "2000"])
    await held(box, 2000)
    process.signal(signal.SIGKILL)
    await process.wait()
    await until(lambda: queue_of(box).held == 0)
    assert (await box.exec(["echo", "on"])).stdout == b"on\n"


# ---- programs ----

PROGRAMS = Policy(
    process=Processes(allow=(ExecRule("/**"),), ask=(ExecRule("/tmp/good"),), deny=(ExecRule("/tmp/evil"),))
)

# What is approved is /tmp/good. While it is held, the parent tries to have something else run in its place.
SWAP = r"""
import ctypes, mmap, os, sys
for name in ("good", "evil"):
    with open(f"/tmp/{name}", "w") as file:
        file.write(f"#!/bin/sh\necho {name}\n")
    os.chmod(f"/tmp/{name}", 0o755)
path = ctypes.create_string_buffer(b"/tmp/good")
if "mapping" in sys.argv:  # its pages are the file's until they are written to
    with open("/tmp/path", "wb") as file:
        file.write(b"/tmp/good".ljust(4096, b"\0"))
    with open("/tmp/path", "r+b") as file:
        mapped = mmap.mmap(file.fileno(), 4096, mmap.MAP_PRIVATE, mmap.PROT_READ | mmap.PROT_WRITE)
    path = (ctypes.c_char * 4096).from_buffer(mapped)
argv = (ctypes.c_char_p * 2)(b"good", None)
child = os.fork()
if child == 0:
    ctypes.CDLL(None).execve(path, argv, None)
    os._exit(8)
sys.stdin.readline()
if "memory" in sys.argv:
    try:
        with open(f"/proc/{child}/mem", "r+b", buffering=0) as memory:
            memory.seek(ctypes.addressof(path))
            memory.write(b"/tmp/evil")
    except OSError:
        pass
elif "mapping" in sys.argv:
    with open("/tmp/path", "r+b") as file:
        file.write(b"/tmp/evil")
elif "rename" in sys.argv:
    os.rename("/tmp/evil", "/tmp/good")
elif "content" in sys.argv:
    with open("/tmp/good", "w") as file:
        file.write("#!/bin/sh\necho evil\n")
elif "pages" in sys.argv:  # which leaves the times of a file in memory as they are
    with open("/tmp/good", "r+b") as file, mmap.mmap(file.fileno(), 0) as shared:
        shared[:] = shared[:].replace(b"good", b"evil")
print("ready", flush=True)
print("exit", os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]))
"""


@pytest.mark.parametrize("how", ["nothing", "memory", "mapping", "rename", "content", "pages"])
async def test_what_was_approved_is_what_runs(make_box: MakeBox, how: str) -> None:
    """Whatever is done meanwhile: what was shown runs, or nothing does."""
    box = await make_box(policy=PROGRAMS)
    process = await start(box, SWAP, how)
    (question,) = await held(box)
    assert isinstance(question.action.subject, Program) and question.action.subject.path == "/tmp/good"
    assert question.opinion.rule == "process.ask[0]"
    await process.write(b"go\n")
    output = b""
    while b"ready" not in output:
        output += await process.stdout.read(4096)
    answer(box, question, Verdict.ALLOW)
    while part := await process.stdout.read(4096):
        output += part
    assert b"evil" not in output, output
    if how == "nothing":
        assert b"good" in output and b"exit 0" in output
    await process.wait()


def overwrite(box: Sandbox, path: str, content: bytes) -> None:
    """Changes a file of the layer through a mapping, which in the end leaves its times as they are."""
    with open(f"/proc/self/fd/{box.core.root_fd}{path}", "r+b") as file, mmap.mmap(file.fileno(), 0) as shared:
        shared[:] = shared[:]  # the first write to a page is the one that counts
        before = os.fstat(file.fileno())
        shared[:] = content.ljust(len(shared), b"\n")
        assert os.fstat(file.fileno()).st_ctime_ns == before.st_ctime_ns


async def approve_for_the_session(box: Sandbox) -> None:
    running = asyncio.create_task(box.exec(["/tmp/good"]))
    (question,) = await held(box)
    answer(box, question, Verdict.ALLOW, scope=Scope.SESSION)
    assert (await running).stdout == b"good\n"


async def test_an_approval_for_the_session_is_for_this_content_until_it_runs(
    make_box: MakeBox, monkeypatch: pytest.MonkeyPatch
) -> None:
    """It is there at once, but the file was hashed before, and may be another by then."""
    box = await make_box(policy=PROGRAMS)
    await box.write_file("/tmp/good", b"#!/bin/sh\necho good\n", mode=0o755)
    await approve_for_the_session(box)
    assert (await box.exec(["/tmp/good"])).stdout == b"good\n"
    decide = _Attempt._decide

    def change_and_decide(attempt: _Attempt, index: int) -> None:
        overwrite(box, "/tmp/good", b"#!/bin/sh\necho evil\n")
        decide(attempt, index)

    monkeypatch.setattr(_Attempt, "_decide", change_and_decide)
    with pytest.raises(ExecError):
        await box.exec(["/tmp/good"])
    monkeypatch.undo()
    last = box.core.supervision.recent.all()[-1]
    assert last.verdict is Verdict.DENY and "something else was put in the place" in last.reason
    assert queue_of(box).held == 0


async def test_an_approval_for_the_session_is_for_this_interpreter(make_box: MakeBox, compile_c: Compile) -> None:
    """Who may replace what runs a script may have it do anything."""
    box = await make_box(policy=PROGRAMS)
    says = '#include <unistd.h>\nint main(void) { write(1, "%s\\n", 5); }'
    good, evil = (Path(compile_c(says % word, word)).read_bytes() for word in ("good", "evil"))
    assert len(good) == len(evil)
    await box.write_file("/tmp/runs", good, mode=0o755)
    await box.write_file("/tmp/good", b"#!/tmp/runs\n", mode=0o755)
    await approve_for_the_session(box)
    assert (await box.exec(["/tmp/good"])).stdout == b"good\n"
    overwrite(box, "/tmp/runs", evil)
    running = asyncio.create_task(box.exec(["/tmp/good"]))
    (question,) = await held(box)
    subject = question.action.subject
    assert isinstance(subject, Program) and subject.interpreter_digest == hashlib.sha256(evil).hexdigest()
    overwrite(box, "/tmp/runs", good)  # and a person's answer is for what was shown
    answer(box, question, Verdict.ALLOW)
    with pytest.raises(ExecError):
        await running


async def test_a_question_that_follows_an_answer_is_withdrawn_with_its_caller(
    make_box: MakeBox, workspace: Path
) -> None:
    """The interpreter of a script is a script, too: each is decided on its own."""
    rules = Processes(allow=(ExecRule("/**"),), ask=(ExecRule(os.path.realpath("/bin/sh")),))
    box = await make_box(policy=Policy(process=rules))
    await box.write_file(f"{workspace}/inner", b"#!/bin/sh\n", mode=0o755)
    await box.write_file(f"{workspace}/outer", f"#!{workspace}/inner\n".encode(), mode=0o755)
    process = await start(box, f"import os; os.execv('{workspace}/outer', ['outer'])")
    (question,) = await held(box)
    assert isinstance(question.action.subject, Program) and question.action.subject.path == f"{workspace}/inner"
    process.signal(signal.SIGKILL)
    await process.wait()
    await until(lambda: queue_of(box).held == 0)


# ---- freezing ----

CLOCK = """
import time
while True:
    with open("/tmp/clock", "w") as file:
        file.write(str(time.monotonic_ns()))
    time.sleep(0.001)
"""


async def clock_goes(box: Sandbox) -> bool:
    """Whether a process inside goes on: what it writes changes. Looked at from outside, in the layer."""
    with closing(box.files()) as files:
        before = files.read("/tmp/clock")
        for _ in range(100):
            await asyncio.sleep(0.005)
            if files.read("/tmp/clock") != before:
                return True
    return False


async def settled(box: Sandbox, goes: bool) -> None:
    for _ in range(50):
        if await clock_goes(box) is goes:
            return
    raise AssertionError(f"the sandbox {'stands still' if goes else 'goes on'}")


@pytest.mark.parametrize("verdict", [Verdict.ALLOW, Verdict.DENY])
async def test_where_the_policy_says_so_all_stands_still_while_something_is_held(
    make_box: MakeBox, verdict: Verdict
) -> None:
    box = await make_box(policy=replace(ASKED, approvals=Approvals(freeze=True)))
    await start(box, CLOCK)
    await until(lambda: os.path.exists(f"/proc/self/fd/{box.core.root_fd}/tmp/clock"))
    await settled(box, True)
    for _ in range(2):
        asking = asyncio.create_task(box.exec([PYTHON, "-c", ASK]))
        (question,) = await held(box)
        await settled(box, False)
        assert not asking.done()
        answer(box, question, verdict)
        assert (await asking).exit_code == (0 if verdict is Verdict.ALLOW else 1)
        await settled(box, True)


async def test_where_the_policy_does_not_say_so_nothing_stands_still(make_box: MakeBox) -> None:
    box = await make_box(policy=ASKED)
    await start(box, CLOCK)
    await until(lambda: os.path.exists(f"/proc/self/fd/{box.core.root_fd}/tmp/clock"))
    asking = asyncio.create_task(box.exec([PYTHON, "-c", ASK]))
    (question,) = await held(box)
    await settled(box, True)
    answer(box, question, Verdict.ALLOW)
    await asking


async def test_a_frozen_sandbox_thaws_when_time_is_over(make_box: MakeBox) -> None:
    box = await make_box(policy=replace(ASKED, approvals=Approvals(timeout=0.5, freeze=True)))
    result = await box.exec([PYTHON, "-c", ASK])
    assert result.exit_code == 1 and b"PermissionError" in result.stderr


async def test_an_operator_can_freeze_what_holds_a_call(make_box: MakeBox) -> None:
    box = await make_box(policy=ASKED)
    asking = asyncio.create_task(box.exec([PYTHON, "-c", ASK]))
    (question,) = await held(box)
    await box.freeze()
    answer(box, question, Verdict.ALLOW)
    await box.thaw()
    assert (await asking).stdout == b"0\n"


# ---- from another terminal ----


@pytest.fixture
def cli(tmp_path: Path, workspace: Path) -> Iterator[CommandLine]:
    with adopting_orphans():
        yield CommandLine(tmp_path, workspace)


def pending(cli: CommandLine, count: int = 1) -> list[dict[str, object]]:
    found: list[dict[str, object]] = []

    def come() -> bool:
        found[:] = json.loads(cli("pending", "--json").stdout)
        return len(found) == count

    assert wait_until(come, PATIENCE), found
    return found


@pytest.fixture
def policy_file(tmp_path: Path) -> str:
    path = tmp_path / "policy.yaml"
    path.write_text("syscalls:\n  ask: [getpriority]\n")
    return str(path)


def test_another_terminal_approves(cli: CommandLine, policy_file: str) -> None:
    run = cli.start("run", "--policy", policy_file, "--", PYTHON, "-c", ASK)
    (one,) = pending(cli)
    assert one["action"] == "kernel.getpriority" and one["rule"] == "syscalls.ask[0]" and one["exec"] == 1
    assert one["argv"] == [PYTHON, "-c", ASK]
    text = cli("pending").stdout.decode()
    assert str(one["id"]) in text and "kernel.getpriority" in text and "syscalls.ask[0]" in text
    done = cli("approve", str(one["id"]), "--reason", "it is harmless")
    assert (done.returncode, done.stdout.decode()) == (0, f"approved {one['id']}: kernel.getpriority\n"), done.stderr
    out, err = run.communicate(timeout=PATIENCE)
    assert (run.returncode, out) == (0, b"0\n"), err
    late = cli("approve", str(one["id"]))
    assert late.returncode == 125 and b"no live sandbox" in late.stderr
    assert cli("pending").stdout == b"nothing is held\n"


def test_another_terminal_denies(cli: CommandLine, policy_file: str) -> None:
    code = f"import os\ntry: {ASK[11:]}\nexcept PermissionError: print('no', flush=True); os.read(0, 1)"
    run = cli.start("run", "--policy", policy_file, "--", PYTHON, "-c", code)
    (one,) = pending(cli)
    done = cli("deny", str(one["id"]), "--reason", "no")
    assert (done.returncode, done.stdout.decode()) == (0, f"denied {one['id']}: kernel.getpriority\n"), done.stderr
    assert run.stdout is not None and run.stdout.readline() == b"no\n"
    late = cli("approve", str(one["id"]))
    assert late.returncode == 125 and b"this action is not held: it was answered (deny) by" in late.stderr
    run.communicate(b"x", timeout=PATIENCE)
    assert run.returncode == 0


def test_another_terminal_kills(cli: CommandLine, policy_file: str) -> None:
    run = cli.start("run", "--policy", policy_file, "--", PYTHON, "-c", ASK)
    (one,) = pending(cli)
    assert cli("deny", "--kill", str(one["id"])).returncode == 0
    _, err = run.communicate(timeout=PATIENCE)
    assert run.returncode == 137 and b"the sandbox was ended" in err


def test_watching_shows_what_comes_and_goes(cli: CommandLine, policy_file: str) -> None:
    watch = cli.start("pending", "--watch")
    try:
        with cli.live("--policy", policy_file, "--", PYTHON, "-c", f"{ASK}; import time; time.sleep(1000)"):
            (one,) = pending(cli)
            assert watch.stdout is not None
            assert str(one["id"]).encode() in watch.stdout.readline()
            assert cli("approve", str(one["id"])).returncode == 0
            lines = iter(watch.stdout.readline, b"")
            assert any(line == f"{one['id']}  is not held any more\n".encode() for line in lines)
    finally:
        watch.send_signal(signal.SIGINT)
        _, err = watch.communicate(timeout=PATIENCE)
    assert watch.returncode == 130 and not err


# ---- from inside ----

FIND = r"""
import json, os, socket, stat, sys
found = set(sys.argv[1:])
for top, directories, files in os.walk("/"):
    if top in ("/proc", "/sys"):
        directories.clear()
        continue
    for name in files:
        path = os.path.join(top, name)
        try:
            if stat.S_ISSOCK(os.lstat(path).st_mode):
                found.add(path)
        except OSError:
            pass
for line in open("/proc/net/unix").read().splitlines()[1:]:
    words = line.split()
    if len(words) > 7:
        found.add(words[7])
heard = []
for path in found:
    for kind in (socket.SOCK_SEQPACKET, socket.SOCK_STREAM, socket.SOCK_DGRAM):
        with socket.socket(socket.AF_UNIX, kind) as s:
            s.settimeout(2)
            try:
                s.connect("\0" + path[1:] if path.startswith("@") else path)
                s.send(json.dumps({"verb": "list"}).encode())
                answer = s.recv(1000)
                if answer:
                    heard.append([path, answer.decode()])
            except OSError:
                pass
print(json.dumps({"seen": os.path.exists(sys.argv[1]), "heard": heard}))
"""


@pytest.mark.parametrize("shown", [False, pytest.param(True, marks=pytest.mark.user)], ids=["hidden", "shown"])
async def test_nothing_inside_can_answer(
    make_box: MakeBox, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, shown: bool
) -> None:
    """Not even where a policy shows the very directory of the socket and the agent has its owner's id, as the agents of
    ordinary users have. (Those of root have not, so that a policy cannot show it to them.)"""
    runtime = tmp_path / "runtime"
    runtime.mkdir(mode=0o700)
    monkeypatch.setenv("XDG_RUNTIME_DIR", str(runtime))
    victim = await make_box(policy=ASKED)
    asking = asyncio.create_task(victim.exec([PYTHON, "-c", ASK]))
    (question,) = await held(victim)
    waiting = await asyncio.to_thread(resolver.list_waiting)
    assert [one.id for one in waiting] == [f"{victim.id}-1"]
    policy = replace(ASKED, filesystem=Filesystem(read=(str(runtime),))) if shown else ASKED
    box = await make_box(policy=policy)
    _, socket_path = paths.controller_paths()
    assert os.path.exists(socket_path)
    for user in ("agent", "root") if os.geteuid() == 0 else ("agent",):
        found = json.loads((await box.exec([PYTHON, "-c", FIND, socket_path], user=user, check=True)).stdout)
        assert found["heard"] == [], (user, found)
        assert (found["seen"], shown) in ((True, True), (False, False))
    assert queue_of(victim).waiting() == (question,)
    answer(victim, question, Verdict.DENY)
    await asking
