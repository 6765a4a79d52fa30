"""Keeps the supervisor's thread from waiting in the kernel, however an agent has set up what is done for it.

Nothing that the supervisor does is meant to wait, but some of it depends on what others share and can change at any
moment: a connect(2) waits if O_NONBLOCK is taken away just before, and the last close(2) of a connection waits for as
long as its SO_LINGER says (socket(7)). Such waits end with a signal. So there is a second thread, which sends one to
the first where it finds it in the same piece of work for too long.
"""

from __future__ import annotations

import ctypes
import errno as errors
import os
import signal
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager

LOOK = 0.05
"""Seconds between two looks whether the thread goes on."""
AGAIN = 0.005
"""Seconds between two signals to a thread that does not."""


class _SignalAction(ctypes.Structure):
    """``struct sigaction`` of the C library (sigaction(2))."""

    _fields_ = (
        ("handler", ctypes.c_void_p),
        ("mask", ctypes.c_uint8 * 128),
        ("flags", ctypes.c_int),
        ("restorer", ctypes.c_void_p),
    )


_libc = ctypes.CDLL(None, use_errno=True)
_sigaction = _libc.sigaction
_sigaction.argtypes = (ctypes.c_int, ctypes.POINTER(_SignalAction), ctypes.POINTER(_SignalAction))
_number = 0
_lock = threading.Lock()


def _choose() -> int:
    """A signal that only ends waiting calls: one that nobody here uses, with a function that does nothing, and without
    SA_RESTART. Python's own way to set it needs the main thread. Raises OSError."""
    global _number
    with _lock:
        if not _number:
            nothing = ctypes.cast(_libc.abs, ctypes.c_void_p).value
            for number in range(signal.SIGRTMAX - 1, signal.SIGRTMIN, -1):
                found = _SignalAction()
                if _sigaction(number, None, ctypes.byref(found)) == 0 and not found.handler:
                    if _sigaction(number, ctypes.byref(_SignalAction(handler=nothing)), None) < 0:
                        break
                    _number = number
                    return number
            raise OSError(errors.EAGAIN, os.strerror(errors.EAGAIN))
        return _number


@contextmanager
def uninterrupted() -> Iterator[None]:
    """For what must not be interrupted by the watchdog of this thread, and cannot wait for long."""
    before = signal.pthread_sigmask(signal.SIG_BLOCK, (_number,) if _number else ())
    try:
        yield
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, before)


class Watchdog:
    """Looks after the thread that makes it."""

    def __init__(self, progress: Callable[[], int]) -> None:
        """``progress`` says at what piece of work the thread is, by a number that is never the same again; 0 where it
        waits for work. Raises OSError."""
        self._progress = progress
        self._number = _choose()
        signal.pthread_sigmask(signal.SIG_UNBLOCK, (self._number,))
        self._thread = threading.get_ident()
        self._wanted = threading.Event()
        self._ended = False
        self.woken = 0
        """Pieces of work that had to be interrupted."""
        threading.Thread(target=self._look, name="corral-watchdog", daemon=True).start()

    def watch(self, wanted: bool) -> None:
        """Whether there is anything to look after."""
        if wanted:
            self._wanted.set()
        else:
            self._wanted.clear()

    def end(self) -> None:
        """To be called by the thread before it ends."""
        self._ended = True
        self._wanted.set()

    def _look(self) -> None:
        before = 0
        while self._wanted.wait() and not self._ended:
            now = self._progress()
            if now and now == before:
                self.woken += 1
                while now == self._progress() and not self._ended:
                    signal.pthread_kill(self._thread, self._number)
                    time.sleep(AGAIN)
            before = now
            time.sleep(LOOK)


def _after_fork() -> None:
    """A child has none of its parent's threads, and so nobody who would let go of the lock."""
    global _lock
    _lock = threading.Lock()


os.register_at_fork(after_in_child=_after_fork)
