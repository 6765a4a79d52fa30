"""Opening what a hostile sandbox shows, without being led anywhere else: openat2(2) and what goes with it.

Rules that hold for each descriptor that :func:`open_path` and :func:`open_entry` return:

1. It lies in the tree that it was asked from, whatever links say and however fast they change (RESOLVE_IN_ROOT,
   RESOLVE_BENEATH), and no link of /proc was followed (RESOLVE_NO_MAGICLINKS).
2. It was opened with O_PATH first, which has no effect on a fifo, a socket or a device and never waits for one. Only
   what has then turned out to be a regular file or a directory is opened for its contents.
3. It is not on a file system that the kernel makes up (/proc, /sys, ...): there, reading is asking the kernel, and it
   would answer the controller and not the agent.
"""

from __future__ import annotations

import ctypes
import errno
import functools
import os
import stat
import time
from collections.abc import Iterator
from contextlib import contextmanager
from enum import IntFlag

from corral.errors import RequestError

_OPENAT2 = 437  # the same number on every architecture
_TRIES = 200
_PATIENT_AFTER = 50
_PAUSE = 0.0005
_MADE_UP = {0x9FA0: "proc", 0x62656572: "sysfs", 0x19800202: "mqueue", 0x1CD1: "devpts"}  # linux/magic.h
_CONTENT = os.O_NONBLOCK | os.O_NOCTTY | os.O_CLOEXEC


class Resolve(IntFlag):
    """How a path may be followed (linux/openat2.h)."""

    NO_XDEV = 0x01
    NO_MAGICLINKS = 0x02
    NO_SYMLINKS = 0x04
    BENEATH = 0x08
    IN_ROOT = 0x10


class _OpenHow(ctypes.Structure):
    _fields_ = [("flags", ctypes.c_uint64), ("mode", ctypes.c_uint64), ("resolve", ctypes.c_uint64)]


@functools.cache
def _libc() -> ctypes.CDLL:
    return ctypes.CDLL(None, use_errno=True)


def openat2(directory: int, path: bytes, flags: int, resolve: Resolve, *, patient: bool = True) -> int:
    """openat2(2), close-on-exec. Raises OSError.

    The kernel gives EAGAIN when anything was renamed while it followed "..", so that is tried again, a bounded number
    of times: an agent that renames without end gets an error and not our time. Without ``patient`` it is never waited.
    """
    if b"\0" in path:
        raise OSError(errno.EINVAL, os.strerror(errno.EINVAL))
    how = _OpenHow(flags | os.O_CLOEXEC, 0, resolve)
    for attempt in range(_TRIES):
        fd = _libc().syscall(
            ctypes.c_long(_OPENAT2),
            ctypes.c_int(directory),
            ctypes.c_char_p(path),
            ctypes.byref(how),
            ctypes.c_size_t(ctypes.sizeof(how)),
        )
        if fd >= 0:
            return int(fd)
        error = ctypes.get_errno()
        if error not in (errno.EAGAIN, errno.EINTR):
            raise OSError(error, os.strerror(error))
        if attempt >= _PATIENT_AFTER:
            if not patient:
                break
            time.sleep(_PAUSE)
    raise OSError(errno.EAGAIN, os.strerror(errno.EAGAIN))


@functools.cache
def _looking(resolve: Resolve) -> tuple[ctypes._NamedFuncPointer, _OpenHow]:
    call = ctypes.CDLL(None, use_errno=True).syscall  # a library of its own, as its types are set
    call.argtypes = (ctypes.c_long, ctypes.c_int, ctypes.c_char_p, ctypes.c_void_p, ctypes.c_size_t)
    call.restype = ctypes.c_long
    return call, _OpenHow(os.O_PATH | os.O_DIRECTORY | os.O_NOFOLLOW | os.O_CLOEXEC, 0, resolve)


def look_for_directory(directory: int, path: bytes, resolve: Resolve) -> int:
    """0 where ``path`` is a directory's, and no link's; else the errno of opening it as one.

    In a third of the time of :func:`openat2`, for those who ask often.
    """
    call, how = _looking(resolve)
    fd = call(_OPENAT2, directory, path, ctypes.addressof(how), ctypes.sizeof(how))
    if fd < 0:
        return ctypes.get_errno()
    os.close(fd)
    return 0


@contextmanager
def closing(fd: int) -> Iterator[int]:
    """Closes ``fd`` at the end of the block."""
    try:
        yield fd
    finally:
        os.close(fd)


def _refuse_made_up(fd: int) -> int:
    """``fd``, or RequestError and ``fd`` closed if it lies on a file system of rule 3."""
    buffer = ctypes.create_string_buffer(512)  # struct statfs begins with the type, a long
    failed = _libc().fstatfs(ctypes.c_int(fd), buffer) != 0
    kind = ctypes.c_long.from_buffer(buffer).value
    if not failed and kind not in _MADE_UP:
        return fd
    error = ctypes.get_errno()
    os.close(fd)
    if failed:
        raise OSError(error, os.strerror(error))
    raise RequestError(f"the kernel makes it up ({_MADE_UP[kind]}); run a command inside to see it")


def open_inside(root: int, path: str, flags: int) -> int:
    """Opens a ``path`` below ``root`` that is known to be what it should be (rule 1 only). Raises OSError."""
    return openat2(root, os.fsencode(path), flags, Resolve.IN_ROOT | Resolve.NO_MAGICLINKS)


def open_path(root: int, path: bytes, *, follow: bool = True, directory: bool = False) -> int:
    """An O_PATH descriptor of an absolute ``path`` below ``root``; links lead to where they lead for the agent."""
    flags = os.O_PATH | (0 if follow else os.O_NOFOLLOW) | (os.O_DIRECTORY if directory else 0)
    return _refuse_made_up(openat2(root, path, flags, Resolve.IN_ROOT | Resolve.NO_MAGICLINKS))


def open_entry(parent: int, name: bytes, *, directory: bool = False, same_mount: bool = False) -> int:
    """An O_PATH descriptor of one entry of a directory; a link is opened itself."""
    flags = os.O_PATH | os.O_NOFOLLOW | (os.O_DIRECTORY if directory else 0)
    resolve = Resolve.BENEATH | Resolve.NO_MAGICLINKS | Resolve.NO_SYMLINKS
    return _refuse_made_up(openat2(parent, name, flags, resolve | (Resolve.NO_XDEV if same_mount else Resolve(0))))


def open_content(fd: int) -> int:
    """Opens the regular file behind an O_PATH descriptor for reading. Raises RequestError for anything else.

    With O_NONBLOCK, because a file's owner may hold a lease on it (fcntl(2)) and let others wait for 45 s.
    """
    mode = os.fstat(fd).st_mode
    if not stat.S_ISREG(mode):
        raise RequestError(f"it is a {kind_name(mode)}, not a regular file")
    # A link of our own /proc to our own descriptor: the same inode, checked against the ids of this moment.
    return os.open(f"/proc/self/fd/{fd}", os.O_RDONLY | _CONTENT)


def open_listing(fd: int) -> int:
    """Opens the directory behind an O_PATH descriptor for listing. Raises RequestError for anything else."""
    mode = os.fstat(fd).st_mode
    if not stat.S_ISDIR(mode):
        raise RequestError(f"it is a {kind_name(mode)}, not a directory")
    return os.open(f"/proc/self/fd/{fd}", os.O_RDONLY | os.O_DIRECTORY | _CONTENT)


def names(listing: int, limit: int) -> list[tuple[bytes, os.stat_result]]:
    """Name and status of each entry of a listed directory, links not followed.

    Raises RequestError beyond ``limit`` entries: others may be adding them as fast as we read.
    """
    found: list[tuple[bytes, os.stat_result]] = []
    with os.scandir(listing) as entries:
        for entry in entries:
            if len(found) >= limit:
                raise RequestError(f"there are more than {limit} entries")
            try:
                found.append((os.fsencode(entry.name), entry.stat(follow_symlinks=False)))
            except FileNotFoundError:
                continue  # gone since it was listed
    return found


def kind_name(mode: int) -> str:
    """What a file of this mode is called in messages."""
    return _KINDS.get(stat.S_IFMT(mode), "file of unknown type")


_KINDS = {
    stat.S_IFREG: "regular file",
    stat.S_IFDIR: "directory",
    stat.S_IFLNK: "symbolic link",
    stat.S_IFIFO: "fifo",
    stat.S_IFSOCK: "socket",
    stat.S_IFCHR: "character device",
    stat.S_IFBLK: "block device",
}
