"""What the figures share: samples, rows, the printed table.

A machine that runs other things too gives no absolute number twice. So contenders are always measured in the same
run, in turns and in a new order every round, and judged by the ratio of their medians.
"""

from __future__ import annotations

import os
import random
import statistics
import sys
import time
from collections.abc import Awaitable, Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any

sys.dont_write_bytecode = False
os.environ.pop("PYTHONDONTWRITEBYTECODE", None)  # start-up time is measured as users have it

Contender = Callable[[], Awaitable[float]]
"""Does the work once and returns the seconds that it took."""

_RESAMPLES = 400


@dataclass(frozen=True, slots=True)
class Row:
    """One line of the table. Without a ``bar`` it is there for information only."""

    figure: str
    unit: str = ""
    median: float | None = None
    p95: float | None = None
    peer: str = ""
    peer_median: float | None = None
    peer_p95: float | None = None
    ratio: float | None = None
    spread: tuple[float, float] | None = None
    """Where the ratio lies with a probability of 95 %, by resampling."""
    bar: float | None = None
    """Upper bound of the ratio where there is a peer, of the median where there is none."""
    least: float | None = None
    """Lower bound of the median, for what is counted."""
    note: str = ""

    @property
    def met(self) -> bool | None:
        """Whether the figure holds; None where nothing was promised or measured."""
        if self.least is not None:
            return self.median is not None and self.median >= self.least
        value = self.ratio if self.peer else self.median
        return None if self.bar is None or value is None else value <= self.bar

    def as_json(self) -> dict[str, Any]:
        """The row for ``--json``."""
        return asdict(self) | {"met": self.met}


def row_from_json(fields: Mapping[str, Any]) -> Row:
    """The row that :meth:`Row.as_json` wrote."""
    values = {name: value for name, value in fields.items() if name != "met"}
    if values["spread"]:
        values["spread"] = tuple(values["spread"])
    return Row(**values)


def say(text: str) -> None:
    """Progress, for the person who waits; never part of the result."""
    print(text, file=sys.stderr, flush=True)


def p95(samples: Sequence[float]) -> float:
    """The sample below which 95 % of all lie."""
    return sorted(samples)[min(len(samples) - 1, int(len(samples) * 0.95))]


def spread(ours: Sequence[float], theirs: Sequence[float]) -> tuple[float, float]:
    """The ratio of medians with its uncertainty: the middle 95 % of what resampled rounds give (bootstrap)."""
    chance = random.Random(1)
    ratios = sorted(
        statistics.median(chance.choices(ours, k=len(ours))) / statistics.median(chance.choices(theirs, k=len(theirs)))
        for _ in range(_RESAMPLES)
    )
    return ratios[int(_RESAMPLES * 0.025)], ratios[int(_RESAMPLES * 0.975)]


_UNITS = {"ms": 1e3, "µs": 1e6}


def compare(
    figure: str,
    ours: Sequence[float],
    peer: str,
    theirs: Sequence[float],
    *,
    bar: float | None = None,
    note: str = "",
    unit: str = "ms",
) -> Row:
    """The row for two contenders' seconds, shown as milliseconds or microseconds."""
    scale = _UNITS[unit]
    return Row(
        figure,
        unit,
        statistics.median(ours) * scale,
        p95(ours) * scale,
        peer,
        statistics.median(theirs) * scale,
        p95(theirs) * scale,
        statistics.median(ours) / statistics.median(theirs),
        spread(ours, theirs),
        bar=bar,
        note=note,
    )


async def in_turns(contenders: Mapping[str, Contender], rounds: int, *, warm_up: int = 2) -> dict[str, list[float]]:
    """Samples of each contender; every round lets each work once, in a random order."""
    samples: dict[str, list[float]] = {name: [] for name in contenders}
    chance = random.Random(1)
    names = list(contenders)
    for number in range(warm_up + rounds):
        chance.shuffle(names)
        for name in names:
            seconds = await contenders[name]()
            if number >= warm_up:
                samples[name].append(seconds)
    return samples


def clock(work: Callable[[], object]) -> Contender:
    """A contender from a blocking call."""

    async def contender() -> float:
        started = time.perf_counter()
        work()
        return time.perf_counter() - started

    return contender


def available_memory() -> int:
    """Bytes that the machine can still give out (MemAvailable)."""
    with open("/proc/meminfo", encoding="ascii") as lines:
        for line in lines:
            if line.startswith("MemAvailable:"):
                return int(line.split()[1]) * 1024
    return 0


def who() -> str:
    """Whose figures these are."""
    return "root" if os.geteuid() == 0 else "ordinary user"


def _number(value: float | None) -> str:
    if value is None:
        return ""
    return f"{value:.2f}" if value < 100 else f"{value:.0f}"


def _pair(median: float | None, high: float | None, unit: str) -> str:
    if median is None:
        return ""
    return f"{_number(median)} / {_number(high)} {unit}" if high is not None else f"{_number(median)} {unit}"


def table(title: str, rows: Sequence[Row]) -> str:
    """The rows as text, for a terminal."""
    lines = [("figure", "corral p50 / p95", "peer", "peer p50 / p95", "ratio (95 %)", "bar", "")]
    for row in rows:
        between = f" ({row.spread[0]:.2f}-{row.spread[1]:.2f})" if row.spread else ""
        bar = "" if row.bar is None else f"{row.bar:g}x" if row.peer else f"{row.bar:g} {row.unit}"
        if row.least is not None:
            bar = f"at least {row.least:g} {row.unit}".rstrip()
        lines.append(
            (
                row.figure,
                _pair(row.median, row.p95, row.unit),
                row.peer,
                _pair(row.peer_median, row.peer_p95, row.unit),
                "" if row.ratio is None else f"{row.ratio:.2f}{between}",
                bar,
                {True: "met", False: "MISSED", None: ""}[row.met],
            )
        )
    widths = [max(len(line[column]) for line in lines) for column in range(len(lines[0]))]
    text = [title]
    for number, line in enumerate(lines):
        text.append("  ".join(cell.ljust(width) for cell, width in zip(line, widths, strict=True)).rstrip())
        if number and rows[number - 1].note:
            text.append(f"    {rows[number - 1].note}")
    return "\n".join(text)
