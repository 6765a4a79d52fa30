"""Descriptors for calls that wait: what one sandbox may hold of those that all sandboxes of a controller share.

Whoever waits in a call (for an answer, a peer, the deputy) has copies of descriptors kept here, so a sandbox with a
thousand such threads could leave none for the others. Each may hold as many as are still free: the first to want all
gets half of them, the next half of the rest. A sandbox whose calls wait with all that it gets may still start commands.
"""

from __future__ import annotations

import resource
from contextlib import suppress

LARGEST = 1 << 19
"""Descriptors that we want; there are hosts that allow a billion, which programs that we start would go through."""
PER_CALL = 5
"""Descriptors of a call, at most: the caller's process, two starting points and what they lead to (rename)."""
PER_SOCKET_CALL = 2
"""The same of a call on an IP socket: its copy, and the caller's process."""
_STARTS = frozenset(("setsid", "execve", "execveat"))
"""What a command begins with."""


def raise_limit() -> int:
    """Raises the soft limit of this process's descriptors as far as it may; returns what it is then.

    Nothing here uses select(2), which could not cope. Sandboxes have limits of their own.
    """
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    wanted = LARGEST if hard == resource.RLIM_INFINITY else min(hard, LARGEST)
    if soft != resource.RLIM_INFINITY and soft < wanted:
        with suppress(OSError, ValueError):
            resource.setrlimit(resource.RLIMIT_NOFILE, (wanted, hard))
            return wanted
    return LARGEST if soft == resource.RLIM_INFINITY else soft


class Budget:
    """That of one supervisor, used by its thread only."""

    __slots__ = ("_usable", "held")

    def __init__(self, limit: int) -> None:
        """``limit`` is the process's; a quarter of it is for all that is not a call that waits."""
        self._usable = limit * 3 // 4
        self.held = 0
        """By the calls of all sandboxes."""

    def admits(self, held: int, name: str) -> bool:
        """Whether a sandbox whose calls hold ``held`` may make another that could wait, the system call ``name``."""
        free = self._usable - self.held
        return held < (2 * free if name in _STARTS else free)
