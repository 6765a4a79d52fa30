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


def cover_points(process: int) -> list[str]:
    """As :func:`mount_points` of a process, without places on which just they themselves are mounted (``anchor`` of
    :mod:`corral.sandbox.view`): they show what lies below."""
    with open(f"/proc/{process}/mountinfo", encoding="utf-8", errors="surrogateescape") as lines:
        rows = [line.split(" ", 5) for line in lines]
    mounts = {number: (device, unescape(root), unescape(point)) for number, _, device, root, point, _ in rows}
    found = []
    for number, parent, *_ in rows:
        device, root, point = mounts[number]
        above, above_root, above_point = mounts.get(parent, ("", "", ""))
        if device != above or root != above_root.rstrip("/") + point[len(above_point.rstrip("/")) :]:
            found.append(point)
    return found


def mounted_below(path: str, points: Sequence[str] | None = None) -> list[str]:
    """Mount points strictly below ``path``; ``points`` are those of a moment ago, where the caller has them."""
    prefix = path.rstrip("/") + "/"
    return [point for point in (mount_points() if points is None else points) if point.startswith(prefix)]
