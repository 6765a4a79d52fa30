"""Unix sockets: connected, bound and sent to by the deputy, with the caller's rights and ids.

A path is resolved first, what it led to is decided on, and that very object is used. Abstract names belong to the
network namespace and are taken as they are.
"""

from __future__ import annotations

import os
import re
from collections.abc import Callable
from contextlib import ExitStack
from errno import EACCES, EADDRINUSE, EINVAL, ENOENT, EPERM, ESTALE
from functools import partial
from socket import AF_UNSPEC

from corral.actions import Endpoint, Kind
from corral.supervisor import addresses, callers
from corral.supervisor.addresses import WithheldError, error
from corral.supervisor.call import Call
from corral.supervisor.deputy_wire import Caller, Reply
from corral.supervisor.errands import Errand
from corral.supervisor.sockets import Copy

MAX_TRIES = 8
"""How often a directory may be somewhere else by the time of bind(2)."""
_TOO_DEEP = "it lies so deep that its path cannot be told, so no rule could know it"
_NAMELESS = "what the address leads to has no path, so no rule could know it"

_OWN_LINK = re.compile(
    rb"(?:/proc/(?:thread-)?self/(?P<place>cwd|root)|(?:/proc/(?:thread-)?self|/dev)/fd/(?P<fd>[0-9]{1,9}))"
    rb"(?P<rest>(?:/.*)?)",
    re.DOTALL,
)

Found = Callable[["Target"], None]


class Target:
    """What an address has led to: an object, or an abstract name."""

    __slots__ = ("address", "endpoint", "fd")

    def __init__(self, endpoint: Endpoint, *, fd: int | None = None, address: bytes = b"") -> None:
        self.endpoint, self.fd, self.address = endpoint, fd, address


class _Work:
    """One call on a Unix socket, with all that it holds."""

    def __init__(self, call: Call, copy: Copy, caller: Caller) -> None:
        self.call, self.copy, self.caller = call, copy, caller
        self.held = ExitStack()
        self.held.callback(copy.close)
        call.when_gone = self.held.close

    def fail(self, errno: int) -> None:
        self.held.close()
        self.call.fail(errno)

    def stop(self, problem: OSError) -> None:
        """It is the call's answer, and recorded where it is a refusal of ours."""
        if isinstance(problem, WithheldError):
            self.call.note_refusal(problem.code, problem.reason)
        self.fail(problem.errno or EPERM)

    def finish(self, reply: Reply) -> None:
        """The deputy's answer is the call's."""
        if reply.fd >= 0:
            os.close(reply.fd)
        self.held.close()
        if reply.errno:
            self.call.fail(reply.errno)
        else:
            self.call.succeed()

    def decide(self, kind: Kind, endpoint: Endpoint, effect: Callable[[], None]) -> None:
        def allowed() -> None:
            try:
                effect()
            except BaseException:
                self.held.close()
                raise

        self.call.when_gone = self.held.close
        self.call.decide(kind, endpoint, allowed)

    def errand(self, ask: Callable[[Callable[[Reply], None]], int], done: Callable[[Reply], None]) -> None:
        Errand(self.call, ask, done, release=self.held.close)


def working_directory(call: Call) -> int:
    """An O_PATH descriptor of the caller's working directory. Raises OSError: EACCES where we may not look."""
    fd = os.open(f"/proc/{call.tid}/cwd", os.O_PATH | os.O_DIRECTORY | os.O_CLOEXEC)
    if not call.waits():
        os.close(fd)
        raise ProcessLookupError
    return fd


def _from(call: Call, path: bytes, held: ExitStack) -> tuple[str, int | None]:
    """A path for the deputy, and where it starts.

    A caller's own links in /proc are followed here: the deputy is not in the sandbox's PID namespace, and has none. (A
    path of more than 108 bytes is commonly given so.)
    """
    start = None
    if link := _OWN_LINK.fullmatch(path):
        number, place, rest = link.group("fd"), link.group("place"), link.group("rest")
        if place == b"root":
            path = rest or b"/"
        else:
            path = rest.lstrip(b"/")
            start = working_directory(call) if place == b"cwd" else call.take_number(int(number))
    elif not path.startswith(b"/"):
        start = working_directory(call)
    if start is not None:
        held.callback(os.close, start)
    return os.fsdecode(path), start


def find(
    call: Call,
    raw: bytes,
    caller: Caller,
    held: ExitStack,
    found: Found,
    failed: Callable[[OSError], None],
    *,
    release: Callable[[], None] | None = None,
) -> None:
    """Resolves the address of another socket, with the caller's rights. ``held`` gets what has to be closed.

    ``release`` frees all that the call holds when its caller is gone meanwhile; else ``held`` is all.
    Raises OSError where the address itself is wrong.
    """
    name = addresses.unix_name(raw)
    if not name:
        raise error(EINVAL)
    if name.startswith(b"\0"):
        found(Target(addresses.unix(name), address=raw))
        return
    path, start = _from(call, name, held)

    def resolved(reply: Reply) -> None:
        if reply.fd >= 0:
            held.callback(os.close, reply.fd)
        if problem := _problem(reply):
            failed(problem)
        else:
            found(Target(addresses.unix(os.fsencode(reply.path)), fd=reply.fd))

    deputy = call.sandbox.deputy
    Errand(
        call,
        lambda done: deputy.resolve(caller, path, done, start=start),
        resolved,
        release=release or held.close,
        give_up=lambda errno: failed(error(errno)),
    )


def _problem(reply: Reply) -> OSError | None:
    """Why what was looked for is not used: it was not found, or it has no path that could be decided on."""
    if reply.errno:
        return WithheldError(reply.errno, _TOO_DEEP) if reply.value else error(reply.errno)
    return None if reply.path else WithheldError(ENOENT, _NAMELESS)


def connect(call: Call, copy: Copy, raw: bytes) -> None:
    """connect(2). Takes ``copy`` over unless it raises."""
    if addresses.family_of(raw) == AF_UNSPEC:  # reaches nobody: a datagram socket lets go of its peer
        copy.connect(raw)
        copy.close()
        call.succeed()
        return
    work = _Work(call, copy, callers.identify(call))
    deputy = call.sandbox.deputy

    def found(target: Target) -> None:
        ask = partial(deputy.connect, work.caller, copy.fd, to=target.fd, address=target.address)
        work.decide(Kind.NET_CONNECT, target.endpoint, lambda: work.errand(ask, work.finish))

    try:
        find(call, raw, work.caller, work.held, found, work.stop)
    except BaseException:
        work.held.close()
        raise


def bind(call: Call, copy: Copy, raw: bytes) -> None:
    """bind(2). Takes ``copy`` over unless it raises."""
    name = addresses.unix_name(raw)
    work = _Work(call, copy, callers.identify(call))
    deputy = call.sandbox.deputy
    try:
        if not name or name.startswith(b"\0"):
            ask = partial(deputy.bind, work.caller, copy.fd, address=raw)
            work.decide(Kind.NET_BIND, addresses.unix(name), lambda: work.errand(ask, work.finish))
        else:
            _bind_path(work, name, raw[: addresses.FAMILY_LENGTH] + name, MAX_TRIES)
    except BaseException:
        work.held.close()
        raise


def _bind_path(work: _Work, name: bytes, raw: bytes, tries: int) -> None:
    """Makes a socket at a path: its directory is resolved, decided on with the last name, and used."""
    call, deputy = work.call, work.call.sandbox.deputy
    parent, slash, last = name.rpartition(b"/")
    if last in (b"", b".", b".."):
        raise error(EADDRINUSE if last or not parent.strip(b"/") else ENOENT)
    if _OWN_LINK.fullmatch(name):
        raw = b""  # the deputy cannot follow it: the socket is known by its last name then
    path, start = _from(call, parent + slash or b".", work.held)

    def resolved(reply: Reply) -> None:
        directory, file = reply.fd, os.fsdecode(last)
        if directory >= 0:
            work.held.callback(os.close, directory)
        if problem := _problem(reply):
            work.stop(problem)
            return
        endpoint = addresses.unix(os.path.join(os.fsencode(reply.path), last))
        ask = partial(deputy.bind, work.caller, work.copy.fd, directory=directory, name=file, address=raw, start=start)
        work.decide(Kind.NET_BIND, endpoint, lambda: work.errand(ask, bound))

    def bound(reply: Reply) -> None:
        if reply.errno != ESTALE:
            work.finish(reply)
        elif tries > 1:
            _bind_path(work, name, raw, tries - 1)
        else:
            work.fail(EACCES)

    work.errand(lambda done: deputy.resolve(work.caller, path, done, start=start, directory=True), resolved)


def listen(call: Call, copy: Copy, backlog: int) -> None:
    """listen(2): the deputy's, because whoever connects sees who has listened (SO_PEERCRED). Takes ``copy`` over unless
    it raises."""
    own = copy.name()
    endpoint = addresses.unix(addresses.unix_name(own[: addresses.UNIX_LENGTH]))
    work = _Work(call, copy, callers.identify(call))
    deputy = call.sandbox.deputy

    def effect() -> None:
        if copy.name() != own:  # bound elsewhere while this was held
            raise error(EPERM)
        work.errand(lambda done: deputy.listen(work.caller, copy.fd, backlog, done), work.finish)

    try:
        work.decide(Kind.NET_LISTEN, endpoint, effect)
    except BaseException:
        work.held.close()
        raise
