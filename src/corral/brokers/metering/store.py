"""The database of the meter: its tables, and how it is opened.

One file of SQLite for a user of this host (``usage.sqlite`` in a directory of its own, 0700), written by all of their
controllers at once and read by `corral usage` while they do. In WAL mode readers never wait, and writers wait for each
other for the length of a transaction, which is short. WAL needs shared memory: the directory is on a local file system.
A transaction is not synced to the disk by itself (``synchronous=NORMAL``): what a crash of the machine can lose are the
last moments, never the database. The log of a session is what is safe; this is the account that is quick to ask.
"""

from __future__ import annotations

import os
import stat
from contextlib import suppress
from pathlib import Path
from typing import Any

from sqlalchemy import (
    BigInteger,
    Column,
    Engine,
    Float,
    Index,
    Integer,
    MetaData,
    PrimaryKeyConstraint,
    Table,
    Text,
    create_engine,
    event,
    insert,
    select,
)
from sqlalchemy.exc import SQLAlchemyError

from corral.errors import CorralError

VERSION = 1
FILE = "usage.sqlite"
PATIENCE = 5.0
"""Seconds that a transaction waits for others."""
LARGEST = 10**15
"""Of any one number that is counted: an upstream may say what it likes, and SQLite's sums must not overflow."""
MAX_TEXT = 200
"""Characters of any one text: models are named by whoever asks for them."""

METADATA = MetaData()
_SUMS = (
    *(Column(name, BigInteger, nullable=False) for name in ("requests", "errors", "refused")),
    *(
        Column(name, BigInteger, nullable=False)
        for name in ("input_tokens", "output_tokens", "cached_tokens", "written_tokens")
    ),
    *(Column(name, BigInteger, nullable=False) for name in ("cost", "rows", "bytes_up", "bytes_down")),
    Column("seconds", Float, nullable=False),
    Column("estimated", BigInteger, nullable=False),
)
SUMS = tuple(column.name for column in _SUMS)
"""What is added up. ``requests`` is how many calls a row stands for; ``estimated`` how many of them are guesses."""
KEYS = ("agent", "agent_version", "kind", "source", "name", "currency")
"""What daily sums are told apart by."""

CALLS = Table(
    "calls",
    METADATA,
    Column("number", Integer, primary_key=True),
    Column("at", Float, nullable=False),  # seconds since the epoch, when it ended
    *(Column(name, Text, nullable=False) for name in ("session", "sandbox", *KEYS, "ending")),
    Column("step", BigInteger, nullable=False),
    Column("status", Integer, nullable=False),
    *(Column(column.name, column.type, nullable=False) for column in _SUMS),
    Index("calls_at", "at"),
    Index("calls_session", "session"),
)
DAYS = Table(
    "days",
    METADATA,
    Column("day", Integer, nullable=False),  # since the epoch, in UTC
    *(Column(name, Text, nullable=False) for name in KEYS),
    *(Column(column.name, column.type, nullable=False) for column in _SUMS),
    PrimaryKeyConstraint("day", *KEYS),
)
LOSSES = Table(
    "losses",
    METADATA,
    Column("at", Float, nullable=False),
    Column("calls", BigInteger, nullable=False),
)
SPENT = Table(
    "spent",
    METADATA,
    Column("agent", Text, nullable=False),
    Column("minute", BigInteger, nullable=False),  # since the epoch
    Column("currency", Text, nullable=False),
    *(Column(name, BigInteger, nullable=False) for name in ("tokens", "cost", "requests")),
    Column("seconds", Float, nullable=False),
    PrimaryKeyConstraint("agent", "minute", "currency"),
)
RESERVATIONS = Table(
    "reservations",
    METADATA,
    Column("number", Integer, primary_key=True),
    Column("agent", Text, nullable=False),
    Column("open", Integer, nullable=False),  # 1, or 0 once it is settled
    Column("at", Float, nullable=False),
    Column("process", Text, nullable=False),
    Column("currency", Text, nullable=False),
    *(Column(name, BigInteger, nullable=False) for name in ("tokens", "cost")),
    Index("reservations_open", "agent", "open", "at"),
    Index("reservations_at", "agent", "at"),
    sqlite_autoincrement=True,  # a number that was settled is never another's
)
STATE = Table("state", METADATA, Column("version", Integer, nullable=False), Column("folded", Integer, nullable=False))


class MeterFault(CorralError):
    """The meter's database cannot be opened, read or written, or is not this version's."""


def text(value: str) -> str:
    """A text as it can be kept: bounded, without NUL, and without halves of characters."""
    return value[:MAX_TEXT].encode(errors="replace").decode().replace("\0", "\ufffd")


def number(value: int) -> int:
    """A count as it can be kept and added up."""
    return min(max(0, value), LARGEST)


def open_database(directory: Path, *, make: bool = True) -> Engine:
    """The database in this directory, which is made where it is not there, unless ``make`` says no.

    Each transaction takes the one right to write from its beginning on, so that what it reads is still so when it
    writes. Raises MeterFault.
    """
    file = directory / FILE
    try:
        _make_private(directory, file, make=make)
        engine = _engine(file, "BEGIN IMMEDIATE" if make else "BEGIN")
    except OSError as error:
        raise MeterFault(f"{file}: {error.strerror}") from None
    try:
        if make:
            with engine.begin() as connection:
                METADATA.create_all(connection)
                if connection.execute(select(STATE.c.version)).first() is None:
                    connection.execute(insert(STATE).values(version=VERSION, folded=0))
        with engine.begin() as connection:
            found = connection.execute(select(STATE.c.version)).scalar()
    except SQLAlchemyError as error:
        engine.dispose()
        raise fault(file, error) from None
    if found != VERSION:
        engine.dispose()
        raise MeterFault(f"{file} is of another version of Corral; move it away, and a new one begins")
    return engine


def fault(file: Path | str, error: SQLAlchemyError) -> MeterFault:
    """What went wrong, without what was to be written."""
    cause = getattr(error, "orig", None)
    return MeterFault(f"{file} cannot be used ({cause if cause is not None else type(error).__name__})")


def _make_private(directory: Path, file: Path, *, make: bool) -> None:
    """Both are the caller's own, and nobody else's to read. SQLite makes its other files with the same mode."""
    if make:
        directory.mkdir(mode=0o700, parents=True, exist_ok=True)
    _check(directory, stat.S_ISDIR, 0o077)
    if make:
        with suppress(FileExistsError):
            os.close(os.open(file, os.O_CREAT | os.O_EXCL | os.O_WRONLY | os.O_CLOEXEC, 0o600))
    _check(file, stat.S_ISREG, 0o077)


def _check(path: Path, is_right: Any, others: int) -> None:
    status = path.lstat()
    if not is_right(status.st_mode) or status.st_uid != os.geteuid() or status.st_mode & others:
        raise MeterFault(f"{path} must belong to you, and nobody else may read or write it")


def _engine(file: Path, begin: str) -> Engine:
    engine = create_engine(f"sqlite:///{file}", connect_args={"timeout": PATIENCE}, pool_size=4, max_overflow=8)

    def connected(connection: Any, _: object) -> None:
        connection.isolation_level = None  # transactions begin where we say
        connection.execute("PRAGMA journal_mode = WAL")
        connection.execute("PRAGMA synchronous = NORMAL")

    event.listen(engine, "connect", connected)
    event.listen(engine, "begin", lambda connection: connection.exec_driver_sql(begin))
    return engine
