"""`corral doctor`: what of the walls this machine can build, and what to do about the rest.

:mod:`corral.sandbox.probes` tries the mechanisms and :mod:`corral.sandbox.drill` a whole sandbox; here are the readings
that explain a failure, what needs no sandbox to be tried, and the table. :mod:`corral.cli.advice` says what to do.
"""

from __future__ import annotations

import errno
import json
import os
import pwd
import re
import resource
from collections.abc import Iterator
from contextlib import suppress

from corral.cli.advice import FULL_MAP, Host, advise
from corral.errors import CorralError, WallError
from corral.policy.model import MIB, Resources
from corral.sandbox import cgroups, drill, paths, probes
from corral.sandbox.cgroups import Controller
from corral.sandbox.launcher import launcher_path
from corral.sandbox.limits import available_memory
from corral.sandbox.probes import Finding, State, Topic

NEEDED_KERNEL = (6, 6)
"""user.* attributes on tmpfs, where an overlay in a user namespace keeps its notes. The rest is older: Landlock 5.13,
overlays in user namespaces 5.11, WAIT_KILLABLE_RECV 5.19."""

# ---- readings ----


def _read(path: str) -> str | None:
    try:
        with open(path, encoding="utf-8", errors="replace") as file:
            return file.read().strip()
    except OSError:
        return None


def _container() -> str:
    if "KUBERNETES_SERVICE_HOST" in os.environ or os.path.exists("/run/secrets/kubernetes.io"):
        return "kubernetes"
    if os.path.exists("/run/.containerenv"):
        return "podman"
    if os.path.exists("/.dockerenv"):
        return "docker"
    named = _read("/run/host/container-manager") or _read("/run/systemd/container")
    if not named:
        found = re.search(r"(?:^|\0)container=([^\0]+)", _read("/proc/1/environ") or "")
        named = found[1] if found else ""
    return "lxc" if named.startswith(("lxc", "incus")) else named


def _user() -> str:
    try:
        return pwd.getpwuid(os.geteuid()).pw_name
    except KeyError:
        return str(os.geteuid())


def _cgroup_mounts() -> tuple[str, ...]:
    found = []
    for line in (_read("/proc/self/mountinfo") or "").split("\n"):
        before, _, after = line.partition(" - ")
        kind, options = after.split(" ")[0], set(after.split(" ")[-1].split(","))
        if kind == "cgroup2" or (kind == "cgroup" and options & {"memory", "pids", "cpu"}):
            found.append(before.split(" ")[4])
    return tuple(found)


def _unified(mounts: tuple[str, ...]) -> str:
    for path in mounts:
        if {"memory", "pids", "cpu"} & set((_read(f"{path}/cgroup.controllers") or "").split()):
            return path
    return ""


def read_host() -> Host:
    """The readings of this machine."""
    maps = [line.split() for line in (_read("/proc/self/uid_map") or f"0 0 {FULL_MAP}").split("\n")]
    mounts = [line.split(" ")[4] for line in (_read("/proc/self/mountinfo") or "").split("\n") if line.count(" ") > 4]
    launcher, mounted = "corral-launcher", _cgroup_mounts()
    with suppress(WallError):
        launcher = launcher_path()
    return Host(
        release=os.uname().release,
        uid=os.geteuid(),
        user=_user(),
        container=_container(),
        userns_clone=_read("/proc/sys/kernel/unprivileged_userns_clone"),
        max_user_namespaces=_read("/proc/sys/user/max_user_namespaces"),
        apparmor_userns=_read("/proc/sys/kernel/apparmor_restrict_unprivileged_userns"),
        lsm=_read("/sys/kernel/security/lsm"),
        # systemd's binfmt_misc is an ordinary part of /proc; the kernel does not count it as hiding anything.
        proc_mounts=tuple(p for p in mounts if p.startswith("/proc/") and p != "/proc/sys/fs/binfmt_misc"),
        mapped_ids=sum(int(fields[2]) for fields in maps if len(fields) == 3),
        filtered="\nSeccomp:\t2" in (_read("/proc/self/status") or ""),
        in_sandbox=os.environ.get("CORRAL") == "1",
        systemd=os.path.isdir("/run/systemd/system"),
        cgroup_mounts=mounted,
        unified=_unified(mounted),
        launcher=launcher,
    )


# ---- what needs no sandbox ----


def _version(release: str) -> tuple[int, int]:
    found = re.match(r"(\d+)\.(\d+)", release)
    return (int(found[1]), int(found[2])) if found else (0, 0)


def kernel_finding(release: str, others: list[Finding]) -> Finding:
    """The version only counts where the mechanisms themselves were not seen to work: distributions carry back."""
    if _version(release) >= NEEDED_KERNEL:
        return Finding(Topic.KERNEL, State.OK, release)
    seen = f"{release}, and 6.6 is the first with all that is needed"
    if any(finding.topic is Topic.FILES and finding.state is State.OK for finding in others):
        return Finding(Topic.KERNEL, State.NOTE, f"{seen}; yet it works here", required=False)
    return Finding(Topic.KERNEL, State.MISSING, seen)


_STAND_INS = {
    Controller.MEMORY: "memory (instead: RLIMIT_DATA for each process, accounting for their sum)",
    Controller.PIDS: "pids (instead: RLIMIT_NPROC)",
    Controller.CPU: "cpu (instead: whole processors by affinity)",
    Controller.KILL: "kill (instead: SIGKILL of the first process)",
    Controller.FREEZE: "freeze (instead: SIGSTOP to every process)",
}


def limits_finding(hierarchies: tuple[cgroups.Hierarchy, ...]) -> Finding:
    """Which limits hold for a sandbox as a whole, and what stands in for the others."""
    parts = []
    for controller, stand_in in _STAND_INS.items():
        version = next((h.version for h in hierarchies if controller in h.controllers), 0)
        parts.append(f"{controller.value} v{version}" if version else f"no {stand_in}")
    complete = all(not part.startswith("no ") for part in parts)
    return Finding(Topic.LIMITS, State.OK if complete else State.NOTE, ", ".join(parts), required=False)


def _directories() -> Iterator[Finding]:
    found = []
    try:
        for directory in (paths.cache_directory(), paths.state_directory(), paths.runtime_directory()):
            if not os.access(directory, os.R_OK | os.W_OK | os.X_OK):
                raise PermissionError(errno.EACCES, os.strerror(errno.EACCES), directory)
            found.append(directory)
    except (CorralError, OSError) as error:
        yield probes.failed(Topic.DIRECTORIES, error)
        return
    yield Finding(Topic.DIRECTORIES, State.OK, ", ".join(found))
    status = os.statvfs(found[1])
    free = status.f_bavail * status.f_frsize
    state = State.OK if free >= Resources().disk else State.NOTE
    yield Finding(Topic.DISK, state, f"{free // MIB} MiB free at {found[1]}", required=False)


def _resources() -> Iterator[Finding]:
    available, wanted = available_memory(), Resources()
    enough = available >= min(wanted.memory, wanted.disk)
    seen = f"{available // MIB} MiB available; one sandbox may take up to {wanted.memory // MIB} MiB"
    yield Finding(Topic.MEMORY, State.OK if enough else State.NOTE, seen, required=False)
    hard = resource.getrlimit(resource.RLIMIT_NOFILE)[1]
    enough = hard == resource.RLIM_INFINITY or hard >= wanted.open_files
    limit = "none" if hard == resource.RLIM_INFINITY else str(hard)
    seen = f"hard limit {limit}; a process inside may have {wanted.open_files}"
    yield Finding(Topic.OPEN_FILES, State.OK if enough else State.NOTE, seen, required=False)


# ---- the examination ----


def findings() -> list[Finding]:
    """All findings, in the order in which they build on each other."""
    found = [*probes.ladder(), *probes.filters()]
    # Landlock alone may be missing: a policy can do without, so the rest is worth trying.
    if any(finding.state is State.MISSING and finding.topic is not Topic.LANDLOCK for finding in found):
        found.append(Finding(Topic.WHOLE, State.UNTRIED, "needs what is missing above"))
    else:
        found += drill.whole()
    found += [limits_finding(cgroups.hierarchies()), *_directories(), *_resources()]
    return [kernel_finding(os.uname().release, found), *found]


_MARKS = {State.OK: "ok", State.MISSING: "MISSING", State.NOTE: "note", State.UNTRIED: "-"}
_STYLES = {State.OK: "green", State.MISSING: "bold red", State.NOTE: "yellow", State.UNTRIED: "dim"}


def _print_table(found: list[Finding], host: Host) -> None:
    from rich.console import Console
    from rich.table import Table
    from rich.text import Text

    from corral.cli.foreground import printable

    console = Console(highlight=False, emoji=False, markup=False)
    table = Table(box=None, pad_edge=False, show_header=False)
    table.add_column(no_wrap=True)
    table.add_column(no_wrap=True)
    table.add_column(overflow="fold")
    for finding in found:
        mark = Text(_MARKS[finding.state], style=_STYLES[finding.state])
        table.add_row(mark, Text(finding.topic.value), Text(printable(finding.seen)))
    console.print(table)
    told: set[str] = set()
    for finding in found:
        new = [line for line in advise(finding, host) if line not in told]
        told.update(new)
        if new:
            console.print(Text(f"\n{finding.topic.value}: what to do", style=_STYLES[finding.state]))
        for line in new:
            console.print(Text(f"  {printable(line)}"), soft_wrap=True)
    first = next((finding for finding in found if finding.state is State.MISSING and finding.required), None)
    if first is None:
        console.print(Text("\neverything that the walls need works here", style="green"))
    else:
        todo = (advise(first, host) or ["see above"])[0]
        text = f"\nnothing runs here before this is done ({first.topic.value}): {printable(todo)}"
        console.print(Text(text), soft_wrap=True)


def examine(*, as_json: bool) -> int:
    """Tries everything and prints what was found. Returns 0 when all that is required works, otherwise 126."""
    host = read_host()
    found = findings()
    if as_json:
        rows = [
            {
                "name": finding.topic.value,
                "required": finding.required,
                "state": finding.state.value,
                "seen": finding.seen,
                "todo": advise(finding, host),
            }
            for finding in found
        ]
        print(json.dumps(rows))
    else:
        _print_table(found, host)
    return WallError.exit_code if any(f.required and f.state is State.MISSING for f in found) else 0
