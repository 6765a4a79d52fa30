"""A little internet for tests: namespaces, a link to them, and servers that write down what reaches them.

::

    with Internet() as internet:  # as root
        ...                       # the agent does something
        assert internet.arrived("203.0.113.66") == 0
        assert [query.name for query in internet.records(service="dns")] == ["web.test"]
        internet.clear()

A network namespace has one at a time (addresses are fixed): the next one waits. Under ``unshare --net`` it stands
beside the host's. It is gone when the ``with`` block ends, or this process, however it ends: the servers hold a pidfd
of it, they are the only ones who hold their namespaces, and the link goes with those.

``python -m tests.internet.world PID`` makes one for others until process PID ends or a SIGTERM comes, and prints where
it is described, for :meth:`Internet.join` by a user who could not make one.
"""

from __future__ import annotations

import json
import os
import select
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from contextlib import ExitStack, suppress
from ipaddress import ip_network
from pathlib import Path
from types import TracebackType
from typing import Any, Self

from tests.internet import places
from tests.internet.records import Arrival, Reader

LOCK = "\0corral-internet"
WAIT = float(os.environ.get("CORRAL_INTERNET_WAIT", "150"))
"""Seconds to wait for another little internet to end."""
START = 30.0
STOP = 5.0


class InternetError(Exception):
    """Why there is none."""


class Internet:
    """Making it needs root. Not thread-safe.

    Raises InternetError from ``with``: not root, no namespaces, ranges in use, another one that does not end.
    """

    def __init__(self) -> None:
        self._held = ExitStack()
        self._server: subprocess.Popen[bytes] | None = None
        self._described: dict[str, Any] = {}
        self._reader: Reader | None = None

    # ---- what there is ----

    resolver = places.PLACES["dns"].ipv4
    resolver6 = places.PLACES["dns"].ipv6
    addresses = {key: place.ipv4 for key, place in places.PLACES.items()}
    addresses6 = {key: place.ipv6 for key, place in places.PLACES.items()}
    names = places.names()
    token = places.TOKEN
    host = places.HOST4
    """The host itself, as the little internet sees it: where its connections come from."""

    @property
    def directory(self) -> Path:
        """Readable by everybody."""
        return Path(self._described["directory"])

    @property
    def description(self) -> Path:
        """What :meth:`join` wants."""
        return self.directory / "internet.json"

    @property
    def ca_file(self) -> Path:
        """The CA of the web servers, PEM."""
        return self.directory / "ca.pem"

    @property
    def ipv6(self) -> bool:
        """Whether the host has IPv6."""
        return bool(self._described["ipv6"])

    @property
    def ssh_key(self) -> str:
        """The private key that the SSH servers know, as user ``git``. ssh wants it in a file of mode 0600."""
        return str(self._described["ssh_key"])

    @property
    def known_hosts(self) -> str:
        """Lines for ssh."""
        return str(self._described["known_hosts"])

    def fingerprint(self, service: str) -> str:
        """SHA-256 of a certificate: ``https``, ``https1``, ``tls12``, ``expired``, ``wrongname``, ``selfsigned``."""
        return (self.directory / f"{service}.sha256").read_text()

    # ---- what arrived ----

    def records(
        self, *, service: str | None = None, address: str | None = None, port: int | None = None
    ) -> list[Arrival]:
        """What has arrived since :meth:`clear`, complete up to this call. ``address``: an address or a name."""
        self._barrier()
        assert self._reader is not None
        wanted = None if address is None else self._addresses_of(address)
        return [
            found
            for found in self._reader.read()
            if found.service != "control"
            and (service is None or found.service == service)
            and (wanted is None or found.address in wanted)
            and (port is None or found.port == port)
        ]

    def arrived(self, address: str | None = None, port: int | None = None, *, service: str | None = None) -> int:
        """Bytes of payload. Zero can still mean that a connection was made: ``records`` tells."""
        return sum(found.bytes for found in self.records(service=service, address=address, port=port))

    def clear(self) -> None:
        """Forgets what has arrived."""
        self._barrier()
        assert self._reader is not None
        self._reader.clear()

    def _addresses_of(self, text: str) -> set[str]:
        place = next((place for place in places.PLACES.values() if text in (place.ipv4, *place.names)), None)
        place = places.PLACES.get(text, place)
        return {text} if place is None else {place.ipv4, place.ipv6}

    def _barrier(self) -> None:
        with socket.create_connection((places.PLACES["control"].ipv4, places.CONTROL_PORT), timeout=10) as control:
            control.sendall(b".")
            if control.recv(1) != b".":
                raise InternetError(f"the servers are gone: {self._log()}")

    def _log(self) -> str:
        with suppress(OSError):
            return (self.directory / "log").read_text(errors="replace")[-2000:]
        return "without a word"

    # ---- making and removing ----

    @classmethod
    def join(cls, description: Path) -> Internet:
        """One that another process has made, and removes."""
        internet = cls()
        internet._use(description)
        return internet

    def _use(self, description: Path) -> None:
        self._described = json.loads(description.read_text())
        self._reader = Reader(self.directory / "record.jsonl")
        self.clear()

    def __enter__(self) -> Self:
        with ExitStack() as undo:
            undo.callback(self._held.close)
            self._make()
            undo.pop_all()
        return self

    def __exit__(self, _kind: type[BaseException] | None, _: BaseException | None, _at: TracebackType | None) -> None:
        self._held.close()

    def _make(self) -> None:
        if os.geteuid():
            raise InternetError("only root can make namespaces that others reach")
        self._held.enter_context(_lock())
        _wait(lambda: not _linked(), STOP)
        _check_ranges()
        directory = Path(tempfile.mkdtemp(prefix="corral-internet-"))
        self._held.callback(shutil.rmtree, directory, ignore_errors=True)
        directory.chmod(0o755)
        self._described = {"directory": str(directory)}
        log = self._held.enter_context((directory / "log").open("wb"))
        owner = os.pidfd_open(os.getpid())
        self._held.callback(os.close, owner)
        command = [
            "unshare",
            "--net",
            "--mount",
            "--pid",
            "--fork",
            "--kill-child",
            "--mount-proc",
            "--",
            sys.executable,
        ]
        self._server = subprocess.Popen(
            [*command, "-m", "tests.internet.serve", str(directory), str(owner)],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=log,
            pass_fds=(owner,),
            cwd=Path(__file__).parents[2],
            start_new_session=True,
        )
        self._held.callback(self._end)
        self._hear(b"here\n")
        _link(self._server.pid)
        assert self._server.stdin is not None
        self._server.stdin.write(b"go\n")
        self._server.stdin.flush()
        self._hear(b"ready\n")
        self._use(directory / "internet.json")

    def _hear(self, word: bytes) -> None:
        """The servers' next line."""
        assert self._server is not None and self._server.stdout is not None
        ready, _, _ = select.select([self._server.stdout], [], [], START)
        if not ready or self._server.stdout.readline() != word:
            raise InternetError(f"the servers did not start: {self._log()}")

    def _end(self) -> None:
        """Ends the servers; returns when link and routes are gone too."""
        server = self._server
        assert server is not None and server.stdin is not None and server.stdout is not None
        server.stdin.close()
        try:
            server.wait(STOP)
        except subprocess.TimeoutExpired:
            server.kill()  # and, by --kill-child, what runs in the namespaces
            server.wait()
        server.stdout.close()
        if not _wait(lambda: not _linked(), STOP):
            _ip("link", "del", places.HOST_LINK)


def _ip(*words: str) -> str:
    done = subprocess.run(["ip", *words], capture_output=True, text=True, timeout=10, stdin=subprocess.DEVNULL)
    if done.returncode:
        raise InternetError(f"ip {' '.join(words)}: {done.stderr.strip()}")
    return done.stdout


def _lock() -> socket.socket:
    """Held until it is closed, or its process ends. Abstract names belong to the network namespace, as routes do."""
    held = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)

    def taken() -> bool:
        with suppress(OSError):
            held.bind(LOCK)
            return True
        return False

    if not _wait(taken, WAIT):
        held.close()
        raise InternetError(f"another little internet has run here for {WAIT:g} s")
    return held


def _linked() -> bool:
    """Whether the host's end is there. /sys may show another namespace's interfaces."""
    return any(name == places.HOST_LINK for _, name in socket.if_nameindex())


def _check_ranges() -> None:
    """Nothing of this host's own may lie where the little internet goes."""
    for family, ranges in (("-4", (places.RANGE4, places.LINK4)), ("-6", (places.RANGE6, places.LINK6))):
        for route in json.loads(_ip("-j", family, "route", "show", "table", "all") or "[]"):
            with suppress(ValueError):
                there = ip_network(route.get("dst", ""), strict=False)
                taken = [text for text in ranges if ip_network(text).overlaps(there)]
                if taken and there.prefixlen > 8:
                    raise InternetError(f"{taken[0]} is in use on this host ({there} on {route.get('dev')})")


def _link(process: int) -> None:
    """Host and little internet, joined; all of it lives as long as ``process``'s namespace."""
    inner = ("peer", "name", places.INNER_LINK, "netns", str(process))
    _ip("link", "add", places.HOST_LINK, "type", "veth", *inner)
    _ip("addr", "add", f"{places.HOST4}/30", "dev", places.HOST_LINK)
    ipv6 = Path(f"/proc/sys/net/ipv6/conf/{places.HOST_LINK}")
    if ipv6.exists():
        (ipv6 / "disable_ipv6").write_text("0")
        (ipv6 / "accept_ra").write_text("0")
        _ip("-6", "addr", "add", f"{places.HOST6}/64", "dev", places.HOST_LINK, "nodad")
    _ip("link", "set", places.HOST_LINK, "up")
    _ip("route", "add", places.RANGE4, "via", places.ROUTER4, "dev", places.HOST_LINK, "src", places.HOST4)
    if ipv6.exists():
        _ip("-6", "route", "add", places.RANGE6, "via", places.ROUTER6, "dev", places.HOST_LINK, "src", places.HOST6)


def _wait(condition: Callable[[], bool], seconds: float) -> bool:
    deadline = time.monotonic() + seconds
    while not condition():
        if time.monotonic() > deadline:
            return False
        time.sleep(0.02)
    return True


def main() -> None:
    """See the module's description."""
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(0))
    owner = os.pidfd_open(int(sys.argv[1]))
    try:
        with Internet() as internet:
            print(internet.description, flush=True)
            select.select([owner], [], [])
    except InternetError as error:
        sys.exit(f"no little internet: {error}")


if __name__ == "__main__":
    main()
