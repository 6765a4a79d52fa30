"""JSON Schema (2020-12) in bounded time: what an agent sends is checked with what a document says.

Neither is trusted to be quick. Patterns are matched by RE2, in time linear in the text, and one that RE2 does not know
is an error of whoever wrote it. Each check has so many steps; what takes more, as nested choices that refer to
themselves can, is refused. References lead nowhere but into the schema itself. ``format`` is not checked.
"""

from __future__ import annotations

import asyncio
import json
import re
import sys
from collections.abc import Callable, Iterator, Mapping
from contextvars import ContextVar
from dataclasses import dataclass
from functools import lru_cache
from typing import Any

import re2
from jsonschema import Draft202012Validator, ValidationError
from jsonschema.exceptions import SchemaError
from jsonschema.validators import extend
from referencing import Registry

from corral.brokers.strict_json import Json
from corral.errors import RequestError

MAX_STEPS = 100_000
"""Keywords that are looked at in one check: about a second."""
MAX_NESTING = 100
"""Keywords that one leads to another of. A stack that overflows is not to be relied on: what is below the library
aborts in the middle of it (a panic of its Rust code, which is no Exception)."""
MAX_SCHEMA_DEPTH = 32
_FRAMES = 6
"""Of Python's stack, that one keyword takes at most."""
_AT_ONCE = 1_000
"""So many are looked at where everybody else waits meanwhile."""
MAX_PATTERN = 1024
"""Characters."""
_PATTERN_MEMORY = 1 << 20
_TOO_LARGE = "it is too large to be checked"
_LONGEST = 200
"""Characters of a problem."""
_NOT_TAKEN = frozenset(
    "$id $schema $vocabulary $anchor $dynamicRef $dynamicAnchor $recursiveRef $recursiveAnchor patternProperties "
    "unevaluatedProperties unevaluatedItems".split()
)
"""Keywords that lead elsewhere, match patterns on their own, or whose cost cannot be counted."""
_UNICODE_ESCAPE = re.compile(r"(?<!\\)((?:\\\\)*)\\u([0-9A-Fa-f]{4})")


@dataclass(slots=True)
class _Check:
    """What one check may still cost, and how large what it looks at is."""

    left: int
    sizes: dict[int, int]
    """Of containers, by identity; all of them live as long as the check."""
    nesting: int = 0


_check: ContextVar[_Check] = ContextVar("check")

Keyword = Callable[[Any, Any, Any, Any], Any]


class SchemaFault(RequestError):
    """A schema that cannot be checked with. The message says why."""


class _TooMuch(Exception):
    """A check that takes too long."""


class Schema:
    """One schema, compiled."""

    def __init__(self, schema: Mapping[str, Any], *, is_checked: bool = False) -> None:
        """``is_checked``: all of it has been, by :func:`check_schema`. Raises SchemaFault."""
        if not is_checked:
            check_schema(schema)
        self._validator = _Counted(schema, registry=Registry())

    async def check(self, value: Json) -> str | None:
        """As :meth:`problem`. What takes long is done in another thread."""
        try:
            return self._problem(value, _AT_ONCE)
        except _TooMuch:
            return await asyncio.to_thread(self.problem, value)

    def problem(self, value: Json) -> str | None:
        """What is wrong with a value, the first thing that is; None where nothing is."""
        try:
            return self._problem(value, MAX_STEPS)
        except _TooMuch:
            return _TOO_LARGE

    def _problem(self, value: Json, steps: int) -> str | None:
        """Raises _TooMuch."""
        if not _has_room():
            raise _TooMuch
        sizes: dict[int, int] = {}
        token = _check.set(_Check(steps, sizes))
        try:
            _measure(value, sizes)
            error = next(iter(self._validator.iter_errors(value)), None)
        except _TooMuch:
            raise
        except Exception:  # also a reference that leads nowhere
            return "it could not be checked"
        finally:
            _check.reset(token)
        if error is None:
            return None
        place = "".join(f"[{part}]" if isinstance(part, int) else f".{part}" for part in error.absolute_path)
        where = f"{_bounded(place.lstrip('.'))}: " if place else ""
        return f"{where}{_bounded(error.message)}"


def check_schema(schema: Mapping[str, Any]) -> None:
    """Whether it can be checked with, but not whether its references lead anywhere. Raises SchemaFault."""
    _look(schema)
    if not _has_room():
        raise SchemaFault("is looked at from too deep a stack")
    try:
        Draft202012Validator.check_schema(schema)
    except SchemaError as error:
        raise SchemaFault(f"is no JSON schema: {_bounded(error.message)}") from None


def _has_room() -> bool:
    """Whether the stack cannot overflow before something here says that it is too much."""
    depth, frame = 0, sys._getframe()
    while (back := frame.f_back) is not None:
        depth, frame = depth + 1, back
    return depth + (MAX_NESTING + 10) * _FRAMES < sys.getrecursionlimit()


def _bounded(text: str) -> str:
    text = text if text.isprintable() else text.encode("unicode_escape").decode("ascii")
    return text if len(text) <= _LONGEST else f"{text[:_LONGEST]}..."


def _look(schema: object) -> None:
    """Refuses what cannot be bounded. Only positions of schemas are looked at, which ``properties`` and the like lead
    to; data (``enum``, ``default``) may hold any words."""
    waiting, count = [(schema, 1)], 0
    while waiting:
        each, depth = waiting.pop()
        count += 1
        if depth > MAX_SCHEMA_DEPTH:
            raise SchemaFault(f"is a schema nested deeper than {MAX_SCHEMA_DEPTH}")
        if count > MAX_STEPS:
            raise SchemaFault("is a schema too large to be checked")
        if not isinstance(each, Mapping):
            continue
        for keyword in each:
            if keyword in _NOT_TAKEN:
                raise SchemaFault(f"uses `{keyword}`, which is not taken here")
        reference = each.get("$ref")
        if reference is not None and not (isinstance(reference, str) and reference.startswith("#")):
            raise SchemaFault("refers to another document")
        if isinstance(pattern := each.get("pattern"), str):
            compiled(pattern)
        for keyword in ("properties", "$defs", "definitions", "dependentSchemas"):
            if isinstance(inner := each.get(keyword), Mapping):
                waiting.extend((value, depth + 1) for value in inner.values())
        for keyword in ("allOf", "anyOf", "oneOf", "prefixItems"):
            if isinstance(inner := each.get(keyword), list):
                waiting.extend((value, depth + 1) for value in inner)
        for keyword in ("items", "additionalProperties", "contains", "propertyNames", "not", "if", "then", "else"):
            if keyword in each:
                waiting.append((each[keyword], depth + 1))


@lru_cache(4096)
def compiled(pattern: str) -> Any:
    """Raises SchemaFault."""
    if len(pattern) > MAX_PATTERN:
        raise SchemaFault(f"has a pattern of more than {MAX_PATTERN} characters")
    options = re2.Options()
    options.log_errors = False
    options.max_mem = _PATTERN_MEMORY
    try:
        return re2.compile(_UNICODE_ESCAPE.sub(r"\1\\x{\2}", pattern), options)
    except re2.error:
        raise SchemaFault(
            f"has the pattern {_bounded(pattern)!r}, which cannot be matched in bounded time (RE2 does not know it)"
        ) from None


# ---- keywords ----


def _measure(value: Json, sizes: dict[int, int]) -> int:
    """How much there is in a value. What is wrong with it is told by JSON Schema's own words, which repeat all of it:
    so each keyword costs by the size of what it is applied to."""
    if isinstance(value, str):
        return 1 + len(value) // 16
    if isinstance(value, list):
        size = 1 + sum(_measure(each, sizes) for each in value)
    elif isinstance(value, dict):
        size = 1 + sum(1 + len(name) // 16 + _measure(each, sizes) for name, each in value.items())
    else:
        return 1
    sizes[id(value)] = size
    return size


def _spend(instance: Json, count: int = 1) -> None:
    check = _check.get()
    size = len(instance) // 16 if isinstance(instance, str) else check.sizes.get(id(instance), 1)
    check.left -= count + size // 64
    if check.left < 0:
        raise _TooMuch


def _counted(keyword: Keyword) -> Keyword:
    def run(validator: Any, value: Any, instance: Any, schema: Any) -> Iterator[ValidationError]:
        _spend(instance)
        check = _check.get()
        if check.nesting == MAX_NESTING:
            raise _TooMuch
        check.nesting += 1
        try:
            yield from keyword(validator, value, instance, schema) or ()
        finally:
            check.nesting -= 1

    return run


def _pattern(validator: Any, value: Any, instance: Any, schema: Any) -> Iterator[ValidationError]:
    if isinstance(instance, str) and compiled(value).search(instance) is None:
        yield ValidationError(f"{instance[:_LONGEST]!r} does not match {value!r}")


def _unique_items(validator: Any, value: Any, instance: Any, schema: Any) -> Iterator[ValidationError]:
    """By one text for each element; JSON Schema's equality, in which 1 is 1.0 and not true."""
    if value and isinstance(instance, list):
        _spend(instance, _check.get().sizes.get(id(instance), 1) // 8)
        if len({json.dumps(_plain(each), sort_keys=True) for each in instance}) != len(instance):
            yield ValidationError("it has non-unique elements")


def _enum(validator: Any, value: Any, instance: Any, schema: Any) -> Iterator[ValidationError]:
    _spend(instance, len(value) // 16)
    yield from _known["enum"](validator, value, instance, schema)


def _plain(value: Json) -> Json:
    if isinstance(value, float) and value.is_integer():
        return int(value)
    if isinstance(value, list):
        return [_plain(each) for each in value]
    if isinstance(value, dict):
        return {name: _plain(each) for name, each in value.items()}
    return value


_known: Mapping[str, Any] = Draft202012Validator.VALIDATORS
_own: Mapping[str, Any] = {"pattern": _pattern, "uniqueItems": _unique_items, "enum": _enum}
_Counted = extend(  # type: ignore[no-untyped-call]
    Draft202012Validator,
    validators={name: _counted(_own.get(name, keyword)) for name, keyword in _known.items() if name not in _NOT_TAKEN},
)
