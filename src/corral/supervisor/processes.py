"""Who acts: the processes of one sandbox, each with the exec that it descends from.

Sessions tell execs apart (docs/supervisor.md, "Attribution"): the leader of an exec names its number when it makes its
session, every later setsid(2) is seen, and nothing else changes a process's session. So neither a double fork, nor a
new parent, nor a new name hides where a process comes from.
"""

from __future__ import annotations

import os
import resource
import signal
from collections import OrderedDict
from collections.abc import Callable
from contextlib import suppress
from dataclasses import replace
from errno import EMFILE, ENFILE
from typing import NamedTuple

from corral.actions import Ancestor, Origin, Process, Program, Subject
from corral.monitor.moments import Identity
from corral.monitor.steps import Causes, Descent
from corral.supervisor import memory

SESSION_MARK = 0x434F5252414C
"""In the first argument register of the setsid(2) of an exec's leader (``protocol.h``); the second is its number."""
MAX_KNOWN = 64
"""Threads of a sandbox that are remembered, each with a descriptor."""
LOOKED_AFTER = 16
"""How many of them are looked at in one go, whether they live."""
MAX_SESSIONS = 4096
MAX_ANCESTORS = 16
MAX_ARGUMENTS_BYTES = 4096
_PIDFD_THREAD = os.O_EXCL


class Actor:
    """A thread that has made a notified call."""

    __slots__ = ("descent", "epoch", "ids", "is_thread", "origin", "pidfd", "process", "repeated", "tid")

    def __init__(
        self, tid: int, pidfd: int, is_thread: bool, process: Process, origin: Origin, descent: Descent | None
    ) -> None:
        """Takes ``pidfd`` over, which is of this very thread or, where not ``is_thread``, of its process."""
        self.tid, self.pidfd, self.is_thread, self.process, self.origin = tid, pidfd, is_thread, process, origin
        self.descent = descent
        """Where somebody asks for it."""
        self.epoch = -1
        """In which the origin is what all comes from that it does."""
        self.ids: tuple[int, int] | None = None
        """User and group on the host, once somebody has looked (:mod:`corral.supervisor.callers`)."""
        self.repeated: dict[int, tuple[Callable[[], bool], int]] = {}
        """By the number of a refused call: what has it counted once more (:meth:`Monitor.repeater`), and its errno."""

    def __del__(self) -> None:
        # A call may need it long after it was forgotten here, and its number must not be another file's by then.
        os.close(self.pidfd)

    def lives(self) -> bool:
        """Whether ``tid`` is still this thread."""
        try:
            signal.pidfd_send_signal(self.pidfd, 0)
        except ProcessLookupError:
            return False
        except PermissionError:
            return True  # it has another id, as may be: it is there
        return True


class Processes:
    """The processes of one sandbox. Used by the supervisor's thread only."""

    def __init__(self, sandbox: str, session: str, keeper: int, causes: Causes | None = None) -> None:
        """``causes`` is who knows of steps, where a model is asked; else an exec's step is its number."""
        self._sandbox, self._session, self._keeper = sandbox, session, keeper
        self._causes = causes
        self._leaders: dict[int, Identity] = {}
        """Who has made a session, by its id, where that is not an exec's first and somebody asks for it."""
        self._known: OrderedDict[int, Actor] = OrderedDict()
        self._execs: dict[int, int] = {}
        """From a session's id to the exec it belongs to."""
        self._first = 0
        """The sandbox's first process, once somebody's parent has shown it."""
        self._executing: OrderedDict[int, bool] = OrderedDict()
        """Processes that may be about to run another program; whether their first thread has them do so."""
        self.nobody = Origin(sandbox, session)
        """Where an action comes from whose process cannot be looked at."""
        # Where the table of descriptors is that full, what is left of it is for others.
        self._last_fd = resource.getrlimit(resource.RLIMIT_NOFILE)[0] * 3 // 4

    def find(self, tid: int, still: Callable[[], bool]) -> Actor:
        """The thread that waits in a notified call; ``still`` says whether it does. Raises OSError where it is gone."""
        actor = self._known.get(tid)
        if actor is not None:
            if actor.lives():
                return actor
            self.forget(tid)
        if self._executing.get(tid):
            del self._executing[tid]  # it is over, one way or the other
        try:
            actor = self._learn(tid, MAX_ANCESTORS)
        except OSError as error:
            if error.errno not in (EMFILE, ENFILE):
                raise
            self.close()
            actor = self._learn(tid, MAX_ANCESTORS)
        if not still():  # the number may have become somebody else's before all this was read
            raise ProcessLookupError
        return actor

    def origin_of(self, actor: Actor, subject: Subject | None) -> Origin:
        """Where an action of this thread comes from, which it tries now."""
        causes = self._causes
        if causes is None or actor.descent is None:
            return actor.origin
        epoch = causes.epoch
        if actor.epoch == epoch and not isinstance(subject, Program):
            return actor.origin
        cause, is_constant = causes.cause(actor.descent, subject)
        origin = actor.origin
        if (origin.step, origin.tool, origin.unexplained) != cause:
            origin = replace(origin, step=cause.step, tool=cause.tool, unexplained=cause.unexplained)
            actor.origin = origin
            actor.repeated.clear()  # they are of another step
        if is_constant:
            actor.epoch = epoch
        return origin

    def is_current(self, actor: Actor) -> bool:
        """Whether its origin is still what it comes from."""
        return self._causes is None or actor.epoch == self._causes.epoch

    def known(self, tid: int) -> Actor | None:
        """Who is remembered by this number, which may be somebody else's by now."""
        return self._known.get(tid)

    def forget(self, tid: int) -> None:
        """What is known of this thread may be no longer true (it runs another program, it has another session)."""
        self._known.pop(tid, None)

    def executes(self, tid: int, pid: int) -> None:
        """Thread ``tid`` is about to have its process ``pid`` run another program, and to be its first thread then.

        Until that is over, what can be seen of the process may be no longer true a moment later. It surely is when the
        thread calls again, but a thread that was not the first one will then have another number.
        """
        self.forget(tid)
        self.forget(pid)
        self._executing[pid] = tid == pid
        if len(self._executing) > MAX_SESSIONS:
            self._executing.popitem(last=False)

    def look_after(self) -> None:
        """Lets go of the dead, some at a time."""
        for _ in range(min(LOOKED_AFTER, len(self._known))):
            tid, actor = self._known.popitem(last=False)
            if actor.lives():
                self._known[tid] = actor
        if self._causes is not None:
            self._causes.look_after()

    def close(self) -> None:
        """Lets go of everything."""
        self._known.clear()

    # ---- sessions ----

    def new_session(self, tid: int, mark: int, number: int) -> None:
        """The thread's process is about to make a session."""
        session = os.getsid(tid)
        self.forget(tid)
        pid = tid if _leads(tid) else _process_of(tid)
        self._leaders.pop(pid, None)
        if session == self._keeper:  # where only the first process is, and what it has just forked
            self._execs[pid] = number if mark == SESSION_MARK else 0
        else:
            if self._causes is not None:
                # What it was born in is settled before it leaves: whoever it forks and gives away has that from it.
                self._leaders[pid] = Identity(pid, self._learn(tid, MAX_ANCESTORS).process.started)
                self.forget(tid)
            self._execs[pid] = self._execs.get(session, 0)
        if len(self._execs) > MAX_SESSIONS:
            self._drop_ended_sessions()

    def _drop_ended_sessions(self) -> None:
        alive = set()
        for name in os.listdir("/proc"):
            if name.isdecimal():
                with suppress(OSError):
                    alive.add(os.getsid(int(name)))
        self._execs = {session: number for session, number in self._execs.items() if session in alive}
        self._leaders = {session: leader for session, leader in self._leaders.items() if session in alive}

    # ---- what /proc says ----

    def _learn(self, tid: int, ancestors: int) -> Actor:
        actor = self._look(tid, ancestors)
        if actor.pidfd > self._last_fd:
            self.close()
        elif tid not in self._executing and actor.is_thread:
            if len(self._known) >= MAX_KNOWN:
                self._known.popitem(last=False)
            self._known[tid] = actor
        return actor

    def _look(self, tid: int, ancestors: int) -> Actor:
        is_thread = True
        try:
            pid, pidfd = tid, os.pidfd_open(tid)
        except OSError as error:
            if error.errno in (EMFILE, ENFILE):
                raise
            pid, pidfd, is_thread = _open_thread(tid)
        try:
            status = _read_status(pid)
            parent = self._parent(status.parent, ancestors)
            process = Process(
                pid,
                _inner_pid(pidfd) if pid == tid else _inner_process(pid),
                status.started,
                _program(pid),
                _arguments(tid, status),
                () if parent is None else _beyond(parent, ancestors),
            )
            session = os.getsid(tid)
            number = self._execs.get(session, 0)
        except BaseException:
            os.close(pidfd)
            raise
        origin = Origin(self._sandbox, self._session, number, number, process)
        descent = None if self._causes is None else self._descent(process, parent, number, session)
        actor = Actor(tid, pidfd, is_thread, process, origin, descent)
        if not actor.lives():  # then some of this may be somebody else's, who has its number now
            raise ProcessLookupError
        if self._causes is not None and descent is not None:
            self._causes.born(descent)
        return actor

    def _descent(self, process: Process, parent: Actor | None, number: int, session: int) -> Descent:
        above = () if parent is None or parent.descent is None else parent.descent.processes
        identity = Identity(process.pid, process.started)
        return Descent((identity, *above[:MAX_ANCESTORS]), number, self._leaders.get(session))

    def _parent(self, pid: int, limit: int) -> Actor | None:
        """A parent within the sandbox, its first process left out; who is known already brings the ancestors that it
        had when it was first seen."""
        if limit <= 0 or pid in (0, self._keeper, self._first):
            return None
        parent = self._known.get(pid)
        if parent is None or not parent.lives():
            self.forget(pid)
            try:
                parent = self._learn(pid, limit - 1)  # it will have other children, and calls of its own
            except OSError:
                return None
        if parent.process.inner_pid <= 1:  # the first process, or one beyond it
            if parent.process.inner_pid == 1:
                self._first = pid
            return None
        return parent


def _beyond(parent: Actor, limit: int) -> tuple[Ancestor, ...]:
    """From the parent outwards."""
    return (Ancestor(parent.process.inner_pid, parent.process.exe), *parent.process.ancestors)[:limit]


class _Status(NamedTuple):
    """Of proc(5), stat."""

    parent: int
    started: int
    arguments: int
    """The address of the arguments, or 0."""
    arguments_end: int


def _read(path: str) -> bytes:
    fd = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
    try:
        return os.read(fd, 4096)
    finally:
        os.close(fd)


def _read_status(pid: int) -> _Status:
    """Raises OSError where it is gone."""
    # The name, in parentheses, may hold anything; what follows its last one are a letter and numbers.
    fields = _read(f"/proc/{pid}/stat").rpartition(b")")[2].split()
    return _Status(int(fields[1]), int(fields[19]), int(fields[45]), int(fields[46]))


def _inner_pid(pidfd: int) -> int:
    """The number inside of a process, or 0 where it is gone: cheaper than anything that /proc has of the process."""
    for line in _read(f"/proc/self/fdinfo/{pidfd}").split(b"\n"):
        if line.startswith(b"NSpid:"):
            return int(line.split()[-1])
    return 0


def _inner_process(pid: int) -> int:
    for line in _read(f"/proc/{pid}/status").split(b"\n"):
        if line.startswith(b"NStgid:"):
            return int(line.split()[-1])
    return 0


def _leads(tid: int) -> bool:
    """Whether this thread is a process's first: others have no pidfd of this kind."""
    try:
        os.close(os.pidfd_open(tid))
    except OSError:
        return False
    return True


def _process_of(tid: int) -> int:
    """The process of a thread. Raises OSError where it is gone."""
    for line in _read(f"/proc/{tid}/status").split(b"\n"):
        if line.startswith(b"Tgid:"):
            return int(line[5:])
    raise ProcessLookupError


def _open_thread(tid: int) -> tuple[int, int, bool]:
    """The process of a thread that is not its first, a pidfd, and whether that is the thread's own. Raises OSError if
    it is gone."""
    pid = _process_of(tid)
    try:
        return pid, os.pidfd_open(tid, _PIDFD_THREAD), True
    except OSError as error:
        if error.errno in (EMFILE, ENFILE):
            raise
        return pid, os.pidfd_open(pid), False  # before Linux 6.9 only processes have one


def _program(pid: int) -> str:
    try:
        return os.readlink(f"/proc/{pid}/exe")
    except OSError:
        return ""  # not dumpable: it has made itself unreadable


def _arguments(tid: int, status: _Status) -> tuple[str, ...]:
    try:
        length = min(max(0, status.arguments_end - status.arguments), MAX_ARGUMENTS_BYTES)
        text = memory.read(tid, status.arguments, length).rstrip(b"\0")
    except OSError:
        return ()
    return tuple(part.decode("utf-8", "replace") for part in text.split(b"\0")) if text else ()
