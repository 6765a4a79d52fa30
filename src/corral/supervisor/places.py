"""Where a caller's path leads, found with the caller's rights (by the deputy) before anything is done there."""

from __future__ import annotations

import os
import re
from collections.abc import Callable
from contextlib import ExitStack
from errno import EBUSY, EINVAL, EISDIR, ELOOP, ENOENT
from functools import partial
from typing import NamedTuple

from corral.actions import Kind, Subject
from corral.openat2 import Resolve
from corral.supervisor import callers
from corral.supervisor.call import Call
from corral.supervisor.deputy_wire import Reply
from corral.supervisor.tree import starting_point
from corral.supervisor.waiting import FIRST_PAUSE, LAST_PAUSE

_AT_FDCWD = -100
_OWN_LINKS = re.compile(rb"/(?:proc/(?:thread-)?self|dev/(?:fd|stdin|stdout|stderr))(?:/|\Z)")
_OF_PROCESS = re.compile(r"/proc/(\d+)(?:/|\Z)")
_WITHIN = Resolve.BENEATH | Resolve.IN_ROOT
TOO_DEEP = "it lies so deep that its path cannot be told, so no rule about files could know it"


class Place(NamedTuple):
    """An object that is there."""

    fd: int
    """O_PATH, or a copy of the caller's own descriptor; closed with the work. -1 for one in :attr:`own`."""
    path: str
    """Inside, links resolved; empty where it has no name (a pipe, a deleted file)."""
    own: str = ""
    """A path below /proc/PID of the caller itself."""


class Entry(NamedTuple):
    """A name in a directory, whether or not anything has it."""

    directory: int
    path: str
    name: str
    has_slash: bool
    """Whether it was written as a directory's name."""


class Work:
    """One call on files, with all that it holds. Ends by :meth:`fail`, :meth:`finish` or :meth:`close`."""

    def __init__(self, call: Call) -> None:
        self.call = call
        self.caller = callers.identify(call)
        self.held = ExitStack()

    def close(self) -> None:
        self.held.close()

    def fail(self, errno: int) -> None:
        self.close()
        self.call.fail(errno)

    def refuse(self, errno: int, reason: str) -> None:
        """Fails, and has it recorded."""
        self.close()
        self.call.refuse(errno, reason)

    def finish(self, reply: Reply) -> None:
        """The deputy's answer is the call's."""
        if reply.errno:
            self.fail(reply.errno)
        else:
            self.close()
            self.call.succeed()

    def run(self, step: Callable[[], None]) -> None:
        """One step; what goes wrong in it is the call's answer."""
        try:
            step()
        except OSError as error:
            self.fail(error.errno or EINVAL)
        except Exception as error:
            self.close()
            self.call.sandbox.fault(self.call, error)

    def ask(self, request: Callable[[Callable[[Reply], None]], int], done: Callable[[Reply], None]) -> None:
        """Has the deputy do what waits for nobody. It is done even if the caller dies meanwhile.

        Where the deputy has too much to do it is tried again, until the caller is gone.
        """
        gone = False
        pause = FIRST_PAUSE

        def again() -> None:
            if not gone and not self.call.answered:
                self.run(start)

        def replied(reply: Reply) -> None:
            nonlocal pause
            if reply.busy and not gone and not self.call.answered:
                self.call.sandbox.loop.call_later(pause, again)
                pause = min(pause * 2, LAST_PAUSE)
                return
            if reply.fd >= 0:
                self.held.callback(os.close, reply.fd)
            if gone or self.call.answered:
                self.close()
            else:
                self.call.when_gone = None
                self.run(lambda: done(reply))

        def left() -> None:
            nonlocal gone
            gone = True
            self.close()

        def start() -> None:
            request(replied)

        self.call.when_gone = left
        start()

    def decide(self, kind: Kind, subject: Subject, effect: Callable[[], None]) -> None:
        self.call.when_gone = self.close
        self.call.decide(kind, subject, lambda: self.run(effect))


# ---- objects ----


def find(
    work: Work,
    directory: int,
    path: bytes,
    found: Callable[[Place], None],
    failed: Callable[[int], None],
    *,
    follow: bool,
    must_be_directory: bool = False,
    resolve: int = 0,
) -> None:
    """Finds what ``path`` leads to from the caller's descriptor ``directory``; ``resolve`` as in openat2(2)."""
    call = work.call
    if not path:
        failed(ENOENT)
        return
    may_be_own = not resolve & ~Resolve.NO_MAGICLINKS
    if may_be_own and (_OWN_LINKS.match(path) or path.startswith(b"/proc/%d/" % call.actor.process.inner_pid)):
        _walk(work, directory, path, found, failed, follow=follow, must_be_directory=must_be_directory, resolve=resolve)
        return
    start = None
    if not path.startswith(b"/") or resolve & _WITHIN:
        start = starting_point(call, directory)
        work.held.callback(os.close, start)

    def resolved(reply: Reply) -> None:
        if reply.errno == ENOENT and may_be_own and call.sandbox.tree.may_lead_to_own(call, directory, path):
            _walk(
                work,
                directory,
                path,
                found,
                failed,
                follow=follow,
                must_be_directory=must_be_directory,
                resolve=resolve,
            )
        elif reply.errno:
            failed(reply.errno)
        else:
            found(_place(work, reply))

    _resolve(work, path, start, resolved, follow=follow, must_be_directory=must_be_directory, resolve=resolve)


def _resolve(
    work: Work,
    path: bytes,
    start: int | None,
    resolved: Callable[[Reply], None],
    *,
    follow: bool,
    must_be_directory: bool,
    resolve: int = 0,
) -> None:
    """Has the deputy find something. What is there and cannot be named is refused, whatever was wanted of it: it could
    have a watched name, or be moved to where it has one."""

    def named(reply: Reply) -> None:
        if reply.errno and reply.value:
            work.refuse(reply.errno, TOO_DEEP)
        else:
            resolved(reply)

    deputy = work.call.sandbox.deputy
    request = partial(
        deputy.resolve,
        work.caller,
        os.fsdecode(path),
        start=start,
        follow=follow,
        directory=must_be_directory,
        resolve=resolve,
    )
    work.ask(request, named)


def _place(work: Work, reply: Reply) -> Place:
    of_process = _OF_PROCESS.match(reply.path)
    if of_process and int(of_process[1]) == work.call.actor.process.inner_pid:
        return Place(-1, reply.path, reply.path)
    return Place(reply.fd, reply.path)


def _walk(
    work: Work,
    directory: int,
    path: bytes,
    found: Callable[[Place], None],
    failed: Callable[[int], None],
    *,
    follow: bool,
    must_be_directory: bool,
    resolve: int,
) -> None:
    """Through the caller's own entries in /proc, which only the caller and the supervisor can follow."""
    try:
        lead = work.call.sandbox.tree.lead(work.call, directory, path, follow=follow)
    except OSError as error:
        failed(error.errno or ENOENT)
        return
    if lead is None:
        failed(ENOENT)
        return
    if lead.own:
        found(Place(-1, lead.own, lead.own))
        return
    work.held.callback(os.close, lead.fd)
    if resolve:
        failed(ELOOP)
        return

    def resolved(reply: Reply) -> None:
        if reply.errno:
            failed(reply.errno)
        elif lead.rest:
            found(_place(work, reply))
        else:
            found(Place(lead.fd, reply.path))  # as it is: what a pipe or a deleted file is known by

    follow = follow or not lead.rest
    _resolve(work, lead.rest, lead.fd, resolved, follow=follow, must_be_directory=must_be_directory)


def find_descriptor(work: Work, number: int, found: Callable[[Place], None]) -> None:
    """The object behind a descriptor of the caller. Raises OSError (EBADF)."""
    fd = work.call.take_number(number)
    work.held.callback(os.close, fd)

    def resolved(reply: Reply) -> None:
        if reply.errno:
            work.fail(reply.errno)
        else:
            found(Place(fd, reply.path))

    _resolve(work, b"", fd, resolved, follow=True, must_be_directory=False)


# ---- names ----


def find_entry(
    work: Work,
    directory: int,
    path: bytes,
    found: Callable[[Entry], None],
    *,
    special: dict[bytes, int],
    resolve: int = 0,
) -> None:
    """Finds the directory of the last name of a path. ``special`` are the errnos of ``.``, ``..`` and no name at all.

    The call fails where there is none.
    """
    if not path:
        work.fail(ENOENT)
        return
    above, slash, name = path.rstrip(b"/").rpartition(b"/")
    if name in special:
        work.fail(special[name])
        return

    def parent(place: Place) -> None:
        if place.own:
            work.fail(ENOENT)  # nothing can be made or taken away there
            return
        if not place.path:
            work.fail(ENOENT)  # it was removed
            return
        full = os.path.join(place.path, os.fsdecode(name))
        found(Entry(place.fd, full, os.fsdecode(name), path.endswith(b"/")))

    above = above + slash or b"."
    find(work, directory, above, parent, work.fail, follow=True, must_be_directory=True, resolve=resolve)


NOT_REMOVED = {b".": EISDIR, b"..": EISDIR, b"": EISDIR}
NOT_MOVED = {b".": EBUSY, b"..": EBUSY, b"": EBUSY}
