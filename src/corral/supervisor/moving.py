"""Renames of directories that a sandbox's overlays have from below, which the kernel refuses with EXDEV.

Our overlays have no redirects, so that a layer is what it looks like (docs/layers.md). The deputy makes such a
directory anew under its new name, of hard links, as the caller (``src/launcher/deputy_move.h``). Of every rename it is
looked at whether it is a directory's; if not, the kernel goes on by itself. That decides nothing, so whoever changes
the name meanwhile gets what the kernel alone would have answered, EXDEV at the worst.

What a caller has forbidden itself must hold for what is done in its name. Its own seccomp filters come before ours
(seccomp(2)). Its own Landlock rules the deputy would not have; so who makes some is marked, and has its renames made by
the kernel only. The mark is a limit that no kernel since 2.4 looks at (RLIMIT_LOCKS, getrlimit(2)): all children
inherit it, no program removes it, and nobody else needs it.
"""

from __future__ import annotations

import os
import resource
from collections import deque
from collections.abc import Callable
from errno import EAGAIN, EINTR, EPERM, EXDEV
from functools import partial
from typing import TYPE_CHECKING

from corral.supervisor import listener, memory
from corral.supervisor.call import Call
from corral.supervisor.deputy_wire import PlaceLeft, Reply
from corral.supervisor.filter import Class, Table
from corral.supervisor.listener import Notification
from corral.supervisor.places import NOT_MOVED, Entry, Work, find_entry
from corral.supervisor.syscalls import MOVED_DIRECTORIES
from corral.supervisor.waiting import LAST_PAUSE

if TYPE_CHECKING:
    from corral.supervisor.service import Supervised

_CWD = -100 & 0xFFFFFFFF  # AT_FDCWD, as an argument has it
_NOREPLACE = 1
_RLIMIT_LOCKS = 10  # asm-generic/resource.h
_MARK = (1 << 62, 1 << 62)
MAX_WAITING = 64
"""Moves of one sandbox that wait for their turn; the answer to others is EXDEV."""
PLACE = ".corral-move-{:016x}"
"""Where a directory is made anew, beside its new name (``DEPUTY_MOVE_PLACE``)."""

Done = Callable[[Reply], None]


class _Rename:
    """One of a directory, or of what may be one: first as the kernel does it, then as a move."""

    __slots__ = ("done", "flags", "number", "source", "target", "work")

    def __init__(self, work: Work, source: Entry, target: Entry, flags: int, done: Done) -> None:
        self.work, self.source, self.target, self.flags, self.done = work, source, target, flags, done
        self.number = 0
        """Of the deputy's request, while it is made."""

    @property
    def is_wanted(self) -> bool:
        return not self.work.call.answered


class Moves:
    """Renames that the deputy makes for the callers of one sandbox.

    Moves come one after the other: of two that want the same directory, the second must find it gone. Used by the
    supervisor's thread, but where it is said otherwise.
    """

    def __init__(self, sandbox: Supervised, *, off: bool = False) -> None:
        self._sandbox = sandbox
        self._waiting: deque[_Rename] = deque()
        self._moving: _Rename | None = None
        self._active = 0
        self._held = False
        self.off = off
        """Whether the kernel's answer stays: the policy wants it, or somebody inside has made rules for itself and
        could not be marked."""
        self.places: set[str] = set()
        """Paths inside of what may be left of moves. To be read by any thread when the sandbox has ended."""

    # ---- standing still ----

    def hold(self, held: bool) -> None:
        """Whether none may begin; a move that is being made is taken back, and made later. From any thread."""
        self._held = held
        if held and self._active:
            self._sandbox.post(self._interrupt)

    @property
    def is_active(self) -> bool:
        """Whether the tree is being changed. From any thread."""
        return self._active > 0

    def _interrupt(self) -> None:
        if self._moving is not None and self._moving.number:
            self._sandbox.deputy.interrupt(self._moving.number)

    # ---- the deputy's part ----

    def rename(self, work: Work, source: Entry, target: Entry, flags: int, done: Done) -> None:
        """renameat2(2), also of what the overlay refuses. ``done`` gets the answer, unless the caller is gone."""
        rename = _Rename(work, source, target, flags, done)

        def renamed(reply: Reply) -> None:
            if reply.errno != EXDEV or self.off or flags & ~_NOREPLACE or len(self._waiting) >= MAX_WAITING:
                self._answer(rename, reply)
            else:
                self._waiting.append(rename)
                self._move_next()

        self._request(rename, 0, renamed)

    def _request(self, rename: _Rename, token: int, replied: Done) -> None:
        """Asks, or asks later: where all is to stand still, or the deputy has too much to do."""
        work, source, target = rename.work, rename.source, rename.target

        def again() -> None:
            if rename.is_wanted:
                self._request(rename, token, replied)
            else:
                work.close()
                replied(Reply(EINTR))

        def got(reply: Reply) -> None:
            self._active -= 1
            rename.number = 0
            # A move whose caller lives was interrupted because all was to stand still.
            taken_back = reply.errno == EINTR and reply.value == PlaceLeft.IS_GONE and rename.is_wanted
            if reply.busy or taken_back:
                self._sandbox.loop.call_later(LAST_PAUSE, again)
            else:
                replied(reply)

        work.call.when_gone = self._interrupt if token else None
        self._active += 1
        # What others put into the old tree is brought into the new one, undecided: that stays where it was decided on.
        must_wait = not token and self._moving is not None and bool(self._sandbox.watch)
        if self._held or must_wait:  # looked at after the other side can see that this one begins: Core.frozen
            got(Reply(EAGAIN, busy=True))
            return
        try:
            rename.number = self._sandbox.deputy.rename(
                work.caller,
                (source.directory, source.name),
                (target.directory, target.name),
                got,
                flags=rename.flags,
                token=token,
            )
        except OSError as error:
            got(Reply(error.errno or EPERM))

    def _answer(self, rename: _Rename, reply: Reply) -> None:
        if rename.is_wanted:
            rename.work.call.when_gone = None
            rename.work.run(lambda: rename.done(reply))
        else:
            rename.work.close()

    # ---- one after the other ----

    def _move_next(self) -> None:
        while self._moving is None and self._waiting:
            rename = self._waiting.popleft()
            if not rename.is_wanted:
                rename.work.close()
                continue
            self._moving = rename
            token = int.from_bytes(os.urandom(8), "little") or 1
            place = os.path.join(os.path.dirname(rename.target.path), PLACE.format(token))
            self.places.add(place)
            self._request(rename, token, partial(self._moved, rename, place))

    def _moved(self, rename: _Rename, place: str, reply: Reply) -> None:
        self._moving = None
        # EPERM: there is no deputy any more, and nobody knows how far it came.
        if reply.value != PlaceLeft.IS_UNKNOWN and reply.errno != EPERM:
            self.places.discard(place)
        self._answer(rename, Reply(EXDEV) if reply.errno == EINTR else reply)
        self._move_next()


# ---- calls ----

_PATHS = {"rename": (None, 0), "renameat": (0, 1), "renameat2": (0, 1)}
"""Which arguments have the directory that the old path starts from, and that path."""


def short_ways(table: Table) -> dict[int, tuple[int | None, int]]:
    """Of the calls by number that the kernel may make by itself: where their old path is."""
    found = {}
    for name, where in _PATHS.items():
        number = table.number(name)
        if number is not None and table.find(number, (0,) * 6).kind is Class.DECIDED:
            found[number] = where
    return found


def goes_on(sandbox: Supervised, notification: Notification, where: tuple[int | None, int]) -> bool:
    """Whether the kernel has been told to go on, as no directory is renamed. Most renames end here, so it is short."""
    directory, argument = where
    tid, arguments = notification.tid, notification.arguments
    try:
        path = memory.read_text(tid, arguments[argument])
        from_cwd = directory is None or arguments[directory] & 0xFFFFFFFF == _CWD
        if not path.startswith(b"/") and not from_cwd:
            return False
        if sandbox.tree.may_be_directory(tid, path):
            return False
    except OSError:
        pass  # nobody can tell what the kernel will say
    listener.proceed(sandbox.listener, notification.id)
    return True


class _Unwatched(Work):
    """Where nothing is decided, what cannot be done here is the kernel's to answer."""

    def fail(self, errno: int) -> None:
        self.close()
        self.call.proceed()

    def refuse(self, errno: int, reason: str) -> None:
        self.fail(errno)


def begin(call: Call, old: tuple[int, int], new: tuple[int, int], flags: int) -> None:
    """A rename of the sandbox's own files, where no policy is about them: ``old`` and ``new`` are the descriptor of a
    directory and the number of the argument that has the path from there."""
    if flags & ~_NOREPLACE or call.sandbox.moves.off:
        call.proceed()  # to exchange directories in one moment is beyond us
        return
    try:
        path = call.read_text(call.arguments[old[1]])
        if not call.sandbox.tree.has_directory(call, old[0], path) or _is_marked(call):
            call.proceed()
            return
        other = call.read_text(call.arguments[new[1]])
        work = _Unwatched(call)
    except OSError:
        call.proceed()
        return

    def from_entry(source: Entry) -> None:
        find_entry(work, new[0], other, partial(to_entry, source), special=NOT_MOVED)

    def to_entry(source: Entry, target: Entry) -> None:
        call.sandbox.moves.rename(work, source, target, flags, done)

    def done(reply: Reply) -> None:
        if reply.errno == EXDEV:
            work.fail(EXDEV)
        else:
            work.close()
            call.fail(reply.errno)  # 0 is success

    work.run(lambda: find_entry(work, old[0], path, from_entry, special=NOT_MOVED))


def _is_marked(call: Call) -> bool:
    return resource.prlimit(call.tid, _RLIMIT_LOCKS) != (resource.RLIM_INFINITY, resource.RLIM_INFINITY)


def restrict_self(call: Call) -> None:
    """landlock_restrict_self(2): the caller, and whatever it starts from here on, is marked first."""
    try:
        resource.prlimit(call.tid, _RLIMIT_LOCKS, _MARK)
    except (OSError, ValueError):
        call.sandbox.moves.off = True
    call.proceed()


HANDLERS: dict[str, Callable[[Call], None]] = {"landlock_restrict_self": restrict_self}
UNDECIDED = frozenset(row.name for row in MOVED_DIRECTORIES if row.name not in HANDLERS)
"""What the kernel may do by itself, where no policy is about files."""
