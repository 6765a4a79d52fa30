"""Removes from the layer of a sandbox that has ended what it left of a directory's move (corral.supervisor.moving)."""

from __future__ import annotations

import os
import stat
from collections.abc import Iterable
from contextlib import suppress

from corral.openat2 import Resolve, closing, openat2
from corral.sandbox.trees import OPEN_DIRECTORY, Unreadable, is_whiteout, remove_tree
from corral.sandbox.view import View

_TREE, _PICKED = "tree", "file"  # src/launcher/deputy_move.c
_BELOW = Resolve.BENEATH | Resolve.NO_SYMLINKS | Resolve.NO_MAGICLINKS


def remove_places(layer: int, view: View, places: Iterable[str]) -> None:
    """Removes the directories that ``places`` name inside, but for files in them that have no other name: those have
    others put into the tree that was taken away. One that is not there, or cannot be removed, is left: then it is shown
    as what it is, something that was made during the run."""
    for place in places:
        above, name = os.path.split(place)
        parts = [part for part in view.parts if f"{above}/".startswith(f"{part.path.rstrip('/')}/")]
        if not parts:
            continue
        part = max(parts, key=lambda part: len(part.path))
        way = os.path.join(part.name, os.path.relpath(above, part.path))
        with (
            suppress(OSError, Unreadable),
            closing(openat2(layer, os.fsencode(os.path.normpath(way)), os.O_RDONLY | os.O_DIRECTORY, _BELOW)) as parent,
        ):
            _remove(parent, name)


def _remove(parent: int, name: str) -> None:
    with closing(os.open(name, OPEN_DIRECTORY, dir_fd=parent)) as place:
        remove_tree(place, _TREE)
        with suppress(FileNotFoundError):
            status = os.stat(_PICKED, dir_fd=place, follow_symlinks=False)
            is_empty = stat.S_ISREG(status.st_mode) and status.st_size == 0
            if status.st_nlink > 1 or is_empty or is_whiteout(status):
                os.unlink(_PICKED, dir_fd=place)
    os.rmdir(name, dir_fd=parent)
