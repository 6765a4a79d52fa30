"""Rules of a policy file: how they are written, what they mean, and what is refused."""

from __future__ import annotations

import os
import re

import pytest
from hypothesis import given
from hypothesis import strategies as st

from corral.actions import Verdict
from corral.errors import PolicyError
from corral.policy.fields import INDISPENSABLE
from corral.policy.load import parse_policy
from corral.policy.matching import path_glob
from corral.policy.model import (
    Credential,
    CredentialKind,
    DataRule,
    ExecRule,
    FlowLimits,
    ModelRule,
    NetworkRule,
    Note,
    Permit,
    Policy,
    RequestRule,
)
from corral.supervisor.allowed import allowed_names


@pytest.fixture(autouse=True)
def _home(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HOME", "/home/me")


def parse(text: str, source: str = "/cfg/p.yaml") -> Policy:
    return parse_policy(text, source=source)


def problems(text: str) -> list[str]:
    with pytest.raises(PolicyError) as caught:
        parse_policy(text, source="p.yaml")
    return list(caught.value.problems)


# --- Destinations ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("written", "rule"),
    [
        ("github.com", NetworkRule("github.com")),
        ("GitHub.com.:443", NetworkRule("github.com", ports=((443, 443),))),
        ('"*.github.com"', NetworkRule("*.github.com")),
        ('"*.github.com:22"', NetworkRule("*.github.com", ports=((22, 22),))),
        ("bücher.example", NetworkRule("xn--bcher-kva.example")),
        ("192.0.2.1", NetworkRule(network="192.0.2.1/32")),
        ("192.0.2.1:80", NetworkRule(network="192.0.2.1/32", ports=((80, 80),))),
        ("192.0.2.0/24:8000-8100", NetworkRule(network="192.0.2.0/24", ports=((8000, 8100),))),
        ("2001:DB8::1", NetworkRule(network="2001:db8::1/128")),
        ('"[2001:db8::1]:443"', NetworkRule(network="2001:db8::1/128", ports=((443, 443),))),
        ('"[2001:db8::1]"', NetworkRule(network="2001:db8::1/128")),
        ("2001:db8::/32", NetworkRule(network="2001:db8::/32")),
        ('"[2001:db8::/32]:1-2"', NetworkRule(network="2001:db8::/32", ports=((1, 2),))),
        ("::ffff:192.0.2.1", NetworkRule(network="192.0.2.1/32")),
        ("{name: github.com}", NetworkRule("github.com")),
        ("{ip: 192.0.2.1}", NetworkRule(network="192.0.2.1/32")),
        ("{cidr: 192.0.2.0/24, port: 443}", NetworkRule(network="192.0.2.0/24", ports=((443, 443),))),
        ("{name: a.example, cidr: 192.0.2.0/24}", NetworkRule("a.example", "192.0.2.0/24")),
        ("{name: a.example, port: '8000-8100'}", NetworkRule("a.example", ports=((8000, 8100),))),
        (
            "{name: a.example, port: [443, '80-90', 91, '85-99', 70]}",
            NetworkRule("a.example", ports=((70, 70), (80, 99), (443, 443))),
        ),
        ("{name: a.example, protocol: tls}", NetworkRule("a.example", protocol="tls")),
        (
            "{name: a.example, reason: Why., advice: Do that., private: true}",
            NetworkRule("a.example", note=Note("Why.", "Do that.", True)),
        ),
    ],
)
def test_destinations(written: str, rule: NetworkRule) -> None:
    policy = parse(f"network:\n  allow:\n    - {written}\n  ask:\n    - {written}\n  deny:\n    - {written}\n")
    assert policy.network.allow == policy.network.ask == policy.network.deny == (rule,)


@pytest.mark.parametrize(
    ("written", "field", "reason"),
    [
        ("''", "", "is empty"),
        ('"*"', "", "every destination"),
        ('"*:443"', "", "every destination"),
        ("https://github.com", "", "is a URL"),
        ("me@github.com", "", "without the user"),
        ("github.com/path", "", "not an address"),
        ("'github.com:'", "", "is not a port"),
        ("github.com:https", "", "is not a port"),
        ("github.com:0", "", "within 1 to 65535"),
        ("github.com:65536", "", "within 1 to 65535"),
        ("github.com:90-80", "", "smaller number first"),
        ("github.com:٤٤٣", "", "is not a port"),
        ("'[2001:db8::1'", "", "not understood"),
        ("'[2001:db8::1]443'", "", "not understood"),
        ("'[github.com]:443'", "", "not understood"),
        ("'[192.0.2.1]:443'", "", "not understood"),
        ("2130706433", "", "must be text"),
        ("'2130706433'", "", "ends in a number"),
        ("0x7f.1", "", "ends in a number"),
        ("127.1", "", "must be text"),
        ("127.0.0.01", "", "ends in a number"),
        ("192.0.2.1/24", "", "beginning of its network"),
        ("192.0.2.0/33", "", "at most /32"),
        ("fe80::1%eth0", "", "zone"),
        ('"a\\0b"', "", "is not a name"),
        ('"git\\u043fub.com:443\\n"', "", "is not a port"),
        ("a.*.example", "", "`*` stands only for"),
        ("1", "", "must be text, or a mapping"),
        ("[github.com]", "", "must be text, or a mapping"),
        ("{}", "", "names no destination"),
        ("{port: 443}", "", "names no destination"),
        ("{ip: 192.0.2.1, cidr: 192.0.2.0/24}", "", "both"),
        ("{ip: 192.0.2.0/24}", ".ip", "is not an address"),
        ("{name: 192.0.2.1}", ".name", "ends in a number"),
        ("{name: '*'}", ".name", "every destination"),
        ("{name: a.example, port: []}", ".port", "an empty or endless list"),
        ("{name: a.example, port: true}", ".port", "must be a port"),
        ("{name: a.example, port: [[1]]}", ".port", "must be a port"),
        ("{name: a.example, port: -1}", ".port", "within 1 to 65535"),
        ("{name: a.example, protocol: TLS}", ".protocol", "not a protocol"),
        ("{name: a.example, protocol: sssh}", ".protocol", "did you mean `ssh`"),
        ("{name: a.example, private: 'yes'}", ".private", "must be `true` or `false`"),
        ("{name: a.example, reason: 1}", ".reason", "must be text"),
        ('{name: a.example, reason: "x\\e[2J"}', ".reason", "not one printable line"),
        ("{name: a.example, advice: " + "x" * 501 + "}", ".advice", "longer than 500"),
        ("{nmae: a.example}", ".nmae", "did you mean `name`"),
        ("{name: ''}", ".name", "is empty"),
        ("{name: }", ".name", "has no value"),
    ],
)
def test_refused_destinations(written: str, field: str, reason: str) -> None:
    found = problems(f"network:\n  deny:\n    - github.com\n    - {written}\n")
    assert found[0].startswith(f"p.yaml:4: network.deny[1]{field}: ")
    assert reason in found[0]
    assert len(found) == 1


TOKEN = Credential(CredentialKind.BEARER, "env:TOKEN")
GET = RequestRule(("GET",), "/repos/**")


@pytest.mark.parametrize(
    ("written", "rule"),
    [
        ("{name: a.example, permit: [ech]}", NetworkRule("a.example", permit=(Permit.ECH,))),
        (
            "{name: a.example, permit: [websocket, h2c, websocket]}",
            NetworkRule("a.example", permit=(Permit.H2C, Permit.WEBSOCKET)),
        ),
        ("{name: a.example, protocol: socks}", NetworkRule("a.example", protocol="socks")),
        ("{name: '*.a.example', intercept: true}", NetworkRule("*.a.example", intercept=True)),
        ("{name: a.example, requests: [GET /repos/**]}", NetworkRule("a.example", intercept=True, requests=(GET,))),
        (
            "{name: a.example, requests: [{method: [head, GET, get], path: /x/}, POST, /y]}",
            NetworkRule(
                "a.example",
                intercept=True,
                requests=(RequestRule(("POST",)), RequestRule(("GET", "HEAD"), "/x"), RequestRule((), "/y")),
            ),
        ),
        (
            "{name: a.example, protocol: http, requests: [GET /repos/**]}",
            NetworkRule("a.example", protocol="http", requests=(GET,)),
        ),
        (
            "{name: a.example, credential: {type: bearer, from: 'env:TOKEN'}}",
            NetworkRule("a.example", intercept=True, credential=TOKEN),
        ),
        (
            "{name: a.example, protocol: http, credential: {type: basic, from: 'file:~/x', user: me}}",
            NetworkRule(
                "a.example",
                protocol="http",
                credential=Credential(CredentialKind.BASIC, "file:/home/me/x", user="me"),
            ),
        ),
        (
            "{name: a.example, protocol: tls, credential: {type: header, from: 'file:./x', header: X-Api-Key}}",
            NetworkRule(
                "a.example",
                protocol="tls",
                intercept=True,
                credential=Credential(CredentialKind.HEADER, "file:/cfg/x", header="x-api-key"),
            ),
        ),
        (
            "{name: a.example, credential: {type: git, from: 'env:TOKEN'}}",
            NetworkRule("a.example", intercept=True, credential=Credential(CredentialKind.GIT, "env:TOKEN")),
        ),
        ("{name: a.example, limits: {}}", NetworkRule("a.example")),
        (
            "{name: a.example, limits: {connections: 4, up: 10MiB, down: 1, idle: 15m, dial: 3, header: 16KiB, "
            "body: 1MiB}}",
            NetworkRule("a.example", limits=FlowLimits(4, 10 << 20, 1, 900.0, 3.0, 16 << 10, 1 << 20)),
        ),
    ],
)
def test_what_a_destination_says_of_its_flows(written: str, rule: NetworkRule) -> None:
    policy = parse(f"network:\n  allow:\n    - {written}\n  ask:\n    - {written}\n")
    assert policy.network.allow == policy.network.ask == (rule,)


@pytest.mark.parametrize(
    ("written", "field", "reason"),
    [
        ("permit: []", ".permit", "empty list"),
        ("permit: [websockets]", ".permit[0]", "did you mean `websocket`"),
        ("permit: [1]", ".permit[0]", "must be a word"),
        ("permit: ech", ".permit", "must be a list"),
        ("intercept: 1", ".intercept", "must be `true` or `false`"),
        ("protocol: ssh, intercept: true", "", "there is none in `ssh`"),
        ("protocol: http, intercept: true", "", "there is none in `http`"),
        ("protocol: tcp, requests: [GET]", "", "there are none in `tcp`"),
        ("intercept: true, permit: [ech]", "", "`ech` cannot be permitted"),
        ("requests: [GET], permit: [ech]", "", "`ech` cannot be permitted"),
        ("requests: []", ".requests", "empty list"),
        ("requests: GET", ".requests", "must be a list"),
        ("requests: [1]", ".requests[0]", "must be text, or a mapping"),
        ("requests: [CONNECT]", ".requests[0]", "permit: [connect]"),
        ("requests: ['']", ".requests[0]", "not the method"),
        ("requests: [GE\u0422 /]", ".requests[0]", "not the method"),
        ("requests: ['GET x']", ".requests[0]", "from its first `/`"),
        ("requests: ['GET  /x']", ".requests[0]", "from its first `/`"),
        ("requests: ['GET https://a.example/x']", ".requests[0]", "from its first `/`"),
        ("requests: [{method: []}]", ".requests[0].method", "an empty or endless list"),
        ("requests: [{method: [[GET]]}]", ".requests[0].method", "must be a method"),
        ("requests: [{path: /a%20b}]", ".requests[0].path", "without `%`"),
        ("requests: [{path: '/a?b=c'}]", ".requests[0].path", "is not compared"),
        ("requests: [{path: '/a;b'}]", ".requests[0].path", "is not compared"),
        ("requests: [{path: /a/../b}]", ".requests[0].path", "`..`"),
        ("requests: [{path: /a//b}]", ".requests[0].path", "empty part"),
        ("requests: [{path: /a**}]", ".requests[0].path", "whole parts"),
        ("requests: [{reason: x}]", ".requests[0].reason", "known: method, path"),
        ("credential: {from: 'env:A'}", ".credential", "has no `type`"),
        ("credential: {type: bearer}", ".credential", "has no `from`"),
        ("credential: {type: bearer, source: 'env:A'}", ".credential", "has no `from`"),
        ("credential: {type: header, from: 'env:A'}", ".credential", "`header` belongs to"),
        ("credential: {type: bearer, from: 'env:A', header: x-a}", ".credential", "`header` belongs to"),
        ("credential: {type: basic, from: 'env:A'}", ".credential", "has no `user`"),
        ("credential: {type: bearer, from: 'env:A', user: me}", ".credential", "`user` belongs to"),
        ("credential: {type: git, from: 'env:A', user: 'a:b'}", ".credential.user", "without `:`"),
        ("credential: {type: header, from: 'env:A', header: Host}", ".credential.header", "how requests are read"),
        ("credential: {type: header, from: 'env:A', header: 'a: b'}", ".credential.header", "not the name of a header"),
        ("protocol: ssh, credential: {type: bearer, from: 'env:A'}", "", "needs TLS"),
        ("limits: {connections: 0}", ".limits.connections", "at least 1"),
        ("limits: {up: 0}", ".limits.up", "at least 1 bytes"),
        ("limits: {header: 2MiB}", ".limits.header", "at most 1 MiB"),
        ("limits: {idle: soon}", ".limits.idle", "is not understood"),
        ("limits: {ide: 1s}", ".limits.ide", "did you mean `idle`"),
        ("limits: 1", ".limits", "must be a mapping"),
    ],
)
def test_refused_flows(written: str, field: str, reason: str) -> None:
    found = problems(f"network:\n  ask:\n    - github.com\n    - {{name: a.example, {written}}}\n")
    assert found[0].startswith(f"p.yaml:4: network.ask[1]{field}: ")
    assert any(reason in problem for problem in found)


@pytest.mark.parametrize("place", ["name: '*.a.example'", "cidr: 192.0.2.0/24", "ip: 192.0.2.1"])
def test_a_credential_is_for_one_name(place: str) -> None:
    found = problems(f"network: {{allow: [{{{place}, credential: {{type: bearer, from: 'env:A'}}}}]}}")
    assert "needs one exact `name`" in found[0]


@pytest.mark.parametrize("word", ["permit: [ech]", "intercept: true", "limits: {}", "credential: {type: git, from: x}"])
def test_a_denial_says_nothing_of_flows_it_never_lets_through(word: str) -> None:
    found = problems(f"network: {{deny: [{{name: a.example, {word}}}]}}")
    assert "unknown field" in found[0] and len(found) == 1
    policy = parse("network: {deny: [{name: a.example, requests: [GET /repos/**]}]}")
    assert policy.network.deny == (NetworkRule("a.example", requests=(GET,)),)


SECRET = "ghp_16C7e42F292c6912E7710c838347Ae178B4a"


@pytest.mark.parametrize(
    "written",
    [
        f"credential: {SECRET}",
        f"credential: [{SECRET}]",
        f"credential: {{type: bearer, from: {SECRET}}}",
        f"credential: {{type: bearer, from: 'env:{SECRET}-'}}",
        f"credential: {{type: bearer, from: 'env:TOKEN={SECRET}'}}",
        f"credential: {{type: bearer, from: 'file:${SECRET}'}}",
        f"credential: {{type: bearer, from: [{SECRET}]}}",
        f"credential: {{type: {SECRET}, from: 'env:A'}}",
        f"credential: {{type: header, from: 'env:A', header: 'x-key: {SECRET}'}}",
        f"credential: {{type: git, from: 'env:A', user: 'me:{SECRET}'}}",
        f"credential: {{type: bearer, from: 'env:A', header: 'Bearer {SECRET}'}}",
    ],
)
def test_a_secret_that_was_written_into_the_policy_is_not_echoed(written: str) -> None:
    for problem in problems(f"network: {{allow: [{{name: a.example, {written}}}]}}"):
        assert SECRET not in problem


@pytest.mark.parametrize(
    ("written", "resolver"),
    [
        ("192.0.2.1", "192.0.2.1:53"),
        ("192.0.2.1:5353", "192.0.2.1:5353"),
        ("'2001:DB8::1'", "[2001:db8::1]:53"),
        ("'[2001:db8::1]'", "[2001:db8::1]:53"),
        ("'[2001:db8::1]:5353'", "[2001:db8::1]:5353"),
        ("'::ffff:192.0.2.1'", "192.0.2.1:53"),
    ],
)
def test_resolvers(written: str, resolver: str) -> None:
    assert parse(f"network: {{resolvers: [{written}]}}").network.resolvers == (resolver,)


@pytest.mark.parametrize(
    "written", ["dns.example", "192.0.2.1:0", "192.0.2.1:x", "'[192.0.2.1]:53'", "'[2001:db8::1]53'", "127.1:53", "''"]
)
def test_refused_resolvers(written: str) -> None:
    assert problems(f"network: {{resolvers: [{written}]}}")[0].startswith("p.yaml:1: network.resolvers[0]: ")
    assert "more than 8" in problems("network: {resolvers: [" + "192.0.2.1, " * 9 + "]}")[0]


def test_a_proxy() -> None:
    assert parse("network: {proxy: 'http://192.0.2.1:3128'}").network.proxy == "http://192.0.2.1:3128"
    assert parse("network: {proxy: 'http://[2001:DB8::1]:80/'}").network.proxy == "http://[2001:db8::1]:80"
    for written in (
        f"http://me:{SECRET}@192.0.2.1:3128",
        "http://proxy.example:3128",
        "http://192.0.2.1",
        "https://192.0.2.1:3128",
        "socks5://192.0.2.1:1080",
        "192.0.2.1:3128",
        "http://192.0.2.1:3128/x",
        "HTTP://192.0.2.1:3128",
        "",
    ):
        (problem,) = problems(f"network: {{proxy: '{written}'}}")
        assert "must be http://ADDRESS:PORT" in problem and SECRET not in problem


@given(st.text(max_size=80))
def test_any_text_as_a_destination_is_a_rule_or_a_printable_problem(text: str) -> None:
    quoted = "".join(f"\\U{ord(character):08x}" for character in text)
    try:
        (rule,) = parse(f'network: {{deny: ["{quoted}"]}}').network.deny
    except PolicyError as error:
        assert all(problem.isprintable() and len(problem) < 500 for problem in error.problems)
    else:
        assert (rule.name is None) != (rule.network is None)
        again = rule.name or f"[{rule.network}]" if ":" in str(rule.network) else rule.name or rule.network
        assert parse(f'network: {{deny: ["{again}"]}}').network.deny[0].network == rule.network


@pytest.mark.parametrize("field", ["loopback", "listen"])
def test_answers(field: str) -> None:
    for verdict in (Verdict.ALLOW, Verdict.ASK, Verdict.DENY):
        assert getattr(parse(f"network: {{{field}: {verdict.name.lower()}}}").network, field) is verdict
    assert "did you mean `deny`" in problems(f"network: {{{field}: denny}}")[0]
    assert "is not an answer" in problems(f"network: {{{field}: kill}}")[0]
    assert "must be a word" in problems(f"network: {{{field}: 1}}")[0]


# --- Programs -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("written", "rule"),
    [
        ("git", ExecRule("/**/git")),
        ("python3*", ExecRule("/**/python3*")),
        ("/usr/bin/git", ExecRule("/usr/bin/git")),
        ("/usr/**", ExecRule("/usr/**")),
        ("{path: git}", ExecRule("/**/git")),
        ("{path: /opt/my tool}", ExecRule("/opt/my tool")),
        ("{path: git, argv: ['*', push, '**']}", ExecRule("/**/git", ("*", "push", "**"))),
        ("{path: git, argv: ['**']}", ExecRule("/**/git")),
        ('{path: sh, argv: ["*", "-c", "a\\nb", ""]}', ExecRule("/**/sh", ("*", "-c", "a\nb", ""))),
        ("{path: git, reason: No.}", ExecRule("/**/git", note=Note("No."))),
    ],
)
def test_programs(written: str, rule: ExecRule) -> None:
    assert parse(f"process:\n  deny:\n    - {written}\n").process.deny == (rule,)


@pytest.mark.parametrize(
    ("written", "field", "reason"),
    [
        ("''", "", "is not a program"),
        ("'**'", "", "every program"),
        ("/usr/bin/git push", "", "arguments go in a mapping"),
        ("bin/git", "", "absolute path inside"),
        ("./git", "", "absolute path inside"),
        ("~/bin/git", "", "absolute path inside"),
        ("/usr/../bin/git", "", "`..`"),
        ("/usr//git", "", "empty part"),
        ("/usr/bin/", "", "empty part"),
        ("/", "", "empty part"),
        ("/usr/**git", "", "`**` stands for whole parts"),
        ("'git\\'", "", "takes the meaning"),
        ('"gi\\u001bt"', "", "control character"),
        ("/" + "x" * 256, "", "longer than a path"),
        ("{argv: [git]}", "", "has no `path`"),
        ("{path: git, argv: []}", ".argv", "empty list"),
        ("{path: git, argv: ['**', push]}", ".argv", "can only be the last"),
        ('{path: git, argv: ["a\\0"]}', ".argv", "NUL"),
        ("{path: git, argv: push}", ".argv", "must be a list"),
        ("{path: git, argv: [1]}", ".argv[0]", "must be text"),
        ("{path: git, argv: [" + "a, " * 300 + "]}", ".argv", "more than 256"),
    ],
)
def test_refused_programs(written: str, field: str, reason: str) -> None:
    (problem,) = problems(f"process:\n  ask:\n    - {written}\n")
    assert problem.startswith(f"p.yaml:3: process.ask[0]{field}: ")
    assert reason in problem


# --- Path globs -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("written", "glob"),
    [
        ("/a/b", "/a/b"),
        ("/a/*", "/a/*"),
        ("/*", "/*"),
        ("/**", "/**"),
        ("'**/.git/hooks/**'", "/**/.git/hooks/**"),
        ("~/.ssh/*", "/home/me/.ssh/*"),
        ("./src/*.py", "/cfg/src/*.py"),
        ("'src/?'", "/cfg/src/?"),
        ("'*.pem'", "/cfg/*.pem"),
        ("../x/**/y", "/x/**/y"),
        ("/a/../b/x*y", "/b/x*y"),
        ("'/a/[id].tsx'", "/a/[id].tsx"),
        ("'/a/\\*'", "/a/\\*"),
    ],
)
def test_path_globs(written: str, glob: str) -> None:
    policy = parse(f"filesystem: {{ask: [{written}], watch: [{written}]}}\nlog: {{files: [{written}]}}")
    assert policy.filesystem.ask == policy.filesystem.watch == policy.log.files == (glob,)


def test_what_is_odd_in_the_directory_of_the_file_stays_itself_in_a_glob() -> None:
    policy = parse("filesystem: {ask: [x, 'y/*.py']}", source="/cfg/a*b/p.yaml")
    plain, pattern = map(path_glob, policy.filesystem.ask)
    assert plain("/cfg/a*b/x")
    assert not plain("/cfg/aXb/x")
    assert pattern("/cfg/a*b/y/1.py")
    assert not pattern("/cfg/aXb/y/1.py")


@pytest.mark.parametrize(
    ("written", "reason"),
    [
        ("''", "is empty"),
        ("/", "whole file system"),
        ("/a/*/../b", "`..`"),
        ("/a/*/", "empty part"),
        ("/a/**b", "whole parts"),
        ("'/a*\\'", "takes the meaning"),
        ("$HOME/*", "not expanded"),
        ("~root/*", "only `~/`"),
        ("' /a/*'", "blanks"),
        ('"/a/*\\n"', "blanks"),
    ],
)
def test_refused_path_globs(written: str, reason: str) -> None:
    (problem,) = problems(f"filesystem:\n  watch: [{written}]\n")
    assert problem.startswith("p.yaml:2: filesystem.watch[0]: ")
    assert reason in problem
    (problem,) = problems(f"log:\n  files: [{written}]\n")
    assert problem.startswith("p.yaml:2: log.files[0]: ")
    assert reason in problem


# --- System calls ---------------------------------------------------------------------------------------------------


def test_system_calls() -> None:
    policy = parse("syscalls: {ask: [setsockopt], deny: [personality, personality]}")
    assert (policy.syscalls.ask, policy.syscalls.deny) == (("setsockopt",), ("personality",))


@pytest.mark.parametrize("name", ["read", "mmap", "exit_group", "execve", "rt_sigreturn", "futex", "setsid", "recvmsg"])
@pytest.mark.parametrize("how", ["ask", "deny"])
def test_what_nothing_runs_without_is_refused(how: str, name: str) -> None:
    (problem,) = problems(f"syscalls:\n  {how}: [{name}]\n")
    assert problem.startswith(f"p.yaml:2: syscalls.{how}[0]: `{name}` can be neither")


@pytest.mark.parametrize("name", ["Mount", "mount(2)", "''", "a-b", "'*'", '"x\\n"', "x" * 65])
def test_what_is_no_name_of_a_system_call(name: str) -> None:
    assert "is not the name of a system call" in problems(f"syscalls: {{deny: [{name}]}}")[0]


def test_indispensable_calls_are_calls_that_a_sandbox_may_make() -> None:
    assert allowed_names() >= INDISPENSABLE


# --- Models, data, and the rest -------------------------------------------------------------------------------------


def test_models_and_data() -> None:
    policy = parse(
        "model: {allow: ['claude-*', {name: m, reason: Why.}]}\n"
        "data: {deny: [w, {source: w, statements: [SELECT, insert, select], tables: [b, a, b]}]}\n"
    )
    assert policy.model.allow == (ModelRule("claude-*"), ModelRule("m", Note("Why.")))
    assert policy.data.deny == (DataRule("w"), DataRule("w", ("insert", "select"), ("a", "b")))


@pytest.mark.parametrize(
    ("text", "field", "reason"),
    [
        ("model: {allow: ['']}", "model.allow[0]", "is not a name"),
        ("model: {allow: [a b]}", "model.allow[0]", "is not a name"),
        ("model: {allow: [{reason: x}]}", "model.allow[0]", "has no `name`"),
        ("data: {allow: [{source: w, tables: []}]}", "data.allow[0].tables", "empty list"),
        ("data: {allow: [{source: w, statements: []}]}", "data.allow[0].statements", "empty list"),
        ("data: {allow: [{source: w, statements: ['drop table']}]}", "data.allow[0].statements[0]", "kind of a query"),
        ("data: {allow: ['*']}", "data.allow[0]", "use up to 64 letters"),
        ("data: {allow: [{name: w, source: w}]}", "data.allow[0].name", "known: reason"),
        ("agent: {name: ''}", "agent.name", "use up to 64 letters"),
        ("agent: {version: 1.2}", "agent.version", "must be text"),
        ('agent: {name: "a\\e[2J"}', "agent.name", "use up to 64 letters"),
        ("approvals: {timeout: 0}", "approvals.timeout", "between"),
        ("approvals: {freeze: 1}", "approvals.freeze", "must be `true` or `false`"),
        ("autonomy: {level: 10}", "autonomy.level", "at most 9"),
        ("detection: {rules: ['/x/*']}", "detection.rules[0]", "patterns"),
        ("filesystem: {write: [/]}", "filesystem.write[0]", "whole file system"),
        ("profile: lock", "profile", "did you mean `locked`"),
        ("profile: ''", "profile", "not a built-in profile"),
        ("profile: 1", "profile", "must be text"),
    ],
)
def test_refused_fields(text: str, field: str, reason: str) -> None:
    (problem,) = problems(text)
    assert problem.startswith(f"p.yaml:1: {field}: ")
    assert reason in problem


def test_all_faults_of_rules_at_once_in_the_order_of_lines() -> None:
    text = """\
network:
  allow:
    - {name: a.example, port: 0, protocol: x}
    - https://a.example
  listen: never
process:
  ask: [{argv: []}]
"""
    found = [re.match(r"p\.yaml:(\d+): (.*?): ", problem) for problem in problems(text)]
    assert [(int(match[1]), match[2]) for match in found if match] == [
        (3, "network.allow[0].port"),
        (3, "network.allow[0].protocol"),
        (4, "network.allow[1]"),
        (5, "network.listen"),
        (7, "process.ask[0]"),
        (7, "process.ask[0].argv"),
    ]


def test_long_lists_are_refused() -> None:
    assert "more than 1024 entries" in problems("network: {deny: [" + "a.example, " * 1025 + "]}")[0]


def test_paths_with_bytes_that_are_no_text(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HOME", os.fsdecode(b"/home/\xff"))
    assert parse("filesystem: {read: [~/x]}").filesystem.read == (os.fsdecode(b"/home/\xff/x"),)
