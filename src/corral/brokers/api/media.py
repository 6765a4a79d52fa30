"""Media types, and what is known of each (RFC 9110, section 8.3)."""

from __future__ import annotations

import re

from corral.brokers.api.values import BodyKind, Media

_WORD = r"[a-z0-9!#$&^_.+-]{1,64}"
_TYPE = re.compile(rf"({_WORD})/({_WORD})")
_RANGE = re.compile(rf"(?:\*|{_WORD})/(?:\*|{_WORD})")
_CHARSET = re.compile(r"\s*;\s*charset=\"?utf-8\"?\s*", re.IGNORECASE)
FORM = "application/x-www-form-urlencoded"


def media_type(text: str, *, ranges: bool = False) -> str | None:
    """In its one form, without parameters; None for what is none, or has another parameter than ``charset=utf-8``."""
    name, semicolon, rest = text.partition(";")
    name = name.strip(" \t").lower()
    if semicolon and not _CHARSET.fullmatch(semicolon + rest):
        return None
    return name if (_RANGE if ranges else _TYPE).fullmatch(name) else None


def kind_of(type_: str) -> BodyKind | None:
    """None for what is not taken: a body of many parts has rules of its own for each of them."""
    if type_.startswith("multipart/") or type_.startswith("message/"):
        return None
    if type_ == "application/json" or type_.endswith("+json"):
        return BodyKind.JSON
    if type_ == FORM:
        return BodyKind.FORM
    return BodyKind.TEXT if type_.startswith("text/") else BodyKind.BYTES


def matching(media: tuple[Media, ...], type_: str) -> Media | None:
    """The one that a body of some type is for. One that names it goes before a range."""
    for each in media:
        if each.type == type_:
            return each
    kind = kind_of(type_)
    for wanted in (f"{type_.partition('/')[0]}/*", "*/*"):
        for each in media:
            # What is read in some way here is not let through as mere bytes there.
            if each.type == wanted and each.kind is kind:
                return each
    return None
