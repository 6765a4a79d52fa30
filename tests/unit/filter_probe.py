"""What the tests of the seccomp program share: running calls under a program, and running a program without a kernel.

What a program notifies is answered by a few lines that stand in for the supervisor: with the errno of the row that the
table finds. Rows are told apart by giving each an errno that no kernel call returns (2000 and up): such an answer can
only come from that row. The probes use bad descriptors and pointers, so a call that is let through fails in a known,
harmless way.
"""

from __future__ import annotations

import ctypes
import functools
import json
import os
import select
import signal
import struct
import time
from collections.abc import Callable, Iterable

from corral.supervisor import filter as seccomp_filter
from corral.supervisor import listener
from corral.supervisor.allowed import allowed_names
from corral.supervisor.filter import Class, Row, Table, find_architecture
from corral.supervisor.memory import take
from corral.supervisor.syscalls import DECIDED, REFUSALS, Condition

HERE = find_architecture()
LIBC = ctypes.CDLL(None, use_errno=True)
SENTINEL = 2000
SENTINEL_DECIDED = 3000
"""What a decided call gets here: neither a refusal's errno nor one of the kernel's."""
BAD_POINTER = 1
BAD_FD = 0xFFFFFFFF
TIME_LIMIT = 60.0
Call = tuple[str | int, tuple[int, ...]]
Case = tuple[str, tuple[int, ...], int]
Judge = Callable[[int, tuple[int, ...]], int | None]
"""From a number and arguments to an errno, or None to let the call go on."""
CONDITIONAL = sorted({row.name for rows in (REFUSALS, DECIDED) for row in rows if row.when})


@functools.cache
def numbers(architecture: str = HERE.name) -> dict[str, int]:
    names = {refusal.name for refusal in REFUSALS} | allowed_names()
    return seccomp_filter.resolve(find_architecture(architecture), names)


@functools.cache
def sentinel_table() -> Table:
    """The table with an errno of its own for each row."""
    rows = [
        *(Row(row.name, Class.REFUSED, SENTINEL + i, row.reason, when=row.when) for i, row in enumerate(REFUSALS)),
        *(Row(row.name, Class.DECIDED, SENTINEL_DECIDED + i, "", when=row.when) for i, row in enumerate(DECIDED)),
    ]
    return Table(HERE, numbers(), rows)


def judge_by(table: Table, *, proceed: bool = False) -> Judge:
    """Answers as ``table`` says; with ``proceed``, calls that are to be decided go on."""

    def judge(number: int, arguments: tuple[int, ...]) -> int | None:
        row = table.find(number, arguments)
        if row.kind is Class.REFUSED:
            return row.errno
        return None if proceed else max(row.errno, SENTINEL_DECIDED)

    return judge


class _Program(ctypes.Structure):
    _fields_ = (("length", ctypes.c_ushort), ("instructions", ctypes.c_char_p))


def install(program: bytes, flags: int = 0) -> int:
    """Puts this process under ``program``, as an ordinary user may: with no_new_privs. seccomp(2)'s result."""
    argument = _Program(len(program) // 8, program)
    if LIBC.prctl(38, 1, 0, 0, 0):  # PR_SET_NO_NEW_PRIVS
        raise OSError(ctypes.get_errno(), "no_new_privs")
    result = int(LIBC.syscall(ctypes.c_long(numbers()["seccomp"]), 1, flags, ctypes.byref(argument)))
    if result < 0:
        raise OSError(ctypes.get_errno(), "seccomp")
    return result


def run_under(program: bytes, judge: Judge, body: Callable[[], bytes], *, drop: bool) -> tuple[bytes, int]:
    """What ``body`` returns, or writes to its standard output, in a child under ``program``; and its wait status.

    ``drop`` takes root's rights from it: a broken filter must not let a probe harm this machine.
    """
    source, sink = os.pipe()
    go, gone = os.pipe()
    child = os.fork()
    if child == 0:
        try:
            if drop and os.geteuid() == 0:
                os.setgroups([])
                os.setresgid(65534, 65534, 65534)
                os.setresuid(65534, 65534, 65534)
            os.dup2(sink, 1)
            os.dup2(sink, 2)
            # NEW_LISTENER | WAIT_KILLABLE_RECV, as the launcher does
            os.write(sink, struct.pack("<i", install(program, 8 | 32)))
            os.read(go, 1)
            os.write(sink, body())
        finally:
            os._exit(0)
    for fd in (sink, go):
        os.close(fd)
    fds, output = [source, gone], b""
    try:
        told = os.read(source, 4)
        assert len(told) == 4, "the filter was not installed"
        pidfd = os.pidfd_open(child)
        fds.append(pidfd)
        fds.append(take(pidfd, struct.unpack("<i", told)[0]))
        os.write(gone, b".")
        output = _serve(fds[-1], source, judge)
    except BaseException:
        os.kill(child, signal.SIGKILL)
        raise
    finally:
        for fd in fds:
            os.close(fd)
        status = os.waitpid(child, 0)[1]
    return output, status


def _serve(notified: int, source: int, judge: Judge) -> bytes:
    """Answers calls until nobody is left who could make one; what was written meanwhile."""
    poll = select.poll()
    poll.register(notified, select.POLLIN)
    poll.register(source, select.POLLIN)
    waiting, output, deadline = {notified, source}, b"", time.monotonic() + TIME_LIMIT
    while waiting:
        events = poll.poll(max(0.0, deadline - time.monotonic()) * 1000)
        assert events, f"still running after {TIME_LIMIT} s: {output[-2000:]!r}"
        for fd, event in events:
            if fd == source:
                data = os.read(source, 1 << 16)
                output += data
                over = not data
            else:
                if event & select.POLLIN and (notification := listener.receive(notified)):
                    _answer(notified, notification, judge)
                over = not event & select.POLLIN
            if over:
                poll.unregister(fd)
                waiting.discard(fd)
    return output


def _answer(notified: int, notification: listener.Notification, judge: Judge) -> None:
    code = judge(notification.number, notification.arguments)
    if code is None:
        listener.proceed(notified, notification.id)
    else:
        listener.answer(notified, notification.id, 0, code)


def under(table: Table, body: Callable[[], object], program: bytes | None = None) -> tuple[object, int]:
    """What ``body`` returns in a child without privileges under ``table``'s program, and the child's wait status."""
    output, status = run_under(
        program or table.compile(), judge_by(table), lambda: json.dumps(body()).encode(), drop=True
    )
    return json.loads(output or b"null"), status


def answers(table: Table, calls: Iterable[Call], program: bytes | None = None) -> list[int]:
    """For each call the errno, or 0; under ``program`` where that is not the table's."""
    listed = [(name if isinstance(name, int) else numbers()[name], arguments) for name, arguments in calls]

    def body() -> list[int]:
        results = []
        for number, arguments in listed:
            padded = [ctypes.c_ulong(value) for value in (*arguments, *[0] * (6 - len(arguments)))]
            ctypes.set_errno(0)
            failed = LIBC.syscall(ctypes.c_long(number), *padded) == -1
            results.append(ctypes.get_errno() if failed else 0)
        return results

    result, status = under(table, body, program)
    assert isinstance(result, list), f"the probe died: wait status {status:#x}"
    return result


def compare(table: Table, cases: list[Case]) -> None:
    """Fails with the cases whose errno is not the third item."""
    got = answers(table, [(name, arguments) for name, arguments, _ in cases])
    wrong = [(case, answer) for case, answer in zip(cases, got, strict=True) if case[2] != answer]
    assert not wrong


def interpret(program: bytes, number: int, arguments: tuple[int, ...] | None, token: int) -> int:
    """What the kernel's classic BPF machine returns. Raises if the program leaves its bounds.

    Without ``arguments`` it also raises if the program looks at any: so does the kernel find out whether it has to run
    the program for this number at all (seccomp_is_const_allow).
    """
    data = struct.pack("<IIQ", number & 0xFFFFFFFF, token, 0)
    if arguments is not None:
        data += struct.pack("<6Q", *arguments, *[0] * (6 - len(arguments)))
    instructions = list(struct.iter_unpack("<HBBI", program))
    accumulator = at = 0
    while True:
        code, if_true, if_false, operand = instructions[at]
        at += 1
        if code == 0x20:
            assert operand + 4 <= len(data), "it looks at an argument"
            accumulator = int.from_bytes(data[operand : operand + 4], "little")
        elif code == 0x54:
            accumulator &= operand
        elif code == 0x05:
            at += operand
        elif code == 0x15:
            at += if_true if accumulator == operand else if_false
        elif code == 0x35:
            at += if_true if accumulator >= operand else if_false
        elif code == 0x06:
            return int(operand)
        else:
            raise AssertionError(f"unknown instruction {code:#x}")


def holds(condition: Condition, arguments: tuple[int, ...]) -> bool:
    half = arguments[condition.argument] >> 32 if condition.high else arguments[condition.argument]
    return ((half & 0xFFFFFFFF & condition.mask) in condition.values) != condition.negated
