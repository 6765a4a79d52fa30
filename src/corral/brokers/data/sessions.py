"""One connection to a source, and what is done on it: the same for all databases, but for what ``engine_*`` say.

All of this blocks. A session is used by one thread at a time (:mod:`corral.brokers.data.pool`), but for
:meth:`Session.cancel`. Whatever fails ends the transaction and the session, so that nothing of one query is there for
the next.
"""

from __future__ import annotations

import time
from abc import ABC, abstractmethod
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

from corral.brokers.data.faults import Fault, SourceFault, TooMuch
from corral.brokers.data.scope import Table
from corral.brokers.data.values import to_json
from corral.brokers.data.writing import PREVIEW
from corral.policy.model import Source

BATCH = 32
"""Rows that are fetched at a time, at most: each may be as large as the whole result may be."""


@dataclass(frozen=True, slots=True)
class Rows:
    """A result, or as much of it as may be sent."""

    columns: tuple[str, ...]
    rows: tuple[str, ...]
    """Each as a JSON list."""
    truncated: bool
    """There was more."""


@dataclass(frozen=True, slots=True)
class Changed:
    """What a statement has changed in a transaction that is still open."""

    affected: int
    before: Rows | None
    after: Rows | None
    """What was given back of the rows, as they are now; of a delete, as they were."""


@dataclass(frozen=True, slots=True)
class Change:
    """What is to be run for it: :class:`corral.brokers.data.writing.Write`, filled in."""

    word: str
    sql: str
    gives_back: bool
    before: str
    count: str


class Session(ABC):
    """One connection."""

    grace = 2.0
    """Seconds after the time of a query within which the database should have ended it by itself."""

    def __init__(self, source: Source) -> None:
        self._source = source
        self._limits = source.limits
        self.is_broken = False
        """It must not be used again."""
        self._is_cancelled = False
        self._deadline = 0.0

    # ---- what the databases say for themselves ----

    @abstractmethod
    def _begin(self, *, writes: bool) -> None:
        """Begins a transaction, in which nothing can be written if not ``writes``."""

    @abstractmethod
    def _run(self, sql: str) -> Any:
        """Executes one statement of ours; returns a cursor as PEP 249 has it."""

    @abstractmethod
    def _end(self, *, commit: bool) -> None:
        """Ends the transaction, if there is one."""

    @abstractmethod
    def _fault(self, error: Exception) -> Fault | None:
        """What an error of the library comes to; None for one that is not the library's."""

    @abstractmethod
    def cancel(self) -> None:
        """Has what runs end soon. From any thread."""

    @abstractmethod
    def close(self) -> None:
        """Ends the connection."""

    def _select(self, sql: str, count: int) -> Any:
        """Runs a query of which at most ``count`` rows are wanted."""
        return self._run(sql)

    def _cost(self, sql: str) -> float:
        """What the database estimates."""
        raise NotImplementedError

    def keys(self, table: Table) -> tuple[str, ...]:
        """The primary key of a table, where it must be known."""
        return ()

    def plain(self, tables: Iterable[Table]) -> frozenset[Table]:
        """Those of them that are tables: there, reading a column cannot fail, and a comparison is better made where the
        rows come from. A view computes what it shows."""
        return frozenset()

    # ---- the same for all ----

    @contextmanager
    def _guarded(self) -> Iterator[None]:
        """Whatever goes wrong is one of our errors, and breaks the session."""
        self._is_cancelled = False
        self._deadline = time.monotonic() + self._limits.time
        try:
            yield
        except TooMuch:
            self._abandon()
            raise
        except Exception as error:
            fault = error.fault if isinstance(error, SourceFault) else self._fault(error)
            if self._is_cancelled:
                fault = Fault.CANCELLED
            elif fault is not Fault.UNREACHABLE and time.monotonic() > self._deadline:
                fault = Fault.TIME
            self._abandon()
            raise SourceFault(fault or Fault.FAILED) from None

    def _abandon(self) -> None:
        try:
            self._end(commit=False)
        except Exception:
            self.is_broken = True

    def read(self, sql: str) -> Rows:
        """Runs a query in a transaction that cannot write. Raises SourceFault, TooMuch."""
        with self._guarded():
            self._begin(writes=False)
            self._check_cost(sql)
            cursor = self._select(sql, self._limits.rows + 1)
            rows = self._collect(cursor)
            self._end(commit=False)
        return rows

    def _check_cost(self, sql: str) -> None:
        if self._limits.cost is not None and not self._cost(sql) <= self._limits.cost:
            raise TooMuch("The source estimates that this costs more than it may: ask for less at a time.")

    def _collect(self, cursor: Any, *, most: int | None = None) -> Rows:
        columns = tuple(str(each[0]) for each in cursor.description or ())
        limit = self._limits.rows if most is None else most
        left = self._limits.bytes - sum(len(name) + 4 for name in columns)
        rows: list[str] = []
        while True:
            batch = cursor.fetchmany(min(BATCH, limit + 1 - len(rows)))
            if not batch:
                return Rows(columns, tuple(rows), False)
            for each in batch:
                row = to_json(tuple(each))
                left -= len(row.encode()) + 1
                if left < 0 or len(rows) == limit:
                    self._drop(cursor)
                    return Rows(columns, tuple(rows), True)
                rows.append(row)
            self._check_time()

    def _drop(self, cursor: Any) -> None:
        """Gives up the rest of a result."""
        cursor.close()

    def _check_time(self) -> None:
        if self._is_cancelled:
            raise SourceFault(Fault.CANCELLED)
        if time.monotonic() > self._deadline:
            raise SourceFault(Fault.TIME)

    def change(self, change: Change) -> Changed:
        """Changes something in a transaction that stays open. Raises SourceFault, TooMuch; nothing is changed then."""
        with self._guarded():
            self._begin(writes=True)
            self._check_cost(change.sql)
            before = self._collect(self._run(change.before), most=PREVIEW) if change.before else None
            there = self._number(change.count) if change.count else 0
            cursor = self._run(change.sql)
            after, affected = self._after(cursor, change)
            if affected > self._limits.rows:
                raise TooMuch(f"One statement changes at most {self._limits.rows:,} rows here; this changes more.")
            expected = there + (affected if change.word == "insert" else 0)
            if change.count and self._number(change.count) != expected:
                raise TooMuch(_OUTSIDE)
            self._check_time()
        return Changed(affected, before, after)

    def _after(self, cursor: Any, change: Change) -> tuple[Rows | None, int]:
        if not change.gives_back:
            return None, self._affected(cursor)
        columns = tuple(str(each[0]) for each in cursor.description or ())[1:]
        rows: list[str] = []
        affected, left, truncated = 0, self._limits.bytes, False
        while batch := cursor.fetchmany(BATCH):
            for holds, *row in batch:
                affected += 1
                if not holds and change.word != "delete":
                    raise TooMuch(_OUTSIDE)
                if affected > self._limits.rows:
                    return None, affected
                text = to_json(tuple(row))
                left -= len(text.encode()) + 1
                truncated = truncated or left < 0
                if not truncated:
                    rows.append(text)
            self._check_time()
        return Rows(columns, tuple(rows), truncated), affected

    def _affected(self, cursor: Any) -> int:
        return int(cursor.rowcount)

    def _number(self, sql: str) -> int:
        (number,) = self._run(sql).fetchone()
        return int(number)

    def finish(self, *, commit: bool) -> None:
        """Makes what :meth:`change` has changed so, or not. Raises SourceFault; then it is not known to be so."""
        with self._guarded():
            self._end(commit=commit)

    def expire(self) -> None:
        """Its time is over. From any thread."""
        self.is_broken = True
        self._deadline = 0.0
        self.cancel()


_OUTSIDE = "A row would not be within what may be seen here after this change."
