"""The SHA-256 of programs: the host's are remembered as long as a file is the same, large ones are made by threads."""

from __future__ import annotations

import hashlib
import os
import threading
from collections import OrderedDict, deque
from collections.abc import Callable
from functools import partial
from typing import NamedTuple

MAX_KNOWN = 4096
LARGE = 256 << 10
"""Bytes from which on a file is read by another thread: all sandboxes wait for what the supervisor's own one reads."""
MAX_BYTES = 1 << 30
"""Of a larger file no digest is made: reading it would keep others waiting."""
MAX_WAITING = 256
"""Files of one sandbox that wait to be read."""
_THREADS = 4
_CHUNK = 1 << 20
_OWN_SINCE_NS = 10 * 10**9

Key = tuple[int, int, int, int, int]
_UNKNOWN = ("", False)
_known: OrderedDict[Key, tuple[str, bool]] = OrderedDict()
"""Digests, and whether it is a script's."""
_lock = threading.Lock()
_queue: deque[Callable[[], None]] = deque()
"""What is to be read, of all sandboxes."""
_running = 0
"""Threads that read."""


class _Reading(NamedTuple):
    """A large file that waits for its digest."""

    file: int
    size: int
    key: Key | None
    """None: nothing is remembered of it."""
    done: Callable[[str], None]


class Digests:
    """Those of one sandbox. Used by the supervisor's thread only."""

    def __init__(self, started_ns: int, post: Callable[..., None]) -> None:
        """``started_ns`` is when the sandbox started, in ns since the epoch; ``post`` has the thread call something."""
        self._post = post
        self._own_since = started_ns - _OWN_SINCE_NS
        self._waiting: deque[_Reading] = deque()
        self._reading = False

    def known(self, status: os.stat_result) -> str:
        """The digest of a file that was looked at before, is no script, and that nothing inside can have changed since;
        else ``""``. Such a file need not be opened."""
        key = self._key(status)
        digest, is_script = _UNKNOWN if key is None else _known.get(key, _UNKNOWN)
        return "" if is_script else digest

    def _key(self, status: os.stat_result) -> Key | None:
        # Nobody inside can set the time of a change, so what was changed before the start is the host's. What was
        # changed since is no longer told by its times: a write through a shared mapping leaves those of a tmpfs as they
        # are.
        if status.st_ctime_ns >= self._own_since:
            return None
        # Each sandbox shows the same file as another device.
        return (status.st_ino, status.st_size, status.st_mtime_ns, status.st_ctime_ns, status.st_mode)

    def find(self, file: int, status: os.stat_result, done: Callable[[str], None]) -> bool:
        """Calls back with the digest of a regular file that is open for reading, in hexadecimal, or with ``""``.

        At once, or later for a large one; ``file`` stays the caller's. False: too many wait, nothing is done.
        """
        key = self._key(status)
        known = None if key is None else _known.get(key)
        if known is not None or status.st_size > MAX_BYTES:
            done(known[0] if known else "")
            return True
        if status.st_size <= LARGE:
            done(_remember(key, *_hash(file, status.st_size)))
            return True
        if len(self._waiting) >= MAX_WAITING:
            return False
        self._waiting.append(_Reading(os.dup(file), status.st_size, key, done))
        self._next()
        return True

    def _next(self) -> None:
        """One of each sandbox at a time: none keeps the others waiting."""
        while not self._reading and self._waiting:
            reading = self._waiting.popleft()
            try:
                _submit(partial(self._read, reading))
            except RuntimeError:  # no thread can be had
                os.close(reading.file)
                reading.done("")
            else:
                self._reading = True

    def _read(self, reading: _Reading) -> None:
        """In a thread of its own."""
        try:
            known = None if reading.key is None else _known.get(reading.key)
            found = known or _hash(reading.file, reading.size)
        except Exception:
            found = _UNKNOWN
        finally:
            os.close(reading.file)
        self._post(self._was_read, reading, found)

    def _was_read(self, reading: _Reading, found: tuple[str, bool]) -> None:
        self._reading = False
        self._next()
        reading.done(_remember(reading.key, *found))

    def close(self) -> None:
        """Nobody waits any more."""
        while self._waiting:
            os.close(self._waiting.popleft().file)


def _remember(key: Key | None, digest: str, is_script: bool) -> str:
    if digest and key is not None:
        _known[key] = digest, is_script
        if len(_known) > MAX_KNOWN:
            _known.popitem(last=False)
    return digest


def _hash(file: int, size: int) -> tuple[str, bool]:
    """The digest, and whether it is a script's; of no more than ``size`` bytes: it may grow as fast as it is read."""
    state = hashlib.sha256()
    at = 0
    is_script = os.pread(file, 2, 0) == b"#!"
    while at < size and (part := os.pread(file, min(_CHUNK, size - at), at)):
        state.update(part)
        at += len(part)
    return state.hexdigest(), is_script


def _submit(work: Callable[[], None]) -> None:
    """Has one of a few threads do it, which ends when there is nothing more to do. (The standard library's pool takes
    longer to load than most programs to read.) Raises RuntimeError where no thread can be had."""
    global _running
    with _lock:
        _queue.append(work)
        if _running == _THREADS:
            return
        _running += 1
    try:
        threading.Thread(target=_work, name="corral-digest", daemon=True).start()
    except RuntimeError:
        with _lock:
            _running -= 1
            if _running or work not in _queue:  # another thread does it, or did
                return
            _queue.remove(work)
        raise


def _work() -> None:
    global _running
    while True:
        with _lock:
            if not _queue:
                _running -= 1
                return
            work = _queue.popleft()
        work()


def _after_fork() -> None:
    """A child has none of its parent's threads."""
    global _running, _lock
    _running, _lock = 0, threading.Lock()
    _queue.clear()


os.register_at_fork(after_in_child=_after_fork)
