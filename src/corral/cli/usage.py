"""`corral usage`: what models, data and services have been used, by whom, and what that cost."""

from __future__ import annotations

import json
import sys
import time
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any

from corral.actions import Used
from corral.brokers.metering.meter import row_of
from corral.brokers.metering.prices import BILLION
from corral.brokers.metering.usage import By, Group, Sums, Usage, Wanted, add_up, group_of, read_usage
from corral.cli.foreground import complain, printable
from corral.errors import RequestError
from corral.log.query import parse_time
from corral.log.reader import Reader
from corral.log.records import Record, decode
from corral.policy.model import Agent
from corral.sandbox.paths import state_directory

_NUMBERS = ("REQUESTS", "ERRORS", "REFUSED", "INPUT", "CACHED", "OUTPUT", "COST", "ROWS", "BYTES", "TIME")
_WIDTH = 200
_SUMS = (
    "requests",
    "errors",
    "refused",
    "input_tokens",
    "cached_tokens",
    "written_tokens",
    "output_tokens",
    "estimated",
    "rows",
    "bytes_up",
    "bytes_down",
    "seconds",
)


def usage_directory() -> Path:
    """Where this user's meter is."""
    return Path(state_directory()) / "usage"  # as corral.brokers.metering.session has it, which takes longer to load


def show_usage(
    *, by: str, since: str | None, session: str | None, agent: str | None, log: str | None, as_json: bool
) -> None:
    """Prints what was used, as the meter counted it, or as the records of a log add up.

    Raises RequestError, MeterFault, and what reading a log raises."""
    try:
        group = By(by)
    except ValueError:
        raise RequestError(f"--by is one of {', '.join(each.value for each in By)}") from None
    wanted = Wanted(None if since is None else parse_time(since, time.time()), session, agent)
    usage = read_usage(usage_directory(), group, wanted) if log is None else _of_log(log, group, wanted)
    if as_json:
        print(json.dumps(_to_json(usage, group)))
        return
    if usage.groups:
        _print(usage, group)
    else:
        print("nothing was used")
    if usage.lost:
        complain(f"{usage.lost} calls could not be counted; the sums are too small by what they used")


def _of_log(log: str, by: By, wanted: Wanted) -> Usage:
    from corral.cli.log import directory_of

    return add_up(groups_of(decoded(Reader(directory_of(log))), by, wanted), by)


def groups_of(records: Iterable[Record], by: By, wanted: Wanted) -> Iterator[Group]:
    """The calls among these records that are wanted, each as a group of one."""
    for record in records:
        event: object = record.event
        if not isinstance(event, Used):
            continue
        row = row_of(event, Agent(record.context.agent, record.context.agent_version))
        is_wanted = (
            (wanted.since is None or row["at"] >= wanted.since)
            and wanted.session in (None, row["session"])
            and wanted.agent in (None, row["agent"])
        )
        if is_wanted:
            yield group_of(row, by)


def decoded(reader: Reader) -> Iterator[Record]:
    """What can be read of a log. Whoever must know that it is whole verifies it."""
    for _, entry in reader.entries():
        try:
            yield decode(entry)
        except (ValueError, RecursionError):
            continue


def _to_json(usage: Usage, by: By) -> dict[str, Any]:
    return {
        "by": by.value,
        "groups": [{"key": list(each.key)} | _sums(each.sums) for each in usage.groups],
        "total": _sums(usage.total),
        "lost": usage.lost,
    }


def _sums(sums: Sums) -> dict[str, Any]:
    return {name: getattr(sums, name) for name in _SUMS} | {
        "cost": {currency: _exact(cost) for currency, cost in sorted(sums.cost.items())}
    }


def _exact(cost: int) -> str:
    """Billionths as a decimal number, exact: as text, because readers of JSON make binary fractions of numbers."""
    return f"{cost // BILLION}.{cost % BILLION:09}"


def _print(usage: Usage, by: By) -> None:
    from rich.console import Console
    from rich.table import Table
    from rich.text import Text

    table = Table(box=None, pad_edge=False)
    table.add_column(by.value.upper(), no_wrap=by is not By.MODEL, overflow="fold")
    for title in _NUMBERS:
        table.add_column(title, no_wrap=True, justify="right")
    for group in usage.groups:
        table.add_row(*(Text(printable(cell)) for cell in (_name(group.key, by), *_cells(group.sums))))
    table.add_section()
    table.add_row(*(Text(printable(cell), "bold") for cell in ("total", *_cells(usage.total))))
    # A program that reads it has no width.
    (Console() if sys.stdout.isatty() else Console(width=_WIDTH)).print(table)
    if usage.total.estimated:
        print(f"of {usage.total.estimated} requests the tokens are estimates: the upstream did not say")


def _name(key: Sequence[str], by: By) -> str:
    if by is By.SESSION and not key[0]:
        return "(older)"
    return " ".join(key)


def _cells(sums: Sums) -> tuple[str, ...]:
    counts = (sums.requests, sums.errors, sums.refused, sums.input_tokens, sums.cached_tokens, sums.output_tokens)
    cost = ", ".join(f"{cost / BILLION:,.4f} {currency}" for currency, cost in sorted(sums.cost.items()))
    moved = sums.bytes_up + sums.bytes_down
    return (*(f"{count:,}" for count in counts), cost or "-", f"{sums.rows:,}", _size(moved), f"{sums.seconds:,.0f}s")


def _size(count: int) -> str:
    size = float(count)
    for unit in ("B", "KiB", "MiB", "GiB"):
        if size < 1024:
            return f"{size:.0f} {unit}" if unit == "B" else f"{size:.1f} {unit}"
        size /= 1024
    return f"{size:.1f} TiB"
