"""How large a row may be that PostgreSQL gives.

libpq has a row in memory as a whole, and one value may have 1 GB. So the server looks at the size of each row before it
sends it, and fails where that is too large, with an error that no query can have by itself.
"""

from __future__ import annotations

_MORE = 8192
"""Bytes of a row in the server that are not sent as they are: its head, numbers."""


def within(row: str, most: int) -> str:
    """A condition that is true, and fails (array_subscript_error) where a row has more than ``most`` bytes."""
    size = f"pg_catalog.pg_column_size({row})"
    return f"(CASE WHEN {size} > {most + _MORE} THEN pg_catalog.set_byte('', {size}, 0) IS NULL ELSE TRUE END)"
