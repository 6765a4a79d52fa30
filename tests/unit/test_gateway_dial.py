"""Dialling: nothing without leave, one address after the other, a proxy that is believed no more than it must be."""

from __future__ import annotations

import socket
import threading
from collections.abc import Callable
from contextlib import suppress

from corral.gateway.dial import Dial, interleaved
from tests.unit.gateway_bench import Bench

LOOPBACK = b"\x7f\0\0\1"
CLOSED = b"\x7f\0\0\2"


class Outcome:
    def __init__(self) -> None:
        self.calls: list[tuple[socket.socket | None, bytes, str]] = []

    def __call__(self, sock: socket.socket | None, address: bytes, problem: str) -> None:
        self.calls.append((sock, address, problem))

    def came(self) -> bool:
        return bool(self.calls)


def yes(address: bytes, answered: Callable[[bool], None]) -> None:
    answered(True)


def test_families_take_turns() -> None:
    a, b, c, x = b"1" * 16, b"2" * 16, b"3" * 16, b"4444"
    assert interleaved([a, b, c, x]) == (a, x, b, c)
    assert interleaved([x, a, b]) == (x, a, b)
    assert interleaved([]) == ()


def test_the_address_that_answers_is_used() -> None:
    bench, outcome = Bench(), Outcome()
    with socket.create_server(("127.0.0.1", 0)) as server:
        port = server.getsockname()[1]
        Dial(bench.loop, [CLOSED, LOOPBACK], port, yes, outcome, timeout=5).start()
        bench.until(lambda: outcome.calls)
        [(sock, address, problem)] = outcome.calls
        assert (address, problem) == (LOOPBACK, "")
        assert sock is not None and sock.getpeername() == ("127.0.0.1", port)
        sock.close()


def test_what_is_refused_is_not_dialled() -> None:
    bench, outcome = Bench(), Outcome()
    with socket.create_server(("127.0.0.1", 0)) as server:
        server.setblocking(False)

        def no(address: bytes, answered: Callable[[bool], None]) -> None:
            answered(False)

        Dial(bench.loop, [LOOPBACK, LOOPBACK], server.getsockname()[1], no, outcome, timeout=5).start()
        assert outcome.calls == [(None, b"", "refused")]
        try:
            server.accept()
            raise AssertionError("somebody was dialled")
        except BlockingIOError:
            pass


def test_while_it_is_held_nothing_is_dialled_and_the_time_runs() -> None:
    bench, outcome = Bench(), Outcome()
    held: list[Callable[[bool], None]] = []
    with socket.create_server(("127.0.0.1", 0)) as server:
        server.setblocking(False)
        port = server.getsockname()[1]
        dial = Dial(bench.loop, [LOOPBACK], port, lambda _, answered: held.append(answered), outcome, timeout=0.1)
        dial.start()
        bench.until(lambda: outcome.calls)
        assert outcome.calls == [(None, b"", "no answer in time")]
        held[0](True)  # too late
        bench.rounds(0.05)
        assert len(outcome.calls) == 1
        try:
            server.accept()
            raise AssertionError("somebody was dialled")
        except BlockingIOError:
            pass


def test_cancelled_is_silent() -> None:
    bench, outcome = Bench(), Outcome()
    with socket.create_server(("127.0.0.1", 0)) as server:
        held: list[Callable[[bool], None]] = []
        port = server.getsockname()[1]
        dial = Dial(bench.loop, [LOOPBACK], port, lambda _, answered: held.append(answered), outcome, timeout=5)
        dial.start()
        dial.cancel()
        held[0](True)
        bench.rounds(0.05)
    assert outcome.calls == []


def proxy(answer: list[bytes], seen: list[bytes]) -> socket.socket:
    """A proxy on loopback that reads one head and answers in pieces."""
    server = socket.create_server(("127.0.0.1", 0))

    def serve() -> None:
        connection, _ = server.accept()
        with connection:
            head = b""
            while b"\r\n\r\n" not in head:
                head += connection.recv(4096)
            seen.append(head)
            for piece in answer:
                connection.sendall(piece)
                threading.Event().wait(0.02)
            connection.settimeout(5)
            with suppress(OSError):
                connection.recv(1)

    threading.Thread(target=serve, daemon=True).start()
    return server


def test_a_proxy_is_given_the_address_that_was_decided() -> None:
    bench, outcome = Bench(), Outcome()
    seen: list[bytes] = []
    with proxy([b"HTTP/1.1 200 OK\r", b"\n\r", b"\nSSH-2.0-server\r\n"], seen) as server:
        target = b"\xcb\0\x71\x50"
        Dial(bench.loop, [target], 443, yes, outcome, timeout=5, proxy=server.getsockname()).start()
        bench.until(lambda: outcome.calls)
    [(sock, address, problem)] = outcome.calls
    assert (address, problem) == (target, "")
    assert seen[0].startswith(b"CONNECT 203.0.113.80:443 HTTP/1.1\r\n")
    assert sock is not None
    sock.setblocking(True)
    assert sock.recv(15) == b"SSH-2.0-server\r"  # what is the server's was left
    sock.close()


def test_a_proxy_that_refuses_or_floods_is_no_connection() -> None:
    for answer in ([b"HTTP/1.1 403 Forbidden\r\n\r\n"], [b"x" * 4096] * 4, [b"SSH-2.0-x\r\n\r\n"], [b""]):
        bench, outcome = Bench(), Outcome()
        with proxy(answer, []) as server:
            Dial(bench.loop, [LOOPBACK], 443, yes, outcome, timeout=0.5, proxy=server.getsockname()).start()
            bench.until(outcome.came)
        assert outcome.calls[0][0] is None
