"""Records what no server takes, off the wire: datagrams, ICMP and other protocols, attempts at closed ports.

A test that says "nothing arrived" must hold for packets too, so this reads the link itself (packet(7)), before any
routing. What the servers record (known TCP ports, queries) is left out here, as is what the host says on its own
account on any link: errors and neighbour messages of ICMP, multicast (MLD, mDNS) and broadcast (DHCP).
"""

from __future__ import annotations

import asyncio
import socket
from ipaddress import ip_address

from tests.internet.records import Recorder

ETH_P_ALL = 3
IP, IPV6 = 0x0800, 0x86DD
OUTGOING = 4
ICMP, TCP, UDP, ICMPV6 = 1, 6, 17, 58
NAMES = {ICMP: "icmp", TCP: "tcp", UDP: "udp", ICMPV6: "icmp"}
KERNEL_ICMP = frozenset((3, 11, 12))
KERNEL_ICMPV6 = frozenset((1, 2, 3, 4, *range(130, 138), 143))
SYN, ACK = 2, 16


class Wire:
    """One packet socket on the link."""

    def __init__(self, recorder: Recorder, link: str, served: set[tuple[str, str, int]]) -> None:
        self._recorder, self._served = recorder, served
        self._socket = socket.socket(socket.AF_PACKET, socket.SOCK_DGRAM | socket.SOCK_NONBLOCK, 0)
        self._socket.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 16 << 20)
        self._socket.bind((link, ETH_P_ALL))
        asyncio.get_running_loop().add_reader(self._socket.fileno(), self._readable)

    def _readable(self) -> None:
        for _ in range(256):
            try:
                packet, (_, kind, direction, *_) = self._socket.recvfrom(65536)
            except BlockingIOError:
                return
            if direction == OUTGOING:
                continue
            if kind == IP and len(packet) >= 20:
                length = (packet[0] & 15) * 4
                self._packet(
                    packet[12:16], packet[16:20], packet[9], packet[length : int.from_bytes(packet[2:4], "big")]
                )
            elif kind == IPV6 and len(packet) >= 40:
                self._packet(
                    packet[8:24], packet[24:40], packet[6], packet[40 : 40 + int.from_bytes(packet[4:6], "big")]
                )

    def _packet(self, source: bytes, target: bytes, protocol: int, data: bytes) -> None:
        if ip_address(target).is_multicast or target == b"\xff\xff\xff\xff":
            return
        address, transport, port = str(ip_address(target)), NAMES.get(protocol, f"ip-{protocol}"), 0
        if protocol == TCP:
            if len(data) < 20 or data[13] & (SYN | ACK) != SYN:
                return
            port, data = int.from_bytes(data[2:4], "big"), data[(data[12] >> 4) * 4 :]
        elif protocol == UDP and len(data) >= 8:
            port, data = int.from_bytes(data[2:4], "big"), data[8:]
        elif data and protocol in (ICMP, ICMPV6):
            if data[0] in (KERNEL_ICMP if protocol == ICMP else KERNEL_ICMPV6):
                return
            data = data[8:]
        if (transport, address, port) in self._served:
            return
        entry = self._recorder.open("nobody", transport, address, port, str(ip_address(source)))
        self._recorder.data(entry, data)
        self._recorder.tell(entry, closed=True)
