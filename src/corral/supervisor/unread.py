"""What the supervisor has sent over Unix sockets and nobody may have read yet.

Until it is read, such a message is memory of its sender: ours, where no limit of the sandbox counts it. So only so much
of it may be there at a time; beyond that the deputy sends, whose memory counts as the sandbox's (``deputy.c``).
"""

from __future__ import annotations

LIMIT = 16 << 20
"""Bytes, for one sandbox."""
_MOST = 1 << 19
"""More than one socket can hold with the usual net.core.wmem_max (socket(7)), doubled as the kernel does."""
_OVERHEAD = 4096


class Unread:
    """Of one sandbox. A socket is counted as it was when it was last sent through; one that is gone stays counted."""

    __slots__ = ("_by_socket", "total")

    def __init__(self) -> None:
        self._by_socket: dict[int, int] = {}
        self.total = 0
        """Bytes, at most."""

    def admits(self, length: int) -> bool:
        """Whether the supervisor itself may send ``length`` more bytes."""
        return self.total + min(2 * length, _MOST) + _OVERHEAD <= LIMIT

    def note(self, cookie: int, queued: int) -> None:
        """``queued`` bytes of the socket with this cookie (SO_COOKIE) are unread (SIOCOUTQ, unix(7))."""
        self.total += queued - self._by_socket.pop(cookie, 0)
        if queued:
            self._by_socket[cookie] = queued
