"""The broker of models: what it is made of, and whom a request goes to."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from ssl import SSLContext
from urllib.parse import unquote

from corral.brokers.guard.guard import Guard
from corral.brokers.guard.scanners import Scanner, load_scanners
from corral.brokers.http import Answering, Request, Room
from corral.brokers.metering.budgets import Budgets
from corral.brokers.metering.prices import Prices
from corral.brokers.model.asking import Unclear
from corral.brokers.model.calls import Call, Means
from corral.brokers.model.capture import Capture
from corral.brokers.model.conversations import Conversations
from corral.brokers.model.listing import Listing, as_list
from corral.brokers.model.questions import Questions
from corral.brokers.model.routes import Aim, Route, family_of, is_plain, route_of
from corral.brokers.model.sending import Ready, ready
from corral.brokers.model.shapes import Problem, fields, shaped
from corral.brokers.model.upstream import Client
from corral.brokers.outward import tls_context
from corral.brokers.setting import Opening, Setting
from corral.policy.model import ModelApi, Policy

MAX_BODY = 32 << 20
MAX_HELD = 256 << 20
"""Bytes of answers that one sandbox may have held while they are read."""


def prepare(policy: Policy, environment: Mapping[str, str], capture: Capture | None = None) -> Opening:
    """Reads the secrets of all upstreams, which are not needed where answers are replayed, and finds the scanners of
    the guard. Raises RequestError."""
    is_replay = capture is not None and capture.is_replay
    upstreams = tuple(ready(each, None if is_replay else environment) for each in policy.model.upstreams)
    tls = None if is_replay else tls_context(environment)
    scanners = load_scanners(policy.model.guard.scanners)

    def open_(setting: Setting) -> ModelBroker:
        return ModelBroker(setting, upstreams, tls, scanners, capture)

    return open_


class ModelBroker:
    """Of one sandbox: a :class:`corral.brokers.setting.Handler`."""

    def __init__(
        self,
        setting: Setting,
        upstreams: Sequence[Ready],
        tls: SSLContext | None,
        scanners: Sequence[tuple[str, Scanner]] = (),
        capture: Capture | None = None,
    ) -> None:
        """Without ``tls`` nothing is sent."""
        model = setting.policy.model
        self._client = None if tls is None else Client(model.patience, tls)
        self._budgets = Budgets(model, setting.ledger)
        self._threads = ThreadPoolExecutor(4, "corral-budgets") if self._budgets.blocks else None
        self._capture = capture
        self._listing = Listing(model, upstreams, self._client)
        self._guard = Guard(model.guard, scanners=scanners)
        self._questions = Questions(with_results=bool(scanners), with_digest=capture is not None)
        self._means = Means(
            setting,
            upstreams,
            self._client,
            self._budgets,
            Prices(model),
            self._guard,
            Conversations(),
            capture,
            Room(MAX_HELD),
            self._threads,
        )

    @property
    def max_body(self) -> int:
        return MAX_BODY

    async def handle(self, request: Request, answer: Answering) -> None:
        route = route_of(request)
        family = family_of(request) if route is None else route.family
        if route is None:
            problem, reason = Problem.NO_ROUTE, f"There is nothing at {request.path[:200]} here."
        elif request.method != route.method:
            problem, reason = Problem.NO_METHOD, f"This is asked with {route.method}."
        elif not is_plain(request.query):
            problem, reason = Problem.INVALID, "The query has a parameter that is not taken here."
        elif route.aim is Aim.LIST:
            await self._list(route, request, answer)
            return
        elif not _is_json([value for name, value in request.headers if name == b"content-type"]):
            problem, reason = Problem.MEDIA, "The body must be application/json, in UTF-8."
        else:
            try:
                question = await self._questions.read(route, request.body)
            except Unclear as unclear:
                problem, reason = Problem.INVALID, str(unclear)
            else:
                await Call(self._means, route, request, question).serve(answer)
                return
        await _refuse(answer, family, problem, reason)

    async def _list(self, route: Route, request: Request, answer: Answering) -> None:
        models = await self._listing.models(route.family)
        if not route.model:
            await answer.json(200, as_list(route.family, models))
            return
        name = unquote(route.model)
        found = next((each for each in models if each["id"] == name), None)
        if found is None:
            await _refuse(answer, route.family, Problem.NO_MODEL, f"There is no model {name[:256]} here.")
        else:
            await answer.json(200, found)

    async def close(self) -> None:
        if self._client is not None:
            await self._client.close()
        self._guard.close()
        self._questions.close()
        if self._threads is None:
            self._budgets.close()
        else:
            self._threads.submit(self._budgets.close)
            self._threads.shutdown(wait=False)
        if self._capture is not None:
            self._capture.close()


async def _refuse(answer: Answering, family: ModelApi, problem: Problem, reason: str) -> None:
    await answer.answer(problem.status, shaped(family, problem, reason), headers=fields(problem))


def _is_json(content_types: Sequence[bytes]) -> bool:
    """Whether the upstream will read what was read here: JSON, in UTF-8. Left out, it is told so."""
    if not content_types:
        return True
    if len(content_types) > 1:
        return False  # servers differ in which of them counts
    kind, *parameters = content_types[0].lower().split(b";")
    plain = [each.strip().replace(b'"', b"") for each in parameters]
    return kind.strip() == b"application/json" and all(
        each in (b"", b"charset=utf-8", b"charset=utf8") for each in plain
    )
