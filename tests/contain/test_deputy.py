"""The deputy (docs/supervisor.md): whose rights it has, what it can see, who can see it, and that nothing keeps it.

Sandboxes are made of hand-made plans, as in test_launcher.py. Their filter notifies nobody: the tests are the
supervisor.
"""

from __future__ import annotations

import errno
import os
import select
import signal
import socket
import stat
import struct
import textwrap
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from corral.reactor import Loop
from corral.sandbox import launcher
from corral.sandbox.channel import EndReason, ReportType
from corral.sandbox.landlock import plan_landlock
from corral.sandbox.limits import descendants
from corral.sandbox.plan import Plan
from corral.supervisor import deputy as deputy_module
from corral.supervisor.deputy import Deputy
from corral.supervisor.deputy_wire import MAX_DATA, Caller, Reply
from tests.contain.conftest import wait_until
from tests.contain.test_launcher import PATIENCE, PYTHON, USER, Launched, Walls, gone

AGENT = Caller(USER, USER)
ROOT = Caller(0, 0)
ABSTRACT = struct.pack("=H", socket.AF_UNIX) + b"\0corral-test"
SO_PEERPIDFD = 77


def unix_address(path: str) -> bytes:
    return struct.pack("=H", socket.AF_UNIX) + path.encode() + b"\0"


class Desk:
    """A sandbox, its deputy, and a loop that is run until there is a reply."""

    def __init__(self, sandbox: Launched, several: bool) -> None:
        self.sandbox = sandbox
        self.several = several  # more than one id inside
        sandbox.expect(ReportType.READY)
        self.init = sandbox.init
        _, deputy_fd = sandbox.expect(ReportType.LISTENER).fds
        self.loop = Loop()
        self.lost = 0
        self.fds: list[int] = []
        self.deputy = Deputy(os.dup(deputy_fd), self.loop, self._on_lost)
        sandbox.fds.remove(deputy_fd)
        os.close(deputy_fd)

    def _on_lost(self) -> None:
        self.lost += 1
        self.loop.stop()

    def until(self, condition: Callable[[], bool]) -> None:
        expired: list[bool] = []

        def expire() -> None:
            expired.append(True)
            self.loop.stop()

        timer = self.loop.call_later(PATIENCE, expire)
        while not condition():
            assert not expired, "there is no reply"
            self.loop.run()
        timer.cancel()

    def begin(self, method: str, *args: object, caller: Caller = AGENT, **more: object) -> list[Reply]:
        """Asks, and returns where the reply will be."""
        replies: list[Reply] = []

        def done(reply: Reply) -> None:
            replies.append(reply)
            if reply.fd >= 0:
                self.fds.append(reply.fd)
            self.loop.stop()

        self.number = getattr(self.deputy, method)(caller, *args, done=done, **more)
        return replies

    def ask(self, method: str, *args: object, caller: Caller = AGENT, **more: object) -> Reply:
        replies = self.begin(method, *args, caller=caller, **more)
        self.until(lambda: bool(replies))
        return replies[0]

    def at(self, path: str, *, follow: bool = True) -> int:
        """The object at ``path``."""
        reply = self.ask("resolve", path, follow=follow)
        assert reply.errno == 0, os.strerror(reply.errno)
        return reply.fd

    def write(self, path: str, content: bytes = b"", caller: Caller = AGENT, mode: int = 0o644) -> None:
        directory, name = os.path.split(path)
        reply = self.ask("create", self.at(directory), name, os.O_WRONLY, mode, caller=caller)
        assert reply.errno == 0, os.strerror(reply.errno)
        os.write(reply.fd, content)
        self.fds.remove(reply.fd)
        os.close(reply.fd)

    @property
    def process(self) -> int:
        """The host's pid of the deputy; it has been asked something."""
        children = Path(f"/proc/{self.sandbox.keeper}/task/{self.sandbox.keeper}/children").read_text().split()
        (found,) = {int(pid) for pid in children} - {self.init}
        assert Path(f"/proc/{found}/comm").read_text() == "corral-deputy\n"
        return found

    def program(self, code: str) -> tuple[int, socket.socket]:
        """Starts Python inside, with ``peer`` a socket to the returned one."""
        ours, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        ours.settimeout(PATIENCE)
        preface = "import array, os, socket, struct\npeer = socket.socket(fileno=0)\n"
        with theirs:
            number = self.sandbox.start([PYTHON, "-Sc", preface + textwrap.dedent(code)], (theirs.fileno(), None, None))
        return number, ours

    def socket_inside(self, kind: int = socket.SOCK_STREAM) -> socket.socket:
        """A Unix socket of the sandbox's network."""
        number, ours = self.program(
            f"s = socket.socket(socket.AF_UNIX, {int(kind)})\nsocket.send_fds(peer, [b'x'], [s.fileno()])"
        )
        with ours:
            _, (fd,), _, _ = socket.recv_fds(ours, 1, 1)
        assert self.sandbox.exited(number).status == 0
        return socket.socket(fileno=fd)

    def close(self) -> None:
        self.deputy.close()
        self.loop.close()
        for fd in self.fds:
            os.close(fd)


MakeDesk = Callable[..., Desk]


def hostname(plan: Plan) -> None:
    plan.file("/hostname", b"inside\n", 0o644)


@pytest.fixture
def make_desk() -> Iterator[MakeDesk]:
    made: list[Desk] = []
    launched: list[Launched] = []

    def make(*, writable: tuple[str, ...] = ("/tmp",)) -> Desk:
        def landlock(plan: Plan) -> None:
            plan_landlock(plan, writable, ["/dev"], optional=True)

        walls = Walls(tree=hostname, inside=landlock)
        try:
            launched.append(Launched(*launcher.launch(walls.plan.compile(), walls.identity.lease)))
        finally:
            walls.identity.release()
        made.append(Desk(launched[-1], walls.identity.has(0)))
        return made[-1]

    yield make
    for desk in made:
        desk.close()
    for one in launched:
        one.close()


@pytest.fixture
def desk(make_desk: MakeDesk) -> Desk:
    return make_desk()


# ---- what it sees ----


def test_it_is_started_by_the_first_request(desk: Desk) -> None:
    assert len(descendants(desk.sandbox.keeper)) == 1
    assert desk.ask("resolve", "/").path == "/"
    assert len(descendants(desk.sandbox.keeper)) == 2


def test_its_files_are_those_of_the_sandbox(desk: Desk, tmp_path: Path) -> None:
    file = desk.at("/hostname")
    opened = desk.ask("open", file, os.O_RDONLY)
    assert os.read(opened.fd, 100) == b"inside\n"
    assert desk.ask("resolve", str(tmp_path)).errno == errno.ENOENT
    assert desk.ask("resolve", "/etc/hostname").errno == errno.ENOENT
    inside = desk.sandbox.python("import os; s = os.stat('/'); print(s.st_dev, s.st_ino)").split()
    root = os.fstat(desk.at("/"))
    assert [str(root.st_dev), str(root.st_ino)] == inside


def test_nothing_leads_out(desk: Desk) -> None:
    desk.sandbox.run("ln", "-s", "/", "/tmp/root")
    desk.sandbox.run("ln", "-s", "../../../../hostname", "/tmp/up")
    assert desk.ask("resolve", "/tmp/root/hostname").path == "/hostname"
    assert desk.ask("resolve", "/tmp/up").path == "/hostname"
    assert desk.ask("resolve", "../../../hostname", start=desk.at("/tmp")).path == "/hostname"
    assert desk.ask("resolve", "/tmp/up", follow=False).path == "/tmp/up"
    assert desk.ask("resolve", "..", start=desk.at("/")).path == "/"
    # The deputy is nobody in the sandbox's proc, and finds no other there.
    assert desk.ask("resolve", "/proc/self/root").errno == errno.ENOENT
    assert desk.ask("resolve", "/proc/1/root").errno in (errno.EACCES, errno.ENOENT)
    assert desk.ask("resolve", "self/fd/4", start=desk.at("/")).errno == errno.ENOENT
    for path in ("self", "self/fd/4", "", "."):
        assert desk.ask("resolve", path).errno == errno.EPROTO


def test_paths_are_those_of_the_objects(desk: Desk) -> None:
    desk.write("/tmp/file (deleted)")
    desk.write("/tmp/gone")
    kept, deleted = desk.at("/tmp/file (deleted)"), desk.at("/tmp/gone")
    desk.sandbox.run("rm", "/tmp/gone")
    assert desk.ask("resolve", "", start=kept).path == "/tmp/file (deleted)"
    assert desk.ask("resolve", "", start=deleted).path == ""
    reader, writer = os.pipe()
    desk.fds += [reader, writer]
    assert desk.ask("resolve", "", start=reader).path == ""


# ---- whose rights it has ----


@pytest.mark.parametrize("caller", [AGENT, ROOT], ids=["agent", "root"])
def test_it_has_the_callers_ids_and_nothing_else(desk: Desk, caller: Caller) -> None:
    desk.ask(
        "resolve", "/", caller=caller
    )  # of root inside too it has no capability, and where there is none it is EPERM
    status = dict(line.split(":\t", 1) for line in Path(f"/proc/{desk.process}/status").read_text().splitlines())
    for which in ("CapInh", "CapBnd", "CapAmb"):
        assert int(status[which], 16) == 0
    kill, ids = 1 << 5, 1 << 6 | 1 << 7  # CAP_KILL; CAP_SETGID, CAP_SETUID
    assert int(status["CapEff"], 16) == (kill if desk.several else 0)
    assert int(status["CapPrm"], 16) == (kill | ids if desk.several else 0)
    assert status["NoNewPrivs"] == "1"
    several = desk.several
    assert status["Groups"].split() == ([] if several else [str(group) for group in sorted(os.getgroups())])
    assert os.stat(f"/proc/{desk.process}/fd").st_uid == 0  # as of every process that is not dumpable (proc(5))
    for name in ("user", "mnt", "net"):
        if os.geteuid() == 0:
            assert os.readlink(f"/proc/{desk.process}/ns/{name}") == os.readlink(f"/proc/{desk.init}/ns/{name}")


@pytest.mark.root
def test_it_has_none_of_the_controllers_groups(make_desk: MakeDesk) -> None:
    before = os.getgroups()
    os.setgroups([4242])
    try:
        desk = make_desk()
    finally:
        os.setgroups(before)
    desk.ask("resolve", "/")
    assert "Groups:\t4242 \n" in Path(f"/proc/{desk.sandbox.keeper}/status").read_text()
    assert "Groups:\t \n" in Path(f"/proc/{desk.process}/status").read_text()


def test_what_it_makes_belongs_to_the_caller(desk: Desk) -> None:
    directory = desk.at("/tmp")
    caller = Caller(USER, USER, 0o027)
    assert desk.ask("create", directory, "new", os.O_RDWR, 0o666, caller=caller).errno == 0
    with desk.socket_inside() as sock:
        assert desk.ask("bind", sock.fileno(), directory=directory, name="socket", caller=caller).errno == 0
    told = desk.sandbox.run("stat", "-c", "%u %g %a %F", "/tmp/new", "/tmp/socket").splitlines()
    assert told == [f"{USER} {USER} 640 regular empty file", f"{USER} {USER} 750 socket"]
    assert desk.ask("create", directory, "new", os.O_RDWR, 0o666).errno == errno.EEXIST
    assert desk.ask("create", directory, "../new", os.O_RDWR, 0o666).errno == errno.EPROTO


def test_permissions_hold_for_the_caller(desk: Desk) -> None:
    if not desk.several:
        pytest.skip("this sandbox has one id")
    number = desk.sandbox.start(["mkdir", "-m", "700", "/tmp/private"], user=0)
    assert desk.sandbox.exited(number).status == 0
    assert desk.ask("resolve", "/tmp/private").errno == 0
    assert desk.ask("resolve", "/tmp/private/x").errno == errno.EACCES
    assert desk.ask("resolve", "/tmp/private/x", caller=ROOT).errno == errno.ENOENT
    assert desk.ask("resolve", "/tmp/private/x").errno == errno.EACCES  # it is the agent again
    desk.write("/tmp/mine", b"", mode=0o600)
    mine = desk.at("/tmp/mine")
    # Root inside has no capability to override anything, and neither has whoever acts for it.
    assert desk.ask("open", mine, os.O_RDONLY, caller=ROOT).errno == errno.EACCES
    assert desk.ask("chmod", mine, 0o666, caller=ROOT).errno == errno.EPERM
    desk.write("/tmp/roots", b"", ROOT, 0o600)
    assert desk.ask("open", desk.at("/tmp/roots"), os.O_RDONLY).errno == errno.EACCES
    assert desk.ask("resolve", "/", caller=Caller(USER, 70000)).errno == errno.EINVAL
    assert desk.ask("resolve", "/", caller=Caller(70000, USER)).errno == errno.EINVAL


def test_there_is_no_other_id(desk: Desk) -> None:
    if desk.several:
        pytest.skip("this sandbox has many ids")
    for caller in (ROOT, Caller(USER, 0), Caller(0, USER)):
        assert desk.ask("resolve", "/", caller=caller).errno == errno.EPERM
    assert desk.ask("resolve", "/").errno == 0


def test_no_id_is_not_the_last_one(desk: Desk) -> None:
    for caller in (Caller(0xFFFFFFFF, USER), Caller(USER, 0xFFFFFFFF)):
        assert desk.ask("resolve", "/", caller=caller).errno == errno.EPROTO


def test_landlock_holds_for_it(make_desk: MakeDesk) -> None:
    desk = make_desk(writable=())
    reply = desk.ask("create", desk.at("/tmp"), "new", os.O_RDWR, 0o600)
    assert reply.errno == errno.EACCES
    with desk.socket_inside() as sock:
        assert desk.ask("bind", sock.fileno(), directory=desk.at("/tmp"), name="s").errno == errno.EACCES


# ---- what was decided is what is done ----


def test_a_changed_parent_changes_nothing(desk: Desk) -> None:
    desk.sandbox.run("mkdir", "/tmp/decided", "/tmp/other")
    parent = desk.at("/tmp/decided")
    desk.sandbox.run("mv", "/tmp/decided", "/tmp/moved")
    desk.sandbox.run("ln", "-s", "other", "/tmp/decided")
    assert desk.ask("create", parent, "new", os.O_RDWR, 0o600).errno == 0
    with desk.socket_inside() as sock:
        given = unix_address("/tmp/decided/socket")
        found = desk.ask("bind", sock.fileno(), directory=parent, name="socket", address=given)
        assert found.errno == errno.ESTALE
        assert sock.getsockname() == ""
    assert os.listdir(desk.ask("open", desk.at("/tmp/moved"), os.O_RDONLY).fd) == ["new"]
    assert os.listdir(desk.ask("open", desk.at("/tmp/other"), os.O_RDONLY).fd) == []


def test_a_changed_name_changes_nothing(desk: Desk) -> None:
    desk.write("/tmp/decided", b"decided")
    desk.write("/tmp/other", b"other")
    file = desk.at("/tmp/decided")
    desk.sandbox.run("mv", "/tmp/other", "/tmp/decided")
    assert os.read(desk.ask("open", file, os.O_RDONLY).fd, 100) == b"decided"


def test_names(desk: Desk) -> None:
    directory = desk.at("/tmp")
    desk.write("/tmp/a", b"content")
    file = desk.at("/tmp/a")
    assert desk.ask("rename", (directory, "a"), (directory, "b")).errno == 0
    assert desk.ask("link", file, directory, "c").errno == 0
    assert desk.ask("rename", (directory, "b"), (directory, "c"), flags=1).errno == errno.EEXIST  # RENAME_NOREPLACE
    assert desk.ask("symlink", "c", directory, "l").errno == 0
    assert desk.ask("chmod", file, 0o4711).errno == 0
    assert stat.S_IMODE(os.fstat(file).st_mode) == 0o4711
    link = desk.at("/tmp/l", follow=False)
    assert desk.ask("open", link, os.O_RDONLY).errno == errno.ELOOP
    assert desk.ask("link", link, directory, "m").errno == 0
    assert desk.sandbox.run("readlink", "/tmp/m") == "c\n"
    assert desk.ask("unlink", directory, "b").errno == 0
    assert desk.ask("unlink", directory, "b").errno == errno.ENOENT
    desk.sandbox.run("mkdir", "/tmp/d")
    assert desk.ask("unlink", directory, "d").errno == errno.EISDIR
    assert desk.ask("unlink", directory, "d", remove_directory=True).errno == 0
    assert sorted(os.listdir(desk.ask("open", directory, os.O_RDONLY).fd)) == ["c", "l", "m"]
    for name in ("", ".", "..", "c/x", "/c"):
        assert desk.ask("unlink", directory, name).errno == errno.EPROTO


# ---- sockets ----

SERVER = """
    s = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
    s.bind({address!r})
    s.listen(5)
    peer.send(b"ready")
    c, _ = s.accept()
    peer.send(c.getsockopt(socket.SOL_SOCKET, socket.SO_PEERCRED, 12))
"""


def test_a_server_inside_sees_the_caller(desk: Desk) -> None:
    number, peer = desk.program(SERVER.format(address="/tmp/server"))
    with peer, desk.socket_inside() as sock:
        assert peer.recv(100) == b"ready"
        assert desk.ask("connect", sock.fileno(), to=desk.at("/tmp/server")).errno == 0
        assert struct.unpack("3i", peer.recv(100)) == (0, USER, USER)  # pid 0: nobody of its PID namespace
        assert sock.getpeername() == "/tmp/server"
    assert desk.sandbox.exited(number).status == 0


def test_an_abstract_name_is_looked_up_inside_only(desk: Desk) -> None:
    number, peer = desk.program(SERVER.format(address=b"\0corral-test"))
    with peer, desk.socket_inside() as sock, socket.socket(socket.AF_UNIX) as foreign:
        assert peer.recv(100) == b"ready"
        assert desk.ask("connect", foreign.fileno(), address=ABSTRACT).errno == errno.EPERM
        assert desk.ask("bind", foreign.fileno(), address=ABSTRACT).errno == errno.EPERM
        assert desk.ask("connect", sock.fileno(), address=ABSTRACT).errno == 0
        assert struct.unpack("3i", peer.recv(100))[1:] == (USER, USER)
    assert desk.sandbox.exited(number).status == 0


def test_a_path_is_no_address(desk: Desk) -> None:
    with desk.socket_inside() as sock, desk.socket_inside(socket.SOCK_DGRAM) as datagram:
        given = unix_address("/tmp/socket")
        assert desk.ask("connect", sock.fileno(), address=given).errno == errno.EPROTO
        assert desk.ask("bind", sock.fileno(), address=given).errno == errno.EPROTO
        assert desk.ask("send", datagram.fileno(), b"x", address=given).errno == errno.EPROTO


def test_only_unix_sockets(desk: Desk) -> None:
    with socket.socket(socket.AF_INET) as sock:
        assert desk.ask("connect", sock.fileno(), to=desk.at("/hostname")).errno == errno.EAFNOSUPPORT
        assert desk.ask("send", sock.fileno(), b"x").errno == errno.EAFNOSUPPORT
    assert desk.ask("connect", desk.at("/tmp"), to=desk.at("/hostname")).errno in (errno.EBADF, errno.ENOTSOCK)


@pytest.mark.parametrize("given", ["/tmp/d/socket", "d/socket", "./d//socket", "/tmp/../tmp/d/socket", "socket"])
def test_a_bound_socket_has_the_name_that_was_given(desk: Desk, given: str) -> None:
    desk.sandbox.run("mkdir", "/tmp/d")
    start = desk.at("/tmp/d" if given == "socket" else "/tmp")
    with desk.socket_inside() as sock:
        reply = desk.ask(
            "bind", sock.fileno(), directory=desk.at("/tmp/d"), name="socket", address=unix_address(given), start=start
        )
        assert reply == Reply(0)
        assert sock.getsockname() == given
    assert desk.sandbox.run("ls", "/tmp/d") == "socket\n"
    assert not desk.lost


def test_a_socket_that_was_bound_elsewhere_is_found_out(desk: Desk, monkeypatch: pytest.MonkeyPatch) -> None:
    desk.sandbox.run("mkdir", "/tmp/d")
    with desk.socket_inside() as right, desk.socket_inside() as wrong:
        for sock, name in ((right, "right"), (wrong, "wrong")):
            assert desk.ask("bind", sock.fileno(), directory=desk.at("/tmp"), name=name).errno == 0
        there = desk.at("/tmp/right")
        assert deputy_module._lies_at(right.fileno(), there)
        assert not deputy_module._lies_at(wrong.fileno(), there)
        assert not deputy_module._lies_at(wrong.fileno(), -1)
        desk.sandbox.run("rm", "/tmp/wrong")
        assert deputy_module._lies_at(wrong.fileno(), -1)  # it is nowhere
        desk.sandbox.run("ln", "/tmp/right", "/tmp/d/right")
        assert not deputy_module._lies_at(right.fileno(), there)

    monkeypatch.setattr(deputy_module, "_lies_at", lambda sock, found: False)
    with desk.socket_inside() as sock:
        given = unix_address("/tmp/d/socket")
        replies = desk.begin("bind", sock.fileno(), directory=desk.at("/tmp/d"), name="socket", address=given)
        desk.until(lambda: desk.lost == 1)
    assert not replies  # whose call it is would go on until all ends
    assert desk.sandbox.ended() is EndReason.DEPUTY


def test_datagrams(desk: Desk) -> None:
    number, peer = desk.program(
        """
        s = socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM)
        s.setsockopt(socket.SOL_SOCKET, socket.SO_PASSCRED, 1)
        s.bind("/tmp/server")
        peer.send(b"ready")
        for _ in range(2):
            data, rest, _, _ = s.recvmsg(1 << 20, 1000)
            fds = [array.array("i", x[2]) for x in rest if x[1] == socket.SCM_RIGHTS]
            creds = [struct.unpack("3i", x[2]) for x in rest if x[1] == 2]
            text = os.read(fds[0][0], 100).decode() if fds else ""
            peer.send(repr((len(data), text, creds[0])).encode())
        """
    )
    reader, writer = os.pipe()
    os.write(writer, b"passed")
    os.close(writer)
    desk.fds.append(reader)
    with peer, desk.socket_inside(socket.SOCK_DGRAM) as sock:
        assert peer.recv(100) == b"ready"
        to = desk.at("/tmp/server")
        assert desk.ask("send", sock.fileno(), b"hello", to=to, fds=[reader]) == Reply(0, 5)
        assert peer.recv(1000) == repr((5, "passed", (0, USER, USER))).encode()
        sock.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, 4 * MAX_DATA)
        assert desk.ask("send", sock.fileno(), bytes(2 * MAX_DATA), to=to) == Reply(0, 2 * MAX_DATA)
        assert peer.recv(1000) == repr((2 * MAX_DATA, "", (0, USER, USER))).encode()
        assert desk.ask("send", sock.fileno(), b"x").errno == errno.ENOTCONN
        assert desk.ask("send", sock.fileno(), bytes(1 << 20), to=to).errno == errno.EMSGSIZE
    assert desk.sandbox.exited(number).status == 0


def test_a_full_queue_keeps_the_caller_waiting_alone(desk: Desk) -> None:
    number, peer = desk.program(
        """
        s = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
        s.bind("/tmp/server")
        s.listen(0)
        peer.send(b"ready")
        peer.recv(1)
        s.accept(), s.accept()
        """
    )
    with peer, desk.socket_inside() as first, desk.socket_inside() as second, desk.socket_inside() as third:
        assert peer.recv(100) == b"ready"
        server = desk.at("/tmp/server")
        assert desk.ask("connect", first.fileno(), to=server).errno == 0
        waiting = desk.begin("connect", second.fileno(), to=server)
        third.setblocking(False)
        assert desk.ask("connect", third.fileno(), to=server).errno == errno.EAGAIN
        assert desk.ask("resolve", "/").errno == 0
        assert not waiting
        assert second.getblocking()
        peer.send(b"x")
        desk.until(lambda: bool(waiting))
        assert waiting[0] == Reply(0)
        assert second.getpeername() == "/tmp/server"
    assert desk.sandbox.exited(number).status == 0


# ---- waiting ----


def test_a_fifo_keeps_its_callers_waiting_alone(desk: Desk) -> None:
    desk.sandbox.run("mkfifo", "/tmp/fifo")
    fifo = desk.at("/tmp/fifo")
    reader = desk.begin("open", fifo, os.O_RDONLY)
    assert desk.ask("resolve", "/").errno == 0
    assert not reader
    writer = desk.begin("open", fifo, os.O_WRONLY)
    desk.until(lambda: bool(reader and writer))
    os.write(writer[0].fd, b"through")
    assert os.read(reader[0].fd, 100) == b"through"
    assert not os.get_blocking(desk.ask("open", fifo, os.O_RDONLY | os.O_NONBLOCK).fd)
    assert os.get_blocking(desk.ask("open", fifo, os.O_RDWR).fd)


def test_what_waits_can_be_cancelled_and_is_bounded(desk: Desk) -> None:
    desk.sandbox.run("mkfifo", "/tmp/fifo")
    fifo = desk.at("/tmp/fifo")
    waiting = [(desk.begin("open", fifo, os.O_RDONLY), desk.number) for _ in range(64)]
    assert desk.ask("open", fifo, os.O_RDONLY) == Reply(errno.EAGAIN, busy=True)
    assert desk.ask("open", fifo, os.O_WRONLY | os.O_NONBLOCK).errno in (0, errno.ENXIO)
    for _, number in waiting:
        desk.deputy.cancel(number)
    assert wait_until(lambda: len(descendants(desk.process)) == 0, PATIENCE)
    assert desk.ask("resolve", "/").errno == 0
    assert not desk.deputy._outstanding
    again = desk.begin("open", fifo, os.O_RDONLY)
    assert desk.ask("open", fifo, os.O_RDWR).errno == 0  # opens the other end for it
    desk.until(lambda: bool(again))


def test_whoever_waits_for_another_user_can_be_cancelled(desk: Desk) -> None:
    if not desk.several:
        pytest.skip("this sandbox has one id")
    desk.sandbox.run("mkfifo", "-m", "666", "/tmp/fifo")
    fifo = desk.at("/tmp/fifo")
    desk.begin("open", fifo, os.O_RDONLY, caller=ROOT)
    assert desk.ask("resolve", "/").errno == 0
    desk.deputy.cancel(desk.number - 1)
    assert wait_until(lambda: len(descendants(desk.process)) == 0, PATIENCE)


def test_a_lease_keeps_its_caller_waiting_alone(desk: Desk) -> None:
    desk.write("/tmp/leased")
    number, peer = desk.program(
        """
        import fcntl, signal
        signal.signal(signal.SIGIO, lambda *_: None)
        fd = os.open("/tmp/leased", os.O_RDWR)
        fcntl.fcntl(fd, fcntl.F_SETLEASE, fcntl.F_WRLCK)
        peer.send(b"ready")
        peer.recv(1)
        """
    )
    with peer:
        assert peer.recv(100) == b"ready"
        waiting = desk.begin("open", desk.at("/tmp/leased"), os.O_RDONLY)
        assert desk.ask("resolve", "/").errno == 0
        assert not waiting
        peer.send(b"x")
        desk.until(lambda: bool(waiting))
    assert waiting[0].errno == 0
    assert os.get_blocking(waiting[0].fd)
    assert desk.sandbox.exited(number).status == 0


@pytest.mark.root
def test_it_keeps_nothing(desk: Desk) -> None:
    desk.write("/tmp/file")
    desk.ask("open", desk.at("/tmp/file"), os.O_RDONLY)
    desk.ask("resolve", "x", start=desk.at("/tmp"))
    with desk.socket_inside() as sock:
        desk.ask("bind", sock.fileno(), directory=desk.at("/tmp"), name="socket")
        desk.ask("send", sock.fileno(), bytes(2 * MAX_DATA), fds=[sock.fileno()] * 3)
    process = desk.process
    assert wait_until(lambda: len(os.listdir(f"/proc/{process}/fd")) == 6)  # the last reply comes before its close
    assert os.stat(f"/proc/{process}/cwd").st_ino == os.fstat(desk.at("/")).st_ino


# ---- nobody inside gets at it ----


def test_nothing_inside_sees_it(desk: Desk) -> None:
    desk.ask("resolve", "/")
    listed = desk.sandbox.python(
        """
        import os
        print([open(f"/proc/{p}/comm").read().strip() for p in os.listdir("/proc") if p.isdecimal()
               and os.access(f"/proc/{p}/comm", os.R_OK)])
        """
    )
    assert "corral-deputy" not in listed
    inner = os.readlink(f"/proc/{desk.init}/ns/pid") if os.geteuid() == 0 else ""
    assert os.geteuid() != 0 or os.readlink(f"/proc/{desk.process}/ns/pid") != inner


def test_its_pidfd_is_of_no_use_inside(desk: Desk) -> None:
    """The kernel hands a server a pidfd of whoever connected (SO_PEERPIDFD, Linux 6.5)."""
    number, peer = desk.program(
        f"""
        import ctypes, errno, signal
        libc = ctypes.CDLL(None, use_errno=True)
        def call(number, *args):
            return 0 if libc.syscall(number, *args) >= 0 else ctypes.get_errno()
        s = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
        s.bind("/tmp/server")
        s.listen(5)
        peer.send(b"ready")
        c, _ = s.accept()
        try:
            pidfd = c.getsockopt(socket.SOL_SOCKET, {SO_PEERPIDFD})
        except OSError:
            peer.send(b"none")
        else:
            found = [call(424, pidfd, signal.SIGKILL, None, 0)]  # pidfd_send_signal
            found += [call(438, pidfd, fd, 0) for fd in range(6)]  # pidfd_getfd
            found += [call(308, pidfd, 0x10000000)]  # setns, CLONE_NEWUSER
            peer.send(repr(found).encode())
        """
    )
    with peer, desk.socket_inside() as sock:
        assert peer.recv(100) == b"ready"
        assert desk.ask("connect", sock.fileno(), to=desk.at("/tmp/server")).errno == 0
        answer = peer.recv(1000)
    if answer == b"none":
        pytest.skip("this kernel has no SO_PEERPIDFD")
    assert 0 not in eval(answer)  # noqa: S307
    assert desk.ask("resolve", "/").errno == 0
    assert desk.sandbox.exited(number).status == 0


# ---- the end ----


def test_its_death_is_the_end(desk: Desk) -> None:
    desk.sandbox.run("mkfifo", "/tmp/fifo")
    waiting = desk.begin("open", desk.at("/tmp/fifo"), os.O_RDONLY)
    assert wait_until(lambda: len(descendants(desk.process)) == 1)
    processes = descendants(desk.sandbox.keeper)
    pidfd = os.pidfd_open(desk.process)
    signal.pidfd_send_signal(pidfd, signal.SIGKILL)
    os.close(pidfd)
    desk.until(lambda: desk.lost == 1)
    assert waiting == [Reply(errno.EPERM)]
    assert desk.ask("resolve", "/") == Reply(errno.EPERM)
    assert desk.sandbox.ended() is EndReason.DEPUTY
    assert gone(*processes)


@pytest.fixture
def waiters(desk: Desk) -> list[int]:
    """All processes of a sandbox whose deputy has a child waiting for each user, and is now the last of these users."""
    desk.sandbox.run("mkfifo", "-m", "666", "/tmp/fifo")
    fifo = desk.at("/tmp/fifo")
    callers = [ROOT, AGENT] if desk.several else [AGENT]
    for caller in callers:
        desk.begin("open", fifo, os.O_RDONLY, caller=caller)
    assert desk.ask("resolve", "/").errno == 0
    assert wait_until(lambda: len(descendants(desk.process)) == len(callers))
    return descendants(desk.sandbox.keeper)


def test_it_ends_with_its_sandbox(desk: Desk, waiters: list[int]) -> None:
    assert desk.sandbox.end() is EndReason.KILLED
    assert gone(*waiters)


def test_its_children_end_with_it(desk: Desk, waiters: list[int]) -> None:
    pidfd = os.pidfd_open(desk.process)
    signal.pidfd_send_signal(pidfd, signal.SIGKILL)
    os.close(pidfd)
    assert desk.sandbox.ended() is EndReason.DEPUTY
    assert gone(*waiters)


def test_it_ends_with_the_keeper(desk: Desk, waiters: list[int]) -> None:
    os.kill(desk.sandbox.keeper, signal.SIGKILL)
    assert wait_until(lambda: gone(*waiters), PATIENCE)


def test_an_unused_one_costs_nothing(desk: Desk) -> None:
    desk.deputy.close()
    assert desk.sandbox.run("echo", "alive") == "alive\n"
    assert len(descendants(desk.sandbox.keeper)) == 1


def test_the_controllers_end_is_its_own(desk: Desk) -> None:
    desk.ask("resolve", "/")
    desk.deputy.close()
    assert desk.sandbox.ended() is EndReason.DEPUTY


# ---- what is no request ----


def test_malformed_requests_are_refused(desk: Desk) -> None:
    desk.ask("resolve", "/")
    sock = desk.deputy._socket
    good = struct.pack("<QIIIIIIQIIIIII", 9, 1, USER, USER, 0, 0, 0, 0, 0, 1, 0, 0, 0, 0) + b"/"
    broken = [
        good[:-1],
        good + b"x",
        good[:64] + b"\0",
        good[:8] + struct.pack("<I", 0) + good[12:],
        good[:8] + struct.pack("<I", 13) + good[12:],
        good[:44] + struct.pack("<I", 1 << 31) + good[48:],
        good[:44] + struct.pack("<IIII", 0xFFFFFFFF, 1, 1, 0) + good[60:],
        good[:40] + struct.pack("<I", 4) + good[44:],
        good[:60] + struct.pack("<I", 1) + good[64:],
    ]
    for content in broken:
        sock.send(content)
        assert select.select([sock], [], [], PATIENCE)[0]
        number, error, *_ = struct.unpack_from("<QiIII", sock.recv(100))
        assert (number, error) == (9, errno.EPROTO)
    sock.send(good)
    assert select.select([sock], [], [], PATIENCE)[0]
    assert sock.recv(100)[24:] == b"/"


def test_too_many_descriptors_are_refused(desk: Desk) -> None:
    desk.ask("resolve", "/")
    sock = desk.deputy._socket
    content = struct.pack("<QIIIIIIQIIIIII", 9, 1, USER, USER, 0, 0, 0, 0, 0, 1, 0, 0, 0, 0) + b"/"
    socket.send_fds(sock, [content], [sock.fileno()] * 253)
    assert select.select([sock], [], [], PATIENCE)[0]
    assert struct.unpack_from("<Qi", sock.recv(100)) == (9, errno.EMFILE)
    assert desk.ask("resolve", "/").errno == 0


def test_half_a_header_is_the_end(desk: Desk) -> None:
    desk.deputy._socket.send(b"x" * 63)
    assert desk.sandbox.ended() is EndReason.DEPUTY
