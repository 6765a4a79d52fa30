"""The comparison of hand-made overlay trees, the patch of hand-made differences, and the copy to disk."""

from __future__ import annotations

import errno
import os
import stat
import subprocess
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from corral.errors import CorralError
from corral.sandbox import copying, layer, patch
from corral.sandbox.changes import Change, ChangeKind, FileType, changes
from corral.sandbox.compare import MAX_PATH
from corral.sandbox.extent import is_empty, measure
from corral.sandbox.ownership import Ids, OwnerMap, owners_from_json, owners_to_json
from corral.sandbox.plan import IdLine
from corral.sandbox.trees import OPEN_LEVELS, UPPER, Walk, remove_tree
from corral.sandbox.view import Changeable

ALL = Ids((IdLine(0, 0, 1 << 31),), (IdLine(0, 0, 1 << 31),))
SAME = OwnerMap(ALL, ALL, ALL)
INSIDE = "/inside"


class Trees:
    """A layer with one part, over some lower trees."""

    def __init__(self, top: Path, lowers: int = 1) -> None:
        self.layer = top / "layer"
        self.upper = self.layer / "workspace"
        self.upper.mkdir(parents=True)
        self.lowers = [top / f"lower{number}" for number in range(lowers)]
        for lower in self.lowers:
            lower.mkdir()
        self.part = Changeable("workspace", INSIDE, tuple(map(str, self.lowers)))

    def changes(self, owners: OwnerMap = SAME, scaffold: frozenset[str] = frozenset()) -> list[Change]:
        fd = os.open(self.layer, os.O_RDONLY | os.O_DIRECTORY)
        try:
            return changes([self.part], fd, owners, scaffold)
        finally:
            os.close(fd)

    def kinds(self) -> dict[str, ChangeKind]:
        return {change.path.removeprefix(f"{INSIDE}/"): change.kind for change in self.changes()}


@pytest.fixture
def trees(tmp_path: Path) -> Trees:
    return Trees(tmp_path)


def whiteout(path: Path) -> None:
    os.mknod(path, stat.S_IFCHR, 0)


def opaque(path: Path) -> None:
    os.setxattr(path, "user.overlay.opaque", b"y")


def test_nothing_in_the_upper_is_no_change(trees: Trees) -> None:
    (trees.lowers[0] / "file").write_text("x")
    assert trees.changes() == []


def test_added_changed_deleted_mode_with_their_sizes(trees: Trees) -> None:
    lower, upper = trees.lowers[0], trees.upper
    for name in ("changed", "gone", "mode", "same"):
        (lower / name).write_text("12345")
        (lower / name).chmod(0o644)
    (upper / "added").write_text("123")
    (upper / "changed").write_text("54321")
    (upper / "same").write_text("12345")
    (upper / "mode").write_text("12345")
    for name, mode in (("changed", 0o600), ("same", 0o644), ("mode", 0o755)):
        (upper / name).chmod(mode)
    whiteout(upper / "gone")
    whiteout(upper / "never-was")
    found = {change.path.removeprefix(f"{INSIDE}/"): change for change in trees.changes()}
    assert list(found) == ["added", "changed", "gone", "mode"]
    assert (found["added"].size_before, found["added"].size_after) == (None, 3)
    assert found["changed"].kind is ChangeKind.CHANGED
    assert (found["changed"].mode_before, found["changed"].mode_after) == (0o644, 0o600)
    assert found["gone"].kind is ChangeKind.DELETED and found["gone"].size_before == 5
    assert found["mode"].kind is ChangeKind.MODE and found["mode"].mode_after == 0o755


def test_an_opaque_directory_hides_what_lies_below(trees: Trees) -> None:
    (trees.lowers[0] / "d" / "sub").mkdir(parents=True)
    (trees.lowers[0] / "d" / "sub" / "deep").write_text("x")
    (trees.lowers[0] / "d" / "kept").write_text("x")
    (trees.upper / "d" / "sub").mkdir(parents=True)
    (trees.upper / "d" / "kept").write_text("x")
    (trees.upper / "d" / "new").write_text("x")
    opaque(trees.upper / "d")
    # `sub` itself is not marked: below an opaque directory nothing is merged.
    assert trees.kinds() == {"d/new": ChangeKind.ADDED, "d/sub/deep": ChangeKind.DELETED}


def test_a_deleted_directory_is_one_entry_with_a_count(trees: Trees) -> None:
    (trees.lowers[0] / "d" / "sub").mkdir(parents=True)
    (trees.lowers[0] / "d" / "sub" / "file").write_text("x")
    whiteout(trees.upper / "d")
    (found,) = trees.changes()
    assert found.kind is ChangeKind.DELETED and found.file_type is FileType.DIRECTORY and found.entries == 2


def test_types_that_change(trees: Trees) -> None:
    (trees.lowers[0] / "was-directory").mkdir()
    (trees.lowers[0] / "was-directory" / "x").write_text("x")
    (trees.lowers[0] / "was-file").write_text("x")
    (trees.lowers[0] / "link").symlink_to("one")
    (trees.upper / "was-directory").write_text("x")
    (trees.upper / "was-file").mkdir()
    (trees.upper / "was-file" / "y").write_text("y")
    (trees.upper / "link").symlink_to("two")
    found = {change.path.removeprefix(f"{INSIDE}/"): change for change in trees.changes()}
    assert found["was-directory"].type_before is FileType.DIRECTORY
    assert found["was-file"].file_type is FileType.DIRECTORY
    assert {path: change.kind for path, change in found.items()} == {
        "was-directory": ChangeKind.CHANGED,
        "was-file": ChangeKind.CHANGED,
        "was-file/y": ChangeKind.ADDED,
        "link": ChangeKind.CHANGED,
    }


def test_several_lower_trees_are_merged_from_the_top(tmp_path: Path) -> None:
    trees = Trees(tmp_path, lowers=3)
    top, middle, bottom = trees.lowers
    for lower in trees.lowers:
        (lower / "d").mkdir()
    (middle / "d" / "file").write_text("middle")
    (bottom / "d" / "file").write_text("bottom")
    (bottom / "d" / "hidden").write_text("x")
    (bottom / "d" / "shown").write_text("x")
    whiteout(top / "d" / "hidden")
    (trees.upper / "d").mkdir()
    (trees.upper / "d" / "file").write_text("middle")
    (trees.upper / "d" / "hidden").write_text("x")
    whiteout(trees.upper / "d" / "shown")
    assert trees.kinds() == {"d/hidden": ChangeKind.ADDED, "d/shown": ChangeKind.DELETED}


def test_owners_are_compared_as_they_read_inside(trees: Trees) -> None:
    (trees.lowers[0] / "file").write_text("x")
    (trees.upper / "file").write_text("x")
    uid, gid = os.getuid(), os.getgid()
    other = OwnerMap(Ids((IdLine(7, uid, 1),), (IdLine(8, gid, 1),)), ALL, ALL)
    (found,) = trees.changes(other)
    assert found.kind is ChangeKind.OWNER
    assert (found.owner_before, found.owner_after) == ((uid, gid), (7, 8))
    assert trees.changes(OwnerMap(None, ALL, ALL)) == []
    assert owners_from_json(owners_to_json(other)) == other


def test_scaffold_is_nobodys_change_but_what_is_put_into_it_is(trees: Trees) -> None:
    (trees.upper / "made" / "sub").mkdir(parents=True)
    (trees.upper / "made" / "place").write_text("")
    scaffold = frozenset(f"{INSIDE}/{name}" for name in ("made", "made/sub", "made/place"))
    fd = os.open(trees.layer, os.O_RDONLY)
    assert trees.changes(scaffold=scaffold) == []
    assert is_empty([trees.part], fd, scaffold)
    (trees.upper / "made" / "mine").write_text("x" * 5000)
    assert [change.path for change in trees.changes(scaffold=scaffold)] == [f"{INSIDE}/made/mine"]
    assert not is_empty([trees.part], fd, scaffold)
    assert measure([trees.part], fd, scaffold).entries == 1
    os.close(fd)


def test_paths_that_are_too_long_to_tell_are_counted(trees: Trees) -> None:
    walk = trees.upper
    fd = os.open(walk, os.O_RDONLY)
    levels = MAX_PATH // 200 + 5
    for _ in range(levels):
        os.mkdir("d" * 200, dir_fd=fd)
        following = os.open("d" * 200, os.O_RDONLY, dir_fd=fd)
        os.close(fd)
        fd = following
    os.close(fd)
    found = trees.changes()
    rest = [change for change in found if change.entries]
    assert len(rest) == 1 and rest[0].path == INSIDE
    assert len(found) - 1 + rest[0].entries == levels
    parent = os.open(trees.layer, os.O_RDONLY)
    remove_tree(parent, "workspace")
    os.close(parent)
    assert not trees.upper.exists()


def test_a_walk_finds_its_way_back_from_any_depth(tmp_path: Path) -> None:
    path = tmp_path
    for number in range(OPEN_LEVELS * 3):
        (path / f"side{number}").write_text("x")
        path = path / "d"
        path.mkdir()
    fd = os.open(tmp_path, os.O_RDONLY)
    with Walk({UPPER: fd}, "") as walk:
        while walk.enter("d", "", (UPPER,)):
            pass
        assert len(walk.levels) == OPEN_LEVELS * 3 + 1
        assert sum(len(level.fds) for level in walk.levels) <= OPEN_LEVELS + 1
        while len(walk.levels) > 1:
            walk.leave()
            assert f"side{len(walk.levels) - 1}" in walk.list(UPPER)
    os.close(fd)


def test_a_directory_that_was_moved_away_is_not_mistaken_for_its_new_parent(tmp_path: Path) -> None:
    path = tmp_path / "tree"
    deep = path.joinpath(*["d"] * (OPEN_LEVELS + 5))
    deep.mkdir(parents=True)
    elsewhere = tmp_path / "elsewhere"
    elsewhere.mkdir()
    (elsewhere / "secret").write_text("x")
    fd = os.open(path, os.O_RDONLY)
    with Walk({UPPER: fd}, "") as walk:
        while walk.enter("d", "", (UPPER,)):
            pass
        os.rename(path.joinpath("d", "d", "d"), elsewhere / "d")
        while len(walk.levels) > 1:
            walk.leave()
            assert "secret" not in walk.list(UPPER)
    os.close(fd)


def test_a_file_that_the_file_system_cannot_hold_is_dropped(
    trees: Trees, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (trees.upper / "huge").write_text("x")
    (trees.upper / "small").write_text("")

    def too_big(fd: int, size: int) -> None:
        if size:
            raise OSError(errno.EFBIG, "File too large")

    monkeypatch.setattr(os, "ftruncate", too_big)
    target = tmp_path / "target"
    target.mkdir()
    fds = [os.open(path, os.O_RDONLY) for path in (trees.layer, target)]
    copied = copying.copy_parts(fds[0], fds[1], [trees.part], SAME, frozenset())
    assert copied.dropped.paths == [f"{INSIDE}/huge"]
    assert os.listdir(target) == ["workspace"] and os.listdir(target / "workspace") == ["small"]
    for fd in fds:
        os.close(fd)


@pytest.mark.parametrize(
    "content",
    [
        "",
        "[]",
        "{}",
        "[" * 100_000,
        '{"format": 99}',
        '{"format": 1, "id": "bbbbbbbb"}',
        '{"format": 1, "id": 3}',
        "nul\0",
    ],
)
def test_a_damaged_description_is_an_error_and_can_be_discarded(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, content: str
) -> None:
    monkeypatch.setenv("XDG_STATE_HOME", str(tmp_path))
    place = tmp_path / "corral" / "layers" / "aaaaaaaa"
    place.mkdir(parents=True)
    os.chmod(tmp_path / "corral", 0o700)
    (place / "meta.json").write_text(content)
    with pytest.raises(CorralError, match="damaged"):
        layer.open_layer("aaaaaaaa")
    assert layer.list_layers() == []
    layer.discard("aaaaaaaa")
    assert not place.exists()


# ---- patches ----

_text = st.lists(st.sampled_from(["a", "b", "", "\r", "\x0c", "x y", "\u2028", "--- a"]), max_size=12).map("\n".join)


@settings(max_examples=60, deadline=None)
@given(old=_text, new=_text, pairs=st.sampled_from([0, 10**6]))
def test_git_turns_the_old_text_into_the_new_one(
    tmp_path_factory: pytest.TempPathFactory, old: str, new: str, pairs: int
) -> None:
    if old == new:
        return
    place = tmp_path_factory.mktemp("patch")
    (place / "name").write_bytes(old.encode())
    before, patch._MAX_PAIRS = patch._MAX_PAIRS, pairs
    try:
        text = patch._difference("name", (0o100644, old.encode()), (0o100644, new.encode()))
    finally:
        patch._MAX_PAIRS = before
    applied = subprocess.run(["git", "apply", "-"], cwd=place, input=text.encode(), capture_output=True, check=False)
    assert applied.returncode == 0, (applied.stderr, text)
    assert (place / "name").read_bytes() == new.encode()


def test_names_are_quoted_as_git_quotes_them() -> None:
    assert patch._quote("plain name.txt") == "plain name.txt"
    assert patch._quote('q"\\\n\t\x1b') == '"q\\"\\\\\\n\\t\\033"'
    assert patch._quote("caf\u00e9") == '"caf\\303\\251"'
    assert patch._quote(os.fsdecode(b"\xff")) == '"\\377"'


def test_what_this_machine_cannot_look_at_is_not_taken_for_nothing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Without descriptors each directory would look empty, and what is set back would lose them."""
    (tmp_path / "dir").mkdir()
    root = os.open(tmp_path, os.O_RDONLY | os.O_DIRECTORY)

    def none_left(*_: object, **__: object) -> int:
        raise OSError(errno.EMFILE, os.strerror(errno.EMFILE))

    try:
        with Walk({UPPER: root}, "/") as walk:
            assert walk.open(UPPER, "missing") == -1
            monkeypatch.setattr(os, "open", none_left)
            with pytest.raises(OSError, match="Too many open files"):
                walk.enter("dir", "/dir", (UPPER,))
    finally:
        monkeypatch.undo()
        os.close(root)


def test_what_is_deeper_than_is_ever_looked_at_can_be_removed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Nobody could get rid of a layer that an agent has made so, and its disk space."""
    monkeypatch.setattr("corral.sandbox.trees.MAX_DEPTH", depth := 60)
    place = os.open(tmp_path, os.O_RDONLY | os.O_DIRECTORY)
    os.mkdir("deep", dir_fd=place)
    fd = os.open("deep", os.O_RDONLY | os.O_DIRECTORY, dir_fd=place)
    for _ in range(2 * depth + 10):
        os.close(os.open("file", os.O_WRONLY | os.O_CREAT, dir_fd=fd))
        os.mkdir("d", dir_fd=fd)
        below = os.open("d", os.O_RDONLY | os.O_DIRECTORY, dir_fd=fd)
        os.close(fd)
        fd = below
    os.close(fd)
    gone: list[os.stat_result] = []
    remove_tree(place, "deep", removed=gone.append)
    os.close(place)
    assert os.listdir(tmp_path) == [] and len(gone) == 2 * (2 * depth + 10) + 1
