"""Under which policy each agent's last session in a log began, so that a change of it is a record of its own.

No policy changes while a session lasts; what changes is the one that the next session begins under. The log knows, but
to look there would mean to read all of it at every start. So the last form of each agent's policy is kept in
``journal/policies``, in a file each. Before a change is recorded the file is put aside, and it is replaced when the
record is durable; nobody waits for that. So whatever fails in between leads to one more record, and to none less: where
the file is missing, the next session is recorded as a change.
"""

from __future__ import annotations

import os
from collections.abc import Callable
from contextlib import suppress
from functools import partial
from hashlib import sha256
from pathlib import Path

from corral.log.events import PolicyChanged
from corral.log.tiles import make_directory, read_file, sync_directory, write_file
from corral.log.writer import Log, LogUnwritable
from corral.policy.difference import differences

_MAX_FORM = 64 << 20
"""Bytes of a canonical form that is read."""


def note_policy(log: Log, agent: str, form: bytes, by: str, record: Callable[[PolicyChanged], None]) -> None:
    """Has it recorded if ``form`` is not the canonical form of the policy under which the last session of ``agent`` in
    this log began.

    ``record`` submits to the log. ``by`` is who begins the session. Raises LogUnwritable.
    """
    name = sha256(agent.encode("utf-8", "surrogateescape")).hexdigest()
    path = log.directory / "journal" / "policies" / name
    try:
        if _read(path) == form:
            return
        make_directory(path.parent, 0o700)
        old = _put_aside(path)
    except OSError as error:
        raise LogUnwritable(f"{path}: cannot keep which policy is in force: {error.strerror}") from None
    record(PolicyChanged(_hash(old) if old else "", _hash(form), by, _changes(old, form)))
    log.when_durable(partial(_keep, path, form))


def _keep(path: Path, form: bytes, error: Exception | None) -> None:
    if error is None:
        with suppress(OSError):  # the file is missing then, which leads to another record
            write_file(path, form, mode=0o600)


def _put_aside(path: Path) -> bytes:
    """The form that was known last, or nothing."""
    aside = path.with_name(f"{path.name}.old")
    with suppress(FileNotFoundError):
        os.rename(path, aside)
        sync_directory(path.parent)
    return _read(aside)


def _read(path: Path) -> bytes:
    try:
        return read_file(path, _MAX_FORM)
    except FileNotFoundError:
        return b""


def _hash(form: bytes) -> str:
    return f"sha256:{sha256(form).hexdigest()}"


def _changes(old: bytes, new: bytes) -> tuple[str, ...]:
    if not old:
        return ("no earlier policy of this agent is known here",)
    if old == new:
        return ("nothing; that it was in force before could not be kept",)
    try:
        return differences(old, new)
    except (ValueError, RecursionError):
        return ("what is known of the earlier one cannot be read",)
