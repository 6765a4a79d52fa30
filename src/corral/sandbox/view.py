"""What the sandbox sees: its root, put together from the host's system trees, the workspace and an empty layer.

    /usr /bin /lib /opt    the host's; /usr copy-on-write, the others read-only
    /etc /var              the system image's (see :mod:`corral.sandbox.image`), copy-on-write
    workspace              the host's, copy-on-write, at its own path
    /home/agent /root /tmp /run /dev/shm    empty, writable
    /run/corral            what was refused, and the files for the gateway, read-only
    /proc /dev             the sandbox's own
    anything else          only what the policy names: ``filesystem.write``, copy-on-write like the workspace, and
                           ``filesystem.read`` and PATH's tools, read-only

Everything that can be written lies in one layer, a tmpfs of bounded size: the kernel refuses more, so the host's disk
and inodes cannot be filled from inside, and all changes are in one place to look at, keep or drop.
"""

from __future__ import annotations

import functools
import os
import stat
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace

from corral.errors import RequestError
from corral.sandbox.identity import AGENT_ID, Identity
from corral.sandbox.mounts import mount_points, mounted_below
from corral.sandbox.plan import Attribute, Idmap, Lower, Origin, Plan

HOME = "/home/agent"
LAYER_ROOTS = ("workspace", "home", "root-home", "usr", "etc", "var", "root")
"""Parts of a layer that hold changes worth keeping, by their directory's name in the layer; beside them those of
``filesystem.write``, which have a letter each: ``write-a``, ``write-b``, ..."""
_WRITE = "write-"

NOTHING = "nothing"
"""The layer's directory that stays empty."""
NOTICES = "notices"
"""The layer's directory that tells the agent what it was refused (see :mod:`corral.sandbox.notices`)."""
_NOTICES_PLACE = "/run/corral"
CERTIFICATES = f"{_NOTICES_PLACE}/ca.pem"
"""Inside: the certificates to trust, where the gateway ends TLS."""
TRUSTSTORE = f"{_NOTICES_PLACE}/cacerts"
"""The same in the form that Java reads."""
JAVA_TRUSTSTORE = "/etc/ssl/certs/java/cacerts"
"""Where Debian's packages of Java link to (ca-certificates-java)."""
_RESOLV = f"{_NOTICES_PLACE}/resolv.conf"
# Where distributions keep all trusted certificates in one file: Debian, Fedora, SUSE, Alpine.
_BUNDLES = (
    "/etc/ssl/certs/ca-certificates.crt",
    "/etc/pki/tls/certs/ca-bundle.crt",
    "/etc/pki/ca-trust/extracted/pem/tls-ca-bundle.pem",
    "/etc/ssl/ca-bundle.pem",
    "/etc/ssl/cert.pem",
)
_MAX_LINKS = 40  # as the kernel follows (path_resolution(7))
_ROOT_BYTES = 1 << 20
_ROOT_INODES = 4096
_DEVICES = ("null", "zero", "full", "random", "urandom", "tty")
_DEV_LINKS = (
    ("/proc/self/fd", "/dev/fd"),
    ("/proc/self/fd/0", "/dev/stdin"),
    ("/proc/self/fd/1", "/dev/stdout"),
    ("/proc/self/fd/2", "/dev/stderr"),
    ("pts/ptmx", "/dev/ptmx"),
)
# What runc and podman hide of /proc, as far as it exists: host memory, keys, kernel addresses, hardware switches.
_PROC_MASKED_FILES = ("kcore", "keys", "key-users", "kallsyms", "kmsg", "latency_stats", "sysrq-trigger", "timer_list")
_PROC_MASKED_DIRECTORIES = ("acpi", "asound", "scsi")
_PROC_READ_ONLY = ("bus", "fs", "irq", "sys")
_SYS_SHOWN = ("/sys/devices/system/cpu",)
_FORBIDDEN_READS = ("/proc", "/sys", "/dev", "/run", "/var/run")


@dataclass(frozen=True, slots=True)
class Request:
    """What the view is made from; all paths absolute, normal, and checked to exist."""

    identity: Identity
    workspace: str
    image: str
    disk: int
    inodes: int
    root: str | None = None
    read: tuple[str, ...] = ()
    write: tuple[str, ...] = ()
    """Directories, links resolved; stronger than ``read``."""
    deny: tuple[str, ...] = ()
    nameservers: tuple[str, ...] = ()
    """Addresses for /etc/resolv.conf; none leaves what the image or the root has."""
    certificates: bytes = b""
    """PEM, to be trusted inside in place of the system's bundle; nothing leaves that."""
    truststore: bytes = b""
    """The same for Java."""
    base: Mapping[str, str] = field(default_factory=dict)
    """What a kept layer has changed, that the sandbox begins on: directories of the host by paths inside."""


@dataclass(frozen=True, slots=True)
class Changeable:
    """One copy-on-write part: where it is inside, and what lies below it on the host (nothing for an empty one)."""

    name: str
    path: str
    lowers: tuple[str, ...]
    base: str = ""
    """Which of these, the topmost, is a kept layer that the sandbox was begun on; none where it was not."""

    def without_base(self) -> Changeable:
        """The same part of a sandbox that was begun on the host."""
        return replace(self, lowers=self.lowers[bool(self.base) :], base="")

    @property
    def is_project(self) -> bool:
        """Whether what lies below is shown with the workspace's owner as the agent: the workspace itself, and what
        the policy lets be written beside it."""
        return self.name == "workspace" or self.name.startswith(_WRITE)


@dataclass(frozen=True, slots=True)
class View:
    """What was built, for those who look at the layer later."""

    parts: tuple[Changeable, ...]
    scaffold: frozenset[str]
    """Directories and files inside that Corral itself made to mount on; they are nobody's change."""
    writable: tuple[str, ...]
    passing: tuple[Changeable, ...] = ()
    """What can be written too, and is no change worth keeping: it vanishes with the sandbox."""
    devices: tuple[str, ...] = ("/dev", "/proc")


@functools.cache
def _system_entries() -> tuple[tuple[str, str | None], ...]:
    """Top-level names of the host's system: (name, link target or None for a directory)."""
    found: list[tuple[str, str | None]] = []
    for name in ("bin", "sbin", "lib", "lib32", "lib64", "libx32"):
        path = f"/{name}"
        if os.path.islink(path):
            found.append((name, os.readlink(path)))
        elif os.path.isdir(path):
            found.append((name, None))
    return tuple(found)


@functools.cache
def _existing(directory: str, names: tuple[str, ...]) -> tuple[str, ...]:
    return tuple(name for name in names if os.path.exists(f"{directory}/{name}"))


def visible_trees(root: str | None) -> tuple[str, ...]:
    """Trees that every sandbox shows, so that nothing inside them need be shown again."""
    if root is not None:
        return ()
    return ("/usr", "/etc", "/opt", *(f"/{name}" for name, _ in _system_entries()))


class _Builder:
    def __init__(self, plan: Plan, request: Request) -> None:
        self.plan = plan
        self.request = request
        self.parts: list[Changeable] = []
        self.passing: list[Changeable] = []
        self.scaffold: set[str] = set()
        self.made: set[str] = {"/"}
        self.writable: list[str] = []
        self.covered: list[str] = []
        self.mounted = mount_points()
        self.anchored: set[str] = set()
        self.used: set[str] = set()
        """Where the base was laid."""

    def directories(self, path: str, mode: int = 0o755) -> None:
        """Makes ``path`` and its parents inside."""
        current = ""
        for name in path.strip("/").split("/"):
            current += f"/{name}"
            if current not in self.made:
                self.plan.directory(current, mode if current == path else 0o755)
                self.made.add(current)
                self.scaffold.add(current)

    def place(self, path: str, *, is_directory: bool) -> None:
        """Makes something to mount on."""
        if is_directory:
            self.directories(path)
            return
        self.directories(os.path.dirname(path))
        self.plan.file(path)
        self.scaffold.add(path)

    def part(self, name: str, path: str, lowers: Sequence[Lower], owner: int) -> None:
        """A copy-on-write tree at ``path``."""
        self.plan.layer_directory(name, 0o755, owner, owner)
        self.plan.layer_directory(f"{name}.work", 0o700, owner, owner)
        base = self.request.base.get(path, "")
        if base:
            self.used.add(path)
            lowers = [Lower(base, Idmap.SANDBOX if self.request.identity.privileged else Idmap.NONE), *lowers]
        self.plan.overlay(path, name, f"{name}.work", lowers)
        self.parts.append(Changeable(name, path, tuple(lower.path for lower in lowers), base))
        self.writable.append(path)

    def empty(self, name: str, path: str, mode: int, owner: int, *, kept: bool = False) -> None:
        """An empty writable directory at ``path``; where it is kept, with what the base has in it."""
        if kept and path in self.request.base:
            self.directories(path)
            self.part(name, path, [], owner)
            return
        self.plan.layer_directory(name, mode, owner, owner)
        self.directories(path)
        self.plan.bind(name, path, origin=Origin.LAYER)
        self.writable.append(path)
        (self.parts if kept else self.passing).append(Changeable(name, path, ()))

    def show(self, path: str) -> None:
        """A host tree or file, read-only, at its own place.

        A tree is shown through an overlay: a bind would show the inodes of the host itself, and a socket or fifo among
        them is a way out that no read-only mount closes; and what is mounted over one of its files to deny it would
        fall off when the host renames another file to that name (rename(2) in one mount namespace detaches mounts in
        all others). Where something is mounted below, which an overlay cannot show, it is a bind.
        """
        status = os.stat(path)
        is_directory = stat.S_ISDIR(status.st_mode)
        if not is_directory and not stat.S_ISREG(status.st_mode):
            raise RequestError(f"{path} cannot be shown: it is neither a file nor a directory")
        self.place(path, is_directory=is_directory)
        if is_directory and not path.startswith("/sys/") and not mounted_below(path, self.mounted):
            self.plan.read_only_overlay(path, NOTHING, Lower(path))
        else:
            self.plan.bind(path, path, attributes=Attribute.READ_ONLY)

    def devices(self) -> None:
        self.directories("/dev/pts")
        for name in _DEVICES:
            self.place(f"/dev/{name}", is_directory=False)
            self.plan.bind(f"/dev/{name}", f"/dev/{name}", attributes=Attribute.DEVICES)
        for target, path in _DEV_LINKS:
            self.plan.symlink(target, path)
            self.scaffold.add(path)
        # In a map of one id there is no group 5 ("tty") to give terminals to.
        group = ",gid=5" if self.request.identity.has(5) else ""
        self.plan.devpts("/dev/pts", f"newinstance,ptmxmode=0666,mode=0620{group}")
        self.directories("/dev/mqueue")
        self.plan.mqueue("/dev/mqueue")
        self.writable.append("/dev/mqueue")

    def proc(self) -> None:
        self.directories("/proc")
        self.plan.proc("/proc", "hidepid=2")
        # While a process has the capabilities of its user namespace it may set this; nobody does later.
        self.plan.sysctl("user/max_user_namespaces", "0")
        for name in _existing("/proc", _PROC_MASKED_FILES):
            self.plan.bind("/dev/null", f"/proc/{name}", origin=Origin.ROOT, attributes=Attribute.READ_ONLY)
        for name in _existing("/proc", _PROC_MASKED_DIRECTORIES):
            self.plan.bind(NOTHING, f"/proc/{name}", origin=Origin.LAYER, attributes=Attribute.READ_ONLY)
        for name in _existing("/proc", _PROC_READ_ONLY):
            path = f"/proc/{name}"
            self.plan.bind(path, path, origin=Origin.ROOT, attributes=Attribute.READ_ONLY | Attribute.NO_EXEC)

    def deny(self, path: str) -> None:
        """Something that is absent whatever shows it: an empty, unwritable place lies over it.

        What is missing at the start is covered too, where a place can be made for it: it must not appear when the host
        makes it later. In read-only trees that is not possible.
        """
        covering = [tree for tree in self.covered if path == tree or path.startswith(f"{tree}/")]
        if not covering:
            return
        parts = [part for part in self.parts if part.lowers and path.startswith(f"{part.path.rstrip('/')}/")]
        part = max(parts, key=lambda part: len(part.path), default=None)
        if part is None or len(part.path) < len(max(covering, key=len)):
            lower = path
            if not os.path.exists(path):
                return
        else:
            below = path[len(part.path.rstrip("/")) :]
            lower = next((f"{tree}{below}" for tree in part.lowers if os.path.exists(f"{tree}{below}")), "")
            if not lower:
                self.place(path, is_directory=False)
                self._anchor(part, os.path.dirname(path))
        if lower and os.path.isdir(lower):
            self.plan.bind(NOTHING, path, origin=Origin.LAYER, attributes=Attribute.READ_ONLY)
        else:
            self.plan.bind("/dev/null", path, origin=Origin.ROOT, attributes=Attribute.READ_ONLY)

    def _anchor(self, part: Changeable, directory: str) -> None:
        """Mounts a directory that is missing on the host, and those above it, on themselves: a mount point cannot be
        renamed (rename(2), EBUSY). Else the cover would go with it, and what the host makes there would be seen."""
        missing = []
        while len(directory) > len(part.path):
            below = directory[len(part.path.rstrip("/")) :]
            if any(os.path.lexists(f"{tree}{below}") for tree in part.lowers):
                break
            missing.append(directory)
            directory = os.path.dirname(directory)
        for each in reversed(missing):
            if each not in self.anchored:
                self.anchored.add(each)
                self.plan.bind(each, each, origin=Origin.ROOT)


def _owner(identity: Identity, wanted: int) -> int:
    """The id inside that owns a part: the wanted one, or the only one that there is."""
    return wanted if identity.has(wanted) else identity.uid_lines[0].inside


def _system(builder: _Builder, owner: int) -> None:
    request = builder.request
    idmap = Idmap.SANDBOX if request.identity.privileged else Idmap.NONE
    for name, target in _system_entries():
        if target is not None:
            builder.plan.symlink(target, f"/{name}")
        else:
            builder.show(f"/{name}")
    for name in ("usr", "etc", "var"):
        builder.directories(f"/{name}")
        lowers = [Lower(f"{request.image}/{name}", idmap)]
        if name == "usr":
            skeleton = [] if request.identity.privileged else lowers
            lowers = [*skeleton, Lower("/usr", idmap)]
        builder.part(name, f"/{name}", lowers, owner)
    if os.path.isdir("/opt"):
        builder.show("/opt")
    builder.covered += [*visible_trees(None), "/var"]


def _check_mounts(what: str, path: str) -> None:
    below = mounted_below(path)
    if below:
        raise RequestError(
            f"{what} {path}: {below[0]} is mounted inside it, and changes across mounts cannot be kept "
            "apart from the host; name a directory that holds no mount point"
        )


def _letters(number: int) -> str:
    """a, b, ..., z, ba, bb, ...: what a number looks like in the name of a part."""
    high, low = divmod(number, 26)
    return (_letters(high) if high else "") + chr(ord("a") + low)


def _trees(builder: _Builder, agent: int) -> None:
    """The workspace, and what the policy and PATH name. Shorter paths first: what lies inside another tree is mounted
    over it, unless that is writable already."""
    request = builder.request
    projects = {request.workspace, *request.write}
    idmap = Idmap.WORKSPACE if request.identity.privileged else Idmap.NONE
    shown: dict[str, bool] = {}
    for path in sorted(projects | set(request.read), key=lambda path: (path.count("/"), path)):
        around = max((tree for tree in shown if path.startswith(f"{tree}/")), key=len, default="")
        if path == request.workspace or (path in projects and not shown.get(around)):
            builder.directories(path)
            number = sum(part.name.startswith(_WRITE) for part in builder.parts)
            name = "workspace" if path == request.workspace else f"{_WRITE}{_letters(number)}"
            builder.part(name, path, [Lower(path, idmap)], agent)
        elif path not in projects:
            builder.show(path)
        shown[path] = path in projects
        builder.covered.append(path)


_FIXED = Attribute.READ_ONLY | Attribute.NO_EXEC


def _notices(builder: _Builder, owner: int) -> None:
    """The directory that the controller writes to and nobody inside, with the files that are there from the start.

    It is owned by the one id that an ordinary user's controller has. Read-only for the same id inside, which cannot
    move or cover it either: it is a mount point.
    """
    plan, request = builder.plan, builder.request
    plan.layer_directory(NOTICES, 0o755, owner, owner)
    builder.directories(_NOTICES_PLACE)
    if request.nameservers or request.certificates:
        plan.bind(NOTICES, _NOTICES_PLACE, origin=Origin.LAYER)  # writable, until the next one covers it
    if request.nameservers:
        lines = "".join(f"nameserver {address}\n" for address in request.nameservers)
        plan.file(_RESOLV, f"# The gateway answers, for the names that the policy has.\n{lines}".encode(), 0o444)
    if request.certificates:
        plan.file(CERTIFICATES, request.certificates, 0o444)
    if request.truststore:
        plan.file(TRUSTSTORE, request.truststore, 0o444)
    plan.bind(NOTICES, _NOTICES_PLACE, origin=Origin.LAYER, attributes=_FIXED)


def _lower(request: Request, path: str) -> str:
    """What lies below ``path`` inside, where nothing was changed yet."""
    if request.root is not None:
        return f"{request.root}{path}"
    return f"{request.image}{path}" if path.startswith(("/etc/", "/var/")) else path


def _end_of_links(request: Request, path: str) -> str:
    """Where ``path`` inside leads, following links of last names only. Raises RequestError for a loop, and for an end
    outside of the trees that hold such files: a device must not be covered."""
    end = path
    for _ in range(_MAX_LINKS):
        try:
            target = os.readlink(_lower(request, end))
        except OSError:
            if end.startswith(("/etc/", "/run/", "/usr/", "/var/")):
                return end
            break
        end = os.path.normpath(os.path.join(os.path.dirname(end), target))
    raise RequestError(f"{path} of this root leads to {end}, where the sandbox cannot have its own")


def _cover(builder: _Builder, path: str, own: str) -> None:
    """Shows the file ``own`` at ``path``, whatever is there, and wherever a link there leads."""
    end = _end_of_links(builder.request, path)
    builder.place(end, is_directory=False)
    builder.plan.bind(own, end, origin=Origin.ROOT, attributes=_FIXED)


def _bundles(request: Request) -> list[str]:
    """The files of trusted certificates that are there, links resolved, each once."""
    found = {_end_of_links(request, bundle) for bundle in _BUNDLES if os.path.lexists(_lower(request, bundle))}
    return sorted(end for end in found if os.path.isfile(_lower(request, end)))


def build_view(plan: Plan, request: Request) -> View:
    """Adds the steps that build the view to ``plan`` (ids come before, identity and limits after).

    Raises RequestError for a workspace or tree that cannot be shown.
    """
    identity = request.identity
    root_owner, agent = _owner(identity, 0), _owner(identity, AGENT_ID)
    builder = _Builder(plan, request)
    _check_mounts("workspace", request.workspace)
    for path in request.write:
        _check_mounts("filesystem.write", path)
    for path in request.read:
        if any(path == tree or path.startswith(f"{tree}/") for tree in _FORBIDDEN_READS):
            raise RequestError(f"{path} cannot be shown: the sandbox has its own {path.split('/')[1]}")
        mode = os.stat(path).st_mode
        if identity.privileged and not mode & (stat.S_IXOTH if stat.S_ISDIR(mode) else stat.S_IROTH):
            raise RequestError(f"{path} cannot be shown: only its owner may read it, and the agent is somebody else")

    if identity.privileged:
        plan.prepare_outside()
    plan.layer(request.disk, request.inodes)
    plan.layer_directory(NOTHING, 0o555, root_owner, root_owner)
    if request.root is None:
        plan.root(_ROOT_BYTES, _ROOT_INODES)
        _system(builder, root_owner)
    else:
        idmap = Idmap.SANDBOX if identity.privileged else Idmap.NONE
        builder.part("root", "/", [Lower(request.root, idmap)], root_owner)
        builder.covered.append("/")
    builder.empty("home", HOME, 0o755, agent, kept=True)
    builder.empty("root-home", "/root", 0o755, root_owner, kept=True)
    builder.empty("tmp", "/tmp", 0o1777, root_owner)
    builder.empty("run", "/run", 0o755, root_owner)
    builder.directories("/run/lock", 0o1777)
    _notices(builder, root_owner if identity.privileged else agent)
    builder.devices()
    builder.empty("shm", "/dev/shm", 0o1777, root_owner)
    builder.proc()
    for path in _SYS_SHOWN:
        if os.path.isdir(path):
            builder.show(path)
    if request.nameservers:
        _cover(builder, "/etc/resolv.conf", _RESOLV)
    if request.truststore:
        _cover(builder, JAVA_TRUSTSTORE, TRUSTSTORE)
    if request.certificates:
        for bundle in _bundles(request):
            builder.plan.bind(CERTIFICATES, bundle, origin=Origin.ROOT, attributes=_FIXED)

    _trees(builder, agent)
    missing = sorted(request.base.keys() - builder.used)
    if missing:
        raise RequestError(f"the layer has changes in {missing[0]}, which this policy does not let be changed")
    for path in sorted(request.deny, key=lambda path: (path.count("/"), path)):
        builder.deny(path)
    if request.root is None:
        plan.seal_root()
    plan.pivot()
    return View(tuple(builder.parts), frozenset(builder.scaffold), tuple(builder.writable), tuple(builder.passing))


def is_touched(view: View, layer_fd: int) -> bool:
    """Whether the layer holds anything beside what Corral made to mount on. Fast: looks no deeper than that.

    What is touched may still be equal to what it was; :mod:`corral.sandbox.changes` compares.
    """
    pending = [(part.name, "" if part.path == "/" else part.path) for part in view.parts]
    while pending:
        at, path = pending.pop()
        try:
            fd = os.open(at, os.O_RDONLY | os.O_DIRECTORY | os.O_NOFOLLOW | os.O_CLOEXEC, dir_fd=layer_fd)
        except OSError:
            return True  # unreadable even for its owner: somebody made it so
        try:
            for entry in os.scandir(fd):
                inside = f"{path}/{entry.name}"
                if inside not in view.scaffold:
                    return True
                if entry.is_dir(follow_symlinks=False):
                    pending.append((f"{at}/{entry.name}", inside))
        finally:
            os.close(fd)
    return False
