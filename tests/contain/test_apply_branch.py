"""`corral apply --as-git-branch`: a commit with what was shown; nothing in the workspace changes, and nothing runs."""

from __future__ import annotations

import os
import subprocess
from pathlib import Path
from typing import Any

import pytest

from corral.actions import Decision, Verb
from corral.errors import CorralError, RequestError
from corral.log import writer
from corral.log.events import ApplyEnded, Outcome
from corral.log.places import open_log
from corral.sandbox.apply import branch as branches
from corral.sandbox.apply import recording
from corral.sandbox.apply.branch import Branch
from corral.sandbox.apply.proposal import Proposal
from corral.sandbox.apply.proposing import propose
from corral.sandbox.layer import KeptLayer
from tests.contain.applies import CHANGES, fill, look, run
from tests.contain.logs import events, verified

pytestmark = pytest.mark.usefixtures("state")


@pytest.fixture
def workspace(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A repository, of somebody who has a configuration."""
    monkeypatch.setenv("HOME", str(tmp_path))
    for name in [name for name in os.environ if name.startswith("GIT_")]:
        monkeypatch.delenv(name)
    (tmp_path / ".gitconfig").write_text("[user]\n name = A Person\n email = person@example.org\n")
    place = fill(tmp_path / "workspace")
    git(place, "init", "-q", "-b", "main")
    git(place, "add", "-A")
    git(place, "commit", "-q", "-m", "first")
    return place


def git(place: Path, *words: str) -> str:
    done = subprocess.run(["git", *words], cwd=place, check=True, capture_output=True, timeout=60)
    return done.stdout.decode("utf-8", "surrogateescape").strip("\n")


def committed(layer: KeptLayer, name: str = "agent/work", *paths: str) -> str:
    proposal = propose(layer, paths)
    return Branch(proposal, name).commit(proposal.hash)


def status(place: Path) -> tuple[object, ...]:
    """All that must not change: files, index, what is checked out."""
    refs = git(place, "symbolic-ref", "HEAD"), git(place, "rev-parse", "HEAD")
    tree = {name: row for name, row in look(place).items() if not name.startswith(".git")}
    return tree, (place / ".git" / "index").read_bytes(), refs, git(place, "status", "--porcelain")


def test_a_branch_has_what_was_shown_and_nothing_else_changes(workspace: Path) -> None:
    (workspace / "file.txt").write_text("mine, not committed\n")
    before = status(workspace)
    # A name that needs quoting, and one that is no text.
    odd = 'printf odd >"$(printf \'a "b\\n\\\\c\')"; printf raw >"$(printf \'\\377\')"; chmod 755 tree/one'
    layer = run(workspace, CHANGES + odd)
    commit = committed(layer)
    assert status(workspace) == before
    assert git(workspace, "rev-parse", "agent/work") == commit
    assert git(workspace, "rev-parse", "agent/work^") == git(workspace, "rev-parse", "main")
    assert git(workspace, "log", "-1", "--format=%an <%ae>", commit) == "A Person <person@example.org>"
    changed = git(workspace, "diff-tree", "-r", "-z", "--name-status", "--no-renames", "main", commit).split("\0")
    assert sorted(zip(changed[1::2], changed[0::2], strict=False)) == [
        ('a "b\n\\c', "A"),
        ("file.txt", "M"),
        ("link", "M"),
        ("new/deep/file", "A"),
        ("new/link", "A"),
        ("run.sh", "M"),
        ("tree/below", "A"),
        ("tree/below/two", "D"),
        ("tree/one", "M"),
        ("\udcff", "A"),
    ]
    assert git(workspace, "show", f"{commit}:file.txt") == "mine, not committed\nmore"
    assert git(workspace, "show", f"{commit}:link") == "run.sh"
    assert git(workspace, "show", f'{commit}:a "b\n\\c') == "odd"
    listed = [line.partition("\t") for line in git(workspace, "ls-tree", "-r", commit).splitlines()]
    modes = {name: about.split()[0] for about, _, name in listed}
    assert (modes["run.sh"], modes["tree/one"], modes["link"]) == ("100644", "100755", "120000")
    assert git(workspace, "for-each-ref", "refs/corral") == ""
    git(workspace, "fsck", "--strict")
    # Some paths alone.
    committed(layer, "part", "new/deep")
    assert git(workspace, "diff-tree", "-r", "--name-only", "main", "part") == "new/deep/file"


def test_nothing_of_the_repository_or_the_layer_is_run(workspace: Path, tmp_path: Path) -> None:
    """Vector: hooks and filters, planted by the layer or there already."""
    ran = tmp_path / "ran"
    command = f"sh -c 'echo x >>{ran}; cat'"
    for hook in ("reference-transaction", "post-commit", "pre-commit", "post-index-change", "post-checkout"):
        path = workspace / ".git" / "hooks" / hook
        path.write_text(f"#!/bin/sh\necho hook >>{ran}\n")
        path.chmod(0o755)
    for name in ("filter.evil.clean", "filter.evil.smudge", "core.fsmonitor", "core.sshCommand", "diff.evil.textconv"):
        git(workspace, "config", name, command)
    script = f"""
        printf '* filter=evil diff=evil\\n' >.gitattributes; printf 'text\\r\\n' >file.txt
        printf '[core]\\n fsmonitor = {ran}\\n' >.gitconfig
    """
    commit = committed(run(workspace, script))
    assert not ran.exists()
    raw = subprocess.run(
        ["git", "cat-file", "blob", f"{commit}:file.txt"], cwd=workspace, capture_output=True, check=True
    )
    assert raw.stdout == b"text\r\n"


@pytest.mark.parametrize(
    "path", [".git/hooks/post-commit", ".git/config", "sub/.GIT/config", "git~1/x", ".g\u200cit/x", ".git ./x"]
)
def test_what_belongs_to_git_is_in_no_commit(workspace: Path, path: str) -> None:
    layer = run(workspace, f"mkdir -p '{os.path.dirname(path)}'; echo x >'{path}'; echo x >other")
    before = status(workspace)
    with pytest.raises(RequestError, match="belongs to git itself"):
        committed(layer)
    committed(layer, "other", "other")
    assert status(workspace) == before


def test_a_branch_that_is_there_stays(workspace: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    git(workspace, "branch", "taken")
    layer = run(workspace, CHANGES)
    for name, why in (
        ("taken", "there is a branch"),
        ("main", "there is a branch"),
        ("a..b", "not the name of a branch"),
        ("-d", "not the name of a branch"),
        ("../../x", "not the name of a branch"),
    ):
        with pytest.raises(RequestError, match=why):
            committed(layer, name)
    with pytest.raises(CorralError, match="update-ref failed"):
        committed(layer, "taken/below")
    # One that comes while it is made is not replaced.
    proposal = propose(layer)
    branch = Branch(proposal, "late")
    git(workspace, "branch", "late")
    with pytest.raises(CorralError, match="update-ref failed"):
        branch.commit(proposal.hash)
    assert git(workspace, "rev-parse", "late", "taken") == "\n".join([git(workspace, "rev-parse", "main")] * 2)
    assert git(workspace, "for-each-ref", "refs/corral") == ""


def test_it_is_decided_and_recorded_as_any_apply(
    workspace: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    place = tmp_path / "records" / "log"
    with open_log(place) as log:
        layer = run(workspace, CHANGES, log=log)
    with pytest.raises(RequestError, match="for another proposal"):
        Branch(propose(layer), "one").commit("sha256:0")
    commit = committed(layer, "two")
    # What has changed since it was shown is not committed.
    proposal = propose(layer)
    branch = Branch(proposal, "three")

    def late(*words: Any, **more: Any) -> Proposal:
        (workspace / "new").mkdir()
        return propose(*words, **more)

    monkeypatch.setattr(branches, "propose", late)
    with pytest.raises(CorralError, match="something has changed meanwhile"):
        branch.commit(proposal.hash)
    assert git(workspace, "for-each-ref", "--format=%(refname:short)", "refs/heads") == "main\ntwo"
    ended = events(place, ApplyEnded)
    assert [(each.outcome, each.apply) for each in ended] == [(Outcome.COMMITTED, commit), (Outcome.ROLLED_BACK, "")]
    # Nor is one made that is not decided in a record; what came of it may be missing, and that is said.
    with monkeypatch.context() as patches:
        patches.setattr(branches, "propose", propose)
        patches.setattr(recording.Chronicle, "ended", unwritable)
        with pytest.raises(CorralError, match=r"refs/heads/four is made .* cannot be recorded: full"):
            committed(layer, "four")
        patches.setattr(writer, "spare_bytes", lambda fd: 0)
        with pytest.raises(CorralError, match=r"not applied|make room"):
            committed(layer, "five")
    assert git(workspace, "for-each-ref", "--format=%(refname:short)", "refs/heads") == "four\nmain\ntwo"
    subjects = [each.action.subject for each in events(place, Decision)]
    targets = [each.target for each in subjects if isinstance(each, Verb)]
    assert targets == [f"refs/heads/{name}" for name in ("one", "two", "three", "four")]
    verified(place)


def unwritable(*words: object) -> None:
    raise writer.LogUnwritable("full")


def test_where_there_is_nothing_to_commit_to(workspace: Path, tmp_path: Path) -> None:
    empty = run(workspace, "mkdir only; chmod 700 tree; mkdir untracked 2>/dev/null || true")
    with pytest.raises(RequestError, match="keeps nothing of these changes"):
        committed(empty)
    # A workspace below the top of one, and one without.
    (workspace / "sub").mkdir()
    for place in (workspace / "sub", fill(tmp_path / "plain")):
        with pytest.raises(RequestError, match="not the top of a git repository"):
            committed(run(place, "touch new"))
    # One that has no commit yet.
    fresh = fill(tmp_path / "fresh")
    git(fresh, "init", "-q", "-b", "main")
    layer = run(fresh, "touch new")
    with pytest.raises(RequestError, match="is checked out"):
        committed(layer, "main")
    commit = committed(layer)
    assert git(fresh, "ls-tree", "-r", "--name-only", commit) == "new"
    # And what lies in a submodule.
    git(workspace, "-c", "protocol.file.allow=always", "submodule", "--quiet", "add", str(workspace), "module")
    git(workspace, "commit", "-q", "-m", "module")
    with pytest.raises(RequestError, match="it lies in a submodule"):
        committed(run(workspace, "touch module/new"))


@pytest.mark.root
def test_as_root_what_is_written_belongs_to_the_owner(tmp_path: Path, workspace: Path) -> None:
    for path in (tmp_path, tmp_path / ".gitconfig", workspace, *workspace.rglob("*")):
        os.chown(path, 4711, 4711, follow_symlinks=False)
    with open(workspace / ".git" / "config", "a") as file:
        file.write("[user]\n name = Owner\n email = owner@example.org\n")
    above = {each: each.stat().st_mode for each in (tmp_path.parent, tmp_path.parent.parent)}
    try:
        for each in above:  # pytest's own places, which it closes to others
            each.chmod(above[each] | 0o011)
        commit = committed(run(workspace, CHANGES))
    finally:
        for each in above:
            each.chmod(above[each])
    assert {each.lstat().st_uid for each in (workspace / ".git").rglob("*")} == {4711}

    os.chown(workspace, 0, 0)
    os.chown(workspace / ".git", 0, 0)
    assert git(workspace, "log", "-1", "--format=%an", commit) == "Owner"
