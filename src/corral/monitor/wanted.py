"""Whether an action is what a tool call has asked for: its arguments, compared with commands, paths and hosts.

A guess. Agents wrap what they were told (``bash -lc``, ``eval``, quotes, a directory before it), so texts are compared
by their words. A guess is only needed where several tool calls are open at once.
"""

from __future__ import annotations

import json
import os
import re
from collections.abc import Iterator, Sequence
from itertools import chain
from typing import NamedTuple

from corral.actions import Endpoint, File, Program, Request, Subject, ToolCall

MAX_TEXT = 64 * 1024
"""Characters of the arguments of one tool call that are compared."""
MAX_COMMAND = 16 * 1024
"""Characters of a command that are compared: its process waits meanwhile."""
MAX_VALUES = 256
"""Values of one tool call that are compared."""
_MAX_PARSED = 256 * 1024
"""Characters of arguments that are taken for JSON at all."""
_MIN_WORD = 4
"""Characters of a single word that says something where it is only a part of a text."""
_BETWEEN_WORDS = str.maketrans(dict.fromkeys("'\"\\;|&<>(){}`$\0", " "))
_SCRIPT_FLAG = re.compile(r"[-+][A-Za-z]*c[A-Za-z]*")


class Likeness(NamedTuple):
    """How well an action fits a tool call; the larger the better."""

    rank: int
    """0: not at all; 1: one is a part of the other; 2: it ends so; 3: the same."""
    length: int
    """Characters that are the same."""


NONE = Likeness(0, 0)


def words_of(text: str) -> str:
    """The words of a text, one space between them and around them; empty where there are none."""
    words = " ".join(text[:MAX_TEXT].translate(_BETWEEN_WORDS).split())
    return f" {words} " if words else ""


class Wanted:
    """What one tool call asks for."""

    __slots__ = ("_texts", "_values", "size")

    def __init__(self, call: ToolCall) -> None:
        values: list[str] = []
        left = MAX_TEXT
        for value in _strings(call.arguments):
            values.append(value[:left])
            left -= len(value)
            if left <= 0 or len(values) >= MAX_VALUES:
                break
        self._values = tuple(values)
        self._texts = tuple(text for text in map(words_of, values) if text)
        self.size = sum(map(len, chain(self._values, self._texts)))
        """Characters that it keeps."""

    def likeness(self, subject: Subject | None, commands: Sequence[str]) -> Likeness:
        """How well an action with this subject fits; ``commands`` are what a program can be said to run."""
        match subject:
            case Program():
                return self.of_commands(commands)
            case File():
                return max((self.of_path(path) for path in (subject.path, subject.other) if path), default=NONE)
            case Endpoint():
                return self.of_host(subject.name or subject.address or subject.path)
            case Request():
                return self.of_host(subject.endpoint.name or subject.endpoint.address)
        return NONE

    def of_commands(self, commands: Sequence[str]) -> Likeness:
        """``commands``: what can be said to be run, in words (:func:`words_of`)."""
        return max((_alike(command, text) for command in commands for text in self._texts), default=NONE)

    def of_path(self, path: str) -> Likeness:
        """By an absolute path."""
        return max((_alike_path(path, value) for value in self._values), default=NONE)

    def of_host(self, host: str) -> Likeness:
        """By a name or an address."""
        wanted = host.lower()
        if not wanted:
            return NONE
        bounded = re.compile(rf"(?<![\w.-]){re.escape(wanted)}(?![\w-]|\.\w)")
        found = any(bounded.search(value.lower()) for value in self._values if wanted in value.lower())
        return Likeness(1, len(wanted)) if found else NONE


def commands_of(program: Program) -> tuple[str, ...]:
    """What a program that is executed can be said to run: all of its arguments, the last, and a script after ``-c``."""
    argv = []
    left = MAX_COMMAND
    for argument in program.argv:
        argv.append(argument[:left])
        left -= len(argument)
        if left < 0:
            argv[-1] = argv[-1].rpartition(" ")[0]  # half a word is like nothing
        if left <= 0:
            break
    found = [" ".join(argv)]
    if argv:
        found += [" ".join((os.path.basename(argv[0]), *argv[1:])), argv[-1]]
    for at, argument in enumerate(argv[1:-1], 1):
        if _SCRIPT_FLAG.fullmatch(argument):
            found += [each for each in argv[at + 1 :] if not each.startswith("-")][:1]
            break
    texts = (words_of(each) for each in dict.fromkeys(found))
    return tuple(dict.fromkeys(text for text in texts if text))


def _alike(command: str, text: str) -> Likeness:
    if command == text:
        return Likeness(3, len(text))
    shorter, longer = sorted((command, text), key=len)
    says_something = len(shorter) >= _MIN_WORD + 2
    return Likeness(1, len(shorter)) if says_something and shorter in longer else NONE


def _alike_path(path: str, value: str) -> Likeness:
    named = value.strip().removeprefix("file://")
    if not named or "\n" in named:
        return _mentioned(path, value)
    if os.path.normpath(named) == path:
        return Likeness(3, len(path))
    relative = os.path.normpath(named).lstrip("/")
    if relative not in ("", ".") and path.endswith(f"/{relative}"):
        return Likeness(2, len(relative))
    return _mentioned(path, value)


def _mentioned(path: str, value: str) -> Likeness:
    name = os.path.basename(path)
    bounded = re.compile(rf"(?<![\w.-]){re.escape(name)}(?![\w-]|\.\w)")
    return Likeness(1, len(name)) if len(name) > 1 and name in value and bounded.search(value) else NONE


def _strings(arguments: str) -> Iterator[str]:
    """The texts in JSON, wherever they are, and lists of texts as one text; what is no JSON is a text itself."""
    if len(arguments) > _MAX_PARSED:
        yield arguments
        return
    try:
        value = json.loads(arguments)
    except (ValueError, RecursionError):
        yield arguments
        return
    waiting = [value]
    while waiting:
        each = waiting.pop()
        if isinstance(each, str):
            yield each
        elif isinstance(each, list):
            if each and all(isinstance(part, str) for part in each):
                yield " ".join(each)
            waiting += reversed(each)
        elif isinstance(each, dict):
            waiting += reversed(each.values())
