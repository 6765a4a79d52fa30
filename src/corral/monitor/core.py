"""The monitor: the only place that decides.

Every enforcer hands its action to :meth:`Monitor.submit` (callbacks, for enforcers with a loop of their own) or
:meth:`Monitor.decide` (asyncio). The way of an action is the same for all: opinions, combined; where that is ``ask``,
the grant or the answer that may lower it; the record; and only then the decision to the enforcer. What fails on the way
is a denial (I2), and a record that cannot be written is the end of the sandbox (I3).
"""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import TYPE_CHECKING

from corral.actions import Action, Decision, KernelCall, Opinion, Origin, Verdict
from corral.monitor.parts import Answer, Approvals, Autonomy, Held, Neutral, NobodyToAsk, Part
from corral.monitor.records import Aggregator, Ledger, Sink, unwritable

if TYPE_CHECKING:
    import asyncio

_FAULT = "it could not be judged, because a part of the monitor failed"


class Monitor:
    """Decides for one session. May be used from several threads."""

    def __init__(
        self,
        *,
        policy: Part,
        sink: Sink,
        behaviour: Part | None = None,
        risk: Part | None = None,
        autonomy: Autonomy | None = None,
        approvals: Approvals | None = None,
        on_kill: Callable[[str], None] | None = None,
        ledgers: Sequence[Ledger] = (),
    ) -> None:
        """``ledgers`` are those who are told through ``sink`` and whose records are not safe at once: what is allowed
        is released when all of them are."""
        neutral = Neutral()
        self._autonomy = autonomy or neutral
        others = (("behaviour", behaviour), ("risk", risk), ("autonomy", autonomy))
        self._policy = policy.judge
        self._others = tuple((name, part.judge) for name, part in others if part is not None)
        self._approvals = approvals or NobodyToAsk()
        self._sink = sink
        self._ledgers = tuple(ledgers)
        self._on_kill = on_kill or (lambda reason: None)
        self._lock = threading.RLock()
        self._number = 0

    def submit(
        self,
        action: Action,
        decided: Callable[[Decision], None],
        *,
        at_least: Verdict = Verdict.ALLOW,
        own: Opinion | None = None,
        following: Decision | None = None,
    ) -> Held | None:
        """Decides, and calls ``decided`` once with the outcome: at once, or later and from any thread.

        ``at_least`` is the enforcer's own verdict: with DENY nobody is asked, as no answer could be heeded. ``own`` is
        the same with a rule and a reason, and counts where it is harder than
        all others', or refuses as they do. ``following`` is what was decided on the same
        attempt where another enforcer saw it before: what a person has allowed there is not asked again by the same
        rules. One more rule that asks is another question.

        Returns what waits, if anything does, for an answer or for its record to be safe; an enforcer whose caller is
        gone withdraws it, and ``decided`` is not called any more. A question that is withdrawn is recorded as a denial.
        """
        decider, opinion = self._combine(action)
        if opinion.verdict < at_least:
            opinion = Opinion(at_least, "syscalls", _refusal(action), opinion.advice)
        if own is not None and own.verdict >= max(opinion.verdict, Verdict.DENY):
            decider, opinion = "enforcer", own  # it knows better what is wrong
        elif own is not None and own.verdict > opinion.verdict:
            decider, opinion = "enforcer", own
        if opinion.verdict is Verdict.ASK and following is not None and _is_answered(following, action, opinion):
            opinion = Opinion(Verdict.ALLOW, opinion.rule, following.reason, asked=opinion.asked)
            decider = following.decider
        if opinion.verdict is Verdict.ASK:
            try:
                grant = self._autonomy.grants(action, opinion)
            except Exception:
                grant = ""
            if not grant:
                return _Question(self, action, decider, opinion, decided).file(self._approvals)
            opinion, decider = Opinion(Verdict.ALLOW, grant, opinion.reason), "autonomy"
        return self.release(self.settle(action, opinion, decider), decided)

    def foresee(self, action: Action) -> Verdict:
        """What the policy says of an action. Nothing is recorded, and nobody asked: for an enforcer that must prepare
        what it asks about, and then does ask. Other parts may remember what they are asked."""
        return _judgement(self._policy, action, "policy").verdict

    def repeater(self, action: Action) -> Callable[[], bool] | None:
        """A short way for what is refused again and again: has the refusal of just this action counted once more, and
        returns whether that was all that there was to decide.

        None where there is no such way: the action is not one of a flood that is only counted, or not the policy alone
        decides, whose verdict on an action is always the same.
        """
        if self._others or not isinstance(self._sink, Aggregator):
            return None
        repeat = self._sink.repeater(action)
        if repeat is None:
            return None

        def repeated() -> bool:
            with self._lock:
                number = self._number + 1
                if not repeat(number):
                    return False
                self._number = number
                return True

        return repeated

    async def decide(self, action: Action, *, own: Opinion | None = None) -> Decision:
        """The same for asyncio. A caller that is cancelled withdraws the question."""
        import asyncio  # longer to load than a sandbox to start, and `corral run` does without

        loop = asyncio.get_running_loop()
        outcome: asyncio.Future[Decision] = loop.create_future()

        def tell(decision: Decision) -> None:
            if not outcome.done():
                outcome.set_result(decision)

        def decided(decision: Decision) -> None:
            loop.call_soon_threadsafe(tell, decision)

        held = self.submit(action, decided, own=own)
        try:
            return await outcome
        finally:
            if held is not None:
                held.withdraw()

    def _combine(self, action: Action) -> tuple[str, Opinion]:
        """The hardest opinion, and whose it is; of several that ask the first, with what all of them ask."""
        decider, standing = "policy", _judgement(self._policy, action, "policy")
        for name, judge in self._others:
            opinion = _judgement(judge, action, name)
            if opinion.verdict > standing.verdict:
                decider, standing = name, opinion
            elif opinion.verdict is standing.verdict is Verdict.ASK:
                standing = replace(standing, asked=(*_asked(standing), *_asked(opinion)))
        return decider, standing

    def settle(
        self, action: Action, opinion: Opinion, decider: str, *, held: float = 0.0, answered_by: str = ""
    ) -> Decision:
        """Numbers and records what is final. A verdict is worth nothing before its record is written."""
        with self._lock:
            self._number += 1
            decision = Decision(
                action,
                opinion.verdict,
                opinion.rule,
                opinion.reason,
                opinion.advice,
                decider,
                self._number,
                time.time(),
                opinion.private,
                1,
                held,
                answered_by,
                opinion.asked,
            )
            try:
                self._sink.write(decision)
            except Exception as error:
                return self.unsafe(decision, error)
        if decision.verdict is Verdict.KILL:
            self._on_kill(f"{action.name}: {opinion.reason or opinion.rule}")
        return decision

    def release(self, decision: Decision, decided: Callable[[Decision], None]) -> Held | None:
        """Tells the enforcer: of a refusal at once, of what may have an effect when its record is safe (I3). For a
        person's yes that is waited for whatever the kind: who allowed it must not be lost."""
        waiting = [each for each in self._ledgers if decision.held or decision.action.kind not in each.unawaited]
        if not waiting or decision.verdict is not Verdict.ALLOW:
            decided(decision)
            return None
        return _Unsafe(self, decision, decided).wait(waiting)

    def unsafe(self, decision: Decision, error: Exception) -> Decision:
        """Ends the sandbox, and what it is told instead."""
        self._on_kill(unwritable(error))
        return replace(decision, verdict=Verdict.KILL, rule="record", reason="it cannot be recorded")


def _is_answered(earlier: Decision, action: Action, opinion: Opinion) -> bool:
    """Whether all that ask here did so where a person has answered already (I6)."""
    same = _who(earlier.action.origin) == _who(action.origin) and set(_asked(opinion)) <= set(_asked(earlier))
    return same and earlier.allowed and earlier.decider == "approvals"


def _who(origin: Origin) -> Origin:
    """Who it is, in whichever step: a connection may live through several."""
    return replace(origin, step=0, tool="", unexplained=False)


def _asked(question: Opinion | Decision) -> tuple[str, ...]:
    return question.asked or (question.rule,)


def _refusal(action: Action) -> str:
    subject = action.subject
    why = f": {subject.reason}" if isinstance(subject, KernelCall) and subject.reason else ""
    return f"{action} is refused here{why}."


def _judgement(judge: Callable[[Action], Opinion], action: Action, name: str) -> Opinion:
    try:
        return judge(action)
    except Exception as error:
        return Opinion(Verdict.DENY, f"{name} failed", f"{_FAULT} ({type(error).__name__})")


class _Unsafe:
    """An action that is allowed and waits for its record to be safe."""

    def __init__(self, monitor: Monitor, decision: Decision, decided: Callable[[Decision], None]) -> None:
        self._monitor, self._decision = monitor, decision
        self._decided: Callable[[Decision], None] | None = decided
        self._lock = threading.Lock()
        self._left = 0
        self._error: Exception | None = None

    def wait(self, ledgers: Sequence[Ledger]) -> Held | None:
        """Itself, or None where nothing was to be waited for."""
        self._left = len(ledgers)
        for ledger in ledgers:
            ledger.when_safe(self._safe)
        return self if self._left else None

    def _safe(self, error: Exception | None) -> None:
        with self._lock:
            self._left -= 1
            self._error = self._error or error
            if self._left:
                return
            decided, self._decided = self._decided, None
        decision = self._decision if self._error is None else self._monitor.unsafe(self._decision, self._error)
        if decided is not None:
            decided(decision)

    def withdraw(self) -> None:
        """Whoever waited is gone. That it was allowed stands in the record; nothing came of it."""
        with self._lock:
            self._decided = None


class _Question:
    """An action that waits for an answer."""

    def __init__(
        self, monitor: Monitor, action: Action, decider: str, opinion: Opinion, decided: Callable[[Decision], None]
    ) -> None:
        self._monitor, self._action, self._decider, self._opinion = monitor, action, decider, opinion
        self._decided = decided
        self._since = time.monotonic()
        self._filing = 0
        """The thread that asks, while it does: what answers it by then has held nobody up."""
        self._lock = threading.Lock()
        self._open = True
        self._filed: Held | None = None
        self._released: Held | None = None
        """What waits for the record of the answer."""
        self._withdrawn = False

    def file(self, approvals: Approvals) -> Held | None:
        """What waits: itself, or the record of an answer that was there at once, or None."""
        self._filing = threading.get_ident()
        try:
            filed = approvals.ask(self._action, self._opinion, self._answered)
        except Exception as error:
            self._answered(Answer(Verdict.DENY, "monitor", f"it could not be asked ({type(error).__name__})"))
            return None  # a refusal waits for nothing
        finally:
            self._filing = 0
        with self._lock:
            if not self._open:
                return self._released
            self._filed = filed
        return self

    def _close(self) -> tuple[bool, Held | None]:
        """Whether it was open, and what was filed. That refers to this, so it is let go of: what waits for the answer
        has descriptors, which must not wait for the collector of garbage."""
        with self._lock:
            was_open, self._open = self._open, False
            filed, self._filed = self._filed, None
        return was_open, filed

    def _answered(self, answer: Answer) -> None:
        was_open, _ = self._close()
        if was_open:
            verdict = answer.verdict if answer.verdict in (Verdict.ALLOW, Verdict.KILL) else Verdict.DENY
            released = self._monitor.release(self._settle(verdict, answer.reason, answer.by), self._decided)
            with self._lock:
                self._released = released
                withdrawn = self._withdrawn
            if withdrawn and released is not None:
                released.withdraw()

    def _settle(self, verdict: Verdict, reason: str, by: str) -> Decision:
        opinion = replace(self._opinion, verdict=verdict, reason=reason or self._opinion.reason)
        # Equal refusals that took no time are counted (records.py), by whomever they are.
        held = 0.0 if self._filing == threading.get_ident() else time.monotonic() - self._since
        return self._monitor.settle(self._action, opinion, "approvals", held=held, answered_by=by)

    def withdraw(self) -> None:
        was_open, filed = self._close()
        if was_open:
            if filed is not None:
                filed.withdraw()
            self._settle(Verdict.DENY, "whoever tried it was gone before the answer", "nobody")
            return
        with self._lock:
            self._withdrawn, released = True, self._released
        if released is not None:
            released.withdraw()
