"""The brokers' thread: what is handed to it is served, accounted for once, and ends with its sandbox."""

from __future__ import annotations

import asyncio
import socket
import threading
import time
from collections.abc import Callable, Iterator

import pytest

from corral.actions import Action, Attempt, Decision, Ending, Endpoint, Kind, Origin, Transport, Used, Verdict
from corral.brokers import service as serving
from corral.brokers.http import ERRORS, Answering, Gone, Request
from corral.brokers.service import Brokers, Service
from corral.brokers.setting import Setting
from corral.policy.doors import PORT, Broker
from corral.policy.model import Policy
from tests.unit.gateway_bench import pair

ORIGIN = Origin("box", "session", exec=1)
_ENDPOINT = Endpoint(Transport.TCP, "", PORT, Broker.MODEL.host)
ATTEMPT = Attempt(
    Transport.TCP,
    (b"\x0a\0\0\1", 40000),
    (b"\xc6\x12\1\1", PORT),
    Decision(Action(Kind.NET_CONNECT, _ENDPOINT, ORIGIN), Verdict.ALLOW, "model (broker)", "", "", "policy", 1, 0.0),
)


class Handler:
    """Answers, or waits until it is cancelled and then takes its time to account for that."""

    max_body = 1000

    def __init__(self) -> None:
        self.seen: list[Request] = []
        self.accounted = 0
        self.closed = False

    async def handle(self, request: Request, answer: Answering) -> None:
        assert threading.current_thread().name == "corral-brokers"
        self.seen.append(request)
        if request.path != "/wait":
            await answer.json(200, request.path)
            return
        try:
            await asyncio.sleep(1000)
        finally:
            await asyncio.sleep(0.05)
            self.accounted += 1

    async def close(self) -> None:
        self.closed = True


class Rig:
    def __init__(self, service: Service, opening: Callable[[Setting], Handler] | None = None) -> None:
        self.service, self.handler = service, Handler()
        self.ended: list[str] = []
        nobody = object()
        setting = Setting("box", "session", Policy(), nobody, nobody, (), None, self.ended.append, "")  # type: ignore[arg-type]
        self.brokers: Brokers = service.attach(
            lambda: setting, {Broker.MODEL: opening or (lambda _: self.handler)}, self.ended.append
        )
        self.over: list[tuple[int, int, str]] = []

    def connect(self) -> socket.socket:
        ours, theirs = pair()
        ours.settimeout(10)
        self.brokers.doors[Broker.MODEL].take(theirs, ATTEMPT, lambda *account: self.over.append(account))
        return ours

    def until(self, true: Callable[[], object]) -> None:
        end = time.monotonic() + 10
        while not true():
            assert time.monotonic() < end
            time.sleep(0.005)


@pytest.fixture
def service() -> Iterator[Service]:
    made = Service()
    yield made
    made.loop.call_soon_threadsafe(made.loop.stop)
    made._thread.join(10)
    assert not made._thread.is_alive()


def ask(path: str) -> bytes:
    return f"GET {path} HTTP/1.1\r\nHost: {Broker.MODEL.host}\r\n\r\n".encode()


def test_what_is_handed_over_is_served_with_its_origin_and_accounted_for(service: Service) -> None:
    rig = Rig(service)
    client = rig.connect()
    client.sendall(ask("/a"))
    got = client.recv(4096)
    assert got.startswith(b"HTTP/1.1 200") and got.endswith(b'"/a"')
    assert [request.origin for request in rig.handler.seen] == [ORIGIN]
    client.close()
    rig.until(lambda: rig.over)
    assert rig.over == [(len(ask("/a")), len(got), "closed by its client")]
    service.detach(rig.brokers)
    assert rig.handler.closed and not rig.ended


def test_its_end_cancels_what_is_under_way_and_waits_until_that_has_accounted_for_itself(service: Service) -> None:
    rig, other = Rig(service), Rig(service)
    clients = [rig.connect() for _ in range(5)]
    for client in clients:
        client.sendall(ask("/wait"))
    rig.until(lambda: len(rig.handler.seen) == 5)
    service.detach(rig.brokers)
    assert rig.handler.accounted == 5 and rig.handler.closed
    rig.until(lambda: len(rig.over) == 5)
    for client in clients:
        with pytest.raises(ConnectionError):
            client.recv(10)
        client.close()
    late = rig.connect()
    rig.until(lambda: len(rig.over) == 6)
    assert late.recv(10) == b""
    late.close()
    still = other.connect()
    still.sendall(ask("/b"))
    assert still.recv(4096).endswith(b'"/b"'), "another sandbox is not touched"
    still.close()
    service.detach(other.brokers)


@pytest.mark.parametrize(
    ("ending", "status", "counts"),
    [
        (Ending.ANSWERED, 200, False),
        (Ending.ANSWERED, 404, True),
        (Ending.REFUSED, 0, True),
        (Ending.FAILED, 502, True),
        (Ending.ABANDONED, 0, True),
    ],
)
def test_calls_that_come_to_nothing_are_paced_together(
    service: Service, ending: Ending, status: int, counts: bool
) -> None:
    """Whichever broker's they are, and however they are told to the client (MCP: as an answer)."""
    settings: list[Setting] = []

    def opening(setting: Setting) -> Handler:
        settings.append(setting)
        return Handler()

    rig, other = Rig(service, opening), Rig(service)
    rig.until(lambda: settings)
    for _ in range(2 * ERRORS):
        settings[0].account(Used(ORIGIN, Kind.DATA_QUERY, "s", "select", "", 0.0, 0.0, ending, status=status))
    assert (rig.brokers.room.delay() > 0) is counts and other.brokers.room.delay() == 0
    service.detach(rig.brokers)
    service.detach(other.brokers)


def test_nothing_is_asked_for_a_sandbox_that_has_ended(service: Service) -> None:
    rig = Rig(service)
    door = rig.brokers.doors[Broker.MODEL]
    request = Request("GET", "/late", "", (), b"", ORIGIN)  # of a connection that was about to be served at the end

    def ask() -> None:
        late = asyncio.run_coroutine_threadsafe(door._handle(request, None), service.loop)  # type: ignore[arg-type]
        with pytest.raises(Gone):
            late.result(10)

    rig.until(lambda: door._handler)
    rig.brokers.is_closed = True
    ask()
    rig.brokers.is_closed = False
    service.detach(rig.brokers)
    ask()
    assert not rig.handler.seen


def test_a_broker_that_cannot_be_opened_ends_its_sandbox_only(service: Service) -> None:
    def broken(setting: Setting) -> Handler:
        raise OSError("a secret")

    rig = Rig(service, broken)
    rig.until(lambda: rig.ended)
    assert rig.ended == ["its brokers failed (OSError)"]
    client = rig.connect()
    rig.until(lambda: rig.over)
    assert client.recv(10) == b""
    client.close()
    good = Rig(service)
    client = good.connect()
    client.sendall(ask("/c"))
    assert client.recv(4096).endswith(b'"/c"')
    client.close()


def test_connections_are_bounded(service: Service, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(serving, "MAX_CONNECTIONS", 3)
    rig = Rig(service)
    clients = [rig.connect() for _ in range(4)]
    rig.until(lambda: rig.over)
    assert [reason for _, _, reason in rig.over] == ["its broker has too many connections"]
    for client in clients:
        client.close()
    rig.until(lambda: len(rig.over) == 4)


def test_a_thread_that_is_gone_ends_every_sandbox_that_has_it() -> None:
    gone = Service()
    rig = Rig(gone)
    rig.until(lambda: rig.brokers.doors[Broker.MODEL]._handler)
    gone.loop.call_soon_threadsafe(gone.loop.stop)
    rig.until(lambda: rig.ended)
    assert rig.ended == ["its brokers failed"]
    gone._thread.join(10)
    client = rig.connect()
    rig.until(lambda: rig.over)
    assert client.recv(10) == b""
    client.close()
    gone.detach(rig.brokers)  # returns
