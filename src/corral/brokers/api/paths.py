"""Which operation a path means, and only one.

Servers do not agree on what a path means: whether ``%2F`` is a ``/``, whether ``/a;x`` is ``/a``, what ``..`` leads to,
whether ``/Mine`` is ``/mine``. So a path is decoded once, strictly, and what some server could read in another way is
refused. All paths of the document count, also those of operations that there are not: ``/tickets/mine`` is no ticket
where the document has that path for something else. What is sent is written anew, with all but letters, digits and
``-._~`` of an argument encoded (RFC 3986, section 2.3).
"""

from __future__ import annotations

import re
import unicodedata
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from urllib.parse import quote, unquote_to_bytes

MAX_PATH = 8 * 1024
"""Characters."""
MAX_SEGMENTS = 64
_BROKEN_ESCAPE = re.compile(r"%(?![0-9A-Fa-f]{2})")
_ESCAPE = re.compile(r"%[0-9A-Fa-f]{2}")
_CONTROL = re.compile(r"[\x00-\x1f\x7f-\x9f]")
_LITERAL = re.compile(r"[A-Za-z0-9._~!$&'()*+,;=:@-]*")
_PARTS = re.compile(r"([^{}]*)(?:\{([^{}]{1,128})\}([^{}]*))?")


class PathFault(ValueError):
    """A path, or a template, that is not taken. The message says why, in our own words."""


@dataclass(frozen=True, slots=True)
class Segment:
    """What stands between two slashes: a literal (``before``), or a parameter with literals around it."""

    before: str
    name: str | None = None
    after: str = ""

    @property
    def rank(self) -> int:
        """How little it says."""
        return 0 if self.name is None else 1 if self.before or self.after else 2

    def value(self, text: str) -> str | None:
        """The argument that a segment of a path gives, empty for a literal; None where it is another segment."""
        if self.name is None:
            return "" if text == self.before else None
        if len(text) <= len(self.before) + len(self.after):
            return None
        if not text.startswith(self.before) or not text.endswith(self.after):
            return None
        return text[len(self.before) : len(text) - len(self.after)]


@dataclass(frozen=True, slots=True)
class Template:
    """A path of a document."""

    text: str
    segments: tuple[Segment, ...]

    @property
    def names(self) -> tuple[str, ...]:
        """Of its parameters."""
        return tuple(segment.name for segment in self.segments if segment.name is not None)

    def arguments(self, path: Sequence[str]) -> dict[str, str] | None:
        """Those of a path, decoded; None where it is another path."""
        if len(path) != len(self.segments):
            return None
        found = {}
        for segment, text in zip(self.segments, path, strict=True):
            value = segment.value(text)
            if value is None:
                return None
            if segment.name is not None:
                found[segment.name] = value
        return found

    def is_at_least(self, other: Template) -> bool:
        """Whether it says as much as another one of the same length in each segment."""
        return all(ours.rank <= theirs.rank for ours, theirs in zip(self.segments, other.segments, strict=True))

    def written(self, arguments: Mapping[str, str]) -> str:
        """The path with these arguments. Raises PathFault for one that a path cannot carry."""
        parts = []
        for segment in self.segments:
            value = "" if segment.name is None else arguments[segment.name]
            if segment.name is not None:
                _check_segment(value)
                if not value:
                    raise PathFault("an argument in a path is not empty")
                _check_segment(f"{segment.before}{value}{segment.after}")
            parts.append(f"{segment.before}{quote(value, safe='')}{segment.after}")
        return "/" + "/".join(parts)


def template(text: str) -> Template:
    """Reads a path of a document. Raises PathFault."""
    if not text.startswith("/"):
        raise PathFault("it does not begin with a slash")
    parts = text[1:].split("/")
    if len(parts) > MAX_SEGMENTS or len(text) > MAX_PATH:
        raise PathFault("it is too long")
    segments = tuple(_segment(part, is_last=index == len(parts) - 1) for index, part in enumerate(parts))
    names = [segment.name for segment in segments if segment.name is not None]
    if len(set(names)) != len(names):
        raise PathFault("it has a parameter twice")
    return Template(text, segments)


def _segment(part: str, *, is_last: bool) -> Segment:
    found = _PARTS.fullmatch(part)
    if found is None:
        raise PathFault("it has two parameters in one segment, or braces that are none")
    before, name, after = found[1], found[2], found[3] or ""
    if not _LITERAL.fullmatch(before + after) or (name is None and before in (".", "..")):
        raise PathFault("it has characters that no path has as they are, or dot segments")
    if not part and not is_last:
        raise PathFault("it has an empty segment")
    return Segment(before, name, after)


def read_path(raw: str) -> tuple[str, ...]:
    """The segments of a path as it was sent, decoded. Raises PathFault."""
    if not raw.startswith("/") or len(raw) > MAX_PATH:
        raise PathFault(f"a path begins with a slash and has at most {MAX_PATH} characters")
    if _BROKEN_ESCAPE.search(raw):
        raise PathFault("the path holds a `%` that encodes nothing")
    if "#" in raw or "?" in raw:
        raise PathFault("the path holds a fragment")
    parts = raw[1:].split("/")
    if len(parts) > MAX_SEGMENTS:
        raise PathFault(f"the path has more than {MAX_SEGMENTS} segments")
    if "" in parts[:-1]:
        raise PathFault("the path has an empty segment")
    try:
        segments = tuple(unquote_to_bytes(part).decode("utf-8") for part in parts)
    except UnicodeDecodeError:
        raise PathFault("the path is not UTF-8") from None
    for segment in segments:
        _check_segment(segment)
    return segments


def _check_segment(segment: str) -> None:
    """Raises PathFault for a decoded segment that is more than one, or another, to some server."""
    if "/" in segment or "\\" in segment:
        raise PathFault("the path holds an encoded slash or a backslash")
    if _CONTROL.search(segment):
        raise PathFault("the path holds a control character")
    if _ESCAPE.search(segment):
        raise PathFault("the path is encoded twice")
    # `..;x` is `..` to servers that know path parameters, and spaces at the end are not there for others: what is left
    # of `;x` is nothing, and the path another.
    if segment and _folded(segment).strip() in ("", ".", ".."):
        raise PathFault("the path holds `.` or `..`, or a segment of nothing")
    if segment != unicodedata.normalize("NFC", segment):
        raise PathFault("the path holds characters that stand for others")


def _folded(text: str) -> str:
    """The same for all spellings that some server takes for one."""
    plain = unicodedata.normalize("NFKC", unicodedata.normalize("NFKC", text.partition(";")[0]).casefold())
    return plain.rstrip(" .")


class Paths:
    """All paths of one document."""

    def __init__(self, templates: Iterable[Template]) -> None:
        self._by_length: dict[int, list[tuple[Template, Template]]] = {}
        for each in templates:
            segments = (Segment(_folded(s.before), s.name, _folded(s.after)) for s in each.segments)
            self._by_length.setdefault(len(each.segments), []).append((each, Template(each.text, tuple(segments))))

    def find(self, path: Sequence[str]) -> tuple[Template, dict[str, str]] | None:
        """The one that a path means, with its arguments; None where there is none. What has no parameter there goes
        before what has one (OpenAPI, "Path Templating Matching"). Raises PathFault where it may mean several."""
        known = self._by_length.get(len(path), ())
        exact = [(each, found) for each, _ in known if (found := each.arguments(path)) is not None]
        best = [pair for pair in exact if all(pair[0].is_at_least(other) for other, _ in exact)]
        if not best:
            if exact:
                raise PathFault("the path may mean several operations")
            return None
        chosen, arguments = best[0]
        folded = [_folded(part) for part in path]
        for other, spelling in known:
            means = other is not chosen and spelling.arguments(folded) is not None
            if means and (len(best) > 1 or not _says_more(chosen, other)):
                raise PathFault(f"the path may also mean {other.text}, to servers that do not look closely")
        return chosen, arguments


def _says_more(chosen: Template, other: Template) -> bool:
    return chosen.is_at_least(other) and not other.is_at_least(chosen)
