"""`corral pending`, `approve` and `deny`: what is held, and a person's answer."""

from __future__ import annotations

import json
import shlex
import sys
import time
from collections.abc import Iterable, Sequence
from dataclasses import asdict

from corral.actions import Verdict
from corral.approvals.queue import Scope
from corral.approvals.waiting import Waiting
from corral.cli.foreground import complain, printable
from corral.errors import RequestError
from corral.sandbox.resolver import answer, list_waiting

MAX_SHOWN = 50
"""Held actions that are printed for people at once; an agent can file thousands."""
_INTERVAL = 1.0


def _lines(waiting: Waiting) -> list[tuple[str, str]]:
    """What is known of one, as (what, text)."""
    where = f"sandbox {waiting.sandbox}"
    if waiting.exec:
        where += f", exec {waiting.exec}"
    if waiting.step:
        where += f", step {waiting.step}"
    found = [("asked by", f"{waiting.rule}: {waiting.reason}" if waiting.reason else waiting.rule), ("in", where)]
    by_itself = ", by itself; what is sent then may not be" if waiting.action == "net.connect" else ""
    found.insert(1, ("reversible", f"{waiting.reversible}{by_itself}"))
    if waiting.pid:
        found += [
            ("program", f"{shlex.quote(waiting.exe)} (pid {waiting.pid}, inside {waiting.inner_pid})"),
            ("claims", f"to have been called as: {shlex.join(waiting.argv)}"),
        ]
        if waiting.parents:
            found.append(("started by", " < ".join(map(shlex.quote, waiting.parents))))
    found += [
        ("sends" if waiting.action == "api.call" else "changes", line) for line in waiting.preview.split("\n") if line
    ]
    since = f"{max(0.0, time.time() - waiting.since):.0f} s"
    return [*found, ("held for", f"{since}; denied in {waiting.seconds_left:.0f} s")]


def _print(found: Sequence[Waiting]) -> None:
    from rich.console import Console
    from rich.text import Text

    console = Console(soft_wrap=True, highlight=False)
    for waiting in found[:MAX_SHOWN]:
        console.print(Text(waiting.id, "bold") + Text(f"  {printable(f'{waiting.action} {waiting.subject}'.rstrip())}"))
        for what, text in _lines(waiting):
            console.print(Text(f"    {what:<10} ", "dim") + Text(printable(text)))
    if len(found) > MAX_SHOWN:
        console.print(f"and {len(found) - MAX_SHOWN} more; `corral pending --json` prints all")


def show_pending(*, as_json: bool) -> None:
    """Prints what is held now, oldest first."""
    found = list_waiting()
    if as_json:
        print(json.dumps([asdict(waiting) for waiting in found]))
    elif found:
        _print(found)
    else:
        print("nothing is held")


def watch_pending(*, as_json: bool) -> None:
    """Prints what is held as it comes, and what is held no longer, until it is interrupted."""
    known: set[str] = set()
    while True:
        found = list_waiting()
        now = {waiting.id for waiting in found}
        new = [waiting for waiting in found if waiting.id not in known]
        if as_json:
            for waiting in new:
                print(json.dumps(asdict(waiting)))
        else:
            _print_gone(sorted(known - now))
            _print(new)
        sys.stdout.flush()
        known = now
        time.sleep(_INTERVAL)


def _print_gone(gone: Sequence[str]) -> None:
    for name in gone[:MAX_SHOWN]:
        print(f"{name}  is not held any more")
    if len(gone) > MAX_SHOWN:
        print(f"and {len(gone) - MAX_SHOWN} more are not held any more")


def answer_all(names: Iterable[str], verdict: Verdict, *, scope: Scope = Scope.ONCE, reason: str = "") -> int:
    """Gives each of these held actions the same answer and says what was answered. Returns the exit code: 125 where
    one of them could not be answered."""
    code, done = (
        0,
        {Verdict.ALLOW: "approved", Verdict.DENY: "denied", Verdict.KILL: "denied, sandbox killed:"}[verdict],
    )
    for name in names:
        try:
            answered = answer(name, verdict, scope=scope, reason=reason)
        except RequestError as error:
            complain(f"{name}: {error}")
            code = error.exit_code
            continue
        more = f" (and {answered.count - 1} more like it)" if answered.count > 1 else ""
        session = ", for this session" if scope is Scope.SESSION else ""
        print(f"{done} {answered.id}{session}: {printable(answered.action)}{more}")
    return code
