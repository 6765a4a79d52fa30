"""Limits of a sandbox: rlimits for every process, cgroups where there are any, accounting where there are none.

Without a memory cgroup the kernel bounds each process (RLIMIT_DATA), each file and the layer, but not their sum. The
accountant then adds up what the sandbox's processes hold and kills the sandbox when it is over its limit, or when the
machine itself runs out of memory. `corral doctor` says which of the two a machine offers.
"""

from __future__ import annotations

import os
import resource
import signal
import threading
import time
from collections.abc import Callable, Iterable, Mapping
from contextlib import suppress

from corral.errors import RequestError
from corral.policy.model import MIB, Resources
from corral.sandbox.cgroups import Controller, Groups
from corral.sandbox.plan import Plan
from corral.supervisor.syscalls import FIXED_PROCESSORS, UNCOUNTED_MEMORY, Refusal

ACCOUNTING_INTERVAL = 0.2
MAX_BLIND = 10
"""Times in a row that the memory of sandboxes could not be counted, after which they end."""
HOST_RESERVE = 256 * MIB
RESERVED_SHARE = 20
"""Below this much available memory (bytes, or a twentieth of all if that is more) the accountant kills the largest
sandbox that it watches. What it cannot attribute, such as socket buffers, is bounded by this alone."""
Rlimits = Mapping[int, int | tuple[int, int]]
"""By ``resource.RLIMIT_*``: the soft and the hard limit as for :func:`resource.setrlimit`, or one number for both."""
_RLIMITS = frozenset(value for name, value in vars(resource).items() if name.startswith("RLIMIT_"))
_RLIM_INFINITY = (1 << 64) - 1
_PROC = "/proc"
_PAGE = resource.getpagesize()
_MEMLOCK = 8 * MIB
_MSGQUEUE = 800 * 1024


def plan_limits(plan: Plan, resources: Resources, groups: Groups) -> None:
    """Adds rlimits, and what stands in for cgroup controllers that are missing."""
    limits = {
        resource.RLIMIT_NOFILE: resources.open_files,
        resource.RLIMIT_NPROC: resources.processes,
        resource.RLIMIT_FSIZE: resources.disk,
        resource.RLIMIT_CORE: 1,  # 0 would still feed a core_pattern that is a pipe (core(5)), on the host
        resource.RLIMIT_MEMLOCK: _MEMLOCK,
        resource.RLIMIT_MSGQUEUE: _MSGQUEUE,
        resource.RLIMIT_NICE: 0,
        resource.RLIMIT_RTPRIO: 0,
        resource.RLIMIT_SIGPENDING: 4 * resources.processes,
    }
    if groups.path(Controller.MEMORY) is None:
        # Private writable memory of one process. RLIMIT_AS would break runtimes that only reserve addresses.
        limits[resource.RLIMIT_DATA] = resources.memory
    for number, value in limits.items():
        plan.rlimit(number, value)
    if resources.cpu is not None and groups.path(Controller.CPU) is None:
        mine = sorted(os.sched_getaffinity(0))
        wanted = min(len(mine), max(1, -(-int(resources.cpu * 1000) // 1000)))
        start = int.from_bytes(os.urandom(2), "little") % len(mine)
        plan.affinity([mine[(start + offset) % len(mine)] for offset in range(wanted)])


def exec_limits(limits: Rlimits | None) -> list[tuple[int, int, int]]:
    """(resource, soft, hard) as an exec request has them. Raises RequestError for what cannot be one."""
    found = []
    for number, value in (limits or {}).items():
        pair = value if isinstance(value, tuple) else (value, value)
        soft, hard = (_RLIM_INFINITY if each == resource.RLIM_INFINITY else each for each in pair)
        if number not in _RLIMITS or not 0 <= soft <= hard <= _RLIM_INFINITY:
            raise RequestError(f"limits: {number}: {value} is no limit (one number, or a soft and a hard one)")
        if number == resource.RLIMIT_CORE:  # see plan_limits
            raise RequestError("limits: RLIMIT_CORE cannot be set: no core dump may reach a program of the host")
        found.append((number, soft, hard))
    return found


def refusals_for(resources: Resources, groups: Groups) -> tuple[Refusal, ...]:
    """System calls that would undo what stands in for cgroup controllers that are missing."""
    refusals: tuple[Refusal, ...] = ()
    if groups.path(Controller.MEMORY) is None:
        refusals += UNCOUNTED_MEMORY
    if resources.cpu is not None and groups.path(Controller.CPU) is None:
        refusals += FIXED_PROCESSORS
    return refusals


def children(pid: int) -> list[int]:
    found: list[int] = []
    try:
        for task in os.listdir(f"{_PROC}/{pid}/task"):
            with open(f"{_PROC}/{pid}/task/{task}/children", "rb") as file:
                found += map(int, file.read().split())
    except (OSError, ValueError):
        pass
    return found


def descendants(pid: int) -> list[int]:
    """All processes below ``pid``. A sandbox's orphans are its first process's children, so none is missed for long."""
    found: list[int] = []
    pending = children(pid)
    while pending:
        current = pending.pop()
        found.append(current)
        pending += children(current)
    return found


def end_all_but(keeper: int, keeps: Callable[[str], bool]) -> bool:
    """SIGKILL to all below a keeper's first process but those whose program ``keeps`` says; whether any of it lives."""
    found = False
    for first in children(keeper):
        for pid in descendants(first):
            try:
                pidfd = os.pidfd_open(pid)
            except ProcessLookupError:
                continue
            try:
                if _is_over(pid) or keeps(_program(pid)):
                    continue
                signal.pidfd_send_signal(pidfd, signal.SIGKILL)
                found = True
            except (FileNotFoundError, ProcessLookupError):
                continue  # it has ended
            finally:
                os.close(pidfd)
    return found


def _is_over(pid: int) -> bool:
    """Whether it waits for its parent only. A process whose first thread has ended looks like that too, as long as
    others of its threads go on (proc_pid_stat(5), state and num_threads)."""
    with open(f"{_PROC}/{pid}/stat", "rb") as file:
        fields = file.read().rpartition(b") ")[2].split()
    return fields[0] == b"X" or (fields[0] == b"Z" and int(fields[17]) <= 1)


def _program(pid: int) -> str:
    """The path of what a process runs; nothing where that is not told."""
    try:
        return os.readlink(f"{_PROC}/{pid}/exe")
    except (PermissionError, FileNotFoundError):  # no longer dumpable; without its first thread
        return ""


def resident(pid: int) -> int:
    """Bytes of memory that only this process answers for: anonymous pages (proc_pid_statm(5))."""
    try:
        with open(f"{_PROC}/{pid}/statm", "rb") as file:
            fields = file.read().split()
        return (int(fields[1]) - int(fields[2])) * _PAGE
    except (OSError, ValueError, IndexError):
        return 0


def shared_anonymous(pids: Iterable[int]) -> int:
    """Bytes of memory that processes share without a file (mmap(2), MAP_ANONYMOUS | MAP_SHARED), each mapping once.

    Counted by size: MADV_DONTNEED takes such pages out of every process's resident set, but does not free them.
    """
    ends: dict[bytes, int] = {}
    for pid in pids:
        try:
            with open(f"{_PROC}/{pid}/maps", "rb") as file:
                for line in file:
                    if line.endswith(b"(deleted)\n") and (b" /dev/zero" in line or b" /SYSV" in line):
                        addresses, _, offset, device, inode = line.split(None, 5)[:5]
                        start, _, end = addresses.partition(b"-")
                        last = int(offset, 16) + int(end, 16) - int(start, 16)
                        ends[device + inode] = max(last, ends.get(device + inode, 0))
        except OSError:
            continue
    return sum(ends.values())


def nonresident(pids: Iterable[int]) -> int:
    """Bytes that processes hold beside what is resident: what was swapped out, and page tables (proc_pid_status(5)).

    The latter can be many times what is resident: reading untouched memory makes them.
    """
    total = 0
    for pid in pids:
        with suppress(OSError), open(f"{_PROC}/{pid}/status", "rb") as file:
            total += sum(int(line.split()[1]) for line in file if line.startswith((b"VmSwap:", b"VmPTE:")))
    return total * 1024


def machine_memory(field: bytes) -> int:
    """Bytes that a field of /proc/meminfo tells; 0 where there is no such field (proc_meminfo(5))."""
    with open(f"{_PROC}/meminfo", "rb") as file:
        for line in file:
            if line.startswith(field + b":"):
                return int(line.split()[1]) * 1024
    return 0


def available_memory() -> int:
    """Bytes that the machine can still give out."""
    return machine_memory(b"MemAvailable")


class Accountant(threading.Thread):
    """Adds up the memory of sandboxes that no cgroup bounds; one thread for all of a controller's sandboxes.

    It does not depend on an event loop, which a busy trainer may not serve for seconds.
    """

    def __init__(self) -> None:
        super().__init__(name="corral-accountant", daemon=True)
        self._watched: dict[int, tuple[int, Callable[[], int], Callable[[str], None]]] = {}
        self._lock = threading.Lock()  # guards _watched

    def watch(self, keeper: int, memory: int, layer_used: Callable[[], int], kill: Callable[[str], None]) -> None:
        """Watches the sandbox below ``keeper``; calls ``kill`` with a reason from this thread, once."""
        with self._lock:
            self._watched[keeper] = (memory, layer_used, kill)
        if not self.is_alive():
            self.start()

    def forget(self, keeper: int) -> None:
        """Stops watching."""
        with self._lock:
            self._watched.pop(keeper, None)

    def used(self, keeper: int, layer_used: Callable[[], int], limit: int = 0) -> int:
        """Bytes that a sandbox holds in memory, its layer included; exact only above ``limit``.

        Below it the costly part is left out, as long as all memory of these kinds on the machine would not matter.
        """
        pids, layer = descendants(keeper), layer_used()
        used = sum(resident(pid) for pid in pids) + layer
        shared = max(0, machine_memory(b"Shmem") - layer)
        swapped = machine_memory(b"SwapTotal") - machine_memory(b"SwapFree")
        if used + shared + swapped + machine_memory(b"PageTables") <= limit:
            return used
        # Shared memory leaves Shmem when it is swapped out.
        return used + min(shared + swapped, shared_anonymous(pids)) + nonresident(pids)

    def run(self) -> None:
        blind = 0
        while True:
            time.sleep(ACCOUNTING_INTERVAL)
            with self._lock:
                watched = dict(self._watched)
            try:
                self._look(watched)
                blind = 0
            except OSError:  # no descriptors left, as a rule; nobody may use more than is counted for long
                blind += 1
                if blind >= MAX_BLIND:
                    for keeper, (_, _, kill) in watched.items():
                        self.forget(keeper)
                        kill("its memory could not be counted any more")

    def _look(self, watched: dict[int, tuple[int, Callable[[], int], Callable[[str], None]]]) -> None:
        """Adds up, and ends who has too much. Raises OSError where it cannot look."""
        largest, largest_used = 0, 0
        for keeper, (memory, layer_used, kill) in watched.items():
            used = self.used(keeper, layer_used, memory)
            if used > memory:
                self.forget(keeper)
                kill(f"out of memory: {used} bytes in use, {memory} allowed")
            elif used > largest_used:
                largest, largest_used = keeper, used
        if largest and available_memory() < max(HOST_RESERVE, machine_memory(b"MemTotal") // RESERVED_SHARE):
            _, _, kill = watched[largest]
            self.forget(largest)
            kill(f"the machine is out of memory; this sandbox held the most of it ({largest_used} bytes)")
