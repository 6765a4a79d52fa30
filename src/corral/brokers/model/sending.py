"""Which upstream a request goes to, and how often: in the order of the policy, again where that may help.

Asked again is what could not be reached or says that it has too much to do, after a wait that grows and that chance
shortens (full jitter), or as long as the upstream says. Once an answer has begun that is passed on, nothing is asked
again. When nobody answers better, the last answer is passed on as it is.
"""

from __future__ import annotations

import asyncio
import random
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from email.utils import parsedate_to_datetime
from time import time

from corral.brokers.model.asking import Asked, renamed
from corral.brokers.model.upstream import Client, Failed, Fields, Impatience, Reply
from corral.credentials.secret import Secret, inject, load
from corral.errors import RequestError
from corral.policy.matching import Matcher, text_glob
from corral.policy.model import ModelApi, Patience, Upstream

AGAIN = frozenset((429, 500, 502, 503, 504, 529))
"""Answers by which an upstream says that another time it may answer."""
FIRST_WAIT = 0.5
MOST_WAIT = 8.0
LONGEST_WAIT = 30.0
"""Seconds that an upstream may ask for; if it wants more, it is left alone."""
_KEPT = 1 << 20
"""Bytes of an answer that is passed on only if there is no better one."""
_FORWARDED = frozenset(
    b"accept content-type user-agent idempotency-key openai-beta anthropic-version anthropic-beta "
    b"anthropic-dangerous-direct-browser-access".split()
)
"""What goes on of a client's headers. Neither its own key, nor whose account (``openai-organization``,
``openai-project``) is to be charged: that is settled by the credential."""
_FORWARDED_PREFIX = b"x-stainless-"
_chance = random.SystemRandom()


@dataclass(frozen=True, slots=True)
class Ready:
    """An upstream that can be asked."""

    upstream: Upstream
    secret: Secret | None
    globs: tuple[Matcher, ...]
    names: Mapping[str, str]
    """Models by the names by which they are asked for here, and what the upstream calls them."""

    @property
    def name(self) -> str:
        return self.upstream.name

    @property
    def api(self) -> ModelApi:
        return self.upstream.api

    def has(self, model: str) -> bool:
        """Whether it is asked for that model."""
        return any(glob(model) for glob in self.globs)

    def url(self, path: str, query: str = "") -> str:
        """Of a path without ``/v1``."""
        version = "/v1" if self.api is ModelApi.ANTHROPIC else ""  # a base URL of OpenAI's clients has it
        return f"{self.upstream.url.rstrip('/')}{version}{path}{'?' if query else ''}{query}"

    def headers(self, fields: Fields) -> list[tuple[str, str]]:
        """What it gets of a client's headers, with the secret."""
        kept = [(name, value) for name, value in fields if name in _FORWARDED or name.startswith(_FORWARDED_PREFIX)]
        kept = [(name, value) for name, value in kept if value.isascii()]
        if not any(name == b"content-type" for name, _ in kept):
            kept.append((b"content-type", b"application/json"))
        kept.append((b"accept-encoding", b"identity"))
        if self.secret is not None:
            kept = inject(kept, self.secret)
        return [(name.decode("ascii"), value.decode("utf-8")) for name, value in kept]


def ready(upstream: Upstream, environment: Mapping[str, str] | None) -> Ready:
    """Reads its secret, but where ``environment`` is None. Raises RequestError."""
    secret = None
    if upstream.credential is not None and environment is not None:
        secret = load(upstream.credential, environment)
        try:
            secret.field()[1].decode("utf-8")
        except UnicodeDecodeError:
            raise RequestError(f"the credential from {upstream.credential.source} is no UTF-8") from None
    return Ready(upstream, secret, tuple(map(text_glob, upstream.models)), dict(upstream.rename))


@dataclass(frozen=True, slots=True)
class Errand:
    """What is sent, wherever it goes."""

    asked: Asked
    path: str
    """Without ``/v1``."""
    query: str
    headers: Fields
    """The client's."""


class Kept:
    """An answer that is there as a whole."""

    def __init__(self, status: int, headers: Fields, body: bytes) -> None:
        self.status, self.headers = status, headers
        self.length: int | None = len(body)
        self._body = body

    async def read(self) -> bytes:
        body, self._body = self._body, b""
        return body

    def close(self) -> None:
        """Nothing is open."""


class Sending:
    """One request on its way to an answer."""

    def __init__(self, client: Client, patience: Patience, watch: Impatience) -> None:
        self._client, self._patience, self._watch = client, patience, watch
        self.upstream: Ready | None = None
        """Who was asked last."""
        self.was_sent = False
        """Somebody may have begun to work."""

    async def send(self, candidates: Sequence[Ready], errand: Errand) -> Reply:
        """The first of ``candidates`` that answers well, or the last answer. Raises Failed."""
        answer: tuple[Ready, Kept] | None = None
        failure = Failed("there is none", was_sent=False)
        for candidate in candidates:
            for attempt in range(self._patience.retries + 1):
                self.upstream = candidate
                is_last = candidate is candidates[-1] and attempt == self._patience.retries
                try:
                    reply = await self._try(candidate, errand)
                    if is_last or reply.status not in AGAIN:
                        return reply
                    kept = await self._keep(reply)
                except Failed as failed:
                    failure, wait = failed, 0.0
                else:
                    answer = (candidate, kept)
                    wait = wanted_wait(reply.headers)
                    if is_hopeless(kept.headers):
                        break
                if attempt == self._patience.retries or wait > LONGEST_WAIT:
                    break
                self._watch.rest()
                most = min(MOST_WAIT, FIRST_WAIT * 2**attempt)
                await asyncio.sleep(wait + _chance.uniform(0, most))
        if answer is None:
            raise failure
        self.upstream = answer[0]
        return answer[1]

    async def _try(self, candidate: Ready, errand: Errand) -> Reply:
        patience, asked = self._patience, errand.asked
        body = asked.body
        if (name := candidate.names.get(asked.model, asked.model)) != asked.model:
            body = renamed(body, name)
        self._watch.expect(patience.connect + patience.first, "its answer did not begin in time")
        url = candidate.url(errand.path, errand.query)
        before, self.was_sent = self.was_sent, True
        try:
            return await self._client.ask("POST", url, candidate.headers(errand.headers), body)
        except Failed as failed:
            self.was_sent = before or failed.was_sent
            raise

    async def _keep(self, reply: Reply) -> Kept:
        body = bytearray()
        try:
            while True:
                self._watch.expect(self._patience.idle, "its answer stopped")
                data = await reply.read()
                if not data:
                    break
                body += data
                if len(body) > _KEPT:
                    raise Failed("its answer is too long", was_sent=True)
        finally:
            reply.close()
        return Kept(reply.status, reply.headers, bytes(body))


def is_hopeless(headers: Fields) -> bool:
    """Whether an upstream says that asking again is of no use."""
    return any(name == b"x-should-retry" and value.lower() == b"false" for name, value in headers)


def wanted_wait(headers: Fields) -> float:
    """Seconds after which an upstream wants to be asked again (RFC 9110, section 10.2.3; OpenAI's is in milliseconds).
    0 where it does not say."""
    values = dict(headers)
    try:
        if (wanted := values.get(b"retry-after-ms")) is not None:
            return max(0.0, float(wanted) / 1000)
        if (wanted := values.get(b"retry-after")) is None:
            return 0.0
        if wanted.strip().isdigit():
            return float(wanted)
        return max(0.0, parsedate_to_datetime(wanted.decode("ascii")).timestamp() - time())
    except (ValueError, OverflowError):
        return 0.0
