"""PostgreSQL: psycopg 3."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterable
from typing import Any

from corral.brokers.data.addresses import Place, is_near
from corral.brokers.data.faults import Fault, NotThere, SourceFault, TooMuch
from corral.brokers.data.names import quote
from corral.brokers.data.scope import Table
from corral.brokers.data.sessions import BATCH, Session
from corral.brokers.data.sizes import within
from corral.policy.model import Dialect, Source

try:
    import psycopg
    from psycopg import errors
except ImportError:
    raise NotThere("psycopg") from None

_CONNECT_SECONDS = 10
_SETTINGS = {
    "client_encoding": "UTF8",
    "standard_conforming_strings": "on",
    "search_path": "pg_catalog, pg_temp",  # all tables are named in full, and no function of another schema is found
    "default_transaction_read_only": "on",
    "row_security": "on",
    "TimeZone": "UTC",
    "DateStyle": "ISO, YMD",
    "IntervalStyle": "iso_8601",
    "bytea_output": "hex",
    "jit": "off",
    "work_mem": "16MB",
    "max_parallel_workers_per_gather": "0",
    "xmlbinary": "base64",
}
_FAULTS: tuple[tuple[type[Exception], Fault], ...] = (
    (errors.QueryCanceled, Fault.TIME),
    (errors.DivisionByZero, Fault.DIVISION),
    (errors.CardinalityViolation, Fault.SUBQUERY),
    (errors.GroupingError, Fault.GROUPING),
    (errors.InsufficientPrivilege, Fault.PRIVILEGE),
    (errors.ReadOnlySqlTransaction, Fault.PRIVILEGE),
    (errors.UndefinedFunction, Fault.TYPE),
    (errors.DatatypeMismatch, Fault.TYPE),
    (errors.CannotCoerce, Fault.TYPE),
    (errors.InvalidTextRepresentation, Fault.TYPE),
    (errors.InvalidDatetimeFormat, Fault.TYPE),
    (errors.NumericValueOutOfRange, Fault.RANGE),
    (errors.DatetimeFieldOverflow, Fault.RANGE),
    (errors.LockNotAvailable, Fault.BUSY),
    (errors.DeadlockDetected, Fault.BUSY),
    (errors.SerializationFailure, Fault.BUSY),
    (errors.IntegrityError, Fault.CONSTRAINT),
    (errors.DataError, Fault.RANGE),
    (errors.ProgrammingError, Fault.SYNTAX),
    (errors.OperationalError, Fault.UNREACHABLE),
)


class PostgresqlSession(Session):
    """As the role of the source, which is none that rights do not bind."""

    def __init__(self, source: Source, password: str, key: str) -> None:
        super().__init__(source)
        self._beginning = ""
        place = Place.of(source.url)
        tls = {} if is_near(place.host) else {"sslmode": "verify-full", "sslrootcert": "system"}
        milliseconds = max(1, int(source.limits.time * 1000))
        try:
            self._connection = psycopg.connect(
                host=place.host,
                port=place.port,
                user=place.user,
                dbname=place.database,
                password=password,
                passfile="/dev/null",  # ours, or none
                connect_timeout=_CONNECT_SECONDS,
                application_name="corral",
                autocommit=True,
                prepare_threshold=None,
                **tls,  # type: ignore[arg-type]
            )
        except psycopg.Error:
            raise SourceFault(Fault.UNREACHABLE) from None
        try:
            if source.role:
                self._connection.execute(f"SET ROLE {quote(source.role, Dialect.POSTGRESQL)}".encode())
            settings = {
                **_SETTINGS,
                "statement_timeout": str(milliseconds),
                "lock_timeout": str(milliseconds),
                "idle_in_transaction_session_timeout": "3600000",  # a change waits for a person at most
                "corral.key": key,
            }
            for name, value in settings.items():
                self._connection.execute("SELECT pg_catalog.set_config(%s, %s, false)", (name, value))
            free = self._connection.execute(
                "SELECT rolsuper OR rolbypassrls FROM pg_catalog.pg_roles WHERE rolname = current_user"
            ).fetchone()
            if free is None or free[0]:
                raise SourceFault(Fault.PRIVILEGE)  # a role that no right binds is none for an agent
        except BaseException as error:
            self._connection.close()
            if isinstance(error, psycopg.Error):
                raise SourceFault(Fault.UNREACHABLE) from None
            raise

    def _begin(self, *, writes: bool) -> None:
        self._beginning = f"BEGIN ISOLATION LEVEL READ COMMITTED READ {'WRITE' if writes else 'ONLY'}; "

    def _run(self, sql: str) -> Any:
        """With the beginning of the transaction in the same message, which saves its way."""
        beginning, self._beginning = self._beginning, ""
        try:
            cursor = self._connection.execute((beginning + sql).encode())
        except errors.ArraySubscriptError:
            raise TooMuch("A row has more bytes than a result may have here.") from None
        while cursor.nextset():
            pass
        return cursor

    def _select(self, sql: str, count: int) -> Any:
        rows = f"(SELECT * FROM ({sql}) AS corral_result OFFSET 0) AS corral_rows"  # sizes are of rows that are made
        bounded = f"SELECT corral_rows.* FROM {rows} WHERE {within('corral_rows.*', self._limits.bytes)}"
        first = min(count, BATCH)
        cursor = self._run(
            f"DECLARE corral_cursor NO SCROLL CURSOR WITHOUT HOLD FOR {bounded};"
            f" FETCH FORWARD {first} FROM corral_cursor"
        )
        return _Portal(self._run, cursor, first)

    def _drop(self, cursor: Any) -> None:
        pass  # it goes with its transaction

    def _end(self, *, commit: bool) -> None:
        if self._beginning:
            self._beginning = ""
            return
        self._run("COMMIT" if commit else "ROLLBACK")

    def _cost(self, sql: str) -> float:
        row = self._run(f"EXPLAIN (FORMAT JSON) {sql}").fetchone()
        plan = row[0] if not isinstance(row[0], str) else json.loads(row[0])
        return float(plan[0]["Plan"]["Total Cost"])

    def plain(self, tables: Iterable[Table]) -> frozenset[Table]:
        with self._guarded():
            rows = self._run(
                "SELECT n.nspname, c.relname FROM pg_catalog.pg_class c JOIN pg_catalog.pg_namespace n"
                " ON n.oid = c.relnamespace WHERE c.relkind IN ('r', 'p', 'm') AND NOT EXISTS (SELECT 1 FROM"
                " pg_catalog.pg_attribute a WHERE a.attrelid = c.oid AND a.attgenerated = 'v')"
            ).fetchall()
        found = set(rows)
        return frozenset(table for table in tables if (table.schema, table.name) in found)

    def _fault(self, error: Exception) -> Fault | None:
        if self._connection.closed:
            self.is_broken = True
        return next((fault for kind, fault in _FAULTS if isinstance(error, kind)), None)

    def _abandon(self) -> None:
        super()._abandon()
        self.is_broken = self.is_broken or self._connection.closed

    def cancel(self) -> None:
        self._is_cancelled = self._deadline > 0
        try:
            self._connection.cancel_safe(timeout=5)
        except psycopg.Error:
            self.is_broken = True

    def close(self) -> None:
        self._connection.close()


class _Portal:
    """The cursor of a query, of which the first rows have come."""

    def __init__(self, run: Callable[[str], Any], cursor: Any, asked: int) -> None:
        self._run = run
        self.description = cursor.description
        self._rows: list[tuple[Any, ...]] = cursor.fetchall()
        self._is_over = len(self._rows) < asked

    def fetchmany(self, count: int) -> list[tuple[Any, ...]]:
        if not self._rows and not self._is_over:
            sql = f"FETCH FORWARD {count} FROM corral_cursor"
            self._rows = self._run(sql).fetchall()
            self._is_over = len(self._rows) < count
        found, self._rows = self._rows[:count], self._rows[count:]
        return found
