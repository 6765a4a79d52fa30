"""Stops all processes of a sandbox where they are, and lets them go on.

With a version 2 cgroup the kernel does it (cgroup-v2.rst, cgroup.freeze); without one, SIGSTOP from the sandbox's first
process, which a program inside can tell afterwards.
"""

from __future__ import annotations

import os
import threading
from collections.abc import Callable, Collection
from contextlib import suppress

from corral.errors import SandboxClosed
from corral.sandbox.channel import Request
from corral.sandbox.limits import children, descendants

# Where a stopped thread sleeps: the freezer itself, or a vfork(2) whose child is stopped.
_STOPPED = frozenset(("do_freezer_trap", "get_signal", "do_signal_stop", "wait_for_vfork_done", "kernel_clone"))


class Freezer:
    """``group`` is the sandbox's version 2 cgroup, or None; ``request`` asks its first process. For any thread."""

    def __init__(self, group: str | None, request: Callable[[Request], None]) -> None:
        self._group, self._request = group, request
        self._lock = threading.Lock()
        self._unconfirmed = 0

    def stop(self) -> None:
        """Asks for it; :meth:`has_stopped` says when it is done."""
        with self._lock:
            self._unconfirmed += 1
        self._set("1", Request.STOP_ALL)

    def go_on(self) -> None:
        """Undoes :meth:`stop`."""
        with suppress(SandboxClosed):  # then nothing stands still any more
            self._set("0", Request.CONTINUE_ALL)

    def confirm(self) -> None:
        """The first process has done what :meth:`stop` asked of it."""
        with self._lock:
            self._unconfirmed -= 1

    def _set(self, value: str, request: Request) -> None:
        if self._group is None:
            self._request(request)
            return
        try:
            fd = os.open(f"{self._group}/cgroup.freeze", os.O_WRONLY | os.O_CLOEXEC)
            try:
                os.write(fd, value.encode())
            finally:
                os.close(fd)
        except OSError:
            raise SandboxClosed("it is ending") from None

    def has_stopped(self, keeper: int, waiting: Collection[int]) -> bool:
        """Whether all below the keeper but the first process have stopped.

        ``waiting`` are threads that wait in notified calls. To the kernel they have not stopped, as a call that was
        received is left by its answer or by death only; but they cannot do anything before they have stopped too.
        """
        if self._group is None:
            if self._unconfirmed:
                return False  # they may still stand still from the last time
            first = children(keeper)
            if not first:
                return False
            all_stopped = all(
                tid in waiting or _has_stopped(pid, tid)
                for pid in (pid for each in first for pid in descendants(each))
                for tid in _threads(pid)
            )
            if not all_stopped:
                # On its way still; or it goes on again, as the kernel lets a stopped group whose last parent ends
                # meanwhile (setpgid(2), "orphaned process group").
                self.stop()
            return all_stopped
        try:
            with open(f"{self._group}/cgroup.events", encoding="ascii") as file:
                if "frozen 1" in file.read():
                    return True
            if not waiting:
                return False
            with open(f"{self._group}/cgroup.threads", encoding="ascii") as file:
                others = {int(line) for line in file} - set(waiting)
        except OSError:
            raise SandboxClosed("it is ending") from None
        return all(_stands_still(tid) for tid in others)


def _threads(pid: int) -> list[int]:
    with suppress(OSError):
        return [int(name) for name in os.listdir(f"/proc/{pid}/task")]
    return []  # it has ended


def _has_stopped(pid: int, tid: int) -> bool:
    """By its state (proc_pid_stat(5)); a vfork(2) whose child has stopped waits without being stopped."""
    try:
        with open(f"/proc/{pid}/task/{tid}/stat", "rb") as file:
            state = file.read().rpartition(b") ")[2][:1]
    except OSError:
        return True  # it has ended
    return state in b"TtZX" or (state == b"D" and _stands_still(tid))


def _stands_still(tid: int) -> bool:
    with suppress(FileNotFoundError, ProcessLookupError), open(f"/proc/{tid}/wchan", encoding="ascii") as file:
        return file.read() in _STOPPED
    return True  # it has ended
