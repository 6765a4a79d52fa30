"""Copying between the host and a live sandbox.

Two sides, never mixed: the host's side is opened, read and written with the caller's own ids, outside of
:meth:`Inside.acting`; the sandbox's side only within it. Both are walked by descriptors and single names. From host to
sandbox all must be right or the copy fails; from sandbox to host what is not fit to leave is left out and reported.
"""

from __future__ import annotations

import os
import shutil
import stat
from collections.abc import Iterator
from contextlib import contextmanager, suppress

from corral.errors import RequestError
from corral.openat2 import closing, kind_name, names, open_content, open_entry, open_listing, open_path
from corral.sandbox.files import (
    CHUNK,
    MAX_DEPTH,
    MAX_ENTRIES,
    Download,
    Inside,
    Skipped,
    encode,
    explained,
    make_one,
    split,
    temporary_name,
    write_all,
)

_HOST = " on the host"
_NEW_FILE = os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_NOFOLLOW | os.O_CLOEXEC
_TOO_DEEP = f"it is nested deeper than {MAX_DEPTH} directories"


def _link_target(link: int) -> bytes:
    """Where the link behind an O_PATH descriptor points (readlinkat(2) with an empty path)."""
    return os.readlink(b"", dir_fd=link)


# ---- host to sandbox ----


def upload(inside: Inside, host_path: str, path: str) -> None:
    """See :meth:`corral.sandbox.files.Files.upload`."""
    with explained("upload", host_path, _HOST):
        if "\0" in host_path:
            raise RequestError("it holds a NUL")
        source = os.open(host_path, os.O_PATH | os.O_NOFOLLOW | os.O_CLOEXEC)
    with closing(source):
        mode = os.fstat(source).st_mode
        _check_source(source, host_path, 0)
        with explained("upload to", path), inside.root() as root:
            encoded = encode(path)
            if stat.S_ISDIR(mode):
                with closing(_target_directory(inside, root, encoded.rstrip(b"/") or b"/", mode)) as target:
                    _send_entries(inside, source, target, host_path)
                return
            head, name = split(encoded)
            with inside.acting():
                parent = open_path(root, head, directory=True)
            with closing(parent):
                _send(inside, source, parent, name, host_path)


def _check_source(place: int, host_path: str, depth: int) -> None:
    """Refuses a tree with something in it that cannot be uploaded, before any of it is."""
    mode = os.fstat(place).st_mode
    with explained("upload", host_path, _HOST):
        if not (stat.S_ISREG(mode) or stat.S_ISLNK(mode) or stat.S_ISDIR(mode)):
            raise RequestError(f"it is a {kind_name(mode)}")
        if depth > MAX_DEPTH:
            raise RequestError(_TOO_DEEP)
        if not stat.S_ISDIR(mode):
            return
        with closing(open_listing(place)) as listing:
            found = names(listing, MAX_ENTRIES)
    for name, status in found:
        if stat.S_ISREG(status.st_mode) or stat.S_ISLNK(status.st_mode):
            continue
        below = os.path.join(host_path, os.fsdecode(name))
        with explained("upload", below, _HOST):
            child = open_entry(place, name)
        with closing(child):
            _check_source(child, below, depth + 1)


def _target_directory(inside: Inside, root: int, path: bytes, mode: int) -> int:
    """The directory that an upload goes to, made if it is missing; the caller may name it through links."""
    with inside.acting():
        with suppress(FileNotFoundError):
            return open_path(root, path, directory=True)
        head, name = split(path)
        with closing(open_path(root, head, directory=True)) as parent:
            make_one(parent, name, mode & 0o777 | 0o700)
            return open_entry(parent, name, directory=True)


def _send_entries(inside: Inside, source: int, target: int, host_path: str) -> None:
    with explained("upload", host_path, _HOST), closing(open_listing(source)) as listing:
        found = names(listing, MAX_ENTRIES)
    for name, _ in found:
        below = os.path.join(host_path, os.fsdecode(name))
        with explained("upload", below, _HOST):
            place = open_entry(source, name)
        with closing(place):
            _send(inside, place, target, name, below)


def _send(inside: Inside, place: int, parent: int, name: bytes, host_path: str) -> None:
    """Copies what is behind the host's descriptor to an entry of a directory inside."""
    mode = os.fstat(place).st_mode
    if stat.S_ISDIR(mode):
        with inside.acting():
            with suppress(FileExistsError):
                make_one(parent, name, mode & 0o777 | 0o700)
            # Not through a link: the agent may have put one there, and only the caller's own path may use links.
            target = open_entry(parent, name, directory=True)
        with closing(target):
            _send_entries(inside, place, target, host_path)
    elif stat.S_ISLNK(mode):
        points_to, temporary = _link_target(place), temporary_name()
        with inside.acting():
            os.symlink(points_to, temporary, dir_fd=parent)
            try:
                os.rename(temporary, name, src_dir_fd=parent, dst_dir_fd=parent)
            except OSError:
                with suppress(OSError):
                    os.unlink(temporary, dir_fd=parent)
                raise
    else:
        with explained("upload", host_path, _HOST):
            content = open_content(place)
        with closing(content), inside.replacing(parent, name, mode & 0o777) as write:
            while data := os.read(content, CHUNK):
                write(data)


# ---- sandbox to host ----


def download(inside: Inside, path: str, host_path: str, limit: int, max_entries: int) -> Download:
    """See :meth:`corral.sandbox.files.Files.download`."""
    with _new_place(host_path) as (parent, name), inside.root() as root:
        with explained("download", path), inside.acting():
            place = open_path(root, encode(path))
        with closing(place), explained("download", path):
            receiver = _Receiver(inside, limit, max_entries)
            mode = os.fstat(place).st_mode
            if not (stat.S_ISREG(mode) or stat.S_ISDIR(mode)):
                raise RequestError(f"it is a {kind_name(mode)}")
            try:
                receiver.receive(place, parent, name, ())
            except BaseException:
                receiver.remove(parent, name)
                raise
            return receiver.result()


@contextmanager
def _new_place(host_path: str) -> Iterator[tuple[int, bytes]]:
    """Directory and name of something on the host that does not exist yet."""
    with explained("download to", host_path, _HOST):
        if "\0" in host_path:
            raise RequestError("it holds a NUL")
        head, name = split(os.fsencode(os.path.abspath(host_path)))
        parent = os.open(head, os.O_PATH | os.O_DIRECTORY | os.O_CLOEXEC)
    with closing(parent):
        with explained("download to", host_path, _HOST), suppress(FileNotFoundError):
            os.lstat(name, dir_fd=parent)
            raise RequestError("it exists already")
        yield parent, name


def stays_inside(target: bytes, depth: int) -> bool:
    """Whether a link ``depth`` directories below the top of a tree, like all others of the tree, stays in the tree.

    Names after names may be links themselves, so ".." is counted only where it comes first: there it goes up from the
    real directory that the link is in. With all links of the tree kept to this, none of their chains leaves it.
    """
    if target.startswith(b"/"):
        return False
    parts = [part for part in target.split(b"/") if part not in (b"", b".")]
    ups = next((i for i, part in enumerate(parts) if part != b".."), len(parts))
    return ups <= depth and b".." not in parts[ups:]


class _Receiver:
    """One download: its budget, its counts, and what was left out."""

    def __init__(self, inside: Inside, limit: int, max_entries: int) -> None:
        self._inside = inside
        self._limit, self._bytes_left = limit, limit
        self._max_entries, self._entries_left = max_entries, max_entries
        self._made = False
        self._files = self._directories = self._links = 0
        self._skipped: list[Skipped] = []

    def result(self) -> Download:
        size = self._limit - self._bytes_left
        return Download(self._files, self._directories, self._links, size, tuple(self._skipped))

    def remove(self, parent: int, name: bytes) -> None:
        """Takes back what was made, which nobody but the caller could change since."""
        if not self._made:
            return
        with suppress(OSError):
            if stat.S_ISDIR(os.lstat(name, dir_fd=parent).st_mode):
                shutil.rmtree(name, ignore_errors=True, dir_fd=parent)
            else:
                os.unlink(name, dir_fd=parent)

    def receive(self, place: int, parent: int, name: bytes, path: tuple[bytes, ...]) -> None:
        """Copies what is behind the sandbox's descriptor to a new entry of a host directory."""
        mode = os.fstat(place).st_mode
        if stat.S_ISDIR(mode):
            self._directory(place, mode, parent, name, path)
        elif stat.S_ISREG(mode):
            self._file(place, mode, parent, name)
        elif stat.S_ISLNK(mode):
            self._link(place, parent, name, path)
        else:
            raise _Unfit(f"it is a {kind_name(mode)}")

    def _file(self, place: int, mode: int, parent: int, name: bytes) -> None:
        with _readable(), self._inside.acting():
            content = open_content(place)
        with closing(content):
            self._spend(os.fstat(content).st_size, check_only=True)
            copy = os.open(name, _NEW_FILE, mode & 0o777, dir_fd=parent)
            self._made = True
            with closing(copy):
                while True:
                    with self._inside.acting():
                        data = os.read(content, CHUNK)
                    if not data:
                        break
                    self._spend(len(data))
                    write_all(copy, data)
        self._files += 1

    def _spend(self, count: int, *, check_only: bool = False) -> None:
        if count > self._bytes_left:
            raise _Exceeded(f"it holds more than {self._limit} bytes")
        if not check_only:
            self._bytes_left -= count

    def _link(self, place: int, parent: int, name: bytes, path: tuple[bytes, ...]) -> None:
        with self._inside.acting():
            target = _link_target(place)
        if not stays_inside(target, len(path) - 1):
            raise _Unfit(f"it is a link that can lead out of the directory, to {os.fsdecode(target)!r}")
        os.symlink(target, name, dir_fd=parent)
        self._links += 1

    def _directory(self, place: int, mode: int, parent: int, name: bytes, path: tuple[bytes, ...]) -> None:
        if len(path) > MAX_DEPTH:
            raise _Unfit(_TOO_DEEP)
        with _readable(), self._inside.acting():
            listing = open_listing(place)
        with closing(listing), _readable(), self._inside.acting():
            try:
                found = names(listing, self._entries_left)
            except RequestError as error:
                raise _Exceeded(f"it holds more than {self._max_entries} entries") from error
        self._entries_left -= len(found)
        os.mkdir(name, mode & 0o777 | 0o700, dir_fd=parent)
        self._made = True
        with closing(os.open(name, os.O_PATH | os.O_DIRECTORY | os.O_NOFOLLOW | os.O_CLOEXEC, dir_fd=parent)) as copy:
            for child, _ in sorted(found, key=lambda entry: entry[0]):
                self._entry(place, copy, child, (*path, child))
        self._directories += 1

    def _entry(self, place: int, copy: int, name: bytes, path: tuple[bytes, ...]) -> None:
        """One entry, or its name among those left out."""
        try:
            with _readable(), self._inside.acting():
                try:
                    entry = open_entry(place, name)
                except FileNotFoundError:
                    return  # gone since it was listed
            with closing(entry):
                self.receive(entry, copy, name, path)
        except _Exceeded:
            raise
        except FileExistsError:
            self._skip(path, "it was listed twice")
        except RequestError as error:
            self._skip(path, str(error))

    def _skip(self, path: tuple[bytes, ...], reason: str) -> None:
        self._skipped.append(Skipped(os.fsdecode(b"/".join(path)), reason))


@contextmanager
def _readable() -> Iterator[None]:
    """What the acting user may not open is unfit to leave; it is no failure of the whole."""
    try:
        yield
    except (PermissionError, BlockingIOError) as error:
        raise _Unfit(error.strerror) from error


class _Unfit(RequestError):
    """One entry that may not leave."""


class _Exceeded(RequestError):
    """The download as a whole is too large."""
