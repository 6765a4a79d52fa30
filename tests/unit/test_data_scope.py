"""The scope of the data broker holds: attacks, each compared with a database that holds nothing but the scope."""

from __future__ import annotations

import re
import sqlite3
from collections import Counter
from collections.abc import AsyncIterator, Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from unittest import mock

import duckdb
import psycopg
import pymysql
import pytest
from hypothesis import HealthCheck, given, settings

from corral.brokers.data.values import to_json
from corral.policy.model import Dialect
from tests.unit import data_queries, databases
from tests.unit.data_world import (
    KEY,
    World,
    make_duckdb,
    make_mysql,
    make_postgresql,
    make_sqlite,
    source_of,
)

_LETTERS = {"p": Dialect.POSTGRESQL, "m": Dialect.MYSQL, "s": Dialect.SQLITE, "d": Dialect.DUCKDB}
_HIDDEN = re.compile(
    r"s3cret|Hidden|Zero|two\.example|one\.example|555 01|999999|987654|hidden-note|not a number|411\d|salary|tenant"
)
"""What is in the source and not in the scope. Names of columns are here that a query of the corpus does not have."""


@dataclass(frozen=True)
class Attack:
    name: str
    dialects: tuple[Dialect, ...]
    expected: str
    sql: str


def _attacks() -> list[Attack]:
    text = (Path(__file__).parent / "data" / "sql_attacks.txt").read_text(encoding="utf-8")
    found = []
    for part in re.split(r"^== ", text, flags=re.MULTILINE)[1:]:
        head, _, sql = part.partition("\n")
        name, dialects, expected = (each.strip() for each in head.split("|"))
        letters = "pmsd" if dialects == "all" else dialects
        sql = sql.rstrip("\n").replace("\\0", "\0")
        found.append(Attack(name, tuple(_LETTERS[letter] for letter in letters), expected, sql))
    return found


ATTACKS = _attacks()


@dataclass
class Place:
    """A source and its oracle."""

    url: str
    oracle: Callable[[str], list[tuple[Any, ...]]]
    """Raises the library's error."""


@pytest.fixture(scope="module")
def key() -> Iterator[None]:
    with mock.patch("secrets.token_hex", lambda count: KEY):
        yield


@pytest.fixture(scope="module")
def postgresql() -> Iterator[Place]:
    with databases.postgresql() as server:
        make_postgresql(server.port, "crm", oracle=False)
        make_postgresql(server.port, "oracle", oracle=True)
        with psycopg.connect(databases.admin(server.port, "oracle"), autocommit=True) as connection:

            def ask(sql: str) -> list[tuple[Any, ...]]:
                return connection.execute(sql.encode()).fetchall()

            yield Place(f"postgresql://agent@127.0.0.1:{server.port}/crm", ask)


@pytest.fixture(scope="module")
def mysql() -> Iterator[Place]:
    with databases.mariadb() as server:
        make_mysql(server.port, "crm", oracle=False)
        make_mysql(server.port, "oracle", oracle=True)
        connection = databases.maria_root(server.port, "oracle")

        def ask(sql: str) -> list[tuple[Any, ...]]:
            with connection.cursor() as cursor:
                cursor.execute(sql)
                return list(cursor.fetchall())

        yield Place(f"mysql://agent@127.0.0.1:{server.port}/crm", ask)
        connection.close()


@pytest.fixture(scope="module")
def sqlite(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Place]:
    directory = tmp_path_factory.mktemp("sqlite")
    make_sqlite(directory / "crm.db", oracle=False)
    make_sqlite(directory / "oracle.db", oracle=True)
    connection = sqlite3.connect(directory / "oracle.db")
    yield Place(str(directory / "crm.db"), lambda sql: connection.execute(sql).fetchall())
    connection.close()


@pytest.fixture(scope="module")
def duck(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Place]:
    directory = tmp_path_factory.mktemp("duckdb")
    make_duckdb(directory / "crm.db", oracle=False)
    make_duckdb(directory / "oracle.db", oracle=True)
    connection = duckdb.connect(str(directory / "oracle.db"))
    yield Place(str(directory / "crm.db"), lambda sql: connection.execute(sql).fetchall())
    connection.close()


@pytest.fixture(params=list(Dialect), ids=lambda dialect: dialect.value)
def dialect(request: pytest.FixtureRequest) -> Dialect:
    assert isinstance(request.param, Dialect)
    return request.param


@pytest.fixture
def place(dialect: Dialect, request: pytest.FixtureRequest) -> Place:
    names = {Dialect.POSTGRESQL: "postgresql", Dialect.MYSQL: "mysql", Dialect.SQLITE: "sqlite"}
    found = request.getfixturevalue(names.get(dialect, "duck"))
    assert isinstance(found, Place)
    return found


@pytest.fixture
async def world(place: Place, dialect: Dialect, key: None) -> AsyncIterator[World]:
    made = World(source_of(dialect, place.url))
    yield made
    await made.desk.close()


_ERRORS = (sqlite3.Error, duckdb.Error, psycopg.Error, pymysql.Error)


def test_the_corpus_is_large_enough() -> None:
    assert len(ATTACKS) >= 150
    assert max(Counter(attack.name for attack in ATTACKS).values()) <= 2  # one that differs by dialect
    assert {attack.expected for attack in ATTACKS} == {"refused", "harmless"}


async def test_attacks(world: World, place: Place, dialect: Dialect) -> None:
    wrong = []
    for attack in ATTACKS:
        if dialect not in attack.dialects:
            continue
        decisions = len(world.told.decisions)
        status, body = await world.ask(attack.sql)
        problem = ""
        if _HIDDEN.search(_answered(body, attack.sql)):
            problem = "shows what is hidden"
        elif attack.expected == "refused":
            if status != 400 or body["error"]["type"] != "refused" or len(world.told.decisions) != decisions:
                problem = "is not refused"
        else:
            problem = _differs(status, body, attack, place)
        if problem:
            wrong.append(f"{attack.name}: {problem}: {attack.sql!r}: {status} {body}")
    assert not wrong, "\n".join(wrong)


def _answered(body: Any, sql: str) -> str:
    """What is said that the query did not say itself."""
    text = str(body)
    for word in re.findall(r"\w+", sql):
        text = text.replace(word, "") if _HIDDEN.search(word) else text
    return text


def _differs(status: int, body: Any, attack: Attack, place: Place) -> str:
    try:
        expected = place.oracle(attack.sql)
    except _ERRORS as error:
        return "" if status in (400, 403) else f"the oracle fails: {error}"
    if status != 200:
        return f"the oracle answers {expected}"
    there = sorted(to_json(row) for row in expected)
    here = sorted(to_json(tuple(row)) for row in body["rows"])
    return "" if here == there else f"the oracle answers {there}"


@settings(
    max_examples=150, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture, HealthCheck.too_slow]
)
@given(query=data_queries.queries())
async def test_any_query_sees_the_scope_only(world: World, place: Place, dialect: Dialect, query: str) -> None:
    """Queries of a grammar: what fails for rows that are not there fails in none of them."""
    status, body = await world.ask(query)
    assert not _HIDDEN.search(_answered(body, query)), query
    if status == 400 and body["error"]["type"] == "refused":
        return
    problem = _differs(status, body, Attack("", (dialect,), "harmless", query), place)
    assert not problem, f"{query}: {problem}: {status} {body}"
    data_queries.ANSWERED[dialect] += 1


def test_most_queries_of_the_grammar_were_answered() -> None:
    """Else the one before says little."""
    if not data_queries.ANSWERED:
        pytest.skip("it was not run")
    assert all(data_queries.ANSWERED[dialect] >= 75 for dialect in Dialect), data_queries.ANSWERED
