"""Marks: a hash of all that an entry is, so that what was shown, what is there and what was put there can be compared.

A mark covers type, mode, owner, the user's extended attributes, access lists, capabilities, and content: of a file its
bytes, of a link where it leads, of a directory all that lies in it. Times are not part of it.
"""

from __future__ import annotations

import errno
import hashlib
import json
import os
import stat
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass, field

from corral.errors import CorralError
from corral.sandbox.compare import user_xattrs
from corral.sandbox.trees import OPEN_DIRECTORY, OPEN_FILE

MAX_LEVELS = 200
"""Directories below one another that are applied. More has no path that a program could use."""
MAX_FILE = 64 << 30
"""Bytes that a file may seem to have. A sparse one costs nothing inside, but its holes are read here."""
_CHUNK = 1 << 20
_ZEROS = hashlib.sha256(bytes(_CHUNK)).digest()
_KEPT = ("system.posix_acl_access", "system.posix_acl_default", "security.capability")
_TYPES = {stat.S_IFREG: "file", stat.S_IFDIR: "directory", stat.S_IFLNK: "link"}


class Unfit(CorralError):
    """An entry cannot be applied, or taken back, for what it is."""


def _same(status: os.stat_result) -> tuple[int, int]:
    return status.st_uid, status.st_gid


def _everything(path: str) -> bool:
    return True


@dataclass(frozen=True, slots=True)
class Marker:
    """How entries are looked at."""

    owner: Callable[[os.stat_result], tuple[int, int]] = _same
    """User and group that it has, or that it would get."""
    mode_mask: int = 0o7777
    kept_mode: int = 0
    """Bits that it would have in any case."""
    is_layer: bool = False
    """What is never applied is not there: whiteouts, fifos."""
    wanted: Callable[[str], bool] = _everything
    """Whether an entry of a directory, by its path, is part of it."""
    watch: Callable[[str, os.stat_result], None] = lambda path, status: None
    """Is told of every entry; may raise."""
    cache: dict[tuple[int, int, int, int], bytes] = field(default_factory=dict)
    """Of what nobody changes any more: files with many names are read once."""

    def mark(self, directory: int, name: str, path: str, level: int = 0) -> str | None:
        """The mark of an entry, or None where there is none.

        Raises Unfit for what is no file, directory or link, or cannot be read.
        """
        try:
            status = os.stat(name, dir_fd=directory, follow_symlinks=False)
        except FileNotFoundError:
            return None
        except OSError as error:
            raise Unfit(f"{path}: {error.strerror}") from None
        kind = _TYPES.get(stat.S_IFMT(status.st_mode))
        if kind is None and self.is_layer:
            return None
        if kind is None:
            raise Unfit(f"{path}: it is a fifo, a socket or a device; only files, directories and links are applied")
        if level > MAX_LEVELS:
            raise Unfit(f"{path}: it lies more than {MAX_LEVELS} directories deep")
        self.watch(path, status)
        try:
            if kind == "link":
                return self._sum(status, kind, {}, os.fsencode(os.readlink(name, dir_fd=directory)))
            fd = os.open(name, OPEN_DIRECTORY if kind == "directory" else OPEN_FILE, dir_fd=directory)
        except OSError as error:
            raise Unfit(f"{path}: cannot read it: {error.strerror}") from None
        try:
            now = os.fstat(fd)
            if not os.path.samestat(now, status):
                raise Unfit(f"{path}: it changes while it is read")
            content = self._children(fd, path, level) if kind == "directory" else self._content(fd, path, now)
            return self._sum(now, kind, self.attributes(fd), content)
        except OSError as error:
            raise Unfit(f"{path}: cannot read it: {error.strerror}") from None
        finally:
            os.close(fd)

    def own_mark(self, fd: int) -> str:
        """The mark of a directory without what lies in it."""
        return self._sum(os.fstat(fd), "directory", self.attributes(fd), b"")

    def attributes(self, fd: int) -> dict[str, bytes]:
        """The extended attributes that it would have."""
        return user_xattrs(fd) if self.is_layer else attributes(fd)

    def mode(self, status: os.stat_result) -> int:
        """The mode that it would have."""
        return stat.S_IMODE(status.st_mode) & self.mode_mask | self.kept_mode

    def _content(self, fd: int, path: str, status: os.stat_result) -> bytes:
        if not self.is_layer:
            return content_sum(fd, path)
        key = status.st_dev, status.st_ino, status.st_ctime_ns, status.st_size
        if key not in self.cache:
            self.cache[key] = content_sum(fd, path)
        return self.cache[key]

    def _children(self, fd: int, path: str, level: int) -> bytes:
        sums = []
        for name in sorted(os.listdir(fd)):
            below = f"{path}/{name}"
            if self.wanted(below):
                found = self.mark(fd, name, below, level + 1)
                if found is not None:
                    sums.append([os.fsencode(name).hex(), found])
        return hashlib.sha256(json.dumps(sums).encode()).digest()

    def _sum(self, status: os.stat_result, kind: str, xattrs: dict[str, bytes], content: bytes) -> str:
        mode = 0 if kind == "link" else self.mode(status)
        named = sorted((os.fsencode(name).hex(), value.hex()) for name, value in xattrs.items())
        row = [kind, mode, *self.owner(status), named, content.hex()]
        return hashlib.sha256(json.dumps(row).encode()).hexdigest()


def attributes(fd: int) -> dict[str, bytes]:
    """The extended attributes of a file of the host that come back with it."""
    found = user_xattrs(fd)
    for name in _KEPT:
        with suppress(OSError):
            found[name] = os.getxattr(fd, name)
    return found


def content_sum(fd: int, path: str) -> bytes:
    """A hash of a file's content, made of those of its pieces, so that holes cost nothing. Raises Unfit."""
    size = os.fstat(fd).st_size
    if size > MAX_FILE:
        raise Unfit(f"{path}: it is longer than {MAX_FILE >> 30} GiB")
    found = hashlib.sha256(size.to_bytes(8, "big"))
    data = -1
    for start in range(0, size, _CHUNK):
        length = min(_CHUNK, size - start)
        if data < start:
            data = _next_data(fd, start, size)
        if data >= start + length:
            found.update(_ZEROS if length == _CHUNK else hashlib.sha256(bytes(length)).digest())
            continue
        piece = os.pread(fd, length, start)
        if len(piece) != length:
            raise Unfit(f"{path}: it changes while it is read")
        found.update(hashlib.sha256(piece).digest())
    if os.fstat(fd).st_size != size:
        raise Unfit(f"{path}: it changes while it is read")
    return found.digest()


def _next_data(fd: int, start: int, size: int) -> int:
    try:
        return os.lseek(fd, start, os.SEEK_DATA)
    except OSError as error:
        return size if error.errno == errno.ENXIO else start
