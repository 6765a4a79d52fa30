"""Where control groups are made, in fake trees, and what they are set to; one real tree for what only a kernel says."""

from __future__ import annotations

import os
import signal
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path

import pytest

from corral.policy.model import MIB, Resources
from corral.sandbox import cgroups
from corral.sandbox.cgroups import Controller, Hierarchy, find_hierarchies, find_parent

ALL = frozenset({"memory", "pids", "cpu"})
LIMITING = frozenset({Controller.MEMORY, Controller.PIDS, Controller.CPU})
V2_ONLY = frozenset({Controller.KILL, Controller.FREEZE})


class Tree:
    """A fake version 2 hierarchy, and the /proc/PID of a process in it."""

    def __init__(self, directory: Path) -> None:
        self.top = directory / "cgroup"
        self.process = directory / "process"
        self.process.mkdir()
        self.refused: set[str] = set()
        """Where the process may not write; root may everywhere."""
        self.group("", "memory pids cpu io", "memory pids cpu io")

    def group(self, path: str, controllers: str, given: str = "", *, writable: bool = True) -> Path:
        made = self.top / path
        made.mkdir()
        (made / "cgroup.controllers").write_text(controllers + "\n")
        (made / "cgroup.subtree_control").write_text(given + "\n")
        (made / "cgroup.procs").touch()
        if not writable:
            self.refused.add(str(made))
        return made

    def find(self, own: str) -> tuple[Hierarchy, ...]:
        (self.process / "cgroup").write_text(f"0::{own}\n")
        mount = f"31 23 0:28 / {self.top} rw shared:1 - cgroup2 cgroup2 rw,nsdelegate\n"
        (self.process / "mountinfo").write_text(mount)
        return find_hierarchies(str(self.process))


@pytest.fixture
def tree(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Tree:
    """Files stand for the kernel's, so what a write to subtree_control does is said here."""
    made = Tree(tmp_path)
    monkeypatch.setattr(cgroups, "_usable", lambda directory: directory not in made.refused)

    def give(group: str, names: frozenset[str]) -> None:
        file = Path(group, "cgroup.subtree_control")
        busy = Path(group, "cgroup.procs").read_text() and group != str(made.top)
        if not busy and group not in made.refused:
            file.write_text(" ".join({*file.read_text().split(), *names}))

    monkeypatch.setattr(cgroups, "_give", give)
    return made


def given(group: Path) -> set[str]:
    return set((group / "cgroup.subtree_control").read_text().split())


def test_root_in_a_login_session_goes_up_to_who_gives_all(tree: Tree) -> None:
    """A stock systemd host: the session has processes, its slice gives memory and pids, the root everything."""
    tree.group("user.slice", "memory pids cpu io", "memory pids")
    tree.group("user.slice/user-0.slice", "memory pids", "memory pids")
    session = tree.group("user.slice/user-0.slice/session-1.scope", "memory pids")
    (session / "cgroup.procs").write_text("1\n")
    (found,) = tree.find("/user.slice/user-0.slice/session-1.scope")
    assert found == Hierarchy(2, str(tree.top), LIMITING | V2_ONLY)
    assert given(session) == set()  # nothing was changed on the way
    assert given(tree.top / "user.slice") == {"memory", "pids"}


def test_the_root_is_made_to_give_what_nobody_gives_yet(tree: Tree) -> None:
    (tree.top / "cgroup.subtree_control").write_text("")
    (tree.top / "cgroup.procs").write_text("1\n")  # the root of all may have some all the same
    session = tree.group("session", "")
    (session / "cgroup.procs").write_text("1\n")
    (found,) = tree.find("/session")
    assert found == Hierarchy(2, str(tree.top), LIMITING | V2_ONLY)
    assert given(tree.top) == ALL


def test_a_user_stays_in_the_subtree_that_is_delegated(tree: Tree) -> None:
    for path in ("user.slice", "user.slice/user-1000.slice"):
        tree.group(path, "memory pids cpu", "memory pids cpu", writable=False)
    tree.refused.add(str(tree.top))
    manager = tree.group("user.slice/user-1000.slice/user@1000.service", "memory pids cpu", "memory pids")
    slice_ = tree.group("user.slice/user-1000.slice/user@1000.service/app.slice", "memory pids", "memory pids")
    scope = tree.group("user.slice/user-1000.slice/user@1000.service/app.slice/run.scope", "memory pids")
    (scope / "cgroup.procs").write_text("1\n")
    (found,) = tree.find("/user.slice/user-1000.slice/user@1000.service/app.slice/run.scope")
    assert found == Hierarchy(2, str(manager), LIMITING | V2_ONLY)
    assert given(manager) == ALL and given(slice_) == {"memory", "pids"}


def test_where_less_is_delegated_the_nearest_that_gives_it_is_taken(tree: Tree) -> None:
    tree.refused.add(str(tree.top))
    tree.group("service", "memory pids", "memory pids")
    slice_ = tree.group("service/app.slice", "memory pids", "memory pids")
    scope = tree.group("service/app.slice/run.scope", "memory pids")
    (scope / "cgroup.procs").write_text("1\n")
    (found,) = tree.find("/service/app.slice/run.scope")
    assert found == Hierarchy(2, str(slice_), V2_ONLY | {Controller.MEMORY, Controller.PIDS})


def test_kill_and_freeze_need_no_controllers(tree: Tree) -> None:
    tree.refused.add(str(tree.top))
    own = tree.group("own", "")
    (own / "cgroup.procs").write_text("1\n")
    assert tree.find("/own") == (Hierarchy(2, str(own), V2_ONLY),)


def test_nothing_is_found_where_nothing_may_be_written(tree: Tree) -> None:
    tree.refused.add(str(tree.top))
    tree.group("session", "memory pids cpu", writable=False)
    assert tree.find("/session") == ()


@pytest.mark.parametrize("own", ["/../other", "/..", "/session/../../x"])
def test_a_group_outside_of_what_is_mounted_is_not_looked_for(tree: Tree, own: str) -> None:
    """As /proc/PID/cgroup shows groups outside of the cgroup namespace (cgroup_namespaces(7))."""
    assert tree.find(own) == ()


# ---- settings ----


def settings(hierarchy: Hierarchy, resources: Resources) -> dict[str, str]:
    return dict(cgroups._settings(hierarchy, resources))


def test_settings_of_version_2(tmp_path: Path) -> None:
    (tmp_path / "memory.swap.max").touch()  # the kernel has swap accounting
    hierarchy = Hierarchy(2, str(tmp_path), LIMITING | V2_ONLY)
    assert settings(hierarchy, Resources(memory=64 * MIB, processes=10, cpu=1.5)) == {
        "memory.max": str(64 * MIB),
        "memory.swap.max": "0",
        "memory.oom.group": "0",
        "pids.max": "12",
        "cpu.max": "150000 100000",
    }
    assert "cpu.max" not in settings(hierarchy, Resources(cpu=None))
    assert settings(hierarchy, Resources(cpu=0.001))["cpu.max"] == "1000 100000"  # the least that the kernel takes


def test_settings_follow_what_the_hierarchy_has(tmp_path: Path) -> None:
    assert settings(Hierarchy(2, str(tmp_path), V2_ONLY), Resources(cpu=1)) == {}
    found = settings(Hierarchy(2, str(tmp_path), V2_ONLY | {Controller.MEMORY}), Resources(memory=MIB, cpu=1))
    assert found == {"memory.max": str(MIB), "memory.oom.group": "0"}  # no swap accounting, nothing to write to


def test_settings_of_version_1(tmp_path: Path) -> None:
    (tmp_path / "memory.memsw.limit_in_bytes").touch()
    assert settings(Hierarchy(1, str(tmp_path), LIMITING), Resources(memory=MIB, processes=3, cpu=0.5)) == {
        "memory.limit_in_bytes": str(MIB),
        "memory.memsw.limit_in_bytes": str(MIB),
        "pids.max": "5",
        "cpu.cfs_period_us": "100000",
        "cpu.cfs_quota_us": "50000",
    }


# ---- a real one ----


def unified() -> tuple[str, str] | None:
    """Where version 2 is mounted, and a controller that nobody has given to the root's children."""
    for kind, root, mount_point, _ in cgroups._mounted("/proc/self"):
        if kind == "cgroup2" and root == "/":
            spare = cgroups._words(f"{mount_point}/cgroup.controllers")
            spare -= cgroups._words(f"{mount_point}/cgroup.subtree_control") | ALL
            if spare:
                return mount_point, min(spare)
    return None


@pytest.fixture
def real() -> Iterator[tuple[str, str, str]]:
    """(top, a group of this test, a controller); all undone at the end."""
    found = unified() if os.geteuid() == 0 else None
    if found is None:
        pytest.skip("needs root and a version 2 hierarchy with a controller that nobody uses")
    top, controller = found
    group = f"{top}/corral-test-{os.getpid()}"
    os.mkdir(group)
    try:
        yield top, group, controller
    finally:
        for directory, _, _ in os.walk(group, topdown=False):
            os.rmdir(directory)
        with open(f"{top}/cgroup.subtree_control", "w") as file:
            file.write(f"-{controller}")


def in_child(group: str, uid: int, top: str, controller: str) -> tuple[str, str]:
    """A child in ``group`` with that id finds its parent, makes a group there and moves into it: the parent, and what
    the new group has."""
    name = f"corral-test-{os.getpid()}-made"
    reader, writer = os.pipe()
    child = os.fork()
    if child == 0:
        answer = "failed"
        with suppress(BaseException):
            Path(group, "cgroup.procs").write_text(str(os.getpid()))
            os.setresuid(uid, uid, uid)
            place = find_parent(top, group, frozenset({controller}))
            assert place
            made = Path(place[0], name)
            made.mkdir()
            (made / "cgroup.procs").write_text(str(os.getpid()))
            answer = f"{place[0]}\n{(made / 'cgroup.controllers').read_text().strip()}"
        os.write(writer, answer.encode())
        os.close(writer)
        signal.pause()
    os.close(writer)
    try:
        with open(reader) as answers:
            parent, _, controllers = answers.read().partition("\n")
    finally:
        os.kill(child, signal.SIGKILL)
        os.waitpid(child, 0)
    made = Path(parent, name)
    if made.is_dir():
        made.rmdir()
    return parent, controllers


def test_root_gets_a_controller_that_its_own_group_cannot_give(real: tuple[str, str, str]) -> None:
    top, group, controller = real
    assert in_child(group, 0, top, controller) == (top, controller)


def test_a_user_gets_one_in_a_delegated_subtree_only(real: tuple[str, str, str]) -> None:
    top, group, controller = real
    with open(f"{top}/cgroup.subtree_control", "w") as file:
        file.write(f"+{controller}")
    own = f"{group}/session"
    os.mkdir(own)
    assert in_child(own, 65534, top, controller) == ("failed", "")
    for path in (group, own):
        for name in ("", "/cgroup.procs", "/cgroup.subtree_control"):
            os.chown(path + name, 65534, -1)
    assert in_child(own, 65534, top, controller) == (group, controller)
