"""An index of a log, in a database: made from the log, and from nothing else.

It holds no record, only where each is and what it is looked for by. Thrown away and made again it is the same. What it
says is as good as the log that it was made from: whoever must be sure verifies that (:mod:`corral.log.verify`).

The database is a file of SQLite, or whatever SQLAlchemy has a URL for (PostgreSQL, where several share it).
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import asdict
from itertools import islice
from pathlib import Path
from types import TracebackType
from typing import Any

from sqlalchemy import (
    BigInteger,
    Column,
    ColumnElement,
    Index,
    Integer,
    MetaData,
    Table,
    Text,
    and_,
    create_engine,
    event,
    insert,
    or_,
    select,
    true,
    update,
)
from sqlalchemy.engine import Connection
from sqlalchemy.exc import SQLAlchemyError

from corral.errors import CorralError
from corral.log.query import Filter
from corral.log.reader import Reader
from corral.log.records import Summary, summary
from corral.log.signing import read_keys

_VERSION = 3
_BATCH = 5000
_NUMBER = BigInteger().with_variant(Integer(), "sqlite")
_LIKE_ESCAPE = "\\"

_metadata = MetaData()
_records = Table(
    "records",
    _metadata,
    Column("number", _NUMBER, primary_key=True, autoincrement=False),
    *(Column(name, Text, nullable=False) for name in ("event", "session", "sandbox", "agent", "agent_version")),
    *(
        Column(name, BigInteger, nullable=False)
        for name in ("sequence", "at", "class_uid", "step", "exec", "count", "pid")
    ),
    *(Column(name, BigInteger, nullable=False) for name in ("unexplained", "opened")),
    *(Column(name, BigInteger, nullable=False) for name in ("input_tokens", "output_tokens", "cost")),
    *(Column(name, Text, nullable=False) for name in ("tool", "source", "model", "conversation", "currency")),
    *(Column(name, Text, nullable=False) for name in ("policy_hash", "action", "verdict", "rule", "decider")),
    *(Column(name, Text, nullable=False) for name in ("exe", "destination", "path", "by")),
    Index("records_session", "session", "number"),
    Index("records_at", "at"),
    Index("records_action", "action", "verdict", "number"),
    Index("records_destination", "destination", "number"),
    Index("records_tool", "tool", "number"),
)
_state = Table(
    "state",
    _metadata,
    Column("version", Integer, nullable=False),
    Column("log", Text, nullable=False),
    Column("next", BigInteger, nullable=False),
)


class IndexFault(CorralError):
    """An index cannot be read or written, or is not one of this log."""


class LogIndex:
    """The index of one log. Used by one thread at a time."""

    def __init__(self, where: str | Path) -> None:
        """``where`` is a file, or a database URL. Raises IndexFault where it cannot be opened."""
        url = f"sqlite:///{where}" if isinstance(where, Path) else where
        try:
            self._engine = create_engine(url)
            if self._engine.dialect.name == "sqlite":
                event.listen(self._engine, "connect", _heed_case)
            _metadata.create_all(self._engine)
        except (SQLAlchemyError, ImportError) as error:
            shown = url if url.startswith("sqlite:") else url.partition(":")[0]  # the rest may hold a password
            raise IndexFault(f"the index {shown} cannot be opened ({type(error).__name__})") from None

    def close(self) -> None:
        """Lets go of the database."""
        self._engine.dispose()

    def __enter__(self) -> LogIndex:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    # ---- making it ----

    def update(self, reader: Reader) -> int:
        """Takes up what the log has gained since, and returns how many records that are.

        Interrupted, it goes on after the last whole batch. Raises IndexFault where it is the index of another log, or
        of one that was longer once; LogDamaged, NoteError.
        """
        try:
            with self._engine.begin() as connection:
                start = self._start(connection, _name(reader))
            if start and next(reader.entries(start - 1, start), None) is None:
                raise IndexFault(f"the index has {start} records, and the log has fewer: it was cut off, or replaced")
            added = 0
            for rows in _batches(_rows(reader.entries(start))):
                with self._engine.begin() as connection:
                    connection.execute(insert(_records), rows)
                    connection.execute(update(_state).values(next=int(rows[-1]["number"]) + 1))
                added += len(rows)
            return added
        except SQLAlchemyError as error:
            raise _unwritable(error) from None

    def rebuild(self, reader: Reader) -> int:
        """Throws it away and makes it again. Raises as :meth:`update`."""
        try:
            _metadata.drop_all(self._engine)  # another version of Corral may have made other tables
            _metadata.create_all(self._engine)
        except SQLAlchemyError as error:
            raise _unwritable(error) from None
        return self.update(reader)

    @staticmethod
    def _start(connection: Connection, log: str) -> int:
        """The first number that it does not have."""
        known = connection.execute(select(_state)).first()
        if known is None:
            connection.execute(insert(_state).values(version=_VERSION, log=log, next=0))
            return 0
        if (known.version, known.log) != (_VERSION, log):
            raise IndexFault(
                "the index is one of another log, or of another version of Corral: make it again (--rebuild)"
            )
        return int(known.next)

    # ---- using it ----

    def find(self, wanted: Filter) -> Iterator[int]:
        """The numbers of the records that are wanted, in the order of the log. Raises IndexFault."""
        query = select(_records.c.number).where(and_(true(), *_conditions(wanted))).order_by(_records.c.number)
        if wanted.limit is not None:
            query = query.limit(wanted.limit)
        try:
            with self._engine.connect() as connection:
                for (number,) in connection.execution_options(yield_per=_BATCH).execute(query):
                    yield number
        except SQLAlchemyError as error:
            raise IndexFault(f"the index cannot be read ({type(error).__name__})") from None

    def rows(self) -> Iterator[tuple[int, Summary]]:
        """All that it holds, in the order of the log. Raises IndexFault."""
        try:
            with self._engine.connect() as connection:
                query = select(_records).order_by(_records.c.number)
                for row in connection.execution_options(yield_per=_BATCH).execute(query):
                    values = dict(row._mapping)
                    yield values.pop("number"), Summary(**values)
        except SQLAlchemyError as error:
            raise IndexFault(f"the index cannot be read ({type(error).__name__})") from None


def _heed_case(connection: Any, _: object) -> None:
    """LIKE is to heed upper and lower case, as it does elsewhere."""
    connection.execute("PRAGMA case_sensitive_like = ON")


def _unwritable(error: SQLAlchemyError) -> IndexFault:
    return IndexFault(f"the index cannot be written ({type(error).__name__})")


def _name(reader: Reader) -> str:
    """What a log is told apart by: its first key."""
    keys = read_keys(reader.directory)
    return str(keys[0]) if keys else ""


def _rows(entries: Iterable[tuple[int, bytes]]) -> Iterator[dict[str, str | int]]:
    for number, entry in entries:
        try:
            found = summary(entry)
        except (ValueError, RecursionError) as error:
            raise IndexFault(f"entry {number} is no record: {error}") from None
        # PostgreSQL keeps no NUL in a text.
        values = {
            name: each.replace("\0", "\ufffd") if isinstance(each, str) else each
            for name, each in asdict(found).items()
        }
        yield {"number": number, **values}


def _batches(rows: Iterator[dict[str, str | int]]) -> Iterator[list[dict[str, str | int]]]:
    while batch := list(islice(rows, _BATCH)):
        yield batch


def _conditions(wanted: Filter) -> Iterator[ColumnElement[bool]]:
    columns = _records.c
    for name, texts in wanted.texts:
        if name in Filter.PATTERNS:
            yield or_(*(_matches(columns[name], text) for text in texts))
        else:
            yield columns[name].in_(texts)
    for name, numbers in wanted.numbers:
        yield columns[name].in_(numbers)
    if wanted.since is not None:
        yield columns.at >= wanted.since
    if wanted.until is not None:
        yield columns.at < wanted.until
    if wanted.first is not None:
        yield columns.number >= wanted.first
    if wanted.last is not None:
        yield columns.number <= wanted.last


def _matches(column: Column[str], glob: str) -> ColumnElement[bool]:
    if "*" not in glob and "?" not in glob:
        return column == glob
    plain = glob.replace("\\", "\\\\").replace("%", "\\%").replace("_", "\\_")
    return column.like(plain.replace("*", "%").replace("?", "_"), escape=_LIKE_ESCAPE)
