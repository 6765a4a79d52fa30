"""JA4 against published fingerprints, and against its rules one by one."""

from __future__ import annotations

import hashlib

import pytest

from corral.gateway.hello import parse_hello
from corral.gateway.ja4 import is_ignored
from tests.unit.hellos import alpn, body, chrome, hello, message, records, server_name, signatures, versions

ONLY_NAME_CIPHERS = (
    0x39, 0x38, 0x35, 0x16, 0x13, 0x0A, 0x33, 0x32, 0x2F, 0x9A, 0x99, 0x96, 0x05, 0x04, 0x15, 0x12, 0x09, 0x14, 0x11,
    0x08, 0x06, 0x03, 0xFF,
)  # fmt: skip


def ja4(data: bytes) -> str:
    found = parse_hello(data)
    assert found is not None
    return found.ja4


def of(*extensions: tuple[int, bytes], ciphers: tuple[int, ...] = (0x1301,), version: int = 0x0303) -> str:
    return ja4(records(message(body(extensions, ciphers=ciphers, version=version))))


def digest(text: str) -> str:
    return hashlib.sha256(text.encode()).hexdigest()[:12]


def test_published_fingerprints() -> None:
    assert ja4(chrome()) == "t13d1516h2_8daaf6152771_02713d6af862"
    assert ja4(chrome(ech=False)) == "t13d1516h2_8daaf6152771_e5627efa2ab1"
    only_name = of(server_name(b"www.example.com"), ciphers=ONLY_NAME_CIPHERS, version=0x0301)
    assert only_name == "t10d230100_6a57a6f57151_000000000000"


def test_the_order_of_ciphers_and_extensions_does_not_count_but_that_of_signatures_does() -> None:
    one = of((5, b""), (23, b""), signatures(1, 2), ciphers=(1, 2))
    assert one == of((23, b""), signatures(1, 2), (5, b""), ciphers=(2, 1))
    assert one != of((5, b""), (23, b""), signatures(2, 1), ciphers=(1, 2))


def test_a_hello_with_nothing() -> None:
    assert ja4(records(message(body(None)))) == f"t12i010000_{digest('1301')}_000000000000"
    assert of(ciphers=(0x0A0A,)) == "t12i000000_000000000000_000000000000"


def test_without_signature_algorithms_there_is_no_underscore() -> None:
    assert of((23, b""), (5, b"")).endswith(digest("0005,0017"))


def test_the_highest_known_version_counts() -> None:
    assert of(versions(0x0302, 0x0303)).startswith("t12")
    assert of(versions(0x6A6A, 0x0304)).startswith("t13")
    assert of(versions(0x0305)).startswith("t00")


@pytest.mark.parametrize(
    ("protocol", "letters"),
    [(b"h2", "h2"), (b"http/1.1", "h1"), (b"x", "xx"), (b"\xab", "ab"), (b"\x30\xab", "3b"), (b"-a", "21"),
     (b"\\n", "5e"), (b"\x0a\x0a", "0a"), (b"h\xc3\xa9", "69")],
)  # fmt: skip
def test_letters_of_the_protocol(protocol: bytes, letters: str) -> None:
    assert of(alpn(protocol, b"zz"))[8:10] == letters


def test_counts_have_two_digits() -> None:
    many = tuple((1000 + i, b"") for i in range(120))
    assert of(*many, ciphers=tuple(range(1, 150))).startswith("t12i999900_")


def test_ignored_values() -> None:
    assert [value for value in range(0x10000) if is_ignored(value)] == [0x0A0A + 0x1010 * i for i in range(16)]
    assert ja4(hello((0x4A4A, b""))) == ja4(hello())
