"""Signed notes (C2SP signed-note) and what is written in ours: checkpoints (tlog-checkpoint) and cosignatures.

A note is text, an empty line, and signature lines. A key has a name and an identifier of four bytes; signatures by keys
that one does not know are passed over, and a signature by a known key that is wrong makes the note invalid.
"""

from __future__ import annotations

import base64
import binascii
import os
import time
from collections.abc import Iterable
from dataclasses import dataclass
from enum import IntEnum
from hashlib import sha256
from typing import Protocol

from corral.errors import CorralError
from corral.log.merkle import HASH_SIZE

MAX_NOTE = 64 * 1024
"""Bytes of the longest note that is read."""
MAX_SIGNATURES = 100
MAX_SIZE = 2**63 - 1
_DASH = "\u2014 "
_KEY_SIZE = 32


class NoteError(CorralError):
    """A note, a key or a checkpoint is not what it must be, or is not signed as it must be."""


class KeyType(IntEnum):
    """How a key signs (signed-note, "signature types")."""

    ED25519 = 1
    COSIGNATURE = 4
    """Ed25519 over the time and the note (tlog-cosignature, version 1)."""


@dataclass(frozen=True, slots=True)
class Signature:
    """One signature line: the key's name and identifier, and the bytes after them."""

    name: str
    identifier: bytes
    content: bytes

    def line(self) -> str:
        """With its newline."""
        return f"{_DASH}{self.name} {base64.b64encode(self.identifier + self.content).decode()}\n"


@dataclass(frozen=True, slots=True)
class Note:
    """``text`` ends with a newline and is what was signed."""

    text: str
    signatures: tuple[Signature, ...]

    def encode(self) -> bytes:
        return f"{self.text}\n{''.join(each.line() for each in self.signatures)}".encode()


@dataclass(frozen=True, slots=True)
class Verifier:
    """The public half of a key. ``str`` of it is the form in which it is given to others (a "vkey")."""

    name: str
    type: KeyType
    key: bytes

    @property
    def identifier(self) -> bytes:
        return _identifier(self.name, self.type, self.key)

    def __str__(self) -> str:
        encoded = base64.b64encode(bytes([self.type]) + self.key).decode()
        return f"{self.name}+{self.identifier.hex()}+{encoded}"

    def signed(self, note: Note) -> bool:
        """Whether the note carries a signature of this key. Raises NoteError for one that is not valid."""
        own = [each for each in note.signatures if (each.name, each.identifier) == (self.name, self.identifier)]
        for signature in own:
            self._check(note.text, signature.content)
        return bool(own)

    def cosigned_at(self, note: Note) -> int | None:
        """The time of the newest cosignature by this key, in seconds since the epoch, or None. Raises NoteError."""
        if self.type is not KeyType.COSIGNATURE or not self.signed(note):
            return None
        own = (each for each in note.signatures if (each.name, each.identifier) == (self.name, self.identifier))
        return max(int.from_bytes(each.content[:8], "big") for each in own)

    def _check(self, text: str, content: bytes) -> None:
        from cryptography.exceptions import InvalidSignature
        from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PublicKey

        message = text.encode()
        if self.type is KeyType.COSIGNATURE:
            seconds = int.from_bytes(content[:8], "big")
            if seconds > MAX_SIZE:
                raise NoteError(f"the cosignature of {self.name} has no time")
            message, content = _cosigned(seconds, message), content[8:]
        try:
            Ed25519PublicKey.from_public_bytes(self.key).verify(content, message)
        except (InvalidSignature, ValueError):
            raise NoteError(f"the signature of {self.name} is not valid: what it stands under was changed") from None


class Signer(Protocol):
    """What signs. A key in a file, or one that never leaves its device (PKCS#11, a cloud's service)."""

    @property
    def verifier(self) -> Verifier: ...

    def sign(self, message: bytes) -> bytes:
        """The Ed25519 signature of a message. Raises NoteError where it cannot be made."""
        ...


class KeyFile:
    """A key that lies in a file, as one line in the form of Go's x/mod/sumdb/note (``PRIVATE+KEY+...``)."""

    def __init__(self, name: str, type: KeyType, seed: bytes) -> None:
        """``seed`` is 32 bytes. Raises NoteError for a name that no key can have."""
        from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey

        _require_name(name)
        self._private = Ed25519PrivateKey.from_private_bytes(seed)
        self._seed = seed
        self._verifier = Verifier(name, type, self._private.public_key().public_bytes_raw())

    @classmethod
    def make(
        cls, path: str | os.PathLike[str], name: str, type: KeyType = KeyType.ED25519, *, exist_ok: bool = False
    ) -> KeyFile:
        """A new key in a new file that only its owner can read, and that is whole from the moment that it is there.

        Raises NoteError, also where the file exists; with ``exist_ok`` that is read then.
        """
        made = cls(name, type, os.urandom(_KEY_SIZE))
        identifier = made.verifier.identifier.hex()
        encoded = base64.b64encode(bytes([type]) + made._seed).decode()
        try:
            write_private(path, f"PRIVATE+KEY+{name}+{identifier}+{encoded}\n")
        except FileExists:
            if exist_ok:
                return cls.read(path)
            raise
        return made

    @classmethod
    def read(cls, path: str | os.PathLike[str]) -> KeyFile:
        """Raises NoteError where it cannot be read, is no key, or others than its owner can read it."""
        where = os.fspath(path)
        text = read_private(path)
        word, _, rest = text.strip().partition("+KEY+")
        name, identifier, encoded = _key_parts(rest, where)
        type, seed = _key_material(encoded, where)
        made = cls(name, type, seed)
        if word != "PRIVATE" or identifier != made.verifier.identifier:
            raise NoteError(f"{where}: it is no private key, or was altered")
        return made

    @property
    def verifier(self) -> Verifier:
        return self._verifier

    def sign(self, message: bytes) -> bytes:
        return self._private.sign(message)


class FileExists(NoteError):
    """The file of a new key is there already."""


def write_private(path: str | os.PathLike[str], line: str) -> None:
    """Makes a file that only its owner can read, and that is whole from the moment that it is there, durably: a log
    whose key is gone could not be written any more. Raises NoteError; FileExists where it is there."""
    where = os.fspath(path)
    temporary = f"{where}.{os.getpid()}"
    try:
        fd = os.open(temporary, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC | os.O_NOFOLLOW, 0o600)
        try:
            with open(fd, "w", encoding="ascii") as file:
                file.write(line)
                file.flush()
                os.fsync(fd)
            os.link(temporary, path)
        finally:
            os.unlink(temporary)
        directory = os.open(os.path.dirname(os.path.abspath(path)), os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
        try:
            os.fsync(directory)
        finally:
            os.close(directory)
    except FileExistsError as error:
        raise FileExists(f"{where}: cannot make the key: {error.strerror}") from None
    except OSError as error:
        raise NoteError(f"{where}: cannot make the key: {error.strerror}") from None


def read_private(path: str | os.PathLike[str]) -> str:
    """What stands in a file that only its owner, who is the caller, can read. Raises NoteError, also where it is
    not that."""
    where = os.fspath(path)
    try:
        with open(os.open(path, os.O_RDONLY | os.O_CLOEXEC | os.O_NOFOLLOW), encoding="ascii") as file:
            status = os.fstat(file.fileno())
            text = file.read(MAX_NOTE)
    except (OSError, UnicodeDecodeError) as error:
        reason = error.strerror if isinstance(error, OSError) else "it is no text"
        raise NoteError(f"{where}: cannot read the key: {reason}") from None
    if status.st_mode & 0o077 or status.st_uid != os.geteuid():
        raise NoteError(f"{where}: others can read this key, or own it; make it yours, mode 0600, or make a new one")
    return text


def sign(text: str, signer: Signer) -> Signature:
    """A signature of a log. ``text`` ends with a newline. Raises NoteError for the key of a witness."""
    own = signer.verifier
    _require_type(own, KeyType.ED25519)
    return Signature(own.name, own.identifier, signer.sign(text.encode()))


def cosign(text: str, signer: Signer, *, at: int | None = None) -> Signature:
    """A signature of a witness, that it saw nothing at ``at`` (now, in seconds since the epoch) that contradicts it.

    Raises NoteError for a key of another type."""
    seconds = int(time.time()) if at is None else at
    own = signer.verifier
    _require_type(own, KeyType.COSIGNATURE)
    content = seconds.to_bytes(8, "big") + signer.sign(_cosigned(seconds, text.encode()))
    return Signature(own.name, own.identifier, content)


def parse_note(encoded: bytes) -> Note:
    """Raises NoteError for what is no note. Whose signatures are worth something, :meth:`Verifier.signed` says."""
    if len(encoded) > MAX_NOTE:
        raise NoteError("the note is too long")
    try:
        whole = encoded.decode()
    except UnicodeDecodeError:
        raise NoteError("the note is no UTF-8") from None
    if any((character < " " and character != "\n") or character == "\x7f" for character in whole):
        raise NoteError("the note has control characters")
    text, separator, lines = whole.rpartition("\n\n")
    if not separator or not lines.endswith("\n"):
        raise NoteError("the note has no signatures, or is cut off")
    signatures = parse_signatures(lines)
    if not signatures:
        raise NoteError("the note has no signatures")
    return Note(text + "\n", signatures)


def parse_signatures(lines: str) -> tuple[Signature, ...]:
    """The signatures of lines that all end with a newline. Raises NoteError."""
    found: list[Signature] = []
    for line in lines.split("\n")[:-1]:
        name, space, encoded = line.removeprefix(_DASH).partition(" ")
        content = decode_base64(encoded, "a signature")
        if not line.startswith(_DASH) or not space or len(content) < 5 or len(found) == MAX_SIGNATURES:
            raise NoteError("a line of the note is no signature, or there are too many")
        _require_name(name)
        found.append(Signature(name, content[:4], content[4:]))
    return tuple(found)


def parse_verifier(text: str) -> Verifier:
    """A key in the form that ``str`` of a Verifier has. Raises NoteError."""
    name, identifier, encoded = _key_parts(text.strip(), "verifier key")
    type, key = _key_material(encoded, "verifier key")
    verifier = Verifier(name, type, key)
    if verifier.identifier != identifier:
        raise NoteError(f"verifier key of {name}: it was altered; its identifier is another")
    return verifier


# ---- checkpoints ----


@dataclass(frozen=True, slots=True)
class Checkpoint:
    """What a log commits itself to: with so many entries its tree has this root."""

    origin: str
    size: int
    root: bytes

    def text(self) -> str:
        return f"{self.origin}\n{self.size}\n{base64.b64encode(self.root).decode()}\n"


def parse_checkpoint(text: str) -> Checkpoint:
    """The checkpoint in a note's text; extension lines are passed over. Raises NoteError."""
    lines = text.split("\n")
    if len(lines) < 4 or lines[-1] or not lines[0] or not all(lines[:-1]):
        raise NoteError("it is no checkpoint: lines are missing")
    root = decode_base64(lines[2], "the root of a checkpoint")
    if len(root) != HASH_SIZE:
        raise NoteError("it is no checkpoint: its root is no hash")
    return Checkpoint(lines[0], parse_number(lines[1], "the size of a checkpoint"), root)


def parse_number(text: str, what: str) -> int:
    """A decimal number without leading zeroes. Raises NoteError."""
    if not (text.isascii() and text.isdigit()) or len(text) > 19 or (text[0] == "0" and text != "0"):
        raise NoteError(f"{what} is no number")
    number = int(text)
    if number > MAX_SIZE:
        raise NoteError(f"{what} is too large")
    return number


def open_checkpoint(encoded: bytes, verifier: Verifier) -> tuple[Checkpoint, Note]:
    """The checkpoint of a note that the log signed. Raises NoteError, also where it is one of another log."""
    note = parse_note(encoded)
    checkpoint = parse_checkpoint(note.text)
    _require_type(verifier, KeyType.ED25519)
    if checkpoint.origin != verifier.name:
        raise NoteError("it is a checkpoint of another log")
    if not verifier.signed(note):
        raise NoteError(f"it is not signed by the key of {verifier.name}")
    return checkpoint, note


def cosigners(note: Note, witnesses: Iterable[Verifier]) -> tuple[Verifier, ...]:
    """Those of the witnesses whose cosignature the note carries. Raises NoteError for one that is not valid."""
    return tuple(each for each in witnesses if each.type is KeyType.COSIGNATURE and each.signed(note))


# ---- parts of the format ----


def _cosigned(seconds: int, text: bytes) -> bytes:
    return b"cosignature/v1\ntime %d\n%s" % (seconds, text)


def _identifier(name: str, type: KeyType, key: bytes) -> bytes:
    return sha256(name.encode() + b"\n" + bytes([type]) + key).digest()[:4]


def _require_type(key: Verifier, type: KeyType) -> None:
    if key.type is not type:
        raise NoteError(f"the key of {key.name} is of type {key.type}, and this takes one of type {type}")


def _require_name(name: str) -> None:
    if not name or "+" in name or len(name) > 255 or not name.isprintable() or any(map(str.isspace, name)):
        raise NoteError("the name of a key has no spaces, no `+` and no control characters, and is not empty")


def _key_parts(text: str, where: str) -> tuple[str, bytes, str]:
    name, first, rest = text.partition("+")
    identifier, second, encoded = rest.partition("+")
    if not first or not second or len(identifier) != 8:
        raise NoteError(f"{where}: it is no key (NAME+IDENTIFIER+KEY)")
    _require_name(name)
    try:
        return name, bytes.fromhex(identifier), encoded
    except ValueError:
        raise NoteError(f"{where}: its identifier is not hexadecimal") from None


def _key_material(encoded: str, where: str) -> tuple[KeyType, bytes]:
    material = decode_base64(encoded, where)
    if len(material) != 1 + _KEY_SIZE or material[0] not in set(KeyType):
        raise NoteError(f"{where}: it is of a type that is not known here (Ed25519 is)")
    return KeyType(material[0]), material[1:]


def decode_base64(text: str, what: str) -> bytes:
    """Raises NoteError for what is not exactly how base64 writes something."""
    try:
        decoded = base64.b64decode(text, validate=True)
    except (binascii.Error, ValueError):
        raise NoteError(f"{what} is not base64") from None
    if base64.b64encode(decoded).decode() != text:
        raise NoteError(f"{what} is not in the one form that base64 has")
    return decoded
