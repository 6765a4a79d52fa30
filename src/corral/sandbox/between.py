"""What is different between two layers of the same trees: two snapshots, two runs, or a snapshot and what is there now.

Each side is what an overlay would show: the layer over what it lies on. Where both show the same file of the host, or
the same copy on disk, nothing is read; so it costs what the two layers hold, not what the trees hold.
"""

from __future__ import annotations

import os
import stat
from collections.abc import Callable, Collection, Iterator, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, replace
from typing import Any

from corral.sandbox import asowner
from corral.sandbox.changes import from_json, to_json
from corral.sandbox.compare import (
    MAX_TEXT,
    Below,
    Change,
    ChangeKind,
    FileType,
    file_type,
    join,
    lookup,
    open_part,
    same_content,
    size_of,
    user_xattrs,
    walk_below,
)
from corral.sandbox.mounts import mounted_below
from corral.sandbox.ownership import SAME_IDS, Ids, OwnerMap, owners_from_json, owners_to_json
from corral.sandbox.trees import OPEN_DIRECTORY, UPPER, Level, Unreadable, Walk
from corral.sandbox.view import Changeable


@dataclass(frozen=True, slots=True)
class Side:
    """One of the two."""

    parts: tuple[Changeable, ...]
    layer: int
    """The directory of the parts."""
    owners: OwnerMap
    scaffold: frozenset[str]


def between(before: Side, after: Side) -> list[Change]:
    """What ``after`` shows otherwise than ``before``, sorted by path. Setuid and setgid bits are not compared: a kept
    layer has none. Raises CorralError where an ordinary user's layer cannot be read even as its owner."""
    try:
        found = _between(before, after, raise_unreadable=os.geteuid() != 0)
    except Unreadable:
        request = {"before": side_to_json(before), "after": side_to_json(after)}
        fds = tuple(dict.fromkeys((before.layer, after.layer)))
        ids = next((side.owners.upper for side in (before, after) if side.owners.upper), None)
        namespace = (before if ids is None or ids is before.owners.upper else after).owners.namespace()
        found = [from_json(row) for row in asowner.call("between", fds, request, namespace)]
    found.sort(key=lambda change: change.path)
    return found


def serve(request: dict[str, Any]) -> Any:
    """:func:`between` in a helper process."""
    before, after = (side_from_json(request[name]) for name in ("before", "after"))
    return [to_json(change) for change in _between(before, after)]


def side_to_json(side: Side) -> dict[str, Any]:
    """A side as it is in the namespace of its owner (:mod:`corral.sandbox.asowner`)."""
    return {
        "parts": [[part.name, part.path, part.lowers, part.base] for part in side.parts],
        "layer": side.layer,
        "owners": owners_to_json(side.owners.within()),
        "scaffold": list(side.scaffold),
    }


def side_from_json(data: dict[str, Any]) -> Side:
    """The side that :func:`side_to_json` made."""
    parts = tuple(Changeable(name, path, tuple(lowers), base) for name, path, lowers, base in data["parts"])
    return Side(parts, data["layer"], owners_from_json(data["owners"]), frozenset(data["scaffold"]))


def _between(before: Side, after: Side, *, raise_unreadable: bool = False) -> list[Change]:
    found: list[Change] = []
    go_through(before, after, lambda part: found.extend(part.found), raise_unreadable=raise_unreadable)
    return found


def go_through(
    before: Side, after: Side, finished: Callable[[PartComparison], None], *, raise_unreadable: bool = False
) -> None:
    """Compares part by part, and calls back with each while its trees are open. Raises Unreadable where asked for."""
    budget = MAX_TEXT
    firsts, seconds = ({part.path: part for part in side.parts} for side in (before, after))
    for path in {**firsts, **seconds}:
        first, second = firsts.get(path), seconds.get(path)
        shown = second or first
        assert shown is not None  # noqa: S101 - for the type checker
        with ExitStack() as stack:
            trees = _Trees(stack, path)
            sides = [
                trees.add(side, part or shown.without_base(), has_layer=part is not None)
                for side, part in ((before, first), (after, second))
            ]
            if not trees.roots:
                continue
            walk = stack.enter_context(Walk(trees.roots, path, raise_unreadable=raise_unreadable))
            walk.uppers = trees.uppers
            comparison = PartComparison(shown, walk, sides, trees, before.scaffold | after.scaffold, budget)
            comparison.run()
            finished(comparison)
            budget = comparison.budget


class _Trees:
    """The trees of one part of both sides, each once."""

    def __init__(self, stack: ExitStack, path: str) -> None:
        self.roots: dict[int, int] = {}
        self.ids: dict[int, Ids | None] = {}
        self.uppers: set[int] = set()
        self.mounts: set[str] = set()
        self._stack, self._path = stack, path
        self._lowers: dict[str, int] = {}

    def add(self, side: Side, part: Changeable, *, has_layer: bool) -> tuple[int, ...]:
        """The numbers of the trees of one side, topmost first; without a layer it shows what lies below."""
        numbers: list[int] = []
        for number, fd in open_part(part, side.layer).items():
            self._stack.callback(os.close, fd)
            if number == UPPER and not has_layer:
                continue
            lower = "" if number == UPPER else part.lowers[number - 1]
            tree = self._lowers.get(lower) if lower else None
            if tree is None:
                tree = len(self.roots)
                self.roots[tree] = fd
                self.ids[tree] = self._owners(side, part, lower)
                if lower:
                    self._lowers[lower] = tree
                if lower and lower != part.base:
                    self.mounts.update(self._path.rstrip("/") + mount[len(lower) :] for mount in mounted_below(lower))
                else:
                    self.uppers.add(tree)
            numbers.append(tree)
        return tuple(numbers)

    def _owners(self, side: Side, part: Changeable, lower: str) -> Ids | None:
        if not lower:
            return side.owners.upper
        if lower == part.base and os.geteuid() == 0:
            return SAME_IDS
        return side.owners.workspace if part.is_project else side.owners.system


class PartComparison:
    """The walk through one part. ``found`` is the answer, ``budget`` what is left of the text limit."""

    def __init__(
        self,
        part: Changeable,
        walk: Walk,
        sides: Sequence[tuple[int, ...]],
        trees: _Trees,
        scaffold: Collection[str],
        budget: int,
    ) -> None:
        self.found: list[Change] = []
        self.sources: list[int] = []
        """Of each: the tree in which ``after`` has it, or -1."""
        self.unlisted = 0
        """What was left out of these: too long, too deep, too much."""
        self.budget = budget
        self.part = part
        self._walk, self._trees, self._scaffold = walk, trees, scaffold
        self._tops = (sides[0], sides[1])
        self._sides = [self._tops]
        """Of each level: the trees that are merged, on either side."""

    def run(self) -> None:
        """Goes through all of it."""
        walk = self._walk
        self._list(walk.current)
        while True:
            level = walk.current
            name = next(level.names, None)
            if name is not None:
                self._entry(level, name)
            elif len(walk.levels) > 1:
                walk.leave()
                self._sides.pop()
            else:
                break
        if self.unlisted:
            whole = Change(self.part.name, self.part.path, ChangeKind.CHANGED, FileType.DIRECTORY)
            self.found.append(replace(whole, entries=self.unlisted))
            self.sources.append(-1)

    def root(self, tree: int) -> int:
        """The directory of a tree, as long as the comparison is open."""
        return self._trees.roots[tree]

    def top(self) -> tuple[Change, int] | None:
        """How the directory of the part itself is different, which is no entry of one, and the tree that ``after`` has
        it from."""
        if not all(self._tops):
            return None
        first, tree = self._tops[0][0], self._tops[1][0]
        if self.is_hosts(tree):  # it is as at a start, with what Corral gives it
            return None
        (old, one), (new, other) = ((os.fstat(fd), user_xattrs(fd)) for fd in map(self.root, (first, tree)))
        if not (old.st_mode ^ new.st_mode) & 0o1777 and one == other:
            return None
        change = Change(
            self.part.name,
            self.part.path,
            ChangeKind.CHANGED if one != other else ChangeKind.MODE,
            FileType.DIRECTORY,
            type_before=FileType.DIRECTORY,
            mode_before=stat.S_IMODE(old.st_mode),
            mode_after=stat.S_IMODE(new.st_mode),
            owner_after=self._owner(Below(old, first, ())),
        )
        return change, tree

    def is_hosts(self, tree: int) -> bool:
        """Whether it is a tree of the host, and no layer."""
        return tree not in self._trees.uppers

    def _list(self, level: Level) -> None:
        """Where both sides lie on the same, only what the layers hold can be different."""
        first, second = (set(side) for side in self._sides[-1])
        uppers = self._trees.uppers
        different = first ^ second
        wanted = (first | second) & uppers if different <= uppers else first | second
        level.names = self._names(sorted(wanted))

    def _names(self, trees: Sequence[int]) -> Iterator[str]:
        return iter(sorted({name for tree in trees for name in self._walk.list(tree)}))

    def _entry(self, level: Level, name: str) -> None:
        walk = self._walk
        path = join(level.path, name)
        before, after = (lookup(walk, name, path, self._trees.mounts, trees=side) for side in self._sides[-1])
        if before is None and after is None:
            return
        if before is not None and after is not None and self._is_one(before, after):
            return
        is_directory = after is not None and stat.S_ISDIR(after.status.st_mode)
        if path in self._scaffold and all(side is None or _is_empty(side.status) for side in (before, after)):
            pass
        elif before is None:
            self._tell(path, ChangeKind.ADDED, None, after)
        elif after is None:
            self._tell(path, ChangeKind.DELETED, before, None, sum(1 for _ in walk_below(walk, name, before)))
        elif stat.S_IFMT(before.status.st_mode) != stat.S_IFMT(after.status.st_mode):
            self._tell(path, ChangeKind.CHANGED, before, after)
        else:
            kind = self._difference(name, before, after)
            if kind is not None:
                self._tell(path, kind, before, after)
        if is_directory and after is not None:
            merged = before.trees if before is not None and stat.S_ISDIR(before.status.st_mode) else ()
            if walk.enter(name, path, (*after.trees, *(tree for tree in merged if tree not in after.trees))):
                self._sides.append((merged, after.trees))
                self._list(walk.current)
            elif after.trees:
                self.unlisted += 1  # too deep, or gone meanwhile

    def _is_one(self, before: Below, after: Below) -> bool:
        """Whether both sides show the same thing."""
        if stat.S_ISDIR(after.status.st_mode):
            return before.trees == after.trees
        same = (before.status.st_dev, before.status.st_ino) == (after.status.st_dev, after.status.st_ino)
        return same and self._owner(before) == self._owner(after)

    def _difference(self, name: str, before: Below, after: Below) -> ChangeKind | None:
        old, new = before.status, after.status
        if not self._is_same(name, before, after):
            return ChangeKind.CHANGED
        if not stat.S_ISLNK(new.st_mode) and (old.st_mode ^ new.st_mode) & 0o1777:
            return ChangeKind.MODE
        owners = self._owner(before), self._owner(after)
        return ChangeKind.OWNER if None not in owners and owners[0] != owners[1] else None

    def _is_same(self, name: str, before: Below, after: Below) -> bool:
        """Whether content and attributes of two entries of one type are the same."""
        old, new = before.status, after.status
        if stat.S_ISREG(new.st_mode):
            return old.st_size == new.st_size and self._same_file(name, before.tree, after.tree)
        if stat.S_ISLNK(new.st_mode):
            return self._link(before.tree, name) == self._link(after.tree, name)
        if stat.S_ISDIR(new.st_mode):
            return self._same_attributes(name, before.tree, after.tree)
        return old.st_rdev == new.st_rdev

    def _same_file(self, name: str, first: int, second: int) -> bool:
        with ExitStack() as stack:
            fds = []
            for tree in (second, first):
                fd = self._walk.open(tree, name)
                if fd < 0:
                    return False
                stack.callback(os.close, fd)
                fds.append(fd)
            try:
                return user_xattrs(fds[0]) == user_xattrs(fds[1]) and same_content(fds[0], fds[1])
            except OSError:
                return False

    def _same_attributes(self, name: str, first: int, second: int) -> bool:
        found = []
        for tree in (first, second):
            fd = self._walk.open(tree, name, OPEN_DIRECTORY)
            if fd < 0:
                return True  # then neither can be told
            try:
                found.append(user_xattrs(fd))
            finally:
                os.close(fd)
        return found[0] == found[1]

    def _link(self, tree: int, name: str) -> str | None:
        try:
            return os.readlink(name, dir_fd=self._walk.current.fds[tree])
        except (OSError, KeyError):
            return None

    def _owner(self, side: Below) -> tuple[int, int] | None:
        ids = self._trees.ids[side.tree]
        return None if ids is None else ids.owner(side.status)

    def _tell(
        self, path: str | None, kind: ChangeKind, before: Below | None, after: Below | None, entries: int = 0
    ) -> None:
        now = after or before
        if path is None or self.budget < len(path) or now is None:
            self.unlisted += 1
            return
        self.budget -= len(path)
        self.sources.append(after.tree if after else -1)
        self.found.append(
            Change(
                self.part.name,
                path,
                kind,
                file_type(now.status),
                type_before=file_type(before.status) if before else None,
                size_before=size_of(before.status if before else None),
                size_after=size_of(after.status if after else None),
                mode_before=stat.S_IMODE(before.status.st_mode) if before else None,
                mode_after=stat.S_IMODE(after.status.st_mode) if after else None,
                owner_before=self._owner(before) if before else None,
                owner_after=self._owner(after) if after else None,
                entries=entries,
            )
        )


def _is_empty(status: os.stat_result) -> bool:
    """Whether it can be something to mount on."""
    return stat.S_ISDIR(status.st_mode) or (stat.S_ISREG(status.st_mode) and status.st_size == 0)
