"""Applying what a run has changed, and taking it back: exactly what was shown, all of it or nothing."""

from __future__ import annotations

import hashlib
import json
import os
import stat
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from corral.errors import RequestError
from corral.sandbox.apply import applying, journal, swapping
from corral.sandbox.apply.proposing import propose
from corral.sandbox.apply.swapping import Conflict
from corral.sandbox.apply.undo import undo
from corral.sandbox.sync import SyncSandbox
from tests.contain.applies import CHANGES, applied, fill, look, run

pytestmark = pytest.mark.usefixtures("state")

PYTHON = "/usr/bin/python3"


@pytest.fixture
def workspace(tmp_path: Path) -> Path:
    return fill(tmp_path / "workspace")


def test_what_a_run_has_changed_becomes_real_and_is_taken_back(workspace: Path) -> None:
    before = look(workspace)
    layer = run(workspace, CHANGES)
    assert look(workspace) == before
    proposal = propose(layer)
    assert (proposal.conflicts, proposal.left_out) == ((), ())
    made = applied(proposal)
    after = look(workspace)
    assert after["file.txt"][4] == b"original\nmore\n"
    assert after["new/deep/file"][4] == b"n\n"
    assert (after["tree/below"][4], after["tree"][1], after["run.sh"][1]) == (b"file\n", 0o700, 0o644)
    assert after["link"][4] == "run.sh"
    assert "empty" not in after
    assert {row[2:4] for row in after.values()} == {row[2:4] for row in before.values()}
    # Once more changes nothing.
    assert [step.path for step in propose(layer).steps] == []
    undo(made.id)
    assert look(workspace) == before
    with pytest.raises(RequestError, match="nothing of that id"):
        undo(made.id)
    assert not journal.ids()


def test_nothing_is_left_beside_the_files(workspace: Path, state: Path) -> None:
    made = applied(propose(run(workspace, "echo x >new")))
    assert sorted(os.listdir(workspace)) == ["empty", "file.txt", "link", "new", "run.sh", "tree"]
    undo(made.id)
    assert [each.name for each in (state / "corral" / "applies").iterdir() if each.is_dir()] == []


def test_some_paths_are_applied_alone(workspace: Path) -> None:
    layer = run(workspace, CHANGES)
    proposal = propose(layer, ["new/deep", "run.sh"])
    applied(proposal)
    after = look(workspace)
    assert "new/deep/file" in after and "new/link" not in after
    assert after["run.sh"][1] == 0o644 and after["file.txt"][4] == b"original\n"
    applied(propose(layer))
    assert "new/link" in look(workspace) and look(workspace)["file.txt"][4] == b"original\nmore\n"
    with pytest.raises(RequestError, match="changes nothing there"):
        propose(layer, ["tree/one"])
    with pytest.raises(RequestError, match="not in the workspace"):
        propose(layer, ["../elsewhere"])


def test_what_must_be_looked_at_is_named(workspace: Path) -> None:
    script = """
        mkdir -p .git/hooks .git/objects/ab sub/.vscode bare
        touch .git/hooks/pre-commit .git/config .git/objects/ab/0123 .git/HEAD sub/.vscode/tasks.json sub/conftest.py
        touch .envrc x.pth FILE.txt ordinary.py Makefile bare/HEAD bare/config
        printf x >"$(printf 'a\\342\\200\\256b')"
        ln -s /etc/passwd out; ln -s ../../x away; ln -s file.txt in
    """
    proposal = propose(run(workspace, script))
    risky = {entry.path: entry.reasons for entry in proposal.risky}
    expected = [".git/config", ".git/hooks/pre-commit", "sub/.vscode/tasks.json", "sub/conftest.py", ".envrc", "x.pth"]
    assert sorted(risky) == sorted([*expected, "FILE.txt", "bare/config", "bare/HEAD", "a\u202eb", "out", "away"])


MEANWHILE: dict[str, tuple[Callable[[Path], object], str]] = {
    "content": (lambda place: (place / "file.txt").write_text("mine"), "file.txt: it was changed"),
    "mode": (lambda place: (place / "file.txt").chmod(0o600), "file.txt: it was changed"),
    "in a tree": (lambda place: (place / "tree/below/mine").write_text("mine"), "tree/below: it was changed"),
    "mode in a tree": (lambda place: (place / "tree/below/two").chmod(0o600), "tree/below/two: it was changed"),
    "appeared": (lambda place: (place / "new").write_text("mine"), "new: it"),
    "directory's mode": (lambda place: (place / "tree").chmod(0o750), "tree: it was changed"),
    # Of what is gone before the layer is kept, nothing is known: what the run made of it comes back.
    "removed": (lambda place: (place / "file.txt").unlink(), "file.txt: it was removed"),
    "directory moved": (lambda place: (place / "tree").rename(place / "moved"), "tree: it was removed"),
}


@pytest.mark.parametrize(
    ("name", "when"),
    [*((name, "after it") for name in MEANWHILE), *((name, "during the run") for name in list(MEANWHILE)[:-2])],
)
def test_what_somebody_else_has_changed_since_is_not_replaced(workspace: Path, name: str, when: str) -> None:
    meanwhile, what = MEANWHILE[name]
    with SyncSandbox(str(workspace), keep=True) as box:
        assert box.exec(["sh", "-ec", CHANGES]).exit_code == 0
        if when == "during the run":
            meanwhile(workspace)
    if when == "after it":
        meanwhile(workspace)
    assert box.kept is not None
    before = look(workspace)
    proposal = propose(box.kept)
    assert any(each.startswith(what) for each in proposal.conflicts), proposal.conflicts
    with pytest.raises(Conflict):
        applied(proposal)
    assert look(workspace) == before


@pytest.mark.parametrize(
    "meanwhile",
    [
        lambda place: (place / "file.txt").write_text("mine"),
        lambda place: (place / "file.txt").unlink(),
        lambda place: (place / "new").write_text("mine"),
        lambda place: (place / "tree/below/mine").write_text("mine"),
        lambda place: (place / "tree").chmod(0o750),
        lambda place: ((place / "tree").rename(place / "moved"), (place / "tree").symlink_to(place / "moved")),
        lambda place: ((place / "tree").rename(place / "moved"), (place / "tree").write_text("mine")),
    ],
)
def test_what_is_applied_is_what_was_shown_or_nothing(workspace: Path, meanwhile: Callable[[Path], object]) -> None:
    proposal = propose(run(workspace, CHANGES))
    meanwhile(workspace)
    before = look(workspace)
    with pytest.raises(Conflict):
        applied(proposal)
    assert look(workspace) == before
    assert not journal.ids()


def test_what_is_changed_when_all_is_prepared_is_found_too(workspace: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """By what comes out when it changes places."""
    proposal = propose(run(workspace, CHANGES))
    real, before = swapping.sync, look(workspace)

    def change(fd: int) -> None:
        real(fd)
        (workspace / "file.txt").write_text("mine")

    monkeypatch.setattr(applying, "sync", change)
    with pytest.raises(Conflict, match=r"file\.txt: it was changed meanwhile"):
        applied(proposal)
    assert (workspace / "file.txt").read_text() == "mine"
    (workspace / "file.txt").write_text("original\n")
    assert look(workspace) == before


def test_what_is_put_into_a_directory_after_it_was_moved_aside_is_not_lost(
    workspace: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    proposal = propose(run(workspace, "rm -r empty; echo more >>file.txt"))
    real, inside = swapping.exchange, os.open(workspace / "empty", os.O_RDONLY | os.O_DIRECTORY)

    def late(step: journal.Step, *rest: Any) -> None:
        if step.path == "file.txt" and "precious" not in os.listdir(inside):
            os.close(os.open("precious", os.O_CREAT | os.O_WRONLY, dir_fd=inside))
        real(step, *rest)

    monkeypatch.setattr(applying, "exchange", late)
    try:
        with pytest.raises(Conflict, match="empty: it was changed meanwhile"):
            applied(proposal)
    finally:
        os.close(inside)
    assert os.listdir(workspace / "empty") == ["precious"]
    assert (workspace / "file.txt").read_text() == "original\n"


def test_a_consent_is_for_one_proposal(workspace: Path) -> None:
    layer = run(workspace, CHANGES)
    shown = propose(layer).hash
    (workspace / "file.txt").chmod(0o600)
    with pytest.raises(RequestError, match="another proposal"):
        propose(layer).apply(shown)
    with pytest.raises(RequestError, match="another proposal"):
        propose(layer, ["new"]).apply(shown)


# ---- whatever a run does ----

NAMES = st.sampled_from(["a", "b", "dir/c", "dir/d", "dir", "other", "other/e", "x" * 255, "dir/sub/f", "dir/sub"])
OPERATIONS = st.lists(
    st.one_of(
        st.tuples(st.just("write"), NAMES, st.sampled_from(["", "text", "other text", "much"])),
        st.tuples(st.just("append"), NAMES, st.just("more")),
        st.tuples(st.just("truncate"), NAMES, st.sampled_from(["0", "3", "100000"])),
        st.tuples(st.sampled_from(["mkdir", "remove", "rmtree"]), NAMES, st.just("")),
        st.tuples(st.sampled_from(["rename", "link", "symlink"]), NAMES, NAMES),
        st.tuples(st.just("chmod"), NAMES, st.sampled_from(["700", "755", "644", "600"])),
        st.tuples(st.just("setxattr"), NAMES, st.sampled_from(["v", "w"])),
        st.tuples(st.just("sparse"), NAMES, st.just("")),
    ),
    min_size=1,
    max_size=25,
)
DO = """
import hashlib, json, os, shutil, sys
def xattr(path):
    try: return os.getxattr(path, "user.note").decode()
    except OSError: return None
os.umask(0o022)
os.chdir(sys.argv[1])
for what, name, more in eval(sys.argv[2]):
    try:
        if what == "write": open(name, "w").write("z" * 70_000 if more == "much" else more)
        elif what == "append": open(name, "a").write(more)
        elif what == "truncate": os.truncate(name, int(more))
        elif what == "mkdir": os.mkdir(name)
        elif what == "remove": os.unlink(name)
        elif what == "rmtree": shutil.rmtree(name)
        elif what == "rename": os.rename(name, more)
        elif what == "link": os.link(name, more)
        elif what == "symlink": os.symlink(name, more)
        elif what == "chmod": os.chmod(name, int(more, 8) | 0o700 * os.path.isdir(name))
        elif what == "setxattr": os.setxattr(name, "user.note", more.encode())
        elif what == "sparse":
            with open(name, "w") as file:
                file.seek(5_000_000)
                file.write("end")
    except OSError as error:
        if error.errno == 18: raise  # EXDEV
found = {}
for top, directories, files in os.walk("."):
    for name in (*directories, *files):
        path = os.path.join(top, name)
        if os.path.islink(path): row = os.readlink(path)
        elif os.path.isdir(path): row = oct(os.stat(path).st_mode)
        else: row = [oct(os.stat(path).st_mode), hashlib.sha256(open(path, "rb").read()).hexdigest(), xattr(path)]
        found[path[2:]] = row
print(json.dumps(found))
"""


def in_short(row: Any) -> object:
    """As the script says it."""
    kind, mode, _, _, content, attributes = row
    if stat.S_ISLNK(kind):
        return content
    if stat.S_ISDIR(kind):
        return oct(kind | mode)
    note = attributes.get("user.note")
    return [oct(kind | mode), hashlib.sha256(content).hexdigest(), note and note.decode()]


@settings(max_examples=25, deadline=None, suppress_health_check=list(HealthCheck))
@given(first=OPERATIONS, then=OPERATIONS)
def test_what_is_applied_is_what_the_run_saw(
    tmp_path_factory: pytest.TempPathFactory, first: list[Any], then: list[Any]
) -> None:
    """Also where a second run builds on the first; and undone in turn it is what it was."""
    place = tmp_path_factory.mktemp("model")
    real = place / "real"
    real.mkdir(mode=0o755)
    (real / "dir" / "sub").mkdir(parents=True)
    (real / "dir" / "c").write_text("c")
    (real / "other").mkdir()
    (real / "a").write_text("a" * 100)
    states, made = [look(real)], []
    for operations in (first, then):
        with SyncSandbox(str(real), keep=True) as box:
            result = box.exec([PYTHON, "-c", DO, str(real), repr(operations)])
            assert result.exit_code == 0, result
            shown = json.loads(result.text)
        if box.kept is None:
            continue
        proposal = propose(box.kept)
        assert proposal.conflicts == ()
        if proposal.steps:
            made.append(applied(proposal).id)
            states.append(look(real))
        assert {name: in_short(row) for name, row in look(real).items()} == shown
    for identifier in reversed(made):
        assert look(real) == states.pop()
        undo(identifier)
    assert look(real) == states.pop()
