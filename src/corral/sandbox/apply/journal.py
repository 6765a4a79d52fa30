"""The journal of applying: on disk before anything is touched, so that what a crash left can be taken back.

    <state>/applies/busy-<id>       there while anything of it is not finished
    <state>/applies/<id>/           mode 0700; locked (flock) by whoever is at it
        journal.json                what, and how far (format below); replaced at once
        before/<number>             copies of what was there, for taking it back
    <state>/applies/gone-<id>       what is being removed

Beside the workspace's own files, on their file system, lies ``.corral-<id>`` meanwhile, in which what is new waits and
what was there before is put.
"""

from __future__ import annotations

import fcntl
import hashlib
import json
import os
import re
import stat
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import asdict, dataclass
from enum import Enum
from typing import Any

from corral.errors import CorralError, RequestError
from corral.log.tiles import write_file
from corral.sandbox import paths
from corral.sandbox.apply import terms
from corral.sandbox.apply.terms import Terms
from corral.sandbox.trees import OPEN_DIRECTORY, remove_tree

FORMAT = 1
MAX_JOURNAL = 256 << 20
JOURNAL = "journal.json"
BEFORE = "before"
_BUSY = "busy-"
_GONE = "gone-"
FRESH = 60.0
"""Seconds in which whoever has made a place for a journal writes it."""
_ID = re.compile(r"[a-z2-7]{8}")
_SUM = re.compile(r"[0-9a-f]{64}")


class Phase(Enum):
    """How far it has come."""

    PREPARING = "preparing"
    """Nothing was touched."""
    SWAPPING = "swapping"
    """Anything may have been."""
    DONE = "done"


@dataclass(frozen=True, slots=True)
class Step:
    """One entry that becomes another."""

    path: str
    """Relative to the workspace; bytes that are not UTF-8 as surrogate escapes."""
    before: str | None
    """Its mark (:mod:`corral.sandbox.apply.marks`), or None where there is to be nothing."""
    after: str | None
    is_own: bool = False
    """Only the directory itself changes, not what lies in it; then the marks are without that."""


@dataclass(frozen=True, slots=True)
class Journal:
    """What is applied, or was."""

    id: str
    layer: str
    workspace: str
    created: str
    """UTC, ISO 8601."""
    phase: Phase
    steps: tuple[Step, ...]
    undoes: str = ""
    """The id of what it takes back, if it does."""
    terms: tuple[Terms, ...] = ()
    """By which the logs are found that are told what comes of it; none where there is no log."""
    digest: str = ""
    """The hash of exactly this, as it was consented to."""
    identity: tuple[int, int] | None = None
    """Device and inode number of the directory in the workspace; None before that is made."""

    @property
    def staging(self) -> str:
        """What the directory in the workspace is called."""
        return f".corral-{self.id}"


def store() -> str:
    """Where journals are. Raises CorralError."""
    path = os.path.join(paths.state_directory(), "applies")
    try:
        os.makedirs(path, mode=0o700, exist_ok=True)
    except OSError as error:
        raise CorralError(f"{path}: {error.strerror}") from None
    return path


def ids() -> list[str]:
    """Of all that there are."""
    return sorted(name for name in os.listdir(store()) if _ID.fullmatch(name))


@contextmanager
def locked(identifier: str, *, make: bool = False, wait: bool = True) -> Iterator[int]:
    """Its directory, which nobody else is at meanwhile. Raises RequestError where there is none, or somebody is."""
    if not _ID.fullmatch(identifier):
        raise RequestError(f"{identifier!r} is not the id of anything that was applied")
    path = os.path.join(store(), identifier)
    try:
        if make:
            os.mkdir(path, 0o700)
        directory = os.open(path, OPEN_DIRECTORY)
    except OSError as error:
        raise RequestError(f"{identifier}: there is nothing of that id that was applied: {error.strerror}") from None
    try:
        try:
            fcntl.flock(directory, fcntl.LOCK_EX | (0 if wait else fcntl.LOCK_NB))
        except BlockingIOError:
            raise RequestError(f"{identifier}: somebody is at it") from None
        if not os.path.exists(path) or not os.path.samestat(os.stat(path), os.fstat(directory)):
            raise RequestError(f"{identifier}: there is nothing of that id any more")
        yield directory
    finally:
        os.close(directory)


def begin(identifier: str) -> None:
    """Says that it is not finished, before anything else is done. Raises OSError."""
    os.close(os.open(os.path.join(store(), f"{_BUSY}{identifier}"), os.O_WRONLY | os.O_CREAT | os.O_CLOEXEC, 0o600))


def finish(identifier: str) -> None:
    """Says that it is. Raises OSError."""
    with suppress(FileNotFoundError):
        os.unlink(os.path.join(store(), f"{_BUSY}{identifier}"))


def unfinished() -> list[str]:
    """What is not finished, or was not when its process was killed."""
    names = sorted(name.removeprefix(_BUSY) for name in os.listdir(store()) if name.startswith(_BUSY))
    return [name for name in names if _ID.fullmatch(name)]


def never_begun() -> list[str]:
    """What was made a place for by a process that was killed then."""
    found = []
    for identifier in ids():
        path = os.path.join(store(), identifier)
        with suppress(OSError):
            if time.time() - os.stat(path).st_mtime >= FRESH and not os.path.lexists(os.path.join(path, JOURNAL)):
                found.append(identifier)
    return found


@contextmanager
def alone_in(workspace: str) -> Iterator[None]:
    """Nobody else of this user applies anything to a workspace meanwhile. Waits for that. Raises CorralError."""
    name = hashlib.sha256(os.fsencode(workspace)).hexdigest()[:32]
    path = os.path.join(store(), f"lock-{name}")
    try:
        fd = os.open(path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC | os.O_NOFOLLOW, 0o600)
    except OSError as error:
        raise CorralError(f"{path}: {error.strerror}") from None
    try:
        fcntl.flock(fd, fcntl.LOCK_EX)
        yield
    finally:
        os.close(fd)


def write(journal: Journal) -> None:
    """Replaces it, durably. Raises CorralError."""
    data = asdict(journal) | {"format": FORMAT, "phase": journal.phase.value}
    data["steps"] = [[step.path, step.before, step.after, step.is_own] for step in journal.steps]
    content = json.dumps(data).encode("ascii")
    if len(content) > MAX_JOURNAL:
        raise CorralError("these are too many changes to apply at once; apply some paths after others")
    from pathlib import Path

    try:
        write_file(Path(store()) / journal.id / JOURNAL, content, mode=0o600)
    except OSError as error:
        raise CorralError(f"cannot write the journal: {error.strerror}") from None


def read(directory: int, identifier: str) -> Journal:
    """Raises CorralError for what is damaged."""
    try:
        fd = os.open(JOURNAL, os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK | os.O_CLOEXEC, dir_fd=directory)
        with open(fd, "rb") as file:
            if not stat.S_ISREG(os.fstat(fd).st_mode):
                raise ValueError("it is no file")
            return _parse(json.loads(file.read(MAX_JOURNAL + 1)), identifier)
    except (OSError, ValueError, TypeError, KeyError, RecursionError) as error:
        raise CorralError(f"the journal of {identifier} is damaged: {error}") from None


def journals() -> list[Journal]:
    """All that are done, oldest first; those that cannot be understood are left out."""
    found = []
    for identifier in ids():
        with suppress(CorralError, FileNotFoundError, NotADirectoryError):  # or somebody has just forgotten it
            directory = os.open(os.path.join(store(), identifier), OPEN_DIRECTORY)
            try:
                found.append(read(directory, identifier))
            finally:
                os.close(directory)
    return sorted((each for each in found if each.phase is Phase.DONE), key=lambda each: (each.created, each.id))


def forget(identifier: str) -> None:
    """Removes it, and the copies of what was there, if it is there. Whoever is killed at it leaves nothing that could
    be taken for whole. Raises CorralError."""
    sweep()
    place = store()
    try:
        with suppress(FileNotFoundError):
            os.rename(os.path.join(place, identifier), os.path.join(place, f"{_GONE}{identifier}"))
    except OSError as error:
        raise CorralError(f"{identifier}: cannot remove it: {error.strerror}") from None
    sweep()


def sweep() -> None:
    """Removes what was forgotten. Raises CorralError."""
    parent = os.open(store(), OPEN_DIRECTORY)
    try:
        for name in os.listdir(parent):
            if name.startswith(_GONE):
                with suppress(FileNotFoundError):  # somebody else is at it, too
                    remove_tree(parent, name)
        os.fsync(parent)
    except OSError as error:
        raise CorralError(f"what was forgotten cannot be removed: {error.strerror}") from None
    finally:
        os.close(parent)


def _parse(data: Any, identifier: str) -> Journal:
    if data["format"] != FORMAT or data["id"] != identifier:
        raise ValueError("it is of another version of Corral, or of another id")
    texts = [data[name] for name in ("layer", "workspace", "created", "undoes")]
    if not all(type(text) is str for text in texts) or not os.path.isabs(data["workspace"]):
        raise ValueError("it names no workspace")
    if data["undoes"] and not _ID.fullmatch(data["undoes"]):
        raise ValueError("it undoes nothing that there could be")
    layer, workspace, created, undoes = texts
    recorded, digest = terms.from_json(data.get("terms", [])), data.get("digest", "")
    if type(digest) is not str:
        raise ValueError("its hash is none")
    identity = None
    if data["identity"] is not None:
        device, inode = data["identity"]
        if type(device) is not int or type(inode) is not int:
            raise ValueError("it names no directory")
        identity = (device, inode)
    phase, steps = Phase(data["phase"]), _steps(data["steps"])
    return Journal(identifier, layer, workspace, created, phase, steps, undoes, recorded, digest, identity)


def digest_of(workspace: str, steps: Sequence[Step]) -> str:
    """Names exactly these steps."""
    rows = [[step.path, step.before, step.after, step.is_own] for step in steps]
    content = json.dumps([workspace, rows]).encode("ascii")
    return f"sha256:{hashlib.sha256(content).hexdigest()}"


def _steps(rows: Sequence[Any]) -> tuple[Step, ...]:
    steps = []
    for path, before, after, is_own in rows:
        components(path)
        if type(is_own) is not bool or not all(each is None or _SUM.fullmatch(each) for each in (before, after)):
            raise ValueError("a step is none")
        steps.append(Step(path, before, after, is_own))
    return tuple(steps)


def components(path: str) -> list[str]:
    """Of a path below the workspace; none for the workspace itself. Raises ValueError for one that leads elsewhere."""
    parts = path.split("/") if path else []
    if any(part in ("", ".", "..") or "\0" in part for part in parts):
        raise ValueError(f"{path!r} is not below the workspace")
    return parts
