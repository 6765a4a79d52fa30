"""Has witnesses cosign the newest checkpoint of a log, and says how many did (C2SP tlog-witness, the log's side)."""

from __future__ import annotations

import threading
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from dataclasses import dataclass
from http.client import HTTPConnection, HTTPException, HTTPSConnection
from pathlib import Path
from socket import SHUT_RDWR
from urllib.parse import urlsplit

from corral.errors import RequestError
from corral.log.merkle import consistency_proof
from corral.log.note import (
    Checkpoint,
    KeyType,
    Note,
    NoteError,
    Signature,
    Verifier,
    cosigners,
    parse_number,
    parse_signatures,
    parse_verifier,
)
from corral.log.signing import read_checkpoint, read_keys
from corral.log.tiles import LogDamaged, Tiles
from corral.log.witness import encode_request
from corral.log.writer import Log

TIMEOUT = 10.0
"""Seconds for which a witness may be silent."""
TOTAL = 30.0
"""Seconds for which it may take to answer."""
_MAX_ANSWER = 64 * 1024
_TRIES = 3


@dataclass(frozen=True, slots=True)
class WitnessAddress:
    """Where a witness is, and how its cosignatures are known."""

    url: str
    """Its submission prefix, such as ``https://witness.example``."""
    verifier: Verifier


@dataclass(frozen=True, slots=True)
class Outcome:
    """What came of asking one witness: a cosignature, or why there is none."""

    witness: str
    signature: Signature | None = None
    problem: str = ""


def parse_address(text: str) -> WitnessAddress:
    """An address that is written as ``URL=KEY``. Raises RequestError, or NoteError."""
    url, separator, key = text.partition("=")
    parts = urlsplit(url)
    if not separator or parts.scheme not in ("http", "https") or not parts.hostname or parts.query or parts.fragment:
        raise RequestError("a witness is written as URL=KEY, such as https://witness.example=witness.example+...")
    verifier = parse_verifier(key)
    if verifier.type is not KeyType.COSIGNATURE:
        raise NoteError(f"{verifier.name} is no key of a witness")
    return WitnessAddress(url.rstrip("/"), verifier)


def cosign_log(log: Log, witnesses: Sequence[WitnessAddress]) -> tuple[Outcome, ...]:
    """Signs for what is durable, asks all witnesses at once, and adds the cosignatures that are valid.

    A witness that is away, slow, or lies holds up nobody for longer than its time. Raises LogUnwritable, LogDamaged.
    """
    log.seal()
    found = read_checkpoint(log.directory, read_keys(log.directory))
    if found is None or not witnesses:
        return ()
    checkpoint, note = found
    with ThreadPoolExecutor(max_workers=min(16, len(witnesses))) as threads:
        outcomes = tuple(threads.map(lambda each: _ask(log.directory, checkpoint, note, each), witnesses))
    signatures = tuple(each.signature for each in outcomes if each.signature is not None)
    if signatures:
        log.cosign(checkpoint.size, signatures)
    return outcomes


def require_cosigned(
    directory: Path, keys: tuple[Verifier, ...], witnesses: Sequence[Verifier], quorum: int
) -> Checkpoint:
    """The newest checkpoint, if so many of the witnesses have cosigned it. Raises NoteError, or LogDamaged."""
    found = read_checkpoint(directory, keys)
    if found is None:
        raise NoteError("the log has no checkpoint")
    cosigned = {each.key for each in cosigners(found[1], witnesses)}
    if len(cosigned) < quorum:
        raise NoteError(f"{len(cosigned)} of the witnesses have cosigned the newest checkpoint; {quorum} must")
    return found[0]


def _ask(directory: Path, checkpoint: Checkpoint, note: Note, witness: WitnessAddress) -> Outcome:
    name = witness.verifier.name
    tiles, size, old = Tiles(directory), checkpoint.size, 0
    try:
        for _ in range(_TRIES):
            proof = consistency_proof(old, size, lambda level, number: tiles.subtree(size, level, number))
            status, kind, content = _post(witness.url, encode_request(old, tuple(proof), note.encode()))
            if status == 200:
                return Outcome(name, _own(note, content, witness.verifier))
            if status != 409 or kind != "text/x.tlog.size":
                return Outcome(name, problem=f"it refuses ({status})")
            known = parse_number(content.decode("ascii").removesuffix("\n"), "the size that the witness knows")
            if known > size:
                return Outcome(name, problem=f"it has seen {known} entries, and there are only {size}: a rollback")
            if known == old == size:
                return Outcome(name, problem=f"it has seen another tree of {size} entries: a split view")
            old = known
    except (OSError, HTTPException) as error:
        return Outcome(name, problem=f"it cannot be reached ({type(error).__name__})")
    except (NoteError, LogDamaged, UnicodeDecodeError, ValueError) as error:
        return Outcome(name, problem=str(error))
    return Outcome(name, problem="it has seen a newer checkpoint each time")


def _own(note: Note, content: bytes, verifier: Verifier) -> Signature:
    """The witness' own valid cosignature among the lines of its answer. Raises NoteError."""
    for signature in parse_signatures(content.decode()):
        alone = Note(note.text, (signature,))
        if verifier.cosigned_at(alone) is not None:
            return signature
    raise NoteError("its answer holds no cosignature of its own")


def _post(url: str, body: bytes) -> tuple[int, str, bytes]:
    parts = urlsplit(url)
    kind = HTTPSConnection if parts.scheme == "https" else HTTPConnection
    connection = kind(parts.hostname or "", parts.port, timeout=TIMEOUT)
    end = threading.Timer(TOTAL, _hang_up, (connection,))  # a byte now and then is no answer
    end.daemon = True
    end.start()
    try:
        headers = {"Content-Type": "text/plain; charset=utf-8"}
        connection.request("POST", f"{parts.path.rstrip('/')}/add-checkpoint", body, headers)
        response = connection.getresponse()
        content = response.read(_MAX_ANSWER + 1)
        if len(content) > _MAX_ANSWER:
            raise NoteError("its answer is too long")
        return response.status, response.headers.get_content_type(), content
    finally:
        end.cancel()
        connection.close()


def _hang_up(connection: HTTPConnection) -> None:
    if connection.sock is not None:
        with suppress(OSError):
            connection.sock.shutdown(SHUT_RDWR)
