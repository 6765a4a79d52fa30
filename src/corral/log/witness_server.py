"""How a witness is reached: HTTP, one request a connection, everything bounded."""

from __future__ import annotations

import threading
from contextlib import suppress
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from socket import AF_INET, AF_INET6, SHUT_RDWR, socket
from typing import Any

from corral.log.witness import MAX_REQUEST, Answer, Witness

MAX_AT_ONCE = 16
"""Connections that are served at one time; others wait in the kernel."""
TIMEOUT = 10.0
"""Seconds for which a client may be silent."""
TOTAL = 30.0
"""Seconds that it has for its request."""


class WitnessServer(ThreadingHTTPServer):
    """Serves one witness at ``address`` and a port (0: any) until :meth:`shutdown`."""

    daemon_threads = True
    request_queue_size = 64

    def __init__(self, witness: Witness, address: str, port: int) -> None:
        """Raises OSError where it cannot be listened there."""
        self.witness = witness
        self._free = threading.BoundedSemaphore(MAX_AT_ONCE)
        self.address_family = AF_INET6 if ":" in address else AF_INET
        super().__init__((address, port), _Handler)

    def process_request(self, request: Any, client_address: Any) -> None:
        self._free.acquire()
        super().process_request(request, client_address)

    def process_request_thread(self, request: Any, client_address: Any) -> None:
        end = threading.Timer(TOTAL, _hang_up, (request,))
        end.daemon = True
        end.start()
        try:
            super().process_request_thread(request, client_address)
        finally:
            end.cancel()
            self._free.release()

    def handle_error(self, request: Any, client_address: Any) -> None:
        """A client that goes away is nothing to be told of."""


def _hang_up(client: socket) -> None:
    with suppress(OSError):
        client.shutdown(SHUT_RDWR)


class _Handler(BaseHTTPRequestHandler):
    server: WitnessServer
    timeout = TIMEOUT
    server_version, sys_version = "corral-witness", ""

    def do_POST(self) -> None:
        if self.path.rpartition("/")[2] != "add-checkpoint":
            self._answer(Answer(404, "there is add-checkpoint here, and nothing else\n"))
            return
        lengths = self.headers.get_all("Content-Length") or []
        if len(lengths) != 1 or not lengths[0].isdigit() or "Transfer-Encoding" in self.headers:
            self._answer(Answer(411, "the request must have one Content-Length\n"))
            return
        length = int(lengths[0][:10])
        if length > MAX_REQUEST:
            self._answer(Answer(413, "the request is too long\n"))
            return
        body = self.rfile.read(length)
        if len(body) == length:
            self._answer(self.server.witness.add_checkpoint(body))

    def _answer(self, answer: Answer) -> None:
        content = answer.content.encode()
        self.send_response(answer.status)
        self.send_header("Content-Type", answer.content_type)
        self.send_header("Content-Length", str(len(content)))
        self.end_headers()
        self.wfile.write(content)

    def log_message(self, format: str, *args: object) -> None:
        """What clients say is in no log of ours."""
