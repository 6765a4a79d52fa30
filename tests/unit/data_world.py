"""A source, its scope, and an oracle: a database that holds nothing but what the scope has.

What an agent gets of the source through the broker must be what it would get of the oracle without one.
"""

from __future__ import annotations

import hashlib
import hmac
import json
import sqlite3
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import duckdb
import psycopg

from corral.actions import Content, Decision, Origin, Used
from corral.approvals.queue import Queue
from corral.brokers.data.calls import Desk
from corral.brokers.data.scope import MASK
from corral.brokers.setting import Setting
from corral.monitor.core import Monitor
from corral.monitor.steps import Execs
from corral.policy.model import Column, ColumnUse, Data, DataLimits, DataRule, Dialect, Policy, Source, TableScope
from corral.policy.part import PolicyPart
from tests.unit.databases import PASSWORD, admin, maria_root

KEY = "k" * 64
ORIGIN = Origin("box", "box")
CUSTOMERS = TableScope(
    "customers",
    (
        Column("id"),
        Column("name", personal=True),
        Column("email", ColumnUse.HASH, personal=True),
        Column("phone", ColumnUse.MASK, personal=True),
        Column("balance"),
        Column("divisor"),
        Column("note"),
        Column("secret", ColumnUse.DENY),
    ),
    rows="tenant = 1",
)
ORDERS = TableScope("orders", (Column("id"), Column("customer_id"), Column("total"), Column("status")), "status <> 'x'")
VIP = TableScope("vip", (Column("id"), Column("name", personal=True)))
TABLES = (CUSTOMERS, ORDERS, VIP)

ROWS: tuple[tuple[Any, ...], ...] = (
    # id, tenant, name, email, phone, balance, divisor, note, secret
    (1, 1, "Ada", "ada@one.example", "+1 555 0100", 120, 2, "10", "s3cret-ada"),
    (2, 1, "Bob", "bob@one.example", None, 80, 4, "20", "s3cret-bob"),
    (3, 1, "Eve's", "ada@one.example", "+1 555 0102", 300, 5, "30", "s3cret-eve"),
    (4, 2, "Hidden", "hid@two.example", "+1 555 0199", 999999, 0, "hidden-note", "s3cret-hid"),
    (5, 2, "Zero", "zero@two.example", None, -7, 0, "not a number", "s3cret-zero"),
    (6, 1, "Łukasz", None, "+1 555 0103", 0, 1, None, "s3cret-luk"),
)
ORDER_ROWS: tuple[tuple[Any, ...], ...] = (
    # id, customer_id, total, status, card
    (10, 1, 50, "paid", "4111"),
    (11, 1, 70, "open", "4112"),
    (12, 2, 10, "paid", "4113"),
    (13, 4, 999, "x", "4114"),
    (14, 3, 33, "open", "4115"),
)
COLUMNS = "id, tenant, name, email, phone, balance, divisor, note, secret"
_CREATE = """
CREATE TABLE customers (id INT PRIMARY KEY, tenant INT DEFAULT 1, name {text}, email {text}, phone {text}, balance INT,
  divisor INT, note {text}, secret {text});
CREATE TABLE orders (id INT PRIMARY KEY, customer_id INT, total INT, status {text}, card {text});
CREATE TABLE payroll (id INT PRIMARY KEY, salary INT);
CREATE VIEW vip AS SELECT id, name, secret FROM customers WHERE tenant = 1 AND balance > 100
"""
_CREATE_ORACLE = """
CREATE TABLE customers (id INT PRIMARY KEY, name {text}, email {text}, phone {text}, balance INT, divisor INT,
  note {text});
CREATE TABLE orders (id INT PRIMARY KEY, customer_id INT, total INT, status {text});
CREATE TABLE vip (id INT, name {text})
"""


def scoped(dialect: Dialect) -> dict[str, list[tuple[Any, ...]]]:
    """What the scope has of the rows."""
    customers = [
        (row[0], row[2], hashed(row[3], dialect), None if row[4] is None else MASK, *row[5:8])
        for row in ROWS
        if row[1] == 1
    ]
    orders = [row[:4] for row in ORDER_ROWS if row[3] != "x"]
    vip = [(row[0], row[2]) for row in ROWS if row[1] == 1 and row[5] > 100]
    return {"customers": customers, "orders": orders, "vip": vip}


def hashed(value: str | None, dialect: Dialect) -> str | None:
    if value is None:
        return None
    if dialect is Dialect.SQLITE:
        return hmac.new(KEY.encode(), value.encode(), hashlib.sha256).hexdigest()[:32]
    return hashlib.sha256((KEY + value).encode()).hexdigest()[:32]


def _fill(execute: Callable[[str, Sequence[Any]], object], mark: str, *, oracle: Dialect | None) -> None:
    if oracle is not None:
        for table, rows in scoped(oracle).items():
            for row in rows:
                execute(f"INSERT INTO {table} VALUES ({', '.join([mark] * len(row))})", row)
        return
    for row in ROWS:
        execute(f"INSERT INTO customers ({COLUMNS}) VALUES ({', '.join([mark] * 9)})", row)
    for row in ORDER_ROWS:
        execute(f"INSERT INTO orders VALUES ({', '.join([mark] * 5)})", row)
    execute(f"INSERT INTO payroll VALUES ({mark}, {mark})", (1, 987654))


def make_sqlite(path: Path, *, oracle: bool) -> None:
    connection = sqlite3.connect(path)
    connection.executescript((_CREATE_ORACLE if oracle else _CREATE).format(text="TEXT"))
    _fill(connection.execute, "?", oracle=Dialect.SQLITE if oracle else None)
    connection.commit()
    connection.close()


def make_duckdb(path: Path, *, oracle: bool) -> None:
    connection = duckdb.connect(str(path))
    connection.execute((_CREATE_ORACLE if oracle else _CREATE).format(text="VARCHAR"))
    _fill(connection.execute, "?", oracle=Dialect.DUCKDB if oracle else None)
    connection.close()


def make_postgresql(port: int, database: str, *, oracle: bool) -> None:
    with psycopg.connect(admin(port), autocommit=True) as connection:
        connection.execute(f"DROP DATABASE IF EXISTS {database} WITH (FORCE)".encode())
        connection.execute(f"CREATE DATABASE {database}".encode())
        connection.execute(
            f"DO $$ BEGIN CREATE ROLE agent LOGIN PASSWORD '{PASSWORD}'; CREATE ROLE scoped; GRANT scoped TO agent;"
            " EXCEPTION WHEN duplicate_object THEN NULL; END $$".encode()
        )
    with psycopg.connect(admin(port, database), autocommit=True) as connection:
        connection.execute((_CREATE_ORACLE if oracle else _CREATE).format(text="TEXT").encode())
        _fill(
            lambda sql, row: connection.execute(sql.encode(), row), "%s", oracle=Dialect.POSTGRESQL if oracle else None
        )
        # More than the scope has: it must hold by itself.
        connection.execute(b"GRANT ALL ON ALL TABLES IN SCHEMA public TO scoped")
        connection.execute(b"ANALYZE")


def make_mysql(port: int, database: str, *, oracle: bool) -> None:
    connection = maria_root(port)
    with connection.cursor() as cursor:
        cursor.execute(f"DROP DATABASE IF EXISTS {database}")
        cursor.execute(f"CREATE DATABASE {database} CHARACTER SET utf8mb4")
        cursor.execute(f"CREATE USER IF NOT EXISTS agent IDENTIFIED BY '{PASSWORD}'")
        cursor.execute(f"GRANT ALL ON {database}.* TO agent")
        cursor.execute(f"USE {database}")
        for statement in (_CREATE_ORACLE if oracle else _CREATE).format(text="VARCHAR(200)").split(";"):
            cursor.execute(statement)
        _fill(cursor.execute, "%s", oracle=Dialect.MYSQL if oracle else None)
    connection.close()


def source_of(dialect: Dialect, url: str, *, tables: tuple[TableScope, ...] = TABLES, **more: Any) -> Source:
    limits = more.pop("limits", DataLimits(time=5.0, queries_per_minute=1_000_000, concurrent=4))
    role = "scoped" if dialect is Dialect.POSTGRESQL else ""
    return Source("crm", dialect, url, "env:PW", role, tables, limits, **more)


def writable(*tables: TableScope) -> tuple[TableScope, ...]:
    return tuple(replace(table, statements=("select", "insert", "update", "delete")) for table in tables)


@dataclass
class Told:
    """What everybody was told."""

    decisions: list[Decision] = field(default_factory=list)
    used: list[Used] = field(default_factory=list)
    kept: list[tuple[Content, bytes, bool, str, int]] = field(default_factory=list)
    ends: list[str] = field(default_factory=list)

    def write(self, decision: Decision) -> None:
        self.decisions.append(decision)


class Tally:
    def __init__(self, told: Told) -> None:
        self._told = told

    def used(self, used: Used) -> None:
        self._told.used.append(used)


class Keeper:
    def __init__(self, told: Told) -> None:
        self._told = told

    def keeps(self, content: Content) -> int:
        return 4096 if content is Content.QUERY else 0

    def keep(self, origin: Origin, content: Content, data: bytes, is_whole: bool, about: str, call: int = 0) -> None:
        self._told.kept.append((content, data, is_whole, about, call))


ALL = Data(allow=(DataRule("crm", ("select", "insert", "update", "delete")),))


def setting_of(source: Source, told: Told, *, data: Data = ALL, queue: Queue | None = None) -> Setting:
    policy = Policy(data=replace(data, sources=(source,)))
    monitor = Monitor(policy=PolicyPart(policy), sink=told, approvals=queue, on_kill=told.ends.append)
    return Setting("box", "box", policy, monitor, Execs(), (Tally(told),), Keeper(told), told.ends.append, "")


class World:
    """A source behind its desk."""

    def __init__(self, source: Source, *, data: Data = ALL, queue: Queue | None = None) -> None:
        self.told = Told()
        self.desk = Desk(source, 0, PASSWORD, setting_of(source, self.told, data=data, queue=queue))

    async def ask(self, sql: str, parameters: Mapping[str, object] | None = None) -> tuple[int, Any]:
        outcome = await self.desk.ask(sql, parameters, ORIGIN)
        return outcome.status, json.loads(outcome.body)

    async def rows(self, sql: str, parameters: Mapping[str, object] | None = None) -> list[list[Any]]:
        status, body = await self.ask(sql, parameters)
        assert status == 200, body
        found: list[list[Any]] = body["rows"]
        return found
