"""Names and the addresses that stand for them: one pair each, never a second name."""

from __future__ import annotations

import ipaddress
import sys
import threading
from socket import AF_INET, AF_INET6, inet_pton

import pytest
from hypothesis import given
from hypothesis import strategies as st

from corral.gateway.names import MAX_NAMES, POOL4, POOL6, Names, NamesFull

NETWORK4 = ipaddress.ip_network(POOL4)
NETWORK6 = ipaddress.ip_network(POOL6)
RESOLVER4 = inet_pton(AF_INET, "198.18.0.53")
RESOLVER6 = inet_pton(AF_INET6, "fd63:6f72:7261:6c00::53")
MAPPED = bytes(10) + b"\xff\xff"


def test_the_first_names_have_the_first_addresses() -> None:
    names = Names()
    assert names.addresses("a.example") == (
        inet_pton(AF_INET, "198.18.1.1"),
        inet_pton(AF_INET6, "fd63:6f72:7261:6c00::1:1"),
    )
    assert names.addresses("b.example") == (
        inet_pton(AF_INET, "198.18.1.2"),
        inet_pton(AF_INET6, "fd63:6f72:7261:6c00::1:2"),
    )
    assert names.addresses("a.example").ipv4 == inet_pton(AF_INET, "198.18.1.1")


@pytest.fixture(scope="module")
def full() -> Names:
    names = Names()
    for number in range(MAX_NAMES):
        names.addresses(f"n{number}.example")
    return names


def test_all_names_have_addresses_of_their_own_within_the_pools(full: Names) -> None:
    pairs = [full.addresses(f"n{number}.example") for number in range(MAX_NAMES)]
    assert len({pair.ipv4 for pair in pairs}) == len({pair.ipv6 for pair in pairs}) == MAX_NAMES
    taken = {pair.ipv4 for pair in pairs} | {pair.ipv6 for pair in pairs}
    assert RESOLVER4 not in taken
    assert RESOLVER6 not in taken
    assert not {pair.ipv4[3] for pair in pairs} & {0, 255}
    for number, pair in enumerate(pairs):
        assert int.from_bytes(pair.ipv4, "big") <= int(NETWORK4.broadcast_address)
        assert full.is_synthetic(pair.ipv4) and full.is_synthetic(pair.ipv6)
        name = f"n{number}.example"
        assert full.name_of(pair.ipv4) == full.name_of(pair.ipv6) == full.name_of(MAPPED + pair.ipv4) == name


@pytest.mark.parametrize("address", ["198.18.1.0", "198.18.1.255", "198.18.77.255", "198.19.0.0", "198.18.0.53"])
def test_addresses_between_those_in_use_stay_without_a_name(full: Names, address: str) -> None:
    assert full.name_of(inet_pton(AF_INET, address)) is None


def test_one_name_too_many_is_refused_and_changes_nothing(full: Names) -> None:
    before = full.addresses("n0.example")
    with pytest.raises(NamesFull, match="65536"):
        full.addresses("more.example")
    assert len(full) == MAX_NAMES
    assert full.addresses("n0.example") == before


def test_no_caller_gets_more_names_than_the_pools_have() -> None:
    assert Names(limit=10**9)._limit == MAX_NAMES


@pytest.mark.parametrize(
    "address",
    [
        "198.18.0.0",
        "198.18.0.53",
        "198.18.1.0",
        "198.18.1.2",
        "198.18.1.255",
        "198.18.2.1",
        "198.19.255.255",
        "198.17.255.255",
        "198.20.0.0",
        "0.0.0.0",
        "255.255.255.255",
        "fd63:6f72:7261:6c00::",
        "fd63:6f72:7261:6c00::53",
        "fd63:6f72:7261:6c00::1:0",
        "fd63:6f72:7261:6c00::1:2",
        "fd63:6f72:7261:6c00:ffff:ffff:ffff:ffff",
        "fd63:6f72:7261:6c01::1:1",
        "::1:1",
        "::198.18.1.1",
        "64:ff9b::198.18.1.1",
        "::ffff:198.18.1.2",
    ],
)
def test_other_addresses_have_no_name(address: str) -> None:
    names = Names()
    names.addresses("a.example")
    family = AF_INET6 if ":" in address else AF_INET
    assert names.name_of(inet_pton(family, address)) is None


@given(st.one_of(st.binary(max_size=20), st.binary(min_size=4, max_size=4), st.binary(min_size=16, max_size=16)))
def test_what_is_synthetic_is_what_the_pools_hold(packed: bytes) -> None:
    expected = False
    if len(packed) == 4:
        expected = ipaddress.IPv4Address(packed) in NETWORK4
    elif len(packed) == 16:
        address = ipaddress.IPv6Address(packed)
        expected = address in NETWORK6 or (address.ipv4_mapped is not None and address.ipv4_mapped in NETWORK4)
    assert Names.is_synthetic(packed) is expected


@pytest.mark.parametrize("address", ["198.18.0.0", "198.18.0.53", "198.19.255.255", "::ffff:198.19.0.1"])
def test_the_pool_is_synthetic_also_where_nothing_was_given_out(address: str) -> None:
    assert Names.is_synthetic(inet_pton(AF_INET6 if ":" in address else AF_INET, address))


@pytest.mark.parametrize("name", ["A.example", "a.example.", "", "127.1", "a b.example", "*.example", "a\0.example"])
def test_another_form_of_a_name_gets_no_addresses(name: str) -> None:
    names = Names()
    with pytest.raises(ValueError):
        names.addresses(name)
    assert len(names) == 0


def test_threads_that_race_for_the_same_names_get_the_same_addresses() -> None:
    before = sys.getswitchinterval()
    sys.setswitchinterval(1e-6)
    try:
        _race()
    finally:
        sys.setswitchinterval(before)


def _race() -> None:
    names = Names(limit=2000)
    wanted = [f"n{number}.example" for number in range(2000)]
    results: list[list[bytes]] = [[] for _ in range(8)]
    barrier = threading.Barrier(8)

    def run(mine: list[bytes], order: int) -> None:
        barrier.wait()
        for name in wanted if order % 2 else reversed(wanted):
            pair = names.addresses(name)
            assert names.name_of(pair.ipv6) == name
            mine.append(pair.ipv4)

    threads = [threading.Thread(target=run, args=(mine, order)) for order, mine in enumerate(results)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    forward = [result if order % 2 else result[::-1] for order, result in enumerate(results)]
    assert all(result == forward[0] for result in forward)
    assert len(set(forward[0])) == len(names) == 2000


def test_adding_waits_for_its_turn_and_finding_does_not() -> None:
    names = Names()
    known = names.addresses("a.example")
    adder = threading.Thread(target=names.addresses, args=("b.example",))
    with names._lock:
        adder.start()
        adder.join(0.2)
        assert adder.is_alive()
        assert names.addresses("a.example") == known
        assert names.name_of(known.ipv4) == "a.example"
        assert len(names) == 1
    adder.join(10)
    assert len(names) == 2
