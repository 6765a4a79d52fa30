"""A step that an answer of a model has opened: what it asks for, and when it was open."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace

from corral.actions import Program, Subject, ToolCall
from corral.monitor.moments import Identity, Moment, order
from corral.monitor.wanted import NONE, Likeness, Wanted, commands_of

MAX_CALLS = 128
"""Tool calls of one step that are told apart."""
MAX_TEXTS = 256 * 1024
"""Characters of their arguments that one step keeps."""


class Called:
    """One of its tool calls."""

    __slots__ = ("id", "taken", "taken_by", "wanted")

    def __init__(self, call: ToolCall) -> None:
        self.id = call.id
        self.wanted = Wanted(call)
        self.taken = False
        """Whether a command was found that it has asked for."""
        self.taken_by: Identity | None = None
        """The parent of whoever ran that."""


class Opened:
    """The step."""

    __slots__ = ("asker", "calls", "closed", "conversation", "exec", "number", "only", "opened")

    def __init__(self, number: int, asker: Identity, exec_: int, conversation: str, opened: Moment) -> None:
        self.number, self.asker, self.exec, self.conversation, self.opened = number, asker, exec_, conversation, opened
        self.closed: Moment | None = None
        self.calls: tuple[Called, ...] = ()
        """None once it is over."""
        self.only = ""
        """The id of its tool call, where it has just one."""

    def covers(self, process: Identity) -> bool:
        """Whether it was open when the process was born, as far as anybody can tell."""
        if self.closed is not None and process.started > self.closed.ticks:  # nearly always
            return False
        return order(process, self.opened) >= 0 and (self.closed is None or order(process, self.closed) <= 0)


def bounded(tools: Sequence[ToolCall]) -> Iterator[Called]:
    """The tool calls of one answer, as much of them as is compared."""
    left = MAX_TEXTS
    for tool in tools[:MAX_CALLS]:
        call = Called(tool if left > 0 else replace(tool, arguments=""))
        left -= call.wanted.size
        yield call


def find(
    steps: Sequence[Opened],
    subject: Subject | None,
    is_free: Callable[[Called], bool] = lambda call: True,
) -> tuple[Opened, Called] | None:
    """The tool call that asks for this, if any does: the one that it is most like, of several the first."""
    best: Likeness = NONE
    commands = commands_of(subject) if isinstance(subject, Program) else ()
    found: tuple[Opened, Called] | None = None
    for step in steps:
        for call in step.calls:
            if is_free(call) and (likeness := call.wanted.likeness(subject, commands)) > best:
                best, found = likeness, (step, call)
    return found
