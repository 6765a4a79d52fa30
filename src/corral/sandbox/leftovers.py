"""Removes from the layer of a sandbox that has ended what it left of a directory's move (corral.supervisor.moving)."""

from __future__ import annotations

import os
from collections.abc import Iterable
from contextlib import suppress

from corral.openat2 import Resolve, closing, openat2
from corral.sandbox.trees import Unreadable, remove_tree
from corral.sandbox.view import View

_BELOW = Resolve.BENEATH | Resolve.NO_SYMLINKS | Resolve.NO_MAGICLINKS


def remove_places(layer: int, view: View, places: Iterable[str]) -> None:
    """Removes the directories that ``places`` name inside. One that is not there, or cannot be removed, is left: then
    it is shown as what it is, something that was made during the run."""
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
            remove_tree(parent, name)
