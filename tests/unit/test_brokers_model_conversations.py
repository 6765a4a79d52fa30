"""Which request belongs to which conversation, and who has begun it."""

from __future__ import annotations

import json
from typing import Any

import pytest

from corral.actions import ToolCall
from corral.brokers.model import conversations, turns
from corral.brokers.model.asking import read
from corral.brokers.model.conversations import Conversation, Conversations
from corral.brokers.model.results import results_of
from corral.brokers.model.turns import ATTACHMENT, Talk, talk_of, tokens_of
from corral.modelapi.answer import Api

SYSTEM = {"role": "system", "content": "You are an agent."}
TASK = {"role": "user", "content": "Fix the bug in parser.py, please."}


def wants(id_: str, arguments: str = '{"command": "ls"}') -> dict[str, Any]:
    call = {"id": id_, "type": "function", "function": {"name": "bash", "arguments": arguments}}
    return {"role": "assistant", "content": None, "tool_calls": [call]}


def gave(id_: str, text: str = "a.py") -> dict[str, Any]:
    return {"role": "tool", "tool_call_id": id_, "content": text}


def talk(*turns: dict[str, Any], api: Api = Api.CHAT, **rest: Any) -> Talk:
    name = "input" if api is Api.RESPONSES else "messages"
    return talk_of(read(api, json.dumps({"model": "m", name: list(turns), **rest}).encode()))


def ask(known: Conversations, said: Talk, *tools: ToolCall, previous: str = "", answer: str = "") -> Conversation:
    """One request, with its answer."""
    found = known.find(said, previous)
    known.asked(found)
    if tools or answer:
        known.answered(found, tools, answer)
    known.over(found)
    return found


def call(id_: str, **arguments: str) -> ToolCall:
    return ToolCall(id_, "Task", json.dumps(arguments))


def test_a_conversation_goes_on_with_all_of_its_turns() -> None:
    known = Conversations()
    first = ask(known, talk(SYSTEM, TASK))
    second = ask(known, talk(SYSTEM, TASK, {"role": "assistant", "content": "Hm."}, {"role": "user", "content": "Go."}))
    assert second is first


def test_it_is_named_by_how_it_begins() -> None:
    first = ask(Conversations(), talk(SYSTEM, TASK))
    later = ask(Conversations(), talk(SYSTEM, TASK, wants("a"), gave("a")))
    other = ask(Conversations(), talk(SYSTEM, {"role": "user", "content": "Something else."}))
    assert first.id == later.id != other.id


def test_the_results_of_its_tool_calls_bring_it_back() -> None:
    """Though an agent has rewritten all that came before, as some do to save tokens."""
    known = Conversations()
    first = ask(known, talk(SYSTEM, TASK), call("a"))
    other = ask(known, talk(SYSTEM, {"role": "user", "content": "Another task."}), call("b"))
    assert ask(known, talk({"role": "user", "content": "In short: fix it."}, wants("a"), gave("a"))) is first
    assert ask(known, talk(SYSTEM, TASK, wants("b"), gave("b"))) is other


def test_ids_that_several_use_say_nothing() -> None:
    known = Conversations()
    first = ask(known, talk(SYSTEM, TASK), call("call_0"))
    other_task = {"role": "user", "content": "Another task."}
    other = ask(known, talk(SYSTEM, other_task), call("call_0"))
    assert ask(known, talk(SYSTEM, TASK, wants("call_0"), gave("call_0"))) is first
    assert ask(known, talk(SYSTEM, other_task, wants("call_0"), gave("call_0"))) is other


def test_only_the_latest_results_count() -> None:
    said = talk(TASK, wants("a"), gave("a"), wants("b"), gave("b"), gave("c"))
    assert said.answered == ("b", "c")


def test_two_that_begin_alike_and_wait_at_one_time_are_two() -> None:
    known = Conversations()
    first, second = known.find(talk(SYSTEM, TASK)), known.find(talk(SYSTEM, TASK))
    assert first is not second and first.id != second.id
    known.answered(first, [call("a")])
    known.answered(second, [call("b")])
    known.over(first)
    known.over(second)
    assert ask(known, talk(SYSTEM, TASK, wants("a"), gave("a"))) is first
    assert ask(known, talk(SYSTEM, TASK, wants("b"), gave("b"))) is second


def test_a_request_that_is_made_again_is_the_same_conversation() -> None:
    known = Conversations()
    assert ask(known, talk(SYSTEM, TASK)) is ask(known, talk(SYSTEM, TASK))


def test_marks_for_a_cache_and_lists_of_one_text_change_nothing() -> None:
    known = Conversations()
    first = ask(known, talk(TASK, api=Api.MESSAGES, system="Be good."))
    marked = {"type": "text", "text": TASK["content"], "cache_control": {"type": "ephemeral"}}
    again = talk(
        {"role": "user", "content": [marked]},
        {"role": "assistant", "content": "Yes?"},
        {"role": "user", "content": "Well."},
        api=Api.MESSAGES,
        system=[{"type": "text", "text": "Be good.", "cache_control": {"type": "ephemeral"}}],
    )
    assert ask(known, again) is first


def test_an_answer_that_the_upstream_keeps_is_followed_by_its_id() -> None:
    known = Conversations()
    first = ask(known, talk(TASK, api=Api.RESPONSES), answer="resp_1")
    said = talk({"role": "user", "content": "More."}, api=Api.RESPONSES, previous_response_id="resp_1")
    assert ask(known, said, previous="resp_1") is first
    assert ask(known, said, previous="resp_unknown") is not first


def test_whose_tool_call_says_the_prompt_is_the_parent() -> None:
    known = Conversations()
    main = ask(known, talk(SYSTEM, TASK), call("t1", prompt="Look for all uses of parse().", description="search"))
    bystander = ask(known, talk(SYSTEM, {"role": "user", "content": "Water the plants."}), call("t2", prompt="Walk."))
    reminder = {"type": "text", "text": "<reminder>Today is Friday.</reminder>"}
    prompt = {"role": "user", "content": [reminder, {"type": "text", "text": "Look for all uses of parse()."}]}
    sub = known.find(talk({"role": "system", "content": "You are a searcher."}, prompt))
    wrapped = known.find(talk({"role": "user", "content": "Task: Look for all uses of parse(). Answer briefly."}))
    stranger = known.find(talk({"role": "user", "content": "Tell me a story about horses."}))
    assert sub.parent == wrapped.parent == main.id and sub.id != main.id
    assert stranger.parent == main.parent == bystander.parent == ""


def test_a_tool_call_that_is_answered_begins_nothing() -> None:
    known = Conversations()
    ask(known, talk(SYSTEM, TASK), call("t1", prompt="Look for all uses of parse()."))
    ask(known, talk(SYSTEM, TASK, wants("t1"), gave("t1")))
    assert known.find(talk({"role": "user", "content": "Look for all uses of parse()."})).parent == ""


def test_arguments_that_are_no_json_begin_nothing() -> None:
    known = Conversations()
    ask(known, talk(TASK), ToolCall("a", "x", "{"), ToolCall("b", "x", "[" * 100_000))
    assert known.find(talk({"role": "user", "content": "{ and something"})).parent == ""


def test_memory_is_bounded(monkeypatch: Any) -> None:
    for name in ("MAX_CONVERSATIONS", "MAX_PREFIXES", "MAX_ANSWERS"):
        monkeypatch.setattr(conversations, name, 8)
    known = Conversations()
    for number in range(100):
        ask(known, talk({"role": "user", "content": f"Task {number}"}), call(f"c{number}"), answer=f"r{number}")
    assert all(len(each) <= 8 for each in (known._by_id, known._prefixes, known._answers))


# ---- what is said ----


def test_results_come_with_what_was_asked() -> None:
    chat = read(Api.CHAT, json.dumps({"model": "m", "messages": [TASK, wants("a"), gave("a", "x")]}).encode())
    block = {"type": "tool_result", "tool_use_id": "t", "content": [{"type": "text", "text": "one"}, {"text": "two"}]}
    use = {"type": "tool_use", "id": "t", "name": "Read", "input": {"file_path": "/etc/motd"}}
    turns = [{"role": "assistant", "content": [use]}, {"role": "user", "content": [block]}]
    messages = read(Api.MESSAGES, json.dumps({"model": "m", "messages": turns}).encode())
    items = [
        {"type": "function_call", "call_id": "c", "name": "fetch", "arguments": '{"url": "http://a.example/"}'},
        {"type": "function_call_output", "call_id": "c", "output": "page"},
    ]
    responses = read(Api.RESPONSES, json.dumps({"model": "m", "input": items}).encode())
    found = [
        (each.id, each.name, each.text, each.source)
        for asked in (chat, messages, responses)
        for each in results_of(asked)
    ]
    assert found == [
        ("a", "bash", "x", "command: ls"),
        ("t", "Read", "one\ntwo", "file: /etc/motd"),
        ("c", "fetch", "page", "url: http://a.example/"),
    ]


def test_text_that_is_hidden_deep_is_found() -> None:
    source = {"type": "text", "data": "data: words, " * 100}
    document = {"type": "document", "source": source, "title": "data:,Now do " + "x " * 200, "context": "C"}
    nested = {"type": "tool_result", "tool_use_id": "t", "content": [{"type": "search_result", "content": [document]}]}
    asked = read(Api.MESSAGES, json.dumps({"model": "m", "messages": [{"role": "user", "content": [nested]}]}).encode())
    assert {source["data"], document["title"], "C"} <= set(results_of(asked)[0].text.split("\n"))


def test_an_estimate_counts_attachments_by_the_piece() -> None:
    text = talk({"role": "user", "content": "x" * 4000})
    image = {"type": "image_url", "image_url": {"url": "data:image/png;base64," + "A" * 4_000_000}}
    seen = talk({"role": "user", "content": [image]})
    assert 1000 <= text.tokens < 1050
    assert ATTACHMENT <= seen.tokens < ATTACHMENT + 100
    assert [tokens_of(length) for length in (0, 1, 4, 5)] == [0, 1, 1, 2]


def test_nothing_said_is_a_conversation_too() -> None:
    for api in Api:
        assert ask(Conversations(), talk(api=api)).id


def test_who_has_begun_it_is_looked_for_among_few(monkeypatch: pytest.MonkeyPatch) -> None:
    """Prompts and arguments are the agent's, and all of one are compared with all of the other."""
    many = [{"type": "text", "text": f"a prompt with number {at}"} for at in range(1000)]
    assert len(talk({"role": "user", "content": many}).prompts) == turns.MAX_PROMPTS
    results = [gave(f"call {at}") for at in range(1000)]
    assert len(talk(TASK, *results).answered) == turns.MAX_ANSWERED

    known = Conversations()
    texts = {str(at): f"a prompt with number {at}" for at in range(1000)}
    found = ask(known, talk(TASK), call("a", **texts))
    assert len(found.said) == conversations.MAX_TEXTS

    monkeypatch.setattr(conversations, "MAX_PARENTS", 2)
    parents = [
        ask(known, talk({"role": "user", "content": f"Task {at}"}), call(f"c{at}", prompt=f"Look into part {at}."))
        for at in range(4)
    ]
    ask(known, talk({"role": "user", "content": "asks for nothing"}))
    for at, parent in enumerate(parents):
        sub = known.find(talk({"role": "user", "content": f"Look into part {at}."}))
        assert sub.parent == (parent.id if at >= 2 else "")
