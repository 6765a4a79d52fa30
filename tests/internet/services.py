"""The smaller services: sink, control, CONNECT proxy, SOCKS5, stratum pool, mail server."""

from __future__ import annotations

import asyncio
import ipaddress
import json

from tests.internet import places
from tests.internet.http1 import head_of
from tests.internet.streams import Ended, Stream, splice

DIAL = 5.0
_NAMES = places.names()


async def sink(stream: Stream) -> None:
    """Takes everything, answers nothing."""
    while await stream.read():
        pass


async def control(stream: Stream) -> None:
    """A test's barrier: answers when everything that arrived before is on record."""
    while await stream.read(1):
        # What was in sockets' queues before us takes the loop a few turns: accept, start, read, and on while there is
        # more. Five turns without news, at most 4 s.
        quiet = 0
        for _ in range(2000):
            before = stream.recorder.total
            await asyncio.sleep(0.002)
            quiet = quiet + 1 if stream.recorder.total == before else 0
            if quiet == 5:
                break
        stream.recorder.flush()
        await stream.write(b".")


async def dial(stream: Stream, host: str, port: int) -> tuple[asyncio.StreamReader, asyncio.StreamWriter] | None:
    """A connection inside the little internet. Nothing else can be reached: there is no other route."""
    stream.note(f"dial {host}:{port}")
    address = _NAMES.get(host, host)
    try:
        ipaddress.ip_address(address)
        async with asyncio.timeout(DIAL):
            return await asyncio.open_connection(address, port)
    except (OSError, ValueError, TimeoutError):
        return None


async def proxy(stream: Stream) -> None:
    """CONNECT (RFC 9110 §9.3.6), anything else is 405."""
    request = head_of(await stream.until(b"\r\n\r\n", 65536))
    if request is None:
        raise Ended
    stream.recorder.add(
        stream.entry, "requests", [request.method, request.target, request.headers[:200], request.version]
    )
    host, _, port = request.target.rpartition(":")
    if request.method != "CONNECT" or not port.isdigit() or len(port) > 5:
        await stream.write(b"HTTP/1.1 405 Method Not Allowed\r\ncontent-length: 0\r\nconnection: close\r\n\r\n")
        return
    found = await dial(stream, host.strip("[]"), int(port))
    if found is None:
        await stream.write(b"HTTP/1.1 502 Bad Gateway\r\ncontent-length: 0\r\nconnection: close\r\n\r\n")
        return
    await stream.write(b"HTTP/1.1 200 Connection established\r\n\r\n")
    await splice(stream, *found)


async def socks(stream: Stream) -> None:
    """SOCKS5 without authentication, CONNECT only (RFC 1928)."""
    version, methods = await stream.exactly(2)
    await stream.exactly(methods)
    if version != 5:
        raise Ended
    await stream.write(b"\x05\x00")
    _, command, _, kind = await stream.exactly(4)
    if kind == 3:
        host = (await stream.exactly((await stream.exactly(1))[0])).decode("latin-1")
    else:
        host = str(ipaddress.ip_address(await stream.exactly(4 if kind == 1 else 16)))
    port = int.from_bytes(await stream.exactly(2), "big")
    found = await dial(stream, host, port) if command == 1 else None
    await stream.write((b"\x05\x00" if found else b"\x05\x05") + b"\x00\x01" + bytes(6))
    if found:
        await splice(stream, *found)


async def stratum(stream: Stream) -> None:
    """A mining pool that says yes to all, and hands out one job."""
    while line := await stream.until(b"\n", 65536):
        try:
            asked = json.loads(line)
            method, number = str(asked["method"]), asked.get("id")
        except (ValueError, KeyError, TypeError, AttributeError):
            continue
        stream.note(f"method {method}")
        result: object = True
        if method == "mining.subscribe":
            result = [[["mining.notify", "1"]], "00", 4]
        elif method == "login":
            result = {"id": "1", "job": {"blob": "00" * 76, "job_id": "1", "target": "ffffffff"}, "status": "OK"}
        await stream.write(json.dumps({"id": number, "result": result, "error": None}).encode() + b"\n")


async def smtp(stream: Stream) -> None:
    """Server-first, offers STARTTLS, and takes what follows as a sink."""
    await stream.write(b"220 mail.test ESMTP\r\n")
    while line := (await stream.until(b"\n", 4096)).strip().upper():
        stream.note(line[:64].decode("latin-1"))
        if line.startswith(b"EHLO"):
            await stream.write(b"250-mail.test\r\n250-STARTTLS\r\n250 8BITMIME\r\n")
        elif line == b"STARTTLS":
            await stream.write(b"220 go ahead\r\n")
            return await sink(stream)
        elif line == b"DATA":
            await stream.write(b"354 go on\r\n")
            await stream.until(b"\r\n.\r\n", 16 << 20)
            await stream.write(b"250 taken\r\n")
        elif line == b"QUIT":
            await stream.write(b"221 bye\r\n")
            return
        else:
            await stream.write(b"250 ok\r\n")
