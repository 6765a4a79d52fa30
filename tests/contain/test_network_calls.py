"""The network calls that the supervisor does for the agent: the same results as outside, and none of our rights.

``network_cases.py`` makes the calls and prints what came of each. It runs inside, and outside as an ordinary user; what
it prints must be equal.
"""

from __future__ import annotations

import asyncio
import json
import os
import shutil
import socket
import subprocess
import tempfile
from collections.abc import Iterator
from contextlib import ExitStack, suppress
from pathlib import Path
from typing import Any

import pytest

from corral.actions import Verdict
from corral.policy.model import MIB, Network, NetworkRule, Policy, Resources
from corral.sandbox.box import Sandbox
from corral.sandbox.cgroups import Controller, available
from corral.sandbox.core import Exit
from tests.contain.attacks import PRELUDE, PYTHON, inside
from tests.contain.conftest import MakeBox, wait_until

CASES = Path(__file__).with_name("network_cases.py")
GROUPS = [
    "tcp_connects",
    "tcp_without_blocking",
    "tcp_that_hangs",
    "ipv6",
    "udp",
    "wrong_arguments",
    "streams",
    "broken_pipes",
    "many",
    "unix_names",
    "unix_errors",
    "unix_full",
    "descriptors",
    "credentials",
    "programs",
    "netlink",
]
NOBODY = 65534


@pytest.fixture(scope="module")
def place() -> Iterator[str]:
    """A directory that everybody may write to, with the script."""
    path = tempfile.mkdtemp(prefix="corral-network-")
    try:
        os.chmod(path, 0o777)
        shutil.copy(CASES, path)
        yield path
    finally:
        shutil.rmtree(path)


@pytest.mark.parametrize("group", GROUPS)
async def test_the_same_as_outside(group: str, box: Sandbox, workspace: Path, place: str) -> None:
    shutil.copy(CASES, workspace)
    who: dict[str, Any] = {"user": NOBODY, "group": NOBODY, "extra_groups": []} if os.geteuid() == 0 else {}
    command = [PYTHON, f"{place}/{CASES.name}", place, group]
    outside = await asyncio.to_thread(
        lambda: subprocess.run(command, capture_output=True, timeout=120, cwd=place, check=False, **who)
    )
    assert outside.returncode == 0, outside.stderr.decode()
    result = await box.exec([PYTHON, str(workspace / CASES.name), "/tmp", group], timeout=120)
    assert result.stdout.decode().splitlines() == outside.stdout.decode().splitlines(), result.stderr.decode()
    assert result.exit_code == 0


# ---- what our rights would allow ----


async def recorded(box: Sandbox, script: str) -> tuple[Any, dict[str, int]]:
    """What the script told, and what was refused to it, each with how often."""
    result = await box.exec([PYTHON, "-c", f"{PRELUDE}\n{script}"], timeout=60)
    assert result.exit_code == 0, result.stderr
    counts: dict[str, int] = {}
    for denial in result.denials:
        counts[denial.action] = counts.get(denial.action, 0) + denial.count
    return json.loads(result.stdout), counts


async def test_ports_that_need_a_capability_cannot_be_bound(box: Sandbox) -> None:
    got, denials = await recorded(
        box,
        """
ports = [1, 80, 1023, 1024]
tell([[attempt(socket.socket(family, kind).bind, (host, port)) for port in ports]
      for family, host in ((socket.AF_INET, "127.0.0.1"), (socket.AF_INET6, "::1"), (socket.AF_INET6, "::ffff:0.0.0.0"))
      for kind in (socket.SOCK_STREAM, socket.SOCK_DGRAM)])
""",
    )
    assert got == [["EACCES", "EACCES", "EACCES", ""]] * 6
    assert denials == {"kernel.bind": 18}


async def test_control_messages_that_need_a_capability_are_refused(box: Sandbox) -> None:
    got, denials = await recorded(
        box,
        """
receiver = socket.socket(socket.AF_INET, socket.SOCK_DGRAM)
receiver.bind(("127.0.0.1", 0))
six = socket.socket(socket.AF_INET6, socket.SOCK_DGRAM)
six.bind(("::1", 0))
sender = socket.socket(socket.AF_INET, socket.SOCK_DGRAM)
sender6 = socket.socket(socket.AF_INET6, socket.SOCK_DGRAM)
mark = (socket.SOL_SOCKET, 36, struct.pack("I", 7))  # SO_MARK
priority = (socket.SOL_SOCKET, 12, struct.pack("I", 7))
options = (0, 7, bytes((131, 7, 4, 127, 0, 0, 1, 0)))  # IP_RETOPTS, a loose source route
hops = (41, 54, bytes(8))  # IPV6_HOPOPTS
route = (41, 57, bytes((0, 2, 0, 1, 0, 0, 0, 0)) + bytes(16))  # IPV6_RTHDR
tell([attempt(s.sendmsg, [b"x"], [control], 0, to.getsockname())
      for s, to, control in ((sender, receiver, mark), (sender, receiver, priority), (sender, receiver, options),
                             (sender6, six, hops), (sender6, six, route), (sender6, six, mark))]
     + [attempt(s.recv, 10, socket.MSG_DONTWAIT) for s in (receiver, six)])
""",
    )
    assert got == ["EPERM"] * 6 + ["EAGAIN"] * 2
    assert denials == {"kernel.sendmsg": 6}


async def test_route_netlink_is_for_asking_only(box: Sandbox) -> None:
    got, denials = await recorded(
        box,
        """
def netlink(kind, body, flags=5):
    return struct.pack("IHHII", 16 + len(body), kind, flags, 1, 0) + body
link_up = netlink(16, struct.pack("BxHiII", 0, 1, 1, 0, 1))  # RTM_NEWLINK: lo down
address = netlink(20, struct.pack("BBBBI", 2, 8, 0, 0, 1) + struct.pack("HH4s", 8, 2, bytes((10, 9, 8, 7))))
ask = netlink(18, bytes(16), 0x301)
of_pid = netlink(90, bytes(4) + struct.pack("HHI", 8, 2, 1))  # RTM_GETNSID, of a process by its number
answers = []
for messages in (link_up, address, ask + link_up, of_pid):
    s = socket.socket(socket.AF_NETLINK, socket.SOCK_RAW, 0)
    answers += [attempt(s.sendto, messages, (0, 0)), attempt(s.sendmsg, [messages]),
                attempt(s.sendmsg, [messages], [], 0, (0, 0))]
s = socket.socket(socket.AF_NETLINK, socket.SOCK_RAW, 0)
answers += [attempt(s.sendto, ask, (1, 0)), attempt(s.sendto, ask, (0, 1)), attempt(s.connect, (1, 0)),
            attempt(s.connect, (0, 1)), attempt(s.bind, (0, 1 << 29)), attempt(s.bind, (0, 1 << 30)),
            attempt(s.bind, (0, 1))]
tell([answers, [line.split()[0] for line in open("/proc/net/fib_trie") if "10.9.8.7" in line]])
""",
    )
    assert got[0] == ["EPERM"] * 18 + [""]
    assert got[1] == []
    assert denials == {"kernel.sendto": 6, "kernel.sendmsg": 8, "kernel.connect": 2, "kernel.bind": 2}


@pytest.mark.root
async def test_descriptors_in_flight_are_limited_for_the_agent_though_not_for_root(box: Sandbox) -> None:
    # Each pair is sent into the next one and closed: open files of nobody, but held by the kernel.
    got = await inside(
        box,
        """
import array
left, right = socket.socketpair()
answer, sent = "", 0
while not answer and sent < 200_000:
    a, b = socket.socketpair()
    passed = array.array("i", [left.fileno()] * 200)
    answer = attempt(b.sendmsg, [b"x"], [(socket.SOL_SOCKET, socket.SCM_RIGHTS, passed)])
    sent += 200
    left.close(), right.close()
    left, right = a, b
tell([answer, sent])
""",
        timeout=120,
    )
    assert got[0] == "ETOOMANYREFS"


@pytest.mark.skipif(Controller.MEMORY not in available(), reason="no memory cgroup that this user may use")
async def test_what_is_sent_and_not_read_counts_as_the_sandboxs_memory(make_box: MakeBox) -> None:
    box = await make_box(policy=Policy(resources=Resources(memory=128 * MIB)))
    result = await box.exec(
        [
            PYTHON,
            "-c",
            """
import os, socket
for _ in range(2):
    os.fork()
kept, total, told = [], 0, 0
while len(kept) < 1500:
    left, right = socket.socketpair()
    kept.append((left, right))
    left.setblocking(False)
    try:
        while True:
            total += left.sendmsg([bytes(65536)])
    except BlockingIOError:
        pass
    if total - told >= 1 << 20:
        print(total - told, flush=True)
        told = total
""",
        ],
        timeout=120,
    )
    held = sum(int(line) for line in result.stdout.split())
    assert 16 * MIB < held < 160 * MIB, held


async def test_a_socket_of_the_host_reaches_nothing_new(make_box: MakeBox) -> None:
    with ExitStack() as stack:
        canary = stack.enter_context(socket.socket(socket.AF_INET, socket.SOCK_DGRAM))
        canary.bind(("127.0.0.1", 0))
        named = stack.enter_context(socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM))
        named.bind(f"\0corral-canary-{os.getpid()}")
        inherited = [
            stack.enter_context(socket.socket(family, socket.SOCK_DGRAM)) for family in (socket.AF_INET, socket.AF_UNIX)
        ]
        for sock in (canary, named):
            sock.setblocking(False)
        box = await make_box()
        for given in inherited:
            reader, writer = os.pipe()
            ended: asyncio.Future[Exit] = asyncio.get_running_loop().create_future()
            script = """
import errno, json, socket, sys
family, address = int(sys.argv[1]), json.loads(sys.argv[2])
address = tuple(address) if isinstance(address, list) else address.encode()
given = socket.socket(family, socket.SOCK_DGRAM, 0, 0)
def attempt(function, *arguments):
    try:
        function(*arguments)
    except OSError as error:
        return errno.errorcode[error.errno]
print(json.dumps([attempt(given.connect, address), attempt(given.sendto, b"x", address),
                  attempt(given.sendmsg, [b"x"], [], 0, address),
                  attempt(given.bind, ("127.0.0.1", 0) if family == 2 else b"")]))
"""
            to: Any = canary.getsockname() if given.family == socket.AF_INET else named.getsockname().decode()
            command = [PYTHON, "-c", script, str(int(given.family)), json.dumps(to)]
            box.core.exec(command, (given.fileno(), writer, writer), ended.set_result)
            os.close(writer)
            with os.fdopen(reader) as stream:
                text = await asyncio.to_thread(stream.read)
            assert (await ended).code == 0, text
            assert set(json.loads(text)) <= {"EACCES", "EPERM"}, text
            for sock in (canary, named):
                with pytest.raises(BlockingIOError):
                    sock.recv(10)


PASSING = """
import array, ctypes, errno, json, os, socket, sys
given = socket.socket(socket.AF_UNIX, int(sys.argv[1]), 0, 0)
reader, writer = os.pipe()
rights = [(socket.SOL_SOCKET, socket.SCM_RIGHTS, array.array("i", [writer, 0]))]
def attempt(function, *arguments):
    try:
        return function(*arguments)
    except OSError as error:
        return errno.errorcode[error.errno]
own, other = socket.socketpair(socket.AF_UNIX, int(sys.argv[1]))
print(json.dumps([attempt(given.sendmsg, [b"with"], rights), attempt(given.sendmsg, [b"with"], rights, 0, "/name"),
                  attempt(given.sendmsg, [b"plain"]), attempt(given.send, b"plain"),
                  attempt(own.sendmsg, [b"with"], rights), len(other.recvmsg(9, 99)[1])]))
"""


@pytest.mark.parametrize("kind", [socket.SOCK_STREAM, socket.SOCK_SEQPACKET, socket.SOCK_DGRAM])
async def test_no_descriptor_leaves_by_a_socket_of_the_host(make_box: MakeBox, kind: int) -> None:
    """Data goes over it as it was given; whoever is at the other end would act with a descriptor as itself."""
    box = await make_box()
    here, given = socket.socketpair(socket.AF_UNIX, kind)
    with here, given:
        reader, writer = os.pipe()
        ended: asyncio.Future[Exit] = asyncio.get_running_loop().create_future()
        box.core.exec([PYTHON, "-c", PASSING, str(int(kind))], (given.fileno(), writer, writer), ended.set_result)
        os.close(writer)
        with os.fdopen(reader) as stream:
            text = await asyncio.to_thread(stream.read)
        assert (await ended).code == 0, text
        assert json.loads(text) == ["EACCES", "EACCES", 5, 5, 4, 1]
        here.setblocking(False)
        seen = b""
        with suppress(BlockingIOError):
            while True:
                data, control, *_ = here.recvmsg(100, 1000)
                assert not control
                seen += data
        assert seen == b"plain" * 2
    box.core.supervision.flush()
    denied = [one for one in box.core.supervision.recent.all() if one.action.name == "kernel.sendmsg"]
    assert len(denied) == 2 and all(one.verdict is Verdict.DENY and "descriptors" in one.reason for one in denied)


# ---- verdicts ----


def _denying(port: int) -> Policy:
    return Policy(network=Network(deny=(NetworkRule(network="127.0.0.0/8", ports=((port, port),)),)))


async def test_every_way_to_a_denied_address_is_refused(make_box: MakeBox) -> None:
    box = await make_box(policy=_denying(20002))
    got = await inside(
        box,
        """
receivers = [socket.socket(socket.AF_INET, kind) for kind in (socket.SOCK_STREAM, socket.SOCK_DGRAM)]
for receiver in receivers:
    receiver.bind(("0.0.0.0", 20002))
receivers[0].listen(8)
def four(host):
    return bytes((2, 0)) + (20002).to_bytes(2, "big") + socket.inet_aton(host) + bytes(8)
def six(host):
    return bytes((10, 0)) + (20002).to_bytes(2, "big") + bytes(4) + socket.inet_pton(socket.AF_INET6, host) + bytes(4)
fours = [four(host) for host in ("127.0.0.1", "0.0.0.0", "127.255.1.2")]
sixes = [six(host) for host in ("::ffff:127.0.0.1", "::ffff:0.0.0.0")]
answers = {}
def try_all(what, family, kind, address, bound=None):
    for function in ("connect", "sendto"):
        if function == "sendto" and kind == socket.SOCK_STREAM:
            continue
        s = socket.socket(family, kind)
        if bound:
            s.bind(bound)
        ctypes.set_errno(0)
        if function == "connect":
            value = libc.connect(s.fileno(), address, len(address))
        else:
            value = libc.sendto(s.fileno(), b"x", 1, 0, address, len(address))
        answers[f"{what} {function} {kind} {family} {address.hex()}"] = name(ctypes.get_errno()) if value < 0 else value
for kind in (socket.SOCK_STREAM, socket.SOCK_DGRAM):
    for address in fours:
        try_all("plain", socket.AF_INET, kind, address)
        if kind == socket.SOCK_DGRAM:
            try_all("through six", socket.AF_INET6, kind, address)
            s = socket.socket(socket.AF_INET, kind)  # AF_UNSPEC is AF_INET here (udp_sendmsg)
            value = libc.sendto(s.fileno(), b"x", 1, 0, bytes(2) + address[2:], 16)
            answers["unspec" + address.hex()] = name(ctypes.get_errno()) if value < 0 else value
    for address in sixes:
        try_all("mapped", socket.AF_INET6, kind, address)
    try_all("any, bound to mapped", socket.AF_INET6, kind, six("::"), ("::ffff:127.0.0.1", 0))
    try_all("any, bound", socket.AF_INET, kind, four("0.0.0.0"), ("127.0.0.5", 0))
receivers[0].setblocking(False)
seen = [attempt(receivers[0].accept), attempt(receivers[1].recv, 9, socket.MSG_DONTWAIT)]
tell([answers, seen])
""",
    )
    assert set(got[0].values()) == {"EACCES"}, got[0]
    assert len(got[0]) > 20
    assert got[1] == ["EAGAIN", "EAGAIN"]


async def test_a_batch_ends_at_what_is_denied(make_box: MakeBox) -> None:
    box = await make_box(policy=_denying(20002))
    got = await inside(
        box,
        """
class Message(ctypes.Structure):
    _fields_ = (("name", ctypes.c_char_p), ("namelen", ctypes.c_uint),
                ("iov", ctypes.c_void_p), ("iovlen", ctypes.c_size_t),
                ("control", ctypes.c_void_p), ("controllen", ctypes.c_size_t), ("flags", ctypes.c_int),
                ("filler", ctypes.c_int), ("sent", ctypes.c_uint))
def address(port):
    return bytes((2, 0)) + port.to_bytes(2, "big") + bytes((127, 0, 0, 1)) + bytes(8)
receiver, denied = (socket.socket(socket.AF_INET, socket.SOCK_DGRAM) for _ in range(2))
receiver.bind(("127.0.0.1", 20001))
denied.bind(("127.0.0.1", 20002))
text = ctypes.create_string_buffer(b"x", 1)
vector = (ctypes.c_size_t * 2)(ctypes.addressof(text), 1)
ports = [20001] * 4 + [20002, 20001]
place = ctypes.addressof(vector)
batch = (Message * 6)(*(Message(address(port), 16, place, 1, None, 0, 0, 0, 99) for port in ports))
sender = socket.socket(socket.AF_INET, socket.SOCK_DGRAM)
first = libc.sendmmsg(sender.fileno(), batch, 6, 0)
second = libc.sendmmsg(sender.fileno(), ctypes.byref(batch[4]), 2, 0)
tell([first, [m.sent for m in batch], second, name(ctypes.get_errno()),
      [attempt(receiver.recv, 9, socket.MSG_DONTWAIT) for _ in range(5)],
      attempt(denied.recv, 9, socket.MSG_DONTWAIT)])
""",
    )
    assert got == [4, [1, 1, 1, 1, 99, 99], -1, "EACCES", ["", "", "", "", "EAGAIN"], "EAGAIN"]


# ---- ends ----


def _sockets() -> int:
    """How many sockets this process has open."""
    count = 0
    for fd in os.listdir("/proc/self/fd"):
        try:
            count += os.readlink(f"/proc/self/fd/{fd}").startswith("socket:")
        except OSError:
            continue
    return count


async def test_a_caller_that_dies_while_it_waits_leaves_nothing(box: Sandbox) -> None:
    await inside(box, "s = socket.socket(socket.AF_UNIX); s.bind(''); s.listen(1); tell(1)")  # the deputy is there
    before = _sockets()
    result = await box.exec(
        [
            PYTHON,
            "-c",
            """
import os, signal, socket, time
listener = socket.socket(); listener.bind(("127.0.0.1", 0)); listener.listen(0)
named = socket.socket(socket.AF_UNIX); named.bind("\\0full"); named.listen(0)
left, right = socket.socketpair()
def hang_tcp():
    while True:
        s = socket.socket(); kept.append(s); s.connect(listener.getsockname())
def hang_unix():
    while True:
        s = socket.socket(socket.AF_UNIX); kept.append(s); s.connect("\\0full")
def hang_send():
    while True:
        left.sendmsg([bytes(10000)])
kept = []
children = []
for hang in (hang_tcp, hang_unix, hang_send):
    for _ in range(3):
        child = os.fork()
        if child == 0:
            hang()
        children.append(child)
time.sleep(1)
for child in children:
    os.kill(child, signal.SIGKILL)
print([os.waitpid(child, 0)[1] for child in children])
""",
        ],
        timeout=60,
    )
    assert result.stdout.decode().strip() == str([9] * 9), result.stderr
    assert wait_until(lambda: _sockets() <= before), (before, _sockets())
