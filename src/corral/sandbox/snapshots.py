"""Snapshots of one sandbox, and going back to one in its place: all stands still, files are copied, all goes on.

One at a time; the next ones wait for their turn, and so do commands that are to be started meanwhile. Like the core it
is used from the reactor's thread only; the copying happens in a thread of its own.
"""

from __future__ import annotations

import os
import threading
import time
from collections import deque
from collections.abc import Callable
from dataclasses import replace
from functools import partial
from typing import TYPE_CHECKING

from corral.errors import CorralError, SandboxClosed
from corral.reactor import Reactor
from corral.sandbox.copying import Since
from corral.sandbox.keeping import keep
from corral.sandbox.layer import KeptLayer
from corral.sandbox.prepare import new_id
from corral.sandbox.restore import check_fits

if TYPE_CHECKING:
    from concurrent.futures import Future

    from corral.sandbox.core import Core
    from corral.sandbox.restore import Inside

STAND_STILL = 10.0
"""Seconds in which everything must have stopped."""
_LOOK_AGAIN = 0.001

OnTaken = Callable[["KeptLayer | CorralError"], None]
_Result = KeptLayer | BaseException | None


class Taking:
    """A snapshot that was asked for, or, with a layer, going back to that."""

    __slots__ = ("abandoned", "name", "on_taken", "quiet", "recorded", "step", "to", "was_frozen")

    def __init__(self, on_taken: OnTaken, name: str = "", step: int | None = None, to: KeptLayer | None = None) -> None:
        self.on_taken, self.name, self.step, self.to = on_taken, name, step, to
        self.abandoned = False
        """Nobody would know of the snapshot: it is discarded once it is there."""
        self.was_frozen = False
        self.quiet = -1
        """As :attr:`Snapshots._quiet`, of this one."""
        self.recorded: Future[None] | None = None
        """Of going back: done when it is durable that this happens."""


class Snapshots:
    """Takes the snapshots of one sandbox. ``core`` must be running, or frozen, when one is asked for."""

    def __init__(self, core: Core, reactor: Reactor) -> None:
        self.since = Since()
        """What the last one has seen; ``since.layer`` is its id."""
        self._core, self._reactor = core, reactor
        self._waiting: deque[Taking] = deque()
        self._current: Taking | None = None
        self._on_idle: deque[Callable[[], None]] = deque()
        self._is_going_on = False
        self._before = self.since
        self._quiet = -1
        """Where the last one was taken with nobody inside: how many commands there had been; else -1."""

    @property
    def busy(self) -> bool:
        """Whether one is being taken, or waits for its turn."""
        return self._current is not None or bool(self._waiting)

    def take(self, on_taken: OnTaken, *, name: str = "", step: int | None = None) -> Taking:
        """Calls back with a kept layer that holds the files as they were at one moment, or with the error why there
        is none. ``step`` is the one after which it was taken."""
        return self._ask(Taking(on_taken, name, step))

    def restore(self, on_restored: OnTaken, layer: KeptLayer) -> None:
        """Makes its files those of ``layer``, and calls back with that, or with the error why it cannot be. All that
        runs inside is killed before, but for what policy keeps. If it fails half-way the sandbox ends.

        Raises RequestError for a layer that does not fit."""
        check_fits(self._core.prepared, layer)
        self._ask(Taking(on_restored, to=layer))

    def _ask(self, taking: Taking) -> Taking:
        self._waiting.append(taking)
        self._go_on()
        return taking

    def _go_on(self) -> None:
        """Begins what waits; where nothing does, calls back who waits for that. Without recursion: when a sandbox ends,
        all that wait fail one after the other."""
        if self._is_going_on:
            return
        self._is_going_on = True
        try:
            while self._current is None:
                if self._waiting:
                    self._begin()
                elif self._on_idle:
                    self._on_idle.popleft()()  # which may ask for another
                else:
                    break
        except BaseException:
            self._reactor.call_later(0, self._go_on)  # the others are not to wait for good
            raise
        finally:
            self._is_going_on = False

    def when_idle(self, callback: Callable[[], None]) -> None:
        """Calls back when none is being taken; at once where that is now."""
        if self.busy:
            self._on_idle.append(callback)
        else:
            callback()

    def _begin(self) -> None:
        taking = self._current = self._waiting.popleft()
        core = self._core
        from corral.sandbox.core import State  # which makes this

        taking.was_frozen = core.state is State.FROZEN
        try:
            if taking.to is not None:
                taking.recorded = core.tell_restoring(taking.to)
                if taking.recorded is None:
                    raise SandboxClosed("it cannot be recorded")
            if not taking.was_frozen:
                core.freeze()
        except CorralError as error:
            self._end(error)
            return
        self._stand_still(time.monotonic() + STAND_STILL)

    def _stand_still(self, deadline: float) -> None:
        from corral.sandbox.core import State

        core = self._core
        try:
            if core.frozen() and not core.end_others(self._current.to if self._current else None):
                self._start()
                return
            if core.state is not State.FROZEN:
                raise SandboxClosed(core.end_reason or "it was thawed, or is ending")
            if time.monotonic() > deadline:
                core.kill("it could not be frozen")
                raise SandboxClosed("it could not be frozen")
        except (CorralError, OSError, RuntimeError) as error:  # also: no thread, no descriptor
            self._end(error)
            return
        self._reactor.call_later(_LOOK_AGAIN, self._stand_still, deadline)

    @property
    def _returns(self) -> bool:
        return self._current is not None and self._current.to is not None

    def _start(self) -> None:
        taking = self._current
        assert taking is not None  # noqa: S101 - for the type checker
        if taking.to is None:
            self._before = replace(self.since)
            commands = self._core.commands
            self.since.is_calm = self._quiet == commands
            taking.quiet = commands if self._core.is_alone() else -1
            self._in_thread(partial(self._keep, taking), self._copied)
            return
        inside = self._core.open_inside()
        try:
            self._in_thread(partial(self._set_back, taking.to, inside, taking.recorded), self._copied)
        except BaseException:
            inside.close()
            raise

    def _in_thread(self, work: Callable[[], _Result], then: Callable[[_Result], None]) -> None:
        """Does it in a thread of its own, and calls back with what came of it, or with its error."""
        done = os.eventfd(0, os.EFD_CLOEXEC | os.EFD_NONBLOCK)
        came: list[_Result] = []

        def run() -> None:
            try:
                came.append(work())
            except BaseException as error:  # it is the answer
                came.append(error)
            finally:
                os.eventfd_write(done, 1)

        def over() -> None:
            self._reactor.remove_reader(done)
            os.close(done)
            then(came[0])

        try:
            thread = threading.Thread(target=run, name="corral-snapshot", daemon=True)
            self._reactor.add_reader(done, over)
            thread.start()
        except BaseException:
            self._reactor.remove_reader(done)
            os.close(done)
            raise

    def _set_back(self, layer: KeptLayer, inside: Inside, recorded: Future[None] | None) -> KeptLayer:
        try:
            if recorded is not None:
                recorded.result()
            self._core.set_back(layer, inside)
        finally:
            inside.close()
        return layer

    def _keep(self, taking: Taking) -> KeptLayer | None:
        """What it reads is not closed before the last one is over (:meth:`when_idle`)."""
        return keep(
            self._core.prepared,
            self._core.layer_fd,
            identifier=new_id(),
            name=taking.name,
            step=taking.step,
            unchanged=True,
            since=self.since,
        )

    def _copied(self, result: _Result) -> None:
        taking = self._current
        assert taking is not None  # noqa: S101 - for the type checker
        self.since.is_calm, self._quiet = False, -1
        if self._returns:
            if isinstance(result, KeptLayer) and (why := self._why_not()):
                result = CorralError(why)
            if not isinstance(result, KeptLayer):
                self._core.kill(f"its files could not be set back: {result}")
            else:
                self.since = Since(result.id)
                self._core.notices.restored(result.id, result.name)
        elif isinstance(result, KeptLayer):
            why = self._why_not()
            if not why and not self._core.tell_snapshot(result):
                why = "it cannot be recorded"
            if why:
                self._discard(result, why)
                return
            self._quiet = taking.quiet
        self._end(result)

    def _discard(self, layer: KeptLayer, why: str) -> None:
        """Not in the reactor's thread either: it may be of a million files."""
        self.since = self._before

        def discarded(result: _Result) -> None:
            self._end(CorralError(f"{why}; {result}" if result is not None else why))

        try:
            self._in_thread(layer.discard, discarded)
        except (OSError, RuntimeError) as error:
            self._end(CorralError(f"{why}; what was copied stays as layer {layer.id}: {error}"))

    def _why_not(self) -> str:
        """Why what was copied is no snapshot, or what was set back is not what there is; or nothing."""
        taking = self._current
        assert taking is not None  # noqa: S101 - for the type checker
        try:
            if taking.abandoned:
                return "nobody waits for it any more"
            if self._core.frozen():
                return ""
        except CorralError as error:
            return str(error)
        if taking.to is not None:
            return self._core.end_reason or "something inside went on meanwhile"
        return self._core.end_reason or "something inside went on while a snapshot was taken; take another"

    def _end(self, result: _Result) -> None:
        taking, self._current = self._current, None
        assert taking is not None  # noqa: S101 - for the type checker
        if not taking.was_frozen:
            self._core.thaw()
        answer = result if isinstance(result, KeptLayer | CorralError) else CorralError(f"it failed: {result}")
        try:
            taking.on_taken(answer)  # which may ask for another
        finally:
            self._go_on()
