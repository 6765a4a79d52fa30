"""Answers of models are read whole, in any pieces, and nothing that an upstream sends does harm."""

from __future__ import annotations

import json
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from corral.modelapi import answer as answers
from corral.modelapi import reader as readers
from corral.modelapi import values
from corral.modelapi.answer import Answer, Api
from corral.modelapi.reader import AnswerReader, read_answer
from corral.modelapi.values import values_in
from tests.unit.model_answers import ALL, CALLS, THOUGHT, WORDS, Given, chat_stream, events, messages_stream

GIVEN = pytest.mark.parametrize("given_", ALL.values(), ids=ALL.keys())


def read(api: Api, pieces: list[bytes]) -> Answer:
    reader = AnswerReader(api)
    for piece in pieces:
        reader.feed(piece)
    return reader.finish()


def cut_at(body: bytes, places: list[int]) -> list[bytes]:
    ends = sorted(place % (len(body) + 1) for place in places)
    return [body[start:end] for start, end in zip([0, *ends], [*ends, len(body)], strict=True)]


@GIVEN
def test_an_answer_is_read(given_: Given) -> None:
    assert read_answer(given_.api, given_.body) == given_.answer


@GIVEN
@pytest.mark.parametrize("size", [1, 2, 3, 7, 100])
def test_an_answer_is_the_same_in_pieces_of_one_size(given_: Given, size: int) -> None:
    assert read(given_.api, [given_.body[at : at + size] for at in range(0, len(given_.body), size)]) == given_.answer


@settings(max_examples=100)
@given(
    st.sampled_from(list(ALL.values())),
    st.lists(st.integers(0, 2**20), max_size=12),
    st.sampled_from("\n \r\n \r".split(" ")),
)
def test_an_answer_is_the_same_in_any_pieces_and_with_any_ends_of_lines(
    given_: Given, places: list[int], end: str
) -> None:
    is_stream = given_.body.startswith((b"data", b"event"))
    body = given_.body.replace(b"\n", end.encode()) if is_stream else given_.body
    assert read(given_.api, cut_at(body, places)) == given_.answer


@settings(max_examples=300)
@given(
    st.sampled_from(Api),
    st.lists(
        st.binary(max_size=40)
        | st.sampled_from(
            [b"data: ", b"\n\n", b"\r", b"\n", b"{", b"[", b"data: [DONE]\n\n", b"\xef\xbb\xbf", b"event: error"]
        ),
        max_size=12,
    ),
)
def test_garbage_never_raises_and_is_never_complete_in_one_way_only(api: Api, pieces: list[bytes]) -> None:
    assert read(api, pieces) == read(api, [b"".join(pieces)])


JSON: st.SearchStrategy[Any] = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=5),
    lambda inner: (
        st.lists(inner, max_size=3)
        | st.dictionaries(
            st.sampled_from(
                "type index delta content choices message usage item output response output_index tool_calls function"
                " text content_block logprobs arguments name id finish_reason input prompt_tokens error".split()
            ),
            inner,
            max_size=4,
        )
    ),
    max_leaves=12,
)
TYPES = st.sampled_from(
    "message message_start content_block_start content_block_delta content_block_stop message_delta error"
    " response.completed response.output_item.done response.output_text.delta response".split()
)


@settings(max_examples=300)
@given(
    st.sampled_from(Api),
    st.lists(st.tuples(TYPES, st.dictionaries(st.text(max_size=3), JSON, max_size=3), JSON), max_size=4),
)
def test_values_of_other_types_than_they_should_have_count_as_missing(
    api: Api, values: list[tuple[str, dict[str, Any], Any]]
) -> None:
    for _, event, other in values:
        event.update(other if isinstance(other, dict) else {})
    made = [{**event, "type": kind} for kind, event, _ in values]
    found = read_answer(api, events(*made))
    assert found.text.encode() is not None
    assert all(each.arguments.encode() is not None for each in found.tools)
    for each in made:
        read_answer(api, json.dumps({**each, "object": "response", "output": [each], "choices": [each]}).encode())


@GIVEN
def test_whoever_passes_it_on_knows_of_each_tool_call_before_the_agent_can(given_: Given) -> None:
    """One byte less than what is news has not told it."""
    if not given_.body.startswith((b"data", b"event")):
        pytest.skip("the end of a body is known to who reads it")
    reader, news = AnswerReader(given_.api), []
    for at in range(len(given_.body)):
        if reader.feed(given_.body[at : at + 1]):
            news.append((at, len(reader.tools), reader.is_over))
    assert news[-1][1:] == (2, True)
    assert [known for _, known, _ in news] == sorted(known for _, known, _ in news)
    if given_.api is not Api.CHAT:  # there only the end says that arguments are whole
        assert [known for _, known, _ in news] == [1, 2, 2]
    for at, known, _ in news:
        end = given_.body[: at + 1]
        assert end.endswith(b"\n\n")
        assert reader.tools[:known] == CALLS[:known]


def test_a_stream_that_breaks_off_says_so_and_asks_for_nothing_that_was_not_whole() -> None:
    body = messages_stream().body
    place = body.index(b'"index": 4', body.index(b'"call_2"'))  # the second tool call has begun
    found = read_answer(Api.MESSAGES, body[:place])
    assert (found.text, found.thinking) == (WORDS, THOUGHT)
    assert found.tools == CALLS[:1]
    assert not found.complete and found.fault == "it broke off"
    assert found.input_tokens == 100


@GIVEN
@settings(max_examples=30)
@given(place=st.integers(0, 2**20))
def test_what_is_kept_of_the_beginning_is_read_as_far_as_it_goes(given_: Given, place: int) -> None:
    body = given_.body[: place % len(given_.body)]
    found = read_answer(given_.api, body, is_whole=False)
    assert not found.complete
    assert given_.answer.text.startswith(found.text)
    assert given_.answer.thinking.startswith(found.thinking)


def test_the_beginning_of_one_object_still_tells_something() -> None:
    body = ALL["messages body"].body
    place = body.index(b'"name": "read"')
    found = read_answer(Api.MESSAGES, body[:place], is_whole=False)
    assert (found.thinking, found.text) == (THOUGHT, WORDS)
    assert found.fault == "only its beginning was kept"
    assert read_answer(Api.MESSAGES, body[:place]).fault == "it is no JSON"


@pytest.mark.parametrize(
    ("api", "body", "fault"),
    [
        (Api.CHAT, b"", "it is empty"),
        (Api.CHAT, b"  \n", "it is empty"),
        (Api.CHAT, b"{}", "it is no chat completion"),
        (Api.CHAT, b"[]", "it is no object"),
        (Api.CHAT, b'{"error": {"message": "x"}}', "the upstream reports an error"),
        (Api.MESSAGES, b"{}", "it is no message"),
        (Api.MESSAGES, b'{"type": "error", "error": {"type": "overloaded_error"}}', "the upstream reports an error"),
        (Api.RESPONSES, b"{}", "it is no response"),
        (Api.CHAT, b"<html>", "it broke off"),
        (Api.CHAT, b"data: {x\n\n", "one of its events is no JSON"),
        (Api.CHAT, b"{" + b'"a":[' * 100_000, "it is no JSON"),
        (Api.CHAT, b"data: " + b"[" * 100_000 + b"\n\n", "one of its events is no JSON"),
        (Api.CHAT, b'{"a":' + b"9" * 10_000 + b"}", "it is no JSON"),
        (Api.MESSAGES, b'event: error\ndata: {"type":"error","error":{}}\n\n', "the upstream reports an error"),
        (Api.RESPONSES, b'data: {"type":"response.failed","response":{"status":"failed","error":{"code":"x"}}}\n\n',
         "the upstream reports an error"),
    ],
)  # fmt: skip
def test_what_is_wrong_is_said_in_our_words(api: Api, body: bytes, fault: str) -> None:
    found = read_answer(api, body)
    assert (found.fault, found.complete) == (fault, False)


def test_halves_of_surrogate_pairs_are_put_together_or_replaced() -> None:
    body = b"".join(
        b'data: {"choices":[{"delta":{"content":"%s"}}]}\n\n' % each for each in (b"\\ud83d", b"\\udc4b", b"\\ud83d")
    )
    found = read_answer(Api.CHAT, body + b"data: [DONE]\n\n")
    assert found.text == "👋\ufffd"
    assert found.text.encode()


def test_what_takes_long_to_read_is_not_read(monkeypatch: pytest.MonkeyPatch) -> None:
    """All who have a broker would wait for it."""
    monkeypatch.setattr(readers, "MAX_VALUES", 100)

    def answer(text: object) -> dict[str, Any]:
        return {
            "choices": [{"message": {"content": "x"}, "delta": {"content": "x"}, "finish_reason": "stop"}],
            "y": text,
        }

    many, long = answer([[]] * 100), answer('[1, "2"]\\' * 100)
    for body in (json.dumps(many).encode(), events(many)):
        found = read_answer(Api.CHAT, body)
        assert "more than 100 values" in found.fault and not found.text and not found.complete
    for body in (json.dumps(long).encode(), events(long)):
        assert read_answer(Api.CHAT, body).complete


@given(
    st.recursive(
        st.none() | st.integers() | st.text('[{,"\\x', max_size=9),
        lambda inner: st.lists(inner, max_size=4) | st.dictionaries(st.text('{,"\\x', max_size=3), inner, max_size=4),
        max_leaves=40,
    ),
    st.integers(0, 40),
)
def test_values_are_counted_without_the_texts(value: object, most: int) -> None:
    def marks(each: object) -> int:
        if not isinstance(each, list | dict):
            return 0
        inner = list(each.values() if isinstance(each, dict) else each)
        return 1 + max(0, len(inner) - 1) + sum(map(marks, inner))

    body = json.dumps(value).encode()
    with pytest.MonkeyPatch.context() as patch:
        for small in (0, len(body)):  # it is counted in two ways
            patch.setattr(values, "_SMALL", small)
            assert (values_in(body, most) > most) == (marks(value) > most)


def test_what_is_kept_is_bounded(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(answers, "MAX_TEXT", 1000)
    monkeypatch.setattr(readers, "MAX_EVENT", 200_000)
    monkeypatch.setattr(readers, "MAX_BODY", 10_000)
    many = events(*[{"choices": [{"delta": {"content": "x" * 100, "reasoning": "y" * 100}}]} for _ in range(5000)])
    found = read(Api.CHAT, cut_at(many, list(range(0, len(many), 1000))))
    assert len(found.text) + len(found.thinking) == 1000
    assert found.fault == "it is longer than 1000 characters"
    reader = AnswerReader(Api.CHAT)
    for _ in range(1000):
        reader.feed(b"data: " + b"x" * 1000)
        assert reader._size <= 201_006
    reader.feed(b"\n\n" + events({"choices": [{"delta": {"content": "after"}, "finish_reason": "stop"}]}))
    found = reader.finish()
    assert (found.text, found.fault) == ("after", "one of its events is longer than 200000 bytes")
    lines = AnswerReader(Api.CHAT)
    for _ in range(1000):
        lines.feed(b"data: " + b"x" * 1000 + b"\n")
        assert sum(map(len, lines._data)) <= 200_000
    assert lines.finish().fault == "one of its events is longer than 200000 bytes"
    reader = AnswerReader(Api.CHAT)
    for _ in range(1000):
        reader.feed(b'{"a":"' + b"x" * 1000)
    assert reader._size <= 10_000
    assert reader.finish().fault == "it is longer than 10000 bytes"


def test_tool_calls_are_bounded() -> None:
    calls = [
        {"index": at, "id": "i" * 10_000, "function": {"name": "n" * 1000, "arguments": "{}"}} for at in range(1000)
    ]
    body = events({"choices": [{"delta": {"tool_calls": calls}, "finish_reason": "tool_calls"}]})
    found = read_answer(Api.CHAT, body)
    assert len(found.tools) == answers.MAX_TOOLS and found.fault
    assert max(len(each.id) for each in found.tools) == 4096
    parts = [
        {"type": "content_block_start", "index": at, "content_block": {"type": "text", "text": "x"}}
        for at in range(1000)
    ]
    assert len(read_answer(Api.MESSAGES, events(*parts)).text.split()) == answers.MAX_TOOLS


def test_most_pieces_are_only_put_aside(monkeypatch: pytest.MonkeyPatch) -> None:
    """200 streams at once are passed on: who does that must not take each event apart as it comes."""
    taken: list[int] = []
    take = AnswerReader._take

    def counted(self: AnswerReader) -> None:
        taken.append(1)
        take(self)

    monkeypatch.setattr(AnswerReader, "_take", counted)
    body = chat_stream().body
    reader = AnswerReader(Api.CHAT)
    for event in body.split(b"\n\n")[:-1]:
        reader.feed(event + b"\n\n")
    assert reader.finish().text == WORDS
    assert len(taken) <= 4


def test_a_tool_call_is_known_when_its_end_comes_in_two_pieces() -> None:
    """Also where the first of them ends what came before."""
    body = b"".join(line + b"\n\n" for line in messages_stream().body.split(b"\n") if line.startswith(b"data:"))
    first = body.index(b"\n\n", body.index(b"content_block_stop", body.index(b'"call_1"'))) + 2
    second = body.index(b"content_block_stop", body.index(b'"call_2"')) + 9
    end = body.index(b"\n\n", second) + 2
    reader = AnswerReader(Api.MESSAGES)
    assert not reader.feed(body[: first - 5])  # its end has begun
    reader.feed(body[first - 5 : second])
    assert [each.id for each in reader.tools] == ["call_1"]
    assert reader.feed(body[second:end])
    assert reader.tools == CALLS


def test_a_word_in_the_text_that_looks_like_the_end_ends_nothing() -> None:
    evil = '\n\ndata: [DONE]\n\n"finish_reason":"stop" event: message_stop response.completed'
    reader = AnswerReader(Api.CHAT)
    assert not reader.feed(events({"choices": [{"delta": {"content": evil}, "finish_reason": None}]}))
    assert not reader.is_over
    assert reader.feed(events({"choices": [{"delta": {}, "finish_reason": "stop"}]}))
    found = reader.finish()
    assert (found.text, found.complete) == (evil, True)


def test_tokens_are_collected_where_they_are_wanted() -> None:
    def chunk(token: str, number: int) -> dict[str, Any]:
        logprobs = {"content": [{"token": token, "logprob": -0.5 * number, "bytes": None, "top_logprobs": []}]}
        return {"choices": [{"index": 0, "delta": {"content": token}, "logprobs": logprobs, "token_ids": [number]}]}

    body = events({"prompt_token_ids": [1, 2, 3], "choices": []}, chunk("a", 1), chunk("b", 2)) + b"data: [DONE]\n\n"
    found = read_answer(Api.CHAT, body, sampling=True).sampled
    assert (found.prompt_ids, found.ids, found.tokens, found.logprobs) == ((1, 2, 3), (1, 2), ("a", "b"), (-0.5, -1.0))
    assert read_answer(Api.CHAT, body).sampled == answers.Sampled()
