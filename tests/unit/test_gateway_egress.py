"""The way out of one sandbox: what leaves the host for a name is bounded, and its refusals and accounts are kept."""

from __future__ import annotations

import socket
import threading
import time
from collections.abc import Callable
from contextlib import ExitStack
from dataclasses import replace

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from corral.actions import Action, Attempt, Decision, Endpoint, Kind, Opinion, Origin, Subject, Transport, Verdict
from corral.gateway import egress as ways_out
from corral.gateway.egress import Egress, Setting
from corral.gateway.queries import AT_ONCE
from corral.gateway.relay import make_buffer
from corral.gateway.resolver import Resolved
from corral.gateway.sockets import IP_PKTINFO, place_of
from corral.gateway.tunnelling import AGAIN_BUDGET
from corral.monitor.steps import Execs
from corral.policy.model import Network, NetworkRule, Policy
from tests.unit.gateway_bench import Bench

WEB = Resolved((b"\xcb\0\x71\x50",), 30.0)
GONE = Resolved((), 0.0, "it has no address")


class Lookup:
    def __init__(self) -> None:
        self.asked: list[str] = []
        self.answer = WEB

    def resolve(self, name: str, done: Callable[[Resolved], None], owner: object) -> None:
        self.asked.append(name)
        done(self.answer)


class Judge:
    def __init__(self) -> None:
        self.seen: list[tuple[Action, Opinion | None]] = []
        self.waiting: list[Callable[[], None]] = []

    def submit(
        self,
        action: Action,
        decided: Callable[[Decision], None],
        *,
        own: Opinion | None = None,
        following: Decision | None = None,
    ) -> None:
        self.seen.append((action, own))
        verdict, rule = (Verdict.ALLOW, "r") if own is None else (own.verdict, own.rule)
        self.waiting.append(lambda: decided(Decision(action, verdict, rule, "", "", "policy", 1, 0.0)))


class Rig:
    def __init__(self, monkeypatch: pytest.MonkeyPatch | None = None) -> None:
        self.now = 1000.0
        if monkeypatch is not None:
            monkeypatch.setattr(time, "monotonic", lambda: self.now)
        self.bench, self.lookup, self.judge = Bench(), Lookup(), Judge()
        self.bench.bare.accept_posts()
        self.ended: list[str] = []
        network = Network(allow=(NetworkRule(name="web.test"), NetworkRule(name="*.wild.test")))
        self.egress = Egress(
            Setting(
                "box",
                "session",
                Policy(network=network),
                self.judge,  # type: ignore[arg-type]
                (),
                (),
                self.ended.append,
                lambda callback: callback(),
                accounts=(),
            )
        )
        self.egress.start(self.bench.loop, self.lookup, make_buffer())  # type: ignore[arg-type]

    def resolve(self, name: str) -> Resolved:
        found: list[Resolved] = []
        self.egress.resolve(name, found.append)
        [one] = found
        return one


def test_each_decision_is_of_the_step_of_its_moment() -> None:
    """A connection is kept for many requests, and was made in the step of the first."""

    class Later(Execs):
        def cause_of(self, origin: Origin, subject: Subject | None = None) -> Origin:
            return replace(origin, step=7, tool=str(subject))

    rig = Rig()
    rig.egress.setting = replace(rig.egress.setting, steps=Later())
    endpoint = Endpoint(Transport.TCP, "", 443, "web.test")
    rig.egress.decide(Kind.NET_CONNECT, endpoint, Origin("box", "session", 1, 1), lambda decision: None)
    [(action, _)] = rig.judge.seen
    assert (action.origin.step, action.origin.exec, action.origin.tool) == (7, 1, "web.test:443")


def test_a_name_that_no_rule_names_is_not_looked_up() -> None:
    rig = Rig()
    for name in ("evil.example", "wild.test", "xweb.test", "a.web.test", ""):
        assert not rig.resolve(name).addresses
    assert not rig.lookup.asked


def test_a_name_in_full_is_looked_up_as_often_as_it_is_wanted() -> None:
    rig = Rig()
    for _ in range(50):
        assert rig.resolve("web.test") == WEB
    assert len(rig.lookup.asked) == 50  # the resolver has a cache of its own


def test_a_name_below_a_wildcard_is_kept() -> None:
    rig = Rig()
    rig.egress.tunnelling.judge("a.wild.test", "*.wild.test")
    for _ in range(50):
        assert rig.resolve("a.wild.test") == WEB
    assert rig.lookup.asked == ["a.wild.test"]


@pytest.mark.parametrize("answer", [WEB, GONE])
def test_what_leaves_for_names_below_a_wildcard_is_bounded(monkeypatch: pytest.MonkeyPatch, answer: Resolved) -> None:
    """Which of some known names is asked for carries data as well, answered or not."""
    rig = Rig(monkeypatch)
    rig.lookup.answer = answer
    names = [f"{letter}.wild.test" for letter in "abcdefgh"]
    for name in names:
        assert rig.egress.tunnelling.judge(name, "*.wild.test") == ""
    for turn in range(20_000):
        rig.now += ways_out.KEPT + 1
        assert rig.resolve(names[turn % len(names)]) == answer
    assert len(rig.lookup.asked) <= AGAIN_BUDGET + len(names)
    assert rig.resolve("web.test") == answer  # other names have no part in it


@settings(max_examples=50, deadline=None)
@given(
    turns=st.lists(
        st.tuples(st.sampled_from(["a.wild.test", "b.wild.test", "web.test", "evil.example"]), st.floats(0, 400)),
        max_size=40,
    )
)
def test_every_question_has_one_answer(turns: list[tuple[str, float]]) -> None:
    rig = Rig()
    for name, _ in turns:
        assert bool(rig.resolve(name).addresses) == (name != "evil.example")
    assert "evil.example" not in rig.lookup.asked


@pytest.mark.parametrize("name", ["web.test", "a.wild.test"])
def test_what_goes_wrong_with_an_answer_is_this_sandbox_s_own_fault(name: str) -> None:
    """Whoever answers serves the other sandboxes as well, and must get away with it."""
    rig, error = Rig(), ZeroDivisionError()

    def fails(_: Resolved) -> None:
        raise error

    rig.egress.resolve(name, fails)
    assert rig.bench.faults == [error]


def test_look_ups_are_charged_to_their_sandbox() -> None:
    rig = Rig()
    owners: list[object] = []
    rig.egress.resolver.resolve = lambda name, done, owner: owners.append(owner)  # type: ignore[method-assign]
    for name in ("web.test", "a.wild.test"):
        rig.egress.resolve(name, lambda _: None)
    assert owners == [rig.egress] * 2


def test_a_decision_of_another_thread_comes_in_ours() -> None:
    rig = Rig()
    threads: list[int] = []
    endpoint = Endpoint(Transport.TCP, name="web.test", port=443)
    origin = Origin("box", "session")
    rig.egress.decide(Kind.NET_CONNECT, endpoint, origin, lambda _: threads.append(threading.get_ident()))
    rig.judge.waiting.pop()()
    assert threads == [threading.get_ident()]
    rig.egress.decide(Kind.NET_CONNECT, endpoint, origin, lambda _: threads.append(threading.get_ident()))
    other = threading.Thread(target=rig.judge.waiting.pop())
    other.start()
    other.join()
    assert len(threads) == 1
    rig.bench.until(lambda: len(threads) == 2)
    assert threads == [threading.get_ident()] * 2


def test_a_query_is_its_sender_s_and_a_flood_waits_its_turn() -> None:
    """Two sockets with the same port on two addresses are two senders."""
    rig = Rig()
    with ExitStack() as stack:
        server, one, other = (stack.enter_context(socket.socket(socket.AF_INET, socket.SOCK_DGRAM)) for _ in range(3))
        server.setsockopt(socket.IPPROTO_IP, IP_PKTINFO, 1)
        server.bind(("127.0.0.1", 0))
        server.setblocking(False)
        one.bind(("127.0.0.1", 0))
        other.bind(("127.0.0.2", one.getsockname()[1]))
        for sock, session in ((one, "one"), (other, "other")):
            action = Action(Kind.NET_SEND, Endpoint(Transport.UDP, "127.0.0.1", 53), Origin("box", session))
            decision = Decision(action, Verdict.ALLOW, "r", "", "", "policy", 1, 0.0)
            local = place_of(sock.getsockname())
            rig.egress.note(Attempt(Transport.UDP, local, (b"\x7f\0\0\1", 53), decision))
        query = b"\0\1\1\0\0\1\0\0\0\0\0\0\3web\4test\0\0\1\0\1"
        for sock in (one, other, *[one] * AT_ONCE):
            sock.sendto(query, server.getsockname())
        rig.egress.queries.serve(server)
        asked = [action.origin.session for action, _ in rig.judge.seen]
        assert asked == ["one", "other", *["one"] * (AT_ONCE - 2)]
        rig.egress.queries.serve(server)
        assert len(rig.judge.seen) == AT_ONCE + 2


def test_our_own_refusals_are_decisions_that_nobody_overrules() -> None:
    rig = Rig()
    rig.egress.refuse(Kind.NET_CONNECT, Endpoint(Transport.TCP, "192.0.2.1", 1), rig.egress.nobody, "gateway.x", "So.")
    [(action, own)] = rig.judge.seen
    assert action.origin == Origin("box", "session")
    assert own is not None and (own.verdict, own.rule, own.reason) == (Verdict.DENY, "gateway.x", "So.")


def test_names_of_one_sandbox_mean_nothing_in_another() -> None:
    one, other = Rig().egress, Rig().egress
    pair = one.names.addresses("web.test")
    assert one.name_of(pair.ipv4) == one.name_of(pair.ipv6) == "web.test"
    assert other.name_of(pair.ipv4) is None and other.name_of(pair.ipv6) is None
    assert other.names.addresses("x.wild.test").ipv4 == pair.ipv4  # the same address, another name
    assert other.name_of(pair.ipv4) == "x.wild.test"
