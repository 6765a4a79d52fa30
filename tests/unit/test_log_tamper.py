"""Whatever is done to the files of a log is found, by the check that is there for it, at the first bad place."""

from __future__ import annotations

import os
from collections.abc import Callable
from pathlib import Path

import pytest

from corral.log.merkle import leaf_hash, perfect_root
from corral.log.note import Checkpoint, KeyFile, KeyType, Note, cosign, sign
from corral.log.tiles import ENTRIES, WIDTH, Tiles, encode_bundle, tile_path
from corral.log.verify import MAX_FAULTS, verify_between, verify_log
from tests.unit.logs import KEY, OTHER_KEY, WITNESS, checkpoint, copy_log, entry, faults, files, make_log

SIZE = 700
"""Two full tiles and one of 188, under one of two."""


@pytest.fixture(scope="module")
def sound(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_log(tmp_path_factory.mktemp("sound") / "log", 100, 300, SIZE)


@pytest.fixture
def directory(sound: Path, tmp_path: Path) -> Path:
    return copy_log(sound, tmp_path / "log")


def width(number: int) -> int:
    return min(WIDTH, SIZE - number * WIDTH)


def entries_of(directory: Path, number: int) -> list[bytes]:
    return Tiles(directory).entries(number, width(number))


def write_entries(directory: Path, number: int, entries: list[bytes]) -> None:
    (directory / tile_path(ENTRIES, number, width(number))).write_bytes(encode_bundle(entries))


def write_hash(directory: Path, level: int, number: int, at: int, width: int, content: bytes) -> None:
    with (directory / tile_path(level, number, width)).open("r+b") as file:
        file.seek(at * 32)
        file.write(content)


def swap(one: Path, other: Path) -> None:
    one.rename(one.with_name("aside"))
    other.rename(one)
    one.with_name("aside").rename(other)


# ---- the tree ----


def change(directory: Path) -> None:
    entries = entries_of(directory, 1)
    entries[44] = entries[44].replace(b"3", b"4")
    write_entries(directory, 1, entries)


def delete(directory: Path) -> None:
    entries = entries_of(directory, 1)
    write_entries(directory, 1, [*entries[:44], *entries[45:]])


def delete_and_move_up(directory: Path) -> None:
    entries, following = entries_of(directory, 1), entries_of(directory, 2)
    write_entries(directory, 1, [*entries[:44], *entries[45:], following[0]])
    write_entries(directory, 2, [*following[1:], following[-1]])


def reorder(directory: Path) -> None:
    entries = entries_of(directory, 1)
    entries[44], entries[45] = entries[45], entries[44]
    write_entries(directory, 1, entries)


def insert(directory: Path) -> None:
    entries = entries_of(directory, 1)
    write_entries(directory, 1, [*entries[:44], b"never happened", *entries[44:-1]])


def append_to_the_tile(directory: Path) -> None:
    write_entries(directory, 2, [*entries_of(directory, 2), b"never happened"])


def change_with_its_hash(directory: Path) -> None:
    change(directory)
    write_hash(directory, 0, 1, 44, WIDTH, leaf_hash(entries_of(directory, 1)[44]))


def change_with_all_hashes(directory: Path) -> None:
    change_with_its_hash(directory)
    write_hash(directory, 1, 0, 1, 2, perfect_root(Tiles(directory).hashes(0, 1)))


def change_the_last_with_its_hash(directory: Path) -> None:
    entries = [*entries_of(directory, 2)[:-1], b"never happened"]
    write_entries(directory, 2, entries)
    write_hash(directory, 0, 2, 187, 188, leaf_hash(entries[-1]))


def truncate(name: str, by: int = 1) -> Callable[[Path], None]:
    return lambda directory: os.truncate(directory / name, (directory / name).stat().st_size - by)


def remove(name: str) -> Callable[[Path], None]:
    return lambda directory: (directory / name).unlink()


def replace(name: str, content: bytes) -> Callable[[Path], object]:
    return lambda directory: (directory / name).write_bytes(content)


@pytest.mark.parametrize(
    ("tamper", "check", "where"),
    [
        (change, "entries", "entry 300"),
        (delete, "entries", "tile/entries/001"),
        (delete_and_move_up, "entries", "entry 300"),
        (reorder, "entries", "entry 300"),
        (insert, "entries", "entry 300"),
        (append_to_the_tile, "entries", "tile/entries/002.p/188"),
        (truncate("tile/entries/001"), "entries", "tile/entries/001"),
        (truncate("tile/entries/002.p/188", 9), "entries", "tile/entries/002.p/188"),
        (remove("tile/entries/000"), "entries", "tile/entries/000"),
        (remove("tile/entries/002.p/188"), "entries", "tile/entries/002.p/188"),
        (replace("tile/entries/001", b"\xff" * 70_000), "entries", "tile/entries/001"),
        (replace("tile/entries/001", b"\0" * 512), "entries", "entry 256"),
        (lambda at: swap(at / "tile/entries/000", at / "tile/entries/001"), "entries", "entry 0"),
        (lambda at: swap(at / "tile/0/000", at / "tile/0/001"), "entries", "entry 0"),
        (lambda at: write_hash(at, 0, 1, 44, WIDTH, bytes(32)), "entries", "entry 300"),
        (lambda at: write_hash(at, 0, 2, 187, 188, bytes(32)), "entries", "entry 699"),
        (truncate("tile/0/001"), "hashes", "tile/0/001"),
        (remove("tile/0/001"), "hashes", "tile/0/001"),
        (lambda at: write_hash(at, 1, 0, 1, 2, bytes(32)), "hashes", "tile/1/000.p/2, hash 1"),
        (truncate("tile/1/000.p/2", 32), "hashes", "tile/1/000.p/2"),
        (remove("tile/1/000.p/2"), "hashes", "tile/1/000.p/2"),
        (change_with_its_hash, "hashes", "tile/1/000.p/2, hash 1"),
        (change_with_all_hashes, "root", "checkpoint"),
        (change_the_last_with_its_hash, "root", "checkpoint"),
    ],
)  # fmt: skip
def test_the_tree_gives_away_every_change(
    directory: Path, tamper: Callable[[Path], object], check: str, where: str
) -> None:
    assert faults(directory) == []
    tamper(directory)
    assert faults(directory)[0] == (check, where)


def test_every_byte_that_is_served_counts(tmp_path: Path) -> None:
    """Of the tiles and the checkpoint; but not the keys of the log, which are nobody's reason to trust it."""
    directory = make_log(tmp_path / "log", 9)
    served = [path for path in files(directory) if "tile" in path.parts or path == directory / "checkpoint"]
    assert len(served) == 3
    for path in served:
        content = path.read_bytes()
        for at in range(len(content)):
            path.write_bytes(content[:at] + bytes([content[at] ^ 1]) + content[at + 1 :])
            found = faults(directory)
            assert found
            assert found[0][0] in (("signature", "consistency") if path.name == "checkpoint" else ("entries", "hashes"))
        path.write_bytes(content)
    assert faults(directory) == []


def test_the_first_fault_is_at_the_first_bad_place(directory: Path) -> None:
    change_the_last_with_its_hash(directory)  # found by the root, which is not looked at when there are others
    entries = entries_of(directory, 2)
    write_entries(directory, 2, [*entries[:88], b"no", *entries[89:]])
    change_with_its_hash(directory)
    write_entries(directory, 0, [*entries_of(directory, 0)[:-1], b"no"])
    assert faults(directory) == [
        ("entries", "entry 255"),
        ("hashes", "tile/1/000.p/2, hash 0"),
        ("hashes", "tile/1/000.p/2, hash 1"),
        ("entries", "entry 600"),
    ]
    report = verify_log(directory, [KEY.verifier])
    assert not report.valid
    assert str(report.faults[0]) == "entries: entry 255: it is not the one whose hash is in the tree"


def test_what_is_no_file_does_not_hold_up_who_verifies(directory: Path) -> None:
    for name in ("tile/0/001", "tile/entries/001", "tile/1/000.p/2"):
        (directory / name).unlink()
        os.mkfifo(directory / name)
    (directory / "tile/entries/000").unlink()
    (directory / "tile/entries/000").symlink_to("/dev/zero")
    assert {check for check, _ in faults(directory)} == {"hashes", "entries"}
    (directory / "checkpoint").unlink()
    os.mkfifo(directory / "checkpoint")
    assert faults(directory)[0] == ("signature", "checkpoint")


def test_a_checkpoint_for_more_entries_than_anybody_has_does_not_hold_up_who_verifies(directory: Path) -> None:
    text = Checkpoint(KEY.verifier.name, 2**62, bytes(32)).text()
    for name in ("checkpoint", "journal/checkpoint"):
        (directory / name).write_bytes(Note(text, (sign(text, KEY),)).encode())
    report = verify_log(directory, [KEY.verifier])
    assert len(report.faults) == MAX_FAULTS
    assert report.faults[0].check == "hashes"


# ---- the checkpoint ----


@pytest.mark.parametrize("copy", [False, True])
@pytest.mark.parametrize(
    "tamper",
    [
        lambda content: content.replace(b"\n700\n", b"\n699\n"),
        lambda content: content.replace(b"log\n700", b"log2\n700"),
        lambda content: content[:-20],
        lambda content: b"",
        lambda content: content.replace("\u2014 ".encode(), "\u2014 x".encode()),
        lambda content: content.split(b"\n\n")[0] + b"\n",
    ],
)
def test_an_altered_checkpoint_is_found_also_beside_a_good_copy(
    directory: Path, tamper: Callable[[bytes], bytes], copy: bool
) -> None:
    for name in ("checkpoint", "journal/checkpoint") if copy else ("checkpoint",):
        (directory / name).write_bytes(tamper((directory / name).read_bytes()))
    assert faults(directory) == [("signature", "checkpoint")]


def test_a_checkpoint_that_is_gone_is_missed(directory: Path) -> None:
    (directory / "checkpoint").unlink()
    assert faults(directory) == [("signature", "checkpoint")]
    (directory / "journal/checkpoint").unlink()
    assert faults(directory) == [("signature", "checkpoint")]


def test_a_checkpoint_of_another_key_or_another_log_is_none(directory: Path) -> None:
    for text, key in (
        (Checkpoint(KEY.verifier.name, 0, bytes(32)).text(), OTHER_KEY),
        (
            Checkpoint("example.org/other", 0, bytes(32)).text(),
            KeyFile("example.org/other", KeyType.ED25519, bytes(32)),
        ),
        (Checkpoint("example.org/other", 0, bytes(32)).text(), KEY),
    ):
        for name in ("checkpoint", "journal/checkpoint"):
            (directory / name).write_bytes(Note(text, (sign(text, key),)).encode())
        assert faults(directory) == [("signature", "checkpoint")]
    report = verify_log(directory, [])
    assert [fault.check for fault in report.faults] == ["signature"]


def test_two_copies_that_contradict_each_other_are_found(directory: Path) -> None:
    for size in (SIZE, SIZE - 1):
        text = Checkpoint(KEY.verifier.name, size, bytes(32)).text()
        (directory / "checkpoint").write_bytes(Note(text, (sign(text, KEY),)).encode())
        assert faults(directory) == [("consistency", "checkpoint")]


# ---- the whole log ----


def test_an_older_log_in_place_of_the_log_is_found_by_a_checkpoint_that_was_kept(
    directory: Path, tmp_path: Path
) -> None:
    older = make_log(tmp_path / "older", 100, 300)
    assert faults(older) == []
    assert faults(older, checkpoint(older)) == []
    assert faults(older, checkpoint(directory)) == [("consistency", "earlier checkpoint 1")]
    report = verify_log(older, [KEY.verifier], earlier=[checkpoint(directory)])
    assert "for 700 entries, and the log has only 300: it was rolled back" in report.faults[0].what


def test_another_history_is_found_by_any_checkpoint_that_was_kept(directory: Path, tmp_path: Path) -> None:
    """Rewritten from the beginning and signed again, by somebody who has the key."""
    other = [entry(number) for number in range(SIZE)]
    other[50] = b"never happened"
    forged = make_log(tmp_path / "forged", SIZE, entries=other)
    assert faults(forged) == []
    kept = [checkpoint(make_log(tmp_path / str(size), size)) for size in (50, 51, 300)]
    assert faults(directory, *kept) == []
    assert faults(forged, *kept, checkpoint(directory)) == [
        ("consistency", f"earlier checkpoint {number}") for number in (2, 3, 4)
    ]
    assert faults(forged, b"no note") == [("signature", "earlier checkpoint 1")]


def test_between_two_checkpoints(directory: Path, tmp_path: Path) -> None:
    old, new = checkpoint(make_log(tmp_path / "old", 123)), checkpoint(directory)
    assert verify_between(old, new, directory, [KEY.verifier]).valid
    assert verify_between(new, new, directory, [KEY.verifier]).valid
    for one, other, check, where in (
        (new, old, "consistency", "the older checkpoint"),
        (b"", new, "signature", "the older checkpoint"),
        (old, b"", "signature", "the newer checkpoint"),
    ):
        report = verify_between(one, other, directory, [KEY.verifier])
        assert [(fault.check, fault.where) for fault in report.faults] == [(check, where)]
    write_hash(directory, 1, 0, 1, 2, bytes(32))
    assert [fault.check for fault in verify_between(old, new, directory, [KEY.verifier]).faults] == ["consistency"]


def test_cosignatures_are_counted_and_a_wrong_one_is_found(directory: Path) -> None:
    text = checkpoint(directory).decode().partition("\n\n")[0] + "\n"
    own, witnessed = sign(text, KEY), cosign(text, WITNESS, at=1)

    def verified(*signatures: object, quorum: int) -> list[str]:
        for name in ("checkpoint", "journal/checkpoint"):
            (directory / name).write_bytes(Note(text, signatures).encode())  # type: ignore[arg-type]
        report = verify_log(directory, [KEY.verifier], witnesses=[WITNESS.verifier], quorum=quorum)
        return [str(fault) for fault in report.faults] or list(report.cosigners)

    assert verified(own, witnessed, quorum=1) == ["example.org/witness"]
    assert verified(own, quorum=0) == []
    assert verified(own, quorum=1) == ["cosignature: checkpoint: 0 witnesses have cosigned it; 1 must"]
    other = cosign(text.replace("700", "701"), WITNESS, at=1)
    assert verified(own, other, quorum=0)[0].startswith("cosignature: checkpoint: the signature of example.org/witness")


def test_what_stands_in_an_entry_can_be_looked_at(directory: Path) -> None:
    report = verify_log(
        directory, [KEY.verifier], look=lambda number, content: "wrong" if b"33" in content and number < 400 else ""
    )
    assert [str(fault) for fault in report.faults] == [
        "records: entry 33: wrong",
        "records: entry 133: wrong",
        "records: entry 233: wrong",
        *(f"records: entry {number}: wrong" for number in range(330, 340)),
    ]
    assert report.checked == report.size == SIZE
