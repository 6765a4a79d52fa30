"""What comes of the rules that name an action: one opinion, in words for people and models."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import NamedTuple

from corral.actions import Opinion, Verdict
from corral.policy.model import Note

STAY = "Do not retry or look for another way; work with what is in the sandbox, or ask the person to allow it."
STAY_REFUSED = "Do not retry or look for another way; work with what is in the sandbox."
_NONE = Note()


class Match(NamedTuple):
    """One rule that names an action."""

    verdict: Verdict
    rule: str
    note: Note = _NONE


class Judgement(NamedTuple):
    """The opinion of an action, and all rules that name it."""

    opinion: Opinion
    matches: tuple[Match, ...]


def listed(verdict: Verdict, field: str, found: Iterable[int], rules: Sequence[object]) -> list[Match]:
    """The rules of a list that were found, by their positions."""
    return [Match(verdict, f"{field}[{index}]", getattr(rules[index], "note", _NONE)) for index in found]


def cut(subject: object, limit: int = 200) -> str:
    """A subject in words, bounded."""
    text = str(subject)
    return f"{text[:limit]}..." if len(text) > limit else text


def judged(matches: list[Match], section: str, doing: str) -> Judgement:
    """The hardest match decides; of several the first that is written. ``doing`` is what a refusal says."""
    if not matches:
        reason = f"This sandbox may not {doing}: no rule of its policy allows it."
        return Judgement(Opinion(Verdict.DENY, f"{section} (nothing allows it)", reason, STAY), ())
    first = max(matches, key=lambda match: match.verdict)
    reason, advice = first.note.reason, first.note.advice
    if first.verdict is Verdict.ASK:
        reason = reason or f"This sandbox must ask before it may {doing}."
        advice = advice or STAY_REFUSED
    elif first.verdict is not Verdict.ALLOW:
        reason = reason or f"This sandbox may not {doing}: its policy denies it."
        advice = advice or STAY
    asked = tuple(match.rule for match in matches if match.verdict is first.verdict is Verdict.ASK)
    return Judgement(Opinion(first.verdict, first.rule, reason, advice, first.note.private, asked), tuple(matches))


def refused(match: Match, reason: str, advice: str = STAY) -> Judgement:
    """What one rule refuses, for a reason of its own."""
    return Judgement(Opinion(match.verdict, match.rule, reason, advice), (match,))
