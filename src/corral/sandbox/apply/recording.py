"""What is decided about files outside, and what comes of it, in the logs of the runs whose changes they are.

    chronicle ──▶ decide    policy, risks, cosignatures, a person's answer: durable before anything is done
        └──────▶ tell       what came of it: before its traces are removed, so that a crash leaves it to the next start

The session that was recorded may be over, or go on, so this is one of its own. Its records have the sandbox's id, and
the origin of the decision is the session that was.
"""

from __future__ import annotations

import os
import threading
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Protocol

from corral.actions import Action, Decision, Kind, Opinion, Origin, Verb, Verdict
from corral.errors import CorralError, RequestError
from corral.log.events import ApplyEnded, Outcome, SessionEnded, SessionStarted
from corral.log.note import NoteError, parse_verifier
from corral.log.ocsf import Context
from corral.log.places import open_log
from corral.log.signing import read_keys
from corral.log.sink import SessionLog
from corral.log.writer import Log
from corral.monitor.core import Monitor
from corral.monitor.parts import Answer, Held, Neutral
from corral.monitor.records import Several
from corral.policy.model import Apply, Policy
from corral.policy.part import PolicyPart
from corral.sandbox.apply.journal import Journal, Phase
from corral.sandbox.apply.terms import Terms
from corral.sandbox.peers import Peer
from corral.sandbox.prepare import new_id
from corral.version import VERSION

Consent = Callable[[Opinion], Answer]
"""Asks a person; the opinion says who wants it asked, and why."""


class Tell(Protocol):
    """Records what came of an apply, durably. Raises CorralError."""

    def __call__(self, journal: Journal, outcome: Outcome, error: str = "") -> None: ...


@dataclass(frozen=True, slots=True)
class Act:
    """What is to be done to a workspace."""

    kind: Kind
    source: str
    workspace: str
    digest: str
    paths: tuple[str, ...] = ()
    target: str = ""
    """Where it goes, if not into the files of the workspace."""


@dataclass(frozen=True, slots=True)
class _Book:
    """A log, and for which terms it is."""

    log: Log
    terms: Terms


class Chronicle:
    """Records of one act. Made by :func:`chronicle`."""

    def __init__(self, act: Act, terms: Sequence[Terms], books: Sequence[_Book], lacking: str) -> None:
        self._act = act
        self._origin = Origin(terms[-1].sandbox, terms[-1].sandbox) if terms else Origin("", "")
        self._lacking, self._has_ended = lacking, False
        self._sessions = [_session(book) for book in books]
        self.terms = tuple(
            replace(book.terms, log=os.path.abspath(book.log.directory), origin=book.log.origin) for book in books
        )
        """Those of its logs, by which they are found again."""
        label = f"{act.kind.value} {act.source}"
        for session, book in zip(self._sessions, books, strict=True):
            session.record(SessionStarted(act.workspace, label, book.terms.policy))

    def decide(self, demands: Apply, risks: str, consent: Consent) -> None:
        """Decides whether it may be done, and records that. ``risks`` is why a person must look at it, if he must.

        Raises RequestError where it may not, CorralError where it cannot be recorded.
        """
        act, ended = self._act, ["it cannot be recorded"]
        own = None
        if self._lacking:
            own = Opinion(Verdict.DENY, "apply.cosignatures", self._lacking)
        monitor = Monitor(
            policy=PolicyPart(Policy(apply=demands)),
            sink=Several(*self._sessions),
            risk=_Risks(risks) if risks else None,
            approvals=_Person(consent),
            on_kill=lambda reason: ended.insert(0, reason),
            ledgers=self._sessions,
        )
        outcome: list[Decision] = []
        said = threading.Event()

        def decided(decision: Decision) -> None:
            outcome.append(decision)
            said.set()

        monitor.submit(
            Action(act.kind, Verb(act.paths, act.source, act.digest, act.target), self._origin), decided, own=own
        )
        said.wait()
        if outcome[0].verdict is Verdict.KILL:
            raise CorralError(f"not applied: {ended[0]}")
        if not outcome[0].allowed:
            raise RequestError(outcome[0].reason)

    def tell(self, journal: Journal, outcome: Outcome, error: str = "") -> None:
        """As :class:`Tell`."""
        self.ended(journal.id, outcome, error)

    def ended(self, apply: str, outcome: Outcome, error: str = "") -> None:
        """Records what came of it, durably. Raises LogUnwritable."""
        act = self._act
        for session in self._sessions:
            session.record(ApplyEnded(apply, act.source, act.digest, act.workspace, outcome, error))
            _wait(session)
        self._has_ended = True

    def close(self) -> None:
        """Raises CorralError."""
        try:
            for session in self._sessions:
                session.record(SessionEnded("done"))
                session.close()
        except CorralError as error:
            raise self._unclosed(error) from None

    def close_log(self, log: Log) -> None:
        """Closes one that was opened for this. Raises CorralError."""
        try:
            log.close()
        except CorralError as error:
            raise self._unclosed(error) from None

    def _unclosed(self, error: CorralError) -> CorralError:
        return CorralError(f"it is done and recorded, and then: {error}") if self._has_ended else error


@contextmanager
def chronicle(
    act: Act,
    terms: Sequence[Terms],
    log: Log | Path | None = None,
    *,
    cosigned: Sequence[Apply] | None = None,
) -> Iterator[Chronicle]:
    """Opens the logs of some terms. ``log`` is one of them that is open already, or lies elsewhere now, or a further
    one. With ``cosigned`` the terms' demands of cosignatures count, and these, too.

    Raises CorralError where one is not there, or cannot be written.
    """
    opened: list[Log] = []
    """Which are closed here."""
    try:
        books = _books(terms, log, opened)
        lacking = "" if cosigned is None else _lacking(terms, books, cosigned)
        records = Chronicle(act, terms, books, lacking)
        try:
            yield records
        except BaseException:
            with suppress(CorralError):  # what went wrong is told, not what that led to
                records.close()
            raise
        records.close()
    except BaseException:
        for each in opened:
            with suppress(CorralError):
                each.close()
        raise
    for each in opened:
        records.close_log(each)


def told(journal: Journal, outcome: Outcome, error: str = "") -> None:
    """As :class:`Tell`, for what another process has begun."""
    if not journal.terms:
        return
    kind = Kind.SANDBOX_UNDO if journal.undoes else Kind.SANDBOX_APPLY
    act = Act(kind, journal.undoes or journal.layer, journal.workspace, journal.digest)
    with chronicle(act, journal.terms) as records:
        records.tell(journal, outcome, error)


def outcome_of(journal: Journal) -> Outcome:
    """What came of it, as far as it is done, and what is not is taken back."""
    if journal.phase is not Phase.DONE:
        return Outcome.ROLLED_BACK
    return Outcome.UNDONE if journal.undoes else Outcome.APPLIED


def consent_by_hash(given: str, wanted: str) -> Consent:
    """The consent of whoever has seen a proposal and passes its hash."""

    def consent(opinion: Opinion) -> Answer:
        if given != wanted:
            why = "the consent is for another proposal than this; look at what would be applied now"
            return Answer(Verdict.DENY, whoever(), why)
        return Answer(Verdict.ALLOW, whoever(), "by the hash of exactly this")

    return consent


def whoever() -> str:
    """Who runs this process."""
    return str(Peer(os.getpid(), os.geteuid()))


class _Person:
    """The approvals of one question."""

    def __init__(self, consent: Consent) -> None:
        self._consent = consent

    def ask(self, action: Action, opinion: Opinion, answered: Callable[[Answer], None]) -> Held:
        answered(self._consent(opinion))
        return _Answered()


class _Answered:
    def withdraw(self) -> None:
        pass


class _Risks(Neutral):
    """What must be looked at, by itself."""

    def __init__(self, why: str) -> None:
        self._opinion = Opinion(Verdict.ASK, "risks", why)

    def judge(self, action: Action) -> Opinion:
        return self._opinion


def _session(book: _Book) -> SessionLog:
    terms = book.terms
    name, version = terms.agent, terms.version
    return SessionLog(
        book.log, Context(name, version, name, terms.policy_hash, new_id(), terms.sandbox, product_version=VERSION)
    )


def _books(terms: Sequence[Terms], log: Log | Path | None, opened: list[Log]) -> list[_Book]:
    if isinstance(log, Path):
        log = open_log(log)
        opened.append(log)
    latest: dict[str, Terms] = {}
    for each in terms:  # a log that several runs share is told of the last of them
        if each.log:
            latest.pop(each.origin, None)
            latest[each.origin] = each
    books = []
    for origin, each in latest.items():
        if log is not None and log.origin == origin:
            books.append(_Book(log, each))
        else:
            opened.append(_kept(each))
            books.append(_Book(opened[-1], each))
    if log is not None and log.origin not in latest and terms:
        books.append(_Book(log, terms[-1]))
    return books


def _kept(terms: Terms) -> Log:
    """Opens the log of a run, and never another in its place. Raises CorralError."""
    directory = Path(terms.log)
    keys = read_keys(directory)
    if not keys or keys[-1].name != terms.origin:
        raise CorralError(
            f"{terms.log}: the log in which the run was recorded ({terms.origin}) is not there, and nothing is done "
            "that is not recorded; name where it is now with --log"
        )
    return open_log(directory)


def _lacking(terms: Sequence[Terms], books: Sequence[_Book], more: Sequence[Apply]) -> str:
    """What is wrong with the cosignatures, if anything is."""
    wanted = [(each.apply, [book for book in books if book.log.origin == each.origin]) for each in terms]
    wanted += [(each, list(books)) for each in more]
    for apply, own in wanted:
        if not apply.cosignatures:
            continue
        if not own:
            return (
                f"policy wants {apply.cosignatures} cosignatures of the log (apply.cosignatures), and the run was "
                "recorded in none: run it with --log"
            )
        for book in own:
            if problem := _uncosigned(book.log, apply):
                return problem
    return ""


def _uncosigned(log: Log, apply: Apply) -> str:
    from corral.log.cosigning import require_cosigned  # loads http.client

    try:
        log.seal()  # what is not under a checkpoint yet has no cosignature
        witnesses = [parse_verifier(each) for each in apply.witnesses]
        require_cosigned(log.directory, read_keys(log.directory), witnesses, apply.cosignatures)
    except NoteError as error:
        return (
            f"{log.directory}: {error} before anything is applied (apply.cosignatures of the policy): run `corral log "
            "cosign --log DIR --witness URL=KEY`, when nothing else writes to this log, and apply then"
        )
    return ""


def _wait(session: SessionLog) -> None:
    problems: list[Exception | None] = []
    said = threading.Event()

    def safe(error: Exception | None) -> None:
        problems.append(error)
        said.set()

    session.when_safe(safe)
    said.wait()
    if problems[0] is not None:
        raise problems[0]
