"""Cut off anywhere, without power, damaged: a log reopens at the last durable record or is refused, without forks."""

from __future__ import annotations

import os
import random
import shutil
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from corral.log import recovery, writer
from corral.log.journal import frame
from corral.log.note import NoteError
from corral.log.reader import Reader
from corral.log.tiles import LogDamaged
from corral.log.writer import Log
from tests.unit.logs import KEY, checkpoint, contents, copy_log, entry, faults, files, make_log

MEMORY = Path("/dev/shm")


@pytest.fixture
def place(tmp_path: Path) -> Iterator[Path]:
    """In memory where that can be: a failure of power is played here by changing files, and a sync takes long."""
    if not MEMORY.is_dir():
        yield tmp_path
        return
    with tempfile.TemporaryDirectory(dir=MEMORY) as name:
        yield Path(name)


@pytest.fixture
def power_fails(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[[], None]:
    """Another boot, as far as the log can see."""

    def fail() -> None:
        (tmp_path / "boot").write_text(f"boot {random.random()}\n")
        monkeypatch.setattr(recovery, "_BOOT", tmp_path / "boot")

    return fail


def crashed(directory: Path, sealed: int, size: int, to: Path) -> Path:
    """A copy of a log as it is when its process is killed: with so many entries, the first of them sealed."""
    log = Log(directory, KEY, checkpoint_every=3600)
    try:
        for number in range(size):
            log.append(entry(number)) if number in (sealed - 1, size - 1) else log.submit(entry(number))
            if number == sealed - 1:
                log.seal()
        return copy_log(directory, to)
    finally:
        log.close()


def goes_on(directory: Path, expected: list[bytes], *earlier: bytes) -> Log:
    """Opens a log again; it has exactly these entries, goes on after them, and continues what was signed."""
    log = Log(directory, KEY, checkpoint_every=3600)
    with log:
        assert contents(directory) == expected
        assert log.append(b"next") == len(expected)
    assert contents(directory) == [*expected, b"next"]
    assert faults(directory, *earlier) == []
    return log


def is_refused(directory: Path, error: type[Exception] | tuple[type[Exception], ...] = LogDamaged) -> None:
    """Opening it signs nothing and appends nothing."""
    before = {path: path.read_bytes() for path in files(directory) if path.name == "checkpoint" or "tile" in path.parts}
    with pytest.raises(error):
        Log(directory, KEY, checkpoint_every=3600)
    for path, content in before.items():
        assert path.read_bytes() == content


# ---- cut off ----


def test_a_journal_that_is_cut_off_anywhere_after_a_failure_of_power(
    place: Path, power_fails: Callable[[], None]
) -> None:
    crash = crashed(place / "log", 6, 12, place / "crash")
    power_fails()
    segment = f"journal/{0:020d}"
    length = (crash / segment).stat().st_size
    frames = [0]
    for number in range(12):
        frames.append(frames[-1] + 6 + len(entry(number)))
    assert frames[-1] == length
    for at in range(length + 1):
        again = copy_log(crash, place / "again")
        os.truncate(again / segment, at)
        whole = max(number for number, end in enumerate(frames) if end <= at)
        log = goes_on(again, [entry(number) for number in range(max(whole, 6))], checkpoint(crash))
        assert log.recovery.dropped == at - frames[whole]
        assert log.recovery.torn
        assert log.recovery.restored == max(0, 6 - whole)
        assert ("bytes of an incomplete entry were cut off" in str(log.recovery)) == (at not in frames)
        assert ("taken from the tiles" in str(log.recovery)) == (whole < 6)
        if at not in frames:
            kept = (again / "journal" / f"dropped-{whole}").read_bytes()
            assert kept == (crash / segment).read_bytes()[frames[whole] : at]


def test_a_journal_that_is_cut_off_without_a_failure_of_power_is_refused(place: Path) -> None:
    """Nothing that a process does when it is killed takes whole entries away: their numbers are not given again."""
    crash = crashed(place / "log", 6, 12, place / "crash")
    segment = f"journal/{0:020d}"
    length = (crash / segment).stat().st_size
    for at in range(0, length, 3):
        again = copy_log(crash, place / "again")
        os.truncate(again / segment, at)
        is_refused(again)
    with (crash / segment).open("ab") as file:  # an entry that was being written
        file.write(b"\0\5abcd1")
    log = goes_on(crash, [entry(number) for number in range(12)])
    assert log.recovery.dropped == 7


@pytest.mark.parametrize("name", ["tile/0/000.p/5", "tile/entries/000.p/5"])
def test_a_partial_tile_that_is_cut_off_anywhere_is_made_again(place: Path, name: str) -> None:
    crash = crashed(place / "log", 5, 12, place / "crash")
    for at in range((crash / name).stat().st_size):
        again = copy_log(crash, place / "again")
        os.truncate(again / name, at)
        log = goes_on(again, [entry(number) for number in range(12)], checkpoint(crash))
        assert log.recovery.rebuilt
        assert str(log.recovery) == "tiles were made again from the journal"


@pytest.mark.parametrize("name", ["checkpoint", "journal/checkpoint"])
def test_of_two_copies_of_the_checkpoint_one_may_be_cut_off_anywhere(place: Path, name: str) -> None:
    crash = crashed(place / "log", 9, 12, place / "crash")
    for at in range((crash / name).stat().st_size):
        again = copy_log(crash, place / "again")
        os.truncate(again / name, at)
        goes_on(again, [entry(number) for number in range(12)], checkpoint(crash))
    (crash / name).unlink()
    goes_on(crash, [entry(number) for number in range(12)])


def test_without_any_checkpoint_nothing_is_signed(place: Path, power_fails: Callable[[], None]) -> None:
    """Also when the journal was cut off too: a log that began anew would sign other trees of the same sizes."""
    crash = crashed(place / "log", 9, 12, place / "crash")
    for at in range((crash / "checkpoint").stat().st_size):
        again = copy_log(crash, place / "again")
        for name in ("checkpoint", "journal/checkpoint"):
            os.truncate(again / name, at)
        is_refused(again, NoteError)
    for name in ("checkpoint", "journal/checkpoint"):
        (crash / name).unlink()
    is_refused(crash)
    power_fails()
    os.truncate(crash / "journal" / f"{0:020d}", 0)
    is_refused(crash)
    (crash / "keys").unlink()
    is_refused(crash)
    shutil.rmtree(crash / "journal")
    is_refused(crash)


def test_a_log_that_was_killed_while_it_was_made_is_made_again(place: Path) -> None:
    """Between any two of the files that come first."""
    make_log(place / "log")
    order = ["journal/lock", "journal/lock.tiles", "keys", "journal/checkpoint", "checkpoint", f"journal/{0:020d}"]
    for kept in range(len(order) + 1):
        again = copy_log(place / "log", place / "again")
        (again / "journal/boot").unlink()
        os.truncate(again / "journal/lock", 0)
        for name in order[kept:]:
            (again / name).unlink()
        goes_on(again, [])


# ---- without power ----


def sealed_to(directory: Path, size: int, *, segment: int, monkeypatch: pytest.MonkeyPatch, more: int = 0) -> None:
    """A log with short files in its journal, sealed to exactly this size at once, and with some more entries."""
    monkeypatch.setattr(writer, "_SEGMENT", segment)
    log = Log(directory, KEY, checkpoint_every=3600)
    for number in range(size + more - 1):
        log.submit(b"%d" % number)
    log.append(b"%d" % (size + more - 1))
    monkeypatch.setattr(writer, "_AT_ONCE", size)
    assert log._seal()[0].size == size
    copy_log(directory, directory.with_name("crash"))
    log.close()


@pytest.mark.parametrize(
    ("size", "more"), [(512, 0), (512, 3), (700, 0), (700, 400), (768, 5), (200, 0), (256, 0), (257, 1)]
)
def test_tiles_that_were_not_synced_may_be_anything_after_a_failure_of_power(
    place: Path, monkeypatch: pytest.MonkeyPatch, power_fails: Callable[[], None], size: int, more: int
) -> None:
    sealed_to(place / "log", size, segment=700, monkeypatch=monkeypatch, more=more)
    crash = place / "crash"
    base = int(min(path.name for path in (crash / "journal").glob("0*")))
    lost = [
        path.relative_to(crash)
        for path in files(crash / "tile")
        if ".p" in path.parent.name or int(path.name) * 256 >= base or "1" in path.parts
    ]
    lost.append(Path("checkpoint"))
    damage: list[Callable[[Path], object]] = [
        lambda path: path.unlink(),
        lambda path: os.truncate(path, 0),
        lambda path: path.write_bytes(bytes(path.stat().st_size)),
        lambda path: path.write_bytes(os.urandom(path.stat().st_size)),
    ]
    expected = [b"%d" % number for number in range(size + more)]
    for harm in damage:
        for names in (lost, *([name] for name in lost)):
            again = copy_log(crash, place / "again")
            for name in names:
                harm(again / name)
            power_fails()
            log = goes_on(again, expected, checkpoint(crash))
            assert log.recovery.rebuilt == (names != [Path("checkpoint")])


def test_tiles_three_levels_high_are_made_again(
    place: Path, monkeypatch: pytest.MonkeyPatch, power_fails: Callable[[], None]
) -> None:
    """The journal begins where the sealed entries end, and level 1 with a full tile."""
    sealed_to(place / "log", 1 << 16, segment=1 << 16, monkeypatch=monkeypatch, more=10)
    crash = place / "crash"
    assert (crash / "tile/2/000.p/1").exists()
    partial = [path for path in files(crash / "tile") if ".p" in path.parent.name]
    for path in partial:
        path.unlink()
    power_fails()
    with Log(crash, KEY, checkpoint_every=3600) as log:
        assert log.recovery.rebuilt
        assert log.append(b"next") == (1 << 16) + 10
    assert faults(crash) == []


def test_without_a_failure_of_power_nothing_is_said_to_be_mended(
    place: Path, power_fails: Callable[[], None], monkeypatch: pytest.MonkeyPatch
) -> None:
    sealed_to(place / "log", 600, segment=700, monkeypatch=monkeypatch, more=30)
    log = goes_on(copy_log(place / "crash", place / "again"), [b"%d" % number for number in range(630)])
    assert not log.recovery
    power_fails()
    log = goes_on(place / "crash", [b"%d" % number for number in range(630)])
    assert not log.recovery, "nor after one that lost nothing"


def test_files_of_the_journal_that_come_back_after_a_failure_of_power_do_no_harm(
    place: Path, power_fails: Callable[[], None], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Their removal is not synced, and may be undone for some of them."""
    monkeypatch.setattr(writer, "_SEGMENT", 700)
    log = Log(place / "log", KEY, checkpoint_every=3600)
    for number in range(999):
        log.submit(entry(number))
    log.append(entry(999))
    before = copy_log(place / "log", place / "before")
    log.seal()
    copy_log(place / "log", place / "crash")
    log.close()
    removed = [
        path.name for path in files(before / "journal") if not (place / "crash" / "journal" / path.name).exists()
    ]
    assert len(removed) == 3
    for come_back in ([0], [1], [2], [0, 1], [0, 2], [1, 2], [0, 1, 2]):
        again = copy_log(place / "crash", place / "again")
        for index in come_back:
            shutil.copy(before / "journal" / removed[index], again / "journal")
        for path in files(again / "tile"):
            if ".p" in path.parent.name:
                path.unlink()
        power_fails()
        goes_on(again, [entry(number) for number in range(1000)], checkpoint(place / "crash"))


def test_what_a_failure_of_power_took_is_not_missed_later(place: Path, power_fails: Callable[[], None]) -> None:
    crash = crashed(place / "log", 6, 12, place / "crash")
    segment = crash / f"journal/{0:020d}"
    power_fails()
    os.truncate(segment, segment.stat().st_size - 20)
    for dropped in (8, 0):
        with Log(crash, KEY, checkpoint_every=3600) as log:
            assert log.recovery.dropped == dropped
    assert segment.stat().st_mode & 0o777 == 0o600
    goes_on(crash, [entry(number) for number in range(10)])


# ---- damaged ----


def unsealed(place: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A log with files of the journal from 0, 256 and 512 on, of which nothing but 300 entries is sealed."""
    monkeypatch.setattr(writer, "_SEGMENT", 700)
    log = Log(place / "log", KEY, checkpoint_every=3600)
    for number in range(299):
        log.submit(entry(number))
    log.append(entry(299))
    monkeypatch.setattr(Log, "_forget", lambda self, size: None)
    log.seal()
    for number in range(300, 599):
        log.submit(entry(number))
    log.append(entry(599))
    copy_log(place / "log", place / "crash")
    log.close()
    return place / "crash"


@pytest.mark.parametrize("boot", ["the same", "another"])
def test_a_journal_with_a_hole_is_refused_before_anything_is_appended(
    place: Path, monkeypatch: pytest.MonkeyPatch, power_fails: Callable[[], None], boot: str
) -> None:
    crash = unsealed(place, monkeypatch)
    if boot == "another":
        power_fails()
    everything = [entry(number) for number in range(600)]
    names = [f"{base:020d}" for base in (0, 256, 512)]
    for missing, refused in (([0], False), ([1], True), ([0, 1], True)):
        again = copy_log(crash, place / "again")
        for index in missing:
            (again / "journal" / names[index]).unlink()
        is_refused(again) if refused else goes_on(again, everything)
    for index, refused in ((0, False), (1, True)):
        again = copy_log(crash, place / "again")
        path = again / "journal" / names[index]
        os.truncate(path, path.stat().st_size - 1)
        is_refused(again) if refused else goes_on(again, everything)
    for name in ("00000000000000000700", "99999999999999999999"):
        again = copy_log(crash, place / "again")
        (again / "journal" / name).write_bytes(b"")
        is_refused(again)


def test_the_last_file_of_the_journal_is_missed(place: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    crash = unsealed(place, monkeypatch)
    (crash / "journal" / f"{512:020d}").unlink()
    is_refused(crash)


def test_a_journal_that_is_gone_is_taken_from_the_tiles_if_all_was_sealed(place: Path) -> None:
    directory = make_log(place / "log", 260, 300)
    before = checkpoint(directory)
    for path in (directory / "journal").glob("0*"):
        path.unlink()
    log = goes_on(directory, [entry(number) for number in range(300)], before)
    assert log.recovery.restored == 300
    shutil.rmtree(directory / "journal")
    goes_on(directory, [*(entry(number) for number in range(300)), b"next"], before)


def test_garbage_in_the_journal_is_refused_if_power_did_not_fail(place: Path, power_fails: Callable[[], None]) -> None:
    """What follows it may have been acknowledged. Only a failure of power leaves this, and then that is said."""
    crash = crashed(place / "log", 4, 10, place / "crash")
    segment = f"journal/{0:020d}"
    content = (crash / segment).read_bytes()
    assert len(content) == 130

    def altered(at: int) -> Path:
        again = copy_log(crash, place / "again")
        (again / segment).write_bytes(content[:at] + bytes([content[at] ^ 1]) + content[at + 1 :])
        return again

    for at in range(0, 130, 5):
        is_refused(altered(at))
    power_fails()
    for at in range(0, 130, 5):
        whole = at // 13
        log = goes_on(altered(at), [entry(number) for number in range(max(whole, 4))], checkpoint(crash))
        assert log.recovery.dropped == 130 - 13 * whole
        assert log.recovery.torn or "after a failure of power or disk" in str(log.recovery)


def test_garbage_after_the_last_entry_is_cut_off_after_a_failure_of_power(
    place: Path, power_fails: Callable[[], None]
) -> None:
    crash = crashed(place / "log", 4, 8, place / "crash")
    power_fails()
    for garbage in (bytes(4096), os.urandom(100_000), b"\0\1"):
        again = copy_log(crash, place / "again")
        with (again / f"journal/{0:020d}").open("ab") as file:
            file.write(garbage)
        log = goes_on(again, [entry(number) for number in range(8)], checkpoint(crash))
        assert log.recovery.dropped == len(garbage)
        assert (again / "journal/dropped-8").read_bytes() == garbage


def test_a_journal_whose_entries_are_not_those_that_were_signed_is_refused(place: Path) -> None:
    """With sums that fit: nothing is made of it, so that the tiles keep what was signed."""
    directory = make_log(place / "log", 10)
    content = b"".join(frame(number, entry(number if number != 7 else 77)) for number in range(10))
    (directory / f"journal/{0:020d}").write_bytes(content)
    is_refused(directory)
    assert faults(directory) == []
    assert Reader(directory).sealed() == 10


def test_the_file_of_the_lock_is_not_needed_to_open_a_log(place: Path) -> None:
    directory = make_log(place / "log", 10)
    for content in (b"", b"\0" * 40, b"words"):
        (directory / "journal/lock").write_bytes(content)
        log = Log(directory, KEY, checkpoint_every=3600)
        assert not log.recovery
        log.close()
    (directory / "journal/lock").unlink()
    goes_on(directory, [entry(number) for number in range(10)])
