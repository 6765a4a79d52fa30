"""Whether anybody waits at the client's end of a connection that is not read meanwhile."""

from __future__ import annotations

import socket

from corral.actions import Process
from corral.gateway.sockets import is_connected

_STATE, _STARTED = 0, 19
"""Fields 3 and 22 of /proc/PID/stat (proc(5)), counted from behind the name, which may hold anything."""
_DEAD = frozenset((b"Z", b"X", b"x"))


def is_gone(sock: socket.socket, process: Process | None) -> bool:
    """Whether the client has ended its side of the connection (also one half of it), or who made it is dead.

    The first does not show as long as something that it sent waits to be read; then the second does. A process that
    leaves its connection to a child and ends counts as gone, too.
    """
    try:
        return not is_connected(sock) or (process is not None and not _lives(process))
    except OSError:
        return True


def _lives(process: Process) -> bool:
    """Raises OSError where it is gone altogether."""
    with open(f"/proc/{process.pid}/stat", "rb", buffering=0) as file:
        fields = file.read(4096).rpartition(b")")[2].split()
    return fields[_STATE] not in _DEAD and int(fields[_STARTED]) == process.started
