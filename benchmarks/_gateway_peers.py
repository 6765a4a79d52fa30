"""Proxies that do some of what the gateway does: tinyproxy, which carries bytes, and mitmproxy, which can look at them.

Both are asked for by their own protocol (CONNECT), run alone on loopback, and are gone at the end. mitmproxy is looked
for in PATH and in `build/mitmproxy`, a virtual environment that whoever measures has made:

    python3 -m venv build/mitmproxy && build/mitmproxy/bin/pip install mitmproxy
"""

from __future__ import annotations

import contextlib
import shutil
import socket
import subprocess
import time
from collections.abc import Iterator
from pathlib import Path

_OWN = Path(__file__).parent.parent / "build" / "mitmproxy" / "bin"
_PATIENCE = 30.0
"""Seconds until a proxy must listen."""


def free_port() -> int:
    """A port of loopback that nobody has now."""
    with socket.create_server(("127.0.0.1", 0)) as listener:
        return int(listener.getsockname()[1])


@contextlib.contextmanager
def _listening(argv: list[str], port: int, place: Path) -> Iterator[None]:
    said = place / f"{Path(argv[0]).name}.log"
    with said.open("wb") as output:
        process = subprocess.Popen(argv, cwd=place, stdin=subprocess.DEVNULL, stdout=output, stderr=output)
    try:
        deadline = time.monotonic() + _PATIENCE
        while True:
            try:
                socket.create_connection(("127.0.0.1", port)).close()
                break
            except OSError:
                if process.poll() is not None or time.monotonic() > deadline:
                    raise RuntimeError(f"{argv[0]} does not listen: {said.read_text()[-500:]}") from None
                time.sleep(0.05)
        yield
    finally:
        process.terminate()
        try:
            process.wait(5)
        except subprocess.TimeoutExpired:
            process.kill()
            process.wait()


@contextlib.contextmanager
def tinyproxy(place: Path) -> Iterator[int]:
    """Its port. Raises FileNotFoundError where it is not installed."""
    program = shutil.which("tinyproxy", path="/usr/local/bin:/usr/bin:/bin:/usr/sbin")
    if program is None:
        raise FileNotFoundError("tinyproxy is not installed")
    port = free_port()
    settings = place / "tinyproxy.conf"
    settings.write_text(f"Port {port}\nListen 127.0.0.1\nTimeout 60\nMaxClients 100\nLogLevel Critical\n")
    with _listening([program, "-d", "-c", str(settings)], port, place):
        yield port


@contextlib.contextmanager
def mitmproxy(place: Path, *, authority: Path | None = None) -> Iterator[tuple[int, Path]]:
    """Its port, and its own authority. It looks into TLS where it is given an ``authority`` to trust outside, else it
    only carries bytes. Raises FileNotFoundError where it is not installed."""
    program = shutil.which("mitmdump") or shutil.which("mitmdump", path=str(_OWN))
    if program is None:
        raise FileNotFoundError("mitmproxy is not installed")
    port, own = free_port(), place / "mitmproxy"
    argv = [program, "-q", "--listen-host", "127.0.0.1", "-p", str(port), "--set", f"confdir={own}"]
    if authority is None:
        argv += ["--ignore-hosts", ".*"]
    else:
        argv += ["--set", f"ssl_verify_upstream_trusted_ca={authority}", "--set", "stream_large_bodies=1m"]
        argv += ["--set", "http2=false"]
    with _listening(argv, port, place):
        yield port, own / "mitmproxy-ca-cert.pem"
