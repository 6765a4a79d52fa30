"""The name server of the little internet: authoritative for ``test`` and ``example``, by UDP and TCP."""

from __future__ import annotations

import asyncio
import hashlib
import struct
from typing import cast

import dns.exception
import dns.flags
import dns.message
import dns.name
import dns.opcode
import dns.rcode
import dns.rdataclass
import dns.rdatatype
import dns.rrset

from tests.internet import places
from tests.internet.records import Recorder
from tests.internet.streams import Handler, Stream

ZONES = ("test", "example")
SLOW = 3.0
_SOA = "dns.test. admin.dns.test. 1 3600 600 86400 60"


def _table() -> dict[str, dict[str, tuple[str, ...]]]:
    table: dict[str, dict[str, tuple[str, ...]]] = {}
    for place in places.PLACES.values():
        for name in place.names:
            table[name] = {"A": (place.ipv4,), "AAAA": (place.ipv6,)}
    table.update(places.ANSWERS)
    table.update({name: {"A": (places.PLACES["web"].ipv4,)} for name in places.MISBEHAVIOUR})
    return table


class Zone:
    """Questions in, answers out."""

    def __init__(self) -> None:
        self._table = _table()
        self._rebound = 0

    def _records(self, name: str) -> dict[str, tuple[str, ...]] | None:
        """None: there is no such name."""
        if name == places.REBINDING:
            self._rebound += 1
            return {"A": (places.PLACES["web"].ipv4 if self._rebound % 2 else "127.0.0.1",)}
        if name.endswith("." + places.TUNNEL_ZONE) or name == places.TUNNEL_ZONE:
            digest = hashlib.sha256(name.encode()).hexdigest()
            return {
                "A": (places.PLACES["sink"].ipv4,),
                "AAAA": (places.PLACES["sink"].ipv6,),
                "TXT": (f'"{digest}"',),
                "NULL": (rf"\# 32 {digest}",),
                "CNAME": (f"{digest[:40]}.{places.TUNNEL_ZONE}.",),
                "MX": (f"10 {digest[:40]}.{places.TUNNEL_ZONE}.",),
            }
        found = self._table.get(name)
        labels = name.split(".")
        for depth in range(1, len(labels)):
            if found is None:
                found = self._table.get(".".join(["*", *labels[depth:]]))
        return found

    def answer(self, query: dns.message.Message) -> dns.message.Message:
        """The honest answer."""
        response = dns.message.make_response(query)
        response.flags |= dns.flags.AA
        if query.opcode() != dns.opcode.QUERY or len(query.question) != 1:
            response.set_rcode(dns.rcode.NOTIMP)
            return response
        question = query.question[0]
        name = question.name
        for _ in range(8):
            text = name.to_text(omit_final_dot=True).lower()
            if text.rpartition(".")[2] not in ZONES:
                if name == question.name:
                    response.set_rcode(dns.rcode.REFUSED)
                break
            records = self._records(text)
            if records is None:
                response.set_rcode(dns.rcode.NXDOMAIN)
                break
            kind = dns.rdatatype.to_text(question.rdtype)
            if kind in records:
                response.answer.append(dns.rrset.from_text(name, 60, "IN", kind, *records[kind]))
                break
            alias = records.get("CNAME")
            if alias is None or text.endswith(places.TUNNEL_ZONE):
                break
            response.answer.append(dns.rrset.from_text(name, 60, "IN", "CNAME", *alias))
            name = dns.name.from_text(alias[0])
        if not response.answer and response.rcode() != dns.rcode.REFUSED:
            response.authority.append(dns.rrset.from_text(name.split(2)[1], 60, "IN", "SOA", _SOA))
        return response

    async def respond(self, data: bytes, *, datagram: bool) -> bytes | None:
        """An answer's bytes, wrong where the name says so. None: no answer."""
        try:
            query = dns.message.from_wire(data)
        except dns.exception.DNSException:
            return data[:2] + struct.pack("!HHHHH", 0x8001, 0, 0, 0, 0) if len(data) >= 12 else None
        name, _ = asked(query)
        response = self.answer(query)
        match places.MISBEHAVIOUR.get(name):
            case "dead":
                return None
            case "slow":
                await asyncio.sleep(SLOW)
            case "servfail":
                response = dns.message.make_response(query)
                response.set_rcode(dns.rcode.SERVFAIL)
            case "refused":
                response = dns.message.make_response(query)
                response.set_rcode(dns.rcode.REFUSED)
            case "truncated" if datagram:
                response = dns.message.make_response(query)
                response.flags |= dns.flags.TC
            case "wrong-id":
                response.id ^= 1
            case "wrong-question":
                response.question = [dns.rrset.from_text("bank.example.", 0, "IN", "A")]
            case "stray-records":
                response.additional.append(
                    dns.rrset.from_text("bank.example.", 60, "IN", "A", places.PLACES["sink"].ipv4)
                )
                response.answer.append(dns.rrset.from_text("bank.example.", 60, "IN", "A", places.PLACES["sink"].ipv4))
            case "garbage":
                return data[:2] + b"\x81\x80\xff\xff\xff\xff" + bytes(range(64))
        size = query.payload if query.edns >= 0 else 512
        try:
            return response.to_wire(max_size=max(size, 512) if datagram else 65535)
        except dns.exception.TooBig:
            response = dns.message.make_response(query)
            response.flags |= dns.flags.TC
            return response.to_wire()


def asked(query: dns.message.Message) -> tuple[str, str]:
    """Name and type of the first question."""
    if not query.question:
        return "", ""
    question = query.question[0]
    return question.name.to_text(omit_final_dot=True).lower(), dns.rdatatype.to_text(question.rdtype)


def _told(data: bytes) -> dict[str, str]:
    try:
        name, kind = asked(dns.message.from_wire(data))
    except dns.exception.DNSException:
        return {"kind": "malformed"}
    return {"name": name[:1024], "kind": kind}


class Datagrams(asyncio.DatagramProtocol):
    """Port 53 of one address. Each query is one arrival."""

    def __init__(self, zone: Zone, recorder: Recorder, address: str) -> None:
        self._zone, self._recorder, self._address = zone, recorder, address
        self._tasks: set[asyncio.Task[None]] = set()
        self._transport: asyncio.DatagramTransport | None = None

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        self._transport = cast(asyncio.DatagramTransport, transport)  # by its methods; Python 3.11's is no subclass

    def datagram_received(self, data: bytes, addr: tuple[str | int, ...]) -> None:
        entry = self._recorder.open("dns", "udp", self._address, 53, str(addr[0]))
        self._recorder.data(entry, data)
        self._recorder.tell(entry, closed=True, **_told(data))
        if len(self._tasks) < 1000:
            task = asyncio.get_running_loop().create_task(self._answer(data, addr))
            self._tasks.add(task)
            task.add_done_callback(self._tasks.discard)

    async def _answer(self, data: bytes, addr: tuple[str | int, ...]) -> None:
        response = await self._zone.respond(data, datagram=True)
        if response and self._transport is not None:
            self._transport.sendto(response, addr)


def server(zone: Zone) -> Handler:
    """Queries over TCP; the arrival tells of the last one, its notes of all."""

    async def handle(stream: Stream) -> None:
        while True:
            size = int.from_bytes(await stream.exactly(2), "big")
            data = await stream.exactly(size)
            told = _told(data)
            stream.recorder.tell(stream.entry, **told)
            stream.note(f"{told.get('name')} {told.get('kind')}")
            response = await zone.respond(data, datagram=False)
            if response is None:
                return
            await stream.write(len(response).to_bytes(2, "big") + response)

    return handle
