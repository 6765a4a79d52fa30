"""A scanner for injected instructions: text in a tool's result that speaks to the model instead of being read by it.

It adds up the weights of signs (:mod:`.features`) that stand in one passage of the text, and finds something where they
reach 1. It looks also at what is hidden: behind invisible characters, letters that look like others, references of
HTML, percent signs and base64.

What it is worth is measured in docs/brokers.md ("The guard") over texts of our own. It is one simple scanner, and
whoever knows it can write what it does not find: it raises the price of an injection, and its findings are evidence. It
is no wall. What an injected agent may do is bounded by the sandbox and its policy, whatever it has read.

Time is in proportion to the length of the text. It works in pieces of some kilobytes, between which other threads run.
"""

from __future__ import annotations

import base64
import binascii
import html
import re
import time
import unicodedata
from collections.abc import Callable, Iterable, Iterator
from itertools import chain, islice
from urllib.parse import unquote

from corral.brokers.guard.features import ABOUT_ATTACKS, CONCEALED, FEATURES, RAW
from corral.brokers.guard.overrides import OVERRIDE
from corral.brokers.guard.scanners import Finding, ScanError, ToolResult
from corral.brokers.guard.signs import Feature

NAME = "instructions"
ENOUGH = 1.0
MAX_TEXT = 8 << 20
"""Characters; a longer text is not scanned, which is a failure."""
TIME = 8.0
"""Seconds; what takes longer is not scanned to its end, which is a failure. Its thread is free again then."""
_PIECE = 16_384
_OVERLAP = 1024
_PASSAGE = 700
"""Characters within which signs are added up."""
_MENTION = 200
"""Characters around a quoted phrase in which something says that it is an example."""
_MAX_BLOBS = 256
_MAX_BLOB = 16_384
_QUOTES = "\"'`“”‘’«»„"

_INVISIBLE = dict.fromkeys(
    chain(
        (0xAD, 0x34F, 0x115F, 0x180E, 0xFEFF),
        *(range(0x200B, 0x2010), range(0x202A, 0x202F), range(0x2060, 0x2070)),
        *(range(0xE0000, 0xE0080), range(0xFE00, 0xFE10), range(0xE0100, 0xE01F0)),
    )
)
_LIKE = "абвгдеѕіјкӏмнорԛгстуԝхуѵαβεηικνορτυχωɡɑ"
_LOOKALIKES = str.maketrans(_LIKE, "abbrdesijklmhopqrctywxyvabenikvoptuxwga")
_ZERO_WIDTH = re.compile(r"[\u200b\u2060\u2063\u2064]|(?<=[A-Za-z])[\u200c\u200d\ufeff\u00ad](?=[A-Za-z])")
_BIDI = re.compile("[\u202d\u202e\u2066-\u2068]")
_TAGS = re.compile("[\U000e0020-\U000e007e]{1,4096}+")
_FLAG = "\U0001f3f4"
_BLOB = re.compile(
    r"(?<![A-Za-z0-9+/=_-])[A-Za-z0-9+/_-]{32,}+={0,2}+(?:\r?\n[ \t]{0,8}+[A-Za-z0-9+/_-]{16,}+={0,2}+)*+"
)
_MIXED = re.compile(f"[a-z][{_LIKE}]|[{_LIKE}][a-z]")
_SPACES = re.compile(r"\s+")
_SPACED = re.compile(r"(?<!\w)(?:\w[ .\-_*]){6,64}+(?:\w(?!\w))?")
_NOT_WORD = re.compile(r"[ .\-_*]")

_QUOTABLE = frozenset(feature.pattern for feature in OVERRIDE)

_Hit = tuple[int, str, float]


class Instructions:
    """The scanner. It keeps nothing of a text; used from any thread."""

    def __init__(self, *, clock: Callable[[], float] = time.monotonic) -> None:
        self._clock = clock

    def scan(self, text: str, source: ToolResult) -> Finding | None:
        """Raises ScanError for a text that is longer than ``MAX_TEXT``, or takes longer than ``TIME``."""
        end = self._clock() + TIME
        if len(text) > MAX_TEXT:
            raise ScanError(f"the text has more than {MAX_TEXT:,} characters")
        best: tuple[float, int, list[str]] = (0.0, 0, [])
        for start, piece in _pieces(text):
            if self._clock() > end:
                raise ScanError(f"it took more than {TIME:g} seconds")
            best = max(best, _weigh(_hits(piece), start), key=lambda found: found[0])
        for start, inner in _blobs(text):
            score, _, what = _weigh(_hits(inner), 0)
            if score >= ENOUGH / 2:
                best = max(best, (score + 0.6, start, [*what, "is encoded in base64"]), key=lambda found: found[0])
        score, where, signs = best
        return Finding(NAME, "; ".join(signs), where, round(score, 2)) if score >= ENOUGH else None


def _pieces(text: str) -> Iterator[tuple[int, str]]:
    """The text in pieces that overlap, so that what stands at an end is whole in one of them."""
    for start in range(0, max(1, len(text) - _OVERLAP), _PIECE - _OVERLAP):
        yield start, text[start : start + _PIECE]


def _weigh(hits: Iterable[_Hit], start: int) -> tuple[float, int, list[str]]:
    """The largest sum of different signs within a passage, with where it is, and the signs."""
    ordered = sorted(hits)
    best: tuple[float, int, list[str]] = (0.0, start, [])
    first = 0
    inside: dict[str, list[float]] = {}
    for at, what, weight in ordered:
        inside.setdefault(what, []).append(weight)
        while ordered[first][0] < at - _PASSAGE:
            gone = inside[ordered[first][1]]
            gone.remove(ordered[first][2])
            if not gone:
                del inside[ordered[first][1]]
            first += 1
        score = sum(max(weights) for weights in inside.values())
        if score > best[0]:
            best = (score, start + ordered[first][0], list(inside))
    return best


_MOST_HITS = 256
"""Of one sign in one piece: more say nothing more, and adding them up would take longer."""


def _hits(piece: str) -> Iterator[_Hit]:
    yield from _hidden(piece)
    seen = piece if piece.isascii() else piece.translate(_INVISIBLE)
    for feature in RAW:
        yield from _found(feature, seen)
    plain = _plain(seen)
    yield from _all_found(plain)
    if not plain.isascii() and _MIXED.search(plain):
        yield from _all_found(plain.translate(_LOOKALIKES), "letters of another script stand for others", 0.4)
    if "&#" in piece or "&lt;" in piece:
        yield from _all_found(_plain(html.unescape(seen)), "is written as references of HTML", 0.2)
    if seen.count("%") > 8 and (unquoted := unquote(seen, errors="replace")) != seen:
        yield from _all_found(_plain(unquoted), "is written with percent signs", 0.2)
    if joined := " ".join(_NOT_WORD.sub("", match[0]) for match in _SPACED.finditer(plain)):
        squeezed = re.sub(
            r"(?:ignore|disregard|forget|all|previous|prior|instructions?|rules?|the|system|prompt)", r" \g<0> ", joined
        )
        yield from _all_found(_SPACES.sub(" ", squeezed), "its letters stand apart", 0.3)


_HYPHEN = re.compile(r"(?<=[a-z])-\r?\n[ \t]{0,8}+(?=[a-z])")


def _plain(text: str) -> str:
    text = _HYPHEN.sub("", text)
    if not text.isascii():
        text = unicodedata.normalize("NFKC", text)
    return " ".join(text.split()).casefold()


def _all_found(plain: str, how: str = "", weight: float = 0.0) -> Iterator[_Hit]:
    """The signs in a text as patterns want it; ``how`` is a sign of its own, where it is how these came out."""
    count = 0
    first = 0
    for feature in FEATURES:
        for hit in _found(feature, plain):
            if not count:
                first = hit[0]
            count += 1
            yield hit
    if count and how:
        yield first, how, weight
    if count:
        for match in islice(CONCEALED.finditer(plain), _MOST_HITS):
            yield match.start(), "stands where readers do not see it", 0.3


def _found(feature: Feature, text: str) -> Iterator[_Hit]:
    if not any(key in text for key in feature.keys):
        return
    for match in islice(feature.pattern.finditer(text), _MOST_HITS):
        weight = feature.weight
        if feature.pattern in _QUOTABLE and _is_example(text, match.start(), match.end()):
            weight = 0.3
        yield match.start(), feature.what, weight


def _is_example(text: str, start: int, end: int) -> bool:
    """Whether a phrase stands in quotation marks, in a text that says that it is about such phrases."""
    before, after = text[max(0, start - 40) : start], text[end : end + 80]
    if not any(mark in before for mark in _QUOTES) or not any(mark in after for mark in _QUOTES):
        return False
    around = text[max(0, start - _MENTION) : start] + " " + text[end : end + _MENTION]
    return ABOUT_ATTACKS.search(around) is not None


def _hidden(piece: str) -> Iterator[_Hit]:
    """Characters that are there to be read by a machine only."""
    if piece.isascii():
        return
    for match in islice(_TAGS.finditer(piece), _MOST_HITS):
        is_flag = piece[max(0, match.start() - 1) : match.start()] == _FLAG and len(match[0]) <= 8
        if len(match[0]) >= 4 and not is_flag:
            yield match.start(), "has text in invisible tag characters", 1.0
    count, first = 0, 0
    for match in islice(_ZERO_WIDTH.finditer(piece), _MOST_HITS):
        first = first or match.start()
        count += 1
    if count >= 4:
        yield first, "has invisible characters within words", 0.3 if count < 16 else 0.6
    for match in islice(_BIDI.finditer(piece), 1):
        yield match.start(), "turns the direction of its text", 0.3


def _blobs(text: str) -> Iterator[tuple[int, str]]:
    """What stands in base64, where that is text."""
    for match in islice(_BLOB.finditer(text), _MAX_BLOBS):
        blob = "".join(match[0][:_MAX_BLOB].split()).rstrip("=").replace("-", "+").replace("_", "/")
        blob = blob[: len(blob) - (len(blob) % 4 == 1)]
        try:
            inner = base64.b64decode(blob + "=" * (-len(blob) % 4)).decode()
        except (binascii.Error, ValueError):
            continue
        if inner.isprintable() or sum(map(str.isprintable, inner)) > 0.9 * len(inner):
            yield match.start(), inner
