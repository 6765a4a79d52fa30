"""Watches a sandbox's processes from the host, through /proc, for as long as the demo runs.

Processes are followed by descent from the one that the demo started. Those in a deeper PID namespace count as
sandboxed. A process is known by its number and start time, since numbers are used again.
"""

import os
import threading
import time
from collections import deque
from dataclasses import dataclass
from pathlib import Path

Key = tuple[int, int]  # pid, start time

INTERVAL = 0.1
WINDOW = 2.0  # seconds of processor time that a rate is taken over
TICKS = os.sysconf("SC_CLK_TCK")


@dataclass(frozen=True)
class Process:
    pid: int
    parent: int
    state: str
    seconds: float  # of processor time
    start: int

    @property
    def key(self) -> Key:
        return self.pid, self.start


class Watch(threading.Thread):
    """Samples the descendants of one process until stopped."""

    def __init__(self, root: int) -> None:
        super().__init__(daemon=True)
        self._root = root
        self._done = threading.Event()
        self._depth = _depth(os.getpid())
        # Written by this thread alone, read by others after stop().
        self._known: dict[Key, bool] = {}  # is it sandboxed?
        self._samples: deque[tuple[float, dict[Key, float]]] = deque()
        self.peak = 0
        self.cpus = 0.0
        self.error: Exception | None = None

    def run(self) -> None:
        try:
            while not self._done.wait(INTERVAL):
                self._sample()
        except Exception as error:  # a watch that died must not look like a quiet sandbox
            self.error = error

    def stop(self) -> None:
        self._done.set()
        self.join()

    def survivors(self, marker: str) -> list[Process]:
        """Processes still alive that descend from the root or carry the marker on their command line."""
        known, needle = set(self._known), marker.encode()
        return [
            process
            for process in processes().values()
            if process.state not in "ZX"
            and process.pid != os.getpid()
            and (process.key in known or needle in _command_line(process.pid))
        ]

    def _sample(self) -> None:
        now, alive = time.monotonic(), processes()
        children: dict[int, list[Process]] = {}
        for process in alive.values():
            children.setdefault(process.parent, []).append(process)
        queue = [process for process in alive.values() if process.key in self._known or process.pid == self._root]
        usage: dict[Key, float] = {}
        seen: set[Key] = set()
        while queue:
            process = queue.pop()
            if process.key in seen:
                continue
            seen.add(process.key)
            queue += children.get(process.pid, [])
            if not self._known.get(process.key):  # it may have been seen before it entered its namespace
                self._known[process.key] = _depth(process.pid) > self._depth
            if self._known[process.key] and process.state not in "ZX":
                usage[process.key] = process.seconds
        self.peak = max(self.peak, len(usage))
        self._samples.append((now, usage))
        self._rate()

    def _rate(self) -> None:
        """Processor time that the processes alive at both ends of the window got, per second."""
        now, usage = self._samples[-1]
        while len(self._samples) > 1 and now - self._samples[1][0] >= WINDOW:
            self._samples.popleft()
        then, before = self._samples[0]
        if now - then >= WINDOW:
            spent = sum(seconds - before[key] for key, seconds in usage.items() if key in before)
            self.cpus = max(self.cpus, spent / (now - then))


def processes() -> dict[int, Process]:
    found = (_read(int(name)) for name in os.listdir("/proc") if name.isdecimal())
    return {process.pid: process for process in found if process}


def _read(pid: int) -> Process | None:
    try:
        text = Path(f"/proc/{pid}/stat").read_text(errors="replace")
    except OSError:
        return None
    fields = text.rpartition(")")[2].split()
    seconds = (int(fields[11]) + int(fields[12])) / TICKS
    return Process(pid, int(fields[1]), fields[0], seconds, int(fields[19]))


def _depth(pid: int) -> int:
    """How many PID namespaces deep a process is, as seen from here; 0 if it is gone."""
    try:
        lines = Path(f"/proc/{pid}/status").read_text(errors="replace").splitlines()
    except OSError:
        return 0
    return next((len(line.split()) - 1 for line in lines if line.startswith("NSpid:")), 0)


def _command_line(pid: int) -> bytes:
    try:
        return Path(f"/proc/{pid}/cmdline").read_bytes()
    except OSError:
        return b""
