"""Whose files are whose: how the ids of files on the host read inside a sandbox."""

from __future__ import annotations

import os
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from corral.sandbox.identity import RANGE_LENGTH, Identity, workspace_lines
from corral.sandbox.plan import IdLine

NOBODY = 65534
"""What an id reads as inside that has no place in the map (user_namespaces(7), overflowuid)."""


@dataclass(frozen=True, slots=True)
class Ids:
    """How the ids of a tree on the host read inside."""

    uids: tuple[IdLine, ...]
    gids: tuple[IdLine, ...]

    def owner(self, status: os.stat_result) -> tuple[int, int]:
        """User and group inside."""
        return _inside(self.uids, status.st_uid), _inside(self.gids, status.st_gid)


def _translated(ids: Ids) -> Ids:
    uids, gids = (
        tuple(IdLine(line.inside, line.inside, line.length) for line in lines) for lines in (ids.uids, ids.gids)
    )
    return Ids(uids, gids)


def _inside(lines: Sequence[IdLine], outside: int) -> int:
    for line in lines:
        if line.outside <= outside < line.outside + line.length:
            return line.inside + outside - line.outside
    return NOBODY


@dataclass(frozen=True, slots=True)
class OwnerMap:
    """How ids read inside: in the layer, below the workspace, and below all other parts."""

    upper: Ids | None
    """None where the layer does not tell owners (kept by an ordinary user, who owns all of it)."""
    workspace: Ids
    system: Ids

    def namespace(self) -> Ids:
        """The ids of a user namespace whose root may read all of an ordinary user's layer."""
        if self.upper is not None:
            return self.upper
        uid, gid = os.geteuid(), os.getegid()
        return Ids(
            tuple(line for line in self.system.uids if line.outside == uid)[:1],
            tuple(line for line in self.system.gids if line.outside == gid)[:1],
        )

    def within(self) -> OwnerMap:
        """The same map as it holds in that namespace, where the kernel has translated the ids already."""
        return OwnerMap(self.upper and _translated(self.upper), _translated(self.workspace), _translated(self.system))


SAME_IDS = Ids((IdLine(0, 0, RANGE_LENGTH),), (IdLine(0, 0, RANGE_LENGTH),))


def owner_map(identity: Identity, workspace: os.stat_result) -> OwnerMap:
    """The map of a sandbox whose workspace on the host has the given owner."""
    own = Ids(identity.uid_lines, identity.gid_lines)
    if not identity.privileged:
        return OwnerMap(own, own, own)
    workspace_ids = Ids(workspace_lines(workspace.st_uid), workspace_lines(workspace.st_gid))
    return OwnerMap(own, workspace_ids, SAME_IDS)


def owners_to_json(owners: OwnerMap) -> list[Any]:
    """An owner map as JSON."""
    return [[ids.uids, ids.gids] if ids else None for ids in (owners.upper, owners.workspace, owners.system)]


def owners_from_json(data: Any) -> OwnerMap:
    """The owner map that :func:`owners_to_json` made. Raises ValueError or TypeError for anything else."""
    upper, workspace, system = (None if row is None else Ids(*(_lines(part) for part in row)) for row in data)
    if workspace is None or system is None:
        raise ValueError("an owner map without the ids of the lower trees")
    return OwnerMap(upper, workspace, system)


def _lines(rows: Any) -> tuple[IdLine, ...]:
    lines = tuple(IdLine(*row) for row in rows)
    if not all(type(number) is int and number >= 0 for line in lines for number in line):
        raise ValueError("an id line of other things than numbers")
    return lines
