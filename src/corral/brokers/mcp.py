"""The Model Context Protocol, server side, over its Streamable HTTP: tools, and nothing else of it.

One POST is one JSON-RPC message and gets one JSON answer. There are no sessions and no streams: nothing is remembered
between two requests, so nothing of one client can be another's. Both ways of speaking are known: those of the handshake
(``initialize``, until 2025-11-25), and the one in which each request says for itself who asks (2026-07-28).

A call is cancelled by closing its connection. Clients of the handshake that send ``notifications/cancelled`` instead
are heard and not heeded, as there is no session to say whose the request is; a call ends by its own time limit then.
"""

from __future__ import annotations

from collections.abc import Awaitable, Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from corral.actions import Origin
from corral.brokers.http import Answering, Gone, Request
from corral.brokers.schemas import Schema
from corral.brokers.strict_json import Json, NotJson, parse_aside

HANDSHAKE_VERSIONS = ("2025-11-25", "2025-06-18", "2025-03-26", "2024-11-05")
"""The first is offered to a client that asks for one we do not know."""
MODERN_VERSIONS = ("2026-07-28",)
MAX_MESSAGE = 1 << 20
"""Bytes of one message."""
MAX_DEPTH = 32
MAX_ID = 256
"""Characters of the id of a request."""
PAGE = 100
"""Tools in one answer to ``tools/list``."""
LIST_MILLISECONDS = 3_600_000
"""For which a client may keep the list: the tools of a sandbox do not change."""

PARSE_ERROR, INVALID_REQUEST, METHOD_NOT_FOUND, INVALID_PARAMS, INTERNAL_ERROR = -32700, -32600, -32601, -32602, -32603
HEADER_MISMATCH, UNSUPPORTED_VERSION = -32020, -32022
_STATUS = {METHOD_NOT_FOUND: 404, INTERNAL_ERROR: 500}

_META_VERSION = "io.modelcontextprotocol/protocolVersion"
_META_CAPABILITIES = "io.modelcontextprotocol/clientCapabilities"


@dataclass(frozen=True, slots=True)
class ToolResult:
    """What a call came to, for a model."""

    text: str
    structured: Mapping[str, Json] | None = None
    """The same for programs."""
    is_error: bool = False


Call = Callable[[Mapping[str, Json], Origin], Awaitable[ToolResult]]


@dataclass(frozen=True, slots=True)
class Tool:
    """Something that can be called. ``call`` gets arguments that its schema holds of; what it raises is told nobody."""

    name: str
    """Up to 128 of ``A-Za-z0-9_-.``."""
    description: str
    input_schema: Mapping[str, Any]
    """JSON Schema of an object."""
    call: Call
    schema: Schema | None = None
    """The same, compiled, where that was done before."""


class _Error(Exception):
    """An error of JSON-RPC."""

    def __init__(self, code: int, message: str, data: Json = None) -> None:
        super().__init__(message)
        self.code, self.message, self.data = code, message, data


@dataclass(frozen=True, slots=True)
class _Message:
    """A request that is well-formed."""

    id: str | int
    method: str
    params: dict[str, Json]
    is_modern: bool


class Mcp:
    """One endpoint. Its tools are those of one sandbox."""

    def __init__(self, name: str, version: str, tools: Sequence[Tool], *, instructions: str = "") -> None:
        """Raises SchemaFault where the schema of a tool cannot be checked with, ValueError where a name is not one."""
        self._info: Json = {"name": name, "version": version}
        self._instructions = instructions
        self._tools = {tool.name: (tool, tool.schema or Schema(tool.input_schema)) for tool in tools}
        if len(self._tools) != len(tools):
            raise ValueError("two tools have one name")
        self._listed: list[Json] = [
            {"name": tool.name, "description": tool.description, "inputSchema": dict(tool.input_schema)}
            for tool in tools
        ]

    async def handle(self, request: Request, answer: Answering) -> None:
        """As :meth:`corral.brokers.setting.Handler.handle`."""
        if request.method != "POST":  # no streams to GET, no sessions to DELETE
            await answer.answer(405, b"", headers=[(b"allow", b"POST")])
            return
        try:
            _check_http(request)
            value = await _parsed(request.body)
            if "id" not in value:
                _check_notification(value)
                await answer.answer(202, b"")
                return
            identifier = _id(value)
        except _HttpFault as fault:
            await answer.json(fault.status, _error(None, _Error(INVALID_REQUEST, fault.reason)))
            return
        except _Error as error:
            await answer.json(400, _error(None, error))
            return
        try:
            message = _message(value, identifier, request)
        except _Error as error:
            await answer.json(400, _error(identifier, error))
            return
        try:
            result = await self._result(message, request.origin)
        except Gone:
            raise
        except _Error as error:
            await answer.json(_STATUS.get(error.code, 400) if message.is_modern else 200, _error(identifier, error))
        except Exception:
            await answer.json(200, _error(identifier, _Error(INTERNAL_ERROR, "The tool failed.")))
        else:
            if message.is_modern:
                result = {**result, "resultType": "complete"}
            await answer.json(200, {"jsonrpc": "2.0", "id": identifier, "result": result})

    async def _result(self, message: _Message, origin: Origin) -> dict[str, Json]:
        match message.method:
            case "tools/call":
                return await self._call(message.params, origin)
            case "tools/list":
                listed = self._list(message.params)
                return {**listed, **_kept()} if message.is_modern else listed
            case "initialize" if not message.is_modern:
                return self._initialize(message.params)
            case "ping" if not message.is_modern:
                return {}
            case "server/discover":
                return {**self._about(), "supportedVersions": [*MODERN_VERSIONS, *HANDSHAKE_VERSIONS], **_kept()}
        raise _Error(METHOD_NOT_FOUND, "There is no such method here.")

    def _about(self) -> dict[str, Json]:
        about: dict[str, Json] = {"capabilities": {"tools": {}}, "serverInfo": self._info}
        return {**about, "instructions": self._instructions} if self._instructions else about

    def _initialize(self, params: dict[str, Json]) -> dict[str, Json]:
        wanted = params.get("protocolVersion")
        if not isinstance(wanted, str):
            raise _Error(INVALID_PARAMS, "protocolVersion is missing.")
        return {**self._about(), "protocolVersion": wanted if wanted in HANDSHAKE_VERSIONS else HANDSHAKE_VERSIONS[0]}

    def _list(self, params: dict[str, Json]) -> dict[str, Json]:
        cursor = params.get("cursor")
        start = 0
        if cursor is not None:
            places = {str(place): place for place in range(PAGE, len(self._listed), PAGE)}
            if not isinstance(cursor, str) or cursor not in places:
                raise _Error(INVALID_PARAMS, "This cursor is not one of ours.")
            start = places[cursor]
        page: dict[str, Json] = {"tools": self._listed[start : start + PAGE]}
        return {**page, "nextCursor": str(start + PAGE)} if start + PAGE < len(self._listed) else page

    async def _call(self, params: dict[str, Json], origin: Origin) -> dict[str, Json]:
        name, arguments = params.get("name"), params.get("arguments", {})
        if not isinstance(name, str) or name not in self._tools:
            raise _Error(INVALID_PARAMS, "There is no such tool.")
        if arguments is None:
            arguments = {}
        if not isinstance(arguments, dict):
            raise _Error(INVALID_PARAMS, "The arguments of a tool are an object.")
        tool, schema = self._tools[name]
        # For the model to see, which can do better then: the protocol wants it so.
        if problem := await schema.check(arguments):
            return _shown(ToolResult(f"The arguments are not as the tool wants them: {problem}", is_error=True))
        return _shown(await tool.call(arguments, origin))


def _kept() -> dict[str, Json]:
    return {"ttlMs": LIST_MILLISECONDS, "cacheScope": "private"}


def _shown(result: ToolResult) -> dict[str, Json]:
    shown: dict[str, Json] = {"content": [{"type": "text", "text": result.text}], "isError": result.is_error}
    return shown if result.structured is None else {**shown, "structuredContent": dict(result.structured)}


def _error(identifier: str | int | None, error: _Error) -> dict[str, Json]:
    described: dict[str, Json] = {"code": error.code, "message": error.message}
    if error.data is not None:
        described["data"] = error.data
    return {"jsonrpc": "2.0", "id": identifier, "error": described}


# ---- what comes in ----


class _HttpFault(Exception):
    def __init__(self, status: int, reason: str) -> None:
        super().__init__(reason)
        self.status, self.reason = status, reason


def _check_http(request: Request) -> None:
    """Raises _HttpFault."""
    # A page in a browser must not speak for the agent (the protocol's words on DNS rebinding).
    if (origin := request.header(b"origin")) is not None and origin != b"http://" + (request.header(b"host") or b""):
        raise _HttpFault(403, "Pages of other origins may not ask here.")
    kind = (request.header(b"content-type") or b"").partition(b";")[0].strip().lower()
    if kind != b"application/json":
        raise _HttpFault(415, "A message is application/json.")
    accept = request.header(b"accept")
    if accept is not None and not any(
        word in accept.lower() for word in (b"application/json", b"*/*", b"application/*")
    ):
        raise _HttpFault(406, "The answer is application/json.")
    if len(request.body) > MAX_MESSAGE:
        raise _HttpFault(413, f"A message has at most {MAX_MESSAGE} bytes.")


async def _parsed(body: bytes) -> dict[str, Json]:
    """Raises _Error."""
    try:
        value = await parse_aside(body, depth=MAX_DEPTH)
    except NotJson as error:
        raise _Error(PARSE_ERROR, f"This is no JSON that is taken here: {error}.") from None
    if not isinstance(value, dict):
        raise _Error(INVALID_REQUEST, "A message is one object; several at once are not taken.")
    if value.get("jsonrpc") != "2.0" or not isinstance(value.get("method"), str):
        raise _Error(INVALID_REQUEST, "This is no request and no notification of JSON-RPC 2.0.")
    return value


def _check_notification(value: dict[str, Json]) -> None:
    if not isinstance(value.get("params", {}), dict):
        raise _Error(INVALID_REQUEST, "The parameters of a notification are an object.")


def _id(value: dict[str, Json]) -> str | int:
    identifier = value["id"]
    if isinstance(identifier, bool) or not isinstance(identifier, str | int) or len(str(identifier)) > MAX_ID:
        raise _Error(INVALID_REQUEST, f"The id of a request is an integer or a text of up to {MAX_ID} characters.")
    return identifier


def _message(value: dict[str, Json], identifier: str | int, request: Request) -> _Message:
    """Raises _Error."""
    method, params = str(value["method"]), value.get("params", {})
    if not isinstance(params, dict):
        raise _Error(INVALID_PARAMS, "The parameters of a request are an object.")
    versions = [field for name, field in request.headers if name == b"mcp-protocol-version"]
    meta = params.get("_meta")
    said = meta.get(_META_VERSION) if isinstance(meta, dict) else None
    if said is None and (not versions or versions[0].decode("latin-1") in HANDSHAKE_VERSIONS):
        return _Message(identifier, method, params, is_modern=False)
    if not isinstance(meta, dict) or _META_VERSION not in meta:
        version = versions[0].decode("latin-1")
        if version not in MODERN_VERSIONS:
            raise _unsupported(version)
        raise _Error(INVALID_PARAMS, f"params._meta lacks {_META_VERSION}.")
    if not isinstance(said, str) or not isinstance(meta.get(_META_CAPABILITIES), dict):
        raise _Error(INVALID_PARAMS, f"params._meta lacks {_META_VERSION} or {_META_CAPABILITIES}.")
    _same(request, b"mcp-protocol-version", said)
    _same(request, b"mcp-method", method)
    if method == "tools/call" and isinstance(name := params.get("name"), str):
        _same(request, b"mcp-name", name)
    if said not in MODERN_VERSIONS:
        raise _unsupported(said)
    return _Message(identifier, method, params, is_modern=True)


def _same(request: Request, field: bytes, value: str) -> None:
    """What is said in a header for whoever reads only those must be what is said in the message."""
    if [each for name, each in request.headers if name == field] != [value.encode()]:
        raise _Error(HEADER_MISMATCH, f"The header {field.decode()} is not what the message says.")


def _unsupported(version: str) -> _Error:
    supported: list[Json] = [*MODERN_VERSIONS, *HANDSHAKE_VERSIONS]
    return _Error(
        UNSUPPORTED_VERSION, "This version is not spoken here.", {"supported": supported, "requested": version[:64]}
    )
