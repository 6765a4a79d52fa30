"""Which protocol a connection speaks, from the first bytes that its client sends.

The rules, in the order in which they are tried; the first that applies decides, and none is passed over while it could
still apply:

1. A tunnel's handshake is TUNNEL, a miner's line of JSON STRATUM, a proxy's greeting SOCKS.
2. ``PRI * HTTP/2`` is H2C, ``SSH-`` SSH.
3. A record of a TLS handshake is TLS; what follows is read as a hello, whose marks may make it TOR or TUNNEL.
4. A line that calls itself HTTP is HTTP; CONNECT where it asks for a proxy; and its headers may make it TUNNEL.
5. All else is TCP.

An answer is final: no later byte changes it, so it is the same whatever the pieces in which the bytes arrive. What
claims to be a protocol and breaks its rules is that protocol with a :attr:`Recognised.fault`, and is refused whatever
the policy says. What is in doubt is what it would be at worst.
"""

from __future__ import annotations

import re
from collections.abc import Callable
from dataclasses import dataclass
from enum import Enum

from corral.gateway.handshakes import is_mining_in_http, is_tor, tunnel, tunnel_in_http, tunnel_in_tls
from corral.gateway.hello import ClientHello, HelloError, escaped, parse_hello
from corral.gateway.mining import miner, value_length

MAX_FIRST = 1 << 15
"""Bytes that are looked at. What is undecided by then is decided."""
_MAX_BANNER = 255
"""RFC 4253, section 4.2."""


class Protocol(Enum):
    """What a connection speaks. The values are words of the policy, but for H2C, which is a permission."""

    TLS = "tls"
    HTTP = "http"
    SSH = "ssh"
    SOCKS = "socks"
    CONNECT = "connect"
    """A request to a proxy: CONNECT, or a target with scheme and host (RFC 9112, sections 3.2.2 and 3.2.3)."""
    STRATUM = "stratum"
    TOR = "tor"
    TUNNEL = "tunnel"
    H2C = "h2c"
    """HTTP/2 without TLS and without asking first (RFC 9113, section 3.3)."""
    TCP = "tcp"
    """None of these."""


@dataclass(frozen=True, slots=True)
class Recognised:
    """What the first bytes are."""

    protocol: Protocol
    detail: str = ""
    """More of it, for the record: one line of ASCII, cut."""
    hello: ClientHello | None = None
    """Of TLS, TOR, and TUNNEL in TLS; None also where there is a fault."""
    fault: str = ""
    """Why it is refused whatever the policy says; ``""`` where nothing is wrong with it."""


_Look = Callable[[bytes, bool], "Recognised | bool | None"]
"""Gets the first bytes and whether they are all there will be. False: it is not that; None: it could become that."""


def recognise(data: bytes, *, ended: bool = False) -> Recognised | None:
    """What the client's bytes so far are; None where more are needed.

    ``ended`` says that no more are waited for: the client has closed its half, or was silent for too long. Then, and
    from MAX_FIRST bytes on, there is always an answer.
    """
    ended = ended or len(data) >= MAX_FIRST
    first = data[:MAX_FIRST]
    for look in _LOOKS:
        found = look(first, ended)
        if isinstance(found, Recognised):
            return found
        if found is None and not ended:
            return None
    if not first:
        return Recognised(Protocol.TCP, "the client sent nothing")
    if len(first) >= MAX_FIRST:
        return Recognised(Protocol.TCP, f"nothing that is known within {MAX_FIRST >> 10} KiB")
    return Recognised(Protocol.TCP)


_SETTLED = 1 << 10
"""From so many bytes on only a line, a value of JSON or a hello can be open still: all else is told by its first 255
bytes, or by a method of at most 64."""
_BEGUN = re.compile(rb"[ \t\r\n]{0,512}[^ \t\r\n]")
_DECISIVE = re.compile(rb"[\n\0}\]]")
"""What ends a line of JSON, a value of it, a line of HTTP, or its headers."""


def could_decide(before: bytes | bytearray, more: bytes) -> bool:
    """Whether there can be an answer for ``before`` with ``more``, where there was none for ``before`` alone. To ask
    costs far less than to read both again, so who sends a byte at a time costs no more than others."""
    if not _SETTLED <= len(before) < MAX_FIRST - len(more) or before[0] == 0x16:
        return True
    return _DECISIVE.search(more) is not None or _BEGUN.match(before) is None


# ---- 1. what carries others ----


def _look_for_tunnel(first: bytes, ended: bool) -> Recognised | bool | None:
    name = tunnel(first)
    return Recognised(Protocol.TUNNEL, name) if name else None if name is None else False


_BLANK = b" \t\r\n"
_END_OF_JSON = re.compile(rb"[\n\0]")


def _look_for_miner(first: bytes, ended: bool) -> Recognised | bool | None:
    body = first.lstrip(_BLANK)
    if not body:
        return None
    if body[:1] not in (b"{", b"["):
        return False
    newline = _END_OF_JSON.search(body)
    line = body[: newline.start()] if newline else body
    length = value_length(line)
    if not length and newline is None and not ended:
        return None
    method = miner(line[:length] if length else line)
    return Recognised(Protocol.STRATUM, escaped(method.encode("utf-8", "replace"))) if method else False


def _look_for_socks(first: bytes, ended: bool) -> Recognised | bool | None:
    """RFC 1928, section 3, and SOCKS 4. Version 5 of Cassandra's protocol begins with 5 too, but then comes 0."""
    if first[:1] not in (b"", b"\4", b"\5"):
        return False
    if len(first) < 2:
        return Recognised(Protocol.SOCKS) if ended and first else None
    if first[0] == 5:
        return Recognised(Protocol.SOCKS, "version 5") if first[1] else False
    return Recognised(Protocol.SOCKS, "version 4") if first[1] in (1, 2) else False


# ---- 2. what begins with a word ----

_HTTP2 = b"PRI * HTTP/2"


def _look_for_http2(first: bytes, ended: bool) -> Recognised | bool | None:
    return Recognised(Protocol.H2C) if first.startswith(_HTTP2) else None if _HTTP2.startswith(first) else False


def _look_for_ssh(first: bytes, ended: bool) -> Recognised | bool | None:
    body = first.lstrip(_BLANK)
    if not body.startswith(b"SSH-"):
        return None if b"SSH-".startswith(body) else False
    banner, newline, _ = body[:_MAX_BANNER].partition(b"\n")
    if not newline and len(body) < _MAX_BANNER and not ended:
        return None
    if b"chisel" in banner:
        return Recognised(Protocol.TUNNEL, "chisel")
    fault = "it does not begin with its version" if len(body) < len(first) else ""
    return Recognised(Protocol.SSH, escaped(banner.rstrip(b"\r")), fault=fault)


# ---- 3. TLS ----


def _look_for_tls(first: bytes, ended: bool) -> Recognised | bool | None:
    if first[:1] >= b"\x80":
        return _look_for_old_tls(first)
    if first[:1] not in (b"", b"\x16") or first[1:2] not in (b"", b"\3"):
        return False
    if len(first) < 2:
        return None
    try:
        hello = parse_hello(first)
    except HelloError as error:
        return Recognised(Protocol.TLS, fault=f"its hello is malformed: {error}")
    if hello is None:
        return Recognised(Protocol.TLS, fault="its hello is not complete") if ended else None
    name = (hello.server_name or "")[:80]
    if is_tor(hello.server_name, hello.alpn, hello.groups):
        return Recognised(Protocol.TOR, name, hello)
    tool = tunnel_in_tls(hello.server_name, hello.alpn)
    return Recognised(Protocol.TUNNEL, tool, hello) if tool else Recognised(Protocol.TLS, name, hello)


def _look_for_old_tls(first: bytes) -> Recognised | bool | None:
    """A hello in the form of SSL 2.0 (RFC 6176 forbids it), with which a session of TLS can begin too."""
    if first[2:3] not in (b"", b"\1") or first[3:4] not in (b"", b"\0", b"\3"):
        return False
    if len(first) < 5:
        return None
    old = first[3] == 3 or first[4] == 2
    return Recognised(Protocol.TLS, fault="its hello is one of SSL 2.0") if old else False


# ---- 4. HTTP/1 ----

_TOKEN = rb"[A-Za-z][!#$%&'*+\-.^_`|~0-9A-Za-z]{0,63}"
"""A method. No method begins otherwise than with a letter, but many binary protocols do."""
_BEGINNING = re.compile(_TOKEN + rb"(?:[ \t\r][^\n]*)?")
_REQUEST = re.compile(rb"(" + _TOKEN + rb") ([\x21-\x7e]+) HTTP/1\.[01]\r")
"""RFC 9112, section 3, without its leave to be lenient."""
_CLAIMS = re.compile(rb"\sHTTP/[0-9]|^CONNECT\s|^(?:GET|HEAD|POST|PUT|DELETE|OPTIONS|TRACE|PATCH) +/\S*\r?$", re.I)
"""HTTP in some reading: a version, or the form of HTTP/0.9."""
_PROXIED = re.compile(rb"[A-Za-z][A-Za-z0-9+.\-]*://")
_END_OF_HEADERS = re.compile(rb"\n\r?\n")


def _look_for_http(first: bytes, ended: bool) -> Recognised | bool | None:
    body = first.lstrip(_BLANK)
    line, newline, _ = body.partition(b"\n")
    if body and not _BEGINNING.fullmatch(line):
        return False
    if not newline and not ended:
        return None
    request = _REQUEST.fullmatch(line)
    if request is None:
        if not _CLAIMS.search(line):
            return False
        words = line.split(None, 2)
        asks_proxy = words[0].upper() == b"CONNECT" or any(_PROXIED.match(word) for word in words[1:2])
        protocol = Protocol.CONNECT if asks_proxy else Protocol.HTTP
        return Recognised(protocol, escaped(words[0]), fault="its request line is malformed")
    method, target = request.groups()
    if method.upper() == b"CONNECT" or _PROXIED.match(target):
        return Recognised(Protocol.CONNECT, f"{escaped(method)} {escaped(target.partition(b'?')[0])}")
    end = _END_OF_HEADERS.search(body)
    if end is None and not ended:
        return None
    head = body[: end.end()] if end else body
    tool = tunnel_in_http(head)
    if tool:
        return Recognised(Protocol.TUNNEL, tool)
    if is_mining_in_http(head):
        return Recognised(Protocol.STRATUM, "getwork")
    fault = ""
    if len(body) < len(first):
        fault = "something stands before its request line"
    elif not target.startswith(b"/") and target != b"*":
        fault = "its target is malformed"
    elif end is None:
        fault = f"its headers do not end within {len(first)} bytes"
    return Recognised(Protocol.HTTP, escaped(method), fault=fault)


_LOOKS: tuple[_Look, ...] = (
    _look_for_tunnel,
    _look_for_miner,
    _look_for_socks,
    _look_for_http2,
    _look_for_ssh,
    _look_for_tls,
    _look_for_http,
)
