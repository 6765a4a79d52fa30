"""The first flight of TLS, read strictly: the client's hello, and the server's certificate where it is not encrypted.

The records are taken in order until the message is complete (RFC 8446, section 5.1): each is of a handshake, none is
empty, and the message ends where a record ends. The message is then read whole (RFC 8446, section 4.1.2; RFC 5246,
section 7.4.1.2), and nothing in it may have two readings: no extension twice, no length that leaves bytes over, one
server name at most (RFC 6066, section 3). What follows the hello is not looked at.

All of it is hostile. At most MAX_HELLO bytes are looked at, in time linear in them. The same bytes get the same answer
whatever the pieces in which they arrive.
"""

from __future__ import annotations

import hashlib
import struct
from dataclasses import dataclass

from corral.gateway.ja4 import fingerprint
from corral.policy.names import MAX_NAME, canonical_name

MAX_HELLO = 1 << 15
"""Bytes of the client's records. Hellos with post-quantum keys have about 2 KiB."""
MAX_FLIGHT = 1 << 17
"""Bytes of the server's records up to its certificate; chains have about 4 KiB."""
MAX_FRAGMENT = 1 << 14
"""Bytes of one record; RFC 8446, section 5.1."""
MAX_RECORDS = 256
"""Records of one hello; programs use one, or two."""
MAX_SHOWN = 80
"""Characters of text that is recorded or shown."""

_HANDSHAKE = 22
_CLIENT_HELLO, _SERVER_HELLO, _CERTIFICATE = 1, 2, 11
_EXTENSION = struct.Struct(">HH")
_TLS13 = 0x0304
_SERVER_NAME, _GROUPS, _SIGNATURES, _ALPN, _PADDING = 0, 10, 13, 16, 21
_PRE_SHARED_KEY, _EARLY_DATA, _VERSIONS = 41, 42, 43
_ENCRYPTED = frozenset((0xFE0D, 0xFFCE, 0xFD00))
"""encrypted_client_hello (RFC 9849), its draft of 2018 (encrypted_server_name), and ech_outer_extensions."""


class HelloError(ValueError):
    """These bytes are no hello that has one reading only. The message is for people and quotes nothing unescaped."""


@dataclass(frozen=True, slots=True)
class ClientHello:
    """What a client offers. Lists are in its order, with the values that are there to be ignored (RFC 8701)."""

    server_name: str | None
    """In the form of :func:`corral.policy.names.canonical_name`; None where it names none."""
    alpn: tuple[str, ...]
    """Protocols of the application; what cannot be printed is escaped, and the sign of an escape too."""
    versions: tuple[int, ...]
    """Such as 0x0304; where there is no supported_versions, the one of the message."""
    ciphers: tuple[int, ...]
    extensions: tuple[int, ...]
    """Their types, in order."""
    signature_algorithms: tuple[int, ...]
    groups: tuple[int, ...] = ()
    ech: bool = False
    """Another hello may be hidden in this one. Browsers pretend so at random (RFC 9849, section 6.2), which nobody can
    tell apart."""
    early_data: bool = False
    pre_shared_key: bool = False

    @property
    def ja4(self) -> str:
        """The fingerprint of the program that wrote this hello, as corral.gateway.ja4 computes it."""
        return fingerprint(self)


def parse_hello(data: bytes) -> ClientHello | None:
    """The hello that ``data`` begins with; None where it is not complete yet.

    Raises:
        HelloError: whatever follows, it will not become one.
    """
    message = _message(data)
    return None if message is None else _client_hello(message)


def escaped(text: bytes) -> str:
    """Bytes of a peer as text to record or show: ASCII, on one line, cut."""
    shown = text[: MAX_SHOWN + 1].decode("latin-1").encode("unicode_escape").decode("ascii")
    return shown if len(shown) <= MAX_SHOWN else f"{shown[: MAX_SHOWN - 3]}..."


# ---- records ----


def _message(data: bytes) -> bytes | None:
    """The client's first handshake message, without its head."""
    data = data[:MAX_HELLO]
    message = bytearray()
    position, needed, records = 0, -1, 0
    while position < len(data):
        header = data[position : position + 5]
        if header[0] != _HANDSHAKE:
            raise HelloError("another record interrupts the hello" if position else "no record of a handshake")
        if len(header) < 5:
            break
        if header[1] != 3 or header[2] > 3:
            raise HelloError(f"a record of version {header[1]}.{header[2]}")
        length = int.from_bytes(header[3:5], "big")
        if not 0 < length <= MAX_FRAGMENT:
            raise HelloError(f"a record of {length} bytes")
        records += 1
        if records > MAX_RECORDS:
            raise HelloError(f"a hello in more than {MAX_RECORDS} records")
        end = len(message) + length
        message += data[position + 5 : position + 5 + length]
        if needed < 0 and message and message[0] != _CLIENT_HELLO:
            raise HelloError(f"handshake message {message[0]} instead of a hello")
        if needed < 0 and len(message) >= 4:
            needed = 4 + int.from_bytes(message[1:4], "big")
            if needed > MAX_HELLO:
                raise HelloError(f"a hello of {needed} bytes")
        if 0 <= needed < end:
            raise HelloError("something else lies in the record behind the hello")
        if len(message) == needed:
            return bytes(message[4:])
        position += 5 + length
    if len(data) >= MAX_HELLO:
        raise HelloError(f"a hello that does not end within {MAX_HELLO} bytes")
    return None


class _Fields:
    """Reads a message from its beginning. All methods raise HelloError where it is too short for what it promises."""

    def __init__(self, data: bytes) -> None:
        self._data, self._position = data, 0

    def __bool__(self) -> bool:
        return self._position < len(self._data)

    def take(self, count: int) -> bytes:
        start, self._position = self._position, self._position + count
        if self._position > len(self._data):
            raise HelloError("a length reaches beyond what holds it")
        return self._data[start : self._position]

    def number(self, size: int) -> int:
        return int.from_bytes(self.take(size), "big")

    def vector(self, size: int) -> bytes:
        """What a length of ``size`` bytes stands in front of."""
        return self.take(self.number(size))

    def end(self, what: str) -> None:
        if self:
            raise HelloError(f"{what} has bytes left over")


def _numbers(data: bytes, what: str) -> tuple[int, ...]:
    """A vector of numbers of two bytes, of which there is at least one."""
    if not data or len(data) % 2:
        raise HelloError(f"{what} of {len(data)} bytes")
    return struct.unpack(f">{len(data) // 2}H", data)


# ---- the client's hello ----


def _client_hello(message: bytes) -> ClientHello:
    fields = _Fields(message)
    version = fields.number(2)
    if not 0x0301 <= version <= 0x0303:
        raise HelloError(f"version {version:#06x} of the protocol")
    fields.take(32)
    if len(fields.vector(1)) > 32:
        raise HelloError("a session identifier of more than 32 bytes")
    ciphers = _numbers(fields.vector(2), "a list of ciphers")
    compressions = fields.vector(1)
    if 0 not in compressions:
        raise HelloError("no way to do without compression")
    found = _extensions(fields)
    versions = _versions(found.get(_VERSIONS), version)
    if _TLS13 in versions and compressions != b"\0":
        raise HelloError("compression together with TLS 1.3")  # RFC 8446, section 4.1.2
    if _PRE_SHARED_KEY in found and next(reversed(found)) != _PRE_SHARED_KEY:
        raise HelloError("pre_shared_key is not the last extension")  # RFC 8446, section 4.2.11
    if any(found.get(_PADDING, b"")):
        raise HelloError("padding that is not empty")  # RFC 7685, section 3
    return ClientHello(
        server_name=_server_name(found[_SERVER_NAME]) if _SERVER_NAME in found else None,
        alpn=_alpn(found[_ALPN]) if _ALPN in found else (),
        versions=versions,
        ciphers=ciphers,
        extensions=tuple(found),
        signature_algorithms=_list(found, _SIGNATURES, "signature_algorithms"),
        groups=_list(found, _GROUPS, "supported_groups"),
        ech=not _ENCRYPTED.isdisjoint(found),
        early_data=_EARLY_DATA in found,
        pre_shared_key=_PRE_SHARED_KEY in found,
    )


def _extensions(fields: _Fields) -> dict[int, bytes]:
    """What each extension holds, in their order; empty where the hello ends before them, as up to TLS 1.2 it may."""
    found: dict[int, bytes] = {}
    if not fields:
        return found
    data, position = fields.vector(2), 0
    fields.end("the hello")
    while position < len(data):
        kind, length = _EXTENSION.unpack_from(data.ljust(position + 4, b"\0"), position)
        start, position = position + 4, position + 4 + length
        if position > len(data):
            raise HelloError("a length reaches beyond what holds it")
        if kind in found:
            raise HelloError(f"extension {kind} is there twice")
        found[kind] = data[start:position]
    return found


def _versions(data: bytes | None, version: int) -> tuple[int, ...]:
    """RFC 8446, section 4.2.1."""
    if data is None:
        return (version,)
    fields = _Fields(data)
    versions = _numbers(fields.vector(1), "supported_versions")
    fields.end("supported_versions")
    return versions


def _list(found: dict[int, bytes], kind: int, what: str) -> tuple[int, ...]:
    if kind not in found:
        return ()
    fields = _Fields(found[kind])
    numbers = _numbers(fields.vector(2), what)
    fields.end(what)
    return numbers


def _server_name(data: bytes) -> str:
    """The one name of RFC 6066, section 3: ASCII, without the dot of the root, and no address."""
    fields = _Fields(data)
    names = _Fields(fields.vector(2))
    fields.end("server_name")
    if names.number(1) != 0:
        raise HelloError("server_name holds something else than a name")
    raw = names.vector(2)
    names.end("server_name (it may hold one name only)")
    if not raw or len(raw) > MAX_NAME or not raw.isascii() or raw.endswith(b"."):
        raise HelloError(f"server name `{escaped(raw)}` is none")
    try:
        return canonical_name(raw.decode("ascii"))
    except ValueError:
        raise HelloError(f"server name `{escaped(raw)}` is none") from None


def _alpn(data: bytes) -> tuple[str, ...]:
    """RFC 7301, section 3.1."""
    fields = _Fields(data)
    names = _Fields(fields.vector(2))
    fields.end("the list of protocols")
    found: list[str] = []
    while names:
        name = names.vector(1)
        if not name:
            raise HelloError("a protocol without a name")
        found.append(name.decode("latin-1").encode("unicode_escape").decode("ascii"))
    if not found:
        raise HelloError("an empty list of protocols")
    return tuple(found)


# ---- the server's certificate ----


class CertificateReader:
    """Reads the server's first flight for its certificate, which up to TLS 1.2 anybody can see.

    Nobody has checked it: it is for the record, not for a decision. Never raises; what is no such flight has none.
    """

    def __init__(self) -> None:
        self._raw, self._message, self._seen = bytearray(), bytearray(), 0
        self.done = False
        """Nothing more will be found: stop feeding."""
        self.certificate = ""
        """SHA-256 of the server's own certificate, in hexadecimal; ``""`` where it is not visible."""

    def feed(self, data: bytes) -> None:
        """The next bytes from the server."""
        if self.done:
            return
        self._seen += len(data)
        self._raw += data
        try:
            self.done = self._records() or self._seen > MAX_FLIGHT
        except HelloError:
            self.done = True
        if self.done:
            self._raw.clear()
            self._message.clear()

    def _records(self) -> bool:
        while len(self._raw) >= 5:
            length = int.from_bytes(self._raw[3:5], "big")
            if self._raw[0] != _HANDSHAKE or self._raw[1] != 3 or not 0 < length <= MAX_FRAGMENT:
                return True  # an alert, or the change to encryption: a session that is resumed has no certificate
            if len(self._raw) < 5 + length:
                return False
            self._message += self._raw[5 : 5 + length]
            del self._raw[: 5 + length]
            if self._messages():
                return True
        return bool(self._raw) and self._raw[0] != _HANDSHAKE

    def _messages(self) -> bool:
        while len(self._message) >= 4:
            end = 4 + int.from_bytes(self._message[1:4], "big")
            kind = self._message[0]
            if kind not in (_SERVER_HELLO, _CERTIFICATE) or end > MAX_FLIGHT:
                return True
            if len(self._message) < end:
                return False
            fields = _Fields(bytes(self._message[4:end]))
            del self._message[:end]
            if kind == _CERTIFICATE:
                leaf = _Fields(fields.vector(3)).vector(3)  # RFC 5246, section 7.4.2: the server's own comes first
                self.certificate = hashlib.sha256(leaf).hexdigest() if leaf else ""
                return True
            if _is_tls13(fields):
                return True
        return False


def _is_tls13(fields: _Fields) -> bool:
    """Whether a server's hello chooses TLS 1.3, behind which all is encrypted (RFC 8446, section 4.1.3)."""
    fields.take(2 + 32)
    fields.vector(1)
    fields.take(2 + 1)
    return _VERSIONS in _extensions(fields)


def server_certificate(data: bytes) -> str | None:
    """SHA-256, in hexadecimal, of the certificate in the server's first bytes; None where none is to be seen (yet)."""
    reader = CertificateReader()
    reader.feed(data)
    return reader.certificate or None
