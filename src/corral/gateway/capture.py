"""How everything that a sandbox sends ends up at the gateway: routes and rules of its network namespace.

The namespace has a loopback device and nothing else. All addresses are made local to it, so whatever is sent arrives at
loopback instead of failing for want of a route (RTN_LOCAL in the local table: Linux calls this AnyIP)::

    local 0.0.0.0/0 dev lo table local scope host
    local ::/0 dev lo table local

and this is what happens to it on the way out (:data:`RULESET`, as ``nft list ruleset`` shows it): TCP to any address
and port arrives at the listeners on 127.0.0.1 and ::1, where SO_ORIGINAL_DST tells where it was meant to go. DNS needs
no rule: every address is local, so sockets that are bound to port 53 of the wildcard address receive it, and PKTINFO
tells where it was meant to go. The last chain says what may be sent at all, whatever the supervisor let pass: what
stays on 127.0.0.0/8 and ::1, TCP, errors of ICMPv6, and UDP from and to port 53. The rest is dropped, and its sender is
told EPERM. The first chain keeps all that is not redirected out of the connection table: its entries are memory of the
host that no limit of the sandbox counts, and its buckets are the host's own. What comes from port 1023 are answers to
redirected connections, also where the client's own address is a loopback one; what goes there by itself is entered, or
the answers alone would be, and SO_ORIGINAL_DST would then be the address that the client has bound: any that it likes.

The launcher sends these messages inside, before it gives up its capabilities (STEP_NETLINK); nobody has them later, so
neither routes, rules nor the device can be changed, and ports below 1024 cannot be bound. They are packed by hand here,
without any library: they are constants, and importing pyroute2 alone takes longer than a whole start of a sandbox.

Sources: rtnetlink(7), linux/rtnetlink.h, linux/netfilter/nfnetlink.h, linux/netfilter/nf_tables.h.
"""

from __future__ import annotations

import functools
import socket
import struct
from typing import Final, NamedTuple

CAPTURE_PORT: Final = 1023
"""Of the TCP listeners. Below 1024: no agent can bind it, when it is free."""
DNS_PORT: Final = 53
BACKLOG: Final = 4096
"""Of the TCP listeners; the most that a new network namespace grants (net.core.somaxconn)."""

POOL4: Final = "198.18.0.0/15"
"""Where names are put: set apart for tests of devices (RFC 2544), on no network that anybody is on."""
POOL6: Final = "fd63:6f72:7261:6c00::/64"
"""The same: unique local addresses (RFC 4193) with "corral" for the number."""
OWN4: Final = "198.18.0.1"
OWN6: Final = "fd63:6f72:7261:6c00::1"
"""The sandbox's own addresses; no name is ever put there."""
RESOLVER4: Final = "198.18.0.53"
RESOLVER6: Final = "fd63:6f72:7261:6c00::53"

RULESET: Final = """table inet corral {
	chain untracked {
		type filter hook output priority raw; policy accept;
		meta l4proto != tcp notrack
		tcp sport != 1023 tcp dport != 1023 ip daddr 127.0.0.0/8 notrack
		tcp sport != 1023 tcp dport != 1023 ip6 daddr ::1 notrack
	}

	chain redirect {
		type nat hook output priority -100; policy accept;
		ip daddr 127.0.0.0/8 return
		ip6 daddr ::1 return
		meta l4proto tcp redirect to :1023
	}

	chain confine {
		type filter hook output priority filter; policy drop;
		ip daddr 127.0.0.0/8 accept
		ip6 daddr ::1 accept
		meta l4proto tcp accept
		meta l4proto ipv6-icmp accept
		udp dport 53 accept
		udp sport 53 accept
	}
}
"""

_TABLE = "corral"
_LOOPBACK_INDEX = 1  # the first device of every network namespace (LOOPBACK_IFINDEX)

# linux/netlink.h
_REQUEST, _ACK, _EXCL, _CREATE, _APPEND = 0x1, 0x4, 0x200, 0x400, 0x800
_NESTED = 0x8000
_ROUTE_PROTOCOL, _NETFILTER_PROTOCOL = 0, 12
_NEWADDR, _IFA_ADDRESS, _IFA_LOCAL = 20, 1, 2  # linux/if_addr.h
# linux/rtnetlink.h
_NEWROUTE, _TABLE_LOCAL, _STATIC, _SCOPE_UNIVERSE, _SCOPE_HOST, _LOCAL, _OIF = 24, 255, 4, 0, 254, 2, 4
# linux/netfilter.h, linux/netfilter/nfnetlink.h
_INET, _IPV4, _IPV6, _LOCAL_OUT = 1, 2, 10, 3
_NFTABLES, _BATCH_BEGIN, _BATCH_END = 10, 0x10, 0x11
# linux/netfilter/nf_tables.h
_NEW_TABLE, _NEW_CHAIN, _NEW_RULE = 0, 3, 6
_DROP, _ACCEPT, _RETURN = 0, 1, -5
_VERDICT_REGISTER, _REGISTER = 0, 1
_META_NFPROTO, _META_L4PROTO = 15, 16
_NETWORK_HEADER, _TRANSPORT_HEADER = 1, 2
_PROTO_SPECIFIED = 2  # linux/netfilter/nf_nat.h


class Netlink(NamedTuple):
    """Messages for one netlink socket, as :meth:`corral.sandbox.plan.Plan.netlink` takes them."""

    protocol: int
    messages: bytes
    acknowledgements: int
    """How many of the messages ask for an answer."""


def _attribute(kind: int, value: bytes) -> bytes:
    """Length, type, value, padded to four bytes (netlink(7))."""
    return struct.pack("=HH", 4 + len(value), kind) + value + bytes(-len(value) % 4)


def _nest(kind: int, *attributes: bytes) -> bytes:
    return _attribute(kind | _NESTED, b"".join(attributes))


def _text(kind: int, value: str) -> bytes:
    return _attribute(kind, value.encode("ascii") + b"\0")


def _number(kind: int, value: int) -> bytes:
    """nf_tables has its numbers in network order."""
    return _attribute(kind, struct.pack(">i", value))


def _message(kind: int, flags: int, body: bytes) -> bytes:
    return struct.pack("=IHHII", 16 + len(body), kind, _REQUEST | flags, 0, 0) + body


# ---- routes ----


def _local_route(family: int, scope: int) -> bytes:
    """Everything is local. struct rtmsg: family, two prefix lengths, tos, table, protocol, scope, type, flags."""
    header = struct.pack("=BBBBBBBBI", family, 0, 0, 0, _TABLE_LOCAL, _STATIC, scope, _LOCAL, 0)
    device = _attribute(_OIF, struct.pack("=I", _LOOPBACK_INDEX))
    return _message(_NEWROUTE, _ACK | _CREATE | _EXCL, header + device)


@functools.cache
def _address(text: str) -> bytes:
    family = socket.AF_INET6 if ":" in text else socket.AF_INET
    packed = socket.inet_pton(family, text)
    header = struct.pack("=BBBBI", family, 8 * len(packed), 0, _SCOPE_UNIVERSE, _LOOPBACK_INDEX)
    attributes = _attribute(_IFA_LOCAL, packed) + _attribute(_IFA_ADDRESS, packed)
    return _message(_NEWADDR, _ACK | _CREATE | _EXCL, header + attributes)


def route_messages() -> Netlink:
    """Makes every IPv4 and IPv6 address local, and gives the device one of each that is not loopback's: resolvers look
    for those before they ask for a family at all (getaddrinfo(3), AI_ADDRCONFIG)."""
    routes = (
        _address(OWN4),
        _address(OWN6),
        _local_route(socket.AF_INET, _SCOPE_HOST),
        _local_route(socket.AF_INET6, _SCOPE_UNIVERSE),
    )
    return Netlink(_ROUTE_PROTOCOL, b"".join(routes), len(routes))


# ---- rules ----


def _expression(name: str, *attributes: bytes) -> bytes:
    return _nest(1, _text(1, name), *([_nest(2, *attributes)] if attributes else []))


def _meta(key: int) -> bytes:
    return _expression("meta", _number(1, _REGISTER), _number(2, key))


def _payload(base: int, offset: int, length: int) -> bytes:
    return _expression("payload", _number(1, _REGISTER), _number(2, base), _number(3, offset), _number(4, length))


def _compare(operation: int, value: bytes) -> bytes:
    return _expression("cmp", _number(1, _REGISTER), _number(2, operation), _nest(3, _attribute(1, value)))


def _equals(value: bytes) -> bytes:
    return _compare(0, value)


def _differs(value: bytes) -> bytes:
    return _compare(1, value)


def _verdict(code: int) -> bytes:
    return _expression("immediate", _number(1, _VERDICT_REGISTER), _nest(2, _nest(2, _number(1, code))))


def _redirect(port: int) -> bytes:
    value = _nest(2, _attribute(1, struct.pack(">H", port)))
    immediate = _expression("immediate", _number(1, _REGISTER), value)
    return immediate + _expression("redir", _number(1, _REGISTER), _number(3, _PROTO_SPECIFIED))


_IS_LOOPBACK4 = _meta(_META_NFPROTO) + _equals(bytes([_IPV4])) + _payload(_NETWORK_HEADER, 16, 1) + _equals(b"\x7f")
"""The first byte of the destination address (RFC 791 §3.1) is that of 127.0.0.0/8."""
_IS_LOOPBACK6 = (
    _meta(_META_NFPROTO)
    + _equals(bytes([_IPV6]))
    + _payload(_NETWORK_HEADER, 24, 16)
    + _equals(socket.inet_pton(socket.AF_INET6, "::1"))
)
"""The destination address (RFC 8200 §3)."""
_IS_TCP = _meta(_META_L4PROTO) + _equals(bytes([socket.IPPROTO_TCP]))
_IS_ICMP6 = _meta(_META_L4PROTO) + _equals(bytes([socket.IPPROTO_ICMPV6]))
_IS_UDP = _meta(_META_L4PROTO) + _equals(bytes([socket.IPPROTO_UDP]))
_CAPTURE = struct.pack(">H", CAPTURE_PORT)
_IS_NOT_CAPTURED = (
    _IS_TCP
    + _payload(_TRANSPORT_HEADER, 0, 2)
    + _differs(_CAPTURE)
    + _payload(_TRANSPORT_HEADER, 2, 2)
    + _differs(_CAPTURE)
)
"""Source and destination port (RFC 9293 §3.1): neither to nor from the listeners."""
_IS_NOT_TCP = _meta(_META_L4PROTO) + _differs(bytes([socket.IPPROTO_TCP]))
_NO_TRACK = _expression("notrack")
_FROM_DNS, _TO_DNS = (
    _payload(_TRANSPORT_HEADER, offset, 2) + _equals(struct.pack(">H", DNS_PORT)) for offset in (0, 2)
)
"""Source and destination port (RFC 768)."""


def _family(resource: int = 0) -> bytes:
    """struct nfgenmsg: family, version, and what the batch is for, in network order."""
    return struct.pack(">BBH", 0 if resource else _INET, 0, resource)


def _change(kind: int, flags: int, *attributes: bytes) -> bytes:
    return _message(_NFTABLES << 8 | kind, _ACK | _CREATE | flags, _family() + b"".join(attributes))


def _chain(name: str, kind: str, priority: int, policy: int) -> bytes:
    hook = _nest(4, _number(1, _LOCAL_OUT), _number(2, priority))
    return _change(_NEW_CHAIN, _EXCL, _text(1, _TABLE), _text(3, name), hook, _number(5, policy), _text(7, kind))


def _rule(chain: str, *expressions: bytes) -> bytes:
    return _change(_NEW_RULE, _APPEND, _text(1, _TABLE), _text(2, chain), _nest(4, *expressions))


@functools.cache
def redirect_messages() -> Netlink:
    """Loads :data:`RULESET`, all of it or nothing (one batch)."""
    changes = (
        _change(_NEW_TABLE, _EXCL, _text(1, _TABLE)),
        _chain("untracked", "filter", -300, _ACCEPT),
        _rule("untracked", _IS_NOT_TCP, _NO_TRACK),
        _rule("untracked", _IS_NOT_CAPTURED, _IS_LOOPBACK4, _NO_TRACK),
        _rule("untracked", _IS_NOT_CAPTURED, _IS_LOOPBACK6, _NO_TRACK),
        _chain("redirect", "nat", -100, _ACCEPT),
        _rule("redirect", _IS_LOOPBACK4, _verdict(_RETURN)),
        _rule("redirect", _IS_LOOPBACK6, _verdict(_RETURN)),
        _rule("redirect", _IS_TCP, _redirect(CAPTURE_PORT)),
        _chain("confine", "filter", 0, _DROP),
        _rule("confine", _IS_LOOPBACK4, _verdict(_ACCEPT)),
        _rule("confine", _IS_LOOPBACK6, _verdict(_ACCEPT)),
        _rule("confine", _IS_TCP, _verdict(_ACCEPT)),
        _rule("confine", _IS_ICMP6, _verdict(_ACCEPT)),  # errors of the kernel's; nobody inside has a socket for more
        _rule("confine", _IS_UDP, _TO_DNS, _verdict(_ACCEPT)),
        _rule("confine", _IS_UDP, _FROM_DNS, _verdict(_ACCEPT)),
    )
    begin = _message(_BATCH_BEGIN, 0, _family(_NFTABLES))
    end = _message(_BATCH_END, 0, _family(_NFTABLES))
    return Netlink(_NETFILTER_PROTOCOL, begin + b"".join(changes) + end, len(changes))
