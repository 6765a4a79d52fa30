"""What a tracker of steps remembers of processes."""

from __future__ import annotations

from collections import OrderedDict, deque
from collections.abc import Iterable
from itertools import islice

from corral.monitor.moments import Identity, Moment, order
from corral.monitor.opened import Opened

MAX_LIVING = 4096
MAX_ENDED = 512
"""Who has ended of late; how far back that reaches is a matter of how many there are."""
LOOKED_AFTER = 256
"""How many are looked at in one go, at most."""


class Asker:
    """A process that has asked a model."""

    __slots__ = ("exec", "first", "open")

    def __init__(self, exec_: int, first: Moment) -> None:
        self.exec, self.first = exec_, first
        self.open: OrderedDict[str, Opened] = OrderedDict()
        """By conversation, the newest last."""


class Birth:
    """What a process was born in."""

    __slots__ = (
        "asker",
        "covering",
        "exec",
        "is_doubtful",
        "is_part",
        "is_settled",
        "needs_call",
        "parent",
        "step",
        "tool",
    )

    def __init__(self, asker: Identity | None, exec_: int, parent: Identity | None) -> None:
        self.parent, self.asker, self.exec = parent, asker, exec_
        """Whose steps count: an ancestor's, or those of all askers of the exec."""
        self.covering: tuple[Opened, ...] | None = None
        """The steps that were open when it was born and may be still, once somebody has looked."""
        self.is_part = False
        """It was there before the asker first asked, or before any of the exec's did."""
        self.step: Opened | None = None
        self.tool = ""
        self.is_settled = False
        """Its tool call is known."""
        self.is_doubtful = False
        """Nobody knows who has given it away, and somebody from an earlier step could have."""
        self.needs_call = False
        """It comes from a step that was over by then: only what a tool call asks for gets it into another."""

    def is_other(self, process: Identity, exec_: int) -> bool:
        """Whether it is of the exec, but of no step that was open when another process was born."""
        return self.exec == exec_ and (self.is_doubtful or self.step is None or not self.step.covers(process))


class Living:
    """Who has been born in the time of a step and may live still, or did until a moment ago: who could have given away
    an orphan."""

    __slots__ = ("_ended", "_is_partial", "_living")

    def __init__(self) -> None:
        self._living: OrderedDict[Identity, Birth] = OrderedDict()
        self._ended: deque[tuple[Moment, Birth]] = deque(maxlen=MAX_ENDED)
        """When it was noticed, the latest last."""
        self._is_partial = False

    def __len__(self) -> int:
        return len(self._living)

    def add(self, process: Identity, birth: Birth) -> None:
        """One more."""
        self._living[process] = birth
        if len(self._living) > MAX_LIVING:
            self._living.popitem(last=False)
            self._is_partial = True

    def some(self) -> list[Identity]:
        """Those that are to be looked at next."""
        return list(islice(self._living, LOOKED_AFTER))

    def looked_at(self, processes: Iterable[tuple[Identity, bool]], now: Moment) -> None:
        """Which of them lived, and what moment it is after the look."""
        for process, lives in processes:
            birth = self._living.pop(process, None)
            if birth is not None and lives:
                self._living[process] = birth
            elif birth is not None:
                self._ended.append((now, birth))

    def may_have_given_away(self, orphan: Identity, exec_: int) -> bool:
        """Whether there may be somebody, who is of another step than those that were open at the orphan's birth."""
        if self._is_partial or any(birth.is_other(orphan, exec_) for birth in self._living.values()):
            return True
        for moment, birth in reversed(self._ended):
            if order(orphan, moment) > 0:
                return False  # all of them had ended before
            if birth.is_other(orphan, exec_):
                return True
        return len(self._ended) == MAX_ENDED
