"""The Landlock domain of a sandbox: a second wall behind its mounts (landlock(7)).

Mounts decide what is there; Landlock holds even where a mount was got wrong: nothing outside the writable trees can be
written, no device node can be made anywhere, and no signal or abstract socket reaches out of the domain.
"""

from __future__ import annotations

import ctypes
import functools
from collections.abc import Iterable
from enum import IntFlag

from corral.errors import WallError
from corral.sandbox.plan import Plan

_CREATE_RULESET = 444  # the same number on every architecture
_VERSION = 1


class Access(IntFlag):
    """File-system access rights (linux/landlock.h)."""

    EXECUTE = 1 << 0
    WRITE_FILE = 1 << 1
    READ_FILE = 1 << 2
    READ_DIR = 1 << 3
    REMOVE_DIR = 1 << 4
    REMOVE_FILE = 1 << 5
    MAKE_CHAR = 1 << 6
    MAKE_DIR = 1 << 7
    MAKE_REG = 1 << 8
    MAKE_SOCK = 1 << 9
    MAKE_FIFO = 1 << 10
    MAKE_BLOCK = 1 << 11
    MAKE_SYM = 1 << 12
    REFER = 1 << 13
    TRUNCATE = 1 << 14
    IOCTL_DEV = 1 << 15


READ = Access.EXECUTE | Access.READ_FILE | Access.READ_DIR
WRITE = (
    Access.WRITE_FILE
    | Access.REMOVE_DIR
    | Access.REMOVE_FILE
    | Access.MAKE_DIR
    | Access.MAKE_REG
    | Access.MAKE_SOCK
    | Access.MAKE_FIFO
    | Access.MAKE_SYM
    | Access.REFER
    | Access.TRUNCATE
)
DEVICES = Access.WRITE_FILE | Access.TRUNCATE | Access.IOCTL_DEV
_SCOPE_ABSTRACT_UNIX_SOCKET = 1
_SCOPE_SIGNAL = 2


@functools.cache
def abi() -> int:
    """The kernel's Landlock version; 0 where there is none."""
    libc = ctypes.CDLL(None, use_errno=True)
    return max(0, int(libc.syscall(_CREATE_RULESET, None, ctypes.c_size_t(0), _VERSION)))


def _handled(version: int) -> Access:
    handled = Access((1 << 13) - 1)
    if version >= 2:
        handled |= Access.REFER
    if version >= 3:
        handled |= Access.TRUNCATE
    if version >= 5:
        handled |= Access.IOCTL_DEV
    return handled


def plan_landlock(plan: Plan, writable: Iterable[str], devices: Iterable[str], *, optional: bool) -> bool:
    """Adds the domain to a plan; paths are those inside. Returns whether there is one.

    Raises WallError where the kernel has no Landlock and the policy does not say that this is ``optional``.
    """
    version = abi()
    if version == 0:
        if optional:
            return False
        raise WallError("landlock", "this kernel has none, or it is not among its `lsm=` modules")
    handled = _handled(version)
    rules = [(READ & handled, "/")]
    rules += [((READ | WRITE) & handled, path) for path in writable]
    rules += [((READ | DEVICES) & handled, path) for path in devices]
    scopes = _SCOPE_ABSTRACT_UNIX_SOCKET | _SCOPE_SIGNAL if version >= 6 else 0
    plan.landlock(int(handled), 0, scopes, [(int(access), path) for access, path in rules])
    return True
