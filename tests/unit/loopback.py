"""A broker's HTTP on the loopback, for clients that are not ours."""

from __future__ import annotations

import asyncio
import socket
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager

from corral.actions import Origin
from corral.brokers.http import Connection, Handle, Room, serve

ORIGIN = Origin("box", "box", step=3)


@asynccontextmanager
async def served(handle: Handle, *, host: str = "", max_body: int = 4 << 20) -> AsyncIterator[str]:
    """Where it is: ``127.0.0.1:PORT``. ``host`` is whom requests must be for, where that is another."""
    listener = socket.create_server(("127.0.0.1", 0))
    listener.setblocking(False)
    place = f"127.0.0.1:{listener.getsockname()[1]}"
    connections: list[Connection] = []
    room = Room(64 << 20)

    async def accept() -> None:
        while True:
            sock, _ = await asyncio.get_running_loop().sock_accept(listener)
            sock.setblocking(False)
            over: list[str] = []
            make = lambda: Connection(host or place, ORIGIN, handle, max_body, room, over.append)  # noqa: B023, E731
            connections.append(await serve(sock, make))

    accepting = asyncio.create_task(accept())
    try:
        yield place
    finally:
        accepting.cancel()
        await asyncio.gather(accepting, return_exceptions=True)
        listener.close()
        tasks = [each.task for each in connections if each.task is not None]
        for each in connections:
            each.close("the test is over")
        await asyncio.gather(*tasks, return_exceptions=True)
        assert room._left == 64 << 20
