"""`filesystem.write`: directories beside the workspace that are as writable as it, and as untouched on the host."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from corral import Policy, RequestError
from corral.policy.model import Filesystem
from corral.sandbox.changes import ChangeKind
from corral.sandbox.keeping import keep
from corral.sandbox.layer import open_layer
from tests.contain.conftest import MakeBox


@pytest.fixture(autouse=True)
def own_directories(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("XDG_STATE_HOME", str(tmp_path))
    monkeypatch.setenv("XDG_RUNTIME_DIR", str(tmp_path))


@pytest.fixture
def tree(tmp_path: Path) -> Path:
    """A directory beside the workspace, which belongs to whoever the workspace belongs to."""
    path = tmp_path / "tree"
    (path / "sub").mkdir(parents=True)
    (path / "file").write_text("original\n")
    (path / "sub" / "gone").write_text("original\n")
    return path


def contents(path: Path) -> dict[str, str]:
    return {str(each.relative_to(path)): each.read_text() for each in path.rglob("*") if each.is_file()}


def policy(*write: Path, read: tuple[Path, ...] = (), deny: tuple[Path, ...] = ()) -> Policy:
    trees = [tuple(map(str, paths)) for paths in (write, read, deny)]
    return Policy(filesystem=Filesystem(write=trees[0], read=trees[1], deny=trees[2]))


async def test_a_change_in_a_write_tree_goes_to_the_layer(make_box: MakeBox, tree: Path) -> None:
    before = contents(tree)
    box = await make_box(policy=policy(tree))
    script = "set -e; echo new > new; echo changed >> file; rm sub/gone; mv file moved; mkdir -p a/b; chmod 700 sub"
    await box.exec(["sh", "-c", script], directory=str(tree), check=True)
    assert (await box.read_file(f"{tree}/moved")) == b"original\nchanged\n"
    assert contents(tree) == before
    found = {change.path.removeprefix(f"{tree}/"): change for change in await box.changes()}
    assert {path: change.kind for path, change in found.items()} == {
        "new": ChangeKind.ADDED,
        "moved": ChangeKind.ADDED,
        "file": ChangeKind.DELETED,
        "sub/gone": ChangeKind.DELETED,
        "sub": ChangeKind.MODE,
        "a": ChangeKind.ADDED,
        "a/b": ChangeKind.ADDED,
    }
    assert {change.part for change in found.values()} == {"write-a"}


async def test_its_owner_is_the_agent(make_box: MakeBox, workspace: Path, tree: Path) -> None:
    box = await make_box(policy=policy(tree))
    script = 'stat -c "%u:%g" "$0" "$0/file"; touch "$0/file"; cat "$0/file" > "$0/copy"; rm "$0/copy"'
    one = await box.exec(["sh", "-c", script, str(tree)], check=True)
    other = await box.exec(["stat", "-c", "%u:%g", str(workspace), f"{workspace}/file.txt"], check=True)
    assert one.text == other.text
    # Copied up by touch(1), and still what it was: nothing is a change of owner.
    assert await box.changes() == []


async def test_it_is_kept_with_the_layer(make_box: MakeBox, tree: Path, tmp_path: Path) -> None:
    second = tmp_path / "second"
    second.mkdir()
    box = await make_box(policy=policy(tree, second))
    await box.exec(["sh", "-c", 'echo 1 > "$0/new"; echo 2 > "$1/new"', str(tree), str(second)], check=True)
    box.kill()
    await box.wait_ended()
    kept = keep(box.core.prepared, box.core.layer_fd)
    assert kept is not None
    again = open_layer(kept.id)
    assert again == kept
    assert [(change.part, change.path) for change in again.changes()] == [
        ("write-a", f"{second}/new"),
        ("write-b", f"{tree}/new"),
    ]
    again.discard()


async def test_trees_within_trees(make_box: MakeBox, workspace: Path, tree: Path) -> None:
    (tree / "shown" / "deep").mkdir(parents=True)
    (tree / "denied").mkdir()
    (tree / "denied" / "secret").write_text("secret")
    (workspace / "inner").mkdir()
    box = await make_box(
        policy=policy(
            tree,
            tree / "sub",
            tree / "shown" / "deep",
            workspace / "inner",
            read=(tree, tree / "shown"),
            deny=(tree / "denied",),
        )
    )
    script = "touch 1 sub/2 shown/deep/3 && ! touch shown/4 && ! cat denied/secret && ! touch denied/5"
    assert (await box.exec(["sh", "-c", script], directory=str(tree))).exit_code == 0
    await box.exec(["touch", f"{workspace}/inner/6"], check=True)
    # What lies in a tree that is writable already is a part of that tree: files can be moved between them.
    await box.exec(["python3", "-B", "-c", "import os; os.rename('sub/2', '2')"], directory=str(tree), check=True)
    assert {(change.part, change.path) for change in await box.changes()} == {
        ("write-a", f"{tree}/1"),
        ("write-a", f"{tree}/2"),
        ("write-b", f"{tree}/shown/deep/3"),
        ("workspace", f"{workspace}/inner/6"),
    }
    assert not (tree / "1").exists()
    assert not (tree / "shown" / "deep" / "3").exists()


async def test_the_workspace_within_a_write_tree(make_box: MakeBox, workspace: Path, tmp_path: Path) -> None:
    around = workspace.parent
    # What else lies there is the test's own runtime directory; it is not mounted.
    box = await make_box(policy=policy(around))
    await box.exec(["sh", "-c", "touch ../outer; touch inner"], directory=str(workspace), check=True)
    assert {(change.part, change.path) for change in await box.changes()} == {
        ("write-a", f"{around}/outer"),
        ("workspace", f"{workspace}/inner"),
    }
    assert not (around / "outer").exists()
    assert not (workspace / "inner").exists()


async def test_a_link_is_shown_where_it_leads(make_box: MakeBox, tree: Path, tmp_path: Path) -> None:
    link = tmp_path / "link"
    link.symlink_to(tree)
    box = await make_box(policy=policy(link))
    await box.exec(["touch", f"{tree}/new"], check=True)
    assert not os.path.exists(tree / "new")


@pytest.mark.parametrize("path", ["/", "/usr", "/etc", "/home", "/proc/self", "/dev", "/run", "/sys/kernel", "/tmp"])
async def test_parts_of_the_system_cannot_be_written(make_box: MakeBox, path: str) -> None:
    with pytest.raises(RequestError, match=r"filesystem.write .*part of the system"):
        await make_box(policy=policy(Path(path)))


async def test_homes_files_and_what_is_missing_cannot_be_written(make_box: MakeBox, tree: Path) -> None:
    for path, reason in (
        (Path("~").expanduser(), "your home|part of the system"),
        (tree / "file", "not a directory"),
        (tree / "nothing", "No such file"),
    ):
        with pytest.raises(RequestError, match=reason):
            await make_box(policy=policy(path))
