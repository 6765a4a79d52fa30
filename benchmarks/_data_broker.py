"""What the data broker costs: one query after another, and many at one time, on PostgreSQL and on SQLite.

PostgreSQL, the broker and the clients are processes of their own on loopback. The table has 100,000 rows, of which the
scope has half; a query asks for one by its key. Directly it is asked by psycopg on a connection that is there.
"""

from __future__ import annotations

import asyncio
import contextlib
import json
import os
import pwd
import shutil
import socket
import sqlite3
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from _common import Row, p95, say

ADDED = 3.0
"""Milliseconds that a query may take longer."""
RATE = 1000
"""Queries a second, at least."""
_CLIENTS, _ROWS = 8, 100_000
_HOST = "data.corral.internal"
_PASSWORD = "benchmark-only"  # noqa: S105
_SQL = "SELECT id, name, price FROM goods WHERE id = :id"


# ---- the broker's process ----


async def _serve(dialect: str, url: str) -> None:
    from corral.actions import Origin
    from corral.brokers.data.broker import prepare
    from corral.brokers.http import Connection, Room
    from corral.brokers.setting import Setting
    from corral.monitor.core import Monitor
    from corral.monitor.steps import Execs
    from corral.policy.model import Column, Data, DataLimits, DataRule, Dialect, Policy, Source, TableScope
    from corral.policy.part import PolicyPart

    class Nowhere:
        def write(self, decision: object) -> None:
            """A record that costs nothing."""

    table = TableScope("goods", (Column("id"), Column("name", personal=True), Column("price")), "shop = 1")
    limits = DataLimits(queries_per_minute=1_000_000, concurrent=_CLIENTS)
    source = Source("shop", Dialect(dialect), url, "env:PASSWORD" if "@" in url else "", tables=(table,), limits=limits)
    policy = Policy(data=Data(allow=(DataRule("shop", ("select",)),), sources=(source,)))
    monitor = Monitor(policy=PolicyPart(policy), sink=Nowhere())
    setting = Setting("box", "box", policy, monitor, Execs(), (), None, sys.exit, "")
    broker, origin, room = prepare(policy, os.environ)(setting), Origin("box", "box"), Room(1 << 28)
    server = await asyncio.get_running_loop().create_server(
        lambda: Connection(_HOST, origin, broker.handle, broker.max_body, room, lambda reason: None), "127.0.0.1", 0
    )
    print(server.sockets[0].getsockname()[1], flush=True)
    await server.serve_forever()


@contextlib.contextmanager
def _broker(dialect: str, url: str) -> Iterator[int]:
    argv = [sys.executable, __file__, dialect, url]
    process = subprocess.Popen(argv, stdout=subprocess.PIPE, env={**os.environ, "PASSWORD": _PASSWORD})
    assert process.stdout is not None
    try:
        yield int(process.stdout.readline())
    finally:
        process.kill()
        process.wait()


# ---- clients ----


def _ask(sock: socket.socket, number: int) -> None:
    asked = {"source": "shop", "sql": _SQL, "parameters": {"id": number}}
    body = json.dumps(asked).encode()
    sock.sendall(
        b"POST /v1/query HTTP/1.1\r\nhost: %s\r\ncontent-length: %d\r\n\r\n" % (_HOST.encode(), len(body)) + body
    )
    got = b""
    while b"\r\n\r\n" not in got:
        got += sock.recv(65536)
    head, _, rest = got.partition(b"\r\n\r\n")
    length = int(head.lower().split(b"content-length:")[1].split()[0])
    while len(rest) < length:
        rest += sock.recv(65536)
    assert head.startswith(b"HTTP/1.1 200") and len(json.loads(rest)["rows"]) == number % 2, rest


def _one_by_one(port: int, count: int) -> list[float]:
    found = []
    with socket.create_connection(("127.0.0.1", port)) as sock:
        for number in range(count + 20):
            began = time.perf_counter()
            _ask(sock, 1 + number * 37 % _ROWS)
            found.append(time.perf_counter() - began)
    return found[20:]


_CROWD = (
    "import sys; sys.path.insert(0, sys.argv[1]); from _data_broker import client; client(sys.argv[2], sys.argv[3])"
)


def client(port: str, count: str) -> None:
    """One of many, a process of its own: begins when it is told, and says when it is done."""
    with socket.create_connection(("127.0.0.1", int(port))) as sock:
        _ask(sock, 1)
        print("ready", flush=True)
        sys.stdin.readline()
        for number in range(int(count)):
            _ask(sock, 1 + number * 37 % _ROWS)


def _at_once(port: int, count: int) -> float:
    """Queries a second of all clients together."""
    argv = [sys.executable, "-c", _CROWD, str(Path(__file__).parent), str(port), str(count)]
    pipes = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE}
    clients = [subprocess.Popen(argv, **pipes) for _ in range(_CLIENTS)]  # type: ignore[call-overload]
    for each in clients:
        each.stdout.readline()
    began = time.perf_counter()
    for each in clients:
        each.stdin.write(b"\n")
        each.stdin.close()
    for each in clients:
        assert each.wait() == 0
    return _CLIENTS * count / (time.perf_counter() - began)


# ---- databases ----

_CREATE = "CREATE TABLE goods (id INT PRIMARY KEY, shop INT, name VARCHAR(40), price INT)"


@contextlib.contextmanager
def _postgresql() -> Iterator[int]:
    """Its port. Raises FileNotFoundError where it is not installed."""
    import psycopg

    binaries = sorted(Path("/usr/lib/postgresql").glob("*/bin"))
    if not binaries:
        raise FileNotFoundError("PostgreSQL is not installed")
    directory = Path(tempfile.mkdtemp(prefix="corral-bench-pg-", dir="/tmp"))
    who: dict[str, Any] = {}
    if os.getuid() == 0:  # as whom it does not run
        entry = pwd.getpwnam("postgres")
        who = {"user": entry.pw_uid, "group": entry.pw_gid, "extra_groups": []}
        shutil.chown(directory, "postgres")
    with socket.socket() as sock:
        sock.bind(("127.0.0.1", 0))
        port = sock.getsockname()[1]
    data = str(directory / "data")
    argv = [str(binaries[-1] / "initdb"), "-D", data, "-U", "admin", "-A", "trust", "--no-sync"]
    subprocess.run(argv, check=True, stdout=subprocess.DEVNULL, cwd="/", **who)
    argv = [str(binaries[-1] / "postgres"), "-D", data, "-p", str(port), "-h", "127.0.0.1", "-k", str(directory)]
    process = subprocess.Popen(argv, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL, cwd="/", **who)
    try:
        for _ in range(200):
            try:
                connection = psycopg.connect(f"host=127.0.0.1 port={port} user=admin dbname=postgres", autocommit=True)
                break
            except psycopg.OperationalError:
                time.sleep(0.1)
        with connection:
            connection.execute(f"CREATE ROLE agent LOGIN PASSWORD '{_PASSWORD}'".encode())
            connection.execute(_CREATE.encode())
            connection.execute(
                b"INSERT INTO goods SELECT i, i %% 2, 'name ' || i, i FROM generate_series(1, %s) i", (_ROWS,)
            )
            connection.execute(b"GRANT SELECT ON goods TO agent")
            connection.execute(b"ANALYZE goods")
        yield port
    finally:
        process.terminate()
        process.wait()
        shutil.rmtree(directory, ignore_errors=True)


def _directly(port: int, count: int) -> list[float]:
    import psycopg

    found = []
    with psycopg.connect(f"host=127.0.0.1 port={port} user=admin dbname=postgres", autocommit=True) as connection:
        for number in range(count + 20):
            began = time.perf_counter()
            key = 1 + number * 37 % _ROWS
            connection.execute("SELECT id, name, price FROM goods WHERE shop = 1 AND id = %s", (key,)).fetchall()
            found.append(time.perf_counter() - began)
    return found[20:]


# ---- figures ----


async def data_postgresql_figure(workspace: Path, quick: bool) -> list[Row]:
    """One client, and many."""
    count = 200 if quick else 1000
    try:
        with _postgresql() as port, _broker("postgresql", f"postgresql://agent@127.0.0.1:{port}/postgres") as door:
            say("  PostgreSQL")
            direct = await asyncio.to_thread(_directly, port, count)
            ours = await asyncio.to_thread(_one_by_one, door, count)
            rate = await asyncio.to_thread(_at_once, door, count)
    except FileNotFoundError as error:
        return [Row("data: a query of PostgreSQL, added", "ms", bar=ADDED, note=f"skipped: {error}")]
    middle = statistics.median(direct)
    return [
        Row(
            "data: a query of PostgreSQL, added",
            "ms",
            1000 * (statistics.median(ours) - middle),
            1000 * (p95(ours) - middle),
            bar=ADDED,
        ),
        Row("data: a query of PostgreSQL, direct", "ms", 1000 * middle, 1000 * p95(direct)),
        Row(f"data: PostgreSQL, {_CLIENTS} clients", "queries/s", rate, least=RATE),
    ]


async def data_sqlite_figure(workspace: Path, quick: bool) -> list[Row]:
    """The same; what is added is all of it."""
    count = 200 if quick else 1000
    path = workspace / "goods.db"
    with sqlite3.connect(path) as connection:
        connection.execute(_CREATE)
        rows = ((number, number % 2, f"name {number}", number) for number in range(1, _ROWS + 1))
        connection.executemany("INSERT INTO goods VALUES (?, ?, ?, ?)", rows)
    connection.close()
    with _broker("sqlite", str(path)) as door:
        say("  SQLite")
        ours = await asyncio.to_thread(_one_by_one, door, count)
        rate = await asyncio.to_thread(_at_once, door, count)
    return [
        Row("data: a query of SQLite", "ms", 1000 * statistics.median(ours), 1000 * p95(ours), bar=ADDED),
        Row(f"data: SQLite, {_CLIENTS} clients", "queries/s", rate, least=RATE),
    ]


if __name__ == "__main__":
    asyncio.run(_serve(*sys.argv[1:]))
