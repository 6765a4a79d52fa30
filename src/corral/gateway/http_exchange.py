"""One request with its answer: what is remembered of it, and how its bytes are taken in pieces."""

from __future__ import annotations

from dataclasses import dataclass, field

import h11

from corral.credentials.scrubbing import Scrubber
from corral.gateway.http_heads import END, HttpError, RequestHead

CHUNK = 64 * 1024
"""Bytes of a body that are written at once, at most."""


class Chunks:
    """Counts the chunks of one side of a connection: very small ones make us work far more than they are worth.

    Only those count that come many at once. A server that writes a few bytes now and then is no attack.
    """

    AT_ONCE = 64
    SMALL = 16
    """Bytes that a chunk should have on average,"""
    FREE = 4096
    """from this number on."""

    def __init__(self) -> None:
        self._bytes = self._chunks = 0

    def count(self, chunks: int, size: int) -> None:
        """Raises HttpError."""
        if chunks > self.AT_ONCE:
            self._bytes += size
            self._chunks += chunks
            if self._chunks > self.FREE + self._bytes // self.SMALL:
                raise HttpError(400, "the body comes in chunks that are too small")


@dataclass(slots=True)
class Exchange:
    """One request and its answer, each with a parser that sees no other message."""

    request: RequestHead
    down: h11.Connection
    """Towards the client."""
    up: h11.Connection
    """Towards the server."""
    request_over: bool = False
    answered: bool = False
    """The head of the answer has gone to the client."""
    keep: bool = False
    """The connection is good for another exchange; said in the answer's head."""
    interim: int = 0
    scrubber: Scrubber | None = None
    left: int = 0
    """Bytes to come of an answer's body of known length that is passed on as it is: there is nothing to parse."""
    bytes_up: int = 0
    bytes_down: int = 0


@dataclass(slots=True)
class Received:
    """Bytes of one side that were not looked at yet."""

    data: bytearray = field(default_factory=bytearray)
    searched: int = 0

    def head(self, limit: int) -> bytes | None:
        """Takes a whole head out; None while it is not there. Raises HttpError where it is longer than ``limit``."""
        end = self.data.find(END, max(0, self.searched - len(END) + 1))
        self.searched = len(self.data)
        if (end + len(END) if end >= 0 else len(self.data)) > limit:
            raise HttpError(431, f"the head is longer than {limit} bytes")
        return None if end < 0 else self.take(end + len(END))

    def take(self, count: int | None = None) -> bytes:
        """The first bytes, or all."""
        with memoryview(self.data) as view:
            taken = bytes(view[:count])
        del self.data[:count]
        self.searched = 0
        return taken


def collect(parser: h11.Connection, chunks: Chunks) -> tuple[bytes, bool]:
    """What there is of a body, up to CHUNK bytes and one piece more, and whether it is over.

    Raises HttpError and h11.RemoteProtocolError.
    """
    parts: list[bytes | bytearray] = []
    size = 0
    over = False
    while size < CHUNK and not over:
        event = parser.next_event()
        if isinstance(event, h11.Data):
            parts.append(event.data)
            size += len(event.data)
        elif isinstance(event, h11.EndOfMessage):
            over = True
        else:
            break
    chunks.count(len(parts), size)
    return b"".join(parts), over
