"""From a destination that was decided on to a connection: its addresses, each decided on, one of them dialled."""

from __future__ import annotations

import socket
from collections.abc import Callable
from typing import TYPE_CHECKING

from corral.actions import Attempt, Decision, Endpoint, Kind
from corral.gateway.dial import Dial
from corral.gateway.reach import why_protected
from corral.gateway.resolver import Resolved
from corral.policy.names import address_of

if TYPE_CHECKING:
    from corral.gateway.egress import Egress
    from corral.monitor.parts import Held

KEEP_ALIVE = 60
"""Seconds of silence after which the kernel asks whether the other end is there (tcp(7), TCP_KEEPIDLE)."""

Done = Callable[[socket.socket | None, str], None]
"""The connection; or None, and why there is none (``""``: :attr:`Outward.refused` says it)."""


class Outward:
    """Reaches one destination for one connection. ``done`` is called once after :meth:`start`, unless cancelled."""

    def __init__(
        self, egress: Egress, attempt: Attempt, endpoint: Endpoint, address: bytes, patience: float, done: Done
    ) -> None:
        """``endpoint`` is the destination with what is spoken; ``address`` counts where it has no name. ``patience`` is
        in seconds, for all addresses together."""
        self._egress, self._attempt, self._address, self._patience = egress, attempt, address, patience
        self._done: Done | None = done
        self.endpoint = endpoint
        """With the address that was tried last."""
        self.refused: Decision | None = None
        """The first refusal of an address."""
        self.allowed: Decision | None = None
        self._held: Held | None = None
        self._dial: Dial | None = None
        self._over = False

    def start(self) -> None:
        """Begins; it may be over at once."""
        name = self.endpoint.name
        if name is None:
            self._resolved(Resolved((self._address,), 0.0))
            return
        self._egress.resolve(name, self._resolved)

    def cancel(self) -> None:
        """Nobody waits any more. May be called again."""
        self._over, self._done = True, None
        if self._held is not None:
            held, self._held = self._held, None
            held.withdraw()
        if self._dial is not None:
            dial, self._dial = self._dial, None
            dial.cancel()

    def _resolved(self, resolved: Resolved) -> None:
        if self._over:
            return
        if not resolved.addresses:
            self._finish(None, resolved.problem or "it has no address")
            return
        self._dial = Dial(
            self._egress.loop,
            resolved.addresses,
            self.endpoint.port,
            self._may_be_dialled,
            self._dialled,
            timeout=self._patience,
            proxy=proxy_of(self._egress.setting.policy.network.proxy),
        )
        self._dial.start()

    def _to(self, address: bytes, protected: bool) -> Endpoint:
        """The destination at one of its addresses."""
        self._address = address
        old = self.endpoint
        return Endpoint(old.transport, address_of(address), old.port, old.name, "", old.protocol, protected)

    def _may_be_dialled(self, address: bytes, answered: Callable[[bool], None]) -> None:
        why = why_protected(address)
        self.endpoint = endpoint = self._to(address, bool(why))

        def decided(decision: Decision) -> None:
            self._held = None
            if self._over:
                return
            if decision.allowed:
                self.allowed = decision
            else:
                self.refused = self.refused or decision
                if not why and self._dial is not None:
                    self._dial.refuse_rest()  # it was not for this address that it was refused
            answered(decision.allowed)

        held = self._egress.decide(
            Kind.NET_CONNECT,
            endpoint,
            self._attempt.decision.action.origin,
            decided,
            following=self._attempt.decision,
        )
        if held is not None:  # else it is decided, and what may be held by now is the next address
            self._held = held

    def _dialled(self, sock: socket.socket | None, address: bytes, problem: str) -> None:
        self._dial = None
        if sock is None:
            self._finish(None, "" if self.refused is not None and self.allowed is None else problem)
            return
        if address != self._address:
            self.endpoint = self._to(address, self.endpoint.protected)
        sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        sock.setsockopt(socket.SOL_SOCKET, socket.SO_KEEPALIVE, 1)
        sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_KEEPIDLE, KEEP_ALIVE)
        self._finish(sock, "")

    def _finish(self, sock: socket.socket | None, problem: str) -> None:
        """Says so once, and forgets whom: who knows us would be freed late."""
        done, self._done = self._done, None
        if done is not None:
            done(sock, problem)
        elif sock is not None:
            sock.close()


def proxy_of(text: str | None) -> tuple[str, int] | None:
    """Address and port of ``http://192.0.2.1:3128``."""
    if text is None:
        return None
    host, _, port = text.removeprefix("http://").rpartition(":")
    return host.removeprefix("[").removesuffix("]"), int(port)
