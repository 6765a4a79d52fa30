"""What the data broker says of itself: what there is, and how it is asked for."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from corral.brokers.data.grammar import MAX_PARAMETERS, MAX_TEXT
from corral.brokers.data.scope import Scope
from corral.policy.model import ColumnUse

USE = (
    "SQL over the sources that are listed here; nothing else exists. One statement at a time: select, and insert, "
    "update or delete where a table allows it. Values go into parameters, which are written :name. Names of tables and "
    "columns are as they are listed. Not there: regular expressions, functions that return rows, recursive queries, "
    "LATERAL, NATURAL joins, comments with hints."
)
QUERY_SCHEMA: dict[str, Any] = {
    "type": "object",
    "properties": {
        "source": {"type": "string", "description": "The name of a source."},
        "sql": {"type": "string", "minLength": 1, "maxLength": MAX_TEXT, "description": "One statement."},
        "parameters": {
            "type": "object",
            "description": "Values for :name in the statement.",
            "maxProperties": MAX_PARAMETERS,
            "additionalProperties": {"type": ["string", "number", "boolean", "null"]},
        },
    },
    "required": ["source", "sql"],
    "additionalProperties": False,
}
_RESULT: dict[str, Any] = {
    "type": "object",
    "properties": {
        "columns": {"type": "array", "items": {"type": "string"}},
        "rows": {"type": "array", "items": {"type": "array"}},
        "truncated": {"type": "boolean", "description": "There was more than may be sent."},
        "affected": {"type": "integer", "description": "Rows that were changed."},
    },
}
_ERROR: dict[str, Any] = {
    "type": "object",
    "properties": {
        "error": {
            "type": "object",
            "properties": {"type": {"type": "string"}, "message": {"type": "string"}},
            "required": ["type", "message"],
        }
    },
    "required": ["error"],
}
_SEEN = {ColumnUse.HASH: "hashed", ColumnUse.MASK: "masked", ColumnUse.SHOW: "shown"}


def describe(scopes: Sequence[Scope]) -> dict[str, Any]:
    """All that there is. Neither where a database is nor the filters of rows."""
    return {"use": USE, "sources": [_source(scope) for scope in scopes]}


def _source(scope: Scope) -> dict[str, Any]:
    limits = scope.source.limits
    return {
        "name": scope.source.name,
        "dialect": scope.dialect.value,
        "limits": {
            "rows": limits.rows,
            "bytes": limits.bytes,
            "seconds": limits.time,
            "queries_per_minute": limits.queries_per_minute,
            "concurrent": limits.concurrent,
        },
        "tables": [
            {
                "name": table.scope.name,
                "statements": list(table.scope.statements),
                "columns": [{"name": column.name, "seen": _SEEN[column.use]} for column in table.columns],
            }
            for table in scope.tables
        ],
    }


def openapi(version: str, url: str) -> dict[str, Any]:
    """The OpenAPI 3.1 document of the HTTP side."""

    def answer(text: str, schema: dict[str, Any]) -> dict[str, Any]:
        return {"description": text, "content": {"application/json": {"schema": schema}}}

    failures = {
        "400": "The query is refused, or the source cannot run it.",
        "403": "The policy, or a person, does not allow it.",
        "404": "There is no such source.",
        "422": "It is more than a query may cost or change.",
        "429": "There are too many queries.",
        "502": "The source cannot be reached.",
        "503": "The source is busy.",
        "504": "It takes longer than it may.",
    }
    return {
        "openapi": "3.1.0",
        "info": {"title": "Corral data broker", "version": version, "description": USE},
        "servers": [{"url": url}],
        "paths": {
            "/": {
                "get": {
                    "operationId": "describe",
                    "summary": "Which sources, tables and columns there are.",
                    "responses": {"200": answer("All that there is.", {"type": "object"})},
                }
            },
            "/v1/query": {
                "post": {
                    "operationId": "query",
                    "summary": "Runs one statement.",
                    "requestBody": {"required": True, "content": {"application/json": {"schema": QUERY_SCHEMA}}},
                    "responses": {
                        "200": answer("The result.", _RESULT),
                        **{status: answer(text, _ERROR) for status, text in failures.items()},
                    },
                }
            },
        },
    }
