"""What travels between a controller and the deputy of one of its sandboxes (``src/launcher/deputy.h``).

One message of a SOCK_SEQPACKET socket is one request or one reply; a test compares the layouts with the C ones.
"""

from __future__ import annotations

import os
import struct
from dataclasses import dataclass
from enum import IntEnum, IntFlag

MAX_PATH = 4095
MAX_ADDRESS = 110
MAX_DATA = 32768
MAX_APART = 524288
MAX_FDS = 250

_REQUEST = struct.Struct("<QIIIIIIQIIIIII")
_REPLY = struct.Struct("<QiIII")
MAX_REPLY = _REPLY.size + MAX_PATH + 1


class Operation(IntEnum):
    """What can be asked for (``enum deputy_operation``)."""

    RESOLVE = 1
    OPEN = 2
    CREATE = 3
    RENAME = 4
    LINK = 5
    SYMLINK = 6
    UNLINK = 7
    CHMOD = 8
    CONNECT = 9
    BIND = 10
    SEND = 11
    CANCEL = 12
    LISTEN = 13
    MAKE = 14


class PlaceLeft(IntEnum):
    """What is of the place of a move when it is over (``enum deputy_place``)."""

    IS_GONE = 0
    IS_UNKNOWN = 1
    """It was killed; what is there are second names of files of a tree that is whole."""
    IS_OTHERS = 2
    """Somebody has put something of theirs there, or into the old tree, and nothing may be lost."""


class Option(IntFlag):
    """How descriptors of a SEND are to be read (``enum deputy_option``)."""

    NONE = 0
    TO_OBJECT = 1
    APART = 2


@dataclass(frozen=True, slots=True)
class Caller:
    """As whom: ids inside, of the process whose call it is."""

    uid: int
    gid: int
    umask: int = 0o022


@dataclass(frozen=True, slots=True)
class Reply:
    """What came of a request."""

    errno: int
    """The kernel's answer to the call, 0 for success."""
    value: int = 0
    """Bytes sent. Of a RESOLVE that failed: whether there is an object, whose path is too long to be told. Of a RENAME
    with a token: what is of its place (:class:`PlaceLeft`)."""
    fd: int = -1
    """Of a RESOLVE the object (O_PATH), of OPEN and CREATE the file. Whoever is called back closes it."""
    path: str = ""
    """Of a RESOLVE: the object's path inside, links resolved; empty where it has none (a pipe, a deleted file)."""
    busy: bool = False
    """Nothing was tried: too many requests wait for others already (``errno`` is EAGAIN). It can be tried again."""


def encode(
    number: int,
    operation: Operation,
    caller: Caller,
    *,
    path: bytes = b"",
    second: bytes = b"",
    address: bytes = b"",
    data: bytes = b"",
    flags: int = 0,
    mode: int = 0,
    resolve: int = 0,
    options: Option = Option.NONE,
) -> bytes:
    """One request. Raises struct.error for a number that its field cannot hold."""
    parts = (path, second, address, data)
    ids = (caller.uid, caller.gid, caller.umask)
    lengths = map(len, parts)
    header = _REQUEST.pack(number, operation, *ids, flags, mode, resolve, options, *lengths, 0)
    return b"".join((header, *parts))


def decode(data: bytes) -> tuple[int, Reply] | None:
    """The number of a request and its reply, still without its descriptor; None for what is no reply."""
    if len(data) < _REPLY.size:
        return None
    number, error, value, busy, length = _REPLY.unpack_from(data)
    path = data[_REPLY.size :]
    if length != len(path):
        return None
    return number, Reply(error, value, -1, os.fsdecode(path), busy != 0)
