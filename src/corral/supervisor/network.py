"""The network calls, judged and done for the caller on a copy of its socket.

What is decided is what is done: the descriptor and the address are copied first, and the copies are used for both. A
socket of another network than the sandbox's (a standard stream may be one, inherited from the host) can be used as it
was given, but nothing new can be reached with it.
"""

from __future__ import annotations

from collections.abc import Callable
from errno import EACCES, EAFNOSUPPORT, EALREADY, EINPROGRESS, EINVAL, EOPNOTSUPP, EPERM
from functools import partial
from socket import AF_INET, AF_INET6, AF_NETLINK, AF_UNIX, AF_UNSPEC, SOCK_STREAM

from corral.actions import Endpoint, Kind, Opinion, Transport
from corral.supervisor import addresses, memory, messages, unix
from corral.supervisor.addresses import error
from corral.supervisor.budget import PER_SOCKET_CALL
from corral.supervisor.call import Call
from corral.supervisor.egress import named, note, undeliverable
from corral.supervisor.messages import Message
from corral.supervisor.ownership import is_own, refuse_foreign
from corral.supervisor.sending import Sending
from corral.supervisor.sockets import Copy
from corral.supervisor.waiting import Outcome, Wait

_ADMINISTRATORS_GROUPS = 1 << 29 | 1 << 30
"""RTNLGRP_IPV4_MROUTE_R and its IPv6 twin: listening to them needs CAP_NET_ADMIN, which we have."""
_OTHER_ABI = 0x80000000  # MSG_CMSG_COMPAT


def _may_use(call: Call, copy: Copy) -> bool:
    """Whether something new may be reached with it. What is connected may be used, whoever is at the other end; a
    Unix socket's address, if the message has one, is looked at with it."""
    is_message = copy.domain == AF_UNIX and call.name in ("sendmsg", "sendmmsg")
    return is_message or is_own(call, copy)


def _on_copy(handle: Callable[[Call, Copy], None]) -> Callable[[Call], None]:
    """The handler that gives ``handle`` a copy of the socket that argument 0 names, for it to close."""

    def handler(call: Call) -> None:
        copy = Copy(call.take(0))
        if copy.domain in (AF_INET, AF_INET6):
            call.holds = PER_SOCKET_CALL
        try:
            if _may_use(call, copy):
                handle(call, copy)
                return
            copy.close()
            refuse_foreign(call)
        except addresses.WithheldError as withheld:
            copy.close()
            call.refuse(withheld.code, withheld.reason)
        except BaseException:
            copy.close()
            raise

    return handler


def _decide(
    call: Call, copy: Copy, kind: Kind, endpoint: Endpoint, effect: Callable[[], None], *, own: Opinion | None = None
) -> None:
    """Has it decided, and ``effect`` answer the call where it may. The copy is closed in any case but a longer wait."""
    call.when_gone = copy.close

    def allowed() -> None:
        try:
            if call.waits():  # it may have died since its memory was read, and that memory been somebody else's
                effect()
            else:
                call.gone()
        except BaseException:
            copy.close()
            raise

    call.decide(kind, endpoint, allowed, own=own)


# ---- connect ----


def _connect(call: Call, copy: Copy) -> None:
    raw = messages.read_name(call, call.arguments[1], call.signed(2))
    family = addresses.family_of(raw)
    if copy.domain in (AF_INET, AF_INET6):
        if family == AF_UNSPEC:
            _now(call, copy, partial(copy.connect, raw))  # takes a connection back: it reaches nobody
            return
        endpoint = addresses.internet(raw, copy.transport)
        if addresses.needs_own_address(raw):
            raw = addresses.destination(raw, copy.name())
            endpoint = addresses.internet(raw, copy.transport)
        if not endpoint.port and endpoint.transport is Transport.UDP:
            _now(call, copy, partial(copy.connect, raw))  # nothing can be sent there: resolvers look for a source so
            return
        endpoint = named(call.sandbox.egress, endpoint)
        effect = partial(_connect_internet, call, copy, raw)
        if endpoint.transport is Transport.UDP and endpoint.name is not None:
            # Resolvers look so which of a name's addresses they could use (RFC 6724); nothing that is sent arrives.
            _decide(call, copy, Kind.NET_RESOLVE, Endpoint(Transport.UDP, name=endpoint.name), effect)
            return
        _decide(call, copy, Kind.NET_CONNECT, endpoint, effect, own=undeliverable(call.sandbox.egress, endpoint))
    elif copy.domain == AF_NETLINK:
        if family == AF_NETLINK and any(addresses.netlink(raw)):
            raise addresses.WithheldError(EPERM, "with route netlink only the kernel may be talked to")
        if family not in (AF_NETLINK, AF_UNSPEC):
            raise error(EINVAL)
        _now(call, copy, partial(copy.connect, raw))
    elif copy.domain == AF_UNIX:
        unix.connect(call, copy, raw)
    else:
        raise error(EAFNOSUPPORT)


def _now(call: Call, copy: Copy, effect: Callable[[], None]) -> None:
    """Does what needs no decision."""
    try:
        effect()
    finally:
        copy.close()
    call.succeed()


def _connect_internet(call: Call, copy: Copy, raw: bytes) -> None:
    try:
        copy.connect(raw)
    except OSError as problem:
        # EALREADY: somebody else's connect is under way, and who waits waits for that one.
        if problem.errno == EINPROGRESS:
            note(call.sandbox.egress, copy, raw, call.decision)
        if problem.errno not in (EINPROGRESS, EALREADY) or not copy.blocking:
            raise
        pending = problem.errno
    else:
        note(call.sandbox.egress, copy, raw, call.decision)
        copy.close()
        call.succeed()
        return

    def attempt() -> Outcome:
        # The second connect(2) says how the first has ended, and settles the socket's state.
        try:
            copy.connect(raw)
        except OSError as problem:
            if problem.errno in (EINPROGRESS, EALREADY):
                return Outcome.STUCK
            answer = partial(call.fail, problem.errno or EPERM)
        else:
            answer = partial(call.succeed, 0)
        wait.end()
        copy.close()
        answer()
        return Outcome.DONE

    def give_up(errno: int) -> None:
        copy.close()  # the connection goes on without its caller, as connect(2) says
        call.fail(errno)

    wait = Wait(call, copy, attempt, give_up, expired=pending)


# ---- bind and listen ----


def _bind(call: Call, copy: Copy) -> None:
    raw = messages.read_name(call, call.arguments[1], call.signed(2))
    if copy.domain in (AF_INET, AF_INET6):
        if addresses.family_of(raw) == AF_UNSPEC and copy.domain == AF_INET and raw[4:8] == bytes(4):
            raw = addresses.as_ipv4(raw)  # "Compatibility games", says the kernel
        endpoint = addresses.internet(raw, copy.transport)
        addresses.check_port(endpoint)
        _decide(call, copy, Kind.NET_BIND, endpoint, partial(_now, call, copy, partial(copy.bind, raw)))
    elif copy.domain == AF_NETLINK:
        if addresses.family_of(raw) == AF_NETLINK and addresses.netlink(raw)[1] & _ADMINISTRATORS_GROUPS:
            raise addresses.WithheldError(EPERM, "multicast routes are told to administrators only")
        _now(call, copy, partial(copy.bind, raw))
    elif copy.domain == AF_UNIX:
        unix.bind(call, copy, raw)
    else:
        raise error(EAFNOSUPPORT)


def _listen(call: Call, copy: Copy) -> None:
    backlog = call.signed(1)
    if copy.domain in (AF_INET, AF_INET6):
        name = copy.name()
        endpoint = addresses.internet(name, copy.transport)

        def effect() -> None:
            if copy.name() != name:  # bound elsewhere while this was held
                raise error(EACCES)
            _now(call, copy, partial(copy.listen, backlog))

        _decide(call, copy, Kind.NET_LISTEN, endpoint, effect)
    elif copy.domain == AF_UNIX:
        unix.listen(call, copy, backlog)
    else:
        raise error(EOPNOTSUPP)


# ---- sending ----


def _send_to(call: Call, copy: Copy) -> None:
    """sendto(fd, data, length, flags, address, address length)."""
    name = messages.read_name(call, call.arguments[4], call.signed(5))
    if not name and copy.domain in (AF_INET, AF_INET6) and copy.type != SOCK_STREAM:
        raise error(EINVAL)  # there is an address, though nothing is in it
    message = Message(name, messages.read_buffer(call, call.arguments[1], call.arguments[2]))
    Sending(call, copy, call.low(3), count=1, read=lambda number: message).start()


def _send_message(call: Call, copy: Copy) -> None:
    """sendmsg(fd, header, flags)."""
    _check_flags(call.low(2))
    message = messages.read_message(call, call.arguments[1], copy.domain)
    Sending(call, copy, call.low(2), count=1, read=lambda number: message).start()


def _send_messages(call: Call, copy: Copy) -> None:
    """sendmmsg(fd, headers, count, flags)."""
    _check_flags(call.low(3))
    start = call.arguments[1]

    def read(number: int) -> Message:
        return messages.read_message(call, start + number * messages.BATCH_STEP, copy.domain)

    def report(number: int, sent: int) -> None:
        place = start + number * messages.BATCH_STEP + messages.HEADER.size
        memory.write(call.tid, place, sent.to_bytes(4, "little"), still=call.waits)

    count = min(call.low(2), memory.MAX_PLACES)
    Sending(call, copy, call.low(3), count=count, read=read, report=report).start()


def _check_flags(flags: int) -> None:
    if flags & _OTHER_ABI:
        raise error(EINVAL)


HANDLERS: dict[str, Callable[[Call], None]] = {
    "connect": _on_copy(_connect),
    "bind": _on_copy(_bind),
    "listen": _on_copy(_listen),
    "sendto": _on_copy(_send_to),
    "sendmsg": _on_copy(_send_message),
    "sendmmsg": _on_copy(_send_messages),
}
