"""The listener of a sandbox's filter: seccomp_unotify(2) as functions over a descriptor.

The layouts are those of ``linux/seccomp.h``; the request numbers carry their sizes, so a kernel with other layouts
answers ENOTTY and nothing is misread.
"""

from __future__ import annotations

import fcntl
import struct
from contextlib import suppress
from typing import NamedTuple

from corral.supervisor.stalls import uninterrupted

_NOTIFICATION = struct.Struct("<QI4xiI8x6Q")  # id, pid, (flags,) nr, arch, (instruction pointer,) arguments
_RESPONSE = struct.Struct("<QqiI")  # id, value, error, flags
_ADD_DESCRIPTOR = struct.Struct("<QIIII")  # id, flags, source, number, flags of the new descriptor
_ID = struct.Struct("<Q")
_EMPTY = bytes(_NOTIFICATION.size)

_RECEIVE = 0xC0502100  # SECCOMP_IOCTL_NOTIF_RECV
_SEND = 0xC0182101  # SECCOMP_IOCTL_NOTIF_SEND
_ID_VALID = 0x40082102  # SECCOMP_IOCTL_NOTIF_ID_VALID
_ADD = 0x40182103  # SECCOMP_IOCTL_NOTIF_ADDFD
_SET_FLAGS = 0x40082104  # SECCOMP_IOCTL_NOTIF_SET_FLAGS
_SYNC_WAKE_UP = 1  # SECCOMP_USER_NOTIF_FD_SYNC_WAKE_UP
_CONTINUE = 1  # SECCOMP_USER_NOTIF_FLAG_CONTINUE
_ADD_AND_SEND = 2  # SECCOMP_ADDFD_FLAG_SEND
_CLOSE_ON_EXEC = 0o2000000


class Notification(NamedTuple):
    """One system call that waits. ``tid`` is a thread's, in our PID namespace."""

    id: int
    tid: int
    number: int
    architecture: int
    """AUDIT_ARCH_*"""
    arguments: tuple[int, ...]


def wake_in_step(listener: int) -> None:
    """Lets the kernel hand the processor over with each notification (Linux 6.6); before, answers are slower."""
    with suppress(OSError):
        fcntl.ioctl(listener, _SET_FLAGS, _SYNC_WAKE_UP)


def receive(listener: int) -> Notification | None:
    """The next waiting call, or None where its caller has died meanwhile.

    To be called when poll(2) says POLLIN; it would block otherwise.
    """
    buffer = bytearray(_EMPTY)  # the kernel insists on zeros
    try:
        fcntl.ioctl(listener, _RECEIVE, buffer)
    except (FileNotFoundError, InterruptedError):
        return None
    values = _NOTIFICATION.unpack(buffer)
    return Notification(values[0], values[1], values[2], values[3], values[4:])


def is_waiting(listener: int, number: int) -> bool:
    """Whether the caller still waits in this very call. It says nothing about the caller's memory."""
    try:
        _repeat(listener, _ID_VALID, _ID.pack(number))
    except OSError:
        return False
    return True


def _repeat(listener: int, request: int, argument: bytes) -> None:
    """ioctl(2), again where a signal interrupts it (:mod:`corral.supervisor.stalls`)."""
    while True:
        try:
            fcntl.ioctl(listener, request, argument)
        except InterruptedError:
            continue
        return


def answer(listener: int, number: int, value: int, errno: int) -> None:
    """The call returns ``value``, or fails with ``errno`` where that is not 0. Who is gone needs no answer."""
    try:  # noqa: SIM105 - contextlib.suppress costs a tenth of what the kernel needs for the answer
        _repeat(listener, _SEND, _RESPONSE.pack(number, 0 if errno else value, -errno, 0))
    except FileNotFoundError:
        pass


def proceed(listener: int, number: int) -> None:
    """The kernel makes the call itself, with the memory that the caller has by then."""
    try:  # noqa: SIM105
        _repeat(listener, _SEND, _RESPONSE.pack(number, 0, 0, _CONTINUE))
    except FileNotFoundError:
        pass


def install(listener: int, number: int, source: int, *, close_on_exec: bool) -> bool:
    """The call returns a new descriptor of ``source``'s file: one step, so that neither happens alone.

    Returns whether the caller was still there. Raises OSError (EMFILE: its table is full).
    """
    flags = _CLOSE_ON_EXEC if close_on_exec else 0
    try:
        with uninterrupted():  # half of it would be done: the caller would get 0, and no descriptor
            fcntl.ioctl(listener, _ADD, _ADD_DESCRIPTOR.pack(number, _ADD_AND_SEND, source, 0, flags))
    except FileNotFoundError:
        return False
    return True
