"""A command that runs while its caller goes on: streamed over pipes, or on a terminal of its own."""

from __future__ import annotations

import asyncio
import errno
import os
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from typing import TYPE_CHECKING

from corral.errors import RequestError
from corral.sandbox.core import Core, Exit
from corral.sandbox.denials import stderr_line
from corral.sandbox.limits import Rlimits
from corral.sandbox.streams import CHUNK, make_pipe
from corral.sandbox.terminal import Terminal, open_terminal

if TYPE_CHECKING:
    from corral.log.asciicast import Tape


class _Output(asyncio.StreamReaderProtocol):
    """Feeds a reader and tells when the other side has ended.

    With ``last_line`` the reader's end waits for :meth:`complete`: what Corral has to say comes after all that the
    command wrote, and is known only when the command has ended.
    """

    def __init__(
        self,
        reader: asyncio.StreamReader,
        on_end: Callable[[], None],
        *,
        last_line: bool,
        on_data: Callable[[bytes], None] | None = None,
    ) -> None:
        super().__init__(reader)
        self._on_data = on_data
        self._reader = reader
        self._on_end = on_end
        self._line: Callable[[bytes], bytes] | None = None if last_line else lambda _: b""
        self._last = b""
        self._lost = False

    def data_received(self, data: bytes) -> None:
        self._last = data[-1:]
        if self._on_data is not None:
            self._on_data(data)
        super().data_received(data)

    def eof_received(self) -> bool:
        return True  # the loss of the connection, which follows, is the end

    def connection_lost(self, exc: Exception | None) -> None:
        # A terminal ends with EIO once nobody has its slave any more (pty(7)); for its reader that is just the end.
        if exc is None or (isinstance(exc, OSError) and exc.errno == errno.EIO):
            self._lost = True
            self._finish()
        else:
            super().connection_lost(exc)
        self._on_end()

    def complete(self, line: Callable[[bytes], bytes]) -> None:
        """Sets what gives the last line, from the last byte before it."""
        if self._line is None:
            self._line = line
            self._finish()

    def _finish(self) -> None:
        if self._lost and self._line is not None:
            self._reader.feed_data(self._line(self._last))
            super().connection_lost(None)


class Process:
    """A running command; made by :meth:`corral.sandbox.box.Sandbox.start_process`.

    Output is not capped here, but flows only as fast as the caller reads it. Where the command was refused something,
    stderr (or the terminal) ends with a line of Corral's own that says so. What the process holds is given back when it
    has ended and its output was read to the end, or when its sandbox closes.
    """

    def __init__(self, core: Core, on_gone: Callable[[Process], None]) -> None:
        self._core = core
        self._on_gone = on_gone
        self._exit: asyncio.Future[Exit] = asyncio.get_running_loop().create_future()
        self._number = 0
        self._input = -1
        self._outputs: dict[str, asyncio.StreamReader] = {}
        self._protocols: list[_Output] = []
        self._transports: list[asyncio.ReadTransport] = []
        self._open_outputs = 0
        self.terminal: Terminal | None = None
        """Its terminal, if it was given one."""
        self._tape: Tape | None = None

    async def start(
        self,
        argv: Sequence[str],
        *,
        terminal: tuple[int, int] | None,
        owner: int,
        env: Mapping[str, str],
        directory: str | None,
        user: int | None,
        limits: Rlimits | None,
    ) -> None:
        """Starts the command; ``owner`` is the host id of its user, ``terminal`` its (rows, columns) or None."""
        inside: list[int] = []
        outside: list[int] = []
        try:
            if terminal is not None:
                self.terminal = open_terminal(self._core.root_fd, owner, *terminal)
                slave = self.terminal.take_slave()
                inside.append(slave)
                stdio = (slave, slave, slave)
                self._input = self.terminal.master
                outside.append(os.dup(self.terminal.master))
            else:
                pairs = [make_pipe(owner, owner) for _ in range(3)]
                stdio = (pairs[0][0], pairs[1][1], pairs[2][1])
                inside += stdio
                self._input = pairs[0][1]
                os.set_blocking(self._input, False)
                outside += [pairs[1][0], pairs[2][0]]
            self._number = self._core.exec(
                argv,
                stdio,
                self._ended,
                env=env,
                directory=directory,
                user=user,
                terminal=terminal is not None,
                limits=limits,
            )
            self._tape = self._core.tape(self._number, argv, terminal)
            for name in ("stdout", "stderr")[: len(outside)]:
                await self._connect(name, outside.pop(0))
        except BaseException:
            self.release()
            for fd in outside:
                os.close(fd)
            raise
        finally:
            for fd in inside:
                os.close(fd)

    @property
    def stdout(self) -> asyncio.StreamReader:
        """What the command writes; of a terminal, all that it writes."""
        return self._outputs["stdout"]

    @property
    def stderr(self) -> asyncio.StreamReader:
        """What the command writes to stderr. Raises KeyError for a terminal, where it is part of stdout."""
        return self._outputs["stderr"]

    async def write(self, data: bytes) -> None:
        """Writes to the command's stdin (or types into its terminal); waits while it does not read.

        Raises RequestError when the command no longer reads.
        """
        view = memoryview(data)
        while view:
            if self._input < 0:
                raise RequestError("the command's input is closed")
            try:
                view = view[os.write(self._input, view) :]
            except BlockingIOError:
                await _until_writable(self._input)
            except OSError as error:
                raise RequestError(f"the command does not read its input any more: {error.strerror}") from None

    def close_stdin(self) -> None:
        """The command sees the end of its input. On a terminal, type the end-of-file character instead."""
        if self.terminal is None and self._input >= 0:
            os.close(self._input)
            self._input = -1

    def signal(self, number: int) -> None:
        """Sends a signal to the command's process group."""
        self._core.signal(self._number, number)

    def kill(self) -> None:
        """SIGKILL to every process of the command's session."""
        self._core.kill_session(self._number)

    def resize(self, rows: int, columns: int) -> None:
        """Tells the command that its terminal has another size. Raises RequestError where it has none any more."""
        if self.terminal is None or self._input < 0:
            raise RequestError("this command has no terminal")
        self.terminal.resize(rows, columns)

    async def wait(self) -> Exit:
        """How the command ended, and what it was refused.

        Raises ExecError when it could not be started, SandboxClosed when the walls fell.
        """
        result = await asyncio.shield(self._exit)
        if result.error:
            raise result.error
        return result

    def release(self) -> None:
        """Gives back all that it holds; output that was not read is lost."""
        self._close_input()
        for transport in self._transports:
            transport.close()
        self._close_tape(is_whole=False)

    def _close_tape(self, *, is_whole: bool) -> None:
        if self._tape is not None:
            self._tape.close(is_whole=is_whole)

    def _close_input(self) -> None:
        self.close_stdin()
        if self.terminal:
            self.terminal.close()  # the reader has a descriptor of its own, and still gets what was written
            self._input = -1

    def _ended(self, result: Exit) -> None:
        self._close_input()
        if not self._exit.done():
            self._exit.set_result(result)
        newline = b"\r\n" if self.terminal else b"\n"
        for protocol in self._protocols:
            protocol.complete(
                lambda before: stderr_line(
                    result.denials, result.denials_dropped, before, restored=result.restored, newline=newline
                )
            )
        self._check_gone()

    def _output_ended(self) -> None:
        self._open_outputs -= 1
        self._check_gone()

    def _check_gone(self) -> None:
        if self._open_outputs == 0 and self._exit.done():
            self._close_tape(is_whole=True)
            self._on_gone(self)

    async def _connect(self, name: str, fd: int) -> None:
        reader = asyncio.StreamReader(limit=CHUNK)
        protocol = _Output(
            reader,
            self._output_ended,
            last_line=self.terminal is not None or name == "stderr",
            on_data=None if self._tape is None else partial(self._tape.write, stream=name),
        )
        self._protocols.append(protocol)
        self._open_outputs += 1
        pipe = os.fdopen(fd, "rb", buffering=0)
        transport, _ = await asyncio.get_running_loop().connect_read_pipe(lambda: protocol, pipe)
        self._outputs[name] = reader
        self._transports.append(transport)


async def _until_writable(fd: int) -> None:
    loop = asyncio.get_running_loop()
    writable: asyncio.Future[None] = loop.create_future()
    loop.add_writer(fd, _resolve, writable)
    try:
        await writable
    finally:
        loop.remove_writer(fd)


def _resolve(future: asyncio.Future[None]) -> None:
    if not future.done():
        future.set_result(None)
