"""All that a sandbox sends ends up at the gateway's listeners, and nobody inside can change that.

Most sandboxes here run with a filter that allows every call: what is tried is what routes, rules and the lack of
privileges hold by themselves, whatever a supervisor lets pass. The far end is this file: it accepts what arrives.
"""

from __future__ import annotations

import errno
import json
import os
import shutil
import socket
import struct
import subprocess
import textwrap
import threading
from collections.abc import Callable, Iterator
from contextlib import ExitStack, suppress
from dataclasses import replace
from ipaddress import IPv4Address, IPv6Address
from pathlib import Path
from typing import Any

import pytest

from corral.errors import RequestError, WallError
from corral.gateway import capture
from corral.policy.model import Filesystem, Network, NetworkRule, Policy
from corral.sandbox import launcher
from corral.sandbox import prepare as prepare_module
from corral.sandbox.channel import EndReason, ReportType
from corral.sandbox.identity import AGENT_ID, ROOT_ID
from corral.sandbox.options import Listener, Options
from corral.sandbox.outlet import Outlet
from corral.sandbox.plan import Plan
from corral.sandbox.prepare import Prepared, prepare
from corral.sandbox.trial import Trial, readable
from tests.contain.conftest import Compile
from tests.contain.test_launcher import Launched, Walls, findings, no_findings, sanitized  # noqa: F401  # fixtures

NAMED = Policy(network=Network(allow=(NetworkRule(network="0.0.0.0/0"), NetworkRule(network="::/0"))))
NOTHING_NAMED = Policy()
ALLOW = struct.pack("<HBBI", 0x06, 0, 0, 0x7FFF0000)
IP_PKTINFO, SO_ORIGINAL_DST = 8, 80
RESOLV = "nameserver 198.18.0.53\nnameserver fd63:6f72:7261:6c00::53\n"

Start = Callable[..., "Captured"]


class AllowAll:
    """In place of the table: no call is refused or notified."""

    def compile(self) -> bytes:
        return ALLOW


class Captured:
    """One sandbox, and the listeners of the gateway that it was to have."""

    def __init__(self, prepared: Prepared, trial: Trial) -> None:
        self.prepared, self.trial = prepared, trial
        sockets = [socket.socket(fileno=os.dup(fd)) for fd in trial.listeners]
        self.own, self.gateway = sockets[:-4], sockets[-4:]
        self.first = 0
        children = Path(f"/proc/{trial.keeper}/task/{trial.keeper}/children").read_text().split()
        names = {int(pid): Path(f"/proc/{pid}/comm").read_text() for pid in children}
        self.first = next(pid for pid, name in names.items() if name.startswith("corral-init"))

    def close(self) -> None:
        for each in self.own + self.gateway:
            each.close()

    def python(self, code: str, *arguments: str, user: int = AGENT_ID) -> Any:
        """Runs a program inside; what it leaves in ``result``."""
        program = f"{HELPERS}\n{textwrap.dedent(code)}\nprint(json.dumps(result))"
        argv = ["/usr/bin/python3", "-IS", "-c", program, *arguments]
        status, output = self.trial.run(argv, self.prepared.environment, self.prepared.directory, user=user)
        assert status == 0, output
        return json.loads(output.splitlines()[-1])

    def sh(self, script: str, user: int = AGENT_ID) -> tuple[int, str]:
        argv = ["/bin/sh", "-c", script]
        return self.trial.run(argv, self.prepared.environment, self.prepared.directory, user=user)

    def enter(self, *argv: str) -> str:
        """As root of the host in the sandbox's network namespace."""
        command = ["nsenter", "-t", str(self.first), "-n", *argv]
        return subprocess.run(command, check=True, capture_output=True, text=True, timeout=20).stdout


HELPERS = """
import errno, fcntl, json, os, socket, struct, sys, time
result = []

def attempt(function, *arguments):
    try:
        function(*arguments)
    except OSError as error:
        return errno.errorcode.get(error.errno, str(error))
    return "done"

def free(sock):
    # IP_FREEBIND, IPV6_FREEBIND
    sock.setsockopt(*((socket.IPPROTO_IPV6, 78) if sock.family == socket.AF_INET6 else (socket.IPPROTO_IP, 15)), 1)
"""


@pytest.fixture
def start(workspace: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Start]:
    """Starts sandboxes whose filter allows every call, or, ``supervised``, as they are."""
    with ExitStack() as stack:

        def begin(policy: Policy = NAMED, *, supervised: bool = False, pem: bytes = b"", **more: Any) -> Captured:
            with monkeypatch.context() as patched:
                if not supervised:
                    patched.setattr(prepare_module, "find_table", lambda **_: AllowAll())
                if pem:
                    patched.setattr(prepare_module, "make_outlet", lambda *_, **__: Outlet(certificates=pem))
                prepared = prepare(Options(str(workspace), policy=policy, **more))
            try:
                trial = Trial(prepared.plan, prepared.identity.lease)
            finally:
                prepared.identity.release()
            stack.enter_context(trial)
            trial.stand()
            if supervised:
                trial.supervise(prepared)
            made = Captured(prepared, trial)
            stack.callback(made.close)
            return made

        yield begin


# ---- the far end ----


def original_destination(connection: socket.socket) -> tuple[str, int]:
    """ip(7): SO_ORIGINAL_DST, a sockaddr_in; of IPv6 a sockaddr_in6 at its own level."""
    if connection.family == socket.AF_INET:
        raw = connection.getsockopt(socket.IPPROTO_IP, SO_ORIGINAL_DST, 16)
        return str(IPv4Address(raw[4:8])), int.from_bytes(raw[2:4], "big")
    raw = connection.getsockopt(socket.IPPROTO_IPV6, SO_ORIGINAL_DST, 28)
    return str(IPv6Address(raw[8:24])), int.from_bytes(raw[2:4], "big")


class FarEnd:
    """Accepts all that arrives and sends it back, after where it was meant to go, in one line."""

    def __init__(self, captured: Captured) -> None:
        self.arrived: list[tuple[str, int]] = []
        self._captured = captured
        self._ends = False
        self._thread = threading.Thread(target=self._serve)

    def __enter__(self) -> FarEnd:
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._ends = True
        self._thread.join(timeout=10)
        assert not self._thread.is_alive()

    def _serve(self) -> None:
        by_number = {sock.fileno(): sock for sock in self._captured.gateway}
        while not self._ends:
            for number in readable(0.02, *by_number):
                sock = by_number[number]
                (self._answer if sock.type == socket.SOCK_DGRAM else self._accept)(sock)

    def _accept(self, listener: socket.socket) -> None:
        with listener.accept()[0] as connection:
            connection.settimeout(10)
            self.arrived.append(original_destination(connection))
            connection.sendall(f"{self.arrived[-1][0]} {self.arrived[-1][1]}\n".encode())
            with suppress(ConnectionError):
                while data := connection.recv(1 << 16):
                    connection.sendall(data)

    def _answer(self, receiver: socket.socket) -> None:
        """The answer comes from where the datagram was sent to."""
        data, ancillary, _, sender = receiver.recvmsg(2048, 128)
        (level, kind, raw), *_ = ancillary
        if level == socket.IPPROTO_IP:
            assert kind == IP_PKTINFO
            index, _, destination = struct.unpack("=I4s4s", raw)
            self.arrived.append((str(IPv4Address(destination)), 53))
            source = struct.pack("=I4s4s", 0, destination, bytes(4))
        else:
            assert kind == socket.IPV6_PKTINFO
            destination, index = struct.unpack("=16sI", raw)
            self.arrived.append((str(IPv6Address(destination)), 53))
            source = struct.pack("=16sI", destination, 0)
        assert index == 1  # lo
        receiver.sendmsg([data], [(level, kind, source)], 0, sender)


# ---- listeners ----


def test_listeners_come_after_the_sandbox_s_own_in_the_order_that_is_documented(start: Start) -> None:
    made = start(listeners=(Listener(8080), Listener(80, "::1")))
    assert made.prepared.gateway
    assert [sock.getsockname()[:2] for sock in made.own] == [("127.0.0.1", 8080), ("::1", 80)]
    assert [(sock.type, *sock.getsockname()[:2]) for sock in made.gateway] == [
        (socket.SOCK_STREAM, "127.0.0.1", capture.CAPTURE_PORT),
        (socket.SOCK_STREAM, "::1", capture.CAPTURE_PORT),
        (socket.SOCK_DGRAM, "0.0.0.0", capture.DNS_PORT),
        (socket.SOCK_DGRAM, "::", capture.DNS_PORT),
    ]
    for sock in made.gateway:
        assert not os.get_blocking(sock.fileno())
        if sock.family == socket.AF_INET6:
            assert sock.getsockopt(socket.IPPROTO_IPV6, socket.IPV6_V6ONLY) == 1


def test_a_policy_that_names_no_destination_has_no_route_and_no_listener(start: Start) -> None:
    for policy in (NOTHING_NAMED, Policy(network=Network(deny=(NetworkRule(network="192.0.2.0/24"),)))):
        made = start(policy)
        assert not made.prepared.gateway
        assert made.trial.listeners == []
        result = made.python(
            """
            for family, address in ((socket.AF_INET, "192.0.2.1"), (socket.AF_INET6, "2001:db8::1")):
                result.append(attempt(socket.socket(family).connect, (address, 443)))
            result.append("198.18" in open("/etc/resolv.conf").read())
            """
        )
        assert result == ["ENETUNREACH", "ENETUNREACH", False]


def test_an_ask_rule_alone_is_a_destination(start: Start) -> None:
    made = start(Policy(network=Network(ask=(NetworkRule(name="example.com"),))))
    assert made.prepared.gateway
    assert len(made.trial.listeners) == 4


# ---- TCP ----

TO = [
    ("4", "198.18.1.1", 443),
    ("4", "1.2.3.4", 80),
    ("4", "10.0.0.1", 1),
    ("4", "169.254.169.254", 80),
    ("4", "192.168.1.1", 1023),
    ("4", "240.0.0.1", 65535),
    ("4", "8.8.8.8", 53),
    ("6", "fd63:6f72:7261:6c00::1:1", 443),
    ("6", "2001:db8::1", 22),
    ("6", "fd00::1", 1023),
    ("6", "64:ff9b::102:304", 80),
    ("6", "2001:4860:4860::8888", 53),
]


def test_tcp_to_any_address_and_port_arrives_with_its_destination(start: Start) -> None:
    made = start()
    with FarEnd(made) as far:
        result = made.python(
            """
            for kind, address, port in json.loads(sys.argv[1]):
                with socket.socket({"4": socket.AF_INET, "6": socket.AF_INET6}[kind]) as sock:
                    sock.settimeout(5)
                    sock.connect((address, port))
                    sock.sendall(b"hello")
                    result.append([sock.getpeername()[:2], sock.makefile("rb").readline().decode()])
            """,
            json.dumps(TO),
        )
    assert [tuple(peer) for peer, _ in result] == [(address, port) for _, address, port in TO]
    assert [line for _, line in result] == [f"{address} {port}\n" for _, address, port in TO]
    assert far.arrived == [(address, port) for _, address, port in TO]


def test_mapped_addresses_fast_open_and_multipath_arrive_too(start: Start) -> None:
    made = start()
    with FarEnd(made) as far:
        result = made.python(
            """
            with socket.socket(socket.AF_INET6) as sock:
                sock.connect(("::ffff:1.2.3.4", 443))
                result.append(sock.makefile("rb").readline().decode())
            with socket.socket() as sock:
                sock.sendto(b"hello", 0x20000000, ("1.2.3.5", 443))  # MSG_FASTOPEN
                result.append(sock.makefile("rb").readline().decode())
            try:
                sock = socket.socket(socket.AF_INET, socket.SOCK_STREAM, 262)  # IPPROTO_MPTCP
            except OSError:
                result.append("none")
            else:
                with sock:
                    sock.connect(("1.2.3.6", 443))
                    result.append(sock.makefile("rb").readline().decode())
            """
        )
    assert result[:2] == ["1.2.3.4 443\n", "1.2.3.5 443\n"]
    assert result[2] in ("none", "1.2.3.6 443\n")
    assert far.arrived[:2] == [("1.2.3.4", 443), ("1.2.3.5", 443)]


@pytest.mark.parametrize("source", ["", "127.0.0.1", "127.9.9.9", "192.0.2.77", "::1", "2001:db8::77"])
def test_it_arrives_from_any_address_that_the_client_binds(start: Start, source: str) -> None:
    made = start()
    target = "2001:db8::1" if ":" in source else "1.2.3.4"
    with FarEnd(made) as far:
        result = made.python(
            """
            source, target = sys.argv[1:]
            family = socket.AF_INET6 if ":" in target else socket.AF_INET
            data = os.urandom(1 << 20)
            with socket.socket(family) as sock:
                sock.settimeout(10)
                if source:
                    free(sock)
                    sock.bind((source, 0))
                sock.connect((target, 443))
                stream = sock.makefile("rb")
                line = stream.readline()
                for at in range(0, len(data), 1 << 14):
                    sock.sendall(data[at : at + (1 << 14)])
                    assert stream.read(1 << 14) == data[at : at + (1 << 14)]
                sock.shutdown(socket.SHUT_WR)
                result = [line.decode(), stream.read().hex()]
            """,
            source,
            target,
        )
    assert result == [f"{target} 443\n", ""]
    assert far.arrived == [(target, 443)]


@pytest.mark.parametrize("target", ["127.0.0.1", "127.3.2.1", "::1", "0.0.0.0", "::", "::ffff:127.0.0.1"])
def test_who_dials_the_listener_itself_cannot_choose_the_destination(start: Start, target: str) -> None:
    """The gateway refuses such a connection, for its destination is the listener, not what the client has bound."""
    made = start()
    made.python(
        """
        target = sys.argv[1]
        family = socket.AF_INET6 if ":" in target else socket.AF_INET
        sources = {"::1": ("2001:db8::1", "::1"), "::": ("2001:db8::1",), "::ffff:127.0.0.1": ("::ffff:1.2.3.4",)}
        for source in sources.get(target, ("1.2.3.4", "127.0.0.1")):
            sock = socket.socket(family)
            free(sock)
            sock.bind((source, 4430))
            result.append(attempt(sock.connect, (target, 1023)))
            attempt(sock.sendall, b"forged")
            sock.settimeout(0.3)
            attempt(sock.recv, 1)
        """,
        target,
    )
    arrived = []
    for number in readable(0.5, *(sock.fileno() for sock in made.gateway[:2])):
        listener = next(sock for sock in made.gateway if sock.fileno() == number)
        while readable(0, number):
            with listener.accept()[0] as connection:
                arrived.append(original_destination(connection))
    own = {"::": ["::1"], "::ffff:127.0.0.1": ["127.0.0.1"]}.get(target, [target])
    if target == "127.3.2.1":  # the listener has 127.0.0.1 only
        own = []
    if target == "0.0.0.0":  # to the kernel this is the address that the socket is bound to
        own = ["1.2.3.4", "127.0.0.1"]
    assert sorted(set(arrived)) == [(address, capture.CAPTURE_PORT) for address in own]


@pytest.mark.parametrize("targets", [("1.2.3.4", "1.2.3.5"), ("2001:db8::1", "2001:db8::2")])
def test_one_source_port_to_several_destinations_at_once(start: Start, targets: tuple[str, str]) -> None:
    """Redirected, both would be the same connection, were the source of the second one not translated."""
    made = start()
    result = made.python(
        """
        family = socket.AF_INET6 if ":" in sys.argv[1] else socket.AF_INET
        kept = []
        for target in sys.argv[1:]:
            sock = socket.socket(family)
            sock.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            sock.bind(("::1" if ":" in target else "127.0.0.1", 4430))
            sock.settimeout(3)
            result.append(attempt(sock.connect, (target, 443)))
            kept.append(sock)
        """,
        *targets,
    )
    assert result == ["done", "done"]
    listener = made.gateway[":" in targets[0]]
    arrived = []
    for _ in targets:
        with listener.accept()[0] as connection:
            arrived.append(original_destination(connection))
    assert arrived == [(target, 443) for target in targets]


def test_without_the_gateway_connections_are_refused_and_nobody_inside_keeps_its_listeners(start: Start) -> None:
    made = start()
    made.close()
    for fd in made.trial.listeners:
        os.close(fd)
        made.trial._fds.remove(fd)
    result = made.python(
        """
        for family, address in ((socket.AF_INET, "1.2.3.4"), (socket.AF_INET6, "2001:db8::1")):
            with socket.socket(family) as sock:
                sock.settimeout(5)
                result.append(attempt(sock.connect, (address, 443)))
            with socket.socket(family, socket.SOCK_DGRAM) as sock:
                sock.settimeout(0.2)
                sock.connect((address, 53))
                result.append([attempt(sock.send, b"x"), attempt(sock.recv, 1)])
        """
    )
    # Nobody is told of a datagram that nobody reads: the answer (ICMP) would go to an address that is not loopback's.
    assert result == ["ECONNREFUSED", ["done", "timed out"], "ECONNREFUSED", ["done", "ECONNREFUSED"]]


# ---- the sandbox's own loopback ----

LOOPBACK = """
for family, host in ((socket.AF_INET, "127.0.0.1"), (socket.AF_INET, "127.1.2.3"), (socket.AF_INET6, "::1")):
    with socket.create_server((host, 0), family=family) as server:
        port = server.getsockname()[1]
        for _ in range(20):
            with socket.create_connection((host, port), 5) as ours, server.accept()[0] as theirs:
                ours.sendall(b"over")
                assert theirs.recv(4) == b"over"
                theirs.sendall(b"back")
                assert ours.recv(4) == b"back"
    result.append(attempt(socket.create_connection, (host, port), 5))
    with socket.socket(family, socket.SOCK_DGRAM) as one, socket.socket(family, socket.SOCK_DGRAM) as other:
        one.bind((host, 0))
        one.settimeout(5)
        for _ in range(20):
            other.sendto(b"datagram", one.getsockname())
            data, sender = one.recvfrom(100)
            one.sendto(data, sender)
        port = one.getsockname()[1]
    with socket.socket(family, socket.SOCK_DGRAM) as lost:
        lost.settimeout(5)
        lost.connect((host, port))
        lost.send(b"nobody")
        result.append(attempt(lost.recv, 1))
"""


def test_loopback_inside_is_the_sandbox_s_own_with_its_errors(start: Start) -> None:
    made = start()
    assert made.python(LOOPBACK) == ["ECONNREFUSED"] * 6
    assert not readable(0.1, *(sock.fileno() for sock in made.gateway))


@pytest.mark.root
def test_loopback_and_datagrams_take_no_place_in_the_connection_table(start: Start) -> None:
    """Its entries are memory of the host that no limit counts."""
    made = start()
    tracked = ("cat", "/proc/sys/net/netfilter/nf_conntrack_count")
    made.python(LOOPBACK)
    with FarEnd(made):
        made.python(DATAGRAMS, json.dumps(SERVERS))
        assert made.enter(*tracked) == "0\n"
        made.python('with socket.create_connection(("1.2.3.4", 443)) as sock: sock.recv(1)')
        assert made.enter(*tracked) == "1\n"


# ---- DNS ----

SERVERS = ["198.18.0.53", "8.8.8.8", "127.0.0.1", "fd63:6f72:7261:6c00::53", "2001:4860:4860::8888", "::1"]
DATAGRAMS = """
for server in json.loads(sys.argv[1]):
    with socket.socket(socket.AF_INET6 if ":" in server else socket.AF_INET, socket.SOCK_DGRAM) as sock:
        sock.settimeout(5)
        sock.connect((server, 53))
        sock.send(server.encode())
        result.append(sock.recv(100).decode())
"""


def test_queries_to_any_server_arrive_and_are_answered_from_there(start: Start) -> None:
    made = start()
    with FarEnd(made) as far:
        # Each socket is connected, so only an answer of the very server is received.
        assert made.python(DATAGRAMS, json.dumps(SERVERS)) == SERVERS
    assert far.arrived == [(server, 53) for server in SERVERS]


# ---- everything else ----


def test_other_datagrams_are_refused_at_once(start: Start) -> None:
    made = start()
    result = made.python(
        """
        targets = [("1.2.3.4", 443), ("198.18.0.53", 54), ("10.0.0.1", 52), ("240.0.0.1", 123)]
        targets += [("2001:db8::1", 443), ("fd63:6f72:7261:6c00::53", 5353)]
        for host, port in targets:
            with socket.socket(socket.AF_INET6 if ":" in host else socket.AF_INET, socket.SOCK_DGRAM) as sock:
                result.append(attempt(sock.sendto, b"x", (host, port)))
        """
    )
    assert result == ["EPERM"] * 6


def test_multicast_and_broadcast_go_nowhere(start: Start) -> None:
    made = start()
    result = made.python(
        """
        for host in ("224.0.0.251", "239.255.255.250", "255.255.255.255", "ff02::fb", "ff05::1"):
            with socket.socket(socket.AF_INET6 if ":" in host else socket.AF_INET, socket.SOCK_DGRAM) as sock:
                sock.setsockopt(socket.SOL_SOCKET, socket.SO_BROADCAST, 1)
                result.append([attempt(sock.sendto, b"x", (host, port)) for port in (53, 5353)])
        """
    )
    # To port 53 it is a query for the gateway like any other.
    assert all(other != "done" for _, other in result), result


@pytest.mark.parametrize("user", [AGENT_ID, ROOT_ID])
def test_ports_of_the_gateway_cannot_be_bound(start: Start, user: int) -> None:
    made = start()
    if not made.prepared.identity.has(user):
        pytest.skip("this sandbox has the agent's id only")
    result = made.python(
        """
        for family, hosts in ((socket.AF_INET, ("", "127.0.0.1", "1.2.3.4")), (socket.AF_INET6, ("::", "::1"))):
            for kind in (socket.SOCK_STREAM, socket.SOCK_DGRAM):
                for host in hosts:
                    for port in (1023, 53, 1):
                        with socket.socket(family, kind) as sock:
                            sock.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
                            sock.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEPORT, 1)
                            result.append(attempt(sock.bind, (host, port)))
        """,
        user=user,
    )
    assert set(result) == {"EACCES"}


@pytest.mark.parametrize("user", [AGENT_ID, ROOT_ID])
def test_sockets_below_tcp_and_udp_are_refused(start: Start, user: int) -> None:
    made = start()
    if not made.prepared.identity.has(user):
        pytest.skip("this sandbox has the agent's id only")
    result = made.python(
        """
        kinds = [(socket.AF_INET, socket.SOCK_RAW, 1), (socket.AF_INET, socket.SOCK_RAW, 255)]
        kinds += [(socket.AF_INET6, socket.SOCK_RAW, 58), (socket.AF_PACKET, socket.SOCK_RAW, 0)]
        kinds += [(socket.AF_PACKET, socket.SOCK_DGRAM, 0), (socket.AF_INET, socket.SOCK_DGRAM, 1)]
        kinds += [(socket.AF_INET6, socket.SOCK_DGRAM, 58)]
        for kind in kinds:
            result.append(attempt(socket.socket, *kind))
        with socket.socket() as sock:
            for level, option in ((1, 36), (0, 19), (1, 62)):  # SO_MARK, IP_TRANSPARENT, SO_RCVMARK-like
                result.append(attempt(sock.setsockopt, level, option, 1))
        """,
        user=user,
    )
    assert "done" not in result[:9], result
    assert set(result[:9]) <= {"EPERM", "EACCES"}, result


CHANGES = """
def message(kind, flags, body):
    return struct.pack("=IHHII", 16 + len(body), kind, 0x5 | flags, 0, 0) + body

def answer(protocol, data):
    with socket.socket(socket.AF_NETLINK, socket.SOCK_RAW, protocol) as sock:
        sock.settimeout(2)
        sock.bind((0, 0))
        sock.send(data)
        got = sock.recv(8192)
    assert struct.unpack_from("=H", got, 4)[0] == 2  # NLMSG_ERROR
    return errno.errorcode[-struct.unpack_from("=i", got, 16)[0]]

def change(kind, body):
    batch = struct.pack("=IHHII", 20, 0x10, 1, 0, 0) + struct.pack(">BBH", 0, 0, 10)
    end = struct.pack("=IHHII", 20, 0x11, 1, 0, 0) + struct.pack(">BBH", 0, 0, 10)
    return answer(12, batch + message(10 << 8 | kind, 0, struct.pack(">BBH", 1, 0, 0) + body) + end)

route = struct.pack("=BBBBBBBBI", 2, 0, 0, 0, 255, 4, 254, 2, 0) + struct.pack("=HHI", 8, 4, 1)
route6 = struct.pack("=BBBBBBBBI", 10, 0, 0, 0, 255, 4, 0, 2, 0) + struct.pack("=HHI", 8, 4, 1)
more = struct.pack("=BBBBBBBBI", 2, 8, 0, 0, 254, 4, 0, 1, 0) + struct.pack("=HH4sHHI", 8, 1, bytes(4), 8, 4, 1)
table = struct.pack("=HH8s", 11, 1, b"corral")
result = {
    "route away": answer(0, message(25, 0, route)),
    "IPv6 route away": answer(0, message(25, 0, route6)),
    "another route": answer(0, message(24, 0x400, more)),
    "lo down": answer(0, message(16, 0, struct.pack("=BBHiII", 0, 0, 0, 1, 0, 1))),
    "address": answer(0, message(20, 0x400, struct.pack("=BBBBIHHI", 2, 32, 0, 0, 1, 8, 2, 0x09090909))),
    "new link": answer(0, message(16, 0x600, struct.pack("=BBHiIIHHHH4s", 0, 0, 0, 0, 0, 0, 12, 18, 8, 1, b"tun"))),
    "rule": answer(0, message(32, 0x400, struct.pack("=BBBBBBBBI", 2, 0, 0, 0, 254, 0, 0, 1, 0))),
    "table away": change(2, table),
    "new table": change(0, struct.pack("=HH8s", 10, 1, b"other")),
    "flush rules": change(8, table),
}
"""


@pytest.mark.parametrize("user", [AGENT_ID, ROOT_ID])
def test_routes_rules_and_links_cannot_be_changed(start: Start, user: int) -> None:
    made = start()
    if not made.prepared.identity.has(user):
        pytest.skip("this sandbox has the agent's id only")
    result = made.python(CHANGES, user=user)
    assert len(result) == 10
    assert set(result.values()) == {"EPERM"}, result


@pytest.mark.parametrize("user", [AGENT_ID, ROOT_ID])
@pytest.mark.parametrize(
    "command",
    ["ip link set lo down", "ip route del local default table local", "ip rule add pref 1 table main",
     "ip link add x type dummy", "ip addr add 9.9.9.9/32 dev lo", "nft flush ruleset", "nft delete table inet corral"],
)  # fmt: skip
def test_programs_that_change_them_fail(start: Start, user: int, command: str) -> None:
    if shutil.which(command.split()[0], path="/usr/sbin:/usr/bin:/sbin:/bin") is None:
        pytest.skip(f"{command.split()[0]} is not installed; `make test` as root installs what it needs")
    made = start()
    if not made.prepared.identity.has(user):
        pytest.skip("this sandbox has the agent's id only")
    status, output = made.sh(f"PATH=/usr/sbin:/usr/bin:/sbin:/bin exec {command}", user=user)
    assert status != 0
    assert "not permitted" in output or "Permission denied" in output, output


@pytest.mark.root
def test_the_kernel_has_the_rules_and_routes_that_are_documented(start: Start) -> None:
    made = start()
    if shutil.which("nft") is None:
        pytest.skip("nft is not installed; `apt-get install nftables`")
    assert made.enter("nft", "list", "ruleset") == capture.RULESET
    assert "local default dev lo proto static scope host" in made.enter("ip", "-4", "route", "show", "table", "local")
    assert "local default dev lo proto static" in made.enter("ip", "-6", "route", "show", "table", "local")


# ---- a whole sandbox ----


def test_with_a_supervisor_only_what_is_named_arrives(start: Start) -> None:
    rules = (
        NetworkRule(network="203.0.113.7/32", protocol="tcp"),
        NetworkRule(network="2001:db8::7/128", protocol="tcp"),
    )
    made = start(Policy(network=Network(allow=rules)), supervised=True)
    with FarEnd(made) as far:
        result = made.python(
            """
            for host in ("203.0.113.7", "203.0.113.8", "2001:db8::7", "2001:db8::8"):
                with socket.socket(socket.AF_INET6 if ":" in host else socket.AF_INET) as sock:
                    sock.settimeout(5)
                    reached = attempt(sock.connect, (host, 25)) == "done"
                    result.append(reached and sock.makefile("rb").readline().decode())
            """
        )
    assert result == ["203.0.113.7 25\n", False, "2001:db8::7 25\n", False]
    assert far.arrived == [("203.0.113.7", 25), ("2001:db8::7", 25)]


# ---- a start that fails ----


@pytest.mark.parametrize(
    ("spoil", "wrong"),
    [
        (lambda good: good._replace(messages=good.messages[:-4]), errno.EPROTO),  # the batch has no end
        (lambda good: good._replace(messages=good.messages.replace(b"redir\0", b"redis\0")), errno.ENOENT),
        (lambda good: good._replace(acknowledgements=good.acknowledgements + 1), errno.EPROTO),
        (lambda good: good._replace(acknowledgements=good.acknowledgements - 1), errno.EPROTO),
        (lambda good: good._replace(messages=bytes(16)), errno.EPROTO),
    ],
)
def test_rules_that_the_kernel_does_not_take_end_the_start(
    start: Start, monkeypatch: pytest.MonkeyPatch, spoil: Callable[[capture.Netlink], capture.Netlink], wrong: int
) -> None:
    spoiled = spoil(capture.redirect_messages())
    monkeypatch.setattr(capture, "redirect_messages", lambda: spoiled)
    with pytest.raises(WallError) as caught:
        start()
    assert caught.value.step == "netlink"
    assert caught.value.errno == wrong


@pytest.fixture
def walls() -> Iterator[Callable[..., Launched]]:
    """Launches small walls with these messages as their last step but one, and the gateway's sockets."""
    launched: list[Launched] = []

    def launch_them(messages: capture.Netlink) -> Launched:
        def add(plan: Plan) -> None:
            plan.netlink(*capture.route_messages())
            plan.netlink(*messages)
            plan.listen("::1", capture.CAPTURE_PORT)
            plan.datagram("0.0.0.0", capture.DNS_PORT)
            plan.datagram("::", capture.DNS_PORT)

        made = Walls(inside=add)
        try:
            launched.append(Launched(*launcher.launch(made.plan.compile(), made.identity.lease)))
        finally:
            made.identity.release()
        return launched[-1]

    yield launch_them
    for one in launched:
        one.close()


def test_sanitized_capture(
    walls: Callable[..., Launched],
    findings: Path,  # noqa: F811
) -> None:
    """The steps in C under AddressSanitizer and UndefinedBehaviorSanitizer, as they succeed and as they fail."""
    good = capture.redirect_messages()
    made = walls(good).ready()
    with ExitStack() as stack:
        listener, *_ = [stack.enter_context(socket.socket(fileno=os.dup(fd))) for fd in made.fds[2:5]]
        made.python(
            """
            import socket
            socket.create_connection(("2001:db8::1", 443)).close()
            """
        )
        with listener.accept()[0] as connection:
            assert original_destination(connection) == ("2001:db8::1", 443)
    assert made.end() is EndReason.KILLED
    for bad, wrong in (
        (good._replace(messages=bytes(16)), errno.EPROTO),
        (good._replace(messages=b"x"), errno.EPROTO),
        (good._replace(acknowledgements=64), errno.EPROTO),
        (good._replace(messages=good.messages.replace(b"redir\0", b"redis\0")), errno.ENOENT),
    ):
        failed = walls(bad)
        report = failed.expect(ReportType.FAILED)
        assert (report.step, report.error) == ("netlink", wrong)
        assert failed.ended() is EndReason.FAILED
    no_findings(findings)


# ---- files for the gateway ----

FILES = """
for path in sys.argv[1:]:
    result.append(open(path).read())
    result.append(attempt(open, path, "w"))
    result.append(attempt(os.unlink, path))
    result.append(attempt(os.rename, path, path + ".old"))
    result.append(attempt(os.chmod, path, 0o666))
"""


@pytest.mark.parametrize("user", [AGENT_ID, ROOT_ID])
def test_names_are_asked_of_the_gateway_whatever_anybody_inside_does(start: Start, user: int) -> None:
    made = start()
    if not made.prepared.identity.has(user):
        pytest.skip("this sandbox has the agent's id only")
    result = made.python(FILES, "/etc/resolv.conf", "/run/corral/resolv.conf", user=user)
    for content, *attempts in (result[:5], result[5:]):
        assert [line for line in content.splitlines(keepends=True) if not line.startswith("#")] == RESOLV.splitlines(
            True
        )
        assert "done" not in attempts


def test_certificates_are_where_programs_look_for_them(start: Start) -> None:
    pem = b"-----BEGIN CERTIFICATE-----\n" + b"A" * 300_000 + b"\n-----END CERTIFICATE-----\n"
    made = start(pem=pem)
    paths = ["/run/corral/ca.pem"]
    paths += [path for path in ("/etc/ssl/certs/ca-certificates.crt",) if os.path.isfile(path)]
    for path in paths:
        status, size = made.sh(f"wc -c <{path}; head -c 11 {path}")
        assert status == 0
        assert size.split() == [str(len(pem)), "-----BEGIN"]
        assert made.sh(f"echo more >>{path}")[0] != 0


def test_without_certificates_there_are_none_but_the_system_s(start: Start) -> None:
    made = start()
    assert made.sh("test ! -e /run/corral/ca.pem")[0] == 0


CAT = r"""
#include <stdio.h>
int main(int count, char **paths)
{
    FILE *file = fopen(paths[count - 1], "r");
    for (int byte; file && (byte = getc(file)) != EOF;)
        putchar(byte);
    return !file;
}
"""


@pytest.fixture
def small_root(tmp_path: Path) -> Path:
    """A root file system with the directories that a sandbox mounts on, and no program."""
    root = tmp_path / "root"
    for name in ("etc", "usr", "var", "dev", "proc", "tmp", "run", "home", "root", "sys"):
        (root / name).mkdir(parents=True, mode=0o755)
    root.chmod(0o755)
    return root


@pytest.mark.parametrize(
    "there",
    [None, "nameserver 9.9.9.9\n", "-> ../run/systemd/resolve/stub-resolv.conf", "-> /run/resolvconf/resolv.conf",
     "-> other.conf"],
)  # fmt: skip
def test_a_root_of_its_own_asks_the_gateway_too(
    start: Start, small_root: Path, compile_c: Compile, there: str | None
) -> None:
    place = small_root / "etc/resolv.conf"
    if there and there.startswith("-> "):
        place.symlink_to(there[3:])
    elif there:
        place.write_text(there)
    program = compile_c(CAT, "cat")
    made = start(root=str(small_root), pem=b"PEM\n")
    environment, directory = made.prepared.environment, made.prepared.directory
    status, output = made.trial.run([program, "/etc/resolv.conf"], environment, directory)
    assert status == 0
    assert output.endswith(RESOLV)
    assert made.trial.run([program, "/run/corral/ca.pem"], environment, directory) == (0, "PEM\n")
    assert not place.is_file() or place.read_text() == there


def test_bundles_of_a_root_of_its_own_are_covered_through_links(
    start: Start, small_root: Path, compile_c: Compile
) -> None:
    """Fedora's and Debian's, once as a file and once as a link to it."""
    bundle = small_root / "etc/pki/ca-trust/extracted/pem/tls-ca-bundle.pem"
    for link in ("etc/pki/tls/certs/ca-bundle.crt", "etc/ssl/certs/ca-certificates.crt"):
        (small_root / link).parent.mkdir(parents=True)
        (small_root / link).symlink_to("/etc/pki/ca-trust/extracted/pem/tls-ca-bundle.pem")
    bundle.parent.mkdir(parents=True)
    bundle.write_text("the system's")
    program = compile_c(CAT, "cat")
    made = start(root=str(small_root), pem=b"PEM\n")
    for path in ("/etc/pki/tls/certs/ca-bundle.crt", "/etc/ssl/certs/ca-certificates.crt"):
        assert made.trial.run([program, path], made.prepared.environment, made.prepared.directory) == (0, "PEM\n")
    assert bundle.read_text() == "the system's"


@pytest.mark.parametrize("target", ["/dev/null", "/proc/self/environ", "resolv.conf", "../../../root/x"])
def test_a_root_whose_link_leads_elsewhere_is_refused(start: Start, small_root: Path, target: str) -> None:
    (small_root / "etc/resolv.conf").symlink_to(target)
    with pytest.raises(RequestError, match=r"resolv\.conf of this root leads to"):
        start(root=str(small_root))


def test_a_denied_resolv_conf_stays_denied(start: Start) -> None:
    made = start(replace(NAMED, filesystem=Filesystem(deny=("/etc/resolv.conf",))))
    assert made.sh("cat /etc/resolv.conf") == (0, "")
