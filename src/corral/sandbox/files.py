"""Files of a live sandbox, read and changed from the host.

    files = Files(core.root_fd, uid, gid, inside=identity.inside)
    files.write("/home/agent/task.txt", b"...")
    report = files.read("/home/agent/report.txt", limit=1 << 20)

The sandbox is taken for hostile and for running: every name may be a link, a fifo or something else by the next
call. So each operation resolves its path once, inside, to a descriptor (:mod:`corral.openat2`), acts as the
agent (:mod:`corral.sandbox.acting`), and from then on uses descriptors and single names only. What an agent can gain
by changing things in between is that it gets its own files wrong.

All paths inside are absolute. Every operation is synchronous, takes bounded time and memory, may be called from any
thread, and raises FileError; SandboxClosed once the files are closed; WallError where acting as the user fails.
"""

from __future__ import annotations

import errno
import fcntl
import os
import secrets
import stat
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from enum import Enum

from corral.errors import RequestError, SandboxClosed
from corral.openat2 import closing, names, open_content, open_entry, open_listing, open_path
from corral.sandbox.acting import Actor

READ_LIMIT = 64 << 20
MAX_ENTRIES = 1 << 18
MAX_DEPTH = 200
"""Of directory trees: each level holds descriptors open."""
CHUNK = 1 << 20
NOBODY = 65534


class FileType(Enum):
    """What kind of thing a name stands for."""

    FILE = stat.S_IFREG
    DIRECTORY = stat.S_IFDIR
    SYMLINK = stat.S_IFLNK
    FIFO = stat.S_IFIFO
    SOCKET = stat.S_IFSOCK
    CHARACTER_DEVICE = stat.S_IFCHR
    BLOCK_DEVICE = stat.S_IFBLK


@dataclass(frozen=True, slots=True)
class FileInfo:
    """What is known of one file inside. ``name`` holds undecodable bytes as surrogates (PEP 383)."""

    name: str
    type: FileType
    size: int
    mode: int
    """Permission bits, with setuid, setgid and sticky."""
    uid: int
    """The owner's id inside; 65534 for an owner that does not exist there."""
    mtime: float


@dataclass(frozen=True, slots=True)
class Skipped:
    """Something that a download left out: its path below the downloaded directory, and why."""

    path: str
    reason: str


@dataclass(frozen=True, slots=True)
class Download:
    """What came out."""

    files: int
    directories: int
    links: int
    size: int
    skipped: tuple[Skipped, ...]


_REASONS = {
    errno.ELOOP: "it is, or leads through, a link that is not followed",
    errno.EXDEV: "something is mounted there, or it leads out of the sandbox",
    errno.EAGAIN: "it keeps changing, or somebody inside holds it",
}


class FileError(RequestError):
    """A file operation that failed. The message names the operation, the path (escaped) and the reason."""


@contextmanager
def explained(verb: str, path: str, where: str = " in the sandbox") -> Iterator[None]:
    """Errors of the block as a FileError that names the path, escaped."""
    try:
        yield
    except OSError as error:
        reason = _REASONS.get(error.errno or 0) or error.strerror or str(error)
        raise FileError(f"cannot {verb} {path!r}{where}: {reason}") from error
    except FileError:
        raise
    except RequestError as error:
        raise FileError(f"cannot {verb} {path!r}{where}: {error}") from error


def encode(path: str | os.PathLike[str]) -> bytes:
    """The bytes of an absolute path inside. Raises RequestError for a path that cannot be one."""
    try:
        encoded = os.fsencode(path)
    except UnicodeEncodeError as error:
        raise RequestError("it has characters that no file name can have") from error
    if b"\0" in encoded:
        raise RequestError("it holds a NUL")
    if not encoded.startswith(b"/"):
        raise RequestError("it must be absolute")
    return encoded


def split(path: bytes) -> tuple[bytes, bytes]:
    """Directory and last name of a path that is to be made, replaced or removed."""
    head, _, name = path.rpartition(b"/")
    if name in (b"", b".", b".."):
        raise RequestError("it does not end in a name")
    return head or b"/", name


def write_all(fd: int, data: bytes | memoryview) -> None:
    """Writes all of ``data``."""
    view = memoryview(data)
    while view:
        view = view[os.write(fd, view) :]


class Inside:
    """A sandbox's tree and the user as whom to touch it: what :class:`Files` and the transfers share."""

    def __init__(self, root_fd: int, actor: Actor) -> None:
        self.acting = actor.acting
        self._lock = threading.Lock()
        self._root = -1
        # A copy of our own: the number of the caller's descriptor may come to mean something else when it is closed.
        try:
            self._root = fcntl.fcntl(root_fd, fcntl.F_DUPFD_CLOEXEC, 3)
        except (OSError, ValueError) as error:
            raise SandboxClosed("it has no root any more") from error

    def __del__(self) -> None:
        self.close()

    @contextmanager
    def root(self) -> Iterator[int]:
        """The root directory, for one operation. Raises SandboxClosed."""
        with self._lock:
            if self._root < 0:
                raise SandboxClosed("its files are closed")
            fd = fcntl.fcntl(self._root, fcntl.F_DUPFD_CLOEXEC, 3)
        with closing(fd):
            yield fd

    def close(self) -> None:
        """No operation can begin after this."""
        with self._lock:
            if self._root >= 0:
                os.close(self._root)
                self._root = -1

    @contextmanager
    def replacing(self, parent: int, name: bytes, mode: int) -> Iterator[Callable[[bytes], None]]:
        """Yields a function that writes to what becomes ``name`` at the end of the block, at once and complete.

        The block runs with the caller's ids; each call of the function with the agent's.
        """
        temporary = temporary_name()
        with self.acting():
            fd = os.open(
                temporary,
                os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_NOFOLLOW | os.O_NONBLOCK | os.O_CLOEXEC,
                0o600,
                dir_fd=parent,
            )

        def write(data: bytes) -> None:
            with self.acting():
                write_all(fd, data)

        with closing(fd):
            try:
                yield write
                with self.acting():
                    os.fchmod(fd, mode)
                    _refuse_mounted(parent, name)
                    os.rename(temporary, name, src_dir_fd=parent, dst_dir_fd=parent)
            except BaseException:
                with self.acting(), suppress(OSError):
                    os.unlink(temporary, dir_fd=parent)
                raise


def temporary_name() -> bytes:
    """A name that nobody has."""
    return b".corral-" + secrets.token_hex(8).encode()


def make_one(parent: int, name: bytes, mode: int = 0o755) -> None:
    """A directory with exactly this mode, whatever the controller's umask. To be called while acting."""
    os.mkdir(name, 0o700, dir_fd=parent)
    with closing(open_entry(parent, name, directory=True)) as made, closing(open_listing(made)) as fd:
        os.fchmod(fd, mode)


def make_path(root: int, path: bytes) -> None:
    """A directory and its parents, as far as they are missing. To be called while acting."""
    done = b""
    for name in path.split(b"/"):
        if name in (b"", b"."):
            continue
        above, done = done or b"/", done + b"/" + name
        with closing(open_path(root, above, directory=True)) as parent:
            if name == b"..":
                continue
            # Whoever is faster inside has made it for us; if it is no directory, the next step or the check below says.
            with suppress(FileExistsError):
                make_one(parent, name)
    os.close(open_path(root, done or b"/", directory=True))


def _refuse_mounted(parent: int, name: bytes) -> None:
    """Refuses to remove, or to put something in the place of, what is covered inside, as by ``filesystem.deny``. To the
    kernel this process, in the host's mount namespace, may; the cover would come off (unlink(2), rename(2)). Nobody
    inside can mount, so it is enough to look before. Raises OSError (EXDEV)."""
    with suppress(FileNotFoundError):
        os.close(open_entry(parent, name, same_mount=True))


def _remove_tree(parent: int, name: bytes, depth: int, budget: int) -> int:
    """Removes a directory and returns what is left of ``budget`` entries. Never leaves its mount."""
    if depth > MAX_DEPTH:
        raise RequestError(f"it is nested deeper than {MAX_DEPTH} directories; remove it with a command inside")
    with (
        closing(open_entry(parent, name, directory=True, same_mount=True)) as place,
        closing(open_listing(place)) as listing,
    ):
        entries = names(listing, budget)
        budget -= len(entries)
        for child, status in entries:
            if stat.S_ISDIR(status.st_mode):
                budget = _remove_tree(place, child, depth + 1, budget)
            else:
                with suppress(FileNotFoundError):
                    _refuse_mounted(place, child)
                    os.unlink(child, dir_fd=place)
    os.rmdir(name, dir_fd=parent)
    return budget


class Files:
    """The files of one sandbox, as one of its users. See the module."""

    def __init__(
        self, root_fd: int, uid: int, gid: int, *, inside: Callable[[int], int | None] = lambda outside: None
    ) -> None:
        """``uid`` and ``gid`` are the acting user's on the host; ``inside`` gives for a host id the id inside.

        ``root_fd`` is copied. Without ``inside`` all owners are reported as nobody. Raises RequestError for a user as
        whom the caller cannot act, SandboxClosed when ``root_fd`` is closed.
        """
        actor = Actor(uid, gid)
        self._inside = Inside(root_fd, actor)
        self._owner = inside

    def close(self) -> None:
        """Lets go of the sandbox; operations that are under way finish."""
        self._inside.close()

    # ---- one file ----

    def read(self, path: str | os.PathLike[str], *, limit: int = READ_LIMIT) -> bytes:
        """The contents of a regular file of at most ``limit`` bytes. Links lead to where they lead inside."""
        with explained("read", os.fspath(path)):
            encoded = encode(path)
            with self._inside.root() as root, self._inside.acting():
                with closing(open_path(root, encoded)) as place, closing(open_content(place)) as fd:
                    too_large = RequestError(f"it is larger than {limit} bytes")
                    if os.fstat(fd).st_size > limit:
                        raise too_large
                    data = bytearray()
                    while chunk := os.read(fd, min(CHUNK, limit + 1 - len(data))):
                        data += chunk
                        if len(data) > limit:
                            raise too_large
                    return bytes(data)

    def write(self, path: str | os.PathLike[str], data: bytes, *, mode: int = 0o644, parents: bool = False) -> None:
        """Makes or replaces a file, at once: whoever reads it inside sees the old contents or the new ones.

        A link at ``path`` is replaced itself; what it points to stays as it is.
        """
        with explained("write", os.fspath(path)):
            if not 0 <= mode <= 0o777:
                raise RequestError(f"mode {mode:o} is not one of permissions only")
            head, name = split(encode(path))
            with self._inside.root() as root:
                with self._inside.acting():
                    if parents:
                        make_path(root, head)
                    parent = open_path(root, head, directory=True)
                with closing(parent), self._inside.replacing(parent, name, mode) as write:
                    write(data)

    def info(self, path: str | os.PathLike[str], *, follow: bool = False) -> FileInfo:
        """What is at ``path``: with ``follow`` what a link leads to, else the link itself."""
        with explained("look at", os.fspath(path)):
            encoded = encode(path)
            with self._inside.root() as root, self._inside.acting():
                with closing(open_path(root, encoded, follow=follow)) as place:
                    status = os.fstat(place)
            return self._info(encoded.rstrip(b"/").rpartition(b"/")[2] or b"/", status)

    def remove(self, path: str | os.PathLike[str], *, recursive: bool = False) -> None:
        """Removes a file, a link, an empty directory, or with ``recursive`` a directory and all that is in it.

        Other mounts (the workspace in /tmp, say) are never emptied on the way.
        """
        with explained("remove", os.fspath(path)):
            head, name = split(encode(path).rstrip(b"/"))
            with self._inside.root() as root, self._inside.acting():
                with closing(open_path(root, head, directory=True)) as parent:
                    _refuse_mounted(parent, name)
                    try:
                        os.unlink(name, dir_fd=parent)
                    except IsADirectoryError:
                        if recursive:
                            _remove_tree(parent, name, 1, MAX_ENTRIES)
                        else:
                            os.rmdir(name, dir_fd=parent)

    # ---- directories ----

    def list(self, path: str | os.PathLike[str]) -> list[FileInfo]:
        """The entries of a directory, sorted by name; links are not followed."""
        with explained("list", os.fspath(path)):
            encoded = encode(path)
            with self._inside.root() as root, self._inside.acting():
                with closing(open_path(root, encoded)) as place, closing(open_listing(place)) as listing:
                    found = names(listing, MAX_ENTRIES)
            return [self._info(name, status) for name, status in sorted(found, key=lambda entry: entry[0])]

    def make_directory(self, path: str | os.PathLike[str], *, parents: bool = False) -> None:
        """Makes a directory; with ``parents`` also those above it, and it may be there already."""
        with explained("make directory", os.fspath(path)):
            encoded = encode(path).rstrip(b"/") or b"/"
            with self._inside.root() as root, self._inside.acting():
                if parents:
                    make_path(root, encoded)
                    return
                head, name = split(encoded)
                with closing(open_path(root, head, directory=True)) as parent:
                    make_one(parent, name)

    # ---- between host and sandbox ----

    def upload(self, host_path: str | os.PathLike[str], path: str | os.PathLike[str]) -> None:
        """Copies a file, link or directory of the host to ``path``; a directory is merged into one that is there.

        The host side is read as the caller. Links are copied, never followed. A fifo, socket or device anywhere in a
        tree is refused before anything is written. Only permission bits are kept, and directories stay accessible
        to their owner.
        """
        from corral.sandbox.transfer import upload

        upload(self._inside, os.fspath(host_path), os.fspath(path))

    def download(
        self,
        path: str | os.PathLike[str],
        host_path: str | os.PathLike[str],
        *,
        limit: int = 1 << 30,
        max_entries: int = 100_000,
    ) -> Download:
        """Copies a file or directory to ``host_path``, which must not exist and belongs to the caller.

        Permission bits are kept as far as the caller's umask allows; no owner, setuid bit or extended attribute.
        Links are kept if they cannot lead out of the copied directory. These, special files and unreadable files are
        left out and named in the result. Beyond ``limit`` bytes or ``max_entries`` nothing is kept: RequestError.
        """
        from corral.sandbox.transfer import download

        return download(self._inside, os.fspath(path), os.fspath(host_path), limit, max_entries)

    def _info(self, name: bytes, status: os.stat_result) -> FileInfo:
        owner = self._owner(status.st_uid)
        return FileInfo(
            os.fsdecode(name),
            FileType(stat.S_IFMT(status.st_mode)),
            status.st_size,
            stat.S_IMODE(status.st_mode),
            NOBODY if owner is None else owner,
            status.st_mtime,
        )
