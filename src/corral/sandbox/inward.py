"""Inward services: a port inside whose connections arrive in the controller, and nowhere else.

The listener is created in the sandbox's network namespace and accepted out here, so the sandbox needs no route, no
device and no address of the host. This module carries such connections to one fixed address that the operator named;
the gateway stands on listeners of its own.
"""

from __future__ import annotations

import os
import socket
from contextlib import suppress

from corral.errors import RequestError
from corral.reactor import Reactor

MAX_CONNECTIONS = 256
_CHUNK = 1 << 16


class _Pump:
    """Carries bytes one way between two non-blocking sockets; reads again only when all is written."""

    def __init__(self, link: _Link, source: socket.socket, target: socket.socket) -> None:
        self._link, self._source, self._target = link, source, target
        self._left = memoryview(b"")
        self.ended = False
        link.reactor.add_reader(source.fileno(), self._read)

    def _read(self) -> None:
        try:
            data = self._source.recv(_CHUNK)
        except BlockingIOError:
            return
        except OSError:
            self._link.close()
            return
        if not data:
            self.ended = True
            self._link.reactor.remove_reader(self._source.fileno())
            with suppress(OSError):
                self._target.shutdown(socket.SHUT_WR)
            self._link.half_closed()
            return
        self._left = memoryview(data)
        self._write()

    def _write(self) -> None:
        reactor = self._link.reactor
        try:
            while self._left:
                self._left = self._left[self._target.send(self._left) :]
        except BlockingIOError:
            reactor.remove_reader(self._source.fileno())
            reactor.add_writer(self._target.fileno(), self._write_more)
        except OSError:
            self._link.close()

    def _write_more(self) -> None:
        reactor = self._link.reactor
        reactor.remove_writer(self._target.fileno())
        reactor.add_reader(self._source.fileno(), self._read)
        self._write()


class _Link:
    """One connection inside and its counterpart outside."""

    def __init__(self, forward: Forward, inside: socket.socket) -> None:
        self.reactor = forward.reactor
        self._forward, self._inside = forward, inside
        self._pumps: tuple[_Pump, ...] = ()
        self._outside = socket.socket(forward.family, socket.SOCK_STREAM | socket.SOCK_CLOEXEC | socket.SOCK_NONBLOCK)
        self._inside.setblocking(False)
        try:
            self._outside.connect(forward.address)
        except BlockingIOError:
            self.reactor.add_writer(self._outside.fileno(), self._connected)
        except OSError:
            self.close()
        else:
            self._begin()

    def _connected(self) -> None:
        self.reactor.remove_writer(self._outside.fileno())
        if self._outside.getsockopt(socket.SOL_SOCKET, socket.SO_ERROR):
            self.close()
        else:
            self._begin()

    def _begin(self) -> None:
        self._pumps = (_Pump(self, self._inside, self._outside), _Pump(self, self._outside, self._inside))

    def half_closed(self) -> None:
        if all(pump.ended for pump in self._pumps):
            self.close()

    def close(self) -> None:
        for end in (self._inside, self._outside):
            if end.fileno() >= 0:
                self.reactor.remove_reader(end.fileno())
                self.reactor.remove_writer(end.fileno())
                end.close()
        self._forward.links.discard(self)


class Forward:
    """Accepts on ``listener`` (a descriptor that is duplicated) and carries each connection to ``host:port``.

    Raises RequestError for an address that is no literal IP address: names are resolved by nobody here.
    """

    def __init__(self, reactor: Reactor, listener: int, host: str, port: int) -> None:
        self.reactor = reactor
        self.links: set[_Link] = set()
        self.family = socket.AF_INET6 if ":" in host else socket.AF_INET
        try:
            socket.inet_pton(self.family, host)
        except OSError:
            raise RequestError(f"{host!r} is not an IP address") from None
        self.address = (host, port)
        self._listener = socket.socket(fileno=os.dup(listener))
        self._listener.setblocking(False)
        reactor.add_reader(self._listener.fileno(), self._accept)

    def _accept(self) -> None:
        while len(self.links) < MAX_CONNECTIONS:
            try:
                inside, _ = self._listener.accept()
            except OSError:
                return
            self.links.add(_Link(self, inside))
        # More than that is a flood: refuse by closing at once, so that the queue does not stay readable.
        with suppress(OSError):
            self._listener.accept()[0].close()

    def close(self) -> None:
        """Stops accepting and cuts what is open."""
        if self._listener.fileno() >= 0:
            self.reactor.remove_reader(self._listener.fileno())
            self._listener.close()
        for link in list(self.links):
            link.close()
