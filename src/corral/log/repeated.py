"""What a prompt repeats of the one before it in its conversation, which is nearly all of it: kept is only what is new.

The payload of such a prompt names the one that it continues, how many bytes of that it begins with, and with how many
it ends (:class:`corral.log.payloads.Shared`). All of a chain expire together, so that none outlives what it builds on:
each a little later than it would have to, but never before. A chain is short, since reading one of it reads those
before it.
"""

from __future__ import annotations

from dataclasses import dataclass

from corral.log.payloads import MAX_CHAIN, Shared

MAX_KNOWN = 8
"""Prompts that are remembered: as many conversations may go on at once."""
MAX_BYTES = 64 << 20
"""Of all of them."""
MIN_SHARED = 4096
"""Bytes that must be repeated."""
EXTRA = 3600.0
"""Seconds for which a chain may be longer kept than it must be, at most; and at most a tenth of that time."""
_STEP = 4096


@dataclass(frozen=True, slots=True)
class _Known:
    digest: str
    data: bytes
    length: int
    """Of its chain up to it."""
    expires: int


class Repeated:
    """The latest prompts of one session. Used from one thread."""

    def __init__(self) -> None:
        self._known: list[_Known] = []

    def plan(self, data: bytes, now: float, seconds: float) -> tuple[Shared | None, int]:
        """What ``data`` repeats of a prompt that is known, and when it expires that is to be kept for ``seconds``."""
        must = int(now + seconds)
        best: tuple[int, Shared, int] | None = None
        for known in self._known:
            if known.length >= MAX_CHAIN or known.expires < must:
                continue
            prefix = common_prefix(known.data, data)
            suffix = common_suffix(known.data, data, min(len(known.data), len(data)) - prefix)
            if best is None or prefix + suffix > best[0]:
                best = prefix + suffix, Shared(known.digest, prefix, suffix), known.expires
        if best is None or best[0] < max(MIN_SHARED, len(data) // 2):
            return None, must + int(min(EXTRA, seconds / 10))
        return best[1], best[2]

    def remember(self, digest: str, data: bytes, shared: Shared | None, expires: int) -> None:
        """``data`` is kept under this digest; it takes the place of what it continues."""
        length = 1
        for at, known in enumerate(self._known):
            if shared is not None and known.digest == shared.base:
                length = known.length + 1
                del self._known[at]
                break
        self._known.append(_Known(digest, data, length, expires))
        while len(self._known) > MAX_KNOWN or sum(len(known.data) for known in self._known) > MAX_BYTES:
            del self._known[0]


def common_prefix(one: bytes, other: bytes) -> int:
    """How many bytes both begin with."""
    most = min(len(one), len(other))
    at = 0
    while at < most and one[at : at + _STEP] == other[at : at + _STEP]:
        at += _STEP
    if at >= most:
        return most
    return next((place for place in range(at, most) if one[place] != other[place]), most)


def common_suffix(one: bytes, other: bytes, most: int) -> int:
    """How many bytes both end with, at most so many."""
    one, other = one[len(one) - most :], other[len(other) - most :]
    end = most
    while end > 0 and one[max(0, end - _STEP) : end] == other[max(0, end - _STEP) : end]:
        end -= _STEP
    if end <= 0:
        return most
    return most - next((place + 1 for place in range(end - 1, -1, -1) if one[place] != other[place]), 0)
