"""OpenAI Responses. https://platform.openai.com/docs/api-reference/responses"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from tests.models import chat
from tests.models.exchange import CREATED, Answer, Asked, Event, dumps, items, pieces, text_of
from tests.models.script import Call, Part, Text, Thinking, Usage

_OURS = ("reasoning", "function_call", "message")
"""Types of items that an answer is made of."""


def read(body: dict[str, Any]) -> Asked:
    """The request. Answers before it are in its input (it is not kept by the server)."""
    given = body.get("input")
    listed = items(given)
    users = [text_of(each.get("content")) for each in listed if each.get("role") == "user"]
    position, before = 0, False
    for each in listed:
        kind = each.get("type", "message")
        ours = kind in _OURS and (kind != "message" or each.get("role") == "assistant")
        position += ours and not before
        before = ours
    first = given if isinstance(given, str) else (users or [""])[0]
    return Asked(str(body.get("model")), body.get("stream") is True, first, position, bool(body.get("tools")), body)


def whole(answer: Answer) -> dict[str, Any]:
    """The answer in one piece."""
    output = [_item(answer, index, part) for index, part in _parts(answer)]
    return _response(answer, "completed", output, answer.turn.usage)


def stream(answer: Answer) -> Iterator[Event]:
    """The answer in events."""
    numbers = iter(range(1_000_000))

    def event(kind: str, **fields: object) -> Event:
        return Event(dumps({"type": kind, "sequence_number": next(numbers), **fields}), kind)

    yield event("response.created", response=_response(answer, "in_progress", [], None))
    yield event("response.in_progress", response=_response(answer, "in_progress", [], None))
    done = []
    for index, part in _parts(answer):
        item = _item(answer, index, part)
        at: dict[str, Any] = {"item_id": item["id"], "output_index": index}
        begun: dict[str, Any] = {**item, "status": "in_progress", **_EMPTY[type(part)]}
        yield event("response.output_item.added", output_index=index, item=begun)
        match part:
            case Thinking(text):
                at["summary_index"] = 0
                empty: dict[str, Any] = {"type": "summary_text", "text": ""}
                yield event("response.reasoning_summary_part.added", **at, part=empty)
                for piece in pieces(text):
                    yield event("response.reasoning_summary_text.delta", **at, delta=piece)
                yield event("response.reasoning_summary_text.done", **at, text=text)
                yield event("response.reasoning_summary_part.done", **at, part={**empty, "text": text})
            case Text(text):
                at["content_index"] = 0
                empty = {"type": "output_text", "annotations": [], "logprobs": [], "text": ""}
                yield event("response.content_part.added", **at, part=empty)
                for piece in pieces(text):
                    yield event("response.output_text.delta", **at, delta=piece, logprobs=[])
                yield event("response.output_text.done", **at, text=text, logprobs=[])
                yield event("response.content_part.done", **at, part={**empty, "text": text})
            case Call():
                for piece in pieces(part.text):
                    yield event("response.function_call_arguments.delta", **at, delta=piece)
                yield event("response.function_call_arguments.done", **at, arguments=part.text, name=part.name)
        yield event("response.output_item.done", output_index=index, item=item)
        done.append(item)
    yield event("response.completed", response=_response(answer, "completed", done, answer.turn.usage))


def error(status: int, message: str) -> dict[str, Any]:
    """A failure."""
    return chat.error(status, message)


def stream_error(message: str) -> Event:
    """A failure in the midst of a stream."""
    told = {"type": "error", "sequence_number": 99, "code": "server_error", "message": message, "param": None}
    return Event(dumps(told), "error")


_EMPTY: dict[type[Part], dict[str, Any]] = {
    Thinking: {"summary": []},
    Text: {"content": []},
    Call: {"arguments": ""},
}


def _parts(answer: Answer) -> Iterator[tuple[int, Part]]:
    yield from enumerate(answer.turn.parts)


def _item(answer: Answer, index: int, part: Part) -> dict[str, Any]:
    match part:
        case Thinking(text):
            summary = [{"type": "summary_text", "text": text}]
            return {"id": f"rs_{answer.id}_{index}", "type": "reasoning", "summary": summary}
        case Text(text):
            content = [{"type": "output_text", "annotations": [], "logprobs": [], "text": text}]
            told = {"id": f"msg_{answer.id}_{index}", "type": "message", "status": "completed"}
            return told | {"role": "assistant", "content": content}
        case Call():
            number = sum(isinstance(each, Call) for each in answer.turn.parts[:index])
            told = {"id": f"fc_{answer.id}_{index}", "type": "function_call", "status": "completed"}
            return told | {"call_id": answer.call_id(number), "name": part.name, "arguments": part.text}


def _response(answer: Answer, status: str, output: list[dict[str, Any]], usage: Usage | None) -> dict[str, Any]:
    body = answer.asked.body
    return {
        "id": f"resp_{answer.id}",
        "object": "response",
        "created_at": CREATED,
        "status": status,
        "background": False,
        "error": None,
        "incomplete_details": None,
        "instructions": body.get("instructions"),
        "max_output_tokens": body.get("max_output_tokens"),
        "model": answer.asked.model,
        "output": output,
        "parallel_tool_calls": True,
        "previous_response_id": None,
        "reasoning": {"effort": None, "summary": None},
        "store": False,
        "temperature": 1.0,
        "text": {"format": {"type": "text"}},
        "tool_choice": body.get("tool_choice", "auto"),
        "tools": body.get("tools", []),
        "top_p": 1.0,
        "truncation": "disabled",
        "usage": None if usage is None else _usage(usage),
        "user": None,
        "metadata": {},
    }


def _usage(usage: Usage) -> dict[str, Any]:
    return {
        "input_tokens": usage.input,
        "input_tokens_details": {"cached_tokens": usage.cached},
        "output_tokens": usage.output,
        "output_tokens_details": {"reasoning_tokens": usage.reasoning},
        "total_tokens": usage.input + usage.output,
    }
