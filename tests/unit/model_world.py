"""A broker of models with all around it that counts: scripted upstreams on loopback, and records of what was told."""

from __future__ import annotations

import asyncio
import json
import socket
import ssl
from collections.abc import AsyncIterator, Awaitable, Callable, Mapping, Sequence
from contextlib import asynccontextmanager, suppress
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import h11

from corral.actions import Content, Decision, Origin, Subject, ToolCall, Used
from corral.brokers.http import Connection, Room, serve
from corral.brokers.model.broker import ModelBroker, prepare
from corral.brokers.model.capture import Capture
from corral.brokers.setting import Setting
from corral.monitor.core import Monitor
from corral.policy.model import Credential, CredentialKind, Model, ModelApi, ModelRule, Patience, Policy, Upstream
from corral.policy.part import PolicyPart

HOST = "model.corral.internal"
ORIGIN = Origin("box", "box")
CANARY = "canary-5f2d1e77c0-secret"
"""The key that only the upstream may see."""
Script = Callable[["Exchange"], Awaitable[None]]


@dataclass
class Exchange:
    """One request at an upstream, and its connection."""

    method: str
    target: str
    headers: dict[str, str]
    body: bytes
    reader: asyncio.StreamReader
    writer: asyncio.StreamWriter

    @property
    def json(self) -> Any:
        return json.loads(self.body)

    async def raw(self, data: bytes) -> None:
        self.writer.write(data)
        await self.writer.drain()

    async def answer(self, body: bytes, status: int = 200, **headers: str) -> None:
        fields = {"content-type": "application/json", "content-length": str(len(body)), **_dashed(headers)}
        await self.raw(_head(status, fields) + body)

    async def stream(self, pieces: Sequence[bytes], *, pause: float = 0.0, end: bool = True, **headers: str) -> None:
        fields = {"content-type": "text/event-stream; charset=utf-8", "transfer-encoding": "chunked"}
        await self.raw(_head(200, {**fields, **_dashed(headers)}))
        for piece in pieces:
            await self.raw(b"%x\r\n%s\r\n" % (len(piece), piece))
            await asyncio.sleep(pause)
        if end:
            await self.raw(b"0\r\n\r\n")


def _dashed(headers: Mapping[str, str]) -> dict[str, str]:
    return {name.replace("_", "-"): value for name, value in headers.items()}


def _head(status: int, fields: Mapping[str, str]) -> bytes:
    lines = [f"HTTP/1.1 {status} Said", *(f"{name}: {value}" for name, value in fields.items())]
    return "\r\n".join(lines).encode("latin-1") + b"\r\n\r\n"


class ScriptedUpstream:
    """Answers each request with the next script, the last again and again."""

    def __init__(self, *scripts: Script, tls: ssl.SSLContext | None = None) -> None:
        self.scripts = list(scripts)
        self.seen: list[Exchange] = []
        self._server: asyncio.Server | None = None
        self._tls = tls
        self._tasks: set[asyncio.Task[None]] = set()
        self.port = 0
        self.connections = 0

    async def __aenter__(self) -> ScriptedUpstream:
        self._server = await asyncio.start_server(self._client, "127.0.0.1", 0, limit=1 << 26, ssl=self._tls)
        self.port = self._server.sockets[0].getsockname()[1]
        return self

    async def __aexit__(self, *_: object) -> None:
        assert self._server is not None
        self._server.close()
        for task in tuple(self._tasks):
            task.cancel()
        await asyncio.sleep(0)

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.port}" if self._tls is None else f"https://localhost:{self.port}"

    async def _client(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        task = asyncio.current_task()
        assert task is not None
        self._tasks.add(task)
        self.connections += 1
        try:
            while await self._exchange(reader, writer):
                pass
        except (ConnectionError, asyncio.IncompleteReadError):
            pass
        finally:
            self._tasks.discard(task)
            writer.close()

    async def _exchange(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> bool:
        head = await reader.readuntil(b"\r\n\r\n")
        first, *lines = head.decode("latin-1").split("\r\n")[:-2]
        method, target, _ = first.split(" ")
        headers = {name.lower(): value.strip() for name, _, value in (line.partition(":") for line in lines)}
        body = await reader.readexactly(int(headers.get("content-length", "0")))
        exchange = Exchange(method, target, headers, body, reader, writer)
        script = self.scripts.pop(0) if len(self.scripts) > 1 else self.scripts[0]
        self.seen.append(exchange)
        await script(exchange)
        return not writer.is_closing()


@dataclass
class Told:
    """What others were told, in order."""

    decisions: list[Decision] = field(default_factory=list)
    used: list[Used] = field(default_factory=list)
    kept: list[tuple[Content, bytes, bool, str]] = field(default_factory=list)
    steps: list[tuple[str, str, tuple[ToolCall, ...]]] = field(default_factory=list)
    ends: list[str] = field(default_factory=list)
    order: list[str] = field(default_factory=list)
    keep: int = 1 << 24
    step: int = 0

    def write(self, decision: Decision) -> None:
        self.order.append("decided")
        self.decisions.append(decision)

    def tally(self, used: Used) -> None:
        self.order.append("used")
        self.used.append(used)

    def keeps(self, content: Content) -> int:
        return self.keep

    def next(self) -> int:
        self.step += 1
        return self.step

    def asked(self, origin: Origin, conversation: str) -> None:
        self.order.append("asked")
        self.steps.append(("asked", conversation, ()))

    def answered(self, origin: Origin, conversation: str, tools: Sequence[ToolCall]) -> int:
        self.order.append("answered")
        self.steps.append(("answered", conversation, tuple(tools)))
        return self.next()

    def begin(self, number: int) -> int:
        return number

    def of_exec(self, number: int) -> int:
        return number

    def open_in(self, origin: Origin, conversation: str) -> int:
        return 0

    def cause_of(self, origin: Origin, subject: Subject | None = None) -> Origin:
        return replace(origin, step=self.step)


@dataclass
class _Tally:
    told: Told

    def used(self, used: Used) -> None:
        self.told.tally(used)


@dataclass
class _Keeper:
    told: Told

    def keeps(self, content: Content) -> int:
        return self.told.keep

    def keep(self, origin: Origin, content: Content, data: bytes, is_whole: bool, about: str, call: int = 0) -> None:
        self.told.kept.append((content, data, is_whole, about))


PATIENCE = Patience(connect=5, first=5, idle=5, total=20, retries=0)


def upstream(scripted: ScriptedUpstream, api: ModelApi = ModelApi.OPENAI, name: str = "up", **rest: Any) -> Upstream:
    base = f"{scripted.url}/v1" if api is ModelApi.OPENAI else scripted.url
    if api is ModelApi.OPENAI:
        credential = Credential(CredentialKind.BEARER, "env:KEY")
    else:
        credential = Credential(CredentialKind.HEADER, "env:KEY", header="x-api-key")
    return Upstream(name, base, api, credential=credential, **rest)


def model(*upstreams: Upstream, **rest: Any) -> Model:
    return Model(**{"allow": (ModelRule("*"),), "upstreams": upstreams, "patience": PATIENCE, **rest})


@dataclass
class World:
    """The broker and its clients."""

    broker: ModelBroker
    told: Told
    room: Room
    overs: list[str] = field(default_factory=list)
    connections: list[Connection] = field(default_factory=list)

    def make(self) -> Connection:
        made = Connection(HOST, ORIGIN, self.broker.handle, self.broker.max_body, self.room, self.overs.append)
        self.connections.append(made)
        return made

    async def connect(self) -> Client:
        ours, theirs = socket.socketpair()
        ours.setblocking(False)
        theirs.setblocking(False)
        await serve(theirs, self.make)
        return Client(ours)

    async def post(self, path: str, value: object, **headers: str) -> Answered:
        """One request on a connection of its own."""
        body = value if isinstance(value, bytes) else json.dumps(value).encode()
        return await (await self.connect()).ask("POST", path, body, **headers)

    async def get(self, path: str, **headers: str) -> Answered:
        return await (await self.connect()).ask("GET", path, b"", **headers)

    async def quiet(self) -> None:
        """Returns when nothing is under way."""
        async with asyncio.timeout(10):
            while any(each.task is not None and not each.task.done() for each in self.connections):
                await asyncio.sleep(0.005)


@asynccontextmanager
async def world(
    what: Model,
    *,
    capture: Capture | None = None,
    environment: Mapping[str, str] | None = None,
    told: Told | None = None,
) -> AsyncIterator[World]:
    told = told or Told()
    policy = Policy(model=what)
    monitor = Monitor(policy=PolicyPart(policy), sink=told, on_kill=told.ends.append)
    setting = Setting(
        sandbox="box",
        session="box",
        policy=policy,
        monitor=monitor,
        steps=told,
        tallies=(_Tally(told),),
        keeper=_Keeper(told),
        end=told.ends.append,
        state="",
    )
    opening = prepare(policy, {"KEY": CANARY} if environment is None else environment, capture)
    broker = opening(setting)
    assert isinstance(broker, ModelBroker)
    made = World(broker, told, Room(1 << 28))
    try:
        yield made
    finally:
        tasks = [task for each in made.connections if (task := each.task) is not None]
        for each in made.connections:
            each.close("over", broken=True)
        if tasks:
            await asyncio.wait(tasks)
        await broker.close()


@asynccontextmanager
async def listening(made: World, directory: Path) -> AsyncIterator[str]:
    """The broker on a Unix socket, for clients that insist on dialling."""
    path = str(directory / "broker.sock")
    loop = asyncio.get_running_loop()
    server = await loop.create_unix_server(made.make, path)
    try:
        yield path
    finally:
        server.close()


@dataclass
class Answered:
    """What a client got."""

    status: int
    headers: dict[str, str]
    body: bytes
    is_whole: bool

    @property
    def json(self) -> Any:
        return json.loads(self.body)


@dataclass
class Client:
    """The other end of a connection."""

    sock: socket.socket

    async def send(self, data: bytes) -> None:
        await asyncio.get_running_loop().sock_sendall(self.sock, data)

    async def receive(self) -> bytes:
        async with asyncio.timeout(15):
            return await asyncio.get_running_loop().sock_recv(self.sock, 1 << 18)

    async def request(self, method: str, path: str, body: bytes, **headers: str) -> None:
        fields = {"Host": HOST, "Content-Length": str(len(body)), **_dashed(headers)}
        if body and "content-type" not in fields:
            fields["content-type"] = "application/json"
        lines = [f"{method} {path} HTTP/1.1", *(f"{name}: {value}" for name, value in fields.items())]
        await self.send("\r\n".join(lines).encode() + b"\r\n\r\n" + body)

    async def ask(self, method: str, path: str, body: bytes, **headers: str) -> Answered:
        await self.request(method, path, body, **headers)
        return await self.answer()

    async def answer(self) -> Answered:
        parser = h11.Connection(h11.CLIENT)
        parser.send(h11.Request(method="GET", target="/", headers=[("host", HOST)]))
        parser.send(h11.EndOfMessage())
        status, body = 0, b""
        headers: dict[str, str] = {}
        while True:
            try:
                event = parser.next_event()
            except h11.RemoteProtocolError:
                return Answered(status, headers, body, False)
            if event is h11.NEED_DATA:
                data = b""
                with suppress(ConnectionError):
                    data = await self.receive()
                parser.receive_data(data)
            elif isinstance(event, h11.Response):
                status = event.status_code
                headers = {name.decode(): value.decode("latin-1") for name, value in event.headers}
            elif isinstance(event, h11.Data):
                body += bytes(event.data)
            elif isinstance(event, h11.EndOfMessage):
                return Answered(status, headers, body, True)
            else:
                return Answered(status, headers, body, False)

    def close(self) -> None:
        self.sock.close()
