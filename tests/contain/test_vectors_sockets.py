"""Vectors 15 to 24 (group B): reaching out of a sandbox through sockets and descriptors.

Each test puts a real listener or descriptor on the host, proves that it can be reached from there, attacks it from
inside, and then looks at the host's end: nobody may have arrived. Only loopback and documentation addresses are used.
"""

from __future__ import annotations

import asyncio
import errno
import ipaddress
import json
import os
import socket
import struct
import uuid
from collections.abc import Iterator
from contextlib import ExitStack, suppress
from pathlib import Path
from typing import Any

import pytest

from corral.errors import ExecError
from corral.policy.model import Filesystem, Policy
from corral.sandbox import prepare
from corral.sandbox.box import Sandbox
from corral.sandbox.core import Exit
from corral.sandbox.options import Listener
from tests.contain.attacks import OPEN
from tests.contain.conftest import Compile, MakeBox

PYTHON = "/usr/bin/python3"
IS_ROOT = os.geteuid() == 0
MARK = "corral-canary-7c1f"
OUTSIDE_V4 = ("192.0.2.1", "198.51.100.7", "203.0.113.9")
OUTSIDE_V6 = ("2001:db8::1", "2001:db8:ffff::2")

# What every attack below starts with: `attempt` gives "DONE" or the errno's name, `answer` is what the test gets.
PRELUDE = r"""
import array, errno, json, os, socket, struct, sys
ARGS = json.loads(sys.argv[1])
def attempt(function, *arguments):
    try:
        function(*arguments)
    except OSError as error:
        return errno.errorcode.get(error.errno, str(error.errno))
    return "DONE"
def answer(value):
    print(json.dumps(value))
def reach(family, kind, address):
    with socket.socket(family, kind) as s:
        s.settimeout(5)
        if kind == socket.SOCK_DGRAM and family != socket.AF_UNIX:
            s.sendto(b"attack", address)
        else:
            s.connect(address)
            s.send(b"attack")
"""


async def attack(box: Sandbox, code: str, *arguments: object, **how: Any) -> Any:
    """Runs Python code inside, which must come to its own end; returns what it answers."""
    result = await box.exec([PYTHON, "-c", PRELUDE + code, json.dumps(arguments)], timeout=60, **how)
    assert result.exit_code == 0, result.stderr.decode()
    return json.loads(result.stdout)


class Canary:
    """A listener on the host. A connection waits in its queue, so nobody has to accept for one to count."""

    def __init__(self, family: int, address: Any, kind: int = socket.SOCK_STREAM) -> None:
        self.socket = socket.socket(family, kind)
        self.family, self.kind = family, kind
        if family == socket.AF_INET6:
            self.socket.setsockopt(socket.IPPROTO_IPV6, socket.IPV6_V6ONLY, 1)
        self.socket.bind(address)
        if isinstance(address, str) and address.startswith("/"):
            os.chmod(address, 0o777)
        if kind != socket.SOCK_DGRAM:
            self.socket.listen(8)
        self.socket.setblocking(False)
        self.address = self.socket.getsockname()
        with socket.socket(family, kind) as visitor:  # it works: from the host it can be reached
            visitor.connect(self.address)
            visitor.send(b"host")
            assert self.visited()
        assert not self.visited()

    def visited(self) -> bool:
        """Whether somebody has come since the last look."""
        try:
            if self.kind == socket.SOCK_DGRAM:
                self.socket.recv(16)
            else:
                self.socket.accept()[0].close()
        except BlockingIOError:
            return False
        return True


@pytest.fixture
def canary() -> Iterator[Any]:
    """Makes canaries and takes them and their files away."""
    with ExitStack() as stack:

        def make(family: int, address: Any, kind: int = socket.SOCK_STREAM) -> Canary:
            listener = Canary(family, address, kind)
            stack.callback(listener.socket.close)
            if isinstance(address, str) and address.startswith("/"):
                stack.callback(os.unlink, address)
            return listener

        yield make


def own_addresses() -> list[str]:
    """The host's own addresses that are not loopback; nothing is sent to find them."""
    found = []
    for target, family in (("192.0.2.1", socket.AF_INET), ("2001:db8::1", socket.AF_INET6)):
        with socket.socket(family, socket.SOCK_DGRAM) as probe, suppress(OSError):
            probe.connect((target, 9))  # of a datagram socket: only chooses a source address
            found.append(probe.getsockname()[0])
    return [address for address in found if not ipaddress.ip_address(address).is_loopback]


def server(path: str, name: str) -> str:
    """A place on the host for a socket of this name that no other test run uses."""
    return f"{path}/{name}-{uuid.uuid4().hex[:8]}"


# ---- 15 to 19: the host's sockets ----


PATH_SOCKETS = {
    "v15_docker": (("docker.sock", "/run", "/var/run"), "DOCKER_HOST"),
    "v16_ssh_agent": (("ssh-agent", "/tmp", "/dev/shm"), "SSH_AUTH_SOCK"),
    "v16_gpg_agent": (("S.gpg-agent", "/run", "/tmp"), "GPG_AGENT_INFO"),
    "v17_session_bus": (("bus", "/run", "/tmp"), "DBUS_SESSION_BUS_ADDRESS"),
    "v17_systemd_private": (("systemd-private", "/run", "/tmp"), "XDG_RUNTIME_DIR"),
    "v19_wayland": (("wayland-9", "/run", "/tmp"), "WAYLAND_DISPLAY"),
    "v19_tmux": (("tmux-default", "/tmp", "/var/tmp"), "TMUX"),
}


@pytest.mark.parametrize("user", ["agent", "root"])
@pytest.mark.parametrize("name", PATH_SOCKETS)
async def test_path_sockets_of_the_host_are_absent(name: str, user: str, make_box: MakeBox, canary: Any) -> None:
    (leaf, *places), variable = PATH_SOCKETS[name]
    places = [place for place in (*places, "/dev/shm", "/var/tmp") if os.access(place, os.W_OK)]
    assert places
    listeners = [
        canary(socket.AF_UNIX, server(place, leaf), kind)
        for place in places
        for kind in (socket.SOCK_STREAM, socket.SOCK_DGRAM)
    ]
    paths = [listener.address for listener in listeners]
    box = await make_box(user=user, environment={**os.environ, variable: f"{MARK}:{paths[0]}"})
    got = await attack(
        box,
        """
tried = {}
for path, kind in ARGS[0]:
    tried[path] = [os.path.lexists(path), attempt(reach, socket.AF_UNIX, kind, path)]
    for way in ("/proc/self/root", "/proc/1/root", "/proc/self/cwd/../../../../.."):
        tried[way + path] = [os.path.lexists(way + path), attempt(reach, socket.AF_UNIX, kind, way + path)]
answer([tried, dict(os.environ)])
""",
        [[listener.address, listener.kind] for listener in listeners],
    )
    tried, environment = got
    assert len(tried) == 4 * len(listeners)
    assert {tuple(outcome) for outcome in tried.values()} == {(False, "ENOENT")}, tried
    assert variable not in environment and MARK not in str(environment)
    assert not any(listener.visited() for listener in listeners)


async def test_v15_a_socket_in_a_shown_tree_cannot_be_reached(make_box: MakeBox, canary: Any, tmp_path: Path) -> None:
    # Read-only is no obstacle to connect(2): whoever sees a socket's own inode can talk to its owner.
    tree = tmp_path / "tree"
    tree.mkdir()
    listeners = [canary(socket.AF_UNIX, f"{tree}/s{kind}", kind) for kind in (socket.SOCK_STREAM, socket.SOCK_DGRAM)]
    os.mkfifo(tree / "fifo", 0o666)
    os.chmod(tree / "fifo", 0o666)
    reader = os.open(tree / "fifo", os.O_RDONLY | os.O_NONBLOCK)
    try:
        box = await make_box(policy=Policy(filesystem=Filesystem(read=(str(tree),))))
        got = await attack(
            box,
            """
def write(path):
    fd = os.open(path, os.O_WRONLY | os.O_NONBLOCK)
    os.write(fd, b"attack")
answer([os.listdir(ARGS[0])] + [attempt(reach, socket.AF_UNIX, kind, path) for path, kind in ARGS[1]]
       + [attempt(write, ARGS[0] + "/fifo")])
""",
            str(tree),
            [[listener.address, listener.kind] for listener in listeners],
        )
        assert len(got[0]) == 3  # seen, and yet
        assert got[1:3] == ["ECONNREFUSED"] * 2
        assert got[3] in ("ENXIO", "EACCES")  # a fifo of its own that nobody reads
        assert os.read(reader, 16) == b""
    finally:
        os.close(reader)
    assert not any(listener.visited() for listener in listeners)


async def test_v15_a_socket_in_the_workspace_cannot_be_reached(make_box: MakeBox, canary: Any, workspace: Path) -> None:
    workspace.chmod(0o777)
    kinds = (socket.SOCK_STREAM, socket.SOCK_DGRAM)
    listeners = [canary(socket.AF_UNIX, f"{workspace}/{kind}", kind) for kind in kinds]
    box = await make_box()
    got = await attack(
        box,
        """
found = [attempt(reach, socket.AF_UNIX, kind, path) for path, kind in ARGS[0]]
for path, kind in ARGS[0]:
    os.link(path, path + ".link")
    os.chmod(path + ".link", 0o777)  # copied up: certainly not the host's any more
    found.append(attempt(reach, socket.AF_UNIX, kind, path + ".link"))
answer(found)
""",
        [[listener.address, listener.kind] for listener in listeners],
    )
    assert got == ["ECONNREFUSED"] * 4
    assert not any(listener.visited() for listener in listeners)


@pytest.mark.parametrize("user", ["agent", "root"])
async def test_v18_abstract_sockets_of_the_host_are_not_there(user: str, make_box: MakeBox, canary: Any) -> None:
    listeners = [
        canary(socket.AF_UNIX, f"\0{MARK}-{uuid.uuid4().hex}-{kind}", kind)
        for kind in (socket.SOCK_STREAM, socket.SOCK_DGRAM, socket.SOCK_SEQPACKET)
    ]
    box = await make_box(user=user)
    got = await attack(
        box,
        """
found = [attempt(reach, socket.AF_UNIX, kind, "\\0" + name) for name, kind in ARGS[0]]
own = socket.socket(socket.AF_UNIX)
found.append(attempt(own.bind, "\\0" + ARGS[0][0][0]))  # the name is free: another namespace
answer([found, open("/proc/net/unix").read()])
""",
        [[listener.address[1:].decode(), listener.kind] for listener in listeners],
    )
    assert got[0] == ["ECONNREFUSED"] * 3 + ["DONE"]
    # Of the host's sockets only the sandbox's own new one of the same name is in the list.
    assert got[1].count(MARK) == 1
    assert not any(listener.visited() for listener in listeners)


async def test_v19_x11_is_not_reachable_by_path_or_by_name(make_box: MakeBox, canary: Any) -> None:
    number = 7000 + os.getpid() % 1000
    path = f"/tmp/.X11-unix/X{number}"
    with suppress(FileExistsError):
        os.mkdir("/tmp/.X11-unix")
        os.chmod("/tmp/.X11-unix", 0o1777)  # as systemd-tmpfiles makes it
    listeners = [canary(socket.AF_UNIX, f"\0{path}")]
    if os.access("/tmp/.X11-unix", os.W_OK):
        listeners.append(canary(socket.AF_UNIX, path))
    else:
        assert not IS_ROOT
    box = await make_box(environment={**os.environ, "DISPLAY": f":{number}", "XAUTHORITY": "/root/.Xauthority"})
    got = await attack(
        box,
        """
answer([attempt(reach, socket.AF_UNIX, socket.SOCK_STREAM, ARGS[0]),
        attempt(reach, socket.AF_UNIX, socket.SOCK_STREAM, "\\0" + ARGS[0]),
        attempt(reach, socket.AF_INET, socket.SOCK_STREAM, ("127.0.0.1", 6000)),
        os.path.exists("/tmp/.X11-unix"), os.environ.get("DISPLAY"), os.environ.get("XAUTHORITY")])
""",
        path,
    )
    assert got == ["ENOENT", "ECONNREFUSED", "ECONNREFUSED", False, None, None]
    assert not any(listener.visited() for listener in listeners)


# ---- 20: descriptors ----

FDS = """
table = {}
for name in os.listdir("/proc/self/fd"):
    try:
        table[name] = os.readlink("/proc/self/fd/" + name)
    except OSError:
        pass  # the descriptor of the listing itself
"""


@pytest.mark.parametrize("streamed", [False, True])
async def test_v20_no_descriptor_of_the_caller_is_inherited(streamed: bool, make_box: MakeBox, tmp_path: Path) -> None:
    secret = tmp_path / "secret"
    secret.write_text(MARK)
    inherited = [
        os.open("/", os.O_RDONLY | os.O_DIRECTORY),
        os.open(tmp_path, os.O_PATH),
        os.open(secret, os.O_RDWR),
        os.open("/proc/self/ns/mnt", os.O_RDONLY),
        os.memfd_create("canary", 0),
    ]
    left, right = socket.socketpair()
    high = os.dup2(inherited[0], 777)
    try:
        for fd in (*inherited, left.fileno(), right.fileno(), high):
            os.set_inheritable(fd, True)
        box = await make_box()
        if streamed:
            process = await box.start_process([PYTHON, "-c", PRELUDE + FDS + "answer(table)", "[]"])
            table = json.loads(await process.stdout.read())
            await process.wait()
        else:
            table = await attack(box, FDS + "answer(table)")
        assert sorted(table) == ["0", "1", "2"]
        assert all(target.startswith("pipe:") for target in table.values())
        for pid in (int(p) for p in os.listdir("/proc") if p.isdecimal()):  # the host's view of those that stay
            with suppress(OSError):
                parent = Path(f"/proc/{pid}/stat").read_text().rpartition(") ")[2].split()[1]
                if box.core.keeper not in (pid, int(parent)):
                    continue
                # Not even the caller may look, unless it is root.
                held = [os.stat(f"/proc/{pid}/fd/{fd}") for fd in os.listdir(f"/proc/{pid}/fd")]
                assert not any(os.path.samestat(status, os.fstat(fd)) for status in held for fd in inherited)
    finally:
        for fd in (*inherited, high):
            os.close(fd)
        left.close()
        right.close()
    assert secret.read_text() == MARK


async def test_v20_a_terminal_is_the_only_descriptor_of_a_command_on_one(make_box: MakeBox) -> None:
    process = await (await make_box()).start_process(
        [PYTHON, "-c", PRELUDE + FDS + "answer(table)", "[]"], terminal=(24, 80)
    )
    table = json.loads(await process.stdout.read())
    await process.wait()
    assert sorted(table) == ["0", "1", "2"]
    assert {target.rpartition("/")[0] for target in table.values()} == {"/dev/pts"}


def _exec_on(box: Sandbox, stdio: tuple[int, int, int], code: str, *arguments: object) -> asyncio.Future[Exit]:
    ended: asyncio.Future[Exit] = asyncio.get_running_loop().create_future()
    box.core.exec([PYTHON, "-c", PRELUDE + code, json.dumps(arguments)], stdio, ended.set_result)
    return ended


async def test_v20_stdio_cannot_be_reopened_with_more_rights(make_box: MakeBox, tmp_path: Path) -> None:
    # Worse than any face of Corral does it: the command gets a host file itself, open for reading only.
    secret = tmp_path / "given"
    secret.write_text("given")
    secret.chmod(0o666)
    os.utime(secret, (1, 1))
    before = secret.stat()
    box = await make_box()
    given = os.open(secret, os.O_RDONLY)
    reader, writer = os.pipe()
    try:
        ended = _exec_on(
            box,
            (given, writer, writer),
            """
link = "/proc/self/fd/0"
answer([attempt(os.open, link, how) for how in (os.O_RDONLY, os.O_WRONLY, os.O_RDWR, os.O_WRONLY | os.O_TRUNC)]
       + [attempt(os.open, "/dev/stdin", os.O_RDWR), attempt(os.truncate, link, 0), attempt(os.ftruncate, 0, 0),
          attempt(os.write, 0, b"x"), attempt(os.link, link, "/tmp/hard"), attempt(os.listdir, link + "/..")])
""",
        )
        os.close(writer)
        got = json.loads(await asyncio.to_thread(os.read, reader, 1 << 16))
        assert (await ended).code == 0
    finally:
        os.close(given)
        os.close(reader)
    assert got[:6] == ["EACCES"] * 6
    assert got[6:] == ["EINVAL", "EBADF", "EXDEV", "ENOTDIR"]
    after = secret.stat()
    assert secret.read_text() == "given"
    assert (after.st_mode, after.st_mtime_ns, after.st_nlink) == (before.st_mode, before.st_mtime_ns, 1)


async def test_v20_a_directory_of_the_host_is_refused_as_stdio(make_box: MakeBox) -> None:
    box = await make_box()
    root, null = os.open("/", os.O_RDONLY | os.O_DIRECTORY), os.open("/dev/null", os.O_RDWR)
    try:
        result = await _exec_on(box, (root, null, null), "answer(os.listdir(0))")
    finally:
        os.close(root)
        os.close(null)
    assert isinstance(result.error, ExecError) and "directory" in str(result.error)


STEAL = r"""
#include <errno.h>
#include <stdio.h>
#include <stdlib.h>
#include <sys/syscall.h>
#include <unistd.h>
int main(int argc, char **argv) {
  for (int i = 1; i < argc; i++) {
    int pid = atoi(argv[i]), pidfd = syscall(SYS_pidfd_open, pid, 0), open_errno = errno, taken = 0;
    for (int fd = 0; fd < 8 && !taken; fd++)
      taken = syscall(438 /* pidfd_getfd */, pidfd, fd, 0) >= 0;
    printf("%d %d %d %d\n", pid, pidfd < 0 ? open_errno : 0, taken, errno);
  }
}
"""


@pytest.mark.parametrize("user", ["agent", "root"])
async def test_v20_descriptors_cannot_be_taken_from_pid_1_or_the_keeper(
    user: str, make_box: MakeBox, compile_c: Compile
) -> None:
    program = compile_c(STEAL, "steal")
    box = await make_box(user=user)
    keeper, controller = box.core.keeper, os.getpid()
    result = await box.exec([program, "1", str(keeper), str(controller)], timeout=30)
    rows = [[int(field) for field in line.split()] for line in result.text.splitlines()]
    assert rows[0] == [1, 0, 0, errno.EPERM]  # it is there; nothing can be taken
    assert rows[1] == [keeper, errno.ESRCH, 0, errno.EPERM] and rows[2][1:] == [errno.ESRCH, 0, errno.EPERM]
    got = await attack(
        box,
        """
paths = [f"/proc/{pid}/{what}" for pid in ARGS for what in ("fd", "fd/3", "environ", "root", "cwd", "mem", "maps")]
answer([attempt(os.open, path, os.O_RDONLY) for path in paths])
""",
        1,
        keeper,
        controller,
    )
    assert set(got) == {"ENOENT"}


async def test_v20_scm_rights_reach_nobody_outside(make_box: MakeBox, canary: Any, tmp_path: Path) -> None:
    path, name = server("/tmp", "receiver"), f"\0{MARK}-{uuid.uuid4().hex}"
    outside = [canary(socket.AF_UNIX, path, socket.SOCK_DGRAM), canary(socket.AF_UNIX, name, socket.SOCK_DGRAM)]
    got = await attack(
        await make_box(),
        """
rights = [(socket.SOL_SOCKET, socket.SCM_RIGHTS, array.array("i", [os.open("/", os.O_RDONLY)]))]
s = socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM)
answer([attempt(s.sendmsg, [b"take"], rights, 0, where) for where in (ARGS[0], "\\0" + ARGS[1])]
       + [attempt(lambda: socket.socket(socket.AF_UNIX, 1, 0, fd).sendmsg([b"take"], rights)) for fd in (0, 1, 2)])
""",
        path,
        name[1:],
    )
    assert got == ["ENOENT", "ECONNREFUSED", "ENOTSOCK", "ENOTSOCK", "ENOTSOCK"]
    assert not any(listener.visited() for listener in outside)


async def test_v21_a_datagram_pair_cannot_be_connected_elsewhere(make_box: MakeBox, canary: Any) -> None:
    path, name = server("/tmp", "dgram"), f"\0{MARK}-{uuid.uuid4().hex}"
    outside = [canary(socket.AF_UNIX, path, socket.SOCK_DGRAM), canary(socket.AF_UNIX, name, socket.SOCK_DGRAM)]
    got = await attack(
        await make_box(),
        """
found = []
for where in (ARGS[0], "\\0" + ARGS[1]):
    ours, _ = socket.socketpair(socket.AF_UNIX, socket.SOCK_DGRAM)
    found += [attempt(ours.connect, where), attempt(ours.sendto, b"attack", where)]
answer(found)
""",
        path,
        name[1:],
    )
    assert got == ["ENOENT", "ENOENT", "ECONNREFUSED", "ECONNREFUSED"]
    assert not any(listener.visited() for listener in outside)


# ---- 22, 23: exotic families ----

# family, type, protocol -> errno. The filter's own answers, which the kernel would not give by nature.
FAMILIES: dict[str, tuple[int, int, int, str]] = {
    "v22_vsock_stream": (40, 1, 0, "EAFNOSUPPORT"),
    "v22_vsock_dgram": (40, 2, 0, "EAFNOSUPPORT"),
    "v23_alg": (38, 5, 0, "EAFNOSUPPORT"),
    "v23_rxrpc": (33, 2, 2, "EAFNOSUPPORT"),
    "v23_packet": (17, 3, 0x0300, "EAFNOSUPPORT"),
    "v23_xdp": (44, 3, 0, "EAFNOSUPPORT"),
    "v23_key": (15, 3, 2, "EAFNOSUPPORT"),
    "v23_bluetooth": (31, 3, 1, "EAFNOSUPPORT"),
    "v23_can": (29, 3, 1, "EAFNOSUPPORT"),
    "v23_tipc": (30, 1, 0, "EAFNOSUPPORT"),
    "v23_smc": (43, 1, 0, "EAFNOSUPPORT"),
    **{
        f"v23_netlink_{name}": (16, 3, number, "EPROTONOSUPPORT")
        for name, number in (
            ("sock_diag", 4), ("xfrm", 6), ("selinux", 7), ("audit", 9), ("connector", 11), ("netfilter", 12),
            ("uevent", 15), ("generic", 16), ("crypto", 21), ("rdma", 20),
        )
    },
    "v12_raw_icmp": (2, 3, 1, "EPERM"),
    "v12_raw_ip": (2, 3, 255, "EPERM"),
    "v12_raw_v6": (10, 3, 58, "EPERM"),
    "v12_ping": (2, 2, 1, "EACCES"),
    "v12_ping_v6": (10, 2, 58, "EACCES"),
    "v23_sctp": (2, 1, 132, "EPROTONOSUPPORT"),
    "v23_mptcp": (2, 1, 262, "EPROTONOSUPPORT"),
    "v23_udplite": (2, 2, 136, "EPROTONOSUPPORT"),
    "v23_dccp": (2, 6, 33, "ESOCKTNOSUPPORT"),
}  # fmt: skip

SOCKETS = r"""
#include <errno.h>
#include <stdio.h>
#include <stdlib.h>
#include <sys/syscall.h>
#include <unistd.h>
int main(int argc, char **argv) {
  for (int i = 1; i + 2 < argc; i += 3) {
    /* Each also with rubbish in the upper halves, which the kernel ignores and a filter might not. */
    long family = atol(argv[i]), type = atol(argv[i + 1]), protocol = atol(argv[i + 2]), high = 1L << 32 | 1L << 63;
    for (int dirty = 0; dirty < 2; dirty++) {
      errno = 0;
      long bits = dirty ? high : 0;
      syscall(SYS_socket, family | bits, type | 02000000 | bits, protocol | bits);
      printf("%d ", errno);
    }
  }
}
"""


@pytest.mark.parametrize("user", ["agent", "root"])
async def test_v22_v23_exotic_families_are_refused(user: str, make_box: MakeBox, compile_c: Compile) -> None:
    program = compile_c(SOCKETS, "sockets")
    box = await make_box(user=user)
    numbers = [str(number) for row in FAMILIES.values() for number in row[:3]]
    result = await box.exec([program, *numbers, "1", "1", "0"], timeout=30)
    got = [int(number) for number in result.text.split()]
    wanted = [getattr(errno, row[3]) for row in FAMILIES.values() for _ in range(2)]
    assert dict(zip(FAMILIES, zip(got[::2], got[1::2], strict=True), strict=False)) == dict(
        zip(FAMILIES, zip(wanted[::2], wanted[1::2], strict=True), strict=True)
    )
    assert got[-2:] == [0, 0]  # the program does make sockets where it may


@pytest.mark.parametrize("user", ["agent", "root"])
async def test_v23_routes_links_and_addresses_cannot_be_changed(user: str, make_box: MakeBox) -> None:
    got = await attack(
        await make_box(user=user),
        """
def request(kind, flags, body):
    with socket.socket(socket.AF_NETLINK, socket.SOCK_RAW, socket.NETLINK_ROUTE) as s:
        s.send(struct.pack("=IHHII", 16 + len(body), kind, flags | 5, 1, 0) + body)
        data = s.recv(4096)
    kind, = struct.unpack_from("=H", data, 4)
    number, = struct.unpack_from("=i", data, 16)
    return errno.errorcode.get(-number, str(number)) if kind == 2 else "DATA"
gateway = socket.inet_aton("127.0.0.1")
route = struct.pack("=BBBBBBBBI", 2, 0, 0, 0, 254, 4, 253, 1, 0) + struct.pack("=HHI", 8, 4, 1)
link = struct.pack("=BxHiII", 0, 0, 1, 0, 1)
veth = struct.pack("=BxHiII", 0, 0, 0, 0, 0) + struct.pack("=HHHH5s3x", 16, 18, 9, 1, b"veth0")
address = struct.pack("=BBBBI", 2, 32, 0, 0, 1) + struct.pack("=HH4s", 8, 2, socket.inet_aton("192.0.2.1"))
rule = struct.pack("=BBBBBBBBI", 2, 0, 0, 0, 254, 0, 0, 1, 0)
answer({"route": request(24, 0x600, route), "unroute": request(25, 0, route), "link": request(16, 0, link),
        "veth": request(16, 0x600, veth), "address": request(20, 0x600, address), "rule": request(32, 0x600, rule),
        "neighbour": request(28, 0x600, struct.pack("=BxHiHBB", 2, 0, 1, 2, 0, 0)),
        "dump": request(18, 0x300, struct.pack("=BxHiII", 0, 0, 0, 0, 0)),
        "names": [name for _, name in socket.if_nameindex()]})
""",
    )
    assert got.pop("dump") == "DATA"  # looking is allowed, so the rest was understood as well
    assert got.pop("names") == ["lo"]
    assert set(got.values()) == {"EPERM"}, got


# ---- 24 and the empty network ----


@pytest.mark.parametrize(("policy", "answer"), [(Policy(), "EACCES"), (OPEN, "ENETUNREACH")])
async def test_v24_nothing_outside_is_routed(
    make_box: MakeBox, policy: Policy, answer: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(prepare, "has_way_out", lambda _: False)  # what stands behind the policy's answer
    targets = [[2, host] for host in (*OUTSIDE_V4, "255.255.255.255", "224.0.0.1")]
    targets += [[10, host] for host in (*OUTSIDE_V6, "::ffff:192.0.2.1", "64:ff9b::c000:201")]
    got = await attack(
        await make_box(policy=policy),
        """
answer([[host, attempt(reach, family, kind, (host, port)) ]
        for family, host in ARGS[0] for kind in (socket.SOCK_STREAM, socket.SOCK_DGRAM) for port in (53, 443)])
""",
        targets,
    )
    assert len(got) == 4 * len(targets)
    assert {outcome for host, outcome in got if host not in ("255.255.255.255",)} == {answer}, got
    assert {outcome for host, outcome in got if host == "255.255.255.255"} <= {"ENETUNREACH", "EACCES"}, got


@pytest.mark.parametrize("policy", [Policy(), OPEN], ids=["default", "open"])
@pytest.mark.parametrize("user", ["agent", "root"])
async def test_v24_listeners_of_the_host_are_not_reachable(
    user: str, policy: Policy, make_box: MakeBox, canary: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(prepare, "has_way_out", lambda _: False)
    # The last two are asked for through addresses of the sandbox's own loopback that mean the host elsewhere.
    hosts = ["127.0.0.1", "::1", *own_addresses()]
    listeners = []
    for host in hosts:
        family = socket.AF_INET6 if ":" in host else socket.AF_INET
        listeners += [canary(family, (host, 0), kind) for kind in (socket.SOCK_STREAM, socket.SOCK_DGRAM)]
    tries = [[listener.family, listener.kind, listener.address[:2]] for listener in listeners]
    port = listeners[0].address[1]
    tries += [[2, 1, ("0.0.0.0", port)], [10, 1, ("::", port)], [10, 1, ("::ffff:127.0.0.1", port)]]
    got = await attack(
        await make_box(user=user, policy=policy),
        """
def talk(family, kind, address):
    with socket.socket(family, kind) as s:
        s.settimeout(2)
        s.connect(tuple(address))
        s.send(b"attack")
        s.recv(1)  # of a datagram: here its refusal arrives
answer([attempt(talk, *row) for row in ARGS[0]])
""",
        tries,
    )
    other = "ENETUNREACH" if policy is OPEN else "EACCES"
    assert set(got) <= {"ECONNREFUSED", other}, list(zip(tries, got, strict=True))
    assert not any(listener.visited() for listener in listeners)


async def test_v24_a_listener_inside_is_not_reachable_from_the_host(make_box: MakeBox, workspace: Path) -> None:
    box = await make_box()
    process = await box.start_process(
        [
            PYTHON,
            "-c",
            PRELUDE
            + """
made = []
for family, host in ((2, "0.0.0.0"), (10, "::")):
    s = socket.socket(family)
    if family == 10:
        s.setsockopt(socket.IPPROTO_IPV6, socket.IPV6_V6ONLY, 1)
    s.bind((host, 0))
    s.listen()
    made.append(s)
abstract = socket.socket(socket.AF_UNIX)
abstract.bind("\\0" + ARGS[0])
abstract.listen()
path = socket.socket(socket.AF_UNIX)
path.bind(ARGS[1])
path.listen()
print(json.dumps([s.getsockname()[1] for s in made]), flush=True)
sys.stdin.read()
came = []
for s in (*made, abstract, path):
    s.setblocking(False)
    came.append(attempt(s.accept))
answer(came)
""",
            json.dumps([MARK, f"{workspace}/inside.sock"]),
        ]
    )
    four, six = json.loads(await process.stdout.readline())
    tries: list[tuple[int, Any]] = [(socket.AF_UNIX, f"\0{MARK}"), (socket.AF_UNIX, f"{workspace}/inside.sock")]
    for host in ("127.0.0.1", "::1", *own_addresses()):
        tries.append((socket.AF_INET6, (host, six)) if ":" in host else (socket.AF_INET, (host, four)))
    for kind, address in tries:
        with socket.socket(kind) as visitor:
            visitor.settimeout(5)
            with pytest.raises((ConnectionRefusedError, FileNotFoundError)):
                visitor.connect(address)
    process.close_stdin()
    assert json.loads(await process.stdout.readline()) == ["EAGAIN"] * 4
    await process.wait()


async def test_v24_an_inward_listener_gives_its_own_port_and_nothing_else(make_box: MakeBox, canary: Any) -> None:
    neighbour = canary(socket.AF_INET, ("127.0.0.1", 0))
    box = await make_box(listeners=(Listener(8080), Listener(8081, "::1")))
    four, six = (socket.socket(fileno=os.dup(fd)) for fd in box.listeners)
    with four, six:
        assert four.getsockname() == ("127.0.0.1", 8080)
        got = await attack(
            box,
            """
def bind(family, host, port, *options):
    with socket.socket(family) as s:
        for option in options:
            s.setsockopt(socket.SOL_SOCKET, option, 1)
        s.bind((host, port))
        s.listen()
both = (socket.SO_REUSEADDR, socket.SO_REUSEPORT)
answer([[attempt(bind, family, host, port, *options)
         for family, host, port in ((2, "127.0.0.1", 8080), (2, "0.0.0.0", 8080), (10, "::", 8080),
                                    (10, "::ffff:127.0.0.1", 8080), (10, "::1", 8081))
         for options in ((), both[:1], both[1:], both)],
        attempt(reach, 2, 1, ("127.0.0.1", ARGS[0])),
        attempt(reach, 2, 1, ("127.0.0.1", 8082)),
        attempt(reach, 2, 1, ("127.0.0.1", 8080)), attempt(reach, 10, 1, ("::1", 8081))])
""",
            neighbour.address[1],
        )
        assert set(got[0]) == {"EADDRINUSE"}, got[0]
        assert got[1:] == ["ECONNREFUSED", "ECONNREFUSED", "DONE", "DONE"]
        for listener in (four, six):  # what the agent sent arrives here, and once
            connection, peer = listener.accept()
            with connection:
                assert connection.recv(16) == b"attack"
                assert ipaddress.ip_address(peer[0]).is_loopback
            with pytest.raises(BlockingIOError):
                listener.accept()
    assert not neighbour.visited()
    with socket.socket() as visitor:  # the port exists inside only
        visitor.settimeout(5)
        with pytest.raises(ConnectionRefusedError):
            visitor.connect(("127.0.0.1", 8080))


async def test_v24_an_accepted_connection_carries_no_descriptor_in(
    make_box: MakeBox, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(prepare, "has_way_out", lambda _: False)
    # A socket that the host holds too could be turned into another one: its options and its peer are per connection.
    box = await make_box(listeners=(Listener(8080),), policy=OPEN)
    with socket.socket(fileno=os.dup(box.listeners[0])) as listener:
        got = await attack(
            box,
            """
s = socket.create_connection(("127.0.0.1", 8080))
rights = [(socket.SOL_SOCKET, socket.SCM_RIGHTS, array.array("i", [0]))]
answer([attempt(s.sendmsg, [b"x"], rights), attempt(s.setsockopt, 6, 31, b"tls\\0"),
        attempt(s.connect, ("192.0.2.1", 80)), attempt(s.connect, ("127.0.0.1", 22))])
""",
        )
        connection, _ = listener.accept()
        with connection:
            connection.settimeout(5)
            data, ancillary, _, _ = connection.recvmsg(16, socket.CMSG_SPACE(struct.calcsize("i")))
    assert got[1:] == ["ENOENT", "EISCONN", "EISCONN"] and ancillary == [], (got, data)


async def test_v24_two_sandboxes_have_two_networks(make_box: MakeBox, tmp_path: Path) -> None:
    other = tmp_path / "other"
    other.mkdir()
    first = await make_box(listeners=(Listener(9090),))
    second = await make_box(other)
    assert await attack(second, 'answer(attempt(reach, 2, 1, ("127.0.0.1", 9090)))') == "ECONNREFUSED"
    with socket.socket(fileno=os.dup(first.listeners[0])) as listener, pytest.raises(BlockingIOError):
        listener.accept()
