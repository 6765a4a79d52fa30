"""The first bytes of programs that carry other connections in one: tunnels, relays, VPNs over TCP.

Only what they send as they are distributed is known here. Who changes the program is not found by this, but by what
else a flow must be: a rule names a protocol, and unknown bytes are none.

Everything here gives an answer about a beginning of a stream that no later byte can change: ``""`` for no, a
description for yes, and None for "more bytes are needed".
"""

from __future__ import annotations

import re

_ANY = b""

_TEMPLATES: tuple[tuple[str, tuple[bytes, ...]], ...] = (
    # fatedier/frp, pkg/util/net/tls.go: one byte before a hello of TLS; and msg.TypeLogin, a length of 8 bytes, JSON.
    ("frp", (b"\x17", b"\x16", b"\x03")),
    ("frp", (b"o", b"\0", b"\0", b"\0", b"\0", b"\0", b"\0", _ANY, _ANY, b"{")),
    # hashicorp/yamux, spec.md: version 0, window update or data, SYN, stream 1 (frp, ligolo); or a ping with SYN.
    ("yamux (frp, ligolo)", (b"\0", b"\0\1", b"\0", b"\1", b"\0", b"\0", b"\0", b"\1")),
    ("yamux (frp, ligolo)", (b"\0", b"\2", b"\0", b"\1", b"\0", b"\0", b"\0", b"\0")),
    # rathole, src/protocol.rs: Hello::ControlChannelHello by bincode, version 1.
    ("rathole", (b"\0", b"\0", b"\0", b"\0", b"\1")),
    # WireGuard's first message, bare or behind its length (148); rathole's data channel and smux begin the same.
    ("WireGuard, rathole or smux", (b"\1", b"\0", b"\0", b"\0")),
    ("WireGuard", (b"\0", b"\x94", b"\1", b"\0", b"\0", b"\0")),
    # STUN and TURN: Binding or Allocate, length, magic cookie (RFC 8489, section 5).
    ("TURN", (b"\0", b"\1\3", _ANY, _ANY, b"\x21", b"\x12", b"\xa4", b"\x42")),
    # Data of TLS without a handshake before it: ZeroTier's relay over TCP.
    ("TLS without a handshake (ZeroTier)", (b"\x17", b"\x03", b"\0\1\2\3")),
    # HAProxy's PROXY protocol, versions 1 and 2: another connection is inside.
    ("PROXY protocol", (b"P", b"R", b"O", b"X", b"Y", b" ", b"TU")),
    ("PROXY protocol", tuple(bytes((byte,)) for byte in b"\r\n\r\n\0\r\nQUIT\n")),
    # ekzhang/bore: JSON that ends with NUL.
    ("bore", tuple(bytes((byte,)) for byte in b'{"Hello":')),
    ("bore", tuple(bytes((byte,)) for byte in b'{"Accept":"')),
)

_FIRST_BYTES = frozenset(byte for _, template in _TEMPLATES for byte in template[0]) | {0, 1, 2, 3, 4}
"""All with which a handshake begins; the numbers are those of OpenVPN's lengths."""

_PROTOCOLS = {"argotunnel": "cloudflared", "stun.turn": "TURN", "frp": "frp", "openvpn": "OpenVPN"}
"""What ALPN says."""
_SERVERS = re.compile(
    r"(?:.+\.)?(?:argotunnel|cftunnel)\.com(?P<cloudflared>)|"
    r"(?:.+\.)?(?:ngrok-agent\.com|tunnel(?:\.[a-z]{2,3})?\.ngrok\.com)(?P<ngrok>)|"
    r"(?:controlplane|derp[0-9]+[a-z]?)\.tailscale\.com(?P<Tailscale>)"
)
"""Where such programs connect to; nothing else is served there."""
_TOR_NAME = re.compile(r"www\.[a-z2-7]{4,25}\.com")
_P224, _P384 = 21, 24

_REQUEST_LINES = re.compile(
    rb"[A-Z_]+ (?:/~!frp(?P<frp>)|/vpnsvc/connect\.cgi(?P<SoftEther>)|/sra_\{BA195980-CD49-458b-9E23-C84EE0ADCD75\}/"
    rb"(?P<SSTP>)|/\+?CSCOSSLC/tunnel(?P<AnyConnect>)|/wstunnel/(?P<wstunnel>))"
)
_HEADERS: tuple[tuple[str, re.Pattern[bytes]], ...] = tuple(
    (tool, re.compile(rb"\n(?:" + pattern + rb")", re.IGNORECASE))
    for tool, pattern in (
        ("chisel", rb"sec-websocket-protocol:[^\n]{0,200}\bchisel-"),
        ("wstunnel", rb"sec-websocket-protocol:[ \t]*v1[ \t]*,[ \t]*authorization\.bearer\.ey"),
        ("gost", rb"(?:gost-target|x-gost-[a-z-]{1,30}):"),
        ("Neo-reGeorg", rb"x-cmd:[ \t]*(?:connect|forward|read|disconnect)\b"),
        ("Tailscale", rb"upgrade:[^\n]{0,200}(?:\bderp\b|tailscale-control-protocol)"),
        ("MASQUE", rb"upgrade:[^\n]{0,200}\bconnect-(?:udp|ip)\b"),
        ("rathole, ligolo or frp", rb"user-agent:[^\n]{0,200}\b(?:rathole|ligolo|frpc|chisel|wstunnel)\b"),
    )
)
_MINING = re.compile(rb"\nx-(?:mining-[a-z]{1,30}|stratum):", re.IGNORECASE)


def tunnel(first: bytes) -> str | None:
    """Which tunnel's handshake a stream begins with."""
    if first and first[0] not in _FIRST_BYTES:
        return ""
    answers = [_match(template, first, name) for name, template in _TEMPLATES]
    answers += [_gost(first), _openvpn(first)]
    return next((name for name in answers if name), None if None in answers else "")


def _match(template: tuple[bytes, ...], first: bytes, name: str) -> str | None:
    """``template`` has for each byte all those that it may be."""
    for allowed, byte in zip(template, first, strict=False):
        if allowed and byte not in allowed:
            return ""
    return name if len(first) >= len(template) else None


def _gost(first: bytes) -> str | None:
    """go-gost/relay: version 1, a command (with or without UDP), a length, then the first feature. Of MongoDB's
    messages, whose length in the other order comes first, those of 257 bytes begin nearly the same."""
    if first[:1] not in (b"", b"\1") or first[1:2] not in (b"", b"\1", b"\2", b"\3", b"\x81", b"\x82", b"\x83"):
        return ""
    if len(first) < 6:
        return None
    return "gost" if first[2:4] != b"\0\0" and first[4] in (1, 2, 3, 4) and first[5] == 0 else ""


def _openvpn(first: bytes) -> str | None:
    """A length, and P_CONTROL_HARD_RESET_CLIENT_V2 or _V3 (OpenVPN's ssl_pkt.h). A query of DNS can begin the same."""
    if not first:
        return None
    if first[0] > 4:  # longer than any of them
        return ""
    if len(first) < 3:
        return None
    if first[2] not in (0x38, 0x50) or not 14 <= int.from_bytes(first[:2], "big") < 1280:
        return ""
    if len(first) < 12:
        return None
    return "" if first[6:12] == b"\0\1\0\0\0\0" else "OpenVPN"


def tunnel_in_tls(server_name: str | None, alpn: tuple[str, ...]) -> str:
    """Which tunnel a hello of TLS is for, as far as it says so."""
    for protocol in alpn:
        if protocol in _PROTOCOLS:
            return _PROTOCOLS[protocol]
    return _group(_SERVERS.fullmatch(server_name or ""))


def _group(match: re.Match[str] | re.Match[bytes] | None) -> str:
    """The name of the group that took part in a match."""
    return (match.lastgroup or "") if match is not None else ""


def is_tor(server_name: str | None, alpn: tuple[str, ...], groups: tuple[int, ...]) -> bool:
    """Whether a hello is one of Tor's (src/lib/tls/tortls_openssl.c): a random name, no ALPN, and P-224 among its
    groups without P-384, which nobody else offers."""
    return not alpn and _P224 in groups and _P384 not in groups and bool(_TOR_NAME.fullmatch(server_name or ""))


def tunnel_in_http(head: bytes) -> str:
    """Which tunnel a request of HTTP/1 is for. ``head`` is its first line and its headers."""
    tool = _group(_REQUEST_LINES.match(head))
    if tool:
        return tool
    if head.startswith(b"SSTP_DUPLEX_POST "):
        return "SSTP"
    return next((tool for tool, pattern in _HEADERS if pattern.search(head)), "")


def is_mining_in_http(head: bytes) -> bool:
    """Whether a request has a miner's header (the getwork protocol)."""
    return _MINING.search(head) is not None
