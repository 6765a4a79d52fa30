"""Where a log's files lie, and what becomes of a change of its key that is cut short or met by another."""

from __future__ import annotations

import errno
import os
import threading
from pathlib import Path

import pytest

from corral.log import places
from corral.log.gaps import Gaps
from corral.log.note import KeyFile
from corral.log.places import files_of, index_path, key_path, open_log, rotate_key
from corral.log.signing import read_keys
from corral.log.verify import verify_log
from corral.log.writer import Log, LogUnwritable


@pytest.fixture
def place(tmp_path: Path) -> Path:
    place = tmp_path / "log"
    open_log(place).close()
    return place


def successor(place: Path) -> Path:
    return key_path(place).with_name("log.key.new")


def is_whole(place: Path, keys: int) -> bool:
    """Whether the log can be written on, with the last of so many keys, and is as it was signed."""
    with open_log(place):
        pass
    known = read_keys(place)
    assert KeyFile.read(key_path(place)).verifier == known[-1]
    assert not successor(place).exists()
    return len(known) == keys and not verify_log(place, known, look=Gaps()).faults


def test_all_that_belongs_to_a_log_is_named(place: Path) -> None:
    rotate_key(place)
    found = set(files_of(place))
    parent = os.path.realpath(place.parent)
    names = ("log", "log.key", "log.key.1", "log.key.2", "log.key.new", "log.index", "log.index-wal")
    assert {f"{parent}/{name}" for name in names} <= found
    assert f"{parent}/log.keyring" not in found


def test_a_log_behind_a_link_has_its_key_beside_the_link(tmp_path: Path) -> None:
    (tmp_path / "elsewhere").mkdir()
    (tmp_path / "work").mkdir()
    (tmp_path / "work" / "log").symlink_to("../elsewhere")
    place = tmp_path / "work" / "log"
    open_log(place).close()
    found = files_of(place)
    assert str(tmp_path / "elsewhere") in found
    assert str(tmp_path / "work" / "log.key") in found
    assert str(index_path(tmp_path / "work" / "log")) in found


def test_files_are_named_where_they_are_however_they_are_reached(tmp_path: Path) -> None:
    (tmp_path / "real").mkdir()
    (tmp_path / "link").symlink_to("real")
    open_log(tmp_path / "link" / "log").close()
    assert set(files_of(tmp_path / "link" / "log")) == set(files_of(tmp_path / "real" / "log"))


@pytest.mark.parametrize("step", ["before the log has it", "before it is in place", "in the middle of that"])
def test_a_change_of_the_key_that_is_cut_short(place: Path, monkeypatch: pytest.MonkeyPatch, step: str) -> None:
    class Cut(Exception):
        pass

    def cut(*_: object) -> None:
        raise Cut

    with monkeypatch.context() as patch:
        if step == "before the log has it":
            patch.setattr(Log, "rotate", cut)
        elif step == "before it is in place":
            patch.setattr(places, "_put_in_place", cut)
        else:
            rename = os.rename
            patch.setattr(os, "rename", lambda old, new: cut() if new == key_path(place) else rename(old, new))
        with pytest.raises(Cut):
            rotate_key(place)
    assert is_whole(place, 1 if step == "before the log has it" else 2)
    rotate_key(place)
    assert is_whole(place, 2 if step == "before the log has it" else 3)


def test_a_run_that_begins_meanwhile_leaves_the_new_key(place: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """It finds a key that the log does not name yet, which is no change that was cut short."""
    at_it, go_on = threading.Event(), threading.Event()
    rotate = Log.rotate

    def slow(log: Log, signer: KeyFile) -> None:
        at_it.set()
        assert go_on.wait(60)
        rotate(log, signer)

    monkeypatch.setattr(Log, "rotate", slow)
    errors: list[BaseException] = []

    def change() -> None:
        try:
            rotate_key(place)
        except BaseException as error:
            errors.append(error)

    thread = threading.Thread(target=change)
    thread.start()
    try:
        assert at_it.wait(60)
        with pytest.raises(LogUnwritable, match="another process is changing this key"):
            rotate_key(place)
        open_log(place).close()
        assert successor(place).exists()
    finally:
        go_on.set()
        thread.join()
    assert not errors
    assert is_whole(place, 2)


def test_a_key_that_cannot_be_put_in_its_place_is_told(place: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    link = os.link

    def full(old: object, new: object) -> None:
        if old == key_path(place):
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        link(old, new)  # type: ignore[arg-type]

    with monkeypatch.context() as patch:
        patch.setattr(os, "link", full)
        with pytest.raises(LogUnwritable, match=r"log\.key: cannot change the key: No space left"):
            rotate_key(place)
    assert is_whole(place, 2)
