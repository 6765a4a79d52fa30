"""No expression of an agent is evaluated on a row outside the scope: which rows are touched is counted, not timed.

The filter of the rows is one that every optimiser would rather evaluate last, and what the agent compares is what each
would rather evaluate first. ``abs(id)`` stands for the agent's expression; it is replaced by a function that tells what
it was called with.
"""

from __future__ import annotations

import re
import sqlite3
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager
from dataclasses import replace
from pathlib import Path

import duckdb
import psycopg
import pytest

from corral.brokers.data.engine_duckdb import Database
from corral.brokers.data.reading import read
from corral.brokers.data.rewriting import compile_read
from corral.brokers.data.scope import Scope
from corral.brokers.data.writing import compile_write
from corral.policy.model import Column, Dialect, TableScope
from tests.unit import databases
from tests.unit.data_world import source_of, writable

_TABLES = (
    TableScope(
        "things",
        (Column("id"), Column("label"), Column("size")),
        rows="EXISTS (SELECT 1 FROM owners o WHERE o.tenant = things.tenant AND o.note LIKE '%a%b%c%')",
    ),
    TableScope("marks", (Column("id"), Column("thing"))),
)
_CREATE = """
CREATE TABLE owners (tenant INT, note VARCHAR(100));
CREATE TABLE things (id INT PRIMARY KEY, tenant INT, label VARCHAR(100), size INT);
CREATE TABLE marks (id INT PRIMARY KEY, thing INT);
CREATE INDEX things_size ON things (size)
"""
SEEN = frozenset(range(1, 21))
_ROWS = [(number, 1 if number in SEEN else 2, f"l{number}", number % 7) for number in range(1, 201)]
_MARKS = [(number, 1 + number % len(SEEN)) for number in range(200)]

READS = (
    "SELECT id FROM things WHERE abs(id) > 0",
    "SELECT abs(id) FROM things",
    "SELECT id FROM things ORDER BY abs(id)",
    "SELECT id FROM things WHERE size = 3 AND abs(id) > 0",
    "SELECT id FROM things WHERE size > 3 AND abs(id) > 0 ORDER BY size LIMIT 3",
    "SELECT id FROM things WHERE id BETWEEN 150 AND 160 AND abs(id) > 0",
    "SELECT id FROM things WHERE id IN (1, 150) AND abs(id) > 0",
    "SELECT count(*) FROM things GROUP BY abs(id)",
    "SELECT size FROM things GROUP BY size HAVING max(abs(id)) > 0",
    "SELECT DISTINCT abs(id) FROM things",
    "SELECT sum(abs(id)) FROM things",
    "SELECT m.id FROM marks m JOIN things t ON t.id = m.thing AND abs(t.id) > 0",
    "SELECT m.id FROM marks m LEFT JOIN things t ON t.id = m.thing AND abs(t.id) > 0",
    "SELECT m.id FROM marks m LEFT JOIN things t ON t.id = m.thing WHERE abs(t.id) > 0",
    "SELECT m.id FROM marks m JOIN things t ON abs(t.id) = m.thing WHERE t.size = 3",
    "SELECT m.id FROM marks m WHERE EXISTS (SELECT 1 FROM things t WHERE t.id = m.thing AND abs(t.id) > 0)",
    "SELECT m.id FROM marks m WHERE m.thing IN (SELECT abs(t.id) FROM things t)",
    "SELECT (SELECT max(abs(t.id)) FROM things t WHERE t.id = m.thing) AS x FROM marks m",
    "SELECT x FROM (SELECT id AS x FROM (SELECT * FROM things) a) b WHERE abs(x) > 0",
    "WITH w AS (SELECT id AS x FROM things) SELECT a.x FROM w a JOIN w b ON a.x = b.x WHERE abs(a.x) > 0",
    "SELECT id FROM things WHERE size = 3 UNION SELECT abs(id) FROM things",
    "SELECT id FROM things WHERE CASE WHEN label LIKE 'l%' THEN abs(id) ELSE 0 END > 0",
    "SELECT row_number() OVER (ORDER BY abs(id)) AS n FROM things",
    "SELECT a.id FROM things a, things b WHERE a.id = b.id AND abs(a.id) > 0 AND b.size > 2",
)
CHANGES = (
    "UPDATE things SET label = 'x' WHERE abs(id) > 0",
    "UPDATE things SET size = abs(id)",
    "UPDATE things SET size = abs(id) WHERE id IN (1, 150)",
    "UPDATE things SET size = 1 WHERE size = 3 AND abs(id) > 0",
    "DELETE FROM things WHERE abs(id) > 0",
    "DELETE FROM things WHERE id > 10 AND abs(id) > 0",
)

Touched = Callable[[str], set[int]]
"""Runs a statement, and undoes it; returns with what the function was called."""


@contextmanager
def _postgresql() -> Iterator[Touched]:
    with databases.postgresql() as server, psycopg.connect(databases.admin(server.port)) as connection:
        connection.execute(_CREATE.encode())
        connection.execute(b"INSERT INTO owners VALUES (1, 'abc')")
        with connection.cursor() as cursor:
            cursor.executemany(b"INSERT INTO things VALUES (%s, %s, %s, %s)", _ROWS)
            cursor.executemany(b"INSERT INTO marks VALUES (%s, %s)", _MARKS)
        connection.execute(
            b"CREATE FUNCTION public.touch(x int) RETURNS int LANGUAGE plpgsql IMMUTABLE LEAKPROOF COST 0.0001 AS"
            b" $$ BEGIN RAISE NOTICE '%', x; RETURN abs(x); END $$"
        )
        connection.commit()
        connection.execute(b"ANALYZE")
        connection.commit()
        told: set[int] = set()
        connection.add_notice_handler(lambda notice: told.add(int(notice.message_primary or "-1")))

        def touched(sql: str) -> set[int]:
            told.clear()
            connection.execute(sql.encode())
            connection.rollback()
            return set(told)

        yield touched


@contextmanager
def _mysql() -> Iterator[Touched]:
    with databases.mariadb() as server:
        connection = databases.maria_root(server.port)
        with connection.cursor() as cursor:
            cursor.execute("SET GLOBAL log_bin_trust_function_creators = 1")
            cursor.execute("CREATE DATABASE crm")
            cursor.execute("USE crm")
            for statement in _CREATE.split(";"):
                cursor.execute(statement)
            cursor.execute("INSERT INTO owners VALUES (1, 'abc')")
            cursor.executemany("INSERT INTO things VALUES (%s, %s, %s, %s)", _ROWS)
            cursor.executemany("INSERT INTO marks VALUES (%s, %s)", _MARKS)
            cursor.execute(
                "CREATE FUNCTION touch(x INT) RETURNS INT DETERMINISTIC BEGIN"
                " SET @told = CONCAT(@told, ' ', COALESCE(x, 0)); RETURN ABS(x); END"
            )

        def touched(sql: str) -> set[int]:
            with connection.cursor() as cursor:
                cursor.execute("SET @told = ''")
                cursor.execute("START TRANSACTION")
                cursor.execute(sql)
                cursor.fetchall()
                cursor.execute("SELECT @told")
                (told,) = cursor.fetchone()
                cursor.execute("ROLLBACK")
            return {int(number) for number in told.split()} - {0}

        yield touched
        connection.close()


@contextmanager
def _sqlite(path: Path) -> Iterator[Touched]:
    connection = sqlite3.connect(path / "x.db", isolation_level=None)
    connection.executescript(_CREATE)
    connection.execute("INSERT INTO owners VALUES (1, 'abc')")
    connection.executemany("INSERT INTO things VALUES (?, ?, ?, ?)", _ROWS)
    connection.executemany("INSERT INTO marks VALUES (?, ?)", _MARKS)
    connection.execute("ANALYZE")
    told: set[int] = set()

    def touch(number: int | None) -> int | None:
        if number is not None:
            told.add(number)
        return number

    connection.create_function("touch", 1, touch, deterministic=True)

    def touched(sql: str) -> set[int]:
        told.clear()
        connection.execute("BEGIN")
        connection.execute(sql).fetchall()
        connection.execute("ROLLBACK")
        return set(told)

    yield touched
    connection.close()


@contextmanager
def _duckdb(path: Path) -> Iterator[Touched]:
    with duckdb.connect(str(path / "x.duckdb")) as connection:
        connection.execute(_CREATE)
        connection.execute("INSERT INTO owners VALUES (1, 'abc')")
        connection.executemany("INSERT INTO things VALUES (?, ?, ?, ?)", _ROWS)
        connection.executemany("INSERT INTO marks VALUES (?, ?)", _MARKS)
    database = Database(source_of(Dialect.DUCKDB, str(path / "x.duckdb"), tables=_TABLES), writes=True)
    session = database.connection.cursor()

    def touched(sql: str) -> set[int]:
        session.execute("BEGIN")
        try:
            session.execute(sql).fetchall()
        except duckdb.InvalidInputException as error:  # the first that is touched and must not be
            return {int(number) for number in re.findall(r"touched ([0-9]+)", str(error))}
        finally:
            session.execute("ROLLBACK")
        return set()

    yield touched
    session.close()
    database.close()


@pytest.fixture(scope="module", params=list(Dialect), ids=lambda dialect: dialect.value)
def engine(
    request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory
) -> Iterator[tuple[Dialect, Touched]]:
    dialect: Dialect = request.param
    path = tmp_path_factory.mktemp(dialect.value)
    makers: dict[Dialect, Callable[[], AbstractContextManager[Touched]]] = {
        Dialect.POSTGRESQL: _postgresql,
        Dialect.MYSQL: _mysql,
        Dialect.SQLITE: lambda: _sqlite(path),
        Dialect.DUCKDB: lambda: _duckdb(path),
    }
    with makers[dialect]() as touched:
        yield dialect, touched


_DUCKDB_TOUCH = rf"(CASE WHEN \1 > {max(SEEN)} THEN CAST(error('touched ' || \1) AS INT) ELSE \1 END)"
"""Python functions would need numpy."""


def _with_touch(sql: str, dialect: Dialect) -> str:
    call = {Dialect.POSTGRESQL: r"public.touch(\1)", Dialect.DUCKDB: _DUCKDB_TOUCH}.get(dialect, r"touch(\1)")
    replaced, count = re.subn(r"\bABS\(([^()]+)\)", call, sql, flags=re.IGNORECASE)
    assert count == 1
    return replaced


def _scope(dialect: Dialect, tables: tuple[TableScope, ...]) -> Scope:
    scope = Scope(source_of(dialect, "", tables=tables))
    scope.plain = frozenset(scope.tables)  # comparisons are put into the fences, where that is done at all
    return scope


def test_the_function_tells(engine: tuple[Dialect, Touched]) -> None:
    """Else all that follows says nothing."""
    dialect, touched = engine
    sql = _with_touch("SELECT abs(id) FROM things WHERE id IN (150)", dialect)
    assert touched(sql) == {150}


def test_a_constant_that_is_put_for_a_column_says_nothing(engine: tuple[Dialect, Touched]) -> None:
    """Optimisers may write 150 for a column that must be 150, and evaluate that: whether there is such a row or not."""
    dialect, touched = engine
    scope = _scope(dialect, _TABLES)
    seen = []
    for number in (150, 9999):
        sql = compile_read(read(f"SELECT id FROM things WHERE id = {number} AND abs(id) > 0", dialect), scope)
        seen.append({each == number for each in touched(_with_touch(sql.query.fill({}), dialect))})
    assert seen[0] == seen[1]


@pytest.mark.parametrize("query", READS)
def test_queries_touch_rows_of_the_scope_only(engine: tuple[Dialect, Touched], query: str) -> None:
    dialect, touched = engine
    if dialect is Dialect.DUCKDB and "OVER" in query:
        return  # error() cannot stand there
    scope = _scope(dialect, _TABLES)
    sql = compile_read(read(query, dialect), scope).query.fill({})
    assert touched(_with_touch(sql, dialect)) <= SEEN


@pytest.mark.parametrize("query", CHANGES)
def test_changes_touch_rows_of_the_scope_only(engine: tuple[Dialect, Touched], query: str) -> None:
    dialect, touched = engine
    rows = "concat(label, label, tenant) LIKE '%l%l%1'" if dialect is Dialect.DUCKDB else _TABLES[0].rows
    scope = _scope(dialect, writable(replace(_TABLES[0], rows=rows), _TABLES[1]))
    sql = compile_write(read(query, dialect), scope, ("id",)).change.fill({})
    assert touched(_with_touch(sql, dialect)) <= SEEN
