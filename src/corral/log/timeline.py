"""One session as it happened, on one time line: an item a record, in the order of the log.

A session may have millions of records, so only their numbers and times are kept (16 bytes each); an item is made of its
record when it is asked for. Entries are read a tile at a time, and the last few tiles are remembered.

Time is that of the clock that nobody sets, where that goes on; where it does not, because the machine was started
anew in between, it is the wall clock's. It never runs backwards, whatever a record says.
"""

from __future__ import annotations

import json
from array import array
from collections import OrderedDict
from collections.abc import Iterator, Sequence
from typing import Protocol, overload

from corral.errors import RequestError
from corral.log.items import Item, shown_line
from corral.log.narration import MICROSECONDS, item_of
from corral.log.records import Record, decode
from corral.log.tiles import WIDTH, LogDamaged

_KEPT = 4
"""Tiles that are remembered."""
_MAX_GAPS = 10_000
"""Gaps of which is told what is missing; all are counted."""
_MAX_NUMBER = 2**53
_ANOTHER_BOOT = MICROSECONDS
"""Microseconds by which the clock that nobody sets must have gone back to be another one: records of several threads
may be written in another order than they were timed."""


class Entries(Protocol):
    """A log that is read: :class:`corral.log.reader.Reader`."""

    def entries(self, start: int = 0, stop: int | None = None) -> Iterator[tuple[int, bytes]]:
        """Entries with their numbers."""


class Timeline(Sequence[Item]):
    """The items of a session. Reading one raises NoteError or LogDamaged where the log cannot be read any more."""

    def __init__(self, log: Entries, session: str) -> None:
        """Looks through the whole log once.

        Raises:
            RequestError: the log has no record of such a session.
            NoteError, LogDamaged: it cannot be read.
        """
        self._log = log
        self.session = session
        self.missing = 0
        """Records of the session that are not there; the items behind them say which."""
        self.unreadable = 0
        """Entries of the session that are no records that are known here."""
        self._numbers, self._offsets = array("Q"), array("d")
        self._gaps: dict[int, str] = {}
        self._tiles: OrderedDict[int, dict[int, bytes]] = OrderedDict()
        self._look_through()
        if not self._numbers:
            raise RequestError(f"the log has no record of a session {shown_line(session, 80)}")

    def _look_through(self) -> None:
        wanted = b'"correlation_uid":' + json.dumps(self.session, ensure_ascii=False).encode(errors="replace")
        last: Record | None = None
        offset = 0.0
        for number, entry in self._log.entries():
            if wanted not in entry:  # much faster than to parse it
                continue
            record = read_record(entry)
            if record is None:
                self.unreadable += 1
                continue
            if record.context.session != self.session:
                continue
            if last is not None:
                offset += _between(last, record)
            self._note_gap(last.sequence if last else 0, record.sequence)
            self._numbers.append(number)
            self._offsets.append(offset)
            last = record

    def _note_gap(self, before: int, sequence: int) -> None:
        if sequence <= before + 1:
            return
        self.missing += sequence - before - 1
        if len(self._gaps) < _MAX_GAPS:
            which = f"{before + 1} to {sequence - 1}" if sequence > before + 2 else str(before + 1)
            self._gaps[len(self._numbers)] = f"before it, of this session: {which}"

    def __len__(self) -> int:
        return len(self._numbers)

    @overload
    def __getitem__(self, position: int) -> Item: ...
    @overload
    def __getitem__(self, position: slice) -> list[Item]: ...
    def __getitem__(self, position: int | slice) -> Item | list[Item]:
        if isinstance(position, slice):
            return [self._item(each) for each in range(*position.indices(len(self)))]
        return self._item(range(len(self))[position])

    def _item(self, position: int) -> Item:
        number = self._numbers[position]
        record = self._record(number)
        return item_of(number, record, self._offsets[position], missing=self._gaps.get(position, ""))

    def _record(self, number: int) -> Record:
        tile = number // WIDTH
        entries = self._tiles.pop(tile, {})
        if number not in entries:
            entries = dict(self._log.entries(tile * WIDTH, (tile + 1) * WIDTH))
        self._tiles[tile] = entries
        if len(self._tiles) > _KEPT:
            self._tiles.popitem(last=False)
        record = read_record(entries[number]) if number in entries else None
        if record is None:
            raise LogDamaged(f"record {number} is not there any more, or is another one")
        return record

    def first_record(self) -> Record:
        """The session's first record, for who and where it was."""
        return self._record(self._numbers[0])


def _between(last: Record, record: Record) -> float:
    """Seconds from one record to the next, not below 0."""
    passed = record.monotonic - last.monotonic
    if passed < -_ANOTHER_BOOT:
        passed = record.at - last.at
    return max(0, passed) / MICROSECONDS


def read_record(entry: bytes) -> Record | None:
    """The record of an entry; None for one that :func:`~corral.log.records.encode` has not written. What is read here
    need not have been verified, so its numbers may be any."""
    try:
        record = decode(entry)
    except (ValueError, OverflowError, RecursionError):
        return None
    numbers = (record.at, record.monotonic, record.sequence)
    return record if all(0 <= number < _MAX_NUMBER for number in numbers) else None


def session_records(log: Entries, session: str | None = None) -> Iterator[tuple[int, Record]]:
    """The records of one session, or of all and of the log itself, with their numbers: for what-if and review.

    Entries that are no records that are known here are left out. Raises NoteError or LogDamaged.
    """
    for number, entry in log.entries():
        record = read_record(entry)
        if record is not None and (session is None or record.context.session == session):
            yield number, record
