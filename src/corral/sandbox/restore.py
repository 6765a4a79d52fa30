"""Restore: the files of a sandbox that stands still become those of a layer, in their place.

What is different is found as for `corral diff A B`, and carried out by a helper in the sandbox's user namespace
(:mod:`corral.sandbox.swap`). Of an ordinary user's sandbox the helper can read all layers too, as their owner; for root
this process reads them and hands over one file at a time, since root of the sandbox may not read what is the host's.
"""

from __future__ import annotations

import base64
import json
import os
import socket
import struct
from typing import Any

from corral.errors import CorralError, RequestError
from corral.sandbox import asowner
from corral.sandbox.between import PartComparison, Side, go_through, side_from_json, side_to_json
from corral.sandbox.changes import Change, from_json, to_json
from corral.sandbox.identity import AGENT_ID
from corral.sandbox.layer import KeptLayer, owners_of
from corral.sandbox.prepare import Prepared
from corral.sandbox.swap import Content, Swapper, content_of, open_source

_LENGTH = struct.Struct("!I")
_MAX_MESSAGE = 1 << 20
"""Bytes: a path, and the extended attributes of one file, which Linux bounds at 64 KiB together."""


def check_fits(prepared: Prepared, target: KeptLayer) -> None:
    """Raises RequestError for a layer that the files of a sandbox cannot become."""
    if target.workspace != prepared.directory:
        raise RequestError(f"the layer {target.id} is of the workspace {target.workspace}, not of {prepared.directory}")
    missing = {part.path for part in target.parts} - {part.path for part in prepared.view.parts}
    if missing:
        raise RequestError(f"the layer has {min(missing)}, which this sandbox does not let be changed")


def restore(prepared: Prepared, layer: int, root: int, first: int, target: KeptLayer) -> int:
    """Makes the files of a sandbox, whose processes all stand still, those of ``target``; how many were different.

    ``layer`` and ``root`` are the directories of its layer and of its root, ``first`` is its first process. After
    an error its files are neither these nor those. Raises CorralError, OSError.
    """
    owner = _owner(prepared)
    with target.reading() as parts:
        before = Side(prepared.view.parts, layer, owners_of(prepared), prepared.view.scaffold)
        after = target.side(parts)
        try:
            namespace = os.open(f"/proc/{first}/ns/user", os.O_RDONLY | os.O_CLOEXEC)
        except OSError as error:
            raise CorralError(f"its user namespace cannot be entered: {error.strerror}") from None
        try:
            if os.geteuid() == 0:
                return _handed_over(before, after, root, owner, namespace)
            request = {"before": side_to_json(before), "after": side_to_json(after), "root": root, "owner": owner}
            fds = (layer, parts, root, namespace)
            return int(asowner.call("restore", fds, request, None, join=namespace))
        finally:
            os.close(namespace)


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

    def __init__(self, carry_out: Any) -> None:
        self.count = 0
        self._carry_out = carry_out

    def finished(self, part: PartComparison) -> None:
        if part.unlisted:
            raise CorralError("there is more to be changed than can be told: too many, too long or too deep paths")
        top = len(part.part.path.rstrip("/")) + 1
        for change, tree in zip(part.found, part.sources, strict=True):
            self.count += 1
            if tree < 0:
                self._carry_out(change, Content(), -1)
                continue
            directory, name, status, fd = open_source(part.root(tree), change.path[top:])
            try:
                self._carry_out(change, content_of(directory, name, status, fd), fd)
            finally:
                os.close(directory)
                if fd >= 0:
                    os.close(fd)


def serve(request: dict[str, Any]) -> int:
    """All of it in a helper process, which can read both sides."""
    before, after = (side_from_json(request[name]) for name in ("before", "after"))
    swapper = Swapper(request["root"], tuple(request["owner"]))
    work = _Work(swapper.carry_out)
    go_through(before, after, work.finished)
    swapper.close()
    return work.count


# ---- one by one, for root ----


def _handed_over(before: Side, after: Side, root: int, owner: tuple[int, int], namespace: int) -> int:
    own, other = socket.socketpair(socket.AF_UNIX, socket.SOCK_STREAM)
    with own:
        with other:
            request = {"root": root, "owner": owner, "become": owner, "from": other.fileno()}
            helper = asowner.begin("receive", (root, namespace, other.fileno()), request, join=namespace)
        with helper:

            def hand_over(change: Change, content: Content, source: int) -> None:
                _send(own, [to_json(change), _to_json(content)], source)

            work = _Work(hand_over)
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
