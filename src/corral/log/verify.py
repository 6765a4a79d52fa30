"""Verifies a log from its files alone: that they are what its checkpoint commits it to, entry by entry.

All hashes are computed again, from the entries up to the root; what does not fit is named by its file. What a log that
is whole may still hide is that there is another one (a split view) or that it was longer once (a rollback): against
both help checkpoints that somebody else has kept, and witnesses.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path

from corral.log.merkle import ProofError, check_consistency, consistency_proof, leaf_hash, perfect_root, root_hash
from corral.log.note import Checkpoint, Note, NoteError, Verifier, cosigners, open_checkpoint
from corral.log.signing import read_checkpoint
from corral.log.tiles import ENTRIES, WIDTH, LogDamaged, Tiles, tile_path

Progress = Callable[[int, int], None]
"""Told how many entries are verified, of how many."""
Look = Callable[[int, bytes], str]
"""Looks into an entry, by its number; says what is wrong with it, or nothing."""
MAX_FAULTS = 100


@dataclass(frozen=True, slots=True)
class Fault:
    """Something that is not as it must be."""

    check: str
    """Which check found it: signature, cosignature, entries, hashes, root, consistency, records, payloads."""
    where: str
    what: str

    def __str__(self) -> str:
        return f"{self.check}: {self.where}: {self.what}"


@dataclass(slots=True)
class Report:
    """What was verified, and what was found."""

    size: int = 0
    """Entries that the checkpoint commits to."""
    checked: int = 0
    cosigners: tuple[str, ...] = ()
    faults: list[Fault] = field(default_factory=list)
    """In the order of the log; the first is the first bad place. At most :data:`MAX_FAULTS`."""

    @property
    def valid(self) -> bool:
        return not self.faults

    def add(self, check: str, where: str, what: str) -> None:
        if len(self.faults) < MAX_FAULTS:
            self.faults.append(Fault(check, where, what))


def verify_log(
    directory: Path,
    keys: Sequence[Verifier],
    *,
    witnesses: Sequence[Verifier] = (),
    quorum: int = 0,
    earlier: Sequence[bytes] = (),
    look: Look | None = None,
    progress: Progress | None = None,
) -> Report:
    """Verifies everything that the newest checkpoint commits to.

    ``keys`` are those that the log may have signed with, from somewhere else than the log itself. ``earlier`` are
    checkpoints (notes) that were kept: the log must continue each of them.
    """
    report = Report()
    try:
        found = read_checkpoint(directory, tuple(keys))
    except (NoteError, LogDamaged) as error:
        report.add("signature", "checkpoint", str(error))
        return report
    if found is None:
        report.add("signature", "checkpoint", "the log has none")
        return report
    checkpoint, note = found
    report.size = checkpoint.size
    _check_cosigners(report, note, witnesses, quorum)
    tiles = Tiles(directory)
    _check_tiles(report, tiles, checkpoint, look, progress)
    for number, encoded in enumerate(earlier, 1):
        _check_earlier(report, tiles, checkpoint, keys, encoded, f"earlier checkpoint {number}")
    return report


def verify_between(old: bytes, new: bytes, directory: Path, keys: Sequence[Verifier]) -> Report:
    """Verifies that the tree of one checkpoint (a note) continues that of another, by the hashes of a log.

    Only hashes are looked at: no entry, and not whether they are those of the entries.
    """
    report = Report()
    try:
        checkpoint, _ = _open(new, keys)
    except NoteError as error:
        report.add("signature", "the newer checkpoint", str(error))
        return report
    report.size = checkpoint.size
    _check_earlier(report, Tiles(directory), checkpoint, keys, old, "the older checkpoint")
    return report


def _open(encoded: bytes, keys: Sequence[Verifier]) -> tuple[Checkpoint, Note]:
    problem = NoteError("no key is given")
    for key in keys:
        try:
            return open_checkpoint(encoded, key)
        except NoteError as error:
            problem = error
    raise problem


def _check_cosigners(report: Report, note: Note, witnesses: Sequence[Verifier], quorum: int) -> None:
    try:
        report.cosigners = tuple(each.name for each in cosigners(note, witnesses))
    except NoteError as error:
        report.add("cosignature", "checkpoint", str(error))
        return
    if len(report.cosigners) < quorum:
        report.add("cosignature", "checkpoint", f"{len(report.cosigners)} witnesses have cosigned it; {quorum} must")


def _check_tiles(
    report: Report, tiles: Tiles, checkpoint: Checkpoint, look: Look | None, progress: Progress | None
) -> None:
    """Entries against the lowest hashes, each level of hashes against the one below, the highest against the root."""
    size = checkpoint.size
    below: list[bytes] = []
    for number in range(-(-size // WIDTH)):
        width = min(WIDTH, size - number * WIDTH)
        leaves = _check_bundle(report, tiles, number, width, look)
        if width == WIDTH:
            below.append(perfect_root(leaves) if len(leaves) == WIDTH else b"")
        report.checked += len(leaves)
        if progress is not None:
            progress(number * WIDTH + width, size)
    level = 1
    while below:
        above = []
        for at in range(0, len(below), WIDTH):
            nodes = below[at : at + WIDTH]
            _check_hashes(report, tiles, level, at // WIDTH, nodes)
            if len(nodes) == WIDTH:
                above.append(perfect_root(nodes) if all(nodes) else b"")
        level, below = level + 1, above
    if not report.faults or all(each.check in ("records", "cosignature") for each in report.faults):
        try:
            root = root_hash(size, lambda level, number: tiles.subtree(size, level, number))
        except LogDamaged as error:
            report.add("hashes", "tiles", str(error))
            return
        if root != checkpoint.root:
            report.add("root", "checkpoint", f"the tiles give another root for {size} entries than was signed")


def _check_bundle(report: Report, tiles: Tiles, number: int, width: int, look: Look | None) -> list[bytes]:
    """The hashes of the entries of a tile, by the tile of hashes where the entries cannot be read."""
    hashes: list[bytes] | None = None
    try:
        hashes = tiles.hashes(0, number, width)
    except LogDamaged as error:
        report.add("hashes", tile_path(0, number, width), str(error))
    try:
        entries = tiles.entries(number, width)
    except LogDamaged as error:
        report.add("entries", tile_path(ENTRIES, number, width), str(error))
        return hashes or []
    leaves = [leaf_hash(entry) for entry in entries]
    if hashes is not None and leaves != hashes:
        wrong = next(at for at, (own, given) in enumerate(zip(leaves, hashes, strict=True)) if own != given)
        report.add("entries", f"entry {number * WIDTH + wrong}", "it is not the one whose hash is in the tree")
    if look is not None:
        for at, entry in enumerate(entries, number * WIDTH):
            problem = look(at, entry)
            if problem:
                report.add("records", f"entry {at}", problem)
    return leaves


def _check_hashes(report: Report, tiles: Tiles, level: int, number: int, nodes: list[bytes]) -> None:
    try:
        hashes = tiles.hashes(level, number, len(nodes))
    except LogDamaged as error:
        report.add("hashes", tile_path(level, number, len(nodes)), str(error))
        return
    for at, (own, given) in enumerate(zip(nodes, hashes, strict=True)):
        if own and own != given:
            first = (number * WIDTH + at) * WIDTH**level
            report.add(
                "hashes", f"{tile_path(level, number, len(nodes))}, hash {at}", f"wrong for entries from {first}"
            )
            return


def _check_earlier(
    report: Report, tiles: Tiles, checkpoint: Checkpoint, keys: Sequence[Verifier], encoded: bytes, name: str
) -> None:
    try:
        old, _ = _open(encoded, keys)
    except NoteError as error:
        report.add("signature", name, str(error))
        return
    size = checkpoint.size
    if old.size > size:
        report.add(
            "consistency", name, f"it is for {old.size} entries, and the log has only {size}: it was rolled back"
        )
        return
    try:
        proof = consistency_proof(old.size, size, lambda level, number: tiles.subtree(size, level, number))
        check_consistency(proof, old.size, size, old.root, checkpoint.root)
    except (ProofError, LogDamaged) as error:
        report.add("consistency", name, f"the log does not continue it: {error}")
