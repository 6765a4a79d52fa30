"""What is allowed is released when its record is safe, and not a moment before (I3)."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace

import pytest

from corral.actions import Action, Decision, Endpoint, Kind, Opinion, Origin, Program, Transport, Verdict
from corral.monitor.core import Monitor
from corral.monitor.parts import Answer, Held

CONNECT = Action(Kind.NET_CONNECT, Endpoint(Transport.TCP, "192.0.2.1", 443), Origin("box", "session"))
EXEC = Action(Kind.PROCESS_EXEC, Program("/bin/sh"), Origin("box", "session"))


class Says:
    def __init__(self, verdict: Verdict) -> None:
        self.verdict = verdict

    def judge(self, _: Action) -> Opinion:
        return Opinion(self.verdict, "rule")


class Slow:
    """A ledger whose records are safe when the test says so."""

    def __init__(self, *, at_once: bool = False, error: Exception | None = None) -> None:
        self.unawaited = frozenset({Kind.PROCESS_EXEC})
        self.written: list[Decision] = []
        self.waiting: list[Callable[[Exception | None], None]] = []
        self.at_once, self.error = at_once, error

    def write(self, decision: Decision) -> None:
        self.written.append(decision)

    def when_safe(self, callback: Callable[[Exception | None], None]) -> None:
        assert self.written, "it waits for what was never written"
        if self.at_once:
            callback(self.error)
        else:
            self.waiting.append(callback)


class Person:
    def __init__(self) -> None:
        self.answered: Callable[[Answer], None] | None = None

    def ask(self, action: Action, opinion: Opinion, answered: Callable[[Answer], None]) -> Held:
        self.answered = answered
        return self

    def withdraw(self) -> None:
        pass


class World:
    def __init__(self, verdict: Verdict, *ledgers: Slow) -> None:
        self.ledgers = ledgers
        self.decided: list[Decision] = []
        self.killed: list[str] = []
        self.person = Person()
        self.monitor = Monitor(
            policy=Says(verdict), sink=self, approvals=self.person, on_kill=self.killed.append, ledgers=ledgers
        )

    def write(self, decision: Decision) -> None:
        for ledger in self.ledgers:
            ledger.write(decision)

    def submit(self, action: Action = CONNECT) -> Held | None:
        return self.monitor.submit(action, self.decided.append)


def test_i3_what_is_allowed_waits_for_its_record() -> None:
    ledger = Slow()
    world = World(Verdict.ALLOW, ledger)
    assert world.submit() is not None
    assert (len(ledger.written), world.decided) == (1, [])
    ledger.waiting.pop()(None)
    assert world.decided == ledger.written
    assert world.killed == []


def test_i3_it_waits_for_all_of_several() -> None:
    one, other = Slow(), Slow()
    world = World(Verdict.ALLOW, one, other)
    world.submit()
    one.waiting.pop()(None)
    assert world.decided == []
    other.waiting.pop()(None)
    assert [each.verdict for each in world.decided] == [Verdict.ALLOW]


@pytest.mark.parametrize("verdict", [Verdict.DENY, Verdict.KILL])
def test_a_refusal_waits_for_nothing(verdict: Verdict) -> None:
    ledger = Slow()
    world = World(verdict, ledger)
    assert world.submit() is None
    assert [each.verdict for each in world.decided] == [verdict]
    assert len(ledger.written) == 1


def test_what_nobody_need_wait_for_goes_on_at_once() -> None:
    ledger = Slow()
    world = World(Verdict.ALLOW, ledger)
    assert world.submit(EXEC) is None
    assert len(world.decided) == len(ledger.written) == 1
    assert ledger.waiting == []


def test_a_record_that_is_safe_at_once_holds_nobody_up() -> None:
    world = World(Verdict.ALLOW, Slow(at_once=True))
    assert world.submit() is None
    assert len(world.decided) == 1


@pytest.mark.parametrize("at_once", [False, True])
def test_i3_what_will_never_be_safe_is_refused_and_ends_the_sandbox(at_once: bool) -> None:
    ledger = Slow(at_once=at_once, error=OSError(28, "No space left on device"))
    world = World(Verdict.ALLOW, ledger)
    world.submit()
    if not at_once:
        ledger.waiting.pop()(ledger.error)
    [decision] = world.decided
    assert (decision.verdict, decision.rule) == (Verdict.KILL, "record")
    [reason] = world.killed
    assert "cannot be written" in reason
    assert "No space" not in reason  # which may be anybody's words


def test_i3_one_of_several_that_fails_is_enough() -> None:
    one, other = Slow(), Slow()
    world = World(Verdict.ALLOW, one, other)
    world.submit()
    one.waiting.pop()(OSError(5, "I/O error"))
    other.waiting.pop()(None)
    assert [each.verdict for each in world.decided] == [Verdict.KILL]


def test_an_answer_of_a_person_waits_for_its_record_too() -> None:
    ledger = Slow()
    world = World(Verdict.ASK, ledger)
    world.submit()
    assert ledger.written == []
    assert world.person.answered is not None
    world.person.answered(Answer(Verdict.ALLOW, "somebody"))
    assert (len(ledger.written), world.decided) == (1, [])
    ledger.waiting.pop()(None)
    assert [each.answered_by for each in world.decided] == ["somebody"]


def test_whoever_is_gone_is_told_nothing() -> None:
    ledger = Slow()
    world = World(Verdict.ALLOW, ledger)
    held = world.submit()
    assert held is not None
    held.withdraw()
    ledger.waiting.pop()(None)
    assert world.decided == []


def test_a_failure_ends_the_sandbox_also_when_whoever_asked_is_gone() -> None:
    ledger = Slow()
    world = World(Verdict.ALLOW, ledger)
    held = world.submit()
    assert held is not None
    held.withdraw()
    ledger.waiting.pop()(OSError(5, "I/O error"))
    assert world.decided == []
    assert len(world.killed) == 1


async def test_decide_waits_too() -> None:
    world = World(Verdict.ALLOW, Slow(at_once=True))
    decision = await world.monitor.decide(CONNECT)
    assert decision == replace(world.ledgers[0].written[0])
