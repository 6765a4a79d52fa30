"""Tools over MCP: what the official client sees, and what a client that is not one gets."""

from __future__ import annotations

import asyncio
import json
from collections.abc import Mapping
from typing import Any

import aiohttp
import pytest
from hypothesis import given
from hypothesis import strategies as st
from mcp import Client, MCPError

from corral.actions import Origin
from corral.brokers.http import Request
from corral.brokers.mcp import HANDSHAKE_VERSIONS, MODERN_VERSIONS, PAGE, Mcp, Tool, ToolResult
from corral.brokers.schemas import SchemaFault
from corral.brokers.strict_json import Json
from tests.unit.loopback import ORIGIN, served

SCHEMA = {
    "type": "object",
    "properties": {"text": {"type": "string", "maxLength": 10}, "count": {"type": "integer"}},
    "required": ["text"],
    "additionalProperties": False,
}


class Calls:
    """What arrived at the tools."""

    def __init__(self) -> None:
        self.seen: list[tuple[Mapping[str, Json], Origin]] = []
        self.cancelled = asyncio.Event()
        self.began = asyncio.Event()

    async def echo(self, arguments: Mapping[str, Json], origin: Origin) -> ToolResult:
        self.seen.append((arguments, origin))
        return ToolResult(str(arguments["text"]), {"said": arguments["text"]})

    async def fail(self, arguments: Mapping[str, Json], origin: Origin) -> ToolResult:
        raise RuntimeError("a secret of ours")

    async def refuse(self, arguments: Mapping[str, Json], origin: Origin) -> ToolResult:
        return ToolResult("the policy does not allow it", is_error=True)

    async def wait(self, arguments: Mapping[str, Json], origin: Origin) -> ToolResult:
        self.began.set()
        try:
            await asyncio.sleep(60)
        except asyncio.CancelledError:
            self.cancelled.set()
            raise
        raise AssertionError


def make(calls: Calls, more: int = 0) -> Mcp:
    tools = [Tool(name, f"Does {name}.", SCHEMA, getattr(calls, name)) for name in ("echo", "fail", "refuse", "wait")]
    return Mcp("corral", "1", tools + [Tool(f"t{number}", "", SCHEMA, calls.echo) for number in range(more)])


@pytest.mark.parametrize("mode", ["auto", "legacy", *MODERN_VERSIONS])
async def test_the_official_client(mode: str) -> None:
    calls = Calls()
    async with served(make(calls).handle) as place, Client(f"http://{place}/mcp", mode=mode) as client:
        assert client.protocol_version == (HANDSHAKE_VERSIONS[0] if mode == "legacy" else MODERN_VERSIONS[0])
        listed = await client.list_tools()
        assert [tool.name for tool in listed.tools] == ["echo", "fail", "refuse", "wait"]
        assert listed.tools[0].input_schema == SCHEMA
        result = await client.call_tool("echo", {"text": "höhö"})
        assert result.content[0].text == "höhö" and result.structured_content == {"said": "höhö"}  # type: ignore[union-attr]
        assert not result.is_error and calls.seen == [({"text": "höhö"}, ORIGIN)]
        assert (await client.call_tool("refuse", {"text": ""})).is_error
        wrong = await client.call_tool("echo", {"text": 3})
        assert wrong.is_error and "text: 3 is not of type 'string'" in wrong.content[0].text  # type: ignore[union-attr]
        with pytest.raises(MCPError, match=r"The tool failed\."):
            await client.call_tool("fail", {"text": ""})
        with pytest.raises(MCPError, match="no such tool"):
            await client.call_tool("other", {})
    assert len(calls.seen) == 1


async def test_many_tools_come_in_pages() -> None:
    async with served(make(Calls(), 2 * PAGE).handle) as place, Client(f"http://{place}/") as client:
        names, cursor, pages = [], None, 0
        while True:
            page = await client.list_tools(cursor=cursor)
            names += [tool.name for tool in page.tools]
            pages, cursor = pages + 1, page.next_cursor
            if cursor is None:
                break
        assert pages == 3 and len(names) == len(set(names)) == 2 * PAGE + 4
        for wrong in ("0", "1", "-100", "100.0", "999", " 100", "\u0661\u0660\u0660"):
            with pytest.raises(MCPError, match="cursor"):
                await client.list_tools(cursor=wrong)


async def test_a_client_that_is_gone_cancels_its_call() -> None:
    calls = Calls()
    async with served(make(calls).handle) as place, aiohttp.ClientSession() as session:
        asking = asyncio.create_task(
            session.post(
                f"http://{place}/mcp", json=message("tools/call", name="wait", arguments={"text": ""})
            ).__aenter__()
        )
        await asyncio.wait_for(calls.began.wait(), 10)
        asking.cancel()
        await asyncio.wait_for(calls.cancelled.wait(), 10)


def message(method: str, **params: Any) -> dict[str, Any]:
    return {"jsonrpc": "2.0", "id": 1, "method": method, "params": params}


CALL = message("tools/call", name="echo", arguments={"text": "x"})
JSON = {"content-type": "application/json"}
MODERN_META = {
    "io.modelcontextprotocol/protocolVersion": MODERN_VERSIONS[0],
    "io.modelcontextprotocol/clientCapabilities": {},
}


class Told:
    """One answer, taken without a connection."""

    def __init__(self) -> None:
        self.status, self.body, self.headers = 0, b"", []  # type: ignore[var-annotated]

    async def answer(self, status: int, body: bytes, content_type: str = "", headers: Any = ()) -> None:
        assert self.status == 0, "one answer only"
        self.status, self.body, self.headers = status, body, list(headers)

    async def json(self, status: int, value: object, headers: Any = ()) -> None:
        await self.answer(status, json.dumps(value).encode())


async def told(body: bytes, headers: dict[str, str] = JSON, method: str = "POST", calls: Calls | None = None) -> Told:
    fields = tuple(
        (name.encode(), value.encode()) for name, value in {"host": "data.corral.internal", **headers}.items()
    )
    answer = Told()
    request = Request(method, "/mcp", "", fields, body, ORIGIN)
    await make(calls or Calls()).handle(request, answer)  # type: ignore[arg-type]
    return answer


@pytest.mark.parametrize(
    ("body", "code"),
    [
        (b"", -32700),
        (b"{", -32700),
        (b"[]", -32600),
        (json.dumps([CALL]).encode(), -32600),  # a batch
        (json.dumps([CALL, CALL]).encode(), -32600),
        (b'"x"', -32600),
        (b'{"jsonrpc":"2.0","id":1,"result":{}}', -32600),  # an answer, to nothing that we asked
        (json.dumps({**CALL, "jsonrpc": "1.0"}).encode(), -32600),
        (json.dumps({**CALL, "method": 3}).encode(), -32600),
        (json.dumps({**CALL, "id": None}).encode(), -32600),
        (json.dumps({**CALL, "id": True}).encode(), -32600),
        (json.dumps({**CALL, "id": 1.5}).encode(), -32600),
        (json.dumps({**CALL, "id": [1]}).encode(), -32600),
        (json.dumps({**CALL, "id": "x" * 1000}).encode(), -32600),
        (json.dumps({**CALL, "params": [1]}).encode(), -32602),
        (json.dumps(message("tools/call", name=["echo"])).encode(), -32602),
        (json.dumps(message("tools/call", name="echo", arguments=[1])).encode(), -32602),
        (json.dumps(message("initialize")).encode(), -32602),
        (json.dumps(message("resources/list")).encode(), -32601),
        (json.dumps(message("__init__")).encode(), -32601),
        (json.dumps(CALL).encode()[:-1] + b',"method":"ping"}', -32700),  # a name that stands twice
        (json.dumps(CALL).encode("utf-16"), -32700),
        (b"\xef\xbb\xbf" + json.dumps(CALL).encode(), -32700),
        (json.dumps(CALL).replace('"x"', '"\\ud800"').encode(), -32700),
        (json.dumps(CALL).replace('"x"', "NaN").encode(), -32700),
        (json.dumps(CALL).replace('"x"', "1e999").encode(), -32700),
        (json.dumps(CALL).replace('"x"', "[" * 40 + "]" * 40).encode(), -32700),
        (b"[" * 900_000, -32700),
        (json.dumps(CALL).replace('"x"', "9" * 900_000).encode(), -32700),
        (b'{"jsonrpc":"2.0","method":"notifications/x","params":[]}', -32600),
    ],
)
async def test_what_is_no_request_is_an_error(body: bytes, code: int) -> None:
    calls = Calls()
    answer = await told(body, calls=calls)
    value = json.loads(answer.body)
    assert value["error"]["code"] == code and "result" not in value and not calls.seen
    assert len(answer.body) < 1000


@pytest.mark.parametrize(
    ("headers", "method", "status"),
    [
        ({}, "POST", 415),
        ({"content-type": "text/plain"}, "POST", 415),
        ({"content-type": "application/x-www-form-urlencoded"}, "POST", 415),
        ({**JSON, "accept": "text/event-stream"}, "POST", 406),
        ({**JSON, "origin": "http://evil.example"}, "POST", 403),
        ({**JSON, "origin": "null"}, "POST", 403),
        ({**JSON, "origin": "http://data.corral.internal.evil.example"}, "POST", 403),
        (JSON, "GET", 405),
        (JSON, "DELETE", 405),
        (JSON, "PUT", 405),
        ({**JSON, "mcp-protocol-version": "1999-01-01"}, "POST", 400),
        ({**JSON, "mcp-protocol-version": MODERN_VERSIONS[0]}, "POST", 400),
    ],
)
async def test_what_is_no_post_of_the_protocol_is_refused(headers: dict[str, str], method: str, status: int) -> None:
    calls = Calls()
    assert (await told(json.dumps(CALL).encode(), headers, method, calls)).status == status
    assert not calls.seen


async def test_a_message_is_bounded() -> None:
    assert (await told(b" " * (1 << 20) + b"{}")).status == 413


async def test_a_notification_gets_no_answer() -> None:
    for method in ("notifications/initialized", "notifications/cancelled", "tools/call"):
        calls = Calls()
        answer = await told(
            json.dumps({"jsonrpc": "2.0", "method": method, "params": CALL["params"]}).encode(), calls=calls
        )
        assert (answer.status, answer.body, calls.seen) == (202, b"", [])


@pytest.mark.parametrize("wanted", [*HANDSHAKE_VERSIONS, "2026-07-28", "1.0", ""])
async def test_a_version_that_both_know_is_agreed_on(wanted: str) -> None:
    value = json.loads((await told(json.dumps(message("initialize", protocolVersion=wanted)).encode())).body)
    assert value["result"]["protocolVersion"] == (wanted if wanted in HANDSHAKE_VERSIONS else HANDSHAKE_VERSIONS[0])


@pytest.mark.parametrize(
    ("changed", "code"),
    [
        ({}, None),
        ({"mcp-method": "tools/list"}, -32020),
        ({"mcp-name": "refuse"}, -32020),
        ({"mcp-name": ""}, -32020),
        ({"mcp-protocol-version": "2025-11-25"}, -32020),
    ],
)
async def test_headers_say_what_the_message_says(changed: dict[str, str], code: int | None) -> None:
    calls = Calls()
    asked = {**CALL, "params": {**CALL["params"], "_meta": MODERN_META}}
    headers = {**JSON, "mcp-protocol-version": MODERN_VERSIONS[0], "mcp-method": "tools/call", "mcp-name": "echo"}
    answer = await told(json.dumps(asked).encode(), {**headers, **changed}, calls=calls)
    value = json.loads(answer.body)
    assert value.get("error", {}).get("code") == code
    assert answer.status == (200 if code is None else 400) and len(calls.seen) == (code is None)


async def test_an_unknown_version_is_told_which_are_known() -> None:
    meta = {**MODERN_META, "io.modelcontextprotocol/protocolVersion": "2031-01-01"}
    headers = {**JSON, "mcp-protocol-version": "2031-01-01", "mcp-method": "server/discover"}
    value = json.loads((await told(json.dumps(message("server/discover", _meta=meta)).encode(), headers)).body)
    assert value["error"]["code"] == -32022 and MODERN_VERSIONS[0] in value["error"]["data"]["supported"]


def test_a_tool_must_be_checkable() -> None:
    for wrong in ({"type": "objekt"}, {"$ref": "http://example.com/x"}, {"pattern": "(?=a)b"}):
        with pytest.raises(SchemaFault):
            Mcp("x", "1", [Tool("x", "", wrong, Calls().echo)])
    with pytest.raises(ValueError, match="one name"):
        Mcp("x", "1", [Tool("x", "", {}, Calls().echo), Tool("x", "", {}, Calls().echo)])


JSON_VALUES = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(),
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(st.text(), inner, max_size=4),
)


@given(
    st.fixed_dictionaries(
        {},
        optional={
            "jsonrpc": st.just("2.0") | JSON_VALUES,
            "id": JSON_VALUES,
            "method": st.sampled_from(["tools/call", "tools/list", "initialize", "ping"]) | JSON_VALUES,
            "params": JSON_VALUES
            | st.fixed_dictionaries(
                {}, optional={"name": st.just("echo") | JSON_VALUES, "arguments": JSON_VALUES, "_meta": JSON_VALUES}
            ),
        },
    )
    | JSON_VALUES,
    st.sampled_from([JSON, {**JSON, "mcp-protocol-version": MODERN_VERSIONS[0]}]),
)
async def test_whatever_comes_is_answered_once(value: object, headers: dict[str, str]) -> None:
    calls = Calls()
    answer = await told(json.dumps(value).encode(), headers, calls=calls)
    assert answer.status in (200, 202, 400, 404)
    for arguments, _ in calls.seen:
        assert isinstance(arguments["text"], str) and set(arguments) <= {"text", "count"}
    if answer.body:
        told_back = json.loads(answer.body)
        assert ("result" in told_back) != ("error" in told_back)
