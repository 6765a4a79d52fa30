"""The deputy's two sides: the layouts, the parser of what the agent has a hand in, and the client's bookkeeping.

The parser runs as it is, under AddressSanitizer and UndefinedBehaviorSanitizer. What the deputy does is tested in
tests/contain/test_deputy.py.
"""

from __future__ import annotations

import errno
import os
import select
import socket
import struct
import subprocess
from collections.abc import Iterator
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from corral.reactor import Loop
from corral.supervisor import deputy, deputy_wire
from corral.supervisor.deputy import MAX_OUTSTANDING, Deputy
from corral.supervisor.deputy_wire import Caller, Operation, Option, PlaceLeft, Reply, decode, encode
from tests.unit.test_wire import LAUNCHER, SANITIZE, c_define, c_enums, compile_c, compiler

__all__ = ["compiler"]  # a fixture

AGENT = Caller(1000, 1000)

# ---- layouts ----


@pytest.mark.parametrize(
    ("mirror", "tag"),
    [(Operation, "deputy_operation"), (Option, "deputy_option"), (PlaceLeft, "deputy_place")],
    ids=["operation", "option", "place"],
)
def test_enums_are_the_same(mirror: type[Operation] | type[Option] | type[PlaceLeft], tag: str) -> None:
    ours = {name: int(member) for name, member in mirror.__members__.items() if name != "NONE"}
    assert ours == {
        name.removeprefix("DEPUTY_").removeprefix("PLACE_"): value for name, value in c_enums("deputy.h")[tag].items()
    }


def test_limits_are_the_same() -> None:
    for name in ("MAX_PATH", "MAX_ADDRESS", "MAX_DATA", "MAX_APART", "MAX_FDS"):
        assert c_define("deputy.h", f"DEPUTY_{name}") == getattr(deputy_wire, name)


def test_structs_have_the_layout_that_python_packs(compiler: str, tmp_path: Path) -> None:
    fields = {
        "deputy_request": "id operation uid gid umask flags mode resolve options path_length second_length "
        "address_length data_length reserved",
        "deputy_reply": "id error value busy path_length",
    }
    prints = "".join(
        f'printf("%zu ", sizeof(struct {name})); '
        + "".join(f'printf("%zu ", offsetof(struct {name}, {field})); ' for field in names.split())
        + 'puts("");'
        for name, names in fields.items()
    )
    source = tmp_path / "layout.c"
    source.write_text(
        f'#include <stddef.h>\n#include <stdio.h>\n#include "deputy.h"\nint main(void) {{ {prints} return 0; }}\n'
    )
    compile_c(compiler, "-Wall", "-Werror", source, "-o", tmp_path / "layout")
    printed = subprocess.run([tmp_path / "layout"], capture_output=True, text=True, check=True).stdout
    request, reply = ([int(number) for number in line.split()] for line in printed.splitlines())
    assert request == [deputy_wire._REQUEST.size, 0, 8, 12, 16, 20, 24, 28, 32, 40, 44, 48, 52, 56, 60]
    assert deputy_wire._REQUEST.format == "<QIIIIIIQIIIIII"
    assert reply == [deputy_wire._REPLY.size, 0, 8, 12, 16, 20]
    assert deputy_wire._REPLY.format == "<QiIII"


# ---- the parser ----

CHECKER = r"""
#include <assert.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include "deputy.h"

int main(void)
{
    static struct deputy_message message;
    static volatile size_t sink;
    uint32_t count, size;
    while (fread(&count, sizeof count, 1, stdin) == 1 && fread(&size, sizeof size, 1, stdin) == 1) {
        uint8_t *data = malloc(size); /* of exactly this size, so that one byte too many is seen */
        if (size > 0 && fread(data, size, 1, stdin) != 1)
            return 1;
        memset(&message, 0xff, sizeof message);
        const char *problem = deputy_parse(&message, data, size, count);
        const struct deputy_request *request = &message.request;
        if (!problem) {
            assert(strlen(message.path) == request->path_length && strlen(message.second) == request->second_length);
            assert(request->address_length <= DEPUTY_MAX_ADDRESS && message.address[request->address_length] == 0);
            assert(request->uid != UINT32_MAX && request->gid != UINT32_MAX && count <= DEPUTY_MAX_FDS);
            for (uint32_t i = 0; i < request->data_length; i++)
                sink += message.data[i];
        }
        printf("%llu %s\n", (unsigned long long)request->id, problem ? problem : "good");
        fflush(stdout);
        free(data);
    }
    return 0;
}
"""


class Checker:
    """The C parser in a process of its own; a fault in it ends it, and then asking raises."""

    def __init__(self, program: Path) -> None:
        self.process = subprocess.Popen([program], stdin=subprocess.PIPE, stdout=subprocess.PIPE, env={})

    def ask(self, content: bytes, count: int) -> str:
        assert self.process.stdin
        assert self.process.stdout
        self.process.stdin.write(struct.pack("=II", count, len(content)) + content)
        self.process.stdin.flush()
        answer = self.process.stdout.readline().decode().rstrip("\n")
        assert answer, "the parser died"
        return answer.partition(" ")[2]


@pytest.fixture(scope="session")
def checker(compiler: str, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Checker]:
    place = tmp_path_factory.mktemp("deputy")
    (place / "checker.c").write_text(CHECKER)
    compile_c(compiler, *SANITIZE, place / "checker.c", LAUNCHER / "deputy_wire.c", "-o", place / "checker")
    found = Checker(place / "checker")
    yield found
    assert found.process.stdin
    assert found.process.stdout
    found.process.stdin.close()
    found.process.stdout.close()
    assert found.process.wait(timeout=30) == 0


PATH_ADDRESS = struct.pack("=H", socket.AF_UNIX) + b"/tmp/socket\0"
NAME_ADDRESS = struct.pack("=H", socket.AF_UNIX) + b"socket"
RELATIVE_ADDRESS = struct.pack("=H", socket.AF_UNIX) + b"tmp/socket"
ABSTRACT = struct.pack("=H", socket.AF_UNIX) + b"\0name\0"
UNNAMED = struct.pack("=H", socket.AF_UNIX)
UNSPECIFIED = struct.pack("=H14x", socket.AF_UNSPEC)
INTERNET = struct.pack("=H14x", socket.AF_INET)

GOOD = [
    (encode(1, Operation.RESOLVE, AGENT, path=b"/a/../b"), 0),
    (encode(1, Operation.RESOLVE, AGENT, path=b"a/b"), 1),
    (encode(1, Operation.RESOLVE, AGENT), 1),
    (encode(1, Operation.OPEN, AGENT, flags=os.O_RDWR), 1),
    (encode(1, Operation.CREATE, AGENT, path=b"name", mode=0o644), 1),
    (encode(1, Operation.RENAME, AGENT, path=b"old", second=b"new", flags=1), 2),
    (encode(1, Operation.LINK, AGENT, path=b"..name"), 2),
    (encode(1, Operation.SYMLINK, AGENT, path=b"name", second=b"/any/../where"), 1),
    (encode(1, Operation.UNLINK, AGENT, path=b"name"), 1),
    (encode(1, Operation.CHMOD, AGENT, mode=0o7777), 1),
    (encode(1, Operation.CONNECT, AGENT), 2),
    (encode(1, Operation.CONNECT, AGENT, address=ABSTRACT), 1),
    (encode(1, Operation.CONNECT, AGENT, address=UNSPECIFIED), 1),
    (encode(1, Operation.BIND, AGENT, address=ABSTRACT), 1),
    (encode(1, Operation.BIND, AGENT, address=UNNAMED), 1),
    (encode(1, Operation.BIND, AGENT, path=b"name"), 2),
    (encode(1, Operation.BIND, AGENT, path=b"socket", address=PATH_ADDRESS), 2),
    (encode(1, Operation.BIND, AGENT, path=b"socket", address=NAME_ADDRESS), 2),
    (encode(1, Operation.BIND, AGENT, path=b"socket", address=RELATIVE_ADDRESS), 3),
    (encode(1, Operation.SEND, AGENT, data=b"data"), 1),
    (encode(1, Operation.SEND, AGENT, data=b"data", address=ABSTRACT), 5),
    (encode(1, Operation.SEND, AGENT, data=b"data", options=Option.TO_OBJECT), 2),
    (encode(1, Operation.SEND, AGENT, options=Option.TO_OBJECT | Option.APART), 250),
    (encode(1, Operation.CANCEL, AGENT), 0),
]

BAD = [
    (encode(1, Operation.RESOLVE, AGENT, path=b"a/b"), 0),
    (encode(1, Operation.RESOLVE, AGENT), 0),
    (encode(1, Operation.RESOLVE, AGENT, path=b"/a\0b"), 0),
    (encode(1, Operation.RESOLVE, AGENT, path=b"/" * 4096), 0),
    (encode(1, Operation.RESOLVE, AGENT, path=b"/"), 2),
    (encode(1, Operation.RESOLVE, AGENT, path=b"/", second=b"x"), 0),
    (encode(1, Operation.RESOLVE, AGENT, path=b"/", data=b"x"), 0),
    (encode(1, Operation.RESOLVE, AGENT, path=b"/", options=Option.APART), 0),
    (encode(1, Operation.RESOLVE, Caller(0xFFFFFFFF, 0), path=b"/"), 0),
    (encode(1, Operation.RESOLVE, Caller(0, 0xFFFFFFFF), path=b"/"), 0),
    (encode(1, Operation.RESOLVE, Caller(0, 0, 0o1777), path=b"/"), 0),
    (encode(1, Operation.OPEN, AGENT), 0),
    (encode(1, Operation.OPEN, AGENT, path=b"x"), 1),
    (encode(1, Operation.CREATE, AGENT, path=b"name", mode=0o100644), 1),
    *((encode(1, Operation.CREATE, AGENT, path=name), 1) for name in (b"", b".", b"..", b"a/b", b"/", b"a\0")),
    (encode(1, Operation.RENAME, AGENT, path=b"old", second=b"../new"), 2),
    (encode(1, Operation.RENAME, AGENT, path=b"old", second=b"new"), 1),
    (encode(1, Operation.UNLINK, AGENT, path=b"a/b"), 1),
    (encode(1, Operation.CONNECT, AGENT, address=PATH_ADDRESS), 1),
    (encode(1, Operation.CONNECT, AGENT, address=ABSTRACT), 2),
    (encode(1, Operation.CONNECT, AGENT, address=UNNAMED), 1),
    (encode(1, Operation.CONNECT, AGENT, address=INTERNET), 1),
    (encode(1, Operation.CONNECT, AGENT, address=b"\1"), 1),
    (encode(1, Operation.CONNECT, AGENT), 1),
    (encode(1, Operation.BIND, AGENT, address=PATH_ADDRESS), 1),
    (encode(1, Operation.BIND, AGENT, address=UNSPECIFIED), 1),
    (encode(1, Operation.BIND, AGENT, path=b"a/b"), 2),
    (encode(1, Operation.BIND, AGENT, path=b"socket", address=ABSTRACT), 2),
    (encode(1, Operation.BIND, AGENT, path=b"socket", address=PATH_ADDRESS), 3),
    (encode(1, Operation.BIND, AGENT, path=b"socket", address=RELATIVE_ADDRESS), 2),
    (encode(1, Operation.BIND, AGENT, path=b"socket"), 3),
    (encode(1, Operation.BIND, AGENT, address=ABSTRACT + bytes(110)), 1),
    (encode(1, Operation.SEND, AGENT, address=PATH_ADDRESS), 1),
    (encode(1, Operation.SEND, AGENT, address=UNSPECIFIED), 1),
    (encode(1, Operation.SEND, AGENT, address=ABSTRACT, options=Option.TO_OBJECT), 2),
    (encode(1, Operation.SEND, AGENT, options=Option.TO_OBJECT | Option.APART), 2),
    (encode(1, Operation.SEND, AGENT, data=b"x", options=Option.APART), 2),
    (encode(1, Operation.SEND, AGENT, data=bytes(32769)), 1),
    (encode(1, Operation.SEND, AGENT), 251),
    (encode(1, Operation.CANCEL, AGENT), 1),
]


@pytest.mark.parametrize(("content", "count"), GOOD)
def test_requests_that_are_right(checker: Checker, content: bytes, count: int) -> None:
    assert checker.ask(content, count) == "good"
    assert checker.ask(content[:-1], count) != "good"
    assert checker.ask(content + b"x", count) != "good"


@pytest.mark.parametrize(("content", "count"), BAD)
def test_requests_that_are_wrong(checker: Checker, content: bytes, count: int) -> None:
    assert checker.ask(content, count) != "good"


@settings(deadline=None, max_examples=500)
@given(st.sampled_from(GOOD), st.lists(st.tuples(st.integers(0, 80), st.binary(max_size=9)), max_size=4), st.data())
def test_damaged_requests_are_read_safely(
    checker: Checker, whole: tuple[bytes, int], damage: list[tuple[int, bytes]], data: st.DataObject
) -> None:
    content = bytearray(whole[0])
    for at, put in damage:
        content[at : at + len(put)] = put
    cut = data.draw(st.integers(0, len(content)))
    assert checker.ask(bytes(content), whole[1])
    assert checker.ask(bytes(content[:cut]), data.draw(st.integers(0, 253)))


# ---- the client ----


class Peer:
    """A client with a test at its other end."""

    def __init__(self) -> None:
        ours, self.socket = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        self.loop = Loop()
        self.lost = 0
        self.deputy = Deputy(ours.detach(), self.loop, self.on_lost)
        self.replies: list[Reply] = []

    def on_lost(self) -> None:
        self.lost += 1

    def ask(self) -> int:
        return self.deputy.resolve(AGENT, "/", self.replies.append)

    def rounds(self) -> None:
        """Whatever is due or ready."""
        self.loop.call_later(0.02, self.loop.stop)
        self.loop.run()

    def answer(self, number: int, error: int = 0, fds: tuple[int, ...] = (), path: bytes = b"") -> None:
        content = struct.pack("<QiIII", number, error, 0, 0, len(path)) + path
        socket.send_fds(self.socket, [content], fds) if fds else self.socket.send(content)

    def close(self) -> None:
        self.deputy.close()
        self.socket.close()
        self.loop.close()


@pytest.fixture
def peer() -> Iterator[Peer]:
    made = Peer()
    yield made
    made.close()


def open_descriptors() -> int:
    return len(os.listdir("/proc/self/fd"))


def test_replies_find_their_requests(peer: Peer) -> None:
    first, second = peer.ask(), peer.ask()
    peer.answer(second, errno.ENOENT)
    peer.answer(first, path=b"/\xff")
    peer.rounds()
    assert peer.replies == [Reply(errno.ENOENT), Reply(0, path="/\udcff")]


def test_no_more_than_so_many_at_once(peer: Peer) -> None:
    for _ in range(MAX_OUTSTANDING):
        peer.ask()
    assert peer.replies == []
    peer.ask()
    assert peer.replies == []  # not from within the request
    peer.rounds()
    assert peer.replies == [Reply(errno.EAGAIN, busy=True)]


def test_requests_wait_for_room_in_order(peer: Peer) -> None:
    before = open_descriptors()
    numbers = []
    with socket.socket() as passed:
        for _ in range(600):
            numbers.append(peer.deputy.send(AGENT, passed.fileno(), bytes(4000), peer.replies.append))
    assert peer.deputy._unsent
    seen: list[int] = []
    while len(seen) < len(numbers):
        while select.select([peer.socket], [], [], 0)[0]:
            data, fds, _, _ = socket.recv_fds(peer.socket, 8192, 1)
            seen.append(struct.unpack_from("<Q", data)[0])
            assert len(fds) == 1
            os.close(fds[0])
        peer.rounds()
    assert seen == numbers
    assert open_descriptors() == before
    assert not peer.lost


@pytest.mark.parametrize("what", ["end", "short", "long", "two descriptors"])
def test_the_end_is_an_answer(peer: Peer, what: str) -> None:
    before = open_descriptors()
    peer.ask()
    peer.ask()
    if what == "end":
        peer.socket.shutdown(socket.SHUT_RDWR)
    elif what == "short":
        peer.socket.send(b"x" * 23)
    elif what == "long":
        peer.socket.send(struct.pack("<QiIII", 1, 0, 0, 0, 0) + b"x")
    else:
        peer.answer(1, fds=(0, 0))
    peer.rounds()
    assert peer.replies == [Reply(errno.EPERM)] * 2
    assert peer.lost == 1
    assert open_descriptors() == before - 1
    peer.ask()
    peer.rounds()
    assert len(peer.replies) == 3
    assert peer.replies[2] == Reply(errno.EPERM)
    assert peer.lost == 1


def test_nobody_is_called_back_for_what_was_cancelled(peer: Peer) -> None:
    before = open_descriptors()
    number = peer.ask()
    peer.deputy.cancel(number)
    peer.deputy.cancel(number)
    assert len(peer.socket.recv(100)) == 65
    assert struct.unpack_from("<QI", peer.socket.recv(100)) == (number, Operation.CANCEL)
    assert not select.select([peer.socket], [], [], 0)[0]
    peer.answer(number, fds=(0,))
    peer.rounds()
    assert peer.replies == []
    assert peer.deputy._outstanding == {}
    assert open_descriptors() == before


def test_what_no_request_can_hold(peer: Peer) -> None:
    ask = peer.replies.append
    peer.deputy.resolve(AGENT, "/" * 4096, ask)
    peer.deputy.connect(AGENT, 0, ask, address=bytes(111))
    peer.deputy.open(AGENT, 0, 1 << 40, ask)
    peer.deputy.open(AGENT, 0, -1, ask)
    peer.deputy.resolve(Caller(-1, 0), "/", ask)
    peer.deputy.send(AGENT, 0, bytes(deputy_wire.MAX_APART + 1), ask)
    peer.deputy.send(AGENT, 0, b"", ask, fds=[0] * 250)
    peer.deputy.open(AGENT, 1 << 20, 0, ask)  # no such descriptor
    peer.rounds()
    assert [reply.errno for reply in peer.replies] == [
        errno.ENAMETOOLONG,
        *[errno.EINVAL] * 4,
        errno.EMSGSIZE,
        *[errno.EPERM] * 2,
    ]
    assert not peer.lost
    assert not select.select([peer.socket], [], [], 0)[0]


def test_more_data_than_a_message_holds_goes_apart(peer: Peer) -> None:
    peer.deputy.send(AGENT, 0, bytes(range(256)) * 1024, peer.replies.append, to=1, fds=[2])
    data, fds, _, _ = socket.recv_fds(peer.socket, 8192, 10)
    try:
        assert len(data) == 64
        assert struct.unpack_from("<I", data, 40) == (Option.TO_OBJECT | Option.APART,)
        assert len(fds) == 4
        assert os.pread(fds[2], 1 << 20, 0) == bytes(range(256)) * 1024
    finally:
        for fd in fds:
            os.close(fd)


def test_reply_that_is_none() -> None:
    assert decode(b"") is None
    assert decode(struct.pack("<QiIII", 1, 0, 0, 0, 2) + b"x") is None
    assert decode(struct.pack("<QiIII", 1, 0, 0, 0, 1) + b"x") == (1, Reply(0, path="x"))


def test_a_socket_whose_place_cannot_be_asked_for_is_not_right() -> None:
    with socket.socket(socket.AF_UNIX) as sock:
        assert not deputy._lies_at(sock.fileno(), -1)
