"""DNS messages of the resolver inside: a query in, what it asks for; what to say, the answer's bytes out.

The resolver forwards nothing, so a query is read for its one question and for nothing else: it has a header, one name
that is written out in full, and at most an OPT record, whose options are not looked at. All else is :class:`Malformed`,
with the error that the client gets. Names are read by dnspython; what is written has a fixed form and always fits into
512 bytes, so no answer is ever truncated.

RFC 1035 (messages), 2308 (negative answers), 6891 (EDNS), 7766 (TCP), 8482 (ANY), 8914 (extended errors), 9619 (one
question).
"""

from __future__ import annotations

import struct
from dataclasses import dataclass
from enum import Enum, IntEnum
from socket import AF_INET, inet_pton

import dns.exception
import dns.name

from corral.gateway.names import Pair
from corral.policy.names import canonical_name

MAX_DATAGRAM = 512
"""Bytes of a query by UDP; RFC 1035, section 2.3.4. The largest that has a reason has about 300."""
MAX_STREAM = 65535
"""Bytes of a query by TCP: what its length can say; RFC 1035, section 4.2.2."""
TTL = 60
"""Seconds for which an address may be kept. It stays the same, but the policy's consent may end."""
NEGATIVE_TTL = 5
"""Seconds for which it may be remembered that there is nothing: a rule can be added at any moment."""
MAX_REASON = 120
"""Bytes of a reason that goes with an answer."""
_MAX_SHOWN = 120
_NIBBLES = frozenset("0123456789abcdef")

_HEADER = struct.Struct("!HHHHHH")
_QUESTION = struct.Struct("!HH")
_RECORD = struct.Struct("!HHIH")
"""Type, class, TTL and length of data, after the owner's name."""
_QR, _AA, _TC, _RD, _RA, _CD = 0x8000, 0x0400, 0x0200, 0x0100, 0x0080, 0x0010
_OPCODE_SHIFT, _OPCODE_MASK = 11, 0xF
_DNSSEC_OK = 0x8000
_IN = 1
_OWNER = b"\xc0\x0c"
"""The question's name: a pointer to behind the header; RFC 1035, section 4.1.4."""
_EXTENDED_ERROR = 15
"""Option code; RFC 8914, section 2."""
_BLOCKED, _PROHIBITED = 15, 18
"""RFC 8914, sections 4.16 and 4.19."""
_BADVERS = 16
_META = range(128, 255)
"""Types that ask for something other than records (AXFR, IXFR, TSIG, ...), without ANY; RFC 6895, section 3.1."""


class Kind(IntEnum):
    """The types that mean something here."""

    A = 1
    SOA = 6
    PTR = 12
    HINFO = 13
    AAAA = 28
    OPT = 41
    ANY = 255


class Code(IntEnum):
    """RCODE; RFC 1035, section 4.1.1."""

    NOERROR = 0
    FORMERR = 1
    NXDOMAIN = 3
    NOTIMP = 4
    REFUSED = 5


class Outcome(Enum):
    """What the answer to a question is."""

    ADDRESS = "address"
    """The name is allowed: its addresses, or for a PTR the name; for any other type there is nothing."""
    NO_DATA = "no data"
    """The name is allowed and has nothing of this type."""
    UNKNOWN = "unknown"
    """There is no such name (NXDOMAIN): the client may try another."""
    REFUSED = "refused"
    """The name may not be asked for."""


@dataclass(frozen=True, slots=True)
class Question:
    """A well-formed query."""

    id: int
    name: str | None
    """In its one form (``policy.names``); None where what was asked for has none and so cannot be allowed."""
    reason: str
    """Why there is no name, as what follows "The name"."""
    shown: str
    """What was asked for as text that can be recorded: escaped, cut."""
    kind: int
    """Type, a number of 16 bits."""
    raw: bytes
    """The question as it came (name, type, class), to be repeated in the answer: some clients vary the case of letters
    and compare."""
    flags: int = 0
    """Those that the answer repeats: RD and CD."""
    edns: bool = False
    """The client understands an OPT record, so the answer has one."""
    dnssec: bool = False
    """DO, which is repeated. Nothing is ever signed."""

    @property
    def address(self) -> bytes | None:
        """For a PTR: the 4 or 16 bytes of the address whose name is asked for. None for other queries."""
        return reversed_address(self.name) if self.kind == Kind.PTR and self.name else None


@dataclass(frozen=True, slots=True)
class Malformed:
    """A query that is not answered with anything but an error."""

    reason: str
    """What follows "The query"."""
    reply: bytes = b""
    """The error; empty where nothing may be sent (one does not answer an answer)."""


def read(data: bytes, *, limit: int = MAX_DATAGRAM) -> Question | Malformed:
    """Reads one message. ``limit`` is :data:`MAX_STREAM` for one that came by TCP. Never raises, in time linear in the
    length of a name."""
    if len(data) < _HEADER.size:
        return Malformed("is shorter than a header")
    identifier, flags, questions, answers, authorities, additional = _HEADER.unpack_from(data)
    if flags & _QR:
        return Malformed("is an answer")

    def malformed(reason: str, code: Code = Code.FORMERR, raw: bytes = b"") -> Malformed:
        reply = _header(identifier, flags & (_RD | _CD) | flags & _OPCODE_MASK << _OPCODE_SHIFT, code, len(raw) > 0)
        return Malformed(reason, reply + raw)

    if len(data) > limit:
        return malformed(f"is longer than {limit} bytes")
    if flags >> _OPCODE_SHIFT & _OPCODE_MASK:
        return malformed(f"has opcode {flags >> _OPCODE_SHIFT & _OPCODE_MASK}, not QUERY", Code.NOTIMP)
    if flags & _TC:
        return malformed("says that it was truncated")
    if questions != 1:
        return malformed(f"has {questions} questions, not one")
    if answers or authorities or additional > 1:
        return malformed("has records that no query has")
    try:
        name, used = dns.name.from_wire(data, _HEADER.size)
    except dns.exception.DNSException as error:
        return malformed(f"has no well-formed name ({type(error).__name__})")
    end = _HEADER.size + used
    # A pointer has nothing to point to before the first name but the header, which then has two meanings.
    if name.to_wire() != data[_HEADER.size : end]:
        return malformed("has a compressed name")
    if len(data) < end + _QUESTION.size:
        return malformed("ends within the question")
    kind, class_ = _QUESTION.unpack_from(data, end)
    end += _QUESTION.size
    raw = data[_HEADER.size : end]
    if class_ != _IN:
        return malformed(f"asks for class {class_}, not IN", Code.REFUSED, raw)
    if kind in _META or kind in (0, Kind.OPT):
        return malformed(f"asks for type {kind}, which no record has", Code.NOTIMP, raw)

    edns, dnssec = bool(additional), False
    if edns:
        record = data[end : end + 1 + _RECORD.size]
        if len(record) < 1 + _RECORD.size or record[0] != 0:
            return malformed("has another additional record than OPT", raw=raw)
        type_, _, extended, length = _RECORD.unpack_from(record, 1)
        if type_ != Kind.OPT:
            return malformed("has another additional record than OPT", raw=raw)
        end += len(record) + length
        if extended >> 16 & 0xFF and len(data) == end:
            reply = _header(identifier, flags & (_RD | _CD), Code.NOERROR, True, additional=1) + raw
            return Malformed("has a version of EDNS above 0", reply + _opt(_BADVERS, dnssec=False))
        dnssec = bool(extended & _DNSSEC_OK)
    if len(data) != end:
        return malformed("does not end where it says", raw=raw)
    text, reason = _canonical(name)
    shown = text or _cut(name.to_text(omit_final_dot=True), _MAX_SHOWN)
    return Question(identifier, text, reason, shown, kind, raw, flags & (_RD | _CD), edns, dnssec)


def _canonical(name: dns.name.Name) -> tuple[str | None, str]:
    """The one form of a name; else None and why there is none."""
    labels = name.labels[:-1]
    if any(b"." in label for label in labels):
        return None, "holds a dot within one of its parts"  # joined, it would be another name
    try:
        # Letters that are no ASCII are not converted: nobody who means an international name sends it so.
        return canonical_name(b".".join(labels).decode("ascii")), ""
    except UnicodeDecodeError:
        return None, "holds bytes that are no ASCII"
    except ValueError as error:
        return None, _cut(str(error), 2 * _MAX_SHOWN)


def _cut(text: str, length: int) -> str:
    return text if len(text) <= length else f"{text[:length]}..."


def reversed_address(name: str) -> bytes | None:
    """The address that a name below ``in-addr.arpa`` (RFC 1035, section 3.5) or ``ip6.arpa`` (RFC 3596, section 2.5)
    stands for, where it is a whole one."""
    labels = name.split(".")
    parts = labels[-3::-1]
    if labels[-2:] == ["in-addr", "arpa"] and len(parts) == 4:
        try:
            return inet_pton(AF_INET, ".".join(parts))
        except OSError:
            return None
    if labels[-2:] == ["ip6", "arpa"] and len(parts) == 32 and _NIBBLES.issuperset(parts):
        return bytes.fromhex("".join(parts))
    return None


# ---- answers ----


def answer(
    question: Question, addresses: Pair | None, outcome: Outcome, *, pointer: str = "", reason: str = ""
) -> bytes:
    """The answer. Addresses and ``pointer`` (for PTR, a name in its one form) count only for ADDRESS, and only for the
    type asked for; a question without a name gets none in any case. ``reason`` is told to clients that speak EDNS where
    there is a refusal."""
    if outcome is Outcome.ADDRESS and question.name is None:
        outcome = Outcome.UNKNOWN
    data = b""
    kind = question.kind
    if outcome is Outcome.ADDRESS:
        if kind == Kind.A and addresses:
            data = addresses.ipv4
        elif kind == Kind.AAAA and addresses:
            data = addresses.ipv6
        elif kind == Kind.PTR and pointer:
            data = _wire(pointer)
        elif kind == Kind.ANY:
            data, kind = b"\x07RFC8482\0", Kind.HINFO  # RFC 8482, section 4.2
    code = {Outcome.UNKNOWN: Code.NXDOMAIN, Outcome.REFUSED: Code.REFUSED}.get(outcome, Code.NOERROR)
    records = [_OWNER + _RECORD.pack(kind, _IN, TTL, len(data)) + data] if data else []
    authority = [_SOA] if not data and outcome is not Outcome.REFUSED else []
    opt = []
    if question.edns:
        why = (_PROHIBITED if code is Code.REFUSED else _BLOCKED) if code is not Code.NOERROR and reason else 0
        opt = [_opt(0, question.dnssec, why, reason)]
    header = _header(question.id, question.flags | _AA, code, True, len(records), len(authority), len(opt))
    return b"".join((header, question.raw, *records, *authority, *opt))


def _header(
    identifier: int,
    flags: int,
    code: Code,
    question: bool,
    answers: int = 0,
    authorities: int = 0,
    additional: int = 0,
) -> bytes:
    return _HEADER.pack(identifier, flags | _QR | _RA | code, question, answers, authorities, additional)


def _opt(code: int, dnssec: bool, why: int = 0, reason: str = "") -> bytes:
    """RFC 6891, section 6.1.3: the size that we receive in place of the class, and in place of the TTL the upper bits
    of the code, version 0 and flags."""
    option = b""
    if why:
        text = "".join(c if c.isprintable() else "?" for c in reason[:MAX_REASON]).encode()[:MAX_REASON]
        text = text.decode(errors="ignore").encode()  # not half a character at its end
        option = struct.pack("!HHH", _EXTENDED_ERROR, 2 + len(text), why) + text
    extended = code >> 4 << 24 | (_DNSSEC_OK if dnssec else 0)
    return b"\0" + _RECORD.pack(Kind.OPT, MAX_DATAGRAM, extended, len(option)) + option


def _wire(name: str) -> bytes:
    return b"".join(bytes((len(label),)) + label.encode("ascii") for label in name.split(".")) + b"\0"


def _soa() -> bytes:
    """Says for how long there is nothing (RFC 2308, section 3), from the root: the resolver knows all that there is."""
    timers = struct.pack("!IIIII", 1, 3600, 600, 86400, NEGATIVE_TTL)
    data = _wire("gateway.corral.invalid") + _wire("nobody.invalid") + timers
    return b"\0" + _RECORD.pack(Kind.SOA, _IN, NEGATIVE_TTL, len(data)) + data


_SOA = _soa()


# ---- TCP ----


class FramingError(ValueError):
    """The stream holds what cannot be a message; nothing after it can be found."""


def frame(message: bytes) -> bytes:
    """A message (of at most MAX_STREAM bytes) with its length in front; RFC 1035, section 4.2.2."""
    return len(message).to_bytes(2, "big") + message


class Frames:
    """Cuts a stream into messages. Holds less than one message of ``limit`` bytes."""

    def __init__(self, limit: int = MAX_STREAM) -> None:
        self._limit = limit
        self._left = bytearray()

    @property
    def pending(self) -> int:
        """Bytes of a message that is not complete."""
        return len(self._left)

    def feed(self, data: bytes) -> list[bytes]:
        """The messages that are complete now. Raises FramingError for a length below that of a header or above the
        limit, as soon as it is seen; the messages before it in the same bytes are lost."""
        left = self._left
        left += data
        messages = []
        start = 0
        while len(left) - start >= 2:
            length = int.from_bytes(left[start : start + 2], "big")
            if not _HEADER.size <= length <= self._limit:
                raise FramingError(f"a message of {length} bytes")
            end = start + 2 + length
            if len(left) < end:
                break
            messages.append(bytes(left[start + 2 : end]))
            start = end
        del left[:start]
        return messages
