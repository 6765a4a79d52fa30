"""The gateway attacked, at its limits, and with faults of its own: what fails fails closed, and the others go on."""

from __future__ import annotations

import asyncio
import errno
import gc
import json
import os
import resource
import signal
import socket
import ssl
import subprocess
import sys
import textwrap
import threading
import time
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import suppress
from pathlib import Path
from typing import Any, Never

import pytest
from hypothesis import HealthCheck, Phase, given, settings
from hypothesis import strategies as st

from corral.actions import Decision, Kind, Verdict
from corral.gateway import connection, exchange, service
from corral.gateway.egress import MAX_FLOWS, Egress
from corral.sandbox.box import Sandbox
from tests.contain.command_line import adopting_orphans, groups_of
from tests.contain.conftest import MakeBox, own_sandbox_processes, wait_until
from tests.contain.gateway_boxes import PYTHON, decisions, live, policy_of, python, reasons, refusals, shell
from tests.internet import places
from tests.internet.world import Internet
from tests.unit.hellos import hello

WEB = "allow: [web.test:80, {name: web.test, port: 443}]"
MEBIBYTE = 1 << 20
SPEED = 5.0
"""Seconds in which another sandbox must have its answer, on a machine that is busy with other tests."""


def resident() -> int:
    """Bytes of memory that this process, the controller, has now."""
    gc.collect()
    with open("/proc/self/statm", "rb") as file:
        return int(file.read().split()[1]) * os.sysconf("SC_PAGE_SIZE")


def descriptors() -> Counter[str]:
    """What this process has open, by kind, without remembered processes."""
    found: Counter[str] = Counter()
    for name in os.listdir("/proc/self/fd"):
        with suppress(OSError):
            kind = os.readlink(f"/proc/self/fd/{name}")
            found["pidfd" if "pidfd" in kind else kind.partition(":[")[0]] += 1
    found.pop("pidfd", None)
    return found


async def until(condition: Callable[[], bool], seconds: float = 20.0) -> None:
    """Waits until it is so, and lets everything else go on."""
    assert await asyncio.to_thread(wait_until, condition, seconds)


async def serves(box: Sandbox, seconds: float = SPEED) -> None:
    """A name is resolved and reached, in good time."""
    start = time.monotonic()
    result = await shell(box, "curl -sS -m 15 http://web.test/")
    assert result.text == "hello from web.test\n", (result, reasons(box))
    assert time.monotonic() - start < seconds


def limited(box: Sandbox, rule: str = "gateway.limits") -> list[Decision]:
    box.core.supervision.flush()
    return [one for one in refusals(box, Kind.NET_CONNECT) if one.rule == rule]


class Peer:
    """A far end of the test's own, at the host's end of the link: one thread for each connection."""

    def __init__(self, serve: Callable[[socket.socket], object]) -> None:
        self._serve = serve
        self._listener = socket.create_server((places.HOST4, 0), backlog=256)
        self.port = int(self._listener.getsockname()[1])
        self.found: list[object] = []
        """What ``serve`` has returned, or raised."""
        self.accepted = 0
        threading.Thread(target=self._run, daemon=True).start()

    def _run(self) -> None:
        with suppress(OSError):
            while True:
                sock, _ = self._listener.accept()
                self.accepted += 1
                threading.Thread(target=self._one, args=(sock,), daemon=True).start()

    def _one(self, sock: socket.socket) -> None:
        sock.settimeout(20)
        try:
            found = self._serve(sock)
        except OSError as error:
            found = type(error).__name__
        self.found.append(found)
        sock.close()

    def rule(self, protocol: str = "tcp", **more: object) -> str:
        """An allow section for it."""
        return (
            "allow: ["
            + json.dumps({"cidr": f"{places.HOST4}/32", "port": self.port, "protocol": protocol} | more)
            + "]"
        )

    def close(self) -> None:
        with suppress(OSError):
            self._listener.shutdown(socket.SHUT_RDWR)
        self._listener.close()


MakePeer = Callable[[Callable[[socket.socket], object]], Peer]


@pytest.fixture
def make_peer(internet: Internet) -> Iterator[MakePeer]:
    peers: list[Peer] = []

    def make(serve: Callable[[socket.socket], object]) -> Peer:
        peers.append(Peer(serve))
        return peers[-1]

    yield make
    for peer in peers:
        peer.close()


def swallow(sock: socket.socket) -> int | str:
    """Reads to the end; how much that was, or how it broke."""
    count = 0
    while True:
        try:
            data = sock.recv(1 << 20)
        except OSError as error:
            return type(error).__name__
        if not data:
            return count
        count += len(data)


def made_up(strategy: st.SearchStrategy[bytes], count: int) -> list[bytes]:
    """So many byte strings that hypothesis thinks of, the same each time."""
    found: list[bytes] = []

    @settings(
        max_examples=count,
        database=None,
        derandomize=True,
        phases=[Phase.generate],
        suppress_health_check=list(HealthCheck),
        deadline=None,
    )
    @given(strategy)
    def collect(data: bytes) -> None:
        found.append(data)

    collect()
    return found


def mangled(good: bytes) -> st.SearchStrategy[bytes]:
    """Something good with a hole, a change or an end somewhere."""

    def mangle(at: int, cut: int, new: bytes) -> bytes:
        return good[:at] + new + good[at + cut :]

    return st.builds(mangle, st.integers(0, len(good)), st.integers(0, 12), st.binary(max_size=12))


# ---- slow, many, and too much ----


async def test_who_says_its_first_words_byte_by_byte_is_cut_off(
    make_box: MakeBox, internet: Internet, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Slowloris: within the hello, within the first head, within a later one."""
    monkeypatch.setattr(connection, "FIRST_BYTES", 1.0)
    monkeypatch.setattr(exchange, "HEAD", 1.0)
    box, other = await make_box(policy=policy_of(WEB)), await make_box(policy=policy_of(WEB))
    internet.clear()
    client = """
        import json, select, socket, sys, time
        head = b"GET / HTTP/1.1\\r\\nHost: web.test\\r\\nX-Slow: " + b"a" * 400
        tls = bytes.fromhex(sys.argv[1])
        ways = {"hello": (443, tls, b""), "first head": (80, head, b""), "silent": (80, b"", b""),
                "later head": (80, head, b"GET / HTTP/1.1\\r\\nHost: web.test\\r\\n\\r\\n")}
        socks, ended, start = {}, {}, time.monotonic()
        for name, (port, slow, before) in ways.items():
            s = socks[name] = socket.create_connection(("web.test", port), timeout=8)
            if before:
                s.sendall(before)
                heard = b""
                while b"hello from" not in heard:
                    heard += s.recv(4096) or b"hello from nobody"
        for turn in range(120):
            for name, s in list(socks.items()):
                try:
                    if ways[name][1]:
                        s.send(ways[name][1][turn:turn + 1])
                    if select.select([s], [], [], 0)[0] and not s.recv(100):
                        raise EOFError
                except (OSError, EOFError) as error:
                    ended[name] = [type(error).__name__, time.monotonic() - start]
                    del socks[name]
            if not socks:
                break
            time.sleep(0.05)
        print(json.dumps(ended))
    """
    running = asyncio.create_task(python(box, client, hello(name=b"web.test", fragment=1)[:-1].hex()))
    await serves(other)
    ended = json.loads((await running).text)
    assert set(ended) == {"hello", "first head", "silent", "later head"}, ended
    assert all(name in ("ConnectionResetError", "BrokenPipeError") for name, _ in ended.values()), ended
    assert all(0.9 < after < 5 for _, after in ended.values()), ended
    assert len(internet.records(address="web.test")) == 2  # the other sandbox's, and what came before the later head
    assert not live(box)


# Opens N connections, waits for a line, says how many are still there.
IDLE = """
import json, os, resource, select, socket, sys
address = socket.getaddrinfo("web.test", 80, socket.AF_INET)[0][4]
most = resource.getrlimit(resource.RLIMIT_NOFILE)
resource.setrlimit(resource.RLIMIT_NOFILE, (most[1], most[1]))
socks, errors = [], {}
for _ in range(int(sys.argv[1])):
    s = socket.socket()
    try:
        s.connect(address)
        socks.append(s)
    except OSError as error:
        s.close()
        errors[error.errno] = errors.get(error.errno, 0) + 1
print(json.dumps([len(socks), errors]), flush=True)
sys.stdin.readline()
poll = select.poll()
for s in socks:
    poll.register(s, select.POLLIN)
print(len(socks) - len(poll.poll(0)), flush=True)
sys.stdin.readline()
"""


async def test_ten_thousand_idle_connections_are_bounded_and_disturb_nobody(
    make_box: MakeBox, internet: Internet, monkeypatch: pytest.MonkeyPatch
) -> None:
    if resource.getrlimit(resource.RLIMIT_NOFILE)[0] < 4 * MAX_FLOWS + 2048:
        pytest.skip("this user may not open enough files (ulimit -n)")
    monkeypatch.setattr(connection, "FIRST_BYTES", 120.0)
    wanted, parts = 10_000, 4
    box, other = await make_box(policy=policy_of(WEB)), await make_box(policy=policy_of(WEB))
    await serves(other)
    await serves(box)
    before, start = resident(), time.monotonic()
    clients = [await box.start_process([PYTHON, "-c", IDLE, str(wanted // parts)]) for _ in range(parts)]
    opened = asyncio.gather(*(client.stdout.readline() for client in clients))
    slowest = 0.0
    while not opened.done():
        since = time.monotonic()
        await serves(other)
        slowest = max(slowest, time.monotonic() - since)
        await asyncio.sleep(0.2)
    said = [json.loads(line) for line in await opened]
    connected = sum(count for count, _ in said)
    reset = sum(errors.get(str(errno.ECONNRESET), 0) for _, errors in said)  # before connect(2) came back
    took = time.monotonic() - start
    await asyncio.sleep(0.2)
    per_connection = (resident() - before) / MAX_FLOWS
    for client in clients:
        await client.write(b"\n")
    alive = sum(map(int, await asyncio.gather(*(client.stdout.readline() for client in clients))))
    print(
        f"{connected} connections in {took:.1f} s, {alive} alive, {per_connection / 1024:.1f} KiB each, "
        f"slowest answer elsewhere {slowest:.2f} s"
    )
    assert connected + reset == wanted, said
    assert alive == MAX_FLOWS == len(live(box))
    records = limited(box)
    assert sum(one.count for one in records) == wanted - MAX_FLOWS
    assert len(records) < 20 * (parts + 1) * (took + 2)  # of each process and second a burst, and then a count
    assert all("too many connections" in one.reason for one in records)
    assert any(one.action.origin.process for one in records)
    assert per_connection < 30 * 1024
    await serves(other)
    for client in clients:
        client.kill()
    await until(lambda: not live(box))
    await serves(box)
    await serves(other)


async def test_no_sandbox_takes_all_that_the_process_can_hold(
    make_box: MakeBox, internet: Internet, monkeypatch: pytest.MonkeyPatch
) -> None:
    box, other = await make_box(policy=policy_of(WEB)), await make_box(policy=policy_of(WEB))
    monkeypatch.setattr(service.shared(), "_most", service._RESERVED + 40 * service.PER_FLOW)
    monkeypatch.setattr(service.shared(), "_room", 0)
    client = await box.start_process([PYTHON, "-c", IDLE, "100"])
    assert json.loads(await client.stdout.readline())[0] >= 30
    await asyncio.sleep(0.3)
    await client.write(b"\n")
    assert await client.stdout.readline() == b"30\n"
    await serves(other)
    client.kill()
    await until(lambda: not live(box))
    await serves(box)


async def test_a_flood_of_queries_disturbs_nobody(make_box: MakeBox, internet: Internet) -> None:
    box, other = await make_box(policy=policy_of(WEB)), await make_box(policy=policy_of(WEB))
    internet.clear()
    await serves(other)
    before = resident()
    flood = """
        import os, socket, time
        s = socket.socket(socket.AF_INET, socket.SOCK_DGRAM)
        s.connect(("198.18.0.53", 53))
        start, sent = time.monotonic(), 0
        print("go", flush=True)
        for turn in range(50_000):
            name = b"%08x" % (turn % 20_000)
            question = b"\\0\\1\\1\\0\\0\\1\\0\\0\\0\\0\\0\\0\\x08" + name + b"\\4test\\0\\0\\1\\0\\1"
            try:
                if turn % 100 == 0:
                    time.sleep(0.003)
                s.send(question if turn % 3 else os.urandom(200)); sent += 1
            except OSError:
                pass
        print(sent, time.monotonic() - start, flush=True)
    """
    client = await box.start_process([PYTHON, "-c", textwrap.dedent(flood)])
    assert await client.stdout.readline() == b"go\n"
    done = asyncio.create_task(client.stdout.readline())
    slowest, answers = 0.0, 0
    while not done.done() or not answers:
        since = time.monotonic()
        result = await shell(other, "getent hosts web.test")
        assert result.exit_code == 0, result
        slowest, answers = max(slowest, time.monotonic() - since), answers + 1
    sent, took = (await done).split()
    assert int(sent) > 45_000
    grown = resident() - before
    print(f"{int(sent)} datagrams in {float(took):.1f} s, {grown / MEBIBYTE:.1f} MiB more, slowest {slowest:.2f} s")
    assert slowest < SPEED
    assert grown < 64 * MEBIBYTE
    assert (await shell(box, "getent hosts web.test")).exit_code == 0
    await serves(other)
    assert {found.name for found in internet.records(service="dns")} <= {"web.test"}


QUERY = b"\x12\x34\1\0\0\1\0\0\0\0\0\0\3web\4test\0\0\1\0\1"


async def test_malformed_queries(make_box: MakeBox, internet: Internet) -> None:
    """By UDP and TCP: an answer or none, and the next good question is answered."""
    box = await make_box(policy=policy_of(WEB))
    internet.clear()
    messages = made_up(st.one_of(st.binary(max_size=600), mangled(QUERY)), 400)
    client = """
        import json, socket, sys
        GOOD = bytes.fromhex(sys.argv[1])
        messages = [bytes.fromhex(line) for line in sys.stdin]
        u = socket.socket(socket.AF_INET, socket.SOCK_DGRAM); u.settimeout(5)
        for server in ("198.18.0.53", "198.18.0.53"):
            u.connect((server, 53))
            for message in messages:
                try:
                    u.send(message)
                except OSError:
                    pass
        u.close()
        u = socket.socket(socket.AF_INET, socket.SOCK_DGRAM); u.settimeout(0.5); u.connect(("198.18.0.53", 53))
        for _ in range(20):
            u.send(GOOD)
            try:
                answer = u.recv(600)
                break
            except TimeoutError:
                answer = b""
        tcp = 0
        for number, message in enumerate(messages):
            with socket.create_connection(("198.18.0.53", 53), timeout=5) as s:
                try:
                    s.sendall(len(message).to_bytes(2, "big") + message if number % 2 else message)
                    s.shutdown(socket.SHUT_WR)
                    while s.recv(4096):
                        pass
                    tcp += 1
                except OSError as error:  # reset, or no longer connected
                    tcp += not isinstance(error, TimeoutError)
        with socket.create_connection(("198.18.0.53", 53), timeout=5) as s:
            s.sendall(len(GOOD).to_bytes(2, "big") + GOOD)
            over_tcp = s.recv(600)[2:]
        print(json.dumps([answer.hex(), over_tcp.hex(), tcp]))
    """
    said = "\n".join(message.hex() for message in messages).encode()
    result = await box.exec([PYTHON, "-c", textwrap.dedent(client), QUERY.hex()], stdin=said, timeout=60)
    assert result.exit_code == 0, result.stderr.decode()
    answer, over_tcp, tcp = json.loads(result.text)
    assert bytes.fromhex(answer)[:2] == bytes.fromhex(over_tcp)[:2] == QUERY[:2]
    assert bytes.fromhex(answer)[7] == 1 and tcp == len(messages)
    assert len(refusals(box, Kind.NET_RESOLVE)) > 10
    await serves(box)
    assert {found.name for found in internet.records(service="dns")} <= {"web.test"}
    assert not live(box)


async def test_malformed_hellos_and_requests(make_box: MakeBox, internet: Internet) -> None:
    """None gets through, none stops anything: what arrives is whole and for the name that was decided on."""
    policy = policy_of(WEB, irreversible="allow")
    box, other = await make_box(policy=policy), await make_box(policy=policy)
    internet.clear()
    tls = hello((16, b"\0\3\2h2"), name=b"web.test")
    request = b"POST /echo HTTP/1.1\r\nHost: web.test\r\nContent-Length: 3\r\nX: y\r\n\r\nabc"
    words = [(443, data) for data in made_up(mangled(tls), 150)]
    words += [(80, data) for data in made_up(mangled(request), 150)]
    words += [(port, data) for port in (80, 443) for data in made_up(st.binary(max_size=400), 50)]
    bombs = [
        b"GET / HTTP/1.1\r\nHost: web.test\r\nX: " + b"a" * 200_000 + b"\r\n\r\n",
        b"GET / HTTP/1.1\r\nHost: web.test\r\n" + b"X: y\r\n" * 30_000 + b"\r\n",
        b"GET /" + b"a" * 200_000 + b" HTTP/1.1\r\nHost: web.test\r\n\r\n",
        b"GET / HTTP/1.1\r\nHost: web.test\r\nTransfer-Encoding: chunked\r\n\r\n" + b"f" * 100_000 + b"\r\n",
        b"GET / HTTP/1.1\r\nHost: web.test\r\nTransfer-Encoding: chunked\r\n\r\n1;" + b"x" * 100_000 + b"\r\na\r\n",
        b"GET / HTTP/1.1\r\nHost: web.test\r\n\r\n" * 1000,
        b"\r\n" * 50_000,
    ]
    words += [(80, bomb) for bomb in bombs] + [(443, b"\x16\x03\x01\x40\x00\x01\0\xff\xff" + bytes(60_000))]
    client = """
        import json, select, socket, sys, time
        def one(port, data):
            s = socket.create_connection(("web.test", port), timeout=8)
            s.setblocking(False)
            heard = b""
            try:
                while data:
                    readable, writable, _ = select.select([s], [s], [], 3)
                    if readable:
                        more = s.recv(65536)
                        heard += more
                        if not more: return heard
                    if writable:
                        data = data[s.send(data[:65536]):]
                s.shutdown(socket.SHUT_WR)
                while select.select([s], [], [], 3)[0]:
                    more = s.recv(65536)
                    if not more: break
                    heard += more
                else:
                    return heard + b"...SILENCE"
            except OSError:  # reset, or no longer connected
                return heard + b"...RESET"
            finally:
                s.close()
            return heard
        for line in sys.stdin:
            port, data = json.loads(line)
            start = time.monotonic()
            heard = one(port, bytes.fromhex(data))
            took = time.monotonic() - start
            print(json.dumps([took, heard[:60].decode("latin-1"), heard[-20:].decode("latin-1")]))
    """
    said = "\n".join(json.dumps([port, data.hex()]) for port, data in words).encode()
    before = resident()
    running = asyncio.create_task(box.exec([PYTHON, "-c", textwrap.dedent(client)], stdin=said, timeout=60))
    await asyncio.sleep(0.2)
    await serves(other)
    result = await running
    assert result.exit_code == 0, result.stderr.decode()
    answers = [json.loads(line) for line in result.text.splitlines()]
    assert len(answers) == len(words)
    silent = [(word, answer) for word, answer in zip(words, answers, strict=True) if "SILENCE" in answer[2]]
    assert not silent, silent[:3]
    for (port, _), (_, heard, _) in zip(words, answers, strict=True):
        if port == 80 and heard:
            assert heard.startswith(("HTTP/1.1 ", "...RESET")), heard
    assert resident() - before < 48 * MEBIBYTE
    for arrival in internet.records(address="web.test"):
        if arrival.port == 443:
            assert arrival.server_name == "web.test" or b"web.test" in arrival.head
        for seen in arrival.requests:
            assert seen.header("host") == "web.test"
            assert sum(len(key) + len(value) for key, value in seen.headers) < 70_000
    await serves(box)
    await serves(other)
    await until(lambda: not live(box))


# ---- readers and servers that misbehave ----


async def test_a_client_that_never_reads_and_a_server_that_never_stops(make_box: MakeBox, make_peer: MakePeer) -> None:
    """And the other way round: what is under way is bounded, whoever has to wait waits alone."""
    sent = [0, 0]

    def endless(sock: socket.socket) -> Never:
        while True:
            sent[0] += sock.send(bytes(1 << 16))

    def deaf(sock: socket.socket) -> str:
        sock.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4096)
        time.sleep(3)
        return "slept"

    talker, sleeper = make_peer(endless), make_peer(deaf)
    rules = talker.rule()[:-1] + ", " + sleeper.rule()[8:-1] + ", {name: web.test, port: 80}]"
    policy = policy_of(rules, irreversible="allow")
    box, other = await make_box(policy=policy), await make_box(policy=policy_of(WEB))
    await serves(box)
    before = resident()
    client = """
        import socket, sys, time
        host = sys.argv[1]
        reads = [socket.create_connection((host, int(sys.argv[2])), timeout=8) for _ in range(8)]
        for s in reads: s.send(b"go\\n")
        web = [socket.create_connection(("web.test", 80), timeout=8) for _ in range(8)]
        for s in web: s.send(b"GET /big?bytes=4000000000 HTTP/1.1\\r\\nHost: web.test\\r\\n\\r\\n")
        sends = [socket.create_connection((host, int(sys.argv[3])), timeout=8) for _ in range(8)]
        posts = [socket.create_connection(("web.test", 80), timeout=8) for _ in range(4)]
        for s in posts: s.send(b"POST /hang HTTP/1.1\\r\\nHost: web.test\\r\\nContent-Length: 4000000000\\r\\n\\r\\n")
        total = 0
        for s in sends + posts: s.setblocking(False)
        stop = time.monotonic() + 1.5
        while time.monotonic() < stop:
            for s in sends + posts:
                try: total += s.send(bytes(1 << 16))
                except BlockingIOError: pass
            time.sleep(0.005)
        print(total, flush=True)
        sys.stdin.readline()
    """
    words = [PYTHON, "-c", textwrap.dedent(client), places.HOST4, str(talker.port), str(sleeper.port)]
    process = await box.start_process(words)
    line = asyncio.create_task(process.stdout.readline())
    await serves(other)
    total = int(await line)
    grown = resident() - before
    print(
        f"under way: {sent[0] / MEBIBYTE:.1f} MiB down, {total / MEBIBYTE:.1f} MiB up, {grown / MEBIBYTE:.1f} MiB here"
    )
    assert len(live(box)) == 28
    assert total < 12 * 40 * MEBIBYTE and sent[0] < 8 * 40 * MEBIBYTE  # what sockets hold
    assert grown < 28 * 2 * MEBIBYTE
    await serves(other)
    process.kill()
    # Who has sent and is gone may have ended in order: what it sent waits for its server, as long as the rule says.
    await until(lambda: len(live(box)) <= 4)
    await until(lambda: len(talker.found) == 8)
    await box.close()
    await until(lambda: not live(box))
    assert all(found in ("ConnectionResetError", "BrokenPipeError") for found in talker.found)


@pytest.mark.parametrize(
    "answer",
    [
        pytest.param(b"HTTP/1.1 100 Continue\r\n\r\n", id="100 without end"),
        pytest.param(b"HTTP/1.1 103 Early Hints\r\nlink: " + b"x" * 500 + b"\r\n\r\n", id="103 without end"),
        pytest.param(b"HTTP/1.1 200 OK\r\n!" + b"x: y\r\n", id="a head without end"),
        pytest.param(b"HTTP/1.1 200 OK\r\n!x: " + b"y" * 1000, id="a line without end"),
        pytest.param(
            b"HTTP/1.1 200 OK\r\ntransfer-encoding: chunked\r\n\r\n!" + b"0" * 1000, id="a chunk size without end"
        ),
        pytest.param(b"HTTP/1.1 200 OK\r\ntransfer-encoding: chunked\r\n\r\n0\r\n!a: b\r\n", id="trailers without end"),
        pytest.param(b"HTTP/1.1 200 OK\r\ncontent-length: 5\r\ncontent-length: 6\r\n\r\nhello", id="two lengths"),
        pytest.param(b"\0\xff" * 500, id="garbage"),
        pytest.param(b"", id="nothing"),
    ],
)
async def test_a_server_that_answers_with_a_bomb(make_box: MakeBox, make_peer: MakePeer, answer: bytes) -> None:
    sent = 0

    def serve(sock: socket.socket) -> str:
        nonlocal sent
        sock.recv(4096)
        start, mark, more = answer.rpartition(b"!")
        sock.sendall(start or more)
        if not answer:
            return "closed"
        if not mark and answer.startswith(b"HTTP/1.1 200"):
            return "said"
        piece = more * (1 + 20_000 // len(more))
        while sent < 512 * MEBIBYTE:
            sent += sock.send(piece)
        return "took all of it"

    peer = make_peer(serve)
    box = await make_box(policy=policy_of(peer.rule("http")))
    before = resident()
    result = await shell(box, f"curl -sS -m 6 -i http://{places.HOST4}:{peer.port}/; echo $?", timeout=30)
    await until(lambda: bool(peer.found), 10)
    grown = resident() - before
    assert "took all of it" not in peer.found, result.text[-500:]
    # Never a whole answer of the server's: one of ours, or a transfer that has failed.
    assert " 502 " in result.text or not result.text.rstrip().endswith("\n0"), result.text[-500:]
    assert sent < 32 * MEBIBYTE and grown < 16 * MEBIBYTE, (sent, grown)
    await until(lambda: not live(box))


def _reset_later(sock: socket.socket) -> str:
    sock.recv(10)
    sock.sendall(b"half an answer")
    time.sleep(0.2)
    sock.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, b"\1\0\0\0\0\0\0\0")
    return "reset"


def _speaks_after_the_end(sock: socket.socket) -> object:
    """Ends first, and goes on reading."""
    sock.recv(2)
    sock.sendall(b"bye")
    sock.shutdown(socket.SHUT_WR)
    return swallow(sock)


def _answers_after_the_clients_end(sock: socket.socket) -> object:
    count = swallow(sock)
    for _ in range(10):
        sock.sendall(b"x" * 1000)
        time.sleep(0.02)
    return count


def _ends_at_once(sock: socket.socket) -> object:
    return "ended"


@pytest.mark.parametrize(
    ("serve", "heard", "found"),
    [
        (_reset_later, ["half an answer", "ConnectionResetError"], "reset"),
        (_speaks_after_the_end, ["bye", "EOF"], 100_001),
        (_answers_after_the_clients_end, ["x" * 20, "EOF"], 100_003),
        (_ends_at_once, None, "ended"),
    ],
)
async def test_ends_of_all_kinds(
    make_box: MakeBox,
    make_peer: MakePeer,
    serve: Callable[[socket.socket], object],
    heard: list[str] | None,
    found: object,
) -> None:
    peer = make_peer(serve)
    box = await make_box(policy=policy_of(peer.rule()))
    client = """
        import json, socket, sys, time
        s = socket.create_connection((sys.argv[1], int(sys.argv[2])), timeout=8)
        s.sendall(b"go\\n")
        time.sleep(0.4)
        heard, end = b"", "EOF"
        try:
            s.sendall(b"y" * 100_000)
            s.shutdown(socket.SHUT_WR)
        except OSError as error:
            end = type(error).__name__
        try:
            while more := s.recv(65536): heard += more
        except OSError as error:
            end = type(error).__name__
        print(json.dumps([heard[:20].decode(), end]))
    """
    said = json.loads((await python(box, client, places.HOST4, str(peer.port))).text)
    if heard is not None and serve is not _reset_later:
        assert said == heard
    elif heard is not None:
        assert said[1] in ("ConnectionResetError", "BrokenPipeError"), said
    await until(lambda: bool(peer.found))
    assert peer.found == [found]
    await until(lambda: not live(box))


# ---- faults of ours ----


def owner(thing: Any) -> Egress:
    """Whose part of the gateway this is."""
    for name in ("egress", "_egress"):
        if hasattr(thing, name):
            return getattr(thing, name)  # type: ignore[no-any-return]
    if hasattr(thing, "_connection"):
        return thing._connection.egress  # type: ignore[no-any-return]
    if hasattr(thing, "_relay"):
        return owner(thing._relay)
    found = [each for each in service.shared()._doors if getattr(thing, "loop", None) is each.loop]
    return found[0] if found else thing


FAULTS = [
    "connection.Connection.begin",
    "connection.Connection._readable",
    "connection.Connection._may_be_spoken",
    "connection.Connection.over",
    "connection.Connection.look_after",
    "connection.Connection.flow",
    "egress.Egress.decide",
    "egress.Egress.resolve",
    "exchange.Exchange.start",
    "exchange.Exchange.close",
    "exchange.Exchange._of_server",
    "outward.Outward.start",
    "outward.Outward.cancel",
    "queries.Queries.ask",
    "queries.Queries._datagram",
    "relay.Relay.start",
    "relay.Relay.end",
    "relay._Way._readable",
    "service._Doors._begin",
]


async def test_a_fault_is_that_connections_or_that_sandboxs(
    make_box: MakeBox, internet: Internet, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    """Wherever it happens, the others and the next one go on."""
    import importlib

    other = await make_box(policy=policy_of(WEB))
    await serves(other)
    ended = []
    for fault in FAULTS:
        module, kind, method = fault.split(".")
        place = getattr(importlib.import_module(f"corral.gateway.{module}"), kind)
        workspace = tmp_path / fault
        workspace.mkdir(mode=0o755)
        box = await make_box(workspace, policy=policy_of(WEB))
        egress, original = box.core.supervision.egress, getattr(place, method)
        hits: list[int] = []

        def broken(
            self: Any, *more: Any, egress: Any = egress, original: Any = original, hits: list[int] = hits, **named: Any
        ) -> Any:
            if owner(self) is egress:
                hits.append(1)
                raise RuntimeError("a fault of ours")
            return original(self, *more, **named)

        with monkeypatch.context() as patch:
            patch.setattr(place, method, broken)
            idle = "import socket,time;s=socket.create_connection(('web.test',80));time.sleep(0.8)"
            command = f'{PYTHON} -c "{idle}" & curl -sS -m 4 http://web.test/; curl -sSk -m 4 https://web.test/; wait'
            attempt = asyncio.create_task(shell(box, command))
            await serves(other)
            with suppress(Exception):  # the sandbox may have ended
                await attempt
            assert hits, fault
            await serves(other)
            await box.close()
            ended.append((fault, box.core.end_reason))
            await serves(other)
    print(ended)
    assert service.shared()._thread.is_alive()


async def test_the_end_of_the_gateways_thread_ends_those_who_use_it(
    make_box: MakeBox, make_peer: MakePeer, monkeypatch: pytest.MonkeyPatch
) -> None:
    """And their connections, and leaves no descriptor; who comes later gets another."""
    peer = make_peer(swallow)
    monkeypatch.setattr(threading, "excepthook", lambda _: None)
    before = descriptors()
    one, two = await make_box(policy=policy_of(peer.rule())), await make_box(policy=policy_of(WEB))
    third = await make_box()  # has no way out
    code = (
        "import socket, sys, time\n"
        "s = socket.create_connection((sys.argv[1], int(sys.argv[2])))\n"
        "s.send(b'x' * 9000)\n"
        "time.sleep(60)"
    )
    process = await one.start_process([PYTHON, "-c", code, places.HOST4, str(peer.port)])
    await until(lambda: any(flow.bytes_up == 9000 for flow in live(one)))
    gateway = service.shared()

    def broken() -> Never:
        raise RuntimeError("a fault of ours")

    gateway.loop.post(broken)
    assert await one.wait_ended() == "its gateway failed"
    assert await two.wait_ended() == "its gateway failed"
    await until(lambda: bool(peer.found), 5)
    assert peer.found == ["ConnectionResetError"]
    assert (await third.exec(["echo", "here"])).text == "here\n"
    del process
    assert not gateway._thread.is_alive()
    for box in (one, two, third):
        await box.close()
    after = await make_box(policy=policy_of(WEB))
    await serves(after)
    await after.close()
    gateway.loop.close()
    await until(
        lambda: not descriptors() - before - Counter({"anon_inode:[eventpoll]": 1, "anon_inode:[eventfd]": 1}), 5
    )


async def test_a_record_that_cannot_be_written_ends_the_sandbox(make_box: MakeBox, internet: Internet) -> None:
    box, other = await make_box(policy=policy_of(WEB)), await make_box(policy=policy_of(WEB))
    internet.clear()
    recent, seen = box.core.supervision.recent, []
    write = recent.write

    def full(decision: Decision) -> None:
        if threading.current_thread().name == "corral-gateway" and decision.action.kind is Kind.NET_CONNECT:
            seen.append(decision)
            raise OSError(errno.ENOSPC, "no space")
        write(decision)

    # The aggregator writes to its sinks' bound methods: the innermost one is replaced.
    several = box.core.supervision._records._sink
    several._writes = (full, *several._writes[1:])  # type: ignore[attr-defined]
    running = asyncio.create_task(shell(box, "curl -sSk -m 8 https://web.test/"))
    assert "records cannot be written" in await box.wait_ended()
    with suppress(Exception):
        await running
    assert seen
    assert internet.arrived("web.test") == 0
    await serves(other)


# ---- ends ----


@pytest.mark.parametrize(
    "stage",
    ["silent", "looked up", "dialled", "held", "relayed", "exchanged", "refused", "asked by TCP", "intercepted"],
)
async def test_a_sandbox_that_ends_leaves_nothing(
    make_box: MakeBox, internet: Internet, make_peer: MakePeer, stage: str
) -> None:
    """Whatever its connections are doing: descriptors, threads and questions are gone with it."""
    peer = make_peer(swallow)
    ways = {
        "silent": ("web.test:80", "web.test", 80, ""),
        "looked up": ("dead.test:443", "dead.test", 443, hello(name=b"dead.test").hex()),
        "dialled": ("blackhole.test:443", "blackhole.test", 443, hello(name=b"blackhole.test").hex()),
        "held": ("web.test:443", "web.test", 80, b"GET / HTTP/1.1\r\nHost: web.test\r\n\r\n".hex()),
        "relayed": (peer.rule()[8:-1], places.HOST4, peer.port, b"x".hex()),
        "exchanged": ("web.test:80", "web.test", 80, b"GET /hang HTTP/1.1\r\nHost: web.test\r\n\r\n".hex()),
        "refused": ("web.test:443", "web.test", 443, b"GET / HTTP/1.1\r\n\r\n".hex()),
        "asked by TCP": ("web.test:443", "198.18.0.53", 53, "00"),
        "intercepted": ("{name: web.test, port: 443, intercept: true}", "web.test", 443, true_hello().hex()),
    }
    rule, host, port, said = ways[stage]
    policy = f"allow: [{rule}]\nask: [{{name: web.test, port: 80, requests: ['GET /**']}}]" if stage == "held" else ""
    first = await make_box(policy=policy_of(policy or f"allow: [{rule}]"))  # what stays for good is there from here on
    await shell(first, "getent hosts web.test")
    await first.close()
    await asyncio.sleep(0.1)
    before, threads = descriptors(), {thread.name for thread in threading.enumerate()}
    box = await make_box(policy=policy_of(policy or f"allow: [{rule}]"))
    code = (
        "import socket,sys,time\n"
        "socks=[socket.create_connection((sys.argv[1],int(sys.argv[2]))) for _ in range(20)]\n"
        "for s in socks: s.send(bytes.fromhex(sys.argv[3]))\n"
        "print('there',flush=True);time.sleep(60)"
    )
    process = await box.start_process([PYTHON, "-c", code, host, str(port), said])
    if stage == "held":
        await until(lambda: box.core.supervision.approvals.held > 0)
        for question in list(box.core.supervision.approvals.waiting()):
            if question.action.kind is Kind.NET_CONNECT:
                box.core.supervision.approvals.answer(question.number, Verdict.ALLOW, by="test")
    else:
        assert await asyncio.wait_for(process.stdout.readline(), 20) == b"there\n"
        await asyncio.sleep(0.3)
        assert len(live(box)) in ((20,) if stage != "refused" else range(21))
    egress = box.core.supervision.egress
    await box.close()
    assert egress is not None
    await until(lambda: not egress.flows)
    await until(lambda: not descriptors() - before, 10)
    assert {thread.name for thread in threading.enumerate() if "corral" in thread.name} <= threads | {
        "corral-resolver_0"
    }
    assert not box.core.supervision.approvals.held
    if stage == "relayed":
        await until(lambda: len(peer.found) == 20)
        # Where the gateway notices it before the client's own end has come, half of it must not look like all of it.
        assert set(peer.found) <= {"ConnectionResetError", 1}


def true_hello() -> bytes:
    """One to which a server answers."""
    sent = ssl.MemoryBIO()
    with suppress(ssl.SSLWantReadError):
        ssl.create_default_context().wrap_bio(ssl.MemoryBIO(), sent, server_hostname="web.test").do_handshake()
    return sent.read()


CONTROLLER = """
import asyncio, json, os, resource, sys, time
from pathlib import Path
from corral.policy.load import parse_policy
from corral.sandbox.box import Sandbox
{limits}
async def main():
    workspace, policy, code = sys.argv[1:4]
    box = Sandbox(workspace, policy=parse_policy(policy, source="test"))
    await box.start()
    async def hear():
        return await asyncio.to_thread(sys.stdin.readline)
    def tell(*what):
        print(json.dumps(what), flush=True)
{body}
asyncio.run(main())
"""


def controller(workspace: Path, policy: str, code: str, body: str, limits: str = "") -> subprocess.Popen[str]:
    """A process of its own with one sandbox."""
    script = CONTROLLER.format(body=textwrap.indent(textwrap.dedent(body).strip(), "    "), limits=limits)
    text = f"network:\n  resolvers: [203.0.113.53]\n  {policy}\n"
    return subprocess.Popen(
        [sys.executable, "-c", script, str(workspace), text, textwrap.dedent(code)],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
        cwd=Path(__file__).parents[2],
        env=os.environ | {"PYTHONPATH": os.pathsep.join(filter(None, sys.path))},
    )


def test_a_controller_that_is_killed_in_the_middle_leaves_nothing(
    workspace: Path, internet: Internet, make_peer: MakePeer
) -> None:
    counts: list[int] = []

    def count(sock: socket.socket) -> str:
        counts.append(0)
        try:
            while data := sock.recv(1 << 16):
                counts[0] += len(data)
        except ConnectionResetError:
            return "reset"
        return "end"

    peer = make_peer(count)
    code = f"""
        import socket
        s = socket.create_connection(("{places.HOST4}", {peer.port}))
        while True: s.send(bytes(65536))
    """
    body = f"""
        running = asyncio.create_task(box.exec(["{PYTHON}", "-c", code]))
        egress = box.core.supervision.egress
        while not any(flow.bytes_up > 1000000 for flow in egress.live()):
            await asyncio.sleep(0.01)
        tell("runs")
        await hear()
    """
    with adopting_orphans():
        process = controller(workspace, peer.rule(), code, body)
        try:
            assert process.stdout is not None
            assert json.loads(process.stdout.readline()) == ["runs"]
            process.kill()
            process.wait()
            assert wait_until(lambda: bool(peer.found), 5)
            assert wait_until(lambda: not groups_of(process.pid), 10)
        finally:
            process.kill()
            process.communicate()
    assert peer.found[0] in ("reset", "end") and counts[0] > 0


FULL_TABLE = """
tell((await box.exec(["/usr/bin/python3", "-c", code], timeout=30)).text)
taken = []
for free in (0, 1, 2, 3, 4, 6, 8, 12):
    running = await box.start_process(["/usr/bin/python3", "-c", "import sys; sys.stdin.readline();" + code.strip()])
    await asyncio.sleep(0.1)
    try:
        while True:
            taken.append(os.open("/dev/null", os.O_RDONLY | os.O_CLOEXEC))
    except OSError:
        pass
    for _ in range(free):
        os.close(taken.pop())
    await running.write(b"go\\n")
    clock = time.process_time()
    await asyncio.sleep(0.8)
    busy = time.process_time() - clock
    for fd in taken:
        os.close(fd)
    taken.clear()
    try:
        said = (await asyncio.wait_for(running.stdout.read(), 20)).decode()
    except TimeoutError:
        said = "hangs"
    tell(free, said, busy)
    await running.wait()
tell((await box.exec(["/usr/bin/python3", "-c", code], timeout=30)).text)
tell("end")
"""


def test_a_controller_without_descriptors_refuses_and_recovers(workspace: Path, internet: Internet) -> None:
    internet.clear()
    code = (
        "import socket\n"
        "def get():\n"
        "    try:\n"
        "        s=socket.create_connection(('web.test',80),timeout=8)\n"
        "        s.sendall(b'GET / HTTP/1.1\\r\\nHost: web.test\\r\\nConnection: close\\r\\n\\r\\n')\n"
        "        return s.recv(4096).split(b'\\r\\n')[0].decode()\n"
        "    except OSError as error:\n"
        "        return type(error).__name__\n"
        "print(get())\n"
    )
    code = f"exec({code!r})"
    limit = "resource.setrlimit(resource.RLIMIT_NOFILE, (700, 700))"
    process = controller(workspace, "allow: [web.test:80]", code, FULL_TABLE, limit)
    try:
        out, _ = process.communicate(timeout=60)
    finally:
        process.kill()
        process.communicate()
    said = [json.loads(line) for line in out.splitlines()]
    print(said)
    assert said[-1] == ["end"], said
    assert said[0] == said[-2] == ["HTTP/1.1 200 OK\n"]
    refused = [text for _, text, _ in said[1:-2]]
    assert "hangs" not in refused
    assert any("200" not in text for text in refused), "the table was not full"
    assert all(busy < 0.7 for _, _, busy in said[1:-2]), "it spins"


async def test_what_cannot_be_accepted_waits_without_a_spinning_loop(
    make_box: MakeBox, internet: Internet, monkeypatch: pytest.MonkeyPatch
) -> None:
    box, other = await make_box(policy=policy_of(WEB)), await make_box(policy=policy_of(WEB))
    await serves(box)
    gateway, egress = service.shared(), box.core.supervision.egress
    assert egress is not None
    mine = {sock.fileno() for sock in gateway._doors[egress]._listeners}
    accept, tries = socket.socket.accept, []

    def exhausted(self: socket.socket) -> Any:
        if self.fileno() in mine:
            tries.append(1)
            raise OSError(errno.EMFILE, "too many open files")
        return accept(self)

    monkeypatch.setattr(socket.socket, "accept", exhausted)
    running = asyncio.create_task(shell(box, "curl -sS -m 15 http://web.test/"))
    await until(lambda: bool(tries))
    await asyncio.sleep(1.2)
    assert len(tries) <= 6
    await serves(other)
    monkeypatch.undo()
    assert (await running).text == "hello from web.test\n"


async def test_a_fork_of_the_controller_disturbs_nothing_and_keeps_nothing_open(
    make_box: MakeBox, make_peer: MakePeer, internet: Internet
) -> None:
    peer, bounded = make_peer(swallow), make_peer(swallow)
    cut = bounded.rule(limits={"up": 100_000})
    box = await make_box(policy=policy_of(peer.rule()[:-1] + ", " + cut[8:-1] + ", web.test:80]"))
    code = """
        import socket, sys, time
        s = socket.create_connection((sys.argv[1], int(sys.argv[2])))
        other = socket.create_connection((sys.argv[1], int(sys.argv[3]))); other.sendall(b"x")
        for _ in range(100):
            s.sendall(bytes(50_000)); time.sleep(0.005)
        s.close()
        other.sendall(bytes(200_000))
        print("sent")
    """
    running = asyncio.create_task(python(box, code, places.HOST4, str(peer.port), str(bounded.port)))
    await until(lambda: len([flow for flow in live(box) if flow.bytes_up]) == 2)
    children = []
    for stays in (0.0, 0.0, 60.0):
        child = os.fork()
        if child == 0:
            time.sleep(stays)
            os._exit(0)
        children.append(child)
    try:
        await running
        await until(lambda: bool(peer.found and bounded.found), 10)  # though one of the children still lives
        assert peer.found == [5_000_000]
        assert bounded.found == ["ConnectionResetError"]
        await serves(box)
        await box.close()
    finally:
        for child in children:
            os.kill(child, signal.SIGKILL)
            os.waitpid(child, 0)


# ---- who, and what was decided on ----


async def test_an_address_of_one_sandbox_means_nothing_in_another(make_box: MakeBox, internet: Internet) -> None:
    one = await make_box(policy=policy_of("allow: [web.test:80]"))
    other = await make_box(policy=policy_of("allow: [api.test:80]"))
    address = (await shell(one, "python3 -c \"import socket; print(socket.gethostbyname('web.test'))\"")).text.strip()
    assert (await python(one, TRY, address, "web.test")).text.startswith("HTTP/1.1 200")
    internet.clear()
    assert (await python(other, TRY, address, "web.test")).text == "PermissionError\n"
    own = (await shell(other, "python3 -c \"import socket; print(socket.gethostbyname('api.test'))\"")).text.strip()
    assert own == address  # the same address stands for another name there
    assert (await python(other, TRY, address, "web.test")).text.startswith("HTTP/1.1 403")
    assert internet.arrived("web.test") == internet.arrived("api.test") == 0
    assert (await python(other, TRY, address, "api.test")).text.startswith("HTTP/1.1 200")


TRY = """
    import socket, sys
    try:
        s = socket.create_connection((sys.argv[1], 80), timeout=8)
        s.sendall(f"GET / HTTP/1.1\\r\\nHost: {sys.argv[2]}\\r\\n\\r\\n".encode())
        print(s.recv(4096).split(b"\\r\\n")[0].decode())
    except OSError as error:
        print(type(error).__name__)
"""


async def test_a_connection_that_nobody_noted_is_refused(
    make_box: MakeBox, internet: Internet, monkeypatch: pytest.MonkeyPatch
) -> None:
    box, other = await make_box(policy=policy_of(WEB)), await make_box(policy=policy_of(WEB))
    await shell(box, "getent hosts web.test")
    internet.clear()
    mine, note = box.core.supervision.egress, Egress.note

    def forgets(self: Egress, attempt: Any) -> None:
        if self is not mine or attempt.transport.value != "tcp":
            note(self, attempt)

    monkeypatch.setattr(Egress, "note", forgets)
    assert (await python(box, TRY, "web.test", "web.test")).text == "ConnectionResetError\n"
    assert internet.arrived("web.test") == 0
    records = limited(box, "gateway.origin")
    assert records and all("Nobody in the sandbox" in record.reason for record in records)
    await serves(other)
    monkeypatch.undo()
    await serves(box)


async def test_a_note_that_comes_late_still_says_who_it_was(
    make_box: MakeBox, internet: Internet, monkeypatch: pytest.MonkeyPatch
) -> None:
    box = await make_box(policy=policy_of(WEB))
    note = Egress.note

    def late(self: Egress, attempt: Any) -> None:
        time.sleep(0.15)
        note(self, attempt)

    monkeypatch.setattr(Egress, "note", late)
    await serves(box)
    found = [one for one in decisions(box, Kind.HTTP_REQUEST) if one.allowed]
    assert found and all(one.action.origin.process and one.action.origin.process.exe.endswith("/curl") for one in found)


TOCTOU = """
    import ctypes, json, os, socket, sys, threading, time
    libc = ctypes.CDLL(None, use_errno=True)
    how, port = sys.argv[1], int(sys.argv[2])
    good, bad = bytes.fromhex(sys.argv[3]), bytes.fromhex(sys.argv[4])
    size = len(good)
    fd = os.open("/tmp/hello", os.O_RDWR | os.O_CREAT | os.O_TRUNC)  # not everybody has memfd_create(2) here
    os.ftruncate(fd, 4096)
    import mmap
    memory = mmap.mmap(fd, 4096)
    memory[:size] = good
    stop = False
    def change():
        while not stop:
            memory[:size] = bad
            memory[:size] = good
    thread = threading.Thread(target=change)
    class Part(ctypes.Structure):
        _fields_ = [("base", ctypes.c_void_p), ("length", ctypes.c_size_t)]
    place = ctypes.addressof(ctypes.c_char.from_buffer(memory))
    reader, writer = os.pipe()
    def send(s, start, end):
        if how == "sendfile":
            assert os.sendfile(s.fileno(), fd, start, end - start) == end - start
        elif how == "splice":
            assert os.splice(fd, writer, end - start, offset_src=start) == end - start
            assert os.splice(reader, s.fileno(), end - start) == end - start
        else:
            part = Part(place + start, end - start)
            assert libc.vmsplice(writer, ctypes.byref(part), 1, 0) == end - start, os.strerror(ctypes.get_errno())
            assert os.splice(reader, s.fileno(), end - start) == end - start
    heard = []
    for turn in range(24):
        s = socket.create_connection(("web.test", port), timeout=5)
        memory[:size] = good
        if turn % 3 == 0:  # all of it good while it is sent, and bad at once afterwards
            send(s, 0, size); memory[:size] = bad
        elif turn % 3 == 1:  # changed while only the last byte is missing
            send(s, 0, size - 1); memory[:size] = bad; time.sleep(0.01); s.send(good[-1:])
        else:  # in a race
            stop = False
            thread = threading.Thread(target=change); thread.start()
            send(s, 0, size)
            time.sleep(0.01)
        try:
            heard.append(s.recv(100)[:12].hex())
        except OSError as error:
            heard.append(type(error).__name__)
        stop = True
        if thread.is_alive(): thread.join()
        s.close()
    print(json.dumps(heard))
"""


@pytest.mark.parametrize("how", ["sendfile", "splice", "vmsplice"])
@pytest.mark.parametrize("port", [80, 443])
async def test_what_was_decided_on_is_what_is_sent_on(
    make_box: MakeBox, internet: Internet, how: str, port: int
) -> None:
    """I5: pages that are sent without a copy are still the agent's to change."""
    box = await make_box(policy=policy_of(WEB))
    internet.clear()
    if port == 80:
        good, bad = (f"GET / HTTP/1.1\r\nHost: {name}\r\n\r\n".encode() for name in ("web.test", "bad.test"))
    else:
        good, bad = hello(name=b"web.test"), hello(name=b"bad.test")
    for _ in range(10):
        result = await python(box, TOCTOU, how, str(port), good.hex(), bad.hex())
        assert result.exit_code == 0, result.stderr.decode()
        heard = json.loads(result.text)
        assert len(heard) == 24
        arrived = internet.records(address="web.test", port=port)
        if arrived:  # how many were whole by the time they were read depends on who is faster
            break
    assert arrived, heard
    for arrival in arrived:
        assert b"bad" not in arrival.head
        if port == 443:
            assert arrival.head[: len(good)] == good
        else:
            assert all(request.header("host") == "web.test" for request in arrival.requests)


def test_nothing_is_left_of_all_this() -> None:
    assert not own_sandbox_processes()
    assert service.shared()._thread.is_alive()
