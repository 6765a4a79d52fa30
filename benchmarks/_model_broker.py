"""What the model broker costs: the first token, many streams at a pace and as fast as they go, and a crowd of them.

Upstream, broker and clients are processes of their own (:mod:`_model_peers`) on loopback. Straight to the upstream,
through the broker, and through LiteLLM's proxy, in turns. LiteLLM is taken from ``LITELLM``, or from a virtual
environment ``build/litellm-venv`` of this checkout, if it is there.
"""

from __future__ import annotations

import asyncio
import contextlib
import json
import os
import socket
import statistics
import subprocess
import sys
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from _common import Row, p95, say

PEERS = Path(__file__).with_name("_model_peers.py")
LITELLM = Path(os.environ.get("LITELLM", PEERS.parent.parent / "build" / "litellm-venv" / "bin" / "litellm"))
DIRECT = "direct"
FIRST = 2.0
"""Milliseconds that the first token may take longer."""
THROUGHPUT = 1.03
"""Times what as many streams take directly."""
STREAMS, CROWD = 200, 1000
PACE, CROWD_PACE = 20, 100
"""Milliseconds from one token of a stream to the next."""
_KEY = "sk-benchmark-only-0123456789"
_CONFIG = """
model_list:
  - model_name: "*"
    litellm_params: {{model: "openai/*", api_base: "{upstream}", api_key: "a-key-that-only-the-upstream-sees"}}
general_settings: {{master_key: "{key}"}}
litellm_settings: {{telemetry: false}}
"""


def _free_port() -> int:
    with socket.socket() as sock:
        sock.bind(("127.0.0.1", 0))
        port: int = sock.getsockname()[1]
        return port


@dataclass
class World:
    """All that runs."""

    upstream: int
    broker: int
    process: subprocess.Popen[str]
    litellm: int | None = None

    def used(self) -> dict[str, float]:
        """Processor seconds of the broker, and its peak of memory."""
        assert self.process.stdin is not None and self.process.stdout is not None
        self.process.stdin.write("\n")
        self.process.stdin.flush()
        found: dict[str, float] = json.loads(self.process.stdout.readline())
        return found


@contextlib.contextmanager
def _running(argv: Sequence[str], **rest: Any) -> Iterator[subprocess.Popen[str]]:
    process = subprocess.Popen(argv, text=True, **rest)
    try:
        yield process
    finally:
        process.terminate()
        process.wait(10)


@contextlib.contextmanager
def _peer(role: str, *arguments: str) -> Iterator[tuple[int, subprocess.Popen[str]]]:
    port = _free_port()
    argv = [sys.executable, str(PEERS), role, "--port", str(port), *arguments]
    with _running(argv, stdin=subprocess.PIPE, stdout=subprocess.PIPE) as process:
        assert process.stdout is not None
        if process.stdout.readline() != "ready\n":
            raise RuntimeError(f"the {role} did not start")
        yield port, process


@contextlib.contextmanager
def world(workspace: Path, *, litellm: bool) -> Iterator[World]:
    with contextlib.ExitStack() as stack:
        upstream, _ = stack.enter_context(_peer("upstream"))
        url = f"http://127.0.0.1:{upstream}/v1"
        broker, process = stack.enter_context(_peer("broker", "--upstream", url))
        made = World(upstream, broker, process)
        if litellm and LITELLM.exists():
            made.litellm = _free_port()
            config = workspace / "litellm.yaml"
            config.write_text(_CONFIG.format(upstream=url, key=_KEY))
            argv = [str(LITELLM), "--config", str(config), "--host", "127.0.0.1", "--port", str(made.litellm)]
            environment = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"}
            environment |= {"LITELLM_LOCAL_MODEL_COST_MAP": "True", "NO_PROXY": "*"}
            quiet = {"stdout": subprocess.DEVNULL, "stderr": subprocess.DEVNULL, "stdin": subprocess.DEVNULL}
            peer = stack.enter_context(_running(argv, env=environment, cwd=workspace, **quiet))
            _wait(made.litellm, peer)
        _crowd(made.broker, "paced-1-3", "--turns", "50")  # what is imported late is
        yield made


def _wait(port: int, process: subprocess.Popen[str]) -> None:
    for _ in range(600):
        if process.poll() is not None:
            break
        with contextlib.suppress(OSError), socket.create_connection(("127.0.0.1", port), 1):
            return
        time.sleep(0.1)
    raise RuntimeError("LiteLLM did not start")


def _crowd(port: int, model: str, *arguments: str) -> dict[str, Any]:
    argv = [sys.executable, str(PEERS), "crowd", "--port", str(port), "--model", model, "--key", _KEY, *arguments]
    done = subprocess.run(argv, stdin=subprocess.DEVNULL, stdout=subprocess.PIPE, check=True, timeout=300)
    found: dict[str, Any] = json.loads(done.stdout)
    return found


def _firsts(port: int, turns: int) -> list[float]:
    return [1000 * each for each in _crowd(port, "paced-3-3", "--turns", str(turns))["firsts"]]


async def first_figure(workspace: Path, quick: bool) -> list[Row]:
    """One request after another, on a connection that is there."""
    turns, rounds = (100, 2) if quick else (200, 5)
    with world(workspace, litellm=True) as made:
        direct: list[float] = []
        ours: list[float] = []
        theirs: list[float] = []
        for _ in range(rounds):
            direct += await asyncio.to_thread(_firsts, made.upstream, turns)
            ours += await asyncio.to_thread(_firsts, made.broker, turns)
            if made.litellm is not None:
                theirs += await asyncio.to_thread(_firsts, made.litellm, turns // 4)
    middle = statistics.median(direct)
    rows = [
        Row("model: first token, added", "ms", statistics.median(ours) - middle, p95(ours) - middle, bar=FIRST),
        Row("model: first token, direct", "ms", middle, p95(direct)),
    ]
    return [*rows, _peer_row("model: first token", "ms", ours, theirs)]


def _peer_row(figure: str, unit: str, ours: list[float], theirs: list[float]) -> Row:
    if not theirs:
        return Row(f"{figure}, LiteLLM", note=f"skipped: there is no {LITELLM}")
    middle, other = statistics.median(ours), statistics.median(theirs)
    return Row(figure, unit, middle, p95(ours), "LiteLLM", other, p95(theirs), middle / other, bar=1.0)


async def paced_figure(workspace: Path, quick: bool) -> list[Row]:
    """As many streams as the bar is for, at the rate at which a model talks."""
    tokens = 200 if quick else 400
    model, arguments = f"paced-{PACE}-{tokens}", ("--streams", str(STREAMS), "--ramp", "2")
    direct: list[dict[str, Any]] = []
    ours: list[dict[str, Any]] = []
    theirs: list[dict[str, Any]] = []
    with world(workspace, litellm=True) as made:
        for _ in range(1 if quick else 3):
            direct.append(await asyncio.to_thread(_crowd, made.upstream, model, *arguments))
            before = made.used()["cpu"]
            ours.append(await asyncio.to_thread(_crowd, made.broker, model, *arguments))
            ours[-1]["broker"] = made.used()["cpu"] - before
        if made.litellm is not None:
            say("LiteLLM, which takes its time")
            theirs.append(await asyncio.to_thread(_crowd, made.litellm, f"paced-{PACE}-100", *arguments))
    whole = [[1000 * each["whole_p50"] for each in runs] for runs in (ours, direct)]
    ratio = statistics.median(whole[0]) / statistics.median(whole[1])
    first = statistics.median(1000 * (o["first_p50"] - d["first_p50"]) for o, d in zip(ours, direct, strict=True))
    last = statistics.median(1000 * (o["first_p99"] - d["first_p99"]) for o, d in zip(ours, direct, strict=True))
    events = STREAMS * tokens
    each = statistics.median(run["broker"] for run in ours) / events * 1e6
    name = f"model: {STREAMS} streams, {1000 // PACE} tokens/s each"
    rows = [
        Row(f"{name}: time of a stream", "ms", *_two(whole[0]), DIRECT, *_two(whole[1]), ratio, bar=THROUGHPUT),
        Row(f"{name}: first token, added", "ms", first, note=f"p99: {last:.1f} ms", bar=FIRST),
        Row(f"{name}: processor for a token", "µs", each),
    ]
    if theirs:
        # Theirs are shorter streams, lest it takes minutes: what counts is how much longer than they should take.
        slower = 1000 * theirs[0]["whole_p50"] / (PACE * 100)
        ours_slower = statistics.median(whole[0]) / (PACE * tokens)
        rows.append(
            Row(
                f"{name}: times too slow", "", ours_slower, None, "LiteLLM", slower, None, ours_slower / slower, bar=1.0
            )
        )
    return rows


def _two(samples: list[float]) -> tuple[float, float]:
    return statistics.median(samples), p95(samples)


async def fast_figure(workspace: Path, quick: bool) -> list[Row]:
    """As many streams as fast as they are taken: what a processor can carry. No model talks so fast."""
    model = "fast-1280" if quick else "fast-3200"
    with world(workspace, litellm=False) as made:
        runs = [
            await asyncio.to_thread(_crowd, port, model, "--streams", str(STREAMS), "--ramp", "0.1")
            for port in (made.upstream, made.broker)
        ]
    direct, ours = (run["bytes"] / run["span"] / 1e6 for run in runs)
    return [Row(f"model: {STREAMS} streams, unpaced", "MB/s", ours, None, DIRECT, direct, None, ours / direct)]


async def crowd_figure(workspace: Path, _quick: bool) -> list[Row]:
    """A thousand at one time."""
    # A hundred more begin each second. With two hundred the broker's one processor is full when nearly all are there,
    # and who comes last waits for most of a second.
    model, arguments = f"paced-{CROWD_PACE}-150", ("--streams", str(CROWD), "--ramp", "10")
    with world(workspace, litellm=False) as made:
        direct = await asyncio.to_thread(_crowd, made.upstream, model, *arguments)
        before = made.used()
        ours = await asyncio.to_thread(_crowd, made.broker, model, *arguments)
        after = made.used()
    name = f"model: {CROWD} streams, {1000 // CROWD_PACE} tokens/s each"
    return [
        Row(f"{name}: time of a stream", "ms", 1000 * ours["whole_p50"], 1000 * ours["whole_p99"], DIRECT,
            1000 * direct["whole_p50"], 1000 * direct["whole_p99"], ours["whole_p50"] / direct["whole_p50"],
            note="the second figure is p99"),
        Row(f"{name}: first token, added", "ms", 1000 * (ours["first_p50"] - direct["first_p50"]),
            1000 * (ours["first_p99"] - direct["first_p99"]), note="the second figure is p99"),
        Row(f"{name}: memory of a stream", "KiB", (after["peak_kib"] - before["peak_kib"]) / CROWD),
        Row(f"{name}: processors", "", (after["cpu"] - before["cpu"]) / ours["span"]),
    ]  # fmt: skip
