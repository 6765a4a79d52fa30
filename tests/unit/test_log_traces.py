"""Two sessions compared: what must not matter does not, and what does is told at its first place."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from itertools import count

import pytest
from hypothesis import given
from hypothesis import strategies as st

from corral.actions import (
    Access,
    Action,
    Decision,
    Ending,
    File,
    Kind,
    ModelCall,
    Origin,
    Program,
    ToolCall,
    Used,
    Verdict,
)
from corral.log.events import Event
from corral.log.ocsf import Context
from corral.log.records import Record
from corral.log.traces import Place, Trace, first_divergence

CONTEXT = Context("agent", "1", "agent", "sha256:0", "s", "s", "0")


def records(events: Sequence[Event]) -> list[Record]:
    return [Record(event, CONTEXT, number, 0, 0, frozenset()) for number, event in enumerate(events, 1)]


def did(step: int, *argv: str, verdict: Verdict = Verdict.ALLOW, times: int = 1) -> Decision:
    action = Action(Kind.PROCESS_EXEC, Program(argv[0], argv), Origin("s", "s", step))
    return Decision(action, verdict, "process.allow[0]", "", "", "policy", 1, 0.0, count=times)


def wrote(step: int, path: str) -> Decision:
    action = Action(Kind.FILE_OPEN, File(path, Access.WRITE), Origin("s", "s", step))
    return Decision(action, Verdict.ALLOW, "filesystem", "", "", "policy", 1, 0.0)


def answered(step: int, conversation: str = "c", *tools: tuple[str, str]) -> Used:
    calls = tuple(ToolCall(f"id{step}", name, arguments) for name, arguments in tools)
    return Used(
        Origin("s", "s", 1), Kind.MODEL_CALL, "up", "m", "model.allow[0]", 0.0, 0.1, Ending.ANSWERED,
        opened=step if tools else 0, conversation=conversation, tools=calls,
    )  # fmt: skip


def asked(step: int) -> Decision:
    action = Action(Kind.MODEL_CALL, ModelCall("m"), Origin("s", "s", step))
    return Decision(action, Verdict.ALLOW, "model.allow[0]", "", "", "policy", 1, 0.0)


BASH = ("bash", '{"command":"make"}')
FIRST: list[Event] = [
    did(1, "/usr/bin/agent"),
    asked(1),
    answered(2, "c", BASH),
    did(2, "/usr/bin/make"),
    did(2, "/usr/bin/cc", "-c", "a.c"),
    did(2, "/usr/bin/cc", "-c", "b.c"),
    asked(1),
    answered(3, "c", ("bash", "ls")),
    did(3, "/usr/bin/ls"),
    asked(1),
    answered(0, "c"),
]


def test_the_same_is_the_same() -> None:
    assert first_divergence(Trace(records(FIRST)), Trace(records(FIRST))) is None


def test_what_runs_beside_each_other_has_no_order_and_steps_have_no_numbers() -> None:
    other: list[Event] = [
        did(1, "/usr/bin/agent"),
        answered(7, "c", BASH),
        did(7, "/usr/bin/cc", "-c", "b.c"),
        did(7, "/usr/bin/make"),
        did(7, "/usr/bin/cc", "-c", "a.c"),
        answered(9, "c", ("bash", "ls")),
        did(9, "/usr/bin/ls"),
    ]
    assert first_divergence(Trace(records(FIRST)), Trace(records(other))) is None


def test_what_is_done_may_be_recorded_before_the_answer_is() -> None:
    early = [FIRST[0], FIRST[3], FIRST[2], *FIRST[4:]]
    assert first_divergence(Trace(records(FIRST)), Trace(records(early))) is None


@pytest.mark.parametrize(
    ("one", "other"),
    [
        ("/tmp/tmpab12cd34/x", "/tmp/tmpzz99yy88/x"),
        ("/tmp/tmp.Ab3dE6gH1k", "/tmp/tmp.Zb3dE6gH1k"),
        ("/var/tmp/tmp_ab12cd_", "/var/tmp/tmpq1w2e3r4"),
        ("/tmp/ccAb12Cd.o", "/tmp/ccZb12Cd.o"),
        ("/tmp/ssh-XXab12cd34/agent", "/tmp/ssh-YYab12cd34/agent"),
    ],
)
def test_names_that_nobody_chose_do_not_matter(one: str, other: str) -> None:
    a, b = Trace(records([wrote(1, one)])), Trace(records([wrote(1, other)]))
    assert first_divergence(a, b) is None


@pytest.mark.parametrize(
    ("one", "other"),
    [("/w/tmp1", "/w/tmp2"), ("/w/template.c", "/w/templates.c"), ("/a", "/b"), ("/tmp/work/a", "/tmp/play/a")],
)
def test_names_that_somebody_chose_do(one: str, other: str) -> None:
    a, b = Trace(records([wrote(1, one)])), Trace(records([wrote(1, other)]))
    assert first_divergence(a, b) is not None


def changed(position: int, *events: Event) -> list[Event]:
    return [*FIRST[:position], *events, *FIRST[position + 1 :]]


@pytest.mark.parametrize(
    ("other", "number", "words"),
    [
        (changed(3, did(2, "/usr/bin/evil")), 2, "make: allow was not done again; instead: process.exec /usr/bin/evil"),
        (changed(5), 2, "-c b.c: allow was not done again"),
        (changed(5, FIRST[5], did(2, "/usr/bin/curl")), 2, "/usr/bin/curl: allow was not done before"),
        (changed(4, did(2, "/usr/bin/cc", "-c", "a.c", verdict=Verdict.DENY)), 2, "was allow, and is deny"),
        (changed(2, answered(2, "c", ("bash", "rm -r"))), 2, "asked for something else"),
        (FIRST[:7], 3, "never came to this step"),
        ([*FIRST, answered(5, "c", BASH), did(5, "/usr/bin/more")], 0, "went on where the first had ended"),
        ([*FIRST, answered(5, "d", BASH), did(5, "/usr/bin/more")], 0, "/usr/bin/more"),
        (changed(4, did(2, "/usr/bin/cc", "-c", "a.c", times=2)), 2, "a.c: allow was not done before"),
    ],
)  # fmt: skip
def test_the_first_difference_is_told(other: list[Event], number: int, words: str) -> None:
    found = first_divergence(Trace(records(FIRST)), Trace(records(other)))
    assert found is not None and found.number == number and words in str(found)


def test_the_earliest_of_several_is_told() -> None:
    other = changed(8, did(3, "/usr/bin/later"))
    other[3] = did(2, "/usr/bin/sooner")
    found = first_divergence(Trace(records(FIRST)), Trace(records(other)))
    assert found is not None and found.number == 2 and "sooner" in str(found)
    assert found.place == Place("c", 1)


def test_names_of_agents_do_not_draw() -> None:
    found = first_divergence(Trace(records([did(1, "/bin/\x1b[2Jx\n")])), Trace(records([])))
    assert found is not None and str(found).isprintable()


@given(st.lists(st.tuples(st.integers(1, 4), st.sampled_from("abc")), max_size=20), st.randoms())
def test_any_order_within_steps_is_the_same(deeds: list[tuple[int, str]], random: object) -> None:
    events = [did(step, f"/bin/{name}") for step, name in deeds]
    numbers = count()
    shuffled = sorted(events, key=lambda each: (each.action.origin.step, hash((next(numbers), repr(random))) % 7))
    by_step = sorted(events, key=lambda each: each.action.origin.step)
    assert first_divergence(Trace(records(by_step)), Trace(records(shuffled))) is None
    if events:
        gone = replace(events[0], verdict=Verdict.DENY)
        assert first_divergence(Trace(records(events)), Trace(records([gone, *events[1:]]))) is not None
