"""Recorded sessions for tests of what looks back: events in, a log that can be read out."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import replace
from itertools import islice

from corral.actions import (
    Access,
    Action,
    Decision,
    Endpoint,
    File,
    Flow,
    KernelCall,
    Kind,
    Origin,
    Process,
    Program,
    ToolCall,
    Transport,
    Used,
    Verdict,
)
from corral.actions import Ending as CallEnding
from corral.approvals.queue import Ending, Scope
from corral.log.events import Approval, Event, ExecEnded, ExecStarted, SessionEnded, SessionStarted
from corral.log.ocsf import Context
from corral.log.records import Record, decode, encode

START = 1_790_000_000.0
CONTEXT = Context("coder", "1.2", "policy.yaml", "sha256:" + "0" * 64, "session-1", "box-1", "0.1.0")
ORIGIN = Origin("box-1", "session-1", 3, 1, Process(10, 2, 5, "/bin/sh", ("sh", "-c", "x")))


def connect(host: str = "example.test", port: int = 443) -> Action:
    return Action(Kind.NET_CONNECT, Endpoint(Transport.TCP, "192.0.2.1", port, host), ORIGIN)


def run(path: str = "/usr/bin/git", *arguments: str, digest: str = "ab" * 32) -> Action:
    return Action(Kind.PROCESS_EXEC, Program(path, (path, *arguments), digest=digest), ORIGIN)


def syscall(name: str, reason: str = "it is refused") -> Action:
    return Action(Kind.KERNEL, KernelCall(name, 1, reason), ORIGIN)


def change(path: str) -> Action:
    return Action(Kind.FILE_OPEN, File(path, Access.WRITE), ORIGIN)


def decision(
    action: Action, verdict: Verdict = Verdict.ALLOW, rule: str = "network.allow[0]", **fields: object
) -> Decision:
    made = Decision(action, verdict, rule, "because", "", "policy", 1, START)
    return replace(made, **fields)  # type: ignore[arg-type]


def flow(host: str = "example.test", up: int = 10) -> Flow:
    return Flow(ORIGIN, Endpoint(Transport.TCP, "192.0.2.1", 443, host), "network.allow[0]", START, 1.5, up, 20)


def used(name: str = "model-1", source: str = "upstream-1", **fields: object) -> Used:
    """A call of a model."""
    made = Used(
        ORIGIN, Kind.MODEL_CALL, source, name, "model.allow[0]", START, 1.5, CallEnding.ANSWERED, 0.25, 200, "", 100,
        20, 7, 3, 1_500_000, "EUR", 0, 1000, 2000, (), 4, "c0ffee", "", (ToolCall("call_1", "shell", "{}"),),
        "tool_calls",
    )  # fmt: skip
    return replace(made, **fields)  # type: ignore[arg-type]


def approval(said: str = "anna", ending: Ending = Ending.ANSWERED, **fields: object) -> Approval:
    """Of question 3, asked 2.5 s before its end."""
    verdict = Verdict.ALLOW if ending is Ending.ANSWERED else Verdict.DENY
    made = Approval(
        ORIGIN, 3, Kind.NET_CONNECT, "sha256:ab", f"net.connect {said}", said, ending, verdict, Scope.ONCE, 3, said,
        said, START, START + 2.5, 300.0,
    )  # fmt: skip
    return replace(made, **fields)  # type: ignore[arg-type]


def session(*events: Event) -> list[Event]:
    """A whole one, with a command."""
    begin: list[Event] = [SessionStarted("/work", "", "{}"), ExecStarted(1, ("make", "test"), "/work", 1000)]
    return [*begin, *events, ExecEnded(1, 0, "", 1, 2, 3, 0), SessionEnded("closed")]


def written(
    events: Sequence[Event], name: str = "session-1", *, at: float = START, apart: float = 1.0, agent: str = "coder"
) -> list[bytes]:
    """The entries of one session, so many seconds apart."""
    where = replace(CONTEXT, session=name, agent=agent)
    return [
        encode(
            event,
            where,
            sequence=index + 1,
            at=at + index * apart,
            monotonic_ns=int((at - START + 1000 + index * apart) * 1e9),
        )
        for index, event in enumerate(events)
    ]


def numbered(entries: Sequence[bytes]) -> Iterator[tuple[int, Record]]:
    """The records of entries."""
    for number, entry in enumerate(entries):
        yield number, decode(entry)


class Shelf:
    """A log in memory that counts what is read of it."""

    def __init__(self, entries: Sequence[bytes]) -> None:
        self.all = list(entries)
        self.read = 0

    def entries(self, start: int = 0, stop: int | None = None) -> Iterator[tuple[int, bytes]]:
        for number, entry in islice(enumerate(self.all), start, stop):
            self.read += 1
            yield number, entry
