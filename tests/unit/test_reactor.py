"""The small loop of `corral run` does what the sandbox's core expects of any reactor."""

from __future__ import annotations

import os
import signal
import socket
import threading
import time
import weakref
from collections.abc import Callable, Iterator
from contextlib import suppress
from functools import partial

import pytest

from corral.reactor import Loop, Timer


@pytest.fixture
def loop() -> Iterator[Loop]:
    made = Loop()
    yield made
    made.close()


@pytest.fixture
def pipe() -> Iterator[tuple[int, int]]:
    reader, writer = os.pipe()
    yield reader, writer
    for fd in (reader, writer):
        with suppress(OSError):  # a test has closed it
            os.close(fd)


def steps(*calls: Callable[[], object]) -> Callable[[], None]:
    """A callback that makes each of the calls."""

    def run() -> None:
        for call in calls:
            call()

    return run


def test_a_reader_is_called_as_long_as_there_is_something_to_read(loop: Loop, pipe: tuple[int, int]) -> None:
    os.write(pipe[1], b"abc")
    seen: list[bytes] = []

    def readable(size: int) -> None:
        seen.append(os.read(pipe[0], size))
        if len(seen) == 3:
            loop.stop()

    loop.add_reader(pipe[0], readable, 1)
    loop.run()
    assert seen == [b"a", b"b", b"c"]


def test_the_end_of_a_pipe_is_readable(loop: Loop, pipe: tuple[int, int]) -> None:
    os.close(pipe[1])
    loop.add_reader(pipe[0], loop.stop)
    loop.run()
    assert os.read(pipe[0], 1) == b""


def test_a_writer_is_called_once_there_is_room(loop: Loop, pipe: tuple[int, int]) -> None:
    os.set_blocking(pipe[1], False)
    with pytest.raises(BlockingIOError):
        while True:
            os.write(pipe[1], b"x" * 65536)
    order: list[str] = []
    loop.add_writer(pipe[1], steps(lambda: order.append("writable"), lambda: loop.stop()))
    loop.call_later(0.02, steps(lambda: order.append("drain"), lambda: os.read(pipe[0], 1 << 20)))
    loop.run()
    assert order == ["drain", "writable"]


def test_a_broken_pipe_wakes_its_writer(loop: Loop, pipe: tuple[int, int]) -> None:
    os.close(pipe[0])
    loop.add_writer(pipe[1], loop.stop)
    loop.run()
    with pytest.raises(BrokenPipeError):
        os.write(pipe[1], b"x")


def test_reader_and_writer_of_one_descriptor_are_two_things(loop: Loop) -> None:
    ours, theirs = socket.socketpair()
    with ours, theirs:
        seen: list[str] = []
        loop.add_reader(ours.fileno(), steps(lambda: seen.append("read"), lambda: loop.stop()))
        loop.add_writer(ours.fileno(), steps(lambda: seen.append("write"), lambda: loop.remove_writer(ours.fileno())))
        loop.call_later(0.02, theirs.send, b"x")
        loop.run()
        assert seen == ["write", "read"]
        assert not loop.remove_writer(ours.fileno())
        assert loop.remove_reader(ours.fileno())
        assert not loop.remove_reader(ours.fileno())


def test_what_a_callback_removes_is_not_called_in_the_same_round(loop: Loop) -> None:
    pairs = [os.pipe() for _ in range(8)]
    called: list[int] = []

    def readable(fd: int) -> None:
        called.append(fd)
        for reader, _ in pairs:
            loop.remove_reader(reader)
        loop.stop()

    for reader, writer in pairs:
        os.write(writer, b"x")
        loop.add_reader(reader, readable, reader)
    loop.run()
    assert len(called) == 1
    for reader, writer in pairs:
        os.close(reader)
        os.close(writer)


def test_a_reader_can_be_replaced_and_a_number_reused(loop: Loop, pipe: tuple[int, int]) -> None:
    os.write(pipe[1], b"x")
    loop.add_reader(pipe[0], pytest.fail, "the replaced callback was called")
    loop.add_reader(pipe[0], loop.stop)
    loop.run()
    loop.remove_reader(pipe[0])
    other = os.pipe()
    os.dup2(other[0], pipe[0])  # the same number, another file
    os.write(other[1], b"y")
    seen: list[bytes] = []
    loop.add_reader(pipe[0], steps(lambda: seen.append(os.read(pipe[0], 9)), lambda: loop.stop()))
    loop.run()
    assert seen == [b"y"]
    os.close(other[0])
    os.close(other[1])


def test_removing_a_closed_descriptor_is_no_error(loop: Loop) -> None:
    reader, writer = os.pipe()
    loop.add_reader(reader, pytest.fail)
    os.close(reader)
    os.close(writer)
    assert loop.remove_reader(reader)


def test_timers_run_in_the_order_in_which_they_are_due(loop: Loop) -> None:
    order: list[str] = []
    loop.call_later(0.03, order.append, "third")
    loop.call_later(0.01, order.append, "first")
    loop.call_later(0.02, order.append, "second")
    loop.call_later(0.04, loop.stop)
    started = time.monotonic()
    loop.run()
    assert order == ["first", "second", "third"]
    assert time.monotonic() - started >= 0.04


def test_timers_due_together_run_in_the_order_in_which_they_were_set(loop: Loop) -> None:
    order: list[int] = []
    for number in range(50):
        loop.call_later(0, order.append, number)
    loop.call_later(0.001, loop.stop)
    loop.run()
    assert order == list(range(50))


def test_a_cancelled_timer_does_not_run_even_when_cancelled_in_its_own_round(loop: Loop) -> None:
    later = loop.call_later(0, pytest.fail, "cancelled timer ran")
    later.cancel()
    victims: list[Timer] = []
    loop.call_later(0, lambda: victims[0].cancel())
    victims.append(loop.call_later(0, pytest.fail, "cancelled timer ran"))
    loop.call_later(0.01, loop.stop)
    loop.run()


def test_a_cancelled_timer_does_not_wake_the_loop_early(loop: Loop, pipe: tuple[int, int]) -> None:
    rounds: list[float] = []
    loop.call_later(0.01, pytest.fail).cancel()
    loop.call_later(0.05, steps(lambda: rounds.append(time.monotonic()), lambda: loop.stop()))
    started = time.monotonic()
    loop.run()
    assert rounds[0] - started >= 0.05


def test_a_timer_that_sets_itself_again_does_not_starve_descriptors(loop: Loop, pipe: tuple[int, int]) -> None:
    spins = 0

    def again() -> None:
        nonlocal spins
        spins += 1
        assert spins < 10_000, "the reader was never called"
        loop.call_later(0, again)

    os.write(pipe[1], b"x")
    loop.call_later(0, again)
    loop.add_reader(pipe[0], loop.stop)
    loop.run()


def test_a_loop_can_be_run_again_after_it_was_stopped(loop: Loop) -> None:
    seen: list[int] = []
    for number in range(3):
        loop.call_later(0, steps(partial(seen.append, number), loop.stop))
        loop.run()
    assert seen == [0, 1, 2]


def test_an_error_of_a_callback_leaves_the_loop_usable(loop: Loop) -> None:
    loop.call_later(0, lambda: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        loop.run()
    loop.call_later(0, loop.stop)
    loop.run()


def test_a_signal_is_an_event_also_where_it_interrupts_no_wait(loop: Loop) -> None:
    """Python notes a signal that comes just before epoll_wait(2), and then sleeps. A second thread's wait is like that
    one: no signal of the first interrupts it."""
    before = signal.signal(signal.SIGUSR1, lambda *_: loop.stop())
    try:
        loop.heed_signals()
        runner = threading.Thread(target=loop.run, daemon=True)
        runner.start()
        time.sleep(0.05)  # it sleeps by now; where it does not, the test shows less
        signal.pthread_kill(threading.main_thread().ident or 0, signal.SIGUSR1)
        runner.join(10)
        assert not runner.is_alive()
    finally:
        signal.signal(signal.SIGUSR1, before)


def test_a_timer_that_was_cancelled_keeps_nothing(loop: Loop) -> None:
    """It stays in the heap until it would have been due; what it was for must not."""

    class Owner:
        def due(self) -> None: ...

    owner = Owner()
    there = weakref.ref(owner)
    loop.call_later(3600, owner.due).cancel()
    loop.call_later(3600, print, owner).cancel()
    del owner
    assert there() is None
