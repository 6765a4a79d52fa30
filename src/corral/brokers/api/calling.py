"""One call of an operation: checked, counted, decided, sent, accounted for. There is one account, however it ends.

The order is that of cost: what is wrong with a request is said before anything is asked, a rate is kept before a person
is bothered, and nothing is sent before the monitor has decided. What the policy has against an argument is decided by
the monitor, too, so that there is a record of it.
"""

from __future__ import annotations

import asyncio
import json
import time
from collections.abc import Awaitable, Callable
from dataclasses import dataclass, field, replace
from hashlib import sha256
from http import HTTPStatus

from corral.actions import Content, Decision, Ending, Kind, Opinion, Origin, Used, Verdict
from corral.actions import Operation as Subject
from corral.brokers.api.checking import outgoing
from corral.brokers.api.reading import Declared
from corral.brokers.api.tools import Described
from corral.brokers.api.upstream import Client, Failed, Reply
from corral.brokers.api.values import Asked, Operation, Outgoing, Problem
from corral.brokers.metering.budgets import OverBudget, Rate
from corral.brokers.setting import Setting
from corral.credentials.secret import Secret
from corral.policy.model import Service
from corral.version import VERSION

PROBLEM = "application/problem+json"
"""RFC 9457."""
MAX_SHOWN, MAX_SHOWN_TARGET = 4000, 1000
"""Characters of a request that a person is shown, and of its path and query."""
_ADVICE = "Do not look for another way; work with what is there, or ask the person to allow it."
_PRIVATE = "This is not allowed in this sandbox."


@dataclass(frozen=True, slots=True)
class Ready:
    """A service whose document and secret are loaded and found right."""

    service: Service
    declared: Declared
    secret: Secret | None
    rule: str
    """Where the policy has it: ``api.services[0]``."""
    url: str
    """Where it is inside."""
    cut: bytes
    """Its document, cut down, as JSON."""
    title: str
    tools: tuple[Described, ...]


@dataclass(frozen=True, slots=True)
class Answer:
    """What a call is answered with inside."""

    status: int
    content_type: str
    body: bytes
    headers: tuple[tuple[bytes, bytes], ...] = ()
    problem: str = ""
    """Why there is no answer of the service's."""


def problem(status: int, detail: str, headers: tuple[tuple[bytes, bytes], ...] = ()) -> Answer:
    """An answer of ours."""
    told = {"type": "about:blank", "title": HTTPStatus(status).phrase, "status": status, "detail": detail}
    return Answer(status, PROBLEM, json.dumps(told).encode("ascii"), headers, detail)


@dataclass(slots=True)
class _Account:
    """What a call has come to so far."""

    rule: str
    call: int
    ending: Ending = Ending.REFUSED
    reason: str = ""
    status: int = 0
    bytes_up: int = 0
    bytes_down: int = 0
    first: float = 0.0
    began: float = field(default_factory=time.monotonic)
    at: float = field(default_factory=time.time)


class Calls:
    """The calls of one sandbox to one service. For one loop."""

    def __init__(self, ready: Ready, setting: Setting, client: Callable[[], Client]) -> None:
        service = ready.service
        self.ready, self._setting, self._client = ready, setting, client
        self._rate = Rate(
            service.requests_per_minute, service.concurrent, rule=ready.rule, what=f"requests to {service.name}"
        )

    async def call(
        self, operation: Operation, ask: Callable[[], Asked], origin: Origin, *, aside: bool = False
    ) -> Answer:
        """``ask`` reads what is asked, ``aside`` in a thread; it may raise Problem."""
        subject = Subject(self.ready.service.name, operation.id, operation.method)
        origin = self._setting.steps.cause_of(origin, subject)
        account = _Account(operation.rule, self._setting.next_call())

        async def asking() -> Asked:
            return await asyncio.to_thread(ask) if aside else ask()

        try:
            answer = await self._call(operation, subject, asking, origin, account)
            account.status = answer.status
            return answer
        except asyncio.CancelledError:
            account.ending, account.reason = Ending.ABANDONED, "whoever asked was gone"
            raise
        except Exception:
            account.ending, account.reason = Ending.FAILED, "the broker failed"
            raise
        finally:
            self._setting.account(self._used(subject, origin, account))

    async def refuse(self, name: str, method: str, origin: Origin) -> Answer:
        """Of an operation that the document has and the policy does not name."""
        operation = Subject(self.ready.service.name, name, method)
        origin = self._setting.steps.cause_of(origin, operation)
        rule, reason = f"{self.ready.rule}.operations (none names it)", "The policy does not have this operation."
        account = _Account(rule, self._setting.next_call(), reason=reason, status=404)
        try:
            await self._deny(operation, origin, rule, reason)
            return problem(404, f"{reason} {_ADVICE}")
        finally:
            self._setting.account(self._used(operation, origin, account))

    async def _call(
        self,
        operation: Operation,
        subject: Subject,
        ask: Callable[[], Awaitable[Asked]],
        origin: Origin,
        account: _Account,
    ) -> Answer:
        try:
            out = await outgoing(operation, await ask())
        except Problem as wrong:
            # What is wrong is told with the client's own words, which are kept only where contents are.
            account.reason = "The request is not as its operation wants it."
            if wrong.rule:
                account.reason = "An argument is not one that the policy allows."
                decision = await self._deny(subject, origin, wrong.rule, wrong.reason)
                account.rule = decision.rule
                return problem(wrong.status, _told(decision))
            return problem(wrong.status, wrong.reason)
        try:
            slot = self._rate.admit()
        except OverBudget as over:
            account.rule, account.reason = over.rule, over.reason
            again = (
                () if over.retry_after is None else ((b"retry-after", b"%d" % max(1, round(over.retry_after + 0.5))),)
            )
            return problem(429, over.reason, again)
        with slot:
            self._keep(subject, origin, out, account.call)
            shown = replace(subject, preview=_preview(out))
            decision = await self._setting.decide(Kind.API_CALL, shown, origin)
            account.rule = decision.rule
            if not decision.allowed:
                account.reason = _PRIVATE if decision.private else decision.reason
                return problem(403, _told(decision))
            return await self._send(out, account)

    async def _send(self, out: Outgoing, account: _Account) -> Answer:
        service = self.ready.service
        account.ending, account.bytes_up = Ending.FAILED, len(out.target) + len(out.body or b"")
        headers = [
            ("accept", "application/json, */*;q=0.5"),
            ("accept-encoding", "identity"),
            ("user-agent", f"corral/{VERSION}"),
            *out.headers,
        ]
        began = time.monotonic()
        try:
            async with asyncio.timeout(service.time):
                reply = await self._client().ask(
                    out.method, service.url + out.target, headers, out.body, self.ready.secret, service.bytes
                )
        except TimeoutError:
            account.reason = f"There was no whole answer of {service.name} within {service.time:g} seconds."
            return problem(504, account.reason)
        except Failed as failed:
            account.reason, account.bytes_down = failed.reason, failed.bytes_down
            return problem(failed.status, f"{service.name} has given no answer that is passed on. {failed.reason}")
        account.first = time.monotonic() - began
        account.ending, account.bytes_down = Ending.ANSWERED, len(reply.body)
        return self._answer(reply)

    def _answer(self, reply: Reply) -> Answer:
        outside, inside = self.ready.service.url.encode("ascii"), self.ready.url.encode("ascii")
        headers = tuple(
            # What leads to the service leads to the broker, or nowhere.
            (name, value.replace(outside + b"/", inside + b"/") if name in (b"link", b"location") else value)
            for name, value in reply.headers
        )
        return Answer(reply.status, reply.content_type, reply.body, headers)

    async def _deny(self, subject: Subject, origin: Origin, rule: str, reason: str) -> Decision:
        own = Opinion(Verdict.DENY, rule, reason, _ADVICE)
        return await self._setting.decide(Kind.API_CALL, subject, origin, own=own)

    def _keep(self, subject: Subject, origin: Origin, out: Outgoing, call: int) -> None:
        keeper = self._setting.keeper
        if keeper is not None and (most := keeper.keeps(Content.QUERY)):
            is_whole = len(out.arguments) <= most
            keeper.keep(origin, Content.QUERY, out.arguments[:most], is_whole, str(subject), call)

    def _used(self, subject: Subject, origin: Origin, account: _Account) -> Used:
        return Used(
            origin,
            Kind.API_CALL,
            subject.service,
            subject.operation,
            account.rule,
            account.at,
            time.monotonic() - account.began,
            account.ending,
            first=account.first,
            status=account.status,
            reason=account.reason,
            bytes_up=account.bytes_up,
            bytes_down=account.bytes_down,
            call=account.call,
        )


def _told(decision: Decision) -> str:
    """For a model and a person; what is private is not told."""
    if decision.private:
        return _PRIVATE
    words = (f"{decision.action.subject} is not allowed.", decision.reason, decision.advice)
    return " ".join(word for word in words if word)


def _preview(out: Outgoing) -> str:
    """The request as a person is to see it: what tells it from every other first, then as much as can be shown."""
    body = out.body or b""
    headers = [f"{name}: {value}" for name, value in out.headers]
    whole = b"\0".join((out.method.encode(), out.target.encode(), *(each.encode() for each in headers), body))
    lines = [
        f"{out.method} {out.target[:MAX_SHOWN_TARGET]}{'...' if len(out.target) > MAX_SHOWN_TARGET else ''}",
        f"{len(body)} bytes of body; all of it has sha256 {sha256(whole).hexdigest()}",
        *headers,
        *body[: 4 * MAX_SHOWN].decode("utf-8", "replace").split("\n"),
    ]
    shown = "\n".join(lines)
    return shown if len(shown) <= MAX_SHOWN else f"{shown[:MAX_SHOWN]}..."
