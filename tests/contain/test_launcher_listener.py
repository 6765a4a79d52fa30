"""The launcher's side of the seccomp listener: who gets it, who holds it, and what a call sees that waits for it.

The filters here are made for the tests: they notify the calls that a test names and allow all others. What the
sandbox's own filter notifies, and how that is answered, is the supervisor's affair.
"""

from __future__ import annotations

import errno
import os
import pty
import select
import signal
import struct
import subprocess
import sys
import textwrap
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import suppress
from pathlib import Path

import pytest

from corral.sandbox import channel, launcher
from corral.sandbox.channel import EndReason, ReportType, Request
from corral.sandbox.limits import descendants
from corral.supervisor import listener as notify
from corral.supervisor.filter import find_architecture, resolve
from tests.contain.conftest import wait_until
from tests.contain.test_launcher import NOWHERE, PATIENCE, PYTHON, Launched, Walls, gone, read_until

LISTENER = "anon_inode:seccomp notify"
ALLOW, NOTIFY = 0x7FFF0000, 0x7FC00000
# The calls that the sandbox's own filter notifies, and two that it refuses.
DECIDED = ("connect", "bind", "listen", "sendmsg", "sendmmsg", "execve", "execveat", "setsid", "clone3", "bpf")


def numbers(*names: str) -> dict[str, int]:
    return resolve(find_architecture(), set(names))


def notifying(*names: str) -> bytes:
    """A filter that notifies these calls."""
    calls = list(numbers(*names).values())
    program = [(0x20, 0, 0, 0)]  # load the number
    program += [(0x15, len(calls) - i, 0, call) for i, call in enumerate(calls)]
    program += [(0x06, 0, 0, ALLOW), (0x06, 0, 0, NOTIFY)]
    return b"".join(struct.pack("<HBBI", *instruction) for instruction in program)


class Watched(Launched):
    """A sandbox whose listener the test holds."""

    listener: int

    def ready(self) -> Watched:
        self.expect(ReportType.READY)
        self.listener = self.expect(ReportType.LISTENER).fds[0]
        return self

    def notified(self) -> notify.Notification:
        """The next call that waits; it waits until it is answered."""
        until = time.monotonic() + PATIENCE
        while select.select([self.listener], [], [], max(0.0, until - time.monotonic()))[0]:
            if found := notify.receive(self.listener):
                return found
            # A signal came before the call was received: it begins anew, or its caller is gone.
        pytest.fail("no call is notified")

    def close_listener(self) -> None:
        self.fds.remove(self.listener)
        os.close(self.listener)


class NotifyingWalls(Walls):
    """Walls whose filter is the test's."""

    def __init__(self, program: bytes) -> None:
        self._program = program
        super().__init__()

    def lock(self) -> None:
        self.plan.filter(self._program)


def launch(*names: str) -> Watched:
    """A sandbox under a filter that notifies the calls of these names."""
    walls = NotifyingWalls(notifying(*names))
    try:
        return Watched(*launcher.launch(walls.plan.compile(), walls.identity.lease))
    finally:
        walls.identity.release()


Begin = Callable[..., Watched]


@pytest.fixture
def begin() -> Iterator[Begin]:
    """Starts sandboxes, and ends them with the test."""
    started: list[Watched] = []

    def start(*names: str) -> Watched:
        started.append(launch(*names))
        return started[-1].ready()

    yield start
    for one in started:
        one.close()


# ---- who has it ----


def test_the_controller_gets_the_listener(begin: Begin) -> None:
    sandbox = begin("getppid")
    assert os.readlink(f"/proc/self/fd/{sandbox.listener}") == LISTENER
    assert not os.get_inheritable(sandbox.listener)


def test_nobody_inside_has_the_listener(begin: Begin) -> None:
    sandbox = begin("getppid")
    code = """
        import os
        for fd in range(4096):
            try:
                print(fd, os.readlink(f"/proc/self/fd/{fd}"))
            except OSError:
                pass
    """
    assert LISTENER not in sandbox.python(code)
    if os.geteuid() == 0:  # an ordinary user cannot look at processes that are not dumpable
        assert links(sandbox.init).count(LISTENER) == 0
        assert links(sandbox.keeper).count(LISTENER) == 1


def links(pid: int) -> list[str]:
    return [os.readlink(f"/proc/{pid}/fd/{fd}") for fd in os.listdir(f"/proc/{pid}/fd")]


@pytest.mark.user
def test_the_first_process_is_not_dumpable_again(begin: Begin) -> None:
    """It has to be while its listener is taken; /proc then belongs to root (proc(5))."""
    sandbox = begin("getppid")
    sandbox.run("true")
    with pytest.raises(PermissionError):
        os.listdir(f"/proc/{sandbox.init}/fd")


# ---- calls that wait ----


def test_a_notified_call_returns_what_is_answered(begin: Begin) -> None:
    sandbox = begin("getppid")
    reader, writer = os.pipe()
    with open(reader, encoding="ascii") as output:
        number = sandbox.start([PYTHON, "-Sc", "import os; print(os.getppid())"], (None, writer, None))
        os.close(writer)
        call = sandbox.notified()
        assert call.number == numbers("getppid")["getppid"]
        assert not select.select([output], [], [], 0)[0]
        notify.answer(sandbox.listener, call.id, 4242, 0)
        assert output.read() == "4242\n"
    assert sandbox.exited(number).status == 0


ASKING = """
    import os
    os.write(1, b"up\\n")
    while True:
        os.getppid()
        os.write(1, b"answered\\n")
"""


def sleeps(pid: int) -> bool:
    return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] == "S"


def test_without_the_controllers_copy_calls_wait(begin: Begin) -> None:
    """The keeper's copy is there: none returns ENOSYS, neither one that waits already nor one that comes later."""
    sandbox = begin("getppid")
    reader, writer = os.pipe()
    with open(reader, encoding="ascii") as output:
        for _ in range(2):
            sandbox.start([PYTHON, "-Sc", textwrap.dedent(ASKING)], (None, writer, None))
            if sandbox.listener in sandbox.fds:
                sandbox.notified()
                sandbox.close_listener()
            assert output.readline() == "up\n"
        os.close(writer)
        assert wait_until(lambda: all(sleeps(pid) for pid in descendants(sandbox.init)), PATIENCE)
        assert sandbox.end() is EndReason.KILLED
        assert output.read() == ""


CONTROLLER = """
import os, signal, sys, textwrap
from tests.contain.test_launcher_listener import ASKING, PYTHON, launch

sandboxes = [launch("getppid").ready() for _ in range(int(sys.argv[1]))]
for sandbox in sandboxes:
    for _ in range(3):
        sandbox.start([PYTHON, "-Sc", textwrap.dedent(ASKING)], (None, 1, None))
    sandbox.notified()  # one is held, two wait
print(*(sandbox.keeper for sandbox in sandboxes), file=sys.stderr, flush=True)
sys.stdin.read()
"""


@pytest.mark.parametrize("end", [signal.SIGKILL, signal.SIGTERM, None])
def test_no_call_returns_when_the_controller_ends(end: signal.Signals | None) -> None:
    count = 10
    controller = subprocess.Popen(
        [sys.executable, "-c", CONTROLLER, str(count)],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        cwd=Path(__file__).resolve().parents[2],
        env=dict(os.environ, PYTHONPATH=os.pathsep.join(filter(None, sys.path))),
    )
    assert controller.stdin
    assert controller.stdout
    assert controller.stderr
    with controller.stdin, controller.stdout, controller.stderr:
        keepers = [int(pid) for pid in controller.stderr.readline().split()]
        assert len(keepers) == count
        assert [controller.stdout.readline() for _ in range(3 * count)] == ["up\n"] * 3 * count
        if end is None:
            controller.stdin.close()
        else:
            controller.send_signal(end)
        controller.wait(PATIENCE)
        assert controller.stdout.read() == ""  # its end: nobody is left inside
    assert wait_until(lambda: gone(*keepers), PATIENCE)


def test_a_signal_does_not_interrupt_a_call_that_is_held(begin: Begin) -> None:
    """WAIT_KILLABLE_RECV: each call is received once and returns its own answer.

    Until it is received a signal still interrupts it (seccomp_unotify(2)); SA_RESTART then makes it again.
    """
    sandbox = begin("getppid")
    code = """
        import os, signal
        came = 0
        def count(*_):
            global came
            came += 1
        signal.signal(signal.SIGALRM, count)
        signal.siginterrupt(signal.SIGALRM, False)
        signal.setitimer(signal.ITIMER_REAL, 0.002, 0.002)
        answers = [os.getppid() for _ in range(20)]
        signal.setitimer(signal.ITIMER_REAL, 0)
        print(answers == list(range(100, 120)), came >= 20)
    """
    reader, writer = os.pipe()
    number = sandbox.start([PYTHON, "-Sc", textwrap.dedent(code)], (None, writer, writer))
    os.close(writer)
    for turn in range(20):
        call = sandbox.notified()
        time.sleep(0.05)
        assert notify.is_waiting(sandbox.listener, call.id)
        notify.answer(sandbox.listener, call.id, 100 + turn, 0)
    with open(reader, encoding="ascii") as output:
        assert output.read() == "True True\n"
    assert sandbox.exited(number).status == 0


def test_a_call_that_is_held_dies_with_its_session(begin: Begin) -> None:
    sandbox = begin("getppid")
    number = sandbox.start([PYTHON, "-Sc", "import os; os.getppid()"])
    call = sandbox.notified()
    sandbox.request(Request.KILL_SESSION, number)
    assert sandbox.exited(number).status == signal.SIGKILL
    assert not notify.is_waiting(sandbox.listener, call.id)


# ---- what the launcher itself calls under the filter ----


@pytest.mark.parametrize("terminal", [False, True])
def test_setsid_says_which_exec_it_is(begin: Begin, terminal: bool) -> None:
    sandbox = begin("setsid")
    ends = pty.openpty()
    stdio = (ends[1],) * 3 if terminal else (None, None, None)
    try:
        for turn in range(1, 4):
            code = "import os; os.fork() or os.setsid(); os.wait()"
            number = sandbox.start([PYTHON, "-Sc", code], stdio, terminal=terminal)
            call = sandbox.notified()
            assert number == turn
            assert call.arguments[:2] == (channel.EXEC_SESSION_MARK, number)
            assert os.getsid(call.tid) == os.getsid(sandbox.init) == sandbox.keeper
            notify.proceed(sandbox.listener, call.id)
            agents = sandbox.notified()
            assert os.getsid(agents.tid) == call.tid
            notify.proceed(sandbox.listener, agents.id)
            os.kill(agents.tid, signal.SIGKILL)
            sandbox.request(Request.KILL_SESSION, number)
            sandbox.exited(number)
    finally:
        for fd in ends:
            os.close(fd)


class Answering(threading.Thread):
    """Lets every call go on, and remembers who made it."""

    def __init__(self, sandbox: Watched) -> None:
        super().__init__()
        self.seen: list[notify.Notification] = []
        self._listener = sandbox.listener
        self._wake, self._stop_now = os.pipe()

    def run(self) -> None:
        while True:
            ready = select.select([self._listener, self._wake], [], [])[0]
            if self._wake in ready:
                return
            call = notify.receive(self._listener)
            if call is not None:
                self.seen.append(call)
                notify.proceed(self._listener, call.id)

    def stop(self) -> list[notify.Notification]:
        os.close(self._stop_now)
        self.join()
        os.close(self._wake)
        return self.seen


def test_the_launcher_waits_for_no_answer_but_to_setsid_and_execve(begin: Begin) -> None:
    """The first process none at all: nobody may be there, and all would wait with it."""
    sandbox = begin(*DECIDED)
    init = sandbox.init
    master, inner = pty.openpty()
    thread = Answering(sandbox)
    thread.start()
    try:
        assert sandbox.run("echo", "alive") == "alive\n"
        assert sandbox.failed(sandbox.start([NOWHERE])) == ("exec", errno.ENOENT)
        assert sandbox.failed(sandbox.start(["true"], user=70000)) == ("user", errno.EINVAL)
        assert sandbox.failed(sandbox.start(["true"], terminal=True)) == ("controlling terminal", errno.ENOTTY)
        sandbox.request(Request.EXEC, 99, fds=[sandbox.control.fileno()] * 5)
        assert sandbox.failed(99) == ("request", errno.EMFILE)
        number = sandbox.start(["cat"], (inner, inner, inner), terminal=True)
        os.write(master, b"going\n")
        read_until(master, b"going\r\ngoing\r\n")
        sandbox.request(Request.STOP_ALL)
        assert {sandbox.expect(ReportType.STOPPED).id for _ in range(2)} == {0, number}
        sandbox.request(Request.CONTINUE_ALL)
        sandbox.request(Request.SIGNAL, number, signal.SIGTERM)
        assert sandbox.exited(number).status == signal.SIGTERM
        number = sandbox.start(["sleep", "600"])
        sandbox.request(Request.KILL_SESSION, number)
        assert sandbox.exited(number).status == signal.SIGKILL
    finally:
        seen = thread.stop()
        os.close(master)
        os.close(inner)
    assert not [call for call in seen if call.tid == init]
    assert {call.number for call in seen} == set(numbers("setsid", "execve").values())


# ---- where it cannot be had ----

REFUSING = """
import ctypes, struct, sys
from corral.sandbox.channel import ReportType
from tests.contain.test_launcher_listener import launch

class Program(ctypes.Structure):
    _fields_ = (("length", ctypes.c_ushort), ("instructions", ctypes.c_char_p))

call, argument, flags, result, own = map(int, sys.argv[1:])
program = [(0x20, 0, 0, 0), (0x15, 0, 3, call), (0x20, 0, 0, 16 + 8 * argument), (0x45, 0, 1, flags)]
program += [(0x06, 0, 0, result), (0x06, 0, 0, 0x7FFF0000)]
code = b"".join(struct.pack("<HBBI", *instruction) for instruction in program)
libc = ctypes.CDLL(None, use_errno=True)
assert libc.syscall(SECCOMP, 1, own, ctypes.byref(Program(len(program), code))) >= 0, ctypes.get_errno()
sandbox = launch("getppid")
for report in sandbox.rest():
    print(report.type.name, report.step, report.detail, report.error, report.status, sep="|")
sandbox.close()
"""


@pytest.mark.root
@pytest.mark.parametrize(
    ("call", "argument", "flags", "error", "own", "expected"),
    [
        ("seccomp", 1, 32, errno.EINVAL, 0,
         f"seccomp filter|a listener with WAIT_KILLABLE_RECV needs Linux 5.19|{errno.EINVAL}"),
        ("seccomp", 1, 8, errno.EPERM, 0, f"seccomp filter|install|{errno.EPERM}"),
        ("bpf", 0, 1, errno.EPERM, 8, f"seccomp filter|there is another listener already|{errno.EBUSY}"),
        ("pidfd_getfd", 1, 0xFFFFFFFF, errno.EPERM, 0, f"listener|take over|{errno.EPERM}"),
    ],
)  # fmt: skip
def test_no_start_without_a_listener(call: str, argument: int, flags: int, error: int, own: int, expected: str) -> None:
    """Under a filter that refuses it. As root, since `no_new_privs` would take the id map's helpers away."""
    found = numbers("seccomp", call)
    script = REFUSING.replace("SECCOMP", str(found["seccomp"]))
    arguments = (found[call], argument, flags, 0x00050000 | error, own)
    done = subprocess.run(
        [sys.executable, "-c", script, *map(str, arguments)],
        capture_output=True,
        text=True,
        check=True,
        timeout=PATIENCE,
        cwd=Path(__file__).resolve().parents[2],
        env=dict(os.environ, PYTHONPATH=os.pathsep.join(filter(None, sys.path))),
    )
    assert done.stdout.splitlines() == [
        "READY|||0|0",
        f"FAILED|{expected}|0",
        f"ENDED|||0|{EndReason.FAILED.value}",
    ]


def test_a_first_process_that_dies_while_it_starts() -> None:
    """Whenever it is killed, the controller has either both reports or a sandbox that has ended."""
    for _ in range(30):
        sandbox = launch("getppid")
        try:
            sandbox.expect(ReportType.READY)
            with suppress(ProcessLookupError, ValueError):
                os.kill(sandbox.init, signal.SIGKILL)
            assert [report.type for report in sandbox.rest()][-1:] == [ReportType.ENDED]
        finally:
            sandbox.close()
