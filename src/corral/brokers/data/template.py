"""The text that is run, with room for values, and how values are written into it.

No text that an agent wrote is in a query as the agent wrote it: texts and parameters are taken out before the query is
generated and written here, for each server in the one way that leaves nothing to its settings.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass

from corral.brokers.data.checking import check_pattern
from corral.brokers.data.faults import QueryRefused
from corral.brokers.data.grammar import MAX_PARAMETERS, MAX_STRING
from corral.brokers.data.lexical import MARKER
from corral.policy.model import Dialect

Value = str | int | float | bool | None


@dataclass(frozen=True, slots=True)
class Slot:
    """Where a value goes."""

    text: str
    """The value itself; of a parameter, its name."""
    parameter: bool = False
    pattern: bool = False
    """It is matched against by LIKE."""


@dataclass(frozen=True, slots=True)
class Template:
    """Pieces of text, and slots between them."""

    pieces: tuple[str | Slot, ...]
    dialect: Dialect

    @classmethod
    def of(cls, text: str, slots: tuple[Slot, ...], dialect: Dialect) -> Template:
        """What a text with markers stands for."""
        parts = MARKER.split(text)
        pieces = [part if index % 2 == 0 else slots[int(part)] for index, part in enumerate(parts)]
        return cls(tuple(pieces), dialect)

    def fill(self, parameters: Mapping[str, Value]) -> str:
        """The text with the values. Raises QueryRefused for a parameter that is missing, or of no use."""
        return "".join(piece if isinstance(piece, str) else self._value(piece, parameters) for piece in self.pieces)

    def _value(self, slot: Slot, parameters: Mapping[str, Value]) -> str:
        if not slot.parameter:
            return write(slot.text, self.dialect)
        if slot.text not in parameters:
            raise QueryRefused(f"the parameter {slot.text!r} is missing")
        value = parameters[slot.text]
        if slot.pattern and value is not None:
            if not isinstance(value, str):
                raise QueryRefused("the pattern of LIKE is a text")
            check_pattern(value)
        return write(value, self.dialect)


def write(value: Value, dialect: Dialect) -> str:
    """A value as a literal. Raises QueryRefused."""
    if value is None:
        return "NULL"
    if isinstance(value, bool):
        return "TRUE" if value else "FALSE"
    if isinstance(value, int):
        if not -(1 << 63) < value < 1 << 63:
            raise QueryRefused("a number is too large")
        return _number(str(value))
    if isinstance(value, float):
        if not math.isfinite(value):
            raise QueryRefused("a number is too large")
        return _number(repr(value))
    if len(value) > MAX_STRING or "\0" in value or any("\ud800" <= character <= "\udfff" for character in value):
        raise QueryRefused(f"a text has at most {MAX_STRING} characters, none of them NUL")
    if dialect is Dialect.MYSQL:  # what a backslash is depends on the mode of the session; this does not
        return f"_utf8mb4 x'{value.encode().hex()}'"
    return "'" + value.replace("'", "''") + "'"


def _number(text: str) -> str:
    """In parentheses where it begins with a sign, as -0.0 does, too: after another one it would begin a comment."""
    return f"({text})" if text.startswith("-") else text


def check_parameters(parameters: object) -> dict[str, Value]:
    """What was sent as parameters. Raises QueryRefused."""
    if parameters is None:
        return {}
    if not isinstance(parameters, dict) or len(parameters) > MAX_PARAMETERS:
        raise QueryRefused(f"parameters is an object with at most {MAX_PARAMETERS} members")
    if not all(value is None or isinstance(value, str | int | float) for value in parameters.values()):
        raise QueryRefused("a parameter is a text, a number, true, false or null")
    return dict(parameters)
