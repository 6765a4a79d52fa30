"""The sessions of one source, each in a thread while it works: databases block, the brokers' loop must not.

There are never more sessions than the source's limit of queries at one time; a change that waits for an answer keeps
its own, and there are fewer of those, so that reading goes on meanwhile.
"""

from __future__ import annotations

import asyncio
import secrets
import threading
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from typing import TypeVar

from corral.brokers.data.faults import Fault, SourceFault
from corral.brokers.data.scope import Scope
from corral.brokers.data.sessions import Session
from corral.policy.model import Dialect, Source

_T = TypeVar("_T")
_IDLE = 60.0
"""Seconds for which a session is kept that nobody uses."""
_LEAVE = 10.0
"""Seconds for a query that was cancelled to end; what does not is left alone with its session."""


class Pool:
    """For the loop of the brokers, but for what says otherwise."""

    def __init__(self, source: Source, scope: Scope, password: str) -> None:
        """Raises NotThere where a library is missing."""
        self._source, self._scope, self._password = source, scope, password
        self._key = secrets.token_hex(32)
        """Of hashed columns: the same for all queries of one sandbox, and told nobody."""
        self.can_write = any(set(table.scope.statements) - {"select"} for table in scope.tables)
        self._opening = threading.Lock()
        self._closers: list[Callable[[], None]] = []
        self._make = self._engine()
        limit = source.limits.concurrent
        # A change in a transaction that is held has a thread only while it does something.
        self._threads = ThreadPoolExecutor(limit + 2, thread_name_prefix="corral-data")
        self._free: dict[bool, list[tuple[float, Session]]] = {False: [], True: []}
        """With when they were given back; the last one is the next."""
        self._all: set[Session] = set()
        self._lock = threading.Lock()
        self._holding = asyncio.Semaphore(max(1, limit // 2))
        self._is_closed = False

    def __repr__(self) -> str:
        return f"Pool({self._source.name!r})"

    def _engine(self) -> Callable[[bool], Session]:
        """What makes a session, in any thread."""
        source, scope, password, key = self._source, self._scope, self._password, self._key
        match source.dialect:
            case Dialect.POSTGRESQL:
                from corral.brokers.data.engine_postgresql import PostgresqlSession

                return lambda writes: PostgresqlSession(source, password, key)
            case Dialect.MYSQL:
                from corral.brokers.data.engine_mysql import MysqlSession

                return lambda writes: MysqlSession(source, password, key)
            case Dialect.SQLITE:
                from corral.brokers.data.engine_sqlite import SqliteSession

                return lambda writes: SqliteSession(source, scope, key, writes=writes)
            case Dialect.DUCKDB:
                from corral.brokers.data.engine_duckdb import Database, DuckdbSession

                databases: list[Database] = []

                def make(writes: bool) -> Session:
                    with self._opening:
                        if not databases:
                            databases.append(Database(source, writes=self.can_write))
                            self._closers.append(databases[0].close)
                        return DuckdbSession(source, databases[0], key)

                return make

    async def lease(self, *, writes: bool, held: bool = False) -> Session:
        """A session that nobody else uses, to be given back. ``held``: it will be used for as long as a person thinks.
        Raises SourceFault."""
        if writes:
            if held and self._holding.locked():
                raise SourceFault(Fault.BUSY)
            await self._holding.acquire()
        try:
            kind = writes and self._source.dialect is Dialect.SQLITE  # others decide with each transaction
            with self._lock:
                if self._is_closed:
                    raise SourceFault(Fault.CANCELLED)
                free = self._free[kind]
                while free and free[0][0] < time.monotonic() - _IDLE:
                    self._all.discard(free[0][1])
                    self._close(free.pop(0)[1])
                if free:
                    return free.pop()[1]
            session = await self._in_thread(lambda: self._make(writes))
            with self._lock:
                self._all.add(session)
            return session
        except BaseException:
            if writes:
                self._holding.release()
            raise

    def give_back(self, session: Session, *, writes: bool) -> None:
        """Nobody uses it any more."""
        if writes:
            self._holding.release()
        kind = writes and self._source.dialect is Dialect.SQLITE
        with self._lock:
            if not session.is_broken and not self._is_closed:
                self._free[kind].append((time.monotonic(), session))
                return
            self._all.discard(session)
        self._close(session)

    def _close(self, session: Session) -> None:
        def close() -> None:
            with suppress(Exception):
                session.close()

        with suppress(RuntimeError):  # the pool is closed
            self._threads.submit(close)

    async def use(self, session: Session, work: Callable[[], _T]) -> _T:
        """Has the session do something, within the time of a query. What is cancelled is cancelled in the database, and
        waited for. Raises what it raises."""
        loop = asyncio.get_running_loop()
        timer = loop.call_later(self._source.limits.time + session.grace, self._aside, session.expire)
        future = loop.run_in_executor(self._threads, work)
        try:
            return await asyncio.shield(future)
        except asyncio.CancelledError:
            session.is_broken = True  # the cancelling may come late, and must not hit the next query
            self._aside(session.cancel)
            done, _ = await asyncio.wait([future], timeout=_LEAVE)
            if done and not future.cancelled():
                future.exception()  # it is of no interest
            raise
        finally:
            timer.cancel()

    def _aside(self, call: Callable[[], None]) -> None:
        """Cancelling may connect once more."""
        threading.Thread(target=call, name="corral-data-cancel", daemon=True).start()

    async def _in_thread(self, make: Callable[[], Session]) -> Session:
        loop = asyncio.get_running_loop()
        future = loop.run_in_executor(self._threads, make)
        try:
            return await asyncio.shield(future)
        except asyncio.CancelledError:
            future.add_done_callback(_close_late)
            raise

    async def close(self) -> None:
        """Ends all sessions, whatever they do."""
        with self._lock:
            self._is_closed = True
            idle = {session for free in self._free.values() for _, session in free}
            sessions = list(self._all)
            self._all.clear()

        def close_all() -> None:
            for session in sessions:
                for end in (session.close,) if session in idle else (session.cancel, session.close):
                    with suppress(Exception):
                        end()
            for close in self._closers:
                with suppress(Exception):
                    close()

        await asyncio.get_running_loop().run_in_executor(None, close_all)
        self._threads.shutdown(wait=False, cancel_futures=True)


def _close_late(future: asyncio.Future[Session]) -> None:
    if not future.cancelled() and future.exception() is None:
        future.result().close()
