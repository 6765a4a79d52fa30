"""Which API an answer is of, by how it begins: who kept a body need not have said."""

from __future__ import annotations

import re

from corral.modelapi.answer import Api

_LOOKED_AT = 64 * 1024
_FIRST = re.compile(rb"\A(?:\xef\xbb\xbf)?\s*(?:event: ?(?P<event>[\w.]{1,60})|data: ?(?P<data>\{[^\r\n]*)|\{)")
_TYPES = (
    (re.compile(rb'"type"\s*:\s*"response\.'), Api.RESPONSES),
    (re.compile(rb'"object"\s*:\s*"response"'), Api.RESPONSES),
    (re.compile(rb'"type"\s*:\s*"message_start"'), Api.MESSAGES),
    (re.compile(rb'"object"\s*:\s*"chat\.completion'), Api.CHAT),
    (re.compile(rb'"choices"\s*:'), Api.CHAT),
    (re.compile(rb'"type"\s*:\s*"(?:message|error)"'), Api.MESSAGES),
)
"""In JSON a quotation mark within a text is escaped, so no text looks like these."""


def recognise(body: bytes) -> Api | None:
    """The API; None where it looks like none that is known."""
    beginning = body[:_LOOKED_AT]
    found = _FIRST.match(beginning)
    if found is None:
        return Api.CHAT if b"\ndata:" in beginning or beginning.startswith(b":") else None
    if found["event"] is not None:
        return Api.RESPONSES if found["event"].startswith(b"response.") else Api.MESSAGES
    return next((api for pattern, api in _TYPES if pattern.search(found["data"] or beginning)), Api.CHAT)
