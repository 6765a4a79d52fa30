"""The slots of the monitor: who may have an opinion, and who may answer for a person.

The monitor asks policy, behaviour, risk and autonomy in this order. Each gives an :class:`~corral.actions.Opinion` at
once, from what it knows; none may wait. Their verdicts are combined by the maximum, so that a part can only raise. Only
two things lower a verdict, and only from ``ask`` to ``allow``: a *grant* of the autonomy slot, and an answer of the
approvals slot (I6).
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Protocol

from corral.actions import Action, Opinion, Verdict


class Part(Protocol):
    """Policy, behaviour or risk."""

    def judge(self, action: Action) -> Opinion:
        """Says what it thinks. Called often: it must neither block nor keep the action."""


class Autonomy(Protocol):
    """What an agent version has earned."""

    def judge(self, action: Action) -> Opinion:
        """As :class:`Part`."""

    def grants(self, action: Action, opinion: Opinion) -> str:
        """Names the grant by which this ``ask`` needs no answer, or returns an empty text."""


@dataclass(frozen=True, slots=True)
class Answer:
    """A person's answer to one question."""

    verdict: Verdict
    """ALLOW, DENY or KILL."""
    by: str
    """Who answered."""
    reason: str = ""


class Held(Protocol):
    """A question that waits for its answer."""

    def withdraw(self) -> None:
        """Nobody waits for the answer any more; it will not be told. May be called again, and from any thread."""


class Approvals(Protocol):
    """Whoever brings questions before persons."""

    def ask(self, action: Action, opinion: Opinion, answered: Callable[[Answer], None]) -> Held:
        """Files the question. ``answered`` is called once, from any thread, at the latest when its time is over."""


class Neutral:
    """A part without an opinion: the slot is empty."""

    _NOTHING = Opinion(Verdict.ALLOW, "")

    def judge(self, action: Action) -> Opinion:
        return self._NOTHING

    def grants(self, action: Action, opinion: Opinion) -> str:
        return ""


class _Nothing:
    def withdraw(self) -> None:
        pass


class NobodyToAsk:
    """An approvals slot without persons: the answer is no."""

    def ask(self, action: Action, opinion: Opinion, answered: Callable[[Answer], None]) -> Held:
        answered(Answer(Verdict.DENY, "nobody", "this sandbox has nobody who could be asked"))
        return _Nothing()
