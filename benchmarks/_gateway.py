"""What the way out costs: a start, a connection, a query, a stream, one that is looked at, idle connections, crowds."""

from __future__ import annotations

import asyncio
import contextlib
import os
import statistics
import subprocess
import threading
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path

from _common import Contender, Row, compare, in_turns, p95, say
from _gateway_peers import mitmproxy, tinyproxy
from _gateway_world import (
    NAME,
    TLS_CLIENT,
    TLS_SERVER,
    compile_flows,
    compile_relay,
    hello,
    make_certificates,
    naming,
    policy,
    running,
)
from _scale import affordable

from corral import Sandbox
from corral.policy.model import Policy

DIRECT = "direct"
RELAY = "relay in C"
"""relay.c, which does nothing but carry."""
LOOPBACK = "127.0.0.1"
PYTHON = "/usr/bin/python3"
TWICE, AND_MORE = 2.0, 0.3
"""A connection may take so many times what it takes directly, and so many milliseconds."""
STREAM = 1 / 0.6
"""Times what a stream takes directly."""
INTERCEPTED = 1 / 5
"""Times what it takes through mitmproxy."""
QUERY = 1.0
"""Milliseconds."""
EACH = 200.0
"""Microseconds from one new connection to the next, of all sandboxes together: 5,000 a second."""
IDLE = 30.0
"""KiB of an idle connection."""
CROWD = 100
AT_ONCE = 8
HELD = 1000
_MEBIBYTE = 1 << 20


def _outside(argv: Sequence[str]) -> str:
    done = subprocess.run(argv, stdin=subprocess.DEVNULL, stdout=subprocess.PIPE, check=True, timeout=120)
    return done.stdout.decode()


async def _inside(box: Sandbox, argv: Sequence[str]) -> str:
    result = await box.exec(argv, timeout=120)
    assert result.exit_code == 0, result.text
    return result.stdout.decode()


def _nanoseconds(text: str) -> list[float]:
    """Seconds of what a program has printed, a line each."""
    return [int(line.split()[0]) / 1e9 for line in text.splitlines()]


def _skipped(figures: Sequence[str], error: Exception) -> list[Row]:
    return [Row(figure, note=f"skipped: {error}") for figure in figures]


# ---- one connection, one query ----


async def connect_figure(workspace: Path, rounds: int) -> list[Row]:
    """From connect(2) to the first byte, for SSH and for TLS, and the same for queries."""
    try:
        flows, relay = str(compile_flows(workspace)), str(compile_relay(workspace))
    except FileNotFoundError as error:
        return _skipped(("connect", "DNS"), error)
    said = workspace / "hello"
    said.write_bytes(hello())
    count = "50"
    with naming() as resolver, running(flows, "echo") as port, running(relay, str(port)) as relayed:
        async with Sandbox(workspace, policy=policy(resolver, port)) as box:
            words = {"SSH": (str(port), count), "TLS": (str(port), count, str(said))}
            samples: dict[str, list[float]] = {}

            def gather(key: str, text: str) -> float:
                found = _nanoseconds(text)
                samples.setdefault(key, []).extend(found)
                return sum(found)

            def within(key: str, *argv: str) -> Contender:
                async def contender() -> float:
                    return gather(key, await _inside(box, [flows, *argv]))

                return contender

            def without(key: str, *argv: str) -> Contender:
                async def contender() -> float:
                    return gather(key, _outside([flows, *argv]))

                return contender

            contenders: dict[str, Contender] = {}
            for kind, arguments in words.items():
                contenders[kind] = within(kind, "connect", NAME, *arguments)
                contenders[f"{kind} {DIRECT}"] = without(f"{kind} {DIRECT}", "connect", LOOPBACK, *arguments)
                through = without(f"{kind} {RELAY}", "connect", LOOPBACK, str(relayed), *arguments[1:])
                contenders[f"{kind} {RELAY}"] = through
            for kind in ("fresh", "kept"):
                contenders[kind] = within(kind, "query", NAME, count, kind)
            await in_turns(contenders, rounds, warm_up=0)
    rows = []
    for kind in words:
        theirs = samples[f"{kind} {DIRECT}"]
        bar = TWICE + AND_MORE / (statistics.median(theirs) * 1e3)
        note = f"the bar is {TWICE:g} x {DIRECT} + {AND_MORE:g} ms = {bar * statistics.median(theirs) * 1e3:.2f} ms"
        rows.append(compare(f"connect + first byte, {kind}", samples[kind], DIRECT, theirs, bar=bar, note=note))
        rows.append(compare(f"connect + first byte, {kind}", samples[kind], RELAY, samples[f"{kind} {RELAY}"]))
    for kind, title in (("fresh", "DNS: socket, connect, answer"), ("kept", "DNS: an answer")):
        own = samples[kind]
        rows.append(Row(title, "ms", statistics.median(own) * 1e3, p95(own) * 1e3, bar=QUERY))
    return rows


# ---- a start ----


async def start_figure(workspace: Path, rounds: int) -> list[Row]:
    """A sandbox from nothing to its end, with a way out and without."""

    def contender(rules: Policy) -> Contender:
        async def start() -> float:
            began = time.perf_counter()
            async with Sandbox(workspace, policy=rules):
                return time.perf_counter() - began

        return start

    contenders = {"with": contender(policy(53, 443)), "without": contender(Policy())}
    samples = await in_turns(contenders, rounds)
    return [compare("start of a sandbox with a way out", samples["with"], "without one", samples["without"])]


# ---- one stream ----


async def stream_figure(workspace: Path, quick: bool) -> list[Row]:
    """A large download that is only carried."""
    try:
        flows, relay = str(compile_flows(workspace)), str(compile_relay(workspace))
    except FileNotFoundError as error:
        return _skipped(("stream",), error)
    size = (128 if quick else 512) * _MEBIBYTE
    missing: dict[str, str] = {}
    async with contextlib.AsyncExitStack() as stack:
        resolver, port = stack.enter_context(naming()), stack.enter_context(running(flows, "source", str(size)))
        box = await stack.enter_async_context(Sandbox(workspace, policy=policy(resolver, port)))

        def checked(text: str) -> float:
            taken, got = text.split()
            assert int(got) == size, text
            return int(taken) / 1e9

        async def ours() -> float:
            return checked(await _inside(box, [flows, "drain", NAME, str(port)]))

        def outside(to: int, *proxy: str) -> Contender:
            async def contender() -> float:
                return checked(_outside([flows, "drain", LOOPBACK, str(to), *proxy]))

            return contender

        relayed = stack.enter_context(running(relay, str(port)))
        contenders: dict[str, Contender] = {"corral": ours, DIRECT: outside(port), RELAY: outside(relayed)}
        starts: dict[str, Callable[[], int]] = {
            "tinyproxy": lambda: stack.enter_context(tinyproxy(workspace)),
            "mitmproxy": lambda: stack.enter_context(mitmproxy(workspace))[0],
        }
        for name, enter in starts.items():
            try:
                contenders[name] = outside(port, str(enter()))
            except (FileNotFoundError, RuntimeError) as error:
                missing[name] = str(error)
        samples = await in_turns(contenders, 3 if quick else 9, warm_up=1)
    title = f"stream: {size // _MEBIBYTE} MiB, carried"
    rows = _against(title, size, samples, {DIRECT: STREAM, "tinyproxy": 1.0, "mitmproxy": 1.0})
    return rows + [Row(title, peer=peer, bar=1.0, note=f"skipped: {why}") for peer, why in missing.items()]


def _against(title: str, size: int, samples: Mapping[str, Sequence[float]], bars: Mapping[str, float]) -> list[Row]:
    """What ``size`` bytes took us, compared with each of the others."""
    rates = {name: f"{size / statistics.median(taken) / 1e9:.2f} GB/s" for name, taken in samples.items()}
    return [
        compare(title, samples["corral"], peer, samples[peer], bar=bars.get(peer), note=f"{rates['corral']} to {rate}")
        for peer, rate in rates.items()
        if peer != "corral"
    ]


# ---- one stream that is looked at ----


async def intercepted_figure(workspace: Path, quick: bool) -> list[Row]:
    """A large answer of HTTP within TLS that is ended in between."""
    size = (16 if quick else 64) * _MEBIBYTE
    title = f"stream: {size // _MEBIBYTE} MiB, TLS looked into"
    authority, chain = make_certificates(workspace)
    client = [PYTHON, "-c", TLS_CLIENT]
    before = os.environ.get("SSL_CERT_FILE")
    os.environ["SSL_CERT_FILE"] = str(authority)  # what the gateway trusts
    missing = ""
    try:
        async with contextlib.AsyncExitStack() as stack:
            resolver = stack.enter_context(naming())
            port = stack.enter_context(running(PYTHON, "-c", TLS_SERVER, str(chain), str(size)))
            rules = policy(resolver, port, "intercept: true", protocols=("tls",))
            box = await stack.enter_async_context(Sandbox(workspace, policy=rules))
            arguments = (str(port), str(size), NAME)

            async def ours() -> float:
                return _nanoseconds(await _inside(box, [*client, NAME, *arguments, "", ""]))[0]

            def outside(trusted: Path, proxy: str) -> Contender:
                async def contender() -> float:
                    return _nanoseconds(_outside([*client, LOOPBACK, *arguments, str(trusted), proxy]))[0]

                return contender

            contenders: dict[str, Contender] = {"corral": ours, DIRECT: outside(authority, "")}
            try:
                proxy, own = stack.enter_context(mitmproxy(workspace, authority=authority))
                contenders["mitmproxy"] = outside(own, str(proxy))
            except (FileNotFoundError, RuntimeError) as error:
                missing = str(error)
            samples = await in_turns(contenders, 3 if quick else 9, warm_up=1)
    finally:
        if before is None:
            del os.environ["SSL_CERT_FILE"]
        else:
            os.environ["SSL_CERT_FILE"] = before
    rows = _against(title, size, samples, {"mitmproxy": INTERCEPTED})
    return rows + ([Row(title, peer="mitmproxy", bar=INTERCEPTED, note=f"skipped: {missing}")] if missing else [])


# ---- a crowd ----


def _seconds_of(name: str) -> float:
    """Processor time of one of our threads."""
    (thread,) = (thread for thread in threading.enumerate() if thread.name == name)
    assert thread.ident is not None
    return time.clock_gettime(time.pthread_getcpuclockid(thread.ident))


def _churned(flows: str, port: int, count: int, seconds: float) -> float:
    """New connections a second of so many programs without sandboxes."""
    argv = [flows, "churn", LOOPBACK, str(port), str(seconds)]
    programs = [subprocess.Popen(argv, stdin=subprocess.DEVNULL, stdout=subprocess.PIPE) for _ in range(count)]
    return sum(len(program.communicate()[0].splitlines()) for program in programs) / seconds


async def crowd_figure(workspace: Path, quick: bool) -> list[Row]:
    """New connections of many sandboxes at once."""
    try:
        flows, relay = str(compile_flows(workspace)), str(compile_relay(workspace))
    except FileNotFoundError as error:
        return _skipped(("crowd",), error)
    wanted, note = affordable(20 if quick else CROWD)
    seconds = 3.0 if quick else 10.0
    with naming() as resolver, running(flows, "echo") as port, running(relay, str(port)) as relayed:
        rules = policy(resolver, port)
        boxes = [Sandbox(workspace, policy=rules) for _ in range(wanted)]
        gate = asyncio.Semaphore(AT_ONCE)

        async def start(box: Sandbox) -> None:
            async with gate:
                await box.start()
                await box.exec([flows, "connect", NAME, str(port), "5"], check=True)

        try:
            await asyncio.gather(*(start(box) for box in boxes))
            say(f"  {len(boxes)} sandboxes")
            threads = ("corral-supervisor", "corral-gateway")
            before, began = [_seconds_of(name) for name in threads], time.perf_counter()
            work = [_inside(box, [flows, "churn", NAME, str(port), str(seconds)]) for box in boxes]
            texts = await asyncio.gather(*work)
            elapsed = time.perf_counter() - began
            busy = [(_seconds_of(name) - since) / elapsed for name, since in zip(threads, before, strict=True)]
            taken = sorted(second for text in texts for second in _nanoseconds(text))
        finally:
            await asyncio.gather(*(box.close() for box in boxes), return_exceptions=True)
        ways = {DIRECT: port, RELAY: relayed}
        outside = {name: _churned(flows, where, len(boxes), seconds) for name, where in ways.items()}
    # Programs start one after another, within less than a second, and each works as long as the others.
    rate = len(taken) / seconds
    high = taken[min(len(taken) - 1, int(len(taken) * 0.99))]
    shares = zip(threads, busy, strict=True)
    used = ", ".join(f"{name.removeprefix('corral-')} {share * 100:.0f} %" for name, share in shares)
    others = ", ".join(f"{name} {count:.0f}" for name, count in outside.items())
    title = f"crowd: {len(boxes)} sandboxes"
    return [
        Row(
            f"{title}: one new connection",
            "µs",
            1e6 / rate,
            bar=EACH,
            note=f"{rate:.0f} a second; {others}; processor of {used} {note}".strip(),
        ),
        Row(f"{title}: connect + first byte", "ms", statistics.median(taken) * 1e3, p95(taken) * 1e3),
        Row(f"{title}: connect + first byte, p99", "ms", high * 1e3),
    ]


# ---- idle connections ----


def _resident() -> int:
    """Bytes of memory that this process holds."""
    with open("/proc/self/statm", encoding="ascii") as file:
        return int(file.read().split()[1]) * os.sysconf("SC_PAGESIZE")


def _of_kernel() -> int:
    """Bytes of the kernel's own objects, of the whole machine (Slab)."""
    with open("/proc/meminfo", encoding="ascii") as lines:
        return next(int(line.split()[1]) for line in lines if line.startswith("Slab:")) * 1024


async def idle_figure(workspace: Path, quick: bool) -> list[Row]:
    """What connections hold that carry nothing."""
    try:
        flows = str(compile_flows(workspace))
    except FileNotFoundError as error:
        return _skipped(("idle",), error)
    count, note = affordable(200 if quick else HELD)
    with naming() as resolver, running(flows, "echo") as port:
        rules = policy(resolver, port, "limits: {connections: 2000}")
        async with Sandbox(workspace, policy=rules) as box:
            await box.exec([flows, "connect", NAME, str(port), "50"], check=True)
            resident, kernel = _resident(), _of_kernel()
            process = await box.start_process([flows, "hold", NAME, str(port), str(count)])
            ready = await asyncio.wait_for(process.stdout.readline(), 60)
            assert ready == b"ready\n", await process.stderr.read()
            await asyncio.sleep(1)
            live = len(box.core.supervision.egress.flows)  # type: ignore[union-attr]
            assert live == count, live
            ours, theirs = _resident() - resident, _of_kernel() - kernel
            process.kill()
    note = (
        f"the kernel: {theirs / count / 1024:.0f} KiB for the four sockets of each, two of them the ends' own. {note}"
    )
    return [Row(f"idle: {count} connections, memory of each", "KiB", ours / count / 1024, bar=IDLE, note=note.strip())]
