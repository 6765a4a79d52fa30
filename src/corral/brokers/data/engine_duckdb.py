"""DuckDB.

It runs in our process, so it has no way to files, networks and extensions, and no settings that a query could change.
Its optimiser moves conditions through subqueries and orders them by what it has measured; only those of its steps are
left on that change neither where nor on which rows an expression is evaluated.
"""

from __future__ import annotations

from typing import Any

from corral.brokers.data.faults import Fault, NotThere, SourceFault
from corral.brokers.data.sessions import Session
from corral.policy.model import Source

try:
    import duckdb
except ImportError:
    raise NotThere("duckdb") from None

_OPTIMISERS = frozenset("unused_columns column_lifetime top_n".split())
"""What is left on. Whatever a newer version brings is off."""
_SETTINGS = (
    "SET temp_directory = ''",
    "SET enable_external_access = false",  # nor can the one before be changed after it
    "SET autoinstall_known_extensions = false",
    "SET autoload_known_extensions = false",
    "SET allow_community_extensions = false",
    "SET memory_limit = '512MB'",
    "SET threads = 2",
    "SET TimeZone = 'UTC'",
)


class Database:
    """One file. DuckDB opens a file once in a process, so all sessions of a source share this."""

    def __init__(self, source: Source, *, writes: bool) -> None:
        try:
            self.connection = duckdb.connect(source.url, read_only=not writes)
        except duckdb.Error:
            raise SourceFault(Fault.UNREACHABLE) from None
        try:
            for setting in _SETTINGS:
                try:
                    self.connection.execute(setting)
                except duckdb.CatalogException:
                    if "TimeZone" not in setting:  # which is an extension's
                        raise
            known = [name for (name,) in self.connection.execute("SELECT name FROM duckdb_optimizers()").fetchall()]
            off = ",".join(name for name in known if name not in _OPTIMISERS)
            self.connection.execute(f"SET disabled_optimizers = '{off}'")
            self.connection.execute("SET lock_configuration = true")
        except duckdb.Error:
            self.connection.close()
            raise SourceFault(Fault.UNREACHABLE) from None

    def close(self) -> None:
        """Ends all sessions."""
        self.connection.close()


class DuckdbSession(Session):
    """A connection of its own to the database."""

    grace = 0.0  # it has no clock

    def __init__(self, source: Source, database: Database, key: str) -> None:
        super().__init__(source)
        self._connection = database.connection.cursor()
        self._is_open = False
        if not key.isalnum():
            raise SourceFault(Fault.FAILED)
        self._connection.execute(f"SET VARIABLE corral_key = '{key}'")

    def _begin(self, *, writes: bool) -> None:
        self._connection.execute("BEGIN TRANSACTION" if writes else "BEGIN TRANSACTION READ ONLY")
        self._is_open = True

    def _run(self, sql: str) -> Any:
        return self._connection.execute(sql)

    def _drop(self, cursor: Any) -> None:
        pass  # it is the connection itself

    def _end(self, *, commit: bool) -> None:
        if self._is_open:
            self._is_open = False
            self._connection.execute("COMMIT" if commit else "ROLLBACK")

    def _fault(self, error: Exception) -> Fault | None:
        if isinstance(error, duckdb.InterruptException):
            return Fault.TIME
        if isinstance(error, duckdb.ConstraintException):
            return Fault.CONSTRAINT
        if isinstance(error, duckdb.ConversionException):
            return Fault.TYPE
        if isinstance(error, duckdb.OutOfRangeException | duckdb.OutOfMemoryException):
            return Fault.RANGE
        if isinstance(error, duckdb.TransactionException):
            return Fault.BUSY
        if isinstance(error, duckdb.PermissionException):
            return Fault.PRIVILEGE
        if isinstance(error, duckdb.ParserException | duckdb.BinderException | duckdb.CatalogException):
            return Fault.SYNTAX
        if isinstance(error, duckdb.FatalException | duckdb.IOException | duckdb.ConnectionException):
            self.is_broken = True
            return Fault.UNREACHABLE
        return Fault.FAILED if isinstance(error, duckdb.Error) else None

    def cancel(self) -> None:
        self._is_cancelled = self._deadline > 0
        self._connection.interrupt()

    def close(self) -> None:
        self._connection.close()
