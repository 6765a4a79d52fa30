"""The official clients, with the broker and without: what they send, what they get, and what they make of it."""

from __future__ import annotations

import asyncio
import base64
import json
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import asynccontextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import anthropic
import httpx2
import openai
import pytest

from corral.actions import Ending
from corral.modelapi.answer import Api
from corral.policy.model import ModelApi
from tests.unit import model_answers
from tests.unit.model_world import CANARY, HOST, Exchange, ScriptedUpstream, Told, listening, model, upstream, world

PIXEL = base64.b64encode(bytes(range(256)) * 8).decode()
LARGE = "Wörter und 🐎, immer wieder. " * 60_000
"""Two MiB."""
TURNS: dict[str, list[dict[str, Any]]] = {
    "unicode": [{"role": "user", "content": 'Grüße, 你好, \u202e "\\u0000" 👋🏽 \x7f'}],
    "large": [{"role": "user", "content": LARGE}],
}


class _Recorded(httpx2.AsyncByteStream):
    def __init__(self, stream: httpx2.AsyncByteStream, into: bytearray) -> None:
        self._stream, self._into = stream, into

    async def __aiter__(self) -> AsyncIterator[bytes]:
        async for data in self._stream:
            self._into += data
            yield data

    async def aclose(self) -> None:
        await self._stream.aclose()


class Recording(httpx2.AsyncHTTPTransport):
    """Writes down the bytes of bodies."""

    def __init__(self, **rest: Any) -> None:
        super().__init__(**rest)
        self.requests: list[bytes] = []
        self.answers: list[tuple[int, bytearray]] = []

    async def handle_async_request(self, request: httpx2.Request) -> httpx2.Response:
        self.requests.append(await request.aread())
        response = await super().handle_async_request(request)
        body = bytearray()
        self.answers.append((response.status_code, body))
        assert isinstance(response.stream, httpx2.AsyncByteStream)
        response.stream = _Recorded(response.stream, body)
        return response


@dataclass
class Way:
    """How the clients reach the upstream."""

    base: str
    key: str
    transport: Recording

    def openai(self, **rest: Any) -> openai.AsyncOpenAI:
        return openai.AsyncOpenAI(
            base_url=f"{self.base}/v1", api_key=self.key, http_client=self._client(), **{"max_retries": 0, **rest}
        )

    def anthropic(self, **rest: Any) -> anthropic.AsyncAnthropic:
        return anthropic.AsyncAnthropic(
            base_url=self.base, api_key=self.key, http_client=self._client(), **{"max_retries": 0, **rest}
        )

    def _client(self) -> httpx2.AsyncClient:
        return httpx2.AsyncClient(transport=self.transport)


@asynccontextmanager
async def both(directory: Path, up: ScriptedUpstream) -> AsyncIterator[tuple[Way, Way, Told]]:
    """Straight to the upstream, and through the broker."""
    what = model(upstream(up), upstream(up, ModelApi.ANTHROPIC, "other"))
    async with world(what) as made, listening(made, directory) as path:
        straight = Way(up.url, CANARY, Recording())
        yield straight, Way(f"http://{HOST}", "none", Recording(uds=path)), made.told
        await made.quiet()


Ask = Callable[[Way], Awaitable[Any]]


async def same(directory: Path, up: ScriptedUpstream, ask: Ask) -> tuple[Any, Told]:
    """What was made of it, which is the same on both ways, and all bytes of bodies with it."""
    async with both(directory, up) as (straight, through, told):
        expected = await ask(straight)
        got = await ask(through)
    assert got == expected
    assert through.transport.answers == straight.transport.answers
    sent = [each.body for each in up.seen]
    half = len(sent) // 2
    assert sent[:half] == sent[half:] == through.transport.requests == straight.transport.requests
    targets = [(each.method, each.target) for each in up.seen]
    assert targets[:half] == targets[half:]
    for ours, theirs in zip(up.seen[half:], up.seen[:half], strict=True):
        kept = ("content-type", "accept", "user-agent", "anthropic-version", "anthropic-beta", "x-stainless-lang")
        assert [ours.headers.get(name) for name in kept] == [theirs.headers.get(name) for name in kept]
    for _, body in through.transport.answers:
        assert CANARY.encode() not in body
    return got, told


def saying(body: bytes, *, pieces: int = 97) -> ScriptedUpstream:
    """Streams come in pieces that end anywhere."""

    async def says(exchange: Exchange) -> None:
        if body.startswith(b"{"):
            await exchange.answer(body, x_request_id="req_1", request_id="req_1")
        else:
            await exchange.stream([body[at : at + pieces] for at in range(0, len(body), pieces)], x_request_id="req_1")

    return ScriptedUpstream(says)


async def _all(stream: Any) -> list[Any]:
    return [event.model_dump() async for event in stream]


TOOL = {"type": "object", "properties": {"command": {"type": "array", "items": {"type": "string"}}}}


def asking(api: Api, is_stream: bool, turns: list[dict[str, Any]]) -> Ask:
    async def chat(way: Way) -> Any:
        tools: Any = [{"type": "function", "function": {"name": "shell", "parameters": TOOL}}]
        made = await way.openai().chat.completions.create(
            model="m",
            messages=turns,
            tools=tools,
            stream=is_stream,  # type: ignore[arg-type]
        )
        return await _all(made) if is_stream else made.model_dump()  # type: ignore[union-attr]

    async def responses(way: Way) -> Any:
        tools: Any = [{"type": "function", "name": "shell", "parameters": TOOL, "strict": False}]
        made = await way.openai().responses.create(model="m", input=turns, tools=tools, stream=is_stream)  # type: ignore[arg-type]
        return await _all(made) if is_stream else made.model_dump()  # type: ignore[union-attr]

    async def messages(way: Way) -> Any:
        tools: Any = [{"name": "shell", "input_schema": TOOL}]
        made = await way.anthropic().messages.create(
            model="m",
            messages=turns,
            max_tokens=100,
            tools=tools,
            stream=is_stream,  # type: ignore[arg-type]
        )
        return await _all(made) if is_stream else made.model_dump()  # type: ignore[union-attr]

    return {Api.CHAT: chat, Api.RESPONSES: responses, Api.MESSAGES: messages}[api]


@pytest.mark.parametrize("turns", TURNS)
@pytest.mark.parametrize("name", model_answers.ALL)
async def test_what_clients_get_is_the_same(tmp_path: Path, name: str, turns: str) -> None:
    given = model_answers.ALL[name]
    async with saying(given.body) as up:
        got, told = await same(tmp_path, up, asking(given.api, "stream" in name, TURNS[turns]))
    assert got
    assert [call.name for call in told.used[0].tools] == [call.name for call in given.answer.tools]
    assert told.used[0].input_tokens == given.answer.input_tokens and not told.used[0].estimated


@pytest.mark.parametrize(
    ("name", "image"),
    [
        ("chat body", {"type": "image_url", "image_url": {"url": f"data:image/png;base64,{PIXEL}"}}),
        ("responses body", {"type": "input_image", "detail": "auto", "image_url": f"data:image/png;base64,{PIXEL}"}),
        ("messages body", {"type": "image", "source": {"type": "base64", "media_type": "image/png", "data": PIXEL}}),
    ],
)
async def test_images_arrive(tmp_path: Path, name: str, image: dict[str, Any]) -> None:
    given = model_answers.ALL[name]
    async with saying(given.body) as up:
        await same(tmp_path, up, asking(given.api, False, [{"role": "user", "content": [image]}]))
        assert PIXEL.encode() in up.seen[-1].body


async def test_the_helpers_of_clients_that_put_a_stream_together(tmp_path: Path) -> None:
    async def messages(way: Way) -> Any:
        turns: Any = TURNS["unicode"]
        async with way.anthropic().messages.stream(model="m", messages=turns, max_tokens=9) as stream:
            return (await stream.get_final_message()).model_dump()

    async with saying(model_answers.ALL["messages stream"].body, pieces=11) as up:
        got, _ = await same(tmp_path, up, messages)
    assert got["stop_reason"] == "tool_use"


def openai_error(status: int) -> bytes:
    return json.dumps({"error": {"message": f"so {status}", "type": "t", "param": "p", "code": "c"}}).encode()


def anthropic_error(status: int) -> bytes:
    return json.dumps({"type": "error", "error": {"type": "t", "message": f"so {status}"}, "request_id": "r"}).encode()


def said(error: Exception) -> Any:
    assert isinstance(error, openai.APIStatusError | anthropic.APIStatusError), repr(error)
    retry = error.response.headers.get("retry-after")
    return type(error).__name__, error.status_code, error.message, error.body, error.request_id, retry


@pytest.mark.parametrize("status", [400, 401, 403, 404, 409, 413, 422, 429, 500, 502, 503, 529])
@pytest.mark.parametrize("api", [Api.CHAT, Api.MESSAGES])
@pytest.mark.parametrize("is_stream", [False, True])
async def test_errors_are_the_same(tmp_path: Path, api: Api, status: int, is_stream: bool) -> None:
    body = (anthropic_error if api is Api.MESSAGES else openai_error)(status)

    async def errs(exchange: Exchange) -> None:
        await exchange.answer(body, status, x_request_id="req_5", request_id="req_5", retry_after="3")

    async def ask(way: Way) -> Any:
        with pytest.raises((openai.APIStatusError, anthropic.APIStatusError)) as caught:
            await asking(api, is_stream, [{"role": "user", "content": "hi"}])(way)
        return said(caught.value)

    async with ScriptedUpstream(errs) as up:
        got, told = await same(tmp_path, up, ask)
    assert got[1] == status and f"so {status}" in got[2] and got[4:] == ("req_5", "3")
    assert (told.used[0].status, told.used[0].ending) == (status, Ending.ANSWERED)


@pytest.mark.parametrize("api", [Api.CHAT, Api.RESPONSES, Api.MESSAGES])
async def test_an_error_in_the_middle_of_a_stream_is_the_same(tmp_path: Path, api: Api) -> None:
    name = {Api.CHAT: "chat stream", Api.RESPONSES: "responses stream", Api.MESSAGES: "messages stream"}[api]
    whole = model_answers.ALL[name].body
    start = whole[: whole.index(b"\n\n", len(whole) // 3) + 2]
    error = {"type": "error", "error": {"type": "overloaded_error", "message": "too much"}}
    if api is Api.RESPONSES:
        error = {"type": "error", "code": "c", "message": "too much", "param": None, "sequence_number": 9}  # type: ignore[dict-item]
    body = start + model_answers.events(error, named=api is not Api.CHAT)

    async def ask(way: Way) -> Any:
        try:
            return await asking(api, True, [{"role": "user", "content": "hi"}])(way)
        except (openai.APIError, anthropic.APIError) as error:
            return type(error).__name__, error.message, error.body

    async with saying(body) as up:
        got, _ = await same(tmp_path, up, ask)
    assert "too much" in repr(got)


async def test_a_stream_that_breaks_off_is_an_error_on_both_ways(tmp_path: Path) -> None:
    body = model_answers.ALL["chat stream"].body[:900]

    async def breaks(exchange: Exchange) -> None:
        await exchange.stream([body], end=False)
        exchange.writer.close()

    async def ask(way: Way) -> Any:
        events = []
        stream = await way.openai().chat.completions.create(
            model="m", messages=[{"role": "user", "content": "hi"}], stream=True
        )
        with pytest.raises((httpx2.TransportError, openai.APIError)):
            async for each in stream:
                events.append(each.model_dump())
        return events

    async with ScriptedUpstream(breaks) as up:
        got, told = await same(tmp_path, up, ask)
    assert got and told.used[0].ending is Ending.FAILED


@pytest.mark.parametrize("api", [Api.CHAT, Api.MESSAGES])
async def test_a_client_that_waits_no_longer_is_the_same(tmp_path: Path, api: Api) -> None:
    left = asyncio.Semaphore(0)

    async def sleeps(exchange: Exchange) -> None:
        assert await exchange.reader.read() == b""
        left.release()
        exchange.writer.close()

    async def ask(way: Way) -> Any:
        turns: Any = [{"role": "user", "content": "hi"}]
        with pytest.raises((openai.APITimeoutError, anthropic.APITimeoutError)) as caught:
            if api is Api.CHAT:
                await way.openai(timeout=0.3).chat.completions.create(model="m", messages=turns)
            else:
                await way.anthropic(timeout=0.3).messages.create(model="m", messages=turns, max_tokens=5)
        async with asyncio.timeout(10):
            await left.acquire()  # the upstream is told
        return type(caught.value).__name__

    async with ScriptedUpstream(sleeps) as up:
        _, told = await same(tmp_path, up, ask)
    assert told.used[0].ending is Ending.ABANDONED


async def test_a_stream_that_is_cancelled_ends_upstream(tmp_path: Path) -> None:
    first = model_answers.ALL["messages stream"].body[:1200]
    left = asyncio.Semaphore(0)

    async def trickles(exchange: Exchange) -> None:
        await exchange.stream([first], end=False)
        assert await exchange.reader.read() == b""
        left.release()
        exchange.writer.close()

    async def ask(way: Way) -> Any:
        turns: Any = [{"role": "user", "content": "hi"}]
        stream = await way.anthropic().messages.create(model="m", messages=turns, max_tokens=5, stream=True)
        got = [(await anext(stream)).model_dump() for _ in range(3)]
        await stream.close()
        async with asyncio.timeout(10):
            await left.acquire()
        return got

    async with ScriptedUpstream(trickles) as up:
        got, told = await same(tmp_path, up, ask)
    assert len(got) == 3 and told.used[0].ending is Ending.ABANDONED


async def test_clients_ask_again_as_they_do(tmp_path: Path) -> None:
    """The broker asks again by itself; with no retries of its own it leaves that to the client."""
    calls = 0

    async def busy_once(exchange: Exchange) -> None:
        nonlocal calls
        calls += 1
        if calls % 2:
            await exchange.answer(openai_error(429), 429, retry_after_ms="10")
        else:
            await exchange.answer(model_answers.ALL["chat body"].body)

    async def ask(way: Way) -> Any:
        turns: Any = [{"role": "user", "content": "hi"}]
        made = await way.openai(max_retries=2).chat.completions.create(model="m", messages=turns)
        return made.model_dump()

    async with ScriptedUpstream(busy_once) as up:
        await same(tmp_path, up, ask)
    assert calls == 4


async def test_tokens_and_models(tmp_path: Path) -> None:
    async def knows(exchange: Exchange) -> None:
        if exchange.target.startswith("/v1/models"):
            entry = {"id": "m", "type": "model", "display_name": "M", "created_at": "2026-01-01T00:00:00Z"}
            await exchange.answer(json.dumps({"data": [entry], "has_more": False}).encode())
        else:
            await exchange.answer(b'{"input_tokens": 12}')

    async with ScriptedUpstream(knows) as up, both(tmp_path, up) as (straight, through, _):
        turns: Any = [{"role": "user", "content": "hi"}]
        for way in (straight, through):
            client = way.anthropic()
            assert (await client.messages.count_tokens(model="m", messages=turns)).input_tokens == 12
            assert [each.id async for each in client.models.list()] == ["m"]


async def test_what_the_broker_refuses_is_an_error_that_clients_know(tmp_path: Path) -> None:
    async with saying(model_answers.ALL["chat body"].body) as up:
        turns: Any = [{"role": "user", "content": "hi"}]
        async with world(model(upstream(up), allow=())) as made, listening(made, tmp_path) as path:
            way = Way(f"http://{HOST}", "none", Recording(uds=path))
            with pytest.raises(openai.PermissionDeniedError, match="may not be asked"):
                await way.openai(max_retries=5).chat.completions.create(model="m", messages=turns)
            with pytest.raises(anthropic.PermissionDeniedError, match="may not be asked"):
                await way.anthropic(max_retries=5).messages.create(model="m", messages=turns, max_tokens=5)
        assert not up.seen and len(made.told.used) == 2  # nobody asks again for what is denied
