"""What the web servers answer, whatever version of HTTP carries it.

Paths: ``/`` ``/echo`` ``/big?bytes=`` ``/slow?bytes=&seconds=`` ``/chunked?chunks=`` ``/upload`` ``/secret-echo``
``/status?code=`` ``/redirect?to=`` ``/gzip-bomb?bytes=`` ``/hang`` ``/repos/...`` here; those that need raw bytes
(``/headers-bomb`` ``/websocket`` and so on) are in http1.py.
"""

from __future__ import annotations

import asyncio
import base64
import functools
import hashlib
import json
import urllib.parse
import zlib
from collections.abc import AsyncIterator, Awaitable, Callable
from dataclasses import dataclass, field

from tests.internet.places import TOKEN
from tests.internet.records import Request

MAX_BODY = 64 << 20
BIGGEST = 4 << 30
SLOWEST = 120.0
GZIP_BOMB = 256 << 20
_CHUNK = bytes(65536).replace(b"\0", b"x")

Body = bytes | AsyncIterator[bytes]


@dataclass(frozen=True, slots=True)
class Asked:
    """A request with its body, read as it comes."""

    request: Request
    body: Callable[[], AsyncIterator[bytes]]

    @property
    def path(self) -> str:
        """Decoded, without the query."""
        return urllib.parse.unquote(urllib.parse.urlsplit(self.request.target).path)

    def option(self, name: str, default: int) -> int:
        """A number of the query."""
        found = urllib.parse.parse_qs(urllib.parse.urlsplit(self.request.target).query).get(name)
        return int(found[0]) if found and found[0].isdigit() and len(found[0]) < 12 else default

    def text(self, name: str) -> str:
        """A word of the query."""
        return urllib.parse.parse_qs(urllib.parse.urlsplit(self.request.target).query).get(name, [""])[0]

    async def whole(self) -> bytes:
        """The body, at most MAX_BODY bytes of it."""
        data = bytearray()
        async for piece in self.body():
            data += piece
            if len(data) > MAX_BODY:
                break
        return bytes(data)


@dataclass(frozen=True, slots=True)
class Response:
    """``length`` None: not known beforehand (chunked in HTTP/1.1)."""

    status: int = 200
    body: Body = b""
    headers: tuple[tuple[str, str], ...] = (("content-type", "text/plain"),)
    length: int | None = field(default=None)


Site = Callable[[Asked], Awaitable[Response]]


def described(value: object) -> Response:
    """As JSON."""
    return Response(body=json.dumps(value).encode() + b"\n", headers=(("content-type", "application/json"),))


async def _pieces(count: int, seconds: float = 0.0) -> AsyncIterator[bytes]:
    pieces = max(1, min(count, 50)) if seconds else -(-count // len(_CHUNK))
    size = -(-count // pieces) if pieces else 0
    while count > 0:
        yield _CHUNK[: min(size, count)] if size <= len(_CHUNK) else b"x" * min(size, count)
        count -= size
        if seconds:
            await asyncio.sleep(seconds / pieces)


async def _chunks(count: int) -> AsyncIterator[bytes]:
    for number in range(count):
        yield f"chunk {number}\n".encode()


@functools.lru_cache(maxsize=2)
def _bomb(count: int) -> bytes:
    packer = zlib.compressobj(9, zlib.DEFLATED, 31)
    block = bytes(1 << 20)
    return b"".join(packer.compress(block) for _ in range(count >> 20)) + packer.flush()


def _told_again(secret: str, headers: tuple[tuple[str, str], ...]) -> Response:
    """What the client sent as ``authorization`` in every spelling that a careless server might give back."""
    raw = secret.encode("latin-1")
    last = secret.partition(" ")[2] or secret
    with_password = base64.b64decode(last + "===", validate=False) if secret.lower().startswith("basic ") else b""
    words = [raw, last.encode("latin-1"), with_password, *with_password.split(b":", 1)[1:]]
    lines = []
    for word in filter(None, words):
        lines += [
            b"raw " + word,
            b"percent " + urllib.parse.quote_from_bytes(word, safe="").encode(),
            b"percent-all " + "".join(f"%{byte:02X}" for byte in word).encode(),
            b"json " + json.dumps(word.decode("latin-1")).encode(),
            b"hex " + word.hex().encode(),
            *(b"base64 " + base64.b64encode(b"abc"[:shift] + word) for shift in range(3)),
            b"urlsafe " + base64.urlsafe_b64encode(word),
        ]
    echoed = tuple(("x-echo-" + key.lower(), value) for key, value in headers)[:50]
    return Response(body=b"\n".join(lines) + b"\n", headers=(("content-type", "text/plain"), *echoed))


async def web(asked: Asked) -> Response:
    """The site of web.test and most others."""
    request = asked.request
    match asked.path:
        case "/":
            return Response(body=f"hello from {request.header('host')}\n".encode())
        case "/echo":
            body = await asked.whole()
            return described(
                {
                    "method": request.method,
                    "target": request.target,
                    "version": request.version,
                    "headers": request.headers,
                    "body": body[:65536].decode("latin-1"),
                }
            )
        case "/big":
            count = min(asked.option("bytes", 1 << 20), BIGGEST)
            return Response(body=_pieces(count), length=count)
        case "/slow":
            count = min(asked.option("bytes", 10), 1 << 20)
            return Response(body=_pieces(count, min(asked.option("seconds", 2), SLOWEST)), length=count)
        case "/chunked":
            return Response(body=_chunks(min(asked.option("chunks", 10), 100_000)))
        case "/upload":
            digest, count = hashlib.sha256(), 0
            async for piece in asked.body():
                digest.update(piece)
                count += len(piece)
            return described({"bytes": count, "sha256": digest.hexdigest()})
        case "/secret-echo":
            return _told_again(request.header("authorization") or request.header("x-api-key") or "", request.headers)
        case "/status":
            return Response(min(max(asked.option("code", 200), 200), 599), b"as asked\n")
        case "/redirect":
            return Response(302, b"", (("location", asked.text("to").replace("\r", "").replace("\n", "")),))
        case "/gzip-bomb":
            bomb = _bomb(min(asked.option("bytes", 64 << 20), GZIP_BOMB))
            return Response(body=bomb, headers=(("content-type", "text/plain"), ("content-encoding", "gzip")))
        case "/hang":
            await asyncio.sleep(SLOWEST)
            return Response()
        case _:
            return Response(404, b"no such thing\n")


async def api(asked: Asked) -> Response:
    """api.test: as web.test, and ``/repos/...`` and ``/private/...``, the latter for the holder of the token only."""
    request = asked.request
    if asked.path.startswith(("/repos/", "/private/")):
        given = request.header("authorization") or ""
        basic = base64.b64encode(f"x-access-token:{TOKEN}".encode()).decode()
        known = given in (f"Bearer {TOKEN}", f"Basic {basic}") or request.header("x-api-key") == TOKEN
        if asked.path.startswith("/private/") and not known:
            return Response(401, b"who are you?\n", (("www-authenticate", 'Basic realm="api.test"'),))
        body = await asked.whole()
        return described({"path": asked.path, "method": request.method, "bytes": len(body), "known": known})
    return await web(asked)


async def metadata(asked: Asked) -> Response:
    """What the metadata service of a cloud would give away."""
    if asked.path == "/latest/api/token" and asked.request.method == "PUT":
        return Response(body=b"AQAEAtest==")
    if asked.path.startswith("/latest/meta-data/iam/security-credentials/"):
        return described({"AccessKeyId": "ASIATEST", "SecretAccessKey": "metadata-secret", "Token": "metadata-token"})
    return Response(body=b"metadata-secret\n")
