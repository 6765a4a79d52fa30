"""The little internet itself, from the host: each server answers and writes down, and at the end all is gone.

What is tested with it says "nothing arrived"; this is where that is known to mean something.
"""

from __future__ import annotations

import base64
import hashlib
import json
import os
import shutil
import signal
import socket
import ssl
import struct
import subprocess
import sys
import textwrap
import time
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path

import dns.message
import dns.query
import dns.rcode
import pytest

from tests.internet import http1, lookup, places
from tests.internet.packages import GREETING, debian_package, wheel
from tests.internet.records import Arrival, Reader, Request
from tests.internet.world import Internet

ROOT = Path(__file__).parents[2]


@pytest.fixture
def far(internet: Internet) -> Iterator[Internet]:
    """Nothing recorded yet."""
    internet.clear()
    yield internet
    internet.clear()


def ask(name: str, kind: str, *, tcp: bool = False, server: str = "203.0.113.53") -> dns.message.Message:
    query = dns.message.make_query(name, kind)
    return dns.query.tcp(query, server, 10) if tcp else dns.query.udp(query, server, 10)


def values(name: str, kind: str, tcp: bool = False) -> list[str]:
    return sorted(item.to_text() for rrset in ask(name, kind, tcp=tcp).answer for item in rrset)


def converse(address: str, port: int, data: bytes, *, until: bytes = b"") -> bytes:
    """What comes back."""
    with socket.create_connection((address, port), timeout=10) as sock:
        sock.sendall(data)
        if not until:
            sock.shutdown(socket.SHUT_WR)
        found = b""
        while not until or until not in found:
            piece = sock.recv(65536)
            if not piece:
                break
            found += piece
    return found


def http(path: str, *, address: str = "203.0.113.80", head: str = "") -> bytes:
    request = f"GET {path} HTTP/1.1\r\nHost: web.test\r\nConnection: close\r\n{head}\r\n"
    with socket.create_connection((address, 80), timeout=10) as sock:
        sock.sendall(request.encode())
        return b"".join(iter(lambda: sock.recv(65536), b""))


def https(internet: Internet, name: str, path: str, *, headers: dict[str, str] | None = None) -> bytes:
    context = ssl.create_default_context(cafile=str(internet.ca_file))
    context.set_alpn_protocols(["http/1.1"])
    lines = [f"GET {path} HTTP/1.1", f"Host: {name}", "Connection: close"]
    lines += [f"{key}: {value}" for key, value in (headers or {}).items()]
    with socket.create_connection((internet.names[name], 443), timeout=10) as sock:
        with context.wrap_socket(sock, server_hostname=name) as tls:
            tls.sendall("\r\n".join([*lines, "", ""]).encode())
            return b"".join(iter(lambda: tls.recv(65536), b""))


def curl(internet: Internet, *words: str, resolve: str = "web.test:443") -> str:
    """Standard output of curl, which finds the name of ``resolve`` at its address."""
    if not shutil.which("curl"):
        pytest.skip("no curl on this machine; `make test` as root installs one")
    name, _, _ = resolve.partition(":")
    command = ["curl", "-sS", "-m", "20", "--noproxy", "*", "--cacert", str(internet.ca_file)]
    command += ["--resolve", f"{resolve}:{internet.names[name]}", *words]
    return subprocess.run(command, check=True, capture_output=True, text=True, timeout=30).stdout


def only(found: list[Arrival]) -> Arrival:
    assert len(found) == 1, found
    return found[0]


# ---- names ----


@pytest.mark.parametrize("tcp", [False, True])
def test_names_are_answered_from_the_table_and_queries_recorded(far: Internet, tcp: bool) -> None:
    assert values("web.test", "A", tcp=tcp) == ["203.0.113.80"]
    assert values("web.test", "AAAA", tcp=tcp) == ["2001:db8:2::80"]
    assert values("any.thing.wild.test", "A", tcp=tcp) == ["203.0.113.82"]
    assert [(found.name, found.kind) for found in far.records(service="dns")] == [
        ("web.test", "A"),
        ("web.test", "AAAA"),
        ("any.thing.wild.test", "A"),
    ]


def test_what_does_not_exist_is_said_so() -> None:
    assert ask("nothing.test", "A").rcode() == dns.rcode.NXDOMAIN
    assert ask("web.test", "TXT").rcode() == dns.rcode.NOERROR
    assert not ask("web.test", "TXT").answer
    assert ask("elsewhere.invalid", "A").rcode() == dns.rcode.REFUSED


def test_aliases_are_followed_and_loops_end() -> None:
    assert values("cname.test", "A") == ["203.0.113.80", "web.test."]
    assert values("cname-loop.test", "A") == ["cname-loop.test."]


def test_rebinding_answers_in_turn() -> None:
    assert sorted(values("rebind.test", "A") + values("rebind.test", "A")) == ["127.0.0.1", "203.0.113.80"]


@pytest.mark.parametrize("kind", ["A", "AAAA", "TXT", "NULL", "CNAME", "MX"])
def test_tunnel_zone_answers_any_label(far: Internet, kind: str) -> None:
    name = "0abcdefghijklmnop.x.tunnel.test"
    assert values(name, kind)
    assert only(far.records(service="dns")).name == name


def test_faulty_answers_are_faulty() -> None:
    assert ask("servfail.test", "A").rcode() == dns.rcode.SERVFAIL
    assert ask("truncated.test", "A").flags & 0x0200
    assert values("truncated.test", "A", tcp=True) == ["203.0.113.80"]
    assert ask("many.test", "A").flags & 0x0200, "60 addresses do not fit 512 bytes"
    assert len(values("many.test", "A", tcp=True)) == 60
    query = dns.message.make_query("wrong-id.test", "A")
    assert converse_udp(query.to_wire())[:2] != query.to_wire()[:2]
    assert b"bank" in converse_udp(dns.message.make_query("wrong-question.test", "A").to_wire())
    assert b"bank" in converse_udp(dns.message.make_query("stray-records.test", "A").to_wire())
    with pytest.raises(TimeoutError):
        converse_udp(dns.message.make_query("dead.test", "A").to_wire(), seconds=0.3)


def converse_udp(data: bytes, seconds: float = 10) -> bytes:
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as sock:
        sock.settimeout(seconds)
        sock.sendto(data, ("203.0.113.53", 53))
        return sock.recv(65536)


def test_every_faulty_name_is_known_to_the_table() -> None:
    assert set(places.MISBEHAVIOUR) <= set(lookup._table())


# ---- web ----


def test_web_echoes_and_records_the_request(far: Internet) -> None:
    answer = http("/echo?x=1", head="X-Mark: far\r\n")
    assert json.loads(answer.partition(b"\r\n\r\n")[2])["target"] == "/echo?x=1"
    found = only(far.records(service="http"))
    assert (found.address, found.port, found.source, found.closed) == ("203.0.113.80", 80, places.HOST4, True)
    assert found.head.startswith(b"GET /echo?x=1 HTTP/1.1\r\n")
    request = only_request(found)
    assert (request.method, request.target, request.header("x-mark")) == ("GET", "/echo?x=1", "far")
    assert found.bytes == far.arrived("web.test", 80) == far.arrived("203.0.113.80")


def only_request(found: Arrival) -> Request:
    assert len(found.requests) == 1, found
    return found.requests[0]


def test_web_over_ipv6(far: Internet) -> None:
    if not far.ipv6:
        pytest.skip("this host has no IPv6")
    assert b"hello" in http("/", address="2001:db8:2::80")
    assert only(far.records(service="http")).source == places.HOST6


def test_requests_follow_one_another_on_a_connection(far: Internet) -> None:
    one = b"GET /status?code=204 HTTP/1.1\r\nHost: web.test\r\n\r\n"
    post = b"POST /upload HTTP/1.1\r\nHost: web.test\r\nTransfer-Encoding: chunked\r\n\r\n3\r\nabc\r\n0\r\n\r\n"
    answer = converse("203.0.113.80", 80, one + post + one)
    assert answer.count(b"HTTP/1.1 204") == 2
    assert hashlib.sha256(b"abc").hexdigest().encode() in answer
    found = only(far.records(service="http"))
    assert [request.method for request in found.requests] == ["GET", "POST", "GET"]


def test_long_and_slow_and_chunked_answers() -> None:
    assert len(http("/big?bytes=3000000").partition(b"\r\n\r\n")[2]) == 3_000_000
    start = time.monotonic()
    assert http("/slow?bytes=7&seconds=1").endswith(b"xxxxxxx")
    assert time.monotonic() - start > 0.5
    assert b"chunk 99\n" in http("/chunked?chunks=100")
    assert len(http("/headers-bomb")) > 4_000_000
    bomb = http("/gzip-bomb?bytes=16777216")
    assert b"content-encoding: gzip" in bomb and len(bomb) < 100_000


@pytest.mark.parametrize("path", sorted(http1.RAW))
def test_raw_answers_come_as_they_are(path: str) -> None:
    assert http(path) == http1.RAW[path]


def test_websocket_echoes(far: Internet) -> None:
    head = (
        b"GET /websocket HTTP/1.1\r\nHost: web.test\r\nConnection: Upgrade\r\nUpgrade: websocket\r\n"
        b"Sec-WebSocket-Version: 13\r\nSec-WebSocket-Key: dGhlIHNhbXBsZSBub25jZQ==\r\n\r\n"
    )
    frame = b"\x81\x82abcd" + bytes((ord("h") ^ ord("a"), ord("i") ^ ord("b")))
    answer = converse("203.0.113.80", 80, head + frame, until=b"\x81\x02hi")
    assert b"sec-websocket-accept: s3pPLMBiTxaQ9kYGzzhZRbK+xOo=" in answer  # the example of RFC 6455 §1.3
    assert any("b'hi'" in note for note in only(far.records(service="http")).notes)


def test_secrets_come_back_in_many_spellings() -> None:
    answer = http("/secret-echo", head="Authorization: Bearer s3cr3t/+&\r\n")
    assert b"x-echo-authorization: Bearer s3cr3t/+&" in answer
    assert b"s3cr3t%2F%2B%26" in answer
    assert base64.b64encode(b"s3cr3t/+&") in answer


def test_metadata_gives_a_secret_away(far: Internet) -> None:
    assert b"metadata-secret" in http("/latest/meta-data/", address="203.0.113.169")
    assert far.arrived("metadata.test") > 0


def test_https_records_both_what_was_sent_and_what_it_said(far: Internet) -> None:
    assert b"hello from web.test" in https(far, "web.test", "/")
    found = only(far.records(service="https"))
    assert (found.server_name, found.alpn) == ("web.test", "http/1.1")
    assert found.head[:2] == b"\x16\x03"
    assert found.plain.startswith(b"GET / HTTP/1.1\r\n")
    assert only_request(found).header("host") == "web.test"


def test_half_a_handshake_is_recorded(far: Internet) -> None:
    converse("203.0.113.80", 443, b"\x16\x03\x01\x02\x00\x01")
    found = only(far.records(service="https"))
    assert (found.bytes, found.plain) == (6, b"")


def test_http2(far: Internet) -> None:
    told = json.loads(curl(far, "--http2", "-d", "body", "https://web.test/echo"))
    assert (told["version"], told["method"], told["body"]) == ("HTTP/2", "POST", "body")
    assert len(curl(far, "--http2", "https://web.test/big?bytes=1000000")) == 1_000_000
    first, second = far.records(service="https")
    assert (first.alpn, only_request(first).method, only_request(second).target) == ("h2", "POST", "/big?bytes=1000000")


def test_private_paths_want_the_token(far: Internet) -> None:
    assert b"401" in https(far, "api.test", "/private/x").partition(b"\r\n")[0]
    answer = https(far, "api.test", "/private/x", headers={"Authorization": f"Bearer {far.token}"})
    assert b'"known": true' in answer


@pytest.mark.parametrize("name", ["expired.test", "wrongname.test", "selfsigned.test"])
def test_bad_certificates_are_bad(far: Internet, name: str) -> None:
    with pytest.raises(ssl.SSLCertVerificationError):
        https(far, name, "/")


def test_old_tls(far: Internet) -> None:
    context = ssl.create_default_context(cafile=str(far.ca_file))
    with socket.create_connection((far.names["tls12.test"], 443), timeout=10) as sock:
        with context.wrap_socket(sock, server_hostname="tls12.test") as tls:
            assert tls.version() == "TLSv1.2"
            certificate = tls.getpeercert(binary_form=True)
    assert certificate and hashlib.sha256(certificate).hexdigest() == far.fingerprint("tls12")


# ---- the rest ----


def test_connect_proxy(far: Internet) -> None:
    answer = curl(far, "--http1.1", "--noproxy", "", "-x", "http://203.0.113.31:3128", "-p", "https://web.test/")
    assert answer == "hello from web.test\n"
    assert only_request(only(far.records(service="proxy"))).target == "web.test:443"
    assert only(far.records(service="https")).source == "203.0.113.80", "from inside"


def test_socks(far: Internet) -> None:
    assert (
        curl(far, "--noproxy", "", "-x", "socks5h://203.0.113.10:1080", "http://web.test/") == "hello from web.test\n"
    )
    assert "dial web.test:80" in only(far.records(service="socks")).notes


@pytest.mark.parametrize("port", [3333, 443])
def test_pool(far: Internet, port: int) -> None:
    line = b'{"id": 1, "method": "mining.subscribe", "params": []}\n'
    assert b"mining.notify" in converse("203.0.113.33", port, line, until=b"\n")
    assert only(far.records(service="stratum")).notes == ("method mining.subscribe",)


def test_mail_server_speaks_first(far: Internet) -> None:
    assert converse("203.0.113.58", 25, b"", until=b"\n") == b"220 mail.test ESMTP\r\n"
    assert b"STARTTLS" in converse("203.0.113.58", 25, b"EHLO x\r\n", until=b"8BITMIME")


@pytest.mark.parametrize(("address", "port"), [("203.0.113.66", 80), ("203.0.113.44", 4444)])
def test_sinks_count(far: Internet, address: str, port: int) -> None:
    converse(address, port, b"stolen" * 100_000)
    assert far.arrived(address, port) == 600_000
    found = only(far.records(service="sink"))
    assert found.head == (b"stolen" * 100)[:256]
    assert found.closed


def test_an_open_connection_is_on_record(far: Internet) -> None:
    with socket.create_connection(("203.0.113.66", 443), timeout=10) as sock:
        found = only(far.records(service="sink"))
        assert (found.bytes, found.closed) == (0, False)
        sock.sendall(b"a")
        assert far.arrived("evil.example") == 1
        far.clear()
        sock.sendall(b"bc")
        assert far.arrived("evil.example") == 2, "what came before is forgotten"


def test_datagrams_at_any_port_are_recorded(far: Internet) -> None:
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as sock:
        for port in (1, 53, 123, 443, 51820):
            sock.sendto(b"leak", ("203.0.113.66", port))
            with suppress(ConnectionRefusedError):
                sock.setblocking(False)
    found = far.records(address="203.0.113.66")
    assert [(one.transport, one.port, one.head) for one in found] == [
        ("udp", port, b"leak") for port in (1, 53, 123, 443, 51820)
    ]
    assert far.arrived("203.0.113.66") == 20


@pytest.mark.root
def test_icmp_is_recorded(far: Internet) -> None:
    with socket.socket(socket.AF_INET, socket.SOCK_RAW, socket.IPPROTO_ICMP) as sock:
        sock.sendto(struct.pack("!BBHHH", 8, 0, 0, 1, 1) + b"tunnelled", ("203.0.113.66", 0))
    # The kernel answers no request whose checksum is wrong; that it came is what counts.
    found = only(far.records(address="203.0.113.66"))
    assert (found.transport, found.head) == ("icmp", b"tunnelled")


def test_attempts_at_closed_ports_are_recorded(far: Internet) -> None:
    with pytest.raises(ConnectionRefusedError):
        socket.create_connection(("203.0.113.66", 12345), timeout=10)
    with pytest.raises(ConnectionRefusedError):
        socket.create_connection((far.names["closed.test"], 443), timeout=10)
    with pytest.raises(TimeoutError):
        socket.create_connection((far.names["blackhole.test"], 443), timeout=0.3)
    with pytest.raises(OSError, match=r"No route|denied"):
        socket.create_connection((far.names["prohibited.test"], 443), timeout=10)
    # The kernel may spare itself the first error or two: then the attempt is repeated.
    found = list(dict.fromkeys((one.address, one.port) for one in far.records(service="nobody")))
    assert found == [("203.0.113.66", 12345), ("203.0.113.251", 443), ("203.0.113.250", 443), ("203.0.113.252", 443)]


def test_silence_is_silence(far: Internet) -> None:
    """What the host says on every link by itself does not count."""
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as sock:
        sock.setsockopt(socket.IPPROTO_IP, socket.IP_MULTICAST_IF, socket.inet_aton(far.host))
        sock.sendto(b"who is there", ("224.0.0.251", 5353))
    assert far.records() == []
    assert far.arrived() == 0


# ---- programs ----


@pytest.fixture
def ssh(far: Internet, tmp_path: Path) -> list[str]:
    """A command line up to the host."""
    if not far.ssh_key or not shutil.which("ssh"):
        pytest.skip("no sshd or no ssh on this machine; `make test` as root installs them")
    (tmp_path / "key").touch(0o600)
    (tmp_path / "key").write_text(far.ssh_key)
    (tmp_path / "known").write_text(far.known_hosts)
    options = [f"IdentityFile={tmp_path}/key", f"UserKnownHostsFile={tmp_path}/known", "BatchMode=yes"]
    options += [
        "IdentitiesOnly=yes",
        "StrictHostKeyChecking=yes",
        "GlobalKnownHostsFile=/dev/null",
        "ConnectTimeout=10",
    ]
    return ["ssh", "-F", "/dev/null", *(word for option in options for word in ("-o", option))]


def test_ssh(far: Internet, ssh: list[str]) -> None:
    for port, host in ((22, "203.0.113.22"), (443, "203.0.113.45")):
        command = [*ssh, "-p", str(port), f"git@{host}", "id", "-un"]
        assert subprocess.run(command, check=True, capture_output=True, text=True, timeout=30).stdout == "git\n"
    first, second = far.records(service="ssh")
    assert first.head.startswith(b"SSH-2.0-") and second.port == 443


GIT = {"GIT_CONFIG_GLOBAL": "/dev/null", "GIT_CONFIG_NOSYSTEM": "1", "GIT_TERMINAL_PROMPT": "0"}
"""Who runs the tests may have settings of their own; GIT_SSL_CAINFO goes before http.sslCAInfo."""


def git(*words: str, **environment: str) -> None:
    identity = ["-c", "user.name=t", "-c", "user.email=t@test", "-c", "http.proxy="]
    whole = {key: value for key, value in os.environ.items() if not key.startswith("GIT_")} | GIT | environment
    done = subprocess.run(["git", *identity, *words], env=whole, timeout=60, capture_output=True, text=True)
    assert not done.returncode, done.stderr


def push_something(clone: Path, **environment: str) -> None:
    (clone / "new").write_bytes(os.urandom(20_000))
    git("-C", str(clone), "add", "new", **environment)
    git("-C", str(clone), "commit", "-qm", "new", **environment)
    git("-C", str(clone), "push", "-q", "origin", "HEAD:refs/heads/" + os.urandom(4).hex(), **environment)


def test_git_over_https(far: Internet, tmp_path: Path) -> None:
    resolve = ["-c", f"http.curloptResolve=git.test:443:{far.names['git.test']}", "-c", f"http.sslCAInfo={far.ca_file}"]
    git(*resolve, "clone", "-q", "https://git.test/hello.git", str(tmp_path / "clone"))
    assert (tmp_path / "clone" / "README").read_text() == "hello from git.test\n"
    options = {"GIT_CONFIG_COUNT": "2", "GIT_CONFIG_KEY_0": "http.curloptResolve", "GIT_CONFIG_KEY_1": "http.sslCAInfo"}
    options |= {"GIT_CONFIG_VALUE_0": f"git.test:443:{far.names['git.test']}", "GIT_CONFIG_VALUE_1": str(far.ca_file)}
    push_something(tmp_path / "clone", **options)
    targets = [request.target for found in far.records(service="git") for request in found.requests]
    assert "/hello.git/git-receive-pack" in targets
    with pytest.raises(AssertionError, match="could not read Username"):
        git(*resolve, "clone", "-q", "https://git.test/private.git", str(tmp_path / "private"))
    basic = base64.b64encode(f"x-access-token:{far.token}".encode()).decode()
    header = ["-c", f"http.extraHeader=Authorization: Basic {basic}"]
    git(*resolve, *header, "clone", "-q", "https://git.test/private.git", str(tmp_path / "private"))


def test_git_over_ssh(far: Internet, ssh: list[str], tmp_path: Path) -> None:
    command = {"GIT_SSH_COMMAND": " ".join(ssh)}
    git("clone", "-q", f"git@{far.names['git.test']}:hello.git", str(tmp_path / "clone"), **command)
    push_something(tmp_path / "clone", **command)
    assert far.arrived("git.test", 22) > 20_000


def test_pip(far: Internet, tmp_path: Path) -> None:
    assert f"/files/corral_hello-1.0.0-py3-none-any.whl#sha256={hashlib.sha256(wheel()).hexdigest()}".encode() in https(
        far, "pypi.test", "/simple/corral-hello/"
    )
    # Names are resolved by the host's system here, so pip is given the address and told not to mind the name.
    address = far.names["pypi.test"]
    command = [
        sys.executable,
        "-m",
        "pip",
        "--isolated",
        "install",
        "-q",
        "--no-deps",
        "--target",
        str(tmp_path / "here"),
    ]
    command += [
        "--index-url",
        f"https://{address}/simple/",
        "--trusted-host",
        address,
        "--no-cache-dir",
        "corral-hello",
    ]
    subprocess.run(
        [*command, "--disable-pip-version-check"], check=True, timeout=60, env={**os.environ, "NO_PROXY": "*"}
    )
    program = [sys.executable, str(tmp_path / "here" / "corral_hello.py")]
    assert subprocess.run(program, check=True, capture_output=True, text=True).stdout == GREETING + "\n"


def test_npm_answers(far: Internet) -> None:
    told = json.loads(https(far, "npm.test", "/corral-hello").partition(b"\r\n\r\n")[2])
    version = told["versions"][told["dist-tags"]["latest"]]
    tarball = https(far, "npm.test", version["dist"]["tarball"].removeprefix("https://npm.test"))
    digest = base64.b64encode(hashlib.sha512(tarball.partition(b"\r\n\r\n")[2]).digest()).decode()
    assert version["dist"]["integrity"] == f"sha512-{digest}"


def test_apt(far: Internet, tmp_path: Path) -> None:
    if not shutil.which("apt-get"):
        pytest.skip("no apt on this machine")
    for name in ("lists/partial", "cache/archives/partial", "etc"):
        (tmp_path / name).mkdir(parents=True)
    (tmp_path / "status").touch()
    (tmp_path / "sources").write_text(f"deb [trusted=yes] http://{far.names['apt.test']}/debian stable main\n")
    settings = {
        "Dir::Etc::SourceList": tmp_path / "sources",
        "Dir::Etc::SourceParts": "-",
        "Dir::State::Lists": tmp_path / "lists",
        "Dir::State::status": tmp_path / "status",
        "Dir::Cache": tmp_path / "cache",
        "APT::Sandbox::User": "",
        "Acquire::http::Proxy": "false",
        "Acquire::Retries": "0",
    }
    options = [word for key, value in settings.items() for word in ("-o", f"{key}={value}")]
    for words in (["update"], ["download", "corral-hello"]):
        done = subprocess.run(["apt-get", *options, *words], cwd=tmp_path, capture_output=True, text=True, timeout=60)
        assert not done.returncode and "W:" not in done.stderr, done.stdout + done.stderr
    assert (tmp_path / "corral-hello_1.0.0_all.deb").read_bytes() == debian_package()
    if shutil.which("dpkg-deb"):
        subprocess.run(["dpkg-deb", "--info", "corral-hello_1.0.0_all.deb"], cwd=tmp_path, check=True, timeout=20)


# ---- the end of it, beside the host's network: the same in a namespace of our own ----

SCRIPT = """
import os, signal, subprocess, sys, time
from tests.internet.world import Internet

with Internet() as internet:
    print(internet.directory, internet._server.pid, flush=True)
    sys.stdin.readline()
print(subprocess.run(["ip", "-br", "link"], capture_output=True, text=True).stdout.count("\\n"), flush=True)
sys.stdin.readline()
"""


def start_beside() -> tuple[subprocess.Popen[str], Path, int]:
    """A process with a little internet of its own; its directory, and the process that holds its namespaces."""
    process = subprocess.Popen(
        ["unshare", "--net", "--", sys.executable, "-c", textwrap.dedent(SCRIPT)],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
        cwd=ROOT,
    )
    assert process.stdout is not None
    directory, holder = process.stdout.readline().split()
    return process, Path(directory), int(holder)


def gone(directory: Path, namespace: str) -> bool:
    """No directory, and no process in this network namespace."""
    if directory.exists():
        return False
    for entry in Path("/proc").iterdir():
        with suppress(OSError):
            if entry.name.isdigit() and os.readlink(entry / "ns/net") == namespace:
                return False
    return True


@pytest.mark.root
def test_all_is_gone_after_the_end() -> None:
    process, directory, holder = start_beside()
    with process:
        namespace = os.readlink(f"/proc/{holder}/ns/net")
        assert not gone(directory, namespace)
        assert process.stdin is not None and process.stdout is not None
        process.stdin.write("\n")
        process.stdin.flush()
        assert process.stdout.readline() == "1\n", "of the interfaces only lo is left"
        assert gone(directory, namespace)
        process.stdin.write("\n")


@pytest.mark.root
@pytest.mark.parametrize("victim", ["owner", "holder"])
def test_all_is_gone_after_a_kill(victim: str) -> None:
    process, directory, holder = start_beside()
    namespace = os.readlink(f"/proc/{holder}/ns/net")
    with process:
        os.kill(process.pid if victim == "owner" else holder, signal.SIGKILL)
        if victim == "holder":
            assert process.stdin is not None
            process.stdin.write("\n\n")
            process.stdin.flush()
        deadline = time.monotonic() + 10
        while not gone(directory, namespace):
            assert time.monotonic() < deadline
            time.sleep(0.02)


@pytest.mark.root
def test_two_cannot_stand_in_one_place() -> None:
    code = """
    from tests.internet import world
    world.WAIT = 0.2
    with world.Internet():
        try:
            world.Internet().__enter__()
        except world.InternetError as error:
            print(error)
    """
    command = ["unshare", "--net", "--", sys.executable, "-c", textwrap.dedent(code)]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=60)
    assert done.stdout.startswith("another little internet"), done.stderr


@pytest.mark.root
def test_ranges_in_use_are_left_alone() -> None:
    code = """
    import subprocess
    from tests.internet import world
    for words in ("link add own0 type veth peer name own1", "link set own0 up", "addr add 203.0.113.9/28 dev own0"):
        subprocess.run(["ip", *words.split()], check=True)
    try:
        world.Internet().__enter__()
    except world.InternetError as error:
        print(error)
    """
    command = ["unshare", "--net", "--", sys.executable, "-c", textwrap.dedent(code)]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=60)
    assert done.stdout.startswith("203.0.113.0/24 is in use"), done.stderr


def test_a_reader_starts_anywhere(tmp_path: Path) -> None:
    path = tmp_path / "record.jsonl"
    path.write_text("")
    reader = Reader(path)
    line = {"id": 1, "service": "sink", "transport": "tcp", "address": "a", "port": 1, "source": "s", "at": 1.0}
    with path.open("a") as file:
        file.write(json.dumps({**line, "bytes": 2, "head": "6162"}) + "\n")
        file.write(json.dumps({**line, "bytes": 3, "closed": True}) + "\n")
        file.write('{"half')
    found = only(reader.read())
    assert (found.bytes, found.head, found.closed) == (5, b"ab", True)
