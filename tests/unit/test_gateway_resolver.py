"""Looking names up: shared, bounded, never waited for; answers of servers are believed only where they fit."""

from __future__ import annotations

import socket
import threading
import time
from collections.abc import Callable, Iterator
from functools import partial
from typing import Any

import dns.flags
import dns.message
import dns.rcode
import dns.rrset
import pytest

from corral.gateway import resolver as resolving
from corral.gateway.resolver import CROWDED, SILENT, Done, Resolved, Resolver, SystemLookup, look_up
from corral.gateway.stub import StubLookup, server_of
from tests.unit.gateway_bench import Bench

WEB = b"\xcb\0\x71\x50"
FOUND = Resolved((WEB,), 30.0)


class Slow:
    """A lookup that answers when the test says so."""

    each = 2

    def __init__(self) -> None:
        self.asked: list[tuple[str, Callable[[Resolved], None]]] = []

    def resolve(self, name: str, done: Callable[[Resolved], None]) -> None:
        self.asked.append((name, done))


class Rig:
    """A resolver over such a lookup, and what each of some owners has heard."""

    def __init__(self) -> None:
        self.bench, self.lookup = Bench(), Slow()
        self.resolver = Resolver(self.bench.bare, self.lookup)
        self.heard: dict[str, list[Resolved]] = {owner: [] for owner in ("one", "two")}

    def ask(self, name: str, owner: str = "one") -> list[Resolved]:
        self.resolver.resolve(name, self.heard[owner].append, owner)
        return self.heard[owner]

    @property
    def names(self) -> list[str]:
        return [name for name, _ in self.lookup.asked]

    def answer(self, number: int, found: Resolved = FOUND) -> None:
        self.lookup.asked[number][1](found)


@pytest.fixture
def soon(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(resolving, "TIMEOUT", 0.05)


def test_who_asks_for_the_same_waits_for_the_same() -> None:
    rig = Rig()
    for owner in ("one", "two", "one"):
        rig.ask("web.test", owner)
    assert rig.names == ["web.test"]
    rig.answer(0)
    assert rig.heard == {"one": [FOUND] * 2, "two": [FOUND]}
    rig.ask("web.test", "two")  # from the cache
    assert len(rig.lookup.asked) == 1 and rig.heard["two"] == [FOUND] * 2
    assert not rig.resolver._shares and not rig.resolver._asked


@pytest.mark.usefixtures("soon")
def test_silence_is_an_answer_and_one_that_comes_late_is_none() -> None:
    rig = Rig()
    heard = rig.ask("web.test")
    rig.bench.until(lambda: heard)
    assert heard[0].addresses == () and "silent" in heard[0].problem
    assert rig.ask("web.test", "two") == [SILENT]  # at once, and without a second thread
    rig.answer(0)
    assert len(heard) == 1
    assert rig.ask("web.test", "two") == [SILENT] * 2  # the late one was not kept, the silence is
    assert rig.names == ["web.test"]


@pytest.mark.usefixtures("soon")
def test_silence_is_not_kept_for_long(monkeypatch: pytest.MonkeyPatch) -> None:
    rig = Rig()
    heard = rig.ask("web.test")
    rig.bench.until(lambda: heard)
    rig.answer(0)
    now = time.monotonic()
    monkeypatch.setattr(time, "monotonic", lambda: now + resolving.SILENCE_KEPT)
    rig.ask("web.test")
    assert len(rig.lookup.asked) == 2


def test_too_many_of_one_owner_are_refused_and_no_one_else_s() -> None:
    rig = Rig()
    for number in range(resolving.MAX_WAITING):
        rig.ask(f"n{number}.test")
    assert not rig.heard["one"]
    assert rig.ask("one.more.test") == [CROWDED]
    assert rig.ask("web.test", "two") == [] and rig.names[-1] == "web.test"
    rig.answer(2)
    assert rig.heard["two"] == [FOUND]
    rig.answer(0)
    assert len(rig.ask("one.more.test")) == 2  # there was room again
    for number in (1, *range(3, resolving.MAX_WAITING + 2)):
        rig.answer(number)
    assert len(rig.heard["one"]) == resolving.MAX_WAITING + 2
    assert not rig.resolver._shares and not rig.resolver._asked


@pytest.mark.usefixtures("soon")
def test_a_zone_that_never_answers_holds_up_its_asker_only(monkeypatch: pytest.MonkeyPatch) -> None:
    """The threads stay busy after those who waited were told; what the others want does not wait for them."""
    rig = Rig()
    for number in range(resolving.MAX_WAITING):
        rig.ask(f"n{number}.evil.test")
    assert rig.names == ["n0.evil.test", "n1.evil.test"]
    rig.bench.until(lambda: len(rig.heard["one"]) == resolving.MAX_WAITING)
    assert sorted(rig.heard["one"], key=str) == sorted([SILENT] * 2 + [CROWDED] * 30, key=str)
    monkeypatch.setattr(resolving, "TIMEOUT", 10.0)
    for number in range(resolving.MAX_WAITING):
        rig.ask(f"m{number}.evil.test")
    assert len(rig.names) == 2  # both threads are still held
    assert rig.ask("web.test", "two") == [] and rig.names[2:] == ["web.test"]
    rig.answer(2)
    assert rig.heard["two"] == [FOUND]
    rig.answer(0)
    assert rig.names[3:] == ["m0.evil.test"]


def test_nobody_waits_in_another_s_queue() -> None:
    rig = Rig()
    for name in ("n0.evil.test", "n1.evil.test", "web.test"):
        rig.ask(name)
    rig.ask("web.test", "two")
    assert rig.names == ["n0.evil.test", "n1.evil.test", "web.test"]
    rig.answer(2)
    assert rig.heard == {"one": [FOUND], "two": [FOUND]}  # and whoever waited has it as well
    rig.answer(0)
    assert len(rig.names) == 3


def test_whose_turn_comes_joins_another_s_look_up() -> None:
    rig = Rig()
    for name in ("n0.evil.test", "n1.evil.test", "web.test"):
        rig.ask(name)
    rig.ask("web.test", "two")
    rig.answer(0)
    rig.answer(2)
    assert rig.names == ["n0.evil.test", "n1.evil.test", "web.test"]
    assert rig.heard == {"one": [FOUND] * 2, "two": [FOUND]}


def test_a_lookup_that_fails_gives_its_place_back() -> None:
    rig = Rig()

    def fails(name: str, done: Done) -> None:
        raise ZeroDivisionError

    rig.lookup.resolve = fails  # type: ignore[method-assign]
    for number in range(resolving.MAX_WAITING + 1):
        assert "ZeroDivisionError" in rig.ask(f"n{number}.test")[-1].problem
    assert not rig.resolver._shares and not rig.resolver._asked


def test_one_asker_s_fault_is_its_own() -> None:
    rig = Rig()

    def fails(_: Resolved) -> None:
        raise ZeroDivisionError

    rig.resolver.resolve("web.test", partial(rig.bench.loop.call, fails), "one")
    rig.ask("web.test", "two")
    rig.answer(0)
    assert rig.heard["two"] == [FOUND]
    assert [type(fault) for fault in rig.bench.faults] == [ZeroDivisionError]


def test_the_cache_is_bounded() -> None:
    rig = Rig()
    for number in range(resolving.MAX_CACHED + 10):
        rig.ask(f"n{number}.test")
        rig.answer(-1)
    assert len(rig.resolver._cache) == resolving.MAX_CACHED


@pytest.mark.usefixtures("soon")
def test_the_system_s_threads_are_shared_out(monkeypatch: pytest.MonkeyPatch) -> None:
    """By name: a hostile zone keeps getaddrinfo(3) waiting."""
    release, begun = threading.Event(), []

    def slow(name: str) -> Resolved:
        begun.append(name)
        if "evil" in name:
            release.wait(10)
            raise MemoryError
        return FOUND

    monkeypatch.setattr(resolving, "look_up", slow)
    bench = Bench()
    bench.bare.accept_posts()
    lookup = SystemLookup(bench.bare)
    resolver = Resolver(bench.bare, lookup)
    evil: list[Resolved] = []
    heard: list[Resolved] = []
    try:
        for number in range(20):
            resolver.resolve(f"n{number}.evil.test", evil.append, "one")
        bench.until(lambda: len(evil) == 20)
        monkeypatch.setattr(resolving, "TIMEOUT", 10.0)
        resolver.resolve("web.test", heard.append, "two")
        bench.until(lambda: heard)
        assert heard == [FOUND]
        assert sorted(begun) == ["n0.evil.test", "n1.evil.test", "web.test"]
        release.set()
        bench.until(lambda: not resolver._asked and not resolver._shares)
    finally:
        release.set()
        lookup.close()


def test_the_system_is_asked_for_the_whole_name(monkeypatch: pytest.MonkeyPatch) -> None:
    asked = []

    def getaddrinfo(name: str, *_: object, **__: object) -> list[object]:
        asked.append(name)
        return [(socket.AF_INET, 1, 6, "", ("203.0.113.80", 0)), (socket.AF_INET6, 1, 6, "", ("fe80::1%lo", 0, 0, 1))]

    monkeypatch.setattr(socket, "getaddrinfo", getaddrinfo)
    assert look_up("web.test").addresses == (WEB, b"\xfe\x80" + bytes(13) + b"\x01")
    assert asked == ["web.test."]


def test_servers_as_they_are_written() -> None:
    assert server_of("203.0.113.53") == ("203.0.113.53", 53)
    assert server_of("203.0.113.53:5353") == ("203.0.113.53", 5353)
    assert server_of("2001:db8::53") == ("2001:db8::53", 53)
    assert server_of("[2001:db8::53]:5353") == ("2001:db8::53", 5353)


# ---- servers ----

Answer = Callable[[dns.message.Message], list[bytes]]


class Server:
    """A name server on loopback that says what the test wants; served between the rounds of the bench."""

    def __init__(self, bench: Bench, answer: Answer) -> None:
        self._socket = socket.socket(socket.AF_INET, socket.SOCK_DGRAM)
        self._socket.bind(("127.0.0.1", 0))
        self._socket.setblocking(False)
        self._answer = answer
        self.asked = 0
        bench.bare.add_reader(self._socket.fileno(), self._serve)

    @property
    def address(self) -> str:
        return f"127.0.0.1:{self._socket.getsockname()[1]}"

    def _serve(self) -> None:
        data, sender = self._socket.recvfrom(4096)
        self.asked += 1
        for reply in self._answer(dns.message.from_wire(data)):
            self._socket.sendto(reply, sender)

    def close(self) -> None:
        self._socket.close()


@pytest.fixture
def bench() -> Bench:
    return Bench()


@pytest.fixture
def ask(bench: Bench, monkeypatch: pytest.MonkeyPatch) -> Iterator[Callable[..., Resolved]]:
    monkeypatch.setattr("corral.gateway.stub.PATIENCE", 0.2)
    servers: list[Server] = []

    def ask_them(*answers: Answer) -> Resolved:
        servers.extend(Server(bench, answer) for answer in answers)
        heard: list[Resolved] = []
        StubLookup(bench.bare, tuple(server.address for server in servers)).resolve("web.test", heard.append)
        bench.until(lambda: heard)
        return heard[0]

    yield ask_them
    for server in servers:
        server.close()


def good(query: dns.message.Message, address: str = "203.0.113.80", name: str = "web.test.") -> dns.message.Message:
    response = dns.message.make_response(query)
    if query.question[0].rdtype == 1:
        response.answer.append(dns.rrset.from_text(name, 30, "IN", "A", address))
    return response


def test_an_answer(ask: Callable[..., Resolved]) -> None:
    assert ask(lambda query: [good(query).to_wire()]) == Resolved((WEB,), 30.0)


def test_an_alias_is_followed(ask: Callable[..., Resolved]) -> None:
    def answer(query: dns.message.Message) -> list[bytes]:
        response = good(query, name="real.test.")
        response.answer.insert(0, dns.rrset.from_text("web.test.", 7, "IN", "CNAME", "real.test."))
        return [response.to_wire()]

    assert ask(answer) == Resolved((WEB,), 7.0)


def test_what_does_not_fit_is_not_believed(ask: Callable[..., Resolved]) -> None:
    """RFC 5452: another id, another question, records for somebody else, garbage; then the right one."""

    def answer(query: dns.message.Message) -> list[bytes]:
        wrong_id = good(query, "203.0.113.66")
        wrong_id.id ^= 1
        other = dns.message.make_query("evil.test.", query.question[0].rdtype, id=query.id)
        wrong_question = dns.message.make_response(other)
        stray = good(query)
        stray.additional.append(dns.rrset.from_text("bank.test.", 30, "IN", "A", "203.0.113.66"))
        return [b"", b"garbage", wrong_id.to_wire(), wrong_question.to_wire(), stray.to_wire()]

    assert ask(answer) == Resolved((WEB,), 30.0)


def test_what_the_parser_does_not_survive_is_garbage(
    ask: Callable[..., Resolved], monkeypatch: pytest.MonkeyPatch
) -> None:
    honest = dns.message.from_wire

    def from_wire(data: bytes, **options: Any) -> dns.message.Message:
        if data == b"deadly":
            raise RecursionError
        return honest(data, **options)

    monkeypatch.setattr(dns.message, "from_wire", from_wire)
    assert ask(lambda query: [b"deadly", good(query).to_wire()]) == FOUND


def test_the_next_server_is_asked(ask: Callable[..., Resolved]) -> None:
    def fails(query: dns.message.Message) -> list[bytes]:
        response = dns.message.make_response(query)
        response.set_rcode(dns.rcode.SERVFAIL)
        return [response.to_wire()]

    assert ask(fails, lambda query: [], lambda query: [good(query).to_wire()]).addresses == (WEB,)


def test_nobody_answers(ask: Callable[..., Resolved]) -> None:
    found = ask(lambda query: [])
    assert found.addresses == () and "no resolver of the policy answers" in found.problem


def test_an_endless_alias_ends(ask: Callable[..., Resolved]) -> None:
    def answer(query: dns.message.Message) -> list[bytes]:
        response = dns.message.make_response(query)
        response.answer.append(dns.rrset.from_text("web.test.", 7, "IN", "CNAME", "web.test."))
        return [response.to_wire()]

    assert ask(answer).addresses == ()
