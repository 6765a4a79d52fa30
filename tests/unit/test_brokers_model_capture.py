"""Answers that are recorded, and given again without any upstream."""

from __future__ import annotations

import json
import stat
from pathlib import Path
from typing import Any

import pytest

from corral.actions import Ending
from corral.brokers.model.capture import Capture, CaptureMode
from corral.errors import RequestError
from tests.unit import model_answers
from tests.unit.model_world import CANARY, Exchange, ScriptedUpstream, model, upstream, world

CHAT = "/v1/chat/completions"
STREAM = model_answers.ALL["chat stream"].body
WHOLE = model_answers.ALL["chat body"].body


def asks(*turns: str, **rest: Any) -> dict[str, Any]:
    return {"model": "m", "messages": [{"role": "user", "content": each} for each in turns], **rest}


async def record(file: Path, scripts: list[Any], *requests: dict[str, Any]) -> list[tuple[int, bytes]]:
    async with ScriptedUpstream(*scripts) as up:
        async with world(model(upstream(up)), capture=Capture(CaptureMode.RECORD, file)) as made:
            answers = [await made.post(CHAT, each) for each in requests]
            await made.quiet()
    return [(each.status, each.body) for each in answers]


async def replay(file: Path, *requests: dict[str, Any]) -> list[Any]:
    """Without an upstream, and without a key."""
    async with ScriptedUpstream(says_whole) as up:
        capture = Capture(CaptureMode.REPLAY, file)
        async with world(model(upstream(up)), capture=capture, environment={}) as made:
            answers = [await made.post(CHAT, each) for each in requests]
            await made.quiet()
        assert not up.seen and len(made.told.used) == len(requests)
    return answers


async def says_whole(exchange: Exchange) -> None:
    await exchange.answer(WHOLE, x_request_id="req_1", x_echo=CANARY)


async def says_stream(exchange: Exchange) -> None:
    await exchange.stream([STREAM[at : at + 131] for at in range(0, len(STREAM), 131)])


def saying(text: str) -> Any:
    async def says(exchange: Exchange) -> None:
        await exchange.answer(json.dumps({"object": "chat.completion", "choices": [], "said": text}).encode())

    return says


async def test_what_was_answered_is_given_again_byte_for_byte(tmp_path: Path) -> None:
    file = tmp_path / "capture"
    requests = asks("one", stream=True), asks("two")
    recorded = await record(file, [says_stream, says_whole], *requests)
    again = await replay(file, *reversed(requests))
    assert recorded == [(200, STREAM), (200, WHOLE)]
    assert [(each.status, each.body, each.is_whole) for each in again] == [(200, WHOLE, True), (200, STREAM, True)]
    assert again[0].headers["x-request-id"] == "req_1" and again[1].headers["content-type"].startswith("text/event")


async def test_the_file_is_its_owners_and_holds_no_secret(tmp_path: Path) -> None:
    file = tmp_path / "capture"
    await record(file, [says_whole], asks("a prompt that is a secret"))
    assert stat.S_IMODE(file.stat().st_mode) == 0o600
    assert CANARY not in file.read_text() and "a prompt" not in file.read_text()


async def test_the_same_request_has_its_answers_in_their_order(tmp_path: Path) -> None:
    file = tmp_path / "capture"
    await record(file, [saying("1"), saying("2"), saying("3")], asks("a"), asks("b"), asks("a"))
    again = await replay(file, asks("a"), asks("a"), asks("a"), asks("b"))
    assert [each.json["said"] for each in again] == ["1", "3", "3", "2"]


async def test_json_that_is_written_otherwise_is_the_same_request(tmp_path: Path) -> None:
    file = tmp_path / "capture"
    await record(file, [saying("1")], asks("a", temperature=1))
    again = await replay(file, {"temperature": 1, **asks("a")})
    assert again[0].json["said"] == "1"


async def test_a_request_that_is_not_quite_the_same_is_found_by_its_position(tmp_path: Path) -> None:
    """As where a tool has said what time it is."""
    file = tmp_path / "capture"
    await record(file, [saying("1"), saying("2"), saying("3")], asks("a"), asks("a", "12:00"), asks("b"))
    again = await replay(file, asks("b"), asks("a"), asks("a", "12:01"))
    assert [each.json["said"] for each in again] == ["3", "1", "2"]


async def test_a_conversation_that_begins_otherwise_is_found_by_its_order(tmp_path: Path) -> None:
    file = tmp_path / "capture"
    await record(file, [saying("1"), saying("2")], asks("It is Friday."), asks("It is Friday.", "more"))
    again = await replay(file, asks("It is Monday."), asks("It is Monday.", "more"))
    assert [each.json["said"] for each in again] == ["1", "2"]


async def test_what_was_not_recorded_has_no_answer(tmp_path: Path) -> None:
    file = tmp_path / "capture"
    await record(file, [saying("1")], asks("a"))
    async with world(model(), capture=Capture(CaptureMode.REPLAY, file)) as made:
        assert (await made.post(CHAT, asks("a"))).status == 404  # whom nobody has cannot be asked either
    _, missed, other = await replay(file, asks("a"), asks("a", "b", "c"), {**asks("x"), "model": "other"})
    for answer in (missed, other):
        assert (answer.status, answer.json["error"]["code"]) == (501, "not_recorded")
        assert answer.headers["x-should-retry"] == "false"
    assert "position 1" in missed.json["error"]["message"] and "model other" in other.json["error"]["message"]


async def test_an_answer_that_broke_off_breaks_off_again(tmp_path: Path) -> None:
    async def breaks(exchange: Exchange) -> None:
        await exchange.stream([STREAM[:500]], end=False)
        exchange.writer.close()

    file = tmp_path / "capture"
    assert await record(file, [breaks], asks("a")) == [(200, STREAM[:500])]
    again = await replay(file, asks("a"))
    assert again[0].body == STREAM[:500] and not again[0].is_whole


async def test_pieces_and_times_are_kept(tmp_path: Path) -> None:
    async def slowly(exchange: Exchange) -> None:
        await exchange.stream([b"data: 1\n\n", b"data: 2\n\n"], pause=0.1)

    file = tmp_path / "capture"
    await record(file, [slowly], asks("a"))
    line = json.loads(file.read_text())
    (_, first), (at, second) = line["pieces"]
    assert first != second and 50 < at < 5000 and line["whole"] is True


def test_a_device_is_no_file() -> None:
    with pytest.raises(RequestError, match="regular"):
        Capture(CaptureMode.RECORD, Path("/dev/null"))


async def test_what_cannot_be_recorded_ends_the_sandbox(tmp_path: Path) -> None:
    capture = Capture(CaptureMode.RECORD, tmp_path / "capture")
    async with ScriptedUpstream(says_whole) as up, world(model(upstream(up)), capture=capture) as made:
        capture.close()
        answer = await made.post(CHAT, asks("a"))
        await made.quiet()
        assert made.told.ends == ["the answers of its models cannot be recorded"]
        assert not answer.is_whole and made.told.used[0].ending is Ending.FAILED


@pytest.mark.parametrize("text", ["x", "{}", "[]", '{"version": 2}', '{"version": 1, "status": 200}'])
def test_a_file_that_is_no_capture(tmp_path: Path, text: str) -> None:
    file = tmp_path / "capture"
    file.write_text(text + "\n")
    with pytest.raises(RequestError, match="line 1"):
        Capture(CaptureMode.REPLAY, file)


def test_a_file_that_is_not_there(tmp_path: Path) -> None:
    with pytest.raises(RequestError, match="cannot be read"):
        Capture(CaptureMode.REPLAY, tmp_path / "none")
    (tmp_path / "link").symlink_to(tmp_path / "elsewhere")
    with pytest.raises(RequestError, match="cannot be written"):
        Capture(CaptureMode.RECORD, tmp_path / "link")


async def test_a_replay_is_accounted_for(tmp_path: Path) -> None:
    file = tmp_path / "capture"
    await record(file, [says_stream], asks("a"))
    capture = Capture(CaptureMode.REPLAY, file)
    async with ScriptedUpstream(says_whole) as up, world(model(upstream(up)), capture=capture) as made:
        await made.post(CHAT, asks("a"))
        await made.quiet()
    (account,) = made.told.used
    assert (account.source, account.ending, account.input_tokens) == ("replay", Ending.ANSWERED, 100)
    assert [call.id for call in account.tools] == ["call_1", "call_2"] and account.opened == 1
