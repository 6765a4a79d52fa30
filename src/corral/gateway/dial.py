"""Connecting to one of a name's addresses: happy eyeballs (RFC 8305), each address decided on before it is tried.

The address that was decided is the one that is dialled; nothing is looked up again in between.
"""

from __future__ import annotations

import os
import socket
from collections.abc import Callable, Sequence
from errno import EINPROGRESS, ETIMEDOUT

from corral.gateway.sockets import is_connected
from corral.guarded import Guarded
from corral.policy.names import address_of
from corral.reactor import Timer

STAGGER = 0.25
"""Seconds until the next address is tried beside those that have not answered (RFC 8305, section 5)."""
AT_ONCE = 3
"""Addresses that are tried at the same time."""
_MAX_PROXY_ANSWER = 8192

Decide = Callable[[bytes, Callable[[bool], None]], None]
"""Has an address (4 or 16 bytes) decided, and calls back whether it may be dialled, at once or later."""
Done = Callable[[socket.socket | None, bytes, str], None]
"""The connection and its address; or None, and why there is none."""


def interleaved(addresses: Sequence[bytes]) -> tuple[bytes, ...]:
    """Families in turns, beginning with the first one's (RFC 8305, section 4)."""
    if not addresses:
        return ()
    first = [address for address in addresses if len(address) == len(addresses[0])]
    second = [address for address in addresses if len(address) != len(addresses[0])]
    found: list[bytes] = []
    for index in range(max(len(first), len(second))):
        found += first[index : index + 1] + second[index : index + 1]
    return tuple(found)


class Dial:
    """One attempt to reach one of ``addresses``; calls ``done`` once after :meth:`start`, unless it is cancelled."""

    def __init__(
        self,
        loop: Guarded,
        addresses: Sequence[bytes],
        port: int,
        decide: Decide,
        done: Done,
        *,
        timeout: float,
        proxy: tuple[str, int] | None = None,
    ) -> None:
        """``timeout`` is in seconds. ``proxy`` is an HTTP proxy that makes the connection (CONNECT, RFC 9110, section
        9.3.6), to the address that was decided."""
        self._loop, self._port, self._decide, self._done, self._proxy = loop, port, decide, done, proxy
        self._left = list(interleaved(addresses))
        self._trying: dict[socket.socket, bytes] = {}
        self._answers: dict[socket.socket, bytes] = {}
        """What a proxy has said so far."""
        self._deciding = False
        self._ended = False
        self._problem = "it has no address"
        self._next_timer: Timer | None = None
        self._timer = loop.call_later(timeout, self._expired)

    def start(self) -> None:
        """Begins; it may be over at once."""
        self._next()

    def cancel(self) -> None:
        """Nobody waits any more. May be called again."""
        self._end(None)

    # ---- one address after the other ----

    def _next(self) -> None:
        self._next_timer = None
        if self._ended or self._deciding:
            return
        if not self._left:
            if not self._trying:
                self._finish(None, b"", self._problem)
            return
        address = self._left.pop(0)
        self._deciding = True
        self._decide(address, lambda allowed: self._decided(address, allowed))

    def _decided(self, address: bytes, allowed: bool) -> None:
        self._deciding = False
        if self._ended:
            return
        if allowed:
            self._try(address)
        else:
            self._problem = "refused"
            self._next()

    def refuse_rest(self) -> None:
        """What was refused was not the address: no other one will do."""
        self._left.clear()

    def _try(self, address: bytes) -> None:
        target = self._proxy or (address_of(address), self._port)
        family = socket.AF_INET6 if ":" in target[0] else socket.AF_INET
        try:
            sock = socket.socket(family, socket.SOCK_STREAM | socket.SOCK_NONBLOCK | socket.SOCK_CLOEXEC)
        except OSError as error:
            self._failed(None, error.errno or 0)
            return
        if len(self._trying) >= AT_ONCE:
            self._drop(next(iter(self._trying)))  # who has not answered by now
        self._trying[sock] = address
        problem = sock.connect_ex(target)
        if problem not in (0, EINPROGRESS):
            self._failed(sock, problem)
            return
        if is_connected(sock):  # on this machine
            self._reached(sock)
            return
        self._loop.add_writer(sock.fileno(), self._connected, sock)
        if self._left:
            self._next_timer = self._loop.call_later(STAGGER, self._next)

    def _connected(self, sock: socket.socket) -> None:
        self._loop.remove_writer(sock.fileno())
        problem = sock.getsockopt(socket.SOL_SOCKET, socket.SO_ERROR)
        if problem:
            self._failed(sock, problem)
        else:
            self._reached(sock)

    def _reached(self, sock: socket.socket) -> None:
        if self._proxy is None:
            self._finish(sock, self._trying[sock], "")
        else:
            self._ask_proxy(sock)

    def _failed(self, sock: socket.socket | None, problem: int, words: str = "") -> None:
        if sock is not None:
            self._drop(sock)
        self._problem = words or os.strerror(problem or ETIMEDOUT).lower()
        if self._next_timer is not None:
            self._next_timer.cancel()
        self._next()

    def _drop(self, sock: socket.socket) -> None:
        self._trying.pop(sock, None)
        self._answers.pop(sock, None)
        self._loop.remove_writer(sock.fileno())
        self._loop.remove_reader(sock.fileno())
        sock.close()

    # ---- through a proxy ----

    def _ask_proxy(self, sock: socket.socket) -> None:
        host = address_of(self._trying[sock])
        target = f"[{host}]:{self._port}" if ":" in host else f"{host}:{self._port}"
        try:
            sock.send(f"CONNECT {target} HTTP/1.1\r\nHost: {target}\r\n\r\n".encode("ascii"))
        except OSError as error:
            self._failed(sock, error.errno or 0)
            return
        self._answers[sock] = b""
        self._loop.add_reader(sock.fileno(), self._proxy_says, sock)

    def _proxy_says(self, sock: socket.socket) -> None:
        """Reads its answer and not a byte more: what follows is the other end's."""
        try:
            before = self._answers[sock]
            data = sock.recv(_MAX_PROXY_ANSWER, socket.MSG_PEEK)
            end = (before + data).find(b"\r\n\r\n") + 4
            data = sock.recv(end - len(before) if end > 3 else len(data)) if data else b""
        except BlockingIOError:
            return
        except OSError as error:
            self._failed(sock, error.errno or 0)
            return
        answer = self._answers[sock] = before + data
        if not data or len(answer) > _MAX_PROXY_ANSWER:
            self._failed(sock, 0, "the upstream proxy gave no answer")
        elif answer.endswith(b"\r\n\r\n"):
            self._loop.remove_reader(sock.fileno())
            words = answer.split(b"\r\n", 1)[0].split(b" ")
            if len(words) > 1 and words[0].startswith(b"HTTP/1.") and words[1] == b"200":
                self._finish(sock, self._trying[sock], "")
            else:
                self._failed(sock, 0, "the upstream proxy refused it")

    # ---- the end ----

    def _expired(self) -> None:
        self._finish(None, b"", "no answer in time")

    def _finish(self, sock: socket.socket | None, address: bytes, problem: str) -> None:
        if not self._ended:
            self._end(sock)
            self._done(sock, address, problem)

    def _end(self, kept: socket.socket | None) -> None:
        if self._ended:
            return
        self._ended = True
        self._timer.cancel()
        if self._next_timer is not None:
            self._next_timer.cancel()
        if kept is not None:
            del self._trying[kept]
            self._answers.pop(kept, None)
        for sock in list(self._trying):
            self._drop(sock)
