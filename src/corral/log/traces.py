"""Two sessions of one agent, compared step by step: where did the second first do something else?

A re-run serves an agent the answers that its model gave before. What it does with them should be what it did then. It
need not be done in the same order (programs run beside each other), with the same process ids or the same names of
temporary files, so a step is compared by what was done in it and how that was decided, each as often as it was.

Steps are told apart by what they belong to, not by their numbers: the n-th answer of a conversation, or an exec.
"""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Iterable
from dataclasses import dataclass, field

from corral.actions import Decision, Ending, Kind, Used, Verdict
from corral.log.items import shown_line
from corral.log.records import Record

MAX_DEEDS = 1_000_000
"""Of one session that are compared; what comes later is not looked at, and the outcome says so."""
_RANDOM = re.compile(
    r"(?<![A-Za-z0-9])(tmp)[A-Za-z0-9._-]{6,18}(?![A-Za-z0-9_])"  # tempfile of Python, mktemp(1)
    r"|(?<=/tmp/)(cc)[A-Za-z0-9]{6}(?![A-Za-z0-9])"  # gcc
    r"|(?<=/tmp/)([A-Za-z][A-Za-z0-9_-]*[._-])[A-Za-z0-9]{6,12}(?![A-Za-z0-9])"  # mkstemp(3), as most use it
)
"""Names that programs make up for temporary files; what they begin with stays."""
_COMPARED = frozenset(Kind) - {Kind.MODEL_CALL, Kind.SANDBOX_SNAPSHOT, Kind.SANDBOX_APPLY, Kind.SANDBOX_UNDO}
"""What an agent does. What was asked of a model is compared by what it led to."""


@dataclass(frozen=True, slots=True)
class Deed:
    """One thing that was tried, and what was decided."""

    action: str
    """As a person reads it, random names left out."""
    verdict: Verdict

    def __str__(self) -> str:
        return shown_line(f"{self.action}: {self.verdict.name.lower()}")


@dataclass(frozen=True, slots=True)
class Place:
    """A step, whatever its number: the ``nth`` answer of a conversation, or exec ``nth`` where that is empty."""

    conversation: str
    nth: int

    def __str__(self) -> str:
        return (
            f"answer {self.nth} of conversation {self.conversation[:12]}" if self.conversation else f"exec {self.nth}"
        )


@dataclass(slots=True)
class _Step:
    deeds: list[Deed] = field(default_factory=list)
    tools: tuple[tuple[str, str], ...] = ()


@dataclass(frozen=True, slots=True)
class Divergence:
    """Where the second session first was another."""

    place: Place
    number: int
    """Of the step in the first session; 0 where it has none."""
    was: Deed | None
    """What only the first has done; None where the second has done more."""
    now: Deed | None
    what: str
    """One sentence."""

    def __str__(self) -> str:
        step = f"step {self.number} ({self.place})" if self.number else str(self.place)
        return shown_line(f"{step}: {self.what}")


class Trace:
    """What one session did, by its steps."""

    def __init__(self, records: Iterable[Record]) -> None:
        self._places: dict[int, Place] = {}
        self.steps: dict[Place, _Step] = {}
        """In the order in which they began."""
        self.numbers: dict[Place, int] = {}
        self.deeds = self.calls = 0
        self.is_whole = True
        counts: Counter[str] = Counter()
        for record in records:
            event = record.event
            if isinstance(event, Used) and event.kind is Kind.MODEL_CALL and event.ending is Ending.ANSWERED:
                self.calls += 1
                if event.opened:
                    counts[event.conversation] += 1
                    place = Place(event.conversation, counts[event.conversation])
                    self._step(event.opened, place).tools = tuple((each.name, each.arguments) for each in event.tools)
            elif isinstance(event, Decision) and event.action.kind in _COMPARED:
                self._deed(event)

    def _step(self, number: int, place: Place) -> _Step:
        """What is done in a step may be recorded before the answer that opened it."""
        before = self._places.get(number)
        if before is not None and before != place:
            step = self.steps.pop(before, _Step())
            self.numbers.pop(before, None)
        else:
            step = self.steps.get(place, _Step())
        self._places[number] = place
        self.steps[place], self.numbers[place] = step, number
        return step

    def _deed(self, decision: Decision) -> None:
        if self.deeds >= MAX_DEEDS:
            self.is_whole = False
            return
        origin = decision.action.origin
        place = self._places.get(origin.step) or Place("", origin.step)
        self.deeds += decision.count
        deed = Deed(_RANDOM.sub(r"\1\2\3*", str(decision.action)), decision.verdict)
        step = self.steps.get(place) or self._step(origin.step, place)
        step.deeds += [deed] * min(decision.count, MAX_DEEDS)


def first_divergence(before: Trace, after: Trace) -> Divergence | None:
    """Where the second first did something else; None where it did the same."""
    for place, step in before.steps.items():
        other = after.steps.get(place)
        number = before.numbers[place]
        if other is None:
            first = step.deeds[0] if step.deeds else None
            return Divergence(place, number, first, None, f"it never came to this step{_which(first)}")
        if step.tools != other.tools:
            return Divergence(place, number, None, None, "the model's answer asked for something else")
        found = _difference(place, number, step.deeds, other.deeds)
        if found is not None:
            return found
    for place, step in after.steps.items():
        if place not in before.steps:
            first = step.deeds[0] if step.deeds else None
            return Divergence(place, 0, None, first, f"it went on where the first had ended{_which(first)}")
    return None


def _which(deed: Deed | None) -> str:
    return "" if deed is None else f" ({deed})"


def _difference(place: Place, number: int, was: list[Deed], now: list[Deed]) -> Divergence | None:
    missing, more = Counter(was), Counter(now)
    missing, more = missing - more, more - missing
    gone = next((deed for deed in was if deed in missing), None)
    new = next((deed for deed in now if deed in more), None)
    if gone is not None and new is not None:
        what = f"{gone} was not done again; instead: {new}"
        if gone.action == new.action:
            what = f"{gone.action} was {gone.verdict.name.lower()}, and is {new.verdict.name.lower()}"
    elif gone is not None:
        what = f"{gone} was not done again"
    elif new is not None:
        what = f"{new} was not done before"
    else:
        return None
    return Divergence(place, number, gone, new, what)
