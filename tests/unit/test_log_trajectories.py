"""Trajectories have what was said and done, in the documented form, and say what is missing."""

from __future__ import annotations

import io
import json
from collections.abc import Iterable
from dataclasses import replace
from pathlib import Path
from typing import Any

import jsonschema
import pyarrow.parquet
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from corral.actions import Action, Content, Decision, Kind, ModelCall, Program, ToolCall, Verdict
from corral.log import trajectories as module
from corral.log.events import Event, PayloadKept
from corral.log.parquet import turn_schema, write_turns
from corral.log.payloads import Payloads
from corral.log.trajectories import Turn, trajectories, turn_line, turn_row
from tests.unit.model_answers import ALL, THOUGHT, WORDS, events
from tests.unit.recorded import ORIGIN, decision, numbered, session, used, written

SCHEMA = json.loads((Path(__file__).parents[2] / "docs" / "trajectory.schema.json").read_bytes())
VALIDATOR = jsonschema.Draft202012Validator(SCHEMA)
SYSTEM = {"role": "system", "content": "be brief"}
TOOLS = [{"type": "function", "function": {"name": "shell"}}]


class Told:
    """A session of calls with their contents."""

    def __init__(self, place: Path) -> None:
        self.store = Payloads(place / "store")
        self.events: list[Event] = []

    def kept(self, content: Content, data: bytes, call: int, *, is_whole: bool = True) -> PayloadKept:
        made = self.store.keep(content, data, expires=1)
        event = PayloadKept(ORIGIN, content, made.digest, len(data), is_whole, "m", 1, False, call)
        self.events.append(event)
        return event

    def call(self, number: int, prompt: object, body: bytes, **fields: Any) -> None:
        data = prompt if isinstance(prompt, bytes) else json.dumps(prompt).encode()
        self.kept(Content.PROMPT, data, number)
        self.events.append(used(call=number, **fields))
        self.kept(Content.RESPONSE, body, number)  # which may come behind the account

    def turns(self) -> list[Turn]:
        entries = written(session(*self.events))
        return list(trajectories(["session-1"], lambda _: numbered(entries), self.store))

    def lines(self) -> list[Any]:
        found = [json.loads(turn_line(turn)) for turn in self.turns()]
        for each in found:
            VALIDATOR.validate(each)
        return found


@pytest.fixture
def told(tmp_path: Path) -> Told:
    return Told(tmp_path)


def did(step: int, tool: str = "", verdict: Verdict = Verdict.ALLOW, **fields: Any) -> Decision:
    origin = replace(ORIGIN, step=step, tool=tool, **fields)
    return decision(Action(Kind.PROCESS_EXEC, Program("/bin/ls", ("ls",)), origin), verdict)


def prompts_of(lines: Iterable[Any]) -> list[list[Any]]:
    """All messages of each turn, as a reader puts them together."""
    found: list[list[Any]] = []
    last: list[Any] = []
    for line in lines:
        prompt = line["prompt"]
        if prompt["messages"] is not None:
            last = last[: prompt["messages_from"]] + prompt["messages"]
        found.append(last)
    return found


def chat(*messages: Any, **more: Any) -> dict[str, Any]:
    return {"model": "model-1", "temperature": 0.5, "messages": [SYSTEM, *messages], "tools": TOOLS, **more}


def test_a_conversation_with_its_actions_and_verdicts(told: Told) -> None:
    first, second = {"role": "user", "content": "go"}, {"role": "tool", "tool_call_id": "call_1", "content": "ls"}
    given = ALL["chat stream"]
    told.call(1, chat(first), given.body, opened=5, tools=given.answer.tools)
    told.events += [
        did(5, "call_1"),
        did(5, "call_2", Verdict.DENY),
        did(5, unexplained=True),
        did(6),
        decision(Action(Kind.MODEL_CALL, ModelCall("m"), replace(ORIGIN, step=5))),
    ]
    told.call(2, chat(first, second), ALL["chat body"].body, opened=0)
    one, two = told.lines()
    assert prompts_of((one, two)) == [[SYSTEM, first], [SYSTEM, first, second]]
    assert (two["prompt"]["messages_from"], len(two["prompt"]["messages"])) == (2, 1)
    assert one["prompt"]["request"] == {"model": "model-1", "temperature": 0.5}
    assert (one["prompt"]["tools"], two["prompt"]["tools"]) == (TOOLS, None)
    assert (one["text"], one["thinking"], one["api"]) == (WORDS, THOUGHT, "chat-completions")
    assert [call["id"] for call in one["tools"]] == ["call_1", "call_2"]
    assert [(each["tool"], each["verdict"], each["action"]) for each in one["actions"]] == [
        ("call_1", "allow", "process.exec"),
        ("call_2", "deny", "process.exec"),
    ]
    assert one["actions"][0]["subject"]["path"] == "/bin/ls"
    assert (one["turn"], two["turn"], one["complete"], one["missing"], two["actions"]) == (0, 1, True, [], [])
    assert (one["input_tokens"], one["cost"], one["currency"]) == (100, 1_500_000, "EUR")


@pytest.mark.parametrize("name", ALL)
def test_each_api(told: Told, name: str) -> None:
    given = ALL[name]
    body = {"model": "m", "input": "hello"} if name.startswith("responses") else {"model": "m", "messages": [1]}
    told.call(1, body, given.body)
    (line,) = told.lines()
    assert (line["api"], line["text"], line["thinking"]) == (given.api.value, WORDS, THOUGHT)
    assert line["prompt"]["messages"] == (["hello"] if name.startswith("responses") else [1])


def test_tokens_and_probabilities_where_the_upstream_told_them(told: Told) -> None:
    def chunk(token: str, number: int, logprob: float) -> dict[str, Any]:
        logprobs = {"content": [{"token": token, "logprob": logprob}]}
        return {"choices": [{"index": 0, "delta": {"content": token}, "logprobs": logprobs, "token_ids": [number]}]}

    start = {"prompt_token_ids": [1, 2], "choices": []}
    told.call(1, chat(), events(start, chunk("a", 7, -0.5), chunk("b", 8, -1.5)) + b"data: [DONE]\n\n")
    told.call(2, chat(), events(chunk("a", 7, float("-inf"))) + b"data: [DONE]\n\n")
    one, two = told.lines()
    assert one["sampled"] == {"prompt_ids": [1, 2], "ids": [7, 8], "tokens": ["a", "b"], "logprobs": [-0.5, -1.5]}
    assert two["sampled"]["ids"] == [7] and two["sampled"]["logprobs"] == []
    assert "sampled: a probability is no number" in two["missing"]


def test_actions_before_the_account_of_their_call_are_its_own(told: Told) -> None:
    """An agent acts on a tool call while the answer still comes."""
    told.events += [did(5, "call_1"), did(6), used(call=1, opened=5), did(5)]
    told.events += [did(number) for number in range(100, 100 + 2 * module.MAX_EARLY_STEPS)]
    told.events += [used(call=2, opened=100), used(call=3, opened=99 + 2 * module.MAX_EARLY_STEPS)]
    assert [[each["tool"] for each in line["actions"]] for line in told.lines()] == [["call_1", ""], [], [""]]


def test_conversations_are_told_apart(told: Told) -> None:
    told.call(1, chat(1), b"", conversation="a")
    told.call(2, chat(2), b"", conversation="b", parent="a")
    told.call(3, chat(1, 3), b"", conversation="a")
    found = told.lines()
    assert [(each["conversation"], each["turn"], each["parent"]) for each in found] == [
        ("a", 0, ""),
        ("a", 1, ""),
        ("b", 0, "a"),
    ]
    assert prompts_of(found[:2]) == [[SYSTEM, 1], [SYSTEM, 1, 3]]


def test_what_is_missing_is_named(told: Told) -> None:
    told.events.append(used(call=1))
    told.call(2, b"no json", b"<html>")
    told.call(3, b'{"a": NaN}', b"")
    told.call(4, b'{"a": 1e999}', b"")
    told.kept(Content.PROMPT, b'{"messages": [', 5, is_whole=False)
    told.events.append(used(call=5))
    told.store.erase(told.kept(Content.PROMPT, b"{}", 6).digest, lambda: None)
    told.events.append(used(call=6))
    told.events.append(used())
    found = told.lines()
    assert [each["missing"][0] for each in found[:5]] == [
        "prompt: it was not kept",
        "prompt: it is no JSON",
        "prompt: it is no JSON",
        "prompt: it is no JSON",
        "prompt: only its beginning was kept",
    ]
    assert "it is not there" in found[5]["missing"][0]
    assert all(each["prompt"]["messages"] is None and not each["complete"] for each in found)
    assert found[0]["tools"] == [{"id": "call_1", "name": "shell", "arguments": "{}"}]  # which the record has


def test_a_prompt_that_is_nested_deeply_is_left_out_or_whole(told: Told) -> None:
    for number, depth in enumerate((100, 300, 600, 900, 970, 990, 5000), 1):
        told.call(number, b'{"messages": ' + b"[" * depth + b"]" * depth + b"}", b"")
    for line in told.lines():
        assert line["prompt"]["messages"] is not None or line["missing"]


def test_it_is_bounded(told: Told, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "MAX_CALLS", 3)
    monkeypatch.setattr(module, "MAX_ACTIONS", 2)
    for number in range(1, 6):
        told.events += [used(call=number, opened=number + 3), did(number + 3), did(number + 3)]
    found = told.lines()
    assert len(found) == 3
    assert [(len(each["actions"]), each["actions_left_out"]) for each in found] == [(2, 0), (0, 2), (0, 2)]


NAMES = st.sampled_from("messages input tools".split())
JSON: st.SearchStrategy[Any] = st.deferred(
    lambda: (
        st.none()
        | st.booleans()
        | st.integers()
        | st.floats()
        | st.text(max_size=5)
        | st.lists(JSON, max_size=3)
        | st.dictionaries(NAMES, JSON, max_size=3)
    )
)


@settings(max_examples=60, suppress_health_check=[HealthCheck.function_scoped_fixture], deadline=None)
@given(st.lists(st.tuples(JSON, st.binary(max_size=20)), max_size=4))
def test_whatever_was_kept_a_line_has_the_documented_form(tmp_path: Path, kept: list[tuple[Any, bytes]]) -> None:
    told = Told(tmp_path)
    for number, (prompt, body) in enumerate(kept, 1):
        told.call(number, prompt, body)
    lines = told.lines()
    assert len(lines) == len(kept)
    prompts = [prompt for prompt, _ in kept]
    for line, prompt, found in zip(lines, prompts, prompts_of(lines), strict=True):
        messages = prompt.get("messages") if isinstance(prompt, dict) else None
        if isinstance(messages, list) and line["prompt"]["messages"] is not None:
            assert found == messages


def test_as_parquet(told: Told) -> None:
    given = ALL["messages stream"]
    told.call(1, chat({"role": "user", "content": "go"}), given.body, opened=5, tools=given.answer.tools)
    told.events.append(did(5, "call_1"))
    told.events.append(used("\ud800", call=2, tools=(ToolCall("\udfff", "x", "y"),)))
    file = io.BytesIO()
    turns = told.turns()
    assert write_turns(file, turns) == 2
    found = pyarrow.parquet.ParquetFile(pyarrow.BufferReader(file.getvalue()))
    assert found.schema_arrow.equals(turn_schema())
    assert found.schema_arrow.metadata[b"corral.schema"] == b"trajectory 1"
    first, second = found.read().to_pylist()
    assert json.loads(first["messages"]) == [SYSTEM, {"role": "user", "content": "go"}]
    assert [call["id"] for call in json.loads(first["tools"])] == ["call_1", "call_2"]
    assert json.loads(first["actions"])[0]["tool"] == "call_1"
    assert (first["text"], first["complete"], second["messages"]) == (WORDS, True, "null")
    assert second["model"] == "\ufffd"
    assert set(turn_row(turns[0])) == set(turn_schema().names)


def test_the_schema_is_about_just_the_fields_there_are(told: Told) -> None:
    told.call(1, chat(), ALL["chat body"].body, opened=5)
    told.events.append(did(5))
    (line,) = told.lines()
    for gone in line:
        with pytest.raises(jsonschema.ValidationError):
            VALIDATOR.validate({name: value for name, value in line.items() if name != gone})
    with pytest.raises(jsonschema.ValidationError):
        VALIDATOR.validate({**line, "more": 1})
