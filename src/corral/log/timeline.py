"""One session as it happened, on one time line: an item a record, in the order of the log.

A session may have millions of records, so only their numbers and times are kept (16 bytes each); an item is made of its
record when it is asked for. Entries are read a tile at a time, and the last few tiles are remembered.

Time is that of the clock that nobody sets, where that goes on; where it does not, because the machine was started
anew in between, it is the wall clock's. It never runs backwards, whatever a record says.
"""

from __future__ import annotations

import json
import re
from array import array
from collections import OrderedDict
from collections.abc import Iterator, Sequence
from typing import Protocol, overload

from corral.errors import RequestError
from corral.log.items import Item, ItemKind, make_item, shown_line
from corral.log.narration import MICROSECONDS, item_of
from corral.log.records import Record, decode
from corral.log.tiles import WIDTH, LogDamaged

_KEPT = 4
"""Tiles that are remembered."""
_MAX_GAPS = 10_000
"""Gaps of which is told what is missing; all are counted."""
_MAX_NUMBER = 2**53
_FIELDS = (
    rb'[^}]*\}[^}]*"sequence":(\d{1,16}),.*"unmapped":\{"corral":\{"at":(\d{1,16}),.*"monotonic":(\d{1,16})\}\}\}\Z'
)
_MARKS = (b'"event":"exec.started"', b'"event":"log.payload_kept"', b'"event":"used"')
"""What stands in entries that tell when commands began, that something was kept, and what brokers were used for."""
_ANOTHER_BOOT = MICROSECONDS
"""Microseconds by which the clock that nobody sets must have gone back to be another one: records of several threads
may be written in another order than they were timed."""


class Entries(Protocol):
    """A log that is read: :class:`corral.log.reader.Reader`."""

    def entries(self, start: int = 0, stop: int | None = None) -> Iterator[tuple[int, bytes]]:
        """Entries with their numbers."""


class Marked(Protocol):
    """A time line, or one that says more of its items."""

    @property
    def offsets(self) -> array[float]:
        """Of each item, in seconds since the session began; never less than that of the item before."""

    def marked(self) -> Iterator[tuple[int, float, Record]]:
        """The records that tell of something that is to be looked for elsewhere."""

    def __len__(self) -> int: ...

    def __getitem__(self, position: int, /) -> Item: ...


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
        """Entries of the session that are no records, and not on the time line."""
        self._numbers = array("Q")
        self.offsets = array("d")
        """Of each item, in seconds since the session began; never less than that of the item before."""
        self._marked = array("Q")
        self._gaps: dict[int, str] = {}
        self._tiles: OrderedDict[int, dict[int, bytes]] = OrderedDict()
        self._look_through()
        if not self._numbers:
            raise RequestError(f"the log has no record of a session {shown_line(session, 80)}")

    def _look_through(self) -> None:
        """Looks at four fields by their place in canonical JSON: to parse every record would take ten times as long. A
        quotation mark within a text is escaped there, so no text of an agent can look like them."""
        wanted = session_mark(self.session)
        fields = re.compile(re.escape(b'"metadata":{' + wanted) + _FIELDS, re.DOTALL)
        offset, last = 0.0, (0, 0, 0)
        for number, entry in self._log.entries():
            if wanted not in entry:
                continue
            found = fields.search(entry)
            sequence, at, monotonic = map(int, found.groups()) if found else (-1, 0, 0)
            if found is None or max(at, monotonic, sequence) >= _MAX_NUMBER:
                self.unreadable += 1
                continue
            if self._numbers:
                offset += _between(last[1:], (at, monotonic))
            self._note_gap(last[0], sequence)
            if any(mark in entry for mark in _MARKS):
                self._marked.append(len(self._numbers))
            self._numbers.append(number)
            self.offsets.append(offset)
            last = sequence, at, monotonic

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
        number, offset = self._numbers[position], self.offsets[position]
        record = read_record(self._entry(number))
        if record is None:
            line = "this record cannot be read: it is none that is known here"
            return make_item(number, ItemKind.LIFECYCLE, 0.0, offset, line)
        return item_of(number, record, offset, missing=self._gaps.get(position, ""))

    def _entry(self, number: int) -> bytes:
        tile = number // WIDTH
        entries = self._tiles.pop(tile, {})
        if number not in entries:
            entries = dict(self._log.entries(tile * WIDTH, (tile + 1) * WIDTH))
        self._tiles[tile] = entries
        if len(self._tiles) > _KEPT:
            self._tiles.popitem(last=False)
        if number not in entries:
            raise LogDamaged(f"record {number} is not there any more")
        return entries[number]

    def marked(self) -> Iterator[tuple[int, float, Record]]:
        """The records of commands that began, of contents that were kept and of calls of brokers, with their numbers
        and offsets."""
        for position in self._marked:
            record = read_record(self._entry(self._numbers[position]))
            if record is not None:
                yield self._numbers[position], self.offsets[position], record

    def first_record(self) -> Record:
        """The session's first record that can be read, for who and where it was. Raises LogDamaged where none can."""
        for number in self._numbers:
            record = read_record(self._entry(number))
            if record is not None:
                return record
        raise LogDamaged(f"no record of the session {shown_line(self.session, 80)} can be read")


def _between(last: tuple[int, ...], now: tuple[int, ...]) -> float:
    """Seconds from one record to the next, not below 0. Both are times by the wall clock and by the other."""
    passed = now[1] - last[1]
    if passed < -_ANOTHER_BOOT:
        passed = now[0] - last[0]
    return max(0, passed) / MICROSECONDS


def session_mark(session: str) -> bytes:
    """What stands in every entry of a session."""
    return b'"correlation_uid":' + json.dumps(session, ensure_ascii=False).encode(errors="replace")


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
    wanted = b"" if session is None else session_mark(session)
    for number, entry in log.entries():
        record = read_record(entry) if wanted in entry else None  # much faster than to parse all
        if record is not None and (session is None or record.context.session == session):
            yield number, record
