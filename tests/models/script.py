"""What a scripted model says: conversations, their turns, and how answering goes wrong.

A request is answered with the turn at its position: the number of answers that it already contains. So a retry gets
the same answer again, and any number of conversations may go on at once.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from enum import Enum


@dataclass(frozen=True, slots=True)
class Text:
    """Said to whoever asks."""

    text: str


@dataclass(frozen=True, slots=True)
class Thinking:
    """Thought before."""

    text: str


@dataclass(frozen=True, slots=True)
class Call:
    """One tool that is to be used. Several in one turn are to be used in parallel."""

    name: str
    arguments: Mapping[str, object] = field(default_factory=dict)
    raw: str = ""
    """The arguments as text, in place of ``arguments``: to be malformed."""

    @property
    def text(self) -> str:
        """The arguments as a model writes them."""
        return self.raw or json.dumps(dict(self.arguments))


Part = Text | Thinking | Call


@dataclass(frozen=True, slots=True)
class Usage:
    """Tokens, as the upstream says that it has used them."""

    input: int = 100
    """All of the prompt, with those that are named below."""
    output: int = 20
    cached: int = 0
    written: int = 0
    """Written to a cache; Anthropic's alone says so."""
    reasoning: int = 0


class Form(Enum):
    """How an answer can be no answer."""

    NOT_HTTP = "not HTTP"
    NOT_JSON = "not JSON"
    """A whole answer whose body is no JSON; of a stream, one event."""
    NOT_AN_OBJECT = "not an object"
    WRONG_TYPE = "wrong type"
    """HTML with status 200."""
    BAD_CHUNKS = "bad chunks"
    """A chunked body whose lengths are no numbers."""


@dataclass(frozen=True, slots=True)
class Fails:
    """A status of failure, in the API's own shape."""

    status: int
    message: str = "scripted failure"
    headers: tuple[tuple[str, str], ...] = ()


@dataclass(frozen=True, slots=True)
class Malformed:
    """Something that is not what the API describes."""

    form: Form


@dataclass(frozen=True, slots=True)
class Slow:
    """Waits before the head, and between two events."""

    before: float = 0.0
    between: float = 0.0


@dataclass(frozen=True, slots=True)
class Silent:
    """Takes the request, and says nothing until the client goes away or the server ends."""


@dataclass(frozen=True, slots=True)
class Endless:
    """The first text goes on and on, in pieces of ``size`` bytes: until the client goes away, or the server ends."""

    size: int = 4096


@dataclass(frozen=True, slots=True)
class Closes:
    """Sends so many events (of an answer that is no stream: bytes), then closes; ``reset``: without a word of TCP."""

    after: int
    reset: bool = False


@dataclass(frozen=True, slots=True)
class Errs:
    """Sends so many events of a stream, then an event that is an error, and ends properly."""

    after: int
    message: str = "scripted failure in the midst"


@dataclass(frozen=True, slots=True)
class Echoes:
    """Says all header fields of the request, in the text and in a header field of the answer."""


Trouble = Fails | Malformed | Slow | Silent | Endless | Closes | Errs | Echoes


@dataclass(frozen=True, slots=True)
class Turn:
    """One answer."""

    parts: Sequence[Part] = (Text("ok"),)
    usage: Usage | None = field(default_factory=Usage)
    """None: the upstream does not say."""
    finish: str = ""
    """In the API's word; empty for the one that fits."""
    trouble: Trouble | None = None
    first: Sequence[Trouble] = ()
    """What happens in place of it to the first requests for it, one each."""

    @property
    def calls(self) -> list[Call]:
        return [part for part in self.parts if isinstance(part, Call)]

    @property
    def text(self) -> str:
        return "".join(part.text for part in self.parts if isinstance(part, Text))

    @property
    def thinking(self) -> str:
        return "".join(part.text for part in self.parts if isinstance(part, Thinking))


def says(text: str, **options: object) -> Turn:
    """A turn that only says something."""
    return Turn((Text(text),), **options)  # type: ignore[arg-type]


def huge(size: int) -> Turn:
    """A turn of so many bytes."""
    return says("0123456789abcdef" * (size // 16))


@dataclass(frozen=True, slots=True)
class Script:
    """One conversation."""

    name: str
    """Letters and digits; part of what its tool calls are called."""
    turns: Sequence[Turn]
    when: str = ""
    """What the first message of a user contains by which a request belongs to it."""
    tools: bool = False
    """Only requests that offer tools: agents also ask on the side, for a title."""

    def call_id(self, position: int, number: int = 0) -> str:
        """What the ``number``th tool call of the turn at ``position`` is called."""
        return f"call_{self.name}_{position}_{number}"


ASIDE = Script("aside", (says("ok"),))
"""What is answered to anything else."""
