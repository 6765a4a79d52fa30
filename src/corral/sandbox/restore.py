"""Restore: the files of a sandbox that stands still become those of a layer, in their place.

What is different is found as for `corral diff A B`, and carried out by a helper in the sandbox's user namespace
(:mod:`corral.sandbox.swap`). Of an ordinary user's sandbox the helper can read all layers too, as their owner; for root
this process reads them and hands over one file at a time, since root of the sandbox may not read what is the host's.

What lies below something that is mounted inside stays as it is: it is not seen. The helper is in the host's mount
namespace, where removing what is covered in another one takes the cover off (rename(2), unlink(2) since Linux 3.18).
"""

from __future__ import annotations

import base64
import json
import os
import socket
import struct
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from corral.errors import CorralError, RequestError
from corral.sandbox import asowner
from corral.sandbox.between import PartComparison, Side, go_through, side_from_json, side_to_json
from corral.sandbox.changes import Change, ChangeKind, FileType, from_json, to_json
from corral.sandbox.identity import AGENT_ID
from corral.sandbox.layer import KeptLayer, owners_of
from corral.sandbox.mounts import cover_points, mounted_below
from corral.sandbox.ownership import NOBODY
from corral.sandbox.prepare import Prepared
from corral.sandbox.swap import Content, Swapper, content_of, open_source

_LENGTH = struct.Struct("!I")
_MAX_MESSAGE = 1 << 20
"""Bytes: a path, and the extended attributes of one file, which most file systems bound at 64 KiB together."""


def check_fits(prepared: Prepared, target: KeptLayer) -> None:
    """Raises RequestError for a layer that the files of a sandbox cannot become."""
    if target.workspace != prepared.directory:
        raise RequestError(f"the layer {target.id} is of the workspace {target.workspace}, not of {prepared.directory}")
    own = prepared.view.parts
    missing = {part.path for part in target.parts} - {part.path for part in own}
    if missing:
        raise RequestError(f"the layer has {min(missing)}, which this sandbox does not let be changed")
    roots = [{part.without_base().lowers for part in parts if part.path == "/"} for parts in (own, target.parts)]
    if roots[0] != roots[1]:
        raise RequestError(f"the layer {target.id} is of another root file system")


@dataclass(frozen=True, slots=True)
class Inside:
    """What of a sandbox's inside is needed, opened while it stands still: it may end meanwhile, and then the numbers
    of its own descriptors and processes are those of others."""

    root: int
    """Its root directory."""
    namespace: int
    """Its user namespace."""
    mounts: tuple[str, ...]
    """Where something is mounted."""

    @classmethod
    def opened(cls, root: int, first: int) -> Inside:
        """Of the root directory behind a descriptor, and the first process. Raises CorralError."""
        opened: list[int] = []
        try:
            opened += [os.dup(root), os.open(f"/proc/{first}/ns/user", os.O_RDONLY | os.O_CLOEXEC)]
            return cls(opened[0], opened[1], tuple(cover_points(first)))
        except OSError as error:
            for fd in opened:
                os.close(fd)
            raise CorralError(f"its inside cannot be looked at: {error.strerror}") from None

    def close(self) -> None:
        """Lets go of it."""
        os.close(self.root)
        os.close(self.namespace)


def restore(prepared: Prepared, layer: int, inside: Inside, target: KeptLayer) -> int:
    """Makes the files of a sandbox, whose processes all stand still, those of ``target``; how many were different.

    ``layer`` is the directory of its layer. After an error its files are neither these nor those. Raises CorralError,
    OSError.
    """
    owner = _owner(prepared)
    with target.reading() as parts:
        before = Side(prepared.view.parts, layer, owners_of(prepared), prepared.view.scaffold)
        after = target.side(parts)
        if os.geteuid() == 0:
            return _handed_over(before, after, inside, owner)
        request = {
            "before": side_to_json(before),
            "after": side_to_json(after),
            "root": inside.root,
            "owner": owner,
            "mounts": inside.mounts,
        }
        fds = (layer, parts, inside.root, inside.namespace)
        return int(asowner.call("restore", fds, request, None, join=inside.namespace))


def _owner(prepared: Prepared) -> tuple[int, int]:
    """Whose files are those of an ordinary user's layer, which tells no owners."""
    identity = prepared.identity
    if identity.privileged:
        return AGENT_ID, AGENT_ID
    return tuple(  # type: ignore[return-value]
        next((line.inside for line in lines if line.outside <= own < line.outside + line.length), lines[0].inside)
        for lines, own in ((identity.uid_lines, os.geteuid()), (identity.gid_lines, os.getegid()))
    )


class _Work:
    """Carries out what was found, part by part."""

    def __init__(self, carry_out: Any, owner: tuple[int, int], mounts: Sequence[str]) -> None:
        """``owner`` is the agent, ``mounts`` are the places inside where something is mounted."""
        self.count = 0
        self._carry_out, self._owner, self._mounts = carry_out, owner, mounts

    def finished(self, part: PartComparison) -> None:
        if part.unlisted:
            raise CorralError("there is more to be changed than can be told: too many, too long or too deep paths")
        covers = mounted_below(part.part.path, self._mounts)
        found = [
            (change, tree)
            for change, tree in zip(part.found, part.sources, strict=True)
            if not _is_covered(change, covers)
        ]
        if (top := part.top()) is not None:
            self.count += 1
            change, tree = top
            fd = part.root(tree)
            self._carry_out(change, content_of(fd, ".", os.fstat(fd), fd), fd)
        below = len(part.part.path.rstrip("/")) + 1
        # What goes makes room for what comes.
        for change, tree in sorted(found, key=lambda each: each[0].kind is not ChangeKind.DELETED):
            self.count += 1
            if tree < 0:
                self._carry_out(change, Content(), -1)
                continue
            if part.is_hosts(tree):
                _check_readable(change, self._owner[0])
            directory, name, status, fd = open_source(part.root(tree), change.path[below:])
            try:
                self._carry_out(change, content_of(directory, name, status, fd), fd)
            finally:
                os.close(directory)
                if fd >= 0:
                    os.close(fd)


def _is_covered(change: Change, covers: Sequence[str]) -> bool:
    """Whether it is not seen inside. Raises CorralError where something is mounted in what would be removed."""
    if not covers:
        return False
    if any(f"{change.path}/".startswith(f"{cover}/") for cover in covers):
        return True
    goes = change.kind is ChangeKind.DELETED or change.type_before is not change.file_type
    if goes and (below := mounted_below(change.path, covers)):
        raise CorralError(f"{change.path!r} cannot go, as the policy has something at {below[0]!r}")
    return False


def _check_readable(change: Change, agent: int) -> None:
    """Refuses what of the host's the agent may have been unable to read before he removed it: he would be its owner,
    or its group's, in place of somebody who does not exist inside. Raises CorralError."""
    if change.file_type not in (FileType.FILE, FileType.DIRECTORY):
        return
    (user, group), mode = change.owner_after or (NOBODY, NOBODY), change.mode_after or 0
    wanted = 0o5 if change.file_type is FileType.DIRECTORY else 0o4
    if user == NOBODY:
        kept_from_others = mode & wanted != wanted
    else:
        kept_from_others = group == NOBODY and user != agent and bool(mode >> 3 & ~mode & wanted)
    if kept_from_others:
        raise CorralError(
            f"{change.path!r} was removed, and cannot be set back in its place: its owner or group does not exist "
            "inside, and others may not read it; begin a new sandbox on the layer"
        )


def serve(request: dict[str, Any]) -> int:
    """All of it in a helper process, which can read both sides."""
    before, after = (side_from_json(request[name]) for name in ("before", "after"))
    owner = tuple(request["owner"])
    swapper = Swapper(request["root"], owner)
    work = _Work(swapper.carry_out, owner, request["mounts"])
    go_through(before, after, work.finished)
    swapper.close()
    return work.count


# ---- one by one, for root ----


def _handed_over(before: Side, after: Side, inside: Inside, owner: tuple[int, int]) -> int:
    own, other = socket.socketpair(socket.AF_UNIX, socket.SOCK_STREAM)
    with own:
        with other:
            request = {"root": inside.root, "owner": owner, "become": owner, "from": other.fileno()}
            fds = (inside.root, inside.namespace, other.fileno())
            helper = asowner.begin("receive", fds, request, join=inside.namespace)
        with helper:

            def hand_over(change: Change, content: Content, source: int) -> None:
                _send(own, [to_json(change), _to_json(content)], source)

            work = _Work(hand_over, owner, inside.mounts)
            try:
                go_through(before, after, work.finished)
                _send(own, None, -1)
            except (BrokenPipeError, ConnectionResetError):
                pass  # it says why
            except BaseException:
                helper.kill()
                raise
            if helper.result() != work.count:
                raise CorralError("the helper process did not do all of it")
            return work.count


def receive(request: dict[str, Any]) -> int:
    """The helper's side."""
    count = 0
    swapper = Swapper(request["root"], tuple(request["owner"]))
    with socket.socket(fileno=request["from"]) as connection:
        while (message := _receive(connection)) is not None:
            (row, content), source = message
            try:
                swapper.carry_out(from_json(row), _from_json(content), source)
            finally:
                if source >= 0:
                    os.close(source)
            count += 1
    swapper.close()
    return count


def _send(connection: socket.socket, message: Any, source: int) -> None:
    data = json.dumps(message).encode()
    if len(data) > _MAX_MESSAGE:
        raise CorralError("an entry has more extended attributes than can be handed over")
    socket.send_fds(connection, [_LENGTH.pack(len(data))], [source] if source >= 0 else [])
    connection.sendall(data)


def _receive(connection: socket.socket) -> tuple[Any, int] | None:
    head, fds, _, _ = socket.recv_fds(connection, _LENGTH.size, 1)
    head += _exactly(connection, _LENGTH.size - len(head))
    message = json.loads(_exactly(connection, _LENGTH.unpack(head)[0]))
    return None if message is None else (message, fds[0] if fds else -1)


def _exactly(connection: socket.socket, count: int) -> bytes:
    data = bytearray()
    while len(data) < count:
        piece = connection.recv(count - len(data))
        if not piece:
            raise CorralError("what was to be done came to an end in the middle")
        data += piece
    return bytes(data)


def _to_json(content: Content) -> list[Any]:
    attributes = {name: base64.b64encode(value).decode() for name, value in content.attributes.items()}
    return [content.times, content.target, attributes, content.inode]


def _from_json(row: list[Any]) -> Content:
    times, target, attributes, inode = row
    return Content(tuple(times), target, {name: base64.b64decode(text) for name, text in attributes.items()}, inode)
