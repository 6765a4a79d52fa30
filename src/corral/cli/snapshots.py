"""`corral snapshot`: states of sandboxes that are kept, and what came of what."""

from __future__ import annotations

import json
from contextlib import suppress
from dataclasses import replace

from rich.console import Console
from rich.text import Text
from rich.tree import Tree

from corral.cli.foreground import printable
from corral.cli.options import Arguments
from corral.errors import RequestError
from corral.sandbox import registry
from corral.sandbox.layer import KeptLayer, list_layers, open_layer

_PATIENCE = 600.0
"""Seconds that a snapshot may take: what was written is copied."""


def take_snapshot(sandbox: str | None, name: str, *, as_json: bool) -> None:
    """Takes one of a live sandbox. Raises RequestError where that cannot be."""
    if sandbox is None:
        raise RequestError("name the sandbox; `corral ps` lists those that live")
    layer, _ = _take(sandbox, name)
    print(json.dumps({"layer": layer, "name": name}) if as_json else layer)


def _take(sandbox: str, name: str) -> tuple[str, str]:
    """The id of a new snapshot, and its workspace."""
    connection, entry = registry.find_sandbox(sandbox)
    try:
        connection.socket.settimeout(_PATIENCE)
        answer, _ = connection.ask({"verb": "snapshot", "id": entry.id, "name": name})
    finally:
        connection.close()
    return str(answer["layer"]), entry.workspace


def fork(sandbox: str, arguments: Arguments) -> int:
    """Runs a command in a copy of a live sandbox; its exit code. Raises RequestError where there is no such."""
    from corral.cli.run import run

    if arguments.command[0] == "--":  # options end at the id; writing it all the same is a habit
        arguments = replace(arguments, command=arguments.command[1:])
    if not arguments.command:
        raise RequestError("no command was given")
    layer, workspace = _take(sandbox, "")
    try:
        return run(replace(arguments, values=arguments.values | {"on": layer, "workspace": workspace}))
    finally:
        with suppress(RequestError):  # somebody has discarded it
            open_layer(layer).discard()


def restore_to(sandbox: str, layer: str, *, as_json: bool) -> None:
    """Sets the files of a live sandbox back. Raises RequestError where that cannot be."""
    connection, entry = registry.find_sandbox(sandbox)
    try:
        connection.socket.settimeout(_PATIENCE)
        connection.ask({"verb": "restore", "id": entry.id, "layer": layer})
    finally:
        connection.close()
    print(json.dumps({"sandbox": entry.id, "layer": layer}) if as_json else f"{entry.id} has the files of {layer}")


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
