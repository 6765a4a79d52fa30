"""What a person is shown of a held action, and how a question and its answer travel between processes.

Everything here is what an enforcer saw, not what the agent says. The one exception is marked as such: the arguments
of the acting process, which a process can write as it likes.
"""

from __future__ import annotations

import shlex
import time
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from typing import Any

from corral.actions import (
    Action,
    Endpoint,
    File,
    KernelCall,
    Meaning,
    Operation,
    Program,
    Query,
    Request,
    Subject,
    Transport,
    Verb,
    Verdict,
)
from corral.approvals.queue import Question, Queue, Scope
from corral.errors import RequestError

PAGE = 50
"""Questions in one message."""
_MAX_TEXT = 4096  # a page of texts that JSON escapes six-fold is still below registry.MAX_LONG_MESSAGE
_MAX_WORDS = 64
_CUT = "[...]"

_MEANINGS = {
    Meaning.METHOD: "",
    Meaning.FETCH: " (a POST that reads)",
    Meaning.OVERRIDDEN: " (which names another method or path for the server)",
    Meaning.BODY: " (with a body)",
}


@dataclass(frozen=True, slots=True)
class Waiting:
    """One held action. Texts are cut, and as they came: to be escaped before a terminal sees them."""

    id: str
    """The sandbox and the number: what `corral approve` is given."""
    sandbox: str
    number: int
    session: str
    step: int
    exec: int
    """0 where the process belongs to no exec."""
    action: str
    """``net.connect``, ``kernel.mount``, ..."""
    subject: str
    """What exactly. Names that hold spaces or quotes are quoted as for a shell."""
    reversible: str
    """Whether what it does can be taken back: ``yes``, ``until-applied`` or ``no``."""
    rule: str
    """Which rule asks."""
    reason: str
    pid: int
    """Outside; 0 where no process is known."""
    inner_pid: int
    exe: str
    """The program that the process runs."""
    argv: tuple[str, ...]
    """The arguments of the process, in its own words: it can write there what it likes."""
    parents: tuple[str, ...]
    """The programs of its parents, from the nearest on."""
    since: float
    """Seconds since the epoch."""
    seconds_left: float
    preview: str = ""
    """What a change of data would change, or the request that a service would get, in lines."""


def _cut(text: str) -> str:
    return text if len(text) <= _MAX_TEXT else text[:_MAX_TEXT] + _CUT


def _cut_words(words: tuple[str, ...]) -> tuple[str, ...]:
    """At most _MAX_WORDS of them, and together hardly more than _MAX_TEXT characters."""
    kept: list[str] = []
    room = _MAX_TEXT
    for word in words:
        if len(kept) == _MAX_WORDS or room <= 0:
            kept.append(_CUT)
            break
        kept.append(word if len(word) <= room else word[:room] + _CUT)
        room -= len(word)
    return tuple(kept)


def describe(subject: Subject) -> str:
    """A subject in full, so that nothing in it can look like something else. Cut where it is long."""
    if isinstance(subject, KernelCall):
        return ""
    if isinstance(subject, Endpoint):
        return _describe_endpoint(subject)
    if isinstance(subject, Program):
        run_by = f" (run by {shlex.quote(subject.interpreter)})" if subject.interpreter else ""
        arguments = shlex.join(_cut_words(subject.argv))
        cut = f" {_CUT}" if subject.truncated else ""
        return _cut(f"{shlex.quote(subject.path)}{run_by} with the arguments: {arguments}{cut}")
    if isinstance(subject, File):
        names = (subject.path, subject.other) if subject.other else (subject.path,)
        return _cut(f"{subject.access.value} {' -> '.join(map(shlex.quote, names))}")
    if isinstance(subject, Request):
        where = _describe_endpoint(subject.endpoint)
        method = f"{shlex.quote(subject.method)}{_MEANINGS[subject.meaning]}"
        return _cut(f"{method} at {where}: {shlex.quote(subject.path)}")
    if isinstance(subject, Query):
        return _cut(f"{subject.statement} of {shlex.quote(subject.source)}: {shlex.join(_cut_words(subject.tables))}")
    if isinstance(subject, Operation):
        operation, service = shlex.quote(subject.operation), shlex.quote(subject.service)
        return _cut(f"{operation} of {service} ({shlex.quote(subject.method)})")
    if isinstance(subject, Verb):
        return _cut(shlex.join(_cut_words(subject.names)))
    return _cut(shlex.quote(str(subject)))


def _describe_endpoint(endpoint: Endpoint) -> str:
    if endpoint.transport is Transport.UNIX:
        return f"unix {_cut(shlex.quote(endpoint.path)) if endpoint.path else 'socket without a name'}"
    about = [endpoint.transport.value, *([endpoint.protocol] if endpoint.protocol else [])]
    if endpoint.name and endpoint.address:
        about.insert(0, endpoint.address)
    return f"{_cut(str(endpoint))} ({', '.join(about)})"


def show(sandbox: str, question: Question) -> Waiting:
    """What is shown of a question of a sandbox."""
    action, origin = question.action, question.action.origin
    process = origin.process
    return Waiting(
        id=f"{sandbox}-{question.number}",
        sandbox=sandbox,
        number=question.number,
        session=origin.session,
        step=origin.step,
        exec=origin.exec,
        action=action.name,
        subject=describe(action.subject),
        reversible=action.reversible.value,
        rule=_cut(question.opinion.rule),
        reason=_cut(question.opinion.reason),
        pid=process.pid if process else 0,
        inner_pid=process.inner_pid if process else 0,
        exe=_cut(process.exe) if process else "",
        argv=_cut_words(process.argv) if process else (),
        parents=_cut_words(tuple(parent.exe for parent in process.ancestors)) if process else (),
        since=question.asked_at,
        seconds_left=round(max(0.0, question.deadline - time.monotonic()), 1),
        preview=_cut(action.subject.preview) if isinstance(action.subject, Query | Operation) else "",
    )


# ---- messages: see corral.sandbox.registry for what carries them ----


def page(sandbox: str, queue: Queue, message: Mapping[str, Any]) -> dict[str, Any]:
    """Answers "pending": the questions behind ``after``, at most PAGE, and whether there may be more."""
    found = queue.waiting(_number(message.get("after", 0)), PAGE)
    return {"waiting": [asdict(show(sandbox, question)) for question in found], "more": len(found) == PAGE}


def take_answer(queue: Queue, message: Mapping[str, Any], by: str) -> dict[str, Any]:
    """Answers "answer": a person's, for one number. Raises RequestError where it cannot be taken."""
    reason = message.get("reason", "")
    try:
        verdict, scope = Verdict[str(message["verdict"]).upper()], Scope(message.get("scope", Scope.ONCE.value))
    except (KeyError, ValueError):
        raise RequestError("an answer is allow, deny or kill, for once or for the session") from None
    if not isinstance(reason, str):
        raise RequestError("a reason is text")
    outcome = queue.answer(_number(message["number"]), verdict, by, scope=scope, reason=reason)
    return {"action": title(outcome.question.action), "answered": outcome.answered}


def title(action: Action) -> str:
    """The action in one line."""
    return f"{action.name} {describe(action.subject)}".rstrip()


def _number(value: object) -> int:
    if not isinstance(value, int) or isinstance(value, bool) or not 0 <= value < 1 << 53:
        raise RequestError("the number of a held action is a whole number")
    return value


def read_waiting(fields: Mapping[str, Any]) -> Waiting:
    """What another process sent. Raises RequestError for anything else."""
    try:
        waiting = Waiting(**{**fields, "argv": tuple(fields["argv"]), "parents": tuple(fields["parents"])})
    except (KeyError, TypeError):
        raise RequestError(
            "the sandbox's controller speaks of held actions in another way; is it another version?"
        ) from None
    return waiting
