"""Replay in a terminal: places, keys, and that nothing of a record acts on the terminal."""

from __future__ import annotations

import io
import os
import pty
import re
import signal
import subprocess
import sys
import termios
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from corral.actions import Verdict
from corral.errors import RequestError
from corral.log.items import Detail, Item, ItemKind, clock, make_item, shown
from corral.log.player import LONGEST_WAIT, Key, Player
from corral.log.replay import item_text, parse_keys, print_items, replay


def items(count: int = 10, apart: float = 1.0) -> list[Item]:
    """Records 100, 102, ...; a step begins with every third."""
    return [
        make_item(100 + 2 * at, ItemKind.SYSTEM_CALL, 1e9 + at, at * apart, f"line {at}", step=at // 3)
        for at in range(count)
    ]


def player(count: int = 10, apart: float = 1.0, **options: bool) -> Player:
    return Player(items(count, apart), **options)


# ---- time ----


def test_the_first_comes_at_once_and_the_others_in_their_time() -> None:
    playing = Player(items(3), speed=4.0)
    assert playing.wait() == 0.0
    assert [item.number for item in iter(playing.take, None)] == [100, 102, 104]
    assert playing.wait() is None
    playing.position = 1
    assert playing.wait() == 0.25


def test_long_waits_are_cut_short() -> None:
    playing = player(3, apart=3600.0)
    playing.take()
    assert playing.wait() == LONGEST_WAIT


@pytest.mark.parametrize("speed", [0.0, -1.0, float("inf"), float("nan"), 1e9])
def test_a_speed_that_is_none_is_refused(speed: float) -> None:
    with pytest.raises(RequestError, match="speed"):
        Player([], speed=speed)


# ---- places ----


@pytest.mark.parametrize(
    ("place", "position"),
    [
        ("100", 0),
        ("#103", 2),
        ("104", 2),
        ("step 2", 6),
        ("4s", 4),
        ("3.5s", 4),
        ("0:05", 5),
        ("0:00:09", 9),
        ("0s", 0),
    ],
)
def test_places(place: str, position: int) -> None:
    playing = player()
    playing.seek(place)
    assert playing.position == position


@pytest.mark.parametrize("place", ["", "x", "1000", "step 9", "1:00", "-1", "1e3s", "\u0661", "9" * 400, "step 1; rm"])
def test_places_that_are_none_change_nothing(place: str) -> None:
    playing = player()
    playing.position = 3
    with pytest.raises(RequestError):
        playing.seek(place)
    assert playing.position == 3


def test_search_goes_on_from_here_and_around() -> None:
    playing = player()
    playing.search("LINE 7")
    assert playing.position == 7 and playing.wait() == 0.0
    playing.take()
    playing.search("line 2")
    assert playing.position == 2
    with pytest.raises(RequestError):
        playing.search("nowhere")
    assert playing.position == 2


# ---- keys ----


def press(playing: Player, keys: str) -> None:
    for key in parse_keys(keys):
        playing.press(key)


def test_keys() -> None:
    playing = player(60)
    press(playing, " ")
    assert playing.paused and playing.wait() is None
    press(playing, "n")
    assert playing.wait() == 0.0 and playing.take() == playing.items[0] and playing.wait() is None
    press(playing, "\x1b[C")
    assert playing.position == 10 and playing.wait() == 0.0
    playing.take()
    press(playing, "\x1bOD")
    assert playing.position == 0
    playing.position = 6
    press(playing, "p")
    assert playing.position == 4
    press(playing, "++-")
    assert playing.speed == 2.0
    press(playing, "q")
    assert playing.ended


def test_what_is_typed_is_no_command() -> None:
    playing = player()
    press(playing, "/qq n\x7f")
    assert playing.typed == "qq " and not playing.ended
    press(playing, "\x1b")
    assert not playing.status.startswith("search") and playing.position == 0
    press(playing, "/line 4\r")
    assert playing.position == 4
    playing.take()
    press(playing, "/\r")
    assert playing.position == 4, "an empty search repeats the last, around the end"
    press(playing, "gstep 3\r")
    assert playing.position == 9
    press(playing, "gnowhere\r")
    assert playing.position == 9 and "place" in playing.status


def test_an_end_of_input_ends_it_also_while_something_is_typed() -> None:
    playing = player()
    playing.press(Key.SEARCH)
    playing.press(Key.QUIT)
    assert playing.ended


@given(st.text(st.characters(), max_size=60))
def test_whatever_is_pressed_the_position_is_one(text: str) -> None:
    playing = player(5)
    press(playing, text)
    assert 0 <= playing.position <= 5
    assert playing.typed is None or len(playing.typed) <= 200


def test_sequences_that_mean_nothing_are_no_keys() -> None:
    assert list(parse_keys("\x1b[200~a\x1b[1;5A\x1bOP\x1b[")) == ["a"]
    assert list(parse_keys("\x00\x02\x1b")) == [Key.ESCAPE]


# ---- printing ----


@given(st.text(st.characters(), max_size=200))
def test_nothing_of_a_record_acts_on_a_terminal(text: str) -> None:
    """Also where an item was made without `make_item`."""
    made = make_item(1, ItemKind.TERMINAL, 0.0, 0.0, text, [(text, text)], verdict=Verdict.DENY)
    raw = Item(1, ItemKind.TERMINAL, 0.0, 0.0, text, (Detail(text, text),))
    file = io.StringIO()
    print_items([made, raw], file, details=True)
    assert file.getvalue().replace("\n", "").isprintable()
    assert file.getvalue().count("\n") <= 2 * (2 + text.count("\n"))
    assert shown(text).replace("\n", "").isprintable()


def test_lines_say_when_what_and_the_verdict() -> None:
    item = make_item(42, ItemKind.FLOW, 0.0, 3661.25, "x", [("way", "a\nb")], verdict=Verdict.DENY)
    first, second, third = item_text(item, details=True).plain.split("\n")
    assert first.split() == ["1:01:01.250", "#42", "flow", "deny", "x"]
    assert second.split() == ["way", "a"] and third.split() == ["b"]
    assert clock(-1.0) == "0:00:00.000"


def test_where_there_is_no_terminal_all_is_printed_at_once() -> None:
    out = io.StringIO()
    assert replay(items(3, apart=1e6), io.StringIO(), out, place="102") == 0
    assert [line.split()[1] for line in out.getvalue().splitlines()] == ["#102", "#104"]
    assert "\x1b" not in out.getvalue()


# ---- on a terminal ----

PROGRAM = """
import sys
from tests.unit.test_log_replay import items
from corral.log.replay import replay
sys.exit(replay(items(5, apart=3600.0), sys.stdin, sys.stdout, step=True))
"""
ROOT = Path(__file__).parents[2]


class Screen:
    """A replay on a pseudo-terminal."""

    def __init__(self, outer: int, inner: int, program: subprocess.Popen[bytes]) -> None:
        self.outer, self.inner, self.program = outer, inner, program
        self.seen = ""

    def until(self, pattern: str) -> None:
        """Reads until what was printed since the last call has this."""
        while not re.search(pattern, self.seen):
            data = os.read(self.outer, 4096)
            assert data, self.seen
            self.seen += data.decode()
        self.seen = re.split(pattern, self.seen, maxsplit=1)[-1]

    def type(self, keys: str) -> None:
        os.write(self.outer, keys.encode())


@contextmanager
def screen() -> Iterator[Screen]:
    outer, inner = pty.openpty()
    environment = {**os.environ, "PYTHONPATH": f"{ROOT / 'src'}:{ROOT}", "TERM": "xterm", "NO_COLOR": "1"}
    program = subprocess.Popen(
        [sys.executable, "-c", PROGRAM],
        stdin=inner, stdout=inner, stderr=inner, env=environment, start_new_session=True, cwd=ROOT,
        preexec_fn=lambda: take_terminal(inner),
    )  # fmt: skip
    try:
        yield Screen(outer, inner, program)
    finally:
        program.kill()
        program.wait()
        os.close(outer)
        os.close(inner)


def take_terminal(fd: int) -> None:
    import fcntl

    fcntl.ioctl(fd, termios.TIOCSCTTY, 0)


def test_keys_on_a_terminal() -> None:
    with screen() as shown_:
        shown_.until("0 of 5  paused")
        shown_.type("n")
        shown_.until(r"#100 .*line 0")
        shown_.until("1 of 5  paused")
        shown_.type("/line 3\r")
        shown_.until(r"#106 .*line 3")
        shown_.until("4 of 5  paused")
        shown_.type("q")
        assert shown_.program.wait(60) == 0


@pytest.mark.parametrize(("how", "code"), [("\x03", 130), (signal.SIGTERM, 143)])
def test_the_terminal_is_as_it_was_after_an_interrupt(how: str | signal.Signals, code: int) -> None:
    with screen() as shown_:
        before = termios.tcgetattr(shown_.inner)
        shown_.until("0 of 5  paused")
        assert termios.tcgetattr(shown_.inner) != before
        if isinstance(how, str):
            shown_.type(how)
        else:
            shown_.program.send_signal(how)
        assert shown_.program.wait(60) == code
        assert termios.tcgetattr(shown_.inner) == before
        shown_.until("\r\x1b\\[2K$")
