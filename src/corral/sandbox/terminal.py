"""A terminal of the sandbox's own: made by its devpts instance, held by its master outside.

The caller's terminal never goes in: whoever has it could type into it (TIOCSTI), read from it, or keep it. What the
command writes comes out as bytes that the caller chooses what to do with.
"""

from __future__ import annotations

import fcntl
import os
import struct
import termios
from contextlib import suppress

from corral.errors import SandboxClosed
from corral.openat2 import Resolve, openat2

# ioctl_tty(2); not in Python's termios
_TIOCSPTLCK = 0x40045431
_TIOCGPTPEER = 0x5441


class Terminal:
    """Both ends of a terminal; the slave is handed to a command, the master stays."""

    def __init__(self, master: int, slave: int) -> None:
        self.master = master
        self._slave = slave

    def take_slave(self) -> int:
        """The slave's descriptor, which is the caller's to close from now on."""
        slave, self._slave = self._slave, -1
        return slave

    def resize(self, rows: int, columns: int) -> None:
        """Sets the size; the foreground job gets SIGWINCH."""
        size = struct.pack("HHHH", max(1, min(rows, 9999)), max(1, min(columns, 9999)), 0, 0)
        fcntl.ioctl(self.master, termios.TIOCSWINSZ, size)

    def close(self) -> None:
        """Hangs up: what still runs on the terminal gets SIGHUP."""
        if self._slave >= 0:
            os.close(self._slave)
            self._slave = -1
        if self.master >= 0:
            os.close(self.master)
            self.master = -1


def open_terminal(root_fd: int, uid: int, rows: int, columns: int) -> Terminal:
    """A new terminal in the sandbox with that root, owned by host user ``uid``.

    Raises SandboxClosed when the sandbox has no more of them, or is gone.
    """
    try:
        resolve = Resolve.IN_ROOT | Resolve.NO_MAGICLINKS
        master = openat2(root_fd, b"/dev/pts/ptmx", os.O_RDWR | os.O_NOCTTY, resolve)
        try:
            fcntl.ioctl(master, _TIOCSPTLCK, struct.pack("i", 0))
            slave = fcntl.ioctl(master, _TIOCGPTPEER, os.O_RDWR | os.O_NOCTTY | os.O_CLOEXEC)
        except BaseException:
            os.close(master)
            raise
    except OSError as error:
        raise SandboxClosed(f"no terminal can be made in it: {error.strerror}") from None
    terminal = Terminal(master, slave)
    os.set_blocking(master, False)
    if os.geteuid() == 0:
        # Its maker is nobody inside; whoever runs on it must be able to open /dev/pts/N again, as tmux does.
        with suppress(OSError):
            os.fchown(slave, uid, uid)
    terminal.resize(rows, columns)
    return terminal
