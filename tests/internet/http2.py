"""The same sites over HTTP/2, by the h2 package; one task for each stream."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator

import h2.config
import h2.connection
import h2.events
import h2.exceptions

from tests.internet import http1
from tests.internet.records import Request
from tests.internet.streams import Handler, Stream, TlsStream
from tests.internet.web import Asked, Site


class _Connection:
    """State of one connection; ``_room`` wakes senders when windows open."""

    def __init__(self, stream: Stream, site: Site) -> None:
        self._stream, self._site = stream, site
        self._h2 = h2.connection.H2Connection(h2.config.H2Configuration(client_side=False))
        self._bodies: dict[int, asyncio.Queue[bytes]] = {}
        self._room = asyncio.Event()
        self._gone: set[int] = set()

    async def _flush(self) -> None:
        data = self._h2.data_to_send()
        if data:
            await self._stream.write(data)

    async def run(self) -> None:
        self._h2.initiate_connection()
        await self._flush()
        async with asyncio.TaskGroup() as group:
            tasks = []
            while data := await self._stream.read():
                try:
                    events = self._h2.receive_data(data)
                except h2.exceptions.ProtocolError as error:
                    self._stream.note(f"h2: {error}")
                    break
                for event in events:
                    if isinstance(event, h2.events.RequestReceived) and event.stream_id is not None:
                        self._bodies[event.stream_id] = asyncio.Queue()
                        headers = tuple((_text(key), _text(value)) for key, value in event.headers or ())
                        tasks.append(group.create_task(self._answer(event.stream_id, headers)))
                    elif isinstance(event, h2.events.DataReceived) and event.stream_id is not None:
                        self._h2.acknowledge_received_data(event.flow_controlled_length or 0, event.stream_id)
                        if event.data:
                            self._bodies[event.stream_id].put_nowait(bytes(event.data))
                    elif isinstance(event, h2.events.StreamEnded) and event.stream_id is not None:
                        self._bodies[event.stream_id].put_nowait(b"")
                    elif isinstance(event, h2.events.StreamReset) and event.stream_id is not None:
                        self._gone.add(event.stream_id)
                        self._bodies[event.stream_id].put_nowait(b"")
                    self._room.set()
                await self._flush()
            for task in tasks:
                task.cancel()

    async def _body(self, number: int) -> AsyncIterator[bytes]:
        while data := await self._bodies[number].get():
            yield data

    async def _answer(self, number: int, headers: tuple[tuple[str, str], ...]) -> None:
        own = dict(headers)
        plain = tuple(pair for pair in headers if not pair[0].startswith(":"))
        request = Request(
            own.get(":method", ""), own.get(":path", ""), (("host", own.get(":authority", "")), *plain), "HTTP/2"
        )
        told = [request.method[:64], request.target[:4096], request.headers[:200], request.version]
        self._stream.recorder.add(self._stream.entry, "requests", told)
        try:
            response = await self._site(Asked(request, lambda: self._body(number)))
            self._h2.send_headers(number, [(":status", str(response.status)), *response.headers])
            body = response.body
            if request.method == "HEAD":
                pass
            elif isinstance(body, bytes):
                await self._send(number, body)
            else:
                async for piece in body:
                    await self._send(number, piece)
            self._h2.end_stream(number)
            await self._flush()
        except (h2.exceptions.ProtocolError, ConnectionError):
            self._stream.note(f"h2: stream {number} ended early")

    async def _send(self, number: int, data: bytes) -> None:
        while data and number not in self._gone:
            room = min(self._h2.local_flow_control_window(number), self._h2.max_outbound_frame_size)
            if room <= 0:
                self._room.clear()
                await self._flush()
                await self._room.wait()
                continue
            self._h2.send_data(number, data[:room])
            data = data[room:]
            await self._flush()


def _text(value: bytes | str) -> str:
    return value.decode("latin-1") if isinstance(value, bytes) else value


def server(site: Site) -> Handler:
    """Over TLS: HTTP/2 where the client agreed on it, else HTTP/1.1."""
    plain = http1.server(site)

    async def handle(stream: Stream) -> None:
        if isinstance(stream, TlsStream) and stream.alpn == "h2":
            await _Connection(stream, site).run()
        else:
            await plain(stream)

    return handle
