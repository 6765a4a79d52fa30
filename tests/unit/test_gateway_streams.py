"""Streams: all bytes in their order, no more in memory than is said, ends that are told apart, TLS or not."""

from __future__ import annotations

import os
import socket
import ssl
from contextlib import suppress
from functools import lru_cache

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from corral.gateway.authority import Authority
from corral.gateway.relay import reset
from corral.gateway.streams import MANY, MUCH, READ, RECORD, SecureStream, Stream
from tests.unit.gateway_bench import Bench, everything, pair


class Told:
    """What a stream has said."""

    def __init__(self) -> None:
        self.data = b""
        self.ends: list[str] = []
        self.calls = self.drained = self.ready = 0

    def on_bytes(self, data: bytes) -> None:
        self.calls += 1
        self.data += data

    def on_drained(self) -> None:
        self.drained += 1

    def on_ready(self) -> None:
        self.ready += 1


class Line:
    def __init__(self) -> None:
        self.bench, self.told = Bench(), Told()
        self.peer, self.own = pair()
        self.stream = Stream(self.bench.loop, self.own, self.told.on_bytes, self.told.ends.append, self.told.on_drained)

    def close(self) -> None:
        self.stream.close()
        self.stream.close()
        assert not self.bench.bare._readers and not self.bench.bare._writers
        self.peer.close()
        self.own.close()


def flood(stream: Stream) -> int:
    """Writes until nothing is taken any more; how much that was."""
    sent = 0
    while stream.queued < MANY:
        stream.write(b"x" * READ)
        sent += READ
    return sent


def test_nothing_is_read_that_nobody_wants() -> None:
    line = Line()
    line.peer.send(b"early")
    line.bench.rounds(0.05)
    assert line.told.data == b""
    line.stream.want(True)
    line.stream.want(True)
    line.bench.until(lambda: line.told.data == b"early")
    line.stream.want(False)
    line.peer.send(b"late")
    line.bench.rounds(0.05)
    assert line.told.data == b"early" and line.stream.bytes_in == 5
    line.close()


def test_what_is_not_taken_is_kept_and_told_of_once_it_is_short() -> None:
    line = Line()
    sent = flood(line.stream)
    before = line.told.drained
    assert line.stream.queued >= MANY
    line.bench.rounds(0.02)
    assert line.told.drained == before
    got = b""
    while len(got) < sent:
        got += everything(line.peer)
        line.bench.rounds(0.002)
    assert line.told.drained > before
    assert got == b"x" * sent and line.stream.queued == 0 and line.stream.bytes_out == sent
    line.close()


def test_what_is_queued_goes_out_before_the_end() -> None:
    line = Line()
    sent = flood(line.stream)
    line.stream.end()
    got = 0
    while True:
        line.bench.rounds(0.002)
        try:
            data = line.peer.recv(1 << 20)
        except BlockingIOError:
            continue
        if not data:
            break
        got += len(data)
    assert got == sent
    line.peer.send(b"still heard")
    line.stream.want(True)
    line.bench.until(lambda: line.told.data == b"still heard")
    line.close()


def test_an_end_is_told_once_and_does_not_end_what_is_written() -> None:
    line = Line()
    line.stream.want(True)
    line.peer.shutdown(socket.SHUT_WR)
    line.bench.until(lambda: line.told.ends)
    line.stream.want(True)
    line.bench.rounds(0.05)
    assert line.told.ends == [""]
    line.stream.write(b"answer")
    assert everything(line.peer) == b"answer"
    line.close()


def test_a_reset_is_no_end() -> None:
    line = Line()
    line.stream.want(True)
    reset(line.peer)
    line.bench.until(lambda: line.told.ends)
    assert line.told.ends == ["reset"]
    line.stream.write(b"to nobody")
    line.stream.write(b"to nobody")
    assert line.stream.queued == 0 and line.told.ends == ["reset"]
    line.close()


def test_a_reset_while_much_is_queued_is_noticed_by_writing() -> None:
    line = Line()
    flood(line.stream)
    reset(line.peer)
    line.bench.until(lambda: line.told.ends)
    assert line.told.ends == ["reset"] and line.stream.queued == 0
    line.close()


def test_nothing_happens_after_the_close() -> None:
    line = Line()
    line.stream.want(True)
    flood(line.stream)
    line.stream.close()
    line.stream.write(b"x")
    line.stream.end()
    line.stream.want(True)
    line.peer.send(b"x")
    line.bench.rounds(0.05)
    assert line.told.data == b"" and not line.told.ends and line.stream.queued == 0
    line.close()


def test_draining_throws_away_and_waits_for_the_end() -> None:
    line = Line()
    over: list[str] = []
    line.stream.write(b"answer")
    line.stream.end()
    line.stream.drain(over.append)
    for _ in range(5):
        line.peer.send(b"x" * 10_000)
        line.bench.rounds(0.01)
    assert not over and not line.told.data
    assert everything(line.peer) == b"answer"
    line.peer.close()
    line.bench.until(lambda: over)
    assert over[0] in ("", "reset") and len(over) == 1 and not line.told.ends
    line.close()


def test_draining_what_has_ended_is_over_at_once() -> None:
    line = Line()
    line.stream.want(True)
    line.peer.shutdown(socket.SHUT_WR)
    line.bench.until(lambda: line.told.ends)
    over: list[str] = []
    line.stream.drain(over.append)
    assert over == [""]
    line.close()


# ---- TLS ----


@lru_cache(maxsize=1)
def authority() -> Authority:
    return Authority()


@lru_cache(maxsize=1)
def client_context() -> ssl.SSLContext:
    context = ssl.create_default_context()
    context.load_verify_locations(cadata=authority().bundle().decode())
    return context


class Secure(Line):
    """The gateway's side of a client's TLS, and a client of this test's."""

    def __init__(self, *, name: str = "web.test", first: int = 0, server_side: bool = True) -> None:
        super().__init__()
        self._in, self._out = ssl.MemoryBIO(), ssl.MemoryBIO()
        if server_side:
            self.tls = client_context().wrap_bio(self._in, self._out, server_hostname=name)
        else:
            self.tls = authority().leaf(name).wrap_bio(self._in, self._out, server_side=True)
        early = b""
        if first:
            self.step(send=False)
            early = self._out.read(first)
        told, loop = self.told, self.bench.loop
        self.secure = SecureStream(
            loop,
            self.own,
            authority().leaf("web.test") if server_side else client_context(),
            told.on_bytes,
            told.ends.append,
            told.on_drained,
            told.on_ready,
            server_side=server_side,
            name=None if server_side else "web.test",
            first=early,
        )
        self.stream = self.secure

    def step(self, *, send: bool = True) -> None:
        with suppress(ssl.SSLWantReadError):
            self.tls.do_handshake()
        if send:
            self.send()

    def send(self, limit: int = -1) -> None:
        data = self._out.read(limit)
        while data:
            with suppress(BlockingIOError):
                data = data[self.peer.send(data) :]
            if data:
                self.bench.rounds(0.002)

    def receive(self) -> None:
        self.bench.rounds(0.005)
        with suppress(OSError):
            self._in.write(everything(self.peer))

    def shake(self) -> None:
        for _ in range(20):
            self.step()
            self.receive()
            if self.told.ready or self.told.ends:
                break
        self.step()
        self.bench.rounds(0.01)
        self.receive()

    def say(self, data: bytes) -> None:
        self.tls.write(data)
        self.send()
        self.bench.rounds(0.01)

    def read(self, count: int) -> bytes:
        got = b""
        for _ in range(2000):
            with suppress(ssl.SSLWantReadError):
                while data := self.tls.read(1 << 20):
                    got += data
            if len(got) >= count:
                break
            self.receive()
        return got


@pytest.mark.parametrize("first", [0, 1, 40, 1 << 20])
def test_a_handshake_with_what_was_read_before(first: int) -> None:
    line = Secure(first=first)
    line.secure.start()
    line.shake()
    assert line.told.ready == 1 and line.secure.ready and not line.told.ends
    line.say(b"hello")
    line.bench.until(lambda: line.told.data == b"hello")
    line.secure.write(b"world")
    assert line.read(5) == b"world"
    line.close()


def test_what_is_written_before_the_handshake_waits_and_counts() -> None:
    """Else a server that never finishes its handshake could have any amount of a request kept for it."""
    line = Secure(server_side=False)
    line.secure.start()
    line.secure.write(b"GET / ")
    line.secure.write(b"x" * MANY)
    assert line.secure.queued >= MANY + 6
    left: list[int] = []
    line.secure._on_ready = lambda: left.append(line.secure.queued)
    line.told.ready = 0
    for _ in range(20):
        line.step()
        line.receive()
        if left:
            break
    assert left[0] < MANY or line.secure.queued
    assert line.read(MANY + 6) == b"GET / " + b"x" * MANY
    line.bench.rounds(0.01)
    assert line.secure.queued == 0
    line.close()


def test_a_server_that_shows_another_certificate_gets_nothing() -> None:
    line = Secure(name="evil.test", server_side=False)
    line.secure.start()
    line.secure.write(b"the secret")
    for _ in range(10):
        try:
            line.step()
        except ssl.SSLError:
            line.send()
            break
        line.receive()
    line.bench.rounds(0.02)
    line.receive()
    assert not line.told.ready and len(line.told.ends) == 1
    assert "match" in line.told.ends[0] or "verify" in line.told.ends[0], line.told.ends
    with suppress(ssl.SSLError):
        assert not line.tls.read(100)
    line.close()


@pytest.mark.parametrize(
    "rubbish", [b"GET / HTTP/1.1\r\n\r\n", b"\x16\x03\x01\0\5hello", b"\x15\x03\x03\0\2\2\x28", bytes(100)]
)
def test_what_is_no_tls_ends_it_with_a_reason(rubbish: bytes) -> None:
    line = Secure()
    line.secure.start()
    line.peer.send(rubbish)
    line.bench.until(lambda: line.told.ends)
    assert line.told.ends[0].startswith("TLS: ") and len(line.told.ends) == 1
    line.peer.send(b"more")
    line.bench.rounds(0.02)
    assert len(line.told.ends) == 1 and not line.told.data
    line.close()


def test_a_handshake_that_is_broken_off_says_so() -> None:
    line = Secure()
    line.secure.start()
    line.step()
    line.peer.shutdown(socket.SHUT_WR)
    line.bench.until(lambda: line.told.ends)
    assert line.told.ends == ["the TLS handshake was broken off"]
    line.close()


def test_garbage_after_the_handshake_ends_it_and_is_not_heard() -> None:
    line = Secure()
    line.secure.start()
    line.shake()
    line.say(b"good")
    line.peer.send(b"\x17\x03\x03\0\x20" + bytes(32))
    line.bench.until(lambda: line.told.ends)
    assert line.told.data == b"good" and line.told.ends[0].startswith("TLS: ")
    line.close()


def test_a_clean_end_of_tls() -> None:
    line = Secure()
    line.secure.start()
    line.shake()
    with suppress(ssl.SSLError):
        line.tls.unwrap()
    line.send()
    line.bench.until(lambda: line.told.ends)
    assert line.told.ends == [""]
    line.secure.write(b"answer")
    line.secure.end()
    line.bench.rounds(0.02)
    assert everything(line.peer)
    line.close()


def test_a_client_that_does_not_read_tls_holds_up_itself() -> None:
    line = Secure()
    line.secure.start()
    line.shake()
    sent = flood(line.secure)
    assert line.secure.queued < MANY + 2 * READ
    assert line.read(sent) == b"x" * sent
    assert line.told.drained
    line.close()


def test_much_that_is_there_at_once_is_passed_on_at_once_and_goes_through_tls_in_pieces() -> None:
    line = Secure()
    line.secure.start()
    line.shake()
    line.secure.most = MUCH
    pieces: list[int] = []
    given: list[int] = []

    class Counted:
        """What TLS is given to read."""

        def __init__(self, own: ssl.MemoryBIO) -> None:
            self._own = own

        def write(self, piece: bytes) -> int:
            pieces.append(len(piece))
            given.append(self._own.pending)
            return self._own.write(piece)

    line.secure._in = Counted(line.secure._in)  # type: ignore[assignment]
    data = os.urandom(3 * MUCH // 4)
    line.tls.write(data)
    line.secure._received(line._out.read())
    assert line.told.data == data and line.told.calls == 1
    assert max(pieces) <= READ and max(given) <= RECORD + 256  # the part of a record that is not all there
    assert not line.secure._coming
    line.close()


@settings(max_examples=25, deadline=None)
@given(cuts=st.lists(st.integers(1, 60), max_size=12), pieces=st.lists(st.integers(0, 5000), max_size=4))
def test_wherever_it_is_split_it_is_the_same(cuts: list[int], pieces: list[int]) -> None:
    line = Secure()
    line.secure.start()
    line.step(send=False)
    for cut in cuts:
        line.send(cut)
        line.bench.bare.call_later(0.0005, lambda: None)
        line.bench.bare._round()
    line.send()
    line.shake()
    assert line.told.ready
    data = b""
    for size in pieces:
        data += (piece := os.urandom(size))
        if piece:
            line.say(piece)
    line.bench.until(lambda: len(line.told.data) >= len(data))
    assert line.told.data == data and not line.told.ends
    line.close()


@settings(max_examples=40, deadline=None)
@given(data=st.binary(max_size=300), ready=st.booleans(), end=st.sampled_from(["shut", "reset", ""]))
def test_whatever_comes_is_an_end_or_nothing(data: bytes, ready: bool, end: str) -> None:
    line = Secure()
    line.secure.start()
    if ready:
        line.shake()
    line.secure.write(b"answer")
    with suppress(OSError):
        line.peer.send(data)
        if end == "shut":
            line.peer.shutdown(socket.SHUT_WR)
        elif end == "reset":
            reset(line.peer)
    line.bench.rounds(0.01)
    assert len(line.told.ends) <= 1 and not line.told.data
    if end:
        line.bench.until(lambda: line.told.ends)
    line.secure.end()
    line.close()
