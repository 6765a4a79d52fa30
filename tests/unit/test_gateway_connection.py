"""One connection, stage by stage: whatever its client does, it ends once, is accounted for, and holds nothing."""

from __future__ import annotations

import gc
import socket
import time
import weakref
from collections.abc import Callable
from contextlib import suppress
from dataclasses import replace
from functools import partial

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from corral.actions import Action, Attempt, Decision, Endpoint, Flow, Kind, Opinion, Origin, Transport, Verdict
from corral.gateway import connection as connecting
from corral.gateway.connection import AT_ONCE, Connection, Stage
from corral.gateway.egress import Egress, Setting
from corral.gateway.recognise import MAX_FIRST, recognise
from corral.gateway.relay import make_buffer, reset
from corral.gateway.resolver import Resolved
from corral.policy.model import FlowLimits, Network, NetworkRule, Permit, Policy
from tests.unit.gateway_bench import Bench, everything, pair
from tests.unit.hellos import body, hello, message, records, signatures, versions

LOOPBACK = b"\x7f\0\0\1"
LOCAL, TO = (b"\x0a\0\0\1", 40000), (b"\xc6\x12\1\1", 443)
"""Whoever connects, and the address that stands for web.test."""
ORIGIN = Origin("box", "session", exec=1)
HELLO = hello(name=b"web.test")
NAMELESS = records(message(body([versions(0x0304), signatures(0x0403)])))
REQUEST = b"GET / HTTP/1.1\r\nHost: web.test\r\n\r\n"
RULE = NetworkRule(name="web.test")


class Held:
    """A question that waits."""

    def __init__(self, answer: Callable[[Verdict], None]) -> None:
        self.answer, self.withdrawn = answer, False

    def withdraw(self) -> None:
        self.withdrawn = True


class Judge:
    """A monitor that says what the test wants. ``None`` holds."""

    def __init__(self) -> None:
        self.verdicts: dict[Kind, Verdict | None] = {}
        self.protected = True
        """Whether addresses that are protected are allowed all the same."""
        self.rule = "network.allow[0]"
        self.private = False
        self.seen: list[tuple[Action, Opinion | None]] = []
        self.held: list[Held] = []

    def submit(
        self,
        action: Action,
        decided: Callable[[Decision], None],
        *,
        own: Opinion | None = None,
        following: Decision | None = None,
    ) -> Held | None:
        self.seen.append((action, own))
        verdict = self.verdicts.get(action.kind, Verdict.ALLOW)
        if own is not None:
            verdict = own.verdict
        elif isinstance(action.subject, Endpoint) and action.subject.protected and not self.protected:
            verdict = Verdict.DENY
        if verdict is None:
            self.held.append(Held(lambda answer: decided(self.decision(action, answer))))
            return self.held[-1]
        decided(self.decision(action, verdict, own))
        return None

    def decision(self, action: Action, verdict: Verdict, own: Opinion | None = None) -> Decision:
        rule, reason = (self.rule, "It is so.") if own is None else (own.rule, own.reason)
        return Decision(action, verdict, rule, reason, "", "policy", 1, 0.0, self.private)

    def refusals(self) -> list[Opinion]:
        return [own for _, own in self.seen if own is not None]


class Lookup:
    """The host's resolver."""

    def __init__(self, *addresses: bytes) -> None:
        self.addresses = addresses
        self.waiting: list[Callable[[Resolved], None]] | None = None

    def resolve(self, name: str, done: Callable[[Resolved], None], owner: object) -> None:
        if self.waiting is not None:
            self.waiting.append(done)
        else:
            done(Resolved(self.addresses, 0.0, "" if self.addresses else "it has no address"))


class Rig:
    """A client, and the gateway's side of its connection."""

    def __init__(self, *rules: NetworkRule, known: bool = True, to: tuple[bytes, int] = TO) -> None:
        self.bench, self.judge, self.lookup = Bench(), Judge(), Lookup(LOOPBACK)
        self.bench.bare.accept_posts()
        self.flows: list[Flow] = []
        self.settle: list[Callable[[], None]] = []
        self.ended: list[str] = []
        policy = Policy(network=Network(allow=rules or (RULE,)))
        self.egress = Egress(
            Setting(
                "box",
                "session",
                policy,
                self.judge,  # type: ignore[arg-type]
                (),
                (),
                self.ended.append,
                self.settle.append,
                accounts=(self,),
            )
        )
        self.egress.start(self.bench.loop, self.lookup, make_buffer())  # type: ignore[arg-type]
        self.server: socket.socket | None = None
        self.client, inside = pair()
        self.connection = Connection(self.egress, inside, LOCAL, to)
        if known:
            self.note(to)

    def flow(self, flow: Flow) -> None:
        self.flows.append(flow)

    def note(self, to: tuple[bytes, int] = TO, port: int | None = None) -> None:
        port = to[1] if port is None else port
        name = "web.test" if to == TO else None
        subject = Endpoint(Transport.TCP, "" if name else "192.0.2.1", port, name)
        action = Action(Kind.NET_CONNECT, subject, ORIGIN)
        decision = Decision(action, Verdict.ALLOW, "network.allow[0]", "", "", "policy", 1, 0.0)
        self.egress.note(Attempt(Transport.TCP, LOCAL, to, decision))

    def listen(self) -> None:
        """There is a server, and the destination's port is its."""
        self.server = socket.create_server(("127.0.0.1", 0))
        self.server.settimeout(5)
        self.egress.attempts.take(LOCAL, TO)
        self.note(port=self.server.getsockname()[1])

    def accept(self) -> socket.socket:
        assert self.server is not None
        self.bench.until(lambda: self.connection.stage in (Stage.RELAYING, Stage.EXCHANGING, Stage.OVER))
        self.bench.rounds(0.02)
        peer, _ = self.server.accept()
        peer.setblocking(False)
        return peer

    def say(self, data: bytes) -> None:
        self.client.sendall(data)
        self.bench.rounds(0.02)

    def heard(self) -> bytes | str:
        """What the client hears up to the end, or ``reset``."""
        found = b""
        end = time.monotonic() + 5
        while time.monotonic() < end:
            self.bench.rounds(0.005)
            try:
                data = self.client.recv(1 << 16)
            except BlockingIOError:
                continue
            except ConnectionError:
                return "reset"
            if not data:
                return found
            found += data
        return f"still open, after {found!r}"

    def over(self) -> Flow:
        """The account of it, of which there is one; nothing is left of the connection."""
        [flow] = self.flows
        connection = self.connection
        assert connection.stage is Stage.OVER
        assert not self.egress.flows
        assert connection.socket.fileno() == -1
        assert not +self.egress.rules.flows
        assert not self.listening(), "somebody still listens"
        assert all(timer.cancelled or timer.callback.__name__ != "_run" for _, _, timer in self.bench.bare._timers)
        connection.over("again", broken=True)
        connection.over("and again", broken=False)
        assert len(self.flows) == 1 and not self.bench.faults and not self.ended
        assert not +self.egress.rules.flows
        return flow

    def listening(self) -> set[int]:
        return {*self.bench.bare._readers, *self.bench.bare._writers} - {self.bench.bare._post_fd}

    def late(self) -> None:
        for call in self.settle:
            call()
        self.settle.clear()
        self.bench.rounds(0.02)

    def wait(self, seconds: float) -> None:
        """So much time passes for it."""
        self.connection.look_after(time.monotonic() + seconds)

    @property
    def stage(self) -> Stage:
        return self.connection.stage

    def close(self) -> None:
        self.connection.over("the test is over", broken=True)
        self.client.close()
        if self.server is not None:
            self.server.close()
        self.bench.bare.close()


# ---- who ----


def test_whoever_is_noted_late_is_known_all_the_same() -> None:
    rig = Rig(known=False)
    rig.connection.begin()
    assert rig.stage.name == "WHO"
    rig.note()
    rig.late()
    assert rig.stage is Stage.FIRST
    assert rig.connection.flow().origin == ORIGIN
    rig.close()


def test_whoever_nobody_has_noted_is_refused_and_recorded() -> None:
    rig = Rig(known=False)
    rig.connection.begin()
    rig.late()
    assert rig.heard() == "reset"
    [own] = rig.judge.refusals()
    assert (own.rule, own.verdict) == ("gateway.origin", Verdict.DENY)
    flow = rig.over()
    assert flow.origin == Origin("box", "session")
    assert flow.close == "refused by gateway.origin"
    rig.close()


def test_an_attempt_counts_once() -> None:
    rig = Rig()
    rig.connection.begin()
    client, inside = pair()
    second = Connection(rig.egress, inside, LOCAL, TO)
    second.begin()
    rig.late()
    assert second.stage is Stage.OVER
    client.close()
    rig.close()


def test_an_attempt_at_another_place_is_not_this_one() -> None:
    rig = Rig(known=False)
    rig.note((TO[0], TO[1] + 1))
    rig.connection.begin()
    rig.late()
    assert rig.heard() == "reset"
    rig.over()
    rig.close()


def test_a_supervisor_that_never_settles_is_not_waited_for() -> None:
    rig = Rig(known=False)
    rig.connection.begin()
    rig.wait(connecting.FIRST_BYTES - 1)
    assert rig.stage is Stage.WHO
    rig.wait(connecting.FIRST_BYTES + 1)
    assert rig.heard() == "reset"
    assert rig.over().close == "nothing was said in time"
    rig.note()
    rig.late()  # too late
    rig.close()


# ---- first bytes ----


@pytest.mark.parametrize("said", [b"", b"\x16\x03\x01", REQUEST[:10]])
def test_whoever_does_not_finish_its_first_words_is_cut_off(said: bytes) -> None:
    rig = Rig()
    rig.connection.begin()
    rig.say(said)
    rig.wait(connecting.FIRST_BYTES + 1)
    assert rig.heard() == "reset"
    flow = rig.over()
    assert (flow.close, flow.rule, flow.bytes_up) == ("nothing was said in time", "", 0)
    assert not [action for action, _ in rig.judge.seen]
    rig.close()


def ended_or_on(rig: Rig) -> bool:
    return rig.stage in (Stage.OVER, Stage.REFUSING, Stage.EXCHANGING)


def test_an_early_end_is_a_refusal_or_nothing() -> None:
    for said in (b"", HELLO[:20], REQUEST[:12]):
        rig = Rig()
        rig.connection.begin()
        rig.client.sendall(said)
        rig.client.shutdown(socket.SHUT_WR)
        rig.bench.until(partial(ended_or_on, rig))
        rig.close()
        assert len(rig.flows) == 1


def test_a_reset_ends_it() -> None:
    rig = Rig()
    rig.connection.begin()
    reset(rig.client)
    rig.bench.until(lambda: rig.stage is Stage.OVER)
    assert rig.over().close == "reset"
    rig.close()


def test_single_bytes_are_looked_at_ever_more_seldom(monkeypatch: pytest.MonkeyPatch) -> None:
    """Each look begins with the first byte: a client must not get a long one for each byte that it sends."""
    looks = 0

    def counted(data: bytes, *, ended: bool = False) -> object:
        nonlocal looks
        looks += 1
        return recognise(data, ended=ended)

    monkeypatch.setattr(connecting, "recognise", counted)
    rig = Rig()
    rig.connection.begin()
    # In records of one byte each, the dearest hello.
    pieces = b"".join(b"\x16\x03\x01\0\1" + bytes((byte,)) for byte in b"\x01\0\x20\0\x03\x03" + bytes(8000))
    end = time.monotonic() + 0.5
    sent = 0
    while time.monotonic() < end:
        rig.client.send(pieces[sent : sent + 1])
        sent += 1
        rig.bench.bare.call_later(0.0005, lambda: None)
        rig.bench.bare._round()
    assert looks < min(sent, AT_ONCE + 60)
    rig.wait(connecting.FIRST_BYTES + 1)
    assert rig.heard() == "reset"
    rig.over()
    rig.close()


def test_a_hello_in_single_bytes_is_understood() -> None:
    rig = Rig()
    rig.listen()
    rig.connection.begin()
    for byte in HELLO:
        rig.client.send(bytes((byte,)))
        rig.bench.bare.call_later(0.0005, lambda: None)
        rig.bench.bare._round()
    peer = rig.accept()
    rig.bench.rounds(0.05)
    assert everything(peer) == HELLO
    peer.close()
    rig.close()


@pytest.mark.parametrize("stage", ["silence", "bytes"])
def test_a_server_that_speaks_first(stage: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(connecting, "SERVER_FIRST", 0.1)
    rig = Rig(NetworkRule(name="web.test", protocol="tcp"))
    rig.listen()
    rig.connection.begin()
    if stage == "bytes":
        rig.say(b"GET / HTT")
        peer = rig.accept()
        assert everything(peer) == b"GET / HTT"  # no protocol yet
        rig.say(REQUEST[9:])
        assert rig.over().close.startswith("it became something else")
        with pytest.raises(ConnectionResetError):
            everything(peer)
        peer.close()
    else:
        peer = rig.accept()
        peer.send(b"220 hello\r\n")
        rig.bench.rounds(0.05)
        assert everything(rig.client) == b"220 hello\r\n"
        assert rig.connection.flow().endpoint.protocol == "tcp"
        peer.close()
    rig.close()


def test_no_rule_no_server_first(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(connecting, "SERVER_FIRST", 0.05)
    rig = Rig()
    rig.connection.begin()
    rig.bench.rounds(0.2)
    assert rig.stage is Stage.FIRST
    rig.close()


def test_the_most_that_is_read_before_anything_is_decided() -> None:
    rig = Rig()
    rig.connection.begin()
    rig.judge.verdicts[Kind.NET_CONNECT] = Verdict.DENY
    start = b"GET / HTTP/1.1\r\nHost: web.test\r\n"
    with suppress(OSError):
        rig.client.sendall(start + b"x: " + b"a" * (4 * MAX_FIRST))
    rig.bench.until(lambda: rig.stage in (Stage.REFUSING, Stage.OVER))
    assert len(rig.connection._first) <= MAX_FIRST
    rig.close()


# ---- refusals ----


@pytest.mark.parametrize(
    ("said", "heard"),
    [
        (REQUEST, b"HTTP/1.1 403 "),
        (b"CONNECT evil.example:443 HTTP/1.1\r\nHost: evil.example:443\r\n\r\n", b"HTTP/1.1 403 "),
        (HELLO, bytes((21, 3, 3, 0, 2, 2, 49))),
        (b"SSH-2.0-x\r\n", "reset"),
        (b"\x05\x01\x00", "reset"),
        (b"no protocol\n" * 4, "reset"),
    ],
)
def test_a_refusal_is_in_the_clients_own_words(said: bytes, heard: bytes | str) -> None:
    rig = Rig()
    rig.connection.begin()
    rig.judge.verdicts[Kind.NET_CONNECT] = Verdict.DENY
    rig.client.sendall(said)
    if heard == "reset":
        assert rig.heard() == "reset"
    else:
        rig.bench.until(lambda: rig.stage is Stage.REFUSING)
        rig.client.shutdown(socket.SHUT_WR)
        found = rig.heard()
        assert isinstance(found, bytes) and isinstance(heard, bytes) and found.startswith(heard)
        assert (b"x-corral-reason: It is so." in found) == (b"HTTP" in found)
    flow = rig.over()
    assert flow.close == "refused by network.allow[0]"
    assert (flow.bytes_up, flow.bytes_down, flow.rule, flow.endpoint.address) == (0, 0, "", "")
    rig.close()


def test_a_private_refusal_gives_no_reason() -> None:
    rig = Rig()
    rig.connection.begin()
    rig.judge.verdicts[Kind.NET_CONNECT], rig.judge.private = Verdict.DENY, True
    rig.client.sendall(REQUEST)
    rig.client.shutdown(socket.SHUT_WR)
    found = rig.heard()
    assert isinstance(found, bytes) and b"403" in found and b"It is so" not in found
    rig.close()


def test_a_refused_client_that_sends_on_and_on_is_not_heard_for_long() -> None:
    rig = Rig()
    rig.connection.begin()
    rig.judge.verdicts[Kind.NET_CONNECT] = Verdict.DENY
    rig.client.sendall(REQUEST)
    for _ in range(20):
        with suppress(BlockingIOError):
            rig.client.send(b"x" * 100_000)
        rig.bench.rounds(0.01)
    assert rig.stage is Stage.REFUSING
    rig.wait(connecting.LINGER + 0.1)
    assert rig.over().close == "refused by network.allow[0]"
    rig.close()


@pytest.mark.parametrize(
    ("rule", "said", "why"),
    [
        (RULE, hello(name=b"evil.example"), "names evil.example, not web.test"),
        (RULE, NAMELESS, "does not name its server"),
        (RULE, hello((0xFE0D, bytes(40)), name=b"web.test"), "hides the name"),
        (RULE, b"\x16\x03\x01\0\5\x01\0\0\1\0", "no proper tls"),
    ],
)
def test_a_hello_that_is_not_true(rule: NetworkRule, said: bytes, why: str) -> None:
    rig = Rig(rule)
    rig.listen()
    rig.connection.begin()
    rig.client.sendall(said)
    rig.bench.until(lambda: rig.stage in (Stage.REFUSING, Stage.OVER))
    assert any(why in own.reason for own in rig.judge.refusals()), rig.judge.refusals()
    assert rig.server is not None
    rig.server.settimeout(0.05)
    with pytest.raises(TimeoutError):
        rig.server.accept()
    rig.close()
    assert len(rig.flows) == 1


@pytest.mark.parametrize(
    ("permit", "said"),
    [
        (Permit.NO_SNI, NAMELESS),
        (Permit.ECH, hello((0xFE0D, bytes(40)), name=b"web.test")),
    ],
)
def test_what_a_rule_permits(permit: Permit, said: bytes) -> None:
    rig = Rig(replace(RULE, permit=(permit,)))
    rig.listen()
    rig.connection.begin()
    rig.client.sendall(said)
    peer = rig.accept()
    rig.bench.rounds(0.05)
    assert everything(peer) == said
    peer.close()
    rig.close()


def test_a_rule_that_says_nothing_of_flows_lets_none_through() -> None:
    rig = Rig(NetworkRule(name="another.test"))
    rig.connection.begin()
    rig.client.sendall(HELLO)
    rig.bench.until(lambda: rig.stage is Stage.REFUSING)
    assert [own.rule for own in rig.judge.refusals()] == ["gateway.rule"]
    rig.close()


def test_no_more_connections_than_the_rule_has() -> None:
    rig = Rig(replace(RULE, limits=FlowLimits(connections=1)))
    rig.listen()
    rig.egress.rules.flows["network.allow[0]"] = 1
    rig.connection.begin()
    rig.client.sendall(HELLO)
    rig.bench.until(lambda: rig.stage is Stage.REFUSING)
    assert [own.rule for own in rig.judge.refusals()] == ["gateway.limits"]
    rig.wait(connecting.LINGER + 1)
    assert rig.egress.rules.flows["network.allow[0]"] == 1  # the other one's
    rig.egress.rules.flows.clear()
    rig.over()
    rig.close()


# ---- held, and reached ----


def test_what_is_held_has_no_time_out_and_is_withdrawn_with_its_connection() -> None:
    rig = Rig()
    rig.judge.verdicts[Kind.NET_CONNECT] = None
    rig.connection.begin()
    rig.say(HELLO)
    assert rig.stage is Stage.DECIDING
    rig.wait(1e6)
    assert rig.stage is Stage.DECIDING
    rig.connection.over("the sandbox ended", broken=True)
    [held] = rig.judge.held
    assert held.withdrawn
    held.answer(Verdict.ALLOW)  # too late
    rig.bench.rounds(0.02)
    rig.over()
    rig.close()


def test_the_address_is_decided_on_and_withdrawn_too() -> None:
    """Also where an address before it was refused at once."""
    rig = Rig()
    rig.lookup.addresses = (LOOPBACK, b"\xcb\0\x71\x50")
    rig.judge.protected = False
    rig.connection.begin()
    rig.judge.verdicts[Kind.NET_CONNECT] = Verdict.ALLOW
    submit = rig.judge.submit

    def asks(action: Action, decided: Callable[[Decision], None], **more: object) -> Held | None:
        subject = action.subject
        asked = isinstance(subject, Endpoint) and subject.address == "203.0.113.80"
        rig.judge.verdicts[Kind.NET_CONNECT] = None if asked else Verdict.ALLOW
        return submit(action, decided, **more)  # type: ignore[arg-type]

    rig.judge.submit = asks  # type: ignore[method-assign]
    rig.say(HELLO)
    assert rig.stage is Stage.REACHING
    [held] = rig.judge.held
    rig.connection.over("its client is gone", broken=True)
    assert held.withdrawn
    held.answer(Verdict.ALLOW)
    rig.bench.rounds(0.02)
    rig.over()
    rig.close()


def test_a_protected_address_is_not_dialled() -> None:
    rig = Rig()
    rig.listen()
    rig.judge.protected = False
    rig.connection.begin()
    rig.client.sendall(HELLO)
    rig.bench.until(lambda: rig.stage is Stage.REFUSING)
    assert rig.server is not None
    rig.server.settimeout(0.05)
    with pytest.raises(TimeoutError):
        rig.server.accept()
    rig.wait(connecting.LINGER + 1)
    flow = rig.over()
    assert flow.endpoint.address == "127.0.0.1" and flow.endpoint.protected
    assert flow.close == "refused by network.allow[0]"
    rig.close()


def test_a_look_up_that_comes_back_too_late_dials_nobody() -> None:
    rig = Rig()
    rig.listen()
    rig.lookup.waiting = []
    rig.connection.begin()
    rig.say(HELLO)
    rig.connection.over("its client is gone", broken=True)
    [done] = rig.lookup.waiting
    done(Resolved((LOOPBACK,), 1.0))
    rig.bench.rounds(0.05)
    assert rig.server is not None
    rig.server.settimeout(0.05)
    with pytest.raises(TimeoutError):
        rig.server.accept()
    rig.over()
    rig.close()


@pytest.mark.parametrize(("said", "heard"), [(HELLO, bytes((21, 3, 3, 0, 2, 2, 49))), (REQUEST, b"HTTP/1.1 502 ")])
def test_what_cannot_be_reached_says_so(said: bytes, heard: bytes) -> None:
    rig = Rig()
    rig.listen()
    rig.lookup.addresses = ()
    rig.connection.begin()
    assert rig.server is not None
    rig.client.sendall(said.replace(b"test\r", f"test:{rig.server.getsockname()[1]}\r".encode()))
    rig.bench.rounds(0.05)
    rig.client.shutdown(socket.SHUT_WR)
    found = rig.heard()
    assert isinstance(found, bytes) and found.startswith(heard), found
    rig.bench.until(lambda: rig.stage is Stage.OVER)
    assert not rig.judge.refusals()  # nobody refused anything
    rig.over()
    rig.close()


def test_an_account_says_what_it_was() -> None:
    rig = Rig()
    rig.listen()
    rig.connection.begin()
    before = time.time()
    rig.client.sendall(HELLO)
    peer = rig.accept()
    peer.send(b"answer")
    rig.bench.rounds(0.05)
    live = rig.connection.flow()
    assert (live.bytes_up, live.bytes_down, live.close) == (len(HELLO), 6, "")
    [seen] = rig.egress.live()
    assert replace(live, seconds=seen.seconds) == seen
    rig.client.shutdown(socket.SHUT_WR)
    rig.bench.rounds(0.05)
    assert rig.stage is Stage.RELAYING  # half a connection is one
    everything(peer)
    peer.close()
    rig.bench.until(lambda: rig.flows)
    flow = rig.over()
    assert (flow.bytes_up, flow.bytes_down, flow.close) == (len(HELLO), 6, "closed")
    assert (flow.packets_up, flow.packets_down) == (1, 1)
    assert (flow.tls_name, flow.endpoint.name, flow.endpoint.protocol) == ("web.test", "web.test", "tls")
    assert flow.endpoint.address == "127.0.0.1"
    assert flow.ja4.startswith("t1") and flow.rule == "network.allow[0]"
    assert flow.origin == ORIGIN and not flow.intercepted
    assert before - 1 <= flow.started <= time.time() and 0 < flow.seconds < 10
    rig.close()


@pytest.mark.parametrize("direction", ["up", "down"])
def test_no_more_bytes_than_the_rule_has(direction: str) -> None:
    rig = Rig(replace(RULE, limits=FlowLimits(**{direction: 1000})))
    rig.listen()
    rig.connection.begin()
    rig.client.sendall(HELLO)
    peer = rig.accept()
    everything(peer)
    (rig.client if direction == "up" else peer).sendall(b"x" * 2000)
    rig.bench.until(lambda: rig.flows)
    assert "more than" in rig.over().close
    got = b""
    with suppress(OSError):
        got = everything(peer if direction == "up" else rig.client)
    assert len(got) <= 1000
    peer.close()
    rig.close()


def test_a_flow_on_which_nothing_moves_is_cut() -> None:
    rig = Rig(replace(RULE, limits=FlowLimits(idle=50.0)))
    rig.listen()
    rig.connection.begin()
    rig.client.sendall(HELLO)
    peer = rig.accept()
    rig.wait(0)
    rig.wait(49)
    assert rig.stage is Stage.RELAYING
    peer.send(b"x")
    rig.bench.rounds(0.02)
    rig.wait(60)  # which finds that something has moved, whenever that was
    assert rig.stage is Stage.RELAYING
    rig.wait(60 + 51)
    assert rig.over().close == "nothing moved for too long"
    assert rig.heard() == "reset"
    peer.close()
    rig.close()


# ---- DNS ----


def test_questions_over_tcp_are_bounded_and_have_no_account_as_flows() -> None:
    to = (b"\xc6\x12\0\x35", 53)
    rig = Rig(to=to)
    rig.connection.begin()
    assert rig.stage.name == "QUESTIONS"
    rig.say(b"\xff\xff" + b"x" * 5000)
    assert rig.stage is Stage.OVER
    assert not rig.flows
    rig.close()


class Full(socket.socket):
    """One whose other end takes nothing any more."""

    def send(self, *_: object) -> int:
        raise BlockingIOError


def test_who_does_not_read_its_answers_gets_no_more() -> None:
    to = (b"\xc6\x12\0\x35", 53)
    rig = Rig(to=to)
    rig.connection.begin()
    question = b"\0\1\1\0\0\1\0\0\0\0\0\0" + b"\3web\4test\0\0\1\0\1"
    framed = len(question).to_bytes(2, "big") + question
    rig.say(framed)
    assert everything(rig.client)[2:4] == b"\0\1"
    rig.connection.socket = Full(fileno=rig.connection.socket.detach())
    rig.say(framed)
    assert rig.stage is Stage.OVER
    rig.close()


def test_no_more_questions_on_one_connection_than_are_expected() -> None:
    rig = Rig(to=(b"\xc6\x12\0\x35", 53))
    rig.connection.begin()
    question = b"\0\1\1\0\0\1\0\0\0\0\0\0" + b"\3web\4test\0\0\1\0\1"
    framed = len(question).to_bytes(2, "big") + question
    for _ in range(1030):
        with suppress(OSError):
            rig.client.send(framed)
            rig.client.recv(4096)
        rig.bench.bare.call_later(0.0005, lambda: None)
        rig.bench.bare._round()
    assert rig.stage is Stage.OVER
    assert len(rig.judge.seen) == 1024
    rig.close()


def dns_rig() -> tuple[Rig, bytes]:
    rig = Rig(to=(b"\xc6\x12\0\x35", 53))
    rig.connection.begin()
    question = b"\0\1\1\0\0\1\0\0\0\0\0\0" + b"\3web\4test\0\0\1\0\1"
    return rig, len(question).to_bytes(2, "big") + question


def test_a_piece_of_a_question_gives_no_more_time() -> None:
    rig, framed = dns_rig()
    deadline = rig.connection._deadline
    for byte in framed[:10]:
        rig.say(bytes((byte,)))
    assert rig.connection._deadline == deadline
    rig.say(framed[10:])
    assert rig.connection._deadline is not None and deadline is not None and rig.connection._deadline > deadline
    rig.close()


def test_questions_that_are_held_end_with_their_connection() -> None:
    rig, framed = dns_rig()
    rig.judge.verdicts[Kind.NET_RESOLVE] = None
    rig.say(framed * 2)
    first, second = rig.judge.held
    first.answer(Verdict.ALLOW)
    rig.connection.over("closed", broken=False)
    assert second.withdrawn and not first.withdrawn
    rig.close()


def test_only_so_many_questions_of_one_connection_are_held() -> None:
    rig, framed = dns_rig()
    rig.judge.verdicts[Kind.NET_RESOLVE] = None
    rig.say(framed * 100)
    assert rig.stage is Stage.OVER
    assert len(rig.judge.held) == 16 and all(held.withdrawn for held in rig.judge.held)
    rig.close()


# ---- the end ----


@pytest.mark.parametrize("fault", ["_outward", "_relay", "_exchange", "account"])
def test_what_goes_wrong_at_the_end_leaves_no_socket(fault: str, monkeypatch: pytest.MonkeyPatch) -> None:
    rig = Rig()
    rig.listen()
    rig.connection.begin()
    rig.client.sendall(HELLO)
    peer = rig.accept()

    class Broken:
        def __getattr__(self, name: str) -> object:
            raise RuntimeError("a fault of ours")

    if fault == "account":
        monkeypatch.setattr(Connection, "flow", lambda *_: 1 / 0)
    else:
        monkeypatch.setattr(rig.connection, fault, Broken())
    outside = rig.connection._outside
    with pytest.raises((RuntimeError, ZeroDivisionError)):
        rig.connection.over("the end", broken=True)
    assert rig.connection.socket.fileno() == -1
    assert outside is not None and outside.fileno() == -1
    assert not rig.egress.flows and not +rig.egress.rules.flows
    assert not rig.listening()
    peer.close()
    rig.close()


@pytest.mark.parametrize("dialled", [True, False])
def test_what_is_over_is_gone_without_a_search_for_rings(dialled: bool) -> None:
    """Else the collector of garbage has the gateway's thread look at all that the process has, again and again."""
    rig = Rig()
    if dialled:
        rig.listen()
    gc.collect()
    gc.disable()
    try:
        rig.connection.begin()
        rig.say(HELLO)
        if dialled:
            rig.accept().close()
        rig.client.close()
        rig.bench.until(lambda: rig.stage is Stage.OVER)
        left = weakref.ref(rig.connection)
        del rig.connection
        rig.bench.rounds(0.01)
        assert left() is None
    finally:
        gc.enable()
        if rig.server is not None:
            rig.server.close()
        rig.bench.bare.close()


def test_an_account_that_cannot_be_written_ends_the_sandbox() -> None:
    rig = Rig()

    def broken(flow: Flow) -> None:
        raise OSError("disk full")

    rig.flow = broken  # type: ignore[method-assign]
    rig.connection.begin()
    rig.connection.over("the end", broken=True)
    [reason] = rig.ended
    assert "OSError" in reason
    assert rig.connection.socket.fileno() == -1
    rig.client.close()


STEPS = st.one_of(
    st.binary(max_size=40),
    st.sampled_from([HELLO, HELLO[:30], HELLO[30:], REQUEST, REQUEST[:9], REQUEST[9:], b"SSH-2.0-x\r\n", b"\r\n"]),
    st.sampled_from(["end", "reset", "tick", "later", "answer", "no", "resolved"]),
)


@settings(max_examples=150, deadline=None)
@given(steps=st.lists(STEPS, max_size=8), holds=st.booleans(), slow=st.booleans(), known=st.booleans())
def test_whatever_comes_in_whatever_order_it_ends(
    steps: list[bytes | str], holds: bool, slow: bool, known: bool
) -> None:
    rig = Rig(known=known)
    if known:
        rig.listen()
    if holds:
        rig.judge.verdicts[Kind.NET_CONNECT] = None
    if slow:
        rig.lookup.waiting = []
    rig.connection.begin()
    for step in steps:
        with suppress(OSError):
            match step:
                case bytes():
                    rig.client.send(step)
                case "end":
                    rig.client.shutdown(socket.SHUT_WR)
                case "reset":
                    reset(rig.client)
                case "tick":
                    rig.wait(connecting.FIRST_BYTES + 1)
                case "later":
                    rig.late()
                case "answer" | "no":
                    for held in rig.judge.held:
                        if not held.withdrawn:
                            held.answer(Verdict.ALLOW if step == "answer" else Verdict.DENY)
                    rig.judge.held.clear()
                case "resolved":
                    for done in rig.lookup.waiting or ():
                        done(Resolved((LOOPBACK,), 1.0))
                    rig.lookup.waiting = [] if slow else None
        rig.bench.rounds(0.002)
    rig.connection.over("the test is over", broken=True)
    rig.over()
    rig.close()
