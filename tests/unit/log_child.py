"""Programs that tests of the log run as processes of their own: ``python -m tests.unit.log_child PROGRAM ...``."""

from __future__ import annotations

import contextlib
import ctypes
import errno
import json
import os
import random
import shutil
import signal
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import corral
from corral.errors import CorralError
from corral.log import writer
from corral.log.verify import verify_log
from corral.log.writer import Log, LogUnwritable
from tests.unit.logs import KEY, checkpoint, contents, entry

CRASHED = 700
"""Entries that were durable in a log that has to be mended."""
ROOT = Path(__file__).parents[2]


def start(program: str, *args: object, preload: Path | None = None) -> subprocess.Popen[bytes]:
    """Runs one of these, with its output in a pipe."""
    package = str(Path(corral.__file__).parents[1])
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join((package, str(ROOT))), "PYTHONDONTWRITEBYTECODE": "1"}
    if preload is not None:
        environment["LD_PRELOAD"] = str(preload)
    argv = [sys.executable, "-m", "tests.unit.log_child", program, *map(str, args)]
    return subprocess.Popen(argv, stdout=subprocess.PIPE, env=environment, cwd=ROOT)


def append(directory: Path, name: str, count: int, segment: int) -> None:
    """Appends so many entries, and prints each with its number as soon as that is told."""
    writer._SEGMENT = segment

    def say(entry: bytes, number: int, error: CorralError | None) -> None:
        if error is None:
            os.write(1, b"%d %b\n" % (number, entry))

    choice = random.Random(name)
    with Log(directory, KEY, checkpoint_every=0.005) as log:
        os.write(1, b"open\n")
        number = 0
        while number < count:
            for _ in range(choice.choice((1, 1, 3, 20))):
                entry = b"%b %d %b" % (name.encode(), number, b"x" * choice.randrange(60))
                number += 1
                log.submit(entry, lambda told, error, entry=entry: say(entry, told, error))  # type: ignore[misc]
            entry = b"%b %d" % (name.encode(), number)
            number += 1
            say(entry, log.append(entry), None)


class Session:
    """Somebody who appends to a log, closes it, and remembers what was promised."""

    def __init__(self) -> None:
        self.promised: dict[int, bytes] = {}
        self.refused: set[bytes] = set()
        self.told: dict[bytes, int] = {}
        self.opened = self.failed = False

    def run(self, directory: Path) -> None:
        with contextlib.suppress(CorralError):
            log = Log(directory, KEY, checkpoint_every=3600)
            self.opened = True
            try:
                self._append(log)
            finally:
                self._close(log)

    def _append(self, log: Log) -> None:
        self._one(log, b"first")
        for number in range(300):
            self._submit(log, b"many %d" % number)
        self._one(log, b"middle")
        log.seal()
        for number in range(250):
            self._submit(log, b"more %d" % number)
        self._one(log, b"last")

    def _one(self, log: Log, entry: bytes) -> None:
        try:
            self.promised[log.append(entry)] = entry
        except LogUnwritable:
            self.refused.add(entry)
            raise

    def _submit(self, log: Log, entry: bytes) -> None:
        def done(number: int, error: CorralError | None) -> None:
            self.told[entry] = self.told.get(entry, 0) + 1
            if error is None:
                self.promised[number] = entry
            else:
                self.refused.add(entry)

        self.told[entry] = 0
        try:
            log.submit(entry, done)
        except LogUnwritable:
            del self.told[entry]
            raise

    def _close(self, log: Log) -> None:
        failure = log.failure
        try:
            log.close()
        except LogUnwritable:
            self.failed = True
        if failure is not None and not self.failed:
            raise AssertionError("a log that failed was closed as if it had not")
        try:
            log.submit(b"after that")
        except LogUnwritable:
            return
        raise AssertionError("a log took an entry after it had been closed")


def faults(place: Path, first: int, step: int, crashed: Path | None = None) -> None:
    """Lets one system call after another on a file of a log fail: with EIO once, or, every third, with ENOSPC from then
    on. The log is a new one, or a copy of one that has to be mended first. Prints as JSON what was wrong with the log
    after that, and how many calls there were."""
    writer._SEGMENT = 2000
    problems: list[str] = []
    directory = place / "log"
    at, most, failures = first, sys.maxsize, 0
    while at < most:
        for number, sticky in ((errno.EIO, 0), (errno.ENOSPC, 1))[: 1 + (at % 3 == 0)]:
            shutil.rmtree(directory, ignore_errors=True)
            if crashed is not None:
                shutil.copytree(crashed, directory)
            session = Session()
            with faulty(directory, at, number, sticky) as calls:
                session.run(directory)
            most = min(most, abs(calls[0])) if calls[0] > 0 else most
            failures += session.failed or not session.opened
            problems += [f"call {at}, error {number}: {each}" for each in _problems(directory, session, crashed)]
        at += step
    print(json.dumps({"calls": at, "failures": failures, "problems": problems}))


def short_writes(place: Path, crashed: Path) -> None:
    """The same where nothing fails, but no write writes more than half of what it is given."""
    writer._SEGMENT = 2000
    problems: list[str] = []
    failures = count = 0
    for start in (None, crashed):
        directory = place / str(count)
        if start is not None:
            shutil.copytree(start, directory)
        session = Session()
        with faulty(directory, 0, 0, 1) as calls:
            session.run(directory)
        count += abs(calls[0])
        failures += session.failed or not session.opened
        problems += _problems(directory, session, start)
    print(json.dumps({"calls": count, "failures": failures, "problems": problems}))


@contextlib.contextmanager
def faulty(directory: Path, at: int, number: int, sticky: int) -> Iterator[list[int]]:
    """Calls on files below the directory fail meanwhile, as ``fault_arm`` says. Tells how many there were, below 0
    where one failed, when that is over."""
    shim = ctypes.CDLL(None)
    shim.fault_calls.restype = ctypes.c_long
    shim.fault_arm.argtypes = [ctypes.c_char_p, ctypes.c_long, ctypes.c_int, ctypes.c_int]
    calls: list[int] = []
    shim.fault_arm(os.fsencode(directory), at, number, sticky)
    try:
        yield calls
    finally:
        calls.append(shim.fault_calls())
        shim.fault_arm(os.fsencode(directory), -1, 0, 0)


def _problems(directory: Path, session: Session, crashed: Path | None) -> list[str]:
    """What is wrong with a log that is opened again and written to, after a session that may have failed, in a copy of
    one that had to be mended before that."""
    earlier = [checkpoint(directory)] if (directory / "checkpoint").exists() else []
    earlier += [(crashed / "journal" / "checkpoint").read_bytes()] if crashed is not None else []
    expected = [entry(number) for number in range(CRASHED if crashed is not None else 0)]
    with Log(directory, KEY, checkpoint_every=3600) as log:
        number = log.append(b"again")
    found = contents(directory)
    report = verify_log(directory, [KEY.verifier], earlier=earlier)
    return [
        *map(str, report.faults),
        *(["what was there before is not"] if found[: len(expected)] != expected else []),
        *(f"entry {number} is not {entry!r}" for number, entry in session.promised.items() if found[number] != entry),
        *(f"{entry!r} was told {times} times" for entry, times in session.told.items() if times != 1),
        *(["an entry is there twice"] if len(set(found)) != len(found) else []),
        *(["the last number is not the last"] if number != len(found) - 1 else []),
        *(["promised and refused"] if session.refused & set(session.promised.values()) else []),
    ]


if __name__ == "__main__":
    ctypes.CDLL(None).prctl(1, signal.SIGKILL)  # PR_SET_PDEATHSIG: nothing is left of a test that fails
    program, *rest = sys.argv[1:]
    if program == "append":
        append(Path(rest[0]), rest[1], int(rest[2]), int(rest[3]))
    elif program == "faults":
        faults(Path(rest[0]), int(rest[1]), int(rest[2]), *map(Path, rest[3:]))
    elif program == "short_writes":
        short_writes(Path(rest[0]), Path(rest[1]))
    else:
        sys.exit(f"no such program: {program}")
