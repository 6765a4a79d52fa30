"""Names and the addresses that stand for them inside: one pair for each name, for as long as the session lasts.

Inside, a destination is a name. The resolver gives each allowed name an IPv4 and an IPv6 address that mean nothing
anywhere else, and when a connection to one arrives, the address says which name was meant. So an address is never given
to a second name: a program may keep it as long as it likes, and what was allowed for one name cannot reach another.

The pools are networks that no destination of the outside lies in: 198.18.0.0/15 is for measurements between networks
(RFC 2544), fd63:6f72:7261:6c00::/64 a local one (RFC 4193; its first bytes read "corral").
"""

from __future__ import annotations

import threading
from socket import AF_INET, AF_INET6, inet_pton
from typing import NamedTuple

from corral.errors import CorralError
from corral.policy.names import canonical_name, unmapped

POOL4 = "198.18.0.0/15"
POOL6 = "fd63:6f72:7261:6c00::/64"
MAX_NAMES = 65536
"""Names of one sandbox that can have addresses; the pools hold more."""

_FIRST4 = int.from_bytes(inet_pton(AF_INET, "198.18.1.0"), "big")
"""198.18.0.0/24 is for what stands inside itself, such as the resolver."""
_POOL4_START, _POOL4_BITS = int.from_bytes(inet_pton(AF_INET, POOL4.partition("/")[0]), "big"), 32 - 15
_PREFIX6 = inet_pton(AF_INET6, POOL6.partition("/")[0])[:8]
_FIRST6 = 0x10001
"""So the first name has ``::1:1``; what is below is for what stands inside itself."""
_HOSTS = 254
"""Addresses used of each 256: programs exist that take .0 and .255 for a network and for everybody in it."""


class NamesFull(CorralError):
    """The sandbox has looked up as many names as one may."""


class Pair(NamedTuple):
    """The addresses of a name, in network order: 4 and 16 bytes."""

    ipv4: bytes
    ipv6: bytes


class Names:
    """The names of one sandbox, by their addresses and back.

    Any thread may call. ``_lock`` is held to add a name; lookups need none, because a name enters ``_names`` before its
    number is told to anybody, and nothing is ever changed or removed.
    """

    def __init__(self, limit: int = MAX_NAMES) -> None:
        self._limit = min(limit, MAX_NAMES)
        self._lock = threading.Lock()
        self._numbers: dict[str, int] = {}
        self._names: list[str] = []

    def __len__(self) -> int:
        return len(self._names)

    def addresses(self, name: str) -> Pair:
        """The addresses of a name in its one form, now and later the same.

        Raises:
            NamesFull: it has none yet, and no more names may get any.
            ValueError: this is not the name's one form (two forms would get two addresses).
        """
        number = self._numbers.get(name)
        if number is None:
            number = self._add(name)
        return _pair(number)

    def _add(self, name: str) -> int:
        if canonical_name(name) != name:
            raise ValueError(f"{name[:60]!r} is not in the form that names are kept in")
        with self._lock:
            number = self._numbers.get(name)
            if number is not None:
                return number
            number = len(self._names)
            if number >= self._limit:
                raise NamesFull(f"this sandbox has looked up {self._limit} names, and that is the limit")
            self._names.append(name)
            self._numbers[name] = number
            return number

    def name_of(self, packed: bytes) -> str | None:
        """The name that an address of 4 or 16 bytes stands for (IPv4-mapped ones too), or None."""
        number = _number(packed)
        names = self._names
        return names[number] if 0 <= number < len(names) else None

    @staticmethod
    def is_synthetic(packed: bytes) -> bool:
        """Whether an address lies in a pool. Such an address is never one of the outside, whether it has a name or not
        (the resolver's own has none)."""
        packed = unmapped(packed)
        if len(packed) == 4:
            return int.from_bytes(packed, "big") >> _POOL4_BITS == _POOL4_START >> _POOL4_BITS
        return len(packed) == 16 and packed.startswith(_PREFIX6)


def _pair(number: int) -> Pair:
    block, host = divmod(number, _HOSTS)
    return Pair((_FIRST4 + 256 * block + host + 1).to_bytes(4, "big"), _PREFIX6 + (_FIRST6 + number).to_bytes(8, "big"))


def _number(packed: bytes) -> int:
    """The place of the name that this address would belong to; negative where it can belong to none."""
    packed = unmapped(packed)
    if len(packed) == 4:
        block, host = divmod(int.from_bytes(packed, "big") - _FIRST4, 256)
        return _HOSTS * block + host - 1 if 1 <= host <= _HOSTS else -1
    if len(packed) == 16 and packed.startswith(_PREFIX6):
        return int.from_bytes(packed[8:], "big") - _FIRST6
    return -1
