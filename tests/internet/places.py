"""The map of the little internet: who lives where, and under which names. Values only.

Everything lies in ranges set aside for documentation (RFC 5737, RFC 3849), so nothing here can be meant for a real
host. The link between host and internet is 198.51.100.0/30 rather than 192.0.2.0/24: some machines, CI among them,
use the latter for their own interface.
"""

from __future__ import annotations

from dataclasses import dataclass

RANGE4, RANGE6 = "203.0.113.0/24", "2001:db8:2::/64"
LINK4, LINK6 = "198.51.100.0/30", "2001:db8:1::/64"
HOST4, HOST6 = "198.51.100.1", "2001:db8:1::1"
ROUTER4, ROUTER6 = "198.51.100.2", "2001:db8:1::2"
HOST_LINK = "corral-net"
"""The host's end; a network namespace has one little internet at a time."""
INNER_LINK = "far"

CONTROL_PORT = 7
TOKEN = "corral-test-token-8f3a1c"
"""What api.test and the private repository of git.test want as a credential."""
GIT_USER = "git"
GIT_ID = 4242


@dataclass(frozen=True, slots=True)
class Place:
    """One address of each family, what listens there, and its names."""

    last: int
    names: tuple[str, ...]
    ports: tuple[tuple[int, str], ...] = ()
    """TCP port and service."""

    @property
    def ipv4(self) -> str:
        return f"203.0.113.{self.last}"

    @property
    def ipv6(self) -> str:
        return f"2001:db8:2::{self.last}"


WEB = ((80, "http"), (443, "https"))

PLACES: dict[str, Place] = {
    "control": Place(2, (), ((CONTROL_PORT, "control"),)),
    "socks": Place(10, ("socks.test",), ((1080, "socks"),)),
    "ssh": Place(22, ("ssh.test",), ((22, "ssh"),)),
    "git": Place(23, ("git.test",), ((22, "ssh"), (443, "git"))),
    "proxy": Place(31, ("proxy.test",), ((3128, "proxy"),)),
    "pool": Place(33, ("pool.example",), ((3333, "stratum"), (443, "stratum"))),
    "tunnel": Place(44, ("tunnel.example",), ((4444, "sink"), (80, "sink"), (443, "sink"))),
    "ssh443": Place(45, ("ssh443.example",), ((443, "ssh"),)),
    "dns": Place(53, ("dns.test",), ((53, "dns"),)),
    "mail": Place(58, ("mail.test",), ((25, "smtp"), (587, "smtp"))),
    "sink": Place(66, ("evil.example", "sink.example"), tuple((port, "sink") for port in (25, 80, 443, 8080, 9001))),
    "web": Place(80, ("web.test", "v4only.test", "v6only.test"), WEB),
    "api": Place(81, ("api.test",), WEB),
    "wild": Place(82, ("wild.test", "*.wild.test"), WEB),
    "http1": Place(83, ("http1.test",), ((80, "http"), (443, "https1"))),
    "expired": Place(84, ("expired.test",), ((443, "expired"),)),
    "wrongname": Place(85, ("wrongname.test",), ((443, "wrongname"),)),
    "selfsigned": Place(86, ("selfsigned.test",), ((443, "selfsigned"),)),
    "tls12": Place(87, ("tls12.test",), ((443, "tls12"),)),
    "pypi": Place(90, ("pypi.test",), ((443, "pypi"),)),
    "npm": Place(91, ("npm.test",), ((443, "npm"),)),
    "apt": Place(92, ("apt.test",), ((80, "apt"),)),
    "metadata": Place(169, ("metadata.test",), ((80, "metadata"),)),
    # Nobody listens on these: SYNs vanish; are answered with RST; are answered with ICMP "prohibited".
    "blackhole": Place(250, ("blackhole.test",)),
    "closed": Place(251, ("closed.test",)),
    "prohibited": Place(252, ("prohibited.test",)),
}

CERTIFIED = tuple(
    name for key in ("git", "web", "api", "wild", "http1", "tls12", "pypi", "npm") for name in PLACES[key].names
)
"""Names of the test CA's certificate."""

ANSWERS: dict[str, dict[str, tuple[str, ...]]] = {
    # name -> type -> values, beside what PLACES says. What an honest resolver might pass on and a gateway must judge.
    "v4only.test": {"A": (PLACES["web"].ipv4,)},
    "v6only.test": {"AAAA": (PLACES["web"].ipv6,)},
    "cname.test": {"CNAME": ("web.test.",)},
    "cname-evil.test": {"CNAME": ("evil.example.",)},
    "cname-loop.test": {"CNAME": ("cname-loop.test.",)},
    "private.test": {"A": ("10.0.0.1",), "AAAA": ("fd00::1",)},
    "loopback.test": {"A": ("127.0.0.1",), "AAAA": ("::1",)},
    "unspecified.test": {"A": ("0.0.0.0",), "AAAA": ("::",)},
    "linklocal.test": {"A": ("169.254.169.254",), "AAAA": ("fe80::1",)},
    # Where clouds keep their metadata: Alibaba, AWS by IPv6, Oracle at home.
    "clouds.test": {"A": ("100.100.100.200", "192.0.0.192"), "AAAA": ("fd00:ec2::254",)},
    "mapped.test": {"AAAA": ("::ffff:127.0.0.1",)},
    "nat64.test": {"AAAA": ("64:ff9b::7f00:1",)},
    "multicast.test": {"A": ("224.0.0.1",), "AAAA": ("ff02::1",)},
    "synthetic.test": {"A": ("198.18.1.1",), "AAAA": ("fd63:6f72:7261:6c00::1",)},
    "host.test": {"A": (HOST4,), "AAAA": (HOST6,)},
    "mixed.test": {"A": (PLACES["web"].ipv4, "127.0.0.1")},
    "many.test": {"A": tuple(f"203.0.113.{last}" for last in range(100, 160))},
    "fallback.test": {"A": (PLACES["closed"].ipv4, PLACES["web"].ipv4)},
    "text.test": {"TXT": ('"some text"',)},
    "empty.test": {},
}
"""Names of no address at all are NOERROR without records."""

REBINDING = "rebind.test"
"""A: the web server the first time, 127.0.0.1 the second, and so on in turn."""
TUNNEL_ZONE = "tunnel.test"
"""Answers A, AAAA, TXT, NULL, CNAME and MX for any name below, as the server of a DNS tunnel."""
MISBEHAVIOUR = {
    "servfail.test": "servfail",
    "refused.test": "refused",
    "dead.test": "dead",
    "slow.test": "slow",
    "truncated.test": "truncated",
    "wrong-id.test": "wrong-id",
    "wrong-question.test": "wrong-question",
    "garbage.test": "garbage",
    "stray-records.test": "stray-records",
}
"""Names whose answers are faulty: ``slow`` comes after 3 s, ``dead`` never, ``truncated`` only whole over TCP,
``stray-records`` carries an address for bank.example too (cache poisoning)."""


def names() -> dict[str, str]:
    """Name -> IPv4 address, of every plain name."""
    return {name: place.ipv4 for place in PLACES.values() for name in place.names if not name.startswith("*")}
