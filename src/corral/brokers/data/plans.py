"""Queries that were compiled, kept: an agent asks the same again with other parameters."""

from __future__ import annotations

import threading
from collections import OrderedDict

from sqlglot import exp

from corral.brokers.data.faults import QueryRefused
from corral.brokers.data.reading import read
from corral.brokers.data.rewriting import Read, compile_read
from corral.brokers.data.scope import Scope, Table
from corral.brokers.data.writing import Write, compile_write, target

MAX_KEPT = 512
"""Of one source; each is at most some 100 KiB."""
_CHANGES = (exp.Insert, exp.Update, exp.Delete)


class NeedsKeys(Exception):
    """The primary key of a table must be known first."""

    def __init__(self, table: Table) -> None:
        super().__init__(table.scope.name)
        self.table = table


class Plans:
    """Of one source. May be used from several threads."""

    def __init__(self, scope: Scope, *, asks_for_keys: bool) -> None:
        """``asks_for_keys``: the source tells rows apart by the primary key of their table only (MySQL)."""
        self._scope = scope
        self._asks = asks_for_keys
        self._lock = threading.Lock()
        self._kept: OrderedDict[str, Read | Write | str] = OrderedDict()
        self.keys: dict[Table, tuple[str, ...]] = {}

    def __contains__(self, text: str) -> bool:
        with self._lock:
            return text in self._kept

    def find(self, text: str) -> Read | Write:
        """What a query comes to. Raises QueryRefused, NeedsKeys."""
        with self._lock:
            plan = self._kept.get(text)
            if plan is not None:
                self._kept.move_to_end(text)
        if plan is None:
            try:
                plan = self._compile(text)
            except QueryRefused as refused:
                plan = str(refused)
            except (RecursionError, ValueError, TypeError, AttributeError, KeyError, IndexError):
                plan = "the query is not understood"  # a tree as the parser should not make it
            with self._lock:
                self._kept[text] = plan
                if len(self._kept) > MAX_KEPT:
                    self._kept.popitem(last=False)
        if isinstance(plan, str):
            raise QueryRefused(plan)
        return plan

    def _compile(self, text: str) -> Read | Write:
        tree = read(text, self._scope.dialect)
        if not isinstance(tree, _CHANGES):
            return compile_read(tree, self._scope)
        keys: tuple[str, ...] = ()
        if self._asks and not isinstance(tree, exp.Insert):
            table = target(tree, self._scope)
            if table not in self.keys:
                raise NeedsKeys(table)
            keys = self.keys[table]
        return compile_write(tree, self._scope, keys)
