"""Probes for `corral doctor`: every mechanism that the walls stand on, used for real, as the user who asks.

The ladder is made of throw-away sandboxes, built by the launcher as real ones are, from hand-made plans: each plan is
the smallest that needs one mechanism, so that a failure names that one. The seccomp filter is tried in children of this
process. Whether it all holds together is another question: see :mod:`corral.sandbox.drill`.

No probe raises, waits longer than its time limit, or leaves anything behind: a :class:`Finding` is all there is.
"""

from __future__ import annotations

import ctypes
import errno
import mmap
import os
import signal
import struct
import tempfile
from collections.abc import Callable, Iterator
from contextlib import suppress
from dataclasses import dataclass, replace
from enum import Enum

from corral.errors import CorralError, WallError
from corral.policy.model import Resources
from corral.sandbox import cgroups, paths
from corral.sandbox.identity import AGENT_ID, Identity, make_identity
from corral.sandbox.landlock import abi, plan_landlock
from corral.sandbox.plan import Attribute, IdLine, Idmap, Lower, Map, Origin, Plan
from corral.sandbox.trial import Trial
from corral.supervisor.filter import RET_ALLOW, compile_filter

_ALLOW_ALL = struct.pack("<HBBI", 0x06, 0, 0, RET_ALLOW)
_PORT = 80


class State(Enum):
    """What a probe found."""

    OK = "ok"
    MISSING = "missing"
    NOTE = "note"
    """It works without, less well."""
    UNTRIED = "untried"
    """Something else that it needs is missing."""


class Topic(Enum):
    """What a finding is about; the values are what people read."""

    KERNEL = "kernel"
    LAUNCHER = "launcher"
    NAMESPACES = "namespaces"
    ID_MAP = "id map"
    ID_RANGE = "id range"
    ROOT = "own root"
    OVERLAY = "copy-on-write"
    IDMAP = "id-mapped mounts"
    PROC = "own /proc"
    DEVICES = "devices"
    TERMINALS = "terminals"
    MQUEUE = "message queues"
    NETWORK = "own network"
    CGROUP = "control groups"
    LIMITS = "limits for the whole"
    LANDLOCK = "Landlock"
    SECCOMP = "seccomp filter"
    FOREIGN = "foreign system calls"
    WHOLE = "whole sandbox"
    FILES = "changes to files"
    PRIVILEGES = "no privileges inside"
    NESTING = "no namespaces inside"
    INWARD = "inward service"
    NO_ROUTE = "no route"
    WAY_OUT = "one way out"
    TERMINAL = "terminal inside"
    DEATH = "death of the controller"
    START = "time of a start"
    DIRECTORIES = "own directories"
    DISK = "disk for kept changes"
    MEMORY = "memory"
    OPEN_FILES = "open files"


@dataclass(frozen=True, slots=True)
class Finding:
    """One line of the examination."""

    topic: Topic
    state: State
    seen: str
    required: bool = True
    step: str = ""
    """The launcher's name for the step that failed."""
    errno: int = 0


def ok(topic: Topic, seen: str, *, required: bool = True) -> Finding:
    """What a probe found that succeeded."""
    return Finding(topic, State.OK, seen, required)


def failed(topic: Topic, error: BaseException) -> Finding:
    """What a probe found that ended with an error."""
    if isinstance(error, WallError):
        name = f" ({errno.errorcode.get(error.errno, error.errno)})" if error.errno else ""
        return Finding(topic, State.MISSING, f"{error.step}: {error.detail}{name}", True, error.step, error.errno)
    if isinstance(error, OSError):
        return Finding(topic, State.MISSING, str(error), errno=error.errno or 0)
    return Finding(topic, State.MISSING, str(error))


# ---- the ladder ----


def _single_identity() -> Identity:
    return Identity((IdLine(AGENT_ID, os.geteuid(), 1),), (IdLine(AGENT_ID, os.getegid(), 1),))


def _owner(identity: Identity) -> int:
    return 0 if identity.has(0) else AGENT_ID


def _nothing(_plan: Plan) -> None:
    pass


def _attempt(
    identity: Identity, before: Callable[[Plan], None] = _nothing, after: Callable[[Plan], None] = _nothing
) -> None:
    """Builds the least that the launcher takes for walls, with additions before and after the host's tree is gone."""
    plan = Plan()
    identity.write(plan)
    if identity.privileged:
        for which in (Map.WORKSPACE_UID, Map.WORKSPACE_GID):
            plan.id_map(which, [IdLine(0, identity.outside(AGENT_ID), 1)])
        plan.prepare_outside()
    plan.layer(16 << 20, 1024)
    plan.root(1 << 20, 256)
    before(plan)
    plan.directory("/proc")
    plan.proc("/proc", "hidepid=2")
    plan.sysctl("user/max_user_namespaces", "0")
    plan.bind("/proc/sys", "/proc/sys", origin=Origin.ROOT, attributes=Attribute.READ_ONLY)
    plan.pivot()
    after(plan)
    plan.filter(_ALLOW_ALL)
    with Trial(plan.compile(), identity.lease) as trial:
        trial.stand()


def _overlay(identity: Identity, lower: str) -> Callable[[Plan], None]:
    def build(plan: Plan) -> None:
        owner = _owner(identity)
        plan.layer_directory("upper", 0o755, owner, owner)
        plan.layer_directory("work", 0o700, owner, owner)
        plan.directory("/tree")
        plan.overlay("/tree", "upper", "work", [Lower(lower)])

    return build


def _mapped(trees: tuple[tuple[str, Idmap], ...]) -> Callable[[Plan], None]:
    def build(plan: Plan) -> None:
        for number, (path, idmap) in enumerate(trees):
            plan.directory(f"/{number}")
            plan.bind(path, f"/{number}", attributes=Attribute.READ_ONLY, idmap=idmap)

    return build


def _devices(plan: Plan) -> None:
    plan.directory("/dev")
    for name in ("null", "zero", "urandom", "tty"):
        plan.file(f"/dev/{name}")
        plan.bind(f"/dev/{name}", f"/dev/{name}", attributes=Attribute.DEVICES)


def _terminals(plan: Plan) -> None:
    plan.directory("/pts")
    plan.devpts("/pts", "newinstance,ptmxmode=0666,mode=0620")


def _mqueue(plan: Plan) -> None:
    plan.directory("/mqueue")
    plan.mqueue("/mqueue")


def _network(plan: Plan) -> None:
    plan.hostname("corral")
    plan.loopback()
    plan.listen("127.0.0.1", _PORT)


def _grouped(plan: Plan) -> None:
    cgroups.plan_groups(plan, f"{os.getpid()}-doctor", Resources(cpu=1.0))


def _landlocked(plan: Plan) -> None:
    plan_landlock(plan, ["/"], ["/"], optional=False)


def _climb(
    topic: Topic,
    seen: str,
    identity: Identity,
    before: Callable[[Plan], None] = _nothing,
    after: Callable[[Plan], None] = _nothing,
) -> Finding:
    try:
        _attempt(identity, before, after)
    except (CorralError, OSError, ValueError) as error:
        return failed(topic, error)
    return ok(topic, seen)


_KINDS = {
    "user": 0x10000000,
    "mount": 0x20000,
    "pid": 0x20000000,
    "net": 0x40000000,
    "ipc": 0x8000000,
    "uts": 0x4000000,
    "cgroup": 0x2000000,
}


def refused_kinds() -> dict[str, int]:
    """Errno by kind of namespace, of those kinds that this process cannot make; tried one by one in a child.

    Only for saying more when the launcher has failed: the launcher makes them all at once.
    """
    reader, writer = os.pipe2(os.O_CLOEXEC)
    child = os.fork()
    if child == 0:
        with suppress(BaseException):
            signal.alarm(5)
            libc = ctypes.CDLL(None, use_errno=True)
            for name, flag in _KINDS.items():
                if libc.unshare(flag) != 0:
                    os.write(writer, f"{name} {ctypes.get_errno()}\n".encode())
                    if name == "user" and os.geteuid() != 0:
                        break
        os._exit(0)
    os.close(writer)
    with open(reader, encoding="ascii") as lines:
        found = dict(line.split() for line in lines)
    os.waitpid(child, 0)
    return {name: int(number) for name, number in found.items()}


def _base_finding(error: Exception) -> list[Finding]:
    """The smallest sandbox cannot be built: which of its mechanisms is it?"""
    step = error.step if isinstance(error, WallError) else ""
    if step == "namespaces":
        finding = failed(Topic.NAMESPACES, error)
        refused = ", ".join(f"{kind} ({errno.errorcode.get(n, n)})" for kind, n in refused_kinds().items())
        more = f"refused one by one: {refused}" if refused else "each alone is granted, so it is clone3 that is refused"
        return [replace(finding, seen=f"{finding.seen}; {more}")]
    if step == "launcher":
        return [failed(Topic.LAUNCHER, error)]
    stands = [ok(Topic.LAUNCHER, "starts"), ok(Topic.NAMESPACES, "made")]
    if step == "id map":
        return [*stands, failed(Topic.ID_MAP, error)]
    return [*stands, failed(Topic.PROC if step in ("proc", "sysctl") else Topic.ROOT, error)]


def _ranges(identity: Identity) -> Finding:
    """An ordinary user's range from /etc/subuid: optional, but one that is there must work, as it will be used."""
    topic = Topic.ID_RANGE
    if identity.privileged:
        return ok(topic, f"leased {identity.outside(0)} to {identity.outside(0) + 65535}")
    try:
        ranged = make_identity(AGENT_ID, "")
        if not ranged.uid_helper:
            seen = "no range: the sandbox has one user; `apt-get install` inside and files of other owners need more"
            return Finding(topic, State.NOTE, seen, required=False)
        _attempt(ranged)
    except (CorralError, OSError) as error:
        return failed(topic, error)
    return ok(topic, f"65536 ids from {ranged.outside(0)}, by {ranged.uid_helper}", required=False)


def ladder() -> Iterator[Finding]:
    """The mechanisms one by one. Ends early where the smallest sandbox cannot be built."""
    identity = _single_identity()
    if os.geteuid() == 0:
        try:
            identity = make_identity(AGENT_ID, paths.runtime_directory())
        except (CorralError, OSError) as error:
            yield failed(Topic.ID_RANGE, error)
    try:
        try:
            _attempt(identity)
        except (CorralError, OSError) as error:
            yield from _base_finding(error)
            for topic in _RUNGS:
                yield Finding(topic, State.UNTRIED, "needs what is missing above")
            return
        yield ok(Topic.LAUNCHER, "starts")
        yield ok(Topic.NAMESPACES, "user, mount, pid, net, ipc, uts, cgroup")
        yield ok(Topic.ID_MAP, "written" if identity.privileged else "one id, without helpers")
        yield ok(Topic.ROOT, "tmpfs, pivot_root; the host's tree is gone")
        yield ok(Topic.PROC, "fresh, hidepid=2, no further user namespaces")
        yield from _rungs(identity)
    finally:
        identity.release()


_RUNGS = (Topic.OVERLAY, Topic.DEVICES, Topic.TERMINALS, Topic.MQUEUE, Topic.NETWORK, Topic.LANDLOCK)


def _rungs(identity: Identity) -> Iterator[Finding]:
    if identity.privileged or os.geteuid() != 0:
        yield _ranges(identity)
    with tempfile.TemporaryDirectory(prefix="corral-doctor-") as lower:
        yield _climb(Topic.OVERLAY, "overlay with userxattr on tmpfs, writable", identity, _overlay(identity, lower))
        if identity.privileged:
            trees = (("/usr", Idmap.SANDBOX), (lower, Idmap.WORKSPACE))
            yield _climb(Topic.IDMAP, f"/usr and {os.path.dirname(lower)}", identity, _mapped(trees))
    yield _climb(Topic.DEVICES, "null, zero, urandom, tty", identity, _devices)
    yield _climb(Topic.TERMINALS, "own devpts", identity, _terminals)
    yield _climb(Topic.MQUEUE, "own mqueue", identity, _mqueue)
    yield _climb(Topic.NETWORK, f"loopback up, listener on port {_PORT} handed out", identity, after=_network)
    if cgroups.available():
        yield _climb(Topic.CGROUP, "made, filled, entered, removed", identity, _grouped)
    yield _climb(Topic.LANDLOCK, f"ABI {abi()}, in force", identity, after=_landlocked)


# ---- seccomp, in a child of this process ----


def _dies_of(program: bytes, body: Callable[[], object]) -> int:
    """The signal that a child under ``program`` dies of when it does ``body``; 0 where it lives."""

    class Program(ctypes.Structure):
        _fields_ = (("length", ctypes.c_ushort), ("instructions", ctypes.c_char_p))

    child = os.fork()
    if child == 0:
        with suppress(BaseException):
            signal.alarm(5)
            libc = ctypes.CDLL(None, use_errno=True)
            argument = Program(len(program) // 8, program)
            # PR_SET_NO_NEW_PRIVS; PR_SET_SECCOMP, SECCOMP_MODE_FILTER
            if libc.prctl(38, 1, 0, 0, 0) == 0 and libc.prctl(22, 2, ctypes.byref(argument), 0, 0) == 0:
                body()
        os._exit(0)
    status = os.waitpid(child, 0)[1]
    return os.WTERMSIG(status) if os.WIFSIGNALED(status) else 0


def _x32_getpid() -> None:
    ctypes.CDLL(None).syscall(ctypes.c_long(0x40000000 | 39))


def _i386_getpid() -> None:
    page = mmap.mmap(-1, mmap.PAGESIZE, prot=mmap.PROT_READ | mmap.PROT_WRITE | mmap.PROT_EXEC)
    page.write(b"\xb8\x14\x00\x00\x00\xcd\x80\xc3")  # mov eax, 20; int 0x80; ret
    ctypes.CFUNCTYPE(ctypes.c_int)(ctypes.addressof(ctypes.c_char.from_buffer(page)))()


def filters() -> Iterator[Finding]:
    """The seccomp filter, as this machine's kernel and libseccomp have it."""
    try:
        program = compile_filter()
    except CorralError as error:
        yield failed(Topic.SECCOMP, error)
        return
    if os.uname().machine != "x86_64":
        yield ok(Topic.SECCOMP, f"{len(program) // 8} instructions")
        return
    yield ok(Topic.SECCOMP, f"{len(program) // 8} instructions, numbers by libseccomp")
    for name, body in (("x32", _x32_getpid), ("i386", _i386_getpid)):
        died = _dies_of(program, body)
        # SIGSEGV: the kernel has no such calls.
        if died not in (signal.SIGSYS, signal.SIGSEGV):
            seen = f"an {name} call was not stopped by the filter (signal {died})"
            yield Finding(Topic.FOREIGN, State.MISSING, seen)
            return
    yield ok(Topic.FOREIGN, "x32 and i386 calls kill the caller")
