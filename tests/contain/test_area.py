"""The work area with what real runs leave in it: sessions that live, quotas, hostile trees, file systems."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import time
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace

import pytest

from corral import diskspace
from corral.cli.app import app
from corral.errors import CorralError, WallError
from corral.log.places import open_log
from corral.policy.load import parse_policy
from corral.policy.model import Policy
from corral.sandbox import account, core, quotas
from corral.sandbox.area import collect, list_kept
from corral.sandbox.layer import KeptLayer, list_layers, reap_partials, store
from corral.sandbox.sync import SyncSandbox
from tests.contain.test_layer import Run
from tests.unit.test_area import killed_at

pytestmark = pytest.mark.usefixtures("state")

PYTHON = "/usr/bin/python3"
MIB = 1 << 20


def policy(text: str) -> Policy:
    return parse_policy(text, source="test.yaml")


def sh(box: SyncSandbox, script: str) -> str:
    result = box.exec(["sh", "-ec", script])
    assert result.exit_code == 0, result
    return result.text


def ids() -> list[str]:
    return [each.id for each in list_layers()]


def held() -> dict[str, str]:
    done = collect(older_than=0, keep_bytes=0)
    return {layer.id: why for layer, why in done.held}


def totals() -> tuple[int, int]:
    """What the account says, and what is there."""
    with store() as layers:
        return account.total(layers), account.count(layers)


def test_a_live_sessions_snapshots_stay_and_go_after_it(workspace: Path) -> None:
    with SyncSandbox(str(workspace), keep=True) as box:
        sh(box, "echo 1 >a")
        first = box.snapshot("first")
        sh(box, "echo 2 >a")
        second = box.snapshot()
        assert held() == dict.fromkeys((first.id, second.id), f"the session {box.id} is alive")
        box.restore(first)  # and goes on with another id
        assert set(held()) == {first.id, second.id}
        third = box.snapshot("third")
        assert held()[third.id] == f"the session {box.id} is alive"
        box.restore(second)
        assert sh(box, "cat a; echo 3 >a") == "2\n"
        kinds = {kept.layer.id: kept.is_snapshot for kept in list_kept(0)[0]}
        assert kinds == {first.id: True, second.id: True, third.id: True}
        assert set(held()) == set(kinds)
    assert box.kept is not None
    assert held() == {}
    assert ids() == []


def test_what_a_sandbox_lies_on_stays(workspace: Path) -> None:
    with SyncSandbox(str(workspace), keep=True) as box:
        sh(box, "echo 1 >a")
    with SyncSandbox(str(workspace), on=box.kept) as other:
        assert held() == {box.kept.id: "something lies on it, or reads it"} if box.kept else False
        assert sh(other, "cat a") == "1\n"
    assert held() == {}


def test_a_logged_run_is_kept_as_long_as_its_recorded_policy_says(workspace: Path, tmp_path: Path) -> None:
    with open_log(tmp_path / "records") as log:
        for text in ("layers: {}", "layers: {keep_for: 1h}"):
            with SyncSandbox(str(workspace), keep=True, log=log, policy=policy(text)) as box:
                sh(box, "echo 1 >a")
    reasons = list(held().values())
    assert len(reasons) == 2 and "for good" in reasons[0] and "until 20" in reasons[1]
    shutil.rmtree(tmp_path / "records")
    assert held() == {}


# ---- quotas ----


def test_a_snapshot_over_the_bound_of_its_session_is_refused_and_nothing_is_lost(workspace: Path, state: Path) -> None:
    with SyncSandbox(str(workspace), keep=True, policy=policy("layers: {snapshot_bytes: 4MiB}")) as box:
        sh(box, "head -c 2M /dev/zero >a; sleep 0.1")
        first = box.snapshot()
        sh(box, "head -c 3M /dev/zero >b")
        with pytest.raises(CorralError, match=r"layers\.snapshot_bytes leaves room for.*corral gc"):
            box.snapshot()
        assert ids() == [first.id]
        assert not list((state / "corral" / "layers").glob("partial-*"))
        # What is as it was costs nothing, and what is discarded gives its room back.
        sh(box, "rm b; echo x >c")
        assert box.snapshot().disk < MIB
        for each in list_layers():
            each.discard()
        sh(box, "head -c 1M /dev/zero >b")
        box.snapshot()
    assert box.kept is not None
    sizes = {Path(change.path).name: change.size_after for change in box.kept.changes()}
    assert (sizes["a"], sizes["b"], sizes["c"]) == (2 * MIB, MIB, 2)


def test_a_run_begins_only_where_what_it_may_write_can_be_kept(workspace: Path) -> None:
    text = "resources: {disk: 8MiB}\nlayers: {total_bytes: 20MiB}"
    with SyncSandbox(str(workspace), keep=True, policy=policy(text)) as first:
        sh(first, "head -c 7M /dev/zero >a")
        with SyncSandbox(str(workspace), keep=True, policy=policy(text)) as second:
            sh(second, "head -c 7M /dev/zero >a")
            with pytest.raises(CorralError, match=r"could not be kept.*total_bytes"):
                SyncSandbox(str(workspace), keep=True, policy=policy(text)).start()
            with pytest.raises(CorralError, match=r"layers\.total_bytes leaves room for"):
                first.snapshot()
            with SyncSandbox(str(workspace), policy=policy(text)):
                pass  # keeps nothing
    assert first.kept is not None and second.kept is not None
    with pytest.raises(CorralError, match=r"could not be kept"):
        SyncSandbox(str(workspace), keep=True, policy=policy(text)).start()
    first.kept.discard()
    with SyncSandbox(str(workspace), keep=True, policy=policy(text)):
        pass


def test_what_never_began_holds_nothing(workspace: Path, state: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(*_: object) -> None:
        raise WallError("test", "nothing is launched")

    with SyncSandbox(str(workspace), keep=True) as box:
        sh(box, "echo 1 >a")
    monkeypatch.setattr(core, "launch", fail)
    with pytest.raises(WallError):
        SyncSandbox(str(workspace), keep=True, on=box.kept, policy=policy("layers: {total_bytes: 4GiB}")).start()
    assert not list((state / "corral" / "layers").glob("session-*"))
    assert held() == {} and ids() == []


def test_what_has_been_kept_long_enough_makes_room_by_itself(workspace: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    text = "resources: {disk: 8MiB}\nlayers: {total_bytes: 12MiB, keep_for: 5s}"
    with SyncSandbox(str(workspace), keep=True, policy=policy(text)) as box:
        sh(box, "head -c 7M /dev/zero >a")
    first = box.kept
    with pytest.raises(CorralError, match="could not be kept"):
        SyncSandbox(str(workspace), keep=True, policy=policy(text)).start()
    monkeypatch.setattr(quotas, "time", SimpleNamespace(time=lambda: time.time() + 10))
    with SyncSandbox(str(workspace), keep=True, policy=policy(text)) as box:
        assert first is not None and ids() == []
        sh(box, "echo 1 >a")
    # Also where another policy says nothing of it: each layer has its own time.
    second = box.kept
    with SyncSandbox(str(workspace), keep=True) as box:
        sh(box, "echo 1 >a")
        assert second is not None and ids() == [second.id]
    assert box.kept is not None and ids() == [box.kept.id]


def test_keeping_is_killed_and_nothing_is_lost_in_the_account(workspace: Path, state: Path) -> None:
    """At its calls to the system, each fifth."""
    run = Run(workspace, "sh", "-c", "mkdir d; echo 1 >d/a; ln d/a b; rm file.txt; ln -s x l")
    totals()
    number = 1
    while not killed_at(number, run.keep):
        reap_partials()
        said, there = totals()
        assert said >= there
        for layer in list_layers():
            assert len(layer.changes()) == layer.count == 5
            layer.discard()
        assert sorted(each.name for each in (state / "corral" / "layers").iterdir()) == ["account"]
        number += 5
    run.core.close_layer()
    assert number > 60 and len(list_layers()) == 1
    said, there = totals()
    assert 0 <= said - there <= 4096  # the description is taken for two blocks


# ---- what an agent can leave ----

HOSTILE = """
import os
os.symlink("PRECIOUS", "out")
os.symlink("loop", "loop")
os.mkdir("closed")
open("closed/big", "wb").write(b"x" * (2 << 20))
os.chmod("closed/big", 0)
os.chmod("closed", 0)
os.mkdir("wide")
for number in range(1000):
    open(f"wide/{number}", "w").close()
for name in ("\\x1b[2J", "new\\nline", "n" * 255, "\\udcff\\udcfe"):
    open(name, "w").close()
os.mkfifo("fifo")
os.link("fifo", "fifo2")
for number in range(400):
    os.mkdir("d" * 200)
    os.chdir("d" * 200)
open("file", "w").write("x")
"""


def test_hostile_trees_are_counted_and_go_and_nothing_else_does(workspace: Path, tmp_path: Path) -> None:
    precious = tmp_path / "precious"
    precious.mkdir()
    (precious / "file").write_text("precious")
    with SyncSandbox(str(workspace), keep=True) as box:
        assert box.exec([PYTHON, "-c", HOSTILE.replace("PRECIOUS", str(precious))]).exit_code == 0
    said, there = totals()
    assert there > 2 * MIB  # also what is in a directory that is closed to its owner
    assert box.kept is not None and abs(box.kept.disk - there) < 64 << 10
    assert said == there
    shown = collect(older_than=0, dry_run=True)
    done = collect(older_than=0)
    assert done.removed == shown.removed and done.removed[0][1] == there
    assert (totals(), ids()) == ((0, 0), [])
    assert (precious / "file").read_text() == "precious"


# ---- the command line ----


def corral(*words: str) -> int:
    """`corral WORDS`, in this process; its exit code."""
    return int(app(words, standalone_mode=False) or 0)


def test_an_operator_sees_what_is_kept_pins_and_removes(
    workspace: Path, state: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    for label in ("first", "\x1b[2J"):
        with SyncSandbox(str(workspace), keep=True, label=label) as box:
            sh(box, "head -c 1M /dev/zero >a")
    first, second = ids()
    assert corral("layers") == 0
    listed = capsys.readouterr().out
    assert "\x1b" not in listed and "first" in listed
    assert corral("layers", "--json") == 0
    found = json.loads(capsys.readouterr().out)
    assert [row["id"] for row in found["layers"]] == [first, second]
    assert found["taken"]["layers"]["count"] == 2 and found["taken"]["layers"]["bytes"] > 2 * MIB
    assert corral("pin", first) == 0
    assert corral("gc", "--older-than", "1ms") == 125  # which is no unit
    assert corral("gc", "--undo") == 125
    capsys.readouterr()
    assert corral("gc", "--keep-bytes", "0", "--dry-run", "--json") == 0
    shown = json.loads(capsys.readouterr().out)
    assert ([row["id"] for row in shown["removed"]], shown["held"][0]["why"]) == ([second], "it is pinned")
    assert ids() == [first, second]
    assert corral("gc", "--keep-bytes", "0") == 0
    assert f"removed: {second}" in capsys.readouterr().out
    assert corral("discard", first) == 125
    assert "corral unpin" in capsys.readouterr().err
    assert corral("unpin", first) == 0
    (state / "corral" / "layers" / first / "meta.json").write_text("{")
    assert corral("layers") == 0
    assert "is damaged" in capsys.readouterr().err
    assert corral("discard", first) == 0
    assert not list((state / "corral" / "layers").glob("*/"))


# ---- file systems ----

FILE_SYSTEMS = {
    "ext4": ["mkfs.ext4", "-q", "-F"],
    "xfs": ["mkfs.xfs", "-q"],
    "btrfs": ["mkfs.btrfs", "-q"],
    "tmpfs": [],
}


@pytest.fixture(params=list(FILE_SYSTEMS))
def elsewhere(request: pytest.FixtureRequest, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[str]:
    """The work area is on another file system."""
    make, place, image = FILE_SYSTEMS[request.param], tmp_path / "area", tmp_path / "image"
    if make and shutil.which(make[0], path=os.environ["PATH"] + ":/usr/sbin:/sbin") is None:
        pytest.skip(f"{make[0]} is not installed")
    place.mkdir()
    if make:
        with open(image, "wb") as file:
            file.truncate(400 * MIB)
        subprocess.run(
            [*make, str(image)], check=True, env=os.environ | {"PATH": os.environ["PATH"] + ":/usr/sbin:/sbin"}
        )
        mount = ["mount", "-o", "loop", str(image), str(place)]
    else:
        mount = ["mount", "-t", "tmpfs", "-o", "size=400M", "tmpfs", str(place)]
    mounted = subprocess.run(mount, capture_output=True, text=True, check=False)
    if mounted.returncode != 0:
        pytest.skip(f"{request.param} cannot be mounted here: {mounted.stderr.strip()}")
    monkeypatch.setenv("XDG_STATE_HOME", str(place))
    monkeypatch.setattr(diskspace, "KEEP_BYTES", 0)
    try:
        yield request.param
    finally:
        subprocess.run(["umount", place], check=True)


@pytest.mark.root
@pytest.mark.timeout(60)
def test_it_works_on_other_file_systems(elsewhere: str, workspace: Path) -> None:
    (workspace / "tree").mkdir()
    (workspace / "tree" / "old").touch()
    with SyncSandbox(str(workspace), keep=True) as box:
        sh(box, "head -c 8M /dev/urandom >big; rm file.txt; rm -r tree; mkdir tree; echo 1 >tree/new; ln big same")
        sh(box, f'{PYTHON} -c \'import os; os.setxattr("big", "user.note", b"x")\'; sleep 0.1')
        first = box.snapshot()
        sh(box, "echo 2 >tree/newer")
        second = box.snapshot()
        content = sh(box, "sha256sum big")
        assert 8 * MIB <= first.disk < 9 * MIB
        assert second.disk < MIB  # the rest are hard links
        said, there = totals()
        assert 8 * MIB <= there <= said < 10 * MIB
    assert box.kept is not None

    def look(layer: KeptLayer) -> str:
        with SyncSandbox(str(workspace), on=layer) as other:
            return sh(other, "ls; ls tree; sha256sum big")

    assert look(first) == f"big\nsame\ntree\nnew\n{content}"
    assert look(second) == look(box.kept) == f"big\nsame\ntree\nnew\nnewer\n{content}"
    for layer in (first, second):  # one holds what the other has too
        layer.discard()
    assert look(box.kept).startswith("big")
    box.kept.discard()
    assert totals()[1] == 0
