"""Finding a name's addresses on the host, without a thread that waits: by the system's resolver, or by named servers.

What comes back is a claim: the addresses are looked at (:mod:`corral.gateway.reach`) and decided on (the monitor) each
time that one is dialled, however fresh the answer is.

Sandboxes share what was found, but not the room for looking: a zone that never answers holds up whoever asked for it.
"""

from __future__ import annotations

import socket
import time
from collections import OrderedDict
from collections.abc import Callable, Hashable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import Protocol

from corral.policy.names import unmapped
from corral.reactor import Loop

MAX_ADDRESSES = 16
"""Addresses of one name that are looked at."""
MAX_CACHED = 4096
SHORTEST, LONGEST = 1.0, 60.0
"""Seconds for which an answer is kept, whatever it says itself."""
SYSTEM_KEPT = 5.0
"""The same for an answer of the system's resolver, which does not say."""
SILENCE_KEPT = 5.0
"""The same where nothing was said in time."""
MAX_WAITING = 32
"""Names of one owner that are looked up or wait for it."""
TIMEOUT = 10.0
_EACH = 2
"""Threads that one owner's names may hold. getaddrinfo(3) cannot be stopped, however long a server takes."""
_THREADS = 32


@dataclass(frozen=True, slots=True)
class Resolved:
    """What a name leads to: addresses of 4 or 16 bytes in the order of preference, or why there are none."""

    addresses: tuple[bytes, ...]
    kept: float
    """Seconds for which this may be used again."""
    problem: str = ""


CROWDED = Resolved((), 0.0, "too many names are being looked up")
"""The answer where nobody was asked."""
SILENT = Resolved((), SILENCE_KEPT, "the host's resolver is silent")

Done = Callable[[Resolved], None]


class Lookup(Protocol):
    """One way to look a name up."""

    each: int
    """Names of one owner that it is asked for at once."""

    def resolve(self, name: str, done: Done) -> None:
        """Calls ``done`` in the loop's thread, once nothing is held for the name any more, however late that is."""


class SystemLookup:
    """getaddrinfo(3), with all that the host knows (hosts(5), nsswitch.conf(5)), in a few threads."""

    each = _EACH

    def __init__(self, loop: Loop) -> None:
        self._loop = loop
        self._threads: ThreadPoolExecutor | None = None

    def resolve(self, name: str, done: Done) -> None:
        if self._threads is None:
            self._threads = ThreadPoolExecutor(_THREADS, "corral-resolver")
        self._threads.submit(self._work, name, done)

    def _work(self, name: str, done: Done) -> None:
        try:
            found = look_up(name)
        except Exception as error:  # unsaid, it would hold its place for ever
            found = _failed(error)
        self._loop.post(done, found)

    def close(self) -> None:
        """Threads that wait for an answer end with it."""
        if self._threads is not None:
            self._threads.shutdown(wait=False, cancel_futures=True)


def look_up(name: str) -> Resolved:
    """Waits for getaddrinfo(3)."""
    try:
        # The dot of the root: what the host's own search list makes of a name was never decided on.
        found = socket.getaddrinfo(f"{name}.", None, type=socket.SOCK_STREAM)
    except OSError as error:
        return Resolved((), SHORTEST, f"the host cannot find it ({error.strerror or error})")
    except UnicodeError:
        return Resolved((), SHORTEST, "the host cannot find it (no such name)")
    addresses = (unmapped(socket.inet_pton(family, str(address[0]).partition("%")[0])) for family, *_, address in found)
    return Resolved(tuple(dict.fromkeys(addresses))[:MAX_ADDRESSES], SYSTEM_KEPT)


def _failed(error: Exception) -> Resolved:
    return Resolved((), SHORTEST, f"it could not be looked up ({type(error).__name__})")


class _Asker:
    """Somebody who waits; ``done`` is None once answered."""

    __slots__ = ("done",)

    def __init__(self, done: Done) -> None:
        self.done: Done | None = done

    def tell(self, found: Resolved) -> None:
        done, self.done = self.done, None
        if done is not None:
            done(found)


class _Asked:
    """A name that is being looked up, for whoever asks."""

    __slots__ = ("askers", "until")

    def __init__(self, askers: list[_Asker]) -> None:
        self.askers = askers
        self.until = time.monotonic() + TIMEOUT

    @property
    def late(self) -> bool:
        return time.monotonic() >= self.until


class _Share:
    """One owner's part: how many of its names are being looked up, and which wait for their turn.

    What waits is nobody else's: whoever comes with room of its own for the same name does not wait in this queue.
    """

    __slots__ = ("queue", "running")

    def __init__(self) -> None:
        self.running = 0
        self.queue: OrderedDict[str, list[_Asker]] = OrderedDict()


class Resolver:
    """Answers from a small cache, asks once for what several want, and lets nobody wait longer than :data:`TIMEOUT`."""

    def __init__(self, loop: Loop, lookup: Lookup) -> None:
        self._loop, self._lookup = loop, lookup
        self._cache: OrderedDict[str, tuple[float, Resolved]] = OrderedDict()
        self._asked: dict[str, _Asked] = {}
        self._shares: dict[Hashable, _Share] = {}

    def resolve(self, name: str, done: Done, owner: Hashable) -> None:
        """Calls ``done``, which must not raise, with the addresses of ``name``, at once or later. In the loop's thread.
        The look-up is charged to the ``owner`` for whom it begins, until it has ended."""
        known = self._cache.get(name)
        if known is not None and time.monotonic() < known[0]:
            done(known[1])
            return
        asked = self._asked.get(name)
        if asked is not None:
            if asked.late:
                done(SILENT)
            else:
                asked.askers.append(self._asker(name, done, owner))
            return
        share = self._shares.setdefault(owner, _Share())
        if name not in share.queue and share.running + len(share.queue) >= MAX_WAITING:
            done(CROWDED)
            return
        share.queue.setdefault(name, []).append(self._asker(name, done, owner))
        self._next(owner)

    def _asker(self, name: str, done: Done, owner: Hashable) -> _Asker:
        asker = _Asker(done)
        self._loop.call_later(TIMEOUT, self._too_long, name, asker, owner)
        return asker

    def _next(self, owner: Hashable) -> None:
        """Begins what there is room for."""
        share = self._shares.get(owner)
        while share is not None and share.queue and share.running < self._lookup.each:
            name, askers = share.queue.popitem(last=False)
            asked = self._asked.get(name)
            if asked is None:
                self._begin(name, askers, owner, share)
            elif asked.late:  # another owner's
                _tell(askers, SILENT)
            else:
                asked.askers += askers
        self._tidy(owner)

    def _begin(self, name: str, askers: list[_Asker], owner: Hashable, share: _Share) -> None:
        asked = self._asked[name] = _Asked(askers)
        share.running += 1

        def found(answer: Resolved) -> None:
            if self._asked.get(name) is asked:
                share.running -= 1
                self._found(name, asked, answer)
                self._next(owner)

        try:
            self._lookup.resolve(name, found)
        except Exception as error:
            found(_failed(error))

    def _found(self, name: str, asked: _Asked, found: Resolved) -> None:
        del self._asked[name]
        if asked.late:
            found = SILENT  # as everybody was told
        if found.kept > 0:
            self._cache[name] = (time.monotonic() + min(max(found.kept, SHORTEST), LONGEST), found)
            self._cache.move_to_end(name)
            if len(self._cache) > MAX_CACHED:
                self._cache.popitem(last=False)
        waiting = [share.queue.pop(name, []) for share in self._shares.values()]
        for askers in (asked.askers, *waiting):
            _tell(askers, found)

    def _too_long(self, name: str, asker: _Asker, owner: Hashable) -> None:
        if asker.done is None:
            return
        share = self._shares.get(owner)
        queued = [] if share is None else share.queue.get(name, [])
        if share is None or asker not in queued:
            asker.tell(SILENT)
            return
        queued.remove(asker)
        if not queued:
            del share.queue[name]
        asker.tell(CROWDED)
        self._tidy(owner)

    def _tidy(self, owner: Hashable) -> None:
        share = self._shares.get(owner)
        if share is not None and not share.running and not share.queue:
            del self._shares[owner]


def _tell(askers: list[_Asker], found: Resolved) -> None:
    for asker in askers:
        asker.tell(found)
