"""Walking trees that may be hostile: several directory trees at once, depth first, relative to descriptors.

Rules, for everything that looks into a layer:

* Nothing is opened by a path of more than one component, and nothing through a symbolic link, so whatever an agent
  renames or plants while a walk goes on, the walk stays in its trees.
* Depth costs neither stack nor descriptors. Only the last few levels stay open; one that was closed is opened again
  as ``..`` of its child, and used only if it is still the directory that it was.
* What vanishes during the walk is skipped. Where this machine cannot look (no descriptors or memory left, a broken
  disk), that is an OSError: it must not be taken for something that is not there. What may not be read raises
  :class:`Unreadable` where asked for: its owner, with the capabilities of a user namespace, can read it (see
  :mod:`corral.sandbox.asowner`).
"""

from __future__ import annotations

import errno
import os
import stat
from collections.abc import Callable, Iterator, Mapping, Sequence
from itertools import chain

OPAQUE = "user.overlay.opaque"
OVERLAY_PREFIX = "user.overlay."
UPPER = 0
"""Number of the tree that is looked at; those below it are 1, 2, ... from the topmost on."""
MAX_DEPTH = 10_000
"""Levels that are entered; a real tree has a few dozen, and each level costs memory here."""
OPEN_LEVELS = 32

OPEN_DIRECTORY = os.O_RDONLY | os.O_DIRECTORY | os.O_NOFOLLOW | os.O_CLOEXEC
OPEN_FILE = os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK | os.O_NOCTTY | os.O_CLOEXEC


class Unreadable(Exception):
    """An entry may not be read with the ids and capabilities of this process."""


_CANNOT_LOOK = frozenset((errno.EMFILE, errno.ENFILE, errno.ENOMEM, errno.EIO))


def is_whiteout(status: os.stat_result) -> bool:
    """Whether an overlay takes the entry for "deleted" (overlayfs.rst, "whiteouts and opaque directories")."""
    return stat.S_ISCHR(status.st_mode) and status.st_rdev == 0


def is_opaque(directory: int) -> bool:
    """Whether an overlay shows nothing of what lies below this directory."""
    try:
        return os.getxattr(directory, OPAQUE) == b"y"
    except OSError:
        return False


def open_components(root: int, components: Sequence[str], flags: int = OPEN_DIRECTORY) -> int:
    """Opens what lies at ``components`` below ``root``, one by one. Raises OSError."""
    fd = os.dup(root)
    try:
        for number, name in enumerate(components):
            last = number == len(components) - 1
            following = os.open(name, flags if last else OPEN_DIRECTORY, dir_fd=fd)
            os.close(fd)
            fd = following
    except BaseException:
        os.close(fd)
        raise
    return fd


class Level:
    """One directory, in each tree that has it."""

    __slots__ = ("closed", "fds", "ids", "name", "names", "path", "shows_through", "status")

    def __init__(self, name: str, path: str | None, fds: dict[int, int]) -> None:
        self.name = name
        self.path = path
        """Absolute path inside; None where it is too long to be told."""
        self.fds = fds
        self.ids = {tree: _identity(fd) for tree, fd in fds.items()}
        self.names: Iterator[str] = iter(())
        self.shows_through = True
        """Whether the sandbox sees what lies below (the directory and all above it are not opaque)."""
        self.status: os.stat_result | None = None
        self.closed = False

    def close(self) -> None:
        for fd in self.fds.values():
            os.close(fd)
        self.fds = {}
        self.closed = True


class Walk:
    """A stack of levels, the innermost last. Owns every descriptor in it; used as a context manager."""

    def __init__(self, roots: Mapping[int, int], path: str, *, raise_unreadable: bool = False) -> None:
        """Starts at copies of the given descriptors, which stay the caller's."""
        self.raise_unreadable = raise_unreadable
        self.uppers = {UPPER}
        """The trees that are layers, whose files are all of one owner."""
        self.levels = [Level("", path, {tree: os.open(".", OPEN_DIRECTORY, dir_fd=fd) for tree, fd in roots.items()})]

    def __enter__(self) -> Walk:
        return self

    def __exit__(self, *_: object) -> None:
        for level in self.levels:
            level.close()
        self.levels = []

    @property
    def current(self) -> Level:
        return self.levels[-1]

    def list(self, tree: int) -> list[str]:
        """Names in one tree's current directory; none where it is absent or cannot be read."""
        fd = self.current.fds.get(tree)
        if fd is None:
            return []
        try:
            return os.listdir(fd)
        except PermissionError as error:
            self._unreadable(error)
        except OSError as error:
            _skip(error)
        return []

    def status(self, tree: int, name: str) -> os.stat_result | None:
        """lstat of an entry; None where there is none, or it cannot be looked at."""
        fd = self.current.fds.get(tree)
        if fd is None:
            return None
        try:
            return os.stat(name, dir_fd=fd, follow_symlinks=False)
        except PermissionError as error:
            if tree in self.uppers:
                self._unreadable(error)
        except OSError as error:
            _skip(error)
        return None

    def open(self, tree: int, name: str, flags: int = OPEN_FILE) -> int:
        """Opens an entry and returns its descriptor, or -1 where that cannot be."""
        fd = self.current.fds.get(tree)
        if fd is None:
            return -1
        try:
            return os.open(name, flags, dir_fd=fd)
        except PermissionError as error:
            # Below lie the host's files. Those of others are as closed to the sandbox as they are to its caller.
            status = self.status(tree, name)
            if tree in self.uppers or (status is not None and status.st_uid == os.geteuid()):
                self._unreadable(error)
        except OSError as error:
            _skip(error)
        return -1

    def enter(self, name: str, path: str | None, trees: Sequence[int]) -> bool:
        """Goes into a directory in those of ``trees`` that have it; False (and no move) where the first has it not."""
        if len(self.levels) >= MAX_DEPTH:
            return False
        fds: dict[int, int] = {}
        try:
            for tree in trees:
                fd = self.open(tree, name, OPEN_DIRECTORY)
                if fd >= 0:
                    fds[tree] = fd
                elif tree == trees[0]:
                    return False
            level = Level(name, path, fds)
        except BaseException:
            for fd in fds.values():
                os.close(fd)
            raise
        self.levels.append(level)
        # The root stays open: from there a level can be found again by name.
        if len(self.levels) > OPEN_LEVELS + 1:
            self.levels[-OPEN_LEVELS - 1].close()
        return True

    def leave(self) -> Level:
        """Goes back up; returns the level left, its descriptors closed."""
        child = self.levels.pop()
        parent = self.levels[-1]
        if parent.closed:
            parent.closed = False
            for tree, identity in parent.ids.items():
                fd = self._reopen(child, tree, identity)
                if fd >= 0:
                    parent.fds[tree] = fd
        child.close()
        return child

    def _reopen(self, child: Level, tree: int, identity: tuple[int, int]) -> int:
        fd = -1
        if tree in child.fds:
            try:
                fd = os.open("..", OPEN_DIRECTORY, dir_fd=child.fds[tree])
            except OSError:
                fd = -1
        if fd >= 0 and _identity(fd) == identity:
            return fd
        if fd >= 0:
            os.close(fd)
        root = self.levels[0].fds.get(tree)
        if root is None:
            return -1
        try:
            fd = open_components(root, [level.name for level in self.levels[1:]])
        except OSError:
            return -1
        if _identity(fd) == identity:
            return fd
        os.close(fd)
        return -1

    def _unreadable(self, error: PermissionError) -> None:
        if self.raise_unreadable:
            raise Unreadable(str(error)) from None


def _skip(error: OSError) -> None:
    if error.errno in _CANNOT_LOOK:
        raise error


def _identity(fd: int) -> tuple[int, int]:
    status = os.fstat(fd)
    return status.st_dev, status.st_ino


def remove_tree(parent: int, name: str, *, removed: Callable[[os.stat_result], None] | None = None) -> None:
    """Removes a directory tree of one's own, whatever modes it has; follows no link. ``removed`` is told of each entry
    that is gone, as it was just before; what it raises stops this. Raises OSError."""
    _make_accessible(parent, name)
    try:
        root = os.open(name, OPEN_DIRECTORY, dir_fd=parent)
    except FileNotFoundError:
        return
    except OSError as error:
        if error.errno not in (errno.ENOTDIR, errno.ELOOP):
            raise
        os.unlink(name, dir_fd=parent)
        return
    try:
        with Walk({UPPER: root}, "") as walk:
            _empty(walk, removed)
        status = os.fstat(root)
    finally:
        os.close(root)
    os.rmdir(name, dir_fd=parent)
    if removed is not None:
        removed(status)


def _empty(walk: Walk, removed: Callable[[os.stat_result], None] | None) -> None:
    walk.current.names = iter(walk.list(UPPER))
    while True:
        level = walk.current
        name = next(level.names, None)
        if name is None:
            if len(walk.levels) == 1:
                return
            status = os.fstat(level.fds[UPPER]) if removed is not None else None
            left = walk.leave()
            os.rmdir(left.name, dir_fd=walk.current.fds[UPPER])
            if removed is not None and status is not None:
                removed(status)
            continue
        directory = level.fds[UPPER]
        try:
            status = os.stat(name, dir_fd=directory, follow_symlinks=False) if removed is not None else None
            os.unlink(name, dir_fd=directory)
            if removed is not None and status is not None:
                removed(status)
            continue
        except FileNotFoundError:
            continue
        except OSError as error:
            if error.errno not in (errno.EISDIR, errno.EPERM):
                raise
        _make_accessible(directory, name)
        if len(walk.levels) >= MAX_DEPTH:
            # However deep it is, its parts are emptied one after the other, from the top.
            top, moved = walk.levels[0], f".corral-deep-{os.urandom(8).hex()}"
            os.rename(name, moved, src_dir_fd=directory, dst_dir_fd=top.fds[UPPER])
            top.names = chain(top.names, (moved,))
            continue
        if not walk.enter(name, None, (UPPER,)):
            raise OSError(errno.ENOTEMPTY, "a directory cannot be entered to empty it")
        walk.current.names = iter(walk.list(UPPER))


def _make_accessible(parent: int, name: str) -> None:
    """Lets the owner into a directory that is to be emptied."""
    if os.geteuid() == 0:
        return
    try:
        fd = os.open(name, os.O_PATH | os.O_NOFOLLOW | os.O_CLOEXEC, dir_fd=parent)
    except OSError:
        return
    try:
        status = os.fstat(fd)
        if stat.S_ISDIR(status.st_mode) and status.st_mode & 0o700 != 0o700:
            os.chmod(f"/proc/self/fd/{fd}", 0o700)
    finally:
        os.close(fd)
