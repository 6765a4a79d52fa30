"""Many sandboxes on one supervisor: what each of them gets, also while one of them asks for all that there is."""

from __future__ import annotations

import asyncio
import statistics
import threading
import time
from collections.abc import Sequence
from pathlib import Path

from _calls import compile_programs
from _common import Row, p95, say
from _scale import affordable

from corral import Sandbox

WANTED = 200
AT_ONCE = 8
PAUSE = 50_000
"""Microseconds between two calls of one sandbox."""
STARVED = 1.5
"""A sandbox is starved that makes less than one call where the mean of all makes this many."""


def _supervisor_seconds() -> float:
    """Processor time of the supervisor's thread."""
    (thread,) = (thread for thread in threading.enumerate() if thread.name == "corral-supervisor")
    assert thread.ident is not None
    return time.clock_gettime(time.pthread_getcpuclockid(thread.ident))


async def crowd_figure(workspace: Path, quick: bool) -> list[Row]:
    """Steady activity in all; then the same while one of them floods the supervisor."""
    try:
        calls, _ = compile_programs(workspace)
    except FileNotFoundError as error:
        return [Row("crowd", note=f"skipped: {error}")]
    wanted, note = affordable(50 if quick else WANTED)
    seconds = 5.0 if quick else 20.0
    boxes = [Sandbox(workspace) for _ in range(wanted)]
    gate = asyncio.Semaphore(AT_ONCE)

    async def start(box: Sandbox) -> None:
        async with gate:
            await box.start()

    try:
        await asyncio.gather(*(start(box) for box in boxes))
        say(f"  {len(boxes)} sandboxes")
        rows = await _rows(f"{len(boxes)} steady", boxes, str(calls), seconds, note)
        rows += await _rows(f"{len(boxes) - 1} steady, 1 flooding", boxes, str(calls), seconds, note, flood=True)
    finally:
        await asyncio.gather(*(box.close() for box in boxes))
    return rows


async def _rows(
    title: str, boxes: Sequence[Sandbox], calls: str, seconds: float, note: str, *, flood: bool = False
) -> list[Row]:
    steady = boxes[1:] if flood else boxes
    # Programs start one after another; what they do then overlaps for most of the time.
    before, started = _supervisor_seconds(), time.perf_counter()
    work = [box.exec([calls, "steady", str(seconds), str(PAUSE)]) for box in steady]
    flooding = asyncio.create_task(boxes[0].exec([calls, "flood", str(seconds + 1)])) if flood else None
    results = await asyncio.gather(*work)
    busy = (_supervisor_seconds() - before) / (time.perf_counter() - started)
    counts: list[int] = []
    taken: list[float] = []
    for result in results:
        assert result.exit_code == 0, result.text
        own = [int(line) / 1e9 for line in result.stdout.split()]
        counts.append(len(own))
        taken += own
    if flooding is not None:
        floods = int((await flooding).stdout)
        note = f"{note} {floods / (seconds + 1):.0f} calls a second by the one that floods".strip()
    taken.sort()
    slowest = statistics.mean(counts) / max(1, min(counts))
    high = taken[min(len(taken) - 1, int(len(taken) * 0.99))]
    return [
        Row(f"crowd: {title}: a call", "µs", statistics.median(taken) * 1e6, p95(taken) * 1e6, note=note),
        Row(f"crowd: {title}: a call, p99", "µs", high * 1e6),
        Row(f"crowd: {title}: the supervisor's processor", "%", busy * 100),
        Row(f"crowd: {title}: mean calls / those of the slowest", "x", slowest, bar=STARVED),
    ]
