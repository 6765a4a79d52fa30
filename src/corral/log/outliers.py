"""Which values are unlike the rest: robust statistics that one extreme value cannot spoil.

The measure is the modified z-score of B. Iglewicz and D. C. Hoaglin, "How to Detect and Handle Outliers" (ASQC, 1993):
0.6745 (x - median) / MAD, where MAD is the median of the distances from the median; beyond 3.5 a value is called an
outlier. Where more than half of the values are equal, MAD is 0; then the mean distance times 1.2533 stands for it, with
which a single odd value among many equal ones still shows.

What it can do: point at a session that has, say, thirty times as many refusals as the others of its agent. What it
cannot: each count is looked at alone, so that a session which is odd only in how its counts go together does not show;
an agent that is bad in most of its sessions sets the rule itself; one that slowly does more takes the median along; and
counts are not normally distributed, so that 3.5 is a place to begin reading and no error rate. It decides nothing.
"""

from __future__ import annotations

from collections.abc import Sequence
from statistics import fmean, median

THRESHOLD = 3.5
FEWEST = 8
"""Values below which nothing is said."""
_NORMAL = 0.6745
"""MAD of a normal distribution, in standard deviations."""
_MEAN = 1.253314
"""Standard deviation of a normal distribution, in mean distances."""


def scores(values: Sequence[float]) -> tuple[float, list[float]]:
    """The median of some values and the modified z-score of each, 0 for all where they are fewer than :data:`FEWEST` or
    all equal. ``values`` are at least one."""
    middle = median(values)
    distances = [abs(value - middle) for value in values]
    spread = median(distances) / _NORMAL or fmean(distances) * _MEAN
    if len(values) < FEWEST or not spread:
        return middle, [0.0] * len(values)
    return middle, [(value - middle) / spread for value in values]
