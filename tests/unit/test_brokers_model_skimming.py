"""What is not read of a stream changes nothing of what it comes to."""

from __future__ import annotations

from itertools import pairwise

import pytest
from hypothesis import given
from hypothesis import strategies as st

from corral.actions import ToolCall
from corral.brokers.model.relaying import Threshold
from corral.brokers.model.skimming import Skimmer
from corral.modelapi.answer import Answer, Api
from corral.modelapi.reader import read_answer
from tests.unit import model_answers

STREAMS = {name: given for name, given in model_answers.ALL.items() if "stream" in name}


def told(answer: Answer) -> tuple[object, ...]:
    tokens = answer.input_tokens, answer.output_tokens, answer.cached_tokens, answer.written_tokens
    return answer.tools, tokens, answer.finish, answer.complete, answer.fault, answer.has_usage


def taken(api: Api, pieces: list[bytes]) -> tuple[bytes, Answer, list[tuple[int, int]], int]:
    """What went on, what it was, how many tools were told of after how many bytes, how many events were left out."""
    passed, opened = bytearray(), list[tuple[int, int]]()

    def note(tools: object) -> None:
        assert isinstance(tools, tuple) and all(isinstance(each, ToolCall) for each in tools)
        opened.append((len(tools), len(passed)))

    threshold = Threshold(api, True, note)
    for piece in pieces:
        passed += threshold.take(piece)
    answer, rest = threshold.end()
    return bytes(passed + rest), answer, opened, threshold.skipped


def whole_events(body: bytes) -> list[bytes]:
    return [each + b"\n\n" for each in body.split(b"\n\n")[:-1]]


@pytest.mark.parametrize("name", STREAMS)
def test_events_of_text_are_left_out(name: str) -> None:
    stream = STREAMS[name]
    passed, answer, opened, skipped = taken(stream.api, whole_events(stream.body))
    expected = read_answer(stream.api, stream.body)
    assert passed == stream.body and told(answer) == told(expected)
    assert skipped >= len(model_answers.WORDS) and len(answer.text) < len(expected.text) + (stream.api is Api.RESPONSES)
    assert len(opened) == 1 and opened[0][0] == 2


@given(name=st.sampled_from(sorted(STREAMS)), cuts=st.lists(st.integers(0, 20_000), max_size=40), ends=st.booleans())
def test_however_it_comes_it_is_the_same(name: str, cuts: list[int], ends: bool) -> None:
    stream = STREAMS[name]
    body = stream.body
    if ends:  # with pieces that end with events among them
        boundaries = [at + 2 for at in range(len(body)) if body[at : at + 2] == b"\n\n"]
        places = sorted({0, len(body), *(boundaries[cut % len(boundaries)] for cut in cuts)})
    else:
        places = sorted({0, len(body), *(cut % len(body) for cut in cuts)})
    pieces = [body[start:end] for start, end in pairwise(places)]
    passed, answer, _, _ = taken(stream.api, pieces)
    assert passed == body and told(answer) == told(read_answer(stream.api, body))


@pytest.mark.parametrize(
    "piece",
    [
        b'data: {"x": 1}\n',
        b'data: {"x": 1',
        b': comment\n\ndata: {"x": 1}',
        b' {"x": 1}\n\n',
        b'data: {"x": 1}\r\n\r\n',
        b'data: {"choices": [{"delta": {"tool_calls": []}}]}\n\n',
        b"data: [DONE]\n\n",
    ],
)
def test_what_is_not_just_text_is_read(piece: bytes) -> None:
    skimmer = Skimmer(Api.CHAT)
    text = b'data: {"choices": [{"delta": {"content": "x"}}]}\n\n'
    assert [skimmer.skips(each) for each in (text, text, piece)] == [False, True, False]
    assert skimmer.events == 1


def test_what_follows_half_an_event_is_read() -> None:
    skimmer = Skimmer(Api.CHAT)
    whole = b'data: {"a": 1}\n\n'
    assert [skimmer.skips(each) for each in (whole, b'data: {"a":', b" 1}\n\n", whole)] == [False, False, False, True]
