"""Carries bytes both ways between two connections, without looking at them where nobody has to.

A relay owns no memory but for the little that a slow reader did not take: a stream that comes in large pieces is copied
into a buffer that all relays share, sent on from there, and let go of in the kernel only as far as it was sent
(recv(2), MSG_PEEK and MSG_TRUNC of tcp(7)). Copied, as that is a quarter faster than splice(2), which costs both ends
more than it saves the middle. A reader that is slow holds up the writer and nobody else. The end of one direction is
passed on (half-close), and so is a reset.

What somebody looks at is copied once, looked at, and sent from that copy: pages that an agent has sent by sendfile(2)
or vmsplice(2) are still its own, and can change until they are copied. The first bytes were read, and come as
``first``.
"""

from __future__ import annotations

import os
import socket
import struct
from collections.abc import Callable
from contextlib import suppress
from errno import EAGAIN
from typing import Protocol

from corral.gateway.rules import SPENT, Budget, Budgets
from corral.guarded import Guarded

CHUNK = 1 << 20
"""Bytes that are moved in one go."""
LITTLE = 1 << 14
"""Where no more than that was there, nothing is left for now: to try again would only say so."""
SMALL = 1 << 16
"""Bytes that are taken out of the kernel before they are passed on, and kept where they are not taken; where so many
were there at once, more are only copied."""
ROUNDS = 3
"""How often in a row before others have their turn."""
_RESET = struct.pack("ii", 1, 0)


def make_buffer() -> memoryview:
    """What all relays of one thread share."""
    return memoryview(bytearray(CHUNK))


class Look(Protocol):
    """Sees what is about to be passed on."""

    @property
    def done(self) -> bool:
        """Whether it has seen enough."""

    def feed(self, data: bytes) -> str:
        """Returns why this is not passed on, or ``""``."""


def reset(sock: socket.socket) -> None:
    """Closes a connection so that its other end gets a reset (socket(7), SO_LINGER)."""
    with suppress(OSError):
        sock.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, _RESET)
    sock.close()


class _Way:
    """One direction."""

    __slots__ = (
        "_budget",
        "_first",
        "_large",
        "_look",
        "_relay",
        "_source",
        "_target",
        "_unsent",
        "count",
        "ended",
        "limit",
    )

    def __init__(
        self,
        relay: Relay,
        source: socket.socket,
        target: socket.socket,
        first: bytes,
        limit: int | None,
        look: Look | None,
        budget: Budget | None,
    ) -> None:
        self._relay, self._source, self._target = relay, source, target
        self._first = memoryview(first)
        """Bytes that were read and admitted, and are to be sent before anything else is read."""
        self._large = False
        """Whether it comes in large pieces."""
        self._unsent = 0
        """Bytes still in the kernel that were admitted already, and not taken by the target."""
        self._look, self._budget = look, budget
        self.limit = limit
        self.count = 0
        """Bytes that were passed on or are about to be."""
        self.ended = False

    def start(self) -> None:
        if self._first and not self._admit(len(self._first)):
            return
        if self._flush():
            self._relay.loop.add_reader(self._source.fileno(), self._readable)
        else:
            self._wait()

    # ---- in ----

    def _readable(self) -> None:
        self._relay.touched = True
        for _ in range(ROUNDS):
            try:
                got = self._copy() if self._large else self._read()
            except BlockingIOError:
                return
            except OSError as error:
                self._relay.end(_named(error, "the connection broke"), broken=True)
                return
            if self._relay.ended:
                return
            if got == 0:
                self._finish()
                return
            if self._first or self._unsent:
                self._wait()
                return
            if got <= LITTLE:
                return

    def _room(self, most: int) -> int:
        """How much to read at once: where there is a limit, a byte beyond it, which shows that there is more."""
        return most if self.limit is None else min(most, self.limit - self.count + self._unsent + 1)

    def _read(self) -> int:
        """Takes what is there out of the kernel and passes it on. Returns how much there was. Raises OSError."""
        room = self._room(SMALL)
        if self._look is None:
            got = self._source.recv_into(self._relay.buffer, room)
            data = self._relay.buffer[:got]
        else:
            looked_at = self._source.recv(room)
            data, got = memoryview(looked_at), len(looked_at)
            problem = self._look.feed(looked_at) if looked_at else ""
            if problem:
                self._relay.end(problem, broken=True)
            elif self._look.done:
                self._look = None
        if got and not self._relay.ended and self._admit(got):
            left = data[self._send(data) :]
            if left:
                self._first = left if self._look is not None else memoryview(bytes(left))  # others use the buffer too
            self._large = got == SMALL and self._look is None
        return got

    def _copy(self) -> int:
        """Passes on what is there, and takes out of the kernel what was taken. Returns and raises the same."""
        buffer = self._relay.buffer
        got = self._source.recv_into(buffer, self._room(CHUNK), socket.MSG_PEEK)
        if got > self._unsent:
            if not self._admit(got - self._unsent):
                return got
            self._unsent = got
        gone = self._send(buffer[:got]) if got else 0
        self._unsent -= gone
        while gone and not self._relay.ended:
            dropped = self._source.recv_into(buffer, gone, socket.MSG_TRUNC)
            if not dropped:
                raise ConnectionError
            gone -= dropped
        self._large = got >= SMALL or self._unsent > 0
        return got

    def _admit(self, got: int) -> bool:
        self.count += got
        if self.limit is not None and self.count > self.limit:
            self._relay.end(f"more than its {self.limit} bytes", broken=True)
            return False
        if self._budget is not None and not self._budget.take(got):
            self._relay.end(SPENT, broken=True)
            return False
        return True

    # ---- out ----

    def _send(self, data: memoryview) -> int:
        """How much of it was taken. Ends the relay where nothing ever will be."""
        try:
            return self._target.send(data)
        except BlockingIOError:
            return 0
        except OSError as error:
            self._relay.end(_named(error, "the other end is gone"), broken=True)
            return 0

    def _flush(self) -> bool:
        """Whether all that was read is passed on."""
        while self._first:
            sent = self._send(self._first)
            if not sent:
                return False
            self._first = self._first[sent:]
        return not self._relay.ended

    def _wait(self) -> None:
        if not self._relay.ended:
            self._relay.loop.remove_reader(self._source.fileno())
            self._relay.loop.add_writer(self._target.fileno(), self._writable)

    def _writable(self) -> None:
        self._relay.touched = True
        if self._flush():
            self._relay.loop.remove_writer(self._target.fileno())
            self._relay.loop.add_reader(self._source.fileno(), self._readable)
            if self._unsent:
                self._readable()

    def _finish(self) -> None:
        """The source has said all that it had to say."""
        self.ended = True
        self._relay.loop.remove_reader(self._source.fileno())
        if not self._relay.over():
            with suppress(OSError):  # it is gone: its own direction says so
                self._target.shutdown(socket.SHUT_WR)

    def close(self) -> None:
        self._first = memoryview(b"")


def _named(error: OSError, otherwise: str) -> str:
    return "reset" if isinstance(error, ConnectionError) else f"{otherwise} ({os.strerror(error.errno or EAGAIN)})"


class Relay:
    """Both directions. Closes neither socket: ``on_end`` (why, whether it broke) is called once, for that."""

    __slots__ = ("_counts", "_on_end", "_ways", "buffer", "ended", "loop", "touched")

    def __init__(
        self,
        loop: Guarded,
        buffer: memoryview,
        inside: socket.socket,
        outside: socket.socket,
        on_end: Callable[[str, bool], None],
        *,
        first: bytes = b"",
        limits: tuple[int | None, int | None] = (None, None),
        looks: tuple[Look | None, Look | None] = (None, None),
        budgets: Budgets = (None, None),
    ) -> None:
        """``first`` was read of ``inside`` already; ``limits``, ``looks`` and ``budgets`` are those of the way up and
        the way down, with what was read already counted but not looked at again. ``buffer`` is as
        :func:`make_buffer` makes it."""
        self.loop, self.buffer = loop, buffer
        self._on_end: Callable[[str, bool], None] | None = on_end
        self._counts = (0, 0)
        self.ended = False
        self.touched = True
        """Whether anything has moved since somebody has set this to False."""
        self._ways: tuple[_Way, ...] = (
            _Way(self, inside, outside, first, limits[0], looks[0], budgets[0]),
            _Way(self, outside, inside, b"", limits[1], looks[1], budgets[1]),
        )

    def start(self) -> None:
        """Begins; it may be over at once."""
        for way in self._ways:
            if not self.ended:
                way.start()

    @property
    def counts(self) -> tuple[int, int]:
        """Bytes up and down."""
        return self._counts if self.ended else (self._ways[0].count, self._ways[1].count)

    def over(self) -> bool:
        """Ends it where both directions have ended; then who closes the sockets passes the last end on."""
        over = all(way.ended for way in self._ways)
        if over:
            self.end("closed", broken=False)
        return over

    def end(self, reason: str, *, broken: bool) -> None:
        """Carries no more. May be called again."""
        on_end, self._on_end = self._on_end, None
        if on_end is not None:
            self._counts = self.counts
            self.ended = True
            for way in self._ways:
                way.close()
            self._ways = ()  # which know it: else what is over would be there until somebody looks for such rings
            on_end(reason, broken)
