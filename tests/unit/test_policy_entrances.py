"""Names of brokers, operations of services, and what a policy says in vain."""

from __future__ import annotations

import json
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from corral.actions import (
    Action,
    Endpoint,
    Kind,
    Operation,
    Opinion,
    Origin,
    Request,
    Transport,
    Verdict,
)
from corral.cli import policy as commands
from corral.gateway.rules import Rules
from corral.policy.doors import Broker, broker_of
from corral.policy.load import parse_policy
from corral.policy.loose_ends import MAX_ENDS, loose_ends
from corral.policy.model import ANY_NAME, Network, NetworkRule, Policy
from corral.policy.part import RESOLVER_RULE, PolicyPart
from corral.policy.terms import Terms
from corral.sandbox.prepare import has_way_out

ALLOW, ASK, DENY = Verdict.ALLOW, Verdict.ASK, Verdict.DENY
TCP, UDP = Transport.TCP, Transport.UDP
OPENS = {
    Broker.MODEL: "model: {upstreams: [{name: u, url: https://a.example, api: openai}]}",
    Broker.DATA: "data: {sources: [{name: s, dialect: sqlite, url: ./s}]}",
    Broker.API: "api: {services: [{name: s, document: ./d, url: https://a.example}]}",
}
ALL = "\n".join(OPENS.values())


def parse(text: str) -> Policy:
    return parse_policy(text, source="/cfg/p.yaml")


def opinion(policy: Policy, kind: Kind, subject: Endpoint | Request | Operation) -> Opinion:
    return PolicyPart(policy).judge(Action(kind, subject, Origin("box", "session")))


def door(broker: Broker, port: int = 80, transport: Transport = TCP) -> Endpoint:
    return Endpoint(transport, "198.18.0.1", port, name=broker.host)


# ---- names of brokers ----


@pytest.mark.parametrize("broker", Broker)
def test_the_name_of_a_broker_that_is_there(broker: Broker) -> None:
    policy = parse(OPENS[broker])
    name = Endpoint(UDP, name=broker.host)
    for kind, subject in ((Kind.NET_RESOLVE, name), (Kind.NET_CONNECT, door(broker))):
        found = opinion(policy, kind, subject)
        assert (found.verdict, found.rule) == (ALLOW, f"{broker.value} (broker)")
    for other in set(Broker) - {broker}:
        for kind, subject in ((Kind.NET_RESOLVE, replace(name, name=other.host)), (Kind.NET_CONNECT, door(other))):
            found = opinion(policy, kind, subject)
            assert (found.verdict, found.rule) == (DENY, f"{other.value} (no broker)")
            assert f"its policy has no `{other.value}." in found.reason
            assert found.advice == f"There is {broker.url}."


@pytest.mark.parametrize(
    ("kind", "subject"),
    [
        (Kind.NET_CONNECT, door(Broker.MODEL, 443)),
        (Kind.NET_CONNECT, door(Broker.MODEL, 0)),
        (Kind.NET_CONNECT, door(Broker.MODEL, 8080)),
        (Kind.NET_CONNECT, door(Broker.MODEL, 80, UDP)),
        (Kind.NET_SEND, door(Broker.MODEL, 80, UDP)),
        (Kind.NET_SEND, door(Broker.MODEL)),
        (Kind.HTTP_REQUEST, Request(door(Broker.MODEL), "GET", "/")),
    ],
)
def test_a_broker_is_asked_by_http_at_its_port_only(kind: Kind, subject: Endpoint | Request) -> None:
    found = opinion(parse(ALL), kind, subject)
    assert found.verdict is DENY
    assert found.reason == "The model broker speaks HTTP at port 80, and nothing else."
    assert found.advice == "Use http://model.corral.internal."


@pytest.mark.parametrize(
    "name", ["corral.internal", "x.corral.internal", "x.model.corral.internal", "mcp.corral.internal"]
)
def test_no_other_name_there_leads_anywhere(name: str) -> None:
    for policy in (parse(ALL), Policy()):
        for kind, subject in (
            (Kind.NET_RESOLVE, Endpoint(UDP, name=name)),
            (Kind.NET_CONNECT, Endpoint(TCP, port=80, name=name)),
        ):
            found = opinion(policy, kind, subject)
            assert (found.verdict, found.rule) == (DENY, "brokers (no such name)")
            assert name in found.reason


@pytest.mark.parametrize("name", ["corral.internal.example", "notcorral.internal", "model.corral.internal.example"])
def test_a_name_that_looks_like_one_is_for_the_rules(name: str) -> None:
    endpoint = Endpoint(TCP, port=80, name=name)
    assert opinion(parse(ALL), Kind.NET_CONNECT, endpoint).rule == "network (nothing allows it)"
    allowed = parse(f"network: {{allow: [{name}]}}")
    assert opinion(allowed, Kind.NET_CONNECT, endpoint).rule == "network.allow[0]"


RULES = [
    *("*.internal", "*.corral.internal", "model.corral.internal", ANY_NAME),
]
"""The last three are in no file: only a policy that was made in some other way has them."""
NETWORK_RULES = st.builds(
    NetworkRule,
    st.sampled_from([None, *RULES]),
    st.sampled_from([None, "198.18.0.0/15", "0.0.0.0/0"]),
    st.sampled_from([(), ((80, 80),), ((1, 65535),)]),
    st.sampled_from([None, "tls", "http", "tcp"]),
    intercept=st.booleans(),
).filter(lambda rule: rule.name is not None or rule.network is not None)
LISTS = st.lists(NETWORK_RULES, max_size=2).map(tuple)


@given(
    st.builds(Network, LISTS, LISTS, LISTS),
    st.sampled_from(list(Verdict)[:3]),
    st.sampled_from([*(broker.host for broker in Broker), "x.corral.internal"]),
    st.integers(79, 81),
    st.sampled_from([Kind.NET_CONNECT, Kind.NET_RESOLVE, Kind.NET_SEND]),
    st.lists(st.sampled_from(list(Broker)), unique=True),
)
def test_no_rule_about_destinations_changes_that(
    network: Network, irreversible: Verdict, name: str, port: int, kind: Kind, opened: list[Broker]
) -> None:
    policy = parse("\n".join(OPENS[broker] for broker in opened))
    endpoint = Endpoint(TCP, "198.18.0.1", port, name=name)
    ruled = replace(policy, network=network, irreversible=irreversible)
    assert opinion(ruled, kind, endpoint) == opinion(policy, kind, endpoint)
    assert PolicyPart(ruled).terms(endpoint) == Terms()
    if (broker := broker_of(name)) is not None:
        assert Rules(ruled).zone(name) == ("" if broker in opened else None)


def test_with_a_broker_there_is_somebody_to_ask_for_names() -> None:
    query = Endpoint(UDP, "192.0.2.53", 53)
    assert opinion(Policy(), Kind.NET_SEND, query).verdict is DENY
    for text in OPENS.values():
        assert opinion(parse(text), Kind.NET_SEND, query).rule == RESOLVER_RULE
    denied = parse(f"{ALL}\nnetwork: {{deny: ['0.0.0.0/0']}}")
    assert opinion(denied, Kind.NET_SEND, query).verdict is DENY


@pytest.mark.parametrize("text", OPENS.values())
def test_a_broker_is_a_way_out(text: str) -> None:
    assert has_way_out(parse(text)) and not has_way_out(Policy())
    assert not has_way_out(parse("model: {allow: ['*']}\ndata: {allow: [s]}\napi: {allow: [s]}"))


# ---- operations of services ----


def called(policy: str, operation: str, method: str, service: str = "desk") -> tuple[Verdict, str]:
    found = opinion(parse(policy), Kind.API_CALL, Operation(service, operation, method))
    return found.verdict, found.rule


@pytest.mark.parametrize(
    ("rules", "operation", "method", "wanted"),
    [
        ("allow: [desk]", "listTickets", "GET", (ALLOW, "api.allow[0]")),
        ("allow: [desk]", "headTickets", "HEAD", (ALLOW, "api.allow[0]")),
        ("allow: [other]", "listTickets", "GET", (DENY, "api (nothing allows it)")),
        ("allow: [Desk]", "listTickets", "GET", (DENY, "api (nothing allows it)")),
        ("", "listTickets", "GET", (DENY, "api (nothing allows it)")),
        ("allow: [{service: desk, operations: ['list*']}]", "listTickets", "GET", (ALLOW, "api.allow[0]")),
        ("allow: [{service: desk, operations: ['list*']}]", "getTicket", "GET", (DENY, "api (nothing allows it)")),
        ("allow: [{service: desk, operations: ['list*']}]", "relist", "GET", (DENY, "api (nothing allows it)")),
        ("allow: [{service: desk, operations: ['GET /t/*']}]", "GET /t/{id}", "GET", (ALLOW, "api.allow[0]")),
        # A write that nobody named is put to a person: neither a service nor a glob is its name.
        ("allow: [desk]", "close", "POST", (ASK, "irreversible")),
        ("allow: [{service: desk, operations: ['clos*']}]", "close", "POST", (ASK, "irreversible")),
        ("allow: [{service: desk, operations: ['*', open]}]", "close", "POST", (ASK, "irreversible")),
        ("allow: [{service: desk, operations: [close]}]", "close", "POST", (ALLOW, "api.allow[0]")),
        ("allow: [desk, {service: desk, operations: [close]}]", "close", "DELETE", (ALLOW, "api.allow[0]")),
        ("allow: [{service: other, operations: [close]}, desk]", "close", "POST", (ASK, "irreversible")),
        ("ask: [{service: desk, operations: [close]}]", "close", "POST", (ASK, "api.ask[0]")),
        ("allow: [desk], ask: [desk]", "listTickets", "GET", (ASK, "api.ask[0]")),
        ("allow: [{service: desk, operations: [close]}], deny: [{service: desk, operations: ['c*']}]", "close", "GET",
         (DENY, "api.deny[0]")),
        # What nothing allows is denied, not asked for.
        ("allow: [other]", "close", "POST", (DENY, "api (nothing allows it)")),
        # A method is what it says in capital letters, and what is not known writes.
        ("allow: [desk]", "listTickets", "get", (ASK, "irreversible")),
        ("allow: [desk]", "listTickets", "", (ASK, "irreversible")),
    ],
)  # fmt: skip
def test_an_operation(rules: str, operation: str, method: str, wanted: tuple[Verdict, str]) -> None:
    assert called(f"api: {{{rules}}}", operation, method) == wanted


@pytest.mark.parametrize(("answer", "verdict"), [("allow", ALLOW), ("ask", ASK), ("deny", DENY)])
def test_what_becomes_of_a_write_that_is_not_named(answer: str, verdict: Verdict) -> None:
    assert called(f"irreversible: {answer}\napi: {{allow: [desk]}}", "close", "POST")[0] is verdict
    named = f"irreversible: {answer}\napi: {{allow: [{{service: desk, operations: [close]}}]}}"
    assert called(named, "close", "POST")[0] is ALLOW
    assert called(f"irreversible: {answer}\napi: {{allow: [desk]}}", "list", "GET")[0] is ALLOW


def test_a_refusal_says_what_was_not_allowed() -> None:
    found = opinion(parse("api: {allow: [desk]}"), Kind.API_CALL, Operation("desk", "close", "POST"))
    assert "no rule of the policy names its operation: `operations: [close]`" in found.reason
    found = opinion(Policy(), Kind.API_CALL, Operation("desk", "close", "POST"))
    assert found.reason == "This sandbox may not use close of desk: no rule of its policy allows it."


_GLOBS = st.lists(st.sampled_from(["*", "c*", "close", "open"]), max_size=2)


def _rule_lists() -> Iterator[st.SearchStrategy[list[dict[str, object]]]]:
    for _ in range(4):
        yield st.lists(
            st.builds(
                lambda service, globs: {"service": service} | ({"operations": globs} if globs else {}),
                st.sampled_from(["desk", "other"]),
                _GLOBS,
            ),
            max_size=2,
        )


@given(*_rule_lists(), st.sampled_from(["close", "open"]), st.sampled_from(["GET", "POST"]))
def test_one_more_denial_is_never_milder(
    allow: list[object], ask: list[object], deny: list[object], more: list[object], operation: str, method: str
) -> None:
    text = "api: {{allow: {}, ask: {}, deny: {}}}"
    before = called(text.format(allow, ask, deny), operation, method)[0]
    after = called(text.format(allow, ask, [*deny, *more]), operation, method)[0]
    assert after >= before


# ---- what nothing will come of ----

MODELS = "model: {allow: [%s], upstreams: [{name: u, url: https://a.example, api: openai, models: [gpt-*]}]%s}"
TABLES = "tables: [{name: public.t, columns: [a]}]"
DATA = f"data: {{allow: [%s], sources: [{{name: s, dialect: sqlite, url: /srv/s.db, {TABLES}}}]}}"
SERVICES = "api: {allow: [%s], services: [{name: s, document: ./d, url: https://a.example, operations: [list, close]}]}"
PRICED = ", session: {money: 5}, prices: [{model: 'gpt-4*', input: 1, output: 1}]"


@pytest.mark.parametrize(
    ("text", "ends"),
    [
        ("", []),
        ("model: {deny: ['*']}\ndata: {deny: [x]}\napi: {deny: [x]}", []),
        (
            "model: {allow: ['*']}",
            ["model: models are allowed, but there are no `upstreams`: there is no model broker to ask"],
        ),
        ("data: {ask: [s]}", ["data: queries are allowed, but there are no `sources`: there is no data broker to ask"]),
        (
            "api: {ask: [s]}",
            ["api: operations are allowed, but there are no `services`: there is no API broker to ask"],
        ),
        (MODELS % ("gpt-*", ""), []),
        (MODELS % ("gpt-4", ""), []),
        (MODELS % ("", ""), ["model.upstreams: no rule of model.allow or model.ask lets any model be asked"]),
        (MODELS % ("gpt-*, claude", ""), ["model.allow[1]: no upstream has the model claude"]),
        (MODELS % ("gpt-4x", PRICED), []),
        (
            MODELS % ("gpt-*", PRICED),
            ["model.allow[0]: there is a budget of money, and no price for all of gpt-*: what has none is refused"],
        ),
        (
            MODELS % ("gpt-5", PRICED.replace("session", "agent")),
            ["model.allow[0]: there is a budget of money, and no price for all of gpt-5: what has none is refused"],
        ),
        (DATA % "s", []),
        (DATA % "{source: s, tables: ['public.*']}", []),
        (DATA % "{source: s, tables: [t]}", ["data.allow[0]: s has no table t"]),
        (
            DATA % "x",
            [
                "data.allow[0]: there is no source of the name x",
                "data.sources[0]: no rule of data.allow or data.ask lets s be queried",
            ],
        ),
        (
            "data: {allow: [s], sources: [{name: s, dialect: sqlite, url: ./s}]}",
            ["data.sources[0]: s has no tables, so nothing of it can be queried"],
        ),
        (SERVICES % "s", []),
        (SERVICES % "{service: s, operations: ['l*', close]}", []),
        (SERVICES % "{service: s, operations: [purge]}", ["api.allow[0]: s has no operation purge"]),
        (
            SERVICES % "",
            ["api.services[0]: no rule of api.allow or api.ask lets s be used"],
        ),
        (
            "api: {allow: [s], services: [{name: s, document: ./d, url: https://a.example}]}",
            ["api.services[0]: s has no operations, so nothing of it can be used"],
        ),
        # contents
        ("log: {keep: {file: 30d, diff: 1d}, files: [/etc/**]}", []),
        ("log: {keep: {diff: 1d}}", []),
        (
            "log: {keep: {diff: 1d}, files: [/etc/**]}",
            ["log.files: files are named, but `log.keep` does not say how long a `file` is kept: none is"],
        ),
        ("log: {keep: {file: 30d}}", ["log.keep: a `file` is to be kept, but `log.files` names none"]),
        # past the broker
        (
            MODELS % ("gpt-*", "") + "\nnetwork: {ask: ['*.example:443']}",
            ["model.upstreams[0]: `network` lets the sandbox connect to a.example:443 itself, past the broker"],
        ),
        (MODELS % ("gpt-*", "") + "\nnetwork: {ask: ['a.example:80']}", []),
        (
            DATA % "s" + "\nfilesystem: {read: [/srv]}",
            ["data.sources[0]: /srv/s.db is shown inside by `filesystem`, past all that `tables` says"],
        ),
        (DATA % "s" + "\nfilesystem: {read: [/srv], deny: [/srv/s.db]}", []),
        (DATA % "s" + "\nfilesystem: {read: [/srv/s]}", []),
        (
            "network: {allow: [{name: a.example, credential: {type: bearer, from: 'file:/srv/key'}}]}\n"
            "filesystem: {write: [/srv/key]}",
            ["network.allow[0]: the file of the secret is shown inside by `filesystem`"],
        ),
    ],
)
def test_loose_ends(text: str, ends: list[str]) -> None:
    assert list(loose_ends(parse(text))) == ends


@pytest.mark.parametrize("rules", ["'10.0.0.0/8'", "10.1.2.3", "'0.0.0.0/0'"])
def test_a_private_address_is_reached_by_a_rule_that_names_it(rules: str) -> None:
    text = (
        "data: {allow: [s], sources: [{name: s, dialect: mysql, url: mysql://a@10.1.2.3/d, "
        "tables: [{name: t, columns: [a]}]}]}\n"
    )
    found = loose_ends(parse(f"{text}network: {{allow: [{{cidr: {rules}, protocol: tcp}}]}}"))
    assert bool(found) is (rules != "'0.0.0.0/0'")


def test_loose_ends_are_bounded() -> None:
    text = SERVICES % ", ".join(f"s{number}" for number in range(200))
    found = loose_ends(parse(text))
    assert len(found) == MAX_ENDS and found[-1] == "and 152 more like these"


def test_check_tells_them_and_they_are_no_fault(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = tmp_path / "policy.yaml"
    path.write_text(MODELS % ("gpt-*, claude", ""))
    assert commands.check([str(path)], as_json=False) == 0
    out = capsys.readouterr().out
    assert "model 2 allow; brokers for model\n  model.allow[1]: no upstream has the model claude\n" in out
    assert commands.check([str(path)], as_json=True) == 0
    assert json.loads(capsys.readouterr().out)[0]["loose"] == ["model.allow[1]: no upstream has the model claude"]
