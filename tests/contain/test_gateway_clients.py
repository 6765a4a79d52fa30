"""Programs as people have them, through the gateway to names that the policy allows: all works as it does outside.

TLS is passed through here; programs are given the little internet's CA. Where the far end must end a connection in a
way of its own (half-close, RST, silence), it is a server of the test's at the host's end of the link (:class:`Peer`).
"""

from __future__ import annotations

import asyncio
import hashlib
import json
import os
import resource
import shutil
import socket
import struct
import subprocess
import textwrap
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import suppress
from pathlib import Path

import pytest

from corral.actions import Kind, Verdict
from corral.approvals.queue import Question, Scope
from corral.gateway.resolver import Done, Resolved
from corral.gateway.stub import StubLookup
from corral.policy.load import parse_policy
from corral.sandbox.box import Sandbox
from corral.sandbox.results import ExecResult
from tests.contain.command_line import CommandLine, adopting_orphans, corral_command
from tests.contain.conftest import MakeBox, wait_until
from tests.contain.gateway_boxes import PATIENCE, PYTHON, ca_in, decisions, live, policy_of, python, shell
from tests.internet import packages, places
from tests.internet.world import Internet

GREETING = packages.GREETING
MUCH = 200_000_000
"""Bytes of a large download or upload."""
SPARE = 48 << 20
"""Bytes by which the controller may grow while clients are slow: far less than what waits for them."""
_RESET = struct.pack("ii", 1, 0)


def needs(*programs: str) -> None:
    """Skips where a program is missing, and says which."""
    for program in programs:
        if shutil.which(program, path="/usr/bin:/bin:/usr/sbin:/sbin") is None:
            pytest.skip(f"no {program} on this machine")


def fine(result: ExecResult) -> str:
    """What a program has said, which must have ended well."""
    assert result.exit_code == 0, (result.exit_code, result.text[-2000:], result.stderr[-2000:])
    return result.text


def resident() -> int:
    """Bytes of memory that this process, the controller, has now."""
    with open("/proc/self/statm", "rb") as file:
        return int(file.read().split()[1]) * os.sysconf("SC_PAGE_SIZE")


async def until(condition: Callable[[], bool]) -> None:
    """Waits until it is so, and lets everything else go on."""
    assert await asyncio.to_thread(wait_until, condition, PATIENCE)


class Peer:
    """A far end of the test's own, at the host's end of the link: one thread for each connection."""

    def __init__(self, serve: Callable[[socket.socket], object]) -> None:
        self._serve = serve
        self._listener = socket.create_server((places.HOST4, 0), backlog=64)
        self.port = int(self._listener.getsockname()[1])
        self.found: list[object] = []
        """What ``serve`` has returned, or raised."""
        threading.Thread(target=self._run, daemon=True).start()

    def _run(self) -> None:
        with suppress(OSError):
            while True:
                sock, _ = self._listener.accept()
                threading.Thread(target=self._one, args=(sock,), daemon=True).start()

    def _one(self, sock: socket.socket) -> None:
        sock.settimeout(PATIENCE)
        try:
            found = self._serve(sock)
        except OSError as error:
            found = type(error).__name__
        self.found.append(found)
        sock.close()

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


@pytest.fixture
def ca(workspace: Path, internet: Internet) -> str:
    """The little internet's CA, inside."""
    return ca_in(workspace, internet.ca_file)


def reach(port: int, **more: object) -> str:
    """An allow rule for a peer."""
    rule = {"cidr": f"{places.HOST4}/32", "port": port, "protocol": "tcp", **more}
    return "allow: [" + json.dumps(rule) + "]"


def all_of(sock: socket.socket) -> bytes:
    """Everything up to the end."""
    data = bytearray()
    while piece := sock.recv(65536):
        data += piece
    return bytes(data)


# ---- connections that stay, side by side with all other tests ----

_STAYS = """
import json, socket, ssl, sys, time
context = ssl.create_default_context(cafile=sys.argv[1])
GET = b"GET / HTTP/1.1\\r\\nHost: wild.test\\r\\n\\r\\n"
plain = socket.create_connection(("wild.test", 80), timeout=20)
secure = context.wrap_socket(socket.create_connection(("wild.test", 443), timeout=20), server_hostname="wild.test")
tcp = socket.create_connection(("mail.test", 25), timeout=20)
def speak(n):
    out = []
    for s in (plain, secure):
        s.sendall(GET)
        data = b""
        while not data.endswith(b"wild.test\\n"):
            data += s.recv(65536)
        out.append(data.split(b"\\r\\n")[0].decode())
    tcp.sendall(b"NOOP\\r\\n")
    out.append(tcp.recv(4096).decode().strip())
    return out
tcp.recv(4096)
first = speak(0)
time.sleep(float(sys.argv[2]))
print(json.dumps([first, speak(1)]))
"""
_SILENCE = 32.0
"""Seconds; longer than what the gateway gives to first bytes, heads and handshakes."""
_STAYS_POLICY = """\
network:
  resolvers: [203.0.113.53]
  allow:
    - {name: wild.test, limits: {idle: 50s}}
    - {name: mail.test, port: 25, protocol: tcp}
"""


@pytest.fixture(scope="module", autouse=True)
def silent(internet: Internet, tmp_path_factory: pytest.TempPathFactory) -> Iterator[subprocess.Popen[bytes]]:
    """A client that connects, says little, and is silent while the other tests run; none of them uses wild.test."""
    directory = tmp_path_factory.mktemp("silent")
    (directory / "p.yaml").write_text(_STAYS_POLICY)
    for name in ("runtime", "state", "workspace"):
        (directory / name).mkdir(mode=0o700)
    trusted = ca_in(directory / "workspace", internet.ca_file)
    environment = os.environ | {"XDG_RUNTIME_DIR": f"{directory}/runtime", "XDG_STATE_HOME": f"{directory}/state"}
    if "PYTHONPATH" in environment:
        environment["PYTHONPATH"] = ":".join(map(os.path.abspath, environment["PYTHONPATH"].split(":")))
    words = ["run", "--policy", str(directory / "p.yaml"), "--", PYTHON, "-c", _STAYS, trusted, str(_SILENCE)]
    process = subprocess.Popen(
        [*corral_command(), *words],
        cwd=directory / "workspace",
        env=environment,
        stdin=subprocess.DEVNULL,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
    )
    try:
        yield process
    finally:
        process.kill()
        process.communicate()


# ---- package managers ----


async def test_pip_installs_from_an_index(make_box: MakeBox, internet: Internet, ca: str) -> None:
    if not Path("/usr/lib/python3/dist-packages/pip").exists():
        pytest.skip("no pip for the system's Python on this machine (Debian: python3-pip)")
    box = await make_box(policy=policy_of("allow: [pypi.test:443]"))
    command = (
        f"{PYTHON} -m pip --disable-pip-version-check -q install --target site --cert {ca}"
        f" --index-url https://pypi.test/simple/ {packages.NAME} && PYTHONPATH=site {PYTHON} -m corral_hello"
    )
    assert fine(await shell(box, command, timeout=60)) == f"{GREETING}\n"


async def test_npm_installs_from_a_registry(make_box: MakeBox, internet: Internet, ca: str) -> None:
    needs("npm", "node")
    box = await make_box(policy=policy_of("allow: [npm.test:443]"))
    command = (
        f"npm install --silent --no-audit --no-fund --registry https://npm.test/ --cafile {ca} {packages.NAME}"
        f" && node -e 'require(\"{packages.NAME}\")'"
    )
    assert GREETING in fine(await shell(box, command, timeout=60))


async def test_a_client_of_node(make_box: MakeBox, internet: Internet, ca: str) -> None:
    needs("node")
    box = await make_box(policy=policy_of("allow: [web.test:443]"))
    code = "fetch('https://web.test/').then(r => r.text()).then(t => process.stdout.write(t))"
    command = f'NODE_EXTRA_CA_CERTS={ca} node -e "{code}"'
    assert fine(await shell(box, command, timeout=60)) == "hello from web.test\n"


async def test_apt_updates_and_installs(make_box: MakeBox, internet: Internet) -> None:
    """Its requests are pipelined."""
    if shutil.which("apt-get") is None or not Path("/var/lib/dpkg/status").exists():
        pytest.skip("this machine is not Debian or kin")
    box = await make_box(policy=policy_of("allow: [apt.test:80]"), user="root")
    command = f"""
        set -e
        export DEBIAN_FRONTEND=noninteractive
        echo 'deb [trusted=yes] http://apt.test/debian stable main' >/etc/apt/far.list
        apt="apt-get -q -o Dir::Etc::sourcelist=/etc/apt/far.list -o Dir::Etc::sourceparts=- -o Acquire::Languages=none"
        $apt update >&2
        mkdir /usr/share/corral-hello  # which the package leaves out
        $apt install -y {packages.NAME} </dev/null >&2
        cat /usr/share/corral-hello/hello
    """
    assert fine(await shell(box, command, timeout=90)) == f"{GREETING}\n"


# ---- git ----

_PUSH = """
    set -e
    export GIT_AUTHOR_NAME=a GIT_AUTHOR_EMAIL=a@b GIT_COMMITTER_NAME=a GIT_COMMITTER_EMAIL=a@b
    git clone -q "$1" mine
    cat mine/README
    head -c 3000000 /dev/urandom >mine/large
    git -C mine add large
    git -C mine commit -qm 'From inside'
    git -C mine push -q origin HEAD:refs/heads/"$2"
    git clone -q --branch "$2" "$1" again
    cmp mine/large again/large && echo same
"""


async def push(box: Sandbox, url: str, branch: str, environment: dict[str, str]) -> str:
    result = await box.exec(["sh", "-c", _PUSH, "push", url, branch], env=environment, timeout=60)
    return fine(result)


async def test_git_over_https(make_box: MakeBox, internet: Internet, ca: str) -> None:
    needs("git")
    box = await make_box(policy=policy_of("allow: [git.test:443]"))
    told = await push(box, "https://git.test/hello.git", "by-https", {"GIT_SSL_CAINFO": ca})
    assert told == "hello from git.test\nsame\n"


async def test_git_over_ssh_where_ssh_is_named(make_box: MakeBox, internet: Internet) -> None:
    needs("git", "ssh")
    if not internet.ssh_key:
        pytest.skip("no sshd on this machine")
    box = await make_box(policy=policy_of("allow: [{name: git.test, port: 22, protocol: ssh}]"))
    place = ["sh", "-c", 'umask 077; printf %s "$1" >~/key; printf %s "$2" >~/known', "place"]
    fine(await box.exec([*place, internet.ssh_key, internet.known_hosts]))
    ssh = "ssh -F /dev/null -i ~/key -o IdentitiesOnly=yes -o BatchMode=yes -o UserKnownHostsFile=~/known"
    told = await push(box, "git@git.test:hello.git", "by-ssh", {"GIT_SSH_COMMAND": ssh})
    assert told == "hello from git.test\nsame\n"


# ---- HTTP ----


@pytest.mark.parametrize(("flag", "version"), [("--http1.1", "HTTP/1.1"), ("--http2", "HTTP/2")])
async def test_curl_speaks_its_own_http(
    make_box: MakeBox, internet: Internet, ca: str, flag: str, version: str
) -> None:
    box = await make_box(policy=policy_of("allow: [web.test:443]"))
    internet.clear()
    told = fine(await shell(box, f"curl -sS -m 8 {flag} --cacert {ca} https://web.test/echo"))
    assert json.loads(told)["version"] == version
    [arrival] = internet.records(address="web.test")
    assert [request.version for request in arrival.requests] == [version]


_WEBSOCKET = """
    import base64, os, socket, ssl, sys
    host, port, ca = sys.argv[1], int(sys.argv[2]), sys.argv[3]
    s = socket.create_connection((host, port), timeout=8)
    if ca:
        s = ssl.create_default_context(cafile=ca).wrap_socket(s, server_hostname=host)
    key = base64.b64encode(os.urandom(16)).decode()
    s.sendall((f"GET /websocket HTTP/1.1\\r\\nHost: {host}\\r\\nUpgrade: websocket\\r\\nConnection: Upgrade\\r\\n"
               f"Sec-WebSocket-Key: {key}\\r\\nSec-WebSocket-Version: 13\\r\\n\\r\\n").encode())
    stream = s.makefile("rb")
    status = stream.readline().split()[1].decode()
    while stream.readline().strip():
        pass
    print(status)
    if status == "101":
        for text in (b"first", b"x" * 60000, b"last"):
            size = bytes((128 | len(text),)) if len(text) < 126 else b"\\xfe" + len(text).to_bytes(2, "big")
            s.sendall(b"\\x82" + size + bytes(4) + text)
            head = stream.read(2)
            length = head[1] if head[1] < 126 else int.from_bytes(stream.read(2), "big")
            print(stream.read(length) == text)
        s.sendall(b"\\x88\\x80" + bytes(4))
        print(stream.read(2).hex(), stream.read())
"""
_TALKED = "101\nTrue\nTrue\nTrue\n8800 b''\n"


async def test_a_websocket_in_clear_needs_its_permission(make_box: MakeBox, internet: Internet) -> None:
    box = await make_box(policy=policy_of("allow: [{name: web.test, port: 80, permit: [websocket]}, api.test:80]"))
    assert fine(await python(box, _WEBSOCKET, "web.test", "80", "")) == _TALKED
    internet.clear()
    assert fine(await python(box, _WEBSOCKET, "api.test", "80", "")) == "403\n"
    assert internet.arrived("api.test") == 0


async def test_a_websocket_within_tls_is_passed_through(make_box: MakeBox, internet: Internet, ca: str) -> None:
    box = await make_box(policy=policy_of("allow: [http1.test:443]"))
    assert fine(await python(box, _WEBSOCKET, "http1.test", "443", ca)) == _TALKED


_STREAMS = """
    import hashlib, socket, ssl, sys
    import h2.config, h2.connection, h2.events
    context = ssl.create_default_context(cafile=sys.argv[1])
    context.set_alpn_protocols(["h2"])
    s = context.wrap_socket(socket.create_connection(("web.test", 443), timeout=8), server_hostname="web.test")
    print(s.selected_alpn_protocol())
    c = h2.connection.H2Connection(h2.config.H2Configuration(client_side=True))
    c.initiate_connection()
    head = lambda method, path: [(":method", method), (":path", path), (":authority", "web.test"), (":scheme", "https"),
                                 ("content-type", "application/grpc"), ("te", "trailers")]
    c.send_headers(1, head("POST", "/upload"))                          # goes up, piece by piece ...
    c.send_headers(3, head("GET", "/big?bytes=3000000"), end_stream=True)  # ... while this comes down
    c.send_headers(5, head("GET", "/slow?bytes=100&seconds=1"), end_stream=True)
    s.sendall(c.data_to_send())
    piece, left, sent = b"message " * 512, 300, hashlib.sha256()
    found, over, order = {1: b"", 3: b"", 5: b""}, set(), []
    while len(over) < 3:
        while left and min(c.local_flow_control_window(1), c.max_outbound_frame_size) >= len(piece):
            c.send_data(1, piece); sent.update(piece); left -= 1
            if not left:
                c.end_stream(1)
            if left % 20 == 0:
                break
        s.sendall(c.data_to_send())
        for event in c.receive_data(s.recv(65536)):
            if isinstance(event, h2.events.DataReceived):
                found[event.stream_id] += event.data
                c.acknowledge_received_data(event.flow_controlled_length, event.stream_id)
                if event.stream_id == 3 and left:
                    order.append("both ways at once")
            elif isinstance(event, h2.events.StreamEnded):
                over.add(event.stream_id)
        s.sendall(c.data_to_send())
    print(bool(order), len(found[3]), len(found[5]), sent.hexdigest() in found[1].decode())
"""


async def test_streams_both_ways_at_once_as_grpc_has_them(
    make_box: MakeBox, internet: Internet, ca: str, workspace: Path
) -> None:
    import h2
    import hpack
    import hyperframe

    for package in (h2, hpack, hyperframe):
        assert package.__file__ is not None
        shutil.copytree(Path(package.__file__).parent, workspace / "site" / package.__name__)
    box = await make_box(policy=policy_of("allow: [web.test:443]"))
    code = f"import sys; sys.path.insert(0, {str(workspace / 'site')!r})\n" + textwrap.dedent(_STREAMS)
    result = await box.exec([PYTHON, "-c", code, ca], timeout=30)
    assert fine(result) == "h2\nTrue 3000000 100 True\n"


# ---- much, and slowly ----


@pytest.mark.parametrize("scheme", ["http", "https"])
async def test_a_large_download_and_a_large_upload(make_box: MakeBox, internet: Internet, ca: str, scheme: str) -> None:
    """Both at once; every byte counts. The controller does not grow with them."""
    box = await make_box(policy=policy_of("allow: [http1.test]", irreversible="allow"))
    source = f"head -c {MUCH} /dev/zero | tr '\\0' x"
    curl = f"curl -sS -m 60 --cacert {ca}"
    before = resident()
    began = time.monotonic()
    down, up = await asyncio.gather(
        shell(box, f"{curl} '{scheme}://http1.test/big?bytes={MUCH}' | sha256sum", timeout=70),
        shell(box, f"{source} | {curl} -H Expect: -T - {scheme}://http1.test/upload", timeout=70),
    )
    took = time.monotonic() - began
    expected = hashlib.sha256(b"x" * MUCH).hexdigest()
    assert fine(down).split()[0] == expected
    assert json.loads(fine(up)) == {"bytes": MUCH, "sha256": expected}
    print(f"{scheme}: {2 * MUCH / took / 1e6:.0f} MB/s both ways, {(resident() - before) >> 20} MiB more resident")
    assert resident() - before < SPARE


_SLOW = """
    import socket, ssl, sys, time
    secure, ca, count = sys.argv[1] == "https", sys.argv[2], int(sys.argv[3])
    context = ssl.create_default_context(cafile=ca)
    open_now = []
    for _ in range(count):
        s = socket.create_connection(("web.test", 443 if secure else 80), timeout=15)
        if secure:
            s = context.wrap_socket(s, server_hostname="web.test")
        s.sendall(b"GET /big?bytes=200000000 HTTP/1.1\\r\\nHost: web.test\\r\\n\\r\\n")
        open_now.append(s)
    for round in range(10):
        for s in open_now:
            assert s.recv(4096)
        time.sleep(0.2)
    # Not starved, only slow: the rest comes as it is wanted.
    read = 0
    while read < 20_000_000:
        read += len(open_now[0].recv(1 << 18))
    print("read", flush=True)
"""


@pytest.mark.parametrize("scheme", ["http", "https"])
async def test_slow_readers_hold_up_themselves(make_box: MakeBox, internet: Internet, ca: str, scheme: str) -> None:
    """30 of them have 6 GB waiting for them; the controller keeps less than SPARE of it, and serves others."""
    box = await make_box(policy=policy_of("allow: [web.test]"))
    before, most = resident(), 0
    running = asyncio.create_task(python(box, _SLOW, scheme, ca, "30", timeout=40))
    taken = 0
    for _ in range(8):
        await asyncio.sleep(0.2)
        most = max(most, resident() - before)
        taken = max(taken, max((flow.bytes_down for flow in live(box)), default=0))
    began = time.monotonic()
    assert fine(await shell(box, f"curl -sS -m 8 --cacert {ca} {scheme}://web.test/")) == "hello from web.test\n"
    waited = time.monotonic() - began
    assert fine(await running) == "read\n"
    print(
        f"{scheme}: {most >> 20} MiB more, at most {taken >> 20} MiB of one flow taken in, others wait {waited:.2f} s"
    )
    assert most < SPARE
    assert taken < 32 << 20
    assert waited < 4


async def test_a_slow_server_holds_up_its_client_only(make_box: MakeBox, make_peer: MakePeer) -> None:
    def serve(sock: socket.socket) -> int:
        sock.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 65536)
        read = len(sock.recv(100))
        time.sleep(1.5)
        return read + len(all_of(sock))

    peer = make_peer(serve)
    box = await make_box(policy=policy_of(reach(peer.port)))
    code = """
        import socket, sys, time
        s = socket.create_connection(("198.51.100.1", int(sys.argv[1])))
        began = time.monotonic()
        s.sendall(b"-" + b"x" * 49_999_999)
        s.close()
        print(time.monotonic() - began > 1)
    """
    before = resident()
    running = asyncio.create_task(python(box, code, str(peer.port)))
    await asyncio.sleep(1)
    assert resident() - before < SPARE
    assert fine(await running) == "True\n"
    await until(lambda: bool(peer.found))
    assert peer.found == [50_000_000]


# ---- many ----

_MANY = """
import asyncio, json, sys, time
async def one(start, over):
    reader, writer = await asyncio.open_connection("web.test", 80)
    start.append(1)
    while len(start) < 1000:
        await asyncio.sleep(0.05)
    writer.write(b"GET / HTTP/1.1\\r\\nHost: web.test\\r\\n\\r\\n")
    told = await asyncio.wait_for(reader.readuntil(b"web.test\\n"), 40)
    over.append(told.startswith(b"HTTP/1.1 200"))
    while len(over) < 1000:
        await asyncio.sleep(0.05)
    writer.close()
async def main():
    start, over, began = [], [], time.monotonic()
    await asyncio.gather(*(one(start, over) for _ in range(1000)))
    print(len(over), all(over), round(time.monotonic() - began, 1))
asyncio.run(main())
"""


@pytest.fixture
def cli(tmp_path: Path, workspace: Path) -> Iterator[CommandLine]:
    with adopting_orphans():
        yield CommandLine(tmp_path, workspace)


def _all_files() -> None:
    """As many open files as the user may have: three for each connection."""
    hard = resource.getrlimit(resource.RLIMIT_NOFILE)[1]
    resource.setrlimit(resource.RLIMIT_NOFILE, (hard, hard))


def test_a_thousand_connections_at_once(cli: CommandLine, internet: Internet) -> None:
    if resource.getrlimit(resource.RLIMIT_NOFILE)[1] < 5000:
        pytest.skip("this user may not open enough files (ulimit -Hn)")
    (cli.workspace / "p.yaml").write_text(
        "network:\n  resolvers: [203.0.113.53]\n  allow: [{name: web.test, port: 80, limits: {connections: 1100}}]\n"
    )
    internet.clear()
    done = cli.run("--policy", "p.yaml", "--", PYTHON, "-c", _MANY, preexec_fn=_all_files, timeout=90)
    assert done.returncode == 0, (done.stdout, done.stderr[-3000:])
    print("1,000 connections:", done.stdout.decode())
    assert done.stdout.startswith(b"1000 True ")
    assert sum(len(arrival.requests) for arrival in internet.records(address="web.test")) == 1000


# ---- how connections end ----


async def test_the_end_of_what_a_client_says_is_passed_on(make_box: MakeBox, make_peer: MakePeer) -> None:
    """Half-close, as in ``ssh host cat <file``: the answer still comes."""

    def serve(sock: socket.socket) -> bytes:
        said = all_of(sock)
        time.sleep(0.3)
        sock.sendall(b"heard " + said)
        return said

    peer = make_peer(serve)
    box = await make_box(policy=policy_of(reach(peer.port)))
    code = """
        import socket, sys
        s = socket.create_connection(("198.51.100.1", int(sys.argv[1])), timeout=8)
        s.sendall(b"all of it\\n"); s.shutdown(socket.SHUT_WR)
        print(s.recv(100), s.recv(100))
    """
    assert fine(await python(box, code, str(peer.port))) == "b'heard all of it\\n' b''\n"
    assert peer.found == [b"all of it\n"]


async def test_the_end_of_what_a_server_says_is_passed_on(make_box: MakeBox, make_peer: MakePeer) -> None:
    def serve(sock: socket.socket) -> bytes:
        first = sock.recv(100)
        sock.sendall(b"no more")
        sock.shutdown(socket.SHUT_WR)
        return first + all_of(sock)

    peer = make_peer(serve)
    box = await make_box(policy=policy_of(reach(peer.port)))
    code = """
        import socket, sys, time
        s = socket.create_connection(("198.51.100.1", int(sys.argv[1])), timeout=8)
        s.sendall(b"first\\n"); print(s.recv(100), s.recv(100))
        for _ in range(5):
            s.sendall(b"y" * 100_000); time.sleep(0.05)
    """
    assert fine(await python(box, code, str(peer.port))) == "b'no more' b''\n"
    await until(lambda: bool(peer.found))
    assert peer.found == [b"first\n" + b"y" * 500_000]


async def test_half_close_within_tls_and_of_requests(make_box: MakeBox, internet: Internet, ca: str) -> None:
    box = await make_box(policy=policy_of("allow: [web.test]"))
    code = """
        import socket, ssl, sys
        for port in (80, 443):
            s = socket.create_connection(("web.test", port), timeout=8)
            if port == 443:
                s = ssl.create_default_context(cafile=sys.argv[1]).wrap_socket(s, server_hostname="web.test")
            s.sendall(b"GET /slow?bytes=1000&seconds=1 HTTP/1.1\\r\\nHost: web.test\\r\\n\\r\\n")
            socket.fromfd(s.fileno(), s.family, s.type).shutdown(socket.SHUT_WR)  # without TLS's own farewell
            data = b""
            while piece := s.recv(4096):
                data += piece
            print(port, len(data.partition(b"\\r\\n\\r\\n")[2]))
    """
    assert fine(await python(box, code, ca)) == "80 1000\n443 1000\n"


async def test_a_reset_is_passed_on_both_ways(make_box: MakeBox, make_peer: MakePeer) -> None:
    def serve(sock: socket.socket) -> object:
        if sock.recv(100) == b"up\n":
            sock.sendall(b"go on")
            return sock.recv(100)  # raises ConnectionResetError
        sock.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, _RESET)
        return "sent"

    peer = make_peer(serve)
    box = await make_box(policy=policy_of(reach(peer.port)))
    code = """
        import socket, struct, sys, time
        s = socket.create_connection(("198.51.100.1", int(sys.argv[1])), timeout=8)
        s.sendall(b"down\\n")
        try:
            print("down", s.recv(100))
        except OSError as error:
            print("down", type(error).__name__)
        s = socket.create_connection(("198.51.100.1", int(sys.argv[1])), timeout=8)
        s.sendall(b"up\\n"); print(s.recv(100))
        s.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0)); s.close()
    """
    assert fine(await python(box, code, str(peer.port))) == "down ConnectionResetError\nb'go on'\n"
    await until(lambda: len(peer.found) == 2)
    assert peer.found == ["sent", "ConnectionResetError"]


async def test_a_reset_in_an_answer_is_passed_on(make_box: MakeBox, make_peer: MakePeer) -> None:
    """Of HTTP in clear, where the gateway sees the answer: one without a length must not look whole."""

    def serve(sock: socket.socket) -> object:
        sock.recv(4096)
        sock.sendall(b"HTTP/1.1 200 OK\r\n\r\nhalf of it")
        time.sleep(0.2)
        sock.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, _RESET)
        return None

    peer = make_peer(serve)
    box = await make_box(policy=policy_of(reach(peer.port, protocol="http")))
    result = await shell(box, f"curl -sS -m 9 http://{places.HOST4}:{peer.port}/")
    assert result.exit_code != 0, result


async def test_a_client_that_is_killed_leaves_nothing_open(make_box: MakeBox, make_peer: MakePeer) -> None:
    peer = make_peer(lambda sock: (sock.recv(2), sock.recv(1)))
    box = await make_box(policy=policy_of(reach(peer.port)))
    code = """
        import os, socket, sys, time
        s = socket.create_connection(("198.51.100.1", int(sys.argv[1])), timeout=8)
        s.sendall(b"x\\n"); time.sleep(0.3); os.kill(os.getpid(), 9)
    """
    assert (await python(box, code, str(peer.port))).signal == 9
    await until(lambda: bool(peer.found) and not live(box))
    assert peer.found == [(b"x\n", b"")]


# ---- limits ----


async def test_a_connection_on_which_nothing_moves_is_cut(make_box: MakeBox, internet: Internet, ca: str) -> None:
    """A download that goes on is not, however long it takes."""
    box = await make_box(policy=policy_of("allow: [{name: web.test, limits: {idle: 1s}}]"))
    code = """
        import socket, ssl, sys, time
        for port in (80, 443):
            s = socket.create_connection(("web.test", port), timeout=8)
            if port == 443:
                s = ssl.create_default_context(cafile=sys.argv[1]).wrap_socket(s, server_hostname="web.test")
            s.sendall(b"GET / HTTP/1.1\\r\\nHost: web.test\\r\\n\\r\\n")
            assert s.recv(4096).startswith(b"HTTP/1.1 200")
            began = time.monotonic()
            try:
                while socket.socket.recv(s, 4096):  # as it is on the wire: ssl would call a reset an end
                    pass
                how = "end"
            except OSError as error:
                how = type(error).__name__
            print(port, how, 0.8 < time.monotonic() - began < 4)
    """
    idle, steady = await asyncio.gather(
        python(box, code, ca),
        shell(box, f"curl -sS -m 9 --cacert {ca} 'https://web.test/slow?bytes=1000&seconds=3' | wc -c"),
    )
    assert fine(idle) == "80 ConnectionResetError True\n443 ConnectionResetError True\n"
    assert fine(steady).strip() == "1000"


@pytest.mark.parametrize("scheme", ["http", "https"])
async def test_more_than_its_bytes_ends_a_flow(make_box: MakeBox, internet: Internet, ca: str, scheme: str) -> None:
    box = await make_box(
        policy=policy_of("allow: [{name: web.test, limits: {up: 100kB, down: 200kB}}]", irreversible="allow")
    )
    curl = f"curl -sS -m 9 --cacert {ca}"
    internet.clear()
    up, down, both = await asyncio.gather(
        shell(box, f"head -c 20000000 /dev/zero | {curl} -H Expect: -T - {scheme}://web.test/upload"),
        # In HTTP/2 a client talks while it reads: a reset that its sending meets first costs it what it has not read.
        shell(box, f"{curl} --http1.1 '{scheme}://web.test/big?bytes=20000000' | wc -c"),
        shell(box, f"head -c 50000 /dev/zero | {curl} -T - {scheme}://web.test/upload"),
    )
    assert up.exit_code != 0
    assert 0 < int(down.text) <= 200_000
    assert json.loads(fine(both))["bytes"] == 50_000
    arrived = sorted(arrival.bytes for arrival in internet.records(address="web.test"))
    assert len(arrived) == 3
    assert arrived[-1] <= 100_000, arrived


async def test_no_more_connections_than_the_rule_has(make_box: MakeBox, internet: Internet, ca: str) -> None:
    box = await make_box(policy=policy_of("allow: [{name: web.test, limits: {connections: 5}}]"))
    code = """
        import socket, ssl, sys
        context = ssl.create_default_context(cafile=sys.argv[1])
        open_now, refused = [], 0
        def one():
            s = socket.create_connection(("web.test", 443), timeout=8)
            return context.wrap_socket(s, server_hostname="web.test")
        for _ in range(8):
            try:
                open_now.append(one())
            except ssl.SSLError:
                refused += 1
        print(len(open_now), refused)
        for s in open_now:
            s.close()
        for _ in range(50):
            try:
                one(); print("again"); break
            except ssl.SSLError:
                pass
    """
    internet.clear()
    assert fine(await python(box, code, ca)) == "5 3\nagain\n"
    found = [decision for decision in decisions(box, Kind.NET_CONNECT) if decision.rule == "gateway.limits"]
    assert len(found) >= 3


# ---- the way there ----


async def test_an_upstream_proxy_is_asked_for_the_address_that_was_decided(
    make_box: MakeBox, internet: Internet, ca: str
) -> None:
    """Never for the name: the proxy would look it up anew."""
    box = await make_box(policy=policy_of("allow: [web.test, private.test]", proxy="http://203.0.113.31:3128"))
    internet.clear()
    for scheme in ("http", "https"):
        command = f"curl -sS -m 8 --cacert {ca} {scheme}://web.test/"
        assert fine(await shell(box, command)) == "hello from web.test\n"
    assert "403" in fine(await shell(box, "curl -sS -m 8 -i http://private.test/"))
    asked = [request for arrival in internet.records(service="proxy") for request in arrival.requests]
    web = places.PLACES["web"]
    allowed = {f"{host}:{port}" for host in (web.ipv4, f"[{web.ipv6}]") for port in (80, 443)}
    assert len(asked) == 2
    for request in asked:
        assert request.method == "CONNECT"
        assert request.target in allowed
        assert request.header("host") == request.target
    assert {arrival.source for arrival in internet.records(address="web.test")}.isdisjoint((places.HOST4, places.HOST6))


async def test_an_upstream_proxy_that_says_no(make_box: MakeBox, internet: Internet) -> None:
    box = await make_box(policy=policy_of("allow: [closed.test]", proxy="http://203.0.113.31:3128"))
    told = fine(await shell(box, "curl -sS -m 12 -i http://closed.test/"))
    assert told.startswith("HTTP/1.1 502")
    assert "the upstream proxy refused it" in told


async def test_addresses_that_do_not_answer_are_passed_over(
    make_box: MakeBox, internet: Internet, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Happy eyeballs: families apart, one that refuses, and one that is silent, beside one that works."""
    honest = StubLookup.resolve
    silent = (places.PLACES["blackhole"].ipv6, places.PLACES["blackhole"].ipv4, places.PLACES["web"].ipv4)

    def resolve(self: StubLookup, name: str, done: Done) -> None:
        if name != "late.test":
            honest(self, name, done)
            return
        families = (socket.AF_INET6 if ":" in text else socket.AF_INET for text in silent)
        found = tuple(socket.inet_pton(*pair) for pair in zip(families, silent, strict=True))
        self._loop.call_later(0, done, Resolved(found, 60.0))

    monkeypatch.setattr(StubLookup, "resolve", resolve)
    names = ("fallback.test", "v4only.test", "v6only.test", "late.test")
    box = await make_box(policy=policy_of("allow: [fallback.test, v4only.test, v6only.test, late.test]"))
    began = time.monotonic()
    told = await asyncio.gather(*(shell(box, f"curl -sS -m 9 http://{name}/") for name in names))
    assert [fine(result) for result in told] == [f"hello from {name}\n" for name in names]
    assert time.monotonic() - began < 5


async def test_a_client_of_one_family_reaches_servers_of_the_other(make_box: MakeBox, internet: Internet) -> None:
    """What stands for a name is in both families, wherever the name itself is."""
    names = ("v4only.test", "v6only.test")
    box = await make_box(policy=policy_of(f"allow: [{', '.join(names)}]"))
    for family in ("-4", "-6"):
        told = await asyncio.gather(*(shell(box, f"curl -sS {family} -m 9 http://{name}/") for name in names))
        assert [fine(result) for result in told] == [f"hello from {name}\n" for name in names]


async def test_a_place_that_does_not_answer_is_given_up(make_box: MakeBox, internet: Internet) -> None:
    rules = "allow: [{name: blackhole.test, limits: {dial: 1s}}, closed.test, prohibited.test]"
    box = await make_box(policy=policy_of(rules))
    names = ("blackhole", "closed", "prohibited")
    results = await asyncio.gather(*(shell(box, f"curl -sS -m 8 -i http://{name}.test/") for name in names))
    for name, result in zip(names, results, strict=True):
        told = fine(result)
        assert told.startswith("HTTP/1.1 502"), (name, told)
        assert f"{name}.test cannot be reached" in told


_FAULTS = {
    "servfail.test": False,
    "refused.test": False,
    "dead.test": False,
    "slow.test": False,  # 3 s, each time that it is asked; 2 s are waited for
    "garbage.test": False,
    "wrong-id.test": False,  # not for us, whatever it says
    "wrong-question.test": False,
    "truncated.test": True,  # whole over TCP
    "stray-records.test": True,
    "web.test": True,  # nobody else is held up
}


async def test_a_resolver_that_misbehaves(make_box: MakeBox, internet: Internet) -> None:
    allowed = ", ".join(f"'{name}:80'" for name in (*_FAULTS, "bank.example"))
    box = await make_box(policy=policy_of(f"allow: [{allowed}]"))
    internet.clear()
    began = time.monotonic()

    async def one(name: str) -> tuple[str, float]:
        told = fine(await shell(box, f"curl -sS -m 15 -i http://{name}/"))
        return told, time.monotonic() - began

    results = dict(zip(_FAULTS, await asyncio.gather(*map(one, _FAULTS)), strict=True))
    for name, works in _FAULTS.items():
        told, took = results[name]
        assert told.startswith("HTTP/1.1 200" if works else "HTTP/1.1 502"), (name, told)
        assert took < 12
    assert results["web.test"][1] < 3
    # What came beside an answer to another question is nobody's address.
    told, _ = await one("bank.example")
    assert told.startswith("HTTP/1.1 502"), told
    assert internet.arrived("sink") == 0


# ---- held ----

ASKS = "ask: [{name: api.test, port: 80}]"
_ASYNC = """
    import asyncio, time
    async def main():
        ticks = 0
        async def tick():
            nonlocal ticks
            while True:
                await asyncio.sleep(0.02); ticks += 1
        ticking = asyncio.create_task(tick())
        try:
            await asyncio.get_running_loop().getaddrinfo("api.test", 80)
            before, began = ticks, time.monotonic()
            reader, writer = await asyncio.open_connection("api.test", 80)
            asleep = time.monotonic() - began > 0.6 and ticks - before < 25
            writer.write(b"GET / HTTP/1.1\\r\\nHost: api.test\\r\\nConnection: close\\r\\n\\r\\n")
            told = (await reader.read()).split(b"\\r\\n")[0].decode()
        except OSError as error:
            asleep = time.monotonic() - began > 0.6 and ticks - before < 25
            told = "refused" if "Permission denied" in str(error) or "Multiple" in str(error) else repr(error)
        print(told, asleep)
    asyncio.run(main())
"""


async def questions(box: Sandbox, count: int = 1) -> tuple[Question, ...]:
    """Waits until so many are held, and returns them."""
    queue = box.core.supervision.approvals
    await until(lambda: len(queue.waiting()) >= count)
    return tuple(queue.waiting())


def answer(box: Sandbox, verdict: Verdict, scope: Scope = Scope.ONCE) -> None:
    """The first question that waits is answered."""
    queue = box.core.supervision.approvals
    queue.answer(queue.waiting()[0].number, verdict, by="test", scope=scope)


@pytest.mark.parametrize(("verdict", "heard"), [(Verdict.ALLOW, "HTTP/1.1 200 OK"), (Verdict.DENY, "refused")])
async def test_a_non_blocking_client_sleeps_in_connect_until_the_answer(
    make_box: MakeBox, internet: Internet, verdict: Verdict, heard: str
) -> None:
    """The loop's thread is in the kernel: its clocks stand still. Refused, it tries the next address, and asks anew."""
    box = await make_box(policy=policy_of(ASKS))
    internet.clear()
    running = asyncio.create_task(python(box, _ASYNC))
    [question] = await questions(box)
    assert question.action.kind is Kind.NET_CONNECT
    await asyncio.sleep(0.8)
    assert internet.arrived("api.test") == 0
    answer(box, verdict)
    while not running.done():
        await asyncio.sleep(0.02)
        if box.core.supervision.approvals.waiting():
            answer(box, verdict)
    assert fine(await running) == f"{heard} True\n"
    assert (internet.arrived("api.test") > 0) is (verdict is Verdict.ALLOW)


async def test_no_answer_in_time_means_no(make_box: MakeBox, internet: Internet) -> None:
    policy = parse_policy(
        f"network:\n  {ASKS}\n  resolvers: [203.0.113.53]\napprovals: {{timeout: 1s}}\n", source="test.yaml"
    )
    box = await make_box(policy=policy)
    internet.clear()
    assert fine(await python(box, _ASYNC)) == "refused True\n"
    assert internet.arrived("api.test") == 0


async def test_an_answer_for_the_session_is_for_all_that_comes(make_box: MakeBox, internet: Internet) -> None:
    box = await make_box(policy=policy_of(ASKS))
    curl = "curl -sS -m 15 http://api.test/"
    running = [asyncio.create_task(shell(box, curl)) for _ in range(3)]
    await questions(box, 3)
    answer(box, Verdict.ALLOW, Scope.SESSION)
    for result in await asyncio.gather(*running):
        assert fine(result) == "hello from api.test\n"
    assert fine(await shell(box, curl)) == "hello from api.test\n"
    assert not box.core.supervision.approvals.waiting()


async def test_an_answer_for_once_is_for_one(make_box: MakeBox, internet: Internet) -> None:
    box = await make_box(policy=policy_of(ASKS))
    running = [asyncio.create_task(shell(box, "curl -sS -m 15 http://api.test/")) for _ in range(2)]
    await questions(box, 2)
    answer(box, Verdict.ALLOW)
    while not all(task.done() for task in running):  # curl tries the next address of what is refused
        if box.core.supervision.approvals.waiting():
            answer(box, Verdict.DENY)
        await asyncio.sleep(0.02)
    told = sorted([(await task).exit_code for task in running])
    assert told[0] == 0 and told[1] != 0


# ---- the command line ----

_OPEN = """
import socket, time
s = socket.create_connection(("mail.test", 25)); s.recv(100); s.sendall(b"NOOP\\r\\n"); s.recv(100)
print("open", flush=True); time.sleep(60)
"""


def test_corral_net_shows_what_goes_on(cli: CommandLine, internet: Internet) -> None:
    (cli.workspace / "p.yaml").write_text(
        "network:\n  resolvers: [203.0.113.53]\n  allow: [{name: mail.test, port: 25, protocol: tcp}]\n"
    )
    assert cli("net").stdout == b"nothing goes through the gateway\n"
    with cli.live("--policy", "p.yaml", "--", PYTHON, "-c", _OPEN) as (sandbox, process):
        assert process.stdout is not None
        assert process.stdout.readline() == b"open\n"
        [flow] = json.loads(cli("net", "--json", sandbox[:8]).stdout)
        assert flow["sandbox"] == sandbox
        text = cli("net", env={"COLUMNS": "200"}).stdout.decode()
    assert (flow["endpoint"]["name"], flow["endpoint"]["port"], flow["endpoint"]["protocol"]) == (
        "mail.test",
        25,
        "tcp",
    )
    assert (flow["bytes_up"], flow["rule"]) == (6, "network.allow[0]")
    assert flow["bytes_down"] > 20
    for word in (sandbox, "mail.test:25", "python3", "tcp", "6 B", "network.allow[0]"):
        assert word in text, text


def test_what_a_run_has_used_becomes_a_policy(cli: CommandLine, internet: Internet) -> None:
    """Learned, checked, and enough: each use is asked for, and nothing else is."""
    trusted = ca_in(cli.workspace, internet.ca_file)
    (cli.workspace / "open.yaml").write_text("network: {resolvers: [203.0.113.53]}\n")
    script = f"""
        curl -sS -m 8 --cacert {trusted} https://web.test/ && curl -sS -m 8 http://api.test/repos/x >/dev/null
        {PYTHON} -c 'import socket; s = socket.create_connection(("mail.test", 25)); print(s.recv(99)[:3])'
        curl -sS -m 8 http://203.0.113.66/ || true
    """
    options = ("--policy", "open.yaml", "--net", "learn", "--record", "record.jsonl")
    done = cli.run(*options, "--", "sh", "-c", script)
    assert b"hello from web.test" in done.stdout and b"b'220'" in done.stdout, (done.stdout, done.stderr)
    assert b"may reach every public name" in done.stderr
    learned = cli("policy", "learn", "record.jsonl")
    assert learned.returncode == 0, learned.stderr
    (cli.workspace / "learned.yaml").write_bytes(learned.stdout)
    assert cli("policy", "check", "learned.yaml").returncode == 0, learned.stdout
    table = {
        "connect web.test:443": "ask",
        "connect api.test:80": "allow",  # for requests, which are asked for
        "request GET api.test:80/repos/x --protocol http": "ask",
        "request POST api.test:80/repos/x --protocol http": "deny",
        "connect mail.test:25": "ask",
        "connect evil.example:443": "deny",
        "connect 203.0.113.66:80": "deny",
    }
    lines = (f"- {{action: '{action}', verdict: {verdict}}}\n" for action, verdict in table.items())
    (cli.workspace / "learned.test.yaml").write_text("".join(lines))
    tested = cli("policy", "test", "learned.yaml")
    assert tested.returncode == 0, (tested.stdout, learned.stdout.decode())


def test_net_learn_wants_a_record(cli: CommandLine) -> None:
    assert b"--record" in cli.run("--net", "learn", "--", "true").stderr


# ---- last: what was begun first ----


def test_a_connection_may_be_silent_for_long(silent: subprocess.Popen[bytes]) -> None:
    out, err = silent.communicate(timeout=_SILENCE + PATIENCE)
    assert silent.returncode == 0, err
    answered = ["HTTP/1.1 200 OK", "HTTP/1.1 200 OK", "250 ok"]
    assert json.loads(out) == [answered, answered]
