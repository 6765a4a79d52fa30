"""Decisions as JSON lines: one object a decision, for people with tools and for `corral policy learn`.

The fields are those of :class:`~corral.actions.Decision` without ``asked``; ``action`` is the name of the action
(``net.connect``, ``kernel.mount``), ``reversible`` whether it can be taken back, ``subject`` and ``origin`` hold the
fields of their values, and verdicts are words.
``version`` is that of this format; it changes with the fields. A line has at most :data:`MAX_LINE` bytes: what is too
long is cut, and ``cut`` names the fields in which something was.

Everything is ASCII; JSON escapes what could move a cursor. Bytes of paths that are no UTF-8 are lone surrogates, as in
:func:`os.fsdecode`.
"""

from __future__ import annotations

import json
import os
import threading
from collections.abc import Iterator
from typing import Any, NamedTuple

from corral.actions import Action, Decision, Flow, Kind, Origin, Subject, Used, Verdict
from corral.diskspace import spare_bytes
from corral.errors import CorralError, RequestError
from corral.monitor.plain import WHOLE, from_plain, refuse, subject_type, to_plain, unique

VERSION = 4
FLOW = "flow"
"""The ``kind`` of lines that are no decisions, but accounts of connections that are over."""
USED = "used"
"""The same of calls of brokers."""
MAX_LINE = 2 * 1024 * 1024
"""Bytes of a line, its end included."""
MAX_FILE = 1 << 30
"""Bytes of a file: what an agent can make of a record is bounded."""
MAX_RECORDS = 1_000_000
"""Records that are read of one file."""
_PORTION = 16 << 20
"""Bytes that are written before the free space is looked at again."""


class Record(NamedTuple):
    """One line of a file."""

    line: int
    decision: Decision
    cut: frozenset[str]
    """Fields (``subject``, ``origin``, ...) that are not exactly what was there: something in them was too long."""


# ---- writing ----


class RecordFull(CorralError):
    """No more decisions can be recorded: the file, or the disk that it lies on, has reached its bound."""


class JsonLines:
    """A sink that writes to a file descriptor, each decision with one write(2) where the file takes it whole.

    An agent decides how much there is to record, so the file has at most ``limit`` bytes, and its file system keeps
    what :mod:`corral.diskspace` says. A line that would not fit is not begun, and ends the sandbox (I3).
    """

    def __init__(self, fd: int, *, limit: int | None = None) -> None:
        """``limit`` is in bytes, :data:`MAX_FILE` where none is given. Raises OSError, or RecordFull at once."""
        self._fd = fd
        self._limit = MAX_FILE if limit is None else limit
        self._written = os.fstat(fd).st_size
        self._spare = 0
        self._lock = threading.Lock()  # flows are told of by another thread than decisions
        self._look(MAX_LINE)

    def write(self, decision: Decision) -> None:
        """As :class:`corral.monitor.records.Sink`. Raises RecordFull, or OSError where it cannot be written."""
        self._write(encode(decision))

    def flow(self, flow: Flow) -> None:
        """As :class:`corral.monitor.records.Account`. Raises RecordFull, or OSError where it cannot be written."""
        self._write(encode_flow(flow))

    def used(self, used: Used) -> None:
        """As :class:`corral.monitor.records.Tally`. Raises RecordFull, or OSError where it cannot be written."""
        self._write(encode_used(used))

    def _write(self, line: bytes) -> None:
        with self._lock:
            if self._written + len(line) > self._limit:
                raise RecordFull(f"the record has reached its {self._limit} bytes")
            if self._spare < len(line):
                self._look(len(line))
            self._written += len(line)
            self._spare -= len(line)
            rest = memoryview(line)
            while rest:
                rest = rest[os.write(self._fd, rest) :]

    def _look(self, needed: int) -> None:
        self._spare = min(spare_bytes(self._fd), _PORTION)  # soon again: others write there too
        if self._spare < needed:
            raise RecordFull("the record would leave its disk with less than 1 GiB or 5 % free; make room there")


def encode(decision: Decision) -> bytes:
    """The line of a decision."""
    action = decision.action
    values: dict[str, object] = {
        "version": VERSION,
        "number": decision.number,
        "at": decision.at,
        "action": action.name,
        "kind": action.kind.value,
        "reversible": action.reversible.value,
        "verdict": decision.verdict.name.lower(),
        "rule": decision.rule,
        "reason": decision.reason,
        "advice": decision.advice,
        "decider": decision.decider,
        "private": decision.private,
        "count": decision.count,
        "held": decision.held,
        "answered_by": decision.answered_by,
        "subject": action.subject,
        "origin": action.origin,
    }
    cut = []
    for name, value in values.items():
        values[name], whole = to_plain(value)
        if not whole:
            cut.append(name)
    values["cut"] = cut
    return json.dumps(values, separators=(",", ":"), allow_nan=False).encode("ascii") + b"\n"


def encode_flow(flow: Flow) -> bytes:
    """The line of a flow: its fields, and ``kind`` ``flow``."""
    plain, whole = to_plain(flow)
    values = {"version": VERSION, "kind": FLOW, **plain, "cut": [] if whole else [FLOW]}
    return json.dumps(values, separators=(",", ":"), allow_nan=False).encode("ascii") + b"\n"


def encode_used(used: Used) -> bytes:
    """The line of a call of a broker: its fields but its kind, which is ``of``, and ``kind`` ``used``."""
    plain, whole = to_plain(used)
    values = {"version": VERSION, "kind": USED, "of": plain.pop("kind"), **plain, "cut": [] if whole else [USED]}
    return json.dumps(values, separators=(",", ":"), allow_nan=False).encode("ascii") + b"\n"


# ---- reading ----


def read_records(path: str | os.PathLike[str]) -> Iterator[Record]:
    """The records of a file, in their order.

    Raises:
        RequestError: the file cannot be read, or is not what :class:`JsonLines` writes; the message names the line.
    """
    name = os.fspath(path)
    try:
        with open(name, "rb") as file:
            number = 0
            while line := file.readline(MAX_LINE):
                number += 1
                try:
                    if number > MAX_RECORDS:
                        raise ValueError(f"more than {MAX_RECORDS} records")
                    if is_account(line):
                        continue
                    record = Record(number, *decode(line))
                except (ValueError, RecursionError) as error:
                    raise RequestError(f"{name}:{number}: not a record: {error}") from None
                yield record
    except OSError as error:
        raise RequestError(f"{name}: cannot read the record: {error.strerror}") from None


def flow_fields(flow: Flow) -> dict[str, Any]:
    """The fields of a flow as JSON has them, bounded."""
    fields_of: dict[str, Any] = to_plain(flow)[0]
    return fields_of


def flow_of(values: object) -> Flow:
    """The flow of such fields. Raises ValueError (or RecursionError)."""
    flow: Flow = from_plain(Flow, values)
    return flow


def is_account(line: bytes) -> bool:
    """Whether a line is the account of a flow or a call of a broker; what else it is, :func:`decode` says."""
    return line.startswith(tuple(b'{"version":%d,"kind":"%s",' % (VERSION, word.encode()) for word in (FLOW, USED)))


def decode(line: bytes) -> tuple[Decision, frozenset[str]]:
    """The decision of a line, and which of its fields were cut. Raises ValueError (or RecursionError)."""
    if not line.endswith(b"\n"):
        raise ValueError("the line is too long, or has no end (was its writer stopped?)")
    values = json.loads(line.decode("ascii"), object_pairs_hook=unique, parse_constant=refuse)
    if not isinstance(values, dict):
        raise ValueError("it is no object")
    if values.pop("version", None) != VERSION:
        raise ValueError(f"it is not of version {VERSION}")
    cut = frozenset(from_plain(tuple[str, ...], values.pop("cut", None)))
    name = from_plain(str, values.pop("action", None))
    kind = from_plain(Kind, values.pop("kind", None))
    subject: Subject = from_plain(subject_type(kind), values.pop("subject", None))
    action = Action(kind, subject, from_plain(Origin, values.pop("origin", None)))
    if values.pop("reversible", None) != action.reversible.value and not cut:
        raise ValueError("whether it can be taken back is not what its subject says")
    word = values.get("verdict")
    if word not in ("allow", "ask", "deny", "kill"):
        raise ValueError("its verdict is none")
    values["verdict"] = Verdict[word.upper()]
    if name != action.name[: WHOLE.text]:
        raise ValueError("its action is not that of its subject")
    return from_plain(Decision, values, action=action, asked=()), cut
