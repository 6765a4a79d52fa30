"""The budgets of one session, and of its agent: what may still be asked of models, before it is.

    admission = budgets.admit(tokens, cost)     # OverBudget: nothing is sent, and the reason is the answer
    with admission:                             # left without being settled, it costs all that was reserved
        ...                                     # ask, for at most ``admission.seconds``
        admission.settle(used)                  # what it came to, however it ended

A request is let through only if there is room for the most that it can take, and that much is reserved until it is
settled: requests at one time cannot together exceed what none of them would alone. Settling counts what was really
used, exactly once. What nobody settles (an exception, a task that was dropped) is never free: it costs what was
reserved. So the sum of what is used exceeds a budget only by as much as an estimate was too low.

The session's use is in memory. The agent's is in a ledger that all processes of the user share (:mod:`.ledger`), which
is asked only where the policy bounds the agent. ``blocks`` says so: a call of ``admit`` or ``settle`` then takes some
tenths of a millisecond, and seconds where another process holds the database, so an event loop has a thread make it.
A ledger that cannot be written refuses.
"""

from __future__ import annotations

import math
import threading
import time
from collections import deque
from collections.abc import Callable
from dataclasses import dataclass
from itertools import count
from types import TracebackType
from typing import Protocol

from corral.actions import Used
from corral.brokers.metering.bounds import SOON, OverBudget, Scope, Standing, Window, check, duration
from corral.errors import CorralError
from corral.policy.model import Budget, Model

__all__ = ["Admission", "AgentLedger", "Budgets", "LedgerFault", "OverBudget", "Rate", "Slot"]


class LedgerFault(CorralError):
    """What an agent has used cannot be read or written."""


class AgentLedger(Protocol):
    """What all sessions of one agent have used. Used from any thread."""

    def reserve(self, tokens: int, cost: int | None) -> tuple[int, float | None]:
        """Reserves room for one request, in one transaction with the comparison. Returns the number of the reservation,
        and the seconds that are left of the agent's wall time. Raises OverBudget, LedgerFault."""

    def settle(self, reservation: int, tokens: int, cost: int, seconds: float) -> None:
        """Has it count as so much instead. A second call does nothing. Raises LedgerFault."""


@dataclass(frozen=True, slots=True)
class _Charge:
    """What is reserved for one request."""

    tokens: int
    cost: int
    began: float
    reservation: int | None
    """In the agent's ledger."""


class Admission:
    """One request that may be made. Settle it, or leave its ``with``: it then costs what was reserved."""

    __slots__ = ("_budgets", "_number", "seconds")

    def __init__(self, budgets: Budgets, number: int, seconds: float | None) -> None:
        self._budgets, self._number = budgets, number
        self.seconds = seconds
        """For which it may be made, as the wall times of the budgets are; None means no bound."""

    def settle(self, used: Used) -> None:
        """What it came to. Only the first call counts."""
        self._budgets._settle(self._number, used)

    def lose(self) -> None:
        """What it came to is not known: it costs what was reserved."""
        self._budgets._settle(self._number, None)

    def __enter__(self) -> Admission:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.lose()

    def __del__(self) -> None:
        # The garbage collector may run this in a thread that holds any lock: nothing but an append, which needs none.
        self._budgets._lost.append(self._number)


class Budgets:
    """The budgets of one session. Used from any thread."""

    def __init__(
        self,
        model: Model,
        ledger: AgentLedger | None = None,
        *,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        """``ledger`` is that of the agent, as :meth:`corral.brokers.metering.meter.Meter.ledger` gives it. Without one,
        a policy that bounds the agent refuses every request."""
        self._budget = model.session
        self._scope = Scope("model.session", "This session", model.currency)
        self._clock = clock
        self._is_bounded = is_bounded(model.agent)
        self._ledger = ledger if self._is_bounded else None
        # Owned by the lock:
        self._lock = threading.Lock()
        self._tokens = self._cost = self._requests = 0
        self._reserved_tokens = self._reserved_cost = 0
        self._began: float | None = None
        limit = model.session.requests_per_minute
        self._window = None if limit is None else Window(limit)
        self._open: dict[int, _Charge] = {}
        self._closed = False
        # Owned by nobody; appended to and popped from, which is atomic:
        self._numbers = count(1)
        self._lost: deque[int] = deque()
        self._late: deque[tuple[int, int, int, float]] = deque()

    @property
    def blocks(self) -> bool:
        """Whether calls go to a database."""
        return self._ledger is not None

    # ---- before ----

    def admit(self, tokens: int, cost: int | None) -> Admission:
        """Lets a request through that takes at most so many tokens, of input and output, and costs so much (None: the
        model has no price). Raises OverBudget."""
        if tokens < 0 or (cost is not None and cost < 0):
            raise ValueError("an estimate is not negative")
        self._collect()
        number, charge = self._reserve(tokens, cost)
        seconds = self._seconds_left()
        if self._is_bounded:
            try:
                reservation, left = self._reserve_with_agent(tokens, cost)
            except BaseException:
                self._give_back(number, charge)
                raise
            with self._lock:
                is_open = number in self._open
                if is_open:
                    self._open[number] = _Charge(charge.tokens, charge.cost, charge.began, reservation)
            if not is_open:  # closed meanwhile; nothing was sent
                self._late.append((reservation, 0, 0, 0.0))
                self._settle_with_agent()
                raise _closed()
            if left is not None:
                seconds = left if seconds is None else min(seconds, left)
        return Admission(self, number, seconds)

    def _reserve(self, tokens: int, cost: int | None) -> tuple[int, _Charge]:
        now = self._clock()
        with self._lock:
            if self._closed:
                raise _closed()
            if self._began is None:
                self._began = now
            check(self._budget, self._scope, self._standing(now), tokens, cost)
            charge = _Charge(tokens, cost or 0, now, None)
            number = next(self._numbers)
            self._open[number] = charge
            self._reserved_tokens += tokens
            self._reserved_cost += charge.cost
            self._requests += 1
            if self._window is not None:
                self._window.take(now)
        return number, charge

    def _standing(self, now: float) -> Standing:
        return Standing(
            tokens=self._tokens,
            cost=self._cost,
            requests=self._requests,
            seconds=0.0 if self._began is None else now - self._began,
            reserved_tokens=self._reserved_tokens,
            reserved_cost=self._reserved_cost,
            open=len(self._open),
            minute=0.0 if self._window is None else self._window.wait(now),
        )

    def _reserve_with_agent(self, tokens: int, cost: int | None) -> tuple[int, float | None]:
        if self._ledger is None:
            raise OverBudget("What this agent has used cannot be counted, so no model may be asked.", "model.agent")
        try:
            return self._ledger.reserve(tokens, cost)
        except LedgerFault:
            raise OverBudget(
                "What this agent has used cannot be counted now, so no model may be asked. Ask again in "
                f"{duration(SOON)}; if it stays so, an operator must look.",
                "model.agent",
                SOON,
            ) from None

    def _give_back(self, number: int, charge: _Charge) -> None:
        """The request is not made after all: it never happened."""
        with self._lock:
            if self._open.pop(number, None) is None:
                return
            self._reserved_tokens -= charge.tokens
            self._reserved_cost -= charge.cost
            self._requests -= 1
            if self._window is not None:
                self._window.give_back(charge.began)

    def _seconds_left(self) -> float | None:
        if self._budget.wall_time is None or self._began is None:
            return None
        return max(0.0, self._began + self._budget.wall_time - self._clock())

    # ---- after ----

    def _settle(self, number: int, used: Used | None) -> None:
        with self._lock:
            charge = self._open.pop(number, None)
            if charge is None:
                return
            # A negative count would give back what others have used.
            tokens = charge.tokens if used is None else max(0, used.input_tokens) + max(0, used.output_tokens)
            cost = charge.cost if used is None else max(0, used.cost)
            self._reserved_tokens -= charge.tokens
            self._reserved_cost -= charge.cost
            self._tokens += tokens
            self._cost += cost
        if charge.reservation is not None:
            seconds = self._clock() - charge.began if used is None else max(0.0, used.seconds)
            self._late.append((charge.reservation, tokens, cost, seconds))
            self._settle_with_agent()

    def _settle_with_agent(self) -> None:
        """Tells the ledger what it has not been told. Until it is, the reservation counts, in full."""
        while self._ledger is not None:
            try:
                late = self._late.popleft()
            except IndexError:
                return
            try:
                self._ledger.settle(*late)
            except LedgerFault:
                self._late.appendleft(late)
                return

    def _collect(self) -> None:
        """Charges what was lost."""
        while self._lost:
            try:
                number = self._lost.popleft()
            except IndexError:
                break
            self._settle(number, None)
        if self._late:
            self._settle_with_agent()

    def standing(self) -> Standing:
        """What the session has used until now."""
        self._collect()
        with self._lock:
            return self._standing(self._clock())

    def close(self) -> None:
        """The session is over: what is still open costs what was reserved, and nothing is let through any more."""
        with self._lock:
            self._closed = True
            open_ones = tuple(self._open)
        for number in open_ones:
            self._settle(number, None)
        self._collect()


def is_bounded(budget: Budget) -> bool:
    """Whether it bounds anything."""
    return budget != Budget()


def _closed() -> OverBudget:
    return OverBudget("This session is over.", "model.session")


# ---- sources and services ----


class Slot:
    """One query or call that may be made; it is over with its ``with``, or with itself."""

    __slots__ = ("_is_open", "_rate")

    def __init__(self, rate: Rate) -> None:
        self._rate = rate
        self._is_open = [None]

    def release(self) -> None:
        """It is over. Only the first call counts."""
        try:
            self._is_open.pop()
        except IndexError:
            return
        self._rate._over.append(None)

    def __enter__(self) -> Slot:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.release()

    def __del__(self) -> None:
        self.release()  # appends only, as that of Admission


class Rate:
    """So many at one time, and so many a minute: of one source or service, in one session. Used from any thread."""

    def __init__(
        self,
        per_minute: int,
        concurrent: int,
        *,
        rule: str,
        what: str,
        minute: str = "requests_per_minute",
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        """``rule`` is where it is written (``data.sources[0].limits``), ``what`` is bounded (``queries of crm``), and
        ``minute`` the name that the policy has for the bound of a minute."""
        self._per_minute, self._concurrent = per_minute, concurrent
        self._rule, self._what, self._minute = rule, what, minute
        self._clock = clock
        self._lock = threading.Lock()
        self._window = Window(per_minute)
        self._admitted = 0
        self._over: deque[None] = deque()

    def admit(self) -> Slot:
        """Lets one more be made. Raises OverBudget."""
        with self._lock:
            while self._over:
                self._over.popleft()
                self._admitted -= 1
            now = self._clock()
            wait = self._window.wait(now)
            if wait > 0:
                never = math.isinf(wait)
                again = "Do not ask again." if never else f"Ask again in {duration(wait)}."
                reason = f"There may be {self._per_minute:,} {self._what} a minute. {again}"
                raise OverBudget(reason, f"{self._rule}.{self._minute}", None if never else wait)
            if self._admitted >= self._concurrent:
                reason = f"There may be {self._concurrent:,} {self._what} at one time. Ask again when one is answered."
                raise OverBudget(reason, f"{self._rule}.concurrent", 1.0)
            self._window.take(now)
            self._admitted += 1
            return Slot(self)
