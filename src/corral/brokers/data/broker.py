"""The data broker's door: JSON over HTTP, and the same as MCP tools."""

from __future__ import annotations

import importlib.util
import json
import math
from collections.abc import Mapping
from typing import Any

from corral.actions import Origin
from corral.brokers.http import Answering, Request
from corral.brokers.setting import Handler, Opening, Setting
from corral.credentials.secret import read_text
from corral.errors import RequestError
from corral.policy.doors import Broker
from corral.policy.model import Dialect, Policy, Source
from corral.version import VERSION

MAX_BODY = 1 << 20
"""Bytes of a request."""
_LIBRARIES = {Dialect.DUCKDB: "duckdb", Dialect.MYSQL: "pymysql", Dialect.POSTGRESQL: "psycopg"}
_DEPTH, _VALUES = 8, 2000


def prepare(policy: Policy, environment: Mapping[str, str]) -> Opening:
    """Reads the passwords and looks at the scopes of all sources. Raises RequestError for what cannot be."""
    _check_library("sqlglot")
    for source in policy.data.sources:
        if source.dialect in _LIBRARIES:
            _check_library(_LIBRARIES[source.dialect])
    from corral.brokers.data.scope import Scope

    passwords = []
    for source in policy.data.sources:
        Scope(source)
        passwords.append(_password(source, environment))

    def open_it(setting: Setting) -> Handler:
        return DataBroker(setting, passwords)

    return open_it


def _check_library(name: str) -> None:
    if importlib.util.find_spec(name) is None:
        raise RequestError(f"data sources need {name}, which is not installed: pip install 'corral[data]'")


def _password(source: Source, environment: Mapping[str, str]) -> str:
    return read_text(source.password, environment) if source.password else ""


class DataBroker:
    """All sources of one sandbox."""

    def __init__(self, setting: Setting, passwords: list[str]) -> None:
        from corral.brokers.data.calls import Desk
        from corral.brokers.data.description import describe, openapi
        from corral.brokers.data.tools import make_mcp

        sources = setting.policy.data.sources
        self._desks = {
            source.name: Desk(source, number, passwords[number], setting) for number, source in enumerate(sources)
        }
        described = describe([desk.scope for desk in self._desks.values()])
        self._description = json.dumps(described, ensure_ascii=False).encode()
        self._document = json.dumps(openapi(VERSION, Broker.DATA.url)).encode()
        self._mcp = make_mcp(self._description.decode(), self.ask)

    @property
    def max_body(self) -> int:
        return MAX_BODY

    async def handle(self, request: Request, answer: Answering) -> None:
        """As :meth:`corral.brokers.setting.Handler.handle`."""
        match request.path:
            case "/mcp":
                await self._mcp.handle(request, answer)
                return
            case "/" | "/openapi.json" if request.method in ("GET", "HEAD"):
                await answer.answer(200, self._description if request.path == "/" else self._document)
                return
            case "/v1/query" if request.method == "POST":
                await self._query(request, answer)
                return
            case "/" | "/openapi.json" | "/v1/query":
                allowed = b"POST" if request.path == "/v1/query" else b"GET, HEAD"
                await answer.answer(405, b"", headers=[(b"allow", allowed)])
                return
        await _fail(answer, 404, "not_found", "There is GET /, GET /openapi.json, POST /v1/query, and MCP at /mcp.")

    async def _query(self, request: Request, answer: Answering) -> None:
        asked = await _parsed(request.body)
        if isinstance(asked, str):
            await _fail(answer, 400, "invalid_request", asked)
            return
        status, body, retry_after = await self.ask(asked, request.origin)
        headers = [] if retry_after is None else [(b"retry-after", b"%d" % math.ceil(retry_after))]
        await answer.answer(status, body.encode(), headers=headers)

    async def ask(self, asked: Mapping[str, Any], origin: Origin) -> tuple[int, str, float | None]:
        """The status, the JSON, and the seconds after which it may be tried again."""
        desk = self._desks.get(asked["source"])
        if desk is None:
            error = {"type": "not_found", "message": "There is no such source."}
            return 404, json.dumps({"error": error}), None
        outcome = await desk.ask(asked["sql"], asked.get("parameters"), origin)
        return outcome.status, outcome.body, outcome.retry_after

    async def close(self) -> None:
        """As :meth:`corral.brokers.setting.Handler.close`."""
        for desk in self._desks.values():
            await desk.close()


async def _parsed(body: bytes) -> Mapping[str, Any] | str:
    """What is asked, or what is wrong with it."""
    from corral.brokers.strict_json import NotJson, parse_aside

    try:
        value = await parse_aside(body, depth=_DEPTH, values=_VALUES)
    except NotJson as error:
        return f"The body is no JSON that is taken here: {error}."
    if not isinstance(value, dict) or not value.keys() <= {"source", "sql", "parameters"}:
        return "The body is an object with source, sql and, if need be, parameters."
    if not isinstance(value.get("source"), str) or not isinstance(value.get("sql"), str):
        return "source and sql are texts."
    return value


async def _fail(answer: Answering, status: int, kind: str, message: str) -> None:
    await answer.json(status, {"error": {"type": kind, "message": message}})
