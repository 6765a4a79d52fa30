"""What the accountant counts as a sandbox's memory, from a fake /proc."""

from __future__ import annotations

import errno
import resource
import time
from collections.abc import Callable
from pathlib import Path

import pytest

from corral.policy.model import MIB
from corral.sandbox import limits
from corral.sandbox.limits import Accountant

PAGE = resource.getpagesize()
KEEPER, INIT, AGENT = 100, 101, 102
MACHINE = {"MemTotal": 1 << 22, "MemAvailable": 1 << 21, "Shmem": 0, "SwapTotal": 0, "SwapFree": 0, "PageTables": 0}


class Proc:
    """As in proc(5), of what is looked at; sizes in KiB unless they are pages."""

    def __init__(self, directory: Path) -> None:
        self.directory = directory
        self.machine()
        self.process(KEEPER, INIT)
        self.process(INIT, AGENT)
        self.process(AGENT)

    def machine(self, **fields: int) -> None:
        lines = (f"{name}: {size} kB\n" for name, size in (MACHINE | fields).items())
        (self.directory / "meminfo").write_text("".join(lines))

    def process(self, pid: int, *children: int, anonymous: int = 0, swap: int = 0, tables: int = 0) -> None:
        """``anonymous`` is in pages."""
        own = self.directory / str(pid)
        (own / "task" / str(pid)).mkdir(parents=True, exist_ok=True)
        (own / "task" / str(pid) / "children").write_text("".join(f"{child} " for child in children))
        (own / "statm").write_text(f"9999 {anonymous + 7} 7 1 0 9999 0\n")
        (own / "status").write_text(f"Name:\tx\nVmPTE:\t{tables} kB\nVmSwap:\t{swap} kB\nThreads:\t1\n")
        (own / "maps").write_text("")


@pytest.fixture
def proc(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Proc:
    monkeypatch.setattr(limits, "_PROC", str(tmp_path))
    return Proc(tmp_path)


def used(limit: int = 0) -> int:
    return Accountant().used(KEEPER, lambda: 5 * MIB, limit)


def test_anonymous_pages_and_the_layer_count(proc: Proc) -> None:
    proc.process(AGENT, anonymous=10)
    assert used() == 5 * MIB + 10 * PAGE
    assert used(limit=6 * MIB) == 5 * MIB + 10 * PAGE


def test_what_was_swapped_out_counts(proc: Proc) -> None:
    """Without a cgroup nothing keeps a process from being swapped out, and then it is no longer resident."""
    proc.machine(SwapTotal=1 << 20, SwapFree=(1 << 20) - 3000)
    proc.process(INIT, AGENT, swap=24)
    proc.process(AGENT, anonymous=10, swap=2048)
    assert used() == used(limit=6 * MIB) == 5 * MIB + 10 * PAGE + (2048 + 24) * 1024


def test_shared_memory_counts_when_it_was_swapped_out(proc: Proc) -> None:
    proc.machine(SwapTotal=1 << 20, SwapFree=0)
    mapping = "7f0000000000-7f0000400000 rw-s 00000000 00:01 77   /dev/zero (deleted)\n"
    (proc.directory / str(AGENT) / "maps").write_text(mapping)
    assert used() == 5 * MIB + 4 * MIB


def test_page_tables_count(proc: Proc) -> None:
    proc.machine(PageTables=3000)
    proc.process(AGENT, tables=2500)
    assert used(limit=6 * MIB) == 5 * MIB + 2500 * 1024


def test_what_cannot_matter_is_not_looked_at(proc: Proc) -> None:
    """Status and maps of each process cost much more than the rest, five times a second."""
    proc.machine(Shmem=5 * 1024, SwapTotal=1 << 20, SwapFree=(1 << 20) - 500, PageTables=500)
    proc.process(AGENT, swap=500, tables=400)
    assert used(limit=6 * MIB) == 5 * MIB
    assert used(limit=6 * MIB - 64 * 1024) > 5 * MIB


def test_memory_that_cannot_be_counted_for_long_ends_its_sandboxes(monkeypatch: pytest.MonkeyPatch) -> None:
    """Without descriptors, as when others use them all up: it looks again, and then fails closed; it does not die."""
    blind = True

    def used(self: Accountant, keeper: int, layer_used: Callable[[], int], limit: int = 0) -> int:
        if blind:
            raise OSError(errno.EMFILE, "no descriptors")
        return 2

    monkeypatch.setattr(Accountant, "used", used)
    monkeypatch.setattr(limits, "ACCOUNTING_INTERVAL", 0.01)
    told: list[str] = []
    accountant = Accountant()
    accountant.watch(1, 10, lambda: 0, told.append)
    until(lambda: told)
    assert told == ["its memory could not be counted any more"]
    blind = False
    accountant.watch(2, 1, lambda: 0, told.append)
    until(lambda: len(told) == 2)
    assert told[1].startswith("out of memory")


def until(true: Callable[[], object]) -> None:
    deadline = time.monotonic() + 10
    while not true():
        assert time.monotonic() < deadline
        time.sleep(0.01)
