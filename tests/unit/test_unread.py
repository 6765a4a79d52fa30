"""How much the supervisor may have lying in Unix sockets."""

from __future__ import annotations

import socket

from corral.supervisor.sockets import Copy
from corral.supervisor.unread import LIMIT, Unread


def test_a_socket_is_counted_as_it_was_last_seen() -> None:
    unread = Unread()
    unread.note(1, 1000)
    unread.note(2, 500)
    unread.note(1, 200)
    assert unread.total == 700
    unread.note(2, 0)
    unread.note(3, 0)
    assert unread.total == 200


def test_beyond_the_limit_nothing_is_admitted_until_something_is_read() -> None:
    unread = Unread()
    count = 0
    while unread.admits(100_000):
        unread.note(count, 200_000)
        count += 1
    assert 0 < unread.total <= LIMIT
    assert not unread.admits(100_000) and not unread.admits(1 << 30)
    for number in range(20):
        unread.note(number, 0)
    assert unread.admits(100_000)


def test_what_the_kernel_says_is_unread() -> None:
    left, right = socket.socketpair()
    with left, right:
        copy = Copy(left.dup().detach())
        try:
            assert copy.unread == 0
            assert copy.cookie == int.from_bytes(left.getsockopt(socket.SOL_SOCKET, 57, 8), "little")
            copy.send(bytes(5000), 0)
            assert 5000 <= copy.unread < 50_000
            right.recv(5000)
            assert copy.unread == 0
        finally:
            copy.close()
