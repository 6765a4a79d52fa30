"""The life of a sandbox inside one program: cancelled, failed, closed twice, used late, two hundred times over."""

from __future__ import annotations

import asyncio
import gc
import os
import random
import subprocess
import threading
import time
from pathlib import Path

import pytest

from corral import RequestError, Sandbox, SandboxClosed
from corral.sandbox.core import State
from tests.contain.conftest import own_groups, own_sandbox_processes, wait_until


@pytest.fixture(autouse=True)
def own_directories(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("XDG_RUNTIME_DIR", str(tmp_path))
    monkeypatch.setenv("XDG_STATE_HOME", str(tmp_path))


def descriptors() -> int:
    return len(os.listdir("/proc/self/fd"))


def resident() -> int:
    return int(Path("/proc/self/statm").read_text().split()[1]) * os.sysconf("SC_PAGESIZE")


async def test_a_kill_that_comes_late_reaches_nobody_else(workspace: Path) -> None:
    """The supervisor may ask for it when all is over, and the keeper's descriptor has become another's by then."""
    async with Sandbox(workspace) as box:
        core, number = box.core, box.core._keeper_pidfd
    bystander = subprocess.Popen(["sleep", "60"])
    pidfds = [os.pidfd_open(bystander.pid)]
    try:
        while number not in pidfds:  # the kernel gives the lowest number that is free
            pidfds.append(os.dup(pidfds[0]))
            assert len(pidfds) < 100
        core.kill("late")
        with pytest.raises(subprocess.TimeoutExpired):
            bystander.wait(0.3)
    finally:
        for fd in pidfds:
            os.close(fd)
        bystander.kill()
        bystander.wait()


async def live_and_compare(workspace: Path, directory: Path, *, rounds: int) -> None:
    """Ten sandboxes at once, so many times over; then the process holds what it held before."""

    async def one() -> None:
        async with Sandbox(workspace) as box:
            assert (await box.exec(["echo", "x"])).stdout == b"x\n"
            process = await box.start_process(["cat"], terminal=(24, 80))
            await process.write(b"y\n")

    for _ in range(20):  # caches fill, threads of pools start
        await one()
    gc.collect()  # transports of the last few close a moment after their sandbox
    await asyncio.sleep(0.1)
    before, threads, memory = descriptors(), threading.active_count(), resident()
    for _ in range(rounds):
        await asyncio.gather(*(one() for _ in range(10)))
    for _ in range(100):
        if descriptors() <= before:
            break
        gc.collect()
        await asyncio.sleep(0.02)
    assert descriptors() <= before
    assert threading.active_count() <= threads
    assert resident() - memory < 8 << 20, f"{resident() - memory} bytes more"
    assert os.listdir(directory / "corral") in ([], ["ranges"])


@pytest.mark.slow
async def test_200_sandboxes_leave_the_process_as_it_was(workspace: Path, tmp_path: Path) -> None:
    await live_and_compare(workspace, tmp_path, rounds=20)


@pytest.mark.soak
@pytest.mark.timeout(3600)
async def test_2000_sandboxes_leave_the_process_as_it_was(workspace: Path, tmp_path: Path) -> None:
    """Ten times as many, and no more memory: nothing grows with their number."""
    await live_and_compare(workspace, tmp_path, rounds=200)


async def test_cancelling_a_start_leaves_nothing(workspace: Path) -> None:
    async with Sandbox(workspace):
        pass
    begun = time.monotonic()
    box = await Sandbox(workspace).start()
    usual = time.monotonic() - begun
    await box.close()
    gc.collect()  # what tests before this one have left is not its own
    before = descriptors()
    choice = random.Random("cancel start")
    cancelled = 0
    for _ in range(40):
        box = Sandbox(workspace)
        task = asyncio.create_task(box.start())
        await asyncio.sleep(choice.uniform(0, usual))
        task.cancel()
        try:
            await task
        except asyncio.CancelledError:
            cancelled += 1
            assert box.state in (State.LAUNCHING, State.ENDED)
        await box.close()
    assert cancelled >= 5
    assert wait_until(lambda: not own_sandbox_processes() and not own_groups())
    assert descriptors() <= before


async def test_cancelling_an_exec_kills_its_command(workspace: Path) -> None:
    async with Sandbox(workspace) as box:
        await box.exec(["true"])
        before = descriptors()
        for delay in (0, 0.005, 0.02, 0.3):
            task = asyncio.create_task(box.exec(["sh", "-c", "sleep 1004 & exec sleep 1004"]))
            await asyncio.sleep(delay)
            task.cancel()
            with pytest.raises(asyncio.CancelledError):
                await task
        deadline = time.monotonic() + 10
        while b"sleep 1004" in (await box.exec(["ps", "-eo", "args"])).stdout:
            assert time.monotonic() < deadline, "the command survived"
        # What the supervisor remembered of processes that are dead by now may be gone too.
        assert wait_until(lambda: descriptors() <= before)
        assert (await box.exec(["echo", "usable"])).stdout == b"usable\n"


async def test_an_exception_in_the_body_closes_the_sandbox(workspace: Path) -> None:
    with pytest.raises(ZeroDivisionError):
        async with Sandbox(workspace) as box:
            await box.exec(["true"])
            _ = 1 / 0
    assert box.state is State.ENDED
    task = asyncio.create_task(_body_that_waits(workspace))
    await asyncio.sleep(0.5)
    task.cancel()
    with pytest.raises(asyncio.CancelledError):
        await task
    assert not own_sandbox_processes()


async def _body_that_waits(workspace: Path) -> None:
    async with Sandbox(workspace) as box:
        await box.exec(["sleep", "1000"])


async def test_closing_twice_and_using_after_close(workspace: Path) -> None:
    box = await Sandbox(workspace).start()
    process = await box.start_process(["sleep", "1000"])
    await asyncio.gather(box.close(), box.close())
    await box.close()
    assert box.state is State.ENDED and await box.wait_ended() == "closed"
    with pytest.raises(SandboxClosed, match="closed"):
        await process.wait()
    with pytest.raises(SandboxClosed):
        await box.exec(["true"])
    with pytest.raises(SandboxClosed):
        await box.start_process(["true"])
    with pytest.raises(SandboxClosed):
        await box.start_process(["true"], terminal=(24, 80))
    with pytest.raises(SandboxClosed):
        await box.freeze()
    await box.thaw()
    box.kill()
    process.signal(15)
    process.kill()
    with pytest.raises(RequestError):
        await box.start()
    for call in (box.read_file("/etc/passwd"), box.list_files("/"), box.changes(), box.stats()):
        with pytest.raises(SandboxClosed):
            await call
    assert box.listeners == ()


async def test_closing_while_execs_run_ends_them_all(workspace: Path) -> None:
    box = await Sandbox(workspace).start()
    before = descriptors()
    running = [asyncio.create_task(box.exec(["sleep", "1000"])) for _ in range(20)]
    await asyncio.sleep(0.3)
    await box.close()
    results = await asyncio.gather(*running, return_exceptions=True)
    assert all(isinstance(result, SandboxClosed) for result in results), results
    assert descriptors() < before


async def test_an_end_by_itself_leaves_only_what_close_takes(workspace: Path) -> None:
    before = descriptors()
    box = await Sandbox(workspace).start()
    os.kill(box.core.keeper, 15)
    assert await box.wait_ended() == "killed"
    await box.close()
    assert descriptors() <= before + 3  # the event loop's own, and the image's lock
