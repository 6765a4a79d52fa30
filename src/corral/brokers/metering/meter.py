"""The meter: every call of every broker, counted once, for all sessions of this user.

    store = Store(Path(state_directory()) / "usage")     # one for a process; SQLAlchemy is imported from here on
    meter = Meter(store, agent, model)                   # one for a session; a Tally
    budgets = Budgets(model, meter.ledger())
    ...
    store.close()                                        # what was counted is written

`used` never waits for the disk, and never raises: a thread of the store's writes, some times a second. That is not what
makes a call safe, which the log does; it is what makes it quick to ask. So:

* A budget of the agent does not rest on this queue. It is kept in the same database, in transactions of its own
  (:mod:`.ledger`), before a request is sent; where those fail, no request is.
* Where the policy does not bound the agent, a database that cannot be written stops nothing. Calls wait in memory, as
  many as :data:`MOST`, and are written when it can be again; those beyond are lost, ``Store.fault`` says so while it
  lasts, and how many is written beside the others as soon as that can be: `corral usage` then says that its sums are
  too small. `corral usage --log` adds them up from the records instead.
"""

from __future__ import annotations

import threading
import time
from collections import deque
from collections.abc import Callable, Iterable
from itertools import islice
from pathlib import Path
from typing import Any

from sqlalchemy import delete, func, insert, select, update
from sqlalchemy.dialects.sqlite import insert as upsert
from sqlalchemy.engine import Connection
from sqlalchemy.exc import SQLAlchemyError

from corral.actions import Ending, Kind, Used
from corral.brokers.metering.budgets import is_bounded
from corral.brokers.metering.ledger import Ledger, spend
from corral.brokers.metering.store import (
    CALLS,
    DAYS,
    FILE,
    KEYS,
    LOSSES,
    SPENT,
    STATE,
    SUMS,
    MeterFault,
    fault,
    number,
    open_database,
    text,
)
from corral.policy.model import Agent, Model

MOST = 100_000
"""Calls that wait to be written."""
INTERVAL = 0.2
"""Seconds between two writes."""
_RETRY = 1.0
_BATCH = 1000
_LAST_WORDS = 5.0
"""Seconds that closing takes at most."""
BURST = 16
"""Equal refusals in one write that make a row each, before the rest are one: an agent can be refused for nothing."""
KEEP_DAYS = 90
"""After which calls are folded into sums of a day."""
_DAY = 86400
_SPENT_DAYS = 400
"""After which what an agent has used is forgotten; no period is that long."""

_Row = dict[str, Any]


class Store:
    """The meter's database, as one process writes it. Used from any thread."""

    def __init__(self, directory: Path, *, keep_days: int = KEEP_DAYS, clock: Callable[[], float] = time.time) -> None:
        """``directory`` is the meter's own, and is made. Raises MeterFault."""
        self.engine = open_database(directory)
        self._file = directory / FILE
        self._keep_days, self._clock = keep_days, clock
        self.fault = ""
        """Why it cannot be written now; empty where it can. Set by the writing thread."""
        # Owned by the condition:
        self._ready = threading.Condition()
        self._waiting: deque[_Row] = deque()
        self._lost = 0
        self._closing = False
        self._written = self._taken = 0
        self._thread = threading.Thread(target=self._write_always, name="corral-meter", daemon=True)
        self._thread.start()

    def put(self, row: _Row) -> None:
        """Has one call written soon."""
        with self._ready:
            if self._closing or len(self._waiting) >= MOST:
                self._lost += 1
                return
            self._waiting.append(row)
            self._taken += 1
            self._ready.notify_all()

    def flush(self, timeout: float = _LAST_WORDS) -> bool:
        """Waits until what was counted before is written. Returns whether it is."""
        with self._ready:
            until = self._taken
            return self._ready.wait_for(lambda: self._written >= until, timeout)

    def close(self) -> int:
        """Writes what waits, and lets go of the database. Returns how many calls could not be written."""
        with self._ready:
            self._closing = True
            self._ready.notify_all()
        self._thread.join(_LAST_WORDS + 2 * _RETRY)
        with self._ready:
            left = len(self._waiting) + self._lost
        if not self._thread.is_alive():
            self.engine.dispose()
        return left

    # ---- the thread ----

    def _write_always(self) -> None:
        deadline: float | None = None
        while True:
            with self._ready:
                self._ready.wait_for(lambda: self._waiting or self._closing or self._lost)
                if self._closing and deadline is None:
                    deadline = time.monotonic() + _LAST_WORDS
                batch = list(islice(self._waiting, _BATCH))
                lost = self._lost
            if not batch and not lost:
                return
            try:
                self._write(batch, lost)
            except MeterFault as error:
                self.fault = str(error)
                if deadline is not None and time.monotonic() > deadline:
                    return
                time.sleep(_RETRY)
                continue
            except Exception:  # our own fault, which writing it again does not mend: said, as all that is lost
                lost -= len(batch)
            self.fault = ""
            with self._ready:
                for _ in batch:
                    self._waiting.popleft()
                self._lost -= lost
                self._written += len(batch)
                self._ready.notify_all()
            if len(batch) < _BATCH:
                self._pause(INTERVAL)

    def _pause(self, seconds: float) -> None:
        """Lets calls come together, but not once it is to end."""
        with self._ready:
            self._ready.wait_for(lambda: self._closing, seconds)

    def _write(self, batch: list[_Row], lost: int) -> None:
        try:
            with self.engine.begin() as connection:
                now = self._clock()
                if batch:
                    rows = _merged(batch)
                    connection.execute(insert(CALLS), [_without_spent(row) for row in rows])
                    _spend(connection, rows, now)
                if lost:
                    connection.execute(insert(LOSSES), {"at": now, "calls": lost})
                self._fold(connection, now)
        except SQLAlchemyError as error:
            raise fault(self._file, error) from None

    def _fold(self, connection: Connection, now: float) -> None:
        """Once a day, turns calls that are old into sums of days, and forgets what no budget looks at."""
        today = int(now // _DAY)
        folded = connection.execute(select(STATE.c.folded)).scalar() or 0
        if folded >= today:
            return
        before = (today - self._keep_days) * _DAY
        day = func.cast(CALLS.c.at / _DAY, DAYS.c.day.type)
        old = (
            select(day, *(CALLS.c[name] for name in KEYS), *(func.sum(CALLS.c[name]) for name in SUMS))
            .where(CALLS.c.at < before)
            .group_by(day, *(CALLS.c[name] for name in KEYS))
        )
        adding = upsert(DAYS).from_select(["day", *KEYS, *SUMS], old)
        connection.execute(
            adding.on_conflict_do_update(
                index_elements=["day", *KEYS], set_={name: DAYS.c[name] + adding.excluded[name] for name in SUMS}
            )
        )
        connection.execute(delete(CALLS).where(CALLS.c.at < before))
        connection.execute(delete(SPENT).where(SPENT.c.minute < (today - _SPENT_DAYS) * _DAY // 60))
        connection.execute(update(STATE).values(folded=today))


class Meter:
    """The calls of one session, to the store: a Tally (:mod:`corral.monitor.records`). Used from any thread."""

    def __init__(self, store: Store, agent: Agent, model: Model) -> None:
        self._store, self._agent, self._model = store, agent, model
        # Where the agent has a budget, its ledger counts what is used, before a request and when it is settled.
        self._is_bounded = is_bounded(model.agent)

    def ledger(self) -> Ledger | None:
        """What all sessions of the agent have used, for :class:`~corral.brokers.metering.budgets.Budgets`; None where
        the policy does not bound that."""
        return Ledger(self._store.engine, self._agent.name, self._model) if self._is_bounded else None

    def used(self, used: Used) -> None:
        """Counts one call that is over. Never waits, and never raises; the log is what makes it safe."""
        is_spent = used.kind is Kind.MODEL_CALL and used.ending is not Ending.REFUSED and not self._is_bounded
        self._store.put(row_of(used, self._agent) | {"is_spent": is_spent})


def row_of(used: Used, agent: Agent) -> _Row:
    """One call, as it is counted."""
    is_error = used.ending is Ending.FAILED or (used.ending is Ending.ANSWERED and used.status >= 400)
    return {
        "at": used.started + max(0.0, used.seconds),
        "session": text(used.origin.session),
        "sandbox": text(used.origin.sandbox),
        "step": number(used.origin.step),
        "agent": text(agent.name),
        "agent_version": text(agent.version),
        "kind": used.kind.value,
        "source": text(used.source),
        "name": text(used.name),
        "currency": text(used.currency),
        "ending": used.ending.value,
        "status": number(used.status),
        "requests": 1,
        "errors": int(is_error),
        "refused": int(used.ending is Ending.REFUSED),
        "input_tokens": number(used.input_tokens),
        "output_tokens": number(used.output_tokens),
        "cached_tokens": number(used.cached_tokens),
        "written_tokens": number(used.written_tokens),
        "cost": number(used.cost),
        "rows": number(used.rows),
        "bytes_up": number(used.bytes_up),
        "bytes_down": number(used.bytes_down),
        "seconds": max(0.0, used.seconds),
        "estimated": int(used.estimated),
    }


def _merged(batch: Iterable[_Row]) -> list[_Row]:
    """The same, where refusals of one session beyond a burst are one row, whatever name was asked for."""
    kept: list[_Row] = []
    seen: dict[tuple[str, ...], int] = {}
    merged: dict[tuple[str, ...], _Row] = {}
    for row in batch:
        if row["ending"] != Ending.REFUSED.value:
            kept.append(row)
            continue
        key = (row["sandbox"], row["session"], row["kind"], row["agent"], row["agent_version"], row["currency"])
        seen[key] = seen.get(key, 0) + 1
        if seen[key] <= BURST:
            kept.append(row)
        elif key not in merged:
            merged[key] = row | {"name": "", "source": ""}
        else:
            one = merged[key]
            one.update({name: one[name] + row[name] for name in SUMS}, at=max(one["at"], row["at"]))
    return kept + list(merged.values())


def _without_spent(row: _Row) -> _Row:
    return {name: value for name, value in row.items() if name != "is_spent"}


def _spend(connection: Connection, rows: Iterable[_Row], now: float) -> None:
    """What sessions without a budget of their agent use counts for those that have one."""
    sums: dict[tuple[str, str], tuple[int, int, int, float]] = {}
    for row in rows:
        if row["is_spent"]:
            key = (row["agent"], row["currency"])
            tokens, cost, requests, seconds = sums.get(key, (0, 0, 0, 0.0))
            tokens += row["input_tokens"] + row["output_tokens"]
            sums[key] = (tokens, cost + row["cost"], requests + 1, seconds + row["seconds"])
    for (agent, currency), amounts in sums.items():
        spend(connection, agent, now, currency, *amounts)
