"""Whether all of a tree is on the lists of :mod:`corral.brokers.data.grammar`. Nothing is changed here."""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping

from sqlglot import exp

from corral.brokers.data import grammar
from corral.brokers.data.faults import QueryRefused
from corral.policy.model import Dialect

_NAME = re.compile(r"[A-Za-z_][A-Za-z0-9_ ]{0,62}")
"""What an agent may call something. Servers fold, truncate and compare other names each in its own way."""
_NUMBER = re.compile(r"[0-9]{1,40}(\.[0-9]{0,40})?([eE][+-]?[0-9]{1,3})?|\.[0-9]{1,40}")
_SEPARATOR = re.compile(r"[ -!#-&(-\[\]-~]{0,16}")
RESERVED = "corral_"
"""Names that begin so are ours."""


def check(tree: exp.Expr, dialect: Dialect) -> None:
    """Raises QueryRefused for what is not on the lists."""
    seen = 0
    stack = [tree]
    while stack:
        node = stack.pop()
        seen += 1
        if seen > grammar.MAX_NODES:
            raise QueryRefused("the query is too large")
        allowed = grammar.NODES.get(type(node))
        if allowed is None or type(node) in grammar.NOT_IN[dialect]:
            raise QueryRefused(f"this is not supported in a query: {_word(node)}")
        for name, value in node.args.items():
            if value is None or value is False or value == [] or value == ():
                continue
            if name not in allowed:
                raise QueryRefused(f"this is not supported in a query: {_word(node)} with {name.strip('_')}")
            for each in value if isinstance(value, list) else (value,):
                if isinstance(each, exp.Expr):
                    stack.append(each)
                else:
                    _check_plain(node, name, each)
        special = _SPECIAL.get(type(node))
        if special is not None:
            special(node, dialect)


def _word(node: exp.Expr) -> str:
    """What it is, in sqlglot's word: no text of the query, which may be anything."""
    return re.sub(r"(?<=[a-z])(?=[A-Z])", " ", type(node).__name__).lower()


def _check_plain(node: exp.Expr, name: str, value: object) -> None:
    if value is True:
        if name in grammar.FLAGS:
            return
    elif isinstance(node, exp.Identifier | exp.Literal | exp.Placeholder | exp.Var | exp.DataType) and name == "this":
        return  # each has its own check
    elif isinstance(value, str) and value.upper() in grammar.WORDS.get((type(node), name), ()):
        return
    raise QueryRefused(f"this is not supported in a query: {_word(node)} with {name.strip('_')}")


def check_name(name: str) -> None:
    """Whether an agent may call something so. Raises QueryRefused."""
    if not _NAME.fullmatch(name) or name.lower().startswith(RESERVED):
        raise QueryRefused(
            "a name of the query may have 63 letters, digits, blanks and underscores, not from corral_ on"
        )


def _literal(node: exp.Expr, dialect: Dialect) -> None:
    text = str(node.this)
    if not node.args.get("is_string"):
        if not _NUMBER.fullmatch(text):
            raise QueryRefused("a number of the query is not written as one")
    elif len(text) > grammar.MAX_STRING:
        raise QueryRefused(f"a text of the query is longer than {grammar.MAX_STRING} characters")


def _integer(node: exp.Expr | None) -> bool:
    return type(node) is exp.Literal and not node.args.get("is_string") and str(node.this).isdigit()


def _table(node: exp.Expr, dialect: Dialect) -> None:
    if type(node.this) is not exp.Identifier:
        raise QueryRefused("a query reads from tables, not from functions")


def _column(node: exp.Expr, dialect: Dialect) -> None:
    if type(node.this) not in (exp.Identifier, exp.Star):
        raise QueryRefused("a column of the query is not a name")


def _var(node: exp.Expr, dialect: Dialect) -> None:
    parent = node.parent
    if str(node.this).upper() not in grammar.UNITS or not isinstance(
        parent, exp.Extract | exp.TimestampTrunc | exp.DateTrunc | exp.Interval
    ):
        raise QueryRefused("a word of the query is not supported")
    node.set("this", str(node.this).upper())


def _interval(node: exp.Expr, dialect: Dialect) -> None:
    amount = node.this
    if (
        type(amount) is not exp.Literal
        or not re.fullmatch(r"-?[0-9]{1,9}", str(amount.this))
        or not node.args.get("unit")
    ):
        raise QueryRefused("an interval is a whole number and a unit")


def _truncation(node: exp.Expr, dialect: Dialect) -> None:
    unit = node.args.get("unit")
    if type(unit) is exp.Literal:
        unit = exp.Var(this=str(unit.this).upper())
        node.set("unit", unit)
    if type(unit) is not exp.Var:
        raise QueryRefused("a unit of time is a word")


def _type(node: exp.Expr, dialect: Dialect) -> None:
    name = getattr(node.this, "name", "")
    if name not in grammar.TYPES:
        raise QueryRefused("a value cannot be cast to this type here")
    for parameter in node.expressions:
        inner = parameter.this if type(parameter) is exp.DataTypeParam else None
        if inner is None or not _integer(inner) or int(str(inner.this)) > grammar.MAX_TYPE_PARAMETER:
            raise QueryRefused("a value cannot be cast to this type here")


def _like(node: exp.Expr, dialect: Dialect) -> None:
    pattern = node.expression
    if type(pattern) is exp.Placeholder:
        return  # when it is bound
    if type(pattern) is not exp.Literal or not pattern.args.get("is_string"):
        raise QueryRefused("the pattern of LIKE is a text, or a parameter")
    check_pattern(str(pattern.this))


def check_pattern(pattern: str) -> None:
    """Whether matching it ends soon. Raises QueryRefused."""
    if len(pattern) > grammar.MAX_PATTERN or len(re.findall(r"%+", pattern)) > grammar.MAX_WILDCARDS:
        raise QueryRefused(
            f"a pattern of LIKE has at most {grammar.MAX_PATTERN} characters and {grammar.MAX_WILDCARDS} wildcards"
        )


def _bound(node: exp.Expr, dialect: Dialect) -> None:
    if not _integer(node.expression):
        raise QueryRefused("LIMIT and OFFSET are whole numbers, written as such")


def _window(node: exp.Expr, dialect: Dialect) -> None:
    over = node.this
    if type(over) is exp.Filter:
        over = over.this
    if type(over) not in grammar.WINDOWED:
        raise QueryRefused("this function cannot be over a window here")


def _shift(node: exp.Expr, dialect: Dialect) -> None:
    if node.args.get("offset") is not None and not _integer(node.args["offset"]):
        raise QueryRefused("a window reaches back or forward by a whole number")


def _frame(node: exp.Expr, dialect: Dialect) -> None:
    for name in ("start", "end"):
        value = node.args.get(name)
        if isinstance(value, exp.Expr) and not _integer(value):
            raise QueryRefused("the frame of a window is given by whole numbers")


def _separator(node: exp.Expr, dialect: Dialect) -> None:
    separator = node.args.get("separator")
    if separator is None:
        return
    if type(separator) is not exp.Literal or not _SEPARATOR.fullmatch(str(separator.this)):
        raise QueryRefused("a separator is a short text without quotes and backslashes")


def _round(node: exp.Expr, dialect: Dialect) -> None:
    decimals = node.args.get("decimals")
    if decimals is not None and (not _integer(decimals) or int(str(decimals.this)) > 30):
        raise QueryRefused("values are rounded to a whole number of digits, written as such")


def _tuple(node: exp.Expr, dialect: Dialect) -> None:
    if not isinstance(node.parent, exp.In | exp.Values | exp.Tuple):
        raise QueryRefused("a row of values is only understood in IN and VALUES")


def _distinct(node: exp.Expr, dialect: Dialect) -> None:
    if node.expressions and not isinstance(node.parent, exp.Count | exp.Sum | exp.Avg | exp.GroupConcat):
        raise QueryRefused("this is not supported in a query: distinct with on")


def _join(node: exp.Expr, dialect: Dialect) -> None:
    side, kind = str(node.args.get("side") or "").upper(), str(node.args.get("kind") or "").upper()
    if dialect is Dialect.MYSQL and side == "FULL":
        raise QueryRefused("this source has no full join")
    if kind == "OUTER" and not side:
        raise QueryRefused("an outer join has a side")


def _parameter(node: exp.Expr, dialect: Dialect) -> None:
    if not isinstance(node.this, str) or not re.fullmatch(r"[A-Za-z_][A-Za-z0-9_]{0,62}", node.this):
        raise QueryRefused("a parameter is written :name")


def _identifier(node: exp.Expr, dialect: Dialect) -> None:
    if not isinstance(node.this, str) or not node.this or len(node.this) > 255:
        raise QueryRefused("a name of the query is empty or too long")


def _star(node: exp.Expr, dialect: Dialect) -> None:
    if not isinstance(node.parent, exp.Select | exp.Count | exp.Column | exp.Returning):
        raise QueryRefused("a * stands for columns in SELECT only")


_SPECIAL: Mapping[type[exp.Expr], Callable[[exp.Expr, Dialect], None]] = {
    exp.Literal: _literal,
    exp.Table: _table,
    exp.Column: _column,
    exp.Var: _var,
    exp.Interval: _interval,
    exp.TimestampTrunc: _truncation,
    exp.DateTrunc: _truncation,
    exp.DataType: _type,
    exp.Like: _like,
    exp.ILike: _like,
    exp.Limit: _bound,
    exp.Offset: _bound,
    exp.Window: _window,
    exp.Lag: _shift,
    exp.Lead: _shift,
    exp.WindowSpec: _frame,
    exp.GroupConcat: _separator,
    exp.Round: _round,
    exp.Tuple: _tuple,
    exp.Distinct: _distinct,
    exp.Join: _join,
    exp.Placeholder: _parameter,
    exp.Identifier: _identifier,
    exp.Star: _star,
}
