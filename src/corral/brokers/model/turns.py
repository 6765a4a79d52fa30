"""What is said in a request: its turns by their digests, its first words, and which tool calls it answers.

Clients send all of a conversation with each request, and change how they write what they have sent before: a text is a
string first and a list of one part later, marks for the upstream's cache move on. A digest looks through that.
"""

from __future__ import annotations

import hashlib
import json
import re
from collections.abc import Iterator
from dataclasses import dataclass
from itertools import islice
from typing import Any

from corral.brokers.model.asking import Asked, Unclear
from corral.modelapi.answer import Api, as_list, as_object

ATTACHMENT = 1600
"""Tokens that an image, a document or a sound in a request is taken for."""
BYTES_PER_TOKEN = 4
"""Of JSON in UTF-8, in which English text and code are. A rule of thumb: upstreams count for themselves."""
MAX_PROMPTS = 8
"""Texts of a conversation's beginning that are compared with what tool calls say."""
MAX_ANSWERED = 256
"""Tool calls by which the conversation of a request is looked for."""
_ATTACHMENTS = frozenset(("data", "file_data", "file_url", "image_url", "url"))
"""Where the bytes of attachments are."""
_SHORT = 256
"""Characters: what is not longer is taken for a text."""
_LONGEST_TYPE = 128
"""Characters within which a data URL has its comma."""
_BASE64 = re.compile(r"[A-Za-z0-9+/=\r\n]*")
_DEPTH = 4
"""Of content in content: a tool's result holds blocks, and a document blocks of its own."""


@dataclass(frozen=True, slots=True)
class Talk:
    """What a request says."""

    beginning: bytes
    """Digest of what comes before all turns: instructions to the model."""
    turns: tuple[bytes, ...]
    """A digest of each."""
    first: int
    """How many turns the beginning of the conversation has: up to the first that is no instruction."""
    prompts: tuple[str, ...]
    """The texts of that one."""
    answered: tuple[str, ...]
    """Ids of the tool calls whose results come after all that the model has said."""
    tokens: int
    """An estimate of what it takes of input."""


def talk_of(asked: Asked) -> Talk:
    """Raises Unclear."""
    turns = turns_of(asked)
    instructions = asked.values.get("instructions" if asked.api is Api.RESPONSES else "system")
    digests = [_digest(turn) for turn in turns]
    first = next((at for at, turn in enumerate(turns) if not _is_instruction(turn)), len(turns) - 1) + 1
    last = max((at for at, turn in enumerate(turns) if _is_models(turn)), default=-1)
    latest = [id_ for turn in turns[last + 1 :] for id_, _ in results_in(turn)]
    return Talk(
        _digest({"content": instructions}),
        tuple(digests),
        first,
        tuple(islice(texts_in(turns[first - 1].get("content")), MAX_PROMPTS)) if turns else (),
        tuple(islice(filter(None, latest), MAX_ANSWERED)),
        _estimate(asked.body, turns),
    )


def turns_of(asked: Asked) -> list[dict[str, Any]]:
    """What was said, as the request has it."""
    if asked.api is not Api.RESPONSES:
        turns: list[dict[str, Any]] = asked.values["messages"]
        return turns
    given = asked.values.get("input")
    return [{"role": "user", "content": given}] if type(given) is str else as_list(given)


def _is_instruction(turn: dict[str, Any]) -> bool:
    return turn.get("role") in ("system", "developer")


def _is_models(turn: dict[str, Any]) -> bool:
    """Whether a model has said it."""
    if turn.get("role") == "assistant":
        return True
    kind = turn.get("type")
    return type(kind) is str and (kind == "reasoning" or kind.endswith("_call"))


# ---- digests ----


def _digest(turn: dict[str, Any]) -> bytes:
    plain = {name: value for name, value in turn.items() if name != "cache_control"}
    for name in ("content", "output"):
        if name in plain:
            plain[name] = _plain(plain[name], _DEPTH)
    try:
        return hashlib.sha256(json.dumps(plain, sort_keys=True, separators=(",", ":")).encode()).digest()
    except RecursionError:
        raise Unclear("The body is nested too deeply.") from None


def _plain(content: Any, depth: int) -> Any:
    if type(content) is str:
        return [{"type": "text", "text": content}]
    if type(content) is not list or not depth:
        return content
    plain = []
    for block in content:
        if type(block) is dict:
            block = {name: value for name, value in block.items() if name != "cache_control"}
            if "content" in block:
                block["content"] = _plain(block["content"], depth - 1)
        plain.append(block)
    return plain


# ---- what tools have given back ----


def results_in(turn: dict[str, Any]) -> Iterator[tuple[str, Any]]:
    """The results of tools in a turn: the id of the call, and the content."""
    kind = turn.get("type")
    if turn.get("role") in ("tool", "function"):
        yield _id(turn, "tool_call_id", "name"), turn.get("content")
    elif type(kind) is str and kind.endswith("_output"):  # of the Responses API: function_call_output and its kind
        yield _id(turn, "call_id", "id"), turn.get("output")
    elif type(content := turn.get("content")) is list:
        for block in content:
            if as_object(block).get("type") == "tool_result":
                yield _id(block, "tool_use_id"), block.get("content")


def _id(turn: dict[str, Any], *names: str) -> str:
    return next((value for name in names if type(value := turn.get(name)) is str), "")


def texts_in(content: Any) -> Iterator[str]:
    """All texts in content, however deep."""
    stack = [content]
    while stack:
        value = stack.pop()
        if type(value) is str:
            yield value
        elif type(value) is list:
            stack.extend(reversed(value))
        elif type(value) is dict:
            # The bytes of attachments are no text; whatever else there is may be read by a model.
            stack.extend(
                each
                for name, each in reversed(value.items())
                if name not in ("type", "cache_control", "id", "media_type") and not _is_attachment(value, name)
            )


def _is_attachment(block: dict[str, Any], name: str) -> bool:
    """Whether a value is the bytes of one: only where an attachment can be, and where it can be no text."""
    value = block[name]
    if name not in _ATTACHMENTS or type(value) is not str or len(value) <= _SHORT or block.get("type") == "text":
        return False
    bytes_at = value.find(",", 0, _LONGEST_TYPE) + 1 if value.startswith("data:") else 0
    return _BASE64.fullmatch(value, bytes_at) is not None


# ---- an estimate ----


def _estimate(body: bytes, turns: list[Any]) -> int:
    size, count = len(body), 0
    for turn in turns:
        content = turn.get("content") if "content" in turn else turn.get("output")
        stack = list(content) if type(content) is list else []
        while stack:
            value = stack.pop()
            if type(value) is list:
                stack.extend(value)
            elif type(value) is dict:
                for name, each in value.items():
                    if _is_attachment(value, name):
                        size, count = size - len(each), count + 1
                    elif type(each) is not str:
                        stack.append(each)
    return max(0, size) // BYTES_PER_TOKEN + count * ATTACHMENT


def tokens_of(length: int) -> int:
    """An estimate of the tokens of a text, by its length in bytes of UTF-8; none only where there is none."""
    return -(-length // BYTES_PER_TOKEN)
