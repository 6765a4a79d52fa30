"""Snapshots, going back, forks and comparisons against a plain directory: whatever is done in whatever order, what is
seen is what was seen then. ``CORRAL_STATES`` sets how many machines are run; each does some hundred operations."""

from __future__ import annotations

import asyncio
import itertools
import json
import os
import random
import shutil
import signal
import stat
import subprocess
import tempfile
import time
from pathlib import Path
from typing import Any

import pytest
from hypothesis import HealthCheck, settings
from hypothesis import strategies as st
from hypothesis.stateful import Bundle, RuleBasedStateMachine, initialize, invariant, rule, run_state_machine_as_test

from corral import Sandbox
from corral.policy.load import parse_policy
from corral.policy.model import Policy
from corral.sandbox import area, registry
from corral.sandbox.apply.proposing import propose
from corral.sandbox.apply.undo import undo
from corral.sandbox.changes import Change, ChangeKind, FileType
from corral.sandbox.layer import KeptLayer, list_layers
from corral.sandbox.sync import SyncSandbox
from tests.contain.applies import look
from tests.contain.command_line import adopting_orphans, groups_of
from tests.contain.test_apply import PYTHON, in_short

pytestmark = pytest.mark.usefixtures("state")

LONG = "l" * 255
_TOP = ("a", "b", "dir", "other", "fifo", LONG, "\u6f22\udce9 \n")
NAMES = st.sampled_from([*_TOP, *(f"dir/{name}" for name in ("c", "sub", "sub/d", LONG)), "other/e"])
OPERATIONS = st.lists(
    st.one_of(
        st.tuples(st.just("write"), NAMES, st.sampled_from(["", "text", "other text", "much"])),
        st.tuples(st.just("append"), NAMES, st.just("more")),
        st.tuples(st.just("truncate"), NAMES, st.sampled_from(["0", "3", "100000"])),
        st.tuples(st.sampled_from(["mkdir", "remove", "rmtree", "mkfifo", "sparse"]), NAMES, st.just("")),
        st.tuples(st.sampled_from(["rename", "link", "symlink"]), NAMES, NAMES),
        st.tuples(st.just("chmod"), NAMES, st.sampled_from(["700", "755", "644", "600", "0", "1777"])),
        st.tuples(st.just("setxattr"), NAMES, st.sampled_from(["v", "w"])),
    ),
    min_size=1,
    max_size=30,
)
DO = """
import hashlib, json, os, shutil, stat, sys
def xattr(path):
    try: return os.getxattr(path, "user.note").decode()
    except OSError: return None
os.umask(0o022)
os.chdir(sys.argv[1])
for what, name, more in eval(sys.argv[2]):
    try:
        if what in ("write", "append") and os.path.lexists(name) and not os.path.isfile(name): continue
        if what == "write": open(name, "w").write("z" * 70_000 if more == "much" else more)
        elif what == "append": open(name, "a").write(more)
        elif what == "truncate" and os.path.isfile(name): os.truncate(name, int(more))
        elif what == "mkdir": os.mkdir(name)
        elif what == "mkfifo": os.mkfifo(name)
        elif what == "remove": os.unlink(name)
        elif what == "rmtree" and os.path.isdir(name): shutil.rmtree(name)
        elif what == "rename": os.rename(name, more)
        elif what == "link": os.link(name, more, follow_symlinks=False)
        elif what == "symlink": os.symlink(name, more)
        elif what == "chmod" and not os.path.islink(name): os.chmod(name, int(more, 8) | 0o700 * os.path.isdir(name))
        elif what == "setxattr": os.setxattr(name, "user.note", more.encode(), follow_symlinks=False)
        elif what == "sparse" and not os.path.exists(name):
            with open(name, "w") as file:
                file.seek(5_000_000)
                file.write("end")
    except OSError: pass
found = {}
for top, directories, files in os.walk("."):
    for name in (*directories, *files):
        path = os.path.join(top, name)
        status = os.lstat(path)
        if stat.S_ISLNK(status.st_mode): row = os.readlink(path)
        elif stat.S_ISREG(status.st_mode):
            mode = status.st_mode
            if not mode & 0o400: os.chmod(path, mode | 0o400)
            with open(path, "rb") as file: row = [oct(mode), hashlib.sha256(file.read()).hexdigest(), xattr(path)]
            if not mode & 0o400: os.chmod(path, mode)
        elif stat.S_ISDIR(status.st_mode): row = [oct(status.st_mode), None, xattr(path)]
        else: row = oct(status.st_mode)
        found[os.path.relpath(path, ".")] = row
print(json.dumps(found))
"""


def seen(box: SyncSandbox, workspace: Path, operations: list[Any] | None = None) -> dict[str, Any]:
    """What is there after some operations, as it is inside."""
    result = box.exec([PYTHON, "-c", DO, str(workspace), ascii(operations or [])], timeout=100)
    assert result.exit_code == 0, result
    found: dict[str, Any] = json.loads(result.text)
    return found


def in_plain(operations: list[Any]) -> dict[str, Any]:
    """What a plain directory holds after them. Root lets somebody do them who is not root."""
    with tempfile.TemporaryDirectory(prefix="corral-plain-") as name:
        place = Path(name) / "work"
        place.mkdir()
        begin_in(place)
        user: dict[str, Any] = {}
        if os.geteuid() == 0:
            user = {"user": 1000, "group": 1000, "extra_groups": []}
            for path in (Path(name), place, *place.rglob("*")):
                os.chown(path, 1000, 1000)
        done = subprocess.run(
            [PYTHON, "-c", DO, str(place), ascii(operations)], capture_output=True, check=True, timeout=100, **user
        )
    found: dict[str, Any] = json.loads(done.stdout)
    return found


def begin_in(place: Path) -> None:
    """What is there before anything is done."""
    (place / "dir" / "sub").mkdir(parents=True)
    (place / "dir" / "c").write_text("c")
    (place / "dir" / "sub" / "d").write_text("d")
    (place / "other").mkdir()
    (place / "a").write_text("a" * 100)
    for path in (place, *place.rglob("*")):
        path.chmod(0o755 if path.is_dir() else 0o644)


def is_directory(row: Any) -> bool:
    return isinstance(row, list) and stat.S_ISDIR(int(row[0], 8))


def _parts(row: Any) -> tuple[FileType, Any, int]:
    """Type, content and mode."""
    if isinstance(row, list):
        return FileType.DIRECTORY if is_directory(row) else FileType.FILE, row[1:], int(row[0], 8)
    if row.startswith("0o1"):
        return FileType.FIFO, None, int(row, 8)
    return FileType.SYMLINK, row, 0


def expected(before: dict[str, Any], after: dict[str, Any]) -> dict[str, ChangeKind]:
    """What a comparison says of two such looks."""
    found = {}
    for path in before.keys() | after.keys():
        above = os.path.dirname(path)
        if path not in after:
            if not above or (above in after and is_directory(after[above])):
                found[path] = ChangeKind.DELETED
        elif path not in before or (above and (above not in before or not is_directory(before[above]))):
            found[path] = ChangeKind.ADDED
        else:
            (*one, mode), (*other, then) = _parts(before[path]), _parts(after[path])
            if one != other:
                found[path] = ChangeKind.CHANGED
            elif mode != then:
                found[path] = ChangeKind.MODE
    return found


def told(changes: list[Change], workspace: Path) -> dict[str, ChangeKind]:
    return {os.path.relpath(change.path, workspace): change.kind for change in changes if change.part == "workspace"}


class States(RuleBasedStateMachine):
    """One sandbox, and what was seen in it at each snapshot."""

    snapshots = Bundle("snapshots")
    policy: Policy | None = None

    def __init__(self) -> None:
        super().__init__()
        self.place = Path(tempfile.mkdtemp(prefix="states-", dir=Path(os.environ["XDG_STATE_HOME"]).parent))
        self.workspace = self.place / "work"
        self.workspace.mkdir(parents=True)
        begin_in(self.workspace)
        self.before = look(self.workspace)
        self.box = SyncSandbox(str(self.workspace), keep=True, policy=self.policy).start()
        self.now = seen(self.box, self.workspace)
        self.done: list[Any] = []
        """All that was done to come where it is."""
        self.taken: list[tuple[KeptLayer, dict[str, Any], list[Any]]] = []

    @initialize(target=snapshots)
    def begin(self) -> Any:
        return self.take()

    @rule(operations=OPERATIONS)
    def do(self, operations: list[Any]) -> None:
        self.now = seen(self.box, self.workspace, operations)
        self.done = [*self.done, *operations]
        self.is_as_plain(self.done, self.now)

    @rule(target=snapshots)
    def take(self) -> Any:
        self.taken.append((self.box.snapshot(), self.now, self.done))
        return len(self.taken) - 1

    @rule(which=snapshots)
    def go_back(self, which: int) -> None:
        layer, self.now, self.done = self.taken[which]
        self.box.restore(layer)
        assert seen(self.box, self.workspace) == self.now

    @rule(which=snapshots, operations=OPERATIONS)
    def fork(self, which: int, operations: list[Any]) -> None:
        layer, then, done = self.taken[which]
        with SyncSandbox(str(self.workspace), on=layer) as other:
            assert seen(other, self.workspace) == then
            self.is_as_plain([*done, *operations], seen(other, self.workspace, operations))
        assert seen(self.box, self.workspace) == self.now

    def is_as_plain(self, done: list[Any], now: dict[str, Any]) -> None:
        """Names of one file that were there before a snapshot are files of their own once one of them is written to
        (overlayfs.rst, "non-standard behavior"): where there are such, nothing is compared."""
        if not any(operation[0] == "link" for operation in done):
            assert now == in_plain(done)

    @rule(one=snapshots, other=snapshots)
    def compare(self, one: int, other: int) -> None:
        (first, before, _), (second, after, _) = self.taken[one], self.taken[other]
        assert told(second.changes_since(first), self.workspace) == expected(before, after)

    @invariant()
    def nothing_outside_has_changed(self) -> None:
        assert look(self.workspace) == self.before

    def teardown(self) -> None:
        try:
            self.box.close()
            if self.box.kept is not None:
                proposal = propose(self.box.kept)
                if proposal.steps and not proposal.conflicts and not self._has_unusual():
                    made = proposal.apply(proposal.hash)
                    assert {name: in_short(row) for name, row in look(self.workspace).items()} == {
                        name: row[0] if is_directory(row) else row for name, row in self.now.items()
                    }
                    undo(made.id)
                assert look(self.workspace) == self.before
        finally:
            for layer in list_layers():
                layer.discard()
            shutil.rmtree(self.place)

    def _has_unusual(self) -> bool:
        """Fifos are not applied."""
        return any(_parts(row)[0] is FileType.FIFO for row in self.now.values())


class StatesInPlace(States):
    """The sandbox stays the same one when it goes back."""

    policy = parse_policy("filesystem: {restore_keeps: [/usr/bin/sleep]}\n", source="test.yaml")


@pytest.mark.parametrize("machine", [States, StatesInPlace])
def test_whatever_is_done_each_state_is_what_it_was(state: Path, machine: type[States]) -> None:
    rounds = int(os.environ.get("CORRAL_STATES", "6"))
    run_state_machine_as_test(
        machine,
        settings=settings(
            max_examples=rounds, stateful_step_count=20, deadline=None, suppress_health_check=list(HealthCheck)
        ),
    )


def test_what_is_told_of_a_directory_that_came_and_went(state: Path, workspace: Path) -> None:
    """Types change in both directions, below what is opaque and what is not."""
    (workspace / "dir").mkdir()
    (workspace / "dir" / "old").write_text("old")
    with SyncSandbox(str(workspace)) as box:
        box.exec(["sh", "-ec", "rm -r dir; echo file >dir"])
        first = box.snapshot("first")
        box.exec(["sh", "-ec", "rm dir; mkdir dir; echo new >dir/new; chmod 600 file.txt"])
        second = box.snapshot("second")
        found = {change.path: change for change in second.changes_since(first)}
        assert {path: change.kind for path, change in found.items()} == {
            f"{workspace}/dir": ChangeKind.CHANGED,
            f"{workspace}/dir/new": ChangeKind.ADDED,
            f"{workspace}/file.txt": ChangeKind.MODE,
        }
        change = found[f"{workspace}/dir"]
        assert (change.type_before, change.file_type) == (FileType.FILE, FileType.DIRECTORY)
        back = {change.path: change.kind for change in first.changes_since(second)}
        assert back == {f"{workspace}/dir": ChangeKind.CHANGED, f"{workspace}/file.txt": ChangeKind.MODE}


async def _work(workspace: Path, policy: Policy | None, ready: int) -> None:
    """Takes snapshots, goes back, forks, without an end."""
    box = await Sandbox(workspace, policy=policy).start()
    layers: list[KeptLayer] = []
    for number in itertools.count():
        await box.exec(["sh", "-c", f"echo {number} >a; echo {number} >b; head -c 1M /dev/urandom >big-{number}"])
        layers.append(await box.snapshot(str(number)))
        os.write(ready, b".")
        await box.restore(random.choice(layers))
        forks = await box.fork(2)
        for fork in forks:
            await fork.exec(["sh", "-c", "echo fork >c"])
            await fork.close()


def _killed_at_work(workspace: Path, policy: Policy | None) -> int:
    """The process that was."""
    reader, writer = os.pipe()
    child = os.fork()
    if child == 0:
        try:
            asyncio.run(_work(workspace, policy, writer))
        finally:
            os._exit(2)
    os.close(writer)
    assert os.read(reader, 1) == b"."
    time.sleep(random.uniform(0, 1.0))
    os.kill(child, signal.SIGKILL)
    assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == -signal.SIGKILL
    os.close(reader)
    return child


@pytest.mark.parametrize("policy", [None, StatesInPlace.policy], ids=["anew", "in place"])
def test_whenever_its_controller_is_killed_each_layer_is_whole_and_nothing_else_is_left(
    state: Path, workspace: Path, policy: Policy | None
) -> None:
    """At moments that the seed of this run chooses; ``CORRAL_STATES`` sets how many."""
    before = look(workspace)
    for _ in range(int(os.environ.get("CORRAL_STATES", "6"))):
        with adopting_orphans():
            child = _killed_at_work(workspace, policy)
        registry.reap_dead_controllers()
        assert not groups_of(child)
        layers = list_layers()
        assert layers
        for layer in layers:
            with layer.reading() as parts:
                place = Path(f"/proc/self/fd/{parts}/workspace")
                a, b = ((place / name).read_text() for name in "ab")
                assert a == b and layer.name in ("", a.strip())
            for change in layer.changes():
                assert change.kind is ChangeKind.ADDED
            layer.discard()
        area.collect()  # what dead sessions have claimed
        assert [path.name for path in (state / "corral" / "layers").iterdir() if path.name != "account"] == []
        assert look(workspace) == before
