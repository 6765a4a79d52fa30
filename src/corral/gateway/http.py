"""HTTP/1.1 between a client that is not trusted and a server that is not trusted either.

Bytes and decisions go in, commands come out; nothing here touches a socket. Both sides are parsed (strictly:
:mod:`corral.gateway.http_heads`, then h11) and what goes on is written anew, so that no two programs on the way can
read one message differently. One object serves one connection of the sandbox and at most one to the server.

Order that always holds:

1. ``Ask`` for a request; nothing of it has gone out, and the server has not even been dialled for it.
2. ``decided(True)``: ``Dial`` (before the first request, and after a ``HangUp``), then ``ToUpstream``.
   ``decided(False)``: the refusal goes to the client, nothing goes to the server.
3. The next request is looked at once the answer to this one is complete. Pipelined requests wait.
4. After ``Close`` nothing more comes: write what was to be written before it, then close both connections.
5. After ``Tunnel`` bytes are passed as they are (answers still lose echoes of the secret, see ``scrubs``).

Usage::

    proxy = HttpProxy("api.example.org", 443, secure=True, permits=rule.permit, limits=rule.limits, secret=secret)
    for command in proxy.client_bytes(data):
        match command:
            case Ask(): ...       # and later proxy.decided(allowed, reason, advice)
            case Dial(): ...      # hold ToUpstream until it stands; proxy.failed(reason) if it cannot
            case HangUp(): ...    # this connection to the server is over; there may be another
            case ToUpstream(): ...
            case ToClient(): ...
            case Refused(): ...   # for the records; the answer itself is a ToClient
            case Tunnel(): ...
            case Close(): ...

The caller reads from a side only while it wants bytes (``wants_client``, ``wants_upstream``) and its own queue to the
other side is short, reads at most 64 KiB of the client at once, and times phases out (``phase``: a head that does not
come to its end is the slow-loris attack).
"""

from __future__ import annotations

import re
from collections.abc import Collection
from itertools import groupby

import h11

from corral.credentials.scrubbing import Scrubber
from corral.credentials.secret import Secret
from corral.gateway.http_commands import (
    Ask,
    Close,
    Command,
    Dial,
    HangUp,
    Phase,
    Refused,
    ToClient,
    ToUpstream,
    Tunnel,
)
from corral.gateway.http_exchange import CHUNK, Chunks, Exchange, Received, collect
from corral.gateway.http_heads import (
    HttpError,
    host_field,
    request_head,
    response_head,
)
from corral.gateway.http_rules import (
    check_body,
    check_scrubbable,
    impossible,
    meaning_of,
    outgoing,
    unwanted,
    without_echoes,
)
from corral.gateway.refusal import answer
from corral.policy.model import FlowLimits, Permit

__all__ = [
    "Ask",
    "Close",
    "Command",
    "Dial",
    "HangUp",
    "HttpProxy",
    "Phase",
    "Refused",
    "ToClient",
    "ToUpstream",
    "Tunnel",
]

DRAINED = 256 * 1024
"""Bytes of a refused request's body that are read and thrown away, so that the connection can be used again."""
AHEAD = 128 * 1024
"""Bytes beyond one head that a client may send before they are wanted."""
MAX_DENIALS = 64
"""Requests refused on one connection, after which it is closed: a refusal is longer than a request may be."""
MAX_INTERIM = 8
"""Interim answers (1xx) to one request."""
_TOKEN_START = re.compile(rb"[-!#$%&'*+.^_`|~0-9A-Za-z]")
_CONTINUE = b"HTTP/1.1 100 Continue\r\n\r\n"


class HttpProxy:
    """One connection of the sandbox to ``host`` (a canonical name, or an address in canonical text) and ``port``.

    ``secure``: TLS is spoken on both sides, so 443 is the port that goes without saying. ``secret`` is put into every
    request, and its echoes are taken out of every answer.
    """

    def __init__(
        self,
        host: str,
        port: int,
        *,
        secure: bool,
        permits: Collection[Permit] = (),
        limits: FlowLimits = FlowLimits(),  # noqa: B008 - immutable
        secret: Secret | None = None,
        judged: bool = False,
    ) -> None:
        self._host, self._port, self._secure = host, port, secure
        self._permits, self._limits, self._secret = frozenset(permits), limits, secret
        self._judged = judged
        self._phase = Phase.IDLE
        self._client, self._upstream = Received(), Received()
        self._client_over = False
        self._dialled = False
        self._denials = 0
        self._exchange: Exchange | None = None
        self._chunks_up, self._chunks_down = Chunks(), Chunks()
        self._tunnel_scrubber: Scrubber | None = None
        self._commands: list[Command] = []

    # ---- what the caller asks ----

    @property
    def phase(self) -> Phase:
        return self._phase

    @property
    def wants_client(self) -> bool:
        """Whether bytes of the client would be used now. What is given all the same is kept, up to a bound."""
        if self._phase is Phase.EXCHANGE:
            return self._exchange is not None and not self._exchange.request_over
        return self._phase not in (Phase.ASKED, Phase.CLOSED)

    @property
    def wants_upstream(self) -> bool:
        """Between requests too: the server's end of the connection, and bytes that nobody asked for, show then."""
        return self._dialled and self._phase is not Phase.CLOSED

    @property
    def scrubs(self) -> bool:
        """Whether bytes of a tunnel must still come through here; otherwise the caller may relay them itself."""
        return self._secret is not None

    # ---- what the caller tells ----

    def client_bytes(self, data: bytes) -> list[Command]:
        if self._phase is Phase.TUNNEL:
            return [ToUpstream(data)] if data else []
        if self._phase is not Phase.CLOSED:
            self._client.data += data
            self._advance()
            if len(self._client.data) > self._limits.header + AHEAD:
                self._fail(400, "the client sent too much before it was asked for")
        return self._take()

    def client_ended(self) -> list[Command]:
        """The client sends no more; it may still read. In a tunnel, the caller passes the end on."""
        self._client_over = True
        self._advance()
        return self._take()

    def upstream_bytes(self, data: bytes) -> list[Command]:
        if self._phase is Phase.TUNNEL:
            self._tunnel_down(data)
        elif self._phase is Phase.EXCHANGE:
            exchange = self._exchange
            if exchange is not None and self._is_middle(exchange, data):
                self._pass_on(exchange, data)
            else:
                self._upstream.data += data
                self._read_answer()
                self._advance()
        elif data and self._phase is Phase.ASKED:
            self._hang_up()  # 408, say; whoever asks next must not get it
        elif data:
            self._close("the server sent bytes that nobody asked for")
        return self._take()

    def upstream_ended(self) -> list[Command]:
        """The server sends no more. In a tunnel, the caller passes the end on."""
        exchange = self._exchange
        if self._phase is Phase.TUNNEL:
            if self._tunnel_scrubber is not None:
                self._to_client(self._tunnel_scrubber.end())
        elif self._phase is Phase.ASKED:
            self._hang_up()
        elif self._phase is not Phase.EXCHANGE or exchange is None:
            # Also where a next request comes in: that it got no answer at all tells the client to try it anew.
            self._close("the server ended the connection")
        elif not exchange.answered:
            self._fail(502, "the server ended the connection without an answer")
        else:
            exchange.up.receive_data(b"")
            self._read_answer()
            if self._phase is Phase.EXCHANGE:
                self._close("the server broke its answer off")
        return self._take()

    def _hang_up(self) -> None:
        """The server is lost while a request waits: a person may take longer than any server waits for the next one."""
        if self._dialled:
            self._dialled = False
            self._commands.append(HangUp())

    def decided(self, allowed: bool, reason: str = "", advice: str = "", *, injecting: bool = True) -> list[Command]:
        """The answer to ``Ask``. Of a private rule, give neither reason nor advice; ``injecting`` is whether the secret
        is for this request. One that comes after the end of the connection is not heeded."""
        exchange = self._exchange
        if self._phase is not Phase.CLOSED:
            if self._phase is not Phase.ASKED or exchange is None:
                raise RuntimeError("a decision that nobody asked for")
            if allowed:
                self._send_request(exchange, injecting)
            else:
                self._deny(exchange, reason, advice)
            self._advance()
        return self._take()

    def failed(self, reason: str, status: int = 502) -> list[Command]:
        """The server cannot be reached, or something took too long: the client is told so where it still can be."""
        self._fail(status, reason)
        return self._take()

    # ---- out ----

    def _take(self) -> list[Command]:
        """The commands since last time, with neighbouring bytes for one side together."""
        commands, self._commands = self._commands, []
        if len(commands) < 2:
            return commands
        joined: list[Command] = []
        for kind, group in groupby(commands, type):
            if kind is ToUpstream or kind is ToClient:
                joined.extend(map(kind, _joined([command.data for command in group if isinstance(command, kind)])))
            else:
                joined.extend(group)
        return joined

    def _to_client(self, data: bytes | None) -> None:
        if data:
            self._commands.append(ToClient(data))

    def _to_upstream(self, data: bytes | None) -> None:
        if data:
            self._commands.append(ToUpstream(data))

    def _close(self, reason: str) -> None:
        if self._phase is not Phase.CLOSED:
            self._phase = Phase.CLOSED
            self._exchange = None
            self._client.take()
            self._upstream.take()
            self._commands.append(Close(reason))

    def _fail(self, status: int, reason: str) -> None:
        """Ends the connection, with an answer to the request that is open, if it has none yet."""
        exchange = self._exchange
        unanswered = exchange is not None and not exchange.answered and self._phase is not Phase.DRAIN
        if unanswered or self._phase is Phase.HEAD:
            method = exchange.request.method if exchange is not None else ""
            path = exchange.request.path if exchange is not None else ""
            self._commands.append(Refused(status, reason, method, path))
            self._to_client(answer(status, reason, body=method != "HEAD"))
        self._close(reason)

    # ---- the client's side ----

    def _advance(self) -> None:
        """Does what can be done with the client's bytes. Each round takes some of them or changes the phase."""
        while True:
            before = self._phase, len(self._client.data)
            if self._phase is Phase.IDLE and self._client.data:
                self._phase = Phase.HEAD
            elif self._phase is Phase.IDLE and self._client_over:
                self._close("the client ended the connection")
            elif self._phase is Phase.HEAD:
                self._read_head()
            elif self._phase in (Phase.EXCHANGE, Phase.DRAIN):
                self._read_body()
            if before == (self._phase, len(self._client.data)):
                return

    def _read_head(self) -> None:
        if not _TOKEN_START.match(self._client.data):
            return self._fail(400, "what the client sends is not HTTP/1.1")
        try:
            raw = self._client.head(self._limits.header)
            if raw is None:
                if self._client_over:
                    self._close("the client broke its request off")
                return None
            head = request_head(raw, self._host, self._port, secure=self._secure)
            check_body(head.length or 0, self._limits.body, 413)
            down = h11.Connection(h11.SERVER, self._limits.header)
            down.receive_data(raw)
            event = down.next_event()
        except HttpError as error:
            return self._fail(error.status, error.reason)
        except h11.RemoteProtocolError:
            return self._fail(400, "the request is malformed")
        if not isinstance(event, h11.Request) or (event.method.decode(), event.target) != (head.method, head.target):
            return self._fail(400, "the request can be read in two ways")
        self._exchange = Exchange(head, down, h11.Connection(h11.CLIENT, self._limits.header))
        self._phase = Phase.ASKED
        forbidden = unwanted(raw) or impossible(
            head, self._permits, injecting=self._secret is not None, judged=self._judged
        )
        if forbidden:
            self._commands.append(Refused(403, forbidden, head.method, head.path))
            self._deny(self._exchange, forbidden, "")
        else:
            upgrade = "connect" if head.method == "CONNECT" else head.upgrade
            meaning = meaning_of(head, judged=self._judged)
            self._commands.append(Ask(head.method, head.path, upgrade, meaning))
        return None

    def _deny(self, exchange: Exchange, reason: str, advice: str) -> None:
        """403. What may remain of the request is read, where that is little and sure to come; else all is closed."""
        head = exchange.request
        short = not head.chunked and not head.expects_continue and (head.length or 0) <= DRAINED
        self._denials += 1
        keep = head.keep_alive and (short or not head.has_body) and self._denials < MAX_DENIALS
        self._to_client(answer(403, reason, advice, keep_alive=keep, body=head.method != "HEAD"))
        if keep:
            exchange.answered = True
            self._phase = Phase.DRAIN
        else:
            self._close("a request was refused")

    def _send_request(self, exchange: Exchange, injecting: bool) -> None:
        head = exchange.request
        host = host_field(self._host, self._port, secure=self._secure).encode("ascii")
        fields = outgoing(head, host, self._secret, judged=self._judged, injecting=injecting)
        try:
            data = exchange.up.send(h11.Request(method=head.method, target=head.target, headers=fields))
        except h11.LocalProtocolError:
            return self._fail(400, "the request cannot be passed on")  # h11's words could hold the secret
        if not self._dialled:
            self._dialled = True
            self._commands.append(Dial())
        if head.expects_continue and head.has_body:
            self._to_client(_CONTINUE)
        self._to_upstream(data)
        self._phase = Phase.EXCHANGE
        return None

    def _read_body(self) -> None:
        """The rest of a request, for the server or (where it was refused) for nobody."""
        exchange = self._exchange
        if exchange is None or exchange.request_over:
            return
        if self._client.data:
            exchange.down.receive_data(self._client.take())
        over = False
        try:
            while not over:
                data, over = collect(exchange.down, self._chunks_up)
                exchange.bytes_up += len(data)
                check_body(exchange.bytes_up, self._limits.body, 413)
                if self._phase is Phase.EXCHANGE:
                    self._to_upstream(exchange.up.send(h11.Data(data=data)) if data else b"")
                    self._to_upstream(exchange.up.send(h11.EndOfMessage()) if over else b"")
                if not data:
                    break
        except HttpError as error:
            return self._fail(error.status, error.reason)
        except h11.ProtocolError:
            return self._fail(400, "the request's body is malformed")
        exchange.request_over = over
        if over:
            self._client.data[:0] = exchange.down.trailing_data[0]
            if self._phase is Phase.DRAIN:
                self._next()
        elif self._client_over:
            self._close("the client broke its request off")
        return None

    def _next(self) -> None:
        """The exchange is over and the connection stays."""
        self._exchange = None
        self._phase = Phase.IDLE

    # ---- the server's side ----

    def _read_answer(self) -> None:
        exchange = self._exchange
        while exchange is not None and self._phase is Phase.EXCHANGE:
            try:
                if not exchange.answered:
                    raw = self._upstream.head(self._limits.header)
                    if raw is None:
                        return
                    self._answer_head(exchange, raw)
                elif not self._answer_body(exchange):
                    return
            except (HttpError, h11.ProtocolError) as error:
                what = error.reason if isinstance(error, HttpError) else "it is malformed or broken off"
                return self._fail(502, f"the server's answer was not passed on: {what}")
            exchange = self._exchange

    def _answer_head(self, exchange: Exchange, raw: bytes) -> None:
        """Raises HttpError and h11.ProtocolError."""
        head = response_head(raw)
        exchange.up.receive_data(raw)
        event = exchange.up.next_event()
        if not isinstance(event, h11.InformationalResponse | h11.Response) or event.status_code != head.status:
            raise HttpError(502, "it can be read in two ways")
        request = exchange.request
        if head.status == 101:
            if not exchange.request_over or not request.upgrade or head.upgrade != request.upgrade:
                raise HttpError(502, "it changes the protocol, which nobody asked for")
            changed = [(b"Connection", b"upgrade"), (b"Upgrade", request.upgrade.encode("ascii"))]
            message: h11.Event = h11.InformationalResponse(
                status_code=101,
                headers=[*without_echoes(head.fields, self._secret), *changed],
                reason=b"Switching Protocols",
            )
            self._to_client(exchange.down.send(message))
            return self._open_tunnel(request.upgrade)
        if head.status < 200:
            exchange.interim += 1
            if exchange.interim > MAX_INTERIM:
                raise HttpError(502, f"there are more than {MAX_INTERIM} interim answers")
            return None
        if request.method == "CONNECT" and head.status < 300:
            fields = [item for item in head.fields if item[0].lower() != b"content-length"]
            self._to_client(exchange.down.send(h11.Response(status_code=head.status, headers=fields)))
            return self._open_tunnel("connect")
        if self._secret is not None:
            check_scrubbable(head)
            exchange.scrubber = self._secret.scrubber()
        exchange.keep = (
            request.keep_alive
            and head.keep_alive
            and exchange.request_over
            and not self._client_over
            and (head.chunked or head.length is not None or head.status in (204, 304) or request.method == "HEAD")
        )
        fields = without_echoes(head.fields, self._secret)
        if not exchange.keep:
            fields.append((b"Connection", b"close"))
        reason = bytes(event.reason)
        reason = reason if self._secret is None else self._secret.scrubbed(reason)
        data = exchange.down.send(h11.Response(status_code=head.status, headers=fields, reason=reason))
        exchange.answered = True
        if exchange.scrubber is None and request.method != "HEAD" and head.status not in (204, 304):
            exchange.left = head.length or 0
        self._to_client(data)
        return None

    def _answer_body(self, exchange: Exchange) -> bool:
        """Passes on what is there; False when that was nothing. Raises HttpError and h11.ProtocolError."""
        if exchange.left:
            return self._answer_plain(exchange)
        if self._upstream.data:
            exchange.up.receive_data(self._upstream.take())
        data, over = collect(exchange.up, self._chunks_down)
        if not data and not over:
            return False
        exchange.bytes_down += len(data)
        check_body(exchange.bytes_down, self._limits.body, 502)
        if exchange.scrubber is not None:
            data = exchange.scrubber.feed(data) + (exchange.scrubber.end() if over else b"")
        if data:
            self._to_client(exchange.down.send(h11.Data(data=data)))
        if over:
            self._to_client(exchange.down.send(h11.EndOfMessage()))
            self._finish(exchange)
        return True

    def _answer_plain(self, exchange: Exchange) -> bool:
        data = self._upstream.take(exchange.left)
        if not data:
            return False
        check_body(exchange.bytes_down + len(data), self._limits.body, 502)
        self._pass_on(exchange, data)
        if not exchange.left:
            self._finish(exchange)
        return True

    def _is_middle(self, exchange: Exchange, data: bytes) -> bool:
        """Whether this is nothing but a part of the body, and more is to come: most of a large answer is."""
        limit = self._limits.body
        allowed = limit is None or exchange.bytes_down + len(data) <= limit
        return len(data) < exchange.left and not self._upstream.data and allowed

    def _pass_on(self, exchange: Exchange, data: bytes) -> None:
        exchange.left -= len(data)
        exchange.bytes_down += len(data)
        self._to_client(data)

    def _finish(self, exchange: Exchange) -> None:
        if exchange.up.trailing_data[0] or self._upstream.data:
            self._close("the server sent more than its answer")
        elif not exchange.request_over:
            self._close("the server answered before the request was over")
        elif not exchange.keep:
            self._close("done")
        else:
            self._next()

    # ---- after HTTP ----

    def _open_tunnel(self, protocol: str) -> None:
        if self._client_over:
            return self._close("the client ended the connection before the protocol was changed")
        self._phase = Phase.TUNNEL
        self._exchange = None
        if self._secret is not None:
            self._tunnel_scrubber = self._secret.scrubber()
        self._commands.append(Tunnel(protocol))
        self._tunnel_down(self._upstream.take())
        self._to_upstream(self._client.take())
        return None

    def _tunnel_down(self, data: bytes) -> None:
        self._to_client(data if self._tunnel_scrubber is None else self._tunnel_scrubber.feed(data))


def _joined(parts: list[bytes]) -> list[bytes]:
    """The same bytes in fewer parts, none of which became longer than CHUNK by that."""
    joined: list[bytes] = []
    run: list[bytes] = []
    size = 0
    for part in parts:
        if run and size + len(part) > CHUNK:
            joined.append(b"".join(run))
            run, size = [], 0
        run.append(part)
        size += len(part)
    return [*joined, b"".join(run)]
