"""Steps of real processes: what an agent's children, threads, daemons and its own writes are put down to.

The test says what a model broker would say (``asked``, ``answered``), with the origin that the agent has in the
records. Actors make a call with a number that nobody else uses, which is refused and recorded.
"""

from __future__ import annotations

import asyncio
import json
from collections.abc import AsyncIterator, Callable
from dataclasses import replace
from pathlib import Path

import pytest

from corral.actions import Content, Decision, File, Kind, Origin, Program, ToolCall
from corral.log.events import ExecEnded, ExecStarted, PayloadKept
from corral.log.places import open_log
from corral.monitor.steps import Cause
from corral.policy.model import Filesystem, Model, ModelApi, Policy, SnapshotWhen, Upstream
from corral.policy.model import Log as LogPolicy
from corral.sandbox.box import Sandbox
from corral.sandbox.layer import list_layers
from corral.sandbox.process import Process
from tests.contain.attacks import PYTHON
from tests.contain.conftest import MakeBox
from tests.contain.logs import events

FIRST = 900
"""The first of these numbers; there are no such calls."""
ASKING = Policy(
    filesystem=Filesystem(watch=("/**/*.watched",)),
    model=Model(upstreams=(Upstream("far", "https://model.example/v1", ModelApi.OPENAI),)),
)

# Reads what to do from its standard input, a line each, and says when it is done.
AGENT = r"""
import ctypes, json, os, subprocess, sys, threading, time
libc = ctypes.CDLL(None, use_errno=True)
def mark(number):
    libc.syscall(number, 0, 0, 0, 0, 0)
def adopted(parent):
    while os.getppid() == parent: time.sleep(0.001)
def wait_for(path):
    while not os.path.exists(path): time.sleep(0.002)
def fork(work):
    pid = os.fork()
    if pid == 0:
        work()
        os._exit(0)
    return pid
def given_away(work):
    "The grandchild of whoever calls: it works once its parent is gone."
    def middle():
        parent = os.getpid()
        fork(lambda: (adopted(parent), work()))
    os.waitpid(fork(middle), 0)
def late(path, number):
    wait_for(path)
    mark(number)
def daemon(path, number, session, seen):
    def work():
        if session: os.setsid()
        if seen: mark(seen)
        late(path, number)
    given_away(work)
def daemon_that_gives_away(path, number, session, seen):
    def work():
        if session: os.setsid()
        mark(seen)
        wait_for(path)
        given_away(lambda: mark(number))
    given_away(work)
def write(path):
    with open(path, "w") as file: file.write("x")
def write_beside(path):
    with open(path + ".new", "w") as file: file.write("x")
    os.rename(path + ".new", path)
def thread(number):
    one = threading.Thread(target=mark, args=(number,))
    one.start()
    one.join()
def run(*argv):
    subprocess.run(argv, check=False, stdout=subprocess.DEVNULL)
def together(*commands):
    how = {"shell": True, "start_new_session": True, "stdout": subprocess.DEVNULL}
    for one in [subprocess.Popen(each, **how) for each in commands]: one.wait()
kept = None
def shell(command):
    global kept
    if kept is None:
        kept = subprocess.Popen(["/bin/sh"], stdin=subprocess.PIPE, stdout=subprocess.PIPE)
    kept.stdin.write(command.encode() + b"\necho over\n")
    kept.stdin.flush()
    while kept.stdout.readline() != b"over\n": pass
def child(number): os.waitpid(fork(lambda: mark(number)), 0)
def early(path, number): fork(lambda: late(path, number))
print("ready", flush=True)
for line in sys.stdin:
    name, *arguments = json.loads(line)
    globals()[name](*arguments)
    print("done", flush=True)
"""


def call(id_: str, **arguments: object) -> ToolCall:
    return ToolCall(id_, "tool", json.dumps(arguments))


class Agent:
    """One that does what it is told, and the broker that it asks."""

    def __init__(self, box: Sandbox, process: Process) -> None:
        self.box, self.process = box, process
        self.origin = Origin("", "")
        self._next = FIRST

    async def does(self, *what: object) -> None:
        await self.process.write(json.dumps(what).encode() + b"\n")
        async with asyncio.timeout(60):
            assert await self.process.stdout.readline() == b"done\n"

    def number(self) -> int:
        """Of a call that nobody has made."""
        self._next += 1
        return self._next

    def decisions(self) -> tuple[Decision, ...]:
        self.box.core.supervision.flush()
        return self.box.core.supervision.recent.all()

    async def found(self, wanted: Callable[[Decision], bool]) -> Cause:
        """What the last such action was put down to, once there is one."""
        async with asyncio.timeout(60):
            while True:
                for decision in reversed(self.decisions()):
                    if wanted(decision):
                        origin = decision.action.origin
                        return Cause(origin.step, origin.tool, origin.unexplained)
                await asyncio.sleep(0.01)

    async def made(self, number: int) -> Cause:
        return await self.found(lambda one: one.action.name == f"kernel.unknown call {number}")

    async def marks(self, how: str = "mark", *more: object) -> Cause:
        """The agent, or who it makes, makes a call."""
        number = self.number()
        await self.does(how, *more, number)
        return await self.made(number)

    def ran(self, *argv: str) -> Callable[[Decision], bool]:
        def wanted(one: Decision) -> bool:
            return isinstance(one.action.subject, Program) and one.action.subject.argv == argv

        return wanted

    def wrote(self, path: str) -> Callable[[Decision], bool]:
        def wanted(one: Decision) -> bool:
            subject = one.action.subject
            return isinstance(subject, File) and path in (subject.path, subject.other)

        return wanted

    def asks(self, conversation: str = "main") -> None:
        self.box.core.supervision.steps.asked(self.origin, conversation)

    def is_answered(self, *tools: ToolCall, conversation: str = "main") -> int:
        return self.box.core.supervision.steps.answered(
            self.origin, conversation, tools or (call("only", command="x"),)
        )

    def turn(self, *tools: ToolCall, conversation: str = "main") -> int:
        self.asks(conversation)
        return self.is_answered(*tools, conversation=conversation)


async def started(box: Sandbox) -> Agent:
    process = await box.start_process([PYTHON, "-u", "-c", AGENT])
    agent = Agent(box, process)
    async with asyncio.timeout(60):
        assert await process.stdout.readline() == b"ready\n"
    number = agent.number()
    await agent.does("mark", number)
    await agent.made(number)
    (decision,) = (one for one in agent.decisions() if one.action.name == f"kernel.unknown call {number}")
    agent.origin = decision.action.origin
    return agent


@pytest.fixture
async def agent(make_box: MakeBox) -> AsyncIterator[Agent]:
    yield await started(await make_box(policy=ASKING))


async def test_between_an_answer_and_the_next_request(agent: Agent) -> None:
    assert await agent.marks() == Cause(1, "", False)
    agent.asks()
    assert await agent.marks() == await agent.marks("thread") == await agent.marks("child") == Cause(1, "", True)
    step = agent.is_answered()
    assert step == 2
    assert await agent.marks() == await agent.marks("thread") == await agent.marks("child") == Cause(2, "only", False)
    agent.asks()
    assert await agent.marks() == Cause(1, "", True)
    assert agent.is_answered() == 3
    assert await agent.marks() == Cause(3, "only", False)


async def test_many_steps_in_a_moment(agent: Agent) -> None:
    """Each has its own children, though the clock does not tell them apart."""
    for _ in range(40):
        step = agent.turn()
        assert await agent.marks("child") == Cause(step, "only", False)
        agent.asks()
        assert await agent.marks("child") == Cause(1, "", True)


@pytest.mark.parametrize(("has_session", "is_seen"), [(False, False), (False, True), (True, False), (True, True)])
async def test_a_daemon_stays_in_its_step(agent: Agent, has_session: bool, is_seen: bool) -> None:
    first, number = agent.turn(), agent.number()
    seen = agent.number() if is_seen else 0
    await agent.does("daemon", "/tmp/go", number, has_session, seen)
    if is_seen:
        assert await agent.made(seen) == Cause(first, "only", False)
    second = agent.turn()
    await agent.does("write", "/tmp/go")
    assert await agent.made(number) == Cause(first, "only", True)
    assert await agent.marks() == Cause(second, "only", False)


@pytest.mark.parametrize("has_session", [False, True])
async def test_whom_a_daemon_gives_away_is_not_explained(agent: Agent, has_session: bool) -> None:
    first, number, seen = agent.turn(), agent.number(), agent.number()
    await agent.does("daemon_that_gives_away", "/tmp/go", number, has_session, seen)
    assert await agent.made(seen) == Cause(first, "only", False)
    second = agent.turn()
    await agent.does("write", "/tmp/go")
    # Of what was born in a later step only the session tells from where it is; else nobody can say.
    assert await agent.made(number) == Cause(first if has_session else second, "only", True)


async def test_what_was_there_before_is_a_part_of_the_agent(agent: Agent) -> None:
    numbers = [agent.number() for _ in range(2)]
    for number in numbers:
        await agent.does("early", f"/tmp/go-{number}", number)
    step = agent.turn()
    await agent.does("write", f"/tmp/go-{numbers[0]}")
    assert await agent.made(numbers[0]) == Cause(step, "only", False)
    await agent.does("mark", agent.number())
    agent.asks()
    await agent.does("write", f"/tmp/go-{numbers[1]}")
    assert await agent.made(numbers[1]) == Cause(1, "", True)


async def test_parallel_tool_calls(agent: Agent) -> None:
    one, two, three = "sleep 0.2; ls /etc", "id -u", "id -u"
    step = agent.turn(
        call("a", command=one),
        call("b", command=two),
        call("c", command=three),
        call("d", file_path="/tmp/notes.watched"),
        call("e", file_path="/tmp/other.watched"),
    )
    await agent.does("together", one, two, three)
    assert await agent.found(agent.ran("/bin/sh", "-c", one)) == Cause(step, "a", False)
    assert await agent.found(agent.ran("ls", "/etc")) == Cause(step, "a", False)
    tools = [decision.action.origin.tool for decision in agent.decisions() if agent.ran("/bin/sh", "-c", two)(decision)]
    assert tools == ["b", "c"]
    await agent.does("write", "/tmp/notes.watched")
    assert await agent.found(agent.wrote("/tmp/notes.watched")) == Cause(step, "d", False)
    await agent.does("write_beside", "/tmp/other.watched")
    assert await agent.found(agent.wrote("/tmp/other.watched")) == Cause(step, "e", False)
    await agent.does("write", "/tmp/third.watched")
    assert await agent.found(agent.wrote("/tmp/third.watched")) == Cause(step, "", False)


async def test_conversations_at_once(agent: Agent) -> None:
    one = agent.turn(call("a", command="true one"), conversation="one")
    two = agent.turn(call("b", command="true two"), conversation="two")
    await agent.does("run", "true", "one")
    await agent.does("run", "true", "two")
    assert await agent.found(agent.ran("true", "one")) == Cause(one, "a", False)
    assert await agent.found(agent.ran("true", "two")) == Cause(two, "b", False)
    agent.asks("two")
    assert await agent.marks() == Cause(one, "a", False)


async def test_a_shell_that_is_kept(agent: Agent) -> None:
    first = agent.turn(call("a", command="id -u"))
    await agent.does("shell", "id -u")
    second = agent.turn(call("b", command="ls /etc && ls /usr"))
    await agent.does("shell", "ls /etc && ls /usr")
    await agent.does("shell", "ls /var")
    assert await agent.found(agent.ran("id", "-u")) == Cause(first, "a", False)
    assert await agent.found(agent.ran("ls", "/etc")) == Cause(second, "b", False)
    assert await agent.found(agent.ran("ls", "/usr")) == Cause(second, "b", False)
    assert await agent.found(agent.ran("ls", "/var")) == Cause(first, "a", True)


async def test_with_its_agent_a_step_ends(agent: Agent) -> None:
    step, number = agent.turn(), agent.number()
    await agent.does("daemon", "/tmp/go", number, True, 0)
    agent.process.close_stdin()
    await agent.process.wait()
    await asyncio.sleep(0.3)  # until somebody has looked whether it lives
    await agent.box.exec(["/bin/sh", "-c", "> /tmp/go"])
    assert await agent.made(number) == Cause(step, "only", True)


async def test_a_refusal_over_and_over_is_counted_by_step(agent: Agent) -> None:
    """There is a short way for a call that is refused again and again; a new step is not on it."""
    number = agent.number()
    steps = [agent.turn()]
    for _ in range(100):
        await agent.does("mark", number)
    steps.append(agent.turn())
    for _ in range(50):
        await agent.does("mark", number)
    counts = dict.fromkeys(steps, 0)
    for decision in agent.decisions():
        if decision.action.name == f"kernel.unknown call {number}":
            counts[decision.action.origin.step] += decision.count
    assert counts == {steps[0]: 100, steps[1]: 50}


@pytest.mark.usefixtures("state")
async def test_two_execs_and_their_snapshots(make_box: MakeBox) -> None:
    """An exec keeps its number and has the next step; what is kept of it is by its step."""
    keeping = replace(ASKING, filesystem=Filesystem(snapshot=SnapshotWhen.STEP))
    agent = await started(await make_box(policy=keeping))
    assert [agent.turn(), agent.turn()] == [2, 3]
    result = await agent.box.exec(["/bin/sh", "-c", "echo x > new"])
    assert result.exit_code == 0
    assert agent.turn() == 5
    ran = agent.ran("/bin/sh", "-c", "echo x > new")
    assert await agent.found(ran) == Cause(4, "", False)
    (decision,) = (one for one in agent.decisions() if ran(one))
    assert (decision.action.kind, decision.action.origin.exec) == (Kind.PROCESS_EXEC, 2)
    await agent.box.close()
    assert [layer.step for layer in list_layers() if layer.step is not None] == [0, 4]


async def test_a_log_has_the_step_of_an_exec(workspace: Path, tmp_path: Path) -> None:
    place = tmp_path / "records" / "log"
    log = open_log(place)
    keeping = replace(ASKING, log=LogPolicy(keep=((Content.TERMINAL, 3600.0),)))
    async with Sandbox(workspace, policy=keeping, log=log) as box:
        agent = await started(box)
        agent.turn()
        assert (await box.exec(["/bin/echo", "said"])).text == "said\n"
    await asyncio.to_thread(log.close)
    assert [(event.exec, event.step) for event in events(place, ExecStarted)] == [(1, 1), (2, 3)]
    assert sorted((event.exec, event.step) for event in events(place, ExecEnded)) == [(1, 1), (2, 3)]
    kept = [event.origin for event in events(place, PayloadKept)]
    assert {(origin.exec, origin.step) for origin in kept} == {(1, 1), (2, 3)}


async def test_without_a_model_nothing_changes(box: Sandbox) -> None:
    agent = await started(box)
    agent.asks()
    agent.is_answered()
    assert await agent.marks() == Cause(1, "", False)
    assert box.core.supervision._causes is None
