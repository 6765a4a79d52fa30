"""Rules of destinations, compiled: which of them name a connection, a request, or a name that is looked up.

A connection is judged up to three times, each time with more known: when it is made (a name, or an address that was
written out), when the gateway has heard what is spoken and is about to dial (name, address and protocol), and, where
requests are looked at, at each request. What is not known yet is ``None`` or ``""``: a deny holds for what it may turn
out to be, and an allow counts as long as it may, because whoever learns more asks again.
"""

from __future__ import annotations

from corral.actions import Endpoint, Request, Transport
from corral.policy.matching import packed_address
from corral.policy.model import ANY_NAME, NetworkRule, Permit
from corral.policy.requests import Requests

UNHEARD = ""
"""A protocol that nobody will ever look at: between programs of the sandbox."""
_NO_OWN_WORD = frozenset({None, UNHEARD, "tcp"})
_BEYOND_HTTP = {"h2c": Permit.H2C, "connect": Permit.CONNECT}
"""What begins as HTTP and goes on as something else."""
_HTTPS = 443
_WIDEST = {4: 8, 16: 7}
"""By the size of an address, the shortest prefix of a network that still names what is protected: those of 10.0.0.0/8
and fc00::/7. Who writes 0.0.0.0/0 does not mean the host's loopback."""


def _is_narrow(size: int, shift: int) -> bool:
    return 8 * size - shift >= _WIDEST[size]


class _Net:
    """An IP network."""

    __slots__ = ("_first", "_shift", "_size")

    def __init__(self, text: str) -> None:
        address, slash, length = text.partition("/")
        packed = packed_address(address)
        self._size = len(packed)
        self._shift = 8 * self._size - (int(length) if slash else 8 * self._size)
        self._first = int.from_bytes(packed, "big") >> self._shift

    @property
    def key(self) -> tuple[int, int, int]:
        return self._size, self._shift, self._first

    @property
    def is_narrow(self) -> bool:
        """Whether it names the protected addresses that are in it."""
        return _is_narrow(self._size, self._shift)

    def __contains__(self, packed: bytes) -> bool:
        return len(packed) == self._size and int.from_bytes(packed, "big") >> self._shift == self._first


class Destinations:
    """A list of network rules. Finds those that name a destination without looking at each.

    ``deny`` and ``ask`` say what the list is for: a rule that denies names everything that it may be about, a rule that
    asks every request that it may be about, and neither it nor an allow names what has to be said in so many words.
    """

    def __init__(self, rules: tuple[NetworkRule, ...], *, deny: bool = False, ask: bool = False) -> None:
        self._rules = rules
        self._deny = deny
        self._certain = not (deny or ask)
        """Whether a request must be named in all that it may mean."""
        self._names: dict[str, list[int]] = {}
        """Exact names, and ``.name`` for everything below."""
        self._networks: dict[tuple[int, int], dict[int, list[int]]] = {}
        """By size of the address and bits that do not matter: the numbers that the others make."""
        self._both: dict[int, _Net] = {}
        certain = self._certain
        self._requests = {
            index: Requests(rule.requests, certain=certain) for index, rule in enumerate(rules) if rule.requests
        }
        for index, rule in enumerate(rules):
            if rule.name is not None:
                name = rule.name[1:] if rule.name.startswith("*.") else rule.name
                self._names.setdefault(name, []).append(index)
                if rule.network is not None:
                    self._both[index] = _Net(rule.network)
            elif rule.network is not None:
                size, shift, first = _Net(rule.network).key
                self._networks.setdefault((size, shift), {}).setdefault(first, []).append(index)

    def all(
        self, endpoint: Endpoint, packed: bytes | None, *, protocol: str | None, request: Request | None = None
    ) -> list[int]:
        """The rules that name it, in their order.

        ``packed`` is its address, or None where it has none yet. ``protocol`` None means that it is not known yet what
        will be spoken, :data:`UNHEARD` that it never will be. Without ``request`` the ``requests`` of rules are not
        looked at.
        """
        if not self._rules:
            return []
        found = [index for index in self._of_name(endpoint.name) if self._network_holds(index, endpoint, packed)]
        if packed is not None and self._networks:
            number, bits = int.from_bytes(packed, "big"), len(packed)
            for (size, shift), numbers in self._networks.items():
                if size == bits and (self._deny or not endpoint.protected or _is_narrow(size, shift)):
                    found += numbers.get(number >> shift, ())
        return sorted(
            index
            for index in found
            if self._rest_holds(self._rules[index], endpoint, protocol) and self._request_holds(index, request)
        )

    def _of_name(self, name: str | None) -> list[int]:
        if name is None or not self._names:
            return []
        found = [*self._names.get(name, ()), *self._names.get(ANY_NAME, ())]
        at = name.find(".")
        while at >= 0:
            found += self._names.get(name[at:], ())
            at = name.find(".", at + 1)
        return found

    def _network_holds(self, index: int, endpoint: Endpoint, packed: bytes | None) -> bool:
        """Of a rule that has a name."""
        network = self._both.get(index)
        if network is not None and packed is not None:
            return packed in network and (self._deny or not endpoint.protected or network.is_narrow)
        # No network is named, or the address will be known later. Neither is enough for a protected one.
        return self._deny or not endpoint.protected

    def _rest_holds(self, rule: NetworkRule, endpoint: Endpoint, protocol: str | None) -> bool:
        if rule.ports and not any(first <= endpoint.port <= last for first, last in rule.ports):
            return False
        if rule.requests and endpoint.transport is not Transport.TCP:
            return False
        return self._protocol_holds(rule, endpoint, protocol)

    def _protocol_holds(self, rule: NetworkRule, endpoint: Endpoint, protocol: str | None) -> bool:
        wanted, over_tcp = rule.protocol, endpoint.transport is Transport.TCP
        if wanted == "udp":
            return endpoint.transport is Transport.UDP
        if wanted == "tcp":
            return over_tcp and (self._deny or protocol in _NO_OWN_WORD)
        if wanted is None:
            if self._deny or protocol in (None, UNHEARD, "tls"):
                return True
            return endpoint.port != _HTTPS and self._is_http(rule, protocol)
        if protocol is None:
            return over_tcp
        return protocol == wanted or (wanted == "http" and self._is_http(rule, protocol))

    def _is_http(self, rule: NetworkRule, protocol: str | None) -> bool:
        if protocol == "http":
            return True
        permit = _BEYOND_HTTP.get(protocol or "")
        return permit is not None and (self._deny or permit in rule.permit)

    def _request_holds(self, index: int, request: Request | None) -> bool:
        requests = self._requests.get(index)
        return request is None or requests is None or requests.name(request)

    def naming(self, name: str | None, *, wholly: bool) -> list[int]:
        """The rules that are about a name; with ``wholly`` those only that hold for all that could be done with it."""
        rules = self._rules
        return sorted(
            index
            for index in self._of_name(name)
            if not (
                wholly
                and (rules[index].network or rules[index].ports or rules[index].protocol or rules[index].requests)
            )
        )
