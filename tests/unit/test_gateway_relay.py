"""Carrying bytes: all of them, in order, both ways, with ends and resets, and no more than allowed."""

from __future__ import annotations

import gc
import os
import socket

import pytest

from corral.gateway.relay import Pipes, Relay
from corral.gateway.rules import SPENT, Budget
from tests.unit.gateway_bench import Bench, everything, pair


class Line:
    """client - inside | relay | outside - server"""

    def __init__(self, bench: Bench, **options: object) -> None:
        self.client, self.inside = pair()
        self.outside, self.server = pair()
        self.ends: list[tuple[str, bool]] = []
        self.pipes = Pipes()
        self.relay = Relay(
            bench.loop,
            self.pipes,
            self.inside,
            self.outside,
            lambda why, broken: self.ends.append((why, broken)),
            **options,  # type: ignore[arg-type]
        )
        self.relay.start()

    def close(self) -> None:
        for sock in (self.client, self.inside, self.outside, self.server):
            sock.close()
        self.pipes.close()


class Words:
    """A look that refuses a word."""

    def __init__(self, forbidden: bytes, after: int = 1 << 30) -> None:
        self.seen, self._forbidden, self._after = b"", forbidden, after

    @property
    def done(self) -> bool:
        return len(self.seen) >= self._after

    def feed(self, data: bytes) -> str:
        self.seen += data
        return "it was said" if self._forbidden in self.seen else ""


@pytest.mark.parametrize("looked_at", [False, True])
def test_all_bytes_both_ways_while_readers_are_slow(looked_at: bool) -> None:
    bench = Bench()
    looks = (Words(b"never said"), Words(b"never said")) if looked_at else (None, None)
    line = Line(bench, looks=looks)
    up, down = os.urandom(3_000_000), os.urandom(2_000_000)
    left_up, left_down, got_up, got_down = memoryview(up), memoryview(down), b"", b""
    while len(got_up) < len(up) or len(got_down) < len(down):
        for end, left in ((line.client, left_up), (line.server, left_down)):
            try:
                sent = end.send(left[:700_000])
            except BlockingIOError:
                sent = 0
            if end is line.client:
                left_up = left_up[sent:]
            else:
                left_down = left_down[sent:]
        bench.rounds(0.01)
        got_up += everything(line.server)
        got_down += everything(line.client)
    assert (got_up, got_down) == (up, down)
    assert line.relay.counts == (len(up), len(down))
    assert not line.ends
    line.close()


def test_what_was_read_before_comes_first_and_counts() -> None:
    bench = Bench()
    line = Line(bench, first=b"hello ")
    line.client.sendall(b"world")
    got = bench.read(line.server, 11)
    assert got == b"hello world"
    assert line.relay.counts == (11, 0)
    line.close()


def test_half_close_is_passed_on_and_the_other_half_goes_on() -> None:
    bench = Bench()
    line = Line(bench)
    line.client.sendall(b"question")
    line.client.shutdown(socket.SHUT_WR)
    assert bench.read(line.server, 8) == b"question"
    bench.rounds(0.05)
    assert line.server.recv(1) == b""
    assert not line.ends
    line.server.sendall(b"answer")
    assert bench.read(line.client, 6) == b"answer"
    line.server.close()
    bench.until(lambda: line.ends)
    assert line.ends == [("closed", False)]
    line.close()


def test_a_reset_ends_it_as_one() -> None:
    bench = Bench()
    line = Line(bench)
    line.server.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, b"\1\0\0\0\0\0\0\0")
    line.server.close()
    bench.until(lambda: line.ends)
    assert line.ends == [("reset", True)]
    line.close()


def test_not_a_byte_more_than_the_limit() -> None:
    bench = Bench()
    line = Line(bench, limits=(1000, None))
    line.client.sendall(bytes(5000))
    bench.until(lambda: line.ends)
    assert line.ends == [("more than its 1000 bytes", True)]
    assert len(everything(line.server)) <= 1000
    line.close()


def test_the_limit_itself_is_allowed() -> None:
    bench = Bench()
    line = Line(bench, limits=(1000, None))
    line.client.sendall(bytes(1000))
    assert bench.read(line.server, 1000) == bytes(1000)
    bench.rounds(0.05)
    assert not line.ends
    line.close()


def test_what_a_look_refuses_is_not_passed_on() -> None:
    bench = Bench()
    line = Line(bench, looks=(Words(b"tunnel"), None))
    line.client.sendall(b"fine")
    assert bench.read(line.server, 4) == b"fine"
    line.client.sendall(b"tunnel")
    bench.until(lambda: line.ends)
    assert line.ends == [("it was said", True)]
    assert everything(line.server) == b""
    line.close()


def test_a_look_that_has_seen_enough_lets_the_kernel_carry_the_rest() -> None:
    bench = Bench()
    look = Words(b"tunnel", after=4)
    line = Line(bench, looks=(look, None))
    line.client.sendall(b"fine")
    assert bench.read(line.server, 4) == b"fine"
    line.client.sendall(b"tunnel")
    assert bench.read(line.server, 6) == b"tunnel"
    assert look.seen == b"fine"
    line.close()


def test_no_pipe_is_kept_while_nothing_moves() -> None:
    bench = Bench()
    gc.collect()  # what other tests have left
    before = len(os.listdir("/proc/self/fd"))
    lines = [Line(bench) for _ in range(10)]
    for line in lines:
        line.client.sendall(b"x")
    for line in lines:
        assert bench.read(line.server, 1) == b"x"
    assert len(os.listdir("/proc/self/fd")) - before <= 10 * 6  # four sockets and one empty pipe, at most
    for line in lines:
        assert line.relay._ways[0]._pipe is None
        line.close()
    assert len(os.listdir("/proc/self/fd")) == before


def test_flows_of_one_rule_share_what_it_has_for_the_session() -> None:
    bench = Bench()
    budget = Budget(1000)
    first, second = Line(bench, budgets=(budget, None)), Line(bench, budgets=(budget, None))
    first.client.sendall(bytes(700))
    assert bench.read(first.server, 700) == bytes(700)
    second.client.sendall(bytes(301))
    bench.until(lambda: second.ends)
    assert second.ends == [(SPENT, True)]
    assert everything(second.server) == b""
    first.server.sendall(bytes(2000))  # the way back has no bound
    assert len(bench.read(first.client, 2000)) == 2000
    first.close()
    second.close()
