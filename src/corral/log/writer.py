"""Appends to a log: durable in batches, then in tiles, then under a signed checkpoint.

One thread writes. Whoever appends meanwhile waits for the next batch, and a batch costs one fdatasync(2) however large
it is. A second thread makes tiles of what is durable and signs, so that nobody who appends waits for that.

Several processes may write to one log. They take turns at its lock, and each takes up what the others appended before
it goes on. Nothing is retried: a write or a sync that failed once may have lost what was before it, so the log is
closed with the error, and everything that waits is told (I2, I3).
"""

from __future__ import annotations

import errno
import fcntl
import os
import threading
import time
from collections import deque
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from types import TracebackType

from corral.diskspace import spare_bytes
from corral.errors import CorralError
from corral.log.journal import Journal, frame, read_frames
from corral.log.note import Checkpoint, Signature, Signer
from corral.log.recovery import Recovery, altered, distrust, keep_aside, recover, require_signed, same_boot
from corral.log.signing import Checkpoints
from corral.log.tiles import MAX_ENTRY, WIDTH, LogDamaged, Tiles, make_directory

CHECKPOINT_EVERY = 1.0
"""Seconds after which what is durable is under a signed checkpoint."""
LOCK_TIMEOUT = 30.0
"""Seconds for which another process may keep a lock."""
MAX_WAITING = 32 << 20
"""Bytes of entries that wait to be written; who brings more is held up."""
_SEGMENT = 16 << 20
"""Bytes of a journal's file after which another is begun."""
_PORTION = 16 << 20
"""Bytes that are written before the free space is looked at again."""
_AT_ONCE = 64 * WIDTH
"""Entries that are made tiles of at a time."""

Done = Callable[[int, CorralError | None], None]
"""Told the number of an entry once it is durable, or -1 and why it may never be. It must not fail, and not close the
log."""


class LogUnwritable(CorralError):
    """The log cannot be written. What is to be recorded must not happen (I3)."""


class Log:
    """A log that is open for writing. May be used from several threads."""

    def __init__(self, directory: Path, signer: Signer, *, checkpoint_every: float = CHECKPOINT_EVERY) -> None:
        """Opens the log in ``directory``, or makes one there, under the name that the signer's key has.

        Raises:
            LogUnwritable: the directory cannot be made or written, or its lock is not to be had.
            LogDamaged: what is there is not what its checkpoint commits it to.
            NoteError: its checkpoint is not one of this key.
        """
        self.directory = directory
        self._every = checkpoint_every
        self._journal = Journal(directory / "journal")
        self._tiles = Tiles(directory)
        self._checkpoints = Checkpoints(directory, signer, self._tiles)
        self._waiting: deque[tuple[bytes | None, Done | None]] = deque()
        """Entries to write, and in between (None) who waits for those before."""
        self._bytes = 0
        self._change = threading.Condition()
        self._appending, self._sealing = threading.Lock(), threading.Lock()
        """Against threads of this process, which share the locks that stand against others."""
        self._failure: CorralError | None = None
        self._closing = self._writing = False
        self._callbacks: list[Callable[[CorralError], None]] = []
        self._process = os.getpid()
        self._written = threading.Event()
        self._lock = self._tiles_lock = self._segment = -1
        self._base = self._offset = self._count = 0
        self._spare = 0
        try:
            self._open()
        except BaseException as error:
            self._close_files()
            if isinstance(error, OSError):
                raise LogUnwritable(f"{directory}: cannot open the log: {error.strerror}") from None
            raise
        self._writer = threading.Thread(target=self._write_all, name="corral-log", daemon=True)
        self._sealer = threading.Thread(target=self._seal_all, name="corral-tiles", daemon=True)
        self._writer.start()
        self._sealer.start()

    # ---- appending ----

    def submit(self, entry: bytes, done: Done | None = None) -> None:
        """Appends an entry without waiting until it is durable; ``done`` is told, by another thread.

        Raises LogUnwritable where the log is closed or has failed before; ValueError for what is no entry.
        """
        if not 0 < len(entry) <= MAX_ENTRY:
            raise ValueError(f"an entry has 1 to {MAX_ENTRY} bytes, not {len(entry)}")
        if os.getpid() != self._process:
            raise LogUnwritable("the log was opened by another process, of which this is a fork; open it again")
        with self._change:
            while self._bytes > MAX_WAITING and self._failure is None and not self._closing:
                self._change.wait()
            if self._failure is not None or self._closing:
                raise LogUnwritable(str(self._failure or "the log is closed"))
            self._waiting.append((entry, done))
            self._bytes += len(entry)
            if len(self._waiting) == 1:
                self._change.notify_all()

    def when_durable(self, done: Callable[[CorralError | None], None]) -> None:
        """Calls back when all that this thread has submitted is durable, or with why something of it never will be: at
        once, or later and by another thread. Does not raise."""
        with self._change:
            error = self._failure
            if error is None and self._closing:
                error = LogUnwritable("the log is closed")
            if error is None and (self._waiting or self._writing):
                self._waiting.append((None, lambda _, problem: done(problem)))
                self._change.notify_all()
                return
        done(error)

    def when_failed(self, callback: Callable[[CorralError], None]) -> Callable[[], None]:
        """Calls back, by any thread, if the log can be written no more; at once where that is so already.

        Returns what takes the callback back.
        """
        with self._change:
            self._callbacks.append(callback)
            error = self._failure
        if error is not None:
            callback(error)

        def forget() -> None:
            with self._change:
                if callback in self._callbacks:
                    self._callbacks.remove(callback)

        return forget

    def append(self, entry: bytes) -> int:
        """Appends an entry and returns its number once it is durable. Raises LogUnwritable, or ValueError."""
        said = threading.Event()
        outcome: list[tuple[int, CorralError | None]] = []

        def done(number: int, error: CorralError | None) -> None:
            outcome.append((number, error))
            said.set()

        self.submit(entry, done)
        said.wait()
        number, error = outcome[0]
        if error is not None:
            raise LogUnwritable(str(error))
        return number

    @property
    def origin(self) -> str:
        """Its name, which stands in its checkpoints and stays the same when its key changes."""
        return self._checkpoints.origin

    @property
    def failure(self) -> CorralError | None:
        """Why nothing more can be written, if it cannot."""
        return self._failure

    def seal(self) -> Checkpoint:
        """Signs for all that is durable now. Raises LogUnwritable; LogDamaged where that would not continue what was
        signed before."""
        try:
            while True:
                checkpoint, whole = self._seal()
                if whole:
                    return checkpoint
        except OSError as error:
            raise LogUnwritable(f"{self.directory}: cannot write the tiles: {error.strerror}") from None

    def rotate(self, signer: Signer) -> None:
        """Has another key sign from now on, and both for what there is now.

        Raises NoteError where the key has another name than the log; LogUnwritable or LogDamaged.
        """
        self.seal()
        try:
            with self._sealing, _locked(self._tiles_lock):
                self._checkpoints.rotate(signer)
        except OSError as error:
            raise LogUnwritable(f"{self.directory}: cannot change the key: {error.strerror}") from None

    def cosign(self, size: int, signatures: tuple[Signature, ...]) -> None:
        """Adds the cosignatures of witnesses to the checkpoint of that size, if it is the newest still.

        Raises NoteError, LogDamaged, or LogUnwritable.
        """
        try:
            with self._sealing, _locked(self._tiles_lock):
                self._checkpoints.add(size, signatures)
        except OSError as error:
            raise LogUnwritable(f"{self.directory}: cannot add cosignatures: {error.strerror}") from None

    def close(self) -> None:
        """Writes what waits, signs for it, and closes. Raises LogUnwritable where that could not be done."""
        with self._change:
            self._closing = True
            self._change.notify_all()
        self._writer.join()
        self._written.set()
        self._sealer.join()
        with self._sealing, self._appending:
            self._close_files()
        if self._failure is not None:
            raise LogUnwritable(str(self._failure))

    def __enter__(self) -> Log:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    # ---- opening and closing ----

    def _open(self) -> None:
        make_directory(self._journal.directory, 0o700)
        flags = os.O_RDWR | os.O_CREAT | os.O_CLOEXEC | os.O_NOFOLLOW
        self._lock = os.open(self._journal.directory / "lock", flags, 0o600)
        self._tiles_lock = os.open(self._journal.directory / "lock.tiles", flags, 0o600)
        with _locked(self._tiles_lock), _locked(self._lock):
            self._checkpoints.claim()
            if not same_boot(self._journal):  # what was written then may be lost, and is not missed
                self._say(0, 20)
            _, written = self._known()
            self.recovery: Recovery = recover(self._journal, self._tiles, self._checkpoints.read(), written)
            """What was mended."""
            self._checkpoints.publish()
            self._take(self._journal.segments()[-1])

    def _close_files(self) -> None:
        for fd in (self._segment, self._lock, self._tiles_lock):
            if fd >= 0:
                os.close(fd)
        self._segment = self._lock = self._tiles_lock = -1

    # ---- writing: the thread ``corral-log`` ----

    def _write_all(self) -> None:
        while True:
            with self._change:
                self._writing = False
                while not self._waiting and not self._closing:
                    self._change.wait()
                batch, self._waiting = self._waiting, deque()
                self._bytes, self._writing = 0, True
                self._change.notify_all()
            if not batch:
                return
            number, error = self._write_safely([entry for entry, _ in batch if entry is not None])
            for entry, done in batch:
                if done is not None:
                    self._tell(done, number, error)
                number += entry is not None
            self._written.set()

    def _tell(self, done: Done, number: int, error: CorralError | None) -> None:
        try:
            done(-1 if error else number, error)
        except Exception as problem:  # this thread must live; what it could not tell may be waited for
            self._fail(LogUnwritable(f"{self.directory}: nobody could be told ({type(problem).__name__})"))

    def _write_safely(self, entries: list[bytes]) -> tuple[int, CorralError | None]:
        error = self._failure
        if error is None and entries:
            try:
                return self._write(entries), None
            except CorralError as problem:
                error = problem
            except OSError as problem:
                error = LogUnwritable(f"{self.directory}: cannot write the log: {problem.strerror}")
            except Exception as problem:
                error = LogUnwritable(f"{self.directory}: cannot write the log ({type(problem).__name__})")
            self._fail(error)
        return -1, error

    def _fail(self, error: CorralError) -> None:
        with self._change:
            is_first, self._failure = self._failure is None, self._failure or error
            callbacks = list(self._callbacks)
            self._change.notify_all()
        if is_first:
            for callback in callbacks:
                callback(error)

    def _write(self, entries: list[bytes]) -> int:
        """Makes entries durable and returns the number of the first."""
        with self._appending, _locked(self._lock):
            self._catch_up()
            first = number = self._base + self._count
            frames: list[bytes] = []
            length = 0
            for entry in entries:
                if self._offset + length >= _SEGMENT and number % WIDTH == 0:
                    self._put(frames)
                    self._roll(number)
                    frames, length = [], 0
                data = frame(number, entry)
                frames.append(data)
                length += len(data)
                number += 1
            self._put(frames)
            segment = os.dup(self._segment)
        try:
            self._sync(segment)  # not under the lock: what others append meanwhile shares it, or has its own
        finally:
            os.close(segment)
        return first

    def _sync(self, segment: int) -> None:
        try:
            os.fdatasync(segment)
        except OSError:
            distrust(self._journal)
            raise

    def _put(self, frames: list[bytes]) -> None:
        """Writes frames, all of them or none."""
        data = b"".join(frames)
        if self._spare < len(data):
            self._spare = min(spare_bytes(self._segment), len(data) + _PORTION)
            if self._spare < len(data):
                raise LogUnwritable(
                    f"{self.directory}: the log would leave its disk with less than 1 GiB or 5 % free; make room there"
                )
        self._spare -= len(data)
        rest = memoryview(data)
        try:
            while rest:
                rest = rest[os.write(self._segment, rest) :]
        except BaseException:
            os.ftruncate(self._segment, self._offset)
            raise
        self._offset += len(data)
        self._count += len(frames)
        self._say(self._base + self._count, 20)

    def _roll(self, number: int) -> None:
        """Begins another file. Whatever is in the old one is durable then, for those who sync only the new one."""
        self._sync(self._segment)
        os.close(self._journal.open(number, create=True))
        self._take(number)
        if self._offset:
            raise altered(self._journal, number, number)

    def _take(self, base: int) -> None:
        """Goes on in this file, and tells the others."""
        if self._segment >= 0:
            os.close(self._segment)
            self._segment = -1
        self._segment = self._journal.open(base)
        self._base, self._offset, self._count = base, 0, 0
        self._say(base, 0)
        self._read_on()

    def _catch_up(self) -> None:
        """Takes up what other processes have written. Raises LogDamaged where somebody else has been at the files."""
        current, _ = self._known()
        if current > self._base:
            self._take(current)
        status = os.fstat(self._segment)
        if current < self._base or status.st_size < self._offset or not status.st_nlink:
            raise LogDamaged(f"journal/{self._journal.path(self._base).name}: it was cut off, removed or replaced")
        if status.st_size > self._offset:
            self._read_on()

    def _say(self, number: int, offset: int) -> None:
        """Writes to the file of the lock what :meth:`_known` reads: all of it, for half of a number is another one."""
        rest = b"%020d" % number
        while rest:
            written = os.pwrite(self._lock, rest, offset)
            rest, offset = rest[written:], offset + written

    def _known(self) -> tuple[int, int]:
        """What the file of the lock says: the first number of the journal's last file, and how many entries there were
        written. Not durable; below zero where it says nothing."""
        said = os.pread(self._lock, 40, 0)
        base, written = (int(part) if part.isdigit() else -1 for part in (said[:20], said[20:]))
        return base, written

    def _read_on(self) -> None:
        frames = read_frames(self._segment, self._base + self._count, self._offset)
        self._count += len(frames.entries)
        self._offset = frames.end
        if not frames.torn:
            raise altered(self._journal, self._base, self._base + self._count)
        if frames.rest:  # its writer died in the middle of it
            keep_aside(self._journal, self._segment, self._offset, self._base + self._count)

    # ---- tiles and checkpoints: the thread ``corral-tiles`` ----

    def _seal_all(self) -> None:
        while True:
            self._written.wait()
            self._written.clear()
            if not self._closing:
                with self._change:
                    self._change.wait_for(lambda: self._closing, self._every)
            is_last = self._closing  # as it was before: what is written during a seal is not in it
            if is_last:
                self._writer.join()
            try:
                self.seal()
            except CorralError as error:
                self._fail(error)
            except Exception as error:
                self._fail(LogUnwritable(f"{self.directory}: cannot write the tiles ({type(error).__name__})"))
            if is_last:
                return

    def _seal(self) -> tuple[Checkpoint, bool]:
        """Signs for some more entries; returns also whether that is all that there are."""
        with self._sealing:
            if (
                self._failure is not None or self._tiles_lock < 0
            ):  # what a sync that failed has lost, the next one hides
                raise LogUnwritable(str(self._failure or "the log is closed"))
            return self._seal_locked()

    def _seal_locked(self) -> tuple[Checkpoint, bool]:
        with _locked(self._tiles_lock):
            old = self._checkpoints.read()
            begin = old.size // WIDTH * WIDTH
            end = self._durable()
            entries = self._journal.entries(begin, most=min(end - begin, _AT_ONCE))
            size = begin + len(entries)
            if size <= old.size:
                return old, True
            require_signed(self._tiles, begin, old.size, entries)
            self._tiles.extend(begin, entries)
            new = self._checkpoints.advance(old, size)
            self._forget(size)
            return new, size >= end

    def _durable(self) -> int:
        """How many entries there are, of this process and others, that no failure of power takes away."""
        with self._appending, _locked(self._lock):
            self._catch_up()
            end, segment = self._base + self._count, os.dup(self._segment)
        try:
            self._sync(segment)
        finally:
            os.close(segment)
        return end

    def _forget(self, size: int) -> None:
        """Removes files of the journal whose entries are in full tiles, once those are durable."""
        bases = self._journal.segments()
        ends = [base for base in bases[1:] if base <= size]
        if ends:
            try:
                self._tiles.sync(bases[0], ends[-1])
            except OSError:
                distrust(self._journal)
                raise
            self._journal.forget(ends[-1])


@contextmanager
def _locked(fd: int) -> Iterator[None]:
    """Holds a lock against other processes. Raises LogUnwritable where one keeps it for too long."""
    deadline = time.monotonic() + LOCK_TIMEOUT
    pause = 0.0005
    while True:
        try:
            fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
            break
        except OSError as error:
            if error.errno not in (errno.EAGAIN, errno.EINTR):
                raise
        if time.monotonic() > deadline:
            raise LogUnwritable(f"another process has kept the lock of the log for {LOCK_TIMEOUT:.0f} s")
        time.sleep(pause)
        pause = min(pause * 2, 0.02)
    try:
        if not os.fstat(fd).st_nlink:
            raise LogUnwritable("the lock of the log was removed: others may write to the log now")
        yield
    finally:
        fcntl.flock(fd, fcntl.LOCK_UN)
