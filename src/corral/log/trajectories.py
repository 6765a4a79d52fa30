"""What agents said and did, for learning from it: each call of a model with what it was asked, what it answered, token
by token where the upstream told that, and the actions that followed, with their verdicts.

One turn is one call. Those of a conversation follow one another, numbered from 0; ``docs/trajectory.schema.json`` is
the schema of a line. A prompt repeats what the one before it had, so a turn has only the messages that are new:
``messages_from`` says how many of the turn before stay in front of them. Messages, tools and parameters of a request
are in the upstream's own form, since a chat template needs just that.

A turn is as good as what was kept of it: where the policy keeps neither prompts nor answers (``log.keep``), there is
only what the record says. What is missing, is named.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import asdict, dataclass, replace
from math import isfinite
from typing import Any

from corral.actions import Content, Decision, Kind, ToolCall, Used
from corral.log.events import PayloadKept
from corral.log.narration import MICROSECONDS
from corral.log.ocsf import Context
from corral.log.payload_keys import PayloadError
from corral.log.payloads import Payloads
from corral.log.records import Record
from corral.modelapi.answer import Answer, Api, Sampled, mended
from corral.modelapi.reader import read_answer
from corral.modelapi.recognise import recognise
from corral.monitor.plain import refuse, to_plain

VERSION = 1
"""Of the schema."""
MAX_CALLS = 100_000
"""Of one session."""
MAX_ACTIONS = 500_000
"""Of one session; more are counted."""
MAX_EARLY_STEPS = 64
"""Steps whose actions are remembered before the call is known that opened them."""
MAX_EARLY = 10_000
"""Actions of each."""
_MESSAGES = ("messages", "input")
"""Where requests have them: Chat Completions and Messages, Responses."""


@dataclass(frozen=True, slots=True)
class Step:
    """One action that followed an answer, in the step that it opened."""

    record: int
    tool: str
    """The tool call that it comes from; empty where that is not known."""
    action: str
    subject: object
    """As records have it."""
    verdict: str
    rule: str
    reason: str
    decider: str
    reversible: str
    count: int


@dataclass(frozen=True, slots=True)
class Prompt:
    """What was asked, in the upstream's form; all of it is None where it was not kept."""

    messages_from: int = 0
    messages: list[Any] | None = None
    tools: list[Any] | None = None
    """Those that are offered; None where they are those of the turn before."""
    request: dict[str, Any] | None = None
    """All else in it: the model, the temperature, the system prompt of APIs that have it apart."""


@dataclass(frozen=True, slots=True)
class Turn:
    """One line."""

    version: int
    session: str
    sandbox: str
    agent: str
    agent_version: str
    policy: str
    conversation: str
    parent: str
    turn: int
    """Within the conversation, from 0."""
    record: int
    at: float
    """Seconds since the epoch, when it was asked."""
    seconds: float
    source: str
    model: str
    api: str
    """Of what was answered; empty where that is not known."""
    ending: str
    status: int
    finish: str
    prompt: Prompt
    text: str
    thinking: str
    tools: tuple[ToolCall, ...]
    complete: bool
    """The answer is all here."""
    sampled: Sampled
    input_tokens: int
    output_tokens: int
    cached_tokens: int
    written_tokens: int
    estimated: bool
    cost: int
    """In billionths of the currency."""
    currency: str
    step: int
    """The step that it opened; 0 where it asked for nothing."""
    actions: tuple[Step, ...]
    actions_left_out: int
    missing: tuple[str, ...]
    """What could not be had, and why."""


@dataclass(frozen=True, slots=True)
class _Call:
    number: int
    used: Used
    context: Context


class _Session:
    """What is known of one session before its contents are read."""

    def __init__(self, records: Iterable[tuple[int, Record]]) -> None:
        self.conversations: dict[str, list[_Call]] = {}
        self.actions: dict[int, list[Step]] = {}
        self.left_out: dict[int, int] = {}
        self._early: dict[int, list[Step]] = {}
        """Of steps that no answer is known to have opened. An agent may act on one before all of it was there to be
        accounted for; most of them are of no answer, such as execs, and are forgotten."""
        self.kept: dict[tuple[Content, int], tuple[str, bool]] = {}
        self.calls = self._actions = 0
        for number, record in records:
            self._take(number, record)

    def _take(self, number: int, record: Record) -> None:
        event = record.event
        if isinstance(event, PayloadKept) and event.call and event.content in (Content.PROMPT, Content.RESPONSE):
            if len(self.kept) < 2 * MAX_CALLS:
                self.kept[event.content, event.call] = event.digest, event.is_whole
        elif isinstance(event, Used) and event.kind is Kind.MODEL_CALL:
            self.calls += 1
            if self.calls <= MAX_CALLS:
                self.conversations.setdefault(event.conversation, []).append(_Call(number, event, record.context))
                if event.opened:
                    self.actions.setdefault(event.opened, self._early.pop(event.opened, []))
        elif isinstance(event, Decision):
            origin = event.action.origin
            if not origin.step or origin.unexplained or event.action.kind is Kind.MODEL_CALL:
                return
            steps = self.actions.get(origin.step)
            is_early = steps is None
            if steps is None:
                steps = self._early.setdefault(origin.step, [])
                if len(self._early) > MAX_EARLY_STEPS:
                    del self._early[next(iter(self._early))]
            if self._actions >= MAX_ACTIONS or (is_early and len(steps) >= MAX_EARLY):
                self.left_out[origin.step] = self.left_out.get(origin.step, 0) + event.count
                return
            self._actions += not is_early
            steps.append(_step(number, event))


def _step(number: int, decision: Decision) -> Step:
    action = decision.action
    return Step(
        number,
        action.origin.tool,
        action.name,
        to_plain(action.subject)[0],
        decision.verdict.name.lower(),
        decision.rule,
        decision.reason,
        decision.decider,
        action.reversible.value,
        decision.count,
    )


def trajectories(
    sessions: Iterable[str], records_of: Callable[[str], Iterable[tuple[int, Record]]], payloads: Payloads
) -> Iterator[Turn]:
    """The turns of these sessions, by conversation. ``records_of`` gives the records of one, in their order.

    Of one session what it did is in memory, and of what was said one turn. Raises what taking a record raises.
    """
    for name in sessions:
        session = _Session(records_of(name))
        for calls in session.conversations.values():
            yield from _turns(session, calls, payloads)


def _turns(session: _Session, calls: Sequence[_Call], payloads: Payloads) -> Iterator[Turn]:
    messages: list[Any] | None = None
    tools: object = None
    for turn, call in enumerate(calls):
        missing: list[str] = []
        prompt = _prompt(session, call.used, payloads, missing)
        whole = prompt.messages
        if whole is not None:
            before = _same(messages or [], whole)
            prompt = replace(prompt, messages_from=before, messages=whole[before:])
            messages = whole
            if tools is not None and _same([tools], [prompt.tools]):
                prompt = replace(prompt, tools=None)
            else:
                tools = prompt.tools
        yield _turn(session, call, turn, prompt, payloads, missing)


def _same(one: list[Any], other: list[Any]) -> int:
    """How many messages both begin with."""
    try:
        differ = (at for at, (a, b) in enumerate(zip(one, other, strict=False)) if a != b)
        return next(differ, min(len(one), len(other)))
    except RecursionError:
        return 0


def _content(
    session: _Session, used: Used, content: Content, payloads: Payloads, missing: list[str]
) -> tuple[bytes, bool] | None:
    kept = session.kept.get((content, used.call)) if used.call else None
    if kept is None:
        missing.append(f"{content.value}: it was not kept")
        return None
    try:
        return payloads.read(kept[0]), kept[1]
    except PayloadError as error:
        missing.append(f"{content.value}: {error}")
        return None


def _prompt(session: _Session, used: Used, payloads: Payloads, missing: list[str]) -> Prompt:
    found = _content(session, used, Content.PROMPT, payloads, missing)
    if found is None:
        return Prompt()
    try:
        body = json.loads(found[0], parse_constant=refuse, parse_float=_finite) if found[1] else None
    except (ValueError, RecursionError):
        body = None
    if not isinstance(body, dict):
        missing.append("prompt: it is no JSON" if found[1] else "prompt: only its beginning was kept")
        return Prompt()
    said: Any = next((body.pop(name) for name in _MESSAGES if name in body), [])
    tools = body.pop("tools", [])
    return Prompt(0, said if isinstance(said, list) else [said], tools if isinstance(tools, list) else [tools], body)


def _finite(text: str) -> float:
    number = float(text)
    if not isfinite(number):
        raise ValueError("a number is too large")
    return number


def _turn(session: _Session, call: _Call, turn: int, prompt: Prompt, payloads: Payloads, missing: list[str]) -> Turn:
    used, context = call.used, call.context
    found = _content(session, used, Content.RESPONSE, payloads, missing)
    api: Api | None = None
    answer = Answer(tools=used.tools, finish=used.finish)
    if found is not None:
        api = recognise(found[0])
        if api is None:
            missing.append("response: it is of no API that is known")
        else:
            answer = read_answer(api, found[0], is_whole=found[1], sampling=True)
            if answer.fault:
                missing.append(f"response: {answer.fault}")
    return Turn(
        VERSION,
        context.session,
        context.sandbox,
        context.agent,
        context.agent_version,
        context.policy_hash,
        used.conversation,
        used.parent,
        turn,
        call.number,
        round(used.started * MICROSECONDS) / MICROSECONDS,
        used.seconds,
        used.source,
        used.name,
        api.value if api is not None else "",
        used.ending.value,
        used.status,
        answer.finish or used.finish,
        prompt,
        answer.text,
        answer.thinking,
        answer.tools,
        answer.complete,
        answer.sampled,
        used.input_tokens,
        used.output_tokens,
        used.cached_tokens,
        used.written_tokens,
        used.estimated,
        used.cost,
        used.currency,
        used.opened,
        tuple(session.actions.get(used.opened, ())) if used.opened else (),
        session.left_out.get(used.opened, 0),
        tuple(missing),
    )


# ---- as lines and as columns ----


def turn_line(turn: Turn) -> str:
    """A turn as JSON in ASCII."""
    try:
        return _json(_values(turn))
    except RecursionError:
        missing = (*turn.missing, "prompt: it is nested too deeply")
        return _json(_values(replace(turn, prompt=Prompt(), missing=missing)))


_json = json.JSONEncoder(separators=(",", ":"), allow_nan=False).encode


def _values(turn: Turn) -> dict[str, Any]:
    """Its fields. What a prompt holds is not copied, since it is large, and as deep as its author likes."""
    if any(not isfinite(each) for each in turn.sampled.logprobs):  # of an impossible token; JSON has none
        missing = (*turn.missing, "sampled: a probability is no number")
        turn = replace(turn, sampled=replace(turn.sampled, logprobs=()), missing=missing)
    values = {name: getattr(turn, name) for name in Turn.__dataclass_fields__}
    return {
        **values,
        "prompt": {name: getattr(turn.prompt, name) for name in Prompt.__dataclass_fields__},
        "sampled": asdict(turn.sampled),
        "tools": [asdict(each) for each in turn.tools],
        "actions": [asdict(each) for each in turn.actions],
    }


_AS_JSON = ("messages", "offered", "request", "tools", "actions", "missing")


def turn_row(turn: Turn) -> dict[str, Any]:
    """A turn as a row of a table: flat, and as JSON what has the upstream's form, or one that differs from row to row.
    The tools that a prompt offers are ``offered``."""
    values = _values(turn)
    prompt, sampled = values.pop("prompt"), values.pop("sampled")
    values |= {"messages_from": prompt["messages_from"], "messages": prompt["messages"]}
    values |= {"offered": prompt["tools"], "request": prompt["request"]}
    for name in _AS_JSON:
        try:
            values[name] = _json(values[name])
        except RecursionError:
            values[name] = "null"
    for name, value in values.items():
        if isinstance(value, str):
            values[name] = mended(value)
    return {**values, **{name: list(each) for name, each in sampled.items()}, "at": round(turn.at * MICROSECONDS)}
