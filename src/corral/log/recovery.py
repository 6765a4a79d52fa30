"""Makes a log whole again after a crash, or says why it cannot be: before it is appended to, under both locks.

What was signed must be there: the tiles must give the signed root again. What the journal still has, the tiles can be
made of; of what is in full tiles, the journal needs nothing.
"""

from __future__ import annotations

import os
from dataclasses import dataclass
from pathlib import Path

from corral.log.journal import Journal, frame, read_frames
from corral.log.merkle import leaf_hash, root_hash
from corral.log.note import Checkpoint
from corral.log.tiles import WIDTH, LogDamaged, Tiles, write_file

_BOOT = Path("/proc/sys/kernel/random/boot_id")


@dataclass(frozen=True, slots=True)
class Recovery:
    """What was found, and mended, when a log was opened."""

    dropped: int = 0
    """Bytes of an incomplete entry at the end of the journal, which was durable for nobody, that were cut off."""
    rebuilt: bool = False
    """Tiles were missing or altered, and were made again from the journal."""
    restored: int = 0
    """Entries that the journal had lost, and were taken from the tiles."""

    def __bool__(self) -> bool:
        return bool(self.dropped or self.rebuilt or self.restored)

    def __str__(self) -> str:
        parts = (
            f"{self.dropped} bytes of an incomplete entry were cut off" if self.dropped else "",
            "tiles were made again from the journal" if self.rebuilt else "",
            f"{self.restored} entries that the journal had lost were taken from the tiles" if self.restored else "",
        )
        return "; ".join(part for part in parts if part)


def recover(journal: Journal, tiles: Tiles, signed: Checkpoint) -> Recovery:
    """Raises LogDamaged where what was signed cannot be had again; OSError."""
    bases = journal.segments()
    end, dropped = _cut(journal, bases[-1]) if bases else (0, 0)
    # After a power failure tiles that were not synced may be anything; those of the same boot are as they were written.
    rebuilt = False
    if not _fits(tiles, signed) or (signed.size and not _same_boot(journal)):
        rebuilt = bool(bases) and _rebuild(journal, tiles, bases[0], min(end, signed.size))
        if not _fits(tiles, signed):
            raise LogDamaged(
                f"the tiles do not give the root that was signed for {signed.size} entries, and the journal cannot make"
                " them again; `corral log verify` says where; to go on, begin a new log"
            )
    restored = 0
    if end < signed.size:
        restored = _restore(journal, tiles, signed.size, bases, end)
    elif not bases:
        os.close(journal.open(0, create=True))
    _note_boot(journal)
    return Recovery(dropped, rebuilt, restored)


def _cut(journal: Journal, base: int) -> tuple[int, int]:
    """The number after the last whole entry of the last file, and how many bytes after it were cut off."""
    fd = journal.open(base)
    try:
        frames = read_frames(fd, base, 0)
        if frames.rest:
            keep_aside(journal, fd, frames.end, base + len(frames.entries))
        return base + len(frames.entries), frames.rest
    finally:
        os.close(fd)


def keep_aside(journal: Journal, fd: int, offset: int, number: int) -> None:
    """Cuts off what follows ``offset``, and keeps it for whoever wants to know what it was. Raises OSError."""
    rest = os.pread(fd, 1 << 20, offset)
    write_file(journal.directory / f"dropped-{number}", rest, durable=False)
    os.ftruncate(fd, offset)
    os.fdatasync(fd)


def _fits(tiles: Tiles, signed: Checkpoint) -> bool:
    """Whether the tiles give the root that was signed, and the last one of entries is that of hashes."""
    size = signed.size
    if not size:
        return True
    begin = (size - 1) // WIDTH * WIDTH
    try:
        root = root_hash(size, lambda level, number: tiles.subtree(size, level, number))
        last = [leaf_hash(entry) for entry in tiles.entries(begin // WIDTH, size - begin)]
        return root == signed.root and last == tiles.hashes(0, begin // WIDTH, size - begin)
    except LogDamaged:
        return False


def _rebuild(journal: Journal, tiles: Tiles, base: int, end: int) -> bool:
    """Makes the tiles from the first entry of the journal on again. Returns whether there was anything to do."""
    begin = -(-base // WIDTH) * WIDTH
    if begin >= end:
        return False
    tiles.extend(begin, journal.entries(begin, most=end - begin))
    return True


def _restore(journal: Journal, tiles: Tiles, size: int, bases: list[int], end: int) -> int:
    """A journal again that begins with the last tile's first entry; returns how many entries that brings back."""
    begin = size // WIDTH * WIDTH
    entries = tiles.entries(begin // WIDTH, size - begin) if size > begin else []
    os.sync()  # which tiles are durable, the journal that is lost would have said
    content = b"".join(frame(begin + at, entry) for at, entry in enumerate(entries))
    write_file(journal.path(begin), content)
    for base in bases:
        if base != begin:
            os.unlink(journal.path(base))
    return size - end


def _same_boot(journal: Journal) -> bool:
    try:
        return (journal.directory / "boot").read_bytes() == _BOOT.read_bytes()
    except OSError:
        return False


def _note_boot(journal: Journal) -> None:
    if not _same_boot(journal):
        write_file(journal.directory / "boot", _BOOT.read_bytes())
