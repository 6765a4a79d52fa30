"""Whose turn it is to have a snapshot taken, with no sandbox."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from corral.errors import CorralError, RequestError, SandboxClosed
from corral.sandbox.core import State
from corral.sandbox.layer import KeptLayer
from corral.sandbox.snapshots import Snapshots


class Core:
    """Stands in for one that does not come to stand still, until it has ended."""

    state = State.RUNNING
    end_reason = ""

    def freeze(self) -> None:
        if self.state is State.ENDED:
            raise SandboxClosed("killed")
        if self.state is State.FROZEN:
            raise RequestError("the sandbox is frozen; thaw it first")
        self.state = State.FROZEN

    def frozen(self) -> bool:
        return False

    def thaw(self) -> None:
        if self.state is State.FROZEN:
            self.state = State.RUNNING


class Reactor:
    def __init__(self) -> None:
        self.later: list[Callable[[], None]] = []

    def call_later(self, delay: float, callback: Callable[..., None], *args: Any) -> None:
        self.later.append(lambda: callback(*args))

    def turn(self) -> None:
        now, self.later = self.later, []
        for callback in now:
            callback()


def test_all_that_wait_are_told_when_the_sandbox_ends() -> None:
    core, reactor = Core(), Reactor()
    snapshots = Snapshots(core, reactor)  # type: ignore[arg-type]
    told: list[KeptLayer | CorralError] = []
    for _ in range(3000):
        snapshots.take(told.append)
    idle: list[bool] = []
    snapshots.when_idle(lambda: idle.append(snapshots.busy))
    core.state = State.ENDED
    reactor.turn()
    assert len(told) == 3000 and all(isinstance(each, SandboxClosed) for each in told)
    assert idle == [False]


def test_who_waits_until_all_go_on_is_not_called_while_they_stand_still_again() -> None:
    """The first of those that are called back has another one taken."""
    core, reactor = Core(), Reactor()
    snapshots = Snapshots(core, reactor)  # type: ignore[arg-type]
    snapshots.take(lambda _: None)
    seen: list[State] = []

    def take() -> None:
        snapshots.take(lambda _: None)

    snapshots.when_idle(take)
    snapshots.when_idle(lambda: seen.append(core.state))
    core.thaw()
    reactor.turn()
    assert snapshots.busy and seen == []
    core.thaw()
    reactor.turn()
    assert seen == [State.RUNNING]


def test_one_whose_callback_fails_stops_nobody_else() -> None:
    core, reactor = Core(), Reactor()
    snapshots = Snapshots(core, reactor)  # type: ignore[arg-type]
    told: list[object] = []

    def fails(_: object) -> None:
        raise ValueError

    snapshots.take(lambda _: None)
    snapshots.take(fails)
    snapshots.take(told.append)
    core.state = State.ENDED
    try:
        reactor.turn()
    except ValueError:
        reactor.turn()
    assert len(told) == 1
