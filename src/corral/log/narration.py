"""Records in words: what kind of item each is on a time line, its one line, and what more there is to say."""

from __future__ import annotations

import errno
import os
import shlex
import signal
from collections.abc import Iterator

from corral.actions import (
    Access,
    Content,
    Decision,
    File,
    Flow,
    KernelCall,
    Kind,
    Origin,
    Process,
    Program,
    Used,
    Verdict,
)
from corral.actions import Ending as CallEnding
from corral.approvals.queue import Ending, Scope
from corral.log.events import (
    ApplyEnded,
    Approval,
    Event,
    ExecEnded,
    ExecStarted,
    FilesSet,
    KeyRotated,
    LogRecovered,
    Outcome,
    PayloadErased,
    PayloadKept,
    PayloadLost,
    PolicyChanged,
    SessionEnded,
    SessionStarted,
    SnapshotTaken,
)
from corral.log.items import Item, ItemKind, make_item
from corral.log.records import Record

MICROSECONDS = 1_000_000
_TOOLS = 16
"""Tool calls of one answer that are named."""
_WORDS = 4000
"""Characters of an argument vector that are quoted for a detail."""
_KINDS = {
    Kind.NET_RESOLVE: ItemKind.FLOW,
    Kind.HTTP_REQUEST: ItemKind.FLOW,
    Kind.MODEL_CALL: ItemKind.REASONING,
    Kind.DATA_QUERY: ItemKind.TOOL_CALL,
    Kind.API_CALL: ItemKind.TOOL_CALL,
    Kind.SANDBOX_SNAPSHOT: ItemKind.LIFECYCLE,
    Kind.SANDBOX_RESTORE: ItemKind.LIFECYCLE,
    Kind.SANDBOX_FORK: ItemKind.LIFECYCLE,
    Kind.SANDBOX_APPLY: ItemKind.FILE_CHANGE,
    Kind.SANDBOX_UNDO: ItemKind.FILE_CHANGE,
    Kind.SANDBOX_DISCARD: ItemKind.FILE_CHANGE,
}

_Details = Iterator[tuple[str, str]]
_APPLIED = {
    Outcome.APPLIED: "the changes were applied",
    Outcome.COMMITTED: "the changes were committed to a new branch",
    Outcome.UNDONE: "what was applied was taken back",
    Outcome.ROLLED_BACK: "nothing was changed",
    Outcome.FORGOTTEN: "what could not be taken back was left as it is",
}


def item_of(number: int, record: Record, offset: float, *, missing: str = "") -> Item:
    """The item of a record. ``offset`` is in seconds; ``missing`` says what is missing before it, if anything is."""
    event = record.event
    kind, line, details = _told(event)
    origin = event.action.origin if isinstance(event, Decision) else getattr(event, "origin", None)
    notes = [
        *details,
        *_origin_details(origin),
        ("not whole", ", ".join(sorted(record.cut))),
        ("missing", missing),
        ("record", f"{number}; {record.sequence} of its session"),
    ]
    return make_item(
        number,
        kind,
        record.at / MICROSECONDS,
        offset,
        line,
        notes,
        step=_step_of(event),
        origin=origin,
        verdict=event.verdict if isinstance(event, Decision | Approval) else None,
    )


def _step_of(event: Event) -> int:
    """The step of an event that no process has brought about."""
    return event.step if isinstance(event, ExecStarted | ExecEnded) else 0


def _told(event: Event) -> tuple[ItemKind, str, _Details]:
    match event:
        case Decision():
            return _kind(event), _decision_line(event), _decision_details(event)
        case Flow():
            return ItemKind.FLOW, _flow_line(event), _flow_details(event)
        case Used():
            return _KINDS.get(event.kind, ItemKind.TOOL_CALL), _used_line(event), _used_details(event)
        case ExecStarted():
            return ItemKind.TOOL_CALL, f"exec {event.exec}: {_command(event.argv)}", _exec_details(event)
        case ExecEnded():
            return ItemKind.TOOL_CALL, f"exec {event.exec} {_ending(event)}", _usage(event)
        case SnapshotTaken():
            after = "" if event.step is None else f" after step {event.step}"
            called = f" {event.name}" if event.name else ""
            line = f"snapshot {event.layer}{called}{after}: {event.changes} changes, {event.size} bytes"
            return ItemKind.FILE_CHANGE, line, iter([("parent", event.parent)])
        case FilesSet():
            return ItemKind.FILE_CHANGE, f"the files are those of {event.layer}", iter(())
        case ApplyEnded():
            line = f"{_APPLIED[event.outcome]}{f': {event.error}' if event.error else ''}"
            names = ("apply", "source", "workspace", "digest")
            details = iter([(name, getattr(event, name)) for name in names])
            return ItemKind.FILE_CHANGE, line, details
        case SessionStarted():
            details = iter([("workspace", event.workspace), ("label", event.label), ("policy", event.policy)])
            return ItemKind.LIFECYCLE, "the session began", details
        case SessionEnded():
            return ItemKind.LIFECYCLE, f"the session ended: {event.reason}", iter(())
        case Approval():
            return ItemKind.APPROVAL, _approval_line(event), _approval_details(event)
        case PolicyChanged():
            what = "another policy than before" if event.old else "a policy that is not known here yet"
            line = f"the session begins under {what}, by {event.by}"
            what_changed = [("old", event.old), ("new", event.new), ("changes", "\n".join(event.changes))]
            return ItemKind.LIFECYCLE, line, iter(what_changed)
        case LogRecovered():
            return ItemKind.LIFECYCLE, f"the log was mended after a crash: {event.what}", iter(())
        case KeyRotated():
            return ItemKind.LIFECYCLE, "another key signs for the log", iter([("old", event.old), ("new", event.new)])
        case PayloadKept():
            word = "" if event.content is Content.FILE else " of"
            about = f"{event.content.value.replace('_', ' ')}{word} {event.about}"
            line = f"{event.size} bytes are kept of the {about}{'' if event.is_whole else ', which was longer'}"
            return ItemKind.LIFECYCLE, line, iter([("content", event.digest)])
        case PayloadLost():
            line = f"{event.count} x {event.content.value.replace('_', ' ')} was not kept: {event.why}"
            return ItemKind.LIFECYCLE, line, iter(())
        case PayloadErased():
            line = f"content was erased by {event.by}: {event.why}"
            return ItemKind.LIFECYCLE, line, iter([("content", event.digest)])


# ---- decisions ----


def _kind(decision: Decision) -> ItemKind:
    if decision.decider == "approvals" and decision.answered_by:
        return ItemKind.APPROVAL
    action = decision.action
    if isinstance(action.subject, File) and action.subject.access is Access.WRITE:
        return ItemKind.FILE_CHANGE
    return _KINDS.get(action.kind, ItemKind.SYSTEM_CALL)


def _decision_line(decision: Decision) -> str:
    times = f" ({decision.count} times)" if decision.count > 1 else ""
    answered = f", answered by {decision.answered_by}" if decision.answered_by else ""
    held = f" after {decision.held:.1f} s" if answered and decision.held else ""
    return f"{decision.action}{times}{answered}{held}"


def _decision_details(decision: Decision) -> _Details:
    yield "rule", decision.rule
    yield "reason", decision.reason
    yield "reversible", decision.action.reversible.value
    yield "advice", decision.advice
    yield "decided by", decision.decider
    yield "answered by", decision.answered_by
    yield "held", f"{decision.held:.3f} s" if decision.held else ""
    yield "times", str(decision.count) if decision.count > 1 else ""
    yield "private", "the agent is told neither the rule nor its reason" if decision.private else ""
    subject = decision.action.subject
    if isinstance(subject, Program):
        yield "arguments", _command(subject.argv) + (" (there were more)" if subject.truncated else "")
        yield "sha256", subject.digest
        yield "interpreter", subject.interpreter
    elif isinstance(subject, KernelCall):
        name = errno.errorcode.get(subject.errno, f"error {subject.errno}")
        yield "refused as", f"{name}: {subject.reason}"
    yield from _process(decision.action.origin.process)
    if decision.action.origin.exec:
        yield "exec", str(decision.action.origin.exec)


def _process(process: Process | None) -> _Details:
    if process is None:
        return
    yield "process", f"{process.exe} (pid {process.pid}, inside {process.inner_pid})"
    yield "claims", _command(process.argv)
    yield "started by", " < ".join(f"{each.exe} ({each.pid})" for each in process.ancestors)


def _command(argv: tuple[str, ...]) -> str:
    found: list[str] = []
    left = _WORDS
    for argument in argv:
        if left <= 0:
            return f"{' '.join(found)} ..."
        found.append(shlex.quote(argument[:left]))
        left -= len(argument) + 1
    return " ".join(found)


# ---- approvals ----

_ANSWERS = {Verdict.ALLOW: "approved", Verdict.DENY: "denied", Verdict.KILL: "denied, with the end of the sandbox,"}
_ENDINGS = {
    Ending.TIMED_OUT: "nobody answered in time",
    Ending.WITHDRAWN: "whoever tried it was gone before the answer",
    Ending.CLOSED: "the sandbox ended before the answer",
}


def _approval_line(event: Approval) -> str:
    waited = f"after {max(0.0, event.ended_at - event.asked_at):.1f} s"
    if event.ending is not Ending.ANSWERED:
        return f"question {event.question} to persons, {_ENDINGS[event.ending]} ({waited}): {event.target}"
    scope = ", for the session" if event.scope is Scope.SESSION else ""
    through = f", with question {event.through}" if event.through != event.question else ""
    answered = f"{_ANSWERS.get(event.verdict, 'answered')} by {event.by} {waited}{scope}{through}"
    return f"question {event.question} {answered}: {event.target}"


def _approval_details(event: Approval) -> _Details:
    yield "target", event.target
    yield "action", event.action
    yield "asked by", event.rule
    yield "answered by", event.by if event.ending is Ending.ANSWERED else ""
    yield "reason", event.reason
    yield "scope", event.scope.value
    yield "time for it", f"{event.timeout:g} s"
    yield from _process(event.origin.process)


# ---- flows and commands ----


def _flow_line(flow: Flow) -> str:
    traffic = f"{flow.bytes_up} bytes out, {flow.bytes_down} in, {flow.seconds:.1f} s"
    return f"{flow.endpoint}: {traffic}{f', {flow.close}' if flow.close else ''}"


def _flow_details(flow: Flow) -> _Details:
    yield "rule", flow.rule
    yield "address", flow.endpoint.address
    yield "protocol", flow.endpoint.protocol or ""
    yield "segments", f"{flow.packets_up} out, {flow.packets_down} in"
    yield "TLS name", flow.tls_name
    yield "JA4", flow.ja4
    yield "certificate", flow.certificate
    yield "intercepted", "yes" if flow.intercepted else ""
    yield from _process(flow.origin.process)


def _origin_details(origin: Origin | None) -> _Details:
    if origin is None:
        return
    yield "tool call", origin.tool
    yield "unexplained", "no answer of a model asked for it" if origin.unexplained else ""


# ---- calls of brokers ----


def _used_line(used: Used) -> str:
    about = [f"{used.name} of {used.source}" if used.source else used.name]
    if used.kind is Kind.MODEL_CALL:
        cached = f" ({used.cached_tokens} cached)" if used.cached_tokens else ""
        guess = "about " if used.estimated else ""
        about.append(f"{guess}{used.input_tokens} tokens in{cached}, {used.output_tokens} out")
    elif used.kind is Kind.DATA_QUERY:
        about.append(f"{used.rows} rows, {used.bytes_down} bytes")
    else:
        about.append(f"{used.bytes_up} bytes out, {used.bytes_down} in")
    if used.cost:
        about.append(money(used.cost, used.currency))
    about.append(f"{used.seconds:.1f} s")
    if used.tools:
        names = ", ".join(each.name[:40] for each in used.tools[:_TOOLS])
        about.append(f"asks for {names}{', ...' if len(used.tools) > _TOOLS else ''}")
    if used.ending is not CallEnding.ANSWERED:
        about.append(f"{used.ending.value}{f': {used.reason}' if used.reason else ''}")
    return f"{used.kind.value} {about[0]}: {', '.join(about[1:])}"


def _used_details(used: Used) -> _Details:
    yield "ended", f"{used.ending.value}{f': {used.reason}' if used.reason else ''}"
    yield "status", str(used.status or "")
    yield "rule", used.rule
    yield "first after", f"{used.first:.3f} s" if used.first else ""
    if used.kind is Kind.MODEL_CALL:
        kept = f"{used.cached_tokens} from a cache, {used.written_tokens} written to one"
        yield "tokens", f"{used.input_tokens} in ({kept}), {used.output_tokens} out"
        yield "estimated", "the upstream has not said how many" if used.estimated else ""
        yield "conversation", used.conversation
        yield "begun by", used.parent
        yield "opens step", str(used.opened or "")
        yield "stopped", used.finish
    yield "cost", money(used.cost, used.currency) if used.cost else ""
    yield "rows", str(used.rows or "")
    yield "bytes", f"{used.bytes_up} out, {used.bytes_down} in"
    yield "personal data", ", ".join(used.personal)
    for call in used.tools[:_TOOLS]:
        yield f"asks for {call.name}", f"{call.id}: {call.arguments}"
    yield from _process(used.origin.process)


def money(billionths: int, currency: str) -> str:
    """An amount, as precise as it is known."""
    whole, rest = divmod(billionths, 1_000_000_000)
    return f"{whole}.{f'{rest:09d}'.rstrip('0').ljust(2, '0')} {currency}".strip()


def _exec_details(event: ExecStarted) -> _Details:
    yield "command", _command(event.argv)
    yield "directory", event.directory
    yield "user", str(event.user)


def _ending(event: ExecEnded) -> str:
    if event.error:
        return f"could not be started: {event.error}"
    try:
        code = os.waitstatus_to_exitcode(event.status)
    except (ValueError, OverflowError):
        return f"ended with wait status {event.status}"
    if code >= 0:
        return f"ended with exit code {code}"
    try:
        return f"was ended by {signal.Signals(-code).name}"
    except ValueError:
        return f"was ended by signal {-code}"


def _usage(event: ExecEnded) -> _Details:
    yield "processor", f"{event.user_microseconds} us user, {event.system_microseconds} us system"
    yield "memory", f"{event.max_rss} bytes at most"
    yield "refusals", str(event.denials) if event.denials else ""
