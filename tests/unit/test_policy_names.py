"""Names, addresses and networks: one form each, or a refusal."""

from __future__ import annotations

import ipaddress
import socket

import pytest
from hypothesis import example, given
from hypothesis import strategies as st

from corral.policy import names
from corral.policy.names import (
    address_and_port,
    address_of,
    canonical_address,
    canonical_name,
    canonical_network,
    joined,
)

MAPPED = ipaddress.ip_network("::ffff:0:0/96")

SAME_NAMES = {
    "github.com": [
        "github.com",
        "GitHub.COM",
        "github.com.",
        "GITHUB.com.",
        "\uff47ithub.com",
        "github。com",
        "gitHub\uff0ecom",
    ],
    "xn--mnchen-3ya.de": ["münchen.de", "MÜNCHEN.DE", "xn--mnchen-3ya.de", "XN--MNCHEN-3YA.de.", "mu\u0308nchen.de"],
    "xn--zca.de": ["ß.de", "xn--zca.de"],
    "_dmarc.example.org": ["_dmarc.example.org", "_DMARC.Example.org."],
    "r3---sn-4g5e6nsy.googlevideo.com": ["r3---sn-4g5e6nsy.googlevideo.com"],
    "localhost": ["localhost", "LOCALHOST."],
    "0xg": ["0xg"],
    "k.org": ["\u212a.org"],  # the Kelvin sign is a k
}


@pytest.mark.parametrize(
    ("canonical", "written"), [(name, written) for name, all_ in SAME_NAMES.items() for written in all_]
)
def test_all_ways_to_write_a_name_are_one(canonical: str, written: str) -> None:
    assert canonical_name(written) == canonical
    assert canonical_name(f"*.{written}", wildcard=True) == f"*.{canonical}"


REFUSED_NAMES = {
    "": "is empty",
    ".": "empty part",
    "..": "empty part",
    "a..b": "empty part",
    ".a": "empty part",
    "a.com..": "empty part",
    "a\0.com": "cannot be part",
    "a.com\0": "cannot be part",
    "a.com\n": "cannot be part",
    "a b.com": "cannot be part",
    " a.com": "cannot be part",
    "a\u00a0b.com": "not an international name|cannot be|cannot be seen",
    "a\u200b.com": "cannot be seen",
    "a\u202ecom": "cannot be seen",
    "user@a.com": "without the user",
    "https://a.com": "host alone",
    "a.com:443": "host alone",
    "a.com/x": "host alone",
    "[::1]": "host alone",
    "a*.com": "stands only for everything below",
    "*.a.com": "stands only for everything below",
    "-a.com": "neither begins nor ends",
    "a-.com": "neither begins nor ends",
    "0x7f.1": "ends in a number",
    "0x7f000001": "ends in a number",
    "0X7F.1.": "ends in a number",
    "2130706433": "ends in a number",
    "127.1": "ends in a number",
    "127.0.0.1": "ends in a number",
    "127.0.0.1.": "ends in a number",
    "0177.0.0.1": "ends in a number",
    "\uff11\uff12\uff17.0.0.1": "ends in a number",
    "a.0x": "ends in a number",
    "xn--a": "not an international name",
    "xn--github-": "not an international name",
    "xn--": "not an international name",
    "XN--GITHUB-.com": "not an international name",
    "x" * 64 + ".com": "longer than 63",
    "ü" * 64 + ".com": "longer than 63",
    ".".join(["a" * 60] * 5): "longer than a name can be",
    "a" * 100_000: "longer than a name can be",
    "xn--zca." * 31 + "abcdefg": "longer than a name can be",
    ".".join(["xn--zca"] * 9): "more than 8 international",
    ".".join(["XN--ZCA"] * 9): "more than 8 international",
    "\u3002".join(["\u00fc"] * 9): "more than 8 international",
    "ü" * 100_000: "longer than a name can be",
}


@pytest.mark.parametrize("written", REFUSED_NAMES, ids=lambda name: repr(name)[:40])
def test_what_is_no_name_or_could_be_read_as_an_address_is_refused(written: str) -> None:
    with pytest.raises(ValueError, match=REFUSED_NAMES[written]) as caught:
        canonical_name(written)
    assert str(caught.value).isprintable() and len(str(caught.value)) < 400


def test_a_name_may_have_all_that_one_can_have() -> None:
    longest = ".".join(["a" * 61] * 4) + ".abcde"
    assert len(longest) == 253 and canonical_name(f"{longest}.") == longest
    assert canonical_name(f"*.{longest}.", wildcard=True) == f"*.{longest}"
    assert canonical_name(".".join(["\u00df"] * 8 + ["de"])) == "xn--zca." * 8 + "de"


@pytest.mark.parametrize("letters", ["xn--zca." * 31 + "abcdefg", ".".join(["xn--zca"] * 9)])
def test_what_is_too_much_is_refused_before_it_is_checked(letters: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(names, "_international_label", pytest.fail)
    with pytest.raises(ValueError):
        canonical_name(letters)


@pytest.mark.parametrize("written", ["*", "*.", "*.*.a", "*.127.0.0.1", "**.a", "*a.com"])
def test_a_wildcard_is_one_star_before_a_name(written: str) -> None:
    with pytest.raises(ValueError):
        canonical_name(written, wildcard=True)


NAME_CHARACTERS = st.one_of(st.sampled_from("aAzZ09-_.xnß。\uff0e\u0661"), st.characters())


@given(st.text(NAME_CHARACTERS, max_size=30))
@example("XN--MNCHEN-3YA.de")
@example("\u1e9e.de")
def test_a_name_that_is_accepted_is_in_its_one_form(written: str) -> None:
    try:
        name = canonical_name(written)
    except ValueError:
        return
    assert canonical_name(name) == name
    assert canonical_name(f"{name}.") == canonical_name(name.upper()) == name
    assert name.isascii() and name == name.lower() and not name.endswith(".")
    assert 1 <= len(name) <= 253 and all(1 <= len(label) <= 63 for label in name.split("."))
    assert not set(name) - set("abcdefghijklmnopqrstuvwxyz0123456789-_.")
    with pytest.raises(OSError):
        socket.inet_aton(name)  # no loose form of an address gets through


# ---- addresses ----

SAME_ADDRESSES = {
    "127.0.0.1": ["127.0.0.1", "::ffff:127.0.0.1", "::FFFF:7F00:1", "0:0:0:0:0:ffff:7f00:0001"],
    "2001:db8::1": ["2001:db8::1", "2001:DB8:0:0:0:0:0:1", "2001:0db8::0001"],
    "::1": ["::1", "0:0:0:0:0:0:0:1"],
    "0.0.0.0": ["0.0.0.0", "::ffff:0:0"],
}


@pytest.mark.parametrize(
    ("canonical", "written"), [(address, each) for address, all_ in SAME_ADDRESSES.items() for each in all_]
)
def test_all_ways_to_write_an_address_are_one(canonical: str, written: str) -> None:
    assert canonical_address(written) == canonical
    assert canonical_network(written) == f"{canonical}/{128 if ':' in canonical else 32}"


@pytest.mark.parametrize(
    "written",
    [
        "",
        "127.1",
        "0x7f.1",
        "2130706433",
        "0177.0.0.1",
        "127.0.0.01",
        "1.2.3.4.5",
        " 1.2.3.4",
        "1.2.3.4\n",
        "1.2.3.4\0",
        "fe80::1%eth0",
        "fe80::1%1",
        "::1%",
        "[::1]",
        "1.2.3.4:80",
        "::g",
        "\u0661\u0662\u0667.0.0.1",
        "1.2.3.4/32",
        "a.com",
    ],
)
def test_loose_forms_zones_and_other_things_are_no_addresses(written: str) -> None:
    with pytest.raises(ValueError, match=r"not an address|zone"):
        canonical_address(written)


@given(st.ip_addresses())
def test_an_address_is_what_the_standard_library_takes_it_for(address: ipaddress.IPv4Address) -> None:
    mapped = getattr(address, "ipv4_mapped", None)
    text = canonical_address(str(address))
    assert ipaddress.ip_address(text) == (mapped or address)
    assert canonical_address(text) == canonical_address(address.exploded) == address_of(address.packed) == text


@given(st.ip_addresses(), st.integers(0, 128))
@example(ipaddress.ip_address("::ffff:1f:ffff"), 108)
def test_a_network_begins_where_it_says(address: ipaddress.IPv4Address, prefix: int) -> None:
    prefix = min(prefix, address.max_prefixlen)
    network = ipaddress.ip_network((address, prefix), strict=False)
    if network.version == 6 and network.overlaps(MAPPED):
        if prefix < MAPPED.prefixlen:
            return  # holds others, too: not a network of either kind
        expected = ipaddress.ip_network((network.network_address.packed[12:], prefix - MAPPED.prefixlen))
    else:
        expected = network
    text = canonical_network(str(network))
    assert ipaddress.ip_network(text) == expected
    assert canonical_network(text) == text
    if address != network.network_address:
        with pytest.raises(ValueError, match="beginning of its network") as caught:
            canonical_network(f"{address}/{prefix}")
        assert text in str(caught.value)


@pytest.mark.parametrize(
    ("written", "canonical"), [("::ffff:192.0.2.0/120", "192.0.2.0/24"), ("0.0.0.0/0", "0.0.0.0/0"), ("::/0", "::/0")]
)
def test_networks_of_mapped_addresses_are_ipv4(written: str, canonical: str) -> None:
    assert canonical_network(written) == canonical


@pytest.mark.parametrize(
    "written",
    [
        "192.0.2.0/",
        "192.0.2.0/33",
        "192.0.2.0/08",
        "192.0.2.0/+8",
        "192.0.2.0/-1",
        "192.0.2.0/255.255.255.0",
        "/8",
        "192.0.2.0/24/24",
        "::/129",
        "::ffff:0:0/95",
        "192.0.2.0/" + "9" * 10_000,
        "192.0.2.0/\u0668",
        "a.com/8",
    ],
)
def test_what_is_no_network_is_refused(written: str) -> None:
    with pytest.raises(ValueError) as caught:
        canonical_network(written)
    assert len(str(caught.value)) < 300


# ---- addresses with ports ----


@given(st.ip_addresses(), st.integers(1, 65535))
def test_an_address_and_a_port_come_back(address: ipaddress.IPv4Address | ipaddress.IPv6Address, port: int) -> None:
    known = canonical_address(str(address)) if "%" not in str(address) else "::1"
    assert address_and_port(joined(known, port)) == (known, port)
    assert address_and_port(known, 53) == (known, 53)


def test_an_address_may_have_the_port_that_is_meant() -> None:
    assert address_and_port("[2001:DB8::1]", 53) == ("2001:db8::1", 53)
    assert address_and_port("::ffff:192.0.2.1", 53) == ("192.0.2.1", 53)
    with pytest.raises(ValueError, match="has no port"):
        address_and_port("192.0.2.1")


@pytest.mark.parametrize(
    "text",
    [
        "",
        ":",
        ":53",
        "a.org:53",
        "192.0.2.1:",
        "192.0.2.1:0",
        "192.0.2.1:65536",
        "192.0.2.1:\u0665",
        "192.0.2.1:+5",
        "127.1:53",
        "[192.0.2.1]:53",
        "[::1",
        "[::1]53",
        "[::1]:",
        "::1]:53",
        "[fe80::1%eth0]:53",
        "0x7f000001:53",
    ],
)
def test_what_is_no_address_with_a_port(text: str) -> None:
    with pytest.raises(ValueError):
        address_and_port(text, 53)


@given(st.text(max_size=30) | st.text("[]:.0123456789abf%", max_size=30))
def test_no_text_makes_the_reader_of_addresses_fail_otherwise(text: str) -> None:
    try:
        address, port = address_and_port(text, 53)
    except ValueError as error:
        assert str(error).isprintable()
    else:
        assert canonical_address(address) == address and 1 <= port <= 65535
