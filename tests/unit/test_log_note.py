"""Notes, keys and checkpoints are read strictly, written as others read them, and believed when they are signed."""

from __future__ import annotations

import base64
import os
from contextlib import suppress
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from corral.log.note import (
    MAX_NOTE,
    MAX_SIGNATURES,
    MAX_SIZE,
    Checkpoint,
    KeyFile,
    KeyType,
    Note,
    NoteError,
    Signature,
    Verifier,
    cosign,
    cosigners,
    open_checkpoint,
    parse_checkpoint,
    parse_note,
    parse_number,
    parse_verifier,
    sign,
)
from tests.unit.logs import KEY, OTHER_KEY, WITNESS

# Of the examples of Go's golang.org/x/mod/sumdb/note.
GO_PRIVATE = "PRIVATE+KEY+PeterNeumann+c74f20a3+AYEKFALVFGyNhPJEMzD1QIDr+Y7hfZx09iUvxdXHKDFz"
GO_PUBLIC = "PeterNeumann+c74f20a3+ARpc2QcUPDhMQegwxbzhKqiBfsVkmqq/LDE4izWy10TW"
GO_TEXT = "If you think cryptography is the answer to your problem,\nthen you don't know what your problem is.\n"
GO_NOTE = (
    f"{GO_TEXT}\n\u2014 PeterNeumann"
    " x08go/ZJkuBS9UG/SffcvIAQxVBtiFupLLr8pAcElZInNIuGUgYN1FFYC2pZSNXgKvqfqdngotpRZb6KE6RyyBwJnAM=\n"
)

# Of C2SP signed-note, whose text has an empty line, and of tlog-cosignature.
C2SP_NOTE = (
    "Ognuno sta solo sul cuor della terra\ntrafitto da un raggio di sole:\n\ned è subito sera.\n\n"
    "\u2014 quasimodo.example/salvatore"
    " NnugSzTjtVAewIS+Z/iJhUPeFDkO/5QQ2i5ddnGITLlC+EhfLW9oJKONrMouFSQU0xMcXxj99ihAQwaqP3ZekRwNtIc=\n"
)
C2SP_CHECKPOINT = (
    "example.com/behind-the-sofa\n20852163\nCsUYapGGPo4dkMgIAUqom/Xajj7h2fB2MPA3j2jxq2I=\n\n"
    "\u2014 example.com/behind-the-sofa"
    " Az3grlgtzPICa5OS8npVmf1Myq/5IZniMp+ZJurmRDeOoRDe4URYN7u5/Zhcyv2q1gGzGku9nTo+zyWE+xeMcTOAYQ8=\n"
    "\u2014 witness.example.com/w1"
    " jWbPPwAAAABkGFDLEZMHwSRaJNiIDoe9DYn/zXcrtPHeolMI5OWXEhZCB9dlrDJsX3b2oyin1nPZqhf5nNo0xUe+mbIUBkBIfZ+qnA==\n"
)

NAMES = st.text(st.characters(exclude_characters="+", exclude_categories=["C", "Z"]), min_size=1, max_size=30)
LINES = st.text(st.characters(exclude_categories=["C"]), max_size=30)


def signed(text: str, *signers: KeyFile) -> bytes:
    return Note(text, tuple(sign(text, each) for each in signers)).encode()


def key_file(path: Path, content: str | bytes, mode: int = 0o600) -> Path:
    path.write_bytes(content.encode() if isinstance(content, str) else content)
    path.chmod(mode)
    return path


# ---- vectors ----


def test_a_note_of_go_is_read_and_made_byte_by_byte(tmp_path: Path) -> None:
    key = KeyFile.read(key_file(tmp_path / "key", GO_PRIVATE + "\n"))
    assert str(key.verifier) == GO_PUBLIC
    assert key.verifier == parse_verifier(GO_PUBLIC)
    note = parse_note(GO_NOTE.encode())
    assert note.text == GO_TEXT
    assert parse_verifier(GO_PUBLIC).signed(note)
    assert signed(GO_TEXT, key) == GO_NOTE.encode()


def test_the_examples_of_the_specifications_are_read_and_written_again() -> None:
    note = parse_note(C2SP_NOTE.encode())
    assert note.text.endswith("sole:\n\ned è subito sera.\n")
    assert note.signatures[0].identifier.hex() == "367ba04b"
    assert note.encode() == C2SP_NOTE.encode()
    note = parse_note(C2SP_CHECKPOINT.encode())
    assert parse_checkpoint(note.text).size == 20852163
    assert [each.name for each in note.signatures] == ["example.com/behind-the-sofa", "witness.example.com/w1"]
    assert int.from_bytes(note.signatures[1].content[:8], "big") == 1679315147
    assert note.encode() == C2SP_CHECKPOINT.encode()


# ---- notes ----


@given(
    st.lists(LINES, min_size=1, max_size=5), st.lists(st.tuples(NAMES, st.binary(min_size=5)), min_size=1, max_size=4)
)
def test_a_note_is_read_as_it_was_written(lines: list[str], signatures: list[tuple[str, bytes]]) -> None:
    note = Note(
        "".join(f"{line}\n" for line in lines),
        tuple(Signature(name, content[:4], content[4:]) for name, content in signatures),
    )
    assert parse_note(note.encode()) == note


@given(st.binary(max_size=300) | st.text(max_size=300).map(str.encode))
def test_any_bytes_are_a_note_or_refused(encoded: bytes) -> None:
    try:
        note = parse_note(encoded)
    except NoteError:
        return
    assert note.encode() == encoded


@given(st.data())
def test_a_note_with_any_byte_changed_is_not_believed(data: st.DataObject) -> None:
    encoded = bytearray(signed(Checkpoint(KEY.verifier.name, 5, bytes(32)).text(), KEY))
    at = data.draw(st.integers(0, len(encoded) - 1))
    encoded[at] ^= 1 << data.draw(st.integers(0, 7))
    with pytest.raises(NoteError):
        open_checkpoint(bytes(encoded), KEY.verifier)


@given(st.integers(0, 200))
def test_a_note_that_is_cut_off_anywhere_is_not_believed(at: int) -> None:
    encoded = signed(Checkpoint(KEY.verifier.name, 5, bytes(32)).text(), KEY)
    with pytest.raises(NoteError):
        open_checkpoint(encoded[: at % len(encoded)], KEY.verifier)


ENOUGH = "\u2014 a " + base64.b64encode(bytes(5)).decode() + "\n"


@pytest.mark.parametrize(
    ("encoded", "reason"),
    [
        (b"", "no signatures"),
        (b"text\n", "no signatures"),
        (b"text\n\n", "no signatures"),
        (f"text\n{ENOUGH}".encode(), "no signatures"),
        (f"text\n\n{ENOUGH.rstrip()}".encode(), "cut off"),
        (b"text\xff\n\n" + ENOUGH.encode(), "UTF-8"),
        (b"text\xed\xa0\x80\n\n" + ENOUGH.encode(), "UTF-8"),
        (b"te\0xt\n\n" + ENOUGH.encode(), "control characters"),
        (b"text\r\n\r\n" + ENOUGH.encode(), "control characters"),
        (b"te\x1b[31mxt\n\n" + ENOUGH.encode(), "control characters"),
        (b"te\x7fxt\n\n" + ENOUGH.encode(), "control characters"),
        (f"text\n\n{ENOUGH}- a AAAAAAA=\n".encode(), "base64"),
        (f"text\n\n{ENOUGH}words\n".encode(), "no signature"),
        (b"text\n\n\xe2\x80\x94 a AAAA\n", "no signature"),
        (b"text\n\n\xe2\x80\x94 a\n", "no signature"),
        (b"text\n\n\xe2\x80\x94 a AAAAAAA\n", "base64"),
        (b"text\n\n\xe2\x80\x94 a AAAAAAB=\n", "one form"),
        (b"text\n\n\xe2\x80\x94 a  AAAAAAA=\n", "base64"),
        (b"text\n\n\xe2\x80\x94  AAAAAAA=\n", "name"),
        (b"text\n\n\xe2\x80\x94 a+b AAAAAAA=\n", "name"),
        ("text\n\n\u2014 a\u00a0b AAAAAAA=\n".encode(), "name"),
        (f"text\n\n{ENOUGH * (MAX_SIGNATURES + 1)}".encode(), "too many"),
        (b"x" * MAX_NOTE + b"\n\n" + ENOUGH.encode(), "too long"),
    ],
)
def test_what_is_no_note_is_refused(encoded: bytes, reason: str) -> None:
    with pytest.raises(NoteError, match=reason):
        parse_note(encoded)


# ---- whose signatures count ----


def test_signatures_of_unknown_keys_are_passed_over_and_wrong_ones_of_known_keys_are_not() -> None:
    text = Checkpoint(KEY.verifier.name, 5, bytes(32)).text()
    good, other = sign(text, KEY), sign(text, OTHER_KEY)
    checkpoint, _ = open_checkpoint(Note(text, (other, good)).encode(), KEY.verifier)
    assert checkpoint.size == 5
    with pytest.raises(NoteError, match="not signed by"):
        open_checkpoint(Note(text, (other,)).encode(), KEY.verifier)
    wrong = Signature(good.name, good.identifier, bytes(64))
    for signatures in ((wrong,), (wrong, good), (good, wrong)):
        with pytest.raises(NoteError, match="not valid"):
            open_checkpoint(Note(text, signatures).encode(), KEY.verifier)
    # The identifier is that of the key, the name another: not this key.
    renamed = Signature("example.org/other", good.identifier, good.content)
    with pytest.raises(NoteError, match="not signed by"):
        open_checkpoint(Note(text, (renamed,)).encode(), KEY.verifier)
    for length in (0, 1, 63, 65):
        with pytest.raises(NoteError, match="not valid"):
            KEY.verifier.signed(Note(text, (Signature(good.name, good.identifier, good.content.ljust(65)[:length]),)))


def test_a_checkpoint_of_another_log_is_refused_though_it_is_signed() -> None:
    with pytest.raises(NoteError, match="another log"):
        open_checkpoint(signed(Checkpoint("example.org/other", 5, bytes(32)).text(), KEY), KEY.verifier)


def test_a_cosignature_is_over_its_time_and_the_text() -> None:
    text = Checkpoint(KEY.verifier.name, 5, bytes(32)).text()
    made = cosign(text, WITNESS, at=1679315147)
    note = Note(text, (sign(text, KEY), made))
    assert WITNESS.verifier.cosigned_at(parse_note(note.encode())) == 1679315147
    assert cosigners(note, [WITNESS.verifier]) == (WITNESS.verifier,)
    assert cosigners(Note(text, (sign(text, KEY),)), [WITNESS.verifier]) == ()
    later = Signature(made.name, made.identifier, (1679315148).to_bytes(8, "big") + made.content[8:])
    for wrong in (later, Signature(made.name, made.identifier, made.content[:7])):
        with pytest.raises(NoteError, match="not valid"):
            cosigners(Note(text, (wrong,)), [WITNESS.verifier])
    with pytest.raises(NoteError, match="no time"):
        cosigners(Note(text, (cosign(text, WITNESS, at=2**63),)), [WITNESS.verifier])
    assert KEY.verifier.cosigned_at(note) is None


def test_a_key_signs_only_as_its_type_says() -> None:
    """The same Ed25519 key of both types has two identifiers, and neither signature counts as the other."""
    text = Checkpoint(WITNESS.verifier.name, 5, bytes(32)).text()
    with pytest.raises(NoteError, match="type"):
        sign(text, WITNESS)
    with pytest.raises(NoteError, match="type"):
        cosign(text, KEY)
    with pytest.raises(NoteError, match="type"):
        open_checkpoint(Note(text, (cosign(text, WITNESS),)).encode(), WITNESS.verifier)
    same = KeyFile(WITNESS.verifier.name, KeyType.ED25519, bytes(range(1, 33)))
    assert same.verifier.identifier != WITNESS.verifier.identifier
    assert cosigners(Note(text, (sign(text, same),)), [WITNESS.verifier, same.verifier]) == ()


# ---- checkpoints ----


@given(NAMES, st.integers(0, MAX_SIZE), st.binary(min_size=32, max_size=32), st.lists(LINES.filter(bool), max_size=2))
def test_a_checkpoint_is_read_as_it_was_written(origin: str, size: int, root: bytes, more: list[str]) -> None:
    checkpoint = Checkpoint(origin, size, root)
    assert parse_checkpoint(checkpoint.text()) == checkpoint
    assert parse_checkpoint(checkpoint.text() + "".join(f"{line}\n" for line in more)) == checkpoint


ROOT = base64.b64encode(bytes(32)).decode()


@pytest.mark.parametrize(
    "text",
    [
        "",
        "\n",
        "o\n1\n",
        f"o\n1\n{ROOT}",
        f"\n1\n{ROOT}\n",
        f"o\n\n{ROOT}\n",
        f"o\n1\n{ROOT}\n\n",
        f"o\n1\n\n{ROOT}\n",
        f"o\n1\n{ROOT[:-1]}\n",
        f"o\n1\n{base64.b64encode(bytes(31)).decode()}\n",
        f"o\n1\n{base64.b64encode(bytes(33)).decode()}\n",
        f"o\n01\n{ROOT}\n",
        f"o\n-1\n{ROOT}\n",
        f"o\n+1\n{ROOT}\n",
        f"o\n 1\n{ROOT}\n",
        f"o\n1_0\n{ROOT}\n",
        f"o\n\u0661\n{ROOT}\n",
        f"o\n\u00b2\n{ROOT}\n",
        f"o\n{2**63}\n{ROOT}\n",
        f"o\n{'9' * 5000}\n{ROOT}\n",
    ],
)
def test_what_is_no_checkpoint_is_refused(text: str) -> None:
    with pytest.raises(NoteError):
        parse_checkpoint(text)


@given(st.text(max_size=25))
def test_a_number_has_one_form(text: str) -> None:
    try:
        number = parse_number(text, "it")
    except NoteError:
        return
    assert str(number) == text


# ---- keys ----


@given(NAMES, st.sampled_from(KeyType), st.binary(min_size=32, max_size=32))
def test_a_verifier_key_is_read_as_it_was_written(name: str, type: KeyType, seed: bytes) -> None:
    verifier = KeyFile(name, type, seed).verifier
    assert parse_verifier(str(verifier)) == verifier


@given(st.data())
def test_a_verifier_key_with_any_character_changed_is_refused_or_is_the_same(data: st.DataObject) -> None:
    text = str(KEY.verifier)
    at = data.draw(st.integers(0, len(text) - 1))
    changed = text[:at] + data.draw(st.characters(codec="utf-8")) + text[at + 1 :]
    with suppress(NoteError):
        assert parse_verifier(changed) == KEY.verifier


@pytest.mark.parametrize(
    ("text", "reason"),
    [
        ("", "no key"),
        ("name", "no key"),
        ("name+c74f20a3", "no key"),
        ("+c74f20a3+ARpc2QcUPDhMQegwxbzhKqiBfsVkmqq/LDE4izWy10TW", "name"),
        (GO_PUBLIC.replace("c74f20a3", "c74f20a"), "no key"),
        (GO_PUBLIC.replace("c74f20a3", "c74f20ag"), "hexadecimal"),
        (GO_PUBLIC.replace("c74f20a3", "c74f20a4"), "altered"),
        (GO_PUBLIC.replace("c74f20a3", "c7 4f 20"), "altered"),
        (GO_PUBLIC.replace("Peter", "Petra"), "altered"),
        (GO_PUBLIC.replace("Peter", "Peter "), "name"),
        (GO_PUBLIC[:-4], "type"),
        (GO_PUBLIC[:-1], "base64"),
        (GO_PUBLIC.replace("+AR", "+Ah"), "type"),
        (f"{'n' * 256}{GO_PUBLIC.removeprefix('PeterNeumann')}", "name"),
    ],
)
def test_what_is_no_verifier_key_is_refused(text: str, reason: str) -> None:
    with pytest.raises(NoteError, match=reason):
        parse_verifier(text)


def test_a_key_that_was_made_is_read_again_and_never_replaced(tmp_path: Path) -> None:
    made = KeyFile.make(tmp_path / "key", "example.org/log")
    assert (tmp_path / "key").stat().st_mode & 0o777 == 0o600
    assert KeyFile.read(tmp_path / "key").verifier == made.verifier
    with pytest.raises(NoteError, match="exists"):
        KeyFile.make(tmp_path / "key", "example.org/log")
    with pytest.raises(NoteError, match="cannot make"):
        KeyFile.make(tmp_path / "nowhere" / "key", "example.org/log")
    with pytest.raises(NoteError, match="name"):
        KeyFile.make(tmp_path / "second", "two words")
    assert not (tmp_path / "second").exists()
    witness = KeyFile.make(tmp_path / "witness", "example.org/witness", KeyType.COSIGNATURE)
    assert KeyFile.read(tmp_path / "witness").verifier == witness.verifier


@pytest.mark.parametrize("mode", [0o640, 0o604, 0o660, 0o622, 0o601, 0o777])
def test_a_key_that_others_can_read_is_refused(tmp_path: Path, mode: int) -> None:
    with pytest.raises(NoteError, match="others can read this key"):
        KeyFile.read(key_file(tmp_path / "key", GO_PRIVATE, mode))


def test_a_key_of_somebody_else_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = key_file(tmp_path / "key", GO_PRIVATE)
    own = os.geteuid()
    monkeypatch.setattr(os, "geteuid", lambda: own + 1)
    with pytest.raises(NoteError, match="or own it"):
        KeyFile.read(path)


@pytest.mark.parametrize(
    "content",
    [
        b"",
        b"\xff\xfe",
        GO_PUBLIC,
        GO_PRIVATE.replace("PRIVATE", "PUBLIC"),
        GO_PRIVATE.replace("c74f20a3", "c74f20a4"),
        GO_PRIVATE.replace("Peter", "Petra"),
        GO_PRIVATE[:-4],
        GO_PRIVATE + "AAAA",
        GO_PRIVATE + "\n" + GO_PRIVATE,
        "-----BEGIN OPENSSH PRIVATE KEY-----\nAAAA\n",
    ],
)
def test_what_is_no_key_is_refused_and_not_told(tmp_path: Path, content: str | bytes) -> None:
    with pytest.raises(NoteError) as caught:
        KeyFile.read(key_file(tmp_path / "key", content))
    assert "AYEKFALVFGy" not in str(caught.value)


def test_a_key_that_cannot_be_read_is_refused(tmp_path: Path) -> None:
    with pytest.raises(NoteError, match="No such file"):
        KeyFile.read(tmp_path / "none")
    (tmp_path / "link").symlink_to(key_file(tmp_path / "key", GO_PRIVATE))
    with pytest.raises(NoteError, match="symbolic links"):
        KeyFile.read(tmp_path / "link")
    with pytest.raises(NoteError, match="cannot read"):
        KeyFile.read(tmp_path)


def test_a_verifier_holds_no_secret() -> None:
    seed = base64.b64encode(bytes([KeyType.ED25519]) + bytes(range(32))).decode()
    assert isinstance(KEY.verifier, Verifier)
    assert seed not in f"{KEY.verifier} {KEY.verifier!r} {KEY!r}"
