"""From a query's text to what is run: :func:`compile_statement`."""

from __future__ import annotations

import re
from dataclasses import dataclass

import sqlglot
from sqlglot import exp
from sqlglot.errors import SqlglotError

from corral.brokers.data import lexical
from corral.brokers.data.binding import FENCE, Binder
from corral.brokers.data.checking import check
from corral.brokers.data.faults import QueryRefused
from corral.brokers.data.grammar import SQLGLOT
from corral.brokers.data.parsing import Endless, parse, tokenize
from corral.brokers.data.scope import Scope, Table
from corral.brokers.data.template import Slot, Template
from corral.policy.model import Dialect


@dataclass(frozen=True, slots=True)
class Read:
    """A query that only reads."""

    query: Template
    tables: tuple[str, ...]
    """Names in the policy of all that it touches, sorted."""
    personal: tuple[str, ...]
    """``source.table.column`` of those about persons that it touches, sorted."""
    names: frozenset[str]
    """Of the columns of its result that have one. Servers call others by the text that was run, fences and all."""


class Texts:
    """The texts and parameters that were taken out of a query."""

    def __init__(self) -> None:
        self._numbers: dict[Slot, int] = {}

    def take(self, tree: exp.Expr) -> None:
        """Puts markers in their place."""
        for node in list(tree.walk()):
            parent = node.parent
            pattern = isinstance(parent, exp.Like | exp.ILike) and node.arg_key == "expression"
            if type(node) is exp.Placeholder:
                self._mark(node, Slot(str(node.this), parameter=True, pattern=pattern))
            elif type(node) is exp.Literal and node.args.get("is_string") and not _has_own_form(node):
                self._mark(node, Slot(str(node.this), pattern=pattern))

    def _mark(self, node: exp.Expr, slot: Slot) -> None:
        number = self._numbers.setdefault(slot, len(self._numbers))
        node.replace(exp.Literal.string(f"\ue000{number}\ue000"))

    @property
    def slots(self) -> tuple[Slot, ...]:
        """By the numbers in their markers."""
        return tuple(self._numbers)


def _has_own_form(text: exp.Expr) -> bool:
    """Whether the generator must see it; then it was looked at."""
    return isinstance(text.parent, exp.Interval) or text.arg_key == "separator"


def generate(tree: exp.Expr, dialect: Dialect) -> str:
    """The text of a bound tree whose texts were taken out, read once more. Raises QueryRefused."""
    for table in tree.find_all(exp.Table):
        if not str(getattr(table.this, "this", "")).startswith("corral_") or table.args.get("db"):
            raise QueryRefused("the query is not understood")
    text = _write(tree, dialect)
    lexical.check(text)
    try:
        again = parse(text, tokenize(text, dialect), dialect)
        same = len(again) == 1 and _write(again[0], dialect) == text
    except (SqlglotError, Endless, RecursionError):
        same = False
    if not same:
        raise QueryRefused("the query is not understood")
    return text


def _write(tree: exp.Expr, dialect: Dialect) -> str:
    try:
        return tree.sql(dialect=SQLGLOT[dialect], identify=True, comments=False, unsupported_level=_RAISE)
    except (SqlglotError, RecursionError, ValueError, TypeError, AttributeError):
        raise QueryRefused("the query is not understood") from None


_RAISE = sqlglot.ErrorLevel.RAISE


def enclose(text: str, binder: Binder, dialect: Dialect, *, extra: str = "") -> str:
    """The text with each fence in its place; the first has ``extra`` in its select list."""

    def fence(found: re.Match[str]) -> str:
        number = int(found.group(1))
        table = binder.fences[number]
        conditions = [generate_condition(condition, dialect) for condition in binder.pushed.get(number, ())]
        return table.fence(" AND ".join(conditions), extra if number == 0 else "")

    return re.sub(rf"[\"`]{FENCE}([0-9]+)[\"`]", fence, text)


def generate_condition(condition: exp.Expr, dialect: Dialect) -> str:
    """The text of a condition alone."""
    text = _write(condition, dialect)
    lexical.check(text)
    return text


def compile_read(tree: exp.Expr, scope: Scope) -> Read:
    """A query, checked, bound and written anew. Changes the tree. Raises QueryRefused."""
    dialect = scope.dialect
    check(tree, dialect)
    texts, binder = Texts(), Binder(scope)
    texts.take(tree)
    names = frozenset(output.name for output in binder.query(tree) if output.name)
    text = enclose(generate(tree, dialect), binder, dialect)
    template = Template.of(text, texts.slots, dialect)
    return Read(template, names_of(binder.fences), tuple(sorted(binder.personal)), names)


def names_of(tables: list[Table]) -> tuple[str, ...]:
    """Their names in the policy."""
    return tuple(sorted({table.scope.name for table in tables}))
