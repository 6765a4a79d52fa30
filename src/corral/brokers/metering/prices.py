"""What tokens cost, by the price table of a policy. In billionths of its currency, as whole numbers: sums of them are
exact, and whatever is rounded is rounded up, once a request."""

from __future__ import annotations

from dataclasses import dataclass
from fractions import Fraction

from corral.policy.matching import Matcher, text_glob
from corral.policy.model import Model, Price

BILLION = 10**9
_PER_TOKEN = Fraction(BILLION, 10**6)
"""A price is for a million tokens."""


def billionths(amount: float) -> int:
    """An amount of money as whole billionths, rounded down: what a bound is compared with."""
    return int(_exact(amount) * BILLION)


def _exact(amount: float) -> Fraction:
    """The number as it was written: 0.1 is a tenth, and not the nearest binary fraction."""
    return Fraction(repr(float(amount)))


@dataclass(frozen=True, slots=True)
class _Rates:
    """Billionths for one token."""

    input: Fraction
    output: Fraction
    cached: Fraction
    written: Fraction

    @classmethod
    def of(cls, price: Price) -> _Rates:
        plain = _exact(price.input) * _PER_TOKEN
        cached = plain if price.cached is None else _exact(price.cached) * _PER_TOKEN
        written = plain if price.written is None else _exact(price.written) * _PER_TOKEN
        return cls(plain, _exact(price.output) * _PER_TOKEN, cached, written)


class Prices:
    """The price table of one policy. Used from any thread."""

    def __init__(self, model: Model) -> None:
        self.currency = model.currency
        self._table: tuple[tuple[Matcher, _Rates], ...] = tuple(
            (text_glob(price.model), _Rates.of(price)) for price in model.prices
        )

    def _rates(self, name: str) -> _Rates | None:
        return next((rates for matches, rates in self._table if matches(name)), None)

    def cost(self, name: str, input_tokens: int, output_tokens: int, cached: int = 0, written: int = 0) -> int | None:
        """What it comes to; None where the model, by the name that it is asked for, has no price.

        ``input_tokens`` are all of them, with the ``cached`` and the ``written``, as in ``Used``. An upstream that
        counts more of these than of all has them cost what they cost, and the rest nothing.
        """
        rates = self._rates(name)
        if rates is None:
            return None
        plain = max(0, input_tokens - cached - written)
        sums = plain * rates.input + cached * rates.cached + written * rates.written + output_tokens * rates.output
        return -(-sums.numerator // sums.denominator)

    def ceiling(self, name: str, input_tokens: int, output_tokens: int) -> int | None:
        """The most that it can come to, whatever of its input is cached or written: what to reserve before asking."""
        rates = self._rates(name)
        if rates is None:
            return None
        sums = input_tokens * max(rates.input, rates.cached, rates.written) + output_tokens * rates.output
        return -(-sums.numerator // sums.denominator)
