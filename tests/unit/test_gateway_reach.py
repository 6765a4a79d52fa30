"""Which addresses are protected, however they are written."""

from __future__ import annotations

import errno
import socket
import struct

import pytest

from corral.gateway.reach import _leads_away, why_protected


def packed(text: str) -> bytes:
    return socket.inet_pton(socket.AF_INET6 if ":" in text else socket.AF_INET, text)


@pytest.mark.parametrize(
    "address",
    [
        "0.0.0.0",
        "10.0.0.1",
        "100.100.100.200",
        "127.0.0.1",
        "127.255.255.254",
        "168.63.129.16",
        "169.254.169.254",
        "172.16.0.1",
        "172.31.255.255",
        "192.168.1.1",
        "192.0.0.192",
        "198.18.0.53",
        "198.19.255.255",
        "224.0.0.251",
        "239.255.255.255",
        "255.255.255.255",
        "::",
        "::1",
        "::127.0.0.1",
        "::ffff:127.0.0.1",
        "::ffff:169.254.169.254",
        "64:ff9b::7f00:1",
        "64:ff9b::a9fe:a9fe",
        "64:ff9b:1::1",
        "2002:7f00:1::",
        "2002:a9fe:a9fe::1",
        "2001:0:4136:e378:8000:63bf:3fff:fdd2",
        "fc00::1",
        "fd00:ec2::254",
        "fd63:6f72:7261:6c00::1",
        "fe80::1",
        "fec0::1",
        "ff02::1",
    ],
)
def test_protected(address: str) -> None:
    assert why_protected(packed(address))


def test_the_hosts_own_addresses_are_protected() -> None:
    assert not _leads_away(packed("127.0.0.1"))
    assert not _leads_away(packed("::1"))
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as probe:
        try:
            probe.connect(("198.51.100.77", 9))  # sends nothing; says which of its addresses the host would use
        except OSError:
            pytest.skip("this machine has no IPv4 route, so no address of its own but loopback's")
        own = packed(probe.getsockname()[0])
    assert why_protected(own)


@pytest.mark.parametrize("form", ["::ffff:203.0.113.7", "64:ff9b::203.0.113.7", "2002:cb00:7107::1"])
def test_the_hosts_own_addresses_are_protected_in_every_form(monkeypatch: pytest.MonkeyPatch, form: str) -> None:
    """The routes of IPv6 do not know an IPv4 address of the host's; an AAAA record can hold it."""
    own = packed("203.0.113.7")
    monkeypatch.setattr("corral.gateway.reach._leads_away", lambda asked: asked != own)
    assert why_protected(own) == why_protected(packed(form)) == "the host itself"
    assert why_protected(packed("::ffff:203.0.113.8")) == ""


def test_public_addresses_are_not(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("corral.gateway.reach._leads_away", lambda _: True)
    for address in ("203.0.113.80", "198.51.100.7", "2001:db8::1", "64:ff9b::cb00:7150", "2002:cb00:7150::1"):
        assert why_protected(packed(address)) == ""


def test_without_a_route_nobody_is_reached(monkeypatch: pytest.MonkeyPatch) -> None:
    """A host without IPv6, or with a proxy only: that is no refusal."""

    class Answers:
        def __init__(self, *_: object) -> None:
            pass

        def __enter__(self) -> Answers:
            return self

        def __exit__(self, *_: object) -> None:
            pass

        def sendto(self, *_: object) -> None:
            pass

        def recv(self, *_: object) -> bytes:
            return struct.pack("=IHHIIi", 36, 2, 0, 1, 0, -code) + bytes(16)

    monkeypatch.setattr("corral.gateway.reach.socket.socket", Answers)
    code = errno.ENETUNREACH
    assert why_protected(packed("2001:db8::1")) == ""
    assert why_protected(packed("10.0.0.1"))
    code = errno.EPERM
    assert why_protected(packed("2001:db8::1"))


def test_no_answer_of_the_kernel_means_protected(monkeypatch: pytest.MonkeyPatch) -> None:
    class Broken:
        def __init__(self, *_: object) -> None:
            raise OSError

    monkeypatch.setattr("corral.gateway.reach.socket.socket", Broken)
    assert why_protected(packed("203.0.113.80")) == "the host itself"
