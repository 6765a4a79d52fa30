"""What the layers of the work area take on disk, and when the first of them may go: known without looking at them.

    <state>/layers/account     {"boot": ..., "total": bytes or null, "added": bytes, "next": seconds or null}

What is kept is added before it has its name, what is removed is subtracted when it is gone. So whatever is killed in
between, there is never less in the account than in the layers; :func:`count` puts it right by looking at every file,
which `corral gc` does. The total of another boot counts for nothing, since what was not synced may be missing in it.

Bytes are those of blocks (st_blocks, inode(7)), and a file with several names counts once, whichever layers have it.
What files share by reflink counts for each of them: to tell would take their extents (FIEMAP), one call for each file.
"""

from __future__ import annotations

import fcntl
import json
import os
import re
import stat
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass, replace
from typing import Any, NamedTuple

from corral.sandbox import asowner
from corral.sandbox.ownership import Ids
from corral.sandbox.plan import IdLine
from corral.sandbox.trees import OPEN_DIRECTORY, UPPER, Unreadable, Walk, remove_tree

_FILE = "account"
_LENGTH = 256
"""Bytes of the account: it is replaced by one call, so whoever is killed leaves the old one or the new one."""
_BLOCK = 512
_DISCARDED = "partial-0-"
_LAYER = re.compile(r"[a-z2-7]{8}|partial-[0-9]{1,10}-[a-z2-7]{8}")


class OutOfTime(Exception):
    """There was no time to remove all of it. What is left has no name that anybody looks at, and goes another time."""


@dataclass(frozen=True, slots=True)
class _Account:
    boot: str
    total: int | None
    """None where nobody has counted since the machine was started."""
    added: int
    """Bytes that were added since somebody has begun to count."""
    next: float | None
    """When the first of them may go, at the earliest; None where none ever may."""


def _boot() -> str:
    with open("/proc/sys/kernel/random/boot_id", encoding="ascii") as file:
        return file.read().strip()


@contextmanager
def _locked(layers: int, *, make: bool) -> Iterator[tuple[int, _Account] | None]:
    flags = os.O_RDWR | os.O_CLOEXEC | os.O_NOFOLLOW | (os.O_CREAT if make else 0)
    try:
        fd = os.open(_FILE, flags, 0o600, dir_fd=layers)
    except FileNotFoundError:
        yield None
        return
    owner = os.getpid()
    try:
        fcntl.flock(fd, fcntl.LOCK_EX)
        yield fd, _read(fd)
    finally:
        if os.getpid() == owner:  # a child that was forked meanwhile has the lock, too
            fcntl.flock(fd, fcntl.LOCK_UN)
        os.close(fd)


def _read(fd: int) -> _Account:
    """What cannot be read says that nobody has counted, and that some may go: then somebody looks."""
    boot = _boot()
    try:
        content = os.pread(fd, _LENGTH, 0)
        if not content:
            return _Account(boot, None, 0, None)
        data = json.loads(content)
        total, added, following = data["total"], data["added"], data["next"]
        if (type(total) is not int and total is not None) or type(following) not in (int, float, type(None)):
            raise ValueError("it is no account")
        return _Account(boot, total if data["boot"] == boot else None, int(added), following)
    except (OSError, ValueError, TypeError, KeyError, RecursionError):
        return _Account(boot, None, 0, 0)


def _write(fd: int, account: _Account) -> None:
    data = {"boot": account.boot, "total": account.total, "added": account.added, "next": account.next}
    os.pwrite(fd, json.dumps(data).encode("ascii").ljust(_LENGTH), 0)


def add(layers: int, change: int, *, expires: int = 0, bound: int | None = None) -> bool:
    """Enters bytes that are added, or are gone, and when what is kept may go, if it may; unless all would then take
    more than ``bound``, which is False. Raises OSError."""
    with _locked(layers, make=bool(expires)) as held:
        if held is None:
            return True
        fd, account = held
        if account.total is not None:
            if bound is not None and account.total + change > bound:
                return False
            account = replace(account, total=max(0, account.total + change))
        account = replace(account, added=account.added + max(0, change))
        if expires:
            account = replace(account, next=expires if account.next is None else min(account.next, expires))
        _write(fd, account)
        return True


def is_due(layers: int, now: float) -> bool:
    """Whether something may have to go by its age."""
    with _locked(layers, make=False) as held:
        return held is not None and held[1].next is not None and held[1].next <= now


def set_next(layers: int, when: float | None, *, unless_before: float) -> None:
    """Enters when the first of those that are left may go; what has been entered since, and is later than
    ``unless_before``, stays if it is earlier. Raises OSError."""
    with _locked(layers, make=when is not None) as held:
        if held is None:
            return
        fd, account = held
        if account.next is not None and account.next > unless_before and (when is None or account.next < when):
            when = account.next
        _write(fd, replace(account, next=when))


@contextmanager
def reserving(layers: int) -> Iterator[int]:
    """The bytes that all layers take; nobody else adds to them, or asks, meanwhile. Counts where nobody has."""
    while True:
        with _locked(layers, make=True) as held:
            if held is not None and held[1].total is not None:
                yield held[1].total
                return
        count(layers)


def total(layers: int) -> int:
    """The bytes that all layers take. Counts where nobody has."""
    with reserving(layers) as found:
        return found


# ---- looking at every file ----


class Links:
    """Which names of files with several were met so far."""

    def __init__(self) -> None:
        self._left: dict[tuple[int, int], int] = {}

    def meet(self, entry: _Entry) -> tuple[bool, bool]:
        """Whether this name is the first of its file, and whether it is the last."""
        if entry.links == 1:
            return True, True
        before = self._left.get(entry.file, entry.links)
        self._left[entry.file] = before - 1
        return before == entry.links, before == 1


class _Entry(NamedTuple):
    """One name in a layer."""

    file: tuple[int, int]
    links: int
    """How many names the file has; a directory has one."""
    bytes: int


def taken(layers: int, name: str, met: Links) -> int:
    """The bytes that a layer takes, but for files that were met before. Raises OSError, CorralError."""
    return sum(entry.bytes for entry in _entries(layers, name) if met.meet(entry)[0])


def freed(layers: int, name: str, met: Links) -> int:
    """The bytes that are free once a layer is removed, and those before it with the same ``met``. Raises OSError,
    CorralError."""
    return sum(entry.bytes for entry in _entries(layers, name) if met.meet(entry)[1])


def count(layers: int) -> int:
    """Looks at every file of every layer, and enters and returns what they take. Waits for those who remove some.

    A call to the system for each file: 100,000 take about half a second. Raises OSError, CorralError."""
    with _counting(layers, fcntl.LOCK_EX):
        # Whoever keeps something meanwhile does not wait: it may be in the account twice then, but never not at all.
        with _locked(layers, make=True) as held:
            assert held is not None  # noqa: S101  # it was made
            _write(held[0], replace(held[1], added=0))
        met = Links()
        found = sum(taken(layers, name, met) for name in os.listdir(layers) if _LAYER.fullmatch(name))
        with _locked(layers, make=True) as held:
            assert held is not None  # noqa: S101  # the same
            found += held[1].added
            _write(held[0], replace(held[1], total=found))
        return found


def _entries(layers: int, name: str) -> list[_Entry]:
    try:
        root = os.open(name, OPEN_DIRECTORY, dir_fd=layers)
    except FileNotFoundError:
        return []
    except NotADirectoryError:  # a file, as lies beside a log, or a link
        with suppress(FileNotFoundError):
            return [_entry(os.stat(name, dir_fd=layers, follow_symlinks=False))]
        return []
    try:
        return _look(root)
    except Unreadable:  # an ordinary user's, with directories that are closed to himself
        own = Ids((IdLine(0, os.geteuid(), 1),), (IdLine(0, os.getegid(), 1),))
        rows = asowner.call("measure", (root,), {"root": root}, own)
        return [_Entry((device, inode), links, size) for device, inode, links, size in rows]
    finally:
        os.close(root)


def _look(root: int) -> list[_Entry]:
    """The directory and all that lies in it; no link is followed. Raises Unreadable."""
    found = [_entry(os.fstat(root))]
    with Walk({UPPER: root}, "", raise_unreadable=True) as walk:
        walk.current.names = iter(walk.list(UPPER))
        while True:
            name = next(walk.current.names, None)
            if name is None:
                if len(walk.levels) == 1:
                    return found
                walk.leave()
                continue
            status = walk.status(UPPER, name)
            if status is None:
                continue
            found.append(_entry(status))
            if stat.S_ISDIR(status.st_mode) and walk.enter(name, None, (UPPER,)):
                walk.current.names = iter(walk.list(UPPER))


def _entry(status: os.stat_result) -> _Entry:
    links = 1 if stat.S_ISDIR(status.st_mode) else status.st_nlink
    return _Entry((status.st_dev, status.st_ino), links, status.st_blocks * _BLOCK)


def serve(request: dict[str, Any]) -> Any:
    """:func:`_look` in a helper process."""
    return [(*entry.file, entry.links, entry.bytes) for entry in _look(request["root"])]


# ---- removing ----


@contextmanager
def _counting(layers: int, how: int) -> Iterator[None]:
    """Who removes shares this lock, who counts has it alone: what is gone while it is counted would be subtracted
    once more. On a descriptor of its own: of one, a lock is one's own."""
    fd, owner = os.open(".", OPEN_DIRECTORY, dir_fd=layers), os.getpid()
    try:
        fcntl.flock(fd, how)
        yield
    finally:
        if os.getpid() == owner:
            fcntl.flock(fd, fcntl.LOCK_UN)
        os.close(fd)


def remove(layers: int, name: str, *, deadline: float | None = None, wait: bool = True) -> int:
    """Removes what has lost its name, and returns the bytes that are free now.

    ``deadline`` is by time.monotonic(). Raises OutOfTime, OSError; BlockingIOError where it should not ``wait`` for one
    who counts.
    """
    gone = 0

    def removed(status: os.stat_result) -> None:
        nonlocal gone
        if stat.S_ISDIR(status.st_mode) or status.st_nlink == 1:
            gone += status.st_blocks * _BLOCK
        if deadline is not None and time.monotonic() > deadline:
            raise OutOfTime

    with _counting(layers, fcntl.LOCK_SH | (0 if wait else fcntl.LOCK_NB)):
        try:
            remove_tree(layers, name, removed=removed)
        finally:
            if name.startswith(_DISCARDED):  # what was never whole was never added
                with suppress(OSError):  # then there is too much in the account
                    add(layers, -gone)
    return gone
