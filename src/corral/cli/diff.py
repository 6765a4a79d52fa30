"""`corral diff`: what a run has changed, for people, programs and git."""

from __future__ import annotations

import dataclasses
import json
import sys

from corral.cli.foreground import printable
from corral.errors import RequestError
from corral.sandbox.changes import Change, ChangeKind
from corral.sandbox.layer import KeptLayer, list_layers, open_layer

MARKS = {
    ChangeKind.ADDED: ("+", "green"),
    ChangeKind.CHANGED: ("~", "yellow"),
    ChangeKind.DELETED: ("-", "red"),
    ChangeKind.MODE: ("m", "cyan"),
    ChangeKind.OWNER: ("o", "cyan"),
}


def _as_json(value: object) -> str:
    return json.dumps(value, default=lambda found: getattr(found, "value", str(found)))


def layer_of(name: str | None) -> KeptLayer:
    """The layer that is named, or the last that was kept. Raises RequestError where there is none."""
    if name is not None:
        return open_layer(name)
    kept = list_layers()
    if not kept:
        raise RequestError("no changes are kept; `corral run` keeps what a command changed")
    return kept[-1]


def detail(change: Change) -> str:
    """What is different."""
    if change.kind is ChangeKind.MODE:
        return f"{change.mode_before:04o} -> {change.mode_after:04o}"
    if change.kind is ChangeKind.OWNER:
        return f"{change.owner_before} -> {change.owner_after}"
    if change.kind is ChangeKind.ADDED:
        return "" if change.size_after is None else f"{change.size_after} bytes"
    if change.kind is ChangeKind.DELETED:
        return "" if change.size_before is None else f"{change.size_before} bytes"
    return f"{change.size_before} -> {change.size_after} bytes"


def write_patch(patch: bytes) -> None:
    """Prints it as it is, with the files' own characters."""
    sys.stdout.flush()
    sys.stdout.buffer.write(patch)
    sys.stdout.buffer.flush()


def show_changes(
    name: str | None, other: str | None = None, *, workspace_only: bool, patch: bool, as_json: bool
) -> None:
    """Prints the changes of a kept layer, or those from it to another. Raises RequestError when there is no such."""
    layer = layer_of(name)
    if patch:
        if other is not None:
            raise RequestError("--patch is of what a run has changed: name one layer")
        write_patch(layer.patch())
        return
    found = layer.changes() if other is None else open_layer(other).changes_since(layer)
    changes = [change for change in found if not workspace_only or change.part == "workspace"]
    if as_json:
        print(_as_json([dataclasses.asdict(change) for change in changes]))
        return
    from rich.console import Console
    from rich.text import Text

    console = Console(soft_wrap=True)
    for change in changes:
        mark, colour = MARKS[change.kind]
        kind = "" if change.file_type.value == "file" else f" ({change.file_type.value})"
        console.print(
            Text(f"{mark} ", colour) + Text(printable(change.path)) + Text(f"{kind}  {detail(change)}".rstrip(), "dim")
        )
    if not changes:
        console.print("no changes")


def list_layers_command(*, as_json: bool) -> None:
    """Prints the kept layers, oldest first."""
    layers = list_layers()
    if as_json:
        rows = [
            {"id": layer.id, "created": layer.created, "workspace": layer.workspace, "changes": layer.count}
            for layer in layers
        ]
        print(_as_json(rows))
        return
    for layer in layers:
        print(f"{layer.id}  {layer.created}  {layer.count:6} changes  {printable(layer.workspace)}")
