"""What another policy would have decided on the actions that a log has recorded.

Only the policy's word is asked for anew; what else had a say then is taken to say the same again. So a refusal by
behaviour, risk, autonomy, the enforcer or a fault stands, and is only made harder; an ``ask`` that a person or a grant
had answered stays answered as it was. And it is asked for the actions that there were: had one of them been decided
otherwise, the agent would have gone on otherwise.

What was never recorded cannot be judged: system calls that the policy of then let pass unasked, and files that it
neither asked for nor watched. Recorded actions that cannot be judged, because their subject was too long to be recorded
whole, are told as such and never guessed.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass

from corral.actions import Action, Decision, KernelCall, Kind, Opinion, Verdict
from corral.errors import CorralError
from corral.log.items import shown_line
from corral.log.records import Record
from corral.policy.model import Policy
from corral.policy.part import PolicyPart

SUBJECT = "subject"
"""What a record's ``cut`` has where its subject is not whole."""
_BY_POLICY = frozenset({"the policy refuses it", "the policy asks for it"})
"""The reason of a recorded system call that its policy named; all others were refused by the table, which no policy
widens (corral.supervisor.filter)."""

_SECTION = re.compile(r"(filesystem|network|process|syscalls|model|data|irreversible|built-in|policy)\b")
"""What the name of a rule of :class:`PolicyPart` begins with. Another part's question stays one, whatever policy
says."""

Judge = Callable[[PolicyPart, Action], Opinion]


@dataclass(frozen=True, slots=True)
class Outcome:
    """A verdict, whence it came, and who answered where somebody was asked."""

    verdict: Verdict
    rule: str
    answered_by: str = ""

    def __str__(self) -> str:
        asked = f", asked, answered by {self.answered_by}" if self.answered_by else ""
        return shown_line(f"{self.verdict.name.lower()} ({self.rule}{asked})")


@dataclass(frozen=True, slots=True)
class Difference:
    """One record that would have been another, or of which that cannot be said."""

    number: int
    """Of the record, in the log."""
    action: Action
    was: Outcome
    would_be: Outcome | None
    """None where it cannot be judged."""
    why: str = ""
    """Why it cannot be judged."""
    count: int = 1
    """Equal actions that the record stands for."""

    def __str__(self) -> str:
        """One printable line."""
        times = f" ({self.count} times)" if self.count > 1 else ""
        would = f"would be {self.would_be}" if self.would_be is not None else f"cannot be judged: {self.why}"
        return f"#{self.number} {shown_line(str(self.action))}{times}: was {self.was}; {shown_line(would)}"


@dataclass(slots=True)
class Counts:
    """How many recorded actions there were of each sort; a record with a count stands for so many."""

    judged: int = 0
    same: int = 0
    harder: int = 0
    """Allowed then, held or refused now; or asked for then and refused now, and so on up."""
    milder: int = 0
    cannot: int = 0
    """Of these it cannot be said."""
    other_rule: int = 0
    """Of the same ones: by a rule of another name, which may be the same rule in another place."""


def compare(
    records: Iterable[tuple[int, Record]], policy: Policy, counts: Counts | None = None, *, judge: Judge | None = None
) -> Iterator[Difference]:
    """What would have differed, in the order of ``records`` (each with its number in the log), one by one.

    ``counts`` is kept up as records are taken. ``judge`` is how an action is judged by the policy, for callers who know
    the table of system calls; without it, one that the new policy does not name cannot be judged.
    """
    part = PolicyPart(policy)
    counted = Counts() if counts is None else counts
    for number, record in records:
        decision = record.event
        if not isinstance(decision, Decision):
            continue
        difference = _difference(number, decision, record.cut, part, judge or _judge)
        many = decision.count
        if difference.would_be is None:
            counted.cannot += many
            yield difference
            continue
        counted.judged += many
        was, would_be = _asked_for(difference.was), _asked_for(difference.would_be)
        if was is would_be and difference.was.verdict is difference.would_be.verdict:
            counted.same += many
            counted.other_rule += many * (difference.was.rule != difference.would_be.rule)
            continue
        if (would_be, difference.would_be.verdict) > (was, difference.was.verdict):
            counted.harder += many
        else:
            counted.milder += many
        yield difference


def _asked_for(outcome: Outcome) -> Verdict:
    """The verdict before anybody was asked."""
    return Verdict.ASK if outcome.answered_by else outcome.verdict


def _difference(number: int, decision: Decision, cut: frozenset[str], part: PolicyPart, judge: Judge) -> Difference:
    action = decision.action
    was = Outcome(decision.verdict, decision.rule, _answerer(decision))

    def result(would_be: Outcome | None, why: str = "") -> Difference:
        return Difference(number, action, was, would_be, why, decision.count)

    if SUBJECT in cut:
        return result(None, "its subject was too long to be recorded whole")
    if action.kind is Kind.NET_SOCKET or (
        isinstance(action.subject, KernelCall) and action.subject.reason not in _BY_POLICY
    ):
        return result(was)  # no policy has a say
    try:
        opinion = judge(part, action)
    except _Unknown as error:
        return result(None, str(error))
    except CorralError as error:
        return result(None, shown_line(str(error)))
    return result(_combined(decision, was, opinion))


class _Unknown(Exception):
    """It cannot be judged; the message says why."""


def _judge(part: PolicyPart, action: Action) -> Opinion:
    call = action.subject
    if isinstance(call, KernelCall):
        named = {*part.policy.syscalls.ask, *part.policy.syscalls.deny}
        if call.name not in named:
            raise _Unknown("this policy does not name the system call, and whether it is free is not known here")
    return part.judge(action)


def _answerer(decision: Decision) -> str:
    """Who answered where it was asked: a person, or the grant of an autonomy level; "" where nobody was."""
    if decision.decider == "approvals":
        earlier = "a person, when another enforcer saw it first" if decision.allowed else "nobody"
        return decision.answered_by or earlier
    if decision.decider == "autonomy" and decision.verdict is Verdict.ALLOW:
        return f"the grant {decision.rule}"
    return ""


def _combined(decision: Decision, was: Outcome, opinion: Opinion) -> Outcome:
    """The new opinion with all else that had a say then."""
    new = Outcome(opinion.verdict, opinion.rule)
    if was.answered_by:
        if opinion.verdict is Verdict.ASK:
            return Outcome(was.verdict, opinion.rule, was.answered_by)
        by_policy = decision.decider == "autonomy" or _SECTION.match(decision.rule) is not None
        return new if by_policy or opinion.verdict > Verdict.ASK else was
    if decision.decider == "policy":
        return new
    return was if was.verdict >= new.verdict else new  # behaviour, risk, autonomy, monitor, enforcer
