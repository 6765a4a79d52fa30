"""JA4, the fingerprint of what wrote a client's hello: who is talking, whatever name it gives.

It has three parts, as published by FoxIO ("JA4: TLS Client Fingerprinting"; that one of the suite is under a BSD
licence, the others are not used here)::

    t13d1516h2_8daaf6152771_02713d6af862

    t       over TCP                      first 12 digits of SHA-256 of         the same of the extensions without
    13      highest version offered       the ciphers, sorted                   server_name and ALPN, sorted, and of
    d       a name is asked for (i: not)                                        the signature algorithms, as ordered
    15 16   numbers of ciphers, extensions
    h2      first, last letter of the first ALPN protocol

Values that are there to be ignored (GREASE, RFC 8701) count nowhere.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterable
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from corral.gateway.hello import ClientHello

_SERVER_NAME, _ALPN = 0, 16
_VERSIONS = {0x0304: "13", 0x0303: "12", 0x0302: "11", 0x0301: "10", 0x0300: "s3", 0x0002: "s2"}
_NOTHING = "0" * 12


def is_ignored(value: int) -> bool:
    """Whether it is one of the values that RFC 8701 reserves: 0x0a0a, 0x1a1a, ... 0xfafa."""
    return value & 0x0F0F == 0x0A0A and value >> 8 == value & 0xFF


def fingerprint(hello: ClientHello) -> str:
    """The JA4 of a hello that came over TCP."""
    ciphers = _known(hello.ciphers)
    extensions = _known(hello.extensions)
    version = _VERSIONS.get(max(_known(hello.versions), default=0), "00")
    named = "d" if _SERVER_NAME in extensions else "i"
    counts = f"{min(len(ciphers), 99):02}{min(len(extensions), 99):02}"
    rest = _text(sorted(kind for kind in extensions if kind not in (_SERVER_NAME, _ALPN)))
    algorithms = _text(_known(hello.signature_algorithms))
    last = _digest(f"{rest}_{algorithms}" if algorithms else rest) if extensions else _NOTHING
    return f"t{version}{named}{counts}{_letters(hello.alpn)}_{_digest(_text(sorted(ciphers)))}_{last}"


def _known(values: Iterable[int]) -> list[int]:
    return [value for value in values if not is_ignored(value)]


def _text(values: Iterable[int]) -> str:
    return ",".join(f"{value:04x}" for value in values)


def _digest(text: str) -> str:
    return hashlib.sha256(text.encode()).hexdigest()[:12] if text else _NOTHING


def _letters(alpn: tuple[str, ...]) -> str:
    """First and last letter of the first protocol; of its hexadecimal form where one of them is none."""
    if not alpn:
        return "00"
    name = alpn[0].encode("ascii").decode("unicode_escape").encode("latin-1")  # as it was before it was escaped
    first, last = name[:1], name[-1:]
    if first.isalnum() and last.isalnum():  # of bytes: ASCII only
        return (first + last).decode("ascii")
    return first.hex()[:1] + last.hex()[-1:]
