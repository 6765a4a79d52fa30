"""The seccomp program without a kernel: its table, its instructions, and other ways to say the same."""

from __future__ import annotations

import ctypes
import errno
import functools
import os
import subprocess
import sys
from pathlib import Path
from typing import NamedTuple

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from corral.errors import RequestError, WallError
from corral.supervisor import filter as seccomp_filter
from corral.supervisor import syscalls
from corral.supervisor.allowed import ALLOWED, OBSOLETE, allowed_names
from corral.supervisor.filter import (
    RET_ALLOW,
    RET_KILL_PROCESS,
    RET_USER_NOTIF,
    Class,
    Row,
    Table,
    compile_filter,
    find_architecture,
    find_table,
)
from corral.supervisor.syscalls import (
    DECIDED,
    FIXED_PROCESSORS,
    MOVED_DIRECTORIES,
    REFUSALS,
    UNCOUNTED_MEMORY,
    WATCHED_FILES,
    WATCHED_FILES_REFUSALS,
    Condition,
    Decided,
    Refusal,
)
from tests.unit.filter_probe import CONDITIONAL, HERE, holds, interpret, numbers

ALSO = (*UNCOUNTED_MEMORY, *FIXED_PROCESSORS)
EVERY_REFUSAL = (*REFUSALS, *ALSO, *WATCHED_FILES_REFUSALS)
EVERY_DECIDED: tuple[Decided, ...] = (*DECIDED, *WATCHED_FILES)
EVERY_ROW: tuple[Refusal | Decided, ...] = (*EVERY_REFUSAL, *EVERY_DECIDED)

# --- the table -------------------------------------------------------------------------------------------------------


def test_every_row_has_a_reason() -> None:
    for reason in (*(row.reason for row in EVERY_ROW), *(group.reason for group in ALLOWED)):
        assert len(reason.split()) >= 3, reason


def test_no_row_is_redundant_or_contradicts_another() -> None:
    always = [row.name for row in REFUSALS if not row.when]
    allowed = [name for group in ALLOWED for name in group.names.split()]
    conditional = {row.name for row in REFUSALS if row.when}
    assert len(always) == len(set(always))
    assert len(allowed) == len(set(allowed))
    assert len(REFUSALS) == len(set(REFUSALS))
    assert not set(always) & set(allowed)
    assert conditional <= set(allowed)
    assert not OBSOLETE & (set(always) | set(allowed))
    decided = [row.name for row in EVERY_DECIDED if not row.when]
    assert len(decided) == len(set(decided))
    assert {row.name for row in EVERY_DECIDED} <= set(allowed)
    assert {row.name for row in (*ALSO, *WATCHED_FILES_REFUSALS)} <= set(allowed)
    assert not {row.name for row in WATCHED_FILES_REFUSALS} & {row.name for row in EVERY_DECIDED}
    assert not {row.name for row in (*WATCHED_FILES, *MOVED_DIRECTORIES)} & {row.name for row in DECIDED}
    watched = {row.name for row in WATCHED_FILES} | {row.name for row in WATCHED_FILES_REFUSALS}
    assert {row.name for row in MOVED_DIRECTORIES} <= watched & set(allowed)


def test_what_an_agent_may_have_wanted_is_never_quiet() -> None:
    quiet = {row.name for row in EVERY_REFUSAL if row.quiet}
    assert quiet == {
        *"clone3 memfd_create shmget io_uring_setup io_uring_enter io_uring_register setsockopt socket".split(),
        *"personality sched_setaffinity kcmp name_to_handle_at".split(),
        *(row.name for row in WATCHED_FILES_REFUSALS),
    }
    of_sockets = {(row.errno, row.when) for row in REFUSALS if row.quiet and row.name in ("socket", "setsockopt")}
    assert len(of_sockets) == 3
    told = {(40, 1, 0), (38, 5, 0), (17, 3, 0), (16, 3, 12), (16, 3, 6), (2, 3, 1), (2, 2, 1), (2, 1, 132), (2, 1, 256)}
    for arguments in told:
        assert not find_table().find(numbers()["socket"], (*arguments, 0, 0, 0)).quiet, arguments
    for arguments in {(2, 1, 262), (10, 1, 262), *((16, 3, protocol) for protocol in (4, 7, 9, 15, 16))}:
        assert find_table().find(numbers()["socket"], (*arguments, 0, 0, 0)).quiet, arguments


def by_name_on_paths() -> set[str]:
    group = next(group for group in ALLOWED if group.reason.startswith("names files"))
    return {*group.names.split(), "truncate", "execve", "execveat", "connect", "bind", "inotify_add_watch"}


def test_every_call_that_names_files_was_judged_for_watched_ones() -> None:
    """A new call with a path in it must not go past a policy that watches files without a word here."""
    judged = {row.name for row in EVERY_DECIDED} | {row.name for row in WATCHED_FILES_REFUSALS}
    only_looked_at = {
        *"access faccessat faccessat2 stat fstat lstat newfstatat statx statfs fstatfs statmount listmount".split(),
        *"getdents getdents64 getcwd chdir fchdir readlink readlinkat umask file_getattr".split(),
        *"getxattr lgetxattr fgetxattr getxattrat listxattr llistxattr flistxattr listxattrat".split(),
        *"inotify_init inotify_init1 inotify_add_watch inotify_rm_watch".split(),
    }
    # See WATCHED_FILES for why; flags of file_setattr are as harmless without capabilities.
    harmless = {*"mkdir mkdirat chown fchown fchownat lchown utime utimes futimesat utimensat file_setattr".split()}
    assert by_name_on_paths() - judged == only_looked_at | harmless


@pytest.mark.parametrize("architecture", seccomp_filter.ARCHITECTURES)
def test_every_call_that_libseccomp_knows_was_judged(architecture: str) -> None:
    library = ctypes.CDLL("libseccomp.so.2")
    library.seccomp_syscall_resolve_num_arch.restype = ctypes.c_char_p
    token = ctypes.c_uint32(find_architecture(architecture).token)
    known = {
        library.seccomp_syscall_resolve_num_arch(token, number).decode(): number
        for number in (*range(335), *range(424, 470))
        if library.seccomp_syscall_resolve_num_arch(token, number)
    }
    assert len(known) > 300
    assert known.keys() <= numbers(architecture).keys() | OBSOLETE
    # Also proves the numbers that the table gives itself, as far as libseccomp knows them.
    assert {name: number for name, number in known.items() if name not in OBSOLETE}.items() <= numbers(
        architecture
    ).items()


def test_own_numbers_agree_with_the_headers() -> None:
    found = {}
    for header in (Path("/usr/include/asm-generic/unistd.h"), *Path("/usr/include").glob("*/asm/unistd_64.h")):
        for line in header.read_text().splitlines() if header.exists() else ():
            word, *rest = line.split() or [""]
            if word == "#define" and len(rest) == 2 and rest[0].startswith("__NR_") and rest[1].isdigit():
                found[rest[0][5:]] = int(rest[1])
    common = syscalls.COMMON_NUMBERS
    # Newer than most headers; from Linux 6.17's scripts/syscall.tbl.
    newer = {"statmount": 457, "listmount": 458, "lsm_get_self_attr": 459, "lsm_set_self_attr": 460}
    newer |= {"lsm_list_modules": 461, "mseal": 462, "setxattrat": 463, "getxattrat": 464, "listxattrat": 465}
    newer |= {"removexattrat": 466, "open_tree_attr": 467, "file_getattr": 468, "file_setattr": 469}
    assert {name: number for name, number in common.items() if number >= 457} == newer
    assert {name: number for name, number in found.items() if name in common}.items() <= common.items()


# --- the program ---


class Configuration(NamedTuple):
    """Arguments of find_table, and the rows that they mean."""

    also: tuple[Refusal, ...] = ()
    asked: tuple[str, ...] = ()
    denied: tuple[str, ...] = ()
    watched: bool = False

    def table(self, architecture: str) -> Table:
        return find_table(architecture, also=self.also, asked=self.asked, denied=self.denied, watched=self.watched)

    def rows(self) -> list[tuple[Class, Refusal | Decided]]:
        decided = (*DECIDED, *(WATCHED_FILES if self.watched else MOVED_DIRECTORIES))
        refused = (*REFUSALS, *self.also, *(WATCHED_FILES_REFUSALS if self.watched else ()))
        return [
            *((Class.REFUSED, row) for row in refused),
            *((Class.REFUSED, Refusal(name, errno.EPERM, "the policy refuses it")) for name in self.denied),
            *((Class.ASKED, Refusal(name, errno.EPERM, "the policy asks for it")) for name in self.asked),
            *((Class.DECIDED, row) for row in decided),
        ]


CONFIGURATIONS = (
    Configuration(),
    Configuration(ALSO, watched=True),
    Configuration(
        asked=("socket", "prctl", "read", "mount", "renameat2"), denied=("socketpair", "sendto", "io_submit", "uselib")
    ),
    Configuration(ALSO, ("shmget", "mq_open"), ("openat", "execve", "ioctl", "setxattr"), watched=True),
)


@functools.cache
def names(architecture: str) -> dict[int, str]:
    return {number: name for name, number in numbers(architecture).items()}


def expected(
    configuration: Configuration, architecture: str, number: int, arguments: tuple[int, ...]
) -> tuple[int, Row | None]:
    """The table's meaning, said once more and in another way than the compiler and the judge do."""
    number &= 0xFFFFFFFF
    if architecture == "x86_64" and 0x40000000 <= number < 0xFFFFFFFF:
        return RET_KILL_PROCESS, None
    name = names(architecture).get(number)
    if name is None:
        return RET_USER_NOTIF, Row("", Class.REFUSED, errno.ENOSYS, "", quiet=True)
    for kind, row in configuration.rows():
        if row.name == name and all(holds(condition, arguments) for condition in row.when):
            quiet = isinstance(row, Refusal) and row.quiet
            return RET_USER_NOTIF, Row(name, kind, row.errno, row.reason, quiet)
    assert name in allowed_names()
    return RET_ALLOW, None


def check(configuration: Configuration, architecture: str, number: int, arguments: tuple[int, ...]) -> None:
    """Program and judge both say what the table does."""
    table = configuration.table(architecture)
    action, row = expected(configuration, architecture, number, arguments)
    assert interpret(table.compile(), number, arguments, table.target.token) == action, number
    found = table.find(number, arguments)
    if row is None:  # nobody is told of it; whoever asks all the same gets no
        assert found.kind is Class.REFUSED, number
    elif row.name:
        assert found[:5] == row[:5], number
    else:
        assert (found.kind, found.errno, found.quiet) == (row.kind, row.errno, row.quiet), number


MENTIONED = sorted({v for row in EVERY_ROW for c in row.when for value in c.values for v in (value, c.mask)})
WORDS = st.one_of(
    st.sampled_from(MENTIONED),
    st.integers(0, 70),
    st.builds(lambda base, bit: base ^ (1 << bit), st.sampled_from(MENTIONED), st.integers(0, 63)),
    st.builds(lambda high, low: high << 32 | low, st.sampled_from(MENTIONED), st.sampled_from(MENTIONED)),
    st.integers(0, 2**64 - 1),
)


@pytest.mark.parametrize("architecture", seccomp_filter.ARCHITECTURES)
@settings(max_examples=1500, deadline=None)
@given(data=st.data())
def test_program_and_judge_equal_the_table(architecture: str, data: st.DataObject) -> None:
    tried = [*CONDITIONAL, "shmget", "sched_setaffinity", "openat", "setxattr", "prctl"]
    conditional = [numbers(architecture)[name] for name in tried if name in numbers(architecture)]
    number = data.draw(st.one_of(st.sampled_from(conditional), st.integers(0, 500), st.integers(0, 2**32 - 1)))
    arguments = tuple(data.draw(st.lists(WORDS, min_size=6, max_size=6)))
    check(data.draw(st.sampled_from(CONFIGURATIONS)), architecture, number, arguments)


@pytest.mark.parametrize("configuration", CONFIGURATIONS)
@pytest.mark.parametrize("architecture", seccomp_filter.ARCHITECTURES)
def test_program_and_judge_equal_the_table_for_every_number(architecture: str, configuration: Configuration) -> None:
    edges = (1023, 1024, 2047, -1, -2, 0x3FFFFFFF, 0x40000000, 0x40000027, 0x7FFFFFFF, 0x80000000)
    for number in (*range(600), *edges):
        for arguments in ((0,) * 6, (2**64 - 1,) * 6):
            check(configuration, architecture, number, arguments)


@pytest.mark.parametrize("configuration", CONFIGURATIONS)
@pytest.mark.parametrize("architecture", seccomp_filter.ARCHITECTURES)
def test_free_calls_cost_nothing(architecture: str, configuration: Configuration) -> None:
    """The kernel skips the program for numbers of which it is clear without arguments that they are allowed."""
    table = configuration.table(architecture)
    assert len(table.compile()) // 8 <= 512  # BPF_MAXINSNS is 4096
    with_rows = {row.name for _, row in configuration.rows()}
    free = {name: number for name, number in numbers(architecture).items() if name not in with_rows}
    assert len(free) > 200
    for name, number in free.items():
        assert interpret(table.compile(), number, None, table.target.token) == RET_ALLOW, name


def test_often_used_calls_are_free_without_a_policy_that_watches() -> None:
    program = find_table().compile()
    often = "read write close mmap munmap futex openat open stat newfstatat lseek getdents64 recvfrom recvmsg accept4"
    for name in (*often.split(), *"epoll_wait poll fcntl dup wait4 exit_group rt_sigaction brk mprotect".split()):
        if name in numbers():
            assert interpret(program, numbers()[name], None, HERE.token) == RET_ALLOW, name


def test_sendto_is_decided_by_both_halves_of_its_address() -> None:
    table, number = find_table(), numbers()["sendto"]
    for address in (0, *(1 << bit for bit in range(64))):
        for flags in (0, 0x20000000):  # MSG_FASTOPEN
            arguments = (1, 2, 3, flags, address, 0)
            action = interpret(table.compile(), number, arguments, HERE.token)
            assert action == (RET_USER_NOTIF if address else RET_ALLOW)
            assert table.find(number, arguments).kind is (Class.DECIDED if address else Class.REFUSED)


def test_numbers_without_a_name_are_told_apart_but_not_without_end() -> None:
    table, unset = find_table("x86_64"), (0,) * 6
    assert table.find(134, unset).name == "uselib"
    assert table.find(500, unset).name == "unknown call 500"
    assert {table.find(number, unset).name for number in (1024, 99999, 2**31, 2**32 - 1, -1, -5)} == {"unknown call"}
    assert len({table.find(number, unset) for number in range(5000)}) < 1025 + len(numbers("x86_64"))


def test_names_of_a_policy() -> None:
    for name in ("no_such_call", "", "ptrace\0x", "ptraceé", "pid fd", "unknown call 500"):
        for how in ("asked", "denied"):
            with pytest.raises(RequestError, match="there is no system call"):
                find_table(**{how: (name,)})
    for name in ("connect", "setsid", "sendto"):  # would go on by themselves, undecided
        with pytest.raises(RequestError, match=rf"syscalls.ask: {name}"):
            find_table(asked=("prctl", name))
    find_table(asked=("openat",))
    with pytest.raises(RequestError, match=r"syscalls.ask: openat"):
        find_table(asked=("openat",), watched=True)
    # What the table refuses, and what is both asked for and denied, stays refused.
    table = find_table("aarch64", asked=("mount", "uselib", "open", "prctl"), denied=("prctl", "connect", "open"))
    for name, code in (("mount", errno.EPERM), ("prctl", errno.EPERM), ("connect", errno.EPERM)):
        row = table.find(numbers("aarch64")[name], (0,) * 6)
        assert (row.name, row.kind, row.errno) == (name, Class.REFUSED, code)


@pytest.mark.parametrize("architecture", seccomp_filter.ARCHITECTURES)
def test_other_architectures_are_killed(architecture: str) -> None:
    own = find_architecture(architecture).token
    foreign = {0xC000003E, 0xC00000B7, 0x40000003, 0x40000028, 0xC00000F3, 0, 0xFFFFFFFF, own ^ 1} - {own}
    for token in foreign:
        for number in (0, 39, 172, 500, 0x40000027):
            assert interpret(compile_filter(architecture), number, (), token) == RET_KILL_PROCESS


def test_program_equals_libseccomps_own_where_it_can_say_the_same() -> None:
    """An independent compiler, given the rows without conditions."""
    library = ctypes.CDLL("libseccomp.so.2")
    library.seccomp_init.restype = ctypes.c_void_p
    context = ctypes.c_void_p(library.seccomp_init(ctypes.c_uint32(RET_USER_NOTIF)))
    with_rows = {row.name for _, row in Configuration().rows()}
    for name, number in numbers().items():
        if name not in with_rows:
            assert library.seccomp_rule_add_array(context, ctypes.c_uint32(RET_ALLOW), number, 0, None) == 0
    memory = os.memfd_create("filter")
    assert library.seccomp_export_bpf(context, memory) == 0
    theirs = os.pread(memory, 1 << 16, 0)
    os.close(memory)
    library.seccomp_release(context)
    skipped = {numbers()[name] for name in CONDITIONAL if name in numbers()}
    tried = [number for number in (*range(600), -1, 0x40000000, 0x40000027) if number not in skipped]
    for number in tried:
        kill = {0: RET_KILL_PROCESS}  # libseccomp kills the thread by default, Corral the process
        answer = interpret(theirs, number, (), HERE.token)
        assert interpret(compile_filter(), number, (), HERE.token) == kill.get(answer, answer), number


def test_far_jumps_stay_correct() -> None:
    """A program much larger than a conditional jump's reach of 255 instructions."""
    calls = {f"call{index}": 2 * index for index in range(400)}
    rows = [
        Row(f"call{index}", Class.REFUSED, 100 + index, "", when=(Condition(index % 6, (index, 7 * index + 1)),))
        for index in range(400)
    ]
    table = Table(HERE, calls, rows)
    program = table.compile()
    assert 255 * 8 * 4 < len(program) <= 4096 * 8
    for index in range(400):
        hit = tuple(index if position == index % 6 else 0 for position in range(6))
        assert interpret(program, 2 * index, hit, HERE.token) == RET_USER_NOTIF
        assert table.find(2 * index, hit).errno == 100 + index
        assert interpret(program, 2 * index, (99999,) * 6, HERE.token) == RET_ALLOW
        assert interpret(program, 2 * index + 1, hit, HERE.token) == RET_USER_NOTIF


def test_result_is_the_same_in_a_fresh_process() -> None:
    script = "import sys; from corral.supervisor.filter import compile_filter; print(compile_filter(sys.argv[1]).hex())"
    for architecture in seccomp_filter.ARCHITECTURES:
        for seed in ("1", "2"):
            environment = {**os.environ, "PYTHONHASHSEED": seed, "PYTHONPATH": os.pathsep.join(sys.path)}
            command = [sys.executable, "-c", script, architecture]
            fresh = subprocess.run(command, env=environment, capture_output=True, text=True, check=True)
            assert bytes.fromhex(fresh.stdout) == compile_filter(architecture)
    assert compile_filter() is compile_filter()


def test_faults_name_the_step(monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(WallError, match=r"seccomp filter.*riscv64"):
        find_architecture("riscv64")
    with pytest.raises(WallError, match="does not know no_such_call"):
        seccomp_filter.resolve(HERE, {"no_such_call"})
    with pytest.raises(WallError, match="the same number"):
        Table(HERE, {"one": 1, "two": 1}, []).compile()

    def absent(name: str) -> ctypes.CDLL:
        raise OSError(f"{name}: cannot open shared object file")

    monkeypatch.setattr(ctypes, "CDLL", absent)
    seccomp_filter._libseccomp.cache_clear()
    with pytest.raises(WallError, match=r"seccomp filter.*libseccomp\.so\.2.*install") as caught:
        seccomp_filter.resolve(HERE, {"read"})
    assert caught.value.step == "seccomp filter"
