"""What databases give, as JSON."""

from __future__ import annotations

import json
import math
from datetime import date, datetime, time, timedelta
from decimal import Decimal
from typing import Any
from uuid import UUID

_DEEPEST = 32


def to_json(row: tuple[Any, ...]) -> str:
    """A row as a JSON list. Exact numbers that JSON's readers would round (NUMERIC, DECIMAL) are texts, bytes are
    hexadecimal."""
    return json.dumps([_plain(value, 0) for value in row], ensure_ascii=False, separators=(",", ":"), allow_nan=False)


def _plain(value: Any, depth: int) -> Any:
    if value is None or isinstance(value, bool | int):
        return value
    if isinstance(value, str):
        # A lone surrogate is not UTF-8.
        return value if value.isascii() else value.encode("utf-8", "replace").decode()
    if isinstance(value, float):
        return value if math.isfinite(value) else str(value)
    if isinstance(value, Decimal | UUID):
        return str(value)
    if isinstance(value, datetime | date | time):
        return value.isoformat()
    if isinstance(value, timedelta):
        return value.total_seconds()
    if isinstance(value, bytes | bytearray | memoryview):
        return bytes(value).hex()
    if depth < _DEEPEST and isinstance(value, list | tuple):
        return [_plain(each, depth + 1) for each in value]
    if depth < _DEEPEST and isinstance(value, dict):
        return {str(name): _plain(each, depth + 1) for name, each in value.items()}
    return str(value)
