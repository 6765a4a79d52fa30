"""The HTTP proxy as transcripts: bytes and decisions in, commands out. Nothing undecided goes to a server."""

from __future__ import annotations

import base64
from collections.abc import Sequence
from itertools import pairwise
from urllib.parse import unquote

import h11
import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st

from corral.actions import Action, Endpoint, Kind, Meaning, Origin, Request, Transport, Verdict
from corral.credentials.secret import Secret, load
from corral.gateway.http import (
    AHEAD,
    DRAINED,
    MAX_DENIALS,
    MAX_INTERIM,
    Ask,
    Close,
    Command,
    Dial,
    HangUp,
    HttpProxy,
    Phase,
    Refused,
    ToClient,
    ToUpstream,
    Tunnel,
)
from corral.gateway.http_exchange import Chunks
from corral.gateway.http_heads import MAX_FIELDS, MAX_TARGET, HttpError, checked_path, request_head, response_head
from corral.policy.model import (
    Credential,
    CredentialKind,
    FlowLimits,
    Network,
    NetworkRule,
    Permit,
    Policy,
    RequestRule,
)
from corral.policy.part import PolicyPart

NAME = "web.test"
GET = b"GET /a HTTP/1.1\r\nHost: web.test\r\n\r\n"
OK = b"HTTP/1.1 200 OK\r\nContent-Length: 2\r\n\r\nhi"
TOKEN = "s3cr3t-TOKEN/+=value"
KEY = b"Sec-WebSocket-Key: dGhlIHNhbXBsZSBub25jZQ==\r\nSec-WebSocket-Version: 13\r\n"
WEBSOCKET = b"GET /ws HTTP/1.1\r\nHost: web.test\r\nConnection: Upgrade\r\nUpgrade: websocket\r\n" + KEY + b"\r\n"
UPGRADE = b"GET / HTTP/1.1\r\nHost: web.test\r\n%s\r\n\r\n"
SWITCH = b"HTTP/1.1 101 Switching Protocols\r\nConnection: Upgrade\r\nUpgrade: websocket\r\n\r\n"

LIMITS = FlowLimits()


def proxy(
    *permits: Permit, host: str = NAME, port: int = 80, limits: FlowLimits = LIMITS, secret: Secret | None = None
) -> HttpProxy:
    return HttpProxy(host, port, secure=port == 443, permits=permits, limits=limits, secret=secret)


def bearer(kind: CredentialKind = CredentialKind.BEARER, header: str = "") -> Secret:
    return load(Credential(kind, "env:TOKEN", header), {"TOKEN": TOKEN})


def phase(subject: HttpProxy) -> Phase:
    return subject.phase


def client(commands: Sequence[Command]) -> bytes:
    return b"".join(command.data for command in commands if isinstance(command, ToClient))


def upstream(commands: Sequence[Command]) -> bytes:
    return b"".join(command.data for command in commands if isinstance(command, ToUpstream))


def closes(commands: Sequence[Command]) -> list[str]:
    return [command.reason for command in commands if isinstance(command, Close)]


def allow(subject: HttpProxy, request: bytes = GET) -> list[Command]:
    """What an allowed request leads to after its Ask."""
    asked = subject.client_bytes(request)
    assert [type(command) for command in asked] == [Ask], asked
    return subject.decided(True)


# ---- the order ----


def test_a_request_and_its_answer() -> None:
    subject = proxy()
    assert subject.client_bytes(GET) == [Ask("GET", "/a")]
    assert phase(subject) is Phase.ASKED
    assert not subject.wants_client
    assert subject.decided(True) == [Dial(), ToUpstream(b"GET /a HTTP/1.1\r\nHost: web.test\r\n\r\n")]
    assert phase(subject) is Phase.EXCHANGE
    assert subject.upstream_bytes(OK) == [ToClient(OK)]
    assert phase(subject) is Phase.IDLE
    assert subject.client_bytes(GET) == [Ask("GET", "/a")]
    assert subject.decided(True) == [ToUpstream(b"GET /a HTTP/1.1\r\nHost: web.test\r\n\r\n")]  # dialled once
    assert subject.upstream_bytes(OK) == [ToClient(OK)]
    assert subject.client_ended() == [Close("the client ended the connection")]
    assert phase(subject) is Phase.CLOSED


def test_what_is_denied_goes_nowhere_and_the_connection_stays() -> None:
    subject = proxy()
    subject.client_bytes(GET)
    (told,) = subject.decided(False, "web.test is not for this task", "use api.test")
    assert isinstance(told, ToClient)
    assert told.data.startswith(b"HTTP/1.1 403 Forbidden\r\n")
    assert b"x-corral-reason: web.test is not for this task\r\n" in told.data
    assert b"connection: keep-alive\r\n" in told.data
    assert phase(subject) is Phase.IDLE
    assert upstream(allow(subject)).startswith(b"GET /a ")


def test_a_denied_head_request_has_no_body_in_its_answer() -> None:
    subject = proxy()
    subject.client_bytes(GET.replace(b"GET", b"HEAD"))
    assert client(subject.decided(False, "no")).endswith(b"\r\n\r\n")


def test_the_rest_of_a_denied_request_is_thrown_away() -> None:
    subject = proxy()
    subject.client_bytes(b"POST /a HTTP/1.1\r\nHost: web.test\r\nContent-Length: 5\r\n\r\nab")
    assert b"keep-alive" in client(subject.decided(False))
    assert phase(subject) is Phase.DRAIN
    assert subject.client_bytes(b"cde" + GET) == [Ask("GET", "/a")]


@pytest.mark.parametrize(
    "framing",
    [
        b"Content-Length: %d\r\n" % (DRAINED + 1),
        b"Transfer-Encoding: chunked\r\n",
        b"Content-Length: 5\r\nExpect: 100-continue\r\n",
    ],
)
def test_a_denied_request_whose_rest_is_long_or_uncertain_closes(framing: bytes) -> None:
    subject = proxy()
    subject.client_bytes(b"POST /a HTTP/1.1\r\nHost: web.test\r\n" + framing + b"\r\n")
    told = subject.decided(False, "no")
    assert b"connection: close\r\n" in client(told)
    assert closes(told)


def test_denials_on_one_connection_are_bounded() -> None:
    subject = proxy()
    commands = subject.client_bytes(b"CONNECT a.test:1 HTTP/1.1\r\nHost: a.test:1\r\n\r\n" * 1000)
    assert sum(isinstance(command, Refused) for command in commands) == MAX_DENIALS
    assert closes(commands)


def test_pipelined_requests_wait_for_the_answer_before_them() -> None:
    subject = proxy()
    assert subject.client_bytes(GET + GET.replace(b"/a", b"/b")) == [Ask("GET", "/a")]
    assert b"/b" not in upstream(subject.decided(True))
    assert subject.upstream_bytes(OK[:-1]) == [ToClient(OK[:-1])]
    assert subject.upstream_bytes(OK[-1:]) == [ToClient(OK[-1:]), Ask("GET", "/b")]


def test_a_client_that_sends_on_and_on_before_the_decision_is_cut() -> None:
    subject = proxy()
    subject.client_bytes(GET)
    commands: list[Command] = []
    for _ in range(1 + (FlowLimits().header + AHEAD) // 65536 + 1):
        commands += subject.client_bytes(b"x" * 65536)
    assert closes(commands)
    assert subject.decided(True) == []  # comes too late


def test_a_decision_that_nobody_asked_for_is_our_fault() -> None:
    with pytest.raises(RuntimeError):
        proxy().decided(True)


def test_bytes_of_the_server_that_nobody_asked_for_close() -> None:
    subject = proxy()
    allow(subject)
    subject.upstream_bytes(OK)
    assert closes(subject.upstream_bytes(OK))


def test_an_answer_smuggled_behind_the_answer_reaches_nobody() -> None:
    subject = proxy()
    subject.client_bytes(GET + GET)
    subject.decided(True)
    commands = subject.upstream_bytes(OK + b"HTTP/1.1 200 OK\r\nContent-Length: 4\r\n\r\nevil")
    assert client(commands) == OK
    assert closes(commands)
    assert not any(isinstance(command, Ask) for command in commands)


def test_the_server_that_cannot_be_reached() -> None:
    subject = proxy()
    allow(subject)
    commands = subject.failed("web.test does not answer")
    assert client(commands).startswith(b"HTTP/1.1 502 ")
    assert closes(commands)


def test_a_head_that_never_ends_is_told_when_the_caller_gives_up() -> None:
    subject = proxy()
    assert subject.client_bytes(GET[:-2]) == []
    assert phase(subject) is Phase.HEAD
    assert client(subject.failed("too slow", 408)).startswith(b"HTTP/1.1 408 ")


def test_the_client_may_end_after_its_request() -> None:
    subject = proxy()
    allow(subject)
    assert subject.client_ended() == []
    commands = subject.upstream_bytes(OK)
    assert client(commands).endswith(b"hi")
    assert b"Connection: close\r\n" in client(commands)
    assert closes(commands)


@pytest.mark.parametrize(
    "sent", [GET[:10], GET[:-1], b"POST / HTTP/1.1\r\nHost: web.test\r\nContent-Length: 9\r\n\r\nab"]
)
def test_the_client_breaks_off(sent: bytes) -> None:
    subject = proxy()
    for command in subject.client_bytes(sent):
        assert command == Ask("POST", "/")
        subject.decided(True)
    assert closes(subject.client_ended())


# ---- what a request may look like ----

SMUGGLING = {
    "both lengths": b"POST / HTTP/1.1\r\nHost: web.test\r\nContent-Length: 6\r\nTransfer-Encoding: chunked\r\n\r\n",
    "two lengths": b"POST / HTTP/1.1\r\nHost: web.test\r\nContent-Length: 0\r\nContent-Length: 44\r\n\r\n",
    "two equal lengths": b"POST / HTTP/1.1\r\nHost: web.test\r\nContent-Length: 4\r\nContent-Length: 4\r\n\r\n",
    "a list of lengths": b"POST / HTTP/1.1\r\nHost: web.test\r\nContent-Length: 4, 4\r\n\r\n",
    "signed length": b"POST / HTTP/1.1\r\nHost: web.test\r\nContent-Length: +4\r\n\r\n",
    "hexadecimal length": b"POST / HTTP/1.1\r\nHost: web.test\r\nContent-Length: 0x4\r\n\r\n",
    "endless length": b"POST / HTTP/1.1\r\nHost: web.test\r\nContent-Length: " + b"9" * 19 + b"\r\n\r\n",
    "empty length": b"POST / HTTP/1.1\r\nHost: web.test\r\nContent-Length:\r\n\r\n",
    "length in other digits": b"POST / HTTP/1.1\r\nHost: web.test\r\nContent-Length: \xd9\xa4\r\n\r\n",
    "two codings": b"POST / HTTP/1.1\r\nHost: web.test\r\nTransfer-Encoding: gzip, chunked\r\n\r\n",
    "coding not last": b"POST / HTTP/1.1\r\nHost: web.test\r\nTransfer-Encoding: chunked, identity\r\n\r\n",
    "coding twice": b"POST / HTTP/1.1\r\nHost: web.test\r\nTransfer-Encoding: chunked\r\nTransfer-Encoding: x\r\n\r\n",
    "obscured coding": b"POST / HTTP/1.1\r\nHost: web.test\r\nTransfer-Encoding: xchunked\r\n\r\n",
    "coding with vertical tab": b"POST / HTTP/1.1\r\nHost: web.test\r\nTransfer-Encoding: \x0bchunked\r\n\r\n",
    "coding in HTTP/1.0": b"POST / HTTP/1.0\r\nHost: web.test\r\nTransfer-Encoding: chunked\r\n\r\n",
    "space before colon": b"POST / HTTP/1.1\r\nHost: web.test\r\nTransfer-Encoding : chunked\r\n\r\n",
    "underscored coding": b"POST / HTTP/1.1\r\nHost: web.test\r\nTransfer_Encoding: chunked\r\n\r\n",
    "underscored length": b"POST / HTTP/1.1\r\nHost: web.test\r\nContent_Length: 3\r\n\r\n",
    "folded line": b"GET / HTTP/1.1\r\nHost: web.test\r\nX: a\r\n b\r\n\r\n",
    "folded first field": b"GET / HTTP/1.1\r\n Host: web.test\r\n\r\n",
    "folded coding": b"POST / HTTP/1.1\r\nHost: web.test\r\nTransfer-Encoding:\r\n chunked\r\n\r\n",
    "bare line feed": b"GET / HTTP/1.1\r\nHost: web.test\nX: y\r\n\r\n",
    "bare line feeds end the head": b"GET / HTTP/1.1\nHost: web.test\n\nGET / HTTP/1.1\r\nHost: web.test\r\n\r\n",
    "bare carriage return": b"GET / HTTP/1.1\r\nHost: web.test\r\nX: a\rb\r\n\r\n",
    "NUL": b"GET / HTTP/1.1\r\nHost: web.test\r\nX: a\0b\r\n\r\n",
    "escape character": b"GET / HTTP/1.1\r\nHost: web.test\r\nX: \x1b[2J\r\n\r\n",
    "field without colon": b"GET / HTTP/1.1\r\nHost: web.test\r\nX\r\n\r\n",
    "field without name": b"GET / HTTP/1.1\r\nHost: web.test\r\n: x\r\n\r\n",
    "empty lines first": b"\r\nGET / HTTP/1.1\r\nHost: web.test\r\n\r\n",
    "Connection takes the length away": b"POST / HTTP/1.1\r\nHost: web.test\r\nContent-Length: 3\r\n"
    b"Connection: content-length\r\n\r\n",
    "Connection takes Host away": b"GET / HTTP/1.1\r\nHost: web.test\r\nConnection: close, Host\r\n\r\n",
    "HTTP/0.9": b"GET /\r\n\r\n",
    "HTTP/2": b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n",
    "HTTP/1.2": b"GET / HTTP/1.2\r\nHost: web.test\r\n\r\n",
    "small letters": b"GET / http/1.1\r\nHost: web.test\r\n\r\n",
    "two spaces": b"GET  / HTTP/1.1\r\nHost: web.test\r\n\r\n",
    "tab": b"GET\t/ HTTP/1.1\r\nHost: web.test\r\n\r\n",
    "space in target": b"GET /a b HTTP/1.1\r\nHost: web.test\r\n\r\n",
    "bytes in target": b"GET /\xff HTTP/1.1\r\nHost: web.test\r\n\r\n",
    "TLS": b"\x16\x03\x01\x02\x00\x01\x00\x01\xfc\x03\x03" + b"x" * 64,
    "absolute form": b"GET http://web.test/ HTTP/1.1\r\nHost: web.test\r\n\r\n",
    "absolute form elsewhere": b"GET http://evil.test/ HTTP/1.1\r\nHost: web.test\r\n\r\n",
    "asterisk form": b"OPTIONS * HTTP/1.1\r\nHost: web.test\r\n\r\n",
    "authority form": b"GET web.test:80 HTTP/1.1\r\nHost: web.test\r\n\r\n",
    "no Host": b"GET / HTTP/1.1\r\n\r\n",
    "no Host in HTTP/1.0": b"GET / HTTP/1.0\r\n\r\n",
    "two Hosts": b"GET / HTTP/1.1\r\nHost: web.test\r\nHost: web.test\r\n\r\n",
    "Host twice in other letters": b"GET / HTTP/1.1\r\nHost: web.test\r\nhOST: evil.test\r\n\r\n",
    "underscored host": b"GET / HTTP/1.1\r\nHost: web.test\r\n_host: x\r\nhost_: y\r\nHOST: z\r\n\r\n",
    "other expectation": b"POST / HTTP/1.1\r\nHost: web.test\r\nContent-Length: 1\r\nExpect: magic\r\n\r\n",
    "upgrade without connection": b"GET / HTTP/1.1\r\nHost: web.test\r\nUpgrade: websocket\r\n\r\n",
    "two upgrades": b"GET / HTTP/1.1\r\nHost: web.test\r\nConnection: upgrade\r\nUpgrade: websocket, h2c\r\n\r\n",
    "upgrade with body": WEBSOCKET[:-2] + b"Content-Length: 3\r\n\r\nabc",
    "CONNECT elsewhere than Host": b"CONNECT a.test:443 HTTP/1.1\r\nHost: b.test:443\r\n\r\n",
    "CONNECT without port": b"CONNECT a.test HTTP/1.1\r\nHost: a.test\r\n\r\n",
    "CONNECT with body": b"CONNECT a.test:1 HTTP/1.1\r\nHost: a.test:1\r\nContent-Length: 1\r\n\r\nx",
    "too many fields": b"GET / HTTP/1.1\r\nHost: web.test\r\n" + b"X: y\r\n" * MAX_FIELDS + b"\r\n",
    "too long a target": b"GET /" + b"a" * MAX_TARGET + b" HTTP/1.1\r\nHost: web.test\r\n\r\n",
    "too long a method": b"G" * 33 + b" / HTTP/1.1\r\nHost: web.test\r\n\r\n",
    "header bomb": b"GET / HTTP/1.1\r\nHost: web.test\r\nX: " + b"a" * 65536 + b"\r\n\r\n",
    "header bomb without end": b"GET / HTTP/1.1\r\nHost: web.test\r\nX: " + b"a" * 65536,
}


@pytest.mark.parametrize("attack", SMUGGLING.values(), ids=SMUGGLING.keys())
def test_what_could_be_read_in_two_ways_goes_nowhere(attack: bytes) -> None:
    subject = proxy(*Permit)
    commands = subject.client_bytes(attack)
    assert [type(command) for command in commands] == [Refused, ToClient, Close]
    refused = commands[0]
    assert isinstance(refused, Refused)
    status = int(client(commands).split()[1])
    assert status == refused.status
    assert 400 <= status < 502
    assert b"connection: close\r\n" in client(commands)
    assert subject.client_bytes(GET) == []


FRONTING = ["evil.test", "web.test.evil.test", "web.test:81", "eweb.test", "127.0.0.1", "[::1]", "web.test:443"]


@pytest.mark.parametrize("host", FRONTING)
def test_a_host_other_than_the_name_is_refused_also_later(host: str) -> None:
    subject = proxy(*Permit)
    allow(subject)
    subject.upstream_bytes(OK)
    commands = subject.client_bytes(f"GET / HTTP/1.1\r\nHost: {host}\r\n\r\n".encode())
    assert [type(command) for command in commands] == [Refused, ToClient, Close]
    assert client(commands).startswith(b"HTTP/1.1 403 ")
    assert b"but the connection is to web.test\r\n" in client(commands)


@pytest.mark.parametrize(
    "host",
    [
        "web.test:",
        "user@web.test",
        "web.test:080",
        "web.test:99999",
        "web.test/x",
        "",
        "[::1",
        "[1.2.3.4]",
        "0x7f.1",
        "web.test, evil.test",
    ],
)
def test_a_host_that_is_none_is_refused(host: str) -> None:
    commands = proxy().client_bytes(f"GET / HTTP/1.1\r\nHost: {host}\r\n\r\n".encode())
    assert client(commands).startswith(b"HTTP/1.1 400 ")


@pytest.mark.parametrize(
    ("host", "port", "written", "sent"),
    [
        ("web.test", 80, "WEB.test.", "web.test"),
        ("web.test", 80, "web.test:80", "web.test"),
        ("web.test", 443, "web.test", "web.test"),
        ("web.test", 443, "web.test:443", "web.test"),
        ("web.test", 8080, "web.test:8080", "web.test:8080"),
        ("203.0.113.7", 80, "203.0.113.7", "203.0.113.7"),
        ("2001:db8::7", 8080, "[2001:DB8:0::7]:8080", "[2001:db8::7]:8080"),
    ],
)
def test_the_host_goes_on_in_its_one_form(host: str, port: int, written: str, sent: str) -> None:
    subject = proxy(host=host, port=port)
    data = upstream(allow(subject, f"GET / HTTP/1.1\r\nhost: {written}\r\n\r\n".encode()))
    assert data == f"GET / HTTP/1.1\r\nHost: {sent}\r\n\r\n".encode()


PATHS = {
    b"/": "/",
    b"/a/b?c=/../d#"[:-1]: "/a/b",
    b"/a%20b": "/a%20b",
    b"/%61": "/%61",
    b"/%2541": "/%2541",
    b"/@types%2fnode": "/@types%2fnode",
    b"/a///b/": "/a///b/",
    b"/a%2F%2Fb": "/a%2F%2Fb",
    b"/a?//b": "/a",
    b"/caf%C3%A9": "/caf%C3%A9",
    b"/a;b=c/d": "/a;b=c/d",
    b"/...": "/...",
    b"/.git/config": "/.git/config",
    b"/a?%2e%2e": "/a",
}
AMBIGUOUS = [
    b"/a/../b", b"/a/..", b"/./a", b"/a/%2e%2e/b", b"/a/.%2E/b", b"/a%2f..%2fb", b"/a\\..\\b", b"/a%5cb", b"/..;/b",
    b"/a/..;x=y/b", b"/%252e%252e/", b"/a%252fb", b"/a%00", b"/a%0d%0aX:%20y", b"/%", b"/%zz", b"/%2", b"/%ff",
    b"/%c0%ae",
    b"/a#b", b"a", b"", b"/%25252e", b"/a%7f", b"/%c2%85",
    b"//", b"//a", b"//a/b?c", b"//evil.test/a", b"///a",
]  # fmt: skip


@pytest.mark.parametrize(("target", "path"), PATHS.items())
def test_a_path_goes_to_the_rules_as_it_was_written(target: bytes, path: str) -> None:
    assert checked_path(target) == path
    subject = proxy()
    assert subject.client_bytes(b"GET " + target + b" HTTP/1.1\r\nHost: web.test\r\n\r\n") == [Ask("GET", path)]
    assert upstream(subject.decided(True)).startswith(b"GET " + target + b" HTTP/1.1\r\n")  # as it was written


@pytest.mark.parametrize("target", AMBIGUOUS)
def test_a_path_that_servers_read_differently_is_refused(target: bytes) -> None:
    with pytest.raises(HttpError) as refused:
        checked_path(target)
    assert refused.value.status == 400


ANY, READ = RequestRule(), RequestRule((), "/api/*/read")
PROJECTS = RequestRule(("DELETE",), "/api/v4/projects/*")
LETTER = RequestRule((), "/A")


@pytest.mark.parametrize(
    ("allow", "ask", "deny", "line", "verdict"),
    [
        (ANY, None, PROJECTS, b"DELETE /api/v4/projects/7", Verdict.DENY),
        (ANY, None, PROJECTS, b"DELETE /api/v4/projects/group%2Fproject", Verdict.DENY),
        (ANY, None, PROJECTS, b"DELETE /api%2fv4/projects/7?x", Verdict.DENY),
        (ANY, None, PROJECTS, b"DELETE /api//v4/projects/7", Verdict.DENY),
        (ANY, None, PROJECTS, b"DELETE /api/v4/projects/%2537", Verdict.DENY),
        (ANY, None, PROJECTS, b"GET /api/v4/projects/group%2Fproject", Verdict.ALLOW),
        (ANY, PROJECTS, None, b"DELETE /api/v4/projects/group%2Fproject", Verdict.ASK),
        (ANY, None, None, b"GET /a//b%2541", Verdict.ALLOW),
        (READ, None, None, b"GET /api/x/read", Verdict.ALLOW),
        (READ, None, None, b"GET /api/%78/read/", Verdict.ALLOW),
        (READ, None, None, b"GET /api%2Fx/read", Verdict.DENY),
        (READ, None, None, b"GET /api/x%2Fread", Verdict.DENY),
        (READ, None, None, b"GET /api//x/read", Verdict.DENY),
        (LETTER, None, None, b"GET /%41", Verdict.ALLOW),
        (LETTER, None, None, b"GET /%2541", Verdict.DENY),
        (LETTER, None, None, b"GET /A//", Verdict.DENY),
    ],
)
def test_rules_judge_all_that_a_written_path_may_mean(
    allow: RequestRule, ask: RequestRule | None, deny: RequestRule | None, line: bytes, verdict: Verdict
) -> None:
    rules = [() if each is None else (NetworkRule(NAME, requests=(each,)),) for each in (allow, ask, deny)]
    policy = PolicyPart(Policy(network=Network(allow=rules[0], ask=rules[1], deny=rules[2])))
    [asked] = proxy().client_bytes(line + b" HTTP/1.1\r\nHost: web.test\r\n\r\n")
    assert isinstance(asked, Ask)
    request = Request(Endpoint(Transport.TCP, "", 80, NAME, protocol="http"), asked.method, asked.path)
    assert policy.judge(Action(Kind.HTTP_REQUEST, request, Origin("box", "session"))).verdict is verdict


def test_fields_of_one_hop_stay_here() -> None:
    request = (
        b"GET / HTTP/1.1\r\nHost: web.test\r\nConnection: keep-alive, X-Mine\r\nX-Mine: 1\r\nKeep-Alive: 5\r\n"
        b"Proxy-Authorization: Basic eDp5\r\nProxy-Connection: keep-alive\r\nTE: trailers\r\nTrailer: x\r\n"
        b"Accept: */*\r\nCookie: a=b\r\n\r\n"
    )
    assert upstream(allow(proxy(), request)) == (
        b"GET / HTTP/1.1\r\nHost: web.test\r\nAccept: */*\r\nCookie: a=b\r\n\r\n"
    )


# ---- bodies ----


def test_a_body_of_known_length_streams() -> None:
    subject = proxy()
    head = b"POST /a HTTP/1.1\r\nHost: web.test\r\nContent-Length: 6\r\n\r\n"
    assert subject.client_bytes(head + b"ab") == [Ask("POST", "/a")]
    assert upstream(subject.decided(True)) == head + b"ab"
    assert subject.wants_client
    assert subject.client_bytes(b"cd") == [ToUpstream(b"cd")]
    assert subject.client_bytes(b"ef") == [ToUpstream(b"ef")]
    assert not subject.wants_client


def test_a_chunked_body_is_chunked_anew_without_extensions_and_trailers() -> None:
    subject = proxy()
    commands = allow(
        subject,
        b"POST /a HTTP/1.1\r\nHost: web.test\r\nTransfer-Encoding: chunked\r\n\r\n"
        b"0002;x=y\r\nab\r\n3\r\ncde\r\n0\r\nX-Trailer: evil\r\n\r\n",
    )
    head = b"POST /a HTTP/1.1\r\nHost: web.test\r\nTransfer-Encoding: chunked\r\n\r\n"
    assert upstream(commands) == head + b"5\r\nabcde\r\n0\r\n\r\n"


@pytest.mark.parametrize(
    "body",
    [b"x\r\n", b"-1\r\n", b"2\r\nabc", b"2\nab", b"\r\n", b"1" * 30 + b"\r\n", b"2\r\nab\r\n0\r\nbad trailer\r\n\r\n"],
)
def test_a_malformed_chunk_ends_the_connection(body: bytes) -> None:
    subject = proxy()
    commands = allow(subject, b"POST /a HTTP/1.1\r\nHost: web.test\r\nTransfer-Encoding: chunked\r\n\r\n")
    commands += subject.client_bytes(body)
    commands += subject.client_ended()
    assert closes(commands)
    assert not upstream(commands).endswith(b"0\r\n\r\n")  # the server does not take it for a whole request


def test_a_body_in_chunks_of_one_byte_is_refused_in_bounded_time() -> None:
    subject = proxy()
    commands = allow(subject, b"POST /a HTTP/1.1\r\nHost: web.test\r\nTransfer-Encoding: chunked\r\n\r\n")
    commands = []
    while not closes(commands):
        commands = subject.client_bytes(b"1\r\nx\r\n" * 1000)
        assert len(upstream(commands)) < 2000  # joined, not one chunk each
    assert b"chunks that are too small" in client(commands)


def test_small_chunks_now_and_then_are_no_attack() -> None:
    counted = Chunks()
    for _ in range(100_000):
        counted.count(3, 3)
    with pytest.raises(HttpError):
        for _ in range(100):
            counted.count(1000, 1000)


@pytest.mark.parametrize(
    "framing", [b"Content-Length: 11\r\n\r\n", b"Transfer-Encoding: chunked\r\n\r\nb\r\n12345678901\r\n0\r\n\r\n"]
)
def test_a_body_over_the_limit(framing: bytes) -> None:
    subject = proxy(limits=FlowLimits(body=10))
    commands = subject.client_bytes(b"POST / HTTP/1.1\r\nHost: web.test\r\n" + framing)
    if isinstance(commands[0], Ask):
        commands = subject.decided(True)
    assert client(commands).startswith(b"HTTP/1.1 413 ")
    assert closes(commands)
    assert b"12345" not in upstream(commands)


def test_an_answer_over_the_limit_is_cut() -> None:
    subject = proxy(limits=FlowLimits(body=10))
    allow(subject)
    commands = subject.upstream_bytes(b"HTTP/1.1 200 OK\r\nContent-Length: 11\r\n\r\n12345678901")
    assert closes(commands)
    assert b"12345" not in client(commands)


def test_an_answer_in_pieces_is_cut_where_it_exceeds_the_limit() -> None:
    subject = proxy(limits=FlowLimits(body=10))
    allow(subject)
    assert client(subject.upstream_bytes(b"HTTP/1.1 200 OK\r\nContent-Length: 30\r\n\r\n")).endswith(b"\r\n\r\n")
    assert subject.upstream_bytes(b"123456") == [ToClient(b"123456")]
    assert not subject._upstream.data  # the middle of a body is not kept
    commands = subject.upstream_bytes(b"abcdef")
    assert closes(commands) and client(commands) == b""


def test_a_large_file_may_be_asked_about_with_head() -> None:
    subject = proxy(limits=FlowLimits(body=10))
    allow(subject, GET.replace(b"GET", b"HEAD"))
    answer = b"HTTP/1.1 200 OK\r\nContent-Length: 1000\r\n\r\n"
    assert subject.upstream_bytes(answer) == [ToClient(answer)]
    assert phase(subject) is Phase.IDLE


def test_a_client_that_waits_for_100_gets_it_once_the_request_is_allowed() -> None:
    subject = proxy()
    assert subject.client_bytes(
        b"POST / HTTP/1.1\r\nHost: web.test\r\nContent-Length: 2\r\nExpect: 100-continue\r\n\r\n"
    ) == [Ask("POST", "/")]
    assert subject.decided(True) == [
        Dial(),
        ToClient(b"HTTP/1.1 100 Continue\r\n\r\n"),
        ToUpstream(b"POST / HTTP/1.1\r\nHost: web.test\r\nContent-Length: 2\r\n\r\n"),
    ]
    assert subject.upstream_bytes(b"HTTP/1.1 100 Continue\r\n\r\n") == []
    assert subject.client_bytes(b"ab") == [ToUpstream(b"ab")]


def test_commands_carry_at_most_64_kib() -> None:
    subject = proxy()
    commands = allow(subject, b"POST / HTTP/1.1\r\nHost: web.test\r\nContent-Length: 10000000\r\n\r\n")
    for _ in range(10):
        commands += subject.client_bytes(b"x" * 65536)
    assert max(len(command.data) for command in commands if isinstance(command, ToUpstream)) <= 65536


# ---- answers ----


def test_an_answer_is_written_anew() -> None:
    subject = proxy()
    allow(subject)
    commands = subject.upstream_bytes(
        b"HTTP/1.1 200 Fine\r\nTransfer-Encoding: chunked\r\nKeep-Alive: 5\r\nX-A: b\r\nTrailer: X-T\r\n"
        b'Alt-Svc: h3=":443"\r\nProxy-Authenticate: Basic\r\n\r\n2;e=f\r\nhi\r\n0\r\nX-T: evil\r\n\r\n'
    )
    assert client(commands) == (
        b"HTTP/1.1 200 Fine\r\nX-A: b\r\nTransfer-Encoding: chunked\r\n\r\n2\r\nhi\r\n0\r\n\r\n"
    )
    assert not closes(commands)


BAD_ANSWERS = {
    "both lengths": b"HTTP/1.1 200 OK\r\nContent-Length: 2\r\nTransfer-Encoding: chunked\r\n\r\n",
    "two lengths": b"HTTP/1.1 200 OK\r\nContent-Length: 2\r\nContent-Length: 3\r\n\r\n",
    "gzip coding": b"HTTP/1.1 200 OK\r\nTransfer-Encoding: gzip\r\n\r\n",
    "bare line feeds": b"HTTP/1.1 200 OK\nContent-Length: 0\n\n\r\n\r\n",
    "folded": b"HTTP/1.1 200 OK\r\nX: a\r\n b\r\n\r\n",
    "NUL": b"HTTP/1.1 200 OK\r\nX: a\0\r\n\r\n",
    "HTTP/2": b"HTTP/2 200 OK\r\n\r\n",
    "no HTTP": b"SSH-2.0-OpenSSH_9.2\r\n\r\n",
    "status of two digits": b"HTTP/1.1 20 OK\r\n\r\n",
    "header bomb": b"HTTP/1.1 200 OK\r\nX: " + b"a" * 65536,
    "too many fields": b"HTTP/1.1 200 OK\r\n" + b"X: y\r\n" * (MAX_FIELDS + 1) + b"\r\n",
    "upgrade that nobody asked for": SWITCH,
    "interim with body": b"HTTP/1.1 100 Continue\r\nContent-Length: 5\r\n\r\n",
    "no content with content": b"HTTP/1.1 204 No\r\nContent-Length: 5\r\n\r\n",
    "interim for ever": b"HTTP/1.1 103 Early\r\n\r\n" * (MAX_INTERIM + 1),
    "coding taken away": b"HTTP/1.1 200 OK\r\nContent-Encoding: gzip\r\nConnection: content-encoding\r\n\r\nhi",
    "length taken away": b"HTTP/1.1 200 OK\r\nContent-Length: 2\r\nConnection: Content-Length\r\n\r\nhi",
}


@pytest.mark.parametrize("attack", BAD_ANSWERS.values(), ids=BAD_ANSWERS.keys())
def test_a_malicious_server_gets_nothing_through(attack: bytes) -> None:
    subject = proxy(*Permit)
    allow(subject)
    commands = subject.upstream_bytes(attack)
    assert client(commands).startswith(b"HTTP/1.1 502 ")
    assert closes(commands)


@pytest.mark.parametrize("cut", range(len(OK)))
def test_an_answer_that_is_broken_off_is_seen_as_such(cut: int) -> None:
    subject = proxy()
    allow(subject)
    commands = subject.upstream_bytes(OK[:cut]) + subject.upstream_ended()
    assert closes(commands)
    assert client(commands).startswith(b"HTTP/1.1 502 ") == (cut < len(OK) - 2)


def test_an_answer_until_the_end_of_the_connection() -> None:
    subject = proxy()
    allow(subject)
    commands = subject.upstream_bytes(b"HTTP/1.0 200 OK\r\n\r\nabc") + subject.upstream_ended()
    assert b"Transfer-Encoding: chunked" in client(commands)
    assert b"Connection: close" in client(commands)
    assert client(commands).endswith(b"3\r\nabc\r\n0\r\n\r\n")
    assert closes(commands) == ["done"]


def test_the_oldest_clients_are_served_without_chunks() -> None:
    subject = proxy()
    allow(subject, b"GET / HTTP/1.0\r\nHost: web.test\r\nConnection: keep-alive\r\n\r\n")
    commands = subject.upstream_bytes(b"HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\n2\r\nhi\r\n0\r\n\r\n")
    assert client(commands).endswith(b"\r\n\r\nhi")
    assert b"chunked" not in client(commands)
    assert closes(commands)


def test_a_server_that_answers_early_ends_the_connection() -> None:
    subject = proxy()
    allow(subject, b"POST / HTTP/1.1\r\nHost: web.test\r\nContent-Length: 100\r\n\r\nabc")
    commands = subject.upstream_bytes(b"HTTP/1.1 401 No\r\nContent-Length: 0\r\n\r\n")
    assert client(commands).startswith(b"HTTP/1.1 401 ")
    assert b"Connection: close" in client(commands)
    assert closes(commands)


def test_a_server_that_closes_between_requests() -> None:
    subject = proxy()
    allow(subject)
    subject.upstream_bytes(OK)
    assert subject.upstream_ended() == [Close("the server ended the connection")]


def test_a_server_that_closes_while_a_request_waits_is_dialled_again() -> None:
    subject = proxy()
    allow(subject)
    subject.upstream_bytes(OK)
    assert subject.client_bytes(GET) == [Ask("GET", "/a")]
    assert subject.upstream_ended() == [HangUp()]
    assert subject.upstream_ended() == []
    assert not subject.wants_upstream
    assert subject.decided(True) == [Dial(), ToUpstream(b"GET /a HTTP/1.1\r\nHost: web.test\r\n\r\n")]
    assert client(subject.upstream_bytes(OK)).endswith(b"hi")


def test_what_a_server_says_while_a_request_waits_is_nobodys_answer() -> None:
    subject = proxy()
    allow(subject)
    subject.upstream_bytes(OK)
    subject.client_bytes(GET)
    assert subject.upstream_bytes(b"HTTP/1.1 408 Late\r\nContent-Length: 0\r\n\r\n") == [HangUp()]
    assert client(subject.decided(False, "no")).startswith(b"HTTP/1.1 403 ")


# ---- what a request is for ----

_GIT = b"Content-Type: application/x-git-upload-pack-request\r\nContent-Length: 0\r\n"


@pytest.mark.parametrize(
    ("line", "fields", "meaning"),
    [
        (b"GET /a", b"", Meaning.METHOD),
        (b"POST /a", b"Content-Length: 0\r\n", Meaning.METHOD),
        (b"GET /a", b"X-HTTP-Method-Override: DELETE\r\n", Meaning.OVERRIDDEN),
        (b"POST /a", b"x_http_method: PUT\r\n", Meaning.OVERRIDDEN),
        (b"GET /a", b"X-Original-URL: /admin\r\n", Meaning.OVERRIDDEN),
        (b"GET /a?x=1&_method=delete", b"", Meaning.OVERRIDDEN),
        (b"GET /a?%5fmethod=delete", b"", Meaning.OVERRIDDEN),
        (b"GET /a?method=delete", b"", Meaning.METHOD),
        (b"GET /a", b"Content-Length: 2\r\n", Meaning.BODY),
        (b"HEAD /a", b"Transfer-Encoding: chunked\r\n", Meaning.BODY),
        (b"GET /a", b"Content-Length: 0\r\n", Meaning.METHOD),
        (b"POST /x.git/git-upload-pack", _GIT, Meaning.FETCH),
        (b"POST /x.git/git-upload-pack?delete=1", _GIT, Meaning.METHOD),
        (b"POST /x.git/git-upload-pack", b"Content-Length: 0\r\n", Meaning.METHOD),
        (b"POST /x.git/git-upload-pack", _GIT + b"Content-Type: application/json\r\n", Meaning.METHOD),
        (b"POST /x.git/git-upload-pack", _GIT + b"X-HTTP-Method-Override: DELETE\r\n", Meaning.OVERRIDDEN),
        (b"POST /x.git/git-receive-pack", _GIT, Meaning.METHOD),
        (b"POST /-/npm/v1/security/advisories/bulk", b"Content-Length: 0\r\n", Meaning.FETCH),
        (b"POST /-/npm/v1/security/advisories/bulk?x", b"Content-Length: 0\r\n", Meaning.METHOD),
    ],
)
def test_what_a_request_is_for(line: bytes, fields: bytes, meaning: Meaning) -> None:
    raw = line + b" HTTP/1.1\r\nHost: web.test\r\n" + fields + b"\r\n"
    [asked] = proxy().client_bytes(raw)
    assert isinstance(asked, Ask)
    assert asked.meaning is meaning


def test_where_methods_are_judged_nothing_overrides_them() -> None:
    subject = HttpProxy(NAME, 80, secure=False, judged=True)
    raw = GET[:-2] + b"X-HTTP-Method-Override: DELETE\r\n\r\n"
    assert subject.client_bytes(raw) == [Ask("GET", "/a")]
    assert b"Override" not in upstream(subject.decided(True))


# ---- what needs a permit ----


@pytest.mark.parametrize(
    ("permit", "request_", "protocol"),
    [
        (Permit.WEBSOCKET, WEBSOCKET, "websocket"),
        (
            Permit.H2C,
            UPGRADE % b"Connection: Upgrade, HTTP2-Settings\r\nUpgrade: h2c\r\nHTTP2-Settings: AAMAAABk",
            "h2c",
        ),
        (Permit.UPGRADE, UPGRADE % b"Connection: upgrade\r\nUpgrade: TLS/1.0", "tls/1.0"),
    ],
)
def test_an_upgrade_needs_its_own_permit(permit: Permit, request_: bytes, protocol: str) -> None:
    subject = proxy(*(set(Permit) - {permit}))
    commands = subject.client_bytes(request_)
    assert [type(command) for command in commands] == [Refused, ToClient]
    assert client(commands).startswith(b"HTTP/1.1 403 ")
    assert phase(subject) is Phase.IDLE

    subject = proxy(permit)
    (asked,) = subject.client_bytes(request_)
    assert isinstance(asked, Ask)
    assert asked.upgrade == protocol
    sent = upstream(subject.decided(True)).lower()
    assert b"upgrade: " + protocol.encode() + b"\r\n" in sent
    assert (b"http2-settings: aamaaabk\r\n" in sent) == (protocol == "h2c")
    assert subject.client_bytes(b"early") == []  # nothing before the server agrees
    switch = SWITCH.replace(b"websocket", protocol.encode())
    commands = subject.upstream_bytes(switch + b"frame")
    assert [type(command) for command in commands] == [ToClient, Tunnel, ToClient, ToUpstream]
    assert commands[1:] == [Tunnel(protocol), ToClient(b"frame"), ToUpstream(b"early")]
    assert subject.client_bytes(b"up") == [ToUpstream(b"up")]
    assert subject.upstream_bytes(b"down") == [ToClient(b"down")]
    assert not subject.scrubs


def test_a_server_that_changes_to_another_protocol_than_asked() -> None:
    subject = proxy(*Permit)
    allow(subject, WEBSOCKET)
    commands = subject.upstream_bytes(SWITCH.replace(b"websocket", b"h2c"))
    assert client(commands).startswith(b"HTTP/1.1 502 ")
    assert closes(commands)


def test_an_upgrade_that_the_server_declines_is_an_ordinary_answer() -> None:
    subject = proxy(Permit.WEBSOCKET)
    allow(subject, WEBSOCKET)
    assert subject.upstream_bytes(OK) == [ToClient(OK)]
    assert subject.client_bytes(GET) == [Ask("GET", "/a")]


def test_websocket_only_by_get() -> None:
    commands = proxy(*Permit).client_bytes(WEBSOCKET.replace(b"GET", b"POST"))
    assert client(commands).startswith(b"HTTP/1.1 403 ")


CONNECT = b"CONNECT far.test:443 HTTP/1.1\r\nHost: far.test:443\r\n\r\n"


@pytest.mark.parametrize(
    "query",
    [
        "_method=DELETE",
        "a=1&_method",
        "x;%5fMETHOD=put",
        ".method=put",
        "X-HTTP-Method-Override=DELETE",
        "$httpMethod=PUT",
    ],
)
def test_a_query_that_names_another_method_is_refused_where_methods_are_judged(query: str) -> None:
    request_ = GET.replace(b"/a", b"/a?" + query.encode())
    judging = HttpProxy(NAME, 80, secure=False, permits=(), limits=LIMITS, secret=None, judged=True)
    commands = judging.client_bytes(request_)
    assert client(commands).startswith(b"HTTP/1.1 403 ") and b"another method" in client(commands)
    assert upstream(commands) == b""
    assert upstream(allow(proxy(), request_)).startswith(b"GET /a?" + query.encode())
    judging = HttpProxy(NAME, 80, secure=False, permits=(), limits=LIMITS, secret=None, judged=True)
    assert upstream(allow(judging, GET.replace(b"/a", b"/a?payment_method=card&method=x&m=_method")))


def test_connect_needs_its_permit() -> None:
    commands = proxy(*(set(Permit) - {Permit.CONNECT})).client_bytes(CONNECT)
    assert [type(command) for command in commands] == [Refused, ToClient]
    subject = proxy(Permit.CONNECT)
    assert subject.client_bytes(CONNECT) == [Ask("CONNECT", "/far.test:443", "connect")]
    assert upstream(subject.decided(True)) == CONNECT
    commands = subject.upstream_bytes(b"HTTP/1.1 200 Yes\r\nContent-Length: 5\r\n\r\nhello")
    assert commands == [ToClient(b"HTTP/1.1 200 \r\n\r\n"), Tunnel("connect"), ToClient(b"hello")]


def test_connect_that_the_proxy_declines() -> None:
    subject = proxy(Permit.CONNECT)
    allow(subject, CONNECT)
    assert client(subject.upstream_bytes(OK.replace(b"200 OK", b"407 No"))).startswith(b"HTTP/1.1 407 ")


# ---- credentials ----


def test_the_secret_goes_to_the_server_in_place_of_the_clients() -> None:
    subject = proxy(secret=bearer())
    sent = upstream(
        allow(
            subject,
            b"GET / HTTP/1.1\r\nHost: web.test\r\nauthorization: mine\r\nAUTHORIZATION: again\r\n"
            b"Accept-Encoding: gzip, br\r\nRange: bytes=0-3\r\nIf-Range: x\r\n\r\n",
        )
    )
    assert sent == (
        b"GET / HTTP/1.1\r\nHost: web.test\r\nAccept-Encoding: identity\r\nauthorization: Bearer "
        + TOKEN.encode()
        + b"\r\n\r\n"
    )


def test_a_secret_never_goes_out_with_what_is_denied() -> None:
    subject = proxy(secret=bearer())
    subject.client_bytes(GET)
    commands = subject.decided(False, "no")
    assert upstream(commands) == b""
    assert TOKEN.encode() not in repr(commands).encode()


def test_echoes_are_taken_out_of_head_and_body() -> None:
    subject = proxy(secret=bearer())
    allow(subject)
    body = f"<{TOKEN}> {base64.b64encode(f'x:{TOKEN}'.encode()).decode()}".encode()
    answer = f"HTTP/1.1 200 {TOKEN}\r\nX-Echo: a{TOKEN}b\r\nContent-Length: {len(body)}\r\n\r\n".encode() + body
    commands: list[Command] = []
    for i in range(len(answer)):
        commands += subject.upstream_bytes(answer[i : i + 1])
    told = client(commands)
    assert TOKEN.encode() not in told
    assert base64.b64encode(b"x:" + TOKEN.encode())[4:-4] not in told
    assert len(told) == len(answer)
    assert b"<" + b"*" * len(TOKEN) + b">" in told
    assert b"X-Echo: a" + b"*" * len(TOKEN) + b"b\r\n" in told
    assert phase(subject) is Phase.IDLE


@pytest.mark.parametrize(
    "framing", [b"Content-Length: 9\r\n\r\n<<%s", b"Transfer-Encoding: chunked\r\n\r\n9\r\n<<%s\r\n0\r\n\r\n"]
)
def test_a_body_that_ends_like_the_beginning_of_the_secret_is_passed_on_whole(framing: bytes) -> None:
    subject = proxy(secret=bearer())
    allow(subject)
    told = client(subject.upstream_bytes(b"HTTP/1.1 200 OK\r\n" + framing % TOKEN[:7].encode()))
    assert b"<<" + TOKEN[:7].encode() in told
    assert phase(subject) is Phase.IDLE


@pytest.mark.parametrize("extra", [b"Content-Encoding: gzip\r\n", b"content-encoding: BR\r\n"])
def test_a_compressed_answer_is_refused_where_a_secret_was_put_in(extra: bytes) -> None:
    subject = proxy(secret=bearer())
    allow(subject)
    commands = subject.upstream_bytes(b"HTTP/1.1 200 OK\r\nContent-Length: 2\r\n" + extra + b"\r\nhi")
    assert client(commands).startswith(b"HTTP/1.1 502 ")
    plain = proxy()
    allow(plain)
    assert not closes(plain.upstream_bytes(b"HTTP/1.1 200 OK\r\nContent-Length: 2\r\n" + extra + b"\r\nhi"))


def test_a_part_is_refused_where_a_secret_was_put_in() -> None:
    subject = proxy(secret=bearer())
    allow(subject)
    assert closes(subject.upstream_bytes(b"HTTP/1.1 206 Part\r\nContent-Length: 2\r\n\r\ns3"))


@pytest.mark.parametrize(
    "request_",
    [
        CONNECT,
        *(GET.replace(b"GET", m) for m in (b"TRACE", b"trace", b"Track")),
        WEBSOCKET.replace(b"websocket", b"h2c"),
    ],
)
def test_what_would_hide_a_secret_is_refused(request_: bytes) -> None:
    commands = proxy(*Permit, secret=bearer()).client_bytes(request_)
    assert client(commands).startswith(b"HTTP/1.1 403 ")
    assert upstream(commands) == b""


def test_a_websocket_is_scrubbed_and_not_compressed() -> None:
    subject = proxy(Permit.WEBSOCKET, secret=bearer())
    sent = upstream(allow(subject, WEBSOCKET[:-2] + b"Sec-WebSocket-Extensions: permessage-deflate\r\n\r\n"))
    assert b"permessage-deflate" not in sent
    assert subject.scrubs
    commands = subject.upstream_bytes(SWITCH + TOKEN[:7].encode())
    commands += subject.upstream_bytes(TOKEN[7:].encode() + b"!")
    commands += subject.upstream_ended()
    assert client(commands).endswith(b"\r\n\r\n" + b"*" * len(TOKEN) + b"!")


def test_a_secret_in_what_frames_the_answer_is_not_passed_on() -> None:
    secret = load(Credential(CredentialKind.BEARER, "env:N"), {"N": "12345678"})
    subject = proxy(secret=secret)
    allow(subject)
    commands = subject.upstream_bytes(b"HTTP/1.1 200 OK\r\nContent-Length: 12345678\r\n\r\n")
    assert closes(commands)
    assert b"12345678" not in client(commands)


# ---- properties ----

PIECES = [
    GET, OK, WEBSOCKET, SWITCH, CONNECT, b"\r\n", b"\n", b"\r", b"\0", b"0\r\n\r\n", b"5\r\nhello\r\n",
    b"Host: web.test\r\n",
    b"Content-Length: 5\r\n", b"Transfer-Encoding: chunked\r\n", b"POST / HTTP/1.1\r\n", b"HTTP/1.1 200 OK\r\n",
    b"hello",
    b"HTTP/1.1 100 Continue\r\n\r\n", b"Connection: close\r\n", b"Connection: upgrade\r\n", b"Upgrade: websocket\r\n",
    b"Expect: 100-continue\r\n", b"HTTP/1.0 200 OK\r\n\r\n", b"Content-Encoding: gzip\r\n",
]  # fmt: skip
material = st.lists(st.sampled_from(PIECES) | st.binary(max_size=12), max_size=12).map(b"".join)
step = st.one_of(
    st.tuples(st.just("client"), material),
    st.tuples(st.just("upstream"), material),
    st.tuples(st.just("client ended"), st.just(b"")),
    st.tuples(st.just("upstream ended"), st.just(b"")),
    st.tuples(st.just("allow"), st.just(b"")),
    st.tuples(st.just("deny"), st.just(b"")),
    st.tuples(st.just("failed"), st.just(b"")),
)


@settings(max_examples=400)
@given(st.lists(step, max_size=14), st.sets(st.sampled_from(list(Permit))), st.booleans())
@example([("client", GET), ("allow", b""), ("upstream", OK + OK)], set(), False)
def test_no_order_of_events_breaks_the_order_of_commands(
    steps: list[tuple[str, bytes]], permits: set[Permit], inject: bool
) -> None:
    subject = proxy(*permits, secret=bearer() if inject else None)
    asked = sent = 0
    dialled = tunnel = over = client_over = upstream_over = False
    for kind, data in steps:
        if kind == "client" and not client_over:
            commands = subject.client_bytes(data)
        elif kind == "upstream" and dialled and not upstream_over:
            commands = subject.upstream_bytes(data)
        elif kind == "client ended":
            client_over, commands = True, subject.client_ended()
        elif kind == "upstream ended" and dialled:
            upstream_over, commands = True, subject.upstream_ended()
        elif kind in ("allow", "deny") and phase(subject) is Phase.ASKED:
            asked -= 1
            sent += kind == "allow"
            commands = subject.decided(kind == "allow")
        elif kind == "failed":
            commands = subject.failed("no")
        else:
            continue
        assert not (over and commands)
        for command in commands:
            assert not over
            if isinstance(command, Ask):
                asked += 1
                assert asked == 1
            elif isinstance(command, ToUpstream):
                assert sent, "bytes went out that nobody allowed"
                assert dialled
            elif isinstance(command, Dial):
                assert sent == 1
                assert not dialled
                dialled = True
            elif isinstance(command, Tunnel):
                assert permits
                assert not tunnel
                tunnel = True
            elif isinstance(command, Close):
                over = True
        assert over == (phase(subject) is Phase.CLOSED)


CONVERSATION = (
    GET + b"POST /b HTTP/1.1\r\nHost: web.test\r\nTransfer-Encoding: chunked\r\n\r\n5\r\nhello\r\n0\r\n\r\n" + GET
)


def conversation(pieces: list[bytes]) -> tuple[bytes, list[Ask]]:
    """What goes out, chunks read again, and what was asked."""
    subject = proxy()
    out, asks = b"", []
    for piece in pieces:
        pending = subject.client_bytes(piece)
        while pending:
            following: list[Command] = []
            for command in pending:
                if isinstance(command, Ask):
                    asks.append(command)
                    following += subject.decided(True)
                elif isinstance(command, ToUpstream):
                    out += command.data
            if phase(subject) is Phase.EXCHANGE and not subject.wants_client:
                following += subject.upstream_bytes(OK)
            pending = following
    return out, asks


def requests_in(data: bytes) -> list[tuple[bytes, bytes, bytes]]:
    """As a server reads them."""
    found = []
    while data:
        server = h11.Connection(h11.SERVER)
        server.receive_data(data)
        request, body = server.next_event(), b""
        assert isinstance(request, h11.Request)
        while isinstance(event := server.next_event(), h11.Data):
            body += event.data
        assert isinstance(event, h11.EndOfMessage)
        found.append((request.method, request.target, body))
        data = server.trailing_data[0]
    return found


@given(st.lists(st.integers(0, len(CONVERSATION)), max_size=8))
def test_where_the_bytes_are_split_makes_no_difference(cuts: list[int]) -> None:
    places = [0, *sorted(cuts), len(CONVERSATION)]
    out, asks = conversation([CONVERSATION[a:b] for a, b in pairwise(places)])
    assert requests_in(out) == [(b"GET", b"/a", b""), (b"POST", b"/b", b"hello"), (b"GET", b"/a", b"")]
    assert asks == [Ask("GET", "/a"), Ask("POST", "/b"), Ask("GET", "/a")]


@settings(max_examples=300)
@given(material)
def test_heads_raise_nothing_but_their_error(data: bytes) -> None:
    for read in (
        lambda: request_head(data + b"\r\n\r\n", NAME, 80, secure=False),
        lambda: response_head(data + b"\r\n\r\n"),
    ):
        try:
            read()
        except HttpError as error:
            assert 400 <= error.status < 600


@given(st.text(st.sampled_from("/.%2eEfFcC5;a\\?"), max_size=12))
def test_no_path_that_rules_see_is_a_host_or_has_dots(text: str) -> None:
    try:
        path = checked_path(f"/{text}".encode())
    except HttpError:
        return
    assert path == f"/{text}".partition("?")[0]
    assert not path.startswith("//")
    assert not {".", ".."} & {segment.partition(";")[0] for segment in unquote(path).split("/")}
