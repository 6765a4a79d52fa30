"""Scanners look at the results of tools before a model does, and say whether something is in them that should not be.

One is ours (:mod:`.instructions`). Others are installed: a distribution names a class, or a function, in the entry
point group ``corral.scanners``, which is called without arguments and returns a :class:`Scanner`. What a policy names
is looked for when its broker starts; a name that is nobody's is an error there, and not a guard that looks at nothing.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from importlib.metadata import entry_points
from typing import Protocol, runtime_checkable

from corral.errors import CorralError, RequestError

GROUP = "corral.scanners"
OWN = "instructions"


@dataclass(frozen=True, slots=True)
class ToolResult:
    """What a tool gave, on its way to a model."""

    id: str
    """Of the tool call, as the model's API has it."""
    name: str
    """Of the tool; empty where the conversation does not say."""
    text: str
    """All of its text, joined."""
    source: str = ""
    """Where it came from, as far as the call says: ``file: PATH``, ``url: URL``, ``command: LINE``
    (:func:`corral.brokers.guard.source_of`)."""


@dataclass(frozen=True, slots=True)
class Finding:
    """What a scanner has found. It holds nothing of the text: that is kept where contents are, if anywhere."""

    scanner: str
    what: str
    """In the scanner's words."""
    where: int = 0
    """About at which character."""
    score: float = 1.0
    """How sure it is, as the scanner counts."""


class ScanError(CorralError):
    """A scanner could not look at a text."""


@runtime_checkable
class Scanner(Protocol):
    """Called from several threads at one time; anything that it raises, and too much time, is a failure."""

    def scan(self, text: str, source: ToolResult) -> Finding | None:
        """What was found in ``text``, which is ``source.text``; None for nothing."""


def load_scanners(names: Iterable[str]) -> tuple[tuple[str, Scanner], ...]:
    """The scanners of these names. Raises RequestError for one that is not installed, or is none."""
    return tuple((name, _load(name)) for name in names)


def _load(name: str) -> Scanner:
    if name == OWN:  # what is installed does not take its place
        from corral.brokers.guard.instructions import Instructions

        return Instructions()
    found = tuple(entry_points(group=GROUP, name=name))
    if len(found) != 1:
        number = "no scanner of that name is" if not found else f"{len(found)} scanners of that name are"
        raise RequestError(f"model.guard.scanners: {name}: {number} installed (entry points of {GROUP})")
    try:
        scanner = found[0].load()()
    except Exception as error:
        raise RequestError(f"model.guard.scanners: {name}: it cannot be loaded ({type(error).__name__})") from None
    if not isinstance(scanner, Scanner):
        raise RequestError(f"model.guard.scanners: {name}: {found[0].value} is no scanner: it has no method `scan`")
    return scanner
