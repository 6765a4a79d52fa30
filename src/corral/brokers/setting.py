"""What all brokers of one sandbox are made of, and what each of them is for the others."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from itertools import count
from typing import Protocol

from corral.actions import Action, Decision, Kind, Opinion, Origin, Subject, Used
from corral.brokers.http import Answering, Request
from corral.brokers.metering.budgets import AgentLedger
from corral.monitor.core import Monitor
from corral.monitor.records import Keeper, Tally, unwritable
from corral.monitor.steps import Steps
from corral.policy.model import Policy


@dataclass(frozen=True, slots=True)
class Setting:
    """Of one sandbox. All of it may be used from the brokers' thread."""

    sandbox: str
    session: str
    policy: Policy
    monitor: Monitor
    steps: Steps
    tallies: Sequence[Tally]
    keeper: Keeper | None
    """None where nothing is kept."""
    end: Callable[[str], None]
    """Ends the sandbox. From any thread."""
    state: str
    """The directory of Corral's own state, where usage is counted."""
    ledger: AgentLedger | None = None
    """What all sessions of the agent have used, where the policy bounds that."""
    flush: Callable[[], object] = lambda: None
    """Waits, not for long, until what was counted is written."""
    next_call: Callable[[], int] = field(default_factory=lambda: count(1).__next__)
    """Numbers the calls of all brokers of the session: ``Used.call``, and what is kept of them."""

    async def decide(self, kind: Kind, subject: Subject, origin: Origin, *, own: Opinion | None = None) -> Decision:
        """Has the monitor decide; what is asked of a person is waited for. Who is cancelled withdraws."""
        return await self.monitor.decide(Action(kind, subject, origin), own=own)

    def account(self, used: Used) -> None:
        """Keeps the account of a call that is over. Where it cannot be kept, the sandbox ends (I3)."""
        try:
            for tally in self.tallies:
                tally.used(used)
        except Exception as error:
            self.end(unwritable(error))


class Handler(Protocol):
    """One broker of one sandbox. All is called in the brokers' thread, on its asyncio loop."""

    @property
    def max_body(self) -> int:
        """Bytes of a request's body; what is longer is answered with 413."""

    async def handle(self, request: Request, answer: Answering) -> None:
        """Answers one request. Cancelled where its client is gone or the sandbox has ended; it must account for that
        all the same. What it raises is answered with 500, if nothing was answered yet, and ends the connection."""

    async def close(self) -> None:
        """The sandbox is dead; no :meth:`handle` runs any more."""


Opening = Callable[[Setting], Handler]
"""Makes a broker whose secrets and documents are loaded and found right."""
