"""One connection whose requests are looked at: HTTP in clear, or within TLS that is ended here.

:class:`corral.gateway.http.HttpProxy` says what is to be done with each byte; this carries it out on two streams. A
side is read only while the proxy wants its bytes and the other side takes what it gets.
"""

from __future__ import annotations

import functools
import hashlib
import os
import socket
import ssl
import time
from collections import deque
from collections.abc import Iterable
from dataclasses import replace
from functools import partial
from typing import TYPE_CHECKING

from corral.actions import Decision, Kind, Meaning, Opinion, Request, Verdict
from corral.gateway.authority import upstream_context
from corral.gateway.client import is_gone
from corral.gateway.http import (
    Ask,
    Close,
    Command,
    Dial,
    HangUp,
    HttpProxy,
    Phase,
    Refused,
    ToClient,
    ToUpstream,
    Tunnel,
)
from corral.gateway.http_rules import permit_of
from corral.gateway.rules import SPENT
from corral.gateway.streams import MANY, MUCH, SecureStream, Stream

if TYPE_CHECKING:
    from corral.credentials.secret import Secret
    from corral.gateway.connection import Connection
    from corral.monitor.parts import Held

HEAD = 30.0
"""Seconds for a handshake, and for a head from its first byte to its last."""
_FAULT = 500
"""The first status of the server's, or our own, failings (RFC 9110, section 15.6)."""
GONE = 1.0
"""Seconds for which a request has waited when its client's end of the connection shows that nobody waits any more."""
LINGER = 2.0
"""Seconds for a client to read its last answer."""


class Exchange:
    """Belongs to one :class:`Connection`, which it ends when it is over."""

    def __init__(self, connection: Connection, first: bytes) -> None:
        """``first`` is what the client has sent so far."""
        self._connection, self._terms, self._first = connection, connection.terms, first
        endpoint = connection.endpoint
        self._host = endpoint.name or endpoint.address
        self._secure = connection.intercepted
        self._proxy = HttpProxy(
            self._host,
            endpoint.port,
            secure=self._secure,
            permits=self._terms.permit,
            limits=self._terms.limits,
            secret=self._secret(),
            judged=self._terms.judged,
        )
        self._client: Stream
        self._server: Stream | None = None
        self._early: list[bytes] = []
        """For the server, before there is a connection to it."""
        self._early_bytes = 0
        self._todo: deque[Command] = deque()
        self._running = self._tunnel = self._closing = False
        self._ends = 0
        self._held: Held | None = None
        self._reason = "closed"
        self._since = time.monotonic()
        """When the present phase began, or something moved in it."""
        self._phase = Phase.IDLE
        self._counts = (0, 0)
        self._earlier = (0, 0)
        """Bytes to and from the server on connections that are over."""

    def _secret(self) -> Secret | None:
        """What is put into the requests. Raises KeyError where nobody has loaded it."""
        credential = self._terms.credential
        return None if credential is None else self._connection.egress.setting.secrets[credential]

    @property
    def counts(self) -> tuple[int, int]:
        """Bytes that went to the server and came from it."""
        up, down = self._earlier
        return self._earlier if self._server is None else (up + self._server.bytes_out, down + self._server.bytes_in)

    def start(self) -> None:
        """Begins with what was read already."""
        connection = self._connection
        loop, sock = connection.egress.loop, connection.socket
        if not self._secure:
            self._client = Stream(loop, sock, self._of_client, self._client_over, self._balance)
            self._of_client(self._first)
            return
        authority = connection.egress.setting.authority
        if authority is None:
            self._client = Stream(loop, sock, self._of_client, self._client_over, self._balance)
            connection.refuse("gateway.tls", "The requests within TLS cannot be looked at: there is no authority.")
            return
        secure = self._client = SecureStream(
            loop,
            sock,
            authority.leaf(self._host),
            self._of_client,
            self._client_over,
            self._balance,
            self._balance,
            server_side=True,
            first=self._first,
        )
        secure.start()

    # ---- bytes ----

    def _of_client(self, data: bytes) -> None:
        if self._tunnel:
            self._to_server(data)
        else:
            self._run(self._proxy.client_bytes(data))
        self._balance()

    def _of_server(self, data: bytes) -> None:
        if self._exceeds("received", self.counts[1], self._terms.limits.down) or self._spent(1, data):
            return
        if self._tunnel and not self._proxy.scrubs:
            self._client.write(data)
        else:
            self._run(self._proxy.upstream_bytes(data))
        self._balance()

    def _client_over(self, reason: str) -> None:
        if reason or self._closing:
            self._connection.over(reason or self._reason, broken=bool(reason))
        elif self._tunnel:
            self._half_over(self._server)
        else:
            self._run(self._proxy.client_ended())
            self._balance()

    def _server_over(self, reason: str) -> None:
        if self._tunnel and not reason:
            if self._proxy.scrubs:
                self._run(self._proxy.upstream_ended())  # what could have become a secret and did not
            self._half_over(self._client)
            return
        if reason and self._proxy.phase is not Phase.ASKED:
            # An answer that ends with its connection must not look complete.
            self._run(self._proxy.failed(f"{self._host}: {reason}"))
        else:
            self._run(self._proxy.upstream_ended())
        self._balance()

    def _half_over(self, other: Stream | None) -> None:
        """One direction of a tunnel is over."""
        self._ends += 1
        if self._ends == 2 or other is None:
            self._connection.over("closed", broken=False)
        else:
            other.end()

    def _to_server(self, data: bytes) -> None:
        server = self._server
        before = self.counts[0] + (self._early_bytes if server is None else server.queued)
        if self._exceeds("sent", before + len(data), self._terms.limits.up) or self._spent(0, data):
            return
        if server is not None:
            server.write(data)
        else:
            self._early.append(data)
            self._early_bytes += len(data)

    def _exceeds(self, done: str, count: int, limit: int | None) -> bool:
        """Whether these are more bytes than may be; all is over then, and what was too much is not passed on."""
        if limit is None or count <= limit:
            return False
        self._connection.over(f"more than {limit} bytes {done}", broken=True)
        return True

    def _spent(self, way: int, data: bytes) -> bool:
        """Whether the rule has no bytes left for this; all is over then."""
        budget = self._connection.budgets[way]
        if budget is None or budget.take(len(data)):
            return False
        self._connection.over(SPENT, broken=True)
        return True

    def _balance(self) -> None:
        """Reads each side only while what it says can be used, and passed on."""
        if self._connection_is_over() or self._closing:
            return
        server = self._server
        to_server = self._early_bytes if server is None else server.queued
        # A handshake needs bytes whatever the proxy wants; it wants a first request, so both agree.
        self._client.want((self._tunnel or self._proxy.wants_client) and to_server < MANY)
        if server is not None:
            server.want((self._tunnel or self._proxy.wants_upstream) and self._client.queued < MANY)
        self._note_progress()
        if not self._exceeds("sent", self.counts[0], self._terms.limits.up):  # TLS adds bytes of its own
            self._exceeds("received", self.counts[1], self._terms.limits.down)

    def _connection_is_over(self) -> bool:
        return self._client.closed

    # ---- commands ----

    def _run(self, commands: Iterable[Command]) -> None:
        """Carries them out in their order; what they bring about is appended."""
        self._todo.extend(commands)
        if self._running:
            return
        self._running = True
        try:
            while self._todo and not self._connection_is_over():
                self._do(self._todo.popleft())
        finally:
            self._running = False

    def _do(self, command: Command) -> None:
        match command:
            case ToUpstream(data):
                self._to_server(data)
            case ToClient(data):
                self._client.write(data)
            case Ask():
                self._ask(command)
            case Dial():
                self._connection.outward(self._dialled)
            case HangUp():
                self._hang_up()
            case Refused():
                self._refused(command)
            case Tunnel():
                self._tunnel = True
            case Close(reason):
                self._close(reason)

    def _hang_up(self) -> None:
        self._earlier = self.counts
        if self._server is not None:
            self._server.close()
            self._server = None
        self._connection.let_go()

    def _request(self, method: str, path: str, meaning: Meaning = Meaning.METHOD) -> Request:
        endpoint = self._connection.endpoint
        if endpoint.name is not None:  # the request is the same whichever address it goes to
            endpoint = replace(endpoint, address="", protected=False)
        return Request(endpoint, method, path, meaning)

    def _ask(self, ask: Ask) -> None:
        connection = self._connection
        attempt = connection.attempt
        if attempt is None:
            self._run(self._proxy.decided(False))
            return
        request = self._request(ask.method, ask.path, ask.meaning)
        self._held = connection.egress.decide(
            Kind.HTTP_REQUEST,
            request,
            attempt.decision.action.origin,
            partial(self._decided, ask, request),
            following=attempt.decision,
        )

    def _decided(self, ask: Ask, request: Request, decision: Decision) -> None:
        self._held = None
        if self._connection_is_over():
            return
        # Permissions and the credential are those of the rules that name this request, not of the whole connection.
        terms = self._connection.egress.rules.terms(request)
        reason, advice = ("", "") if decision.private else (decision.reason, decision.advice)
        allowed = decision.allowed
        if allowed and ask.upgrade and permit_of(ask.upgrade) not in terms.permit:
            allowed, reason = False, f"an upgrade to {ask.upgrade} is not permitted for this request"
            self._refused(Refused(403, reason, ask.method, ask.path))
        injecting = terms.credential is not None and terms.credential == self._terms.credential
        self._run(self._proxy.decided(allowed, reason, advice, injecting=injecting))
        self._balance()

    def _refused(self, refused: Refused) -> None:
        if refused.status >= _FAULT:
            return  # nobody refused anything: the account of the flow says what went wrong
        connection = self._connection
        attempt = connection.attempt
        origin = connection.egress.nobody if attempt is None else attempt.decision.action.origin
        own = Opinion(Verdict.DENY, "gateway.http", f"The request is refused: {refused.reason}.")
        connection.egress.decide(
            Kind.HTTP_REQUEST, self._request(refused.method, refused.path), origin, _recorded, own=own
        )

    def _dialled(self, sock: socket.socket | None, problem: str) -> None:
        connection = self._connection
        if sock is None:
            decision = connection.decision
            if decision is not None and not decision.allowed:
                problem = "" if decision.private else decision.reason
                self._run(self._proxy.failed(problem, 403))
            else:
                self._run(self._proxy.failed(f"{self._host} cannot be reached: {problem}"))
            self._balance()
            return
        loop = connection.egress.loop
        if not self._secure:
            self._server = Stream(loop, sock, self._of_server, self._server_over, self._balance)
        else:
            server = self._server = SecureStream(
                loop,
                sock,
                _context(os.environ.get("SSL_CERT_FILE"), os.environ.get("SSL_CERT_DIR")),
                self._of_server,
                self._server_over,
                self._balance,
                self._server_ready,
                server_side=False,
                name=self._host,
            )
            server.start()
        self._server.most = MUCH
        early, self._early, self._early_bytes = self._early, [], 0
        for data in early:
            self._server.write(data)
        self._balance()

    def _server_ready(self) -> None:
        server = self._server
        if isinstance(server, SecureStream):
            certificate = server.tls.getpeercert(binary_form=True)
            self._connection.certificate = hashlib.sha256(certificate or b"").hexdigest() if certificate else ""
        self._balance()

    # ---- the end ----

    def _close(self, reason: str) -> None:
        """What is queued for the client still goes out; then it is over."""
        self._closing, self._reason = True, reason
        self._since = time.monotonic()
        if self._server is not None:
            self._server.want(False)
        self._client.want(False)
        self._client.end()
        self._client.drain(self._client_over)

    def _note_progress(self) -> None:
        phase, counts = self._proxy.phase, (self._client.bytes_in, self._client.bytes_out)
        if phase is not self._phase or (phase is not Phase.HEAD and counts != self._counts):
            self._since = time.monotonic()
        self._phase, self._counts = phase, counts

    def look_after(self, now: float) -> None:
        """Ends it where it has waited for too long."""
        if self._closing:
            if now - self._since > LINGER:
                self._connection.over(self._reason, broken=False)
            return
        self._note_progress()
        waited = now - self._since
        handshake = any(isinstance(end, SecureStream) and not end.ready for end in (self._client, self._server))
        if (self._phase is Phase.HEAD or handshake) and waited > HEAD:
            self._connection.over("its request was not complete in time", broken=True)
        elif self._phase is not Phase.ASKED and waited > self._terms.limits.idle:
            self._connection.over("nothing moved for too long", broken=True)
        elif self._phase is Phase.ASKED and waited > GONE and self._is_deserted():
            # What its client has given up must not go out when somebody says yes later.
            self._connection.over("its client was gone before the answer", broken=True)

    def _is_deserted(self) -> bool:
        attempt = self._connection.attempt
        return is_gone(self._client.socket, None if attempt is None else attempt.decision.action.origin.process)

    def close(self) -> None:
        """The connection is over. May be called again."""
        if self._held is not None:
            held, self._held = self._held, None
            held.withdraw()
        self._client.close()
        if self._server is not None:
            self._server.close()
        self._todo.clear()


@functools.lru_cache(maxsize=4)
def _context(*_where: str | None) -> ssl.SSLContext:
    """What the host trusts; read again where OpenSSL is told to look elsewhere."""
    return upstream_context()


def _recorded(decision: Decision) -> None:
    """It is refused, whatever anybody thinks of it."""
