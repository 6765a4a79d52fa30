"""The most frequent of many things, in bounded memory, whoever decides what there is to count.

The algorithm is that of J. Misra and D. Gries, "Finding repeated elements" (Science of Computer Programming 2, 1982),
with weights: at most ``size`` things are kept, and each count falls short of the true one by at most the total weight
divided by ``size + 1``. So whatever is more frequent than that is in the result, and nobody can push it out with a
flood of things that are each seen once.
"""

from __future__ import annotations

from collections.abc import Hashable
from typing import Generic, TypeVar

Thing = TypeVar("Thing", bound=Hashable)


class Frequent(Generic[Thing]):
    """Counts things."""

    def __init__(self, size: int = 4096) -> None:
        self._size = size
        self._counts: dict[Thing, int] = {}
        self.total = 0
        """Weight of all that was added."""
        self.short = 0
        """How much a count may fall short."""

    def add(self, thing: Thing, weight: int = 1) -> None:
        """Counts it ``weight`` times, at least once."""
        weight = max(1, weight)
        self.total += weight
        if thing in self._counts or len(self._counts) < self._size:
            self._counts[thing] = self._counts.get(thing, 0) + weight
            return
        taken = min(weight, min(self._counts.values()))
        self.short += taken
        self._counts = {each: count - taken for each, count in self._counts.items() if count > taken}
        if weight > taken:
            self._counts[thing] = weight - taken

    def top(self, most: int) -> list[tuple[Thing, int]]:
        """The most frequent ones with their counts; of equal ones, those that were seen first."""
        return sorted(self._counts.items(), key=lambda each: -each[1])[:most]
