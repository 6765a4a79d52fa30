"""Our values as JSON has them, bounded, and back: for whoever writes records.

Texts have at most :attr:`Bounds.text` characters, lists :attr:`Bounds.entries` entries and :attr:`Bounds.words`
characters together; what is too long is cut, and the caller is told that it was.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, fields, is_dataclass
from enum import Enum
from functools import cache
from math import isfinite
from types import UnionType
from typing import Any, Union, get_args, get_origin, get_type_hints

from corral.actions import (
    Endpoint,
    File,
    KernelCall,
    Kind,
    ModelCall,
    Operation,
    Program,
    Query,
    Request,
    Socket,
    Verb,
)

_SUBJECTS: dict[Kind, type[Any]] = {
    Kind.PROCESS_EXEC: Program,
    Kind.NET_SOCKET: Socket,
    Kind.HTTP_REQUEST: Request,
    Kind.MODEL_CALL: ModelCall,
    Kind.DATA_QUERY: Query,
    Kind.API_CALL: Operation,
    Kind.KERNEL: KernelCall,
}
_ADDED: dict[str, dict[str, Any]] = {
    "Request": {"meaning": "method"},
    "Origin": {"tool": "", "unexplained": False},
    "ExecStarted": {"step": 0},
    "ExecEnded": {"step": 0},
}
"""Fields that records of earlier versions do not have, with what they mean there, by the name of their class."""
_FAMILIES: dict[str, type[Any]] = {"file": File, "net": Endpoint, "sandbox": Verb}
MAX_ENTRIES = 256
"""Entries of one list that is read."""


@dataclass(frozen=True, slots=True)
class Bounds:
    """How much of a value is written."""

    text: int = 4096
    """Characters of one text: what a path can have."""
    entries: int = MAX_ENTRIES
    """Entries of one list."""
    words: int = 16 * 1024
    """Characters of all texts of one list together."""


WHOLE = Bounds()


def subject_type(kind: Kind) -> type[Any]:
    """The type of what an action of that kind is about."""
    return _SUBJECTS.get(kind) or _FAMILIES[kind.value.partition(".")[0]]


@cache
def _names(kind: Any) -> tuple[str, ...] | None:
    """The fields of a dataclass that are recorded; None for another type."""
    if not is_dataclass(kind):
        return None
    return tuple(field.name for field in fields(kind) if field.metadata.get("recorded", True))


def to_plain(value: Any, bounds: Bounds = WHOLE) -> tuple[Any, bool]:
    """The value as JSON has it, bounded, and whether that is all of it."""
    kind: Any = type(value)
    if kind is str:
        return value[: bounds.text], len(value) <= bounds.text
    if kind is int or kind is bool or value is None or kind is float:
        return value, True
    if kind is tuple:
        return _list(value, bounds)
    names = _names(kind)
    if names is None:
        return (value.value, True) if isinstance(value, Enum) else (value, True)
    found, all_whole = {}, True
    for name in names:
        found[name], whole = to_plain(getattr(value, name), bounds)
        all_whole = all_whole and whole
    return found, all_whole


def _list(values: tuple[Any, ...], bounds: Bounds) -> tuple[list[Any], bool]:
    found: list[Any] = []
    left, all_whole = bounds.words, len(values) <= bounds.entries
    for value in values[: bounds.entries]:
        plain, whole = to_plain(value, bounds)
        left -= len(str(plain))
        if left < 0:
            return found, False
        found.append(plain)
        all_whole = all_whole and whole
    return found, all_whole


@cache
def _hints(kind: type[Any]) -> Mapping[str, Any]:
    """The types of the same fields."""
    hints, names = get_type_hints(kind), _names.__wrapped__(kind)
    return {name: hints[name] for name in names or ()}


def from_plain(wanted: Any, given: Any, **known: object) -> Any:
    """``given`` as a value of the type ``wanted``, nothing converted that the writer would not have written so.

    ``known`` are fields of a dataclass that are not given. Raises ValueError (or RecursionError).
    """
    if get_origin(wanted) in (Union, UnionType):
        (other,) = (each for each in get_args(wanted) if each is not type(None))
        return None if given is None else from_plain(other, given)
    if get_origin(wanted) is tuple:
        if not isinstance(given, list) or len(given) > MAX_ENTRIES:
            raise ValueError("a list is none, or too long")
        return tuple(from_plain(get_args(wanted)[0], each) for each in given)
    if isinstance(wanted, type) and is_dataclass(wanted):
        if isinstance(given, dict):
            given = {**_ADDED.get(wanted.__name__, {}), **given}
        if not isinstance(given, dict) or given.keys() != _hints(wanted).keys() - known.keys():
            raise ValueError(f"its {wanted.__name__.lower()} has other fields than it must")
        return wanted(**{name: from_plain(_hints(wanted)[name], each) for name, each in given.items()}, **known)
    if wanted is float and type(given) in (int, float):
        number = float(given)
        if not isfinite(number):
            raise ValueError("a number is too large")
        return number
    if isinstance(wanted, type) and issubclass(wanted, Enum):
        return given if type(given) is wanted else wanted(given)
    if type(given) is not wanted:
        raise ValueError(f"{repr(given)[:40]} is not of type {wanted.__name__}")
    return given


def unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    """For json.loads: an object whose names are all different. Raises ValueError."""
    found = dict(pairs)
    if len(found) < len(pairs):
        raise ValueError("a name is given twice")
    return found


def refuse(constant: str) -> object:
    """For json.loads: NaN and the infinities are no JSON. Raises ValueError."""
    raise ValueError(f"{constant} is no number")
