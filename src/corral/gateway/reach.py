"""Which addresses are dialled only where a policy names them, whatever name led there.

A name that an agent may reach is somebody's to point anywhere: at the host's loopback, at its cloud's metadata, at the
network around it (DNS rebinding). So the address is looked at after it was resolved, each time it is dialled. Two
sources: the table below, and the kernel's own routes, which know what addresses this host has.
"""

from __future__ import annotations

import socket
import struct
import sys
from errno import EHOSTUNREACH, ENETUNREACH
from functools import lru_cache
from ipaddress import IPv4Address, IPv4Network, IPv6Address, IPv6Network

from corral.policy.names import unmapped

# IANA's special-purpose registries (RFC 6890), without the documentation networks, which lead nowhere, and with what
# clouds have put at public addresses.
_PROTECTED4 = tuple(
    (IPv4Network(network), why)
    for network, why in (
        ("0.0.0.0/8", "the host itself"),
        ("10.0.0.0/8", "a private network"),
        ("100.64.0.0/10", "a provider's own network"),
        ("127.0.0.0/8", "the host's loopback"),
        ("168.63.129.16/32", "a cloud's metadata"),  # Azure's
        ("169.254.0.0/16", "link-local, where clouds have their metadata"),
        ("172.16.0.0/12", "a private network"),
        ("192.0.0.0/24", "reserved for protocols"),
        ("192.88.99.0/24", "a relay into IPv6"),
        ("192.168.0.0/16", "a private network"),
        ("198.18.0.0/15", "reserved for tests, and our own"),
        ("224.0.0.0/4", "multicast"),
        ("240.0.0.0/4", "reserved"),
    )
)
_PROTECTED6 = tuple(
    (IPv6Network(network), why)
    for network, why in (
        ("::/96", "the host itself, or IPv4 in an old notation"),
        ("64:ff9b:1::/48", "IPv4 behind a local translator"),
        ("100::/64", "a black hole"),
        ("2001::/23", "reserved for protocols"),  # Teredo, ORCHID, ...
        ("fc00::/7", "a private network"),
        ("fe80::/10", "link-local"),
        ("fec0::/10", "site-local"),
        ("ff00::/8", "multicast"),
    )
)
_TRANSLATED = IPv6Network("64:ff9b::/96")
"""IPv4 addresses behind NAT64 (RFC 6052): the last four bytes."""
_SIX_TO_FOUR = IPv6Network("2002::/16")
"""IPv4 addresses in front of a network (RFC 3056): the four bytes after the first two."""

_REQUEST = struct.Struct("=IHHII8BI")  # struct nlmsghdr, struct rtmsg
_ATTRIBUTE = struct.Struct("=HH")
_RTM_NEWROUTE, _RTM_GETROUTE, _NLM_F_REQUEST, _RTA_DST = 24, 26, 1, 1
_TYPE_OFFSET = 16 + 7
"""Of ``rtm_type`` in an answer."""
_RTN_UNICAST = 1
_NLMSG_ERROR = 2


def why_protected(packed: bytes) -> str:
    """Why this address (4 or 16 bytes) may be dialled only where a policy names it, or ``""``.

    An IPv4 address in IPv6's notation (RFC 4291, section 2.5.5.2) is judged as the IPv4 address that is dialled: asked
    for the route of one of the host's own, the kernel has the one of IPv6, which leads away.
    """
    packed = unmapped(packed)
    return _special(packed) or ("" if all(map(_leads_away, _ends(packed))) else "the host itself")


def _ends(packed: bytes) -> tuple[bytes, ...]:
    """Where packets for an address may end up: there, and at the IPv4 address that a translator makes of it."""
    if len(packed) == 16 and IPv6Address(packed) in _TRANSLATED:
        return packed, packed[12:]
    if len(packed) == 16 and IPv6Address(packed) in _SIX_TO_FOUR:
        return packed, packed[2:6]
    return (packed,)


@lru_cache(maxsize=4096)
def _special(packed: bytes) -> str:
    if len(packed) == 4:
        address4 = IPv4Address(packed)
        return next((why for network, why in _PROTECTED4 if address4 in network), "")
    address6 = IPv6Address(packed)
    if address6 in _TRANSLATED:
        return _special(packed[12:])
    if address6 in _SIX_TO_FOUR:
        return _special(packed[2:6])
    return next((why for network, why in _PROTECTED6 if address6 in network), "")


def _leads_away(packed: bytes) -> bool:
    """Whether the kernel would send a packet for this address to another host, or to nobody (rtnetlink(7),
    RTM_GETROUTE).

    Everything else is no: the host's own addresses, broadcasts, an answer that cannot be read.
    """
    family = socket.AF_INET if len(packed) == 4 else socket.AF_INET6
    attribute = _ATTRIBUTE.pack(_ATTRIBUTE.size + len(packed), _RTA_DST) + packed
    length = _REQUEST.size + len(attribute)
    header = (length, _RTM_GETROUTE, _NLM_F_REQUEST, 1, 0)
    request = _REQUEST.pack(*header, family, 8 * len(packed), 0, 0, 0, 0, 0, 0, 0) + attribute
    try:
        with socket.socket(socket.AF_NETLINK, socket.SOCK_RAW | socket.SOCK_CLOEXEC, socket.NETLINK_ROUTE) as route:
            route.sendto(request, (0, 0))
            answer = route.recv(4096, socket.MSG_DONTWAIT)  # the kernel answers within the call that asks
    except OSError:
        return False
    if len(answer) < _TYPE_OFFSET + 1:
        return False
    kind = int.from_bytes(answer[4:6], sys.byteorder)
    if kind == _NLMSG_ERROR:  # struct nlmsgerr; nobody is reached by an address without a route, but maybe by a proxy
        return -int.from_bytes(answer[16:20], sys.byteorder, signed=True) in (ENETUNREACH, EHOSTUNREACH)
    return kind == _RTM_NEWROUTE and answer[_TYPE_OFFSET] == _RTN_UNICAST
