"""Which function judges and carries out which system call."""

from __future__ import annotations

from collections.abc import Callable

from corral.supervisor import coredumps, execs, files, network
from corral.supervisor.call import Call

Handler = Callable[[Call], None]


def _set_session(call: Call) -> None:
    """setsid(2) says by its registers alone what it does."""
    call.sandbox.processes.new_session(call.tid, call.arguments[0], call.low(1))
    call.proceed()


HANDLERS: dict[str, Handler] = {
    "setsid": _set_session,
    **coredumps.HANDLERS,
    **execs.HANDLERS,
    **files.HANDLERS,
    **network.HANDLERS,
}
"""By the system call's name. Each answers the call, now or later; an OSError that it raises becomes the answer."""
