"""One notified system call, from its arrival to its one answer."""

from __future__ import annotations

import errno as errors
import os
from collections.abc import Callable
from contextlib import suppress
from typing import TYPE_CHECKING

from corral.actions import Action, Decision, KernelCall, Kind, Opinion, Subject, Verdict
from corral.monitor.parts import Held
from corral.supervisor import listener, memory
from corral.supervisor.budget import PER_CALL
from corral.supervisor.listener import Notification
from corral.supervisor.processes import Actor

if TYPE_CHECKING:
    from corral.supervisor.service import Supervised

_LOW = 0xFFFFFFFF
_STATUS_BYTES = 4096
ERESTARTSYS = 512
"""Known to the kernel only: it never reaches a program while a signal is pending."""


class Call:
    """A thread waits in this call until one of :meth:`succeed`, :meth:`fail`, :meth:`proceed`, :meth:`install`.

    Used by the supervisor's thread only. Answering twice does nothing; not answering is a fault of ours, and the caller
    sleeps on.
    """

    __slots__ = (
        "_actor",
        "_held",
        "answered",
        "arguments",
        "decision",
        "holds",
        "id",
        "is_counted",
        "judged",
        "name",
        "number",
        "sandbox",
        "tid",
        "was_asked",
        "when_gone",
    )

    def __init__(self, sandbox: Supervised, notification: Notification, name: str) -> None:
        self.sandbox = sandbox
        self.name = name
        """Of the system call."""
        self.id, self.tid, self.number, _, self.arguments = notification
        self.answered = False
        self.judged = False
        """Whether the monitor was told of it."""
        self.decision: Decision | None = None
        """By which it was allowed, once it is."""
        self.was_asked = False
        """Whether anybody's answer, of now or for the session, had a part in letting it go on."""
        self.holds = PER_CALL
        """Descriptors that it may keep while it waits (:mod:`corral.supervisor.budget`)."""
        self.is_counted = False
        self.when_gone: Callable[[], None] | None = None
        """Told when the caller is gone before the answer; frees what the emulation holds."""
        self._actor: Actor | None = None
        self._held: Held | None = None

    # ---- what it says ----

    @property
    def actor(self) -> Actor:
        """Who calls. Raises OSError where that thread is gone."""
        if self._actor is None:
            self._actor = self.sandbox.processes.find(self.tid, self.waits)
        return self._actor

    def low(self, argument: int) -> int:
        """An ``unsigned int`` argument: the kernel ignores the upper half of the register."""
        return self.arguments[argument] & _LOW

    def signed(self, argument: int) -> int:
        """An ``int`` argument."""
        value = self.arguments[argument] & _LOW
        return value - (1 << 32) if value >> 31 else value

    def read(self, address: int, length: int) -> bytes:
        """A copy of the caller's memory. Raises OSError (EFAULT, EPERM)."""
        return memory.read(self.tid, address, length)

    def read_text(self, address: int, limit: int = memory.PAGE) -> bytes:
        """A copy of a NUL-terminated text. Raises OSError (EFAULT, EPERM, ENAMETOOLONG)."""
        return memory.read_text(self.tid, address, limit)

    def take(self, argument: int) -> int:
        """A copy of the descriptor that an argument names; the receiver closes it. Raises OSError (EBADF)."""
        return memory.take(self.actor.pidfd, self.low(argument))

    def take_number(self, number: int) -> int:
        """A copy of the descriptor with this number. Raises OSError (EBADF)."""
        return memory.take(self.actor.pidfd, number)

    def waits(self) -> bool:
        """Whether the caller still waits."""
        return not self.answered and listener.is_waiting(self.sandbox.listener, self.id)

    def interruption(self) -> int:
        """The errno with which a signal that waits for the caller would end a blocking call, or 0.

        A notified call that was received is interrupted by nothing but death (WAIT_KILLABLE_RECV), so what blocks on
        the caller's behalf has to look. ERESTARTSYS leaves it to the kernel whether the caller sees EINTR or makes the
        call again (SA_RESTART, stopped and continued; signal(7)). It must be this thread that the kernel has chosen for
        the signal; that it is for one of its own, and for one of the process where it is the main thread.
        """
        shared = own = blocked = ignored = 0
        is_main = False
        try:
            with open(f"/proc/{self.tid}/status", "rb", buffering=0) as file:
                text = file.read(_STATUS_BYTES)
        except OSError:
            return 0
        for line in text.split(b"\n"):
            if line.startswith(b"Tgid:"):
                is_main = int(line[5:]) == self.tid
            elif line.startswith(b"SigPnd:"):
                own = int(line[7:], 16)
            elif line.startswith(b"ShdPnd:"):
                shared = int(line[7:], 16)
            elif line.startswith(b"SigBlk:"):
                blocked = int(line[7:], 16)
            elif line.startswith(b"SigIgn:"):
                ignored = int(line[7:], 16)
        heeded = ~(blocked | ignored)
        if own & heeded or (shared & heeded and is_main):
            return ERESTARTSYS
        return errors.EINTR if shared & heeded else 0

    # ---- the decision ----

    def decide(
        self,
        kind: Kind,
        subject: Subject,
        allowed: Callable[[], None],
        *,
        refused: int = errors.EACCES,
        at_least: Verdict = Verdict.ALLOW,
        own: Opinion | None = None,
    ) -> Action:
        """Has the monitor decide, and returns what. ``allowed`` carries it out, at once or later; any other verdict is
        ``refused``.

        With ``at_least`` DENY it is a refusal already, and nobody is asked; ``own`` is the same with its reason. What
        the caller held for it (descriptors) is freed by ``when_gone``, which is also called on refusal.
        """
        sandbox = self.sandbox
        action = Action(kind, subject, sandbox.processes.origin_of(self.actor, subject))
        self.judged = True

        def decided(decision: Decision) -> None:
            if sandbox.on_own_thread():
                self._decided(decision, allowed, refused)
            else:
                sandbox.post(self._decided, decision, allowed, refused)

        held = sandbox.monitor.submit(action, decided, at_least=at_least, own=own)
        if held is not None and not self.answered:  # else what was allowed may have asked for more, and be held itself
            # Thousands may be held, and each actor has a descriptor; who still waits is found again.
            self._held, self._actor = held, None
        return action

    def refuse(self, errno: int, reason: str) -> None:
        """Has a refusal recorded that no policy is asked about, and fails."""
        self.note_refusal(errno, reason)
        self.fail(errno)

    def note_refusal(self, errno: int, reason: str) -> None:
        """Has a refusal recorded that no policy is asked about; the answer is the receiver's to give."""
        self.judged = True
        try:
            origin = self.sandbox.processes.origin_of(self.actor, None)
        except Exception:
            origin = self.sandbox.processes.nobody
        action = Action(Kind.KERNEL, KernelCall(self.name, errno, reason), origin)
        self.sandbox.monitor.submit(action, _told, at_least=Verdict.DENY)  # with DENY nothing is held

    def _decided(self, decision: Decision, allowed: Callable[[], None], refused: int) -> None:
        self._held = None
        self.was_asked |= decision.decider != "policy"
        if self.answered:
            return
        if decision.verdict is not Verdict.ALLOW:
            self._free()
            self.fail(refused)
            return
        self.decision = decision
        try:
            allowed()
        except OSError as error:
            self.fail(error.errno or errors.EPERM)
        except Exception as error:
            self.sandbox.fault(self, error)

    # ---- the answer ----

    def succeed(self, value: int = 0) -> None:
        """The call returns ``value``."""
        if self._close():
            listener.answer(self.sandbox.listener, self.id, value, 0)

    def fail(self, errno: int) -> None:
        """The call fails with ``errno``."""
        if self._close():
            listener.answer(self.sandbox.listener, self.id, 0, errno)

    def proceed(self) -> None:
        """The kernel makes the call itself. Only where nothing was decided on memory or descriptors."""
        if self._close():
            listener.proceed(self.sandbox.listener, self.id)

    def install(self, source: int, *, close_on_exec: bool) -> None:
        """The call returns a new descriptor of ``source``'s file; where it cannot get one, it fails."""
        if not self.answered:
            try:
                listener.install(self.sandbox.listener, self.id, source, close_on_exec=close_on_exec)
            except OSError as error:
                self.fail(error.errno or errors.EPERM)
            else:
                self._close()

    def _close(self) -> bool:
        if self.answered:
            return False
        self.answered = True
        self.when_gone = None
        self.sandbox.open.pop(self.id, None)
        if self.is_counted:
            self.sandbox.uncount(self)
        if self._held is not None:  # the answer would be to nothing
            held, self._held = self._held, None
            held.withdraw()
        return True

    def _free(self) -> None:
        free, self.when_gone = self.when_gone, None
        if free is not None:
            free()

    def gone(self) -> None:
        """The caller is dead: nothing is done any more, and nobody is asked."""
        if self.answered:
            return
        free = self.when_gone
        self._close()
        if free is not None:
            free()


def _told(decision: Decision) -> None:
    """It fails, whatever anybody thinks of it."""


def close_all(fds: list[int]) -> None:
    """Closes copies."""
    for fd in fds:
        with suppress(OSError):
            os.close(fd)
    fds.clear()
