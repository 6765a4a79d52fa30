"""Who is coming: what the supervisor let through, until it arrives here.

A connection is known by its four numbers, a socket that sends datagrams by its own address and port, or by its port
alone where it has no address. The supervisor notes an attempt right after the kernel has made it, so what arrives may
be early by a moment; :meth:`Attempts.settle` waits for the supervisor to have finished what it was doing. What nobody
is known to have made is refused.
"""

from __future__ import annotations

import threading
import time
from collections import OrderedDict
from collections.abc import Callable
from operator import itemgetter

from corral.actions import Attempt, Transport

MAX_CONNECTIONS = 8192
"""Attempts that are remembered. Where more are on their way than that, the oldest are forgotten, and refused."""
MAX_SENDERS = 1024
FRESH = 30.0
"""Seconds for which a connection may be on its way."""

Place = tuple[bytes, int]


class Attempts:
    """Those of one sandbox. ``note`` is the supervisor's, all else the gateway's."""

    def __init__(self, settle: Callable[[Callable[[], None]], None]) -> None:
        """``settle`` has its argument called, from any thread, once what the supervisor does now is done."""
        self.settle = settle
        self._lock = threading.Lock()
        self._connections: OrderedDict[tuple[Place, Place], tuple[float, Attempt]] = OrderedDict()
        self._senders: OrderedDict[tuple[int, Place], tuple[int, Attempt]] = OrderedDict()
        self._count = 0

    def note(self, attempt: Attempt) -> None:
        """From the supervisor's thread."""
        with self._lock:
            if attempt.transport is Transport.TCP:
                self._connections[attempt.local, attempt.remote] = time.monotonic(), attempt
                if len(self._connections) > MAX_CONNECTIONS:
                    self._connections.popitem(last=False)
            else:
                # A socket of both families says "::" of itself; what it sends to says which of them it is.
                address, port = attempt.local
                key = len(attempt.remote[0]), (address if any(address) else b"", port)
                self._count += 1
                self._senders[key] = self._count, attempt
                self._senders.move_to_end(key)
                if len(self._senders) > MAX_SENDERS:
                    self._senders.popitem(last=False)

    def take(self, local: Place, remote: Place) -> Attempt | None:
        """Whose connection this is; each is taken once."""
        with self._lock:
            found = self._connections.pop((local, remote), None)
        return None if found is None else found[1]

    def take_translated(self, remote: Place) -> Attempt | None:
        """The same for a connection whose own port the kernel had to change, because the redirected one would have been
        another's double: the oldest that went there and has not arrived. All that went there were decided alike; at
        worst two processes are taken for each other."""
        before = time.monotonic() - FRESH
        with self._lock:
            for key, (noted, attempt) in self._connections.items():
                if key[1] == remote and noted >= before:
                    del self._connections[key]
                    return attempt
        return None

    def sender(self, local: Place) -> Attempt | None:
        """Who sends datagrams from there: of the socket with this address and the one without any, where both were
        noted, the later, as a port may have been let go of and taken again."""
        address, port = local
        with self._lock:
            keys = ((len(address), (address, port)), (len(address), (b"", port)))
            found = [self._senders[key] for key in keys if key in self._senders]
        return max(found, key=itemgetter(0))[1] if found else None
