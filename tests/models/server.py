"""A scripted model server on loopback: OpenAI Chat Completions and Responses, Anthropic Messages, plain and streamed.

    with ModelServer([Script("main", [says("hello")])], key="sk-real") as server:
        ...  # something asks http://127.0.0.1:{server.port}/v1/chat/completions
        server.received[0].header("authorization")

* A request belongs to the first script that fits it, and to ASIDE where none does; its turn is the one at its position
  (:mod:`tests.models.script`).
* Whoever does not have the key gets 401, and is kept all the same.
* Every request is kept as it was received. What fits no script is a violation, which a test should look at.
* It answers as badly as the script says, until it ends: nothing here has a time-out of its own.
"""

from __future__ import annotations

import json
import re
import socket
import sys
import threading
import time
from collections import Counter
from collections.abc import Callable, Sequence
from contextlib import suppress
from dataclasses import dataclass
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from types import ModuleType
from typing import Any, Self

from tests.models import chat, messages, responses
from tests.models.answering import Ended, Wire, answer
from tests.models.exchange import MODEL, Answer, Asked, dumps
from tests.models.script import ASIDE, Fails, Script, Trouble

KEY = "sk-scripted-upstream-key"
MAX_BODY = 64 << 20
_APIS = {"/v1/chat/completions": chat, "/v1/responses": responses, "/v1/messages": messages}
_COUNTS = {"/v1/messages/count_tokens": "input_tokens", "/v1/responses/input_tokens": "input_tokens"}


@dataclass(frozen=True, slots=True)
class Received:
    """One request, as it came."""

    method: str
    target: str
    headers: tuple[tuple[str, str], ...]
    body: bytes
    at: float
    """Monotonic."""
    client: tuple[str, int]

    @property
    def path(self) -> str:
        return self.target.partition("?")[0]

    def header(self, name: str) -> str | None:
        """The first field of that name, in any case."""
        return next((value for each, value in self.headers if each.lower() == name.lower()), None)

    @property
    def json(self) -> Any:
        return json.loads(self.body)

    @property
    def raw(self) -> bytes:
        """All of it, to search in."""
        head = "".join(f"{name}: {value}\r\n" for name, value in self.headers)
        return f"{self.method} {self.target} HTTP/1.1\r\n{head}\r\n".encode("latin-1") + self.body


class Refused(Exception):
    """A request that no script answers."""

    def __init__(self, status: int, reason: str) -> None:
        super().__init__(reason)
        self.status = status


class ModelServer:
    """Serves scripts to any number of clients, from threads. Use as a context manager."""

    def __init__(
        self,
        scripts: Sequence[Script] = (),
        *,
        key: str = KEY,
        models: Sequence[str] = (MODEL,),
        host: str = "127.0.0.1",
    ) -> None:
        self._scripts, self.key, self.models = (*scripts, ASIDE), key, tuple(models)
        self._lock = threading.Lock()  # guards the fields of this paragraph
        self._received: list[Received] = []
        self._violations: list[str] = []
        self._asked: Counter[tuple[str, int]] = Counter()
        self._broken: list[str] = []
        self._arrived = threading.Condition(self._lock)
        self.ending = threading.Event()
        self._http = _Server((host, 0), self)
        self._thread = threading.Thread(target=self._http.serve_forever, args=(0.05,), daemon=True)

    def __enter__(self) -> Self:
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self.ending.set()
        self._http.shutdown()
        self._http.server_close()
        self._thread.join()

    @property
    def port(self) -> int:
        return int(self._http.server_address[1])

    @property
    def url(self) -> str:
        """Without ``/v1``."""
        return f"http://{self._http.server_address[0]!s}:{self.port}"

    @property
    def received(self) -> list[Received]:
        """Every request, in order."""
        with self._lock:
            return list(self._received)

    @property
    def violations(self) -> list[str]:
        """What was asked and is in no script."""
        with self._lock:
            return list(self._violations)

    @property
    def broken(self) -> list[str]:
        """The answers whose client had gone before their end, by name and position."""
        with self._lock:
            return list(self._broken)

    def asked(self, script: str) -> list[int]:
        """The positions of the answers that were asked for, with repetitions."""
        with self._lock:
            return sorted(
                position for (name, position), count in self._asked.items() for _ in range(count) if name == script
            )

    def wait_for(self, count: int, timeout: float = 20.0) -> list[Received]:
        """Waits until so many requests have come; AssertionError if they do not."""
        with self._arrived:
            assert self._arrived.wait_for(lambda: len(self._received) >= count, timeout), (
                f"{len(self._received)} requests"
            )
            return list(self._received)

    # ---- the handlers' threads ----

    def keep(self, received: Received) -> None:
        with self._arrived:
            self._received.append(received)
            self._arrived.notify_all()

    def note_violation(self, reason: str) -> None:
        with self._lock:
            self._violations.append(reason)

    def note_broken(self, name: str) -> None:
        with self._lock:
            self._broken.append(name)

    def find(self, asked: Asked) -> tuple[Answer, Trouble | None]:
        """What to answer, and how badly."""
        script = next(each for each in self._scripts if each is ASIDE or _fits(each, asked))
        position = 0 if script is ASIDE else asked.position
        if position >= len(script.turns):
            raise Refused(400, f"script {script.name} has {len(script.turns)} turns, one more was asked for")
        turn = script.turns[position]
        with self._lock:
            before = self._asked[script.name, position]
            self._asked[script.name, position] += 1
        return Answer(script, position, turn, asked), turn.first[before] if before < len(turn.first) else turn.trouble


def _fits(script: Script, asked: Asked) -> bool:
    return script.when in asked.first and (asked.tools or not script.tools)


class _Server(ThreadingHTTPServer):
    daemon_threads = True
    block_on_close = False
    request_queue_size = 1024

    def __init__(self, address: tuple[str, int], model: ModelServer) -> None:
        self.model = model
        super().__init__(address, _Handler)

    def shutdown_request(self, request: Any) -> None:
        """Without a FIN before: what is to be a reset is one."""
        self.close_request(request)

    def handle_error(self, request: Any, client_address: Any) -> None:
        """A client that goes away is no fault; all else is for the test to see."""
        error = sys.exception()
        if not isinstance(error, ConnectionError | TimeoutError):
            self.model.note_violation(f"a request ended in {error!r}")


class _Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    server: _Server

    def setup(self) -> None:
        super().setup()
        self.connection.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)

    def do_GET(self) -> None:
        self._serve(self._get)

    def do_POST(self) -> None:
        self._serve(self._post)

    def _serve(self, work: Callable[[Received], None]) -> None:
        model = self.server.model
        received = Received(
            self.command, self.path, tuple(self.headers.items()), self._body(), time.monotonic(), self.client_address
        )
        model.keep(received)
        api = _APIS.get(received.path, messages if received.header("anthropic-version") else chat)
        try:
            given = (received.header("authorization") or "").removeprefix("Bearer ") or received.header("x-api-key")
            if given != model.key:
                raise Refused(401, "wrong key")
            work(received)
        except Refused as refused:
            if refused.status != 401:
                model.note_violation(str(refused))
            self._reply(refused.status, api.error(refused.status, str(refused)))
        except Ended:
            self.close_connection = True

    def _get(self, received: Received) -> None:
        names = self.server.model.models
        wanted = received.path.removeprefix("/v1/models").strip("/")
        is_anthropic = received.header("anthropic-version") is not None
        if not received.path.startswith("/v1/models") or (wanted and wanted not in names):
            raise Refused(404, f"no such path: {received.path}")
        if wanted:
            self._reply(200, _model(wanted, is_anthropic))
            return
        listed = [_model(name, is_anthropic) for name in names]
        more = {"has_more": False, "first_id": names[0], "last_id": names[-1]}
        self._reply(200, {"data": listed} | (more if is_anthropic else {"object": "list"}))

    def _post(self, received: Received) -> None:
        try:
            body = json.loads(received.body)
        except (ValueError, RecursionError) as error:
            raise Refused(400, "the body is not JSON") from error
        if not isinstance(body, dict):
            raise Refused(400, "the body is not an object")
        if received.path in _COUNTS:
            self._reply(200, {_COUNTS[received.path]: len(received.body) // 4})
            return
        api: ModuleType | None = _APIS.get(received.path)
        if api is None:
            raise Refused(404, f"no such path: {received.path}")
        asked: Asked = api.read(body)
        given, trouble = self.server.model.find(asked)
        if isinstance(trouble, Fails):
            self._reply(trouble.status, api.error(trouble.status, trouble.message), trouble.headers)
            return
        wire = Wire(self.connection, self.wfile, self.server.model.ending)
        try:
            self.close_connection = not answer(api, given, trouble, wire, received.headers)
        except OSError:
            self.server.model.note_broken(given.id)
            self.close_connection = True

    def _body(self) -> bytes:
        if "chunked" in self.headers.get("Transfer-Encoding", ""):
            return self._chunks()
        length = self.headers.get("Content-Length", "0")
        if not re.fullmatch("[0-9]{1,9}", length) or int(length) > MAX_BODY:
            raise ConnectionError("a body of no use")
        body = self.rfile.read(int(length))
        if len(body) != int(length):
            raise ConnectionError("the body ended early")
        return body

    def _chunks(self) -> bytes:
        body = bytearray()
        while size := int(self.rfile.readline(32).split(b";")[0], 16):
            body += self.rfile.read(size)
            self.rfile.readline(8)
            if len(body) > MAX_BODY:
                raise ConnectionError("a body of no use")
        while self.rfile.readline(8192).strip():
            pass
        return bytes(body)

    def _reply(self, status: int, content: object, headers: Sequence[tuple[str, str]] = ()) -> None:
        data = dumps(content).encode()
        self.send_response(status)
        self.send_header("Content-Type", "application/json")
        self.send_header("Content-Length", str(len(data)))
        for name, value in headers:
            self.send_header(name, value)
        self.end_headers()
        with suppress(OSError):
            self.wfile.write(data)

    def log_message(self, format: str, *args: object) -> None:
        """Quiet."""


def _model(name: str, is_anthropic: bool) -> dict[str, object]:
    if is_anthropic:
        return {"type": "model", "id": name, "display_name": name, "created_at": "2025-06-15T00:00:00Z"}
    return {"id": name, "object": "model", "created": 1_750_000_000, "owned_by": "tests"}
