"""The scripted model server, by the official clients: what they read is what the script says."""

from __future__ import annotations

import json
import socket
import threading
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import anthropic
import openai
import pytest

from tests.models.script import (
    Call,
    Closes,
    Echoes,
    Endless,
    Errs,
    Fails,
    Form,
    Malformed,
    Script,
    Silent,
    Slow,
    Text,
    Thinking,
    Turn,
    Usage,
    huge,
    says,
)
from tests.models.server import KEY, ModelServer

USAGE = Usage(input=120, output=30, cached=40, reasoning=10)
PARTS = (
    Thinking("Zuerst überlegen: what does 東京 need? 🗼"),
    Text("I look at both."),
    Call("bash", {"command": "cat 'a b' | wc"}),
    Call("read", {"path": "/tmp/ü"}),
)
MAIN = Script("main", (Turn(PARTS, USAGE), says("Done. 完")), when="the task", tools=True)
OTHER = Script("other", (says("I am another"),), when="the other task")
CHAT_TOOLS: Any = [{"type": "function", "function": {"name": "bash", "parameters": {"type": "object"}}}]
RESPONSES_TOOLS: Any = [{"type": "function", "name": "bash", "parameters": {"type": "object"}, "strict": False}]
MESSAGES_TOOLS: Any = [{"name": "bash", "input_schema": {"type": "object"}}]
_OF_THE_CONNECTION = ("APIConnectionError", "RemoteProtocolError", "ReadError")
ARGUMENTS = [json.dumps({"command": "cat 'a b' | wc"}), json.dumps({"path": "/tmp/ü"})]


@pytest.fixture
def server() -> Iterator[ModelServer]:
    with ModelServer([MAIN, OTHER]) as server:
        yield server


def of_openai(server: ModelServer, key: str = KEY) -> openai.OpenAI:
    return openai.OpenAI(base_url=f"{server.url}/v1", api_key=key, max_retries=0, timeout=10)


def of_anthropic(server: ModelServer, key: str = KEY) -> anthropic.Anthropic:
    return anthropic.Anthropic(base_url=server.url, api_key=key, max_retries=0, timeout=10)


def serving(turn: Turn) -> ModelServer:
    return ModelServer([Script("one", (turn,))])


def chat(server: ModelServer, **more: Any) -> Any:
    return of_openai(server).chat.completions.create(
        model="scripted-1", messages=[{"role": "user", "content": "the task"}], **more
    )


def message(server: ModelServer, **more: Any) -> Any:
    return of_anthropic(server).messages.create(
        model="scripted-1", max_tokens=100, messages=[{"role": "user", "content": "the task"}], **more
    )


def response(server: ModelServer, **more: Any) -> Any:
    return of_openai(server).responses.create(model="scripted-1", input="the task", store=False, **more)


def test_chat_completions(server: ModelServer) -> None:
    done = chat(server, tools=CHAT_TOOLS)
    said = done.choices[0].message
    assert said.content == "I look at both." and said.reasoning_content == PARTS[0].text
    assert [call.id for call in said.tool_calls] == ["call_main_0_0", "call_main_0_1"]
    assert [call.function.arguments for call in said.tool_calls] == ARGUMENTS
    assert done.choices[0].finish_reason == "tool_calls"
    assert done.usage.prompt_tokens == 120 and done.usage.prompt_tokens_details.cached_tokens == 40
    assert done.usage.completion_tokens == 30 and done.usage.completion_tokens_details.reasoning_tokens == 10


def test_chat_completions_streamed(server: ModelServer) -> None:
    client = of_openai(server)
    with client.chat.completions.stream(
        model="scripted-1",
        messages=[{"role": "user", "content": "the task"}],
        tools=CHAT_TOOLS,
        stream_options={"include_usage": True},
    ) as stream:
        events = [event.type for event in stream]
        done = stream.get_final_completion()
    said = done.choices[0].message
    assert events.count("content.delta") > 1
    assert said.content == "I look at both."
    assert [call.id for call in said.tool_calls or ()] == ["call_main_0_0", "call_main_0_1"]
    assert [call.function.arguments for call in said.tool_calls or ()] == ARGUMENTS
    assert done.usage is not None and done.usage.total_tokens == 150


def test_a_stream_of_chat_completions_has_usage_only_if_asked(server: ModelServer) -> None:
    assert not any(chunk.usage for chunk in chat(server, stream=True))


def test_the_next_turn_of_chat_completions(server: ModelServer) -> None:
    client = of_openai(server)
    messages: list[Any] = [{"role": "user", "content": [{"type": "text", "text": "the task"}]}]
    for _ in range(2):  # a retry gets the same
        first = client.chat.completions.create(model="scripted-1", messages=messages, tools=CHAT_TOOLS)
        assert first.choices[0].message.tool_calls
    messages.append(first.choices[0].message.model_dump(exclude_none=True))
    messages += [{"role": "tool", "tool_call_id": f"call_main_0_{n}", "content": "fine"} for n in range(2)]
    second = client.chat.completions.create(model="scripted-1", messages=messages, tools=CHAT_TOOLS)
    assert second.choices[0].message.content == "Done. 完"
    assert server.asked("main") == [0, 0, 1] and not server.violations


def test_responses(server: ModelServer) -> None:
    done = response(server, tools=RESPONSES_TOOLS)
    assert done.output_text == "I look at both."
    assert [item.type for item in done.output] == ["reasoning", "message", "function_call", "function_call"]
    assert [item.call_id for item in done.output[2:]] == ["call_main_0_0", "call_main_0_1"]
    assert [item.arguments for item in done.output[2:]] == ARGUMENTS
    assert done.usage.input_tokens == 120 and done.usage.output_tokens_details.reasoning_tokens == 10


def test_responses_streamed_is_the_same(server: ModelServer) -> None:
    whole = response(server, tools=RESPONSES_TOOLS)
    with of_openai(server).responses.stream(
        model="scripted-1", input="the task", store=False, tools=RESPONSES_TOOLS
    ) as stream:
        events = [event.type for event in stream]
        done = stream.get_final_response()
    assert events[0] == "response.created" and events[-1] == "response.completed"
    assert events.count("response.function_call_arguments.delta") > 2
    assert [item.to_dict() for item in done.output] == [
        {**item.to_dict(), **({"parsed_arguments": None} if item.type == "function_call" else {})}
        if item.type != "message"
        else done.output[at].to_dict()
        for at, item in enumerate(whole.output)
    ]
    assert done.output_text == whole.output_text and done.usage == whole.usage


def test_the_next_turn_of_responses(server: ModelServer) -> None:
    first = response(server, tools=RESPONSES_TOOLS)
    given: list[Any] = [{"role": "user", "content": "the task"}]
    given += [item.to_dict() for item in first.output]
    given += [{"type": "function_call_output", "call_id": f"call_main_0_{n}", "output": "fine"} for n in range(2)]
    second = of_openai(server).responses.create(model="scripted-1", input=given, store=False, tools=RESPONSES_TOOLS)
    assert second.output_text == "Done. 完"


def test_messages(server: ModelServer) -> None:
    done = message(server, tools=MESSAGES_TOOLS)
    assert [block.type for block in done.content] == ["thinking", "text", "tool_use", "tool_use"]
    assert [block.id for block in done.content[2:]] == ["call_main_0_0", "call_main_0_1"]
    assert done.content[3].input == {"path": "/tmp/ü"} and done.stop_reason == "tool_use"
    assert (done.usage.input_tokens, done.usage.cache_read_input_tokens, done.usage.output_tokens) == (80, 40, 30)


def test_messages_streamed_is_the_same(server: ModelServer) -> None:
    whole = message(server, tools=MESSAGES_TOOLS)
    with of_anthropic(server).messages.stream(
        model="scripted-1", max_tokens=9, messages=[{"role": "user", "content": "the task"}], tools=MESSAGES_TOOLS
    ) as stream:
        events = [event.type for event in stream]
        done = stream.get_final_message()
    assert events[0] == "message_start" and events.count("input_json") > 2
    assert [block.to_dict() for block in done.content] == [block.to_dict() for block in whole.content]
    assert done.usage == whole.usage and done.stop_reason == "tool_use"


def test_the_next_turn_of_messages(server: ModelServer) -> None:
    first = message(server, tools=MESSAGES_TOOLS)
    results: Any = [{"type": "tool_result", "tool_use_id": f"call_main_0_{n}", "content": "fine"} for n in range(2)]
    second = of_anthropic(server).messages.create(
        model="scripted-1",
        max_tokens=9,
        messages=[
            {"role": "user", "content": "the task"},
            {"role": "assistant", "content": [block.to_dict() for block in first.content]},
            {"role": "user", "content": results},
        ],
        tools=MESSAGES_TOOLS,
    )
    assert second.content[0].text == "Done. 完"  # type: ignore[union-attr]


def test_tokens_are_counted_and_models_listed(server: ModelServer) -> None:
    counted = of_anthropic(server).messages.count_tokens(
        model="scripted-1", messages=[{"role": "user", "content": "hello" * 100}]
    )
    assert counted.input_tokens > 100
    assert of_openai(server).responses.input_tokens.count(model="scripted-1", input="hello" * 100).input_tokens > 100
    assert [model.id for model in of_openai(server).models.list()] == ["scripted-1"]
    assert [model.id for model in of_anthropic(server).models.list()] == ["scripted-1"]
    assert of_openai(server).models.retrieve("scripted-1").id == "scripted-1"


def test_conversations_are_told_apart_and_asides_answered(server: ModelServer) -> None:
    def ask(text: str, **more: Any) -> Any:
        return of_openai(server).chat.completions.create(
            model="scripted-1", messages=[{"role": "user", "content": text}], **more
        )

    with ThreadPoolExecutor(20) as pool:
        mine = [pool.submit(ask, "the task", tools=CHAT_TOOLS) for _ in range(20)]
        theirs = [pool.submit(ask, "the other task") for _ in range(20)]
        aside = pool.submit(ask, "a title for the task")
    assert {each.result().choices[0].message.content for each in mine} == {"I look at both."}
    assert {each.result().choices[0].message.content for each in theirs} == {"I am another"}
    assert aside.result().choices[0].message.content == "ok"
    assert len(server.received) == 41 and not server.violations


def test_whatever_comes_is_kept(server: ModelServer) -> None:
    with pytest.raises(openai.AuthenticationError):
        of_openai(server, "sk-other").chat.completions.create(model="m", messages=[])
    with pytest.raises(anthropic.AuthenticationError):
        of_anthropic(server, "sk-other").messages.create(model="m", max_tokens=1, messages=[])
    first, second = server.wait_for(2)
    assert first.header("Authorization") == "Bearer sk-other" and first.json["model"] == "m"
    told = (second.header("x-api-key"), second.header("authorization"))  # which of them: with the client's version
    assert told in (("sk-other", None), (None, "Bearer sk-other")) and second.path == "/v1/messages"
    assert b"sk-other" in first.raw and b'"model"' in first.raw and not server.violations


def test_what_no_script_has_is_a_violation(server: ModelServer) -> None:
    messages: Any = [{"role": "user", "content": "the other task"}, {"role": "assistant", "content": "x"}]
    with pytest.raises(openai.BadRequestError, match="one more was asked for"):
        of_openai(server).chat.completions.create(model="m", messages=messages)
    assert len(server.violations) == 1


# ---- misbehaviour ----


@pytest.mark.parametrize("ask", [chat, response, message])
@pytest.mark.parametrize("streamed", [False, True])
def test_a_failure_is_one_of_the_api(ask: Any, streamed: bool) -> None:
    turn = Turn(first=(Fails(429, "slow down", (("Retry-After", "7"),)), Fails(503)))
    with serving(turn) as server:
        with pytest.raises((openai.RateLimitError, anthropic.RateLimitError), match="slow down") as limited:
            ask(server, stream=streamed)
        told: Any = limited.value
        assert told.response.headers["retry-after"] == "7"
        with pytest.raises((openai.InternalServerError, anthropic.InternalServerError)):
            ask(server, stream=streamed)
        assert ask(server, stream=streamed)


@pytest.mark.parametrize("ask", [chat, response, message])
@pytest.mark.parametrize("reset", [False, True])
@pytest.mark.parametrize("streamed", [False, True])
def test_an_answer_can_break_off(ask: Any, reset: bool, streamed: bool) -> None:
    with serving(says("long " * 50, trouble=Closes(2, reset))) as server, pytest.raises(Exception) as broken:
        list(ask(server, stream=streamed))
    assert type(broken.value).__name__ in _OF_THE_CONNECTION


def test_a_reset_is_one() -> None:
    with serving(says("long", trouble=Closes(2, reset=True))) as server:
        body = json.dumps({"messages": [{"role": "user", "content": "x"}], "stream": True}).encode()
        with socket.create_connection(("127.0.0.1", server.port), timeout=10) as sock:
            head = f"Host: x\r\nAuthorization: Bearer {KEY}\r\nContent-Length: {len(body)}\r\n\r\n"
            sock.sendall(b"POST /v1/chat/completions HTTP/1.1\r\n" + head.encode() + body)
            with pytest.raises(ConnectionResetError):
                while sock.recv(4096):
                    pass


@pytest.mark.parametrize("ask", [chat, response, message])
def test_a_stream_can_say_that_it_fails(ask: Any) -> None:
    with serving(says("long " * 50, trouble=Errs(3))) as server:
        if ask is response:
            assert list(ask(server, stream=True))[-1].message == "scripted failure in the midst"
            return
        with pytest.raises((openai.APIError, anthropic.APIError), match="scripted failure"):
            list(ask(server, stream=True))


@pytest.mark.parametrize("form", Form)
@pytest.mark.parametrize("streamed", [False, True])
def test_an_answer_can_be_none(form: Form, streamed: bool) -> None:
    with serving(says("x", trouble=Malformed(form))) as server:
        try:
            done = chat(server, stream=streamed)
            told = list(done) if streamed else done.choices
        except Exception as error:  # of whichever layer of the client
            assert type(error).__name__ in (*_OF_THE_CONNECTION, "JSONDecodeError", "AttributeError", "TypeError")
            return
        assert not told or not hasattr(told[0], "choices") or form is Form.NOT_AN_OBJECT


def test_slow_and_silent_answers_are_waited_for() -> None:
    with serving(says("x", trouble=Slow(before=0.2, between=0.01))) as server:
        assert list(chat(server, stream=True))
    with serving(says("x", trouble=Silent())) as server:
        impatient = openai.OpenAI(base_url=f"{server.url}/v1", api_key=KEY, max_retries=0, timeout=0.3)
        with pytest.raises(openai.APITimeoutError):
            impatient.chat.completions.create(model="m", messages=[])
        wait_broken(server, "one_0")


@pytest.mark.parametrize("ask", [chat, response, message])
def test_an_endless_answer_ends_with_its_client(ask: Any) -> None:
    with serving(says("x", trouble=Endless())) as server:
        stream = ask(server, stream=True)
        for _, event in zip(range(50), stream, strict=False):
            last = event
        assert "xxxx" in last.to_json()
        stream.close()
        wait_broken(server, "one_0")


def test_an_endless_answer_ends_with_its_server() -> None:
    with serving(says("x", trouble=Endless())) as server:
        stream = chat(server, stream=True)
        next(iter(stream))
    stream.close()


def test_a_huge_answer_is_whole() -> None:
    with serving(huge(4 << 20)) as server:
        assert len(chat(server).choices[0].message.content) == 4 << 20


def test_the_fields_of_a_request_can_be_told_back() -> None:
    with serving(says("x", trouble=Echoes())) as server:
        assert KEY in chat(server).choices[0].message.content
        assert KEY in "".join(chunk.choices[0].delta.content or "" for chunk in chat(server, stream=True))


def test_nothing_is_left() -> None:
    before = threading.active_count()
    with ModelServer([OTHER]) as server:
        assert response(server)
    assert threading.active_count() <= before + 1  # a client's connection may still be kept


def wait_broken(server: ModelServer, name: str) -> None:
    for _ in range(400):
        if name in server.broken:
            return
        threading.Event().wait(0.05)
    raise AssertionError(f"{name} goes on")
