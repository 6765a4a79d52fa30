"""Any valid policy document, for property tests, and how one is written as YAML."""

from __future__ import annotations

import dataclasses
from enum import Enum
from typing import Any

import yaml
from hypothesis import strategies as st

from corral.actions import Content, Kind, Verdict
from corral.policy.model import Credential, Note, Operation, Permit, Policy, RequestRule, Upstream

Document = dict[str, Any]

WORDS = st.from_regex(r"[A-Za-z0-9][A-Za-z0-9._+:-]{0,20}", fullmatch=True)
LABELS = st.from_regex(r"[a-z]([a-z0-9-]{0,10}[a-z0-9])?", fullmatch=True).filter(lambda text: text[2:4] != "--")
NAMES = st.lists(LABELS, min_size=1, max_size=3).map(".".join)
PATHS = st.lists(st.from_regex(r"[a-z0-9_ ä-]{0,5}[a-z0-9]", fullmatch=True), min_size=1, max_size=3).map(
    lambda parts: "/" + "/".join(part.strip() for part in parts)
)
PATH_GLOBS = st.builds(
    lambda start, rest: start + rest, PATHS, st.sampled_from(["", "/*", "/**", "/**/x", "/?.py", "/\\*"])
)
PORTS = st.integers(1, 65535)
PORT_RANGES = st.tuples(PORTS, PORTS).map(lambda pair: f"{min(pair)}-{max(pair)}")
LINES = st.text(st.characters(codec="utf-8", categories=("L", "N", "P")), max_size=20)
NOTES: dict[str, st.SearchStrategy[Any]] = {"reason": LINES, "advice": LINES, "private": st.booleans()}


def _rules(required: dict[str, Any], optional: dict[str, Any], *texts: st.SearchStrategy[str]) -> Any:
    mappings = st.fixed_dictionaries(required, optional={**optional, **NOTES})
    return st.lists(st.one_of(*texts, mappings), max_size=4)


METHODS = st.sampled_from(["GET", "post", "X-Y"])
REQUEST_PATHS = st.sampled_from(["/", "/**", "/repos/**", "/a/*/b/", "/x?", "/\\*"])
REQUESTS = st.lists(
    METHODS
    | REQUEST_PATHS
    | st.builds(lambda method, path: f"{method} {path}", METHODS, REQUEST_PATHS)
    | st.fixed_dictionaries(
        {}, optional={"method": METHODS | st.lists(METHODS, min_size=1, max_size=2), "path": REQUEST_PATHS}
    ),
    min_size=1,
    max_size=3,
)
SOURCES = st.sampled_from(["env:TOKEN", "file:/run/secrets/x", "file:./x"])
CREDENTIALS = st.one_of(
    st.fixed_dictionaries({"type": st.just("bearer"), "from": SOURCES}),
    st.fixed_dictionaries({"type": st.just("basic"), "from": SOURCES, "user": WORDS.map(lambda w: w.replace(":", ""))}),
    st.fixed_dictionaries({"type": st.just("header"), "from": SOURCES, "header": st.sampled_from(["X-Key", "x-key"])}),
    st.fixed_dictionaries({"type": st.just("git"), "from": SOURCES}, optional={"user": st.just("me")}),
)
AMOUNTS = st.integers(1, 1 << 40) | st.sampled_from(["10MiB", "1.5GiB"])
LIMITS = st.fixed_dictionaries(
    {},
    optional={
        "connections": st.integers(1, 65535),
        "up": AMOUNTS,
        "down": AMOUNTS,
        "session_up": AMOUNTS,
        "session_down": AMOUNTS,
        "idle": st.floats(0.001, 1000) | st.just("15m"),
        "dial": st.just("5s"),
        "header": st.integers(1024, 1 << 20) | st.just("16KiB"),
        "body": AMOUNTS,
    },
)
PLACES = {
    "port": PORTS | PORT_RANGES | st.lists(PORTS | PORT_RANGES, min_size=1, max_size=3),
    "cidr": st.sampled_from(["192.0.2.0/24", "2001:db8::/32", "::ffff:192.0.2.0/120"]),
}
SHORT = (
    NAMES,
    st.builds(lambda name, port: f"{name}:{port}", NAMES, PORTS | PORT_RANGES),
    st.ip_addresses(v=4).map(str),
    st.builds(lambda address, port: f"[{address}]:{port}", st.ip_addresses(v=6), PORTS),
)
NAMED = {"name": NAMES | NAMES.map(lambda name: f"*.{name}")}
PROTOCOLS = st.sampled_from(["tls", "ssh", "http", "tcp", "udp", "socks", "connect", "stratum", "tor", "tunnel"])
WITH_REQUESTS = {"protocol": st.sampled_from(["tls", "http"]), "requests": REQUESTS}
DENIED = _rules(NAMED, {**PLACES, "protocol": PROTOCOLS}, *SHORT) | _rules(NAMED, {**PLACES, **WITH_REQUESTS})
PERMITS = st.lists(st.sampled_from([each.value for each in Permit if each is not Permit.ECH]), min_size=1, max_size=3)
DESTINATIONS = st.one_of(
    DENIED,
    _rules(NAMED, {**PLACES, "protocol": PROTOCOLS, "permit": PERMITS | st.just(["ech"]), "limits": LIMITS}, *SHORT),
    _rules(
        {"name": NAMES},
        {**PLACES, **WITH_REQUESTS, "permit": PERMITS, "limits": LIMITS, "credential": CREDENTIALS},
    ),
    _rules(NAMED, {**PLACES, "protocol": st.just("tls"), "requests": REQUESTS, "intercept": st.booleans()}),
)
PROGRAMS = _rules(
    {"path": PATH_GLOBS | LABELS},
    {"argv": st.lists(st.text(st.characters(codec="utf-8", exclude_characters="\0\\*")), min_size=1, max_size=3)},
    LABELS,
)
MODELS = _rules({"name": WORDS | WORDS.map(lambda word: f"{word}*")}, {}, WORDS)
QUERIES = _rules(
    {"source": WORDS},
    {
        "statements": st.lists(st.sampled_from(["select", "INSERT", "drop"]), min_size=1, max_size=3),
        "tables": st.lists(WORDS, min_size=1, max_size=3),
    },
    WORDS,
)
OPERATIONS = _rules(
    {"service": WORDS},
    {"operations": st.lists(st.sampled_from(["list*", "GET /a/*", "create"]), min_size=1, max_size=3)},
    WORDS,
)
WEB_URLS = st.sampled_from(
    ["https://models.example/v1", "https://192.0.2.1:8443/", "https://[2001:db8::1]", "http://127.0.0.1:8000/v1"]
)
COUNTS = st.integers(1, 65_535)
BUDGETS = st.fixed_dictionaries(
    {},
    optional={
        "tokens": COUNTS,
        "money": st.floats(0.01, 1e6) | COUNTS,
        "requests": COUNTS,
        "requests_per_minute": COUNTS,
        "concurrent": COUNTS,
        "wall_time": st.just("2h"),
    },
)


def _named(names: st.SearchStrategy[str], entry: Any) -> st.SearchStrategy[list[Any]]:
    """Entries whose names are all different."""
    return st.lists(st.tuples(names, entry), max_size=3, unique_by=lambda pair: pair[0].casefold()).map(
        lambda pairs: [{"name": name, **rest} if isinstance(rest, dict) else name for name, rest in pairs]
    )


UPSTREAMS = _named(
    WORDS,
    st.fixed_dictionaries(
        {"url": WEB_URLS, "api": st.sampled_from(["openai", "anthropic"])},
        optional={
            "models": st.lists(st.sampled_from(["gpt-*", "*", "claude"]), min_size=1, max_size=2).map(
                lambda globs: [*globs, "*"]
            ),
            "credential": CREDENTIALS,
            "rename": st.dictionaries(WORDS, WORDS, max_size=2),
        },
    ),
)
PRICES = st.lists(
    st.fixed_dictionaries(
        {"model": WORDS.map(lambda word: f"{word}*"), "input": st.floats(0, 100), "output": st.integers(0, 100)},
        optional={"cached": st.floats(0, 100), "written": st.floats(0, 100)},
    ),
    max_size=3,
)
COLUMNS = _named(
    LABELS,
    st.none()
    | st.fixed_dictionaries({}, optional={"use": st.sampled_from(["show", "mask", "hash"]), "personal": st.booleans()}),
).filter(bool)
TABLES = _named(
    LABELS | LABELS.map(lambda name: f"public.{name}"),
    st.fixed_dictionaries(
        {"columns": COLUMNS},
        optional={
            "rows": st.sampled_from(["a = 'x'", "a > 1\n"]),
            "statements": st.lists(st.sampled_from(["select", "INSERT", "update"]), min_size=1, max_size=3),
        },
    ),
)
DATA_LIMITS = {
    "rows": COUNTS,
    "bytes": st.integers(1024, 1 << 30) | st.just("1MiB"),
    "time": st.just("10s"),
    "queries_per_minute": COUNTS,
    "concurrent": st.integers(1, 1024),
}
DATA_SOURCES = _named(
    WORDS,
    st.fixed_dictionaries(
        {"dialect": st.sampled_from(["sqlite", "duckdb"]), "url": PATHS},
        optional={
            "tables": TABLES,
            "limits": st.fixed_dictionaries({}, optional=DATA_LIMITS),
            "hold_writes": st.booleans(),
        },
    )
    | st.fixed_dictionaries(
        {"dialect": st.just("postgresql"), "url": st.sampled_from(["postgres://me@db.example/d"])},
        optional={
            "password": SOURCES,
            "role": st.just("reader"),
            "tables": TABLES,
            "limits": st.fixed_dictionaries({}, optional={**DATA_LIMITS, "cost": st.floats(1, 1e6)}),
        },
    ),
)
OPERATION = st.sampled_from(["list", "create", "GET /a/{id}"])
SERVICES = _named(
    WORDS,
    st.fixed_dictionaries(
        {"document": PATHS, "url": WEB_URLS},
        optional={
            "operations": st.lists(OPERATION, max_size=3, unique=True)
            | st.tuples(
                st.fixed_dictionaries(
                    {"id": OPERATION},
                    optional={
                        "parameters": st.dictionaries(
                            st.sampled_from(["a", "body.b.c"]),
                            WORDS | st.lists(WORDS, min_size=1, max_size=2),
                            max_size=2,
                        )
                    },
                )
            ).map(list),
            "credential": CREDENTIALS,
            "requests_per_minute": COUNTS,
            "concurrent": st.integers(1, 1024),
            "time": st.just("30s"),
            "bytes": st.integers(1024, 1 << 30),
        },
    ),
)
CALLS = st.lists(st.sampled_from(["mlock", "sync", "personality", "setsockopt"]), max_size=3)
ANSWERS = st.sampled_from(["allow", "ask", "deny"])
VARIABLES = st.from_regex(r"[A-Za-z_][A-Za-z0-9_]{0,10}", fullmatch=True)


def _section(**fields: st.SearchStrategy[Any]) -> st.SearchStrategy[Document]:
    return st.fixed_dictionaries({}, optional=fields)


DOCUMENTS: st.SearchStrategy[Document] = _section(
    version=st.just(1),
    profile=st.sampled_from(["coding-agent", "rl-rollout", "locked"]),
    agent=_section(name=WORDS, version=WORDS),
    filesystem=_section(
        read=st.lists(PATHS, max_size=3),
        write=st.lists(PATHS, max_size=3),
        deny=st.lists(PATHS, max_size=3),
        ask=st.lists(PATH_GLOBS, max_size=3),
        watch=st.lists(PATH_GLOBS, max_size=3),
    ),
    network=_section(
        allow=DESTINATIONS,
        ask=DESTINATIONS,
        deny=DENIED,
        loopback=ANSWERS,
        listen=ANSWERS,
        resolvers=st.lists(
            st.sampled_from(["192.0.2.1", "192.0.2.1:53", "[2001:db8::1]:53", "2001:DB8::1"]), max_size=3
        ),
        proxy=st.sampled_from(["http://192.0.2.1:3128", "http://[2001:db8::1]:3128/"]),
    ),
    process=_section(allow=PROGRAMS, ask=PROGRAMS, deny=PROGRAMS),
    syscalls=_section(ask=CALLS, deny=CALLS),
    resources=_section(
        cpu=st.floats(0.01, 8192),
        memory=st.integers(1 << 20, 1 << 50) | st.sampled_from(["512MiB", "1.5GiB"]),
        processes=st.integers(1, 4_194_304),
        wall_time=st.floats(0.001, 1000) | st.sampled_from(["90s", "2h"]),
    ),
    layers=_section(
        keep_for=st.floats(0.001, 1000) | st.just("30d"),
        snapshot_bytes=st.integers(1 << 20, 1 << 50),
        total_bytes=st.just("20GiB"),
    ),
    environment=_section(
        allow=st.lists(VARIABLES | VARIABLES.map(lambda name: f"{name}*"), max_size=3),
        set=st.dictionaries(VARIABLES, st.text(st.characters(codec="utf-8", exclude_characters="\0")), max_size=3),
    ),
    model=_section(
        allow=MODELS,
        ask=MODELS,
        deny=MODELS,
        upstreams=UPSTREAMS,
        currency=st.sampled_from(["USD", "EUR"]),
        prices=PRICES,
        session=BUDGETS,
        agent=BUDGETS,
        agent_period=st.just("24h"),
        patience=_section(connect=st.just("1s"), first=st.just("1m"), idle=st.just("1m"), retries=st.integers(0, 10)),
        guard=_section(
            scanners=st.lists(LABELS, max_size=2),
            finding=st.sampled_from(["block", "record"]),
            failure=st.sampled_from(["block", "record"]),
        ),
        hosted_tools=st.lists(st.sampled_from(["mcp", "web_search*", "*"]), max_size=3),
        remote_content=st.booleans(),
    ),
    data=_section(allow=QUERIES, ask=QUERIES, deny=QUERIES, sources=DATA_SOURCES),
    api=_section(allow=OPERATIONS, ask=OPERATIONS, deny=OPERATIONS, services=SERVICES),
    approvals=_section(timeout=st.floats(0.001, 1000) | st.just("5m"), freeze=st.booleans()),
    log=_section(
        asynchronous=st.lists(st.sampled_from([each.value for each in Kind]), max_size=3),
        keep=st.dictionaries(st.sampled_from([each.value for each in Content]), st.just("30d") | st.integers(1, 999)),
        keep_bytes=st.integers(1024, 1 << 26),
        files=st.lists(PATH_GLOBS, max_size=3),
    ),
    apply=_section(
        ask=st.lists(PATH_GLOBS | LABELS, max_size=3),
        witnesses=st.lists(
            st.just("witness.example/one+55da798a+BMhTrQ8M0rYZrqks7sT9VqJNZJnVhM55JX5Fz9gTm2Cn"), max_size=1
        ),
        cosignatures=st.integers(0, 64),
    ),
    detection=_section(rules=st.lists(PATHS, max_size=3)),
    autonomy=_section(level=st.integers(0, 9)),
    irreversible=ANSWERS,
    allow_degraded=st.lists(st.just("landlock"), max_size=2),
)


def document_of(policy: Policy) -> Document:
    """A policy file that says all of ``policy``, in full."""
    fields = {field.name for field in dataclasses.fields(policy)} - {"allow_degraded", "irreversible"}
    document: Document = {name: _section_of(getattr(policy, name)) for name in fields}
    document["irreversible"] = _value_of(policy.irreversible)
    document["environment"]["set"] = dict(policy.environment.set)
    document["log"]["keep"] = {content.value: seconds for content, seconds in policy.log.keep}
    for rule in document["network"]["deny"]:  # says nothing of how
        del rule["intercept"], rule["limits"]
    document["allow_degraded"] = [wall.value for wall in policy.allow_degraded]
    return document


def _section_of(values: Any) -> Document:
    pairs = {field.name: getattr(values, field.name) for field in dataclasses.fields(values)}
    return {name: _value_of(value) for name, value in pairs.items() if value is not None}


def _value_of(value: Any) -> Any:
    if isinstance(value, tuple):
        return [_rule_of(each) if dataclasses.is_dataclass(each) else _value_of(each) for each in value]
    if isinstance(value, Credential):
        kind = {"type": value.kind.value, "from": value.source}
        return kind | {name: getattr(value, name) for name in ("header", "user") if getattr(value, name)}
    if dataclasses.is_dataclass(value):
        return _section_of(value)
    if isinstance(value, Enum):
        return value.name.lower() if isinstance(value, Verdict) else value.value
    return value


def _rule_of(rule: Any) -> Document:
    if isinstance(rule, RequestRule):
        return {"path": rule.path} | ({"method": list(rule.methods)} if rule.methods else {})
    document = _section_of(rule)
    if "note" in document:
        note: Note = rule.note
        del document["note"]
        document |= {"reason": note.reason, "advice": note.advice, "private": note.private}
    if isinstance(rule, Upstream):
        document["rename"] = dict(rule.rename)
    if isinstance(rule, Operation):
        document["parameters"] = {each.name: list(each.values) for each in rule.parameters}
    for name in ("rows", "password", "role"):
        if document.get(name) == "":
            del document[name]
    if ports := document.pop("ports", None):
        document["port"] = [f"{low}-{high}" for low, high in ports]
    if "network" in document:
        document["cidr"] = document.pop("network")
    return {name: value for name, value in document.items() if value != []}


class _Dumper(yaml.SafeDumper):
    def ignore_aliases(self, data: object) -> bool:
        return True


def written(document: Document) -> str:
    """The document as YAML. Every text is in double quotes, so that it stays text."""
    node = yaml.compose(yaml.dump(document, Dumper=_Dumper, sort_keys=False, width=1 << 20), yaml.SafeLoader)
    return yaml.serialize(_quoted(node), Dumper=_Dumper, width=1 << 20)


def _quoted(node: yaml.Node | None) -> yaml.Node:
    assert node is not None
    if isinstance(node, yaml.ScalarNode) and node.tag == "tag:yaml.org,2002:str":
        node.style = '"'
    elif isinstance(node, yaml.SequenceNode):
        for item in node.value:
            _quoted(item)
    elif isinstance(node, yaml.MappingNode):
        for key, value in node.value:
            _quoted(key)
            _quoted(value)
    return node
