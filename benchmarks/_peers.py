"""Other sandboxes with the same mounts, put together from the very plan that Corral's launcher gets.

What a peer cannot do is left out, in its favour: copy-on-write (plain binds of the lower trees; real overlays where
the installed bwrap has them), Landlock, idmapped mounts, id ranges, cgroups, rlimits, hidepid, the ban on further user
namespaces. What it can do is asked of it: namespaces, every mount, masked paths, no capabilities, a filter of
the same length. It lets through what Corral's supervisor would be told of, as nobody supervises in a peer.
"""

from __future__ import annotations

import functools
import json
import os
import shutil
import struct
import subprocess
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from corral.sandbox.plan import Attribute, Kind, Origin
from corral.sandbox.prepare import Prepared
from corral.supervisor.filter import RET_ALLOW, RET_USER_NOTIF

_DEVICE_DIRECTORY = "/dev"
_SEPARATE_DEVICES = ("/dev/shm", "/dev/mqueue")
_INSTRUCTION = struct.Struct("<HBBI")  # struct sock_filter
_RETURN = 0x06  # BPF_RET | BPF_K


class _Reader:
    """Takes values of the wire format (src/launcher/wire.h) off the front of bytes."""

    def __init__(self, data: bytes) -> None:
        self.data, self.at = data, 0

    def u32(self) -> int:
        self.at += 4
        return int(struct.unpack_from("<I", self.data, self.at - 4)[0])

    def u64(self) -> int:
        return self.u32() | self.u32() << 32

    def take(self, length: int) -> bytes:
        self.at += length
        return self.data[self.at - length : self.at]

    def blob(self) -> bytes:
        return self.take(self.u32())

    def text(self) -> str:
        value = self.blob()
        self.at += 1
        return os.fsdecode(value)


@dataclass(frozen=True, slots=True)
class Mount:
    """One thing that the plan makes: ``kind`` is dir, link, bind, read-only, device, tmpfs, proc, dev, mqueue."""

    kind: str
    target: str
    source: str = ""


@dataclass(frozen=True, slots=True)
class Blueprint:
    """What a peer has to build."""

    mounts: tuple[Mount, ...]
    overlays: dict[str, tuple[str, ...]]
    """Lower directories of the mounts that are copy-on-write in Corral, topmost first."""
    hostname: str
    filter: bytes
    directory: str
    environment: dict[str, str]


def _steps(plan: bytes) -> Iterator[tuple[int, _Reader]]:
    reader = _Reader(plan)
    reader.take(12)
    for _ in range(reader.u32()):
        kind = reader.u32()
        yield kind, _Reader(reader.blob())


def _bind(body: _Reader, nothing: str) -> Mount:
    origin, attributes = body.u32(), Attribute(body.u32())
    body.u32()
    source, target = body.text(), body.text()
    if origin == Origin.LAYER and Attribute.READ_ONLY not in attributes:
        return Mount("tmpfs", target)  # a part of the layer that starts empty
    if origin == Origin.LAYER:
        source = nothing
    kind = "device" if Attribute.DEVICES in attributes else "read-only" if Attribute.READ_ONLY in attributes else "bind"
    return Mount(kind, target, source)


def _without_listener(program: bytes) -> bytes:
    """The filter with everything allowed that it reports: no peer has anybody who listens, so all that were ENOSYS."""
    instructions = [
        (code, yes, no, RET_ALLOW if code == _RETURN and value == RET_USER_NOTIF else value)
        for code, yes, no, value in _INSTRUCTION.iter_unpack(program)
    ]
    return b"".join(_INSTRUCTION.pack(*instruction) for instruction in instructions)


def read_plan(prepared: Prepared, nothing: str) -> Blueprint:
    """What ``prepared`` builds; ``nothing`` is an empty directory to mask with."""
    mounts: list[Mount] = []
    overlays: dict[str, tuple[str, ...]] = {}
    hostname, program = "", b""
    for kind, body in _steps(prepared.plan):
        if kind == Kind.DIRECTORY:
            mounts.append(Mount("dir", body.text()))
        elif kind == Kind.SYMLINK:
            source = body.text()
            mounts.append(Mount("link", body.text(), source))
        elif kind == Kind.OVERLAY:
            target = body.text()
            body.text(), body.text()
            lowers = []
            for _ in range(body.u32()):
                body.u32()
                lowers.append(body.text())
            overlays[target] = tuple(lowers)
            mounts.append(Mount("bind", target, lowers[-1]))
        elif kind == Kind.BIND:
            mounts.append(_bind(body, nothing))
        elif kind in (Kind.PROC, Kind.MQUEUE):
            mounts.append(Mount("proc" if kind == Kind.PROC else "mqueue", body.text()))
        elif kind == Kind.HOSTNAME:
            hostname = body.text()
        elif kind == Kind.FILTER:
            program = _without_listener(body.blob())
    return Blueprint(
        tuple(_whole_dev(mounts)), overlays, hostname, program, prepared.directory, dict(prepared.environment)
    )


def _whole_dev(mounts: Sequence[Mount]) -> Iterator[Mount]:
    """Peers make devices, their links and the terminals' file system in one: a minimal /dev."""
    made = False
    for mount in mounts:
        own = mount.target.startswith(f"{_DEVICE_DIRECTORY}/") and mount.target not in _SEPARATE_DEVICES
        if mount.target == _DEVICE_DIRECTORY or own:
            if not made:
                yield Mount("dev", _DEVICE_DIRECTORY)
            made = True
        else:
            yield mount


def run_quietly(argv: Sequence[str], *, env: dict[str, str], fds: tuple[int, ...] = ()) -> None:
    """One command to its end, output captured; the same call for every peer. Raises CalledProcessError.

    Never with a time-out: then `subprocess` waits for the exit by sleeping 0.5, 1, 2, 4... ms, and all times are wrong.
    """
    subprocess.run(argv, stdin=subprocess.DEVNULL, capture_output=True, check=True, env=env, pass_fds=fds)


Peer = Callable[[], None]


def _trial(peer: Peer) -> str:
    """Why a peer cannot run here; empty when it can."""
    try:
        peer()
    except subprocess.CalledProcessError as error:
        lines = os.fsdecode(error.stderr).strip().splitlines()
        return lines[-1] if lines else f"exit code {error.returncode}"
    except OSError as error:
        return str(error)
    return ""


# ---- bubblewrap ----


@functools.cache
def _has_overlays(bwrap: str) -> bool:
    return b"--tmp-overlay" in subprocess.run([bwrap, "--help"], capture_output=True, check=False).stdout


def bwrap_arguments(bwrap: str, blueprint: Blueprint, filter_fd: int) -> list[str]:
    """The bwrap command line that builds ``blueprint``, up to the command to run."""
    simple = {
        "dir": "--dir",
        "tmpfs": "--tmpfs",
        "proc": "--proc",
        "dev": "--dev",
        "mqueue": "--mqueue",
    }
    sourced = {"bind": "--bind", "read-only": "--ro-bind", "device": "--dev-bind", "link": "--symlink"}
    argv = [bwrap, "--unshare-all", "--uid", "1000", "--gid", "1000", "--die-with-parent", "--new-session"]
    for mount in blueprint.mounts:
        if mount.target in blueprint.overlays and _has_overlays(bwrap):
            for lower in reversed(blueprint.overlays[mount.target]):
                argv += ["--overlay-src", lower]
            argv += ["--tmp-overlay", mount.target]
        elif mount.kind in simple:
            argv += [simple[mount.kind], mount.target]
        else:
            argv += [sourced[mount.kind], mount.source, mount.target]
    argv += ["--remount-ro", "/", "--hostname", blueprint.hostname, "--cap-drop", "ALL"]
    argv += ["--seccomp", str(filter_fd), "--chdir", blueprint.directory]
    return argv


def make_bwrap(blueprint: Blueprint, command: Sequence[str]) -> Peer | str:
    """Runs ``command`` in bubblewrap each time it is called; or the reason why that cannot be."""
    bwrap = shutil.which("bwrap")
    if bwrap is None:
        return "bwrap is not installed"
    fd = os.memfd_create("filter", 0)
    os.write(fd, blueprint.filter)
    argv = [*bwrap_arguments(bwrap, blueprint, fd), *command]

    def peer() -> None:
        os.lseek(fd, 0, os.SEEK_SET)
        run_quietly(argv, env=blueprint.environment, fds=(fd,))

    return _trial(peer) or peer


# ---- crun and runsc, from one OCI bundle ----


def _oci_mounts(blueprint: Blueprint) -> list[dict[str, Any]]:
    safe = ["nosuid", "nodev"]
    own = {
        "proc": [("/proc", "proc", "proc", [*safe, "noexec"])],
        "tmpfs": [("", "tmpfs", "tmpfs", [*safe, "mode=1777"])],
        "mqueue": [("", "mqueue", "mqueue", [*safe, "noexec"])],
        "dev": [
            ("/dev", "tmpfs", "tmpfs", ["nosuid", "mode=755"]),
            ("/dev/pts", "devpts", "devpts", ["nosuid", "noexec", "newinstance", "ptmxmode=0666", "mode=0620"]),
        ],
    }
    found: list[dict[str, Any]] = []
    for mount in blueprint.mounts:
        if mount.target.startswith("/proc/"):
            continue  # maskedPaths and readonlyPaths below
        if mount.kind in own:
            for own_target, kind, source, options in own[mount.kind]:
                target = own_target or mount.target
                found.append({"destination": target, "type": kind, "source": source, "options": options})
        elif mount.kind in ("bind", "read-only", "device"):
            options = ["rbind", "nosuid", *(["nodev"] if mount.kind != "device" else [])]
            options += ["ro"] if mount.kind == "read-only" else []
            found.append({"destination": mount.target, "type": "bind", "source": mount.source, "options": options})
    return found


def write_bundle(blueprint: Blueprint, command: Sequence[str], place: Path, nothing: str) -> None:
    """An OCI bundle (runtime-spec config.json and root) in ``place``."""
    root = place / "rootfs"
    for mount in blueprint.mounts:
        if mount.kind == "link":
            root.mkdir(parents=True, exist_ok=True)
            (root / mount.target[1:]).parent.mkdir(parents=True, exist_ok=True)
            (root / mount.target[1:]).symlink_to(mount.source)
    in_proc = [mount for mount in blueprint.mounts if mount.target.startswith("/proc/")]
    ids = [{"containerID": 0, "hostID": 0x7A000000, "size": 65536}]
    if os.geteuid() != 0:
        ids = [{"containerID": 1000, "hostID": os.geteuid(), "size": 1}]
    config = {
        "ociVersion": "1.0.2",
        "process": {
            "terminal": False,
            "user": {"uid": 1000, "gid": 1000},
            "args": list(command),
            "env": [f"{name}={value}" for name, value in blueprint.environment.items()],
            "cwd": blueprint.directory,
            "capabilities": {"bounding": [], "effective": [], "permitted": [], "inheritable": [], "ambient": []},
            "noNewPrivileges": True,
        },
        "root": {"path": "rootfs", "readonly": True},
        "hostname": blueprint.hostname,
        "mounts": _oci_mounts(blueprint),
        "linux": {
            "namespaces": [{"type": name} for name in ("user", "mount", "pid", "network", "ipc", "uts", "cgroup")],
            "uidMappings": ids,
            "gidMappings": ids,
            "maskedPaths": [mount.target for mount in in_proc if mount.source in ("/dev/null", nothing)],
            "readonlyPaths": [mount.target for mount in in_proc if mount.source not in ("/dev/null", nothing)],
        },
    }
    (place / "config.json").write_text(json.dumps(config))


def make_oci(runtime: str, options: Sequence[str], bundle: Path) -> Peer | str:
    """Runs the bundle with an OCI runtime each time it is called; or the reason why that cannot be."""
    program = shutil.which(runtime)
    if program is None:
        return f"{runtime} is not installed"
    state = bundle / f"state-{runtime}"
    state.mkdir(mode=0o700)
    count = 0
    env = {"PATH": os.environ.get("PATH", os.defpath), "XDG_RUNTIME_DIR": str(state)}

    def peer() -> None:
        nonlocal count
        count += 1
        name = f"corral-bench-{os.getpid()}-{count}"
        run_quietly([program, "--root", str(state), *options, "run", "--bundle", str(bundle), name], env=env)

    return _trial(peer) or peer


# ---- sandlock ----


def make_sandlock(workspace: str, command: Sequence[str]) -> Peer | str:
    """Runs ``command`` under sandlock (Landlock and seccomp, no namespaces); or the reason why that cannot be."""
    sandlock = shutil.which("sandlock")
    if sandlock is None:
        return "sandlock is not installed"
    trees = [tree for tree in ("/usr", "/lib", "/lib64", "/bin", "/etc") if os.path.exists(tree)]
    readable = [word for tree in trees for word in ("-r", tree)]
    argv = [sandlock, "run", *readable, "-w", workspace, "--", *command]

    def peer() -> None:
        run_quietly(argv, env=dict(os.environ))

    return _trial(peer) or peer


def peers(prepared: Prepared, place: Path, command: Sequence[str]) -> dict[str, Peer | str]:
    """Every peer by name: what runs ``command`` in it, or why that is not possible here."""
    nothing = place / "nothing"
    nothing.mkdir(mode=0o555)
    blueprint = read_plan(prepared, str(nothing))
    bundle = place / "bundle"
    bundle.mkdir(mode=0o755)
    write_bundle(blueprint, command, bundle, str(nothing))
    rootless = [] if os.geteuid() == 0 else ["--rootless", "true"]
    return {
        "bwrap": make_bwrap(blueprint, command),
        "crun": make_oci("crun", ["--cgroup-manager", "disabled"], bundle),
        "runsc": make_oci("runsc", ["--network", "none", *rootless], bundle),
        "sandlock": make_sandlock(prepared.directory, command),
    }
