"""Steps: what an action belongs to, whatever a program does to belong to something else.

Processes and time are made up here; tests/contain/test_steps.py has real ones.
"""

from __future__ import annotations

import json
import os
import signal
from dataclasses import dataclass, field

import pytest
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, precondition, rule

from corral.actions import (
    Access,
    Action,
    Decision,
    Endpoint,
    File,
    KernelCall,
    Kind,
    Origin,
    Process,
    Program,
    Subject,
    ToolCall,
    Transport,
    Verdict,
)
from corral.monitor import births, moments, opened, tracking
from corral.monitor.moments import Identity, Moment, order
from corral.monitor.records import BURST, Aggregator, Recent
from corral.monitor.steps import Cause, Descent, Execs
from corral.monitor.tracking import Tracker
from corral.monitor.wanted import MAX_TEXT, Wanted, commands_of, words_of

TICK = 100
"""Microseconds of a made-up clock tick."""


@dataclass
class World:
    """Processes that are made up, in a time that is."""

    time: int = 1_000_000
    last_pid: int = 100
    knows_last_pid: bool = True
    parents: dict[Identity, Identity | None] = field(default_factory=dict)
    execs: dict[Identity, int] = field(default_factory=dict)
    leaders: dict[Identity, Identity | None] = field(default_factory=dict)
    dead: set[Identity] = field(default_factory=set)

    def __post_init__(self) -> None:
        self.tracker = Tracker(now=self.now, lives=lambda each: each not in self.dead)

    def now(self) -> Moment:
        return Moment(self.time // TICK, self.last_pid if self.knows_last_pid else moments.UNKNOWN)

    def passes(self, ticks: int = 10) -> None:
        self.time += ticks * TICK

    def fork(self, parent: Identity | None, exec_: int = 1) -> Identity:
        """A process that nobody has seen yet."""
        self.last_pid += 1
        made = Identity(self.last_pid, self.time // TICK)
        self.parents[made] = parent
        self.execs[made] = exec_ if parent is None else self.execs[parent]
        self.leaders[made] = None if parent is None else self.leaders[parent]
        return made

    def ends(self, process: Identity) -> None:
        """Its children get another parent: the sandbox's first process."""
        self.dead.add(process)
        for each, parent in self.parents.items():
            if parent == process:
                self.parents[each] = None

    def setsid(self, process: Identity) -> None:
        self.tracker.born(self.descent(process))
        self.leaders[process] = process

    def descent(self, process: Identity) -> Descent:
        line, at = [process], self.parents[process]
        while at is not None:
            line.append(at)
            at = self.parents[at]
        return Descent(tuple(line), self.execs[process], self.leaders[process])

    def origin(self, process: Identity) -> Origin:
        made = Process(process.pid, process.pid, process.started, "/bin/x")
        return Origin("box", "box", 0, self.execs[process], made)

    def asked(self, process: Identity, conversation: str = "main") -> None:
        self.tracker.asked(self.origin(process), conversation)

    def answered(self, process: Identity, *tools: ToolCall, conversation: str = "main") -> int:
        return self.tracker.answered(self.origin(process), conversation, tools or (tool("only", command="make"),))

    def turn(self, process: Identity, *tools: ToolCall, conversation: str = "main") -> int:
        """A request, some time, and its answer; then some time."""
        self.asked(process, conversation)
        self.passes()
        step = self.answered(process, *tools, conversation=conversation)
        self.passes()
        return step

    def acts(self, process: Identity, subject: Subject | None = None) -> Cause:
        return self.tracker.cause(self.descent(process), subject or KernelCall("mount", 1, ""))[0]

    def runs(self, process: Identity, *argv: str) -> Cause:
        return self.acts(process, Program(argv[0], argv))

    def writes(self, process: Identity, path: str, other: str = "") -> Cause:
        return self.acts(process, File(path, Access.WRITE, other))

    def connects(self, process: Identity, name: str) -> Cause:
        return self.acts(process, Endpoint(Transport.TCP, "198.18.0.1", 443, name))


def tool(id_: str, **arguments: object) -> ToolCall:
    return ToolCall(id_, "tool", json.dumps(arguments))


@pytest.fixture
def world() -> World:
    made = World()
    assert made.tracker.begin(1) == 1
    return made


@pytest.fixture
def agent(world: World) -> Identity:
    made = world.fork(None)
    world.passes()
    return made


# ---- numbers ----


def test_execs_and_answers_share_one_row_of_numbers(world: World, agent: Identity) -> None:
    assert [world.turn(agent), world.tracker.begin(2), world.turn(agent), world.tracker.next()] == [2, 3, 4, 5]
    assert [world.tracker.of_exec(number) for number in (1, 2, 3)] == [1, 3, 0]


def test_without_a_model_a_step_is_an_exec() -> None:
    steps = Execs()
    assert [steps.begin(1), steps.begin(2), steps.of_exec(2), steps.next()] == [1, 2, 2, 3]
    origin = Origin("box", "box", 2, 2)
    assert steps.cause_of(origin) is origin


def test_before_anybody_asks_it_is_the_exec(world: World, agent: Identity) -> None:
    assert world.acts(agent) == Cause(1, "", False)
    assert world.acts(world.fork(agent)) == Cause(1, "", False)


# ---- one conversation ----


def test_what_is_done_between_an_answer_and_the_next_request(world: World, agent: Identity) -> None:
    world.asked(agent)
    world.passes()
    assert world.acts(agent) == Cause(1, "", True)
    first = world.answered(agent)
    world.passes()
    child = world.fork(agent)
    assert world.acts(agent) == world.acts(child) == Cause(first, "only", False)
    world.asked(agent)
    assert world.acts(agent) == Cause(1, "", True)
    assert world.acts(child) == Cause(first, "only", True)
    world.passes()
    second = world.answered(agent)
    assert world.acts(agent) == Cause(second, "only", False)
    assert world.acts(child) == Cause(first, "only", True)


def test_an_answer_without_tools_opens_nothing(world: World, agent: Identity) -> None:
    world.turn(agent)
    world.asked(agent)
    world.passes()
    assert world.acts(agent) == world.acts(world.fork(agent)) == Cause(1, "", True)


def test_who_is_seen_late_belongs_to_its_birth(world: World, agent: Identity) -> None:
    first = world.turn(agent)
    child = world.fork(agent)
    world.passes()
    world.turn(agent)
    assert world.acts(child) == Cause(first, "only", True)


def test_who_is_born_while_nothing_is_open_stays_unexplained(world: World, agent: Identity) -> None:
    world.turn(agent)
    world.asked(agent)
    world.passes()
    child = world.fork(agent)
    world.passes()
    world.answered(agent)
    assert world.acts(child) == world.runs(child, "make") == Cause(1, "", True)


def test_a_part_of_the_agent_is_the_agent(world: World, agent: Identity) -> None:
    """A server of tools that it has started before it asked for the first time."""
    helper = world.fork(agent)
    world.passes()
    step = world.turn(agent)
    assert world.acts(helper) == Cause(step, "only", False)
    assert world.acts(world.fork(helper)) == Cause(step, "only", False)
    world.asked(agent)
    assert world.acts(helper) == Cause(1, "", True)


def test_who_was_there_before_the_agent_is_the_execs(world: World) -> None:
    shell = world.fork(None)
    agent = world.fork(shell)
    world.passes()
    world.turn(agent)
    assert world.acts(shell) == Cause(1, "", False)
    sibling = world.fork(shell)
    world.asked(agent)
    world.passes()
    assert world.acts(world.fork(shell)) == Cause(1, "", True)  # but not what it starts while nothing is open
    assert world.acts(sibling) == Cause(2, "only", True)


def test_another_exec_is_explained_by_itself(world: World, agent: Identity) -> None:
    world.turn(agent)
    assert world.tracker.begin(2) == 3
    assert world.acts(world.fork(None, 2)) == Cause(3, "", False)


# ---- daemons, orphans ----


def test_a_daemon_stays_in_the_step_it_was_born_in(world: World, agent: Identity) -> None:
    first = world.turn(agent)
    middle = world.fork(agent)
    world.setsid(middle)
    daemon = world.fork(middle)
    world.ends(middle)
    assert world.acts(daemon) == Cause(first, "only", False)
    world.turn(agent)
    assert world.acts(daemon) == Cause(first, "only", True)


def test_an_orphan_that_nobody_has_seen_belongs_to_its_birth(world: World, agent: Identity) -> None:
    first = world.turn(agent)
    middle = world.fork(agent)
    orphan = world.fork(middle)
    world.ends(middle)
    world.turn(agent)
    assert world.acts(orphan) == Cause(first, "only", True)


def test_what_a_daemon_starts_later_is_not_explained(world: World, agent: Identity) -> None:
    first = world.turn(agent)
    daemon = world.fork(agent)
    world.setsid(daemon)
    world.turn(agent, tool("a", command="git push"))
    child = world.fork(daemon)
    assert world.acts(child) == Cause(first, "only", True)
    assert world.runs(child, "curl", "evil.example") == Cause(first, "only", True)
    assert world.acts(world.fork(child)) == Cause(first, "only", True)


def test_a_second_double_fork_does_not_help(world: World, agent: Identity) -> None:
    """A daemon of an earlier step gives a grandchild away while a later one is open; the session tells."""
    first = world.turn(agent)
    daemon = world.fork(agent)
    world.setsid(daemon)
    world.turn(agent)
    middle = world.fork(daemon)
    orphan = world.fork(middle)
    world.ends(middle)
    assert world.acts(orphan) == Cause(first, "only", True)
    world.setsid(orphan)
    again = world.fork(orphan)
    world.ends(orphan)
    assert world.acts(again) == Cause(first, "only", True)


def test_an_orphan_that_somebody_from_before_could_have_given_away(world: World, agent: Identity) -> None:
    """The same without a session of its own: only what a tool call asks for is beyond doubt then."""
    first = world.turn(agent)
    daemon = world.fork(agent)
    assert world.acts(daemon) == Cause(first, "only", False)
    second = world.turn(agent, tool("a", command="(sleep 5 &)"))
    middle = world.fork(daemon)
    orphan, other = world.fork(middle), world.fork(middle)
    world.ends(middle)
    child = world.fork(orphan)
    assert world.acts(orphan).unexplained
    assert world.acts(child).unexplained
    assert world.runs(other, "curl", "evil.example").unexplained
    middle = world.fork(agent)
    sleeper = world.fork(middle)
    world.ends(middle)
    assert world.runs(sleeper, "sleep", "5") == Cause(second, "a", False)
    for each in (daemon, orphan, other, child, sleeper):
        world.ends(each)
    world.tracker.look_after()
    last = world.fork(None)
    assert not world.acts(last).unexplained


def test_who_gives_somebody_away_and_ends(world: World, agent: Identity) -> None:
    """What counts is who lived when the orphan was born."""
    world.turn(agent)
    daemon = world.fork(agent)
    world.acts(daemon)
    second = world.turn(agent)
    world.tracker.look_after()
    middle = world.fork(daemon)
    orphan = world.fork(middle)
    world.ends(middle)
    world.ends(daemon)
    world.passes()
    world.tracker.look_after()
    assert world.acts(orphan) == Cause(second, "only", True)
    world.ends(orphan)
    world.passes()
    world.tracker.look_after()
    world.passes()
    assert world.acts(world.fork(None)) == Cause(second, "only", False)


def test_only_an_orphan_is_in_doubt(world: World) -> None:
    shell = world.fork(None)
    agent = world.fork(shell)
    world.passes()
    world.turn(agent)
    world.acts(world.fork(agent))
    step = world.turn(agent)
    assert world.acts(world.fork(shell)) == Cause(step, "only", False)
    assert world.acts(world.fork(agent)) == Cause(step, "only", False)
    assert world.acts(world.fork(None)) == Cause(step, "only", True)


def test_what_lives_in_another_exec_raises_no_doubt(world: World, agent: Identity) -> None:
    world.tracker.begin(2)
    other = world.fork(None, 2)
    world.passes()
    world.turn(other)
    world.acts(world.fork(other))
    world.asked(other)
    step = world.turn(agent)
    assert world.acts(world.fork(None)) == Cause(step, "only", False)


def test_doubt_is_passed_on(world: World, agent: Identity) -> None:
    world.turn(agent)
    daemon = world.fork(agent)
    world.acts(daemon)
    step = world.turn(agent, tool("a", file_path="/work/a"), tool("b", file_path="/work/b"))
    orphan = world.fork(None)
    assert world.acts(orphan) == Cause(step, "", True)
    assert world.writes(orphan, "/work/b") == Cause(step, "b", True)
    world.ends(daemon)
    world.passes()
    world.tracker.look_after()
    world.passes()
    assert world.acts(world.fork(None)).unexplained


def test_who_has_ended_too_long_ago_to_tell(world: World, agent: Identity) -> None:
    world.turn(agent)
    daemon = world.fork(agent)
    world.acts(daemon)
    world.turn(agent)
    orphan = world.fork(daemon)
    children = [world.fork(agent) for _ in range(births.MAX_ENDED + 10)]
    world.passes()
    for each in (daemon, *children):
        world.acts(each)
        world.ends(each)
        world.tracker.look_after()
    assert world.acts(orphan).unexplained


def test_looking_for_who_gives_away_is_bounded(world: World, agent: Identity) -> None:
    world.turn(agent)
    for _ in range(2000):
        child = world.fork(agent)
        world.acts(child)
        world.ends(child)
    world.turn(agent)
    assert world.acts(world.fork(None)).unexplained
    looked: list[Identity] = []

    def lives(process: Identity) -> bool:
        looked.append(process)
        return process not in world.dead

    world.tracker._lives = lives
    for _ in range(20):
        before = len(looked)
        world.tracker.look_after()
        assert len(looked) - before <= births.LOOKED_AFTER + 1
    world.passes()
    assert len(world.tracker._living) <= 1
    for _ in range(births.MAX_LIVING + 10):
        world.acts(world.fork(agent))
    before = len(looked)
    world.tracker.look_after()
    assert len(looked) - before <= tracking.LIVING + 1
    assert len(world.tracker._living) <= births.MAX_LIVING
    assert world.acts(world.fork(None)).unexplained  # too many to tell


def test_children_keep_the_step_of_a_parent_that_is_open_still(world: World, agent: Identity) -> None:
    one = world.turn(agent, tool("a", command="make -j2"), conversation="one")
    child = world.fork(agent)
    assert world.runs(child, "make", "-j2") == Cause(one, "a", False)
    world.turn(agent, tool("b", command="cc main.c"), conversation="two")
    grandchild = world.fork(child)
    assert world.runs(grandchild, "cc", "main.c") == Cause(one, "a", False)
    assert world.runs(world.fork(agent), "cc", "main.c") == Cause(3, "b", False)


def test_a_shell_that_is_kept_runs_what_later_steps_ask_for(world: World, agent: Identity) -> None:
    first = world.turn(agent, tool("a", command="ls"))
    shell = world.fork(agent)
    assert world.runs(shell, "/bin/bash", "-i") == Cause(first, "a", False)
    second = world.turn(agent, tool("b", command="grep -rn 'a b' src && make test"))
    assert world.runs(world.fork(shell), "grep", "-rn", "a b", "src") == Cause(second, "b", False)
    assert world.runs(world.fork(shell), "make", "test") == Cause(second, "b", False)
    assert world.runs(world.fork(shell), "rm", "-r", "src") == Cause(first, "a", True)


def test_a_command_that_was_found_is_nobody_elses(world: World, agent: Identity) -> None:
    """A daemon waits for a command that a tool call asks for, and runs the same."""
    first = world.turn(agent)
    daemon = world.fork(agent)
    world.acts(daemon)
    second = world.turn(agent, tool("b", command="git push origin"))
    assert world.runs(world.fork(agent), "git", "push", "origin") == Cause(second, "b", False)
    assert world.runs(world.fork(daemon), "git", "push", "origin") == Cause(first, "only", True)


# ---- ends ----


def test_with_its_asker_a_step_ends(world: World, agent: Identity) -> None:
    step = world.turn(agent)
    child = world.fork(agent)
    assert world.acts(child) == Cause(step, "only", False)
    before = world.tracker.epoch
    world.ends(agent)
    world.tracker.look_after()
    assert world.tracker.epoch != before
    assert world.acts(child) == Cause(step, "only", True)
    world.passes()
    assert world.acts(world.fork(child)) == Cause(step, "only", True)
    assert world.acts(world.fork(None)) == Cause(1, "", True)


def test_while_it_lives_a_step_is_open(world: World, agent: Identity) -> None:
    step = world.turn(agent)
    before = world.tracker.epoch
    world.tracker.look_after()
    assert (world.tracker.epoch, world.acts(agent)) == (before, Cause(step, "only", False))


# ---- several tool calls, several conversations ----


def test_tool_calls_of_one_step_are_told_apart(world: World, agent: Identity) -> None:
    step = world.turn(
        agent,
        tool("a", command="npm test", description="Run the tests"),
        tool("b", command="cd web && npm run build"),
        tool("c", file_path="/work/src/main.py", content="import os\n"),
        tool("d", url="https://docs.example/start"),
    )
    one, two, three = (world.fork(agent) for _ in range(3))
    assert world.runs(two, "/bin/bash", "-c", "-l", "eval 'cd web && npm run build' < /dev/null").tool == "b"
    assert world.runs(one, "/bin/sh", "-c", "npm test") == Cause(step, "a", False)
    assert world.runs(three, "rg", "--version") == Cause(step, "", False)
    assert world.runs(world.fork(one), "node", "jest.js") == Cause(step, "a", False)
    assert world.acts(two) == Cause(step, "b", False)
    assert world.writes(agent, "/work/src/main.py") == Cause(step, "c", False)
    assert world.writes(agent, "/work/src/tmp.123", "/work/src/main.py") == Cause(step, "c", False)
    assert world.connects(agent, "docs.example") == Cause(step, "d", False)
    assert world.connects(agent, "cs.example") == Cause(step, "", False)
    assert world.writes(agent, "/etc/passwd") == Cause(step, "", False)


def test_equal_commands_are_found_in_their_order(world: World, agent: Identity) -> None:
    world.turn(agent, *(tool(each, command="git status") for each in "abc"))
    found = [world.runs(world.fork(agent), "/bin/sh", "-c", "git status").tool for _ in range(4)]
    assert found[:3] == ["a", "b", "c"]
    assert found[3] in ("a", "b", "c")


def test_who_executes_twice_counts_once(world: World, agent: Identity) -> None:
    world.turn(agent, tool("a", command="git status"), tool("b", command="git status"))
    child = world.fork(agent)
    assert [world.runs(child, "/bin/sh", "-c", "git status").tool for _ in range(3)] == ["a"] * 3
    assert world.runs(world.fork(agent), "git", "status").tool == "b"


def test_conversations_of_one_process_are_told_apart(world: World, agent: Identity) -> None:
    one = world.turn(agent, tool("a", command="make docs"), conversation="one")
    two = world.turn(agent, tool("b", command="make test"), conversation="two")
    child, other = world.fork(agent), world.fork(agent)
    assert world.runs(child, "make", "docs") == Cause(one, "a", False)
    assert world.runs(other, "make", "test") == Cause(two, "b", False)
    assert world.acts(agent) == Cause(two, "", False)  # nothing tells: the newest
    world.asked(agent, "two")
    assert world.acts(agent) == Cause(one, "a", False)
    assert world.acts(child) == Cause(one, "a", False)
    assert world.acts(other) == Cause(two, "b", True)
    assert world.tracker.open_in(world.origin(agent), "one") == one
    assert world.tracker.open_in(world.origin(agent), "two") == 0


def test_the_same_conversation_of_two_processes_is_two(world: World, agent: Identity) -> None:
    other = world.fork(None)
    one, two = world.turn(agent), world.turn(other)
    world.asked(other)
    assert world.acts(agent) == Cause(one, "only", False)
    assert world.acts(other) == Cause(1, "", True)
    assert two > one


def test_an_agent_that_is_a_tool(world: World, agent: Identity) -> None:
    outer = world.turn(agent, tool("a", command="helper 'do it'"))
    inner = world.fork(agent)
    assert world.runs(inner, "helper", "do it") == Cause(outer, "a", False)
    step = world.turn(inner)
    assert world.acts(inner) == world.acts(world.fork(inner)) == Cause(step, "only", False)
    world.asked(inner)
    world.passes()
    assert world.acts(inner) == world.acts(world.fork(inner)) == Cause(outer, "a", False)
    world.asked(agent)
    world.passes()
    assert world.acts(inner).unexplained
    assert world.acts(world.fork(inner)).unexplained


def test_a_worker_that_executes_nothing(world: World, agent: Identity) -> None:
    step = world.turn(agent, tool("a", file_path="/work/a.py"), tool("b", file_path="/work/b.py"))
    worker = world.fork(agent)
    assert world.writes(worker, "/work/b.py") == Cause(step, "b", False)
    assert world.writes(worker, "/work/a.py") == Cause(step, "a", False)
    assert world.writes(worker, "/work/c.py") == Cause(step, "", False)


def test_a_helper_that_was_seen_before_its_agent_asked(world: World, agent: Identity) -> None:
    world.turn(agent)
    world.tracker.begin(2)
    other = world.fork(None, 2)
    helper = world.fork(other)
    assert world.acts(helper) == Cause(3, "", False)
    world.passes()
    step = world.turn(other)
    assert world.acts(helper) == Cause(step, "only", False)


def test_two_agents_of_one_exec_are_told_apart(world: World, agent: Identity) -> None:
    """Also by whom nobody knows the parent any more."""
    other = world.fork(None)
    world.setsid(agent)
    one = world.turn(agent, tool("a", command="make it so"), tool("b", command="ls -l"))
    middle = world.fork(agent)
    worker = world.fork(middle)
    assert world.acts(worker) == Cause(one, "", False)
    world.ends(middle)
    two = world.turn(other, tool("c", command="make it"))
    middle = world.fork(agent)
    orphan = world.fork(middle)
    world.ends(middle)
    assert world.acts(orphan) == Cause(one, "", False)
    assert world.runs(world.fork(worker), "make", "it") == Cause(one, "a", False)
    assert world.runs(world.fork(other), "make", "it") == Cause(two, "c", False)


# ---- connections ----


def test_a_connection_is_looked_at_anew(world: World, agent: Identity) -> None:
    origin = world.origin(agent)
    assert world.tracker.cause_of(origin) is origin
    first = world.turn(agent)
    child = world.fork(agent)
    world.acts(child)
    assert world.tracker.cause_of(origin).step == first
    second = world.turn(agent)
    now = world.tracker.cause_of(origin)
    assert (now.step, now.tool, now.unexplained, now.process) == (second, "only", False, origin.process)
    assert world.tracker.cause_of(world.origin(child)).unexplained
    unseen = world.origin(world.fork(agent))
    assert world.tracker.cause_of(unseen) is unseen


def test_who_has_no_process_asks_for_nothing(world: World) -> None:
    nobody = Origin("box", "box")
    world.tracker.asked(nobody, "main")
    assert world.tracker.answered(nobody, "main", ()) == 2
    assert world.tracker.cause_of(nobody) is nobody


# ---- the clock ----


def test_within_one_tick_the_numbers_tell(world: World, agent: Identity) -> None:
    """A fast agent has several steps in ten milliseconds."""
    steps, children = [], []
    for _ in range(5):
        world.asked(agent)
        gap = world.fork(agent)
        steps.append(world.answered(agent))
        children.append((gap, world.fork(agent)))
    for step, (gap, child) in zip(steps, children, strict=True):
        assert world.acts(child).step == step
        assert world.acts(gap) == Cause(1, "", True)


def test_numbers_that_begin_again(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(moments, "_pid_max", lambda: 32768)
    assert order(Identity(32760, 5), Moment(5, 310)) == -1
    assert order(Identity(310, 5), Moment(5, 32760)) == 1
    assert order(Identity(310, 5), Moment(5, 310)) == -1
    assert order(Identity(311, 5), Moment(5, 310)) == 1


def test_without_numbers_a_tick_is_of_both(world: World, agent: Identity) -> None:
    world.knows_last_pid = False
    world.passes()
    first = world.turn(agent)
    child = world.fork(agent)
    world.asked(agent)  # in the same tick
    assert world.acts(child) == Cause(first, "only", True)
    assert order(Identity(1, 5), Moment(5)) == 0


def test_this_moment_and_this_process() -> None:
    with open("/proc/self/stat", "rb") as file:
        me = Identity(os.getpid(), int(file.read().rpartition(b")")[2].split()[19]))
    assert order(me, moments.now()) == -1
    before = moments.now()
    child = os.fork()
    if child == 0:
        signal.pause()
    with open(f"/proc/{child}/stat", "rb") as file:
        born = Identity(child, int(file.read().rpartition(b")")[2].split()[19]))
    after = moments.now()
    try:
        assert order(born, before) >= 0
        assert order(born, after) <= 0
        if before.last_pid != moments.UNKNOWN:
            assert (order(born, before), order(born, after)) == (1, -1)
        assert moments.lives(me) and moments.lives(born)
        assert not moments.lives(born._replace(started=born.started + 1))
    finally:
        os.kill(child, 9)
        os.waitid(os.P_PID, child, os.WEXITED | os.WNOWAIT)
        assert not moments.lives(born)  # not reaped yet
        os.waitpid(child, 0)
    assert not moments.lives(born)


# ---- bounds ----


def test_open_steps_are_bounded(world: World, agent: Identity) -> None:
    steps = [world.turn(agent, conversation=str(at)) for at in range(opened.MAX_CALLS + tracking.MAX_OPEN)]
    assert len(world.tracker._open) <= tracking.MAX_OPEN
    assert len(world.tracker._steps) <= tracking.MAX_STEPS
    assert world.acts(agent).step == steps[-1]
    assert world.tracker.open_in(world.origin(agent), "0") == 0


def test_what_a_step_keeps_is_bounded(world: World, agent: Identity) -> None:
    long = "word " * 50_000
    arguments = tool("", command=long, more=[long] * 5).arguments
    world.answered(agent, *(ToolCall(str(at), "tool", arguments) for at in range(1000)))
    (step,) = world.tracker._open.values()
    assert len(step.calls) <= opened.MAX_CALLS
    assert sum(call.wanted.size for call in step.calls) <= opened.MAX_TEXTS + 3 * MAX_TEXT


def test_processes_are_bounded(world: World, agent: Identity, monkeypatch: pytest.MonkeyPatch) -> None:
    """Who makes so many that it is forgotten is known again by its birth."""
    monkeypatch.setattr(tracking, "MAX_BIRTHS", 50)
    first = world.turn(agent)
    daemon = world.fork(agent)
    world.acts(daemon)
    world.turn(agent)
    for _ in range(200):
        world.acts(world.fork(agent))
    assert len(world.tracker._births) <= 50
    assert world.acts(daemon) == Cause(first, "only", True)


def test_askers_are_bounded(world: World, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(tracking, "MAX_ASKERS", 10)
    for _ in range(100):
        client = world.fork(None)
        world.turn(client)
        world.ends(client)
    assert len(world.tracker._askers) <= 10
    assert not world.tracker._is_crowded


def test_who_is_forgotten_for_many_askers_is_not_explained(
    world: World, agent: Identity, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(tracking, "MAX_ASKERS", 10)
    helper = world.fork(agent)
    world.passes()
    world.turn(agent)
    world.acts(helper)
    for _ in range(20):
        world.turn(world.fork(None))
    assert len(world.tracker._askers) <= 10
    assert world.acts(agent).unexplained
    assert world.acts(helper).unexplained


def test_execs_are_bounded(world: World) -> None:
    for number in range(2, tracking.MAX_EXECS + 100):
        world.tracker.begin(number)
    assert len(world.tracker._execs) <= tracking.MAX_EXECS


# ---- likeness ----


@pytest.mark.parametrize("arguments", ["", "{", "[" * 100_000, "nonsense", "1" * 10_000, '"\\ud800"', "null", "{}"])
def test_arguments_may_be_anything(arguments: str) -> None:
    wanted = Wanted(ToolCall("a", "b", arguments))
    assert wanted.of_commands(commands_of(Program("/bin/ls", ("ls", "-l")))).rank == 0
    assert wanted.of_path("/work/a.txt").rank == 0


@given(st.text(max_size=200), st.lists(st.text(max_size=50), max_size=5))
def test_likeness_never_fails(arguments: str, argv: list[str]) -> None:
    wanted = Wanted(ToolCall("a", "b", arguments))
    for text in ("/", arguments, *argv):
        program = Program(text, tuple(argv))
        wanted.likeness(program, commands_of(program))
        wanted.likeness(File(text, Access.READ, arguments), ())
        wanted.likeness(Endpoint(Transport.TCP, "", 1, text), ())
    assert wanted.size <= 3 * MAX_TEXT


@given(st.lists(st.from_regex(r"[a-z./-]{4,10}", fullmatch=True), min_size=1, max_size=6))
def test_quotes_and_wrapping_do_not_matter(words: list[str]) -> None:
    command = " ".join(words)
    wanted = Wanted(ToolCall("a", "bash", json.dumps({"command": command})))
    quoted = " ".join(f"'{word}'" for word in words)
    for argv in (
        tuple(words),
        ("/bin/sh", "-c", command),
        ("bash", "-lc", f"cd /work && eval {quoted} \\\n < /dev/null"),
        ("env", "X=1", *words),
    ):
        assert wanted.of_commands(commands_of(Program(argv[0], argv))).rank > 0, argv


def test_long_commands_are_compared_by_their_beginning() -> None:
    command = "cat > notes.md << EOF\n" + "several words " * 3_000
    wanted = Wanted(ToolCall("a", "bash", json.dumps({"command": command})))
    assert wanted.of_commands(commands_of(Program("/bin/sh", ("/bin/sh", "-c", command)))).rank > 0
    assert wanted.of_commands(commands_of(Program("/bin/sh", ("/bin/sh", "-c", command[5:] + "y")))).rank > 0
    assert wanted.of_commands(commands_of(Program("/bin/sh", ("/bin/sh", "-c", "dog " + command)))).rank == 0


@pytest.mark.parametrize(
    ("argv", "command"),
    [
        (("rm", "-r", "build"), "rm -r building"),
        (("cat", "a"), "catalogue"),
        (("make", "test"), "make  latest"),
        (("ls",), "ls -l /work"),  # too little to go by
    ],
)
def test_parts_of_words_are_no_likeness(argv: tuple[str, ...], command: str) -> None:
    wanted = Wanted(tool("a", command=command))
    assert wanted.of_commands([words_of(" ".join(argv))]).rank == 0


@pytest.mark.parametrize(
    ("path", "value", "rank"),
    [
        ("/work/src/a.py", "/work/src/a.py", 3),
        ("/work/src/a.py", "/work/./src//a.py", 3),
        ("/work/src/a.py", "file:///work/src/a.py", 3),
        ("/work/src/a.py", "src/a.py", 2),
        ("/work/src/a.py", "./src/a.py", 2),
        ("/work/src/a.py", "*** Update File: src/a.py\n@@\n-x\n+y\n", 1),
        ("/work/src/a.py", "data.py", 0),
        ("/work/src/a.py", "b/a.pyc", 0),
        ("/work/src/a.py", "rc/a.py", 0 + 1),  # the name alone
        ("/work/src/a.py", "", 0),
        ("/work", ".", 0),
    ],
)
def test_paths(path: str, value: str, rank: int) -> None:
    assert Wanted(tool("a", path=value)).of_path(path).rank == rank


# ---- the records ----


def test_refusals_of_two_steps_are_counted_apart() -> None:
    recent = Recent()
    records = Aggregator(recent, clock=lambda: 0.0)
    process = Process(5, 5, 5, "/bin/x")
    for at in range(3 * BURST):
        origin = Origin("box", "box", 1 + at % 2, 1, process)
        action = Action(Kind.KERNEL, KernelCall("mount", 1, ""), origin)
        records.write(Decision(action, Verdict.DENY, "r", "", "", "policy", at + 1, 0.0))
    records.flush(everything=True)
    counts = {1: 0, 2: 0}
    for decision in recent.all():
        counts[decision.action.origin.step] += decision.count
    assert counts == {1: 3 * BURST // 2, 2: 3 * BURST // 2}


# ---- whatever happens ----


class Life(RuleBasedStateMachine):
    """One agent that asks in one conversation, and whatever its processes do: the truth is kept beside."""

    def __init__(self) -> None:
        super().__init__()
        self.world = World()
        self.world.tracker.begin(1)
        self.agent = self.world.fork(None)
        self.step: int | None = None
        """The open one."""
        self.has_asked = False
        self.born: dict[Identity, int | None] = {}
        """By process that was made since the first request: the step of that moment, or of its parent's."""

    def _alive(self) -> list[Identity]:
        return [each for each in self.born if each not in self.world.dead]

    @rule(ticks=st.integers(0, 3))
    def passes(self, ticks: int) -> None:
        self.world.passes(ticks)

    @rule()
    def asks(self) -> None:
        self.world.asked(self.agent)
        self.step, self.has_asked = None, True

    @precondition(lambda self: self.has_asked and self.step is None)
    @rule()
    def is_answered(self) -> None:
        self.step = self.world.answered(self.agent)

    @precondition(lambda self: self.has_asked)
    @rule(data=st.data(), from_agent=st.booleans())
    def forks(self, data: st.DataObject, from_agent: bool) -> None:
        alive = self._alive()
        if from_agent or not alive:
            self.born[self.world.fork(self.agent)] = self.step
            return
        parent = data.draw(st.sampled_from(alive))
        self.world.acts(parent)  # has been seen: else nobody can know of what it gives away
        child = self.world.fork(parent)
        self.world.acts(child)
        self.born[child] = self.born[parent]

    @rule(data=st.data())
    def ends(self, data: st.DataObject) -> None:
        if alive := self._alive():
            self.world.ends(data.draw(st.sampled_from(alive)))

    @rule(data=st.data())
    def leaves_its_session(self, data: st.DataObject) -> None:
        if alive := self._alive():
            self.world.setsid(data.draw(st.sampled_from(alive)))

    @invariant()
    def every_process_stays_where_it_was_born(self) -> None:
        for process in self._alive():
            step = self.born[process]
            if step is None:
                assert self.world.acts(process) == Cause(1, "", True)
            else:
                assert self.world.acts(process) == Cause(step, "only", step != self.step)


TestLife = Life.TestCase
