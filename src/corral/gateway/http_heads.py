"""Heads of HTTP/1.1 messages, before h11 sees them: what RFC 9112 leaves open, or h11 lets through, is settled here.

Refused, each because two programs on the way could read the message differently: a line that does not end in CR LF, a
folded line, a bare CR, NUL and other control characters, space around a field's name, two ways of saying how long the
body is or one way said twice, any transfer coding but ``chunked``, framing fields spelled with ``_``, a target that is
not a plain path or begins with ``//``, dot segments, slashes and dots encoded twice. What goes on is written anew from
the values here; fields that are for one hop only are taken out (RFC 9110, section 7.6.1).
"""

from __future__ import annotations

import re
from dataclasses import dataclass
from urllib.parse import unquote_to_bytes

from corral.policy.names import canonical_address, canonical_name

Fields = list[tuple[bytes, bytes]]

MAX_FIELDS = 100
MAX_TARGET = 16 * 1024
"""Bytes of a request's target; RFC 9112, section 3, wants 8,000 at the least."""
MAX_METHOD = 32
MAX_LENGTH_DIGITS = 18
END = b"\r\n\r\n"

_TOKEN = re.compile(rb"[-!#$%&'*+.^_`|~0-9A-Za-z]+")
_REQUEST_LINE = re.compile(rb"([-!#$%&'*+.^_`|~0-9A-Za-z]+) ([\x21-\x7e]+) HTTP/1\.([01])")
_STATUS_LINE = re.compile(rb"HTTP/1\.([01]) ([1-9][0-9]{2})(?: [\t\x20-\x7e\x80-\xff]*)?")
_VALUE = re.compile(rb"[\t\x20-\x7e\x80-\xff]*")
_LENGTH = re.compile(rb"[0-9]{1,%d}" % MAX_LENGTH_DIGITS)
_PORT = re.compile(r"[1-9][0-9]{0,4}")
_BROKEN_ESCAPE = re.compile(r"%(?![0-9A-Fa-f]{2})")
_SECOND_ESCAPE = re.compile(r"%(?:2[EeFf5]|5[Cc]|00)")
_CONTROL = re.compile(r"[\x00-\x1f\x7f-\x9f]")

_ONE_HOP = frozenset(
    b"connection keep-alive proxy-connection proxy-authenticate proxy-authorization te trailer transfer-encoding "
    b"upgrade http2-settings".split()
)
_FRAMING = frozenset((b"content-length", b"transfer-encoding", b"host", b"connection", b"upgrade", b"expect"))
_NEVER_NAMED = _FRAMING - {b"upgrade", b"connection"} | {b"content-encoding", b"content-range"}
"""Fields that must not vanish because Connection lists them: they say whom, how long, or how a body is to be read."""


class HttpError(ValueError):
    """A message that is not passed on. ``status`` is what a client is told where the message was a request."""

    def __init__(self, status: int, reason: str) -> None:
        super().__init__(reason)
        self.status, self.reason = status, reason


@dataclass(frozen=True, slots=True)
class RequestHead:
    """A request as it may go on, except for its permission."""

    method: str
    target: bytes
    """As it was written."""
    path: str
    """As it was written, without the query; of a CONNECT ``/HOST:PORT``."""
    fields: Fields
    """For the server: without those of one hop, Host, Expect and Content-Length."""
    length: int | None
    """Content-Length, or None where it is not given."""
    chunked: bool
    keep_alive: bool
    upgrade: str
    """The one protocol that Upgrade and Connection ask for, in lower case, or ``""``."""
    settings: bytes | None
    """HTTP2-Settings, which goes together with an upgrade to h2c."""
    expects_continue: bool
    minor: int
    """0 of HTTP/1.0."""

    @property
    def has_body(self) -> bool:
        return self.chunked or bool(self.length)


@dataclass(frozen=True, slots=True)
class ResponseHead:
    """An answer, or an interim one (``status`` below 200)."""

    status: int
    fields: Fields
    """For the client: without those of one hop. Content-Length is among them."""
    length: int | None
    chunked: bool
    keep_alive: bool
    upgrade: str


def request_head(head: bytes, host: str, port: int, *, secure: bool) -> RequestHead:
    """Reads a whole head, with the empty line at its end, of a request that came on a connection to ``host``.

    Raises HttpError.
    """
    line, fields = _lines(head)
    match = _REQUEST_LINE.fullmatch(line)
    if match is None:
        raise HttpError(400, "the request line is not one of HTTP/1.1")
    method_raw, target, minor = match[1], match[2], int(match[3])
    if len(method_raw) > MAX_METHOD:
        raise HttpError(501, "the method is too long")
    if len(target) > MAX_TARGET:
        raise HttpError(414, f"the target is longer than {MAX_TARGET} bytes")
    length, chunked = _framing(fields, minor)
    hosts = _values(fields, b"host")
    if len(hosts) != 1:
        raise HttpError(400, f"a request has one Host field, not {len(hosts)}")
    method = method_raw.decode("ascii")
    if method == "CONNECT":
        authority = _authority(target, None)
        if _authority(hosts[0], authority[1]) != authority:
            raise HttpError(400, "the Host field and the target name two places")
        path = "/{}:{}".format(*authority)
    else:
        named_host = _authority(hosts[0], 443 if secure else 80)
        if named_host != (host, port):
            wrong, right = host_field(*named_host, secure=secure), host_field(host, port, secure=secure)
            raise HttpError(403, f"the Host field names {wrong}, but the connection is to {right}")
        path = checked_path(target)
    named = _connection(fields)
    upgrade = _upgrade(fields, named)
    expectations = _values(fields, b"expect")
    if expectations and [value.lower() for value in expectations] != [b"100-continue"]:
        raise HttpError(417, "nothing but 100-continue can be expected")
    if (length or chunked) and (method in ("CONNECT", "TRACE") or upgrade):
        raise HttpError(400, f"a {method} request{' to upgrade' if upgrade else ''} has no body")
    settings = _values(fields, b"http2-settings")
    if len(settings) > 1:
        raise HttpError(400, "HTTP2-Settings is given twice")
    dropped = _ONE_HOP | named | {b"host", b"expect", b"content-length"}
    return RequestHead(
        method,
        target,
        path,
        [field for field in fields if field[0].lower() not in dropped],
        length,
        chunked,
        minor == 1 and b"close" not in named,
        upgrade,
        settings[0] if settings else None,
        bool(expectations) and minor == 1,
        minor,
    )


def response_head(head: bytes) -> ResponseHead:
    """Reads a whole head of an answer. Raises HttpError."""
    line, fields = _lines(head)
    match = _STATUS_LINE.fullmatch(line)
    if match is None:
        raise HttpError(502, "the server's status line is not one of HTTP/1.1")
    minor, status = int(match[1]), int(match[2])
    length, chunked = _framing(fields, minor)
    if (chunked or length) and (status < 200 or status == 204):
        raise HttpError(502, f"the server's answer {status} claims to have a body")
    named = _connection(fields)
    # Alt-Svc advertises places (mostly by UDP) that the sandbox cannot reach.
    dropped = _ONE_HOP | named | {b"alt-svc"}
    return ResponseHead(
        status,
        [field for field in fields if field[0].lower() not in dropped],
        length,
        chunked,
        minor == 1 and b"close" not in named,
        _upgrade(fields, named) if status == 101 else "",
    )


def _lines(head: bytes) -> tuple[bytes, Fields]:
    """First line and fields of a head that ends in an empty line. Raises HttpError."""
    lines = head.removesuffix(END).split(b"\r\n")
    if len(lines) - 1 > MAX_FIELDS:
        raise HttpError(431, f"there are more than {MAX_FIELDS} fields")
    return lines[0], [_field(line) for line in lines[1:]]


def _field(line: bytes) -> tuple[bytes, bytes]:
    name, colon, value = line.partition(b":")
    if not colon or not _TOKEN.fullmatch(name):
        folded = line.startswith((b" ", b"\t"))
        raise HttpError(400, "a field is folded" if folded else "a field is not written `name: value`")
    if not _VALUE.fullmatch(value):
        raise HttpError(400, "a field holds a control character")
    if b"_" in name and name.lower().replace(b"_", b"-") in _FRAMING:
        raise HttpError(400, "a field that frames the message is spelled with `_`")
    return name, value.strip(b" \t")


def _values(fields: Fields, name: bytes) -> list[bytes]:
    return [value for found, value in fields if found.lower() == name]


def _list(fields: Fields, name: bytes) -> list[bytes]:
    """The elements of a field that is a list of tokens, in lower case."""
    elements = [part.strip(b" \t").lower() for value in _values(fields, name) for part in value.split(b",")]
    return [element for element in elements if element]


def _framing(fields: Fields, minor: int) -> tuple[int | None, bool]:
    """Content-Length and whether the body is chunked; RFC 9112, section 6. Raises HttpError."""
    lengths, codings = _values(fields, b"content-length"), _values(fields, b"transfer-encoding")
    if lengths and codings:
        raise HttpError(400, "both Content-Length and Transfer-Encoding say how long the body is")
    if len(lengths) > 1 or len(codings) > 1:
        raise HttpError(400, "the length of the body is said twice")
    if codings:
        if codings[0].lower() != b"chunked":
            raise HttpError(501, "the only transfer coding is chunked")
        if minor == 0:
            raise HttpError(400, "HTTP/1.0 has no transfer codings")
        return None, True
    if not lengths:
        return None, False
    if not _LENGTH.fullmatch(lengths[0]):
        raise HttpError(400, "Content-Length is not a number")
    return int(lengths[0]), False


def _connection(fields: Fields) -> frozenset[bytes]:
    """What Connection lists. Raises HttpError where it would take away what says whom or how long."""
    named = frozenset(_list(fields, b"connection"))
    if not _NEVER_NAMED.isdisjoint(named):
        raise HttpError(400, "Connection names a field that the message cannot be read without")
    return named


def _upgrade(fields: Fields, named: frozenset[bytes]) -> str:
    """The protocol to upgrade to; without Connection: upgrade there is no upgrade. Raises HttpError."""
    protocols = _list(fields, b"upgrade")
    if not protocols:
        return ""
    if b"upgrade" not in named or len(protocols) != 1 or not _TOKEN.fullmatch(protocols[0].replace(b"/", b"")):
        raise HttpError(400, "Upgrade needs one protocol, and `Connection: upgrade`")
    return protocols[0].decode("ascii")


def _authority(value: bytes, default: int | None) -> tuple[str, int]:
    """Host and port, canonical. Raises HttpError."""
    try:
        text = value.decode("ascii")
        if text.startswith("["):
            literal, bracket, rest = text[1:].partition("]")
            if not bracket or ":" not in literal:
                raise ValueError("not an IPv6 address in brackets")
            host = canonical_address(literal)
        else:
            name, colon, number = text.partition(":")
            host, rest = _host(name), colon + number
        if not rest:
            if default is None:
                raise ValueError("no port")
            return host, default
        if not rest.startswith(":") or not _PORT.fullmatch(rest[1:]) or int(rest[1:]) > 65535:
            raise ValueError("not a port")
        return host, int(rest[1:])
    except ValueError:
        raise HttpError(400, "the Host field or target is not a host and a port") from None


def _host(text: str) -> str:
    try:
        return canonical_address(text)
    except ValueError:
        return canonical_name(text)


def host_field(host: str, port: int, *, secure: bool) -> str:
    """What is written into Host."""
    shown = f"[{host}]" if ":" in host else host
    return shown if port == (443 if secure else 80) else f"{shown}:{port}"


def checked_path(target: bytes) -> str:
    """The path of an origin-form target (RFC 9112, section 3.2.1), as it was written: printable ASCII.

    It is not decoded: what an encoded ``/`` or an empty segment may mean is for the rules to say
    (:func:`corral.policy.requests.read_path`). Refused is what no rule should have to read. Raises HttpError.
    """
    if not target.startswith(b"/"):
        raise HttpError(400, "the target is not a path (a request to a proxy is not taken here)")
    if target.startswith(b"//"):  # a host to those who read it as a reference: RFC 3986, section 4.2
        raise HttpError(400, "the target begins with `//`")
    if b"#" in target:
        raise HttpError(400, "the target holds a fragment")
    raw = target.partition(b"?")[0].decode("ascii")
    if _BROKEN_ESCAPE.search(raw):
        raise HttpError(400, "the path holds a `%` that encodes nothing")
    try:
        path = unquote_to_bytes(raw).decode("utf-8")
    except UnicodeDecodeError:
        raise HttpError(400, "the path is not UTF-8") from None
    if _CONTROL.search(path) or "\\" in path:
        raise HttpError(400, "the path holds a control character or a backslash")
    if _SECOND_ESCAPE.search(path):
        raise HttpError(400, "the path is encoded twice")
    # `..;x` is `..` to servers that know path parameters.
    if any(segment.partition(";")[0] in (".", "..") for segment in path.split("/")):
        raise HttpError(400, "the path holds `.` or `..`")
    return raw
