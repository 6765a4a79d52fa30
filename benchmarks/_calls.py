"""What one system call costs: inside, outside, and under the least that a supervisor can be (`minimal.c`)."""

from __future__ import annotations

import shutil
import subprocess
from dataclasses import dataclass
from pathlib import Path

from _common import Contender, Row, compare, in_turns, say

from corral import Sandbox

_HERE = Path(__file__).parent
MINIMAL = "minimal C supervisor"
OUTSIDE = "outside"


@dataclass(frozen=True, slots=True)
class Kind:
    """One kind of call that `calls.c` makes, how often, and what it may cost."""

    name: str
    title: str
    batches: int
    each: int
    bar: float | None = None
    """Of the ratio to the minimal supervisor."""
    note: str = ""
    """About the ratio to outside."""


_REFUSED, _ALLOWED, _UNTOUCHED = 3.0, 4.0, 1.05
_ANY_FILTER = "the kernel's own cost of any filter: some 10 ns a call, whatever the filter says"

CALLS = (
    Kind("getppid", "untouched: getppid", 200, 1000, _UNTOUCHED, _ANY_FILTER),
    Kind("read", "untouched: read of /dev/zero", 200, 1000, _UNTOUCHED, _ANY_FILTER),
    Kind("refused", "refused: bpf", 60, 50, _REFUSED),
    Kind("connect", "allowed: connect, UDP", 60, 50, _ALLOWED),
    Kind("tcp", "allowed: connect, TCP", 30, 50),
    Kind("bind", "allowed: bind", 30, 50),
    Kind("sendto", "allowed: sendto", 60, 50),
    Kind("sendmsg", "allowed: sendmsg, Unix", 60, 50),
)
PROGRAMS = (
    Kind("exec", "program: fork, exec", 100, 1),
    Kind("search", "program: the last of 10 in PATH", 50, 1),
    Kind("shell", "program: each of 50 by a shell", 2, 50),
)


def compile_programs(place: Path) -> tuple[Path, Path]:
    """`calls` and `minimal`. Raises FileNotFoundError without a C compiler."""
    compiler = shutil.which("cc") or shutil.which("gcc")
    if compiler is None:
        raise FileNotFoundError("no C compiler")
    made = []
    for name in ("calls", "minimal"):
        # Static: a program of its own starts with one execve and nothing of the linker's.
        made.append(place / name)
        subprocess.run([compiler, "-O2", "-static", "-o", made[-1], _HERE / f"{name}.c"], check=True)
    return made[0], made[1]


def _outside(argv: list[str]) -> Contender:
    async def contender() -> float:
        done = subprocess.run(argv, stdin=subprocess.DEVNULL, stdout=subprocess.PIPE, check=True)
        return float(done.stdout) / 1e9

    return contender


def _inside(box: Sandbox, argv: list[str]) -> Contender:
    async def contender() -> float:
        result = await box.exec(argv)
        assert result.exit_code == 0, result.text
        return float(result.stdout) / 1e9

    return contender


async def calls_figure(workspace: Path, rounds: int, kinds: tuple[Kind, ...]) -> list[Row]:
    """Each kind of call."""
    try:
        calls, minimal = compile_programs(workspace)
    except FileNotFoundError as error:
        return [Row(kind.title, bar=kind.bar, note=f"skipped: {error}") for kind in kinds]
    rows: list[Row] = []
    async with Sandbox(workspace) as box:
        for kind in kinds:
            say(f"  {kind.title}")
            argv = [str(calls), kind.name, str(kind.batches), str(kind.each)]
            contenders = {
                "corral": _inside(box, argv),
                MINIMAL: _outside([str(minimal), *argv]),
                OUTSIDE: _outside(argv),
            }
            samples = await in_turns(contenders, rounds, warm_up=1)
            ours = samples["corral"]
            rows.append(compare(kind.title, ours, MINIMAL, samples[MINIMAL], bar=kind.bar, unit="µs"))
            rows.append(compare(kind.title, ours, OUTSIDE, samples[OUTSIDE], unit="µs", note=kind.note))
    return rows
