"""The data broker as MCP tools."""

from __future__ import annotations

from collections.abc import Awaitable, Callable, Mapping
from typing import Any

from corral.actions import Origin
from corral.brokers.data.description import QUERY_SCHEMA, USE
from corral.brokers.mcp import Mcp, Tool, ToolResult
from corral.brokers.strict_json import Json
from corral.version import VERSION

Ask = Callable[[Mapping[str, Any], Origin], Awaitable[tuple[int, str, float | None]]]


def make_mcp(description: str, ask: Ask) -> Mcp:
    """``describe`` and ``query``."""

    async def show(arguments: Mapping[str, Json], origin: Origin) -> ToolResult:
        return ToolResult(description)

    async def query(arguments: Mapping[str, Json], origin: Origin) -> ToolResult:
        status, body, _ = await ask(arguments, origin)
        return ToolResult(body, is_error=status >= 400)

    nothing: dict[str, Any] = {"type": "object", "properties": {}, "additionalProperties": False}
    tools = (
        Tool("describe", "Lists the sources, tables and columns that there are.", nothing, show),
        Tool("query", f"Runs one SQL statement. {USE}", QUERY_SCHEMA, query),
    )
    return Mcp("corral-data", VERSION, tools, instructions=USE)
