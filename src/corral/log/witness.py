"""A witness: cosigns checkpoints that continue what it has seen, and nothing else (C2SP tlog-witness).

Whoever trusts it need not trust the log's owner not to have rewritten the log, nor to show everybody the same one. It
remembers of each log the newest checkpoint that it has cosigned. What contradicts that, under a valid signature, proves
that the owner has signed two histories: both notes are kept.

Here is what it decides and remembers; :mod:`corral.log.witness_server` is how it is reached.
"""

from __future__ import annotations

import base64
import fcntl
import os
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from hashlib import sha256
from pathlib import Path

from corral.errors import CorralError
from corral.log.merkle import MAX_PROOF, ProofError, check_consistency
from corral.log.note import (
    MAX_NOTE,
    Checkpoint,
    KeyType,
    Note,
    NoteError,
    Signer,
    Verifier,
    cosign,
    decode_base64,
    open_checkpoint,
    parse_checkpoint,
    parse_note,
    parse_number,
)
from corral.log.tiles import make_directory, read_file, write_file

MAX_REQUEST = MAX_NOTE + 32 + (MAX_PROOF + 1) * 48
"""Bytes of the longest request that is read."""
MAX_EVIDENCE = 100
"""Contradictions that are kept."""
_TEXT = "text/plain; charset=utf-8"
_SIZE = "text/x.tlog.size"


class WitnessError(CorralError):
    """A witness cannot do its work: what it remembers cannot be read or written. It cosigns nothing then."""


@dataclass(frozen=True, slots=True)
class Answer:
    """What a witness says to a request."""

    status: int
    """Of HTTP, as tlog-witness has it."""
    content: str
    content_type: str = _TEXT


@dataclass(frozen=True, slots=True)
class _Request:
    old: int
    proof: tuple[bytes, ...]
    note: bytes


class Witness:
    """Of several logs. May be used from several threads, and processes, at once."""

    def __init__(self, directory: Path, signer: Signer, logs: Mapping[str, tuple[Verifier, ...]]) -> None:
        """``directory`` is what it remembers; ``logs`` are the keys of the logs that it knows, by their origin.

        Raises NoteError for a key that cannot cosign, or that signs for a log itself; WitnessError.
        """
        own = signer.verifier
        if own.type is not KeyType.COSIGNATURE:
            raise NoteError(f"{own.name} is no key of a witness; `corral log key --witness` makes one")
        if any(key.key == own.key for keys in logs.values() for key in keys):
            raise NoteError(f"{own.name} is the key of a log that it would cosign: that proves nothing")
        self._directory, self._signer, self._logs = directory, signer, dict(logs)
        try:
            make_directory(directory / "evidence", 0o700)
        except OSError as error:
            raise WitnessError(f"{directory}: cannot make it: {error.strerror}") from None

    @property
    def verifier(self) -> Verifier:
        """Its public half, for those who are to trust it."""
        return self._signer.verifier

    def add_checkpoint(self, body: bytes) -> Answer:
        """Answers a request (``add-checkpoint``): with a cosignature, once that it was given is remembered."""
        try:
            request = _parse_request(body)
            checkpoint = parse_checkpoint(parse_note(request.note).text)
        except NoteError as error:
            return Answer(400, f"{error}\n")
        keys = self._logs.get(checkpoint.origin)
        if keys is None:
            return Answer(404, "this log is not known here\n")
        try:
            note = _signed(request.note, keys)
        except NoteError as error:
            return Answer(403, f"{error}\n")
        if request.old > checkpoint.size:
            return Answer(400, "the old size is above that of the checkpoint\n")
        try:
            with self._locked():
                return self._judge(request, checkpoint, note)
        except (OSError, NoteError, WitnessError) as error:
            what = error.strerror if isinstance(error, OSError) else str(error)
            return Answer(500, f"nothing is cosigned: {what}\n")

    def evidence(self) -> Iterator[tuple[bytes, bytes]]:
        """Pairs of notes that contradict each other, each signed by the log's key. Raises WitnessError."""
        try:
            for path in sorted((self._directory / "evidence").iterdir()):
                old, _, new = read_file(path, 2 * MAX_NOTE + 1).partition(b"\0")
                yield old, new
        except OSError as error:
            raise WitnessError(f"the evidence cannot be read: {error.strerror}") from None

    # ---- what it remembers ----

    @contextmanager
    def _locked(self) -> Iterator[None]:
        fd = os.open(self._directory / "lock", os.O_RDWR | os.O_CREAT | os.O_CLOEXEC | os.O_NOFOLLOW, 0o600)
        try:
            fcntl.flock(fd, fcntl.LOCK_EX)
            yield
        finally:
            os.close(fd)

    def _place(self, origin: str) -> Path:
        return self._directory / sha256(origin.encode()).hexdigest()

    def _last(self, origin: str) -> tuple[Checkpoint, bytes] | None:
        """What was cosigned last, with its note. Raises WitnessError where that cannot be known any more."""
        try:
            content = read_file(self._place(origin), MAX_NOTE + 1)
        except FileNotFoundError:
            return None
        try:
            note = _signed(content, self._logs[origin])
            return parse_checkpoint(note.text), content
        except NoteError as error:
            raise WitnessError(f"what is remembered of {origin} was damaged: {error}") from None

    def _judge(self, request: _Request, checkpoint: Checkpoint, note: Note) -> Answer:
        last = self._last(checkpoint.origin)
        size = last[0].size if last else 0
        if last is not None and checkpoint.size == size and checkpoint.root != last[0].root:
            self._keep(last[1], request.note)
            return Answer(409, f"{size}\n", _SIZE)
        if request.old != size:
            return Answer(409, f"{size}\n", _SIZE)
        if last is not None:
            try:
                check_consistency(request.proof, size, checkpoint.size, last[0].root, checkpoint.root)
            except ProofError as error:
                self._keep(last[1], request.note)
                return Answer(422, f"{error}\n")
        elif request.proof:
            return Answer(422, "nothing was cosigned before: there is nothing to be proven\n")
        if last is None or checkpoint.size > size:
            write_file(self._place(checkpoint.origin), note.encode(), mode=0o600)
        return Answer(200, cosign(note.text, self._signer).line())

    def _keep(self, old: bytes, new: bytes) -> None:
        directory = self._directory / "evidence"
        path = directory / sha256(old + b"\0" + new).hexdigest()
        if not path.exists() and len(os.listdir(directory)) < MAX_EVIDENCE:
            write_file(path, old + b"\0" + new, mode=0o600)


def _signed(encoded: bytes, keys: tuple[Verifier, ...]) -> Note:
    problem = NoteError("no key of this log is known")
    for key in keys:
        try:
            return open_checkpoint(encoded, key)[1]
        except NoteError as error:
            problem = error
    raise problem


def _parse_request(body: bytes) -> _Request:
    if len(body) > MAX_REQUEST:
        raise NoteError("the request is too long")
    head, separator, note = body.partition(b"\n\n")
    try:
        lines = head.decode("ascii").split("\n")
    except UnicodeDecodeError:
        raise NoteError("the request is no text") from None
    if not separator or not lines[0].startswith("old ") or len(lines) > 1 + MAX_PROOF:
        raise NoteError("the request is not one of tlog-witness")
    proof = tuple(decode_base64(line, "a hash of the proof") for line in lines[1:])
    return _Request(parse_number(lines[0].removeprefix("old "), "the old size"), proof, note)


def encode_request(old: int, proof: tuple[bytes, ...], note: bytes) -> bytes:
    """The body of a request for a cosignature."""
    lines = [f"old {old}", *(base64.b64encode(each).decode() for each in proof)]
    return "\n".join(lines).encode() + b"\n\n" + note
