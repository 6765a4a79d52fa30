"""What was used, added up: what the meter's database says while sessions write to it."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field, fields
from datetime import UTC, datetime
from enum import Enum
from pathlib import Path
from typing import Any

from sqlalchemy import Integer, Select, String, cast, func, literal, select
from sqlalchemy.engine import Connection
from sqlalchemy.exc import SQLAlchemyError

from corral.brokers.metering.store import CALLS, DAYS, FILE, LOSSES, SUMS, MeterFault, fault, open_database

_DAY = 86400


class By(Enum):
    """What usage is told apart by."""

    SESSION = "session"
    AGENT = "agent"
    """Name and version."""
    SOURCE = "source"
    """The upstream, source of data, or service."""
    MODEL = "model"
    """Or, of data and services, the statement or operation."""
    DAY = "day"
    """In UTC."""


_COLUMNS = {
    By.SESSION: ("session",),
    By.AGENT: ("agent", "agent_version"),
    By.SOURCE: ("kind", "source"),
    By.MODEL: ("kind", "name"),
    By.DAY: ("day",),
}


@dataclass(slots=True)
class Sums:
    """Calls added up. Costs are billionths, by currency."""

    requests: int = 0
    errors: int = 0
    """The upstream was not reached, or broke off, or answered with an error."""
    refused: int = 0
    """By the policy, a budget or a scanner: nothing was sent."""
    input_tokens: int = 0
    output_tokens: int = 0
    cached_tokens: int = 0
    written_tokens: int = 0
    rows: int = 0
    bytes_up: int = 0
    bytes_down: int = 0
    seconds: float = 0.0
    estimated: int = 0
    """Calls whose tokens are our estimate."""
    cost: dict[str, int] = field(default_factory=dict)

    def add(self, other: Sums) -> None:
        for each in fields(Sums):
            if each.name != "cost":
                setattr(self, each.name, getattr(self, each.name) + getattr(other, each.name))
        for currency, cost in other.cost.items():
            self.cost[currency] = self.cost.get(currency, 0) + cost


@dataclass(frozen=True, slots=True)
class Group:
    """What one session, agent, source, model or day has used."""

    key: tuple[str, ...]
    sums: Sums


@dataclass(frozen=True, slots=True)
class Usage:
    """What was used in a time."""

    groups: tuple[Group, ...]
    """Of days the oldest first; of all else those that cost the most, and of these that took the most, first."""
    total: Sums
    lost: int
    """Calls that could not be counted in that time."""


@dataclass(frozen=True, slots=True)
class Wanted:
    """Which calls. ``None`` means any; an ``agent`` is any version of it."""

    since: float | None = None
    """Seconds since the epoch. Of calls that are folded into days, their days count as a whole."""
    session: str | None = None
    agent: str | None = None


def read_usage(directory: Path, by: By, wanted: Wanted) -> Usage:
    """Adds up what is in the meter's database; nothing where there is none. Raises MeterFault."""
    if not (directory / FILE).exists():
        return Usage((), Sums(), 0)
    engine = open_database(directory, make=False)
    try:
        with engine.begin() as connection:
            lost = select(func.coalesce(func.sum(LOSSES.c.calls), 0))
            if wanted.since is not None:
                lost = lost.where(LOSSES.c.at >= wanted.since)
            return add_up(_groups(connection, by, wanted), by, int(connection.execute(lost).scalar() or 0))
    except SQLAlchemyError as error:
        raise fault(directory / FILE, error) from None
    finally:
        engine.dispose()


def add_up(found: Iterable[Group], by: By, lost: int = 0) -> Usage:
    """The groups, each once and in order, with their total."""
    groups: dict[tuple[str, ...], Sums] = {}
    total = Sums()
    for group in found:
        groups.setdefault(group.key, Sums()).add(group.sums)
        total.add(group.sums)
    made = [Group(key, sums) for key, sums in groups.items()]
    made.sort(key=lambda group: group.key if by is By.DAY else _weight(group))
    return Usage(tuple(made), total, lost)


def _weight(group: Group) -> tuple[Any, ...]:
    sums = group.sums
    return (-sum(sums.cost.values()), -sums.input_tokens - sums.output_tokens, -sums.requests, group.key)


def day_of(at: float) -> str:
    """The day of a time, in UTC."""
    return datetime.fromtimestamp(at, UTC).date().isoformat()


def _groups(connection: Connection, by: By, wanted: Wanted) -> Iterator[Group]:
    for query in _queries(by, wanted):
        for row in connection.execute(query):
            yield group_of(dict(row._mapping), by)


def group_of(row: dict[str, Any], by: By) -> Group:
    """One row of calls as a group of its own."""
    if by is By.DAY and "day" not in row:
        row = row | {"day": int(row["at"] // _DAY)}
    key = tuple(day_of(row[name] * _DAY) if name == "day" else str(row[name]) for name in _COLUMNS[by])
    cost = {row["currency"]: row["cost"]} if row["cost"] else {}
    return Group(key, Sums(**{name: row[name] for name in SUMS if name != "cost"}, cost=cost))


def _queries(by: By, wanted: Wanted) -> Iterator[Select[Any]]:
    for table in (CALLS, DAYS):
        columns: dict[str, Any] = dict(table.c)
        if table is CALLS:
            columns["day"] = cast(CALLS.c.at / _DAY, Integer)
        else:
            if wanted.session is not None:
                continue
            columns["session"] = literal("", String)
        keys = [columns[name].label(name) for name in (*_COLUMNS[by], "currency")]
        query = select(*keys, *(func.sum(columns[name]).label(name) for name in SUMS))
        if wanted.since is not None:
            query = query.where(
                CALLS.c.at >= wanted.since if table is CALLS else DAYS.c.day >= int(wanted.since // _DAY)
            )
        if wanted.session is not None:
            query = query.where(CALLS.c.session == wanted.session)
        if wanted.agent is not None:
            query = query.where(columns["agent"] == wanted.agent)
        yield query.group_by(*keys)


__all__ = ["By", "Group", "MeterFault", "Sums", "Usage", "Wanted", "add_up", "day_of", "group_of", "read_usage"]
