"""`corral net`: what goes through the gateway now."""

from __future__ import annotations

import json
import os
import sys
import time
from collections.abc import Sequence

from corral.cli.foreground import printable
from corral.monitor.jsonl import flow_fields
from corral.sandbox.flows import Live, list_flows

MAX_SHOWN = 200
"""Flows that are printed for people at once."""
_INTERVAL = 1.0
_WIDTH = 400
"""Columns where nobody says how many there are."""
_TITLES = ("SANDBOX", "EXEC", "PROGRAM", "TO", "ADDRESS", "SPEAKS", "UP", "DOWN", "AGE", "RULE")
_UNITS = ("B", "KiB", "MiB", "GiB", "TiB")


def _size(count: int) -> str:
    value = float(count)
    for unit in _UNITS:
        if value < 1024 or unit == _UNITS[-1]:
            break
        value /= 1024
    return f"{value:.0f} {unit}" if unit == "B" else f"{value:.1f} {unit}"


def _cells(live: Live) -> tuple[str, ...]:
    flow = live.flow
    endpoint, process = flow.endpoint, flow.origin.process
    spoken = f"{endpoint.protocol or '-'}{' (intercepted)' if flow.intercepted else ''}"
    return (
        live.sandbox,
        str(flow.origin.exec or "-"),
        f"{os.path.basename(process.exe) or '?'} {process.inner_pid}" if process else "-",
        f"{endpoint.name or endpoint.address}:{endpoint.port}",
        endpoint.address or "-",
        spoken,
        _size(flow.bytes_up),
        _size(flow.bytes_down),
        f"{flow.seconds:.0f} s",
        flow.rule or "-",
    )


def _print(found: Sequence[Live]) -> None:
    from rich.console import Console
    from rich.table import Table
    from rich.text import Text

    table = Table(box=None, pad_edge=False)
    for title in _TITLES:
        table.add_column(title, no_wrap=True, justify="right" if title in ("UP", "DOWN", "AGE") else "left")
    for live in found[:MAX_SHOWN]:
        table.add_row(*(Text(printable(cell)) for cell in _cells(live)))
    # A program that reads it has no width.
    console = Console() if sys.stdout.isatty() else Console(width=_WIDTH)
    console.print(table)
    if len(found) > MAX_SHOWN:
        console.print(f"and {len(found) - MAX_SHOWN} more; `corral net --json` prints all")


def show_flows(sandbox: str | None, *, as_json: bool) -> None:
    """Prints what goes on now, oldest first."""
    found = list_flows(sandbox)
    if as_json:
        print(json.dumps([{"sandbox": live.sandbox} | flow_fields(live.flow) for live in found]))
    elif found:
        _print(found)
    else:
        print("nothing goes through the gateway")


def watch_flows(sandbox: str | None, *, as_json: bool) -> None:
    """Prints it again and again, until it is interrupted; as JSON one list a line."""
    while True:
        if not as_json and sys.stdout.isatty():
            sys.stdout.write("\033[H\033[2J")
        show_flows(sandbox, as_json=as_json)
        sys.stdout.flush()
        time.sleep(_INTERVAL)
