"""Connections of the far end: every byte is recorded as it comes off the socket, before anything reads it."""

from __future__ import annotations

import asyncio
import ssl
from collections.abc import Awaitable, Callable
from contextlib import suppress

from tests.internet.records import Entry, Recorder

CHUNK = 65536
LIFETIME = 600.0
"""Seconds until a connection is closed, whatever it does."""
MAX_OPEN = 4096
"""Connections of one listener at a time; more are closed at once (and recorded)."""


class Ended(Exception):
    """The client has closed, or sends more than is taken."""


class Stream:
    """Bytes both ways over TCP."""

    def __init__(
        self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter, recorder: Recorder, entry: Entry
    ) -> None:
        self._reader, self._writer = reader, writer
        self.recorder, self.entry = recorder, entry
        self._buffer = bytearray()

    async def _more(self) -> bytes:
        return await self._reader.read(CHUNK)

    async def read(self, limit: int = CHUNK) -> bytes:
        """What is there, at most ``limit`` bytes; empty at the end."""
        data = bytes(self._buffer) or await self._more()
        self._buffer[:] = data[limit:]
        return data[:limit]

    async def exactly(self, count: int) -> bytes:
        """Raises Ended."""
        while len(self._buffer) < count:
            data = await self._more()
            if not data:
                raise Ended
            self._buffer += data
        found = bytes(self._buffer[:count])
        del self._buffer[:count]
        return found

    async def until(self, separator: bytes, limit: int = 1 << 20) -> bytes:
        """Up to and with ``separator``. Raises Ended."""
        while (at := self._buffer.find(separator)) < 0:
            data = await self._more()
            if not data or len(self._buffer) > limit:
                raise Ended
            self._buffer += data
        return await self.exactly(at + len(separator))

    async def write(self, data: bytes) -> None:
        """Waits until there is room for more."""
        self._writer.write(data)
        await self._writer.drain()

    async def end(self) -> None:
        """No more will be written."""
        with suppress(OSError, NotImplementedError):
            if self._writer.can_write_eof():
                self._writer.write_eof()

    def abort(self) -> None:
        """Closes with RST."""
        self._writer.transport.abort()

    def note(self, text: str) -> None:
        """Has this in the arrival's notes."""
        self.recorder.add(self.entry, "notes", text[:1024])


class TlsStream(Stream):
    """TLS over another stream, as the server. Encrypted bytes are counted below, the first plain ones here."""

    def __init__(self, below: Stream, context: ssl.SSLContext) -> None:
        super().__init__(below._reader, below._writer, below.recorder, below.entry)
        self._below = below
        self._in, self._out = ssl.MemoryBIO(), ssl.MemoryBIO()
        self._tls = context.wrap_bio(self._in, self._out, server_side=True)

    async def _step(self, call: Callable[[], bytes | None]) -> bytes:
        """Runs a call of OpenSSL's until it needs nothing more. Empty at the end."""
        while True:
            try:
                result = call()
                await self._send()
                return result or b""
            except ssl.SSLWantReadError:
                await self._send()
                data = await self._below.read()
                if data:
                    self._in.write(data)
                else:
                    self._in.write_eof()
            except ssl.SSLZeroReturnError:
                return b""
            except ssl.SSLError as error:
                if not isinstance(error, ssl.SSLEOFError):  # OpenSSL has an alert for that, too, but servers send none
                    await self._send()
                self.note(f"tls: {error.reason}")
                raise Ended from error

    async def _send(self) -> None:
        data = self._out.read()
        if data:
            await self._below.write(data)

    async def handshake(self) -> None:
        """Raises Ended."""
        _handshakes[self._tls] = self
        try:
            await self._step(self._tls.do_handshake)
        finally:
            del _handshakes[self._tls]
        self.recorder.tell(self.entry, alpn=self._tls.selected_alpn_protocol() or "")

    @property
    def alpn(self) -> str:
        """What was agreed on."""
        return self._tls.selected_alpn_protocol() or ""

    async def _more(self) -> bytes:
        data = await self._step(lambda: self._tls.read(CHUNK))
        self.recorder.plain(self.entry, data)
        return data

    async def write(self, data: bytes) -> None:
        for at in range(0, len(data), CHUNK):
            piece = data[at : at + CHUNK]
            self._tls.write(piece)
            await self._send()

    async def end(self) -> None:
        with suppress(ssl.SSLError):
            self._tls.unwrap()
        with suppress(OSError):
            await self._send()
        await self._below.end()


_handshakes: dict[ssl.SSLObject | ssl.SSLSocket, TlsStream] = {}


def _named(tls: ssl.SSLObject | ssl.SSLSocket, name: str | None, _context: ssl.SSLContext) -> None:
    """OpenSSL has read the server name; the callback belongs to the context, which many connections share."""
    stream = _handshakes.get(tls)
    if stream is not None:
        stream.recorder.tell(stream.entry, server_name=name or "")


Handler = Callable[[Stream], Awaitable[None]]


class _Recorded(asyncio.StreamReaderProtocol):
    """Counts what arrives and runs the handler."""

    def __init__(self, recorder: Recorder, place: tuple[str, str, int], handler: Handler, open_now: set[Entry]) -> None:
        super().__init__(asyncio.StreamReader(limit=CHUNK), self._run)
        self._recorder, self._place, self._handler = recorder, place, handler
        self._open_now = open_now
        self._entry: Entry | None = None

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        service, address, port = self._place
        peer = transport.get_extra_info("peername") or ("",)
        self._entry = self._recorder.open(service, "tcp", address, port, str(peer[0]))
        super().connection_made(transport)

    def data_received(self, data: bytes) -> None:
        assert self._entry is not None
        self._recorder.data(self._entry, data)
        super().data_received(data)

    def connection_lost(self, exc: Exception | None) -> None:
        if self._entry is not None:
            self._recorder.tell(self._entry, closed=True)
        super().connection_lost(exc)

    async def _run(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        assert self._entry is not None
        stream = Stream(reader, writer, self._recorder, self._entry)
        key = self._entry
        try:
            if len(self._open_now) < MAX_OPEN:
                self._open_now.add(key)
                async with asyncio.timeout(LIFETIME):
                    await self._handler(stream)
        except (Ended, OSError, TimeoutError, EOFError, ssl.SSLError):
            pass
        except Exception as error:
            stream.note(f"{type(error).__name__}: {error}")
        finally:
            self._open_now.discard(key)
            writer.close()


async def listen(recorder: Recorder, service: str, address: str, port: int, handler: Handler) -> asyncio.Server:
    """A listener whose connections are recorded under ``service`` and handled by ``handler``."""
    open_now: set[Entry] = set()
    loop = asyncio.get_running_loop()
    return await loop.create_server(
        lambda: _Recorded(recorder, (service, address, port), handler, open_now), address, port, backlog=1024
    )


def secured(context: ssl.SSLContext, handler: Handler) -> Handler:
    """The same service behind TLS."""
    context.sni_callback = _named

    async def handle(stream: Stream) -> None:
        tls = TlsStream(stream, context)
        await tls.handshake()
        await handler(tls)
        await tls.end()

    return handle


async def splice(stream: Stream, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
    """Relays both ways until both have ended."""

    async def up() -> None:
        while data := await stream.read():
            writer.write(data)
            await writer.drain()
        with suppress(OSError):
            writer.write_eof()

    async def down() -> None:
        while data := await reader.read(CHUNK):
            await stream.write(data)
        await stream.end()

    try:
        async with asyncio.TaskGroup() as group:
            group.create_task(up())
            group.create_task(down())
    except* (OSError, Ended):
        pass
    finally:
        writer.close()
