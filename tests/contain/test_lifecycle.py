"""However a controller ends, nothing of its sandboxes is left: SIGKILL, Ctrl-C, exceptions, forks, forgetting.

Moments are drawn over the whole life of a controller, from before its interpreter is up until after its sandbox is
gone; those of SIGKILL in equal parts over start, execs and teardown, which a controller marks on its stdout. Orphans
are adopted by this process, so a survivor cannot hide; namespaces are remembered while they live, and nobody may be in
one afterwards.
"""

from __future__ import annotations

import os
import random
import re
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import suppress
from pathlib import Path
from typing import Any, NamedTuple

import pytest

from corral.sandbox import registry
from corral.sandbox.cgroups import PREFIX, hierarchies
from tests.contain.command_line import CommandLine, adopting_orphans, descendants, groups_of, living_children
from tests.contain.conftest import wait_until

MOMENTS = 50
KINDS = ("mnt", "net", "pid", "ipc", "uts", "user", "cgroup")
WITHIN = 1.0
"""Seconds after a controller's death within which all must be gone."""

CONTROLLER = """
import asyncio, sys
from corral import Sandbox

async def main():
    async with Sandbox(sys.argv[1]) as box:
        print("begin", flush=True)
        for _ in range(3):
            await box.exec(["sh", "-c", "sleep 0.01 & setsid sleep 1000 & echo x >changed"])
        process = await box.start_process(["sleep", "1000"])
        print("end", flush=True)
asyncio.run(main())
"""


def own_namespaces() -> set[str]:
    return {os.readlink(f"/proc/self/ns/{kind}") for kind in KINDS}


def namespaces(pids: list[int]) -> set[str]:
    """The namespaces of processes that can be looked at: all as root; as a user not those of the keeper's kind."""
    found = set()
    for pid in pids:
        for kind in KINDS:
            with suppress(OSError):
                found.add(os.readlink(f"/proc/{pid}/ns/{kind}"))
    return found


def held_namespaces() -> set[str]:
    """Those in which a descendant of this process is, or that one holds open. Whoever outlives a controller is one;
    others on this machine may have the numbers of namespaces that are gone."""
    ours = [os.getpid(), *descendants(os.getpid())]
    found = namespaces(ours)
    for pid in ours:
        with suppress(OSError):
            for fd in os.listdir(f"/proc/{pid}/fd"):
                with suppress(OSError):
                    found.add(os.readlink(f"/proc/{pid}/fd/{fd}"))
    return found


class Host:
    """What of a controller's could be left on this machine."""

    def __init__(self, cli: CommandLine) -> None:
        self.cli = cli
        self.children = set(living_children(set()))
        self.mounts = self._mounts()
        self.seen: set[str] = set()  # of the present controller; the kernel gives their numbers out again
        self.met = 0
        """Controllers that had a sandbox when they died."""
        self.temporary = Path(cli.env["TMPDIR"])

    def _mounts(self) -> set[str]:
        lines = Path("/proc/self/mountinfo").read_text().splitlines()
        return {line for line in lines if "corral" in line or " nsfs " in line or str(self.cli.workspace) in line}

    def watch(self, controller: int) -> None:
        """Remembers the namespaces that a controller has made."""
        self.seen |= namespaces(descendants(controller)) - own_namespaces()

    def pass_time(self, process: subprocess.Popen[bytes], seconds: float, *, after: bytes = b"") -> None:
        """Watches until a controller has written ``after``, and then for some seconds."""
        assert process.stdout
        os.set_blocking(process.stdout.fileno(), False)
        written, end = b"", time.monotonic() + 60
        while after not in written:
            assert process.poll() is None, (process.returncode, process.communicate())
            assert time.monotonic() < end, (after, written, self.left(process.pid))
            self.watch(process.pid)
            written += process.stdout.read() or b""
            time.sleep(0.002)
        end = time.monotonic() + seconds
        while time.monotonic() < end:
            self.watch(process.pid)
            time.sleep(0.002)

    def left(self, controller: int) -> dict[str, object]:
        found: dict[str, object] = {
            "processes": living_children(self.children),
            "groups": groups_of(controller),
            "mounts": self._mounts() - self.mounts,
            "directory": [path.name for path in (self.cli.runtime / "corral").glob("[0-9]*")],
            "partial": list(self.cli.state.glob("corral/layers/partial-*")),
            "temporary": os.listdir(self.temporary),
        }
        return {name: what for name, what in found.items() if what}

    def assert_clean(self, controller: int, moment: object) -> None:
        """All of it is gone in time; a directory may wait for the next start, which is what reaps it."""
        died = time.monotonic()
        while (left := self.left(controller)) and time.monotonic() - died < WITHIN:
            time.sleep(0.01)
        if left.keys() <= {"directory", "partial"}:
            registry.reap_dead_controllers()
            left = self.left(controller)
        assert not left, (moment, left)
        assert not held_namespaces() & self.seen, (moment, "namespaces left over")
        self.met += bool(self.seen)
        self.seen.clear()


@pytest.fixture
def cli(tmp_path: Path, workspace: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[CommandLine]:
    with adopting_orphans():
        made = CommandLine(tmp_path, workspace)
        monkeypatch.setenv("XDG_RUNTIME_DIR", str(made.runtime))
        monkeypatch.setenv("XDG_STATE_HOME", str(made.state))
        made.env["TMPDIR"] = str(tmp_path / "temporary")  # in /tmp others come and go
        (tmp_path / "temporary").mkdir()
        yield made


@pytest.fixture
def host(cli: CommandLine) -> Host:
    return Host(cli)


Start = Callable[[], "subprocess.Popen[bytes]"]


def controllers(cli: CommandLine) -> dict[str, Start]:
    quiet: dict[str, Any] = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "stdin": subprocess.DEVNULL}
    script = "echo begin; sleep 0.02 & setsid sleep 1000 & echo x >changed; sleep 0.05; echo end"
    program = [sys.executable, "-c", CONTROLLER, str(cli.workspace)]
    return {
        "command line": lambda: cli.start("run", "--", "sh", "-c", script, start_new_session=True, **quiet),
        "program": lambda: subprocess.Popen(program, env=cli.env, start_new_session=True, **quiet),
    }


class Life(NamedTuple):
    """Seconds that each part of a controller's life takes when nobody disturbs it."""

    start: float
    execs: float
    teardown: float


def whole_life(start: Start) -> Life:
    """The longest of three for each part, as the machine may be busy."""
    lives = []
    for _ in range(3):
        moments = [time.monotonic()]
        process = start()
        assert process.stdout
        for line in process.stdout:
            assert line in (b"begin\n", b"end\n")
            moments.append(time.monotonic())
        _, err = process.communicate(timeout=60)
        assert process.returncode == 0, err
        _, begin, end = moments
        lives.append(Life(begin - moments[0], end - begin, time.monotonic() - end))
    return Life(*(max(part) for part in zip(*lives, strict=True)))


def kill_at_random_moments(start: Start, host: Host, moments: int, seed: str) -> None:
    """SIGKILL of one controller after another; what each has left must be gone in time."""
    life = whole_life(start)
    choice = random.Random(seed)
    for number in range(moments):
        part, length, after = list(zip(Life._fields, life, (b"", b"begin\n", b"end\n"), strict=True))[number % 3]
        moment = choice.uniform(0, length)
        process = start()
        host.pass_time(process, moment, after=after)
        process.kill()
        process.communicate()
        host.assert_clean(process.pid, (number, part, moment))
    assert host.met >= moments * 2 // 3, "whoever begins its execs has a living sandbox"


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["command line", "program"])
def test_sigkill_of_the_controller_at_any_moment_leaves_nothing(cli: CommandLine, host: Host, kind: str) -> None:
    kill_at_random_moments(controllers(cli)[kind], host, MOMENTS, f"sigkill {kind}")


@pytest.mark.soak
@pytest.mark.timeout(3600)
@pytest.mark.parametrize("kind", ["command line", "program"])
def test_sigkill_at_500_other_moments_leaves_nothing(cli: CommandLine, host: Host, kind: str) -> None:
    seed = os.urandom(8).hex()
    print(f"seed {seed}")
    kill_at_random_moments(controllers(cli)[kind], host, 500, seed)


@pytest.mark.slow
def test_ctrl_c_at_any_moment_leaves_nothing_and_says_nothing_odd(cli: CommandLine, host: Host) -> None:
    start = controllers(cli)["command line"]
    life = sum(whole_life(start))
    choice = random.Random("sigint")
    codes: list[int] = []
    for number in range(MOMENTS):
        moment = choice.uniform(0.02, life)
        process = start()
        host.pass_time(process, moment)
        os.killpg(process.pid, signal.SIGINT)
        _, err = process.communicate(timeout=60)
        codes.append(process.returncode)
        # Before Corral's first line the interpreter itself reports it, in its own way.
        assert process.returncode in (0, 130, -signal.SIGINT) or b"corral" not in err, (number, moment, codes[-1], err)
        assert not re.search(rb'File ".*/corral/(?!cli/__init__|__init__)', err), (number, moment, err)
        host.assert_clean(process.pid, (number, moment))
    assert 130 in codes
    assert host.met >= MOMENTS // 4, "hardly a moment met a living sandbox"


def test_two_ctrl_c_in_a_row(cli: CommandLine, host: Host) -> None:
    start = controllers(cli)["command line"]
    life = whole_life(start)
    met = (life.start * 0.3, b""), (life.start * 0.8, b""), (0.0, b"begin\n"), (life.execs / 2, b"begin\n")
    for moment, after in (*met, (0.0, b"end\n")):
        process = start()
        host.pass_time(process, moment, after=after)
        with suppress(ProcessLookupError):
            for _ in range(3):
                os.killpg(process.pid, signal.SIGINT)
                time.sleep(0.003)
        process.communicate(timeout=60)
        host.assert_clean(process.pid, (after, moment))
    assert host.met >= 3


# ---- leftovers of the dead ----


def dead_pid() -> int:
    process = subprocess.Popen(["true"])
    process.wait()
    return process.pid


def test_a_start_reaps_what_the_dead_left(cli: CommandLine, tmp_path: Path) -> None:
    dead, living = dead_pid(), os.getpid()
    cache = tmp_path / "cache"
    left: list[Path] = []
    kept: list[Path] = []
    for pid, paths in ((dead, left), (living, kept)):
        directory = cli.runtime / "corral" / str(pid)
        directory.mkdir(parents=True)
        (directory / f"{pid}.sock").touch()
        layer = cli.state / f"corral/layers/partial-{pid}-aaaaaaaa"
        (layer / "parts/workspace").mkdir(parents=True)
        image = cache / f"corral/partial-{pid}-0123abcd"
        (image / "etc").mkdir(parents=True)
        groups = [Path(hierarchy.parent) / f"{PREFIX}{pid}-leftover" for hierarchy in hierarchies()]
        for group in groups:
            group.mkdir()
        paths += [directory, layer, image, *groups]
    for path in (cli.runtime / "corral", cli.state / "corral", cli.state / "corral/layers", cache / "corral"):
        path.chmod(0o700)
    try:
        assert cli.run("--", "true", env={"XDG_CACHE_HOME": str(cache)}).returncode == 0
        assert [path for path in left if path.exists()] == []
        assert [path for path in kept if not path.exists()] == []
    finally:
        for path in (*left, *kept):
            if path.name.startswith(PREFIX) and path.exists():
                path.rmdir()


# ---- what a dying controller takes along ----


def run_program(cli: CommandLine, code: str, *, timeout: float = 60) -> subprocess.CompletedProcess[bytes]:
    """Runs Python with corral; `WORKSPACE` is defined. Prints what it finds."""
    program = f"WORKSPACE = {str(cli.workspace)!r}\n{code}"
    return subprocess.run([sys.executable, "-c", program], env=cli.env, capture_output=True, timeout=timeout)


def test_a_program_that_forgets_its_sandbox_leaves_nothing(cli: CommandLine, host: Host) -> None:
    for ending in ("", "import os; os._exit(3)", "raise RuntimeError('a bug')", "import os; os.abort()"):
        code = (
            "from corral import SyncSandbox\nbox = SyncSandbox(WORKSPACE).start()\n"
            f"import os; print(os.getpid(), box.exec(['echo', 'hi']).text, flush=True)\n{ending}\n"
        )
        done = run_program(cli, code)
        assert b"hi" in done.stdout, done
        host.assert_clean(int(done.stdout.split()[0]), ending)


def test_a_sandbox_that_nobody_refers_to_lives_no_longer_than_the_process(cli: CommandLine, host: Host) -> None:
    code = """
import asyncio, gc, os
from corral import Sandbox
async def main():
    box = await Sandbox(WORKSPACE).start()
    del box
    gc.collect()
asyncio.run(main())
gc.collect()
print(os.getpid())
"""
    done = run_program(cli, code)
    assert done.returncode == 0, done
    host.assert_clean(int(done.stdout), "forgotten")


def test_a_forked_child_neither_keeps_nor_ends_a_sandbox(cli: CommandLine, host: Host) -> None:
    code = """
import os, sys, time
from corral import SyncSandbox
box = SyncSandbox(WORKSPACE).start()
child = os.fork()
if child == 0:
    os._exit(0)
os.waitpid(child, 0)
time.sleep(0.2)
assert box.exec(["echo", "alive"]).text == "alive\\n"  # the child's exit ends nothing
own = os.fork()
if own == 0:  # a child can have sandboxes of its own
    with SyncSandbox(WORKSPACE) as mine:
        os._exit(mine.exec(["sh", "-c", "exit 7"]).exit_code)
assert os.waitstatus_to_exitcode(os.waitpid(own, 0)[1]) == 7
if os.fork() == 0:
    os.close(1)
    os.close(2)
    time.sleep(30)  # holds every descriptor of its parent
    os._exit(0)
print(os.getpid(), flush=True)
os._exit(0)
"""
    done = run_program(cli, code)
    assert done.returncode == 0, done
    survivors = list(living_children(host.children))
    assert wait_until(lambda: len(living_children(host.children)) == 1, WITHIN), survivors
    (child,) = living_children(host.children)
    assert "corral-" not in Path(f"/proc/{child}/comm").read_text()
    os.kill(child, signal.SIGKILL)
    host.assert_clean(int(done.stdout), "fork")


def test_sigkill_of_the_keeper_takes_all_down_and_the_controller_notices(cli: CommandLine, host: Host) -> None:
    with cli.live("--", "sh", "-c", "sleep 1000 & sleep 1000") as (name, process):
        (entry,) = cli.list()
        assert entry["id"] == name
        inside = descendants(entry["keeper"])
        assert len(inside) >= 3
        os.kill(entry["keeper"], signal.SIGKILL)
        _, err = process.communicate(timeout=30)
        assert process.returncode == 137 and b"corral: the sandbox was ended" in err
        assert wait_until(lambda: not set(inside) & set(living_children(host.children)), WITHIN)  # reaps them too
        for group in groups_of(process.pid):  # nobody was left to remove them; the next start does
            registry.reap_dead_controllers()
            assert not os.path.exists(group)
