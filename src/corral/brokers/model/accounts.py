"""The account of one call while it goes on, and what it comes to in the end."""

from __future__ import annotations

import time
from collections.abc import Sequence

from corral.actions import Ending, Kind, Origin, ToolCall, Used
from corral.brokers.metering.prices import Prices
from corral.brokers.model.asking import Asked
from corral.brokers.model.turns import tokens_of
from corral.modelapi.answer import Answer


class CallAccount:
    """Of one call. Whoever ends it says how before :meth:`used`."""

    def __init__(self, origin: Origin, number: int, asked: Asked, estimate: int) -> None:
        """``number`` is the call's in its session; ``estimate`` is how many tokens of input it may take."""
        self.origin, self.number = origin, number
        self._asked, self._estimate = asked, estimate
        self._started, self._clock = time.time(), time.monotonic()
        self.ending, self.reason = Ending.ABANDONED, "its client is gone"
        self.rule = self.upstream = self.conversation = self.parent = ""
        self.status = 0
        self.first = 0.0
        self.bytes_up = self.bytes_down = 0
        self.most = 0
        """Tokens of output that it can take."""
        self.was_sent = False
        """An upstream may have worked on it."""
        self.is_free = False
        """What was answered costs nothing: it is an error, or no model's answer."""
        self.answer: Answer | None = None
        self.skipped = 0
        """Events of its text that are not in it."""
        self.opened = 0
        self.tools: Sequence[ToolCall] = ()

    def ended(self, ending: Ending, reason: str = "") -> None:
        self.ending, self.reason = ending, reason

    def began(self, status: int) -> None:
        """The answer has."""
        self.status, self.first = status, time.monotonic() - self._clock

    def used(self, prices: Prices) -> Used:
        """What it came to. Where the upstream has not said it, estimates."""
        answer = self.answer or Answer()
        taken, given, is_estimated = self._tokens(answer)
        cached, written = answer.cached_tokens, answer.written_tokens
        cost = prices.cost(self._asked.model, taken, given, cached, written)
        return Used(
            self.origin,
            Kind.MODEL_CALL,
            self.upstream,
            self._asked.model,
            self.rule,
            self._started,
            time.monotonic() - self._clock,
            self.ending,
            first=self.first,
            status=self.status,
            reason=self.reason,
            input_tokens=taken,
            output_tokens=given,
            cached_tokens=cached,
            written_tokens=written,
            cost=cost or 0,
            currency="" if cost is None else prices.currency,
            bytes_up=self.bytes_up,
            bytes_down=self.bytes_down,
            opened=self.opened,
            conversation=self.conversation,
            parent=self.parent,
            tools=tuple(answer.tools),
            finish=answer.finish,
            estimated=is_estimated,
            call=self.number,
        )

    def _tokens(self, answer: Answer) -> tuple[int, int, bool]:
        said = (answer.text, answer.thinking, *(tool.arguments for tool in answer.tools))
        has_said = self.skipped > 0 or any(said)
        if answer.has_usage and answer.complete and answer.input_tokens and (answer.output_tokens or not has_said):
            return answer.input_tokens, answer.output_tokens, False
        if self.is_free or not self.was_sent:
            return 0, 0, False
        # What broke off was made nevertheless, up to there at least; counts that stand before it are of its beginning.
        # Of nothing no upstream makes an answer: who counts none does not count.
        told = tokens_of(sum(len(each.encode("utf-8", "replace")) for each in said))
        given = max(answer.output_tokens, told + self.skipped)
        if self.ending is Ending.ABANDONED and not self._asked.stream:
            given = max(given, self.most)  # nobody tells the upstream to stop: it goes on, to its end
        taken = answer.input_tokens if answer.has_usage and answer.input_tokens else self._estimate
        return taken, given, True
