"""The brokers' thread: one for all sandboxes of a controlling process, with an asyncio loop.

The gateway hands connections over; each is served by the broker whose name it was made to. What goes wrong with one
request ends that connection; when this thread is gone, all sandboxes that have a broker end.
"""

from __future__ import annotations

import asyncio
import os
import socket
import threading
from collections.abc import Callable, Coroutine, Mapping
from concurrent.futures import Future
from dataclasses import replace
from typing import Any

from corral.actions import Attempt, Ending, Origin, Used
from corral.brokers.http import Answering, Connection, Gone, Request, Room, serve
from corral.brokers.setting import Handler, Opening, Setting
from corral.errors import CorralError
from corral.policy.doors import Broker

MAX_CONNECTIONS = 1024
"""Of one sandbox to one broker."""
MAX_WAITING = 256 << 20
"""Bytes of requests that one sandbox may have under way."""
END_SECONDS = 5.0
"""For what is under way to account for itself when its sandbox has ended."""
_FAILED = "its brokers failed"

Over = Callable[[int, int, str], None]
"""As :data:`corral.gateway.doors.Over`."""


class _Taken:
    """As :class:`corral.gateway.doors.Taken`."""

    __slots__ = ("connection",)

    def __init__(self) -> None:
        self.connection: Connection | None = None

    @property
    def counts(self) -> tuple[int, int]:
        connection = self.connection
        return (0, 0) if connection is None else (connection.received, connection.sent)


class Door:
    """As :class:`corral.gateway.doors.Door`: of one broker of one sandbox."""

    def __init__(self, service: Service, brokers: Brokers, broker: Broker) -> None:
        self._service, self._brokers, self._broker = service, brokers, broker
        self._handler: Handler | None = None
        self._count = 0
        """Connections, with those that are about to be served."""
        self.connections: set[Connection] = set()

    def take(self, sock: socket.socket, attempt: Attempt, over: Over) -> _Taken:
        """In the gateway's thread."""
        taken = _Taken()
        try:
            self._service.loop.call_soon_threadsafe(self._begin, sock, attempt.decision.action.origin, taken, over)
        except RuntimeError:  # the loop is closed
            sock.close()
            over(0, 0, _FAILED)
        return taken

    # ---- the brokers' thread ----

    def open(self, opening: Opening, setting: Setting) -> None:
        self._handler = opening(setting)

    def _begin(self, sock: socket.socket, origin: Origin, taken: _Taken, over: Over) -> None:
        handler = self._handler
        if handler is None or self._brokers.is_closed or self._count >= MAX_CONNECTIONS:
            sock.close()
            over(0, 0, "the sandbox has ended" if handler is None else "its broker has too many connections")
            return
        self._count += 1

        def ended(reason: str) -> None:
            self._count -= 1
            connection = taken.connection
            if connection is not None:
                self.connections.discard(connection)
            over(*taken.counts, reason)

        def make() -> Connection:
            connection = Connection(
                self._broker.host, origin, self._handle, handler.max_body, self._brokers.room, ended
            )
            taken.connection = connection
            self.connections.add(connection)
            return connection

        self._service.spawn(self._serve(sock, make, ended, taken))

    async def _serve(
        self, sock: socket.socket, make: Callable[[], Connection], ended: Callable[[str], None], taken: _Taken
    ) -> None:
        try:
            sock.setblocking(False)
            await serve(sock, make)
        except OSError:
            if taken.connection is None:
                ended("closed")

    async def _handle(self, request: Request, answer: Answering) -> None:
        """Nothing is asked for a sandbox that has ended, also on a connection that was about to be served then."""
        if self._handler is None or self._brokers.is_closed:
            raise Gone
        await self._handler.handle(request, answer)

    async def close(self) -> None:
        tasks = [task for each in self.connections if (task := each.task) is not None]
        for connection in tuple(self.connections):
            connection.close("the sandbox has ended", broken=True)
        if tasks:
            await asyncio.wait(tasks, timeout=END_SECONDS)
        if self._handler is not None:
            handler, self._handler = self._handler, None
            await handler.close()


class _Errors:
    """Calls that came to nothing, for whoever has them wait: a :class:`corral.monitor.records.Tally`."""

    def __init__(self, room: Room) -> None:
        self._room = room

    def used(self, used: Used) -> None:
        if used.ending is not Ending.ANSWERED or used.status >= 400:
            self._room.failed()


class Brokers:
    """The brokers of one sandbox."""

    def __init__(
        self,
        service: Service,
        make: Callable[[], Setting],
        openings: Mapping[Broker, Opening],
        end: Callable[[str], None],
    ) -> None:
        self._service, self._make, self._openings, self.end = service, make, dict(openings), end
        self._flush: Callable[[], object] = lambda: None
        self.doors = {broker: Door(service, self, broker) for broker in openings}
        """What the gateway hands connections over to."""
        self.room = Room(MAX_WAITING)
        self.is_closed = False

    def open(self) -> None:
        """In the brokers' thread, before any connection."""
        try:
            setting = self._make()
            setting = replace(setting, tallies=(*setting.tallies, _Errors(self.room)))
            self._flush = setting.flush
            for broker, door in self.doors.items():
                door.open(self._openings[broker], setting)
        except Exception as error:
            self.end(f"{_FAILED} ({error if isinstance(error, CorralError) else type(error).__name__})")

    async def close(self) -> None:
        """In the brokers' thread."""
        self.is_closed = True
        for door in self.doors.values():
            await door.close()
        await asyncio.to_thread(self._flush)


class Service:
    """The thread."""

    def __init__(self) -> None:
        self.loop = asyncio.new_event_loop()
        self._attached: set[Brokers] = set()
        self._tasks: set[asyncio.Task[None]] = set()
        self._thread = threading.Thread(target=self._run, name="corral-brokers", daemon=True)
        self._thread.start()

    def attach(
        self, make: Callable[[], Setting], openings: Mapping[Broker, Opening], end: Callable[[str], None]
    ) -> Brokers:
        """From here on its doors may be used. ``make`` is called in the brokers' thread, since what it loads takes its
        time; ``end`` ends the sandbox. From any thread."""
        brokers = Brokers(self, make, openings, end)
        try:
            self.loop.call_soon_threadsafe(self._attach, brokers)
        except RuntimeError:
            end(_FAILED)
        return brokers

    def detach(self, brokers: Brokers) -> None:
        """The sandbox is dead. Returns when all that was under way has accounted for itself. From any thread but its
        own."""
        if self.loop.is_closed():
            return
        future: Future[None] = asyncio.run_coroutine_threadsafe(self._detach(brokers), self.loop)
        try:
            future.result(2 * END_SECONDS)
        except Exception as error:
            brokers.end(f"{_FAILED} ({type(error).__name__})")

    # ---- its own thread ----

    def spawn(self, work: Coroutine[Any, Any, None]) -> None:
        """Runs it, and keeps it until it is done."""
        task = self.loop.create_task(work)
        self._tasks.add(task)
        task.add_done_callback(self._tasks.discard)

    def _attach(self, brokers: Brokers) -> None:
        self._attached.add(brokers)
        brokers.open()

    async def _detach(self, brokers: Brokers) -> None:
        self._attached.discard(brokers)
        await brokers.close()

    def _run(self) -> None:
        asyncio.set_event_loop(self.loop)
        try:
            self.loop.run_forever()
        finally:
            for brokers in tuple(self._attached):
                brokers.end(_FAILED)
            self.loop.close()


_shared: Service | None = None
_lock = threading.Lock()


def shared() -> Service:
    """The brokers of this process; started with the first sandbox that has any."""
    global _shared
    with _lock:
        if _shared is None:
            _shared = Service()
        return _shared


def _after_fork() -> None:
    """A child has none of its parent's threads."""
    global _shared, _lock
    _shared, _lock = None, threading.Lock()


os.register_at_fork(after_in_child=_after_fork)
