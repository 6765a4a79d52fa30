"""The time line of a session: every record is an item of its kind, in order, read when it is asked for."""

from __future__ import annotations

import json
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from corral.actions import (
    Action,
    Content,
    Decision,
    Endpoint,
    Kind,
    ModelCall,
    Origin,
    Query,
    Request,
    Transport,
    Verb,
    Verdict,
)
from corral.approvals.queue import Ending, Scope
from corral.errors import RequestError
from corral.log.events import (
    ApplyEnded,
    Event,
    ExecEnded,
    ExecStarted,
    KeyRotated,
    LogRecovered,
    Outcome,
    PayloadErased,
    PayloadKept,
    PayloadLost,
    PolicyChanged,
    SessionEnded,
    SessionStarted,
)
from corral.log.items import ItemKind
from corral.log.places import open_log
from corral.log.reader import Reader
from corral.log.records import encode
from corral.log.tiles import WIDTH, LogDamaged
from corral.log.timeline import Timeline, session_records
from tests.unit.recorded import (
    CONTEXT,
    ORIGIN,
    START,
    Shelf,
    approval,
    change,
    connect,
    decision,
    flow,
    run,
    session,
    syscall,
    written,
)

ENDPOINT = Endpoint(Transport.TCP, "192.0.2.1", 443, "example.test", protocol="tls")


def told() -> Iterator[tuple[Event, ItemKind, str]]:
    def other(kind: Kind, subject: object) -> Decision:
        return decision(Action(kind, subject, ORIGIN))  # type: ignore[arg-type]

    yield SessionStarted("/work", "", "{}"), ItemKind.LIFECYCLE, "the session began"
    yield SessionEnded("closed"), ItemKind.LIFECYCLE, "the session ended: closed"
    yield LogRecovered("9 bytes"), ItemKind.LIFECYCLE, "the log was mended after a crash: 9 bytes"
    yield KeyRotated("a", "b"), ItemKind.LIFECYCLE, "another key signs for the log"
    kept = PayloadKept(Origin("s", "s", 3, 1), Content.TERMINAL, "ab", 12, False, "ls\x1b", 1, False)
    yield kept, ItemKind.LIFECYCLE, "12 bytes are kept of the terminal of ls\\x1b, which was longer"
    kept = replace(kept, content=Content.FILE, about="/work/a\n\x1b[2J", is_whole=True)
    yield kept, ItemKind.LIFECYCLE, "12 bytes are kept of the file /work/a\\n\\x1b[2J"
    lost = PayloadLost(Content.REFUSED_FLOW, 3, "too many")
    yield lost, ItemKind.LIFECYCLE, "3 x refused flow was not kept: too many"
    yield PayloadErased("ab", "ann", "asked to"), ItemKind.LIFECYCLE, "content was erased by ann: asked to"
    yield ExecStarted(2, ("sh", "-c", "a b"), "/", 0), ItemKind.TOOL_CALL, "exec 2: sh -c 'a b'"
    yield ExecEnded(2, 256, "", 1, 2, 3, 4), ItemKind.TOOL_CALL, "exec 2 ended with exit code 1"
    yield ExecEnded(2, 9, "", 1, 2, 3, 4), ItemKind.TOOL_CALL, "exec 2 was ended by SIGKILL"
    yield ExecEnded(2, 2**31, "", 1, 2, 3, 4), ItemKind.TOOL_CALL, "exec 2 ended with wait status 2147483648"
    yield ExecEnded(2, 0, "no such file", 1, 2, 3, 4), ItemKind.TOOL_CALL, "exec 2 could not be started: no such file"
    made = ApplyEnded("a", "b", "sha256:0", "/work", Outcome.APPLIED, "")
    yield made, ItemKind.FILE_CHANGE, "the changes were applied"
    taken_back = replace(made, outcome=Outcome.ROLLED_BACK, error="x\x1b: it was changed")
    yield taken_back, ItemKind.FILE_CHANGE, "nothing was changed: x\\x1b: it was changed"
    yield flow(), ItemKind.FLOW, "example.test:443: 10 bytes out, 20 in, 1.5 s"
    yield decision(connect()), ItemKind.SYSTEM_CALL, "net.connect example.test:443"
    yield decision(run("/bin/ls", "-l")), ItemKind.SYSTEM_CALL, "process.exec /bin/ls -l"
    yield decision(syscall("mount"), count=12), ItemKind.SYSTEM_CALL, "kernel.mount (12 times)"
    yield decision(change("/work/a")), ItemKind.FILE_CHANGE, "file.open /work/a"
    answered = decision(connect(), Verdict.DENY, decider="approvals", answered_by="ann", held=2.5)
    yield answered, ItemKind.APPROVAL, "net.connect example.test:443, answered by ann after 2.5 s"
    yes = "question 3 approved by anna after 2.5 s"
    yield approval(), ItemKind.APPROVAL, f"{yes}: net.connect anna"
    granted = approval(scope=Scope.SESSION, through=2)
    yield granted, ItemKind.APPROVAL, f"{yes}, for the session, with question 2: net.connect anna"
    killed = "question 3 denied, with the end of the sandbox, by anna after 2.5 s: net.connect anna"
    yield approval(verdict=Verdict.KILL), ItemKind.APPROVAL, killed
    nobody = "question 3 to persons, nobody answered in time (after 2.5 s): net.connect nobody"
    yield approval("nobody", Ending.TIMED_OUT), ItemKind.APPROVAL, nobody
    gone = "question 3 to persons, whoever tried it was gone before the answer (after 2.5 s): net.connect nobody"
    yield approval("nobody", Ending.WITHDRAWN), ItemKind.APPROVAL, gone
    another = "the session begins under another policy than before, by anna"
    yield PolicyChanged("a", "b", "anna", ("x", "y")), ItemKind.LIFECYCLE, another
    first = "the session begins under a policy that is not known here yet, by anna"
    yield PolicyChanged("", "b", "anna", ()), ItemKind.LIFECYCLE, first
    yield other(Kind.NET_RESOLVE, replace(ENDPOINT, port=0)), ItemKind.FLOW, "net.resolve example.test:0"
    request = other(Kind.HTTP_REQUEST, Request(ENDPOINT, "GET", "/a"))
    yield request, ItemKind.FLOW, "http.request GET example.test:443/a"
    yield other(Kind.MODEL_CALL, ModelCall("m")), ItemKind.REASONING, "model.call m"
    query = other(Kind.DATA_QUERY, Query("db", "select", ("t",)))
    yield query, ItemKind.TOOL_CALL, "data.query select t of db"
    yield other(Kind.SANDBOX_APPLY, Verb(("a",))), ItemKind.FILE_CHANGE, "sandbox.apply a"
    yield other(Kind.SANDBOX_FORK, Verb()), ItemKind.LIFECYCLE, "sandbox.fork "


@pytest.mark.parametrize(("event", "kind", "line"), list(told()), ids=lambda value: type(value).__name__)
def test_what_each_record_is_on_the_time_line(event: Event, kind: ItemKind, line: str) -> None:
    (item,) = Timeline(Shelf(written([event])), "session-1")
    assert (item.kind, item.line) == (kind, line)
    assert item.number == 0 and item.at == START and item.offset == 0.0
    assert item.step == (3 if hasattr(event, "origin") or hasattr(event, "action") else 0)
    assert item.verdict is getattr(event, "verdict", None)


def test_every_kind_of_item_comes_from_some_record() -> None:
    kinds = {kind for _, kind, _ in told()}
    assert kinds == set(ItemKind) - {ItemKind.TERMINAL}, "the terminal comes with its record"


def test_details_say_why_and_who() -> None:
    event = decision(run("/bin/ls", "-l"), Verdict.DENY, "process.deny[1]", decider="behaviour", private=True)
    (item,) = Timeline(Shelf(written([event])), "session-1")
    details = {detail.name: detail.text for detail in item.details}
    assert details["rule"] == "process.deny[1]" and details["decided by"] == "behaviour"
    assert details["reversible"] == "yes"
    assert details["process"] == "/bin/sh (pid 10, inside 2)" and details["arguments"] == "/bin/ls -l"
    assert "neither" in details["private"] and details["record"] == "0; 1 of its session"


def test_only_the_session_that_was_asked_for() -> None:
    one, other = written(session(), "session-1"), written(session(), "session-10")
    mixed = [entry for pair in zip(one, other, strict=True) for entry in pair]
    found = Timeline(Shelf(mixed), "session-10")
    assert [item.number for item in found] == [1, 3, 5, 7] and not found.missing
    with pytest.raises(RequestError, match=r"no record of a session ses\\x1b"):
        Timeline(Shelf(mixed), "ses\x1b")


def test_a_session_that_only_calls_itself_so_is_another() -> None:
    claims = decision(connect('x","correlation_uid":"session-1","'))
    with pytest.raises(RequestError):
        Timeline(Shelf(written([claims], '"session-1"')), "session-1")
    forged = '"metadata":{"correlation_uid":"session-1"},"sequence":9,"unmapped":{"corral":{"at":1,"monotonic":1}}}'
    with pytest.raises(RequestError):
        Timeline(Shelf(written([decision(connect(forged))], "another")), "session-1")


def test_missing_records_are_told() -> None:
    entries = written(session(decision(connect()), flow()))
    found = Timeline(Shelf([*entries[:2], *entries[4:]]), "session-1")
    assert found.missing == 2
    (gap,) = [detail.text for detail in found[2].details if detail.name == "missing"]
    assert gap == "before it, of this session: 3 to 4"
    assert not [detail for detail in found[1].details if detail.name == "missing"]


def test_a_record_of_an_unknown_event_is_told_as_such() -> None:
    entries = written(session())
    entries[1] = entries[1].replace(b'"exec.started"', b'"exec.unknown"')
    found = Timeline(Shelf(entries), "session-1")
    assert len(found) == 4 and not found.missing and not found.unreadable
    assert found[1].line.startswith("this record cannot be read") and found[1].offset == 1.0
    assert found.first_record().sequence == 1


def test_what_is_no_record_is_counted() -> None:
    entries = written(session())
    entries[1] = entries[1][:-1]
    found = Timeline(Shelf(entries), "session-1")
    assert len(found) == 3 and found.missing == found.unreadable == 1


@pytest.mark.parametrize(("number", "unreadable"), [(10**400, 1), (-1, 1), (2**53, 1), (2**53 - 1, 0)])
def test_records_with_impossible_numbers_are_unreadable(number: int, unreadable: int) -> None:
    entries = written(session())
    value = json.loads(entries[1])
    value["unmapped"]["corral"]["at"] = number
    entries[1] = json.dumps(value, separators=(",", ":")).encode()
    assert Timeline(Shelf(entries), "session-1").unreadable == unreadable
    assert len(list(session_records(Shelf(entries)))) == 4 - unreadable


# ---- time ----


def timed(*moments: tuple[float, float]) -> list[float]:
    """Offsets of records at these (wall, monotonic) seconds."""
    entries = [
        encode(SessionEnded(""), CONTEXT, sequence=index + 1, at=START + wall, monotonic_ns=round(monotonic * 1e9))
        for index, (wall, monotonic) in enumerate(moments)
    ]
    return [round(item.offset, 6) for item in Timeline(Shelf(entries), "session-1")]


def test_the_clock_that_nobody_sets_counts() -> None:
    assert timed((0, 50), (3600, 51), (-3600, 52.5)) == [0.0, 1.0, 2.5]


def test_time_does_not_run_backwards() -> None:
    assert timed((0, 50), (1, 49.5), (2, 51)) == [0.0, 0.0, 1.5]


def test_after_another_boot_the_wall_clock_counts() -> None:
    assert timed((0, 5000), (60, 10), (61, 11)) == [0.0, 60.0, 61.0]


@settings(max_examples=50)
@given(st.lists(st.tuples(st.floats(0, 1e6), st.floats(0, 1e6)), min_size=1, max_size=20))
def test_offsets_never_fall(moments: list[tuple[float, float]]) -> None:
    offsets = timed(*moments)
    assert offsets == sorted(offsets) and offsets[0] == 0.0


# ---- long sessions, and a real log ----


def test_items_are_read_when_they_are_asked_for_and_a_tile_at_a_time() -> None:
    entries = written([decision(connect(f"host-{index}.test")) for index in range(3000)])
    shelf = Shelf(entries)
    found = Timeline(shelf, "session-1")
    shelf.read = 0
    assert found[2999].line == "net.connect host-2999.test:443" and found[-1] == found[2999]
    assert shelf.read <= WIDTH
    assert [item.number for item in found[1000:1010]] == list(range(1000, 1010))
    assert shelf.read <= 2 * WIDTH
    assert [item.number for item in found] == list(range(3000))
    assert shelf.read <= 3000 + 4 * WIDTH
    with pytest.raises(IndexError):
        found[3000]


def test_a_log_that_changes_underneath_is_told() -> None:
    shelf = Shelf(written(session()))
    found = Timeline(shelf, "session-1")
    del shelf.all[2:]
    with pytest.raises(LogDamaged, match="record 3"):
        found[3]


def test_of_a_real_log(tmp_path: Path) -> None:
    entries = written(session(*(decision(connect(f"host-{index}.test")) for index in range(300))))
    with open_log(tmp_path / "log") as log:
        for entry in entries:
            log.submit(entry)
        log.seal()
        log.append(written([flow()], "other")[0])
    found = Timeline(Reader(tmp_path / "log"), "session-1")
    assert [item.number for item in found] == list(range(304))
    assert found[299].line == "net.connect host-297.test:443"
    assert found.first_record().context == CONTEXT
    assert len(list(session_records(Reader(tmp_path / "log"), "other"))) == 1


@settings(max_examples=60, deadline=None)
@given(st.text(st.characters(), max_size=60))
def test_whatever_a_record_says_items_are_printable_and_in_their_place(text: str) -> None:
    events: list[Event] = [
        decision(run(text, text), Verdict.DENY, text),
        decision(Action(Kind.NET_CONNECT, Endpoint(Transport.UNIX, path=text), ORIGIN), reason=text),
        flow(text),
        ExecStarted(1, (text, text), text, 0),
        SessionStarted(text, text, text),
        approval(text),
        PolicyChanged(text, text, text, (text, text)),
    ]
    found = Timeline(Shelf(written(events, at=START + 5)), "session-1")
    assert [item.offset for item in found] == [0.0, 1.0, 2.0, 3.0, 4.0, 5.0, 6.0] and not found.missing
    assert [item.at for item in found] == [START + 5 + offset for offset in range(7)]
    for item in found:
        assert item.line.isprintable()
        assert all(detail.text.replace("\n", "").isprintable() and detail.name.isprintable() for detail in item.details)
