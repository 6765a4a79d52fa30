"""OpenAI Chat Completions. https://platform.openai.com/docs/api-reference/chat"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from tests.models.exchange import CREATED, Answer, Asked, Event, dumps, items, pieces, text_of
from tests.models.script import Call, Text, Thinking, Usage


def read(body: dict[str, Any]) -> Asked:
    """The request."""
    messages = items(body.get("messages"))
    users = [text_of(each.get("content")) for each in messages if each.get("role") == "user"]
    position = sum(each.get("role") == "assistant" for each in messages)
    return Asked(
        str(body.get("model")), body.get("stream") is True, (users or [""])[0], position, bool(body.get("tools")), body
    )


def whole(answer: Answer) -> dict[str, Any]:
    """The answer in one piece."""
    turn = answer.turn
    message: dict[str, Any] = {"role": "assistant", "content": turn.text or None, "refusal": None, "annotations": []}
    if turn.thinking:
        message["reasoning_content"] = turn.thinking
    if turn.calls:
        message["tool_calls"] = [_call(answer, number, call, call.text) for number, call in enumerate(turn.calls)]
    choice = {"index": 0, "message": message, "logprobs": None, "finish_reason": _finish(answer)}
    told = {"id": f"chatcmpl-{answer.id}", "object": "chat.completion", "created": CREATED}
    told |= {"model": answer.asked.model, "choices": [choice]}
    if turn.usage is not None:
        told["usage"] = _usage(turn.usage)
    return told | {"service_tier": "default", "system_fingerprint": "fp_scripted"}


def stream(answer: Answer) -> Iterator[Event]:
    """The answer in events."""
    options = answer.asked.body.get("stream_options")
    wants_usage = isinstance(options, dict) and options.get("include_usage") is True

    def chunk(choices: list[dict[str, Any]], usage: object = None) -> Event:
        told = {"id": f"chatcmpl-{answer.id}", "object": "chat.completion.chunk", "created": CREATED}
        told |= {"model": answer.asked.model, "service_tier": "default", "system_fingerprint": "fp_scripted"}
        told |= {"choices": choices} | ({"usage": usage} if wants_usage else {})
        return Event(dumps(told))

    def delta(value: dict[str, Any], finish: str | None = None) -> Event:
        return chunk([{"index": 0, "delta": value, "logprobs": None, "finish_reason": finish}])

    yield delta({"role": "assistant", "content": "", "refusal": None})
    number = 0
    for part in answer.turn.parts:
        match part:
            case Thinking(text):
                for piece in pieces(text):
                    yield delta({"reasoning_content": piece})
            case Text(text):
                for piece in pieces(text):
                    yield delta({"content": piece})
            case Call():
                yield delta({"tool_calls": [{"index": number, **_call(answer, number, part, "")}]})
                for piece in pieces(part.text):
                    yield delta({"tool_calls": [{"index": number, "function": {"arguments": piece}}]})
                number += 1
    yield delta({}, _finish(answer))
    if wants_usage and answer.turn.usage is not None:
        yield chunk([], _usage(answer.turn.usage))
    yield Event("[DONE]")


def error(status: int, message: str) -> dict[str, Any]:
    """A failure."""
    return {"error": {"message": message, "type": _kind(status), "param": None, "code": _code(status)}}


def stream_error(message: str) -> Event:
    """A failure in the midst of a stream."""
    return Event(dumps(error(500, message)))


def _call(answer: Answer, number: int, call: Call, arguments: str) -> dict[str, Any]:
    function = {"name": call.name, "arguments": arguments}
    return {"id": answer.call_id(number), "type": "function", "function": function}


def _finish(answer: Answer) -> str:
    return answer.turn.finish or ("tool_calls" if answer.turn.calls else "stop")


def _usage(usage: Usage) -> dict[str, Any]:
    return {
        "prompt_tokens": usage.input,
        "completion_tokens": usage.output,
        "total_tokens": usage.input + usage.output,
        "prompt_tokens_details": {"cached_tokens": usage.cached, "audio_tokens": 0},
        "completion_tokens_details": {"reasoning_tokens": usage.reasoning, "audio_tokens": 0},
    }


def _kind(status: int) -> str:
    if status == 429:
        return "rate_limit_error"
    return "server_error" if status >= 500 else "invalid_request_error"


def _code(status: int) -> str | None:
    return {401: "invalid_api_key", 404: "model_not_found", 429: "rate_limit_exceeded"}.get(status)
