"""Runs `corral` as its users do, in a process of its own, and sees to it that nothing of it is left.

Imported by the tests of the command line. The test process adopts orphans (PR_SET_CHILD_SUBREAPER), so that a keeper
or a command that outlives its `corral` turns up among its children, whatever else runs on the machine.
"""

from __future__ import annotations

import ctypes
import json
import os
import subprocess
import sys
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import IO, Any, cast

from corral.sandbox.cgroups import PREFIX, hierarchies
from tests.contain.conftest import wait_until

_PR_SET_CHILD_SUBREAPER = 36
_libc = ctypes.CDLL(None, use_errno=True)


def corral_command() -> list[str]:
    """`corral` as it is installed beside this Python, or from the sources."""
    installed = Path(sys.executable).with_name("corral")
    return [str(installed)] if installed.exists() else [sys.executable, "-c", "from corral.cli import main; main()"]


def children() -> dict[int, str]:
    """Live and dead children of this process, adopted ones too, with their state (proc_pid_stat(5))."""
    found = {}
    for task in os.listdir("/proc/self/task"):
        with suppress(OSError):
            for pid in Path(f"/proc/self/task/{task}/children").read_text().split():
                found[int(pid)] = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0]
    return found


def descendants(pid: int) -> list[int]:
    """All processes below one."""
    found = []
    with suppress(OSError):
        for task in os.listdir(f"/proc/{pid}/task"):
            for child in map(int, Path(f"/proc/{pid}/task/{task}/children").read_text().split()):
                found += [child, *descendants(child)]
    return found


@contextmanager
def adopting_orphans() -> Iterator[None]:
    """Adopts them meanwhile; at the end all that were adopted must have ended, and are reaped."""
    before = set(children())
    assert _libc.prctl(_PR_SET_CHILD_SUBREAPER, 1, 0, 0, 0) == 0
    try:
        yield
        assert wait_until(lambda: not living_children(before)), f"processes left over: {living_children(before)}"
    finally:
        _libc.prctl(_PR_SET_CHILD_SUBREAPER, 0, 0, 0, 0)


def living_children(but: set[int]) -> dict[int, str]:
    """Children that have not ended, with their command lines; those that have are reaped."""
    found = {}
    for pid, state in children().items():
        if pid in but:
            continue
        if state == "Z":
            with suppress(ChildProcessError):
                os.waitpid(pid, os.WNOHANG)
            continue
        with suppress(OSError):
            found[pid] = Path(f"/proc/{pid}/cmdline").read_bytes().replace(b"\0", b" ").decode("utf-8", "replace")
    return found


def groups_of(controller: int) -> list[str]:
    """Control groups of a controller's sandboxes."""
    return [
        os.path.join(hierarchy.parent, name)
        for hierarchy in hierarchies()
        for name in os.listdir(hierarchy.parent)
        if name.startswith(f"{PREFIX}{controller}-")
    ]


class CommandLine:
    """`corral` with directories of its own."""

    def __init__(self, directory: Path, workspace: Path) -> None:
        self.command = corral_command()
        self.workspace = workspace
        self.runtime = directory / "runtime"
        self.state = directory / "state"
        for path in (self.runtime, self.state):
            path.mkdir(mode=0o700)
        self.env = {name: value for name, value in os.environ.items() if not name.startswith("PYTEST")}
        if "PYTHONPATH" in self.env:  # `corral` starts elsewhere
            self.env["PYTHONPATH"] = ":".join(map(os.path.abspath, self.env["PYTHONPATH"].split(":")))
        self.env |= {"XDG_RUNTIME_DIR": str(self.runtime), "XDG_STATE_HOME": str(self.state), "TERM": "xterm"}

    def start(self, *words: str, env: Mapping[str, str] | None = None, **how: Any) -> subprocess.Popen[bytes]:
        """Starts `corral WORDS`, with pipes unless told otherwise."""
        how = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE, "stderr": subprocess.PIPE} | how
        how.setdefault("cwd", self.workspace)
        process: Any = subprocess.Popen([*self.command, *words], env=self.env | dict(env or {}), **how)
        return cast("subprocess.Popen[bytes]", process)

    def __call__(
        self, *words: str, stdin: bytes | IO[bytes] | int = b"", timeout: float = 60, **how: Any
    ) -> subprocess.CompletedProcess[bytes]:
        """Runs `corral WORDS` to its end."""
        process = self.start(*words, **({} if isinstance(stdin, bytes) else {"stdin": stdin}) | how)
        try:
            out, err = process.communicate(stdin if isinstance(stdin, bytes) else None, timeout)
        except BaseException:
            process.kill()
            process.communicate()
            raise
        self.left_by(process.pid)
        return subprocess.CompletedProcess(words, process.returncode, out or b"", err or b"")

    def run(self, *words: str, **how: Any) -> subprocess.CompletedProcess[bytes]:
        """`corral run WORDS`."""
        return self("run", *words, **how)

    def left_by(self, pid: int) -> None:
        """A `corral` that has ended has left nothing, at once: it waits for the keeper itself."""
        assert not groups_of(pid), f"cgroups left over: {groups_of(pid)}"
        assert not (self.runtime / "corral" / str(pid)).exists(), "the controller's directory is left over"
        assert not list(self.state.glob(f"corral/layers/partial-{pid}-*")), "half a layer is left over"

    def list(self) -> Any:
        """`corral ps --json`."""
        return json.loads(self("ps", "--json").stdout)

    @contextmanager
    def live(self, *words: str, **how: Any) -> Iterator[tuple[str, subprocess.Popen[bytes]]]:
        """A `corral run WORDS` in the background; its sandbox's id and its process."""
        process = self.start("run", *words, **how)
        try:
            sockets = self.runtime / "corral" / str(process.pid)
            assert wait_until(lambda: any(sockets.glob("*.sock")), 20), self.why(process)
            (entry,) = (entry for entry in self.list() if entry["pid"] == process.pid)
            yield entry["id"], process
        finally:
            process.kill()
            process.communicate()
            assert wait_until(lambda: not groups_of(process.pid))

    def why(self, process: subprocess.Popen[bytes]) -> str:
        process.kill()
        return f"no sandbox appeared: {process.communicate()}"
