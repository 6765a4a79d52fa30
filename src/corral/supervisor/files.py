"""Renames, links, removals and changes of mode, where the policy names files: each is made for its caller.

As with :mod:`corral.supervisor.opens`: directories and objects are found first, decided on by their own paths where the
policy names them, and then used as they were found.
"""

from __future__ import annotations

import errno as errors
import os
import resource
import signal
import stat
from collections.abc import Callable
from contextlib import suppress
from functools import partial

from corral.actions import Access, File, Kind
from corral.supervisor import moving, opens
from corral.supervisor.call import Call
from corral.supervisor.deputy_wire import Reply
from corral.supervisor.places import NOT_MOVED, NOT_REMOVED, Entry, Place, Work, find, find_descriptor, find_entry

_AT_FDCWD = -100
_AT_SYMLINK_NOFOLLOW, _AT_REMOVEDIR, _AT_SYMLINK_FOLLOW, _AT_EMPTY_PATH = 0x100, 0x200, 0x400, 0x1000
_RENAME_EXCHANGE, _RENAME_KNOWN = 2, 7
_EXISTS = {b".": errors.EEXIST, b"..": errors.EEXIST, b"": errors.EEXIST}
_NOT_EMPTIED = {b".": errors.EINVAL, b"..": errors.ENOTEMPTY, b"": errors.EBUSY}


def _error(number: int) -> OSError:
    return OSError(number, os.strerror(number))


# ---- rename ----


def _rename(call: Call) -> None:
    _move(call, (_AT_FDCWD, 0), (_AT_FDCWD, 1), 0)


def _renameat(call: Call) -> None:
    _move(call, (call.signed(0), 1), (call.signed(2), 3), 0)


def _renameat2(call: Call) -> None:
    _move(call, (call.signed(0), 1), (call.signed(2), 3), call.low(4))


def _move(call: Call, old: tuple[int, int], new: tuple[int, int], flags: int) -> None:
    if not call.sandbox.watch:
        moving.begin(call, old, new, flags)
        return
    if flags & ~_RENAME_KNOWN:
        raise _error(errors.EINVAL)
    old_path, new_path = (call.read_text(call.arguments[argument]) for _, argument in (old, new))
    work = Work(call)

    def from_entry(source: Entry) -> None:
        def to_entry(target: Entry) -> None:
            _check_slashes(source, target)
            effect = partial(call.sandbox.moves.rename, work, source, target, flags, work.finish)
            watch = call.sandbox.watch
            moves = [watch.move(source.path, target.path)]
            if flags & _RENAME_EXCHANGE:
                moves.append(watch.move(target.path, source.path))
            for move in filter(None, reversed(moves)):
                effect = partial(work.decide, Kind.FILE_RENAME, File(move.old, Access.WRITE, move.new), effect)
            effect()

        find_entry(work, new[0], new_path, to_entry, special=NOT_MOVED)

    work.run(lambda: find_entry(work, old[0], old_path, from_entry, special=NOT_MOVED))


def _check_slashes(source: Entry, target: Entry) -> None:
    """Only a directory may be written as one (path_resolution(7))."""
    if source.has_slash or target.has_slash:
        status = os.stat(source.name, dir_fd=source.directory, follow_symlinks=False)
        if not stat.S_ISDIR(status.st_mode):
            raise _error(errors.ENOTDIR)


# ---- unlink ----


def _unlink(call: Call) -> None:
    _remove(call, _AT_FDCWD, 0, 0)


def _unlinkat(call: Call) -> None:
    _remove(call, call.signed(0), 1, call.low(2))


def _rmdir(call: Call) -> None:
    _remove(call, _AT_FDCWD, 0, _AT_REMOVEDIR)


def _remove(call: Call, directory: int, argument: int, flags: int) -> None:
    if flags & ~_AT_REMOVEDIR:
        raise _error(errors.EINVAL)
    path = call.read_text(call.arguments[argument])
    work = Work(call)

    def found(entry: Entry) -> None:
        if entry.has_slash and not flags:
            status = os.stat(entry.name, dir_fd=entry.directory, follow_symlinks=False)
            raise _error(errors.EISDIR if stat.S_ISDIR(status.st_mode) else errors.ENOTDIR)
        deputy = call.sandbox.deputy
        request = partial(deputy.unlink, work.caller, entry.directory, entry.name, remove_directory=bool(flags))
        _decide(work, Kind.FILE_UNLINK, entry.path, lambda: work.ask(request, work.finish))

    special = _NOT_EMPTIED if flags else NOT_REMOVED
    work.run(lambda: find_entry(work, directory, path, found, special=special))


def _decide(work: Work, kind: Kind, path: str, effect: Callable[[], None], other: str = "") -> None:
    """Has it decided if one of the names is watched."""
    watch = work.call.sandbox.watch
    if watch.names(path) or (other and watch.names(other)):
        work.decide(kind, File(path, Access.WRITE, other), effect)
    else:
        effect()


# ---- link, symlink, mknod ----


def _link(call: Call) -> None:
    _make_link(call, (_AT_FDCWD, 0), (_AT_FDCWD, 1), 0)


def _linkat(call: Call) -> None:
    _make_link(call, (call.signed(0), 1), (call.signed(2), 3), call.low(4))


def _make_link(call: Call, old: tuple[int, int], new: tuple[int, int], flags: int) -> None:
    if flags & ~(_AT_SYMLINK_FOLLOW | _AT_EMPTY_PATH):
        raise _error(errors.EINVAL)
    old_path, new_path = (call.read_text(call.arguments[argument]) for _, argument in (old, new))
    work = Work(call)

    def from_place(place: Place) -> None:
        if place.own:
            raise _error(errors.EXDEV)

        def to_entry(entry: Entry) -> None:
            _check_new(entry)
            request = partial(call.sandbox.deputy.link, work.caller, place.fd, entry.directory, entry.name)
            _decide(work, Kind.FILE_LINK, place.path, lambda: work.ask(request, work.finish), entry.path)

        find_entry(work, new[0], new_path, to_entry, special=_EXISTS)

    def start() -> None:
        if not old_path and flags & _AT_EMPTY_PATH:
            find_descriptor(work, old[0], from_place)
        else:
            find(work, old[0], old_path, from_place, work.fail, follow=bool(flags & _AT_SYMLINK_FOLLOW))

    work.run(start)


def _check_new(entry: Entry) -> None:
    """Nothing but a directory is made by a directory's name."""
    if entry.has_slash:
        os.stat(entry.name, dir_fd=entry.directory, follow_symlinks=False)  # raises ENOENT
        raise _error(errors.EEXIST)


def _symlink(call: Call) -> None:
    _make_symlink(call, 0, _AT_FDCWD, 1)


def _symlinkat(call: Call) -> None:
    _make_symlink(call, 0, call.signed(1), 2)


def _make_symlink(call: Call, target: int, directory: int, argument: int) -> None:
    text = os.fsdecode(call.read_text(call.arguments[target]))
    path = call.read_text(call.arguments[argument])
    if not text:
        raise _error(errors.ENOENT)
    work = Work(call)

    def found(entry: Entry) -> None:
        _check_new(entry)
        request = partial(call.sandbox.deputy.symlink, work.caller, text, entry.directory, entry.name)
        # What is watched may be reached through it from now on, and would be known by another name.
        alias = call.sandbox.watch.alias(entry.path)
        _decide(work, Kind.FILE_LINK, alias, lambda: work.ask(request, work.finish))

    work.run(lambda: find_entry(work, directory, path, found, special=_EXISTS))


def _mknod(call: Call) -> None:
    _make_node(call, _AT_FDCWD, 0, call.low(1))


def _mknodat(call: Call) -> None:
    _make_node(call, call.signed(0), 1, call.low(2))


def _make_node(call: Call, directory: int, argument: int, mode: int) -> None:
    if not stat.S_IFMT(mode):
        mode |= stat.S_IFREG
    if stat.S_ISDIR(mode):
        raise _error(errors.EPERM)
    path = call.read_text(call.arguments[argument])
    work = Work(call)

    def found(entry: Entry) -> None:
        _check_new(entry)
        request = partial(call.sandbox.deputy.make, work.caller, entry.directory, entry.name, mode)
        _decide(work, Kind.FILE_OPEN, entry.path, lambda: work.ask(request, work.finish))

    work.run(lambda: find_entry(work, directory, path, found, special=_EXISTS))


# ---- truncate, chmod ----


def _truncate(call: Call) -> None:
    path = call.read_text(call.arguments[0])
    length = call.arguments[1]
    if length >> 63:
        raise _error(errors.EINVAL)
    work = Work(call)

    def cut(reply: Reply) -> None:
        if reply.errno:
            raise _error(reply.errno)
        _check_size(call, os.fstat(reply.fd).st_size, length)
        os.ftruncate(reply.fd, length)
        work.close()
        call.succeed()

    def found(place: Place) -> None:
        if place.own:
            raise _error(errors.EINVAL)
        mode = os.fstat(place.fd).st_mode
        if not stat.S_ISREG(mode):
            raise _error(errors.EISDIR if stat.S_ISDIR(mode) else errors.EINVAL)
        request = partial(call.sandbox.deputy.open, work.caller, place.fd, os.O_WRONLY)
        _decide(work, Kind.FILE_OPEN, place.path, lambda: work.ask(request, cut))

    work.run(lambda: find(work, _AT_FDCWD, path, found, work.fail, follow=True))


def _check_size(call: Call, size: int, length: int) -> None:
    """Whether the caller may have a file grow so far (truncate(2), EFBIG). Raises OSError. Our own limit is another."""
    limit = resource.prlimit(call.actor.process.pid, resource.RLIMIT_FSIZE)[0]
    if not call.waits():  # then it was somebody else's
        raise ProcessLookupError
    if size < length and limit != resource.RLIM_INFINITY and length > limit:
        with suppress(OSError):
            signal.pidfd_send_signal(call.actor.pidfd, signal.SIGXFSZ)
        raise _error(errors.EFBIG)


def _chmod(call: Call) -> None:
    _change_mode(call, _AT_FDCWD, 0, call.low(1), 0)


def _fchmodat(call: Call) -> None:
    _change_mode(call, call.signed(0), 1, call.low(2), 0)


def _fchmodat2(call: Call) -> None:
    _change_mode(call, call.signed(0), 1, call.low(2), call.low(3))


def _change_mode(call: Call, directory: int, argument: int, mode: int, flags: int) -> None:
    if flags & ~(_AT_SYMLINK_NOFOLLOW | _AT_EMPTY_PATH):
        raise _error(errors.EINVAL)
    path = call.read_text(call.arguments[argument])
    work = Work(call)

    def start() -> None:
        found = partial(_change, work, mode)
        if not path and flags & _AT_EMPTY_PATH:
            find_descriptor(work, directory, found)
        else:
            find(work, directory, path, found, work.fail, follow=not flags & _AT_SYMLINK_NOFOLLOW)

    work.run(start)


def _change(work: Work, mode: int, place: Place) -> None:
    if place.own:
        raise _error(errors.EPERM)
    if stat.S_ISLNK(os.fstat(place.fd).st_mode):
        raise _error(errors.EOPNOTSUPP)
    request = partial(work.call.sandbox.deputy.chmod, work.caller, place.fd, mode & 0o7777)
    _decide(work, Kind.FILE_CHMOD, place.path, lambda: work.ask(request, work.finish))


def _fchmod(call: Call) -> None:
    work = Work(call)

    def found(place: Place) -> None:
        if opens.is_path_only(place.fd):
            raise _error(errors.EBADF)
        _change(work, call.low(1), place)

    work.run(lambda: find_descriptor(work, call.signed(0), found))


HANDLERS: dict[str, Callable[[Call], None]] = {
    **moving.HANDLERS,
    **opens.HANDLERS,
    "rename": _rename,
    "renameat": _renameat,
    "renameat2": _renameat2,
    "unlink": _unlink,
    "unlinkat": _unlinkat,
    "rmdir": _rmdir,
    "link": _link,
    "linkat": _linkat,
    "symlink": _symlink,
    "symlinkat": _symlinkat,
    "mknod": _mknod,
    "mknodat": _mknodat,
    "truncate": _truncate,
    "chmod": _chmod,
    "fchmodat": _fchmodat,
    "fchmodat2": _fchmodat2,
    "fchmod": _fchmod,
}
