"""What a log records beside decisions, flows and calls of brokers: approvals, policies, sessions' lives, the log's."""

from __future__ import annotations

from dataclasses import dataclass
from enum import Enum

from corral.actions import Content, Decision, Flow, Kind, Origin, Used, Verdict
from corral.approvals.queue import Ending, Scope


@dataclass(frozen=True, slots=True)
class SessionStarted:
    """A sandbox is about to be built."""

    workspace: str
    label: str
    policy: str
    """The canonical form of the policy in force (:mod:`corral.policy.canonical`), cut where it is long; its hash, by
    which it is known, stands in every record."""


@dataclass(frozen=True, slots=True)
class SessionEnded:
    """Everything in the sandbox has ended."""

    reason: str


@dataclass(frozen=True, slots=True)
class ExecStarted:
    """Whoever controls the sandbox is about to run a command in it."""

    exec: int
    argv: tuple[str, ...]
    directory: str
    user: int
    step: int = 0
    """The step that it begins; 0 in records of before these were told apart from its number."""


@dataclass(frozen=True, slots=True)
class ExecEnded:
    """That command has ended, or could not be started (``error``)."""

    exec: int
    status: int
    """As wait(2) gives it."""
    error: str
    user_microseconds: int
    """Of processor time, with the children that it waited for, as all that follows (getrusage(2))."""
    system_microseconds: int
    max_rss: int
    """Bytes: the largest resident set of any single process."""
    denials: int
    """How much its processes were refused."""
    step: int = 0
    """As of ``ExecStarted``."""


@dataclass(frozen=True, slots=True)
class SnapshotTaken:
    """The files of the sandbox are kept as they are at this moment."""

    layer: str
    name: str
    parent: str
    """The layer that its session was begun on or set back to, or the snapshot before it; empty where there is none."""
    step: int | None
    """The step after which it was taken by itself; 0 is the start."""
    changes: int
    size: int
    """Bytes of content."""


@dataclass(frozen=True, slots=True)
class FilesSet:
    """The files of the sandbox are those of a layer: it begins with them, or is about to be set back to them. Then all
    in it is killed but what policy names."""

    layer: str


class Outcome(Enum):
    """What came of an apply, or of taking one back."""

    APPLIED = "applied"
    COMMITTED = "committed"
    """It is a branch of the workspace's repository; no file was changed."""
    UNDONE = "undone"
    ROLLED_BACK = "rolled_back"
    """It failed, or was cut short; everything is as it was before."""
    FORGOTTEN = "forgotten"
    """It was cut short and could not be taken back; a person has seen to it."""


@dataclass(frozen=True, slots=True)
class ApplyEnded:
    """What was decided about files outside was done, or was not."""

    apply: str
    """Its id, by which it is undone; of a branch the commit; empty where nothing was begun."""
    source: str
    """The layer, or what was taken back."""
    digest: str
    """The hash that was consented to."""
    workspace: str
    outcome: Outcome
    error: str


@dataclass(frozen=True, slots=True)
class Approval:
    """A question to persons has come to its end (:class:`corral.approvals.queue.Ended`): what was asked, who said what.
    Recorded before whoever waits is told; what was decided by it is the decision that follows."""

    origin: Origin
    question: int
    """Its number in the sandbox."""
    kind: Kind
    action: str
    """Hash of what was asked for (:func:`corral.log.approval.action_hash`)."""
    target: str
    """The same in words, in one form, as it was shown; cut where it is long, which the hash is not."""
    rule: str
    """Which rule asked."""
    ending: Ending
    verdict: Verdict
    scope: Scope
    through: int
    """The question that was answered: this one, or an equal one, where the answer was for the session."""
    by: str
    """Who answered, as the kernel names the peer; nobody where nobody did."""
    reason: str
    asked_at: float
    """Seconds since the epoch."""
    ended_at: float
    timeout: float
    """Seconds within which it was to be answered."""


@dataclass(frozen=True, slots=True)
class PolicyChanged:
    """This session begins under another policy than the agent's last one in this log did. No policy changes while a
    session lasts."""

    old: str
    """Hash of the policy of the last session; empty where none is known."""
    new: str
    by: str
    """Who began the session."""
    changes: tuple[str, ...]
    """What is different (:mod:`corral.policy.difference`)."""


@dataclass(frozen=True, slots=True)
class LogRecovered:
    """The log was opened after a crash, and something had to be mended."""

    what: str


@dataclass(frozen=True, slots=True)
class KeyRotated:
    """Another key signs for the log from the next checkpoint on. Both are verifier keys (signed-note)."""

    old: str
    new: str


@dataclass(frozen=True, slots=True)
class PayloadKept:
    """Content is kept beside the log (:mod:`corral.log.payloads`)."""

    origin: Origin
    content: Content
    digest: str
    size: int
    """Bytes that are kept; a prompt repeats most of the one before it, and these are those that are new."""
    is_whole: bool
    about: str
    """What it is of: a command, a destination."""
    expires: int
    """Seconds since the epoch, from when on it need not be kept."""
    encrypted: bool
    call: int = 0
    """The number of the call of a broker that it is of (``Used.call``)."""


@dataclass(frozen=True, slots=True)
class PayloadLost:
    """Content that should have been kept was not."""

    content: Content
    count: int
    why: str


@dataclass(frozen=True, slots=True)
class PayloadErased:
    """Content was erased; what refers to it in the log stays."""

    digest: str
    by: str
    why: str


Event = (
    Decision
    | Flow
    | Used
    | SessionStarted
    | SessionEnded
    | ExecStarted
    | ExecEnded
    | SnapshotTaken
    | FilesSet
    | ApplyEnded
    | Approval
    | PolicyChanged
    | LogRecovered
    | KeyRotated
    | PayloadKept
    | PayloadLost
    | PayloadErased
)

WORDS: dict[str, type[Event]] = {
    "decision": Decision,
    "flow": Flow,
    "used": Used,
    "session.started": SessionStarted,
    "session.ended": SessionEnded,
    "exec.started": ExecStarted,
    "exec.ended": ExecEnded,
    "snapshot.taken": SnapshotTaken,
    "files.set": FilesSet,
    "apply.ended": ApplyEnded,
    "approval": Approval,
    "policy.changed": PolicyChanged,
    "log.recovered": LogRecovered,
    "log.key_rotated": KeyRotated,
    "log.payload_kept": PayloadKept,
    "log.payload_lost": PayloadLost,
    "log.payload_erased": PayloadErased,
}
"""How a record says what it is."""
