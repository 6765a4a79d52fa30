"""Content that is too large for a record, or that must be erasable: kept beside a log, which holds its salted digest.

A digest of content that can be guessed would still say what it was after it is erased. So each has a salt of its own,
which lies with it and is erased with it: what is left in the log is HMAC-SHA-256 (RFC 2104) under a key that nobody
has. The log stays as it was signed, and says who erased it and why.

One file holds one payload: a line of what it is, then salt and content, compressed (zstd, RFC 8878), and encrypted
where the store has a key (AES-256-GCM, NIST SP 800-38D; the line and the digest are its associated data).
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
from corral.errors import CorralError
from corral.log.tiles import make_directory, read_file, sync_directory, write_file

MAX_PAYLOAD = 64 << 20
"""Bytes of one content."""
_MAX_FILE = MAX_PAYLOAD + (1 << 20)
_MAX_LINE = 1024
_FORMAT = "corral.payload.1"
_PREFIX = "hmac-sha256:"
_DIGEST = re.compile(rf"{_PREFIX}[0-9a-f]{{64}}", re.ASCII)
_SALT = 32
_NONCE = 12
_KEY = 32
_LEVEL = 3


class PayloadError(CorralError):
    """A payload is not there, is not what its digest says, or cannot be kept."""


class PayloadMissing(PayloadError):
    """There is no such payload, any more or ever."""


@dataclass(frozen=True, slots=True)
class Payload:
    """One that lies in a store."""

    digest: str
    content: Content
    expires: int
    """Seconds since the epoch, from when on it may be erased by :meth:`Payloads.expired`."""


class Payloads:
    """The payloads of one log. Used from several threads."""

    def __init__(self, directory: Path, key: bytes | None = None) -> None:
        """``key`` is 32 bytes, or None for a store that is not encrypted."""
        self.directory = directory
        self._cipher = AESGCM(key) if key is not None else None

    # ---- keeping ----

    def keep(self, content: Content, data: bytes, *, expires: int) -> str:
        """Keeps content for good, and returns its digest. Raises PayloadError where that cannot be done."""
        if len(data) > MAX_PAYLOAD:
            raise PayloadError(f"{len(data)} bytes of content are more than the {MAX_PAYLOAD} that can be kept")
        salt = secrets.token_bytes(_SALT)
        digest = _digest(salt, data)
        line = rfc8785.dumps(
            {"format": _FORMAT, "content": content.value, "expires": expires, "encrypted": self._cipher is not None}
        )
        body = salt + zstandard.ZstdCompressor(level=_LEVEL).compress(data)
        if self._cipher is not None:
            nonce = secrets.token_bytes(_NONCE)
            body = nonce + self._cipher.encrypt(nonce, body, _bound(line, digest))
        path = self._path(digest)
        try:
            # What lies in it is for its owner only; it itself can be covered where others see what is around it.
            make_directory(self.directory, mode=0o755)
            make_directory(path.parent, mode=0o700)
            self._require_space(len(body))
            write_file(path, line + b"\n" + body, mode=0o600)
        except OSError as error:
            raise PayloadError(f"{self.directory}: cannot keep content: {error.strerror}") from None
        return digest

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
        line, body = self._file(digest)
        about = _parse(line, digest)
        if about.encrypted:
            if self._cipher is None:
                raise PayloadError(f"{digest}: it is encrypted, and the key of the store is not here")
            try:
                body = self._cipher.decrypt(body[:_NONCE], body[_NONCE:], _bound(line, digest))
            except (InvalidTag, ValueError):
                raise PayloadError(f"{digest}: it was altered, or is encrypted with another key") from None
        data = _decompressed(body[_SALT:], digest)
        if not hmac.compare_digest(_digest(body[:_SALT], data), digest):
            raise PayloadError(f"{digest}: its content is another")
        return data

    def check(self, digest: str) -> None:
        """Raises as :meth:`read`; of an encrypted payload without the key only that it is there."""
        line, _ = self._file(digest)
        if self._cipher is not None or not _parse(line, digest).encrypted:
            self.read(digest)

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

    def expired(self, now: float | None = None) -> Iterator[Payload]:
        """Those that need not be kept any longer. What is no payload is passed over; verifying a log tells of it."""
        limit = time.time() if now is None else now
        for payload in self.all():
            if payload.expires <= limit:
                yield payload

    def all(self) -> Iterator[Payload]:
        """All that are there."""
        for path in sorted(self.directory.glob("[0-9a-f][0-9a-f]/*")):
            digest = f"{_PREFIX}{path.name}"
            if _DIGEST.fullmatch(digest):
                with suppress(PayloadError):
                    about = _parse(self._file(digest)[0], digest)
                    yield Payload(digest, about.content, about.expires)

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

    def _path(self, digest: str) -> Path:
        """Raises PayloadError for what is no digest: it is made a path of."""
        if not _DIGEST.fullmatch(digest):
            raise PayloadError(f"{digest!r}: it is no digest ({_PREFIX}, and 64 hexadecimal digits)")
        name = digest.removeprefix(_PREFIX)
        return self.directory / name[:2] / name


# ---- the form of a file ----


@dataclass(frozen=True, slots=True)
class _About:
    content: Content
    expires: int
    encrypted: bool


def _parse(line: bytes, digest: str) -> _About:
    try:
        found = json.loads(line)
        if rfc8785.dumps(found) != line or found.pop("format") != _FORMAT:
            raise ValueError
        about = _About(Content(found.pop("content")), found.pop("expires"), found.pop("encrypted"))
    except (ValueError, KeyError, AttributeError, TypeError, RecursionError):
        raise PayloadError(f"{digest}: its file is no payload") from None
    if found or type(about.expires) is not int or type(about.encrypted) is not bool:
        raise PayloadError(f"{digest}: its file is no payload")
    return about


def _digest(salt: bytes, data: bytes) -> str:
    return _PREFIX + hmac.new(salt, data, hashlib.sha256).hexdigest()


def _bound(line: bytes, digest: str) -> bytes:
    return line + b"\n" + digest.encode()


def _decompressed(data: bytes, digest: str) -> bytes:
    """The first frame says how much it holds, which bounds what is taken into memory."""
    try:
        size = zstandard.get_frame_parameters(data).content_size
        if size > MAX_PAYLOAD:
            raise PayloadError(f"{digest}: it is too long")
        reader = zstandard.ZstdDecompressor().decompressobj()
        content = reader.decompress(data)
    except zstandard.ZstdError:
        raise PayloadError(f"{digest}: it was altered") from None
    if not reader.eof or reader.unused_data or len(content) != size:
        raise PayloadError(f"{digest}: it was altered")
    return content


def read_key(path: Path) -> bytes | None:
    """The key of a store, or None where it has none. Raises PayloadError where others can read it, or it is no key."""
    try:
        descriptor = os.open(path, os.O_RDONLY | os.O_CLOEXEC | os.O_NOFOLLOW | os.O_NONBLOCK)
    except FileNotFoundError:
        return None
    except OSError as error:
        raise PayloadError(f"{path}: cannot read the key: {error.strerror}") from None
    with open(descriptor, "rb") as file:
        status = os.fstat(file.fileno())
        if status.st_mode & 0o077 or status.st_uid != os.geteuid():
            raise PayloadError(f"{path}: others can read this key, or own it; make it yours, mode 0600")
        key = file.read(_KEY + 1)
    if len(key) != _KEY:
        raise PayloadError(f"{path}: it is no key ({_KEY} bytes)")
    return key


def make_key(path: Path) -> None:
    """Has what is kept from now on encrypted. Raises PayloadError, also where there is a key already."""
    temporary = path.with_name(f".{path.name}.{os.getpid()}")
    try:
        descriptor = os.open(temporary, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC | os.O_NOFOLLOW, 0o600)
        try:
            with open(descriptor, "wb") as file:
                file.write(secrets.token_bytes(_KEY))
                file.flush()
                os.fsync(file.fileno())
            os.link(temporary, path)
        finally:
            os.unlink(temporary)
        sync_directory(path.parent)
    except OSError as error:
        raise PayloadError(f"{path}: cannot make the key: {error.strerror}") from None
