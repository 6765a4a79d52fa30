"""Moves of directories: which calls are notified, one after the other, standing still, and what is left of them."""

from __future__ import annotations

import errno
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any, cast

import pytest

from corral.sandbox.leftovers import remove_places
from corral.sandbox.view import Changeable, View
from corral.supervisor.deputy_wire import Reply
from corral.supervisor.filter import Class, Row, find_table, resolve
from corral.supervisor.moving import Moves
from corral.supervisor.places import Entry, Work
from corral.supervisor.service import Supervised


@pytest.mark.parametrize("name", ["rename", "renameat", "renameat2", "landlock_restrict_self"])
def test_which_calls_are_notified(name: str) -> None:
    def found(**options: Any) -> Row:
        table = find_table("x86_64", **options)
        return table.find(resolve(table.target, {name})[name], (0,) * 6)

    assert found().kind is Class.DECIDED
    assert found(asked=(name,)).kind is Class.ASKED  # the policy's own word comes first
    assert found(denied=(name,)).kind is Class.REFUSED
    assert "lets this call through" in found(moved=False).reason
    assert found(watched=True).kind is (Class.REFUSED if name.startswith("landlock") else Class.DECIDED)


# ---- bookkeeping ----


class FakeSandbox:
    """A deputy that answers when it is told to, and a loop that does so at once when it is asked."""

    def __init__(self) -> None:
        self.asked: list[tuple[str, int, Callable[[Reply], None]]] = []
        self.interrupted: list[int] = []
        self.later: list[Callable[[], None]] = []
        self.deputy = self.loop = self
        self.watch = False

    def rename(
        self, caller: object, old: tuple[int, str], new: tuple[int, str], done: Callable[[Reply], None],
        *, flags: int, token: int,
    ) -> int:  # fmt: skip
        self.asked.append((old[1], token, done))
        return len(self.asked)

    def interrupt(self, number: int) -> None:
        self.interrupted.append(number)

    def post(self, callback: Callable[[], None]) -> None:
        callback()

    def call_later(self, seconds: float, callback: Callable[[], None]) -> None:
        self.later.append(callback)

    def answer(self, code: int = 0, value: int = 0) -> None:
        self.asked[-1][2](Reply(code, value))

    def wait(self) -> None:
        callbacks, self.later = self.later, []
        for callback in callbacks:
            callback()


class FakeWork:
    def __init__(self) -> None:
        self.call = self
        self.caller = None
        self.answered = self.closed = False
        self.when_gone: Callable[[], None] | None = None
        self.answers: list[int] = []

    def run(self, step: Callable[[], None]) -> None:
        step()

    def close(self) -> None:
        self.closed = True

    def die(self) -> None:
        self.answered = True
        if self.when_gone:
            self.when_gone()


def begin(moves: Moves, name: str, flags: int = 0) -> FakeWork:
    work = FakeWork()
    source, target = Entry(0, f"/w/{name}", name, False), Entry(0, f"/w/to/{name}", name, False)
    moves.rename(cast(Work, work), source, target, flags, lambda reply: work.answers.append(reply.errno))
    return work


def active(moves: Moves) -> bool:
    return moves.is_active


@pytest.fixture
def sandbox() -> FakeSandbox:
    return FakeSandbox()


@pytest.fixture
def moves(sandbox: FakeSandbox) -> Moves:
    return Moves(cast(Supervised, sandbox))


def test_only_what_the_overlay_refuses_is_moved(sandbox: FakeSandbox, moves: Moves) -> None:
    for code in (0, errno.EACCES, errno.ENOTEMPTY):
        work = begin(moves, "a")
        assert sandbox.asked[-1][:2] == ("a", 0)
        sandbox.answer(code)
        assert work.answers == [code]
    exchange = begin(moves, "a", flags=2)
    sandbox.answer(errno.EXDEV)
    assert exchange.answers == [errno.EXDEV]
    assert len(sandbox.asked) == 4 and not moves.places and not active(moves)
    moved = begin(moves, "a")
    sandbox.answer(errno.EXDEV)
    (place,) = moves.places
    assert place == f"/w/to/.corral-move-{sandbox.asked[-1][1]:016x}"
    sandbox.answer()
    assert moved.answers == [0] and not moves.places and not active(moves)


def test_moves_come_one_after_the_other(sandbox: FakeSandbox, moves: Moves) -> None:
    works = []
    for name in ("a", "b", "c"):
        works.append(begin(moves, name))
        sandbox.asked[-1][2](Reply(errno.EXDEV))
    asked = [(name, bool(token)) for name, token, _ in sandbox.asked]
    assert asked == [("a", False), ("a", True), ("b", False), ("c", False)]
    works[1].die()  # its turn never comes
    sandbox.asked[1][2](Reply(0))
    assert works[0].answers == [0] and works[1].closed
    assert sandbox.asked[-1][0] == "c" and len(moves.places) == 1
    works[2].die()
    closed = works[2].closed
    assert sandbox.interrupted == [len(sandbox.asked)] and not closed  # its descriptors are in use
    sandbox.answer(errno.EINTR)
    assert works[2].closed and works[2].answers == [] and not active(moves)


def test_where_files_are_watched_nothing_else_is_renamed_meanwhile(sandbox: FakeSandbox, moves: Moves) -> None:
    """The new tree would be somewhere else, and then have what was put into the old one, which nobody has decided."""
    sandbox.watch = True
    first = begin(moves, "a")
    sandbox.answer(errno.EXDEV)
    second = begin(moves, "b")
    sandbox.wait()
    assert [name for name, _, _ in sandbox.asked] == ["a", "a"]
    sandbox.answer()
    assert first.answers == [0] and second.answers == []
    sandbox.wait()
    sandbox.answer()
    assert second.answers == [0] and not active(moves)


def test_nothing_is_moved_while_all_stands_still(sandbox: FakeSandbox, moves: Moves) -> None:
    work = begin(moves, "a")
    sandbox.answer(errno.EXDEV)
    assert active(moves)
    moves.hold(True)
    assert sandbox.interrupted == [2]
    sandbox.answer(errno.EINTR)
    assert not active(moves) and work.answers == []
    other = begin(moves, "b")
    sandbox.wait()
    assert not active(moves) and len(sandbox.asked) == 2
    moves.hold(False)
    sandbox.wait()
    assert active(moves) and [name for name, _, _ in sandbox.asked[2:]] == ["a", "b"]
    sandbox.asked[2][2](Reply(0))
    sandbox.asked[3][2](Reply(0))
    assert work.answers == [0] and other.answers == [0]


def test_what_was_taken_back_is_made_though_all_goes_on_already(sandbox: FakeSandbox, moves: Moves) -> None:
    work = begin(moves, "a")
    sandbox.answer(errno.EXDEV)
    moves.hold(True)
    moves.hold(False)
    sandbox.answer(errno.EINTR)
    assert work.answers == []
    sandbox.wait()
    sandbox.answer()
    assert work.answers == [0] and not moves.places


def test_what_may_be_left_is_remembered(sandbox: FakeSandbox, moves: Moves) -> None:
    for reply in (Reply(errno.EPERM), Reply(errno.EINTR, 1), Reply(0, 2), Reply(errno.EIO, 1)):
        begin(moves, "a")
        sandbox.answer(errno.EXDEV)
        sandbox.asked[-1][2](reply)
    assert len(moves.places) == 3 and not active(moves)


# ---- what is left ----


def test_what_is_left_is_removed_and_nothing_else(tmp_path: Path) -> None:
    parts = (Changeable("workspace", "/w", ("/w",)), Changeable("write-a", "/w/in", ("/w/in",)))
    outside = tmp_path / "outside"
    for top in (
        "layer/workspace/a/.corral-move-1/tree",
        "layer/write-a/.corral-move-2/tree",
        "layer/workspace/in/.corral-move-2",
        "outside/.corral-move-3/tree",
    ):
        (tmp_path / top).mkdir(parents=True)
    (tmp_path / "layer/workspace/a/.corral-move-1/tree").chmod(0o500)
    (tmp_path / "layer/workspace/link").symlink_to(outside)
    (tmp_path / "layer/workspace/up").symlink_to("../../outside")
    layer = os.open(tmp_path / "layer", os.O_RDONLY | os.O_DIRECTORY)
    places = ("/w/a/.corral-move-1", "/w/in/.corral-move-2", "/w/link/.corral-move-3", "/w/up/.corral-move-3",
              "/w/../../outside/.corral-move-3", "/elsewhere/x", "/w/missing/x", "/w/.corral-move-9")  # fmt: skip
    remove_places(layer, View(parts, frozenset(), ()), places)
    os.close(layer)
    left = {str(path.relative_to(tmp_path)) for path in tmp_path.rglob(".corral-move-*")}
    assert left == {"layer/workspace/in/.corral-move-2", "outside/.corral-move-3"}
    assert (tmp_path / "layer/workspace/a").is_dir()


def test_what_others_have_put_there_and_has_no_other_name_stays(tmp_path: Path) -> None:
    for number, name, content in ((1, "file", "x"), (2, "kept-0", "x"), (3, "file", "linked"), (4, "file", "")):
        place = tmp_path / "layer/workspace" / f".corral-move-{number}"
        (place / "tree").mkdir(parents=True)
        (place / "tree" / "x").write_text("x")
        (place / name).write_text(content)
        if content == "linked":
            (tmp_path / "layer/workspace/moved").hardlink_to(place / name)
    layer = os.open(tmp_path / "layer", os.O_RDONLY | os.O_DIRECTORY)
    view = View((Changeable("workspace", "/w", ("/w",)),), frozenset(), ())
    remove_places(layer, view, [f"/w/.corral-move-{number}" for number in range(1, 5)])
    os.close(layer)
    left = sorted(str(path.relative_to(tmp_path / "layer/workspace")) for path in tmp_path.rglob("*") if path.is_file())
    assert left == [".corral-move-1/file", ".corral-move-2/kept-0", "moved"]
    assert len(list(tmp_path.rglob(".corral-move-*"))) == 2
