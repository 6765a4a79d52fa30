"""A command of a sandbox as the foreground job of the caller's terminal, or as a part of its pipeline.

Bytes are carried by threads with plain blocking reads and writes: making the caller's descriptors non-blocking would
change them for every other program that shares them. On a terminal, the caller's is set to raw while the command runs,
so that Ctrl-C, Ctrl-Z and the rest are typed into the sandbox's own terminal and act there.
"""

from __future__ import annotations

import os
import select
import signal
import sys
import termios
import threading
import time
import tty
from collections.abc import Callable
from contextlib import suppress
from functools import partial
from typing import Any, Protocol

from corral.sandbox.denials import printable as printable
from corral.sandbox.registry import SIGNALS_PASSED_ON
from corral.sandbox.streams import CHUNK, make_pipe
from corral.sandbox.terminal import Terminal, open_terminal

_ENDING = (signal.SIGTERM, signal.SIGHUP, signal.SIGINT)
GRACE = 10.0
"""Seconds that a command gets between SIGTERM or SIGHUP to corral and the end of the sandbox."""


_FLUSH = 1.0
"""Seconds that whoever reads our output gets to take the rest of it, once a signal has told us to end."""


class Commander(Protocol):
    """Who starts the command: this process's own core, or the controller of another one."""

    def start(self, stdio: tuple[int, int, int], terminal: bool) -> None:
        """Starts the command on these descriptors."""

    def signal(self, number: int) -> None:
        """Passes a signal on to it."""

    def end(self, reason: str) -> None:
        """Ends it by force."""

    def written(self, data: bytes, stream: str) -> None:
        """Is told what it writes, on its terminal or to one of its streams. From any thread."""


def _wait(fd: int, event: int) -> None:
    poll = select.poll()
    poll.register(fd, event)
    poll.poll()


def _read(source: int) -> bytes:
    """What comes next, or nothing at the end. The caller's descriptor may be non-blocking: it is shared."""
    while True:
        try:
            return os.read(source, CHUNK)
        except BlockingIOError:
            _wait(source, select.POLLIN)
        except OSError:
            return b""


def _write(target: int, data: bytes) -> bool:
    """Writes all of it. Returns whether anybody reads."""
    view = memoryview(data)
    while view:
        try:
            view = view[os.write(target, view) :]
        except BlockingIOError:
            _wait(target, select.POLLOUT)
        except OSError:
            return False
    return True


def _carry(
    source: int,
    target: int,
    close_source: bool,
    close_target: bool,
    broken: Callable[[], None],
    seen: Callable[[bytes], None],
    ended: Callable[[], None],
) -> None:
    """Copies until the end of ``source``, which ``ended`` is told, or until nobody reads ``target`` any more, which
    ``broken`` is told."""
    while data := _read(source):
        seen(data)
        if not _write(target, data):
            broken()
            break
    else:
        ended()
    for fd in [source] * close_source + [target] * close_target:
        os.close(fd)


class Foreground:
    """Connects the caller's stdin, stdout and stderr to a command."""

    def __init__(self, commander: Commander, *, terminal: bool | None) -> None:
        self._commander = commander
        self.wants_terminal = terminal if terminal is not None else os.isatty(0) and os.isatty(1)
        self._terminal: Terminal | None = None
        self._saved: list[Any] | None = None
        self._threads: list[threading.Thread] = []
        self._ends: list[None] = []
        """One for each output that was read to its end."""
        self._started = False
        self._terminated = 0
        self.interrupted = 0
        """The signal that ended it by force, before the command ran or because the command did not listen."""

    # ---- before ----

    def catch_signals(self) -> None:
        """From here on signals go to the command; before it runs they end the sandbox."""
        for number in SIGNALS_PASSED_ON:
            signal.signal(number, self._pass_on)
        if self.wants_terminal:
            signal.signal(signal.SIGWINCH, self._resize)

    def _pass_on(self, number: int, _frame: object) -> None:
        ending = number in _ENDING
        self._terminated += ending
        if (not self._started and ending) or self._terminated > 3:
            self.interrupted = self.interrupted or number
            self._commander.end(f"interrupted by {signal.Signals(number).name}")
            return
        self._commander.signal(number)
        if number in (signal.SIGTERM, signal.SIGHUP):
            timer = threading.Timer(GRACE, self._commander.end, [f"did not end after {signal.Signals(number).name}"])
            timer.daemon = True
            timer.start()

    def start(self, root_fd: int, uid: int) -> None:
        """Starts the command and the carrying; ``root_fd`` is the sandbox's root, ``uid`` the host id of its user."""
        if self.wants_terminal:
            self._start_on_terminal(root_fd, uid)
        else:
            self._start_on_pipes(uid)

    def _thread(
        self,
        source: int,
        target: int,
        *,
        close_source: bool = False,
        close_target: bool = False,
        waited_for: bool = True,
        broken: Callable[[], None] = lambda: None,
        seen: Callable[[bytes], None] = lambda data: None,
    ) -> None:
        ended = partial(self._ends.append, None) if waited_for else lambda: None
        arguments = (source, target, close_source, close_target, broken, seen, ended)
        thread = threading.Thread(target=_carry, args=arguments, daemon=True)
        if waited_for:
            self._threads.append(thread)
        thread.start()

    def _start_on_pipes(self, uid: int) -> None:
        inputs, outputs, errors = (make_pipe(uid, uid) for _ in range(3))
        try:
            self._commander.start((inputs[0], outputs[1], errors[1]), False)
            self._started = True
        finally:
            for fd in (inputs[0], outputs[1], errors[1]):
                os.close(fd)
        self._thread(0, inputs[1], close_target=True, waited_for=False)
        # Closing the source is how a command learns that nobody reads: SIGPIPE, as in any pipeline.
        self._thread(outputs[0], 1, close_source=True, seen=partial(self._commander.written, stream="stdout"))
        self._thread(errors[0], 2, close_source=True, seen=partial(self._commander.written, stream="stderr"))

    def _start_on_terminal(self, root_fd: int, uid: int) -> None:
        self._terminal = open_terminal(root_fd, uid, *terminal_size())
        os.set_blocking(self._terminal.master, True)
        slave = self._terminal.take_slave()
        if os.isatty(0):
            # What the caller set up (erase key, flow control) holds inside too.
            with suppress(termios.error):
                termios.tcsetattr(slave, termios.TCSANOW, termios.tcgetattr(0))
        try:
            self._commander.start((slave, slave, slave), True)
            self._started = True
        finally:
            os.close(slave)
        self._raw()
        self._thread(0, self._terminal.master, waited_for=False)
        # A terminal that nobody looks at hangs up; by a signal, because the number of a closed master may be reused.
        hang_up = partial(os.kill, os.getpid(), signal.SIGHUP)
        self._thread(self._terminal.master, 1, broken=hang_up, seen=partial(self._commander.written, stream="stdout"))

    # ---- meanwhile ----

    def _raw(self) -> None:
        if os.isatty(0):
            with suppress(termios.error):
                self._saved = self._saved or termios.tcgetattr(0)
                tty.setraw(0, termios.TCSADRAIN)

    def _cooked(self) -> None:
        if self._saved is not None:
            with suppress(termios.error):
                termios.tcsetattr(0, termios.TCSADRAIN, self._saved)

    def _resize(self, *_: object) -> None:
        if self._terminal:
            with suppress(OSError):
                self._terminal.resize(*terminal_size())

    def stopped(self, _number: int) -> None:
        """The command was stopped (Ctrl-Z): stop with it, like any job, and go on with it."""
        self._cooked()
        os.kill(0, signal.SIGTSTP)  # every process of this job; returns when the shell continues it
        self._raw()
        self._resize()
        self._commander.signal(signal.SIGCONT)

    # ---- after ----

    @property
    def has_all(self) -> bool:
        """Whether all that the command has written was read."""
        return len(self._ends) == len(self._threads)

    def finish(self, wait: Callable[[], None]) -> None:
        """Writes out what is left and gives the terminal back. ``wait`` ends what still holds the other ends."""
        wait()
        for thread in self._threads:
            thread.join(_FLUSH)
            while thread.is_alive() and not self._terminated:
                thread.join(_FLUSH)
        self._cooked()

    def heed_interrupts(self) -> None:
        """Once the command has ended: from here on a signal that tells us to end is for :meth:`is_interrupted`."""
        for number in _ENDING:
            signal.signal(number, self._interrupt)

    def _interrupt(self, number: int, _frame: object) -> None:
        self.interrupted = number

    def is_interrupted(self, seconds: float) -> bool:
        """Whether we were told to end, or are within this time."""
        until = time.monotonic() + seconds
        while not self.interrupted and time.monotonic() < until:
            time.sleep(0.05)  # another thread may be the one that a signal wakes
        return bool(self.interrupted)

    def abandon(self) -> None:
        """Gives the terminal back without waiting for anything."""
        self._cooked()


def terminal_size() -> tuple[int, int]:
    """Rows and columns of the caller's terminal."""
    for fd in (0, 1, 2):
        with suppress(OSError):
            size = os.get_terminal_size(fd)
            if size.lines and size.columns:
                return size.lines, size.columns
    return 24, 80


def complain(message: str) -> None:
    """One error on stderr, escaped, each line marked as Corral's own."""
    for line in message.split("\n"):
        sys.stderr.write(f"corral: {printable(line)}\n")
