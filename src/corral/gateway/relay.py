"""Carries bytes both ways between two connections, without looking at them, in the kernel (splice(2)).

A relay holds at most one pipe a direction, and only while bytes are in it; a reader that is slow holds up the writer
and nobody else. The end of one direction is passed on (half-close), and so is a reset.

What was decided on is never carried by splice: pages that an agent has sent by sendfile(2) or vmsplice(2) are still its
own, and can change until they are copied. The first bytes were read, and come as ``first``.
"""

from __future__ import annotations

import os
import socket
import struct
from collections.abc import Callable
from contextlib import suppress
from errno import EAGAIN
from fcntl import F_SETPIPE_SZ, fcntl
from typing import Protocol

from corral.gateway.rules import SPENT, Budget, Budgets
from corral.guarded import Guarded

CHUNK = 1 << 19
"""Bytes that are moved in one go."""
LITTLE = 1 << 14
"""Where no more than that was there, nothing is left for now: to try again would only say so."""
ROUNDS = 4
"""How often in a row before others have their turn."""
MAX_POOLED = 32
"""Empty pipes that are kept for the next."""
_FLAGS = os.SPLICE_F_NONBLOCK | os.SPLICE_F_MOVE
_RESET = struct.pack("ii", 1, 0)


class Look(Protocol):
    """Sees what is about to be passed on."""

    @property
    def done(self) -> bool:
        """Whether it has seen enough: the rest is carried by the kernel."""

    def feed(self, data: bytes) -> str:
        """Returns why this is not passed on, or ``""``."""


def reset(sock: socket.socket) -> None:
    """Closes a connection so that its other end gets a reset (socket(7), SO_LINGER)."""
    with suppress(OSError):
        sock.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, _RESET)
    sock.close()


class Pipes:
    """Empty pipes."""

    def __init__(self) -> None:
        self._free: list[tuple[int, int]] = []

    def take(self) -> tuple[int, int]:
        """A pipe's ends. Raises OSError (EMFILE)."""
        if self._free:
            return self._free.pop()
        ends = os.pipe2(os.O_NONBLOCK | os.O_CLOEXEC)
        with suppress(OSError):  # over the user's quota (pipe(7)): it is smaller
            fcntl(ends[1], F_SETPIPE_SZ, CHUNK)
        return ends

    def give(self, pipe: tuple[int, int], *, empty: bool) -> None:
        """Back for the next; one that is not empty is closed."""
        if empty and len(self._free) < MAX_POOLED:
            self._free.append(pipe)
        else:
            for end in pipe:
                os.close(end)

    def close(self) -> None:
        while self._free:
            for end in self._free.pop():
                os.close(end)


class _Way:
    """One direction."""

    __slots__ = (
        "_budget",
        "_first",
        "_held",
        "_look",
        "_pipe",
        "_relay",
        "_source",
        "_target",
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
        self._pipe: tuple[int, int] | None = None
        self._held = 0
        """Bytes in the pipe."""
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
            room = CHUNK if self.limit is None else min(CHUNK, self.limit - self.count + 1)
            try:
                got = self._read(room)
            except BlockingIOError:
                break
            except OSError as error:
                self._relay.end(_named(error, "the connection broke"), broken=True)
                return
            if self._relay.ended:
                return
            if got == 0:
                self._finish()
                return
            if not self._admit(got):
                return
            if not self._flush():
                self._wait()
                return
            if got <= LITTLE:
                break
        self._give_back()

    def _read(self, room: int) -> int:
        if self._look is None:
            if self._pipe is None:
                self._pipe = self._relay.pipes.take()
            got = os.splice(self._source.fileno(), self._pipe[1], room, flags=_FLAGS)
            self._held += got
            return got
        data = self._source.recv(min(room, 1 << 16))
        problem = self._look.feed(data) if data else ""
        if problem:
            self._relay.end(problem, broken=True)
        elif self._look.done:
            self._look = None
        self._first = memoryview(data)
        return len(data)

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

    def _flush(self) -> bool:
        """Whether all is passed on. Ends the relay where it cannot be."""
        try:
            while self._first:
                self._first = self._first[self._target.send(self._first) :]
            while self._held and self._pipe is not None:
                self._held -= os.splice(self._pipe[0], self._target.fileno(), self._held, flags=_FLAGS)
        except BlockingIOError:
            return False
        except OSError as error:
            self._relay.end(_named(error, "the other end is gone"), broken=True)
            return False
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
            self._give_back()

    def _finish(self) -> None:
        """The source has said all that it had to say."""
        self.ended = True
        self._relay.loop.remove_reader(self._source.fileno())
        self._give_back()
        if not self._relay.over():
            with suppress(OSError):  # it is gone: its own direction says so
                self._target.shutdown(socket.SHUT_WR)

    def _give_back(self) -> None:
        if self._pipe is not None:
            pipe, self._pipe = self._pipe, None
            self._relay.pipes.give(pipe, empty=not self._held)
            self._held = 0

    def close(self) -> None:
        self._give_back()
        self._first = memoryview(b"")


def _named(error: OSError, otherwise: str) -> str:
    return "reset" if isinstance(error, ConnectionError) else f"{otherwise} ({os.strerror(error.errno or EAGAIN)})"


class Relay:
    """Both directions. Closes neither socket: ``on_end`` (why, whether it broke) is called once, for that."""

    __slots__ = ("_on_end", "_ways", "ended", "loop", "pipes", "touched")

    def __init__(
        self,
        loop: Guarded,
        pipes: Pipes,
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
        the way down, with what was read already counted but not looked at again."""
        self.loop, self.pipes = loop, pipes
        self._on_end = on_end
        self.ended = False
        self.touched = True
        """Whether anything has moved since somebody has set this to False."""
        self._ways = (
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
        return self._ways[0].count, self._ways[1].count

    def over(self) -> bool:
        """Ends it where both directions have ended; then who closes the sockets passes the last end on."""
        over = self._ways[0].ended and self._ways[1].ended
        if over:
            self.end("closed", broken=False)
        return over

    def end(self, reason: str, *, broken: bool) -> None:
        """Carries no more. May be called again."""
        if not self.ended:
            self.ended = True
            for way in self._ways:
                way.close()
            self._on_end(reason, broken)
