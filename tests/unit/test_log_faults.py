"""Whatever system call fails: who waits is told, the log takes nothing more, reopens, and has what was promised."""

from __future__ import annotations

import json
import shutil
import subprocess
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from corral.log import writer
from corral.log.writer import Log
from tests.unit.log_child import CRASHED, start
from tests.unit.logs import KEY, checkpoint, copy_log, entry

MEMORY = Path("/dev/shm")


@pytest.fixture
def place(tmp_path: Path) -> Iterator[Path]:
    """In memory where that can be: nothing here depends on what a disk keeps, and a sync of one takes long."""
    if not MEMORY.is_dir():
        yield tmp_path
        return
    with tempfile.TemporaryDirectory(dir=MEMORY) as name:
        yield Path(name)


@pytest.fixture
def shim(tmp_path: Path) -> Path:
    """What lets system calls fail (LD_PRELOAD)."""
    compiler = shutil.which("cc") or shutil.which("gcc")
    assert compiler is not None, "a C compiler is one of Corral's own requirements"
    made = tmp_path / "faults.so"
    source = Path(__file__).parent / "data" / "log_faults.c"
    subprocess.run([compiler, "-shared", "-fPIC", "-Wall", "-Werror", "-o", made, source, "-ldl"], check=True)
    return made


@pytest.fixture
def crashed(place: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A log whose power failed: an entry is incomplete, a tile is missing, and ``checkpoint`` is an older one."""
    monkeypatch.setattr(writer, "_SEGMENT", 2000)
    log = Log(place / "live", KEY, checkpoint_every=3600)
    try:
        for number in range(CRASHED):
            log.append(entry(number)) if number in (299, 599, CRASHED - 1) else log.submit(entry(number))
            if number in (299, 599):
                older = checkpoint(place / "live")
                log.seal()
        made = copy_log(place / "live", place / "crashed")
    finally:
        log.close()
    (made / "checkpoint").write_bytes(older)
    (made / "journal" / "boot").write_text("another one")
    next((made / "tile" / "entries" / "002.p").iterdir()).unlink()
    with max(made.glob("journal/[0-9]*")).open("ab") as file:
        file.write(b"\x00\x20abcd")
    return made


def outcomes(children: list[subprocess.Popen[bytes]]) -> list[dict[str, Any]]:
    told = [child.communicate()[0] for child in children]
    assert [child.returncode for child in children] == [0] * len(children)
    return [json.loads(each) for each in told]


def test_every_system_call_that_can_fail_fails_once_and_for_good(place: Path, shim: Path) -> None:
    """I/O errors and full disks at every call on a file; see ``log_child.faults``."""
    for outcome in outcomes([start("faults", place / str(first), first, 2, preload=shim) for first in range(2)]):
        assert outcome["problems"] == []
        assert outcome["calls"] > 100
        assert outcome["failures"] > 40


def test_every_system_call_may_fail_while_a_crash_is_mended(place: Path, shim: Path, crashed: Path) -> None:
    """A second fault, before the first is mended: what was there is still there, and was signed once only."""
    for outcome in outcomes(
        [start("faults", place / str(first), first, 2, crashed, preload=shim) for first in range(2)]
    ):
        assert outcome["problems"] == []
        assert outcome["calls"] > 100
        assert outcome["failures"] > 40


def test_a_write_that_writes_half_is_gone_on_with(place: Path, shim: Path, crashed: Path) -> None:
    (outcome,) = outcomes([start("short_writes", place / "short", crashed, preload=shim)])
    assert (outcome["problems"], outcome["failures"]) == ([], 0)
    assert outcome["calls"] > 50
