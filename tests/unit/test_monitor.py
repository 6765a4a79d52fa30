"""The monitor: verdicts only rise but by a grant or an answer (I6), faults deny (I2), all is recorded or ends (I3)."""

from __future__ import annotations

import asyncio
import gc
import threading
import time
import weakref
from collections.abc import Callable
from dataclasses import replace
from itertools import product
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from corral.actions import (
    Action,
    Decision,
    Endpoint,
    KernelCall,
    Kind,
    ModelCall,
    Opinion,
    Origin,
    Process,
    Request,
    Transport,
    Verdict,
)
from corral.approvals.queue import Queue, Scope
from corral.monitor.core import Monitor
from corral.monitor.parts import Answer, Held, NobodyToAsk
from corral.monitor.records import BURST, MAX_COUNTERS, PERIOD, Aggregator, Recent, Several, weigh
from corral.policy.model import Network, NetworkRule, Policy, RequestRule
from corral.policy.part import PolicyPart

ALLOW, ASK, DENY, KILL = Verdict.ALLOW, Verdict.ASK, Verdict.DENY, Verdict.KILL
SLOTS = ("policy", "behaviour", "risk", "autonomy")


def action(port: int = 80, process: Process | None = None) -> Action:
    return Action(
        Kind.NET_CONNECT, Endpoint(Transport.TCP, "192.0.2.1", port), Origin("box", "session", process=process)
    )


class Says:
    """A part with one opinion."""

    def __init__(self, verdict: Verdict, name: str = "policy", grant: str = "") -> None:
        self.opinion = Opinion(verdict, f"rule of {name}", f"reason of {name}", f"advice of {name}")
        self.grant = grant
        self.asked = 0

    def judge(self, _: Action) -> Opinion:
        return self.opinion

    def grants(self, _: Action, opinion: Opinion) -> str:
        assert opinion.verdict is ASK
        self.asked += 1
        return self.grant


class Fails:
    """A part that is broken."""

    def judge(self, _: Action) -> Opinion:
        raise ValueError("secret detail")

    def grants(self, _: Action, opinion: Opinion) -> str:
        raise ValueError("secret detail")


class Persons:
    """An approvals slot whose answers the test gives."""

    def __init__(self) -> None:
        self.asked: list[tuple[Action, Opinion, Callable[[Answer], None]]] = []
        self.withdrawn = 0

    def ask(self, asked: Action, opinion: Opinion, answered: Callable[[Answer], None]) -> Held:
        self.asked.append((asked, opinion, answered))
        return self

    def withdraw(self) -> None:
        self.withdrawn += 1


class Fixture:
    """A monitor with all that it is given, and what it has done."""

    def __init__(self, *verdicts: Verdict, grant: str = "", persons: Persons | NobodyToAsk | None = None) -> None:
        parts = [Says(verdict, name) for name, verdict in zip(SLOTS, verdicts, strict=False)]
        named: dict[str, Any] = dict(zip(SLOTS, parts, strict=False))
        if "autonomy" in named:
            named["autonomy"].grant = grant
        self.parts = named
        self.persons = persons or Persons()
        self.recent = Recent()
        self.killed: list[str] = []
        self.decided: list[Decision] = []
        self.monitor = Monitor(sink=self.recent, approvals=self.persons, on_kill=self.killed.append, **named)

    def submit(self, what: Action | None = None) -> Held | None:
        return self.monitor.submit(what or action(), self.decided.append)


# ---- combination ----


def test_the_lattice() -> None:
    assert ALLOW < ASK < DENY < KILL and len(Verdict) == 4


@pytest.mark.parametrize(
    "verdicts", list(product(Verdict, repeat=4)), ids=lambda verdicts: "-".join(v.name for v in verdicts)
)
def test_verdicts_combine_by_their_maximum(verdicts: tuple[Verdict, ...]) -> None:
    fixture = Fixture(*verdicts)
    held = fixture.submit()
    hardest = max(verdicts)
    decider = SLOTS[verdicts.index(hardest)]
    if hardest is ASK:
        persons = fixture.persons
        assert held is not None and not fixture.decided and not fixture.recent.all()
        assert isinstance(persons, Persons)
        asking = tuple(f"rule of {name}" for name, verdict in zip(SLOTS, verdicts, strict=True) if verdict is ASK)
        together = asking if len(asking) > 1 else ()
        assert persons.asked[0][1] == replace(fixture.parts[decider].opinion, asked=together)
        return
    (decision,) = fixture.decided
    assert held is None and fixture.recent.all() == (decision,)
    assert decision.verdict is hardest and decision.decider == decider
    assert (decision.rule, decision.reason) == (f"rule of {decider}", f"reason of {decider}")
    assert bool(fixture.killed) is (hardest is KILL)


@given(st.lists(st.sampled_from(Verdict), min_size=4, max_size=4), st.integers(0, 3), st.sampled_from(Verdict))
def test_a_part_can_only_raise(verdicts: list[Verdict], slot: int, said: Verdict) -> None:
    """Whatever one part says instead of "allow", the outcome is not milder."""
    answers = []
    for verdict in (ALLOW, said):
        fixture = Fixture(*(verdict if index == slot else other for index, other in enumerate(verdicts)))
        held = fixture.submit()
        answers.append(ASK if held is not None else fixture.decided[0].verdict)
    assert answers[0] <= answers[1]


@pytest.mark.parametrize("slot", range(4))
@pytest.mark.parametrize("others", [ALLOW, ASK, DENY, KILL])
def test_a_part_that_raises_denies(slot: int, others: Verdict) -> None:
    parts: dict[str, Says | Fails] = {name: Says(others, name) for name in SLOTS}
    parts[SLOTS[slot]] = Fails()
    decided: list[Decision] = []
    monitor = Monitor(sink=Recent(), approvals=Persons(), **parts)  # type: ignore[arg-type]
    assert monitor.submit(action(), decided.append) is None
    assert decided[0].verdict is max(DENY, others)
    if others < DENY:
        assert decided[0].rule == f"{SLOTS[slot]} failed" and "ValueError" in decided[0].reason
        assert "secret" not in decided[0].reason


# ---- grants and answers ----


def test_a_grant_lowers_ask_and_nothing_else() -> None:
    for verdict in Verdict:
        fixture = Fixture(verdict, ALLOW, ALLOW, ALLOW, grant="level 2")
        held = fixture.submit()
        (decision,) = fixture.decided
        assert held is None
        assert decision.verdict is (ALLOW if verdict is ASK else verdict)
        assert fixture.parts["autonomy"].asked == (verdict is ASK)
        if verdict is ASK:
            assert (decision.decider, decision.rule) == ("autonomy", "level 2")


def test_autonomy_may_ask_and_grant_but_what_others_deny_stays_denied() -> None:
    fixture = Fixture(ALLOW, DENY, ALLOW, ASK, grant="level 5")
    fixture.submit()
    assert fixture.decided[0].verdict is DENY and fixture.parts["autonomy"].asked == 0


def test_a_grant_that_raises_is_none() -> None:
    persons, decided = Persons(), list[Decision]()
    monitor = Monitor(policy=Says(ASK), autonomy=_FailingGrant(), sink=Recent(), approvals=persons)
    assert monitor.submit(action(), decided.append) is not None
    assert len(persons.asked) == 1 and not decided


class _FailingGrant(Fails):
    def judge(self, _: Action) -> Opinion:
        return Opinion(ALLOW, "")


@pytest.mark.parametrize("answer", list(Verdict))
def test_only_a_yes_allows_what_is_asked_for(answer: Verdict) -> None:
    fixture = Fixture(ASK)
    held = fixture.submit()
    persons = fixture.persons
    assert isinstance(persons, Persons)
    assert not fixture.decided and not fixture.recent.all()
    persons.asked[0][2](Answer(answer, "anna", "because"))
    (decision,) = fixture.decided
    assert decision.verdict is (DENY if answer is ASK else answer)
    assert (decision.decider, decision.answered_by, decision.reason) == ("approvals", "anna", "because")
    assert decision.rule == "rule of policy" and decision.held >= 0
    assert fixture.recent.all() == (decision,)
    assert bool(fixture.killed) is (answer is KILL)
    persons.asked[0][2](Answer(ALLOW, "bert"))  # a second answer
    assert held is not None
    held.withdraw()
    assert fixture.decided == [decision] and fixture.recent.all() == (decision,) and persons.withdrawn == 0


def test_without_persons_the_answer_is_no() -> None:
    fixture = Fixture(ASK, persons=NobodyToAsk())
    fixture.submit()
    assert fixture.decided[0].verdict is DENY and fixture.decided[0].answered_by == "nobody"
    decided: list[Decision] = []
    Monitor(policy=Says(ASK), sink=Recent()).submit(action(), decided.append)
    assert decided[0].verdict is DENY


def test_what_cannot_be_asked_is_denied() -> None:
    class Broken(Persons):
        def ask(self, asked: Action, opinion: Opinion, answered: Callable[[Answer], None]) -> Held:
            raise RuntimeError("can't start new thread")

    fixture = Fixture(ASK, persons=Broken())
    fixture.submit()
    assert fixture.decided[0].verdict is DENY and "RuntimeError" in fixture.decided[0].reason
    assert fixture.recent.all() == tuple(fixture.decided)


def test_what_is_withdrawn_is_recorded_as_a_denial_and_not_told() -> None:
    fixture = Fixture(ASK)
    held = fixture.submit()
    persons = fixture.persons
    assert held is not None and isinstance(persons, Persons)
    held.withdraw()
    held.withdraw()
    persons.asked[0][2](Answer(ALLOW, "anna"))
    assert not fixture.decided and persons.withdrawn == 1
    (decision,) = fixture.recent.all()
    assert decision.verdict is DENY and decision.answered_by == "nobody"


class Slow(Recent):
    """A ledger whose records are durable when the test says so."""

    unawaited: frozenset[Kind] = frozenset()

    def __init__(self) -> None:
        super().__init__()
        self.waiting: list[Callable[[Exception | None], None]] = []
        self.asked: Callable[[], None] | None = None

    def when_safe(self, callback: Callable[[Exception | None], None]) -> None:
        self.waiting.append(callback)
        if self.asked is not None:
            self.asked()


def test_a_persons_yes_is_durable_before_its_effect_whatever_the_kind() -> None:
    """A policy may name kinds for whose records nobody waits; who allowed something must not be lost all the same."""
    slow, persons = Slow(), Persons()
    slow.unawaited = frozenset(Kind)
    decided: list[Decision] = []
    monitor = Monitor(policy=Says(ASK), sink=slow, ledgers=(slow,), approvals=persons)
    monitor.submit(action(), decided.append)
    time.sleep(0.001)
    persons.asked[0][2](Answer(ALLOW, "anna"))
    assert not decided and len(slow.waiting) == 1
    slow.waiting[0](None)
    assert [each.verdict for each in decided] == [ALLOW]
    Monitor(policy=Says(ALLOW), sink=slow, ledgers=(slow,)).submit(action(), decided.append)
    assert len(decided) == 2 and len(slow.waiting) == 1


@pytest.mark.parametrize("when", ["after the answer", "while it is answered", "with the question"])
def test_what_is_withdrawn_while_its_record_is_written_is_not_told(when: str) -> None:
    """A person has said yes, the record is not durable yet, and the caller goes away."""

    class AtOnce(Persons):
        def ask(self, asked: Action, opinion: Opinion, answered: Callable[[Answer], None]) -> Held:
            answered(Answer(ALLOW, "anna"))
            return self

    persons = AtOnce() if when == "with the question" else Persons()
    decided: list[Decision] = []
    slow = Slow()
    monitor = Monitor(policy=Says(ASK), sink=slow, ledgers=(slow,), approvals=persons)
    held = monitor.submit(action(), decided.append)
    assert held is not None
    if when == "while it is answered":
        slow.asked = held.withdraw
    if persons.asked:
        persons.asked[0][2](Answer(ALLOW, "anna"))
    held.withdraw()
    for callback in slow.waiting:
        callback(None)
    assert len(slow.waiting) == 1
    assert not decided


@pytest.mark.parametrize("answered", [True, False])
def test_whoever_asked_is_let_go_of_with_the_answer(answered: bool) -> None:
    """Who waits for an answer has descriptors: they are not to wait for the collector of garbage, too."""
    told: list[Decision] = []

    def decided(decision: Decision) -> None:
        told.append(decision)

    queue = Queue(3600, kill=print)
    held = Monitor(policy=Says(ASK), sink=Recent(), approvals=queue).submit(action(), decided)
    assert held is not None
    alive = weakref.ref(decided)
    gc.disable()
    try:
        if answered:
            queue.answer(1, ALLOW, "anna")
        else:
            held.withdraw()
        del decided, held
        assert alive() is None
    finally:
        gc.enable()
        queue.close()
    assert len(told) == answered


def test_what_was_answered_at_once_is_not_held() -> None:
    queue = Queue(3600, kill=print)
    monitor = Monitor(policy=Says(ASK), sink=Recent(), approvals=queue)
    decided: list[Decision] = []
    assert monitor.submit(action(), decided.append) is not None
    queue.answer(1, ALLOW, "anna", scope=Scope.SESSION)
    assert monitor.submit(action(), decided.append) is None
    assert len(decided) == 2 and decided[0].held > 0 and decided[1].held == 0
    queue.close()


@pytest.mark.parametrize("full", [True, False], ids=["too many are held", "nobody is there to ask"])
def test_a_flood_of_asks_that_are_refused_at_once_is_counted(full: bool) -> None:
    """Nobody was held up by any of them: without a count, an agent would fill the records with them."""
    queue = Queue(3600, kill=print, limit=0)
    recorder = Recorder()
    monitor = Monitor(policy=Says(ASK), sink=recorder.aggregator, approvals=queue if full else NobodyToAsk())
    decided: list[Decision] = []
    for _ in range(1000):
        assert monitor.submit(action(), decided.append) is None
    recorder.aggregator.flush(everything=True)
    assert [one.verdict for one in decided] == [DENY] * 1000
    assert recorder.counts() == [1] * 16 + [984]
    queue.close()


def test_an_answer_from_another_thread_has_held_its_caller_however_early_it_is() -> None:
    class Early(Persons):
        def ask(self, asked: Action, opinion: Opinion, answered: Callable[[Answer], None]) -> Held:
            person = threading.Thread(target=answered, args=(Answer(DENY, "anna"),))
            person.start()
            person.join()
            return super().ask(asked, opinion, answered)

    fixture = Fixture(ASK, persons=Early())
    assert fixture.submit() is None
    assert fixture.decided[0].held > 0


def test_an_answer_and_a_withdrawal_at_once_have_one_outcome() -> None:
    for _ in range(200):
        fixture = Fixture(ASK)
        held = fixture.submit()
        persons = fixture.persons
        assert held is not None and isinstance(persons, Persons)
        start = threading.Barrier(2)

        def answer(persons: Persons = persons, start: threading.Barrier = start) -> None:
            start.wait()
            persons.asked[0][2](Answer(ALLOW, "anna"))

        thread = threading.Thread(target=answer)
        thread.start()
        start.wait()
        held.withdraw()
        thread.join()
        (decision,) = fixture.recent.all()
        assert fixture.decided == ([decision] if decision.verdict is ALLOW else [])
        assert persons.withdrawn == (decision.verdict is DENY)


# ---- records ----


class BrokenSink:
    def write(self, decision: Decision) -> None:
        raise OSError("disk full")


@pytest.mark.parametrize("verdict", [ALLOW, DENY, KILL])
def test_what_cannot_be_recorded_ends_the_sandbox(verdict: Verdict) -> None:
    killed: list[str] = []
    decided: list[Decision] = []
    monitor = Monitor(policy=Says(verdict), sink=BrokenSink(), on_kill=killed.append)
    monitor.submit(action(), decided.append)
    assert decided[0].verdict is KILL and not decided[0].allowed
    assert killed == ["its records cannot be written (OSError)"]


def test_an_answer_that_cannot_be_recorded_ends_the_sandbox() -> None:
    persons, killed, decided = Persons(), list[str](), list[Decision]()
    monitor = Monitor(policy=Says(ASK), sink=BrokenSink(), approvals=persons, on_kill=killed.append)
    held = monitor.submit(action(), decided.append)
    assert held is not None and not killed
    persons.asked[0][2](Answer(ALLOW, "anna"))
    assert decided[0].verdict is KILL and killed


def test_the_record_is_written_before_the_enforcer_knows() -> None:
    order: list[str] = []

    class Sink:
        def write(self, decision: Decision) -> None:
            order.append("written")

    Monitor(policy=Says(ALLOW), sink=Sink()).submit(action(), lambda _: order.append("told"))
    assert order == ["written", "told"]


def test_decisions_of_many_threads_are_numbered_without_gaps_in_the_order_of_the_record() -> None:
    written: list[int] = []

    class Sink:
        def write(self, decision: Decision) -> None:
            time.sleep(0)  # others may run
            written.append(decision.number)

    decided: list[Decision] = []
    monitor = Monitor(policy=Says(ALLOW), sink=Sink())
    threads = [
        threading.Thread(target=lambda: [monitor.submit(action(), decided.append) for _ in range(250)])
        for _ in range(8)
    ]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert written == list(range(1, 2001))
    assert sorted(decision.number for decision in decided) == list(range(1, 2001))


# ---- asyncio ----


def test_decide_waits_for_an_answer_from_another_thread() -> None:
    fixture = Fixture(ASK)
    persons = fixture.persons
    assert isinstance(persons, Persons)

    async def main() -> Decision:
        task = asyncio.create_task(fixture.monitor.decide(action()))
        while not persons.asked:
            await asyncio.sleep(0)
        threading.Thread(target=persons.asked[0][2], args=[Answer(ALLOW, "anna")]).start()
        return await task

    assert asyncio.run(main()).allowed
    assert len(fixture.recent.all()) == 1


def test_who_is_cancelled_withdraws() -> None:
    fixture = Fixture(ASK)
    persons = fixture.persons
    assert isinstance(persons, Persons)

    async def main() -> None:
        task = asyncio.create_task(fixture.monitor.decide(action()))
        while not persons.asked:
            await asyncio.sleep(0)
        task.cancel()
        with pytest.raises(asyncio.CancelledError):
            await task

    asyncio.run(main())
    assert persons.withdrawn == 1 and fixture.recent.all()[0].verdict is DENY


def test_decide_at_once() -> None:
    for verdict in (ALLOW, DENY, KILL):
        assert asyncio.run(Fixture(verdict).monitor.decide(action())).verdict is verdict


# ---- aggregation ----


class Clock:
    def __init__(self) -> None:
        self.now = 0.0

    def __call__(self) -> float:
        return self.now


def decision(verdict: Verdict = DENY, what: Action | None = None, held: float = 0.0) -> Decision:
    return Decision(what or action(), verdict, "rule", "", "", "policy", 1, 0.0, held=held)


def process(pid: int) -> Process:
    return Process(pid, pid, 1, "/bin/x")


class Recorder:
    def __init__(self) -> None:
        self.kept = Recent(1_000_000)
        self.clock = Clock()
        self.aggregator = Aggregator(self.kept, clock=self.clock)

    def counts(self) -> list[int]:
        return [kept.count for kept in self.kept.all()]


def test_a_flood_is_one_record_with_its_exact_count() -> None:
    recorder = Recorder()
    for _ in range(100_000):
        recorder.aggregator.write(decision())
    assert recorder.counts() == [1] * BURST
    recorder.clock.now += PERIOD
    recorder.aggregator.flush()
    assert recorder.counts() == [1] * BURST + [100_000 - BURST]
    recorder.aggregator.flush(everything=True)
    assert sum(recorder.counts()) == 100_000


def test_a_flood_that_goes_on_is_told_each_period_without_a_flush() -> None:
    recorder = Recorder()
    for _ in range(10):
        for _ in range(1000):
            recorder.aggregator.write(decision())
        recorder.clock.now += PERIOD
    recorder.aggregator.flush(everything=True)
    assert sum(recorder.counts()) == 10_000
    assert len(recorder.counts()) <= 10 * (BURST + 1)


def test_a_flush_before_time_writes_nothing() -> None:
    recorder = Recorder()
    for _ in range(BURST + 5):
        recorder.aggregator.write(decision())
    recorder.aggregator.flush()
    assert recorder.counts() == [1] * BURST
    recorder.aggregator.flush(everything=True)
    recorder.aggregator.flush(everything=True)
    assert recorder.counts() == [1] * BURST + [5]


def test_only_equal_refusals_of_one_process_are_counted_together() -> None:
    kinds = [
        action(1, process(1)),
        action(2, process(1)),
        action(1, process(2)),
        action(1, replace(process(1), started=2)),
        replace(action(1, process(1)), kind=Kind.NET_SEND),
        Action(Kind.KERNEL, KernelCall("mount", 1, "no"), action(1, process(1)).origin),
    ]
    recorder = Recorder()
    for what in kinds * (BURST + 3):
        recorder.aggregator.write(decision(what=what))
    recorder.aggregator.flush(everything=True)
    counted = [kept for kept in recorder.kept.all() if kept.count > 1]
    assert [kept.count for kept in counted] == [3] * len(kinds)
    assert [kept.action for kept in counted] == kinds


def test_a_brokers_refusals_by_other_rules_are_not_counted_among_a_flood() -> None:
    """Else a server of tools behind an allowed model would be one more picture that may not be fetched."""
    recorder = Recorder()
    what = Action(Kind.MODEL_CALL, ModelCall("m"), action(1, process(1)).origin)
    flood = decision(what=what)
    for _ in range(BURST + 3):
        recorder.aggregator.write(flood)
    recorder.aggregator.write(replace(flood, rule="another"))
    recorder.aggregator.write(flood)
    assert [kept.rule for kept in recorder.kept.all()] == ["rule"] * BURST + ["another"]
    recorder.aggregator.flush(everything=True)
    assert recorder.counts()[-1] == 4 and sum(recorder.counts()) == BURST + 5


@pytest.mark.parametrize(
    "one", [decision(ALLOW), decision(KILL), decision(DENY, held=0.5)], ids=["allowed", "killed", "a person's no"]
)
def test_what_is_no_flood_of_refusals_is_written_one_by_one(one: Decision) -> None:
    recorder = Recorder()
    for _ in range(BURST * 3):
        recorder.aggregator.write(one)
    assert recorder.counts() == [1] * BURST * 3


def test_memory_is_bounded_and_counts_stay_exact_whatever_differs() -> None:
    recorder = Recorder()
    total = 0
    for pid in range(3 * MAX_COUNTERS):
        for _ in range(BURST + 2):
            recorder.aggregator.write(decision(what=action(80, process(pid))))
            total += 1
        assert len(recorder.aggregator._counters) <= MAX_COUNTERS
    recorder.aggregator.flush(everything=True)
    assert sum(recorder.counts()) == total and not recorder.aggregator._counters


@given(st.lists(st.tuples(st.integers(0, 5), st.integers(1, 40), st.floats(0, 2)), max_size=40))
def test_counts_are_exact_at_any_pace(steps: list[tuple[int, int, float]]) -> None:
    recorder = Recorder()
    for pid, times, pause in steps:
        for _ in range(times):
            recorder.aggregator.write(decision(what=action(80, process(pid))))
        recorder.clock.now += pause
        recorder.aggregator.flush()
    recorder.aggregator.flush(everything=True)
    assert sum(recorder.counts()) == sum(times for _, times, _ in steps)


def test_counts_of_many_threads_are_exact() -> None:
    recorder = Recorder()

    def write(pid: int) -> None:
        for _ in range(2000):
            recorder.aggregator.write(decision(what=action(80, process(pid % 3))))
            if pid == 0:
                recorder.aggregator.flush(everything=True)

    threads = [threading.Thread(target=write, args=[pid]) for pid in range(6)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    recorder.aggregator.flush(everything=True)
    assert sum(recorder.counts()) == 12_000


def test_a_sink_that_raises_is_heard_through_all_that_stands_before_it() -> None:
    aggregator = Aggregator(Several(Recent(), BrokenSink()))
    with pytest.raises(OSError):
        aggregator.write(decision())
    with pytest.raises(OSError):
        aggregator.write(decision(ALLOW))
    killed: list[str] = []
    decided: list[Decision] = []
    monitor = Monitor(policy=Says(DENY), sink=Aggregator(BrokenSink()), on_kill=killed.append)
    monitor.submit(action(), decided.append)
    assert decided[0].verdict is KILL and killed


def test_what_recent_forgets_it_counts() -> None:
    recent = Recent(limit=10)
    for number in range(25):
        recent.write(replace(decision(), number=number))
    assert [kept.number for kept in recent.all()] == list(range(15, 25)) and recent.dropped == 15


def test_paths_of_requests_are_weighed() -> None:
    endpoint = Endpoint(Transport.TCP, "", 80, "a.org", protocol="http")
    long = Action(Kind.HTTP_REQUEST, Request(endpoint, "GET", "/" + "\U0001f600" * 16_000), Origin("box", "session"))
    assert weigh(decision(what=long)) > 64_000
    recent = Recent(texts=1 << 20)
    for _ in range(100):
        recent.write(decision(what=long))
    assert len(recent.all()) < 17 and recent.dropped == 100 - len(recent.all())


# ---- the short way for what is refused again and again ----


class Refuser:
    """A monitor whose policy says no, with a record that counts."""

    def __init__(self, behaviour: Says | None = None) -> None:
        self.recorder = Recorder()
        self.monitor = Monitor(policy=Says(DENY), sink=self.recorder.aggregator, behaviour=behaviour)
        self.action = action()

    def refuse(self, times: int) -> None:
        for _ in range(times):
            self.monitor.submit(self.action, lambda decision: None)


def test_a_repeated_refusal_is_counted_and_numbered_like_any_other() -> None:
    refuser = Refuser()
    refuser.refuse(BURST + 1)
    repeated = refuser.monitor.repeater(refuser.action)
    assert repeated is not None and all(repeated() for _ in range(1000))
    refuser.refuse(1)
    assert repeated()
    refuser.recorder.aggregator.flush(everything=True)
    assert refuser.recorder.counts() == [1] * BURST + [1003]
    assert refuser.recorder.kept.all()[-1].number == BURST + 1003
    refuser.refuse(1)
    assert refuser.recorder.kept.all()[-1].number == BURST + 1004


def test_what_was_counted_last_has_the_number_and_time_of_the_last() -> None:
    refuser = Refuser()
    refuser.refuse(BURST + 1)
    repeated = refuser.monitor.repeater(refuser.action)
    assert repeated is not None and repeated()
    refuser.refuse(1)  # the long way again
    refuser.recorder.aggregator.flush(everything=True)
    *_, before, last = refuser.recorder.kept.all()
    assert last.number == BURST + 3 and last.at >= before.at and last.count == 3


def test_after_its_count_was_written_it_is_decided_again() -> None:
    refuser = Refuser()
    refuser.refuse(BURST + 1)
    repeated = refuser.monitor.repeater(refuser.action)
    assert repeated is not None and repeated()
    refuser.recorder.clock.now += PERIOD
    refuser.recorder.aggregator.flush()
    assert not repeated()
    refuser.refuse(1)
    assert not repeated(), "another burst has begun, of which each is recorded"
    assert refuser.recorder.counts() == [1] * BURST + [2, 1]


def test_there_is_no_short_way_before_a_flood_and_none_where_others_judge_too() -> None:
    refuser = Refuser()
    refuser.refuse(BURST)
    assert refuser.monitor.repeater(refuser.action) is None
    watched = Refuser(behaviour=Says(ALLOW))
    watched.refuse(BURST + 1)
    assert watched.monitor.repeater(watched.action) is None
    plain = Monitor(policy=Says(DENY), sink=Recent())
    for _ in range(BURST + 1):
        plain.submit(action(), lambda decision: None)
    assert plain.repeater(action()) is None


def test_what_is_allowed_or_was_held_has_no_short_way() -> None:
    recorder = Recorder()
    for verdict, held in ((ALLOW, 0.0), (DENY, 1.0), (Verdict.KILL, 0.0)):
        for _ in range(BURST * 2):
            recorder.aggregator.write(decision(verdict, held=held))
    assert recorder.aggregator.repeater(action()) is None


def test_repeated_refusals_of_many_threads_are_counted_exactly() -> None:
    refuser = Refuser()
    refuser.refuse(BURST + 1)

    def refuse() -> None:
        for _ in range(500):
            repeated = refuser.monitor.repeater(refuser.action)
            if repeated is None or not repeated():
                refuser.refuse(1)

    threads = [threading.Thread(target=refuse) for _ in range(4)]
    for thread in threads:
        thread.start()
    for _ in range(50):
        refuser.recorder.aggregator.flush(everything=True)
    for thread in threads:
        thread.join()
    refuser.recorder.aggregator.flush(everything=True)
    assert sum(refuser.recorder.counts()) == BURST + 1 + 2000


# ---- what an enforcer says itself, and what was answered before ----


def test_an_enforcers_own_opinion_can_only_raise() -> None:
    for theirs, own in product((ALLOW, DENY, KILL), repeat=2):
        fixture = Fixture(theirs)
        found: list[Decision] = []
        fixture.monitor.submit(action(), found.append, own=Opinion(own, "gateway.tls", "It lies."))
        assert found[0].verdict is max(theirs, own)
        if own >= max(theirs, DENY):
            assert (found[0].decider, found[0].rule, found[0].reason) == ("enforcer", "gateway.tls", "It lies.")


def test_an_enforcers_refusal_is_no_question() -> None:
    persons = Persons()
    fixture = Fixture(ASK, persons=persons)
    found: list[Decision] = []
    fixture.monitor.submit(action(), found.append, own=Opinion(DENY, "gateway.tls", "It lies."))
    assert not persons.asked
    assert found[0].verdict is DENY


def _answered(rule: str = "rule of policy", verdict: Verdict = ALLOW, decider: str = "approvals") -> Decision:
    return Decision(action(), verdict, rule, "fine", "", decider, 1, 0.0)


def test_what_a_person_has_allowed_is_not_asked_again_by_the_next_enforcer() -> None:
    persons = Persons()
    fixture = Fixture(ASK, persons=persons)
    found: list[Decision] = []
    fixture.monitor.submit(action(81), found.append, following=_answered())
    assert not persons.asked
    assert found[0].verdict is ALLOW
    assert (found[0].decider, found[0].rule) == ("approvals", "rule of policy")


def test_one_connection_may_live_through_several_steps() -> None:
    """A person was asked about it, not about a step."""
    persons = Persons()
    fixture = Fixture(ASK, persons=persons)
    found: list[Decision] = []
    origin = replace(action().origin, step=7, tool="a", unexplained=True)
    fixture.monitor.submit(replace(action(), origin=origin), found.append, following=_answered())
    assert not persons.asked
    assert found[0].verdict is ALLOW


@pytest.mark.parametrize(
    "earlier",
    [
        _answered(rule="another rule"),
        _answered(verdict=DENY),
        _answered(decider="policy"),
        replace(_answered(), action=Action(Kind.NET_CONNECT, action().subject, Origin("another", "session"))),
        replace(_answered(), action=replace(action(), origin=replace(action().origin, exec=2))),
    ],
)
def test_i6_no_other_earlier_decision_answers_a_question(earlier: Decision) -> None:
    persons = Persons()
    fixture = Fixture(ASK, persons=persons)
    found: list[Decision] = []
    fixture.monitor.submit(action(), found.append, following=earlier)
    assert len(persons.asked) == 1
    assert not found


def _asking(persons: Persons, *rules: str) -> Fixture:
    fixture = Fixture(ASK, persons=persons)
    fixture.parts["policy"].opinion = Opinion(ASK, rules[0], asked=rules)
    return fixture


@pytest.mark.parametrize(
    ("before", "now", "lowered"),
    [
        (("a",), ("a",), True),
        (("a", "b"), ("b", "a"), True),
        (("a", "b"), ("b",), True),
        (("a",), ("a", "b"), False),
        (("b",), ("a", "b"), False),
        (("a",), ("b",), False),
    ],
)
def test_i6_an_answer_is_only_to_the_rules_that_asked(
    before: tuple[str, ...], now: tuple[str, ...], lowered: bool
) -> None:
    persons = Persons()
    first = _asking(persons, *before)
    first.submit()
    persons.asked.pop()[2](Answer(ALLOW, "somebody"))
    assert first.decided[0].asked == before
    second = _asking(persons, *now)
    second.monitor.submit(action(), second.decided.append, following=first.decided[0])
    assert len(persons.asked) == (not lowered)
    assert [each.verdict for each in second.decided] == [ALLOW] * lowered


@pytest.mark.parametrize("special_first", [False, True])
@pytest.mark.parametrize("method", ["GET", "DELETE"])
def test_i6_the_answer_for_a_connection_is_none_to_what_is_asked_of_a_request(special_first: bool, method: str) -> None:
    rules = (NetworkRule("a.org"), NetworkRule("a.org", requests=(RequestRule(("DELETE",)),)))
    persons = Persons()
    policy = PolicyPart(Policy(network=Network(ask=rules[::-1] if special_first else rules)))
    monitor = Monitor(policy=policy, sink=Recent(), approvals=persons)
    endpoint, origin = Endpoint(Transport.TCP, "192.0.2.1", 443, "a.org", protocol="tls"), Origin("box", "session")
    decided: list[Decision] = []
    monitor.submit(Action(Kind.NET_CONNECT, endpoint, origin), decided.append)
    persons.asked[0][2](Answer(ALLOW, "somebody"))
    request = Action(Kind.HTTP_REQUEST, Request(endpoint, method, "/x"), origin)
    monitor.submit(request, decided.append, following=decided[0])
    assert (len(persons.asked), len(decided)) == ((1, 2) if method == "GET" else (2, 1))


def test_i6_an_answer_to_one_part_is_none_to_another() -> None:
    persons = Persons()
    first = Fixture(ASK, persons=persons)
    first.submit()
    persons.asked.pop()[2](Answer(ALLOW, "somebody"))
    second = Fixture(ASK, ASK, persons=persons)
    second.monitor.submit(action(), second.decided.append, following=first.decided[0])
    assert not second.decided
    [(_, opinion, answered)] = persons.asked
    assert (opinion.rule, opinion.asked) == ("rule of policy", ("rule of policy", "rule of behaviour"))
    answered(Answer(ALLOW, "somebody"))
    third = Fixture(ASK, ASK)
    third.monitor.submit(action(), third.decided.append, following=second.decided[0])
    assert [each.verdict for each in third.decided] == [ALLOW]


def test_i6_an_earlier_answer_lowers_no_denial() -> None:
    fixture = Fixture(DENY)
    found: list[Decision] = []
    fixture.monitor.submit(action(), found.append, following=_answered())
    assert found[0].verdict is DENY
