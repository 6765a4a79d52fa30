"""Socket addresses: what raw bytes mean, and what the kernel is given for them."""

from __future__ import annotations

import socket
from errno import EACCES, EAFNOSUPPORT, EINVAL

import pytest

from corral.actions import Endpoint, Transport
from corral.supervisor import addresses

TCP, UDP = Transport.TCP, Transport.UDP


def four(host: str, port: int = 80, tail: bytes = bytes(8)) -> bytes:
    return b"\x02\x00" + port.to_bytes(2, "big") + socket.inet_aton(host) + tail


def six(host: str, port: int = 80, tail: bytes = bytes(4)) -> bytes:
    packed = socket.inet_pton(socket.AF_INET6, host)
    return b"\x0a\x00" + port.to_bytes(2, "big") + b"\x01\x02\x03\x04" + packed + tail


@pytest.mark.parametrize(
    ("raw", "address"),
    [
        (four("192.0.2.1"), "192.0.2.1"),
        (four("192.0.2.1", tail=b"whatever"), "192.0.2.1"),
        (four("192.0.2.1", tail=bytes(100)), "192.0.2.1"),
        (six("2001:DB8::0:1"), "2001:db8::1"),
        (six("2001:db8::1", tail=b""), "2001:db8::1"),
        (six("fe80::1", tail=b"\x07\0\0\0"), "fe80::1"),
        (six("::ffff:192.0.2.1"), "192.0.2.1"),
    ],
)
def test_internet_addresses_have_one_form(raw: bytes, address: str) -> None:
    assert addresses.internet(raw, TCP) == Endpoint(TCP, address, 80)
    assert addresses.internet(raw, UDP) == Endpoint(UDP, address, 80)


@pytest.mark.parametrize(
    ("raw", "errno"),
    [
        (b"", EINVAL),
        (b"\x02", EINVAL),
        (b"\x02\x00", EINVAL),
        (four("192.0.2.1")[:15], EINVAL),
        (six("::1", tail=b"")[:23], EINVAL),
        (b"\x63\x00" + bytes(14), EAFNOSUPPORT),
        (b"\x63\x00" + bytes(13), EINVAL),
        (b"\x01\x00/socket" + bytes(10), EAFNOSUPPORT),
        (b"\x00\x02" + bytes(14), EAFNOSUPPORT),
    ],
)
def test_what_is_no_internet_address_is_refused(raw: bytes, errno: int) -> None:
    with pytest.raises(OSError) as caught:
        addresses.internet(raw, TCP)
    assert caught.value.errno == errno


@pytest.mark.parametrize(
    ("given", "own", "reached"),
    [
        (four("0.0.0.0"), four("0.0.0.0"), four("127.0.0.1")),
        (four("0.0.0.0"), four("10.0.2.15"), four("10.0.2.15")),
        (four("0.0.0.0"), six("::"), four("127.0.0.1")),
        (four("0.0.0.0"), six("2001:db8::1"), four("127.0.0.1")),
        (four("0.0.0.0"), six("::ffff:10.0.2.15"), four("10.0.2.15")),
        (six("::"), six("::"), six("::1")),
        (six("::"), six("2001:db8::1"), six("::1")),
        (six("::"), six("::ffff:0.0.0.0"), six("::ffff:127.0.0.1")),
        (six("::"), six("::ffff:10.0.2.15"), six("::ffff:127.0.0.1")),
        (six("::ffff:0.0.0.0"), six("::"), six("::ffff:127.0.0.1")),
        (six("::ffff:0.0.0.0"), six("::ffff:10.0.2.15"), six("::ffff:10.0.2.15")),
    ],
)
def test_unspecified_destinations_are_written_out(given: bytes, own: bytes, reached: bytes) -> None:
    assert addresses.needs_own_address(given)
    assert addresses.destination(given, own) == reached
    assert not addresses.needs_own_address(reached)


def test_other_destinations_need_nothing() -> None:
    for raw in (four("127.0.0.1"), four("0.0.0.1"), six("::1"), six("::ffff:1.0.0.0"), six("::fffe:0.0.0.0")):
        assert not addresses.needs_own_address(raw)


def test_ports_that_need_a_capability() -> None:
    for port in (1, 22, 1023):
        with pytest.raises(OSError) as caught:
            addresses.check_port(Endpoint(TCP, "127.0.0.1", port))
        assert caught.value.errno == EACCES
    for port in (0, 1024, 65535):
        addresses.check_port(Endpoint(TCP, "127.0.0.1", port))


def test_netlink() -> None:
    assert addresses.netlink(b"\x10\0\0\0\x01\0\0\0\x02\0\0\0") == (1, 2)
    assert any(addresses.netlink(b"\x10\0\xff\xff" + bytes(7) + b"\x80"))
    with pytest.raises(OSError):
        addresses.netlink(b"\x10\0" + bytes(9))


@pytest.mark.parametrize(
    ("raw", "path"),
    [
        (b"\x01\0/run/s", "/run/s"),
        (b"\x01\0/run/s\0garbage", "/run/s"),
        (b"\x01\0" + b"/" * 108, "/" * 108),
        (b"\x01\0s", "/work/s"),
        (b"\x01\0\0name", "@name"),
        (b"\x01\0\0na\0me\0", r"@na\x00me\x00"),
        (b"\x01\0\0", "@"),
        (b"\x01\0", ""),
        (b"\x01\0/a\nb", r"/a\nb"),
        (b"\x01\0/\x1b[2J", r"/\x1b[2J"),
        (b"\x01\0/a\\nb", r"/a\\nb"),
        ("\x01\0/é".encode(), "/é"),
        (b"\x01\0/\xe9", r"/\xe9"),
        ("\x01\0/\u202etxt".encode(), r"/\xe2\x80\xaetxt"),
    ],
)
def test_unix_names(raw: bytes, path: str) -> None:
    assert addresses.unix(addresses.unix_name(raw), b"/work") == Endpoint(Transport.UNIX, path=path)


@pytest.mark.parametrize("raw", [b"", b"\x01", b"\x01\0" + b"x" * 109, b"\x02\0" + bytes(14), b"\0\x01x"])
def test_what_is_no_unix_name_is_refused(raw: bytes) -> None:
    with pytest.raises(OSError) as caught:
        addresses.unix_name(raw)
    assert caught.value.errno == EINVAL


def test_different_names_are_shown_differently() -> None:
    names = [bytes((b,)) for b in range(1, 256)] + [rb"\x01", rb"\n", "é".encode(), rb"\xe9", b"\\\\"]
    assert len({addresses.shown(name) for name in names}) == len(set(names))
