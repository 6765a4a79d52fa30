"""Before or after: the birth of a process, and a moment that somebody has noted.

The kernel says in clock ticks when a process was born (proc(5), stat, field 22), which are ten milliseconds, and a fast
agent lives through several steps in one. Within a tick the numbers of processes tell: they are handed out in a row, and
the last one at that moment is known (``/proc/sys/kernel/ns_last_pid``). Nobody inside can choose a number outside.
"""

from __future__ import annotations

import os
import select
import time
from contextlib import suppress
from functools import cache
from typing import NamedTuple

_TICK_NANOSECONDS = 1_000_000_000 // os.sysconf("SC_CLK_TCK")
_LAST_PID = "/proc/sys/kernel/ns_last_pid"
_PID_MAX = "/proc/sys/kernel/pid_max"
_LARGEST_PID_MAX = 1 << 22
UNKNOWN = -1


class Identity(NamedTuple):
    """One process, for ever, in the PID namespace of whoever looks."""

    pid: int
    started: int
    """Clock ticks after boot."""


class Moment(NamedTuple):
    """A point in time against which births are held."""

    ticks: int
    """Clock ticks after boot."""
    last_pid: int = UNKNOWN
    """The last number that was given to a process or thread by then; :data:`UNKNOWN` where the kernel does not say."""


def now() -> Moment:
    """This moment."""
    last = UNKNOWN
    with suppress(OSError, ValueError):  # a kernel without CONFIG_CHECKPOINT_RESTORE
        last = _number(_LAST_PID)
    return Moment(time.clock_gettime_ns(time.CLOCK_BOOTTIME) // _TICK_NANOSECONDS, last)


def order(process: Identity, moment: Moment) -> int:
    """Whether it was born before (-1) or after (1) that; 0 where it was the same tick and nobody can tell."""
    if process.started != moment.ticks:
        return -1 if process.started < moment.ticks else 1
    if moment.last_pid == UNKNOWN:
        return 0
    # The row begins again at its end; in one tick nobody gets half way round.
    behind = (moment.last_pid - process.pid) % _pid_max()
    return -1 if behind < _pid_max() // 2 else 1


def lives(process: Identity) -> bool:
    """Whether it has not ended: threads of it may outlive its first one."""
    try:
        pidfd = os.pidfd_open(process.pid)
    except ProcessLookupError:
        return False
    except OSError:
        return True  # no descriptor is left to look with
    try:
        with open(f"/proc/{process.pid}/stat", "rb", buffering=0) as file:
            fields = file.read(4096).rpartition(b")")[2].split()
        ended = select.poll()
        ended.register(pidfd, select.POLLIN)
        return int(fields[19]) == process.started and not ended.poll(0)
    except (FileNotFoundError, ProcessLookupError):
        return False
    except OSError:
        return True
    finally:
        os.close(pidfd)


def _number(path: str) -> int:
    fd = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
    try:
        return int(os.read(fd, 32))
    finally:
        os.close(fd)


@cache
def _pid_max() -> int:
    try:
        return _number(_PID_MAX)
    except (OSError, ValueError):
        return _LARGEST_PID_MAX
