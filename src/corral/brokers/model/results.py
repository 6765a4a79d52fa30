"""What tools have given, on its way to a model: for the guard, with what was asked of the tool."""

from __future__ import annotations

import json
from collections.abc import Iterator
from typing import Any

from corral.brokers.guard.guard import source_of
from corral.brokers.guard.scanners import ToolResult
from corral.brokers.model.asking import Asked
from corral.brokers.model.turns import results_in, texts_in, turns_of
from corral.modelapi.answer import as_object, list_in, text_in


def results_of(asked: Asked) -> list[ToolResult]:
    """All that a request carries, old and new."""
    turns = turns_of(asked)
    calls = {id_: (name, arguments) for turn in turns for id_, name, arguments in _calls(turn)}
    results = []
    for turn in turns:
        for id_, content in results_in(turn):
            name, arguments = calls.get(id_, (text_in(turn, "name"), ""))
            results.append(ToolResult(id_, name, "\n".join(texts_in(content)), source_of(arguments)))
    return results


def _calls(turn: dict[str, Any]) -> Iterator[tuple[str, str, str]]:
    """Id, name and arguments of the tool calls in a turn of a model's."""
    for each in list_in(turn, "tool_calls"):
        function = as_object(as_object(each).get("function") or as_object(each).get("custom"))
        yield text_in(as_object(each), "id"), text_in(function, "name"), text_in(function, "arguments")
    kind = turn.get("type")
    if type(kind) is str and kind.endswith("_call"):
        given = turn.get("arguments") or turn.get("input") or turn.get("action")
        yield text_in(turn, "call_id"), text_in(turn, "name") or kind, _written(given)
    for block in list_in(turn, "content"):
        if as_object(block).get("type") == "tool_use":
            yield text_in(block, "id"), text_in(block, "name"), _written(block.get("input"))


def _written(arguments: Any) -> str:
    return arguments if type(arguments) is str else json.dumps(arguments)
