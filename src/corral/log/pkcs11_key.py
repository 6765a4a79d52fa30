"""Keys that never leave a device (PKCS#11 3.0), and the files that name them.

A device is a smart card, a hardware security module, or a cloud's service by way of its PKCS#11 library.

Such a file lies where a key's file would, as one line: ``PKCS11+KEY+VERIFIER URI``. The verifier is the public half, as
others are given it, so that a device with another key under the same name is noticed; the URI (RFC 7512) says where the
key is, by which library, and where the PIN stands, which is in a file of its own.

Needs python-pkcs11, an extra of the package (``pip install 'corral[pkcs11]'``).
"""

from __future__ import annotations

import os
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from urllib.parse import unquote_to_bytes

from corral.errors import RequestError
from corral.log.note import KeyFile, KeyType, NoteError, Verifier, parse_verifier, read_private, write_private

PREFIX = "PKCS11+KEY+"
_PATH = frozenset({"token", "serial", "object", "id", "type"})
_QUERY = frozenset({"module-path", "pin-source"})
_MAX_PIN = 256
_POINT = bytes((4, 32))
"""In front of the 32 bytes of a public key: a DER octet string (PKCS#11 3.0, section 2.3.5)."""

_lock = threading.RLock()
"""Over every call of a device's library: not all of them may be called by several threads."""
_sessions: dict[tuple[int, str, str, bytes], Any] = {}
"""Those that are logged in, by process, library, token and serial number. A process logs in to a token once, and all
its sessions are logged out with one, so they stay open until it ends."""


@dataclass(frozen=True, slots=True)
class Place:
    """Where a key is: what a URI says."""

    uri: str
    module: str
    """The library, an absolute path."""
    pin_file: str
    """Whose first line is the PIN."""
    token: str
    serial: bytes
    label: str
    id: bytes


def parse_uri(uri: str) -> Place:
    """The place that a PKCS#11 URI (RFC 7512) names. Raises RequestError for one that this cannot use: without
    ``module-path``, ``pin-source``, a token and a key; with a PIN in it; with anything that is not known here, since to
    pass over it might mean another key."""
    scheme, _, rest = uri.partition(":")
    path, _, query = rest.partition("?")
    if scheme != "pkcs11" or not uri.isascii() or not uri.isprintable() or " " in uri:
        raise RequestError("a key on a device is named by a URI: pkcs11:token=...;object=...?module-path=...")
    found = _attributes(path, ";", _PATH) | _attributes(query, "&", _QUERY)
    if found.get("type", b"private") != b"private":
        raise RequestError("the URI must name a private key (type=private)")
    texts = {name: _text(name, found.get(name, b"")) for name in ("module-path", "pin-source", "token", "object")}
    pin = texts["pin-source"].removeprefix("file:")
    for name, value in (("module-path", texts["module-path"]), ("pin-source", pin)):
        if not os.path.isabs(value):
            raise RequestError(f"the URI must say {name}, as an absolute path")
    if not (texts["token"] or found.get("serial")) or not (texts["object"] or found.get("id")):
        raise RequestError("the URI must name a token (token or serial) and a key (object or id)")
    return Place(
        uri,
        texts["module-path"],
        pin,
        texts["token"],
        found.get("serial", b""),
        texts["object"],
        found.get("id", b""),
    )


def _attributes(text: str, separator: str, known: frozenset[str]) -> dict[str, bytes]:
    found: dict[str, bytes] = {}
    for part in text.split(separator) if text else ():
        name, equals, value = part.partition("=")
        if name == "pin-value":
            raise RequestError("a PIN does not belong into a URI: write it to a file, mode 0600, and say pin-source")
        if not equals or name not in known or name in found:
            raise RequestError(f"the URI says what is not known here, or twice; known: {', '.join(sorted(known))}")
        found[name] = unquote_to_bytes(value)
    return found


def _text(name: str, value: bytes) -> str:
    try:
        text = value.decode()
    except UnicodeDecodeError:
        raise RequestError(f"{name} in the URI is no text") from None
    if "\0" in text:
        raise RequestError(f"{name} in the URI has a NUL")
    return text


class Pkcs11Key:
    """A key on a device; a :class:`corral.log.note.Signer`. May be used from several threads."""

    def __init__(self, name: str, type: KeyType, place: Place) -> None:
        """Logs in to the device and finds the key. Raises NoteError where it cannot be used, or may leave the device;
        RequestError where python-pkcs11 is missing."""
        self.place = place
        self._process = os.getpid()
        with _talking(place) as pkcs11:
            session = _session(pkcs11, place)
            how: dict[str, Any] = {"key_type": pkcs11.KeyType.EC_EDWARDS}
            how |= {"label": place.label} if place.label else {}
            how |= {"id": place.id} if place.id else {}
            self._private = session.get_key(object_class=pkcs11.ObjectClass.PRIVATE_KEY, **how)
            public = session.get_key(object_class=pkcs11.ObjectClass.PUBLIC_KEY, **how)
            attribute = pkcs11.Attribute
            stays = self._private[attribute.SENSITIVE] and not self._private[attribute.EXTRACTABLE]
            point = bytes(public[attribute.EC_POINT])
            self._mechanism = pkcs11.Mechanism.EDDSA
        if not stays:
            raise NoteError(f"{place.uri}: this key may leave its device; make one that is sensitive, not extractable")
        if len(point) == 34 and point.startswith(_POINT):
            point = point[2:]
        if len(point) != 32:
            raise NoteError(f"{place.uri}: it is no Ed25519 key")
        self._verifier = Verifier(name, type, point)
        parse_verifier(str(self._verifier))  # the name is one that a key can have

    @classmethod
    def make(cls, path: str | os.PathLike[str], name: str, uri: str, type: KeyType = KeyType.ED25519) -> Pkcs11Key:
        """A new file that names a key, which the device has already.

        Raises NoteError where the file exists, or as above; RequestError for a URI that cannot be used.
        """
        made = cls(name, type, parse_uri(uri))
        write_private(path, f"{PREFIX}{made.verifier} {uri}\n")
        return made

    @classmethod
    def read(cls, path: str | os.PathLike[str]) -> Pkcs11Key:
        """The key that a file names. Raises NoteError where others can read or change the file, it names none, or the
        device has another key there; RequestError where python-pkcs11 is missing."""
        expected, place = _named(read_private(path), os.fspath(path))
        found = cls(expected.name, expected.type, place)
        if found.verifier != expected:
            raise NoteError(f"{os.fspath(path)}: the device has another key there than when this file was made")
        return found

    @property
    def verifier(self) -> Verifier:
        return self._verifier

    def sign(self, message: bytes) -> bytes:
        if os.getpid() != self._process:
            raise NoteError("the device was opened by another process, of which this is a fork")
        with _talking(self.place):
            return bytes(self._private.sign(message, mechanism=self._mechanism))


def read_signer(path: str | os.PathLike[str]) -> KeyFile | Pkcs11Key:
    """The key in a file, or the one on a device that the file names. Raises as both."""
    return Pkcs11Key.read(path) if read_private(path).startswith(PREFIX) else KeyFile.read(path)


def pin_files(path: Path) -> tuple[str, ...]:
    """What beside the file must be hidden from whoever may not sign; nothing where it names no device, or is none."""
    try:
        text = read_private(path)
        return (_named(text, str(path))[1].pin_file,) if text.startswith(PREFIX) else ()
    except NoteError:
        return ()  # it cannot be used, which whoever opens the log says


def _named(text: str, where: str) -> tuple[Verifier, Place]:
    verifier, space, uri = text.rstrip("\n").removeprefix(PREFIX).partition(" ")
    try:
        if not space:
            raise RequestError("it has no URI")
        return parse_verifier(verifier), parse_uri(uri)
    except RequestError as error:
        raise NoteError(f"{where}: it names no key on a device: {error}") from None


@contextmanager
def _talking(place: Place) -> Iterator[Any]:
    """The library's module; its errors are ours. Only their names are told: the rest is the device's own words."""
    try:
        import pkcs11
    except ImportError:
        raise RequestError(
            "a key on a device needs python-pkcs11, which is not installed here: pip install 'corral[pkcs11]'"
        ) from None
    try:
        with _lock:
            yield pkcs11
    except (pkcs11.PKCS11Error, RuntimeError, ValueError, TypeError, OSError) as error:
        raise NoteError(f"{place.uri}: the device does not do it ({type(error).__name__})") from None


def _session(pkcs11: Any, place: Place) -> Any:
    """A session of the one token that the place names, logged in. Raises what the library raises; NoteError."""
    known = (os.getpid(), place.module, place.token, place.serial)
    if known not in _sessions:
        wanted: dict[str, Any] = {"token_label": place.token} if place.token else {}
        wanted |= {"token_serial": place.serial} if place.serial else {}
        tokens = list(pkcs11.lib(place.module).get_tokens(**wanted))
        if len(tokens) != 1:
            raise NoteError(f"{place.uri}: {'no token is' if not tokens else 'several tokens are'} named so")
        try:
            _sessions[known] = tokens[0].open(user_pin=_pin(place))
        except pkcs11.UserAlreadyLoggedIn:  # by another name of the same token
            _sessions[known] = tokens[0].open()
    return _sessions[known]


def _pin(place: Place) -> str:
    pin = read_private(place.pin_file).split("\n", 1)[0]
    if not 0 < len(pin) <= _MAX_PIN:
        raise NoteError(f"{place.pin_file}: its first line is no PIN")
    return pin
