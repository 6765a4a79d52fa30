"""Payloads are what their digest says or nothing, say nothing once erased, and the log says who erased them."""

from __future__ import annotations

import json
import os
import struct
import threading
import time
import tracemalloc
from pathlib import Path

import pytest
import rfc8785
import zstandard
from hypothesis import given, settings
from hypothesis import strategies as st

from corral import diskspace
from corral.actions import Content, Origin
from corral.log.asciicast import Tape
from corral.log.events import PayloadErased, PayloadKept
from corral.log.gaps import Gaps
from corral.log.holdings import Holdings
from corral.log.ocsf import Context
from corral.log.payload_keys import PayloadError, encrypt, read_key
from corral.log.payloads import MAX_PAYLOAD, Payload, PayloadMissing, Payloads
from corral.log.places import erase_payloads, expired_payloads, open_log, open_payloads, payload_key_path, payloads_path
from corral.log.reader import Reader
from corral.log.records import decode
from corral.log.signing import read_keys
from corral.log.sink import SessionLog
from corral.log.verify import verify_log

KEY = bytes(range(32))
LATER = 4_000_000_000


def files(place: Path) -> list[Path]:
    return [path for path in place.rglob("*") if path.is_file()]


def store_of(place: Path, key: bytes | None) -> Payloads:
    path = place / "key"
    if key is not None:
        path.write_bytes(key)
        path.chmod(0o600)
    return Payloads(place / "store", path)


@pytest.fixture(params=[None, KEY], ids=["plain", "encrypted"])
def store(request: pytest.FixtureRequest, tmp_path: Path) -> Payloads:
    return store_of(tmp_path, request.param)


@settings(max_examples=40, deadline=None)
@given(data=st.binary(max_size=5000), key=st.sampled_from([None, KEY]), content=st.sampled_from(Content))
def test_what_was_kept_is_read(
    tmp_path_factory: pytest.TempPathFactory, data: bytes, key: bytes | None, content: Content
) -> None:
    store = store_of(tmp_path_factory.mktemp("store"), key)
    kept = store.keep(content, data, expires=LATER)
    assert kept == Payload(kept.digest, content, LATER, key is not None)
    assert store.read(kept.digest) == data
    assert store.check(kept.digest) == (kept, len(data))
    assert list(store.all()) == [kept]


def test_equal_contents_cannot_be_told_from_their_digests(store: Payloads) -> None:
    """Nor can one be guessed, once its salt is gone."""
    one, two = (store.keep(Content.TERMINAL, b"same", expires=LATER) for _ in range(2))
    assert one.digest != two.digest


def test_only_its_owner_can_read_it(store: Payloads) -> None:
    store.keep(Content.TERMINAL, b"secret", expires=LATER)
    for path in store.directory.rglob("*"):
        assert not path.stat().st_mode & 0o077
    assert not store.directory.stat().st_mode & 0o022


def test_an_encrypted_one_shows_nothing_of_its_content(tmp_path: Path) -> None:
    data = os.urandom(200)
    Payloads(tmp_path / "plain").keep(Content.TERMINAL, data, expires=LATER)
    store = store_of(tmp_path, KEY)
    kept = store.keep(Content.TERMINAL, data, expires=LATER)
    assert data in files(tmp_path / "plain")[0].read_bytes()
    assert data[:16] not in files(store.directory)[0].read_bytes()
    (tmp_path / "key").write_bytes(bytes(32))
    with pytest.raises(PayloadError, match="another key"):
        store.read(kept.digest)
    (tmp_path / "key").unlink()
    with pytest.raises(PayloadError, match="not here"):
        store.read(kept.digest)
    assert store.check(kept.digest) == (kept, None)  # that it is there is all that can be said without the key


def test_any_change_of_any_byte_is_told(store: Payloads) -> None:
    digest = store.keep(Content.TERMINAL, b"what it wrote", expires=LATER).digest
    (path,) = files(store.directory)
    whole = path.read_bytes()
    for place in range(len(whole)):
        path.write_bytes(whole[:place] + bytes([whole[place] ^ 1]) + whole[place + 1 :])
        with pytest.raises(PayloadError):
            store.read(digest)
    for length in range(len(whole)):
        path.write_bytes(whole[:length])
        with pytest.raises(PayloadError):
            store.read(digest)
    path.write_bytes(whole + b"x")
    with pytest.raises(PayloadError):
        store.read(digest)


def test_two_that_are_swapped_are_told(store: Payloads) -> None:
    one = store.keep(Content.TERMINAL, b"one", expires=LATER).digest
    two = store.keep(Content.TERMINAL, b"two", expires=LATER).digest
    names = [store.directory / each[12:14] / each[12:] for each in (one, two)]
    first, second = (name.read_bytes() for name in names)
    names[0].write_bytes(second)
    names[1].write_bytes(first)
    for digest in (one, two):
        with pytest.raises(PayloadError):
            store.read(digest)


def test_a_bomb_is_not_taken_apart(tmp_path: Path) -> None:
    store = Payloads(tmp_path)
    digest = store.keep(Content.TERMINAL, b"x", expires=LATER).digest
    (path,) = files(tmp_path)
    line, _, body = path.read_bytes().partition(b"\n")
    huge = zstandard.ZstdCompressor().compress(bytes(MAX_PAYLOAD + 1))
    path.write_bytes(line + b"\n" + body[:32] + huge)
    with pytest.raises(PayloadError, match="too long"):
        store.read(digest)
    silent = zstandard.ZstdCompressor(write_content_size=False).compress(bytes(MAX_PAYLOAD))
    path.write_bytes(line + b"\n" + body[:32] + silent)
    with pytest.raises(PayloadError):
        store.read(digest)
    # One that says that it holds little enough, and whose blocks of four bytes hold 128 KiB each: 5 GiB.
    blocks = (struct.pack("<I", 131_072 << 3 | 0b010)[:3] + b"x") * 40_000
    lying = bytes.fromhex("28b52ffd8068") + struct.pack("<I", MAX_PAYLOAD) + blocks
    path.write_bytes(line + b"\n" + body[:32] + lying)
    tracemalloc.start()
    with pytest.raises(PayloadError, match="altered"):
        store.read(digest)
    assert tracemalloc.get_traced_memory()[1] < 6 * MAX_PAYLOAD
    tracemalloc.stop()


@pytest.mark.parametrize(
    "digest", ["", "hmac-sha256:", "../../etc/passwd", "hmac-sha256:" + "0" * 63 + "/", "hmac-sha256:" + "A" * 64]
)
def test_what_is_no_digest_leads_nowhere(store: Payloads, digest: str) -> None:
    with pytest.raises(PayloadError, match="no digest"):
        store.read(digest)
    with pytest.raises(PayloadError, match="no digest"):
        store.erase(digest, lambda: None)


def test_a_link_in_its_place_is_not_followed(store: Payloads, tmp_path: Path) -> None:
    digest = store.keep(Content.TERMINAL, b"x", expires=LATER).digest
    (path,) = files(store.directory)
    path.rename(tmp_path / "elsewhere")
    path.symlink_to(tmp_path / "elsewhere")
    with pytest.raises(PayloadError, match="cannot read"):
        store.read(digest)


def test_too_much_and_a_full_disk_are_refused(store: Payloads, monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(PayloadError, match="more than"):
        store.keep(Content.TERMINAL, bytes(MAX_PAYLOAD + 1), expires=LATER)
    monkeypatch.setattr(diskspace, "KEEP_BYTES", 1 << 60)
    with pytest.raises(PayloadError, match="make room"):
        store.keep(Content.TERMINAL, b"x", expires=LATER)
    assert not list(store.all())


def test_nothing_is_erased_that_could_not_be_recorded(store: Payloads) -> None:
    digest = store.keep(Content.TERMINAL, b"x", expires=LATER).digest

    def fails() -> None:
        raise OSError

    with pytest.raises(OSError):
        store.erase(digest, fails)
    assert store.read(digest) == b"x"
    store.erase(digest, lambda: None)
    assert not files(store.directory)
    with pytest.raises(PayloadMissing):
        store.erase(digest, lambda: None)


def test_what_a_killed_writer_left_is_swept(store: Payloads) -> None:
    """It is content too, and nothing names it."""
    digest = store.keep(Content.TERMINAL, b"x", expires=LATER).digest
    (path,) = files(store.directory)
    left = path.with_name(f".{path.name}.4711")
    left.write_bytes(path.read_bytes())
    assert store.sweep() == 0  # somebody may be writing it
    assert store.sweep(time.time() + 3700) == 1
    assert files(store.directory) == [path]
    assert store.read(digest) == b"x"


def test_a_store_that_is_to_be_encrypted_takes_nothing_without_its_key(tmp_path: Path) -> None:
    key = tmp_path / "key"
    store = Payloads(tmp_path / "store", key)
    assert not store.keep(Content.TERMINAL, b"plain", expires=LATER).encrypted
    encrypt(store.directory, key)
    assert store.keep(Content.TERMINAL, b"secret", expires=LATER).encrypted  # who writes it has begun before
    key.unlink()
    with pytest.raises(PayloadError, match="its key is not here"):
        store.keep(Content.TERMINAL, b"more", expires=LATER)
    assert len(list(store.all())) == 2


def test_a_key_is_made_once_and_only_its_owner_can_use_it(tmp_path: Path) -> None:
    path = tmp_path / "key"
    assert read_key(path) is None
    encrypt(tmp_path / "store", path)
    assert len(read_key(path) or b"") == 32
    with pytest.raises(PayloadError, match="encrypted already"):
        encrypt(tmp_path / "store", path)
    # What was cut short before the store was marked is done again, with the key that there is.
    (tmp_path / "store" / "encrypted").unlink()
    key = read_key(path)
    encrypt(tmp_path / "store", path)
    assert read_key(path) == key
    path.chmod(0o640)
    with pytest.raises(PayloadError, match="others can read"):
        read_key(path)
    path.chmod(0o600)
    path.write_bytes(b"short")
    with pytest.raises(PayloadError, match="no key"):
        read_key(path)
    assert sorted(each.name for each in tmp_path.iterdir()) == ["key", "store"]


# ---- with a log ----


def record_of(kept: Payload, size: int) -> PayloadKept:
    return PayloadKept(Origin("s", "s"), kept.content, kept.digest, size, True, "sh", kept.expires, kept.encrypted)


@pytest.fixture
def place(tmp_path: Path) -> Path:
    """A log of one session that has kept two contents."""
    place = tmp_path / "log"
    with open_log(place) as log:
        session = SessionLog(log, Context("a", "1", "a", "sha256:0", "s", "s", "1"))
        store = open_payloads(place)
        for data in (b"first", b"second"):
            session.record(record_of(store.keep(Content.TERMINAL, data, expires=LATER), len(data)))
    return place


def kept(place: Path) -> list[str]:
    events = [decode(entry).event for _, entry in Reader(place).entries()]
    return [event.digest for event in events if isinstance(event, PayloadKept)]


def faults(place: Path) -> list[tuple[int, str]]:
    look = Holdings(Gaps())
    assert verify_log(place, read_keys(place), look=look).faults == []
    return list(look.faults(open_payloads(place)))


def test_a_log_verifies_after_content_was_erased_and_says_by_whom(place: Path) -> None:
    first, second = kept(place)
    assert faults(place) == []
    erase_payloads(place, [PayloadErased(first, "anna", "a person asked for it")])
    assert faults(place) == []
    event = decode(list(Reader(place).entries())[-1][1]).event
    assert event == PayloadErased(first, "anna", "a person asked for it")
    assert open_payloads(place).read(second) == b"second"
    assert not any(b"first" in path.read_bytes() for path in files(place.parent))


def test_content_that_is_gone_swapped_or_there_again_is_told_with_its_record(place: Path) -> None:
    first, second = kept(place)
    store = payloads_path(place)
    paths = [store / each[12:14] / each[12:] for each in (first, second)]
    contents = [path.read_bytes() for path in paths]
    paths[0].unlink()
    assert faults(place) == [(0, f"the content {first} is missing, and nobody has erased it")]
    paths[0].write_bytes(contents[1])
    ((number, what),) = faults(place)
    assert number == 0 and "another" in what
    paths[0].write_bytes(contents[0])
    erase_payloads(place, [PayloadErased(second, "anna", "why")])
    paths[1].write_bytes(contents[1])
    ((number, what),) = faults(place)
    assert number == 1 and "although it was erased" in what
    erase_payloads(place, [PayloadErased(second, "anna", "why")])
    assert faults(place) == []


def test_a_store_that_has_a_key_is_encrypted(place: Path) -> None:
    encrypt(payloads_path(place), payload_key_path(place))
    store = open_payloads(place)
    digest = store.keep(Content.TERMINAL, b"third", expires=LATER).digest
    assert [store.read(each) for each in (*kept(place), digest)] == [b"first", b"second", b"third"]
    assert faults(place) == []


def rewritten(path: Path, **changed: object) -> None:
    """Has a payload say something else of itself."""
    line, _, body = path.read_bytes().partition(b"\n")
    path.write_bytes(rfc8785.dumps(json.loads(line) | changed) + b"\n" + body)


@pytest.mark.parametrize("changed", [{"encrypted": True}, {"expires": 1}, {"content": "diff"}])
def test_what_a_payload_says_of_itself_is_compared_with_its_record(place: Path, changed: dict[str, object]) -> None:
    """Also without a key, where what says that it is encrypted is not read."""
    first, second = kept(place)
    path = payloads_path(place) / first[12:14] / first[12:]
    rewritten(path, **changed)
    ((number, what),) = faults(place)
    assert number == 0 and ("not what its record says" in what or "another" in what)
    # Nor can it be had erased by that.
    assert expired_payloads(place, time.time()) == []
    assert expired_payloads(place, LATER) == sorted([first, second])


def test_what_could_not_be_read_is_counted(place: Path) -> None:
    encrypt(payloads_path(place), payload_key_path(place))
    with open_log(place) as log:
        session = SessionLog(log, Context("a", "1", "a", "sha256:0", "s", "s", "1"))
        session.record(record_of(open_payloads(place).keep(Content.DIFF, b"third", expires=LATER), 5))
    look = Holdings()
    assert verify_log(place, read_keys(place), look=look).valid
    assert (list(look.faults(open_payloads(place))), look.unread) == ([], 0)
    payload_key_path(place).unlink()
    assert (list(look.faults(open_payloads(place))), look.unread) == ([], 1)


def test_content_whose_keeper_was_killed_before_it_was_recorded_expires_too(place: Path) -> None:
    store = open_payloads(place)
    old = store.keep(Content.TERMINAL, b"old", expires=1000)
    store.keep(Content.TERMINAL, b"new", expires=LATER)
    assert expired_payloads(place, 999) == []
    assert expired_payloads(place, 1000) == [old.digest]
    erase_payloads(place, [PayloadErased(old.digest, "anna", "old")] * 2)
    assert len(list(store.all())) == 3


def test_a_crash_while_it_is_kept_leaves_no_part_of_it(store: Payloads, monkeypatch: pytest.MonkeyPatch) -> None:
    def fails(*_: object) -> None:
        raise OSError(5, "Input/output error")

    with monkeypatch.context() as patch:
        patch.setattr(os, "fdatasync", fails)
        with pytest.raises(PayloadError, match="Input/output error"):
            store.keep(Content.TERMINAL, b"x", expires=LATER)
    assert not files(store.directory)


# ---- what commands write ----


def played(data: bytes) -> tuple[dict[str, object], list[list[object]]]:
    header, *lines = [json.loads(line) for line in data.splitlines()]
    return header, lines


@settings(max_examples=100, deadline=None)
@given(pieces=st.lists(st.binary(max_size=50), max_size=20), limit=st.integers(200, 2000))
def test_a_tape_is_an_asciicast_within_its_limit(pieces: list[bytes], limit: int) -> None:
    done: list[tuple[bytes, bool]] = []
    tape = Tape("title\x1b", limit, lambda data, whole: done.append((data, whole)), size=(50, 132))
    for piece in pieces:
        tape.write(piece)
    tape.close()
    tape.close()
    tape.write(b"late")
    if not any(pieces):
        assert not done
        return
    ((data, whole),) = done
    assert len(data) <= limit
    header, lines = played(data)
    assert (header["version"], header["width"], header["height"]) == (2, 132, 50)
    text = "".join(str(line[2]) for line in lines)
    said = b"".join(pieces).decode("utf-8", "replace")
    assert text == said if whole else said.startswith(text)
    assert all(line[1] == "o" for line in lines)
    moments = [float(str(line[0])) for line in lines]
    assert moments == sorted(moments)


def test_streams_do_not_tear_each_others_characters() -> None:
    done: list[bytes] = []
    tape = Tape("", 10_000, lambda data, whole: done.append(data))
    for stream, piece in (("stdout", b"\xc3"), ("stderr", b"\xe2\x82"), ("stdout", b"\xa4"), ("stderr", b"\xac")):
        tape.write(piece, stream)
    tape.close()
    assert [line[2] for line in played(done[0])[1]] == ["ä", "€"]


def test_a_tape_may_be_written_by_several_threads() -> None:
    done: list[bytes] = []
    tape = Tape("", 1 << 20, lambda data, whole: done.append(data))

    def write() -> None:
        for _ in range(200):
            tape.write(b"x" * 10)

    threads = [threading.Thread(target=write) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    tape.close()
    assert sum(len(str(line[2])) for line in played(done[0])[1]) == 8000


def test_a_long_title_leaves_room_for_what_was_written() -> None:
    done: list[tuple[bytes, bool]] = []
    tape = Tape("\U0001f600" * 200, 1024, lambda data, whole: done.append((data, whole)))
    tape.write(b"said")
    tape.close()
    ((data, whole),) = done
    assert len(data) <= 1024 and whole
    assert played(data)[1][0][2] == "said"
