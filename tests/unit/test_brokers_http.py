"""What brokers take for a request, and how they end."""

from __future__ import annotations

import asyncio
import json
import socket
from collections.abc import AsyncIterator, Awaitable, Callable
from dataclasses import dataclass, field

import h11
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from corral.actions import Origin
from corral.brokers import http
from corral.brokers.http import Answering, Connection, Gone, Request, Room, serve

HOST = b"model.corral.internal"
ORIGIN = Origin("box", "box")
MAX_BODY = 100_000
Handle = Callable[[Request, Answering], Awaitable[None]]


@dataclass
class Client:
    """The other end of one connection."""

    sock: socket.socket
    connection: Connection
    room: Room
    over: list[str] = field(default_factory=list)

    async def send(self, data: bytes) -> None:
        await asyncio.get_running_loop().sock_sendall(self.sock, data)

    async def all(self) -> bytes:
        """What comes until the end."""
        got = b""
        async with asyncio.timeout(10):
            while data := await asyncio.get_running_loop().sock_recv(self.sock, 1 << 16):
                got += data
        return got

    async def some(self) -> bytes:
        async with asyncio.timeout(10):
            return await asyncio.get_running_loop().sock_recv(self.sock, 1 << 16)

    async def ended(self) -> str:
        async with asyncio.timeout(10):
            while not self.over:
                await asyncio.sleep(0.005)
        return self.over[0]


async def echo(request: Request, answer: Answering) -> None:
    await answer.json(200, [request.method, request.path, request.query, len(request.body)])


async def connect(handle: Handle = echo, *, room: int = 1 << 20) -> Client:
    ours, theirs = socket.socketpair()
    ours.setblocking(False)
    theirs.setblocking(False)
    waiting = Room(room)
    over: list[str] = []
    connection = await serve(theirs, lambda: Connection(HOST.decode(), ORIGIN, handle, MAX_BODY, waiting, over.append))
    return Client(ours, connection, waiting, over)


@pytest.fixture
async def client() -> AsyncIterator[Client]:
    made = await connect()
    yield made
    made.sock.close()


def post(body: bytes, path: bytes = b"/v1/x?a=b", extra: bytes = b"") -> bytes:
    return b"POST %s HTTP/1.1\r\nHost: %s\r\nContent-Length: %d\r\n%s\r\n%s" % (path, HOST, len(body), extra, body)


def parsed(data: bytes) -> tuple[int, bytes]:
    reader = h11.Connection(h11.CLIENT)
    reader.send(h11.Request(method="GET", target="/", headers=[("host", "x")]))
    reader.send(h11.EndOfMessage())
    reader.receive_data(data)
    reader.receive_data(b"")
    response = reader.next_event()
    assert isinstance(response, h11.Response)
    body = b""
    while isinstance(event := reader.next_event(), h11.Data):
        body += event.data
    assert isinstance(event, h11.EndOfMessage)
    return response.status_code, body


async def test_requests_follow_one_another_on_a_connection(client: Client) -> None:
    for body in (b"", b"abc", b"x" * 70_000):
        await client.send(post(body))
        got = b""
        while b"]" not in got:
            got += await client.some()
        status, value = parsed(got)
        assert status == 200 and json.loads(value) == ["POST", "/v1/x", "a=b", len(body)]
    assert not client.over


async def test_requests_that_come_at_once_are_answered_in_order(client: Client) -> None:
    await client.send(post(b"", b"/1") + post(b"zz", b"/2") + post(b"", b"/3", b"Connection: close\r\n"))
    got = await client.all()
    places = [got.index(b'"/%d"' % number) for number in (1, 2, 3)]
    assert places == sorted(places)
    assert await client.ended() == "closed"


async def test_a_head_has_no_body(client: Client) -> None:
    await client.send(b"HEAD / HTTP/1.1\r\nHost: %s\r\nConnection: close\r\n\r\n" % HOST)
    head, _, body = (await client.all()).partition(b"\r\n\r\n")
    assert head.startswith(b"HTTP/1.1 200") and body == b""


@pytest.mark.parametrize(
    ("sent", "status"),
    [
        (post(b"").replace(HOST, b"other.example"), 421),
        (post(b"").replace(b"Host: " + HOST, b"X: y"), 400),
        (post(b"").replace(b"Host:", b"Host: " + HOST + b"\r\nHost:"), 400),
        (post(b"", b"http://model.corral.internal/"), 400),
        (post(b"", extra=b"Transfer-Encoding: chunked\r\n"), 400),
        (post(b"", extra=b"Content-Encoding: gzip\r\n"), 415),
        (post(b"").replace(b"Content-Length: 0", b"Content-Length: 100001"), 413),
        (post(b"").replace(b"Content-Length: 0", b"Content-Length: 9" + b"9" * 15), 413),
        (post(b"").replace(b"Content-Length: 0", b"Content-Length: +5"), 400),
        (post(b"").replace(b"Content-Length: 0", b"Content-Length: 5\r\nContent-Length: 6"), 400),
        (post(b"").replace(b"Content-Length: 0", b"Transfer-Encoding: gzip, chunked"), 501),
        (post(b"", extra=b"".join(b"X-%d: y\r\n" % number for number in range(101))), 431),
        (post(b"", extra=b"X: " + b"y" * 70_000 + b"\r\n"), 431),
        (b"\x16\x03\x01\x02\x00\x01\x00\x01\xfc\x03\x03\r\n\r\n", 400),
        (b"GET / HTTP/1.1\nHost: x\n folded\n\n", 421),
    ],
)
async def test_what_is_no_proper_request_is_refused_with_a_reason(client: Client, sent: bytes, status: int) -> None:
    await client.send(sent)
    answered, body = parsed(await client.all())
    assert answered == status
    assert json.loads(body)["error"]["message"]
    client.sock.close()
    await client.ended()


async def test_a_body_without_a_length_is_bounded_too(client: Client) -> None:
    await client.send(b"POST / HTTP/1.1\r\nHost: %s\r\nTransfer-Encoding: chunked\r\n\r\n" % HOST)
    with pytest.raises((ConnectionError, TimeoutError)):
        async with asyncio.timeout(5):
            for _ in range(100):
                await client.send(b"2710\r\n" + b"x" * 10_000 + b"\r\n")
            raise ConnectionError  # its answer may be there before we are cut off
    assert parsed(await client.all())[0] == 413
    client.sock.close()
    await client.ended()
    assert client.room.take(1 << 20), "what it held was given back"


async def test_a_body_does_not_come_in_crumbs(client: Client) -> None:
    """Each chunk takes some microseconds of the thread of all sandboxes."""
    head = b"POST /x HTTP/1.1\r\nHost: model.corral.internal\r\nTransfer-Encoding: chunked\r\n\r\n"
    await client.send(head + b"1\r\na\r\n" * 1000 + b"0\r\n\r\n")
    assert b'"/x","",1000]' in await client.some()
    await client.send(head + b"1\r\na\r\n" * 1000 + b"0\r\n\r\n")
    assert b'"/x","",1000]' in await client.some()
    await client.send(head + b"1\r\na\r\n" * 1100)
    assert (await client.all()).startswith(b"HTTP/1.1 400 ")


async def test_all_that_waits_together_is_bounded() -> None:
    client = await connect(room=1000)
    await client.send(post(b"x" * 1001))
    assert parsed(await client.all())[0] == 503
    client.sock.close()
    await client.ended()


def test_who_is_refused_all_the_time_waits() -> None:
    """A refusal costs its client nothing, and us a record."""
    now = [0.0]
    room = Room(1, clock=lambda: now[0])
    for _ in range(http.ERRORS):
        assert room.delay() == 0.0
        room.failed()
    for _ in range(40):
        room.failed()
    assert room.delay() == 40 / http.ERRORS_A_SECOND
    now[0] += 1.5
    assert room.delay() == 0.5
    now[0] += 1000
    assert room.delay() == 0.0
    for _ in range(100_000):
        room.failed()
    assert room.delay() == http.MAX_DELAY


async def test_whoever_is_to_wait_is_not_looked_at(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(http, "ERRORS", 2)
    monkeypatch.setattr(http, "ERRORS_A_SECOND", 1e-6)
    monkeypatch.setattr(http, "MAX_DELAY", 3600.0)
    looked_at: list[Request] = []

    async def refuses(request: Request, answer: Answering) -> None:
        looked_at.append(request)
        made.room.failed()
        await answer.json(403, {})

    made = await connect(refuses)
    for _ in range(3):
        await made.send(post(b""))
        assert await made.some()
    await made.send(post(b""))
    with pytest.raises(TimeoutError):
        async with asyncio.timeout(0.2):
            await asyncio.get_running_loop().sock_recv(made.sock, 1)
    assert len(looked_at) == 3
    made.sock.close()
    await made.ended()


async def test_expectations_are_met(client: Client) -> None:
    await client.send(b"POST / HTTP/1.1\r\nHost: %s\r\nContent-Length: 3\r\nExpect: 100-continue\r\n\r\n" % HOST)
    assert (await client.some()).startswith(b"HTTP/1.1 100 ")
    await client.send(b"abc")
    assert (await client.some()).startswith(b"HTTP/1.1 200 ")


@pytest.mark.parametrize("begun", [False, True])
async def test_who_is_gone_is_noticed_and_cancelled(begun: bool) -> None:
    cancelled = asyncio.Event()

    async def endless(request: Request, answer: Answering) -> None:
        try:
            if begun:
                await answer.start(200, [])
                await answer.send(b"x")
            await asyncio.sleep(100)
        finally:
            await asyncio.sleep(0.01)  # accounts for itself
            cancelled.set()

    client = await connect(endless)
    await client.send(post(b"abc"))
    if begun:
        await client.some()
    client.sock.close()
    async with asyncio.timeout(5):
        await cancelled.wait()
    await client.ended()
    assert client.room.take(1 << 20)


async def test_who_does_not_read_holds_up_its_own_answer_only(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(http, "WRITE_SECONDS", 0.2)
    sent = 0
    gone = asyncio.Event()

    async def flood(request: Request, answer: Answering) -> None:
        nonlocal sent
        await answer.start(200, [])
        try:
            for _ in range(10_000):
                await answer.send(b"x" * 10_000)
                sent += 10_000
        except Gone:
            gone.set()
            raise

    client = await connect(flood)
    await client.send(post(b""))
    async with asyncio.timeout(10):
        await gone.wait()
    assert sent < 5_000_000
    await client.ended()
    client.sock.close()


async def test_an_answer_that_fails_does_not_look_whole() -> None:
    async def failing(request: Request, answer: Answering) -> None:
        if request.path == "/late":
            await answer.start(200, [])
            await answer.send(b"half")
        raise ValueError("a secret that nobody may see")

    client = await connect(failing)
    await client.send(post(b"", b"/early"))
    status, body = parsed(await client.some())
    assert status == 500 and b"secret" not in body
    await client.send(post(b"", b"/late"))
    try:
        got = await client.all()
    except ConnectionError:
        got = b""
    assert not got.endswith(b"0\r\n\r\n") and b"secret" not in got
    client.sock.close()


@settings(max_examples=60, deadline=None)
@given(st.binary(max_size=300), st.lists(st.integers(1, 50), max_size=6))
def test_garbage_never_raises_and_ends(data: bytes, cuts: list[int]) -> None:
    async def run() -> None:
        client = await connect()
        faults: list[object] = []
        asyncio.get_running_loop().set_exception_handler(lambda _, context: faults.append(context))
        rest = data
        try:
            for cut in cuts:
                await client.send(rest[:cut])
                rest = rest[cut:]
                await asyncio.sleep(0)
            await client.send(rest)
        except OSError:
            pass
        client.sock.close()
        await client.ended()
        assert not faults and client.room.take(1 << 20)

    asyncio.run(run())


@pytest.mark.parametrize("version", ["1.0", "1.1"])
async def test_an_answer_in_pieces_is_framed_as_its_client_knows_it(version: str) -> None:
    async def pieces(request: Request, answer: Answering) -> None:
        await answer.start(200, [])
        for piece in (b"one", b"", b"two"):
            await answer.send(piece)
        await answer.finish()

    client = await connect(pieces)
    await client.send(b"GET / HTTP/%s\r\nHost: %s\r\nConnection: close\r\n\r\n" % (version.encode(), HOST))
    got = await client.all()
    head, _, body = got.partition(b"\r\n\r\n")
    if version == "1.0":
        assert b"transfer-encoding" not in head.lower() and body == b"onetwo"
    else:
        assert body == b"3\r\none\r\n3\r\ntwo\r\n0\r\n\r\n", "an empty piece is not the end"
    client.sock.close()
