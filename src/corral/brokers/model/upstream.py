"""Upstreams over HTTP: one request out, one answer back, piece by piece as it comes.

With aiohttp: of what keeps to HTTP well, it costs the least for each piece of a stream. Nothing of the controlling
process's environment is heeded (proxies, .netrc), no redirect is followed, no cookie kept, and no compression asked
for, since what is compressed is not read for what it holds. Certificates are checked against the system's authorities.
"""

from __future__ import annotations

import asyncio
import io
import re
import ssl
from typing import TYPE_CHECKING, Protocol

from corral.policy.model import Patience

if TYPE_CHECKING:
    import aiohttp

MAX_FIELD = 16 * 1024
"""Bytes of one field of an answer's head, and of its first line."""
MAX_HEAD = 64 * 1024
MAX_FIELDS = 128
MAX_CONNECTIONS = 1024
"""Of one sandbox to all upstreams."""
KEEP_ALIVE = 30.0
"""Seconds: what is idle for longer may be closed by the upstream just as it is used."""
_PIECE = 64 * 1024
_LARGE = 256 * 1024
"""Bytes of a body that are not written at once."""
_NOT_PASSED_ON = frozenset(
    b"connection keep-alive proxy-connection proxy-authenticate te trailer transfer-encoding upgrade content-length "
    b"set-cookie set-cookie2 alt-svc strict-transport-security clear-site-data".split()
)
"""Headers that are for the connection (RFC 9110, section 7.6.1), frame the message, or would have a client remember
something about a name that is not the upstream's."""

_NAME = re.compile(rb"[-!#$%&'*+.^_`|~0-9A-Za-z]+")
_VALUE = re.compile(rb"(?:[^\x00\s]+(?:[ \t]+[^\x00\s]+)*)?")

Fields = tuple[tuple[bytes, bytes], ...]


class Failed(Exception):
    """An upstream has given no answer, or not all of it. The text is ours."""

    def __init__(self, reason: str, *, was_sent: bool) -> None:
        super().__init__(reason)
        self.reason, self.was_sent = reason, was_sent
        """The latter: the upstream may have begun to work."""


class Reply(Protocol):
    """An answer that has begun."""

    status: int
    headers: Fields
    """Those that are passed on; names in lower case."""
    length: int | None
    """Of the body, where it was told."""

    async def read(self) -> bytes:
        """What has come, at least something; nothing at the end. Raises Failed."""

    def close(self) -> None:
        """No more is read. What was not read to its end is broken off."""


class HttpReply:
    """Of an upstream."""

    def __init__(self, response: aiohttp.ClientResponse) -> None:
        self._response, self._content = response, response.content
        self.status = response.status
        named = b",".join(value for name, value in response.raw_headers if name.lower() == b"connection").lower()
        hops = _NOT_PASSED_ON | {each.strip() for each in named.split(b",")}
        self.headers: Fields = tuple(
            (lower, value)
            for name, value in response.raw_headers
            if (lower := name.lower()) not in hops and _NAME.fullmatch(name) and _VALUE.fullmatch(value)
        )
        self.length = None if response.headers.get("Transfer-Encoding") else response.content_length
        protocol = None if response.connection is None else response.connection.protocol
        self._lost = None if protocol is None else protocol.closed
        if self._lost is not None:
            self._lost.remove_done_callback(_seen)  # of the answer before on this connection
            self._lost.add_done_callback(_seen)
            self._lost.add_done_callback(self._end)
        elif protocol is not None:
            self._end()
        self._check(response)

    def _check(self, response: aiohttp.ClientResponse) -> None:
        problem = ""
        if sum(len(name) + len(value) for name, value in response.raw_headers) > MAX_HEAD:
            problem = "its answer has too large a head"
        elif any(name == b"content-encoding" and value.lower() != b"identity" for name, value in self.headers):
            problem = "its answer is compressed, which was not asked for"
        elif not 200 <= self.status < 600 or self.status in (204, 205) or 300 <= self.status < 400:
            problem = f"it answered with status {self.status}, which is not followed"
        if problem:
            self.close()
            raise Failed(problem, was_sent=True)

    async def read(self) -> bytes:
        import aiohttp

        try:
            return await self._content.readany()
        except (aiohttp.ClientError, OSError, ValueError):
            raise Failed("it broke off its answer", was_sent=True) from None

    def _end(self, _lost: asyncio.Future[None] | None = None) -> None:
        """The connection is gone. Where chunks were none, aiohttp's parser in C (3.14) has told the body nothing."""
        if not self._content.is_eof() and self._content.exception() is None:
            self._content.set_exception(ConnectionResetError("its connection is gone"))

    def close(self) -> None:
        if self._lost is not None:
            self._lost.remove_done_callback(self._end)
        self._response.close()  # a connection whose answer was read to its end is no longer its own


def _seen(lost: asyncio.Future[None]) -> None:
    """Why a connection is gone is known elsewhere; asyncio would complain that nobody has looked."""
    if not lost.cancelled():
        lost.exception()


class Client:
    """The connections of one sandbox to its upstreams. For one loop."""

    def __init__(self, patience: Patience, tls: ssl.SSLContext) -> None:
        import aiohttp  # slow to import, and only where a model is asked

        self._aiohttp = aiohttp
        self._session = aiohttp.ClientSession(
            connector=aiohttp.TCPConnector(limit=MAX_CONNECTIONS, ssl=tls, keepalive_timeout=KEEP_ALIVE),
            cookie_jar=aiohttp.DummyCookieJar(),
            auto_decompress=False,
            trust_env=False,
            timeout=aiohttp.ClientTimeout(total=None, connect=patience.connect),
            skip_auto_headers=("User-Agent", "Accept", "Accept-Encoding", "Content-Type"),
            read_bufsize=_PIECE,
            max_line_size=MAX_FIELD,
            max_field_size=MAX_FIELD,
            max_headers=MAX_FIELDS,
        )

    async def ask(self, method: str, url: str, headers: list[tuple[str, str]], body: bytes | None) -> HttpReply:
        """Raises Failed."""
        import yarl

        aiohttp = self._aiohttp
        data = io.BytesIO(body) if body is not None and len(body) > _LARGE else body
        try:
            response = await self._session.request(
                method, yarl.URL(url, encoded=True), headers=headers, data=data, allow_redirects=False
            )
        except aiohttp.ConnectionTimeoutError:
            raise Failed("no connection to it came about in time", was_sent=False) from None
        except aiohttp.ClientConnectorCertificateError:
            raise Failed("its certificate is not to be trusted", was_sent=False) from None
        except aiohttp.ClientSSLError:
            raise Failed("TLS with it failed", was_sent=False) from None
        except aiohttp.ClientConnectorError:
            raise Failed("it cannot be reached", was_sent=False) from None
        except aiohttp.ClientResponseError:
            raise Failed("its answer is no proper HTTP", was_sent=True) from None
        except (aiohttp.ClientError, OSError, ValueError):
            raise Failed("it closed the connection before it answered", was_sent=True) from None
        return HttpReply(response)

    async def close(self) -> None:
        await self._session.close()


class Impatience:
    """Ends what is waited for too long, without a timer for each piece: one is set again only when it goes off."""

    def __init__(self, bound: asyncio.Timeout, problem: str) -> None:
        """``problem`` is what it was if ``bound`` ends by itself."""
        self._bound, self.problem = bound, problem
        """Why it has ended."""
        self._loop = asyncio.get_running_loop()
        self._due: float | None = None
        self._for = ""
        self._timer: asyncio.TimerHandle | None = None

    def expect(self, seconds: float, problem: str) -> None:
        """Something must come within that time."""
        self._due, self._for = self._loop.time() + seconds, problem
        if self._timer is None or self._timer.when() > self._due:
            self.stop()
            self._timer = self._loop.call_at(self._due, self._look)

    def rest(self) -> None:
        """Nothing need come."""
        self._due = None

    def stop(self) -> None:
        if self._timer is not None:
            self._timer.cancel()
            self._timer = None

    def _look(self) -> None:
        self._timer = None
        if self._due is None:
            return
        if self._loop.time() >= self._due:
            self.problem = self._for
            self._bound.reschedule(self._loop.time())
        else:
            self._timer = self._loop.call_at(self._due, self._look)
