"""Changes made at random: whatever is accepted, rows outside the scope are as they were, and no row gets there."""

from __future__ import annotations

import random
import re
import sqlite3
from collections.abc import Callable, Iterator
from contextlib import closing
from pathlib import Path
from typing import Any

import psycopg
import pytest

from corral.policy.model import DataLimits, Dialect
from tests.unit import databases
from tests.unit.data_world import TABLES, World, make_postgresql, make_sqlite, source_of, writable

_CHANGES = (
    "UPDATE customers SET name = note, balance = balance + divisor * 2 WHERE id IN (1, 4) OR name LIKE 'H%'",
    "UPDATE customers AS c SET balance = c.id WHERE c.id = (SELECT max(customer_id) FROM orders) AND c.note <> ''",
    "UPDATE orders SET status = CASE WHEN id = 10 THEN 'x' ELSE 'paid' END",
    "UPDATE orders SET customer_id = 4, total = total * -1 WHERE EXISTS (SELECT 1 FROM customers c WHERE c.id > 2)",
    "UPDATE customers SET id = id + 1000 WHERE NOT (id = 1)",
    "DELETE FROM customers WHERE id > 0",
    "DELETE FROM orders WHERE customer_id IN (SELECT id FROM customers WHERE balance < 200) RETURNING *",
    "INSERT INTO customers (id, name, balance) VALUES (100, 'n', 1), (101, :p, (SELECT max(balance) FROM customers))",
    "INSERT INTO orders (id, customer_id, total, status) SELECT id + 100, customer_id, total, status FROM orders",
    "INSERT INTO orders (id, status) VALUES (200, 'x')",
    "INSERT INTO customers (id, note) WITH w AS (SELECT id + 50 AS i FROM orders) SELECT i, '' FROM w",
)
_WORD = re.compile(r"\s+|'[^']*'|\w+|[^\w\s]")
_WORDS = [word for change in _CHANGES for word in _WORD.findall(change)]
_OTHERS = (
    "'x\n;--'",
    "--1",
    "tenant",
    "secret",
    "payroll",
    "* FROM payroll",
    "email",
    "NULL",
    "TRUE",
    ":p",
    "OR 1 = 1",
    "(",
)
_VALUES = (-0.0, -1, True, None, "'", "x\n--", "\\", "x")
_OUTSIDE = (
    "SELECT * FROM customers WHERE tenant <> 1 OR tenant IS NULL ORDER BY id",
    "SELECT * FROM orders WHERE status = 'x' OR status IS NULL ORDER BY id",
    "SELECT * FROM payroll ORDER BY id",
    "SELECT DISTINCT secret FROM customers WHERE secret IS NOT NULL AND tenant = 2 ORDER BY secret",
)


def _mutated(chance: random.Random) -> str:
    words = _WORD.findall(chance.choice(_CHANGES))
    for _ in range(chance.randint(0, 3)):
        at = chance.randrange(len(words))
        new = chance.choice(_WORDS if chance.random() < 0.7 else _OTHERS)
        words[at : at + chance.randint(0, 1)] = [new]
    return "".join(words)


Look = Callable[[], list[list[tuple[Any, ...]]]]


@pytest.fixture(scope="module")
def postgresql() -> Iterator[databases.Server]:
    with databases.postgresql() as server:
        yield server


@pytest.fixture(params=[Dialect.SQLITE, Dialect.POSTGRESQL], ids=lambda dialect: dialect.value)
def place(request: pytest.FixtureRequest, tmp_path: Path) -> tuple[Dialect, str, Look]:
    dialect: Dialect = request.param
    if dialect is Dialect.POSTGRESQL:
        port = request.getfixturevalue("postgresql").port
        make_postgresql(port, "crm", oracle=False)

        def look() -> list[list[tuple[Any, ...]]]:
            with psycopg.connect(databases.admin(port, "crm")) as connection:
                return [connection.execute(sql.encode()).fetchall() for sql in _OUTSIDE]

        return dialect, f"postgresql://agent@127.0.0.1:{port}/crm", look
    path = tmp_path / "crm.db"
    make_sqlite(path, oracle=False)

    def look_sqlite() -> list[list[tuple[Any, ...]]]:
        with closing(sqlite3.connect(path)) as connection:
            return [connection.execute(sql).fetchall() for sql in _OUTSIDE]

    return dialect, str(path), look_sqlite


async def test_no_change_reaches_beyond_the_scope(place: tuple[Dialect, str, Look]) -> None:
    dialect, url, look = place
    limits = DataLimits(time=5, queries_per_minute=1_000_000)
    world = World(source_of(dialect, url, tables=writable(*TABLES[:2]), hold_writes=False, limits=limits))
    chance, before, made = random.Random(20261128), look(), 0
    assert all(before)
    for _ in range(600):
        sql, value = _mutated(chance), chance.choice(_VALUES)
        status, body = await world.ask(sql, {"p": value})
        assert status != 500, (sql, value, body)
        if status == 200:
            made += 1
            assert look() == before, (sql, value)
    assert made > 60
    await world.desk.close()
