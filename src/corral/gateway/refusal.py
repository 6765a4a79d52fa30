"""What a client is told when it may not: an answer of HTTP/1.1, or an alert of TLS. Pure, short and on one line each.

The reason is a rule's, so for people and models; it is escaped and cut all the same, because parts of it may be the
client's own words. A private rule gives no reason: pass none.
"""

from __future__ import annotations

from enum import IntEnum
from http import HTTPStatus

MAX_LINE = 400
"""Characters of a reason or an advice that are shown."""
_NO_REASON = "the policy of this sandbox does not allow it"


class Alert(IntEnum):
    """Descriptions of TLS alerts (RFC 8446, section 6.2)."""

    HANDSHAKE_FAILURE = 40
    BAD_CERTIFICATE = 42
    DECODE_ERROR = 50
    ACCESS_DENIED = 49
    INTERNAL_ERROR = 80
    UNRECOGNIZED_NAME = 112


def one_line(text: str) -> str:
    """Printable ASCII on one line: every other character is escaped, and what is too long is cut."""
    line = " ".join(text[: 4 * MAX_LINE].split())
    shown = "".join(c if " " <= c <= "~" else c.encode("unicode_escape").decode("ascii") for c in line)
    return shown if len(shown) <= MAX_LINE else shown[: MAX_LINE - 3] + "..."


def answer(status: int, reason: str, advice: str = "", *, keep_alive: bool = False, body: bool = True) -> bytes:
    """A whole answer that says why. ``body`` is False for an answer to HEAD, which only has the length of one."""
    why, instead = one_line(reason) or _NO_REASON, one_line(advice)
    content = f"corral: {why}\n{instead}\n" if instead else f"corral: {why}\n"
    try:
        phrase = HTTPStatus(status).phrase
    except ValueError:
        phrase = ""
    lines = (
        f"HTTP/1.1 {status} {phrase}",
        "content-type: text/plain",
        f"content-length: {len(content)}",
        "cache-control: no-store",
        f"x-corral-reason: {why}",
        *((f"x-corral-advice: {instead}",) if instead else ()),
        f"connection: {'keep-alive' if keep_alive else 'close'}",
    )
    return ("\r\n".join(lines) + "\r\n\r\n" + (content if body else "")).encode("ascii")


def forbidden(reason: str, advice: str = "", keep_alive: bool = False, *, body: bool = True) -> bytes:
    """403: the policy does not allow it."""
    return answer(403, reason, advice, keep_alive=keep_alive, body=body)


def tls_alert(description: int = Alert.ACCESS_DENIED) -> bytes:
    """A record with a fatal alert, unencrypted, as it may stand in answer to a ClientHello (RFC 8446, section 6).

    TLS 1.2 is its version, which clients of all versions accept (section 5.1).
    """
    return bytes((21, 3, 3, 0, 2, 2, description))
