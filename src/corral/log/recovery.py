"""Makes a log whole again after a crash, or says why it cannot be: before it is appended to, under both locks.

What was signed must be there: the tiles must give the signed root again. What the journal still has, the tiles can be
made of; of what is in full tiles, the journal needs nothing.
"""

from __future__ import annotations

import os
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

from corral.log.journal import Journal, frame, read_frames
from corral.log.merkle import leaf_hash, root_hash
from corral.log.note import Checkpoint
from corral.log.tiles import WIDTH, LogDamaged, Tiles, write_file

_BOOT = Path("/proc/sys/kernel/random/boot_id")
_MAX_KEPT = 64 << 20


@dataclass(frozen=True, slots=True)
class Recovery:
    """What was found, and mended, when a log was opened."""

    dropped: int = 0
    """Bytes at the end of the journal that are no entry, and were cut off. ``journal/dropped-<number>`` has them."""
    torn: bool = True
    """Whether they were the beginning of an entry, which was durable for nobody. Else they are what a failure of power
    or of the disk left, and entries that were durable may have been among them."""
    rebuilt: bool = False
    """Tiles were missing or altered, and were made again from the journal."""
    restored: int = 0
    """Entries that the journal had lost, and were taken from the tiles."""

    def __bool__(self) -> bool:
        return bool(self.dropped or self.rebuilt or self.restored)

    def __str__(self) -> str:
        what = (
            "of an incomplete entry were"
            if self.torn
            else "that are no entries, after a failure of power or disk, were"
        )
        parts = (
            f"{self.dropped} bytes {what} cut off" if self.dropped else "",
            "tiles were made again from the journal" if self.rebuilt else "",
            f"{self.restored} entries that the journal had lost were taken from the tiles" if self.restored else "",
        )
        return "; ".join(part for part in parts if part)


def recover(journal: Journal, tiles: Tiles, signed: Checkpoint) -> Recovery:
    """Raises LogDamaged where what was signed, or was durable after that, cannot be had again; OSError."""
    # After a failure of power or of the disk, what was not synced may be anything. Else it is as it was written.
    sure = _same_boot(journal)
    bases = journal.segments()
    end, dropped, torn = _cut(journal, bases[-1], sure=sure) if bases else (0, 0, True)
    rebuilt = False
    if not sure or not _fits(tiles, signed):
        rebuilt = bool(bases) and _rebuild(journal, tiles, min(end, signed.size))
        if not _fits(tiles, signed):
            raise LogDamaged(
                f"the tiles do not give the root that was signed for {signed.size} entries, and the journal cannot make"
                " them again; `corral log verify` says where; to go on, begin a new log"
            )
    restored = 0
    if end < signed.size:
        restored = _restore(journal, tiles, signed.size, bases, end)
    elif bases:
        journal.whole_from(signed.size)
        begin = signed.size // WIDTH * WIDTH
        require_signed(tiles, begin, signed.size, journal.entries(begin, most=signed.size - begin))
    else:
        os.close(journal.open(0, create=True))
    _note_boot(journal)
    return Recovery(dropped, torn, rebuilt, restored)


def _cut(journal: Journal, base: int, *, sure: bool) -> tuple[int, int, bool]:
    """The number after the last whole entry of the last file, how many bytes after it were cut off, and whether those
    were the beginning of one."""
    fd = journal.open(base)
    try:
        frames = read_frames(fd, base, 0)
        end = base + len(frames.entries)
        if sure and not frames.torn:
            raise altered(journal, base, end)
        if frames.rest:
            keep_aside(journal, fd, frames.end, end)
    finally:
        os.close(fd)
    if not sure and frames.entries:  # a sync that failed is not told twice: only a new file is sure to be on the disk
        write_file(
            journal.path(base), b"".join(frame(number, entry) for number, entry in enumerate(frames.entries, base))
        )
    return end, frames.rest, frames.torn


def altered(journal: Journal, base: int, number: int) -> LogDamaged:
    """No crash leaves this."""
    return LogDamaged(
        f"journal/{journal.path(base).name}: entry {number} was altered; it and what follows it may have been durable"
    )


def require_signed(tiles: Tiles, begin: int, size: int, entries: list[bytes]) -> None:
    """Raises LogDamaged unless these entries of the journal, from ``begin`` on, are those that were signed up to
    ``size``: nothing is made of them then, so that the tiles stay what they are."""
    signed = tiles.entries(begin // WIDTH, size - begin) if size > begin else []
    if entries[: len(signed)] != signed:
        raise LogDamaged(
            f"journal: an entry from {begin} on was altered; it is not the one in the tiles, which was signed"
        )


def keep_aside(journal: Journal, fd: int, offset: int, number: int) -> None:
    """Cuts off what follows ``offset``, and keeps it for whoever wants to know what it was. Raises OSError."""
    write_file(journal.directory / f"dropped-{number}", os.pread(fd, _MAX_KEPT, offset), durable=False)
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


def _rebuild(journal: Journal, tiles: Tiles, end: int) -> bool:
    """Makes the tiles from the first entry of the journal on again, up to ``end``, and those above them.

    Returns whether any was not as it must be.
    """
    try:
        begin = -(-journal.whole_from(end, further=True) // WIDTH) * WIDTH
        entries = journal.entries(begin, most=end - begin) if begin < end else []
        return tiles.extend(begin, entries, afresh=True)
    except LogDamaged:  # they are judged as they are
        return False


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


def distrust(journal: Journal) -> None:
    """After an error of the disk: whoever opens the log next takes nothing for durable that was not synced anew."""
    with suppress(OSError):
        os.unlink(journal.directory / "boot")


def _note_boot(journal: Journal) -> None:
    if not _same_boot(journal):
        write_file(journal.directory / "boot", _BOOT.read_bytes())
