"""Whether a socket is the sandbox's own.

A standard stream may be a socket of the host, made there and inherited. It works as it was given; but to connect it, or
to send elsewhere with it, would be to act in the host's network.
"""

from __future__ import annotations

import os
from errno import EACCES

from corral.supervisor.call import Call
from corral.supervisor.sockets import Copy


def is_own(call: Call, copy: Copy) -> bool:
    """Whether a socket belongs to the sandbox's network. What cannot be told is not its own."""
    sandbox = call.sandbox
    if not sandbox.network:
        try:
            # No process inside can be in another network than its own: setns and unshare are refused.
            own = os.stat(f"/proc/{call.tid}/ns/net")
            if not call.waits() or copy.network() != (own.st_dev, own.st_ino):
                return False
        except OSError:
            return False
        sandbox.network = copy.home
    return copy.home == sandbox.network


def refuse_foreign(call: Call) -> None:
    """Says no, and has it recorded."""
    call.refuse(EACCES, "the socket belongs to another network than the sandbox's")
