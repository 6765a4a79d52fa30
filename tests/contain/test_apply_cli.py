"""`corral apply` and `corral undo`, as an operator uses them."""

from __future__ import annotations

import os
from collections.abc import Iterator
from pathlib import Path

import pytest

from corral.sandbox.apply import journal
from corral.sandbox.apply.proposing import propose
from tests.contain.applies import CHANGES, applied, fill, look, run
from tests.contain.command_line import CommandLine, adopting_orphans

pytestmark = pytest.mark.usefixtures("state")


@pytest.fixture
def workspace(tmp_path: Path) -> Path:
    return fill(tmp_path / "workspace")


@pytest.fixture
def cli(tmp_path: Path, workspace: Path) -> Iterator[CommandLine]:
    (tmp_path / "state").rmdir()
    with adopting_orphans():
        yield CommandLine(tmp_path, workspace)


def test_an_operator_looks_consents_and_takes_back(cli: CommandLine, workspace: Path) -> None:
    before = look(workspace)
    assert cli.run("--", "sh", "-c", "echo new >new.txt; echo 'x' >conftest.py").returncode == 0
    shown = cli("apply", "--dry-run")
    assert shown.returncode == 0, shown
    assert b"+ new.txt" in shown.stdout and b"! Python runs it unasked" in shown.stdout
    consent = next(word for word in shown.stdout.decode().split() if word.startswith("sha256:")).rstrip(":")
    for words in ((), ("--yes",)):
        refused = cli("apply", *words)
        assert (refused.returncode, look(workspace)) == (125, before)
        assert b"--consent" in refused.stderr
    assert cli("apply", "--consent", "sha256:0").returncode == 125
    done = cli("apply", "--consent", consent)
    assert done.returncode == 0, done
    assert (workspace / "new.txt").read_text() == "new\n"
    listed = cli("undo", "--list")
    assert str(workspace).encode() in listed.stdout
    assert cli("undo").returncode == 0
    assert look(workspace) == before
    again = cli("undo")
    assert again.returncode == 125
    assert b"nothing is applied" in again.stderr


def test_an_operator_applies_some_paths_from_where_he_is(cli: CommandLine, workspace: Path) -> None:
    assert cli.run("--", "sh", "-c", "echo 1 >tree/new; echo 2 >other").returncode == 0
    (layer,) = (line.split()[0] for line in cli("diff", "--list").stdout.decode().splitlines())
    done = cli("apply", layer, "new", "--yes", cwd=workspace / "tree")
    assert done.returncode == 0, done
    assert (workspace / "tree" / "new").exists() and not (workspace / "other").exists()


def test_a_conflict_is_told_and_nothing_is_applied(cli: CommandLine, workspace: Path) -> None:
    assert cli.run("--", "sh", "-c", "echo new >new.txt; echo more >>file.txt").returncode == 0
    (workspace / "file.txt").write_text("mine")
    refused = cli("apply", "--yes")
    assert refused.returncode == 1
    assert b"conflict: file.txt: it was changed" in refused.stderr
    assert not (workspace / "new.txt").exists()


def test_names_cannot_draw_on_the_terminal(cli: CommandLine, workspace: Path) -> None:
    assert cli.run("--", "sh", "-c", "touch \"$(printf 'a\\033[2Jb\\nc')\"").returncode == 0
    shown = cli("apply", "--dry-run")
    assert b"\x1b" not in shown.stdout
    assert b"b\nc" not in shown.stdout


def test_the_next_run_takes_back_what_was_cut_short(
    cli: CommandLine, workspace: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    before = look(workspace)
    proposal = propose(run(workspace, CHANGES))
    child = os.fork()
    if child == 0:  # ends when all has changed places
        real = journal.write
        monkeypatch.setattr(journal, "write", lambda each: os._exit(9) if each.phase.value == "done" else real(each))
        applied(proposal)
        os._exit(0)
    assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 9
    assert look(workspace) != before
    assert cli.run("--", "true").returncode == 0
    assert look(workspace) == before
