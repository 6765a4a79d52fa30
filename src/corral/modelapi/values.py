"""How much there is in JSON before it is read: Python takes time and memory for each value, however short it is, and
whoever waits for its parser waits until its end."""

from __future__ import annotations

import re

_BACKSLASH = ord("\\")
_SMALL = 256 * 1024
"""Bytes that a pattern looks through at once, and others wait for it."""
_TEXT = re.compile(rb'"[^"\\]*+(?:\\.[^"\\]*+)*+"?', re.DOTALL)
"""A text, or what comes after a quotation mark that has no other."""


def values_in(body: bytes, most: int) -> int:
    """How many values JSON has, at most: texts are told from them only where that matters, and what is beyond ``most``
    is not counted to its end."""
    if len(body) <= most:
        return len(body)
    if (count := _marks(body, 0, len(body))) <= most:
        return count
    if len(body) <= _SMALL:
        plain = _TEXT.sub(b"", body)
        return _marks(plain, 0, len(plain))
    count = at = 0
    while count <= most:
        text = body.find(b'"', at)
        count += _marks(body, at, len(body) if text < 0 else text)
        if text < 0:
            break
        at = _end_of_text(body, text + 1)
    return count


def _marks(body: bytes, start: int, end: int) -> int:
    return sum(body.count(each, start, end) for each in (b",", b"[", b"{"))


def _end_of_text(body: bytes, at: int) -> int:
    """Behind the quotation mark that ends the text which goes on at ``at``."""
    while (mark := body.find(b'"', at)) >= 0:
        first = mark
        while first > at and body[first - 1] == _BACKSLASH:
            first -= 1
        at = mark + 1
        if (mark - first) % 2 == 0:
            return at
    return len(body)
