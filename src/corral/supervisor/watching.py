"""Which names the policy's ``filesystem.ask`` and ``filesystem.watch`` are about.

A glob is a row of parts, and a path has come so far in it that some of them are used up: its *states*. Two directories
with the same states are alike: whatever may lie in them, the globs say the same of it. So of a rename it can be said
from the two names alone, without looking at what is moved, whether any name becomes watched or ceases to be.
"""

from __future__ import annotations

import re
from collections.abc import Iterable
from functools import lru_cache
from typing import NamedTuple

from corral.policy.matching import text_glob

_States = frozenset[tuple[int, int]]
_ESCAPED = re.compile(r"\\(.)", re.DOTALL)
MAX_CACHED = 8192
"""Paths whose states are remembered."""


class Move(NamedTuple):
    """Names that a rename is judged by."""

    old: str
    new: str


class Watch:
    """The globs of one policy."""

    def __init__(self, globs: Iterable[str]) -> None:
        self._globs = [glob[1:].split("/") for glob in globs]
        self._match = [[None if part == "**" else text_glob(part) for part in parts] for parts in self._globs]
        self._start = self._closure((index, 0) for index in range(len(self._globs)))
        self._states = lru_cache(MAX_CACHED)(self._find_states)

    def __bool__(self) -> bool:
        return bool(self._globs)

    def _closure(self, states: Iterable[tuple[int, int]]) -> _States:
        """With what follows where ``**`` stands for nothing."""
        found = set(states)
        for index, at in list(found):
            parts = self._match[index]
            while at < len(parts) and parts[at] is None:
                at += 1
                found.add((index, at))
        return frozenset(found)

    def _step(self, states: _States, name: str, *, any_name: bool = False) -> _States:
        found = []
        for index, at in states:
            parts = self._match[index]
            if at == len(parts):
                continue
            part = parts[at]
            if part is None:
                found.append((index, at))
            elif not any_name and part(name):
                found.append((index, at + 1))
        return self._closure(found)

    def _find_states(self, path: str) -> _States:
        above, _, name = path.rpartition("/")
        before = self._states(above) if above else self._start
        return self._step(before, name) if name else before

    def names(self, path: str) -> bool:
        """Whether a glob is about this absolute path."""
        if not path.startswith("/"):
            return False
        return any(at == len(self._globs[index]) for index, at in self._states(path))

    def move(self, old: str, new: str) -> Move | None:
        """Whether by a rename any name becomes watched or ceases to be: the names by which it is judged.

        Where it is not the name itself but something that may lie below it, that is named by the rest of the glob.
        """
        before, after = self._states(old), self._states(new)
        if before == after and not self.names(old):
            return None
        return Move(self._example(old, before - after), self._example(new, after - before))

    def alias(self, path: str) -> str:
        """What may become reachable by another name where ``path`` is made to lead elsewhere, or ``""``."""
        if not path.startswith("/"):
            return ""
        above = path.rpartition("/")[0]
        before = self._states(above) if above else self._start
        own = self._states(path) - self._step(before, "", any_name=True)
        if self.names(path):
            return path
        return self._example(path, own) if own else ""

    def _example(self, path: str, states: _States) -> str:
        if self.names(path):
            return path
        for index, at in sorted(states):
            rest = self._globs[index][at:]
            if rest:
                return f"{path}/{_ESCAPED.sub(lambda match: str(match[1]), '/'.join(rest))}"
        return path
