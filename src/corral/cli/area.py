"""`corral layers`, `corral gc`, `corral pin`: what runs have left, and what of it goes."""

from __future__ import annotations

import json
import sys
import time
from collections.abc import Iterable, Sequence
from datetime import datetime
from typing import Any

from corral.cli.foreground import complain, printable
from corral.errors import RequestError
from corral.policy.document import number_or_text
from corral.policy.units import Size, read_duration
from corral.sandbox.account import total
from corral.sandbox.area import Collected, Kept, Taken, collect, list_kept, log_files, pin, undo_copies
from corral.sandbox.layer import KeptLayer, store

_UNITS = ("B", "KiB", "MiB", "GiB", "TiB")
_TITLES = ("ID", "AGE", "KIND", "ON DISK", "CHANGES", "STAYS", "NAME", "WORKSPACE")
_RIGHT = ("AGE", "ON DISK", "CHANGES")
_WIDTH = 200
_LARGEST = 1 << 60


def show_layers(*, as_json: bool) -> None:
    """Prints what is kept, oldest first, and what all of it takes."""
    now = time.time()
    kept, damaged = list_kept(now)
    with store() as layers:
        taken = {"layers": Taken(len(kept) + len(damaged), total(layers)), "undo": undo_copies(), "log": log_files()}
    if as_json:
        rows = [_row(each) for each in kept]
        sums = {name: {"count": each.count, "bytes": each.bytes} for name, each in taken.items()}
        print(json.dumps({"layers": rows, "damaged": damaged, "taken": sums}))
        return
    if kept:
        _print(_TITLES, [_cells(each, now) for each in kept])
    for name in damaged:
        complain(f"layer {name} is damaged; `corral discard {name}` removes it")
    print(
        f"layers: {taken['layers'].count}, {_size(taken['layers'].bytes)}; what can be undone: {taken['undo'].count}, "
        f"{_size(taken['undo'].bytes)}; log: {_size(taken['log'].bytes)}"
    )


def _row(kept: Kept) -> dict[str, Any]:
    layer = kept.layer
    names = ("id", "created", "workspace", "command", "label", "name", "parent", "session", "log")
    return {name: getattr(layer, name) for name in names} | {
        "snapshot": kept.is_snapshot,
        "changes": layer.count,
        "entries": layer.entries,
        "bytes": layer.size,
        "on_disk": layer.disk,
        "expires": layer.expires or None,
        "held": kept.held or None,
    }


def _cells(kept: Kept, now: float) -> tuple[str, ...]:
    layer = kept.layer
    stays = kept.held or ("" if not layer.expires else f"for {_span(layer.expires - now)}")
    kind = "snapshot" if kept.is_snapshot else "layer"
    name = layer.name or layer.label
    return (layer.id, _age(layer, now), kind, _size(layer.disk), str(layer.count), stays, name, layer.workspace)


def _age(layer: KeptLayer, now: float) -> str:
    return _span(now - datetime.fromisoformat(layer.created).timestamp())


def _span(seconds: float) -> str:
    for length, unit in ((86400, "d"), (3600, "h"), (60, "m")):
        if seconds >= length:
            return f"{seconds / length:.0f}{unit}"
    return f"{max(0, seconds):.0f}s"


def _size(count: int) -> str:
    size, unit = float(count), 0
    while size >= 1024 and unit < len(_UNITS) - 1:
        size, unit = size / 1024, unit + 1
    return f"{size:.0f} {_UNITS[unit]}" if unit == 0 else f"{size:.1f} {_UNITS[unit]}"


def _print(titles: Sequence[str], rows: Iterable[Sequence[str]]) -> None:
    from rich.console import Console
    from rich.table import Table
    from rich.text import Text

    table = Table(box=None, pad_edge=False)
    for title in titles:
        table.add_column(title, no_wrap=title == "ID", justify="right" if title in _RIGHT else "left")
    for cells in rows:
        table.add_row(*(Text(printable(cell)) for cell in cells))
    # A program that reads it has no width.
    (Console() if sys.stdout.isatty() else Console(width=_WIDTH)).print(table)


def gc(*, older_than: str | None, keep_bytes: str | None, undo: bool, dry_run: bool, as_json: bool) -> None:
    """Removes what may go, and says what has gone and what is held. Raises RequestError."""
    done = collect(
        older_than=None if older_than is None else _read("--older-than", read_duration, older_than),
        keep_bytes=None if keep_bytes is None else _read("--keep-bytes", Size(0, _LARGEST), keep_bytes),
        undo=undo,
        dry_run=dry_run,
    )
    if as_json:
        print(json.dumps(_to_json(done, dry_run=dry_run)))
        return
    what = "would go" if dry_run else "removed"
    for layer, size in done.removed:
        print(printable(f"{what}: {layer.id}  {layer.created}  {_size(size)}  {layer.name or layer.label}"))
    for identifier, size in done.undos:
        print(f"{what}: what undoes {identifier}  {_size(size)}")
    for layer, why in done.held:
        print(printable(f"stays: {layer.id}  {layer.created}: {why}"))
    for name in done.damaged:
        complain(f"layer {name} is damaged; `corral discard {name}` removes it")
    print(f"layers: {_size(done.before)} -> {_size(done.after)}")


def _to_json(done: Collected, *, dry_run: bool) -> dict[str, Any]:
    return {
        "dry_run": dry_run,
        "removed": [{"id": layer.id, "created": layer.created, "freed": size} for layer, size in done.removed],
        "undo": [{"id": identifier, "freed": size} for identifier, size in done.undos],
        "held": [{"id": layer.id, "created": layer.created, "why": why} for layer, why in done.held],
        "damaged": done.damaged,
        "before": done.before,
        "after": done.after,
    }


def _read(option: str, read: Any, text: str) -> Any:
    try:
        return read(number_or_text(text))
    except ValueError as error:
        raise RequestError(f"{option}: {error}") from None


def pin_all(names: Sequence[str], *, on: bool) -> None:
    """Says of layers that they are to stay, or takes that back."""
    for name in names:
        pin(name, on=on)
        print(f"{'pinned' if on else 'unpinned'} {name}")
