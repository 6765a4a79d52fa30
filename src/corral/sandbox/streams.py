"""The ends of a command's stdin, stdout and stderr that stay outside.

Commands never get the caller's own descriptors: whoever holds a descriptor of a file can reopen it through
/proc/self/fd with more rights than were given. They get fresh pipes or a terminal of the sandbox's own.
"""

from __future__ import annotations

import os
from collections.abc import Callable
from contextlib import suppress

from corral.reactor import Reactor

CHUNK = 1 << 16


def make_pipe(uid: int, gid: int) -> tuple[int, int]:
    """A pipe that user ``uid`` of the host may also open by name (``/dev/stdout`` inside is such an open)."""
    reader, writer = os.pipe2(os.O_CLOEXEC)
    # A pipe belongs to its maker; as root that is not the agent. An ordinary user cannot give it away, nor needs to.
    with suppress(PermissionError):
        os.fchown(reader, uid, gid)
    return reader, writer


class Collector:
    """Reads a pipe to its end and keeps the first ``limit`` bytes; the writer is never blocked by the limit.

    ``on_data`` sees what is kept, ``on_any`` all that comes.
    """

    def __init__(
        self,
        reactor: Reactor,
        fd: int,
        limit: int,
        on_data: Callable[[bytes], None] | None = None,
        on_any: Callable[[bytes], None] | None = None,
    ) -> None:
        self.kept = bytearray()
        self.total = 0
        self.has_ended = False
        """Whether there is nobody any more who could write to it."""
        self._reactor, self._fd, self._limit, self._on_data, self._on_any = reactor, fd, limit, on_data, on_any
        os.set_blocking(fd, False)
        reactor.add_reader(fd, self._read)

    @property
    def truncated(self) -> bool:
        """Whether more came than was kept."""
        return self.total > len(self.kept)

    def _read(self) -> bool:
        """Takes what is there. Returns whether there may be more at once."""
        try:
            data = os.read(self._fd, CHUNK)
        except BlockingIOError:
            return False
        except OSError:
            data = b""
        if not data:
            self.has_ended = True
            self.close()
            return False
        self.total += len(data)
        if self._on_any:
            self._on_any(data)
        room = self._limit - len(self.kept)
        if room > 0:
            self.kept += data[:room]
            if self._on_data:
                self._on_data(data[:room])
        return True

    def finish(self) -> None:
        """Takes what has been written so far and closes: a daemon that keeps the pipe open is not waited for.

        All that the command itself wrote before it ended is in the pipe by then; what others write meanwhile is
        bounded by the pipe's size.
        """
        budget = 1 << 20
        while self._fd >= 0 and budget > 0 and self._read():
            budget -= CHUNK
        self.close()

    def close(self) -> None:
        """Stops reading."""
        if self._fd >= 0:
            self._reactor.remove_reader(self._fd)
            os.close(self._fd)
            self._fd = -1


class Feeder:
    """Writes bytes into a pipe and closes it; a reader that goes away early is no error."""

    def __init__(self, reactor: Reactor, fd: int, data: bytes) -> None:
        self._reactor, self._fd, self._left = reactor, fd, memoryview(data)
        os.set_blocking(fd, False)
        self._waiting = False
        self._write()

    def _write(self) -> None:
        try:
            while self._left:
                self._left = self._left[os.write(self._fd, self._left) :]
        except BlockingIOError:
            if not self._waiting:
                self._reactor.add_writer(self._fd, self._write)
                self._waiting = True
            return
        except OSError:
            pass
        self.close()

    def close(self) -> None:
        """Stops writing; the reader sees the end."""
        if self._fd >= 0:
            if self._waiting:
                self._reactor.remove_writer(self._fd)
            os.close(self._fd)
            self._fd = -1
