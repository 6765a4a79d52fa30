"""Whatever applying is stopped by, all of it is done or nothing, and nothing of anybody is lost."""

from __future__ import annotations

import os
import random
import subprocess
from dataclasses import replace
from pathlib import Path

import pytest

from corral.errors import CorralError
from corral.sandbox.apply import applying, journal, swapping
from corral.sandbox.apply.proposing import propose
from corral.sandbox.apply.recovery import recover
from corral.sandbox.apply.swapping import Conflict
from corral.sandbox.apply.undo import undo
from tests.contain.applies import CHANGES, applied, fill, killed_at, look, run

pytestmark = pytest.mark.usefixtures("state")

PYTHON = "/usr/bin/python3"


@pytest.fixture
def workspace(tmp_path: Path) -> Path:
    return fill(tmp_path / "workspace")


def test_a_name_that_is_planted_stops_nothing(workspace: Path) -> None:
    made = applied(propose(run(workspace, "echo x >new")))
    journal.begin(made.id)  # as if it was killed just then
    (workspace / made.staging).mkdir(mode=0o700)
    (workspace / made.staging / "precious").write_text("precious")
    again = (workspace / made.staging).stat()  # with the number that ours had, as it may be
    journal.write(replace(made, identity=(again.st_dev, again.st_ino)))
    recover()
    assert (workspace / made.staging / "precious").exists()
    (workspace / made.staging / "precious").unlink()
    (workspace / made.staging).rmdir()
    (workspace / made.staging).write_text("a file")
    journal.begin(made.id)
    undo(made.id)
    assert (workspace / made.staging).read_text() == "a file"


def test_a_directory_that_was_changed_half_is_taken_back(workspace: Path) -> None:
    """Mode, owner and attributes are set one after another."""
    before = look(workspace)
    layer = run(workspace, f'chmod 700 tree; {PYTHON} -c \'import os; os.setxattr("tree", "user.x", b"y")\'')
    proposal = propose(layer)
    number = 1
    while not killed_at(number, lambda: applied(proposal), ("os.setxattr", "os.chmod", "os.chown", "os.utime")):
        recover()
        for identifier in [each.id for each in journal.journals()]:
            undo(identifier)
        assert look(workspace) == before
        number += 1
    assert look(workspace)["tree"][5] == {"user.x": b"y"}


def test_a_full_disk_leaves_everything_as_it_was(workspace: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from corral import diskspace

    proposal = propose(run(workspace, CHANGES))
    before = look(workspace)
    monkeypatch.setattr(diskspace, "KEEP_BYTES", 1 << 60)
    with pytest.raises(CorralError, match="make room"):
        applied(proposal)
    assert look(workspace) == before


@pytest.mark.timeout(300)
def test_whatever_it_is_killed_at_all_is_applied_or_nothing(workspace: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """At each of its calls to the system; also while that is taken back. What is left then is what was there."""
    monkeypatch.setattr(journal, "FRESH", 0.0)
    before = look(workspace)
    proposal = propose(run(workspace, CHANGES))
    draw = random.Random(20261127)
    seen = set()
    number = 1
    while not killed_at(number, lambda: applied(proposal)):
        for _ in range(draw.choice((0, 0, 1, 2))):
            killed_at(draw.randrange(1, 120), recover)
        recover()
        after = look(workspace)
        done = [each.id for each in journal.journals()]
        assert bool(done) == (after != before), number
        assert not [name for name in after if name.startswith(".corral")], number
        assert [each for each in journal.ids() if each not in done] == []
        assert journal.unfinished() == []
        seen.add(bool(done))
        for identifier in done:
            assert after["new/deep/file"][4] == b"n\n" and "empty" not in after
            undo(identifier)
            assert look(workspace) == before
        number += draw.choice((1, 1, 1, 2, 3))
    assert seen == {True, False}
    assert len(journal.journals()) == 1
    (last,) = journal.journals()
    # And while it is undone.
    after = look(workspace)
    number = 1
    while True:
        ended = killed_at(number, lambda: undo(last.id))
        recover()
        now = look(workspace)
        assert now in (before, after)
        assert [each.id for each in journal.journals()] == ([last.id] if now == after else [])
        if ended or now == before:
            break
        number += draw.choice((1, 2, 3, 5))
    assert look(workspace) == before
    assert not [name for name in os.listdir(workspace) if name.startswith(".corral")]


def test_what_somebody_has_changed_since_it_was_cut_short_is_not_lost(
    workspace: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    proposal = propose(run(workspace, "echo more >>file.txt; rm -r empty; echo x >new"))
    real = swapping.sync
    child = os.fork()
    if child == 0:  # ends when all has changed places
        calls = iter(range(3))
        monkeypatch.setattr(applying, "sync", lambda fd: os._exit(9) if next(calls) == 2 else real(fd))
        applied(proposal)
        os._exit(0)
    assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 9
    (workspace / "file.txt").write_text("precious")
    recover()
    with pytest.raises(CorralError, match=r"somebody has changed file\.txt since"):
        applied(proposal)
    assert (workspace / "file.txt").read_text() == "precious"
    (staging,) = workspace.glob(".corral-*")
    assert b"original\n" in [path.read_bytes() for path in staging.iterdir() if path.is_file()]
    assert (workspace / "empty").is_dir() and not (workspace / "new").exists()
    # Only that workspace is closed until a person has looked; what was there is not lost even without the directory.
    subprocess.run(["rm", "-r", staging], check=True)
    with pytest.raises(CorralError, match="is gone; copies lie in"):
        applied(proposal)
    (identifier,) = journal.ids()
    copies = Path(journal.store()) / identifier / "before"
    assert b"original\n" in [path.read_bytes() for path in copies.iterdir() if path.is_file()]
    journal.forget(identifier)
    with pytest.raises(Conflict):
        applied(proposal)


def test_an_undo_refuses_what_was_changed_since(workspace: Path) -> None:
    made = applied(propose(run(workspace, CHANGES)))
    (workspace / "new" / "mine").write_text("precious")
    before = look(workspace)
    with pytest.raises(Conflict):
        undo(made.id)
    assert look(workspace) == before
    (workspace / "new" / "mine").unlink()
    undo(made.id)
