"""A layer's changes of the workspace as a unified diff that `git apply` takes.

Paths are relative to the workspace, with a/ and b/. Text is passed through as it is, control characters included, so
a patch is for files and pipes, not for an operator's terminal. Files with NUL bytes, too long ones and those that are
not regular are announced, not shown.
"""

from __future__ import annotations

import difflib
import os
import stat
from collections.abc import Callable, Iterable, Sequence
from typing import Any

from corral.errors import RequestError
from corral.sandbox import asowner
from corral.sandbox.compare import Below, Change, ChangeKind, lookup, open_part, walk_below
from corral.sandbox.ownership import OwnerMap
from corral.sandbox.trees import UPPER, Unreadable, Walk, is_whiteout
from corral.sandbox.view import Changeable

MAX_FILE = 4 << 20
"""Longer files are announced as binary ones are."""
MAX_PATCH = 64 << 20
# difflib takes quadratic time; past this many pairs of lines the differing middle is replaced as a whole.
_MAX_PAIRS = 4_000_000
_CONTEXT = 3
_ESCAPES = dict(zip('"\\\n\t\r\a\b\f\v', '"\\ntrabfv', strict=True))

# A file as git sees it: mode, and its content or None where that is not to be shown.
_Blob = tuple[int, bytes | None]


def make_patch(part: Changeable, layer: int, owners: OwnerMap, listed: Sequence[Change]) -> str:
    """The patch of one part, for the changes in it. Raises RequestError where it would be longer than 64 MiB."""
    paths = sorted(
        change.path[len(part.path) :].lstrip("/")
        for change in listed
        if change.part == part.name and change.kind is not ChangeKind.OWNER
    )
    try:
        return _patch(part, layer, paths, raise_unreadable=os.geteuid() != 0)
    except Unreadable:
        request = {"part": [part.name, part.path, part.lowers], "layer": layer, "paths": paths}
        return str(asowner.call("patch", (layer,), request, owners.namespace()))


def serve(request: dict[str, Any]) -> Any:
    """:func:`make_patch` in a helper process."""
    name, path, lowers = request["part"]
    return _patch(Changeable(name, path, tuple(lowers)), request["layer"], request["paths"])


def _patch(part: Changeable, layer: int, paths: Sequence[str], *, raise_unreadable: bool = False) -> str:
    pieces: list[str] = []
    length = 0

    def write(piece: str) -> None:
        nonlocal length
        length += len(piece)
        if length > MAX_PATCH:
            raise RequestError("the patch would be longer than 64 MiB; look at the list of changes instead")
        pieces.append(piece)

    roots = open_part(part, layer)
    try:
        if UPPER in roots:
            with Walk(roots, "", raise_unreadable=raise_unreadable) as walk:
                for path in paths:
                    if path:
                        _patch_entry(walk, path.split("/"), write)
    finally:
        for fd in roots.values():
            os.close(fd)
    return "".join(pieces)


def _patch_entry(walk: Walk, components: Sequence[str], write: Callable[[str], None]) -> None:
    *parents, name = components
    _go_to(walk, parents)
    if [level.name for level in walk.levels[1:]] != parents:
        return
    path = "/".join(components)
    before = lookup(walk, name, None)
    after = walk.status(UPPER, name)
    old = _read(walk, before.tree, name, before.status) if before else None
    new = _read(walk, UPPER, name, after) if after is not None and not is_whiteout(after) else None
    stays = after is not None and stat.S_ISDIR(after.st_mode)
    if before is not None and stat.S_ISDIR(before.status.st_mode) and not stays:
        _delete_tree(walk, name, path, before, write)
    if old is not None and new is not None and stat.S_IFMT(old[0]) != stat.S_IFMT(new[0]):
        write(_difference(path, old, None))
        old = None
    if old != new:
        write(_difference(path, old, new))


def _go_to(walk: Walk, parents: Sequence[str]) -> None:
    """Moves to a directory; paths come sorted, so most of the way is shared with the one before."""
    here = [level.name for level in walk.levels[1:]]
    common = 0
    while common < min(len(here), len(parents)) and here[common] == parents[common]:
        common += 1
    for _ in range(len(here) - common):
        walk.leave()
    for name in parents[common:]:
        before = lookup(walk, name, None)
        if not walk.enter(name, "", (UPPER, *(before.trees if before else ()))):
            return


def _delete_tree(walk: Walk, name: str, path: str, below: Below, write: Callable[[str], None]) -> None:
    for entry, full, found in walk_below(walk, name, below, path):
        if full is not None:
            old = _read(walk, found.tree, entry, found.status)
            if old is not None:
                write(_difference(full, old, None))


def _read(walk: Walk, tree: int, name: str, status: os.stat_result) -> _Blob | None:
    if stat.S_ISLNK(status.st_mode):
        try:
            return 0o120000, os.fsencode(os.readlink(name, dir_fd=walk.current.fds[tree]))
        except (OSError, KeyError):
            return None
    if not stat.S_ISREG(status.st_mode):
        return None
    mode = 0o100755 if status.st_mode & 0o100 else 0o100644
    fd = walk.open(tree, name)
    if fd < 0:
        return mode, None
    with open(fd, "rb") as file:
        if not stat.S_ISREG(os.fstat(fd).st_mode):
            return None
        content = file.read(MAX_FILE + 1)
    return mode, (None if len(content) > MAX_FILE or b"\0" in content else content)


def _difference(path: str, old: _Blob | None, new: _Blob | None) -> str:
    """One file's section."""
    a, b = _quote(f"a/{path}"), _quote(f"b/{path}")
    lines = [f"diff --git {a} {b}\n"]
    if old is None and new is not None:
        lines.append(f"new file mode {new[0]:o}\n")
    elif new is None and old is not None:
        lines.append(f"deleted file mode {old[0]:o}\n")
    elif old is not None and new is not None and old[0] != new[0]:
        lines += [f"old mode {old[0]:o}\n", f"new mode {new[0]:o}\n"]
    before, after = (b"" if blob is None else blob[1] for blob in (old, new))
    left, right = ("/dev/null" if old is None else a), ("/dev/null" if new is None else b)
    if before is None or after is None:
        lines.append(f"Binary files {left} and {right} differ\n")
    elif before != after:
        lines += [f"--- {_ended(left)}\n", f"+++ {_ended(right)}\n"]
        lines += _hunks(_lines(before), _lines(after))
    return "".join(lines)


def _quote(path: str) -> str:
    """A path as git writes it (git-config(1), core.quotePath): C-quoted where it holds anything unusual."""
    if all(32 <= ord(character) < 127 and character not in '"\\' for character in path):
        return path
    quoted = []
    for byte in os.fsencode(path):
        character = chr(byte)
        if character in _ESCAPES:
            quoted.append(f"\\{_ESCAPES[character]}")
        else:
            quoted.append(character if 32 <= byte < 127 else f"\\{byte:03o}")
    return f'"{"".join(quoted)}"'


def _ended(path: str) -> str:
    """A tab after a name with blanks tells where it ends."""
    return f"{path}\t" if " " in path and not path.startswith('"') else path


def _lines(content: bytes) -> list[str]:
    lines = [f"{line}\n" for line in content.decode("utf-8", "surrogateescape").split("\n")]
    last = lines.pop()[:-1]
    if last:
        lines.append(f"{last}\n\\ No newline at end of file\n")
    return lines


def _hunks(old: list[str], new: list[str]) -> Iterable[str]:
    head = 0
    while head < min(len(old), len(new)) and old[head] == new[head]:
        head += 1
    tail = 0
    while tail < min(len(old), len(new)) - head and old[-1 - tail] == new[-1 - tail]:
        tail += 1
    if (len(old) - head - tail) * (len(new) - head - tail) > _MAX_PAIRS:
        yield from _replace(old, new, head, tail)
        return
    for number, line in enumerate(difflib.unified_diff(old, new, n=_CONTEXT, lineterm="\n")):
        if number >= 2:  # after the two lines that name the files
            yield line


def _replace(old: list[str], new: list[str], head: int, tail: int) -> Iterable[str]:
    """One hunk that takes all of the old middle away and puts all of the new one there."""
    start, after = max(0, head - _CONTEXT), min(tail, _CONTEXT)
    old_end, new_end = len(old) - tail, len(new) - tail
    sizes = (old_end + after - start, new_end + after - start)
    first, second = (f"{start + 1 if size else 0},{size}" for size in sizes)
    yield f"@@ -{first} +{second} @@\n"
    yield from (f" {line}" for line in old[start:head])
    yield from (f"-{line}" for line in old[head:old_end])
    yield from (f"+{line}" for line in new[head:new_end])
    yield from (f" {line}" for line in old[old_end : old_end + after])
