"""What a plain TCP flow becomes later: TLS after STARTTLS, a banner of SSH behind some text, a miner, a proxy.

A flow that was recognised as none of these goes on being looked at, in both directions, before its bytes are sent on:

* the client's first bytes, until :func:`corral.gateway.recognise.recognise` has an answer. So nothing is gained by
  being slower than the time for which the gateway waits;
* the first MAX_KEEN bytes of each direction, everywhere;
* after that up to MAX_WATCHED bytes, the beginnings of lines, and the first bytes after the other side has spoken;
  miners everywhere.

What is found depends on the bytes and on the order in which the two sides send them, not on their pieces, except that a
beginning in very many pieces that could each decide what it is, and would have it read again each time, ends the flow
(MAX_READ). However small the pieces, each costs a fixed number of looks at it and _CARRY bytes before it. The gateway
keeps at most MAX_FIRST + 4 KiB for it. Who has a destination that policy opens to any TCP can hide more than this
finds; it finds the programs that exist.
"""

from __future__ import annotations

import re
from dataclasses import dataclass
from enum import Enum

from corral.gateway.mining import SAID
from corral.gateway.recognise import MAX_FIRST, Protocol, could_decide, recognise

MAX_KEEN = 1 << 16
MAX_WATCHED = 1 << 24
MAX_READ = 1 << 21
"""Bytes that a beginning may cost: it is read again, whole, with each piece that could tell what it is."""
_CARRY = 512
"""Bytes that are kept to find what lies across two pieces; no pattern is longer."""


class Direction(Enum):
    """Who sends."""

    UP = "up"
    """The client, in the sandbox."""
    DOWN = "down"


@dataclass(frozen=True, slots=True)
class Finding:
    """What a flow is about to become. The bytes in which it was found must not be sent on, unless it is allowed."""

    protocol: Protocol
    detail: str
    starttls: bool = False
    """TLS is asked for in the words of the flow's own protocol, or begins after that: a permission of its own."""


class _Group(Enum):
    """The groups of the patterns below: their name, and what it means that one matches."""

    TLS = Finding(Protocol.TLS, "TLS in the middle of another protocol")
    SSH = Finding(Protocol.SSH, "SSH in the middle of another protocol")
    SOCKS = Finding(Protocol.SOCKS, "SOCKS in the middle of another protocol")
    CONNECT = Finding(Protocol.CONNECT, "a request to a proxy in the middle of another protocol")
    H2C = Finding(Protocol.H2C, "HTTP/2 in the middle of another protocol")
    HTTP = Finding(Protocol.HTTP, "HTTP in the middle of another protocol")
    STRATUM = Finding(Protocol.STRATUM, "mining")
    STARTTLS = Finding(Protocol.TLS, "STARTTLS", starttls=True)


PIECEMEAL = Finding(Protocol.TCP, "a beginning in more pieces than are read")
"""What could be anything still, and comes so slowly that only looking for ever would tell."""
AGREED = Finding(Protocol.TLS, "TLS after STARTTLS", starttls=True)
"""The TLS that was asked for: what follows is encrypted."""


_CLIENT_HELLO = rb"\x16\x03[\0-\3][\0-\x40].\x01\0..\x03[\1-\3]"
_SERVER_HELLO = rb"\x16\x03[\0-\3][\0-\x40].\x02\0..\x03[\0-\3]"
_SSH = rb"SSH-[12]\."
_STARTTLS = (
    rb"(?i:(?:[0-9A-Za-z.]{1,32} )?STARTTLS|STLS|AUTH (?:TLS|SSL)(?:-[CP])?)[ \t]{0,16}\r?(?=\n)|"  # SMTP and others
    rb"\0\0\0\x08\x04\xd2\x16[\x2f\x30]|"  # PostgreSQL: SSLRequest, GSSENCRequest
    rb"\x20\0\0\x01.[\x08-\x0f\x18-\x1f\x28-\x2f\x38-\x3f\x48-\x4f\x58-\x5f\x68-\x6f\x78-\x7f"
    rb"\x88-\x8f\x98-\x9f\xa8-\xaf\xb8-\xbf\xc8-\xcf\xd8-\xdf\xe8-\xef\xf8-\xff].{7}\0{23}"  # MySQL: CLIENT_SSL
)
_GREETING = rb"\x05[\1-\x09][\0-\x09\x80-\xff]{1,9}"
_SOCKS = (
    _GREETING + rb"\x05[\1-\3]\0[\1\3\4]|"
    rb"\x04[\1\2](?!\0[\0-\3]).{6}[\x21-\x7e]{0,64}\0"  # a MySQL packet of 260 bytes has zero and its number there
)
_CONNECT = rb"(?:CONNECT [^\s]{1,300}|[A-Z]{3,10} https?://[^\s]{1,300}) HTTP/1"
_HTTP = rb"(?:GET|HEAD|POST|PUT|DELETE|PATCH|OPTIONS) /[^\s]{0,300} HTTP/1"
_H2C = rb"PRI \* HTTP/2"


def _at_lines(**groups: bytes) -> re.Pattern[bytes]:
    """What can stand behind a newline. It is searched for by that byte, and the next must be one that can follow."""
    said = b"|".join(b"(?P<%s>%s)" % (name.encode(), pattern) for name, pattern in groups.items())
    return re.compile(rb"\n(?=[\0\x04\x05\x16 .0-9A-Za-z])(?:" + said + b")", re.DOTALL)


def _anywhere(**groups: bytes) -> re.Pattern[bytes]:
    (found,) = (b"(?P<%s>%s)" % (name.encode(), pattern) for name, pattern in groups.items())
    return re.compile(found, re.DOTALL)


_Looks = dict[Direction, tuple[re.Pattern[bytes], ...]]
"""For each direction, what is searched for at lines, and then what is searched for everywhere."""

_KEEN: _Looks = {
    Direction.UP: (
        _at_lines(SSH=_SSH, STARTTLS=_STARTTLS, SOCKS=_SOCKS, CONNECT=_CONNECT, H2C=_H2C, HTTP=_HTTP),
        _anywhere(STRATUM=SAID),
        _anywhere(TLS=_CLIENT_HELLO),
        _anywhere(STARTTLS=rb"1\.3\.6\.1\.4\.1\.1466\.20037"),  # LDAP: RFC 4511, section 4.14.1
        _anywhere(STARTTLS=rb"<starttls[\s/>]"),  # XMPP: RFC 6120, section 5
    ),
    Direction.DOWN: (_at_lines(SSH=_SSH), _anywhere(STRATUM=SAID), _anywhere(TLS=_SERVER_HELLO)),
}
_LATER: _Looks = {
    Direction.UP: (
        _at_lines(SSH=_SSH, TLS=_CLIENT_HELLO, STARTTLS=_STARTTLS, SOCKS=_SOCKS, CONNECT=_CONNECT, H2C=_H2C),
        _anywhere(STRATUM=SAID),
    ),
    Direction.DOWN: (_at_lines(SSH=_SSH, TLS=_SERVER_HELLO), _anywhere(STRATUM=SAID)),
}
_GREETED = re.compile(rb"\n(?P<greeting>" + _GREETING + rb")\Z", re.DOTALL)


class _Side:
    """One direction: what of it may become part of a pattern."""

    def __init__(self, direction: Direction) -> None:
        self._direction = direction
        self.seen = 0
        self._carry = b"\n"
        """Its last bytes. A newline stands for the beginning of the stream."""
        self._turn = b"\n"
        """The first bytes since the other side spoke; a newline stands for that. Complete from _CARRY bytes on."""

    def begin_turn(self) -> None:
        self._turn = b"\n"

    def feed(self, data: bytes) -> list[Finding]:
        findings: list[Finding] = []
        keen = data[: max(0, MAX_KEEN - self.seen)]
        for part, patterns in ((keen, _KEEN), (data[len(keen) :], _LATER)):
            if part:
                findings += self._part(part, patterns[self._direction])
        return findings

    def _part(self, data: bytes, looks: tuple[re.Pattern[bytes], ...]) -> list[Finding]:
        findings: list[Finding] = []
        if len(self._turn) < _CARRY:
            self._turn = (self._turn + data)[:_CARRY]
            match = looks[0].match(self._turn)  # at its beginning only: the rest is in what follows
            if match is not None:
                findings.append(_meaning(match))
                self._turn = bytes(_CARRY)
        whole, end = self._carry + data, 0
        for look in looks:
            for match in look.finditer(whole):
                findings.append(_meaning(match))
                end = max(end, match.end())
        self._carry = whole[max(end, len(whole) - _CARRY) :]
        self.seen += len(data)
        return findings

    def greeting(self) -> bytes:
        """A client's greeting of SOCKS 5 where this side's last words are one; else nothing."""
        for last in (self._turn, self._carry):
            match = _GREETED.search(last[-16:])
            if match is not None and len(match["greeting"]) == 2 + match["greeting"][1]:
                return match["greeting"]
        return b""


def _meaning(match: re.Match[bytes]) -> Finding:
    return _Group[match.lastgroup or ""].value


class Watch:
    """Looks at one flow, from its first byte on."""

    def __init__(self) -> None:
        self._sides = {direction: _Side(direction) for direction in Direction}
        self._speaks: Direction | None = None
        self._first: bytearray | None = bytearray()
        self._read = 0
        self._asked = False
        """TLS was asked for."""
        self._greeting = b""
        """What the client greeted with, as long as the answer is open."""
        self._answer = b""

    def done(self, direction: Direction) -> bool:
        """Nothing more will be found in this direction: feeding it may end."""
        return self._sides[direction].seen >= MAX_WATCHED

    @property
    def finished(self) -> bool:
        """The same of both directions."""
        return all(map(self.done, Direction))

    def feed(self, direction: Direction, data: bytes) -> Finding | None:
        """What these bytes make of the flow: the worst, where that is several things; None: nothing new.

        Feed before the bytes are sent on, including those that were recognised.
        """
        side = self._sides[direction]
        if not data or self.done(direction):
            return None
        if direction is not self._speaks:
            self._speaks = direction
            side.begin_turn()
            self._greeting = self._sides[Direction.UP].greeting() if direction is Direction.DOWN else b""
            self._answer = b""
        findings = self._beginning(data) if direction is Direction.UP else self._socks(data)
        findings += side.feed(data)
        self._asked = self._asked or any(finding.starttls for finding in findings)
        if self._asked:
            findings = [AGREED if finding == _Group.TLS.value else finding for finding in findings]
        return min(findings, key=lambda finding: finding.starttls, default=None)

    def _beginning(self, data: bytes) -> list[Finding]:
        if self._first is None:
            return []
        told = could_decide(self._first, data)
        self._first += data
        if not told:
            return []
        self._read += min(len(self._first), MAX_FIRST)
        found = recognise(bytes(self._first[:MAX_FIRST]))
        if found is None:
            return [PIECEMEAL] if self._read > MAX_READ else []
        self._first = None
        server_first = self._sides[Direction.DOWN].seen > 0
        if found.protocol is Protocol.TCP or (found.protocol is Protocol.SOCKS and server_first):
            return []  # the first packet of a MySQL client can begin as a greeting of SOCKS; the patterns look closer
        return [Finding(found.protocol, found.fault or found.detail)]

    def _socks(self, data: bytes) -> list[Finding]:
        """The server's answer chooses one of the ways that the client offered, or none (RFC 1928, section 3)."""
        self._answer = (self._answer + data)[:2]
        if not self._greeting or len(self._answer) < 2:
            return []
        greeting, self._greeting = self._greeting, b""
        agreed = self._answer[0] == 5 and (self._answer[1] in greeting[2:] or self._answer[1] == 0xFF)
        return [_Group.SOCKS.value] if agreed else []
