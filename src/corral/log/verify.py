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
from corral.log.note import MAX_NOTE, Checkpoint, Note, NoteError, Verifier, cosigners, open_checkpoint
from corral.log.signing import CHECKPOINT, read_checkpoint
from corral.log.tiles import ENTRIES, WIDTH, LogDamaged, Tiles, read_file, tile_path

Progress = Callable[[int, int], None]
"""Told how many entries are verified, of how many."""
Look = Callable[[int, bytes], str]
"""Looks into an entry, by its number; says what is wrong with it, or nothing."""
MAX_FAULTS = 100
"""After so many nothing more is looked at."""
_NOT_OF_THE_TREE = frozenset({"signature", "cosignature", "records", "payloads"})


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
    unread: int = 0
    """Contents beside the log that could not be verified here."""
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
    published = _published(report, directory, keys)  # before the newest: that one then is no older
    try:
        found = read_checkpoint(directory, tuple(keys))
    except NoteError as error:
        if not report.faults:
            report.add("signature", "checkpoint", str(error))
        return report
    except LogDamaged as error:
        report.add("consistency", "checkpoint", str(error))
        return report
    if found is None:
        return report
    checkpoint, note = found
    report.size = checkpoint.size
    _check_cosigners(report, note, witnesses, quorum)
    tiles = Tiles(directory)
    _check_tiles(report, tiles, checkpoint, look, progress)
    if published is not None:
        _check_earlier(report, tiles, checkpoint, keys, published, "checkpoint")
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


def _published(report: Report, directory: Path, keys: Sequence[Verifier]) -> bytes | None:
    """The checkpoint that others get, if it is one: the newest may be the copy beside the journal."""
    try:
        content = read_file(directory / CHECKPOINT, MAX_NOTE + 1)
        _open(content, keys)
    except FileNotFoundError:
        report.add("signature", "checkpoint", "it is missing")
    except OSError as error:
        report.add("signature", "checkpoint", f"cannot read it: {error.strerror}")
    except NoteError as error:
        report.add("signature", "checkpoint", str(error))
    else:
        return content
    return None


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
    """Entries against the lowest hashes, each level of hashes against the one below, the highest against the root.

    All that is above an entry is looked at before the next one, so that the first fault is at the first bad place.
    """
    size = checkpoint.size
    edge: list[list[bytes]] = []
    for number in range(-(-size // WIDTH)):
        if len(report.faults) >= MAX_FAULTS:
            return
        width = min(WIDTH, size - number * WIDTH)
        leaves = _check_bundle(report, tiles, number, width, look)
        if width == WIDTH:
            _check_above(report, tiles, size, edge, number, _root(leaves))
        report.checked += len(leaves)
        if progress is not None:
            progress(number * WIDTH + width, size)
    if all(each.check in _NOT_OF_THE_TREE for each in report.faults):
        try:
            root = root_hash(size, lambda level, number: tiles.subtree(size, level, number))
        except LogDamaged as error:
            report.add("hashes", "tiles", str(error))
            return
        if root != checkpoint.root:
            report.add("root", "checkpoint", f"the tiles give another root for {size} entries than was signed")


def _root(hashes: list[bytes]) -> bytes:
    """The hash over a full tile; none where it is not known."""
    return perfect_root(hashes) if len(hashes) == WIDTH and all(hashes) else b""


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


def _check_above(report: Report, tiles: Tiles, size: int, edge: list[list[bytes]], number: int, node: bytes) -> None:
    """The hash over full tile ``number`` of the lowest level, and those over what it completes, against those that the
    tiles above have. ``edge`` keeps, for each level above, the hashes of the tile that is not complete yet."""
    level = 1
    while True:
        if level > len(edge):
            edge.append([])
        tile, at = divmod(number, WIDTH)
        width = min(WIDTH, size // WIDTH**level - tile * WIDTH)
        where = tile_path(level, tile, width)
        try:
            if tiles.hashes(level, tile, width)[at] != node and node:
                report.add("hashes", f"{where}, hash {at}", f"wrong for entries from {number * WIDTH**level}")
        except LogDamaged as error:
            if at == 0:  # once
                report.add("hashes", where, str(error))
        edge[level - 1].append(node)
        if len(edge[level - 1]) < WIDTH:
            return
        node, number, edge[level - 1] = _root(edge[level - 1]), tile, []
        level += 1


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
