"""One entry of the workspace changes places with another: the moves of which applying and taking back are made."""

from __future__ import annotations

import errno
import os
import stat
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager

from corral.errors import CorralError
from corral.openat2 import Resolve, openat2
from corral.sandbox.apply.carrying import Rename, copy, finish, rename
from corral.sandbox.apply.journal import Journal, Step, components
from corral.sandbox.apply.marks import Marker, Unfit
from corral.sandbox.copying import Room
from corral.sandbox.trees import OPEN_DIRECTORY, open_components


class Conflict(CorralError):
    """Something in the workspace is not what it was to be. Nothing was changed."""

    exit_code = 1


def moved(step: Step) -> Conflict:
    """What is raised where somebody was quicker."""
    return Conflict(f"{step.path}: it was changed meanwhile; nothing was applied")


def host_marker() -> Marker:
    """How the workspace's files are looked at: as they are. An ordinary user cannot give them to others, nor take
    another's back."""
    if os.geteuid() == 0:
        return Marker()
    groups = {os.getegid(), *os.getgroups()}

    def watch(path: str, status: os.stat_result) -> None:
        if status.st_uid != os.geteuid() or status.st_gid not in groups:
            raise Unfit(f"{path}: it belongs to others, so that you could not take back what replaces it")

    return Marker(watch=watch)


@contextmanager
def opened(workspace: str) -> Iterator[int]:
    """The workspace, which no link leads to. Raises Conflict."""
    slash = os.open("/", OPEN_DIRECTORY)
    try:
        flags = os.O_RDONLY | os.O_DIRECTORY
        root = openat2(slash, os.fsencode(workspace).lstrip(b"/") or b".", flags, Resolve.NO_SYMLINKS)
    except OSError as error:
        raise Conflict(f"{workspace}: {error.strerror}") from None
    finally:
        os.close(slash)
    try:
        yield root
    finally:
        os.close(root)


def mounted_at(workspace: str, path: str, points: Sequence[str]) -> str:
    """Which of the mount points lies in an entry, or is it; nothing where none does."""
    place = f"{workspace.rstrip('/')}/{path}"
    return next((point for point in points if point == place or point.startswith(f"{place}/")), "")


@contextmanager
def place_of(root: int, step: Step) -> Iterator[tuple[int, str]]:
    """The directory that an entry lies in, and its name there. Raises Conflict."""
    *parents, name = components(step.path)
    try:
        parent = open_components(root, parents)
    except OSError as error:
        raise Conflict(f"{step.path}: the directory that it lies in is not there: {error.strerror}") from None
    try:
        if os.fstat(parent).st_dev != os.fstat(root).st_dev:
            raise Conflict(f"{step.path}: it lies on another file system than the workspace")
        yield parent, name
    finally:
        os.close(parent)


def mark_of(marker: Marker, step: Step, directory: int, name: str) -> str | None:
    """The mark of what a step is about. Raises Unfit."""
    if not step.is_own:
        return marker.mark(directory, name, step.path)
    try:
        fd = os.open(name, OPEN_DIRECTORY, dir_fd=directory)
    except OSError:
        return None
    try:
        return marker.own_mark(fd)
    finally:
        os.close(fd)


def known(marker: Marker, step: Step, directory: int, name: str) -> str | None:
    """A mark; of what has none, something that is none."""
    try:
        return mark_of(marker, step, directory, name)
    except CorralError:
        return "?"


def copy_before(marker: Marker, step: Step, room: Room, parent: int, entry: str, target: int, name: str) -> None:
    """Copies what a step replaces. Raises OSError, Unfit."""
    if step.is_own:
        copy_own(marker, room, parent, entry, target, name)
    else:
        copy(marker, room, parent, entry, target, name, step.path)


def copy_own(marker: Marker, room: Room, source: int, name: str, target: int, new_name: str) -> None:
    """Makes an empty directory that is like another. Raises OSError."""
    room.take(4096)
    os.mkdir(new_name, 0o700, dir_fd=target)
    with ExitStack() as stack:
        fds = []
        for each, where in ((name, source), (new_name, target)):
            fds.append(os.open(each, OPEN_DIRECTORY, dir_fd=where))
            stack.callback(os.close, fds[-1])
        finish(marker, *fds)


def change_own(marker: Marker, step: Step, parent: int, entry: str, source: int, name: str) -> None:
    """Makes a directory like another, if it is as the step says. Raises Conflict, OSError."""
    with ExitStack() as stack:
        fds = []
        for each, where in ((name, source), (entry, parent)):
            try:
                fds.append(os.open(each, OPEN_DIRECTORY, dir_fd=where))
            except OSError:
                raise moved(step) from None
            stack.callback(os.close, fds[-1])
        if step.before is not None and marker.own_mark(fds[1]) != step.before:
            raise moved(step)
        finish(marker, *fds)


def exchange(step: Step, parent: int, entry: str, staging: int, name: str) -> None:
    """Puts what is staged in its place, and what was there, if anything should be, where that was.

    Raises Conflict, CorralError."""
    try:
        if step.before is None:
            rename(Rename.NOREPLACE, staging, name, parent, entry)
        elif step.after is None:
            rename(Rename.NOREPLACE, parent, entry, staging, name)
        else:
            rename(Rename.EXCHANGE, staging, name, parent, entry)
    except OSError as error:
        if error.errno in (errno.EEXIST, errno.ENOENT):
            raise moved(step) from None
        if error.errno == errno.EINVAL:
            raise CorralError(
                f"{step.path}: this file system cannot exchange two names at once (renameat2(2)), so nothing can be "
                "applied to it safely; use `corral diff --patch`"
            ) from None
        if error.errno in (errno.EXDEV, errno.EBUSY):
            raise Conflict(f"{step.path}: another file system is mounted there") from None
        raise CorralError(f"{step.path}: it cannot be replaced or moved: {error.strerror}") from None


# ---- what lies beside the workspace's files meanwhile ----


def make_staging(journal: Journal, root: int) -> tuple[int, int]:
    """Makes its directory, and says which it is. Raises OSError."""
    os.mkdir(journal.staging, 0o700, dir_fd=root)
    return _identity(os.stat(journal.staging, dir_fd=root, follow_symlinks=False))


@contextmanager
def staging_of(journal: Journal, root: int) -> Iterator[int]:
    """The directory that the journal knows. Raises FileNotFoundError where it is not there, or another is."""
    try:
        fd = os.open(journal.staging, OPEN_DIRECTORY, dir_fd=root)
    except OSError:
        raise FileNotFoundError(journal.staging) from None
    try:
        status = os.fstat(fd)
        is_own = status.st_uid == os.geteuid() and not stat.S_IMODE(status.st_mode) & 0o077
        if _identity(status) != journal.identity or not is_own:
            raise FileNotFoundError(journal.staging)
        yield fd
    finally:
        os.close(fd)


def _identity(status: os.stat_result) -> tuple[int, int]:
    return status.st_dev, status.st_ino


def sync(directory: int) -> None:
    """syncfs(2). Raises OSError."""
    import ctypes

    if ctypes.CDLL(None, use_errno=True).syncfs(directory) != 0:
        number = ctypes.get_errno()
        raise OSError(number, os.strerror(number))
