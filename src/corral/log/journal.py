"""Entries that are durable before they are in tiles: append-only files, each named after the number of its first entry.

A frame is the length of an entry (two bytes, big-endian), a CRC-32 over its number and itself (four bytes), and the
entry. What follows the last whole frame was durable for nobody: a process or the machine died while it was written.
"""

from __future__ import annotations

import os
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from zlib import crc32

from corral.log.tiles import MAX_ENTRY, LogDamaged, sync_directory

_HEADER = 6
_READ = 1 << 20
_DIGITS = 20


def frame(number: int, entry: bytes) -> bytes:
    """An entry as it stands in a journal. Raises ValueError for one that is empty or too long."""
    if not 0 < len(entry) <= MAX_ENTRY:
        raise ValueError(f"an entry has 1 to {MAX_ENTRY} bytes, not {len(entry)}")
    return b"%b%b%b" % (len(entry).to_bytes(2, "big"), _sum(number, entry), entry)


def _sum(number: int, entry: bytes) -> bytes:
    return crc32(entry, crc32(number.to_bytes(8, "big"))).to_bytes(4, "big")


@dataclass(frozen=True, slots=True)
class Frames:
    """What was read of a journal."""

    entries: list[bytes]
    end: int
    """Offset after the last whole frame."""
    rest: int
    """Bytes after it."""
    torn: bool = True
    """Whether those are the beginning of a frame, as a writer leaves it that is killed; else they were altered, or
    never reached the disk."""


def read_frames(fd: int, number: int, offset: int, *, most: int | None = None) -> Frames:
    """The entries from ``offset`` on, of which the first has this number. Raises OSError."""
    entries: list[bytes] = []
    buffer, start = b"", 0
    while True:
        while len(buffer) - start >= _HEADER:
            length = int.from_bytes(buffer[start : start + 2], "big")
            after = start + _HEADER + length
            if after > len(buffer) and length:
                break
            entry = buffer[start + _HEADER : after]
            if not length or buffer[start + 2 : start + _HEADER] != _sum(number + len(entries), entry):
                return Frames(entries, offset, os.fstat(fd).st_size - offset, torn=False)
            entries.append(entry)
            offset += after - start
            start = after
            if len(entries) == most:
                return Frames(entries, offset, 0)
        more = os.pread(fd, _READ, offset + len(buffer) - start)
        buffer, start = buffer[start:] + more, 0
        if not more:
            return Frames(entries, offset, len(buffer))


class Journal:
    """The files of a journal's directory."""

    def __init__(self, directory: Path) -> None:
        self.directory = directory

    def segments(self) -> list[int]:
        """The first numbers of the files, in order. Raises OSError."""
        names = os.listdir(self.directory)
        return sorted(int(name) for name in names if len(name) == _DIGITS and name.isascii() and name.isdigit())

    def path(self, base: int) -> Path:
        return self.directory / f"{base:0{_DIGITS}d}"

    def open(self, base: int, *, create: bool = False) -> int:
        """A descriptor to read and append by. A new file's name is durable. Raises OSError.

        The new file may be there already: whoever wanted to begin it was killed before it told the others.
        """
        flags = os.O_RDWR | os.O_APPEND | os.O_CLOEXEC | os.O_NOFOLLOW
        fd = os.open(self.path(base), flags | (os.O_CREAT if create else 0), 0o600)
        if create:
            try:
                sync_directory(self.directory)
            except BaseException:
                os.close(fd)
                raise
        return fd

    def entries(self, start: int, *, most: int) -> list[bytes]:
        """At most so many entries from number ``start`` on, across files.

        Raises LogDamaged where the journal begins later, or has a hole; OSError.
        """
        found: list[bytes] = []
        for base, following in _pairs(self.segments()):
            if following is not None and following <= start:
                continue
            if base > start + len(found):
                raise LogDamaged(f"journal: entry {start + len(found)} is missing; the next file begins with {base}")
            end = start + most if following is None else min(following, start + most)
            with _reading(self.path(base)) as fd:
                entries = read_frames(fd, base, 0, most=end - base).entries
            if following is not None and len(entries) < end - base:
                raise LogDamaged(f"journal/{self.path(base).name}: entry {base + len(entries)} is missing or altered")
            found += entries[max(0, start - base) :]
            if len(found) >= most:
                break
        return found

    def whole_from(self, size: int, *, further: bool = False) -> int:
        """The first number of a file from which on the journal has every entry, up to its last file.

        Files are read from the last one backwards, until there is entry ``size``, or ``further`` to the first one or
        to where something is missing. Raises LogDamaged where that is after entry ``size``; OSError.
        """
        pairs = list(_pairs(self.segments()))
        begin = pairs[-1][0]
        for base, following in reversed(pairs[:-1]):
            if following is None or (begin <= size and not further):
                break
            with _reading(self.path(base)) as fd:
                found = len(read_frames(fd, base, 0, most=following - base).entries)
            if found < following - base:
                if begin <= size:
                    break
                raise LogDamaged(f"journal/{self.path(base).name}: entry {base + found} is missing or altered")
            begin = base
        if begin > size:
            raise LogDamaged(f"journal: the entries from {size} up to {begin} are missing")
        return begin

    def forget(self, size: int) -> None:
        """Removes the files that hold nothing from entry ``size`` on. The last one stays. Raises OSError."""
        for base, following in _pairs(self.segments()):
            if following is not None and following <= size:
                with suppress(FileNotFoundError):
                    os.unlink(self.path(base))


def _pairs(bases: Sequence[int]) -> Iterator[tuple[int, int | None]]:
    """Each file's first number, and that of the one after it."""
    return zip(bases, (*bases[1:], None), strict=True) if bases else iter(())


@contextmanager
def _reading(path: Path) -> Iterator[int]:
    fd = os.open(path, os.O_RDONLY | os.O_CLOEXEC | os.O_NOFOLLOW)
    try:
        yield fd
    finally:
        os.close(fd)
