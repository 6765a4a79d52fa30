"""Answers of the three APIs, as upstreams give them, with what they say."""

from __future__ import annotations

import json
from dataclasses import dataclass
from typing import Any

from corral.actions import ToolCall
from corral.modelapi.answer import Answer, Api

WORDS = "Schaun mer mal: 你好 👋"
THOUGHT = "First I look.\nThen I leap."
CALLS = (ToolCall("call_1", "shell", '{"command":["ls","-l"]}'), ToolCall("call_2", "read", '{"path":"ä"}'))


@dataclass(frozen=True)
class Given:
    """A body, and what is in it."""

    api: Api
    body: bytes
    answer: Answer


def events(*values: dict[str, Any], named: bool = False) -> bytes:
    """A stream of events."""
    pieces = []
    for each in values:
        name = f"event: {each['type']}\n" if named else ""
        pieces.append(f"{name}data: {json.dumps(each, ensure_ascii=False)}\n\n")
    return "".join(pieces).encode()


def answer(finish: str, cached: int = 7, written: int = 0) -> Answer:
    """What all of them say."""
    return Answer(
        WORDS, THOUGHT, CALLS, 100, 20, cached, written, finish, "model-1", complete=True, has_usage=True
    )  # fmt: skip


def _chunk(delta: dict[str, Any], finish: str | None = None) -> dict[str, Any]:
    choice = {"index": 0, "delta": delta, "finish_reason": finish}
    return {"id": "c", "object": "chat.completion.chunk", "model": "model-1", "choices": [choice], "usage": None}


_CHAT_USAGE = {"prompt_tokens": 100, "completion_tokens": 20, "prompt_tokens_details": {"cached_tokens": 7}}


def chat_stream() -> Given:
    def called(at: int, arguments: str, **named: Any) -> dict[str, Any]:
        return _chunk({"tool_calls": [{"index": at, **named, "function": {"arguments": arguments}}]})

    values = [
        _chunk({"role": "assistant", "content": ""}),
        *(_chunk({"reasoning_content": piece}) for piece in (THOUGHT[:5], THOUGHT[5:])),
        *(_chunk({"content": each}) for each in WORDS),
    ]
    for at, call in enumerate(CALLS):
        first = {"index": at, "id": call.id, "type": "function", "function": {"name": call.name, "arguments": ""}}
        values += [_chunk({"tool_calls": [first]}), called(at, call.arguments[:3]), called(at, call.arguments[3:])]
    values += [_chunk({}, "tool_calls"), {"id": "c", "model": "model-1", "choices": [], "usage": _CHAT_USAGE}]
    return Given(Api.CHAT, events(*values) + b"data: [DONE]\n\n", answer("tool_calls"))


def chat_body() -> Given:
    calls = [{"id": c.id, "type": "function", "function": {"name": c.name, "arguments": c.arguments}} for c in CALLS]
    message = {"role": "assistant", "content": WORDS, "reasoning": THOUGHT, "tool_calls": calls}
    choice = {"index": 0, "message": message, "finish_reason": "tool_calls"}
    body = {"object": "chat.completion", "model": "model-1", "choices": [choice], "usage": _CHAT_USAGE}
    return Given(Api.CHAT, json.dumps(body, indent=1).encode(), answer("tool_calls"))


_MESSAGE: dict[str, Any] = {"type": "message", "role": "assistant", "model": "model-1"}
_USAGE: dict[str, Any] = {"input_tokens": 90, "cache_read_input_tokens": 7, "cache_creation_input_tokens": 3}


def messages_stream() -> Given:
    def delta(at: int, kind: str, name: str, text: str) -> dict[str, Any]:
        return {"type": "content_block_delta", "index": at, "delta": {"type": kind, name: text}}

    def block(at: int, block: dict[str, Any], *deltas: dict[str, Any]) -> list[dict[str, Any]]:
        start = {"type": "content_block_start", "index": at, "content_block": block}
        return [start, *deltas, {"type": "content_block_stop", "index": at}]

    values: list[dict[str, Any]] = [
        {"type": "message_start", "message": {**_MESSAGE, "content": [], "usage": {**_USAGE, "output_tokens": 1}}},
        {"type": "ping"},
        *block(
            0,
            {"type": "thinking", "thinking": ""},
            *(delta(0, "thinking_delta", "thinking", piece) for piece in (THOUGHT[:9], THOUGHT[9:])),
            delta(0, "signature_delta", "signature", "c2ln"),
        ),
        *block(1, {"type": "text", "text": ""}, *(delta(1, "text_delta", "text", each) for each in WORDS)),
        *block(
            2,
            {"type": "server_tool_use", "id": "srvtoolu_1", "name": "web_search", "input": {}},
            delta(2, "input_json_delta", "partial_json", '{"query":"x"}'),
        ),
    ]
    for at, call in enumerate(CALLS, 3):
        begun = {"type": "tool_use", "id": call.id, "name": call.name, "input": {}}
        pieces = (delta(at, "input_json_delta", "partial_json", each) for each in ("", *call.arguments))
        values += block(at, begun, *pieces)
    values += [
        {"type": "message_delta", "delta": {"stop_reason": "tool_use"}, "usage": {"output_tokens": 20}},
        {"type": "message_stop"},
    ]
    return Given(Api.MESSAGES, events(*values, named=True), answer("tool_use", written=3))


def messages_body() -> Given:
    content: list[dict[str, Any]] = [
        {"type": "thinking", "thinking": THOUGHT, "signature": "c2ln"},
        {"type": "text", "text": WORDS},
        *({"type": "tool_use", "id": c.id, "name": c.name, "input": json.loads(c.arguments)} for c in CALLS),
    ]
    body = {**_MESSAGE, "content": content, "stop_reason": "tool_use", "usage": {**_USAGE, "output_tokens": 20}}
    found = answer("tool_use", written=3)
    spaced = tuple(ToolCall(c.id, c.name, json.dumps(json.loads(c.arguments), ensure_ascii=False)) for c in found.tools)
    told = Answer(WORDS, THOUGHT, spaced, 100, 20, 7, 3, "tool_use", "model-1", complete=True, has_usage=True)
    return Given(Api.MESSAGES, json.dumps(body).encode(), told)


def _response() -> dict[str, Any]:
    output: list[dict[str, Any]] = [
        {"type": "reasoning", "summary": [{"type": "summary_text", "text": THOUGHT}]},
        {"type": "message", "role": "assistant", "content": [{"type": "output_text", "text": WORDS}]},
        {"type": "web_search_call", "id": "ws_1", "status": "completed"},
        *({"type": "function_call", "call_id": c.id, "name": c.name, "arguments": c.arguments} for c in CALLS),
    ]
    usage: dict[str, Any] = {"input_tokens": 100, "input_tokens_details": {"cached_tokens": 7}, "output_tokens": 20}
    return {
        "object": "response", "status": "completed", "error": None, "model": "model-1", "output": output, "usage": usage
    }  # fmt: skip


def responses_stream(*, is_lean: bool = False) -> Given:
    """``is_lean``: of a server that leaves the items out of the last event."""
    response = _response()
    begun = {**response, "output": [], "usage": None, "status": "in_progress"}
    values: list[dict[str, Any]] = [{"type": "response.created", "response": begun}]
    for at, item in enumerate(response["output"]):
        values.append({"type": "response.output_item.added", "output_index": at, "item": {"type": item["type"]}})
        if item["type"] == "message":
            kind = "response.output_text.delta"
            values += [{"type": kind, "output_index": at, "content_index": 0, "delta": each} for each in WORDS]
        elif item["type"] == "reasoning":
            values.append({"type": "response.reasoning_summary_text.delta", "output_index": at, "delta": THOUGHT})
        values.append({"type": "response.output_item.done", "output_index": at, "item": item})
    last = {**response, "output": []} if is_lean else response
    values.append({"type": "response.completed", "response": last})
    return Given(Api.RESPONSES, events(*values, named=True), answer("completed"))


def responses_body() -> Given:
    return Given(Api.RESPONSES, json.dumps(_response()).encode(), answer("completed"))


ALL = {
    "chat stream": chat_stream(),
    "chat body": chat_body(),
    "messages stream": messages_stream(),
    "messages body": messages_body(),
    "responses stream": responses_stream(),
    "responses lean stream": responses_stream(is_lean=True),
    "responses body": responses_body(),
}
