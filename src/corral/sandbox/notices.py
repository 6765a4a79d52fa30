"""Brings refusals to the agent: with the result of the exec, and in a file that it can read and cannot change.

A second file there says when its files were set back to a layer, which it may not notice otherwise.

The files lie in a directory of the layer that the sandbox shows read-only, so not even an agent with the controller's
own id can write, remove or cover them. They are bounded: when the first is full, its last line counts what came after.

A refusal is recorded before its caller is answered, so before the caller can exit: when the end of an exec is
reported, all that its command was refused is here. What its daemons are refused later is in the file only.
"""

from __future__ import annotations

import errno
import os
import threading
import time
from collections.abc import Hashable
from contextlib import suppress
from dataclasses import asdict, replace

from corral.actions import Decision
from corral.errors import CorralError
from corral.sandbox.acting import Actor
from corral.sandbox.denials import Denial, describe, is_told
from corral.sandbox.view import NOTICES

MAX_BYTES = 1 << 20
"""Of the file, the last line included."""
MAX_DENIALS = 100
"""Different ones that are kept of one exec; the others are counted."""
_NAME = "denials.jsonl"
_RESTORES = "restores.jsonl"
_COUNT_BYTES = 128
"""Room for the line with the count."""


class Notices:
    """Collects what one sandbox is refused. A sink of the monitor; may be used from several threads.

    Never raises: what could not be told is still refused, and recorded by whoever keeps the records.
    """

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._execs: dict[int, _Collected] = {}
        self._file: _File | None = None

    def attach(self, layer: int) -> None:
        """Writes to the layer behind this descriptor from now on; the caller keeps the descriptor."""
        with self._lock:
            self._file = _File(
                os.open(NOTICES, os.O_RDONLY | os.O_DIRECTORY | os.O_NOFOLLOW | os.O_CLOEXEC, dir_fd=layer)
            )

    def close(self) -> None:
        """Writes no more."""
        with self._lock:
            if self._file:
                self._file.close()
                self._file = None

    def restored(self, layer: str, name: str) -> None:
        """Tells that the files are those of a layer now."""
        with self._lock:
            if self._file:
                self._file.restored(layer, name)

    def expect(self, number: int) -> None:
        """Collects for an exec; before it starts."""
        with self._lock:
            self._execs[number] = _Collected()

    def take(self, number: int) -> tuple[tuple[Denial, ...], int]:
        """What was collected for an exec that has ended, and how many more there were; forgets it."""
        with self._lock:
            collected = self._execs.pop(number, None)
            return collected.result() if collected else ((), 0)

    def write(self, decision: Decision) -> None:
        """Tells of a decision, if it is one to tell of."""
        if not is_told(decision):
            return
        with self._lock:
            collected = self._execs.get(decision.action.origin.exec)
            if collected:
                collected.add(decision)
            if self._file:
                self._file.add(decision)


class _Collected:
    """The refusals of one exec; equal ones are counted."""

    def __init__(self) -> None:
        self._kept: dict[Hashable, Denial] = {}
        self._dropped = 0

    def add(self, decision: Decision) -> None:
        action = decision.action
        key = (action.kind, action.subject, decision.rule, decision.reason, decision.advice, decision.private)
        kept = self._kept.get(key)
        if kept:
            self._kept[key] = replace(kept, count=kept.count + decision.count)
        elif len(self._kept) < MAX_DENIALS:
            self._kept[key] = describe(decision)
        else:
            self._dropped += decision.count

    def result(self) -> tuple[tuple[Denial, ...], int]:
        return tuple(self._kept.values()), self._dropped


class _File:
    """The file inside, made when the first line comes."""

    def __init__(self, directory: int) -> None:
        self._directory = directory
        self._fd = -1
        self._end = 0
        self._full = False
        self._more = 0
        """Refusals without a line: this file, or the layer, was full."""

    def close(self) -> None:
        """Closes it for good."""
        for fd in (self._fd, self._directory):
            if fd >= 0:
                os.close(fd)

    def add(self, decision: Decision) -> None:
        """Adds a line, or counts."""
        try:
            if self._more and not self._full:
                self._end += self._write(_count(self._more))
                self._more = 0
            if not self._full:
                line = _line(describe(decision))
                self._full = self._end + len(line) > MAX_BYTES - _COUNT_BYTES
                if not self._full:
                    self._end += self._write(line)
                    return
        except (OSError, CorralError):
            # The layer is full, and its disk is the agent's to fill: it is counted, and told when there is room.
            self._more += decision.count
            return
        self._more += decision.count
        with suppress(OSError):
            self._write(_count(self._more))  # over the count before it, which has the same length

    def restored(self, layer: str, name: str) -> None:
        """Adds a line to the other file, as long as there is room."""
        import json

        with suppress(OSError, CorralError):
            try:
                fd = os.open(
                    _RESTORES, os.O_WRONLY | os.O_APPEND | os.O_NOFOLLOW | os.O_CLOEXEC, dir_fd=self._directory
                )
            except FileNotFoundError:
                fd = self._make(_RESTORES)
            try:
                line = json.dumps({"layer": layer, "name": name, "time": round(time.time(), 3)}).encode("ascii")
                if os.fstat(fd).st_size + len(line) < MAX_BYTES:
                    os.write(fd, line + b"\n")
            finally:
                os.close(fd)

    def _write(self, line: bytes) -> int:
        """Writes at the end, all or nothing, and returns the length."""
        if self._fd < 0:
            self._fd = self._make(_NAME)
        try:
            written = os.pwrite(self._fd, line, self._end)
        except OSError:
            written = 0
        if written != len(line):
            os.ftruncate(self._fd, self._end)
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        return written

    def _make(self, name: str) -> int:
        """The new file. One name in a directory that nobody inside can write to: nothing planted can be there."""
        owner = os.fstat(self._directory)
        # Root's controller has no id in the sandbox, and a file system of the sandbox takes files of its ids only.
        with Actor(owner.st_uid, owner.st_gid).acting():
            flags = os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_NOFOLLOW | os.O_CLOEXEC
            fd = os.open(name, flags, 0o444, dir_fd=self._directory)
            os.fchmod(fd, 0o444)  # whatever the umask is
        return fd


def _line(denial: Denial) -> bytes:
    import json  # takes longer to load than most sandboxes ever need for it

    return f"{json.dumps(asdict(denial))}\n".encode("ascii")


def _count(more: int) -> bytes:
    return f'{{"more": {more:20}, "refused": "There were more refusals than lines before this one."}}\n'.encode("ascii")
