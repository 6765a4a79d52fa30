"""What a query may consist of. What is not on these lists is refused, whatever it may mean.

The lists are by the node types of sqlglot, each with those of its arguments that may be given: syntax that a newer
version of it understands becomes an argument or a node that is not here. They hold for all dialects, except where a
dialect is named. What is left out on purpose: everything with a side effect or a state; functions that return rows or
read files; regular expressions, ``repeat``, ``replace``, ``power`` and whatever else makes a small query a large
computation that a time-out does not end at once; recursion, LATERAL, NATURAL, hints, locks, samples, types by name.
"""

from __future__ import annotations

from collections.abc import Mapping

from sqlglot import exp

from corral.policy.model import Dialect

MAX_TEXT = 16 * 1024
"""Characters of a query."""
MAX_TOKENS = 2000
MAX_NESTING = 40
"""Of parentheses."""
MAX_NODES = 4000
MAX_RELATIONS = 24
"""Tables, subqueries and common table expressions of one query."""
MAX_STRING = 8 * 1024
"""Characters of a text in a query, or of a parameter."""
MAX_PARAMETERS = 200
MAX_WILDCARDS = 8
"""``%`` and ``_`` runs of one LIKE pattern: what it takes to match grows with the power of their number."""
MAX_PATTERN = 200

SQLGLOT: Mapping[Dialect, str] = {
    Dialect.DUCKDB: "duckdb",
    Dialect.MYSQL: "mysql",
    Dialect.POSTGRESQL: "postgres",
    Dialect.SQLITE: "sqlite",
}


def _arguments(words: str) -> frozenset[str]:
    return frozenset(words.split())


_ONE = _arguments("this")
_TWO = _arguments("this expression")
_SELECT = _arguments("expressions distinct from_ joins where group having order limit offset with_")
_SET = _arguments("this expression distinct order limit offset with_")

NODES: Mapping[type[exp.Expr], frozenset[str]] = {
    # queries
    exp.Select: _SELECT,
    exp.Union: _SET,
    exp.Intersect: _SET,
    exp.Except: _SET,
    exp.Subquery: _arguments("this alias order limit offset with_"),
    exp.With: _arguments("expressions"),
    exp.CTE: _arguments("this alias"),
    exp.From: _ONE,
    exp.Join: _arguments("this on using kind side"),
    exp.Table: _arguments("this db alias"),
    exp.TableAlias: _arguments("this columns"),
    exp.Where: _ONE,
    exp.Group: _arguments("expressions"),
    exp.Having: _ONE,
    exp.Order: _arguments("expressions"),
    exp.Ordered: _arguments("this desc nulls_first"),
    exp.Limit: _arguments("expression"),
    exp.Offset: _arguments("expression"),
    exp.Distinct: _arguments("expressions"),
    exp.Values: _arguments("expressions alias"),
    exp.Tuple: _arguments("expressions"),
    # values
    exp.Alias: _arguments("this alias"),
    exp.Identifier: _arguments("this quoted"),
    exp.Column: _arguments("this table"),
    exp.Star: frozenset(),
    exp.Literal: _arguments("this is_string"),
    exp.Null: frozenset(),
    exp.Boolean: _ONE,
    exp.Placeholder: _ONE,
    exp.Paren: _ONE,
    exp.Var: _ONE,
    # operators
    exp.And: _TWO,
    exp.Or: _TWO,
    exp.Not: _ONE,
    exp.EQ: _TWO,
    exp.NEQ: _TWO,
    exp.GT: _TWO,
    exp.GTE: _TWO,
    exp.LT: _TWO,
    exp.LTE: _TWO,
    exp.NullSafeEQ: _TWO,
    exp.NullSafeNEQ: _TWO,
    exp.Is: _arguments("this expression negate"),
    exp.In: _arguments("this expressions query"),
    exp.Between: _arguments("this low high"),
    exp.Like: _arguments("this expression negate"),
    exp.ILike: _arguments("this expression negate"),
    exp.Add: _TWO,
    exp.Sub: _TWO,
    exp.Mul: _TWO,
    exp.Div: _arguments("this expression typed safe"),
    exp.IntDiv: _TWO,
    exp.Mod: _TWO,
    exp.Neg: _ONE,
    exp.DPipe: _arguments("this expression safe"),
    exp.Exists: _ONE,
    exp.Case: _arguments("this ifs default"),
    exp.If: _arguments("this true false"),
    exp.Cast: _arguments("this to"),
    exp.TryCast: _arguments("this to requires_string"),
    exp.DataType: _arguments("this expressions nested"),
    exp.DataTypeParam: _ONE,
    exp.Interval: _arguments("this unit"),
    # functions of one row
    exp.Abs: _ONE,
    exp.Ceil: _ONE,
    exp.Floor: _ONE,
    exp.Round: _arguments("this decimals"),
    exp.Sign: _ONE,
    exp.Sqrt: _ONE,
    exp.Lower: _ONE,
    exp.Upper: _ONE,
    exp.Length: _arguments("this binary"),
    exp.Trim: _arguments("this position"),
    exp.Substring: _arguments("this start length"),
    exp.Left: _arguments("this expression"),
    exp.Right: _arguments("this expression"),
    exp.StrPosition: _arguments("this substr"),
    exp.Concat: _arguments("expressions safe coalesce"),
    exp.Coalesce: _arguments("this expressions"),
    exp.Nullif: _TWO,
    exp.Greatest: _arguments("this expressions ignore_nulls"),
    exp.Least: _arguments("this expressions ignore_nulls"),
    exp.Extract: _TWO,
    exp.TimestampTrunc: _arguments("this unit"),
    exp.DateTrunc: _arguments("this unit"),
    exp.CurrentDate: frozenset(),
    exp.CurrentTimestamp: frozenset(),
    # functions of many
    exp.Count: _arguments("this expressions big_int"),
    exp.Sum: _ONE,
    exp.Avg: _ONE,
    exp.Min: _arguments("this expressions"),
    exp.Max: _arguments("this expressions"),
    exp.Stddev: _ONE,
    exp.StddevPop: _ONE,
    exp.StddevSamp: _ONE,
    exp.Variance: _ONE,
    exp.VariancePop: _ONE,
    exp.GroupConcat: _arguments("this separator"),
    exp.LogicalAnd: _ONE,
    exp.LogicalOr: _ONE,
    exp.Filter: _TWO,
    # windows
    exp.Window: _arguments("this partition_by order spec over"),
    exp.WindowSpec: _arguments("kind start start_side end end_side"),
    exp.RowNumber: frozenset(),
    exp.Rank: frozenset(),
    exp.DenseRank: frozenset(),
    exp.Lag: _arguments("this offset"),
    exp.Lead: _arguments("this offset"),
    exp.FirstValue: _ONE,
    exp.LastValue: _ONE,
}
"""Node types, and those of their arguments that may be given. A subclass is not its base."""

WINDOWED = (
    *(exp.RowNumber, exp.Rank, exp.DenseRank, exp.Lag, exp.Lead, exp.FirstValue, exp.LastValue),
    *(exp.Count, exp.Sum, exp.Avg, exp.Min, exp.Max),
)
"""What a window may be over."""

WORDS: Mapping[tuple[type[exp.Expr], str], frozenset[object]] = {
    (exp.Join, "kind"): frozenset(("", "INNER", "CROSS", "OUTER")),
    (exp.Join, "side"): frozenset(("", "LEFT", "RIGHT", "FULL")),
    (exp.Window, "over"): frozenset(("OVER",)),
    (exp.WindowSpec, "kind"): frozenset(("ROWS", "RANGE")),
    (exp.WindowSpec, "start"): frozenset(("UNBOUNDED", "CURRENT ROW")),
    (exp.WindowSpec, "end"): frozenset(("UNBOUNDED", "CURRENT ROW")),
    (exp.WindowSpec, "start_side"): frozenset(("PRECEDING", "FOLLOWING")),
    (exp.WindowSpec, "end_side"): frozenset(("PRECEDING", "FOLLOWING")),
    (exp.Trim, "position"): frozenset(("LEADING", "TRAILING", "BOTH")),
}
"""Arguments that are texts, which a generator writes as they are."""

FLAGS = _arguments(
    "quoted distinct desc nulls_first negate is_string nested safe typed coalesce big_int ignore_nulls"
    " requires_string this binary"
)
"""Arguments that may be true or false."""

NOT_IN: Mapping[Dialect, tuple[type[exp.Expr], ...]] = {
    Dialect.DUCKDB: (),
    Dialect.MYSQL: (exp.Values, exp.Filter, exp.Except, exp.Intersect, exp.ILike),  # made into something else for it
    Dialect.POSTGRESQL: (),
    Dialect.SQLITE: (exp.Stddev, exp.StddevPop, exp.StddevSamp, exp.Variance, exp.VariancePop, exp.Interval, exp.ILike),
}
"""What a dialect does not have."""

UNITS = _arguments("YEAR QUARTER MONTH WEEK DAY HOUR MINUTE SECOND DOW DOY EPOCH")
"""What :class:`exp.Var` may be, where it is a unit of time."""

TYPES = _arguments(
    "BIGINT BOOLEAN DATE DATETIME DECIMAL DOUBLE FLOAT INT SMALLINT TEXT TIME TIMESTAMP TIMESTAMPTZ TINYINT VARCHAR"
)
"""What a value may be cast to. CHAR pads with blanks, as many as are asked for."""
MAX_TYPE_PARAMETER = 1000
