"""One call of a model, from the question to its account.

Its order is what the broker promises: judged and recorded before anything is sent, counted against the budgets before
that, its step open before the agent has the answer, and accounted for exactly once, however it ends.
"""

from __future__ import annotations

import asyncio
import re
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from dataclasses import dataclass

from corral.actions import Content, Decision, Ending, Kind, ModelCall, ToolCall, Used
from corral.brokers.guard.guard import Guard
from corral.brokers.http import Answering, Gone, Request, Room
from corral.brokers.metering.bounds import OverBudget
from corral.brokers.metering.budgets import Admission, Budgets
from corral.brokers.metering.prices import Prices
from corral.brokers.model.accounts import CallAccount
from corral.brokers.model.capture import Capture, Recording
from corral.brokers.model.conversations import Conversation, Conversations
from corral.brokers.model.questions import Question, own_opinion
from corral.brokers.model.relaying import Relaying, Threshold
from corral.brokers.model.routes import Route
from corral.brokers.model.sending import Errand, Ready, Sending
from corral.brokers.model.shapes import Problem, fields, shaped
from corral.brokers.model.upstream import Client, Failed, Impatience, Reply
from corral.brokers.setting import Setting
from corral.credentials.secret import Secret
from corral.modelapi.answer import Api

DEFAULT_OUTPUT = 4096
"""Tokens that are reserved for an answer whose request does not bound it."""
MAX_FOUND = 8
"""Findings of one request that its record names."""
_ANSWER_ID = re.compile(rb'"id"\s*:\s*"([^"\\]{1,256})"')


@dataclass(frozen=True, slots=True)
class Means:
    """What all calls of one sandbox share."""

    setting: Setting
    upstreams: Sequence[Ready]
    client: Client | None
    """None where nothing is sent."""
    budgets: Budgets
    prices: Prices
    guard: Guard
    conversations: Conversations
    capture: Capture | None
    room: Room
    """For what is held of answers while they are read."""
    threads: ThreadPoolExecutor | None
    """Where budgets block."""


class Refusal(Exception):
    """The call is not made, or not answered."""

    def __init__(self, problem: Problem, reason: str, ending: Ending, *, after: float | None = None) -> None:
        super().__init__(reason)
        self.problem, self.reason, self.ending, self.after = problem, reason, ending, after


class Call:
    """One of them."""

    def __init__(self, means: Means, route: Route, request: Request, question: Question) -> None:
        self._means, self._route, self._request = means, route, request
        self._question, self._asked, self._talk = question, question.asked, question.talk
        asked, talk = question.asked, question.talk
        setting = means.setting
        origin = setting.steps.cause_of(request.origin, ModelCall(asked.model))
        self._account = CallAccount(origin, setting.next_call(), asked, talk.tokens)
        self._account.is_free = route.is_count
        self._conversation: Conversation | None = None
        self._admission: Admission | None = None
        self._relaying: Relaying | None = None
        self._found = ""
        """What the guard has found, and the policy lets go on."""

    async def serve(self, answer: Answering) -> None:
        """Answers it, and accounts for it."""
        account = self._account
        try:
            await self._serve(answer)
        except Refusal as refusal:
            account.ended(refusal.ending, refusal.reason)
            await self._tell(answer, refusal)
        except (Gone, asyncio.CancelledError):
            account.ended(Ending.ABANDONED, "its client is gone")
            raise
        except BaseException as error:
            account.ended(Ending.FAILED, f"the broker failed ({type(error).__name__})")
            raise
        finally:
            await self._settle()

    async def _tell(self, answer: Answering, refusal: Refusal) -> None:
        if answer.is_started:
            return  # what is left unfinished is broken, and its client notices
        self._account.status = refusal.problem.status
        body = shaped(self._route.family, refusal.problem, refusal.reason)
        with suppress(Gone):
            await answer.answer(refusal.problem.status, body, headers=fields(refusal.problem, refusal.after))

    async def _serve(self, answer: Answering) -> None:
        await self._judge()
        candidates = [each for each in self._means.upstreams if each.api is self._route.family]
        candidates = [each for each in candidates if each.has(self._asked.model)]
        if not candidates:
            reason = f"No upstream has a model that is called {self._asked.model} here."
            raise Refusal(Problem.NO_MODEL, reason, Ending.REFUSED)
        await self._admit()
        if not self._route.is_count:
            await self._look()
            self._place()
        await self._exchange(candidates, answer)

    # ---- before anything is sent ----

    async def _judge(self) -> None:
        subject = ModelCall(self._asked.model)
        own = own_opinion(self._question, self._means.setting.policy.model)
        decision = await self._means.setting.decide(Kind.MODEL_CALL, subject, self._account.origin, own=own)
        self._account.rule = decision.rule
        if not decision.allowed:
            raise Refusal(Problem.DENIED, _why(self._asked.model, decision), Ending.REFUSED)

    async def _admit(self) -> None:
        asked, means = self._asked, self._means
        taken, given = 0, 0
        if not self._route.is_count:
            limit = asked.max_output or DEFAULT_OUTPUT  # 0 is no bound to some servers
            taken, given = self._talk.tokens, limit * asked.choices
            self._account.most = given
            self._check_countable()
        cost = means.prices.ceiling(asked.model, taken, given)
        try:
            if means.threads is None:
                self._admission = means.budgets.admit(taken + given, cost)
            else:
                self._admission = await self._admit_elsewhere(taken + given, cost)
        except OverBudget as over:
            self._account.rule = over.rule
            problem = Problem.EXHAUSTED if over.retry_after is None else Problem.RATE
            raise Refusal(problem, over.reason, Ending.REFUSED, after=over.retry_after) from None

    def _check_countable(self) -> None:
        """What a budget cannot count is not asked."""
        asked, model = self._asked, self._means.setting.policy.model
        for place, budget in (("model.session", model.session), ("model.agent", model.agent)):
            if asked.extra and budget.money is not None:
                self._account.rule = f"{place}.money"
                reason = (
                    f"The field `{asked.extra}` asks for more than the price that the policy has for "
                    f"{asked.model}, and money is bounded here. Leave it out."
                )
                raise Refusal(Problem.DENIED, reason, Ending.REFUSED)
            if not asked.tells_usage and (budget.money is not None or budget.tokens is not None):
                self._account.rule = place
                reason = (
                    "What this stream takes is counted here, so it must say so at its end: ask with "
                    '`"stream_options": {"include_usage": true}`.'
                )
                raise Refusal(Problem.INVALID, reason, Ending.REFUSED)

    async def _admit_elsewhere(self, tokens: int, cost: int | None) -> Admission:
        loop = asyncio.get_running_loop()
        admitting = loop.run_in_executor(self._means.threads, self._means.budgets.admit, tokens, cost)
        try:
            return await asyncio.shield(admitting)
        except asyncio.CancelledError:
            # It is admitted or not, but nothing will be sent.
            with suppress(OverBudget):
                self._admission = await admitting
            raise

    async def _look(self) -> None:
        """Has the guard look at what tools have given."""
        means = self._means
        outcome = await means.guard.look(self._question.results)
        if outcome.blocked:
            self._account.rule = outcome.rule
            raise Refusal(Problem.BLOCKED, outcome.reason, Ending.REFUSED)
        self._found = "; ".join(outcome.told[:MAX_FOUND])

    def _place(self) -> None:
        """Where it belongs; what its conversation has begun before is over."""
        means, account = self._means, self._account
        self._conversation = conversation = means.conversations.find(self._talk, self._asked.previous)
        account.conversation, account.parent = conversation.id, conversation.parent
        means.conversations.asked(conversation)
        means.setting.steps.asked(account.origin, conversation.id)

    # ---- the exchange ----

    async def _exchange(self, candidates: Sequence[Ready], answer: Answering) -> None:
        means, account = self._means, self._account
        patience = means.setting.policy.model.patience
        total, why = patience.total, "it took too long"
        if self._admission is not None and (seconds := self._admission.seconds) is not None and seconds < total:
            total, why = seconds, "the time that the budget gives was over"
        sending: Sending | None = None
        bound = asyncio.timeout(total)
        watch = Impatience(bound, why)
        try:
            async with bound:
                if means.capture is not None and means.capture.is_replay:
                    reply, secret = self._replayed(means.capture), None
                    account.upstream, account.was_sent = "replay", True
                else:
                    if means.client is None:
                        raise Failed("there is no way to it", was_sent=False)
                    sending = Sending(means.client, patience, watch)
                    self._keep_prompt()
                    errand = Errand(self._asked, self._route.path, self._request.query, self._request.headers)
                    reply = await sending.send(candidates, errand)
                    secret = None if sending.upstream is None else sending.upstream.secret
                try:
                    await self._pass_on(reply, secret, watch, answer)
                finally:
                    reply.close()
            account.ended(Ending.ANSWERED, self._found)
        except Failed as failed:
            raise Refusal(Problem.UPSTREAM, self._said(sending, failed.reason), Ending.FAILED) from None
        except TimeoutError:
            raise Refusal(Problem.SLOW, self._said(sending, watch.problem), Ending.FAILED) from None
        finally:
            watch.stop()
            if sending is not None:
                account.upstream = "" if sending.upstream is None else sending.upstream.name
                account.was_sent = sending.was_sent
                account.bytes_up = len(self._asked.body) if sending.was_sent else 0

    def _said(self, sending: Sending | None, reason: str) -> str:
        if sending is None or sending.upstream is None:
            return f"The upstream failed: {reason}."
        return f"The upstream {sending.upstream.name} failed: {reason}."

    def _replayed(self, capture: Capture) -> Reply:
        place = capture.place(self._route.path, self._question.digest, self._asked.model, self._account.conversation)
        reply = capture.find(place)
        if reply is None:
            reason = (
                f"No answer to this request was recorded: {self._route.path}, model {self._asked.model}, request "
                f"{place.request}, conversation {place.order}, position {place.position}."
            )
            raise Refusal(Problem.NOT_RECORDED, reason, Ending.FAILED)
        return reply

    def _recording(self, capture: Capture | None) -> Recording | None:
        if capture is None or capture.is_replay:
            return None
        return capture.record(
            capture.place(self._route.path, self._question.digest, self._asked.model, self._account.conversation)
        )

    async def _pass_on(self, reply: Reply, secret: Secret | None, watch: Impatience, answer: Answering) -> None:
        account, means = self._account, self._means
        account.began(reply.status)
        threshold = None
        account.is_free = self._route.is_count or reply.status >= 300
        if not account.is_free:
            kind = next((value for name, value in reply.headers if name == b"content-type"), b"")
            is_stream = kind.lower().startswith(b"text/event-stream")
            threshold = Threshold(self._route.api, is_stream, self._opened)
        patience = means.setting.policy.model.patience
        keep = self._keeps(Content.RESPONSE) if threshold is not None else 0
        recording = self._recording(means.capture)
        self._relaying = Relaying(
            reply, secret, threshold, watch, patience.idle, room=means.room, keep=keep, recording=recording
        )
        try:
            await self._relaying.run(answer)
        except OSError as error:  # Gone and Failed are none
            if isinstance(error, Gone):
                raise
            means.setting.end("the answers of its models cannot be recorded")
            raise Failed("its answer cannot be recorded", was_sent=True) from None

    def _opened(self, tools: Sequence[ToolCall]) -> None:
        conversation = self._conversation
        if conversation is None or not tools:
            return
        means, account = self._means, self._account
        answer_id = ""
        if self._route.api is Api.RESPONSES and self._relaying is not None:
            answer_id = _answer_id(self._relaying.beginning)
        means.conversations.answered(conversation, tools, answer_id)
        account.opened = means.setting.steps.answered(account.origin, conversation.id, tools)

    # ---- afterwards ----

    async def _settle(self) -> None:
        account, means, relaying = self._account, self._means, self._relaying
        if relaying is not None:
            account.answer, account.skipped = relaying.answer, relaying.skipped
            account.bytes_down = relaying.received
            if account.ending is Ending.ANSWERED and relaying.answer is not None and relaying.answer.fault:
                account.reason = "; ".join(filter(None, (account.reason, f"the answer: {relaying.answer.fault}")))
            self._keep_answer(relaying)
        if self._conversation is not None:
            if relaying is not None and self._route.api is Api.RESPONSES and not account.opened:
                means.conversations.answered(self._conversation, (), _answer_id(relaying.beginning))
            means.conversations.over(self._conversation)
        used = account.used(means.prices)
        means.setting.account(used)
        await self._give_back(used)

    async def _give_back(self, used: Used) -> None:
        admission, threads = self._admission, self._means.threads
        if admission is None:
            return
        if threads is None:
            admission.settle(used)
        else:
            with suppress(RuntimeError):  # the broker is closed: the budgets charge what was reserved
                await asyncio.shield(asyncio.get_running_loop().run_in_executor(threads, admission.settle, used))

    def _keeps(self, content: Content) -> int:
        keeper = self._means.setting.keeper
        return 0 if keeper is None else keeper.keeps(content)

    def _keep_prompt(self) -> None:
        if self._route.is_count:
            return
        keeper, most = self._means.setting.keeper, self._keeps(Content.PROMPT)
        if keeper is not None and most:
            body = self._asked.body
            keeper.keep(
                self._account.origin,
                Content.PROMPT,
                body[:most],
                len(body) <= most,
                self._asked.model,
                self._account.number,
            )

    def _keep_answer(self, relaying: Relaying) -> None:
        keeper = self._means.setting.keeper
        if keeper is not None and (kept := relaying.kept):
            is_whole = relaying.is_kept_whole and self._account.ending is Ending.ANSWERED
            keeper.keep(self._account.origin, Content.RESPONSE, kept, is_whole, self._asked.model, self._account.number)


def _answer_id(beginning: bytes) -> str:
    found = _ANSWER_ID.search(beginning)
    return "" if found is None else found[1].decode("utf-8", "replace")


def _why(model: str, decision: Decision) -> str:
    """For a model and a person; what is private is not told."""
    if decision.private:
        return f"The policy does not allow the model {model} here."
    words = (f"The model {model} may not be asked here.", decision.reason, decision.advice)
    return " ".join(filter(None, words))
