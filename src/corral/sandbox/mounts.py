"""What is mounted where, as the kernel tells it (proc_pid_mountinfo(5))."""

from __future__ import annotations

import re
from collections.abc import Sequence


def unescape(path: str) -> str:
    """A path of mountinfo: space, tab, newline and backslash stand there as octal."""
    return re.sub(r"\\([0-7]{3})", lambda found: chr(int(found[1], 8)), path) if "\\" in path else path


def mount_points(process: int | str = "self") -> list[str]:
    """Where anything is mounted in this mount namespace, or in that of another process, below its root."""
    with open(f"/proc/{process}/mountinfo", encoding="utf-8", errors="surrogateescape") as lines:
        return [unescape(line.split(" ", 5)[4]) for line in lines]


def mounted_below(path: str, points: Sequence[str] | None = None) -> list[str]:
    """Mount points strictly below ``path``; ``points`` are those of a moment ago, where the caller has them."""
    prefix = path.rstrip("/") + "/"
    return [point for point in (mount_points() if points is None else points) if point.startswith(prefix)]
