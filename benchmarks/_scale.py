"""Many sandboxes at once, what an idle one holds, and how fast a full one is gone."""

from __future__ import annotations

import asyncio
import os
import resource
import select
import statistics
import time
from collections.abc import Awaitable, Callable, Sequence
from pathlib import Path

from _common import Row, available_memory, p95, say
from _proportional import proportional

from corral import Policy, Sandbox
from corral.policy.model import Resources
from corral.sandbox.limits import descendants

WANTED = 500
AT_ONCE = 8
RESERVE = 2 << 30
"""Bytes of memory that are never asked for."""
LONGEST = 120.0
DESCRIPTORS_EACH = 8
CROWD = 1000
IDLE_KIB = 300
KILL_MS = 100


def _init_of(box: Sandbox) -> int | None:
    """The host's number of a sandbox's PID 1: its keeper's child of that name."""
    for pid in descendants(box.core.keeper):
        try:
            if Path(f"/proc/{pid}/comm").read_text().strip() == "corral-init":
                return pid
        except OSError:
            continue
    return None


async def _each(boxes: Sequence[Sandbox], do: Callable[[Sandbox], Awaitable[object]]) -> list[float]:
    """Does something to every sandbox, a few at a time; the seconds that each took."""
    gate = asyncio.Semaphore(AT_ONCE)

    async def one(box: Sandbox) -> float:
        async with gate:
            started = time.perf_counter()
            await do(box)
            return time.perf_counter() - started

    return await asyncio.gather(*(one(box) for box in boxes))


def affordable(wanted: int) -> tuple[int, str]:
    """How many sandboxes this process may hold, and what bounds them."""
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (hard, hard))
    by_descriptors = (hard if hard != resource.RLIM_INFINITY else 1 << 20) // DESCRIPTORS_EACH - 16
    if by_descriptors < wanted:
        return by_descriptors, f"only {by_descriptors}: a process may open {hard} files here (soft limit was {soft})"
    return wanted, ""


def _idle_rows(boxes: Sequence[Sandbox], which: str) -> list[Row]:
    inits: list[float] = []
    keepers: list[float] = []
    for box in boxes:
        init = _init_of(box)
        for pid, found in ((init, inits), (box.core.keeper, keepers)):
            size = None if pid is None else proportional(pid)
            if size is not None:
                found.append(size)
    rows = []
    for name, found, bar in (("PID 1", inits, IDLE_KIB), ("keeper", keepers, None)):
        title = f"idle: {name}, proportional memory ({which})"
        if found:
            rows.append(Row(title, "KiB", statistics.median(found), p95(found), bar=bar))
        else:
            rows.append(Row(title, "KiB", bar=bar, note="skipped: only root may read smaps_rollup; run this as root"))
    return rows


async def many_figure(workspace: Path, quick: bool) -> list[Row]:
    """A crowd of live sandboxes: start, memory, one command in each, end."""
    asked = 50 if quick else WANTED
    wanted, note = affordable(asked)
    boxes: list[Sandbox] = []
    async with Sandbox(workspace) as alone:
        await alone.exec(["true"])
        rows = _idle_rows([alone], "one alone")
    before = available_memory()
    started = time.perf_counter()
    try:
        starts: list[float] = []
        while len(boxes) < wanted:
            batch = [Sandbox(workspace) for _ in range(min(25, wanted - len(boxes)))]
            boxes += batch
            starts += await _each(batch, Sandbox.start)
            if available_memory() < RESERVE or time.perf_counter() - started > LONGEST:
                short = "memory" if available_memory() < RESERVE else "time"
                note = f"stopped at {len(boxes)}: {short} ran out"
                break
        created = time.perf_counter() - started
        count = len(boxes)
        say(f"  {count} sandboxes live after {created:.1f} s")
        await asyncio.sleep(1)
        each = (before - available_memory()) / count / 1024
        started = time.perf_counter()
        execs = await _each(boxes, lambda box: box.exec(["true"], check=True))
        executed = time.perf_counter() - started
        idle = _idle_rows(boxes, f"of {count}")
        started = time.perf_counter()
        await _each(boxes, Sandbox.close)
        closed = time.perf_counter() - started
    finally:
        await asyncio.gather(*(box.close() for box in boxes), return_exceptions=True)
    return [
        *idle,
        *rows,
        Row("many: live at once", "sandboxes", count, least=asked, note=note),
        Row("many: to create all", "s", created),
        Row("many: each start, 8 at a time", "ms", statistics.median(starts) * 1e3, p95(starts) * 1e3),
        Row("many: memory of each, kernel included", "KiB", each),
        Row("many: a command in each, 8 at a time", "ms", statistics.median(execs) * 1e3, p95(execs) * 1e3),
        Row("many: a command in each, all", "s", executed),
        Row("many: to close all", "s", closed),
    ]


_FORKS = """
import os, signal
for _ in range(%d):
    if os.fork() == 0:
        signal.pause()
        os._exit(0)
signal.pause()
"""


async def _kill_once(workspace: Path) -> float:
    async with Sandbox(workspace, policy=Policy(resources=Resources(processes=CROWD + 200))) as box:
        process = await box.start_process(["/usr/bin/python3", "-S", "-c", _FORKS % CROWD])
        deadline = time.monotonic() + 60
        while len(pids := descendants(box.core.keeper)) < CROWD + 2:  # PID 1, and the one that forks
            if time.monotonic() > deadline:
                box.kill()
                output = await process.stderr.read()
                raise RuntimeError(f"only {len(pids)} processes came to be: {output!r}")
            await asyncio.sleep(0.02)
        init = _init_of(box)
        pids = [] if init is None else [init, *descendants(init)]  # the rest is the keeper's own
        assert len(pids) > CROWD
        await asyncio.sleep(0.2)
        last = os.pidfd_open(pids[0])  # the kernel lets PID 1 end after all others
        try:
            started = time.perf_counter()
            box.kill()
            select.select([last], [], [], 60)
            while pids:
                pids = [pid for pid in pids if os.path.exists(f"/proc/{pid}")]
            return time.perf_counter() - started
        finally:
            os.close(last)


async def kill_figure(workspace: Path, rounds: int) -> list[Row]:
    """From `kill` until the host sees no process of a crowd any more, not even a zombie."""
    samples = [await _kill_once(workspace) for _ in range(rounds)]
    median, high = statistics.median(samples) * 1e3, p95(samples) * 1e3
    return [
        Row(f"kill: {CROWD} processes, until all are gone", "ms", median, high, bar=KILL_MS),
    ]
