"""What signs of injected instructions are made of. See :mod:`.features`."""

from __future__ import annotations

import re
from dataclasses import dataclass


@dataclass(frozen=True, slots=True)
class Feature:
    """One sign."""

    what: str
    """In words, as a finding says it."""
    weight: float
    keys: tuple[str, ...]
    pattern: re.Pattern[str]


def gap(most: int) -> str:
    """Up to so many words between two others."""
    return rf"(?:\W{{1,4}}+\w{{1,20}}+){{0,{most}}}?\W{{1,4}}"


def make(what: str, weight: float, keys: str, pattern: str) -> Feature:
    """``keys`` are divided by ``|``."""
    return Feature(what, weight, tuple(keys.split("|")), re.compile(pattern))
