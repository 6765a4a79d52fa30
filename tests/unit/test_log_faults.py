"""Whatever system call fails: who waits is told, the log takes nothing more, reopens, and has what was promised."""

from __future__ import annotations

import json
import shutil
import subprocess
import tempfile
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.unit.log_child import start

MEMORY = Path("/dev/shm")


@pytest.fixture
def place(tmp_path: Path) -> Iterator[Path]:
    """In memory where that can be: nothing here depends on what a disk keeps, and a sync of one takes long."""
    if not MEMORY.is_dir():
        yield tmp_path
        return
    with tempfile.TemporaryDirectory(dir=MEMORY) as name:
        yield Path(name)


def test_every_system_call_that_can_fail_fails_once_and_for_good(place: Path, tmp_path: Path) -> None:
    """I/O errors and full disks at every call that changes a file (LD_PRELOAD); see ``log_child.faults``."""
    compiler = shutil.which("cc") or shutil.which("gcc")
    assert compiler is not None, "a C compiler is one of Corral's own requirements"
    shim = tmp_path / "faults.so"
    source = Path(__file__).parent / "data" / "log_faults.c"
    subprocess.run([compiler, "-shared", "-fPIC", "-Wall", "-Werror", "-o", shim, source, "-ldl"], check=True)
    children = [start("faults", place / str(first), first, 2, preload=shim) for first in range(2)]
    for child in children:
        output, _ = child.communicate()
        assert child.returncode == 0
        outcome = json.loads(output)
        assert outcome["problems"] == []
        assert outcome["calls"] > 100
        assert outcome["failures"] > 40
