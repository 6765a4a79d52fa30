"""How much of a file system Corral may fill: the rest stays free for the host.

For what is written on an agent's account and lasts: kept layers, records.
"""

from __future__ import annotations

import os

KEEP_BYTES = 1 << 30
KEEP_SHARE = 20
"""So many bytes, or one part in so many if that is more, stay free."""


def spare_bytes(fd: int) -> int:
    """Bytes that may still be written where ``fd`` lies; below zero where too little is free. Raises OSError."""
    free = os.fstatvfs(fd)
    return free.f_bavail * free.f_frsize - max(KEEP_BYTES, free.f_blocks * free.f_frsize // KEEP_SHARE)
