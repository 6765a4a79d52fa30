"""The servers of the little internet: the first process of their namespaces, whose end is the end of all.

``python -m tests.internet.serve DIRECTORY OWNER`` by world.py: OWNER is a pidfd. It says ``here`` once it runs, waits
for ``go`` (the link is there), makes addresses and servers, writes ``internet.json`` and says ``ready``. It ends when
its standard input does, or its owner.
"""

from __future__ import annotations

import asyncio
import json
import os
import shutil
import subprocess
import sys
import traceback
from functools import partial
from pathlib import Path

from tests.internet import http1, http2, lookup, packages, places, repositories, services, shell, web
from tests.internet.keys import Authority
from tests.internet.records import Recorder
from tests.internet.streams import Handler, listen, secured
from tests.internet.wire import Wire

FLUSH = 0.01


def _ip(*words: str) -> None:
    subprocess.run(["ip", *words], check=True, timeout=10, stdin=subprocess.DEVNULL)


def _configure() -> bool:
    """Addresses and routes of this namespace. Every address of the ranges is its own (the kernel's "AnyIP"). Returns
    whether there is IPv6."""
    _ip("link", "set", "lo", "up")
    _ip("addr", "add", f"{places.ROUTER4}/30", "dev", places.INNER_LINK)
    _ip("link", "set", places.INNER_LINK, "up")
    _ip("route", "add", "local", places.RANGE4, "dev", "lo")
    _ip("route", "add", "blackhole", places.PLACES["blackhole"].ipv4, "table", "local")
    _ip("route", "add", "prohibit", places.PLACES["prohibited"].ipv4, "table", "local")
    # Without it the kernel drops in silence what is prohibited. There is nowhere to forward to.
    Path("/proc/sys/net/ipv4/ip_forward").write_text("1")
    Path("/proc/sys/net/ipv4/icmp_ratelimit").write_text("0")
    if not Path("/proc/sys/net/ipv6").exists():
        return False
    Path("/proc/sys/net/ipv6/conf/all/disable_ipv6").write_text("0")
    Path("/proc/sys/net/ipv6/ip_nonlocal_bind").write_text("1")
    Path("/proc/sys/net/ipv6/conf/all/forwarding").write_text("1")
    Path("/proc/sys/net/ipv6/icmp/ratelimit").write_text("0")
    _ip("-6", "addr", "add", f"{places.ROUTER6}/64", "dev", places.INNER_LINK, "nodad")
    _ip("-6", "route", "add", "local", places.RANGE6, "dev", "lo")
    _ip("-6", "route", "add", "blackhole", places.PLACES["blackhole"].ipv6, "table", "local")
    _ip("-6", "route", "add", "prohibit", places.PLACES["prohibited"].ipv6, "table", "local")
    return True


def handlers(directory: Path, authority: Authority, zone: lookup.Zone) -> dict[tuple[str, str], Handler]:
    """(place, service) -> handler; place "" stands for any."""
    contexts = authority.contexts()
    found: dict[tuple[str, str], Handler] = {
        ("", "http"): http1.server(web.web),
        ("api", "http"): http1.server(web.api),
        ("", "https"): secured(contexts["https"], http2.server(web.web)),
        ("api", "https"): secured(contexts["https"], http2.server(web.api)),
        ("", "metadata"): http1.server(web.metadata),
        ("", "control"): services.control,
        ("", "sink"): services.sink,
        ("", "proxy"): services.proxy,
        ("", "socks"): services.socks,
        ("", "stratum"): services.stratum,
        ("", "smtp"): services.smtp,
        ("", "dns"): lookup.server(zone),
        ("", "ssh"): shell.start(directory),
        ("", "git"): secured(contexts["https1"], http1.server(repositories.start(directory))),
        ("", "pypi"): secured(contexts["https1"], http1.server(packages.pypi())),
        ("", "npm"): secured(contexts["https1"], http1.server(packages.npm())),
        ("", "apt"): http1.server(packages.apt()),
    }
    for service in ("https1", "tls12", "expired", "wrongname", "selfsigned"):
        found["", service] = secured(contexts[service], http1.server(web.web))
    return found


def _given(protocol: lookup.Datagrams) -> lookup.Datagrams:
    return protocol


async def _serve(directory: Path, owner: int) -> None:
    loop = asyncio.get_running_loop()
    over = asyncio.Event()
    loop.add_reader(owner, over.set)
    await loop.run_in_executor(None, sys.stdin.readline)
    ipv6 = _configure()
    shell.add_user(directory)
    with (directory / "record.jsonl").open("w") as file:
        recorder, zone = Recorder(file), lookup.Zone()
        by_service = handlers(directory, Authority(directory), zone)
        served: set[tuple[str, str, int]] = set()
        for key, place in places.PLACES.items():
            for port, service in place.ports:
                handler = by_service.get((key, service)) or by_service["", service]
                for address in (place.ipv4, place.ipv6)[: 1 + ipv6]:
                    await listen(recorder, service, address, port, handler)
                    served.add(("tcp", address, port))
        dns = places.PLACES["dns"]
        for address in (dns.ipv4, dns.ipv6)[: 1 + ipv6]:
            protocol = lookup.Datagrams(zone, recorder, address)
            await loop.create_datagram_endpoint(partial(_given, protocol), local_addr=(address, 53))
            served.add(("udp", address, 53))
        Wire(recorder, places.INNER_LINK, served)
        described = {"directory": str(directory), "ipv6": ipv6, **shell.described(directory)}
        (directory / "internet.json").write_text(json.dumps(described))
        print("ready", flush=True)

        def input_ends() -> None:
            if not os.read(0, 4096):
                over.set()

        loop.add_reader(0, input_ends)
        while not over.is_set():
            recorder.flush()
            await asyncio.sleep(FLUSH)


def main() -> None:
    """Runs until the owner wants no more; then nothing is left of the directory, the processes and the namespaces."""
    directory, owner = Path(sys.argv[1]), int(sys.argv[2])
    print("here", flush=True)
    try:
        asyncio.run(_serve(directory, owner))
    except BaseException:
        traceback.print_exc()
        print("failed", flush=True)
    finally:
        shutil.rmtree(directory, ignore_errors=True)
        os._exit(0)  # as init of its namespace, it takes every other process along


if __name__ == "__main__":
    main()
