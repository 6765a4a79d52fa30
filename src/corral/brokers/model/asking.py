"""Requests to models, read strictly: what is judged here must be what the upstream reads.

JSON leaves open what a name that comes twice means, and some servers do not tell capital letters from others. What is
ambiguous like that is refused; all else goes on as the bytes that the client has sent. Where the upstream knows a model
by another name, nothing but that name is replaced.
"""

from __future__ import annotations

import json
import re
from dataclasses import dataclass
from typing import Any, NoReturn

from corral.modelapi.answer import Api, as_object
from corral.modelapi.values import values_in

MAX_MODEL = 256
"""Characters of a model's name."""
MAX_CHOICES = 128
MAX_VALUES = 200_000
"""Values in a body, all together: reading takes time and memory for each, however short it is."""
MAX_TURNS = 20_000
_MAX_TOKENS = 1 << 40
_MODEL = re.compile(r"[!-~]+")
_BLANK = re.compile(r"[ \t\r\n]*")

_READ = {
    Api.CHAT: frozenset("model messages stream n max_tokens max_completion_tokens".split()),
    Api.RESPONSES: frozenset(
        "model input instructions stream max_output_tokens previous_response_id conversation background".split()
    ),
    Api.MESSAGES: frozenset("model messages system stream max_tokens".split()),
}
"""The names that are read here."""
_REROUTING = frozenset(
    "models fallbacks fallback_models fallback_credit_token route provider api_base base_url api_key extra_body "
    "extra_headers custom_llm_provider workspace_id user_profile_id".split()
)
"""By these, upstreams and gateways to several of them take another model, place, key or account than those judged
here."""
_PLAIN_PRICE = {
    "service_tier": (None, "auto", "default", "flex", "standard", "standard_only"),
    "speed": (None, "standard"),
    "inference_geo": (None, "global"),
}
"""Fields that choose what a model costs, and what is no more than usual."""
_PRICED = frozenset(("stream_options", *_PLAIN_PRICE))
_OUTPUT = {
    Api.CHAT: ("max_completion_tokens", "max_tokens"),
    Api.RESPONSES: ("max_output_tokens",),
    Api.MESSAGES: ("max_tokens",),
}


class Unclear(Exception):
    """A request that cannot be judged; its text is for whoever asks."""


@dataclass(frozen=True, slots=True)
class Asked:
    """One request."""

    api: Api
    model: str
    """As it is asked for here."""
    stream: bool
    max_output: int | None
    """Tokens of each choice; None where the request does not say."""
    choices: int
    tells_usage: bool
    """The end of its answer says what it took."""
    extra: str
    """The field by which it asks for more than a model's plain price; empty where none does."""
    previous: str
    """The answer that it follows, where the upstream keeps conversations (Responses)."""
    values: dict[str, Any]
    """All of it, parsed."""
    body: bytes
    """As it came."""


def read(api: Api, body: bytes) -> Asked:
    """Raises Unclear."""
    values = _parse(body)
    known = _READ[api] | _PRICED
    for name in values:
        if name not in known and name.casefold() in known:
            raise Unclear(f"A request has no field {name[:100]!r}; names are written in small letters.")
        if name.casefold() in _REROUTING:
            raise Unclear(f"The field {name[:100]!r} is not taken here: which model is asked is what `model` says.")
    model = values.get("model")
    if type(model) is not str or not 0 < len(model) <= MAX_MODEL or not _MODEL.fullmatch(model):
        raise Unclear("`model` must be the name of a model.")
    if values.get("background"):
        raise Unclear("`background` is not taken here: an answer is waited for.")
    _check_list(api, values)
    stream = values.get("stream")
    if stream is not None and type(stream) is not bool:
        raise Unclear("`stream` must be true or false.")
    limits = [_count(values, name, _MAX_TOKENS) for name in _OUTPUT[api]]
    choices = _count(values, "n", MAX_CHOICES) if api is Api.CHAT else None
    return Asked(
        api,
        model,
        bool(stream),
        max((limit for limit in limits if limit is not None), default=None),
        1 if choices is None else max(1, choices),
        not stream or api is not Api.CHAT or as_object(values.get("stream_options")).get("include_usage") is True,
        next((name for name, plain in _PLAIN_PRICE.items() if values.get(name) not in plain), ""),
        _previous(values) if api is Api.RESPONSES else "",
        values,
        body,
    )


def _parse(body: bytes) -> dict[str, Any]:
    if values_in(body, MAX_VALUES) > MAX_VALUES:
        raise Unclear(f"The body has more than {MAX_VALUES:,} values.")
    try:
        text = body.decode("utf-8")
    except UnicodeDecodeError:
        raise Unclear("The body must be JSON in UTF-8.") from None
    try:
        values = json.loads(text, object_pairs_hook=_object, parse_constant=_constant)
    except RecursionError:
        raise Unclear("The body is nested too deeply.") from None
    except ValueError:
        raise Unclear("The body must be JSON.") from None
    if type(values) is not dict:
        raise Unclear("The body must be a JSON object.")
    return values


def _object(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    values = dict(pairs)
    if len(values) != len(pairs):
        raise Unclear("The body has the same name twice in one object.")
    return values


def _constant(_name: str) -> NoReturn:
    raise ValueError


def _count(values: dict[str, Any], name: str, most: int) -> int | None:
    value = values.get(name)
    if value is None:
        return None
    if type(value) is not int or not 0 <= value <= most:
        raise Unclear(f"`{name}` must be a whole number from 0 to {most}.")
    return value


def _check_list(api: Api, values: dict[str, Any]) -> None:
    name = "input" if api is Api.RESPONSES else "messages"
    given = values.get(name)
    if api is Api.RESPONSES and (given is None or type(given) is str):
        return
    if type(given) is not list or not all(type(each) is dict for each in given):
        raise Unclear(f"`{name}` must be a list of objects.")
    if len(given) > MAX_TURNS:
        raise Unclear(f"`{name}` has more than {MAX_TURNS:,} entries.")


def _previous(values: dict[str, Any]) -> str:
    previous = values.get("previous_response_id")
    if type(previous) is str:
        return previous
    conversation = values.get("conversation")
    if type(conversation) is dict:
        conversation = conversation.get("id")
    return conversation if type(conversation) is str else ""


def renamed(body: bytes, model: str) -> bytes:
    """The body with another model, and otherwise as it was. For one that :func:`read` has read."""
    text = body.decode("utf-8")
    decoder = json.JSONDecoder()
    at = _skip(text, _skip(text, 0) + 1)  # the brace
    while text[at] != "}":
        name, at = decoder.raw_decode(text, at)
        start = _skip(text, _skip(text, at) + 1)  # the colon
        _, end = decoder.raw_decode(text, start)
        if name == "model":
            return (text[:start] + json.dumps(model) + text[end:]).encode("utf-8")
        at = _skip(text, end)
        if text[at] == ",":
            at = _skip(text, at + 1)
    raise ValueError("the body has no model")


def _skip(text: str, at: int) -> int:
    found = _BLANK.match(text, at)
    return at if found is None else found.end()
