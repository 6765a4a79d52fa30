"""What a workspace was like when a run began, as far as its changes need it: so that a file that somebody else has
changed since is not replaced by one that knows nothing of that.

The run saw the workspace as it was at each moment. What has been changed since it began has a later change time
(ctime, inode(7)), which nobody can set. What was there and is gone has none, and what lies in a directory that was
renamed keeps its own: of what a run has changed, the layer keeps what was there when it was kept, with inode numbers.
And what has a later time because it was applied and taken back is known by its mark, as it was accepted once.
"""

from __future__ import annotations

import json
import os
import stat
from collections.abc import Iterable, Mapping
from contextlib import suppress
from dataclasses import dataclass

from corral.sandbox.compare import Change, ChangeKind

FILE = "existed"
ACCEPTED = "accepted"
_MAX = 256 << 20


@dataclass(frozen=True, slots=True)
class Baseline:
    """The start of a run."""

    began: int
    """Nanoseconds since the epoch; 0 where it is not known."""
    existed: Mapping[str, tuple[int, int]]
    """Of what the run has changed, and the directories that it lies in: what was there, by path, with device and inode
    number."""
    accepted: Mapping[str, str]
    """Marks of what was there, by path, from when it was applied before."""

    def is_touched(self, status: os.stat_result) -> bool:
        """Whether somebody has changed an entry of the workspace since. Change times may be a tick old; a tick after a
        run begins, its walls do not stand yet."""
        return status.st_ctime_ns > self.began

    def is_touched_itself(self, status: os.stat_result) -> bool:
        """The same of a directory, without what is in it: what comes and goes there sets both of its times at once."""
        return self.is_touched(status) and status.st_ctime_ns != status.st_mtime_ns

    def within(self, tree: str) -> Baseline:
        """That of one tree, by paths relative to it."""
        inside = f"{tree.rstrip('/')}/"
        existed = {path[len(inside) :]: which for path, which in self.existed.items() if path.startswith(inside)}
        accepted = {path[len(inside) :]: mark for path, mark in self.accepted.items() if path.startswith(inside)}
        return Baseline(self.began, existed, accepted)


def existing(trees: Mapping[str, str], listed: Iterable[Change]) -> dict[str, tuple[int, int]]:
    """What was there of what was changed, and which it was. ``trees`` are the paths of those that can be applied."""
    found: set[str] = set()
    added = {change.path for change in listed if change.kind is ChangeKind.ADDED}
    for change in listed:
        tree = trees.get(change.part)
        if tree is None or change.path == tree:
            continue
        if change.kind is not ChangeKind.ADDED:
            found.add(change.path)
        parent = change.path.rpartition("/")[0]
        while len(parent) > len(tree) and parent not in added and parent not in found:
            found.add(parent)
            parent = parent.rpartition("/")[0]
    which = {}
    for path in found:
        try:
            status = os.lstat(path)
        except OSError:
            which[path] = (0, 0)  # gone since it was compared; nothing is it
        else:
            which[path] = (status.st_dev, status.st_ino)
    return which


def relative(workspace: str, path: str) -> str:
    """A path below the workspace."""
    return path[len(workspace) :].lstrip("/")


def write(directory: int, existed: Mapping[str, tuple[int, int]]) -> None:
    """Writes beside a layer what was there. Raises OSError."""
    fd = os.open(FILE, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, 0o600, dir_fd=directory)
    with open(fd, "wb") as file:
        rows = (f"{device}:{inode}:".encode() + os.fsencode(path) for path, (device, inode) in sorted(existed.items()))
        file.write(b"\0".join(rows))


def accept(directory: int, marks: Mapping[str, str]) -> None:
    """Writes beside a layer what is there, and may be replaced by it. Raises OSError."""
    temporary = f".{ACCEPTED}.{os.getpid()}"
    with suppress(FileNotFoundError):
        os.unlink(temporary, dir_fd=directory)
    fd = os.open(temporary, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, 0o600, dir_fd=directory)
    with open(fd, "w", encoding="ascii") as file:
        json.dump(dict(marks), file)
    os.rename(temporary, ACCEPTED, src_dir_fd=directory, dst_dir_fd=directory)


def read(directory: int, began: int) -> Baseline:
    """Raises OSError or ValueError."""
    content = _content(directory, FILE)
    existed = {}
    for row in content.split(b"\0") if content else ():
        device, inode, path = row.split(b":", 2)
        existed[os.fsdecode(path)] = (int(device), int(inode))
    accepted: dict[str, str] = {}
    with suppress(FileNotFoundError):
        accepted = json.loads(_content(directory, ACCEPTED))
    return Baseline(began, existed, accepted)


def _content(directory: int, name: str) -> bytes:
    fd = os.open(name, os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK | os.O_CLOEXEC, dir_fd=directory)
    with open(fd, "rb") as file:
        content = file.read(_MAX + 1)
        if not stat.S_ISREG(os.fstat(fd).st_mode) or len(content) > _MAX:
            raise ValueError(f"{name} is not what was written")
    return content
