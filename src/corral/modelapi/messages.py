"""Answers of Anthropic's Messages API."""

from __future__ import annotations

import json
from typing import Any

from corral.modelapi.answer import Draft, as_object, list_in, number_in, object_in, text_in, word_in

HINTS = (b"content_block_stop", b"message_delta", b"message_stop", b'"error"')
"""What stands in events that end an answer, or a tool call of it."""


def take_body(draft: Draft, body: dict[str, Any]) -> None:
    """Takes an answer that came as one object."""
    if body.get("type") == "error":
        _error(draft)
        return
    if body.get("type") != "message":
        draft.wrong("it is no message")
        return
    draft.model = word_in(body, "model")
    for number, each in enumerate(list_in(body, "content")):
        _block(draft, number, as_object(each))
        _stop(draft, number)
    draft.finish = word_in(body, "stop_reason")
    _count(draft, object_in(body, "usage"))
    draft.is_over = True


def take_event(draft: Draft, _data: str, event: dict[str, Any]) -> None:
    """Takes one event of a stream."""
    number = number_in(event, "index")
    match event.get("type"):
        case "message_start":
            message = object_in(event, "message")
            draft.model = word_in(message, "model")
            _count(draft, object_in(message, "usage"))
        case "content_block_start":
            _block(draft, number, object_in(event, "content_block"))
        case "content_block_delta":
            _delta(draft, number, object_in(event, "delta"))
        case "content_block_stop":
            _stop(draft, number)
        case "message_delta":
            draft.finish = word_in(object_in(event, "delta"), "stop_reason") or draft.finish
            _count(draft, object_in(event, "usage"))
            draft.is_over = draft.is_over or bool(draft.finish)
        case "message_stop":
            draft.is_over = True
        case "error":
            _error(draft)
        case _:  # ping, and what is new: clients pass it over too
            pass


def _block(draft: Draft, number: int, block: dict[str, Any]) -> None:
    part = draft.part(number)
    match block.get("type"):
        case "text":
            draft.put(part.text, text_in(block, "text"))
        case "thinking":
            draft.put(part.thinking, text_in(block, "thinking"))
        case "tool_use":
            tool = draft.tool(number)
            tool.named(text_in(block, "id"), text_in(block, "name"))
            if given := block.get("input"):
                draft.put(tool.arguments, json.dumps(given, ensure_ascii=False))
        case _:
            pass


def _delta(draft: Draft, number: int, delta: dict[str, Any]) -> None:
    part = draft.part(number)
    match delta.get("type"):
        case "text_delta":
            draft.put(part.text, text_in(delta, "text"))
        case "thinking_delta":
            draft.put(part.thinking, text_in(delta, "thinking"))
        case "input_json_delta" if part.tools:  # those of tools that the upstream runs itself are not the agent's
            draft.put(draft.tool(number).arguments, text_in(delta, "partial_json"))
        case _:
            pass


def _stop(draft: Draft, number: int) -> None:
    for tool in draft.part(number).tools.values():
        if not tool.arguments:
            draft.put(tool.arguments, "{}")
        tool.is_whole = True


def _count(draft: Draft, usage: dict[str, Any]) -> None:
    """Counts stand at the beginning, and again at the end, where each that is told is the sum up to there."""
    if not usage:
        return
    draft.has_usage = True
    if "cache_read_input_tokens" in usage:
        before, draft.cached_tokens = draft.cached_tokens, number_in(usage, "cache_read_input_tokens")
        draft.input_tokens += draft.cached_tokens - before
    if "cache_creation_input_tokens" in usage:
        before, draft.written_tokens = draft.written_tokens, number_in(usage, "cache_creation_input_tokens")
        draft.input_tokens += draft.written_tokens - before
    if "input_tokens" in usage:  # without those of the cache
        draft.input_tokens = number_in(usage, "input_tokens") + draft.cached_tokens + draft.written_tokens
    if "output_tokens" in usage:
        draft.output_tokens = number_in(usage, "output_tokens")


def _error(draft: Draft) -> None:
    draft.finish = draft.finish or "error"
    draft.wrong("the upstream reports an error")
    draft.is_over = True
