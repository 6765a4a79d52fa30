"""`corral snapshot`: states of sandboxes that are kept, and what came of what."""

from __future__ import annotations

import json

from rich.console import Console
from rich.text import Text
from rich.tree import Tree

from corral.cli.foreground import printable
from corral.errors import RequestError
from corral.sandbox import registry
from corral.sandbox.layer import KeptLayer, list_layers

_PATIENCE = 600.0
"""Seconds that a snapshot may take: what was written is copied."""


def take_snapshot(sandbox: str | None, name: str, *, as_json: bool) -> None:
    """Takes one of a live sandbox. Raises RequestError where that cannot be."""
    if sandbox is None:
        raise RequestError("name the sandbox; `corral ps` lists those that live")
    connection, entry = registry.find_sandbox(sandbox)
    try:
        connection.socket.settimeout(_PATIENCE)
        answer, _ = connection.ask({"verb": "snapshot", "id": entry.id, "name": name})
    finally:
        connection.close()
    layer = str(answer["layer"])
    print(json.dumps({"sandbox": entry.id, "layer": layer, "name": name}) if as_json else layer)


def show_tree(session: str | None, *, as_json: bool) -> None:
    """Prints all kept layers, or those of one sandbox: each below that on which it was begun, or after which it was
    taken."""
    layers = [layer for layer in list_layers() if session is None or layer.session.startswith(session)]
    if as_json:
        print(json.dumps([_row(layer) for layer in layers]))
        return
    console = Console(soft_wrap=True, highlight=False)
    below: dict[str, list[KeptLayer]] = {}
    known = {layer.id for layer in layers}
    for layer in layers:
        below.setdefault(layer.parent if layer.parent in known else "", []).append(layer)
    workspaces: dict[str, Tree] = {}
    nodes: list[tuple[Tree, KeptLayer]] = []
    for layer in below.get("", ()):
        if layer.workspace not in workspaces:
            workspaces[layer.workspace] = Tree(Text(printable(layer.workspace), "bold"))
        nodes.append((workspaces[layer.workspace], layer))
    nodes.reverse()
    while nodes:  # not by recursion: a session can have many steps
        tree, layer = nodes.pop()
        children = below.get(layer.id, ())
        node = tree.add(_line(layer))
        # What follows without branches stays at one depth, so that a thousand steps can be read.
        nodes += [(tree if len(children) == 1 else node, child) for child in reversed(children)]
    for tree in workspaces.values():
        console.print(tree)
    if not layers:
        console.print("nothing is kept")


def _line(layer: KeptLayer) -> Text:
    called = printable(layer.name) or (f"step {layer.step}" if layer.step is not None else "")
    told = f"{layer.created[:19].replace('T', ' ')}  {layer.count} changes, {layer.size} bytes"
    return Text(layer.id, "bold") + Text(f"  {called}" if called else "") + Text(f"  {told}", "dim")


def _row(layer: KeptLayer) -> dict[str, object]:
    return {
        "id": layer.id,
        "name": layer.name,
        "parent": layer.parent or None,
        "session": layer.session or None,
        "step": layer.step,
        "created": layer.created,
        "workspace": layer.workspace,
        "changes": layer.count,
        "bytes": layer.size,
    }
