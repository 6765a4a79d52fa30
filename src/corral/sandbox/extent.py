"""How much a layer holds, and whether it holds anything at all."""

from __future__ import annotations

import os
import stat
from collections.abc import Collection, Iterator, Sequence
from dataclasses import dataclass

from corral.sandbox.trees import OPEN_DIRECTORY, UPPER, Walk
from corral.sandbox.view import Changeable

_MAX_TOLD = 4096


@dataclass(frozen=True, slots=True)
class Size:
    """What a layer holds."""

    bytes: int
    """Disk space of its files."""
    entries: int


def measure(parts: Sequence[Changeable], layer: int, scaffold: Collection[str]) -> Size:
    """The size of a layer's kept parts, as far as the caller may look. Proportional to the number of entries."""
    size, count = 0, 0
    seen: set[int] = set()
    for path, status in _entries(parts, layer):
        if path in scaffold and (stat.S_ISDIR(status.st_mode) or status.st_size == 0):
            continue
        count += 1
        if status.st_nlink > 1 and not stat.S_ISDIR(status.st_mode):
            if status.st_ino in seen:
                continue
            seen.add(status.st_ino)
        size += status.st_blocks * 512
    return Size(size, count)


def is_empty(parts: Sequence[Changeable], layer: int, scaffold: Collection[str]) -> bool:
    """Whether no kept part holds an entry that Corral did not make. Fast: stops at the first."""
    return all(
        path in scaffold and (stat.S_ISDIR(status.st_mode) or (stat.S_ISREG(status.st_mode) and status.st_size == 0))
        for path, status in _entries(parts, layer)
    )


def _entries(parts: Sequence[Changeable], layer: int) -> Iterator[tuple[str, os.stat_result]]:
    for part in parts:
        try:
            root = os.open(part.name, OPEN_DIRECTORY, dir_fd=layer)
        except OSError:
            continue
        try:
            with Walk({UPPER: root}, part.path) as walk:
                walk.current.names = iter(walk.list(UPPER))
                while walk.levels:
                    level = walk.current
                    name = next(level.names, None)
                    if name is None:
                        if len(walk.levels) == 1:
                            break
                        walk.leave()
                        continue
                    status = walk.status(UPPER, name)
                    if status is None:
                        continue
                    path = f"{level.path or ''}/{name}" if level.path != "/" else f"/{name}"
                    yield path, status
                    # Deep paths are no longer told: no scaffold lies there, and they would only cost memory.
                    below = path if len(path) < _MAX_TOLD else None
                    if stat.S_ISDIR(status.st_mode) and walk.enter(name, below, (UPPER,)):
                        walk.current.names = iter(walk.list(UPPER))
        finally:
            os.close(root)
