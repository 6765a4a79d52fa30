"""What the kernel tells of connections and datagrams that were meant for somebody else."""

from __future__ import annotations

import socket
import struct

from corral.policy.names import unmapped

SO_ORIGINAL_DST = 80  # linux/netfilter_ipv4.h; IP6T_SO_ORIGINAL_DST has the same number
IP_PKTINFO = 8
IPV6_PKTINFO = socket.IPV6_PKTINFO
_PKTINFO4 = struct.Struct("=I4s4s")  # interface, local address, destination
_PKTINFO6 = struct.Struct("=16sI")
_TCP_INFO_BYTES = 160
_ESTABLISHED = 1  # TCP_ESTABLISHED (linux/tcp_states.h), in the first byte of struct tcp_info
_DATA_SEGMENTS = struct.Struct("=II")
_DATA_SEGMENTS_OFFSET = 152  # struct tcp_info: tcpi_data_segs_in, tcpi_data_segs_out (linux/tcp.h)

Place = tuple[bytes, int]
"""An address of 4 or 16 bytes, and a port."""


def place_of(address: tuple[str, int] | tuple[str, int, int, int]) -> Place:
    """What Python's socket module calls an address."""
    family = socket.AF_INET6 if ":" in address[0] else socket.AF_INET
    return unmapped(socket.inet_pton(family, address[0].partition("%")[0])), address[1]


def original_destination(sock: socket.socket) -> Place:
    """Where a redirected connection was to go. Raises OSError (ENOENT) for one that was not redirected."""
    if sock.family == socket.AF_INET:
        raw = sock.getsockopt(socket.SOL_IP, SO_ORIGINAL_DST, 16)
        return raw[4:8], int.from_bytes(raw[2:4], "big")
    raw = sock.getsockopt(socket.IPPROTO_IPV6, SO_ORIGINAL_DST, 28)
    return unmapped(raw[8:24]), int.from_bytes(raw[2:4], "big")


def receive_datagram(sock: socket.socket, size: int) -> tuple[bytes, tuple[str, int], Place]:
    """A datagram, who sent it, and where it was to go. Raises OSError (BlockingIOError: there is none)."""
    data, ancillary, flags, sender = sock.recvmsg(size, 128)
    to = b""
    for level, kind, content in ancillary:
        if (level, kind) == (socket.IPPROTO_IP, IP_PKTINFO):
            to = _PKTINFO4.unpack(content)[2]
        elif (level, kind) == (socket.IPPROTO_IPV6, IPV6_PKTINFO):
            to = _PKTINFO6.unpack(content)[0]
    if not to or flags & (socket.MSG_TRUNC | socket.MSG_CTRUNC):
        data = b""
    return data, sender, (to, 53)


def answer_datagram(sock: socket.socket, data: bytes, to: tuple[str, int], source: bytes) -> None:
    """Sends from the address that the question went to. Raises OSError."""
    if len(source) == 4:
        control = (socket.IPPROTO_IP, IP_PKTINFO, _PKTINFO4.pack(0, source, bytes(4)))
    else:
        control = (socket.IPPROTO_IPV6, IPV6_PKTINFO, _PKTINFO6.pack(source, 0))
    sock.sendmsg([data], [control], socket.MSG_DONTWAIT, to)


def is_connected(sock: socket.socket) -> bool:
    """Whether a TCP socket is connected by now. Raises OSError."""
    return sock.getsockopt(socket.IPPROTO_TCP, socket.TCP_INFO, 1)[0] == _ESTABLISHED


def segments(sock: socket.socket) -> tuple[int, int]:
    """TCP segments with data that were sent and received (tcp(7), TCP_INFO); zeros where nobody knows."""
    try:
        info = sock.getsockopt(socket.IPPROTO_TCP, socket.TCP_INFO, _TCP_INFO_BYTES)
        received, sent = _DATA_SEGMENTS.unpack_from(info, _DATA_SEGMENTS_OFFSET)
    except (OSError, struct.error):
        return 0, 0
    return sent, received
