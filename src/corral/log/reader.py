"""Reads the entries of a log, also while others write it: what is under a checkpoint from the tiles, what is newer from
the journal.

What is read here is not verified: :mod:`corral.log.verify` does that.
"""

from __future__ import annotations

import os
from collections.abc import Iterable, Iterator
from pathlib import Path

from corral.errors import RequestError
from corral.log.journal import Journal
from corral.log.note import NoteError
from corral.log.signing import read_checkpoint, read_keys
from corral.log.tiles import WIDTH, LogDamaged, Tiles

_TRIES = 5
_AT_ONCE = 64 * WIDTH


class Reader:
    """The entries of the log in a directory."""

    def __init__(self, directory: Path) -> None:
        """Raises RequestError where there is no log."""
        if not (directory / "keys").is_file():
            raise RequestError(f"{directory}: there is no log; `corral run --log {directory} -- ...` begins one")
        self.directory = directory
        self._tiles = Tiles(directory)
        self._journal = Journal(directory / "journal")
        self._full = 0
        """Entries that are known to be in full tiles under a checkpoint: these stay where they are."""

    def sealed(self) -> int:
        """How many entries the newest checkpoint commits to. Raises NoteError or LogDamaged."""
        found = read_checkpoint(self.directory, read_keys(self.directory))
        return found[0].size if found else 0

    def entries(self, start: int = 0, stop: int | None = None) -> Iterator[tuple[int, bytes]]:
        """Entries with their numbers, from ``start`` up to ``stop``, or to the newest that there is.

        Those at the end that are in no tile yet may be read before they are durable. A log that is only served, without
        its journal, ends with its checkpoint. Raises NoteError or LogDamaged.
        """
        at = start
        while stop is None or at < stop:
            part = self._part(at, _AT_ONCE if stop is None else min(stop - at, _AT_ONCE))
            if not part:
                return
            yield from enumerate(part, at)
            at += len(part)

    def some(self, numbers: Iterable[int]) -> Iterator[tuple[int, bytes]]:
        """The entries of these numbers, without those that are not there; each tile is read once where they are in
        order. Raises as :meth:`entries`."""
        tile, found = -1, {}
        for number in numbers:
            if number // WIDTH != tile:
                tile = number // WIDTH
                found = dict(self.entries(tile * WIDTH, (tile + 1) * WIDTH))
            if number in found:
                yield number, found[number]

    def _part(self, start: int, most: int) -> list[bytes]:
        """Some entries from ``start`` on; none where there is none."""
        if start < self._full:
            number, first = divmod(start, WIDTH)
            return self._tiles.entries(number, WIDTH)[first : first + most]
        problem: Exception | None = None
        for _ in range(_TRIES):  # files go away when their content is in others
            size = self.sealed()
            self._full = size // WIDTH * WIDTH
            try:
                if start < size:
                    number, first = divmod(start, WIDTH)
                    width = min(WIDTH, size - number * WIDTH)
                    return self._tiles.entries(number, width)[first : first + most]
                return self._journal.entries(start, most=most)
            except FileNotFoundError as error:
                if not self._journal.directory.exists():
                    return []
                problem = error
            except PermissionError:  # the journal is for those who write
                return []
            except (LogDamaged, NoteError) as error:
                problem = error
        if isinstance(problem, OSError):
            raise LogDamaged(f"journal: cannot read it: {os.strerror(problem.errno or 0)}")
        raise problem or LogDamaged("the log cannot be read")
