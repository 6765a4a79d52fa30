"""What the gateway's unit tests share: a loop that runs until something is true, and connected sockets."""

from __future__ import annotations

import socket
import time
from collections.abc import Callable

import pytest

from corral.guarded import Guarded
from corral.reactor import Loop

PATIENCE = 10.0


class Bench:
    """A loop whose rounds the test makes."""

    def __init__(self) -> None:
        self.bare = Loop()
        self.faults: list[Exception] = []
        self.loop = Guarded(self.bare, self.faults.append)

    def until(self, true: Callable[[], object]) -> None:
        """Makes rounds until it is so."""
        end = time.monotonic() + PATIENCE
        while not true():
            if time.monotonic() > end:
                pytest.fail("it does not happen")
            self.bare.call_later(0.01, lambda: None)
            self.bare._round()
        assert not self.faults, self.faults

    def read(self, sock: socket.socket, count: int) -> bytes:
        """Makes rounds until so many bytes have come."""
        found = bytearray()

        def enough() -> bool:
            found.extend(everything(sock))
            return len(found) >= count

        self.until(enough)
        return bytes(found)

    def rounds(self, seconds: float) -> None:
        """Makes rounds for so long."""
        end = time.monotonic() + seconds
        self.until(lambda: time.monotonic() > end)


def pair() -> tuple[socket.socket, socket.socket]:
    """The two ends of a TCP connection over loopback; both non-blocking."""
    with socket.create_server(("127.0.0.1", 0)) as server:
        one = socket.create_connection(server.getsockname())
        other, _ = server.accept()
    for end in (one, other):
        end.setblocking(False)
    return one, other


def everything(sock: socket.socket) -> bytes:
    """What there is to read now."""
    found = b""
    while True:
        try:
            data = sock.recv(1 << 20)
        except BlockingIOError:
            return found
        if not data:
            return found
        found += data
