"""Answers of OpenAI's Chat Completions API, and of the many servers that speak it.

Beside what OpenAI documents: ``reasoning_content`` and ``reasoning`` (vLLM, DeepSeek, OpenRouter), ``token_ids`` and
``prompt_token_ids`` (vLLM), ``prompt_cache_hit_tokens`` (DeepSeek).
"""

from __future__ import annotations

from typing import Any

from corral.modelapi.answer import Draft, as_object, list_in, number_in, object_in, text_in, word_in

HINTS = (b'"finish_reason":"', b'"finish_reason": "', b"[DONE]", b'"error"')
"""What stands in events that end an answer."""
DONE = "[DONE]"


def take_body(draft: Draft, body: dict[str, Any]) -> None:
    """Takes an answer that came as one object."""
    if not _take(draft, body, "message"):
        draft.wrong("it is no chat completion")
        return
    _end(draft)


def take_event(draft: Draft, data: str, event: dict[str, Any]) -> None:
    """Takes one event of a stream."""
    if data == DONE:
        _end(draft)
    else:
        _take(draft, event, "delta")


def _take(draft: Draft, values: dict[str, Any], name: str) -> bool:
    if values.get("error"):
        draft.finish = draft.finish or "error"
        draft.wrong("the upstream reports an error")
        draft.is_over = True
        return True
    draft.model = draft.model or word_in(values, "model")
    if draft.sampling and not draft.prompt_ids:
        draft.take_ids(draft.prompt_ids, list_in(values, "prompt_token_ids"))
    for at, each in enumerate(list_in(values, "choices")):
        choice = as_object(each)
        number = number_in(choice, "index") or at
        _said(draft, number, object_in(choice, name))
        if draft.sampling and not number:
            draft.sample(list_in(object_in(choice, "logprobs"), "content"))
            draft.take_ids(draft.ids, list_in(choice, "token_ids"))
            if not draft.prompt_ids:
                draft.take_ids(draft.prompt_ids, list_in(choice, "prompt_token_ids"))
        if reason := word_in(choice, "finish_reason"):
            draft.finish = draft.finish or reason
            _end(draft)
    _count(draft, object_in(values, "usage"))
    return "choices" in values


def _said(draft: Draft, number: int, message: dict[str, Any]) -> None:
    part = draft.part(number)
    content = message.get("content")
    draft.put(part.text, content if type(content) is str else _texts(content))
    draft.put(part.text, text_in(message, "refusal"))
    draft.put(part.thinking, text_in(message, "reasoning_content") or text_in(message, "reasoning"))
    for at, each in enumerate(list_in(message, "tool_calls")):
        call = as_object(each)
        function = object_in(call, "function") or object_in(call, "custom")
        tool = draft.tool(number, number_in(call, "index") or at)
        tool.named(text_in(call, "id"), text_in(function, "name"))
        draft.put(tool.arguments, text_in(function, "arguments") or text_in(function, "input"))
    if function := object_in(message, "function_call"):  # before there were tools
        tool = draft.tool(number)
        tool.named("", text_in(function, "name"))
        draft.put(tool.arguments, text_in(function, "arguments"))


def _texts(content: Any) -> str:
    """Of content that is a list of parts."""
    return "".join(text_in(as_object(each), "text") for each in content) if type(content) is list else ""


def _end(draft: Draft) -> None:
    draft.is_over = True
    for part in draft.parts.values():
        for tool in part.tools.values():
            tool.is_whole = True


def _count(draft: Draft, usage: dict[str, Any]) -> None:
    if not usage:
        return
    details = object_in(usage, "prompt_tokens_details")
    draft.has_usage = True
    draft.input_tokens = number_in(usage, "prompt_tokens")
    draft.output_tokens = number_in(usage, "completion_tokens")
    draft.cached_tokens = number_in(details, "cached_tokens") or number_in(usage, "prompt_cache_hit_tokens")
    draft.written_tokens = number_in(details, "cache_write_tokens")
