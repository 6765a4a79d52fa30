"""Appending: in order, without gaps, durable before it is told, by many at once; nothing after a failure (I2, I3)."""

from __future__ import annotations

import errno
import fcntl
import os
import signal
import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path

import pytest

from corral.errors import CorralError
from corral.log import writer
from corral.log.journal import frame
from corral.log.merkle import EMPTY
from corral.log.note import Checkpoint, NoteError, Signature, Verifier, cosign
from corral.log.reader import Reader
from corral.log.signing import Checkpoints
from corral.log.tiles import MAX_ENTRY, Tiles
from corral.log.writer import Log, LogUnwritable
from tests.unit.log_child import start
from tests.unit.logs import KEY, OTHER_KEY, WITNESS, checkpoint, contents, entry, faults, make_log


@pytest.fixture
def directory(tmp_path: Path) -> Path:
    return tmp_path / "log"


@contextmanager
def held(directory: Path, name: str = "lock") -> Iterator[None]:
    """As if another process held a lock of the log."""
    fd = os.open(directory / "journal" / name, os.O_RDWR | os.O_CLOEXEC)
    try:
        fcntl.flock(fd, fcntl.LOCK_EX)
        yield
    finally:
        os.close(fd)


def until(condition: Callable[[], object]) -> None:
    """Waits for what must come; the time limit of the tests ends it otherwise."""
    while not condition():
        time.sleep(0.002)


class Told:
    """What callbacks were told, by entry."""

    def __init__(self) -> None:
        self.numbers: dict[bytes, list[int]] = {}
        self.errors: dict[bytes, list[CorralError]] = {}

    def submit(self, log: Log, content: bytes) -> None:
        def done(number: int, error: CorralError | None) -> None:
            if error is None:
                self.numbers.setdefault(content, []).append(number)
            else:
                assert number == -1
                self.errors.setdefault(content, []).append(error)

        log.submit(content, done)


# ---- order and numbers ----


def test_numbers_have_no_gaps_and_entries_are_where_they_were_told_to_be(directory: Path) -> None:
    with Log(directory, KEY, checkpoint_every=0.01) as log:

        def append(thread: int) -> list[tuple[int, bytes]]:
            return [(log.append(content), content) for content in (b"%d %d" % (thread, at) for at in range(60))]

        with ThreadPoolExecutor(8) as threads:
            told = [each for some in threads.map(append, range(8)) for each in some]
    assert [number for number, _ in sorted(told)] == list(range(480))
    assert contents(directory) == [content for _, content in sorted(told)]
    assert faults(directory) == []
    for thread in range(8):  # each thread's entries are in its order
        own = [content for _, content in sorted(told) if content.startswith(b"%d " % thread)]
        assert own == [b"%d %d" % (thread, at) for at in range(60)]


def test_what_is_written_while_it_is_sealed_for_the_last_but_one_time_is_sealed_too(directory: Path) -> None:
    log = Log(directory, KEY, checkpoint_every=0.01)
    seal, sealed, go_on = log.seal, threading.Event(), threading.Event()

    def slow() -> Checkpoint:
        checkpoint = seal()
        sealed.set()
        assert go_on.wait(60)
        return checkpoint

    log.seal = slow  # type: ignore[method-assign]
    log.append(b"one")
    assert sealed.wait(60)
    log.append(b"two")
    closing = threading.Thread(target=log.close)
    closing.start()
    closing.join(0.2)
    go_on.set()
    closing.join(60)
    assert Reader(directory).sealed() == 2


def test_several_processes_append_to_one_log(directory: Path) -> None:
    """With files of the journal so small that they are begun and removed all the time."""
    children = [start("append", directory, name, 250, 1500) for name in ("one", "two", "three")]
    told: dict[int, bytes] = {}
    for child in children:
        output, _ = child.communicate()
        assert child.returncode == 0
        for line in output.splitlines()[1:]:
            number, content = line.split(b" ", 1)
            assert int(number) not in told
            told[int(number)] = content
    assert sorted(told) == list(range(len(told)))
    assert contents(directory) == [content for _, content in sorted(told.items())]
    assert Reader(directory).sealed() == len(told)
    assert faults(directory) == []
    assert len(list((directory / "journal").glob("0*"))) < 4, "files of the journal that are in full tiles are removed"


def test_what_waits_at_the_same_time_shares_one_sync(directory: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    syncs: list[str] = []
    real = os.fdatasync

    def count(fd: int) -> None:
        syncs.append(threading.current_thread().name)
        real(fd)

    told = Told()
    with Log(directory, KEY, checkpoint_every=3600) as log:
        monkeypatch.setattr(os, "fdatasync", count)
        with held(directory):
            for number in range(500):
                told.submit(log, entry(number))
        assert log.append(b"last") == 500
        assert syncs.count("corral-log") <= 3
    assert told.numbers == {entry(number): [number] for number in range(500)}


def test_an_entry_is_told_to_be_durable_after_it_was_synced(directory: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    order: list[str] = []
    real = os.fdatasync

    def sync(fd: int) -> None:
        real(fd)
        if threading.current_thread().name == "corral-log":
            order.append(f"synced {os.fstat(fd).st_size}")

    with Log(directory, KEY, checkpoint_every=3600) as log:
        monkeypatch.setattr(os, "fdatasync", sync)
        log.append(b"one")
        order.append("told")
        log.append(b"another")
        order.append("told")
    assert order == ["synced 9", "told", "synced 22", "told"]


def test_an_entry_has_one_byte_at_least_and_as_many_as_a_tile_can_say(directory: Path) -> None:
    with Log(directory, KEY, checkpoint_every=3600) as log:
        for wrong in (b"", bytes(MAX_ENTRY + 1)):
            with pytest.raises(ValueError, match="an entry has"):
                log.submit(wrong)
        assert log.append(bytes(MAX_ENTRY)) == 0
        assert log.append(b"\n\0\xff") == 1
    assert contents(directory) == [bytes(MAX_ENTRY), b"\n\0\xff"]
    assert faults(directory) == []


def test_what_is_not_sealed_yet_is_read_from_the_journal(directory: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(writer, "_SEGMENT", 1000)
    with Log(directory, KEY, checkpoint_every=3600) as log:
        for number in range(600):
            log.submit(entry(number))
        log.append(entry(600))
        assert contents(directory) == [entry(number) for number in range(601)]
        assert log.seal().size == 601
        for number in range(601, 700):
            log.submit(entry(number))
        log.append(entry(700))
        assert contents(directory) == [entry(number) for number in range(701)]
        assert [number for number, _ in Reader(directory).entries(590, 610)] == list(range(590, 610))
        assert Reader(directory).sealed() == 601


def test_a_new_log_is_signed_for_while_it_is_empty(directory: Path) -> None:
    with Log(directory, KEY, checkpoint_every=3600) as log:
        assert log.seal().size == 0
        assert log.seal().root == EMPTY
    assert b"\n0\n" in checkpoint(directory)
    assert faults(directory) == []
    assert (directory / "journal").stat().st_mode & 0o777 == 0o700


# ---- being held up ----


def test_who_brings_more_than_may_wait_is_held_up(directory: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(writer, "MAX_WAITING", 100)
    brought: list[int] = []

    def bring() -> None:
        for number in range(50):
            log.submit(bytes([number]) * 50)
            brought.append(number)

    with Log(directory, KEY, checkpoint_every=3600) as log:
        thread = threading.Thread(target=bring)
        with held(directory):
            thread.start()
            until(lambda: log._bytes > 100)
            # One batch may be on its way; the other entries that wait are those that are just too many.
            assert len(brought) < 50
            assert thread.is_alive()
        thread.join()
    assert contents(directory) == [bytes([number]) * 50 for number in range(50)]


def test_a_lock_that_another_process_keeps_ends_the_log(directory: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    make_log(directory, 3)
    monkeypatch.setattr(writer, "LOCK_TIMEOUT", 0.05)
    log = Log(directory, KEY, checkpoint_every=3600)
    with held(directory):
        with pytest.raises(LogUnwritable, match="has kept the lock"):
            log.append(b"too late")
        with pytest.raises(LogUnwritable, match="has kept the lock"):
            Log(directory, KEY)
    with pytest.raises(LogUnwritable, match="has kept the lock"):
        log.submit(b"after that")
    with pytest.raises(LogUnwritable):
        log.close()
    log = Log(directory, KEY, checkpoint_every=3600)
    with held(directory, "lock.tiles"):
        assert log.append(b"appending needs no tiles") == 3
        with pytest.raises(LogUnwritable, match="has kept the lock"):
            log.seal()
    log.close()
    assert faults(directory) == []


def test_who_waits_is_let_go_when_the_log_fails(directory: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(writer, "MAX_WAITING", 100)
    monkeypatch.setattr(writer, "LOCK_TIMEOUT", 0.05)
    log = Log(directory, KEY, checkpoint_every=3600)
    outcomes: list[str] = []

    def bring() -> None:
        try:
            for _ in range(50):
                log.submit(bytes(50))
        except LogUnwritable as error:
            outcomes.append(str(error))

    threads = [threading.Thread(target=bring) for _ in range(3)]
    with held(directory):
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
    assert len(outcomes) == 3
    assert all("has kept the lock" in outcome for outcome in outcomes)
    with pytest.raises(LogUnwritable):
        log.close()


# ---- closing ----


def test_closing_writes_what_waits_and_signs_for_it(directory: Path) -> None:
    told = Told()
    log = Log(directory, KEY, checkpoint_every=3600)
    with ThreadPoolExecutor(2) as threads:
        with held(directory):
            for number in range(20):
                told.submit(log, entry(number))
            closing = [threads.submit(log.close) for _ in range(2)]
            until(lambda: log._closing)
            with pytest.raises(LogUnwritable, match="the log is closed"):
                log.submit(b"too late")
            assert not any(each.done() for each in closing)
        for each in closing:
            each.result()
    log.close()
    assert told.numbers == {entry(number): [number] for number in range(20)}
    assert Reader(directory).sealed() == 20
    for call in (log.seal, lambda: log.append(b"too late")):
        with pytest.raises(LogUnwritable, match="the log is closed"):
            call()


def test_an_error_of_whoever_is_told_ends_the_log_and_the_others_are_told(directory: Path) -> None:
    def fail(number: int, error: CorralError | None) -> None:
        raise RuntimeError("a secret")

    told = Told()
    log = Log(directory, KEY, checkpoint_every=3600)
    with held(directory):
        told.submit(log, b"one")
        log.submit(b"two", fail)
        told.submit(log, b"three")
    until(lambda: b"three" in told.numbers)
    until(lambda: log.failure)
    assert "RuntimeError" in str(log.failure)
    assert "a secret" not in str(log.failure)
    with pytest.raises(LogUnwritable):
        log.append(b"four")
    with pytest.raises(LogUnwritable):
        log.close()
    assert told.numbers == {b"one": [0], b"three": [2]}


def test_a_fork_cannot_write_to_the_log_of_its_parent(directory: Path) -> None:
    with Log(directory, KEY, checkpoint_every=3600) as log:
        child = os.fork()
        if not child:
            signal.alarm(30)  # a log that waits for a thread that is not there would wait for ever
            try:
                log.append(b"of the child")
            except LogUnwritable:
                os._exit(7)
            os._exit(0)
        assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 7
        assert log.append(b"of the parent") == 0


# ---- failures ----


def test_a_full_disk_ends_the_log_before_it_is_full(directory: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    make_log(directory, 3)
    spare = [100]
    monkeypatch.setattr(writer, "spare_bytes", lambda fd: spare[0])
    told = Told()
    log = Log(directory, KEY, checkpoint_every=3600)
    assert log.append(bytes(50)) == 3
    spare[0] = 20
    with held(directory):
        told.submit(log, bytes(40))
        told.submit(log, bytes(41))
    with pytest.raises(LogUnwritable, match="less than 1 GiB or 5 % free; make room"):
        log.append(bytes(60))
    assert {content: len(errors) for content, errors in told.errors.items()} == {bytes(40): 1, bytes(41): 1}
    with pytest.raises(LogUnwritable, match="make room"):
        log.submit(b"x")
    with pytest.raises(LogUnwritable, match="make room"):
        log.close()
    spare[0] = 1 << 30
    with Log(directory, KEY, checkpoint_every=3600) as log:
        assert log.append(b"again") == 4
    assert contents(directory) == [*map(entry, range(3)), bytes(50), b"again"]
    assert faults(directory) == []


def test_a_process_whose_write_failed_takes_nothing_from_the_others(
    directory: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    one = Log(directory, KEY, checkpoint_every=3600)
    other = Log(directory, KEY, checkpoint_every=3600)
    real = os.write

    def fail(fd: int, data: bytes) -> int:
        real(fd, data[: len(data) // 2])
        raise OSError(errno.EIO, os.strerror(errno.EIO))

    assert one.append(b"one") == 0
    monkeypatch.setattr(os, "write", fail)
    with pytest.raises(LogUnwritable, match="Input/output error"):
        one.append(b"lost " * 20)
    monkeypatch.undo()
    for number in range(1, 50):
        assert other.append(entry(number)) == number
    with pytest.raises(LogUnwritable, match="Input/output error"):
        one.seal()
    with pytest.raises(LogUnwritable, match="Input/output error"):
        one.close()
    assert other.append(b"last") == 50
    other.close()
    assert contents(directory) == [b"one", *map(entry, range(1, 50)), b"last"]
    assert faults(directory) == []


def test_after_a_sync_that_failed_the_next_to_open_the_log_trusts_nothing(
    directory: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The kernel tells of a page that it could not write only once, and then takes it for written."""
    make_log(directory, 3)
    log = Log(directory, KEY, checkpoint_every=3600)
    segment = directory / "journal" / f"{0:020d}"

    def fail(fd: int) -> None:
        raise OSError(errno.EIO, os.strerror(errno.EIO))

    before = segment.stat().st_ino
    monkeypatch.setattr(os, "fdatasync", fail)
    with pytest.raises(LogUnwritable):
        log.append(b"perhaps lost")
    monkeypatch.undo()
    with pytest.raises(LogUnwritable):
        log.close()
    assert Reader(directory).sealed() == 3, "what may be lost is not signed for"
    with Log(directory, KEY, checkpoint_every=3600) as log:
        assert segment.stat().st_ino != before, "it was written anew"
        assert log.append(b"again") == 4
    assert contents(directory) == [*map(entry, range(3)), b"perhaps lost", b"again"]
    assert faults(directory) == []


def test_what_cannot_be_opened_is_refused(directory: Path, tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(LogUnwritable, match="cannot open the log"):
        Log(tmp_path / "file" / "log", KEY)
    with pytest.raises(NoteError, match="type"):
        Log(directory, WITNESS)
    make_log(directory, 3)
    with pytest.raises(NoteError, match="another key"):
        Log(directory, OTHER_KEY)
    (directory / "keys").unlink()
    with pytest.raises(NoteError, match="keys: it is missing"):
        Log(directory, KEY)
    assert Tiles(directory).entries(0, 3) == list(map(entry, range(3)))


# ---- others who are at the files ----


def test_a_lock_that_was_removed_ends_the_log(directory: Path) -> None:
    log = Log(directory, KEY, checkpoint_every=3600)
    assert log.append(b"one") == 0
    (directory / "journal" / "lock").unlink()
    with Log(directory, KEY, checkpoint_every=3600) as other:
        assert other.append(b"another") == 1
        with pytest.raises(LogUnwritable, match="lock of the log was removed"):
            log.append(b"two")
    with pytest.raises(LogUnwritable):
        log.close()
    assert contents(directory) == [b"one", b"another"]


@pytest.mark.parametrize("how", ["cut off", "removed", "replaced", "written to", "begun again", "emptied lock"])
def test_a_journal_that_somebody_changes_ends_the_log(directory: Path, how: str) -> None:
    log = Log(directory, KEY, checkpoint_every=3600)
    log.append(b"one")
    log.append(b"two")
    path = directory / "journal" / f"{0:020d}"
    if how == "cut off":
        os.truncate(path, 9)
    elif how == "removed":
        path.unlink()
    elif how == "replaced":
        content = path.read_bytes()
        path.unlink()
        path.write_bytes(content)
    elif how == "written to":
        with path.open("ab") as file:
            file.write(b"\0\3abcdxyz")
    elif how == "begun again":
        log._base = 256
    else:
        os.truncate(directory / "journal" / "lock", 0)
    with pytest.raises(LogUnwritable):
        log.append(b"three")
    with pytest.raises(LogUnwritable):
        log.close()


def test_a_writer_that_was_killed_while_it_began_a_file_stops_nobody(
    directory: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(writer, "_SEGMENT", 100)
    with Log(directory, KEY, checkpoint_every=3600) as log:
        for number in range(255):
            log.submit(entry(number))
        assert log.append(entry(255)) == 255
        (directory / "journal" / f"{256:020d}").touch()
        assert log.append(entry(256)) == 256
    assert contents(directory) == list(map(entry, range(257)))
    assert faults(directory) == []


def test_a_file_that_is_there_already_and_not_empty_is_not_gone_on_with(
    directory: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(writer, "_SEGMENT", 100)
    log = Log(directory, KEY, checkpoint_every=3600)
    for number in range(255):
        log.submit(entry(number))
    assert log.append(entry(255)) == 255
    (directory / "journal" / f"{256:020d}").write_bytes(frame(256, b"not of this log"))
    with pytest.raises(LogUnwritable, match="entry 256 was altered"):
        log.append(entry(256))
    with pytest.raises(LogUnwritable):
        log.close()


# ---- what is signed ----


def test_a_key_that_was_replaced_signs_no_more(directory: Path) -> None:
    log = Log(directory, KEY, checkpoint_every=3600)
    log.append(b"one")
    log.seal()
    Checkpoints(directory, KEY, Tiles(directory)).rotate(OTHER_KEY)
    log.append(b"two")
    with pytest.raises(NoteError, match="another key"):
        log.seal()
    with pytest.raises(LogUnwritable, match="another key"):
        log.close()
    with Log(directory, OTHER_KEY, checkpoint_every=3600) as again:
        assert again.append(b"three") == 2
    assert [each for _, each in Reader(directory).entries()] == [b"one", b"two", b"three"]


class Broken:
    """A device that signs something else."""

    verifier: Verifier = KEY.verifier

    def sign(self, message: bytes) -> bytes:
        return KEY.sign(message + b"x")


def test_a_signature_that_is_wrong_is_not_written(directory: Path) -> None:
    make_log(directory, 3)
    before = checkpoint(directory)
    log = Log(directory, Broken(), checkpoint_every=3600)
    log.append(b"one")
    with pytest.raises(NoteError, match="not valid"):
        log.seal()
    with pytest.raises(LogUnwritable):
        log.close()
    assert checkpoint(directory) == before
    with Log(directory, KEY, checkpoint_every=3600) as log:
        assert log.append(b"two") == 4


def test_cosignatures_cannot_take_away_the_signature_of_the_log(directory: Path) -> None:
    make_log(directory, 3)
    before = checkpoint(directory)
    checkpoints = Checkpoints(directory, KEY, Tiles(directory))
    text = checkpoints.read().text()
    for wrong in (
        (Signature(KEY.verifier.name, KEY.verifier.identifier, bytes(64)),),
        tuple(Signature(f"witness{number}", bytes(4), bytes(64)) for number in range(200)),
    ):
        with pytest.raises(NoteError):
            checkpoints.add(3, wrong)
    checkpoints.add(2, (cosign(text, WITNESS),))
    assert checkpoint(directory) == before, "there is a newer one"
    checkpoints.add(3, (cosign(text, WITNESS, at=5),))
    checkpoints.add(3, (cosign(text, WITNESS, at=6),))
    assert checkpoint(directory) == before + cosign(text, WITNESS, at=6).line().encode()
    with Log(directory, KEY, checkpoint_every=3600) as log:
        assert log.seal().size == 3
