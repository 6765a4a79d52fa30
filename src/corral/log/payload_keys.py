"""The key of a store of payloads, and the store's word that it has one.

The word lies in the store itself: without it, a store whose key is gone would go on unencrypted.
"""

from __future__ import annotations

import os
import secrets
from pathlib import Path

from corral.errors import CorralError
from corral.log.tiles import make_directory, sync_directory, write_file

_KEY = 32
_MARK = "encrypted"


class PayloadError(CorralError):
    """A payload is not there, is not what its digest says, or cannot be kept."""


def is_marked(directory: Path) -> bool:
    """Whether what is kept in a store is to be encrypted."""
    return os.path.lexists(directory / _MARK)


def encrypt(directory: Path, key: Path) -> None:
    """Has what is kept in a store from now on encrypted, and makes the key for that.

    The key comes first: who keeps something in between has it already. If this is cut short there, it can be done
    again. Raises PayloadError, also where it was done already.
    """
    if is_marked(directory):
        raise PayloadError(f"{directory}: it is encrypted already, with the key {key}")
    if not os.path.lexists(key):
        _make(key)
    try:
        make_directory(directory, mode=0o755)
        write_file(directory / _MARK, b"", mode=0o600)
    except OSError as error:
        raise PayloadError(f"{directory}: cannot mark it: {error.strerror}") from None


def read_key(path: Path) -> bytes | None:
    """The key of a store, or None where it has none. Raises PayloadError where others can read it, or it is no key."""
    try:
        descriptor = os.open(path, os.O_RDONLY | os.O_CLOEXEC | os.O_NOFOLLOW | os.O_NONBLOCK)
    except FileNotFoundError:
        return None
    except OSError as error:
        raise PayloadError(f"{path}: cannot read the key: {error.strerror}") from None
    with open(descriptor, "rb") as file:
        status = os.fstat(file.fileno())
        if status.st_mode & 0o077 or status.st_uid != os.geteuid():
            raise PayloadError(f"{path}: others can read this key, or own it; make it yours, mode 0600")
        key = file.read(_KEY + 1)
    if len(key) != _KEY:
        raise PayloadError(f"{path}: it is no key ({_KEY} bytes)")
    return key


def _make(path: Path) -> None:
    temporary = path.with_name(f".{path.name}.{os.getpid()}")
    try:
        descriptor = os.open(temporary, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC | os.O_NOFOLLOW, 0o600)
        try:
            with open(descriptor, "wb") as file:
                file.write(secrets.token_bytes(_KEY))
                file.flush()
                os.fsync(file.fileno())
            os.link(temporary, path)
        finally:
            os.unlink(temporary)
        sync_directory(path.parent)
    except OSError as error:
        raise PayloadError(f"{path}: cannot make the key: {error.strerror}") from None
