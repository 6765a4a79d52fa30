"""What the supervisor knows of the way out: which name an address was handed out for, and whom to tell who comes.

The gateway is behind it; neither knows the other (docs/architecture.md).
"""

from __future__ import annotations

from socket import AF_INET
from typing import Protocol

from corral.actions import Attempt, Decision, Endpoint, Opinion, Transport, Verdict
from corral.policy.matching import packed_address
from corral.policy.names import unmapped
from corral.supervisor.sockets import Copy

DNS_PORT = 53
_LOOPBACK6 = bytes(15) + b"\x01"


class Egress(Protocol):
    """The way out of one sandbox. Used by the supervisor's thread."""

    def name_of(self, packed: bytes) -> str | None:
        """The name for which this address (4 or 16 bytes) was handed out inside, if it was."""

    def note(self, attempt: Attempt) -> None:
        """What arrives from there to there was let through."""


def named(egress: Egress | None, endpoint: Endpoint) -> Endpoint:
    """The endpoint by its name, where its address stands for one."""
    if egress is None or not endpoint.address:
        return endpoint
    name = egress.name_of(packed_address(endpoint.address))
    return endpoint if name is None else Endpoint(endpoint.transport, port=endpoint.port, name=name)


def undeliverable(egress: Egress | None, endpoint: Endpoint) -> Opinion | None:
    """The refusal of datagrams that would arrive nowhere: all but those within the sandbox, and DNS queries."""
    if egress is None or endpoint.transport is not Transport.UDP or endpoint.port == DNS_PORT:
        return None
    packed = packed_address(endpoint.address) if endpoint.address else b""
    if (packed[:1] == b"\x7f" and len(packed) == 4) or packed == _LOOPBACK6:
        return None
    return Opinion(Verdict.DENY, "gateway.udp", "Only TCP and DNS queries leave a sandbox.", "Use TCP.")


def note(egress: Egress | None, copy: Copy, remote: bytes, decision: Decision | None) -> None:
    """Tells the way out who is coming, once the kernel has given the socket its own address. Raises OSError."""
    if egress is None or decision is None:
        return
    transport = copy.transport
    to = _address(remote)
    if transport is Transport.UDP and to[1] != DNS_PORT:
        return  # it arrives nowhere
    egress.note(Attempt(transport, _address(copy.name()), to, decision))


def _address(raw: bytes) -> tuple[bytes, int]:
    """Address and port of ``struct sockaddr_in`` or ``sockaddr_in6``."""
    port = int.from_bytes(raw[2:4], "big")
    if int.from_bytes(raw[:2], "little") == AF_INET:
        return raw[4:8], port
    return unmapped(raw[8:24]), port
