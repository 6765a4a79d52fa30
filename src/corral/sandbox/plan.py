"""The compiled plan: what the launcher applies, in order, without deciding anything.

The bytes are specified in ``src/launcher/plan.h``; the numbers below are the same as there, and a test compares the
two files. One function per kind of step; the order in which they are called is the order in which they are applied.
"""

from __future__ import annotations

import struct
from collections.abc import Iterable, Sequence
from enum import IntEnum, IntFlag
from typing import NamedTuple

MAX_BYTES = 1 << 20
STAY = 0xFFFFFFFF
"""For ``become``: the first process keeps the id that it has."""


class Kind(IntEnum):
    """Kinds of step (``enum step_kind``)."""

    ID_MAP = 1
    CGROUP = 2
    WALL_TIME = 3
    REMOVE = 4
    PREPARE = 5
    LAYER = 16
    LAYER_DIR = 17
    ROOT = 18
    DIRECTORY = 19
    SYMLINK = 20
    FILE = 21
    OVERLAY = 22
    BIND = 23
    PROC = 24
    DEVPTS = 25
    MQUEUE = 26
    SYSCTL = 27
    SEAL_ROOT = 28
    PIVOT = 29
    HOSTNAME = 30
    LOOPBACK = 31
    LISTEN = 32
    RLIMIT = 33
    LANDLOCK = 34
    FILTER = 35
    AFFINITY = 36
    NETLINK = 37
    DATAGRAM = 38


class Map(IntEnum):
    """Which id map (``enum id_map_use``)."""

    SANDBOX_UID = 0
    SANDBOX_GID = 1
    WORKSPACE_UID = 2
    WORKSPACE_GID = 3


class Origin(IntEnum):
    """Where a bind's source lies (``enum bind_origin``)."""

    HOST = 0
    LAYER = 1
    ROOT = 2


class Attribute(IntFlag):
    """Mount attributes of a bind (``enum bind_attribute``); nosuid always, nodev unless DEVICES."""

    NONE = 0
    READ_ONLY = 1
    DEVICES = 2
    NO_EXEC = 4


class Idmap(IntEnum):
    """Which id map a source is shown through (``enum source_idmap``)."""

    NONE = 0
    SANDBOX = 1
    WORKSPACE = 2


class Lower(NamedTuple):
    """One lower directory of an overlay, topmost first."""

    path: str
    idmap: Idmap = Idmap.NONE


class IdLine(NamedTuple):
    """One line of an id map (user_namespaces(7))."""

    inside: int
    outside: int
    length: int


def text(value: str) -> bytes:
    """A string of the wire format. Raises ValueError for NUL, which no path or option can hold."""
    raw = value.encode("utf-8", "surrogateescape")
    if b"\0" in raw:
        raise ValueError(f"NUL character in {value!r}")
    return struct.pack("<I", len(raw)) + raw + b"\0"


def blob(value: bytes) -> bytes:
    """Bytes of the wire format."""
    return struct.pack("<I", len(value)) + value


class Plan:
    """Collects steps; :meth:`compile` gives the bytes."""

    def __init__(self) -> None:
        self._steps: list[bytes] = []
        self.listeners = 0
        """Descriptors that are handed out: TCP listeners and UDP sockets."""

    def _add(self, kind: Kind, *parts: bytes) -> None:
        body = b"".join(parts)
        self._steps.append(struct.pack("<II", kind, len(body)) + body)

    def id_map(self, which: Map, lines: Sequence[IdLine], *, become: int = STAY, helper: str = "") -> None:
        """An id map, written by the keeper, or by ``helper`` (the path of newuidmap or newgidmap)."""
        packed = b"".join(struct.pack("<III", *line) for line in lines)
        self._add(Kind.ID_MAP, struct.pack("<II", which, become), text(helper), struct.pack("<I", len(lines)), packed)

    def cgroup(self, version: int, directory: str, settings: Iterable[tuple[str, str]]) -> None:
        """A cgroup that the keeper makes, fills with settings, puts the sandbox into, and removes at the end."""
        pairs = [text(name) + text(value) for name, value in settings]
        self._add(
            Kind.CGROUP, struct.pack("<I", version), text(directory), struct.pack("<I", len(pairs)), b"".join(pairs)
        )

    def wall_time(self, seconds: float) -> None:
        """The keeper kills the sandbox after this time."""
        self._add(Kind.WALL_TIME, struct.pack("<Q", max(1, int(seconds * 1000))))

    def remove(self, path: str) -> None:
        """A file or empty directory that the keeper removes when the controller has died."""
        self._add(Kind.REMOVE, text(path))

    def prepare_outside(self) -> None:
        """Sources are opened by the keeper (as root) and not inside."""
        self._add(Kind.PREPARE, struct.pack("<I", 1))

    def layer(self, size: int, inodes: int) -> None:
        """The file system that holds every change: at most ``size`` bytes in ``inodes`` files."""
        self._add(Kind.LAYER, struct.pack("<QQ", size, inodes))

    def layer_directory(self, path: str, mode: int, uid: int, gid: int) -> None:
        """A directory in the layer."""
        self._add(Kind.LAYER_DIR, text(path), struct.pack("<III", mode, uid, gid))

    def root(self, size: int, inodes: int) -> None:
        """An empty root, to be filled and sealed."""
        self._add(Kind.ROOT, struct.pack("<QQ", size, inodes))

    def directory(self, path: str, mode: int = 0o755) -> None:
        """A directory in the root; one that is there already is left as it is."""
        self._add(Kind.DIRECTORY, text(path), struct.pack("<I", mode))

    def symlink(self, target: str, path: str) -> None:
        """A symbolic link in the root."""
        self._add(Kind.SYMLINK, text(target), text(path))

    def file(self, path: str, content: bytes = b"", mode: int = 0o644) -> None:
        """A file in the root; an empty one is a place to mount on."""
        self._add(Kind.FILE, text(path), struct.pack("<I", mode), blob(content))

    def overlay(self, target: str, upper: str, work: str, lowers: Sequence[Lower]) -> None:
        """A copy-on-write view of ``lowers`` at ``target``; ``upper`` and ``work`` are directories of the layer."""
        packed = b"".join(struct.pack("<I", lower.idmap) + text(lower.path) for lower in lowers)
        self._add(Kind.OVERLAY, text(target), text(upper), text(work), struct.pack("<I", len(lowers)), packed)

    def read_only_overlay(self, target: str, empty: str, lower: Lower) -> None:
        """A read-only view of ``lower`` at ``target``; ``empty`` is an empty directory of the layer."""
        self.overlay(target, empty, "", [lower])

    def bind(
        self,
        source: str,
        target: str,
        *,
        origin: Origin = Origin.HOST,
        attributes: Attribute = Attribute.NONE,
        idmap: Idmap = Idmap.NONE,
    ) -> None:
        """Shows ``source`` with all that is mounted below it at ``target``, which must exist."""
        self._add(Kind.BIND, struct.pack("<III", origin, attributes, idmap), text(source), text(target))

    def proc(self, target: str, options: str) -> None:
        """A proc file system of the sandbox's PID namespace."""
        self._add(Kind.PROC, text(target), text(options))

    def devpts(self, target: str, options: str) -> None:
        """An own instance of the terminal file system."""
        self._add(Kind.DEVPTS, text(target), text(options))

    def mqueue(self, target: str) -> None:
        """POSIX message queues of the sandbox's IPC namespace."""
        self._add(Kind.MQUEUE, text(target))

    def sysctl(self, name: str, value: str) -> None:
        """Writes ``value`` to ``/proc/sys/name``, which must be namespaced; proc must be mounted by then."""
        self._add(Kind.SYSCTL, text(name), text(value))

    def seal_root(self) -> None:
        """Makes the root mount itself read-only."""
        self._add(Kind.SEAL_ROOT)

    def pivot(self) -> None:
        """Enters the new root; the host's tree is gone from here on."""
        self._add(Kind.PIVOT)

    def hostname(self, name: str) -> None:
        """The sandbox's host name."""
        self._add(Kind.HOSTNAME, text(name))

    def loopback(self) -> None:
        """Brings the loopback device up, the only one that there is."""
        self._add(Kind.LOOPBACK)

    def listen(self, address: str, port: int, backlog: int = 128) -> None:
        """A TCP listener inside, handed out to the controller with the READY report, in plan order."""
        family = 6 if ":" in address else 4
        self._add(Kind.LISTEN, struct.pack("<I", family), text(address), struct.pack("<II", port, backlog))
        self.listeners += 1

    def datagram(self, address: str, port: int) -> None:
        """A UDP socket inside, handed out among the listeners: each datagram comes with the address that it was sent
        to (IP_PKTINFO, IPV6_PKTINFO), and an answer may have any address as its source."""
        family = 6 if ":" in address else 4
        self._add(Kind.DATAGRAM, struct.pack("<I", family), text(address), struct.pack("<I", port))
        self.listeners += 1

    def netlink(self, protocol: int, messages: bytes, acknowledgements: int) -> None:
        """Messages for the network namespace's own kernel, sent in one piece; ``acknowledgements`` of them ask for an
        answer (NLM_F_ACK), and each must succeed. Loopback must be up by then."""
        self._add(Kind.NETLINK, struct.pack("<II", protocol, acknowledgements), blob(messages))

    def rlimit(self, resource: int, value: int) -> None:
        """Soft and hard limit of the first process, inherited by all; never raised."""
        self._add(Kind.RLIMIT, struct.pack("<IQ", resource, value))

    def landlock(self, fs: int, net: int, scopes: int, rules: Sequence[tuple[int, str]]) -> None:
        """A Landlock domain (landlock(7)) with one path-beneath rule per pair of access bits and path."""
        packed = b"".join(struct.pack("<Q", access) + text(path) for access, path in rules)
        self._add(Kind.LANDLOCK, struct.pack("<QQQI", fs, net, scopes, len(rules)), packed)

    def filter(self, program: bytes) -> None:
        """The seccomp filter; installed last of all. Its listener comes with the LISTENER report."""
        self._add(Kind.FILTER, blob(program))

    def affinity(self, processors: Sequence[int]) -> None:
        """Confines the sandbox to these processors."""
        self._add(
            Kind.AFFINITY, struct.pack("<I", len(processors)), b"".join(struct.pack("<I", cpu) for cpu in processors)
        )

    def compile(self) -> bytes:
        """The plan's bytes. Raises ValueError where it is longer than the launcher reads."""
        body = b"".join(self._steps)
        total = 16 + len(body)
        if total > MAX_BYTES:
            raise ValueError(f"the plan has {total} bytes, the launcher reads {MAX_BYTES}")
        return b"CRLPLAN1" + struct.pack("<II", total, len(self._steps)) + body
