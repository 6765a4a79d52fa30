"""Names below an allowed zone that carry data out.

A rule for ``*.example.org`` lets the agent make up names, and whoever answers for the zone reads them. What a name
looks like says little for sure (the hosts of content networks look like ciphertext, and words can carry ciphertext), so
the guard that holds is a budget: the characters of all distinct names below one zone, for a whole session. The looks
only make it shorter. Names by what they cost:

1. A name that is longer than hosts are called is refused, and so is a long one that looks like an encoding.
2. Each other costs its characters below the zone and one more; above :data:`SHORT` characters, one that looks like an
   encoding costs four times as much. A name is paid for once.
3. Not more than :data:`MAX_RATE` new names in :data:`WINDOW` seconds.

A host name has 37 characters and no case, so a spent budget is at most 625 bytes of the agent's; what is refused has
left no packet. Asking a second time carries data too, in which name is asked for: whoever resolves names keeps what
they mean, and lets a query for a known one leave again only when :meth:`Tunnelling.again` agrees. When things are asked
is not looked at here.
"""

from __future__ import annotations

import re
import time
from collections import Counter
from collections.abc import Callable
from math import log2

BUDGET = 960
"""Characters of names below one zone that a session may spend. A name leaves as two queries (A and AAAA): the far end
sees less than 2 KiB in all."""
AGAIN_BUDGET = 1024
"""Bytes, in the choice of names, that queries for known names of one zone may carry."""
SHORT = 24
"""Characters that the random names of content networks have at most."""
MAX_CHARACTERS = 128
"""Below the zone, of any name."""
MAX_ENCODED = 80
"""Of one that looks like an encoding."""
ENCODED_WEIGHT = 4
MAX_RATE = 128
WINDOW = 60.0
"""Seconds."""

_LEAST = 12
"""Characters below which one cannot tell."""
_RANDOM_ENTROPY = 3.0
"""Bits per character, of a label that mixes letters and figures."""
_HIGH_ENTROPY = 4.1
"""Bits per character, of any label: words, which repeat their vowels, stay below."""
_HEXADECIMAL = re.compile(r"[0-9a-f]{16,}")
_CHANGES = re.compile(r"(?<=[a-z])(?=[0-9])|(?<=[0-9])(?=[a-z])")
_CONSONANTS = re.compile(r"[bcdfghjklmnpqrstvwxz]{7,}")
_SEPARATORS = str.maketrans("", "", "-_")


class _Zone:
    """What has been spent below one zone."""

    def __init__(self) -> None:
        self.known: set[str] = set()
        """Grows with ``spent``, so it has less than BUDGET / 2 names."""
        self.spent = 0
        self.again = 0.0
        self.window = float("-inf")
        """When the present window began."""
        self.new = 0
        """Names that were new in it."""


class Tunnelling:
    """The names that one sandbox has made up. For one thread."""

    def __init__(self, clock: Callable[[], float] = time.monotonic) -> None:
        self._clock = clock
        self._zones: dict[str, _Zone] = {}
        """As many as the policy has zones."""

    def judge(self, name: str, zone: str) -> str:
        """Whether a name that the rule for ``zone`` (``*.example.org`` or ``example.org``) allows may be resolved:
        ``""``, or why not. Both are in their one form. A name that was fine once is so for ever."""
        zone = zone.removeprefix("*.")
        if not name.endswith(f".{zone}"):
            return f"is not a name below {zone}"
        state = self._zones.get(zone)
        if state is None:
            state = self._zones[zone] = _Zone()
        if name in state.known:
            return ""
        below = name[: -len(zone) - 1]
        cost = len(below) + 1
        if len(below) > MAX_CHARACTERS:
            return f"has {len(below)} characters below {zone}, more than names of hosts have"
        if len(below) > SHORT and any(looks_encoded(label) for label in (*below.split("."), below.replace(".", ""))):
            if len(below) > MAX_ENCODED:
                return f"looks like data sent in a name ({len(below)} characters below {zone})"
            cost *= ENCODED_WEIGHT
        if state.spent + cost > BUDGET:
            return f"would make the names below {zone} carry too much ({state.spent} of {BUDGET} characters are spent)"
        now = self._clock()
        if now - state.window >= WINDOW:
            state.window, state.new = now, 0
        if state.new >= MAX_RATE:
            return f"is one of more than {MAX_RATE} new names below {zone} in {WINDOW:.0f} seconds"
        state.new += 1
        state.spent += cost
        state.known.add(name)
        return ""

    def again(self, name: str, zone: str) -> str:
        """Whether a query for a name that was resolved before may leave again: ``""``, or why not (then what it meant
        before has to do). Each counts as the choice of one among the zone's known names."""
        zone = zone.removeprefix("*.")
        state = self._zones.get(zone)
        if state is None or name not in state.known:
            return f"is not a name that was judged below {zone}"
        cost = max(1.0, log2(len(state.known)) / 8)
        if state.again + cost > AGAIN_BUDGET:
            return f"has been asked for too often, with the others below {zone}"
        state.again += cost
        return ""


def looks_encoded(label: str) -> bool:
    """Whether a label could be base16, base32, base36 or base64 (in one case) of something random. A guess."""
    text = label.translate(_SEPARATORS)
    if len(text) < _LEAST:
        return False
    if _HEXADECIMAL.fullmatch(text) and not text.isdecimal():
        return True
    bits = entropy(text)
    if bits >= _HIGH_ENTROPY:
        return True
    return bits >= _RANDOM_ENTROPY and (len(_CHANGES.findall(text)) >= 4 or bool(_CONSONANTS.search(text)))


def entropy(text: str) -> float:
    """Bits per character by how often each occurs (Shannon)."""
    length = len(text)
    return -sum(count / length * log2(count / length) for count in Counter(text).values()) if text else 0.0
