"""Where the key of a log lies, and how the two are found together: ``DIR`` is the log, ``DIR.key`` what signs for it.

The key is beside the log and not in it, so that the log can be served and copied as it is.
"""

from __future__ import annotations

import glob
import os
import secrets
import socket
import time
from pathlib import Path

from corral.log.events import Event, KeyRotated, LogRecovered
from corral.log.note import KeyFile, NoteError
from corral.log.records import Context, encode
from corral.log.signing import KEYS, read_keys
from corral.log.tiles import sync_directory
from corral.log.writer import Log, LogUnwritable
from corral.version import VERSION


def key_path(directory: Path) -> Path:
    """The file of the key that signs for the log in a directory."""
    return directory.with_name(f"{directory.name}.key")


def files_of(directory: Path) -> tuple[str, ...]:
    """Everything that belongs to a log, so that it can be hidden from what is recorded in it (I4)."""
    place = Path(os.path.realpath(directory))
    return (str(place), *(str(key) for key in sorted(place.parent.glob(f"{glob.escape(place.name)}.key*"))))


def open_log(directory: Path) -> Log:
    """Opens a log for writing; where there is none, makes it, with a key of its own.

    Raises:
        NoteError: the key is missing, cannot be read, or is not that of the log.
        LogUnwritable, LogDamaged: as :class:`~corral.log.writer.Log`.
    """
    directory = Path(os.path.abspath(directory))
    path = key_path(directory)
    try:
        directory.parent.mkdir(parents=True, exist_ok=True, mode=0o700)
        if not path.exists() and not (directory / KEYS).exists():
            # Two who begin one log at once: the second finds the key of the first.
            KeyFile.make(path, new_name(), exist_ok=True)
            sync_directory(path.parent)
    except OSError as error:
        raise LogUnwritable(f"{directory}: cannot make the log: {error.strerror}") from None
    _finish_rotation(path)
    log = Log(directory, KeyFile.read(path))
    if log.recovery:
        try:
            _tell(log, LogRecovered(str(log.recovery)))
        except BaseException:
            log.close()
            raise
    return log


def rotate_key(directory: Path) -> KeyFile:
    """Makes a new key for a log, has both sign for what is there, and keeps the old one as ``DIR.key.N``.

    Raises as :func:`open_log`.
    """
    directory = Path(os.path.abspath(directory))
    path = key_path(directory)
    _finish_rotation(path)
    old = KeyFile.read(path)
    new = KeyFile.make(_successor(path), old.verifier.name)
    try:
        with Log(directory, old) as log:
            _tell(log, KeyRotated(str(old.verifier), str(new.verifier)))
            log.rotate(new)
        _put_in_place(path)
    except OSError as error:
        raise LogUnwritable(f"{path}: cannot put the new key in its place: {error.strerror}") from None
    return new


def _successor(path: Path) -> Path:
    return path.with_name(f"{path.name}.new")


def _put_in_place(path: Path) -> None:
    number = 1
    while path.with_name(f"{path.name}.{number}").exists():
        number += 1
    os.link(path, path.with_name(f"{path.name}.{number}"))
    os.rename(_successor(path), path)
    sync_directory(path.parent)


def _finish_rotation(path: Path) -> None:
    """A rotation that was cut short is finished where the log has the new key already, and forgotten where not."""
    try:
        new = KeyFile.read(_successor(path))
    except NoteError:
        return
    keys = read_keys(path.with_name(path.name.removesuffix(".key")))
    if keys and keys[-1] == new.verifier:
        _put_in_place(path)
    else:
        _successor(path).unlink()


def _tell(log: Log, event: Event) -> None:
    """Records something about the log itself."""
    nobody = Context("corral", VERSION, "", "", "", "", VERSION)
    log.append(encode(event, nobody, sequence=0, at=time.time(), monotonic_ns=time.monotonic_ns()))


def new_name() -> str:
    """A name for a log that no other has: of this machine, with something random."""
    host = "".join(c for c in socket.gethostname() if c.isascii() and (c.isalnum() or c in "-.")) or "localhost"
    return f"{host}/corral/{secrets.token_hex(4)}"
