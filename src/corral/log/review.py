"""The review of a period: what the agents did in it that they had not done before, and where it was close.

One pass over the log from its beginning, because "new" means that nothing before the period was like it. Everything
kept is bounded, as agents decide how much there is to keep; where a bound was reached, the digest says so in its notes.

*New destinations* are those that something was let out to: allowed connections, datagrams, requests and flows that left
the sandbox. *New models, sources and services* are those that a broker was used for. *New binaries* are programs that
were allowed to run, by path and content: one that was replaced is new again. *Near misses* are actions that came down
to a person's answer or to the end of the sandbox. *Sessions unlike the rest* are compared with all sessions of the same
agent up to the end of the period (:mod:`corral.log.outliers` says what that is worth).
"""

from __future__ import annotations

from collections import Counter, deque
from collections.abc import Iterable
from ipaddress import ip_address

from corral.actions import Decision, Endpoint, Flow, Kind, Origin, Program, Request, Transport, Used, Verdict
from corral.actions import Ending as CallEnding
from corral.approvals.queue import Ending
from corral.errors import RequestError
from corral.log.digest import (
    AgentSummary,
    Answered,
    Denial,
    Digest,
    Miss,
    NearMiss,
    Novelty,
    Outlier,
    PolicyChange,
    Trouble,
)
from corral.log.events import Approval, KeyRotated, LogRecovered, PayloadErased, PayloadLost, PolicyChanged
from corral.log.frequent import Frequent
from corral.log.items import shown_line
from corral.log.narration import MICROSECONDS, item_of
from corral.log.outliers import FEWEST, THRESHOLD, scores
from corral.log.records import Record
from corral.log.spending import Spent

TOP = 20
"""Rows of a table."""
MAX_KNOWN = 200_000
"""Destinations, and binaries, that are remembered of all agents together."""
MAX_SESSIONS = 50_000
MAX_AGENTS = 1000
MAX_DISTINCT = 1_000_000
"""Different destinations and binaries of each session that are told apart, of all sessions together."""
_SUBJECT = 160
_CHANGES = 10
"""Lines of what is different in a policy."""
_OUTWARD = frozenset({Kind.NET_CONNECT, Kind.NET_SEND, Kind.HTTP_REQUEST})


MEASURES = (
    *("actions", "refusals", "questions", "destinations", "binaries", "bytes out", "seconds"),
    *("tokens", "unexplained"),
)


class _Session:
    """Counts of one session."""

    __slots__ = ("actions", "agent", "binaries", "bytes", "destinations", "first", "in_period", "last", "questions",
                 "refusals", "sequence", "tokens", "unexplained")  # fmt: skip

    def __init__(self, agent: str, at: float) -> None:
        self.agent = agent
        self.actions = self.refusals = self.questions = self.bytes = self.sequence = 0
        self.tokens = self.unexplained = 0
        self.destinations: set[str] = set()
        self.binaries: set[str] = set()
        self.first = self.last = at
        self.in_period = False

    def measures(self) -> tuple[float, ...]:
        return (
            self.actions,
            self.refusals,
            self.questions,
            len(self.destinations),
            len(self.binaries),
            self.bytes,
            self.last - self.first,
            self.tokens,
            self.unexplained,
        )


class _Known:
    """What each agent has used, and what of it is new."""

    def __init__(self, top: int) -> None:
        self._top = top
        self._seen: dict[tuple[str, str], list[int | float]] = {}
        """By agent and thing: number and time of its first record, or -1 where that was before; and the count."""
        self.is_full = False

    def use(self, agent: str, what: str, number: int, at: float, *, is_before: bool) -> None:
        entry = self._seen.get((agent, what))
        if entry is None:
            if len(self._seen) >= MAX_KNOWN:
                self.is_full = True
                return
            entry = self._seen[agent, what] = [-1 if is_before else number, at, 0]
        if not is_before:
            entry[2] += 1

    def new(self) -> dict[str, list[Novelty]]:
        """By agent, in the order in which they came."""
        found: dict[str, list[Novelty]] = {}
        for (agent, what), (number, at, count) in self._seen.items():
            if number >= 0:
                found.setdefault(agent, []).append(Novelty(agent, what, int(number), at, int(count)))
        return found


def review(records: Iterable[tuple[int, Record]], since: float, until: float, *, top: int = TOP) -> Digest:
    """The digest of the records with a time in ``[since, until)``, in seconds since the epoch.

    ``records`` are those of the whole log, in its order, each with its number. Raises RequestError for a period without
    a length, and what taking a record raises.
    """
    if not since < until:
        raise RequestError("a period ends after it begins")
    reviewer = _Reviewer(since, until, top)
    for number, record in records:
        reviewer.take(number, record)
    return reviewer.digest()


class _Reviewer:
    def __init__(self, since: float, until: float, top: int) -> None:
        self._since, self._until, self._top = since, until, top
        self._records = self._before = 0
        self._destinations, self._binaries, self._sources = _Known(top), _Known(top), _Known(top)
        self._spent: dict[str, Spent] = {}
        self._sessions: dict[str, _Session] = {}
        self._agents: set[str] = set()
        self._verdicts: dict[str, Counter[Verdict]] = {}
        self._denials: Frequent[tuple[str, str, str]] = Frequent()
        self._misses: Counter[Miss] = Counter()
        self._latest: dict[Miss, deque[NearMiss]] = {miss: deque(maxlen=top) for miss in Miss}
        self._answers: deque[Answered] = deque(maxlen=top)
        self._policy_changes: deque[PolicyChange] = deque(maxlen=top)
        self._answer_count = self._policy_change_count = 0
        self._troubles: deque[Trouble] = deque(maxlen=top)
        self._trouble_count = 0
        self._room = MAX_DISTINCT
        self._left_out = 0
        """Records of sessions or agents beyond the bounds."""

    # ---- taking ----

    def take(self, number: int, record: Record) -> None:
        at = record.at / MICROSECONDS
        if at >= self._until:
            return
        is_before = at < self._since
        self._before += is_before
        self._records += not is_before
        event = record.event
        if isinstance(event, LogRecovered | KeyRotated | PayloadErased | PayloadLost) and not is_before:
            self._trouble(number, at, item_of(number, record, 0.0).line)
        if not record.context.session:  # of the log itself
            return
        agent = shown_line(f"{record.context.agent} {record.context.agent_version}".strip(), _SUBJECT)
        session = self._session(agent, record.context.session, at, is_before=is_before)
        if session is None:
            self._left_out += 1
            return
        self._follow(session, number, record, at, is_before=is_before)
        if isinstance(event, Flow):
            session.bytes += event.bytes_up
            self._reached(agent, session, event.endpoint, number, at, is_before=is_before)
        elif isinstance(event, Used):
            session.tokens += event.input_tokens + event.output_tokens
            what = f"{event.kind.value} {_short(f'{event.name} of {event.source}')}"
            if event.kind is not Kind.MODEL_CALL:
                what = f"{event.kind.value} {_short(event.source)}"
            if event.ending is not CallEnding.REFUSED:
                self._sources.use(agent, what, number, at, is_before=is_before)
            if not is_before:
                self._spent.setdefault(agent, Spent()).take(event)
        elif isinstance(event, Decision):
            self._explained(agent, session, event.action.origin, event.count, is_before=is_before)
            session.actions += event.count
            session.refusals += event.count * (not event.allowed)
            session.questions += event.decider == "approvals"
            if event.allowed:
                self._allowed(agent, session, event, number, at, is_before=is_before)
            if not is_before:
                self._decided(agent, record.context.session, event, number, at)
        elif isinstance(event, Approval | PolicyChanged) and not is_before:
            self._by_persons(agent, shown_line(record.context.session), event, number, at)

    def _explained(self, agent: str, session: _Session, origin: Origin, count: int, *, is_before: bool) -> None:
        if origin.unexplained:
            session.unexplained += count
            if not is_before:
                self._spent.setdefault(agent, Spent()).unexplained += count

    def _follow(self, session: _Session, number: int, record: Record, at: float, *, is_before: bool) -> None:
        """A session's records are numbered without gaps."""
        expected, session.sequence = session.sequence + 1, record.sequence
        if record.sequence != expected and not is_before:
            name = shown_line(record.context.session, 80)
            self._trouble(number, at, f"session {name}: record {record.sequence} follows {expected - 1}")

    def _session(self, agent: str, name: str, at: float, *, is_before: bool) -> _Session | None:
        session = self._sessions.get(name)
        if session is None:
            if len(self._sessions) >= MAX_SESSIONS or (agent not in self._agents and len(self._agents) >= MAX_AGENTS):
                return None
            self._agents.add(agent)
            session = self._sessions[name] = _Session(agent, at)
        session.first, session.last = min(session.first, at), max(session.last, at)
        session.in_period = session.in_period or not is_before
        return session

    def _allowed(
        self, agent: str, session: _Session, decision: Decision, number: int, at: float, *, is_before: bool
    ) -> None:
        subject = decision.action.subject
        if decision.action.kind in _OUTWARD and isinstance(subject, Endpoint | Request):
            endpoint = subject.endpoint if isinstance(subject, Request) else subject
            self._reached(agent, session, endpoint, number, at, is_before=is_before)
        elif isinstance(subject, Program):
            content = f"sha256 {subject.digest[:16]}" if subject.digest else "content not read"
            what = f"{_short(subject.path)} ({content})"
            self._add(session.binaries, what)
            self._binaries.use(agent, what, number, at, is_before=is_before)

    def _reached(
        self, agent: str, session: _Session, endpoint: Endpoint, number: int, at: float, *, is_before: bool
    ) -> None:
        if _is_inside(endpoint):
            return
        what = f"{endpoint.transport.value} {_short(str(endpoint))}"
        self._add(session.destinations, what)
        self._destinations.use(agent, what, number, at, is_before=is_before)

    def _add(self, found: set[str], what: str) -> None:
        if what not in found and self._room:
            found.add(what)
            self._room -= 1

    def _decided(self, agent: str, session: str, decision: Decision, number: int, at: float) -> None:
        self._verdicts.setdefault(agent, Counter())[decision.verdict] += decision.count
        what = _short(str(decision.action))
        if not decision.allowed:
            self._denials.add((agent, shown_line(decision.rule), what), decision.count)
        why = _miss(decision)
        if why is not None:
            self._misses[why] += 1
            by = decision.answered_by if decision.decider == "approvals" else ""
            self._latest[why].append(
                NearMiss(why, agent, shown_line(session), what, shown_line(decision.rule), shown_line(by), number, at)
            )

    def _by_persons(self, agent: str, session: str, event: Approval | PolicyChanged, number: int, at: float) -> None:
        by = shown_line(event.by, _SUBJECT)
        if isinstance(event, Approval):
            outcome = event.ending.value.replace("_", " ")
            if event.ending is Ending.ANSWERED:
                outcome = f"{event.verdict.name.lower()}, {event.scope.value}"
            waited = max(0.0, event.ended_at - event.asked_at)
            self._answer_count += 1
            self._answers.append(Answered(agent, session, _short(event.target), outcome, by, waited, number, at))
        else:
            old, new = shown_line(event.old, _SUBJECT), shown_line(event.new, _SUBJECT)
            changes = tuple(map(_short, event.changes[:_CHANGES]))
            if len(event.changes) > _CHANGES:
                changes = (*changes, f"and {len(event.changes) - _CHANGES} more")
            self._policy_change_count += 1
            self._policy_changes.append(PolicyChange(agent, session, by, old, new, changes, number, at))

    def _trouble(self, number: int, at: float, what: str) -> None:
        self._trouble_count += 1
        self._troubles.append(Trouble(number, at, what))

    # ---- the digest ----

    def digest(self) -> Digest:
        near = [miss for why in (Miss.KILLED, Miss.DENIED, Miss.UNANSWERED, Miss.ALLOWED) for miss in self._latest[why]]
        denials = tuple(Denial(*what, count) for what, count in self._denials.top(self._top))
        return Digest(
            self._since,
            self._until,
            self._records,
            self._before,
            self._summaries(),
            denials,
            tuple((miss, self._misses[miss]) for miss in Miss),
            tuple(near),
            tuple(self._answers),
            self._answer_count,
            tuple(self._policy_changes),
            self._policy_change_count,
            tuple(self._outliers()),
            tuple(self._troubles),
            self._trouble_count,
            tuple(self._notes()),
        )

    def _summaries(self) -> tuple[AgentSummary, ...]:
        destinations, binaries, sources = self._destinations.new(), self._binaries.new(), self._sources.new()
        found = []
        sessions = Counter(session.agent for session in self._sessions.values() if session.in_period)
        for agent in sorted(sessions):
            verdicts = self._verdicts.get(agent, Counter())
            new, ran, used = destinations.get(agent, []), binaries.get(agent, []), sources.get(agent, [])
            spent = self._spent.get(agent, Spent())
            found.append(
                AgentSummary(
                    agent,
                    sessions[agent],
                    verdicts.total(),
                    verdicts[Verdict.ALLOW],
                    verdicts[Verdict.DENY],
                    verdicts[Verdict.KILL],
                    tuple(new[: self._top]),
                    tuple(ran[: self._top]),
                    tuple(used[: self._top]),
                    sum(max(0, len(each) - self._top) for each in (new, ran, used)),
                    spent.unexplained,
                    spent.total(),
                )
            )
        return tuple(found)

    def _outliers(self) -> list[Outlier]:
        """Those of the period, the most unlike first."""
        groups: dict[str, list[tuple[str, _Session]]] = {}
        for name, session in self._sessions.items():
            groups.setdefault(session.agent, []).append((name, session))
        found = []
        for agent, sessions in groups.items():
            columns = zip(*(session.measures() for _, session in sessions), strict=True)
            for measure, values in zip(MEASURES, columns, strict=True):
                usual, scored = scores(values)
                found += [
                    Outlier(agent, shown_line(name), measure, value, usual, score)
                    for (name, session), value, score in zip(sessions, values, scored, strict=True)
                    if session.in_period and abs(score) > THRESHOLD
                ]
        return sorted(found, key=lambda outlier: -abs(outlier.score))[: self._top]

    def _notes(self) -> list[str]:
        notes = []
        if not self._before:
            notes.append("There is no record before this period, so all that it has is new.")
        few = sorted({s.agent for s in self._sessions.values() if s.in_period} - self._comparable())
        if few:
            names = ", ".join(few[: self._top]) + (", ..." if len(few) > self._top else "")
            notes.append(f"Fewer than {FEWEST} sessions, so none was compared with the others: {names}.")
        for known, what in (
            (self._destinations, "destinations"),
            (self._binaries, "binaries"),
            (self._sources, "models and sources"),
        ):
            if known.is_full:
                notes.append(f"There were more than {MAX_KNOWN} different {what}; later ones are not listed as new.")
        if self._denials.short:
            notes.append(f"There were many different denials: each of their counts may be {self._denials.short} short.")
        if not self._room:
            notes.append("There were too many destinations and binaries: later sessions are said to have fewer.")
        if self._left_out:
            notes.append(
                f"{self._left_out} records are not in these figures: there were more than {MAX_SESSIONS} sessions or "
                f"{MAX_AGENTS} agents."
            )
        return notes

    def _comparable(self) -> set[str]:
        return {agent for agent, many in Counter(s.agent for s in self._sessions.values()).items() if many >= FEWEST}


def _short(text: str) -> str:
    return shown_line(text, _SUBJECT)


def _is_inside(endpoint: Endpoint) -> bool:
    """Whether it is in the sandbox itself: its Unix sockets and its loopback."""
    if endpoint.transport is Transport.UNIX:
        return True
    if endpoint.name is not None or endpoint.protected or not endpoint.address:
        return False
    try:
        address = ip_address(endpoint.address)
    except ValueError:
        return False
    return address.is_loopback or address.is_unspecified


def _miss(decision: Decision) -> Miss | None:
    if decision.verdict is Verdict.KILL:
        return Miss.KILLED
    if decision.decider != "approvals":
        return None
    if decision.allowed:
        return Miss.ALLOWED if decision.answered_by else None  # else the same attempt, seen by another enforcer
    return Miss.UNANSWERED if decision.answered_by in ("", "nobody", "monitor") else Miss.DENIED
