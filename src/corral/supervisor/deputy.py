"""The deputy's client: work in the sandbox's file tree, done with the agent's rights (``src/launcher/deputy.h``).

    RESOLVE path ──▶ object, its path ──▶ the monitor decides ──▶ OPEN, CONNECT, ... that object

What is decided about is what is done: paths are only resolved, everything else takes the objects and directories that
came of that, and single names in them. Whatever the agent changes meanwhile changes nothing.

Nothing here blocks. Every request is answered once, by a callback from the loop; where there is nobody to answer any
more, the answer is EPERM; where too many requests wait already, it is "busy". Descriptors that are passed in stay the
caller's.
"""

from __future__ import annotations

import array
import errno
import fcntl
import os
import socket
import stat
import struct
from collections import deque
from collections.abc import Callable, Sequence
from contextlib import suppress
from dataclasses import dataclass, replace

from corral.reactor import Reactor
from corral.supervisor.deputy_wire import (
    MAX_ADDRESS,
    MAX_APART,
    MAX_DATA,
    MAX_FDS,
    MAX_PATH,
    MAX_REPLY,
    Caller,
    Operation,
    Option,
    Reply,
    decode,
    encode,
)

MAX_OUTSTANDING = 1024
"""Requests without a reply, at a time."""
_SIOCUNIXFILE = 0x89E0  # linux/un.h: a descriptor of what the socket is bound to
_AT_REMOVEDIR = 0x200  # linux/fcntl.h
_SEEN_AT_ONCE = 64

Done = Callable[[Reply], None]
_REFUSED = Reply(errno.EPERM)
_BUSY = Reply(errno.EAGAIN, busy=True)
_CANCEL = Caller(0, 0)


@dataclass(frozen=True, slots=True)
class _Message:
    content: bytes
    fds: tuple[int, ...]


def _close(fds: Sequence[int]) -> None:
    for fd in fds:
        with suppress(OSError):
            os.close(fd)


class _Check:
    """Has a reply looked at before it is told."""

    __slots__ = ("_check", "_sock", "done")

    def __init__(self, check: Callable[[int, Reply, Done], None], sock: int, done: Done) -> None:
        """Takes ``sock`` over."""
        self._check, self._sock, self.done = check, sock, done

    def __call__(self, reply: Reply) -> None:
        self._check(self._sock, reply, self.done)


def _ignore(reply: Reply) -> None:
    """Nobody waits for it any more."""


class Deputy:
    """The controller's end of one sandbox's deputy; ``fd`` becomes its own. The first request starts the process."""

    def __init__(self, fd: int, reactor: Reactor, on_lost: Callable[[], None] | None = None) -> None:
        self._socket = socket.socket(fileno=fd)
        self._socket.setblocking(False)
        self._reactor = reactor
        self._on_lost = on_lost
        self._number = 0
        self._outstanding: dict[int, Done | None] = {}
        self._unsent: deque[_Message] = deque()
        self._lost = False
        reactor.add_reader(fd, self._readable)

    def close(self) -> None:
        """Lets go of the deputy, which ends it and, unless that is over, its sandbox. Waiting callers get EPERM."""
        self._on_lost = None
        self._lose()

    # ---- files ----

    def resolve(
        self,
        caller: Caller,
        path: str,
        done: Done,
        *,
        start: int | None = None,
        follow: bool = True,
        directory: bool = False,
        resolve: int = 0,
    ) -> int:
        """Finds what ``path`` leads to, from the directory ``start`` if it is relative.

        ``follow``: the last name too, if it is a symbolic link. ``resolve`` are flags of openat2(2). An empty path is
        ``start`` itself. The object may be used with every other method.
        """
        flags = (0 if follow else os.O_NOFOLLOW) | (os.O_DIRECTORY if directory else 0)
        fds = () if start is None else (start,)
        return self.request(Operation.RESOLVE, caller, done, fds, path=path, flags=flags, resolve=resolve)

    def open(self, caller: Caller, file: int, flags: int, done: Done, *, mode: int = 0) -> int:
        """Opens the object ``file`` as open(2) would; a fifo waits for its other end, until it is cancelled."""
        return self.request(Operation.OPEN, caller, done, (file,), flags=flags, mode=mode)

    def create(self, caller: Caller, directory: int, name: str, flags: int, mode: int, done: Done) -> int:
        """Makes and opens a new file; EEXIST where the name exists, whatever it is."""
        return self.request(Operation.CREATE, caller, done, (directory,), path=name, flags=flags, mode=mode)

    def rename(
        self,
        caller: Caller,
        old: tuple[int, str],
        new: tuple[int, str],
        done: Done,
        *,
        flags: int = 0,
        token: int = 0,
    ) -> int:
        """renameat2(2); both places are a directory and a name in it.

        With a ``token`` that is not 0, also of a directory that the overlay refuses to rename. That takes its time,
        and a place beside the new name which ``token`` names; :meth:`interrupt` ends it. The reply's value says what is
        of that place (:class:`PlaceLeft`).
        """
        fds = (old[0], new[0])
        return self.request(Operation.RENAME, caller, done, fds, path=old[1], second=new[1], flags=flags, resolve=token)

    def link(self, caller: Caller, file: int, directory: int, name: str, done: Done) -> int:
        """Gives the object ``file`` another name."""
        return self.request(Operation.LINK, caller, done, (file, directory), path=name)

    def symlink(self, caller: Caller, target: str, directory: int, name: str, done: Done) -> int:
        """Makes a symbolic link."""
        return self.request(Operation.SYMLINK, caller, done, (directory,), path=name, second=target)

    def unlink(self, caller: Caller, directory: int, name: str, done: Done, *, remove_directory: bool = False) -> int:
        """unlink(2), or rmdir(2)."""
        flags = _AT_REMOVEDIR if remove_directory else 0
        return self.request(Operation.UNLINK, caller, done, (directory,), path=name, flags=flags)

    def make(self, caller: Caller, directory: int, name: str, mode: int, done: Done) -> int:
        """mknod(2): a regular file, a fifo or a socket's file, as the type in ``mode`` says."""
        kind, bits = stat.S_IFMT(mode), stat.S_IMODE(mode)
        return self.request(Operation.MAKE, caller, done, (directory,), path=name, flags=kind, mode=bits)

    def chmod(self, caller: Caller, file: int, mode: int, done: Done) -> int:
        """Changes the mode of the object ``file``."""
        return self.request(Operation.CHMOD, caller, done, (file,), mode=mode)

    # ---- Unix sockets ----

    def connect(self, caller: Caller, sock: int, done: Done, *, to: int | None = None, address: bytes = b"") -> int:
        """Connects to the object ``to``, or to ``address`` (a sockaddr: abstract, or AF_UNSPEC).

        Waits as connect(2) does, unless the socket is non-blocking, for a listener with a full queue.
        """
        fds = (sock,) if to is None else (sock, to)
        return self.request(Operation.CONNECT, caller, done, fds, address=address)

    def bind(
        self,
        caller: Caller,
        sock: int,
        done: Done,
        *,
        directory: int | None = None,
        name: str = "",
        address: bytes = b"",
        start: int | None = None,
    ) -> int:
        """Binds to ``address`` (a sockaddr: abstract, or unnamed), or makes ``name`` in ``directory``.

        With both, ``address`` is the path as the caller gave it, from ``start`` if it is relative: getsockname(2) must
        give back what was given, so the kernel resolves it once more. ESTALE: it does not lead to ``directory`` any
        more, nothing was done, decide again. When it is found to have led elsewhere in the very moment of the call, all
        is lost (``on_lost``), and ``done`` is not called: what was done is not what was decided.
        """
        if directory is None:
            return self.request(Operation.BIND, caller, done, (sock,), address=address)
        plain = name and address[2:].partition(b"\0")[0] == os.fsencode(name)
        if plain or not address or not _may_compare(sock):
            address = address if plain else b""
            return self.request(Operation.BIND, caller, done, (sock, directory), path=name, address=address)
        check = _Check(self._bound, os.dup(sock), done)
        fds = (sock, directory) if start is None or address[2:3] == b"/" else (sock, directory, start)
        return self.request(Operation.BIND, caller, check, fds, path=name, address=address)

    def listen(self, caller: Caller, sock: int, backlog: int, done: Done) -> int:
        """listen(2); whoever connects then sees the caller's ids (SO_PEERCRED)."""
        return self.request(Operation.LISTEN, caller, done, (sock,), flags=backlog & 0xFFFFFFFF)

    def send(
        self,
        caller: Caller,
        sock: int,
        data: bytes,
        done: Done,
        *,
        to: int | None = None,
        address: bytes = b"",
        fds: Sequence[int] = (),
        flags: int = 0,
    ) -> int:
        """sendmsg(2) without waiting: to the object ``to``, to an abstract ``address``, or to the peer."""
        options = Option.NONE if to is None else Option.TO_OBJECT
        passed = [sock] if to is None else [sock, to]
        if len(data) > MAX_APART:
            return self._answer_soon(done, Reply(errno.EMSGSIZE))
        if len(data) <= MAX_DATA:
            return self.request(
                Operation.SEND, caller, done, (*passed, *fds), address=address, data=data, flags=flags, options=options
            )
        with open(os.memfd_create("corral-deputy", os.MFD_CLOEXEC), "r+b", buffering=0) as apart:
            view = memoryview(data)
            while view:
                view = view[apart.write(view) :]
            passed += [apart.fileno(), *fds]
            options |= Option.APART
            return self.request(Operation.SEND, caller, done, passed, address=address, flags=flags, options=options)

    # ---- requests ----

    def request(
        self,
        operation: Operation,
        caller: Caller,
        done: Done,
        fds: Sequence[int],
        *,
        path: str = "",
        second: str = "",
        address: bytes = b"",
        data: bytes = b"",
        flags: int = 0,
        mode: int = 0,
        resolve: int = 0,
        options: Option = Option.NONE,
    ) -> int:
        """Asks, and returns the number by which :meth:`cancel` knows the request."""
        texts = [os.fsencode(path), os.fsencode(second)]
        if any(len(text) > MAX_PATH for text in texts):
            return self._answer_soon(done, Reply(errno.ENAMETOOLONG))
        if len(address) > MAX_ADDRESS:
            return self._answer_soon(done, Reply(errno.EINVAL))
        if self._lost or len(fds) > MAX_FDS:
            return self._answer_soon(done, _REFUSED)
        if len(self._outstanding) >= MAX_OUTSTANDING:
            return self._answer_soon(done, _BUSY)
        self._number += 1
        try:
            content = encode(
                self._number,
                operation,
                caller,
                path=texts[0],
                second=texts[1],
                address=address,
                data=data,
                flags=flags,
                mode=mode,
                resolve=resolve,
                options=options,
            )
        except struct.error:  # a number that no such call takes
            return self._answer_soon(done, Reply(errno.EINVAL))
        number = self._number
        self._outstanding[number] = done
        self._post(number, content, tuple(fds))
        return number

    def cancel(self, number: int) -> None:
        """The caller of request ``number`` is gone: its callback is not called, and it waits no longer."""
        done = self._outstanding.get(number)
        if done is None or self._lost:
            return
        if isinstance(done, _Check):
            done.done = _ignore  # what has been done is looked at all the same
        else:
            self._outstanding[number] = None  # until its reply, which may have a descriptor
        self._post(0, encode(number, Operation.CANCEL, _CANCEL), ())

    def interrupt(self, number: int) -> None:
        """Request ``number`` waits no longer, where it still does. Its callback is called all the same."""
        if number in self._outstanding and not self._lost:
            self._post(0, encode(number, Operation.CANCEL, _CANCEL), ())

    def _answer_soon(self, done: Done, reply: Reply) -> int:
        """Never from within the request, whose caller may not be ready for it."""
        self._number += 1
        self._reactor.call_later(0, done, reply)
        return self._number

    def _post(self, number: int, content: bytes, fds: tuple[int, ...]) -> None:
        try:
            if not self._unsent:
                try:
                    self._send(_Message(content, fds))
                    return
                except BlockingIOError:
                    self._reactor.add_writer(self._socket.fileno(), self._writable)
            kept: list[int] = []
            try:
                for fd in fds:
                    kept.append(os.dup(fd))
            except OSError:
                _close(kept)
                raise
            self._unsent.append(_Message(content, tuple(kept)))
        except OSError as error:
            # A bad descriptor, or none left, is about this request; anything else about the socket.
            if number and error.errno in (errno.EBADF, errno.EMFILE, errno.ETOOMANYREFS):
                done = self._outstanding.pop(number)
                if done:
                    self._reactor.call_later(0, done, _REFUSED)
            else:
                self._reactor.call_later(0, self._lose)

    def _send(self, message: _Message) -> None:
        rights = [(socket.SOL_SOCKET, socket.SCM_RIGHTS, array.array("i", message.fds))] if message.fds else []
        self._socket.sendmsg([message.content], rights, socket.MSG_NOSIGNAL)

    def _writable(self) -> None:
        while self._unsent:
            try:
                self._send(self._unsent[0])
            except BlockingIOError:
                return
            except OSError:
                self._lose()
                return
            _close(self._unsent.popleft().fds)
        self._reactor.remove_writer(self._socket.fileno())

    # ---- replies ----

    def _readable(self) -> None:
        for _ in range(_SEEN_AT_ONCE):  # then others have their turn
            if self._lost:
                return
            try:
                data, ancillary, flags, _ = self._socket.recvmsg(
                    MAX_REPLY, socket.CMSG_SPACE(4), socket.MSG_CMSG_CLOEXEC
                )
            except BlockingIOError:
                return
            except OSError:
                self._lose()
                return
            fds = array.array("i")
            for level, kind, content in ancillary:
                if level == socket.SOL_SOCKET and kind == socket.SCM_RIGHTS:
                    fds.frombytes(content[: len(content) - len(content) % fds.itemsize])
            self._received(data, flags, fds.tolist())

    def _received(self, data: bytes, flags: int, fds: list[int]) -> None:
        decoded = None if flags & socket.MSG_TRUNC or len(fds) > 1 else decode(data)
        if decoded is None:
            _close(fds)
            self._lose()
            return
        number, reply = decoded
        done = self._outstanding.pop(number, None)
        if done is None:  # nobody waits for it any more
            _close(fds)
        elif flags & socket.MSG_CTRUNC:  # no descriptor left for it here
            _close(fds)
            done(_REFUSED)
        else:
            done(replace(reply, fd=fds[0] if fds else -1))

    def _bound(self, sock: int, reply: Reply, done: Done) -> None:
        """What a path led to at the moment of bind(2) must be what was decided, or nowhere."""
        try:
            right = reply.errno != 0 or _lies_at(sock, reply.fd)
        finally:
            _close([sock] if reply.fd < 0 else [sock, reply.fd])
        if right:
            done(replace(reply, fd=-1))
        else:
            self._lose()  # and its caller is told nothing any more: it would go on until all ends

    def _lose(self) -> None:
        if self._lost:
            return
        self._lost = True
        self._reactor.remove_reader(self._socket.fileno())
        if self._unsent:
            self._reactor.remove_writer(self._socket.fileno())
        self._socket.close()
        while self._unsent:
            _close(self._unsent.popleft().fds)
        outstanding, self._outstanding = self._outstanding, {}
        for done in outstanding.values():
            if done:
                done(_REFUSED)
        if self._on_lost:
            self._on_lost()


def _may_compare(sock: int) -> bool:
    """Whether the kernel would tell what this socket is bound to: ENOENT says that it is not bound yet."""
    try:
        os.close(fcntl.ioctl(sock, _SIOCUNIXFILE))
    except OSError as error:
        return error.errno == errno.ENOENT
    return False


def _lies_at(sock: int, found: int) -> bool:
    """Whether ``sock`` is bound to the file ``found``, which has no other name, or to one that has none any more."""
    try:
        bound = fcntl.ioctl(sock, _SIOCUNIXFILE)
    except OSError:
        return False
    try:
        status = os.fstat(bound)
    finally:
        os.close(bound)
    if status.st_nlink == 0:
        return True
    if found < 0:
        return False
    there = os.fstat(found)
    return status.st_nlink == 1 and (status.st_dev, status.st_ino) == (there.st_dev, there.st_ino)
