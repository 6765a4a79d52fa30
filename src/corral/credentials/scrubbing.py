"""Takes the echoes of a secret out of a stream: every form of it that is known becomes as many ``*``.

Works across the borders of chunks, with a result that does not depend on where they lie, and holds back only bytes that
may be the beginning of a form. What is not found: a secret that the server encrypts, compresses, breaks into pieces or
encodes in a way of its own. So the gateway asks for no compression and no ranges where it puts a secret in.
"""

from __future__ import annotations

import base64
import html
import json
from collections.abc import Iterable
from urllib.parse import quote, quote_plus

MASK = b"*"


def forms(secret: bytes, *others: bytes) -> tuple[bytes, ...]:
    """The ways in which a secret is commonly written. ``others`` are taken as they are, and in percent-encoding:
    values that hold the secret encoded, as ``Basic`` does."""
    found: set[bytes] = set()
    for base in (secret, *_base64_forms(secret), *others):
        found.update((base, *_percent_forms(base)))
    found.update((secret.hex().encode(), secret.hex().upper().encode()))
    found.add("".join(f"%{byte:02X}" for byte in secret).encode())
    found.add("".join(f"%{byte:02x}" for byte in secret).encode())
    try:
        text = secret.decode("utf-8")
    except UnicodeDecodeError:
        return tuple(found)
    found.update((text.encode("utf-16-le"), text.encode("utf-16-be"), html.escape(text).encode()))
    found.update(_json_forms(text))
    return tuple(found)


def _base64_forms(secret: bytes) -> Iterable[bytes]:
    """The characters that depend on the secret alone, for each of the three places at which it can begin."""
    for before in range(3):
        encoded = base64.b64encode(bytes(before) + secret).rstrip(b"=")
        known = encoded[(0, 2, 3)[before] : len(encoded) - ((before + len(secret)) % 3 > 0)]
        yield known
        yield known.translate(bytes.maketrans(b"+/", b"-_"))


def _percent_forms(value: bytes) -> Iterable[bytes]:
    """As Python, JavaScript (encodeURIComponent, encodeURI) and forms write it, in both cases of the digits."""
    for kept in ("", "/", "!*'()", ";,/?:@&=+$-_.!~*'()#"):
        yield from _both_cases(quote(value, safe=kept))
    yield from _both_cases(quote_plus(value))


def _both_cases(encoded: str) -> Iterable[bytes]:
    parts = encoded.split("%")
    lower = parts[0] + "".join(f"%{part[:2].lower()}{part[2:]}" for part in parts[1:])
    return encoded.encode("ascii"), lower.encode("ascii")


def _json_forms(text: str) -> Iterable[bytes]:
    """As JSON of Python and JavaScript, of PHP (``\\/``), and of Go (``<``, ``>``, ``&`` as numbers) writes it."""
    for ascii_only in (True, False):
        plain = json.dumps(text, ensure_ascii=ascii_only)[1:-1]
        yield plain.encode()
        yield plain.replace("/", "\\/").encode()
        yield plain.replace("<", "\\u003c").replace(">", "\\u003e").replace("&", "\\u0026").encode()


class Scrubber:
    """One stream. ``patterns`` as :func:`forms` gives them."""

    def __init__(self, patterns: Iterable[bytes]) -> None:
        self._patterns = tuple(sorted(set(patterns) - {b""}))
        self._is_in_lines = not any(b"\n" in pattern for pattern in self._patterns)
        """No form goes over the end of a line."""
        self._held = b""
        self._masked = 0
        """So many of the first bytes held are part of a form already seen."""

    def __repr__(self) -> str:
        return "Scrubber(...)"

    def feed(self, data: bytes) -> bytes:
        """What can be passed on now."""
        buffer = self._held + data
        spans = self._spans(buffer)
        cut = self._first_beginning(buffer)
        released = _mask(buffer[:cut], spans)
        # Of what is held, what lies in a form that begins before it is masked, whatever follows.
        self._masked = max((self._masked, *(end for start, end in spans if start < cut))) - cut
        self._held = buffer[cut:]
        return released

    def end(self) -> bytes:
        """What was held back."""
        rest = _mask(self._held, self._spans(self._held))
        self._held, self._masked = b"", 0
        return rest

    def mask(self, data: bytes) -> bytes:
        """A value that is whole; the stream is not touched."""
        return _mask(data, self._find(data))

    def _spans(self, buffer: bytes) -> list[tuple[int, int]]:
        spans = self._find(buffer)
        if self._masked > 0:
            spans.append((0, self._masked))
        return spans

    def _find(self, buffer: bytes) -> list[tuple[int, int]]:
        spans = []
        for pattern in self._patterns:
            at = buffer.find(pattern)
            while at >= 0:
                start, end = at, at + len(pattern)
                while 0 <= (at := buffer.find(pattern, at + 1, end + len(pattern) - 1)) < end:  # it overlaps itself
                    end = at + len(pattern)
                spans.append((start, end))
                at = buffer.find(pattern, end)
        return spans

    def _first_beginning(self, buffer: bytes) -> int:
        """Where the first form begins that the buffer may hold the beginning of; its end if there is none."""
        first = len(buffer)
        if self._is_in_lines and buffer.endswith(b"\n"):
            return first  # as in streams of events, piece by piece
        for pattern in self._patterns:
            at = max(0, len(buffer) - len(pattern) + 1)
            while (at := buffer.find(pattern[:1], at, first)) >= 0:
                if pattern.startswith(buffer[at:]):
                    first = at
                    break
                at += 1
        return first


def _mask(data: bytes, spans: list[tuple[int, int]]) -> bytes:
    if not spans:
        return data
    masked = bytearray(data)
    for start, end in spans:
        length = min(end, len(data)) - start
        if length > 0:
            masked[start : start + length] = MASK * length
    return bytes(masked)
