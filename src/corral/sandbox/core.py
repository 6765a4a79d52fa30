"""One live sandbox, without an event loop of its own: every face (asyncio, the command line) stands on this.

    launching ──READY──▶ running ──ENDED──▶ ended
        └───────FAILED / end of stream──────▲

The core owns the control socket, the descriptors that came with READY, and the table of running execs. It is used
from one thread only, that of its reactor; `kill` alone may be called from any.
"""

from __future__ import annotations

import os
import signal
import threading
import time
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, replace
from enum import Enum
from typing import TYPE_CHECKING, Protocol

from corral.errors import CorralError, ExecError, RequestError, SandboxClosed, WallError
from corral.monitor.records import Glance, Sink, unwritable
from corral.policy.model import SnapshotWhen
from corral.reactor import Reactor, Timer
from corral.sandbox import channel, claims
from corral.sandbox.cgroups import Controller
from corral.sandbox.channel import EndReason, Report, ReportType, Usage
from corral.sandbox.denials import Denial, summary
from corral.sandbox.freezer import Freezer
from corral.sandbox.identity import ROOT_ID
from corral.sandbox.launcher import launch
from corral.sandbox.limits import Accountant, Rlimits, children, descendants, end_all_but, exec_limits
from corral.sandbox.notices import Notices
from corral.sandbox.prepare import Prepared
from corral.sandbox.view import HOME

if TYPE_CHECKING:
    from concurrent.futures import Future

    from corral.log.asciicast import Tape
    from corral.sandbox.copying import Since
    from corral.sandbox.layer import KeptLayer
    from corral.sandbox.restore import Inside
    from corral.sandbox.snapshots import Snapshots

START_TIMEOUT = 30.0
_REMOVAL_TRIES = 40
_NO_USAGE = Usage(0.0, 0.0, 0, 0, 0, 0, 0, 0)
accountant = Accountant()


def _after_fork() -> None:
    """A child has none of its parent's threads, and none of its sandboxes to watch."""
    global accountant
    accountant = Accountant()


os.register_at_fork(after_in_child=_after_fork)


class State(Enum):
    """Where a sandbox is in its life."""

    LAUNCHING = "launching"
    RUNNING = "running"
    FROZEN = "frozen"
    ENDED = "ended"


@dataclass(frozen=True, slots=True)
class Exit:
    """How an exec ended. ``error`` is set when the command never ran."""

    status: int
    """As wait(2) gives it."""
    usage: Usage
    error: CorralError | None = None
    denials: tuple[Denial, ...] = ()
    """What its command and their children were refused, until it ended."""
    denials_dropped: int = 0
    """Refusals beside these."""
    restored: str = ""
    """The layer to which the files were set back meanwhile, if they were."""

    @property
    def code(self) -> int:
        """The exit code, or 128 plus the signal that ended it, as shells count."""
        return 128 + os.WTERMSIG(self.status) if os.WIFSIGNALED(self.status) else os.WEXITSTATUS(self.status)


@dataclass(slots=True)
class _Running:
    on_exit: Callable[[Exit], None]
    on_stop: Callable[[int], None] | None
    step: int
    failure: ExecError | None = None
    restored: str = ""


class Chronicle(Protocol):
    """Is told of the life of a sandbox: of each command before it starts, of going back before it happens (and then
    that is durable), and of snapshots and ends when they have come.

    Each raises where it cannot be recorded; the sandbox then ends (I3).
    """

    def exec_started(self, number: int, step: int, argv: Sequence[str], directory: str, user: int) -> None:
        """``step`` is the one that it begins."""

    def exec_ended(self, number: int, step: int, result: Exit) -> None: ...

    def snapshot_taken(self, layer: KeptLayer) -> None: ...

    def restoring(self, layer: KeptLayer, then: Callable[[Exception | None], None]) -> None:
        """``then`` is called, by any thread, when it is durable, or with why it may never be."""

    def ended(self, reason: str) -> None: ...

    def tape(self, number: int, step: int, argv: Sequence[str], size: tuple[int, int] | None) -> Tape | None:
        """What takes the output of a command, where it is to be kept; whoever reads it writes it there too."""

    @property
    def is_behind(self) -> bool:
        """Whether so much waits to be kept that no more commands should be started before :meth:`catch_up`."""

    def catch_up(self) -> None:
        """Returns when less waits to be kept."""

    def close(self, layer: int) -> None:
        """Returns when all that is kept is durable: nothing is written to tapes any more, nor to the layer (-1 where
        that is gone)."""


class Core:
    """A sandbox from launch to end."""

    def __init__(
        self,
        prepared: Prepared,
        reactor: Reactor,
        sinks: Sequence[Sink] = (),
        chronicle: Chronicle | None = None,
        *,
        glances: Sequence[Glance] = (),
    ) -> None:
        """``sinks`` are told of every decision, beside those of the sandbox itself; ``glances`` of what the gateway
        refused."""
        self.prepared = prepared
        self._chronicle = chronicle
        self.state = State.LAUNCHING
        self.started_at = time.time()
        self.root_fd = -1
        self.layer_fd = -1
        self.listeners: tuple[int, ...] = ()
        self._doors: tuple[int, ...] = ()
        """Where what is sent arrives for the gateway, until that takes them over."""
        self.end_reason = ""
        self.notices = Notices()
        """Told by the monitor what is refused."""
        self._reactor = reactor
        self._execs: dict[int, _Running] = {}
        self._next = 1
        self._failure: WallError | None = None
        self._killed_because = ""
        self._on_ready: Callable[[CorralError | None], None] | None = None
        self._on_end: list[Callable[[], None]] = []
        self._over = False
        self._snapshots: Snapshots | None = None
        self._accounted = False
        self._start_timer: Timer | None = None
        try:
            self._control, self.keeper = launch(prepared.plan, prepared.identity.lease)
        finally:
            prepared.identity.release()
        self._keeper_pidfd = os.pidfd_open(self.keeper)
        self._keeper_lock = threading.RLock()  # signal handlers kill too, in the thread that may have it
        self._standing = threading.RLock()
        self._stop_is_due = False
        """Whether all is to stop as soon as no directory is being moved."""
        self._freezer = Freezer(prepared.groups.path(Controller.FREEZE), self._request)
        # Not before the launcher is at work: until the walls stand there is time to load it.
        from corral.sandbox.supervision import Supervision

        self.supervision = Supervision(
            prepared, self.keeper, (self.notices, *sinks), self.kill, self._stand_still, glances
        )
        self._reactor.add_reader(self._control.fileno(), self._receive)

    # ---- life ----

    def when_ready(self, callback: Callable[[CorralError | None], None]) -> None:
        """Calls back once the walls stand, or with the error why they do not."""
        self._on_ready = callback
        self._start_timer = self._reactor.call_later(START_TIMEOUT, self._start_overdue)

    def when_ended(self, callback: Callable[[], None]) -> None:
        """Calls back when everything is gone and cleaned up, and no snapshot reads the layer any more; at once if it
        is so already."""
        if self._over:
            callback()
        else:
            self._on_end.append(callback)

    def kill(self, reason: str = "killed") -> None:
        """Ends everything inside at once. May be called from any thread, and again."""
        if not self._killed_because:
            self._killed_because = reason
        with self._keeper_lock:
            if self._keeper_pidfd >= 0:
                with suppress(OSError):
                    signal.pidfd_send_signal(self._keeper_pidfd, signal.SIGTERM)

    def close_layer(self) -> None:
        """Lets go of the layer; its changes are gone with it."""
        if self.layer_fd >= 0:
            os.close(self.layer_fd)
            self.layer_fd = -1
        if self.prepared.base is not None:
            self.prepared.base.close()
        claims.release(self.prepared.id)

    def _start_overdue(self) -> None:
        if self.state is State.LAUNCHING:
            self._failure = WallError("start", f"the walls did not stand after {START_TIMEOUT:.0f} s")
            self.kill("start took too long")

    # ---- execs ----

    def exec(
        self,
        argv: Sequence[str],
        stdio: tuple[int, int, int],
        on_exit: Callable[[Exit], None],
        *,
        env: Mapping[str, str] | None = None,
        directory: str | None = None,
        user: int | None = None,
        terminal: bool = False,
        limits: Rlimits | None = None,
        on_stop: Callable[[int], None] | None = None,
    ) -> int:
        """Starts a command with the given descriptors and returns its number; the caller closes its copies of them.

        ``limits`` hold for this command; one that is above the sandbox's own fails as an ExecError (EPERM). Raises
        RequestError for what cannot be asked, SandboxClosed when the sandbox is not running.
        """
        self._require_running()
        uid = self.prepared.options.user if user is None else user
        if not self.prepared.identity.has(uid):
            own = self.prepared.options.user
            raise RequestError(f"user {uid} does not exist in this sandbox; it has user {own} only")
        payload = channel.encode_exec(
            argv,
            self.prepared.environment if env is None else env,
            directory or self.prepared.directory,
            uid,
            uid,
            terminal=terminal,
            limits=exec_limits(limits),
        )
        number = self._next
        self._next = self._next % 0x7FFFFFFF + 1
        where = directory or self.prepared.directory
        step = self.supervision.steps.begin(number)
        if not self._tell(lambda chronicle: chronicle.exec_started(number, step, argv, where, uid)):
            raise SandboxClosed(self._killed_because)
        memfd = channel.sealed_memfd("corral-exec", payload)
        self._execs[number] = _Running(on_exit, on_stop, step)
        self.notices.expect(number)
        try:
            channel.send_request(self._control, channel.Request.EXEC, number, fds=(memfd, *stdio))
        except OSError as error:
            del self._execs[number]
            self.notices.take(number)
            if isinstance(error, BlockingIOError):
                raise RequestError("too many commands are being started at once; try again") from None
            raise SandboxClosed(self.end_reason or self._killed_because or "it is ending") from None
        finally:
            os.close(memfd)
        return number

    def _tell(self, what: Callable[[Chronicle], None]) -> bool:
        """Whether it is recorded, where that is wanted; if it cannot be, this is the end."""
        if self._chronicle is not None:
            try:
                what(self._chronicle)
            except Exception as error:
                self.kill(unwritable(error))
                return False
        return True

    def tape(self, number: int, argv: Sequence[str], size: tuple[int, int] | None = None) -> Tape | None:
        """What is to be given all output of an exec, where it is kept. ``size``: of its terminal, rows and columns."""
        step = self.supervision.steps.of_exec(number)
        return None if self._chronicle is None else self._chronicle.tape(number, step, argv, size)

    @property
    def is_behind(self) -> bool:
        """Whether so much of what execs have written waits for the disk that more of them should wait for that too."""
        return self._chronicle is not None and self._chronicle.is_behind

    def catch_up(self) -> None:
        """Waits for that."""
        if self._chronicle is not None:
            self._chronicle.catch_up()

    def close_chronicle(self) -> None:
        """Waits until what is kept of it, and that it is, is durable. For when its execs and their tapes are over, and
        before its layer is closed. May be called again. Raises PayloadError where something could not be kept."""
        if self._chronicle is not None:
            self._chronicle.close(self.layer_fd)

    def environment(self, user: int | None = None) -> dict[str, str]:
        """The variables of a command that ``user`` runs."""
        environment = dict(self.prepared.environment)
        if user is not None and user != self.prepared.options.user:
            name, home = ("root", "/root") if user == ROOT_ID else ("agent", HOME)
            environment |= {"HOME": home, "USER": name, "LOGNAME": name}
            environment |= dict(self.prepared.options.policy.environment.set)
        return environment

    def signal(self, number: int, which: int) -> None:
        """Sends a signal to the process group of an exec; nothing happens when it has ended."""
        self._request(channel.Request.SIGNAL, number, which)

    def kill_session(self, number: int) -> None:
        """SIGKILL to every process of an exec's session."""
        self._request(channel.Request.KILL_SESSION, number)

    def _request(self, request: channel.Request, number: int = 0, argument: int = 0) -> None:
        """Whatever has ended meanwhile needs no request; its report is on the way, or was read."""
        if self.state is State.ENDED:
            return
        try:
            channel.send_request(self._control, request, number, argument)
        except BlockingIOError:
            self.kill("its first process takes no requests any more")
        except (BrokenPipeError, ConnectionResetError):
            pass

    # ---- freeze ----

    def freeze(self) -> None:
        """Stops every process where it is. Execs can be started again after :meth:`thaw`."""
        self._require_running()
        with self._standing:
            self.supervision.hold_moves(True)
            self._stop_is_due = self.supervision.is_moving
            if self._stop_is_due:
                self._freezer.go_on()  # the deputy may stand still with the rest (version 2), and is to come to an end
            else:
                self._freezer.stop()
            self.state = State.FROZEN

    def _stand_still(self, still: bool) -> None:
        """Freezes while an action is held, where the policy says so. From any thread: the state is not touched."""
        with self._standing:
            if self.state is State.RUNNING:  # else whoever froze it thaws it
                if still:
                    self._freezer.stop()
                else:
                    self._freezer.go_on()

    def frozen(self) -> bool:
        """Whether all have stopped since :meth:`freeze`."""
        if self.state is not State.FROZEN:
            return False
        if self.supervision.is_moving:
            return False
        if self._stop_is_due:
            with self._standing:
                self._stop_is_due = False
                self._freezer.stop()
        return self._freezer.has_stopped(self.keeper, self.supervision.waiting_threads())

    def thaw(self) -> None:
        """Lets all go on."""
        if self.state is State.FROZEN:
            with self._standing:
                self._freezer.go_on()
                self._stop_is_due = False
                self.state = State.RUNNING
                self.supervision.hold_moves(False)
            self.supervision.hold_if_asked()

    def _require_running(self) -> None:
        if self.state is State.FROZEN:
            raise RequestError("the sandbox is frozen; thaw it first")
        if self.state is not State.RUNNING:
            raise SandboxClosed(self.end_reason or "it is not running yet")

    # ---- snapshots ----

    @property
    def snapshots(self) -> Snapshots:
        """Takes them."""
        if self._snapshots is None:
            from corral.sandbox.snapshots import Snapshots

            self._snapshots = Snapshots(self, self._reactor)
        return self._snapshots

    @property
    def since(self) -> Since | None:
        """What the last snapshot has seen, if there was one."""
        return None if self._snapshots is None else self._snapshots.since

    @property
    def is_kept_still(self) -> bool:
        """Whether a snapshot is being taken; no command can be started until :meth:`when_moving`."""
        return self._snapshots is not None and self._snapshots.busy

    @property
    def commands(self) -> int:
        """Changes with each command that is started."""
        return self._next

    def is_alone(self) -> bool:
        """Whether its first process is the only one, and is not about to start another. Who cannot tell says no."""
        first = children(self.keeper)
        return bool(first) and not self._execs and not any(descendants(each) for each in first)

    def when_moving(self, callback: Callable[[], None]) -> None:
        """Calls back when no snapshot is being taken: at once, nearly always."""
        if self._snapshots is None:
            callback()
        else:
            self._snapshots.when_idle(callback)

    @property
    def _keeps_steps(self) -> bool:
        when = self.prepared.options.policy.filesystem.snapshot
        return when is SnapshotWhen.STEP and self.state in (State.RUNNING, State.FROZEN)

    def tell_snapshot(self, layer: KeptLayer) -> bool:
        """Whether it is recorded that there is one; if it cannot be, this is the end."""
        return self._tell(lambda chronicle: chronicle.snapshot_taken(layer))

    def tell_restoring(self, layer: KeptLayer) -> Future[None] | None:
        """Records that its files are about to be set back; what is returned is done when that is durable. None if it
        cannot be: this is the end."""
        from concurrent.futures import Future  # takes long to load

        safe: Future[None] = Future()

        def then(error: Exception | None) -> None:
            if error is None:
                safe.set_result(None)
            else:
                safe.set_exception(SandboxClosed("it cannot be recorded"))

        if self._chronicle is None:
            then(None)
        return safe if self._tell(lambda chronicle: chronicle.restoring(layer, then)) else None

    def end_others(self, to: KeptLayer | None) -> bool:
        """Kills what must not see its files go back to a layer, while all stands still, and notes it for whoever waits
        for commands. Whether any of it is left."""
        if to is None:
            return False
        from corral.policy.matching import Paths

        for running in self._execs.values():
            running.restored = to.id
        keeps = Paths(self.prepared.options.policy.filesystem.restore_keeps)
        return end_all_but(self.keeper, lambda program: bool(keeps.all(program)))

    def open_inside(self) -> Inside:
        """What :meth:`set_back` needs, while all stands still. The caller closes it. Raises CorralError."""
        from corral.sandbox.restore import Inside

        first = children(self.keeper)
        if self.root_fd < 0 or not first:
            raise SandboxClosed("it is ending")
        return Inside.opened(self.root_fd, first[0])

    def set_back(self, layer: KeptLayer, inside: Inside) -> None:
        """Makes its files those of a layer. For a thread of its own, while all stands still. Raises CorralError,
        OSError; its files are neither these nor those then."""
        from corral.sandbox.restore import restore

        restore(self.prepared, self.layer_fd, inside, layer)

    def _keep_step(self, step: int, then: Callable[[CorralError | None], None], tries: int = 3) -> None:
        """A snapshot that policy demands. Where there is none, this is the end: what comes could not be undone."""

        def taken(result: KeptLayer | CorralError) -> None:
            if not isinstance(result, CorralError):
                then(None)
            elif self._keeps_steps and tries > 1:
                self._keep_step(step, then, tries - 1)
            else:
                if self.state is not State.ENDED:
                    self.kill(f"the snapshot of step {step} could not be taken: {result}")
                then(result)

        self.snapshots.take(taken, step=step)

    # ---- reports ----

    def layer_used(self) -> int:
        """Bytes that the layer holds."""
        if self.layer_fd < 0:
            return 0
        status = os.fstatvfs(self.layer_fd)
        return (status.f_blocks - status.f_bfree) * status.f_frsize

    def _receive(self) -> None:
        while self.state is not State.ENDED:
            try:
                report = channel.receive_report(self._control)
            except BlockingIOError:
                return
            except (OSError, CorralError) as error:
                self.kill(f"the control channel broke: {error}")
                self._finish()
                return
            if report is None:
                self._finish()
                return
            self._handle(report)

    def _handle(self, report: Report) -> None:
        if report.type is ReportType.READY:
            self._ready(report)
        elif report.type is ReportType.LISTENER:
            self._supervise(report)
        elif report.type is ReportType.STOPPED and report.id == 0:
            self._freezer.confirm()
        elif report.type is ReportType.FAILED:
            self._failure = WallError(report.step, report.detail, report.error)
        elif report.type is ReportType.ENDED:
            reason = EndReason(report.status)
            self.end_reason = self._killed_because or _REASONS[reason]
        elif (running := self._execs.get(report.id)) is not None:
            if report.type is ReportType.EXEC_FAILED:
                running.failure = ExecError(report.step, report.detail, report.error)
            elif report.type is ReportType.STOPPED:
                if running.on_stop and self.state is State.RUNNING:
                    running.on_stop(report.status)
            elif report.type is ReportType.EXITED:
                del self._execs[report.id]
                self.supervision.flush()
                denials, dropped = self.notices.take(report.id)
                failure = running.failure
                if failure and denials:
                    failure = ExecError(failure.stage, failure.what, failure.errno, summary(denials, dropped))
                self._exec_ended(report.id, running, Exit(report.status, report.usage, failure, denials, dropped))

    def _exec_ended(self, number: int, running: _Running, result: Exit) -> None:
        self._tell(lambda chronicle: chronicle.exec_ended(number, running.step, result))
        # Not while its files go back: whoever hears of the end may end the sandbox.
        self.when_moving(lambda: self._exec_told(running, result))

    def _exec_told(self, running: _Running, result: Exit) -> None:
        if running.restored:
            result = replace(result, restored=running.restored)
        if self._keeps_steps and running.failure is None:
            self._keep_step(running.step, lambda _: running.on_exit(result))
        else:
            running.on_exit(result)

    def _ready(self, report: Report) -> None:
        self.root_fd, self.layer_fd, *listeners = report.fds
        own = len(self.prepared.options.listeners)
        self.listeners, self._doors = tuple(listeners[:own]), tuple(listeners[own:])
        try:
            self.notices.attach(self.layer_fd)
        except OSError as error:
            self._failure = WallError("notices", "the place of what was refused", error.errno or 0)
            self.kill("its notices cannot be written")

    def _supervise(self, report: Report) -> None:
        """The last report of a start: nothing runs before there is somebody who answers."""
        listener, deputy = report.fds
        doors, self._doors = self._doors, ()
        try:
            self.supervision.start(listener, deputy, os.dup(self.root_fd), doors)
        except Exception as error:  # a thread that cannot be started, a library that cannot be loaded
            self._failure = WallError("supervision", f"it cannot be supervised ({type(error).__name__})")
            self.kill("it cannot be supervised")
        if self._failure:
            return
        self.state = State.RUNNING
        if self._start_timer:
            self._start_timer.cancel()
        if self.prepared.groups.path(Controller.MEMORY) is None:
            memory = self.prepared.options.policy.resources.memory
            accountant.watch(self.keeper, memory, self.layer_used, self.kill)
            self._accounted = True
        if self._on_ready:
            if self._keeps_steps:
                self._keep_step(0, self._on_ready)
            else:
                self._on_ready(None)

    def _finish(self) -> None:
        """The control socket has ended, so the keeper has cleaned up or is dead."""
        never_ran = self.state is State.LAUNCHING
        self.state = State.ENDED
        if self._accounted:
            accountant.forget(self.keeper)
        if self._start_timer:
            self._start_timer.cancel()
        self._reactor.remove_reader(self._control.fileno())
        self._control.close()
        # Somebody else in this process may have reaped it (a SIGCHLD handler, waitpid(-1)).
        with suppress(ChildProcessError):
            os.waitpid(self.keeper, 0)
        self._remove_groups(_REMOVAL_TRIES)
        with self._keeper_lock:  # a late kill must not reach whoever gets this descriptor's number next
            keeper, self._keeper_pidfd = self._keeper_pidfd, -1
            os.close(keeper)
        for fd in (self.root_fd, *self.listeners, *self._doors):
            if fd >= 0:
                os.close(fd)
        self.root_fd, self.listeners, self._doors = -1, (), ()
        self.end_reason = self.end_reason or self._killed_because or "the launcher died"
        self.supervision.close()
        self._remove_places()
        execs, self._execs = self._execs, {}
        for number, running in execs.items():
            ended = running.failure or SandboxClosed(self.end_reason)
            self._exec_ended(number, running, Exit(signal.SIGKILL, _NO_USAGE, ended, *self.notices.take(number)))
        self._tell(lambda chronicle: chronicle.ended(self.end_reason))
        self.notices.close()
        if never_ran and self._on_ready:
            error: CorralError | None = self._failure
            if error is None and (self._killed_because or self.end_reason == _REASONS[EndReason.WALL_TIME]):
                error = SandboxClosed(self.end_reason)
            self._on_ready(error or WallError("launcher", f"ended before the walls stood: {self.end_reason}"))
        self.when_moving(self._tell_end)

    def _tell_end(self) -> None:
        self._over = True
        for callback in self._on_end:
            callback()

    def _remove_places(self) -> None:
        """What is left of moves that its end has cut short: second names of files of trees that are whole."""
        if self.layer_fd >= 0 and self.supervision.places:
            from corral.sandbox.leftovers import remove_places

            remove_places(self.layer_fd, self.prepared.view, self.supervision.places)

    def _remove_groups(self, tries: int) -> None:
        """The keeper has removed them, unless it was killed itself."""
        busy = False
        for _, path in self.prepared.groups.paths:
            try:
                os.rmdir(path)
            except FileNotFoundError:
                continue
            except OSError:
                busy = True
        if busy and tries:
            with suppress(RuntimeError):  # the loop is closed: the next start reaps
                self._reactor.call_later(0.05, self._remove_groups, tries - 1)


_REASONS = {
    EndReason.CLOSED: "closed",
    EndReason.KILLED: "killed",
    EndReason.WALL_TIME: "out of wall time",
    EndReason.CONTROLLER: "its controller died",
    EndReason.INIT_DIED: "its first process was killed (out of memory?)",
    EndReason.FAILED: "the walls could not be built",
    EndReason.DEPUTY: "its deputy died",
}
