"""What is told of decisions: to the log (:mod:`corral.log`), to the agent, to tests.

A flood of equal refusals becomes one record with a count, so that neither memory nor a reader drowns; nothing is
dropped, and the count says so (I9).
"""

from __future__ import annotations

import threading
import time
from collections import deque
from collections.abc import Callable, Hashable
from dataclasses import replace
from sys import getsizeof
from typing import Protocol, runtime_checkable

from corral.actions import (
    Action,
    Content,
    Decision,
    Endpoint,
    File,
    Flow,
    Kind,
    Origin,
    Program,
    Request,
    Used,
    Verdict,
)
from corral.errors import CorralError

BURST = 16
"""Equal refusals of one process that are recorded one by one, before the rest is counted."""
PERIOD = 1.0
"""Seconds after which a count is written, and a process may burst again."""
MAX_COUNTERS = 4096
_OF_BROKERS = frozenset((Kind.MODEL_CALL, Kind.DATA_QUERY, Kind.API_CALL))
"""What brokers decide on has more to it than its action says: equal are refusals by the same rule."""
MAX_TEXTS = 32 << 20
"""Bytes of arguments and paths that are kept: those of one program may be 256 KiB."""


class Sink(Protocol):
    """Takes decisions for good."""

    def write(self, decision: Decision) -> None:
        """Returns when the record is safe. Raises where it cannot be; the sandbox then ends."""


@runtime_checkable
class Ledger(Protocol):
    """A sink that takes decisions at once and makes them safe a little later, many at a time."""

    @property
    def unawaited(self) -> frozenset[Kind]:
        """What is let go on before its record is safe, because its effect does not outlive the sandbox."""

    def when_safe(self, callback: Callable[[Exception | None], None]) -> None:
        """Calls back once all that the calling thread has written is safe, or with why it never will be: at once, or
        later and from any thread. Does not raise."""


@runtime_checkable
class Account(Protocol):
    """Takes the accounts of connections that are over, for good."""

    def flow(self, flow: Flow) -> None:
        """Returns when the account is safe. Raises where it cannot be; the sandbox then ends."""


@runtime_checkable
class Tally(Protocol):
    """Takes the accounts of calls of brokers that are over, for good."""

    def used(self, used: Used) -> None:
        """Returns when the account is safe. Raises where it cannot be; the sandbox then ends."""


@runtime_checkable
class Keeper(Protocol):
    """Keeps what was said to a broker and what it answered, where the policy says so."""

    def keeps(self, content: Content) -> int:
        """How many bytes of one such content are kept; 0 where none is. More need not be collected."""

    def keep(self, origin: Origin, content: Content, data: bytes, is_whole: bool, about: str, call: int = 0) -> None:
        """``about`` says what it is: the model, the source; ``call`` is the number of the call (``Used.call``). Never
        waits for the disk, and never raises."""


class Glance(Protocol):
    """Takes the first bytes of connections that were refused."""

    def refused(self, origin: Origin, endpoint: Endpoint, first: bytes) -> None:
        """Never waits, and never raises."""


def unwritable(error: Exception) -> str:
    """Why a sandbox ends whose sink raised ``error``. Only our own words are told: others may hold a secret."""
    return f"its records cannot be written ({error if isinstance(error, CorralError) else type(error).__name__})"


def weigh(decision: Decision) -> int:
    """About how many bytes of memory the texts of a decision take that the agent can make long."""
    subject = decision.action.subject
    if isinstance(subject, Program):
        return sum(map(getsizeof, subject.argv), getsizeof(subject.path))
    if isinstance(subject, File):
        return getsizeof(subject.path) + getsizeof(subject.other)
    if isinstance(subject, Request):
        return getsizeof(subject.path)
    return 0


class Recent:
    """The latest decisions, for whoever asks while the sandbox lives: at most ``limit``, and so many bytes of text."""

    def __init__(self, limit: int = 10_000, *, texts: int = MAX_TEXTS) -> None:
        self._kept: deque[tuple[Decision, int]] = deque()
        self._limit, self._most = limit, texts
        self._texts = 0
        self.dropped = 0
        """How many older ones are gone."""

    def write(self, decision: Decision) -> None:
        weight = weigh(decision)
        self._kept.append((decision, weight))
        self._texts += weight
        while len(self._kept) > self._limit or self._texts > self._most:
            self._texts -= self._kept.popleft()[1]
            self.dropped += 1

    def all(self) -> tuple[Decision, ...]:
        """Oldest first."""
        return tuple(decision for decision, _ in tuple(self._kept))


class Several:
    """Writes to each of several sinks."""

    def __init__(self, *sinks: Sink) -> None:
        self._writes = tuple(sink.write for sink in sinks)

    def write(self, decision: Decision) -> None:
        for write in self._writes:
            write(decision)


class _Counter:
    __slots__ = ("at", "last", "number", "seen", "since", "waiting")

    def __init__(self, now: float) -> None:
        self.since = now
        self.seen = 0
        self.waiting = 0
        self.last: Decision | None = None
        self.number, self.at = 0, 0.0
        """Of the last, where that was only counted."""


class Aggregator:
    """Passes decisions on, and counts equal refusals of one process beyond a burst.

    ``flush`` must be called from time to time (at least every ``PERIOD``) and at the end.
    """

    def __init__(self, sink: Sink, *, clock: Callable[[], float] = time.monotonic) -> None:
        self._sink = sink
        self._clock = clock
        self._counters: dict[Hashable, _Counter] = {}
        self._texts = 0
        self._lock = threading.Lock()

    @staticmethod
    def _key(action: Action, rule: str = "") -> Hashable:
        origin = action.origin
        process = origin.process
        who = process and (process.pid, process.started)
        by = rule if action.kind in _OF_BROKERS else ""
        return (action.kind, action.subject, who, origin.step, origin.tool, origin.unexplained, by)

    def write(self, decision: Decision) -> None:
        if decision.verdict is not Verdict.DENY or decision.held:
            self._sink.write(decision)
            return
        with self._lock:
            now = self._clock()
            key = self._key(decision.action, decision.rule)
            counter = self._counters.get(key)
            if counter is None:
                self._texts += weigh(decision)
                if len(self._counters) >= MAX_COUNTERS or self._texts > MAX_TEXTS:
                    self._flush(now, everything=True)
                counter = self._counters[key] = _Counter(now)
            counter.seen += 1
            if counter.seen <= BURST:
                self._sink.write(decision)
                return
            counter.waiting += 1
            counter.last, counter.number, counter.at = decision, decision.number, decision.at
            if now - counter.since >= PERIOD:
                self._write_count(counter)
                del self._counters[key]

    def repeater(self, action: Action) -> Callable[[int], bool] | None:
        """Counts a refusal of just this action once more, by the number of the decision, without making a
        :class:`Decision` of it: returns whether that was all that there was to do. None where it is not just counted.
        """
        with self._lock:
            counter = self._counters.get(self._key(action))
        if counter is None or counter.last is None:
            return None

        def repeat(number: int) -> bool:
            with self._lock:
                if counter.last is None:  # its count was written, and there may be another burst
                    return False
                counter.seen += 1
                counter.waiting += 1
                counter.number, counter.at = number, time.time()
                return True

        return repeat

    def _write_count(self, counter: _Counter) -> None:
        if counter.last is not None:
            last, counter.last = counter.last, None
            self._sink.write(replace(last, count=counter.waiting, number=counter.number, at=counter.at))
            counter.waiting = 0

    def flush(self, *, everything: bool = False) -> None:
        """Writes the counts that are due, or all of them."""
        with self._lock:
            self._flush(self._clock(), everything)

    def _flush(self, now: float, everything: bool) -> None:
        for key in [key for key, counter in self._counters.items() if everything or now - counter.since >= PERIOD]:
            self._write_count(self._counters.pop(key))
        if not self._counters:
            self._texts = 0
