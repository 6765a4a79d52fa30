"""What happens in one sandbox, or to one controller, is nothing to the others: they go on meanwhile."""

from __future__ import annotations

import asyncio
import os
import signal
from collections.abc import Callable
from pathlib import Path

import pytest

from corral.actions import Verdict
from corral.approvals.queue import Question
from corral.errors import SandboxClosed
from corral.policy.model import MIB, Network, Policy, Resources, Syscalls
from corral.sandbox.box import Sandbox
from tests.contain.attacks import PRELUDE, PYTHON, inside, still_serves
from tests.contain.conftest import Compile, MakeBox
from tests.contain.test_supervisor_faults import GETPRIORITY, HOLD, LISTEN, MOUNT, PATIENCE, WORKERS, controller

ASKED = Policy(syscalls=Syscalls(ask=("getpriority",)))
LOOPBACK = Policy(network=Network(loopback=Verdict.ASK))
SLOW = 10.0
"""Seconds that a decision takes."""
WORK = f"[call({MOUNT}, 0, 0, 0, 0, 0) for _ in range(100)]; {LISTEN}"


async def until(condition: Callable[[], bool]) -> None:
    async with asyncio.timeout(PATIENCE):
        while not condition():
            await asyncio.sleep(0.005)


async def held(box: Sandbox) -> Question:
    await until(lambda: box.core.supervision.approvals.held == 1)
    (question,) = box.core.supervision.approvals.waiting()
    return question


def answer(box: Sandbox, question: Question, verdict: Verdict) -> None:
    box.core.supervision.approvals.answer(question.number, verdict, "the test")


async def test_a_decision_of_ten_seconds_keeps_its_caller_waiting_and_nobody_else(
    make_box: MakeBox, compile_c: Compile
) -> None:
    box, other = await make_box(policy=ASKED), await make_box(policy=ASKED)
    slow = await box.start_process([compile_c(WORKERS, "workers"), "1", str(GETPRIORITY)])
    question = await held(box)
    person = asyncio.create_task(asyncio.sleep(SLOW))
    for _ in range(3):
        assert list(await asyncio.gather(inside(other, WORK), inside(box, WORK))) == ["", ""]
        assert await held(box) == question
    await person
    answer(box, question, Verdict.ALLOW)
    assert await slow.stdout.read() == b"begin\nok\nall\n"
    (decision,) = [one for one in box.core.supervision.recent.all() if one.action.name == "kernel.getpriority"]
    assert decision.held >= SLOW


# ---- two controllers ----


async def test_a_sandbox_goes_on_while_another_controller_is_stopped_and_killed(
    make_box: MakeBox, tmp_path: Path, workspace: Path, compile_c: Compile
) -> None:
    program = compile_c(WORKERS, "workers")
    box = await make_box(policy=ASKED)
    with controller(tmp_path, workspace, HOLD, program, str(GETPRIORITY), ask="getpriority") as first:
        await asyncio.to_thread(first.told, "held")
        mine = await box.start_process([program, "1", str(GETPRIORITY)])
        question = await held(box)
        for which in (signal.SIGSTOP, signal.SIGKILL):
            first.process.send_signal(which)
            if which == signal.SIGSTOP:
                os.waitid(os.P_PID, first.process.pid, os.WSTOPPED | os.WNOWAIT)
            else:
                first.process.wait()
            assert await inside(box, WORK) == ""
            assert box.core.supervision.approvals.waiting() == (question,)
        # What was held there ended with its controller; what is held here has its answer.
        assert await asyncio.to_thread(first.marks) == ["begin"] * 50
        answer(box, question, Verdict.ALLOW)
        assert await mine.stdout.read() == b"begin\nok\nall\n"
    late = await make_box()
    assert await inside(late, WORK) == ""


# ---- no memory ----

NO_MEMORY = """
server = socket.create_server(("127.0.0.1", 0))
client, data = socket.socket(), b"x" * 1000
used = int(open("/proc/self/statm").read().split()[0]) * resource.getpagesize()
resource.setrlimit(resource.RLIMIT_AS, (used, used))
def connect():
    full = False
    try:
        bytes(64 << 20)
    except MemoryError:
        full = True
    answer = attempt(client.connect, server.getsockname())
    return [full, answer, attempt(client.sendmsg, [data])]
tell(connect())
"""


@pytest.mark.parametrize("verdict", [Verdict.ALLOW, Verdict.DENY])
async def test_a_held_call_of_a_process_without_memory_has_its_answer(make_box: MakeBox, verdict: Verdict) -> None:
    """Nothing is allocated in its name that would count as its own."""
    box = await make_box(policy=LOOPBACK)
    running = asyncio.create_task(inside(box, NO_MEMORY))
    answer(box, await held(box), verdict)
    assert await running == ([True, "", ""] if verdict is Verdict.ALLOW else [True, "EACCES", "EPIPE"])


OUT_OF_MEMORY = """
server = socket.create_server(("127.0.0.1", 20001))
if os.fork() == 0:
    open("/proc/self/oom_score_adj", "w").write("1000")
    threading.Thread(target=lambda: socket.socket().connect(server.getsockname()), daemon=True).start()
    while not os.path.exists("/tmp/go"):
        time.sleep(0.01)
    taken = []
    while True:
        taken.append(os.urandom(1 << 20) * 8)
server.settimeout(0.5)
print(os.waitstatus_to_exitcode(os.wait()[1]), flush=True)
try:
    server.accept()
    print("connected", flush=True)
except TimeoutError:
    print("nobody", flush=True)
"""


async def test_a_caller_that_is_killed_for_want_of_memory_takes_its_question_with_it(make_box: MakeBox) -> None:
    """By the kernel, or with its sandbox, or it ends by itself, as the limit is; and nothing comes of the call."""
    resources = Resources(memory=96 * MIB)
    box, other = await make_box(policy=Policy(network=LOOPBACK.network, resources=resources)), await make_box()
    process = await box.start_process([PYTHON, "-c", f"{PRELUDE}\n{OUT_OF_MEMORY}"])
    await held(box)
    await box.write_file("/tmp/go", b"")
    assert await inside(other, WORK) == ""
    await until(lambda: box.core.supervision.approvals.held == 0)
    said = await process.stdout.read()
    try:
        await still_serves(box)
        how, arrived = said.split()
        assert how in (b"-9", b"1") and arrived == b"nobody"  # 1: where its address space is what is limited
    except SandboxClosed:
        assert b"connected" not in said
    denied = [one for one in box.core.supervision.recent.all() if one.action.name == "net.connect"]
    assert [one.verdict for one in denied] == [Verdict.DENY]
    assert await inside(other, WORK) == ""
