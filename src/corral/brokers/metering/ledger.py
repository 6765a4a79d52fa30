"""What all sessions of one agent have used, over all processes of this user: the agent's half of the budgets.

A reservation is compared and written in one transaction that holds the only right to write, so that two processes can
never both take the last of a budget. It names its process. When that is gone, the reservation no longer counts as a
request that is open, and what it had reserved counts as used: the question was probably asked, and nobody is left to
say what it came to.

Use is added up by minutes. A minute counts as long as any of it lies within the policy's period, so a budget is at
most a minute too strict, and never too generous. Time is the wall clock, which all processes share.
"""

from __future__ import annotations

import math
import os
import time
from collections.abc import Callable
from dataclasses import replace
from functools import cache
from pathlib import Path

from sqlalchemy import Engine, bindparam, case, delete, func, insert, select, update
from sqlalchemy.dialects.sqlite import insert as upsert
from sqlalchemy.engine import Connection
from sqlalchemy.exc import SQLAlchemyError

from corral.brokers.metering.bounds import MINUTE, SOON, OverBudget, Scope, Standing, check
from corral.brokers.metering.budgets import LedgerFault
from corral.brokers.metering.store import RESERVATIONS, SPENT, number, text
from corral.policy.model import Model, Patience

UNSEEN = 7200.0
"""Seconds after which a reservation is given up whose process is in another PID namespace, where it cannot be seen."""

_R, _S = RESERVATIONS.c, SPENT.c
_IS_CURRENCY = _S.currency == bindparam("currency")
_SPENT = select(
    func.coalesce(func.sum(_S.tokens), 0),
    func.coalesce(func.sum(case((_IS_CURRENCY, _S.cost), else_=0)), 0),
    func.coalesce(func.sum(_S.requests), 0),
    func.coalesce(func.sum(_S.seconds), 0.0),
).where(_S.agent == bindparam("agent"), _S.minute >= bindparam("since"))
_OPEN = select(
    func.count(),
    func.coalesce(func.sum(_R.tokens), 0),
    func.coalesce(func.sum(case((_R.currency == bindparam("currency"), _R.cost), else_=0)), 0),
    func.coalesce(func.sum(func.max(0.0, bindparam("now") - _R.at)), 0.0),
).where(_R.agent == bindparam("agent"), _R.open == 1)
_NTH_LAST = (
    select(_R.at)
    .where(_R.agent == bindparam("agent"))
    .order_by(_R.at.desc())
    .limit(1)
    .offset(bindparam("before", type_=None))
)
_OPEN_ONES = select(RESERVATIONS).where(_R.agent == bindparam("agent"), _R.open == 1)
_MINUTES = (
    select(_S.minute, _S.tokens, case((_IS_CURRENCY, _S.cost), else_=0).label("cost"), _S.requests, _S.seconds)
    .where(_S.agent == bindparam("agent"), _S.minute >= bindparam("since"))
    .order_by(_S.minute)
)
_RESERVE = insert(RESERVATIONS)
_CLOSE = update(RESERVATIONS).where(_R.number == bindparam("which"), _R.open == 1).values(open=0)
_FORGET = delete(RESERVATIONS).where(_R.agent == bindparam("agent"), _R.open == 0, _R.at < bindparam("before"))
_adding = upsert(SPENT)
_SPEND = _adding.on_conflict_do_update(
    index_elements=["agent", "minute", "currency"],
    set_={name: SPENT.c[name] + _adding.excluded[name] for name in ("tokens", "cost", "requests", "seconds")},
)


def spend(
    connection: Connection, agent: str, now: float, currency: str, tokens: int, cost: int, requests: int, seconds: float
) -> None:
    """Adds to what an agent has used."""
    connection.execute(
        _SPEND,
        {
            "agent": agent,
            "minute": int(now // MINUTE),
            "currency": currency,
            "tokens": number(tokens),
            "cost": number(cost),
            "requests": requests,
            "seconds": seconds,
        },
    )


class Ledger:
    """What one agent has used, as the policy of one session bounds it. Used from any thread."""

    def __init__(self, engine: Engine, agent: str, model: Model, *, clock: Callable[[], float] = time.time) -> None:
        self._engine, self._agent, self._clock = engine, text(agent), clock
        self._budget, self._period, self._currency = model.agent, model.agent_period, text(model.currency)
        self._scope = Scope("model.agent", "All sessions of this agent together", model.currency, self._period)
        self._process = _this_process()

    def reserve(self, tokens: int, cost: int | None) -> tuple[int, float | None]:
        """Reserves room for one request: its number, and the seconds left of the agent's wall time.

        Raises OverBudget, LedgerFault."""
        now = self._clock()
        row = {
            "agent": self._agent,
            "open": 1,
            "at": now,
            "process": self._process,
            "currency": self._currency,
            "tokens": number(tokens),
            "cost": number(cost or 0),
        }
        try:
            with self._engine.begin() as connection:
                connection.execute(_FORGET, {"agent": self._agent, "before": now - MINUTE})
                # A refusal ends the transaction as well as a reservation does: that others have died was found out.
                found = self._compare(connection, now, tokens, cost)
                made = None if isinstance(found, OverBudget) else connection.execute(_RESERVE, row).inserted_primary_key
        except SQLAlchemyError:
            raise LedgerFault("the meter's database cannot be written") from None
        if isinstance(found, OverBudget):
            raise found
        if made is None:
            raise LedgerFault("the meter's database gives no number")
        wall_time = self._budget.wall_time
        return int(made[0]), None if wall_time is None else max(0.0, wall_time - found.seconds)

    def _compare(self, connection: Connection, now: float, tokens: int, cost: int | None) -> Standing | OverBudget:
        def later(what: str, much: int | float) -> float:
            return self._until(connection, now, what, much)

        for last in (False, True):
            standing = self._standing(connection, now)
            try:
                check(self._budget, self._scope, standing, tokens, cost, later=later)
            except OverBudget as refusal:
                # Only who would be refused pays for looking whether others have died. What these had reserved stays
                # used: it is places among requests at one time that they leave.
                if last or not self._bury(connection, now):
                    return refusal
            else:
                return standing
        raise AssertionError("unreachable")

    def standing(self) -> Standing:
        """What the agent has used within the period. Raises LedgerFault."""
        now = self._clock()
        try:
            with self._engine.begin() as connection:
                self._bury(connection, now)
                return self._standing(connection, now)
        except SQLAlchemyError:
            raise LedgerFault("the meter's database cannot be read") from None

    def _since(self, now: float) -> int:
        return math.floor((now - self._period) / MINUTE)

    def _standing(self, connection: Connection, now: float) -> Standing:
        whose = {"agent": self._agent, "currency": self._currency}
        tokens, spent, requests, seconds = connection.execute(_SPENT, whose | {"since": self._since(now)}).one()
        count, reserved_tokens, reserved_cost, so_far = connection.execute(_OPEN, whose | {"now": now}).one()
        standing = Standing(
            tokens=tokens,
            cost=spent,
            requests=requests + count,
            seconds=seconds + so_far,
            reserved_tokens=reserved_tokens,
            reserved_cost=reserved_cost,
            open=count,
        )
        limit = self._budget.requests_per_minute
        if limit is None:
            return standing
        if limit < 1:
            return replace(standing, minute=math.inf)
        before = connection.execute(_NTH_LAST, {"agent": self._agent, "before": limit - 1}).scalar()
        return standing if before is None else replace(standing, minute=max(0.0, before + MINUTE - now))

    def _until(self, connection: Connection, now: float, what: str, much: int | float) -> float:
        """Seconds until so much of what is used has left the period."""
        whose = {"agent": self._agent, "currency": self._currency, "since": self._since(now)}
        gone: float = 0
        for row in connection.execute(_MINUTES, whose):
            gone += getattr(row, what)
            if gone >= much:
                ends: int = row.minute + 1
                return max(SOON, ends * MINUTE + self._period - now)
        return self._period  # the rest is in flight, and leaves a period after it has landed

    def settle(self, reservation: int, tokens: int, cost: int, seconds: float) -> None:
        """Has a reservation count as so much instead; a second call does nothing. Raises LedgerFault."""
        try:
            with self._engine.begin() as connection:
                if connection.execute(_CLOSE, {"which": reservation}).rowcount:
                    spend(connection, self._agent, self._clock(), self._currency, tokens, cost, 1, seconds)
        except SQLAlchemyError:
            raise LedgerFault("the meter's database cannot be written") from None

    def _bury(self, connection: Connection, now: float) -> int:
        """Settles the reservations of processes that are gone, in full. Returns how many those were."""
        buried = 0
        for row in connection.execute(_OPEN_ONES, {"agent": self._agent}).all():
            if row.process != self._process and not _is_alive(row.process, now - row.at):
                connection.execute(_CLOSE, {"which": row.number})
                seconds = min(max(0.0, now - row.at), Patience().total)
                spend(connection, self._agent, row.at, row.currency, row.tokens, row.cost, 1, seconds)
                buried += 1
        return buried


# ---- processes ----


@cache
def _boot() -> str:
    return Path("/proc/sys/kernel/random/boot_id").read_text().strip()


def _started(pid: int) -> str:
    """Clock ticks after boot (proc(5), stat, field 22), or nothing where there is no such process, or a dead one."""
    try:
        fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
    except OSError:
        return ""
    return "" if fields[0] in "ZX" else fields[19]


def _this_process() -> str:
    """What names this process for ever: boot, PID namespace, PID, and when it began."""
    return f"{_boot()} {os.stat('/proc/self/ns/pid').st_ino} {os.getpid()} {_started(os.getpid())}"


def _is_alive(process: str, age: float) -> bool:
    boot, namespace, pid, started = process.split(" ")
    if boot != _boot():
        return False
    if int(namespace) != os.stat("/proc/self/ns/pid").st_ino:
        return age < UNSEEN
    return _started(int(pid)) == started
