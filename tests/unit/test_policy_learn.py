"""Records as JSON lines, and the policy that is proposed from them."""

from __future__ import annotations

import io
import json
import os
from contextlib import suppress
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from corral.actions import (
    Access,
    Action,
    Ancestor,
    Decision,
    Endpoint,
    File,
    KernelCall,
    Kind,
    ModelCall,
    Operation,
    Origin,
    Process,
    Program,
    Query,
    Request,
    Socket,
    Subject,
    Transport,
    Verb,
    Verdict,
)
from corral.errors import RequestError
from corral.monitor.jsonl import MAX_LINE, JsonLines, decode, encode, read_records
from corral.policy import fields
from corral.policy.learn import learn
from corral.policy.load import parse_policy
from corral.policy.model import NetworkRule, Permit, Policy, RequestRule
from corral.policy.part import RESOLVER_RULE, PolicyPart
from tests.unit.recorded import used

ALLOW, ASK, DENY, KILL = Verdict.ALLOW, Verdict.ASK, Verdict.DENY, Verdict.KILL
TCP, UDP, UNIX = Transport.TCP, Transport.UDP, Transport.UNIX
ORIGIN = Origin(
    "box", "session", 2, 3, Process(100, 4, 12345, "/usr/bin/python3", ("python3", "x.py"), (Ancestor(2, "/bin/sh"),))
)


def decision(kind: Any, subject: Any, verdict: Verdict = ALLOW, **how: Any) -> Decision:
    values: dict[str, Any] = {"rule": "r", "reason": "", "advice": "", "decider": "policy", "number": 1, "at": 1.5}
    return Decision(Action(kind, subject, ORIGIN), verdict, **values | how)


# ---- what may be tried ----

texts = st.text(max_size=8)
words = st.text(st.one_of(st.sampled_from('ab*?\\/"#: -\n'), st.characters()), max_size=6)
names = st.sampled_from(("a.org", "b.org", "x.a.org", "xn--zca.de"))
ports = st.integers(0, 3)
local = st.sampled_from(("127.0.0.1", "127.0.0.2", "0.0.0.0", "::1", "::"))
remote = st.sampled_from(("192.0.2.1", "192.0.2.2", "2001:db8::1"))
inet = st.one_of(
    st.builds(Endpoint, st.sampled_from((TCP, UDP)), local, ports, protocol=st.sampled_from((None, "tls"))),
    st.builds(Endpoint, st.sampled_from((TCP, UDP)), remote, ports, st.one_of(st.none(), names)),
    st.builds(Endpoint, st.just(TCP), st.just(""), ports, names),
)
unix = st.builds(Endpoint, st.just(UNIX), path=st.sampled_from(("/x", "@x", "")))
program_paths = st.sampled_from(("/bin/a", "/bin/b*", "/bin/?", "/bin/c\\d", "/opt/\u00e9 #/x", "/bin/**"))
programs = st.builds(
    Program, program_paths, st.lists(words, min_size=0, max_size=3).map(tuple), st.booleans(), st.just("/bin/sh")
)
plain_words = st.text("ab*?\\.", min_size=1, max_size=4)
attempts = st.one_of(
    st.tuples(st.sampled_from((Kind.NET_CONNECT, Kind.NET_SEND)), st.one_of(inet, inet, unix)),
    st.tuples(st.just(Kind.HTTP_REQUEST), st.builds(Request, inet, st.just("GET"), texts)),
    st.tuples(st.just(Kind.NET_RESOLVE), st.builds(Endpoint, st.just(UDP), name=names)),
    st.tuples(st.sampled_from((Kind.NET_BIND, Kind.NET_LISTEN)), inet),
    st.tuples(st.just(Kind.PROCESS_EXEC), programs),
    st.tuples(st.just(Kind.MODEL_CALL), st.builds(ModelCall, plain_words)),
    st.tuples(
        st.just(Kind.DATA_QUERY),
        st.builds(
            Query,
            st.sampled_from("st"),
            st.sampled_from(("select", "insert")),
            st.lists(plain_words, max_size=2).map(tuple),
        ),
    ),
    st.tuples(
        st.just(Kind.API_CALL),
        st.builds(Operation, st.sampled_from("st"), plain_words, st.sampled_from(("GET", "POST"))),
    ),
    st.tuples(st.just(Kind.KERNEL), st.builds(KernelCall, st.sampled_from(("mount", "bpf")), st.just(1), texts)),
    st.tuples(st.just(Kind.NET_SOCKET), st.builds(Socket, st.just(17), st.just(3), st.just(0))),
    st.tuples(st.just(Kind.FILE_OPEN), st.builds(File, program_paths, st.sampled_from(Access))),
    st.tuples(st.just(Kind.SANDBOX_APPLY), st.builds(Verb, st.lists(texts, max_size=2).map(tuple))),
)
decisions = st.builds(
    lambda attempt, verdict, decider: decision(attempt[0], attempt[1], verdict, decider=decider, rule="r", count=2),
    attempts,
    st.sampled_from((ALLOW, ALLOW, ALLOW, DENY, KILL)),
    st.sampled_from(("policy", "policy", "approvals", "autonomy")),
)


# ---- JSON lines ----


@given(decisions, texts, texts, st.booleans(), st.floats(0, 1e12), st.one_of(st.none(), st.just(ORIGIN.process)))
def test_a_decision_comes_back_as_it_was(
    found: Decision, reason: str, by: str, private: bool, at: float, process: Process | None
) -> None:
    action = replace(found.action, origin=replace(ORIGIN, process=process))
    whole = replace(found, action=action, reason=reason, answered_by=by, private=private, at=at, held=at)
    line = encode(whole)
    assert decode(line) == (whole, frozenset())
    assert line.isascii() and line.endswith(b"\n") and line.count(b"\n") == 1
    assert all(byte >= 32 for byte in line[:-1])


def test_the_format_is_what_the_documentation_says() -> None:
    found = decision(Kind.NET_CONNECT, Endpoint(TCP, "192.0.2.1", 443), DENY, reason="no", count=3)
    assert json.loads(encode(found)) == {
        "version": 4,
        "number": 1,
        "at": 1.5,
        "action": "net.connect",
        "kind": "net.connect",
        "reversible": "yes",
        "verdict": "deny",
        "rule": "r",
        "reason": "no",
        "advice": "",
        "decider": "policy",
        "private": False,
        "count": 3,
        "held": 0.0,
        "answered_by": "",
        "subject": {
            "transport": "tcp",
            "address": "192.0.2.1",
            "port": 443,
            "name": None,
            "path": "",
            "protocol": None,
            "protected": False,
        },
        "origin": {
            "sandbox": "box",
            "session": "session",
            "step": 2,
            "exec": 3,
            "process": {
                "pid": 100,
                "inner_pid": 4,
                "started": 12345,
                "exe": "/usr/bin/python3",
                "argv": ["python3", "x.py"],
                "ancestors": [{"pid": 2, "exe": "/bin/sh"}],
            },
            "tool": "",
            "unexplained": False,
        },
        "cut": [],
    }


def test_a_record_of_before_says_nothing_of_tools() -> None:
    found = decision(Kind.NET_CONNECT, Endpoint(TCP, "192.0.2.1", 443))
    fields = json.loads(encode(found))
    del fields["origin"]["tool"], fields["origin"]["unexplained"]
    assert decode(json.dumps(fields).encode() + b"\n") == (found, frozenset())


def test_bytes_of_a_path_that_are_no_text_come_back() -> None:
    found = decision(Kind.FILE_OPEN, File(os.fsdecode(b"/work/\xff\x1b[2J"), Access.READ))
    line = encode(found)
    assert b"\x1b" not in line and decode(line) == (found, frozenset())


def test_a_line_is_bounded_whatever_the_agent_does() -> None:
    huge = "\U0001f600" * 100_000
    process = Process(1, 1, 1, huge, (huge,) * 1000, (Ancestor(1, huge),) * 1000)
    for subject in (
        Program(huge, (huge,) * 1000, interpreter=huge),
        Program("/x", ("a" * 100,) * 100_000),
        Program("/x", ("",) * 100_000),
        Request(Endpoint(TCP, huge, 1, huge, huge, huge), huge, huge),
        Query(huge, huge, (huge,) * 1000),
    ):
        kind = {Program: Kind.PROCESS_EXEC, Request: Kind.HTTP_REQUEST, Query: Kind.DATA_QUERY}[type(subject)]
        found = decision(kind, subject, reason=huge, advice=huge, rule=huge, answered_by=huge)
        line = encode(replace(found, action=replace(found.action, origin=Origin(huge, huge, process=process))))
        assert len(line) <= MAX_LINE
        back, cut = decode(line)
        assert cut >= {"subject", "origin", "reason", "rule"} and back.action.kind is kind


def test_the_sink_writes_whole_lines_and_fails_loudly(tmp_path: Path) -> None:
    found = [decision(Kind.PROCESS_EXEC, Program("/x", ("a" * 4000,) * 4), number=n) for n in range(1, 50)]
    path = tmp_path / "record.jsonl"
    fd = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o600)
    try:
        sink = JsonLines(fd)
        for each in found:
            sink.write(each)
        sink.used(used())  # an account; no decision, and nothing to learn from
    finally:
        os.close(fd)
    assert [record.decision for record in read_records(path)] == found
    assert [record.line for record in read_records(path)] == list(range(1, 50))
    last = json.loads(path.read_bytes().splitlines()[-1])
    assert (last["kind"], last["of"], last["input_tokens"]) == ("used", "model.call", 100)
    with pytest.raises(OSError):
        sink.write(found[0])


def broken(**changes: object) -> bytes:
    values = json.loads(encode(decision(Kind.MODEL_CALL, ModelCall("m"))))
    for name, value in changes.items():
        if value is None:
            del values[name]
        else:
            values[name] = value
    return json.dumps(values).encode() + b"\n"


@pytest.mark.parametrize(
    "line",
    [
        b"\n",
        b"{}\n",
        b"[]\n",
        b"null\n",
        b"not json\n",
        b"\xff\n",
        b"[" * 100_000 + b"\n",
        broken().replace(b'"count": 1', b'"count": 1, "count": 1'),
        encode(decision(Kind.MODEL_CALL, ModelCall("m")))[:-1],
        b" " * MAX_LINE + encode(decision(Kind.MODEL_CALL, ModelCall("m"))),
        broken(version=2),
        broken(version=None),
        broken(at=None),
        broken(more=1),
        broken(verdict="maybe"),
        broken(verdict=0),
        broken(kind="net.fly"),
        broken(kind=["model.call"]),
        broken(kind="net.connect"),
        broken(action="net.connect"),
        broken(subject={"model": 1}),
        broken(subject={"model": "m", "more": 1}),
        broken(subject=["m"]),
        broken(count=True),
        broken(count="1"),
        broken(private=0),
        broken(cut=["a"] * 1000),
        broken(origin={"sandbox": "s"}),
        broken().replace(b"1.5", b"NaN"),
        broken().replace(b"1.5", b"1e999"),
        broken().replace(b'"count": 1', b'"count": ' + b"9" * 10_000),
    ],
    ids=lambda line: line[:20].decode("latin-1"),
)
def test_what_is_no_record_is_refused_with_its_line(tmp_path: Path, line: bytes) -> None:
    path = tmp_path / "record.jsonl"
    path.write_bytes(encode(decision(Kind.MODEL_CALL, ModelCall("m"))) + line)
    with pytest.raises(RequestError, match=r"record\.jsonl:2: not a record"):
        list(read_records(path))


@given(st.binary(max_size=200))
def test_no_bytes_make_the_reader_fail_otherwise(data: bytes) -> None:
    with suppress(ValueError, RecursionError):
        decode(data + b"\n")


def test_a_record_that_is_not_there_is_said_so(tmp_path: Path) -> None:
    with pytest.raises(RequestError, match="cannot read the record"):
        list(read_records(tmp_path / "none"))


# ---- learning ----


def learned(*found: Decision, exact: bool = True) -> Policy:
    return parse_policy(learn((each, exact) for each in found), source="/cfg/learned.yaml")


def verdict(policy: Policy, kind: Kind, subject: Subject) -> Verdict:
    return PolicyPart(policy).judge(Action(kind, subject, ORIGIN)).verdict


def destination(subject: Subject) -> Endpoint | None:
    return subject.endpoint if isinstance(subject, Request) else subject if isinstance(subject, Endpoint) else None


def place(endpoint: Endpoint) -> tuple[object, ...]:
    return (
        endpoint.transport,
        {"0.0.0.0": "127.0.0.1", "::": "::1"}.get(endpoint.address, endpoint.address),
        endpoint.port,
    )


def was_done(kind: Kind, subject: Subject, allowed: list[Action]) -> bool:
    """Whether the record has this, or what it cannot be told from: the same destination, fewer of the same tables."""
    if kind in (Kind.FILE_OPEN, Kind.SANDBOX_APPLY):  # not a policy's to refuse
        return True
    for action in allowed:
        other = action.subject
        here, there = destination(subject), destination(other)
        if here and there:
            if kind is Kind.NET_RESOLVE and here.name == there.name:
                return True
            connects = {kind, action.kind}.isdisjoint({Kind.NET_BIND, Kind.NET_LISTEN, Kind.NET_RESOLVE})
            inside = here.address.startswith(("127.", "0.", "::"))
            if connects and inside and here.port and place(here) == place(there):
                return True
            # The connection of a request must be possible: the requests on it are asked for.
            if (
                kind is not Kind.HTTP_REQUEST
                and action.kind is Kind.HTTP_REQUEST
                and ((here.name or here.address, here.port) == (there.name or there.address, there.port))
            ):
                return True
        elif isinstance(subject, Program) and isinstance(other, Program):
            if (subject.path, subject.argv) == (other.path, other.argv) and not other.truncated:
                return True
        elif isinstance(subject, Query) and isinstance(other, Query):
            same = (subject.source, subject.statement) == (other.source, other.statement)
            if same and subject.statement == "select" and subject.tables and {*subject.tables} <= {*other.tables}:
                return True
        elif isinstance(subject, Operation) and isinstance(other, Operation):
            # What has an id has one method: the document's.
            if other.method == "GET" and (subject.service, subject.operation) == (other.service, other.operation):
                return True
        elif isinstance(subject, ModelCall) and subject == other:
            return True
    return False


@settings(deadline=None)
@given(st.lists(decisions, max_size=8), st.lists(attempts, max_size=8))
def test_the_proposal_is_never_wider_than_what_was_done_and_never_refuses_it(
    found: list[Decision], others: list[tuple[Kind, Subject]]
) -> None:
    policy = learned(*found)
    allowed = [each.action for each in found if each.allowed]
    for action in allowed:
        if action.kind is Kind.NET_SOCKET:  # refused to every sandbox
            continue
        if isinstance(action.subject, Request) and not action.subject.endpoint.port:  # no rule can name it
            continue
        assert verdict(policy, action.kind, action.subject) in (ALLOW, ASK), action
    for kind, subject in [*others, *((each.action.kind, each.action.subject) for each in found)]:
        if verdict(policy, kind, subject) is ALLOW:
            assert was_done(kind, subject, allowed), (kind, subject)


CONSEQUENCES: list[tuple[Kind, Subject]] = [
    (Kind.NET_CONNECT, Endpoint(TCP, "192.0.2.1", 443)),
    (Kind.NET_CONNECT, Endpoint(TCP, "198.18.0.1", 443, "a.org")),
    (Kind.NET_SEND, Endpoint(UDP, "192.0.2.1", 123)),
    (Kind.HTTP_REQUEST, Request(Endpoint(TCP, "", 80, "a.org", "", "http"), "POST", "/")),
    (Kind.NET_LISTEN, Endpoint(TCP, "0.0.0.0", 80)),
    (Kind.NET_BIND, Endpoint(TCP, "127.0.0.1", 80)),
    (Kind.NET_CONNECT, Endpoint(UNIX, path="/x")),
    (Kind.KERNEL, KernelCall("bpf", 1, "")),
    (Kind.DATA_QUERY, Query("w", "insert", ("t",))),
    (Kind.DATA_QUERY, Query("w", "select")),
    (Kind.API_CALL, Operation("desk", "close", "POST")),
]


@pytest.mark.parametrize(("kind", "subject"), CONSEQUENCES, ids=str)
def test_what_has_consequences_is_asked_for(kind: Kind, subject: Subject) -> None:
    assert verdict(learned(decision(kind, subject)), kind, subject) is ASK
    assert verdict(learned(), kind, subject) is DENY


HARMLESS: list[tuple[Kind, Subject]] = [
    (Kind.NET_CONNECT, Endpoint(TCP, "127.0.0.1", 8080)),
    (Kind.NET_CONNECT, Endpoint(TCP, "0.0.0.0", 8080)),
    (Kind.NET_CONNECT, Endpoint(TCP, "::ffff:127.0.0.1", 8080)),
    (Kind.PROCESS_EXEC, Program("/bin/a", ("a", "-x"))),
    (Kind.MODEL_CALL, ModelCall("m*")),
    (Kind.DATA_QUERY, Query("w", "select", ("t", "u"))),
    (Kind.API_CALL, Operation("desk", "GET /a/{id}", "GET")),
    (Kind.NET_RESOLVE, Endpoint(UDP, name="a.org")),
]


@pytest.mark.parametrize(("kind", "subject"), HARMLESS, ids=str)
def test_what_has_none_is_allowed_and_nothing_beside_it(kind: Kind, subject: Subject) -> None:
    policy = learned(decision(kind, subject))
    assert verdict(policy, kind, subject) is ALLOW
    assert verdict(learned(), kind, subject) is DENY
    beside: dict[type[Any], Subject] = {
        Endpoint: Endpoint(TCP, "127.0.0.1", 8081),
        Program: Program("/bin/a", ("a", "-y")),
        ModelCall: ModelCall("mm"),
        Query: Query("w", "select", ("t", "v")),
        Operation: Operation("desk", "GET /a/{x}", "GET"),
    }
    if kind is not Kind.NET_RESOLVE:
        assert verdict(policy, kind, beside[type(subject)]) is DENY
    asked = learned(decision(kind, subject, decider="approvals", answered_by="me"))
    mixed = learned(decision(kind, subject), decision(kind, subject, DENY))
    if kind is not Kind.NET_RESOLVE:
        assert verdict(asked, kind, subject) is verdict(mixed, kind, subject) is ASK


def test_the_way_to_a_broker_is_no_destination() -> None:
    name = "model.corral.internal"
    found = [
        decision(Kind.NET_RESOLVE, Endpoint(UDP, name=name), rule="model (broker)"),
        decision(Kind.NET_CONNECT, Endpoint(TCP, "198.18.0.1", 80, name), rule="model (broker)"),
        decision(Kind.MODEL_CALL, ModelCall("m")),
    ]
    policy = learned(*found)
    assert policy.network.allow == policy.network.ask == ()
    assert [rule.name for rule in policy.model.allow] == ["m"]
    refused = learn([(decision(Kind.NET_CONNECT, Endpoint(TCP, "", 443, name), DENY, rule="model (broker)"), True)])
    assert "#   1 x net.connect model.corral.internal:443: model (broker)" in refused


def gateway(name: str, port: int, spoken: str | None, address: str = "", **how: Any) -> Decision:
    return decision(Kind.NET_CONNECT, Endpoint(TCP, address, port, name, protocol=spoken, **how))


def test_what_the_gateway_heard_is_the_protocol_of_the_rule() -> None:
    policy = learned(
        gateway("a.org", 443, None),
        gateway("a.org", 443, "tls", "192.0.2.1"),
        gateway("a.org", 443, "tls", "2001:db8::1"),
        gateway("b.org", 22, "ssh", "192.0.2.2"),
        gateway("c.org", 80, "h2c", "192.0.2.3"),
        gateway("d.org", 25, None),
    )
    assert policy.network.allow == ()
    assert policy.network.ask == (
        NetworkRule("a.org", ports=((443, 443),), protocol="tls"),
        NetworkRule("b.org", ports=((22, 22),), protocol="ssh"),
        NetworkRule("c.org", ports=((80, 80),), protocol="http", permit=(Permit.H2C,)),
        NetworkRule("d.org", ports=((25, 25),), protocol="tcp"),
    )


def test_the_address_is_learned_where_only_a_rule_that_names_it_allows_it() -> None:
    inner = gateway("db.corp", 443, "tls", "10.0.0.1", protected=True)
    policy = learned(inner, gateway("host.corp", 443, "tls", "127.0.0.1", protected=True))
    assert [(rule.name, rule.network) for rule in policy.network.ask] == [
        ("db.corp", "10.0.0.1/32"),
        ("host.corp", "127.0.0.1/32"),
    ]
    assert verdict(policy, Kind.NET_CONNECT, inner.action.subject) is ASK
    moved = Endpoint(TCP, "10.0.0.2", 443, "db.corp", protocol="tls", protected=True)
    assert verdict(policy, Kind.NET_CONNECT, moved) is DENY


def test_requests_are_learned_by_method_and_path() -> None:
    endpoint = Endpoint(TCP, "192.0.2.1", 443, "a.org", protocol="tls")
    made = [("GET", "/a"), ("GET", "/a"), ("POST", "/b/*"), ("GET", "/c%2fd"), ("get", "/e")]
    found = [decision(Kind.HTTP_REQUEST, Request(endpoint, *each)) for each in made]
    policy = learned(gateway("a.org", 443, "tls", "192.0.2.1"), *found)
    (rule,) = policy.network.ask
    assert set(rule.requests) == {
        RequestRule(("GET",), "/a"),
        RequestRule(("POST",), "/b/\\*"),
        RequestRule(("GET",), "/**"),  # the slash that was encoded cannot be written
        RequestRule((), "/e"),
    }
    many = [decision(Kind.HTTP_REQUEST, Request(endpoint, "PUT", f"/{n}")) for n in range(5000)]
    assert learned(*many).network.ask[0].requests == (RequestRule(("PUT",)),)


def test_a_run_of_very_many_requests_makes_a_policy_that_loads() -> None:
    found = [
        decision(Kind.HTTP_REQUEST, Request(Endpoint(TCP, "", 443, f"h{h}.org", protocol="tls"), "GET", f"/{n}"))
        for h in range(200)
        for n in range(50)
    ]
    rules = learned(*found).network.ask
    assert len(rules) == 200 and sum(len(rule.requests) for rule in rules) <= 1000


def test_whom_a_query_was_sent_to_is_not_learned() -> None:
    query = decision(Kind.NET_SEND, Endpoint(UDP, "198.18.0.53", 53), rule=RESOLVER_RULE)
    text = learn([(query, True)])
    assert "198.18" not in text and parse_policy(text, source="p").network.ask == ()


def test_what_was_refused_is_a_comment_with_its_count() -> None:
    refused = decision(Kind.NET_CONNECT, Endpoint(TCP, "192.0.2.1", 443), DENY, rule="network", count=41)
    text = learn([(refused, True), (replace(refused, count=1), True)])
    assert "#   42 x net.connect 192.0.2.1:443: network\n" in text
    assert verdict(parse_policy(text, source="p"), Kind.NET_CONNECT, refused.action.subject) is DENY


def test_files_that_were_asked_for_are_asked_for() -> None:
    found = decision(Kind.FILE_RENAME, File("/work/a*", Access.WRITE, "/work/b"), rule="filesystem.ask[0]")
    assert learned(found).filesystem.ask == ("/work/a\\*", "/work/b")
    assert learned(replace(found, rule="filesystem.watch[0]")).filesystem.ask == ()


@pytest.mark.parametrize(
    ("kind", "subject"),
    [
        (Kind.NET_CONNECT, Endpoint(TCP, "", 443, "*.org")),
        (Kind.NET_CONNECT, Endpoint(TCP, "0.0.0.0/0", 443)),
        (Kind.NET_RESOLVE, Endpoint(UDP, name="*.org")),
        (Kind.PROCESS_EXEC, Program("git", ("git",))),
        (Kind.PROCESS_EXEC, Program("/a/../b", ("b",))),
        (Kind.DATA_QUERY, Query("a b", "select", ("t",))),
        (Kind.KERNEL, KernelCall("no such", 1, "")),
        (Kind.MODEL_CALL, ModelCall("a b\n- c")),
    ],
    ids=str,
)
def test_what_would_be_a_pattern_or_cannot_be_written_is_a_comment(kind: Kind, subject: Subject) -> None:
    text = learn([(decision(kind, subject), True)])
    policy = parse_policy(text, source="p")
    rules = (policy.network, policy.process, policy.model, policy.data)
    assert not any((*each.allow, *each.ask) for each in rules) and not policy.syscalls.ask
    assert "# Was allowed, but there is no rule for it:\n#   1 x " in text


def test_arguments_that_cannot_be_written_are_asked_for() -> None:
    script = Program("/bin/sh", ("sh", "-c", "a\nb\x00\udcff"))
    policy = learned(decision(Kind.PROCESS_EXEC, script))
    assert verdict(policy, Kind.PROCESS_EXEC, script) is ASK
    assert policy.process.allow == () and policy.process.ask[0].argv == ("sh", "-c", "a?b??")
    policy = learned(decision(Kind.PROCESS_EXEC, Program("/bin/x", ("x",))), exact=False)
    assert (policy.process.allow, policy.process.ask[0].argv) == ((), None)


def test_a_run_of_very_many_commands_makes_a_policy_that_loads() -> None:
    found = [decision(Kind.PROCESS_EXEC, Program("/bin/cc", ("cc", f"{n}.c", "x" * 50))) for n in range(5000)]
    found += [decision(Kind.PROCESS_EXEC, Program("/bin/ld", ("ld", str(n)))) for n in range(10)]
    found += [decision(Kind.PROCESS_EXEC, Program(f"/bin/x{n}", ("x", "y" * 4000))) for n in range(90)]
    text = learn((each, True) for each in found)
    policy = parse_policy(text, source="p")
    assert "too many different arguments" in text and len(policy.process.allow) <= fields.MAX_ENTRIES
    assert verdict(policy, Kind.PROCESS_EXEC, Program("/bin/cc", ("cc", "3.c"))) is ASK
    assert verdict(policy, Kind.PROCESS_EXEC, Program("/bin/ld", ("ld", "3"))) is ALLOW


def test_what_an_agent_wrote_cannot_write_the_policy() -> None:
    evil = 'x"]}\n    - "/**"\n#\u2028\u202e'
    found = [decision(Kind.PROCESS_EXEC, Program(f"/bin/{evil}", (evil, evil)))]
    found += [
        decision(Kind.PROCESS_EXEC, Program("/bin/y", (evil, "\u2028", "\u202e"))),
        decision(Kind.PROCESS_EXEC, Program("/bin/x", ("x",)), DENY, rule=evil),
        decision(Kind.MODEL_CALL, ModelCall(evil)),
    ]
    text = learn((each, True) for each in found)
    policy = parse_policy(text, source="p")
    assert all(rule.path != "/**" for rule in (*policy.process.allow, *policy.process.ask))
    assert all(line.isprintable() for line in io.StringIO(text, newline="\n").read().split("\n"))
