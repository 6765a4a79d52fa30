"""A shared loop, as one sandbox's work uses it: what goes wrong there is the end of that sandbox only."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from corral.reactor import Loop, Timer


class Guarded:
    """A :class:`corral.reactor.Reactor` over a shared loop."""

    __slots__ = ("_fault", "_loop")

    def __init__(self, loop: Loop, fault: Callable[[Exception], None]) -> None:
        """``fault`` is told of what a callback raises, which the loop itself would not survive."""
        self._loop, self._fault = loop, fault

    def _run(self, callback: Callable[..., object], args: tuple[Any, ...]) -> None:
        try:
            callback(*args)
        except Exception as error:
            self._fault(error)

    def call(self, callback: Callable[..., object], *args: Any) -> None:
        """Calls it now, where the one who calls serves others as well."""
        self._run(callback, args)

    def add_reader(self, fd: int, callback: Callable[..., object], *args: Any) -> None:
        self._loop.add_reader(fd, self._run, callback, args)

    def remove_reader(self, fd: int) -> bool:
        return self._loop.remove_reader(fd)

    def add_writer(self, fd: int, callback: Callable[..., object], *args: Any) -> None:
        self._loop.add_writer(fd, self._run, callback, args)

    def remove_writer(self, fd: int) -> bool:
        return self._loop.remove_writer(fd)

    def call_later(self, delay: float, callback: Callable[..., object], *args: Any) -> Timer:
        return self._loop.call_later(delay, self._run, callback, args)

    def post(self, callback: Callable[..., object], *args: Any) -> None:
        """As :meth:`corral.reactor.Loop.post`."""
        self._loop.post(self._run, callback, args)
