"""The peers of the model broker's figures, each a process of its own: a scripted upstream, a broker behind an acceptor
that stands for the gateway, and a crowd of clients.

The name of a model says what the upstream does: ``paced-20-100`` sends 100 events, 20 ms apart; ``fast-2000`` 2,000 as
fast as they are taken.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import resource
import socket
import sys
import threading
import time
from typing import cast

HOST = "model.corral.internal"
KEY = "a-key-that-only-the-upstream-sees"
BATCH = 64
"""Events that a fast stream writes at once, as a server does whose kernel has room."""


def _event(number: int) -> bytes:
    """As OpenAI's servers write one token: about 300 bytes."""
    chunk = {
        "id": "chatcmpl-CTpZbVxYq3fJw9mQhE7sRk2uLd",
        "object": "chat.completion.chunk",
        "created": 1790000000,
        "model": "gpt-scripted-2026",
        "service_tier": "default",
        "system_fingerprint": "fp_1f2e3d4c5b",
        "choices": [{"index": 0, "delta": {"content": f" word{number}"}, "logprobs": None, "finish_reason": None}],
        "usage": None,
        "obfuscation": "xK3pQ9",
    }
    return _framed(b"data: " + json.dumps(chunk, separators=(",", ":")).encode() + b"\n\n")


def _framed(data: bytes) -> bytes:
    return b"%x\r\n%s\r\n" % (len(data), data)


_EVENTS = [_event(number) for number in range(64)]
_LAST = (
    _framed(b'data: {"id":"c","model":"m","choices":[{"index":0,"delta":{},"finish_reason":"stop"}]}\n\n')
    + _framed(
        b'data: {"id":"c","choices":[],"usage":{"prompt_tokens":20,"completion_tokens":100,"total_tokens":120}}\n\n'
    )
    + _framed(b"data: [DONE]\n\n")
    + b"0\r\n\r\n"
)
_HEAD = (
    b"HTTP/1.1 200 OK\r\ncontent-type: text/event-stream; charset=utf-8\r\nx-request-id: req_1\r\n"
    b"transfer-encoding: chunked\r\n\r\n"
)


class _Upstream(asyncio.Protocol):
    def __init__(self) -> None:
        self._loop = asyncio.get_running_loop()
        self._in = b""
        self._can_write = asyncio.Event()
        self._can_write.set()

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        self._transport = cast(asyncio.Transport, transport)

    def pause_writing(self) -> None:
        self._can_write.clear()

    def resume_writing(self) -> None:
        self._can_write.set()

    def data_received(self, data: bytes) -> None:
        self._in += data
        head, mark, body = self._in.partition(b"\r\n\r\n")
        if not mark:
            return
        lines = head.lower().split(b"\r\n")
        length = next((int(line[15:]) for line in lines if line.startswith(b"content-length:")), 0)
        if len(body) < length:
            return
        self._in = b""
        model = json.loads(body)["model"].rpartition("/")[2]
        kind, *numbers = model.split("-")
        if kind == "paced":
            self._paced(int(numbers[0]) / 1000, int(numbers[1]))
        else:
            self._task = self._loop.create_task(self._fast(int(numbers[0])))

    def _paced(self, interval: float, count: int) -> None:
        self._transport.write(_HEAD + _EVENTS[0])
        began, number = self._loop.time(), 1

        def tick() -> None:
            nonlocal number
            if number >= count:
                self._transport.write(_LAST)
                return
            self._transport.write(_EVENTS[number & 63])
            number += 1
            self._loop.call_at(began + number * interval, tick)

        self._loop.call_at(began + interval, tick)

    async def _fast(self, count: int) -> None:
        self._transport.write(_HEAD + _EVENTS[0])
        batch = b"".join(_EVENTS[:BATCH])
        for _ in range(count // BATCH):
            self._transport.write(batch)
            await self._can_write.wait()
            await asyncio.sleep(0)
        self._transport.write(_LAST)


async def _upstream(port: int) -> None:
    server = await asyncio.get_running_loop().create_server(_Upstream, "127.0.0.1", port, backlog=4096)
    print("ready", flush=True)
    await server.serve_forever()


class _Crowd(asyncio.Protocol):
    def __init__(self, request: bytes, done: asyncio.Future[None]) -> None:
        self._request, self._done = request, done
        self.first = self.end = 0.0
        self.size = 0
        self._tail = b""

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        self._transport = cast(asyncio.Transport, transport)

    def ask(self) -> None:
        self.began = time.perf_counter()
        self.first, self.size, self._tail = 0.0, 0, b""
        self._transport.write(self._request)

    def data_received(self, data: bytes) -> None:
        self.size += len(data)
        if not self.first and (b"data: " in data):
            self.first = time.perf_counter()
        self._tail = (self._tail + data)[-64:] if len(data) < 64 else data[-64:]
        if self._tail.endswith(b"0\r\n\r\n") and b"[DONE]" in self._tail and not self._done.done():
            self.end = time.perf_counter()
            self._done.set_result(None)

    def connection_lost(self, error: Exception | None) -> None:
        if not self._done.done():
            self._done.set_exception(ConnectionError("the stream broke off"))


async def _crowd(port: int, model: str, streams: int, key: str, turns: int, ramp: float) -> None:
    loop = asyncio.get_running_loop()
    messages = [{"role": "user", "content": "Tell me a story. " * 40}]
    body = json.dumps({"model": model, "stream": True, "messages": messages, "max_tokens": 1000}).encode()
    head = (
        f"POST /v1/chat/completions HTTP/1.1\r\nHost: {HOST}\r\nContent-Type: application/json\r\n"
        f"Authorization: Bearer {key}\r\nContent-Length: {len(body)}\r\n\r\n"
    )
    clients = []
    for _ in range(streams):
        done: asyncio.Future[None] = loop.create_future()
        _, client = await loop.create_connection(
            lambda done=done: _Crowd(head.encode() + body, done), "127.0.0.1", port
        )
        clients.append((client, done))
    await asyncio.sleep(streams / 500)  # all of them are accepted first: connections are another figure
    for at, (client, _) in enumerate(clients):
        loop.call_later(ramp * at / streams, client.ask)  # not all in one moment
    await asyncio.gather(*(done for _, done in clients))
    if turns > 1:
        await _again(clients[0][0], turns)
        return
    first = sorted(client.first - client.began for client, _ in clients)
    whole = sorted(client.end - client.began for client, _ in clients)
    span = max(client.end for client, _ in clients) - min(client.began for client, _ in clients)
    usage = resource.getrusage(resource.RUSAGE_SELF)
    print(
        json.dumps(
            {
                "first_p50": first[len(first) // 2],
                "first_p99": first[int(len(first) * 0.99)],
                "whole_p50": whole[len(whole) // 2],
                "whole_p99": whole[int(len(whole) * 0.99)],
                "span": span,
                "bytes": sum(client.size for client, _ in clients),
                "cpu": usage.ru_utime + usage.ru_stime,
            }
        )
    )


async def _again(client: _Crowd, turns: int) -> None:
    """One request after another on one connection."""
    first = []
    for _ in range(turns):
        client._done = asyncio.get_running_loop().create_future()
        client.ask()
        await client._done
        first.append(client.first - client.began)
    print(json.dumps({"firsts": first}))


def _broker(port: int, upstream: str) -> None:
    from corral.actions import Action, Attempt, Decision, Endpoint, Kind, Origin, Transport, Used, Verdict
    from corral.brokers.model.broker import prepare
    from corral.brokers.service import shared
    from corral.brokers.setting import Setting
    from corral.monitor.core import Monitor
    from corral.policy.doors import Broker
    from corral.policy.model import Credential, CredentialKind, Model, ModelApi, ModelRule, Policy, Upstream
    from corral.policy.part import PolicyPart

    class Nothing:
        def write(self, decision: Decision) -> None: ...
        def used(self, used: Used) -> None: ...
        def next(self) -> int:
            return 1

        def asked(self, origin: Origin, conversation: str) -> None: ...
        def answered(self, origin: Origin, conversation: str, tools: object) -> int:
            return 1

        def cause_of(self, origin: Origin, *_: object) -> Origin:
            return origin

    nothing = Nothing()
    credential = Credential(CredentialKind.BEARER, "env:KEY")
    policy = Policy(
        model=Model(
            allow=(ModelRule("*"),), upstreams=(Upstream("up", upstream, ModelApi.OPENAI, credential=credential),)
        )
    )
    setting = Setting(
        "box", "box", policy, Monitor(policy=PolicyPart(policy), sink=nothing), nothing, (nothing,), None, print, ""
    )  # type: ignore[arg-type]
    openings = {Broker.MODEL: prepare(policy, {"KEY": KEY})}
    brokers = shared().attach(lambda: setting, openings, print)
    door = brokers.doors[Broker.MODEL]
    action = Action(Kind.NET_CONNECT, Endpoint(Transport.TCP, port=80, name=HOST), Origin("box", "box"))
    decision = Decision(action, Verdict.ALLOW, "model", "", "", "policy", 1, 0.0)
    attempt = Attempt(Transport.TCP, (b"\x7f\0\0\1", 1), (b"\x7f\0\0\1", 80), decision)
    listener = socket.create_server(("127.0.0.1", port), backlog=4096)
    print("ready", flush=True)
    threading.Thread(target=_report, daemon=True).start()
    while True:
        sock, _ = listener.accept()
        door.take(sock, attempt, lambda *_: None)


def _report() -> None:
    """Says what was used until now, for each line that comes."""
    for _ in sys.stdin:
        usage = resource.getrusage(resource.RUSAGE_SELF)
        print(json.dumps({"cpu": usage.ru_utime + usage.ru_stime, "peak_kib": usage.ru_maxrss}), flush=True)


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("role", choices=("upstream", "broker", "crowd"))
    parser.add_argument("--port", type=int, required=True)
    parser.add_argument("--upstream", default="")
    parser.add_argument("--model", default="")
    parser.add_argument("--streams", type=int, default=1)
    parser.add_argument("--turns", type=int, default=1)
    parser.add_argument("--ramp", type=float, default=0.5)
    parser.add_argument("--key", default="none")
    given = parser.parse_args()
    resource.setrlimit(resource.RLIMIT_NOFILE, (resource.getrlimit(resource.RLIMIT_NOFILE)[1],) * 2)
    if given.role == "broker":
        _broker(given.port, given.upstream)
    elif given.role == "upstream":
        asyncio.run(_upstream(given.port))
    else:
        asyncio.run(_crowd(given.port, given.model, given.streams, given.key, given.turns, given.ramp))


if __name__ == "__main__":
    main()
