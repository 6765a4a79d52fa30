"""What a live sandbox holds and has used: from its cgroups where there are any, else added up from /proc."""

from __future__ import annotations

import os
import time

from corral.sandbox.cgroups import OWN_PROCESSES, Controller, Groups
from corral.sandbox.core import Core, accountant
from corral.sandbox.limits import descendants
from corral.sandbox.results import Stats

_TICKS = os.sysconf("SC_CLK_TCK")


def _number(groups: Groups, controller: Controller, *names: str) -> int | None:
    """The first readable of the files, given by their version 1 or version 2 name."""
    directory = groups.path(controller)
    if directory is None:
        return None
    for name in names:
        try:
            with open(f"{directory}/{name}", "rb") as file:
                return int(file.read())
        except (OSError, ValueError):
            continue
    return None


def _cpu_seconds(pids: list[int]) -> float:
    """User and system time of processes and of the children that they have waited for (proc_pid_stat(5))."""
    ticks = 0
    for pid in pids:
        try:
            with open(f"/proc/{pid}/stat", "rb") as file:
                fields = file.read().rpartition(b")")[2].split()
            ticks += sum(map(int, fields[11:15]))
        except (OSError, ValueError, IndexError):
            continue
    return ticks / _TICKS


def read_stats(core: Core) -> Stats:
    """The figures of this moment."""
    groups = core.prepared.groups
    pids = descendants(core.keeper)
    memory = _number(groups, Controller.MEMORY, "memory.usage_in_bytes", "memory.current")
    processes = _number(groups, Controller.PIDS, "pids.current")
    return Stats(
        processes=max(0, (len(pids) if processes is None else processes) - OWN_PROCESSES + 1),
        memory=accountant.used(core.keeper, core.layer_used) if memory is None else memory,
        memory_peak=_number(groups, Controller.MEMORY, "memory.max_usage_in_bytes", "memory.peak"),
        cpu_seconds=_cpu_seconds(pids),
        disk=core.layer_used(),
        uptime=time.time() - core.started_at,
    )
