"""Content that is too large for a record, or that must be erasable: kept beside a log, which holds its salted digest.

A digest of content that can be guessed would still say what it was after it is erased. So each has a salt of its own,
which lies with it and is erased with it: what is left in the log is HMAC-SHA-256 (RFC 2104) under a key that nobody
has. The log stays as it was signed, and says who erased it and why.

One file holds one payload: a line of what it is, then salt and content, compressed (zstd, RFC 8878), and encrypted
where the store has a key (AES-256-GCM, NIST SP 800-38D; the line and the digest are its associated data). The digest
covers the line too.

A payload that repeats most of another one may hold only what is new (``Shared``): its line names that one, and how much
of it comes before and behind.
"""

from __future__ import annotations

import hashlib
import hmac
import json
import os
import re
import secrets
import time
from collections.abc import Callable, Iterator
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

import rfc8785
import zstandard
from cryptography.exceptions import InvalidTag
from cryptography.hazmat.primitives.ciphers.aead import AESGCM

from corral.actions import Content
from corral.diskspace import spare_bytes
from corral.log.payload_keys import PayloadError, is_marked, read_key
from corral.log.tiles import make_directory, read_file, sync_directory, write_file

MAX_PAYLOAD = 64 << 20
"""Bytes of one content."""
_MAX_FILE = MAX_PAYLOAD + (1 << 20)
_MAX_LINE = 1024
MAX_CHAIN = 64
"""Payloads of which each builds on the one before."""
_FORMAT = "corral.payload.1"
_SHARING = "corral.payload.2"
"""The format of one that builds on another."""
_PREFIX = "hmac-sha256:"
_DIGEST = re.compile(rf"{_PREFIX}[0-9a-f]{{64}}", re.ASCII)
_SALT = 32
_NONCE = 12
_LEVEL = 3
_PIECE = 1024
"""Bytes; they become at most 32 MiB."""
_TEMPORARY = re.compile(r"\.[0-9a-f]{64}\.[0-9]+", re.ASCII)
"""What a writer leaves that was killed (:func:`corral.log.tiles.write_file`)."""
_ABANDONED = 3600
"""Seconds after which no writer is at it any more."""


class PayloadMissing(PayloadError):
    """There is no such payload, any more or ever."""


@dataclass(frozen=True, slots=True)
class Shared:
    """What the content of a payload has in common with that of another, and is not kept again."""

    base: str
    """The digest of the other."""
    prefix: int
    """Bytes of that with which it begins."""
    suffix: int
    """Bytes of that with which it ends."""


@dataclass(frozen=True, slots=True)
class Payload:
    """One that lies in a store."""

    digest: str
    content: Content
    expires: int
    """Seconds since the epoch, from when on it need not be kept."""
    encrypted: bool
    shared: Shared | None = None


class Payloads:
    """The payloads of one log. Used from several threads."""

    def __init__(self, directory: Path, key: Path | None = None) -> None:
        """``key`` is the file of its key, which need not be there; it is read each time, so that all who write begin
        to encrypt when it is made."""
        self.directory = directory
        self._key = key

    def _cipher(self) -> AESGCM | None:
        """Raises PayloadError where the key cannot be used."""
        key = read_key(self._key) if self._key is not None else None
        return AESGCM(key) if key is not None else None

    # ---- keeping ----

    def keep(self, content: Content, data: bytes, *, expires: int, shared: Shared | None = None) -> Payload:
        """Keeps content for good; where it is ``shared``, ``data`` is what lies between.

        Raises PayloadError where that cannot be done, or not as secretly as is wanted.
        """
        if len(data) > MAX_PAYLOAD:
            raise PayloadError(f"{len(data)} bytes of content are more than the {MAX_PAYLOAD} that can be kept")
        cipher = self._cipher()
        if cipher is None and is_marked(self.directory):
            raise PayloadError(
                f"{self.directory}: it is to be encrypted, and its key is not here; bring {self._key} back"
            )
        salt = secrets.token_bytes(_SALT)
        about = {"format": _FORMAT, "content": content.value, "expires": expires, "encrypted": cipher is not None}
        if shared is not None:
            about |= {"format": _SHARING, "base": shared.base, "prefix": shared.prefix, "suffix": shared.suffix}
        line = rfc8785.dumps(about)
        digest = _digest(salt, line, data)
        body = salt + zstandard.ZstdCompressor(level=_LEVEL).compress(data)
        if cipher is not None:
            nonce = secrets.token_bytes(_NONCE)
            body = nonce + cipher.encrypt(nonce, body, _bound(line, digest))
        path = self._path(digest)
        try:
            # What lies in it is for its owner only; it itself can be covered where others see what is around it.
            make_directory(self.directory, mode=0o755)
            make_directory(path.parent, mode=0o700)
            self._require_space(len(body))
            write_file(path, line + b"\n" + body, mode=0o600)
        except OSError as error:
            raise PayloadError(f"{self.directory}: cannot keep content: {error.strerror}") from None
        return Payload(digest, content, expires, cipher is not None, shared)

    def _require_space(self, size: int) -> None:
        directory = os.open(self.directory, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
        try:
            if spare_bytes(directory) < size:
                raise PayloadError(
                    f"{self.directory}: this would leave its disk with less than 1 GiB or 5 % free; make room there"
                )
        finally:
            os.close(directory)

    # ---- reading ----

    def read(self, digest: str) -> bytes:
        """The content of this digest, which is checked.

        Raises PayloadMissing where it is not there; PayloadError where it is another, or cannot be read.
        """
        pieces: list[tuple[Shared, bytes]] = []
        at = digest
        while True:
            try:
                about, data = self._read(at)
            except PayloadMissing:
                if at == digest:
                    raise
                raise PayloadMissing(f"{digest}: it continues {at}, which is not there") from None
            if data is None:
                raise PayloadError(f"{at}: it is encrypted, and the key of the store is not here")
            if about.shared is None:
                break
            pieces.append((about.shared, data))
            if len(pieces) >= MAX_CHAIN:
                raise PayloadError(f"{digest}: more than {MAX_CHAIN} build on one another")
            at = about.shared.base
        for shared, piece in reversed(pieces):
            data = _joined(data, shared, piece, digest)
        return data

    def check(self, digest: str) -> tuple[Payload, int | None]:
        """What it is, and how many bytes, without those that it shares; None where it is encrypted and the key is not
        here: of such a one nothing is known but that something lies there, and what that says it is. Raises as
        :meth:`read`, but says nothing of what it builds on."""
        about, data = self._read(digest)
        return about, None if data is None else len(data)

    def _read(self, digest: str) -> tuple[Payload, bytes | None]:
        line, body = self._file(digest)
        about = _parse(line, digest)
        if about.encrypted:
            cipher = self._cipher()
            if cipher is None:
                return about, None
            try:
                body = cipher.decrypt(body[:_NONCE], body[_NONCE:], _bound(line, digest))
            except (InvalidTag, ValueError):
                raise PayloadError(f"{digest}: it was altered, or is encrypted with another key") from None
        data = _decompressed(body[_SALT:], digest)
        if not hmac.compare_digest(_digest(body[:_SALT], line, data), digest):
            raise PayloadError(f"{digest}: its content is another")
        return about, data

    def _file(self, digest: str) -> tuple[bytes, bytes]:
        try:
            content = read_file(self._path(digest), _MAX_FILE + 1)
        except FileNotFoundError:
            raise PayloadMissing(f"{digest}: it is not there") from None
        except OSError as error:
            raise PayloadError(f"{digest}: cannot read it: {error.strerror}") from None
        line, newline, body = content.partition(b"\n")
        if len(content) > _MAX_FILE or len(line) > _MAX_LINE or not newline:
            raise PayloadError(f"{digest}: its file is no payload")
        return line, body

    # ---- erasing ----

    def digests(self) -> Iterator[str]:
        """Of all that are there."""
        for path in sorted(self.directory.glob("[0-9a-f][0-9a-f]/*")):
            digest = f"{_PREFIX}{path.name}"
            if _DIGEST.fullmatch(digest):
                yield digest

    def all(self) -> Iterator[Payload]:
        """All that are there, as they say of themselves. What is no payload is passed over; verifying tells of it."""
        for digest in self.digests():
            with suppress(PayloadError):
                yield self.about(digest)

    def about(self, digest: str) -> Payload:
        """What it says of itself. Raises as :meth:`read` where it is no payload."""
        return _parse(self._file(digest)[0], digest)

    def erase(self, digest: str, record: Callable[[], None]) -> None:
        """Removes content and salt, after ``record`` has made durable that it is done.

        Raises PayloadMissing where it is not there, PayloadError where it cannot be removed, and what ``record`` does.
        """
        path = self._path(digest)
        if not os.path.lexists(path):
            raise PayloadMissing(f"{digest}: it is not there")
        record()
        try:
            path.unlink(missing_ok=True)
            sync_directory(path.parent)
        except OSError as error:
            raise PayloadError(f"{digest}: cannot erase it: {error.strerror}") from None

    def sweep(self, now: float | None = None) -> int:
        """Removes what writers have left that were killed, and returns how many. Raises PayloadError."""
        oldest = (time.time() if now is None else now) - _ABANDONED
        count = 0
        try:
            for path in self.directory.glob("[0-9a-f][0-9a-f]/.*"):
                if _TEMPORARY.fullmatch(path.name) and path.lstat().st_mtime < oldest:
                    path.unlink(missing_ok=True)
                    sync_directory(path.parent)
                    count += 1
        except OSError as error:
            raise PayloadError(f"{error.filename}: cannot remove it: {error.strerror}") from None
        return count

    def _path(self, digest: str) -> Path:
        """Raises PayloadError for what is no digest: it is made a path of."""
        if not _DIGEST.fullmatch(digest):
            raise PayloadError(f"{digest!r}: it is no digest ({_PREFIX}, and 64 hexadecimal digits)")
        name = digest.removeprefix(_PREFIX)
        return self.directory / name[:2] / name


# ---- the form of a file ----


def _parse(line: bytes, digest: str) -> Payload:
    try:
        found = json.loads(line)
        if rfc8785.dumps(found) != line:
            raise ValueError
        shared = None
        match found.pop("format"):
            case str(name) if name == _FORMAT:
                pass
            case str(name) if name == _SHARING:
                shared = Shared(found.pop("base"), found.pop("prefix"), found.pop("suffix"))
                if not (_DIGEST.fullmatch(shared.base) and _is_size(shared.prefix) and _is_size(shared.suffix)):
                    raise ValueError
            case _:
                raise ValueError
        about = Payload(digest, Content(found.pop("content")), found.pop("expires"), found.pop("encrypted"), shared)
    except (ValueError, KeyError, AttributeError, TypeError, RecursionError):
        raise PayloadError(f"{digest}: its file is no payload") from None
    if found or type(about.expires) is not int or type(about.encrypted) is not bool:
        raise PayloadError(f"{digest}: its file is no payload")
    return about


def _is_size(value: object) -> bool:
    return type(value) is int and 0 <= value <= MAX_PAYLOAD


def _joined(base: bytes, shared: Shared, piece: bytes, digest: str) -> bytes:
    """Raises PayloadError where the other is not as long as it must be."""
    if shared.prefix + shared.suffix > len(base):
        raise PayloadError(f"{digest}: what it continues is another")
    if shared.prefix + len(piece) + shared.suffix > MAX_PAYLOAD:
        raise PayloadError(f"{digest}: it is too long")
    return base[: shared.prefix] + piece + base[len(base) - shared.suffix :]


def _digest(salt: bytes, line: bytes, data: bytes) -> str:
    """The line has no newline in it, so that no other line and content are the same bytes."""
    mac = hmac.new(salt, line + b"\n", hashlib.sha256)
    mac.update(data)
    return _PREFIX + mac.hexdigest()


def _bound(line: bytes, digest: str) -> bytes:
    return line + b"\n" + digest.encode()


def _decompressed(data: bytes, digest: str) -> bytes:
    """The content of one frame, which says how much it holds.

    It is taken apart in small pieces, since a block of four bytes may stand for 128 KiB, and nothing ties what blocks
    hold to what the frame says (RFC 8878, 3.1.1.2).
    """
    content = bytearray()
    try:
        size = zstandard.get_frame_parameters(data).content_size
        if size > MAX_PAYLOAD:
            raise PayloadError(f"{digest}: it is too long")
        frame = zstandard.ZstdDecompressor().decompressobj()
        for at in range(0, len(data), _PIECE):
            if frame.eof or len(content) > size:
                raise PayloadError(f"{digest}: it was altered")
            content += frame.decompress(data[at : at + _PIECE])
    except zstandard.ZstdError:
        raise PayloadError(f"{digest}: it was altered") from None
    if not frame.eof or frame.unused_data or len(content) != size:
        raise PayloadError(f"{digest}: it was altered")
    return bytes(content)
