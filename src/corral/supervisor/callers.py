"""As whom a caller acts: its ids and its umask, for work that is done in its name."""

from __future__ import annotations

import os
from errno import EPERM

from corral.supervisor.call import Call
from corral.supervisor.deputy_wire import Caller

_STATUS_BYTES = 4096


def host_ids(call: Call) -> tuple[int, int]:
    """The caller's effective user and group, on the host. Raises OSError where it is gone.

    Nothing inside has the capability to change ids, so a thread's are looked at once.
    """
    actor = call.actor
    if actor.ids is None:
        fields = _status(call.tid)
        actor.ids = int(fields[b"Uid"].split()[1]), int(fields[b"Gid"].split()[1])
    return actor.ids


def identify(call: Call) -> Caller:
    """The caller as the deputy knows it: ids inside, and the umask of this moment. Raises OSError."""
    fields = _status(call.tid)
    uid, gid = int(fields[b"Uid"].split()[1]), int(fields[b"Gid"].split()[1])
    sandbox = call.sandbox
    maps = sandbox.id_maps or (_id_map(call.tid, "uid_map"), _id_map(call.tid, "gid_map"))
    if not call.waits():  # then all this is somebody else's
        raise ProcessLookupError
    users, groups = sandbox.id_maps = maps
    return Caller(_inside(users, uid), _inside(groups, gid), int(fields[b"Umask"], 8))


def _status(tid: int) -> dict[bytes, bytes]:
    with open(f"/proc/{tid}/status", "rb", buffering=0) as file:
        lines = file.read(_STATUS_BYTES).split(b"\n")
    return dict(line.split(b":\t", 1) for line in lines if b":\t" in line)


def _id_map(tid: int, name: str) -> tuple[tuple[int, int, int], ...]:
    """The lines of a map (user_namespaces(7)): first id inside, first id for us, how many."""
    with open(f"/proc/{tid}/{name}", encoding="ascii") as file:
        return tuple((int(a), int(b), int(c)) for a, b, c in (line.split() for line in file))


def _inside(lines: tuple[tuple[int, int, int], ...], outside: int) -> int:
    for first, here, count in lines:
        if here <= outside < here + count:
            return first + outside - here
    raise OSError(EPERM, os.strerror(EPERM))
