"""What is applied leads nowhere out of the workspace, whatever the run or somebody has planted (vectors 25 to 36)."""

from __future__ import annotations

import os
import stat
import struct
import subprocess
import threading
from contextlib import suppress
from pathlib import Path

import pytest

from corral.errors import CorralError
from corral.sandbox.apply.proposing import propose
from corral.sandbox.apply.swapping import Conflict
from corral.sandbox.apply.undo import undo
from corral.sandbox.sync import SyncSandbox
from tests.contain.applies import applied, fill, look, run

pytestmark = pytest.mark.usefixtures("state")

PYTHON = "/usr/bin/python3"


@pytest.fixture
def workspace(tmp_path: Path) -> Path:
    return fill(tmp_path / "workspace")


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


def test_a_repository_that_goes_away_is_asked_about(workspace: Path) -> None:
    (workspace / ".git" / "hooks").mkdir(parents=True)
    (workspace / ".git" / "config").touch()
    (workspace / "sub").mkdir()
    (entry,) = propose(run(workspace, "rm -r .git sub")).risky
    assert entry.path == ".git"


def test_what_is_too_deep_or_closed_is_refused(workspace: Path) -> None:
    deep = "; ".join(["mkdir d; cd d"] * 300)
    assert "deep" in propose(run(workspace, f"mkdir top; cd top; {deep}")).conflicts[0]


@pytest.mark.user
def test_another_users_file_is_not_replaced_by_one_that_could_not_be_taken_back(workspace: Path) -> None:
    closed = run(workspace, "mkdir closed; echo x >closed/file; chmod 0 closed")
    assert "cannot read" in propose(closed).conflicts[0]
