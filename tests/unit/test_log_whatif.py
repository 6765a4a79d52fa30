"""What another policy would have decided: only its word is asked for anew, and nothing is guessed."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from corral.actions import Action, Decision, Kind, Opinion, Socket, Verdict
from corral.errors import RequestError
from corral.log.records import Record
from corral.log.whatif import Counts, Difference, Outcome, compare
from corral.policy.load import parse_policy
from corral.policy.model import Policy
from corral.policy.part import PolicyPart
from tests.unit.recorded import ORIGIN, connect, decision, flow, numbered, run, session, syscall, written

ALLOW, ASK, DENY, KILL = Verdict.ALLOW, Verdict.ASK, Verdict.DENY, Verdict.KILL
HOST = "example.test:443"


def policy(**network: list[str]) -> Policy:
    lists = "".join(f"  {name}: [{', '.join(rules)}]\n" for name, rules in network.items())
    return parse_policy(f"network:\n{lists}" if lists else "{}", source="new.yaml")


ALLOWS, ASKS, DENIES = policy(allow=[HOST]), policy(ask=[HOST]), policy(deny=[HOST])


def differences(new: Policy, *decisions: Decision, counts: Counts | None = None) -> list[Difference]:
    return list(compare(numbered(written(session(*decisions))), new, counts))


# ---- the policy's own verdicts ----


@pytest.mark.parametrize("was", [ALLOW, DENY])
@pytest.mark.parametrize(("new", "would_be"), [(ALLOWS, ALLOW), (ASKS, ASK), (DENIES, DENY)])
def test_the_policy_is_asked_anew(was: Verdict, new: Policy, would_be: Verdict) -> None:
    counts = Counts()
    found = differences(new, decision(connect(), was, "network.old[7]"), counts=counts)
    if was is would_be:
        assert not found and counts == Counts(judged=1, same=1, other_rule=1)
        return
    (difference,) = found
    assert difference.number == 2 and difference.action == connect()
    assert difference.was == Outcome(was, "network.old[7]")
    rule = {ALLOW: "network.allow[0]", ASK: "network.ask[0]", DENY: "network.deny[0]"}[would_be]
    assert difference.would_be == Outcome(would_be, rule)
    assert (counts.harder, counts.milder) == ((1, 0) if would_be > was else (0, 1))


def test_what_is_no_decision_is_passed_over_and_counts_are_heeded() -> None:
    counts = Counts()
    found = list(compare(numbered(written(session(flow(), decision(connect(), DENY, count=40)))), ALLOWS, counts))
    assert [each.count for each in found] == [40] and counts == Counts(judged=40, milder=40)


# ---- persons and grants ----


@pytest.mark.parametrize("answer", [ALLOW, DENY, KILL])
@pytest.mark.parametrize("new", [ALLOWS, ASKS, DENIES])
def test_what_a_person_answered_stays_answered_where_it_would_be_asked_again(answer: Verdict, new: Policy) -> None:
    answered = decision(connect(), answer, "network.ask[0]", decider="approvals", answered_by="ann")
    found = differences(new, answered)
    if new is ASKS:
        assert not found
        return
    (difference,) = found
    assert difference.was == Outcome(answer, "network.ask[0]", "ann")
    assert difference.would_be is not None and not difference.would_be.answered_by
    assert "asked, answered by ann" in str(difference)


def test_nobody_answered_is_no_refusal_by_policy() -> None:
    (difference,) = differences(ALLOWS, decision(connect(), DENY, "network.ask[0]", decider="approvals"))
    assert difference.was.answered_by == "nobody"


def test_an_answer_to_the_same_attempt_before_is_said_to_be_one() -> None:
    (difference,) = differences(DENIES, decision(connect(), ALLOW, "network.ask[0]", decider="approvals"))
    assert "another enforcer" in difference.was.answered_by


def test_a_grant_stands_where_it_would_be_asked() -> None:
    granted = decision(connect(), ALLOW, "autonomy (level 2)", decider="autonomy")
    assert not differences(ASKS, granted)
    (difference,) = differences(DENIES, granted)
    assert difference.was.answered_by == "the grant autonomy (level 2)"
    assert difference.would_be == Outcome(DENY, "network.deny[0]")


def test_the_question_of_another_part_stays_one() -> None:
    asked = decision(connect(), ALLOW, "beacon rule", decider="approvals", answered_by="ann")
    assert not differences(ALLOWS, asked)
    assert [each.would_be for each in differences(DENIES, asked)] == [Outcome(DENY, "network.deny[0]")]


# ---- other parts ----


@pytest.mark.parametrize("decider", ["behaviour", "risk", "autonomy", "monitor", "enforcer"])
def test_what_another_part_refused_stays_refused(decider: str) -> None:
    counts = Counts()
    found = differences(ALLOWS, decision(connect(), KILL, "its rule", decider=decider), counts=counts)
    assert not found and counts == Counts(judged=1, same=1)


@settings(max_examples=60)
@given(
    st.sampled_from([ALLOW, DENY, KILL]),
    st.sampled_from(["policy", "behaviour", "risk", "autonomy", "approvals", "monitor", "enforcer"]),
    st.sampled_from(["network.ask[0]", "other"]),
    st.sampled_from(["", "ann"]),
    st.integers(1, 5),
)
def test_a_harder_policy_makes_nothing_milder(was: Verdict, decider: str, rule: str, by: str, count: int) -> None:
    made = decision(connect(), was, rule, decider=decider, answered_by=by, count=count)
    counts = Counts()
    milder_by_policy = decider in ("policy", "approvals") and was is KILL  # asked, and killed by the answer
    for difference in differences(DENIES, made, counts=counts):
        assert difference.would_be is not None and difference.would_be.verdict is DENY
    assert counts.milder == 0 or milder_by_policy
    assert counts.judged == count == counts.same + counts.harder + counts.milder and not counts.cannot


# ---- system calls, and what cannot be judged ----


def test_what_the_table_refuses_no_policy_allows() -> None:
    decisions = (
        decision(syscall("mount"), DENY, "syscalls"),
        decision(Action(Kind.NET_SOCKET, Socket(16, 3, 0), ORIGIN), DENY, "syscalls"),
    )
    counts = Counts()
    assert not differences(parse_policy("{}", source="x"), *decisions, counts=counts) and counts.same == 2


def test_a_system_call_that_the_policy_named() -> None:
    named = decision(syscall("flock", "the policy refuses it"), DENY, "syscalls.deny[0]")
    (asked,) = differences(parse_policy("syscalls:\n  ask: [flock]\n", source="x"), named)
    assert asked.would_be == Outcome(ASK, "syscalls.ask[0]")
    (unknown,) = differences(parse_policy("{}", source="x"), named)
    assert unknown.would_be is None and "system call" in unknown.why


def test_whoever_knows_the_table_judges() -> None:
    def judge(part: PolicyPart, action: Action) -> Opinion:
        return Opinion(ALLOW, "syscalls (free)")

    named = decision(syscall("flock", "the policy refuses it"), DENY, "syscalls.deny[0]")
    records = list(numbered(written(session(named))))
    (difference,) = compare(records, Policy(), judge=judge)
    assert difference.would_be == Outcome(ALLOW, "syscalls (free)")

    def fails(part: PolicyPart, action: Action) -> Opinion:
        raise RequestError("not \x1b like this")

    (difference,) = compare(records, Policy(), judge=fails)
    assert difference.would_be is None and difference.why == "not \\x1b like this"


@pytest.mark.parametrize("path", ["/" + "a" * 100_000, "/bin/\udcff"])
def test_what_was_cut_is_not_guessed(path: str) -> None:
    counts = Counts()
    new = parse_policy("process:\n  deny: ['/bin/*']\n", source="x")
    (difference,) = differences(new, decision(run(path)), counts=counts)
    assert difference.would_be is None and "whole" in difference.why
    assert counts == Counts(cannot=1) and "cannot be judged" in str(difference)


def test_where_something_else_was_cut_it_is_judged() -> None:
    def records() -> Iterator[tuple[int, Record]]:
        for number, record in numbered(written(session(decision(connect())))):
            yield number, replace(record, cut=frozenset({"origin", "reason"}))

    assert len(list(compare(records(), DENIES))) == 1


def test_differences_come_one_by_one() -> None:
    def records() -> Iterator[tuple[int, Record]]:
        yield from numbered(written(session(decision(connect()))))
        raise AssertionError("nobody wanted more")

    assert next(compare(records(), DENIES)).number == 2


@settings(max_examples=40, deadline=None)
@given(st.text(st.characters(), max_size=40))
def test_they_print_harmlessly(text: str) -> None:
    made = decision(connect(text), DENY, text, decider="approvals", answered_by=text)
    for difference in differences(ALLOWS, made, decision(run(text), DENY, text)):
        assert str(difference).isprintable()
