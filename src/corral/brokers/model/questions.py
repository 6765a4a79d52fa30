"""A request to a model as it is judged: read once, in a thread where that takes long, and kept without its values.

Python's values take many times what their JSON does, so they live only while they are read, and only those of one
request of a sandbox at a time: what waits for a person, a budget or an upstream is its bytes.
"""

from __future__ import annotations

import asyncio
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace

from corral.actions import Opinion, Verdict
from corral.brokers.guard.scanners import ToolResult
from corral.brokers.model.asking import Asked, read
from corral.brokers.model.capture import request_digest
from corral.brokers.model.hosted import Hosted, hosted_of
from corral.brokers.model.results import results_of
from corral.brokers.model.routes import Route
from corral.brokers.model.turns import Talk, talk_of
from corral.modelapi.values import values_in
from corral.policy.matching import text_glob
from corral.policy.model import Model

SMALL = 256 * 1024
FEW = 2000
"""Bytes and values of a body that is read at once, in about 10 ms at most: to hand it over would take longer."""


@dataclass(frozen=True, slots=True)
class Question:
    """One request."""

    asked: Asked
    """Without its values."""
    talk: Talk
    hosted: Hosted
    results: tuple[ToolResult, ...]
    """What tools have given, where somebody looks at it."""
    digest: str
    """What its answer is recorded by, where that is done."""


class Questions:
    """Reads those of one sandbox. For one loop."""

    def __init__(self, *, with_results: bool, with_digest: bool) -> None:
        self._with_results, self._with_digest = with_results, with_digest
        self._thread = ThreadPoolExecutor(1, "corral-questions")  # no thread is started before it is needed

    async def read(self, route: Route, body: bytes) -> Question:
        """Raises Unclear."""
        if len(body) <= SMALL and values_in(body, FEW) <= FEW:
            return self._read(route, body)
        return await asyncio.get_running_loop().run_in_executor(self._thread, self._read, route, body)

    def _read(self, route: Route, body: bytes) -> Question:
        asked = read(route.api, body)
        return Question(
            replace(asked, values={}),
            talk_of(asked),
            hosted_of(asked),
            tuple(results_of(asked)) if self._with_results else (),
            request_digest(route.path, asked) if self._with_digest else "",
        )

    def close(self) -> None:
        self._thread.shutdown(wait=False, cancel_futures=True)


def own_opinion(question: Question, model: Model) -> Opinion | None:
    """What the broker itself says of a request, by what it would have its upstream do."""
    hosted = question.hosted
    allowed = [text_glob(glob) for glob in model.hosted_tools]
    if tools := [tool for tool in hosted.tools if not any(glob(tool) for glob in allowed)]:
        return Opinion(
            Verdict.DENY,
            "model.hosted_tools",
            f"The upstream itself would run the tool {tools[0]}, beyond this sandbox, and the policy does not let it.",
            "Leave it out of the request, and use tools that you run yourself.",
        )
    if hosted.content and not model.remote_content:
        return Opinion(
            Verdict.DENY,
            "model.remote_content",
            f"The request has its upstream fetch content that is not in it ({hosted.content[0]}), and the policy does "
            "not let it.",
            "Send the content itself, as base64.",
        )
    return None
