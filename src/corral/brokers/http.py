"""HTTP/1.1 of the brokers: requests in, whole and within bounds, answers out, at once or in pieces.

One connection is read by one h11 parser; everything that h11 does not settle and a request needs is checked here: whom
it is for, how it is coded, how long it is. A request is handed on when all of it is there, one at a time. A client that
closes its side has gone: what it asked for is cancelled (a connection half closed is no way to wait for an answer).

RFC 9110 (semantics), RFC 9112 (messages).
"""

from __future__ import annotations

import asyncio
import json
import socket
import struct
from collections.abc import Awaitable, Callable, Sequence
from contextlib import suppress
from dataclasses import dataclass
from time import monotonic
from typing import cast

import h11

from corral.actions import Origin

HEAD_BYTES = 64 * 1024
"""Of one request's line and fields."""
HEAD_SECONDS = 30.0
"""For a client to say what it wants; a slow-loris gets no more."""
BODY_SECONDS = 120.0
"""For all of a body."""
IDLE_SECONDS = 600.0
"""Between two requests; clients keep their connections."""
AHEAD = 64 * 1024
"""Bytes that are read while another request is answered."""
LINGER = 2.0
"""Seconds for a client to read why it was refused."""
WRITE_SECONDS = 300.0
"""For a client to read some of what waits for it."""
ERRORS = 500
ERRORS_A_SECOND = 20.0
"""So many calls of a sandbox may come to nothing at once, and then so many in a second."""
MAX_DELAY = 10.0
"""Seconds that one of them waits."""
MAX_FIELDS = 100
CHUNKS = 1024
CHUNK_BYTES = 256
"""So many chunks a body may have whatever their size, and then one for so many bytes: each costs time of all."""
_READ_MOST, _READ_LEAST = 256 * 1024, 64 * 1024
"""Bytes of an answer that wait for the client before whoever makes it waits too, and when it goes on."""

Fields = Sequence[tuple[bytes, bytes]]


@dataclass(frozen=True, slots=True)
class Request:
    """One request, whole."""

    method: str
    path: str
    """As it was sent: not decoded, without the query."""
    query: str
    """As it was sent; empty where there is none."""
    headers: tuple[tuple[bytes, bytes], ...]
    """Names in lower case, in the order in which they came."""
    body: bytes
    origin: Origin
    """Who has made the connection, as it was then. A step may have begun since: see :class:`corral.monitor.steps`."""

    def header(self, name: bytes) -> bytes | None:
        """The first field of that name (in lower case)."""
        return next((value for each, value in self.headers if each == name), None)


class Gone(ConnectionError):
    """The client reads no more of the answer."""


class Room:
    """What one sandbox's clients may take together, over all its connections: bytes of bodies that wait, and errors.

    A call that is refused costs its client nothing and us a record, so whoever is refused all the time waits."""

    def __init__(self, total: int, *, clock: Callable[[], float] = monotonic) -> None:
        self._left = total
        self._clock = clock
        self._errors, self._at = 0.0, clock()

    def take(self, count: int) -> bool:
        """Whether so many more may wait; they are counted only then."""
        if count > self._left:
            return False
        self._left -= count
        return True

    def give(self, count: int) -> None:
        """So many are no longer there."""
        self._left += count

    def failed(self) -> None:
        """One more call came to nothing."""
        self._fade()
        self._errors += 1

    def delay(self) -> float:
        """Seconds until the next request is looked at."""
        self._fade()
        return min(MAX_DELAY, max(0.0, (self._errors - ERRORS) / ERRORS_A_SECOND))

    def _fade(self) -> None:
        now = self._clock()
        self._errors, self._at = max(0.0, self._errors - (now - self._at) * ERRORS_A_SECOND), now


class Refused(Exception):
    """A request that is not handed on."""

    def __init__(self, status: int, reason: str) -> None:
        super().__init__(reason)
        self.status, self.reason = status, reason


class Answering:
    """The answer to one request. Every method raises :class:`Gone` where the client is."""

    def __init__(self, connection: Connection, method: str) -> None:
        self._connection = connection
        self._is_head = method == "HEAD"
        self._is_chunked = False
        self.is_started = False
        """The head is sent: its status cannot be another any more."""
        self.is_finished = False
        self.status = 0
        """As it was sent."""

    async def answer(
        self, status: int, body: bytes, content_type: str = "application/json", headers: Fields = ()
    ) -> None:
        """All of it."""
        kind = (b"content-type", content_type.encode("ascii"))
        self.is_started, self.status, self.is_finished = True, status, True
        head = h11.Response(status_code=status, headers=[kind, *headers, (b"content-length", b"%d" % len(body))])
        data = () if self._is_head else (h11.Data(data=body),)
        self._connection.send(head, *data, h11.EndOfMessage())
        await self._connection.drain()

    async def json(self, status: int, value: object, headers: Fields = ()) -> None:
        """The same, of a JSON value."""
        await self.answer(status, json.dumps(value, separators=(",", ":")).encode(), headers=headers)

    async def start(self, status: int, headers: Fields, *, length: int | None = None) -> None:
        """The head of an answer that comes in pieces: of ``length`` bytes in all, or in chunks. ``headers`` are all but
        those that frame it."""
        framing = (b"transfer-encoding", b"chunked") if length is None else (b"content-length", b"%d" % length)
        self.is_started, self.status = True, status
        self._connection.send(h11.Response(status_code=status, headers=[*headers, framing]))
        self._is_chunked = length is None and self._connection.has_chunks
        await self._connection.drain()

    async def send(self, data: bytes) -> None:
        """One piece. Returns when there is room for more."""
        if self._is_chunked and data and not self._is_head:
            self._connection.write(b"%x\r\n%b\r\n" % (len(data), data))
        elif not self._is_head:
            self._connection.send(h11.Data(data=data))
        if not self._connection.has_room:
            await self._connection.drain()

    async def finish(self) -> None:
        """No more comes."""
        self.is_finished = True
        self._connection.send(h11.EndOfMessage())
        await self._connection.drain()


Handle = Callable[[Request, Answering], Awaitable[None]]


class Connection(asyncio.Protocol):
    """One client. For the thread of its loop."""

    def __init__(
        self, host: str, origin: Origin, handle: Handle, max_body: int, room: Room, over: Callable[[str], None]
    ) -> None:
        """``host`` is whom requests must be for. ``over`` is told once why the connection has ended."""
        self._host = host.encode("ascii")
        self._origin, self._handle, self._max_body, self._room, self._over = origin, handle, max_body, room, over
        self._h11 = h11.Connection(h11.SERVER, max_incomplete_event_size=HEAD_BYTES)
        self._loop = asyncio.get_running_loop()
        self._transport: asyncio.Transport | None = None
        self._head: h11.Request | None = None
        self._body = bytearray()
        self._taken = self._ahead = self._chunks = 0
        self._task: asyncio.Task[None] | None = None
        self._timer: asyncio.TimerHandle | None = None
        self._can_write = asyncio.Event()
        self._can_write.set()
        self._reason = ""
        self._linger = self._is_cancelled = False
        self.received = self.sent = 0
        """Bytes."""

    # ---- asyncio.Protocol ----

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        self._transport = transport = cast(asyncio.Transport, transport)
        transport.set_write_buffer_limits(high=_READ_MOST, low=_READ_LEAST)
        self._expect(HEAD_SECONDS, "nothing was asked in time")

    def data_received(self, data: bytes) -> None:
        self.received += len(data)
        if self._linger:
            return
        try:
            self._h11.receive_data(data)
        except h11.RemoteProtocolError as error:
            self._refuse(Refused(error.error_status_hint, "This is no proper HTTP/1.1 request."))
            return
        if self._task is None:
            self._read()
        elif self._transport is not None:
            self._ahead += len(data)
            if self._ahead > AHEAD:
                self._transport.pause_reading()

    def eof_received(self) -> bool:
        self._reason = self._reason or "closed by its client"
        self.close(self._reason)
        return False

    def pause_writing(self) -> None:
        self._can_write.clear()

    def resume_writing(self) -> None:
        self._can_write.set()

    def connection_lost(self, error: Exception | None) -> None:
        self._expect(None, "")
        self._transport = None
        self._can_write.set()
        self._give_back()
        self._cancel()
        self._over(self._reason or ("reset by its client" if error else "closed"))

    # ---- requests ----

    def _expect(self, seconds: float | None, problem: str) -> None:
        """What comes next must come within that time."""
        if self._timer is not None:
            self._timer.cancel()
        self._timer = None if seconds is None else self._loop.call_later(seconds, self.close, problem)

    def _read(self) -> None:
        """Takes what has come apart, until a request is whole or more is needed."""
        try:
            while self._task is None and self._transport is not None and not self._linger:
                event = self._h11.next_event()
                if event is h11.NEED_DATA:
                    if self._h11.they_are_waiting_for_100_continue:
                        self.send(h11.InformationalResponse(status_code=100, headers=[]))
                    return
                if event is h11.PAUSED or isinstance(event, h11.ConnectionClosed):
                    self.close("closed")
                    return
                self._event(event)
        except h11.RemoteProtocolError as error:
            self._refuse(Refused(error.error_status_hint, "This is no proper HTTP/1.1 request."))
        except Refused as refused:
            self._refuse(refused)
        except Gone:
            self.close("closed")

    def _event(self, event: object) -> None:
        if isinstance(event, h11.Request):
            self._head = event
            self._check(event)
            self._expect(BODY_SECONDS, "the body did not come in time")
        elif isinstance(event, h11.Data):
            self._chunks += event.chunk_start
            self._take(len(event.data))
            self._body += event.data
        elif isinstance(event, h11.EndOfMessage) and self._head is not None:
            self._expect(None, "")
            self._task = self._loop.create_task(self._serve(_request(self._head, bytes(self._body), self._origin)))
            self._body.clear()

    def _check(self, head: h11.Request) -> None:
        hosts = [value for name, value in head.headers if name == b"host"]
        if hosts not in ([self._host], [self._host + b":80"]):
            raise Refused(421, f"Requests here are for http://{self._host.decode()}.")
        if head.method == b"CONNECT" or not head.target.startswith(b"/"):
            raise Refused(400, "The target of a request is a path.")
        if len(head.headers) > MAX_FIELDS:
            raise Refused(431, f"A request has at most {MAX_FIELDS} fields.")
        if len(head.target) + sum(len(name) + len(value) for name, value in head.headers) > HEAD_BYTES:
            raise Refused(
                431, f"The head of a request has at most {HEAD_BYTES} bytes."
            )  # h11 bounds what is incomplete
        if {b"content-length", b"transfer-encoding"} <= {name for name, _ in head.headers}:
            raise Refused(400, "A request says in one way how long it is.")  # RFC 9112, section 6.1
        for name, value in head.headers:
            if name == b"content-encoding" and value.lower() != b"identity":
                raise Refused(415, "The body of a request is not compressed.")
            if name == b"content-length" and int(value) > self._max_body:
                raise Refused(413, f"The body of a request has at most {self._max_body} bytes.")

    def _take(self, count: int) -> None:
        if self._taken + count > self._max_body:
            raise Refused(413, f"The body of a request has at most {self._max_body} bytes.")
        if self._chunks > CHUNKS + (self._taken + count) // CHUNK_BYTES:
            raise Refused(400, "The chunks of the body are too small.")
        if not self._room.take(count):
            raise Refused(503, "The requests of this sandbox that wait are too large together.")
        self._taken += count

    def _give_back(self) -> None:
        self._room.give(self._taken)
        self._taken = 0

    async def _serve(self, request: Request) -> None:
        answer = Answering(self, request.method)
        try:
            if delay := self._room.delay():
                await asyncio.sleep(delay)
            await self._handle(request, answer)
        except Gone:
            self._reason = self._reason or "closed by its client"
        except Exception:
            if not answer.is_started and self._transport is not None:
                with suppress(Gone):
                    await answer.json(500, {"error": {"message": "The broker failed.", "type": "server_error"}})
        if not answer.is_finished:  # also where nothing was answered, which must not look like an answer
            self.close(self._reason or "the answer broke off", broken=True)
        self._task = None
        self._give_back()
        self._next()

    def _next(self) -> None:
        """There may be another request."""
        if self._transport is None or self._transport.is_closing():
            return
        if self._h11.our_state is not h11.DONE or self._h11.their_state is not h11.DONE:
            self.close("closed")
            return
        self._h11.start_next_cycle()
        self._head, self._ahead, self._chunks = None, 0, 0
        self._expect(IDLE_SECONDS, "nothing was asked for too long")
        self._transport.resume_reading()
        self._read()

    # ---- answers ----

    def send(self, *events: h11.Event) -> None:
        """In one piece. Raises Gone."""
        if self._transport is None or self._transport.is_closing():
            raise Gone
        data = b"".join([self._h11.send(event) or b"" for event in events])
        if data:
            self.write(data)

    def write(self, data: bytes) -> None:
        """Sends bytes that are framed already: a chunk of an answer in chunks, which h11 takes apart and puts together
        again for a fifth of what passing a token on costs. Raises Gone."""
        transport = self._transport
        if transport is None or transport.is_closing():
            raise Gone
        self.sent += len(data)
        transport.write(data)

    @property
    def has_chunks(self) -> bool:
        """Whether an answer of no known length goes to this client in chunks; HTTP/1.0 has none (RFC 9112, section
        7)."""
        return self._h11.their_http_version == b"1.1"

    @property
    def has_room(self) -> bool:
        """Whether what waits for the client is little, and the client is there."""
        return self._can_write.is_set() and self._transport is not None and not self._transport.is_closing()

    async def drain(self) -> None:
        """Returns when what waits for the client is little. Raises Gone."""
        if not self._can_write.is_set():
            try:
                async with asyncio.timeout(WRITE_SECONDS):
                    await self._can_write.wait()
            except TimeoutError:
                self.close("its answers are not read", broken=True)
        if self._transport is None or self._transport.is_closing():
            raise Gone

    def _refuse(self, refused: Refused) -> None:
        """Says why a request goes no further, and ends: where the next one begins is not certain."""
        self._reason, self._linger = refused.reason, True
        body = json.dumps({"error": {"message": refused.reason, "type": "invalid_request_error"}}).encode()
        head = [
            (b"content-type", b"application/json"),
            (b"content-length", b"%d" % len(body)),
            (b"connection", b"close"),
        ]
        try:
            if self._task is not None or self._h11.our_state not in (h11.IDLE, h11.SEND_RESPONSE):
                raise Gone  # an answer to an earlier request is on its way
            self.send(h11.Response(status_code=refused.status, headers=head), h11.Data(data=body), h11.EndOfMessage())
        except (Gone, h11.LocalProtocolError):
            self.close(refused.reason, broken=True)
            return
        # What is unread when a connection is closed turns the answer into a reset.
        if self._transport is not None and self._transport.can_write_eof():
            self._transport.write_eof()
        self._expect(LINGER, refused.reason)

    def close(self, reason: str, *, broken: bool = False) -> None:
        """Ends it; ``broken``: its client is to notice."""
        self._reason = self._reason or reason
        self._cancel()
        if self._transport is not None:
            if broken:
                _reset(self._transport)
            else:
                self._transport.close()

    def _cancel(self) -> None:
        """Once: whoever is cancelled may have to wait for something before it has accounted for itself."""
        if self._task is not None and not self._is_cancelled and self._task is not asyncio.current_task():
            self._is_cancelled = True
            self._task.cancel()

    @property
    def task(self) -> asyncio.Task[None] | None:
        """What answers the request that is under way."""
        return self._task


def _reset(transport: asyncio.Transport) -> None:
    """Ends it at once, with an error at the other end."""
    sock = transport.get_extra_info("socket")
    with suppress(OSError):
        sock.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("=ii", 1, 0))
    transport.abort()


def _request(head: h11.Request, body: bytes, origin: Origin) -> Request:
    path, _, query = head.target.decode("latin-1").partition("?")
    headers = tuple((bytes(name), bytes(value)) for name, value in head.headers)
    return Request(head.method.decode("ascii"), path, query, headers, body, origin)


async def serve(sock: socket.socket, make: Callable[[], Connection]) -> Connection:
    """Serves an accepted connection, which is taken over."""
    loop = asyncio.get_running_loop()
    try:
        if sock.family in (socket.AF_INET, socket.AF_INET6):
            # asyncio does so only where the socket names its protocol; pieces of an answer would wait 40 ms for an ACK.
            sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        _, connection = await loop.connect_accepted_socket(make, sock)
    except BaseException:
        sock.close()
        raise
    return connection
