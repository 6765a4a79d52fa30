"""A record cannot fill the disk: bounds of the file and of what stays free beside it."""

from __future__ import annotations

import os
from collections.abc import Iterator
from pathlib import Path

import pytest

from corral import diskspace
from corral.actions import Action, Decision, KernelCall, Kind, Origin, Verdict
from corral.monitor import jsonl
from corral.monitor.core import Monitor
from corral.monitor.jsonl import JsonLines, RecordFull, encode, read_records
from corral.monitor.parts import Neutral

ACTION = Action(Kind.KERNEL, KernelCall("mount", 1, ""), Origin("box", "box"))
DECISION = Decision(ACTION, Verdict.DENY, "syscalls", "no", "", "policy", 1, 1.0)


@pytest.fixture
def fd(tmp_path: Path) -> Iterator[int]:
    fd = os.open(tmp_path / "record.jsonl", os.O_WRONLY | os.O_CREAT | os.O_EXCL)
    yield fd
    os.close(fd)


def test_the_line_that_does_not_fit_is_not_begun(tmp_path: Path, fd: int) -> None:
    size = len(encode(DECISION))
    sink = JsonLines(fd, limit=3 * size + size // 2)
    for _ in range(3):
        sink.write(DECISION)
    for _ in range(2):
        with pytest.raises(RecordFull, match=f"{3 * size + size // 2} bytes"):
            sink.write(DECISION)
    assert os.fstat(fd).st_size == 3 * size
    assert len(list(read_records(tmp_path / "record.jsonl"))) == 3


def test_what_was_in_the_file_counts(fd: int) -> None:
    size = len(encode(DECISION))
    os.write(fd, b"x" * size)
    sink = JsonLines(fd, limit=2 * size)
    sink.write(DECISION)
    with pytest.raises(RecordFull):
        sink.write(DECISION)


def test_the_disk_keeps_its_reserve(fd: int, monkeypatch: pytest.MonkeyPatch) -> None:
    size = len(encode(DECISION))
    left = [jsonl.MAX_LINE + 1]  # what others leave, each time that somebody looks
    monkeypatch.setattr(jsonl, "spare_bytes", lambda _: left[0])
    monkeypatch.setattr(jsonl, "_PORTION", jsonl.MAX_LINE)
    sink = JsonLines(fd)
    left[0] = size - 1
    written = 0
    with pytest.raises(RecordFull, match="make room"):
        while written <= jsonl.MAX_LINE:
            sink.write(DECISION)
            written += size
    assert jsonl.MAX_LINE - size < os.fstat(fd).st_size == written <= jsonl.MAX_LINE


def test_a_full_disk_is_told_before_anything_runs(fd: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(diskspace, "KEEP_BYTES", 1 << 60)
    with pytest.raises(RecordFull):
        JsonLines(fd)


def test_spare_is_what_is_beyond_the_larger_reserve(fd: int, monkeypatch: pytest.MonkeyPatch) -> None:
    found = os.fstatvfs(fd)
    free, share = found.f_bavail * found.f_frsize, found.f_blocks * found.f_frsize // diskspace.KEEP_SHARE
    monkeypatch.setattr(os, "fstatvfs", lambda _: found)
    monkeypatch.setattr(diskspace, "KEEP_BYTES", share + 5)
    assert diskspace.spare_bytes(fd) == free - share - 5
    monkeypatch.setattr(diskspace, "KEEP_BYTES", share - 5)
    assert diskspace.spare_bytes(fd) == free - share


def test_a_full_record_ends_the_sandbox_and_says_why(fd: int) -> None:
    ended: list[str] = []
    monitor = Monitor(policy=Neutral(), sink=JsonLines(fd, limit=10), on_kill=ended.append)
    decided: list[Decision] = []
    monitor.submit(ACTION, decided.append)
    assert [one.verdict for one in decided] == [Verdict.KILL]
    assert ended == ["its records cannot be written (the record has reached its 10 bytes)"]
