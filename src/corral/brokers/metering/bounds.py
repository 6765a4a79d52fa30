"""Whether there is room in a budget, and in which words there is none: the one place where bounds are compared.

What is used up for good is said before what only has to be waited for: whoever is told to wait does, and a model that
asks again and again for what will never be had burns what is left. Reasons are for a model and a person; they say what
is bounded, how much of it is used, and whether and when it is worth asking again.
"""

from __future__ import annotations

import math
from collections import deque
from collections.abc import Callable
from dataclasses import dataclass
from typing import NoReturn

from corral.brokers.metering.prices import BILLION, billionths
from corral.errors import CorralError
from corral.policy.model import Budget

MINUTE = 60.0
SOON = 5.0
"""Seconds after which it is worth asking again, where what is in the way are requests that have not been answered."""


class OverBudget(CorralError):
    """A request was refused, because there is no room for it in a budget. Nothing was sent.

    ``rule`` is where that is written. ``retry_after`` is the number of seconds after which there may be room; None
    where there never will be for such a request.
    """

    def __init__(self, reason: str, rule: str, retry_after: float | None = None) -> None:
        super().__init__(reason)
        self.reason, self.rule, self.retry_after = reason, rule, retry_after


@dataclass(frozen=True, slots=True)
class Scope:
    """Whose budget it is."""

    rule: str
    """Of the policy: ``model.session``."""
    who: str
    """As the beginning of a sentence: ``This session``."""
    currency: str
    period: float | None = None
    """Seconds back from now within which use counts; None is from the beginning on."""

    @property
    def within(self) -> str:
        return "" if self.period is None else f" in {duration(self.period)}"


@dataclass(frozen=True, slots=True)
class Standing:
    """What is used of a budget at one moment. Costs are billionths of the currency."""

    tokens: int = 0
    cost: int = 0
    requests: int = 0
    """With those that have no answer yet."""
    seconds: float = 0.0
    reserved_tokens: int = 0
    """For requests that have no answer yet; not in ``tokens``."""
    reserved_cost: int = 0
    open: int = 0
    """Requests that have no answer yet."""
    minute: float = 0.0
    """Seconds until there is room in requests per minute."""


def duration(seconds: float) -> str:
    """A span of time in words, rounded up."""
    for length, unit in ((86400, "day"), (3600, "hour"), (60, "minute")):
        if seconds >= 2 * length:
            return f"{math.ceil(seconds / length)} {unit}s"
    whole = max(1, math.ceil(seconds))
    return f"{whole} second{'s' if whole > 1 else ''}"


def _money(cost: int, currency: str) -> str:
    return f"{cost / BILLION:.4f} {currency}"


Room = Callable[[str, int | float], float | None]
"""Says after how many seconds so much will have left the period: of ``tokens``, ``cost``, ``requests`` or
``seconds``. None where it never does."""


def _never(_what: str, _much: int | float) -> None:
    return None


def check(budget: Budget, scope: Scope, now: Standing, tokens: int, cost: int | None, *, later: Room = _never) -> None:
    """Raises OverBudget where one more request, which may take so much, does not fit."""
    _check_seconds(budget, scope, now, later)
    if budget.tokens is not None:
        _check_amount(
            _Amount("tokens", "tokens", budget.tokens, now.tokens, now.reserved_tokens, tokens, str_of=_tokens),
            scope,
            later,
        )
    if budget.money is not None:
        if cost is None:
            raise OverBudget(
                "This model has no price in the policy (model.prices), and where money is bounded only models with a "
                "price may be asked. Do not ask for it again.",
                f"{scope.rule}.money",
            )
        amount = _Amount(
            "cost",
            "money",
            billionths(budget.money),
            now.cost,
            now.reserved_cost,
            cost,
            str_of=lambda much: _money(much, scope.currency),
        )
        _check_amount(amount, scope, later)
    if budget.requests is not None and now.requests >= budget.requests:
        wait = later("requests", now.requests - budget.requests + 1)
        used = f"{scope.who} may ask models {budget.requests:,} times{scope.within}, and has done so."
        raise OverBudget(f"{used} {_again(wait)}", f"{scope.rule}.requests", wait)
    if budget.requests_per_minute is not None and now.minute > 0:
        reachable = None if math.isinf(now.minute) else now.minute
        used = f"{scope.who} may ask models {budget.requests_per_minute:,} times a minute."
        raise OverBudget(f"{used} {_again(reachable)}", f"{scope.rule}.requests_per_minute", reachable)
    if budget.concurrent is not None and now.open >= budget.concurrent:
        used = f"{scope.who} may have {budget.concurrent:,} requests to models at one time, and has {now.open:,}."
        if budget.concurrent < 1:
            raise OverBudget(f"{used} {_again(None)}", f"{scope.rule}.concurrent")
        raise OverBudget(f"{used} Ask again when one of them is answered.", f"{scope.rule}.concurrent", SOON)


def _check_seconds(budget: Budget, scope: Scope, now: Standing, later: Room) -> None:
    if budget.wall_time is None or now.seconds < budget.wall_time:
        return
    wait = later("seconds", now.seconds - budget.wall_time)
    used = f"{scope.who} may use models for {duration(budget.wall_time)}{scope.within}, and that time is over."
    raise OverBudget(f"{used} {_again(wait)}", f"{scope.rule}.wall_time", wait)


@dataclass(frozen=True, slots=True)
class _Amount:
    """Of a thing that requests take an amount of."""

    what: str
    field: str
    bound: int
    used: int
    reserved: int
    wanted: int
    str_of: Callable[[int], str]


def _tokens(much: int) -> str:
    return f"{much:,} tokens"


def _check_amount(amount: _Amount, scope: Scope, later: Room) -> None:
    if amount.used >= amount.bound or amount.used + amount.reserved + amount.wanted > amount.bound:
        _refuse_amount(amount, scope, later)


def _refuse_amount(amount: _Amount, scope: Scope, later: Room) -> NoReturn:
    said = amount.str_of
    sentences = [f"{scope.who} may use {said(amount.bound)} of models{scope.within}, and has used {said(amount.used)}."]
    wait: float | None
    if amount.used >= amount.bound:
        wait = later(amount.what, amount.used - amount.bound + 1)
        sentences.append(_again(wait))
    elif amount.wanted > amount.bound:
        wait = None
        sentences.append(f"This request could take {said(amount.wanted)}, which is more than there ever was. {_LESS}")
    else:
        in_flight = f", and {said(amount.reserved)} are reserved for requests in flight" if amount.reserved else ""
        sentences.append(f"This request could take {said(amount.wanted)}{in_flight}.")
        if amount.used + amount.wanted <= amount.bound:
            wait = SOON
            sentences.append("Ask again when those are answered.")
        else:
            wait = later(amount.what, amount.used + amount.wanted - amount.bound)
            sentences.append(_LESS if wait is None else f"{_LESS} Or ask again in {duration(wait)}.")
    raise OverBudget(" ".join(sentences), f"{scope.rule}.{amount.field}", wait)


_LESS = "A shorter request, or one with a smaller limit for its output, may still fit."


def _again(wait: float | None) -> str:
    return "Do not ask again: there will be no more." if wait is None else f"Ask again in {duration(wait)}."


class Window:
    """So many in any minute: a sliding window. Its owner holds the lock."""

    __slots__ = ("_limit", "_times")

    def __init__(self, limit: int) -> None:
        self._limit = limit
        self._times: deque[float] = deque(maxlen=max(0, limit))

    def wait(self, now: float) -> float:
        """Seconds until there is room; 0 where there is now, infinity where there never is."""
        if self._limit <= 0:
            return math.inf
        if len(self._times) < self._limit:
            return 0.0
        return max(0.0, self._times[0] + MINUTE - now)

    def take(self, now: float) -> None:
        """One more, for which there is room."""
        self._times.append(now)

    def give_back(self, taken: float) -> None:
        """One that was taken at that time has not happened."""
        if taken in self._times:
            self._times.remove(taken)
