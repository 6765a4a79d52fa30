"""What the tests of recording share: what a log holds, and a disk that fails when a test says so."""

from __future__ import annotations

import os
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from corral.log.events import Event
from corral.log.gaps import Gaps
from corral.log.reader import Reader
from corral.log.records import Record, decode
from corral.log.signing import read_keys
from corral.log.verify import verify_log


def records(place: Path) -> list[Record]:
    return [decode(entry) for _, entry in Reader(place).entries()]


def events(place: Path, kind: type[Event]) -> list[Any]:
    return [record.event for record in records(place) if isinstance(record.event, kind)]


def verified(place: Path) -> int:
    """How many entries a log has, all of which are as they were signed, without gaps."""
    report = verify_log(place, read_keys(place), look=Gaps())
    assert report.faults == []
    return report.size


class Disk:
    """Holds up or fails what makes the log durable."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.works = threading.Event()
        self.works.set()
        self.error = 0
        self._sync: Callable[[int], None] = os.fdatasync
        monkeypatch.setattr(os, "fdatasync", self.fdatasync)

    def fdatasync(self, fd: int) -> None:
        if threading.current_thread().name == "corral-log":
            self.works.wait(60)
            if self.error:
                raise OSError(self.error, os.strerror(self.error))
        self._sync(fd)
