"""A time line with what commands wrote on it, between the records of what they did.

What was written lies beside the log (:mod:`corral.log.payloads`) as an asciicast, which has its moments from the start
of its command on. Pieces that came together are one item. Like every text of an agent's they are shown escaped: what
they did to a terminal, asciinema plays.
"""

from __future__ import annotations

import json
from array import array
from bisect import bisect_right
from collections.abc import Iterator, Sequence
from typing import Any, overload

from corral.actions import Content
from corral.log.events import ExecStarted, PayloadKept
from corral.log.items import Item, ItemKind, make_item
from corral.log.payload_keys import PayloadError
from corral.log.payloads import Payloads
from corral.log.timeline import Marked

TOGETHER = 0.25
"""Seconds; what is written within that of what came before is one item with it."""
MAX_PIECE = 4000
"""Characters of one item."""
MAX_PIECES = 50_000
"""Items of one session that say what was written."""


class WithTerminal(Sequence[Item]):
    """The items of a time line, and of what the session's commands wrote. Reading one raises as there."""

    def __init__(self, line: Marked, payloads: Payloads) -> None:
        """Raises NoteError or LogDamaged."""
        self._line = line
        self.unread = 0
        """Contents that are not here, were erased, or cannot be read."""
        self.is_whole = True
        """Whether there were not too many pieces."""
        pieces = sorted(self._pieces(payloads), key=lambda piece: piece.offset)
        self._pieces_of = pieces
        # Where each piece comes: behind all records that are not later.
        before = [bisect_right(line.offsets, piece.offset) for piece in pieces]
        self._at = array("Q", (place + number for number, place in enumerate(before)))

    def _pieces(self, payloads: Payloads) -> Iterator[Item]:
        began: dict[int, tuple[float, float]] = {}
        count = 0
        for number, offset, record in self._line.marked():
            event = record.event
            if isinstance(event, ExecStarted):
                began[event.exec] = (record.at / 1_000_000, offset)
            if not isinstance(event, PayloadKept) or event.content is not Content.TERMINAL:
                continue
            at, start = began.get(event.origin.exec, (record.at / 1_000_000, offset))
            try:
                written = list(_pieces(payloads.read(event.digest)))
            except (PayloadError, ValueError, TypeError, OverflowError):
                self.unread += 1
                continue
            for moment, text in written:
                count += 1
                if count > MAX_PIECES:
                    self.is_whole = False
                    return
                yield make_item(
                    number,
                    ItemKind.TERMINAL,
                    at + moment,
                    start + moment,
                    f"exec {event.origin.exec} wrote: {_first_line(text)}",
                    [("output", text)],
                    step=event.origin.step,
                )

    def __len__(self) -> int:
        return len(self._line) + len(self._pieces_of)

    @overload
    def __getitem__(self, position: int) -> Item: ...
    @overload
    def __getitem__(self, position: slice) -> list[Item]: ...
    def __getitem__(self, position: int | slice) -> Item | list[Item]:
        if isinstance(position, slice):
            return [self._item(each) for each in range(*position.indices(len(self)))]
        return self._item(range(len(self))[position])

    def _item(self, position: int) -> Item:
        before = bisect_right(self._at, position)
        if before and self._at[before - 1] == position:
            return self._pieces_of[before - 1]
        return self._line[position - before]


def _first_line(text: str) -> str:
    return next((line for line in text.splitlines() if line.strip()), "")


def _pieces(cast: bytes) -> Iterator[tuple[float, str]]:
    """What an asciicast says, and when. Raises ValueError where it is none."""
    header, *lines = cast.splitlines()
    if _parsed(header, dict).get("version") != 2:
        raise ValueError("it is no asciicast of version 2")
    moment, last, text = 0.0, 0.0, ""
    for line in lines:
        found = _parsed(line, list)
        if len(found) != 3 or found[1] != "o":
            continue
        at, said = float(found[0]), str(found[2])
        if not 0 <= at < 2**31:
            raise ValueError("its moments are none")
        if text and (at > last + TOGETHER or len(text) + len(said) > MAX_PIECE):
            yield moment, text
            text = ""
        if not text:
            moment = at
        while len(said) > MAX_PIECE:
            yield at, said[:MAX_PIECE]
            said = said[MAX_PIECE:]
        last, text = at, text + said
    if text:
        yield moment, text


def _parsed(line: bytes, kind: type[Any]) -> Any:
    try:
        found = json.loads(line)
    except RecursionError:
        found = None
    if not isinstance(found, kind):
        raise ValueError("it is no asciicast")
    return found
