"""Mutates the seeds of the gateway's parsers, which read what a hostile program or server sends.

    PYTHONPATH=src:. .venv/bin/python tests/fuzz/fuzz_gateway.py SECONDS [SEED]   # for all parsers together

What fails is written into tests/fuzz/corpus/PARSER, where tests/unit/test_gateway_corpus.py finds it from then on; the
exit status is 1 then. Equal seeds, equal inputs.
"""

from __future__ import annotations

import hashlib
import random
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import suppress
from pathlib import Path

from corral.credentials.scrubbing import Scrubber, forms
from corral.gateway.dns import MAX_DATAGRAM, MAX_STREAM, Frames, FramingError, Outcome, Question, answer, frame, read
from corral.gateway.hello import MAX_FLIGHT, CertificateReader, HelloError, parse_hello
from corral.gateway.http_heads import END, HttpError, request_head, response_head
from corral.gateway.names import Pair
from corral.gateway.recognise import MAX_FIRST, recognise
from corral.gateway.watch import Direction, Watch

CORPUS = Path(__file__).parent / "corpus"
MAX_INPUT = 1 << 16
"""Bytes of one input: what bounds the time of each."""
SECRET = b"hunter2/+secret"
_PATTERNS = forms(SECRET)
_MAX_ANSWER = 512
_PAIR = Pair(bytes((198, 18, 1, 1)), bytes(16))
_TOKENS = (
    b"\r\n", b"\r\n\r\n", b"\n", b"\r", b"\0", b" ", b"\t", b":", b"%2f", b"%2e%2e/", b"\xff", b"\xc0\x0c", b"\x16\3\1",
    b"\0\0\xff\xff", b"chunked", b"Content-Length: 0\r\n", b"Transfer-Encoding: chunked\r\n", b"Host: b.example\r\n",
    b"Upgrade: h2c\r\n", b" HTTP/1.1\r\n", b"http://", b"STARTTLS\r\n", b'{"', b"[" * 64, b"xn--",
    b"9" * 20, SECRET,
)  # fmt: skip


def _pieces(data: bytes, cuts: random.Random) -> list[bytes]:
    """The same bytes as a stream may bring them."""
    places = sorted(cuts.randrange(len(data) + 1) for _ in range(cuts.randrange(1, 6)))
    return [data[start:end] for start, end in zip([0, *places], [*places, len(data)], strict=True)]


def check_dns(data: bytes, cuts: random.Random) -> None:
    for limit in (MAX_DATAGRAM, MAX_STREAM):
        question = read(data, limit=limit)
        if isinstance(question, Question):
            for outcome in Outcome:
                said = answer(question, _PAIR, outcome, pointer="a.example", reason="no\n" * 99)
                assert said[:2] == data[:2] and len(said) <= _MAX_ANSWER
        else:
            assert question.reason and (not question.reply or question.reply[:2] == data[:2])
            assert len(question.reply) <= _MAX_ANSWER
    frames = Frames()
    got: list[bytes] = []
    with suppress(FramingError):
        for piece in _pieces(frame(data[:MAX_STREAM]) if len(data) >= 12 else data, cuts):
            got += frames.feed(piece)
    assert len(data) < 12 or got[0] == data[:MAX_STREAM]


def _hello_of(data: bytes) -> object:
    try:
        found = parse_hello(data)
        return found and (found, found.ja4)
    except HelloError as error:
        return str(error)


def check_hello(data: bytes, cuts: random.Random) -> None:
    whole = _hello_of(data)
    gathered = b""
    for piece in _pieces(data, cuts):
        gathered += piece
        part = _hello_of(gathered)
        # What is refused early may be refused for another reason later, but is never read.
        assert part is None or part == whole or isinstance(whole, str)
    ends = []
    for pieces in ([data], _pieces(data, cuts)):
        reader = CertificateReader()
        for piece in pieces:
            reader.feed(piece)
        ends.append(reader.certificate)
    assert len(data) > MAX_FLIGHT or ends[0] == ends[1]


def _scrub(pieces: list[bytes]) -> bytes:
    scrubber = Scrubber(_PATTERNS)
    return b"".join(map(scrubber.feed, pieces)) + scrubber.end()


def check_scrubbing(data: bytes, cuts: random.Random) -> None:
    clean = _scrub([data])
    assert len(clean) == len(data) and SECRET not in clean
    assert clean == _scrub(_pieces(data, cuts))


def check_request(data: bytes, cuts: random.Random) -> None:
    head = data.partition(END)[0] + END
    for secure in (True, False):
        try:
            found = request_head(head, "api.example", 443 if secure else 80, secure=secure)
        except HttpError as error:
            assert 400 <= error.status < 600 and str(error)
            continue
        assert found.path.startswith("/") and not {".", ".."} & set(found.path.split("/"))
        assert not (found.chunked and found.length is not None)
        assert not any(b"\r" in part or b"\n" in part or b"\0" in part for field in found.fields for part in field)
    check_scrubbing(data, cuts)


def check_response(data: bytes, cuts: random.Random) -> None:
    try:
        found = response_head(data.partition(END)[0] + END)
    except HttpError as error:
        assert 400 <= error.status < 600 and str(error)
    else:
        assert 100 <= found.status <= 999 and not (found.chunked and found.length is not None)
        assert not any(b"\r" in part or b"\n" in part or b"\0" in part for field in found.fields for part in field)
    check_scrubbing(data, cuts)


def check_recognise(data: bytes, cuts: random.Random) -> None:
    open_, ended = recognise(data), recognise(data, ended=True)
    assert ended is not None and (open_ is not None or len(data) < MAX_FIRST)
    assert open_ is None or open_ == ended  # the end adds no reading where there was one
    assert ended.detail.isascii() and ended.detail.isprintable() and len(ended.detail) < 256
    gathered = b""
    for piece in _pieces(data, cuts):
        gathered += piece
        early = recognise(gathered)
        assert early is None or early == open_
    watch = Watch()
    for piece in _pieces(data, cuts):
        watch.feed(cuts.choice(tuple(Direction)), piece)


CHECKS: dict[str, Callable[[bytes, random.Random], None]] = {
    "dns": check_dns,
    "hello": check_hello,
    "http_request": check_request,
    "http_response": check_response,
    "recognise": check_recognise,
}
"""For each folder of the corpus, what must hold of any bytes. Raises AssertionError, or what a parser should not."""


def seeds(parser: str) -> dict[str, bytes]:
    """By name, in a fixed order."""
    return {path.name: path.read_bytes() for path in sorted((CORPUS / parser).iterdir())}


def mutations(inputs: list[bytes], chance: random.Random) -> Iterator[bytes]:
    """Endlessly: one to four changes each, at most MAX_INPUT bytes."""
    while True:
        data = bytearray(chance.choice(inputs))
        for _ in range(chance.randrange(1, 5)):
            _change(data, inputs, chance)
        yield bytes(data[:MAX_INPUT])


def _change(data: bytearray, inputs: list[bytes], chance: random.Random) -> None:
    at = chance.randrange(len(data) + 1)
    end = min(len(data), at + chance.randrange(1, 17))
    match chance.randrange(8):
        case 0 if at < len(data):
            data[at] ^= 1 << chance.randrange(8)
        case 1 if at < len(data):
            data[at] = chance.choice((0, 1, 0x7F, 0x80, 0xFF, chance.randrange(256)))
        case 2:
            data[at:at] = chance.choice(_TOKENS)
        case 3:
            data[at:at] = chance.randbytes(chance.randrange(1, 9))
        case 4:
            del data[at:end]
        case 5:
            other = chance.choice(inputs)
            data[at:] = other[chance.randrange(len(other) + 1) :]  # a splice
        case 6:
            del data[at:]
        case 7:
            data[at:at] = data[at:end] * chance.choice((1, 2, 300))


def fuzz(parser: str, seconds: float, seed: int) -> int:
    """The number of failures, each of which is written down; ends at ten."""
    chance = random.Random(f"{parser} {seed}")
    inputs = list(seeds(parser).values())
    until, count, failures = time.monotonic() + seconds, 0, 0
    for data in mutations(inputs, chance):
        if time.monotonic() >= until or failures == 10:
            break
        count += 1
        try:
            CHECKS[parser](data, random.Random(data))
        except Exception as error:
            failures += 1
            path = CORPUS / parser / f"found-{hashlib.sha256(data).hexdigest()[:16]}"
            path.write_bytes(data)
            print(f"{path}: {type(error).__name__}: {error}")
    print(f"{parser}: {count} inputs, {failures} failures")
    return failures


if __name__ == "__main__":
    each, number = float(sys.argv[1]) / len(CHECKS), int(sys.argv[2]) if len(sys.argv) > 2 else 1
    sys.exit(1 if sum([fuzz(parser, each, number) for parser in CHECKS]) else 0)
