"""The two ends of a connection that is looked at: bytes in, bytes out, in clear or within TLS.

A stream reads while it is wanted to, and keeps what the other end does not take yet; whoever writes to it looks at
``queued`` and stops reading elsewhere. All of it belongs to the gateway's thread.
"""

from __future__ import annotations

import os
import socket
from collections.abc import Callable
from contextlib import suppress
from errno import ECONNRESET
from typing import TYPE_CHECKING

from corral.guarded import Guarded

if TYPE_CHECKING:
    import ssl

READ = 1 << 16
"""Bytes that are read at once where nothing else is said, and that go through TLS at once: its own buffers grow to what
they have held, and stay so."""
MUCH = 1 << 18
"""Bytes that are read at once of a side from which much may come."""
RECORD = 1 << 14
"""Bytes of a record of TLS, at most (RFC 8446, section 5.1)."""
MANY = 1 << 18
"""Bytes that may be queued before the other side is read no more."""


class Stream:
    """One connected socket. ``on_bytes`` gets what comes, ``on_end`` why nothing comes any more (``""``: a clean end),
    ``on_drained`` is called whenever the queue has become short again."""

    def __init__(
        self,
        loop: Guarded,
        sock: socket.socket,
        on_bytes: Callable[[bytes], None],
        on_end: Callable[[str], None],
        on_drained: Callable[[], None],
    ) -> None:
        self._loop, self.socket = loop, sock
        self._on_bytes, self._on_end, self._on_drained = on_bytes, on_end, on_drained
        self._out = bytearray()
        self._reading = self._writing = self._ended = self._shut = self._draining = False
        self.closed = False
        self.most = READ
        """Bytes that are read at once. May be changed at any time."""
        self.bytes_in = self.bytes_out = 0

    @property
    def queued(self) -> int:
        """Bytes that are written and not yet taken."""
        return len(self._out)

    def want(self, wanted: bool) -> None:
        """Whether what comes is read."""
        wanted = wanted and not self._ended and not self.closed
        if wanted != self._reading:
            self._reading = wanted
            if wanted:
                self._loop.add_reader(self.socket.fileno(), self._readable)
            else:
                self._loop.remove_reader(self.socket.fileno())

    def write(self, data: bytes) -> None:
        """Sends this, now or when the other end takes it."""
        if not self.closed and data:
            self._send(data)

    def end(self) -> None:
        """Nothing more is written; what is queued still goes out."""
        self._shut = True
        self._flush()

    def drain(self, over: Callable[[str], None]) -> None:
        """Reads on, and throws away: what is unread when a connection is closed turns its last answer into a reset.
        ``over`` is told when the other end has closed too."""
        self._on_end, self._draining = over, True
        if self._ended:
            over("")
        else:
            self.want(True)

    def close(self) -> None:
        """Both directions are over at once. May be called again."""
        if not self.closed:
            self.want(False)
            self.closed = True
            if self._writing:
                self._loop.remove_writer(self.socket.fileno())
            self._out.clear()

    # ---- bytes as they travel ----

    def _readable(self) -> None:
        try:
            data = self.socket.recv(self.most)
        except BlockingIOError:
            return
        except OSError as error:
            self._broken(error)
            return
        self.bytes_in += len(data)
        if not data:
            self._finish("")
        elif not self._draining:
            self._received(data)

    def _received(self, data: bytes) -> None:
        self._on_bytes(data)

    def _finish(self, reason: str) -> None:
        if not self._ended:
            self.want(False)
            self._ended = True
            self._on_end(reason)

    def _broken(self, error: OSError) -> None:
        reset = error.errno == ECONNRESET or isinstance(error, BrokenPipeError)
        self._finish("reset" if reset else os.strerror(error.errno or ECONNRESET).lower())

    def _send(self, data: bytes) -> None:
        if data and not self._out and not self.closed:  # most of it goes out at once, and need not be kept
            with suppress(OSError):  # which the next try says again
                sent = self.socket.send(data)
                self.bytes_out += sent
                data = data[sent:]
        self._out += data
        self._flush()

    def _flush(self) -> None:
        if self.closed:
            return
        before = len(self._out)
        try:
            while self._out:
                with memoryview(self._out) as view:
                    sent = self.socket.send(view[:MANY])
                self.bytes_out += sent
                del self._out[:sent]
        except BlockingIOError:
            pass
        except OSError as error:
            self._out.clear()
            self._wait(False)
            self._broken(error)
            return
        self._wait(bool(self._out))
        if self._shut and not self._out:
            with suppress(OSError):  # it is gone, which reading says
                self.socket.shutdown(socket.SHUT_WR)
        if before >= MANY > len(self._out) or (before and not self._out):
            self._on_drained()

    def _wait(self, waiting: bool) -> None:
        if waiting != self._writing:
            self._writing = waiting
            if waiting:
                self._loop.add_writer(self.socket.fileno(), self._flush)
            else:
                self._loop.remove_writer(self.socket.fileno())


class SecureStream(Stream):
    """The same within TLS. ``on_ready`` is called once the handshake is done; before, nothing of ours is sent."""

    def __init__(
        self,
        loop: Guarded,
        sock: socket.socket,
        context: ssl.SSLContext,
        on_bytes: Callable[[bytes], None],
        on_end: Callable[[str], None],
        on_drained: Callable[[], None],
        on_ready: Callable[[], None],
        *,
        server_side: bool,
        name: str | None = None,
        first: bytes = b"",
    ) -> None:
        """``first`` was read of the socket already; ``name`` is whose certificate the server must show."""
        super().__init__(loop, sock, on_bytes, on_end, on_drained)
        import ssl

        self._errors = ssl.SSLError
        self._more = ssl.SSLWantReadError
        self._in, self._within = ssl.MemoryBIO(), ssl.MemoryBIO()
        self.tls = context.wrap_bio(self._in, self._within, server_side=server_side, server_hostname=name)
        self._on_ready = on_ready
        self.ready = False
        """Whether the handshake is done."""
        self._announced = server_side
        """Whether the other end has said that it ends (RFC 8446, section 6.1). A server must, or what was cut off would
        look whole; clients seldom do, and nothing hangs on it."""
        self._coming = memoryview(b"")
        """What was read and not yet given to TLS; nothing but while that goes on."""
        self._plain = bytearray()
        """What was written before the handshake was done."""
        self._in.write(first)

    @property
    def queued(self) -> int:
        return len(self._plain) + len(self._out)

    def start(self) -> None:
        """Begins the handshake; wants bytes by itself until it is done."""
        self.want(True)
        self._go_on()

    def write(self, data: bytes) -> None:
        if self.closed or not data:
            return
        if not self.ready:
            self._plain += data
            return
        whole = memoryview(data)
        try:
            for at in range(0, len(data), READ):
                self.tls.write(whole[at : at + READ])
                self._send(self._within.read())
        except self._errors as error:
            self._fail(error)

    def end(self) -> None:
        try:
            if self.ready:
                self.tls.unwrap()
        except self._errors:
            pass  # the other end's close_notify may never come: RFC 8446, section 6.1, lets us end without
        self._send(self._within.read())
        super().end()

    def _received(self, data: bytes) -> None:
        self._coming = memoryview(data)
        self._go_on()
        self._coming = memoryview(b"")

    def _feed(self) -> bool:
        """Gives TLS more of what was read; whether there was any."""
        piece, self._coming = self._coming[:READ], self._coming[READ:]
        self._in.write(piece)
        return bool(piece)

    def _finish(self, reason: str) -> None:
        if not self.ready and not reason:
            reason = "the TLS handshake was broken off"
        elif not self._announced and not reason:
            reason = "TLS was broken off"
        super()._finish(reason)

    def _go_on(self) -> None:
        while not self.ready:
            try:
                self.tls.do_handshake()
                self._handshaken()
            except self._more:
                if not self._feed():
                    self._send(self._within.read())
                    return
            except self._errors as error:
                self._fail(error)
                return
        while not self.closed and self._read_records():
            pass
        if not self.closed:
            self._send(self._within.read())

    def _read_records(self) -> bool:
        """Passes on what a few records hold, in one piece; returns whether there may be more."""
        parts: list[bytes] = []
        room = self.most
        ended, problem = False, None
        while room >= RECORD and not ended and problem is None:
            try:
                parts.append(self.tls.read(RECORD))
                room -= len(parts[-1])
                ended = not parts[-1]
            except self._errors as error:
                problem = None if isinstance(error, self._more) and self._feed() else error
        data = b"".join(parts)
        if data:
            self._on_bytes(data)
        if self.closed or isinstance(problem, self._more):
            return False
        if problem is not None:
            self._fail(problem)
        elif ended:
            self._announced = True
            self._finish("")
        return problem is None and not ended

    def _handshaken(self) -> None:
        self.ready = True
        self._send(self._within.read())
        if self._plain:
            plain, self._plain = bytes(self._plain), bytearray()
            self.write(plain)
        self._on_ready()  # who looks at ``queued`` now sees what is left

    def _fail(self, error: Exception) -> None:
        self._send(self._within.read())  # an alert says why
        words = getattr(error, "verify_message", "") or getattr(error, "reason", "") or "broken"
        self._finish(f"TLS: {str(words).replace('_', ' ').lower()}")
