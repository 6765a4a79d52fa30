"""Statements that change something: one table, its rows within the filter before, and within the filter after.

Which rows are meant is found by a query of keys (``ctid``, ``rowid``, the primary key) over the fence, as an agent's
condition must not be evaluated on any other row; the filter then stands in the change itself, too. What the change
gives back (RETURNING) is looked at before anything is committed: a row that the filter does not let through any more
undoes all. Where a server cannot give it back (MySQL), rows within the filter are counted before and after.
"""

from __future__ import annotations

from dataclasses import dataclass

from sqlglot import exp

from corral.brokers.data.binding import FENCE, Binder
from corral.brokers.data.checking import check, check_name
from corral.brokers.data.faults import QueryRefused
from corral.brokers.data.names import fold, quote
from corral.brokers.data.rewriting import Texts, enclose, generate, names_of
from corral.brokers.data.scope import Scope, Table
from corral.brokers.data.sizes import within
from corral.brokers.data.template import Template
from corral.policy.model import Column, Dialect

PREVIEW = 20
"""Rows that are looked at before a change."""
_ROW_KEYS = {
    Dialect.DUCKDB: ("rowid",),
    Dialect.POSTGRESQL: ("tableoid", "ctid"),  # ctid alone is not unique among partitions
    Dialect.SQLITE: ("_rowid_",),
}
_INSERT = frozenset(("this", "expression", "returning"))
_UPDATE = frozenset(("this", "expressions", "where", "returning"))
_DELETE = frozenset(("this", "where", "returning"))


@dataclass(frozen=True, slots=True)
class Write:
    """A statement that changes rows of one table."""

    word: str
    """``insert``, ``update`` or ``delete``."""
    table: Table
    tables: tuple[str, ...]
    """Names in the policy of all that it touches, sorted."""
    personal: tuple[str, ...]
    change: Template
    """Gives back, where the server can, whether the row is within the filter, and what is seen of it."""
    gives_back: bool
    before: Template | None
    """What is seen of the first rows that it would change."""
    count: str
    """How many rows are within the filter: to be equal after an update, and as many more as there are new ones after
    an insert. Empty where that need not be known."""
    returned: tuple[Column, ...]
    """What the agent asked to be given back."""


def compile_write(tree: exp.Expr, scope: Scope, keys: tuple[str, ...] = ()) -> Write:
    """A change, checked, bound and written anew. ``keys`` is the primary key of its table (MySQL). Changes the tree.
    Raises QueryRefused."""
    return _Writer(scope, keys).compile(tree)


def target(tree: exp.Expr, scope: Scope) -> Table:
    """The table that a statement changes. Raises QueryRefused."""
    node = tree.this
    if type(node) is exp.Schema:
        node = node.this
    if type(node) is not exp.Table or type(node.this) is not exp.Identifier:
        raise QueryRefused("a change is of one table")
    for name, value in node.args.items():
        if value and name not in ("this", "db", "alias"):
            raise QueryRefused("a change is of one table, by its name")
    schema = node.args.get("db")
    name = _folded(node.this, scope.dialect)
    table = scope.find(None if schema is None else _folded(schema, scope.dialect), name)
    if table is None:
        raise QueryRefused(f"there is no table {name[:63]!r} here")
    return table


def _folded(identifier: exp.Expr, dialect: Dialect) -> str:
    return fold(str(identifier.this), quoted=bool(identifier.args.get("quoted")), dialect=dialect)


class _Writer:
    def __init__(self, scope: Scope, keys: tuple[str, ...]) -> None:
        self._scope, self._dialect = scope, scope.dialect
        self._keys = _ROW_KEYS.get(scope.dialect, keys)
        self._texts, self._binder = Texts(), Binder(scope)

    def compile(self, tree: exp.Expr) -> Write:
        table = target(tree, self._scope)
        word = {exp.Insert: "insert", exp.Update: "update", exp.Delete: "delete"}[type(tree)]  # type: ignore[index]
        allowed = {"insert": _INSERT, "update": _UPDATE, "delete": _DELETE}[word]
        for name, value in tree.args.items():
            if value and name not in allowed:
                raise QueryRefused(f"this is not supported in a query: {word} with {name.strip('_')}")
        if word not in table.scope.statements:
            raise QueryRefused(f"{word} is not allowed for the table {table.scope.name!r}")
        returned = self._returned(tree, table)
        if word == "insert":
            change, before = self._insert(tree, table), None
        else:
            if not self._keys:
                raise QueryRefused("a table without a primary key cannot be changed here")
            change, before = self._change(tree, table, word)
        gives_back = self._dialect is not Dialect.MYSQL
        if gives_back:
            change = f"{change} RETURNING {self._holds(table)} AS corral_holds, {table.seen()}"
        counts = not gives_back and bool(table.rows) and word != "delete"
        slots = self._texts.slots
        return Write(
            word,
            table,
            names_of([table, *self._binder.fences]),
            tuple(sorted(self._binder.personal)),
            Template.of(change, slots, self._dialect),
            gives_back,
            None if before is None else Template.of(before, slots, self._dialect),
            f"SELECT COUNT(*) FROM {table.place} WHERE ({table.rows})" if counts else "",
            returned,
        )

    def _holds(self, table: Table) -> str:
        if self._dialect is not Dialect.POSTGRESQL:
            return table.holds()
        row = f"ROW({', '.join(quote(column.name, self._dialect) for column in table.columns)})"
        return f"(CASE WHEN {within(row, self._scope.source.limits.bytes)} THEN {table.holds()} ELSE FALSE END)"

    def _text(self, expression: exp.Expr) -> str:
        """The text of a value that is bound."""
        return generate(exp.Select(expressions=[expression.copy()]), self._dialect).removeprefix("SELECT ")

    def _returned(self, tree: exp.Expr, table: Table) -> tuple[Column, ...]:
        clause = tree.args.get("returning")
        if clause is None:
            return ()
        if self._dialect is Dialect.MYSQL:
            raise QueryRefused("this source has no RETURNING")
        if "select" not in table.scope.statements or clause.args.get("into"):
            raise QueryRefused(f"the table {table.scope.name!r} cannot be read here")
        found: list[Column] = []
        for expression in clause.expressions:
            if type(expression) is exp.Star and not any(expression.args.values()):
                found += table.columns
                continue
            known = None
            if type(expression) is exp.Column and type(expression.this) is exp.Identifier:
                known = table.column(_folded(expression.this, self._dialect))
            if known is None:
                raise QueryRefused("RETURNING has names of columns only")
            found.append(known)
        for column in found:
            self._binder.touch(table, column)
        return tuple(found)

    # ---- insert ----

    def _insert(self, tree: exp.Expr, table: Table) -> str:
        schema, source = tree.this, tree.args["expression"]
        if type(schema) is not exp.Schema or (schema.this.args.get("alias") is not None):
            raise QueryRefused("an insert names its columns, and its table without an alias")
        if not all(type(identifier) is exp.Identifier for identifier in schema.expressions):
            raise QueryRefused("an insert names its columns")
        columns = [self._binder.assigned(table, table.name, identifier, None) for identifier in schema.expressions]
        if len({column.name for column in columns}) < len(columns):
            raise QueryRefused("a column is named twice")
        names = ", ".join(quote(column.name, self._dialect) for column in columns)
        if type(source) is exp.Values:
            if source.args.get("alias"):
                raise QueryRefused("this is not supported in a query: values with alias")
            body = "VALUES " + ", ".join(self._row(row, len(columns)) for row in source.expressions)
        elif isinstance(source, exp.Select | exp.SetOperation | exp.Subquery):
            check(source, self._dialect)
            self._texts.take(source)
            self._binder.query(source)
            body = generate(source, self._dialect)
        else:
            raise QueryRefused("an insert has VALUES or a query")
        return f"INSERT INTO {table.place} ({names}) {enclose(body, self._binder, self._dialect)}"

    def _row(self, row: exp.Expr, width: int) -> str:
        values = row.expressions if type(row) is exp.Tuple else []
        if len(values) != width:
            raise QueryRefused("a row of an insert has a value for each of its columns")
        return f"({', '.join(self._value(value) for value in values)})"

    def _value(self, value: exp.Expr) -> str:
        if type(value) is exp.Var and str(value.this).upper() == "DEFAULT" and self._dialect is not Dialect.SQLITE:
            return "DEFAULT"
        holder = exp.Paren(this=value.copy())
        check(holder, self._dialect)
        self._texts.take(holder)
        self._binder.value(holder)
        return self._text(holder.this)

    # ---- update, delete ----

    def _change(self, tree: exp.Expr, table: Table, word: str) -> tuple[str, str]:
        """The change, and the query of what is there before."""
        alias = tree.this.args.get("alias")
        name = table.name
        if alias is not None:
            if alias.args.get("columns"):
                raise QueryRefused("this is not supported in a query: table with columns")
            name = _folded(alias.this, self._dialect)
            check_name(name)
        chosen = self._chosen(tree, name)
        assignments = (
            ", ".join(self._assignment(each, table, name) for each in tree.expressions) if word == "update" else ""
        )
        own = [f"corral_key{number}" for number in range(len(self._keys))]
        real = [key if self._dialect in _ROW_KEYS else quote(key, self._dialect) for key in self._keys]
        extra = "".join(f"{there} AS {here}, " for there, here in zip(real, own, strict=True))
        found = enclose(chosen, self._binder, self._dialect, extra=extra)
        keys = found.replace("SELECT 1 FROM", f"SELECT {', '.join(own)} FROM", 1)
        seen = ", ".join(quote(column.name, self._dialect) for column in table.columns)
        before = found.replace("SELECT 1 FROM", f"SELECT {seen} FROM", 1) + f" LIMIT {PREVIEW}"
        within = f"({table.rows})" if table.rows else "(1 = 1)"
        place = table.place
        if (
            self._dialect is Dialect.MYSQL
        ):  # which changes no table that a subquery of the statement reads, but joins it
            on = " AND ".join(f"{place}.{there} = corral_keys.{here}" for there, here in zip(real, own, strict=True))
            joined = f"{place} JOIN ({keys} LIMIT 18446744073709551615) AS corral_keys ON {on}"
            if word == "update":
                return f"UPDATE {joined} SET {assignments} WHERE {within}", before
            return f"DELETE {place} FROM {joined} WHERE {within}", before
        row = real[0] if len(real) == 1 else f"({', '.join(real)})"
        where = f"WHERE {within} AND {row} IN ({keys})"
        if word == "update":
            return f"UPDATE {place} SET {assignments} {where}", before
        return f"DELETE FROM {place} {where}", before

    def _chosen(self, tree: exp.Expr, name: str) -> str:
        """The query of the rows that are meant."""
        target_table = tree.this.copy()
        target_table.set("alias", exp.TableAlias(this=exp.to_identifier(name, quoted=True)))
        query = exp.Select(expressions=[exp.Literal.number(1)], from_=exp.From(this=target_table))
        where = tree.args.get("where")
        if where is not None:
            query.set("where", where.copy())
        check(query, self._dialect)
        self._texts.take(query)
        self._binder.query(query)
        text = generate(query, self._dialect)
        if not text.startswith("SELECT 1 FROM") or f"{FENCE}0" not in text:
            raise QueryRefused("the query is not understood")
        return text

    def _assignment(self, node: exp.Expr, table: Table, name: str) -> str:
        if type(node) is not exp.EQ or type(node.this) is not exp.Column or type(node.this.this) is not exp.Identifier:
            raise QueryRefused("an update sets columns to values")
        if any(value for part, value in node.this.args.items() if part not in ("this", "table")):
            raise QueryRefused("an update sets columns to values")
        column = self._binder.assigned(table, name, node.this.this, node.this.args.get("table"))
        holder = exp.Paren(this=node.args["expression"].copy())
        check(holder, self._dialect)
        if holder.find(exp.Select, exp.SetOperation) is not None:
            raise QueryRefused("an update has no subqueries in what it sets")
        self._texts.take(holder)
        for read in list(holder.find_all(exp.Column)):
            if type(read.this) is not exp.Identifier:
                raise QueryRefused("a * stands for columns in SELECT only")
            known = self._binder.assigned(table, name, read.this, read.args.get("table"))
            read.set("this", exp.to_identifier(known.name, quoted=True))
            read.set("table", None)
        return f"{quote(column.name, self._dialect)} = {self._text(holder.this)}"
