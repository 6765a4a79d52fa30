"""A flow that began harmless and becomes something else: found before the bytes are sent on, and never in peace."""

from __future__ import annotations

import random
import re
import time
from collections.abc import Iterator

import pytest
from hypothesis import given
from hypothesis import strategies as st

from corral.gateway import watch as watching
from corral.gateway.recognise import MAX_FIRST, Protocol, Recognised, could_decide, recognise
from corral.gateway.watch import MAX_KEEN, MAX_READ, MAX_WATCHED, PIECEMEAL, Direction, Finding, Watch
from tests.unit.hellos import hello, message, number, records

UP, DOWN = Direction.UP, Direction.DOWN
Talk = list[tuple[Direction, bytes]]

SERVER_HELLO = records(message(number(0x0303) + bytes(32) + b"\0\x13\1\0", kind=2), version=0x0303)
MYSQL_SSL = b"\x20\0\0\1" + b"\x85\xae\xff\x19" + b"\0\0\0\1" + b"\x2d" + bytes(23)
SMTP: Talk = [
    (DOWN, b"220 mail.example ESMTP\r\n"),
    (UP, b"EHLO c\r\n"),
    (DOWN, b"250-mail.example\r\n250 STARTTLS\r\n"),
]

ATTACKS: dict[str, tuple[Talk, Protocol, bool]] = {
    "STARTTLS by SMTP": ([*SMTP, (UP, b"STARTTLS\r\n")], Protocol.TLS, True),
    "in small letters": ([*SMTP, (UP, b"starttls \n")], Protocol.TLS, True),
    "by IMAP": ([(DOWN, b"* OK\r\n"), (UP, b"a001 CAPABILITY\r\na002 StartTLS\r\n")], Protocol.TLS, True),
    "by POP3": ([(DOWN, b"+OK\r\n"), (UP, b"STLS\r\n")], Protocol.TLS, True),
    "by FTP": ([(DOWN, b"220\r\n"), (UP, b"AUTH TLS\r\n")], Protocol.TLS, True),
    "by LDAP": ([(UP, b"\x30\x1d\2\1\1\x77\x18\x80\x161.3.6.1.4.1.1466.20037")], Protocol.TLS, True),
    "by XMPP": ([(UP, b"<stream:stream><starttls xmlns='x'/>")], Protocol.TLS, True),
    "by PostgreSQL": ([(UP, b"\0\0\0\x08\x04\xd2\x16\x2f")], Protocol.TLS, True),
    "by MySQL": ([(DOWN, b"\x4a\0\0\0\x0a8.0"), (UP, MYSQL_SSL)], Protocol.TLS, True),
    "TLS after it": ([*SMTP, (UP, b"STARTTLS\r\n"), (DOWN, b"220 go\r\n"), (UP, hello())], Protocol.TLS, True),
    "TLS without asking": ([*SMTP, (UP, hello())], Protocol.TLS, False),
    "TLS behind text": ([(UP, b"hello there, friend " + hello())], Protocol.TLS, False),
    "TLS of a server": ([(UP, b"begin\n"), (DOWN, b"yes " + SERVER_HELLO)], Protocol.TLS, False),
    "TLS after much": ([(UP, b"x" * 100_000), (DOWN, b"go"), (UP, hello())], Protocol.TLS, False),
    "ssh server that speaks first": ([(DOWN, b"SSH-2.0-OpenSSH_9.2\r\n")], Protocol.SSH, False),
    "ssh behind a line": ([(UP, b"hello\r\nSSH-2.0-x\r\n")], Protocol.SSH, False),
    "ssh after an answer": ([(UP, b"hello"), (DOWN, b"yes"), (UP, b"SSH-2.0-x\r\n")], Protocol.SSH, False),
    "ssh across an answer": ([(UP, b"hi\nSSH-"), (DOWN, b"yes"), (UP, b"2.0-x\r\n")], Protocol.SSH, False),
    "ssh after much": ([(UP, b"x" * 200_000 + b"\nSSH-2.0-x\r\n")], Protocol.SSH, False),
    "ssh after very much": ([*[(UP, b"y" * 65_536)] * 100, (UP, b"\nSSH-2.0-x\r\n")], Protocol.SSH, False),
    "socks in one go": ([(UP, b"hello\n\5\1\0\5\1\0\1\xc0\0\2\1\0\x50")], Protocol.SOCKS, False),
    "socks with an answer": (
        [(UP, b"hello\n"), (DOWN, b"ok\n"), (UP, b"\5\1\0"), (DOWN, b"\5\0")],
        Protocol.SOCKS,
        False,
    ),
    "socks behind text": ([(UP, b"hello\n\5\2\0\2"), (DOWN, b"\5\2")], Protocol.SOCKS, False),
    "socks that is refused": ([(UP, b"hello\n\5\1\0"), (DOWN, b"\5\xff")], Protocol.SOCKS, False),
    "socks 4": ([(UP, b"hello\n\4\1\0\x50\xc0\0\2\1user\0")], Protocol.SOCKS, False),
    "connect": ([(UP, b"hello\r\nCONNECT evil.test:443 HTTP/1.1\r\n")], Protocol.CONNECT, False),
    "request to a proxy": ([(UP, b"hello\r\nGET http://evil.test/ HTTP/1.1\r\n")], Protocol.CONNECT, False),
    "request": ([(UP, b"hello\r\nGET /x HTTP/1.1\r\n")], Protocol.HTTP, False),
    "http/2": ([(UP, b"hello\nPRI * HTTP/2.0\r\n\r\n")], Protocol.H2C, False),
    "mining": ([(UP, b'{"id": 0}\n{"id":1,"method":"mining.subscribe"}\n')], Protocol.STRATUM, False),
    "mining on many lines": ([(UP, b'{\n"id":1,\n "method" : "mining.authorize"}\n')], Protocol.STRATUM, False),
    "mining by login": (
        [(UP, b'{}\n{"method":"login","params":{"login":"4A","pass":"x"}}\n')],
        Protocol.STRATUM,
        False,
    ),
    "login behind its words": ([(UP, b'{}\n{"params":{"login":"4A"},"method":"login"}\n')], Protocol.STRATUM, False),
    "mining with hidden letters": ([(UP, b'{}\n{"method":"\\u006dining.subscribe"}\n')], Protocol.STRATUM, False),
    "mining with a hidden key": (
        [(UP, b'{}\n{"\\u006dethod":"mining.subscribe"}\n')],
        Protocol.STRATUM,
        False,
    ),
    "a pool that speaks": ([(UP, b"hi\n"), (DOWN, b'{"id":null,"method":"mining.notify"}\n')], Protocol.STRATUM, False),
    "a job": ([(UP, b"x\n"), (DOWN, b'{"blob":"' + b"0c" * 76 + b'","job_id":"1"}')], Protocol.STRATUM, False),
    "mining after much": ([(UP, b"x" * 90_000 + b'\n{"method":"mining.submit"}\n')], Protocol.STRATUM, False),
    # The gateway was told that no more would come, and then it did.
    "slow ssh": ([(UP, b"SS"), (UP, b"H-2.0-x\r\n")], Protocol.SSH, False),
    "slow tunnel": ([(UP, b"\0\1\0"), (UP, b"\1\0\0\0\1")], Protocol.TUNNEL, False),
    "slow hello": ([(UP, hello()[:4]), (UP, hello()[4:])], Protocol.TLS, False),
    "tunnel after a greeting": ([(DOWN, b"220 hello\r\n"), (UP, b"\x17" + hello())], Protocol.TUNNEL, False),
}

REDIS = b"*3\r\n$3\r\nSET\r\n$1\r\nk\r\n$5\r\nvalue\r\n"
PEACE: dict[str, Talk] = {
    "mail": [*SMTP, (UP, b"MAIL FROM:<a@b>\r\nDATA\r\nPlease run STARTTLS, then SSH-2.0 works.\r\n.\r\n")],
    "redis": [(UP, REDIS), (DOWN, b"+OK\r\n")] * 2000,
    "postgres": [(UP, b"\0\0\0\x29\0\3\0\0user\0x\0"), (DOWN, b"R\0\0\0\x08\0\0\0\0"), (UP, b"Q\0\0\0\x0dSELECT 1\0")],
    "mysql, 261 bytes": [(DOWN, b"\x4a\0\0\0\x0a8.0"), (UP, b"\5\1\0\0\3" + b"S" * 260), (DOWN, b"\5\0\0\2\0\0\0\2\0")],
    "mysql, 260 bytes": [(DOWN, b"\x4a\0\0\0\x0a8.0"), (UP, b"\4\1\0\0\3SELECT a\0" + b"S" * 250), (DOWN, b"\7\0\0")],
    "mysql, first packet of 260 bytes": [
        (DOWN, b"\x4a\0\0\0\x0a8.0"),
        (UP, b"\4\1\0\1\x85\xa6\xff\x19\0\0\0\1" + b"x" * 252),
    ],
    "mysql, first packet of 261 bytes": [
        (DOWN, b"\x4a\0\0\0\x0a8.0"),
        (UP, b"\5\1\0\1\x85\xa6\xff\x19\0\0\0\1" + b"x" * 253),
    ],
    "mysql without TLS": [(DOWN, b"\x4a\0\0\0\x0a8.0"), (UP, MYSQL_SSL.replace(b"\xae", b"\xa6"))],
    "json": [(UP, b'{"method":"login","params":{"user":"\\u00e9"}}\n'), (DOWN, b'{"result":"\\u003cb\\u003e"}\n')],
    "log": [(UP, b'<14>1 host app: "GET / HTTP/1.1" 200\n' * 3000)],
    "greeting that gets another answer": [(UP, b"hello\n\5\1\0"), (DOWN, b"what?")],
    "greeting with fewer ways than it says": [(UP, b"hello\n\5\3\0"), (DOWN, b"\5\0")],
    "words in the middle of lines, after much": [(UP, b"x" * MAX_KEEN + b"x <starttls/> " + hello())],
    "greeting with more behind it": [(UP, b"hello\n\5\1\0x"), (DOWN, b"\5\0")],
}


def watched(talk: Talk) -> Finding | None:
    """What is found last, or what ends the flow before."""
    watch, last = Watch(), None
    for direction, data in talk:
        last = watch.feed(direction, data) or last
        if last is not None and not last.starttls:
            break
    return last


def bytewise(talk: Talk) -> Talk:
    return [(direction, data[i : i + 1]) for direction, data in talk for i in range(len(data))]


@pytest.mark.parametrize(("talk", "protocol", "starttls"), ATTACKS.values(), ids=ATTACKS)
def test_what_a_flow_becomes_is_found(talk: Talk, protocol: Protocol, starttls: bool) -> None:
    finding = watched(talk)
    assert finding is not None
    assert (finding.protocol, finding.starttls) == (protocol, starttls)
    assert finding.detail.isascii() and finding.detail.isprintable()


@pytest.mark.parametrize(("talk", "protocol", "starttls"), ATTACKS.values(), ids=ATTACKS)
def test_every_way_to_cut_finds_the_same(talk: Talk, protocol: Protocol, starttls: bool) -> None:
    if sum(len(data) for _, data in talk) > 1000:
        talk = [(direction, piece) for direction, data in talk for piece in (data[:-3], data[-3:])]
    else:
        talk = bytewise(talk)
    finding = watched(talk)
    assert finding is not None
    assert (finding.protocol, finding.starttls) == (protocol, starttls)


@pytest.mark.parametrize("talk", PEACE.values(), ids=PEACE)
def test_ordinary_flows_are_left_in_peace(talk: Talk) -> None:
    assert watched(talk) is None
    assert watched(bytewise(talk[:4])) is None


def test_random_bytes_are_left_in_peace() -> None:
    source = random.Random(4)
    talk = [(direction, source.randbytes(4096)) for _ in range(500) for direction in (UP, DOWN)]
    assert watched([(UP, b"begin\n"), *talk]) is None


def test_tls_behind_starttls_in_the_same_bytes_was_asked_for() -> None:
    watch = Watch()
    assert watch.feed(UP, b"EHLO c\r\nSTARTTLS\r\n" + hello()) == Finding(Protocol.TLS, "STARTTLS", starttls=True)
    assert watch.feed(DOWN, SERVER_HELLO) == Finding(Protocol.TLS, "TLS after STARTTLS", starttls=True)


def test_starttls_hides_nothing_worse() -> None:
    finding = Watch().feed(UP, b"EHLO c\r\nSTARTTLS\r\nSSH-2.0-x\r\n")
    assert finding is not None and finding.protocol is Protocol.SSH


def test_what_was_found_is_not_found_again() -> None:
    watch = Watch()
    assert watch.feed(UP, b"EHLO c\r\nSTARTTLS\r\n") is not None
    assert watch.feed(UP, b"NOOP\r\n") is None
    assert watch.feed(UP, b"STARTTLS\r\n") is not None


def test_the_bytes_that_complete_it_are_those_that_are_held_back() -> None:
    attack = b"hello\nCONNECT evil.test:443 HTTP/1.1\r\nHost: evil.test\r\n\r\n"
    watch = Watch()
    passed = bytearray()
    for i in range(len(attack)):
        if watch.feed(UP, attack[i : i + 1]) is not None:
            break
        passed += attack[i : i + 1]
    assert b"HTTP/1" not in passed and len(passed) < len(attack)


def test_watching_ends() -> None:
    watch = Watch()
    piece = b"z" * (1 << 20)
    for _ in range(MAX_WATCHED // len(piece)):
        assert not watch.done(UP)
        watch.feed(UP, piece)
    assert watch.done(UP) and not watch.done(DOWN) and not watch.finished
    assert watch.feed(UP, b"\nSSH-2.0-x\r\n") is None
    for _ in range(MAX_WATCHED // len(piece)):
        watch.feed(DOWN, piece)
    assert watch.finished


WORDS = st.sampled_from(
    [
        b"\n",
        b"\r\n",
        b"SSH-",
        b"2.0",
        b"STARTTLS",
        b"\5",
        b"\1\0",
        b"{",
        b'"method"',
        b':"mining.',
        b'x"',
        b"CONNECT ",
        b"a:1",
        b" HTTP/1",
        b"\x16\3\1",
        b"\0\x50\1\0\0\x4c\3\3",
        b"PRI * HTTP/2",
        b"x",
        b"\0\0\0\x08\x04\xd2\x16\x2f",
    ]
)


@given(st.lists(st.tuples(st.sampled_from(Direction), st.lists(WORDS, max_size=6).map(b"".join)), max_size=6))
def test_pieces_never_hide_anything(talk: Talk) -> None:
    assert (watched(talk) is None) == (watched(bytewise(talk)) is None)


def test_a_beginning_that_never_becomes_clear_ends_the_flow() -> None:
    """Each byte has the whole of it read again, so there is an end to bytes that come singly."""
    watch, fed = Watch(), 0
    found = watch.feed(UP, b'{"')
    while found is None and fed < MAX_FIRST:
        found, fed = watch.feed(UP, b"}"), fed + 1
    assert found == PIECEMEAL and not found.starttls
    assert fed < 2.2 * MAX_READ**0.5
    watch = Watch()  # as it comes from a program
    assert not any(watch.feed(UP, b'{"' + b"}" * 1000) for _ in range(MAX_FIRST // 1000 + 2))


class Counted:
    """A pattern that says how much it has looked at."""

    def __init__(self, own: re.Pattern[bytes], work: list[int]) -> None:
        self._own, self._work = own, work

    def match(self, data: bytes) -> re.Match[bytes] | None:
        self._work.append(len(data))
        return self._own.match(data)

    def finditer(self, data: bytes) -> Iterator[re.Match[bytes]]:
        self._work.append(len(data))
        return self._own.finditer(data)


@pytest.mark.parametrize("later", [False, True])
@pytest.mark.parametrize("way", Direction)
def test_a_byte_at_a_time_costs_the_same_for_each(way: Direction, later: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    """Counted in the bytes that patterns are given and that beginnings are read of: it grows with the stream only."""
    work: list[int] = []
    for name in ("_KEEN", "_LATER"):
        looks = getattr(watching, name)
        counted = {key: tuple(Counted(look, work) for look in found) for key, found in looks.items()}
        monkeypatch.setattr(watching, name, counted)

    def counting(data: bytes) -> Recognised | None:
        work.append(len(data))
        return recognise(data)

    monkeypatch.setattr(watching, "recognise", counting)
    watch = Watch()
    if later:
        assert watch.feed(way, b"+" * MAX_KEEN) is None
    costs = []
    for _ in range(3):
        before = sum(work)
        for byte in b'{"text": "' + b'\n"\x16\x03' * 5 + b"x" * 4000 + b"1.3.6." * 10:
            assert watch.feed(way, bytes((byte,))) is None
        costs.append((sum(work) - before) // 4100)
    assert costs[1] == costs[2] <= 6 * 513


@pytest.mark.parametrize("begin", [b'{"a": "', b"  [", b"POST ", b"\r\n\r\nOPTIONS * ", b"abc def"])
def test_a_long_beginning_in_single_bytes_is_read_as_seldom_as_it_can_be_decided(begin: bytes) -> None:
    watch = Watch()
    data = (begin + b"x" * 8_000)[:8_000]
    for at in range(len(data)):
        assert watch.feed(UP, data[at : at + 1]) is None
    assert watch._read < 600_000


_LONG = hello((21, b"x" * 1200))


@pytest.mark.parametrize(
    ("before", "more"),
    [
        (b'{"a": "' + b"x" * 1100 + b'"', b"}"),
        (b'["' + b"x" * 1100 + b'"', b"]"),
        (b"{" + b"x" * 1100, b"\n"),
        (b"{" + b"x" * 1100, b"x\0x"),
        (b"GET /" + b"x" * 1100, b" HTTP/1.1\r\n\r\n"),
        (b" " * 1100, b"\5"),
        (_LONG[:-1], _LONG[-1:]),
        (b"SSH-2.0-" + b"x" * 246, b"x"),
        (b"M" * 64, b"M"),
        (b"{" * (MAX_FIRST - 1), b"x"),
    ],
)
def test_what_decides_is_read(before: bytes, more: bytes) -> None:
    assert recognise(before) is None and recognise(before + more) is not None
    assert could_decide(before, more)
    watch = Watch()
    watch.feed(UP, before)
    assert watch._first is not None
    watch.feed(UP, more)
    assert watch._first is None


@given(st.lists(st.tuples(st.sampled_from(Direction), st.binary(max_size=200)), max_size=10))
def test_arbitrary_bytes_are_no_error(talk: Talk) -> None:
    watched(talk)


@pytest.mark.parametrize(
    "pattern",
    [
        b"\n{",
        b'"login":',
        b'{"method":"login"',
        b"\n" + b"a" * 63,
        b"\nCONNECT x",
        b"\n\5\1",
        b'"job_id":"',
        b"\\u00",
        b"\n\4\1aa",
    ],
)
def test_no_input_takes_long(pattern: bytes) -> None:
    for size in (MAX_KEEN, 1 << 20):
        watch = Watch()
        data = (pattern * size)[:size]
        begin = time.perf_counter()
        watch.feed(UP, data)
        spent = time.perf_counter() - begin
        assert spent < 1 + size / (1 << 20)
