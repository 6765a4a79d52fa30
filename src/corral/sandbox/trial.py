"""One throw-away sandbox from a plan, without an event loop: for probes, which want a verdict and nothing else."""

from __future__ import annotations

import os
import select
import signal
import time
from collections.abc import Mapping
from contextlib import suppress

from corral.errors import CorralError, WallError
from corral.sandbox import channel
from corral.sandbox.channel import Report, ReportType
from corral.sandbox.identity import AGENT_ID
from corral.sandbox.launcher import launch
from corral.sandbox.prepare import Prepared
from corral.sandbox.supervision import Supervision

START_LIMIT = 10.0
"""Seconds for the walls to stand."""
COMMAND_LIMIT = 10.0
"""Seconds for one command inside."""
_END_LIMIT = 3.0
_MAX_OUTPUT = 1 << 16


def readable(seconds: float, *fds: int) -> list[int]:
    """Those of ``fds`` that can be read within this time; select(2) would not take numbers above 1023."""
    poll = select.poll()
    for fd in fds:
        poll.register(fd, select.POLLIN)
    return [fd for fd, _ in poll.poll(max(0, int(seconds * 1000)))]


def _take(fd: int) -> bytes:
    """What can be read now: nothing at the end, of a terminal too, where that is an error (EIO)."""
    try:
        return os.read(fd, _MAX_OUTPUT)
    except OSError:
        return b""


class Trial:
    """A throw-away sandbox, driven without an event loop; every wait has a limit."""

    def __init__(self, plan: bytes, lease: int = -1) -> None:
        self._control, self.keeper = launch(plan, lease)
        self._pidfd = os.pidfd_open(self.keeper)
        self.root_fd = -1
        self.listeners: list[int] = []
        self._fds: list[int] = []
        self._supervision: Supervision | None = None

    def __enter__(self) -> Trial:
        return self

    def __exit__(self, *_: object) -> None:
        self._control.close()
        for number in (signal.SIGTERM, signal.SIGKILL):
            with suppress(OSError):
                signal.pidfd_send_signal(self._pidfd, number)
            if readable(_END_LIMIT, self._pidfd):
                break
        if self._supervision is not None:
            self._supervision.close()
        with suppress(ChildProcessError):
            os.waitpid(self.keeper, os.WNOHANG)
        for fd in (self._pidfd, *self._fds):
            os.close(fd)

    def _report(self, deadline: float) -> Report:
        if not readable(deadline - time.monotonic(), self._control.fileno()):
            raise CorralError("no answer in time")
        report = channel.receive_report(self._control)
        if report is None:
            raise CorralError("it ended by itself")
        return report

    def stand(self) -> Trial:
        """Waits until the walls stand. Raises WallError, with step and errno, where they cannot be built."""
        deadline = time.monotonic() + START_LIMIT
        for wanted in (ReportType.READY, ReportType.LISTENER):
            report = self._report(deadline)
            self._fds += report.fds
            if report.type is ReportType.FAILED:
                raise WallError(report.step, report.detail, report.error)
            if report.type is not wanted:
                raise CorralError(f"it answered {report.type.name}")
            if wanted is ReportType.READY:
                self.root_fd, _, *self.listeners = report.fds
        return self

    def supervise(self, prepared: Prepared) -> None:
        """Has the notified calls of what :meth:`run` runs answered, as ``prepared``'s policy says. Once it stands."""
        self._supervision = Supervision(prepared, self.keeper, (), lambda _: None, lambda _: None)
        listener, deputy, root = (os.dup(fd) for fd in (*self._fds[-2:], self.root_fd))
        self._supervision.start(listener, deputy, root)

    def run(
        self,
        argv: list[str],
        env: Mapping[str, str],
        directory: str,
        *,
        user: int = AGENT_ID,
        terminal: tuple[int, int] | None = None,
    ) -> tuple[int, str]:
        """Runs a command; its exit code and what it wrote, at most 64 KiB. ``terminal`` is master and slave."""
        payload = channel.encode_exec(argv, env, directory, user, user, terminal=terminal is not None)
        source, sink = terminal or os.pipe2(os.O_CLOEXEC)
        stdin = os.dup(sink) if terminal else os.open(os.devnull, os.O_RDONLY | os.O_CLOEXEC)
        memfd = channel.sealed_memfd("corral-exec", payload)
        try:
            channel.send_request(self._control, channel.Request.EXEC, 1, fds=(memfd, stdin, sink, sink))
        finally:
            for fd in (memfd, stdin, sink):
                os.close(fd)
        try:
            return self._collect(source)
        finally:
            os.close(source)

    def _collect(self, source: int) -> tuple[int, str]:
        os.set_blocking(source, False)
        deadline = time.monotonic() + COMMAND_LIMIT
        output, status, waited = bytearray(), -1, {source, self._control.fileno()}
        while status < 0:
            ready = readable(deadline - time.monotonic(), *waited)
            if not ready:
                raise CorralError("a command inside did not end in time")
            if source in ready:
                data = _take(source)
                output += data
                if not data:
                    waited.discard(source)
            with suppress(BlockingIOError):
                report = channel.receive_report(self._control)
                if report is None or report.type is ReportType.ENDED:
                    raise CorralError("the sandbox ended while a command ran")
                if report.type is ReportType.EXEC_FAILED:
                    raise OSError(report.error, f"{report.step}: {os.strerror(report.error)}", report.detail)
                if report.type is ReportType.EXITED:
                    status = report.status
            if len(output) > _MAX_OUTPUT:
                raise CorralError("a command inside wrote too much")
        while data := _take(source):
            output += data
        return os.waitstatus_to_exitcode(status), output.decode("utf-8", "replace").replace("\r\n", "\n")
