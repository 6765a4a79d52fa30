"""A careless HTTP/1.1 server: it takes what a strict one would refuse, so that what was smuggled shows in the records.

Beside the site's paths: ``/headers-bomb`` ``/long-header`` ``/websocket`` ``/upgrade?to=`` ``/unasked-101``
``/early-close`` ``/garbage`` ``/two-responses`` ``/both-lengths`` ``/no-length`` ``/trailers`` ``/early-hints``
``/forever``; raw answers, after which the connection is closed.
"""

from __future__ import annotations

import base64
import hashlib
from collections.abc import AsyncIterator
from http import HTTPStatus

from tests.internet.records import Request
from tests.internet.streams import Ended, Handler, Stream
from tests.internet.web import Asked, Body, Response, Site

MAX_REQUESTS = 10_000
_WEBSOCKET = b"258EAFA5-E914-47DA-95CA-C5AB0DC85B11"

RAW = {
    "/garbage": b"\x00\x01\x02 this is not HTTP\r\n\r\n",
    "/two-responses": b"HTTP/1.1 200 OK\r\ncontent-length: 3\r\n\r\none"
    b"HTTP/1.1 200 OK\r\ncontent-length: 8\r\n\r\nsmuggled",
    "/both-lengths": b"HTTP/1.1 200 OK\r\ncontent-length: 3\r\ntransfer-encoding: chunked\r\n\r\n3\r\nabc\r\n0\r\n\r\n",
    "/two-lengths": b"HTTP/1.1 200 OK\r\ncontent-length: 3\r\ncontent-length: 5\r\n\r\nabcde",
    "/bare-newlines": b"HTTP/1.1 200 OK\ncontent-length: 3\n\nabc",
    "/folded": b"HTTP/1.1 200 OK\r\nx-a: b\r\n c\r\ncontent-length: 0\r\n\r\n",
    "/no-length": b"HTTP/1.1 200 OK\r\ncontent-type: text/plain\r\n\r\nuntil the end\n",
    "/early-close": b"HTTP/1.1 200 OK\r\ncontent-length: 1000\r\n\r\nshort",
    "/unasked-101": b"HTTP/1.1 101 Switching Protocols\r\nconnection: upgrade\r\nupgrade: raw\r\n\r\nraw bytes\n",
    "/early-hints": b"HTTP/1.1 103 Early Hints\r\nlink: </a>\r\n\r\nHTTP/1.1 200 OK\r\ncontent-length: 2\r\n\r\nok",
    "/trailers": b"HTTP/1.1 200 OK\r\ntransfer-encoding: chunked\r\ntrailer: x-last\r\n\r\n"
    b"3\r\nabc\r\n0\r\nx-last: 1\r\n\r\n",
    "/long-header": b"HTTP/1.1 200 OK\r\nx-long: " + b"a" * (1 << 20) + b"\r\ncontent-length: 0\r\n\r\n",
}


async def _headers_bomb(stream: Stream) -> None:
    await stream.write(b"HTTP/1.1 200 OK\r\n")
    for start in range(0, 400_000, 1000):
        await stream.write(b"".join(b"x-%d: bomb\r\n" % number for number in range(start, start + 1000)))


async def _forever(stream: Stream) -> None:
    await stream.write(b"HTTP/1.1 200 OK\r\ntransfer-encoding: chunked\r\n\r\n")
    block = b"10000\r\n" + b"x" * 65536 + b"\r\n"
    for _ in range(1 << 16):
        await stream.write(block)


def head_of(data: bytes) -> Request | None:
    """A request's head as a careless server reads it: any line ending, any white space."""
    lines = data.replace(b"\r\n", b"\n").decode("latin-1").strip("\n").split("\n")
    words = lines[0].split()
    if len(words) < 2:
        return None
    headers = tuple((key.strip(), value.strip()) for key, _, value in (line.partition(":") for line in lines[1:]))
    return Request(words[0], words[1], headers, words[2] if len(words) > 2 else "HTTP/0.9")


class _Body:
    """The body of one request, by Transfer-Encoding before Content-Length."""

    def __init__(self, stream: Stream, request: Request) -> None:
        self._stream = stream
        self._chunked = "chunked" in (request.header("transfer-encoding") or "").lower()
        length = request.header("content-length") or "0"
        self._left = int(length) if length.isdigit() and len(length) < 16 else 0
        self._expected = (request.header("expect") or "").lower() == "100-continue"
        self.done = not self._chunked and not self._left

    async def pieces(self) -> AsyncIterator[bytes]:
        """What is left of it."""
        if self.done:
            return
        if self._expected:
            self._expected = False
            await self._stream.write(b"HTTP/1.1 100 Continue\r\n\r\n")
        while not self.done:
            if self._chunked and not self._left:
                size = (await self._stream.until(b"\n", 4096)).split(b";")[0].strip()
                try:
                    self._left = int(size, 16)
                except ValueError as error:
                    raise Ended from error
                if not self._left:
                    while (await self._stream.until(b"\n", 65536)).strip():
                        pass
                    self.done = True
                    return
            data = await self._stream.read(min(self._left, 65536))
            if not data:
                raise Ended
            self._left -= len(data)
            if not self._chunked:
                self.done = not self._left
            elif not self._left:
                await self._stream.until(b"\n", 4096)
            yield data


async def _send(stream: Stream, request: Request, response: Response) -> None:
    phrase = HTTPStatus(response.status).phrase if response.status in HTTPStatus._value2member_map_ else "Unknown"
    body: Body = response.body
    length = len(body) if isinstance(body, bytes) else response.length
    lines = [f"HTTP/1.1 {response.status} {phrase}", *(f"{key}: {value}" for key, value in response.headers)]
    lines.append("transfer-encoding: chunked" if length is None else f"content-length: {length}")
    await stream.write("\r\n".join([*lines, "", ""]).encode("latin-1"))
    if request.method == "HEAD":
        return
    if isinstance(body, bytes):
        await stream.write(body)
        return
    async for piece in body:
        await stream.write(b"%x\r\n%b\r\n" % (len(piece), piece) if length is None else piece)
    if length is None:
        await stream.write(b"0\r\n\r\n")


async def _websocket(stream: Stream, request: Request) -> None:
    """Echoes (RFC 6455 §5), up to 1 MiB a frame."""
    accept = base64.b64encode(
        hashlib.sha1((request.header("sec-websocket-key") or "").encode() + _WEBSOCKET, usedforsecurity=False).digest()
    )
    await stream.write(
        b"HTTP/1.1 101 Switching Protocols\r\nupgrade: websocket\r\nconnection: Upgrade\r\n"
        b"sec-websocket-accept: " + accept + b"\r\n\r\n"
    )
    while True:
        first, second = await stream.exactly(2)
        length = second & 127
        if length > 125:
            length = int.from_bytes(await stream.exactly(2 if length == 126 else 8), "big")
        if length > 1 << 20:
            return
        mask = await stream.exactly(4) if second & 128 else bytes(4)
        masked = await stream.exactly(length)
        data = bytes(byte ^ mask[at & 3] for at, byte in enumerate(masked))
        stream.note(f"frame {first & 15} {data[:64]!r}")
        opcode = 10 if first & 15 == 9 else first & 15
        size = bytes((length,)) if length < 126 else b"\x7e" + length.to_bytes(2, "big")
        size = size if length < 65536 else b"\x7f" + length.to_bytes(8, "big")
        await stream.write(bytes((first & 0xF0 | opcode,)) + size + data)
        if opcode == 8:
            return


async def _upgraded(stream: Stream, protocol: str) -> None:
    """101 to whatever was asked for, then an echo of raw bytes."""
    await stream.write(
        f"HTTP/1.1 101 Switching Protocols\r\nconnection: upgrade\r\nupgrade: {protocol}\r\n\r\n".encode()
    )
    while data := await stream.read():
        await stream.write(data)


def server(site: Site) -> Handler:
    """The site over HTTP/1.x."""

    async def handle(stream: Stream) -> None:
        for _ in range(MAX_REQUESTS):
            head = b""
            while not head.strip():
                head = await stream.until(b"\n")
            while not head.endswith((b"\r\n\r\n", b"\n\n")):
                head += await stream.until(b"\n")
                if len(head) > 1 << 20:
                    return
            request = head_of(head)
            if request is None:
                await stream.write(b"HTTP/1.1 400 Bad Request\r\ncontent-length: 0\r\n\r\n")
                return
            told = [request.method[:64], request.target[:4096], request.headers[:200], request.version[:64]]
            stream.recorder.add(stream.entry, "requests", told)
            body = _Body(stream, request)
            asked = Asked(request, body.pieces)
            upgrade = (request.header("upgrade") or "").lower()
            if asked.path in RAW:
                await stream.write(RAW[asked.path])
                return
            if asked.path == "/headers-bomb":
                return await _headers_bomb(stream)
            if asked.path == "/forever":
                return await _forever(stream)
            if asked.path == "/websocket" and upgrade == "websocket":
                return await _websocket(stream, request)
            if asked.path == "/upgrade" and upgrade:
                return await _upgraded(stream, upgrade[:64])
            await _send(stream, request, await site(asked))
            async for _ in body.pieces():
                pass
            connection = (request.header("connection") or "").lower()
            if "close" in connection or (request.version == "HTTP/1.0" and "keep-alive" not in connection):
                return

    return handle
