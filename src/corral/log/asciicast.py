"""What a command writes, with its moments: a recording that asciinema and its relatives play (asciicast v2).

https://docs.asciinema.org/manual/asciicast/v2/: a line of JSON about the whole, then one for each piece of output.
"""

from __future__ import annotations

import codecs
import json
import threading
import time
from collections.abc import Callable

ROWS, COLUMNS = 24, 80
_ENTRY = 64
"""Bytes that a piece of output costs beside its text."""


class Tape:
    """Records one command. Used from several threads."""

    def __init__(
        self,
        title: str,
        limit: int,
        done: Callable[[bytes, bool], None],
        *,
        size: tuple[int, int] = (ROWS, COLUMNS),
    ) -> None:
        """At most ``limit`` bytes are kept. ``done`` is told these, and whether they are all, when it is closed; never
        where nothing was written. ``size`` is that of the terminal, in rows and columns."""
        rows, columns = size
        header = {"version": 2, "width": columns, "height": rows, "timestamp": int(time.time()), "title": title}
        while len(_json(header)) > limit // 2 and header["title"]:
            header["title"] = title = title[: len(title) // 2]
        self._kept = bytearray(_json(header) + b"\n")
        self._left = limit - len(self._kept)
        self._is_empty = True
        self._done: Callable[[bytes, bool], None] | None = done
        self._began = time.monotonic()
        self._lock = threading.Lock()
        self._decoders: dict[str, codecs.IncrementalDecoder] = {}
        self._is_whole = True

    def write(self, data: bytes, stream: str = "") -> None:
        """Some output, of one of several streams where a command has them."""
        with self._lock:
            if self._done is None or not self._is_whole:
                return
            decoder = self._decoders.get(stream)
            if decoder is None:
                decoder = self._decoders[stream] = codecs.getincrementaldecoder("utf-8")("replace")
            self._add(decoder.decode(data))

    def _add(self, text: str) -> None:
        if not text:
            return
        line = _json([round(time.monotonic() - self._began, 6), "o", text])
        if len(line) + 1 > self._left:
            # A character becomes at most 12 bytes (a pair of surrogates, escaped).
            text = text[: max(0, self._left - _ENTRY) // 12]
            line = _json([round(time.monotonic() - self._began, 6), "o", text])
            self._is_whole = False
            if not text:
                return
        self._kept += line + b"\n"
        self._left -= len(line) + 1
        self._is_empty = False

    def close(self, *, is_whole: bool = True) -> None:
        """There is no more, or, where it is not whole, no more is waited for. May be called again."""
        with self._lock:
            done, self._done = self._done, None
            if done is None:
                return
            self._is_whole &= is_whole
            if self._is_whole:
                for decoder in self._decoders.values():
                    self._add(decoder.decode(b"", final=True))
            kept, self._kept = self._kept, bytearray()
            # Under the lock: who closes it too must not go on before it is handed over.
            if not self._is_empty or not self._is_whole:
                done(bytes(kept), self._is_whole)


def _json(value: object) -> bytes:
    return json.dumps(value, separators=(",", ":")).encode()
