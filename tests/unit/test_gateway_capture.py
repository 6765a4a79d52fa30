"""The messages that load routes and rules, taken apart again with a reader of its own.

That the kernel takes them, and what they do, is tests/contain/test_gateway_capture.py.
"""

from __future__ import annotations

import re
import socket
import struct
import subprocess
import sys
from collections.abc import Iterator
from ipaddress import IPv4Network, IPv6Network, ip_address

import pytest

from corral.gateway import capture
from corral.gateway.capture import Netlink, redirect_messages, route_messages
from corral.gateway.names import Names

ACK, REQUEST, NESTED = 4, 1, 0x8000


def messages(netlink: Netlink) -> list[tuple[int, int, bytes]]:
    """Type, flags and body of each; nothing is left over."""
    found, rest = [], netlink.messages
    while rest:
        length, kind, flags, sequence, port = struct.unpack_from("=IHHII", rest)
        assert 16 <= length <= len(rest)
        assert length % 4 == 0
        assert (sequence, port) == (0, 0)
        found.append((kind, flags, rest[16:length]))
        rest = rest[length:]
    return found


def attributes(data: bytes) -> Iterator[tuple[int, bytes]]:
    """Each with its type; those within the nested ones are the caller's."""
    while data:
        length, kind = struct.unpack_from("=HH", data)
        assert 4 <= length <= len(data)
        yield kind & ~NESTED, data[4:length]
        data = data[length + -length % 4 :]


def expressions(rule: bytes) -> list[tuple[str, dict[int, bytes]]]:
    """Name and attributes of each expression of a rule."""
    found = []
    for kind, element in attributes(dict(attributes(rule))[4]):
        assert kind == 1
        parts = dict(attributes(element))
        found.append((parts[1].rstrip(b"\0").decode(), dict(attributes(parts.get(2, b"")))))
    return found


@pytest.mark.parametrize("netlink", [route_messages(), redirect_messages()])
def test_as_many_answers_are_awaited_as_asked_for(netlink: Netlink) -> None:
    flags = [flags for _, flags, _ in messages(netlink)]
    assert all(each & REQUEST for each in flags)
    assert sum(bool(each & ACK) for each in flags) == netlink.acknowledgements
    assert netlink.acknowledgements <= 64
    assert len(netlink.messages) <= 16384


def test_every_address_of_both_families_is_local() -> None:
    found = [message for message in messages(route_messages()) if message[0] != 20]
    assert route_messages().protocol == 0
    assert [body[0] for _, _, body in found] == [socket.AF_INET, socket.AF_INET6]
    for kind, _, body in found:
        family, to_bits, from_bits, tos, table, _, _, route_type, flags = struct.unpack_from("=BBBBBBBBI", body)
        assert kind == 24  # RTM_NEWROUTE
        assert (to_bits, from_bits, tos, table, route_type, flags) == (0, 0, 0, 255, 2, 0), family
        assert dict(attributes(body[12:])) == {4: struct.pack("=I", 1)}  # RTA_OIF: lo


def test_the_device_has_an_address_of_each_family_that_stands_for_no_name() -> None:
    found = [body for kind, _, body in messages(route_messages()) if kind == 20]  # RTM_NEWADDR
    for body, own in zip(found, (capture.OWN4, capture.OWN6), strict=True):
        family, bits, flags, scope, index = struct.unpack_from("=BBBBI", body)
        packed = socket.inet_pton(family, own)
        assert (bits, flags, scope, index) == (8 * len(packed), 0, 0, 1)
        assert dict(attributes(body[8:])) == {2: packed, 1: packed}
        names = Names(limit=1)
        assert packed not in names.addresses("a.test")
        assert names.name_of(packed) is None


def test_rules_are_one_batch_and_as_many_as_documented() -> None:
    first, *changes, last = messages(redirect_messages())
    assert redirect_messages().protocol == 12
    assert (first[0], last[0]) == (0x10, 0x11)
    kinds = [kind & 0xFF for kind, _, _ in changes]
    assert all(kind >> 8 == 10 and body[0] == 1 for kind, _, body in changes)  # nf_tables, inet
    lines = [line.strip() for line in capture.RULESET.splitlines()]
    assert kinds.count(0) == sum(line.startswith("table") for line in lines) == 1
    assert kinds.count(3) == sum(line.startswith("chain") for line in lines) == 3
    rules = [line for line in lines if line and not re.match(r"table|chain|type|\}", line)]
    assert kinds.count(6) == len(rules)


def test_what_leaves_is_dropped_unless_a_rule_says_otherwise() -> None:
    chains = [dict(attributes(body[4:])) for kind, _, body in messages(redirect_messages()) if kind & 0xFF == 3]
    policies = {chain[3].rstrip(b"\0").decode(): int.from_bytes(chain[5], "big") for chain in chains}
    assert policies == {"untracked": 1, "redirect": 1, "confine": 0}
    hooks = {chain[3].rstrip(b"\0").decode(): dict(attributes(chain[4])) for chain in chains}
    assert {name: struct.unpack(">i", hook[2])[0] for name, hook in hooks.items()} == {
        "untracked": -300,
        "redirect": -100,
        "confine": 0,
    }
    assert {hook[1] for hook in hooks.values()} == {struct.pack(">I", 3)}  # NF_INET_LOCAL_OUT


def test_the_last_expression_of_each_rule_is_what_it_does() -> None:
    rules = [body[4:] for kind, _, body in messages(redirect_messages()) if kind == 10 << 8 | 6]
    last = [expressions(rule)[-1][0] for rule in rules]
    assert last == ["notrack"] * 3 + ["immediate", "immediate", "redir"] + ["immediate"] * 6
    port = expressions(rules[5])[-2][1][2]
    assert dict(attributes(port))[1] == struct.pack(">H", capture.CAPTURE_PORT)


def test_each_family_s_address_is_compared_only_in_its_own_packets() -> None:
    """In an inet table the header is that of either; byte 16 of an IPv6 header lies within its source address."""
    for kind, _, body in messages(redirect_messages()):
        if kind != 10 << 8 | 6:
            continue
        family = None
        for name, parts in expressions(body[4:]):
            if name == "meta":
                asked = int.from_bytes(parts[2], "big")
            elif name == "cmp" and asked == 15:
                family, asked = dict(attributes(parts[3]))[1], 0
            elif name == "payload" and parts[2] == struct.pack(">I", 1):  # of the network header
                offset, length = (int.from_bytes(parts[index], "big") for index in (3, 4))
                assert (family, offset, length) in ((b"\x02", 16, 1), (b"\x0a", 24, 16))


def test_the_constants_belong_together() -> None:
    assert 0 < capture.CAPTURE_PORT < 1024  # no agent may bind it
    assert ip_address(capture.RESOLVER4) in IPv4Network(capture.POOL4)
    assert ip_address(capture.RESOLVER6) in IPv6Network(capture.POOL6)
    assert set(re.findall(r":(\d+)", capture.RULESET.replace("::1", ""))) == {str(capture.CAPTURE_PORT)}


def test_it_is_loaded_without_what_takes_long() -> None:
    heavy = "asyncio,ssl,dns,h11,cryptography,pyroute2,ipaddress"
    code = f"import sys, corral.gateway.capture; sys.exit(' '.join({{*sys.modules}} & {{*{heavy!r}.split(',')}}) or 0)"
    done = subprocess.run([sys.executable, "-c", code], check=False, capture_output=True, text=True)
    assert (done.returncode, done.stderr) == (0, "")
