"""Half-open intervals (start, end), as used for the bookings of a room."""

from collections.abc import Iterable
from itertools import pairwise

Interval = tuple[int, int]


def merge(intervals: Iterable[Interval]) -> list[Interval]:
    """The same time as sorted intervals that neither overlap nor touch; empty ones vanish."""
    merged: list[Interval] = []
    for start, end in sorted(intervals):
        if end <= start:
            continue
        if merged and start <= merged[-1][1]:
            merged[-1] = (merged[-1][0], end)
        else:
            merged.append((start, end))
    return merged


def total(intervals: Iterable[Interval]) -> int:
    """How much time the intervals cover; time covered twice counts once."""
    return sum(end - start for start, end in merge(intervals))


def gaps(intervals: Iterable[Interval]) -> list[Interval]:
    """The free time between the intervals."""
    merged = merge(intervals)
    return [(before[1], after[0]) for before, after in pairwise(merged)]
