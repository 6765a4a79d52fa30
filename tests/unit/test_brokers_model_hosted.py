"""What an upstream would do by itself is a way out through the door that is open: it is denied, and recorded."""

from __future__ import annotations

import json
from collections.abc import AsyncIterator
from typing import Any

import pytest

from corral.actions import Ending, Verdict
from corral.policy.model import ModelApi
from tests.unit.model_world import ScriptedUpstream, model, upstream, world
from tests.unit.test_brokers_model import CHAT, MESSAGES, RESPONSES, asks, says_whole, used

FUNCTION = {"type": "function", "name": "f", "parameters": {"type": "object", "properties": {"url": {"type": "null"}}}}
WEB = "https://collector.example/?q=secret"
INLINE = "data:image/png;base64,iVBORw0KGgo="


@pytest.fixture
async def up() -> AsyncIterator[ScriptedUpstream]:
    async with ScriptedUpstream(says_whole) as made:
        yield made


def chat(**rest: Any) -> tuple[str, dict[str, Any]]:
    return CHAT, asks(**rest)


def responses(*turns: Any, **rest: Any) -> tuple[str, dict[str, Any]]:
    return RESPONSES, {"model": "m", "input": list(turns) or "hi", **rest}


def messages(*blocks: Any, **rest: Any) -> tuple[str, dict[str, Any]]:
    turns = [{"role": "user", "content": list(blocks) or "hi"}]
    return MESSAGES, {"model": "m", "max_tokens": 9, "messages": turns, **rest}


def says(*blocks: Any) -> dict[str, Any]:
    return {"role": "user", "content": list(blocks)}


def picture(url: Any) -> dict[str, Any]:
    return {"type": "image_url", "image_url": url}


def typed(kind: str) -> dict[str, Any]:
    return {"type": kind}


def source(**of: Any) -> dict[str, Any]:
    return {"type": "image", "source": of}


HOSTED = {
    "search": responses(tools=[{"type": "web_search"}]),
    "search that may go out": responses(tools=[{"type": "web_search", "external_web_access": True}]),
    "beside a function": responses(tools=[FUNCTION, {"type": "web_search_preview"}]),
    "mcp": responses(tools=[{"type": "mcp", "server_label": "x", "server_url": WEB}]),
    "code": responses(tools=[{"type": "code_interpreter", "container": {"type": "auto"}}]),
    "shell of the upstream": responses(tools=[{"type": "shell", "environment": {"type": "container_auto"}}]),
    "in a namespace": responses(tools=[{"type": "namespace", "tools": [{"type": "mcp"}]}]),
    "in a turn": responses({"type": "additional_tools", "role": "developer", "tools": [{"type": "mcp"}]}),
    "in a result": responses({"type": "tool_search_output", "tools": [{"type": "mcp"}]}),
    "unheard of": responses(tools=[{"type": "teleport"}]),
    "in capitals": responses(tools=[{"type": "MCP"}]),
    "anthropic search": messages(tools=[{"type": "web_search_20250305", "name": "web_search"}]),
    "anthropic fetch": messages(tools=[{"type": "web_fetch_20260318", "name": "web_fetch"}]),
    "anthropic code": messages(tools=[{"type": "code_execution_20250825", "name": "x"}]),
    "anthropic toolset": messages(tools=[{"type": "mcp_toolset", "mcp_server_name": "x"}]),
    "anthropic servers": messages(mcp_servers=[{"type": "url", "name": "x", "url": WEB}]),
    "anthropic container": messages(container={"skills": []}),
    "anthropic inline": messages(
        {"type": "tool_addition", "tool": {"type": "tool_definition", "definition": {"type": "mcp_toolset"}}}
    ),
    "chat search": chat(web_search_options={}),
    "xai": chat(search_parameters={"mode": "on"}),
    "azure": chat(data_sources=[{"type": "azure_search"}]),
    "openrouter": chat(plugins=[{"id": "web"}]),
}
REMOTE = {
    "picture": chat(messages=[says(picture({"url": WEB}))]),
    "picture as text": chat(messages=[says(picture(WEB))]),
    "picture in a result": chat(messages=[{"role": "tool", "tool_call_id": "c", "content": [picture({"url": WEB})]}]),
    "blank before": chat(messages=[says(picture({"url": f" {WEB}"}))]),
    "no scheme": chat(messages=[says(picture({"url": "//collector.example/x"}))]),
    "other type": chat(messages=[says(picture({"url": {"x": 1}}))]),
    "video": chat(messages=[says({"type": "video_url", "video_url": {"url": WEB}})]),
    "file as data": chat(messages=[says({"type": "file", "file": {"filename": "x", "file_data": WEB}})]),
    "sound as data": chat(messages=[says({"type": "input_audio", "input_audio": {"data": WEB, "format": "mp3"}})]),
    "frames": chat(messages=[says({"type": "video", "video": [INLINE, "file:///etc/passwd"]})]),
    "file by id": chat(messages=[says({"type": "file", "file": {"file_id": "file-1"}})]),
    "responses picture": responses(says({"type": "input_image", "image_url": WEB})),
    "responses file": responses(says({"type": "input_file", "file_url": WEB})),
    "responses file by id": responses(says({"type": "input_file", "file_id": "file-1"})),
    "responses result": responses(
        {"type": "function_call_output", "call_id": "c", "output": [{"type": "input_image", "image_url": WEB}]}
    ),
    "screenshot": responses(
        {"type": "computer_call_output", "call_id": "c", "output": {"type": "computer_screenshot", "image_url": WEB}}
    ),
    "prompt": responses(prompt={"id": "pmpt_1"}),
    "anthropic picture": messages(source(type="url", url=WEB)),
    "anthropic type left out": messages(source(url=WEB)),
    "anthropic file": messages(source(type="file", file_id="file_1")),
    "anthropic result": messages({"type": "tool_result", "tool_use_id": "t", "content": [source(type="url", url=WEB)]}),
    "anthropic in a document": messages(
        {"type": "document", "source": {"type": "content", "content": [source(type="url", url=WEB)]}}
    ),
    "anthropic system": messages(system=[source(type="url", url=WEB)]),
    "anthropic upload": messages({"type": "container_upload", "file_id": "file_1"}),
}
PLAIN = {
    "functions": chat(tools=[{"type": "function", "function": {"name": "web_search", "parameters": {}}}]),
    "a function without a type": chat(tools=[{"function": {"name": "f"}}]),
    "tools of the client": responses(
        tools=[
            FUNCTION,
            *map(typed, ("custom", "local_shell", "shell", "apply_patch", "computer", "tool_search")),
            {"type": "shell", "environment": {"type": "local"}},
            {"type": "namespace", "name": "n", "tools": [FUNCTION]},
        ]
    ),
    "a search of what is there": responses(tools=[{"type": "web_search", "external_web_access": False}]),
    "none": responses(tools=None),
    "anthropic": messages(
        tools=[
            {"name": "x", "input_schema": {}},
            *map(typed, ("custom", "bash_20250124", "text_editor_20250728", "computer_20251124", "memory_20250818")),
            typed("tool_search_tool_bm25_20251119"),
        ]
    ),
    "off": chat(web_search_options=None, plugins=[]),
    "a picture in it": chat(messages=[says(picture({"url": INLINE}))]),
    "what a model said": messages(
        {"type": "tool_use", "id": "t", "name": "fetch", "input": {"file_id": "1", "image_url": WEB, "Type": 1}}
    ),
    "what it was shown": messages({"type": "text", "text": "x", "citations": [{"type": "char_location", "url": WEB}]}),
    "a call": responses({"type": "computer_call", "call_id": "c", "action": {"type": "open", "file_url": WEB}}),
    "an address in a text": messages(
        {"type": "document", "source": {"type": "text", "media_type": "text/plain", "data": f"{WEB} says"}}
    ),
    "sound": chat(messages=[says({"type": "input_audio", "input_audio": {"data": "//uQxAAA", "format": "mp3"}})]),
    "base64": messages(source(type="base64", media_type="image/png", data="iVBORw0KGgo=")),
}


def api_of(path: str) -> ModelApi:
    return ModelApi.ANTHROPIC if path == MESSAGES else ModelApi.OPENAI


@pytest.mark.parametrize("name", [*HOSTED, *REMOTE])
async def test_what_an_upstream_would_do_itself_is_denied_and_recorded(up: ScriptedUpstream, name: str) -> None:
    path, body = {**HOSTED, **REMOTE}[name]
    async with world(model(upstream(up, api_of(path)))) as made:
        answer = await made.post(path, body)
        account = await used(made)
        (decision,) = made.told.decisions
    rule = "model.hosted_tools" if name in HOSTED else "model.remote_content"
    assert not up.seen
    assert answer.status == 403 and answer.headers["x-should-retry"] == "false"
    assert "policy does not let it" in answer.json["error"]["message"]
    assert (account.ending, account.rule) == (Ending.REFUSED, rule)
    assert (decision.verdict, decision.rule) == (Verdict.DENY, rule)


@pytest.mark.parametrize("name", HOSTED)
async def test_a_policy_may_let_it_run_tools(up: ScriptedUpstream, name: str) -> None:
    path, body = HOSTED[name]
    async with world(model(upstream(up, api_of(path)), hosted_tools=("*",))) as made:
        assert (await made.post(path, body)).status == 200


@pytest.mark.parametrize("name", REMOTE)
async def test_a_policy_may_let_it_fetch(up: ScriptedUpstream, name: str) -> None:
    path, body = REMOTE[name]
    async with world(model(upstream(up, api_of(path)), remote_content=True)) as made:
        assert (await made.post(path, body)).status == 200


@pytest.mark.parametrize("name", PLAIN)
async def test_what_the_agent_does_itself_goes_on(up: ScriptedUpstream, name: str) -> None:
    path, body = PLAIN[name]
    async with world(model(upstream(up, api_of(path)))) as made:
        assert (await made.post(path, body)).status == 200
    assert up.seen[0].json == body


async def test_only_the_tools_that_are_named_are_let(up: ScriptedUpstream) -> None:
    async with world(model(upstream(up), hosted_tools=("web_search*",))) as made:
        assert (await made.post(*responses(tools=[{"type": "web_search_preview"}]))).status == 200
        assert (await made.post(*responses(tools=[{"type": "web_search"}, {"type": "mcp"}]))).status == 403


@pytest.mark.parametrize(
    "case",
    [
        responses(tools={"type": "mcp"}),
        responses(tools=["mcp"]),
        responses(tools=[{"type": ["mcp"]}]),
        responses(tools=[{"name": "x"}]),
        responses(tools=[{"type": "m\u0000cp"}]),
        responses(Tools=[{"type": "mcp"}]),
        responses(tools=[{"type": "function", "Type": "mcp"}]),
        responses(says({"type": "input_image", "Image_URL": WEB})),
        chat(**{"Web_Search_Options": {}}),
        messages({"type": "image", "\u017fource": {"type": "url", "url": WEB}}),
        messages(source(type="base64", data="aa", URL=WEB)),
        chat(provider={"order": ["x"]}),
        messages(fallbacks=[{"model": "other"}]),
    ],
)
async def test_what_may_mean_two_things_is_not_sent(up: ScriptedUpstream, case: tuple[str, dict[str, Any]]) -> None:
    path, body = case
    async with world(model(upstream(up, api_of(path)))) as made:
        answer = await made.post(path, json.dumps(body).encode())
    assert answer.status == 400 and not up.seen


async def test_a_tool_does_not_take_another_model(up: ScriptedUpstream) -> None:
    """Of the upstream's: the policy would not be asked."""
    path, body = messages(tools=[{"type": "advisor_20260301", "name": "advisor", "model": "denied"}])
    async with world(model(upstream(up, ModelApi.ANTHROPIC), hosted_tools=("*",))) as made:
        assert (await made.post(path, body)).status == 400
    assert not up.seen
