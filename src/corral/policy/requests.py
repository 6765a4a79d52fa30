"""Which rules name an HTTP request, by method and path.

Servers do not agree on what a path means: whether ``%2F`` is a ``/``, whether ``/a;x`` is ``/a``, what ``..`` leads to.
So a path has several readings. An allow names a request only if it names all of them, a deny or an ask if it names one,
also in other letters that servers take for the same: in the other case, in compatibility forms (Unicode's NFKC), with
spaces and dots at the end of a part. Where no list of readings would be complete, the path is unclear: only ``/**``
allows it, and every deny and ask of its method names it.

The path is without its query, as it stands in the request (RFC 9112, section 3.2.1) or decoded already (RFC 3986,
section 2.1); what is encoded twice is unclear. So a ``?`` in it was encoded, or its caller left the query there: both
are readings. Globs are compared with what is decoded, without a ``/`` at the end.
"""

from __future__ import annotations

import re
import unicodedata

from corral.actions import Request
from corral.policy.matching import Matcher, path_glob
from corral.policy.model import RequestRule

ANY_PATH = "/**"
_ENCODED = re.compile(rb"%([0-9A-Fa-f]{2})")
_SLASH = re.compile("%2[fF]")
_PERCENT = re.compile("%(?![0-9A-Fa-f]{2})")


def read_path(path: str) -> tuple[str, ...]:
    """What the path of a request may mean, each reading decoded; none where that is unclear.

    Unclear is what some servers resolve, refuse or decode once more: ``.`` and ``..``, empty parts, backslashes,
    control characters, bytes that are no UTF-8, and an encoded ``%``.
    """
    if not path.startswith("/") or "#" in path or _PERCENT.search(path):
        return ()
    try:
        whole = _decoded(path)
        # The slash that was encoded stays so, and stands for itself.
        kept = "%2F".join(_decoded(piece) for piece in _SLASH.split(path))
    except UnicodeError:
        return ()
    if "%" in whole:
        return ()
    readings = dict.fromkeys((whole, kept))
    for separator in "?;":
        readings |= dict.fromkeys(_without(separator, reading) for reading in tuple(readings))
    if not all(map(_is_clear, readings)):
        return ()
    return tuple(dict.fromkeys(reading if reading == "/" else reading.removesuffix("/") for reading in readings))


def _decoded(text: str) -> str:
    return _ENCODED.sub(lambda found: bytes((int(found[1], 16),)), text.encode("utf-8")).decode("utf-8")


def _without(separator: str, path: str) -> str:
    """Without the query, or without the parameters of each part (RFC 3986, section 3.3)."""
    if separator == "?":
        return path.partition("?")[0]
    return "/".join(part.partition(";")[0] for part in path.split("/")) if ";" in path else path


def _is_clear(path: str) -> bool:
    if "\\" in path or any(c < " " or c == "\x7f" for c in path):
        return False
    *parts, last = path[1:].split("/")
    return all(part not in ("", ".", "..") for part in parts) and last not in (".", "..")


def _folded(text: str) -> str:
    """The same for all spellings that some server takes for one."""
    # Folding can undo what normalising did, and the other way round: Unicode 16, D146.
    whole = unicodedata.normalize("NFKC", text.casefold()).casefold()
    return "/".join(part.rstrip(" .") for part in whole.split("/"))


class Requests:
    """The ``requests`` of one rule. ``certain``: they are what an allow needs, so they name a request in all its
    readings or not at all; else one reading is enough, in any spelling."""

    __slots__ = ("_certain", "_rules")

    def __init__(self, rules: tuple[RequestRule, ...], *, certain: bool) -> None:
        self._certain = certain
        self._rules = [
            (frozenset(rule.methods), rule.path == ANY_PATH, path_glob(rule.path))
            if certain
            else (frozenset(rule.methods), rule.path == ANY_PATH, _in_any_spelling(rule.path))
            for rule in rules
        ]

    def name(self, request: Request) -> bool:
        """Whether they name the request."""
        certain = self._certain
        readings = read_path(request.path)
        # RFC 9110, section 9.1: methods are told apart by their case, but not by all servers.
        method = request.method if certain else request.method.upper()
        globs = [(any_path, glob) for methods, any_path, glob in self._rules if not methods or method in methods]
        if not globs or any(any_path for any_path, _ in globs):
            return bool(globs)
        if not readings:
            return not certain
        named = [any(glob(reading) for _, glob in globs) for reading in readings]
        return all(named) if certain else any(named)


def _in_any_spelling(glob: str) -> Matcher:
    exact, folded = path_glob(glob), path_glob(_folded(glob))

    def names(path: str) -> object:
        if exact(path):
            return True
        other = _folded(path)
        if not _is_clear(other):  # a part of nothing but spaces is none to some
            return True
        return folded(other if other == "/" else other.removesuffix("/"))

    return names
