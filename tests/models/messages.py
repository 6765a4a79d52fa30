"""Anthropic Messages. https://docs.anthropic.com/en/api/messages, https://docs.anthropic.com/en/docs/build-with-claude/streaming"""

from __future__ import annotations

import json
from collections.abc import Iterator
from typing import Any

from tests.models.exchange import Answer, Asked, Event, dumps, items, pieces, text_of
from tests.models.script import Call, Part, Text, Thinking, Usage

SIGNATURE = "c2NyaXB0ZWQ="


def read(body: dict[str, Any]) -> Asked:
    """The request."""
    messages = items(body.get("messages"))
    users = [text_of(each.get("content")) for each in messages if each.get("role") == "user"]
    roles = [each.get("role") for each in messages]  # two in a row of one role are one (so says the API)
    position = sum(role == "assistant" != before for role, before in zip(roles, ["", *roles], strict=False))
    return Asked(
        str(body.get("model")), body.get("stream") is True, (users or [""])[0], position, bool(body.get("tools")), body
    )


def whole(answer: Answer) -> dict[str, Any]:
    """The answer in one piece."""
    told = _begun(answer) | {"stop_reason": _finish(answer)}
    told["content"] = [_block(answer, index, part) for index, part in enumerate(answer.turn.parts)]
    if answer.turn.usage is not None:
        told["usage"] = _usage(answer.turn.usage)
    return told


def stream(answer: Answer) -> Iterator[Event]:
    """The answer in events."""

    def event(kind: str, **fields: object) -> Event:
        return Event(dumps({"type": kind, **fields}), kind)

    usage = answer.turn.usage
    begun = _begun(answer) | {"content": []}
    if usage is not None:
        begun["usage"] = _usage(usage) | {"output_tokens": 1}
    yield event("message_start", message=begun)
    for index, part in enumerate(answer.turn.parts):
        match part:
            case Thinking(text):
                empty = {"type": "thinking", "thinking": "", "signature": ""}
                yield event("content_block_start", index=index, content_block=empty)
                deltas = [{"type": "thinking_delta", "thinking": piece} for piece in pieces(text)]
                deltas.append({"type": "signature_delta", "signature": SIGNATURE})
            case Text(text):
                yield event("content_block_start", index=index, content_block={"type": "text", "text": ""})
                deltas = [{"type": "text_delta", "text": piece} for piece in pieces(text)]
            case Call():
                empty = _block(answer, index, part) | {"input": {}}
                yield event("content_block_start", index=index, content_block=empty)
                deltas = [{"type": "input_json_delta", "partial_json": piece} for piece in ("", *pieces(part.text))]
        if index == 0:
            yield event("ping")
        for delta in deltas:
            yield event("content_block_delta", index=index, delta=delta)
        yield event("content_block_stop", index=index)
    told = {} if usage is None else {"usage": {"output_tokens": usage.output}}
    yield event("message_delta", delta={"stop_reason": _finish(answer), "stop_sequence": None}, **told)
    yield event("message_stop")


def error(status: int, message: str) -> dict[str, Any]:
    """A failure."""
    kinds = {401: "authentication_error", 404: "not_found_error", 429: "rate_limit_error", 529: "overloaded_error"}
    kind = kinds.get(status, "api_error" if status >= 500 else "invalid_request_error")
    return {"type": "error", "error": {"type": kind, "message": message}, "request_id": "req_scripted"}


def stream_error(message: str) -> Event:
    """A failure in the midst of a stream."""
    return Event(dumps(error(529, message)), "error")


def _begun(answer: Answer) -> dict[str, Any]:
    told = {"id": f"msg_{answer.id}", "type": "message", "role": "assistant", "model": answer.asked.model}
    return told | {"content": [], "stop_reason": None, "stop_sequence": None}


def _block(answer: Answer, index: int, part: Part) -> dict[str, Any]:
    match part:
        case Thinking(text):
            return {"type": "thinking", "thinking": text, "signature": SIGNATURE}
        case Text(text):
            return {"type": "text", "text": text}
        case Call():
            number = sum(isinstance(each, Call) for each in answer.turn.parts[:index])
            told = {"type": "tool_use", "id": answer.call_id(number), "name": part.name}
            return told | {"input": json.loads(part.text)}


def _finish(answer: Answer) -> str:
    return answer.turn.finish or ("tool_use" if answer.turn.calls else "end_turn")


def _usage(usage: Usage) -> dict[str, Any]:
    """Here, unlike with OpenAI, what is cached or written is not part of the input tokens."""
    return {
        "input_tokens": usage.input - usage.cached - usage.written,
        "cache_creation_input_tokens": usage.written,
        "cache_read_input_tokens": usage.cached,
        "output_tokens": usage.output,
        "service_tier": "standard",
    }
