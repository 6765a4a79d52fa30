"""What is kept of a session beside its records, where its policy says so (``log.keep``).

A thread of its own compresses and writes, since the disk may take its time. What commands write is never lost to that:
who starts more of them waits. First bytes of refused connections come as often as an agent likes, so they are bounded,
and what is beyond is counted. So is what brokers say of calls for which the disk is too slow: they do not wait.
"""

from __future__ import annotations

import queue
import threading
import time
from collections import Counter
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from weakref import WeakSet

from corral.actions import Content, Endpoint, Origin
from corral.errors import CorralError
from corral.log.asciicast import COLUMNS, ROWS, Tape
from corral.log.events import PayloadKept, PayloadLost
from corral.log.payload_keys import PayloadError
from corral.log.payloads import Payloads
from corral.log.repeated import Repeated
from corral.log.sink import SessionLog
from corral.monitor.records import unwritable
from corral.policy.model import Log
from corral.sandbox.selected import MAX_BYTES, MAX_FILES, Selected

MAX_REFUSED = 256
"""Refused connections of one session whose first bytes are kept."""
MAX_CALLS = 64 << 20
"""Bytes of prompts, answers and queries that wait for the disk; what is more is not kept."""
MAX_WAITING = 64 << 20
"""Bytes that wait for the disk before whoever starts more commands waits too. Each that runs may add ``keep_bytes``."""
MAX_ABOUT = 200
"""Characters of what such a content is said to be."""
_OF_CALLS = (Content.PROMPT, Content.RESPONSE, Content.QUERY)
_WHY = {
    Content.REFUSED_FLOW: f"more than {MAX_REFUSED} connections of this session were refused, or many at once",
    Content.FILE: f"of one session {MAX_FILES} files are kept, {MAX_BYTES >> 20} MiB in all, at paths that can be told",
}


TakeFiles = Callable[[Sequence[str], int], Selected]


@dataclass(frozen=True, slots=True)
class _Piece:
    origin: Origin
    content: Content
    data: bytes
    is_whole: bool
    about: str
    call: int = 0


def _weight(piece: _Piece) -> int:
    """About how many bytes of memory it takes."""
    return len(piece.data) + 1024


class Contents:
    """Keeps them for one session (:mod:`corral.monitor.records`: Glance, Keeper)."""

    def __init__(self, session: SessionLog, payloads: Payloads, policy: Log, origin: Origin) -> None:
        """``origin`` is the session's. Call :meth:`close` when all is over."""
        self._session, self._payloads, self._policy, self._origin = session, payloads, policy, origin
        self._keep = dict(policy.keep)
        self._end: Callable[[str], None] = lambda reason: None
        self._pieces: queue.SimpleQueue[_Piece | None] = queue.SimpleQueue()
        self._lock = threading.Lock()
        self._closing = threading.Lock()
        self._room = threading.Condition(self._lock)
        self._waiting = 0
        self._calls = 0
        """Bytes of calls among those that wait."""
        self._refused = 0
        self._lost: Counter[Content] = Counter()
        self._repeated = Repeated()  # of the thread
        self._tapes: WeakSet[Tape] = WeakSet()
        self._closed = False
        self._failure = ""
        self._thread = threading.Thread(target=self._run, name="corral-contents", daemon=True)
        self._thread.start()

    def when_failed(self, end: Callable[[str], None]) -> None:
        """Has ``end`` called, with the reason, where something cannot be kept."""
        self._end = end

    def tape(self, number: int, step: int, title: str, size: tuple[int, int] | None) -> Tape | None:
        """Records what exec ``number`` (of that step) writes, until it is closed; None where that is not wanted."""
        if Content.TERMINAL not in self._keep:
            return None
        origin = Origin(self._origin.sandbox, self._origin.session, step, number)

        def done(data: bytes, is_whole: bool) -> None:
            with self._lock:
                self._put(_Piece(origin, Content.TERMINAL, data, is_whole, title))

        tape = Tape(title, self._policy.keep_bytes, done, size=size or (ROWS, COLUMNS))
        with self._lock:
            if self._closed:
                return None
            self._tapes.add(tape)
        return tape

    @property
    def is_behind(self) -> bool:
        """Whether so much waits for the disk that no more commands should be started before :meth:`catch_up`."""
        return self._waiting > MAX_WAITING

    def catch_up(self) -> None:
        """Returns when less waits for the disk."""
        with self._room:
            self._room.wait_for(lambda: not self.is_behind)

    def _put(self, piece: _Piece) -> None:
        """With the lock."""
        self._waiting += len(piece.data)
        self._pieces.put(piece)

    def refused(self, origin: Origin, endpoint: Endpoint, first: bytes) -> None:
        """As :class:`corral.monitor.records.Glance`."""
        if Content.REFUSED_FLOW not in self._keep:
            return
        data = first[: self._policy.keep_bytes]
        about = f"{endpoint.name or endpoint.address} port {endpoint.port}"
        with self._lock:
            if self._refused < MAX_REFUSED and not self.is_behind and not self._closed:
                self._put(_Piece(origin, Content.REFUSED_FLOW, data, len(data) == len(first), about))
                self._refused += 1
            else:
                self._lost[Content.REFUSED_FLOW] += 1

    def keeps(self, content: Content) -> int:
        """As :class:`corral.monitor.records.Keeper`."""
        return self._policy.keep_bytes if content in self._keep else 0

    def keep(self, origin: Origin, content: Content, data: bytes, is_whole: bool, about: str, call: int = 0) -> None:
        """As :class:`corral.monitor.records.Keeper`."""
        if content not in self._keep:
            return
        kept = data[: self._policy.keep_bytes]
        piece = _Piece(origin, content, kept, is_whole and len(kept) == len(data), about[:MAX_ABOUT], call)
        with self._lock:
            if self._closed or self._calls + _weight(piece) > MAX_CALLS:
                self._lost[content] += 1
                return
            self._calls += _weight(piece)
            self._pieces.put(piece)

    def close(self, patch: Callable[[], bytes] | None = None, files: TakeFiles | None = None) -> None:
        """Returns when all is kept, and that it is, or that it was lost, is recorded for good. May be called again, and
        by several at once: each returns when it is so.

        What is still written is the end of nothing: such a tape is kept as one that is not whole. ``patch`` gives what
        was changed in the workspace, ``files`` the changed files that some globs name, with a bound for each. Raises
        PayloadError where something could not be kept."""
        with self._closing:
            with self._lock:
                was_closed, self._closed = self._closed, True
            if not was_closed:
                if patch is not None and Content.DIFF in self._keep:
                    self._take(patch)
                if files is not None and Content.FILE in self._keep and self._policy.files:
                    self._take_files(files)
                for tape in tuple(self._tapes):
                    tape.close(is_whole=False)
                self._pieces.put(None)
            self._thread.join()
            if self._failure:
                raise PayloadError(self._failure)

    def _take(self, patch: Callable[[], bytes]) -> None:
        try:
            data = patch()
        except Exception as error:
            self._fail(Content.DIFF, error)
            return
        if data:
            kept = data[: self._policy.keep_bytes]
            with self._lock:
                self._put(_Piece(self._origin, Content.DIFF, kept, len(kept) == len(data), "workspace"))

    def _take_files(self, files: TakeFiles) -> None:
        try:
            found = files(self._policy.files, self._policy.keep_bytes)
            for each in found.files:
                if each.failure:
                    self._fail(Content.FILE, CorralError(each.failure))
                    continue
                self.catch_up()  # so that not all of them are in memory at once
                with self._lock:
                    self._put(_Piece(self._origin, Content.FILE, each.data, each.is_whole, each.path))
        except Exception as error:
            self._fail(Content.FILE, error)
            return
        with self._lock:
            self._lost[Content.FILE] += found.beyond

    # ---- its own thread ----

    def _run(self) -> None:
        while (piece := self._pieces.get()) is not None:
            try:
                self._write(piece)
            except Exception as error:
                self._fail(piece.content, error)
            with self._room:
                if piece.content in _OF_CALLS:
                    self._calls -= _weight(piece)
                else:
                    self._waiting -= len(piece.data)
                self._room.notify_all()
            self._tell_lost(_OF_CALLS)
        self._tell_lost(Content)
        safe: queue.SimpleQueue[Exception | None] = queue.SimpleQueue()
        self._session.when_safe(safe.put)
        problem = safe.get()
        if problem is not None:
            self._failure = self._failure or unwritable(problem)

    def _tell_lost(self, contents: Iterable[Content]) -> None:
        with self._lock:
            lost = [(content, self._lost.pop(content)) for content in contents if self._lost[content]]
        for content, count in lost:
            self._record(PayloadLost(content, count, _WHY.get(content, "more of it came than the disk could take")))

    def _write(self, piece: _Piece) -> None:
        now, seconds = time.time(), self._keep[piece.content]
        data, shared, expires = piece.data, None, int(now + seconds)
        if piece.content is Content.PROMPT:
            shared, expires = self._repeated.plan(data, now, seconds)
            if shared is not None:
                data = data[shared.prefix : len(data) - shared.suffix]
        kept = self._payloads.keep(piece.content, data, expires=expires, shared=shared)
        if piece.content is Content.PROMPT:
            self._repeated.remember(kept.digest, piece.data, shared, expires)
        self._session.record(
            PayloadKept(
                *(piece.origin, piece.content, kept.digest, len(data), piece.is_whole, piece.about),
                *(expires, kept.encrypted, piece.call),
            )
        )

    def _fail(self, content: Content, error: Exception) -> None:
        # Only our own words are told: others may hold a secret.
        why = str(error) if isinstance(error, CorralError) else type(error).__name__
        self._failure = self._failure or f"what its policy wants kept cannot be kept ({why})"
        self._end(self._failure)
        self._record(PayloadLost(content, 1, why))

    def _record(self, event: PayloadLost) -> None:
        try:
            self._session.record(event)
        except Exception as error:
            self._end(unwritable(error))
