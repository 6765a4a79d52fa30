"""How another terminal sees and answers what the sandboxes of this machine hold.

An id is ``SANDBOX-NUMBER``. The sandbox may be shortened like everywhere; the number never is, and no number is used
twice. So an answer is for what was shown, or for nothing, however fast an agent files and withdraws.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import suppress
from dataclasses import dataclass

from corral.actions import Verdict
from corral.approvals.queue import MAX_HELD, Scope
from corral.approvals.waiting import PAGE, Waiting, read_waiting
from corral.errors import RequestError
from corral.sandbox.registry import Connection, connections, find_sandbox

_MAX_PAGES = MAX_HELD // PAGE + 1


@dataclass(frozen=True, slots=True)
class Answered:
    """What an answer was for."""

    id: str
    action: str
    """In one line, to be escaped before a terminal sees it."""
    count: int
    """How many held actions it answered."""


def _of_sandbox(connection: Connection, sandbox: str) -> Iterator[Waiting]:
    after = 0
    for _ in range(_MAX_PAGES):
        message, _ = connection.ask({"verb": "pending", "id": sandbox, "after": after})
        for fields in message["waiting"]:
            waiting = read_waiting(fields)
            after = max(after, waiting.number)
            yield waiting
        if not message["more"]:
            return


def list_waiting() -> list[Waiting]:
    """All held actions of this user's sandboxes on this machine whose controllers answer, oldest first."""
    found: list[Waiting] = []
    for connection, _ in connections():
        # A controller that ends just now, or hangs; what it has told already is shown.
        with suppress(RequestError, OSError):
            message, _ = connection.ask({"verb": "list"})
            for entry in message["sandboxes"]:
                found.extend(_of_sandbox(connection, entry["id"]))
        connection.close()
    return sorted(found, key=lambda waiting: (waiting.since, waiting.id))


def answer(name: str, verdict: Verdict, *, scope: Scope = Scope.ONCE, reason: str = "") -> Answered:
    """Answers the held action with this id. Raises RequestError where it is not held (any more), and says why."""
    sandbox, dash, number = name.rpartition("-")
    if not dash or not sandbox or not (number.isascii() and number.isdecimal()) or len(number) > 15:
        raise RequestError("this is not the id of a held action; `corral pending` lists them, as SANDBOX-NUMBER")
    connection, entry = find_sandbox(sandbox)
    try:
        message = {"verb": "answer", "id": entry.id, "number": int(number), "verdict": verdict.name.lower()}
        told, _ = connection.ask(message | {"scope": scope.value, "reason": reason})
    finally:
        connection.close()
    return Answered(f"{entry.id}-{int(number)}", str(told["action"]), int(told["answered"]))
