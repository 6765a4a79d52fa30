"""The review of a period: what the agents did in it that they had not done before, and where it was close.

One pass over the log from its beginning, because "new" means that nothing before the period was like it. Everything kept
is bounded, as agents decide how much there is to keep; where a bound was reached, the digest says so in its notes.

*New destinations* are those that something was let out to: allowed connections, datagrams, requests and flows that left
the sandbox. *New binaries* are programs that were allowed to run, by path and content: one that was replaced is new
again. *Near misses* are actions that came down to a person's answer or to the end of the sandbox. *Sessions unlike the
rest* are compared with all sessions of the same agent up to the end of the period (:mod:`corral.log.outliers` says what
that is worth).
"""

from __future__ import annotations

from collections import Counter, deque
from collections.abc import Iterable
from dataclasses import dataclass, field
from enum import Enum
from ipaddress import ip_address

from corral.actions import Decision, Endpoint, Flow, Kind, Program, Request, Transport, Verdict
from corral.errors import RequestError
from corral.log.frequent import Frequent
from corral.log.items import shown_line
from corral.log.outliers import THRESHOLD, scores
from corral.log.records import Record

TOP = 20
"""Rows of a table."""
MAX_KNOWN = 200_000
"""Destinations, and binaries, that are remembered of all agents together."""
MAX_SESSIONS = 50_000
MAX_AGENTS = 1000
MAX_DISTINCT = 10_000
"""Different destinations and binaries of one session that are told apart."""
_SUBJECT = 160
_OUTWARD = frozenset({Kind.NET_CONNECT, Kind.NET_SEND, Kind.HTTP_REQUEST})


class Miss(Enum):
    """Why an action is a near miss."""

    DENIED = "a person said no"
    UNANSWERED = "nobody answered"
    ALLOWED = "a person said yes"
    KILLED = "it ended the sandbox"


@dataclass(frozen=True, slots=True)
class Novelty:
    """A destination or a binary that an agent had not used before."""

    agent: str
    what: str
    number: int
    """Of its first record, in the log."""
    at: float
    count: int
    """Times within the period."""


@dataclass(frozen=True, slots=True)
class Denial:
    """Refusals of one agent by one rule of one thing."""

    agent: str
    rule: str
    what: str
    count: int


@dataclass(frozen=True, slots=True)
class NearMiss:
    """An action that came down to an answer, or to the end of its sandbox."""

    why: Miss
    agent: str
    session: str
    what: str
    rule: str
    by: str
    """Who answered, if anybody was asked."""
    number: int
    at: float


@dataclass(frozen=True, slots=True)
class Outlier:
    """A session of which one count is unlike those of the agent's other sessions."""

    agent: str
    session: str
    measure: str
    value: float
    usual: float
    """The median."""
    score: float
    """Modified z-score."""


@dataclass(frozen=True, slots=True)
class AgentSummary:
    """What one agent did in the period."""

    agent: str
    sessions: int
    actions: int
    verdicts: tuple[tuple[Verdict, int], ...]
    new_destinations: tuple[Novelty, ...]
    new_binaries: tuple[Novelty, ...]
    more: int
    """New ones that are not listed."""


@dataclass(frozen=True, slots=True)
class Trouble:
    """A record of the log's own health."""

    number: int
    at: float
    what: str


@dataclass(frozen=True, slots=True)
class Digest:
    """The review of a period. All texts are printable."""

    since: float
    until: float
    records: int
    """Of the period."""
    before: int
    """Records before it, with which it was compared."""
    agents: tuple[AgentSummary, ...]
    denials: tuple[Denial, ...]
    misses: tuple[tuple[Miss, int], ...]
    near_misses: tuple[NearMiss, ...]
    """The latest of each sort."""
    outliers: tuple[Outlier, ...]
    troubles: tuple[Trouble, ...]
    trouble_count: int
    notes: tuple[str, ...] = field(default=())
    """What the digest does not know, because a bound was reached."""


MEASURES = ("actions", "refusals", "questions", "destinations", "binaries", "bytes out", "seconds")


class _Session:
    """Counts of one session."""

    __slots__ = ("actions", "agent", "binaries", "bytes", "destinations", "first", "in_period", "last", "questions",
                 "refusals")  # fmt: skip

    def __init__(self, agent: str, at: float) -> None:
        self.agent = agent
        self.actions = self.refusals = self.questions = self.bytes = 0
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
        self._destinations, self._binaries = _Known(top), _Known(top)
        self._sessions: dict[str, _Session] = {}
        self._verdicts: dict[str, Counter[Verdict]] = {}
        self._denials: Frequent[tuple[str, str, str]] = Frequent()
        self._misses: Counter[Miss] = Counter()
        self._latest: dict[Miss, deque[NearMiss]] = {miss: deque(maxlen=top) for miss in Miss}
        self._troubles: deque[Trouble] = deque(maxlen=top)
        self._trouble_count = 0
        self._left_out = 0
        """Records of sessions or agents beyond the bounds."""
