"""The first bytes of real programs, of attacks and of programs that only look like them."""

from __future__ import annotations

import json
import time

import pytest
from hypothesis import example, given
from hypothesis import strategies as st

from corral.gateway.recognise import MAX_FIRST, Protocol, Recognised, recognise
from tests.unit.hellos import alpn, body, chrome, groups, hello, message, records, server_name, versions

WEBSOCKET = b"GET %s HTTP/1.1\r\nHost: a.example\r\nUpgrade: websocket\r\nConnection: Upgrade\r\n%s\r\n\r\n"
DNS_QUERY = bytes.fromhex("001d 3801 0100 0001 0000 0000 0000 07") + b"example\3org\0\0\1\0\1"
TOR_HELLO = records(message(body([server_name(b"www.3sqxkoaei2.com"), groups(23, 29, 21), versions(0x0304)])))
MONERO = {"id": 1, "method": "login", "params": {"login": "4AbC", "pass": "x", "agent": "XMRig/6.21", "rigid": "r"}}
ETHEREUM = {"id": 1, "method": "eth_submitLogin", "params": ["0xabc"], "worker": "w"}
BITCOIN = {"id": 1, "method": "mining.subscribe", "params": ["cgminer/4.10"]}


def line(*messages: object) -> bytes:
    return json.dumps(messages[0] if len(messages) == 1 else messages).encode() + b"\n"


KNOWN: dict[str, tuple[bytes, Protocol, str]] = {
    "hello": (hello(), Protocol.TLS, "example.org"),
    "hello in fragments": (hello(fragment=10), Protocol.TLS, "example.org"),
    "hello of Chrome": (chrome(), Protocol.TLS, "example.org"),
    "hello without a name": (records(message(body([]))), Protocol.TLS, ""),
    "request": (b"GET / HTTP/1.1\r\nHost: a.example\r\n\r\n", Protocol.HTTP, "GET"),
    "request with a body": (b"POST /x?y HTTP/1.0\r\nContent-Length: 1\r\n\r\nx", Protocol.HTTP, "POST"),
    "request for everything": (b"OPTIONS * HTTP/1.1\r\nHost: a.example\r\n\r\n", Protocol.HTTP, "OPTIONS"),
    "own method": (b"M-SEARCH / HTTP/1.1\r\nHost: a.example\r\n\r\n", Protocol.HTTP, "M-SEARCH"),
    "websocket": (WEBSOCKET % (b"/chat", b"Sec-WebSocket-Protocol: graphql-ws"), Protocol.HTTP, "GET"),
    "ssh": (b"SSH-2.0-OpenSSH_9.2p1 Debian-2\r\n\0\0\5", Protocol.SSH, "SSH-2.0-OpenSSH_9.2p1 Debian-2"),
    "ssh 1": (b"SSH-1.5-x\n", Protocol.SSH, "SSH-1.5-x"),
    "ssh with a long banner": (b"SSH-2.0-" + b"x" * 300, Protocol.SSH, "SSH-2.0-" + "x" * 69 + "..."),
    "socks 5": (b"\5\1\0", Protocol.SOCKS, "version 5"),
    "socks 5 with a password": (b"\5\2\0\2", Protocol.SOCKS, "version 5"),
    "socks 4": (b"\4\1\0\x50\xc0\0\2\1user\0", Protocol.SOCKS, "version 4"),
    "socks 4a": (b"\4\1\1\xbb\0\0\0\1\0evil.test\0", Protocol.SOCKS, "version 4"),
    "connect": (
        b"CONNECT evil.test:443 HTTP/1.1\r\nHost: evil.test\r\n\r\n",
        Protocol.CONNECT,
        "CONNECT evil.test:443",
    ),
    "connect in lower case": (b"connect evil.test:443 HTTP/1.1\r\n\r\n", Protocol.CONNECT, "connect evil.test:443"),
    "request to a proxy": (b"GET http://evil.test/?q HTTP/1.1\r\n\r\n", Protocol.CONNECT, "GET http://evil.test/"),
    "http/2": (b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n\0\0\0", Protocol.H2C, ""),
    "monero": (line(MONERO), Protocol.STRATUM, "login"),
    "ethereum": (line(ETHEREUM), Protocol.STRATUM, "eth_submitLogin"),
    "bitcoin": (line(BITCOIN), Protocol.STRATUM, "mining.subscribe"),
    "bitcoin in a list": (line({"id": 1}, BITCOIN), Protocol.STRATUM, "mining.subscribe"),
    "bitcoin behind blanks": (b" \r\n\t" + line(BITCOIN), Protocol.STRATUM, "mining.subscribe"),
    "bitcoin with hidden letters": (
        line(BITCOIN).replace(b"mi", b"\\u006d\\u0069"),
        Protocol.STRATUM,
        "mining.subscribe",
    ),
    "bitcoin in no JSON": (line(BITCOIN).replace(b"}", b""), Protocol.STRATUM, "mining"),
    "bitcoin without a line": (line(BITCOIN)[:-1], Protocol.STRATUM, "mining.subscribe"),
    "share": (line({"method": "submit", "params": {"job_id": "1", "nonce": "2"}}), Protocol.STRATUM, "submit"),
    "getwork": (b"POST / HTTP/1.1\r\nX-Mining-Extensions: midstate\r\n\r\n", Protocol.STRATUM, "getwork"),
    "tor": (TOR_HELLO, Protocol.TOR, "www.3sqxkoaei2.com"),
    "chisel": (WEBSOCKET % (b"/", b"Sec-WebSocket-Protocol: chisel-v3"), Protocol.TUNNEL, "chisel"),
    "chisel in other letters": (WEBSOCKET % (b"/", b"SEC-WEBSOCKET-PROTOCOL:x,CHISEL-v9"), Protocol.TUNNEL, "chisel"),
    "chisel by ssh": (b"SSH-chisel-v3-client\r\n", Protocol.TUNNEL, "chisel"),
    "wstunnel": (
        WEBSOCKET % (b"/v1/events", b"sec-websocket-protocol: v1, authorization.bearer.eyJ0eXAi"),
        Protocol.TUNNEL,
        "wstunnel",
    ),
    "frp": (b"\x17" + hello(), Protocol.TUNNEL, "frp"),
    "frp without TLS": (b"o\0\0\0\0\0\0\0\x60" + b'{"version":"0.5"}', Protocol.TUNNEL, "frp"),
    "frp by websocket": (WEBSOCKET % (b"/~!frp", b"Origin: http://x"), Protocol.TUNNEL, "frp"),
    "yamux window": (b"\0\1\0\1\0\0\0\1\0\4\0\0", Protocol.TUNNEL, "yamux (frp, ligolo)"),
    "yamux ping": (b"\0\2\0\1\0\0\0\0\0\0\0\0", Protocol.TUNNEL, "yamux (frp, ligolo)"),
    "rathole": (b"\0\0\0\0\1" + bytes(range(32)), Protocol.TUNNEL, "rathole"),
    "gost": (b"\1\1\0\x0c\2\0\x09\3evil.t\0P", Protocol.TUNNEL, "gost"),
    "wireguard": (b"\1\0\0\0" + bytes(144), Protocol.TUNNEL, "WireGuard, rathole or smux"),
    "wireguard with lengths": (b"\0\x94\1\0\0\0" + bytes(144), Protocol.TUNNEL, "WireGuard"),
    "openvpn": (b"\0\x0e\x38" + bytes(range(8)) + b"\0\0\0\0\0", Protocol.TUNNEL, "OpenVPN"),
    "openvpn with tls-auth": (b"\0\x2a\x38" + bytes(range(8)) + bytes(33), Protocol.TUNNEL, "OpenVPN"),
    "turn": (b"\0\3\0\x08\x21\x12\xa4\x42" + bytes(12), Protocol.TUNNEL, "TURN"),
    "sstp": (
        b"SSTP_DUPLEX_POST /sra_{BA195980-CD49-458b-9E23-C84EE0ADCD75}/ HTTP/1.1\r\n\r\n",
        Protocol.TUNNEL,
        "SSTP",
    ),
    "softether": (b"POST /vpnsvc/connect.cgi HTTP/1.1\r\n\r\n", Protocol.TUNNEL, "SoftEther"),
    "tailscale": (b"GET /derp HTTP/1.1\r\nUpgrade: DERP\r\n\r\n", Protocol.TUNNEL, "Tailscale"),
    "masque": (b"GET /m HTTP/1.1\r\nUpgrade: connect-udp\r\n\r\n", Protocol.TUNNEL, "MASQUE"),
    "ngrok": (hello(name=b"connect.eu.ngrok-agent.com"), Protocol.TUNNEL, "ngrok"),
    "ngrok, old": (hello(name=b"tunnel.us.ngrok.com"), Protocol.TUNNEL, "ngrok"),
    "cloudflared by name": (hello(name=b"region1.v2.argotunnel.com"), Protocol.TUNNEL, "cloudflared"),
    "tailscale's relay": (hello(name=b"derp1f.tailscale.com"), Protocol.TUNNEL, "Tailscale"),
    "cloudflared": (hello(alpn(b"argotunnel")), Protocol.TUNNEL, "cloudflared"),
    "zerotier": (b"\x17\3\3\0\x20" + bytes(32), Protocol.TUNNEL, "TLS without a handshake (ZeroTier)"),
    "proxy protocol": (b"PROXY TCP4 1.2.3.4 5.6.7.8 1 2\r\nGET / HTTP/1.1\r\n\r\n", Protocol.TUNNEL, "PROXY protocol"),
    "proxy protocol 2": (b"\r\n\r\n\0\r\nQUIT\n\x21\x11", Protocol.TUNNEL, "PROXY protocol"),
    "bore": (b'{"Hello":0}\0', Protocol.TUNNEL, "bore"),
}

PLAIN: dict[str, bytes] = {
    "smtp": b"EHLO client.example\r\n",
    "redis": b"*1\r\n$4\r\nPING\r\n",
    "redis inline": b"GET key\r\n",
    "memcached": b"get key\r\n",
    "postgres": b"\0\0\0\x08\x04\xd2\x16\x2f",
    "postgres startup": b"\0\0\0\x29\0\3\0\0user\0x\0",
    "mongodb": b"\x3f\0\0\0\1\0\0\0\0\0\0\0\xd4\7\0\0",
    "mongodb, 257 bytes": b"\1\1\0\0\1\0\0\0\0\0\0\0\xdd\7\0\0",
    "amqp": b"AMQP\0\0\x09\1",
    "kafka": b"\0\0\0\x1a\0\x12\0\3\0\0\0\0\0\4",
    "cassandra 5": b"\5\0\0\0\5\0\0\0\0",
    "cassandra 4": b"\4\0\0\0\5\0\0\0\0",
    "mqtt": b"\x10\x10\0\4MQTT\4\2\0<\0\4test",
    "ldap": b"\x30\x0c\2\1\1\x60\7\2\1\3\4\0\x80\0",
    "mssql": b"\x12\1\0\x2f\0\0\1\0",
    "modbus": b"\0\1\0\0\0\6\1\3\0\0\0\1",
    "dns": DNS_QUERY,
    "rtsp": b"OPTIONS rtsp://a.example/ RTSP/1.0\r\n\r\n",
    "git": b"0032git-upload-pack /project.git\0host=example.org\0",
    "json": line({"jsonrpc": "2.0", "method": "login", "params": {"user": "x"}}),
    "json without a line": b'{"jsonrpc":"2.0","method":"net_version","params":["}\xc3\xa9"]}',
    "json submit": line({"method": "submit", "params": ["form"]}),
    "json list": b"[1, 2, 3]\n",
    "deep json": b"[" * 5000 + b"\n",
    "long number": b"[" + b"9" * 5000 + b"]\n",
    "rdp": b"\3\0\0\x13\x0e\xe0\0\0\0\0\0\1\0\x08\0\3\0\0\0",
    "dtls": b"\x16\xfe\xfd\0\0",
    "high bytes": b"\x80\x81\x82\x83\x84",
}

FAULTY: dict[str, tuple[bytes, Protocol, str]] = {
    "empty line first": (b"\r\nGET / HTTP/1.1\r\nHost: a\r\n\r\n", Protocol.HTTP, "stands before"),
    "blank first": (b" GET / HTTP/1.1\r\nHost: a\r\n\r\n", Protocol.HTTP, "stands before"),
    "line ends with LF": (b"GET / HTTP/1.1\nHost: a\n\n", Protocol.HTTP, "request line"),
    "two blanks": (b"GET  / HTTP/1.1\r\n\r\n", Protocol.HTTP, "request line"),
    "tab": (b"GET\t/ HTTP/1.1\r\n\r\n", Protocol.HTTP, "request line"),
    "blank at the end": (b"GET / HTTP/1.1 \r\n\r\n", Protocol.HTTP, "request line"),
    "blank in the target": (b"GET /a b HTTP/1.1\r\n\r\n", Protocol.HTTP, "request line"),
    "NUL in the target": (b"GET /\0 HTTP/1.1\r\n\r\n", Protocol.HTTP, "request line"),
    "bytes in the target": (b"GET /\xff HTTP/1.1\r\n\r\n", Protocol.HTTP, "request line"),
    "CR in the line": (b"GET / HTTP/1.1\r\r\n\r\n", Protocol.HTTP, "request line"),
    "version 2": (b"GET / HTTP/2.0\r\n\r\n", Protocol.HTTP, "request line"),
    "version 1.2": (b"GET / HTTP/1.2\r\n\r\n", Protocol.HTTP, "request line"),
    "version 0.9": (b"GET /secret\r\n", Protocol.HTTP, "request line"),
    "lower-case version": (b"GET / http/1.1\r\n\r\n", Protocol.HTTP, "request line"),
    "no target": (b"GET HTTP/1.1\r\n\r\n", Protocol.HTTP, "request line"),
    "host as target": (b"GET evil.test HTTP/1.1\r\n\r\n", Protocol.HTTP, "target"),
    "connect, badly": (b"CONNECT  evil.test:443 HTTP/1.1\r\n\r\n", Protocol.CONNECT, "request line"),
    "connect without a version": (b"CONNECT evil.test:443\r\n", Protocol.CONNECT, "request line"),
    "proxied, badly": (b"GET  http://evil.test/ HTTP/1.1\r\n\r\n", Protocol.CONNECT, "request line"),
    "ssh behind a line": (b"\r\nSSH-2.0-x\r\n", Protocol.SSH, "begin with its version"),
    "malformed hello": (records(message(b"")), Protocol.TLS, "malformed: a length"),
    "record of zero bytes": (b"\x16\3\1\0\0", Protocol.TLS, "malformed: a record of 0"),
    "name of an address": (hello(name=b"192.0.2.1"), Protocol.TLS, "malformed: server name"),
    "SSL 2.0": (b"\x80\x2e\1\0\2\0\x15", Protocol.TLS, "SSL 2.0"),
    "SSL 2.0 for TLS": (b"\x80\x2e\1\3\1\0\x15", Protocol.TLS, "SSL 2.0"),
}

ALL = (
    {name: data for name, (data, _, _) in KNOWN.items()}
    | PLAIN
    | {f"faulty: {name}": data for name, (data, _, _) in FAULTY.items()}
)


def found(data: bytes, *, ended: bool = False) -> Recognised:
    answer = recognise(data, ended=ended)
    assert answer is not None
    return answer


def first_answer(data: bytes) -> Recognised | None:
    """As of a gateway that gets byte after byte."""
    return next((answer for length in range(len(data) + 1) if (answer := recognise(data[:length]))), None)


@pytest.mark.parametrize(("data", "protocol", "detail"), KNOWN.values(), ids=KNOWN)
def test_what_is_known_is_recognised(data: bytes, protocol: Protocol, detail: str) -> None:
    answer = found(data)
    assert (answer.protocol, answer.detail, answer.fault) == (protocol, detail, "")


@pytest.mark.parametrize("data", PLAIN.values(), ids=PLAIN)
def test_other_programs_are_not_kept_waiting_and_not_mistaken(data: bytes) -> None:
    assert found(data) == Recognised(Protocol.TCP)


@pytest.mark.parametrize(("data", "protocol", "fault"), FAULTY.values(), ids=FAULTY)
def test_what_breaks_its_own_rules_has_a_fault(data: bytes, protocol: Protocol, fault: str) -> None:
    answer = found(data)
    assert answer.protocol is protocol
    assert fault in answer.fault
    assert answer.hello is None


@pytest.mark.parametrize("data", ALL.values(), ids=ALL)
def test_every_way_to_cut_gives_the_same(data: bytes) -> None:
    assert first_answer(data) == found(data) == found(data + b"\r\n\0more", ended=True)


def test_hellos_come_with_their_hello() -> None:
    for data in (hello(), TOR_HELLO, hello(alpn(b"argotunnel"))):
        assert found(data).hello is not None


@pytest.mark.parametrize("name", [b"www.google.com", b"www.debian.org", b"www.a2b3c4d5e6.net"])
def test_other_names_are_not_tor(name: bytes) -> None:
    assert found(hello(name=name)).protocol is Protocol.TLS
    old_openssl = records(message(body([server_name(name), groups(23, 25, 24, 22, 21)])))
    assert found(old_openssl).protocol is Protocol.TLS
    like_openssl = records(message(body([server_name(name), groups(29, 23, 30, 25, 24), alpn(b"h2")])))
    assert found(like_openssl).protocol is Protocol.TLS


@pytest.mark.parametrize("name", [b"pkgs.tailscale.com", b"ngrok.com", b"myargotunnel.com", b"tunnel.example.org"])
def test_other_names_are_no_tunnels(name: bytes) -> None:
    assert found(hello(name=name)).protocol is Protocol.TLS


def test_who_says_nothing_is_tcp_in_the_end() -> None:
    assert recognise(b"") is None
    assert recognise(b"\r\n") is None
    assert found(b"", ended=True) == Recognised(Protocol.TCP, "the client sent nothing")


@pytest.mark.parametrize(
    ("data", "protocol", "fault"),
    [
        (b"\5", Protocol.SOCKS, ""),
        (b"SSH-", Protocol.SSH, ""),
        (hello()[:50], Protocol.TLS, "not complete"),
        (b"\x16\3", Protocol.TLS, "not complete"),
        (b"GET / HTTP/1.1\r\nHost: a", Protocol.HTTP, "do not end"),
        (b"GET / HTTP/1.1\r\nX-Mining-Hashrate: 1", Protocol.STRATUM, ""),
        (b"GET / HTTP/1.1", Protocol.HTTP, "request line"),
        (b"CONNECT evil.test:443", Protocol.CONNECT, "request line"),
        (line(BITCOIN)[:-5], Protocol.STRATUM, ""),
        (b"GET", Protocol.TCP, ""),
    ],
)
def test_who_stops_in_the_middle_is_the_worst_that_it_could_be(data: bytes, protocol: Protocol, fault: str) -> None:
    assert recognise(data) is None or not fault
    answer = found(data, ended=True)
    assert answer.protocol is protocol
    assert fault in answer.fault and bool(fault) == bool(answer.fault)


def test_headers_that_do_not_end_are_refused_and_cannot_hide_a_tunnel() -> None:
    head = b"GET / HTTP/1.1\r\nX: " + b"x" * MAX_FIRST + b"\r\nSec-WebSocket-Protocol: chisel-v3\r\n\r\n"
    assert found(head).fault.startswith("its headers do not end")
    early = b"GET / HTTP/1.1\r\nSec-WebSocket-Protocol: chisel-v3\r\nX: " + b"x" * MAX_FIRST
    assert found(early).protocol is Protocol.TUNNEL


@pytest.mark.parametrize("data", [b"{" + b" " * MAX_FIRST, b"x " * MAX_FIRST, b"\n" * MAX_FIRST])
def test_what_is_undecided_at_the_limit_is_decided(data: bytes) -> None:
    assert recognise(data[: MAX_FIRST - 1]) is None
    assert found(data) == found(data[:MAX_FIRST]) == Recognised(Protocol.TCP, "nothing that is known within 32 KiB")


def test_details_are_one_short_line_of_ascii() -> None:
    hostile = b"SSH-2.0-\x1b[31m\xff" + b"y" * 200 + b"\r\n"
    target = b"CONNECT " + b"e" * 1000 + b":443 HTTP/1.1\r\n\r\n"
    for data in (hostile, target, line({"method": "mining." + "x" * 40}), hello(name=b"a." * 120 + b"org")):
        detail = found(data).detail
        assert detail.isascii() and detail.isprintable() and len(detail) < 200


BEGINNINGS = st.sampled_from([data[:length] for data in ALL.values() for length in (1, 2, 5, 20, 1000)])


@given(BEGINNINGS, st.binary(max_size=60))
@example(b"", b"\x80\x00\x01\x03")
@example(b"A" * 64, b"A / HTTP/1.1\r\n")
@example(b"{", b'"method":"mining.x"}\n')
def test_whatever_comes_there_is_one_answer(beginning: bytes, rest: bytes) -> None:
    data = beginning + rest
    answer = recognise(data)
    for length in range(len(data) + 1):
        part = recognise(data[:length])
        assert part is None or part == answer
    ended = recognise(data, ended=True)
    assert ended is not None and answer in (None, ended)


@pytest.mark.parametrize(
    "pattern",
    [
        b'{"login":',
        b'{"method":"login"',
        b"\n\n",
        b"GET / HTTP/1.1\r\nUpgrade:",
        b"\nsec-websocket-protocol:",
        b"x ",
        b"[",
        b"\\u006d",
    ],
)
def test_no_input_takes_long(pattern: bytes) -> None:
    for lead in (b"", b"{", b"GET / HTTP/1.1\r\n"):
        data = (lead + pattern * MAX_FIRST)[: MAX_FIRST - 1]
        begin = time.perf_counter()
        recognise(data)
        recognise(data, ended=True)
        assert time.perf_counter() - begin < 0.5
