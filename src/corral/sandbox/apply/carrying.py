"""Carrying entries from one directory to another: copying them whole, and changing places at once."""

from __future__ import annotations

import ctypes
import os
import stat
from contextlib import suppress
from enum import IntEnum

from corral.sandbox.apply.marks import Marker, Unfit, attributes
from corral.sandbox.copying import Room
from corral.sandbox.trees import OPEN_DIRECTORY, OPEN_FILE

_PORTION = 16 << 20


class Rename(IntEnum):
    """What renameat2(2) does where there is something at the new name."""

    NOREPLACE = 1
    EXCHANGE = 2


def rename(how: Rename, source: int, name: str, target: int, new_name: str) -> None:
    """renameat2(2). Raises OSError."""
    libc = ctypes.CDLL(None, use_errno=True)
    if libc.renameat2(source, os.fsencode(name), target, os.fsencode(new_name), ctypes.c_uint(how)) != 0:
        number = ctypes.get_errno()
        raise OSError(number, os.strerror(number), new_name)


def copy(marker: Marker, room: Room, source: int, name: str, target: int, new_name: str, path: str) -> None:
    """Copies an entry with all that its mark covers, and its times. As ``marker`` says it would be.

    What is copied is compared with the mark by whoever calls, so this need not tell what changes meanwhile.
    Raises OSError, Unfit.
    """
    status = os.stat(name, dir_fd=source, follow_symlinks=False)
    kind = stat.S_IFMT(status.st_mode)
    if kind == stat.S_IFLNK:
        room.take(4096)
        os.symlink(os.readlink(name, dir_fd=source), new_name, dir_fd=target)
        _own(marker, status, target, new_name)
        times = (status.st_atime_ns, status.st_mtime_ns)
        os.utime(new_name, ns=times, dir_fd=target, follow_symlinks=False)
        return
    if kind not in (stat.S_IFREG, stat.S_IFDIR):
        raise Unfit(f"{path}: it changes while it is copied")
    fd = os.open(name, OPEN_DIRECTORY if kind == stat.S_IFDIR else OPEN_FILE, dir_fd=source)
    try:
        if kind == stat.S_IFDIR:
            room.take(4096)
            os.mkdir(new_name, 0o700, dir_fd=target)
            copied = os.open(new_name, OPEN_DIRECTORY, dir_fd=target)
        else:
            flags = os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_NOFOLLOW | os.O_CLOEXEC
            copied = os.open(new_name, flags, 0o600, dir_fd=target)
        try:
            if kind == stat.S_IFDIR:
                _copy_children(marker, room, fd, copied, path)
            else:
                _copy_data(room, fd, copied)
            finish(marker, fd, copied)
        finally:
            os.close(copied)
    finally:
        os.close(fd)


def finish(marker: Marker, source: int, target: int) -> None:
    """Gives a file or directory the owner, mode, attributes and times of another. Raises OSError."""
    status, now = os.fstat(source), os.fstat(target)
    uid, gid = marker.owner(status)
    if (uid, gid) != (now.st_uid, now.st_gid):
        os.fchown(target, uid if os.geteuid() == 0 else -1, gid)
    wanted = marker.attributes(source)
    for name in attributes(target).keys() - wanted.keys():
        os.removexattr(target, name)
    for name, value in wanted.items():
        os.setxattr(target, name, value)
    os.fchmod(target, marker.mode(status))
    os.utime(target, ns=(status.st_atime_ns, status.st_mtime_ns))


def _own(marker: Marker, status: os.stat_result, target: int, name: str) -> None:
    uid, gid = marker.owner(status)
    os.chown(name, uid if os.geteuid() == 0 else -1, gid, dir_fd=target, follow_symlinks=False)


def _copy_children(marker: Marker, room: Room, source: int, target: int, path: str) -> None:
    for name in sorted(os.listdir(source)):
        below = f"{path}/{name}"
        if marker.wanted(below):
            with suppress(FileNotFoundError):  # then the mark is another
                kind = stat.S_IFMT(os.stat(name, dir_fd=source, follow_symlinks=False).st_mode)
                if marker.is_layer and kind not in (stat.S_IFREG, stat.S_IFDIR, stat.S_IFLNK):
                    continue
                copy(marker, room, source, name, target, name, below)


def _copy_data(room: Room, source: int, target: int) -> None:
    """Content with its holes."""
    size = os.fstat(source).st_size
    os.ftruncate(target, size)
    offset = 0
    while offset < size:
        try:
            offset = os.lseek(source, offset, os.SEEK_DATA)
        except OSError:
            return  # a hole up to the end
        end = min(size, os.lseek(source, offset, os.SEEK_HOLE))
        os.lseek(target, offset, os.SEEK_SET)
        while offset < end:
            count = min(end - offset, _PORTION)
            room.take(count)
            sent = os.sendfile(target, source, offset, count)
            if sent == 0:
                return
            offset += sent
