"""Beginning on a kept layer: going on, forks that share, snapshots of what runs, and going back."""

from __future__ import annotations

import asyncio
import errno
import json
import os
import threading
import time
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path
from typing import Any

import pytest
from hypothesis import HealthCheck, given, settings

from corral.errors import CorralError, RequestError, SandboxClosed
from corral.log.events import FilesSet, SnapshotTaken
from corral.log.places import open_log
from corral.policy.load import parse_policy
from corral.sandbox import asowner, copying, registry
from corral.sandbox.apply.proposing import propose
from corral.sandbox.apply.undo import undo
from corral.sandbox.box import Sandbox
from corral.sandbox.changes import ChangeKind
from corral.sandbox.compare import same_content
from corral.sandbox.core import Core, State
from corral.sandbox.layer import KeptLayer, list_layers
from corral.sandbox.sync import SyncSandbox
from tests.contain.applies import look
from tests.contain.command_line import CommandLine, adopting_orphans
from tests.contain.conftest import MakeBox, own_sandbox_processes
from tests.contain.logs import Disk, events, verified
from tests.contain.test_apply import DO, OPERATIONS, PYTHON, in_short

pytestmark = pytest.mark.usefixtures("state")


def run(workspace: Path, script: str, on: KeptLayer | None = None) -> tuple[str, KeptLayer]:
    with SyncSandbox(str(workspace), keep=True, on=on) as box:
        result = box.exec(["sh", "-ec", script])
        assert result.exit_code == 0, result
    assert box.kept is not None
    return result.text, box.kept


def paths(layer: KeptLayer) -> dict[str, ChangeKind]:
    return {change.path: change.kind for change in layer.changes()}


def partials(state: Path) -> list[str]:
    return [path.name for path in (state / "corral" / "layers").iterdir() if path.name.startswith("partial")]


def test_a_run_goes_on_where_another_ended(workspace: Path, state: Path) -> None:
    """In all that is kept: the workspace, home, and the system's trees."""
    (workspace / "old").mkdir()
    (workspace / "old" / "file").write_text("old")
    _, first = run(workspace, "echo 1 >new; rm -r old; echo more >>file.txt; echo h >~/home; echo s >~/gone")
    shown, second = run(
        workspace, "cat new file.txt ~/home; ls; rm ~/gone; rm file.txt; mkdir old; echo 2 >old/second", first
    )
    assert shown == "1\noriginal\nmore\nh\nfile.txt\nnew\n"
    shown, _ = run(workspace, "ls -A old; touch x", second)
    assert shown == "second\n"  # what lay in it before is not there again
    assert paths(second)[f"{workspace}/old/file"] is ChangeKind.DELETED
    shown, third = run(workspace, "cat old/second; ls -A ~ old; ls; rm -r old", second)
    assert "2\n" in shown and "gone" not in shown and "file.txt" not in shown
    assert (second.parent, third.parent, third.began) == (first.id, second.id, first.began)
    home = next(part.path for part in third.parts if part.name == "home")
    assert paths(third) == {
        f"{workspace}/new": ChangeKind.ADDED,
        f"{workspace}/old": ChangeKind.DELETED,
        f"{workspace}/file.txt": ChangeKind.DELETED,
        f"{home}/home": ChangeKind.ADDED,
    }
    assert f"{workspace}/old/second" in paths(second)
    # None needs what it was begun on.
    first.discard()
    second.discard()
    assert partials(state) == []
    assert paths(third)[f"{workspace}/new"] is ChangeKind.ADDED
    proposal = propose(third)
    undo(proposal.apply(proposal.hash).id)


def test_a_base_is_never_changed(workspace: Path) -> None:
    _, first = run(workspace, "echo one >a; mkdir d; echo two >d/b; chmod 600 a")
    before = paths(first)
    with first.reading() as parts:
        place = Path(os.readlink(f"/proc/self/fd/{parts}"))
        seen = look(place)
        run(workspace, "echo x >a; rm -r d; echo y >>a; chmod 777 a; setfattr -n user.x -v y a || :", first)
        run(workspace, "echo other >d/b", first)
        assert look(place) == seen
    assert paths(first) == before


def test_what_was_not_changed_again_is_shared_on_disk(workspace: Path) -> None:
    _, first = run(workspace, "head -c 1000000 /dev/zero >big; echo x >small")
    _, second = run(workspace, "echo y >small", first)
    with first.reading() as one, second.reading() as two:
        assert os.stat("workspace/big", dir_fd=one).st_ino == os.stat("workspace/big", dir_fd=two).st_ino
        assert os.stat("workspace/small", dir_fd=one).st_ino != os.stat("workspace/small", dir_fd=two).st_ino


async def test_forks_do_not_see_one_another(make_box: MakeBox, state: Path) -> None:
    box = await make_box()
    assert (await box.exec(["sh", "-c", "echo shared >shared; mkdir dir; echo 0 >dir/n"])).exit_code == 0
    forks = await box.fork(100)
    try:
        script = "cat shared dir/n; echo $0 >dir/n; echo $0 >own-$0; rm shared; sleep 0.2; ls; cat dir/n"
        found = await asyncio.gather(*(fork.exec(["sh", "-c", script, str(n)]) for n, fork in enumerate(forks)))
        for number, result in enumerate(found):
            assert result.text == f"shared\n0\ndir\nfile.txt\nown-{number}\n{number}\n"
        assert len({fork.id for fork in (*forks, box)}) == 101
        assert (await box.exec(["sh", "-c", "ls; cat dir/n"])).text == "dir\nfile.txt\nshared\n0\n"
        assert list_layers() == []
        assert partials(state) != []  # they still read it
    finally:
        for fork in forks:
            await fork.close()
    assert partials(state) == []


async def test_a_fork_tells_what_it_has_changed(make_box: MakeBox, workspace: Path) -> None:
    """Of what it was begun on, which nobody finds any more."""
    box = await make_box()
    await box.exec(["sh", "-c", "mkdir d; echo 1 >d/one; echo 2 >d/two; echo 3 >d/three; chmod 600 d/three"])
    (fork,) = await box.fork()
    try:
        await fork.exec(["sh", "-c", "rm d/one; echo more >>d/two; echo 4 >d/four"])
        found = {change.path: change.kind for change in await fork.changes() if change.part == "workspace"}
    finally:
        await fork.close()
    assert found == {
        f"{workspace}/d/one": ChangeKind.DELETED,
        f"{workspace}/d/two": ChangeKind.CHANGED,
        f"{workspace}/d/four": ChangeKind.ADDED,
    }


async def test_a_snapshot_is_one_moment(make_box: MakeBox, workspace: Path) -> None:
    """A writer that counts in one file and then in another is never one behind by more than what it had begun."""
    box = await make_box()
    writer = """
import os
for number in range(10_000_000):
    for name in ("a", "b"):
        with open(name + ".new", "w") as file:
            file.write(str(number))
            file.flush()
            os.fsync(file.fileno())
        os.rename(name + ".new", name)
"""
    process = await box.start_process([PYTHON, "-c", writer])
    while (await box.exec(["test", "-e", "b"])).exit_code:
        await asyncio.sleep(0.01)
    snapshots = []
    for number in range(8):
        snapshots.append(await box.snapshot(f"number {number}"))
        last = await box.read_file(f"{workspace}/b")
        while await box.read_file(f"{workspace}/b") == last:
            await asyncio.sleep(0.01)
    process.kill()
    seen = []
    for snapshot in snapshots:
        with snapshot.reading() as parts:
            numbers = [int(Path(f"/proc/self/fd/{parts}/workspace/{name}").read_text()) for name in ("a", "b")]
        assert numbers[0] - numbers[1] in (0, 1)
        seen.append(numbers[1])
    assert seen == sorted(set(seen))
    assert [snapshot.parent for snapshot in snapshots] == ["", *(snapshot.id for snapshot in snapshots[:-1])]
    assert [layer.name for layer in list_layers()] == [f"number {number}" for number in range(8)]
    assert (await box.exec(["echo", "still there"])).text == "still there\n"


async def test_a_snapshot_copies_only_what_is_new(make_box: MakeBox) -> None:
    """By whatever means: written, renamed over, moved with its directory, of the same length and time."""
    box = await make_box()
    await box.exec(["sh", "-c", "mkdir d e; for n in 1 2 3 4 5 6; do echo $n$n >d/$n; echo $n- >e/$n; done; sleep 0.2"])
    first = await box.snapshot()
    script = """
        printf 99 | dd of=d/1 conv=notrunc status=none; touch -r d/2 d/1
        echo 88 >new; touch -r d/2 new; mv new d/3
        chmod 600 d/4; ln d/5 hard; rm d/6; mv d x; mv e d; mv x e
    """
    assert (await box.exec(["sh", "-ec", script])).exit_code == 0
    second = await box.snapshot()
    seen = (await box.exec(["sh", "-c", "cat d/? e/? hard; stat -c %a e/4"])).text
    forked = await make_box(on=second)
    assert (await forked.exec(["sh", "-c", "cat d/? e/? hard; stat -c %a e/4"])).text == seen
    with first.reading() as one, second.reading() as two:
        shared = {
            name
            for name, then in (("e/1", "d/1"), ("e/2", "d/2"), ("e/3", "d/3"), ("e/4", "d/4"), ("d/1", "e/1"))
            if os.stat(f"workspace/{then}", dir_fd=one).st_ino == os.stat(f"workspace/{name}", dir_fd=two).st_ino
        }
    assert shared == {"e/2", "d/1"}
    # Where the last one is gone, all is copied.
    second.discard()
    third = await box.snapshot()
    assert (await (await make_box(on=third)).exec(["sh", "-c", "cat d/? e/? hard; stat -c %a e/4"])).text == seen


async def test_what_is_written_through_a_mapping_is_in_the_snapshot(make_box: MakeBox, workspace: Path) -> None:
    """It changes no time on tmpfs."""
    box = await make_box()
    script = """
import mmap, os, sys, time
with open("mapped", "wb") as file:
    file.write(b"a" * 4096)
with open("mapped", "r+b") as file:
    mapped = mmap.mmap(file.fileno(), 4096)
print(mapped[:1], flush=True)
time.sleep(0.2)
for line in sys.stdin:
    mapped[:1] = line[:1].encode()
    print("written", flush=True)
"""
    process = await box.start_process([PYTHON, "-c", script])
    assert await process.stdout.readline() == b"b'a'\n"
    await asyncio.sleep(0.3)
    for letter in "bcd":
        await process.write(f"{letter}\n".encode())
        assert await process.stdout.readline() == b"written\n"
        snapshot = await box.snapshot()
        with snapshot.reading() as parts:
            assert Path(f"/proc/self/fd/{parts}/workspace/mapped").read_bytes()[:1] == letter.encode()


async def test_content_is_compared_unless_nothing_can_have_run(
    make_box: MakeBox, workspace: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    box = await make_box()
    await box.exec(["sh", "-c", "echo 1 >one; echo 2 >two; sleep 0.1"])
    compared = 0

    def count(*fds: int) -> bool:
        nonlocal compared
        compared += 1
        return same_content(*fds)

    monkeypatch.setattr(copying, "same_content", count)

    async def comparisons() -> int:
        nonlocal compared
        compared = 0
        last = await box.snapshot()
        with last.reading() as parts:
            assert Path(f"/proc/self/fd/{parts}/workspace/one").read_bytes() == b"1\n"
        return compared

    assert await comparisons() == 0  # there is none before it
    assert await comparisons() == 0
    await box.write_file(f"{workspace}/two", b"changed")  # from outside, which its times tell
    assert await comparisons() == 0
    snapshot = await box.snapshot()
    with snapshot.reading() as parts:
        assert Path(f"/proc/self/fd/{parts}/workspace/two").read_bytes() == b"changed"
    await asyncio.sleep(0.1)
    await box.snapshot()
    assert await comparisons() == 0
    await box.exec(["true"])
    assert await comparisons() == 2
    assert await comparisons() == 0
    process = await box.start_process(["sleep", "600"])
    assert await comparisons() == 2
    assert await comparisons() == 2  # it may have a mapping
    process.kill()
    await process.wait()
    assert await comparisons() == 2
    assert await comparisons() == 0
    await box.exec(["sh", "-c", "sleep 600 &"])
    await box.snapshot()
    assert await comparisons() == 2
    await box.close()


async def test_snapshots_at_once_and_cancelled_ones_disturb_nothing(make_box: MakeBox) -> None:
    box = await make_box()
    await box.exec(["sh", "-c", "mkdir d; for n in 1 2 3 4 5 6 7 8 9; do echo $n >d/$n; done; sleep 0.1"])
    snapshots = await asyncio.gather(*(box.snapshot(str(number)) for number in range(6)))
    cancelled = asyncio.ensure_future(box.snapshot("cancelled"))
    while not box.core.is_kept_still:
        await asyncio.sleep(0)
    cancelled.cancel()
    await asyncio.wait([cancelled])
    assert (await box.exec(["echo", "goes on"])).text == "goes on\n"
    assert sorted(layer.name for layer in list_layers() if layer.name) == ["0", "1", "2", "3", "4", "5"]
    for snapshot in snapshots:
        forked = await make_box(on=snapshot)
        assert (await forked.exec(["sh", "-c", "cat d/?"])).text == "1\n2\n3\n4\n5\n6\n7\n8\n9\n"
    closing = asyncio.gather(box.snapshot("late"), box.close(), return_exceptions=True)
    await asyncio.wait_for(closing, 60)


def test_a_part_has_another_name_under_another_policy(workspace: Path, tmp_path: Path) -> None:
    trees = [tmp_path / name for name in ("a", "b")]
    for tree in trees:
        tree.mkdir()
    narrow, wide = (
        parse_policy(f"filesystem: {{write: {[str(tree) for tree in some]}}}\n", source="test.yaml")
        for some in (trees[1:], trees)
    )
    with SyncSandbox(str(workspace), keep=True, policy=narrow) as box:
        assert box.exec(["sh", "-c", f"echo b >{trees[1]}/new"]).exit_code == 0
    assert box.kept is not None
    with SyncSandbox(str(workspace), keep=True, policy=wide, on=box.kept) as again:
        assert again.exec(["sh", "-c", f"cat {trees[1]}/new; echo a >{trees[0]}/own"]).text == "b\n"
    assert again.kept is not None
    assert paths(again.kept) == {f"{trees[0]}/own": ChangeKind.ADDED, f"{trees[1]}/new": ChangeKind.ADDED}


async def test_names_that_no_call_can_follow_are_copied(make_box: MakeBox) -> None:
    box = await make_box()
    name = "\u6f22" * 60
    await box.exec(["sh", "-c", f"for n in $(seq 25); do mkdir {name}; cd {name}; done; echo x >f"])
    await asyncio.sleep(0.1)
    assert len({(await box.snapshot()).id for _ in range(3)}) == 3


async def test_a_sandbox_goes_back_and_on(make_box: MakeBox) -> None:
    box = await make_box()
    empty = await box.snapshot("begin")
    await box.exec(["sh", "-c", "echo one >one; echo kept >~/note"])
    one = await box.snapshot("one")
    process = await box.start_process(["sh", "-c", "rm one; echo two >two; sleep 600"])
    while (await box.exec(["test", "-e", "two"])).exit_code:
        await asyncio.sleep(0.01)
    before = box.id
    await box.restore(one)
    assert (await box.exec(["sh", "-c", "ls; cat ~/note; pgrep sleep"])).text == "file.txt\none\nkept\n"
    assert box.id != before
    with pytest.raises(SandboxClosed, match=f"set back to the layer {one.id}"):
        await process.wait()
    await box.restore(empty)
    assert (await box.exec(["sh", "-c", "ls -A . ~"])).text.split("\n\n")[0].endswith("file.txt")
    await box.restore(one)
    assert (await box.exec(["cat", "one"])).text == "one\n"


async def test_a_snapshot_of_nothing_can_be_begun_on(make_box: MakeBox) -> None:
    snapshot = await (await make_box()).snapshot()
    assert snapshot.changes() == []
    assert (await (await make_box(on=snapshot)).exec(["cat", "file.txt"])).text == "original\n"


def test_what_does_not_fit_is_refused(workspace: Path, tmp_path: Path) -> None:
    beside = tmp_path / "beside"
    beside.mkdir()
    policy = parse_policy(f"filesystem: {{write: ['{beside}']}}\n", source="test.yaml")
    with SyncSandbox(str(workspace), keep=True, policy=policy) as box:
        assert box.exec(["sh", "-c", f"echo x >{beside}/new"]).exit_code == 0
    assert box.kept is not None
    with pytest.raises(RequestError, match="does not let be changed"):
        SyncSandbox(str(workspace), on=box.kept).start()
    with pytest.raises(RequestError, match="is of the workspace"):
        SyncSandbox(str(beside), on=box.kept).start()
    with SyncSandbox(str(workspace), policy=policy, on=box.kept) as again:
        assert again.exec(["cat", f"{beside}/new"]).text == "x\n"
    box.kept.discard()
    with pytest.raises(RequestError, match="there is no layer"):
        SyncSandbox(str(workspace), on=box.kept).start()


def test_closed_directories_go_on_too(workspace: Path) -> None:
    """What an ordinary user can only read as its owner."""
    _, first = run(workspace, "mkdir closed; echo x >closed/file; chmod 0 closed; mkdir open; echo y >open/z")
    shown, second = run(
        workspace, "stat -c %a closed; chmod 700 closed; cat closed/file; rm open/z; chmod 0 open", first
    )
    assert shown == "0\nx\n"
    shown, _ = run(workspace, "stat -c %a closed open; chmod 700 open; ls -A open closed; echo 1 >one", second)
    assert shown == "700\n0\nclosed:\nfile\n\nopen:\n"


STEPS = parse_policy("filesystem: {snapshot: step}\n", source="test.yaml")


def test_each_step_can_be_gone_back_to(workspace: Path) -> None:
    """A step is a command that was run from outside."""
    with SyncSandbox(str(workspace), policy=STEPS, keep=True) as box:
        for number in range(3):
            assert box.exec(["sh", "-c", f"echo {number} >file-{number}; exit {number}"]).exit_code == number
        steps = [layer for layer in list_layers() if layer.session == box.id]
        assert [layer.step for layer in steps] == [0, 1, 2, 3]
        assert [layer.parent for layer in steps] == ["", *(layer.id for layer in steps[:-1])]
        assert [sorted(os.path.basename(path) for path in paths(layer)) for layer in steps] == [
            [f"file-{number}" for number in range(count)] for count in range(4)
        ]
        assert [paths(layer) for layer in steps] == [
            {change.path: change.kind for change in layer.changes_since(steps[0])} for layer in steps
        ]
        box.restore(steps[1])
        assert box.exec(["sh", "-c", "ls; echo >new"]).text == "file-0\nfile.txt\n"
        after = [layer for layer in list_layers() if layer.session == box.id]
        assert [(layer.step, layer.parent) for layer in after] == [(0, steps[1].id), (1, after[0].id)]
    assert box.kept is not None
    assert (box.kept.parent, box.kept.session, box.kept.step) == (after[1].id, box.id, None)


async def test_without_the_snapshot_of_a_step_nothing_goes_on(
    make_box: MakeBox, monkeypatch: pytest.MonkeyPatch
) -> None:
    """What comes then could not be taken back."""
    box = await make_box(policy=STEPS)

    def full(*_: object, **__: object) -> None:
        raise CorralError("the changes cannot be kept: no space")

    monkeypatch.setattr("corral.sandbox.snapshots.keep", full)
    await box.exec(["true"])
    assert await asyncio.wait_for(box.wait_ended(), 10) == (
        "the snapshot of step 1 could not be taken: the changes cannot be kept: no space"
    )
    with pytest.raises(CorralError, match="no space"):
        await make_box(policy=STEPS)


async def test_a_command_that_comes_during_a_snapshot_waits(make_box: MakeBox) -> None:
    box = await make_box()
    await box.exec(["sh", "-c", "head -c 30M /dev/urandom >big"])
    taking = asyncio.ensure_future(box.snapshot())
    while not box.core.is_kept_still:
        await asyncio.sleep(0)
    assert (await box.exec(["echo", "after"])).text == "after\n"
    assert taking.done()


KEEPS = parse_policy("filesystem: {restore_keeps: ['**/sleep']}\n", source="test.yaml")


async def test_going_back_in_place_keeps_what_policy_names(make_box: MakeBox, workspace: Path) -> None:
    """And tells it, and whoever waits for what was killed."""
    box = await make_box(policy=KEEPS)
    begin = await box.snapshot("begin")
    await box.exec(["sh", "-ec", "rm file.txt; mkdir -p new/deep closed; echo x >new/deep/file; chmod 0 closed"])
    kept = await box.start_process(["sleep", "600"])
    killed = asyncio.ensure_future(box.exec(["sh", "-c", "echo begun; while :; do :; done"], on_stdout=lambda _: None))
    while "begun" not in (await box.exec(["sh", "-c", "pgrep -f begun >/dev/null && echo begun || :"])).text:
        pass
    before = box.id
    await box.restore(begin)
    assert box.id == before
    result = await asyncio.wait_for(killed, 10)
    assert (result.signal, result.restored) == (9, begin.id)
    assert result.stderr == f"corral: the files were set back to the layer {begin.id} while this ran\n".encode()
    shown = await box.exec(["sh", "-c", "ls; cat file.txt; pgrep -x sleep | wc -l; cat /run/corral/restores.jsonl"])
    *lines, told = shown.text.splitlines()
    assert lines == ["file.txt", "original", "1"]
    assert json.loads(told)["layer"] == begin.id
    assert (await box.exec(["sh", "-c", "echo >/run/corral/restores.jsonl"])).exit_code != 0
    kept.kill()
    assert (await kept.wait()).restored == begin.id
    assert (await box.snapshot()).parent == begin.id
    assert await box.changes() == []


async def test_what_is_killed_to_go_back_cannot_outlive_it(make_box: MakeBox) -> None:
    """Whether it forks, ignores signals, or has a session of its own."""
    box = await make_box(policy=KEEPS)
    begin = await box.snapshot()
    script = """
import os, signal, time
for which in set(signal.Signals) - {signal.SIGKILL, signal.SIGSTOP}:
    signal.signal(which, signal.SIG_IGN)
for _ in range(20):
    if os.fork() == 0:
        os.setsid()
        if os.fork() == 0:
            while True:
                pid = os.fork()
                if pid == 0:
                    open(f"by-{os.getpid()}", "w").close()
                    os._exit(0)
                os.waitpid(pid, 0)
        os._exit(0)
print("ready", flush=True)
time.sleep(600)
"""
    process = await box.start_process([PYTHON, "-c", script])
    assert await process.stdout.readline() == b"ready\n"
    await box.restore(begin)
    await asyncio.sleep(0.2)
    assert (await box.exec(["sh", "-c", "ls; pgrep -c python || :"])).text == "file.txt\n0\n"


async def test_a_layer_that_does_not_fit_kills_nothing(make_box: MakeBox, workspace: Path, tmp_path: Path) -> None:
    beside = tmp_path / "beside"
    beside.mkdir()
    wide = parse_policy(f"filesystem: {{write: ['{beside}']}}\n", source="test.yaml")
    _, other = run(beside, "echo >new")
    wider = await make_box(policy=wide)
    await wider.exec(["sh", "-c", f"echo >{beside}/new"])
    layer = await wider.snapshot()
    box = await make_box(policy=KEEPS)
    process = await box.start_process(["sh", "-c", "read _; echo goes on"])
    for unfit, why in ((other, "is of the workspace"), (layer, "does not let be changed")):
        with pytest.raises(RequestError, match=why):
            await box.restore(unfit)
    await process.write(b"\n")
    assert await process.stdout.readline() == b"goes on\n"


async def test_going_back_half_way_is_the_end(make_box: MakeBox, monkeypatch: pytest.MonkeyPatch) -> None:
    box = await make_box(policy=KEEPS)
    begin = await box.snapshot()
    await box.exec(["sh", "-c", "for n in 1 2 3; do echo >$n; done"])
    monkeypatch.setattr("corral.sandbox.asowner._BOOT", "print('ready', flush=True); import sys; sys.exit(1)")
    with pytest.raises(CorralError):
        await box.restore(begin)
    assert (await asyncio.wait_for(box.wait_ended(), 10)).startswith("its files could not be set back: ")


async def test_what_policy_denies_stays_denied_after_going_back(make_box: MakeBox, workspace: Path) -> None:
    """Also what the host has made there since the start: who sets files back works in the host's mount namespace, where
    removing what is covered inside would uncover it."""
    denied = [f"{workspace}/{name}" for name in (".env", "dir", "old")]
    policy = parse_policy(f"filesystem: {{restore_keeps: ['**/sleep'], deny: {denied}}}\n", source="test.yaml")
    (workspace / "old").write_text("secret")
    box = await make_box(policy=policy)
    other = await make_box()
    await other.exec(["sh", "-c", "echo other >old; mkdir dir; echo >dir/new"])
    begin, elsewhere = await box.snapshot(), await other.snapshot()
    (workspace / ".env").write_text("secret")
    (workspace / "dir").mkdir()
    (workspace / "dir" / "file").write_text("secret")
    for layer in (begin, elsewhere, begin):
        await box.exec(["sh", "-c", "echo >new"])
        await box.restore(layer)
        found = await box.exec(["sh", "-c", "cat .env old; ls -d new dir/*; stat -c %F .env old"])
        assert found.stdout == b"character special file\n" * 2


@pytest.mark.root
async def test_going_back_gives_nobody_what_he_could_not_read(make_box: MakeBox, workspace: Path) -> None:
    """A file of somebody who does not exist inside, under a name that the agent had covered."""
    os.chown(workspace, 1000, 1000)
    box = await make_box(policy=KEEPS)
    begin = await box.snapshot()
    await box.exec(["sh", "-c", "echo >secret"])
    (workspace / "secret").write_text("secret")
    os.chown(workspace / "secret", 300_001, 300_001)
    (workspace / "secret").chmod(0o640)
    with pytest.raises(CorralError, match="others may not read it"):
        await box.restore(begin)
    await asyncio.wait_for(box.wait_ended(), 10)


async def test_the_directory_of_the_workspace_goes_back_too(make_box: MakeBox, workspace: Path) -> None:
    box = await make_box(policy=KEEPS)
    begin = await box.snapshot()
    await box.exec(["sh", "-c", "chmod 500 .; chmod 1777 ~"])
    await box.restore(begin)
    mode = f"{workspace.stat().st_mode & 0o777:o}"
    assert (await box.exec(["sh", "-c", "stat -c %a . ~; echo >new"])).text == f"{mode}\n755\n"


async def test_what_removed_much_to_fill_its_disk_can_be_set_back(make_box: MakeBox) -> None:
    policy = parse_policy("filesystem: {restore_keeps: ['**/sleep']}\nresources: {disk: 64MiB}\n", source="test.yaml")
    box = await make_box(policy=policy)
    await box.exec(["sh", "-c", "head -c 40M /dev/zero >a"])
    begin = await box.snapshot()
    await box.exec(["sh", "-c", "rm a; head -c 70M /dev/zero >z"])
    await box.restore(begin)
    assert (await box.exec(["sh", "-c", "ls; stat -c %s a"])).text == "a\nfile.txt\n41943040\n"


async def test_a_process_without_its_first_thread_does_not_outlive_going_back(make_box: MakeBox) -> None:
    """It looks as if it had ended."""
    box = await make_box(policy=KEEPS)
    begin = await box.snapshot()
    script = """
import ctypes, threading, time
def go_on():
    print("ready", flush=True)
    while True:
        open("alive", "w").close()
        time.sleep(0.01)
threading.Thread(target=go_on).start()
ctypes.CDLL(None).syscall(60, 0)
"""
    process = await box.start_process([PYTHON, "-c", script])
    assert await process.stdout.readline() == b"ready\n"
    await box.restore(begin)
    await asyncio.sleep(0.1)
    assert (await box.exec(["ls"])).text == "file.txt\n"


async def test_a_sandbox_that_ends_while_it_goes_back_leads_nowhere_else(
    make_box: MakeBox, workspace: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Its descriptors are closed when it ends, and their numbers are given to others."""
    box = await make_box(policy=KEEPS)
    begin = await box.snapshot()
    await box.exec(["sh", "-c", "echo >new"])
    outside = tmp_path / "outside"
    victim = Path(f"{outside}{workspace}") / "new"
    victim.parent.mkdir(parents=True)
    victim.touch()
    for path in (outside, *outside.rglob("*")):
        path.chmod(0o777)
    start, root = asowner.begin, box.core.root_fd
    opened: list[int] = []

    def begin_late(*arguments: Any, **options: Any) -> asowner.Helper:
        box.kill()
        while box.core.state is not State.ENDED:
            time.sleep(0.001)
        while not opened or opened[-1] < root:
            opened.append(os.open(outside, os.O_RDONLY | os.O_DIRECTORY))
        return start(*arguments, **options)

    monkeypatch.setattr(asowner, "begin", begin_late)
    try:
        with pytest.raises(CorralError):
            await box.restore(begin)
        assert root in opened
        assert victim.exists()
    finally:
        for fd in opened:
            os.close(fd)


async def test_nobody_else_lets_it_go_on_while_it_goes_back(make_box: MakeBox, monkeypatch: pytest.MonkeyPatch) -> None:
    box = await make_box(policy=KEEPS)
    begin = await box.snapshot()
    entered, leave, set_back = threading.Event(), threading.Event(), Core.set_back

    def set_back_late(core: Core, *arguments: Any) -> None:
        entered.set()
        assert leave.wait(10)
        set_back(core, *arguments)

    monkeypatch.setattr(Core, "set_back", set_back_late)
    going = asyncio.create_task(box.restore(begin))
    assert await asyncio.to_thread(entered.wait, 10)
    connection, entry = await asyncio.to_thread(registry.find_sandbox, box.id)
    try:
        for verb in ("freeze", "thaw"):
            registry.send(connection.socket, {"verb": verb, "id": entry.id})
        answer = asyncio.create_task(asyncio.to_thread(connection.answer))
        await asyncio.sleep(0.1)
        assert (box.state, answer.done()) == (State.FROZEN, False)
        leave.set()
        await going
        with suppress(RequestError):  # where it takes a moment, the one says that it was thawed before all had stopped
            assert (await answer)[0] == {"done": True}
            assert (await asyncio.to_thread(connection.answer))[0] == {"done": True}
    finally:
        leave.set()
        connection.close()
    assert (await box.exec(["ls"])).text == "file.txt\n"


async def test_a_freeze_that_is_undone_at_once_is_not_the_end(
    make_box: MakeBox, monkeypatch: pytest.MonkeyPatch
) -> None:
    box = await make_box()
    monkeypatch.setattr(Core, "frozen", lambda _: False)  # so long it takes
    connection, entry = await asyncio.to_thread(registry.find_sandbox, box.id)
    try:
        for verb in ("freeze", "thaw"):
            registry.send(connection.socket, {"verb": verb, "id": entry.id})
        assert (await asyncio.to_thread(connection.answer))[0] == {"done": True}
        with pytest.raises(RequestError, match="thawed before"):
            await asyncio.to_thread(connection.answer)
    finally:
        connection.close()


async def _begun(box: Sandbox) -> None:
    while not box.core.is_kept_still:
        await asyncio.sleep(0)


async def test_who_hangs_up_leaves_no_snapshot(make_box: MakeBox) -> None:
    box = await make_box()
    connection, entry = await asyncio.to_thread(registry.find_sandbox, box.id)
    registry.send(connection.socket, {"verb": "snapshot", "id": entry.id})
    connection.close()
    await _begun(box)
    await box.exec(["true"])  # which waits for it
    assert list_layers() == []
    first = await box.snapshot()
    connection, _ = await asyncio.to_thread(registry.find_sandbox, box.id)
    registry.send(connection.socket, {"verb": "snapshot", "id": entry.id})
    connection.close()
    await _begun(box)
    assert (await box.snapshot()).parent == first.id  # and not the one that nobody has


async def test_who_closes_it_meanwhile_leaves_no_sandbox(make_box: MakeBox) -> None:
    box = await make_box()
    begin = await box.snapshot()
    going = asyncio.create_task(box.restore(begin))
    await asyncio.sleep(0)
    await box.close()
    with pytest.raises(SandboxClosed, match="closed"):
        await going
    assert own_sandbox_processes() == []


async def test_states_are_recorded(make_box: MakeBox, tmp_path: Path) -> None:
    """Going back before it happens."""
    log = open_log(tmp_path / "log")
    try:
        box = await make_box(policy=KEEPS, log=log)
        first = await box.snapshot("first")
        await box.exec(["sh", "-c", "echo 12345 >new"])
        second = await box.snapshot()
        await box.restore(first)
        third = await box.snapshot()
        fork = await make_box(log=log, on=second)
        await fork.close()
        await box.close()
    finally:
        log.close()
    assert verified(tmp_path / "log")
    assert events(tmp_path / "log", SnapshotTaken) == [
        SnapshotTaken(first.id, "first", "", None, 0, 0),
        SnapshotTaken(second.id, "", first.id, None, 1, 6),
        SnapshotTaken(third.id, "", first.id, None, 0, 0),
    ]
    assert events(tmp_path / "log", FilesSet) == [FilesSet(first.id), FilesSet(second.id)]


async def test_what_cannot_be_recorded_is_not_set_back(
    make_box: MakeBox, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    log = open_log(tmp_path / "log")
    try:
        box = await make_box(policy=KEEPS, log=log)
        first = await box.snapshot()
        await box.exec(["sh", "-c", "echo >new"])
        disk = Disk(monkeypatch)
        disk.works.clear()
        going = asyncio.create_task(box.restore(first))
        await asyncio.sleep(0.2)
        assert not going.done() and [change.path for change in await box.changes()] != []
        disk.error = errno.EIO
        disk.works.set()
        with pytest.raises(SandboxClosed):  # by whichever of its threads has heard of it first
            await going
        assert await asyncio.wait_for(box.wait_ended(), 10)
        assert [change.path for change in await box.changes()] != []
    finally:
        with suppress(CorralError):
            log.close()


@settings(max_examples=20, deadline=None, suppress_health_check=list(HealthCheck))
@given(first=OPERATIONS, then=OPERATIONS, last=OPERATIONS)
def test_layers_on_layers_are_what_the_runs_saw(
    tmp_path_factory: pytest.TempPathFactory, first: list[object], then: list[object], last: list[object]
) -> None:
    """And what is applied of the last is what it saw, and undone it is what was there."""
    real = tmp_path_factory.mktemp("model") / "real"
    real.mkdir(mode=0o755)
    (real / "dir" / "sub").mkdir(parents=True)
    (real / "dir" / "c").write_text("c")
    (real / "other").mkdir()
    (real / "a").write_text("a" * 100)
    before = look(real)
    layer: KeptLayer | None = None
    shown = None
    for operations in (first, then, last):
        with SyncSandbox(str(real), keep=True, on=layer) as box:
            seen = json.loads(box.exec([PYTHON, "-c", DO, str(real), "[]"]).text)
            assert shown is None or seen == shown
            result = box.exec([PYTHON, "-c", DO, str(real), repr(operations)])
            assert result.exit_code == 0, result
        if box.kept is not None or layer is None:
            shown, layer = json.loads(result.text), box.kept
    if layer is None:
        return
    proposal = propose(layer)
    assert proposal.conflicts == ()

    if proposal.steps:
        made = proposal.apply(proposal.hash)
        assert {name: in_short(row) for name, row in look(real).items()} == shown
        undo(made.id)
    assert look(real) == before


# ---- the command line ----


@pytest.fixture
def cli(tmp_path: Path, workspace: Path) -> Iterator[CommandLine]:
    (tmp_path / "state").rmdir()
    with adopting_orphans():
        yield CommandLine(tmp_path, workspace)


def test_an_operator_goes_on(cli: CommandLine, workspace: Path) -> None:
    assert cli.run("--", "sh", "-c", "echo 1 >one").returncode == 0
    (first,) = (line.split()[0] for line in cli("diff", "--list").stdout.decode().splitlines())
    done = cli.run("--on", first, "--", "sh", "-c", "cat one; echo 2 >two")
    assert done.stdout == b"1\n"
    assert cli("apply", "--yes").returncode == 0
    assert sorted(os.listdir(workspace)) == ["file.txt", "one", "two"]
    assert cli.run("--on", "aaaaaaaa", "--", "true").returncode == 125


def test_an_operator_keeps_states_of_what_runs(cli: CommandLine, workspace: Path) -> None:
    script = "echo 1 >one; echo ready; read _; echo 2 >two; rm file.txt; echo ready; read _"
    with cli.live("--", "sh", "-c", script) as (sandbox, process):
        assert process.stdin is not None and process.stdout is not None
        taken = []
        for name in ("before \u202e it", ""):
            assert process.stdout.readline() == b"ready\n"
            answer = json.loads(cli("snapshot", sandbox, "--name", name, "--json").stdout)
            assert answer["name"] == name
            taken.append(answer["layer"])
            process.stdin.write(b"\n")
            process.stdin.flush()
        assert process.wait(30) == 0
    rows = json.loads(cli("diff", *taken, "--json").stdout)
    assert {(os.path.basename(row["path"]), row["kind"]) for row in rows} == {("two", "added"), ("file.txt", "deleted")}
    rows = json.loads(cli("snapshot", "--list", "--json").stdout)
    assert [(row["id"], row["parent"]) for row in rows] == [
        (taken[0], None),
        (taken[1], taken[0]),
        (sandbox, taken[1]),
    ]
    tree = cli("snapshot", "--list", sandbox).stdout.decode()
    assert taken[0] in tree and "\u202e" not in tree
    assert cli("snapshot", sandbox).returncode == 125  # it has ended
    assert cli("snapshot").returncode == 125
    assert cli("run", "--on", taken[0], "--", "ls").stdout == b"file.txt\none\n"


def test_an_operator_sets_files_back(cli: CommandLine, workspace: Path, tmp_path: Path) -> None:
    policy = tmp_path / "policy.yaml"
    policy.write_text("filesystem: {restore_keeps: ['/**/dash', '/**/sh', '/**/bash']}\n")
    script = "echo ready; read _; echo 1 >one; rm file.txt; echo ready; read _; ls"
    with cli.live("--policy", str(policy), "--", "sh", "-c", script) as (sandbox, process):
        assert process.stdin is not None and process.stdout is not None
        assert process.stdout.readline() == b"ready\n"
        layer = cli("snapshot", sandbox).stdout.decode().strip()
        process.stdin.write(b"\n")
        process.stdin.flush()
        assert process.stdout.readline() == b"ready\n"
        assert cli("restore", sandbox, layer).returncode == 0
        assert cli("restore", sandbox, "aaaaaaaa").returncode == 125
        out, err = process.communicate(b"\n", 30)
    assert (process.returncode, out) == (0, b"file.txt\n")
    assert f"set back to the layer {layer}".encode() in err


def test_an_operator_forks_what_runs(cli: CommandLine, workspace: Path) -> None:
    script = "echo 1 >one; echo ready; read _; ls; cat one"
    with cli.live("--", "sh", "-c", script) as (sandbox, process):
        assert process.stdin is not None and process.stdout is not None
        assert process.stdout.readline() == b"ready\n"
        script = "cat one; echo 2 >one; echo >two; pgrep -c sh; exit 7"
        done = cli("fork", "--discard", sandbox, "--", "sh", "-c", script)
        assert (done.returncode, done.stdout) == (7, b"1\n1\n")
        assert cli("fork", sandbox, "--", "sh", "-c", "echo 3 >three").returncode == 0
        out, _ = process.communicate(b"\n", 30)
    assert out == b"file.txt\none\n1\n"
    kept = json.loads(cli("snapshot", "--list", "--json").stdout)
    assert len(kept) == 2  # of the second fork, and of the run: the snapshots were for the forks only
    assert cli("fork", sandbox, "--", "true").returncode == 125
    assert cli("fork", sandbox).returncode in (2, 125)


def test_an_operator_applies_what_was_there_after_a_step(cli: CommandLine, workspace: Path) -> None:
    with SyncSandbox(str(workspace), policy=STEPS, keep=True) as box:
        for number in (1, 2, 3):
            box.exec(["sh", "-c", f"mkdir -p src; echo {number} >src/a; echo {number} >new-{number}"])
    shown = cli("apply", "--step", "2", "--dry-run", "--json").stdout
    assert {entry["path"] for entry in json.loads(shown)["changes"]} == {"src", "src/a", "new-1", "new-2"}
    assert cli("apply", "--step", "2", "--yes", "src/").returncode == 0
    assert (workspace / "src" / "a").read_text() == "2\n"
    assert sorted(os.listdir(workspace)) == ["file.txt", "src"]
    refused = cli("apply", "--step", "7", "--yes")
    assert refused.returncode == 125 and b"no snapshot of step 7" in refused.stderr
