"""The control socket between a controller and the launcher's two processes: requests out, reports in.

One struct a message over SOCK_SEQPACKET, descriptors by SCM_RIGHTS. The layouts are those of
``src/launcher/protocol.h`` and ``exec.h``; a test compares them. Whatever does not parse closes the channel.
"""

from __future__ import annotations

import array
import fcntl
import os
import socket
import struct
from collections.abc import Mapping, Sequence
from enum import IntEnum
from typing import NamedTuple

from corral.errors import CorralError, RequestError
from corral.sandbox.plan import text

CONTROL_FD = 3
EXEC_SESSION_MARK = 0x434F5252414C
"""Second argument of the setsid(2) by which the leader of an exec says, in the third, which exec it is."""
MAX_EXEC_BYTES = 8 << 20
_REQUEST = struct.Struct("<IIII")
_REPORT = struct.Struct("<IIii8Q48s208s")
_MAX_FDS = 250
_SEALS = fcntl.F_SEAL_SEAL | fcntl.F_SEAL_SHRINK | fcntl.F_SEAL_GROW | fcntl.F_SEAL_WRITE


class Request(IntEnum):
    """What a controller can ask (``enum request_type``)."""

    PLAN = 1
    EXEC = 2
    SIGNAL = 3
    STOP_ALL = 4
    CONTINUE_ALL = 5
    KILL_SESSION = 6


class ReportType(IntEnum):
    """What the launcher tells (``enum report_type``). A start is READY, then LISTENER; the walls stand with both."""

    READY = 16
    FAILED = 17
    EXEC_FAILED = 18
    EXITED = 19
    STOPPED = 20
    ENDED = 21
    LISTENER = 22


class EndReason(IntEnum):
    """Why a sandbox ended (``enum end_reason``)."""

    CLOSED = 0
    KILLED = 1
    WALL_TIME = 2
    CONTROLLER = 3
    INIT_DIED = 4
    FAILED = 5
    DEPUTY = 6


class Usage(NamedTuple):
    """What one exec consumed, with the children that it waited for (getrusage(2))."""

    user_seconds: float
    system_seconds: float
    max_rss: int
    """Bytes: the largest resident set of any single process."""
    minor_faults: int
    major_faults: int
    blocks_in: int
    blocks_out: int
    context_switches: int


class Report(NamedTuple):
    """One message from the launcher."""

    type: ReportType
    id: int
    status: int
    error: int
    usage: Usage
    step: str
    detail: str
    fds: tuple[int, ...]


def sealed_memfd(name: str, content: bytes) -> int:
    """A memfd that can never change again, so that its reader need not copy it."""
    fd = os.memfd_create(name, os.MFD_CLOEXEC | os.MFD_ALLOW_SEALING)
    try:
        view = memoryview(content)
        while view:
            view = view[os.write(fd, view) :]
        fcntl.fcntl(fd, fcntl.F_ADD_SEALS, _SEALS)
    except BaseException:
        os.close(fd)
        raise
    return fd


def encode_exec(
    argv: Sequence[str],
    env: Mapping[str, str],
    directory: str,
    uid: int,
    gid: int,
    *,
    terminal: bool = False,
    limits: Sequence[tuple[int, int, int]] = (),
) -> bytes:
    """The payload of an EXEC request. Raises RequestError for what no exec could take (NUL, too long, empty)."""
    if not argv or not argv[0]:
        raise RequestError("no command was given")
    try:
        parts = [struct.pack("<III", 1 if terminal else 0, uid, gid), text(directory), struct.pack("<I", len(argv))]
        parts += [text(argument) for argument in argv]
        parts.append(struct.pack("<I", len(env)))
        parts += [text(f"{name}={value}") for name, value in env.items()]
    except ValueError as error:
        raise RequestError(f"the command cannot be started: {error}") from None
    parts.append(struct.pack("<I", len(limits)))
    parts += [struct.pack("<IQQ", *limit) for limit in limits]
    body = b"".join(parts)
    total = 12 + len(body)
    if total > MAX_EXEC_BYTES:
        raise RequestError(f"arguments and environment take {total} bytes; at most {MAX_EXEC_BYTES} are passed on")
    return b"CRLEXEC1" + struct.pack("<I", total) + body


def send_request(
    control: socket.socket, request: Request, number: int = 0, argument: int = 0, fds: Sequence[int] = ()
) -> None:
    """Sends one request. Raises OSError (EPIPE, EAGAIN) when nobody reads any more."""
    message = _REQUEST.pack(request, number, argument, 0)
    if fds:
        rights = [(socket.SOL_SOCKET, socket.SCM_RIGHTS, array.array("i", fds))]
        control.sendmsg([message], rights, socket.MSG_NOSIGNAL)
    else:
        control.send(message, socket.MSG_NOSIGNAL)


def receive_report(control: socket.socket) -> Report | None:
    """The next report, or None at the end of the stream. Raises BlockingIOError when there is none yet.

    Raises CorralError for anything that is not a report: the launcher is ours, so that is a bug and the caller
    closes the channel, which ends the sandbox.
    """
    data, ancillary, flags, _ = control.recvmsg(_REPORT.size, socket.CMSG_SPACE(4 * _MAX_FDS), socket.MSG_CMSG_CLOEXEC)
    fds = array.array("i")
    for level, kind, content in ancillary:
        if level == socket.SOL_SOCKET and kind == socket.SCM_RIGHTS:
            fds.frombytes(content[: len(content) - len(content) % fds.itemsize])
    if not data and not fds:
        return None
    try:
        if len(data) != _REPORT.size or flags & (socket.MSG_TRUNC | socket.MSG_CTRUNC):
            raise ValueError("wrong size")
        kind, number, status, error, *values, step, detail = _REPORT.unpack(data)
        usage = Usage(values[0] / 1e6, values[1] / 1e6, values[2] * 1024, *values[3:8])
        return Report(
            ReportType(kind),
            number,
            status,
            error,
            usage,
            step.rstrip(b"\0").decode("utf-8", "replace"),
            detail.rstrip(b"\0").decode("utf-8", "replace"),
            tuple(fds),
        )
    except ValueError as error:
        for fd in fds:
            os.close(fd)
        raise CorralError(f"the launcher sent something that is no report: {error}") from None
