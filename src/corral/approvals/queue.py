"""What a sandbox has asked and nobody has answered yet.

A :class:`Queue` fills the monitor's approvals slot for one sandbox. Questions live in memory only, because the calls
that wait for them do too: they end with the process that controls the sandbox. Every way out but a person's yes is a
denial: no answer in time, too many questions, the end of the sandbox.
"""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Hashable, Sequence
from dataclasses import dataclass
from enum import Enum
from itertools import islice
from typing import Protocol, runtime_checkable

from corral.actions import Action, Meaning, Opinion, Program, Query, Request, Verdict
from corral.errors import RequestError
from corral.monitor.parts import Answer, Held
from corral.monitor.records import unwritable

MAX_HELD = 10_000
"""Questions of one sandbox that may wait at the same time; what comes on top is denied."""
MAX_GRANTS = 1000
"""Answers for a session that one sandbox can have."""
MAX_REASON = 1000
"""Characters of a person's reason."""
_REMEMBERED = 1024
"""Questions that are over for which it can still be said how they ended."""
_LONGEST_WAIT = 3600.0
_UNREADABLE = "\ufffd"  # stands for bytes that are no text: others would look the same


class Scope(Enum):
    """What an answer is for."""

    ONCE = "once"
    """This question."""
    SESSION = "session"
    """Every action of the same kind, with an equal subject, for which the same rule of the session asks."""


@dataclass(frozen=True, slots=True)
class Question:
    """One action that is held."""

    number: int
    """In its sandbox, from 1; never used again."""
    action: Action
    opinion: Opinion
    """Why it is asked."""
    asked_at: float
    """Seconds since the epoch."""
    deadline: float
    """On the monotonic clock: an answer must come before."""


@dataclass(frozen=True, slots=True)
class Outcome:
    """What an answer has done."""

    question: Question
    answered: int
    """Questions that it answered: more than one where equal ones waited and the answer is for the session."""


class Ending(Enum):
    """How a question came to its end."""

    ANSWERED = "answered"
    TIMED_OUT = "timed_out"
    """Nobody answered in time."""
    WITHDRAWN = "withdrawn"
    """Whoever tried it was gone before the answer."""
    CLOSED = "closed"
    """Its sandbox ended before the answer."""


@dataclass(frozen=True, slots=True)
class Ended:
    """A question that has come to its end."""

    question: Question
    ending: Ending
    answer: Answer
    """What its caller is told; nobody's, and no, where it was not answered."""
    scope: Scope
    through: int
    """The number of the question that was answered: its own, or that of an equal one, where the answer was for the
    session."""
    timeout: float
    """Seconds within which it was to be answered."""
    at: float
    """Seconds since the epoch."""


@runtime_checkable
class Register(Protocol):
    """Takes how questions ended, for good."""

    def question_ended(self, ended: Ended) -> None:
        """Called before the caller is told. Raises where it cannot be recorded; the sandbox then ends, and a yes is a
        no."""


class _Filed:
    """A question with whom to tell."""

    __slots__ = ("_queue", "answered", "question")

    def __init__(self, queue: Queue, question: Question, answered: Callable[[Answer], None]) -> None:
        self._queue, self.question, self.answered = queue, question, answered

    def withdraw(self) -> None:
        self._queue._end(self.question.number, "whoever tried it was gone before the answer")


class _Settled:
    """A question that had its answer before it could wait."""

    def withdraw(self) -> None:
        pass


def _likeness(action: Action, opinion: Opinion) -> Hashable:
    """What an answer for the session covers. The rule belongs to it: who asks for another reason asks anew."""
    return action.origin.session, action.kind, action.subject, opinion.rule


def _is_known(program: Program) -> bool:
    """Whether all that runs is told by content, so that nothing else is like it."""
    return bool(program.digest and (program.interpreter_digest or not program.interpreter))


class Queue:
    """The questions of one sandbox. May be used from several threads.

    ``timeout`` is in seconds. ``kill`` ends the sandbox, from any thread: called when an answer cannot be told to the
    one who waits for it. ``on_change`` is called, from any thread and without arguments, whenever the queue may have
    become empty or is no longer empty; whoever freezes the sandbox while something is held compares :attr:`held` then.
    ``registers`` are told of each question that has ended before its caller is, by the same thread.
    """

    def __init__(
        self,
        timeout: float,
        *,
        kill: Callable[[str], None],
        on_change: Callable[[], None] = lambda: None,
        limit: int = MAX_HELD,
        registers: Sequence[Register] = (),
    ) -> None:
        self._timeout, self._kill, self._on_change, self._limit = timeout, kill, on_change, limit
        self._registers = tuple(registers)
        self._changed = threading.Condition()
        # All wait equally long, so the order of filing is the order of the deadlines.
        self._filed: dict[int, _Filed] = {}
        self._endings: dict[int, str] = {}
        self._grants: dict[Hashable, Answer] = {}
        self._next = 1
        self._watching = False
        self._closed = False

    # ---- the monitor's side ----

    def ask(self, action: Action, opinion: Opinion, answered: Callable[[Answer], None]) -> Held:
        """Files a question; see :class:`corral.monitor.parts.Approvals`. Raises RuntimeError where no thread can be
        had that ends it in time; the monitor makes a denial of it."""
        with self._changed:
            at_once = self._grants.get(_likeness(action, opinion)) or self._refusal()
            if at_once is None:
                number, self._next = self._next, self._next + 1
                question = Question(number, action, opinion, time.time(), time.monotonic() + self._timeout)
                filed = self._filed[number] = _Filed(self, question, answered)
                try:
                    self._watch()
                except BaseException:
                    del self._filed[number]
                    raise
                first = len(self._filed) == 1
        if at_once is not None:
            answered(at_once)
            return _Settled()
        if first:
            self._tell_change()
        return filed

    def _refusal(self) -> Answer | None:
        if self._closed:
            return Answer(Verdict.DENY, "nobody", "its sandbox is ending")
        if len(self._filed) >= self._limit:
            return Answer(Verdict.DENY, "nobody", f"{self._limit} actions of this sandbox are held already")
        return None

    # ---- the persons' side ----

    @property
    def held(self) -> int:
        """How many questions wait."""
        return len(self._filed)

    def waiting(self, after: int = 0, limit: int = MAX_HELD) -> tuple[Question, ...]:
        """At most ``limit`` of the questions that wait, oldest first, from the one behind number ``after`` on."""
        with self._changed:
            later = (filed.question for number, filed in self._filed.items() if number > after)
            return tuple(islice(later, limit))

    def answer(self, number: int, verdict: Verdict, by: str, *, scope: Scope = Scope.ONCE, reason: str = "") -> Outcome:
        """Answers a question: ALLOW, DENY or KILL. Raises RequestError where it does not wait (any more), or the
        answer cannot be given, or not be recorded: then it was no."""
        if verdict not in (Verdict.ALLOW, Verdict.DENY, Verdict.KILL):
            raise RequestError(f"{verdict.name.lower()} is no answer")
        if len(reason) > MAX_REASON:
            raise RequestError(f"a reason may have {MAX_REASON} characters; this one has {len(reason)}")
        if scope is Scope.SESSION and verdict is not Verdict.ALLOW:
            raise RequestError("only an approval can be for the session")
        answer = Answer(verdict, by, reason)
        with self._changed:
            filed = self._filed.get(number)
            if filed is None:
                raise RequestError(f"this action is not held: {self._endings.get(number, 'it never was')}")
            if filed.question.deadline <= time.monotonic():
                raise RequestError(f"this action is not held: {_OVERDUE}")
            told = [filed]
            if scope is Scope.SESSION:
                told += self._grant(filed.question, answer)
            for each in told:
                self._forget(each.question.number, f"it was answered ({verdict.name.lower()}) by {by}")
        if not self._tell(told, answer, Ending.ANSWERED, scope=scope, through=number):
            raise RequestError("the answer cannot be recorded, so the action is denied, and its sandbox ends")
        return Outcome(filed.question, len(told))

    def _grant(self, question: Question, answer: Answer) -> list[_Filed]:
        """Remembers an answer for the session; returns the other questions that it answers now."""
        subject = question.action.subject
        if isinstance(subject, Program) and (subject.truncated or _UNREADABLE in "".join(subject.argv)):
            raise RequestError("its arguments are more than what is compared; it can be approved once only")
        if isinstance(subject, Program) and not _is_known(subject):
            raise RequestError("not all of what runs could be read, and may be changed; it can be approved once only")
        if isinstance(subject, Request) and subject.meaning is Meaning.OVERRIDDEN:
            raise RequestError("it names another method or path, which is not compared; it can be approved once only")
        if isinstance(subject, Query) and subject.preview:
            raise RequestError("it changes data, of which the beginning is shown; it can be approved once only")
        if len(self._grants) >= MAX_GRANTS:
            raise RequestError(f"there are {MAX_GRANTS} approvals for the session already; approve it once")
        likeness = _likeness(question.action, question.opinion)
        self._grants[likeness] = answer
        now = time.monotonic()
        others = [filed for filed in self._filed.values() if filed.question is not question]
        alike = [filed for filed in others if _likeness(filed.question.action, filed.question.opinion) == likeness]
        return [filed for filed in alike if filed.question.deadline > now]

    def close(self) -> None:
        """Denies all that waits and all that comes. Called when the sandbox has ended; may be called again."""
        with self._changed:
            self._closed = True
            told = list(self._filed.values())
            for filed in told:
                self._forget(filed.question.number, "its sandbox has ended")
            self._changed.notify_all()
        self._tell(told, Answer(Verdict.DENY, "nobody", "its sandbox has ended"), Ending.CLOSED)

    # ---- ends ----

    def _forget(self, number: int, ending: str) -> None:
        del self._filed[number]
        self._endings[number] = ending
        if len(self._endings) > _REMEMBERED:
            del self._endings[next(iter(self._endings))]

    def _tell(
        self, told: list[_Filed], answer: Answer, ending: Ending, *, scope: Scope = Scope.ONCE, through: int = 0
    ) -> bool:
        """Records that they ended, and tells their callers; returns whether all was recorded. Without the lock: what is
        told may come back with a question."""
        all_recorded = True
        for filed in told:
            is_recorded = self._record(filed.question, answer, ending, scope, through)
            all_recorded = all_recorded and is_recorded
            try:
                filed.answered(answer if is_recorded else _UNRECORDED)
            except Exception as error:  # its caller would sleep for ever
                self._kill(f"an answer could not be told ({type(error).__name__})")
        if told and not self._filed:
            self._tell_change()
        return all_recorded

    def _record(self, question: Question, answer: Answer, ending: Ending, scope: Scope, through: int) -> bool:
        """Whether it is recorded; if it cannot be, the sandbox ends (I3)."""
        ended = Ended(question, ending, answer, scope, through or question.number, self._timeout, time.time())
        try:
            for register in self._registers:
                register.question_ended(ended)
        except Exception as error:
            self._kill(unwritable(error))
            return False
        return True

    def _tell_change(self) -> None:
        try:
            self._on_change()
        except Exception as error:  # it would stay frozen, or go on
            self._kill(f"it could not be told whether actions are held ({type(error).__name__})")

    def _end(self, number: int, ending: str) -> None:
        """It was withdrawn."""
        with self._changed:
            filed = self._filed.get(number)
            if filed is None:
                return
            self._forget(number, ending)
            empty = not self._filed
        self._record(filed.question, Answer(Verdict.DENY, "nobody", ending), Ending.WITHDRAWN, Scope.ONCE, number)
        if empty:
            self._tell_change()

    # ---- time ----

    def _watch(self) -> None:
        """Sees to it that there is a thread as long as something waits. A sandbox that never asks never has one."""
        if not self._watching:
            threading.Thread(target=self._end_overdue, name="corral-approvals", daemon=True).start()
            self._watching = True

    def _end_overdue(self) -> None:
        while (overdue := self._wait_overdue()) is not None:
            answer = Answer(Verdict.DENY, "nobody", f"nobody answered within {self._timeout:g} s")
            self._tell(overdue, answer, Ending.TIMED_OUT)

    def _wait_overdue(self) -> list[_Filed] | None:
        """Waits for the next deadline, and returns what is over; None where nothing waits, which ends the thread."""
        with self._changed:
            if not self._filed:
                self._watching = False
                return None
            first = next(iter(self._filed.values())).question.deadline
            self._changed.wait(min(max(0.0, first - time.monotonic()), _LONGEST_WAIT))
            now = time.monotonic()
            overdue = [filed for filed in self._filed.values() if filed.question.deadline <= now]
            for filed in overdue:
                self._forget(filed.question.number, _OVERDUE)
            return overdue


_OVERDUE = "nobody answered in time, which means no"
_UNRECORDED = Answer(Verdict.DENY, "nobody", "the answer cannot be recorded")
