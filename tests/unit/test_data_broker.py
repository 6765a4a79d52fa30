"""The data broker: its door, its limits, its accounts, and changes that are held."""

from __future__ import annotations

import asyncio
import json
import socket
import threading
import time
from collections.abc import AsyncIterator, Callable, Iterator, Mapping
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any
from unittest import mock

import psycopg
import pytest

from corral.actions import Content, Ending, Kind, Query, Verdict
from corral.approvals.queue import Question, Queue, Scope
from corral.approvals.waiting import read_waiting, show
from corral.brokers.data.broker import DataBroker, prepare
from corral.brokers.data.engine_postgresql import PostgresqlSession
from corral.brokers.data.engine_sqlite import SqliteSession
from corral.brokers.data.faults import Fault, SourceFault
from corral.brokers.data.sessions import Session
from corral.brokers.http import Connection, Room, serve
from corral.cli import pending
from corral.errors import RequestError
from corral.monitor.plain import from_plain, to_plain
from corral.policy.model import Data, DataLimits, DataRule, Dialect, Policy, Source, TableScope
from tests.unit import databases
from tests.unit.data_world import (
    ALL,
    CUSTOMERS,
    KEY,
    ORDERS,
    ORIGIN,
    TABLES,
    Told,
    World,
    make_duckdb,
    make_mysql,
    make_postgresql,
    make_sqlite,
    setting_of,
    source_of,
    writable,
)

HOST = "data.corral.internal"


@pytest.fixture(scope="module", autouse=True)
def key() -> Iterator[None]:
    with mock.patch("secrets.token_hex", lambda count: KEY):
        yield


@pytest.fixture(scope="module")
def postgresql() -> Iterator[databases.Server]:
    with databases.postgresql() as server:
        yield server


@pytest.fixture(scope="module")
def mariadb() -> Iterator[databases.Server]:
    with databases.mariadb() as server:
        yield server


Look = Callable[[str], list[tuple[Any, ...]]]
"""What is in the database, whoever may see it."""


class Place:
    """A database that is as it was at the beginning of a test."""

    def __init__(self, dialect: Dialect, url: str, look: Look) -> None:
        self.dialect, self.url, self.look = dialect, url, look

    def source(self, **more: Any) -> Source:
        return source_of(self.dialect, self.url, **more)


@pytest.fixture(params=list(Dialect), ids=lambda dialect: dialect.value)
def place(request: pytest.FixtureRequest, tmp_path: Path) -> Place:
    dialect: Dialect = request.param
    if dialect is Dialect.POSTGRESQL:
        port = request.getfixturevalue("postgresql").port
        make_postgresql(port, "crm", oracle=False)

        def look_postgresql(sql: str) -> list[tuple[Any, ...]]:
            with psycopg.connect(databases.admin(port, "crm")) as connection:
                return connection.execute(sql.encode()).fetchall()

        return Place(dialect, f"postgresql://agent@127.0.0.1:{port}/crm", look_postgresql)
    if dialect is Dialect.MYSQL:
        port = request.getfixturevalue("mariadb").port
        make_mysql(port, "crm", oracle=False)

        def look_mysql(sql: str) -> list[tuple[Any, ...]]:
            connection = databases.maria_root(port, "crm")
            with connection.cursor() as cursor:
                cursor.execute(sql)
                found = list(cursor.fetchall())
            connection.close()
            return found

        return Place(dialect, f"mysql://agent@127.0.0.1:{port}/crm", look_mysql)
    path = tmp_path / "crm.db"
    if dialect is Dialect.SQLITE:
        import sqlite3

        make_sqlite(path, oracle=False)

        def look_sqlite(sql: str) -> list[tuple[Any, ...]]:
            connection = sqlite3.connect(path)
            found = connection.execute(sql).fetchall()
            connection.close()
            return found

        return Place(dialect, str(path), look_sqlite)
    import duckdb

    make_duckdb(path, oracle=False)

    def look_duckdb(sql: str) -> list[tuple[Any, ...]]:
        with duckdb.connect(str(path)) as connection:  # after the broker's has been closed
            return connection.execute(sql).fetchall()

    return Place(dialect, str(path), look_duckdb)


@pytest.fixture
async def sqlite_world(tmp_path: Path) -> AsyncIterator[World]:
    make_sqlite(tmp_path / "crm.db", oracle=False)
    world = World(source_of(Dialect.SQLITE, str(tmp_path / "crm.db")))
    yield world
    await world.desk.close()


# ---- changes ----

CHANGEABLE = writable(replace(CUSTOMERS, rows="tenant = 1 AND balance < 1000"), ORDERS)


async def _question(queue: Queue) -> Question:
    async with asyncio.timeout(10):
        while not queue.waiting():
            await asyncio.sleep(0.01)
    return queue.waiting()[0]


async def test_a_change_waits_until_a_person_has_seen_the_rows(place: Place) -> None:
    queue = Queue(30, kill=lambda reason: None)
    world = World(place.source(tables=CHANGEABLE), queue=queue)
    asking = asyncio.create_task(world.ask("UPDATE customers SET balance = balance + :n WHERE name = 'Ada'", {"n": 5}))
    question = await _question(queue)
    subject = question.action.subject
    assert isinstance(subject, Query)
    assert (subject.source, subject.statement, subject.tables) == ("crm", "update", ("customers",))
    shown = show("box", question)
    assert "1 row: update" in shown.preview
    assert 'before: [1,"Ada",' in shown.preview and ",120,2," in shown.preview
    assert (',125,2,"10"]' in shown.preview) == (place.dialect is not Dialect.MYSQL)
    assert ("changes", "1 row: update") in pending._lines(read_waiting(asdict(shown)))
    assert "s3cret" not in shown.preview and "ada@one" not in shown.preview
    if place.dialect is not Dialect.DUCKDB:
        assert place.look("SELECT balance FROM customers WHERE id = 1") == [(120,)]  # nobody sees it yet
    with pytest.raises(RequestError, match="once only"):
        queue.answer(question.number, Verdict.ALLOW, "ann", scope=Scope.SESSION)
    queue.answer(question.number, Verdict.ALLOW, "ann")
    assert await asking == (200, {"affected": 1})
    await world.desk.close()
    assert place.look("SELECT balance FROM customers WHERE id = 1") == [(125,)]
    (decision,) = world.told.decisions
    assert (decision.verdict, decision.answered_by) == (Verdict.ALLOW, "ann")


async def test_a_text_is_no_line_of_what_a_person_sees(place: Place) -> None:
    """Whoever writes a line break into a text could add rows that are not changed, and move the cursor."""
    queue = Queue(30, kill=lambda reason: None)
    world = World(place.source(tables=CHANGEABLE), queue=queue)
    forged = 'x\nafter: [1,"harmless"]\x1b[2J\u202e'
    asking = asyncio.create_task(world.ask("UPDATE customers SET name = :n WHERE id = 1", {"n": forged}))
    question = await _question(queue)
    preview = show("box", question).preview
    assert not any(line.startswith('after: [1,"harm') for line in preview.split("\n"))
    assert preview.replace("\n", "").isprintable()
    queue.answer(question.number, Verdict.DENY, "ann")
    assert (await asking)[0] == 403
    await world.desk.close()


@pytest.mark.parametrize("way", ["denied", "late", "gone", "closed"])
async def test_everything_but_a_yes_is_undone(place: Place, way: str) -> None:
    queue = Queue(0.3 if way == "late" else 30, kill=lambda reason: None)
    world = World(place.source(tables=CHANGEABLE), queue=queue)
    asking = asyncio.create_task(world.ask("DELETE FROM customers WHERE id < 3"))
    question = await _question(queue)
    if way == "denied":
        queue.answer(question.number, Verdict.DENY, "ann", reason="not now")
    if way == "closed":
        queue.close()
    if way == "gone":
        asking.cancel()
        with pytest.raises(asyncio.CancelledError):
            await asking
        assert not queue.waiting()
        assert world.told.used[-1].ending is Ending.ABANDONED
    else:
        status, body = await asking
        assert (status, body["error"]["type"]) == (403, "denied")
    # The session is as good as new: what it does next is not what was not agreed to.
    assert (await world.ask("SELECT count(*) FROM customers"))[1]["rows"] == [[4]]
    await world.desk.close()
    assert place.look("SELECT count(*) FROM customers") == [(6,)]


async def test_a_change_that_is_being_committed_is_on_record(sqlite_world: World, tmp_path: Path) -> None:
    """Its client goes while it is: it has happened all the same, and the account says so."""
    source = source_of(Dialect.SQLITE, str(tmp_path / "crm.db"), tables=CHANGEABLE, hold_writes=False)
    world = World(source)
    committing = threading.Event()

    def finish(session: SqliteSession, *, commit: bool) -> None:
        committing.set()
        time.sleep(0.2)
        Session.finish(session, commit=commit)

    with mock.patch.object(SqliteSession, "finish", finish):
        asking = asyncio.create_task(world.ask("UPDATE customers SET balance = 7 WHERE id = 1"))
        await asyncio.to_thread(committing.wait, 10)
        asking.cancel()
        with pytest.raises(asyncio.CancelledError):
            await asking
    assert (world.told.used[0].ending, world.told.used[0].rows) == (Ending.ABANDONED, 1)
    assert await sqlite_world.rows("SELECT balance FROM customers WHERE id = 1") == [[7]]
    await world.desk.close()


async def test_what_the_policy_denies_is_not_tried(place: Place) -> None:
    data = Data(allow=(DataRule("crm"),), deny=(DataRule("crm", ("delete",)),))
    world = World(place.source(tables=CHANGEABLE), data=data)
    with mock.patch("corral.brokers.data.sessions.Session.change", side_effect=AssertionError):
        status, body = await world.ask("DELETE FROM customers")
    assert (status, body["error"]["type"]) == (403, "denied")
    assert world.told.decisions[-1].rule == "data.deny[0]"
    await world.desk.close()


REFUSED_CHANGES = (
    ("UPDATE customers SET balance = 5000 WHERE id = 1", 422, "too_much"),
    ("UPDATE customers SET balance = 900 + balance", 422, "too_much"),
    ("INSERT INTO customers (id, name, balance) VALUES (70, 'x', 5000)", 422, "too_much"),
    ("INSERT INTO customers (id, name) VALUES (70, 'x')", 422, "too_much"),  # NULL < 1000 is not true
    ("INSERT INTO customers (id, balance) SELECT id + 70, balance + 950 FROM customers", 422, "too_much"),
    ("INSERT INTO customers (id, balance) VALUES (4, 1)", 400, "constraint"),
    ("INSERT INTO customers (id, tenant) VALUES (70, 1)", 400, "refused"),
    ("INSERT INTO customers (id, email) VALUES (70, 'x')", 400, "refused"),
    ("INSERT INTO customers (id, phone) VALUES (70, 'x')", 400, "refused"),
    ("INSERT INTO customers (id, secret) VALUES (70, 'x')", 400, "refused"),
    ("INSERT INTO customers VALUES (70, 1, 'x', 'x', 'x', 1, 1, 'x', 'x')", 400, "refused"),
    ("INSERT INTO customers DEFAULT VALUES", 400, "refused"),
    ("INSERT INTO customers (id, name) SELECT id, secret FROM customers", 400, "refused"),
    ("INSERT INTO customers (id, name) SELECT 70, salary FROM payroll", 400, "refused"),
    ("INSERT INTO customers (id, name) VALUES (70, (SELECT secret FROM customers LIMIT 1))", 400, "refused"),
    ("INSERT INTO customers (id, name) VALUES (70, name)", 400, "refused"),
    ("INSERT INTO customers (id) VALUES (1) ON CONFLICT (id) DO UPDATE SET balance = 1", 400, "refused"),
    ("INSERT INTO customers (id) VALUES (1) ON DUPLICATE KEY UPDATE balance = 1", 400, "refused"),
    ("INSERT OR REPLACE INTO customers (id) VALUES (1)", 400, "refused"),
    ("INSERT IGNORE INTO customers (id) VALUES (1)", 400, "refused"),
    ("INSERT INTO payroll (id) VALUES (2)", 400, "refused"),
    ("INSERT INTO vip (id) VALUES (2)", 400, "refused"),
    ("UPDATE customers SET tenant = 2", 400, "refused"),
    ("UPDATE customers SET email = 'x'", 400, "refused"),
    ("UPDATE customers SET name = email", 400, "refused"),
    ("UPDATE customers SET name = phone WHERE id = 1", 400, "refused"),
    ("UPDATE customers SET name = secret", 400, "refused"),
    ("UPDATE customers SET name = (SELECT secret FROM customers LIMIT 1)", 400, "refused"),
    ("UPDATE customers SET name = (SELECT 'x')", 400, "refused"),
    ("UPDATE customers SET name = o.status FROM orders o WHERE o.customer_id = customers.id", 400, "refused"),
    ("UPDATE customers, orders SET customers.name = 'x'", 400, "refused"),
    ("UPDATE customers SET (name, note) = ('x', 'y')", 400, "refused"),
    ("UPDATE customers SET name = 'x' WHERE secret = 's3cret-ada'", 400, "refused"),
    ("UPDATE customers SET name = 'x' WHERE tenant = 2", 400, "refused"),
    ("UPDATE customers SET name = 'x' ORDER BY id LIMIT 1", 400, "refused"),
    ("UPDATE OR REPLACE customers SET id = 2 WHERE id = 1", 400, "refused"),
    ("UPDATE payroll SET salary = 1", 400, "refused"),
    ("UPDATE customers SET name = 'x' RETURNING secret", 400, "refused"),
    ("UPDATE customers SET name = 'x' RETURNING upper(name)", 400, "refused"),
    ("WITH x AS (SELECT 1 AS a) UPDATE customers SET name = 'x'", 400, "refused"),
    ("DELETE FROM customers USING orders WHERE orders.customer_id = customers.id", 400, "refused"),
    ("DELETE customers FROM customers JOIN orders", 400, "refused"),
    ("DELETE FROM customers WHERE secret LIKE 's%'", 400, "refused"),
    ("DELETE FROM payroll", 400, "refused"),
    ("DELETE FROM customers LIMIT 1", 400, "refused"),
)


async def test_changes_stay_within_the_scope(place: Place) -> None:
    world = World(place.source(tables=CHANGEABLE, hold_writes=False))
    wrong = []
    for sql, status, kind in REFUSED_CHANGES:
        there, body = await world.ask(sql)
        if there != status or body["error"]["type"] != kind:
            wrong.append(f"{sql}: {there} {body}")
    await world.desk.close()
    assert not wrong, "\n".join(wrong)
    assert place.look("SELECT count(*), sum(balance), min(name) FROM customers") == [(6, 1000492, "Ada")]


async def test_hidden_rows_are_not_changed(place: Place) -> None:
    world = World(place.source(tables=CHANGEABLE, hold_writes=False))
    assert await world.ask("UPDATE customers SET note = 'seen' WHERE 100 / divisor > 0") == (200, {"affected": 4})
    assert await world.ask("DELETE FROM customers WHERE id = 4") == (200, {"affected": 0})
    assert await world.ask("DELETE FROM orders") == (200, {"affected": 4})
    await world.desk.close()
    assert place.look("SELECT id FROM customers WHERE note = 'seen' ORDER BY id") == [(1,), (2,), (3,), (6,)]
    assert place.look("SELECT id FROM orders") == [(13,)]


async def test_changes_of_more_rows_than_may_be_are_undone(place: Place) -> None:
    limits = DataLimits(rows=3, time=5)
    world = World(place.source(tables=CHANGEABLE, hold_writes=False, limits=limits))
    status, body = await world.ask("UPDATE customers SET note = 'x'")
    assert (status, body["error"]["type"]) == (422, "too_much")
    assert (await world.ask("UPDATE customers SET note = 'x' WHERE id < 3"))[0] == 200
    await world.desk.close()
    assert place.look("SELECT count(*) FROM customers WHERE note = 'x'") == [(2,)]


async def test_what_is_given_back_is_as_it_is_seen(place: Place) -> None:
    if place.dialect is Dialect.MYSQL:
        return  # it gives nothing back
    world = World(place.source(tables=CHANGEABLE, hold_writes=False))
    status, body = await world.ask("UPDATE customers AS c SET name = 'A' WHERE c.id = 1 RETURNING phone, id, email")
    assert status == 200 and body["columns"] == ["phone", "id", "email"]
    ((phone, number, email),) = body["rows"]
    assert (phone, number, len(email)) == ("***", 1, 32)
    assert set(world.told.used[-1].personal) == {"crm.customers.name", "crm.customers.phone", "crm.customers.email"}
    await world.desk.close()


async def test_reading_goes_on_while_changes_are_held(place: Place) -> None:
    queue = Queue(30, kill=lambda reason: None)
    world = World(place.source(tables=CHANGEABLE, limits=DataLimits(time=2, concurrent=2)), queue=queue)
    held = asyncio.create_task(world.ask("UPDATE customers SET note = 'x' WHERE id = 1"))
    await _question(queue)
    for _ in range(3):
        assert (await world.ask("SELECT count(*) FROM orders"))[0] == 200
    status, body = await world.ask("UPDATE orders SET status = 'y' WHERE id = 10")
    assert (status, body["error"]["type"]) == (503, "busy")
    held.cancel()
    with pytest.raises(asyncio.CancelledError):
        await held
    await world.desk.close()


async def test_a_transaction_that_only_reads_cannot_write(place: Place) -> None:
    """The second wall: had a change come through all else as a query, it would still change nothing."""
    world = World(place.source(tables=CHANGEABLE))
    session = await world.desk._pool.lease(writes=False)
    with pytest.raises(Exception, match=r"the source|privilege|right|understand|run"):
        session._begin(writes=False)
        try:
            session._run("DELETE FROM orders WHERE id = 10").fetchall()
        except Exception as error:
            raise RuntimeError(f"the source: {session._fault(error)}") from None
    session._abandon()
    world.desk._pool.give_back(session, writes=False)
    await world.desk.close()
    assert place.look("SELECT count(*) FROM orders") == [(5,)]


# ---- limits ----


async def test_a_result_ends_at_its_rows_and_bytes(place: Place) -> None:
    world = World(place.source(limits=DataLimits(rows=2, time=5)))
    status, body = await world.ask("SELECT id FROM customers ORDER BY id")
    assert (status, body["rows"], body["truncated"]) == (200, [[1], [2]], True)
    assert (await world.ask("SELECT id FROM customers WHERE id < 3"))[1]["truncated"] is False
    await world.desk.close()
    world = World(place.source(limits=DataLimits(bytes=40, time=5)))
    status, body = await world.ask("SELECT name FROM customers ORDER BY id")
    assert status == 200 and body["truncated"] and len(body["rows"]) in (2, 3)
    # Whatever was left unread is not the beginning of the next.
    assert (await world.ask("SELECT count(*) FROM customers"))[1]["rows"] == [[4]]
    await world.desk.close()


LONG = "SELECT count(*) FROM " + ", ".join(f"orders o{number}" for number in range(18))


async def test_a_query_ends_at_its_time(place: Place) -> None:
    world = World(place.source(limits=DataLimits(time=0.3)))
    status, body = await world.ask(LONG)
    assert (status, body["error"]["type"]) == (504, "time")
    assert (await world.ask("SELECT 1"))[0] == 200
    assert world.told.used[0].ending is Ending.FAILED and world.told.used[0].status == 504
    await world.desk.close()


async def test_a_query_whose_client_is_gone_is_cancelled(place: Place) -> None:
    world = World(place.source(limits=DataLimits(time=60, concurrent=1)))
    asking = asyncio.create_task(world.ask(LONG))
    await asyncio.sleep(0.3)
    asking.cancel()
    async with asyncio.timeout(20):
        with pytest.raises(asyncio.CancelledError):
            await asking
        assert (await world.ask("SELECT 1"))[0] == 200  # there is one session only, and it is free
    assert world.told.used[0].ending is Ending.ABANDONED
    await world.desk.close()


async def test_64_clients_hold_the_limits(place: Place) -> None:
    world = World(place.source(limits=DataLimits(time=10, concurrent=3, queries_per_minute=40, rows=5)))
    most = running = 0
    use = world.desk._pool.use

    async def counted(*args: Any) -> Any:
        nonlocal most, running
        running += 1
        most = max(most, running)
        try:
            return await use(*args)
        finally:
            running -= 1

    async def client() -> list[int]:
        found = []
        for _ in range(4):
            status, body = await world.ask("SELECT a.id FROM orders a, orders b, orders c ORDER BY a.id")
            assert status != 200 or (len(body["rows"]) == 5 and body["truncated"])
            found.append(status)
            await asyncio.sleep(0.01)
        return found

    with mock.patch.object(world.desk._pool, "use", counted):
        statuses = [status for found in await asyncio.gather(*(client() for _ in range(64))) for status in found]
    assert set(statuses) == {200, 429}
    assert most <= 3 and statuses.count(200) <= 40
    assert len(world.desk._pool._all) <= 3
    assert len(world.told.used) == 256
    await world.desk.close()


async def test_a_row_that_is_too_large_stays_in_the_server(postgresql: databases.Server) -> None:
    """A value may have 1 GB there; what a query or a change gives is looked at where it is."""
    make_postgresql(postgresql.port, "crm", oracle=False)
    url = f"postgresql://agent@127.0.0.1:{postgresql.port}/crm"
    limits = DataLimits(bytes=100_000, time=5)
    world = World(source_of(Dialect.POSTGRESQL, url, tables=CHANGEABLE, limits=limits, hold_writes=False))
    text = f"concat({', '.join(['t.x'] * 60)})"  # 60 * 8000 characters
    parameters = {"x": "x" * 8000}
    largest = 0
    run = PostgresqlSession._run

    def measured(session: PostgresqlSession, sql: str) -> Any:
        nonlocal largest
        cursor = run(session, sql)
        there = cursor.pgresult
        for row in range(there.ntuples):
            largest = max([largest, *(len(there.get_value(row, column) or b"") for column in range(there.nfields))])
        return cursor

    with mock.patch.object(PostgresqlSession, "_run", measured):
        for sql in (
            f"SELECT {text} AS y FROM (SELECT :x AS x) AS t",
            f"INSERT INTO customers (id, name) SELECT 50, {text} FROM (SELECT :x AS x) AS t",
            f"UPDATE customers SET name = {text.replace('t.x', ':x')} WHERE id = 1",
        ):
            status, body = await world.ask(sql, parameters)
            assert (status, body["error"]["type"]) == (422, "too_much"), sql
    assert 0 < largest < 1000  # what there was before the update
    assert (await world.ask("SELECT length(:x) AS n, name FROM customers ORDER BY id LIMIT 1", parameters))[1][
        "rows"
    ] == [[8000, "Ada"]]
    assert (await world.ask("SELECT sqrt(-1)"))[1]["error"]["type"] == "range"
    await world.desk.close()


async def test_a_query_that_costs_too_much(postgresql: databases.Server) -> None:
    make_postgresql(postgresql.port, "crm", oracle=False)
    source = source_of(
        Dialect.POSTGRESQL,
        f"postgresql://agent@127.0.0.1:{postgresql.port}/crm",
        limits=DataLimits(cost=100.0),
        tables=CHANGEABLE,
        hold_writes=False,
    )
    world = World(source)
    many = "(SELECT count(*) FROM orders a, orders b, orders c, orders d, orders e, orders f, orders g, orders h) > 0"
    status, body = await world.ask(f"UPDATE customers SET name = 'x' WHERE {many}")
    assert (status, body["error"]["type"]) == (422, "too_much")
    assert (await world.ask("SELECT count(*) FROM orders"))[0] == 200
    status, body = await world.ask(
        "SELECT count(*) FROM orders a, orders b, orders c, orders d, orders e, orders f, orders g, orders h"
    )
    assert (status, body["error"]["type"]) == (422, "too_much")
    await world.desk.close()


async def test_a_source_that_is_not_there(tmp_path: Path) -> None:
    port = databases.free_port()
    for dialect, url in (
        (Dialect.POSTGRESQL, f"postgresql://agent@127.0.0.1:{port}/crm"),
        (Dialect.MYSQL, f"mysql://agent@127.0.0.1:{port}/crm"),
        (Dialect.SQLITE, str(tmp_path / "none.db")),
        (Dialect.DUCKDB, str(tmp_path / "none.duckdb")),
    ):
        world = World(source_of(dialect, url))
        status, body = await world.ask("SELECT id FROM customers")
        assert (status, body["error"]["type"]) == (502, "unreachable"), body
        assert str(port) not in str(body) and "none" not in str(body)
        assert not (tmp_path / "none.db").exists()
        await world.desk.close()


async def test_a_role_that_rights_do_not_bind_is_not_used(postgresql: databases.Server) -> None:
    make_postgresql(postgresql.port, "crm", oracle=False)
    source = replace(source_of(Dialect.POSTGRESQL, f"postgresql://admin@127.0.0.1:{postgresql.port}/crm"), role="")
    world = World(source)
    assert (await world.ask("SELECT 1"))[1]["error"]["type"] == "privilege"
    await world.desk.close()


# ---- accounts ----


async def test_every_query_is_accounted_for(sqlite_world: World) -> None:
    world = sqlite_world
    await world.ask("SELECT id FROM customers WHERE name = :name", {"name": "Ada"})
    await world.ask("SELECT count(*) FROM customers")
    await world.ask("SELECT * FROM vip")
    await world.ask("SELECT secret FROM customers")
    (one, two, three, four) = world.told.used
    assert (one.kind, one.source, one.name, one.ending) == (Kind.DATA_QUERY, "crm", "select", Ending.ANSWERED)
    assert one.rows == 1 and one.personal == ("crm.customers.name",) and one.rule == "data.allow[0]"
    assert two.personal == () and three.personal == ("crm.vip.name",)
    assert (four.ending, four.status, four.personal) == (Ending.REFUSED, 400, ())
    content, data, whole, about, call = world.told.kept[0]
    assert call == world.told.used[0].call > 0, "its record and what is kept of it are tied together"
    assert (content, whole, about) == (Content.QUERY, True, "crm")
    assert json.loads(data) == {
        "sql": "SELECT id FROM customers WHERE name = :name",
        "parameters": {"name": "Ada"},
    }


async def test_the_policy_is_asked_for_all_tables(tmp_path: Path) -> None:
    make_sqlite(tmp_path / "crm.db", oracle=False)
    data = Data(allow=(DataRule("crm", ("select",), ("orders", "vip")),))
    world = World(source_of(Dialect.SQLITE, str(tmp_path / "crm.db")), data=data)
    assert (await world.ask("SELECT count(*) FROM orders"))[0] == 200
    status, body = await world.ask("SELECT 1 FROM orders JOIN customers ON orders.id = customers.id")
    assert (status, body["error"]["type"]) == (403, "denied")
    assert world.told.decisions[-1].action.subject == Query("crm", "select", ("customers", "orders"))
    await world.desk.close()


async def test_the_password_is_nowhere(place: Place) -> None:
    world = World(place.source())
    for sql in ("SELECT * FROM customers", "SELECT secret FROM customers", "SELECT CAST(name AS INT) FROM customers"):
        assert databases.PASSWORD not in str(await world.ask(sql))
    assert databases.PASSWORD not in repr(world.told.used) + repr(world.told.kept) + repr(world.told.decisions)
    for thing in (world.desk, world.desk._pool, *world.desk._pool._all):
        assert databases.PASSWORD not in repr(thing)
    await world.desk.close()


async def test_errors_do_not_name_what_is_hidden(place: Place) -> None:
    """A constraint of a hidden column, a type, a division: the database's own words say more."""
    world = World(place.source(tables=CHANGEABLE, hold_writes=False))
    for sql in (
        "INSERT INTO customers (id) VALUES (4)",
        "SELECT CAST(name AS INT) + 1 FROM customers",
        "SELECT id FROM customers WHERE id = 'x'",
        "SELECT name, id FROM customers GROUP BY name HAVING count(*) > name",
    ):
        _, body = await world.ask(sql)
        text = str(body).lower()
        assert not any(word in text for word in ("pkey", "primary", "tenant", "public.", "line 1", "ada", "crm")), text
    await world.desk.close()


def test_a_preview_is_in_no_record() -> None:
    query = Query("crm", "update", ("customers",), "before: [1, 'Ada']")
    plain, whole = to_plain(query)
    assert plain == {"source": "crm", "statement": "update", "tables": ["customers"]} and whole
    assert from_plain(Query, plain) == replace(query, preview="")


# ---- the door ----


class Door:
    """The broker behind a connection."""

    def __init__(self, broker: DataBroker) -> None:
        self.broker = broker
        self.overs: list[str] = []

    async def ask(
        self, method: str, path: str, value: object = None, **headers: str
    ) -> tuple[int, dict[str, str], bytes]:
        ours, theirs = socket.socketpair()
        ours.setblocking(False)
        theirs.setblocking(False)
        room = Room(1 << 24)
        await serve(
            theirs,
            lambda: Connection(HOST, ORIGIN, self.broker.handle, self.broker.max_body, room, self.overs.append),
        )
        reader, writer = await asyncio.open_connection(sock=ours)
        body = value if isinstance(value, bytes) else b"" if value is None else json.dumps(value).encode()
        fields = {"host": HOST, "content-length": str(len(body)), "content-type": "application/json", **headers}
        head = "".join(f"{name.replace('_', '-')}: {field}\r\n" for name, field in fields.items())
        writer.write(f"{method} {path} HTTP/1.1\r\n{head}\r\n".encode() + body)
        first, *lines = (await reader.readuntil(b"\r\n\r\n")).decode().split("\r\n")[:-2]
        found = {name.lower(): text.strip() for name, _, text in (line.partition(":") for line in lines)}
        answered = await reader.readexactly(int(found["content-length"]))
        writer.close()
        return int(first.split()[1]), found, answered


@pytest.fixture
async def door(tmp_path: Path) -> AsyncIterator[Door]:
    make_sqlite(tmp_path / "crm.db", oracle=False)
    setting = setting_of(source_of(Dialect.SQLITE, str(tmp_path / "crm.db")), Told())
    policy = replace(setting.policy, data=replace(setting.policy.data))
    broker = prepare(policy, {"PW": databases.PASSWORD})(setting)
    assert isinstance(broker, DataBroker)
    yield Door(broker)
    await broker.close()


async def test_what_there_is(door: Door) -> None:
    status, headers, body = await door.ask("GET", "/")
    assert (status, headers["content-type"]) == (200, "application/json")
    (source,) = json.loads(body)["sources"]
    assert source["name"] == "crm" and [table["name"] for table in source["tables"]] == ["customers", "orders", "vip"]
    assert {"name": "email", "seen": "hashed"} in source["tables"][0]["columns"]
    assert b"secret" not in body and b"tenant" not in body and b".db" not in body
    status, _, body = await door.ask("GET", "/openapi.json")
    document = json.loads(body)
    assert status == 200 and document["openapi"].startswith("3.1") and "/v1/query" in document["paths"]


async def test_a_query_over_http(door: Door) -> None:
    asked = {"source": "crm", "sql": "SELECT id, name FROM customers WHERE id = :id", "parameters": {"id": 6}}
    status, headers, body = await door.ask("POST", "/v1/query", asked)
    assert (status, headers["content-type"]) == (200, "application/json")
    assert json.loads(body) == {"columns": ["id", "name"], "rows": [[6, "Łukasz"]], "truncated": False}


@pytest.mark.parametrize(
    ("method", "path", "value", "status"),
    [
        ("GET", "/v1/query", None, 405),
        ("POST", "/", None, 405),
        ("GET", "/v1/other", None, 404),
        ("POST", "/v1/query", b"{", 400),
        ("POST", "/v1/query", b"[]", 400),
        ("POST", "/v1/query", b'{"source":"crm","sql":"SELECT 1","sql":"SELECT 2"}', 400),
        ("POST", "/v1/query", {"source": "crm"}, 400),
        ("POST", "/v1/query", {"source": "crm", "sql": 1}, 400),
        ("POST", "/v1/query", {"source": "crm", "sql": "SELECT 1", "more": 1}, 400),
        ("POST", "/v1/query", {"source": "other", "sql": "SELECT 1"}, 404),
        ("POST", "/v1/query", {"source": "crm", "sql": "SELECT :a", "parameters": {"a": [1]}}, 400),
        ("POST", "/v1/query", {"source": "crm", "sql": "SELECT :a", "parameters": [1]}, 400),
        ("POST", "/v1/query", {"source": "crm", "sql": "SELECT :a", "parameters": {"a": 1 << 70}}, 400),
        ("POST", "/v1/query", {"source": "crm", "sql": "SELECT " + "1+" * 20000 + "1"}, 400),
        ("POST", "/v1/query", {"source": "crm", "sql": "SELECT " + "1+" * 1500 + "1"}, 400),
        ("POST", "/v1/query", {"source": "crm", "sql": "SELECT " + "NOT " * 300 + "1"}, 400),
    ],
)
async def test_what_is_no_query(door: Door, method: str, path: str, value: object, status: int) -> None:
    there, _, body = await door.ask(method, path, value)
    assert there == status, body


async def test_the_same_as_mcp_tools(door: Door) -> None:
    async def call(method: str, params: Mapping[str, object]) -> Any:
        message = {"jsonrpc": "2.0", "id": 1, "method": method, "params": params}
        status, _, body = await door.ask("POST", "/mcp", message, accept="application/json, text/event-stream")
        assert status == 200
        return json.loads(body)["result"]

    tools = (await call("tools/list", {}))["tools"]
    assert [tool["name"] for tool in tools] == ["describe", "query"]
    described = await call("tools/call", {"name": "describe", "arguments": {}})
    assert "customers" in described["content"][0]["text"]
    asked = {"source": "crm", "sql": "SELECT count(*) AS n FROM customers"}
    found = await call("tools/call", {"name": "query", "arguments": asked})
    assert json.loads(found["content"][0]["text"])["rows"] == [[4]] and not found["isError"]
    asked = {"source": "crm", "sql": "SELECT secret FROM customers"}
    found = await call("tools/call", {"name": "query", "arguments": asked})
    assert found["isError"] and "There is no column" in found["content"][0]["text"]


# ---- what is wrong with a policy ----


@pytest.mark.parametrize(
    "tables",
    [
        (replace(CUSTOMERS, rows="tenant = 1) OR (1 = 1"),),
        (replace(CUSTOMERS, rows="tenant = 1; DROP TABLE customers"),),
        (replace(CUSTOMERS, rows="1 = 1 ORDER BY 1"),),
        (replace(CUSTOMERS, rows="tenant ="),),
        (replace(CUSTOMERS, name="a.b.customers"),),
        (CUSTOMERS, replace(CUSTOMERS, name="public.customers")),
        (replace(CUSTOMERS, columns=(*CUSTOMERS.columns, CUSTOMERS.columns[0])),),
        (replace(CUSTOMERS, columns=()),),
    ],
)
def test_a_scope_that_cannot_be(tables: tuple[TableScope, ...]) -> None:
    source = replace(
        source_of(Dialect.POSTGRESQL, "postgresql://agent@db.example:5432/crm", tables=tables), password=""
    )
    with pytest.raises(RequestError):
        prepare(Policy(data=replace(ALL, sources=(source,))), {})


def test_a_password_that_is_not_there() -> None:
    source = source_of(Dialect.POSTGRESQL, "postgresql://agent@db.example:5432/crm", tables=TABLES)
    with pytest.raises(RequestError, match="env:PW"):
        prepare(Policy(data=replace(ALL, sources=(source,))), {})


def test_a_library_that_is_not_there() -> None:
    source = source_of(Dialect.MYSQL, "mysql://agent@db.example:3306/crm", tables=TABLES)
    with mock.patch("corral.brokers.data.broker.importlib.util.find_spec", lambda name: None):
        with pytest.raises(RequestError, match=r"corral\[data\]"):
            prepare(Policy(data=replace(ALL, sources=(source,))), {"PW": "x"})


# ---- the walls below: had a query come through all else ----


@pytest.mark.parametrize(
    "sql",
    [
        "SELECT secret FROM customers",
        "SELECT count(tenant + length(secret)) FROM customers",
        "SELECT * FROM payroll",
        "WITH x AS (SELECT * FROM payroll) SELECT * FROM x",
        "SELECT * FROM (SELECT salary FROM payroll) AS vip",
        "SELECT sql FROM sqlite_schema",
        "SELECT * FROM pragma_table_info('customers')",
        "SELECT hex(name) FROM customers",
        "SELECT load_extension('x')",
        "ATTACH DATABASE ':memory:' AS x",
        "PRAGMA query_only = OFF",
        "INSERT INTO orders (id) VALUES (99)",
        "DELETE FROM orders",
        "DROP TABLE orders",
        "CREATE TEMP TABLE x (a)",
        "WITH RECURSIVE x(n) AS (SELECT 1 UNION ALL SELECT n + 1 FROM x LIMIT 5) SELECT n FROM x",
    ],
)
async def test_what_sqlite_itself_refuses(sqlite_world: World, sql: str) -> None:
    session = await sqlite_world.desk._pool.lease(writes=False)
    with pytest.raises(SourceFault) as caught:
        session.read(sql)
    assert caught.value.fault in (Fault.PRIVILEGE, Fault.SYNTAX)
    sqlite_world.desk._pool.give_back(session, writes=False)
    assert (await sqlite_world.ask("SELECT count(*) FROM vip"))[1]["rows"] == [[2]]


@pytest.mark.parametrize(
    "sql",
    [
        "SELECT * FROM read_csv('/etc/passwd')",
        "SELECT * FROM '/etc/passwd'",
        "COPY (SELECT 1) TO '/tmp/corral-test.csv'",
        "ATTACH '/tmp/corral-test.db' AS x",
        "SET enable_external_access = true",
        "SET disabled_optimizers = ''",
        "SET lock_configuration = false",
        "INSTALL httpfs",
        "DELETE FROM orders",
    ],
)
async def test_what_duckdb_itself_refuses(tmp_path: Path, sql: str) -> None:
    make_duckdb(tmp_path / "crm.db", oracle=False)
    world = World(source_of(Dialect.DUCKDB, str(tmp_path / "crm.db")))
    session = await world.desk._pool.lease(writes=False)
    with pytest.raises(SourceFault):
        session.read(sql)
    world.desk._pool.give_back(session, writes=False)
    await world.desk.close()


@pytest.mark.parametrize(
    "sql",
    [
        "SELECT count(*) FROM customers",  # no table is found without its schema
        "DELETE FROM public.orders",
        "CREATE TABLE public.x (a int)",
        "SELECT nextval('public.s')",
        "SELECT pg_read_file('/etc/passwd')",
        "COPY public.orders TO PROGRAM 'id'",
    ],
)
async def test_what_postgresql_itself_refuses(postgresql: databases.Server, sql: str) -> None:
    make_postgresql(postgresql.port, "crm", oracle=False)
    world = World(source_of(Dialect.POSTGRESQL, f"postgresql://agent@127.0.0.1:{postgresql.port}/crm"))
    session = await world.desk._pool.lease(writes=False)
    with pytest.raises(SourceFault):
        session.read(sql)
    world.desk._pool.give_back(session, writes=False)
    await world.desk.close()
