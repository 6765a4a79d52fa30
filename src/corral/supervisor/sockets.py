"""Calls on copies of a caller's sockets, with the bytes that were decided.

Python's own socket module builds addresses and messages anew from what it understands of them; here the kernel gets
exactly what was looked at. The layouts are those of 64-bit Linux (``struct msghdr``, ``struct iovec``).
"""

from __future__ import annotations

import ctypes
import fcntl
import os
import socket
import struct
from errno import EAFNOSUPPORT, EINPROGRESS

from corral.actions import Transport

SO_NETNS_COOKIE = 71
"""Which network namespace a socket belongs to, as a number (Linux 5.14); socket(7) does not list it."""
SO_SNDTIMEO = socket.SO_SNDTIMEO
_SIOCGSKNS = 0x894C
"""A descriptor of the socket's network namespace; needs CAP_NET_ADMIN over that."""
_SIOCOUTQ = 0x5411
_SO_COOKIE = 57
_COOKIE_BYTES = 8
_INT = struct.Struct("@i")
_AT_ONCE = int(socket.MSG_DONTWAIT | socket.MSG_NOSIGNAL)
_TIMEVAL = struct.Struct("@ll")

_libc = ctypes.CDLL(None, use_errno=True)
_connect, _bind = _libc.connect, _libc.bind
_connect.argtypes = _bind.argtypes = (ctypes.c_int, ctypes.c_char_p, ctypes.c_uint)
_listen = _libc.listen
_listen.argtypes = (ctypes.c_int, ctypes.c_int)
_prompt = ctypes.PyDLL(None, use_errno=True)
"""Keeps Python's lock: for what never waits, between a call that has woken others of our threads and its answer."""
_getsockname = _prompt.getsockname
_getsockname.argtypes = (ctypes.c_int, ctypes.c_char_p, ctypes.POINTER(ctypes.c_uint))


class _Vector(ctypes.Structure):
    _fields_ = (("base", ctypes.c_char_p), ("length", ctypes.c_size_t))


class _Message(ctypes.Structure):
    _fields_ = (
        ("name", ctypes.c_char_p),
        ("name_length", ctypes.c_uint),
        ("vectors", ctypes.POINTER(_Vector)),
        ("count", ctypes.c_size_t),
        ("control", ctypes.c_char_p),
        ("control_length", ctypes.c_size_t),
        ("flags", ctypes.c_int),
    )


_sendmsg = _libc.sendmsg
_sendmsg.argtypes = (ctypes.c_int, ctypes.POINTER(_Message), ctypes.c_int)
_sendmsg.restype = ctypes.c_ssize_t


class Copy:
    """A copy of a caller's descriptor that must be a socket. Whoever makes one closes it."""

    __slots__ = ("_socket", "domain", "fd", "home", "type")

    def __init__(self, fd: int) -> None:
        """Takes ``fd`` over, also when it raises. Raises OSError (ENOTSOCK, EBADF)."""
        self.fd = fd
        # With all that it would ask for given, making it is no system call; only its getsockopt is used.
        self._socket = socket.SocketType(socket.AF_UNIX, socket.SOCK_STREAM, 0, fd)  # without socket.socket's own work
        try:
            self.domain = self._socket.getsockopt(socket.SOL_SOCKET, socket.SO_DOMAIN)
            """AF_*; IPV6_ADDRFORM (ipv6(7)) can change it at any time."""
            self.type = self._socket.getsockopt(socket.SOL_SOCKET, socket.SO_TYPE)
            """SOCK_*"""
            self.home = self._socket.getsockopt(socket.SOL_SOCKET, SO_NETNS_COOKIE, _COOKIE_BYTES)
            """The cookie of its network namespace."""
        except BaseException:
            self._socket.close()
            raise

    def close(self) -> None:
        """May be called again."""
        self._socket.close()

    # ---- what it is ----

    def option(self, level: int, name: int) -> int:
        """An ``int`` option, or 0 where it has none of this name."""
        try:
            return self._socket.getsockopt(level, name)
        except OSError:
            return 0

    @property
    def transport(self) -> Transport:
        """What an Internet socket speaks. Raises OSError for what the table lets nobody make."""
        if self.type == socket.SOCK_DGRAM:
            return Transport.UDP
        if self.type == socket.SOCK_STREAM:
            return Transport.TCP
        raise OSError(EAFNOSUPPORT, os.strerror(EAFNOSUPPORT))

    @property
    def cookie(self) -> int:
        """What tells this socket from all others, as long as the machine runs (SO_COOKIE)."""
        return int.from_bytes(self._socket.getsockopt(socket.SOL_SOCKET, _SO_COOKIE, _COOKIE_BYTES), "little")

    @property
    def unread(self) -> int:
        """Of a Unix socket: bytes of memory that hold what was sent and not yet read (unix(7), SIOCOUTQ)."""
        queued: int = _INT.unpack(fcntl.ioctl(self.fd, _SIOCOUTQ, bytes(_INT.size)))[0]
        return queued

    def name(self) -> bytes:
        """Its own address (getsockname(2)), raw. Raises OSError."""
        buffer = ctypes.create_string_buffer(128)
        length = ctypes.c_uint(len(buffer))
        _check(_getsockname(self.fd, buffer, ctypes.byref(length)))
        return buffer.raw[: min(length.value, len(buffer))]

    def network(self) -> tuple[int, int]:
        """Device and inode of its network namespace. Raises OSError (EPERM: one that we have no rights over)."""
        fd = fcntl.ioctl(self.fd, _SIOCGSKNS)
        try:
            status = os.fstat(fd)
            return status.st_dev, status.st_ino
        finally:
            os.close(fd)

    @property
    def blocking(self) -> bool:
        """Whether calls on it wait (no O_NONBLOCK)."""
        return not fcntl.fcntl(self.fd, fcntl.F_GETFL) & os.O_NONBLOCK

    @property
    def patience(self) -> float | None:
        """Seconds that a send or connect may wait (SO_SNDTIMEO), or None for ever."""
        seconds, micro = _TIMEVAL.unpack(self._socket.getsockopt(socket.SOL_SOCKET, SO_SNDTIMEO, _TIMEVAL.size))
        return seconds + micro / 1e6 or None

    # ---- what is done with it ----

    def connect(self, address: bytes) -> None:
        """Connects without waiting. Raises OSError (EINPROGRESS, EALREADY: it goes on)."""
        try:
            if self.type == socket.SOCK_STREAM:
                flags = fcntl.fcntl(self.fd, fcntl.F_GETFL)
                if not flags & os.O_NONBLOCK:
                    # The open file is the caller's too, and shows this for the few microseconds of two calls.
                    fcntl.fcntl(self.fd, fcntl.F_SETFL, flags | os.O_NONBLOCK)
                    try:
                        self._connect_at_once(address)
                    finally:
                        fcntl.fcntl(self.fd, fcntl.F_SETFL, flags)
                    return
            _check(_connect(self.fd, address, len(address)))
        except InterruptedError:  # it would have waited, as somebody has just changed its flags: see stalls.py
            raise OSError(EINPROGRESS, os.strerror(EINPROGRESS)) from None

    def _connect_at_once(self, address: bytes) -> None:
        """For who would wait: what is on this machine has answered by the time that the first call returns, and the
        second one says so."""
        try:
            _check(_connect(self.fd, address, len(address)))
        except BlockingIOError as begun:
            if begun.errno != EINPROGRESS:
                raise
            try:
                _check(_connect(self.fd, address, len(address)))
            except BlockingIOError:
                raise begun from None

    def bind(self, address: bytes) -> None:
        """Raises OSError."""
        _check(_bind(self.fd, address, len(address)))

    def listen(self, backlog: int) -> None:
        """Raises OSError."""
        _check(_listen(self.fd, backlog))

    def send(self, data: bytes, flags: int, address: bytes = b"", control: bytes = b"") -> int:
        """Sends without waiting and without SIGPIPE. Returns how many bytes. Raises OSError."""
        vector = _Vector(data, len(data))
        message = _Message(address or None, len(address), ctypes.pointer(vector), 1, control or None, len(control), 0)
        sent = int(_sendmsg(self.fd, ctypes.byref(message), flags | _AT_ONCE))
        _check(sent)
        return sent


def _check(result: int) -> None:
    if result < 0:
        error = ctypes.get_errno()
        raise OSError(error, os.strerror(error))
