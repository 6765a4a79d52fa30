"""Hellos are read strictly: one reading or a refusal, whatever the pieces, and never another exception."""

from __future__ import annotations

import hashlib
import ssl
import time
from datetime import UTC, datetime, timedelta
from pathlib import Path

import pytest
from cryptography import x509
from cryptography.hazmat.primitives import hashes
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.hazmat.primitives.serialization import Encoding, NoEncryption, PrivateFormat
from cryptography.x509.oid import NameOID
from hypothesis import given, settings
from hypothesis import strategies as st

from corral.gateway.hello import (
    MAX_FLIGHT,
    MAX_HELLO,
    CertificateReader,
    ClientHello,
    HelloError,
    escaped,
    parse_hello,
    server_certificate,
)
from tests.unit.hellos import (
    alpn,
    body,
    chrome,
    groups,
    hello,
    message,
    number,
    records,
    server_name,
    signatures,
    vector,
    versions,
)

LETTERS = "abcdefghijklmnopqrstuvwxyz0123456789"


def parsed(data: bytes) -> ClientHello:
    found = parse_hello(data)
    assert found is not None
    return found


def of(*extensions: tuple[int, bytes], ciphers: tuple[int, ...] = (0x1301,)) -> bytes:
    return records(message(body(extensions, ciphers=ciphers)))


def test_a_hello_is_read() -> None:
    data = of(
        server_name(b"Example.ORG"),
        alpn(b"h2", b"http/1.1"),
        versions(0x0304, 0x0303),
        signatures(0x0403, 0x0804),
        groups(29, 23),
    )
    assert parsed(data) == ClientHello(
        server_name="example.org",
        alpn=("h2", "http/1.1"),
        versions=(0x0304, 0x0303),
        ciphers=(0x1301,),
        extensions=(0, 16, 43, 13, 10),
        signature_algorithms=(0x0403, 0x0804),
        groups=(29, 23),
    )


def test_what_the_library_of_python_sends_is_read() -> None:
    context = ssl.create_default_context()
    context.set_alpn_protocols(["http/1.1"])
    outgoing = ssl.MemoryBIO()
    connection = context.wrap_bio(ssl.MemoryBIO(), outgoing, server_hostname="pypi.org")
    with pytest.raises(ssl.SSLWantReadError):
        connection.do_handshake()
    found = parsed(outgoing.read())
    assert (found.server_name, found.alpn, found.ech) == ("pypi.org", ("http/1.1",), False)
    assert 0x0304 in found.versions


def test_a_hello_without_extensions_or_name() -> None:
    found = parsed(records(message(body(None, version=0x0301))))
    assert (found.server_name, found.versions, found.extensions) == (None, (0x0301,), ())


@pytest.mark.parametrize("kind", [0xFE0D, 0xFFCE, 0xFD00])
def test_a_hello_that_may_hide_another_says_so(kind: int) -> None:
    assert parsed(hello((kind, b"x"))).ech
    assert not parsed(hello((0xFE0C, b"x"))).ech


def test_early_data_and_sessions_are_noted() -> None:
    plain, early = parsed(hello()), parsed(hello((42, b""), (41, b"x")))
    assert (plain.early_data, plain.pre_shared_key) == (False, False)
    assert (early.early_data, early.pre_shared_key) == (True, True)


def test_what_follows_the_hello_is_not_looked_at() -> None:
    assert parse_hello(hello() + b"\x17\3\3\0\1x" + b"anything") == parse_hello(hello())


def test_a_protocol_that_cannot_be_printed_is_escaped() -> None:
    assert parsed(of(alpn(b"\x0a\n\\\xff", b"h2"))).alpn == (r"\n\n\\\xff", "h2")


WRONG_NAMES = {
    "empty": b"",
    "dot of the root": b"example.org.",
    "address": b"192.0.2.1",
    "one number as an address": b"2130706433",
    "hexadecimal address": b"0x7f000001",
    "address of version 6": b"2001:db8::1",
    "address in brackets": b"[2001:db8::1]",
    "NUL": b"example.org\0.evil.test",
    "line end": b"example.org\r\n",
    "not ASCII": "münchen.de".encode(),
    "port": b"example.org:443",
    "user": b"user@example.org",
    "wildcard": b"*.example.org",
    "two dots": b"a..b",
    "too long": b"a." * 127 + b"org",
    "long label": b"a" * 64 + b".org",
}


@pytest.mark.parametrize("name", WRONG_NAMES.values(), ids=WRONG_NAMES)
def test_a_name_that_is_none_is_refused(name: bytes) -> None:
    with pytest.raises(HelloError, match=r"server name|reaches beyond") as caught:
        parse_hello(hello(name=name))
    assert str(caught.value).isascii() and str(caught.value).isprintable() and len(str(caught.value)) < 200


TWO_NAMES = vector(b"\0" + vector(b"a.example") + b"\0" + vector(b"b.example"))
WRONG_BODIES = {
    "two names": (body([(0, TWO_NAMES)]), "one name only"),
    "another kind of name": (body([server_name(b"a.example", kind=1)]), "something else than a name"),
    "name behind the list": (body([(0, server_name(b"a.example")[1] + b"x")]), "left over"),
    "empty list of names": (body([(0, b"\0\0")]), "reaches beyond"),
    "two server_name": (body([server_name(b"a.example"), server_name(b"b.example")]), "extension 0 is there twice"),
    "two unknown": (body([(99, b""), (99, b"")]), "extension 99 is there twice"),
    "no ciphers": (body([], ciphers=()), "ciphers of 0 bytes"),
    "half a cipher": (number(0x0303) + bytes(32) + b"\0" + vector(b"\x13") + b"\1\0", "ciphers of 1 bytes"),
    "long session": (body([], session=bytes(33)), "more than 32"),
    "compression only": (body([], compressions=b"\1"), "without compression"),
    "compression with 1.3": (body([versions(0x0304)], compressions=b"\0\1"), "together with TLS 1.3"),
    "SSL 3.0": (body([], version=0x0300), "version 0x0300"),
    "TLS 1.3 as legacy version": (body([], version=0x0304), "version 0x0304"),
    "left over": (body([]) + b"x", "left over"),
    "extension too long": (body(None) + vector(number(99) + number(5) + b"x"), "reaches beyond"),
    "half an extension": (body(None) + vector(b"\0\x63\0"), "reaches beyond"),
    "psk not last": (body([(41, b"x"), (99, b"")]), "not the last"),
    "padding with content": (body([(21, b"\0\0secret")]), "padding that is not empty"),
    "empty ALPN": (body([(16, b"\0\0")]), "empty list"),
    "protocol without a name": (body([alpn(b"")]), "without a name"),
    "no versions": (body([(43, b"\0")]), "supported_versions of 0"),
    "half a version": (body([(43, b"\1\3")]), "supported_versions of 1"),
    "versions left over": (body([(43, versions(0x0304)[1] + b"x")]), "left over"),
    "empty groups": (body([(10, b"\0\0")]), "supported_groups of 0"),
    "short": (b"\3\3", "reaches beyond"),
    "empty": (b"", "reaches beyond"),
}


@pytest.mark.parametrize(("content", "says"), WRONG_BODIES.values(), ids=WRONG_BODIES)
def test_a_message_with_two_readings_is_refused(content: bytes, says: str) -> None:
    with pytest.raises(HelloError, match=says):
        parse_hello(records(message(content)))


MESSAGE = message(body([server_name(b"a.example")]))
WRONG_RECORDS = {
    "alert between": (records(MESSAGE[:10]) + records(b"\1\0", kind=21) + records(MESSAGE[10:]), "interrupts"),
    "empty record": (records(MESSAGE[:10]) + b"\x16\3\1\0\0" + records(MESSAGE[10:]), "record of 0 bytes"),
    "record too long": (b"\x16\3\1\x40\1", "record of 16385 bytes"),
    "other version": (records(MESSAGE, version=0x0401), "version 4.1"),
    "version of DTLS": (records(MESSAGE, version=0xFEFD), "version 254.253"),
    "another message": (records(message(b"", kind=2)), "message 2 instead"),
    "second message in the record": (records(MESSAGE + MESSAGE), "behind the hello"),
    "endless": (records(number(1, 1) + number(MAX_HELLO, 3)), "a hello of"),
    "data": (records(MESSAGE, kind=23), "no record of a handshake"),
}


@pytest.mark.parametrize(("data", "says"), WRONG_RECORDS.values(), ids=WRONG_RECORDS)
def test_records_with_two_readings_are_refused(data: bytes, says: str) -> None:
    with pytest.raises(HelloError, match=says):
        parse_hello(data)


def outcome(data: bytes) -> ClientHello | str | None:
    try:
        return parse_hello(data)
    except HelloError as error:
        return str(error)


def first_outcome(data: bytes) -> ClientHello | str | None:
    """As of a reader that gets byte after byte."""
    for length in range(len(data) + 1):
        found = outcome(data[:length])
        if found is not None:
            return found
    return None


@pytest.mark.parametrize("fragment", [1, 3, 4, 5, 100, 1 << 14])
def test_fragments_and_pieces_make_no_difference(fragment: int) -> None:
    data = hello(alpn(b"h2"), fragment=fragment)
    assert first_outcome(data) == outcome(data) == outcome(hello(alpn(b"h2")))


@pytest.mark.parametrize("data", [data for data, _ in WRONG_RECORDS.values()], ids=WRONG_RECORDS)
def test_a_refusal_is_the_same_for_every_way_to_cut(data: bytes) -> None:
    assert first_outcome(data) == outcome(data)


@given(st.binary(max_size=300), st.integers(1, 40))
def test_arbitrary_messages_are_read_or_refused(content: bytes, fragment: int) -> None:
    data = records(message(content), fragment)
    assert first_outcome(data) == outcome(data) is not None


@given(st.data())
def test_a_damaged_hello_is_read_or_refused(data: st.DataObject) -> None:
    original = bytearray(chrome())
    for _ in range(data.draw(st.integers(1, 4))):
        original[data.draw(st.integers(0, len(original) - 1))] = data.draw(st.integers(0, 255))
    cut = data.draw(st.integers(0, len(original)))
    whole, part = outcome(bytes(original)), outcome(bytes(original[:cut]))
    assert part is None or part == whole


@given(st.lists(st.text(LETTERS, min_size=1, max_size=20), min_size=2, max_size=4), st.integers(1, 50))
def test_a_name_comes_back(labels: list[str], fragment: int) -> None:
    name = ".".join([*labels, "org"])
    assert parsed(hello(name=name.upper().encode(), fragment=fragment)).server_name == name


def test_endless_fragments_end() -> None:
    flood = records(number(1, 1) + number(30000, 3) + bytes(30000), 1)
    begin = time.perf_counter()
    with pytest.raises(HelloError, match="more than 256 records"):
        parse_hello(flood)
    assert time.perf_counter() - begin < 1
    assert parse_hello(flood[:1000]) is None


def test_escaped_text_is_one_short_line() -> None:
    assert escaped(b"plain") == "plain"
    assert escaped(b"a\r\n\x1b[31m\xff\\") == r"a\r\n\x1b[31m\xff\\"
    assert len(escaped(bytes(1000))) == 80
    assert escaped(b"x" * 80) == "x" * 80


# ---- the server's certificate ----

LEAF, ISSUER = b"leaf" * 300, b"issuer" * 200
CHAIN = message(vector(vector(LEAF, 3) + vector(ISSUER, 3), 3), kind=11)
HASH = hashlib.sha256(LEAF).hexdigest()


def server_hello(*extensions: tuple[int, bytes]) -> bytes:
    tail = vector(b"".join(number(kind) + vector(data) for kind, data in extensions)) if extensions else b""
    return message(number(0x0303) + bytes(32) + b"\0" + number(0xC02F) + b"\0" + tail, kind=2)


@pytest.mark.parametrize("fragment", [7, 100, 1 << 14])
def test_the_certificate_is_found_in_all_pieces(fragment: int) -> None:
    flight = records(server_hello((0xFF01, b"\0")) + CHAIN + message(b"", kind=14), fragment, 0x0303)
    assert server_certificate(flight) == HASH
    reader = CertificateReader()
    for byte in flight:
        reader.feed(bytes((byte,)))
    assert (reader.done, reader.certificate) == (True, HASH)


@pytest.mark.parametrize(
    "flight",
    [
        records(server_hello((43, b"\3\4")), version=0x0303) + records(CHAIN, version=0x0303),
        records(server_hello(), version=0x0303) + b"\x14\3\3\0\1\1" + records(CHAIN),
        records(b"\2\x28", version=0x0303, kind=21),
        records(message(b"", kind=0)),
        records(message(b"\0\0\0", kind=11)),
        records(message(vector(b"\0\0", 3), kind=11)),
        records(server_hello()[:20]) + b"\x16\3\1\0\0",
        b"HTTP/1.1 400 Bad Request\r\n\r\n",
        b"\x16\3\3\xff\xff",
        records(number(11, 1) + number(MAX_FLIGHT, 3)),
    ],
    ids=["1.3", "resumed", "alert", "request", "no certificate", "cut", "empty", "plain", "long", "huge"],
)
def test_where_none_is_visible_the_reader_says_so(flight: bytes) -> None:
    reader = CertificateReader()
    reader.feed(flight)
    assert (reader.done, reader.certificate) == (True, "")
    reader.feed(records(CHAIN))
    assert not reader.certificate


@pytest.mark.parametrize(("version", "visible"), [(ssl.TLSVersion.TLSv1_2, True), (ssl.TLSVersion.TLSv1_3, False)])
def test_the_certificate_of_a_real_server(version: ssl.TLSVersion, visible: bool, tmp_path: Path) -> None:
    key = ec.generate_private_key(ec.SECP256R1())
    name = x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, "server.example")])
    now = datetime.now(UTC)
    certificate = x509.CertificateBuilder(name, name, key.public_key(), 1, now, now + timedelta(days=1)).sign(
        key, hashes.SHA256()
    )
    pem = certificate.public_bytes(Encoding.PEM) + key.private_bytes(Encoding.PEM, PrivateFormat.PKCS8, NoEncryption())
    (tmp_path / "server.pem").write_bytes(pem)
    server_side = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    server_side.load_cert_chain(tmp_path / "server.pem")
    server_side.maximum_version = version
    client_side = ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT)
    client_side.check_hostname, client_side.verify_mode = False, ssl.CERT_NONE
    up, down = ssl.MemoryBIO(), ssl.MemoryBIO()
    client = client_side.wrap_bio(down, up, server_hostname="server.example")
    server = server_side.wrap_bio(up, down, server_side=True)
    for side in (client, server):
        with pytest.raises(ssl.SSLWantReadError):
            side.do_handshake()
    reader = CertificateReader()
    reader.feed(down.read())
    assert reader.done
    assert reader.certificate == (certificate.fingerprint(hashes.SHA256()).hex() if visible else "")


@settings(max_examples=50)
@given(st.lists(st.binary(max_size=200), max_size=10))
def test_a_hostile_server_is_no_error(pieces: list[bytes]) -> None:
    reader = CertificateReader()
    for piece in (records(server_hello()), *pieces):
        reader.feed(piece)
    assert not reader.certificate or len(reader.certificate) == 64


def test_a_server_that_never_gets_to_the_point_is_given_up() -> None:
    reader = CertificateReader()
    greeting = records(server_hello(), version=0x0303)
    for count in range(1, MAX_FLIGHT // len(greeting) + 2):
        assert not reader.done
        reader.feed(greeting)
        if count * len(greeting) > MAX_FLIGHT:
            break
    assert reader.done
