"""Actions in words, the line that a rule stands on, and tables of expected verdicts."""

from __future__ import annotations

import shlex
from dataclasses import replace
from pathlib import Path

import pytest

from corral.actions import (
    Access,
    Endpoint,
    File,
    KernelCall,
    Kind,
    ModelCall,
    Operation,
    Program,
    Query,
    Request,
    Subject,
    Transport,
    Verb,
    Verdict,
)
from corral.errors import PolicyError
from corral.policy.expectations import load_expectations, table_beside
from corral.policy.explain import find_rule, parse_action
from corral.policy.load import load_policy
from corral.policy.part import PolicyPart

TCP, UDP, UNIX = Transport.TCP, Transport.UDP, Transport.UNIX

WORDS: dict[str, tuple[Kind, Subject]] = {
    "connect GitHub.com.:443": (Kind.NET_CONNECT, Endpoint(TCP, port=443, name="github.com")),
    "connect 192.0.2.1:22": (Kind.NET_CONNECT, Endpoint(TCP, "192.0.2.1", 22)),
    "connect [::ffff:192.0.2.1]:22": (Kind.NET_CONNECT, Endpoint(TCP, "192.0.2.1", 22)),
    "connect [2001:DB8::1]:22": (Kind.NET_CONNECT, Endpoint(TCP, "2001:db8::1", 22)),
    "connect /run/x.sock": (Kind.NET_CONNECT, Endpoint(UNIX, path="/run/x.sock")),
    "connect @x": (Kind.NET_CONNECT, Endpoint(UNIX, path="@x")),
    "send a.org:53 --udp": (Kind.NET_SEND, Endpoint(UDP, port=53, name="a.org")),
    "connect a.org:443 --protocol ssh": (Kind.NET_CONNECT, Endpoint(TCP, port=443, name="a.org", protocol="ssh")),
    "connect a.org:443 --protocol tls --at ::ffff:10.0.0.1 --protected": (
        Kind.NET_CONNECT,
        Endpoint(TCP, "10.0.0.1", 443, "a.org", protocol="tls", protected=True),
    ),
    "request GET a.org:443/x?y=z": (
        Kind.HTTP_REQUEST,
        Request(Endpoint(TCP, "", 443, "a.org", protocol="tls"), "GET", "/x"),
    ),
    "request GET a.org:8443/ --protocol tls": (
        Kind.HTTP_REQUEST,
        Request(Endpoint(TCP, "", 8443, "a.org", protocol="tls"), "GET", "/"),
    ),
    "resolve A.org": (Kind.NET_RESOLVE, Endpoint(UDP, name="a.org")),
    "listen 8080": (Kind.NET_LISTEN, Endpoint(TCP, "0.0.0.0", 8080)),
    "request GET a.org:80/x/y": (Kind.HTTP_REQUEST, Request(Endpoint(TCP, "", 80, "a.org", "", "http"), "GET", "/x/y")),
    "exec /usr/bin/git push 'two words'": (Kind.PROCESS_EXEC, Program("/usr/bin/git", ("git", "push", "two words"))),
    "open /work/.env": (Kind.FILE_OPEN, File("/work/.env", Access.READ)),
    "open /work/.env --write": (Kind.FILE_OPEN, File("/work/.env", Access.WRITE)),
    "rename /a /b": (Kind.FILE_RENAME, File("/a", Access.WRITE, "/b")),
    "link /a /b": (Kind.FILE_LINK, File("/a", Access.WRITE, "/b")),
    "unlink /a": (Kind.FILE_UNLINK, File("/a", Access.WRITE)),
    "chmod /a": (Kind.FILE_CHMOD, File("/a", Access.WRITE)),
    "syscall mount": (Kind.KERNEL, KernelCall("mount", 1, "")),
    "model claude-x": (Kind.MODEL_CALL, ModelCall("claude-x")),
    "query w SELECT a b": (Kind.DATA_QUERY, Query("w", "select", ("a", "b"))),
    "api desk closeTicket post": (Kind.API_CALL, Operation("desk", "closeTicket", "POST")),
    "api desk 'GET /a' GET": (Kind.API_CALL, Operation("desk", "GET /a", "GET")),
    "query w select": (Kind.DATA_QUERY, Query("w", "select")),
    "apply": (Kind.SANDBOX_APPLY, Verb()),
    "apply a b": (Kind.SANDBOX_APPLY, Verb(("a", "b"))),
}


@pytest.mark.parametrize("text", WORDS)
def test_an_action_in_words(text: str) -> None:
    action = parse_action(shlex.split(text))
    assert (action.kind, action.subject) == WORDS[text]


@pytest.mark.parametrize(
    "text",
    [
        "",
        "fly",
        "connect",
        "connect a.org",
        "connect a.org:",
        "connect a.org:0",
        "connect a.org:65536",
        "connect :1",
        "connect a.org:٢",
        "connect 0x7f.1:80",
        "connect 127.1:80",
        "connect ::1:80",
        "connect u@a.org:80",
        "connect a.org:80 --tcp",
        "connect a.org:80 --protocol",
        "connect a.org:80 --protocol gopher",
        "connect a.org:80 --at",
        "connect a.org:80 --at b.org",
        "request GET /run/x.sock",
        "request GET a.org:80/ --udp",
        "request GET a.org:80/ --protocol",
        "resolve a b",
        "api",
        "api desk close",
        "api desk close POST x",
        "api desk close P0ST",
        "resolve 127.1",
        "listen x",
        "request GET",
        "exec",
        "exec git",
        "open",
        "open x",
        "open /a /b",
        "rename /a",
        "open /a --write /b",
        "syscall",
        "model",
        "model a b",
        "query w",
        "unlink a",
    ],
)
def test_what_is_no_action_is_said_so(text: str) -> None:
    with pytest.raises(ValueError) as caught:
        parse_action(shlex.split(text))
    assert type(caught.value) is ValueError and str(caught.value).isprintable()


POLICY = """\
version: 1
profile: ./base.yaml
network:
  allow:
    - a.org:443
    - a.org:443
    - b.org:443
  deny:
    - 192.0.2.0/24
process:
  allow: ["/usr/**"]
filesystem:
  ask:
    - /work/.env
syscalls: {deny: [ptrace]}
"""
BASE = """\
network:
  deny: [198.51.100.0/24, c.org]
  loopback: ask
"""


@pytest.fixture
def policy(tmp_path: Path) -> Path:
    (tmp_path / "base.yaml").write_text(BASE)
    path = tmp_path / "policy.yaml"
    path.write_text(POLICY)
    return path


@pytest.mark.parametrize(
    ("text", "rule", "place"),
    [
        ("connect a.org:443", "network.allow[0]", "policy.yaml:5"),
        ("connect b.org:443", "network.allow[1]", "policy.yaml:7"),
        ("connect 198.51.100.1:1", "network.deny[0]", "base.yaml:2"),
        ("connect c.org:1", "network.deny[1]", "base.yaml:2"),
        ("connect 192.0.2.1:1", "network.deny[2]", "policy.yaml:9"),
        ("connect 127.0.0.1:1", "network.loopback", "base.yaml:3"),
        ("connect d.org:1", "network (nothing allows it)", ""),
        ("exec /usr/bin/x", "process.allow[0]", "policy.yaml:11"),
        ("open /work/.env", "filesystem.ask[0]", "policy.yaml:14"),
        ("open /work/x", "filesystem", ""),
        ("syscall ptrace", "syscalls.deny[0]", "policy.yaml:15"),
        ("listen 1", "network.listen", ""),
        ("apply", "built-in", ""),
    ],
)
def test_the_line_that_the_deciding_rule_stands_on(policy: Path, text: str, rule: str, place: str) -> None:
    loaded = load_policy(policy)
    action = parse_action(text.split())
    opinion = PolicyPart(loaded).judge(action)
    assert opinion.rule == rule
    assert find_rule(policy, rule, loaded) == (str(policy.parent / place) if place else "")


def test_built_in_rules_stand_in_no_file() -> None:
    assert find_rule("locked", "network.loopback", load_policy("locked")) == ""


def test_a_broker_is_allowed_where_it_is_opened(tmp_path: Path) -> None:
    (tmp_path / "base.yaml").write_text(
        "version: 1\nmodel:\n  upstreams:\n    - {name: u, url: https://a.example, api: openai}\n"
    )
    (tmp_path / "p.yaml").write_text("profile: ./base.yaml\nmodel: {allow: ['*']}\n")
    policy = load_policy(tmp_path / "p.yaml")
    assert find_rule(tmp_path / "p.yaml", "model (broker)", policy) == f"{tmp_path}/base.yaml:4"
    assert find_rule(tmp_path / "p.yaml", "model (no broker)", policy) == ""


# ---- tables ----


def test_a_table_is_beside_its_policy(tmp_path: Path) -> None:
    assert table_beside("x/policy.yaml") == "x/policy.test.yaml"
    assert table_beside(tmp_path / "p.yml") == str(tmp_path / "p.test.yml")
    assert table_beside("policy") == "policy.test.yaml"


def test_a_table_says_what_is_expected(policy: Path) -> None:
    table = policy.with_name("t.yaml")
    table.write_text(
        "# cases\n- action: connect a.org:443\n  verdict: allow\n"
        '- {action: [exec, /usr/bin/x, "two words"], verdict: deny, rule: "process.deny[0]"}\n'
    )
    first, second = load_expectations(str(table))
    assert (first.line, first.verdict, second.line, second.verdict) == (2, Verdict.ALLOW, 4, Verdict.DENY)
    assert second.words == ("exec", "/usr/bin/x", "two words")
    part = PolicyPart(load_policy(policy))
    assert first.holds(part.judge(first.action))
    assert replace(first, rule="network.allow[0]").holds(part.judge(first.action))
    assert not replace(first, rule="network.allow[1]").holds(part.judge(first.action)) and not second.holds(
        part.judge(second.action)
    )


@pytest.mark.parametrize(
    ("text", "problem"),
    [
        ("", "1: must be a list of cases"),
        ("[]", "1: must be a list of cases"),
        ("a: 1", "1: must be a list of cases"),
        ("- x", "1: [0]: must be a mapping"),
        ("-\n  action: apply\n  verdict: maybe", "3: [0].verdict: must be one of allow, ask, deny"),
        ("- action: apply", "1: [0].verdict: must be one of"),
        ("- verdict: allow", "1: [0].action: must be text"),
        ("- action: fly\n  verdict: allow", "1: [0].action: 'fly' is not an action"),
        ('- action: "connect \'a"\n  verdict: allow', "1: [0].action: "),
        ("- action: [listen, 80]\n  verdict: allow", "1: [0].action: must be text"),
        ("- action: apply\n  verdict: allow\n  why: x", "3: [0].why: unknown field"),
        ("- action: apply\n  verdict: allow\n  rule: 1", "3: [0].rule: must be text"),
        ("- &a {action: apply, verdict: allow}", "1: [0]: anchors"),
        ("- {action: apply, verdict: allow", "not valid YAML"),
        ("- {action: \x07, verdict: allow}", "U+0007"),
    ],
)
def test_the_faults_of_a_table_have_lines(tmp_path: Path, text: str, problem: str) -> None:
    table = tmp_path / "t.yaml"
    table.write_text(text)
    with pytest.raises(PolicyError) as caught:
        load_expectations(str(table))
    assert problem in caught.value.problems[0] and caught.value.problems[0].startswith(f"{table}:")


def test_all_faults_of_a_table_are_told(tmp_path: Path) -> None:
    table = tmp_path / "t.yaml"
    table.write_text("- {action: fly, verdict: allow}\n- {action: apply, verdict: ask}\n- {action: apply}\n")
    with pytest.raises(PolicyError) as caught:
        load_expectations(str(table))
    assert len(caught.value.problems) == 2


@pytest.mark.parametrize("kind", ["none", "directory", "pipe", "bytes"])
def test_a_table_that_cannot_be_read(tmp_path: Path, kind: str) -> None:
    import os

    path = tmp_path / "t.yaml"
    if kind == "directory":
        path.mkdir()
    elif kind == "pipe":
        os.mkfifo(path)
    elif kind == "bytes":
        path.write_bytes(b"\xff")
    with pytest.raises(PolicyError, match="cannot read the table"):
        load_expectations(str(path))
