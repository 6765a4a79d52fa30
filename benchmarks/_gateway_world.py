"""What stands outside while the gateway is measured, all of it on loopback: servers, a DNS server, a policy."""

from __future__ import annotations

import contextlib
import datetime
import shutil
import socket
import ssl
import subprocess
import threading
from collections.abc import Iterator
from ipaddress import ip_address
from pathlib import Path

import dns.message
import dns.rrset
from cryptography import x509
from cryptography.hazmat.primitives import hashes, serialization
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.x509.oid import NameOID

from corral import Policy
from corral.policy.load import parse_policy

NAME = "bench.test"
_HERE = Path(__file__).parent
_BLOCK = 1 << 18


def compile_flows(place: Path) -> Path:
    """`flows`, which is both ends. Raises FileNotFoundError without a C compiler."""
    return _compiled(place, "flows")


def compile_relay(place: Path) -> Path:
    """`relay`, which is the least that can be in between. Raises FileNotFoundError without a C compiler."""
    return _compiled(place, "relay")


def _compiled(place: Path, name: str) -> Path:
    compiler = shutil.which("cc") or shutil.which("gcc")
    if compiler is None:
        raise FileNotFoundError("no C compiler")
    made = place / name
    subprocess.run([compiler, "-O2", "-static", "-o", made, _HERE / f"{name}.c"], check=True)
    return made


@contextlib.contextmanager
def running(*argv: str | Path) -> Iterator[int]:
    """A server that says its port first; gone at the end."""
    server = subprocess.Popen(argv, stdin=subprocess.DEVNULL, stdout=subprocess.PIPE)
    assert server.stdout is not None
    try:
        yield int(server.stdout.readline())
    finally:
        server.kill()
        server.wait()
        server.stdout.close()


@contextlib.contextmanager
def naming() -> Iterator[int]:
    """The port of a DNS server for which every name is 127.0.0.1."""
    sock = socket.socket(socket.AF_INET, socket.SOCK_DGRAM)
    sock.bind(("127.0.0.1", 0))
    port = int(sock.getsockname()[1])

    def answer() -> None:
        while data_and_sender := sock.recvfrom(4096):
            data, sender = data_and_sender
            if not data:  # the end
                return
            query = dns.message.from_wire(data)
            reply = dns.message.make_response(query)
            if query.question[0].rdtype == 1:
                reply.answer.append(dns.rrset.from_text(query.question[0].name, 600, "IN", "A", "127.0.0.1"))
            sock.sendto(reply.to_wire(), sender)

    thread = threading.Thread(target=answer, name="naming", daemon=True)
    thread.start()
    try:
        yield port
    finally:
        sock.sendto(b"", ("127.0.0.1", port))
        thread.join()
        sock.close()


def policy(resolver: int, port: int, *words: str, protocols: tuple[str, ...] = ("ssh", "tls")) -> Policy:
    """A policy that lets :data:`NAME` be reached at one port, in any of these protocols; ``words`` are more of its
    rule."""
    more = "".join(f", {word}" for word in words)
    rules = "\n".join(
        f"    - {{name: {NAME}, cidr: 127.0.0.1/32, port: {port}, protocol: {protocol}{more}}}"
        for protocol in protocols
    )
    text = f'network:\n  allow:\n{rules}\n  resolvers: ["127.0.0.1:{resolver}"]\n'
    return parse_policy(text, source="benchmark")


# ---- TLS ----


def hello() -> bytes:
    """What a client of TLS says first."""
    incoming, outgoing = ssl.MemoryBIO(), ssl.MemoryBIO()
    client = ssl.create_default_context().wrap_bio(incoming, outgoing, server_hostname=NAME)
    with contextlib.suppress(ssl.SSLWantReadError):
        client.do_handshake()
    return outgoing.read()


def make_certificates(place: Path) -> tuple[Path, Path]:
    """An authority, and a chain with its key for :data:`NAME` and 127.0.0.1."""
    now = datetime.datetime.now(datetime.UTC)
    keys = [ec.generate_private_key(ec.SECP256R1()) for _ in range(2)]
    names = [x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, text)]) for text in ("Benchmark", NAME)]
    made = []
    for number, (key, name) in enumerate(zip(keys, names, strict=True)):
        builder = (
            x509.CertificateBuilder()
            .subject_name(name)
            .issuer_name(names[0])
            .public_key(key.public_key())
            .serial_number(x509.random_serial_number())
            .not_valid_before(now - datetime.timedelta(hours=1))
            .not_valid_after(now + datetime.timedelta(days=1))
            .add_extension(x509.BasicConstraints(ca=number == 0, path_length=None), critical=True)
            .add_extension(x509.SubjectKeyIdentifier.from_public_key(key.public_key()), critical=False)
            .add_extension(x509.AuthorityKeyIdentifier.from_issuer_public_key(keys[0].public_key()), critical=False)
        )
        if number:
            names_of = x509.SubjectAlternativeName([x509.DNSName(NAME), x509.IPAddress(ip_address("127.0.0.1"))])
            builder = builder.add_extension(names_of, critical=False)
        made.append(builder.sign(keys[0], hashes.SHA256()).public_bytes(serialization.Encoding.PEM))
    authority, chain = place / "authority.pem", place / "chain.pem"
    authority.write_bytes(made[0])
    plain = keys[1].private_bytes(
        serialization.Encoding.PEM, serialization.PrivateFormat.PKCS8, serialization.NoEncryption()
    )
    chain.write_bytes(plain + made[1])
    return authority, chain


TLS_SERVER = """
import socket, ssl, sys, threading
chain, size = sys.argv[1], int(sys.argv[2])
context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
context.load_cert_chain(chain)
context.set_alpn_protocols(["http/1.1"])
listener = socket.create_server(("127.0.0.1", 0), backlog=128)
print(listener.getsockname()[1], flush=True)
block = bytes(1 << 18)
def serve(sock):
    try:
        with context.wrap_socket(sock, server_side=True) as tls:
            said = b""
            while not said.endswith(b"\\r\\n\\r\\n"):
                data = tls.recv(65536)
                if not data:
                    return
                said += data
            tls.sendall(b"HTTP/1.1 200 OK\\r\\nContent-Length: %d\\r\\nConnection: close\\r\\n\\r\\n" % size)
            for _ in range(size // len(block)):
                tls.sendall(block)
            tls.unwrap()
    except OSError:
        pass
while True:
    threading.Thread(target=serve, args=listener.accept()[:1], daemon=True).start()
"""

TLS_CLIENT = """
import socket, ssl, sys, time
where, port, size, name, authority, proxy = sys.argv[1:]
context = ssl.create_default_context(cafile=authority or None)
context.set_alpn_protocols(["http/1.1"])
if proxy:
    sock = socket.create_connection(("127.0.0.1", int(proxy)))
    sock.sendall(f"CONNECT {where}:{port} HTTP/1.1\\r\\nHost: {where}:{port}\\r\\n\\r\\n".encode())
    said = b""
    while not said.endswith(b"\\r\\n\\r\\n"):
        said += sock.recv(1)
    assert said[9:10] == b"2", said
else:
    sock = socket.create_connection((where, int(port)))
tls = context.wrap_socket(sock, server_hostname=name)
host = name if port == "443" else f"{name}:{port}"
since = time.perf_counter()
tls.sendall(f"GET /large HTTP/1.1\\r\\nHost: {host}\\r\\nConnection: close\\r\\n\\r\\n".encode())
buffer, got = bytearray(1 << 18), 0
head = tls.recv(1 << 16)
assert b" 200 " in head[:20], head[:300]
got = len(head) - head.index(b"\\r\\n\\r\\n") - 4
while got < int(size):
    count = tls.recv_into(buffer)
    assert count, got
    got += count
print(int((time.perf_counter() - since) * 1e9), got)
"""
