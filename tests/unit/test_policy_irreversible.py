"""``irreversible``: what writes outside is a person's to allow, unless the policy names that write itself."""

from __future__ import annotations

from dataclasses import replace

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from corral.actions import (
    Access,
    Action,
    Endpoint,
    File,
    Kind,
    Meaning,
    ModelCall,
    Origin,
    Query,
    Request,
    Reversible,
    Subject,
    Transport,
    Verb,
    Verdict,
)
from corral.cli import policy as commands
from corral.errors import PolicyError
from corral.policy.explain import find_rule, parse_action
from corral.policy.irreversible import fetches, unseen_rules
from corral.policy.load import load_policy, parse_policy
from corral.policy.model import Policy
from corral.policy.part import PolicyPart
from tests.unit.policy_documents import DOCUMENTS, Document, written

ALLOW, ASK, DENY = Verdict.ALLOW, Verdict.ASK, Verdict.DENY
ORIGIN = Origin("sandbox", "session")


def policy_of(text: str) -> Policy:
    return parse_policy(text, source="/cfg/p.yaml")


def request(
    method: str,
    path: str = "/v1/x",
    *,
    name: str = "a.example",
    protocol: str = "tls",
    port: int = 443,
    meaning: Meaning = Meaning.METHOD,
) -> tuple[Kind, Subject]:
    return Kind.HTTP_REQUEST, Request(Endpoint(Transport.TCP, "", port, name, "", protocol), method, path, meaning)


def judged(policy: Policy, attempt: tuple[Kind, Subject]) -> Verdict:
    return PolicyPart(policy).judge(Action(*attempt, ORIGIN)).verdict


# ---- what can be taken back ----


def test_every_kind_says_whether_it_can_be_taken_back() -> None:
    for kind in Kind:
        assert isinstance(kind.reversible, Reversible)
    assert {kind for kind in Kind if kind.reversible is Reversible.UNTIL_APPLIED} == {
        kind for kind in Kind if kind.value.startswith("file.")
    }
    lost = {Kind.SANDBOX_RESTORE, Kind.SANDBOX_APPLY, Kind.SANDBOX_UNDO, Kind.SANDBOX_DISCARD}
    assert {kind for kind in Kind if kind.reversible is Reversible.NO} == {
        *(Kind.HTTP_REQUEST, Kind.DATA_QUERY, Kind.API_CALL),
        *lost,
    }


@pytest.mark.parametrize(
    ("kind", "subject", "wanted"),
    [
        (Kind.FILE_OPEN, File("/a", Access.READ), Reversible.YES),
        (Kind.FILE_OPEN, File("/a", Access.WRITE), Reversible.UNTIL_APPLIED),
        (Kind.NET_CONNECT, Endpoint(Transport.TCP, "192.0.2.1", 22), Reversible.YES),
        (Kind.MODEL_CALL, ModelCall("m"), Reversible.YES),
        (Kind.SANDBOX_APPLY, Verb(()), Reversible.NO),
        (Kind.DATA_QUERY, Query("w", "SELECT", ("t",)), Reversible.YES),
        (Kind.DATA_QUERY, Query("w", "insert", ("t",)), Reversible.NO),
        (Kind.DATA_QUERY, Query("w", "", ()), Reversible.NO),
        (*request("GET"), Reversible.YES),
        (*request("HEAD"), Reversible.YES),
        (*request("OPTIONS"), Reversible.YES),
        (*request("TRACE"), Reversible.YES),
        *(
            (*request(method), Reversible.NO)
            for method in ("POST", "PUT", "PATCH", "DELETE", "MKCOL", "get", "CONNECT")
        ),
        (*request("GET", meaning=Meaning.OVERRIDDEN), Reversible.NO),
        (*request("GET", meaning=Meaning.BODY), Reversible.NO),
        (*request("POST", meaning=Meaning.FETCH), Reversible.YES),
    ],
)
def test_what_an_action_says_of_itself(kind: Kind, subject: Subject, wanted: Reversible) -> None:
    assert Action(kind, subject, ORIGIN).reversible is wanted


@pytest.mark.parametrize(
    ("method", "path", "wanted"),
    [
        ("POST", "/acme/x.git/git-upload-pack", True),
        ("POST", "/acme/x.git/git-receive-pack", False),
        ("GET", "/acme/x.git/git-upload-pack", False),
        ("POST", "/git-upload-pack/delete", False),
        ("POST", "/delete.php;/git-upload-pack", False),
        ("POST", "/delete%3f/git-upload-pack", False),
        ("POST", "/x?/git-upload-pack", False),
        ("POST", "/x-git-upload-pack", False),
        ("POST", "/-/npm/v1/security/advisories/bulk", True),
        ("POST", "/x/-/npm/v1/security/advisories/bulk", False),
        ("POST", "/-/npm/v1/security/advisories/bulk/", False),
        ("PUT", "/-/npm/v1/security/audits/quick", False),
    ],
)
def test_where_a_post_reads(method: str, path: str, wanted: bool) -> None:
    assert fetches(method, path) is wanted


# ---- how it combines with rules ----

WIDE = "{name: a.example, intercept: true}"
CASES = [
    # A rule says where; what is done there is a question, unless a rule names its method.
    (WIDE, request("GET"), ALLOW),
    (WIDE, request("POST"), ASK),
    (WIDE, request("DELETE"), ASK),
    (WIDE, request("post"), ASK),
    (WIDE, request("POST", "/x.git/git-upload-pack", meaning=Meaning.FETCH), ALLOW),
    (WIDE, request("POST", "/x.git/git-receive-pack"), ASK),
    (WIDE, request("GET", meaning=Meaning.OVERRIDDEN), ASK),
    ("{name: a.example, requests: ['/v1/**']}", request("POST"), ASK),
    ("{name: a.example, requests: ['/v1/**']}", request("POST", "/v2"), DENY),
    ("{name: a.example, requests: [POST /v1/**]}", request("POST"), ALLOW),
    ("{name: a.example, requests: [POST]}", request("POST"), ALLOW),
    ("{name: a.example, requests: [POST /v1/**]}", request("PUT"), DENY),
    ("{name: a.example, requests: [GET /v1/**]}", request("GET", meaning=Meaning.BODY), ASK),
    ("{name: a.example, requests: [POST /v1/**]}", request("POST", meaning=Meaning.OVERRIDDEN), ASK),
    # The method must be named where the path is.
    ("{name: a.example, requests: [POST /v1/other, '/v1/**']}", request("POST"), ASK),
    ("{name: a.example, requests: [POST /v1/*, '/**']}", request("POST", "/v1/x%2fy"), ASK),
    ("{name: '*.example', requests: [POST /v1/**]}", request("POST"), ALLOW),
    ("{name: a.example, port: 80, protocol: http, requests: [POST /v1/**]}", request("POST"), DENY),
    # A tunnel is permitted in so many words.
    ("{name: a.example, port: 80, permit: [connect]}", request("CONNECT", "/b:1", port=80, protocol="connect"), ALLOW),
    # Nothing is asked for that nothing allows.
    ("b.example", request("POST"), DENY),
]


@pytest.mark.parametrize(("rule", "attempt", "wanted"), CASES)
def test_a_write_is_asked_for_where_no_rule_names_its_method(
    rule: str, attempt: tuple[Kind, Subject], wanted: Verdict
) -> None:
    policy = policy_of(f"network: {{allow: [{rule}]}}")
    assert policy.irreversible is ASK
    assert judged(policy, attempt) is wanted
    harder = {ASK: DENY}.get(wanted, wanted)
    assert judged(replace(policy, irreversible=DENY), attempt) is harder
    milder = {ASK: ALLOW}.get(wanted, wanted)
    assert judged(replace(policy, irreversible=ALLOW), attempt) is milder


def test_a_deny_beats_it_and_an_ask_stays_one() -> None:
    text = "network: {{allow: [{rule}], deny: [{{name: a.example, requests: [DELETE]}}]}}\nirreversible: {answer}"
    for answer in ("allow", "ask", "deny"):
        policy = policy_of(text.format(rule="{name: a.example, requests: [DELETE, POST]}", answer=answer))
        assert judged(policy, request("DELETE")) is DENY
        assert judged(policy, request("POST")) is ALLOW
    asks = "network: {ask: [{name: a.example, requests: [POST]}]}\nirreversible: deny"
    assert judged(policy_of(asks), request("POST")) is ASK, "it is named, and there it says: ask"


def test_a_person_who_let_it_connect_has_not_let_it_write() -> None:
    part = PolicyPart(policy_of("network: {ask: [{name: a.example, intercept: true}]}"))
    assert part.judge(Action(*request("GET"), ORIGIN)).asked == ("network.ask[0]",)
    write = part.judge(Action(*request("POST"), ORIGIN))
    assert (write.verdict, write.asked) == (ASK, ("network.ask[0]", "irreversible"))


def test_what_is_inside_is_no_network_write() -> None:
    inside = Request(Endpoint(Transport.TCP, "127.0.0.1", 80, protocol="http"), "POST", "/")
    assert judged(Policy(irreversible=DENY), (Kind.HTTP_REQUEST, inside)) is ALLOW
    host = replace(inside, endpoint=replace(inside.endpoint, protected=True))
    policy = policy_of("network: {allow: ['127.0.0.1:80']}")
    assert judged(policy, (Kind.HTTP_REQUEST, inside)) is ALLOW
    assert judged(policy, (Kind.HTTP_REQUEST, host)) is ASK, "that is the host's loopback"


@pytest.mark.parametrize(
    ("rule", "statement", "wanted"),
    [
        ("warehouse", "select", ALLOW),
        ("warehouse", "insert", ASK),
        ("{source: warehouse, statements: [insert]}", "insert", ALLOW),
        ("{source: warehouse, statements: [INSERT, select]}", "insert", ALLOW),
        ("{source: warehouse, tables: ['*']}", "delete", ASK),
        ("{source: warehouse, statements: [insert]}", "delete", DENY),
        ("other", "insert", DENY),
    ],
)
def test_queries_that_write(rule: str, statement: str, wanted: Verdict) -> None:
    policy = policy_of(f"data: {{allow: [{rule}]}}")
    assert judged(policy, (Kind.DATA_QUERY, Query("warehouse", statement, ("t",)))) is wanted


# ---- what nobody sees ----


@pytest.mark.parametrize(
    ("rule", "protocol", "wanted"),
    [
        ("a.example", "tls", DENY),
        ("a.example", "http", ALLOW),
        ("{name: a.example, protocol: tls}", "tls", ALLOW),
        ("{name: a.example, intercept: true}", "tls", ALLOW),
        ("{name: a.example, requests: [GET]}", "tls", ALLOW),
        ("{name: a.example, port: 22, protocol: ssh}", "ssh", ALLOW),
        ("b.example", "tls", DENY),
    ],
)
def test_who_denies_all_writes_lets_nothing_through_unseen(rule: str, protocol: str, wanted: Verdict) -> None:
    port = {"ssh": 22, "http": 80}.get(protocol, 443)
    place = Endpoint(Transport.TCP, "", port, "a.example", "", protocol)
    policy = policy_of(f"network: {{allow: [{rule}]}}\nirreversible: deny")
    assert judged(policy, (Kind.NET_CONNECT, place)) is wanted
    asked = replace(policy, irreversible=ASK)
    assert judged(asked, (Kind.NET_CONNECT, place)) is (DENY if rule == "b.example" else ALLOW)
    unheard = replace(place, protocol=None)
    assert judged(policy, (Kind.NET_CONNECT, unheard)) is (DENY if rule == "b.example" else ALLOW)


def test_the_rules_under_which_nobody_sees_writes_are_told(
    tmp_path_factory: pytest.TempPathFactory, capsys: pytest.CaptureFixture[str]
) -> None:
    text = """
network:
  allow:
    - a.example:443
    - {name: b.example, intercept: true}
    - {name: c.example, port: 22, protocol: ssh}
    - {name: d.example, port: 80, protocol: http}
    - {name: f.example, intercept: true, permit: [websocket]}
  ask: [{name: e.example, port: 25, protocol: tcp}]
"""
    assert unseen_rules(policy_of(text)) == [
        ("network.allow[0]", "tls"),
        ("network.allow[2]", "ssh"),
        ("network.allow[4]", "websocket"),
        ("network.ask[0]", "tcp"),
    ]
    assert unseen_rules(replace(policy_of(text), irreversible=ALLOW)) == []
    denied = unseen_rules(replace(policy_of(text), irreversible=DENY))
    assert [rule for rule, _ in denied] == ["network.allow[2]", "network.allow[4]", "network.ask[0]"]
    path = tmp_path_factory.mktemp("check") / "policy.yaml"
    path.write_text(text)
    assert commands.check([str(path)], as_json=False) == 0
    assert "not seen: under network.allow[0] (tls), network.allow[2] (ssh)" in capsys.readouterr().out


# ---- the commands ----


def test_explain_says_where_it_is_written_and_that_it_is_for_good(
    tmp_path_factory: pytest.TempPathFactory, capsys: pytest.CaptureFixture[str]
) -> None:
    directory = tmp_path_factory.mktemp("explain")
    base, path = directory / "base.yaml", directory / "policy.yaml"
    base.write_text("version: 1\nirreversible: deny\n")
    path.write_text(f"profile: {base}\nnetwork: {{allow: [{{name: a.example, intercept: true}}]}}\n")
    policy = load_policy(path)
    assert policy.irreversible is DENY
    assert find_rule(path, "irreversible", policy) == f"{base}:2"
    commands.explain(str(path), ["request", "POST", "a.example:443/x"], as_json=False)
    told = capsys.readouterr().out
    assert f"irreversible  ({base}:2)" in told
    assert "cannot be taken back" in told and "requests: [POST /PATH]" in told
    git = parse_action(["request", "POST", "a.example:443/x.git/git-upload-pack"])
    assert judged(policy, (git.kind, git.subject)) is ALLOW
    path.write_text("irreversible: nobody\n")
    with pytest.raises(PolicyError, match="known: allow, ask, deny"):
        load_policy(path)


# ---- it only raises ----

METHODS = st.sampled_from(["GET", "HEAD", "POST", "post", "PUT", "DELETE", "X-Y", "CONNECT"])
PATHS = st.sampled_from(["/", "/repos/x", "/a/b/b", "/x1", "/*", "/a//b", "/x%2fy", "/y/x.git/git-upload-pack"])
PLACES = st.builds(
    Endpoint,
    st.just(Transport.TCP),
    st.sampled_from(["", "192.0.2.1", "10.0.0.1", "127.0.0.1"]),
    st.sampled_from([80, 443]),
    st.sampled_from([None, "a.example", "x.a.example"]),
    st.just(""),
    st.sampled_from([None, "tls", "http", "ssh", "connect", "h2c", "tcp"]),
    st.booleans(),
)
ATTEMPTS = st.one_of(
    st.tuples(st.just(Kind.HTTP_REQUEST), st.builds(Request, PLACES, METHODS, PATHS, st.sampled_from(Meaning))),
    st.tuples(st.just(Kind.NET_CONNECT), PLACES),
    st.tuples(
        st.just(Kind.DATA_QUERY),
        st.builds(Query, st.just("w"), st.sampled_from(["select", "insert", "drop"]), st.just(("t",))),
    ),
)
RULES = st.lists(
    st.fixed_dictionaries(
        {"name": st.sampled_from(["a.example", "*.a.example", "*.example"])},
        optional={
            "port": st.sampled_from([80, 443]),
            "protocol": st.sampled_from(["tls", "http"]),
            "requests": st.lists(
                st.sampled_from(["GET", "POST /repos/**", "/**", "/a/*/b", "PUT", "post", "X-Y /x?"]),
                min_size=1,
                max_size=3,
            ),
        },
    ),
    max_size=3,
)
DATA = st.lists(
    st.fixed_dictionaries(
        {"source": st.just("w")},
        optional={"statements": st.sampled_from([["select"], ["INSERT"]]), "tables": st.just(["*"])},
    ),
    max_size=2,
)


@settings(deadline=None)
@given(DOCUMENTS, RULES, RULES, RULES, DATA, DATA, st.lists(ATTEMPTS, min_size=1, max_size=12))
def test_it_never_widens(
    document: Document,
    allow: list[Document],
    ask: list[Document],
    deny: list[Document],
    data: list[Document],
    asked: list[Document],
    attempts: list[tuple[Kind, Subject]],
) -> None:
    document["network"] = {"allow": allow, "ask": ask, "deny": deny}
    document["data"] = {"allow": data, "ask": asked}
    policy = policy_of(written(document))
    for attempt in attempts:
        free, held, refused = (judged(replace(policy, irreversible=each), attempt) for each in (ALLOW, ASK, DENY))
        assert free <= held <= refused
        assert held is free or (free is ALLOW and held is ASK)
        action = Action(*attempt, ORIGIN)
        if free is ALLOW and held is ALLOW and action.kind in (Kind.HTTP_REQUEST, Kind.DATA_QUERY):
            assert refused is ALLOW, "what is not asked for is named, or reads"
