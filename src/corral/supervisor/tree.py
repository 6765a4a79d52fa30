"""Finds what a path of a caller names, in the sandbox's own tree, without being led out of it."""

from __future__ import annotations

import errno as errors
import os
import re
import stat
from typing import TYPE_CHECKING, NamedTuple

from corral.openat2 import Resolve, look_for_directory, openat2

if TYPE_CHECKING:
    from corral.supervisor.call import Call

_AT_FDCWD = -100
_MAX_STEPS = 512
"""Names on one way through /proc: one call must not take long."""
_MAX_MISSING = 4
"""Levels of missing directories for which a search for a program (execvp(3)) has a short way."""
_MAX_LINKS = 40
"""As the kernel's MAXSYMLINKS."""
_WITHIN = Resolve.IN_ROOT | Resolve.NO_MAGICLINKS
_PLAINLY = Resolve.NO_SYMLINKS | Resolve.NO_MAGICLINKS
_OWN = re.compile(rb"/proc/(\d+)(?:/task/\d+)?/(exe|cwd|root|fd/\d+)\Z")


class Lead(NamedTuple):
    """Where a path enters what belongs to the caller itself: a descriptor and what follows, or an entry of /proc."""

    fd: int
    rest: bytes
    own: str = ""
    """The path of an entry of /proc/PID that is no such link."""


class Tree:
    """The tree of one sandbox. There is one root for all in it: chroot(2) is refused."""

    def __init__(self, root: int) -> None:
        """``root`` is a descriptor of its root directory, which is taken over."""
        self._root = root

    def find(self, call: Call, directory: int, path: bytes, *, follow: bool) -> int:
        """A descriptor of what the caller's ``path`` names, from its descriptor ``directory`` or its working
        directory; mostly an O_PATH one. Raises OSError.

        With our rights, not the caller's, and by names that may change at once: for looking only.
        """
        if not path.startswith(b"/"):
            path = os.path.join(os.fsencode(directory_path(call, directory)), path)
        try:
            return self._open(path, follow=follow)
        except OSError as error:
            if error.errno not in (errors.ENOENT, errors.ELOOP) or (error.errno == errors.ENOENT and self._lacks(path)):
                raise
        return _Walk(self._root, call).find(path, follow=follow)

    def may_be_directory(self, tid: int, path: bytes) -> bool:
        """Whether ``path``, absolute or from the working directory of ``tid``, may be a directory's, and no link's; for
        those who ask often. Raises OSError."""
        if path.startswith(b"/"):
            errno = look_for_directory(self._root, path, _WITHIN)
        else:
            start = os.open(f"/proc/{tid}/cwd", os.O_PATH | os.O_CLOEXEC)
            errno = look_for_directory(start, path, _PLAINLY)
            os.close(start)
        return errno in (0, errors.ELOOP)

    def has_directory(self, call: Call, directory: int, path: bytes) -> bool:
        """Whether the caller's ``path`` is a directory's, and no link's. Raises OSError."""
        path = path.rstrip(b"/") or path  # a slash after it would follow a link, and rename(2) says ENOTDIR
        fd = self.find(call, directory, path, follow=False)
        try:
            return stat.S_ISDIR(os.fstat(fd).st_mode)
        finally:
            os.close(fd)

    def _open(self, path: bytes, *, follow: bool) -> int:
        return openat2(self._root, path, os.O_PATH | (0 if follow else os.O_NOFOLLOW), _WITHIN, patient=False)

    def _lacks(self, path: bytes, levels: int = _MAX_MISSING) -> bool:
        """Whether there is surely nothing of this name: its directory is there, and has no such entry; or there is
        surely no such directory, which is looked for a few levels up."""
        above, name = os.path.split(path)
        if not name or above.startswith(b"/proc") or name in (b".", b".."):
            return False
        try:
            parent = self._open(above, follow=True)
        except FileNotFoundError:
            return levels > 0 and self._lacks(above, levels - 1)
        except OSError:
            return False
        try:
            os.stat(name, dir_fd=parent, follow_symlinks=False)
        except OSError as error:
            return error.errno == errors.ENOENT and not os.readlink(f"/proc/self/fd/{parent}").startswith("/proc")
        finally:
            os.close(parent)
        return False

    def may_lead_to_own(self, call: Call, directory: int, path: bytes) -> bool:
        """Whether a path that leads nowhere for others may be one by which the caller reaches what is its own."""
        try:
            if not path.startswith(b"/"):
                path = os.path.join(os.fsencode(directory_path(call, directory)), path)
            return not self._lacks(path)
        except OSError:
            return False

    def lead(self, call: Call, directory: int, path: bytes, *, follow: bool) -> Lead | None:
        """Follows a path to where only the caller could go on. Raises OSError; None where it does not lead there.

        The descriptor is the receiver's. With our rights: what is found on the way is told to nobody.
        """
        if not path.startswith(b"/"):
            path = os.path.join(os.fsencode(directory_path(call, directory)), path)
        walk = _Walk(self._root, call, to_own=True)
        fd = walk.find(path, follow=follow)
        if walk.lead is None or walk.lead.fd != fd:
            os.close(fd)
        return walk.lead

    def open_own(self, call: Call, path: str, flags: int) -> int:
        """Opens a path below the caller's own /proc/PID, for it. Raises OSError."""
        fd = openat2(self._root, os.fsencode(path), flags, _WITHIN | Resolve.NO_SYMLINKS, patient=False)
        if not call.waits():  # then the number may be somebody else's
            os.close(fd)
            raise ProcessLookupError
        return fd

    def close(self) -> None:
        """Lets go of the root."""
        os.close(self._root)


class _Walk:
    """Follows a path as the kernel does for the caller, where it leads through /proc: to us it is another process's."""

    def __init__(self, root: int, call: Call, *, to_own: bool = False) -> None:
        """With ``to_own`` it stops, and sets ``lead``, where it comes to something of the caller's own."""
        self._root, self._call, self._to_own = root, call, to_own
        self._links = self._steps = 0
        self.lead: Lead | None = None

    def find(self, path: bytes, *, follow: bool) -> int:
        at: list[bytes] = []
        parts = _parts(path)
        while parts:
            self._steps += 1
            if self._steps > _MAX_STEPS:
                raise _error(errors.ELOOP)
            part = parts.pop(0)
            if part == b"..":
                at = at[:-1]
                continue
            place = self._place([*at, part])
            own = _OWN.match(place)
            if own and int(own[1]) == self._call.actor.process.inner_pid and (parts or follow):
                fd = self._own(own[2])
                if self._to_own:
                    self.lead = Lead(fd, b"/".join(parts))
                    return fd
                if not parts:
                    return fd
                try:
                    if not stat.S_ISDIR(os.fstat(fd).st_mode):
                        raise _error(errors.ENOTDIR)
                    at = _parts(os.readlink(f"/proc/self/fd/{fd}".encode()))
                finally:
                    os.close(fd)
                continue
            fd = openat2(self._root, place, os.O_PATH | os.O_NOFOLLOW, _WITHIN, patient=False)
            if self._to_own and not parts and self._is_own(place):
                self.lead = Lead(-1, b"", os.fsdecode(place))
                return fd
            if stat.S_ISLNK(os.fstat(fd).st_mode) and (parts or follow):
                try:
                    target = os.readlink(b"", dir_fd=fd)
                finally:
                    os.close(fd)
                self._links += 1
                if self._links > _MAX_LINKS:
                    raise _error(errors.ELOOP)
                parts = _parts(target) + parts
                if target.startswith(b"/"):
                    at = []
                continue
            if not parts:
                return fd
            os.close(fd)
            at = _parts(place)
        return openat2(self._root, b"/" + b"/".join(at), os.O_PATH, _WITHIN, patient=False)

    def _place(self, parts: list[bytes]) -> bytes:
        """The path, with the caller's numbers where /proc has links to "whoever asks"."""
        if parts[:1] == [b"proc"] and parts[1:2] in ([b"self"], [b"thread-self"]):
            own = str(self._call.actor.process.inner_pid).encode()
            parts = [b"proc", own, *parts[2:]]  # the threads of a process share what is looked at here
        return b"/" + b"/".join(parts)

    def _is_own(self, place: bytes) -> bool:
        own = b"/proc/%d" % self._call.actor.process.inner_pid
        return place == own or place.startswith(own + b"/")

    def _own(self, what: bytes) -> int:
        if what.startswith(b"fd/"):
            try:
                return self._call.take_number(int(what[3:]))
            except OSError as error:
                raise _error(errors.ENOENT if error.errno == errors.EBADF else error.errno or errors.EPERM) from None
        return os.open(f"/proc/{self._call.tid}/{what.decode()}", os.O_PATH | os.O_CLOEXEC)


def _parts(path: bytes) -> list[bytes]:
    return [part for part in path.split(b"/") if part not in (b"", b".")]


def _error(number: int) -> OSError:
    return OSError(number, os.strerror(number))


def directory_path(call: Call, directory: int) -> str:
    """Where a relative path starts: the path inside of a descriptor's directory or, for AT_FDCWD, of the caller's.
    Raises OSError."""
    if directory == _AT_FDCWD:
        return os.readlink(f"/proc/{call.tid}/cwd")
    fd = call.take_number(directory)
    try:
        if not stat.S_ISDIR(os.fstat(fd).st_mode):
            raise _error(errors.ENOTDIR)
        return os.readlink(f"/proc/self/fd/{fd}")
    finally:
        os.close(fd)


def starting_point(call: Call, directory: int) -> int:
    """A descriptor of where a relative path starts. Raises OSError (EBADF; EACCES where we may not look)."""
    if directory != _AT_FDCWD:
        return call.take_number(directory)
    fd = os.open(f"/proc/{call.tid}/cwd", os.O_PATH | os.O_DIRECTORY | os.O_CLOEXEC)
    if not call.waits():
        os.close(fd)
        raise ProcessLookupError
    return fd
