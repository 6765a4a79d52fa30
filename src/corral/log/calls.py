"""A time line on which a call of a model says what was answered, and each action whose conversation it is of.

Answers lie beside the log, as they came (:mod:`corral.log.payloads`); what they say is read by
:mod:`corral.modelapi`. Who keeps none still has the record of each call, with its tool calls and its tokens.
"""

from __future__ import annotations

from array import array
from collections.abc import Iterator, Sequence
from dataclasses import replace
from typing import overload

from corral.actions import Content, Kind, Used
from corral.log.conversations import Tree
from corral.log.events import PayloadKept
from corral.log.items import MAX_DETAILS, Detail, Item, shown, shown_line
from corral.log.payload_keys import PayloadError
from corral.log.payloads import Payloads
from corral.log.records import Record
from corral.log.timeline import Timeline
from corral.modelapi.reader import read_answer
from corral.modelapi.recognise import recognise

MAX_CALLS = 100_000
"""Calls of one session whose contents are looked for."""
_SHOWN = 16 * 1024


class WithCalls(Sequence[Item]):
    """The items of a time line, with what models answered. Reading one raises as there."""

    def __init__(self, line: Timeline, payloads: Payloads, tree: Tree) -> None:
        """Raises NoteError or LogDamaged."""
        self._line, self._payloads, self._tree = line, payloads, tree
        self._depths = {each.id: each.depth for each in tree.conversations}
        self._kept: dict[tuple[Content, int], tuple[str, bool]] = {}
        self._calls: dict[int, Used] = {}
        """By the number of the record."""
        for number, _, record in line.marked():
            event = record.event
            if isinstance(event, PayloadKept) and event.call and len(self._kept) < 2 * MAX_CALLS:
                self._kept[event.content, event.call] = event.digest, event.is_whole
            elif isinstance(event, Used) and len(self._calls) < MAX_CALLS:
                self._calls[number] = replace(event, tools=(), personal=())

    @property
    def offsets(self) -> array[float]:
        """As :class:`Timeline`."""
        return self._line.offsets

    def marked(self) -> Iterator[tuple[int, float, Record]]:
        """As :class:`Timeline`."""
        return self._line.marked()

    def __len__(self) -> int:
        return len(self._line)

    @overload
    def __getitem__(self, position: int) -> Item: ...
    @overload
    def __getitem__(self, position: slice) -> list[Item]: ...
    def __getitem__(self, position: int | slice) -> Item | list[Item]:
        if isinstance(position, slice):
            return [self._with(each) for each in self._line[position]]
        return self._with(self._line[position])

    def _with(self, item: Item) -> Item:
        used = self._calls.get(item.number)
        if used is not None and used.kind is Kind.MODEL_CALL:
            conversation = shown_line(used.conversation, 80)
            found = (*self._answer(used), *item.details)[:MAX_DETAILS]
            return replace(item, details=found, conversation=conversation, depth=self._depths.get(conversation, 0))
        if used is not None:
            item = replace(item, details=(*self._query(used), *item.details)[:MAX_DETAILS])
        conversation, depth = self._tree.steps.get(item.step, ("", -1))
        name = self._tree.names.get((item.step, item.tool), "")
        details = item.details
        if name:
            details = tuple(
                replace(each, text=f"{item.tool} ({name})") if each.name == "tool call" else each for each in details
            )
        return replace(item, conversation=conversation, depth=depth + 1, details=details)

    def _answer(self, used: Used) -> Iterator[Detail]:
        """What was answered, where that was kept and is here."""
        kept = self._kept.get((Content.RESPONSE, used.call))
        if not used.call or kept is None:
            return
        digest, is_whole = kept
        try:
            body = self._payloads.read(digest)
        except PayloadError as error:
            yield Detail("answer", shown(f"it cannot be read: {error}"))
            return
        api = recognise(body)
        if api is None:
            yield Detail("answer", shown(f"it is of no API that is known: {body[:200]!r}"))
            return
        answer = read_answer(api, body, is_whole=is_whole)
        if answer.thinking:
            yield Detail("thinking", shown(answer.thinking, _SHOWN))
        if answer.text:
            yield Detail("answer", shown(answer.text, _SHOWN))
        for call in answer.tools[:16]:
            yield Detail(shown(f"calls {call.name}", 60), shown(f"{call.id}: {call.arguments}", _SHOWN))
        if answer.fault:
            yield Detail("not all of it", answer.fault)

    def _query(self, used: Used) -> Iterator[Detail]:
        """What was asked of data or a service."""
        kept = self._kept.get((Content.QUERY, used.call))
        if not used.call or kept is None:
            return
        try:
            yield Detail("asked", shown(self._payloads.read(kept[0]).decode("utf-8", "replace"), _SHOWN))
        except PayloadError as error:
            yield Detail("asked", shown(f"it cannot be read: {error}"))
