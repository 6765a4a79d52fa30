"""Where a replay is, and what a key does to it. It decides without I/O: :mod:`corral.log.replay` reads and prints.

The position is that of the item to be shown next. Time runs from item to item: the wait before one is its distance from
the one before, divided by the speed, and at most :data:`LONGEST_WAIT`, because an agent may think for an hour.
"""

from __future__ import annotations

import re
from bisect import bisect_left
from collections.abc import Callable, Sequence
from enum import Enum

from corral.errors import RequestError
from corral.log.items import Item, clock

LONGEST_WAIT = 3.0
"""Seconds."""
SKIP = 10.0
"""Seconds of the session that one press of an arrow key goes."""
MIN_SPEED, MAX_SPEED = 1 / 64, 1024.0
MAX_TYPED = 200
"""Characters of what is typed."""

_PLACE = re.compile(
    r"#?(?P<number>[0-9]{1,18})"
    r"|step (?P<step>[0-9]{1,18})"
    r"|(?P<unexplained>unexplained)"
    r"|tool (?P<tool>\S{1,200})"
    r"|(?P<only>[0-9]{1,9}(\.[0-9]{1,6})?)s"
    r"|((?P<hours>[0-9]{1,5}):)?(?P<minutes>[0-9]{1,5}):(?P<seconds>[0-9]{1,2}(\.[0-9]{1,6})?)",
    re.ASCII,
)


class Key(Enum):
    """What can be pressed, apart from text."""

    PAUSE = "space"
    NEXT = "n"
    PREVIOUS = "p"
    SEARCH = "/"
    GO = "g"
    BACK = "left"
    ON = "right"
    FASTER = "+"
    SLOWER = "-"
    QUIT = "q"
    ENTER = "enter"
    ESCAPE = "escape"
    ERASE = "backspace"


_COMMANDS = {
    " ": Key.PAUSE,
    "n": Key.NEXT,
    "p": Key.PREVIOUS,
    "/": Key.SEARCH,
    "g": Key.GO,
    "+": Key.FASTER,
    "=": Key.FASTER,
    "-": Key.SLOWER,
    "q": Key.QUIT,
}


class Player:
    """Plays items, which may be read as late as they are asked for, in the order of their offsets."""

    def __init__(self, items: Sequence[Item], *, speed: float = 1.0, paused: bool = False) -> None:
        """Raises RequestError for a speed that is none."""
        if not MIN_SPEED <= speed <= MAX_SPEED:
            raise RequestError(f"a speed is between {MIN_SPEED:g} and {MAX_SPEED:g}, not {speed:g}")
        self.items = items
        self.speed = speed
        self.paused = paused
        self.position = 0
        self.ended = False
        """Whether somebody said that it is enough."""
        self.message = ""
        """What to say of the last key."""
        self.typed: str | None = None
        """What is typed behind ``/`` or ``g``; None where nothing is."""
        self._due = False
        """Whether the next item is to be shown even though it is paused."""
        self._typing = Key.SEARCH
        self._sought = ""

    # ---- time ----

    def wait(self) -> float | None:
        """Seconds between the item shown last and the next; None where only a key brings it."""
        if self.typed is not None or self.position >= len(self.items):
            return None
        if self._due:
            return 0.0
        if self.paused:
            return None
        if self.position == 0:
            return 0.0
        distance = self.items[self.position].offset - self.items[self.position - 1].offset
        return min(max(0.0, distance) / self.speed, LONGEST_WAIT)

    def take(self) -> Item | None:
        """The next item; the position goes on. None at the end."""
        if self.position >= len(self.items):
            return None
        self._due = False
        found = self.items[self.position]
        self.position += 1
        return found

    # ---- places ----

    def seek(self, place: str) -> None:
        """Goes to ``12`` or ``#12`` (the first record from that number on), ``step 3``, ``tool ID``, ``unexplained``
        (the next one), ``12.5s``, ``1:05`` or ``1:02:03`` (the first item from that time on). Raises RequestError where
        there is no such place."""
        match = _PLACE.fullmatch(place.strip())
        if match is None:
            raise RequestError(
                "a place is a record's number, `step 3`, `tool ID`, `unexplained`, `12.5s`, or a time such as 1:05"
            )
        if match["number"]:
            self._go(self._first(int(match["number"]), by_number=True))
        elif match["step"]:
            step = int(match["step"])
            self._go(self._where(lambda item: item.step == step))
        elif match["tool"]:
            self._go(self._where(lambda item: item.tool == match["tool"]))
        elif match["unexplained"]:
            self._go(self._where(lambda item: item.unexplained, self.position))
        else:
            whole = int(match["hours"] or 0) * 3600 + int(match["minutes"] or 0) * 60
            self._go(self._first(whole + float(match["only"] or match["seconds"])))

    def search(self, text: str) -> None:
        """Goes to the next item that has this text; from the end it goes on at the beginning. Raises RequestError where
        none has it."""
        order = (*range(self.position, len(self.items)), *range(self.position))
        found = next((at for at in order if self.items[at].has(text)), None)
        if found is None:
            raise RequestError("nothing has this text")
        self._sought = text
        self._go(found)

    def _where(self, is_wanted: Callable[[Item], bool], start: int = 0) -> int:
        return next((at for at in range(start, len(self.items)) if is_wanted(self.items[at])), len(self.items))

    def _first(self, wanted: float, *, by_number: bool = False) -> int:
        return bisect_left(self.items, wanted, key=lambda item: item.number if by_number else item.offset)

    def _go(self, position: int) -> None:
        if position >= len(self.items):
            raise RequestError("the session has no such place")
        self.position, self._due = position, True

    def _skip(self, seconds: float) -> None:
        if self.items:
            now = self.items[max(0, self.position - 1)].offset
            self._go(min(self._first(max(0.0, now + seconds)), len(self.items) - 1))

    # ---- keys ----

    def press(self, key: Key | str) -> None:
        """Does what a key says; ``str`` is one character."""
        self.message = ""
        if self.typed is not None:
            self._type(key)
            return
        command = _COMMANDS.get(key) if isinstance(key, str) else key
        if command is Key.PAUSE:
            self.paused = not self.paused
        elif command is Key.NEXT:
            self.paused = self._due = True
        elif command is Key.PREVIOUS and self.items:
            self.paused = True
            self._go(max(0, self.position - 2))
        elif command in (Key.SEARCH, Key.GO):
            self.typed, self._typing = "", command
        elif command in (Key.FASTER, Key.SLOWER):
            factor = 2.0 if command is Key.FASTER else 0.5
            self.speed = min(max(MIN_SPEED, self.speed * factor), MAX_SPEED)
        elif command in (Key.BACK, Key.ON):
            self._skip(-SKIP if command is Key.BACK else SKIP)
        elif command is Key.QUIT:
            self.ended = True

    def _type(self, key: Key | str) -> None:
        typed = self.typed or ""
        if isinstance(key, str):
            self.typed = (typed + key)[:MAX_TYPED]
        elif key is Key.ERASE:
            self.typed = typed[:-1]
        elif key in (Key.ESCAPE, Key.ENTER, Key.QUIT):
            self.typed = None
            self.ended = key is Key.QUIT
            if key is Key.ENTER:
                self._enter(typed)

    def _enter(self, typed: str) -> None:
        text = typed if self._typing is Key.GO else typed or self._sought
        if not text:
            return
        try:
            if self._typing is Key.GO:
                self.seek(text)
            else:
                self.search(text)
        except RequestError as error:
            self.message = str(error)

    @property
    def status(self) -> str:
        """One line about all this; what was typed is in it as it was typed."""
        if self.typed is not None:
            return f"{'go to' if self._typing is Key.GO else 'search'}: {self.typed}"
        if self.message:
            return self.message
        total = len(self.items)
        now = clock(self.items[self.position - 1].offset) if 0 < self.position <= total else clock(0.0)
        doing = "end" if self.position >= total else "paused" if self.paused else f"{self.speed:g} times"
        return f"{now}  {self.position} of {total}  {doing}  (space n p / g q, arrows, + -)"
