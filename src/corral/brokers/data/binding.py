"""What the names of a query mean within a scope, and the query with all of them replaced.

That nothing outside the scope can be reached does not rest on this module finding the right meaning: every table is
replaced by a name of ours that stands for a fence, every common table expression gets a name of ours, and what a server
then finds under a name of a column is in one of those. It is here so that what does not exist is said in our words, and
so that it is known which columns about persons are touched.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field

from sqlglot import exp

from corral.brokers.data import grammar
from corral.brokers.data.checking import check_name
from corral.brokers.data.faults import QueryRefused
from corral.brokers.data.names import fold, key
from corral.brokers.data.pushing import compared, conjuncts
from corral.brokers.data.scope import Scope, Table
from corral.policy.model import Column, ColumnUse, Dialect

FENCE = "corral_fence_"
_QUERY = (exp.Select, exp.Union, exp.Intersect, exp.Except)


@dataclass(frozen=True, slots=True)
class _Output:
    """One column of a relation."""

    name: str
    """Empty: it has none that could be said."""
    table: Table | None = None
    column: Column | None = None
    """Where it is one of the scope's own."""


@dataclass(frozen=True, slots=True)
class _Relation:
    name: str
    columns: tuple[_Output, ...]
    fence: int = -1
    """Of a table."""


@dataclass(slots=True)
class _Level:
    """What one SELECT can name."""

    parent: _Level | None
    relations: list[_Relation] = field(default_factory=list)
    aliases: set[str] = field(default_factory=set)
    using: set[str] = field(default_factory=set)


@dataclass(frozen=True, slots=True)
class _Common:
    name: str
    columns: tuple[_Output, ...]


_Commons = Mapping[str, _Common]


class Binder:
    """Binds one statement. Changes the tree that it is given."""

    def __init__(self, scope: Scope) -> None:
        self._scope = scope
        self._dialect = scope.dialect
        self._relations = 0
        self._commons = 0
        self.fences: list[Table] = []
        """By the number in their name."""
        self.pushed: dict[int, list[exp.Expr]] = {}
        """Conditions that may be evaluated within a fence, too."""
        self.personal: set[str] = set()

    # ---- names ----

    def _fold(self, identifier: exp.Expr | str) -> str:
        if isinstance(identifier, str):
            return identifier
        return fold(str(identifier.this), quoted=bool(identifier.args.get("quoted")), dialect=self._dialect)

    def _key(self, name: str) -> str:
        return key(name, self._dialect)

    def _own_name(self, identifier: exp.Expr) -> str:
        """A name that the agent gives, as it is written then."""
        name = self._fold(identifier)
        check_name(name)
        identifier.replace(exp.to_identifier(name, quoted=True))
        return name

    def touch(self, table: Table | None, column: Column | None) -> None:
        """Notes that a column is read, compared or written."""
        if table is not None and column is not None and column.personal:
            self.personal.add(f"{self._scope.source.name}.{table.scope.name}.{column.name}")

    # ---- queries ----

    def query(
        self, node: exp.Expr, commons: _Commons | None = None, parent: _Level | None = None
    ) -> tuple[_Output, ...]:
        """Binds a query; returns its columns."""
        known = self._with(node, dict(commons or {}), parent)
        if type(node) is exp.Select:
            return self._select(node, known, parent)
        if type(node) is exp.Subquery:
            if node.args.get("alias"):
                raise QueryRefused("a query in parentheses has no name there")
            outputs = self.query(node.this, known, parent)
        elif type(node) in _QUERY:
            outputs = self.query(node.this, known, parent)
            self.query(node.args["expression"], known, parent)
        else:
            raise QueryRefused("a query is a select here")
        self._order(node, outputs)
        return outputs

    def _with(self, node: exp.Expr, commons: dict[str, _Common], parent: _Level | None) -> _Commons:
        clause = node.args.get("with_")
        if clause is None:
            return commons
        here: set[str] = set()
        for common in clause.expressions:
            self._count()
            outputs = self.query(common.this, commons, parent)
            alias = common.args["alias"]
            name = self._key(self._own_name(alias.this))
            if name in here:
                raise QueryRefused("a name is given twice")
            here.add(name)
            outputs = self._renamed(alias, outputs)
            self._commons += 1
            own = f"corral_common_{self._commons}"
            alias.set("this", exp.to_identifier(own, quoted=True))
            commons[name] = _Common(own, outputs)
        return commons

    def _renamed(self, alias: exp.Expr, outputs: tuple[_Output, ...]) -> tuple[_Output, ...]:
        columns = [self._own_name(column) for column in alias.args.get("columns") or ()]
        if len(columns) > len(outputs):
            raise QueryRefused("a table is given more names of columns than it has columns")
        renamed = tuple(_Output(name, was.table, was.column) for name, was in zip(columns, outputs, strict=False))
        return (*renamed, *outputs[len(columns) :])

    def _order(self, node: exp.Expr, outputs: Iterable[_Output]) -> None:
        """ORDER BY of a set operation: of its columns, by name or number."""
        names = {self._key(output.name): output.name for output in outputs if output.name}
        order = node.args.get("order")
        for ordered in order.expressions if order is not None else ():
            wanted = ordered.this
            if type(wanted) is exp.Literal and not wanted.args.get("is_string"):
                continue
            found = names.get(self._key(self._fold(wanted.this))) if type(wanted) is exp.Column else None
            if found is None or wanted.args.get("table"):
                raise QueryRefused("this is ordered by names or numbers of its columns")
            wanted.set("this", exp.to_identifier(found, quoted=True))

    def _count(self) -> None:
        self._relations += 1
        if self._relations > grammar.MAX_RELATIONS:
            raise QueryRefused(f"a query reads from at most {grammar.MAX_RELATIONS} tables")

    def _select(self, node: exp.Expr, commons: _Commons, parent: _Level | None) -> tuple[_Output, ...]:
        level = _Level(parent)
        source = node.args.get("from_")
        joins = node.args.get("joins") or []
        if source is not None:
            self._relation(source.this, level, commons)
        for join in joins:
            self._relation(join.this, level, commons)
            for identifier in join.args.get("using") or ():
                self._using(identifier, level)
        for expression in node.expressions:
            if type(expression) is exp.Alias:
                level.aliases.add(self._key(self._own_name(expression.args["alias"])))
        for join in joins:
            self._expression(join.args.get("on"), level, commons)
        where = node.args.get("where")
        if where is not None:
            self._push(where.this, level, joins)
        for name in ("where", "group", "having", "order"):
            self._expression(node.args.get(name), level, commons)
        outputs: list[_Output] = []
        for expression in node.expressions:
            outputs += self._output(expression, level, commons)
        return tuple(outputs)

    # ---- relations ----

    def _relation(self, node: exp.Expr, level: _Level, commons: _Commons) -> None:
        self._count()
        if type(node) is exp.Table:
            relation = self._table(node, commons)
        elif type(node) is exp.Subquery:
            alias = node.args.get("alias")
            if alias is None:
                raise QueryRefused("a subquery in FROM needs a name")
            node.set("alias", None)
            try:
                outputs = self.query(node, commons, level.parent)
            finally:
                node.set("alias", alias)
            relation = _Relation(self._own_name(alias.this), self._renamed(alias, outputs))
        elif type(node) is exp.Values:
            alias = node.args.get("alias")
            if alias is None or not alias.args.get("columns"):
                raise QueryRefused("VALUES in FROM needs a name, and names for its columns")
            for row in node.expressions:
                self._expression(row, _Level(None), commons)
            width = max(len(row.expressions) if type(row) is exp.Tuple else 0 for row in node.expressions)
            outputs = tuple(_Output("") for _ in range(width))
            relation = _Relation(self._own_name(alias.this), self._renamed(alias, outputs))
        else:
            raise QueryRefused("a query reads from tables and subqueries")
        if any(self._key(other.name) == self._key(relation.name) for other in level.relations):
            raise QueryRefused("a name is given twice")
        level.relations.append(relation)

    def _table(self, node: exp.Expr, commons: _Commons) -> _Relation:
        name, schema = self._fold(node.this), node.args.get("db")
        alias = node.args.get("alias")
        common = commons.get(self._key(name)) if schema is None else None
        number = -1
        if common is not None:
            outputs, written = common.columns, common.name
        else:
            table = self._scope.find(None if schema is None else self._fold(schema), name)
            if table is None:
                raise QueryRefused(f"there is no table {name[:63]!r} here")
            number = self.fence(table)
            outputs, written = (
                tuple(_Output(column.name, table, column) for column in table.columns),
                f"{FENCE}{number}",
            )
            name = table.name
        if alias is not None and alias.args.get("this") is not None:
            name = self._own_name(alias.this)
            outputs = self._renamed(alias, outputs)
            if alias.args.get("columns"):
                number = -1  # the names within the fence are others
        elif alias is not None:
            raise QueryRefused("a table is given names of columns, and none of its own")
        node.set("this", exp.to_identifier(written, quoted=True))
        node.set("db", None)
        if alias is None:
            node.set("alias", exp.TableAlias(this=exp.to_identifier(name, quoted=True)))
        return _Relation(name, outputs, number)

    def fence(self, table: Table) -> int:
        """The number of a new fence."""
        if "select" not in table.scope.statements:
            raise QueryRefused(f"the table {table.scope.name!r} cannot be read here")
        self.fences.append(table)
        return len(self.fences) - 1

    def _using(self, identifier: exp.Expr, level: _Level) -> None:
        name = self._fold(identifier)
        found = [
            output
            for relation in level.relations
            for output in relation.columns
            if output.name and self._key(output.name) == self._key(name)
        ]
        if len(found) < 2:
            raise QueryRefused(f"there is no column {name[:63]!r} in both tables")
        for output in found:
            self.touch(output.table, output.column)
        level.using.add(self._key(name))
        identifier.replace(exp.to_identifier(found[0].name, quoted=True))

    # ---- what is written ----

    def value(self, expression: exp.Expr) -> None:
        """Binds a value of INSERT, which has no columns but those of its subqueries."""
        self._expression(expression, _Level(None), {})

    def assigned(self, table: Table, name: str, identifier: exp.Expr, qualifier: exp.Expr | None) -> Column:
        """The column of a table that is written, or read in its own row, where the table is called ``name``."""
        if qualifier is not None and self._key(self._fold(qualifier)) != self._key(name):
            raise QueryRefused(f"there is no table {self._fold(qualifier)[:63]!r} in this part of the query")
        wanted = self._fold(identifier)
        column = table.column(wanted)
        if column is None:
            raise QueryRefused(f"there is no column {wanted[:63]!r} here")
        if column.use is not ColumnUse.SHOW:
            raise QueryRefused(
                f"the column {column.name!r} is hidden, and cannot be written or computed with in a change"
            )
        self.touch(table, column)
        return column

    # ---- expressions ----

    def _output(self, expression: exp.Expr, level: _Level, commons: _Commons) -> list[_Output]:
        if type(expression) is exp.Star:
            if not level.relations:
                raise QueryRefused("there is no table whose columns * could stand for")
            for relation in level.relations:
                self._touch_all(relation)
            return [output for relation in level.relations for output in relation.columns]
        if type(expression) is exp.Column and type(expression.this) is exp.Star:
            return list(self._starred(expression, level).columns)
        if type(expression) is exp.Alias:
            self._expression(expression.this, level, commons)
            return [_Output(str(expression.args["alias"].this))]
        self._expression(expression, level, commons)
        return [_Output(str(expression.this.this) if type(expression) is exp.Column else "")]

    def _touch_all(self, relation: _Relation) -> None:
        for output in relation.columns:
            self.touch(output.table, output.column)

    def _starred(self, column: exp.Expr, level: _Level) -> _Relation:
        wanted = self._fold(column.args["table"])
        for relation in level.relations:
            if self._key(relation.name) == self._key(wanted):
                column.set("table", exp.to_identifier(relation.name, quoted=True))
                self._touch_all(relation)
                return relation
        raise QueryRefused(f"there is no table {wanted[:63]!r} in this part of the query")

    def _expression(self, node: exp.Expr | None, level: _Level, commons: _Commons) -> None:
        """Binds an expression. Iteratively: it may be deep."""
        stack = [node] if node is not None else []
        while stack:
            here = stack.pop()
            if type(here) in _QUERY or type(here) is exp.Subquery:
                self._count()
                self.query(here, commons, level)
            elif type(here) is exp.Column:
                if type(here.this) is exp.Star:
                    raise QueryRefused("a * stands for columns in SELECT only")
                self._column(here, level)
            else:
                stack += here.iter_expressions()

    def _column(self, column: exp.Expr, level: _Level) -> None:
        name, qualifier = self._fold(column.this), column.args.get("table")
        table = None if qualifier is None else self._fold(qualifier)
        at: _Level | None = level
        while at is not None:
            if self._found(column, name, table, at):
                return
            at = at.parent
        shown = name if table is None else f"{table}.{name}"
        raise QueryRefused(f"there is no column {shown[:127]!r} here")

    def _found(self, column: exp.Expr, name: str, table: str | None, level: _Level) -> bool:
        found = self._matches(name, table, level)
        for relation, output in found:
            self.touch(output.table, output.column)
            column.set("this", exp.to_identifier(output.name, quoted=True))
            if table is not None:
                column.set("table", exp.to_identifier(relation.name, quoted=True))
        if table is None and self._key(name) in level.aliases:
            if not found:
                column.set("this", exp.to_identifier(name, quoted=True))
            return True
        if len(found) > 1 and self._key(name) not in level.using:
            raise QueryRefused(f"several tables have a column {name[:63]!r}")
        return bool(found)

    def _matches(self, name: str, table: str | None, level: _Level) -> list[tuple[_Relation, _Output]]:
        return [
            (relation, output)
            for relation in level.relations
            if table is None or self._key(relation.name) == self._key(table)
            for output in relation.columns
            if output.name and self._key(output.name) == self._key(name)
        ]

    # ---- conditions that may be evaluated within a fence ----

    def _push(self, condition: exp.Expr, level: _Level, joins: list[exp.Expr]) -> None:
        """Finds what compares a column that is shown with a value: that fails for no row or for all, and lets a server
        use its indexes. Other dialects than these convert the column where the value is of another type, which may fail
        for a row that is not there."""
        sides = {str(join.args.get("side") or "").upper() for join in joins}
        if self._dialect not in (Dialect.POSTGRESQL, Dialect.SQLITE) or not sides <= {"", "LEFT"}:
            return
        inner = [join.args.get("side") in (None, "") for join in joins]
        certain = [True, *inner] if all(inner) else [True, *([False] * len(joins))]
        for part in conjuncts(condition):
            column = compared(part)
            if column is None:
                continue
            qualifier = column.args.get("table")
            table = None if qualifier is None else self._fold(qualifier)
            found = self._matches(self._fold(column.this), table, level)
            if len(found) != 1 or (table is None and self._key(self._fold(column.this)) in level.aliases):
                continue
            relation, output = found[0]
            if relation.fence < 0 or self.fences[relation.fence] not in self._scope.plain:
                continue
            is_shown = output.column is not None and output.column.use is ColumnUse.SHOW
            if not is_shown or not certain[level.relations.index(relation)]:
                continue
            copy = part.copy()
            copy.this.replace(exp.column(exp.to_identifier(output.name, quoted=True)))
            self.pushed.setdefault(relation.fence, []).append(copy)
