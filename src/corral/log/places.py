"""Where the key of a log lies, and how the two are found together: ``DIR`` is the log, ``DIR.key`` what signs for it.

The key is beside the log and not in it, so that the log can be served and copied as it is.
"""

from __future__ import annotations

import fcntl
import glob
import os
import secrets
import socket
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from functools import partial
from pathlib import Path

from corral.log.events import Event, KeyRotated, LogRecovered, PayloadErased
from corral.log.holdings import Holdings
from corral.log.note import KeyFile, NoteError, Signer
from corral.log.ocsf import Context
from corral.log.payload_keys import PayloadError, read_key
from corral.log.payloads import Payloads
from corral.log.pkcs11_key import Pkcs11Key, pin_files, read_signer
from corral.log.reader import Reader
from corral.log.records import encode
from corral.log.signing import KEYS, read_keys
from corral.log.tiles import sync_directory
from corral.log.writer import Log, LogUnwritable
from corral.version import VERSION


def key_path(directory: Path) -> Path:
    """The file of the key that signs for the log in a directory."""
    return directory.with_name(f"{directory.name}.key")


def index_path(directory: Path) -> Path:
    """The index of the log in a directory. It is beside the log too: who is given that needs no index of ours."""
    return directory.with_name(f"{directory.name}.index")


def payloads_path(directory: Path) -> Path:
    """The store of the log's payloads."""
    return directory.with_name(f"{directory.name}.payloads")


def payload_key_path(directory: Path) -> Path:
    """What they are encrypted with, where they are."""
    return directory.with_name(f"{directory.name}.payloads.key")


def open_payloads(directory: Path) -> Payloads:
    """The payloads of the log in a directory, which there may be none of. Raises PayloadError."""
    directory = Path(os.path.abspath(directory))
    key = payload_key_path(directory)
    read_key(key)  # one that cannot be used is better told now
    return Payloads(payloads_path(directory), key)


def expired_payloads(directory: Path, now: float) -> list[str]:
    """What need not be kept any longer, as the log says; of what it says nothing, because whoever kept it was killed
    before that was recorded, as that says itself. Raises PayloadError, NoteError, LogDamaged."""
    holdings = Holdings()
    for number, entry in Reader(directory).entries():
        holdings(number, entry)
    payloads = open_payloads(directory)
    found = []
    for digest in payloads.digests():
        expires = holdings.expires(digest)
        if expires is None:
            with suppress(PayloadError):  # it is no payload; nobody knows when that may be erased
                expires = payloads.about(digest).expires
        if expires is not None and expires <= now:
            found.append(digest)
    return found


def files_of(directory: Path) -> tuple[str, ...]:
    """Everything that belongs to a log, so that it can be hidden from what is recorded in it (I4): the log, its keys,
    its payloads and its index, the PIN of a key on a device, and those of their files that are not there yet.

    All by their real paths. A log that is reached by a link has its key beside the link.
    """
    named = Path(os.path.abspath(directory))
    key, index = key_path(named), index_path(named)
    beside = {named, key, _successor(key), _next_old(key), *named.parent.glob(f"{glob.escape(key.name)}.*")}
    beside |= {index.with_name(f"{index.name}{end}") for end in ("", "-journal", "-wal", "-shm")}
    beside |= {payloads_path(named), payload_key_path(named)}
    beside |= {Path(pin) for each in tuple(beside) if each.name.startswith(key.name) for pin in pin_files(each)}
    return tuple(sorted({os.path.realpath(path) for path in beside}))


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
    log = Log(directory, read_signer(path))
    if log.recovery:
        try:
            _tell(log, LogRecovered(str(log.recovery)))
        except BaseException:
            log.close()
            raise
    return log


def rotate_key(directory: Path, uri: str | None = None) -> Signer:
    """Makes a new key for a log, or takes the one on a device that ``uri`` names, has both sign for what is there, and
    keeps the old one as ``DIR.key.N``.

    Raises as :func:`open_log`; LogUnwritable also where another process is at it; NoteError where the old key is on a
    device and the new one would not be; RequestError as :class:`Pkcs11Key`.
    """
    directory = Path(os.path.abspath(directory))
    path = key_path(directory)
    with _rotating(path) as mine:
        if not mine:
            raise LogUnwritable(f"{path}: another process is changing this key")
        _finish(path)
        old = read_signer(path)
        new: Signer
        if uri is not None:
            new = Pkcs11Key.make(_successor(path), old.verifier.name, uri)
        elif isinstance(old, Pkcs11Key):
            raise NoteError(f"{path}: this key is on a device; name the new one, on a device too, with --pkcs11")
        else:
            new = KeyFile.make(_successor(path), old.verifier.name)
        with Log(directory, old) as log:
            _tell(log, KeyRotated(str(old.verifier), str(new.verifier)))
            log.rotate(new)
        _put_in_place(path)
    return new


def erase_payloads(directory: Path, erased: Sequence[PayloadErased]) -> None:
    """Erases payloads of a log; for each the log says first, and durably, by whom and why.

    Raises as :func:`open_log`, and PayloadMissing or PayloadError for the first that cannot be erased.
    """
    directory = Path(os.path.abspath(directory))
    payloads = open_payloads(directory)
    if erased:
        with open_log(directory) as log:
            for event in {event.digest: event for event in erased}.values():
                payloads.erase(event.digest, partial(_tell, log, event))


def _successor(path: Path) -> Path:
    return path.with_name(f"{path.name}.new")


def make_payloads(directory: Path) -> None:
    """Makes the place of a log's payloads: what is not there yet cannot be hidden in a tree that is shown read-only.

    Raises PayloadError.
    """
    path = payloads_path(Path(os.path.abspath(directory)))
    try:
        path.mkdir(mode=0o755, exist_ok=True)
    except OSError as error:
        raise PayloadError(f"{path}: cannot make it: {error.strerror}") from None


def _next_old(path: Path) -> Path:
    number = 1
    while (old := path.with_name(f"{path.name}.{number}")).exists():
        number += 1
    return old


def _put_in_place(path: Path) -> None:
    os.link(path, _next_old(path))
    os.rename(_successor(path), path)
    sync_directory(path.parent)


@contextmanager
def _rotating(path: Path) -> Iterator[bool]:
    """Whether this is the only one who changes the key."""
    try:
        key = os.open(path, os.O_RDONLY | os.O_CLOEXEC | os.O_NOFOLLOW)
        try:
            try:
                fcntl.flock(key, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError:
                yield False
            else:
                # Who has changed it meanwhile has put another file there, which others can have locked.
                yield os.path.samestat(os.fstat(key), os.lstat(path))
        finally:
            os.close(key)
    except OSError as error:
        raise LogUnwritable(f"{path}: cannot change the key: {error.strerror}") from None


def _finish_rotation(path: Path) -> None:
    """As :func:`_finish`, where a rotation was cut short and is not just under way."""
    if os.path.lexists(_successor(path)):
        with _rotating(path) as mine:
            if mine:
                _finish(path)


def _finish(path: Path) -> None:
    """A rotation that was cut short is finished where the log has the new key already, and forgotten where not."""
    successor = _successor(path)
    if not os.path.lexists(successor):
        return
    new = read_signer(successor)
    keys = read_keys(path.with_name(path.name.removesuffix(".key")))
    if keys and keys[-1] == new.verifier:
        _put_in_place(path)
    else:
        successor.unlink()


def _tell(log: Log, event: Event) -> None:
    """Records something about the log itself."""
    nobody = Context("corral", VERSION, "", "", "", "", VERSION)
    log.append(encode(event, nobody, sequence=0, at=time.time(), monotonic_ns=time.monotonic_ns()))


def new_name() -> str:
    """A name for a log that no other has: of this machine, with something random."""
    host = "".join(c for c in socket.gethostname() if c.isascii() and (c.isalnum() or c in "-.")) or "localhost"
    return f"{host}/corral/{secrets.token_hex(4)}"
