"""Who is at the other end of a control socket."""

from __future__ import annotations

import functools
import os
import pwd
import socket
import struct
from dataclasses import dataclass


@dataclass(frozen=True, slots=True)
class Peer:
    """The process that connected, as the kernel saw it then (SO_PEERCRED, unix(7))."""

    pid: int
    uid: int

    def is_operator(self) -> bool:
        """Whether it may command this process's sandboxes: the same user or root, and outside of every sandbox.

        No sandbox shows the socket. Should a mount ever do so, an agent may still have the host id of its user; but it
        is in a user namespace below ours, and no operator is. Root's processes cannot be looked at by others, and need
        not be: no agent has its id.
        """
        if self.uid not in (0, os.geteuid()):
            return False
        if self.uid == 0 and os.geteuid() != 0:
            return True
        try:
            theirs, ours = os.stat(f"/proc/{self.pid}/ns/user"), os.stat("/proc/self/ns/user")
        except OSError:  # gone already
            return False
        return (theirs.st_dev, theirs.st_ino) == (ours.st_dev, ours.st_ino)

    def __str__(self) -> str:
        return f"{_name(self.uid)} (uid {self.uid}, pid {self.pid})"


@functools.lru_cache(maxsize=16)
def _name(uid: int) -> str:
    try:
        return pwd.getpwuid(uid).pw_name
    except KeyError:
        return "somebody"


def peer_of(connection: socket.socket) -> Peer:
    """The peer of a connected Unix socket."""
    pid, uid, _ = struct.unpack("3i", connection.getsockopt(socket.SOL_SOCKET, socket.SO_PEERCRED, 12))
    return Peer(pid, uid)
