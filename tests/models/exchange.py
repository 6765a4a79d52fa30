"""What the three APIs' makers of answers have in common, and what is read of their requests."""

from __future__ import annotations

import json
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

from tests.models.script import Script, Turn

MODEL = "scripted-1"
CREATED = 1_750_000_000
PIECE = 7
"""Characters of one delta: small, so that there are several."""


@dataclass(frozen=True, slots=True)
class Asked:
    """A request, as far as the script needs it."""

    model: str
    stream: bool
    first: str
    """All text of the first user's message."""
    position: int
    tools: bool
    body: dict[str, Any]


@dataclass(frozen=True, slots=True)
class Answer:
    """What to answer."""

    script: Script
    position: int
    turn: Turn
    asked: Asked

    @property
    def id(self) -> str:
        return f"{self.script.name}_{self.position}"

    def call_id(self, number: int) -> str:
        return self.script.call_id(self.position, number)


@dataclass(frozen=True, slots=True)
class Event:
    """One event of a stream."""

    data: str
    name: str = ""

    def encode(self) -> bytes:
        """As on the wire (WHATWG HTML, section 9.2)."""
        head = f"event: {self.name}\n" if self.name else ""
        return f"{head}data: {self.data}\n\n".encode()


def dumps(value: object) -> str:
    """As the providers write it."""
    return json.dumps(value, ensure_ascii=False, separators=(",", ":"))


def pieces(text: str) -> Iterator[str]:
    """The text in deltas; of a long one they are longer."""
    size = max(PIECE, len(text) // 256)
    for start in range(0, len(text), size):
        yield text[start : start + size]


def text_of(content: object) -> str:
    """All text of a message's content, in whichever of its shapes."""
    if isinstance(content, str):
        return content
    if isinstance(content, list):
        return "\n".join(
            str(each.get("text") or each.get("content") or "") if isinstance(each, dict) else "" for each in content
        )
    return ""


def items(value: object) -> list[dict[str, Any]]:
    """The objects of a list."""
    return [each for each in value if isinstance(each, dict)] if isinstance(value, list) else []
