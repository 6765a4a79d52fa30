"""Which step of an agent's an action belongs to: what brokers say of answers, and enforcers ask of processes."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple, Protocol

from corral.actions import Origin, ToolCall


class Cause(NamedTuple):
    """What an action comes from, as :class:`corral.actions.Origin` has it."""

    step: int
    tool: str
    unexplained: bool


class Steps(Protocol):
    """The steps of one session. May be used from several threads."""

    def next(self) -> int:
        """The number of a new step that is no answer's: an exec."""

    def asked(self, origin: Origin, conversation: str) -> None:
        """A request to a model is about to be sent: the step that the last answer in this conversation has opened is
        over."""

    def answered(self, origin: Origin, conversation: str, tools: Sequence[ToolCall]) -> int:
        """An answer asks for ``tools``: opens a step, and returns its number. To be called before the agent has the
        whole answer."""
