"""Carrying bytes: all of them, in order, both ways, with ends and resets, and no more than allowed."""

from __future__ import annotations

import contextlib
import gc
import os
import socket

import pytest

from corral.gateway.relay import SMALL, Relay, make_buffer
from corral.gateway.rules import SPENT, Budget
from tests.unit.gateway_bench import Bench, everything, pair


class Line:
    """client - inside | relay | outside - server"""

    def __init__(self, bench: Bench, **options: object) -> None:
        self.client, self.inside = pair()
        self.outside, self.server = pair()
        self.ends: list[tuple[str, bool]] = []
        self.relay = Relay(
            bench.loop,
            make_buffer(),
            self.inside,
            self.outside,
            lambda why, broken: self.ends.append((why, broken)),
            **options,  # type: ignore[arg-type]
        )
        self.relay.start()

    def close(self) -> None:
        for sock in (self.client, self.inside, self.outside, self.server):
            sock.close()


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


def test_a_relay_has_no_descriptors_of_its_own_and_keeps_next_to_nothing_for_a_slow_reader() -> None:
    bench = Bench()
    gc.collect()  # what other tests have left
    before = len(os.listdir("/proc/self/fd"))
    line = Line(bench)
    sent = 0
    for _ in range(50):
        bench.rounds(0.01)
        try:
            sent += line.server.send(bytes(1 << 22))
        except BlockingIOError:
            break
    way = line.relay._ways[1]
    assert sent > 1 << 20
    assert way._large
    assert len(way._first) <= SMALL
    assert len(os.listdir("/proc/self/fd")) - before == 4
    assert len(bench.read(line.client, sent)) == sent
    assert line.relay.counts == (0, sent)
    line.close()
    assert len(os.listdir("/proc/self/fd")) == before


@pytest.mark.parametrize("over", [False, True])
def test_a_large_stream_counts_once_however_often_its_reader_stops(over: bool) -> None:
    bench = Bench()
    data = os.urandom(6_000_000)
    budget = Budget(len(data) - over)
    line = Line(bench, budgets=(None, budget), limits=(None, None if over else len(data)))
    left, got = memoryview(data), b""
    while len(got) < len(data) and not line.ends:
        with contextlib.suppress(BlockingIOError):
            left = left[line.server.send(left) :] if left else left
        bench.rounds(0.001)
        with contextlib.suppress(BlockingIOError):
            got += line.client.recv(100_000)
    if over:
        bench.until(lambda: line.ends)
        assert line.ends == [(SPENT, True)]
        assert data.startswith(got + everything(line.client))
    else:
        assert got == data
        assert not line.ends
        line.server.sendall(b"x")
        bench.until(lambda: line.ends)
        assert line.ends == [(f"more than its {len(data)} bytes", True)]
        assert everything(line.client) == b""
    line.close()


def test_urgent_bytes_do_not_confuse_what_was_sent_and_what_is_let_go_of() -> None:
    bench = Bench()
    line = Line(bench)
    sent, got = b"", b""
    for number in range(40):
        piece = bytes([number + 100]) * 200_000
        with contextlib.suppress(BlockingIOError):
            sent += piece[: line.server.send(piece)]
        with contextlib.suppress(BlockingIOError):
            line.server.send(b"!", socket.MSG_OOB)  # TCP has one at a time; those before become part of the stream
        bench.rounds(0.001)
    for _ in range(100):
        bench.rounds(0.001)
        got += everything(line.client)
    assert line.relay._ways[1]._unsent == 0
    assert got.replace(b"!", b"") == sent
    line.close()


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
