"""Logs for tests: a key that is always the same, logs of short entries, and what is asked of every log."""

from __future__ import annotations

import shutil
from collections.abc import Iterator, Sequence
from pathlib import Path

from corral.log.note import KeyFile, KeyType
from corral.log.reader import Reader
from corral.log.verify import verify_log
from corral.log.writer import Log

KEY = KeyFile("example.org/log", KeyType.ED25519, bytes(range(32)))
OTHER_KEY = KeyFile("example.org/log", KeyType.ED25519, bytes(32))
WITNESS = KeyFile("example.org/witness", KeyType.COSIGNATURE, bytes(range(1, 33)))


def entry(number: int) -> bytes:
    return b"entry %d" % number


def make_log(directory: Path, *sizes: int, entries: Sequence[bytes] = ()) -> Path:
    """A log with so many entries, closed; with a checkpoint for each of the sizes."""
    with Log(directory, KEY, checkpoint_every=60) as log:
        number = 0
        for size in sizes:
            while number < size:
                content = entries[number] if number < len(entries) else entry(number)
                number += 1
                if number < size:
                    log.submit(content)
                else:
                    log.append(content)
            log.seal()
    return directory


def copy_log(directory: Path, to: Path) -> Path:
    shutil.rmtree(to, ignore_errors=True)
    shutil.copytree(directory, to)
    return to


def checkpoint(directory: Path) -> bytes:
    return (directory / "checkpoint").read_bytes()


def faults(directory: Path, *earlier: bytes) -> list[tuple[str, str]]:
    """The checks that failed, with where."""
    report = verify_log(directory, [KEY.verifier], earlier=earlier)
    return [(fault.check, fault.where) for fault in report.faults]


def contents(directory: Path) -> list[bytes]:
    """All entries, also those that no checkpoint commits to yet."""
    return [each for _, each in Reader(directory).entries()]


def files(directory: Path) -> Iterator[Path]:
    return (path for path in sorted(directory.rglob("*")) if path.is_file())
