"""Applying what a run has changed, and taking it back: exactly what was shown, all of it or nothing."""

from __future__ import annotations

import hashlib
import json
import os
import random
import stat
import struct
import subprocess
import sys
import threading
from collections.abc import Callable, Iterator
from contextlib import suppress
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from corral.errors import CorralError, RequestError
from corral.sandbox.apply import applying, journal, swapping
from corral.sandbox.apply.proposal import Proposal, propose
from corral.sandbox.apply.recovery import recover
from corral.sandbox.apply.swapping import Conflict
from corral.sandbox.apply.undo import undo
from corral.sandbox.layer import KeptLayer
from corral.sandbox.sync import SyncSandbox
from tests.contain.command_line import CommandLine, adopting_orphans

pytestmark = pytest.mark.usefixtures("state")

PYTHON = "/usr/bin/python3"


@pytest.fixture
def workspace(tmp_path: Path) -> Path:
    place = tmp_path / "workspace"
    place.mkdir(mode=0o755)
    fill(place)
    return place


def fill(place: Path) -> None:
    (place / "file.txt").write_text("original\n")
    (place / "run.sh").write_text("#!/bin/sh\n")
    (place / "run.sh").chmod(0o755)
    (place / "tree" / "below").mkdir(parents=True)
    (place / "tree" / "one").write_text("1")
    (place / "tree" / "below" / "two").write_text("2")
    (place / "link").symlink_to("file.txt")
    (place / "empty").mkdir()


def run(workspace: Path, script: str) -> KeptLayer:
    """What a command has changed."""
    with SyncSandbox(str(workspace), keep=True) as box:
        result = box.exec(["sh", "-ec", script])
        assert result.exit_code == 0, result
    assert box.kept is not None
    return box.kept


def look(place: Path) -> dict[str, Any]:
    """All of a tree, but for times."""
    found: dict[str, Any] = {}
    for path in sorted(place.rglob("*")):
        status = path.lstat()
        content: Any = None
        if stat.S_ISREG(status.st_mode):
            content = path.read_bytes()
        elif stat.S_ISLNK(status.st_mode):
            content = os.readlink(path)
        mode = 0 if stat.S_ISLNK(status.st_mode) else stat.S_IMODE(status.st_mode)
        attributes = {}
        if not stat.S_ISLNK(status.st_mode):
            attributes = {name: os.getxattr(path, name) for name in os.listxattr(path) if name.startswith("user.")}
        kind = stat.S_IFMT(status.st_mode)
        found[str(path.relative_to(place))] = (kind, mode, status.st_uid, status.st_gid, content, attributes)
    return found


def applied(proposal: Proposal) -> journal.Journal:
    return proposal.apply(proposal.hash)


CHANGES = """
    echo more >>file.txt
    mkdir -p new/deep && echo n >new/deep/file && ln -s ../file.txt new/link
    rm -r tree/below && echo file >tree/below
    rm -r empty
    chmod 644 run.sh
    chmod 700 tree
    ln -sf run.sh link
"""


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


# ---- attacks ----


def test_a_protected_file_that_has_another_name_in_the_workspace_stays(workspace: Path, tmp_path: Path) -> None:
    """Vector 26."""
    protected = tmp_path / "protected"
    protected.write_text("precious")
    os.link(protected, workspace / "hard")
    os.utime(workspace / "hard")
    layer = run(workspace, "echo evil >hard; chmod 777 hard")
    applied(propose(layer))
    assert (workspace / "hard").read_text() == "evil\n"
    assert protected.read_text() == "precious" and not protected.stat().st_mode & 0o002


def test_marks_of_the_overlay_and_special_bits_do_not_arrive(workspace: Path) -> None:
    """Vectors 33 and 35: forged whiteouts and attributes, devices, setuid."""
    script = f"""
        cp /bin/true tool; chmod 6755 tool; mkdir -m 3777 dir; mkfifo dir/fifo fifo
        {PYTHON} - <<'EOF'
import os
for path in ("tool", "dir"):
    for name in ("user.overlay.opaque", "user.overlay.whiteout", "user.overlay.redirect", "user.plain"):
        try:
            os.setxattr(path, name, b"y")
        except OSError:
            pass
for number in (0, 1):
    try:
        os.mknod(f"device{{number}}", 0o20666, os.makedev(0, number))
    except OSError:
        pass
EOF
    """
    proposal = propose(run(workspace, script))
    assert sorted(each.partition(":")[0] for each in proposal.left_out) == ["dir/fifo", "fifo"]
    applied(proposal)
    after = look(workspace)
    assert (after["tool"][1], after["dir"][1]) == (0o755, 0o1777)
    assert {name for row in after.values() for name in row[5]} <= {"user.plain"}
    assert {row[0] for row in after.values()} == {stat.S_IFREG, stat.S_IFDIR, stat.S_IFLNK}


def test_a_directory_that_is_swapped_for_a_link_leads_nowhere(workspace: Path, tmp_path: Path) -> None:
    """Vectors 25 and 32: as often as it can be, while it is applied."""
    outside = tmp_path / "outside"
    outside.mkdir()
    (outside / "one").write_text("1")
    (outside / "below").mkdir()
    before = look(outside)
    layer = run(workspace, "echo evil >tree/one; echo evil >tree/new; rm -r tree/below")
    over = threading.Event()

    def swap() -> None:
        real, aside, link = workspace / "tree", tmp_path / "aside", tmp_path / "ready"
        while not over.is_set():
            with suppress(OSError):  # where it was applied in between
                real.rename(aside)
                link.symlink_to(outside)
                link.rename(real)
                real.unlink()
                aside.rename(real)

    thread = threading.Thread(target=swap)
    thread.start()
    try:
        outcomes = []
        for _ in range(40):
            try:
                undo(applied(propose(layer)).id)
                outcomes.append("done")
            except CorralError as error:
                outcomes.append(str(error))
    finally:
        over.set()
        thread.join()
    assert look(outside) == before
    assert any(outcome != "done" for outcome in outcomes)  # it was in the way at least once


@pytest.mark.root
@pytest.mark.parametrize("when", ["before", "after"])
@pytest.mark.parametrize("place", ["empty", "tree/below"])
def test_what_is_mounted_in_the_workspace_is_not_touched(workspace: Path, when: str, place: str) -> None:
    layer = run(workspace, "echo evil >empty/file; chmod 700 empty; rm -r tree")
    proposal = propose(layer)
    disk = workspace.parent / "disk"
    disk.mkdir(mode=0o751)
    (disk / "precious").write_text("precious")
    os.utime(disk / "precious", (0, 0))
    subprocess.run(["mount", "--bind", disk, workspace / place], check=True)
    try:
        with pytest.raises(Conflict, match=r"another file system|changed meanwhile"):
            applied(propose(layer) if when == "before" else proposal)
        assert (disk / "precious").read_text() == "precious" and stat.S_IMODE(disk.stat().st_mode) == 0o751
        assert (workspace / "tree").is_dir()
    finally:
        subprocess.run(["umount", workspace / place], check=True)
    assert not list(workspace.glob(".corral-*"))


@pytest.mark.root
def test_what_is_mounted_meanwhile_is_refused_even_if_it_looks_the_same(workspace: Path) -> None:
    proposal = propose(run(workspace, "rm -r tree"))
    disk = workspace.parent / "disk"
    subprocess.run(["cp", "-a", workspace / "tree" / "below", disk], check=True)
    subprocess.run(["mount", "--bind", disk, workspace / "tree" / "below"], check=True)
    try:
        with pytest.raises(Conflict, match="another file system is mounted"):
            applied(proposal)
        assert (disk / "two").read_text() == "2"
    finally:
        subprocess.run(["umount", workspace / "tree" / "below"], check=True)


def test_another_directory_of_the_same_name_is_not_taken_for_the_first(workspace: Path) -> None:
    """What lies in it has kept its times."""
    (workspace / "other").mkdir()
    (workspace / "other" / "one").write_text("precious")
    layer = run(workspace, "echo x >>tree/one; rm -r empty; mkdir empty; echo y >empty/new")
    (workspace / "tree").rename(workspace / "aside")
    (workspace / "other").rename(workspace / "tree")
    (workspace / "aside" / "below").rename(workspace / "empty" / "below")
    before = look(workspace)
    conflicts = propose(layer).conflicts
    assert any(each.startswith("tree/one: tree is another directory") for each in conflicts), conflicts
    assert any(each.startswith("empty/below: it has come") for each in conflicts), conflicts
    assert look(workspace) == before


def test_a_directory_with_its_group_and_lists_comes_back_with_them(workspace: Path) -> None:
    groups = [group for group in os.getgroups() if group != os.getegid()] if os.geteuid() else [4711]
    for group in groups[:1]:
        os.chown(workspace / "tree" / "below", -1, group)
    # acl(5), as linux/posix_acl_xattr.h has it: one user, whom the group's rights do not concern.
    whom = os.geteuid() or 65533  # an ordinary user's sandbox has no other
    rows = ((1, 6, 0xFFFFFFFF), (2, 4, whom), (4, 0, 0xFFFFFFFF), (16, 4, 0xFFFFFFFF), (32, 0, 0xFFFFFFFF))
    access = struct.pack("<I", 2) + b"".join(struct.pack("<HHI", *row) for row in rows)
    for path in ("tree/below/two", "tree/one"):
        os.setxattr(workspace / path, "system.posix_acl_access", access)
    os.setxattr(workspace / "tree", "system.posix_acl_default", access)
    os.chmod(workspace / "tree", 0o2755)

    def lists() -> list[tuple[str, list[str]]]:
        return [(str(path), os.listxattr(path)) for path in sorted(workspace.rglob("*")) if not path.is_symlink()]

    before, seen = look(workspace), lists()
    layer = run(workspace, "rm -r tree/below; mv -f file.txt moved; cat moved >file.txt; rm moved; chmod 700 tree")
    proposal = propose(layer)
    made = applied(proposal)
    assert stat.S_IMODE((workspace / "tree").stat().st_mode) == 0o2700
    undo(made.id)
    assert (look(workspace), lists()) == (before, seen)
    with SyncSandbox(str(workspace), keep=True) as box:
        assert box.exec(["sh", "-c", "rm tree/one; echo x >tree/one; chmod 640 tree/one"]).exit_code == 0
    assert box.kept is not None
    (entry,) = propose(box.kept).risky
    assert entry.reasons == ("its access control list would be lost",)


def test_what_only_seems_large_costs_no_time(workspace: Path) -> None:
    script = "truncate -s 500M big; for n in $(seq 500); do ln big big$n; mkdir -p d/$n; echo >d/$n/x; done"
    proposal = propose(run(workspace, script))
    assert proposal.conflicts == () and len(proposal.entries) == 1502


RISKY = """
    ln -s innocent .vscode; mkdir innocent; touch innocent/tasks.json; echo >.claude; ln -s x .cargo
    mkdir x y; touch x/HEAD x/commondir x/config.worktree y/config; mkdir y/objects y/refs
    mkdir -p .git/modules/a/logs/hooks .git/refs/heads; touch .git/modules/a/logs/hooks/post-checkout .git/HEAD
    touch .git/modules/a/logs/config .git/refs/heads/main .git/index
    mkdir -p d1/d2 d1/real; ln -s ../.. d1/d2/s; ln -s d1/d2/s/x t; ln -s real/../../../.. d1/u; ln -s real/x d1/v
    touch a.sublime-project rust-toolchain; mkdir __pycache__; touch __pycache__/a.pyc
"""


def test_what_must_be_looked_at_is_not_hidden_by_links_or_pieces(workspace: Path) -> None:
    risky = {entry.path for entry in propose(run(workspace, RISKY)).risky}
    assert risky == {
        ".vscode",
        ".claude",
        ".cargo",
        "x/HEAD",
        "x/commondir",
        "x/config.worktree",
        "y/config",
        ".git/modules/a/logs/hooks/post-checkout",
        ".git/modules/a/logs/config",
        "t",
        "d1/u",
        "a.sublime-project",
        "rust-toolchain",
        "__pycache__/a.pyc",
    }


def test_a_repository_that_goes_away_is_asked_about(workspace: Path) -> None:
    (workspace / ".git" / "hooks").mkdir(parents=True)
    (workspace / ".git" / "config").touch()
    (workspace / "sub").mkdir()
    (entry,) = propose(run(workspace, "rm -r .git sub")).risky
    assert entry.path == ".git"


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


def test_what_is_too_deep_or_closed_is_refused(workspace: Path) -> None:
    deep = "; ".join(["mkdir d; cd d"] * 300)
    assert "deep" in propose(run(workspace, f"mkdir top; cd top; {deep}")).conflicts[0]


@pytest.mark.user
def test_another_users_file_is_not_replaced_by_one_that_could_not_be_taken_back(workspace: Path) -> None:
    closed = run(workspace, "mkdir closed; echo x >closed/file; chmod 0 closed")
    assert "cannot read" in propose(closed).conflicts[0]


# ---- what goes wrong ----


def test_a_full_disk_leaves_everything_as_it_was(workspace: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from corral import diskspace

    proposal = propose(run(workspace, CHANGES))
    before = look(workspace)
    monkeypatch.setattr(diskspace, "KEEP_BYTES", 1 << 60)
    with pytest.raises(CorralError, match="make room"):
        applied(proposal)
    assert look(workspace) == before


CALLS = ("os.", "open", "ctypes.call", "fcntl.", "shutil.")


def killed_at(number: int, what: Callable[[], object], calls: tuple[str, ...] = CALLS) -> bool:
    """Runs something in a child that ends at its so-manyth call to the system. Whether it did not get that far."""
    child = os.fork()
    if child == 0:
        left = number

        def count(event: str, _: object) -> None:
            nonlocal left
            if event.startswith(calls):
                left -= 1
                if left == 0:
                    os._exit(9)

        sys.addaudithook(count)
        try:
            what()
        except BaseException:
            os._exit(2)
        os._exit(0)
    code = os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
    assert code in (0, 9)
    return code == 0


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


def test_an_undo_refuses_what_was_changed_since(workspace: Path) -> None:
    made = applied(propose(run(workspace, CHANGES)))
    (workspace / "new" / "mine").write_text("precious")
    before = look(workspace)
    with pytest.raises(Conflict):
        undo(made.id)
    assert look(workspace) == before
    (workspace / "new" / "mine").unlink()
    undo(made.id)


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


# ---- the command line ----


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
