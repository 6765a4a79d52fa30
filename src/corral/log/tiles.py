"""Hashes and entries of a log as files (C2SP tlog-tiles): 256 to a tile, in a directory that can be served as it is.

Full tiles are immutable. A partial one is written anew, under its width, for each checkpoint that needs it, and goes
when the full one is there.
"""

from __future__ import annotations

import errno
import os
import stat
from collections.abc import Iterator, Sequence
from contextlib import suppress
from functools import lru_cache
from pathlib import Path

from corral.errors import CorralError
from corral.log.merkle import HASH_SIZE, leaf_hash, perfect_root

WIDTH = 256
_HEIGHT = 8
MAX_ENTRY = 0xFFFF
"""Bytes of the longest entry: its length has sixteen bits."""
MAX_BUNDLE = WIDTH * (2 + MAX_ENTRY)
ENTRIES = "entries"
"""What stands for the level in the path of a tile of entries."""


class LogDamaged(CorralError):
    """The files of a log are not what its checkpoint commits it to, or cannot be read. The message says where."""


def tile_path(level: int | str, number: int, width: int = WIDTH) -> str:
    """The path of a tile below the log's directory: ``tile/0/x001/234.p/17``."""
    parts = [f"{number % 1000:03d}"]
    while number >= 1000:
        number //= 1000
        parts.append(f"x{number % 1000:03d}")
    partial = f".p/{width}" if width < WIDTH else ""
    return f"tile/{level}/{'/'.join(reversed(parts))}{partial}"


def tile_widths(size: int) -> Iterator[tuple[int, int, int]]:
    """Of a tree of ``size`` leaves: for each level, how many full tiles it has and the width of the partial one."""
    level, nodes = 0, size
    while nodes:
        yield level, nodes // WIDTH, nodes % WIDTH
        level, nodes = level + 1, nodes // WIDTH


def encode_bundle(entries: Sequence[bytes]) -> bytes:
    """Entries as a tile has them."""
    return b"".join(part for entry in entries for part in (len(entry).to_bytes(2, "big"), entry))


def decode_bundle(content: bytes, count: int) -> list[bytes]:
    """The entries of a tile. Raises LogDamaged where there are not ``count``."""
    entries = []
    at = 0
    for _ in range(count):
        start = at + 2
        at = start + int.from_bytes(content[at:start], "big")
        entries.append(content[start:at])
    if at != len(content) or start > len(content):
        raise LogDamaged(f"a tile of entries does not hold {count} of them")
    return entries


class Tiles:
    """The tiles of one log."""

    def __init__(self, directory: Path) -> None:
        self._directory = directory
        self._hashes = lru_cache(maxsize=64)(self._read_hashes)

    # ---- reading ----

    def entries(self, number: int, width: int = WIDTH) -> list[bytes]:
        """The entries of a tile; of a partial one that is gone, those at the beginning of the full one.

        Raises LogDamaged.
        """
        content, whole = self._read(ENTRIES, number, width, MAX_BUNDLE)
        try:
            return decode_bundle(content, whole)[:width]
        except LogDamaged as error:
            raise LogDamaged(f"{tile_path(ENTRIES, number, whole)}: {error}") from None

    def hashes(self, level: int, number: int, width: int = WIDTH) -> list[bytes]:
        """The hashes of a tile. Raises LogDamaged."""
        return self._hashes(level, number, width)

    def _read_hashes(self, level: int, number: int, width: int) -> list[bytes]:
        content, whole = self._read(level, number, width, WIDTH * HASH_SIZE)
        if len(content) != whole * HASH_SIZE:
            raise LogDamaged(f"{tile_path(level, number, whole)}: it has {len(content)} bytes")
        return [content[at : at + HASH_SIZE] for at in range(0, width * HASH_SIZE, HASH_SIZE)]

    def _read(self, level: int | str, number: int, width: int, limit: int) -> tuple[bytes, int]:
        """The content of a tile, and how wide that is."""
        for whole in (width, WIDTH) if width < WIDTH else (WIDTH,):
            path = tile_path(level, number, whole)
            try:
                content = read_file(self._directory / path, limit + 1)
            except FileNotFoundError:
                continue
            except OSError as error:
                raise LogDamaged(f"{path}: cannot read it: {error.strerror}") from None
            if len(content) > limit:
                raise LogDamaged(f"{path}: it is too long")
            return content, whole
        raise LogDamaged(f"{tile_path(level, number, width)}: it is missing")

    def subtree(self, size: int, level: int, number: int) -> bytes:
        """The hash of a complete subtree of the tree with ``size`` leaves. Raises LogDamaged."""
        tile_level, height = divmod(level, _HEIGHT)
        first = number << height
        tile, at = divmod(first, WIDTH)
        nodes = size >> (tile_level * _HEIGHT)
        width = min(WIDTH, nodes - tile * WIDTH)
        return perfect_root(self.hashes(tile_level, tile, width)[at : at + (1 << height)])

    # ---- writing ----

    def extend(self, begin: int, entries: Sequence[bytes], *, afresh: bool = False) -> bool:
        """Writes the tiles of the entries from number ``begin`` on, a multiple of 256, and those above them.

        ``afresh`` makes all that is not full above them from what is below, whatever is there: after a failure of power
        it may be anything. They are not durable before :meth:`sync`. Returns whether any of them was not there already.
        Raises LogDamaged where what is before them is missing; OSError.
        """
        changed = False
        self._hashes.cache_clear()  # what was read before it was altered, and is now made again
        for at in range(0, len(entries), WIDTH):
            part = entries[at : at + WIDTH]
            changed |= self._write(ENTRIES, (begin + at) // WIDTH, len(part), encode_bundle(part), afresh)
        level, hashes = 0, [leaf_hash(entry) for entry in entries]
        while hashes or (afresh and begin):
            above = []
            for at in range(0, len(hashes), WIDTH):
                nodes = hashes[at : at + WIDTH]
                changed |= self._write(level, (begin + at) // WIDTH, len(nodes), b"".join(nodes), afresh)
                if len(nodes) == WIDTH:
                    above.append(perfect_root(nodes))
            if not above and not afresh:
                break
            level, first = level + 1, begin // WIDTH
            begin = first // WIDTH * WIDTH
            earlier = self._above(level, begin, first, afresh)
            hashes = [*earlier, *above]
        return changed

    def _above(self, level: int, begin: int, end: int, afresh: bool) -> list[bytes]:
        """The hashes of the full tiles from ``begin`` to ``end`` of the level below."""
        if begin == end:
            return []
        try:
            if not afresh:
                return self.hashes(level, begin // WIDTH, end - begin)
        except LogDamaged:  # a partial tile can be made again
            pass
        return [perfect_root(self.hashes(level - 1, number)) for number in range(begin, end)]

    def sync(self, begin: int, end: int) -> None:
        """Makes durable the full tiles of the entries between two multiples of 256, and those above. Raises OSError."""
        directories: set[Path] = set()
        level, first, last = 0, begin // WIDTH, end // WIDTH
        while last > first:
            for number in range(first, last):
                for kind in (level, ENTRIES) if level == 0 else (level,):
                    path = self._directory / tile_path(kind, number)
                    _sync(path, os.O_RDONLY)
                    directories.update(parent for parent in path.parents if parent.is_relative_to(self._directory))
            level, first, last = level + 1, first // WIDTH, last // WIDTH
        for path in sorted(directories, reverse=True):
            sync_directory(path)

    def _write(self, level: int | str, number: int, width: int, content: bytes, compare: bool) -> bool:
        path = self._directory / tile_path(level, number, width)
        changed = True
        if compare:
            with suppress(OSError):
                changed = read_file(path, len(content) + 1) != content
        write_file(path, content, durable=False)
        if width == WIDTH:
            partial = path.with_name(path.name + ".p")
            with suppress(OSError):
                for name in os.listdir(partial):
                    os.unlink(partial / name)
                os.rmdir(partial)
        return changed


def read_file(path: Path, limit: int) -> bytes:
    """At most so many bytes of a file. What is no file (a pipe would never end) is refused. Raises OSError."""
    with open(os.open(path, os.O_RDONLY | os.O_CLOEXEC | os.O_NOFOLLOW | os.O_NONBLOCK), "rb") as file:
        if not stat.S_ISREG(os.fstat(file.fileno()).st_mode):
            raise OSError(errno.EINVAL, "it is no file", str(path))
        return file.read(limit)


def make_directory(path: Path, mode: int = 0o777) -> None:
    """Makes a directory, and those above it, with names that are durable. Raises OSError."""
    if not path.is_dir():
        make_directory(path.parent)
        path.mkdir(exist_ok=True, mode=mode)
        sync_directory(path.parent)


def write_file(path: Path, content: bytes, *, durable: bool = True) -> None:
    """Replaces a file at once: whoever reads it sees the old content or the new. Raises OSError."""
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f".{path.name}.{os.getpid()}")
    fd = os.open(temporary, os.O_WRONLY | os.O_CREAT | os.O_TRUNC | os.O_CLOEXEC | os.O_NOFOLLOW, 0o644)
    try:
        with open(fd, "wb") as file:
            file.write(content)
            file.flush()
            if durable:
                os.fdatasync(fd)
        os.rename(temporary, path)
    except BaseException:
        with suppress(OSError):
            os.unlink(temporary)
        raise
    if durable:
        sync_directory(path.parent)


def sync_directory(path: Path) -> None:
    """Makes the names in a directory durable. Raises OSError."""
    _sync(path, os.O_RDONLY | os.O_DIRECTORY)


def _sync(path: Path, flags: int) -> None:
    fd = os.open(path, flags | os.O_CLOEXEC)
    try:
        os.fsync(fd)
    finally:
        os.close(fd)
