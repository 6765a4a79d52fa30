"""What the review of a period says: values that :mod:`corral.log.review` makes and :mod:`corral.log.report` prints.

All texts in them are printable, bounded, and one line each.
"""

from __future__ import annotations

from dataclasses import dataclass
from enum import Enum


class Miss(Enum):
    """Why an action is a near miss."""

    DENIED = "a person said no"
    UNANSWERED = "nobody answered"
    ALLOWED = "a person said yes"
    KILLED = "it ended the sandbox"


@dataclass(frozen=True, slots=True)
class Novelty:
    """A destination, a binary, a model or a source of data that an agent had not used before."""

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
class Answered:
    """A question to persons that came to its end."""

    agent: str
    session: str
    what: str
    outcome: str
    """The answer with its scope, or why there was none."""
    by: str
    waited: float
    """Seconds."""
    number: int
    at: float


@dataclass(frozen=True, slots=True)
class PolicyChange:
    """A session that began under another policy than the agent's last one."""

    agent: str
    session: str
    by: str
    old: str
    new: str
    changes: tuple[str, ...]
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
class Spend:
    """What calls of brokers came to."""

    calls: int = 0
    input_tokens: int = 0
    output_tokens: int = 0
    costs: tuple[tuple[str, int], ...] = ()
    """Currencies, and billionths of each."""


@dataclass(frozen=True, slots=True)
class AgentSummary:
    """What one agent did in the period."""

    agent: str
    sessions: int
    actions: int
    allowed: int
    denied: int
    killed: int
    new_destinations: tuple[Novelty, ...]
    new_binaries: tuple[Novelty, ...]
    new_sources: tuple[Novelty, ...]
    """Models, sources and services."""
    more: int
    """New ones that are not listed."""
    unexplained: int
    """Actions that no answer of a model explains."""
    spend: Spend


@dataclass(frozen=True, slots=True)
class Trouble:
    """A record of the log's own health."""

    number: int
    at: float
    what: str


@dataclass(frozen=True, slots=True)
class Digest:
    """The review of a period."""

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
    answers: tuple[Answered, ...]
    """The latest."""
    answer_count: int
    policy_changes: tuple[PolicyChange, ...]
    """The latest."""
    policy_change_count: int
    outliers: tuple[Outlier, ...]
    troubles: tuple[Trouble, ...]
    trouble_count: int
    notes: tuple[str, ...]
    """What the digest does not know, because a bound was reached."""
