"""The models that may be asked for here: what the upstreams say that they have, as far as the policy allows or asks."""

from __future__ import annotations

import asyncio
import json
from collections.abc import Iterable, Sequence
from typing import Any

from corral.brokers.model.sending import Ready
from corral.brokers.model.upstream import Client, Failed, Fields
from corral.modelapi.answer import as_object, list_in, text_in
from corral.policy.matching import Models
from corral.policy.model import Model, ModelApi

MAX_LIST = 4 << 20
"""Bytes of an upstream's list."""
MAX_MODELS = 10_000
SECONDS = 30.0
"""For an upstream to say it."""
FRESH = 60.0
"""Seconds for which it is not asked again, whatever it has said."""
_HEADERS: Fields = ((b"anthropic-version", b"2023-06-01"),)
"""Nothing of the agent's is in what an upstream is asked here: nobody decides on it, and nothing records it."""


class Listing:
    """Of one sandbox. For one loop."""

    def __init__(self, model: Model, upstreams: Sequence[Ready], client: Client | None) -> None:
        """Without a client the names of the policy are all there is."""
        self._model, self._upstreams, self._client = model, upstreams, client
        self._allow, self._ask, self._deny = Models(model.allow), Models(model.ask), Models(model.deny)
        self._known: dict[str, tuple[float, list[dict[str, Any]]]] = {}
        self._lock = asyncio.Lock()

    async def models(self, api: ModelApi) -> list[dict[str, Any]]:
        """What each is as its upstream says it, by the name by which it is asked for here."""
        found: dict[str, dict[str, Any]] = {}
        async with self._lock:  # one question for all who want to know
            for upstream in self._upstreams:
                if upstream.api is api:
                    for each in await self._of(upstream):
                        found.setdefault(each["id"], each)
        return list(found.values())

    def _may(self, name: str) -> bool:
        return not self._deny.all(name) and bool(self._allow.all(name) or self._ask.all(name))

    async def _of(self, upstream: Ready) -> list[dict[str, Any]]:
        now = asyncio.get_running_loop().time()
        known = self._known.get(upstream.name)
        if known is not None and now - known[0] < FRESH:
            return known[1]
        try:
            async with asyncio.timeout(SECONDS):
                listed = await self._ask_for(upstream)
        except (Failed, TimeoutError, ValueError, RecursionError):
            listed = [_entry(upstream.api, name) for name in self._named(upstream)]
        models = list(self._here(upstream, listed))
        self._known[upstream.name] = (now, models)
        return models

    async def _ask_for(self, upstream: Ready) -> list[dict[str, Any]]:
        if self._client is None:
            raise Failed("nothing is asked for here", was_sent=False)
        is_anthropic = upstream.api is ModelApi.ANTHROPIC
        url = upstream.url("/models", "limit=1000" if is_anthropic else "")
        reply = await self._client.ask("GET", url, upstream.headers(_HEADERS if is_anthropic else ()), None)
        try:
            body = bytearray()
            while data := await reply.read():
                body += data
                if len(body) > MAX_LIST:
                    raise Failed("its list is too long", was_sent=True)
        finally:
            reply.close()
        if reply.status != 200:
            raise Failed("it has no list", was_sent=True)
        whole = bytes(body) if upstream.secret is None else upstream.secret.scrubbed(bytes(body))
        values = as_object(json.loads(whole.decode("utf-8")))
        if type(values.get("data")) is not list:
            raise Failed("its list is none", was_sent=True)
        return [as_object(each) for each in list_in(values, "data")[:MAX_MODELS]]

    def _here(self, upstream: Ready, listed: Iterable[dict[str, Any]]) -> Iterable[dict[str, Any]]:
        for each in listed:
            theirs = text_in(each, "id")
            ours = [name for name, known in upstream.names.items() if known == theirs]
            if theirs not in upstream.names:
                ours.append(theirs)  # that name means itself
            for name in ours:
                if name and upstream.has(name) and self._may(name):
                    yield {**each, "id": name}

    def _named(self, upstream: Ready) -> Iterable[str]:
        """As the upstream calls them."""
        rules = [rule.name for rule in (*self._model.allow, *self._model.ask)]
        names = dict.fromkeys([*rules, *upstream.upstream.models, *upstream.names])
        return (upstream.names.get(name, name) for name in names if not set(name) & set("*?[]{}"))


def _entry(api: ModelApi, name: str) -> dict[str, Any]:
    if api is ModelApi.ANTHROPIC:
        return {"type": "model", "id": name, "display_name": name, "created_at": "1970-01-01T00:00:00Z"}
    return {"id": name, "object": "model", "created": 0, "owned_by": "upstream"}


def as_list(api: ModelApi, models: Sequence[dict[str, Any]]) -> dict[str, Any]:
    """As the API writes them."""
    if api is not ModelApi.ANTHROPIC:
        return {"object": "list", "data": list(models)}
    first, last = (models[0]["id"], models[-1]["id"]) if models else (None, None)
    return {"data": list(models), "has_more": False, "first_id": first, "last_id": last}
