"""How an answer goes onto the wire, properly or not."""

from __future__ import annotations

import socket
import struct
import threading
from collections.abc import Iterator, Sequence
from dataclasses import replace
from io import BufferedIOBase
from itertools import islice
from types import ModuleType

from tests.models.exchange import Answer, Event, dumps
from tests.models.script import Closes, Echoes, Endless, Errs, Form, Malformed, Silent, Slow, Text, Trouble

LOOK = 0.05
"""Seconds between two looks whether a client that is kept waiting is still there."""


class Ended(Exception):
    """The server ends, or nothing more is to be said."""


class Wire:
    """One client's connection."""

    def __init__(self, connection: socket.socket, out: BufferedIOBase, ending: threading.Event) -> None:
        self._connection, self._out, self._ending = connection, out, ending

    def write(self, data: bytes) -> None:
        """Raises OSError where the client is gone, Ended where the server ends."""
        if self._ending.is_set():
            raise Ended
        self._out.write(data)
        self._out.flush()

    def wait(self, seconds: float) -> None:
        """As write."""
        rounds = max(1, round(seconds / LOOK))
        for _ in range(rounds):
            if self._ending.wait(min(seconds, LOOK)):
                raise Ended
            self._look()

    def _look(self) -> None:
        try:
            if self._connection.recv(1, socket.MSG_PEEK | socket.MSG_DONTWAIT) == b"":
                raise ConnectionResetError("its client has gone")
        except BlockingIOError:
            return

    def close(self, reset: bool) -> None:
        """Raises Ended."""
        if reset:
            self._connection.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
        raise Ended


def answer(
    api: ModuleType, given: Answer, trouble: Trouble | None, wire: Wire, headers: Sequence[tuple[str, str]]
) -> bool:
    """Answers; whether the connection can be used again."""
    match trouble:
        case Silent():
            while True:
                wire.wait(1.0)
        case Slow():
            wire.wait(trouble.before)
        case Malformed():
            return _malformed(trouble.form, given, wire)
        case Echoes():
            echo = dumps(dict(headers))
            given = replace(given, turn=replace(given.turn, parts=(Text(echo),)))
            _send(api, given, None, wire, extra=f"X-Echo: {echo}\r\n")
            return True
        case _:
            pass
    _send(api, given, trouble, wire)
    return True


def _send(api: ModuleType, given: Answer, trouble: Trouble | None, wire: Wire, extra: str = "") -> None:
    if given.asked.stream:
        wire.write(_head("text/event-stream; charset=utf-8", "Transfer-Encoding: chunked", extra))
        for event in _events(api, given, trouble, wire):
            wire.write(_chunk(event.encode()))
        if isinstance(trouble, Closes):
            wire.close(trouble.reset)
        wire.write(b"0\r\n\r\n")
        return
    data = dumps(api.whole(given)).encode()
    if isinstance(trouble, Endless):
        _endless_body(trouble, data, wire)
    wire.write(_head("application/json", f"Content-Length: {len(data)}", extra))
    if isinstance(trouble, Closes):
        wire.write(data[: trouble.after])
        wire.close(trouble.reset)
    wire.write(data)


def _events(api: ModuleType, given: Answer, trouble: Trouble | None, wire: Wire) -> Iterator[Event]:
    events: Iterator[Event] = api.stream(given)
    match trouble:
        case Closes():
            yield from islice(events, trouble.after)
        case Errs():
            yield from islice(events, trouble.after)
            yield api.stream_error(trouble.message)
        case Endless():
            yield from _endless(api, given, trouble)
        case Slow():
            for event in events:
                yield event
                if trouble.between:
                    wire.wait(trouble.between)
        case _:
            yield from events


def _endless(api: ModuleType, given: Answer, trouble: Endless) -> Iterator[Event]:
    """The event that is a delta of text, for ever."""
    sized = replace(given, turn=replace(given.turn, parts=(Text("x" * trouble.size),)))
    for event in api.stream(sized):
        yield event
        if '"x' in event.data and "delta" in event.data:
            while True:
                yield event


def _endless_body(trouble: Endless, data: bytes, wire: Wire) -> None:
    """A body in chunks, which begins like one."""
    wire.write(_head("application/json", "Transfer-Encoding: chunked", ""))
    wire.write(_chunk(data[: data.index(b":") + 1] + b'"'))
    while True:
        wire.write(_chunk(b"x" * trouble.size))


def _malformed(form: Form, given: Answer, wire: Wire) -> bool:
    match form:
        case Form.NOT_HTTP:
            wire.write(b"SSH-2.0-scripted\r\n\r\n")
            raise Ended
        case Form.BAD_CHUNKS:
            wire.write(_head("text/event-stream", "Transfer-Encoding: chunked", ""))
            wire.write(b"zz\r\ndata: {}\r\n")
            raise Ended
        case Form.WRONG_TYPE:
            _whole(wire, "text/html", b"<html><body>Welcome</body></html>")
        case Form.NOT_JSON | Form.NOT_AN_OBJECT:
            text = '{"id":"chatcmpl-x","choices":[{' if form is Form.NOT_JSON else "[1,2,3]"
            if given.asked.stream:
                _whole(wire, "text/event-stream", Event(text).encode())
            else:
                _whole(wire, "application/json", text.encode())
    return True


def _whole(wire: Wire, kind: str, body: bytes) -> None:
    wire.write(_head(kind, f"Content-Length: {len(body)}", "") + body)


def _head(kind: str, framing: str, extra: str) -> bytes:
    return f"HTTP/1.1 200 OK\r\nContent-Type: {kind}\r\n{framing}\r\n{extra}\r\n".encode()


def _chunk(data: bytes) -> bytes:
    return b"%x\r\n%b\r\n" % (len(data), data)
