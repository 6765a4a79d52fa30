"""From options to a plan: the one place where identity, view, limits, filter and environment come together."""

from __future__ import annotations

import base64
import functools
import os
import pwd
import time
from dataclasses import dataclass
from typing import TYPE_CHECKING

from corral.diskspace import spare_bytes
from corral.errors import CorralError, RequestError
from corral.gateway import capture
from corral.policy.doors import open_brokers
from corral.policy.model import Degradation, Policy
from corral.policy.secret_sources import secret_variables
from corral.sandbox import cgroups, claims, paths
from corral.sandbox.environment import make_environment
from corral.sandbox.identity import Identity, make_identity, workspace_lines
from corral.sandbox.image import system_image
from corral.sandbox.landlock import plan_landlock
from corral.sandbox.limits import plan_limits, refusals_for
from corral.sandbox.options import Options, check_hidden, check_read, check_root, check_workspace, check_write
from corral.sandbox.outlet import Outlet, make_outlet
from corral.sandbox.plan import IdLine, Map, Plan
from corral.sandbox.tools import STANDARD_PATH, Tools, default_hints, environment_hints, find_tools
from corral.sandbox.view import CERTIFICATES, JAVA_TRUSTSTORE, Request, View, build_view, visible_trees
from corral.supervisor.filter import Table, find_table

if TYPE_CHECKING:
    from corral.sandbox.base import Base

_HIDDEN_ROOTS = ("/", "/root", "/home", "/home/*", "/var", "/etc", "/run", "/tmp", "/srv", "/mnt", "/media")
_MAX_STAMPED = 128


@dataclass(frozen=True, slots=True)
class Prepared:
    """All that is needed to launch one sandbox and to understand it afterwards."""

    id: str
    options: Options
    plan: bytes
    table: Table
    """Which system calls its filter reports, and why."""
    identity: Identity
    groups: cgroups.Groups
    view: View
    environment: dict[str, str]
    directory: str
    """Where commands start: the workspace."""
    workspace_owner: int
    gateway: bool
    """Whether all that is sent ends up at listeners for the gateway. Their descriptors come last in READY: TCP of IPv4,
    TCP of IPv6, DNS of IPv4, DNS of IPv6."""
    outlet: Outlet
    """What the gateway needs beside the policy."""
    base: Base | None
    """What it begins on, if that is not the host as it is; whoever launches it closes it at its end."""
    began: int
    """Nanoseconds since the epoch: what is changed on the host from then on is changed during the run."""


@functools.cache
def _hidden_roots() -> tuple[str, ...]:
    """Directories that must never be shown whole: those of the system, and every user's home."""
    homes = {entry.pw_dir for entry in pwd.getpwall() if entry.pw_uid >= 1000 or entry.pw_uid == 0}
    return tuple({*_HIDDEN_ROOTS, *homes, os.path.expanduser("~")})


@functools.lru_cache(maxsize=64)
def _find_tools(path: str, visible: tuple[str, ...], command: str | None, _seen: tuple[int, ...]) -> Tools:
    return find_tools(path, visible=visible, hidden_roots=_hidden_roots(), command=command)


def _tools(path: str, visible: tuple[str, ...], command: str | None) -> Tools:
    """What PATH needs; looked for again when a directory of PATH has changed."""
    seen = []
    for entry in path.split(":")[:_MAX_STAMPED]:
        try:
            seen.append(os.stat(entry).st_mtime_ns)
        except (OSError, ValueError):
            seen.append(0)
    return _find_tools(path, visible, command, tuple(seen))


def new_id() -> str:
    """A sandbox's name: short enough to type, and not to be guessed twice."""
    return base64.b32encode(os.urandom(5)).decode().lower()


def _plan_workspace_maps(plan: Plan, identity: Identity, owner: os.stat_result) -> None:
    """The map goes from disk ids to the sandbox's host ids: so does MOUNT_ATTR_IDMAP read it (mount_setattr(2))."""
    for which, number in ((Map.WORKSPACE_UID, owner.st_uid), (Map.WORKSPACE_GID, owner.st_gid)):
        lines = [IdLine(line.outside, identity.outside(line.inside), line.length) for line in workspace_lines(number)]
        plan.id_map(which, lines)


def _plan_capture(plan: Plan) -> None:
    """Routes, rules and listeners, by which everything that is sent arrives at the gateway; loopback is up by then."""
    plan.netlink(*capture.route_messages())
    plan.netlink(*capture.redirect_messages())
    for address in ("127.0.0.1", "::1"):
        plan.listen(address, capture.CAPTURE_PORT, capture.BACKLOG)
    for address in ("0.0.0.0", "::"):  # noqa: S104  # all that there is, is inside
        plan.datagram(address, capture.DNS_PORT)


def _set_aside(sandbox_id: str, policy: Policy) -> None:
    """Room for what is kept when it ends, as far as that can be known. Raises CorralError where there is none."""
    state = paths.state_directory()
    try:
        fd = os.open(state, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
        try:
            is_full = spare_bytes(fd) < 0
        finally:
            os.close(fd)
    except OSError as error:
        raise RequestError(f"{state}: {error.strerror}") from None
    if is_full:
        raise CorralError(
            f"the changes of this run could not be kept: less than 1 GiB or 5 % of the disk of {state} is free; make "
            "room (`corral gc`, `corral discard`), or run it with --discard"
        )
    if policy.layers.total_bytes is not None:
        from corral.sandbox.quotas import reserve  # slow to load, and seldom needed

        reserve(sandbox_id, policy)


def has_way_out(policy: Policy) -> bool:
    """Whether a sandbox gets one. Without a destination or a broker nothing is to be decided, and nothing leaves for
    want of a route."""
    return bool(policy.network.allow or policy.network.ask or open_brokers(policy))


def prepare(options: Options, *, gateway: bool | None = None) -> Prepared:
    """Compiles the plan of a new sandbox; leases its identity (released by whoever launches it). ``gateway`` is whether
    it has a way out, where that is not for the policy to say.

    Raises RequestError for options that cannot be met, WallError where this machine lacks something.
    """
    policy, resources = options.policy, options.policy.resources
    gateway = has_way_out(policy) if gateway is None else gateway
    java = os.path.exists(f"{options.root or ''}{JAVA_TRUSTSTORE}")
    outlet = make_outlet(policy, options.environment, CERTIFICATES, java=java, capture=options.capture)
    workspace = check_workspace(options.workspace)
    root = check_root(options.root)
    read = check_read(policy.filesystem.read)
    write = check_write(policy.filesystem.write)
    check_hidden(options.hidden, (workspace, *write, *read))
    visible = (*visible_trees(root), workspace)
    tools = _tools(options.environment.get("PATH", os.defpath), visible, options.command)
    trees = tools.trees if root is None else ()
    path = tools.path if root is None else ":".join(STANDARD_PATH)
    hints = default_hints(trees)
    if root is None:
        hints |= environment_hints(options.environment, (*trees, *visible))
    hints |= outlet.environment

    base, sandbox_id = None, new_id()
    if options.on is not None:
        from corral.sandbox.base import open_base  # which needs this module

        base = open_base(options.on, workspace)
    identity = None
    try:
        identity = make_identity(options.user, paths.runtime_directory() if os.geteuid() == 0 else "")
        if not identity.has(options.user):
            raise RequestError(f"user {options.user} does not exist in this sandbox")
        plan = Plan()
        identity.write(plan)
        owner = os.stat(workspace)
        if identity.privileged:
            _plan_workspace_maps(plan, identity, owner)
        for path_left in reversed(paths.controller_paths()):
            plan.remove(path_left)
        if resources.wall_time is not None:
            plan.wall_time(resources.wall_time)
        if options.keep:
            _set_aside(sandbox_id, policy)
        groups = cgroups.plan_groups(plan, f"{os.getpid()}-{sandbox_id}", resources)
        request = Request(
            identity=identity,
            workspace=workspace,
            image=system_image(paths.cache_directory(), not identity.privileged) if root is None else "",
            disk=resources.disk,
            inodes=resources.inodes,
            root=root,
            read=tuple(sorted({*read, *trees})),
            write=write,
            deny=(*policy.filesystem.deny, *options.hidden),
            nameservers=(capture.RESOLVER4, capture.RESOLVER6) if gateway else (),
            certificates=outlet.certificates,
            truststore=outlet.truststore,
            base=base.parts if base else {},
        )
        view = build_view(plan, request)
        plan.hostname("corral")
        plan.loopback()
        for listener in options.listeners:
            plan.listen(listener.address, listener.port)
        if gateway:
            _plan_capture(plan)
        plan_limits(plan, resources, groups)
        plan_landlock(plan, view.writable, view.devices, optional=Degradation.LANDLOCK in policy.allow_degraded)
        table = find_table(
            also=refusals_for(resources, groups),
            asked=policy.syscalls.ask,
            denied=policy.syscalls.deny,
            watched=bool(policy.filesystem.ask or policy.filesystem.watch),
            moved=policy.filesystem.rename_directories,
        )
        plan.filter(table.compile())
        environment = make_environment(
            options.environment,
            policy.environment,
            user=options.user,
            path=path,
            hints=hints,
            secrets=secret_variables(policy),
        )
        return Prepared(
            sandbox_id,
            options,
            plan.compile(),
            table,
            identity,
            groups,
            view,
            environment,
            workspace,
            owner.st_uid,
            gateway,
            outlet,
            base,
            time.time_ns(),
        )
    except BaseException:
        claims.release(sandbox_id)
        if identity is not None:
            identity.release()
        if base is not None:
            base.close()
        raise
