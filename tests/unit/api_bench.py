"""An API broker between a client that says what it likes and a service that writes down what arrives."""

from __future__ import annotations

import asyncio
import json
from collections.abc import AsyncIterator, Awaitable, Callable, Sequence
from contextlib import AsyncExitStack, asynccontextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any
from urllib.parse import parse_qsl, unquote

import h11

from corral.actions import Action, Content, Decision, Opinion, Origin, Used, Verdict
from corral.brokers.api.broker import prepare
from corral.brokers.setting import Handler, Setting
from corral.monitor.core import Monitor
from corral.monitor.parts import Answer, Held
from corral.monitor.records import Recent
from corral.monitor.steps import Execs
from corral.policy.model import Api, ApiRule, Credential, CredentialKind, Operation, Parameter, Policy, Service
from corral.policy.part import PolicyPart
from tests.unit.loopback import served

DOCUMENT = Path(__file__).with_name("data") / "tickets.yaml"
HOST = "api.corral.internal"
CANARY = "canary-4e1f77d2"
CREDENTIAL = Credential(CredentialKind.HEADER, "env:TICKETS_KEY", header="api-key")
ALL = ("listTickets", "createTicket", "getTicket", "deleteTicket", "headTicket", "putNote", "search")


@dataclass(frozen=True)
class Seen:
    """One request, as it arrived."""

    method: str
    target: str
    headers: list[tuple[str, str]]
    body: bytes

    @property
    def path(self) -> list[str]:
        return [unquote(part, errors="strict") for part in self.target.partition("?")[0].split("/")[1:]]

    @property
    def query(self) -> list[tuple[str, str]]:
        text = self.target.partition("?")[2]
        return parse_qsl(text, keep_blank_values=True, strict_parsing=bool(text), errors="strict")

    def header(self, name: str) -> str | None:
        found = [value for each, value in self.headers if each == name]
        assert len(found) < 2
        return found[0] if found else None


Reply = tuple[int, Sequence[tuple[str, str]], bytes]


@dataclass
class Upstream:
    """A service. ``answer`` says what it answers; it may write to the wire itself and return None."""

    seen: list[Seen] = field(default_factory=list)
    answer: Callable[[Seen, asyncio.StreamWriter], Awaitable[Reply | None]] | None = None
    port: int = 0
    gone: asyncio.Event = field(default_factory=asyncio.Event)

    @asynccontextmanager
    async def running(self) -> AsyncIterator[None]:
        server = await asyncio.start_server(self._serve, "127.0.0.1", 0)
        self.port = server.sockets[0].getsockname()[1]
        try:
            yield
        finally:
            server.close()

    async def _serve(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        parser = h11.Connection(h11.SERVER)
        try:
            while (head := await self._next(parser, reader)) is not None:
                assert isinstance(head, h11.Request)
                body = b""
                while isinstance(event := await self._next(parser, reader), h11.Data):
                    body += event.data
                headers = [(name.decode(), value.decode("latin-1")) for name, value in head.headers]
                seen = Seen(head.method.decode(), head.target.decode(), headers, body)
                self.seen.append(seen)
                reply = (200, [], b'{"ok":true}') if self.answer is None else await self.answer(seen, writer)
                if reply is None:
                    break
                status, fields, data = reply
                all_fields = [*fields, ("content-length", str(len(data)))]
                if not any(name == "content-type" for name, _ in fields):
                    all_fields.append(("content-type", "application/json"))
                writer.write(parser.send(h11.Response(status_code=status, headers=all_fields)))
                if seen.method != "HEAD":
                    writer.write(parser.send(h11.Data(data=data)))
                writer.write(parser.send(h11.EndOfMessage()))
                parser.start_next_cycle()
        except (ConnectionError, h11.ProtocolError):
            pass
        finally:
            self.gone.set()
            writer.close()

    async def _next(self, parser: h11.Connection, reader: asyncio.StreamReader) -> object:
        while (event := parser.next_event()) is h11.NEED_DATA:
            data = await reader.read(65536)
            if not data and parser.their_state is h11.IDLE:
                return None
            parser.receive_data(data)
        return None if isinstance(event, h11.ConnectionClosed) else event


class Persons:
    """Who answers at once, or never."""

    def __init__(self) -> None:
        self.answer: Verdict | None = Verdict.ALLOW
        self.asked: list[Action] = []
        self.withdrawn = 0

    def ask(self, action: Action, opinion: Opinion, answered: Callable[[Answer], None]) -> Held:
        self.asked.append(action)
        if self.answer is not None:
            answered(Answer(self.answer, "somebody", "because"))
        return self

    def withdraw(self) -> None:
        self.withdrawn += 1


class Kept:
    def __init__(self) -> None:
        self.found: list[tuple[Content, bytes, bool, str]] = []
        self.calls: list[int] = []

    def keeps(self, content: Content) -> int:
        return 1000 if content is Content.QUERY else 0

    def keep(self, origin: Origin, content: Content, data: bytes, is_whole: bool, about: str, call: int = 0) -> None:
        self.found.append((content, data, is_whole, about))
        self.calls.append(call)


class Uses:
    def __init__(self) -> None:
        self.found: list[Used] = []

    def used(self, used: Used) -> None:
        self.found.append(used)


@dataclass(frozen=True)
class Got:
    """What a client got."""

    status: int
    headers: dict[str, str]
    body: bytes

    @property
    def json(self) -> Any:
        return json.loads(self.body)

    @property
    def detail(self) -> str:
        assert self.headers["content-type"] == "application/problem+json" and self.json["status"] == self.status
        return str(self.json["detail"])


class Bench:
    """Both ends."""

    def __init__(self, policy: Policy, upstream: Upstream) -> None:
        self.policy, self.upstream = policy, upstream
        self.recent, self.persons, self.kept, self.uses = Recent(), Persons(), Kept(), Uses()
        self.ended: list[str] = []
        self.monitor = Monitor(policy=PolicyPart(policy), sink=self.recent, approvals=self.persons)
        self.place = ""
        self.handler: Handler

    @property
    def decisions(self) -> tuple[Decision, ...]:
        return self.recent.all()

    @property
    def arrived(self) -> Seen:
        assert len(self.upstream.seen) == 1
        return self.upstream.seen[0]

    @property
    def used(self) -> Used:
        assert len(self.uses.found) == 1
        return self.uses.found[0]

    def forget(self) -> None:
        self.upstream.seen.clear()
        self.uses.found.clear()
        self.kept.found.clear()

    async def ask(self, method: str, target: str, body: bytes = b"", **headers: str) -> Got:
        fields = {name.replace("_", "-"): value for name, value in headers.items()}
        return await self.raw(method, target, list(fields.items()), body)

    async def json(self, method: str, target: str, value: object) -> Got:
        return await self.ask(method, target, json.dumps(value).encode(), content_type="application/json")

    async def raw(self, method: str, target: str, fields: Sequence[tuple[str, str]], body: bytes = b"") -> Got:
        host, _, port = self.place.partition(":")
        reader, writer = await asyncio.open_connection(host, int(port))
        try:
            head = [f"{method} {target} HTTP/1.1", f"Host: {HOST}", "Connection: close"]
            head += [f"{name}: {value}" for name, value in fields]
            if body:
                head.append(f"Content-Length: {len(body)}")
            writer.write("\r\n".join([*head, "", ""]).encode("latin-1") + body)
            async with asyncio.timeout(30):
                data = await reader.read(-1)
        finally:
            writer.close()
        parser = h11.Connection(h11.CLIENT)
        parser.send(h11.Request(method=method, target="/", headers=[("host", "x")]))
        parser.send(h11.EndOfMessage())
        parser.receive_data(data)
        parser.receive_data(b"")
        response = parser.next_event()
        assert isinstance(response, h11.Response), response
        found = b""
        while isinstance(event := parser.next_event(), h11.Data):
            found += event.data
        headers = {name.decode(): value.decode("latin-1") for name, value in response.headers}
        return Got(response.status_code, headers, found)


def operations(*names: str, **globs: Sequence[str]) -> tuple[Operation, ...]:
    """``globs`` are of the last one; ``__`` stands for a dot."""
    limits = tuple(Parameter(name.replace("__", "."), tuple(values)) for name, values in globs.items())
    return tuple(Operation(name, limits if name == names[-1] else ()) for name in names)


@asynccontextmanager
async def bench(
    names: Sequence[Operation] = operations(*ALL),
    *,
    document: Path = DOCUMENT,
    allow: tuple[ApiRule, ...] = (ApiRule("tickets"),),
    ask: tuple[ApiRule, ...] = (),
    deny: tuple[ApiRule, ...] = (),
    base: str = "/v1",
    irreversible: Verdict = Verdict.ALLOW,
    credential: Credential | None = CREDENTIAL,
    secret: str = CANARY,
    **limits: Any,
) -> AsyncIterator[Bench]:
    upstream = Upstream()
    async with AsyncExitStack() as stack:
        await stack.enter_async_context(upstream.running())
        url = f"http://127.0.0.1:{upstream.port}{base}"
        service = Service("tickets", str(document), url, tuple(names), credential, **limits)
        policy = Policy(api=Api(allow, ask, deny, (service,)), irreversible=irreversible)
        made = Bench(policy, upstream)
        opening = prepare(policy, {"TICKETS_KEY": secret})
        setting = Setting(
            "box", "box", policy, made.monitor, Execs(), (made.uses,), made.kept, made.ended.append, "/nowhere"
        )
        made.handler = opening(setting)
        stack.push_async_callback(made.handler.close)
        made.place = await stack.enter_async_context(
            served(made.handler.handle, host=HOST, max_body=made.handler.max_body)
        )
        yield made
        assert not made.ended
