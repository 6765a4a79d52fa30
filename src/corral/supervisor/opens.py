"""open(2), openat(2), openat2(2) and creat(2), where the policy names files: every open is then made for its caller.

Which file it is, is found first; the names that the policy is about are decided on by the object's own path; and that
very object is opened, by the deputy, with the caller's rights. A new file is made where nothing was, in the directory
that was found. The caller gets the descriptor in the moment of the answer.

Two kinds of files know who opens them. Entries of the caller's own /proc/PID are opened by the supervisor, of which
those in :data:`OWN_READABLE` and :data:`OWN_WRITABLE` give away nothing that the caller may not have; where they show
ids as their opener knows them (:data:`OF_THE_OPENER`), by the deputy, which knows those inside. For ``/dev/tty``
the caller gets the terminal that it has as standard input, output or error, if that is its controlling one.
"""

from __future__ import annotations

import errno as errors
import fcntl
import os
import re
import stat
import struct
from collections.abc import Callable
from contextlib import suppress
from functools import partial

from corral.actions import Access, File, KernelCall, Kind
from corral.supervisor.call import Call
from corral.supervisor.deputy_wire import Reply
from corral.supervisor.errands import Errand
from corral.supervisor.places import Entry, Place, Work, find, find_entry

_AT_FDCWD = -100
MAX_TRIES = 16
"""How often a name may come and go between two looks."""
MAX_LINKS = 40
_TMPFILE = os.O_TMPFILE & ~os.O_DIRECTORY
_CREATING = os.O_CREAT | _TMPFILE
_KNOWN = (
    os.O_ACCMODE | os.O_CREAT | os.O_EXCL | os.O_NOCTTY | os.O_TRUNC | os.O_APPEND | os.O_NONBLOCK | os.O_SYNC
    | os.O_DSYNC | os.O_ASYNC | os.O_DIRECT | 0o100000 | os.O_DIRECTORY | os.O_NOFOLLOW | os.O_NOATIME | os.O_CLOEXEC
    | os.O_PATH | _TMPFILE
)  # fmt: skip
_HOW = struct.Struct("<QQQ")
_MAX_HOW = 4096
_RESOLVE_KNOWN, _RESOLVE_CACHED = 0x3F, 0x20
_TTY = os.makedev(5, 0)
_NO_TERMINAL = "the caller's terminal is none of its standard descriptors, and cannot be opened for it"

OWN_READABLE = frozenset(
    """arch_status auxv autogroup cgroup cmdline comm coredump_filter cpuset cpu_resctrl_groups environ gid_map io
    latency limits loginuid maps mountinfo mounts mountstats numa_maps oom_adj oom_score oom_score_adj personality
    projid_map sched schedstat sessionid setgroups smaps smaps_rollup stat statm status syscall timers
    timerslack_ns uid_map wchan""".split()
)
"""Not here: what is decided by the rights of who opened it (mem, pagemap, stack, ns/*)."""
OF_THE_OPENER = frozenset("gid_map loginuid projid_map status uid_map".split())
"""Shown in the user namespace of who opened it (user_namespaces(7)), as is net/*: to us these are ids of the host."""
OWN_WRITABLE = frozenset("autogroup clear_refs comm coredump_filter oom_adj oom_score_adj sched timerslack_ns".split())
_OWN_DIRECTORIES = frozenset(("", "attr", "fd", "fdinfo", "map_files", "net", "ns", "task"))
_OWN_PLACE = re.compile(r"/proc/\d+(?:/task/\d+)?(?:/(?P<name>.*))?\Z", re.DOTALL)


def _open(call: Call) -> None:
    _begin(call, _AT_FDCWD, call.arguments[0], call.low(1), call.low(2))


def _creat(call: Call) -> None:
    _begin(call, _AT_FDCWD, call.arguments[0], os.O_CREAT | os.O_WRONLY | os.O_TRUNC, call.low(1))


def _openat(call: Call) -> None:
    _begin(call, call.signed(0), call.arguments[1], call.low(2), call.low(3))


def _openat2(call: Call) -> None:
    size = call.arguments[3]
    if size < _HOW.size:
        raise _error(errors.EINVAL)
    if size > _MAX_HOW:
        raise _error(errors.E2BIG)
    data = call.read(call.arguments[2], size)
    if any(data[_HOW.size :]):
        raise _error(errors.E2BIG)
    flags, mode, resolve = _HOW.unpack_from(data)
    if flags & ~_KNOWN or resolve & ~_RESOLVE_KNOWN or mode & ~0o7777 or (mode and not flags & _CREATING):
        raise _error(errors.EINVAL)
    if flags & os.O_PATH:
        raise _error(errors.ENOSYS)  # the flag lies in memory: see _begin. Callers fall back on openat
    if resolve & _RESOLVE_CACHED:
        raise _error(errors.EAGAIN)  # "not without waiting": the caller tries without it
    _begin(call, call.signed(0), call.arguments[1], flags, mode, resolve)


def _begin(call: Call, directory: int, address: int, flags: int, mode: int, resolve: int = 0) -> None:
    if flags & os.O_PATH:
        # In a register, so it stays. Such a descriptor gives neither content nor a way to change it, and whatever is
        # done by it is decided then; and the kernel lets nobody but the caller itself have one.
        call.proceed()
        return
    flags &= _KNOWN
    if flags & _TMPFILE and (not flags & os.O_DIRECTORY or flags & os.O_ACCMODE == os.O_RDONLY):
        raise _error(errors.EINVAL)
    if flags & os.O_CREAT and flags & os.O_DIRECTORY:
        raise _error(errors.EINVAL)
    path = call.read_text(address)
    if not path:
        raise _error(errors.ENOENT)
    work = Work(call)
    work.run(_Opening(work, directory, path, flags, mode & 0o7777 if flags & _CREATING else 0, resolve).start)


def _error(number: int) -> OSError:
    return OSError(number, os.strerror(number))


class _Opening:
    """One open."""

    __slots__ = ("_directory", "_flags", "_links", "_mode", "_path", "_resolve", "_tries", "_work")

    def __init__(self, work: Work, directory: int, path: bytes, flags: int, mode: int, resolve: int) -> None:
        self._work, self._directory, self._path = work, directory, path
        self._flags, self._mode, self._resolve = flags, mode, resolve
        self._tries = self._links = 0

    @property
    def _access(self) -> Access:
        reads = self._flags & os.O_ACCMODE == os.O_RDONLY and not self._flags & (os.O_TRUNC | _CREATING)
        return Access.READ if reads else Access.WRITE

    def start(self) -> None:
        flags = self._flags
        if flags & os.O_CREAT and self._path.endswith(b"/") and self._path.strip(b"/"):
            find_entry(
                self._work, self._directory, self._path, self._refuse_slash, special=_NO_FILES, resolve=self._resolve
            )
            return
        follow = not flags & os.O_NOFOLLOW and not (flags & os.O_CREAT and flags & os.O_EXCL)
        find(
            self._work,
            self._directory,
            self._path,
            self._found,
            self._not_found,
            follow=follow,
            must_be_directory=bool(flags & os.O_DIRECTORY),
            resolve=self._resolve,
        )

    # ---- what is there ----

    def _found(self, place: Place) -> None:
        flags, work = self._flags, self._work
        if flags & os.O_CREAT and flags & os.O_EXCL:
            raise _error(errors.EEXIST)
        if place.own:
            self._open_own(place.own)
            return
        status = os.fstat(place.fd)
        if flags & os.O_CREAT and stat.S_ISDIR(status.st_mode):
            raise _error(errors.EISDIR)
        if stat.S_ISLNK(status.st_mode):
            raise _error(errors.ELOOP)
        if stat.S_ISCHR(status.st_mode) and status.st_rdev == _TTY:
            self._open_terminal()
            return
        waits = stat.S_ISFIFO(status.st_mode) and not flags & os.O_NONBLOCK
        effect = partial(self._reopen, place.fd, waits=waits)
        if work.call.sandbox.watch.names(place.path):
            work.decide(Kind.FILE_OPEN, File(place.path, self._access), effect)
        else:
            effect()

    def _reopen(self, fd: int, *, waits: bool) -> None:
        work = self._work
        flags = self._flags & ~(os.O_CREAT | os.O_EXCL)
        request = partial(work.call.sandbox.deputy.open, work.caller, fd, flags, mode=self._mode)
        if waits:
            Errand(work.call, request, self._waited, release=work.close)
        else:
            work.ask(request, self._opened)

    def _waited(self, reply: Reply) -> None:
        if reply.fd >= 0:
            self._work.held.callback(os.close, reply.fd)
        self._work.run(lambda: self._opened(reply))

    def _opened(self, reply: Reply) -> None:
        if reply.errno:
            raise _error(reply.errno)
        self._install(reply.fd)

    def _install(self, fd: int) -> None:
        self._work.call.install(fd, close_on_exec=bool(self._flags & os.O_CLOEXEC))
        self._work.close()

    # ---- what is not there ----

    @staticmethod
    def _refuse_slash(entry: Entry) -> None:
        raise _error(errors.EISDIR)

    def _not_found(self, errno: int) -> None:
        if errno != errors.ENOENT or not self._flags & os.O_CREAT:
            raise _error(errno)
        find_entry(
            self._work, self._directory, self._path, self._look_at_entry, special=_NO_FILES, resolve=self._resolve
        )

    def _look_at_entry(self, entry: Entry) -> None:
        """A name that leads nowhere may be a link to where the file is to be made."""
        work = self._work
        try:
            status = os.stat(entry.name, dir_fd=entry.directory, follow_symlinks=False)
        except FileNotFoundError:
            self._create(entry)
            return
        if not stat.S_ISLNK(status.st_mode):
            self._again()
            return
        self._links += 1
        if self._links > MAX_LINKS or self._resolve or self._flags & (os.O_NOFOLLOW | os.O_EXCL):
            raise _error(errors.ELOOP)
        target = os.readlink(os.fsencode(entry.name), dir_fd=entry.directory)
        above = os.fsencode(os.path.dirname(entry.path))
        self._directory, self._path = _AT_FDCWD, os.path.join(above, target)
        work.run(self.start)

    def _create(self, entry: Entry) -> None:
        work = self._work

        def effect() -> None:
            flags = self._flags | os.O_EXCL
            deputy = work.call.sandbox.deputy
            work.ask(partial(deputy.create, work.caller, entry.directory, entry.name, flags, self._mode), created)

        def created(reply: Reply) -> None:
            if reply.errno == errors.EEXIST and not self._flags & os.O_EXCL:
                self._again()
            else:
                self._opened(reply)

        if work.call.sandbox.watch.names(entry.path):
            work.decide(Kind.FILE_OPEN, File(entry.path, Access.WRITE), effect)
        else:
            effect()

    def _again(self) -> None:
        self._tries += 1
        if self._tries > MAX_TRIES:
            raise _error(errors.EAGAIN)
        self.start()

    # ---- what depends on who opens ----

    def _open_own(self, path: str) -> None:
        flags, call = self._flags, self._work.call
        match = _OWN_PLACE.match(path)
        name = (match["name"] or "") if match else "?"
        allowed = (
            (name in OWN_READABLE and self._access is Access.READ)
            or (name in OWN_WRITABLE and name in OWN_READABLE)
            or (name in OWN_WRITABLE and flags & os.O_ACCMODE == os.O_WRONLY)
            or (self._access is Access.READ and (name in _OWN_DIRECTORIES or name.startswith(("net/", "fdinfo/"))))
        )
        if not allowed:
            raise _error(errors.EACCES)
        if name in OF_THE_OPENER or name.startswith("net/"):
            found = call.sandbox.tree.open_own(call, path, os.O_PATH)
            self._work.held.callback(os.close, found)
            self._reopen(found, waits=False)
            return
        flags &= ~(os.O_CREAT | os.O_TRUNC)
        fd = call.sandbox.tree.open_own(call, path, flags | os.O_NOCTTY)
        try:
            self._install(fd)
        finally:
            os.close(fd)

    def _open_terminal(self) -> None:
        call = self._work.call
        number = _terminal_of(call.actor.process.pid)
        if number == 0:
            raise _error(errors.ENXIO)
        for descriptor in range(3):
            with suppress(OSError):
                fd = call.take_number(descriptor)
                self._work.held.callback(os.close, fd)
                status = os.fstat(fd)
                if stat.S_ISCHR(status.st_mode) and status.st_rdev == number:
                    self._reopen(fd, waits=False)
                    return
        subject = KernelCall(call.name, errors.ENXIO, _NO_TERMINAL, quiet=True)
        call.decide(Kind.KERNEL, subject, lambda: None, refused=errors.ENXIO)
        self._work.fail(errors.ENXIO)


def is_path_only(fd: int) -> bool:
    """Whether a descriptor was opened with O_PATH."""
    return bool(fcntl.fcntl(fd, fcntl.F_GETFL) & os.O_PATH)


def _terminal_of(pid: int) -> int:
    """The device of the controlling terminal (proc(5), stat, field 7), or 0."""
    with open(f"/proc/{pid}/stat", "rb", buffering=0) as file:
        number = int(file.read(4096).rpartition(b")")[2].split()[4]) & 0xFFFFFFFF
    if not number:
        return 0
    return os.makedev(number >> 8 & 0xFFF, (number & 0xFF) | (number >> 12 & 0xFFF00))


_NO_FILES = {b".": errors.EISDIR, b"..": errors.EISDIR, b"": errors.EISDIR}

HANDLERS: dict[str, Callable[[Call], None]] = {
    "open": _open,
    "creat": _creat,
    "openat": _openat,
    "openat2": _openat2,
}
