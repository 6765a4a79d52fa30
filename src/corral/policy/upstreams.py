"""What a policy file says of models beside its rules: where they are, what they cost, how much may be used."""

from __future__ import annotations

import re
from typing import Annotated

from pydantic import AfterValidator, Field, WithJsonSchema, model_validator

from corral.policy.fields import MAX_ENTRIES, Duration, Filled, Label, Strict, word_glob
from corral.policy.flow_rules import CredentialFile
from corral.policy.matching import text_glob
from corral.policy.model import Budget, Guard, ModelApi, Patience, Price, Treatment, Upstream
from corral.policy.notation import Entry, choices, distinct, word_of
from corral.policy.places import IN_CLEAR, WebUrl, is_in_clear

MAX_UPSTREAMS = 64
MAX_SCANNERS = 16
_MAX_COUNT = 10**15
_BUDGET = Budget()
_PATIENCE = Patience()
_GUARD = Guard()


def model_name(text: str) -> str:
    """The name of one model."""
    if not text or not text.isprintable() or " " in text or len(text) > 255 or set(text) & set("*?\\"):
        raise ValueError("holds what is not the name of one model (no blanks, no patterns, at most 255 characters)")
    return text


_CURRENCY = re.compile(r"[A-Z]{3}")


def _currency(text: str) -> str:
    if not _CURRENCY.fullmatch(text):
        raise ValueError("must be the three letters of a currency (ISO 4217: `USD`)")
    return text


_MODEL_GLOB = Annotated[str, AfterValidator(word_glob), WithJsonSchema({"type": "string", "minLength": 1})]
_MODEL_NAME = Annotated[str, AfterValidator(model_name)]
HostedTools = Annotated[tuple[_MODEL_GLOB, ...], Field(max_length=MAX_ENTRIES)]
_MODEL_GLOBS = Annotated[tuple[_MODEL_GLOB, ...], Field(max_length=MAX_ENTRIES), *Filled]
_AMOUNT = Annotated[float, Field(ge=0, le=1_000_000, allow_inf_nan=False)]
_COUNT = Annotated[int, Field(ge=1, le=_MAX_COUNT)]
_RATE = Annotated[int, Field(ge=1, le=1_000_000)]
_AT_ONCE = Annotated[int, Field(ge=1, le=65_535)]
_MONEY = Annotated[float, Field(ge=0.000001, le=1_000_000_000, allow_inf_nan=False)]
Currency = Annotated[str, AfterValidator(_currency), WithJsonSchema({"type": "string", "pattern": "^[A-Z]{3}$"})]


class UpstreamFile(Entry):
    """Where models are outside."""

    name: Label
    """What records call it."""
    url: WebUrl
    """What comes before the paths of its API, as its own clients want it."""
    api: Annotated[ModelApi, choices(ModelApi), word_of(ModelApi, "an API of models that is known")]
    """What it speaks: `openai` (Chat Completions and Responses) or `anthropic` (Messages)."""
    models: _MODEL_GLOBS = ("*",)
    """Globs of the names by which it is asked for models. Left out: any."""
    credential: CredentialFile | None = None
    """What the broker puts into each request; nothing inside ever sees it."""
    rename: Annotated[dict[_MODEL_NAME, _MODEL_NAME], Field(max_length=MAX_ENTRIES)] = {}
    """Names by which models are asked for here, and those that the upstream knows."""

    @model_validator(mode="after")
    def _fits(self) -> UpstreamFile:
        if self.credential is not None and is_in_clear(self.url):
            raise ValueError(f"its `credential` {IN_CLEAR}")
        globs = [text_glob(glob) for glob in self.models]
        if any(not any(glob(name) for glob in globs) for name in self.rename):
            raise ValueError("`rename` has a name that is not among its `models`, and can never be asked for")
        return self

    def value(self) -> Upstream:
        return Upstream(
            self.name,
            self.url,
            self.api,
            tuple(sorted(set(self.models))),
            None if self.credential is None else self.credential.value(),
            tuple(sorted(self.rename.items())),
        )


class PriceFile(Entry):
    """What models cost, for a million tokens."""

    model: _MODEL_GLOB
    """A glob of the name by which it is asked for; of several the first that matches holds."""
    input: _AMOUNT
    """What is sent."""
    output: _AMOUNT
    """What is answered."""
    cached: _AMOUNT | None = None
    """What is sent and was in the upstream's cache. Left out: as `input`."""
    written: _AMOUNT | None = None
    """What is sent and goes into its cache. Left out: as `input`."""

    def value(self) -> Price:
        return Price(self.model, self.input, self.output, self.cached, self.written)


class BudgetFile(Strict):
    """How much of models may be used. What is left out has no bound."""

    tokens: _COUNT | None = _BUDGET.tokens
    """Input and output together."""
    money: _MONEY | None = _BUDGET.money
    """In the policy's currency; models without a price cannot be asked then."""
    requests: _COUNT | None = _BUDGET.requests
    """Requests to models."""
    requests_per_minute: _RATE | None = _BUDGET.requests_per_minute
    """Requests within a minute."""
    concurrent: _AT_ONCE | None = _BUDGET.concurrent
    """Requests at one time."""
    wall_time: Duration | None = _BUDGET.wall_time
    """Of a session from its first request on; of an agent how long its requests took, together."""


class PatienceFile(Strict):
    """How long an upstream is waited for, and how often it is asked again."""

    connect: Duration = _PATIENCE.connect
    """Until a connection stands."""
    first: Duration = _PATIENCE.first
    """Until the answer begins."""
    idle: Duration = _PATIENCE.idle
    """Between two pieces of it."""
    total: Duration = _PATIENCE.total
    """Until its end."""
    retries: Annotated[int, Field(ge=0, le=10)] = _PATIENCE.retries
    """Further tries of one upstream that cannot be reached or is overloaded."""


_TREATMENT = Annotated[Treatment, choices(Treatment), word_of(Treatment, "what can become of a request")]


class GuardFile(Strict):
    """Who looks at the results of tools before a model does."""

    scanners: Annotated[tuple[Label, ...], Field(max_length=MAX_SCANNERS)] = _GUARD.scanners
    """By name: `instructions`, or one that is installed."""
    finding: _TREATMENT = _GUARD.finding
    """What becomes of a request in which one finds something: `block`, or `record`, which lets it go on."""
    failure: _TREATMENT = _GUARD.failure
    """What becomes of a request that one fails to look at."""


Upstreams = Annotated[
    tuple[UpstreamFile, ...],
    Field(max_length=MAX_UPSTREAMS),
    distinct("upstreams", lambda upstream: upstream.name),
]
Prices = Annotated[tuple[PriceFile, ...], Field(max_length=MAX_ENTRIES)]
