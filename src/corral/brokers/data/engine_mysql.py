"""MySQL and MariaDB: PyMySQL."""

from __future__ import annotations

import json
import ssl
from typing import Any

from corral.brokers.data.addresses import Place, is_near
from corral.brokers.data.faults import Fault, NotThere, SourceFault, TooMuch
from corral.brokers.data.scope import Table
from corral.brokers.data.sessions import Session
from corral.policy.model import Source

try:
    import pymysql
    from pymysql.constants import CLIENT
    from pymysql.cursors import SSCursor
except ImportError:
    raise NotThere("PyMySQL") from None

_CONNECT_SECONDS = 10
_MODES = (
    "STRICT_ALL_TABLES,NO_BACKSLASH_ESCAPES,ONLY_FULL_GROUP_BY,ERROR_FOR_DIVISION_BY_ZERO,NO_ZERO_DATE,"
    "NO_ZERO_IN_DATE,NO_ENGINE_SUBSTITUTION"
)
_FAULTS = {
    **dict.fromkeys((1054, 1064, 1146, 1305, 1149, 1235, 1248, 4107), Fault.SYNTAX),
    **dict.fromkeys((1055, 1056, 1111, 1140), Fault.GROUPING),
    **dict.fromkeys((1044, 1045, 1142, 1143, 1227, 1290, 1370, 1792), Fault.PRIVILEGE),
    **dict.fromkeys((1205, 1213, 1020), Fault.BUSY),
    **dict.fromkeys((1317, 1969, 3024), Fault.TIME),
    **dict.fromkeys((1264, 1690, 1406), Fault.RANGE),
    **dict.fromkeys((1292, 1366, 1411, 1367), Fault.TYPE),
    1242: Fault.SUBQUERY,
    1241: Fault.TYPE,
    1365: Fault.DIVISION,
    **dict.fromkeys((1048, 1062, 1216, 1217, 1364, 1451, 1452, 3819, 4025), Fault.CONSTRAINT),
    **dict.fromkeys((2002, 2003, 2006, 2013, 2014, 2055), Fault.UNREACHABLE),
}


class MysqlSession(Session):
    """As the user of the source."""

    def __init__(self, source: Source, password: str, key: str) -> None:
        super().__init__(source)
        self._place = Place.of(source.url)
        self._password = password
        try:
            self._connection = self._connect()
        except (pymysql.Error, OSError):
            raise SourceFault(Fault.UNREACHABLE) from None
        try:
            self._set_up(key)
        except pymysql.Error:
            self.close()
            raise SourceFault(Fault.UNREACHABLE) from None

    def __repr__(self) -> str:
        return f"MysqlSession({self._source.name!r})"

    def _connect(self) -> Any:
        seconds = self._limits.time + 5
        return pymysql.connect(
            host=self._place.host,
            port=self._place.port,
            user=self._place.user,
            password=self._password,
            database=self._place.database,
            charset="utf8mb4",
            autocommit=True,
            local_infile=False,
            client_flag=CLIENT.FOUND_ROWS,
            connect_timeout=_CONNECT_SECONDS,
            read_timeout=seconds,
            write_timeout=seconds,
            ssl=None if is_near(self._place.host) else ssl.create_default_context(),
        )

    def _set_up(self, key: str) -> None:
        with self._connection.cursor() as cursor:
            cursor.execute("SELECT VERSION()")
            is_mariadb = "mariadb" in str(cursor.fetchone()[0]).lower()
            seconds = max(1, round(self._limits.time))
            cursor.execute("SET SESSION sql_mode = %s, time_zone = '+00:00'", (_MODES,))
            if is_mariadb:
                cursor.execute(f"SET SESSION max_statement_time = {self._limits.time}")
            else:
                cursor.execute(f"SET SESSION max_execution_time = {int(self._limits.time * 1000)}")
            cursor.execute(f"SET SESSION lock_wait_timeout = {seconds}, innodb_lock_wait_timeout = {seconds}")
            cursor.execute("SET @corral_key = %s", (key,))

    def _begin(self, *, writes: bool) -> None:
        # What is counted before and after a change must be counted over the same rows, those that are changed.
        self._run(f"SET TRANSACTION ISOLATION LEVEL {'SERIALIZABLE' if writes else 'REPEATABLE READ'}")
        self._run(f"START TRANSACTION READ {'WRITE' if writes else 'ONLY'}")

    def _run(self, sql: str) -> Any:
        cursor = self._connection.cursor()
        cursor.execute(sql)
        return cursor

    def _select(self, sql: str, count: int) -> Any:
        cursor = self._connection.cursor(SSCursor)
        cursor.execute(sql)
        return cursor

    def _drop(self, cursor: Any) -> None:
        # The protocol has no way to leave out the rest of a result but to read it, or to end the connection.
        self.is_broken = True
        self._connection._force_close()
        cursor._result.unbuffered_active = False  # else it reads on when it is collected
        cursor.connection = None

    def _end(self, *, commit: bool) -> None:
        if not self._connection.open:
            if commit:
                raise SourceFault(Fault.UNREACHABLE)
            return
        if commit:
            self._connection.commit()
        else:
            self._connection.rollback()

    def _cost(self, sql: str) -> float:
        (text,) = self._run(f"EXPLAIN FORMAT=JSON {sql}").fetchone()
        costs = list(_costs(json.loads(text)))
        if not costs:  # MariaDB before 11
            raise TooMuch("This source does not say what a query costs, and there is a bound for that: nothing is run.")
        return float(max(costs))

    def keys(self, table: Table) -> tuple[str, ...]:
        with self._guarded():
            cursor = self._connection.cursor()
            cursor.execute(
                "SELECT column_name FROM information_schema.key_column_usage WHERE constraint_name = 'PRIMARY'"
                " AND table_schema = %s AND table_name = %s ORDER BY ordinal_position",
                (table.schema or self._place.database, table.name),
            )
            return tuple(str(name) for (name,) in cursor.fetchall())

    def _fault(self, error: Exception) -> Fault | None:
        if not isinstance(error, pymysql.Error | OSError):
            return None
        number = error.args[0] if error.args and isinstance(error.args[0], int) else 0
        fault = _FAULTS.get(number, Fault.FAILED)
        if fault is Fault.UNREACHABLE or isinstance(error, pymysql.InterfaceError | OSError):
            self.is_broken = True
        return fault

    def cancel(self) -> None:
        self._is_cancelled = self._deadline > 0
        self.is_broken = True
        try:
            other = self._connect()
        except (pymysql.Error, OSError):
            return
        try:
            with other.cursor() as cursor:
                cursor.execute(f"KILL QUERY {int(self._connection.thread_id())}")
        except pymysql.Error:
            return  # it has ended meanwhile
        finally:
            other.close()

    def close(self) -> None:
        if self._connection.open:
            self._connection._force_close()


def _costs(node: object) -> Any:
    """All totals in a plan."""
    if isinstance(node, dict):
        for name, value in node.items():
            if name in ("query_cost", "cost", "prefix_cost", "r_total_cost") and isinstance(value, str | int | float):
                yield float(value)
            else:
                yield from _costs(value)
    elif isinstance(node, list):
        for value in node:
            yield from _costs(value)
