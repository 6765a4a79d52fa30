"""The launcher alone, driven over its socket with hand-made plans: no policy, no view, no event loop in between.

What is tested here are its promises (src/launcher/*.h): it applies a plan whole or not at all and says which step
failed; its PID 1 serves whatever is asked of it and survives what is not a request; and however keeper, PID 1 or
controller end, nothing is left.
"""

from __future__ import annotations

import array
import errno
import os
import pty
import resource
import select
import shutil
import signal
import socket
import stat
import struct
import subprocess
import sys
import textwrap
import time
from collections import deque
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import suppress
from pathlib import Path

import pytest

from corral.sandbox import cgroups, channel, launcher, paths
from corral.sandbox.channel import EndReason, Report, ReportType, Request
from corral.sandbox.identity import make_identity
from corral.sandbox.limits import descendants
from corral.sandbox.plan import Attribute, IdLine, Idmap, Lower, Map, Origin, Plan
from tests.contain.conftest import wait_until

USER = 1000
PYTHON = "/usr/bin/python3"
ENVIRONMENT = {"PATH": "/usr/bin:/bin", "LANG": "C.UTF-8"}
PATIENCE = 20.0  # how long anything may take that this machine merely has to get round to
SOURCES = Path(__file__).resolve().parents[2] / "src" / "launcher"

# A filter that notifies nobody: what the sandbox's own one would ask, no supervisor is here to answer.
ALLOW = struct.pack("<HBBI", 0x06, 0, 0, 0x7FFF0000)

Spoil = Callable[[Plan], None]


def nothing(plan: Plan) -> None:
    """Leaves a plan as it is."""


class Walls:
    """A small plan with every kind of wall. Each part can be changed or left out by the name of its method."""

    ORDER = ("outside", "tree", "special", "enter", "inside", "lock")

    def __init__(self, **changes: Spoil) -> None:
        assert changes.keys() <= set(self.ORDER)
        runtime = paths.runtime_directory() if os.geteuid() == 0 else ""
        self.identity = make_identity(USER, runtime)
        self.plan = Plan()
        self.identity.write(self.plan)
        for name in self.ORDER:
            getattr(self, name)()
            changes.get(name, nothing)(self.plan)

    def outside(self) -> None:
        if self.identity.privileged:
            self.plan.prepare_outside()

    def tree(self) -> None:
        owner = USER if not self.identity.has(0) else 0
        self.plan.layer(64 << 20, 4096)
        self.plan.layer_directory("tmp", 0o1777, owner, owner)
        self.plan.root(1 << 20, 256)
        for path in ("/usr", "/proc", "/dev", "/dev/pts", "/tmp"):
            self.plan.directory(path)
        for name in ("bin", "lib", "lib64"):
            if os.path.islink(f"/{name}"):
                self.plan.symlink(os.readlink(f"/{name}"), f"/{name}")
        self.plan.bind("/usr", "/usr", attributes=Attribute.READ_ONLY)
        self.plan.bind("tmp", "/tmp", origin=Origin.LAYER)
        for name in ("null", "tty"):
            self.plan.file(f"/dev/{name}")
            self.plan.bind(f"/dev/{name}", f"/dev/{name}", attributes=Attribute.DEVICES)

    def special(self) -> None:
        self.plan.devpts("/dev/pts", "newinstance,ptmxmode=0666")
        self.plan.proc("/proc", "hidepid=2")
        self.plan.sysctl("user/max_user_namespaces", "0")

    def enter(self) -> None:
        self.plan.seal_root()
        self.plan.pivot()

    def inside(self) -> None:
        self.plan.hostname("walls")
        self.plan.loopback()

    def lock(self) -> None:
        self.plan.filter(ALLOW)


class Launched:
    """One keeper and what it says."""

    def __init__(self, control: socket.socket, keeper: int) -> None:
        self.control, self.keeper = control, keeper
        self.control.settimeout(PATIENCE)
        self.fds: list[int] = []
        self.status: int | None = None
        self._early: deque[Report] = deque()
        self._null = os.open(os.devnull, os.O_RDWR)
        self._number = 0

    # ---- reports ----

    def report(self) -> Report | None:
        """The next report; its descriptors are kept."""
        if self._early:
            return self._early.popleft()
        try:
            found = channel.receive_report(self.control)
        except ConnectionResetError:  # it ended without reading all that was sent
            return None
        if found:
            self.fds += found.fds
        return found

    def _read_report(self) -> None:
        readable, writable, _ = select.select([self.control], [self.control], [], PATIENCE)
        assert readable or writable, "the launcher neither reads nor writes"
        if readable and (found := channel.receive_report(self.control)):
            self._early.append(found)

    def expect(self, wanted: ReportType) -> Report:
        found = self.report()
        assert found is not None, f"the stream ended before {wanted!r}"
        assert found.type is wanted, found
        return found

    def rest(self) -> list[Report]:
        """Everything up to the end of the stream."""
        return list(iter(self.report, None))

    def ready(self) -> Launched:
        self.expect(ReportType.READY)
        self.expect(ReportType.LISTENER)
        return self

    # ---- requests ----

    def send(self, content: bytes, fds: Sequence[int] = ()) -> None:
        rights = [(socket.SOL_SOCKET, socket.SCM_RIGHTS, array.array("i", fds))] if fds else []
        while not select.select([], [self.control], [], 0)[1]:
            self._read_report()  # PID 1 reads no more requests while its reports are not read
        self.control.sendmsg([content], rights, socket.MSG_NOSIGNAL)

    def request(self, request: int, number: int = 0, argument: int = 0, fds: Sequence[int] = ()) -> None:
        self.send(struct.pack("<IIII", request, number, argument, 0), fds)

    def start_payload(self, payload: int, stdio: Sequence[int | None] = (None, None, None)) -> int:
        self._number += 1
        fds = [self._null if fd is None else fd for fd in stdio]
        self.request(Request.EXEC, self._number, fds=(payload, *fds))
        return self._number

    def start(
        self,
        argv: Sequence[str],
        stdio: Sequence[int | None] = (None, None, None),
        *,
        env: Mapping[str, str] = ENVIRONMENT,
        directory: str = "/",
        user: int = USER,
        terminal: bool = False,
    ) -> int:
        content = channel.encode_exec(argv, env, directory, user, user, terminal=terminal)
        payload = channel.sealed_memfd("test", content)
        try:
            return self.start_payload(payload, stdio)
        finally:
            os.close(payload)

    def exited(self, number: int) -> Report:
        found = self.expect(ReportType.EXITED)
        assert found.id == number
        return found

    def failed(self, number: int) -> tuple[str, int]:
        """The stage and errno of an exec that could not be started."""
        found = self.expect(ReportType.EXEC_FAILED)
        assert found.id == number
        assert os.waitstatus_to_exitcode(self.exited(number).status) == 127
        return found.step, found.error

    def run(self, *argv: str, env: Mapping[str, str] = ENVIRONMENT) -> str:
        """Runs a command that must succeed and returns its output."""
        reader, writer = os.pipe()
        try:
            number = self.start(argv, (None, writer, writer), env=env)
        finally:
            os.close(writer)
        with open(reader, encoding="utf-8") as output:
            text = output.read()
        assert self.exited(number).status == 0, text
        return text

    def python(self, code: str, *arguments: str) -> str:
        return self.run(PYTHON, "-Sc", textwrap.dedent(code), *arguments)

    # ---- processes ----

    @property
    def init(self) -> int:
        """The host's pid of the sandbox's PID 1."""
        (found,) = Path(f"/proc/{self.keeper}/task/{self.keeper}/children").read_text().split()
        return int(found)

    def wait(self) -> int:
        """Reaps the keeper and returns its wait status."""
        if self.status is None:
            pidfd = os.pidfd_open(self.keeper)
            try:
                assert select.select([pidfd], [], [], PATIENCE)[0], "the keeper does not end"
            finally:
                os.close(pidfd)
            self.status = os.waitpid(self.keeper, 0)[1]
        return self.status

    def end(self) -> EndReason:
        """Kills the sandbox, and returns the reason that its last report gives."""
        os.kill(self.keeper, signal.SIGTERM)
        return self.ended()

    def ended(self) -> EndReason:
        reports = self.rest()
        self.wait()
        assert reports, "the stream ended without a report"
        assert reports[-1].type is ReportType.ENDED
        return EndReason(reports[-1].status)

    def close(self) -> None:
        self.control.close()
        for fd in (self._null, *self.fds):
            os.close(fd)
        self.fds = []
        if self.status is None:
            with suppress(ProcessLookupError):
                os.kill(self.keeper, signal.SIGCONT)
                os.kill(self.keeper, signal.SIGTERM)
            self.wait()


Start = Callable[..., Launched]


@pytest.fixture
def start() -> Iterator[Start]:
    """Launches hand-made walls, or the bytes of a plan."""
    launched: list[Launched] = []

    def begin(plan: bytes | None = None, **changes: Spoil) -> Launched:
        if plan is not None:
            found = Launched(*launcher.launch(plan))
        else:
            walls = Walls(**changes)
            try:
                found = Launched(*launcher.launch(walls.plan.compile(), walls.identity.lease))
            finally:
                walls.identity.release()
        launched.append(found)
        return found

    yield begin
    for one in launched:
        one.close()


@pytest.fixture
def sandbox(start: Start) -> Launched:
    """Walls that stand."""
    return start().ready()


@pytest.fixture
def spawn() -> Iterator[Callable[[], Launched]]:
    """A launcher that has not been told anything yet."""
    launched: list[Launched] = []

    def begin() -> Launched:
        ours, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        with theirs:
            os.set_inheritable(theirs.fileno(), True)
            actions = [(os.POSIX_SPAWN_DUP2, theirs.fileno(), channel.CONTROL_FD)]
            keeper = os.posix_spawn(launcher.launcher_path(), ["corral-launcher"], {}, file_actions=actions)
        launched.append(Launched(ours, keeper))
        return launched[-1]

    yield begin
    for one in launched:
        one.close()


def gone(*pids: int) -> bool:
    """Whether none of these processes runs any more; a zombie does not."""
    for pid in pids:
        with suppress(OSError):
            if Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] not in "ZX":
                return False
    return True


# ---- before there are walls ----


def test_without_a_controller_it_says_what_it_is() -> None:
    done = subprocess.run([launcher.launcher_path()], capture_output=True, text=True, check=False, timeout=PATIENCE)
    assert done.returncode == 2
    assert "corral --help" in done.stderr


def test_socket_closed_before_the_plan(spawn: Callable[[], Launched]) -> None:
    quiet = spawn()
    quiet.control.shutdown(socket.SHUT_WR)
    assert quiet.rest() == []
    assert os.waitstatus_to_exitcode(quiet.wait()) == 1


def test_unsealed_plan_is_refused(spawn: Callable[[], Launched]) -> None:
    fresh = spawn()
    walls = Walls()
    fd = os.memfd_create("plan", os.MFD_CLOEXEC | os.MFD_ALLOW_SEALING)
    pidfd = os.pidfd_open(os.getpid())
    try:
        os.write(fd, walls.plan.compile())
        fresh.request(Request.PLAN, fds=(fd, pidfd))
    finally:
        os.close(fd)
        os.close(pidfd)
        walls.identity.release()
    report = fresh.expect(ReportType.FAILED)
    assert (report.step, report.detail, report.error) == ("plan", "the plan is not sealed", errno.EPROTO)
    assert fresh.rest() == []
    fresh.wait()


@pytest.mark.parametrize(
    ("request_type", "count"), [(Request.EXEC, 2), (Request.SIGNAL, 0), (Request.PLAN, 1), (77, 3)]
)
def test_first_message_must_be_a_plan(spawn: Callable[[], Launched], request_type: int, count: int) -> None:
    fresh = spawn()
    fresh.request(request_type, fds=[fresh.control.fileno()] * count)
    report = fresh.expect(ReportType.FAILED)
    assert (report.step, report.detail, report.error) == ("plan", "not the first message", errno.EPROTO)
    assert fresh.rest() == []
    fresh.wait()


@pytest.mark.parametrize("content", [b"x", b"x" * 4096])
def test_first_message_of_another_size_ends_it(spawn: Callable[[], Launched], content: bytes) -> None:
    fresh = spawn()
    fresh.send(content)
    assert fresh.rest() == []
    assert os.waitstatus_to_exitcode(fresh.wait()) == 1


@pytest.mark.parametrize(
    ("plan", "detail"),
    [
        (b"nonsense", "plan: not a plan of this version"),
        (Plan().compile(), "plan: no id maps"),
        (Plan().compile() + b"x", "plan: wrong length or too many steps"),
    ],
)
def test_malformed_plan_is_refused(start: Start, plan: bytes, detail: str) -> None:
    refused = start(plan)
    report = refused.expect(ReportType.FAILED)
    assert (report.step, report.detail, report.error) == ("plan", detail, errno.EPROTO)
    assert refused.rest() == []
    refused.wait()


NOWHERE = "/nowhere/at/all"
FAILING: list[tuple[str, Spoil, str, str, int]] = [
    ("outside", lambda plan: plan.cgroup(2, "/tmp", []), "cgroup", "/tmp", errno.EEXIST),
    ("outside", lambda plan: plan.cgroup(2, NOWHERE, []), "cgroup", NOWHERE, errno.ENOENT),
    ("tree", lambda plan: plan.bind(NOWHERE, "/usr"), "bind", NOWHERE, errno.ENOENT),
    ("tree", lambda plan: plan.bind("/usr", NOWHERE), "bind", NOWHERE, errno.ENOENT),
    ("tree", lambda plan: plan.bind("/usr", "/usr", idmap=Idmap.WORKSPACE), "bind", "/usr", errno.EINVAL),
    ("tree", lambda plan: plan.bind("none", "/tmp", origin=Origin.LAYER), "bind", "/tmp", errno.ENOENT),
    ("tree", lambda plan: plan.overlay("/usr", "u", "w", [Lower(NOWHERE)]), "overlay", NOWHERE, errno.ENOENT),
    ("tree", lambda plan: plan.overlay("/usr", "u", "w", [Lower("/usr")]), "overlay", "/usr", errno.ENOENT),
    ("tree", lambda plan: plan.layer_directory("tmp", 0o755, USER, USER), "layer directory", "tmp", errno.EEXIST),
    ("tree", lambda plan: plan.directory(f"{NOWHERE}/x"), "directory", f"{NOWHERE}/x", errno.ENOENT),
    ("tree", lambda plan: plan.symlink("a", "/usr"), "symlink", "/usr", errno.EEXIST),
    ("tree", lambda plan: plan.file("/dev/null", b"x"), "file", "/dev/null", errno.EEXIST),
    ("special", lambda plan: plan.proc("/proc", "nonsense=1"), "proc", "/proc", errno.EINVAL),
    ("special", lambda plan: plan.devpts(NOWHERE, ""), "devpts", NOWHERE, errno.ENOENT),
    ("special", lambda plan: plan.mqueue(NOWHERE), "mqueue", NOWHERE, errno.ENOENT),
    ("special", lambda plan: plan.sysctl("user/nothing", "0"), "sysctl", "user/nothing", errno.ENOENT),
    ("inside", lambda plan: plan.hostname("x" * 65), "hostname", "x" * 65, errno.EINVAL),
    ("inside", lambda plan: plan.listen("nonsense", 80), "listen", "nonsense", errno.EINVAL),
    ("inside", lambda plan: plan.listen("192.0.2.1", 80), "listen", "192.0.2.1", errno.EADDRNOTAVAIL),
    ("inside", lambda plan: plan.rlimit(999, 1), "rlimit", "", errno.EINVAL),
    ("inside", lambda plan: plan.affinity([1023]), "affinity", "", errno.EINVAL),
    ("inside", lambda plan: plan.landlock(1, 0, 0, [(1, NOWHERE)]), "landlock", NOWHERE, errno.ENOENT),
    ("lock", lambda plan: plan.filter(ALLOW), "seccomp filter", "", errno.EEXIST),
]


@pytest.mark.parametrize(
    ("part", "spoil", "step", "detail", "error"),
    FAILING,
    ids=[f"{row[2]}-{row[4]}-{i}" for i, row in enumerate(FAILING)],
)
def test_failing_step_is_named(start: Start, part: str, spoil: Spoil, step: str, detail: str, error: int) -> None:
    broken = start(**{part: spoil})
    report = broken.expect(ReportType.FAILED)
    assert (report.step, report.detail, report.error) == (step, detail, error)
    assert broken.ended() is EndReason.FAILED


def test_refused_id_map_is_named(start: Start) -> None:
    plan = Plan()
    for which in (Map.SANDBOX_UID, Map.SANDBOX_GID):
        plan.id_map(which, [IdLine(0, 0, 1), IdLine(0, 1, 1)])  # not even root may map the same id twice
    broken = start(plan.compile())
    report = broken.expect(ReportType.FAILED)
    assert (report.step, report.detail) == ("id map", "gid_map")
    assert report.error in (errno.EINVAL, errno.EPERM)
    assert broken.ended() is EndReason.FAILED


@pytest.mark.parametrize(
    ("part", "detail"),
    [
        ("lock", "the plan has no seccomp filter"),
        ("enter", "the plan keeps the host's root"),
        ("special", "the plan has no proc"),
    ],
)
def test_no_sandbox_without_its_walls(start: Start, monkeypatch: pytest.MonkeyPatch, part: str, detail: str) -> None:
    monkeypatch.setattr(Walls, part, nothing)
    broken = start()
    report = broken.expect(ReportType.FAILED)
    assert (report.step, report.detail, report.error) == ("plan", detail, errno.EINVAL)
    assert broken.ended() is EndReason.FAILED


def test_filter_that_is_no_program_is_refused(start: Start, monkeypatch: pytest.MonkeyPatch) -> None:
    """READY is sent before it; without LISTENER that is no start."""
    monkeypatch.setattr(Walls, "lock", lambda walls: walls.plan.filter(bytes(8)))
    broken = start()
    broken.expect(ReportType.READY)
    report = broken.expect(ReportType.FAILED)
    assert (report.step, report.detail, report.error) == ("seccomp filter", "install", errno.EINVAL)
    assert broken.ended() is EndReason.FAILED


# ---- ready ----


def test_ready_hands_out_root_layer_and_listeners(start: Start) -> None:
    def listeners(plan: Plan) -> None:
        plan.listen("127.0.0.1", 80)
        plan.listen("::1", 443)

    sandbox = start(inside=listeners)
    report = sandbox.expect(ReportType.READY)
    sandbox.expect(ReportType.LISTENER)
    root, layer, *listening = report.fds
    assert {"usr", "proc", "dev", "tmp"} <= set(os.listdir(f"/proc/self/fd/{root}"))
    assert os.listdir(layer) == ["tmp"]
    names = []
    for fd in listening:
        with socket.socket(fileno=os.dup(fd)) as listener:
            names.append(listener.getsockname()[:2])
    assert names == [("127.0.0.1", 80), ("::1", 443)]
    code = """
        import socket
        socket.create_connection(("127.0.0.1", 80)).sendall(b"from inside")
    """
    sandbox.python(code)
    with socket.socket(fileno=os.dup(listening[0])) as listener:
        connection, _ = listener.accept()
        with connection:
            assert connection.recv(64) == b"from inside"


def test_nothing_is_inherited(start: Start, tmp_path: Path) -> None:
    secret = os.open(tmp_path, os.O_RDONLY)
    os.set_inheritable(secret, True)
    try:
        sandbox = start().ready()
        code = """
            import errno, os
            def opened(fd):
                try:
                    os.fstat(fd)
                except OSError:
                    return False
                return True
            print([fd for fd in range(4096) if opened(fd)])
        """
        assert sandbox.python(code) == "[0, 1, 2]\n"
    finally:
        os.close(secret)
    assert sandbox.run("/usr/bin/env", env={"ONLY": "this", "é": "ü"}) == "ONLY=this\né=ü\n"
    assert sandbox.run("/usr/bin/env", env={}) == ""
    status = dict(line.split(":\t") for line in sandbox.run("cat", "/proc/self/status").splitlines())
    assert [int(status[name], 16) for name in ("SigBlk", "SigIgn", "SigPnd", "ShdPnd")] == [0, 0, 0, 0]
    assert [int(status[name], 16) for name in ("CapInh", "CapPrm", "CapEff", "CapBnd", "CapAmb")] == [0, 0, 0, 0, 0]
    assert status["NoNewPrivs"] == "1"
    assert status["Seccomp"] == "2"


def test_a_terminal_leader_holds_nothing_either(sandbox: Launched) -> None:
    """It is the agent's own user and executes nothing, so close-on-exec does not help it."""
    if os.geteuid() != 0:
        pytest.skip("only root can look at a process that is not dumpable")
    master, terminal = pty.openpty()
    number = sandbox.start(["sleep", "60"], (terminal, terminal, terminal), terminal=True)
    try:
        assert wait_until(lambda: len(descendants(sandbox.init)) == 2)
        leader = int(Path(f"/proc/{sandbox.init}/task/{sandbox.init}/children").read_text())
        assert wait_until(lambda: os.listdir(f"/proc/{leader}/fd") == ["0", "1", "2"])
        sandbox.request(Request.KILL_SESSION, number)
        sandbox.exited(number)
    finally:
        os.close(master)
        os.close(terminal)


def test_caller_that_ignores_sigchld(start: Start) -> None:
    before = signal.signal(signal.SIGCHLD, signal.SIG_IGN)
    try:
        sandbox = start()
    finally:
        signal.signal(signal.SIGCHLD, before)
    assert sandbox.ready().run("sh", "-c", "echo done") == "done\n"
    assert sandbox.end() is EndReason.KILLED


# ---- execs that fail ----


@pytest.mark.parametrize("count", [0, 1, 3, 5, 200])
def test_exec_with_a_wrong_number_of_descriptors(sandbox: Launched, count: int) -> None:
    sandbox.request(Request.EXEC, 9, fds=[sandbox.control.fileno()] * count)
    stage, error = sandbox.failed(9)
    assert stage == "request"
    assert error == (errno.EMFILE if count > 4 else errno.EPROTO)
    assert sandbox.run("echo", "alive") == "alive\n"


def test_exec_whose_descriptors_do_not_fit_is_answered(start: Start) -> None:
    """An agent with PID 1's user id can lower its limits (prlimit(2)); then requests fail, but none is lost."""
    sandbox = start(inside=lambda plan: plan.rlimit(resource.RLIMIT_NOFILE, 7)).ready()
    assert sandbox.failed(sandbox.start(["true"])) == ("request", errno.EMFILE)
    assert sandbox.end() is EndReason.KILLED


def test_exec_with_a_payload_that_can_change(sandbox: Launched) -> None:
    content = channel.encode_exec(["true"], {}, "/", USER, USER)
    for flags in (os.MFD_CLOEXEC, os.MFD_CLOEXEC | os.MFD_ALLOW_SEALING):
        payload = os.memfd_create("test", flags)
        os.write(payload, content)
        assert sandbox.failed(sandbox.start_payload(payload)) == ("request", errno.EPROTO)
        os.close(payload)
    reader, writer = os.pipe()
    assert sandbox.failed(sandbox.start_payload(reader)) == ("request", errno.EPROTO)
    os.close(reader)
    os.close(writer)


@pytest.mark.parametrize("content", [b"x", b"CRLEXEC1" + bytes(64), b"x" * (1 << 16)])
def test_exec_with_a_malformed_payload(sandbox: Launched, content: bytes) -> None:
    payload = channel.sealed_memfd("test", content)
    assert sandbox.failed(sandbox.start_payload(payload)) == ("request", errno.EPROTO)
    os.close(payload)
    assert sandbox.run("echo", "alive") == "alive\n"


def test_exec_that_cannot_be(sandbox: Launched) -> None:
    assert sandbox.failed(sandbox.start(["true"], user=70000)) == ("user", errno.EINVAL)
    assert sandbox.failed(sandbox.start(["true"], directory=NOWHERE)) == ("directory", errno.ENOENT)
    assert sandbox.failed(sandbox.start(["true"], directory="/dev/null")) == ("directory", errno.ENOTDIR)
    assert sandbox.failed(sandbox.start([NOWHERE])) == ("exec", errno.ENOENT)
    assert sandbox.failed(sandbox.start(["no-such-program"])) == ("exec", errno.ENOENT)
    assert sandbox.failed(sandbox.start(["/usr"])) == ("exec", errno.EACCES)
    assert sandbox.failed(sandbox.start(["/dev/null"])) == ("exec", errno.EACCES)
    assert sandbox.failed(sandbox.start(["echo", "x" * (1 << 20)])) == ("exec", errno.E2BIG)
    assert sandbox.failed(sandbox.start(["true"], terminal=True)) == ("controlling terminal", errno.ENOTTY)
    assert sandbox.run("echo", "alive") == "alive\n"


def test_directory_as_stdio_is_refused(sandbox: Launched, tmp_path: Path) -> None:
    """With a directory of the host as standard input, `..` would lead to all others."""
    for flags in (os.O_RDONLY, os.O_PATH):
        fd = os.open(tmp_path, flags)
        for place in range(3):
            stdio: list[int | None] = [None, None, None]
            stdio[place] = fd
            assert sandbox.failed(sandbox.start(["true"], stdio)) == ("stdio", errno.EISDIR)
        os.close(fd)


def test_more_execs_than_there_is_room_for(sandbox: Launched) -> None:
    numbers = [sandbox.start(["sleep", "600"]) for _ in range(1024)]
    for _ in range(6):
        assert sandbox.failed(sandbox.start(["true"])) == ("too many commands at once", errno.EAGAIN)
    for number in numbers:
        sandbox.request(Request.SIGNAL, number, signal.SIGKILL)
    reports = [sandbox.expect(ReportType.EXITED) for _ in numbers]
    assert {report.id for report in reports} == set(numbers)
    assert {report.status for report in reports} == {signal.SIGKILL}
    assert sandbox.run("echo", "alive") == "alive\n"


def test_a_controller_that_reads_late_misses_nothing(sandbox: Launched) -> None:
    """More failures than the socket holds: each is still told before its exit."""
    numbers = {sandbox.start([NOWHERE]) for _ in range(900)}
    time.sleep(0.3)
    failed: set[int] = set()
    exited: set[int] = set()
    while len(exited) < len(numbers):
        report = sandbox.report()
        assert report is not None
        if report.type is ReportType.EXEC_FAILED:
            failed.add(report.id)
        else:
            assert report.type is ReportType.EXITED
            assert report.id in failed
            exited.add(report.id)
    assert failed == exited == numbers


# ---- what PID 1 survives ----


def test_garbage_on_the_socket(start: Start) -> None:
    """Under a limit of 40 descriptors, so that one that stayed open for each message would be noticed."""
    sandbox = start(inside=lambda plan: plan.rlimit(resource.RLIMIT_NOFILE, 40)).ready()
    fds = [sandbox.control.fileno()] * 4
    for _ in range(50):
        sandbox.send(b"x")
        sandbox.send(b"x" * 15, fds)
        sandbox.send(b"x" * 65536, fds)
        sandbox.send(b"", fds)  # without descriptors this would be the end of the stream
        for request_type in (0, Request.PLAN, 99, 0xFFFFFFFF, ReportType.READY):
            sandbox.request(request_type, 1, 9, fds)
        for request_type in (Request.SIGNAL, Request.KILL_SESSION):
            sandbox.request(request_type, 12345, signal.SIGKILL, fds)
    assert sandbox.run("echo", "alive") == "alive\n"


def test_signals_from_inside_do_not_reach_pid_1(sandbox: Launched) -> None:
    code = """
        import os, signal
        for number in set(signal.Signals) | set(range(34, 65)):
            for send in (os.kill, lambda pid, number: signal.pidfd_send_signal(os.pidfd_open(pid), number)):
                try:
                    send(1, number)
                except OSError:
                    pass
    """
    sandbox.python(code)
    assert sandbox.run("echo", "alive") == "alive\n"


def test_pid_1_cannot_be_looked_into(sandbox: Launched) -> None:
    code = """
        import os
        for name in ("mem", "fd", "environ", "maps", "exe", "cwd", "root", "task", "ns/net", "stat"):
            try:
                os.stat(f"/proc/1/{name}")
            except FileNotFoundError:
                continue
            print("visible:", name)
        print([name for name in os.listdir("/proc") if name == "1"])
    """
    assert sandbox.python(code) == "[]\n"


# ---- status and signals ----


def test_wait_status_and_usage(sandbox: Launched) -> None:
    for script, status in (("exit 7", 7 << 8), ("kill -TERM $$", signal.SIGTERM), ("kill -KILL $$", signal.SIGKILL)):
        assert sandbox.exited(sandbox.start(["sh", "-c", script])).status == status
    code = "import time; data = b'x' * 50_000_000\nwhile time.process_time() < 0.2: pass"
    usage = sandbox.exited(sandbox.start([PYTHON, "-Sc", code])).usage
    assert 0.2 <= usage.user_seconds + usage.system_seconds < PATIENCE
    assert 50_000_000 < usage.max_rss < 500_000_000
    assert usage.minor_faults > 1000
    waited = sandbox.exited(sandbox.start(["sh", "-c", f'{PYTHON} -Sc "{code}"; true'])).usage
    assert waited.user_seconds + waited.system_seconds >= 0.2


def test_orphans_are_reaped(sandbox: Launched) -> None:
    code = """
        import os
        for _ in range(3000):
            if os.fork() == 0:
                if os.fork() == 0:
                    os._exit(0)
                os._exit(0)
            os.wait()
    """
    sandbox.python(code)
    assert wait_until(lambda: descendants(sandbox.init) == [])
    assert sandbox.run("echo", "alive") == "alive\n"


def test_signal_reaches_the_group(sandbox: Launched) -> None:
    reader, writer = os.pipe()
    child = "trap 'echo child; exit' TERM; echo up; sleep 60 >/dev/null & wait"
    script = f"trap 'echo parent; exit 3' TERM; ({child}) & wait; wait"
    number = sandbox.start(["sh", "-c", script], (None, writer, None))
    os.close(writer)
    with open(reader, encoding="ascii") as output:
        assert output.readline() == "up\n"
        for ignored in (0, 64, 1 << 31):
            sandbox.request(Request.SIGNAL, number, ignored)
        sandbox.request(Request.SIGNAL, number, signal.SIGTERM)
        assert set(output.read().split()) == {"parent", "child"}
    assert os.waitstatus_to_exitcode(sandbox.exited(number).status) == 3
    sandbox.request(Request.SIGNAL, number, signal.SIGTERM)  # too late: nothing happens
    assert sandbox.run("echo", "alive") == "alive\n"


def test_kill_session_finds_all_of_it(sandbox: Launched) -> None:
    """Also what left the process group, is of another parent, or made itself invisible in /proc (hidepid)."""
    code = """
        import ctypes, os, sys, time
        def child(action):
            if os.fork() == 0:
                action()
                print("up", flush=True)
                time.sleep(600)
        child(lambda: None)
        child(lambda: os.setpgid(0, 0))
        child(lambda: ctypes.CDLL(None).prctl(4, 0, 0, 0, 0))
        child(lambda: os.fork() and os._exit(0))
        child(lambda: os.setsid())
        time.sleep(600)
    """
    reader, writer = os.pipe()
    number = sandbox.start([PYTHON, "-Sc", textwrap.dedent(code)], (None, writer, None))
    os.close(writer)
    with open(reader, encoding="ascii") as output:
        assert [output.readline() for _ in range(5)] == ["up\n"] * 5
        sandbox.request(Request.KILL_SESSION, number)
        assert sandbox.exited(number).status == signal.SIGKILL
        assert wait_until(lambda: len(descendants(sandbox.init)) == 1), "only who made a session of its own may live"
    assert sandbox.run("echo", "alive") == "alive\n"


def test_kill_session_outruns_a_fork_bomb(start: Start) -> None:
    sandbox = start(inside=lambda plan: plan.rlimit(resource.RLIMIT_NPROC, 200)).ready()
    code = """
        import os
        while True:
            try:
                os.fork()
            except OSError:
                pass
    """
    number = sandbox.start([PYTHON, "-Sc", textwrap.dedent(code)])
    assert wait_until(lambda: len(descendants(sandbox.init)) > 50, PATIENCE)
    sandbox.request(Request.KILL_SESSION, number)
    assert sandbox.exited(number).status == signal.SIGKILL
    assert wait_until(lambda: descendants(sandbox.init) == [], PATIENCE)


def test_stop_all_and_continue_all(sandbox: Launched) -> None:
    master, terminal = pty.openpty()
    numbers = [
        sandbox.start(["cat"], (terminal, terminal, terminal), terminal=True),
        sandbox.start(["sleep", "600"]),
    ]
    try:
        for turn in range(10):
            sandbox.request(Request.STOP_ALL)
            # In any order: that it is done, and what it has done.
            reports = [sandbox.expect(ReportType.STOPPED) for _ in (0, *numbers)]
            assert {report.id: report.status for report in reports} == {0: 0} | dict.fromkeys(numbers, signal.SIGSTOP)
            sandbox.request(Request.CONTINUE_ALL)
            os.write(master, b"%d\n" % turn)
            seen = b""
            while seen.count(b"%d\r\n" % turn) < 2:  # the terminal's echo and cat's
                assert select.select([master], [], [], PATIENCE)[0], "the terminal's command does not go on"
                seen += os.read(master, 100)
        for number in numbers:
            sandbox.request(Request.KILL_SESSION, number)
        assert {sandbox.expect(ReportType.EXITED).id for _ in numbers} == set(numbers)
    finally:
        os.close(master)
        os.close(terminal)


# ---- terminals ----


@pytest.fixture
def terminal() -> Iterator[tuple[int, int]]:
    """Both ends of a terminal: the person's and the command's."""
    ends = pty.openpty()
    yield ends
    for fd in ends:
        os.close(fd)


def read_until(fd: int, wanted: bytes) -> bytes:
    seen = b""
    while wanted not in seen:
        assert select.select([fd], [], [], PATIENCE)[0], f"{wanted!r} does not come, only {seen!r}"
        seen += os.read(fd, 4096)
    return seen


def test_terminal_stops_and_goes_on(sandbox: Launched, terminal: tuple[int, int]) -> None:
    master, inner = terminal
    number = sandbox.start(["cat"], (inner, inner, inner), terminal=True)
    for _ in range(5):
        os.write(master, b"going\n")
        read_until(master, b"going\r\ngoing\r\n")  # the terminal's echo, and cat's
        os.write(master, b"\x1a")  # Ctrl-Z
        report = sandbox.expect(ReportType.STOPPED)
        assert (report.id, report.status) == (number, signal.SIGSTOP)
        sandbox.request(Request.SIGNAL, number, signal.SIGCONT)
    os.write(master, b"going\n")
    read_until(master, b"going\r\ngoing\r\n")
    os.write(master, b"\x03")  # Ctrl-C
    assert sandbox.exited(number).status == signal.SIGINT


@pytest.mark.parametrize(
    ("script", "status"), [("exit 9", 9 << 8), ("kill -TERM $$", signal.SIGTERM), ("kill -ABRT $$", signal.SIGABRT)]
)
def test_terminal_leader_ends_as_its_command(
    sandbox: Launched, terminal: tuple[int, int], script: str, status: int
) -> None:
    number = sandbox.start(["sh", "-c", script], (terminal[1],) * 3, terminal=True)
    assert sandbox.exited(number).status == status


def test_terminal_command_that_is_not_there(sandbox: Launched, terminal: tuple[int, int]) -> None:
    assert sandbox.failed(sandbox.start([NOWHERE], (terminal[1],) * 3, terminal=True)) == ("exec", errno.ENOENT)


def test_terminal_is_the_commands_own(sandbox: Launched, terminal: tuple[int, int]) -> None:
    master, inner = terminal
    code = """
        import os
        assert os.tcgetpgrp(0) == os.getpgrp() == os.getpid() != os.getsid(0) == os.getppid()
        os.write(os.open("/dev/tty", os.O_RDWR), b"mine")
    """
    number = sandbox.start([PYTHON, "-Sc", textwrap.dedent(code)], (inner, inner, inner), terminal=True)
    read_until(master, b"mine")
    assert sandbox.exited(number).status == 0


def test_terminal_passes_signals_on(sandbox: Launched, terminal: tuple[int, int]) -> None:
    master, inner = terminal
    script = "trap 'echo got TERM; exit 4' TERM; echo up; while :; do sleep 0.05; done"
    number = sandbox.start(["sh", "-c", script], (inner, inner, inner), terminal=True)
    read_until(master, b"up")
    sandbox.request(Request.SIGNAL, number, signal.SIGTERM)
    read_until(master, b"got TERM")
    assert os.waitstatus_to_exitcode(sandbox.exited(number).status) == 4


def test_terminal_that_hangs_up(sandbox: Launched, terminal: tuple[int, int]) -> None:
    master, inner = terminal
    number = sandbox.start(["sh", "-c", "echo up; sleep 600"], (inner, inner, inner), terminal=True)
    read_until(master, b"up")
    with open(os.devnull) as nobody:  # closes both ends, and leaves their numbers to the fixture
        os.dup2(nobody.fileno(), inner, inheritable=False)
        os.dup2(nobody.fileno(), master, inheritable=False)
    assert sandbox.exited(number).status == signal.SIGHUP


def test_continuing_what_runs_takes_no_foreground_away(sandbox: Launched, terminal: tuple[int, int]) -> None:
    """A thaw continues everything; an editor in the foreground of a shell must stay there."""
    master, inner = terminal
    code = """
        import os, signal, time
        signal.signal(signal.SIGTTOU, signal.SIG_IGN)
        signal.pthread_sigmask(signal.SIG_BLOCK, [signal.SIGCONT])
        job = os.fork()
        if job == 0:
            os.setpgid(0, 0)
            time.sleep(600)
        while os.getpgid(job) != job:
            time.sleep(0.01)
        os.tcsetpgrp(0, job)
        print("up", flush=True)
        signal.sigwait([signal.SIGCONT])
        os._exit(0 if os.tcgetpgrp(0) == job else 1)
    """
    number = sandbox.start([PYTHON, "-Sc", textwrap.dedent(code)], (inner, inner, inner), terminal=True)
    read_until(master, b"up")
    sandbox.request(Request.SIGNAL, number, signal.SIGCONT)
    assert sandbox.exited(number).status == 0


# ---- every end ----


def busy(sandbox: Launched) -> list[int]:
    """Starts some processes, one of them out of its session, and returns all pids of the sandbox."""
    sandbox.start(["sh", "-c", "setsid sleep 600 & sleep 600 & wait"])
    sandbox.start(["sleep", "600"])
    init = sandbox.init
    assert wait_until(lambda: len(descendants(init)) == 4)
    return [init, *descendants(init)]


def test_end_by_sigterm(sandbox: Launched) -> None:
    pids = busy(sandbox)
    assert sandbox.end() is EndReason.KILLED
    assert gone(*pids)


def test_end_by_closing_the_socket(sandbox: Launched) -> None:
    pids = busy(sandbox)
    sandbox.control.close()
    assert os.waitstatus_to_exitcode(sandbox.wait()) == 0
    assert gone(*pids)


def test_end_by_half_closing_the_socket(sandbox: Launched) -> None:
    pids = busy(sandbox)
    sandbox.control.shutdown(socket.SHUT_WR)
    assert sandbox.ended() is EndReason.CLOSED
    assert gone(*pids)


def test_end_by_wall_time(start: Start) -> None:
    sandbox = start(outside=lambda plan: plan.wall_time(0.5)).ready()
    pids = busy(sandbox)
    assert sandbox.ended() is EndReason.WALL_TIME
    assert gone(*pids)


def test_end_by_the_death_of_pid_1(sandbox: Launched) -> None:
    pids = busy(sandbox)
    if os.geteuid() == 0:
        os.kill(sandbox.init, signal.SIGKILL)
    else:  # who shares its user id outside may kill it too; nobody inside can
        os.kill(pids[0], signal.SIGKILL)
    assert sandbox.ended() is EndReason.INIT_DIED
    assert gone(*pids)


def test_end_by_the_death_of_the_keeper(sandbox: Launched) -> None:
    pids = busy(sandbox)
    os.kill(sandbox.keeper, signal.SIGKILL)
    sandbox.wait()
    assert wait_until(lambda: gone(*pids), 1.0)
    assert all(report.type is not ReportType.ENDED for report in sandbox.rest())


def test_end_under_a_stopped_keeper(sandbox: Launched) -> None:
    """PID 1 sees the end of the socket by itself."""
    pids = busy(sandbox)
    os.kill(sandbox.keeper, signal.SIGSTOP)
    sandbox.control.close()
    assert wait_until(lambda: gone(*pids), 1.0)
    os.kill(sandbox.keeper, signal.SIGCONT)
    assert os.waitstatus_to_exitcode(sandbox.wait()) == 0


def test_end_of_a_sandbox_that_is_stopped(sandbox: Launched) -> None:
    pids = busy(sandbox)
    sandbox.request(Request.STOP_ALL)
    sandbox.expect(ReportType.STOPPED)
    os.kill(pids[0], signal.SIGSTOP)
    assert sandbox.end() is EndReason.KILLED
    assert gone(*pids)


CONTROLLER = """
import os, sys, time
from pathlib import Path
from tests.contain.test_launcher import Launched, Walls, busy
from corral.sandbox import cgroups, launcher
from corral.sandbox.limits import descendants

left, groups = sys.argv[1], sys.argv[2:]
Path(left, "file").touch()

def outside(plan):
    plan.remove(left + "/file")
    plan.remove(left)
    for hierarchy, group in zip(cgroups.hierarchies(), groups):
        plan.cgroup(hierarchy.version, group, [])

walls = Walls(outside=outside)
sandbox = Launched(*launcher.launch(walls.plan.compile(), walls.identity.lease)).ready()
print(sandbox.keeper, *busy(sandbox), flush=True)
for action in sys.stdin:
    if action == "close then die\\n":
        sandbox.control.close()
    os.kill(os.getpid(), 9)
"""


@pytest.mark.parametrize("action", ["die", "close then die"])
def test_end_by_the_death_of_the_controller(tmp_path: Path, action: str) -> None:
    left = tmp_path / "left"
    left.mkdir()
    groups = [f"{hierarchy.parent}/{cgroups.PREFIX}{os.getpid()}-test" for hierarchy in cgroups.hierarchies()]
    controller = subprocess.Popen(
        [sys.executable, "-c", CONTROLLER, str(left), *groups],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
        cwd=Path(__file__).resolve().parents[2],
        env=dict(os.environ, PYTHONPATH=os.pathsep.join(filter(None, [*sys.path]))),
    )
    assert controller.stdin
    assert controller.stdout
    with controller.stdin, controller.stdout:
        pids = [int(pid) for pid in controller.stdout.readline().split()]
        assert len(pids) == 6
        assert all(os.path.isdir(group) for group in groups)
        controller.stdin.write(action + "\n")
        controller.stdin.flush()
        assert controller.wait(PATIENCE) == -signal.SIGKILL
    assert wait_until(lambda: gone(*pids), 1.0)
    assert wait_until(lambda: not any(os.path.exists(group) for group in groups), 1.0)
    assert wait_until(lambda: not left.exists(), 1.0)


def test_what_a_live_controller_has_is_left_alone(start: Start, tmp_path: Path) -> None:
    kept = tmp_path / "kept"
    kept.touch()
    sandbox = start(outside=lambda plan: plan.remove(str(kept))).ready()
    sandbox.control.close()
    sandbox.wait()
    assert kept.exists()


# ---- the launcher under sanitizers ----


@pytest.fixture(scope="session")
def sanitized(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The launcher built with AddressSanitizer and UndefinedBehaviorSanitizer: by make, or here."""
    made = os.environ.get("CORRAL_ASAN_LAUNCHER")
    if made and os.access(made, os.X_OK):
        return Path(made)
    compiler = shutil.which("cc") or shutil.which("gcc")
    if compiler is None:
        pytest.skip("no C compiler on this machine; `make test` as root installs one")
    target = tmp_path_factory.mktemp("sanitized") / "corral-launcher-asan"
    flags = ["-std=c11", "-D_GNU_SOURCE=", "-g", "-O1", "-fsanitize=address,undefined", "-fno-sanitize-recover=all"]
    command = [compiler, *flags, *map(str, sorted(SOURCES.glob("*.c"))), "-o", str(target)]
    subprocess.run(command, check=True, timeout=120)
    return target


@pytest.fixture
def findings(sanitized: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Makes the sanitized build the launcher; sanitizers write what they find into the returned directory.

    The launcher gets no environment, so a script sets theirs. Leaks are not looked for: that needs ptrace, which a
    process that is not dumpable refuses. Inside the walls there is no file to write to; but a finding always aborts,
    which each scenario sees as a sandbox or a command that ends in another way than it should.
    """
    place = tmp_path / "findings"
    place.mkdir(mode=0o777)
    script = tmp_path / "launcher"
    common = f"log_path={place}/found:abort_on_error=1"
    script.write_text(
        "#!/bin/sh\n"
        f"export ASAN_OPTIONS={common}:detect_leaks=0:detect_stack_use_after_return=1 UBSAN_OPTIONS={common}\n"
        f"exec {sanitized}\n"
    )
    script.chmod(script.stat().st_mode | stat.S_IXUSR | stat.S_IXGRP | stat.S_IXOTH)
    monkeypatch.setattr(launcher, "_PROGRAM", str(script))
    monkeypatch.setattr(launcher, "_sealed_copy", str)  # a script cannot run from a descriptor that closes on exec
    return place


def no_findings(place: Path) -> None:
    assert {path.name: path.read_text() for path in place.iterdir()} == {}


def test_sanitized_life(start: Start, findings: Path, terminal: tuple[int, int]) -> None:
    sandbox = start(inside=lambda plan: plan.listen("127.0.0.1", 80)).ready()
    assert sandbox.run("echo", "alive") == "alive\n"
    assert sandbox.failed(sandbox.start([NOWHERE])) == ("exec", errno.ENOENT)
    assert sandbox.failed(sandbox.start(["true"], user=70000)) == ("user", errno.EINVAL)
    payload = channel.sealed_memfd("test", b"CRLEXEC1" + bytes(64))
    assert sandbox.failed(sandbox.start_payload(payload)) == ("request", errno.EPROTO)
    os.close(payload)
    for size in (1, 15, 17, 4096):
        sandbox.send(b"x" * size, [sandbox.control.fileno()] * 5)
    sandbox.request(Request.EXEC, 99, fds=[sandbox.control.fileno()] * 5)
    assert sandbox.failed(99) == ("request", errno.EMFILE)

    # Without `exec` the shell may be in vfork(2), of which no stopped child lets it go.
    number = sandbox.start(["sh", "-c", "echo up; exec sleep 600"], (terminal[1],) * 3, terminal=True)
    read_until(terminal[0], b"up")
    os.write(terminal[0], b"\x1a")
    assert sandbox.expect(ReportType.STOPPED).id == number
    sandbox.request(Request.SIGNAL, number, signal.SIGCONT)
    sandbox.request(Request.SIGNAL, number, signal.SIGTERM)
    assert sandbox.exited(number).status == signal.SIGTERM

    number = sandbox.start(["sh", "-c", "sleep 600 & sleep 600 & wait"])
    assert wait_until(lambda: len(descendants(sandbox.init)) >= 3)
    sandbox.request(Request.KILL_SESSION, number)
    assert sandbox.exited(number).status == signal.SIGKILL
    assert sandbox.end() is EndReason.KILLED
    assert sandbox.wait() == 0
    no_findings(findings)


@pytest.mark.parametrize("row", FAILING, ids=[f"{row[2]}-{row[4]}-{i}" for i, row in enumerate(FAILING)])
def test_sanitized_failing_steps(start: Start, findings: Path, row: tuple[str, Spoil, str, str, int]) -> None:
    part, spoil, step, detail, error = row
    broken = start(**{part: spoil})
    report = broken.expect(ReportType.FAILED)
    assert (report.step, report.detail, report.error) == (step, detail, error)
    assert broken.ended() is EndReason.FAILED
    assert broken.wait() == 0
    no_findings(findings)
