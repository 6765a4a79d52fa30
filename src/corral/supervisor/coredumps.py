"""No core dump reaches a program of the host, whatever limit a process sets itself.

Where the host's core_pattern is a pipe, the kernel runs a program there, as root and outside of every sandbox, and
feeds it the memory of who crashed. A limit of 0 does not keep it from that; the value 1 does (core(5), "Piping core
dumps to a program"; ``do_coredump`` in the kernel). So that is what every sandbox starts with, and a process that sets
another is told that it has, as many do first of all (gpg, ssh-agent, sudo) and give up where they may not.
"""

from __future__ import annotations

import struct

from corral.supervisor import memory
from corral.supervisor.call import Call

_NO_DUMP = struct.pack("=QQ", 1, 1)
"""struct rlimit64: what is there, and stays."""


def _set_limit(call: Call) -> None:
    """setrlimit(RLIMIT_CORE, limit); the conditions of the table are in registers."""
    call.succeed()


def _exchange_limits(call: Call) -> None:
    """prlimit64(pid, RLIMIT_CORE, new limit, old limit)."""
    old = call.arguments[3]
    if old:
        memory.write(call.tid, old, _NO_DUMP, still=call.waits)
    call.succeed()


HANDLERS = {"setrlimit": _set_limit, "prlimit64": _exchange_limits}
