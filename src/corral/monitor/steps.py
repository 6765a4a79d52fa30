"""Which step of an agent's an action belongs to: what brokers say of answers, and enforcers ask of processes.

An agent's actions between one answer of a model and its next request were caused by that answer: that is a step. Who
starts a command from outside begins one too. All of them have one row of numbers in a session, from 1. Where no model
is asked, an exec's step is its number (:class:`Execs`); where one is, :class:`corral.monitor.tracking.Tracker` knows.

None of this decides anything: an agent says in its own words what it wants done, and can make its processes as it
likes. Attribution informs.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple, Protocol

from corral.actions import Origin, Subject, ToolCall
from corral.monitor.moments import Identity


class Cause(NamedTuple):
    """What an action comes from, as :class:`corral.actions.Origin` has it."""

    step: int
    tool: str
    unexplained: bool


@dataclass(frozen=True, slots=True)
class Descent:
    """Where a process comes from, as an enforcer saw it when it saw it first."""

    processes: tuple[Identity, ...]
    """Itself, then from the parent outwards, without the sandbox's first process."""
    exec: int
    """The exec whose command it descends from."""
    leader: Identity | None = None
    """Who has made the session that it is in, where that is not an exec's own."""


class Steps(Protocol):
    """The steps of one session. May be used from several threads."""

    def next(self) -> int:
        """The number of a new step that is no answer's."""

    def begin(self, number: int) -> int:
        """The step of exec ``number``, which is about to start."""

    def of_exec(self, number: int) -> int:
        """The step of an exec that has begun."""

    def asked(self, origin: Origin, conversation: str) -> None:
        """A request to a model is about to be sent: the step that the last answer in this conversation has opened is
        over."""

    def answered(self, origin: Origin, conversation: str, tools: Sequence[ToolCall]) -> int:
        """An answer asks for ``tools``: opens a step, and returns its number. To be called before the agent has the
        whole answer."""

    def open_in(self, origin: Origin, conversation: str) -> int:
        """The step that is open in a conversation; 0 where none is."""

    def cause_of(self, origin: Origin, subject: Subject | None = None) -> Origin:
        """The same origin as of now: for a connection over which one thing after another is asked. ``subject`` is what
        is asked, where that can tell tool calls apart."""


class Causes(Protocol):
    """What an enforcer that sees processes asks. May be used from several threads."""

    @property
    def epoch(self) -> int:
        """Changes whenever the answers may."""

    def born(self, descent: Descent) -> None:
        """A process is seen for the first time: what it was born in is settled now, while its parents are known."""

    def cause(self, descent: Descent, subject: Subject | None) -> tuple[Cause, bool]:
        """What an action of a process comes from, and whether the same holds for all that it does in this epoch, but
        for the programs that it executes."""

    def look_after(self) -> None:
        """The steps of askers that have ended are over. To be called several times a second."""


class Execs:
    """The steps of a session in which no model is asked: those of its execs, by their numbers."""

    def __init__(self) -> None:
        self._last = 0

    def next(self) -> int:
        self._last += 1
        return self._last

    def begin(self, number: int) -> int:
        self._last = number
        return number

    def of_exec(self, number: int) -> int:
        return number

    def asked(self, origin: Origin, conversation: str) -> None:
        """No model is asked here."""

    def answered(self, origin: Origin, conversation: str, tools: Sequence[ToolCall]) -> int:
        """No model answers here."""
        return origin.step

    def open_in(self, origin: Origin, conversation: str) -> int:
        return 0

    def cause_of(self, origin: Origin, subject: Subject | None = None) -> Origin:
        return origin
