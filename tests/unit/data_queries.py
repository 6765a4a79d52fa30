"""Queries over the scope of data_world, made at random."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable
from typing import TypeVar

from hypothesis import strategies as st

from corral.policy.model import Dialect

ANSWERED: Counter[Dialect] = Counter()
_T = TypeVar("_T")
_Draw = Callable[[st.SearchStrategy[_T]], _T]

_NUMBERS = {"customers": ("id", "balance", "divisor"), "orders": ("id", "customer_id", "total"), "vip": ("id",)}
_TEXTS = {"customers": ("name", "email", "phone", "note"), "orders": ("status",), "vip": ("name",)}


@st.composite
def queries(draw: st.DrawFn) -> str:
    """One query that a database with nothing but the scope can answer without an error."""
    kind = draw(st.sampled_from(("plain", "plain", "grouped", "join", "set", "common", "derived")))
    if kind == "join":
        return _join(draw)
    if kind == "set":
        word = draw(st.sampled_from(("UNION", "UNION ALL")))
        return f"{_plain(draw, width=1)} {word} {_plain(draw, width=1)}"
    if kind == "common":
        table = _table(draw)
        inner = f"SELECT * FROM {table} WHERE {_condition(draw, table, '')}"
        return f"WITH w AS ({inner}) SELECT count(*), min(id) FROM w WHERE {_condition(draw, table, 'w.')}"
    if kind == "derived":
        table = _table(draw)
        inner = f"SELECT * FROM {table} AS i WHERE {_condition(draw, table, 'i.')}"
        return f"SELECT d.id FROM ({inner}) AS d WHERE {_condition(draw, table, 'd.')}"
    if kind == "grouped":
        table = _table(draw)
        column = draw(st.sampled_from((*_NUMBERS[table], *_TEXTS[table])))
        value = _number(draw, table, "")
        having = draw(st.sampled_from(("", " HAVING count(*) > 1", f" HAVING min({value}) > 2")))
        where = _condition(draw, table, "")
        return f"SELECT {column}, count(*), max({value}) FROM {table} WHERE {where} GROUP BY {column}{having}"
    return _plain(draw, width=draw(st.integers(1, 3)))


def _table(draw: st.DrawFn) -> str:
    return draw(st.sampled_from(tuple(_NUMBERS)))


def _plain(draw: st.DrawFn, *, width: int) -> str:
    table = _table(draw)
    alias = draw(st.sampled_from(("t", "customers", "x_1")))
    columns = ", ".join(_number(draw, table, f"{alias}.") for _ in range(width))
    order = draw(st.sampled_from(("", f" ORDER BY {alias}.id LIMIT 2", f" ORDER BY {alias}.id DESC LIMIT 3")))
    order = "" if width == 1 else order  # it may be an arm of a UNION
    return f"SELECT {columns} FROM {table} AS {alias} WHERE {_condition(draw, table, f'{alias}.')}{order}"


def _join(draw: st.DrawFn) -> str:
    left, right = _table(draw), _table(draw)
    kind = draw(st.sampled_from(("JOIN", "LEFT JOIN", "RIGHT JOIN")))
    on = draw(st.sampled_from(("a.id = b.id", "a.id < b.id", f"a.id = {_number(draw, right, 'b.')}")))
    where = draw(st.sampled_from(("1 = 1", _condition(draw, left, "a."), _condition(draw, right, "b."))))
    return f"SELECT a.id, b.id AS other FROM {left} a {kind} {right} b ON {on} WHERE {where}"


def _number(draw: st.DrawFn, table: str, prefix: str, depth: int = 2) -> str:
    column = draw(st.sampled_from(_NUMBERS[table]))
    simple = [f"{prefix}{column}", str(draw(st.integers(0, 1000)))]
    if table == "customers":  # what fails, or takes another way, for hidden rows alone
        simple += [f"(100 % {prefix}divisor)", f"CASE WHEN {prefix}id > 3 THEN 7 % {prefix}divisor ELSE 0 END"]
    if depth:
        other = _number(draw, table, prefix, depth - 1)
        simple += [f"({prefix}{column} + {other})", f"abs({other} - 5)", f"coalesce(nullif({other}, 2), 4)"]
    return draw(st.sampled_from(simple))


def _condition(draw: st.DrawFn, table: str, prefix: str, depth: int = 2) -> str:
    text = draw(st.sampled_from(_TEXTS[table]))
    number = _number(draw, table, prefix, 1)
    simple = [
        f"{number} {draw(st.sampled_from(('<', '>', '=', '<>', '>=')))} {_number(draw, table, prefix, 1)}",
        f"{prefix}{text} = '{draw(st.sampled_from(('Ada', 'Hidden', 'paid', 'x', '***', '10')))}'",
        f"{prefix}{text} LIKE '{draw(st.sampled_from(('%a%', 'H%', '_d_', '%example')))}'",
        f"{prefix}{text} IS {draw(st.sampled_from(('NULL', 'NOT NULL')))}",
        f"{prefix}id IN ({draw(st.sampled_from(('1, 4', '4, 5', '10, 13')))})",
        f"{prefix}id BETWEEN {draw(st.integers(0, 6))} AND {draw(st.integers(0, 20))}",
        f"{prefix}id = {draw(st.integers(1, 14))}",
    ]
    if depth:
        inner, outer = (_condition(draw, table, prefix, depth - 1) for _ in range(2))
        other = _table(draw)
        some = _condition(draw, other, "s.", depth - 1)
        simple += [
            f"({inner} AND {outer})",
            f"({inner} OR {outer})",
            f"NOT ({inner})",
            f"EXISTS (SELECT 1 FROM {other} s WHERE {some})",
            f"{prefix}id IN (SELECT s.id FROM {other} s WHERE {some})",
            f"(SELECT count(*) FROM {other} s WHERE s.id > {prefix}id) > 1" if prefix else inner,
        ]
    return draw(st.sampled_from(simple))
