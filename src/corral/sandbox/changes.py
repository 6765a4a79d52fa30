"""What a layer changes: an exact comparison of its parts with what lies below them on the host.

Each part of a layer is an overlay's upper directory (whiteouts, opaque directories; no redirects, no metadata-only
copies), or a plain directory with nothing below. The overlay itself is not needed: the comparison looks at the upper
and the lower trees, so it works on a live sandbox, on an ended one, and on a layer kept on disk.

A copied-up file with the content, mode and owner that it had is no change, nor is a new time stamp alone. The mode and
owner of a part's own top directory are Corral's, not the agent's. What lies below a deleted directory is counted, not
listed.
"""

from __future__ import annotations

import os
from collections.abc import Collection, Sequence
from dataclasses import fields
from typing import Any

from corral.sandbox import asowner
from corral.sandbox.compare import Change as Change
from corral.sandbox.compare import ChangeKind as ChangeKind
from corral.sandbox.compare import FileType as FileType
from corral.sandbox.compare import compare
from corral.sandbox.ownership import OwnerMap, owners_from_json, owners_to_json
from corral.sandbox.trees import Unreadable
from corral.sandbox.view import Changeable


def changes(
    parts: Sequence[Changeable],
    layer: int,
    owners: OwnerMap,
    scaffold: Collection[str],
    *,
    special_modes: bool = True,
) -> list[Change]:
    """The changes in the layer whose directory is ``layer``, sorted by path.

    Never raises for what the trees hold or do meanwhile: entries that vanish are left out. Without ``special_modes``
    setuid and setgid bits are not compared (a kept layer has none). Raises CorralError where an ordinary user's layer
    holds files that cannot be read even as their owner.
    """
    try:
        found = compare(parts, layer, owners, scaffold, special_modes, raise_unreadable=os.geteuid() != 0)
    except Unreadable:
        request = {
            "parts": [[part.name, part.path, part.lowers, part.base] for part in parts],
            "layer": layer,
            "owners": owners_to_json(owners.within()),
            "scaffold": list(scaffold),
            "special_modes": special_modes,
        }
        found = [from_json(row) for row in asowner.call("changes", (layer,), request, owners.namespace())]
    found.sort(key=lambda change: change.path)
    return found


def serve(request: dict[str, Any]) -> Any:
    """:func:`changes` in a helper process."""
    parts = [Changeable(name, path, tuple(lowers), base) for name, path, lowers, base in request["parts"]]
    owners = owners_from_json(request["owners"])
    found = compare(parts, request["layer"], owners, set(request["scaffold"]), request["special_modes"])
    return [to_json(change) for change in found]


def to_json(change: Change) -> list[Any]:
    """A change as JSON."""
    row = [getattr(change, field.name) for field in fields(Change)]
    return [getattr(value, "value", value) for value in row]


def from_json(row: list[Any]) -> Change:
    """The change that :func:`to_json` made."""
    values = dict(zip((field.name for field in fields(Change)), row, strict=True))
    values["kind"] = ChangeKind(values["kind"])
    for name in ("file_type", "type_before"):
        values[name] = FileType(values[name]) if values[name] is not None else None
    for name in ("owner_before", "owner_after"):
        values[name] = tuple(values[name]) if values[name] is not None else None
    return Change(**values)
