"""Applying steps to a workspace: all of them, or none.

    PREPARING   what is new is copied to a directory beside the workspace's files, what is there to one of Corral's
    SWAPPING    each changes places with what was there (renameat2(2)), which is then compared with what it was to be
    DONE        what was there is removed; its copy stays, so that it can be taken back

Whatever goes wrong before DONE, also the end of this process, is taken back (:mod:`corral.sandbox.apply.recovery`).
Nothing is ever written over, so whatever somebody else has put into a place meanwhile is still there afterwards: it
then stops the applying, or its taking back.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Sequence
from contextlib import ExitStack, suppress
from dataclasses import replace
from datetime import UTC, datetime
from typing import Protocol

from corral.errors import CorralError
from corral.log.events import Outcome
from corral.sandbox.apply import journal as journals
from corral.sandbox.apply.journal import BEFORE, Journal, Phase, Step, alone_in, digest_of, locked
from corral.sandbox.apply.recording import Chronicle, outcome_of
from corral.sandbox.apply.recovery import recover_in, take_back, tidy_up
from corral.sandbox.apply.swapping import (
    Conflict,
    change_own,
    copy_before,
    exchange,
    host_marker,
    known,
    make_staging,
    mark_of,
    mounted_at,
    moved,
    opened,
    place_of,
    staging_of,
    sync,
)
from corral.sandbox.copying import Room
from corral.sandbox.mounts import mounted_below
from corral.sandbox.prepare import new_id
from corral.sandbox.trees import OPEN_DIRECTORY

MAX_KEPT = 100
"""How much that was applied can be taken back; what is older is forgotten."""
Progress = Callable[[int, int], None]


class Source(Protocol):
    """Where what is new comes from."""

    def copy(self, number: int, step: Step, room: Room, target: int, name: str) -> None:
        """Makes what step ``number`` puts there; of a step that changes a directory itself, an empty one like it."""


def apply_steps(
    workspace: str,
    layer: str,
    steps: Sequence[Step],
    source: Source,
    *,
    records: Chronicle,
    undoes: str = "",
    progress: Progress = lambda done, total: None,
) -> Journal:
    """Applies the steps and returns the journal by which they can be taken back. What comes of it is told ``records``,
    in which it has been decided.

    Raises Conflict where something is not what a step says, CorralError where it cannot be done: nothing is changed.
    """
    now, digest = datetime.now(UTC).isoformat(timespec="milliseconds"), digest_of(workspace, steps)
    journal = Journal(
        new_id(), layer, workspace, now, Phase.PREPARING, tuple(steps), undoes, terms=records.terms, digest=digest
    )
    with ExitStack() as stack:
        try:
            stack.enter_context(alone_in(workspace))
            root = stack.enter_context(opened(workspace))
            recover_in(workspace)
            directory = stack.enter_context(locked(journal.id, make=True))
        except CorralError as error:
            try:
                records.tell(journal, Outcome.ROLLED_BACK, str(error))
            except CorralError as problem:
                raise CorralError(f"{error}; nor can that be recorded: {problem}") from None
            raise
        application = _Application(journal, root, directory, progress)
        try:
            journals.begin(journal.id)
            application.run(source)
        except BaseException as error:
            if isinstance(error, OSError):
                error = CorralError(f"{error.filename or workspace}: cannot apply: {error.strerror}")
            why = str(error) if isinstance(error, CorralError) else type(error).__name__
            take_back(application.journal, root, directory, records.tell, why)
            raise error from None
        try:
            records.tell(application.journal, outcome_of(application.journal))
        except CorralError as error:
            raise CorralError(
                f"{journal.id}: it is done, and that could not be recorded; the next start tries again: {error}"
            ) from None
        # It is done: what is left over now is for the next start.
        with suppress(OSError, CorralError):
            tidy_up(application.journal, root)
    with suppress(OSError, CorralError):
        for old in journals.journals()[:-MAX_KEPT]:
            journals.forget(old.id)
    return application.journal


class _Application:
    def __init__(self, journal: Journal, root: int, directory: int, progress: Progress) -> None:
        self.journal = journal
        """As it was written last."""
        self._root, self._directory, self._progress = root, directory, progress
        self._marker = host_marker()

    def _write(self, journal: Journal) -> None:
        # Before, as what could not be written durably may have been written all the same; but never too late a phase.
        if journal.phase is not Phase.DONE:
            self.journal = journal
        journals.write(journal)
        self.journal = journal

    def run(self, source: Source) -> None:
        self._write(self.journal)
        self._write(replace(self.journal, identity=make_staging(self.journal, self._root)))
        steps = self.journal.steps
        with staging_of(self.journal, self._root) as staging:
            self._prepare(source, staging)
            for each in (staging, self._directory):
                sync(each)
            self._refuse_mounts()
            self._write(replace(self.journal, phase=Phase.SWAPPING))
            for number, step in enumerate(steps):
                self._swap(number, step, staging)
                self._progress(len(steps) + number + 1, 2 * len(steps))
            for number, step in enumerate(steps):
                # What a process that was in a directory has put into it since, would be lost.
                if not step.is_own and known(self._marker, step, staging, str(number)) != step.before:
                    raise moved(step)
            sync(self._root)
        self._write(replace(self.journal, phase=Phase.DONE))

    def _refuse_mounts(self) -> None:
        points = mounted_below(self.journal.workspace)
        for step in self.journal.steps:
            if mounted := mounted_at(self.journal.workspace, step.path, points):
                raise Conflict(f"{step.path}: another file system is mounted there ({mounted})")

    def _prepare(self, source: Source, staging: int) -> None:
        steps = self.journal.steps
        os.mkdir(BEFORE, 0o700, dir_fd=self._directory)
        before = os.open(BEFORE, OPEN_DIRECTORY, dir_fd=self._directory)
        rooms = Room(staging), Room(before)
        try:
            for number, step in enumerate(steps):
                name = str(number)
                if step.after is not None:
                    source.copy(number, step, rooms[0], staging, name)
                    if mark_of(self._marker, step, staging, name) != step.after:
                        raise Conflict(f"{step.path}: what was to be applied is not what was shown")
                if step.before is not None:
                    with place_of(self._root, step) as (parent, entry):
                        try:
                            copy_before(self._marker, step, rooms[1], parent, entry, before, name)
                        except FileNotFoundError:
                            raise moved(step) from None
                    if mark_of(self._marker, step, before, name) != step.before:
                        raise moved(step)
                self._progress(number + 1, 2 * len(steps))
        finally:
            os.close(before)

    def _swap(self, number: int, step: Step, staging: int) -> None:
        name = str(number)
        with place_of(self._root, step) as (parent, entry):
            if step.is_own:
                change_own(self._marker, step, parent, entry, staging, name)
                return
            exchange(step, parent, entry, staging, name)
            # Looked at only now: before, somebody could have changed it again.
            try:
                is_as_shown = mark_of(self._marker, step, staging, name) == step.before
                with place_of(self._root, step) as (again, _):
                    is_as_shown &= os.path.samestat(os.fstat(again), os.fstat(parent))
            except CorralError:
                is_as_shown = False
            if not is_as_shown:
                exchange(replace(step, before=step.after, after=step.before), parent, entry, staging, name)
                raise moved(step)
