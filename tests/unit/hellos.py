"""Hellos of TLS, built byte by byte: what a test says, no library would write."""

from __future__ import annotations

from collections.abc import Sequence

CHROME_CIPHERS = (
    0x1A1A, 0x1301, 0x1302, 0x1303, 0xC02B, 0xC02F, 0xC02C, 0xC030, 0xCCA9, 0xCCA8, 0xC013, 0xC014, 0x9C, 0x9D, 0x2F,
    0x35,
)  # fmt: skip
CHROME_SIGNATURES = (0x0403, 0x0804, 0x0401, 0x0503, 0x0805, 0x0501, 0x0806, 0x0601)

Extension = tuple[int, bytes]


def number(value: int, size: int = 2) -> bytes:
    return value.to_bytes(size, "big")


def vector(data: bytes, size: int = 2) -> bytes:
    return number(len(data), size) + data


def numbers(values: Sequence[int]) -> bytes:
    return b"".join(map(number, values))


def server_name(name: bytes, kind: int = 0) -> Extension:
    return 0, vector(number(kind, 1) + vector(name))


def alpn(*names: bytes) -> Extension:
    return 16, vector(b"".join(vector(name, 1) for name in names))


def versions(*values: int) -> Extension:
    return 43, vector(numbers(values), 1)


def groups(*values: int) -> Extension:
    return 10, vector(numbers(values))


def signatures(*values: int) -> Extension:
    return 13, vector(numbers(values))


def body(
    extensions: Sequence[Extension] | None = (),
    *,
    ciphers: Sequence[int] = (0x1301,),
    version: int = 0x0303,
    compressions: bytes = b"\0",
    session: bytes = b"",
) -> bytes:
    start = number(version) + bytes(32) + vector(session, 1) + vector(numbers(ciphers)) + vector(compressions, 1)
    if extensions is None:
        return start
    return start + vector(b"".join(number(kind) + vector(data) for kind, data in extensions))


def message(content: bytes, kind: int = 1) -> bytes:
    return number(kind, 1) + vector(content, 3)


def records(content: bytes, fragment: int = 1 << 14, version: int = 0x0301, kind: int = 22) -> bytes:
    pieces = [content[i : i + fragment] for i in range(0, len(content), fragment)]
    return b"".join(number(kind, 1) + number(version) + vector(piece) for piece in pieces)


def hello(*extensions: Extension, name: bytes = b"example.org", fragment: int = 1 << 14) -> bytes:
    """One as a plain client of TLS 1.3 sends it."""
    own = (server_name(name), versions(0x0304, 0x0303), signatures(0x0403))
    return records(message(body((*own, *extensions))), fragment)


def chrome(*, ech: bool = True, name: bytes = b"example.org") -> bytes:
    """One with the lists of Chrome; before 2023 (``ech=False``) it had padding instead of a hidden hello."""
    middle: Extension = (0xFE0D, bytes(10)) if ech else (21, bytes(50))
    extensions: list[Extension] = [
        (0x9A9A, b""), server_name(name), (23, b""), (0xFF01, b"\0"), groups(0xDADA, 0x11EC, 29, 23, 24), (11, b"\1\0"),
        (35, b""), alpn(b"h2", b"http/1.1"), (5, b"\1\0\0\0\0"), signatures(*CHROME_SIGNATURES), (18, b""),
        (51, vector(b"")), (45, b"\1\1"), versions(0xEAEA, 0x0304, 0x0303), (27, b"\2\0\2"),
        (0x4469, vector(vector(b"h2", 1))),
        middle, (0x2A2A, b"\0"),
    ]  # fmt: skip
    return records(message(body(extensions, ciphers=CHROME_CIPHERS, session=bytes(32))))
