"""The scope of a source, compiled: what takes the place of a table in a query.

That is a *fence*: a subquery which selects the columns of the scope, hidden ones as what is seen of them, and the rows
that its filter lets through. What an agent wrote must not be evaluated on any other row, or it could tell by an error
or by the time it takes what is there: so nothing may be pushed into the fence, nor the fence be dissolved.

- PostgreSQL neither flattens nor pushes into a subquery with OFFSET, be it 0 (``is_simple_subquery`` and
  ``subquery_is_pushdown_safe`` of its planner).
- SQLite does neither where there is a LIMIT and conditions outside (sqlite.org/optoverview.html, "Subquery Flattening"
  and "The WHERE-Clause Push-Down Optimization").
- MySQL and MariaDB materialise a derived table with a LIMIT.
- DuckDB looks through all of this; its session is opened without the optimisers that would
  (:mod:`corral.brokers.data.engine_duckdb`).
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

import sqlglot
from sqlglot import exp
from sqlglot.errors import SqlglotError

from corral.brokers.data.grammar import SQLGLOT
from corral.brokers.data.names import key, quote
from corral.errors import RequestError
from corral.policy.model import Column, ColumnUse, Dialect, Source, TableScope

_FENCES = {
    Dialect.DUCKDB: "",
    Dialect.MYSQL: " LIMIT 18446744073709551615",
    Dialect.POSTGRESQL: " OFFSET 0",
    Dialect.SQLITE: " LIMIT -1 OFFSET 0",
}
_SCHEMAS = {Dialect.DUCKDB: "main", Dialect.POSTGRESQL: "public", Dialect.SQLITE: "main"}
"""Where a table is that is named without its schema. MySQL: the database of the URL."""
_HASHES = {
    Dialect.DUCKDB: "left(sha256(getvariable('corral_key') || CAST({} AS VARCHAR)), 32)",
    Dialect.MYSQL: "LEFT(SHA2(CONCAT(@corral_key, {}), 256), 32)",
    Dialect.POSTGRESQL: "pg_catalog.left(pg_catalog.encode(pg_catalog.sha256(pg_catalog.convert_to("
    "pg_catalog.current_setting('corral.key') || ({})::text, 'UTF8')), 'hex'), 32)",
    Dialect.SQLITE: "corral_hash({})",
}
"""A keyed hash of 128 bits. The key is the session's own and comes to the server apart from any query. A value that is
hashed cannot be written through the broker, so nobody can have the hash of a guess computed."""
MASK = "***"
"""What is seen of a value that is masked."""


@dataclass(frozen=True, slots=True)
class Beside:
    """What the filter of a table reads that is not of the table."""

    tables: frozenset[str] = frozenset()
    """Names in lower case."""
    functions: frozenset[str] = frozenset()


@dataclass(frozen=True, slots=True)
class Table:
    """A table of the scope, and how it is written."""

    scope: TableScope
    schema: str
    """Empty: the connection's own."""
    name: str
    dialect: Dialect
    columns: tuple[Column, ...]
    """Those that there are: none that is denied."""
    rows: str
    """The filter, checked to be one condition; empty where there is none."""
    filtered: frozenset[str]
    """Keys of the columns that the filter reads."""
    beside: Beside

    @property
    def place(self) -> str:
        """Its name in a query."""
        name = quote(self.name, self.dialect)
        return f"{quote(self.schema, self.dialect)}.{name}" if self.schema else name

    def column(self, name: str) -> Column | None:
        """The column that a name means, folded."""
        wanted = key(name, self.dialect)
        return next((column for column in self.columns if key(column.name, self.dialect) == wanted), None)

    def seen(self, columns: Iterable[Column] | None = None) -> str:
        """The columns as a select list."""
        return ", ".join(_seen(column, self.dialect) for column in (self.columns if columns is None else columns))

    def fence(self, pushed: str = "", extra: str = "") -> str:
        """The subquery. ``pushed`` is a condition that may be evaluated on every row of the table; ``extra`` goes into
        the select list."""
        conditions = " AND ".join(f"({condition})" for condition in (self.rows, pushed) if condition)
        where = f" WHERE {conditions}" if conditions else ""
        return f"(SELECT {extra}{self.seen()} FROM {self.place}{where}{_FENCES[self.dialect]})"

    def holds(self) -> str:
        """The filter as a value that is true or false, for rows that were changed."""
        return f"(({self.rows}) IS TRUE)" if self.rows else "(1 = 1)"


def _seen(column: Column, dialect: Dialect) -> str:
    name = quote(column.name, dialect)
    match column.use:
        case ColumnUse.SHOW:
            return name
        case ColumnUse.MASK:
            return f"CASE WHEN {name} IS NULL THEN NULL ELSE '{MASK}' END AS {name}"
        case ColumnUse.HASH:
            return f"CASE WHEN {name} IS NULL THEN NULL ELSE {_HASHES[dialect].format(name)} END AS {name}"
    raise RequestError(f"the column {column.name!r} does not exist")


class Scope:
    """All tables of a source."""

    def __init__(self, source: Source) -> None:
        """Raises RequestError where the source's part of the policy cannot be understood."""
        self.source = source
        self.dialect = source.dialect
        self.tables = tuple(_compile(table, source) for table in source.tables)
        self.plain: frozenset[Table] = frozenset()
        """Those into whose fence a comparison may be put: tables, no views. Known when the source was looked at."""
        places = [(table.schema, key(table.name, self.dialect)) for table in self.tables]
        if len(set(places)) < len(places):
            raise RequestError(f"a table of the source {source.name!r} is named twice")

    def find(self, schema: str | None, name: str) -> Table | None:
        """The table that a folded name means; None where none does, or several do."""
        wanted = key(name, self.dialect)
        found = [
            table
            for table in self.tables
            if key(table.name, self.dialect) == wanted
            and (schema is None or key(table.schema, self.dialect) == key(schema, self.dialect))
        ]
        default = [table for table in found if table.schema == _SCHEMAS.get(self.dialect, "")]
        found = default if schema is None and len(found) > 1 else found
        return found[0] if len(found) == 1 else None


def _compile(table: TableScope, source: Source) -> Table:
    dialect = source.dialect
    schema, _, name = table.name.rpartition(".")
    columns = tuple(column for column in table.columns if column.use is not ColumnUse.DENY)
    keys = [key(column.name, dialect) for column in table.columns]
    if not columns or len(set(keys)) < len(keys):
        raise RequestError(f"the table {table.name!r} of {source.name!r} has no column, or one that is named twice")
    if "." in schema:
        raise RequestError(f"the table {table.name!r} of {source.name!r} is not named TABLE or SCHEMA.TABLE")
    rows, filtered, beside = _condition(table, dialect)
    if dialect is Dialect.DUCKDB and beside.tables and set(table.statements) - {"select"}:
        # It cannot look at another table in RETURNING, where a changed row is held against the filter.
        raise RequestError(f"rows of the table {table.name!r} reads another table, so DuckDB cannot have it changed")
    compiled = Table(table, schema or _SCHEMAS.get(dialect, ""), name, dialect, columns, rows, filtered, beside)
    compiled.fence()  # its names can be written
    return compiled


def _condition(table: TableScope, dialect: Dialect) -> tuple[str, frozenset[str], Beside]:
    """The filter as it was written, if it is one condition and cannot end the parenthesis that it will stand in."""
    text = table.rows.strip()
    if not text:
        return "", frozenset(), Beside()
    wrong = RequestError(f"rows of the table {table.name!r} is not one condition without comments: {text[:200]!r}")
    try:
        comments = any(token.comments for token in sqlglot.tokenize(f"({text})", read=SQLGLOT[dialect]))
        found = sqlglot.parse(f"SELECT 1 WHERE ({text})", read=SQLGLOT[dialect])
    except (SqlglotError, RecursionError):
        raise wrong from None
    tree = found[0] if len(found) == 1 else None
    if comments or type(tree) is not exp.Select:
        raise wrong
    if {part for part, value in tree.args.items() if value} != {"expressions", "where"}:
        raise wrong
    condition = tree.args["where"].this
    if type(condition) is not exp.Paren:
        raise wrong
    columns = [column for column in condition.find_all(exp.Column) if column.find_ancestor(exp.Select) is tree]
    functions = (
        node.name if isinstance(node, exp.Anonymous) else node.sql_name() for node in condition.find_all(exp.Func)
    )
    beside = Beside(
        frozenset(other.name.lower() for other in condition.find_all(exp.Table)),
        frozenset(function.lower() for function in functions),
    )
    return text, frozenset(key(column.name, dialect) for column in columns), beside
