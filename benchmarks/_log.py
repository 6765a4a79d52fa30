"""What it costs to record: durable appends, verification, proofs, bytes."""

from __future__ import annotations

import gzip
import os
import statistics
import threading
import time
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

from _common import Row, p95

from corral.actions import (
    Access,
    Action,
    Ancestor,
    Decision,
    Endpoint,
    File,
    Kind,
    Origin,
    Process,
    Program,
    Subject,
    Transport,
    Verdict,
)
from corral.log.gaps import Gaps
from corral.log.index import LogIndex
from corral.log.note import KeyFile, KeyType
from corral.log.ocsf import Context
from corral.log.proof import make_proof
from corral.log.query import parse_filter
from corral.log.reader import Reader
from corral.log.records import encode
from corral.log.verify import verify_log
from corral.log.writer import Log
from corral.monitor import jsonl

_CONTEXT = Context("coder", "1", "coder", "sha256:" + "0" * 64, "session-1", "box-1", "0.1.0")
BATCHED, ASYNCHRONOUS, VERIFIED = 20_000, 60_000, 100_000
"""Records a second, at least."""
SINGLE = 2.0
"""Times the disk's own sync, at most."""
PROOF, QUERY = 1.0, 100.0
"""Milliseconds, at most."""
BESIDE = 20
"""Sessions that run at the same time in a log that several share."""


def decisions(count: int) -> Iterator[Decision]:
    """What a coding agent does, about: programs, connections, watched files, of forty processes."""
    origins = [
        Origin(
            "box-1",
            "session-1",
            number // 8,
            number // 8,
            Process(
                4000 + number,
                40 + number,
                123_456 + number,
                "/usr/bin/python3.11",
                ("python3", "-m", "pytest", "-q", f"tests/test_{number}.py"),
                (Ancestor(12, "/usr/bin/bash"), Ancestor(2, "/usr/local/bin/agent")),
            ),
        )
        for number in range(40)
    ]
    for number in range(count):
        subjects: tuple[tuple[Kind, Subject], ...] = (
            (Kind.PROCESS_EXEC, Program("/usr/bin/git", ("git", "status", "--short", str(number)), digest="ab" * 32)),
            (Kind.NET_CONNECT, Endpoint(Transport.TCP, "198.18.0.7", 443, "api.example.test")),
            (Kind.FILE_OPEN, File(f"/work/project/src/module_{number % 500}.py", Access.WRITE)),
        )
        kind, subject = subjects[number % 3]
        action = Action(kind, subject, origins[number % 40])
        yield Decision(
            action, Verdict.ALLOW, f"{kind.value}.allow[0]", "", "", "policy", number + 1, 1.79e9 + number / 1e3
        )


def entries(count: int) -> list[bytes]:
    """The same as records."""
    return [
        encode(decision, _CONTEXT, sequence=number, at=decision.at, monotonic_ns=number * 1000)
        for number, decision in enumerate(decisions(count), 1)
    ]


def new_log(place: Path) -> tuple[Log, KeyFile]:
    key = KeyFile("benchmark.example/log", KeyType.ED25519, bytes(32))
    return Log(place, key), key


def _wait_for_all(log: Log) -> None:
    said = threading.Event()
    log.when_durable(lambda error: said.set())
    said.wait()


def _rate(title: str, seconds: list[float], count: int, *, least: float | None = None, note: str = "") -> Row:
    rates = [count / each for each in seconds]
    return Row(title, "a second", statistics.median(rates), least=least, note=note)


async def append_figure(workspace: Path, quick: bool) -> list[Row]:
    """Many at once, durable; the same while nobody waits; and from what happened on, encoding included."""
    count, rounds = (20_000, 3) if quick else (100_000, 7)
    made, events = entries(count), list(decisions(count))
    durable, asynchronous, whole = [], [], []
    for number in range(rounds):
        log, _ = new_log(workspace / f"log-{number}")
        with log:
            started = time.perf_counter()
            for entry in made:
                log.submit(entry)
            asynchronous.append(time.perf_counter() - started)
            _wait_for_all(log)
            durable.append(time.perf_counter() - started)
        log, _ = new_log(workspace / f"whole-{number}")
        with log:
            started = time.perf_counter()
            for sequence, event in enumerate(events, 1):
                log.submit(encode(event, _CONTEXT, sequence=sequence, at=event.at, monotonic_ns=time.monotonic_ns()))
            _wait_for_all(log)
            whole.append(time.perf_counter() - started)
    size = statistics.mean(map(len, made))
    return [
        _rate("durable appends, in batches", durable, count, least=BATCHED, note=f"records of {size:.0f} bytes"),
        _rate("appends that nobody waits for", asynchronous, count, least=ASYNCHRONOUS),
        _rate("durable, from the decision on", whole, count, note="with OCSF and canonical JSON made of it"),
    ]


async def single_figure(workspace: Path, quick: bool) -> list[Row]:
    """One append that is waited for, while others append too, next to what the disk needs for a sync."""
    count = 200 if quick else 1000
    entry = entries(3)[2]
    syncs, waits = [], []
    fd = os.open(workspace / "file", os.O_RDWR | os.O_CREAT | os.O_APPEND)
    log, _ = new_log(workspace / "log")
    stop = threading.Event()

    def load() -> None:
        while not stop.is_set():
            log.submit(entry)
            time.sleep(0.001)

    with log:
        loader = threading.Thread(target=load)
        loader.start()
        for _ in range(count):
            started = time.perf_counter()
            log.append(entry)
            between = time.perf_counter()
            os.write(fd, entry)
            os.fdatasync(fd)
            waits.append(between - started)
            syncs.append(time.perf_counter() - between)
        stop.set()
        loader.join()
    os.close(fd)
    at = int(count * 0.99)
    ours, theirs = sorted(waits)[at], sorted(syncs)[at]
    return [
        Row(
            "one durable append under load",
            "ms",
            statistics.median(waits) * 1e3,
            p95(waits) * 1e3,
            "write + fdatasync",
            statistics.median(syncs) * 1e3,
            p95(syncs) * 1e3,
            statistics.median(waits) / statistics.median(syncs),
        ),
        Row(
            "one durable append under load, p99",
            "ms",
            ours * 1e3,
            None,
            "write + fdatasync, p99",
            theirs * 1e3,
            None,
            ours / theirs,
            bar=SINGLE,
        ),
    ]


async def verify_figure(workspace: Path, quick: bool) -> list[Row]:
    """The whole log anew, and a proof of one record."""
    count = 50_000 if quick else 300_000
    log, key = new_log(workspace / "log")
    made = entries(10_000)
    with log:
        for number in range(count):
            log.submit(made[number % len(made)])
    hashes, records, proofs = [], [], []
    for _ in range(3 if quick else 5):
        started = time.perf_counter()
        report = verify_log(workspace / "log", [key.verifier])
        hashes.append(time.perf_counter() - started)
        if not report.valid or report.checked != count:
            raise RuntimeError("the log did not verify")
        started = time.perf_counter()
        verify_log(workspace / "log", [key.verifier], look=Gaps())
        records.append(time.perf_counter() - started)
    for number in range(100):
        started = time.perf_counter()
        make_proof(workspace / "log", number * 7919 % count)
        proofs.append(time.perf_counter() - started)
    return [
        _rate(
            "verify", hashes, count, least=VERIFIED, note=f"{count} records: all hashes, from the entries to the root"
        ),
        _rate("verify, with the numbers of all sessions", records, count),
        Row("proof of one record", "ms", statistics.median(proofs) * 1e3, p95(proofs) * 1e3, bar=PROOF),
    ]


async def query_figure(workspace: Path, quick: bool) -> list[Row]:
    """An index of a whole log, and one session of it, found and read: one that ran alone, and one beside others."""
    count, each = (50_000, 250) if quick else (1_000_000, 1000)
    half = count // 2

    def session(number: int) -> tuple[int, int]:
        """Which one the record is of, and its number there. In the second half of the log BESIDE run at a time."""
        if number < half:
            return number // each, number % each
        block, place = divmod(number - half, each * BESIDE)
        return half // each + block * BESIDE + place % BESIDE, place // BESIDE

    log, _ = new_log(workspace / "log")
    with log:
        for number, decision in enumerate(decisions(count)):
            which, sequence = session(number)
            context = replace(_CONTEXT, session=f"session-{which}")
            log.submit(encode(decision, context, sequence=sequence + 1, at=decision.at, monotonic_ns=number))
    reader = Reader(workspace / "log")
    with LogIndex(workspace / "index") as index:
        started = time.perf_counter()
        if index.update(reader) != count:
            raise RuntimeError("the index is not whole")
        built = time.perf_counter() - started
        rows = [_rate("index", [built], count)]
        for title, first in (("that ran alone", 0), (f"of {BESIDE} at a time", half // each)):
            found, read = [], []
            for number in range(50):
                wanted = parse_filter([f"session=session-{first + number * 7919 % (half // each)}"])
                started = time.perf_counter()
                numbers = list(index.find(wanted))
                between = time.perf_counter()
                if len(numbers) != each or len(list(reader.some(numbers))) != each:
                    raise RuntimeError("the session is not whole")
                found.append(between - started)
                read.append(time.perf_counter() - started)
            name = f"one session {title}, of {count:,} records"
            rows += [
                Row(f"{name}: found", "ms", statistics.median(found) * 1e3, p95(found) * 1e3, bar=QUERY),
                Row(
                    f"{name}: found and read ({each} records)",
                    "ms",
                    statistics.median(read) * 1e3,
                    p95(read) * 1e3,
                    bar=QUERY,
                ),
            ]
    return rows


def auditd(decision: Decision) -> bytes:
    """The same, as auditd writes it (audit.log(5)): one event of several lines, values in hexadecimal where needed."""
    process = decision.action.origin.process
    head = f"audit({decision.at:.3f}:{decision.number})"
    subject = decision.action.subject
    lines = [
        f"type=SYSCALL msg={head}: arch=c000003e syscall=59 success=yes exit=0 a0=55d0c1a2b3f0 a1=55d0c1a2b410"
        f" a2=55d0c1a2b430 a3=8 items=1 ppid={process.inner_pid if process else 0} pid={process.pid if process else 0}"
        " auid=1000 uid=1000 gid=1000 euid=1000 suid=1000 fsuid=1000 egid=1000 sgid=1000 fsgid=1000 tty=pts0 ses=1"
        f' comm="python3" exe="{process.exe if process else ""}" key="corral"'
    ]
    if isinstance(subject, Program):
        words = " ".join(f'a{at}="{word}"' for at, word in enumerate(subject.argv))
        lines.append(f"type=EXECVE msg={head}: argc={len(subject.argv)} {words}")
    lines.append(f'type=CWD msg={head}: cwd="/work/project"')
    lines.append(
        f'type=PATH msg={head}: item=0 name="{subject}" inode=1234567 dev=08:01 mode=0100644 ouid=1000 ogid=1000'
        " rdev=00:00 nametype=NORMAL cap_fp=0 cap_fi=0 cap_fe=0 cap_fver=0 cap_frootid=0"
    )
    lines.append(f"type=PROCTITLE msg={head}: proctitle={' '.join(process.argv if process else ()).encode().hex()}")
    return "\n".join(lines).encode() + b"\n"


async def size_figure(workspace: Path, quick: bool) -> list[Row]:
    """Bytes of a record, plain and compressed, next to other forms of the same events."""
    count = 2000 if quick else 10_000
    events = list(decisions(count))
    forms = {
        "JSON lines": b"".join(map(jsonl.encode, events)),
        "auditd": b"".join(map(auditd, events)),
    }
    ours = b"\n".join(entries(count))
    tree = 32 * 256 / 255
    packed = len(gzip.compress(ours)) / count
    rows = [
        Row(
            "bytes of a record",
            "bytes",
            len(ours) / count + 2 + tree,
            note=f"of which {2 + tree:.0f} for its length and its place in the tree; {packed:.0f} compressed"
            f" ({len(ours) / count / packed:.0f} : 1)",
        )
    ]
    for name, form in forms.items():
        packed = len(gzip.compress(form)) / count
        rows.append(
            replace(
                rows[0],
                figure=f"bytes of a record, next to {name}",
                peer=name,
                peer_median=len(form) / count,
                ratio=len(ours) / len(form),
                note=f"{name} compressed: {packed:.0f} ({len(form) / count / packed:.0f} : 1)",
            )
        )
    return rows
