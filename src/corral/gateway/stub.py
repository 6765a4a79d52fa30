"""A stub resolver (RFC 1035, section 5.3.1) that asks the servers which a policy names, for A and AAAA.

Each question has a random id and a port of its own, and the answer must come from whom it was asked and repeat it (RFC
5452). What is truncated is asked again over TCP. Messages are read by dnspython.
"""

from __future__ import annotations

import secrets
import socket
from collections.abc import Callable
from errno import EINPROGRESS
from functools import partial

import dns.flags
import dns.message
import dns.rcode
import dns.rdataclass
import dns.rdatatype

from corral.gateway.resolver import MAX_ADDRESSES, MAX_WAITING, Done, Resolved
from corral.policy.matching import packed_address
from corral.reactor import Loop, Timer

PATIENCE = 2.0
"""Seconds until the next server is asked."""
ROUNDS = 2
"""How often each server is asked."""
MAX_MESSAGE = 65535
_KINDS = (dns.rdatatype.AAAA, dns.rdatatype.A)  # in the order of preference (RFC 6724)
_MAX_ALIASES = 16

Server = tuple[str, int]


def server_of(text: str) -> Server:
    """The address and port of ``192.0.2.53``, ``192.0.2.53:5353`` or ``[2001:db8::53]:53``."""
    if text.startswith("["):
        host, _, port = text[1:].partition("]:")
        return host, int(port or 53)
    if text.count(":") == 1:
        host, _, port = text.partition(":")
        return host, int(port)
    return text, 53


class StubLookup:
    """As :class:`corral.gateway.resolver.Lookup`."""

    each = MAX_WAITING  # it holds but sockets, and gives up by itself

    def __init__(self, loop: Loop, servers: tuple[str, ...]) -> None:
        self._loop = loop
        self._servers = tuple(map(server_of, servers))

    def resolve(self, name: str, done: Done) -> None:
        found: dict[int, Resolved] = {}

        def heard(kind: dns.rdatatype.RdataType, answer: Resolved) -> None:
            found[kind] = answer
            if len(found) == len(_KINDS):
                done(_together([found[kind] for kind in _KINDS]))

        for kind in _KINDS:
            _Question(self._loop, self._servers, name, kind, partial(heard, kind))

    def close(self) -> None:
        """Questions that are open end by themselves."""


def _together(answers: list[Resolved]) -> Resolved:
    addresses = tuple(dict.fromkeys(address for answer in answers for address in answer.addresses))[:MAX_ADDRESSES]
    if addresses:
        return Resolved(addresses, min(answer.kept for answer in answers if answer.addresses))
    return Resolved((), 1.0, next(answer.problem for answer in answers))


class _Question:
    """One question, put to one server after the other."""

    def __init__(
        self,
        loop: Loop,
        servers: tuple[Server, ...],
        name: str,
        kind: dns.rdatatype.RdataType,
        done: Callable[[Resolved], None],
    ) -> None:
        self._loop, self._done = loop, done
        self._left = list(servers) * ROUNDS
        self._name, self._kind = name, kind
        self._socket: socket.socket | None = None
        self._timer: Timer | None = None
        self._problem = "no resolver of the policy answers"
        self._buffer = b""
        self._next()

    def _next(self) -> None:
        self._let_go()
        if not self._left:
            self._done(Resolved((), 1.0, self._problem))
            return
        self._server = self._left.pop(0)
        self._query = dns.message.make_query(f"{self._name}.", self._kind, id=secrets.randbelow(1 << 16), use_edns=0)
        self._ask(socket.SOCK_DGRAM)

    def _ask(self, kind: socket.SocketKind) -> None:
        family = socket.AF_INET6 if ":" in self._server[0] else socket.AF_INET
        self._timer = self._loop.call_later(PATIENCE, self._next)
        self._buffer = b""
        try:
            self._socket = sock = socket.socket(family, kind | socket.SOCK_NONBLOCK | socket.SOCK_CLOEXEC)
            problem = sock.connect_ex(self._server)
            if kind is socket.SOCK_DGRAM:
                sock.send(self._query.to_wire())
                self._loop.add_reader(sock.fileno(), self._datagram)
            elif problem in (0, EINPROGRESS):
                self._loop.add_writer(sock.fileno(), self._connected)
            else:
                self._soon()
        except OSError:
            self._soon()

    def _soon(self) -> None:
        """The next server, but not from within the callback of this one's socket."""
        self._let_go()
        self._timer = self._loop.call_later(0, self._next)

    def _let_go(self) -> None:
        if self._timer is not None:
            self._timer.cancel()
            self._timer = None
        if self._socket is not None:
            self._loop.remove_reader(self._socket.fileno())
            self._loop.remove_writer(self._socket.fileno())
            self._socket.close()
            self._socket = None

    def _datagram(self) -> None:
        assert self._socket is not None  # noqa: S101 - its reader
        try:
            data = self._socket.recv(MAX_MESSAGE)
        except BlockingIOError:
            return
        except OSError:
            self._soon()
            return
        answer = self._read(data)
        if answer is None:
            return  # somebody else's, or garbage: the right one may still come
        if answer.flags & dns.flags.TC:
            self._let_go()
            self._ask(socket.SOCK_STREAM)
        else:
            self._heard(answer)

    def _connected(self) -> None:
        assert self._socket is not None  # noqa: S101 - its writer
        self._loop.remove_writer(self._socket.fileno())
        wire = self._query.to_wire()
        try:
            self._socket.send(len(wire).to_bytes(2, "big") + wire)
        except OSError:
            self._soon()
            return
        self._loop.add_reader(self._socket.fileno(), self._stream)

    def _stream(self) -> None:
        assert self._socket is not None  # noqa: S101 - its reader
        try:
            data = self._socket.recv(MAX_MESSAGE)
        except BlockingIOError:
            return
        except OSError:
            data = b""
        self._buffer += data
        length = int.from_bytes(self._buffer[:2], "big") + 2
        if not data or len(self._buffer) > MAX_MESSAGE + 2:
            self._soon()
        elif len(self._buffer) >= max(length, 3):
            answer = self._read(self._buffer[2:length])
            if answer is None:
                self._soon()
            else:
                self._heard(answer)

    def _read(self, data: bytes) -> dns.message.Message | None:
        try:
            answer = dns.message.from_wire(data, ignore_trailing=False)
            return answer if self._query.is_response(answer) else None
        except Exception:  # whatever a stranger's bytes do to the parser: the loop is everybody's
            return None

    def _heard(self, answer: dns.message.Message) -> None:
        code = answer.rcode()
        if code not in (dns.rcode.NOERROR, dns.rcode.NXDOMAIN):
            self._problem = f"the resolver of the policy says {dns.rcode.to_text(code)}"
            self._soon()
            return
        self._let_go()
        addresses, kept = _addresses(answer, self._kind)
        problem = "" if addresses else "it has no address"
        self._done(Resolved(addresses, kept, problem))


def _addresses(answer: dns.message.Message, kind: dns.rdatatype.RdataType) -> tuple[tuple[bytes, ...], float]:
    """The addresses of what was asked for, its aliases followed (RFC 1034, section 3.6.2), and the shortest TTL."""
    name, kept = answer.question[0].name, 60.0
    for _ in range(_MAX_ALIASES):
        found = answer.get_rrset(answer.answer, name, dns.rdataclass.IN, kind)
        if found is not None:
            addresses = tuple(packed_address(item.address) for item in found)
            return addresses[:MAX_ADDRESSES], min(kept, float(found.ttl))
        alias = answer.get_rrset(answer.answer, name, dns.rdataclass.IN, dns.rdatatype.CNAME)
        if alias is None:
            break
        name, kept = alias[0].target, min(kept, float(alias.ttl))
    return (), 1.0
