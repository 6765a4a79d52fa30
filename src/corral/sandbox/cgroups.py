"""Control groups: which hierarchies this process may use, and what a sandbox's groups are set to.

Version 2, version 1 and both at once ("hybrid") are used as found. Groups are made, filled and removed by the
launcher's keeper, so that they go away with the sandbox whatever happens to the controller; this module only decides.

In version 2 a group has the controllers that its parent gives to its children (``cgroup.subtree_control``), and a group
with processes of its own can give none ("no internal processes", cgroups(7); the root of all is exempt). A login
session is such a group, so the sandbox's groups are then made beside it, below one of its ancestors.
"""

from __future__ import annotations

import functools
import os
from contextlib import suppress
from dataclasses import dataclass
from enum import Enum

from corral.policy.model import Resources
from corral.sandbox.mounts import unescape
from corral.sandbox.plan import Plan

PREFIX = "corral-"
CPU_PERIOD_US = 100_000
# The keeper's first process is one, and while an exec starts there is one more.
OWN_PROCESSES = 2


class Controller(Enum):
    """What a hierarchy can do for a sandbox."""

    MEMORY = "memory"
    PIDS = "pids"
    CPU = "cpu"
    KILL = "kill"
    FREEZE = "freeze"


_LIMITING = frozenset({Controller.MEMORY, Controller.PIDS, Controller.CPU})


@dataclass(frozen=True, slots=True)
class Hierarchy:
    """One mounted hierarchy in which groups may be made, below ``parent``."""

    version: int
    parent: str
    controllers: frozenset[Controller]


def _own_groups(process: str) -> dict[str, str]:
    """A process's group by controller name; "" is version 2 (proc_pid_cgroup(5))."""
    groups: dict[str, str] = {}
    with open(f"{process}/cgroup", encoding="utf-8", errors="surrogateescape") as lines:
        for line in lines:
            _, names, path = line.rstrip("\n").split(":", 2)
            for name in names.split(","):
                groups[name] = path
    return groups


def _mounted(process: str) -> list[tuple[str, str, str, str]]:
    """(type, root, mount point, super options) of each cgroup mount."""
    found = []
    with open(f"{process}/mountinfo", encoding="utf-8", errors="surrogateescape") as lines:
        for line in lines:
            if " - cgroup" not in line:
                continue
            before, _, after = line.rstrip("\n").partition(" - ")
            fields, kind = before.split(" "), after.split(" ")
            found.append((kind[0], unescape(fields[3]), unescape(fields[4]), kind[-1]))
    return found


def _directory(mount_point: str, root: str, group: str) -> str | None:
    """Where a group lies; None where it is not below what is mounted here ("/.." leads out of a cgroup namespace)."""
    if ".." in group.split("/") or (group != root and not group.startswith(root.rstrip("/") + "/")):
        return None
    return os.path.normpath(mount_point.rstrip("/") + "/" + group[len(root.rstrip("/")) :])


def _usable(directory: str) -> bool:
    return os.access(directory, os.W_OK) and os.access(directory + "/cgroup.procs", os.W_OK)


def _words(file: str) -> frozenset[str]:
    try:
        with open(file, encoding="ascii") as words:
            return frozenset(words.read().split())
    except OSError:
        return frozenset()


def _give(group: str, names: frozenset[str]) -> None:
    """Tries to give controllers to a group's children; one by one, as one that is refused has all refused."""
    for name in sorted(names):
        with suppress(OSError), open(f"{group}/cgroup.subtree_control", "wb", buffering=0) as file:
            file.write(f"+{name}".encode())


def find_parent(top: str, own: str, wanted: frozenset[str]) -> tuple[str, frozenset[str]] | None:
    """Where a process in the version 2 group ``own`` makes groups, and what of ``wanted`` they have there.

    That is ``own`` or one of its ancestors up to ``top``, where the hierarchy is mounted: the nearest of those that
    give their children most. Where one can be made to give more, it is; those that do already go first, as whoever
    manages the hierarchy (systemd) keeps what it has set up itself, and may undo what others have.

    A process may be moved by who can write to ``cgroup.procs`` of the common ancestor of both groups (cgroups(7),
    "Delegation containment"). Here that is the parent itself, and None is returned where there is none to write to.
    """
    groups = [own]
    while len(groups[-1]) > len(top):
        groups.append(os.path.dirname(groups[-1]))
    given = {group: _words(f"{group}/cgroup.subtree_control") & wanted for group in groups if _usable(group)}
    if not given:
        return None
    best = max(given, key=lambda group: len(given[group]))
    offered = {group: _words(f"{group}/cgroup.controllers") & wanted for group in given}
    for group in sorted(offered, key=lambda group: -len(offered[group])):
        if len(offered[group]) <= len(given[best]):
            break
        _give(group, offered[group] - given[group])
        now = _words(f"{group}/cgroup.subtree_control") & wanted
        if len(now) > len(given[best]):
            return group, now
    return best, given[best]


def find_hierarchies(process: str = "/proc/self") -> tuple[Hierarchy, ...]:
    """The hierarchies in which ``process`` (a directory as in proc(5)) may make groups, each controller at most once.

    May change which controllers the children of version 2 groups are given: see :func:`find_parent`.
    """
    groups = _own_groups(process)
    found: list[Hierarchy] = []
    taken: set[Controller] = set()
    for kind, root, mount_point, options in sorted(_mounted(process), key=lambda mount: mount[0] == "cgroup"):
        parent: str | None = None
        controllers: frozenset[Controller] = frozenset()
        if kind == "cgroup2":
            own = _directory(mount_point, root, groups.get("", "/"))
            place = find_parent(mount_point, own, frozenset(c.value for c in _LIMITING - taken)) if own else None
            if place:
                parent, names = place
                controllers = frozenset({Controller.KILL, Controller.FREEZE, *map(Controller, names)})
        elif controllers := frozenset(c for c in _LIMITING if c.value in options.split(",")):
            parent = _directory(mount_point, root, groups.get(next(iter(controllers)).value, "/"))
        controllers -= taken
        if parent and controllers and _usable(parent):
            found.append(Hierarchy(2 if kind == "cgroup2" else 1, parent, controllers))
            taken |= controllers
    return tuple(found)


@functools.cache
def hierarchies() -> tuple[Hierarchy, ...]:
    """Those of this process; may be empty."""
    return find_hierarchies()


def available() -> frozenset[Controller]:
    """All that the usable hierarchies can do together."""
    return frozenset(controller for hierarchy in hierarchies() for controller in hierarchy.controllers)


@functools.lru_cache(maxsize=64)
def _settings(hierarchy: Hierarchy, resources: Resources) -> tuple[tuple[str, str], ...]:
    one = hierarchy.version == 1
    settings: list[tuple[str, str]] = []
    if Controller.MEMORY in hierarchy.controllers:
        limit = str(resources.memory)
        settings.append(("memory.limit_in_bytes" if one else "memory.max", limit))
        # Swap off: version 1 limits memory and swap together, version 2 swap alone; absent without swap accounting.
        swap = "memory.memsw.limit_in_bytes" if one else "memory.swap.max"
        if _child_would_have(hierarchy, swap):
            settings.append((swap, limit if one else "0"))
        if not one:
            settings.append(("memory.oom.group", "0"))
    if Controller.PIDS in hierarchy.controllers:
        settings.append(("pids.max", str(resources.processes + OWN_PROCESSES)))
    if Controller.CPU in hierarchy.controllers and resources.cpu is not None:
        quota = str(max(1000, int(resources.cpu * CPU_PERIOD_US)))
        if one:
            settings += [("cpu.cfs_period_us", str(CPU_PERIOD_US)), ("cpu.cfs_quota_us", quota)]
        else:
            settings.append(("cpu.max", f"{quota} {CPU_PERIOD_US}"))
    return tuple(settings)


@functools.cache
def _child_would_have(hierarchy: Hierarchy, file: str) -> bool:
    """Version 1 shows the same files at every level but the root's few exceptions; version 2 only below the root."""
    if os.path.exists(f"{hierarchy.parent}/{file}"):
        return True
    probe = f"{hierarchy.parent}/{PREFIX}probe-{os.getpid()}"
    try:
        os.mkdir(probe)
    except OSError:
        return False
    try:
        return os.path.exists(f"{probe}/{file}")
    finally:
        os.rmdir(probe)


@dataclass(frozen=True, slots=True)
class Groups:
    """The groups of one sandbox, by what they can do."""

    paths: tuple[tuple[Hierarchy, str], ...]

    def path(self, controller: Controller) -> str | None:
        """The group's directory in the hierarchy that has ``controller``, or None."""
        for hierarchy, path in self.paths:
            if controller in hierarchy.controllers:
                return path
        return None

    def version(self, controller: Controller) -> int:
        """The version of the hierarchy that has ``controller``; 0 where there is none."""
        for hierarchy, _ in self.paths:
            if controller in hierarchy.controllers:
                return hierarchy.version
        return 0


def plan_groups(plan: Plan, name: str, resources: Resources) -> Groups:
    """Adds the groups of sandbox ``name`` to a plan and returns where they will be."""
    paths = []
    for hierarchy in hierarchies():
        needed = hierarchy.controllers - (frozenset({Controller.CPU}) if resources.cpu is None else frozenset())
        if not needed:
            continue
        path = f"{hierarchy.parent}/{PREFIX}{name}"
        plan.cgroup(hierarchy.version, path, _settings(hierarchy, resources))
        paths.append((hierarchy, path))
    return Groups(tuple(paths))


def reap_dead() -> None:
    """Removes groups whose sandbox is gone: all of ours in which nothing runs and whose controller has died.

    A group is named ``corral-<controller pid>-...``; rmdir fails by itself while a process is left in it.
    """
    for hierarchy in hierarchies():
        try:
            names = os.listdir(hierarchy.parent)
        except OSError:
            continue
        for name in names:
            if not name.startswith(PREFIX):
                continue
            owner = name[len(PREFIX) :].split("-")[0]
            if owner.isdecimal() and not os.path.exists(f"/proc/{owner}"):
                try:
                    os.rmdir(f"{hierarchy.parent}/{name}")
                except OSError:
                    continue
