"""What is done in fewer steps because it is done often, and must come out the same: floods, searches for programs."""

from __future__ import annotations

import errno
import os
from pathlib import Path

import pytest

from corral import ExecError, Sandbox
from corral.actions import Kind, Program
from corral.supervisor import service
from corral.supervisor.call import Call
from corral.supervisor.handlers import HANDLERS
from tests.contain.conftest import Compile

FLOOD = r"""
#include <errno.h>
#include <stdio.h>
#include <stdlib.h>
#include <sys/socket.h>
#include <sys/syscall.h>
#include <sys/wait.h>
#include <unistd.h>
int main(int argc, char **argv)
{
    int wrong = 0, rounds = atoi(argv[1]);
    for (int i = 0; i < rounds; i++) {
        errno = 0;
        wrong += syscall(SYS_bpf, i, 0, 0) != -1 || errno != EPERM;
        errno = 0;
        wrong += syscall(SYS_io_uring_setup, i, 0) != -1 || errno != EPERM;
        errno = 0;
        wrong += syscall(SYS_unshare, 1 << 28) != -1 || errno != EPERM;
        wrong += syscall(SYS_unshare, 0) != 0; /* free, though the same call */
        errno = 0;
        wrong += setsockopt(-1, 6, 31, 0, 0) != -1 || errno != ENOENT; /* TCP_ULP */
        errno = 0;
        wrong += setsockopt(-1, 0, 4, 0, 0) != -1 || errno != EPERM; /* IP_OPTIONS: the same call, another answer */
        wrong += syscall(SYS_getppid) < 0;
        if (i == rounds / 2 && argc > 2) { /* another process, with the same calls */
            pid_t child = fork();
            if (child == 0)
                continue;
            waitpid(child, 0, 0);
        }
    }
    printf("%d\n", wrong);
    return 0;
}
"""


@pytest.mark.parametrize("rounds", [1, 15, 16, 17, 18, 3000])
async def test_each_refusal_of_a_flood_is_refused_and_counted(box: Sandbox, compile_c: Compile, rounds: int) -> None:
    program = compile_c(FLOOD, "flood")
    result = await box.exec([program, str(rounds)])
    assert result.exit_code == 0 and result.stdout == b"0\n", result.text
    counts: dict[str, int] = {}
    numbers = []
    for decision in box.core.supervision.recent.all():
        if decision.action.kind is Kind.KERNEL:
            counts[decision.action.name] = counts.get(decision.action.name, 0) + decision.count
            numbers.append(decision.number)
    once = dict.fromkeys(("kernel.bpf", "kernel.io_uring_setup", "kernel.unshare"), rounds)
    assert counts.items() >= (once | {"kernel.setsockopt": 2 * rounds}).items()
    assert len(set(numbers)) == len(numbers)


async def test_floods_of_two_processes_are_two(box: Sandbox, compile_c: Compile) -> None:
    program = compile_c(FLOOD, "flood")
    await box.exec([program, "1000", "fork"], check=True)
    counts: dict[int, int] = {}
    for decision in box.core.supervision.recent.all():
        if decision.action.name == "kernel.bpf":
            process = decision.action.origin.process
            assert process is not None
            counts[process.inner_pid] = counts.get(process.inner_pid, 0) + decision.count
    assert sorted(counts.values()) == [499, 1000]


async def test_a_flood_goes_the_short_way(box: Sandbox, compile_c: Compile, monkeypatch: pytest.MonkeyPatch) -> None:
    whole = []
    original = service.Supervised._serve

    def serve(self: service.Supervised, notification: object) -> None:
        whole.append(notification)
        original(self, notification)  # type: ignore[arg-type]

    monkeypatch.setattr(service.Supervised, "_serve", serve)
    await box.exec([compile_c(FLOOD, "flood"), "3000"], check=True)
    # Not those calls that are free, or answered otherwise, with other arguments; and not the first of a flood.
    assert 3 * 3000 < len(whole) < 3 * 3000 + 1000


# ---- programs along PATH ----


def place(workspace: Path, name: str, content: str, mode: int) -> None:
    path = workspace / name
    path.parent.mkdir(exist_ok=True)
    path.write_text(content)
    path.chmod(mode)


async def test_directories_without_the_program_are_passed_over(box: Sandbox, monkeypatch: pytest.MonkeyPatch) -> None:
    tried = []
    original = HANDLERS["execve"]

    def execve(call: Call) -> None:
        tried.append(call.read_text(call.arguments[0]))
        original(call)

    monkeypatch.setitem(HANDLERS, "execve", execve)
    await box.exec(["true"], env={"PATH": "/nowhere:/etc:/etc/passwd:/usr/bin:/bin"}, check=True)
    assert tried == [b"/usr/bin/true"]
    programs = [decision.action.subject for decision in box.core.supervision.recent.all()]
    assert [program.path for program in programs if isinstance(program, Program)] == [os.path.realpath("/usr/bin/true")]


async def test_the_search_is_that_of_execvp(box: Sandbox, workspace: Path) -> None:
    place(workspace, "denied/prog", "echo never", 0o644)
    place(workspace, "shown/prog", "echo $0 $1", 0o755)  # no format: a shell's
    place(workspace, "here", "#!/bin/sh\necho here $1\n", 0o755)
    denied, shown = workspace / "denied", workspace / "shown"

    async def run(argv: list[str], path: str | None) -> str:
        try:
            result = await box.exec(argv, env={} if path is None else {"PATH": path})
        except ExecError as error:
            return errno.errorcode[error.errno]
        return result.stdout.decode().strip()

    assert await run(["prog", "x"], f"{denied}:{shown}") == f"{shown}/prog x"
    assert await run(["prog"], f"{shown}:{denied}") == f"{shown}/prog"
    assert await run(["prog"], f"{denied}:/nowhere") == "EACCES"
    assert await run(["prog"], "/etc/passwd:/nowhere") == "ENOENT"
    assert await run(["prog"], "/nowhere:/etc/passwd") == "ENOTDIR"
    assert await run(["here", "x"], "/nowhere:") == "here x"
    assert await run(["here", "x"], ":/nowhere") == "here x"
    assert await run(["here", "x"], "") == "here x"
    assert await run(["./here", "x"], "/nowhere") == "here x"
    assert await run(["echo", "x"], None) == "x"
    assert await run(["echo", "x"], "/" + "y" * 5000 + ":/usr/bin") == "x"
    assert await run(["e" * 256], "/usr/bin") == "ENAMETOOLONG"
