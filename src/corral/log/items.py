"""What a time line consists of: one item a record, in words that a person reads.

Texts of a record are an agent's, so an item has them only in a form that neither a terminal nor a browser acts on
(:func:`shown`), and bounded. Whoever prints an item still treats its texts as text.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from enum import Enum

from corral.actions import Origin, Verdict
from corral.policy.document import escaped

MAX_LINE = 300
"""Characters of an item's line."""
MAX_DETAIL = 16 * 1024
"""Characters of one detail."""
MAX_DETAILS = 64
UNEXPLAINED = "unexplained"
"""How the line of an item begins that no answer of a model explains."""
_TAB = 4


class ItemKind(Enum):
    """What a line of the time line is about."""

    REASONING = "reasoning"
    """What a model was asked and answered."""
    TOOL_CALL = "tool call"
    """A command that the agent had run, a query of data, or a call of a service."""
    SYSTEM_CALL = "system call"
    """What its processes tried, with the verdict."""
    FLOW = "flow"
    """A connection that went out, when it was over."""
    FILE_CHANGE = "file change"
    APPROVAL = "approval"
    """What a person was asked, and the answer."""
    TERMINAL = "terminal"
    """What was written to the terminal."""
    LIFECYCLE = "lifecycle"
    """What happened to the sandbox, its policy, or the log."""


@dataclass(frozen=True, slots=True)
class Detail:
    """One more thing to say of an item; ``text`` may have several lines."""

    name: str
    text: str


@dataclass(frozen=True, slots=True)
class Item:
    """One record on the time line. Its texts are safe to show: see :func:`make_item`."""

    number: int
    """Of the record, in the log."""
    kind: ItemKind
    at: float
    """Seconds since the epoch."""
    offset: float
    """Seconds since the session began; never less than that of the item before."""
    line: str
    details: tuple[Detail, ...] = ()
    step: int = 0
    """The step it belongs to; 0 where none was open."""
    verdict: Verdict | None = None
    tool: str = ""
    """The tool call of that step that it comes from."""
    unexplained: bool = False
    """No answer of a model explains it. Its line says so too, so that it can be searched for."""
    conversation: str = ""
    """The conversation of a call of a model, or whose answer opened the step."""
    depth: int = 0
    """How deep that conversation is in the tree of those that began others; and one more within a step of it."""

    def has(self, text: str) -> bool:
        """Whether this text stands in it, whatever the case of its letters."""
        wanted = text.casefold()
        return wanted in self.line.casefold() or any(wanted in detail.text.casefold() for detail in self.details)


def shown(text: str, limit: int = MAX_DETAIL) -> str:
    """``text``, bounded and with what is not printable as backslash escapes; only ends of lines stay what they are.

    That takes every control character, every invisible one and those that turn the direction of writing. Lone
    surrogates become escapes too, so the result is always valid Unicode.
    """
    cut = text[:limit]
    lines = [escaped(line.expandtabs(_TAB)) for line in cut.split("\n")]
    return "\n".join(lines) + ("..." if len(text) > limit else "")


def shown_line(text: str, limit: int = MAX_LINE) -> str:
    """The same as one line."""
    return escaped(text[:limit]) + ("..." if len(text) > limit else "")


def make_item(
    number: int,
    kind: ItemKind,
    at: float,
    offset: float,
    line: str,
    details: Iterable[tuple[str, str]] = (),
    *,
    step: int = 0,
    verdict: Verdict | None = None,
    origin: Origin | None = None,
) -> Item:
    """An item of texts as they are recorded. Details without a text are left out. ``origin`` is whose step, tool call
    and lack of one it has, where ``step`` is not given."""
    found = [Detail(shown_line(name, 60), shown(text)) for name, text in details if text]
    if len(found) > MAX_DETAILS:
        more = Detail("more", f"{len(found) - MAX_DETAILS + 1} more details, not shown")
        found = [*found[: MAX_DETAILS - 1], more]
    tool, unexplained = (origin.tool, origin.unexplained) if origin is not None else ("", False)
    step = step or (origin.step if origin is not None else 0)
    line = f"{UNEXPLAINED}: {line}" if unexplained else line
    return Item(number, kind, at, offset, shown_line(line), tuple(found), step, verdict, shown_line(tool), unexplained)


def clock(seconds: float) -> str:
    """Seconds as ``h:mm:ss.mmm``."""
    whole = max(0, round(seconds * 1000))
    rest, milliseconds = divmod(whole, 1000)
    minutes, second = divmod(rest, 60)
    hours, minute = divmod(minutes, 60)
    return f"{hours}:{minute:02d}:{second:02d}.{milliseconds:03d}"
