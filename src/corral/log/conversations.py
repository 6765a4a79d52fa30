"""What was said to models in one session, as a tree: conversations, those that a tool call of another began, the
calls of each, the tool calls that their answers asked for, and what was done for each of these.

An answer's actions are those of the step that it opened. All of it is made of records, in one pass, and bounded.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterator
from contextlib import suppress
from dataclasses import dataclass, replace

from corral.actions import Kind, ToolCall, Used
from corral.log.digest import Spend
from corral.log.items import shown_line
from corral.log.narration import money
from corral.log.records import summary
from corral.log.spending import Spent
from corral.log.timeline import Entries, read_record, session_mark

MAX_CONVERSATIONS = 1000
MAX_CALLS = 20_000
"""Of all conversations."""
MAX_TOOLS = 64
"""Tool calls of one answer that are told apart."""
MAX_DEPTH = 8
"""Deeper conversations are shown as deep."""
MAX_UNEXPLAINED = 1000
"""Records of which no answer explains the action, whose numbers are kept."""
_USED, _DECISION, _UNEXPLAINED = b'"event":"used"', b'"event":"decision"', b'"unexplained":true'
"""A quotation mark within a text is escaped in JSON, so no text of an agent can look like them."""


@dataclass(frozen=True, slots=True)
class ToolUse:
    """What was done for one tool call of an answer; the one without an id is what no tool call could be named for."""

    id: str
    name: str
    actions: int
    refused: int
    first: int
    """The number of the first record of it; meaningless where there is none."""


@dataclass(frozen=True, slots=True)
class Call:
    """One call of a model."""

    number: int
    """Of its record."""
    model: str
    opened: int
    """The step that its answer opened; 0 where it asked for nothing."""
    words: str
    """What is said of it, in one line."""
    tools: tuple[ToolUse, ...]


@dataclass(frozen=True, slots=True)
class Conversation:
    """One conversation, which is told from others by how it began. All texts are printable."""

    id: str
    parent: str
    depth: int
    calls: tuple[Call, ...]
    spend: Spend


@dataclass(frozen=True, slots=True)
class Tree:
    """All of them, each behind the one that began it."""

    conversations: tuple[Conversation, ...]
    steps: dict[int, tuple[str, int]]
    """Steps with their conversation and how deep that is."""
    names: dict[tuple[int, str], str]
    """Names of tools by step and tool call."""
    unexplained: int
    """Actions that no answer explains."""
    places: tuple[int, ...]
    """Records of the first of them."""
    left_out: int
    """Calls that are in no conversation here, because there were too many."""


class _Step:
    """What the answer of one call had done."""

    def __init__(self, tools: tuple[ToolCall, ...]) -> None:
        self.tools = {each.id: each.name for each in tools[:MAX_TOOLS]}
        self.counts: dict[str, list[int]] = {}
        """By tool call: actions, refusals, first record."""

    def did(self, number: int, done: _Done) -> None:
        known = done.tool if done.tool in self.tools else ""
        counts = self.counts.setdefault(known, [0, 0, number])
        counts[0] += done.count
        counts[1] += done.count * done.is_refused

    def uses(self) -> tuple[ToolUse, ...]:
        ids = [*self.tools, *([""] if "" in self.counts and "" not in self.tools else [])]
        return tuple(
            ToolUse(shown_line(id_), shown_line(self.tools.get(id_, "")), *self.counts.get(id_, (0, 0, 0)))
            for id_ in ids
        )


class _Growing:
    """A conversation that is being read."""

    def __init__(self, parent: str, depth: int) -> None:
        self.parent, self.depth = parent, depth
        self.calls: list[tuple[int, Used, _Step]] = []
        self.children: list[str] = []
        self.spent = Spent()


def tree_of(log: Entries, session: str) -> Tree:
    """The tree of a session of a log, of whose records only those are parsed that have a part in it.

    An agent may act on an answer before all of that was there to be accounted for, so calls are looked for first. What
    is no record is passed over. Raises NoteError or LogDamaged.
    """
    reading, wanted = _Reading(), session_mark(session)
    has_unexplained = False
    for number, entry in log.entries():
        if wanted not in entry:
            continue
        has_unexplained = has_unexplained or _UNEXPLAINED in entry
        if _USED in entry:
            record = read_record(entry)
            if record is not None and record.context.session == session and isinstance(record.event, Used):
                reading.used(number, record.event)
    if not reading.has_steps and not has_unexplained:
        return reading.tree()
    for number, entry in log.entries():
        if wanted in entry and _DECISION in entry and (reading.has_steps or _UNEXPLAINED in entry):
            with suppress(ValueError, RecursionError):
                done, is_unexplained = _done(entry)
                reading.did(number, done, is_unexplained=is_unexplained)
    return reading.tree()


@dataclass(frozen=True, slots=True)
class _Done:
    """What is looked at of a decision."""

    step: int
    tool: str
    action: str
    count: int
    is_refused: bool


_FIELDS = re.compile(
    rb'"count":(\d{1,15}),"decider":.*?,"kind":"([a-z.]{1,40})",.*?'
    rb'"step":(\d{1,15}),"tool":("(?:[^"\\]|\\.)*"),"unexplained":(true|false)\}.*?,"verdict":"(allow|ask|deny|kill)"\}',
    re.DOTALL,
)
"""Where a decision's record has what is looked at: to parse all of it would take five times as long."""


def _done(entry: bytes) -> tuple[_Done, bool]:
    """Of a decision, and whether no answer explains it. Raises ValueError (or RecursionError) for what is none."""
    match = _FIELDS.search(entry)
    if match is not None:
        count, kind, step, tool, is_unexplained, verdict = match.groups()
        done = _Done(int(step), json.loads(tool), kind.decode(), int(count), verdict != b"allow")
        return done, is_unexplained == b"true"
    found = summary(entry)  # of a version without these fields
    done = _Done(found.step, found.tool, found.action, found.count, found.verdict != "allow")
    return done, bool(found.unexplained)


class _Reading:
    """What was read of a session up to here."""

    def __init__(self) -> None:
        self._found: dict[str, _Growing] = {}
        self._roots: list[str] = []
        self._steps: dict[int, _Step] = {}
        self._of_step: dict[int, str] = {}
        self._unexplained = self._left_out = self._calls = 0
        self._places: list[int] = []

    @property
    def has_steps(self) -> bool:
        """Whether an answer has opened one."""
        return bool(self._steps)

    def did(self, number: int, done: _Done, *, is_unexplained: bool) -> None:
        """Takes a decision."""
        if is_unexplained:
            self._unexplained += done.count
            if len(self._places) < MAX_UNEXPLAINED:
                self._places.append(number)
        # Asking a model is how a step ends, not what it is for.
        elif done.step in self._steps and done.action != Kind.MODEL_CALL.value:
            self._steps[done.step].did(number, done)

    def used(self, number: int, used: Used) -> None:
        """Takes the account of a call."""
        if used.kind is not Kind.MODEL_CALL:
            return
        found, name = self._found, used.conversation
        growing = found.get(name)
        if self._calls >= MAX_CALLS or (growing is None and len(found) >= MAX_CONVERSATIONS):
            self._left_out += 1
            return
        self._calls += 1
        if growing is None:
            # A parent must have been there before: so there is no circle, whatever records say.
            parent = used.parent if used.parent in found else ""
            depth = min(found[parent].depth + 1, MAX_DEPTH) if parent else 0
            growing = found[name] = _Growing(used.parent, depth)
            (found[parent].children if parent else self._roots).append(name)
        step = _Step(used.tools)
        growing.calls.append((number, _without_texts(used), step))
        growing.spent.take(used)
        if used.opened:
            self._steps[used.opened], self._of_step[used.opened] = step, name

    def tree(self) -> Tree:
        found = self._found
        return Tree(
            tuple(_conversation(name, found[name]) for name in _in_order(self._roots, found)),
            {step: (shown_line(name, 80), found[name].depth) for step, name in self._of_step.items()},
            {
                (number, shown_line(id_)): shown_line(name, 60)
                for number, step in self._steps.items()
                for id_, name in step.tools.items()
            },
            self._unexplained,
            tuple(self._places),
            self._left_out,
        )


def _without_texts(used: Used) -> Used:
    """What is kept of it here: its tool calls are in the step."""
    return replace(used, tools=(), personal=())


def _in_order(roots: list[str], found: dict[str, _Growing]) -> Iterator[str]:
    waiting = list(reversed(roots))
    while waiting:
        name = waiting.pop()
        yield name
        waiting += reversed(found[name].children)


def _conversation(name: str, growing: _Growing) -> Conversation:
    calls = tuple(
        Call(number, shown_line(used.name, 80), used.opened, shown_line(_words(used)), step.uses())
        for number, used, step in growing.calls
    )
    return Conversation(
        shown_line(name, 80), shown_line(growing.parent, 80), growing.depth, calls, growing.spent.total()
    )


def _words(used: Used) -> str:
    cost = f", {money(used.cost, used.currency)}" if used.cost else ""
    ended = f", {used.ending.value}" if used.ending.value != "answered" else ""
    return f"{used.name}: {used.input_tokens} tokens in, {used.output_tokens} out{cost}, {used.seconds:.1f} s{ended}"


def tree_lines(tree: Tree) -> Iterator[str]:
    """The tree as printable lines."""
    for each in tree.conversations:
        margin = "  " * each.depth
        costs = "".join(f", {money(amount, currency)}" for currency, amount in each.spend.costs)
        begun = f", begun by {each.parent}" if each.parent else ""
        tokens = f"{each.spend.input_tokens} tokens in, {each.spend.output_tokens} out"
        yield f"{margin}conversation {each.id or 'without a name'}{begun}: {each.spend.calls} calls, {tokens}{costs}"
        for call in each.calls:
            opens = f", opens step {call.opened}" if call.opened else ""
            yield f"{margin}  #{call.number} {call.words}{opens}"
            for use in call.tools:
                yield f"{margin}    {use_words(use)}"
    if tree.unexplained:
        numbers = " ".join(f"#{number}" for number in tree.places[:20])
        more = " ..." if len(tree.places) > 20 else ""
        yield f"unexplained: {tree.unexplained} actions ({numbers}{more})"
    if tree.left_out:
        yield f"{tree.left_out} more calls are not shown: there were too many"


def use_words(use: ToolUse) -> str:
    """One line about what was done for a tool call."""
    name = f"{use.name} {use.id}".strip() if use.id or use.name else "without a tool call that is known"
    refused = f", {use.refused} refused" if use.refused else ""
    return f"{name}: {use.actions} actions{refused}{f', from #{use.first}' if use.actions else ''}"
