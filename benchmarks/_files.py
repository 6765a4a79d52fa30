"""What it costs to take a snapshot, to go back, to fork, and to apply, beside what others do for the same."""

from __future__ import annotations

import asyncio
import os
import shutil
import statistics
import subprocess
import sys
import time
from pathlib import Path

from _common import Row, clock, compare, in_turns, p95

from corral import Sandbox
from corral.policy.model import Filesystem, Policy
from corral.sandbox.apply.proposing import propose
from corral.sandbox.apply.undo import undo
from corral.sandbox.layer import KeptLayer, list_layers

QUIET, LIVE, FROZEN, RESTORE = 3.0, 20.0, 10.0, 10.0
"""Milliseconds, at most."""
FORK, MANY = 1.2, 1.5
"""Times a plain create; seconds for a hundred."""
OVERLAY = 1.05
"""Times outside."""
_KEEPS = Policy(filesystem=Filesystem(restore_keeps=("/usr/bin/sleep",)))


def _row(figure: str, samples: list[float], bar: float | None = None, note: str = "") -> Row:
    return Row(figure, "ms", 1000 * statistics.median(samples), 1000 * p95(samples), bar=bar, note=note)


def _private_state(workspace: Path) -> None:
    os.environ["XDG_STATE_HOME"] = str(workspace.parent / "state")


def _drop() -> None:
    for layer in list_layers():
        layer.discard()


async def _timed_snapshot(box: Sandbox) -> tuple[float, KeptLayer]:
    began = time.perf_counter()
    layer = await box.snapshot()
    return time.perf_counter() - began, layer


async def _snapshots(box: Sandbox, count: int) -> list[float]:
    """Each copies what is new since the one before."""
    samples = []
    for _ in range(count):
        seconds, layer = await _timed_snapshot(box)
        samples.append(seconds)
        for old in list_layers():
            if old.id != layer.id:
                old.discard()
    return samples


async def snapshot_figure(workspace: Path, quick: bool) -> list[Row]:
    """A snapshot of a sandbox in which nothing runs: of an unchanged one, and by what it has written."""
    _private_state(workspace)
    rows, count = [], 5 if quick else 20
    _fill(workspace, 2_000 if quick else 100_000)
    tree = f"{100 * (20 if quick else 1000)} files in the workspace"
    async with Sandbox(workspace) as box:
        rows.append(_row("snapshot, nothing written", await _snapshots(box, count), QUIET, tree))
        samples = []
        for _ in range(count):
            await box.exec(["sh", "-c", "for n in 1 2 3 4 5 6 7 8 9 10; do echo more >>d$n/1.txt; done; sleep 0.1"])
            samples += await _snapshots(box, 1)
        rows.append(_row("snapshot, 10 files just written", samples, LIVE, tree))
        for size in (10, 100) if quick else (10, 1000):
            await box.exec(["sh", "-c", f"head -c {size}M /dev/zero >big; sleep 0.1"])
            rows.append(_row(f"snapshot, {size} MB just written", await _snapshots(box, 1), note="all of it is copied"))
            samples = await _snapshots(box, count)
            rows.append(_row(f"snapshot, {size} MB written before the last", samples, QUIET))
        began = time.perf_counter()
        await box.freeze()
        rows.append(_row("standing still", [time.perf_counter() - began], FROZEN))
        await box.thaw()
    return [*rows, *_copies(workspace)]


def _copies(workspace: Path) -> list[Row]:
    """What others do to keep a state of it."""
    rows = []
    for figure, words in (
        ("cp -a of the workspace", ("cp", "-a")),
        ("cp -a --reflink=always", ("cp", "-a", "--reflink=always")),
    ):
        samples, problem = [], ""
        for _ in range(3):
            began = time.perf_counter()
            copy = subprocess.run([*words, workspace, workspace.parent / "copy"], capture_output=True, text=True)
            samples.append(time.perf_counter() - began)
            if copy.returncode:
                problem = copy.stderr.splitlines()[-1].rpartition(": ")[2]
            shutil.rmtree(workspace.parent / "copy", ignore_errors=True)
        rows.append(
            Row(figure, note=f"not here: {problem}") if problem else _row(figure, samples, note="for comparison")
        )
    if shutil.which("git") is None:
        return [*rows, Row("git stash create", note="not here: git is not installed")]
    _make_repository(workspace)
    samples = []
    for number in range(3):
        (workspace / "d0" / "0.txt").write_text(str(number))
        began = time.perf_counter()
        subprocess.run(["git", "stash", "create", "-q"], cwd=workspace, check=True, stdout=subprocess.DEVNULL, env=_GIT)
        samples.append(time.perf_counter() - began)
    return [*rows, _row("git stash create, 1 file changed", samples, note="for comparison; tracked files only")]


_GIT = {
    "PATH": os.environ.get("PATH", os.defpath),
    "HOME": "/nonexistent",
    **{f"GIT_{who}_{what}": "bench@corral.example" for who in ("AUTHOR", "COMMITTER") for what in ("NAME", "EMAIL")},
}


def _make_repository(workspace: Path) -> None:
    for words in (("init", "-q"), ("add", "-A"), ("commit", "-q", "-m", "begin")):
        subprocess.run(["git", *words], cwd=workspace, check=True, env=_GIT)


def _fill(workspace: Path, files: int) -> None:
    for index in range(100):
        (workspace / f"d{index}").mkdir()
        for number in range(files // 100):
            (workspace / f"d{index}" / f"{number}.txt").write_text("x")


_RENAME = "import os, sys, time; t = time.perf_counter(); os.rename(*sys.argv[1:]); print(time.perf_counter() - t)"


async def overlay_figure(workspace: Path, quick: bool) -> list[Row]:
    """What lies over the workspace costs git, and to rename a directory that was there before."""
    files = 2_000 if quick else 100_000
    _fill(workspace, files)
    rows = []
    if shutil.which("git") is None:
        return [Row("git status", note="not here: git is not installed")]
    _make_repository(workspace)
    status = ["git", "status", "--porcelain"]
    async with Sandbox(workspace) as box:

        async def inside() -> float:
            began = time.perf_counter()
            assert (await box.exec(status)).check().stdout == b""
            return time.perf_counter() - began

        outside = clock(lambda: subprocess.run(status, cwd=workspace, check=True, env=_GIT))
        samples = await in_turns({"inside": inside, "outside": outside}, 5 if quick else 15)
        rows.append(
            compare(
                f"git status of {files} files", samples["inside"], "outside", samples["outside"], bar=OVERLAY,
                note="once its index knows the inode numbers",
            )
        )  # fmt: skip
        moved, plain = [], []
        for index in range(5 if quick else 20):
            words = ["python3", "-c", _RENAME, f"d{40 + index}", f"m{index}"]
            moved.append(float((await box.exec(words)).check().text))
            words[0], words[-2] = sys.executable, f"d{70 + index}"
            plain.append(float(subprocess.run(words, cwd=workspace, check=True, capture_output=True).stdout))
        rows.append(
            compare(f"rename of a directory of {files // 100} files", moved, "outside", plain, note="once for each")
        )
    return rows


async def restore_figure(workspace: Path, quick: bool) -> list[Row]:
    """Going back: all inside ends, and a sandbox with the files of the snapshot is there."""
    _private_state(workspace)
    samples = []
    async with Sandbox(workspace) as box:
        await box.exec(["sh", "-c", "echo begin >begin"])
        layer = await box.snapshot()
        for _ in range(5 if quick else 30):
            await box.exec(["sh", "-c", "echo more >>begin"])
            began = time.perf_counter()
            await box.restore(layer)
            samples.append(time.perf_counter() - began)
    in_place = []
    async with Sandbox(workspace, policy=_KEEPS) as box:
        layer = await box.snapshot()
        for _ in range(3 if quick else 10):
            await box.exec(["sh", "-c", "echo more >>begin"])
            began = time.perf_counter()
            await box.restore(layer)
            in_place.append(time.perf_counter() - began)
    _drop()
    note = "programs that policy names go on; a helper process is started"
    return [_row("restore", samples, RESTORE), _row("restore in place, 1 file", in_place, note=note)]


async def _life(workspace: Path, on: KeptLayer | None) -> float:
    began = time.perf_counter()
    box = await Sandbox(workspace, on=on).start()
    assert (await box.exec(["true"])).exit_code == 0
    seconds = time.perf_counter() - began
    await box.close()
    return seconds


async def fork_figure(workspace: Path, quick: bool) -> list[Row]:
    """A fork with its first command, beside a plain sandbox; and a hundred at once."""
    _private_state(workspace)
    async with Sandbox(workspace) as box:
        await box.exec(
            ["sh", "-c", "mkdir d; for n in 1 2 3 4 5; do echo $n >d/$n; done; head -c 1000000 /dev/zero >b"]
        )
        layer = await box.snapshot()
        plain, forked = [], []
        for _ in range(10 if quick else 60):
            plain.append(await _life(workspace, None))
            forked.append(await _life(workspace, layer))
        ratio = statistics.median(forked) / statistics.median(plain)
        rows = [
            Row(
                "fork and its first command",
                "ms",
                1000 * statistics.median(forked),
                1000 * p95(forked),
                "plain sandbox",
                1000 * statistics.median(plain),
                1000 * p95(plain),
                ratio,
                bar=FORK,
            )
        ]
        samples = []
        for _ in range(1 if quick else 3):
            began = time.perf_counter()
            forks = await box.fork(100)
            found = await asyncio.gather(*(fork.exec(["cat", "d/3"]) for fork in forks))
            samples.append(time.perf_counter() - began)
            assert all(result.text == "3\n" for result in found)
            for fork in forks:
                await fork.close()
    rows.append(Row("100 forks, each with a command", "s", statistics.median(samples), bar=MANY))
    _drop()
    return rows


async def apply_figure(workspace: Path, quick: bool) -> list[Row]:
    """Looking at what would be applied, applying it, taking it back. No bar is set for these."""
    _private_state(workspace)
    files = 200 if quick else 2000
    async with Sandbox(workspace, keep=True) as box:
        script = f"mkdir new; i=0; while [ $i -lt {files} ]; do echo $i >new/$i; i=$((i+1)); done"
        assert (await box.exec(["sh", "-c", script])).exit_code == 0
    assert box.kept is not None
    shown, applied, undone = [], [], []
    for _ in range(3):
        began = time.perf_counter()
        proposal = propose(box.kept)
        shown.append(time.perf_counter() - began)
        began = time.perf_counter()
        made = proposal.apply(proposal.hash)
        applied.append(time.perf_counter() - began)
        began = time.perf_counter()
        undo(made.id)
        undone.append(time.perf_counter() - began)
    _drop()
    note = f"{files} new files"
    return [_row("propose", shown, note=note), _row("apply", applied, note=note), _row("undo", undone, note=note)]
