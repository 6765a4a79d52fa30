"""What can be asked of the broker: the paths of the APIs, exactly as their clients write them."""

from __future__ import annotations

import re
from dataclasses import dataclass
from enum import Enum
from urllib.parse import parse_qsl

from corral.brokers.http import Request
from corral.modelapi.answer import Api
from corral.policy.model import ModelApi


class Aim(Enum):
    """What a request is for."""

    CALL = "call"
    COUNT = "count"
    """Of tokens, without an answer."""
    LIST = "list"
    """The models, or one of them."""


@dataclass(frozen=True, slots=True)
class Route:
    """Where a request leads."""

    aim: Aim
    family: ModelApi
    path: str
    """Of the upstream, without ``/v1``."""
    api: Api = Api.CHAT
    """Of calls."""
    model: str = ""
    """Of a list: the one that is meant."""

    @property
    def is_count(self) -> bool:
        return self.aim is Aim.COUNT

    @property
    def method(self) -> str:
        return "GET" if self.aim is Aim.LIST else "POST"


_CALLS = {
    "/chat/completions": Route(Aim.CALL, ModelApi.OPENAI, "/chat/completions", Api.CHAT),
    "/responses": Route(Aim.CALL, ModelApi.OPENAI, "/responses", Api.RESPONSES),
    "/messages": Route(Aim.CALL, ModelApi.ANTHROPIC, "/messages", Api.MESSAGES),
    "/messages/count_tokens": Route(Aim.COUNT, ModelApi.ANTHROPIC, "/messages/count_tokens", Api.MESSAGES),
}
_UNVERSIONED = ("/chat/completions", "/responses", "/models")
"""Clients of OpenAI's put ``/v1`` into the base URL, or forget it."""
_MODEL = re.compile(r"/[!-~]{1,256}")
_PARAMETERS = frozenset(("beta", "api-version", "limit", "after_id", "before_id"))
"""Of queries; others could ask an upstream for something that is not seen here."""


def family_of(request: Request) -> ModelApi:
    """Whose client it is."""
    is_anthropic = request.header(b"anthropic-version") is not None or request.path.startswith("/v1/messages")
    return ModelApi.ANTHROPIC if is_anthropic else ModelApi.OPENAI


def route_of(request: Request) -> Route | None:
    """None where it leads nowhere. Its method may be another than the route's."""
    path = request.path
    if path.startswith("/v1/"):
        path = path.removeprefix("/v1")
    elif not path.startswith(_UNVERSIONED):
        return None
    if found := _CALLS.get(path):
        return found
    name = path.removeprefix("/models")
    if name == path or (name and not _MODEL.fullmatch(name)):
        return None
    return Route(Aim.LIST, family_of(request), "/models", model=name[1:])


def is_plain(query: str) -> bool:
    """Whether a query has only what is known."""
    if not query:
        return True
    try:
        pairs = parse_qsl(query, keep_blank_values=True, strict_parsing=True, max_num_fields=8)
    except ValueError:
        return False
    return query.isascii() and query.isprintable() and all(name in _PARAMETERS for name, _ in pairs)
