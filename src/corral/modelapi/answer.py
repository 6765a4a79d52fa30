"""The answer of a model, whichever API gave it, and how it is put together of what comes.

Everything is an upstream's text: it is bounded, and what is of another type than it should be counts as missing.
"""

from __future__ import annotations

import re
from dataclasses import dataclass
from enum import Enum
from typing import Any

from corral.actions import ToolCall

MAX_TEXT = 4 << 20
"""Characters of text, thinking and arguments of one answer that are kept, all together."""
MAX_TOOLS = 256
MAX_SAMPLED = 1 << 20
"""Tokens of one answer, and of its prompt, whose ids and probabilities are kept."""
_MAX_ID = 4096
"""Characters of the id of a tool call: some servers carry a signature in it."""
_MAX_NAME = 256
_MAX_TOKENS = 2**53
_SURROGATES = re.compile("[\ud800-\udfff]")


class Api(Enum):
    """The APIs that are spoken."""

    CHAT = "chat-completions"
    """OpenAI Chat Completions: ``/v1/chat/completions``."""
    RESPONSES = "responses"
    """OpenAI Responses: ``/v1/responses``."""
    MESSAGES = "messages"
    """Anthropic Messages: ``/v1/messages``."""


@dataclass(frozen=True, slots=True)
class Sampled:
    """The tokens of an answer, where the upstream told them: for learning. Each tuple is empty where it did not."""

    prompt_ids: tuple[int, ...] = ()
    ids: tuple[int, ...] = ()
    tokens: tuple[str, ...] = ()
    logprobs: tuple[float, ...] = ()


@dataclass(frozen=True, slots=True)
class Answer:
    """What a model answered. Token counts mean what they do in :class:`corral.actions.Used`."""

    text: str = ""
    thinking: str = ""
    tools: tuple[ToolCall, ...] = ()
    """What it wants the agent to do. Tools that the upstream runs itself are not among them."""
    input_tokens: int = 0
    output_tokens: int = 0
    cached_tokens: int = 0
    written_tokens: int = 0
    finish: str = ""
    """Why it stopped, in its API's word."""
    model: str = ""
    """Which one it says that it is."""
    complete: bool = False
    """It was read to its own end, all of it is here, and nothing was wrong with it."""
    fault: str = ""
    """What was wrong first; our own words."""
    has_usage: bool = False
    """The upstream said what was used."""
    sampled: Sampled = Sampled()


class Tool:
    """A tool call that is being put together."""

    __slots__ = ("arguments", "id", "is_whole", "name")

    def __init__(self) -> None:
        self.id = self.name = ""
        self.arguments: list[str] = []
        self.is_whole = False

    def named(self, id_: str, name: str) -> None:
        """Takes id and name, where they are told."""
        self.id = self.id or id_[:_MAX_ID]
        self.name = self.name or name[:_MAX_NAME]

    def call(self) -> ToolCall:
        return ToolCall(mended(self.id), mended(self.name), mended("".join(self.arguments)))


class Part:
    """One part of an answer: a choice, a block or an item."""

    __slots__ = ("text", "thinking", "tools")

    def __init__(self) -> None:
        self.text: list[str] = []
        self.thinking: list[str] = []
        self.tools: dict[int, Tool] = {}


class Draft:
    """An answer that is being put together. Its parts and their tools are kept by the upstream's own numbers."""

    def __init__(self, *, sampling: bool = False) -> None:
        self.parts: dict[int, Part] = {}
        self.finish = self.model = self.fault = ""
        self.input_tokens = self.output_tokens = self.cached_tokens = self.written_tokens = 0
        self.has_usage = self.is_over = False
        self.sampling = sampling
        """Whether tokens are collected."""
        self.prompt_ids: list[int] = []
        self.ids: list[int] = []
        self.tokens: list[str] = []
        self.logprobs: list[float] = []
        self._room = MAX_TEXT
        self._tools = 0

    def wrong(self, fault: str) -> None:
        """Notes what is wrong; the first counts."""
        self.fault = self.fault or fault

    def part(self, number: int) -> Part:
        found = self.parts.get(number)
        if found is None:
            found = Part()
            if len(self.parts) < MAX_TOOLS:
                self.parts[number] = found
            else:
                self.wrong(f"it has more than {MAX_TOOLS} parts")
        return found

    def tool(self, number: int, at: int = 0) -> Tool:
        """The tool call ``at`` in part ``number``, begun if it is new."""
        part = self.part(number)
        found = part.tools.get(at)
        if found is None:
            found = Tool()
            if self._tools < MAX_TOOLS:
                self._tools += 1
                part.tools[at] = found
            else:
                self.wrong(f"it has more than {MAX_TOOLS} tool calls")
        return found

    def forget(self, number: int | None = None) -> None:
        """Forgets one part, or all of them, since what follows says it again, and as a whole."""
        dropped = list(self.parts.values()) if number is None else [self.parts.pop(number, Part())]
        if number is None:
            self.parts.clear()
        for part in dropped:
            pieces = [*part.text, *part.thinking, *(piece for tool in part.tools.values() for piece in tool.arguments)]
            self._room += sum(map(len, pieces))
            self._tools -= len(part.tools)

    def put(self, pieces: list[str], text: str) -> None:
        """Adds text to a list of it, as far as there is room."""
        if not text:
            return
        if len(text) > self._room:
            self.wrong(f"it is longer than {MAX_TEXT} characters")
            text = text[: self._room]
        self._room -= len(text)
        pieces.append(text)

    def sample(self, logprobs: list[Any]) -> None:
        """Takes tokens and their probabilities, as OpenAI's APIs give them."""
        for each in logprobs[: MAX_SAMPLED - len(self.tokens)]:
            entry = as_object(each)
            value = entry.get("logprob")
            if isinstance(value, int | float):
                self.tokens.append(mended(text_in(entry, "token")))
                self.logprobs.append(float(value))

    def take_ids(self, into: list[int], ids: list[Any]) -> None:
        """Takes ids of tokens."""
        into.extend(each for each in ids[: MAX_SAMPLED - len(into)] if type(each) is int)

    @property
    def known_tools(self) -> int:
        """How many tool calls are whole."""
        return sum(tool.is_whole for part in self.parts.values() for tool in part.tools.values())

    def answer(self, *, is_cut: bool) -> Answer:
        parts = [self.parts[number] for number in sorted(self.parts)]
        tools = [part.tools[at] for part in parts for at in sorted(part.tools)]
        return Answer(
            "\n\n".join(filter(None, (mended("".join(part.text)) for part in parts))),
            "\n\n".join(filter(None, (mended("".join(part.thinking)) for part in parts))),
            # What was never said to be over is none: the agent cannot know its arguments.
            tuple(tool.call() for tool in tools if tool.is_whole),
            *(self.input_tokens, self.output_tokens, self.cached_tokens, self.written_tokens),
            finish=mended(self.finish),
            model=mended(self.model),
            complete=self.is_over and not self.fault and not is_cut,
            fault=self.fault,
            has_usage=self.has_usage,
            sampled=Sampled(tuple(self.prompt_ids), tuple(self.ids), tuple(self.tokens), tuple(self.logprobs)),
        )


def mended(text: str) -> str:
    """The text with halves of surrogate pairs put together, and what is left of them as U+FFFD: JSON can hold them."""
    if text.isascii() or not _SURROGATES.search(text):
        return text
    return text.encode("utf-16-le", "surrogatepass").decode("utf-16-le", "replace")


# ---- what JSON holds, or nothing ----


def as_object(value: Any) -> dict[str, Any]:
    return value if type(value) is dict else {}


def as_list(value: Any) -> list[Any]:
    return value if type(value) is list else []


def object_in(values: dict[str, Any], name: str) -> dict[str, Any]:
    return as_object(values.get(name))


def list_in(values: dict[str, Any], name: str) -> list[Any]:
    return as_list(values.get(name))


def text_in(values: dict[str, Any], name: str) -> str:
    value = values.get(name)
    return value if type(value) is str else ""


def number_in(values: dict[str, Any], name: str) -> int:
    """A count; 0 where it is none."""
    value = values.get(name)
    return value if type(value) is int and 0 <= value < _MAX_TOKENS else 0


def word_in(values: dict[str, Any], name: str) -> str:
    """A short text."""
    return text_in(values, name)[:_MAX_NAME]
