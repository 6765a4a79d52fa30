"""Answers of OpenAI's Responses API.

A stream says most things twice: in pieces, and as a whole when an item, and at last the answer, is done. The whole
counts where it is there; some servers leave the items out of the last event, and some streams break off.
"""

from __future__ import annotations

import json
from typing import Any

from corral.modelapi.answer import Draft, as_object, list_in, number_in, object_in, text_in, word_in

HINTS = (b"output_item.done", b"response.completed", b"response.incomplete", b"response.failed", b'"error"')
"""What stands in events that end an answer, or a tool call of it."""
_ENDINGS = ("response.completed", "response.incomplete", "response.failed")
_CALLS = {
    "function_call": "arguments",
    "custom_tool_call": "input",
    "local_shell_call": "action",
    "shell_call": "action",
    "apply_patch_call": "operation",
    "computer_call": "action",
}
"""Items that ask the agent for something, and where they say what. Others are what the upstream does itself."""


def take_body(draft: Draft, body: dict[str, Any]) -> None:
    """Takes an answer that came as one object."""
    if body.get("error") and "output" not in body:
        _error(draft)
        return
    if body.get("object") != "response":
        draft.wrong("it is no response")
        return
    _whole(draft, body)


def take_event(draft: Draft, _data: str, event: dict[str, Any]) -> None:
    """Takes one event of a stream."""
    kind, number = event.get("type"), number_in(event, "output_index")
    if kind in _ENDINGS:
        _whole(draft, object_in(event, "response"))
    elif kind == "response.created":
        draft.model = word_in(object_in(event, "response"), "model")
    elif kind in ("response.output_text.delta", "response.refusal.delta"):
        draft.put(draft.part(number).text, text_in(event, "delta"))
    elif kind in ("response.reasoning_summary_text.delta", "response.reasoning_text.delta"):
        draft.put(draft.part(number).thinking, text_in(event, "delta"))
    elif kind == "response.output_item.done":
        draft.forget(number)
        _item(draft, number, object_in(event, "item"))
    elif kind == "error":
        _error(draft)


def _whole(draft: Draft, response: dict[str, Any]) -> None:
    if output := list_in(response, "output"):
        draft.forget()
        draft.tokens.clear()
        draft.logprobs.clear()
        for number, each in enumerate(output):
            _item(draft, number, as_object(each))
    draft.model = word_in(response, "model") or draft.model
    status = word_in(response, "status")
    draft.finish = word_in(object_in(response, "incomplete_details"), "reason") or status
    usage = object_in(response, "usage")
    if usage:
        draft.has_usage = True
        draft.input_tokens = number_in(usage, "input_tokens")
        draft.output_tokens = number_in(usage, "output_tokens")
        draft.cached_tokens = number_in(object_in(usage, "input_tokens_details"), "cached_tokens")
    if response.get("error"):
        draft.wrong("the upstream reports an error")
    draft.is_over = True


def _item(draft: Draft, number: int, item: dict[str, Any]) -> None:
    kind = word_in(item, "type")
    part = draft.part(number)
    if kind == "message":
        for each in list_in(item, "content"):
            piece = as_object(each)
            draft.put(part.text, text_in(piece, "text") or text_in(piece, "refusal"))
            if draft.sampling:
                draft.sample(list_in(piece, "logprobs"))
    elif kind == "reasoning":
        texts = [text_in(as_object(each), "text") for each in [*list_in(item, "summary"), *list_in(item, "content")]]
        draft.put(part.thinking, "\n\n".join(filter(None, texts)))
    elif kind in _CALLS:
        tool = draft.tool(number)
        tool.named(text_in(item, "call_id") or text_in(item, "id"), text_in(item, "name") or kind)
        given = item.get(_CALLS[kind])
        draft.put(tool.arguments, given if type(given) is str else json.dumps(given, ensure_ascii=False))
        tool.is_whole = True


def _error(draft: Draft) -> None:
    draft.finish = draft.finish or "error"
    draft.wrong("the upstream reports an error")
    draft.is_over = True
