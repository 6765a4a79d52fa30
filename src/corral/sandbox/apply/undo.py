"""Taking back what was applied, as long as nobody has changed it since."""

from __future__ import annotations

import os
from contextlib import suppress
from pathlib import Path

from corral.actions import Kind, Verdict
from corral.errors import CorralError, RequestError
from corral.log.events import Outcome
from corral.log.writer import Log
from corral.monitor.parts import Answer
from corral.policy.model import Apply
from corral.sandbox.apply import journal as journals
from corral.sandbox.apply.applying import Progress, apply_steps
from corral.sandbox.apply.carrying import copy
from corral.sandbox.apply.journal import BEFORE, Journal, Phase, Step, digest_of, locked
from corral.sandbox.apply.recording import Act, chronicle, outcome_of, told, whoever
from corral.sandbox.apply.recovery import tidy_up
from corral.sandbox.apply.swapping import copy_own, host_marker, opened
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


def undo(identifier: str, *, log: Log | Path | None = None, progress: Progress = lambda done, total: None) -> Journal:
    """Takes back what was applied under this id; it is then forgotten. ``log`` is where the log of the run is now, if
    it is elsewhere than it was, or is open.

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
            paths, digest = tuple(step.path for step in steps), digest_of(journal.workspace, steps)
            act = Act(Kind.SANDBOX_UNDO, journal.id, journal.workspace, digest, paths)
            with chronicle(act, journal.terms, log) as records:
                records.decide(Apply(), "", lambda opinion: Answer(Verdict.ALLOW, whoever(), "by asking for it"))
                apply_steps(
                    journal.workspace,
                    journal.layer,
                    steps,
                    source,
                    records=records,
                    undoes=journal.id,  # which forgets both when it is done
                    progress=progress,
                )
        finally:
            os.close(before)
    return journal


def forget(identifier: str) -> str:
    """Keeps what was applied for good, or leaves what could not be taken back as it is. Returns why that could not be
    recorded, if it could not: nothing outside is changed by it. Raises RequestError where there is nothing of that id.
    """
    problem = ""
    with locked(identifier, wait=False) as directory:
        try:
            journal = journals.read(directory, identifier)
        except CorralError as error:
            problem = str(error)
        else:
            is_left = journal.phase is Phase.SWAPPING
            try:
                if identifier in journals.unfinished():
                    told(journal, Outcome.FORGOTTEN if is_left else outcome_of(journal))
            except CorralError as error:
                problem = str(error)
            with suppress(CorralError, OSError), opened(journal.workspace) as root:
                if not is_left:  # else what was there lies beside the files
                    tidy_up(journal, root)
        journals.forget(identifier)
        journals.finish(identifier)
    return problem
