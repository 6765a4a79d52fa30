"""Replays a time line in a terminal, or prints it where there is none.

On a terminal the items come as they came then (see :mod:`corral.log.player`), each on lines of its own, so that what
has gone by can be scrolled back to; the last line says where the replay is and what was typed. Every text goes through
:func:`corral.log.items.shown` on its way out, whatever was done to it before: only this module's own control sequences
reach the terminal.
"""

from __future__ import annotations

import codecs
import os
import select
import shutil
import signal
import termios
import time
import tty
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from types import FrameType
from typing import TextIO

from rich.cells import cell_len, set_cell_size
from rich.console import Console
from rich.text import Text

from corral.actions import Verdict
from corral.log.items import Item, clock, shown, shown_line
from corral.log.player import Key, Player

MAX_DETAIL_LINES = 12
"""Lines of one detail that are printed."""
MAX_DEPTH = 8
"""Items that are deeper in the tree of conversations are set in as far as these."""
INTERRUPTED = 130
"""The exit code for Ctrl-C, as shells have it."""
_ESCAPE_DELAY = 0.05
"""Seconds within which the rest of a key's escape sequence is there; else it was the Escape key."""
_CLEAR = "\r\x1b[2K"
_STYLES = {Verdict.ALLOW: "green", Verdict.ASK: "yellow", Verdict.DENY: "bold red", Verdict.KILL: "bold magenta"}
_SEQUENCES = {"[D": Key.BACK, "[C": Key.ON, "OD": Key.BACK, "OC": Key.ON}
_CONTROLS = {"\r": Key.ENTER, "\n": Key.ENTER, "\x7f": Key.ERASE, "\b": Key.ERASE, "\x04": Key.QUIT}


# ---- printing ----


def item_text(item: Item, *, details: bool = False) -> Text:
    """The lines of an item, without an end of line."""
    verdict = item.verdict.name.lower() if item.verdict is not None else ""
    found = Text.assemble(
        (f"{clock(item.offset):>13} ", "dim"),
        (f"#{item.number:<7} ", "dim"),
        (f"{item.kind.value:<12} ", "cyan"),
        (f"{verdict:<6}", _STYLES[item.verdict] if item.verdict is not None else ""),
        "  " * min(item.depth, MAX_DEPTH),
        shown_line(item.line),
        (_place(item), "dim"),
    )
    for detail in item.details if details else ():
        lines = shown(detail.text).split("\n")
        left_out = len(lines) - MAX_DETAIL_LINES
        lines = [*lines[:MAX_DETAIL_LINES], *([f"... {left_out} more lines"] if left_out > 0 else [])]
        for index, line in enumerate(lines):
            found.append(f"\n{'':<15}{shown_line(detail.name) if index == 0 else '':<12} ", "dim")
            found.append(line)
    return found


def _place(item: Item) -> str:
    """Whose step it belongs to, where a model's answer opened that."""
    if not item.conversation or not item.depth or not item.step:
        return ""
    return f" [step {item.step}{f', {shown_line(item.tool, 60)}' if item.tool else ''}]"


def print_items(items: Iterable[Item], file: TextIO, *, details: bool = False) -> None:
    """Prints items without waiting. Raises OSError."""
    console = _console(file)
    for item in items:
        console.print(item_text(item, details=details))


def _console(file: TextIO) -> Console:
    return Console(file=file, soft_wrap=True, highlight=False, markup=False, emoji=False)


# ---- playing ----


def replay(
    items: Sequence[Item],
    source: TextIO,
    target: TextIO,
    *,
    speed: float = 1.0,
    step: bool = False,
    place: str = "",
    details: bool = False,
) -> int:
    """Plays on a terminal, or prints where ``source`` or ``target`` is none, and returns the exit code.

    ``step`` begins paused, ``place`` is where to begin (see :meth:`Player.seek`). Ctrl-C ends it with 130, the terminal
    as it was. Raises RequestError for a speed or a place that is none, OSError, and what reading an item raises.
    """
    player = Player(items, speed=speed, paused=step)
    if place:
        player.seek(place)
    try:
        if not (source.isatty() and target.isatty()):
            print_items((items[at] for at in range(player.position, len(items))), target, details=details)
            return 0
        with _keys_of(source.fileno()) as keyboard:
            try:
                _play(player, keyboard, target, details)
            finally:
                target.write(_CLEAR)
                target.flush()
    except KeyboardInterrupt:
        return INTERRUPTED
    return 0


def _play(player: Player, keys: Keyboard, target: TextIO, details: bool) -> None:
    console = _console(target)
    since, follows = time.monotonic(), player.position
    while not player.ended:
        wait = player.wait()
        left = None if wait is None else since + wait - time.monotonic()
        if left is not None and left <= 0:
            target.write(_CLEAR)
            if player.position != follows:
                console.print(Text("-" * 13, "dim"))
            item = player.take()
            if item is not None:
                console.print(item_text(item, details=details))
            since, follows = time.monotonic(), player.position
        _show_status(player, target)
        for key in keys.read(0.0 if left is not None and left <= 0 else left):
            player.press(key)


def _show_status(player: Player, target: TextIO) -> None:
    width = max(1, shutil.get_terminal_size().columns - 1)
    status = shown_line(player.status)
    while player.typed is not None and cell_len(status) > width:
        status = status[1:]  # its end is what is being typed
    target.write(_CLEAR + set_cell_size(status, min(width, cell_len(status))))
    target.flush()


@contextmanager
def _keys_of(fd: int) -> Iterator[Keyboard]:
    """Has the terminal give each key at once and echo none, and undoes that. Ctrl-C still interrupts. SIGTERM and
    SIGHUP end by an exception meanwhile, so that it is undone then too."""
    before = termios.tcgetattr(fd)
    woken, waker = os.pipe2(os.O_NONBLOCK | os.O_CLOEXEC)
    # A signal may come just before a wait begins, which it then does not interrupt: signal.set_wakeup_fd() is for that.
    wakeup = signal.set_wakeup_fd(waker, warn_on_full_buffer=False)
    handlers = {number: signal.signal(number, _interrupt) for number in (signal.SIGTERM, signal.SIGHUP)}
    try:
        tty.setcbreak(fd)
        yield Keyboard(fd, woken)
    finally:
        termios.tcsetattr(fd, termios.TCSADRAIN, before)
        for number, handler in handlers.items():
            signal.signal(number, handler)
        signal.set_wakeup_fd(wakeup)
        os.close(woken)
        os.close(waker)


def _interrupt(number: int, frame: FrameType | None) -> None:
    raise SystemExit(128 + number)


class Keyboard:
    """The keys that are pressed on a terminal in cbreak mode."""

    def __init__(self, fd: int, woken: int) -> None:
        """``woken`` becomes readable when a signal has come."""
        self._fd, self._woken = fd, woken
        self._decoder = codecs.getincrementaldecoder("utf-8")("replace")

    def read(self, timeout: float | None) -> list[Key | str]:
        """The keys pressed within ``timeout`` seconds (None: for ever), as soon as there are any. The end of the input
        is as good as ``q``."""
        if not self._ready(timeout):
            return []
        data = os.read(self._fd, 1024)
        if not data:
            return [Key.QUIT]
        if data.endswith(b"\x1b") and self._ready(_ESCAPE_DELAY):
            data += os.read(self._fd, 1024)
        return list(parse_keys(self._decoder.decode(data)))

    def _ready(self, timeout: float | None) -> bool:
        found = select.select([self._fd, self._woken], [], [], timeout)[0]
        if self._woken in found:
            os.read(self._woken, 1024)
        return self._fd in found


def parse_keys(text: str) -> Iterator[Key | str]:
    """The keys whose codes these are; sequences that mean nothing here are left out (ECMA-48, section 5.4)."""
    at = 0
    while at < len(text):
        char = text[at]
        at += 1
        if char != "\x1b":
            if char in _CONTROLS:
                yield _CONTROLS[char]
            elif char.isprintable():
                yield char
            continue
        if text[at : at + 1] not in ("[", "O"):
            yield Key.ESCAPE
            continue
        end = at + 1
        while end < len(text) and "\x20" <= text[end] <= "\x3f":
            end += 1
        sequence = text[at : end + 1]
        at = end + 1
        if sequence in _SEQUENCES:
            yield _SEQUENCES[sequence]
