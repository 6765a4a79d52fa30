"""Waiting on behalf of a caller, without a thread that waits."""

from __future__ import annotations

import time
from collections.abc import Callable
from enum import Enum
from errno import EINTR

from corral.reactor import Timer
from corral.supervisor.call import ERESTARTSYS, Call
from corral.supervisor.sockets import Copy

FIRST_LOOK, LAST_LOOK = 0.02, 0.1
"""Seconds between two looks for signals: at first, and after a while."""
FIRST_PAUSE, LAST_PAUSE = 0.001, 0.05
"""Seconds between two tries where the kernel says "writable" and then "not now"."""


class Look:
    """Looks from time to time whether a caller that waits would wait no longer; tells so once, with the errno."""

    __slots__ = ("_call", "_deadline", "_ended", "_expired", "_interval", "_seen", "_tell", "_timer")

    def __init__(
        self, call: Call, tell: Callable[[int], None], *, deadline: float | None = None, expired: int = EINTR
    ) -> None:
        """``expired`` is what the wait ends with at ``deadline`` (time.monotonic)."""
        self._call, self._tell, self._deadline, self._expired = call, tell, deadline, expired
        self._interval = FIRST_LOOK
        self._ended = self._seen = False
        self._timer: Timer = call.sandbox.loop.call_later(self._until_next(), self._look)

    def _until_next(self) -> float:
        left = LAST_LOOK if self._deadline is None else max(0.0, self._deadline - time.monotonic())
        return min(self._interval, left)

    def _look(self) -> None:
        if self._ended:
            return
        errno = self._call.interruption()
        if errno == EINTR and not self._seen:
            errno, self._seen = 0, True  # another thread may be about to take it
        if errno == ERESTARTSYS and self._deadline is not None:
            errno = EINTR  # a call with a time limit is not made again (signal(7))
        if not errno and self._deadline is not None and time.monotonic() >= self._deadline:
            errno = self._expired
        if errno:
            self._ended = True
            self._tell(errno)
            return
        self._interval = min(self._interval * 2, LAST_LOOK)
        self._timer = self._call.sandbox.loop.call_later(self._until_next(), self._look)

    def end(self) -> None:
        """Looks no more. May be called again."""
        self._ended = True
        self._timer.cancel()


class Outcome(Enum):
    """What came of a try."""

    DONE = "done"
    """The call is answered."""
    MOVED = "moved"
    """Part of it is done."""
    STUCK = "stuck"


class Wait:
    """Tries again whenever a socket is writable, until it is done, the caller is interrupted or its time is over."""

    __slots__ = ("_call", "_copy", "_ended", "_give_up", "_look", "_pause", "_retry", "_try", "_watching")

    def __init__(
        self,
        call: Call,
        copy: Copy,
        attempt: Callable[[], Outcome],
        give_up: Callable[[int], None],
        *,
        expired: int,
    ) -> None:
        """``give_up`` gets the errno that the kernel's own wait would have ended with: ``expired`` after SO_SNDTIMEO.
        Closes ``copy`` when the caller is gone."""
        self._call, self._copy, self._try, self._give_up = call, copy, attempt, give_up
        self._ended = self._watching = False
        self._pause = FIRST_PAUSE
        self._retry: Timer | None = None
        call.when_gone = self._gone
        patience = copy.patience
        deadline = None if patience is None else time.monotonic() + patience
        self._look = Look(call, self._interrupted, deadline=deadline, expired=expired)
        self._watch()

    def _watch(self) -> None:
        self._watching, self._retry = True, None
        self._call.sandbox.loop.add_writer(self._copy.fd, self._attempt)

    def _unwatch(self) -> None:
        if self._watching:
            self._watching = False
            self._call.sandbox.loop.remove_writer(self._copy.fd)

    def _attempt(self) -> None:
        if self._ended:
            return
        self._unwatch()  # before the copy is closed; and most tries are the last
        try:
            outcome = self._try()
        except Exception as error:
            self.end()
            self._copy.close()
            self._call.sandbox.fault(self._call, error)
            return
        if outcome is Outcome.DONE:
            self.end()
        elif outcome is Outcome.MOVED:
            self._pause = FIRST_PAUSE
            self._watch()
        else:
            # "Writable" can be about less than this wants, or about a peer's fault.
            self._retry = self._call.sandbox.loop.call_later(self._pause, self._watch)
            self._pause = min(self._pause * 2, LAST_PAUSE)

    def _interrupted(self, errno: int) -> None:
        self.end()
        self._give_up(errno)

    def end(self) -> None:
        """Tries no more; the copy stays open. May be called again."""
        if not self._ended:
            self._ended = True
            self._unwatch()
            self._look.end()
            if self._retry is not None:
                self._retry.cancel()

    def _gone(self) -> None:
        self.end()
        self._copy.close()
