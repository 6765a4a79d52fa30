"""``corral.Sandbox``: one contained place, for asyncio programs.

    async with Sandbox(workspace="/path/to/project") as box:
        result = await box.exec(["python3", "-m", "pytest"], timeout=60)
        print(result.exit_code, result.text)

The class is a thin face of :class:`corral.sandbox.core.Core`: it turns callbacks into awaitables and collects output.
It belongs to the event loop in which it was started. :class:`corral.sandbox.sync.SyncSandbox` is the same for programs
without one.
"""

from __future__ import annotations

import asyncio
import copy
import os
import time
from collections.abc import Callable, Mapping, Sequence
from contextlib import closing, suppress
from dataclasses import replace
from functools import partial
from types import TracebackType
from typing import TYPE_CHECKING, TypeVar

from corral.actions import Flow
from corral.errors import CorralError, RequestError, SandboxClosed
from corral.policy.model import Policy
from corral.sandbox import claims, registry
from corral.sandbox.changes import Change, changes
from corral.sandbox.core import Core, Exit, State
from corral.sandbox.denials import set_back, stderr_line
from corral.sandbox.files import READ_LIMIT, Download, FileInfo, Files
from corral.sandbox.keeping import keep
from corral.sandbox.layer import KeptLayer
from corral.sandbox.limits import Rlimits
from corral.sandbox.options import Listener, Options, user_id
from corral.sandbox.ownership import owner_map
from corral.sandbox.prepare import prepare
from corral.sandbox.process import Process
from corral.sandbox.results import ExecResult, Stats
from corral.sandbox.stats import read_stats
from corral.sandbox.streams import Collector, Feeder, make_pipe

if TYPE_CHECKING:
    from corral.brokers.model.capture import Capture
    from corral.log.writer import Log

T = TypeVar("T")


class Sandbox:
    """A contained place to run commands in. Starts with :meth:`start` or ``async with``, ends with :meth:`close`.

    ``workspace`` is shown copy-on-write at its own path; ``user`` is ``agent``, ``root`` (of the sandbox, without any
    capability) or a number; ``root`` is an unpacked root file system to use instead of the host's system trees;
    ``listeners`` are TCP ports inside that this process accepts on (see :attr:`listeners`). ``keep`` decides whether
    changes outlive the sandbox as a layer (see :attr:`kept`). What happens is recorded in ``log``, which several
    sandboxes may share and which the caller closes; if it cannot be, the sandbox ends.
    It begins ``on`` a kept layer of the same workspace, or on the host as it is. ``capture`` makes what answers of
    models are recorded in, or given again from (:class:`corral.brokers.model.capture.Capture`).
    """

    def __init__(
        self,
        workspace: str | os.PathLike[str],
        *,
        policy: Policy | None = None,
        user: str | int = "agent",
        root: str | os.PathLike[str] | None = None,
        listeners: Sequence[Listener] = (),
        environment: Mapping[str, str] | None = None,
        keep: bool = False,
        label: str = "",
        log: Log | None = None,
        on: KeptLayer | None = None,
        capture: Callable[[], Capture] | None = None,
    ) -> None:
        self._log = log
        hidden: tuple[str, ...] = ()
        if log is not None:
            from corral.log.places import files_of, make_payloads

            if policy is not None and policy.log.keep:
                make_payloads(log.directory)
            hidden = files_of(log.directory)
        self._options = Options(
            workspace=os.fspath(workspace),
            policy=policy or Policy(),
            user=user_id(user),
            root=None if root is None else os.fspath(root),
            listeners=tuple(listeners),
            environment=os.environ if environment is None else environment,
            label=label,
            on=on.id if on is not None else None,
            hidden=hidden,
            log=("", "") if log is None else (os.path.abspath(log.directory), log.origin),
            keep=keep,
            capture=capture,
        )
        self._keep = keep
        self._reset()

    def _reset(self) -> None:
        """Nothing has run yet."""
        self._alone = asyncio.Lock()
        self._core: Core | None = None
        self._ended = asyncio.Event()
        self._closing: asyncio.Task[None] | None = None
        self._processes: set[Process] = set()
        self.kept: KeptLayer | None = None
        """The layer that was kept, once the sandbox is closed; None where nothing was changed."""

    # ---- life ----

    async def start(self) -> Sandbox:
        """Builds the walls. Raises RequestError for options that cannot be met, WallError where walls cannot stand."""
        if self._core is not None:
            raise RequestError("this sandbox has been started already")
        loop = asyncio.get_running_loop()
        core = self._make(loop)
        ready: asyncio.Future[None] = loop.create_future()
        core.when_ready(lambda error: _resolve(ready, error))
        core.when_ended(self._ended.set)
        self._core = core
        try:
            await ready
        except BaseException:
            core.kill("cancelled")
            await asyncio.shield(self._ended.wait())
            core.close_layer()
            with suppress(CorralError):  # there was nothing to keep
                await asyncio.to_thread(core.close_chronicle)
            raise
        registry.register(core, loop)
        return self

    def _make(self, loop: asyncio.AbstractEventLoop) -> Core:
        prepared = prepare(self._options)
        try:
            if self._log is None:
                return Core(prepared, loop)
            from corral.sandbox.recording import recorded

            return recorded(self._log, prepared, loop)
        except BaseException:
            claims.release(prepared.id)
            if prepared.base is not None:
                prepared.base.close()
            raise

    async def close(self) -> None:
        """Ends everything inside; keeps the changes where that was asked for. May be called again, and by several at
        once; who is cancelled meanwhile stops nothing but its own waiting."""
        core = self._core
        if core is None or (self._closing is not None and self._closing.done()):
            return
        if self._closing is None:
            if core.state is State.ENDED and core.layer_fd < 0:  # it never began
                return
            self._closing = asyncio.get_running_loop().create_task(self._close(core))
        await asyncio.shield(self._closing)

    async def _close(self, core: Core) -> None:
        core.kill("closed")
        await self._ended.wait()
        for process in list(self._processes):
            process.release()
        self._processes.clear()
        registry.unregister(core)
        if self._log is None and not self._keep:
            core.close_layer()
        else:
            await asyncio.to_thread(self._put_away, core)

    def _put_away(self, core: Core) -> None:
        """In one thread to its end, so that nothing can close the layer under it."""
        try:
            try:
                core.close_chronicle()
            finally:
                if self._keep:
                    self.kept = keep(core.prepared, core.layer_fd, since=core.since)
        finally:
            core.close_layer()

    async def __aenter__(self) -> Sandbox:
        return await self.start()

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        await self.close()

    async def wait_ended(self) -> str:
        """Waits until the sandbox has ended, by whatever, and returns why."""
        await self._ended.wait()
        return self.core.end_reason

    def kill(self, reason: str = "killed") -> None:
        """Ends everything inside at once. May be called from any thread."""
        self.core.kill(reason)

    async def freeze(self) -> None:
        """Stops every process where it is, until :meth:`thaw`; returns once the kernel says that all have stopped."""
        async with self._alone:
            await self._moving()
            self.core.freeze()
            await self._stand_still()

    async def _stand_still(self) -> None:
        deadline = time.monotonic() + 10
        while not self.core.frozen():
            if self.core.state is not State.FROZEN:
                raise SandboxClosed(self.core.end_reason or "it is ending")
            if time.monotonic() > deadline:
                self.core.kill("it could not be frozen")
                raise SandboxClosed("it could not be frozen")
            await asyncio.sleep(0.001)

    async def snapshot(self, name: str = "") -> KeptLayer:
        """Keeps its files as they are at this moment as a layer, on which others can begin. Everything stands still
        meanwhile. Raises CorralError where that cannot be, also where something has gone on all the same."""
        async with self._alone:
            core = self.core
            taken: asyncio.Future[KeptLayer | CorralError] = asyncio.get_running_loop().create_future()
            taking = core.snapshots.take(lambda result: _set(taken, result), name=name)
            try:
                result = await asyncio.shield(taken)
            except asyncio.CancelledError:
                taking.abandoned = True
                raise
            if isinstance(result, CorralError):
                raise result
            return result

    async def fork(self, count: int = 1) -> list[Sandbox]:
        """Starts others that begin with the files that this one has now: each has its own processes, network and ids.
        What none of them writes they share. The caller closes them. Raises as :meth:`snapshot` and :meth:`start`."""
        snapshot = await self.snapshot()
        boxes = [self._another(snapshot) for _ in range(count)]
        try:
            try:
                for box in boxes:
                    await box.start()
            finally:
                await asyncio.to_thread(snapshot.discard)  # they still read it; its files go when the last of them ends
        except BaseException:
            for box in boxes:
                await box.close()
            raise
        return boxes

    def _another(self, layer: KeptLayer) -> Sandbox:
        box = copy.copy(self)
        box._options = replace(self._options, on=layer.id)
        box._reset()
        return box

    async def restore(self, layer: KeptLayer) -> None:
        """Goes back to the files of a layer, or on to them; what it has changed since is dropped.

        Everything inside ends, and what runs then is another sandbox, with an id of its own, in place of this one.
        Where policy names programs that go on (``filesystem.restore_keeps``), it is this one still, all others in it
        are killed, and if it fails half-way it ends."""
        if self._options.policy.filesystem.restore_keeps:
            async with self._alone:
                done: asyncio.Future[KeptLayer | CorralError] = asyncio.get_running_loop().create_future()
                self.core.snapshots.restore(lambda result: _set(done, result), layer)
                result = await asyncio.shield(done)
            if isinstance(result, CorralError):
                raise result
            return
        after, closing = self._another(layer), self._closing
        await after.start()
        if self._closing is not closing:
            after._keep = False
            await after.close()
            raise SandboxClosed("it was closed meanwhile")
        after.core.notices.restored(layer.id, layer.name)
        before, keeps = copy.copy(self), self._keep
        before._keep = False
        claims.hand_over(before.id, after.id)  # what has been kept so far is named as long as this goes on
        self.__dict__.update(after.__dict__)
        self._keep = keeps
        before.core.kill(set_back(layer.id))
        await before.close()

    async def thaw(self) -> None:
        """Lets every process go on."""
        async with self._alone:
            await self._moving()
            self.core.thaw()

    # ---- commands ----

    async def exec(
        self,
        argv: Sequence[str],
        *,
        stdin: bytes = b"",
        timeout: float | None = None,
        env: Mapping[str, str] | None = None,
        directory: str | None = None,
        user: str | int | None = None,
        limits: Rlimits | None = None,
        check: bool = False,
        on_stdout: Callable[[bytes], None] | None = None,
        on_stderr: Callable[[bytes], None] | None = None,
    ) -> ExecResult:
        """Runs a command to its end and returns its output.

        ``env`` is added to the sandbox's environment. ``timeout`` is in seconds; when it runs out, every process of the
        command's session is killed and ``timed_out`` is set. ``limits`` are resource limits of its own, by
        ``resource.RLIMIT_*`` (setrlimit(2)); they can only be below the sandbox's. ``on_stdout`` and ``on_stderr`` see
        output as it comes.
        Where it was refused something, stderr gets one more line, which says what and why (see
        :class:`ExecResult`). Raises ExecError when it cannot be started, SandboxClosed when the sandbox ends meanwhile,
        CommandFailed when ``check`` is set and it fails.
        """
        loop = asyncio.get_running_loop()
        core = self.core
        uid = self._outside(user)
        limit = self._options.policy.resources.output
        await self._catch_up()
        ended: asyncio.Future[Exit] = loop.create_future()
        started = time.monotonic()
        in_reader, in_writer = make_pipe(uid, uid)
        out_reader, out_writer = make_pipe(uid, uid)
        err_reader, err_writer = make_pipe(uid, uid)
        try:
            number = core.exec(
                argv,
                (in_reader, out_writer, err_writer),
                lambda result: _set(ended, result),
                env=self._environment(env, user),
                directory=directory,
                user=None if user is None else user_id(user),
                limits=limits,
            )
        except BaseException:
            for fd in (in_writer, out_reader, err_reader):
                os.close(fd)
            raise
        finally:
            for fd in (in_reader, out_writer, err_writer):
                os.close(fd)
        tape = core.tape(number, argv)
        feeder = Feeder(loop, in_writer, stdin)
        out = Collector(loop, out_reader, limit, on_stdout, partial(tape.write, stream="stdout") if tape else None)
        err = Collector(loop, err_reader, limit, on_stderr, partial(tape.write, stream="stderr") if tape else None)
        timed_out = False
        try:
            if timeout is None:
                result = await ended
            else:
                try:
                    result = await asyncio.wait_for(asyncio.shield(ended), timeout)
                except TimeoutError:
                    timed_out = True
                    core.kill_session(number)
                    result = await ended
        except asyncio.CancelledError:
            core.kill_session(number)
            raise
        finally:
            feeder.close()
            out.finish()
            err.finish()
            if tape is not None:
                tape.close(is_whole=out.has_ended and err.has_ended)
        if result.error:
            raise result.error
        status = result.status
        line = stderr_line(result.denials, result.denials_dropped, bytes(err.kept[-1:]), restored=result.restored)
        if line and on_stderr:
            on_stderr(line)
        outcome = ExecResult(
            exit_code=result.code,
            signal=os.WTERMSIG(status) if os.WIFSIGNALED(status) else None,
            stdout=bytes(out.kept),
            stderr=bytes(err.kept) + line,
            stdout_truncated=out.truncated,
            stderr_truncated=err.truncated,
            timed_out=timed_out,
            usage=result.usage,
            duration=time.monotonic() - started,
            denials=result.denials,
            denials_dropped=result.denials_dropped,
            restored=result.restored,
        )
        return outcome.check() if check else outcome

    async def start_process(
        self,
        argv: Sequence[str],
        *,
        terminal: tuple[int, int] | None = None,
        env: Mapping[str, str] | None = None,
        directory: str | None = None,
        user: str | int | None = None,
        limits: Rlimits | None = None,
    ) -> Process:
        """Starts a command and returns at once. ``terminal`` is the (rows, columns) of a terminal to give it; the
        others are as for :meth:`exec`."""
        await self._catch_up()
        process = Process(self.core, self._processes.discard)
        self._processes.add(process)
        try:
            await process.start(
                argv,
                terminal=terminal,
                owner=self._outside(user),
                env=self._environment(env, user),
                directory=directory,
                user=None if user is None else user_id(user),
                limits=limits,
            )
        except BaseException:
            self._processes.discard(process)
            raise
        return process

    async def _catch_up(self) -> None:
        """Before a command starts."""
        core = self.core
        if core.is_behind:
            await asyncio.to_thread(core.catch_up)
        await self._moving()

    async def _moving(self) -> None:
        """While no snapshot is being taken."""
        core = self.core
        while core.is_kept_still:
            moving = asyncio.Event()
            core.when_moving(moving.set)
            await moving.wait()

    # ---- files ----

    def files(self, user: str | int | None = None) -> Files:
        """Access to files inside as ``user``; its methods are blocking calls. The caller closes it."""
        outside = self._outside(user)
        return Files(self.core.root_fd, outside, outside, inside=self.core.prepared.identity.inside)

    async def _with_files(self, use: Callable[[Files], T]) -> T:
        with closing(self.files()) as files:
            return await asyncio.to_thread(use, files)

    async def read_file(self, path: str, *, limit: int = READ_LIMIT) -> bytes:
        """The content of a file inside, of at most ``limit`` bytes."""
        return await self._with_files(lambda files: files.read(path, limit=limit))

    async def write_file(self, path: str, data: bytes, *, mode: int = 0o644, parents: bool = False) -> None:
        """Replaces a file inside, atomically."""
        await self._with_files(lambda files: files.write(path, data, mode=mode, parents=parents))

    async def upload(self, host_path: str | os.PathLike[str], path: str) -> None:
        """Copies a file or tree of the host to a place inside."""
        await self._with_files(lambda files: files.upload(host_path, path))

    async def download(self, path: str, host_path: str | os.PathLike[str]) -> Download:
        """Copies a file or tree from inside to a new place on the host; tells what was left out."""
        return await self._with_files(lambda files: files.download(path, host_path))

    async def list_files(self, path: str) -> list[FileInfo]:
        """What a directory inside holds."""
        return await self._with_files(lambda files: files.list(path))

    async def changes(self) -> list[Change]:
        """What has been changed since the start, compared with the host's files as they are now."""
        core = self.core
        if core.layer_fd < 0:
            raise SandboxClosed(core.end_reason or "it is not running yet")
        prepared = core.prepared
        owners = owner_map(prepared.identity, os.stat(prepared.directory))
        layer = os.dup(core.layer_fd)  # the thread goes on with it, whatever happens to the sandbox

        def look() -> list[Change]:
            try:
                return changes(prepared.view.parts, layer, owners, prepared.view.scaffold)
            finally:
                os.close(layer)

        return await asyncio.to_thread(look)

    # ---- looking ----

    @property
    def core(self) -> Core:
        """The sandbox's core. Raises SandboxClosed before :meth:`start`."""
        if self._core is None:
            raise SandboxClosed("it has not been started")
        return self._core

    @property
    def id(self) -> str:
        """The sandbox's name."""
        return self.core.prepared.id

    @property
    def state(self) -> State:
        """Where the sandbox is in its life."""
        return State.LAUNCHING if self._core is None else self._core.state

    @property
    def listeners(self) -> tuple[int, ...]:
        """Descriptors of the listening sockets inside, in the order in which they were asked for; accept on them here.

        They belong to the sandbox and are closed with it.
        """
        return self.core.listeners

    async def stats(self) -> Stats:
        """What the sandbox holds and has used. Raises SandboxClosed when it has ended."""
        if self.state is State.ENDED:
            raise SandboxClosed(self.core.end_reason)
        return read_stats(self.core)

    async def flows(self) -> list[Flow]:
        """The connections that go on through the gateway. Raises SandboxClosed when it has ended."""
        if self.state is State.ENDED:
            raise SandboxClosed(self.core.end_reason)
        egress = self.core.supervision.egress
        return [] if egress is None else egress.live()

    def _environment(self, env: Mapping[str, str] | None, user: str | int | None) -> dict[str, str]:
        return self.core.environment(None if user is None else user_id(user)) | dict(env or {})

    def _outside(self, user: str | int | None) -> int:
        return self.core.prepared.identity.outside(self._options.user if user is None else user_id(user))


def _resolve(future: asyncio.Future[None], error: CorralError | None) -> None:
    if future.done():
        return
    if error:
        future.set_exception(error)
    else:
        future.set_result(None)


def _set(future: asyncio.Future[T], result: T) -> None:
    if not future.done():
        future.set_result(result)
