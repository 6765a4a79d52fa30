"""Doors of the gateway behind which no destination lies, but somebody of this process: a broker."""

from __future__ import annotations

import socket
from collections.abc import Callable
from typing import Protocol

from corral.actions import Attempt

Over = Callable[[int, int, str], None]
"""Bytes from the sandbox, bytes to it, and why a connection is over."""


class Taken(Protocol):
    """A connection that was handed over."""

    @property
    def counts(self) -> tuple[int, int]:
        """Bytes from the sandbox and to it by now. From any thread."""


class Door(Protocol):
    """Takes the connections to one name over."""

    def take(self, sock: socket.socket, attempt: Attempt, over: Over) -> Taken:
        """Nothing was read from ``sock``, which belongs to the door from here on. Called by the gateway's thread, and
        never waits. ``over`` is called once, from any thread, when the connection has ended."""
