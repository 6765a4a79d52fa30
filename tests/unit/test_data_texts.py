"""Texts on their way to a database and back: parsing ends, values stay values, names say nothing of the scope."""

from __future__ import annotations

from collections.abc import AsyncIterator
from pathlib import Path
from unittest import mock

import pytest
from hypothesis import given
from hypothesis import strategies as st

from corral.brokers.data import parsing
from corral.brokers.data.faults import QueryRefused
from corral.brokers.data.reading import read
from corral.brokers.data.template import Slot, Template, write
from corral.policy.model import Dialect
from tests.unit.data_world import World, make_duckdb, make_sqlite, source_of

_DEPTH = 38


def _nested(begin: str, end: str, inner: str = "1") -> str:
    return f"SELECT {begin * _DEPTH}{inner}{end * _DEPTH}"


@pytest.mark.parametrize(
    "text",
    [
        _nested("DECIMAL(", ")"),
        _nested("TIMESTAMP(", ")"),
        _nested("ROW(", ")"),
        _nested("STRUCT(", "a )"),
        _nested("ENUM(", ")", "a"),
        "SELECT CAST(1 AS " + "STRUCT(" * _DEPTH + "a INT" + ")" * _DEPTH + ")",
        "SELECT " + "(DECIMAL(" * 19 + "1" + "))" * 19,
    ],
)
@pytest.mark.parametrize("dialect", Dialect)
def test_what_can_be_read_in_many_ways_is_not(text: str, dialect: Dialect) -> None:
    """Each of them doubles with each level: without a bound this test does not end."""
    try:
        tree = read(text, dialect)
    except QueryRefused as refused:
        assert "too long" in str(refused) or "parsed" in str(refused) or "understood" in str(refused)
    else:
        assert tree is not None


@pytest.mark.parametrize("dialect", Dialect)
def test_long_queries_are_within_the_steps(dialect: Dialect) -> None:
    """A tenth of the bound is enough for what people write."""
    condition = " AND ".join(
        f"(coalesce(a.x{n}, CAST(b.y AS DECIMAL(10, 2))) > {n} OR a.z IN (1, 2))" for n in range(40)
    )
    text = f"SELECT CASE WHEN a.x > 1 THEN 'x' ELSE lower(a.n) END AS c FROM a JOIN b ON a.i = b.i WHERE {condition}"
    tokens = parsing.tokenize(text, dialect)
    parser = parsing._parser(dialect)(dialect=parsing._sqlglot(dialect))
    parser.left = 1_000_000
    parser.parse(tokens, text)
    assert 1_000_000 - parser.left < parsing.STEPS_PER_TOKEN * len(tokens) / 3


@given(st.one_of(st.floats(allow_nan=False, allow_infinity=False), st.integers(-(1 << 63) + 1, (1 << 63) - 1)))
def test_a_number_begins_no_comment(value: float) -> None:
    for dialect in Dialect:
        template = Template(("SELECT -", Slot("p", parameter=True), ", 1"), dialect)
        assert "--" not in template.fill({"p": value})
        assert type(value)(write(value, dialect).strip("()")) == value


@pytest.fixture(params=[Dialect.SQLITE, Dialect.DUCKDB], ids=lambda dialect: dialect.value)
async def world(request: pytest.FixtureRequest, tmp_path: Path) -> AsyncIterator[World]:
    dialect: Dialect = request.param
    {Dialect.SQLITE: make_sqlite, Dialect.DUCKDB: make_duckdb}[dialect](tmp_path / "crm.db", oracle=False)
    made = World(source_of(dialect, str(tmp_path / "crm.db")))
    yield made
    await made.desk.close()


async def test_nothing_follows_a_negative_nought(world: World) -> None:
    """-0.0 is not less than 0, and after a minus it was the beginning of a comment, which a line of a text ends."""
    mark = "$" if world.desk.source.dialect is Dialect.DUCKDB else ":"
    status, body = await world.ask(f"SELECT - {mark}p AS a, 'x\nsalary AS y FROM payroll --' AS b", {"p": -0.0})
    assert (status, body["columns"]) == (200, ["a", "b"])
    assert body["rows"][0][1] == "x\nsalary AS y FROM payroll --"


async def test_columns_without_a_name_do_not_say_what_was_run(world: World) -> None:
    """SQLite, DuckDB and MySQL call a column by its expression: fences, with their filters."""
    status, body = await world.ask(
        "SELECT id, (SELECT max(id) FROM customers), id IN (SELECT id FROM customers) FROM orders AS o WHERE o.id = 10"
    )
    assert (status, body["columns"]) == (200, ["id", "column2", "column3"])
    status, body = await world.ask("SELECT * FROM (SELECT exists(SELECT 1 FROM customers), 2 AS two) AS x")
    assert (status, body["columns"]) == (200, ["column1", "two"])


async def test_parameters_are_written_alike_for_all(world: World) -> None:
    """DuckDB's own are $name, and a colon means other things there."""
    for begin in (":p", "- :p", "-:p", "1 + :p", "(:p)", "coalesce(:p, 2)"):
        status, body = await world.ask(f"SELECT {begin} AS a, name FROM customers WHERE id = :p", {"p": 1})
        assert (status, body["columns"], body["rows"][0][1]) == (200, ["a", "name"], "Ada"), begin
    for text in ("SELECT name: 1 FROM customers", "SELECT id FROM c: customers", "SELECT name:id FROM customers"):
        if world.desk.source.dialect is Dialect.DUCKDB:
            assert (await world.ask(text))[1]["error"]["type"] == "refused", text


async def test_a_tree_that_is_not_as_it_should_be_is_refused(world: World) -> None:
    with mock.patch("corral.brokers.data.plans.compile_read", side_effect=AttributeError("secret")):
        status, body = await world.ask("SELECT id FROM customers")
    assert (status, body["error"]["message"]) == (400, "The query is not understood.")
