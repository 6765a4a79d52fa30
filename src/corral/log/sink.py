"""What one session writes to a log: decisions, flows, calls of brokers, what persons answered, and its life."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable

from corral.actions import Decision, Flow, Kind, Used
from corral.approvals.queue import Ended
from corral.log.approval import approval_of
from corral.log.events import Event
from corral.log.ocsf import Context
from corral.log.records import encode
from corral.log.writer import Log


class SessionLog:
    """A sink of the monitor (:mod:`corral.monitor.records`: Sink, Ledger, Account, Tally), and the register of its
    questions (:mod:`corral.approvals.queue`). Used from several threads."""

    def __init__(self, log: Log, context: Context, *, unawaited: frozenset[Kind] = frozenset()) -> None:
        self._log, self._context = log, context
        self._unawaited = unawaited
        self._lock = threading.Lock()
        self._sequence = 0
        self._forget: Callable[[], None] | None = None

    @property
    def unawaited(self) -> frozenset[Kind]:
        """What is let go on before its record is durable."""
        return self._unawaited

    def when_failed(self, end: Callable[[str], None]) -> None:
        """Has ``end`` called, with the reason, if the log fails, also while nobody waits for it."""
        self._forget = self._log.when_failed(lambda error: end(f"its log cannot be written ({error})"))

    def write(self, decision: Decision) -> None:
        """Raises LogUnwritable."""
        self._submit(decision, decision.at)

    def flow(self, flow: Flow) -> None:
        """Raises LogUnwritable."""
        self._submit(flow, flow.started + flow.seconds)

    def used(self, used: Used) -> None:
        """Raises LogUnwritable."""
        self._submit(used, used.started + used.seconds)

    def question_ended(self, ended: Ended) -> None:
        """The decision that follows is released when this is durable too: one thread writes both. Raises
        LogUnwritable."""
        self._submit(approval_of(ended), ended.at)

    def record(self, event: Event) -> None:
        """Anything else that happens to the session. Raises LogUnwritable."""
        self._submit(event, time.time())

    def _submit(self, event: Event, at: float) -> None:
        with self._lock:  # the order of the numbers is that of the log
            sequence = self._sequence + 1
            entry = encode(event, self._context, sequence=sequence, at=at, monotonic_ns=time.monotonic_ns())
            self._log.submit(entry)
            self._sequence = sequence

    def when_safe(self, callback: Callable[[Exception | None], None]) -> None:
        """As :class:`corral.monitor.records.Ledger`."""
        self._log.when_durable(callback)

    def close(self) -> None:
        """The session is over."""
        if self._forget is not None:
            self._forget()
