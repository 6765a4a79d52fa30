"""What agents may try at the API broker, and what services may do to it. What matters is looked at where it arrives."""

from __future__ import annotations

import asyncio
import json
import ssl
from collections.abc import AsyncIterator
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any
from urllib.parse import parse_qsl, quote, unquote

import pytest
from cryptography import x509
from cryptography.hazmat.primitives import hashes
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.hazmat.primitives.serialization import Encoding, NoEncryption, PrivateFormat
from cryptography.x509.oid import NameOID
from hypothesis import given, settings
from hypothesis import strategies as st

from corral.actions import Ending, Origin
from corral.brokers.api import asking, upstream
from corral.brokers.api.checking import outgoing
from corral.brokers.api.document import load
from corral.brokers.api.media import FORM
from corral.brokers.api.paths import PathFault, Paths, read_path, template
from corral.brokers.api.reading import Declared, Reader
from corral.brokers.api.values import Asked, Place, Problem
from corral.brokers.http import Request
from corral.brokers.outward import tls_context
from corral.policy.model import Service
from tests.unit.api_bench import ALL, CANARY, DOCUMENT, HOST, Bench, Reply, Seen, bench, operations


@pytest.fixture
async def made() -> AsyncIterator[Bench]:
    async with bench(
        operations("listTickets", "createTicket", "getTicket", "headTicket", "putNote", "search")
    ) as found:
        yield found


async def refused(made: Bench, method: str, target: str, body: bytes = b"", **headers: str) -> None:
    got = await made.ask(method, target, body, **headers)
    assert got.status in (400, 403, 404, 405, 413, 414, 415, 431, 501), (target, got)
    assert made.upstream.seen == [], target
    if method != "HEAD":
        assert len(got.body) < 2000 and b"\x1b" not in got.body


# ---- paths ----

CONFUSED = [
    "../admin",
    "..",
    ".",
    "x/../../admin",
    "%2e%2e",
    "%2E%2e/admin",
    ".%2e/admin",
    "..%2fadmin",
    "x%2f..%2f..%2fadmin",
    "x%2Fy",
    "%2fadmin",
    "%252e%252e",
    "%252fadmin",
    "%25%32%66admin",
    "..;/admin",
    "..;x=1",
    "..%3b",
    "%2e%2e%3bx",
    "x/..;/admin",
    "..\\admin",
    "..%5cadmin",
    "x%5c..%5cadmin",
    "..%00",
    "1%00",
    "1%0d%0aHost:%20evil.example",
    "1%0aX",
    "1%09",
    "1%7f",
    "%c0%ae%c0%ae",
    "%c0%af",
    "%ff",
    "%u002e%u002e",
    "%",
    "%2",
    "%zz",
    "/1",
    "1//notes",
    "1/",
    "",
    "1/notes/.txt",
    "..%20",
    "%EF%BC%8E%EF%BC%8E",  # fullwidth dots
    "%E2%80%A5",  # a two dot leader
    "%E2%80%A4",
    "e%CC%81",  # not normalised
    "mine",  # an operation that there is not
    "Mine",
    "MINE",
    "mine.",
    "mine%20",
    "mine%20.",
    "mine;x",
    ";",
    "%3B",
    ";x=1",
    "%20",
    "%E3%80%80",
    ". .",
    "mine%3Bx=1",
    "m%69ne",
    "%6dine",
    "%EF%BD%8Dine",
    "%E1%B5%90ine",  # a small capital
    "1/notes/x",
    "1/notes/x.TXT",
    "1/notes/a/b.txt",
    "1/notes/..%2f..%2fadmin.txt",
    "x" * 9000,
    "a/" * 100,
]


@pytest.mark.parametrize("path", CONFUSED)
async def test_a_path_that_may_mean_another_is_refused(made: Bench, path: str) -> None:
    await refused(made, "GET", f"/tickets/tickets/{path}")
    await refused(made, "PUT", f"/tickets/tickets/{path}", b"x", content_type="text/plain")


@pytest.mark.parametrize(
    "target",
    [
        "/",
        "/tickets/admin",
        "/tickets/Tickets",
        "/tickets//tickets",
        "//tickets/tickets",
        "/tickets/../tickets/tickets",
        "/%74ickets/tickets",
        "/tickets%2ftickets",
        "/tickets/tickets/",
        "/tickets/tickets%2f",
        "/tickets/tickets%20",
        "/tickets/tickets;x=1",
        "/tickets/tickets%3f",
        "/tickets/v1/tickets",
        "/tickets/http://evil.example/",
        "/tickets/@evil.example/",
        "/tickets:80/tickets",
        "/tickets@evil.example/tickets",
        "/mcp/tickets",
        "/tickets/openapi.json/../admin",
        "/tickets/.well-known/x",
    ],
)
async def test_a_target_that_is_no_operation_of_a_service_reaches_none(made: Bench, target: str) -> None:
    await refused(made, "POST", target, b'{"title":"x"}', content_type="application/json")


@pytest.mark.parametrize(
    "path",
    ["a%20b", "a;b=c", "a%3Bb", "a,b", "~x", "a%40b", "a:b", "100%25", "%C3%A9", "-._~", "a%3Fb", "a%23b", "a&b=c"],
)
async def test_what_is_odd_and_means_one_thing_arrives_as_it_is(made: Bench, path: str) -> None:
    assert (await made.ask("GET", f"/tickets/tickets/{path}")).status == 200
    assert made.arrived.path == ["v1", "tickets", unquote(path)] and set(made.arrived.target) <= set(
        "/%-._~0123456789abcdefghijklmnopqrstuvwxyzABCDEFGHIJKLMNOPQRSTUVWXYZ"
    )


# ---- parameters ----


@pytest.mark.parametrize(
    "query",
    [
        "state=open&state=closed",
        "state=open&state=open",
        "State=open",
        "state[]=open",
        "state=OPEN",
        "state=open%00",
        "state=open;state=closed",
        "state=",
        "state",
        "=open",
        "&",
        "unknown=1",
        "limit=0",
        "limit=101",
        "limit=1e1",
        "limit=+1",
        "limit=01",
        "limit=0x1",
        "limit=1_0",
        "limit=%D9%A1",
        "limit=1.0",
        "limit=%201",
        "limit=1%0a",
        "limit=-0",
        "limit=NaN",
        "limit=" + "9" * 5000,
        "limit=null",
        "flag=TRUE",
        "flag=1",
        "flag=yes",
        "ratio=NaN",
        "ratio=Infinity",
        "ratio=1e999",
        "ratio=.5",
        "ids=1&ids=2",
        "ids=1,,2",
        "ids=1,x",
        "ids=1%2Cx",
        "words=a|",
        "words=a&words=b",
        "filter[a]=1",
        "filter=1",
        "filter=%7B%7D",
        "_method=DELETE",
        "label=A",
        "label=a%0A",
        "q=%",
        "q=%c0%af",
        "q=%ed%a0%80",
        "q=\x7f",
        "q=" + "x" * 2001,
        "&".join("label=a" for _ in range(1001)),
        "&".join(f"label={'a' * 100}" for _ in range(100)),
    ],
)
async def test_a_query_that_is_not_as_it_must_be_is_refused(made: Bench, query: str) -> None:
    await refused(made, "GET", f"/tickets/tickets?{query}")


async def test_headers_that_nobody_declared_are_dropped(made: Bench) -> None:
    names = [
        "X-HTTP-Method-Override",
        "X-HTTP-Method",
        "X-Method-Override",
        "X-Original-URL",
        "X-Rewrite-URL",
        "Forwarded",
        "X-Forwarded-For",
        "X-Forwarded-Host",
        "Authorization",
        "Proxy-Authorization",
        "Api-Key",
        "api_key",
        "Range",
        "TE",
        "Referer",
        "Origin",
        "User-Agent",
        "X-Real-IP",
        "Max-Forwards",
        "Accept",
        "Accept-Encoding",
        "If-None-Match",
        "Via",
        "X_View",
        "Traceparent",
        "Connection-X",
    ]
    assert (await made.raw("GET", "/tickets/tickets", [(name, "DELETE") for name in names])).status == 200
    headers = dict(made.arrived.headers)
    assert set(headers) == {"host", "accept", "accept-encoding", "user-agent", "api-key"}
    assert "DELETE" not in str(headers) and headers["host"] == f"127.0.0.1:{made.upstream.port}"


@pytest.mark.parametrize(
    "fields",
    [
        [("X-View", "a\x80")],
        [("X-View", "a,,b")],
        [("X-View", "a"), ("X-View", "b")],
        [("trace", "a"), ("Trace", "b")],
        [("trace", "x" * 5000)],
        [("cookie", "session=a b")],
        [("cookie", "session=a; session=b")],
        [("cookie", "session=a"), ("cookie", "session=b")],
        [("cookie", "session")],
        [("cookie", 'session="a"')],
        [("cookie", "session=a\\b")],
    ],
)
async def test_a_header_that_two_readers_may_take_differently_is_refused(
    made: Bench, fields: list[tuple[str, str]]
) -> None:
    got = await made.raw("GET", "/tickets/tickets", fields)
    assert got.status == 400 and made.upstream.seen == []


@pytest.mark.parametrize("method", ["get", "Get", "DELETE", "TRACE", "OPTIONS", "PROPFIND", "PATCH", "GETX", "PUT"])
async def test_other_methods_reach_nothing(made: Bench, method: str) -> None:
    await refused(made, method, "/tickets/tickets/1")
    await refused(made, method, "/tickets/tickets/1", x_http_method_override="GET")


async def test_a_head_is_no_get() -> None:
    async with bench(operations("getTicket")) as made:
        await refused(made, "HEAD", "/tickets/tickets/1")


# ---- bodies ----

J = "application/json"


@pytest.mark.parametrize(
    ("body", "type_"),
    [
        (b'{"title":"x"}', "text/plain"),
        (b'{"title":"x"}', "application/xml"),
        (b'{"title":"x"}', "application/json; charset=utf-16"),
        (b'{"title":"x"}', "application/json; charset=utf-7"),
        (b'{"title":"x"}', "application/json, text/plain"),
        (b'{"title":"x"}', "application/json;"),
        (b'{"title":"x"}', "application/json; x=y"),
        (b'{"title":"x"}', "application/vnd.x+json"),
        (b'{"title":"x"}', "multipart/form-data; boundary=x"),
        (b'{"title":"x"}', "application/x-www-form-urlencoded"),
        (b"title=x", "application/x-www-form-urlencoded"),
        (b'{"title":"x"}', "*/*"),
        (b"title=x", J),
        (b'{"title":"x","title":"y"}', J),
        (b'{"title":"x","project":{"key":"A","k\\u0065y":"B"}}', J),
        ('{"title":"x"}'.encode("utf-16"), J),
        (b'\xef\xbb\xbf{"title":"x"}', J),
        (b'{"title":"\\ud800"}', J),
        (b'{"title":"\xff"}', J),
        (b'{"title":NaN}', J),
        (b'{"title":"x","extra":1e999}', J),
        (b'{"title":"x","extra":' + b"9" * 1000 + b"}", J),
        (b'{"title":"x"}{"title":"y"}', J),
        (b'{"title":"x"} //', J),
        (b'[{"title":"x"}]', J),
        (b'"x"', J),
        (b"null", J),
        (b"{}", J),
        (b'{"title":1}', J),
        (b'{"title":["x"]}', J),
        (b'{"title":""}', J),
        (b'{"title":"x","priority":"1"}', J),
        (b'{"title":"x","priority":0}', J),
        (b'{"title":"x","priority":true}', J),
        (b'{"title":"x","parent":{"priority":0}}', J),
        (b'{"title":"x","extra":' + b"[" * 50 + b"]" * 50 + b"}", J),
        (b'{"title":"x","extra":' + b"[" * 100_000, J),
        (b'{"title":"x","extra":[' + b"1," * 300_000 + b"1]}", J),
        (b'{"title":"x","parent":' * 25 + b"null" + b"}" * 25, J),
    ],
)
async def test_a_body_that_is_not_as_it_must_be_is_refused(made: Bench, body: bytes, type_: str) -> None:
    await refused(made, "POST", "/tickets/tickets", body, content_type=type_)
    assert made.used.ending is Ending.REFUSED and made.used.status in (400, 415)


async def test_a_body_where_none_belongs_is_refused(made: Bench) -> None:
    await refused(made, "GET", "/tickets/tickets", b"{}", content_type=J)
    await refused(made, "GET", "/tickets/tickets/1", b"x")
    await refused(made, "POST", "/tickets/tickets", content_type=J)
    got = await made.raw(
        "POST", "/tickets/tickets", [("content-type", J), ("content-type", "text/plain")], b'{"title":"x"}'
    )
    assert got.status == 415
    await refused(made, "PUT", "/tickets/tickets/1/notes/x.txt", b'{"a":1}', content_type=J)  # for `image/*`, no more
    await refused(made, "PUT", "/tickets/tickets/1/notes/x.txt", b"\xff", content_type="text/plain")
    await refused(made, "POST", "/tickets/tickets", b"[" + b" " * (5 << 20), content_type=J)


@pytest.mark.parametrize(
    "body",
    [b"page=1", b"text=a&page=x", b"text=a&x=1", b"text=a&text=b", b"text=%", b"text=a\xff", b"text=a&page=1&page=2"],
)
async def test_a_form_is_checked_like_any_other(made: Bench, body: bytes) -> None:
    await refused(made, "POST", "/tickets/search", body, content_type="application/x-www-form-urlencoded")


# ---- services that do not do what they should ----


async def served_by(made: Bench, raw: bytes, *, then: Any = None) -> tuple[int, str]:
    async def answer(seen: Seen, writer: asyncio.StreamWriter) -> None:
        writer.write(raw)
        await writer.drain()
        if then is not None:
            await then(writer)

    made.upstream.answer = answer
    got = await made.ask("GET", "/tickets/tickets")
    assert made.used.ending is Ending.FAILED and made.used.status == got.status and made.used.reason
    assert len(got.body) < 1000 and CANARY.encode() not in got.body
    return got.status, got.detail


@pytest.mark.parametrize("status", [300, 301, 302, 303, 307, 308])
@pytest.mark.parametrize(
    "place", ["http://169.254.169.254/latest/meta-data", "/v1/admin", "//evil.example/", "file:///etc/passwd"]
)
async def test_no_redirect_is_followed_or_passed_on(made: Bench, status: int, place: str) -> None:
    raw = f"HTTP/1.1 {status} x\r\nLocation: {place}\r\nContent-Length: 0\r\n\r\n".encode()
    told, detail = await served_by(made, raw)
    assert told == 502 and "redirects are not followed" in detail and place not in detail
    assert len(made.upstream.seen) == 1


@pytest.mark.parametrize(
    "raw",
    [
        b"",
        b"garbage\r\n\r\n",
        b"HTTP/1.1 200 OK\r\nContent-Length: 100\r\n\r\nshort",
        b"HTTP/1.1 200 OK\r\nContent-Length: -1\r\n\r\n",
        b"HTTP/1.1 200 OK\r\nContent-Length: 3\r\nContent-Length: 4\r\n\r\nabcd",
        b"HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\nzz\r\n",
        b"HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\n5\r\nab",
        b"HTTP/1.1 200 OK\r\nContent-Encoding: gzip\r\nContent-Length: 3\r\n\r\nabc",
        b"HTTP/1.1 200 OK\r\nX: " + b"x" * 20_000 + b"\r\n\r\n",
        b"HTTP/1.1 200 OK\r\n" + b"X: y\r\n" * 500 + b"\r\n",
        b"HTTP/1.1 200 OK\r\n"
        + b"".join(b"X%d: %s\r\n" % (n, b"x" * 1000) for n in range(100))
        + b"Content-Length: 0\r\n\r\n",
        b"HTTP/1.1 200 OK\r\nX\x00y: z\r\nContent-Length: 0\r\n\r\n",
        b"HTTP/1.1 101 Switching Protocols\r\nUpgrade: x\r\nConnection: upgrade\r\n\r\n",
        b"HTTP/1.1 099 x\r\n\r\n",
    ],
)
async def test_an_answer_that_is_none_is_not_passed_on(made: Bench, raw: bytes) -> None:
    assert (await served_by(made, raw))[0] == 502


async def test_an_answer_that_is_too_large_is_broken_off() -> None:
    async def endless(writer: asyncio.StreamWriter) -> None:
        while True:
            writer.write(b"10000\r\n" + b"x" * 65536 + b"\r\n")
            await writer.drain()

    async with bench(bytes=1 << 20) as made:
        head = b"HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\n"
        status, detail = await served_by(made, head, then=endless)
        assert status == 502 and "1,048,576" in detail and (1 << 20) < made.used.bytes_down < (2 << 20)
        await asyncio.wait_for(made.upstream.gone.wait(), 10)
        made.forget()
        status, detail = await served_by(made, b"HTTP/1.1 200 OK\r\nContent-Length: 99999999999\r\n\r\n")
        assert status == 502 and "1,048,576" in detail


@pytest.mark.parametrize(
    ("raw", "drop"),
    [
        (b"", b""),
        (b"HTTP/1.1 200 OK\r\n", b"X: y\r\n"),
        (b"HTTP/1.1 200 OK\r\nContent-Length: 1000\r\n\r\n", b"x"),
        (b"HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\n", b"1\r\nx\r\n"),
    ],
)
async def test_a_slow_service_is_not_waited_for(raw: bytes, drop: bytes) -> None:
    async def dripping(writer: asyncio.StreamWriter) -> None:
        while not writer.is_closing():
            writer.write(drop)
            await writer.drain()
            await asyncio.sleep(0.05)

    async with bench(time=0.3) as made:
        status, detail = await served_by(made, raw, then=dripping)
        assert status == 504 and "0.3 seconds" in detail
        if drop:  # else it does not notice
            await asyncio.wait_for(made.upstream.gone.wait(), 10)


async def test_a_service_that_is_not_there(made: Bench) -> None:
    async with bench() as other:
        gone = other.upstream.port
    policy = made.policy.api.services[0]
    object.__setattr__(policy, "url", f"http://127.0.0.1:{gone}")
    got = await made.ask("GET", "/tickets/tickets")
    assert got.status == 502 and "cannot be reached" in got.detail and str(gone) not in got.detail


async def test_a_service_must_show_a_certificate_that_is_trusted(tmp_path: Path) -> None:
    key = ec.generate_private_key(ec.SECP256R1())
    name, now = x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, "localhost")]), datetime.now(UTC)
    made = x509.CertificateBuilder(name, name, key.public_key(), 1, now - timedelta(days=1), now + timedelta(days=1))
    names = x509.SubjectAlternativeName([x509.DNSName("localhost")])
    basic = x509.BasicConstraints(ca=True, path_length=None)
    certificate = made.add_extension(names, False).add_extension(basic, True).sign(key, hashes.SHA256())
    authority, secret = tmp_path / "authority.pem", tmp_path / "key.pem"
    authority.write_bytes(certificate.public_bytes(Encoding.PEM))
    secret.write_bytes(key.private_bytes(Encoding.PEM, PrivateFormat.PKCS8, NoEncryption()))
    ours = ssl.create_default_context(ssl.Purpose.CLIENT_AUTH)
    ours.load_cert_chain(authority, secret)
    asked: list[bytes] = []

    async def answer(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        asked.append(await reader.readuntil(b"\r\n\r\n"))
        writer.write(b"HTTP/1.1 204 x\r\n\r\n")
        writer.close()

    server = await asyncio.start_server(answer, "127.0.0.1", 0, ssl=ours)
    port = server.sockets[0].getsockname()[1]
    for environment, host, reason in (
        ({}, "localhost", "certificate"),
        ({"SSL_CERT_FILE": str(authority)}, "127.0.0.1", "certificate"),
        ({"SSL_CERT_FILE": str(authority)}, "localhost", ""),
    ):
        client = upstream.Client(tls_context(environment))
        try:
            reply = await client.ask("GET", f"https://{host}:{port}/", [], None, None, 1000)
            assert not reason and reply.status == 204
        except upstream.Failed as failed:
            assert reason and reason in failed.reason
        finally:
            await client.close()
    assert len(asked) == 1
    server.close()


async def test_a_client_that_leaves_ends_the_request(made: Bench) -> None:
    waiting = asyncio.Event()

    async def answer(seen: Seen, writer: asyncio.StreamWriter) -> Reply:
        waiting.set()
        await asyncio.sleep(30)
        raise AssertionError

    made.upstream.answer = answer
    _, writer = await asyncio.open_connection(*made.place.split(":"))
    writer.write(f"GET /tickets/tickets HTTP/1.1\r\nHost: {HOST}\r\n\r\n".encode())
    await asyncio.wait_for(waiting.wait(), 10)
    writer.close()
    async with asyncio.timeout(10):
        while not made.uses.found:
            await asyncio.sleep(0.005)
    assert made.used.ending is Ending.ABANDONED and made.used.bytes_up
    # A slot is free again.
    made.upstream.answer = None
    for _ in range(10):
        assert (await made.ask("GET", "/tickets/tickets")).status == 200


async def test_what_cannot_be_accounted_for_ends_the_sandbox(made: Bench) -> None:
    def fail(used: object) -> None:
        raise OSError("disk full")

    made.uses.used = fail  # type: ignore[method-assign]
    await made.ask("GET", "/tickets/tickets")
    assert made.ended == ["its records cannot be written (OSError)"]
    made.ended.clear()


async def test_the_environment_leads_nowhere(made: Bench, monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("http_proxy", "HTTP_PROXY", "all_proxy", "ALL_PROXY", "https_proxy"):
        monkeypatch.setenv(name, "http://127.0.0.1:1/")
    assert (await made.ask("GET", "/tickets/tickets")).status == 200


# ---- whatever is accepted arrives as it was checked ----


def declared() -> Declared:
    return Reader(
        load(str(DOCUMENT)), Service("tickets", "", "", operations(*ALL)), "api.services[0]", "api-key"
    ).read()


DECLARED = declared()
BY_ID = {each.id: each for each in DECLARED.operations}
TEXT = st.text(st.characters(codec="utf-8"), max_size=20)
PIECES = st.lists(
    st.sampled_from(
        [
            "a",
            "=",
            "&",
            "%",
            "+",
            ";",
            "%26",
            "%2C",
            ",",
            "|",
            "%00",
            "é",
            "%C3",
            "1",
            "state",
            "label",
            "ids",
            "q",
            "[]",
        ]
    ),
    max_size=12,
).map("".join)
QUERIES = st.lists(
    st.tuples(
        st.sampled_from(["state", "limit", "label", "ids", "words", "flag", "ratio", "q", "other"]),
        st.sampled_from(["open", "closed", "1", "2,3", "true", "1.5e3", "a|b", "a b", "&state=closed", "%", ""]) | TEXT,
    ),
    max_size=5,
).map(lambda found: "&".join(f"{quote(name)}={quote(value)}" for name, value in found))


def asked_for(query: str, fields: tuple[tuple[bytes, bytes], ...] = ()) -> Asked:
    request = Request("GET", "/tickets/tickets", query, fields, b"", Origin("box", "box"))
    return asking.read(BY_ID["listTickets"], request, {})


@given(QUERIES | PIECES | TEXT)
@settings(max_examples=400)
async def test_a_query_means_at_the_far_end_what_was_checked(query: str) -> None:
    operation = BY_ID["listTickets"]
    try:
        asked = asked_for(query)
        out = await outgoing(operation, asked)
    except Problem:
        return
    path, _, sent = out.target.partition("?")
    assert path == "/tickets" and out.target.isascii() and out.target.isprintable() and "#" not in out.target
    found: dict[str, list[str]] = {}
    for name, value in parse_qsl(sent, keep_blank_values=True, strict_parsing=bool(sent), errors="strict"):
        found.setdefault(name, []).append(value)
    for argument in operation.arguments:
        given = asked.values.get((argument.place, argument.name))
        texts = found.pop(argument.name, None)
        if given is None or given == []:
            assert texts is None
        elif isinstance(given, list):
            assert texts is not None
            delimiter = argument.join.value
            elements = texts if argument.join.name == "REPEATED" else texts[0].split(delimiter)
            assert elements == [each if isinstance(each, str) else json.dumps(each) for each in given]
        else:
            assert texts == [given if isinstance(given, str) else json.dumps(given)]
        assert given is None or argument.schema.problem(given) is None
    assert found == {}


@given(
    st.text(st.characters(codec="utf-8"), max_size=12) | st.text("./%2eEfF5cC;mineMINE \\", max_size=12), st.booleans()
)
@settings(max_examples=600)
async def test_a_path_means_at_the_far_end_what_was_checked(text: str, is_encoded: bool) -> None:
    raw = f"/tickets/{quote(text, safe='') if is_encoded else quote(text, safe='%/;.')}"
    try:
        means = DECLARED.paths.find(read_path(raw))
    except PathFault:
        return
    if means is None or means[0].text != "/tickets/{id}":
        return
    try:
        out = await outgoing(BY_ID["getTicket"], Asked({(Place.PATH, "id"): means[1]["id"]}))
    except Problem:
        return
    first, tickets, last = out.target.split("/")
    assert (first, tickets) == ("", "tickets") and unquote(last, errors="strict") == means[1]["id"]
    if is_encoded:
        assert means[1]["id"] == text
    plain = unquote(last).lower().strip(" .").partition(";")[0]
    assert plain not in ("mine", "", "..") and not set(unquote(last)) & set("/\\\x00\r\n")


VALUES = st.recursive(
    st.none() | st.booleans() | st.integers(-(2**60), 2**60) | st.floats(allow_nan=False, allow_infinity=False) | TEXT,
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(TEXT, inner, max_size=3),
)


@given(
    st.fixed_dictionaries(
        {"title": TEXT}, optional={"priority": VALUES, "labels": VALUES, "extra": VALUES, "owner": VALUES, "": VALUES}
    )
    | VALUES,
    st.sampled_from(["utf-8", "ascii"]),
)
async def test_a_body_means_at_the_far_end_what_was_checked(value: Any, how: str) -> None:
    body = json.dumps(value, ensure_ascii=how == "ascii").encode()
    request = Request("POST", "/", "", ((b"content-type", b"application/json"),), body, Origin("box", "box"))
    try:
        asked = asking.read(BY_ID["createTicket"], request, {})
        out = await outgoing(BY_ID["createTicket"], asked)
    except Problem:
        return
    assert out.body is not None and isinstance(value, dict) and value["title"]
    assert json.dumps(json.loads(out.body)) == json.dumps(value) == json.dumps(asked.body)


@given(st.dictionaries(TEXT, TEXT | st.lists(TEXT, min_size=2, max_size=3), max_size=4))
async def test_a_form_means_at_the_far_end_what_was_checked(value: dict[str, Any]) -> None:
    body = "&".join(f"{quote(n)}={quote(v)}" for n, vs in value.items() for v in (vs if isinstance(vs, list) else [vs]))
    request = Request("POST", "/", "", ((b"content-type", FORM.encode()),), body.encode(), Origin("box", "box"))
    try:
        out = await outgoing(BY_ID["search"], asking.read(BY_ID["search"], request, {}))
    except Problem:
        return
    if out.body:
        assert parse_qsl(out.body.decode("ascii"), keep_blank_values=True, strict_parsing=True) == parse_qsl(
            body, keep_blank_values=True
        )


@given(
    st.lists(
        st.sampled_from(["/a/{x}", "/a/b", "/{x}/b", "/a/{x}.txt", "/{x}/{y}", "/A/B", "/a/{z}"]),
        max_size=5,
        unique=True,
    ),
    st.sampled_from(["/a/b", "/a/B", "/a/c", "/c/b", "/a/c.txt", "/A/b", "/a/b.txt", "/a/b%20"]),
)
def test_a_path_means_one_operation_or_none(texts: list[str], path: str) -> None:
    segments = read_path(path)
    try:
        found = Paths(map(template, texts)).find(segments)
    except PathFault:
        return
    matching = [each for each in map(template, texts) if each.arguments(segments) is not None]
    assert (found is None) is (not matching)
    if found is not None:
        chosen = found[0]
        for other in matching:
            assert chosen.text == other.text or (chosen.is_at_least(other) and not other.is_at_least(chosen))
