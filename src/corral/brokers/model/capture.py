"""Answers of models on file: recorded as they come, and given again without any upstream.

A capture is a file of JSON lines, one for each answer, in the order in which they ended:

    {"version":1, "path":"/chat/completions", "model":"m", "request":"<sha-256>", "conversation":"<id>", "order":0,
     "position":2, "status":200, "headers":[["content-type","text/event-stream"]], "whole":true,
     "pieces":[[12.5,"<base64>"], ...]}

``request`` is the digest of path and body, the body as canonical JSON: names sorted, no blanks. ``position`` counts the
requests of its conversation from 0, and ``order`` the conversations. A piece is what was passed on at once, so many
milliseconds after the answer began. Given again is the answer to the same request, and if there were several in their
order; else that at the same position of the same conversation; else that at the same position of the conversation that
began as the same in order, from the same model. Whatever else is asked has no answer.

Bodies of requests and secrets are not in it, but what models have said is: only its owner may read the file.
"""

from __future__ import annotations

import asyncio
import base64
import hashlib
import json
import os
import stat
from collections import defaultdict
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from enum import Enum
from pathlib import Path
from time import monotonic
from typing import Any

from corral.brokers.model.asking import Asked
from corral.brokers.model.upstream import Failed, Fields
from corral.errors import RequestError
from corral.modelapi.answer import Api

VERSION = 1


class CaptureMode(Enum):
    """What is done with answers."""

    RECORD = "record"
    REPLAY = "replay"


@dataclass(frozen=True, slots=True)
class KeptAnswer:
    """An answer as a log has it: without its head, and without what was asked."""

    api: Api
    model: str
    conversation: str
    order: int
    """Of the conversation, among those of the session, from 0."""
    position: int
    """Of the request in its conversation, from 0."""
    status: int
    body: bytes
    is_whole: bool


_PATHS = {Api.CHAT: "/chat/completions", Api.RESPONSES: "/responses", Api.MESSAGES: "/messages"}


@dataclass(frozen=True, slots=True)
class _Place:
    """Where an answer stands."""

    path: str
    model: str
    request: str
    conversation: str
    order: int
    position: int


@dataclass(frozen=True, slots=True)
class _Recorded:
    place: _Place
    status: int
    headers: Fields
    is_whole: bool
    pieces: tuple[tuple[float, bytes], ...]


class Replay:
    """A recorded answer: a :class:`corral.brokers.model.upstream.Reply`."""

    def __init__(self, recorded: _Recorded, *, is_paced: bool) -> None:
        self.status, self.headers = recorded.status, recorded.headers
        size = sum(len(piece) for _, piece in recorded.pieces)
        is_stream = any(name == b"content-type" and b"event-stream" in value for name, value in recorded.headers)
        self.length = size if recorded.is_whole and not is_stream else None
        self._pieces = iter(recorded.pieces)
        self._is_whole, self._is_paced = recorded.is_whole, is_paced
        self._began = monotonic()

    async def read(self) -> bytes:
        at, piece = next(self._pieces, (0.0, b""))
        if not piece and not self._is_whole:
            raise Failed("its answer broke off when it was recorded", was_sent=True)
        if self._is_paced and (wait := self._began + at / 1000 - monotonic()) > 0:
            await asyncio.sleep(wait)
        return piece

    def close(self) -> None:
        """Nothing is open."""


class Recording:
    """One answer while it comes."""

    def __init__(self, place: _Place, write: Callable[[dict[str, Any]], None]) -> None:
        self._place, self._write = place, write
        self._status, self._headers = 0, Fields()
        self._began = monotonic()
        self._pieces: list[list[Any]] = []

    def start(self, status: int, headers: Fields) -> None:
        self._status, self._headers = status, headers

    def piece(self, data: bytes) -> None:
        at = round((monotonic() - self._began) * 1000, 1)
        self._pieces.append([at, base64.b64encode(data).decode("ascii")])

    def finish(self, *, is_whole: bool) -> None:
        place = self._place
        self._write(
            {
                "version": VERSION,
                "path": place.path,
                "model": place.model,
                "request": place.request,
                "conversation": place.conversation,
                "order": place.order,
                "position": place.position,
                "status": self._status,
                "headers": [[name.decode("latin-1"), value.decode("latin-1")] for name, value in self._headers],
                "whole": is_whole,
                "pieces": self._pieces,
            }
        )


class Capture:
    """Of one sandbox. Made anywhere, used in the brokers' thread."""

    def __init__(
        self, mode: CaptureMode, file: Path, *, is_paced: bool = False, kept: Iterable[KeptAnswer] | None = None
    ) -> None:
        """``is_paced`` gives answers again as slowly as they came; ``kept`` are those to be given again in place of a
        file's. Raises RequestError: the file cannot be what it should."""
        self.is_replay = mode is CaptureMode.REPLAY
        self._is_paced = is_paced
        self._file, self._descriptor = file, -1
        self._orders: dict[str, int] = {}
        self._positions: dict[str, int] = defaultdict(int)
        self._by_request: dict[tuple[str, str], list[_Recorded]] = defaultdict(list)
        self._by_position: dict[tuple[str, str, int], _Recorded] = {}
        self._by_order: dict[tuple[str, str, int, int], _Recorded] = {}
        self._given: dict[tuple[str, str], int] = defaultdict(int)
        if kept is not None:
            for each in kept:
                self._note(_recorded_of(each))
        elif self.is_replay:
            self._load()
        else:
            self._descriptor = _open(file)

    def place(self, path: str, digest: str, model: str, conversation: str) -> _Place:
        """Where a request stands that is about to be made, by its :func:`request_digest`. Once for each."""
        order = self._orders.setdefault(conversation, len(self._orders))
        position = self._positions[conversation]
        self._positions[conversation] += 1
        return _Place(path, model, digest, conversation, order, position)

    def find(self, place: _Place) -> Replay | None:
        """What was answered."""
        key = (place.path, place.request)
        same = self._by_request.get(key)
        if same:
            found: _Recorded | None = same[min(self._given[key], len(same) - 1)]
            self._given[key] += 1
        else:
            found = self._by_position.get((place.path, place.conversation, place.position))
            found = found or self._by_order.get((place.path, place.model, place.order, place.position))
        return None if found is None else Replay(found, is_paced=self._is_paced)

    def record(self, place: _Place) -> Recording:
        return Recording(place, self._write)

    def close(self) -> None:
        if self._descriptor >= 0:
            os.close(self._descriptor)
            self._descriptor = -1

    def _write(self, line: dict[str, Any]) -> None:
        """Raises OSError."""
        data = memoryview(json.dumps(line, separators=(",", ":")).encode() + b"\n")
        while data:
            data = data[os.write(self._descriptor, data) :]

    def _load(self) -> None:
        try:
            with open(self._file, "rb") as file:
                for number, line in enumerate(file, 1):
                    self._take(line, number)
        except OSError as error:
            raise RequestError(f"{self._file} cannot be read: {os.strerror(error.errno or 0)}") from None

    def _take(self, line: bytes, number: int) -> None:
        try:
            recorded = _recorded(json.loads(line))
        except (ValueError, KeyError, TypeError, RecursionError):
            raise RequestError(f"{self._file}, line {number}: no recorded answer") from None
        self._note(recorded)

    def _note(self, recorded: _Recorded) -> None:
        place = recorded.place
        if place.request:
            self._by_request[place.path, place.request].append(recorded)
        self._by_position.setdefault((place.path, place.conversation, place.position), recorded)
        self._by_order.setdefault((place.path, place.model, place.order, place.position), recorded)


def _recorded_of(kept: KeptAnswer) -> _Recorded:
    is_stream = not kept.body.lstrip().startswith(b"{")
    kind = b"text/event-stream; charset=utf-8" if is_stream else b"application/json"
    place = _Place(_PATHS[kept.api], kept.model, "", kept.conversation, kept.order, kept.position)
    return _Recorded(place, kept.status, ((b"content-type", kind),), kept.is_whole, ((0.0, kept.body),))


def request_digest(path: str, asked: Asked) -> str:
    """What a request is found by."""
    canonical = json.dumps(asked.values, sort_keys=True, separators=(",", ":"))
    return hashlib.sha256(f"{path}\n{canonical}".encode()).hexdigest()


def _open(file: Path) -> int:
    flags = os.O_WRONLY | os.O_CREAT | os.O_APPEND | os.O_CLOEXEC | os.O_NOFOLLOW | os.O_NONBLOCK
    try:
        descriptor = os.open(file, flags, 0o600)
    except OSError as error:
        raise RequestError(f"{file} cannot be written: {os.strerror(error.errno or 0)}") from None
    if not stat.S_ISREG(os.fstat(descriptor).st_mode):
        os.close(descriptor)
        raise RequestError(f"{file} is no regular file")
    os.fchmod(descriptor, 0o600)
    return descriptor


def _recorded(line: dict[str, Any]) -> _Recorded:
    """Raises ValueError, KeyError, TypeError."""
    if line["version"] != VERSION or type(line["status"]) is not int or not 200 <= line["status"] < 600:
        raise ValueError
    texts = [line[name] for name in ("path", "model", "request", "conversation")]
    numbers = [line[name] for name in ("order", "position")]
    if any(type(text) is not str for text in texts) or any(type(number) is not int for number in numbers):
        raise TypeError
    return _Recorded(
        _Place(*texts, *numbers),
        line["status"],
        tuple((name.encode("latin-1"), value.encode("latin-1")) for name, value in line["headers"]),
        line["whole"] is True,
        tuple((float(at), base64.b64decode(piece, validate=True)) for at, piece in line["pieces"]),
    )
