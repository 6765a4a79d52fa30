"""Proportional memory of processes that only root may look at, also where an ordinary user measures.

The program that root started answers the one that it runs as a user, over a socket: one pid, one figure.
"""

from __future__ import annotations

import os
import socket
import threading
from collections.abc import Iterator
from contextlib import contextmanager

ASKED = "CORRAL_BENCH_PROPORTIONAL"
"""Names the socket's descriptor in the environment of who asks."""


def _read(pid: int) -> float | None:
    try:
        with open(f"/proc/{pid}/smaps_rollup", encoding="ascii") as lines:
            return next((float(line.split()[1]) for line in lines if line.startswith("Pss:")), None)
    except OSError:
        return None


def proportional(pid: int) -> float | None:
    """KiB of a process (proc_pid_smaps(5), Pss); None where nobody may look."""
    size = _read(pid)
    if size is None and ASKED in os.environ:
        with socket.socket(fileno=os.dup(int(os.environ[ASKED]))) as asked:
            asked.send(str(pid).encode())
            size = float(asked.recv(64)) or None
    return size


@contextmanager
def answering() -> Iterator[int]:
    """Answers meanwhile, in a thread; gives the descriptor to hand on."""
    ours, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)

    def serve() -> None:
        while pid := ours.recv(64):
            ours.send(str(_read(int(pid)) or 0).encode())

    thread = threading.Thread(target=serve)
    thread.start()
    try:
        yield theirs.fileno()
    finally:
        theirs.close()
        thread.join()
        ours.close()
