"""``corral.SyncSandbox``: the sandbox for programs without an event loop.

    with SyncSandbox(workspace="/path/to/project") as box:
        print(box.exec(["ls", "-l"]).text)

A thin face: every call is handed to one event loop in a thread of its own, shared by all sandboxes of the process.
"""

from __future__ import annotations

import asyncio
import os
import threading
from collections.abc import Callable, Coroutine
from types import TracebackType
from typing import Any, TypeVar

from corral.actions import Flow
from corral.sandbox.box import Sandbox
from corral.sandbox.changes import Change
from corral.sandbox.core import Exit
from corral.sandbox.files import Download, FileInfo, Files
from corral.sandbox.layer import KeptLayer
from corral.sandbox.process import Process
from corral.sandbox.results import ExecResult, Stats

T = TypeVar("T")


class _Worker:
    """The shared loop. Started on first use; after a fork the child starts its own."""

    def __init__(self) -> None:
        self._lock = threading.Lock()  # guards the two below
        self._pid = 0
        self._loop: asyncio.AbstractEventLoop | None = None

    def call(self, function: Callable[[], T]) -> T:
        """Calls in the loop's thread, the only one that may use what belongs to the loop."""

        async def calling() -> T:
            return function()

        return self.run(calling())

    def run(self, coroutine: Coroutine[Any, Any, T]) -> T:
        with self._lock:
            if self._loop is None or self._pid != os.getpid():
                self._loop, self._pid = asyncio.new_event_loop(), os.getpid()
                threading.Thread(target=self._loop.run_forever, name="corral-loop", daemon=True).start()
            loop = self._loop
        future = asyncio.run_coroutine_threadsafe(coroutine, loop)
        try:
            return future.result()
        except BaseException:
            future.cancel()
            raise


_worker = _Worker()


class SyncProcess:
    """:class:`~corral.sandbox.process.Process` with blocking methods; made by :meth:`SyncSandbox.start_process`."""

    def __init__(self, process: Process) -> None:
        self._process = process

    def read(self, size: int = -1) -> bytes:
        """What the command writes to stdout (on a terminal: all that it writes): at most ``size`` bytes, as soon as
        there are any. With -1 all until its end; at the end b""."""
        return _worker.run(self._process.stdout.read(size))

    def read_stderr(self, size: int = -1) -> bytes:
        """The same of stderr. Raises KeyError for a terminal, where it is part of stdout."""
        return _worker.run(self._process.stderr.read(size))

    def write(self, data: bytes) -> None:
        """Writes to the command's stdin, or types into its terminal; see :meth:`Process.write`."""
        _worker.run(self._process.write(data))

    def close_stdin(self) -> None:
        """The command sees the end of its input."""
        _worker.call(self._process.close_stdin)

    def signal(self, number: int) -> None:
        """Sends a signal to the command's process group."""
        _worker.call(lambda: self._process.signal(number))

    def kill(self) -> None:
        """SIGKILL to every process of the command's session."""
        _worker.call(self._process.kill)

    def resize(self, rows: int, columns: int) -> None:
        """Tells the command that its terminal has another size."""
        _worker.call(lambda: self._process.resize(rows, columns))

    def wait(self, timeout: float | None = None) -> Exit:
        """How the command ended; see :meth:`Process.wait`. Raises TimeoutError after ``timeout`` seconds."""
        return _worker.run(asyncio.wait_for(self._process.wait(), timeout))


class SyncSandbox:
    """:class:`~corral.sandbox.box.Sandbox` with blocking methods; the arguments are the same."""

    def __init__(self, workspace: str | os.PathLike[str], **options: Any) -> None:
        async def make() -> Sandbox:
            return Sandbox(workspace, **options)

        self.box = _worker.run(make())
        """The asynchronous sandbox behind this one; it belongs to another thread's loop."""

    def start(self) -> SyncSandbox:
        """Builds the walls."""
        _worker.run(self.box.start())
        return self

    def close(self) -> None:
        """Ends everything inside."""
        _worker.run(self.box.close())

    def __enter__(self) -> SyncSandbox:
        return self.start()

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    @property
    def id(self) -> str:
        """The sandbox's name."""
        return self.box.id

    @property
    def kept(self) -> KeptLayer | None:
        """The layer that was kept at the end."""
        return self.box.kept

    def exec(self, argv: list[str], **how: Any) -> ExecResult:
        """Runs a command to its end; see :meth:`Sandbox.exec`."""
        return _worker.run(self.box.exec(argv, **how))

    def start_process(self, argv: list[str], **how: Any) -> SyncProcess:
        """Starts a command and returns at once; see :meth:`Sandbox.start_process`."""
        return SyncProcess(_worker.run(self.box.start_process(argv, **how)))

    def files(self, user: str | int | None = None) -> Files:
        """Access to files inside as ``user``. The caller closes it."""
        return _worker.call(lambda: self.box.files(user))

    def read_file(self, path: str, **how: Any) -> bytes:
        """The content of a file inside."""
        return _worker.run(self.box.read_file(path, **how))

    def write_file(self, path: str, data: bytes, **how: Any) -> None:
        """Replaces a file inside."""
        _worker.run(self.box.write_file(path, data, **how))

    def upload(self, host_path: str | os.PathLike[str], path: str) -> None:
        """Copies from the host to a place inside."""
        _worker.run(self.box.upload(host_path, path))

    def download(self, path: str, host_path: str | os.PathLike[str]) -> Download:
        """Copies from inside to a new place on the host."""
        return _worker.run(self.box.download(path, host_path))

    def list_files(self, path: str) -> list[FileInfo]:
        """What a directory inside holds."""
        return _worker.run(self.box.list_files(path))

    def changes(self) -> list[Change]:
        """What has been changed since the start."""
        return _worker.run(self.box.changes())

    def stats(self) -> Stats:
        """What the sandbox holds and has used."""
        return _worker.run(self.box.stats())

    def flows(self) -> list[Flow]:
        """The connections that go on through the gateway."""
        return _worker.run(self.box.flows())

    def snapshot(self, name: str = "") -> KeptLayer:
        """Keeps its files as they are now; see :meth:`Sandbox.snapshot`."""
        return _worker.run(self.box.snapshot(name))

    def fork(self, count: int = 1) -> list[SyncSandbox]:
        """Starts others with the files that this one has now; see :meth:`Sandbox.fork`."""
        return [self._of(box) for box in _worker.run(self.box.fork(count))]

    def restore(self, layer: KeptLayer) -> None:
        """Goes back to the files of a layer; see :meth:`Sandbox.restore`."""
        _worker.run(self.box.restore(layer))

    @classmethod
    def _of(cls, box: Sandbox) -> SyncSandbox:
        made = cls.__new__(cls)
        made.box = box
        return made

    def freeze(self) -> None:
        """Stops every process where it is."""
        _worker.run(self.box.freeze())

    def thaw(self) -> None:
        """Lets every process go on."""
        _worker.run(self.box.thaw())

    def kill(self, reason: str = "killed") -> None:
        """Ends everything inside at once."""
        self.box.kill(reason)

    def wait_ended(self, timeout: float | None = None) -> str:
        """Waits until the sandbox has ended and returns why. Raises TimeoutError after ``timeout`` seconds."""
        return _worker.run(asyncio.wait_for(self.box.wait_ended(), timeout))
