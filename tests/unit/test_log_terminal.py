"""What commands wrote stands on the time line where it was written, and draws on nobody's terminal."""

from __future__ import annotations

import io
import json
from collections.abc import Iterator
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from corral.actions import Content, Origin
from corral.log.asciicast import Tape
from corral.log.events import Event, ExecEnded, ExecStarted, PayloadErased, PayloadKept
from corral.log.html import write_html
from corral.log.items import Item, ItemKind
from corral.log.ocsf import Context
from corral.log.payloads import Payloads
from corral.log.places import erase_payloads, open_log
from corral.log.reader import Reader
from corral.log.records import encode
from corral.log.replay import print_items
from corral.log.terminal import MAX_PIECE, WithTerminal, _pieces
from corral.log.timeline import Timeline
from corral.log.writer import Log

CONTEXT = Context("a", "1", "a", "sha256:0", "s", "s", "1")
START = 1_790_000_000


class Session:
    """A log of one session, whose moments the test gives, and its contents."""

    def __init__(self, place: Path) -> None:
        self.place = place
        self.store = Payloads(place.with_name("log.payloads"))
        self._records = 0

    def write(self, *events: tuple[float, Event]) -> None:
        with open_log(self.place) as log:
            for offset, event in events:
                self._append(log, offset, event)

    def _append(self, log: Log, offset: float, event: Event) -> None:
        self._records += 1
        moment = 10**12 + round(offset * 1e9)
        log.submit(encode(event, CONTEXT, sequence=self._records, at=START + offset, monotonic_ns=moment))

    def kept(self, number: int, *pieces: tuple[float, str], data: bytes | None = None) -> PayloadKept:
        lines = [json.dumps({"version": 2, "width": 80, "height": 24}), *(json.dumps([t, "o", s]) for t, s in pieces)]
        cast = "\n".join(lines).encode() if data is None else data
        digest = self.store.keep(Content.TERMINAL, cast, expires=START).digest
        origin = Origin("s", "s", number, number)
        return PayloadKept(origin, Content.TERMINAL, digest, len(cast), True, "sh", START, False)

    def line(self) -> WithTerminal:
        return WithTerminal(Timeline(Reader(self.place), "s"), self.store)


@pytest.fixture
def session(tmp_path: Path) -> Session:
    return Session(tmp_path / "log")


def started(number: int) -> ExecStarted:
    return ExecStarted(number, ("sh",), "/", 1000)


def ended(number: int) -> ExecEnded:
    return ExecEnded(number, 0, "", 0, 0, 0, 0)


def said(line: WithTerminal) -> list[tuple[float, str]]:
    return [(round(item.offset, 3), item.line) for item in line]


def test_it_stands_where_it_was_written(session: Session) -> None:
    kept = session.kept(1, (0.5, "one\n"), (0.6, "more\n"), (2.0, "two\n"))
    other = session.kept(2, (0.1, "other\n"))
    session.write((0, started(1)), (1, started(2)), (1.5, ended(2)), (1.6, other), (3, ended(1)), (4, kept))
    line = session.line()
    found = said(line)
    assert [text for _, text in found if "wrote" in text] == [
        "exec 1 wrote: one",
        "exec 2 wrote: other",
        "exec 1 wrote: two",
    ]
    assert [offset for offset, _ in found] == [0.0, 0.5, 1.0, 1.1, 1.5, 1.6, 2.0, 3.0, 4.0]
    assert len(line) == 9
    assert line[1].kind is ItemKind.TERMINAL
    assert line[1].details[0].text == "one\nmore\n"
    assert (line[1].number, line[1].step, line[1].at) == (5, 1, START + 0.5)
    assert [line[each] for each in range(-9, 0)] == list(line) == line[:]
    with pytest.raises(IndexError):
        line[9]


def test_without_contents_it_is_the_time_line(session: Session) -> None:
    session.write((0, started(1)), (1, ended(1)))
    line = session.line()
    assert list(line) == list(Timeline(Reader(session.place), "s"))
    assert (line.unread, line.is_whole) == (0, True)


def test_what_was_erased_is_counted(session: Session) -> None:
    kept = session.kept(1, (0.5, "one\n"))
    session.write((0, started(1)), (1, kept))
    erase_payloads(session.place, [PayloadErased(kept.digest, "anna", "why")])
    line = session.line()
    assert (len(line), line.unread) == (2, 1)


@pytest.mark.parametrize(
    "data",
    [
        b"",
        b"{}",
        b"[]",
        b'{"version":3}',
        b'{"version":2}\n{}',
        b'{"version":2}\n[[],"o","x"]',
        b'{"version":2}\n[-1,"o","x"]',
        b'{"version":2}\n[1e999,"o","x"]',
        b'{"version":2}\n["nan","o","x"]',
        b'{"version":2}\n' + b"[" * 100_000,
        b"\xff",
    ],
)
def test_what_is_no_asciicast_is_counted(session: Session, data: bytes) -> None:
    session.write((0, started(1)), (1, session.kept(1, data=data)))
    line = session.line()
    assert (len(line), line.unread) == (2, 1)


def test_it_draws_on_nobodys_terminal(session: Session) -> None:
    hostile = "\x1b[2J\x1b]0;title\x07\u202eright to left\r\x00</script><script>alert(1)</script>\n"
    session.write((0, started(1)), (1, session.kept(1, (0.5, hostile))))
    terminal, page = io.StringIO(), io.StringIO()
    print_items(iter(session.line()), terminal, details=True)
    write_html(page, session.line(), "a session")
    for shown in (terminal.getvalue(), page.getvalue()):
        assert not {"\x1b", "\x07", "\x00", "\u202e"} & set(shown)
    assert "<script>alert" not in page.getvalue()


def pieces_of(cast: bytes) -> Iterator[tuple[float, str]]:
    return _pieces(cast)


@given(texts=st.lists(st.text(max_size=3 * MAX_PIECE), max_size=6))
def test_nothing_of_a_tape_is_left_out(texts: list[str]) -> None:
    done: list[bytes] = []
    tape = Tape("", 1 << 24, lambda data, whole: done.append(data))
    for text in texts:
        tape.write(text.encode("utf-8", "replace"))
    tape.close()
    found = list(pieces_of(done[0])) if done else []
    assert "".join(text for _, text in found) == "".join(texts).encode("utf-8", "replace").decode()
    assert all(0 < len(text) <= MAX_PIECE for _, text in found)
    assert [moment for moment, _ in found] == sorted(moment for moment, _ in found)


def test_a_time_line_of_output_alone_is_bounded(session: Session, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("corral.log.terminal.MAX_PIECES", 3)
    session.write((0, started(1)), (9, session.kept(1, *((float(n), f"{n}\n") for n in range(5)))))
    line = session.line()
    assert (len(line), line.is_whole) == (5, False)
    items: list[Item] = list(line)
    assert sum(item.kind is ItemKind.TERMINAL for item in items) == 3
