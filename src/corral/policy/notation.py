"""What entries of lists have in common: most are written short, as one text, or in full, as a mapping."""

from __future__ import annotations

from collections.abc import Callable
from enum import Enum
from typing import Any, ClassVar

from pydantic import AfterValidator, BeforeValidator, GetJsonSchemaHandler, WithJsonSchema, model_validator
from pydantic.json_schema import JsonSchemaValue
from pydantic_core import CoreSchema

from corral.policy.document import quoted
from corral.policy.fields import Line, Strict, nearest
from corral.policy.model import Note


def distinct(what: str, name_of: Callable[[Any], str]) -> AfterValidator:
    """Refuses entries of a list that have one name: which of them would be meant?"""

    def check(entries: tuple[Any, ...]) -> tuple[Any, ...]:
        seen: dict[str, int] = {}
        for index, entry in enumerate(entries):
            first = seen.setdefault(name_of(entry), index)
            if first != index:
                name = quoted(name_of(entry))
                raise ValueError(f"has two {what} of the name {name}, at [{first}] and [{index}] (names are unique)")
        return entries

    return AfterValidator(check)


def word_of(words: type[Enum], what: str) -> BeforeValidator:
    """For a field that is one word of a closed set; ``what`` is what another word is not."""
    known = [each.value for each in words]

    def read(word: object) -> Enum:
        if isinstance(word, words):
            return word
        if not isinstance(word, str):
            raise ValueError(f"must be a word (known: {', '.join(known)})")
        if word not in known:
            raise ValueError(f"{quoted(word)} is not {what} ({nearest(word, known)})")
        return words(word)

    return BeforeValidator(read)


def choices(words: type[Enum]) -> WithJsonSchema:
    """The same, for editors."""
    return WithJsonSchema({"enum": [each.value for each in words]})


class Entry(Strict):
    """A mapping that becomes one value."""

    def value(self) -> object:
        """What the policy holds."""
        raise NotImplementedError


class Short(Entry):
    """A mapping that may also be written as one text."""

    short: ClassVar[JsonSchemaValue]
    """What the short notation looks like, for editors."""

    @model_validator(mode="before")
    @classmethod
    def _read(cls, written: Any) -> Any:
        if isinstance(written, str):
            return cls.from_text(written)
        if not isinstance(written, dict):
            raise ValueError("must be text, or a mapping (indented lines of `name: value`)")
        return written

    @classmethod
    def from_text(cls, text: str) -> dict[str, object]:
        """The fields that the short notation stands for. Raises ValueError."""
        raise NotImplementedError

    @classmethod
    def __get_pydantic_json_schema__(cls, core: CoreSchema, handler: GetJsonSchemaHandler) -> JsonSchemaValue:
        full = handler(core)
        if not hasattr(cls, "short"):
            return full
        handler.resolve_ref_schema(full)
        return {"anyOf": [cls.short, full]}


class Rule(Short):
    """What every rule may say for itself."""

    reason: Line = ""
    """Why. Shown to the agent when the rule refuses something."""
    advice: Line = ""
    """What to do instead. Shown to the agent."""
    private: bool = False
    """Tell the agent neither this rule nor its reason."""

    def note(self) -> Note:
        return Note(self.reason, self.advice, self.private)
