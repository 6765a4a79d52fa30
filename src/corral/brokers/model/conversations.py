"""Which conversation a request belongs to, and which conversation has begun it. Pure state, bounded, of one sandbox.

A request continues, by the first of these that says so:

1. the answer that it names as the one before (``previous_response_id``);
2. the answer whose tool calls it gives the results of;
3. the request whose turns it begins with: the longest that is remembered.

The third is a guess where two conversations begin alike (an agent that is asked the same twice, a prompt that is
sampled several times): if the one that it would continue is waiting for an answer, or its turns are not the latest and
somebody waits, it is another. An agent that rewrites its history, as they do to save tokens, waits for nothing
meanwhile, and stays in its conversation.

Whoever asks may lie: he makes up his turns as he likes. This tells honest conversations apart, and decides nothing.
"""

from __future__ import annotations

import hashlib
import json
from collections import OrderedDict
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import islice
from typing import Any

from corral.actions import ToolCall
from corral.brokers.model.turns import Talk

MAX_CONVERSATIONS = 1024
MAX_PREFIXES = 8192
MAX_ANSWERS = 8192
"""Tool calls and answers by id."""
MAX_SAID, MAX_TEXTS = 64 * 1024, 32
"""Characters, and texts, of the arguments of one conversation's open tool calls that are looked at for prompts."""
MAX_PROMPT = 64 * 1024
"""Characters of a prompt that are looked for."""
MAX_PARENTS = 64
"""Conversations with open tool calls that are looked at, the latest first."""
MIN_PROMPT = 8
"""Characters: what is shorter stands in many places."""
_ID = 16
"""Bytes of a conversation's id."""


@dataclass(slots=True)
class Conversation:
    """One of them."""

    id: str
    parent: str
    tip: bytes = b""
    """All turns of its latest request."""
    waiting: int = 0
    """Requests of it that have no answer yet."""
    said: tuple[str, ...] = ()
    """What its open tool calls say."""


class Conversations:
    """Those of one sandbox. For one thread."""

    def __init__(self) -> None:
        self._by_id: OrderedDict[str, Conversation] = OrderedDict()
        self._prefixes: OrderedDict[bytes, str] = OrderedDict()
        """All turns of requests, to the conversation."""
        self._answers: OrderedDict[str, str] = OrderedDict()
        """Ids of answers and of tool calls, to the conversation; empty where several have used one."""

    def find(self, talk: Talk, previous: str = "") -> Conversation:
        """The conversation of a request, which is about to be made: :meth:`over` must follow."""
        chain = _chain(talk)
        found = self._continued(talk, previous, chain) or self._new(talk, chain)
        found.waiting += 1
        if not previous:  # with that, the turns are only what is new
            found.tip = chain[-1]
            _put(self._prefixes, chain[-1], found.id, MAX_PREFIXES)
        return found

    def _continued(self, talk: Talk, previous: str, chain: Sequence[bytes]) -> Conversation | None:
        if previous:
            return self._get(self._answers.get(f"answer {previous}", ""))
        for tool in talk.answered:
            found = self._get(self._answers.get(f"tool {tool}", ""))
            if found is not None:
                return found
        for prefix in reversed(chain[1:]):
            found = self._get(self._prefixes.get(prefix, ""))
            if found is not None:
                is_next = found.tip == prefix != chain[-1]
                return found if not found.waiting or is_next else None
        return None

    def _get(self, number: str) -> Conversation | None:
        found = self._by_id.get(number)
        if found is not None:
            self._by_id.move_to_end(number)
        return found

    def _new(self, talk: Talk, chain: Sequence[bytes]) -> Conversation:
        """Named by how it begins; one that begins as another has does, by which of them it is."""
        base = chain[min(talk.first, len(chain) - 1)]
        number, attempt = base[:_ID].hex(), 0
        while number in self._by_id:
            attempt += 1
            number = hashlib.sha256(base + attempt.to_bytes(8, "big")).digest()[:_ID].hex()
        made = self._by_id[number] = Conversation(number, self._parent(talk.prompts))
        if len(self._by_id) > MAX_CONVERSATIONS:
            self._by_id.popitem(last=False)
        return made

    def _parent(self, prompts: Sequence[str]) -> str:
        """Whose open tool call says what this one begins with, the latest first: clients put a prompt as it is, or put
        it into words of their own."""
        asked, room = [], MAX_PROMPT
        for each in prompts[:MAX_TEXTS]:
            if MIN_PROMPT <= len(text := each.strip()) <= room:
                room -= len(text)
                asked.append(text)
        saying = (each for each in reversed(self._by_id.values()) if each.said)
        for conversation in islice(saying, MAX_PARENTS):
            if any(prompt in said or said in prompt for said in conversation.said for prompt in asked):
                return conversation.id
        return ""

    def asked(self, conversation: Conversation) -> None:
        """The request is sent: its tool calls are answered."""
        conversation.said = ()

    def answered(self, conversation: Conversation, tools: Sequence[ToolCall], answer: str = "") -> None:
        """``answer`` is its id, where there is one."""
        if answer:
            _put(self._answers, f"answer {answer}", conversation.id, MAX_ANSWERS)
        for tool in tools:
            key = f"tool {tool.id}"
            if tool.id:  # some servers number the calls of each answer from 0
                is_other = self._answers.get(key, conversation.id) != conversation.id
                _put(self._answers, key, "" if is_other else conversation.id, MAX_ANSWERS)
        conversation.said = tuple(_said(tools))

    def over(self, conversation: Conversation) -> None:
        """The request has its answer, or never will."""
        conversation.waiting -= 1


def _put(kept: OrderedDict[Any, Any], key: object, value: object, most: int) -> None:
    kept[key] = value
    kept.move_to_end(key)
    if len(kept) > most:
        kept.popitem(last=False)


def _chain(talk: Talk) -> list[bytes]:
    """A digest of the first so many turns, for each number of them from 0."""
    chain = [talk.beginning]
    for turn in talk.turns:
        chain.append(hashlib.sha256(chain[-1] + turn).digest())
    return chain


def _said(tools: Sequence[ToolCall]) -> list[str]:
    """The texts in the arguments of tool calls that may be a prompt."""
    found: list[str] = []
    room = MAX_SAID
    for tool in tools:
        try:
            stack = [json.loads(tool.arguments)]
        except (ValueError, RecursionError):
            continue
        while stack and len(found) < MAX_TEXTS:
            value = stack.pop()
            if type(value) is dict:
                stack.extend(value.values())
            elif type(value) is list:
                stack.extend(value)
            elif type(value) is str and MIN_PROMPT <= len(text := value.strip()) <= room:
                room -= len(text)
                found.append(text)
    return found[:MAX_TEXTS]
