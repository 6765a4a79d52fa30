"""sendto, sendmsg and sendmmsg, done for the caller on a copy of its socket.

A message with an address is decided; one without goes where the socket is connected to, which was decided then. What a
stream takes in part goes on as the kernel would: a socket that waits is given the rest when it has room.
"""

from __future__ import annotations

import os
import signal
from collections.abc import Callable
from contextlib import ExitStack, suppress
from errno import EACCES, EAGAIN, EFAULT, EINVAL, EMSGSIZE, ENOBUFS, EOPNOTSUPP, EPERM, EPIPE, ETOOMANYREFS
from socket import (
    AF_INET,
    AF_INET6,
    AF_NETLINK,
    AF_UNIX,
    AF_UNSPEC,
    MSG_CONFIRM,
    MSG_DONTROUTE,
    MSG_DONTWAIT,
    MSG_EOR,
    MSG_FASTOPEN,
    MSG_MORE,
    MSG_NOSIGNAL,
    MSG_OOB,
    SOCK_DGRAM,
    SOCK_STREAM,
    SOL_SOCKET,
)

from corral.actions import Kind
from corral.supervisor import addresses, callers, messages, unix
from corral.supervisor.addresses import WithheldError, error
from corral.supervisor.call import Call, close_all
from corral.supervisor.deputy_wire import MAX_APART, MAX_FDS, Reply
from corral.supervisor.egress import named, note, undeliverable
from corral.supervisor.errands import Errand, deadline
from corral.supervisor.messages import Credentials, Message
from corral.supervisor.ownership import is_own, refuse_foreign
from corral.supervisor.sockets import Copy
from corral.supervisor.unix import Target
from corral.supervisor.waiting import Outcome, Wait

MAX_DATAGRAM = MAX_APART
"""Bytes; more than net.core.wmem_max lets a datagram have."""
CHUNK = 1 << 18
"""Bytes of a stream that are copied and sent in one go."""
MAX_AT_ONCE = 1 << 20
"""Bytes of a stream that one call sends before others have their turn."""
MESSAGES_AT_ONCE = 32
"""Messages of one sendmmsg(2) that are sent before others have their turn."""
MAX_RIGHTS = MAX_FDS - 3
"""Descriptors of one message that the deputy can pass: beside the socket, a receiver and the data."""
MSG_ZEROCOPY = 0x4000000
SO_ZEROCOPY = 60
_FLAGS = int(MSG_OOB | MSG_DONTROUTE | MSG_EOR | MSG_CONFIRM | MSG_MORE)  # as numbers: arithmetic on enums is slow
"""What is passed on; the rest is about waiting and signals, which are ours, or nothing to a sender."""
_UNIX_FLAGS = int(MSG_OOB | MSG_EOR | MSG_MORE)
_NOT_URGENT = ~int(MSG_OOB)
_DONT_WAIT, _NO_SIGNAL, _FAST_OPEN = int(MSG_DONTWAIT), int(MSG_NOSIGNAL), int(MSG_FASTOPEN)
_NO_RIGHTS = "a socket of another network than the sandbox's takes data, but no descriptors: they would leave unseen"
_BARE_UNIX = AF_UNIX.to_bytes(2, "little")


class Sending:
    """The messages of one call, one after the other."""

    def __init__(
        self,
        call: Call,
        copy: Copy,
        flags: int,
        *,
        count: int,
        read: Callable[[int], Message],
        report: Callable[[int, int], None] | None = None,
    ) -> None:
        """``read`` gives message number N. With ``report`` (number, bytes) the call's value is how many were sent; else
        there is one, and it is its bytes. Takes ``copy`` over."""
        self._call, self._copy, self._flags = call, copy, flags
        self._count, self._read, self._report = count, read, report
        self._number = 0
        self._running = self._again = False
        self._message: Message
        self._held: ExitStack | None = None
        """What the present message holds."""
        self._address = b""
        self._target: Target | None = None
        self._sent = 0
        """Bytes of the present message."""
        self._wait: Wait | None = None

    # ---- one after the other ----

    def start(self) -> None:
        """Begins, or goes on with the next message. Answers the call in the end, and closes the copy."""
        if self._running:  # what was decided at once comes back here: the loop below goes on
            self._again = True
            return
        self._running = self._again = True
        done = 0
        try:
            while self._again:
                self._again = False
                self._call.when_gone = self._release
                if self._number >= self._count:
                    self._end(0)
                elif done >= MESSAGES_AT_ONCE:
                    self._call.sandbox.loop.call_later(0, self._resume)
                else:
                    done += 1
                    self._next()
        except OSError as problem:
            self._stop(problem)
        except BaseException:
            self._release()
            raise
        finally:
            self._running = False

    def _resume(self) -> None:
        if not self._call.answered:
            try:
                self.start()
            except Exception as problem:
                self._call.sandbox.fault(self._call, problem)

    def _next(self) -> None:
        message = self._message = self._read(self._number)
        copy, self._sent, self._address, self._target = self._copy, 0, b"", None
        if copy.type != SOCK_STREAM and message.data.total > MAX_DATAGRAM:
            raise error(EMSGSIZE)
        if copy.domain in (AF_INET, AF_INET6):
            self._send_internet(message.name)
        elif copy.domain == AF_UNIX:
            self._send_unix(message.name)
        elif copy.domain == AF_NETLINK:
            if message.name:
                self._check_netlink(message.name)
            self._begin()
        else:
            raise error(EOPNOTSUPP)

    # ---- where to ----

    def _send_internet(self, name: bytes) -> None:
        copy = self._copy
        if copy.type == SOCK_STREAM:
            # A stream ignores the address, except where it is to be connected by it.
            if self._flags & _FAST_OPEN:
                raise error(EOPNOTSUPP)  # as where client fast open is switched off (tcp(7)): programs then connect
            name = b""
        if self._flags & MSG_ZEROCOPY and copy.option(SOL_SOCKET, SO_ZEROCOPY):
            raise error(ENOBUFS)  # the pages would be ours; programs then send without
        if name and addresses.family_of(name) == AF_UNSPEC:
            name = addresses.as_ipv4(name) if copy.domain == AF_INET else b""
        if not name:
            self._begin()
            return
        endpoint = addresses.internet(name, copy.transport)
        if addresses.needs_own_address(name):
            name = addresses.destination(name, copy.name())
            endpoint = addresses.internet(name, copy.transport)
        self._address = name
        self._call.when_gone = self._refused
        egress = self._call.sandbox.egress
        own = undeliverable(egress, endpoint)
        self._call.decide(Kind.NET_SEND, named(egress, endpoint), self._begin, own=own)

    def _send_unix(self, name: bytes) -> None:
        call, copy = self._call, self._copy
        if self._message.control.rights and not is_own(call, copy):
            raise WithheldError(EACCES, _NO_RIGHTS)
        if copy.type == SOCK_STREAM and name:
            self._address = _BARE_UNIX  # whatever it says, a stream refuses an address
        elif copy.type == SOCK_DGRAM and name:
            if not is_own(call, copy):
                self._release()
                refuse_foreign(call)
                return
            self._held = ExitStack()
            caller = callers.identify(call)
            unix.find(call, name, caller, self._held, self._found, self._stop, release=self._release)
            return
        self._begin()

    def _found(self, target: Target) -> None:
        self._target = target
        self._call.when_gone = self._refused
        self._call.decide(Kind.NET_SEND, target.endpoint, self._begin)

    def _refused(self) -> None:
        self._end(EACCES)

    def _check_netlink(self, name: bytes) -> None:
        port, groups = addresses.netlink(name)
        if addresses.family_of(name) != AF_NETLINK:
            raise error(EINVAL)
        if port or groups:
            raise WithheldError(EPERM, "with route netlink only the kernel may be talked to")
        self._address = name

    # ---- the effect ----

    def _begin(self) -> None:
        """Sends the message."""
        try:
            if self._needs_deputy():
                self._ask_deputy()
            elif self._try() is not Outcome.DONE:
                self._wait = Wait(self._call, self._copy, self._try_again, self._end, expired=EAGAIN)
        except OSError as problem:
            self._stop(problem)
        except BaseException:
            self._release()
            raise

    def _try_again(self) -> Outcome:
        try:
            return self._try()
        except OSError as problem:
            self._stop(problem)
            return Outcome.DONE

    def _try(self) -> Outcome:
        """Sends what can be sent now, and goes on to what comes after. Raises OSError where nothing of it was sent."""
        data, before = self._message.data, self._sent
        is_stream = self._copy.type == SOCK_STREAM
        while True:
            try:
                part = self._part()
                sent = self._send(part)
            except BlockingIOError:
                if self._may_wait():
                    return Outcome.MOVED if self._sent > before else Outcome.STUCK
                if not self._sent:
                    raise
                break
            except OSError:
                if not self._sent:
                    raise
                break
            self._sent += sent
            data.skip(sent)
            if not is_stream or not data.left:
                break
            if self._sent - before >= MAX_AT_ONCE:
                if self._may_wait():
                    return Outcome.MOVED
                break
        self._finished()
        return Outcome.DONE

    def _may_wait(self) -> bool:
        return not self._flags & _DONT_WAIT and self._copy.blocking

    def _part(self) -> bytes:
        """What is to be sent now. Raises OSError (EFAULT) unless all of it is there."""
        data = self._message.data
        wanted = min(data.left, CHUNK) if self._copy.type == SOCK_STREAM else data.left
        part = data.read(wanted)
        if len(part) < wanted:
            raise error(EFAULT)
        return part

    def _part_flags(self, part: bytes) -> int:
        flags = self._flags & _FLAGS
        # The urgent byte is the last of all.
        return flags & _NOT_URGENT if len(part) < self._message.data.left else flags

    def _send(self, part: bytes) -> int:
        call, copy = self._call, self._copy
        if copy.domain == AF_NETLINK and not messages.is_question(part):
            raise WithheldError(EPERM, "route netlink may be asked, but not told")
        fds: list[int] = []
        try:
            control = self._message.control.plain
            if copy.domain == AF_UNIX:
                control = self._credentials()
                if not self._sent:
                    control += messages.rights(self._take_rights(fds))
            # Between the first read and now the thread may have died, and its number may be somebody else's.
            if not call.waits():
                raise error(EPERM)
            sent = copy.send(part, self._part_flags(part), self._address, control)
            if copy.domain == AF_UNIX:
                call.sandbox.unread.note(copy.cookie, copy.unread)
            elif self._address and copy.domain != AF_NETLINK:
                note(call.sandbox.egress, copy, self._address, call.decision)
            return sent
        except BrokenPipeError:
            self._raise_sigpipe()
            raise
        finally:
            close_all(fds)

    def _take_rights(self, fds: list[int]) -> list[int]:
        for number in self._message.control.rights:
            fds.append(self._call.take_number(number))
        return fds

    def _credentials(self) -> bytes:
        """Who sends: whoever looks at the other end must see the caller, and not us (unix(7), SO_PASSCRED)."""
        call = self._call
        if os.geteuid() != 0:
            return b""  # we have the caller's ids, or the deputy does it; nobody inside sees our process
        uid, gid = callers.host_ids(call)
        return messages.credentials(Credentials(call.actor.process.pid, uid, gid))

    def _raise_sigpipe(self) -> None:
        if self._copy.type == SOCK_STREAM and not self._flags & _NO_SIGNAL and not self._sent:
            with suppress(OSError):
                signal.pidfd_send_signal(self._call.actor.pidfd, signal.SIGPIPE)

    # ---- by the deputy ----

    def _needs_deputy(self) -> bool:
        """Whether this needs the caller's rights or ids, which the deputy has and we have not."""
        if self._copy.domain != AF_UNIX or self._address:  # an address that a stream refuses
            return False
        control = self._message.control
        if control.credentials is not None:
            self._check_credentials(control.credentials)
        if self._target is not None or not self._call.sandbox.unread.admits(self._message.data.left):
            return True
        if os.geteuid() == 0:
            # How many descriptors of a user are in flight is limited (unix(7), ETOOMANYREFS), but not for root.
            return bool(control.rights)
        return callers.host_ids(self._call) != (os.geteuid(), os.getegid())

    def _check_credentials(self, given: Credentials) -> None:
        """Raises OSError (EPERM) unless a caller says of itself what is true."""
        caller = callers.identify(self._call)
        if given != Credentials(self._call.actor.process.inner_pid, caller.uid, caller.gid):
            raise error(EPERM)

    def _ask_deputy(self) -> None:
        call, target = self._call, self._target
        part = self._part()
        caller = callers.identify(call)
        if len(self._message.control.rights) > MAX_RIGHTS:
            raise error(ETOOMANYREFS)

        def ask(done: Callable[[Reply], None]) -> int:
            fds: list[int] = []
            try:
                return call.sandbox.deputy.send(
                    caller,
                    self._copy.fd,
                    part,
                    done,
                    to=None if target is None else target.fd,
                    address=b"" if target is None else target.address,
                    fds=self._take_rights(fds),
                    flags=self._part_flags(part) & _UNIX_FLAGS,
                )
            finally:
                close_all(fds)

        patient = self._may_wait()
        until = deadline(self._copy.patience) if patient else None
        done = self._sent_by_deputy
        Errand(call, ask, done, release=self._release, give_up=self._end, patient=patient, deadline=until)

    def _sent_by_deputy(self, reply: Reply) -> None:
        if reply.errno:
            if reply.errno == EPIPE:
                self._raise_sigpipe()
            self._end(reply.errno)
            return
        self._sent += reply.value
        self._message.data.skip(reply.value)
        if self._copy.type != SOCK_STREAM or not self._message.data.left:
            self._finished()
        else:
            self._begin_rest()

    def _begin_rest(self) -> None:
        """The rest of a stream's data, whose descriptors went with the first byte."""
        self._message.control = messages.Control()
        self._begin()

    # ---- the answer ----

    def _finished(self) -> None:
        """The present message is sent, as far as it will be."""
        if self._wait is not None:
            self._wait.end()
            self._wait = None
        if self._report is None:
            self._release()
            self._call.succeed(self._sent)
            return
        self._let_go()
        self._report(self._number, self._sent)
        self._number += 1
        self.start()

    def _stop(self, problem: OSError) -> None:
        if isinstance(problem, WithheldError):
            self._call.note_refusal(problem.code, problem.reason)
        self._end(problem.errno or EPERM)

    def _end(self, errno: int) -> None:
        """Nothing more is sent: the call says what was, or why nothing was."""
        self._release()
        if self._number:
            self._call.succeed(self._number)
        elif self._report is None and self._sent:
            self._call.succeed(self._sent)
        elif errno:
            self._call.fail(errno)
        else:
            self._call.succeed(0)

    def _release(self) -> None:
        if self._wait is not None:
            self._wait.end()
            self._wait = None
        self._let_go()
        self._copy.close()

    def _let_go(self) -> None:
        if self._held is not None:
            self._held.close()
            self._held = None
