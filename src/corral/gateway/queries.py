"""DNS of one sandbox: each question is decided by its name, and answered with addresses of our own.

Nothing is forwarded. A name that the policy allows gets a pair of addresses that stand for it in this sandbox; any
other does not exist. So no query leaves, and what is asked carries nothing to anybody.
"""

from __future__ import annotations

import socket
from collections.abc import Callable
from contextlib import suppress
from functools import partial
from typing import TYPE_CHECKING

from corral.actions import Attempt, Decision, Endpoint, Kind, Opinion, Origin, Transport, Verdict
from corral.gateway import dns
from corral.gateway.dns import Malformed, Outcome, Question
from corral.gateway.names import NamesFull, Pair
from corral.gateway.sockets import Place, answer_datagram, place_of, receive_datagram
from corral.policy.names import address_of

if TYPE_CHECKING:
    from corral.gateway.egress import Egress
    from corral.monitor.parts import Held

AT_ONCE = 8
"""Datagrams that are read before others have their turn."""
MAX_WAITING = 256
"""Queries of one sandbox that wait; further ones are dropped, as the network does, and asked again by their client."""
_SIZE = 4096

Reply = Callable[[bytes], None]


class Queries:
    """Answers what one sandbox asks, on its datagram sockets and on connections to port 53."""

    def __init__(self, egress: Egress) -> None:
        self._egress = egress
        self._waiting = 0
        self._held: set[Held] = set()
        """Those of datagrams that wait for a person."""

    @property
    def crowded(self) -> bool:
        """Whether no more may wait."""
        return self._waiting + len(self._held) >= MAX_WAITING

    # ---- datagrams ----

    def serve(self, sock: socket.socket) -> None:
        """What is there to read on a socket."""
        for _ in range(AT_ONCE):
            try:
                data, sender, to = receive_datagram(sock, _SIZE)
            except OSError:
                return  # nothing more, or an error of an answer that nobody waited for
            if data and not self.crowded:
                self._datagram(sock, data, sender, to)

    def _datagram(self, sock: socket.socket, data: bytes, sender: tuple[str, int], to: Place) -> None:
        def reply(message: bytes) -> None:
            with suppress(OSError):  # its client is gone
                answer_datagram(sock, message, sender, to[0])

        attempts = self._egress.attempts
        source = place_of(sender)
        attempt = attempts.sender(source)
        if attempt is not None:
            self.ask(data, attempt, to, reply, self._held)
            return

        def late() -> None:
            self._waiting -= 1
            self.ask(data, attempts.sender(source), to, reply, self._held)

        self._waiting += 1
        attempts.settle(partial(self._egress.loop.post, late))

    # ---- a question ----

    def ask(
        self,
        data: bytes,
        attempt: Attempt | None,
        to: Place,
        reply: Reply,
        held: set[Held],
        *,
        limit: int = dns.MAX_DATAGRAM,
    ) -> None:
        """Has one message decided and answers it with ``reply``, at once or later: until then it is among ``held``."""
        origin = self._egress.nobody if attempt is None else attempt.decision.action.origin
        question = dns.read(data, limit=limit)
        if isinstance(question, Malformed):
            self._refuse(origin, Endpoint(Transport.UDP, address_of(to[0]), to[1]), f"The query {question.reason}.")
            if question.reply:
                reply(question.reply)
            return
        if question.address is not None:
            self._pointer(question, question.address, reply)
            return
        endpoint = Endpoint(Transport.UDP, name=question.name or question.shown)
        if attempt is None:
            self._refuse(origin, endpoint, "Nobody in the sandbox is known to have asked this.")
            reply(dns.answer(question, None, Outcome.REFUSED))
        elif question.name is None:
            self._refuse(origin, endpoint, f"The name {question.reason}.")
            reply(dns.answer(question, None, Outcome.UNKNOWN, reason=question.reason))
        else:
            waits: Held | None = None

            def decided(decision: Decision) -> None:
                if waits is not None:
                    held.discard(waits)
                self._decided(question, origin, endpoint, reply, decision)

            waits = self._egress.decide(Kind.NET_RESOLVE, endpoint, origin, decided)
            if waits is not None:
                held.add(waits)

    def _decided(
        self, question: Question, origin: Origin, endpoint: Endpoint, reply: Reply, decision: Decision
    ) -> None:
        if not decision.allowed:
            reason = "" if decision.private else decision.reason
            reply(dns.answer(question, None, Outcome.UNKNOWN, reason=reason))
            return
        try:
            pair, problem = self._addresses(question.name or "")
        except NamesFull as full:
            pair, problem = None, str(full)
        if pair is None:
            self._refuse(origin, endpoint, f"The name {problem}.")
            reply(dns.answer(question, None, Outcome.UNKNOWN, reason=problem))
        else:
            reply(dns.answer(question, pair, Outcome.ADDRESS))

    def _addresses(self, name: str) -> tuple[Pair | None, str]:
        """The addresses that stand for a name, or why it gets none."""
        zone = self._egress.rules.zone(name)
        if zone is None:
            return None, "is allowed by no rule that names it"
        problem = self._egress.tunnelling.judge(name, zone) if zone else ""
        if problem:
            return None, problem
        return self._egress.names.addresses(name), ""

    def _pointer(self, question: Question, address: bytes, reply: Reply) -> None:
        """Only our own addresses have names, and whoever has one knows its name."""
        name = self._egress.names.name_of(address)
        outcome = Outcome.UNKNOWN if name is None else Outcome.ADDRESS
        reply(dns.answer(question, None, outcome, pointer=name or ""))

    def _refuse(self, origin: Origin, endpoint: Endpoint, reason: str) -> None:
        own = Opinion(Verdict.DENY, "gateway.dns", reason)
        self._egress.decide(Kind.NET_RESOLVE, endpoint, origin, _recorded, own=own)


def _recorded(decision: Decision) -> None:
    """It was refused before anybody was asked."""


class Stream:
    """Questions over TCP (RFC 7766): one connection, bounded in length."""

    MAX_QUESTIONS = 1024
    MAX_QUESTION = 4096
    """Bytes; questions have less than 512."""
    MAX_HELD = 16
    """Questions that wait for a person."""

    def __init__(self, queries: Queries, attempt: Attempt, to: Place, write: Reply) -> None:
        self._queries, self._attempt, self._to, self._write = queries, attempt, to, write
        self._frames = dns.Frames(self.MAX_QUESTION)
        self._held: set[Held] = set()
        self.left = self.MAX_QUESTIONS

    def feed(self, data: bytes) -> bool:
        """Takes what was read; returns whether the connection may go on."""
        try:
            messages = self._frames.feed(data)
        except dns.FramingError:
            return False
        for message in messages:
            self.left -= 1
            if self.left < 0 or len(self._held) >= self.MAX_HELD or self._queries.crowded:
                return False
            self._queries.ask(message, self._attempt, self._to, self._reply, self._held, limit=dns.MAX_STREAM)
        return True

    def close(self) -> None:
        """Nobody waits for answers any more."""
        held, self._held = self._held, set()
        for question in held:
            question.withdraw()

    def _reply(self, message: bytes) -> None:
        self._write(dns.frame(message))
