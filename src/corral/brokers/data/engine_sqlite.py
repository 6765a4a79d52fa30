"""SQLite: the standard library's.

The database runs in our process, so it has walls of its own: an authorizer that knows the scope, limits, and no way to
another file.
"""

from __future__ import annotations

import hashlib
import hmac
import sqlite3
import time
from collections.abc import Iterable
from typing import Any
from urllib.parse import quote as percent

from corral.brokers.data.faults import Fault, SourceFault
from corral.brokers.data.scope import Scope, Table
from corral.brokers.data.sessions import Session
from corral.policy.model import Source

_STEPS = 2000
"""Instructions of its virtual machine between two looks at the clock."""
_LIMITS = {
    sqlite3.SQLITE_LIMIT_SQL_LENGTH: 1 << 20,
    sqlite3.SQLITE_LIMIT_EXPR_DEPTH: 500,
    sqlite3.SQLITE_LIMIT_COMPOUND_SELECT: 50,
    sqlite3.SQLITE_LIMIT_FUNCTION_ARG: 64,
    sqlite3.SQLITE_LIMIT_ATTACHED: 0,
    sqlite3.SQLITE_LIMIT_LIKE_PATTERN_LENGTH: 1000,
    sqlite3.SQLITE_LIMIT_VARIABLE_NUMBER: 0,
    sqlite3.SQLITE_LIMIT_TRIGGER_DEPTH: 16,
    sqlite3.SQLITE_LIMIT_WORKER_THREADS: 0,
}
_FUNCTIONS = frozenset(
    """
    abs avg ceil ceiling coalesce corral_hash count dense_rank first_value floor group_concat ifnull iif instr lag
    last_value lead length like lower ltrim max min nullif rank round row_number rtrim sign sqrt substr substring sum
    total trim upper concat current_date current_timestamp
    """.split()
)
_CHANGES = {
    sqlite3.SQLITE_INSERT: "insert",
    sqlite3.SQLITE_UPDATE: "update",
    sqlite3.SQLITE_DELETE: "delete",
}


class SqliteSession(Session):
    """One file. ``writes``: it may be written to, where a transaction says so."""

    def __init__(self, source: Source, scope: Scope, key: str, *, writes: bool) -> None:
        super().__init__(source)
        self._tables = {table.name.lower(): table for table in scope.tables}
        self._read_too = frozenset().union(*(table.beside.tables for table in scope.tables))
        self._functions = _FUNCTIONS.union(*(table.beside.functions for table in scope.tables))
        self._key = key.encode()
        self._writes = False
        mode = "rw" if writes else "ro"
        try:
            self._connection = sqlite3.connect(
                f"file:{percent(source.url)}?mode={mode}",
                uri=True,
                isolation_level=None,
                check_same_thread=False,
                timeout=source.limits.time,
                cached_statements=0,
            )
        except sqlite3.Error:
            raise SourceFault(Fault.UNREACHABLE) from None
        try:
            self._set_up(writes)
        except sqlite3.Error:
            self._connection.close()
            raise SourceFault(Fault.UNREACHABLE) from None

    def _set_up(self, writes: bool) -> None:
        connection = self._connection
        for limit, value in _LIMITS.items():
            connection.setlimit(limit, value)
        connection.setlimit(sqlite3.SQLITE_LIMIT_LENGTH, max(1 << 20, 4 * self._limits.bytes))
        connection.execute("PRAGMA trusted_schema = OFF")
        connection.execute("PRAGMA cell_size_check = ON")
        connection.execute(f"PRAGMA query_only = {'OFF' if writes else 'ON'}")
        schema = connection.execute("SELECT type, lower(name) FROM sqlite_schema").fetchall()
        self._within = frozenset(name for kind, name in schema if kind in ("view", "trigger"))
        self._plain = frozenset(name for kind, name in schema if kind == "table")
        connection.create_function("corral_hash", 1, self._hash, deterministic=True)
        connection.set_progress_handler(self._is_over, _STEPS)
        connection.set_authorizer(self._authorize)

    def _hash(self, value: object) -> str | None:
        if value is None:
            return None
        data = value if isinstance(value, bytes) else str(value).encode("utf-8", "surrogatepass")
        return hmac.new(self._key, data, hashlib.sha256).hexdigest()[:32]

    def _is_over(self) -> bool:
        return self._is_cancelled or time.monotonic() > self._deadline

    def _authorize(self, action: int, first: str | None, second: str | None, schema: str | None, by: str | None) -> int:
        """What has come through all else and is still not within the scope is refused here. ``by`` is the view or
        trigger within which it stands: those are the operator's. It may also be a common table expression, but those
        have names of ours."""
        is_operators = by is not None and by.lower() in self._within
        if action in (sqlite3.SQLITE_SELECT, sqlite3.SQLITE_TRANSACTION):
            return sqlite3.SQLITE_OK
        if action == sqlite3.SQLITE_FUNCTION:
            known = is_operators or (second or "").lower() in self._functions
            return sqlite3.SQLITE_OK if known else sqlite3.SQLITE_DENY
        name = (first or "").lower()
        if schema not in ("main", "temp", None) or name.startswith("sqlite_"):
            return sqlite3.SQLITE_DENY
        if action == sqlite3.SQLITE_READ:
            may = is_operators or self._may_read(name, second or "")
            return sqlite3.SQLITE_OK if may else sqlite3.SQLITE_DENY
        if action in _CHANGES and self._writes:
            table = self._tables.get(name)
            if is_operators or (table is not None and _CHANGES[action] in table.scope.statements):
                return sqlite3.SQLITE_OK
        return sqlite3.SQLITE_DENY

    def _may_read(self, name: str, column: str) -> bool:
        table = self._tables.get(name)
        if name in self._read_too:
            return True
        if table is None:
            return False
        wanted = column.lower()
        # The row's number is read where a column that is its alias is, and for changes; no query can name it.
        return wanted in ("", "rowid") or wanted in table.filtered or table.column(column) is not None

    def plain(self, tables: Iterable[Table]) -> frozenset[Table]:
        return frozenset(table for table in tables if table.name.lower() in self._plain)

    def _begin(self, *, writes: bool) -> None:
        self._writes = writes
        self._connection.execute("BEGIN IMMEDIATE" if writes else "BEGIN")

    def _run(self, sql: str) -> Any:
        return self._connection.execute(sql)

    def _end(self, *, commit: bool) -> None:
        self._deadline = max(self._deadline, time.monotonic() + 1)
        self._is_cancelled = False
        if self._connection.in_transaction:
            self._connection.execute("COMMIT" if commit else "ROLLBACK")
        self._writes = False

    def _fault(self, error: Exception) -> Fault | None:
        if isinstance(error, sqlite3.IntegrityError):
            return Fault.CONSTRAINT
        if not isinstance(error, sqlite3.Error):
            return None
        match getattr(error, "sqlite_errorcode", 0) & 0xFF:
            case sqlite3.SQLITE_INTERRUPT:
                return Fault.TIME
            case sqlite3.SQLITE_AUTH | sqlite3.SQLITE_READONLY | sqlite3.SQLITE_PERM:
                return Fault.PRIVILEGE
            case sqlite3.SQLITE_BUSY | sqlite3.SQLITE_LOCKED:
                return Fault.BUSY
            case sqlite3.SQLITE_TOOBIG:
                return Fault.RANGE
            case sqlite3.SQLITE_ERROR:
                return Fault.SYNTAX
            case sqlite3.SQLITE_CANTOPEN | sqlite3.SQLITE_NOTADB | sqlite3.SQLITE_CORRUPT | sqlite3.SQLITE_IOERR:
                self.is_broken = True
                return Fault.UNREACHABLE
        return Fault.FAILED

    def cancel(self) -> None:
        self._is_cancelled = self._deadline > 0
        try:
            self._connection.interrupt()
        except sqlite3.Error:  # it is closed
            self.is_broken = True

    def close(self) -> None:
        self._connection.close()
