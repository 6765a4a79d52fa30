"""A connection to a broker's name leaves the gateway unread, comes back as an account, and ends with the sandbox."""

from __future__ import annotations

import socket
from dataclasses import replace

import pytest

from corral.actions import Action, Attempt, Decision, Endpoint, Flow, Kind, Origin, Transport, Verdict
from corral.gateway.connection import Connection, Stage
from corral.gateway.doors import Over
from corral.gateway.egress import Egress, Setting
from corral.gateway.relay import make_buffer
from corral.policy.doors import PORT, Broker
from corral.policy.model import Model, ModelApi, Policy, Upstream
from tests.unit.gateway_bench import Bench, pair

LOCAL, TO = (b"\x0a\0\0\1", 40000), (b"\xc6\x12\1\1", PORT)
ORIGIN = Origin("box", "session", exec=1)
POLICY = Policy(model=Model(upstreams=(Upstream("one", "http://127.0.0.1:1/v1", ModelApi.OPENAI),)))


class Taken:
    counts = (3, 4)


class FakeDoor:
    def __init__(self) -> None:
        self.socket: socket.socket | None = None
        self.attempt: Attempt | None = None
        self.over: Over | None = None

    def take(self, sock: socket.socket, attempt: Attempt, over: Over) -> Taken:
        self.socket, self.attempt, self.over = sock, attempt, over
        return Taken()


class Rig:
    def __init__(self, broker: Broker = Broker.MODEL) -> None:
        self.bench, self.door = Bench(), FakeDoor()
        self.bench.bare.accept_posts()
        self.flows: list[Flow] = []
        nobody = object()
        self.egress = Egress(
            Setting(
                "box", "session", POLICY, nobody, (), (), lambda _: None, lambda _: None,  # type: ignore[arg-type]
                accounts=(self,), doors={broker: self.door},
            )
        )  # fmt: skip
        self.egress.start(self.bench.loop, nobody, make_buffer())  # type: ignore[arg-type]
        self.client, inside = pair()
        self.connection = Connection(self.egress, inside, LOCAL, TO)

    def flow(self, flow: Flow) -> None:
        self.flows.append(flow)

    def stage(self) -> Stage:
        return self.connection.stage

    def begin(self, name: str = Broker.MODEL.host, port: int = PORT) -> None:
        action = Action(Kind.NET_CONNECT, Endpoint(Transport.TCP, "", port, name), ORIGIN)
        decision = Decision(action, Verdict.ALLOW, "model (broker)", "", "", "policy", 1, 0.0)
        self.egress.note(Attempt(Transport.TCP, LOCAL, TO, decision))
        self.connection.begin()


def test_it_is_handed_over_unread_with_who_has_made_it() -> None:
    rig = Rig()
    rig.client.sendall(b"POST / HTTP/1.1\r\n")
    rig.begin()
    assert rig.connection.stage is Stage.HANDED_OVER
    door = rig.door
    assert door.socket is not None and door.attempt is not None and door.over is not None
    assert door.attempt.decision.action.origin == ORIGIN
    assert door.socket.recv(100) == b"POST / HTTP/1.1\r\n", "not one byte was taken from it"
    rig.connection.look_after(1e12)  # how long it lasts is its broker's affair
    assert rig.connection.stage is Stage.HANDED_OVER
    [live] = rig.egress.live()
    assert (live.bytes_up, live.bytes_down, live.rule) == (3, 4, "model (broker)")
    door.socket.close()
    door.over(10, 20, "closed by its client")
    rig.bench.until(lambda: rig.flows)
    [flow] = rig.flows
    assert (flow.bytes_up, flow.bytes_down, flow.close) == (10, 20, "closed by its client")
    assert not rig.egress.flows and rig.stage() is Stage.OVER
    rig.client.close()


def test_it_ends_with_the_sandbox_and_what_comes_later_changes_nothing() -> None:
    rig = Rig()
    rig.begin()
    rig.connection.over("the sandbox has ended", broken=True)
    assert rig.door.over is not None and rig.door.socket is not None
    assert rig.door.socket.fileno() >= 0, "the descriptor is the door's"
    rig.door.over(1, 2, "late")
    rig.bench.rounds(0.02)
    assert [flow.close for flow in rig.flows] == ["the sandbox has ended"]
    rig.door.socket.close()
    rig.client.close()


@pytest.mark.parametrize(
    ("name", "port"),
    [("model.corral.internal", 443), ("data.corral.internal", PORT), ("x.model.corral.internal", PORT), ("a.test", 80)],
)
def test_nothing_else_is_handed_over(name: str, port: int) -> None:
    rig = Rig()
    rig.begin(name, port)
    assert rig.door.socket is None and rig.connection.stage is Stage.FIRST
    rig.connection.over("the test is over", broken=True)
    rig.client.close()


def test_only_the_names_of_brokers_that_are_open_have_addresses() -> None:
    rules = Rig().egress.rules
    assert rules.zone(Broker.MODEL.host) == ""
    assert rules.zone(Broker.DATA.host) is None
    assert rules.zone("x.model.corral.internal") is None
    without = Egress(replace(Rig().egress.setting, policy=Policy()))
    assert without.rules.zone(Broker.MODEL.host) is None
