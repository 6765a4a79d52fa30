"""Records are canonical JSON, valid OCSF, one line whatever an agent does, and say exactly what happened."""

from __future__ import annotations

import json
from collections.abc import Iterator
from contextlib import suppress
from dataclasses import replace
from hashlib import sha256
from typing import Any

import jsonschema
import pytest
import rfc8785
from hypothesis import given, settings
from hypothesis import strategies as st
from ocsf_json_schema import OcsfJsonSchemaEmbedded, get_ocsf_schema

from corral.actions import (
    Access,
    Action,
    Ancestor,
    Content,
    Decision,
    Endpoint,
    File,
    Flow,
    KernelCall,
    Kind,
    Meaning,
    ModelCall,
    Operation,
    Origin,
    Process,
    Program,
    Query,
    Request,
    Socket,
    Subject,
    ToolCall,
    Transport,
    Used,
    Verb,
    Verdict,
)
from corral.actions import Ending as CallEnding
from corral.approvals.queue import Ending, Scope
from corral.log.approval import action_hash
from corral.log.events import (
    ApplyEnded,
    Approval,
    Event,
    ExecEnded,
    ExecStarted,
    FilesSet,
    KeyRotated,
    LogRecovered,
    Outcome,
    PayloadErased,
    PayloadKept,
    PayloadLost,
    PolicyChanged,
    SessionEnded,
    SessionStarted,
    SnapshotTaken,
)
from corral.log.ocsf import PROFILES, VERSION, Context
from corral.log.records import _who, decode, encode, summary
from corral.log.tiles import MAX_ENTRY
from corral.monitor.plain import to_plain

CONTEXT = Context("coder", "1.2", "policy.yaml", "sha256:" + "0" * 64, "session-1", "box-1", "0.1.0")
HOSTILE = st.text(st.characters(codec=None, exclude_categories=()), max_size=30) | st.sampled_from(
    ["\x1b[2J\x07", "a\nb", "\u202egpj.exe", "\udcff\udc80", "\x00", "\u2028", "</script>", '"\\', "\x9b31m", "é" * 40]
)
NAMES = st.none() | HOSTILE
NUMBERS = st.integers(0, 2**31)
ENDPOINTS = st.builds(
    Endpoint, st.sampled_from(Transport), HOSTILE, st.integers(0, 65535), NAMES, HOSTILE, NAMES, st.booleans()
)
SUBJECTS: dict[Kind, st.SearchStrategy[Any]] = {
    Kind.PROCESS_EXEC: st.builds(
        Program, HOSTILE, st.lists(HOSTILE, max_size=4).map(tuple), st.booleans(), HOSTILE, HOSTILE, HOSTILE
    ),
    Kind.NET_SOCKET: st.builds(Socket, NUMBERS, NUMBERS, NUMBERS),
    Kind.HTTP_REQUEST: st.builds(Request, ENDPOINTS, HOSTILE, HOSTILE, st.sampled_from(Meaning)),
    Kind.MODEL_CALL: st.builds(ModelCall, HOSTILE),
    Kind.DATA_QUERY: st.builds(Query, HOSTILE, HOSTILE, st.lists(HOSTILE, max_size=3).map(tuple)),
    Kind.API_CALL: st.builds(Operation, HOSTILE, HOSTILE, HOSTILE),
    Kind.KERNEL: st.builds(KernelCall, HOSTILE, NUMBERS, HOSTILE, st.booleans()),
}
FILES = st.builds(File, HOSTILE, st.sampled_from(Access), HOSTILE)
VERBS = st.builds(Verb, st.lists(HOSTILE, max_size=3).map(tuple), HOSTILE, HOSTILE, HOSTILE)
PROCESSES = st.builds(
    Process,
    NUMBERS,
    NUMBERS,
    NUMBERS,
    HOSTILE,
    st.lists(HOSTILE, max_size=4).map(tuple),
    st.lists(st.builds(Ancestor, NUMBERS, HOSTILE), max_size=4).map(tuple),
)
ORIGINS = st.builds(Origin, HOSTILE, HOSTILE, NUMBERS, NUMBERS, st.none() | PROCESSES, HOSTILE, st.booleans())
MOMENTS = st.integers(0, 2**52).map(lambda number: number / 1_000_000)


def subjects(kind: Kind) -> st.SearchStrategy[Any]:
    if kind.value.startswith("file."):
        return FILES
    return VERBS if kind.value.startswith("sandbox.") else SUBJECTS.get(kind, ENDPOINTS)


ACTIONS = st.sampled_from(Kind).flatmap(lambda kind: st.builds(Action, st.just(kind), subjects(kind), ORIGINS))
DECISIONS = st.builds(
    Decision,
    ACTIONS,
    st.sampled_from(Verdict),
    HOSTILE,
    HOSTILE,
    HOSTILE,
    HOSTILE,
    NUMBERS,
    MOMENTS,
    st.booleans(),
    NUMBERS,
    MOMENTS,
    HOSTILE,
)
FLOWS = st.builds(
    Flow, ORIGINS, ENDPOINTS, HOSTILE, MOMENTS, MOMENTS, NUMBERS, NUMBERS, NUMBERS, NUMBERS, HOSTILE, HOSTILE, HOSTILE
)
CALLS = st.builds(
    Used,
    ORIGINS,
    st.sampled_from([Kind.MODEL_CALL, Kind.DATA_QUERY, Kind.API_CALL]),
    HOSTILE,
    HOSTILE,
    HOSTILE,
    MOMENTS,
    MOMENTS,
    st.sampled_from(CallEnding),
    MOMENTS,
    st.integers(0, 599),
    HOSTILE,
    *[NUMBERS] * 5,
    HOSTILE,
    *[NUMBERS] * 3,
    st.lists(HOSTILE, max_size=3).map(tuple),
    NUMBERS,
    HOSTILE,
    HOSTILE,
    st.lists(st.builds(ToolCall, HOSTILE, HOSTILE, HOSTILE), max_size=3).map(tuple),
    HOSTILE,
    st.booleans(),
)
LIFE = (
    st.builds(SessionStarted, HOSTILE, HOSTILE, HOSTILE)
    | st.builds(SessionEnded, HOSTILE)
    | st.builds(ExecStarted, NUMBERS, st.lists(HOSTILE, max_size=4).map(tuple), HOSTILE, NUMBERS, NUMBERS)
    | st.builds(ExecEnded, NUMBERS, NUMBERS, HOSTILE, NUMBERS, NUMBERS, NUMBERS, NUMBERS, NUMBERS)
    | st.builds(SnapshotTaken, HOSTILE, HOSTILE, HOSTILE, st.none() | NUMBERS, NUMBERS, NUMBERS)
    | st.builds(FilesSet, HOSTILE)
    | st.builds(ApplyEnded, HOSTILE, HOSTILE, HOSTILE, HOSTILE, st.sampled_from(Outcome), HOSTILE)
    | st.builds(LogRecovered, HOSTILE)
    | st.builds(KeyRotated, HOSTILE, HOSTILE)
    | st.builds(PayloadErased, HOSTILE, HOSTILE, HOSTILE)
    | st.builds(PayloadLost, st.sampled_from(Content), NUMBERS, HOSTILE)
    | st.builds(
        PayloadKept, ORIGINS, st.sampled_from(Content), HOSTILE, NUMBERS, st.booleans(), HOSTILE, NUMBERS, st.booleans()
    )
)
PERSONS = st.builds(
    Approval,
    ORIGINS,
    NUMBERS,
    st.sampled_from(Kind),
    HOSTILE,
    HOSTILE,
    HOSTILE,
    st.sampled_from(Ending),
    st.sampled_from(Verdict),
    st.sampled_from(Scope),
    NUMBERS,
    HOSTILE,
    HOSTILE,
    MOMENTS,
    MOMENTS,
    MOMENTS,
) | st.builds(PolicyChanged, HOSTILE, HOSTILE, HOSTILE, st.lists(HOSTILE, max_size=4).map(tuple))
EVENTS = DECISIONS | FLOWS | CALLS | LIFE | PERSONS


def encoded(event: Event, context: Context = CONTEXT) -> bytes:
    return encode(event, context, sequence=7, at=1_790_000_000.25, monotonic_ns=123_456_789)


def is_text(event: Event) -> bool:
    """Whether all its texts can be written in UTF-8."""
    try:
        json.dumps(to_plain(event)[0], ensure_ascii=False).encode()
    except UnicodeEncodeError:
        return False
    return True


@pytest.fixture(scope="session")
def validators() -> dict[tuple[int, str], Any]:
    """A validator for each class, by its number and the profiles that are used."""
    schema = OcsfJsonSchemaEmbedded(get_ocsf_schema(version=VERSION))
    found = {}
    for uid in (1001, 1003, 1007, 3004, 4001, 4002, 4003, 6002, 6003):
        for profiles in (PROFILES, [*PROFILES, "ai_operation"]):
            name = schema.lookup_class_name_from_uid(class_uid=uid)
            made = schema.get_class_schema(class_name=name, profiles=profiles)
            found[uid, ",".join(profiles)] = jsonschema.Draft202012Validator(made)
    return found


def used(kind: Kind = Kind.MODEL_CALL, **fields: Any) -> Used:
    made = Used(
        Origin("box-1", "session-1", 3, 2, tool="call_0"), kind, "upstream-1", "model-1", "model.allow[0]", 1.5, 2.5,
        CallEnding.ANSWERED, 0.25, 200, "", 100, 20, 7, 3, 1_500_000, "EUR", 4, 1000, 2000, ("hr.people.name",), 4,
        "c0ffee", "cafe", (ToolCall("call_1", "shell", '{"command":["ls"]}'),), "tool_calls", True,
    )  # fmt: skip
    return replace(made, **fields)


def kinds_of_events() -> Iterator[Event]:
    origin = Origin("box-1", "session-1", 3, 2, Process(10, 2, 5, "/bin/sh", ("sh", "-c", "x"), (Ancestor(1, "/x"),)))
    endpoint = Endpoint(Transport.TCP, "192.0.2.1", 443, "example.test", protocol="tls")
    examples: dict[Kind, Subject] = {
        Kind.PROCESS_EXEC: Program("/bin/ls", ("ls", "-l"), digest="ab" * 32),
        Kind.NET_SOCKET: Socket(2, 1, 0),
        Kind.HTTP_REQUEST: Request(endpoint, "GET", "/a"),
        Kind.MODEL_CALL: ModelCall("model-1"),
        Kind.DATA_QUERY: Query("warehouse", "select", ("a", "b")),
        Kind.API_CALL: Operation("tickets", "createTicket", "POST"),
        Kind.KERNEL: KernelCall("mount", 1, "no"),
    }
    for kind in Kind:
        other = (
            File("/a/b", Access.WRITE, "/c" if kind is Kind.FILE_RENAME else "")
            if kind.value.startswith("file.")
            else Verb(("a",))
        )
        subject = examples.get(kind) or (endpoint if kind.value.startswith("net.") else other)
        for verdict in Verdict:
            yield Decision(Action(kind, subject, origin), verdict, "rule", "why", "advice", "policy", 4, 1.5, held=0.25)
        yield Decision(
            Action(kind, subject, replace(origin, process=None)), Verdict.DENY, "rule", "", "", "policy", 4, 1.5
        )
    yield Flow(origin, endpoint, "rule", 1.5, 2.5, 1, 2, 3, 4, "example.test", "ja4", "cd" * 32, True, "eof")
    yield Flow(origin, replace(endpoint, name=None, address=""), "rule", 1.5, 2.5)
    for used_kind in (Kind.MODEL_CALL, Kind.DATA_QUERY, Kind.API_CALL):
        yield Used(origin, used_kind, "", "", "", 1.5, 2.5, CallEnding.ABANDONED)
        for call_ending in CallEnding:
            yield used(used_kind, ending=call_ending, reason="" if call_ending is CallEnding.ANSWERED else "too slow")
    yield SessionStarted("/work", "label", "{}")
    yield SessionEnded("closed")
    yield ExecStarted(1, ("ls", "-l"), "/work", 1000)
    yield ExecEnded(1, 256, "", 1, 2, 3, 4)
    yield from (ApplyEnded("a", "b", "sha256:0", "/work", outcome, "") for outcome in Outcome)
    yield ApplyEnded("", "b", "sha256:0", "/work", Outcome.ROLLED_BACK, "it was changed")
    yield from (SnapshotTaken("a", "name", "b", step, 3, 4096) for step in (None, 0, 7))
    yield FilesSet("a")
    yield LogRecovered("12 bytes were cut off")
    yield KeyRotated("a", "b")
    yield PayloadKept(origin, Content.TERMINAL, "hmac-sha256:ab", 12, False, "ls -l", 1_800_000_000, False)
    yield PayloadKept(
        Origin("box-1", "session-1"), Content.REFUSED_FLOW, "hmac-sha256:ab", 1, True, "192.0.2.1", 1, True
    )
    yield PayloadLost(Content.REFUSED_FLOW, 3, "too many")
    yield PayloadErased("ab", "me", "asked to")
    for ending, verdict in ((Ending.ANSWERED, Verdict.ALLOW), (Ending.TIMED_OUT, Verdict.DENY)):
        yield Approval(
            origin, 3, Kind.NET_CONNECT, "sha256:ab", "net.connect x", "rule", ending, verdict, Scope.SESSION, 3,
            "anna (uid 1000, pid 7)", "", 1.5, 2.5, 300.0,
        )  # fmt: skip
    yield PolicyChanged("sha256:ab", "sha256:cd", "anna", ("network.allow: added 1",))
    yield PolicyChanged("", "sha256:cd", "anna", ())


@pytest.mark.parametrize("event", list(kinds_of_events()), ids=lambda event: type(event).__name__)
def test_every_kind_of_record_is_valid_ocsf(event: Event, validators: dict[tuple[int, str], Any]) -> None:
    record = json.loads(encoded(event))
    validators[record["class_uid"], ",".join(record["metadata"]["profiles"])].validate(record)
    assert record["type_uid"] // 100 == record["class_uid"]
    assert record["class_uid"] // 1000 == record["category_uid"]


@settings(max_examples=150)
@given(EVENTS)
def test_records_are_canonical_and_one_line(event: Event) -> None:
    entry = encoded(event)
    assert rfc8785.dumps(json.loads(entry)) == entry
    assert not any(byte < 0x20 for byte in entry)
    assert len(entry) <= MAX_ENTRY


@settings(max_examples=150)
@given(EVENTS)
def test_what_was_written_is_read(event: Event) -> None:
    record = decode(encoded(event))
    assert (record.context, record.sequence) == (CONTEXT, 7)
    assert (record.at, record.monotonic) == (1_790_000_000_250_000, 123_456)
    if is_text(event):
        assert record.cut == frozenset()
        assert record.event == event
    else:
        assert type(record.event) is type(event)
        assert record.cut


@settings(max_examples=100)
@given(EVENTS)
def test_a_summary_says_the_same_as_the_whole(event: Event) -> None:
    entry = encoded(event)
    short, whole = summary(entry), decode(entry)
    assert (short.sequence, short.at, short.session) == (7, whole.at, whole.context.session)
    if isinstance(whole.event, Approval):
        assert (short.action, short.by) == ("approval", whole.event.by)
        assert short.verdict == whole.event.verdict.name.lower()
    if isinstance(whole.event, Decision):
        decision = whole.event
        assert short.action == decision.action.name
        assert short.verdict == decision.verdict.name.lower()
        assert (short.rule, short.step) == (decision.rule, decision.action.origin.step)
    if isinstance(whole.event, ExecStarted | ExecEnded):
        assert (short.exec, short.step) == (whole.event.exec, whole.event.step)


def test_the_hash_of_an_action_can_be_computed_from_the_record_of_its_decision() -> None:
    """By whoever has the record: it ties an approval to what was approved."""
    decision = next(each for each in kinds_of_events() if isinstance(each, Decision))
    for action in (decision.action, replace(decision.action, origin=Origin("other", "other"))):
        own = json.loads(encoded(replace(decision, action=action)))["unmapped"]["corral"]["fields"]
        form = rfc8785.dumps({"kind": own["kind"], "subject": own["subject"]})
        assert action_hash(action) == f"sha256:{sha256(form).hexdigest()}"


def test_the_hash_of_an_action_is_of_all_of_it() -> None:
    """A record cuts what is long and what is no text; two actions that differ there only are two."""
    programs = [
        Program("/bin/sh", ("sh", "x" * 100_000 + end, *("y",) * 1000, other))
        for end, other in (("a", "\udcff"), ("b", "\udcff"), ("a", "\udcfe"), ("a", "\ufffd"))
    ]
    assert len({action_hash(Action(Kind.PROCESS_EXEC, each, Origin("b", "s"))) for each in programs}) == 4


def test_ten_mebibytes_of_arguments_are_cut_and_said_to_be() -> None:
    argv = ("sh", "\x1b" * (5 << 20), *(["\n" * 1000] * 5000))
    process = Process(1, 1, 1, "/bin/sh", argv, tuple(Ancestor(1, "\0" * 4096) for _ in range(300)))
    origin = Origin("box", "session", 0, 0, process)
    action = Action(Kind.PROCESS_EXEC, Program("/bin/sh", argv), origin)
    decision = Decision(action, Verdict.ALLOW, "r" * 9999, "w" * 9999, "a" * 9999, "policy", 1, 1.0)
    entry = encoded(decision)
    assert len(entry) <= MAX_ENTRY
    record = decode(entry)
    assert {"subject", "origin", "rule", "reason", "advice"} <= record.cut
    assert json.loads(entry)["metadata"]["is_truncated"] is True


def test_tool_calls_of_any_length_are_cut_and_each_is_still_named() -> None:
    """The whole is in the answer, which may be kept beside the log."""
    calls = tuple(ToolCall(f"call_{at}", "write", "ä\n" * 1_000_000) for at in range(8))
    entry = encoded(used(tools=calls, reason="r" * 10_000, input_tokens=2**70))
    record = decode(entry)
    assert isinstance(record.event, Used)
    assert [each.id for each in record.event.tools] == [each.id for each in calls]
    assert all(each.arguments and calls[0].arguments.startswith(each.arguments) for each in record.event.tools)
    assert record.cut == {"tools", "reason"}
    assert rfc8785.dumps(json.loads(entry)) == entry
    many = tuple(ToolCall("i" * 4096, "n" * 256, "\x1b" * 10_000) for _ in range(256))
    entry = encoded(used(tools=many, personal=("\u202e" * 5000,) * 300, conversation="c" * 10_000))
    assert len(entry) <= MAX_ENTRY
    assert "tools" in decode(entry).cut


def test_a_summary_says_what_brokers_were_used_for() -> None:
    found = summary(encoded(used()))
    assert (found.event, found.action, found.class_uid) == ("used", "model.call", 6003)
    assert (found.source, found.model, found.conversation) == ("upstream-1", "model-1", "c0ffee")
    assert (found.input_tokens, found.output_tokens, found.cost, found.currency) == (100, 20, 1_500_000, "EUR")
    assert (found.step, found.opened, found.tool, found.unexplained) == (3, 4, "call_0", 0)
    operation = Action(Kind.API_CALL, Operation("tickets", "list", "GET"), Origin("b", "s", unexplained=True))
    asked = summary(encoded(Decision(operation, Verdict.ALLOW, "", "", "", "policy", 1, 1.0)))
    assert (asked.source, asked.model, asked.unexplained) == ("tickets", "list", 1)


def test_a_record_without_the_fields_that_origins_have_got_since_is_read() -> None:
    event = next(kinds_of_events())
    entry = encoded(event)
    older = entry.replace(b',"tool":""', b"").replace(b',"unexplained":false', b"")
    assert len(older) < len(entry)
    assert decode(older).event == event
    kept = PayloadKept(Origin("b", "s"), Content.TERMINAL, "hmac-sha256:ab", 1, True, "x", 1, True)
    older = encoded(kept).replace(b'"call":0,', b"")
    assert b'"call"' not in older and decode(older).event == kept


def test_what_an_agent_says_at_length_is_not_kept() -> None:
    """Actors are kept encoded for the next record; how large they are is not for an agent to say."""
    _who.cache_clear()
    for number in range(100):
        process = Process(number, 1, 1, "/bin/sh", ("sh", "x" * 100_000), ())
        action = Action(Kind.PROCESS_EXEC, Program("/bin/sh", ()), Origin("box", "session", 0, 0, process))
        decision = Decision(action, Verdict.ALLOW, "", "", "", "policy", 1, 1.0)
        assert encoded(decision)
    assert _who.cache_info().currsize == 0
    for _ in range(2):
        assert encoded(replace(decision, action=replace(action, origin=Origin("box", "session"))))
    assert _who.cache_info().currsize == 1


def test_a_context_that_is_no_text_is_written_all_the_same() -> None:
    entry = encoded(SessionEnded("x"), replace(CONTEXT, sandbox="\udcff"))
    assert decode(entry).context.sandbox == "\ufffd"


@settings(max_examples=100)
@given(
    st.binary(max_size=200)
    | st.recursive(st.none() | st.integers() | st.text(), st.lists).map(lambda value: json.dumps(value).encode())
)
def test_what_is_no_record_is_refused(entry: bytes) -> None:
    for read in (decode, summary):
        with pytest.raises((ValueError, RecursionError), match=None):
            read(entry)


@settings(max_examples=100)
@given(st.data())
def test_a_record_that_was_altered_is_refused_or_read_as_what_it_says(data: st.DataObject) -> None:
    values = json.loads(encoded(next(kinds_of_events())))
    own = values["unmapped"]["corral"]
    place = data.draw(st.sampled_from([values, own, own["fields"], own["fields"]["origin"], values["metadata"]]))
    name = data.draw(st.sampled_from(sorted(place)))
    place[name] = data.draw(st.none() | st.integers() | st.text(max_size=3) | st.just([]) | st.just({}))
    for read in (decode, summary):
        with suppress(ValueError):
            read(json.dumps(values).encode())


def test_a_name_that_is_given_twice_is_refused() -> None:
    entry = encoded(SessionEnded("x"))
    with pytest.raises(ValueError, match="twice"):
        decode(entry[:-1] + b',"time":1}')


def test_records_of_before_an_exec_had_a_step_are_read_all_the_same() -> None:
    for event in (ExecStarted(3, ("ls",), "/work", 1000), ExecEnded(3, 0, "", 1, 2, 3, 4)):
        entry = encoded(event)
        older = entry.replace(b',"step":0', b"")
        assert older != entry
        assert decode(older).event == event
        assert summary(older).step == 0


def test_records_say_whether_it_can_be_taken_back_and_older_ones_are_read_all_the_same() -> None:
    request = Request(Endpoint(Transport.TCP, "192.0.2.1", 443), "GET", "/a")

    def entry_of(subject: Request) -> tuple[Decision, bytes]:
        action = Action(Kind.HTTP_REQUEST, subject, Origin("box-1", "session-1"))
        event = Decision(action, Verdict.ALLOW, "rule", "", "", "policy", 4, 1.5)
        return event, encoded(event)

    for subject, word in ((request, "yes"), (replace(request, meaning=Meaning.OVERRIDDEN), "no")):
        event, entry = entry_of(subject)
        assert json.loads(entry)["unmapped"]["corral"]["fields"]["reversible"] == word
        assert decode(entry).event == event
    event, entry = entry_of(request)
    older = entry.replace(b'"reversible":"yes",', b"").replace(b'"meaning":"method",', b"")
    assert b"meaning" not in older and b"reversible" not in older
    assert decode(older).event == event
