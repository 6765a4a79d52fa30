"""`corral replay --rerun`: a session's commands once more, with the answers that its models gave then."""

from __future__ import annotations

import asyncio
import json
import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

from corral.actions import Content, Ending, Kind, Used
from corral.brokers.model.capture import Capture, CaptureMode, KeptAnswer
from corral.cli.foreground import complain, printable
from corral.errors import RequestError
from corral.log.events import ExecStarted, FilesSet, PayloadKept, SessionStarted, SnapshotTaken
from corral.log.payloads import Payloads
from corral.log.places import open_log, open_payloads
from corral.log.reader import Reader
from corral.log.records import Record
from corral.log.timeline import session_records
from corral.log.traces import Divergence, Trace, first_divergence
from corral.modelapi.recognise import recognise
from corral.policy.canonical import policy_hash
from corral.policy.load import load_policy
from corral.policy.model import Environment, Policy
from corral.sandbox.box import Sandbox
from corral.sandbox.layer import KeptLayer, list_layers

_MAX_LOOKED_AT = 1_000_000
"""Files of a workspace, whether they have changed."""


@dataclass(frozen=True, slots=True)
class _Past:
    """What is known of a session that is to be run again."""

    session: str
    workspace: str
    policy_hash: str
    commands: tuple[ExecStarted, ...]
    began: float
    """Seconds since the epoch."""
    starts: tuple[str, ...]
    """Layers that hold its files at its start, the likelier first."""
    answers: tuple[KeptAnswer, ...]
    unkept: int
    """Answers that are not in the log."""
    trace: Trace


def rerun(reader: Reader, session: str, policy_path: str, words: Sequence[str], *, as_json: bool) -> int:
    """Runs it, tells where it first became another, and returns the exit code: 0 where it did not."""
    past = _past(reader, session)
    policy = _with_variables(load_policy(policy_path), words)
    start, notes = _start(past)
    notes += _notes(past, policy)
    for each in notes:
        complain(printable(each))
    name = asyncio.run(_run(reader.directory, past, policy, start))
    now = Trace(record for _, record in session_records(Reader(reader.directory), name))
    found = first_divergence(past.trace, now)
    _tell(past, name, now, found, notes, as_json=as_json)
    return 0 if found is None else 1


def _past(reader: Reader, session: str) -> _Past:
    records = [record for _, record in session_records(reader, session)]
    events = [record.event for record in records]
    begun = next((event for event in events if isinstance(event, SessionStarted)), None)
    commands = tuple(event for event in events if isinstance(event, ExecStarted))
    if begun is None or not commands:
        raise RequestError(f"session {session} has run no command: there is nothing to run again")
    cut = [record for record in records if isinstance(record.event, ExecStarted) and record.cut]
    if cut:
        raise RequestError(f"session {session} cannot be run again: a command of it was too long to be recorded whole")
    taken = [event.layer for event in events if isinstance(event, SnapshotTaken) and event.step == 0]
    begun_on = [event.layer for event in events if isinstance(event, FilesSet)][:1]
    answers, unkept = _answers(records, open_payloads(reader.directory))
    if not answers:
        raise RequestError(
            f"no answer of a model is kept of session {session}: the policy must say `log: {{keep: {{response: 30d}}}}`"
        )
    hash_ = records[0].context.policy_hash
    began = records[0].at / 1e6
    starts = (*taken, *begun_on)
    return _Past(session, begun.workspace, hash_, commands, began, starts, answers, unkept, Trace(records))


def _answers(records: Sequence[Record], payloads: Payloads) -> tuple[tuple[KeptAnswer, ...], int]:
    """All of them, in the order in which they were asked for."""
    kept: dict[int, PayloadKept] = {}
    calls: list[Used] = []
    for record in records:
        event = record.event
        if isinstance(event, PayloadKept) and event.content is Content.RESPONSE and event.call:
            kept[event.call] = event
        elif isinstance(event, Used) and event.kind is Kind.MODEL_CALL and event.ending is not Ending.REFUSED:
            calls.append(event)
    orders: dict[str, int] = {}
    positions: dict[str, int] = {}
    found: list[KeptAnswer] = []
    for used in sorted(calls, key=lambda each: each.started):
        order = orders.setdefault(used.conversation, len(orders))
        position = positions.get(used.conversation, 0)
        positions[used.conversation] = position + 1
        content = kept.get(used.call)
        if content is None:
            continue
        body = payloads.read(content.digest)
        api = recognise(body)
        if api is not None:
            is_whole = content.is_whole and used.ending is Ending.ANSWERED
            found.append(KeptAnswer(api, used.name, used.conversation, order, position, used.status, body, is_whole))
    return tuple(found), len(calls) - len(found)


def _notes(past: _Past, policy: Policy) -> list[str]:
    notes = []
    if policy_hash(policy) != past.policy_hash:
        notes.append(f"this policy is not the one of session {past.session}: it may decide otherwise")
    if past.unkept:
        notes.append(f"{past.unkept} of its models' answers are not kept, and will be missing")
    return notes


def _start(past: _Past) -> tuple[KeptLayer | None, list[str]]:
    """The layer that it began on, and what is another now. A layer holds what differs from the workspace, so the
    workspace itself must still be as it was."""
    notes = []
    changed = _changed_since(past.workspace, past.began)
    if changed:
        notes.append(f"{changed} in {past.workspace} has changed since session {past.session} began")
    layers = {layer.id: layer for layer in list_layers()}
    found = next((layers[wanted] for wanted in past.starts if wanted in layers), None)
    if found is None and past.starts:
        notes.append("the layer that it began on is not kept any more: it begins on the workspace alone")
    return found, notes


def _changed_since(workspace: str, moment: float) -> str:
    """What has changed there; empty where nothing has."""
    looked_at = 0
    waiting = [workspace]
    while waiting:
        try:
            with os.scandir(waiting.pop()) as entries:
                for entry in entries:
                    looked_at += 1
                    if entry.stat(follow_symlinks=False).st_ctime > moment:
                        return os.path.relpath(entry.path, workspace)
                    if entry.is_dir(follow_symlinks=False):
                        waiting.append(entry.path)
        except OSError as error:
            return os.path.relpath(error.filename or workspace, workspace)
        if looked_at > _MAX_LOOKED_AT:
            return "perhaps something (there are too many files to look at)"
    return ""


def _with_variables(policy: Policy, words: Sequence[str]) -> Policy:
    allow, settings = list(policy.environment.allow), dict(policy.environment.set)
    for word in words:
        name, equals, value = word.partition("=")
        if not name.isidentifier() or not name.isascii():
            raise RequestError(f"--env {name!r}: this is not the name of a variable")
        if equals:
            settings[name] = value
        else:
            allow.append(name)
    return replace(policy, environment=Environment(tuple(allow), tuple(settings.items())))


async def _run(directory: Path, past: _Past, policy: Policy, start: KeptLayer | None) -> str:
    """Runs its commands, one after the other, and returns the new session."""
    log = open_log(directory)
    try:
        box = Sandbox(
            past.workspace,
            policy=policy,
            environment=_environment(),
            label=f"re-run of {past.session}",
            log=log,
            on=start,
            capture=lambda: Capture(CaptureMode.REPLAY, Path(), kept=past.answers),
        )
        async with box:
            for command in past.commands:
                await box.exec(command.argv, directory=command.directory, user=command.user)
            return box.id
    finally:
        log.close()


def _environment() -> Mapping[str, str]:
    return os.environ


def _tell(past: _Past, name: str, now: Trace, found: Divergence | None, notes: Sequence[str], *, as_json: bool) -> None:
    if as_json:
        told = None
        if found is not None:
            told = {
                "step": found.number,
                "place": str(found.place),
                "was": None if found.was is None else str(found.was),
                "now": None if found.now is None else str(found.now),
                "what": str(found),
            }
        row = {
            "session": past.session,
            "rerun": name,
            "same": found is None,
            "divergence": told,
            "actions": now.deeds,
            "answers": now.calls,
            "notes": list(notes),
        }
        print(json.dumps(row))
        return
    about = f"session {name}: {now.deeds} actions, {now.calls} answers of models given again"
    print(printable(about))
    if found is None:
        print(printable(f"it did what session {past.session} did, step by step"))
    else:
        print(printable(f"it first became another at {found}"))
