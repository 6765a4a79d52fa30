"""Taking back what was applied, as long as nobody has changed it since."""

from __future__ import annotations

import os

from corral.errors import RequestError
from corral.sandbox.apply import journal as journals
from corral.sandbox.apply.applying import Progress, apply_steps
from corral.sandbox.apply.carrying import copy
from corral.sandbox.apply.journal import BEFORE, Journal, Phase, Step, locked
from corral.sandbox.apply.swapping import copy_own, host_marker
from corral.sandbox.copying import Room
from corral.sandbox.trees import OPEN_DIRECTORY


class _Copies:
    """What was there before comes from the copies that were made of it."""

    def __init__(self, before: int, last: int) -> None:
        self._before, self._last = before, last

    def copy(self, number: int, step: Step, room: Room, target: int, name: str) -> None:
        kept = str(self._last - number)
        if step.is_own:
            copy_own(host_marker(), room, self._before, kept, target, name)
        else:
            copy(host_marker(), room, self._before, kept, target, name, step.path)


def undo(identifier: str, *, progress: Progress = lambda done, total: None) -> Journal:
    """Takes back what was applied under this id; it is then forgotten.

    Raises RequestError where there is nothing of that id; Conflict where something was changed since, CorralError where
    it cannot be done: nothing is changed.
    """
    with locked(identifier, wait=False) as directory:
        journal = journals.read(directory, identifier)
        if journal.phase is not Phase.DONE:
            raise RequestError(f"{identifier}: applying it was cut short; it is taken back by itself")
        steps = [Step(step.path, step.after, step.before, step.is_own) for step in reversed(journal.steps)]
        before = os.open(BEFORE, OPEN_DIRECTORY, dir_fd=directory)
        try:
            source = _Copies(before, len(steps) - 1)
            # Which forgets both when it is done.
            apply_steps(journal.workspace, journal.layer, steps, source, undoes=journal.id, progress=progress)
        finally:
            os.close(before)
    return journal
