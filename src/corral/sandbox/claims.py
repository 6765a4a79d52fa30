"""Which sessions are alive, and so name what they have kept; and how much their ends may still have to keep.

    <state>/layers/session-<id>    locked (flock) by the process of a live session; its content is that many bytes

Who is killed, or whose machine stops, has no lock any more; whoever comes by removes the file. A session begins here
with the first snapshot, or at its start where a policy bounds what all layers may take, and ends with its sandbox; one
that is restored goes on with the sandbox that takes its place.
"""

from __future__ import annotations

import fcntl
import os
import re
import threading
from contextlib import suppress
from dataclasses import dataclass, field

_NAME = re.compile(r"session-([a-z2-7]{8})")
_LENGTH = 20


@dataclass(slots=True)
class _Claim:
    layers: int
    """The directory of all layers: the place may have another path by the time it ends."""
    fd: int
    name: str
    process: int
    kept: dict[str, int] = field(default_factory=dict)
    """What it has kept: bytes by layer."""


_claims: dict[str, list[_Claim]] = {}
"""Of this process, by session; more than one where it was restored."""
_lock = threading.Lock()


def claim(layers: int, session: str, reserved: int | None = None) -> None:
    """Says that a session of this process is alive. May be called again. Raises OSError."""
    with _lock:
        mine = _mine(session)
        if all(each.name != f"session-{session}" for each in mine):  # it may have those of the one that it goes on from
            mine.insert(0, _make(layers, session))
            _claims[session] = mine
        if reserved is not None:
            os.pwrite(mine[0].fd, b"%*d" % (_LENGTH, reserved), 0)


def _mine(session: str) -> list[_Claim]:
    return [each for each in _claims.get(session, ()) if each.process == os.getpid()]


def _make(layers: int, session: str) -> _Claim:
    name = f"session-{session}"
    while True:
        fd = os.open(name, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC | os.O_NOFOLLOW, 0o600, dir_fd=layers)
        try:
            fcntl.flock(fd, fcntl.LOCK_EX)
            # Somebody may have taken it for that of a dead one, before it was locked.
            if os.fstat(fd).st_nlink:
                return _Claim(os.dup(layers), fd, name, os.getpid())
        except BaseException:
            os.close(fd)
            raise
        os.close(fd)


def release(session: str) -> None:
    """The session has ended. May be called where it was never claimed, and again."""
    with _lock:
        for each in _claims.pop(session, ()):
            if each.process == os.getpid():  # a child that was forked meanwhile has the lock, too
                with suppress(OSError):
                    os.unlink(each.name, dir_fd=each.layers)
                fcntl.flock(each.fd, fcntl.LOCK_UN)
            os.close(each.fd)
            os.close(each.layers)


def hand_over(before: str, after: str) -> None:
    """The session goes on in another sandbox: what the first one has named is named until that one's end."""
    with _lock:
        taken = _claims.pop(before, [])
        if taken:
            for each in taken:
                with suppress(OSError):  # it has no end of its own any more
                    os.pwrite(each.fd, b"%*d" % (_LENGTH, 0), 0)
            _claims.setdefault(after, []).extend(taken)


def has_reserved(session: str) -> bool:
    """Whether there is room for what the end of a session of this process may have to keep."""
    with _lock:
        return any(_content(each.fd) for each in _mine(session))


def remember(session: str, layer: str, size: int) -> None:
    """A session of this process has kept a layer."""
    with _lock:
        for each in _mine(session)[:1]:
            each.kept[layer] = size


def kept(layers: int, session: str) -> int:
    """The bytes of the layers that a session of this process has kept, and that are still there."""
    with _lock:
        size = 0
        for each in _mine(session):
            for layer in list(each.kept):
                try:
                    os.stat(layer, dir_fd=layers, follow_symlinks=False)
                except OSError:
                    del each.kept[layer]
                else:
                    size += each.kept[layer]
        return size


# ---- the other side ----


def is_live(layers: int, session: str) -> bool:
    """Whether a session is alive; what a dead one has left is removed."""
    if not _NAME.fullmatch(f"session-{session}"):
        return True  # nobody can tell
    return _reserved(layers, f"session-{session}") is not None


def reserved(layers: int) -> int:
    """The bytes that the ends of all live sessions may still have to keep. Removes what dead ones have left."""
    found = (_reserved(layers, name) for name in os.listdir(layers) if _NAME.fullmatch(name))
    return sum(size for size in found if size is not None)


def _reserved(layers: int, name: str) -> int | None:
    """None where its session is dead. Who cannot tell takes it for alive."""
    try:
        fd = os.open(name, os.O_RDONLY | os.O_CLOEXEC | os.O_NOFOLLOW | os.O_NONBLOCK, dir_fd=layers)
    except FileNotFoundError:
        return None
    try:
        try:
            fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            return _content(fd)
        if os.fstat(fd).st_nlink:
            os.unlink(name, dir_fd=layers)
        return None
    finally:
        os.close(fd)


def _content(fd: int) -> int:
    return int(os.pread(fd, _LENGTH, 0) or b"0")
