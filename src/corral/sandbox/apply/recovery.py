"""What was cut short is taken back, and what is done is tidied up: at once, or at the next start.

Which steps were done is seen from what lies where. What somebody else has put into a place since is never touched: it
stops this for its workspace, and only for that.
"""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import ExitStack, suppress
from dataclasses import replace

from corral.errors import CorralError, RequestError
from corral.sandbox.apply import journal as journals
from corral.sandbox.apply.carrying import finish
from corral.sandbox.apply.journal import BEFORE, Journal, Phase, Step, alone_in, locked
from corral.sandbox.apply.marks import Marker, attributes
from corral.sandbox.apply.recording import Tell, outcome_of, told
from corral.sandbox.apply.swapping import (
    Conflict,
    exchange,
    host_marker,
    known,
    mounted_at,
    opened,
    place_of,
    staging_of,
    sync,
)
from corral.sandbox.mounts import mount_points
from corral.sandbox.trees import OPEN_DIRECTORY, remove_tree


def recover() -> None:
    """Takes back what was cut short, whoever's process that was, in all workspaces where that can be done."""
    for workspace in sorted({each.workspace for each in unfinished()}):
        with suppress(CorralError), alone_in(workspace):
            recover_in(workspace)


def unfinished() -> Iterator[Journal]:
    """What is not finished, and that nobody is at."""
    for identifier in journals.never_begun():
        with suppress(CorralError):
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


def recover_in(workspace: str) -> None:
    """The same in one workspace, which is locked. Raises CorralError where it cannot be done."""
    for journal in list(unfinished()):
        if journal.workspace != workspace:
            continue
        with ExitStack() as stack:
            try:
                directory = stack.enter_context(locked(journal.id, wait=False))
            except RequestError:
                continue  # somebody is at it
            try:
                root = stack.enter_context(opened(workspace))
            except Conflict:
                continue  # the workspace is not there
            take_back(journals.read(directory, journal.id), root, directory, told, "it was cut short")


def take_back(journal: Journal, root: int, directory: int, tell: Tell, error: str) -> None:
    """Puts back what was there, unless all was done; tells what came of it, and why; then tidies up.

    Raises CorralError where something is in the way, which then stays for a person to look at, or where that cannot be
    recorded."""
    try:
        if journal.phase is Phase.SWAPPING:
            _put_back(journal, root, directory)
        try:
            tell(journal, outcome_of(journal), "" if journal.phase is Phase.DONE else error)
        except CorralError as problem:
            if journal.phase is Phase.SWAPPING:
                with suppress(CorralError):  # it is all back; whoever forgets it then removes what lies beside it, too
                    journals.write(replace(journal, phase=Phase.PREPARING))
            raise CorralError(
                f"{journal.workspace}: what came of {journal.id} ({outcome_of(journal).value}) cannot be recorded: "
                f"{problem}; `corral undo --forget {journal.id}` goes on without that"
            ) from None
        tidy_up(journal, root)
    except OSError as error:
        raise CorralError(f"{journal.workspace}: cannot take back what was begun: {error.strerror}") from None


def _put_back(journal: Journal, root: int, directory: int) -> None:
    copies = os.path.join(journals.store(), journal.id, BEFORE)
    way_out = f"`corral undo --forget {journal.id}` when you have what you need"
    try:
        with staging_of(journal, root) as staging:
            in_the_way = [
                step.path
                for number, step in reversed(list(enumerate(journal.steps)))
                if not _is_taken_back(number, step, root, staging, directory)
            ]
            sync(root)
    except FileNotFoundError:
        raise CorralError(
            f"{journal.workspace}: applying was cut short, and {journal.staging} in it, with what was there before, is "
            f"gone; copies lie in {copies}, numbered as the steps in the journal beside it; {way_out}"
        ) from None
    if in_the_way:
        raise CorralError(
            f"{journal.workspace}: applying was cut short and cannot be taken back: somebody has changed "
            f"{', '.join(in_the_way[:10])} since. What was there lies in {journal.staging} there, and copies in "
            f"{copies}; {way_out}"
        )


def tidy_up(journal: Journal, root: int) -> None:
    """Removes what is needed no more. Raises OSError, CorralError."""
    mounted = mounted_at(journal.workspace, journal.staging, mount_points())
    if mounted:
        raise CorralError(f"{mounted}: something is mounted there; unmount it, so that what is left can be removed")
    with suppress(FileNotFoundError), staging_of(journal, root) as staging:
        if all(name.isdecimal() for name in os.listdir(staging)):  # a number of its kind is used again, once it is gone
            remove_tree(root, journal.staging)
    if journal.identity is None:
        with suppress(OSError):  # it may just have been made; what is not empty is somebody else's
            os.rmdir(journal.staging, dir_fd=root)
    if journal.phase is not Phase.DONE:
        journals.forget(journal.id)
    elif journal.undoes:
        journals.forget(journal.undoes)
        journals.forget(journal.id)
    journals.finish(journal.id)


def _is_taken_back(number: int, step: Step, root: int, staging: int, directory: int) -> bool:
    """Takes one step back, if it was done. Whether it is, or was never done."""
    name, marker = str(number), host_marker()
    try:
        if step.is_own:
            return _is_own_taken_back(name, step, root, staging, directory)
        staged = known(marker, step, staging, name)
        if staged == step.after:
            return True
        with place_of(root, step) as (parent, entry):
            if known(marker, step, parent, entry) != step.after:
                return False
            # Whatever was there belongs there, even if it was not what it was to be.
            exchange(replace(step, before=step.after, after=staged), parent, entry, staging, name)
            return True
    except (OSError, CorralError):
        return False


def _is_own_taken_back(name: str, step: Step, root: int, staging: int, directory: int) -> bool:
    """A directory is changed bit by bit: each of its own must be as it was, or as it was to be."""
    fds: list[int] = []
    try:
        with place_of(root, step) as (parent, entry):
            fds.append(os.open(entry, OPEN_DIRECTORY, dir_fd=parent))
        fds.append(os.open(f"{BEFORE}/{name}", OPEN_DIRECTORY, dir_fd=directory))
        fds.append(os.open(name, OPEN_DIRECTORY, dir_fd=staging))
        place, before, after = (_bits(fd) for fd in fds)
        if any(place.get(bit) not in (before.get(bit), after.get(bit)) for bit in {*place, *before, *after}):
            return False
        finish(Marker(), fds[1], fds[0])
        return True
    finally:
        for fd in fds:
            os.close(fd)


def _bits(fd: int) -> dict[str, object]:
    status = os.fstat(fd)
    return {"mode": status.st_mode, "user": status.st_uid, "group": status.st_gid, **attributes(fd)}
