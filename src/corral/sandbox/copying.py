"""Copying a layer to disk: exactly its files, and nothing that could do harm there.

What is never stored: setuid and setgid bits, devices other than whiteouts, sockets, and extended attributes other than
``user.*`` and the overlay's own mark of an opaque directory (so no file capabilities). What was left out is counted
and its first paths are told. The host's file system always keeps max(1 GiB, 5 %) of its space, and 5 % of its inodes.
"""

from __future__ import annotations

import errno
import os
import stat
from collections.abc import Collection, Sequence
from contextlib import suppress
from dataclasses import asdict, dataclass, field
from typing import Any

from corral.diskspace import KEEP_SHARE, spare_bytes
from corral.errors import CorralError
from corral.sandbox import asowner
from corral.sandbox.compare import join, same_content, user_xattrs
from corral.sandbox.ownership import NOBODY, SAME_IDS, Ids, OwnerMap
from corral.sandbox.trees import (
    OPAQUE,
    OPEN_DIRECTORY,
    OPEN_FILE,
    OVERLAY_PREFIX,
    UPPER,
    Unreadable,
    Walk,
    is_opaque,
    is_whiteout,
    remove_tree,
)
from corral.sandbox.view import Changeable

TOLD_PATHS = 20
_COPY = UPPER + 1
_LINKS = ".links"
_PORTION = 16 << 20
_BLOCK = 4096
# The overlay's own notes, and the labels that a security module puts on every file.
_OVERLAY_NOTES = tuple(f"{OVERLAY_PREFIX}{name}" for name in ("opaque", "origin", "impure", "uuid", "nlink"))
_NO_LOSS = (*_OVERLAY_NOTES, "security.selinux")


@dataclass(slots=True)
class Told:
    """Things that were left out: how many, and where the first ones lay."""

    count: int = 0
    paths: list[str] = field(default_factory=list)

    def add(self, path: str | None) -> None:
        """Counts one."""
        self.count += 1
        if len(self.paths) < TOLD_PATHS:
            self.paths.append(path or "(a very long path)")


@dataclass(slots=True)
class Copied:
    """What came of it."""

    bytes: int = 0
    disk: int = 0
    """Bytes on disk of what is new there."""
    entries: int = 0
    stripped: Told = field(default_factory=Told)
    """Files stored without their setuid or setgid bits or some of their attributes."""
    dropped: Told = field(default_factory=Told)
    """Sockets, devices, and files that the file system cannot hold: not stored."""


MAX_PLACE = 4000
"""Bytes of a path that one system call can follow."""
MAX_SEEN = 200_000
"""Files that are remembered from one snapshot to the next."""
_TICK = 50_000_000
"""Nanoseconds that a change time may be behind: what was changed so shortly before a copy may be changed again, and
not show it."""


@dataclass(slots=True)
class Since:
    """What a snapshot has copied, so that the next one of the same layer need not: unchanged files are linked."""

    layer: str = ""
    """Where it was copied to."""
    taken: int = 0
    """When, in nanoseconds since the epoch."""
    files: dict[int, tuple[int, str]] = field(default_factory=dict)
    """Change time and place, by inode number: what is worth to be compared. Renaming a file changes that time, and its
    number is its own while it lives (tmpfs(5))."""
    is_calm: bool = False
    """Whether no program can have written anything since, so that these times tell all: then nothing is compared."""

    def place(self, status: os.stat_result) -> str:
        """Where a file lies as it is now; nothing where it must be copied."""
        found = self.files.get(status.st_ino)
        if found is None or found[0] != status.st_ctime_ns or found[0] > self.taken - _TICK:
            return ""
        return found[1]

    def add(self, status: os.stat_result, place: str) -> None:
        """Remembers a file."""
        if len(self.files) < MAX_SEEN:
            self.files[status.st_ino] = (status.st_ctime_ns, place)


@dataclass(frozen=True, slots=True)
class Quota:
    """How much may be kept."""

    bytes: int
    name: str
    """What says so."""

    def refusal(self) -> CorralError:
        """What is raised where it is more."""
        return CorralError(
            f"the changes cannot be kept: they are more than {self.name} leaves room for; `corral layers` lists what "
            "is kept, `corral gc` removes what may go, `corral discard` what you name"
        )


class Room:
    """Guards the free space of the file system that is written to, and a quota."""

    def __init__(self, directory: int, quota: Quota | None = None) -> None:
        self._directory = directory
        self._bytes = 0
        self._entries = 0
        self._quota = quota
        self._left = quota.bytes if quota else 0

    def take(self, size: int) -> None:
        """Claims one entry of ``size`` bytes. Raises CorralError where too little would be left free."""
        if self._quota is not None:
            self._left -= -(-size // _BLOCK) * _BLOCK
            if self._left < 0:
                raise self._quota.refusal()
        self._bytes -= size
        self._entries -= 1
        if self._bytes >= 0 and self._entries >= 0:
            return
        free = os.fstatvfs(self._directory)
        spare = spare_bytes(self._directory)
        inodes = free.f_favail - free.f_files // KEEP_SHARE if free.f_files else 1 << 30
        if spare < size or inodes < 1:
            raise CorralError(
                "the changes cannot be kept: the disk would be left with less than 1 GiB or 5 % free; make room, "
                "or apply or discard layers that are no longer needed (`corral gc`, `corral discard`)"
            )
        # Looked at again soon: others write there too.
        self._bytes = min(spare - size, _PORTION)
        self._entries = min(inodes - 1, 1000)


def copy_parts(
    layer: int,
    target: int,
    parts: Sequence[Changeable],
    owners: OwnerMap,
    scaffold: Collection[str],
    *,
    base: int = -1,
    before: tuple[int, Since] | None = None,
    seen: Since | None = None,
    quota: Quota | None = None,
) -> Copied:
    """Copies each part of the layer into a directory of its name in ``target``, which is empty.

    ``base`` is the directory of the parts of a kept layer on which this one was begun: its files are linked there
    first, and the layer is laid over them, as the overlay does it. ``before`` is the directory of the parts of an
    earlier copy of the same layer, and what that has ``seen``. Raises CorralError where there is too little room, it is
    more than ``quota``, or a file cannot be read; OSError where writing fails.
    """
    try:
        ids = owners.upper if os.geteuid() == 0 else None
        unreadable = os.geteuid() != 0
        return _copy(layer, target, parts, ids, scaffold, base, before, seen, quota, raise_unreadable=unreadable)
    except Unreadable:
        if seen is not None:
            seen.files.clear()
        for name in os.listdir(target):
            remove_tree(target, name)
        request = {
            "layer": layer,
            "target": target,
            "base": base,
            "parts": [[part.name, part.path, part.lowers, part.base] for part in parts],
            "scaffold": list(scaffold),
            "quota": asdict(quota) if quota else None,
        }
        fds = (layer, target, *([base] if base >= 0 else []))
        answer = asowner.call("copy", fds, request, owners.namespace())
        stripped, dropped = Told(**answer["stripped"]), Told(**answer["dropped"])
        return Copied(answer["bytes"], answer["disk"], answer["entries"], stripped, dropped)


def serve(request: dict[str, Any]) -> Any:
    """:func:`copy_parts` in a helper process."""
    parts = [Changeable(name, path, tuple(lowers), below) for name, path, lowers, below in request["parts"]]
    scaffold = set(request["scaffold"])
    quota = Quota(**request["quota"]) if request["quota"] else None
    return asdict(_copy(request["layer"], request["target"], parts, None, scaffold, request["base"], quota=quota))


def _copy(
    layer: int,
    target: int,
    parts: Sequence[Changeable],
    ids: Ids | None,
    scaffold: Collection[str],
    base: int,
    before: tuple[int, Since] | None = None,
    seen: Since | None = None,
    quota: Quota | None = None,
    *,
    raise_unreadable: bool = False,
) -> Copied:
    copied = Copied()
    room = Room(target, quota)
    os.mkdir(_LINKS, 0o700, dir_fd=target)
    links = os.open(_LINKS, OPEN_DIRECTORY, dir_fd=target)
    try:
        for part in parts:
            os.mkdir(part.name, 0o700, dir_fd=target)
            whole = part.without_base()
            sources = [(base, SAME_IDS if ids is not None else None)] if part.base and base >= 0 else []
            for source, owners in (*sources, (layer, ids)):
                roots: list[int] = []
                try:
                    # A part may have had another name in the base's policy.
                    own = os.path.basename(part.base) if source == base else part.name
                    for parent, called in ((source, own), (target, part.name)):
                        roots.append(os.open(called, OPEN_DIRECTORY, dir_fd=parent))
                    status = os.fstat(roots[0])
                    trees = {UPPER: roots[0], _COPY: roots[1]}
                    with Walk(trees, part.path, raise_unreadable=raise_unreadable) as walk:
                        copier = _Copier(whole, walk, links, owners, scaffold, room, copied)
                        copier.is_base, copier.is_over = source == base, bool(sources) and source != base
                        if source != base:
                            copier.before, copier.seen = before, seen
                        copier.run(status)
                finally:
                    for fd in roots:
                        os.close(fd)
    finally:
        os.close(links)
    remove_tree(target, _LINKS)
    return copied


class _Copier:
    """The copy of one part."""

    def __init__(
        self,
        part: Changeable,
        walk: Walk,
        links: int,
        ids: Ids | None,
        scaffold: Collection[str],
        room: Room,
        copied: Copied,
    ) -> None:
        self.is_base = False
        """Whether these are files of a kept layer, which need not be copied, because nobody changes them."""
        self.is_over = False
        """Whether they lie over such."""
        self.before: tuple[int, Since] | None = None
        self.seen: Since | None = None
        self._part = part
        self._walk = walk
        self._links = links
        self._ids = ids
        self._scaffold = scaffold
        self._room = room
        self._copied = copied
        self._whiteout = ""

    def run(self, status: os.stat_result) -> None:
        """Copies everything; ``status`` is the part's own directory."""
        walk = self._walk
        walk.current.status = status
        walk.current.names = iter(walk.list(UPPER))
        while True:
            level = walk.current
            name = next(level.names, None)
            if name is not None:
                self._entry(name)
                continue
            self._finish_directory(level.fds[_COPY], level.fds[UPPER], level.status or status, level.path)
            if len(walk.levels) == 1:
                return
            blocks = os.fstat(level.fds[_COPY]).st_blocks if level.path in self._scaffold else 0
            walk.leave()
            if _COPY not in walk.current.fds:
                raise CorralError("the copy of the layer was disturbed: one of its directories has vanished")
            if level.path in self._scaffold:
                # Made by Corral, and again next time; it stays only where it holds something.
                with suppress(OSError):
                    os.rmdir(level.name, dir_fd=walk.current.fds[_COPY])
                    self._copied.disk -= blocks * 512

    def _entry(self, name: str) -> None:
        walk = self._walk
        status = walk.status(UPPER, name)
        if status is None:
            return
        path = join(walk.current.path, name)
        target = walk.current.fds[_COPY]
        kind = stat.S_IFMT(status.st_mode)
        if path in self._scaffold and self._is_bare(walk.current.fds[UPPER], name, path, status):
            return
        merges, hides = self._replace(target, name, kind)
        if is_whiteout(status) and (self._part.lowers or self.is_over):
            if self._part.lowers:
                self._copy_whiteout(target, name)
            return
        if kind not in (stat.S_IFREG, stat.S_IFDIR, stat.S_IFLNK, stat.S_IFIFO):
            self._copied.dropped.add(path)
            return
        self._copied.entries += path not in self._scaffold
        if kind == stat.S_IFDIR:
            self._room.take(4096)
            if not merges:
                os.mkdir(name, 0o700, dir_fd=target)
            else:  # it was counted, and is once more
                self._copied.disk -= os.stat(name, dir_fd=target, follow_symlinks=False).st_blocks * 512
            if hides and self._part.lowers:
                # It hid what lies below the base by what the base has there, and does so without that now.
                os.setxattr(f"/proc/self/fd/{target}/{name}", OPAQUE, b"y")
            if walk.enter(name, path, (UPPER, _COPY)) and _COPY in walk.current.fds:
                walk.current.status = status
                walk.current.names = iter(walk.list(UPPER))
            else:
                self._copied.dropped.add(path)
        elif kind == stat.S_IFREG:
            self._copy_file(name, target, path)
        elif kind == stat.S_IFLNK:
            self._room.take(4096)
            with suppress(FileNotFoundError):
                os.symlink(os.readlink(name, dir_fd=walk.current.fds[UPPER]), name, dir_fd=target)
                self._finish_name(target, name, status)
        else:
            self._room.take(0)
            os.mkfifo(name, 0o600, dir_fd=target)
            self._finish_name(target, name, status)
            # Freshly made in a directory of our own, so it cannot be a link.
            os.chmod(name, status.st_mode & 0o777, dir_fd=target)

    def _is_bare(self, directory: int, name: str, path: str | None, status: os.stat_result) -> bool:
        """Whether it is what Corral has made to mount on, and holds nothing else. It is made anew at each start."""
        if path not in self._scaffold:
            return False
        if not stat.S_ISDIR(status.st_mode):
            return stat.S_ISREG(status.st_mode) and status.st_size == 0
        try:
            fd = os.open(name, OPEN_DIRECTORY, dir_fd=directory)
        except OSError:
            return False
        try:
            return all(
                self._is_bare(fd, each, join(path, each), os.stat(each, dir_fd=fd, follow_symlinks=False))
                for each in os.listdir(fd)
            )
        except OSError:
            return False
        finally:
            os.close(fd)

    def _replace(self, target: int, name: str, kind: int) -> tuple[bool, bool]:
        """Removes what the base has there, unless both are directories that are merged. Whether they are, and whether
        something was removed."""
        try:
            below = os.stat(name, dir_fd=target, follow_symlinks=False)
        except FileNotFoundError:
            return False, False
        if kind == stat.S_IFDIR and stat.S_ISDIR(below.st_mode):
            fd = self._walk.open(UPPER, name, OPEN_DIRECTORY)
            try:
                if fd >= 0 and not is_opaque(fd):
                    return True, False
            finally:
                if fd >= 0:
                    os.close(fd)
        remove_tree(target, name)
        return False, True

    def _copy_whiteout(self, target: int, name: str) -> None:
        self._copied.entries += 1
        if self._whiteout:
            try:
                os.link(self._whiteout, name, src_dir_fd=self._links, dst_dir_fd=target)
                return
            except OSError as error:
                if error.errno != errno.EMLINK:
                    raise
        self._room.take(0)
        os.mknod(name, stat.S_IFCHR, 0, dir_fd=target)
        self._whiteout = f"whiteout-{self._part.name}-{self._copied.entries}"
        os.link(name, self._whiteout, src_dir_fd=target, dst_dir_fd=self._links)

    def _copy_file(self, name: str, target: int, path: str | None) -> None:
        source = self._walk.open(UPPER, name)
        if source < 0:
            self._copied.dropped.add(path)
            return
        try:
            status = os.fstat(source)
            if not stat.S_ISREG(status.st_mode):
                self._copied.dropped.add(path)
                return
            if self.is_base and self._link_to(self._walk.current.fds[UPPER], name, name, target):
                return
            if self._link_to_earlier(source, status, name, target):
                return
            link = f"{status.st_dev}-{status.st_ino}" if status.st_nlink > 1 else ""
            if link and self._link(link, name, target):
                return
            self._room.take(0)
            fd = os.open(name, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, 0o600, dir_fd=target)
            try:
                if not self._copy_data(source, fd, status):
                    self._copied.dropped.add(path)
                    os.unlink(name, dir_fd=target)
                    return
                self._finish(fd, source, status, path)
            finally:
                os.close(fd)
            if link:
                with suppress(FileExistsError):
                    os.link(name, link, src_dir_fd=target, dst_dir_fd=self._links)
            self._remember(status, name)
        finally:
            os.close(source)

    def _link_to(self, source: int, place: str, name: str, target: int) -> bool:
        self._room.take(0)
        try:
            os.link(place, name, src_dir_fd=source, dst_dir_fd=target, follow_symlinks=False)
        except OSError as error:
            if error.errno != errno.EMLINK:
                raise
            return False
        return True

    def _link_to_earlier(self, source: int, status: os.stat_result, name: str, target: int) -> bool:
        """Makes a file that is as it was when it was copied before a link to that copy. Where a program may have run,
        content is compared: what is written through a mapping (mmap(2)) changes no time on tmpfs."""
        if self.before is None:
            return False
        directory, since = self.before
        place = since.place(status)
        if not place:
            return False
        try:
            earlier = os.open(place, OPEN_FILE, dir_fd=directory)
        except OSError:
            return False
        try:
            is_same = since.is_calm or (user_xattrs(source) == user_xattrs(earlier) and same_content(source, earlier))
        finally:
            os.close(earlier)
        os.lseek(source, 0, os.SEEK_SET)
        if not is_same or not self._link_to(directory, place, name, target):
            return False
        self._remember(status, name)
        return True

    def _remember(self, status: os.stat_result, name: str) -> None:
        if self.seen is not None:
            above = [level.name for level in self._walk.levels[1:]]
            place = "/".join((self._part.name, *above, name))
            if len(os.fsencode(place)) < MAX_PLACE:
                self.seen.add(status, place)

    def _link(self, link: str, name: str, target: int) -> bool:
        """Makes ``name`` a hard link to the copy that was made of the same file before, if there is one."""
        try:
            os.link(link, name, src_dir_fd=self._links, dst_dir_fd=target)
        except FileNotFoundError:
            return False
        except OSError as error:
            if error.errno != errno.EMLINK:
                raise
            os.unlink(link, dir_fd=self._links)
            return False
        return True

    def _copy_data(self, source: int, fd: int, status: os.stat_result) -> bool:
        """Copies content with its holes; False where the file system cannot hold a file of that size."""
        size, offset = status.st_size, 0
        try:
            os.ftruncate(fd, size)
        except OSError as error:
            if error.errno not in (errno.EFBIG, errno.EINVAL):
                raise
            return False
        sparse = status.st_blocks * 512 < size
        while offset < size:
            end = size
            if sparse:
                try:
                    offset = os.lseek(source, offset, os.SEEK_DATA)
                    end = min(size, os.lseek(source, offset, os.SEEK_HOLE))
                except OSError as error:
                    if error.errno != errno.ENXIO:
                        raise
                    return True  # a hole up to the end
            os.lseek(fd, offset, os.SEEK_SET)
            while offset < end:
                count = min(end - offset, _PORTION)
                self._room.take(count)
                sent = os.sendfile(fd, source, offset, count)
                if sent == 0:
                    return True
                offset += sent
                self._copied.bytes += sent
        return True

    def _finish_directory(self, fd: int, source: int, status: os.stat_result, path: str | None) -> None:
        if self._part.lowers and is_opaque(source) and len(self._walk.levels) > 1:
            os.setxattr(fd, OPAQUE, b"y")
        self._finish(fd, source, status, path)

    def _finish(self, fd: int, source: int, status: os.stat_result, path: str | None) -> None:
        """Owner, mode, attributes and times of a file or directory, as far as they may be stored."""
        stripped = bool(status.st_mode & (stat.S_ISUID | stat.S_ISGID))
        wanted = user_xattrs(source)
        for name in user_xattrs(fd).keys() - wanted.keys():  # of the base's directory
            os.removexattr(fd, name)
        for name, value in wanted.items():
            try:
                os.setxattr(fd, name, value)
            except OSError:
                stripped = True
        with suppress(OSError):
            stripped = stripped or any(
                name not in wanted and not name.startswith(_NO_LOSS) for name in os.listxattr(source)
            )
        if stripped:
            self._copied.stripped.add(path)
        if self._ids is not None:
            os.fchown(fd, *self._owner(status))
        os.fchmod(fd, status.st_mode & 0o1777)
        os.utime(fd, ns=(status.st_atime_ns, status.st_mtime_ns))
        self._copied.disk += os.fstat(fd).st_blocks * 512

    def _finish_name(self, target: int, name: str, status: os.stat_result) -> None:
        if self._ids is not None:
            os.chown(name, *self._owner(status), dir_fd=target, follow_symlinks=False)
        os.utime(name, ns=(status.st_atime_ns, status.st_mtime_ns), dir_fd=target, follow_symlinks=False)
        self._copied.disk += os.stat(name, dir_fd=target, follow_symlinks=False).st_blocks * 512

    def _owner(self, status: os.stat_result) -> tuple[int, int]:
        if self._ids is None:
            return 0, 0
        uid, gid = self._ids.owner(status)
        return (0 if uid == NOBODY else uid), (0 if gid == NOBODY else gid)
