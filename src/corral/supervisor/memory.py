"""Reads the memory and takes copies of the descriptors of processes in a sandbox.

Whatever is read is a copy of what the memory was at one moment; its owner may change it at once. So each argument is
read once, and the copy is what is decided on and what is done (I5).
"""

from __future__ import annotations

import ctypes
import os
import threading
from collections.abc import Callable, Sequence
from contextlib import suppress
from errno import EFAULT, EIO, ENAMETOOLONG

PAGE = 4096
MAX_PLACES = 1024
"""``UIO_MAXIOV``"""
_PIDFD_GETFD = 438
_ADDRESS_MASK = (1 << 64) - 1


class _Vector(ctypes.Structure):
    _fields_ = (("base", ctypes.c_void_p), ("length", ctypes.c_size_t))


_libc = ctypes.CDLL(None, use_errno=True)
_readv = _libc.process_vm_readv
_readv.argtypes = (
    ctypes.c_int,
    ctypes.POINTER(_Vector),
    ctypes.c_ulong,
    ctypes.POINTER(_Vector),
    ctypes.c_ulong,
    ctypes.c_ulong,
)
_readv.restype = ctypes.c_ssize_t
_writev = _libc.process_vm_writev
_writev.argtypes, _writev.restype = _readv.argtypes, _readv.restype
_syscall = _libc.syscall
_syscall.restype = ctypes.c_long
_syscall.argtypes = (ctypes.c_long, ctypes.c_long, ctypes.c_long, ctypes.c_long)


def read(tid: int, address: int, length: int) -> bytes:
    """``length`` bytes of the memory that thread ``tid`` uses.

    Raises OSError: EFAULT where any of it is not there, EPERM where the process cannot be read, ESRCH where it is gone.
    """
    if length == 0:
        return b""
    if length > PAGE:
        buffer = ctypes.create_string_buffer(length)
        local, remote = _Vector(ctypes.addressof(buffer), length), _Vector(address & _ADDRESS_MASK, length)
        got, view = _checked(_readv(tid, local, 1, remote, 1, 0)), memoryview(buffer)
    else:
        local, remote, to, place, view = _room.parts
        local.length = remote.length = length
        remote.base = address & _ADDRESS_MASK
        got = _checked(_readv(tid, to, 1, place, 1, 0))
    if got != length:
        raise OSError(EFAULT, os.strerror(EFAULT))
    return view[:length].tobytes()


class _Room(threading.local):
    """Where small reads go: making it anew would take longer than reading."""

    def __init__(self) -> None:
        buffer = ctypes.create_string_buffer(PAGE)
        local, remote = _Vector(ctypes.addressof(buffer), PAGE), _Vector()
        self.parts = local, remote, ctypes.pointer(local), ctypes.pointer(remote), memoryview(buffer)


_room = _Room()


def gather(tid: int, places: Sequence[tuple[int, int]]) -> bytes:
    """What lies at several ``(address, length)``, at most :data:`MAX_PLACES` of them, up to the first place that is not
    there. Raises OSError as :func:`read` where nothing is."""
    buffer = ctypes.create_string_buffer(sum(length for _, length in places))
    local = _Vector(ctypes.addressof(buffer), len(buffer))
    remote = (_Vector * len(places))(*(_Vector(address, length) for address, length in places))
    got = _checked(_readv(tid, local, 1, remote, len(places), 0))
    return ctypes.string_at(buffer, got)


def write(tid: int, address: int, data: bytes, *, still: Callable[[], bool]) -> None:
    """Puts ``data`` into the memory that thread ``tid`` uses, where the kernel itself would put a result.

    ``still`` says whether ``tid`` is still who it was; asked when the memory is in hand, so that it cannot become
    somebody else's. Raises OSError (EFAULT, EPERM, ESRCH).
    """
    fd = -1
    try:
        with suppress(PermissionError):  # as ordinary user, of a process that is not dumpable
            fd = os.open(f"/proc/{tid}/mem", os.O_WRONLY | os.O_CLOEXEC)
        if not still():
            raise ProcessLookupError
        if fd >= 0:
            written = os.pwrite(fd, data, address)
        else:
            local = _Vector(ctypes.cast(ctypes.c_char_p(data), ctypes.c_void_p).value, len(data))
            written = _checked(_writev(tid, local, 1, _Vector(address & _ADDRESS_MASK, len(data)), 1, 0))
    except OverflowError:  # no address of a process
        written = 0
    except OSError as error:
        if error.errno != EIO:  # how /proc says that nothing is there
            raise
        written = 0
    finally:
        if fd >= 0:
            os.close(fd)
    if written != len(data):
        raise OSError(EFAULT, os.strerror(EFAULT))


def _checked(result: int) -> int:
    if result < 0:
        error = ctypes.get_errno()
        raise OSError(error, os.strerror(error))
    return result


def read_text(tid: int, address: int, limit: int = PAGE) -> bytes:
    """The bytes up to the first NUL. Raises OSError as :func:`read`; ENAMETOOLONG where ``limit`` bytes have none."""
    found = b""
    while len(found) < limit:
        # To the end of a page: the next may not be mapped, and need not be.
        length = min(PAGE - (address + len(found)) % PAGE, limit - len(found))
        part = read(tid, address + len(found), length)
        text, end, _ = part.partition(b"\0")
        found += text
        if end:
            return found
    raise OSError(ENAMETOOLONG, os.strerror(ENAMETOOLONG))


def take(pidfd: int, number: int) -> int:
    """A copy of descriptor ``number`` of the process, for us. Raises OSError: EBADF where it has none, EPERM, ESRCH."""
    fd = int(_syscall(_PIDFD_GETFD, pidfd, number & 0xFFFFFFFF, 0))
    if fd < 0:
        error = ctypes.get_errno()
        raise OSError(error, os.strerror(error))
    return fd
