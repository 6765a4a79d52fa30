"""Setting files back, with no sandbox around: a plain directory stands for the inside."""

from __future__ import annotations

import os
import stat
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import cast

import pytest

from corral.errors import CorralError, RequestError
from corral.sandbox.changes import Change, ChangeKind, FileType
from corral.sandbox.layer import KeptLayer
from corral.sandbox.prepare import Prepared
from corral.sandbox.restore import _check_readable, _is_covered, check_fits
from corral.sandbox.swap import Content, Swapper, content_of, open_source
from corral.sandbox.view import Changeable

OWNER = (os.geteuid(), os.getegid())


@pytest.fixture
def inside(tmp_path: Path) -> Iterator[tuple[Swapper, Path]]:
    place = tmp_path / "inside"
    place.mkdir()
    root = os.open(place, os.O_RDONLY | os.O_DIRECTORY)
    yield Swapper(root, OWNER), place
    os.close(root)


def set_back(swapper: Swapper, change: Change, source: Path | None = None) -> None:
    if source is None:
        swapper.carry_out(change, Content(), -1)
        return
    root = os.open(source.parent, os.O_RDONLY | os.O_DIRECTORY)
    directory, name, status, fd = open_source(root, source.name)
    try:
        swapper.carry_out(change, content_of(directory, name, status, fd), fd)
    finally:
        for each in (root, directory, *([fd] if fd >= 0 else [])):
            os.close(each)


def mode_of(path: Path) -> int:
    return stat.S_IMODE(path.lstat().st_mode)


@pytest.mark.parametrize("kind", [FileType.FIFO, FileType.SOCKET])
def test_a_link_in_the_place_of_a_fifo_is_not_followed(
    inside: tuple[Swapper, Path], tmp_path: Path, kind: FileType
) -> None:
    """Put there by something that does not stand still: it would lead through the files of the host."""
    swapper, place = inside
    victim = tmp_path / "victim"
    victim.touch(0o600)
    (place / "fifo").symlink_to(victim)
    change = Change("workspace", "/fifo", ChangeKind.MODE, kind, type_before=kind, mode_before=0o600, mode_after=0o777)
    with pytest.raises(OSError):
        set_back(swapper, change)
    assert mode_of(victim) == 0o600


def test_what_is_only_one_names_is_not_given_to_the_other_names_of_a_file(
    inside: tuple[Swapper, Path], tmp_path: Path
) -> None:
    """Two names of one file now, two files then."""
    swapper, place = inside
    (place / "a").write_text("same")
    os.link(place / "a", place / "b")
    (place / "a").chmod(0o644)
    source = tmp_path / "a"
    source.write_text("same")
    change = Change(
        "workspace",
        "/a",
        ChangeKind.MODE,
        FileType.FILE,
        type_before=FileType.FILE,
        mode_before=0o644,
        mode_after=0o600,
    )
    set_back(swapper, change, source)
    assert (mode_of(place / "a"), mode_of(place / "b")) == (0o600, 0o644)
    assert (place / "a").read_text() == "same"


def test_names_of_one_file_in_two_parts_become_two_files(
    inside: tuple[Swapper, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Each part is a file system inside, so there is no link from one to the other."""
    swapper, place = inside
    source = tmp_path / "one"
    source.write_text("content")
    os.link(source, tmp_path / "other")

    def no_link(*_: object, **__: object) -> None:
        raise OSError(18, "Invalid cross-device link")

    monkeypatch.setattr(os, "link", no_link)
    for name in ("a", "b"):
        set_back(swapper, Change("workspace", f"/{name}", ChangeKind.ADDED, FileType.FILE, mode_after=0o644), source)
    assert [(place / name).read_text() for name in "ab"] == ["content", "content"]


def test_a_socket_of_the_host_becomes_a_name_to_which_nobody_listens(inside: tuple[Swapper, Path]) -> None:
    swapper, place = inside
    set_back(swapper, Change("workspace", "/s", ChangeKind.ADDED, FileType.SOCKET, mode_after=0o755))
    assert stat.S_ISSOCK((place / "s").lstat().st_mode) and mode_of(place / "s") == 0o755


def test_a_layer_of_another_root_does_not_fit() -> None:
    """What this one's files would be compared with are those of the other."""

    def has(lower: str, base: str = "") -> SimpleNamespace:
        part = Changeable("root", "/", (base, lower) if base else (lower,), base)
        return SimpleNamespace(
            view=SimpleNamespace(parts=(part,)), parts=(part,), directory="/w", workspace="/w", id="a"
        )

    check_fits(cast(Prepared, has("/one", "/layer")), cast(KeptLayer, has("/one")))
    with pytest.raises(RequestError, match="another root"):
        check_fits(cast(Prepared, has("/one")), cast(KeptLayer, has("/other")))


def test_what_lies_below_a_mount_is_left_alone() -> None:
    def change(path: str, kind: ChangeKind = ChangeKind.DELETED, before: FileType = FileType.FILE) -> Change:
        return Change("workspace", path, kind, FileType.FILE, type_before=before)

    covers = ["/w/.env", "/w/dir/deep"]
    for path in ("/w/.env", "/w/.env/below", "/w/dir/deep/x"):
        assert _is_covered(change(path), covers)
    for path in ("/w/.env2", "/w/dirs", "/w/dir/deeper"):
        assert not _is_covered(change(path), covers)
    with pytest.raises(CorralError, match="/w/dir/deep"):
        _is_covered(change("/w/dir"), covers)
    with pytest.raises(CorralError, match="/w/dir/deep"):
        _is_covered(change("/w/dir", ChangeKind.CHANGED, FileType.DIRECTORY), covers)


@pytest.mark.parametrize(
    ("owner", "mode", "refused"),
    [
        ((65534, 65534), 0o600, True),
        ((65534, 65534), 0o640, True),
        ((65534, 65534), 0o604, False),
        ((7, 65534), 0o640, True),
        ((7, 65534), 0o644, False),
        ((1000, 65534), 0o640, False),
        ((7, 7), 0o600, False),
    ],
)
def test_nobody_gets_by_going_back_what_nobody_inside_could_read(
    owner: tuple[int, int], mode: int, refused: bool
) -> None:
    change = Change("workspace", "/w/a", ChangeKind.ADDED, FileType.FILE, mode_after=mode, owner_after=owner)
    if refused:
        with pytest.raises(CorralError, match="others may not read it"):
            _check_readable(change, 1000)
    else:
        _check_readable(change, 1000)
