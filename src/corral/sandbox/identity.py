"""Who the sandbox is on the host: which ids outside stand for which ids inside.

As root each sandbox leases a range of 65,536 host ids of its own, so that two sandboxes are strangers to each other
and to every user of the machine even where a wall between them failed. As an ordinary user the one id that the user
has is mapped; where /etc/subuid grants a range and newuidmap is installed, that range is used too.
"""

from __future__ import annotations

import fcntl
import functools
import os
import pwd
import struct
from dataclasses import dataclass

from corral.errors import RequestError, WallError
from corral.sandbox.plan import STAY, IdLine, Map, Plan

AGENT_ID = 1000
"""User and group of the agent inside, whoever runs the sandbox."""
ROOT_ID = 0

RANGE_LENGTH = 65536
# systemd's uids-gids.md: 524288 to 1879048191 is its container range, and above 0x7FFFFFFF some tools see negative
# numbers; what lies between belongs to nobody.
RANGE_FIRST = 0x70000000
RANGE_COUNT = 0xFFF


@dataclass(frozen=True, slots=True)
class Identity:
    """The id maps of one sandbox."""

    uid_lines: tuple[IdLine, ...]
    gid_lines: tuple[IdLine, ...]
    become: int = STAY
    uid_helper: str = ""
    gid_helper: str = ""
    lease: int = -1
    """Descriptor that holds the range; the keeper gets a copy and so holds it as long as the sandbox lives."""

    @property
    def privileged(self) -> bool:
        """Whether the caller is root, who may map ids at will."""
        return self.lease >= 0

    def outside(self, inside: int) -> int:
        """The host user id that ``inside`` stands for. Raises RequestError where there is none."""
        for line in self.uid_lines:
            if line.inside <= inside < line.inside + line.length:
                return line.outside + inside - line.inside
        raise RequestError(
            f"user {inside} does not exist in this sandbox: an ordinary user without a range in /etc/subuid "
            "has one user only; choose it with `user=` when creating the sandbox"
        )

    def has(self, inside: int) -> bool:
        """Whether user ``inside`` exists in the sandbox."""
        return any(line.inside <= inside < line.inside + line.length for line in self.uid_lines)

    def inside(self, outside: int) -> int | None:
        """The id inside that host user ``outside`` has, or None."""
        for line in self.uid_lines:
            if line.outside <= outside < line.outside + line.length:
                return line.inside + outside - line.outside
        return None

    def write(self, plan: Plan) -> None:
        """Adds the maps to a plan."""
        plan.id_map(Map.SANDBOX_UID, self.uid_lines, become=self.become, helper=self.uid_helper)
        plan.id_map(Map.SANDBOX_GID, self.gid_lines, become=self.become, helper=self.gid_helper)

    def release(self) -> None:
        """Gives up the caller's hold on the range; the keeper's copy may still hold it."""
        if self.lease >= 0:
            os.close(self.lease)


def _lease_range(directory: str) -> tuple[int, int]:
    """Leases a free range: byte N of one file is range N, held by an open-file-description lock (fcntl_locking(2)).

    Such a lock goes away with its last descriptor, so nothing has to be cleaned up, however a holder dies.
    """
    os.makedirs(directory, mode=0o711, exist_ok=True)
    fd = os.open(os.path.join(directory, "ranges"), os.O_RDWR | os.O_CREAT | os.O_CLOEXEC | os.O_NOFOLLOW, 0o600)
    start = int.from_bytes(os.urandom(2), "little")
    for offset in range(RANGE_COUNT):
        number = (start + offset) % RANGE_COUNT
        # struct flock of 64-bit Linux: l_type, l_whence, l_start, l_len, l_pid (0 for this kind of lock).
        lock = struct.pack("hhqqi4x", fcntl.F_WRLCK, os.SEEK_SET, number, 1, 0)
        try:
            fcntl.fcntl(fd, _F_OFD_SETLK, lock)
        except (BlockingIOError, PermissionError):
            continue
        return fd, RANGE_FIRST + number * RANGE_LENGTH
    os.close(fd)
    raise WallError("id range", f"all {RANGE_COUNT} ranges are in use by live sandboxes")


_F_OFD_SETLK = 37  # fcntl.h; Python's fcntl module has no name for it before 3.13


@functools.cache
def _subordinate_range(path: str, uid: int) -> tuple[int, int] | None:
    """The first range of at least 65,536 ids that ``path`` (subuid(5)) grants to the user, or None."""
    try:
        name = pwd.getpwuid(uid).pw_name
    except KeyError:
        name = ""
    try:
        with open(path, encoding="ascii", errors="replace") as lines:
            for line in lines:
                owner, _, rest = line.strip().partition(":")
                first, _, count = rest.partition(":")
                if owner in (name, str(uid)) and first.isdecimal() and count.isdecimal() and int(count) >= RANGE_LENGTH:
                    return int(first), int(count)
    except OSError:
        return None
    return None


@functools.cache
def _helpers() -> tuple[str, str] | None:
    import shutil  # its compressors take long to load, and root needs none of this

    uid_helper = shutil.which("newuidmap", path="/usr/bin:/bin:/usr/local/bin")
    gid_helper = shutil.which("newgidmap", path="/usr/bin:/bin:/usr/local/bin")
    return (uid_helper, gid_helper) if uid_helper and gid_helper else None


def _split_range(first: int, own: int) -> tuple[IdLine, ...]:
    """The caller's own id is the agent; the range fills the ids around it."""
    return (
        IdLine(0, first, AGENT_ID),
        IdLine(AGENT_ID, own, 1),
        IdLine(AGENT_ID + 1, first + AGENT_ID, RANGE_LENGTH - AGENT_ID - 1),
    )


def workspace_lines(owner: int) -> tuple[IdLine, ...]:
    """How ids on the workspace's disk read inside a root sandbox: ``outside`` is the id on disk.

    The workspace's owner is the agent; whom the agent's number belongs to on disk, if that is somebody else, reads as
    the owner's number; everybody else, root too, keeps theirs. A workspace of root has no one to change places with.
    """
    swapped = {owner: AGENT_ID}
    if owner not in (0, AGENT_ID) and owner < RANGE_LENGTH:
        swapped[AGENT_ID] = owner
    lines, first = [], 0
    for number in sorted({owner, AGENT_ID}):
        if first < min(number, RANGE_LENGTH):
            lines.append(IdLine(first, first, min(number, RANGE_LENGTH) - first))
        if number in swapped:
            lines.append(IdLine(swapped[number], number, 1))
        first = number + 1
    if first < RANGE_LENGTH:
        lines.append(IdLine(first, first, RANGE_LENGTH - first))
    return tuple(lines)


def make_identity(user: int, runtime: str) -> Identity:
    """The identity of a new sandbox whose usual user inside is ``user``.

    ``runtime`` is the directory where ranges are leased. Raises WallError when no range is free.
    """
    uid, gid = os.geteuid(), os.getegid()
    if uid == 0:
        lease, base = _lease_range(runtime)
        lines = (IdLine(0, base, RANGE_LENGTH),)
        return Identity(lines, lines, become=0, lease=lease)
    helpers = _helpers()
    uids = _subordinate_range("/etc/subuid", uid)
    gids = _subordinate_range("/etc/subgid", uid)
    # With root as its usual user a sandbox needs root to own what the caller owns, so that system trees are writable.
    if user == AGENT_ID and helpers and uids and gids:
        return Identity(
            _split_range(uids[0], uid), _split_range(gids[0], gid), uid_helper=helpers[0], gid_helper=helpers[1]
        )
    return Identity((IdLine(user, uid, 1),), (IdLine(user, gid, 1),))
