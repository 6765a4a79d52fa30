"""Proofs that one record is in a log, as a file that can be verified without the log (C2SP tlog-proof)."""

from __future__ import annotations

import base64
from dataclasses import dataclass
from pathlib import Path

from corral.log.merkle import MAX_PROOF, ProofError, check_inclusion, inclusion_proof, leaf_hash
from corral.log.note import (
    MAX_NOTE,
    Checkpoint,
    Note,
    NoteError,
    Verifier,
    cosigners,
    decode_base64,
    open_checkpoint,
    parse_note,
    parse_number,
)
from corral.log.signing import read_checkpoint, read_keys
from corral.log.tiles import WIDTH, Tiles

_HEAD = "c2sp.org/tlog-proof@v1"
MAX_PROOF_FILE = MAX_NOTE + 128 * 1024
"""Bytes of the longest proof that is read. Ours carry the entry as extra data."""


@dataclass(frozen=True, slots=True)
class Proof:
    """That a log has an entry, under a checkpoint that its key and perhaps witnesses have signed."""

    index: int
    hashes: tuple[bytes, ...]
    checkpoint: Note
    extra: bytes | None = None
    """What whoever made the proof says beside it; in ours the entry itself."""

    def encode(self) -> bytes:
        extra = [] if self.extra is None else [f"extra {base64.b64encode(self.extra).decode()}"]
        hashes = (base64.b64encode(each).decode() for each in self.hashes)
        return "\n".join((_HEAD, *extra, f"index {self.index}", *hashes, "", "")).encode() + self.checkpoint.encode()


def make_proof(directory: Path, index: int) -> Proof:
    """The proof for entry ``index`` under the newest checkpoint.

    Raises ProofError where that commits to no such entry; NoteError or LogDamaged.
    """
    found = read_checkpoint(directory, read_keys(directory))
    size = found[0].size if found else 0
    if found is None or not 0 <= index < size:
        raise ProofError(f"the newest checkpoint is for {size} entries: there is none with number {index}")
    tiles = Tiles(directory)
    hashes = inclusion_proof(index, size, lambda level, number: tiles.subtree(size, level, number))
    number, at = divmod(index, WIDTH)
    entry = tiles.entries(number, min(WIDTH, size - number * WIDTH))[at]
    return Proof(index, tuple(hashes), found[1], entry)


def parse_proof(encoded: bytes) -> Proof:
    """Raises ProofError for what is no proof. What it is worth, :func:`check_proof` says."""
    if len(encoded) > MAX_PROOF_FILE:
        raise ProofError("the proof is too long")
    head, separator, checkpoint = encoded.partition(b"\n\n")
    try:
        lines = head.decode("ascii").split("\n")
        note = parse_note(checkpoint)
        if lines.pop(0) != _HEAD or not separator:
            raise ProofError(f"it is no proof: it does not begin with {_HEAD}")
        extra = None
        if lines and lines[0].startswith("extra "):
            extra = decode_base64(lines.pop(0).removeprefix("extra "), "the extra data of a proof")
        if not lines or not lines[0].startswith("index ") or len(lines) > 1 + MAX_PROOF:
            raise ProofError("it is no proof: no line says which entry it is for, or it is too long")
        index = parse_number(lines.pop(0).removeprefix("index "), "the number of the entry")
        return Proof(index, tuple(decode_base64(line, "a hash of a proof") for line in lines), note, extra)
    except UnicodeDecodeError:
        raise ProofError("it is no proof: it is no text") from None
    except NoteError as error:
        raise ProofError(str(error)) from None


def check_proof(
    proof: Proof, entry: bytes, key: Verifier, *, witnesses: tuple[Verifier, ...] = (), quorum: int = 0
) -> Checkpoint:
    """The checkpoint under which the log of ``key`` has ``entry``, cosigned by ``quorum`` of the witnesses.

    Raises ProofError where the proof does not prove that.
    """
    try:
        checkpoint, note = open_checkpoint(proof.checkpoint.encode(), key)
        cosigned = cosigners(note, witnesses)
    except NoteError as error:
        raise ProofError(str(error)) from None
    if len(cosigned) < quorum:
        raise ProofError(f"{len(cosigned)} of the witnesses have cosigned it; {quorum} must")
    check_inclusion(proof.hashes, proof.index, checkpoint.size, leaf_hash(entry), checkpoint.root)
    return checkpoint
