"""The review of a period: what is new, what was close, and what is unlike the rest, in bounded memory."""

from __future__ import annotations

from collections import Counter
from dataclasses import replace
from statistics import median

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

import corral.log.review as review_module
from corral.actions import Action, Endpoint, Kind, Transport, Verdict
from corral.actions import Ending as CallEnding
from corral.approvals.queue import Ending, Scope
from corral.errors import RequestError
from corral.log.digest import Denial, Digest, Miss, Spend
from corral.log.events import Event, LogRecovered, PolicyChanged
from corral.log.frequent import Frequent
from corral.log.outliers import FEWEST, THRESHOLD, scores
from corral.log.records import encode
from corral.log.report import report_html, report_text
from corral.log.review import review
from tests.unit.recorded import (
    CONTEXT,
    ORIGIN,
    START,
    approval,
    change,
    connect,
    decision,
    flow,
    numbered,
    run,
    session,
    syscall,
    used,
    written,
)
from tests.unit.test_log_html import HOSTILE, Page

WEEK = 7 * 86400.0
ALLOW, DENY, KILL = Verdict.ALLOW, Verdict.DENY, Verdict.KILL


def before(*events: Event, name: str = "old", agent: str = "coder") -> list[bytes]:
    return written(session(*events), name, at=START - WEEK, agent=agent)


def during(*events: Event, name: str = "new", agent: str = "coder") -> list[bytes]:
    return written(session(*events), name, agent=agent)


def reviewed(*parts: list[bytes], top: int = 20) -> Digest:
    """The review of the week from START."""
    return review(numbered([entry for part in parts for entry in part]), START, START + WEEK, top=top)


# ---- what is new ----


def test_destinations_that_were_reached_for_the_first_time() -> None:
    digest = reviewed(
        before(decision(connect("old.test")), decision(connect("refused.test"), DENY)),
        during(
            decision(connect("old.test")),
            decision(connect("refused.test")),
            flow("new.test"),
            flow("new.test"),
            decision(connect("never.test"), DENY),
        ),
    )
    (agent,) = digest.agents
    found = {each.what: each.count for each in agent.new_destinations}
    assert found == {"tcp refused.test:443": 1, "tcp new.test:443": 2}
    assert (agent.agent, agent.sessions, agent.actions) == ("coder 1.2", 1, 3)
    assert (agent.allowed, agent.denied, agent.killed) == (2, 1, 0)
    assert agent.new_destinations[0].number == 9


@pytest.mark.parametrize(
    ("endpoint", "leaves"),
    [
        (Endpoint(Transport.TCP, "127.0.0.1", 80), False),
        (Endpoint(Transport.TCP, "::1", 80), False),
        (Endpoint(Transport.TCP, "0.0.0.0", 80), False),
        (Endpoint(Transport.UNIX, path="/run/x"), False),
        (Endpoint(Transport.TCP, "127.0.0.1", 80, protected=True), True),
        (Endpoint(Transport.TCP, "127.0.0.1", 80, "named.test"), True),
        (Endpoint(Transport.UDP, "192.0.2.9", 53), True),
    ],
)
def test_what_stays_inside_is_no_destination(endpoint: Endpoint, leaves: bool) -> None:
    digest = reviewed(during(decision(Action(Kind.NET_CONNECT, endpoint, ORIGIN))))
    assert bool(digest.agents[0].new_destinations) is leaves


def test_binaries_are_new_by_path_and_content() -> None:
    digest = reviewed(
        before(decision(run("/bin/a", digest="aa" * 32)), decision(run("/bin/b", digest="bb" * 32))),
        during(
            decision(run("/bin/a", "-x", digest="aa" * 32)),
            decision(run("/bin/b", digest="cc" * 32)),
            decision(run("/bin/c", digest="")),
            decision(run("/bin/d"), DENY),
        ),
    )
    found = [each.what for each in digest.agents[0].new_binaries]
    assert found == [f"/bin/b (sha256 {'cc' * 8})", "/bin/c (content not read)"]


def test_models_and_sources_that_were_used_for_the_first_time_and_what_was_spent() -> None:
    refused = used("model-3", ending=CallEnding.REFUSED, input_tokens=0, output_tokens=0, cost=0)
    rows = used("select", "hr", kind=Kind.DATA_QUERY, input_tokens=0, output_tokens=0, cost=0)
    digest = reviewed(
        before(used(cost=10**12)),
        during(used(), used("model-2"), refused, rows, replace(rows, name="insert"), used(cost=3, currency="USD")),
    )
    (agent,) = digest.agents
    assert [(each.what, each.count) for each in agent.new_sources] == [
        ("model.call model-2 of upstream-1", 1),
        ("data.query hr", 2),
    ]
    assert agent.spend == Spend(6, 300, 60, (("EUR", 3_000_000), ("USD", 3)))
    text = "\n".join(report_text(digest))
    assert "model.call model-2 of upstream-1" in text and "0.003 EUR, 0.000000003 USD" in text


def test_actions_that_no_answer_explains_are_counted() -> None:
    action = replace(run(), origin=replace(ORIGIN, unexplained=True))
    digest = reviewed(
        before(decision(action)), during(decision(action, DENY, count=3), decision(action), decision(run()))
    )
    assert digest.agents[0].unexplained == 4


def test_agents_are_told_apart() -> None:
    digest = reviewed(
        before(decision(connect()), agent="one"),
        during(decision(connect()), name="a", agent="one"),
        during(decision(connect()), name="b", agent="two"),
    )
    assert [(each.agent, len(each.new_destinations)) for each in digest.agents] == [("one 1.2", 0), ("two 1.2", 1)]


def test_the_period_is_half_open_and_its_rest_is_not_looked_at() -> None:
    after = written(session(decision(connect("later.test"))), "after", at=START + WEEK)
    digest = reviewed(before(), during(), after)
    assert (digest.before, digest.records) == (4, 4) and [each.sessions for each in digest.agents] == [1]
    with pytest.raises(RequestError):
        review([], START, START)


# ---- what was close ----


def test_denials_by_how_often() -> None:
    digest = reviewed(
        before(decision(syscall("old"), DENY, "syscalls", count=1000)),
        during(
            decision(connect(), DENY, "network.deny[0]"),
            decision(syscall("mount"), DENY, "syscalls", count=30),
            decision(connect(), DENY, "network.deny[0]"),
        ),
    )
    assert [(each.count, each.rule, each.what) for each in digest.denials] == [
        (30, "syscalls", "kernel.mount"),
        (2, "network.deny[0]", "net.connect example.test:443"),
    ]


def test_near_misses() -> None:
    def asked(verdict: Verdict, by: str) -> Event:
        return decision(change(f"/x/{verdict.name}/{by}"), verdict, "filesystem.ask[0]", decider="approvals",
                        answered_by=by)  # fmt: skip

    digest = reviewed(
        before(asked(DENY, "ann")),
        during(
            asked(ALLOW, "ann"),
            asked(ALLOW, ""),
            asked(DENY, "ann"),
            asked(DENY, "nobody"),
            asked(KILL, "ann"),
            decision(connect(), KILL, "beacon", decider="behaviour"),
            decision(connect(), DENY),
        ),
    )
    assert dict(digest.misses) == {Miss.KILLED: 2, Miss.DENIED: 1, Miss.UNANSWERED: 1, Miss.ALLOWED: 1}
    assert [(miss.why, miss.by) for miss in digest.near_misses] == [
        (Miss.KILLED, "ann"),
        (Miss.KILLED, ""),
        (Miss.DENIED, "ann"),
        (Miss.UNANSWERED, "nobody"),
        (Miss.ALLOWED, "ann"),
    ]


def test_what_persons_answered_and_which_policies_changed() -> None:
    change_of_policy = PolicyChanged("sha256:" + "a" * 64, "sha256:" + "b" * 64, "anna", tuple("abcdefghijklm"))
    nobody = approval("nobody", Ending.TIMED_OUT)
    digest = reviewed(
        before(approval(), change_of_policy), during(approval(scope=Scope.SESSION), nobody, change_of_policy)
    )
    assert [(each.outcome, each.by, each.waited) for each in digest.answers] == [
        ("allow, session", "anna", 2.5),
        ("timed out", "nobody", 2.5),
    ]
    (changed,) = digest.policy_changes
    assert (digest.answer_count, digest.policy_change_count) == (2, 1)
    assert changed.by == "anna" and len(changed.changes) == 11 and changed.changes[-1] == "and 3 more"
    text = "\n".join(report_text(digest))
    assert "allow, session" in text and "aaaaaaaaaaaaaaaa  bbbbbbbbbbbbbbbb" in text and "a; b; c" in text


def test_the_logs_own_health() -> None:
    entries = during(flow(), flow(), flow())
    own = encode(LogRecovered("7 bytes"), CONTEXT, sequence=0, at=START + 9, monotonic_ns=0)
    own = own.replace(b'"correlation_uid":"session-1"', b'"correlation_uid":""')
    digest = reviewed(entries[:2], entries[4:], [own])
    assert [each.what for each in digest.troubles] == [
        "session new: record 5 follows 2",
        "the log was mended after a crash: 7 bytes",
    ]
    assert digest.trouble_count == 2 and [each.sessions for each in digest.agents] == [1]


# ---- sessions unlike the rest ----


def test_a_session_with_many_more_refusals() -> None:
    usual = [during(decision(syscall("x"), DENY, count=5 + number % 3), name=f"s{number}") for number in range(9)]
    odd = during(decision(syscall("x"), DENY, count=500), name="odd")
    found = {(each.session, each.measure) for each in reviewed(*usual, odd).outliers}
    assert found == {("odd", "refusals"), ("odd", "actions")}
    assert not reviewed(*usual).outliers
    assert not reviewed(usual[0], usual[1], odd).outliers
    assert any("Fewer than 8 sessions" in note for note in reviewed(usual[0], odd).notes)


def test_an_odd_session_before_the_period_is_not_told_again() -> None:
    usual = [during(flow(up=100 + number), name=f"s{number}") for number in range(9)]
    assert not reviewed(before(flow(up=10**9), name="odd"), *usual).outliers
    assert [each.measure for each in reviewed(*usual, during(flow(up=10**9), name="odd")).outliers] == ["bytes out"]


def test_scores_by_hand() -> None:
    """Median 5, distances 4 3 2 1 0 1 2 3 95: MAD 2."""
    middle, found = scores([1, 2, 3, 4, 5, 6, 7, 8, 100])
    assert middle == 5 and found[-1] == pytest.approx(0.6745 * 95 / 2) and found[0] == pytest.approx(-0.6745 * 2)


def test_one_among_equal_ones_shows() -> None:
    _, found = scores([3.0] * 20 + [50.0])
    assert found[-1] > THRESHOLD and set(found[:-1]) == {0.0}


@given(st.lists(st.floats(-1e9, 1e9), min_size=1, max_size=40))
def test_scores_are_finite_and_keep_the_order(values: list[float]) -> None:
    middle, found = scores(values)
    assert middle == median(values) and len(found) == len(values)
    assert all(score == score and abs(score) != float("inf") for score in found)
    if len(values) < FEWEST:
        assert set(found) == {0.0}
    ordered = sorted(zip(values, found, strict=True))
    assert [score for _, score in ordered] == sorted(found)


# ---- bounds ----


@given(st.lists(st.tuples(st.integers(0, 30), st.integers(1, 5)), max_size=200), st.integers(1, 8))
def test_frequent_things_are_found_with_few_counters(things: list[tuple[int, int]], size: int) -> None:
    frequent: Frequent[int] = Frequent(size)
    true: Counter[int] = Counter()
    for thing, weight in things:
        frequent.add(thing, weight)
        true[thing] += weight
    found = dict(frequent.top(size + 1))
    assert len(found) <= size and frequent.total == true.total()
    assert frequent.short <= true.total() / (size + 1)
    for thing, count in true.items():
        assert count - frequent.short <= found.get(thing, 0) <= count
    assert list(found.values()) == sorted(found.values(), reverse=True)


def test_tables_are_bounded_and_say_what_is_left_out() -> None:
    events = [decision(connect(f"h{number}.test")) for number in range(30)]
    refusals = [decision(connect(f"r{number}.test"), DENY) for number in range(30)]
    answers = [decision(connect(), DENY, decider="approvals", answered_by="ann") for _ in range(30)]
    digest = reviewed(during(*events, *refusals, *answers), top=5)
    (agent,) = digest.agents
    assert len(agent.new_destinations) == 5 and agent.more == 25
    assert len(digest.denials) == 5 and len(digest.near_misses) == 5 and dict(digest.misses)[Miss.DENIED] == 30


def test_where_a_bound_is_reached_the_digest_says_so(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(review_module, "MAX_KNOWN", 2)
    monkeypatch.setattr(review_module, "MAX_SESSIONS", 1)
    monkeypatch.setattr(review_module, "MAX_DISTINCT", 1)
    events = [decision(connect(f"h{number}.test")) for number in range(3)]
    digest = reviewed(during(*events, name="a"), during(flow(), name="b"))
    said = " ".join(digest.notes)
    assert "more than 2 different destinations" in said and "5 records are not in these figures" in said
    assert "too many destinations" in said and "no record before" in said
    assert len(digest.agents[0].new_destinations) == 2


# ---- printing ----


def full(text: str) -> Digest:
    """Every table has a row with this text."""
    usual = [during(flow(up=100), name=f"s{number}", agent=text) for number in range(9)]
    events = (
        flow(text, up=10**9),
        decision(run(text)),
        decision(connect(text), DENY, text),
        decision(connect(text), DENY, text, decider="approvals", answered_by=text),
        LogRecovered(text),
        approval(text),
        PolicyChanged(text, text, text, (text,)),
    )
    return reviewed(*usual, during(*events, name=f"odd {text}", agent=text))


@pytest.mark.parametrize("text", HOSTILE)
def test_reports_print_hostile_text_harmlessly(text: str) -> None:
    digest, plain = full(text), full("plain")
    assert digest.outliers and digest.troubles and digest.near_misses and digest.denials
    assert digest.answers and digest.policy_changes
    assert all(line.isprintable() for line in report_text(digest))
    content = "".join(report_html(digest))
    assert content.replace("\n", "").isprintable()
    assert Page(content).structure() == Page("".join(report_html(plain))).structure()
    assert "script" not in {tag for tag, _ in Page(content).elements}


@pytest.mark.parametrize("text", HOSTILE)
def test_reports_print_harmlessly_what_a_digest_should_not_have(text: str) -> None:
    """The texts of a digest are printable; whoever prints them does not rely on it."""
    digest = replace(reviewed([]), denials=(Denial(text, text, text, 1),), notes=(text,))
    assert all(line.isprintable() for line in report_text(digest))
    content = "".join(report_html(digest))
    assert content.replace("\n", "").isprintable()
    plain = replace(digest, denials=(Denial("a", "b", "c", 1),), notes=("d",))
    assert Page(content).structure() == Page("".join(report_html(plain))).structure()


@settings(max_examples=30, deadline=None)
@given(st.text(st.characters(), min_size=1, max_size=40))
def test_reports_print_any_text_harmlessly(text: str) -> None:
    digest = reviewed(during(flow(text), decision(run(text), DENY, text), name=text, agent=text))
    assert all(line.isprintable() for line in report_text(digest))
    assert "".join(report_html(digest)).replace("\n", "").isprintable()


def test_an_empty_period_is_a_report_too() -> None:
    lines = list(report_text(reviewed([])))
    assert lines[0] == "Review of 2026-09-21 14:13:20 to 2026-09-28 14:13:20" and "  nothing was recorded" in lines
    assert Page("".join(report_html(reviewed([])))).all("h2")[0] == "Agents"
