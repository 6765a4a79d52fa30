"""No attempt is silent: every row of the table, tried inside, leaves a record with its name, errno and origin.

The calls are made from the table itself: registers are computed from a row's conditions, and whoever adds a row without
a record, or one that an earlier row hides, fails here.
"""

from __future__ import annotations

import itertools
import os
import re
from collections import Counter
from collections.abc import Iterable, Iterator, Sequence

import pytest

from corral.actions import Action, Decision, KernelCall, Kind, Socket, Subject, Verdict
from corral.policy.model import Filesystem, Network, Policy, Syscalls
from corral.sandbox import prepare as preparing
from corral.sandbox.box import Sandbox
from corral.supervisor.allowed import allowed_names
from corral.supervisor.filter import ARCHITECTURES, Class, Row, Table, find_table
from corral.supervisor.syscalls import (
    DECIDED,
    FIXED_PROCESSORS,
    REFUSALS,
    UNCOUNTED_MEMORY,
    WATCHED_FILES_REFUSALS,
    Condition,
    Refusal,
)
from tests.contain.attacks import numbers, users
from tests.contain.conftest import Compile, MakeBox

CALLER = r"""
#include <errno.h>
#include <signal.h>
#include <stdio.h>
#include <sys/syscall.h>
#include <unistd.h>
/* One call a line of standard input: number and six registers. One line of answer: result and errno. */
int main(void) {
    long number;
    unsigned long a[6];
    printf("%d\n", getpid());
    while (scanf("%li %lu %lu %lu %lu %lu %lu", &number, a, a + 1, a + 2, a + 3, a + 4, a + 5) == 7) {
        errno = 0;
        long result = syscall(number, a[0], a[1], a[2], a[3], a[4], a[5]);
        int error = errno;
        if (result == 0 && getpid() != (int)syscall(SYS_gettid))
            return 1;
        printf("%ld %d\n", result, result < 0 ? error : 0);
        fflush(stdout);
    }
}
"""
LIMIT = 200_000
"""Combinations of register values that are tried for one row."""
_HALF = 0xFFFFFFFF

Registers = tuple[int, ...]


def _holds(condition: Condition, half: int) -> bool:
    return (half & condition.mask in condition.values) is not condition.negated


def _values(conditions: Iterable[Condition]) -> list[int]:
    """Values of one half of a register for which all these conditions hold."""
    wanted = list(conditions)
    named = {value for condition in wanted for value in condition.values}
    tried = {0, _HALF, *named, *(value + 1 for value in named), *(1 << bit for bit in range(32))}
    return [value for value in sorted(tried) if all(_holds(condition, value) for condition in wanted)]


def registers(table: Table, number: int, row: Row) -> Registers | None:
    """Arguments for which the table finds this very row."""
    every = [condition for other in table._rows.get(row.name, ()) for condition in other.when]
    halves = sorted({(condition.argument, condition.high) for condition in every})
    choices = []
    for half in halves:
        own = [condition for condition in row.when if (condition.argument, condition.high) == half]
        choices.append(_values(own) if own else _values(c for c in every if (c.argument, c.high) == half) or [0])
        if not own:
            choices[-1] = sorted({0, *choices[-1], *_values([])})
    for values in itertools.islice(itertools.product(*choices), LIMIT):
        arguments = [0] * 6
        for (argument, high), value in zip(halves, values, strict=True):
            arguments[argument] |= value << 32 if high else value
        if table.find(number, arguments) is row:
            return tuple(arguments)
    return None


def refused_rows(table: Table) -> Iterator[tuple[int, Row, Registers | None]]:
    """Every refused row of the table that has a number on this machine, with a call for it."""
    for name, number in sorted(table._numbers.items()):
        for row in table._rows.get(name, ()):
            if row.kind is Class.REFUSED:
                yield number, row, registers(table, number, row)


def expected(row: Row, arguments: Registers) -> tuple[Kind, Subject]:
    """What the record must be about."""
    low = [value & _HALF for value in arguments]
    if row.name in ("socket", "socketpair") and not row.quiet:
        return Kind.NET_SOCKET, Socket(low[0], low[1], low[2])
    return Kind.KERNEL, KernelCall(row.name, row.errno, row.reason, row.quiet)


async def make_calls(
    box: Sandbox, program: str, calls: Sequence[tuple[int, Registers]], user: str = "agent"
) -> tuple[int, list[tuple[int, int]], list[Decision]]:
    """The caller's number inside, what it got, and the new records of its exec."""
    before = len(box.core.supervision.recent.all())
    lines = "".join(f"{number} {' '.join(map(str, arguments))}\n" for number, arguments in calls)
    result = await box.exec([program], stdin=lines.encode(), timeout=60, user=user)
    assert result.exit_code == 0, (result.exit_code, result.stdout[-500:], result.stderr[-500:])
    pid, *answers = result.text.split("\n")[:-1]
    box.core.supervision.flush()
    return (
        int(pid),
        [(int(line.split()[0]), int(line.split()[1])) for line in answers],
        [one for one in box.core.supervision.recent.all()[before:] if one.action.kind is not Kind.PROCESS_EXEC],
    )


def count(decisions: Iterable[Decision]) -> Counter[tuple[Kind, Subject]]:
    found: Counter[tuple[Kind, Subject]] = Counter()
    for one in decisions:
        found[one.action.kind, one.action.subject] += one.count
    return found


@pytest.fixture
def every_refusal(monkeypatch: pytest.MonkeyPatch) -> None:
    """Also those that only some machines and policies need."""
    monkeypatch.setattr(preparing, "refusals_for", lambda *_: (*FIXED_PROCESSORS, *UNCOUNTED_MEMORY))


def named(rows: Iterable[Refusal]) -> Counter[tuple[str, int, str]]:
    return Counter((row.name, row.errno, row.reason) for row in rows)


@pytest.mark.usefixtures("every_refusal")
async def test_every_refused_call_of_the_table_is_recorded(make_box: MakeBox, compile_c: Compile) -> None:
    """Of every row: the errno that it names, and a record with its name, its reason and whose it was."""
    box = await make_box(
        policy=Policy(filesystem=Filesystem(watch=("/nowhere/**",)), syscalls=Syscalls(deny=("nice",)))
    )
    program = compile_c(CALLER, "caller")
    table = box.core.prepared.table
    rows = list(refused_rows(table))
    # Nothing of the lists is missing, but what this machine's architecture does not have.
    lists = (*REFUSALS, *FIXED_PROCESSORS, *UNCOUNTED_MEMORY, *WATCHED_FILES_REFUSALS)
    here = Counter((row.name, row.errno, row.reason) for _, row, _ in rows)
    missing = {name for name, _, _ in named(lists) - here}
    assert missing <= {refusal.name for refusal in lists} - table._numbers.keys()
    assert not any(name in table._numbers for name in missing)
    assert len(rows) > 90
    hidden = [row for _, row, arguments in rows if arguments is None]
    assert not hidden, "no call can reach these rows, as earlier ones match all that they do"

    calls = [(number, arguments) for number, _, arguments in rows if arguments is not None]
    for user in users(box):
        pid, answers, decisions = await make_calls(box, program, calls, user)
        assert len(answers) == len(calls)
        for (_, row, arguments), answer in zip(rows, answers, strict=True):
            assert answer == (-1, row.errno), (row, arguments, answer)
        wanted = Counter(expected(row, arguments) for _, row, arguments in rows if arguments is not None)
        assert count(decisions) == wanted
        for one in decisions:
            check_origin(box, one, pid, program)


def check_origin(box: Sandbox, one: Decision, pid: int, program: str) -> None:
    origin, process = one.action.origin, one.action.origin.process
    assert one.verdict is Verdict.DENY and not one.allowed
    assert (origin.sandbox, origin.session, origin.exec) == (box.id, box.id, box.core._next - 1)
    assert process is not None
    assert (process.inner_pid, process.exe, process.argv) == (pid, program, (program,))
    assert process.pid > 0 and process.started > 0
    assert one.number > 0 and one.at > 0 and one.rule and one.reason


UNFILTERED = (335, 336)
"""uretprobe and uprobe: on x86-64 the kernel takes them past every filter, as a program that is probed from outside has
them put in; from anywhere else they change nothing (seccomp_uprobe_exception() in the kernel)."""
GAPS = (512, 547, 600, 777, 1000, 1023, 1024, 2000, 0x3FFFFFFF)


async def test_calls_without_a_name_are_recorded_too(box: Sandbox, compile_c: Compile) -> None:
    """Numbers that no table names get ENOSYS. What no kernel has shares one name, so that a name cannot be a flood."""
    program = compile_c(CALLER, "caller")
    table = box.core.prepared.table
    known = set(table._numbers.values())
    unnamed = [number for number in range(500) if number not in known and number not in UNFILTERED]
    calls = [(number, (1, 2, 3, 4, 5, 6)) for number in (*unnamed, *GAPS, -1)]
    pid, answers, decisions = await make_calls(box, program, calls)
    assert set(answers) == {(-1, 38)}
    rows = [table.find(number, arguments) for number, arguments in calls]
    assert {row.errno for row in rows} == {38}
    assert count(decisions) == Counter(expected(row, (0,) * 6) for row in rows)
    for one in decisions:
        check_origin(box, one, pid, program)
    names = {one.action.name for one in decisions}
    assert {"kernel.unknown call 600", "kernel.unknown call 1023", "kernel.unknown call"} <= names
    assert "kernel.unknown call 2000" not in names


@pytest.mark.skipif(os.uname().machine != "x86_64", reason="other machines have no second ABI of this kind")
@pytest.mark.parametrize("number", [0x40000000 + 1, 0x40000000 + 165])
async def test_a_foreign_abi_ends_its_process(box: Sandbox, compile_c: Compile, number: int) -> None:
    assert ARCHITECTURES["x86_64"].has_x32
    result = await box.exec([compile_c(CALLER, "caller")], stdin=f"{number} 0 0 0 0 0 0\n".encode())
    assert result.exit_code == 128 + 31


async def test_what_a_policy_refuses_by_name_is_recorded(make_box: MakeBox, compile_c: Compile) -> None:
    box = await make_box(policy=Policy(syscalls=Syscalls(deny=("getpriority", "sysinfo"))))
    known = numbers("getpriority", "sysinfo")
    calls = [(number, (0,) * 6) for number in known.values()]
    program = compile_c(CALLER, "caller")
    pid, answers, decisions = await make_calls(box, program, calls)
    assert answers == [(-1, 1)] * 2
    assert [one.action.name for one in decisions] == [f"kernel.{name}" for name in known]
    assert [one.rule for one in decisions] == [
        f"syscalls.deny[{('getpriority', 'sysinfo').index(name)}]" for name in known
    ]
    for one in decisions:
        check_origin(box, one, pid, program)


# What is decided, not refused. Each is tried in a way that has an outcome; the record names the kind of action.
DECIDE = r"""
#include <arpa/inet.h>
#include <errno.h>
#include <fcntl.h>
#include <stdio.h>
#include <string.h>
#include <sys/socket.h>
#include <sys/syscall.h>
#include <sys/un.h>
#include <sys/wait.h>
#include <unistd.h>
static void tell(const char *what, long result) { printf("%s %d\n", what, result < 0 ? errno : 0); fflush(stdout); }
int main(void) {
    struct sockaddr_in there = {AF_INET, htons(9), {inet_addr("192.0.2.1")}};
    struct sockaddr_in here = {AF_INET, htons(7000), {inet_addr("127.0.0.1")}};
    struct iovec part = {"x", 1};
    struct msghdr message = {&there, sizeof there, &part, 1};
    struct mmsghdr messages[1] = {{message}};
    char *argv[] = {"/bin/true", NULL}, *none[] = {NULL};
    int tcp = socket(AF_INET, SOCK_STREAM, 0), udp = socket(AF_INET, SOCK_DGRAM, 0);
    tell("connect", connect(tcp, (void *)&there, sizeof there));
    tell("sendto", sendto(udp, "x", 1, 0, (void *)&there, sizeof there));
    tell("sendmsg", sendmsg(udp, &message, 0));
    tell("sendmmsg", sendmmsg(udp, messages, 1, 0));
    tell("bind", bind(tcp, (void *)&here, sizeof here));
    tell("listen", listen(tcp, 1));
    if (vfork() == 0) { execve(argv[0], argv, none); _exit(1); }
    wait(NULL);
    int file = open("/bin/true", O_PATH);
    if (vfork() == 0) { syscall(SYS_execveat, file, "", argv, none, AT_EMPTY_PATH); _exit(1); }
    int status;
    wait(&status);
    tell("execveat", status ? -1 : 0);
}
"""


async def test_every_decided_call_of_the_table_is_recorded(make_box: MakeBox, compile_c: Compile) -> None:
    tried = {"connect", "sendto", "sendmsg", "sendmmsg", "bind", "listen", "execve", "execveat"}
    # setsid is no action: it says by itself whose process this is from now on (test_attribution.py).
    # The limit of core dumps is kept as it is, which is no action either (test_vectors_kernel.py).
    assert {row.name for row in DECIDED} == tried | {"setsid", "setrlimit", "prlimit64"}
    box = await make_box(policy=Policy(network=Network(listen=Verdict.DENY)))
    program = compile_c(DECIDE, "decide")
    result = await box.exec([program], check=True)
    refused = {"connect", "sendto", "sendmsg", "sendmmsg", "bind", "listen"}
    answers = {line.split()[0]: int(line.split()[1]) for line in result.text.splitlines()}
    assert answers == {**dict.fromkeys(refused, 13), "execveat": 0}
    decisions = [one for one in box.core.supervision.recent.all() if one.action.origin.exec == 1]
    kinds = Counter(one.action.kind for one in decisions)
    assert kinds == {
        Kind.NET_CONNECT: 1,
        Kind.NET_SEND: 3,
        Kind.NET_BIND: 1,
        Kind.NET_LISTEN: 1,
        Kind.PROCESS_EXEC: 3,  # this program itself, too
    }
    for one in decisions:
        assert one.allowed is (one.action.kind is Kind.PROCESS_EXEC)
        assert one.action.origin.process is not None


async def test_no_number_is_free_that_the_table_does_not_name(box: Sandbox, compile_c: Compile) -> None:
    """The kernel's view of the same: whatever a program may call without a record is a name of the allow-list."""
    table = box.core.prepared.table
    free = {name for name in table._numbers if not any(not row.when for row in table._rows.get(name, ()))}
    assert free <= allowed_names()
    assert not free & {row.name for row in REFUSALS if not row.when}


def test_registers_are_found_for_every_row_on_every_architecture() -> None:
    for architecture in ARCHITECTURES:
        table = find_table(architecture, also=(*FIXED_PROCESSORS, *UNCOUNTED_MEMORY), watched=True)
        for number, row, arguments in refused_rows(table):
            assert arguments is not None, row
            assert table.find(number, arguments) == row


async def test_a_record_says_who_and_what_and_why(box: Sandbox, compile_c: Compile) -> None:
    """One record, whole: nothing of it is left empty."""
    program = compile_c(CALLER, "caller")
    mount = numbers("mount")["mount"]
    pid, _, (one,) = await make_calls(box, program, [(mount, (0,) * 6)])
    check_origin(box, one, pid, program)
    assert isinstance(one.action, Action)
    assert (one.action.name, one.decider, one.rule, one.count, one.held) == ("kernel.mount", "policy", "syscalls", 1, 0)
    assert re.search(r"mount is refused here: the mounts are the file walls", one.reason)
