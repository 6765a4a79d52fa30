"""The files that a run has changed and whose contents its policy wants kept (``log.files``), as they are in the end.

What has changed is what :func:`corral.sandbox.changes.changes` says, so nothing is kept that is as it was; of a file
whose owner alone is another, nothing has changed that a content could show. Places that vanish with the sandbox
(/tmp, ...) are looked at too. Files are opened as :mod:`corral.sandbox.trees` wants it, one component at a time and
through no link. Which of them are kept is decided before any is read, by path and size, so it is the same each time.

Where the caller alone may not open one, a helper process opens it and the others behind it as their owner, and hands
over descriptors: contents are never in its memory, and in that of the caller one at a time.
"""

from __future__ import annotations

import os
import socket
import stat
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

from corral.errors import CorralError
from corral.policy.matching import Paths
from corral.sandbox import asowner
from corral.sandbox.changes import Change, ChangeKind, FileType, changes
from corral.sandbox.layer import owners_of
from corral.sandbox.ownership import OwnerMap
from corral.sandbox.prepare import Prepared
from corral.sandbox.trees import OPEN_FILE, open_components
from corral.sandbox.view import Changeable

MAX_FILES = 256
"""Files of one session whose contents are kept."""
MAX_BYTES = 256 << 20
"""Bytes of them all together."""
_NEXT, _OPENED, _FAILED = b".", b"+", b"-"
_MAX_FAILURE = 200


@dataclass(frozen=True, slots=True)
class TakenFile:
    """The content of one file, or why there is none."""

    path: str
    """Absolute, inside; bytes that are not UTF-8 as surrogate escapes."""
    data: bytes = b""
    is_whole: bool = False
    failure: str = ""
    """Why it could not be read."""


@dataclass(frozen=True, slots=True)
class Wanted:
    """A file whose content is to be kept: its path inside, and where it lies in the layer, by components."""

    path: str
    components: tuple[str, ...]


@dataclass(frozen=True, slots=True)
class Selected:
    """The files of one session."""

    files: Iterator[TakenFile]
    """In the order of their paths."""
    beyond: int
    """How many more there are, or may be: past the bounds, or at paths that are too long to be told."""


def selected_files(prepared: Prepared, layer: int, globs: Sequence[str], most: int) -> Selected:
    """Those of the sandbox's layer that ``globs`` name, at most ``most`` bytes of each; for when nobody changes them
    any more. Raises CorralError; a file that cannot be read says so itself."""
    parts, owners = (*prepared.view.parts, *prepared.view.passing), owners_of(prepared)
    wanted, beyond = select(parts, changes(parts, layer, owners, prepared.view.scaffold), globs, most)
    return Selected(take(layer, owners, wanted, most), beyond)


def select(
    parts: Iterable[Changeable], listed: Iterable[Change], globs: Sequence[str], most: int
) -> tuple[list[Wanted], int]:
    """Which are taken, in the order of their paths, and how many are not. One that would be too much is left out, and
    smaller ones behind it are not."""
    places = {part.name: part.path for part in parts}
    matching = Paths(tuple(globs))
    wanted: list[Wanted] = []
    size = beyond = 0
    for change in sorted(listed, key=lambda change: (change.path, change.part)):
        if change.kind is ChangeKind.CHANGED and change.file_type is FileType.DIRECTORY and change.entries:
            beyond += change.entries  # not listed: nobody can say that none of them is meant
        if change.file_type is not FileType.FILE or change.kind in (ChangeKind.DELETED, ChangeKind.OWNER):
            continue
        if not matching.all(change.path):
            continue
        takes = min(change.size_after or 0, most)
        if len(wanted) >= MAX_FILES or size + takes > MAX_BYTES:
            beyond += 1
            continue
        size += takes
        below = change.path[len(places[change.part]) :].lstrip("/")
        wanted.append(Wanted(change.path, (change.part, *below.split("/"))))
    return wanted, beyond


def take(layer: int, owners: OwnerMap, wanted: Sequence[Wanted], most: int) -> Iterator[TakenFile]:
    """Reads them, each when it is asked for."""
    for number, each in enumerate(wanted):
        try:
            fd = open_components(layer, each.components, OPEN_FILE)
        except PermissionError as error:
            if os.geteuid() != 0:
                yield from _take_as_owner(layer, owners, wanted[number:], most)
                return
            yield _failed(each, error.strerror)
        except OSError as error:
            yield _failed(each, error.strerror)
        else:
            yield _read(fd, each, most)


def _read(fd: int, wanted: Wanted, most: int) -> TakenFile:
    """Closes ``fd``."""
    try:
        with open(fd, "rb") as file:
            status = os.fstat(fd)
            if not stat.S_ISREG(status.st_mode):
                return _failed(wanted, "it is no file any more")
            data = file.read(min(status.st_size, most) + 1)
    except OSError as error:
        return _failed(wanted, error.strerror)
    return TakenFile(wanted.path, data[:most], len(data) <= most)


def _failed(wanted: Wanted, why: str | None) -> TakenFile:
    return TakenFile(wanted.path, failure=f"{wanted.path[:_MAX_FAILURE]!r} cannot be read: {why}")


# ---- as their owner ----


def _take_as_owner(layer: int, owners: OwnerMap, wanted: Sequence[Wanted], most: int) -> Iterator[TakenFile]:
    done = 0
    own, other = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
    try:
        with own:
            with other:
                request = {"layer": layer, "to": other.fileno(), "files": [each.components for each in wanted]}
                helper = asowner.begin("files", (layer, other.fileno()), request, owners.namespace())
            with helper:
                try:
                    for each in wanted:
                        taken = _asked(own, helper, each, most)
                        done += 1
                        yield taken
                finally:
                    helper.kill()
    except (CorralError, OSError) as error:
        why = str(error) if isinstance(error, CorralError) else f"cannot read the layer as its owner: {error.strerror}"
        for each in wanted[done:]:
            yield TakenFile(each.path, failure=why)


def _asked(connection: socket.socket, helper: asowner.Helper, wanted: Wanted, most: int) -> TakenFile:
    """One at a time: descriptors on their way are bounded for all of a user's processes together (unix(7))."""
    try:
        connection.send(_NEXT)
        said, fds, _, _ = socket.recv_fds(connection, 1 + _MAX_FAILURE, 1, socket.MSG_CMSG_CLOEXEC)
    except (BrokenPipeError, ConnectionResetError):
        said, fds = b"", []
    if said == _OPENED and fds:
        return _read(fds[0], wanted, most)
    if said[:1] == _FAILED:
        return _failed(wanted, said[1:].decode("ascii", "replace"))
    helper.result()
    raise CorralError("cannot read the layer as its owner: the helper process did not do all of it")


def serve(request: dict[str, Any]) -> None:
    """The helper's side."""
    with socket.socket(fileno=request["to"]) as connection:
        for components in request["files"]:
            if connection.recv(1) != _NEXT:
                return
            try:
                fd = open_components(request["layer"], components, OPEN_FILE)
            except OSError as error:
                why = os.strerror(error.errno or 0).encode("ascii", "replace")
                connection.send(_FAILED + why[:_MAX_FAILURE])
                continue
            try:
                socket.send_fds(connection, [_OPENED], [fd])
            finally:
                os.close(fd)
