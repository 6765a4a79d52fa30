"""Messages as callers hand them to sendmsg(2): ``struct msghdr``, its vectors and its control messages.

Headers are read once. The data is not decided on and is read when it is sent, so that a call that is held costs no
memory. Control messages are a list of what is known to need no right that the supervisor has and the caller lacks;
everything else is refused.
"""

from __future__ import annotations

import struct
from dataclasses import dataclass
from errno import EINVAL, EMSGSIZE, ENOBUFS, EPERM
from socket import AF_INET, AF_INET6, AF_UNIX, CMSG_LEN, SCM_CREDENTIALS, SCM_RIGHTS, SOL_SOCKET

from corral.supervisor import addresses, memory
from corral.supervisor.addresses import WithheldError, error
from corral.supervisor.call import Call

HEADER = struct.Struct("<QI4xQQQQi4x")  # name, its length, vectors, count, control, its length, flags
BATCH_STEP = HEADER.size + 8
"""``sizeof(struct mmsghdr)``; what follows the header is what the kernel says was sent."""
MAX_CONTROL = 20480
"""Bytes of control messages; the usual net.core.optmem_max (socket(7))."""
MAX_RIGHTS = 253
"""``SCM_MAX_FD``, unix(7)."""
MAX_TOTAL = 0x7FFFF000
"""``MAX_RW_COUNT``: beyond it the kernel cuts."""
_VECTOR = struct.Struct("<QQ")
_CONTROL = struct.Struct("<Qii")
_NUMBER = struct.Struct("<i")
_CREDENTIALS = struct.Struct("<iII")

SOL_IP, SOL_IPV6, SOL_UDP = 0, 41, 17
_HARMLESS = frozenset(
    (
        (SOL_IP, 1),  # IP_TOS
        (SOL_IP, 2),  # IP_TTL
        (SOL_IP, 8),  # IP_PKTINFO: the address that it is sent from must be the sandbox's own, whoever asks
        (SOL_IPV6, 50),  # IPV6_PKTINFO: the same
        (SOL_IPV6, 52),  # IPV6_HOPLIMIT
        (SOL_IPV6, 62),  # IPV6_DONTFRAG
        (SOL_IPV6, 67),  # IPV6_TCLASS
        (SOL_UDP, 103),  # UDP_SEGMENT
        (SOL_SOCKET, 37),  # SO_TIMESTAMPING
    )
)


@dataclass(frozen=True, slots=True)
class Credentials:
    """What a caller says of itself (SCM_CREDENTIALS), with ids as it sees them."""

    pid: int
    uid: int
    gid: int


@dataclass(frozen=True, slots=True)
class Control:
    """The control messages of one message."""

    plain: bytes = b""
    """Those that the kernel gets as they are."""
    rights: tuple[int, ...] = ()
    """The caller's numbers of the descriptors that it passes."""
    credentials: Credentials | None = None


_NO_CONTROL = Control()


class Data:
    """Bytes in a caller's memory, in up to 1,024 places."""

    __slots__ = ("_call", "_places", "left", "total")

    def __init__(self, call: Call, places: list[tuple[int, int]]) -> None:
        self._call = call
        self._places = places
        self.total = self.left = sum(length for _, length in places)

    def read(self, most: int) -> bytes:
        """The next bytes, ``most`` of them or up to where the memory ends. Raises OSError (EFAULT) if there are none.

        They stay the next until :meth:`skip`.
        """
        wanted = []
        for base, length in self._places:
            if most <= 0:
                break
            if length:
                wanted.append((base, min(length, most)))
                most -= length
        return memory.gather(self._call.tid, wanted) if wanted else b""

    def skip(self, count: int) -> None:
        """So many of them are sent."""
        self.left -= count
        places = self._places
        while count:
            base, length = places[0]
            step = min(length, count)
            count -= step
            if step == length:
                del places[0]
            else:
                places[0] = (base + step, length - step)


class Message:
    """One message that is to be sent."""

    __slots__ = ("control", "data", "name")

    def __init__(self, name: bytes, data: Data, control: Control = _NO_CONTROL) -> None:
        self.name = name
        """The raw address, or empty."""
        self.data = data
        self.control = control


def read_name(call: Call, address: int, length: int) -> bytes:
    """A copy of a socket address. Raises OSError (EINVAL, EFAULT), as the kernel's move_addr_to_kernel."""
    if not 0 <= length <= addresses.MAX_LENGTH:
        raise error(EINVAL)
    return call.read(address, length)


def read_buffer(call: Call, address: int, length: int) -> Data:
    """The data of sendto(2)."""
    return Data(call, [(address, min(length, MAX_TOTAL))] if length else [])


def read_message(call: Call, address: int, family: int) -> Message:
    """What a ``struct msghdr`` says, for a socket of this family. Raises OSError as sendmsg(2)."""
    name, name_length, vectors, count, control, control_length, _ = HEADER.unpack(call.read(address, HEADER.size))
    if not name:
        name_length = 0
    if name_length >> 31:
        raise error(EINVAL)
    raw = call.read(name, min(name_length, addresses.MAX_LENGTH))
    if count > memory.MAX_PLACES:
        raise error(EMSGSIZE)
    data = _read_vectors(call, vectors, count)
    if not control_length:
        return Message(raw, data)
    if control_length > MAX_CONTROL:
        raise error(ENOBUFS)
    return Message(raw, data, parse_control(call.read(control, control_length), family))


def _read_vectors(call: Call, address: int, count: int) -> Data:
    places, left = [], MAX_TOTAL
    for base, length in _VECTOR.iter_unpack(call.read(address, count * _VECTOR.size)):
        if length >> 63:
            raise error(EINVAL)
        length = min(length, left)
        left -= length
        places.append((base, length))
    return Data(call, places)


def parse_control(raw: bytes, family: int) -> Control:
    """Sorts control messages. Raises OSError: EINVAL for what is none, EPERM for what is not known to be harmless."""
    plain: list[bytes] = []
    rights: list[int] = []
    credentials = None
    at = 0
    # As CMSG_NXTHDR of the kernel goes: what is shorter than a header at the end is ignored.
    while len(raw) - at >= _CONTROL.size:
        length, level, kind = _CONTROL.unpack_from(raw, at)
        if not _CONTROL.size <= length <= len(raw) - at:
            raise error(EINVAL)
        body = raw[at + _CONTROL.size : at + length]
        at += length + -length % 8
        if family == AF_UNIX and level != SOL_SOCKET:
            continue  # as unix(7) does
        if level == SOL_SOCKET and kind in (SCM_RIGHTS, SCM_CREDENTIALS):
            if family in (AF_INET, AF_INET6):
                continue  # "semantically in SOL_UNIX", says the kernel, and ignores them
            if kind == SCM_CREDENTIALS:
                credentials = _credentials(body)
            elif family == AF_UNIX:
                rights += _rights(body, len(rights))
            else:
                raise error(EINVAL)
        elif family == AF_UNIX:
            raise error(EINVAL)
        elif (level, kind) in _HARMLESS:
            plain.append(_CONTROL.pack(CMSG_LEN(len(body)), level, kind) + body + bytes(-len(body) % 8))
        else:
            raise WithheldError(EPERM, f"control message {kind} of level {level} is not known to need no rights")
    return Control(b"".join(plain), tuple(rights), credentials)


def _rights(body: bytes, before: int) -> list[int]:
    numbers = [number for (number,) in _NUMBER.iter_unpack(body[: len(body) & ~3])]
    if before + len(numbers) > MAX_RIGHTS:
        raise error(EINVAL)
    return numbers


def _credentials(body: bytes) -> Credentials:
    if len(body) != _CREDENTIALS.size:
        raise error(EINVAL)
    return Credentials(*_CREDENTIALS.unpack(body))


def rights(fds: list[int]) -> bytes:
    """A control message that passes these descriptors, or nothing."""
    return _control(SCM_RIGHTS, struct.pack(f"<{len(fds)}i", *fds)) if fds else b""


def credentials(value: Credentials) -> bytes:
    """A control message that says who sends."""
    return _control(SCM_CREDENTIALS, _CREDENTIALS.pack(value.pid, value.uid, value.gid))


def _control(kind: int, body: bytes) -> bytes:
    return _CONTROL.pack(CMSG_LEN(len(body)), SOL_SOCKET, kind) + body + bytes(-len(body) % 8)


# ---- route netlink ----

_NLMSG = struct.Struct("<IH")
_NLMSG_MIN, _FIRST_REQUEST = 16, 16
_QUESTIONS = frozenset((18, 22, 26, 30, 34, 38, 66, 74, 82))
"""RTM_GETLINK, GETADDR, GETROUTE, GETNEIGH, GETRULE, GETQDISC, GETNEIGHTBL, GETADDRLABEL, GETNETCONF."""


def is_question(data: bytes) -> bool:
    """Whether all netlink messages in ``data`` only ask for what rtnetlink(7) tells everybody."""
    at = 0
    while len(data) - at >= _NLMSG_MIN:
        length, kind = _NLMSG.unpack_from(data, at)
        if kind not in _QUESTIONS and kind >= _FIRST_REQUEST:
            return False
        if length < _NLMSG_MIN or length > len(data) - at:
            break
        at += length + -length % 4
    return True
