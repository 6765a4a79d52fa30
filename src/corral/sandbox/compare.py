"""The comparison itself: one part's upper tree against the lower trees, entry by entry.

Follows the overlay's own rules (overlayfs.rst): a whiteout hides what lies below, an opaque directory all of it, a
directory over a directory is merged with it, anything else covers what it lies over.
"""

from __future__ import annotations

import os
import stat
from collections.abc import Collection, Iterator, Sequence
from dataclasses import dataclass
from enum import Enum

from corral.sandbox.mounts import mounted_below
from corral.sandbox.ownership import SAME_IDS, OwnerMap
from corral.sandbox.trees import (
    MAX_DEPTH,
    OPEN_DIRECTORY,
    OVERLAY_PREFIX,
    UPPER,
    Level,
    Walk,
    is_opaque,
    is_whiteout,
)
from corral.sandbox.view import Changeable

MAX_PATH = 16_384
"""Characters of a path that is told; 10,000 levels of 255 bytes could otherwise fill the controller's memory."""
MAX_TEXT = 128 << 20
"""Characters of all paths told together."""
_CHUNK = 1 << 18


class FileType(Enum):
    """What kind of thing an entry is."""

    FILE = "file"
    DIRECTORY = "directory"
    SYMLINK = "symlink"
    FIFO = "fifo"
    SOCKET = "socket"
    DEVICE = "device"


_TYPES = {
    stat.S_IFREG: FileType.FILE,
    stat.S_IFDIR: FileType.DIRECTORY,
    stat.S_IFLNK: FileType.SYMLINK,
    stat.S_IFIFO: FileType.FIFO,
    stat.S_IFSOCK: FileType.SOCKET,
}


class ChangeKind(Enum):
    """What happened to an entry. A change of content that also changes mode or owner is CHANGED."""

    ADDED = "added"
    CHANGED = "changed"
    DELETED = "deleted"
    MODE = "mode"
    OWNER = "owner"


@dataclass(frozen=True, slots=True)
class Change:
    """One entry that is not what it was. ``before`` fields are None for an added one, ``after`` for a deleted one."""

    part: str
    path: str
    """Absolute, inside; bytes that are not UTF-8 as surrogate escapes."""
    kind: ChangeKind
    file_type: FileType
    """Of what is there now; of what was there, for a deleted one."""
    type_before: FileType | None = None
    size_before: int | None = None
    size_after: int | None = None
    mode_before: int | None = None
    mode_after: int | None = None
    owner_before: tuple[int, int] | None = None
    owner_after: tuple[int, int] | None = None
    """User and group inside; None also where it was not recorded."""
    entries: int = 0
    """How many entries lie below and are not listed: in a deleted directory, or past the limits."""


def compare(
    parts: Sequence[Changeable],
    layer: int,
    owners: OwnerMap,
    scaffold: Collection[str],
    special_modes: bool,
    *,
    raise_unreadable: bool = False,
) -> list[Change]:
    """The changes of all parts, in no order. Raises Unreadable where that is asked for."""
    found: list[Change] = []
    budget = MAX_TEXT
    for part in parts:
        roots = open_part(part, layer)
        try:
            if UPPER in roots:
                with Walk(roots, part.path, raise_unreadable=raise_unreadable) as walk:
                    comparison = Comparison(part, walk, owners, scaffold, special_modes, budget)
                    comparison.run()
                found += comparison.found
                budget = comparison.budget
        finally:
            for fd in roots.values():
                os.close(fd)
    return found


def open_part(part: Changeable, layer: int) -> dict[int, int]:
    """Descriptors of a part's trees by number, as far as they exist; the caller closes them."""
    roots: dict[int, int] = {}
    try:
        roots[UPPER] = os.open(part.name, OPEN_DIRECTORY, dir_fd=layer)
    except OSError:
        return roots
    for number, lower in enumerate(part.lowers, UPPER + 1):
        try:
            roots[number] = os.open(_place(part, lower), os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
        except OSError:
            continue
    return roots


def _place(part: Changeable, lower: str) -> str:
    """Where a lower tree is: a kept layer that is still read has another name once it is discarded (see `layer`)."""
    if not part.base or lower != part.base or os.path.isdir(lower):
        return lower
    *above, identifier, parts, name = lower.split("/")
    return "/".join((*above, f"partial-0-{identifier}", parts, name))


@dataclass(frozen=True, slots=True)
class Below:
    """What an overlay without the upper would show at a name."""

    status: os.stat_result
    tree: int
    trees: tuple[int, ...]
    """The lower trees whose directories of this name are merged."""


def lookup(
    walk: Walk, name: str, path: str | None, mounts: Collection[str] = (), *, trees: Sequence[int] | None = None
) -> Below | None:
    """Looks ``name`` up in the current level (overlayfs.rst, "merged"): in ``trees``, topmost first, or in all but the
    upper."""
    first: os.stat_result | None = None
    top = 0
    merged: list[int] = []
    lowers = [tree for tree in walk.current.ids if tree != UPPER] if trees is None else trees
    for tree in lowers:
        status = walk.status(tree, name)
        if status is None:
            continue
        if is_whiteout(status) or (first is not None and not stat.S_ISDIR(status.st_mode)):
            break
        if first is None:
            first, top = status, tree
        if not stat.S_ISDIR(status.st_mode):
            break
        # Another file system mounted there is not shown by the overlay.
        if path not in mounts:
            merged.append(tree)
        if tree != lowers[-1] and _entry_is_opaque(walk, tree, name):
            break
    return None if first is None else Below(first, top, tuple(merged))


def _entry_is_opaque(walk: Walk, tree: int, name: str) -> bool:
    fd = walk.open(tree, name, OPEN_DIRECTORY)
    if fd < 0:
        return False
    try:
        return is_opaque(fd)
    finally:
        os.close(fd)


class Comparison:
    """The walk through one part. ``found`` is the answer, ``budget`` what is left of the text limit."""

    def __init__(
        self,
        part: Changeable,
        walk: Walk,
        owners: OwnerMap,
        scaffold: Collection[str],
        special_modes: bool,
        budget: int,
    ) -> None:
        self.found: list[Change] = []
        self.budget = budget
        self._part = part
        self._walk = walk
        self._upper_ids = owners.upper
        self._lower_ids = owners.workspace if part.is_project else owners.system
        # Root's layers are kept with the ids that their files had inside.
        self._base = UPPER + 1 if part.base and os.geteuid() == 0 else -1
        self._scaffold = scaffold
        self._mode_mask = 0o7777 if special_modes else 0o1777
        self._unlisted = 0
        self._mounts: set[str] = set()
        for lower in part.lowers:
            self._mounts.update(part.path.rstrip("/") + mount[len(lower) :] for mount in mounted_below(lower))

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
            else:
                break
        if self._unlisted:
            self.found.append(
                Change(self._part.name, self._part.path, ChangeKind.CHANGED, FileType.DIRECTORY, entries=self._unlisted)
            )

    def _list(self, level: Level) -> None:
        walk = self._walk
        names = walk.list(UPPER)
        if not level.shows_through:
            names = list({*names, *(name for tree in level.ids if tree != UPPER for name in walk.list(tree))})
        level.names = iter(names)

    def _entry(self, level: Level, name: str) -> None:
        walk = self._walk
        path = join(level.path, name)
        after = walk.status(UPPER, name)
        before = lookup(walk, name, path, self._mounts) if len(level.ids) > 1 else None
        if after is None or (is_whiteout(after) and self._part.lowers):
            # Nothing in the upper: below an opaque directory that hides what lies below, elsewhere it has vanished.
            if before is not None and (after is not None or not level.shows_through):
                self._add(path, ChangeKind.DELETED, before, None, self._count(name, before))
            return
        is_directory = stat.S_ISDIR(after.st_mode)
        if path in self._scaffold and (is_directory or (stat.S_ISREG(after.st_mode) and after.st_size == 0)):
            pass
        elif before is None:
            self._add(path, ChangeKind.ADDED, None, after)
        elif stat.S_IFMT(before.status.st_mode) != stat.S_IFMT(after.st_mode):
            self._add(path, ChangeKind.CHANGED, before, after)
        else:
            kind = self._difference(name, before, after)
            if kind is not None:
                self._add(path, kind, before, after)
        if is_directory:
            merged = before.trees if before is not None and stat.S_ISDIR(before.status.st_mode) else ()
            if walk.enter(name, path, (UPPER, *merged)):
                child = walk.current
                child.shows_through = level.shows_through and not (merged and is_opaque(child.fds[UPPER]))
                self._list(child)
            elif len(walk.levels) >= MAX_DEPTH:
                self._unlisted += 1

    def _difference(self, name: str, before: Below, after: os.stat_result) -> ChangeKind | None:
        old = before.status
        if stat.S_ISREG(after.st_mode):
            if old.st_size != after.st_size or not self._same_file(name, before.tree):
                return ChangeKind.CHANGED
        elif stat.S_ISLNK(after.st_mode):
            if self._link(before.tree, name) != self._link(UPPER, name):
                return ChangeKind.CHANGED
        elif not stat.S_ISDIR(after.st_mode) and old.st_rdev != after.st_rdev:
            return ChangeKind.CHANGED
        if not stat.S_ISLNK(after.st_mode) and (old.st_mode ^ after.st_mode) & self._mode_mask:
            return ChangeKind.MODE
        if self._upper_ids is not None and self._upper_ids.owner(after) != self._owner(before):
            return ChangeKind.OWNER
        return None

    def _same_file(self, name: str, lower: int) -> bool:
        new = self._walk.open(UPPER, name)
        if new < 0:
            return False
        try:
            old = self._walk.open(lower, name)
            if old < 0:
                return False
            try:
                return user_xattrs(new) == user_xattrs(old) and same_content(new, old)
            finally:
                os.close(old)
        except OSError:
            return False
        finally:
            os.close(new)

    def _link(self, tree: int, name: str) -> str | None:
        try:
            return os.readlink(name, dir_fd=self._walk.current.fds[tree])
        except (OSError, KeyError):
            return None

    def _add(
        self,
        path: str | None,
        kind: ChangeKind,
        below: Below | None,
        after: os.stat_result | None,
        entries: int = 0,
    ) -> None:
        before = below.status if below is not None else None
        if path is None or self.budget < len(path):
            self._unlisted += 1
            return
        self.budget -= len(path)
        now = after or before
        assert now is not None  # noqa: S101 - for the type checker
        self.found.append(
            Change(
                self._part.name,
                path,
                kind,
                file_type(now),
                type_before=file_type(before) if before else None,
                size_before=size_of(before),
                size_after=size_of(after),
                mode_before=stat.S_IMODE(before.st_mode) if before else None,
                mode_after=stat.S_IMODE(after.st_mode) if after else None,
                owner_before=self._owner(below) if below is not None else None,
                owner_after=self._upper_ids.owner(after) if after and self._upper_ids else None,
                entries=entries,
            )
        )

    def _owner(self, below: Below) -> tuple[int, int]:
        """As it reads inside."""
        return (SAME_IDS if below.tree == self._base else self._lower_ids).owner(below.status)

    def _count(self, name: str, before: Below) -> int:
        """Entries below a deleted directory."""
        return sum(1 for _ in walk_below(self._walk, name, before))


def walk_below(walk: Walk, name: str, below: Below, path: str | None = None) -> Iterator[tuple[str, str | None, Below]]:
    """Everything in a lower directory: name, path and what it is, with the walk at the level that holds it.

    To be gone through to the end: the walk is back at its own level only then.
    """
    if not below.trees or not walk.enter(name, path, below.trees):
        return
    depth = len(walk.levels)
    _list_lowers(walk)
    while len(walk.levels) >= depth:
        level = walk.current
        entry = next(level.names, None)
        if entry is None:
            walk.leave()
            continue
        child = join(level.path, entry)
        found = lookup(walk, entry, child)
        if found is None:
            continue
        yield entry, child, found
        if found.trees and walk.enter(entry, child, found.trees):
            _list_lowers(walk)


def _list_lowers(walk: Walk) -> None:
    level = walk.current
    level.names = iter(sorted({name for tree in level.ids for name in walk.list(tree)}))


def join(path: str | None, name: str) -> str | None:
    """The path of an entry, or None where it is too long to be told."""
    if path is None or len(path) + len(name) >= MAX_PATH:
        return None
    return f"/{name}" if path == "/" else f"{path}/{name}"


def file_type(status: os.stat_result) -> FileType:
    """What kind of thing it is."""
    return _TYPES.get(stat.S_IFMT(status.st_mode), FileType.DEVICE)


def size_of(status: os.stat_result | None) -> int | None:
    """Bytes of what has a size of its own."""
    return status.st_size if status is not None and not stat.S_ISDIR(status.st_mode) else None


def user_xattrs(fd: int) -> dict[str, bytes]:
    """The extended attributes that belong to the user, not to the overlay or the system."""
    try:
        names = [name for name in os.listxattr(fd) if name.startswith("user.") and not name.startswith(OVERLAY_PREFIX)]
        return {name: os.getxattr(fd, name) for name in names}
    except OSError:
        return {}


def same_content(new: int, old: int) -> bool:
    """Compares two open files; reads no more than the older one had when it was opened."""
    first, second = os.fstat(new), os.fstat(old)
    if not stat.S_ISREG(first.st_mode) or not stat.S_ISREG(second.st_mode) or first.st_size != second.st_size:
        return False
    left = second.st_size
    while left > 0:
        one, other = os.read(new, min(_CHUNK, left)), os.read(old, min(_CHUNK, left))
        if one != other:
            return False
        if not one:
            return True
        left -= len(one)
    return True
