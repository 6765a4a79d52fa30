"""Touching a sandbox's files as one of its users, never as the host's root.

Links planted inside cannot lead out (:mod:`corral.openat2`), but they can lead to what their author may not
read or change *inside*. So while root's controller works there, the thread has the file-system ids of the acting user
(setfsuid(2)), and no groups. Leaving id 0 also takes away the capabilities that pass over file permissions
(capabilities(7)); what is created belongs to an id that the sandbox knows.

Only the calling thread changes: other threads stay who they are. A side effect for the whole process: once ids have
changed, it counts as non-dumpable, and the thread's parent-death signal is cleared (credentials(7), prctl(2)).
"""

from __future__ import annotations

import ctypes
import functools
import os
from collections.abc import Sequence
from contextlib import AbstractContextManager, nullcontext
from types import TracebackType

from corral.errors import RequestError, WallError

# libc's setgroups() changes all threads; the system call changes this one.
_SETGROUPS = {"x86_64": 116, "aarch64": 159}
_UNCHANGED = 0xFFFFFFFF
_CAPABILITY_VERSION = 0x20080522
# CAP_CHOWN, CAP_DAC_OVERRIDE, CAP_DAC_READ_SEARCH, CAP_FOWNER, CAP_FSETID, CAP_MKNOD
_FILE_CAPABILITIES = 1 << 0 | 1 << 1 | 1 << 2 | 1 << 3 | 1 << 4 | 1 << 27


@functools.cache
def _libc() -> ctypes.CDLL:
    libc = ctypes.CDLL(None, use_errno=True)
    for name in ("setfsuid", "setfsgid"):
        function = getattr(libc, name)
        function.argtypes, function.restype = (ctypes.c_uint32,), ctypes.c_uint32
    return libc


def _current() -> tuple[int, int]:
    """The thread's file-system user and group: an id that cannot be set makes the call answer with the present one."""
    return int(_libc().setfsuid(_UNCHANGED)), int(_libc().setfsgid(_UNCHANGED))


def _set_groups(groups: Sequence[int]) -> None:
    number = _SETGROUPS.get(os.uname().machine)
    if number is None:
        raise WallError("acting user", f"setgroups has no known number on {os.uname().machine}")
    array = (ctypes.c_uint32 * len(groups))(*groups)
    if _libc().syscall(ctypes.c_long(number), ctypes.c_size_t(len(groups)), array) != 0:
        raise WallError("acting user", "setgroups", ctypes.get_errno())


def _effective_capabilities() -> int:
    header = (ctypes.c_uint32 * 2)(_CAPABILITY_VERSION, 0)
    data = (ctypes.c_uint32 * 6)()
    if _libc().capget(header, data) != 0:
        raise WallError("acting user", "capget", ctypes.get_errno())
    return int(data[0])


class _Acting:
    """The block itself. One object per block."""

    def __init__(self, uid: int, gid: int) -> None:
        self._wanted = (uid, gid)
        self._own = (os.geteuid(), os.getegid())
        self._groups: list[int] = []

    def __enter__(self) -> None:
        if _current() != self._own:
            raise WallError("acting user", "this thread already acts as somebody else")
        self._groups = os.getgroups()
        try:
            if self._groups:
                _set_groups(())
            uid, gid = self._wanted
            _libc().setfsgid(gid)
            _libc().setfsuid(uid)
            # Both calls report no errors, and securebits can make the second keep the capabilities.
            if _current() != self._wanted or _effective_capabilities() & _FILE_CAPABILITIES:
                raise WallError("acting user", f"this thread cannot become user {uid}, group {gid}")
        except BaseException:
            self._restore()
            raise

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        try:
            self._restore()
        except BaseException:  # Ctrl-C can arrive here too
            self._restore()
            raise

    def _restore(self) -> None:
        """Back to the caller's own ids, or nothing goes on: what this thread did next it would do as the agent."""
        uid, gid = self._own
        _libc().setfsuid(uid)
        _libc().setfsgid(gid)
        try:
            if self._groups:
                _set_groups(self._groups)
            restored = _current() == self._own
        except WallError:
            restored = False
        if not restored:
            os.write(2, b"corral: a thread cannot get its own ids back; ending the process\n")
            os.abort()


class Actor:
    """A user of a sandbox as whom its files can be touched. May be shared between threads.

    Raises RequestError for a user that the caller cannot be: host root for anybody, others than oneself for an
    ordinary user.
    """

    def __init__(self, uid: int, gid: int) -> None:
        self._ids = (uid, gid)
        own = os.geteuid()
        self._switches = own != uid
        if uid == 0 or (self._switches and gid == 0):
            raise RequestError("files in a sandbox are never touched as root of the host")
        if own not in (0, uid):
            raise RequestError(f"only root can touch files as another user of the host ({uid}); you are {own}")

    def acting(self) -> AbstractContextManager[None]:
        """For an own block around calls that touch the inside, and only those. Not to be nested."""
        return _Acting(*self._ids) if self._switches else nullcontext()
