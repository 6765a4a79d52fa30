"""TLS that ends at the gateway: who trusts it, what is judged, what goes in, and what never comes out (I8).

Upstream certificates are verified against the little internet's CA, and one of the test's own for ``host.test``: a
server at the host's end of the link that does as the test likes (:class:`~tests.contain.test_gateway_clients.Peer`).
"""

from __future__ import annotations

import asyncio
import base64
import datetime
import json
import os
import re
import shutil
import socket
import ssl
import struct
import textwrap
import time
from collections.abc import Callable, Iterator
from contextlib import suppress
from pathlib import Path

import pytest
from cryptography import x509
from cryptography.hazmat.primitives import hashes, serialization
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.x509.oid import NameOID

from corral.actions import Flow, Kind, Verdict
from corral.credentials.scrubbing import forms
from corral.gateway.egress import Egress
from corral.sandbox.box import Sandbox
from tests.contain.command_line import CommandLine, adopting_orphans
from tests.contain.conftest import MakeBox, own_groups, own_sandbox_processes
from tests.contain.gateway_boxes import PYTHON, policy_of, python, reasons, refusals, shell
from tests.contain.test_gateway_clients import SPARE, MakePeer, Peer, fine, make_peer, needs, resident, until
from tests.internet import packages, places
from tests.internet.world import Internet

__all__ = ["make_peer"]

SECRET = places.TOKEN
USER = "x-access-token"
_PAIR = base64.b64encode(f"{USER}:{SECRET}".encode())
FORMS = sorted(forms(SECRET.encode(), _PAIR, base64.urlsafe_b64encode(f"{USER}:{SECRET}".encode())))
"""All that the secret may look like."""
BEARER = "credential: {type: bearer, from: 'env:CORRAL_TEST_SECRET'}"
CURL = "curl -sS -m 9"


def leaks(data: bytes) -> list[bytes]:
    """The forms of the secret that are in this."""
    return [form for form in FORMS if form in data]


@pytest.fixture(autouse=True)
def trusting(internet: Internet, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Path:
    """What the gateway trusts upstream, and the secret; returns where the key and certificate of host.test are."""
    key = ec.generate_private_key(ec.SECP256R1())
    now = datetime.datetime.now(datetime.UTC)
    name = x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, "host.test")])
    certificate = (
        x509.CertificateBuilder()
        .subject_name(name)
        .issuer_name(name)
        .public_key(key.public_key())
        .serial_number(x509.random_serial_number())
        .not_valid_before(now - datetime.timedelta(hours=1))
        .not_valid_after(now + datetime.timedelta(days=1))
        .add_extension(x509.SubjectAlternativeName([x509.DNSName("host.test")]), critical=False)
        .add_extension(x509.BasicConstraints(ca=True, path_length=None), critical=True)
        .sign(key, hashes.SHA256())
    )
    public = certificate.public_bytes(serialization.Encoding.PEM)
    private = key.private_bytes(
        serialization.Encoding.PEM, serialization.PrivateFormat.PKCS8, serialization.NoEncryption()
    )
    both = tmp_path / "host.test.pem"
    both.write_bytes(private + public)
    bundle = tmp_path / "trusted.pem"
    bundle.write_bytes(internet.ca_file.read_bytes() + public)
    monkeypatch.setenv("SSL_CERT_FILE", str(bundle))
    monkeypatch.setenv("CORRAL_TEST_SECRET", SECRET)
    return both


Serve = Callable[[ssl.SSLSocket], object]
MakeServer = Callable[[Serve], Peer]


@pytest.fixture
def make_server(make_peer: MakePeer, trusting: Path) -> MakeServer:
    """Makes host.test, with TLS."""
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    context.load_cert_chain(trusting)

    def make(serve: Serve) -> Peer:
        def secured(sock: socket.socket) -> object:
            with context.wrap_socket(sock, server_side=True) as tls:
                return serve(tls)

        return make_peer(secured)

    return make


def at_peer(peer: Peer, more: str = "intercept: true") -> str:
    """An allow rule for host.test."""
    return f"allow: [{{name: host.test, cidr: {places.HOST4}/32, port: {peer.port}, {more}}}]"


def request_of(sock: ssl.SSLSocket) -> bytes:
    """A request's head."""
    data = b""
    while b"\r\n\r\n" not in data:
        piece = sock.recv(65536)
        if not piece:
            break
        data += piece
    return data


# Sends bytes as they are within TLS, after a hello for the host, and says what comes back.
RAW = """
    import json, socket, ssl, sys, time
    host, port, pieces = sys.argv[1], int(sys.argv[2]), json.loads(sys.argv[3])
    context, answers = ssl.create_default_context(), []
    for piece in pieces:
        s = context.wrap_socket(socket.create_connection((host, port), timeout=9), server_hostname=host)
        data = b""
        try:
            s.sendall(piece.encode("latin-1"))
            while more := s.recv(65536):
                data += more
        except OSError as error:
            data = data or type(error).__name__.encode()
        answers.append(data.decode("latin-1"))
    print(json.dumps(answers))
"""


async def raw(box: Sandbox, host: str, port: int, *pieces: str) -> list[str]:
    """What each of these gets, on a connection of its own."""
    answers = json.loads(fine(await python(box, RAW, host, str(port), json.dumps(pieces), timeout=60)))
    assert len(answers) == len(pieces)
    return [str(answer) for answer in answers]


def get(path: str, host: str, *fields: str) -> str:
    """A request that is the last one."""
    lines = (f"GET {path} HTTP/1.1", f"Host: {host}", *fields, "Connection: close", "", "")
    return "\r\n".join(lines)


# ---- trust inside ----


async def test_programs_trust_it_without_being_told(make_box: MakeBox, internet: Internet) -> None:
    """By their environment, and by the system's bundle where they have none."""
    box = await make_box(policy=policy_of("allow: [{name: web.test, intercept: true}]"))
    fetch = "import urllib.request as u; print(u.urlopen('https://web.test/').read().decode(), end='')"
    commands = [
        "curl -sS -m 9 https://web.test/",
        "env -i PATH=/usr/bin curl -sS -m 9 https://web.test/",
        f'{PYTHON} -c "{fetch}"',
        f'env -i {PYTHON} -c "{fetch}"',
    ]
    if shutil.which("node", path="/usr/bin"):
        script = "fetch('https://web.test/').then(r => r.text()).then(t => process.stdout.write(t))"
        commands.append(f'node -e "{script}"')
    if shutil.which("wget", path="/usr/bin"):
        commands.append("wget -q -T 9 -O - https://web.test/")
    internet.clear()
    for command, result in zip(commands, await asyncio.gather(*(shell(box, each) for each in commands)), strict=True):
        assert fine(result) == "hello from web.test\n", command
    arrivals = internet.records(service="https")
    assert len(arrivals) == len(commands)
    assert {arrival.alpn for arrival in arrivals} == {"http/1.1"}


async def test_git_and_pip_trust_it_without_being_told(make_box: MakeBox, internet: Internet) -> None:
    rules = "allow: [{name: git.test, intercept: true}, {name: pypi.test, intercept: true}]"
    box = await make_box(policy=policy_of(rules))
    commands = ["git clone -q https://git.test/hello.git one && cat one/README"]
    expected = ["hello from git.test\n"]
    if Path("/usr/lib/python3/dist-packages/pip").exists():
        commands.append(
            f"{PYTHON} -m pip --disable-pip-version-check -q install --target site"
            f" --index-url https://pypi.test/simple/ {packages.NAME} && PYTHONPATH=site {PYTHON} -m corral_hello"
        )
        expected.append(f"{packages.GREETING}\n")
    results = await asyncio.gather(*(shell(box, command, timeout=60) for command in commands))
    assert [fine(result) for result in results] == expected


async def test_java_trusts_it(make_box: MakeBox, internet: Internet) -> None:
    needs("java")
    if not os.path.exists("/etc/ssl/certs/java/cacerts"):
        pytest.skip("this Java keeps its certificates elsewhere than Debian's")
    box = await make_box(policy=policy_of("allow: [{name: web.test, intercept: true}]"))
    listed = await shell(box, "keytool -list -v -keystore /etc/ssl/certs/java/cacerts -storepass changeit", timeout=60)
    assert "CN=Corral sandbox" in listed.text, listed
    program = """
        public class Get {
            public static void main(String[] arguments) throws Exception {
                System.out.print(new String(new java.net.URL("https://web.test/").openStream().readAllBytes()));
            }
        }
    """
    command = 'printf %s "$1" >Get.java; java -XX:TieredStopAtLevel=1 Get.java'
    result = await box.exec(["sh", "-c", command, "java", program], timeout=60)
    if b"Could not find or load main class" in result.stderr or b"jdk.compiler" in result.stderr:
        pytest.skip("this Java has no compiler")
    assert fine(result) == "hello from web.test\n"


async def test_inside_it_is_http_1_and_the_sandboxs_own_certificate(make_box: MakeBox, internet: Internet) -> None:
    box = await make_box(policy=policy_of("allow: [{name: web.test, intercept: true}, api.test:443]"))
    code = """
        import socket, ssl
        for offered in (["h2", "http/1.1"], ["h2"], []):
            context = ssl.create_default_context()
            if offered:
                context.set_alpn_protocols(offered)
            s = context.wrap_socket(socket.create_connection(("web.test", 443), timeout=8), server_hostname="web.test")
            issuer = dict(pair for part in s.getpeercert()["issuer"] for pair in part)
            print(s.selected_alpn_protocol(), issuer["commonName"][:14], s.version())
        try:  # who is not looked at is not signed for either
            s = socket.create_connection(("api.test", 443), timeout=8)
            ssl.create_default_context().wrap_socket(s, server_hostname="api.test")
        except ssl.SSLCertVerificationError:
            print("another's")
    """
    lines = fine(await python(box, code)).splitlines()
    assert lines[0] == "http/1.1 Corral sandbox TLSv1.3"
    assert [line.split()[0] for line in lines[1:]] == ["None", "None", "another's"]
    told = json.loads(fine(await shell(box, f"{CURL} --http2 https://web.test/echo")))
    assert told["version"] == "HTTP/1.1"


async def test_another_sandbox_does_not_trust_it(make_box: MakeBox, internet: Internet, tmp_path: Path) -> None:
    other = tmp_path / "other"
    other.mkdir()
    policy = policy_of("allow: [{name: web.test, intercept: true}]")
    first, second = await make_box(policy=policy), await make_box(other, policy=policy)
    bundles = [fine(await shell(box, "cat /run/corral/ca.pem")) for box in (first, second)]
    assert bundles[0] != bundles[1]
    assert bundles[0].split("-----END")[0] not in bundles[1]
    assert "PRIVATE" not in bundles[0]
    for path in ("/run/corral/ca.pem", "/etc/ssl/certs/ca-certificates.crt"):
        assert (await shell(first, f"echo >>{path}")).exit_code != 0
        assert (await shell(first, f"rm -f {path}; echo x >{path}")).exit_code != 0
        assert fine(await shell(first, f"cat {path}")) == bundles[0]


@pytest.mark.parametrize(
    ("name", "why"),
    [("expired.test", "expired"), ("wrongname.test", "hostname mismatch"), ("selfsigned.test", "self-signed")],
)
async def test_the_upstream_certificate_is_verified(make_box: MakeBox, internet: Internet, name: str, why: str) -> None:
    box = await make_box(policy=policy_of(f"allow: [{{name: {name}, intercept: true, {BEARER}}}]"))
    internet.clear()
    told = fine(await shell(box, f"{CURL} -k -i https://{name}/"))
    assert told.startswith("HTTP/1.1 502"), told
    assert why in told.lower().replace("self signed", "self-signed"), told
    assert not [request for arrival in internet.records(address=name) for request in arrival.requests]


async def test_the_host_of_each_request_must_be_the_name(make_box: MakeBox, internet: Internet) -> None:
    rules = "allow: [{name: web.test, intercept: true}, {name: api.test, intercept: true}]"
    box = await make_box(policy=policy_of(rules))
    internet.clear()
    second = get("/echo", "web.test").replace("Connection: close\r\n", "") + get("/echo", "api.test")
    told = await raw(box, "web.test", 443, get("/echo", "api.test"), second, get("/echo", "web.test:80"))
    assert told[0].startswith("HTTP/1.1 403")
    assert "HTTP/1.1 200" in told[1] and "HTTP/1.1 403" in told[1]
    assert told[2].startswith("HTTP/1.1 403")
    requests = [request for arrival in internet.records(service="https") for request in arrival.requests]
    assert [request.header("host") for request in requests] == ["web.test"]


# ---- requests ----

ACME = """
    allow:
      - {name: api.test, requests: ["GET /repos/acme/**", "POST /repos/acme/*/issues"]}
"""
ALLOWED = ("/repos/acme/x", "/repos/acme/a%20b", "/repos/%61cme/x?y=/../z")
TRICKS = (
    "/private/x",
    "/repos/other/x",
    "/repos/acmes/x",
    "/repos/acme%2fx",
    "/repos//acme/x",
    "//repos/acme/x",
    "/repos/acme/../other/x",
    "/repos/acme/./../other/x",
    "/repos/acme/%2e%2e/other/x",
    "/repos/acme/%2E./other/x",
    "/repos/acme/..%2fother/x",
    "/repos/acme%2f..%2f..%2fprivate/x",
    "/repos/acme/%252e%252e/other/x",
    "/repos/acme/..%252fother/x",
    "/repos/acme/..;/other/x",
    "/repos/acme/..\\other/x",
    "/repos/acme/%5c..%5cother",
    "/repos/acme/%c0%ae%c0%ae/other",
    "/repos/acme/x%00/../../private/x",
    "/repos/acme/x%0d%0aX: y",
    "/repos/acme/x#/../../private/x",
    "/repos/acme/%",
    "/REPOS/ACME/x",
    "repos/acme/x",
    "*",
    "https://api.test/private/x",
    "https://evil.example/repos/acme/x",
)


async def test_requests_are_judged_by_method_and_path(make_box: MakeBox, internet: Internet) -> None:
    box = await make_box(policy=policy_of(ACME))
    internet.clear()
    told = await raw(box, "api.test", 443, *(get(path, "api.test") for path in ALLOWED))
    assert all(answer.startswith("HTTP/1.1 200") for answer in told), told
    told = await raw(box, "api.test", 443, *(get(path, "api.test") for path in TRICKS))
    for path, answer in zip(TRICKS, told, strict=True):
        assert answer.startswith(("HTTP/1.1 403", "HTTP/1.1 400")), (path, answer)
        assert "x-corral-reason" in answer
    others = ("POST /repos/acme/x", "PUT /repos/acme/x/issues", "get /repos/acme/x", "DELETE /repos/acme/x", "HEAD /")
    pieces = [get("/", "api.test").replace("GET /", line, 1) for line in others]
    pieces.append(get("/repos/acme/x", "api.test", "X-HTTP-Method-Override: DELETE").replace("GET", "OPTIONS", 1))
    assert all(answer.startswith("HTTP/1.1 403") for answer in await raw(box, "api.test", 443, *pieces))
    post = "POST /repos/acme/x/issues HTTP/1.1\r\nHost: api.test\r\nContent-Length: 2\r\nConnection: close\r\n\r\n{}"
    [answer] = await raw(box, "api.test", 443, post)
    assert answer.startswith("HTTP/1.1 200")
    arrived = [request.target for arrival in internet.records(address="api.test") for request in arrival.requests]
    assert sorted(arrived) == sorted((*ALLOWED, "/repos/acme/x/issues"))
    assert len(refusals(box, Kind.HTTP_REQUEST)) >= len(TRICKS)


@pytest.mark.parametrize("verdict", [Verdict.ALLOW, Verdict.DENY])
async def test_a_request_that_is_asked_for_waits(make_box: MakeBox, internet: Internet, verdict: Verdict) -> None:
    """Not a byte of it is out before the answer; what is allowed beside it goes on."""
    rules = """
        allow: [{name: api.test, requests: ["GET /**"]}]
        ask: [{name: api.test, requests: ["POST /**"]}]
    """
    box = await make_box(policy=policy_of(rules))
    queue = box.core.supervision.approvals
    internet.clear()
    command = f"{CURL} -o /dev/null -w '%{{http_code}}' -d body https://api.test/repos/x"
    running = asyncio.create_task(shell(box, command))
    await until(lambda: bool(queue.waiting()))
    assert fine(await shell(box, f"{CURL} https://api.test/")) == "hello from api.test\n"
    requests = [request.method for arrival in internet.records(address="api.test") for request in arrival.requests]
    assert requests == ["GET"]
    [question] = queue.waiting()
    assert question.action.kind is Kind.HTTP_REQUEST
    queue.answer(question.number, verdict, by="test")
    assert fine(await running) == ("200" if verdict is Verdict.ALLOW else "403")
    requests = [request.method for arrival in internet.records(address="api.test") for request in arrival.requests]
    assert requests == (["GET", "POST"] if verdict is Verdict.ALLOW else ["GET"])


async def test_it_is_looked_at_also_behind_an_upstream_proxy(make_box: MakeBox, internet: Internet) -> None:
    """Which sees an address, and TLS that is not ours to open for it."""
    rules = f"allow: [{{name: api.test, {BEARER}}}, {{name: wrongname.test, intercept: true}}]"
    box = await make_box(policy=policy_of(rules, proxy="http://203.0.113.31:3128"))
    internet.clear()
    assert json.loads(fine(await shell(box, f"{CURL} https://api.test/private/x")))["known"] is True
    assert "502" in fine(await shell(box, f"{CURL} -i https://wrongname.test/")).splitlines()[0]
    arrivals = internet.records(service="proxy")
    assert len(arrivals) == 2
    assert all(request.method == "CONNECT" for arrival in arrivals for request in arrival.requests)
    assert not leaks(repr(arrivals).encode())


async def test_a_refusal_does_not_end_the_connection(make_box: MakeBox, internet: Internet) -> None:
    box = await make_box(policy=policy_of(ACME))
    urls = " ".join(f"https://api.test{path}" for path in ("/repos/acme/a", "/private/b", "/repos/acme/c"))
    told = fine(
        await shell(
            box, f"{CURL} -w '%{{http_code}} %{{num_connects}}\\n' -o /dev/null -o /dev/null -o /dev/null {urls}"
        )
    )
    assert told == "200 1\n403 0\n200 0\n"


SMUGGLED = (
    "POST /repos/acme/x HTTP/1.1\r\nHost: api.test\r\nContent-Length: 5\r\nTransfer-Encoding: chunked\r\n\r\n"
    "0\r\n\r\nGET /private/x HTTP/1.1\r\n\r\n",
    "POST /repos/acme/x HTTP/1.1\r\nHost: api.test\r\nContent-Length: 5\r\nContent-Length: 6\r\n\r\nabcdef",
    "POST /repos/acme/x HTTP/1.1\r\nHost: api.test\r\nTransfer-Encoding: xchunked\r\n\r\n0\r\n\r\n",
    "POST /repos/acme/x HTTP/1.1\r\nHost: api.test\r\nTransfer_Encoding: chunked\r\n\r\n0\r\n\r\n",
    "GET /repos/acme/x HTTP/1.1\r\nHost: api.test\r\nX: y\r\n Transfer-Encoding: chunked\r\n\r\n",
    "GET /repos/acme/x HTTP/1.1\nHost: api.test\n\nGET /private/x HTTP/1.1\nHost: api.test\r\n\r\n",
    "GET /repos/acme/x HTTP/1.1\r\nHost: api.test\r\nHost: evil.example\r\n\r\n",
    "GET /repos/acme/x HTTP/1.1\r\nHost : api.test\r\n\r\n",
    "GET /repos/acme/x\r\n\r\n",
    "GET  /repos/acme/x HTTP/1.1\r\nHost: api.test\r\n\r\n",
    "CONNECT evil.example:443 HTTP/1.1\r\nHost: evil.example:443\r\nConnection: close\r\n\r\n",
    "GET /repos/acme/x HTTP/1.1\r\nHost: api.test\r\nConnection: upgrade, close\r\nUpgrade: h2c\r\n\r\n",
    "PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n",
    "SSH-2.0-OpenSSH_9.2\r\n\r\n",
)


async def test_what_two_servers_could_read_differently_is_refused(make_box: MakeBox, internet: Internet) -> None:
    rules = 'allow: [{name: api.test, requests: ["/repos/acme/**"]}]'
    box = await make_box(policy=policy_of(rules))
    internet.clear()
    for piece, answer in zip(SMUGGLED, await raw(box, "api.test", 443, *SMUGGLED), strict=True):
        assert re.match(r"HTTP/1\.1 (4\d\d|501) ", answer), (piece, answer)
    assert not [request for arrival in internet.records(address="api.test") for request in arrival.requests]


async def test_heads_and_bodies_have_bounds(make_box: MakeBox, internet: Internet) -> None:
    rule = "{name: http1.test, requests: [GET, POST /upload], limits: {header: 4KiB, body: 10kB}}"
    box = await make_box(policy=policy_of(f"allow: [{rule}]"))
    internet.clear()
    many = [f"x-{number}: y" for number in range(101)]
    long, chunk = "y" * 5000, "1000\r\n" + "z" * 4096 + "\r\n"
    upload = "POST /upload HTTP/1.1\r\nHost: http1.test\r\nConnection: close\r\n"
    told = await raw(
        box,
        "http1.test",
        443,
        get("/", "http1.test", f"x-long: {long}"),
        get("/", "http1.test", *many),
        f"{upload}Content-Length: 20000\r\n\r\n{'z' * 20000}",
        f"{upload}Transfer-Encoding: chunked\r\n\r\n{chunk * 5}0\r\n\r\n",
        f"{upload}Content-Length: 9000\r\n\r\n{'z' * 9000}",
        get("/big?bytes=9000", "http1.test"),
        get("/big?bytes=2000000", "http1.test"),
        get("/long-header", "http1.test"),
        get("/headers-bomb", "http1.test"),
    )
    assert [answer.split(" ")[1] for answer in told[:6]] == ["431", "431", "413", "413", "200", "200"]
    assert len(told[6].partition("\r\n\r\n")[2]) <= 10_000
    for answer in told[7:]:
        assert answer.startswith("HTTP/1.1 502"), answer[:300]


# ---- servers that are not honest ----


async def test_answers_that_are_no_answers(make_box: MakeBox, internet: Internet) -> None:
    """What the client gets is one well-formed answer or the end, never what the server wrote beside it."""
    box = await make_box(policy=policy_of("allow: [{name: http1.test, intercept: true}]"))
    expected = {
        "/garbage": "502",
        "/both-lengths": "502",
        "/two-lengths": "502",
        "/bare-newlines": "502",
        "/folded": "502",
        "/unasked-101": "502",
        "/headers-bomb": "502",
        "/long-header": "502",
        "/two-responses": "200",
        "/early-hints": "200",
        "/no-length": "200",
        "/trailers": "200",
        "/early-close": "200",
    }
    told = dict(
        zip(expected, await raw(box, "http1.test", 443, *(get(p, "http1.test") for p in expected)), strict=True)
    )
    assert {path: answer.split(" ")[1] for path, answer in told.items()} == expected, told
    assert told["/two-responses"].endswith("\r\n\r\none") and "smuggled" not in told["/two-responses"]
    assert "103" not in told["/early-hints"] and told["/early-hints"].endswith("ok")
    assert told["/no-length"].replace("\r\n", "\n").count("until the end\n") == 1
    assert "x-last" not in told["/trailers"] and "raw bytes" not in told["/unasked-101"]
    # A body that was broken off must not look whole.
    result = await shell(box, f"{CURL} https://http1.test/early-close")
    assert result.exit_code == 18, result


HUGE = b"HTTP/1.1 200 OK\r\ntransfer-encoding: chunked\r\n\r\n"


def _endless(sock: ssl.SSLSocket) -> object:
    request_of(sock)
    sock.sendall(b"HTTP/1.1 200 OK\r\n")
    for number in range(200_000):
        sock.sendall(b"x-%d: y\r\n" % number)
    return "all of it was taken"


def _endless_interim(sock: ssl.SSLSocket) -> object:
    request_of(sock)
    for _ in range(200_000):
        sock.sendall(b"HTTP/1.1 103 Early Hints\r\n\r\n")
    return "all of it was taken"


def _after(head: bytes, then: bytes) -> Serve:
    def serve(sock: ssl.SSLSocket) -> object:
        request_of(sock)
        sock.sendall(head + then)
        return sock.recv(100)

    return serve


def _drip(sock: ssl.SSLSocket) -> object:
    request_of(sock)
    for byte in b"HTTP/1.1 200 OK\r\nx: " + b"y" * 200:
        sock.sendall(bytes((byte,)))
        time.sleep(0.1)
    return "all of it was taken"


def _hang(sock: ssl.SSLSocket) -> object:
    request_of(sock)
    return sock.recv(100)


@pytest.mark.parametrize(
    ("serve", "heard"),
    [
        (_endless, "502"),
        (_endless_interim, "502"),
        (_after(HUGE, b"f" * 40 + b"\r\n" + b"x" * 100), "200"),
        (_after(HUGE, b"-5\r\nhello\r\n0\r\n\r\n"), "200"),
        (_after(HUGE, b"5;" + b"e" * 200_000 + b"\r\nhello\r\n"), "200"),
        (_after(HUGE, b"1\r\nx\r\n" * 30_000), "200"),
        (_after(b"HTTP/1.1 200 OK\r\ncontent-length: 99999999999999999999999\r\n\r\n", b"x"), "502"),
        (_after(b"HTTP/2 200\r\n\r\n", b""), "502"),
        (_after(b"HTTP/1.1 200 OK\r\nx: a\x00b\r\n\r\n", b""), "502"),
        (_drip, "reset"),
        (_hang, "reset"),
    ],
    ids=(
        "endless-head endless-interim huge-chunk negative-chunk long-extension tiny-chunks huge-length http2 nul drip"
        " hang"
    ).split(),
)
async def test_a_server_that_does_its_worst(
    make_box: MakeBox, make_server: MakeServer, serve: Serve, heard: str
) -> None:
    """Bounded in memory and time, and never passed off as whole."""
    peer = make_server(serve)
    box = await make_box(policy=policy_of(at_peer(peer, "intercept: true, limits: {idle: 1s}")))
    before, began = resident(), time.monotonic()
    result = await shell(box, f"{CURL} -o body -w '%{{http_code}}' https://host.test:{peer.port}/")
    assert time.monotonic() - began < 6
    assert resident() - before < SPARE
    if heard == "502":
        assert result.text == "502"
    else:
        assert result.exit_code != 0, result
    await until(lambda: bool(peer.found))
    assert peer.found != ["all of it was taken"]


@pytest.mark.parametrize("how", ["reset", "no close_notify"])
async def test_an_answer_that_was_cut_off_does_not_look_whole(
    make_box: MakeBox, make_server: MakeServer, how: str
) -> None:
    """One that ends with its connection: only how that ends says whether it is whole (RFC 9112, section 9.8)."""

    def serve(sock: ssl.SSLSocket) -> object:
        request_of(sock)
        sock.sendall(b"HTTP/1.1 200 OK\r\n\r\nrm -rf /tmp/one")
        time.sleep(0.2)
        if how == "reset":
            sock.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
        sock.close()  # says nothing within TLS
        return None

    peer = make_server(serve)
    box = await make_box(policy=policy_of(at_peer(peer)))
    result = await shell(box, f"{CURL} https://host.test:{peer.port}/")
    assert result.exit_code != 0, result


async def test_an_answer_before_its_request(make_box: MakeBox, make_server: MakeServer) -> None:
    """One may be an answer to what was just asked; a second is nobody's, and no later request gets it."""

    def serve(sock: ssl.SSLSocket) -> object:
        sock.sendall(
            b"HTTP/1.1 200 OK\r\ncontent-length: 5\r\n\r\nfirst" + b"HTTP/1.1 200 OK\r\ncontent-length: 6\r\n\r\npoison"
        )
        return request_of(sock).count(b"GET") + request_of(sock).count(b"GET")

    peer = make_server(serve)
    box = await make_box(policy=policy_of(at_peer(peer)))
    two = get("/1", f"host.test:{peer.port}").replace("Connection: close\r\n", "") + get("/2", f"host.test:{peer.port}")
    [answer] = await raw(box, "host.test", peer.port, two)
    assert "poison" not in answer
    assert answer.count("HTTP/1.1") <= 1
    await until(lambda: bool(peer.found))


async def test_a_server_that_speaks_no_tls(make_box: MakeBox, make_peer: MakePeer) -> None:
    def serve(sock: socket.socket) -> object:
        sock.recv(1000)
        sock.sendall(b"HTTP/1.1 200 OK\r\ncontent-length: 0\r\n\r\n")
        return None

    peer = make_peer(serve)
    box = await make_box(policy=policy_of(at_peer(peer)))
    told = fine(await shell(box, f"{CURL} -i https://host.test:{peer.port}/"))
    assert told.startswith("HTTP/1.1 502"), told
    assert "TLS" in told


async def test_a_compression_bomb_stays_packed(make_box: MakeBox, internet: Internet) -> None:
    """With a credential it does not pass at all: its echo could not be found in it."""
    rules = f"allow: [{{name: web.test, intercept: true}}, {{name: api.test, {BEARER}}}]"
    box = await make_box(policy=policy_of(rules))
    before = resident()
    url = "/gzip-bomb?bytes=200000000"
    count = int(fine(await shell(box, f"{CURL} -H 'Accept-Encoding: gzip' 'https://web.test{url}' | wc -c")))
    assert 100_000 < count < 1_000_000
    told = fine(await shell(box, f"{CURL} -i -H 'Accept-Encoding: gzip' 'https://api.test{url}'"))
    assert told.startswith("HTTP/1.1 502") and "compressed" in told
    assert resident() - before < SPARE


async def test_a_body_without_end_is_not_kept(make_box: MakeBox, internet: Internet) -> None:
    box = await make_box(policy=policy_of("allow: [{name: http1.test, intercept: true}]"))
    before = resident()
    told = fine(await shell(box, f"{CURL} https://http1.test/forever | head -c 30000000 | wc -c; sleep 1"))
    assert int(told) == 30_000_000
    assert resident() - before < SPARE


async def test_much_both_ways_is_whole(make_box: MakeBox, internet: Internet) -> None:
    box = await make_box(policy=policy_of("allow: [{name: http1.test, requests: [GET, PUT /upload]}]"))
    count, began = 30_000_000, time.monotonic()
    expected = fine(await shell(box, f"head -c {count} /dev/zero | tr '\\0' x | sha256sum")).split()[0]
    down, up = await asyncio.gather(
        shell(box, f"curl -sS -m 30 'https://http1.test/big?bytes={count}' | sha256sum", timeout=40),
        shell(
            box,
            f"head -c {count} /dev/zero | tr '\\0' x | curl -sS -m 30 -H Expect: -T - https://http1.test/upload",
            timeout=40,
        ),
    )
    assert fine(down).split()[0] == expected
    assert json.loads(fine(up)) == {"bytes": count, "sha256": expected}
    print(f"intercepted: {2 * count / (time.monotonic() - began) / 1e6:.0f} MB/s")


async def test_a_websocket_within_needs_its_permission(make_box: MakeBox, internet: Internet) -> None:
    rules = "allow: [{name: http1.test, intercept: true, permit: [websocket]}, {name: web.test, intercept: true}]"
    box = await make_box(policy=policy_of(rules))
    head = (
        "GET /websocket HTTP/1.1\r\nHost: {}\r\nUpgrade: websocket\r\nConnection: Upgrade\r\n"
        "Sec-WebSocket-Key: MDEyMzQ1Njc4OWFiY2RlZg==\r\nSec-WebSocket-Version: 13\r\n\r\n"
    )
    frames = "\x81\x85\0\0\0\0hello\x88\x80\0\0\0\0"
    [answer] = await raw(box, "http1.test", 443, head.format("http1.test") + frames)
    assert answer.startswith("HTTP/1.1 101") and answer.endswith("\x81\x05hello\x88\x00"), answer
    [answer] = await raw(box, "web.test", 443, head.format("web.test") + frames)
    assert answer.startswith("HTTP/1.1 403")


# ---- credentials ----


@pytest.mark.parametrize(
    ("credential", "header", "value"),
    [
        ("{type: bearer, from: 'env:CORRAL_TEST_SECRET'}", "authorization", f"Bearer {SECRET}"),
        (
            f"{{type: basic, user: {USER}, from: 'env:CORRAL_TEST_SECRET'}}",
            "authorization",
            "Basic " + base64.b64encode(f"{USER}:{SECRET}".encode()).decode(),
        ),
        ("{type: header, header: X-Api-Key, from: 'env:CORRAL_TEST_SECRET'}", "x-api-key", SECRET),
    ],
    ids=["bearer", "basic", "header"],
)
async def test_a_credential_goes_to_its_host_and_nowhere_else(
    make_box: MakeBox, internet: Internet, credential: str, header: str, value: str
) -> None:
    """In place of the agent's own, however it spells that."""
    rules = f"allow: [{{name: api.test, credential: {credential}}}, {{name: web.test, intercept: true}}, 'web.test:80']"
    box = await make_box(policy=policy_of(rules))
    internet.clear()
    mine = f"-H '{header}: mine' -H '{header.replace('-', '_')}: mine' -H '{header.upper()}: mine too'"
    told = fine(await shell(box, f"{CURL} {mine} https://api.test/private/x"))
    assert json.loads(told)["known"] is True
    follow = f"{CURL} -L --location-trusted 'https://api.test/redirect?to=https://web.test/echo'"
    for url in (follow, f"{CURL} https://web.test/echo", f"{CURL} http://web.test/echo"):
        assert not leaks(fine(await shell(box, url)).encode())
    [request] = [
        r for arrival in internet.records(address="api.test") for r in arrival.requests if "/private" in r.target
    ]
    assert [v for k, v in request.headers if k.lower().replace("_", "-") == header] == [value]
    others = [r for arrival in internet.records(address="web.test") for r in arrival.requests]
    assert len(others) == 3
    assert not leaks(repr(others).encode())


async def test_a_credential_does_not_go_in_clear_or_to_another_port(make_box: MakeBox, internet: Internet) -> None:
    box = await make_box(policy=policy_of(f"allow: [{{name: api.test, port: 443, {BEARER}}}, 'api.test:80']"))
    internet.clear()
    assert not leaks(fine(await shell(box, f"{CURL} http://api.test/echo")).encode())
    assert "401" in fine(await shell(box, f"{CURL} -i http://api.test/private/x"))
    assert not leaks(repr(internet.records(address="api.test")).encode())


async def test_a_credential_is_for_the_requests_of_its_rule(make_box: MakeBox, internet: Internet) -> None:
    """On one connection; what the other request says of the secret is blotted out all the same."""
    rules = f"""
        allow:
          - {{name: api.test, requests: ["GET /**"], {BEARER}}}
          - {{name: api.test, requests: ["POST /echo"]}}
    """
    box = await make_box(policy=policy_of(rules))
    internet.clear()
    told = fine(await shell(box, f"{CURL} https://api.test/echo --next {CURL[5:]} -d x https://api.test/echo"))
    assert not leaks(told.encode())
    [read, written] = [r for arrival in internet.records(address="api.test") for r in arrival.requests]
    assert (read.method, written.method) == ("GET", "POST")
    assert leaks((read.header("authorization") or "").encode())
    assert written.header("authorization") is None


async def test_two_credentials_for_one_place_are_refused(make_box: MakeBox, internet: Internet) -> None:
    other = BEARER.replace("bearer", "header, header: x-key")
    rules = f"allow: [{{name: api.test, {BEARER}}}, {{name: api.test, requests: ['GET /**'], {other}}}]"
    box = await make_box(policy=policy_of(rules))
    internet.clear()
    assert (await shell(box, f"{CURL} https://api.test/echo")).exit_code != 0
    assert "different credentials" in reasons(box)
    assert internet.arrived("api.test") == 0


async def test_a_private_repository_is_cloned_without_knowing_how(make_box: MakeBox, internet: Internet) -> None:
    needs("git")
    rule = "{name: git.test, credential: {type: git, from: 'env:CORRAL_TEST_SECRET'}}"
    box = await make_box(policy=policy_of(f"allow: [{rule}]"))
    clone = "GIT_TRACE_CURL=1 GIT_TRACE_REDACT=0 GIT_TERMINAL_PROMPT=0 git clone https://git.test/private.git"
    result = await shell(box, f"{clone} one 2>trace && cat one/README", timeout=40)
    assert fine(result) == "hello from git.test\n"
    everything = fine(await shell(box, "cat trace; cat one/.git/config; env; git config -l --global || true"))
    assert "private.git" in everything
    assert not leaks(everything.encode())


async def test_echoes_of_the_secret_are_taken_out(make_box: MakeBox, internet: Internet) -> None:
    """Of headers and bodies, in every spelling; the rest of the answer stays as it is, and as long."""
    for credential in ("{type: bearer, ", f"{{type: basic, user: {USER}, "):
        rule = f"{{name: api.test, credential: {credential}from: 'env:CORRAL_TEST_SECRET'}}}}"
        box = await make_box(policy=policy_of(f"allow: [{rule}]"))
        told = fine(await shell(box, f"{CURL} -i -H 'X-Mine: kept' https://api.test/secret-echo"))
        assert not leaks(told.encode()), told
        assert "\nraw ***" in told.replace("\nraw Bearer ***", "\nraw ***").replace("\nraw Basic ***", "\nraw ***"), (
            told
        )
        assert "x-echo-authorization" in told.lower()
        assert "kept" in told
        told = fine(await shell(box, f"{CURL} https://api.test/echo"))
        assert not leaks(told.encode()), told
        assert json.loads(told)["version"] == "HTTP/1.1"


@pytest.mark.parametrize("size", [1, 7, 1000])
async def test_echoes_in_pieces_are_taken_out(make_box: MakeBox, make_server: MakeServer, size: int) -> None:
    """Chunks, records and packets of a few bytes: the secret lies across their borders."""

    def serve(sock: ssl.SSLSocket) -> object:
        secret = re.search(rb"[Bb]earer ([^\r]+)", request_of(sock))
        assert secret is not None
        said = (
            b"a" * 11
            + secret[1]
            + b"b"
            + secret[1] * 3
            + b"c"
            + base64.b64encode(b"xy" + secret[1])
            + b"."
            + secret[1][:-1]
        )
        sock.sendall(
            b"HTTP/1.1 200 " + secret[1] + b"\r\nx-said: <" + secret[1] + b">\r\ntransfer-encoding: chunked\r\n\r\n"
        )
        for start in range(0, len(said), size):
            piece = said[start : start + size]
            sock.sendall(b"%x\r\n%b\r\n" % (len(piece), piece))
            time.sleep(0.001)
        sock.sendall(b"0\r\nx-trailer: " + secret[1] + b"\r\n\r\n")
        return len(said)

    peer = make_server(serve)
    box = await make_box(policy=policy_of(at_peer(peer, BEARER)))
    [answer] = await raw(box, "host.test", peer.port, get("/", f"host.test:{peer.port}"))
    assert answer.startswith("HTTP/1.1 200 ***")
    assert not leaks(answer.encode("latin-1")), answer
    body = re.sub(r"\r\n[0-9a-f]+\r\n|^[0-9a-f]+\r\n", "", answer.partition("\r\n\r\n")[2])
    assert body.startswith("a" * 11 + "*" * len(SECRET) + "b" + "*" * 3 * len(SECRET) + "c"), body
    assert SECRET[:-1] in body  # not the secret: it is not ours to take out


async def test_no_secret_no_sandbox(make_box: MakeBox, internet: Internet, monkeypatch: pytest.MonkeyPatch) -> None:
    from corral.errors import RequestError

    monkeypatch.delenv("CORRAL_TEST_SECRET")
    with pytest.raises(RequestError, match="env:CORRAL_TEST_SECRET"):
        await make_box(policy=policy_of(f"allow: [{{name: api.test, {BEARER}}}]"))


# ---- I8: the secret is nowhere inside ----

_USES = """
    import json, os, sys, time, urllib.request, urllib.error
    kept = []
    def fetch(url, **headers):
        try:
            answer = urllib.request.urlopen(urllib.request.Request(url, headers=headers), timeout=9)
        except urllib.error.HTTPError as error:
            answer = error
        kept.append((bytes(answer.read()), str(answer.headers)))
    for path in ("/private/x", "/secret-echo", "/echo", "/refused/x", "/status?code=500"):
        fetch("https://api.test" + path, Authorization="Bearer mine")
    os.system("git clone -q https://git.test/private.git repository >/dev/null")
    open("/tmp/kept", "wb").write(b"".join(body for body, _ in kept))
    print("used", flush=True)
    time.sleep(float(sys.argv[1]))
"""
I8_RULES = f"""
    allow:
      - {{name: api.test, {BEARER}}}
      - {{name: git.test, credential: {{type: git, from: 'env:CORRAL_TEST_SECRET'}}}}
    deny:
      - {{name: api.test, requests: ["/refused/**"], reason: Not this.}}
"""


# Looks for what it is given, disguised, wherever the agent can look; it must not find itself.
_SEARCH = """
    import json, os, sys
    forms = [bytes(byte ^ 0x55 for byte in bytes.fromhex(word)) for word in sys.argv[1].split(",")]
    found, seen = [], 0
    def look(path, data):
        global seen
        seen += 1
        if any(form in data for form in forms):
            found.append(path)
    paths = json.loads(sys.argv[2])
    for place in ("/home", "/tmp", "/run", "/dev/shm", os.getcwd()):
        paths += [os.path.join(directory, name) for directory, _, names in os.walk(place) for name in names]
    for path in paths:
        try:
            if os.path.isfile(path):
                look(path, open(path, "rb").read())
        except OSError:
            pass
    for process in filter(str.isdigit, os.listdir("/proc")):
        if int(process) == os.getpid():
            continue
        for name in ("environ", "cmdline"):
            try:
                look(f"/proc/{process}/{name}", open(f"/proc/{process}/{name}", "rb").read())
            except OSError:
                pass
    print(seen > 20, found)
"""


def processes() -> set[int]:
    """Those of our sandboxes, and who keeps them."""
    found = set(own_sandbox_processes())
    for group in own_groups():
        for directory, _, _ in os.walk(group):
            with suppress(OSError):
                found.update(map(int, Path(directory, "cgroup.procs").read_text().split()))
    return found


def memory_of(pid: int) -> Iterator[bytes]:
    """Everything that a process has mapped and that can be read, with a little of it twice."""
    with suppress(OSError), open(f"/proc/{pid}/maps") as maps, open(f"/proc/{pid}/mem", "rb", 0) as memory:
        for line in maps:
            first, last = (int(word, 16) for word in line.split()[0].split("-"))
            if "r" not in line.split()[1] or "[vvar" in line or "[vsyscall" in line:
                continue
            for start in range(first, last, 1 << 24):
                with suppress(OSError, OverflowError):
                    memory.seek(start)
                    yield memory.read(min((1 << 24) + 4096, last - start))


async def use(box: Sandbox, seconds: float) -> asyncio.Task[object]:
    """Has the secret used inside by a program that keeps all that it gets, and goes on living."""
    running: asyncio.Task[object] = asyncio.create_task(python(box, _USES, str(seconds), timeout=60))
    egress = box.core.supervision.egress
    assert egress is not None
    for _ in range(2000):
        if (await shell(box, "cat /tmp/kept 2>/dev/null | wc -c")).text.strip() not in ("", "0"):
            return running
        await asyncio.sleep(0.1)
    raise AssertionError("it was not used")


@pytest.mark.root
async def test_i8_the_secret_is_in_no_memory_of_the_sandbox(make_box: MakeBox, internet: Internet) -> None:
    box = await make_box(policy=policy_of(I8_RULES))
    running = await use(box, 8)
    read, found = 0, []
    checked = processes()
    for pid in checked:
        before = read
        for piece in memory_of(pid):
            read += len(piece)
            found += [(pid, form) for form in leaks(piece)]
        assert read > before or Path(f"/proc/{pid}/stat").read_text().split()[2] == "Z", f"nothing of {pid} was read"
        found += [(pid, form) for form in leaks(Path(f"/proc/{pid}/environ").read_bytes())]
    assert len(checked) >= 2
    assert read > 1 << 20
    # It can be found where it may be: the method works.
    assert any(leaks(piece) for piece in memory_of(os.getpid()))
    assert not found
    running.cancel()


async def test_i8_the_secret_is_in_no_file_environment_or_record(
    make_box: MakeBox, internet: Internet, monkeypatch: pytest.MonkeyPatch
) -> None:
    accounts: list[Flow] = []
    monkeypatch.setattr(Egress, "account", lambda self, flow: accounts.append(flow))
    box = await make_box(policy=policy_of(I8_RULES))
    running = await use(box, 1)
    disguised = ",".join(bytes(byte ^ 0x55 for byte in form).hex() for form in FORMS)
    changed = json.dumps([change.path for change in await box.changes()])
    assert fine(await python(box, _SEARCH, disguised, changed)) == "True []\n"
    # The search itself finds what is there.
    fine(await python(box, "import sys; open('/tmp/x', 'w').write(sys.argv[1][::-1])", SECRET[::-1]))
    assert "/tmp/x" in fine(await python(box, _SEARCH, disguised, changed))
    assert not leaks(repr(await running).encode())
    told = fine(await shell(box, "cat /run/corral/denials.jsonl /tmp/kept; env"))
    assert "Not this." in told and '"known": true' in told
    assert not leaks(told.encode())
    records = box.core.supervision.recent.all()
    assert len(records) > 10
    assert not leaks(repr(records).encode() + reasons(box).encode())
    await until(lambda: len(accounts) >= 3)
    assert not leaks(repr(accounts).encode())
    assert not leaks(repr((box.core.prepared.outlet, box.core.prepared.plan, box.core.prepared.environment)).encode())
    internet_knows = [r for arrival in internet.records(address="api.test") for r in arrival.requests]
    assert leaks(repr(internet_knows).encode())  # it was used


def test_i8_the_secret_is_in_nothing_that_a_run_leaves(internet: Internet, tmp_path: Path, workspace: Path) -> None:
    """Records, the layer that is kept, what is printed, what is learned, and the processes' environment."""
    with adopting_orphans():
        cli = CommandLine(tmp_path, workspace)
        rules = textwrap.indent(textwrap.dedent(I8_RULES).strip(), "  ")
        (workspace / "p.yaml").write_text(f"network:\n  resolvers: [203.0.113.53]\n{rules}\n")
        uses = textwrap.dedent(_USES)
        words = ("--policy", "p.yaml", "--record", "record.jsonl", "--", PYTHON, "-c", uses, "0")
        done = cli.run(*words, timeout=60)
        assert done.stdout == b"used\n", done
        outputs = [done.stdout, done.stderr]
        learned = cli("policy", "learn", "record.jsonl")
        assert learned.returncode == 0 and b"api.test" in learned.stdout
        outputs += [learned.stdout, learned.stderr]
        record = (workspace / "record.jsonl").read_bytes()
        assert b"/private/x" in record and b'"flow"' in record
        outputs.append(record)
        files = [path for place in (cli.state, cli.runtime, workspace) for path in place.rglob("*") if path.is_file()]
        assert any("README" in path.name for path in files)
        outputs += [path.read_bytes() for path in files]
        for output in outputs:
            assert not leaks(output), output[:2000]
