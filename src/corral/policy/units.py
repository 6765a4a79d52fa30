"""Quantities as people write them: ``"512MiB"`` is a number of bytes, ``"90s"`` a number of seconds.

Plain numbers are taken too. Everything else is a ValueError that says how to write it.
"""

from __future__ import annotations

import re
from dataclasses import dataclass
from fractions import Fraction

from corral.policy.document import quoted
from corral.policy.model import GIB, KIB, MIB

TIB = 1024 * GIB
_QUANTITY = re.compile(r"([0-9]{1,15}(?:\.[0-9]{1,15})?) ?([A-Za-z]+)")
_SIZES = {"kB": 1000, "MB": 1000**2, "GB": 1000**3, "KiB": KIB, "MiB": MIB, "GiB": GIB}
_DURATIONS = {"s": 1, "m": 60, "h": 3600, "d": 86400}
_YEAR = 366 * 24 * 3600
_NUMBER = r"[0-9]{1,15}(?:\.[0-9]{1,15})? ?"
SIZE = f"^{_NUMBER}(?:{'|'.join(_SIZES)})$"
"""What text can be a size, as a regular expression of JSON Schema (ECMA-262)."""
DURATION = f"^{_NUMBER}(?:{'|'.join(_DURATIONS)})$"
"""What text can be a duration."""


def _quantity(text: str, units: dict[str, int], example: str) -> Fraction:
    found = _QUANTITY.fullmatch(text)
    if not found or found[2] not in units:
        raise ValueError(f"{quoted(text)} is not understood (write for example {example}; units: {', '.join(units)})")
    return Fraction(found[1]) * units[found[2]]


@dataclass(frozen=True, slots=True)
class Size:
    """Reads a size into bytes, between two bounds."""

    low: int
    high: int

    def __call__(self, value: object) -> int:
        if isinstance(value, str):
            exact = _quantity(value, _SIZES, '"512MiB"')
            if exact.denominator != 1:
                raise ValueError(f"{quoted(value)} is not a whole number of bytes")
            size = int(exact)
        elif type(value) is int:
            size = value
        else:
            raise ValueError('must be a size (write for example "512MiB", or a whole number of bytes)')
        if size < self.low:
            hint = ' (is a unit missing, as in "4GiB"?)' if type(value) is int and size >= 0 else ""
            raise ValueError(f"must be at least {_human(self.low)}{hint}")
        if size > self.high:
            raise ValueError(f"must be at most {_human(self.high)}")
        return size


def _human(size: int) -> str:
    for name, unit in (("TiB", TIB), ("GiB", GIB), ("MiB", MIB), ("KiB", KIB)):
        if size >= unit and size % unit == 0:
            return f"{size // unit} {name}"
    return f"{size} bytes"


def read_duration(value: object) -> float:
    if isinstance(value, str):
        seconds = float(_quantity(value, _DURATIONS, '"90s", "2h" or "30d"'))
    elif type(value) in (int, float):
        seconds = float(value)  # type: ignore[arg-type]
    else:
        raise ValueError('must be a duration (write for example "90s", "15m", "2h", or a number of seconds)')
    if not 0.001 <= seconds <= _YEAR:
        raise ValueError(f"must be between 0.001 seconds and {_YEAR // 86400} days")
    return seconds
