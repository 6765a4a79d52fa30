"""What rules have in common: they are written short, as one text, or in full, as a mapping."""

from __future__ import annotations

from typing import Any, ClassVar

from pydantic import GetJsonSchemaHandler, model_validator
from pydantic.json_schema import JsonSchemaValue
from pydantic_core import CoreSchema

from corral.policy.fields import Line, Strict
from corral.policy.model import Note


class Short(Strict):
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

    def value(self) -> object:
        """What the policy holds."""
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
