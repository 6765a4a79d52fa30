"""Others verify our logs: Go's golang.org/x/mod/sumdb reads our notes, tiles and proofs; it refuses altered ones."""

from __future__ import annotations

import base64
import os
import shutil
import subprocess
from collections.abc import Callable
from pathlib import Path

import pytest

from corral.log.merkle import consistency_proof
from corral.log.note import Checkpoint, Note, cosign, parse_note, sign
from corral.log.proof import Proof, make_proof
from corral.log.tiles import Tiles
from tests.unit.logs import KEY, OTHER_KEY, WITNESS, checkpoint, copy_log, entry, make_log

SOURCES = Path("/usr/share/gocode")
"""Where Debian's golang-golang-x-mod-dev lies."""
SIZES = [1, 2, 100, 256, 300, 700]

Verify = Callable[..., str]
"""Returns what the verifier says; raises Refused with what it says."""


class Refused(Exception):
    """The verifier has refused what it was given."""


@pytest.fixture(scope="module")
def verify(tmp_path_factory: pytest.TempPathFactory) -> Verify:
    go = shutil.which("go")
    if go is None or not (SOURCES / "src/golang.org/x/mod/sumdb/tlog").is_dir():
        pytest.skip("golang-go and golang-golang-x-mod-dev (Debian) are missing: nobody else has verified our logs")
    place = tmp_path_factory.mktemp("go")
    environment = {
        "PATH": os.environ["PATH"],
        "HOME": str(place),
        "GOCACHE": str(place / "cache"),
        "GOPATH": str(SOURCES),
        "GO111MODULE": "off",
        "GOPROXY": "off",
        "GOTOOLCHAIN": "local",
        "CGO_ENABLED": "0",
    }
    program = place / "log_verifier"
    source = Path(__file__).parent / "data" / "log_verifier" / "main.go"
    subprocess.run([go, "build", "-o", program, source], check=True, env=environment, cwd=place)
    shutil.rmtree(place / "cache")

    def run(command: str, *args: object, key: object = KEY.verifier) -> str:
        done = subprocess.run([program, command, str(key), *map(str, args)], capture_output=True, text=True)
        if done.returncode:
            raise Refused(done.stderr)
        return done.stdout.strip()

    return run


@pytest.fixture(scope="module")
def logs(tmp_path_factory: pytest.TempPathFactory) -> dict[int, Path]:
    """The same log as it was when it had so many entries."""
    place = tmp_path_factory.mktemp("logs")
    return {size: make_log(place / str(size), *(each for each in SIZES if each <= size)) for size in SIZES}


@pytest.fixture
def directory(logs: dict[int, Path], tmp_path: Path) -> Path:
    return copy_log(logs[SIZES[-1]], tmp_path / "log")


def save(path: Path, content: bytes) -> Path:
    path.write_bytes(content)
    return path


def test_a_log_is_verified_whole(verify: Verify, logs: dict[int, Path]) -> None:
    for size, directory in logs.items():
        assert verify("log", directory) == f"{size} entries"


def test_a_log_of_three_levels_is_verified(verify: Verify, tmp_path: Path) -> None:
    directory = make_log(tmp_path / "log", (1 << 16) + 257)
    assert verify("log", directory) == f"{(1 << 16) + 257} entries"


def test_an_altered_log_is_refused(verify: Verify, directory: Path) -> None:
    for name, at in (
        ("checkpoint", 20),
        ("checkpoint", 30),
        ("checkpoint", 120),
        ("tile/entries/001", 700),
        ("tile/entries/002.p/188", 100),
        ("tile/0/001", 100),
        ("tile/0/002.p/188", 100),
        ("tile/1/000.p/2", 40),
    ):
        content = (directory / name).read_bytes()
        (directory / name).write_bytes(content[:at] + bytes([content[at] ^ 1]) + content[at + 1 :])
        with pytest.raises(Refused):
            verify("log", directory)
        (directory / name).write_bytes(content)
    assert verify("log", directory) == "700 entries"
    with pytest.raises(Refused, match="no verifiable signatures"):
        verify("log", directory, key=OTHER_KEY.verifier)


def test_a_cosigned_checkpoint_is_read(verify: Verify, directory: Path) -> None:
    note = parse_note(checkpoint(directory))
    cosigned = Note(note.text, (cosign(note.text, WITNESS), *note.signatures))
    save(directory / "checkpoint", cosigned.encode())
    assert verify("log", directory) == "700 entries"


def test_a_proof_of_a_record_is_verified_and_an_altered_one_is_refused(
    verify: Verify, logs: dict[int, Path], tmp_path: Path
) -> None:
    for size, index in ((1, 0), (2, 1), (100, 77), (256, 255), (300, 256), (700, 0), (700, 300), (700, 699)):
        proof = make_proof(logs[size], index)
        path = save(tmp_path / "proof", proof.encode())
        own = save(tmp_path / "entry", entry(index))
        assert verify("record", path, own) == f"entry {index} of {size}"
        save(tmp_path / "proof", Proof(index, proof.hashes, proof.checkpoint).encode())
        assert verify("record", path, own) == f"entry {index} of {size}"
    altered = [
        Proof(301, proof.hashes, proof.checkpoint),
        Proof(index, proof.hashes[1:], proof.checkpoint),
        Proof(index, (*proof.hashes[:-1], bytes(32)), proof.checkpoint),
        Proof(index, proof.hashes, parse_note(checkpoint(logs[300]))),
        Proof(index, proof.hashes, Note(proof.checkpoint.text.replace("700", "701"), proof.checkpoint.signatures)),
    ]
    text = Checkpoint(KEY.verifier.name, 700, bytes(32)).text()
    altered.append(Proof(index, proof.hashes, Note(text, (sign(text, KEY),))))
    for wrong in altered:
        save(path, wrong.encode())
        with pytest.raises(Refused):
            verify("record", path, own)
    save(path, proof.encode())
    with pytest.raises(Refused, match="invalid transparency proof"):
        verify("record", path, save(tmp_path / "other", b"never happened"))


def test_that_a_checkpoint_continues_another_is_verified_and_a_fork_is_refused(
    verify: Verify, logs: dict[int, Path], tmp_path: Path
) -> None:
    for old in SIZES:
        for new in (size for size in SIZES if size >= old):
            tiles = Tiles(logs[new])
            proof = consistency_proof(old, new, lambda level, number: tiles.subtree(new, level, number))  # noqa: B023
            lines = save(tmp_path / "proof", b"".join(base64.b64encode(each) + b"\n" for each in proof))
            one, other = logs[old] / "checkpoint", logs[new] / "checkpoint"
            assert verify("tree", one, other, lines) == f"{new} continues {old}"
            made = verify("prove", one, logs[new])
            assert made.split() == lines.read_text().split(), "Go makes the same proof of our tiles"
    entries = [entry(number) for number in range(300)]
    entries[50] = b"never happened"
    forked = make_log(tmp_path / "forked", 300, entries=entries)
    assert verify("log", forked) == "300 entries"
    with pytest.raises(Refused):
        verify("prove", forked / "checkpoint", logs[700])
    tiles = Tiles(logs[700])
    proof = consistency_proof(300, 700, lambda level, number: tiles.subtree(700, level, number))
    for wrong, one in ((proof, forked), (proof[1:], logs[300]), ([*proof, bytes(32)], logs[300]), ([], logs[300])):
        save(lines, b"".join(base64.b64encode(each) + b"\n" for each in wrong))
        with pytest.raises(Refused, match="invalid transparency proof"):
            verify("tree", one / "checkpoint", logs[700] / "checkpoint", lines)
