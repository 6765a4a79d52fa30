"""The policy decides as its rules say: compared with an evaluator that knows nothing of how rules are compiled.

The reference below is written from the documentation (docs/policy.md, corral.policy.part), one rule after the other,
with the standard library's addresses and with globs that are matched by trying everything.
"""

from __future__ import annotations

import ipaddress
from collections.abc import Callable, Sequence
from dataclasses import replace
from functools import cache

import pytest
from hypothesis import example, given
from hypothesis import strategies as st

from corral.actions import (
    Access,
    Action,
    Endpoint,
    File,
    KernelCall,
    Kind,
    ModelCall,
    Origin,
    Program,
    Query,
    Request,
    Socket,
    Subject,
    Transport,
    Verb,
    Verdict,
)
from corral.policy.matching import escape_glob, path_glob, text_glob
from corral.policy.model import (
    ANY_NAME,
    Apply,
    Credential,
    CredentialKind,
    Data,
    DataRule,
    ExecRule,
    Filesystem,
    FlowLimits,
    Model,
    ModelRule,
    Network,
    NetworkRule,
    Note,
    Permit,
    Policy,
    Processes,
    RequestRule,
    Syscalls,
)
from corral.policy.part import MAX_CACHED, MAX_CACHED_PATH, RESOLVER_RULE, PolicyPart
from corral.policy.requests import read_path
from corral.policy.terms import Terms

ORIGIN = Origin("sandbox", "session")
ALLOW, ASK, DENY = Verdict.ALLOW, Verdict.ASK, Verdict.DENY


# ---- the reference ----


def reference_glob(glob: str, text: str, any_: Callable[[str], bool] = lambda c: True) -> bool:
    """One character after the other; ``any_`` says what a wildcard may stand for."""

    @cache
    def match(g: int, t: int) -> bool:
        if g == len(glob):
            return t == len(text)
        if glob[g] == "*":
            return match(g + 1, t) or (t < len(text) and any_(text[t]) and match(g, t + 1))
        if t == len(text):
            return False
        if glob[g] == "?":
            return any_(text[t]) and match(g + 1, t + 1)
        if glob[g] == "\\" and g + 1 < len(glob):
            return text[t] == glob[g + 1] and match(g + 2, t + 1)
        return text[t] == glob[g] and match(g + 1, t + 1)

    return match(0, 0)


def reference_path(glob: str, path: str) -> bool:
    """Part after part; ``**`` is any number of them."""
    globs = [part for part in glob[1:].split("/") if part]
    parts = [part for part in path[1:].split("/") if part]

    @cache
    def match(g: int, p: int) -> bool:
        if g == len(globs):
            return p == len(parts)
        if globs[g] == "**":
            return match(g + 1, p) or (p < len(parts) and match(g, p + 1))
        return p < len(parts) and reference_glob(globs[g], parts[p]) and match(g + 1, p + 1)

    return match(0, 0)


LOOPBACK = {4: ipaddress.ip_address("127.0.0.1"), 6: ipaddress.ip_address("::1")}


UNHEARD = "nobody will ever look"
READINGS = {
    "/": ("/",),
    "/a": ("/a",),
    "/A": ("/A",),
    "/a/": ("/a",),
    "/a/b?c": ("/a/b?c", "/a/b"),
    "/a/b?/../c": (),
    "/%61/b": ("/a/b",),
    "/a%2fb": ("/a/b", "/a%2Fb"),
    "/a;x/b": ("/a;x/b", "/a/b"),
    "/a/../b": (),
    "/a//b": (),
    "/a%252fb": (),
    "/a\\b": (),
    "*": (),
}
"""What a path may mean; nothing: that is unclear."""


def reference_address(rule: NetworkRule, endpoint: Endpoint, address: str, deny: bool) -> bool:
    """Whether name and network hold."""
    if rule.name is not None:
        if endpoint.name is None:
            return False
        if rule.name.startswith("*."):
            if not endpoint.name.endswith(rule.name[1:]):
                return False
        elif endpoint.name != rule.name:
            return False
    if rule.network is None:
        return deny or not endpoint.protected
    if not address:
        return rule.name is not None and (deny or not endpoint.protected)
    network = ipaddress.ip_network(rule.network)
    if endpoint.protected and not deny and network.prefixlen < (8 if network.version == 4 else 7):
        return False  # too wide to name anything
    return ipaddress.ip_address(address) in network


def reference_protocol(rule: NetworkRule, endpoint: Endpoint, protocol: str | None, deny: bool) -> bool:
    over_tcp = endpoint.transport is Transport.TCP
    http = protocol == "http" or any(
        protocol == word and (deny or permit in rule.permit)
        for word, permit in (("h2c", Permit.H2C), ("connect", Permit.CONNECT))
    )
    if rule.protocol == "udp":
        return not over_tcp
    if rule.protocol == "tcp":
        return over_tcp and (deny or protocol in (None, UNHEARD, "tcp"))
    if rule.protocol is None:
        return deny or protocol in (None, UNHEARD, "tls") or (http and endpoint.port != 443)
    if protocol is None:
        return over_tcp
    return protocol == rule.protocol or (rule.protocol == "http" and http)


def reference_request(rule: NetworkRule, request: Request, certain: bool) -> bool:
    if not rule.requests:
        return True
    readings = READINGS[request.path]
    method = request.method if certain else request.method.upper()
    ones = [each for each in rule.requests if not each.methods or method in each.methods]
    if any(each.path == "/**" for each in ones):
        return True
    if not certain:
        readings = (*readings, *(reading.lower() for reading in readings))
        ones = [replace(each, path=path) for each in ones for path in (each.path, each.path.lower())]
    named = [any(reference_path(each.path, reading) for each in ones) for reading in readings]
    if certain:
        return bool(readings) and all(named)
    return bool(ones) and (not readings or any(named))


def reference_destination(
    network: Network, endpoint: Endpoint, request: Request | None = None, irreversible: Verdict = ALLOW
) -> Verdict:
    if endpoint.transport is Transport.UNIX:
        return network.loopback
    reached, inside = endpoint.address, False
    if endpoint.address:
        ip = ipaddress.ip_address(endpoint.address)
        if ip.is_unspecified:
            reached = str(LOOPBACK[ip.version])
        inside = ipaddress.ip_address(reached).is_loopback and not endpoint.protected

    def named(rules: Sequence[NetworkRule], verdict: Verdict) -> list[NetworkRule]:
        deny = verdict is DENY
        protocol = endpoint.protocol
        if verdict is ALLOW and inside and protocol is None:
            protocol = UNHEARD
        addresses = (reached,) if verdict is ALLOW else (reached, endpoint.address)
        return [
            rule
            for rule in rules
            if any(reference_address(rule, endpoint, address, deny) for address in addresses)
            and (not rule.ports or any(endpoint.port in range(low, high + 1) for low, high in rule.ports))
            and not (rule.requests and endpoint.transport is not Transport.TCP)
            and reference_protocol(rule, endpoint, protocol, deny)
            and (request is None or reference_request(rule, request, verdict is ALLOW))
        ]

    denied, asked, allowed = named(network.deny, DENY), named(network.ask, ASK), named(network.allow, ALLOW)
    if request is not None:
        secrets = {
            rule.credential
            for rule in (*asked, *allowed)
            if rule.credential
            and rule.name
            and not rule.name.startswith("*")
            and (endpoint.protocol == "tls" or endpoint.protocol == rule.protocol == "http")
        }
        if denied or len(secrets) > 1:
            return DENY
        free = network.loopback if inside and endpoint.name is None else DENY
        verdict = ASK if asked else ALLOW if allowed else free
        if not (asked or allowed) or inside or request.method in ("GET", "HEAD"):
            return verdict
        explicit = [
            replace(rule, requests=ones)
            for rule in (*network.allow, *network.ask)
            if (ones := (*(each for each in rule.requests if each.methods), *_tunnels(rule)))
        ]
        return verdict if named(explicit, ALLOW) else max(verdict, irreversible)
    # Of a connection, rules about some of its requests say no more than that it must be possible.
    if any(inside or not rule.requests for rule in denied):
        return DENY
    query = endpoint.port == 53 and endpoint.address and not inside and not endpoint.protected
    if query and endpoint.name is None and endpoint.protocol is None and (network.allow or network.ask):
        return ALLOW
    of_both = (*asked, *allowed)
    unseen = endpoint.protocol == "tls" and not any(r.protocol or r.requests or r.credential for r in of_both)
    if irreversible is DENY and unseen and of_both and not inside and not denied:
        return DENY
    if any(inside or not rule.requests for rule in asked):
        return ASK
    if any(not (inside and rule.requests) for rule in (*asked, *allowed)):
        return ALLOW
    if inside and endpoint.name is None and not denied:
        return network.loopback
    return DENY


def _tunnels(rule: NetworkRule) -> tuple[RequestRule, ...]:
    return (RequestRule(("CONNECT",)),) if Permit.CONNECT in rule.permit or rule.protocol == "connect" else ()


def reference_name(network: Network, name: str) -> Verdict:
    def names(rule: NetworkRule) -> bool:
        return reference_address(NetworkRule(rule.name), Endpoint(Transport.UDP, name=name), "", False)

    if any(r.name and names(r) and not (r.network or r.ports or r.protocol or r.requests) for r in network.deny):
        return DENY
    return ALLOW if any(r.name and names(r) for r in (*network.allow, *network.ask)) else DENY


def reference_argv(globs: tuple[str, ...], argv: Sequence[str | None], *, cut: bool, certain: bool) -> bool:
    """Whether the arguments surely (or, else, possibly) fit. None is an unknown one; cut: any number of them follow."""
    if globs[-1:] == ("**",):
        fixed = globs[:-1]
        if len(argv) < len(fixed) and (certain or not cut):
            return False
        argv = argv[: len(fixed)]
    else:
        fixed = globs
        if cut and certain:
            return False
        if len(argv) > len(fixed) or (len(argv) < len(fixed) and not cut):
            return False
    return all(not certain if a is None else reference_glob(g, a) for g, a in zip(fixed, argv, strict=False))


def reference_program(processes: Processes, program: Program) -> Verdict:
    known: Sequence[str | None] = program.argv[:-1] if program.truncated else program.argv

    def named(rule: ExecRule, certain: bool) -> bool:
        def runs(path: str, argv: Sequence[str | None]) -> bool:
            if not reference_path(rule.path, path):
                return False
            return rule.argv is None or reference_argv(rule.argv, argv, cut=program.truncated, certain=certain)

        script = program.interpreter and not certain
        return runs(program.path, known) or bool(
            script
            and (
                runs(program.interpreter, (None, program.path, *known[1:]))
                or runs(program.interpreter, (None, None, program.path, *known[1:]))
            )
        )

    if any(named(rule, False) for rule in processes.deny):
        return DENY
    if any(named(rule, False) for rule in processes.ask):
        return ASK
    return ALLOW if any(named(rule, True) for rule in processes.allow) else DENY


def reference_query(data: Data, query: Query, irreversible: Verdict) -> Verdict:
    def concerns(rule: DataRule) -> bool:
        return rule.source == query.source and (not rule.statements or query.statement in rule.statements)

    def tables(rule: DataRule) -> list[bool]:
        return [any(reference_glob(glob, table) for glob in rule.tables) for table in query.tables]

    denied, asked = (
        [rule for rule in rules if concerns(rule) and (not rule.tables or any(tables(rule)))]
        for rules in (data.deny, data.ask)
    )
    allowed = [r for r in data.allow if concerns(r) and (not r.tables or (query.tables and all(tables(r))))]
    verdict = DENY if denied else ASK if asked else ALLOW if allowed else DENY
    if query.statement == "select" or any(rule.statements for rule in (*asked, *allowed)):
        return verdict
    return max(verdict, irreversible)


def reference(policy: Policy, kind: Kind, subject: Subject) -> Verdict:
    if isinstance(subject, Request):
        return reference_destination(policy.network, subject.endpoint, subject, policy.irreversible)
    if isinstance(subject, Endpoint):
        if kind is Kind.NET_RESOLVE:
            assert subject.name is not None
            return reference_name(policy.network, subject.name)
        if kind in (Kind.NET_BIND, Kind.NET_LISTEN):
            return policy.network.listen
        return reference_destination(policy.network, subject, None, policy.irreversible)
    if isinstance(subject, Program):
        return reference_program(policy.process, subject)
    if isinstance(subject, File):
        paths = [path for path in (subject.path, subject.other) if path]
        asked = any(reference_path(glob, path) for glob in policy.filesystem.ask for path in paths)
        return ASK if asked else ALLOW
    if isinstance(subject, ModelCall):
        for verdict, rules in ((DENY, policy.model.deny), (ASK, policy.model.ask), (ALLOW, policy.model.allow)):
            if any(reference_glob(rule.name, subject.model) for rule in rules):
                return verdict
        return DENY
    if isinstance(subject, Query):
        return reference_query(policy.data, subject, policy.irreversible)
    if isinstance(subject, KernelCall):
        asked = subject.name in policy.syscalls.ask and subject.name not in policy.syscalls.deny
        return ASK if asked else DENY
    assert isinstance(subject, Socket)
    return DENY


# ---- policies and actions that meet each other ----

NAMES = ("org", "a.org", "b.a.org", "c.b.a.org", "ba.org", "localhost")
NETWORKS = ("127.0.0.0/8", "127.0.0.1/32", "0.0.0.0/0", "0.0.0.0/32", "10.0.0.0/8", "10.1.0.0/16", "10.1.2.3/32")
NETWORKS6 = ("::/0", "::1/128", "::/128", "2001:db8::/32", "2001:db8::1/128")
ADDRESSES = (
    "127.0.0.1",
    "127.9.9.9",
    "0.0.0.0",
    "10.1.2.3",
    "10.9.9.9",
    "192.0.2.1",
    "::1",
    "::",
    "2001:db8::1",
    "2001::",
)
PROTOCOLS = (None, "tcp", "udp", "tls", "ssh", "http", "connect")
SPOKEN = (None, None, "tls", "tls", "http", "ssh", "tcp", "h2c", "connect", "other")
PORTS = st.sampled_from((0, 1, 2, 3, 53, 443))
SECRETS = tuple(Credential(CredentialKind.BEARER, f"env:{name}") for name in "AB")

network_rules = st.builds(
    NetworkRule,
    st.one_of(st.none(), st.sampled_from((*NAMES, "*.org", "*.a.org", "*.b.a.org"))),
    st.one_of(st.none(), st.sampled_from(NETWORKS + NETWORKS6)),
    st.lists(st.tuples(PORTS, PORTS).map(lambda ports: (min(ports), max(ports))), max_size=2).map(tuple),
    st.sampled_from(PROTOCOLS),
    permit=st.sampled_from(((), (), (Permit.CONNECT,), (Permit.H2C, Permit.WEBSOCKET))),
    requests=st.one_of(
        st.just(()),
        st.lists(
            st.builds(
                RequestRule,
                st.sampled_from(((), ("GET",), ("GET", "POST"))),
                st.sampled_from(("/**", "/", "/a", "/a/*", "/a/**", "/a*", "/A", "/b")),
            ),
            max_size=2,
        ).map(tuple),
    ),
    credential=st.sampled_from((None, None, None, *SECRETS)),
).filter(lambda rule: rule.name is not None or rule.network is not None)
endpoints = st.builds(
    Endpoint,
    st.sampled_from((Transport.TCP, Transport.TCP, Transport.UDP)),
    st.sampled_from(("", *ADDRESSES)),
    PORTS,
    st.one_of(st.none(), st.sampled_from(NAMES)),
    protocol=st.sampled_from(SPOKEN),
    protected=st.sampled_from((False, False, True)),
)
named = st.builds(Endpoint, st.just(Transport.UDP), name=st.sampled_from(NAMES))
unix = st.builds(Endpoint, st.just(Transport.UNIX), path=st.sampled_from(("/a/b", "@a", "")))

path_globs = st.lists(
    st.sampled_from(("a", "b", "ab", "*", "a*", "*b", "?", "**", "*a*b", "\\*", "a\\b")), max_size=4
).map(lambda parts: "/" + "/".join(parts))
paths = st.lists(st.sampled_from(("a", "b", "ab", "aab", "*", "a\n", "b\\", "abab")), max_size=4).map(
    lambda parts: "/" + "/".join(parts)
)
words = st.text("ab*/", max_size=3)
globs = st.text("ab*?\\/", min_size=1, max_size=4)
exec_rules = st.builds(
    ExecRule,
    path_globs,
    st.one_of(
        st.none(),
        st.tuples(st.lists(globs.filter(lambda g: g != "**"), min_size=1, max_size=3), st.booleans()).map(
            lambda found: (*found[0], "**") if found[1] else tuple(found[0])
        ),
    ),
)
programs = st.builds(
    Program, paths, st.lists(words, max_size=4).map(tuple), st.booleans(), st.one_of(st.just(""), paths)
)
model_rules = st.builds(ModelRule, globs)
data_rules = st.builds(
    DataRule,
    st.sampled_from("st"),
    st.sampled_from(((), ("select",), ("delete", "select"))),
    st.lists(globs, max_size=2).map(tuple),
)
queries = st.builds(
    Query, st.sampled_from("st"), st.sampled_from(("select", "delete")), st.lists(words, max_size=3).map(tuple)
)
CALLS = ("mount", "ptrace", "kexec_load")


def rule_lists(rules: st.SearchStrategy[object]) -> st.SearchStrategy[tuple[object, ...]]:
    return st.lists(rules, max_size=4).map(tuple)


verdicts = st.sampled_from((ALLOW, ASK, DENY))
policies = st.builds(
    Policy,
    filesystem=st.builds(Filesystem, ask=rule_lists(path_globs), watch=rule_lists(path_globs)),
    network=st.builds(
        Network, rule_lists(network_rules), rule_lists(network_rules), rule_lists(network_rules), verdicts, verdicts
    ),
    process=st.builds(Processes, rule_lists(exec_rules), rule_lists(exec_rules), rule_lists(exec_rules)),
    syscalls=st.builds(Syscalls, rule_lists(st.sampled_from(CALLS)), rule_lists(st.sampled_from(CALLS))),
    model=st.builds(Model, rule_lists(model_rules), rule_lists(model_rules), rule_lists(model_rules)),
    data=st.builds(Data, rule_lists(data_rules), rule_lists(data_rules), rule_lists(data_rules)),
    irreversible=verdicts,
)
attempts = st.one_of(
    st.tuples(st.sampled_from((Kind.NET_CONNECT, Kind.NET_SEND)), st.one_of(endpoints, endpoints, unix)),
    st.tuples(st.just(Kind.NET_RESOLVE), named),
    st.tuples(st.sampled_from((Kind.NET_BIND, Kind.NET_LISTEN)), st.one_of(endpoints, unix)),
    st.tuples(
        st.just(Kind.HTTP_REQUEST),
        st.builds(
            Request,
            endpoints,
            st.sampled_from(("GET", "get", "POST", "PUT", "CONNECT")),
            st.sampled_from(tuple(READINGS)),
        ),
    ),
    st.tuples(st.just(Kind.PROCESS_EXEC), programs),
    st.tuples(
        st.sampled_from((Kind.FILE_OPEN, Kind.FILE_RENAME)),
        st.builds(File, paths, st.sampled_from(Access), st.one_of(st.just(""), paths)),
    ),
    st.tuples(st.just(Kind.MODEL_CALL), st.builds(ModelCall, words)),
    st.tuples(st.just(Kind.DATA_QUERY), queries),
    st.tuples(st.just(Kind.KERNEL), st.builds(KernelCall, st.sampled_from(CALLS), st.just(1), st.just("no"))),
    st.tuples(st.just(Kind.NET_SOCKET), st.builds(Socket, st.just(17), st.just(3), st.just(0))),
)
Attempt = tuple[Kind, Subject]


def judged(policy: Policy, attempt: Attempt) -> Verdict:
    return PolicyPart(policy).judge(Action(*attempt, ORIGIN)).verdict


# ---- properties ----


@given(policies, st.lists(attempts, min_size=1, max_size=8))
def test_the_compiled_policy_says_what_the_reference_says(policy: Policy, tried: list[Attempt]) -> None:
    part = PolicyPart(policy)
    for attempt in tried:
        expected = reference(policy, *attempt)
        first = part.judge(Action(*attempt, ORIGIN))
        assert first.verdict is expected
        assert part.judge(Action(*attempt, ORIGIN)) == first == part.explain(*attempt).opinion


@given(policies, st.lists(attempts, min_size=1, max_size=8), st.data())
def test_one_more_deny_never_widens(policy: Policy, tried: list[Attempt], data: st.DataObject) -> None:
    more = data.draw(
        st.one_of(
            st.tuples(st.just("network"), network_rules),
            st.tuples(st.just("process"), exec_rules),
            st.tuples(st.just("model"), model_rules),
            st.tuples(st.just("data"), data_rules),
            st.tuples(st.just("syscalls"), st.sampled_from(CALLS)),
        )
    )
    section = getattr(policy, more[0])
    stricter = replace(policy, **{more[0]: replace(section, deny=(*section.deny, more[1]))})
    for attempt in tried:
        assert judged(stricter, attempt) >= judged(policy, attempt)


@given(policies, st.lists(attempts, min_size=1, max_size=8), st.randoms(use_true_random=False))
def test_the_order_of_rules_does_not_matter(policy: Policy, tried: list[Attempt], random: object) -> None:
    def shuffled(rules: tuple[object, ...]) -> tuple[object, ...]:
        return tuple(random.sample(rules, len(rules)))  # type: ignore[attr-defined]

    other = policy
    for name in ("network", "process", "model", "data", "syscalls", "filesystem"):
        section = getattr(policy, name)
        lists = {word: shuffled(getattr(section, word)) for word in ("allow", "ask", "deny") if hasattr(section, word)}
        if name == "filesystem":
            lists = {"ask": shuffled(section.ask), "watch": shuffled(section.watch)}
        other = replace(other, **{name: replace(section, **lists)})
    for attempt in tried:
        assert judged(other, attempt) is judged(policy, attempt)


@given(st.lists(st.sampled_from("ab*?\\"), max_size=7).map("".join), st.text("ab*?\\/\n", max_size=10))
@example("*a*b*", "ba\nab")
@example("a**b", "ab")
def test_globs_of_texts(glob: str, text: str) -> None:
    assert bool(text_glob(glob)(text)) is reference_glob(glob, text)


@given(path_globs, paths)
@example("/**/a/**/b", "/a/a/b/b")
@example("/**/a*b/**/b*/**", "/ab/aab/b")
@example("/a/**", "/a")
@example("/**", "/")
@example("/*", "/")
@example("/a/*", "/a")
def test_globs_of_paths(glob: str, path: str) -> None:
    assert bool(path_glob(glob)(path)) is reference_path(glob, path)


@given(st.text(max_size=20), st.text(max_size=20))
def test_an_escaped_text_names_itself_only(text: str, other: str) -> None:
    assert text_glob(escape_glob(text))(text)
    assert bool(text_glob(escape_glob(text))(other)) is (text == other)


@pytest.mark.parametrize(
    ("glob", "text"),
    [
        ("*a" * 60 + "b", "a" * 4000),
        ("*" * 200 + "b", "a" * 4000),
        ("*?a" * 40 + "b", "a" * 4000),
        ("/" + "*a" * 60 + "b/x", "/" + "a" * 250),
        ("/**/" + "a*/**/" * 30 + "b", "/" + "a/" * 2000 + "c"),
        ("/**/" + "*a/**/" * 30 + "b", "/" + "aaa/" * 1000 + "c"),
    ],
)
def test_no_glob_takes_for_ever(glob: str, text: str) -> None:
    matcher = path_glob(glob) if glob.startswith("/") else text_glob(glob)
    assert not matcher(text)  # with backtracking: at the end of the universe


# ---- what the tables of the documentation say, one by one ----


def connect(address: str = "", port: int = 443, **how: object) -> Attempt:
    return Kind.NET_CONNECT, Endpoint(Transport.TCP, address, port, **how)  # type: ignore[arg-type]


def network(**lists: object) -> Policy:
    return Policy(network=Network(**lists))  # type: ignore[arg-type]


def test_a_wildcard_is_everything_below_at_any_depth_and_not_the_name_itself() -> None:
    policy = network(allow=(NetworkRule("*.a.org"),))
    assert judged(policy, connect(name="x.a.org")) is ALLOW
    assert judged(policy, connect(name="y.x.a.org")) is ALLOW
    for name in ("a.org", "ba.org", "a.org.evil.com", "xa.org"):
        assert judged(policy, connect(name=name)) is DENY


@pytest.mark.parametrize("address", ["0.0.0.0", "127.0.0.1", "127.1.2.3", "::1", "::"])
def test_loopback_is_free_until_it_is_denied(address: str) -> None:
    assert judged(Policy(), connect(address)) is ALLOW
    assert judged(network(loopback=DENY), connect(address)) is DENY
    assert judged(network(loopback=ASK), connect(address)) is ASK


def test_an_unspecified_address_is_no_way_around_a_rule_for_loopback() -> None:
    for deny in ("127.0.0.0/8", "0.0.0.0/32"):
        policy = network(deny=(NetworkRule(network=deny, ports=((22, 22),)),))
        assert judged(policy, connect("0.0.0.0", 22)) is DENY
        assert judged(policy, connect("0.0.0.0", 23)) is ALLOW
    assert judged(network(deny=(NetworkRule(network="::1/128"),)), connect("::", 22)) is DENY


def test_a_network_of_one_version_names_no_address_of_the_other() -> None:
    policy = network(allow=(NetworkRule(network="0.0.0.0/0"),), loopback=DENY)
    assert judged(policy, connect("192.0.2.1")) is ALLOW
    assert judged(policy, connect("2001:db8::1")) is judged(policy, connect("::1")) is DENY
    assert judged(network(allow=(NetworkRule(network="::/0"),)), connect("192.0.2.1")) is DENY


def test_mapped_addresses_are_ipv4() -> None:
    policy = network(deny=(NetworkRule(network="127.0.0.0/8"),))
    assert judged(policy, connect("::ffff:127.0.0.1")) is DENY
    assert judged(network(loopback=DENY), connect("::ffff:0.0.0.0")) is DENY


def test_a_protocol_that_nobody_will_check_is_not_taken_for_granted() -> None:
    policy = network(allow=(NetworkRule("a.org", "127.0.0.1/32", protocol="tls"),), loopback=DENY)
    assert judged(policy, connect("127.0.0.1", name="a.org")) is DENY
    assert judged(policy, connect("127.0.0.1", name="a.org", protocol="tls")) is ALLOW


def test_a_name_that_resolves_to_the_host_is_not_the_loopback_of_the_sandbox() -> None:
    policy = network(allow=(NetworkRule("evil.org"),))
    for address in ("127.0.0.1", "::1", "0.0.0.0", "::", "10.0.0.1"):
        assert judged(policy, connect(address, name="evil.org", protocol="tls", protected=True)) is DENY
        assert judged(policy, connect(address, protocol="tls", protected=True)) is DENY
        if address != "10.0.0.1":
            assert judged(Policy(), connect(address, name="evil.org", protocol="tls")) is DENY  # not marked, not free


def test_a_protected_address_needs_a_rule_that_names_it() -> None:
    inner = connect("10.0.0.1", name="a.org", protocol="tls", protected=True)
    for rules, verdict in (
        ((NetworkRule("a.org"),), DENY),
        ((NetworkRule("a.org", "10.0.0.0/8"),), ALLOW),
        ((NetworkRule("a.org", "192.168.0.0/16"),), DENY),
        ((NetworkRule("b.org", "10.0.0.0/8"),), DENY),
        ((NetworkRule("a.org"), NetworkRule(network="10.0.0.1/32")), ALLOW),
        ((NetworkRule("a.org"), NetworkRule(network="0.0.0.0/0")), DENY),  # that names nobody in particular
        ((NetworkRule("a.org", "8.0.0.0/6"),), DENY),
        ((NetworkRule("a.org"), NetworkRule(network="10.0.0.1/32", ports=((22, 22),))), DENY),
    ):
        assert judged(network(allow=rules), inner) is verdict
        assert judged(network(ask=rules), inner) is (ASK if verdict is ALLOW else DENY)
    assert judged(network(allow=(NetworkRule("a.org", "10.0.0.0/8"),), deny=(NetworkRule("a.org"),)), inner) is DENY


def test_a_rule_of_name_and_network_waits_for_the_address() -> None:
    rule = NetworkRule("a.org", "192.0.2.0/24")
    assert judged(network(allow=(rule,)), connect(name="a.org")) is ALLOW
    assert judged(network(allow=(rule,)), connect(name="b.org")) is DENY
    assert judged(network(allow=(rule,)), connect("192.0.2.7", name="a.org", protocol="tls")) is ALLOW
    assert judged(network(allow=(rule,)), connect("198.51.100.7", name="a.org", protocol="tls")) is DENY
    assert judged(network(allow=(rule,)), connect("192.0.2.7")) is DENY
    assert judged(network(allow=(NetworkRule("a.org"),), deny=(rule,)), connect(name="a.org")) is DENY


@pytest.mark.parametrize(
    ("rule", "heard"),
    [
        (NetworkRule("a.org"), {"tls", ("http", 80)}),
        (NetworkRule("a.org", protocol="tls"), {"tls"}),
        (NetworkRule("a.org", protocol="http"), {"http"}),
        (NetworkRule("a.org", protocol="ssh"), {"ssh"}),
        (NetworkRule("a.org", protocol="tcp"), {"tcp"}),
        (NetworkRule("a.org", protocol="connect"), {"connect"}),
        (NetworkRule("a.org", protocol="stratum"), {"stratum"}),
        (NetworkRule("a.org", permit=(Permit.CONNECT,)), {"tls", ("http", 80), ("connect", 80)}),
        (NetworkRule("a.org", protocol="http", permit=(Permit.H2C,)), {"http", "h2c"}),
        (NetworkRule("a.org", protocol="tls", permit=(Permit.CONNECT, Permit.H2C)), {"tls"}),
    ],
)
def test_what_is_spoken_must_be_what_the_rule_says(rule: NetworkRule, heard: set[object]) -> None:
    for port in (80, 443):
        assert judged(network(allow=(rule,)), connect(name="a.org", port=port)) is ALLOW  # not known yet
        for spoken in (*PROTOCOLS_HEARD, "other"):
            expected = ALLOW if spoken in heard or (spoken, port) in heard else DENY
            attempt = connect("192.0.2.1", port, name="a.org", protocol=spoken)
            assert judged(network(allow=(rule,)), attempt) is expected, (spoken, port)
            asked = ASK if expected is ALLOW else DENY
            assert judged(network(ask=(rule,)), attempt) is asked


PROTOCOLS_HEARD = ("tls", "http", "ssh", "tcp", "socks", "connect", "stratum", "tor", "tunnel", "h2c")


def test_a_deny_of_tcp_or_of_no_protocol_denies_whatever_is_spoken() -> None:
    everything = tuple(NetworkRule("a.org", protocol=word) for word in (None, *PROTOCOLS_HEARD))
    for protocol in (None, "tcp"):
        policy = network(allow=everything, deny=(NetworkRule("a.org", protocol=protocol),))
        for spoken in (None, *PROTOCOLS_HEARD, "other"):
            assert judged(policy, connect("192.0.2.1", name="a.org", protocol=spoken)) is DENY
    policy = network(allow=everything, deny=(NetworkRule("a.org", protocol="http"),))
    denied = {p for p in PROTOCOLS_HEARD if judged(policy, connect("192.0.2.1", name="a.org", protocol=p)) is DENY}
    assert denied == {"http", "h2c", "connect"}


@pytest.mark.parametrize("transport", [Transport.TCP, Transport.UDP])
@pytest.mark.parametrize("kind", [Kind.NET_CONNECT, Kind.NET_SEND])
def test_queries_go_to_the_gateway_whomever_they_are_sent_to(kind: Kind, transport: Transport) -> None:
    policy = network(allow=(NetworkRule("a.org"),))
    for address in ("198.18.0.53", "8.8.8.8", "2001:db8::53"):
        opinion = PolicyPart(policy).judge(Action(kind, Endpoint(transport, address, 53), ORIGIN))
        assert (opinion.verdict, opinion.rule) == (ALLOW, RESOLVER_RULE)
    endpoint = Endpoint(transport, "8.8.8.8", 53)
    assert judged(Policy(), (kind, endpoint)) is DENY  # no gateway, no route
    assert judged(network(ask=policy.network.allow), (kind, endpoint)) is ALLOW
    assert judged(replace_deny(policy, NetworkRule(network="8.8.8.0/24")), (kind, endpoint)) is DENY
    for other in (
        replace(endpoint, port=54),
        replace(endpoint, protected=True),
        replace(endpoint, protocol="tls"),
        replace(endpoint, name="b.org"),
    ):
        assert judged(policy, (kind, other)) is DENY
    for loopback in ("127.0.0.1", "0.0.0.0", "::1"):
        closed = replace(policy, network=replace(policy.network, loopback=DENY))
        assert judged(closed, (kind, replace(endpoint, address=loopback))) is DENY
    assert judged(policy, (Kind.HTTP_REQUEST, Request(endpoint, "GET", "/"))) is DENY


def replace_deny(policy: Policy, *rules: NetworkRule) -> Policy:
    return replace(policy, network=replace(policy.network, deny=rules))


# ---- requests ----


@pytest.mark.parametrize(("path", "readings"), READINGS.items())
def test_what_a_path_may_mean(path: str, readings: tuple[str, ...]) -> None:
    assert read_path(path) == readings


@pytest.mark.parametrize(
    "path",
    [
        "",
        "a",
        "/.",
        "/..",
        "/a/./b",
        "/%2e%2e/a",
        "/a%2f..%2fb",
        "/a/%2e",
        "//",
        "/a//",
        "/;x/a",
        "/a%00",
        "/a%0d%0ab",
        "/a%5c..%5cb",
        "/%",
        "/%2",
        "/%zz",
        "/%ff",
        "/%25",
        "/a#b",
        "/\udcff",
        "http://a.org/a",
        "/..;/a",
        "/a%3b/../b",
    ],
)
def test_paths_that_servers_read_in_many_ways(path: str) -> None:
    assert read_path(path) == ()


@given(st.text(max_size=30) | st.text("/%.;2eEfF5cC3?#a\\", max_size=20))
def test_no_path_makes_the_reader_fail(path: str) -> None:
    for reading in read_path(path):
        assert reading.startswith("/") and not {"", ".", ".."} & set(reading[1:].split("/")[:-1])
        assert reading == "/" or not reading.endswith("/")


def request(method: str, path: str, **how: object) -> Attempt:
    values: dict[str, object] = {"name": "a.org", "protocol": "tls"}
    return Kind.HTTP_REQUEST, Request(Endpoint(Transport.TCP, "192.0.2.1", 443, **values | how), method, path)  # type: ignore[arg-type]


def test_requests_are_judged_one_by_one() -> None:
    policy = network(
        allow=(NetworkRule("a.org", requests=(RequestRule(("GET", "HEAD"), "/repos/**"),)),),
        ask=(NetworkRule("a.org", requests=(RequestRule(("POST",), "/repos/*/issues"),)),),
        deny=(NetworkRule("a.org", requests=(RequestRule((), "/repos/secret/**"),)),),
    )
    for spoken in (None, "tls"):
        assert judged(policy, connect("192.0.2.1", name="a.org", protocol=spoken)) is ALLOW
    assert judged(policy, connect("192.0.2.1", name="a.org", protocol="ssh")) is DENY
    for method, path, verdict in (
        ("GET", "/repos/x", ALLOW),
        ("GET", "/repos/x%3fy", ALLOW),
        ("GET", "/repos%3f/x", DENY),
        ("GET", "/repos/secret?/x", DENY),
        ("GET", "/user", DENY),
        ("get", "/repos/x", DENY),
        ("DELETE", "/repos/x", DENY),
        ("POST", "/repos/x/issues", ASK),
        ("POST", "/repos/x/issues/", ASK),
        ("GET", "/repos/secret/x", DENY),
        ("GET", "/repos/%73ecret/x", DENY),
        ("GET", "/repos/secret;v=1/x", DENY),
        ("GET", "/repos/x/../secret/x", DENY),
        ("GET", "/repos/x%2f..%2fsecret", DENY),
    ):
        assert judged(policy, request(method, path)) is verdict, path
    assert judged(policy, request("GET", "/repos/x", name="b.org")) is DENY


def test_a_deny_means_any_spelling_and_an_allow_its_own() -> None:
    deny = network(
        allow=(NetworkRule("a.org"),), deny=(NetworkRule("a.org", requests=(RequestRule((), "/Repos/*/k"),)),)
    )
    for path, verdict in (
        ("/Repos/a/k", DENY),
        ("/repos/a/k", DENY),
        ("/REPOS/a/K.", DENY),
        ("/repos/a/k%20/", DENY),
        ("/repos/a/\u212a", DENY),  # the sign of Kelvin
        ("/repos/a/b", ALLOW),
    ):
        assert judged(deny, request("GET", path)) is verdict, path
    allow = network(allow=(NetworkRule("a.org", requests=(RequestRule((), "/Repos/*/k"),)),))
    for path, verdict in (("/Repos/a/k", ALLOW), ("/repos/a/k", DENY), ("/Repos/a/k.", DENY), ("/Repos/a/K", DENY)):
        assert judged(allow, request("GET", path)) is verdict, path


def test_an_encoded_slash_must_be_allowed_both_ways() -> None:
    for glob, verdict in (("/@babel/*", DENY), ("/@babel*", DENY), ("/@babel*/**", ALLOW), ("/**", ALLOW)):
        policy = network(allow=(NetworkRule("a.org", requests=(RequestRule(("GET",), glob),)),))
        assert judged(policy, request("GET", "/@babel%2fcore")) is verdict


def test_a_path_that_may_be_another_is_no_way_around_a_question() -> None:
    policy = network(
        allow=(NetworkRule("a.org"),),
        ask=(NetworkRule("a.org", requests=(RequestRule(("POST",), "/admin/*"),)),),
    )
    policy = replace(policy, irreversible=ALLOW)
    for method, path, verdict in (
        ("POST", "/admin/x", ASK),
        ("post", "/admin/x", ASK),
        ("POST", "/admin;a/x", ASK),
        ("POST", "/admin%2fx", ASK),
        ("POST", "/y/../admin/x", ASK),
        ("POST", "//admin/x", ASK),
        ("POST", "/ADMIN/x", ASK),
        ("POST", "/%41dmin/x", ASK),
        ("POST", "/admin./x", ASK),
        ("POST", "/admin%20/x", ASK),
        ("POST", "/\uff41dmin/x", ASK),
        ("POST", "/y/%20/x", ASK),
        ("POST", "/admins/x", ALLOW),
        ("GET", "/admin/x", ALLOW),
        ("POST", "/y", ALLOW),
    ):
        assert judged(policy, request(method, path)) is verdict, path


def test_an_opinion_has_all_rules_that_ask_in_any_order() -> None:
    general, special = NetworkRule("a.org"), NetworkRule("a.org", requests=(RequestRule(("DELETE",)),))
    for rules in ((general, special), (special, general)):
        part = PolicyPart(network(allow=(NetworkRule("b.org"),), ask=rules))
        for attempt, asking in (
            (connect("192.0.2.1", name="a.org", protocol="tls"), {general}),
            (request("GET", "/x"), {general}),
            (request("DELETE", "/x"), {general, special}),
        ):
            opinion = part.judge(Action(*attempt, ORIGIN))
            assert opinion.verdict is ASK
            assert set(opinion.asked) == {f"network.ask[{rules.index(rule)}]" for rule in asking}
        assert part.judge(Action(*connect("192.0.2.1", name="b.org", protocol="tls"), ORIGIN)).asked == ()
    denied = PolicyPart(network(ask=(general,), deny=(NetworkRule("a.org"),)))
    assert denied.judge(Action(*request("GET", "/x"), ORIGIN)).asked == ()


def test_between_programs_of_the_sandbox_nobody_looks_at_requests() -> None:
    rule = NetworkRule(network="127.0.0.1/32", requests=(RequestRule(("GET",)),))
    assert judged(network(allow=(rule,), loopback=DENY), connect("127.0.0.1")) is DENY
    assert judged(network(ask=(rule,)), connect("127.0.0.1")) is ASK
    assert judged(network(deny=(rule,)), connect("127.0.0.1")) is DENY


def test_a_deny_of_some_requests_does_not_hide_the_name() -> None:
    lookup = (Kind.NET_RESOLVE, Endpoint(Transport.UDP, name="a.org"))
    rules = (NetworkRule("a.org"),)
    assert judged(network(allow=rules, deny=(NetworkRule("a.org", requests=(RequestRule(),)),)), lookup) is ALLOW
    assert judged(network(allow=rules, deny=rules), lookup) is DENY


# ---- terms ----


def test_terms_add_up_whatever_the_order() -> None:
    token = Credential(CredentialKind.BEARER, "env:TOKEN")
    rules = (
        NetworkRule("a.org", permit=(Permit.WEBSOCKET,), limits=FlowLimits(connections=8, up=1000)),
        NetworkRule("*.org", permit=(Permit.NO_SNI,), limits=FlowLimits(up=500, idle=7200.0)),
        NetworkRule("a.org", requests=(RequestRule(("GET",)),), credential=token),
        NetworkRule("a.org", protocol="ssh", permit=(Permit.STARTTLS,)),
    )
    expected = Terms(
        ("network.allow[0]", "network.allow[1]", "network.allow[2]"),
        frozenset({Permit.WEBSOCKET, Permit.NO_SNI}),
        True,
        token,
        FlowLimits(connections=8, up=500, idle=7200.0),
        judged=True,
    )
    endpoint = Endpoint(Transport.TCP, "192.0.2.1", 443, "a.org", protocol="tls")
    assert PolicyPart(network(allow=rules)).terms(endpoint) == expected
    turned = PolicyPart(network(allow=rules[::-1])).terms(endpoint)
    assert replace(turned, rules=()) == replace(expected, rules=())
    assert PolicyPart(network(allow=rules)).terms(Request(endpoint, "POST", "/")).credential is None
    assert PolicyPart(network(allow=rules)).terms(replace(endpoint, name="b.com")) == Terms()


def test_a_deny_of_requests_ends_tls_where_no_allow_asks_for_it() -> None:
    rules = (NetworkRule("a.org"),)
    endpoint = Endpoint(Transport.TCP, "192.0.2.1", 443, "a.org", protocol="tls")
    assert not PolicyPart(network(allow=rules)).terms(endpoint).intercept
    deny = (NetworkRule("a.org", requests=(RequestRule(("DELETE",)),)),)
    assert PolicyPart(network(allow=rules, deny=deny)).terms(endpoint).intercept


def test_a_secret_goes_over_tls_to_one_name_or_as_the_rule_says_in_clear() -> None:
    token = Credential(CredentialKind.BEARER, "env:TOKEN")
    endpoint = Endpoint(Transport.TCP, "192.0.2.1", 80, "a.org", protocol="http")
    for rule, protocol, used in (
        (NetworkRule("a.org", credential=token), "tls", True),
        (NetworkRule("a.org", credential=token), "http", False),
        (NetworkRule("a.org", protocol="http", credential=token), "http", True),
        (NetworkRule("a.org", credential=token), None, False),
        (NetworkRule("*.org", credential=token), "tls", False),
        (NetworkRule(ANY_NAME, credential=token), "tls", False),
        (NetworkRule(network="192.0.2.1/32", credential=token), "tls", False),
    ):
        terms = PolicyPart(network(allow=(rule,))).terms(replace(endpoint, protocol=protocol))
        assert terms.credential == (token if used else None)


def test_of_two_credentials_neither_is_used() -> None:
    one, other = SECRETS
    rules = (NetworkRule("a.org", credential=one), NetworkRule("a.org", credential=other))
    opinion = PolicyPart(network(allow=rules)).judge(Action(*request("GET", "/"), ORIGIN))
    assert (opinion.verdict, opinion.rule) == (DENY, "network (several credentials)")
    assert PolicyPart(network(allow=rules)).terms(request("GET", "/")[1]).credential is None  # type: ignore[arg-type]
    same = (rules[0], replace(rules[0], ports=((443, 443),)))
    assert judged(network(allow=same), request("GET", "/")) is ALLOW


def test_a_script_does_not_hide_its_interpreter() -> None:
    script = Kind.PROCESS_EXEC, Program("/work/x", ("./x", "push"), interpreter="/usr/bin/python3")
    assert judged(Policy(), script) is ALLOW
    assert judged(Policy(process=Processes(deny=(ExecRule("/usr/bin/python*"),))), script) is DENY
    assert judged(Policy(process=Processes(ask=(ExecRule("/**/python3", ("*", "/work/x", "**")),))), script) is ASK
    assert judged(Policy(process=Processes(deny=(ExecRule("/**/python3", ("*", "/work/y", "x")),))), script) is ALLOW


def test_arguments_that_were_cut_off_are_no_way_around_a_deny() -> None:
    processes = Processes(deny=(ExecRule("/**/git", ("git", "*", "--force")),))
    program = Program("/bin/git", ("git", "push", "--fo"), truncated=True)
    assert judged(Policy(process=processes), (Kind.PROCESS_EXEC, program)) is DENY
    exact = Processes(allow=(ExecRule("/bin/git", ("git", "push", "--fo")),))
    assert judged(Policy(process=exact), (Kind.PROCESS_EXEC, program)) is DENY


def test_an_allow_must_cover_every_table() -> None:
    data = Data(allow=(DataRule("w", ("select",), ("a", "b*")),), deny=(DataRule("w", (), ("b_secret",)),))
    for tables, verdict in ((("a", "b1"), ALLOW), (("a", "c"), DENY), (("a", "b_secret"), DENY), ((), DENY)):
        assert judged(Policy(data=data), (Kind.DATA_QUERY, Query("w", "select", tables))) is verdict


def test_applying_asks_and_the_other_verbs_are_free() -> None:
    for kind in Kind:
        if kind.value.startswith("sandbox."):
            opinion = PolicyPart(Policy()).judge(Action(kind, Verb(("a",)), ORIGIN))
            assert opinion.verdict is (ASK if kind in (Kind.SANDBOX_APPLY, Kind.SANDBOX_UNDO) else ALLOW)
            assert opinion.rule == "built-in"


def test_what_is_applied_is_asked_for_by_the_rules_that_name_it() -> None:
    part = PolicyPart(Policy(apply=Apply(ask=("/**/makefile", "/deploy/**", "/a\\*"))))
    for names, asked in {
        ("src/x.py",): ("built-in",),
        ("src/x.py", "src/Makefile"): ("apply.ask[0]", "built-in"),
        ("Makefile/below",): ("apply.ask[0]", "built-in"),
        ("/makefile", "deploy", "DEPLOY/x/y"): ("apply.ask[0]", "apply.ask[1]", "built-in"),
        ("src/deploy/x", "deployed", "makefile.am", "ab"): ("built-in",),
        ("a*",): ("apply.ask[2]", "built-in"),
        (): ("built-in",),
    }.items():
        opinion = part.judge(Action(Kind.SANDBOX_APPLY, Verb(names, "k3f9x2mq", "sha256:0"), ORIGIN))
        assert (opinion.verdict, opinion.rule, opinion.asked) == (ASK, asked[0], asked)
        # What is taken back was there before.
        assert part.judge(Action(Kind.SANDBOX_UNDO, Verb(names), ORIGIN)).asked == ("built-in",)


@pytest.mark.parametrize("kind", Kind)
def test_what_the_policy_has_no_words_for_is_denied(kind: Kind) -> None:
    for subject in (Verb(()), Endpoint(Transport.TCP, "127.0.0.1"), ModelCall("m"), File("/a", Access.READ)):
        judgement = PolicyPart(Policy()).explain(kind, subject)
        right = {Verb: "sandbox", Endpoint: "net", File: "file", ModelCall: "model"}[type(subject)]
        if kind.value.partition(".")[0] != right:
            assert judgement.opinion.verdict is DENY
            assert judgement.opinion.rule == "policy (nothing allows it)"


# ---- what is said ----


def test_a_refusal_says_which_rule_and_what_to_do() -> None:
    said = PolicyPart(Policy()).judge(Action(*connect("192.0.2.1"), ORIGIN))
    assert said.rule == "network (nothing allows it)"
    assert said.reason == "This sandbox may not connect to 192.0.2.1:443: no rule of its policy allows it."
    assert said.advice.startswith("Do not retry") and not said.private
    note = Note("it is production", "use the copy", private=True)
    rules = (NetworkRule("b.org"), NetworkRule("a.org"), NetworkRule("a.org", note=note))
    said = PolicyPart(network(deny=rules)).judge(Action(*connect(name="a.org"), ORIGIN))
    assert (said.rule, said.private) == ("network.deny[1]", False)
    said = PolicyPart(network(deny=rules[2:])).judge(Action(*connect(name="a.org"), ORIGIN))
    assert (said.rule, said.reason, said.advice, said.private) == (
        "network.deny[0]",
        *("it is production", "use the copy"),
        True,
    )


def test_what_is_said_of_system_calls() -> None:
    part = PolicyPart(Policy(syscalls=Syscalls(ask=("perf_event_open", "bpf"), deny=("bpf",))))
    said = {
        name: part.judge(Action(Kind.KERNEL, KernelCall(name, 1, "because"), ORIGIN))
        for name in ("mount", "bpf", "perf_event_open")
    }
    assert [(each.verdict, each.rule) for each in said.values()] == [
        (DENY, "syscalls"),
        (DENY, "syscalls.deny[0]"),
        (ASK, "syscalls.ask[0]"),
    ]
    assert "because" in said["mount"].reason


def test_files_that_are_not_asked_for_are_the_mounts_business() -> None:
    part = PolicyPart(Policy(filesystem=Filesystem(ask=("/work/.env",), watch=("/work/**",))))
    rules = [
        part.judge(Action(Kind.FILE_RENAME, File(path, Access.WRITE, other), ORIGIN)).rule
        for path, other in (("/work/.env", "/tmp/x"), ("/tmp/x", "/work/.env"), ("/work/a", ""), ("/tmp/x", ""))
    ]
    assert rules == ["filesystem.ask[0]", "filesystem.ask[0]", "filesystem.watch[0]", "filesystem"]


def test_the_memory_of_judgements_is_bounded() -> None:
    part = PolicyPart(Policy())
    for number in range(3 * MAX_CACHED):
        part.judge(Action(Kind.FILE_OPEN, File(f"/work/{number}", Access.READ), ORIGIN))
        part.judge(Action(Kind.PROCESS_EXEC, Program(f"/work/{number}", ("x" * 100,)), ORIGIN))
    assert len(part._cache) <= MAX_CACHED


def test_judgements_of_long_paths_are_not_kept() -> None:
    part = PolicyPart(network(allow=(NetworkRule("a.org", requests=(RequestRule(),)),)))
    for length, kept in ((MAX_CACHED_PATH, 1), (MAX_CACHED_PATH + 1, 1)):
        kind, subject = request("GET", "/" + "x" * (length - 1))
        assert part.judge(Action(kind, subject, ORIGIN)).verdict is ALLOW
        assert len(part._cache) == kept
