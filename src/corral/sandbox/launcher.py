"""Starting the launcher, the small C program that builds the walls (``src/launcher``)."""

from __future__ import annotations

import fcntl
import functools
import os
import socket

from corral.errors import WallError
from corral.sandbox import channel

_PROGRAM = os.path.join(os.path.dirname(os.path.dirname(os.path.abspath(__file__))), "libexec", "corral-launcher")


def launcher_path() -> str:
    """The launcher that was installed with this package. Raises WallError where it is missing."""
    if not os.access(_PROGRAM, os.X_OK):
        raise WallError("launcher", f"{_PROGRAM} is missing or not executable; reinstall corral")
    return _PROGRAM


@functools.cache
def _sealed_copy(program: str) -> str:
    """What to execute: the launcher itself, or a sealed memfd of this process that holds a copy of it.

    A process of the sandbox can make the launcher its own executable for a moment (``#!/proc/self/exe``) and so get at
    its inode; where that file belongs to the ordinary user who runs this, it could be written to (compare
    CVE-2019-5736 of runc). As root, the agent is an id that owns nothing, and the file itself takes less memory.
    """
    if os.geteuid() == 0 or (os.stat(program).st_uid != os.geteuid() and not os.access(program, os.W_OK)):
        return program
    with open(program, "rb") as file:
        content = file.read()
    return f"/proc/self/fd/{channel.sealed_memfd('corral-launcher', content)}"


def launch(plan: bytes, lease: int = -1) -> tuple[socket.socket, int]:
    """Starts a keeper with ``plan`` and returns the control socket (non-blocking) and the keeper's pid.

    What becomes of it is told on the socket: READY, or FAILED and the end of the stream. ``lease`` is a descriptor
    that the keeper holds as long as the sandbox lives.
    """
    program = launcher_path()
    ours, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
    sent: list[int] = []
    passed: list[int] = []
    try:
        sent.append(channel.sealed_memfd("corral-plan", plan))
        sent.append(os.pidfd_open(os.getpid()))
        if lease >= 0:
            sent.append(os.dup(lease))
        null = os.open(os.devnull, os.O_RDWR | os.O_CLOEXEC)
        sent.append(null)
        # Sources out of the way of the numbers that the new process gets.
        passed = [fcntl.fcntl(fd, fcntl.F_DUPFD_CLOEXEC, 16) for fd in (null, null, null, theirs.fileno())]
        actions = [(os.POSIX_SPAWN_DUP2, source, number) for number, source in enumerate(passed)]
        pid = os.posix_spawn(_sealed_copy(program), ["corral-launcher"], {}, file_actions=actions)
        channel.send_request(ours, channel.Request.PLAN, fds=sent[:-1])
        ours.setblocking(False)
    except OSError as error:
        ours.close()
        raise WallError("launcher", f"cannot be started: {error.strerror}", error.errno or 0) from None
    finally:
        theirs.close()
        for fd in sent + passed:
            os.close(fd)
    return ours, pid
