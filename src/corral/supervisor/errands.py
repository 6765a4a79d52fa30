"""Requests to the deputy for a caller who waits: it may die, or be interrupted, before the reply is there."""

from __future__ import annotations

import os
import time
from collections.abc import Callable
from errno import EAGAIN, EPERM

from corral.reactor import Timer
from corral.supervisor.call import Call
from corral.supervisor.deputy_wire import Reply
from corral.supervisor.waiting import FIRST_PAUSE, LAST_PAUSE, Look

Ask = Callable[[Callable[[Reply], None]], int]


class Errand:
    """One request. ``done`` gets its reply, or ``give_up`` the errno that ended the wait for it."""

    __slots__ = ("_ask", "_call", "_done", "_ended", "_give_up", "_look", "_number", "_patient", "_pause", "_release",
                 "_timer")  # fmt: skip

    def __init__(
        self,
        call: Call,
        ask: Ask,
        done: Callable[[Reply], None],
        *,
        release: Callable[[], None],
        give_up: Callable[[int], None] | None = None,
        patient: bool = False,
        deadline: float | None = None,
    ) -> None:
        """``ask`` hands the request to the deputy. ``release`` frees what the call holds when it comes to nothing;
        without ``give_up`` the call then fails. With ``patient`` EAGAIN is tried again, until ``deadline``
        (time.monotonic)."""
        self._call, self._ask, self._done, self._release = call, ask, done, release
        self._give_up = give_up or self._fail
        self._patient = patient
        self._pause = FIRST_PAUSE
        self._timer: Timer | None = None
        self._ended = False
        self._number = 0
        call.when_gone = self._gone
        self._look = Look(call, self._interrupted, deadline=deadline, expired=EAGAIN)
        self._start()

    def _start(self) -> None:
        if not self._ended:
            self._timer = None
            self._number = self._ask(self._replied)

    def _replied(self, reply: Reply) -> None:
        if self._ended:
            if reply.fd >= 0:
                os.close(reply.fd)
            return
        self._number = 0
        if reply.busy or (reply.errno == EAGAIN and self._patient):
            self._timer = self._call.sandbox.loop.call_later(self._pause, self._ask_again)
            self._pause = min(self._pause * 2, LAST_PAUSE)
            return
        self._end()
        self._try(lambda: self._done(reply))

    def _ask_again(self) -> None:
        self._try(self._start)  # what the request takes from the caller may be gone by now

    def _try(self, step: Callable[[], None]) -> None:
        try:
            step()
        except OSError as error:
            self._end()
            self._give_up(error.errno or EPERM)
        except Exception as error:
            self._end()
            self._release()
            self._call.sandbox.fault(self._call, error)

    def _interrupted(self, errno: int) -> None:
        self._end()
        self._give_up(errno)

    def _fail(self, errno: int) -> None:
        self._release()
        self._call.fail(errno)

    def _end(self) -> None:
        if not self._ended:
            self._ended = True
            self._look.end()
            if self._timer is not None:
                self._timer.cancel()
            if self._number:
                self._call.sandbox.deputy.cancel(self._number)

    def _gone(self) -> None:
        self._end()
        self._release()


def deadline(patience: float | None) -> float | None:
    """When a wait of so many seconds that begins now is over."""
    return None if patience is None else time.monotonic() + patience
