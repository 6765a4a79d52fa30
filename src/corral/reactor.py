"""What Corral needs of an event loop, and a small loop that offers just that.

`asyncio` loops satisfy :class:`Reactor` as they are. :class:`Loop` exists because importing asyncio takes longer than
starting a sandbox: `corral run` uses it, everything else uses asyncio.
"""

from __future__ import annotations

import heapq
import os
import select
import signal
import time
from collections import deque
from collections.abc import Callable
from contextlib import suppress
from typing import Any, Protocol


class Timer(Protocol):
    """Something that was to happen later."""

    def cancel(self) -> None:
        """It will not happen."""


class Reactor(Protocol):
    """The part of :class:`asyncio.AbstractEventLoop` that the sandbox's core uses."""

    def add_reader(self, fd: int, callback: Callable[..., object], *args: Any) -> Any:
        """Calls back whenever ``fd`` is readable."""

    def remove_reader(self, fd: int) -> Any:
        """No longer calls back."""

    def add_writer(self, fd: int, callback: Callable[..., object], *args: Any) -> Any:
        """Calls back whenever ``fd`` is writable."""

    def remove_writer(self, fd: int) -> Any:
        """No longer calls back."""

    def call_later(self, delay: float, callback: Callable[..., object], *args: Any) -> Timer:
        """Calls back once, after ``delay`` seconds."""


def _nothing() -> None:
    pass


class _Timer:
    __slots__ = ("args", "callback", "cancelled")

    def __init__(self, callback: Callable[..., object], args: tuple[Any, ...]) -> None:
        self.callback, self.args, self.cancelled = callback, args, False

    def cancel(self) -> None:
        # It may lie in the heap for long, and must not keep what it was for: others decide how many there are.
        self.callback, self.args, self.cancelled = _nothing, (), True


class Loop:
    """A single-threaded reactor over epoll(7). Level-triggered; callbacks may add and remove anything."""

    def __init__(self) -> None:
        self._epoll = select.epoll()
        self._readers: dict[int, tuple[Callable[..., object], tuple[Any, ...]]] = {}
        self._writers: dict[int, tuple[Callable[..., object], tuple[Any, ...]]] = {}
        self._timers: list[tuple[float, int, _Timer]] = []
        self._count = 0
        self._stopped = False
        self._wakeup: tuple[int, int] | None = None
        self._posted: deque[tuple[Callable[..., object], tuple[Any, ...]]] = deque()
        self._post_fd = -1
        self.events = 0
        """The epoll events of the descriptor whose callback runs now."""
        self.turn = 1
        """The number of the callback that runs now, or that ran last."""
        self.idle = False
        """Whether there is nothing to do."""

    def heed_signals(self) -> None:
        """Python's signal handlers run when their signal comes. To be called by the main thread.

        Python runs handlers between bytecodes only. A signal that comes after the last of them and before epoll_wait(2)
        would wait for the next event, however long that takes; the C-level handler's byte in a pipe is that event.
        """
        reader, writer = self._wakeup = os.pipe2(os.O_NONBLOCK | os.O_CLOEXEC)
        signal.set_wakeup_fd(writer, warn_on_full_buffer=False)
        self.add_reader(reader, os.read, reader, 4096)

    def accept_posts(self) -> None:
        """From here on other threads may :meth:`post`."""
        self._post_fd = os.eventfd(0, os.EFD_CLOEXEC | os.EFD_NONBLOCK)
        self.add_reader(self._post_fd, self._run_posted)

    def post(self, callback: Callable[..., object], *args: Any) -> None:
        """Has the loop's thread call this soon. May be called from any thread; nothing happens once it is closed."""
        self._posted.append((callback, args))
        with suppress(OSError, ValueError):
            os.eventfd_write(self._post_fd, 1)

    def _run_posted(self) -> None:
        os.eventfd_read(self._post_fd)
        for _ in range(len(self._posted)):
            callback, args = self._posted.popleft()
            self.turn += 1
            callback(*args)

    def _update(self, fd: int, known: bool) -> None:
        events = (select.EPOLLIN if fd in self._readers else 0) | (select.EPOLLOUT if fd in self._writers else 0)
        if not events:
            if known:
                with suppress(OSError):  # closed meanwhile, which unregisters it
                    self._epoll.unregister(fd)
        elif known:
            self._epoll.modify(fd, events)
        else:
            self._epoll.register(fd, events)

    def add_reader(self, fd: int, callback: Callable[..., object], *args: Any) -> None:
        reads = fd in self._readers
        self._readers[fd] = (callback, args)
        if not reads:
            self._update(fd, fd in self._writers)

    def remove_reader(self, fd: int) -> bool:
        if self._readers.pop(fd, None) is None:
            return False
        self._update(fd, True)
        return True

    def add_writer(self, fd: int, callback: Callable[..., object], *args: Any) -> None:
        writes = fd in self._writers
        self._writers[fd] = (callback, args)
        if not writes:
            self._update(fd, fd in self._readers)

    def remove_writer(self, fd: int) -> bool:
        if self._writers.pop(fd, None) is None:
            return False
        self._update(fd, True)
        return True

    def call_later(self, delay: float, callback: Callable[..., object], *args: Any) -> Timer:
        timer = _Timer(callback, args)
        self._count += 1
        heapq.heappush(self._timers, (time.monotonic() + delay, self._count, timer))
        return timer

    def stop(self) -> None:
        """Ends :meth:`run` after the current round."""
        self._stopped = True

    def _run_timers(self) -> float:
        """Runs what is due and returns the seconds until the next; one that sets itself again at once waits a round."""
        timers = self._timers
        now = time.monotonic()
        ran = False
        while timers:
            due, _, timer = timers[0]
            if due > now and not timer.cancelled:
                return max(0.0, due - time.monotonic()) if ran else due - now
            ran = True
            heapq.heappop(timers)
            if not timer.cancelled:
                self.turn += 1
                timer.callback(*timer.args)
        return -1

    def run(self) -> None:
        """Serves until :meth:`stop`."""
        self._stopped = False
        while self._round():
            pass

    def _round(self) -> bool:
        """What is due and what is ready now. Returns whether there is to be another round."""
        wait = self._run_timers()
        if self._stopped:
            return False
        self.idle = True
        found = self._epoll.poll(wait)
        self.idle = False
        for fd, events in found:
            # A callback of this round may have removed what comes later in it.
            self.events = events
            self.turn += 1
            if events & ~select.EPOLLOUT and (reader := self._readers.get(fd)):
                reader[0](*reader[1])
            if events & ~select.EPOLLIN and (writer := self._writers.get(fd)):
                writer[0](*writer[1])
        return not self._stopped

    def close(self) -> None:
        """Frees the loop."""
        if self._wakeup:
            signal.set_wakeup_fd(-1)
            for fd in self._wakeup:
                os.close(fd)
        if self._post_fd >= 0:
            fd, self._post_fd = self._post_fd, -1
            os.close(fd)
        self._epoll.close()
