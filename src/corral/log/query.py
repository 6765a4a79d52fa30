"""What records are looked for, as words: ``verdict=deny action=net.* since=2h``.

All words must hold; of one name that is given more than once, one value must. Values of some names are globs: ``*`` is
any text, ``?`` one character.
"""

from __future__ import annotations

import re
import time
from collections.abc import Sequence
from dataclasses import dataclass
from datetime import datetime
from fnmatch import fnmatchcase
from typing import ClassVar

from corral.errors import RequestError
from corral.log.records import Summary
from corral.policy.document import quoted

MAX_WORDS = 100
MAX_VALUE = 4096
"""Characters of one value."""
_UNITS = {"s": 1, "m": 60, "h": 3600, "d": 86_400, "w": 604_800}
_AGO = re.compile(r"(\d{1,9}(?:\.\d{1,3})?)([smhdw])")
_MICRO = 1_000_000


@dataclass(frozen=True, slots=True)
class Filter:
    """Which records are wanted. The default is all of them."""

    PATTERNS: ClassVar[frozenset[str]] = frozenset(
        {"action", "agent", "by", "destination", "exe", "model", "path", "rule", "source"}
    )
    """Names whose values are globs."""
    TEXTS: ClassVar[frozenset[str]] = PATTERNS | {
        "agent_version",
        "conversation",
        "decider",
        "event",
        "policy_hash",
        "sandbox",
        "session",
        "tool",
        "verdict",
    }
    NUMBERS: ClassVar[frozenset[str]] = frozenset({"class_uid", "exec", "opened", "pid", "step", "unexplained"})

    texts: tuple[tuple[str, tuple[str, ...]], ...] = ()
    """Names with the values that they may have."""
    numbers: tuple[tuple[str, tuple[int, ...]], ...] = ()
    since: int | None = None
    """Microseconds since the epoch: from this time on."""
    until: int | None = None
    """Up to this time, and not at it."""
    first: int | None = None
    """The number of the first record in the log that may be wanted."""
    last: int | None = None
    limit: int | None = None
    """So many records at most."""

    def matches(self, number: int, found: Summary) -> bool:
        """Whether a record is wanted, the limit left out."""
        return (
            (self.first is None or number >= self.first)
            and (self.last is None or number <= self.last)
            and (self.since is None or found.at >= self.since)
            and (self.until is None or found.at < self.until)
            and all(getattr(found, name) in values for name, values in self.numbers)
            and all(self._says(name, values, getattr(found, name)) for name, values in self.texts)
        )

    def _says(self, name: str, values: tuple[str, ...], text: str) -> bool:
        if name in self.PATTERNS:
            return any(fnmatchcase(text, escaped_brackets(value)) for value in values)
        return text in values


def escaped_brackets(glob: str) -> str:
    """The glob for those to whom brackets mean something; here they mean themselves."""
    return glob.replace("[", "[[]")


def parse_filter(words: Sequence[str], *, now: float | None = None) -> Filter:
    """The filter that words say. Raises RequestError for words that say nothing known."""
    if len(words) > MAX_WORDS:
        raise RequestError(f"more than {MAX_WORDS} words")
    texts: dict[str, list[str]] = {}
    numbers: dict[str, list[int]] = {}
    bounds: dict[str, int] = {}
    for word in words:
        name, equals, value = word.partition("=")
        if not equals or len(value) > MAX_VALUE:
            raise RequestError(f"{quoted(word)} is not NAME=VALUE, such as verdict=deny")
        if name in Filter.TEXTS:
            texts.setdefault(name, []).append(value)
        elif name in Filter.NUMBERS:
            numbers.setdefault(name, []).append(_number(name, value))
        elif name in ("since", "until"):
            bounds[name] = round(parse_time(value, time.time() if now is None else now) * _MICRO)
        elif name in ("first", "last", "limit"):
            bounds[name] = _number(name, value)
        else:
            known = sorted(Filter.TEXTS | Filter.NUMBERS | {"since", "until", "first", "last", "limit"})
            raise RequestError(f"{quoted(name)} is no name of a field; known: {', '.join(known)}")
    return Filter(
        tuple((name, tuple(values)) for name, values in texts.items()),
        tuple((name, tuple(values)) for name, values in numbers.items()),
        **bounds,
    )


def _number(name: str, text: str) -> int:
    if not (text.isascii() and text.isdigit()) or len(text) > 18:
        raise RequestError(f"{name}={quoted(text)} is no number")
    return int(text)


def parse_time(text: str, now: float) -> float:
    """A time in seconds since the epoch: ``7d`` before ``now`` (s, m, h, d, w), or as ISO 8601. Raises RequestError."""
    ago = _AGO.fullmatch(text)
    if ago:
        return now - float(ago[1]) * _UNITS[ago[2]]
    try:
        return datetime.fromisoformat(text).timestamp()
    except (ValueError, OverflowError, OSError):
        raise RequestError(f"{quoted(text)} is no time: write 7d, 12h, or 2026-01-31T08:00") from None
