"""The signed checkpoints of a log that is written, and the keys that sign for it.

A checkpoint is kept twice: in the journal, where it is durable before anybody else sees it, and as the file
``checkpoint`` for others. Of the two the one with more entries counts, so that neither a crash between the two nor the
loss of one makes a log sign again what it has signed differently. ``keys`` holds the public halves of the keys, oldest
first; the last one signs.
"""

from __future__ import annotations

from contextlib import suppress
from pathlib import Path

from corral.log.merkle import EMPTY, ProofError, check_consistency, consistency_proof, root_hash
from corral.log.note import (
    MAX_NOTE,
    Checkpoint,
    Note,
    NoteError,
    Signature,
    Signer,
    Verifier,
    open_checkpoint,
    parse_verifier,
    sign,
)
from corral.log.tiles import LogDamaged, Tiles, read_file, write_file

CHECKPOINT = "checkpoint"
KEYS = "keys"
_COPY = "journal/checkpoint"


def read_keys(directory: Path) -> tuple[Verifier, ...]:
    """The keys that a log says it has signed with, oldest first; none where it says nothing.

    To trust them is another matter: whoever verifies a log has its key from somewhere else. Raises NoteError.
    """
    content = _read(directory / KEYS)
    if content is None:
        return ()
    try:
        lines = content.decode("ascii").splitlines()
    except UnicodeDecodeError:
        raise NoteError(f"{KEYS}: it is no list of keys") from None
    return tuple(parse_verifier(line) for line in lines)


def _read(path: Path) -> bytes | None:
    """The content of a small file, None where there is none. Raises NoteError."""
    try:
        return read_file(path, MAX_NOTE + 1)
    except FileNotFoundError:
        return None
    except OSError as error:
        raise NoteError(f"{path.name}: cannot read it: {error.strerror}") from None


def read_checkpoint(
    directory: Path, keys: tuple[Verifier, ...], *, by_signer: bool = False
) -> tuple[Checkpoint, Note] | None:
    """The newest checkpoint that one of the keys has signed; None where none was ever made.

    Of two copies one may be cut off by a crash, and one may be out of reach of those who only read. Who signs must have
    looked at both (``by_signer``): one that its disk does not give just now may be the newer, and would be replaced.

    Raises:
        NoteError: there is one, and it is not signed by such a key, or cannot be read by who signs.
        LogDamaged: there are two of one size that differ.
    """
    found: list[tuple[Checkpoint, Note]] = []
    problem: NoteError | None = None
    known: bytes | None = None
    for name in (CHECKPOINT, _COPY):
        try:
            content = _read(directory / name)
        except NoteError as error:
            if by_signer:
                raise
            problem = error
            continue
        try:
            if content is not None and content != known:
                known = content
                found.append(_opened(content, keys))
        except NoteError as error:
            problem = NoteError(f"{name}: {error}")
    if not found:
        if problem is not None:
            raise problem
        return None
    if len({each.root for each, _ in found}) > 1 and len({each.size for each, _ in found}) == 1:
        raise LogDamaged(f"{CHECKPOINT} and {_COPY} commit to different trees of {found[0][0].size} entries")
    return max(found, key=lambda each: (each[0].size, len(each[1].signatures)))


def _opened(content: bytes, keys: tuple[Verifier, ...]) -> tuple[Checkpoint, Note]:
    problem = NoteError("no key is known for it")
    for key in reversed(keys):
        try:
            return open_checkpoint(content, key)
        except NoteError as error:
            problem = error
    raise problem


class Checkpoints:
    """Signs for a log. Whoever calls this holds the lock of the tiles."""

    def __init__(self, directory: Path, signer: Signer, tiles: Tiles) -> None:
        self._directory, self._signer, self._tiles = directory, signer, tiles

    @property
    def origin(self) -> str:
        return self._signer.verifier.name

    def claim(self) -> None:
        """Names a new log after the signer's key, and makes sure that an old one has that key.

        A new log is signed for while it is empty: one that has no checkpoint at all has lost it, and must not be signed
        for as if it were new. Raises NoteError where it is the log of another key; LogDamaged where it lost that;
        OSError.
        """
        keys = read_keys(self._directory)
        own = self._signer.verifier
        if keys:
            self._require_own(keys)
        found = read_checkpoint(self._directory, keys or (own,), by_signer=True)
        if found is None and (any(self._directory.glob("journal/[0-9]*")) or (self._directory / "tile").exists()):
            raise LogDamaged(f"{CHECKPOINT} and {_COPY} are both missing, and the log has entries")
        if not keys and found is not None:
            raise NoteError(f"{KEYS}: it is missing, and the log has a checkpoint")
        if found is None:
            content = self._encoded(self._signed(Checkpoint(self.origin, 0, EMPTY)))
            if not keys:
                write_file(self._directory / KEYS, f"{own}\n".encode())
            self._write(content)

    def _require_own(self, keys: tuple[Verifier, ...]) -> None:
        if keys[-1:] != (self._signer.verifier,):
            name = f"{keys[-1].name}+{keys[-1].identifier.hex()}" if keys else "none"
            raise NoteError(f"this log is signed by another key ({name})")

    def rotate(self, signer: Signer) -> None:
        """Another key signs from now on, and once more for what the old one has signed for.

        Raises NoteError where the new key has another name; OSError.
        """
        new = signer.verifier
        if new.name != self.origin:
            raise NoteError(f"the new key must have the name of the log, {self.origin}")
        keys = read_keys(self._directory)
        now = read_checkpoint(self._directory, keys, by_signer=True)
        text, signatures = (now[1].text, now[1].signatures) if now else (Checkpoint(new.name, 0, EMPTY).text(), ())
        content = Note(text, (*signatures, sign(text, signer))).encode()
        open_checkpoint(content, new)
        self._signer = signer
        lines = "".join(f"{key}\n" for key in (*keys, new))
        write_file(self._directory / KEYS, lines.encode())
        self._write(content)

    def read(self) -> Checkpoint:
        """The newest one; that of the empty tree where there is none. Raises NoteError or LogDamaged."""
        found = read_checkpoint(self._directory, read_keys(self._directory), by_signer=True)
        return found[0] if found else Checkpoint(self.origin, 0, EMPTY)

    def advance(self, old: Checkpoint, size: int) -> Checkpoint:
        """Signs for the tree of ``size`` entries, of which the tiles are there, if it continues the old one.

        Raises LogDamaged where it does not, and NoteError where another key signs by now: nothing is signed then.
        OSError.
        """
        self._require_own(read_keys(self._directory))

        def subtree(level: int, number: int) -> bytes:
            return self._tiles.subtree(size, level, number)

        root = root_hash(size, subtree)
        try:
            check_consistency(consistency_proof(old.size, size, subtree), old.size, size, old.root, root)
        except ProofError as error:
            raise LogDamaged(f"the tiles do not continue the tree of {old.size} that was signed: {error}") from None
        new = Checkpoint(self.origin, size, root)
        self._write(self._encoded(self._signed(new)))
        return new

    def _signed(self, checkpoint: Checkpoint) -> Note:
        text = checkpoint.text()
        return Note(text, (sign(text, self._signer),))

    def _encoded(self, note: Note) -> bytes:
        """Raises NoteError for what would not be read again, such as a signature of a device that is wrong."""
        content = note.encode()
        open_checkpoint(content, self._signer.verifier)
        return content

    def add(self, size: int, signatures: tuple[Signature, ...]) -> None:
        """Adds cosignatures to the checkpoint of that size, if it still is the newest. Raises NoteError; OSError."""
        found = read_checkpoint(self._directory, read_keys(self._directory), by_signer=True)
        if found is not None and found[0].size == size:
            kept = [
                each
                for each in found[1].signatures
                if all((each.name, each.identifier) != (new.name, new.identifier) for new in signatures)
            ]
            self._write(self._encoded(Note(found[1].text, (*kept, *signatures))))

    def _write(self, content: bytes) -> None:
        write_file(self._directory / _COPY, content)
        write_file(self._directory / CHECKPOINT, content, durable=False)

    def publish(self) -> None:
        """Makes the file for others what the journal's copy is, where a crash or somebody came between. OSError."""
        found = read_checkpoint(self._directory, read_keys(self._directory), by_signer=True)
        if found is not None:
            content = found[1].encode()
            for name in (_COPY, CHECKPOINT):
                with suppress(NoteError):
                    if _read(self._directory / name) == content:
                        continue
                write_file(self._directory / name, content)
