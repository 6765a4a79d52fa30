"""What arrived at the far end: written by the servers, read by the tests.

One file of JSON lines, which only ever grows. A line tells what a connection, datagram or query brought since its last
line, so that a reader may start anywhere (:meth:`Reader.clear`) and still add up right.
"""

from __future__ import annotations

import json
import time
from collections.abc import Iterable
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, TextIO

Bytes = bytes
"""The type; arrivals have a field of its name."""
HEAD = 256
"""Bytes of each connection that are kept."""
PLAIN = 4096
"""Bytes of what TLS carried that are kept."""
MAX_LINES = 200_000
"""Past this the recorder stops the internet: a far end that no longer writes down must not look like a quiet one."""


@dataclass(frozen=True, slots=True)
class Request:
    """An HTTP request as it arrived; header names as they were spelled."""

    method: str
    target: str
    headers: tuple[tuple[str, str], ...]
    version: str = "HTTP/1.1"

    def header(self, name: str) -> str | None:
        """The first value under this name."""
        return next((value for key, value in self.headers if key.lower() == name.lower()), None)


@dataclass(frozen=True, slots=True)
class Arrival:
    """A connection, a datagram, a query, or an attempt at a port where nobody listens (``service`` "nobody")."""

    id: int
    service: str
    transport: str
    address: str
    port: int
    source: str
    at: float
    """Seconds since the epoch."""
    bytes: int = 0
    """Of payload, encrypted or not; what a server has read. One that is busy with an answer leaves up to 128 KiB and
    what the kernel buffers unread."""
    head: Bytes = b""
    plain: Bytes = b""
    """First bytes of what TLS carried, decrypted."""
    server_name: str = ""
    alpn: str = ""
    requests: tuple[Request, ...] = ()
    name: str = ""
    """Of a DNS query, in lower case without the last dot."""
    kind: str = ""
    """Of a DNS query."""
    notes: tuple[str, ...] = ()
    """What else the server says: ``login git``, ``CONNECT web.test:443``."""
    closed: bool = False


@dataclass(slots=True, eq=False)
class Entry:
    """What is to be written about one arrival."""

    id: int
    base: dict[str, Any]
    bytes: int = 0
    kept: int = 0
    kept_plain: int = 0
    new: dict[str, Any] = field(default_factory=dict)


class Recorder:
    """Belongs to the servers' one thread. Lines are written by :meth:`flush`, at the latest 10 ms later."""

    def __init__(self, file: TextIO) -> None:
        self._file = file
        self._next = 0
        self._lines = 0
        self.total = 0
        """Grows with every arrival and byte."""
        self._dirty: dict[int, Entry] = {}

    def open(self, service: str, transport: str, address: str, port: int, source: str) -> Entry:
        """A new arrival."""
        self._next += 1
        self.total += 1
        base = {"service": service, "transport": transport, "address": address, "port": port, "source": source}
        entry = Entry(self._next, {"id": self._next, **base, "at": time.time()})
        self._dirty[entry.id] = entry
        return entry

    def data(self, entry: Entry, data: bytes) -> None:
        """More bytes of it."""
        entry.bytes += len(data)
        self.total += len(data)
        if entry.kept < HEAD:
            piece = data[: HEAD - entry.kept]
            entry.kept += len(piece)
            entry.new["head"] = entry.new.get("head", "") + piece.hex()
        self._dirty[entry.id] = entry

    def plain(self, entry: Entry, data: bytes) -> None:
        """More bytes that TLS carried."""
        if entry.kept_plain < PLAIN:
            piece = data[: PLAIN - entry.kept_plain]
            entry.kept_plain += len(piece)
            entry.new["plain"] = entry.new.get("plain", "") + piece.hex()
            self._dirty[entry.id] = entry

    def tell(self, entry: Entry, **what: Any) -> None:
        """Sets fields of the arrival."""
        entry.new.update(what)
        self._dirty[entry.id] = entry

    def add(self, entry: Entry, which: str, value: Any) -> None:
        """Appends to ``requests`` or ``notes``."""
        entry.new.setdefault(which, []).append(value)
        self._dirty[entry.id] = entry

    def flush(self) -> None:
        """Writes what is new. Raises RuntimeError when the file is full."""
        if not self._dirty:
            return
        dirty, self._dirty = self._dirty, {}
        self._lines += len(dirty)
        if self._lines > MAX_LINES:
            raise RuntimeError(f"more than {MAX_LINES} lines of records")
        for entry in dirty.values():
            self._file.write(json.dumps({**entry.base, "bytes": entry.bytes, **entry.new}) + "\n")
            entry.bytes, entry.new = 0, {}
        self._file.flush()


def fold(lines: Iterable[str]) -> list[Arrival]:
    """The arrivals that these lines tell of, in the order of their first line."""
    found: dict[int, Arrival] = {}
    for line in lines:
        said = json.loads(line)
        head, plain = bytes.fromhex(said.pop("head", "")), bytes.fromhex(said.pop("plain", ""))
        requests = tuple(
            Request(method, target, tuple((key, value) for key, value in headers), version)
            for method, target, headers, version in said.pop("requests", [])
        )
        notes = tuple(said.pop("notes", []))
        count = said.pop("bytes")
        old = found.get(said["id"])
        new = replace(old, **said) if old else Arrival(**said)
        found[said["id"]] = replace(
            new,
            bytes=new.bytes + count,
            head=new.head + head,
            plain=new.plain + plain,
            requests=new.requests + requests,
            notes=new.notes + notes,
        )
    return list(found.values())


class Reader:
    """A test's view of the file: what came since it was last cleared."""

    def __init__(self, path: Path) -> None:
        self._path = path
        self._from = 0

    def read(self) -> list[Arrival]:
        """Everything since :meth:`clear`."""
        with self._path.open("rb") as file:
            file.seek(self._from)
            data = file.read()
        return fold(data[: data.rfind(b"\n") + 1].decode().splitlines())

    def clear(self) -> None:
        """Forgets what was so far."""
        self._from = self._path.stat().st_size
