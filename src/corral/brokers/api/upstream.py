"""Requests to services: one out, one answer back, whole and within bounds.

With aiohttp. Nothing of the controlling process's environment is heeded (proxies, .netrc), no redirect is followed, no
cookie kept and no compression asked for, since what is compressed is not read for what it holds. Certificates are
checked against the system's authorities.
"""

from __future__ import annotations

import ssl
from dataclasses import dataclass
from typing import TYPE_CHECKING

from corral.credentials.secret import Secret

if TYPE_CHECKING:
    import aiohttp

MAX_CONNECTIONS = 256
"""Of one sandbox to all services."""
KEEP_ALIVE = 30.0
MAX_FIELD = 16 * 1024
MAX_FIELDS = 128
MAX_HEAD = 64 * 1024
_NOT_PASSED_ON = frozenset(
    b"connection keep-alive proxy-connection proxy-authenticate proxy-authentication-info te trailer transfer-encoding "
    b"upgrade content-length content-encoding content-type accept-ranges set-cookie set-cookie2 alt-svc "
    b"strict-transport-security clear-site-data www-authenticate authentication-info refresh".split()
)
"""Headers that are for the connection (RFC 9110, section 7.6.1), frame the message, would have a client remember
something about a name that is not the service's, or ask it for credentials."""


class Failed(Exception):
    """A service has given no answer, or none that is passed on. The text is ours. ``status`` is what it is answered
    with inside; ``bytes_down`` have come all the same."""

    def __init__(self, reason: str, status: int = 502, bytes_down: int = 0) -> None:
        super().__init__(reason)
        self.reason, self.status, self.bytes_down = reason, status, bytes_down


@dataclass(frozen=True, slots=True)
class Reply:
    """An answer, without echoes of the credential."""

    status: int
    content_type: str
    headers: tuple[tuple[bytes, bytes], ...]
    body: bytes


class Client:
    """The connections of one sandbox to its services. For one loop."""

    def __init__(self, tls: ssl.SSLContext) -> None:
        import aiohttp  # slow to import, and only where there is a service

        self._aiohttp = aiohttp
        self._session = aiohttp.ClientSession(
            connector=aiohttp.TCPConnector(limit=MAX_CONNECTIONS, ssl=tls, keepalive_timeout=KEEP_ALIVE),
            cookie_jar=aiohttp.DummyCookieJar(),
            auto_decompress=False,
            trust_env=False,
            timeout=aiohttp.ClientTimeout(total=None),  # the caller has one for all of it
            skip_auto_headers=("User-Agent", "Accept", "Accept-Encoding", "Content-Type"),
            max_line_size=MAX_FIELD,
            max_field_size=MAX_FIELD,
            max_headers=MAX_FIELDS,
        )

    async def ask(
        self,
        method: str,
        url: str,
        headers: list[tuple[str, str]],
        body: bytes | None,
        secret: Secret | None,
        limit: int,
    ) -> Reply:
        """``limit`` is how many bytes the body of the answer may have. Raises Failed."""
        import yarl

        aiohttp = self._aiohttp
        if secret is not None:
            name, value = secret.field()
            headers = [*headers, (name.decode("ascii"), value.decode("utf-8", "surrogateescape"))]
        try:
            async with self._session.request(
                method, yarl.URL(url, encoded=True), headers=headers, data=body, allow_redirects=False
            ) as response:
                _check(response, limit)
                return _reply(response, await _body(response, limit), secret)
        except aiohttp.ClientConnectorCertificateError:
            raise Failed("Its certificate is not to be trusted.") from None
        except aiohttp.ClientSSLError:
            raise Failed("TLS with it failed.") from None
        except aiohttp.ClientConnectorError:
            raise Failed("It cannot be reached.") from None
        except (aiohttp.ClientError, OSError, ValueError):
            raise Failed("Its answer broke off, or is no proper HTTP.") from None

    async def close(self) -> None:
        await self._session.close()


def _check(response: aiohttp.ClientResponse, limit: int) -> None:
    """Raises Failed for an answer whose body need not be read."""
    if sum(len(name) + len(value) for name, value in response.raw_headers) > MAX_HEAD:
        raise Failed("Its answer has too large a head.")
    if any(value.lower() != "identity" for value in response.headers.getall("content-encoding", ())):
        raise Failed("Its answer is compressed, which was not asked for.")
    if response.status < 200 or (300 <= response.status < 400 and response.status != 304):
        raise Failed(f"It answered with status {response.status}: redirects are not followed.")
    if response.content_length is not None and response.content_length > limit and response.method != "HEAD":
        raise Failed(f"Its answer has more than {limit:,} bytes.")


async def _body(response: aiohttp.ClientResponse, limit: int) -> bytes:
    body = bytearray()
    async for piece in response.content.iter_any():
        body += piece
        if len(body) > limit:
            raise Failed(f"Its answer has more than {limit:,} bytes.", bytes_down=len(body))
    return bytes(body)


def _reply(response: aiohttp.ClientResponse, body: bytes, secret: Secret | None) -> Reply:
    def clean(value: bytes) -> bytes:
        return value if secret is None else secret.scrubbed(value)

    named = b",".join(value for name, value in response.raw_headers if name.lower() == b"connection").lower()
    left_out = _NOT_PASSED_ON | {each.strip() for each in named.split(b",")}
    headers = tuple(
        (name, clean(value))
        for raw, value in response.raw_headers
        if (name := raw.lower()) not in left_out
        and not name.startswith(b"access-control-")
        and clean(name) == name
        and _is_plain(value)
    )
    kind = clean(next((value for name, value in response.raw_headers if name.lower() == b"content-type"), b""))
    is_told = kind.isascii() and _is_plain(kind) and kind.strip()
    return Reply(response.status, kind.decode("ascii") if is_told else "application/octet-stream", headers, clean(body))


def _is_plain(value: bytes) -> bool:
    return not any((byte < 0x20 and byte != 0x09) or byte == 0x7F for byte in value)
