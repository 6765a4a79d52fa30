"""Messages as callers write them: read from the memory of a real process, which is this one."""

from __future__ import annotations

import array
import ctypes
import os
import socket
import struct
from errno import EFAULT, EINVAL, EMSGSIZE, ENOBUFS, EPERM
from typing import Any, cast

import pytest

from corral.supervisor import memory, messages
from corral.supervisor.call import Call
from corral.supervisor.messages import Control, Credentials

INET, UNIX, NETLINK = int(socket.AF_INET), int(socket.AF_UNIX), int(socket.AF_NETLINK)


class Self:
    """As much of a call as reading needs: the caller is this process."""

    tid = os.getpid()

    def read(self, address: int, length: int) -> bytes:
        return memory.read(self.tid, address, length)


CALL = cast(Call, Self())
BAD = 1


def buffer(content: bytes) -> Any:
    return ctypes.create_string_buffer(content, max(1, len(content)))


class Built:
    """A ``struct msghdr`` in memory."""

    def __init__(self, *parts: bytes, name: bytes = b"", control: bytes = b"", **changes: int) -> None:
        self.kept = [buffer(part) for part in parts]
        pairs = zip(self.kept, parts, strict=True)
        vectors = b"".join(struct.pack("<QQ", ctypes.addressof(kept), len(part)) for kept, part in pairs)
        self.kept += [buffer(vectors), buffer(name), buffer(control)]
        vectors_at, name_at, control_at = (ctypes.addressof(kept) for kept in self.kept[-3:])
        fields = {
            "name": name_at if name else 0,
            "name_length": len(name),
            "vectors": vectors_at,
            "count": len(parts),
            "control": control_at if control else 0,
            "control_length": len(control),
            "flags": 0,
        } | changes
        self.kept.append(buffer(messages.HEADER.pack(*fields.values())))
        self.address = ctypes.addressof(self.kept[-1])


def control(level: int, kind: int, body: bytes) -> bytes:
    return struct.pack("<Qii", 16 + len(body), level, kind) + body + bytes(-len(body) % 8)


def read_errno(family: int = INET, **changes: Any) -> int:
    built = Built(b"data", **changes)
    with pytest.raises(OSError) as caught:
        messages.read_message(CALL, built.address, family)
    assert caught.value.errno is not None
    return caught.value.errno


def test_the_layout_is_the_kernels() -> None:
    assert messages.HEADER.size == 56
    assert messages.BATCH_STEP == 64


def test_a_message_is_read() -> None:
    built = Built(b"one", b"", b"three", name=b"\x02\0name")
    message = messages.read_message(CALL, built.address, INET)
    assert message.name == b"\x02\0name"
    assert message.data.total == message.data.left == 8
    assert message.data.read(100) == b"onethree"
    assert message.control == Control()


def test_data_goes_on_where_it_was_left() -> None:
    built = Built(b"abc", b"", b"defgh", b"i")
    data = messages.read_message(CALL, built.address, INET).data
    seen = []
    for step in (2, 1, 3, 3):
        seen.append(data.read(step))
        assert data.read(step) == seen[-1]  # until it is sent, it is the next
        data.skip(step)
    assert b"".join(seen) == b"abcdefghi"
    assert data.left == 0 and data.read(10) == b""


def test_data_is_read_up_to_where_memory_ends() -> None:
    text = buffer(b"here")
    data = messages.Data(CALL, [(ctypes.addressof(text), 4), (BAD, 4)])
    assert data.read(8) == b"here"
    with pytest.raises(OSError) as caught:
        messages.Data(CALL, [(BAD, 4)]).read(4)
    assert caught.value.errno == EFAULT


def test_wrong_headers() -> None:
    assert read_errno(name_length=0x80000000, name=b"x") == EINVAL
    assert read_errno(name=b"x" * 16, name_length=0xFFFFFFFF) == EINVAL
    assert read_errno(count=1025) == EMSGSIZE
    assert read_errno(vectors=BAD) == EFAULT
    assert read_errno(control=b"x" * 16, control_length=1 << 40) == ENOBUFS
    assert read_errno(control=control(1, 1, b""), control_length=messages.MAX_CONTROL + 1) == ENOBUFS
    with pytest.raises(OSError):
        messages.read_message(CALL, BAD, INET)
    negative = struct.pack("<QQ", 0, 1 << 63)
    place = buffer(negative)
    assert read_errno(vectors=ctypes.addressof(place)) == EINVAL


def test_a_name_is_cut_as_the_kernel_cuts_it() -> None:
    built = Built(b"", name=b"n" * 200)
    assert messages.read_message(CALL, built.address, INET).name == b"n" * 128
    built = Built(b"", name=b"x", name_length=0)
    assert messages.read_message(CALL, built.address, INET).name == b""


def test_lengths_are_cut_to_what_one_call_may_move() -> None:
    huge = buffer(struct.pack("<QQQQ", BAD, 0x7FFFFFFFFFFFFFFF, BAD, 5))
    built = Built(vectors=ctypes.addressof(huge), count=2)
    data = messages.read_message(CALL, built.address, INET).data
    assert data.total == messages.MAX_TOTAL


@pytest.mark.parametrize("length", [-1, 129, 1 << 30])
def test_an_address_of_impossible_length(length: int) -> None:
    with pytest.raises(OSError) as caught:
        messages.read_name(CALL, BAD, length)
    assert caught.value.errno == EINVAL


# ---- control messages ----


def test_harmless_ones_are_passed_on() -> None:
    raw = control(0, 2, struct.pack("i", 9)) + control(41, 67, struct.pack("i", 4)) + control(17, 103, b"\x08\0")
    assert messages.parse_control(raw, INET) == Control(plain=raw)


@pytest.mark.parametrize(
    "raw",
    [
        control(1, 36, bytes(4)),  # SO_MARK
        control(1, 12, bytes(4)),  # SO_PRIORITY
        control(1, 61, bytes(8)),  # SCM_TXTIME
        control(0, 7, bytes(8)),  # IP_RETOPTS
        control(41, 54, bytes(8)),  # IPV6_HOPOPTS
        control(41, 57, bytes(8)),  # IPV6_RTHDR
        control(41, 11, bytes(4)),  # IPV6_FLOWINFO
        control(99, 1, bytes(4)),
        control(0, 2, bytes(4)) + control(1, 36, bytes(4)),
    ],
)
def test_all_others_are_refused(raw: bytes) -> None:
    for family in (INET, int(socket.AF_INET6), NETLINK):
        with pytest.raises(OSError) as caught:
            messages.parse_control(raw, family)
        assert caught.value.errno == EPERM


@pytest.mark.parametrize(
    "raw",
    [
        struct.pack("<Qii", 15, 1, 1),
        struct.pack("<Qii", 0, 1, 1),
        struct.pack("<Qii", 17, 1, 1),
        struct.pack("<Qii", (1 << 64) - 1, 1, 1),
        control(1, 1, bytes(4)) + struct.pack("<Qii", 4, 1, 1),
    ],
)
def test_broken_ones_are_refused(raw: bytes) -> None:
    with pytest.raises(OSError) as caught:
        messages.parse_control(raw, UNIX)
    assert caught.value.errno == EINVAL


def test_descriptors_and_credentials_of_unix_sockets() -> None:
    numbers = array.array("i", [3, -1, 7])
    raw = (
        control(1, 1, numbers.tobytes() + b"..") + control(1, 2, struct.pack("iII", 5, 1000, 1001)) + control(1, 1, b"")
    )
    assert messages.parse_control(raw, UNIX) == Control(rights=(3, -1, 7), credentials=Credentials(5, 1000, 1001))
    assert messages.parse_control(raw, INET) == Control()
    assert messages.parse_control(control(0, 7, bytes(8)), UNIX) == Control()
    for wrong in (
        control(1, 99, b""),
        control(1, 2, b"short"),
        control(1, 1, bytes(4)) * 254,
        control(1, 1, bytes(1016)),
    ):
        with pytest.raises(OSError) as caught:
            messages.parse_control(wrong, UNIX)
        assert caught.value.errno == EINVAL
    with pytest.raises(OSError):
        messages.parse_control(raw, NETLINK)


def test_what_is_written_the_kernel_reads() -> None:
    left, right = socket.socketpair()
    with left, right:
        right.setsockopt(socket.SOL_SOCKET, socket.SO_PASSCRED, 1)
        raw = messages.rights([left.fileno(), right.fileno()])
        parsed = messages.parse_control(raw, UNIX)
        assert parsed.rights == (left.fileno(), right.fileno())
        own = Credentials(os.getpid(), os.getuid(), os.getgid())
        assert messages.parse_control(messages.credentials(own), UNIX).credentials == own
    assert messages.rights([]) == b""


# ---- route netlink ----


def netlink(kind: int, body: bytes = b"", length: int | None = None) -> bytes:
    return struct.pack("<IHHII", 16 + len(body) if length is None else length, kind, 1, 1, 0) + body


@pytest.mark.parametrize(
    ("data", "harmless"),
    [
        (b"", True),
        (netlink(18, bytes(16)), True),
        (netlink(18) + netlink(22) + netlink(26), True),
        (netlink(16), False),
        (netlink(18, bytes(1)) + bytes(3) + netlink(20), False),
        (netlink(18) + netlink(17), False),
        (netlink(90), False),
        (netlink(16, length=1), False),
        (netlink(18, length=1000) + netlink(16), True),  # the kernel reads no further either
        (netlink(3), True),
    ],
)
def test_only_questions_pass(data: bytes, harmless: bool) -> None:
    assert messages.is_question(data) is harmless
