"""Fixtures for tests that make real sandboxes.

Every test here runs as whoever runs pytest. `make test` runs this directory twice, as root and as an ordinary user, so
each attack is tried against both kinds of walls. Tests that can only be about one of them are marked `root` or `user`.
"""

from __future__ import annotations

import os
import shutil
import subprocess
import time
from collections.abc import AsyncIterator, Awaitable, Callable, Iterator
from contextlib import suppress
from pathlib import Path
from typing import Any

import pytest

from corral.sandbox.box import Sandbox
from corral.sandbox.cgroups import PREFIX, hierarchies
from corral.sandbox.identity import RANGE_FIRST
from corral.sandbox.trees import remove_tree
from tests.internet.world import Internet, InternetError

MakeBox = Callable[..., Awaitable[Sandbox]]
Compile = Callable[..., str]


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """A test for the other kind of user is left out, and says so."""
    is_root = os.geteuid() == 0
    for item in items:
        if item.get_closest_marker("root") and not is_root:
            item.add_marker(pytest.mark.skip(reason="is about root; runs in the pass as root"))
        if item.get_closest_marker("user") and is_root:
            item.add_marker(pytest.mark.skip(reason="is about ordinary users; runs in the pass as one"))


@pytest.fixture
def workspace(tmp_path: Path) -> Path:
    """A directory to work in, with one file."""
    path = tmp_path / "workspace"
    path.mkdir(mode=0o755)
    (path / "file.txt").write_text("original\n")
    return path


@pytest.fixture
def state(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """Layers of a test are kept in its own place."""
    place = tmp_path / "state"
    place.mkdir(mode=0o700, exist_ok=True)
    monkeypatch.setenv("XDG_STATE_HOME", str(place))
    yield place
    # Deeper than pytest's own removal of old directories can go, and with modes that stop it.
    parent = os.open(tmp_path, os.O_RDONLY | os.O_DIRECTORY)
    remove_tree(parent, place.name)
    os.close(parent)


@pytest.fixture
async def make_box(workspace: Path) -> AsyncIterator[MakeBox]:
    """Starts sandboxes, and ends them with the test."""
    boxes: list[Sandbox] = []

    async def make(path: Path | None = None, **options: Any) -> Sandbox:
        box = Sandbox(path or workspace, **options)
        boxes.append(box)
        return await box.start()

    yield make
    for box in boxes:
        await box.close()


@pytest.fixture
async def box(make_box: MakeBox) -> Sandbox:
    """One sandbox with the default policy."""
    return await make_box()


@pytest.fixture
def compile_c(workspace: Path, tmp_path: Path) -> Compile:
    """Compiles C source to a static program in the workspace and returns its path, which is the same inside."""
    compiler = shutil.which("cc") or shutil.which("gcc")
    if compiler is None:
        pytest.skip("no C compiler on this machine; `make test` as root installs one")

    def compile_it(source: str, name: str = "attack", *flags: str) -> str:
        code = tmp_path / f"{name}.c"
        code.write_text(source)
        program = workspace / name
        command = [
            str(compiler),
            "-D_GNU_SOURCE",
            "-O1",
            "-static",
            "-pthread",
            "-w",
            "-o",
            str(program),
            str(code),
            *flags,
        ]
        subprocess.run(command, check=True, timeout=60)
        program.chmod(0o755)
        return str(program)

    return compile_it


def own_sandbox_processes() -> list[int]:
    """Keepers that this process has started and that still live."""
    found = []
    try:
        children = Path(f"/proc/{os.getpid()}/task/{os.getpid()}/children").read_text().split()
    except OSError:
        return []
    for pid in children:
        try:
            if Path(f"/proc/{pid}/comm").read_text().startswith("corral-"):
                found.append(int(pid))
        except OSError:
            continue
    return found


def own_groups() -> list[str]:
    """Control groups of this process's sandboxes."""
    mine = f"{PREFIX}{os.getpid()}-"
    return [
        os.path.join(hierarchy.parent, name)
        for hierarchy in hierarchies()
        for name in os.listdir(hierarchy.parent)
        if name.startswith(mine)
    ]


def mount_points() -> set[str]:
    """Where anything is mounted on this host."""
    return {line.split()[4] for line in Path("/proc/self/mountinfo").read_text(errors="replace").splitlines()}


def strays() -> list[str]:
    """What ids that only agents have own in the places of this host where everybody may write."""
    found = []
    for place in ("/tmp", "/var/tmp", "/dev/shm"):
        for entry in os.scandir(place):
            with suppress(FileNotFoundError):  # somebody else's, gone meanwhile
                if entry.stat(follow_symlinks=False).st_uid >= RANGE_FIRST:
                    found.append(entry.path)
    return found


def wait_until(condition: Callable[[], bool], seconds: float = 5.0) -> bool:
    """Polls until ``condition`` holds; returns whether it did."""
    deadline = time.monotonic() + seconds
    while not condition():
        if time.monotonic() > deadline:
            return False
        time.sleep(0.005)
    return True


@pytest.fixture(autouse=True)
def nothing_is_left_over(request: pytest.FixtureRequest) -> Iterator[None]:
    """After each test: no process, no cgroup, no mount of any sandbox of it."""
    before = mount_points()
    yield
    assert wait_until(lambda: not own_sandbox_processes()), f"processes left over: {own_sandbox_processes()}"
    assert wait_until(lambda: not own_groups()), f"cgroups left over: {own_groups()}"
    assert not strays()
    new = mount_points() - before
    assert not [point for point in new if point.startswith(str(request.config.rootpath)) or "corral" in point], new


@pytest.fixture(scope="session")
def internet() -> Iterator[Internet]:
    """A little internet outside all sandboxes: made as root, or the one that root made for an ordinary user."""
    made = os.environ.get("CORRAL_INTERNET", "")
    if made:
        yield Internet.join(Path(made))
        return
    try:
        with Internet() as own:
            yield own
    except InternetError as error:
        # On CI a pass must not be one that tested nothing.
        (pytest.fail if os.environ.get("CI") and os.geteuid() == 0 else pytest.skip)(f"no little internet: {error}")
