"""A scripted model behind the OpenAI chat-completions API, on loopback.

Rules:
* The answer to a request with n assistant messages is turn n of the script. A retry gets the same answer.
* The earlier assistant messages must be the script's own, by tool-call id.
* Anything else (path, method, key, size, stream, form) is refused and remembered as a violation.
* Every request is kept as received: together they are the agent's transcript, seen from outside.
* The server takes a bounded number of connections, requests and bytes.
"""

import json
import sys
import threading
from collections.abc import Sequence
from dataclasses import dataclass
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from socket import socket
from typing import Any, ClassVar, Self

from script import Turn

PATH = "/v1/chat/completions"
KEY = "scripted-no-secret"
MAX_BODY = 4 << 20
MAX_REQUESTS = 200
MAX_CONNECTIONS = 16


class Refused(Exception):
    """The request is not one that the script answers."""

    def __init__(self, status: int, reason: str) -> None:
        super().__init__(reason)
        self.status = status


@dataclass(frozen=True)
class Observation:
    """What the agent told the model about one command."""

    returncode: int
    output: str


class ModelServer:
    """Serves one script to one agent. Use as a context manager."""

    def __init__(self, turns: Sequence[Turn]) -> None:
        self._turns = tuple(turns)
        self._lock = threading.Lock()  # guards the three fields below
        self._received: list[bytes] = []
        self._messages: list[dict[str, Any]] = []
        self._violations: list[str] = []
        self._answered = 0
        self._http = _Server(self)
        self._thread = threading.Thread(target=self._http.serve_forever, args=(0.1,), daemon=True)

    def __enter__(self) -> Self:
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._http.shutdown()
        self._http.server_close()
        self._thread.join()

    @property
    def port(self) -> int:
        return int(self._http.server_address[1])

    @property
    def received(self) -> list[bytes]:
        """Every request, headers and body, as it came."""
        with self._lock:
            return list(self._received)

    @property
    def violations(self) -> list[str]:
        with self._lock:
            return list(self._violations)

    @property
    def answered(self) -> int:
        """How many turns of the script were given out."""
        with self._lock:
            return self._answered

    def observations(self) -> dict[str, Observation]:
        """The output of each turn's command, by the turn's name, from the longest request."""
        with self._lock:
            messages = list(self._messages)
        names = {call_id(number): turn.name for number, turn in enumerate(self._turns)}
        return {
            names[call]: _observation(message.get("content"))
            for message in messages
            if message.get("role") == "tool" and isinstance(call := message.get("tool_call_id"), str) and call in names
        }

    # Called by the handler's threads.

    def record(self, raw: bytes) -> None:
        with self._lock:
            if len(self._received) >= MAX_REQUESTS:
                raise Refused(429, f"more than {MAX_REQUESTS} requests")
            self._received.append(raw)

    def refused(self, reason: str) -> None:
        with self._lock:
            if len(self._violations) < MAX_REQUESTS:
                self._violations.append(reason)

    def answer(self, body: bytes) -> dict[str, Any]:
        messages = _messages(body)
        said = [message for message in messages if message.get("role") == "assistant"]
        position = len(said)
        if position >= len(self._turns):
            raise Refused(400, f"the script has {len(self._turns)} turns, asked for one more")
        for number, message in enumerate(said):
            if _call_ids(message) != [call_id(number)]:
                raise Refused(400, f"assistant message {number} is not the script's")
        with self._lock:
            if len(messages) > len(self._messages):
                self._messages = messages
            self._answered = max(self._answered, position + 1)
        return _completion(position, self._turns[position])


def call_id(position: int) -> str:
    return f"call_{position:04d}"


def _call_ids(message: dict[str, Any]) -> list[object]:
    calls = message.get("tool_calls")
    return [call.get("id") for call in calls if isinstance(call, dict)] if isinstance(calls, list) else []


def _messages(body: bytes) -> list[dict[str, Any]]:
    try:
        request = json.loads(body)
    except (ValueError, RecursionError) as error:
        raise Refused(400, "the body is not JSON") from error
    if not isinstance(request, dict) or request.get("stream"):
        raise Refused(400, "not a chat-completions request without streaming")
    messages = request.get("messages")
    if not isinstance(messages, list) or not all(isinstance(message, dict) for message in messages):
        raise Refused(400, "messages must be a list of objects")
    tools = request.get("tools")
    if not (isinstance(tools, list) and len(tools) == 1 and _tool_name(tools[0]) == "bash"):
        raise Refused(400, "the script needs exactly one tool, bash")
    return messages


def _tool_name(tool: object) -> object:
    function = tool.get("function") if isinstance(tool, dict) else None
    return function.get("name") if isinstance(function, dict) else None


def _completion(position: int, turn: Turn) -> dict[str, Any]:
    call = {
        "id": call_id(position),
        "type": "function",
        "function": {"name": "bash", "arguments": json.dumps({"command": turn.command})},
    }
    message = {"role": "assistant", "content": turn.thought, "tool_calls": [call]}
    return {
        "id": f"chatcmpl-{position:04d}",
        "object": "chat.completion",
        "created": 0,
        "model": "scripted",
        "choices": [{"index": 0, "message": message, "finish_reason": "tool_calls"}],
        "usage": {"prompt_tokens": 1, "completion_tokens": 1, "total_tokens": 2},
    }


def _observation(content: object) -> Observation:
    """mini-swe-agent's observation: JSON with output, or with output_head and output_tail if it is long."""
    try:
        seen = json.loads(content) if isinstance(content, str) else {}
    except ValueError:
        seen = {}
    if not isinstance(seen, dict) or not isinstance(seen.get("returncode"), int):
        return Observation(-1, str(content))
    parts = (seen.get(name) for name in ("output", "output_head", "output_tail", "exception_info"))
    return Observation(seen["returncode"], "\n".join(part for part in parts if isinstance(part, str)))


class _Server(ThreadingHTTPServer):
    daemon_threads = True
    block_on_close = False

    def __init__(self, model: ModelServer) -> None:
        self.model = model
        self._free = threading.BoundedSemaphore(MAX_CONNECTIONS)
        super().__init__(("127.0.0.1", 0), _Handler)

    def process_request(self, request: socket | tuple[bytes, socket], client_address: Any) -> None:
        if not self._free.acquire(blocking=False):
            self.shutdown_request(request)
            return
        super().process_request(request, client_address)

    def process_request_thread(self, request: socket | tuple[bytes, socket], client_address: Any) -> None:
        try:
            super().process_request_thread(request, client_address)
        finally:
            self._free.release()

    def handle_error(self, request: socket | tuple[bytes, socket], client_address: Any) -> None:
        error = sys.exception()
        if not isinstance(error, (ConnectionError, TimeoutError)):  # a port scan hangs up: nothing was asked
            self.model.refused(f"a request ended in {error!r}")


class _Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    timeout: ClassVar[float] = 15
    server: _Server

    def do_POST(self) -> None:
        model = self.server.model
        try:
            body = self._body()
            model.record(f"{self.requestline}\r\n{self.headers}".encode() + body)
            if self.path != PATH:
                raise Refused(404, f"no such path: {self.path!r}")
            if self.headers.get("Authorization") != f"Bearer {KEY}":
                raise Refused(401, "wrong key")
            self._reply(200, model.answer(body))
        except Refused as refusal:
            model.refused(str(refusal))
            self.close_connection = True
            self._reply(refusal.status, {"error": {"message": str(refusal), "type": "invalid_request_error"}})

    def _body(self) -> bytes:
        lengths = self.headers.get_all("Content-Length", [])
        if "Transfer-Encoding" in self.headers or len(lengths) != 1 or not lengths[0].isascii():
            raise Refused(411, "exactly one Content-Length, please")
        if not lengths[0].isdigit() or len(lengths[0]) > 9 or int(lengths[0]) > MAX_BODY:
            raise Refused(413, f"the body may have at most {MAX_BODY} bytes")
        body = self.rfile.read(int(lengths[0]))
        if len(body) != int(lengths[0]):
            raise Refused(400, "the body ended early")
        return body

    def _reply(self, status: int, content: dict[str, Any]) -> None:
        data = json.dumps(content).encode()
        self.send_response(status)
        self.send_header("Content-Type", "application/json")
        self.send_header("Content-Length", str(len(data)))
        if self.close_connection:
            self.send_header("Connection", "close")
        self.end_headers()
        self.wfile.write(data)

    def send_error(self, code: int, message: str | None = None, explain: str | None = None) -> None:
        self.server.model.refused(f"HTTP {code} {message or ''}: {self.requestline!r}")
        super().send_error(code, message, explain)

    def log_message(self, format: str, *args: object) -> None:
        """Quiet: the demo prints what matters."""
