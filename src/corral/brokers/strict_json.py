"""JSON that means one thing only (RFC 8259), within bounds.

Refused, each because two readers could take the text for different values or be broken by it: a name that stands twice
in one object, what is not UTF-8, half of a surrogate pair, ``NaN`` and ``Infinity``, numbers too large to be one,
nesting without end. What is sent on is written anew from what was read.
"""

from __future__ import annotations

import asyncio
import json
import math
from typing import TypeAlias

from corral.modelapi.values import values_in

Json: TypeAlias = "bool | int | float | str | list[Json] | dict[str, Json] | None"

MAX_DEPTH = 64
MAX_VALUES = 200_000
"""Of one text, with the names of members."""
MAX_DIGITS = 128
"""Of an integer."""


_SHORT, _FEW = 256 * 1024, 2000
"""Bytes and values of a text that is read at once, in about 10 ms at most."""


class NotJson(ValueError):
    """A text that is not read. The message says why, in our own words."""


def parse(data: bytes, *, depth: int = MAX_DEPTH, values: int = MAX_VALUES) -> Json:
    """Raises NotJson."""
    if values_in(data, values) > values:  # before they are made
        raise NotJson(f"it holds more than {values:,} values")
    try:
        text = data.decode("utf-8")
        value: Json = json.loads(
            text, object_pairs_hook=_unique, parse_constant=_constant, parse_int=_integer, parse_float=_float
        )
    except UnicodeDecodeError:
        raise NotJson("it is not UTF-8") from None
    except json.JSONDecodeError as error:
        raise NotJson(f"{error.msg[:80]}, at character {error.pos}") from None
    except RecursionError:
        raise NotJson(f"it is nested deeper than {depth}") from None
    check(value, depth=depth, values=values)
    return value


def is_short(data: bytes) -> bool:
    """Whether reading it keeps nobody waiting."""
    return len(data) <= _SHORT and values_in(data, _FEW) <= _FEW


async def parse_aside(data: bytes, *, depth: int = MAX_DEPTH, values: int = MAX_VALUES) -> Json:
    """The same; what takes long is read in a thread, as all sandboxes of a process wait for one loop."""
    if is_short(data):
        return parse(data, depth=depth, values=values)
    return await asyncio.to_thread(parse, data, depth=depth, values=values)


def check(value: Json, *, depth: int = MAX_DEPTH, values: int = MAX_VALUES) -> None:
    """The bounds, and what no text should hold. Raises NotJson."""
    count, waiting = 0, [(value, 1)]
    while waiting:
        each, level = waiting.pop()
        count += 1
        if isinstance(each, str):
            _encodable(each)
        elif isinstance(each, dict | list):
            if level > depth:
                raise NotJson(f"it is nested deeper than {depth}")
            count += len(each)
            if count > values:
                raise NotJson(f"it holds more than {values:,} values")
            if isinstance(each, dict):
                for name in each:
                    _encodable(name)
                waiting.extend((inner, level + 1) for inner in each.values())
            else:
                waiting.extend((inner, level + 1) for inner in each)
        elif isinstance(each, float):
            if not math.isfinite(each):
                raise NotJson("it holds a number that is none")
        elif not isinstance(each, int | None):
            raise NotJson("it holds what JSON has no form for")


def write(value: Json) -> bytes:
    """The same value as :func:`parse` gave it, as a text."""
    return json.dumps(value, ensure_ascii=False, allow_nan=False, separators=(",", ":")).encode("utf-8")


def _encodable(text: str) -> None:
    if not text.isascii():
        try:
            text.encode("utf-8")
        except UnicodeEncodeError:
            raise NotJson("it holds half of a surrogate pair") from None


def _unique(pairs: list[tuple[str, Json]]) -> dict[str, Json]:
    found = dict(pairs)
    if len(found) != len(pairs):
        raise NotJson("a name stands twice in one object")
    return found


def _constant(word: str) -> Json:
    raise NotJson(f"{word} is not a number")


def _integer(digits: str) -> int:
    if len(digits) > MAX_DIGITS:
        raise NotJson("it holds a number with too many digits")
    return int(digits)


def _float(digits: str) -> float:
    value = float(digits)
    if value in (float("inf"), float("-inf")) or len(digits) > MAX_DIGITS:
        raise NotJson("it holds a number that is too large")
    return value
