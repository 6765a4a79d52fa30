"""Makes of the table in :mod:`corral.supervisor.syscalls` a seccomp program, and the judge of what it notifies.

    table = find_table(watched=True)
    program = table.compile()                  # bytes: an array of struct sock_filter, for seccomp()
    row = table.find(number, arguments)        # which row made the kernel notify this call

Rules:

1. What is not named is refused (ENOSYS), so the program is an allow-list. The alternative, allow by default and refuse
   a list, is open to every call that a newer kernel brings; io_uring came that way.
2. A call of another architecture, or of x32, kills the process: its numbers mean other calls, and no honest program
   inside makes one. All else that is not free is notified: what is refused too, so that no attempt is silent.
3. The result depends on the table, the architecture and the arguments alone: equal input, equal bytes, on every machine
   and with every libseccomp. A caller may keep it.
4. A name that has no number on the architecture (``open`` on aarch64) is skipped. A name that libseccomp does not know
   at all is an error, as a call that was meant to be refused must not go missing.
5. Program and judge are made from the same rows in the same order. A call for which the judge finds no row was not
   notified by this program: it is refused.

The numbers come from libseccomp. The instructions do not, for three reasons. Its rules have no order, and a call whose
rules all fail to match falls to the one default action: "these four socket families, of these only those protocols,
else this errno" has no form in it, except as hundreds of rules for single bits. It compares one argument once per rule.
And it cannot name calls newer than itself when it compiles for another architecture. The table is simple enough to be
compiled directly (see :mod:`corral.supervisor.bpf`), and the tests compare the program, number by number, with an
independent evaluation of the table, with libseccomp's own program for the unconditional part, and with the kernel's
answers.

Shape of the program: check architecture; binary search over ranges of call numbers with the same action; then the
argument checks of the few calls that have conditions. A call that is allowed without conditions costs nothing: the
kernel (5.11+) finds at load time that its answer depends on the number alone, and does not run the filter for it.
"""

from __future__ import annotations

import ctypes
import functools
import os
from collections.abc import Iterable, Mapping, Sequence
from enum import Enum
from errno import ENOSYS, EPERM
from typing import NamedTuple

from corral.errors import RequestError, WallError
from corral.supervisor.allowed import allowed_names
from corral.supervisor.bpf import JUMP_EQ, JUMP_GE, LOAD, OFFSET_ARCH, OFFSET_NUMBER, Program
from corral.supervisor.syscalls import (
    COMMON_NUMBERS,
    DECIDED,
    MOVED_DIRECTORIES,
    OWN_NUMBERS,
    REFUSALS,
    WATCHED_FILES,
    WATCHED_FILES_REFUSALS,
    Condition,
    Decided,
    Refusal,
)

STEP = "seccomp filter"

RET_KILL_PROCESS = 0x80000000
RET_ALLOW = 0x7FFF0000
RET_USER_NOTIF = 0x7FC00000

X32_BIT = 0x40000000


class Architecture(NamedTuple):
    """What differs between machines: ``token`` is AUDIT_ARCH_*, for the kernel and for libseccomp."""

    name: str
    token: int
    has_x32: bool


ARCHITECTURES = {
    "x86_64": Architecture("x86_64", 0xC000003E, has_x32=True),
    "aarch64": Architecture("aarch64", 0xC00000B7, has_x32=False),
}


class Class(Enum):
    """What the supervisor does with a notified call."""

    DECIDED = "decided"
    """Made on the caller's behalf, once its arguments are copied and allowed."""
    ASKED = "asked"
    """Made by the caller itself once it is allowed, as the call alone is what is decided."""
    REFUSED = "refused"


class Row(NamedTuple):
    """What is done with a call for which all conditions hold."""

    name: str
    """Of the system call."""
    kind: Class
    errno: int
    """What the caller gets that may not."""
    reason: str
    quiet: bool = False
    """Recorded, but not told to the agent: see rule 5 of :mod:`corral.supervisor.syscalls`."""
    when: tuple[Condition, ...] = ()


_MISSED = "the filter lets this call through, so nobody can have been told of it"
_UNNAMED = "not in the table: the answer is that of a kernel that does not have it"
_HIGHEST_NAMED = 1023
"""Up to here a number that is not in the table has a name of its own in records. Higher ones, of which no kernel has
any, share one, as an agent could make as many records of them."""

# A condition, unpacked: argument, shift, mask, values, negated.
_Test = tuple[int, int, int, tuple[int, ...], bool]


class Table:
    """One configuration of the table on one architecture. Immutable; may be used by several threads."""

    __slots__ = ("_checks", "_numbers", "_program", "_rows", "target")

    def __init__(self, target: Architecture, numbers: Mapping[str, int], rows: Iterable[Row]) -> None:
        """``numbers`` are those of all named calls; ``rows`` of one call are tried in their order."""
        self.target = target
        self._numbers = numbers
        self._rows: dict[str, list[Row]] = {}
        for row in rows:
            self._rows.setdefault(row.name, []).append(row)
        self._program: bytes | None = None
        self._checks: dict[int, list[tuple[list[_Test], Row]]] = {
            number: [
                *(([_unpack(condition) for condition in row.when], row) for row in self._rows.get(name, ())),
                ([], Row(name, Class.REFUSED, EPERM, _MISSED)),
            ]
            for name, number in numbers.items()
        }

    def find(self, number: int, arguments: Sequence[int]) -> Row:
        """The row for a call that was notified: ``number`` and the six ``arguments`` as in ``struct seccomp_data``."""
        checks = self._checks.get(number)
        if checks is None:
            return _unnamed(self.target.token, min(number & 0xFFFFFFFF, _HIGHEST_NAMED + 1))
        for tests, row in checks:
            for argument, shift, mask, values, negated in tests:
                if (arguments[argument] >> shift & mask in values) is negated:
                    break
            else:
                return row
        raise AssertionError("the last row of every call has no conditions")

    def number(self, name: str) -> int | None:
        """That of a named call, where this architecture has it."""
        return self._numbers.get(name)

    def is_constant(self, number: int) -> bool:
        """Whether :meth:`find` has the same row for this call whatever its arguments."""
        checks = self._checks.get(number)
        return checks is None or not checks[0][0]

    def compile(self) -> bytes:
        """The seccomp program. Whoever is under it needs somebody who listens: without, what it notifies is ENOSYS."""
        if self._program is None:
            whens = {name: [row.when for row in rows] for name, rows in self._rows.items()}
            self._program = assemble(self.target, self._numbers, whens)
        return self._program


def _unpack(condition: Condition) -> _Test:
    return condition.argument, 32 * condition.high, condition.mask, condition.values, condition.negated


@functools.lru_cache(maxsize=_HIGHEST_NAMED + 2)
def _unnamed(token: int, number: int) -> Row:
    """The row of a number that is not in the table."""
    name = "unknown call"
    if number <= _HIGHEST_NAMED:
        name = _libseccomp_name(token, number) or f"{name} {number}"
    return Row(name, Class.REFUSED, ENOSYS, _UNNAMED, quiet=True)


@functools.lru_cache(maxsize=64)
def find_table(
    architecture: str | None = None,
    *,
    also: tuple[Refusal, ...] = (),
    asked: tuple[str, ...] = (),
    denied: tuple[str, ...] = (),
    watched: bool = False,
    moved: bool = True,
) -> Table:
    """The table for ``architecture`` (a name as in ``os.uname().machine``), or for this machine.

    ``also`` are refusals beside :data:`REFUSALS`. ``asked`` and ``denied`` are the names of a policy's ``syscalls.ask``
    and ``syscalls.deny``; what the table refuses it refuses all the same. ``watched`` says that the policy asks for
    files or watches them, ``moved`` that directories are renamed which the overlay refuses to rename.

    Raises :class:`RequestError` if a policy's name is not a system call's, or asks for one that is decided by more
    than its name; :class:`WallError` if the architecture is not supported, libseccomp is missing, or it lacks a name.
    """
    target = find_architecture(architecture)
    refusals = (*REFUSALS, *also, *(WATCHED_FILES_REFUSALS if watched else ()))
    decisions: tuple[Decided, ...] = (*DECIDED, *(WATCHED_FILES if watched else ()))
    deciding = {row.name for row in decisions}
    if moved and not watched:
        decisions += MOVED_DIRECTORIES
    numbers = resolve(target, {row.name for row in refusals} | {row.name for row in decisions} | allowed_names())
    _check_policy(target, asked, denied, deciding)
    # Only what is free can be asked for: all else that is not in the table stays refused.
    rows = [
        *(Row(row.name, Class.REFUSED, row.errno, row.reason, row.quiet, row.when) for row in refusals),
        *(Row(name, Class.REFUSED, EPERM, "the policy refuses it") for name in denied if name in numbers),
        *(Row(name, Class.ASKED, EPERM, "the policy asks for it") for name in asked if name in numbers),
        *(Row(row.name, Class.DECIDED, row.errno, row.reason, when=row.when) for row in decisions),
    ]
    return Table(target, numbers, rows)


def _check_policy(target: Architecture, asked: tuple[str, ...], denied: tuple[str, ...], decided: set[str]) -> None:
    own = {name for table in OWN_NUMBERS.values() for name in table}
    for name in (*asked, *denied):
        known = name in COMMON_NUMBERS or name in own
        if not known and (
            not (name.isascii() and name.isidentifier())  # C would end the name at a NUL, and find another call's
            or _libseccomp_number(target.token, name) == _NO_SUCH_CALL
        ):
            raise RequestError(f"syscalls: there is no system call {name!r}")
    if both := decided.intersection(asked):
        # Such a call must not go on by itself (see Class), as asking for its name would have it do.
        raise RequestError(
            f"syscalls.ask: {', '.join(sorted(both))}: decided by address, program or path, so that is what can be "
            "asked for (network.ask, process.ask, filesystem.ask)"
        )


def compile_filter(architecture: str | None = None) -> bytes:
    """The program of the table as it is, without anything that a policy or a machine adds."""
    return find_table(architecture).compile()


def find_architecture(name: str | None = None) -> Architecture:
    """The entry for ``name``, or for this machine."""
    name = name or os.uname().machine
    try:
        return ARCHITECTURES[name]
    except KeyError:
        supported = ", ".join(ARCHITECTURES)
        raise WallError(STEP, f"there is no system-call table for {name!r}, only for {supported}") from None


def resolve(target: Architecture, names: set[str]) -> dict[str, int]:
    """The numbers of ``names`` on ``target``, without those that it does not have."""
    every_own = {name for table in OWN_NUMBERS.values() for name in table}
    numbers = {**COMMON_NUMBERS, **OWN_NUMBERS.get(target.name, {})}
    found = {name: numbers[name] for name in names & numbers.keys()}
    unknown = []
    for name in names - found.keys() - every_own:
        number = _libseccomp_number(target.token, name)
        if number >= 0:
            found[name] = number
        elif number == _NO_SUCH_CALL:  # other negative numbers say: exists, but not on this architecture
            unknown.append(name)
    if unknown:
        raise WallError(STEP, f"libseccomp does not know {', '.join(sorted(unknown))}: it is older than 2.5")
    return found


_NO_SUCH_CALL = -1  # __NR_SCMP_ERROR


class _Libseccomp:
    """The two functions of libseccomp that are used (seccomp_syscall_resolve_name(3))."""

    def __init__(self) -> None:
        try:
            library = ctypes.CDLL("libseccomp.so.2")
            self.number = library.seccomp_syscall_resolve_name_arch
            self.name = library.seccomp_syscall_resolve_num_arch
            self.free = ctypes.CDLL(None).free
        except (OSError, AttributeError) as error:
            detail = f"libseccomp.so.2 cannot be used ({error}); install it (Debian: libseccomp2)"
            raise WallError(STEP, detail) from None
        self.number.argtypes = (ctypes.c_uint32, ctypes.c_char_p)
        self.number.restype = ctypes.c_int
        self.name.argtypes = (ctypes.c_uint32, ctypes.c_int)
        self.name.restype = ctypes.c_void_p
        self.free.argtypes = (ctypes.c_void_p,)
        self.free.restype = None


@functools.cache
def _libseccomp() -> _Libseccomp:
    return _Libseccomp()


def _libseccomp_number(token: int, name: str) -> int:
    return int(_libseccomp().number(token, name.encode()))


def _libseccomp_name(token: int, number: int) -> str:
    """The name of a number, or ``""``."""
    library = _libseccomp()
    text = library.name(token, number)
    if not text:
        return ""
    try:
        return ctypes.string_at(text).decode("ascii", "replace")
    finally:
        library.free(text)


def assemble(
    target: Architecture, numbers: Mapping[str, int], notified: Mapping[str, Sequence[tuple[Condition, ...]]]
) -> bytes:
    """The program that notifies a call if one of its alternatives in ``notified`` holds, and allows other ``numbers``.

    What has no name is notified too.
    """
    program = Program()
    # An action is what a range of numbers leads to: a return value, or the name of a call with conditions.
    actions: dict[int, int | str] = {}
    blocks: dict[str, int] = {}
    for name, number in sorted(numbers.items(), key=lambda item: item[1]):
        if number in actions:
            raise WallError(STEP, f"{name} and another call have the same number {number} on {target.name}")
        alternatives = notified.get(name, ())
        if not alternatives:
            actions[number] = RET_ALLOW
        elif not all(alternatives):  # one has no conditions, so one always holds
            actions[number] = RET_USER_NOTIF
        else:
            actions[number] = name
            blocks[name] = program.any_holds(alternatives, RET_USER_NOTIF, RET_ALLOW)

    ranges = _merge(actions)
    start = program.search(ranges, blocks)
    if target.has_x32:
        # -1 is a number that tracers use; it is unnamed, not x32.
        not_x32_or_killed = program.test(
            JUMP_EQ, 0xFFFFFFFF, program.result(RET_USER_NOTIF), program.result(RET_KILL_PROCESS)
        )
        start = program.test(JUMP_GE, X32_BIT, not_x32_or_killed, start)
    start = program.then(LOAD, OFFSET_NUMBER, start)
    start = program.test(JUMP_EQ, target.token, start, program.result(RET_KILL_PROCESS))
    program.then(LOAD, OFFSET_ARCH, start)
    return program.encode()


def _merge(actions: Mapping[int, int | str]) -> list[tuple[int, int | str]]:
    """``(first number, action)`` of each run of numbers with the same action; the last run is endless."""
    ranges: list[tuple[int, int | str]] = []
    for number in range(max(actions) + 2):
        action = actions.get(number, RET_USER_NOTIF)
        if not ranges or ranges[-1][1] != action:
            ranges.append((number, action))
    return ranges
