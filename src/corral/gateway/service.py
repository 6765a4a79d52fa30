"""The gateway: one thread of the controlling process, through which everything goes that leaves its sandboxes.

It accepts what arrives at the listeners of each sandbox's network, and answers its DNS queries. It never waits: names
are looked up by other threads, what is asked for waits in the monitor, and a peer that is slow holds up its own
connection only. What goes wrong with one connection ends that connection; what goes wrong elsewhere in a sandbox's work
ends that sandbox. When this thread is gone, all sandboxes that had it for their way out end.
"""

from __future__ import annotations

import os
import resource
import socket
import threading
from collections.abc import Callable
from contextlib import suppress
from errno import EMFILE, ENFILE, ENOBUFS, ENOMEM
from functools import partial

from corral.actions import Attempt, Kind
from corral.gateway.connection import Connection
from corral.gateway.dial import AT_ONCE
from corral.gateway.egress import MAX_FLOWS, Egress
from corral.gateway.relay import make_buffer, reset
from corral.gateway.resolver import Resolver, SystemLookup
from corral.gateway.sockets import Place, original_destination, place_of
from corral.guarded import Guarded
from corral.reactor import Loop

LOOK_AFTER = 0.5
"""Seconds between two looks at who has waited for too long."""
PER_FLOW = 1 + AT_ONCE
"""Descriptors of one connection at most: its own, and those of the addresses that are tried."""
_RESERVED = 256
"""Descriptors that are left for everything else."""
_FAILED = "its gateway failed"
_EXHAUSTED = frozenset((EMFILE, ENFILE, ENOBUFS, ENOMEM))
"""What accept(2) says where the connection stays in the queue."""


class _Doors:
    """Where one sandbox's connections and queries come in."""

    def __init__(self, gateway: Gateway, egress: Egress) -> None:
        self._gateway, self.egress = gateway, egress
        self._listeners = [socket.socket(fileno=fd) for fd in egress.setting.listeners]
        self._datagrams = [socket.socket(fileno=fd) for fd in egress.setting.datagrams]

    def open(self) -> None:
        loop = self.egress.loop
        for listener in self._listeners:
            listener.setblocking(False)
            self._listen(listener)
        for sock in self._datagrams:
            sock.setblocking(False)
            loop.add_reader(sock.fileno(), self.egress.queries.serve, sock)

    def _accept(self, listener: socket.socket, own: Place) -> None:
        """Takes one. Where there are more, the loop says so again, once others have had their turn."""
        try:
            sock, peer = listener.accept()
        except OSError as error:
            if error.errno in _EXHAUSTED:
                self._pause(listener)
            return
        sock.setblocking(False)
        try:
            local, to = place_of(peer), original_destination(sock)
        except (OSError, ValueError):
            to = (b"", 0)
        if not to[0] or to == own:
            # Somebody has found the listener itself; where to is not said.
            self._refuse(sock, "This port leads nowhere.")
        elif len(self.egress.flows) >= MAX_FLOWS or self._gateway.is_full(self.egress):
            attempt = self.egress.attempts.take(local, to)  # nor is it to be taken for a later one's
            self._refuse(sock, "This sandbox has too many connections.", to, attempt)
        else:
            self._begin(Connection(self.egress, sock, local, to))

    def _pause(self, listener: socket.socket) -> None:
        """Who waits there would be announced again at once, and nothing else be done."""
        self.egress.loop.remove_reader(listener.fileno())
        self.egress.loop.call_later(LOOK_AFTER, self._resume, listener)

    def _resume(self, listener: socket.socket) -> None:
        if listener.fileno() >= 0:
            self._listen(listener)

    def _listen(self, listener: socket.socket) -> None:
        self.egress.loop.add_reader(listener.fileno(), self._accept, listener, place_of(listener.getsockname()))

    def _begin(self, connection: Connection) -> None:
        try:
            connection.begin()
        except Exception as error:
            connection.over(f"the gateway failed ({type(error).__name__})", broken=True)

    def _refuse(
        self, sock: socket.socket, reason: str, to: Place = (b"\x7f\0\0\1", 0), attempt: Attempt | None = None
    ) -> None:
        origin = self.egress.nobody if attempt is None else attempt.decision.action.origin
        self.egress.refuse(Kind.NET_CONNECT, self.egress.endpoint(to), origin, "gateway.limits", reason)
        reset(sock)

    def close(self) -> None:
        for sock in (*self._listeners, *self._datagrams):
            if sock.fileno() >= 0:
                self.egress.loop.remove_reader(sock.fileno())
                sock.close()

    def abandon(self) -> None:
        for sock in (*self._listeners, *self._datagrams):
            sock.close()


class Gateway:
    """The thread."""

    def __init__(self) -> None:
        self.loop = Loop()
        self.loop.accept_posts()
        self.buffer = make_buffer()
        self._doors: dict[Egress, _Doors] = {}
        self._resolvers: dict[tuple[str, ...], Resolver] = {}
        self._looks = self._failed = False
        self._most = resource.getrlimit(resource.RLIMIT_NOFILE)[0] - _RESERVED
        self._room = 0
        """For how many connections there was room when they were counted last, less all that have come since."""
        self._thread = threading.Thread(target=self._run, name="corral-gateway", daemon=True)
        self._thread.start()

    def attach(self, egress: Egress) -> None:
        """From here on what the sandbox sends is taken in. May be called from any thread."""
        self._doors[egress] = _Doors(self, egress)
        self.loop.post(self._safely, egress, partial(self._start, egress))
        if self._failed:
            egress.setting.end(_FAILED)
            doors = self._doors.pop(egress, None)
            if doors is not None:
                doors.abandon()

    def detach(self, egress: Egress) -> None:
        """The sandbox is dead: its connections end. May be called from any thread."""
        self.loop.post(self._safely, egress, partial(self._stop, egress))

    def is_full(self, egress: Egress) -> bool:
        """Whether the process could not hold one more connection of this sandbox, with what it may need for it. None
        may take the last quarter of the room that others have left, so that there is some for whoever comes next."""
        self._room -= 1
        if len(egress.flows) >= 3 * self._room:
            flows = sum(len(each.flows) for each in list(self._doors))
            self._room = (self._most - _RESERVED) // PER_FLOW - flows
        return len(egress.flows) >= 3 * max(0, self._room)

    # ---- its own thread ----

    def _start(self, egress: Egress) -> None:
        doors = self._doors.get(egress)
        if doors is None:
            return
        loop = Guarded(self.loop, partial(self._fault, egress))
        egress.start(loop, self._resolver(egress.setting.policy.network.resolvers), self.buffer)
        doors.open()
        if not self._looks:
            self._look_after()

    def _resolver(self, servers: tuple[str, ...]) -> Resolver:
        """Sandboxes with the same servers share what was found."""
        found = self._resolvers.get(servers)
        if found is None:
            if servers:
                from corral.gateway.stub import StubLookup

                found = Resolver(self.loop, StubLookup(self.loop, servers))
            else:
                found = Resolver(self.loop, SystemLookup(self.loop))
            self._resolvers[servers] = found
        return found

    def _stop(self, egress: Egress) -> None:
        doors = self._doors.pop(egress, None)
        if doors is None:
            return
        egress.ended = True
        doors.close()
        for connection in list(egress.flows):
            with suppress(Exception):  # one that cannot be ended properly must not keep the others
                connection.over("the sandbox ended", broken=True)

    def _fault(self, egress: Egress, error: Exception) -> None:
        """A fault of ours in a sandbox's work: nobody knows what it has left open."""
        egress.setting.end(f"{_FAILED} ({type(error).__name__})")
        self._stop(egress)

    def _safely(self, egress: Egress, work: Callable[[], None]) -> None:
        try:
            work()
        except Exception as error:
            egress.setting.end(f"{_FAILED} ({type(error).__name__})")

    def _look_after(self) -> None:
        for egress in list(self._doors):
            self._safely(egress, egress.look_after)
        self._looks = bool(self._doors)
        if self._looks:
            self.loop.call_later(LOOK_AFTER, self._look_after)

    def _run(self) -> None:
        global _shared
        try:
            self.loop.run()
        finally:
            self._failed = True
            if _shared is self:
                _shared = None
            for egress in list(self._doors):
                egress.setting.end(_FAILED)
                with suppress(Exception):  # nor may one sandbox keep this from ending the others
                    self._stop(egress)

    def abandon(self) -> None:
        """In a child of the process: what came with the fork is let go of, as the parent uses it."""
        self.loop.close()
        for doors in self._doors.values():
            doors.abandon()
            for connection in doors.egress.flows:
                connection.abandon()


_shared: Gateway | None = None
_lock = threading.Lock()


def shared() -> Gateway:
    """The gateway of this process; started with the first sandbox that has a way out."""
    global _shared
    with _lock:
        if _shared is None:
            _shared = Gateway()
        return _shared


def _after_fork() -> None:
    """A child has none of its parent's threads, and none of its sandboxes to serve."""
    global _shared, _lock
    parents, _shared, _lock = _shared, None, threading.Lock()
    if parents is not None:
        parents.abandon()


os.register_at_fork(after_in_child=_after_fork)
