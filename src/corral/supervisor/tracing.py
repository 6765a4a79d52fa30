"""Looks at a process between the moment it executes a program and the program's first instruction.

The kernel reads path and arguments of an execve(2) once more than we do, and whoever shares the memory, has
``/proc/PID/mem`` open or may rename files can have changed them meanwhile. Nothing shows beforehand that nobody will.
So where it matters, what has become of the call is compared with what was decided: ptrace(2) stops the process when the
kernel has taken over everything and the new program has not begun. There its file and its arguments are facts.

Only this thread traces, a process only for the length of one call, and nobody inside can trace at all. What is traced
dies with the thread that traces it.
"""

from __future__ import annotations

import ctypes
import errno as errors
import os
import signal
from collections.abc import Callable
from contextlib import suppress

from corral.reactor import Reactor
from corral.supervisor.call import Call

FIRST_LOOK, LAST_LOOK = 0.001, 0.02
"""Seconds between two looks whether the process has stopped."""
_SEIZE, _INTERRUPT, _DETACH, _GET_SIGNAL_INFO = 0x4206, 0x4207, 17, 0x4202
_TRACE_EXEC, _KILL_WITH_TRACER = 0x10, 0x100000
_EVENT_EXEC = 4
_CODE = slice(8, 12)  # si_code of siginfo_t
_SIGNAL_INFO_BYTES = 128
_WAIT_ALL, _WAIT_OWN = 0x40000000, 0x20000000  # __WALL, __WNOTHREAD

_ptrace = ctypes.CDLL(None, use_errno=True).ptrace
_ptrace.argtypes = (ctypes.c_long, ctypes.c_int, ctypes.c_void_p, ctypes.c_void_p)
_ptrace.restype = ctypes.c_long


class Trace:
    """The one call of ``call``'s thread that the kernel makes next, watched to its end."""

    __slots__ = ("_doomed", "_ended", "_loop", "_pause", "_pids", "_refused", "_verify")

    def __init__(
        self, call: Call, verify: Callable[[int], bool], refused: Callable[[], None], ended: Callable[[], None]
    ) -> None:
        """Lets the kernel make the call, which must be one that executes.

        If it does, ``verify`` is asked about the process before its first instruction; whatever is not True, also an
        exception, kills it, and ``refused`` is told. If the call fails, the caller learns that, and nobody else.
        ``ended`` is told when there is nothing left to look at.
        Raises OSError where the process cannot be traced; then nothing has happened.
        """
        self._verify, self._refused, self._ended = verify, refused, ended
        self._loop: Reactor = call.sandbox.loop
        self._doomed = False
        self._pause = FIRST_LOOK
        # Whichever thread executes is the process's first one afterwards, under its number.
        self._pids = {call.tid, call.actor.process.pid}
        _checked(_SEIZE, call.tid, _TRACE_EXEC | _KILL_WITH_TRACER)
        # So that it stops too where the call fails: on its way out, as here it waits for death only.
        _checked(_INTERRUPT, call.tid)
        call.proceed()
        self._loop.call_later(FIRST_LOOK, self._look)

    def _look(self) -> None:
        for pid in self._pids:
            event = _event(pid)
            if event is not None and not self._doomed:
                self._stopped(pid, event)
                if not self._doomed:
                    self._ended()
                    return
        if self._is_over():
            self._ended()
        else:
            self._pause = min(self._pause * 1.5, LAST_LOOK)
            self._loop.call_later(self._pause, self._look)

    def _stopped(self, pid: int, event: int) -> None:
        if event == _EVENT_EXEC:
            try:
                right = self._verify(pid)
            except Exception:
                right = False
            if not right:
                self._kill(pid)
                self._refused()
                return
        if _ptrace(_DETACH, pid, None, None) < 0:  # it is dying already
            self._kill(pid)

    def _kill(self, pid: int) -> None:
        """It stays traced until it is reaped, which nobody else could."""
        self._doomed, self._pause = True, FIRST_LOOK
        with suppress(ProcessLookupError):
            os.kill(pid, signal.SIGKILL)

    def _is_over(self) -> bool:
        """Whether it has died. The dead wait for whoever traced them."""
        known = False
        for pid in self._pids:
            try:
                found, status = os.waitpid(pid, os.WNOHANG | _WAIT_ALL | _WAIT_OWN)
            except ChildProcessError:
                continue
            if found and not os.WIFSTOPPED(status):
                return True
            known = True
        return not known


def _checked(request: int, pid: int, data: int = 0) -> None:
    if _ptrace(request, pid, None, data) < 0:
        error = ctypes.get_errno()
        raise OSError(error, os.strerror(error))


def _event(pid: int) -> int | None:
    """At which event the process has stopped for us; None where it has not.

    It is asked for in this way, and not waited for, because in a process that others share somebody else may have
    waited already.
    """
    buffer = ctypes.create_string_buffer(_SIGNAL_INFO_BYTES)
    if _ptrace(_GET_SIGNAL_INFO, pid, None, ctypes.addressof(buffer)) < 0:
        return None if ctypes.get_errno() == errors.ESRCH else -1
    return int.from_bytes(buffer.raw[_CODE], "little", signed=True) >> 8
