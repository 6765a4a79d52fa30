"""Secrets that gateway and brokers put into requests: where they come from, how they go in.

A secret lives in the memory of the controlling process and in requests to the server that it is for. No message, record
or representation holds it. Echoes are taken out of answers by :class:`Scrubber`.
"""

from __future__ import annotations

import base64
import os
import re
import stat
from collections.abc import Mapping
from typing import NoReturn

from corral.credentials.scrubbing import Scrubber, forms
from corral.errors import RequestError
from corral.policy.model import Credential, CredentialKind

__all__ = ["Scrubber", "Secret", "inject", "load", "read_text"]

MAX_FILE = 64 * 1024
"""Bytes read of a file, and of a variable."""
MAX_SECRET = 4 * 1024
"""Bytes. Servers take heads of 8 KiB, and what looks for echoes works as long as a secret is."""
MIN_SECRET = 8
"""Bytes. What is shorter cannot be told from ordinary text where its echoes are looked for."""
DEFAULT_GIT_USER = "x-access-token"

_NAME = re.compile(r"[-!#$%&'*+.^_`|~0-9A-Za-z]+")
_CONTROL = re.compile(rb"[\x00-\x1f\x7f]")
_NOT_OURS = frozenset(
    "host connection content-length transfer-encoding te trailer upgrade expect keep-alive proxy-connection "
    "accept-encoding content-encoding range".split()
)
"""Headers that frame a message or that the gateway sets itself."""


class Secret:
    """One header with its value. Nothing but :func:`inject` and :meth:`scrubber` should need more of it."""

    __slots__ = ("_patterns", "_value", "header")

    def __init__(self, header: bytes, value: bytes, patterns: tuple[bytes, ...]) -> None:
        self.header = header
        """Its name, in lower case."""
        self._value = value
        self._patterns = patterns

    def __repr__(self) -> str:
        return f"Secret({self.header.decode('ascii')}: ...)"

    def __reduce__(self) -> NoReturn:
        raise TypeError("a secret is not written out")

    def scrubber(self) -> Scrubber:
        """For one stream of the server's."""
        return Scrubber(self._patterns)

    def scrubbed(self, data: bytes) -> bytes:
        """A whole value of the server's without echoes."""
        return Scrubber(self._patterns).mask(data)

    def field(self) -> tuple[bytes, bytes]:
        """Name and value as the server gets them."""
        return self.header, self._value


def load(credential: Credential, environment: Mapping[str, str]) -> Secret:
    """Reads the secret that a rule names; ``environment`` is that of the controlling process.

    Raises RequestError: it is not there, too short, too long, or holds what no header can.
    """
    raw = _read(credential.source, environment)
    secret = raw.removesuffix(b"\n").removesuffix(b"\r")

    def wrong(what: str) -> RequestError:
        return RequestError(f"the credential from {credential.source} {what}")

    if len(secret) < MIN_SECRET:
        raise wrong(f"is shorter than {MIN_SECRET} bytes")
    if len(secret) > MAX_SECRET:
        raise wrong(f"is longer than {MAX_SECRET} bytes")
    if _CONTROL.search(secret):
        raise wrong("holds a line break or another control character")
    if secret != secret.strip():
        raise wrong("begins or ends with a space")
    if credential.kind is CredentialKind.BEARER:
        return Secret(b"authorization", b"Bearer " + secret, forms(secret))
    if credential.kind is CredentialKind.HEADER:
        name = credential.header.lower()
        if not _NAME.fullmatch(name) or name.replace("_", "-") in _NOT_OURS:
            raise wrong("is for a header that cannot carry one")
        return Secret(name.encode("ascii"), secret, forms(secret))
    user = (credential.user or (DEFAULT_GIT_USER if credential.kind is CredentialKind.GIT else "")).encode()
    if b":" in user or _CONTROL.search(user):
        raise wrong("is for a user whose name holds a colon or a control character")
    pair = base64.b64encode(user + b":" + secret)
    urlsafe = pair.translate(bytes.maketrans(b"+/", b"-_"))
    # The pair is as good as the secret, so it is looked for in the same ways.
    patterns = {*forms(secret, pair, urlsafe), *forms(pair), *forms(urlsafe)}
    return Secret(b"authorization", b"Basic " + pair, tuple(patterns))


def read_text(source: str, environment: Mapping[str, str]) -> str:
    """A secret that is no part of a request, as the password of a database. Raises RequestError."""
    secret = _read(source, environment).removesuffix(b"\n").removesuffix(b"\r")
    if not secret or len(secret) > MAX_SECRET or _CONTROL.search(secret):
        raise RequestError(f"the secret from {source} is empty, too long, or holds a control character")
    try:
        return secret.decode()
    except UnicodeDecodeError:
        raise RequestError(f"the secret from {source} is no UTF-8") from None


def _read(source: str, environment: Mapping[str, str]) -> bytes:
    """The bytes that a source holds, at most a little more than may be. Raises RequestError."""
    kind, _, where = source.partition(":")
    if kind == "env":
        if where not in environment:
            raise RequestError(f"the credential from {source} is not there: no such variable is set")
        return os.fsencode(environment[where])[: MAX_FILE + 1]
    if kind != "file" or not where.startswith("/"):
        raise RequestError(f"a credential comes from env:NAME or file:/absolute/path, not from {source[:100]!r}")
    try:
        # A named pipe must neither block us nor count as a file.
        descriptor = os.open(where, os.O_RDONLY | os.O_CLOEXEC | os.O_NONBLOCK | os.O_NOCTTY)
    except (OSError, ValueError) as error:
        raise RequestError(f"the credential from {source} cannot be read: {_cause(error)}") from None
    try:
        if not stat.S_ISREG(os.fstat(descriptor).st_mode):
            raise RequestError(f"the credential from {source} is not in a regular file")
        with open(descriptor, "rb", closefd=False) as file:
            return file.read(MAX_FILE + 1)
    except OSError as error:
        raise RequestError(f"the credential from {source} cannot be read: {_cause(error)}") from None
    finally:
        os.close(descriptor)


def _cause(error: Exception) -> str:
    return os.strerror(error.errno) if isinstance(error, OSError) and error.errno else "not a path"


def inject(fields: list[tuple[bytes, bytes]], secret: Secret) -> list[tuple[bytes, bytes]]:
    """The fields of a request with the secret's in place of all that the client sent under that name.

    A name with ``_`` for ``-`` counts as the same: servers that hand fields on as variables cannot tell them apart.
    """
    own = secret.header.replace(b"_", b"-")
    kept = [field for field in fields if field[0].lower().replace(b"_", b"-") != own]
    return [*kept, secret.field()]
