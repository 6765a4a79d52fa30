"""What :class:`corral.gateway.http.HttpProxy` wants done, and what it waits for."""

from __future__ import annotations

from dataclasses import dataclass
from enum import Enum

from corral.actions import Meaning


@dataclass(frozen=True, slots=True)
class Ask:
    """Whether this request may go out. Answer with :meth:`HttpProxy.decided`, exactly once."""

    method: str
    path: str
    """As it was written, without the query: printable ASCII, not decoded. The rules know what it may mean. Of a CONNECT
    it is ``/HOST:PORT``."""
    upgrade: str = ""
    """``websocket``, ``h2c``, ...: what the request wants to change to; it is permitted already."""
    meaning: Meaning = Meaning.METHOD


@dataclass(frozen=True, slots=True)
class Dial:
    """The server is needed from now on. What is to go to it follows at once: hold it until the connection stands."""


@dataclass(frozen=True, slots=True)
class HangUp:
    """The server has ended the connection while a request waited for its decision: close it. Nothing of the request has
    gone out, so if it is allowed, there will be another ``Dial``."""


@dataclass(frozen=True, slots=True)
class ToUpstream:
    data: bytes


@dataclass(frozen=True, slots=True)
class ToClient:
    data: bytes


@dataclass(frozen=True, slots=True)
class Refused:
    """The proxy itself refused a request (a malformed one, an upgrade that is not permitted); for the records."""

    status: int
    reason: str
    method: str = ""
    path: str = ""
    """Both ``""`` where the request could not be read so far."""


@dataclass(frozen=True, slots=True)
class Tunnel:
    """Both sides changed the protocol, as was permitted: what follows is no HTTP/1.1."""

    protocol: str
    """``websocket``, ``h2c``, ``connect`` or another token of Upgrade."""


@dataclass(frozen=True, slots=True)
class Close:
    """Write what is queued, then close both connections (with unread bytes of the client: linger, or it never reads
    the answer)."""

    reason: str


Command = Ask | Dial | HangUp | ToUpstream | ToClient | Refused | Tunnel | Close


class Phase(Enum):
    """What is being waited for."""

    IDLE = "idle"
    """The first byte of a request."""
    HEAD = "head"
    """The rest of a request's head."""
    ASKED = "asked"
    """The decision."""
    EXCHANGE = "exchange"
    """The rest of the request, its answer, or both."""
    DRAIN = "drain"
    """The rest of a request that was refused; it is thrown away."""
    TUNNEL = "tunnel"
    CLOSED = "closed"
