"""The supervisor: one thread of the controlling process that answers the notified calls of all its sandboxes.

It takes one notification of each sandbox in turn, so a flood in one leaves the others their share, and it never blocks:
what is not answered at once stays in ``open`` until it is. What goes wrong while a call is handled denies that call;
what goes wrong with a listener ends its sandbox. While this thread does not run, calls wait; when the process is gone,
the keeper kills the sandbox.
"""

from __future__ import annotations

import errno as errors
import os
import select
import threading
import time
from collections.abc import Callable
from contextlib import suppress
from functools import partial
from typing import TYPE_CHECKING, Any

from corral.actions import KernelCall, Kind, Socket, Verdict
from corral.guarded import Guarded
from corral.monitor.core import Monitor
from corral.monitor.steps import Causes
from corral.reactor import Loop
from corral.supervisor import listener, moving
from corral.supervisor.budget import Budget, raise_limit
from corral.supervisor.call import Call
from corral.supervisor.digests import Digests
from corral.supervisor.filter import Class, Row, Table
from corral.supervisor.handlers import HANDLERS
from corral.supervisor.listener import Notification
from corral.supervisor.moving import UNDECIDED, Moves, restrict_self
from corral.supervisor.processes import Processes
from corral.supervisor.stalls import Watchdog
from corral.supervisor.tree import Tree
from corral.supervisor.unread import Unread
from corral.supervisor.watching import Watch

if TYPE_CHECKING:
    from corral.supervisor.deputy import Deputy
    from corral.supervisor.egress import Egress

LOOK_AFTER = 0.1
"""Seconds between two looks whether those who wait are still there."""
LOOKED_AFTER = 256
"""How many of a sandbox's are looked for in one go: for each the kernel goes through all that wait."""
MAX_REPEATED = 16
"""Refused calls of one thread that have a short way at a time."""
_SOCKETS = frozenset(("socket", "socketpair"))
_FAILED = "its supervisor failed"
_TOO_MANY = "so many calls of this sandbox wait already that no descriptors are left for another"
_OURS = frozenset((errors.EPERM, errors.EACCES, errors.EMFILE, errors.ENFILE, errors.ENOMEM))
"""What is a refusal, and recorded, also where nobody was asked: our own rules, and what we have run out of."""


class Supervised:
    """One sandbox, as the supervisor sees it. ``end`` may be called from any thread; all else is the supervisor's."""

    def __init__(
        self,
        *,
        sandbox: str,
        session: str,
        keeper: int,
        listener_fd: int,
        deputy_fd: int,
        root_fd: int,
        table: Table,
        monitor: Monitor,
        end: Callable[[str], None],
        tick: Callable[[], None] = lambda: None,
        exec_rules: bool = False,
        watched: tuple[str, ...] = (),
        moves: bool = True,
        egress: Egress | None = None,
        causes: Causes | None = None,
    ) -> None:
        """Takes the three descriptors over."""
        self.name = sandbox
        self.listener = listener_fd
        self.tree = Tree(root_fd)
        self.exec_rules = exec_rules
        """Whether the policy has rules about programs that could refuse one."""
        self.watch = Watch(watched)
        """Names of files that are decided on."""
        self.moves = Moves(self, off=not moves)
        self._renames = {} if self.watch else moving.short_ways(table)
        self.egress = egress
        """The way out, where there is one."""
        self._deputy_fd = deputy_fd
        self._deputy: Deputy | None = None
        self.table = table
        self.monitor = monitor
        self.processes = Processes(sandbox, session, keeper, causes)
        self.digests = Digests(time.time_ns(), self.post)
        self.open: dict[int, Call] = {}
        """Calls that wait for their answer."""
        self.held = 0
        """Descriptors that they may hold."""
        self._looked_at = 0
        """How many of them were looked for in this round."""
        self.end = end
        self.tick = tick
        """Called every :data:`LOOK_AFTER` seconds or so while there is something to do."""
        self.network = b""
        """The cookie of its network namespace, once a socket has shown it."""
        self.unread = Unread()
        self.id_maps: tuple[tuple[tuple[int, int, int], ...], tuple[tuple[int, int, int], ...]] | None = None
        """Its users and groups (:mod:`corral.supervisor.callers`), once a process has shown them."""
        self._service: Supervisor | None = None
        self._loop: Guarded | None = None
        self._thread = 0
        """The supervisor's, once it is supervised."""

    # ---- life ----

    def start(self, service: Supervisor) -> None:
        self._service, self._thread = service, threading.get_ident()
        self._loop = Guarded(service.loop, self._failed)
        listener.wake_in_step(self.listener)
        service.loop.add_reader(self.listener, self._notified)

    @property
    def loop(self) -> Guarded:
        """The supervisor's, for this sandbox's work."""
        if self._loop is None:
            raise RuntimeError("it is not supervised yet")
        return self._loop

    def _failed(self, error: Exception) -> None:
        """Something went wrong where no call could be denied: nobody knows what waits for it."""
        self.end(f"{_FAILED} ({type(error).__name__})")
        self.close()

    @property
    def deputy(self) -> Deputy:
        """Who works in the sandbox's file tree."""
        if self._deputy is None:
            from corral.supervisor.deputy import Deputy  # most sandboxes never need it

            self._deputy = Deputy(self._deputy_fd, self.loop, on_lost=self._deputy_lost)
            self._deputy_fd = -1
        return self._deputy

    def _deputy_lost(self) -> None:
        if self.listener >= 0:
            self.end("its deputy is gone")

    def on_own_thread(self) -> bool:
        """Whether this is the supervisor's thread."""
        return threading.get_ident() == self._thread

    def post(self, callback: Callable[..., object], *args: Any) -> None:
        """Has the supervisor's thread call this."""
        self.loop.post(callback, *args)

    def waiting_threads(self) -> frozenset[int]:
        """Those whose calls are not answered yet. From any thread."""
        return frozenset(call.tid for call in tuple(self.open.values()))

    def close(self) -> None:
        """Nobody inside can call any more, or nobody is to be answered any more."""
        if self.listener < 0:
            return
        if self._service is not None:
            self._service.loop.remove_reader(self.listener)
        for call in list(self.open.values()):
            call.gone()
        self.processes.close()
        self.digests.close()
        os.close(self.listener)
        self.listener = -1
        self.tree.close()
        if self._deputy is not None:
            self._deputy.close()
        elif self._deputy_fd >= 0:
            os.close(self._deputy_fd)
        if self._service is not None:
            self._service.forget(self)

    def abandon(self) -> None:
        """In a child of the controlling process: answers nothing, and keeps nothing from ending."""
        for fd in (self.listener, self._deputy_fd):
            if fd >= 0:
                os.close(fd)
        self.listener = self._deputy_fd = -1

    # ---- calls ----

    def _notified(self) -> None:
        if self._service is None or not self._service.loop.events & select.EPOLLIN:
            self.close()  # the last process that had the filter is gone
            return
        try:
            notification = listener.receive(self.listener)
            if notification is None:
                return
            rename = self._renames.get(notification.number)
            if rename is not None and moving.goes_on(self, notification, rename):
                return
            if not self._repeats(notification):
                self._serve(notification)
        except Exception as error:
            self.end(f"its supervisor lost the listener ({type(error).__name__})")
            self.close()

    def _repeats(self, notification: Notification) -> bool:
        """The short way for a call that its thread makes over and over, and that is refused whatever its arguments."""
        actor = self.processes.known(notification.tid)
        if actor is None or not actor.repeated:
            return False
        known = actor.repeated.get(notification.number)
        if known is None or not actor.lives() or not self.processes.is_current(actor):
            return False
        repeated, errno = known
        if not repeated():
            del actor.repeated[notification.number]
            return False
        listener.answer(self.listener, notification.id, 0, errno)
        return True

    def _serve(self, notification: Notification) -> None:
        row = self.table.find(notification.number, notification.arguments)
        call = Call(self, notification, row.name)
        self.open[call.id] = call
        try:
            if self.held and row.kind is Class.DECIDED and not self._budget.admits(self.held, row.name):
                if row.name in UNDECIDED and not self.watch:
                    call.proceed()
                else:
                    call.refuse(errors.ENFILE, _TOO_MANY)
                return
            self._handle(call, row)
            if row.kind is Class.DECIDED and not call.answered:
                self._count(call)
        except OSError as error:
            errno = error.errno or errors.EPERM
            if errno in _OURS and not call.judged and call.waits():  # who is gone has tried nothing
                call.refuse(errno, f"it could not be made for its caller ({os.strerror(errno)})")
            call.fail(errno)
        except Exception as error:
            self.fault(call, error)

    @property
    def _budget(self) -> Budget:
        if self._service is None:
            raise RuntimeError("it is not supervised yet")
        return self._service.budget

    def _count(self, call: Call) -> None:
        """It waits, and holds descriptors meanwhile."""
        call.is_counted = True
        self.held += call.holds
        self._budget.held += call.holds

    def uncount(self, call: Call) -> None:
        """It waits no longer."""
        call.is_counted = False
        self.held -= call.holds
        self._budget.held -= call.holds

    def _handle(self, call: Call, row: Row) -> None:
        if row.kind is Class.DECIDED:
            handler = HANDLERS.get(row.name)
            if handler is None:
                call.decide(Kind.KERNEL, KernelCall(row.name, errors.EPERM, "nothing here can judge it"), _nothing)
                call.fail(errors.EPERM)
            else:
                handler(call)
            return
        subject = KernelCall(row.name, row.errno, row.reason, row.quiet)
        if row.kind is Class.ASKED:
            proceed = partial(restrict_self, call) if row.name in moving.HANDLERS else call.proceed
            call.decide(Kind.KERNEL, subject, proceed, refused=row.errno)
            return
        if row.name in _SOCKETS and not row.quiet:
            wanted = Socket(call.low(0), call.low(1), call.low(2))
            call.decide(Kind.NET_SOCKET, wanted, _nothing, refused=row.errno, at_least=Verdict.DENY)
        else:
            action = call.decide(Kind.KERNEL, subject, _nothing, refused=row.errno, at_least=Verdict.DENY)
            if self.table.is_constant(call.number) and (repeated := self.monitor.repeater(action)):
                if len(call.actor.repeated) >= MAX_REPEATED:  # there are more numbers than calls
                    call.actor.repeated.clear()
                call.actor.repeated[call.number] = (repeated, row.errno)
        call.fail(row.errno)  # whatever anybody thinks of it

    def fault(self, call: Call, error: Exception) -> None:
        """A fault of ours: the call is denied, and the record says why."""
        if not call.answered:
            with suppress(Exception):
                call.refuse(errors.EPERM, f"the supervisor failed ({type(error).__name__})")
            call.fail(errors.EPERM)

    def look_after(self) -> None:
        """Lets go of the dead."""
        self.processes.look_after()
        calls = list(self.open.values())
        if self._looked_at >= len(calls):
            self._looked_at = 0
        for call in calls[self._looked_at : self._looked_at + LOOKED_AFTER]:
            if call.waits():
                self._looked_at += 1
            else:
                call.gone()
        self.tick()


def _nothing() -> None:
    """A refused call has no effect, whatever the verdict."""


class Supervisor:
    """The thread."""

    def __init__(self) -> None:
        self.loop = Loop()
        self.loop.accept_posts()
        self.budget = Budget(raise_limit())
        self._sandboxes: set[Supervised] = set()
        self._looks = self._failed = False
        self._watchdog: Watchdog | None = None
        self._thread = threading.Thread(target=self._run, name="corral-supervisor", daemon=True)
        self._thread.start()

    def attach(self, sandbox: Supervised) -> None:
        """From here on its calls are answered. May be called from any thread."""
        self._sandboxes.add(sandbox)
        self.loop.post(self._safely, sandbox, partial(self._start, sandbox))
        if self._failed:
            sandbox.end(_FAILED)

    def _start(self, sandbox: Supervised) -> None:
        if not self._looks:
            self._look_after()
        sandbox.start(self)

    def detach(self, sandbox: Supervised) -> None:
        """Its calls are answered no more; it must be dead. May be called from any thread."""
        self.loop.post(self._safely, sandbox, sandbox.close)

    def forget(self, sandbox: Supervised) -> None:
        self._sandboxes.discard(sandbox)

    def abandon(self) -> None:
        """In a child of the process: what came with the fork is let go of, as the parent uses it."""
        self.loop.close()
        for sandbox in self._sandboxes:
            sandbox.abandon()

    def _safely(self, sandbox: Supervised, work: Callable[[], None]) -> None:
        """What goes wrong with one sandbox is the end of that one."""
        try:
            work()
        except Exception as error:
            sandbox.end(f"its supervisor failed ({type(error).__name__})")

    def _look_after(self) -> None:
        for sandbox in list(self._sandboxes):
            self._safely(sandbox, sandbox.look_after)
        self._looks = bool(self._sandboxes)
        if self._watchdog is not None:
            self._watchdog.watch(self._looks)
        if self._looks:
            self.loop.call_later(LOOK_AFTER, self._look_after)

    def _run(self) -> None:
        global _shared
        try:
            self._watchdog = Watchdog(lambda: 0 if self.loop.idle else self.loop.turn)
            self.loop.run()
        finally:
            if self._watchdog is not None:
                self._watchdog.end()
            # Nobody answers any more.
            self._failed = True
            if _shared is self:
                _shared = None
            for sandbox in list(self._sandboxes):
                sandbox.end(_FAILED)


_shared: Supervisor | None = None
_lock = threading.Lock()


def shared() -> Supervisor:
    """The supervisor of this process; started with the first sandbox."""
    global _shared
    with _lock:
        if _shared is None:
            _shared = Supervisor()
        return _shared


def _after_fork() -> None:
    """A child has none of its parent's threads, and none of its sandboxes to answer."""
    global _shared, _lock
    parents, _shared, _lock = _shared, None, threading.Lock()
    if parents is not None:
        parents.abandon()


os.register_at_fork(after_in_child=_after_fork)
