"""What the tests of applying share: a workspace, what a run has changed of it, and all that it holds."""

from __future__ import annotations

import os
import stat
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

from corral.sandbox.apply import journal
from corral.sandbox.apply.proposal import Proposal
from corral.sandbox.layer import KeptLayer
from corral.sandbox.sync import SyncSandbox

CHANGES = """
    echo more >>file.txt
    mkdir -p new/deep && echo n >new/deep/file && ln -s ../file.txt new/link
    rm -r tree/below && echo file >tree/below
    rm -r empty
    chmod 644 run.sh
    chmod 700 tree
    ln -sf run.sh link
"""
CALLS = ("os.", "open", "ctypes.call", "fcntl.", "shutil.")


def fill(place: Path) -> Path:
    """Makes a workspace there."""
    place.mkdir(mode=0o755)
    (place / "file.txt").write_text("original\n")
    (place / "run.sh").write_text("#!/bin/sh\n")
    (place / "run.sh").chmod(0o755)
    (place / "tree" / "below").mkdir(parents=True)
    (place / "tree" / "one").write_text("1")
    (place / "tree" / "below" / "two").write_text("2")
    (place / "link").symlink_to("file.txt")
    (place / "empty").mkdir()
    return place


def run(workspace: Path, script: str, **options: Any) -> KeptLayer:
    """What a command has changed."""
    with SyncSandbox(str(workspace), keep=True, **options) as box:
        result = box.exec(["sh", "-ec", script])
        assert result.exit_code == 0, result
    assert box.kept is not None
    return box.kept


def look(place: Path) -> dict[str, Any]:
    """All of a tree, but for times."""
    found: dict[str, Any] = {}
    for path in sorted(place.rglob("*")):
        status = path.lstat()
        content: Any = None
        if stat.S_ISREG(status.st_mode):
            content = path.read_bytes()
        elif stat.S_ISLNK(status.st_mode):
            content = os.readlink(path)
        mode = 0 if stat.S_ISLNK(status.st_mode) else stat.S_IMODE(status.st_mode)
        attributes = {}
        if not stat.S_ISLNK(status.st_mode):
            attributes = {name: os.getxattr(path, name) for name in os.listxattr(path) if name.startswith("user.")}
        kind = stat.S_IFMT(status.st_mode)
        found[str(path.relative_to(place))] = (kind, mode, status.st_uid, status.st_gid, content, attributes)
    return found


def applied(proposal: Proposal) -> journal.Journal:
    """Applies what was proposed."""
    return proposal.apply(proposal.hash)


def killed_at(number: int, what: Callable[[], object], calls: tuple[str, ...] = CALLS) -> bool:
    """Runs something in a child that ends at its so-manyth call to the system. Whether it did not get that far."""
    child = os.fork()
    if child == 0:
        left = number

        def count(event: str, _: object) -> None:
            nonlocal left
            if event.startswith(calls):
                left -= 1
                if left == 0:
                    os._exit(9)

        sys.addaudithook(count)
        try:
            what()
        except BaseException:
            os._exit(2)
        os._exit(0)
    code = os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
    assert code in (0, 9)
    return code == 0
