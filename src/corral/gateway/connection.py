"""One captured connection, from its arrival to the account of it.

    WHO ──attempt──▶ FIRST ──bytes──▶ DECIDING ──allowed──▶ REACHING ──▶ RELAYING ──▶ OVER
                       │                  └── HTTP, or TLS that is looked at ──▶ EXCHANGING ──▶ OVER
                       └── port 53 ──▶ QUESTIONS ──▶ OVER
     └── the name of a broker ──▶ HANDED_OVER ──▶ OVER

Whatever is not said here, and whatever fails, ends in a refusal that its client can understand: an answer of HTTP, an
alert of TLS, a reset. Nothing is dialled before the policy has decided on what is spoken, and no address before it has
decided on that address.
"""

from __future__ import annotations

import socket
import time
from collections.abc import Callable
from enum import Enum
from functools import partial
from typing import TYPE_CHECKING

from corral.actions import Attempt, Decision, Endpoint, Flow, Kind
from corral.gateway import refusal
from corral.gateway.looks import looks_for
from corral.gateway.outward import Outward
from corral.gateway.reach import why_protected
from corral.gateway.recognise import MAX_FIRST, Protocol, Recognised, recognise
from corral.gateway.relay import Relay, reset
from corral.gateway.rules import Budgets
from corral.gateway.sockets import Place, segments
from corral.policy.model import Permit
from corral.policy.terms import Terms

if TYPE_CHECKING:
    from corral.gateway.doors import Door, Taken
    from corral.gateway.egress import Egress
    from corral.gateway.exchange import Exchange
    from corral.gateway.queries import Stream as Questions
    from corral.monitor.parts import Held
    from corral.reactor import Timer

FIRST_BYTES = 30.0
"""Seconds for a client to say what it speaks; a slow-loris gets no more."""
SERVER_FIRST = 0.3
"""Seconds of silence after which a client is taken to wait for its server, where a rule lets such protocols through."""
AT_ONCE = 16
"""Times that first bytes are looked at as they come. Each time begins with the first byte, so from then on a client
that sends them singly waits: an eighth of the time that it has taken so far."""
LINGER = 2.0
"""Seconds for a client to read why it was refused."""
DNS_PORT = 53


class Stage(Enum):
    """Where a connection is in its life."""

    WHO = "who"
    FIRST = "first bytes"
    DECIDING = "deciding"
    REACHING = "reaching"
    RELAYING = "relaying"
    EXCHANGING = "exchanging"
    QUESTIONS = "questions"
    HANDED_OVER = "handed over"
    REFUSING = "refusing"
    OVER = "over"


class Connection:
    """Owned by the gateway's thread."""

    def __init__(self, egress: Egress, sock: socket.socket, local: Place, to: Place) -> None:
        """``sock`` was accepted; ``local`` is its client's address, ``to`` where it was to go."""
        self.egress, self.socket, self._local, self._to = egress, sock, local, to
        self.stage = Stage.WHO
        self.started, self._began = time.time(), time.monotonic()
        self._deadline: float | None = self._began + FIRST_BYTES
        self._moved = self._began
        self._first = b""
        self.attempt: Attempt | None = None
        self.endpoint = egress.endpoint(to)
        """What is known of the destination by now."""
        self.found: Recognised | None = None
        self.decision: Decision | None = None
        self.terms = Terms()
        self.certificate = ""
        """SHA-256 of the server's, once it has shown one."""
        self.intercepted = False
        self._close_reason = ""
        self._counted: str | None = None
        """The rule among whose flows it is."""
        self._held: Held | None = None
        self._silence: Timer | None = None
        self._pause: Timer | None = None
        self._looks = 0
        """How often the first bytes were looked at."""
        self._outward: Outward | None = None
        self._outside: socket.socket | None = None
        self._segments = (0, 0)
        """Of connections to the outside that are over."""
        self._relay: Relay | None = None
        self._exchange: Exchange | None = None
        self._questions: Questions | None = None
        self._taken: Taken | None = None
        self._handed_counts = (0, 0)
        egress.flows.add(self)

    # ---- who ----

    def begin(self) -> None:
        """Finds out whose it is, and goes on from there."""
        attempt = self.egress.attempts.take(self._local, self._to)
        if attempt is not None:
            self._known(attempt)
        else:
            self.egress.attempts.settle(partial(self.egress.loop.post, self._late))

    def _late(self) -> None:
        if self.stage is Stage.WHO:
            attempts = self.egress.attempts
            attempt = attempts.take(self._local, self._to) or attempts.take_translated(self._to)
            if attempt is None:
                self.refuse("gateway.origin", "Nobody in the sandbox is known to have made this connection.")
            else:
                self._known(attempt)

    def _known(self, attempt: Attempt) -> None:
        subject = attempt.decision.action.subject
        if not isinstance(subject, Endpoint):
            self.refuse("gateway.origin", "What was decided was no connection.")
            return
        self.attempt, self.endpoint = attempt, subject
        self.socket.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        loop = self.egress.loop
        door = self.egress.door(subject)
        if door is not None:
            self._hand_over(door, attempt)
            return
        if subject.port == DNS_PORT and subject.name is None:
            from corral.gateway.queries import Stream

            self.stage = Stage.QUESTIONS
            self._questions = Stream(self.egress.queries, attempt, self._to, self._write_answer)
            loop.add_reader(self.socket.fileno(), self._question)
            return
        self.stage = Stage.FIRST
        loop.add_reader(self.socket.fileno(), self._readable)
        if self.egress.rules.expects_server_first(subject):
            self._silence = loop.call_later(SERVER_FIRST, self._silent)

    # ---- a broker's ----

    def _hand_over(self, door: Door, attempt: Attempt) -> None:
        self.stage = Stage.HANDED_OVER
        self._deadline = None
        self.decision = attempt.decision
        sock = socket.socket(fileno=self.socket.detach())
        post = self.egress.loop.post
        self._taken = door.take(sock, attempt, lambda up, down, reason: post(self._handed_back, up, down, reason))

    def _handed_back(self, up: int, down: int, reason: str) -> None:
        self._taken, self._handed_counts = None, (up, down)
        self.over(reason, broken=False)

    # ---- questions over TCP ----

    def _question(self) -> None:
        try:
            data = self.socket.recv(4096)
        except BlockingIOError:
            return
        except OSError:
            data = b""
        questions = self._questions
        left = 0 if questions is None else questions.left
        if questions is not None and data and questions.feed(data):
            if questions.left < left:  # a piece of a question is none
                self._deadline = time.monotonic() + FIRST_BYTES
        else:
            self.over("closed" if not data else "no DNS message", broken=bool(data))

    def _write_answer(self, data: bytes) -> None:
        if self.stage is Stage.OVER:
            return
        try:
            sent = self.socket.send(data)
        except OSError:
            sent = 0
        if sent < len(data):  # who does not read its answers gets no more
            self.over("its answers are not read", broken=True)

    # ---- what is spoken ----

    def _readable(self) -> None:
        try:
            data = self.socket.recv(MAX_FIRST - len(self._first))
        except BlockingIOError:
            return
        except OSError:
            self.over("reset", broken=True)
            return
        self._first += data
        if not self._first:
            self.over("closed before anything was said", broken=False)
            return
        found = recognise(self._first, ended=not data)
        if found is not None:
            self._spoken(found)
            return
        self._looks += 1
        if self._looks >= AT_ONCE:
            self.egress.loop.remove_reader(self.socket.fileno())
            self._pause = self.egress.loop.call_later((time.monotonic() - self._began) / 8, self._look_again)

    def _look_again(self) -> None:
        self._pause = None
        self.egress.loop.add_reader(self.socket.fileno(), self._readable)

    def _silent(self) -> None:
        """The client waits for its server, before or after its own first words."""
        self._silence = None
        if self.stage is not Stage.FIRST:
            return
        found = recognise(self._first, ended=True) if self._first else Recognised(Protocol.TCP, "silent")
        if found is not None and found.protocol is Protocol.TCP and not found.fault:
            self._spoken(found)  # what may become another protocol has its time

    def _stop_listening(self) -> None:
        self.egress.loop.remove_reader(self.socket.fileno())
        self._stop_timers()

    def _early(self) -> None:
        """The client says more, which stays in the kernel until somebody wants it."""
        self.egress.loop.remove_reader(self.socket.fileno())

    def _stop_timers(self) -> None:
        for timer in (self._silence, self._pause):
            if timer is not None:
                timer.cancel()
        self._silence = self._pause = None

    def _spoken(self, found: Recognised) -> None:
        """Has it decided whether this may be spoken with that destination."""
        self._stop_timers()
        self.egress.loop.add_reader(self.socket.fileno(), self._early)  # most do not: then it costs no system call
        self.found = found
        self.stage = Stage.DECIDING
        self._deadline = None  # how long it is held is the monitor's affair
        protocol = found.protocol
        protected = self.endpoint.name is None and bool(why_protected(self._to[0]))
        endpoint = self.endpoint
        self.endpoint = Endpoint(  # dataclasses.replace() takes several times as long
            endpoint.transport, endpoint.address, endpoint.port, endpoint.name, "", protocol.value, protected
        )
        if found.fault:
            self.refuse(f"gateway.{protocol.value}", f"What was sent is no proper {protocol.value}: {found.fault}.")
        elif self.attempt is not None:
            origin = self.attempt.decision.action.origin
            self._held = self.egress.decide(
                Kind.NET_CONNECT, self.endpoint, origin, self._may_be_spoken, following=self.attempt.decision
            )

    def _may_be_spoken(self, decision: Decision) -> None:
        self._held = None
        if self.stage is not Stage.DECIDING or self.attempt is None:
            return
        if not decision.allowed:
            self._refused(decision)
            return
        self.decision = decision
        terms = self.terms = self.egress.rules.terms(self.endpoint)
        if not terms.rules:
            self.refuse("gateway.rule", "No rule of the policy says how to handle this connection.")
            return
        problem = self._untrue()
        if problem:
            self.refuse(f"gateway.{self.endpoint.protocol}", problem)
            return
        flows = self.egress.rules.flows
        if flows[decision.rule] >= terms.limits.connections:
            self.refuse("gateway.limits", f"All {terms.limits.connections} connections of the rule are in use.")
            return
        self._counted = decision.rule
        flows[decision.rule] += 1
        self._moved = time.monotonic()
        if self._is_exchange():
            from corral.gateway.exchange import Exchange  # h11 and ssl, which most connections do without

            self.stage = Stage.EXCHANGING
            self.intercepted = self.found is not None and self.found.protocol is Protocol.TLS
            self._exchange = Exchange(self, self._first)
            self._first = b""
            self._exchange.start()
        else:
            self.stage = Stage.REACHING
            self.outward(self._reached)

    def _untrue(self) -> str:
        """What contradicts the destination that was decided on, or is hidden without leave."""
        found, name = self.found, self.endpoint.name
        if self.terms.several:
            return f"Different rules would put different credentials into requests to {name}; one of them must go."
        if found is not None and found.protocol is Protocol.H2C and (self.terms.judged or self.terms.credential):
            return "HTTP/2 without TLS cannot be looked at, and rules say which requests are meant."
        hello = None if found is None else found.hello
        if hello is None:
            return ""
        if hello.ech and Permit.ECH not in self.terms.permit:
            return "The TLS hello hides the name of its server (ECH)."
        if name is None:
            return ""
        if hello.server_name is None:
            return "" if Permit.NO_SNI in self.terms.permit else f"The TLS hello does not name its server, {name}."
        return "" if hello.server_name == name else f"The TLS hello names {hello.server_name}, not {name}."

    def _is_exchange(self) -> bool:
        """Whether its requests are looked at."""
        protocol = None if self.found is None else self.found.protocol
        if protocol is Protocol.TLS:
            return self.terms.intercept
        return protocol is Protocol.HTTP or (protocol is Protocol.CONNECT and not self._is_raw_proxy())

    def _is_raw_proxy(self) -> bool:
        """Whether a rule lets a proxy be spoken to, whatever it is asked for."""
        return self.egress.rules.names_protocol(self.endpoint, Protocol.CONNECT.value)

    # ---- the other end ----

    def outward(self, done: Callable[[socket.socket | None, str], None]) -> None:
        """Reaches the destination. ``done`` gets the connection, or None and why there is none."""
        if self.attempt is None or self.decision is None:
            done(None, "nothing was decided")
            return

        def reached(sock: socket.socket | None, problem: str) -> None:
            outward = self._outward
            if outward is not None:
                self.endpoint = outward.endpoint
                self.decision = outward.allowed or outward.refused or self.decision
            self._outside = sock
            done(sock, problem)

        patience = self.terms.limits.dial
        self._outward = Outward(self.egress, self.attempt, self.endpoint, self._to[0], patience, reached)
        self._outward.start()

    def let_go(self) -> None:
        """The connection to the outside is over, and there may be another. Nobody reads or writes it any more."""
        sock, self._outside = self._outside, None
        if sock is not None:
            self._segments = self._all_segments(sock)
            sock.close()

    def _all_segments(self, sock: socket.socket | None) -> tuple[int, int]:
        (up, down), (more_up, more_down) = self._segments, (0, 0) if sock is None else segments(sock)
        return up + more_up, down + more_down

    def _reached(self, sock: socket.socket | None, problem: str) -> None:
        if sock is None:
            self.unreachable(problem)
            return
        if self.found is None:
            self.refuse("gateway.rule", "What is spoken is not known.")
            return
        first, limits = self._first, self.terms.limits
        up, down, problem = looks_for(self.found, first, self.terms.permit, self._has_certificate)
        if problem:
            self.refuse(f"gateway.{self.endpoint.protocol}", f"The connection is refused: {problem}.")
            return
        self._first = b""
        self.stage = Stage.RELAYING
        self._relay = Relay(
            self.egress.loop,
            self.egress.buffer,
            self.socket,
            sock,
            self._relayed,
            first=first,
            limits=(limits.up, limits.down),
            looks=(up, down),
            budgets=self.budgets,
        )
        self._relay.start()

    @property
    def budgets(self) -> Budgets:
        """What its rule has left of its bytes."""
        return self.egress.rules.budgets(self._counted or "", self.terms.limits)

    def _has_certificate(self, digest: str) -> None:
        self.certificate = digest

    def _relayed(self, reason: str, broken: bool) -> None:
        self.over(reason, broken=broken)

    def unreachable(self, problem: str) -> None:
        """There is no connection to the destination."""
        if self.decision is not None and not self.decision.allowed:
            self._refused(self.decision)
        else:
            self._end_refused(f"{self.endpoint.name or self.endpoint.address} cannot be reached: {problem}", status=502)

    # ---- refusals ----

    def _refused(self, decision: Decision) -> None:
        reason, advice = ("", "") if decision.private else (decision.reason, decision.advice)
        self._end_refused(reason, advice, rule=decision.rule)

    def refuse(self, rule: str, reason: str) -> None:
        """Refuses it for a reason of our own, which is recorded."""
        origin = self.egress.nobody if self.attempt is None else self.attempt.decision.action.origin
        self.egress.refuse(Kind.NET_CONNECT, self.endpoint, origin, rule, reason)
        self._end_refused(reason, rule=rule)

    def _end_refused(self, reason: str, advice: str = "", *, rule: str = "", status: int = 403) -> None:
        """Tells the client in its own words, and ends."""
        self._close_reason = f"refused by {rule}" if rule else reason
        if rule and self._first:
            origin = self.egress.nobody if self.attempt is None else self.attempt.decision.action.origin
            for glance in self.egress.setting.glances:
                glance.refused(origin, self.endpoint, self._first)
        found = self.found
        if found is not None and found.protocol in (Protocol.HTTP, Protocol.CONNECT):
            farewell = refusal.answer(status, reason, advice)
        elif found is not None and found.protocol is Protocol.TLS:
            farewell = refusal.tls_alert(refusal.Alert.ACCESS_DENIED)
        else:
            self.over(self._close_reason, broken=True)
            return
        self.stage = Stage.REFUSING
        self._stop_listening()
        self._deadline = time.monotonic() + LINGER
        try:
            self.socket.send(farewell)
            self.socket.shutdown(socket.SHUT_WR)
        except OSError:
            self.over(self._close_reason, broken=True)
            return
        # What is unread when a connection is closed turns the farewell into a reset.
        self.egress.loop.add_reader(self.socket.fileno(), self._drain)

    def _drain(self) -> None:
        try:
            data = self.socket.recv(1 << 16)
        except BlockingIOError:
            return
        except OSError:
            data = b""
        if not data:
            self.over(self._close_reason, broken=False)

    # ---- the end ----

    def look_after(self, now: float) -> None:
        """Ends it where it has waited for too long. To be called from time to time."""
        if self._deadline is not None and now >= self._deadline:
            self.over(self._close_reason or "nothing was said in time", broken=True)
        elif self.stage is Stage.EXCHANGING and self._exchange is not None:
            self._exchange.look_after(now)
        elif self.stage is Stage.RELAYING and self._relay is not None:
            if self._relay.touched:
                self._relay.touched = False
                self._moved = now
            elif now - self._moved > self.terms.limits.idle:
                self.over("nothing moved for too long", broken=True)

    def over(self, reason: str, *, broken: bool) -> None:
        """Ends it, and accounts for it. ``broken``: its client is to notice. May be called again."""
        if self.stage is Stage.OVER:
            return
        self.stage = Stage.OVER
        self._first = b""
        try:
            if self._held is not None:
                held, self._held = self._held, None
                held.withdraw()
            if self._outward is not None:
                self._outward.cancel()
            if self._relay is not None:
                self._relay.end(reason, broken=broken)
            if self._exchange is not None:
                self._exchange.close()
            if self._questions is not None:  # which have records of their own
                self._questions.close()
            else:
                self.egress.account(self.flow(reason))
        finally:
            self._close(broken=broken)

    def _close(self, *, broken: bool) -> None:
        self._stop_listening()
        for sock in (self.socket, self._outside):
            if sock is not None and sock.fileno() >= 0:
                self.egress.loop.remove_reader(sock.fileno())
                self.egress.loop.remove_writer(sock.fileno())
                if broken:
                    reset(sock)
                else:
                    sock.close()
        self.egress.flows.discard(self)
        if self._counted is not None:
            self.egress.rules.flows[self._counted] -= 1

    def abandon(self) -> None:
        """In a child of the process, which shares the connection but has no part in it."""
        for sock in (self.socket, self._outside):
            if sock is not None:
                sock.close()

    def flow(self, close: str = "") -> Flow:
        """What it is, or was."""
        if self._relay is not None:
            up, down = self._relay.counts
        elif self._exchange is not None:
            up, down = self._exchange.counts
        else:
            up, down = self._handed_counts if self._taken is None else self._taken.counts
        outside = self._outside
        is_open = outside is not None and outside.fileno() >= 0
        packets_up, packets_down = self._all_segments(outside if is_open else None)
        hello = None if self.found is None else self.found.hello
        return Flow(
            origin=self.egress.nobody if self.attempt is None else self.attempt.decision.action.origin,
            endpoint=self.endpoint,
            rule="" if self.decision is None else self.decision.rule,
            started=self.started,
            seconds=time.monotonic() - self._began,
            bytes_up=up,
            bytes_down=down,
            packets_up=packets_up,
            packets_down=packets_down,
            tls_name="" if hello is None else hello.server_name or "",
            ja4="" if hello is None else hello.ja4,
            certificate=self.certificate,
            intercepted=self.intercepted,
            close=close,
        )
