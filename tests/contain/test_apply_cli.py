"""`corral apply` and `corral undo`, as an operator uses them."""

from __future__ import annotations

import json
import os
import pty
import pwd
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path

import pytest

from corral.actions import Decision, Verdict
from corral.sandbox.apply import journal
from corral.sandbox.apply.proposing import propose
from tests.contain.applies import CHANGES, applied, fill, look, run
from tests.contain.command_line import CommandLine, adopting_orphans
from tests.contain.logs import events

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


def test_an_operator_uses_the_terms_of_the_run_and_other_ways(
    cli: CommandLine, workspace: Path, tmp_path: Path
) -> None:
    other = fill(tmp_path / "other")
    policy, more, log = tmp_path / "policy.yaml", tmp_path / "more.yaml", tmp_path / "records" / "log"
    policy.write_text(f"agent: {{name: fixer}}\nfilesystem: {{write: [{other}]}}\napply: {{ask: [Makefile]}}\n")
    more.write_text("apply: {ask: [tree/**]}\n")
    words = ("--policy", str(policy), "--log", str(log), "--", "sh", "-c")
    done = cli.run(*words, f"echo new >new.txt; touch Makefile tree/new; touch {other}/more")
    assert done.returncode == 0, done
    shown = json.loads(cli("apply", "--dry-run", "--json").stdout)
    marked = {row["path"]: row["reasons"] for row in shown["changes"] if row["reasons"]}
    assert marked == {"Makefile": ["the policy asks for it (Makefile)"]}
    assert shown["others"] == {str(other): 1}
    shown = json.loads(cli("apply", "--dry-run", "--json", "--policy", str(more)).stdout)
    assert [row["path"] for row in shown["changes"] if row["reasons"]] == ["Makefile", "tree/new"]
    # A patch of some of it is for `git apply`, and is no apply.
    (layer,) = (line.split()[0] for line in cli("diff", "--list").stdout.decode().splitlines())
    patch = cli("apply", "--as-patch", layer, "new.txt").stdout
    assert b"+new\n" in patch and b"Makefile" not in patch
    assert cli("apply", "--as-patch", layer).stdout == cli("diff", "--patch", layer).stdout
    assert b"diff --git a/more b/more" in cli("apply", "--as-patch", layer, str(other)).stdout
    # --yes is not for what the policy names.
    assert cli("apply", "--yes").returncode == 125
    done = cli("apply", "--yes", layer, "new.txt", "tree")
    assert done.returncode == 0 and f"1 more in {other}".encode() in done.stderr, done
    assert cli("apply", "--yes", layer, str(other)).returncode == 0
    assert (other / "more").exists() and not (workspace / "Makefile").exists()
    answers = [(each.verdict, each.answered_by.partition(" ")[0]) for each in events(log, Decision)[-3:]]
    me = pwd.getpwuid(os.geteuid()).pw_name
    assert answers == [(Verdict.DENY, "nobody"), (Verdict.ALLOW, me), (Verdict.ALLOW, me)]
    refused = cli("apply", "--as-git-branch", "work", "--yes", layer, "Makefile")
    assert refused.returncode == 125 and b"not the top of a git repository" in refused.stderr


def test_a_person_is_asked_at_the_terminal(cli: CommandLine, workspace: Path) -> None:
    assert cli.run("--", "sh", "-c", "touch Makefile conftest.py").returncode == 0
    for answers, code in ((b"y\nn\n", 125), (b"\n", 125), (b"y\ny\n", 0)):
        own, theirs = pty.openpty()
        try:
            process = cli.start("apply", stdin=theirs, stdout=theirs, stderr=theirs)
            os.close(theirs)
            os.write(own, answers)
            said = b""
            with suppress(OSError):  # EIO: all of it was read
                while piece := os.read(own, 4096):
                    said += piece
            assert process.wait(60) == code, said
        finally:
            os.close(own)
        assert b"Apply 2 changes to" in said
        assert (workspace / "conftest.py").exists() is (code == 0)


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
