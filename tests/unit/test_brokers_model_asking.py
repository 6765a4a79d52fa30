"""What is read of requests, and how one is renamed."""

from __future__ import annotations

import json
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from corral.brokers.model.asking import Unclear, read, renamed
from corral.brokers.model.turns import talk_of
from corral.modelapi.answer import Api

JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False, allow_infinity=False) | st.text(),
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(st.text(), inner, max_size=4),
    max_leaves=12,
)
OTHERS = st.dictionaries(st.text(min_size=1), JSON, max_size=5)
SPACES = st.sampled_from([(",", ":"), (", ", ": "), (" ,\n\t", "\r\n: ")])


@given(others=OTHERS, after=OTHERS, separators=SPACES, ascii_only=st.booleans())
def test_renaming_changes_nothing_but_the_model(
    others: dict[str, Any], after: dict[str, Any], separators: tuple[str, str], ascii_only: bool
) -> None:
    values = {**others, "model": "ours", **{name: each for name, each in after.items() if name != "model"}}
    values["model"] = "ours"
    body = json.dumps(values, separators=separators, ensure_ascii=ascii_only).encode("utf-8", "surrogatepass")
    try:
        body.decode("utf-8")
    except UnicodeDecodeError:
        return
    changed = renamed(body, 'their "ü" 1')
    assert json.loads(changed) == {**values, "model": 'their "ü" 1'}
    at = next(at for at in range(len(body)) if body[at : at + 1] != changed[at : at + 1])
    rest = len(body) - at - len(b"ours") - 1
    assert body[len(body) - rest :] == changed[len(changed) - rest :]


@given(JSON, st.sampled_from(Api))
def test_whatever_is_asked_is_read_or_unclear(values: Any, api: Api) -> None:
    _read(api, values)
    _read(api, {"model": "m", "input" if api is Api.RESPONSES else "messages": values})
    _read(api, {"model": "m", "input" if api is Api.RESPONSES else "messages": [{"role": "user", "content": values}]})
    turn = {"type": "function_call_output", "role": "tool", "output": values, "content": values, "tool_calls": values}
    _read(api, {"model": "m", "input" if api is Api.RESPONSES else "messages": [turn]})


def _read(api: Api, values: Any) -> None:
    from corral.brokers.model.results import results_of

    try:
        asked = read(api, json.dumps(values).encode())
        talk_of(asked)
        results_of(asked)
    except Unclear:
        pass


@pytest.mark.parametrize(
    ("api", "values", "most"),
    [
        (Api.CHAT, {"max_tokens": 5}, 5),
        (Api.CHAT, {"max_tokens": 5, "max_completion_tokens": 9}, 9),
        (Api.CHAT, {"max_output_tokens": 5}, None),
        (Api.RESPONSES, {"max_output_tokens": 5}, 5),
        (Api.MESSAGES, {"max_tokens": 5}, 5),
        (Api.MESSAGES, {"max_tokens": None}, None),
    ],
)
def test_the_bound_of_the_output(api: Api, values: dict[str, Any], most: int | None) -> None:
    name = "input" if api is Api.RESPONSES else "messages"
    assert read(api, json.dumps({"model": "m", name: [], **values}).encode()).max_output == most


@pytest.mark.parametrize(
    "name", ["MODEL", "Stream", "me\u017f\u017fages", "modeL", "Max_Tokens", "N", "maX_Completion_Tokens"]
)
def test_names_that_some_servers_take_for_others(name: str) -> None:
    with pytest.raises(Unclear, match="small letters"):
        read(Api.CHAT, json.dumps({"model": "m", "messages": [], name: 1}).encode())


def test_what_is_not_read_here_may_be_anything() -> None:
    body = b'{"model": "m", "messages": [], "vendor": {"Model": [1, null]}, "temperature": 1e3}'
    assert read(Api.CHAT, body).body == body


def test_turns_are_bounded() -> None:
    body = json.dumps({"model": "m", "messages": [{}] * 20_001}).encode()
    with pytest.raises(Unclear, match="20,000"):
        read(Api.CHAT, body)
