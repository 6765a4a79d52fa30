"""Making files inside a sandbox what they are in a layer, from within the sandbox's own user namespace.

This runs in a helper process that has joined that namespace (setns(2)): it has all capabilities over the files of the
sandbox's ids, and over anything else no more than its caller, or, where that is root, nothing. All stands still
meanwhile. What is written goes through the sandbox's own mounts, so its layer is what the kernel makes of it. Paths are
gone through name by name, and no link is followed.
"""

from __future__ import annotations

import errno
import os
import stat
from collections.abc import Mapping
from contextlib import suppress
from dataclasses import dataclass, field

from corral.errors import CorralError
from corral.sandbox.changes import Change, ChangeKind, FileType
from corral.sandbox.compare import user_xattrs
from corral.sandbox.ownership import NOBODY
from corral.sandbox.trees import OPEN_DIRECTORY, OPEN_FILE, open_components, remove_tree

_PORTION = 16 << 20
_MAKE = os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_NOFOLLOW | os.O_CLOEXEC


@dataclass(frozen=True, slots=True)
class Content:
    """What an entry of the layer holds beside what a change tells."""

    times: tuple[int, int] = (0, 0)
    """Of access and modification, in nanoseconds."""
    target: str = ""
    """Of a symbolic link."""
    attributes: Mapping[str, bytes] = field(default_factory=dict)
    inode: str = ""
    """The same for names that are links to one file; nothing where it has one name."""


def content_of(directory: int, name: str, status: os.stat_result, fd: int) -> Content:
    """The content of an entry; ``fd`` is the file or directory itself, or -1 for anything else."""
    target = os.readlink(name, dir_fd=directory) if stat.S_ISLNK(status.st_mode) else ""
    linked = stat.S_ISREG(status.st_mode) and status.st_nlink > 1
    return Content(
        (status.st_atime_ns, status.st_mtime_ns),
        target,
        user_xattrs(fd) if fd >= 0 else {},
        f"{status.st_dev}-{status.st_ino}" if linked else "",
    )


def open_source(root: int, path: str) -> tuple[int, str, os.stat_result, int]:
    """The directory and the name of an entry below ``root``, what it is, and, for a file or directory, itself or -1.
    The caller closes both. Raises OSError."""
    *above, name = path.split("/")
    directory = open_components(root, above)
    fd = -1
    try:
        status = os.stat(name, dir_fd=directory, follow_symlinks=False)
        if stat.S_ISREG(status.st_mode) or stat.S_ISDIR(status.st_mode):
            fd = os.open(name, OPEN_DIRECTORY if stat.S_ISDIR(status.st_mode) else OPEN_FILE, dir_fd=directory)
            status = os.fstat(fd)
        return directory, name, status, fd
    except BaseException:
        for each in (fd, directory):
            if each >= 0:
                os.close(each)
        raise


class Swapper:
    """Carries out changes below the root directory of a sandbox, in the order of their paths."""

    def __init__(self, root: int, owner: tuple[int, int]) -> None:
        """``owner`` is whose files are those of which no owner is told."""
        self._root = root
        self._owner = owner
        self._above = ""
        self._directory = -1
        self._made: dict[str, str] = {}
        """Where the first name of a linked file lies."""
        self._times: list[tuple[str, tuple[int, int]]] = []

    def close(self) -> None:
        """Directories get their times, now that nothing more comes into them."""
        for path, times in reversed(self._times):
            with suppress(OSError):  # removed since, in the course of another change
                self._go_to(os.path.dirname(path))
                os.utime(os.path.basename(path) or ".", ns=times, dir_fd=self._directory, follow_symlinks=False)
        self._go_to("/")
        os.close(self._directory)
        self._directory = -1

    def carry_out(self, change: Change, content: Content, source: int) -> None:
        """``source`` is the file, where there is one. Raises OSError, CorralError."""
        above, name = os.path.split(change.path)
        name = name or "."  # of a part that is the root itself
        self._go_to(above)
        directory = self._directory
        is_directory = change.file_type is FileType.DIRECTORY
        if change.kind is ChangeKind.DELETED:
            remove_tree(directory, name)
            return
        if not self._stays(change, name):
            if change.type_before is not None:
                remove_tree(directory, name)
            if self._link(content, name):
                return
            self._make(change, content, name, source)
            if content.inode:
                self._made[content.inode] = change.path
        self._finish(change, content, name)
        if is_directory:
            self._times.append((change.path, content.times))

    def _stays(self, change: Change, name: str) -> bool:
        """Whether it is only given other attributes. A file with other names is not: they would get these too."""
        if change.file_type is FileType.DIRECTORY:
            return change.type_before is FileType.DIRECTORY
        if change.kind not in (ChangeKind.MODE, ChangeKind.OWNER):
            return False
        return (
            change.file_type is not FileType.FILE
            or os.stat(name, dir_fd=self._directory, follow_symlinks=False).st_nlink == 1
        )

    def _link(self, content: Content, name: str) -> bool:
        """Makes ``name`` one more of a file that was made already, if it is one and can be: not in another part, which
        is another file system inside."""
        if content.inode not in self._made:
            return False
        where, _, called = self._made[content.inode].rpartition("/")
        first = open_components(self._root, where.split("/")[1:])
        try:
            os.link(called, name, src_dir_fd=first, dst_dir_fd=self._directory, follow_symlinks=False)
        except OSError as error:
            if error.errno not in (errno.EXDEV, errno.EMLINK):
                raise
            return False
        finally:
            os.close(first)
        return True

    def _make(self, change: Change, content: Content, name: str, source: int) -> None:
        directory = self._directory
        if change.file_type is FileType.DIRECTORY:
            os.mkdir(name, 0o700, dir_fd=directory)
        elif change.file_type is FileType.SYMLINK:
            os.symlink(content.target, name, dir_fd=directory)
        elif change.file_type is FileType.FIFO:
            os.mkfifo(name, 0o600, dir_fd=directory)
        elif change.file_type is FileType.SOCKET:
            # Of the host: a name to which nobody listens, as the overlay shows it.
            os.mknod(name, stat.S_IFSOCK | 0o600, dir_fd=directory)
        elif change.file_type is FileType.FILE and source >= 0:
            fd = os.open(name, _MAKE, 0o600, dir_fd=directory)
            try:
                _copy(source, fd)
            finally:
                os.close(fd)
        else:
            raise CorralError(f"{change.path!r} is a {change.file_type.value}, which cannot be made in a sandbox")

    def _finish(self, change: Change, content: Content, name: str) -> None:
        directory = self._directory
        # Whom the sandbox does not know cannot own a file in it.
        owner = tuple(
            own if told in (None, NOBODY) else told
            for told, own in zip(change.owner_after or (None, None), self._owner, strict=True)
        )
        if change.file_type not in (FileType.FILE, FileType.DIRECTORY):
            os.chown(name, *owner, dir_fd=directory, follow_symlinks=False)
            if change.file_type is not FileType.SYMLINK:
                _set_mode(directory, name, (change.mode_after or 0) & 0o1777)
            os.utime(name, ns=content.times, dir_fd=directory, follow_symlinks=False)
            return
        fd = os.open(name, OPEN_FILE, dir_fd=directory)
        try:
            for old in user_xattrs(fd).keys() - content.attributes.keys():
                os.removexattr(fd, old)
            for attribute, value in content.attributes.items():
                os.setxattr(fd, attribute, value)
            os.fchown(fd, *owner)
            os.fchmod(fd, (change.mode_after or 0) & 0o1777)
            os.utime(fd, ns=content.times)
        finally:
            os.close(fd)

    def _go_to(self, above: str) -> None:
        if above == self._above and self._directory >= 0:
            return
        found = open_components(self._root, [name for name in above.split("/") if name])
        if self._directory >= 0:
            os.close(self._directory)
        self._above, self._directory = above, found


def _set_mode(directory: int, name: str, mode: int) -> None:
    """chmod(2) of what is no link. One that is put there meanwhile must not be followed: it would lead through the
    host's files, as this process's root is the host's."""
    fd = os.open(name, os.O_PATH | os.O_NOFOLLOW | os.O_CLOEXEC, dir_fd=directory)
    try:
        if stat.S_ISLNK(os.fstat(fd).st_mode):
            raise OSError(errno.ELOOP, os.strerror(errno.ELOOP), name)
        os.chmod(f"/proc/self/fd/{fd}", mode)
    finally:
        os.close(fd)


def _copy(source: int, target: int) -> None:
    """Content with its holes."""
    size, offset = os.fstat(source).st_size, 0
    os.ftruncate(target, size)
    while offset < size:
        try:
            offset = os.lseek(source, offset, os.SEEK_DATA)
            end = os.lseek(source, offset, os.SEEK_HOLE)
        except OSError as error:
            if error.errno != errno.ENXIO:
                raise
            return  # a hole up to the end
        os.lseek(target, offset, os.SEEK_SET)
        while offset < end:
            sent = os.sendfile(target, source, offset, min(end - offset, _PORTION))
            if sent == 0:
                return
            offset += sent
