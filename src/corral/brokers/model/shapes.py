"""What the broker says itself, in the shape in which each API says what went wrong: clients read nothing else.

A client of these APIs asks again by itself where a status looks as if that could help. ``x-should-retry`` tells the
official ones otherwise: what will not come back must not be asked for in a loop.
"""

from __future__ import annotations

import json
import math
from enum import Enum

from corral.policy.model import ModelApi

PATIENT = 60.0
"""Seconds that official clients wait at most, where they are told when to ask again; beyond, they ask too early."""

Fields = tuple[tuple[bytes, bytes], ...]


class Problem(Enum):
    """What was wrong: status, OpenAI's type and code, Anthropic's type."""

    INVALID = (400, "invalid_request_error", None, "invalid_request_error")
    DENIED = (403, "permission_error", "policy_denied", "permission_error")
    BLOCKED = (403, "permission_error", "content_blocked", "permission_error")
    EXHAUSTED = (403, "insufficient_quota", "insufficient_quota", "permission_error")
    NO_ROUTE = (404, "invalid_request_error", None, "not_found_error")
    NO_METHOD = (405, "invalid_request_error", None, "invalid_request_error")
    NO_MODEL = (404, "invalid_request_error", "model_not_found", "not_found_error")
    MEDIA = (415, "invalid_request_error", None, "invalid_request_error")
    RATE = (429, "rate_limit_error", "rate_limit_exceeded", "rate_limit_error")
    FAULT = (500, "server_error", None, "api_error")
    NOT_RECORDED = (501, "server_error", "not_recorded", "api_error")
    UPSTREAM = (502, "server_error", "upstream_failed", "api_error")
    SLOW = (504, "server_error", "upstream_timeout", "timeout_error")

    @property
    def status(self) -> int:
        status: int = self.value[0]
        return status


_FINAL = frozenset((Problem.DENIED, Problem.BLOCKED, Problem.EXHAUSTED, Problem.NOT_RECORDED))


def shaped(api: ModelApi, problem: Problem, message: str) -> bytes:
    """The body."""
    _, kind, code, anthropic = problem.value
    if api is ModelApi.ANTHROPIC:
        return json.dumps({"type": "error", "error": {"type": anthropic, "message": message}}).encode()
    return json.dumps({"error": {"message": message, "type": kind, "param": None, "code": code}}).encode()


def fields(problem: Problem, retry_after: float | None = None) -> Fields:
    """The headers that go with it: whether, and when, it is worth asking again. ``retry_after`` in seconds."""
    if retry_after is None:
        return ((b"x-should-retry", b"false"),) if problem in _FINAL else ()
    after = (b"retry-after", b"%d" % max(1, math.ceil(retry_after)))
    return (after,) if retry_after <= PATIENT else (after, (b"x-should-retry", b"false"))
