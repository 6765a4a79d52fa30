"""Which of the files that a session has changed are kept, and how they are read from a layer that may be hostile."""

from __future__ import annotations

import os
import random
from pathlib import Path

import pytest

from corral.sandbox import selected
from corral.sandbox.changes import Change, ChangeKind, FileType
from corral.sandbox.ownership import SAME_IDS, OwnerMap
from corral.sandbox.selected import TakenFile, Wanted, select, take
from corral.sandbox.view import Changeable

PARTS = (Changeable("workspace", "/work", ()), Changeable("root", "/", ()), Changeable("tmp", "/tmp", ()))
OWNERS = OwnerMap(SAME_IDS, SAME_IDS, SAME_IDS)


def change(
    path: str,
    size: int = 1,
    *,
    part: str = "workspace",
    kind: ChangeKind = ChangeKind.ADDED,
    what: FileType = FileType.FILE,
    entries: int = 0,
) -> Change:
    return Change(part, path, kind, what, size_after=size, entries=entries)


def chosen(*listed: Change, globs: tuple[str, ...] = ("/**",), most: int = 100) -> tuple[list[str], int]:
    wanted, beyond = select(PARTS, listed, globs, most)
    return [each.path for each in wanted], beyond


@pytest.mark.parametrize("what", [each for each in FileType if each is not FileType.FILE])
def test_only_regular_files_are_chosen(what: FileType) -> None:
    assert chosen(change("/work/a", what=what), change("/work/b")) == (["/work/b"], 0)


@pytest.mark.parametrize("kind", list(ChangeKind))
def test_what_is_gone_or_has_another_owner_alone_is_not_chosen(kind: ChangeKind) -> None:
    is_chosen = kind in (ChangeKind.ADDED, ChangeKind.CHANGED, ChangeKind.MODE)
    assert chosen(change("/work/a", kind=kind)) == (["/work/a"] if is_chosen else [], 0)


def test_a_deleted_directory_is_none_of_those_that_could_not_be_told() -> None:
    gone = change("/work/a", kind=ChangeKind.DELETED, what=FileType.DIRECTORY, entries=5)
    deep = change("/work", kind=ChangeKind.CHANGED, what=FileType.DIRECTORY, entries=3)
    assert chosen(gone, deep, globs=("/nothing",)) == ([], 3)


def test_each_is_where_its_part_lies() -> None:
    listed = [change("/work/a/b"), change("/a/b", part="root"), change("/tmp/a", part="tmp")]
    wanted, _ = select(PARTS, listed, ("/**",), 10)
    assert wanted == [
        Wanted("/a/b", ("root", "a", "b")),
        Wanted("/tmp/a", ("tmp", "a")),
        Wanted("/work/a/b", ("workspace", "a", "b")),
    ]


def test_the_choice_is_the_same_whatever_the_order(monkeypatch: pytest.MonkeyPatch) -> None:
    """One that is too large leaves room for those behind it; of each counts what would be kept."""
    monkeypatch.setattr(selected, "MAX_FILES", 4)
    monkeypatch.setattr(selected, "MAX_BYTES", 25)
    listed = [change(f"/work/{name}", size) for name, size in zip("abcdefg", (5, 99, 99, 5, 0, 0, 1), strict=True)]
    for seed in range(5):
        random.Random(seed).shuffle(listed)
        assert chosen(*listed, most=10) == (["/work/a", "/work/b", "/work/c", "/work/e"], 3)


# ---- reading ----


@pytest.fixture
def layer(tmp_path: Path) -> Path:
    place = tmp_path / "layer"
    (place / "workspace" / "sub").mkdir(parents=True)
    (place / "workspace" / "sub" / "a").write_bytes(b"content")
    return place


def taken(layer: Path, *paths: str, most: int = 100) -> list[TakenFile]:
    fd = os.open(layer, os.O_RDONLY | os.O_DIRECTORY)
    try:
        wanted = [Wanted(f"/work/{path}", ("workspace", *path.split("/"))) for path in paths]
        return list(take(fd, OWNERS, wanted, most))
    finally:
        os.close(fd)


def test_a_file_is_read_as_far_as_is_wanted(layer: Path) -> None:
    with (layer / "workspace" / "hole").open("wb") as file:
        file.truncate(1 << 40)
    assert taken(layer, "sub/a") == [TakenFile("/work/sub/a", b"content", True)]
    assert taken(layer, "sub/a", most=7) == [TakenFile("/work/sub/a", b"content", True)]
    assert taken(layer, "sub/a", "hole", most=6) == [
        TakenFile("/work/sub/a", b"conten", False),
        TakenFile("/work/hole", bytes(6), False),
    ]


def test_what_was_planted_in_the_place_of_a_file_is_not_read(layer: Path, tmp_path: Path) -> None:
    """Whoever could still change the layer leads nobody out of it, nor into waiting."""
    (tmp_path / "secret").mkdir()
    (tmp_path / "secret" / "a").write_text("of the host")
    work = layer / "workspace"
    (work / "link").symlink_to(tmp_path / "secret" / "a")
    (work / "directory").symlink_to(tmp_path / "secret")
    os.mkfifo(work / "fifo")
    found = taken(layer, "link", "directory/a", "fifo", "sub", "none\x1b", "sub/a")
    assert [bool(each.failure) for each in found] == [True] * 5 + [False]
    assert not any(each.data for each in found[:-1])
    assert "\x1b" not in found[4].failure and found[4].failure.endswith("cannot be read: No such file or directory")
