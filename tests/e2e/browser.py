"""A real browser for tests: Debian's headless Chromium, spoken to in its own protocol over two pipes.

The protocol is that of https://chromedevtools.github.io/devtools-protocol/: JSON, each message followed by a NUL
(``--remote-debugging-pipe``). Playwright would bring a driver of 140 MB for what is here in a few calls.
"""

from __future__ import annotations

import fcntl
import itertools
import json
import os
import select
import shutil
import socket
import subprocess
import time
from pathlib import Path
from types import TracebackType
from typing import Any

PROGRAM = "chromium-headless-shell"
PATIENCE = 60.0
_OPTIONS = (
    "--remote-debugging-pipe",
    "--disable-background-networking",
    "--disable-component-update",
    "--disable-default-apps",
    "--disable-gpu",
    "--disable-sync",
    "--no-first-run",
    "about:blank",
)


def is_installed() -> bool:
    return shutil.which(PROGRAM) is not None


class Browser:
    """One browser with one page. Whatever it wants from a network goes to a proxy of ours, which only counts."""

    def __init__(self, directory: Path) -> None:
        self._proxy = socket.create_server(("127.0.0.1", 0))
        self._proxy.setblocking(False)
        self.events: list[tuple[str, dict[str, Any]]] = []
        """All that the browser told of itself, by name."""
        self._numbers = itertools.count(1)
        self._rest = b""
        theirs_in, self._out = os.pipe()
        self._in, theirs_out = os.pipe()
        port = self._proxy.getsockname()[1]
        own = (f"--user-data-dir={directory}", f"--proxy-server=127.0.0.1:{port}", "--proxy-bypass-list=<-loopback>")
        argv = [PROGRAM, *own, *(("--no-sandbox",) if os.geteuid() == 0 else ()), *_OPTIONS]
        # It reads from 3 and writes to 4.
        given = [fcntl.fcntl(fd, fcntl.F_DUPFD_CLOEXEC, 10) for fd in (theirs_in, theirs_out)]
        shell = f'exec 3<&{given[0]} 4>&{given[1]} {given[0]}<&- {given[1]}>&-; exec "$@"'
        self._process = subprocess.Popen(
            ["bash", "-c", shell, "bash", *argv],
            pass_fds=given,
            stdout=subprocess.DEVNULL,
            stderr=subprocess.DEVNULL,
            env={**os.environ, "HOME": str(directory)},
            start_new_session=True,
        )
        for fd in (theirs_in, theirs_out, *given):
            os.close(fd)
        self._session: str | None = None
        target = self.call("Target.createTarget", url="about:blank")["targetId"]
        self._session = self.call("Target.attachToTarget", targetId=target, flatten=True)["sessionId"]
        for domain in ("Page", "Runtime", "Network", "Log", "Audits"):
            self.call(f"{domain}.enable")

    def __enter__(self) -> Browser:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        try:
            os.killpg(self._process.pid, 9)  # with its helpers
        finally:
            self._process.wait(PATIENCE)
            os.close(self._in)
            os.close(self._out)
            self._proxy.close()

    # ---- the protocol ----

    def call(self, method: str, **parameters: Any) -> dict[str, Any]:
        """Calls a method, and returns what it answers. Raises AssertionError for an error."""
        number = next(self._numbers)
        message: dict[str, Any] = {"id": number, "method": method, "params": parameters}
        if self._session is not None:
            message["sessionId"] = self._session
        os.write(self._out, json.dumps(message).encode() + b"\0")
        while True:
            told = self._receive()
            if told.get("id") == number:
                assert "error" not in told, (method, told)
                return dict(told["result"])

    def wait_for(self, event: str) -> None:
        """Returns when it has told of this since the last navigation."""
        while all(name != event for name, _ in self.events):
            self._receive()

    def _receive(self) -> dict[str, Any]:
        deadline = time.monotonic() + PATIENCE
        while b"\0" not in self._rest:
            readable, _, _ = select.select([self._in], [], [], max(0.0, deadline - time.monotonic()))
            assert readable, "the browser does not answer"
            more = os.read(self._in, 1 << 16)
            assert more, "the browser is gone"
            self._rest += more
        message, _, self._rest = self._rest.partition(b"\0")
        told: dict[str, Any] = json.loads(message)
        if "method" in told:
            self.events.append((told["method"], told.get("params", {})))
        return told

    # ---- what a person does ----

    def open(self, page: Path) -> None:
        """Shows a file, and returns when it is loaded."""
        self.events.clear()
        self.call("Page.navigate", url=page.as_uri())
        self.wait_for("Page.loadEventFired")

    def evaluate(self, expression: str) -> Any:
        """The value of an expression in the page, or of its promise, under the page's policy. Raises AssertionError
        where it fails."""
        how = {"returnByValue": True, "awaitPromise": True, "allowUnsafeEvalBlockedByCSP": False}
        found = self.call("Runtime.evaluate", expression=expression, **how)
        assert "exceptionDetails" not in found, found["exceptionDetails"]
        return found["result"].get("value")

    def press(self, key: str) -> None:
        """A key, of which text comes where it is one character."""
        text = {"Enter": "\r"}.get(key, key if len(key) == 1 else "")
        code = {"Enter": 13, "ArrowLeft": 37, "ArrowRight": 39, "Backspace": 8}.get(key, 0)
        self.call("Input.dispatchKeyEvent", type="keyDown", key=key, text=text, windowsVirtualKeyCode=code)
        self.call("Input.dispatchKeyEvent", type="keyUp", key=key, windowsVirtualKeyCode=code)

    def type(self, text: str) -> None:
        for each in text:
            self.press(each)

    def click(self, selector: str) -> None:
        """The middle of the first element that a selector names."""
        place = self.evaluate(
            f"(() => {{ const found = document.querySelector({json.dumps(selector)});"
            " found.scrollIntoView({block: 'center'}); const box = found.getBoundingClientRect();"
            " return [box.x + box.width / 2, box.y + box.height / 2]; })()"
        )
        for kind in ("mousePressed", "mouseReleased"):
            self.call("Input.dispatchMouseEvent", type=kind, x=place[0], y=place[1], button="left", clickCount=1)

    # ---- what it did ----

    def requests(self) -> list[str]:
        """What it asked for since the last navigation, its document included, whether or not that was let through."""
        return [told["request"]["url"] for name, told in self.events if name == "Network.requestWillBeSent"]

    def has_connected(self) -> bool:
        """Whether anything reached the proxy since it began."""
        try:
            self._proxy.accept()[0].close()
        except BlockingIOError:
            return False
        return True
