"""A witness cosigns what continues what it saw, remembers that first, and nothing else; a log can tell who did."""

from __future__ import annotations

import base64
import os
import socket
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from corral.errors import RequestError
from corral.log import cosigning, witness_server
from corral.log.cosigning import WitnessAddress, cosign_log, parse_address, require_cosigned
from corral.log.merkle import consistency_proof
from corral.log.note import (
    Checkpoint,
    KeyFile,
    KeyType,
    Note,
    NoteError,
    parse_note,
    parse_signatures,
    sign,
)
from corral.log.signing import CHECKPOINT, read_checkpoint
from corral.log.tiles import Tiles
from corral.log.verify import verify_log
from corral.log.witness import MAX_REQUEST, Answer, Witness, encode_request
from corral.log.witness_server import WitnessServer
from corral.log.writer import Log

LOG = KeyFile("log.example/one", KeyType.ED25519, b"l" * 32)
OTHER = KeyFile("log.example/other", KeyType.ED25519, b"o" * 32)
KEY = KeyFile("witness.example/one", KeyType.COSIGNATURE, b"w" * 32)
SECOND = KeyFile("witness.example/two", KeyType.COSIGNATURE, b"v" * 32)


@pytest.fixture
def witness(tmp_path: Path) -> Witness:
    return Witness(tmp_path / "witness", KEY, {LOG.verifier.name: (LOG.verifier,)})


def grown(place: Path, size: int, *, word: str = "entry") -> bytes:
    """The checkpoint of a log that has grown to so many entries."""
    with Log(place, LOG) as log:
        at = log.seal().size
        for number in range(at, size):
            log.submit(f"{word} {number}".encode())
    return (place / CHECKPOINT).read_bytes()


def ask(witness: Witness, place: Path, old: int, note: bytes) -> Answer:
    size = int(note.split(b"\n")[1])
    tiles = Tiles(place)
    proof = (
        consistency_proof(old, size, lambda level, number: tiles.subtree(size, level, number)) if old <= size else ()
    )
    return witness.add_checkpoint(encode_request(old, tuple(proof), note))


def is_cosigned(answer: Answer, note: bytes) -> bool:
    (signature,) = parse_signatures(answer.content)
    return KEY.verifier.signed(Note(parse_note(note).text, (signature,)))


# ---- what it decides ----


def test_a_log_that_grows_is_cosigned(witness: Witness, tmp_path: Path) -> None:
    old = 0
    for size in (3, 3, 255, 256, 700):
        note = grown(tmp_path / "log", size)
        answer = ask(witness, tmp_path / "log", old, note)
        assert answer.status == 200
        assert is_cosigned(answer, note)
        old = size
    assert list(witness.evidence()) == []


def test_it_remembers_when_it_is_started_again(witness: Witness, tmp_path: Path) -> None:
    note = grown(tmp_path / "log", 5)
    assert ask(witness, tmp_path / "log", 0, note).status == 200
    again = Witness(tmp_path / "witness", KEY, {LOG.verifier.name: (LOG.verifier,)})
    answer = ask(again, tmp_path / "log", 0, note)
    assert (answer.status, answer.content, answer.content_type) == (409, "5\n", "text/x.tlog.size")
    assert ask(again, tmp_path / "log", 5, note).status == 200


def test_a_split_view_is_refused_and_kept(witness: Witness, tmp_path: Path) -> None:
    note = grown(tmp_path / "log", 5)
    assert ask(witness, tmp_path / "log", 0, note).status == 200
    same_size = grown(tmp_path / "second", 5, word="another")
    assert ask(witness, tmp_path / "second", 5, same_size).status == 409
    longer = grown(tmp_path / "second", 9, word="another")
    assert ask(witness, tmp_path / "second", 5, longer).status == 422
    assert sorted(new for _, new in witness.evidence()) == sorted((same_size, longer))
    assert {old for old, _ in witness.evidence()} == {note}
    assert ask(witness, tmp_path / "log", 5, note).status == 200


def test_a_rollback_is_refused(witness: Witness, tmp_path: Path) -> None:
    before = grown(tmp_path / "log", 5)
    after = grown(tmp_path / "log", 9)
    assert ask(witness, tmp_path / "log", 0, after).status == 200
    assert ask(witness, tmp_path / "log", 9, before).status == 400
    answer = ask(witness, tmp_path / "log", 5, before)
    assert (answer.status, answer.content) == (409, "9\n")


def test_two_requests_at_once_for_one_old_size_do_not_both_count(witness: Witness, tmp_path: Path) -> None:
    place = tmp_path / "log"
    notes = {size: grown(place, size) for size in (4, 6, 8, 10)}
    assert ask(witness, place, 0, notes[4]).status == 200
    answers: list[int] = []
    threads = [
        threading.Thread(target=lambda size=size: answers.append(ask(witness, place, 4, notes[size]).status))
        for size in (6, 8, 10)
    ]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert sorted(answers) == [200, 409, 409]


def test_what_it_remembers_is_there_before_it_answers(
    witness: Witness, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    note = grown(tmp_path / "log", 3)

    def full(*_: object, **__: object) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("corral.log.witness.write_file", full)
    assert ask(witness, tmp_path / "log", 0, note).status == 500
    monkeypatch.undo()
    assert ask(witness, tmp_path / "log", 0, note).status == 200


def test_a_memory_that_was_cut_off_anywhere_cosigns_nothing(witness: Witness, tmp_path: Path) -> None:
    note = grown(tmp_path / "log", 3)
    assert ask(witness, tmp_path / "log", 0, note).status == 200
    (memory,) = (path for path in (tmp_path / "witness").iterdir() if len(path.name) == 64)
    whole = memory.read_bytes()
    for length in range(len(whole)):
        memory.write_bytes(whole[:length])
        for old in (0, 3):
            answer = ask(witness, tmp_path / "log", old, note)
            assert answer.status == 500
            assert "damaged" in answer.content
    memory.write_bytes(whole)
    assert ask(witness, tmp_path / "log", 3, note).status == 200


def test_what_it_does_not_know_it_does_not_cosign(witness: Witness, tmp_path: Path) -> None:
    text = Checkpoint(OTHER.verifier.name, 0, b"x" * 32).text()
    unknown = Note(text, (sign(text, OTHER),)).encode()
    assert witness.add_checkpoint(encode_request(0, (), unknown)).status == 404
    text = Checkpoint(LOG.verifier.name, 4, b"x" * 32).text()
    forged = Note(text, (sign(text, KeyFile(LOG.verifier.name, KeyType.ED25519, b"f" * 32)),)).encode()
    assert witness.add_checkpoint(encode_request(0, (), forged)).status == 403
    good = grown(tmp_path / "log", 4)
    assert witness.add_checkpoint(encode_request(5, (), good)).status == 400
    assert witness.add_checkpoint(encode_request(0, (b"x" * 32,), good)).status == 422
    assert list(witness.evidence()) == []


@settings(max_examples=100)
@given(st.binary(max_size=300) | st.text(max_size=300).map(str.encode))
def test_what_is_no_request_is_refused(body: bytes) -> None:
    made = Witness.__new__(Witness)
    made._logs = {}
    assert made.add_checkpoint(body).status in (400, 404)
    assert made.add_checkpoint(b"old 0\n\n" + body).status in (400, 404)


def test_requests_are_bounded(witness: Witness, tmp_path: Path) -> None:
    note = grown(tmp_path / "log", 4)
    assert witness.add_checkpoint(encode_request(0, (b"x" * 32,) * 64, note)).status == 400
    assert witness.add_checkpoint(b"old 0\n\n" + b"x" * MAX_REQUEST).status == 400


def test_a_key_that_signs_for_a_log_is_no_witness(tmp_path: Path) -> None:
    with pytest.raises(NoteError, match="no key of a witness"):
        Witness(tmp_path, LOG, {})
    same = KeyFile("log.example/one", KeyType.ED25519, b"w" * 32)
    with pytest.raises(NoteError, match="proves nothing"):
        Witness(tmp_path, KEY, {"log.example/one": (same.verifier,)})


# ---- over HTTP ----


@contextmanager
def serving(witness: Witness, address: str = "127.0.0.1") -> Iterator[str]:
    server = WitnessServer(witness, address, 0)
    thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.01})
    thread.start()
    try:
        host = f"[{address}]" if ":" in address else address
        yield f"http://{host}:{server.server_address[1]}"
    finally:
        server.shutdown()
        thread.join()
        server.server_close()


@contextmanager
def answering(answer: Callable[[socket.socket], None]) -> Iterator[str]:
    """A server that does with a connection what the test wants."""
    server = socket.create_server(("127.0.0.1", 0))

    def serve() -> None:
        while True:
            try:
                client, _ = server.accept()
            except OSError:
                return
            with client:
                client.recv(65536)
                answer(client)

    thread = threading.Thread(target=serve)
    thread.start()
    try:
        yield f"http://127.0.0.1:{server.getsockname()[1]}"
    finally:
        server.shutdown(socket.SHUT_RDWR)
        server.close()
        thread.join()


def test_a_log_is_cosigned_by_several(tmp_path: Path) -> None:
    known = {LOG.verifier.name: (LOG.verifier,)}
    place = tmp_path / "log"
    first, second = Witness(tmp_path / "one", KEY, known), Witness(tmp_path / "two", SECOND, known)
    with serving(first) as one, serving(second) as two, Log(place, LOG) as log:
        addresses = [WitnessAddress(one, KEY.verifier), WitnessAddress(f"{two}/some/prefix", SECOND.verifier)]
        for number in range(600):
            log.submit(b"entry %d" % number)
        assert [each.problem for each in cosign_log(log, addresses)] == ["", ""]
        log.append(b"one more")
        assert [each.problem for each in cosign_log(log, addresses)] == ["", ""]
        both = (KEY.verifier, SECOND.verifier)
        assert require_cosigned(place, (LOG.verifier,), both, 2).size == 601
        assert verify_log(place, [LOG.verifier], witnesses=both, quorum=2).valid
        with pytest.raises(NoteError, match="2 of the witnesses"):
            require_cosigned(place, (LOG.verifier,), both, 3)
        log.append(b"and one that nobody has seen")
        log.seal()
        with pytest.raises(NoteError, match="0 of the witnesses"):
            require_cosigned(place, (LOG.verifier,), both, 1)


def test_a_witness_at_an_address_of_ipv6(witness: Witness, tmp_path: Path) -> None:
    try:
        socket.create_server(("::1", 0), family=socket.AF_INET6).close()
    except OSError as error:
        pytest.skip(f"no IPv6 on this machine: {error}")
    with serving(witness, "::1") as address, Log(tmp_path / "log", LOG) as log:
        log.append(b"an entry")
        assert [each.problem for each in cosign_log(log, [WitnessAddress(address, KEY.verifier)])] == [""]


def test_one_witness_under_two_names_is_one(tmp_path: Path) -> None:
    alias = KeyFile("witness.example/alias", KeyType.COSIGNATURE, b"w" * 32)
    known = {LOG.verifier.name: (LOG.verifier,)}
    first, second = Witness(tmp_path / "one", KEY, known), Witness(tmp_path / "two", alias, known)
    with serving(first) as one, serving(second) as two, Log(tmp_path / "log", LOG) as log:
        log.append(b"entry")
        cosign_log(log, [WitnessAddress(one, KEY.verifier), WitnessAddress(two, alias.verifier)])
    with pytest.raises(NoteError, match="1 of the witnesses"):
        require_cosigned(tmp_path / "log", (LOG.verifier,), (KEY.verifier, alias.verifier), 2)


def test_two_witnesses_who_were_shown_two_logs_are_told_apart(tmp_path: Path) -> None:
    known = {LOG.verifier.name: (LOG.verifier,)}
    first, second = Witness(tmp_path / "one", KEY, known), Witness(tmp_path / "two", SECOND, known)
    with serving(first) as one, serving(second) as two:
        with Log(tmp_path / "log", LOG) as log:
            log.append(b"what the one is shown")
            assert cosign_log(log, [WitnessAddress(one, KEY.verifier)])[0].problem == ""
        with Log(tmp_path / "second", LOG) as log:
            log.append(b"what the other is shown")
            assert cosign_log(log, [WitnessAddress(two, SECOND.verifier)])[0].problem == ""
            (outcome,) = cosign_log(log, [WitnessAddress(one, KEY.verifier)])
            assert "split view" in outcome.problem
    assert len(list(first.evidence())) == 1


def test_a_rollback_is_told_as_one(tmp_path: Path) -> None:
    witness = Witness(tmp_path / "one", KEY, {LOG.verifier.name: (LOG.verifier,)})
    with serving(witness) as url:
        for place, size in (("log", 5), ("older", 3)):
            with Log(tmp_path / place, LOG) as log:
                for number in range(size):
                    log.submit(b"entry %d" % number)
                (outcome,) = cosign_log(log, [WitnessAddress(url, KEY.verifier)])
    assert "rollback" in outcome.problem


BAD_ANSWERS = {
    "nothing": b"",
    "no HTTP": b"hello\r\n\r\n",
    "an error": b"HTTP/1.0 500 No\r\n\r\n",
    "a size that is none": b"HTTP/1.0 409 No\r\nContent-Type: text/x.tlog.size\r\n\r\nx\n",
    "no signature": b"HTTP/1.0 200 OK\r\n\r\nhello\n",
    "another's": b"HTTP/1.0 200 OK\r\n\r\n"
    + f"\u2014 {KEY.verifier.name} {base64.b64encode(b'x' * 76).decode()}\n".encode(),
    "a wrong one": b"HTTP/1.0 200 OK\r\n\r\n"
    + f"\u2014 {KEY.verifier.name} {base64.b64encode(KEY.verifier.identifier + b'x' * 72).decode()}\n".encode(),
    "too much": b"HTTP/1.0 200 OK\r\n\r\n" + b"x" * 200_000,
}


@pytest.mark.parametrize("answer", BAD_ANSWERS.values(), ids=BAD_ANSWERS)
def test_a_witness_that_lies_or_fails_holds_up_nobody(tmp_path: Path, answer: bytes) -> None:
    good = Witness(tmp_path / "good", SECOND, {LOG.verifier.name: (LOG.verifier,)})
    with answering(lambda client: client.sendall(answer)) as bad, serving(good) as url:
        with Log(tmp_path / "log", LOG) as log:
            log.append(b"entry")
            addresses = [WitnessAddress(bad, KEY.verifier), WitnessAddress(url, SECOND.verifier)]
            outcomes = cosign_log(log, addresses)
    assert outcomes[0].signature is None
    assert outcomes[0].problem
    assert outcomes[1].problem == ""
    found = read_checkpoint(tmp_path / "log", (LOG.verifier,))
    assert found is not None
    assert [each.name for each in found[1].signatures] == [LOG.verifier.name, SECOND.verifier.name]


def test_a_witness_that_dribbles_is_given_up(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(cosigning, "TOTAL", 0.5)
    ended = threading.Event()

    def dribble(client: socket.socket) -> None:
        try:
            while not ended.wait(0.05):
                client.sendall(b"x")
        except OSError:
            pass

    with answering(dribble) as url, Log(tmp_path / "log", LOG) as log:
        log.append(b"entry")
        (outcome,) = cosign_log(log, [WitnessAddress(url, KEY.verifier)])
        ended.set()
    assert outcome.signature is None


def test_clients_that_are_slow_or_say_too_much_are_cut_off(
    witness: Witness, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(witness_server, "TOTAL", 0.5)
    with serving(witness) as url:
        port = int(url.rpartition(":")[2])
        idle = [socket.create_connection(("127.0.0.1", port)) for _ in range(witness_server.MAX_AT_ONCE)]
        for client in idle:
            client.sendall(b"POST /add-checkpoint HTTP/1.0\r\n")
        with Log(tmp_path / "log", LOG) as log:
            log.append(b"entry")
            assert cosign_log(log, [WitnessAddress(url, KEY.verifier)])[0].problem == ""
        for client in idle:
            client.close()
        for head, status in {
            b"POST /add-checkpoint HTTP/1.0\r\nContent-Length: 99999999\r\n\r\n": b"413",
            b"POST /add-checkpoint HTTP/1.0\r\n\r\n": b"411",
            b"POST /add-checkpoint HTTP/1.0\r\nContent-Length: 1\r\nContent-Length: 1\r\n\r\nx": b"411",
            b"POST /other HTTP/1.0\r\nContent-Length: 1\r\n\r\nx": b"404",
            b"GET /add-checkpoint HTTP/1.0\r\n\r\n": b"501",
        }.items():
            with socket.create_connection(("127.0.0.1", port)) as client:
                client.sendall(head)
                assert client.recv(100).split()[1] == status


@pytest.mark.parametrize(
    "text", ["", "x", "ftp://a=k", "http://=k", "http://a", f"http://a={LOG.verifier}", "http://a?q=x"]
)
def test_addresses_that_are_none(text: str) -> None:
    with pytest.raises((RequestError, NoteError)):
        parse_address(text)


def test_an_address() -> None:
    address = parse_address(f"https://witness.example/prefix/={KEY.verifier}")
    assert address == WitnessAddress("https://witness.example/prefix", KEY.verifier)


def test_what_it_remembers_is_its_own(witness: Witness, tmp_path: Path) -> None:
    assert ask(witness, tmp_path / "log", 0, grown(tmp_path / "log", 3)).status == 200
    for path in (tmp_path / "witness").iterdir():
        assert not os.stat(path).st_mode & 0o077
