"""Applying steps to a workspace: all of them, or none.

    PREPARING   what is new is copied to a directory beside the workspace's files, what is there to one of Corral's
    SWAPPING    each changes places with what was there (renameat2(2)), which is then compared with what it was to be
    DONE        what was there is removed; its copy stays, so that it can be taken back

Whatever goes wrong before DONE, also the end of this process, is taken back: what changed places does so again. Which
steps were done is seen from what lies where. Nothing is ever written over, so whatever somebody else has put into a
place meanwhile is still there afterwards: it then stops the applying, or its taking back.
"""

from __future__ import annotations

import errno
import os
import stat
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import replace
from datetime import UTC, datetime
from typing import Protocol

from corral.errors import CorralError
from corral.openat2 import Resolve, openat2
from corral.sandbox.apply import journal as journals
from corral.sandbox.apply.carrying import Rename, copy, finish, rename
from corral.sandbox.apply.journal import BEFORE, Journal, Phase, Step, alone_in, components, locked
from corral.sandbox.apply.marks import Marker, Unfit
from corral.sandbox.copying import Room
from corral.sandbox.prepare import new_id
from corral.sandbox.trees import OPEN_DIRECTORY, open_components, remove_tree

Progress = Callable[[int, int], None]


class Conflict(CorralError):
    """Something in the workspace is not what it was to be. Nothing was changed."""

    exit_code = 1


class Source(Protocol):
    """Where what is new comes from."""

    def copy(self, number: int, step: Step, room: Room, target: int, name: str) -> None:
        """Makes what step ``number`` puts there; of a step that changes a directory itself, an empty one like it."""


def host_marker() -> Marker:
    """How the workspace's files are looked at: as they are. An ordinary user cannot give them to others, nor take
    another's back."""
    if os.geteuid() == 0:
        return Marker()

    def watch(path: str, status: os.stat_result) -> None:
        if status.st_uid != os.geteuid():
            raise Unfit(f"{path}: it belongs to somebody else, so that you could not take back what replaces it")

    return Marker(owner=lambda status: (0, 0), watch=watch)


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


def apply_steps(
    workspace: str,
    layer: str,
    steps: Sequence[Step],
    source: Source,
    *,
    undoes: str = "",
    progress: Progress = lambda done, total: None,
) -> Journal:
    """Applies the steps and returns the journal by which they can be taken back.

    Raises Conflict where something is not what a step says, CorralError where it cannot be done: nothing is changed.
    """
    with alone_in(workspace), opened(workspace) as root:
        _recover_in(workspace)
        now = datetime.now(UTC).isoformat(timespec="milliseconds")
        journal = Journal(new_id(), layer, workspace, now, Phase.PREPARING, tuple(steps), undoes)
        with locked(journal.id, make=True) as directory:
            try:
                journals.begin(journal.id)
                journals.write(journal)
                _Application(journal, root, directory, progress).run(source)
            except BaseException as error:
                _take_back(journal, root, directory)
                if isinstance(error, OSError):
                    raise CorralError(f"{error.filename or workspace}: cannot apply: {error.strerror}") from None
                raise
    return replace(journal, phase=Phase.DONE)


class _Application:
    def __init__(self, journal: Journal, root: int, directory: int, progress: Progress) -> None:
        self._journal, self._root, self._directory, self._progress = journal, root, directory, progress
        self._marker = host_marker()

    def run(self, source: Source) -> None:
        journal = self._journal
        with _staging(journal, self._root, make=True) as staging:
            self._prepare(source, staging)
            for each in (staging, self._directory):
                _sync(each)
            journals.write(replace(journal, phase=Phase.SWAPPING))
            for number, step in enumerate(journal.steps):
                self._swap(number, step, staging)
                self._progress(len(journal.steps) + number + 1, 2 * len(journal.steps))
            _sync(self._root)
            journals.write(replace(journal, phase=Phase.DONE))
        remove_tree(self._root, journal.staging)
        journals.finish(journal.id)

    def _prepare(self, source: Source, staging: int) -> None:
        os.mkdir(BEFORE, 0o700, dir_fd=self._directory)
        before = os.open(BEFORE, OPEN_DIRECTORY, dir_fd=self._directory)
        rooms = Room(staging), Room(before)
        try:
            for number, step in enumerate(self._journal.steps):
                name = str(number)
                if step.after is not None:
                    source.copy(number, step, rooms[0], staging, name)
                    if _mark(self._marker, step, staging, name) != step.after:
                        raise Conflict(f"{step.path}: what was to be applied is not what was shown")
                if step.before is not None:
                    with self._place(step) as (parent, entry):
                        try:
                            _copy_before(self._marker, step, rooms[1], parent, entry, before, name)
                        except FileNotFoundError:
                            raise _moved(step) from None
                    if _mark(self._marker, step, before, name) != step.before:
                        raise _moved(step)
                self._progress(number + 1, 2 * len(self._journal.steps))
        finally:
            os.close(before)

    def _swap(self, number: int, step: Step, staging: int) -> None:
        name = str(number)
        with self._place(step) as (parent, entry):
            if step.is_own:
                _change_own(self._marker, step, parent, entry, staging, name)
                return
            _exchange(step, parent, entry, staging, name)
            # Looked at only now: before, somebody could have changed it again.
            try:
                is_as_shown = _mark(self._marker, step, staging, name) == step.before
                with self._place(step) as (again, _):
                    is_as_shown &= os.path.samestat(os.fstat(again), os.fstat(parent))
            except CorralError:
                is_as_shown = False
            if not is_as_shown:
                _exchange(replace(step, before=step.after, after=step.before), parent, entry, staging, name)
                raise _moved(step)

    @contextmanager
    def _place(self, step: Step) -> Iterator[tuple[int, str]]:
        with _place(self._root, step) as place:
            yield place


def _moved(step: Step) -> Conflict:
    return Conflict(f"{step.path}: it was changed meanwhile; nothing was applied")


@contextmanager
def _place(root: int, step: Step) -> Iterator[tuple[int, str]]:
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


def _mark(marker: Marker, step: Step, directory: int, name: str) -> str | None:
    """Raises Unfit."""
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


def _copy_before(marker: Marker, step: Step, room: Room, parent: int, entry: str, target: int, name: str) -> None:
    if step.is_own:
        copy_own(marker, room, parent, entry, target, name)
    else:
        copy(marker, room, parent, entry, target, name, step.path)


def copy_own(marker: Marker, room: Room, source: int, name: str, target: int, new_name: str) -> None:
    """Makes an empty directory that is like another. Raises OSError."""
    room.take(4096)
    fd = os.open(name, OPEN_DIRECTORY, dir_fd=source)
    try:
        os.mkdir(new_name, 0o700, dir_fd=target)
        made = os.open(new_name, OPEN_DIRECTORY, dir_fd=target)
        try:
            finish(marker, fd, made)
        finally:
            os.close(made)
    finally:
        os.close(fd)


def _change_own(marker: Marker, step: Step, parent: int, entry: str, source: int, name: str) -> None:
    """Makes a directory like another, if it is as the step says."""
    try:
        fd, wanted = (os.open(each, OPEN_DIRECTORY, dir_fd=where) for each, where in ((entry, parent), (name, source)))
    except OSError:
        raise _moved(step) from None
    try:
        if marker.own_mark(fd) != step.before:
            raise _moved(step)
        finish(marker, wanted, fd)
    finally:
        os.close(fd)
        os.close(wanted)


def _exchange(step: Step, parent: int, entry: str, staging: int, name: str) -> None:
    """Puts what is staged in its place, and what was there, if anything should be, where that was."""
    try:
        if step.before is None:
            rename(Rename.NOREPLACE, staging, name, parent, entry)
        elif step.after is None:
            rename(Rename.NOREPLACE, parent, entry, staging, name)
        else:
            rename(Rename.EXCHANGE, staging, name, parent, entry)
    except OSError as error:
        if error.errno in (errno.EEXIST, errno.ENOENT):
            raise _moved(step) from None
        if error.errno == errno.EINVAL:
            raise CorralError(
                f"{step.path}: this file system cannot exchange two names at once (renameat2(2)), so nothing can be "
                "applied to it safely; use `corral diff --patch`"
            ) from None
        if error.errno in (errno.EXDEV, errno.EBUSY):
            raise Conflict(f"{step.path}: another file system is mounted there") from None
        raise


@contextmanager
def _staging(journal: Journal, root: int, *, make: bool = False) -> Iterator[int]:
    """Raises FileNotFoundError where there is none, CorralError where it is not our own."""
    if make:
        os.mkdir(journal.staging, 0o700, dir_fd=root)
    fd = os.open(journal.staging, OPEN_DIRECTORY, dir_fd=root)
    try:
        status = os.fstat(fd)
        if status.st_uid != os.geteuid() or stat.S_IMODE(status.st_mode) & 0o077:
            raise CorralError(f"{journal.workspace}/{journal.staging}: somebody else has made it, or can write to it")
        yield fd
    finally:
        os.close(fd)


def _sync(directory: int) -> None:
    import ctypes

    if ctypes.CDLL(None, use_errno=True).syncfs(directory) != 0:
        number = ctypes.get_errno()
        raise OSError(number, os.strerror(number))


# ---- taking back ----


def recover() -> None:
    """Takes back what was cut short, whoever's process that was. Raises CorralError where that cannot be done."""
    for workspace in sorted({each.workspace for each in _unfinished()}):
        with alone_in(workspace):
            _recover_in(workspace)


def _unfinished() -> Iterator[Journal]:
    for identifier in journals.never_begun():
        journals.forget(identifier)
    for identifier in journals.unfinished():
        if not os.path.lexists(os.path.join(journals.store(), identifier)):
            journals.finish(identifier)  # it was forgotten
            continue
        with suppress(CorralError), locked(identifier, wait=False) as directory:
            if not os.path.lexists(os.path.join(journals.store(), identifier, journals.JOURNAL)):
                journals.forget(identifier)
                journals.finish(identifier)
            else:
                yield journals.read(directory, identifier)


def _recover_in(workspace: str) -> None:
    """With the workspace locked."""
    for journal in list(_unfinished()):
        if journal.workspace != workspace:
            continue
        with suppress(Conflict), opened(workspace) as root, locked(journal.id) as directory:
            _take_back(journals.read(directory, journal.id), root, directory)


def _take_back(journal: Journal, root: int, directory: int) -> None:
    """Raises CorralError where something is in the way, which then stays for a person to look at."""
    phase = Phase.PREPARING  # before it is written for the first time
    if os.path.lexists(os.path.join(journals.store(), journal.id, journals.JOURNAL)):
        phase = journals.read(directory, journal.id).phase
    if phase is Phase.SWAPPING:
        with suppress(FileNotFoundError), _staging(journal, root) as staging:
            in_the_way = [
                step.path
                for number, step in reversed(list(enumerate(journal.steps)))
                if not _is_taken_back(number, step, root, staging, directory)
            ]
            if in_the_way:
                raise CorralError(
                    f"{journal.workspace}: applying was cut short and cannot be taken back: somebody has changed "
                    f"{', '.join(in_the_way[:10])} since. What was there lies in {journal.staging} there; remove that "
                    "directory when you have what you need"
                )
            _sync(root)
    with suppress(FileNotFoundError), _staging(journal, root):
        remove_tree(root, journal.staging)
    if phase is not Phase.DONE:
        journals.forget(journal.id)
    journals.finish(journal.id)


def _is_taken_back(number: int, step: Step, root: int, staging: int, directory: int) -> bool:
    """Takes one step back, if it was done. Whether it is, or was never done."""
    name, marker = str(number), host_marker()
    staged = _known(marker, step, staging, name)
    if staged == step.after and not step.is_own:
        return True
    try:
        with _place(root, step) as (parent, entry):
            place = _known(marker, step, parent, entry)
            if step.is_own:
                if place == step.after and step.before is not None:
                    before = os.open(BEFORE, OPEN_DIRECTORY, dir_fd=directory)
                    try:
                        _change_own(marker, replace(step, before=step.after), parent, entry, before, name)
                    finally:
                        os.close(before)
                    return True
                return place == step.before
            if place != step.after:
                return False
            # Whatever was there belongs there, even if it was not what it was to be.
            _exchange(Step(step.path, step.after, staged), parent, entry, staging, name)
            return True
    except (OSError, CorralError):
        return False


def _known(marker: Marker, step: Step, directory: int, name: str) -> str | None:
    """A mark; of what has none, something that is none."""
    try:
        return _mark(marker, step, directory, name)
    except CorralError:
        return "?"
