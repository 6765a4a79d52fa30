"""What calls of brokers came to, added up: tokens, and money in each currency."""

from __future__ import annotations

from collections import Counter

from corral.actions import Used
from corral.log.digest import Spend
from corral.log.items import shown_line

_CURRENCIES = 16


class Spent:
    """The sum for one agent, or one conversation."""

    __slots__ = ("calls", "costs", "input_tokens", "output_tokens", "unexplained")

    def __init__(self) -> None:
        self.calls = self.input_tokens = self.output_tokens = self.unexplained = 0
        self.costs: Counter[str] = Counter()

    def take(self, used: Used) -> None:
        self.calls += 1
        self.input_tokens += used.input_tokens
        self.output_tokens += used.output_tokens
        currency = shown_line(used.currency, 16)
        if used.cost and (currency in self.costs or len(self.costs) < _CURRENCIES):
            self.costs[currency] += used.cost

    def total(self) -> Spend:
        return Spend(self.calls, self.input_tokens, self.output_tokens, tuple(sorted(self.costs.items())))
