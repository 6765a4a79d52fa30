"""Passes an answer on as it comes, byte for byte but for echoes of the secret, and reads along.

An agent must not act on an answer before its step is open. So what makes a tool call whole is held back until that is
so: of a stream, until the answer has told all of its tool calls, of one object its last piece.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

from corral.actions import ToolCall
from corral.brokers.http import Answering, Room
from corral.brokers.model.capture import Recording
from corral.brokers.model.skimming import Skimmer
from corral.brokers.model.upstream import Failed, Impatience, Reply
from corral.credentials.secret import Secret
from corral.modelapi.answer import Answer, Api
from corral.modelapi.reader import AnswerReader

MAX_ANSWER = 64 << 20
"""Bytes."""
MAX_HELD = 4 << 20
"""Bytes of a stream that are held back; with more, the step begins with the tool calls that are known."""

Opened = Callable[[Sequence[ToolCall]], None]


class Threshold:
    """What of an answer may go on. ``opened`` is told of the tool calls before the agent has them."""

    def __init__(self, api: Api, is_stream: bool, opened: Opened) -> None:
        self._reader, self._skimmer = AnswerReader(api), Skimmer(api)
        self._is_stream, self._opened = is_stream, opened
        self._held: list[bytes] = []
        self._size = self._known = 0

    @property
    def skipped(self) -> int:
        """Events that only said more of a text, and are not in the answer."""
        return self._skimmer.events

    @property
    def is_collecting(self) -> bool:
        """Whether what comes next stays here until more has come."""
        return not self._is_stream or bool(self._held)

    def take(self, data: bytes) -> bytes:
        """What may go on now."""
        if not self._is_stream:
            self._reader.feed(data)
            before, self._held = self._held, [data]
            return before[0] if before else b""
        if (self._skimmer.skips(data) or not self._reader.feed(data)) and not self._held:
            return data
        self._held.append(data)
        self._size += len(data)
        if not self._reader.is_over and self._size <= MAX_HELD:
            return b""
        self._open(self._reader.tools)
        return self._all()

    def end(self, *, is_abandoned: bool = False) -> tuple[Answer, bytes]:
        """Nothing more comes: what was answered, and the rest of it, which nobody gets if he has abandoned it."""
        answer = self._reader.finish()
        if not is_abandoned:
            self._open(answer.tools)
        return answer, self._all()

    def _open(self, tools: Sequence[ToolCall]) -> None:
        if len(tools) > self._known:
            self._known = len(tools)
            self._opened(tools)

    def _all(self) -> bytes:
        held = self._held[0] if len(self._held) == 1 else b"".join(self._held)
        self._held, self._size = [], 0
        return held


class Relaying:
    """One answer."""

    def __init__(
        self,
        reply: Reply,
        secret: Secret | None,
        threshold: Threshold | None,
        watch: Impatience,
        idle: float,
        *,
        room: Room,
        keep: int = 0,
        recording: Recording | None = None,
    ) -> None:
        """``threshold`` is None where the answer is not a model's. ``keep`` is how many bytes of it are kept. ``room``
        is for all answers of the sandbox that are read now: with none left, no more of this one is kept, and one that
        cannot be passed on before all of it is there breaks off."""
        self._reply, self._secret, self._threshold = reply, secret, threshold
        self._watch, self._idle, self._keep, self._recording = watch, idle, keep, recording
        self._kept: list[bytes] = []
        self._kept_size = 0
        self._room, self._taken = room, 0
        self.beginning = b""
        """The first bytes."""
        self.received = 0
        """Bytes of the body, as they came from the upstream."""
        self.answer: Answer | None = None
        """What it was, once it is over, be it by breaking off; of a stream without most of its text."""
        self.skipped = 0
        """Events of which that was."""

    @property
    def kept(self) -> bytes:
        return b"".join(self._kept)

    @property
    def is_kept_whole(self) -> bool:
        return self._kept_size == self.received

    async def run(self, answer: Answering) -> None:
        """Raises Failed, Gone; the client then has a broken answer."""
        reply, secret = self._reply, self._secret
        headers = reply.headers
        if secret is not None:
            headers = tuple((secret.scrubbed(name), secret.scrubbed(value)) for name, value in headers)
        scrubber = None if secret is None else secret.scrubber()
        if self._recording is not None:
            self._recording.start(reply.status, headers)
        try:
            await answer.start(reply.status, headers, length=reply.length)
            while True:
                self._watch.expect(self._idle, "its answer stopped")
                data = await reply.read()
                self._watch.rest()
                if not data:
                    break
                self.received += len(data)
                if self.received > MAX_ANSWER:
                    raise Failed("its answer is too long", was_sent=True)
                if scrubber is not None:
                    data = scrubber.feed(data)
                await self._pass(answer, data)
            if scrubber is not None:
                await self._pass(answer, scrubber.end())
            self._record(is_whole=True)  # before the client has all of it
            if rest := self._end():
                await answer.send(rest)
        except Failed:
            if rest := self._end():
                await answer.send(rest)
            raise
        except BaseException:
            self._end(is_abandoned=True)
            raise
        finally:
            self._record(is_whole=False)
            self._room.give(self._taken)
            self._taken = 0
        await answer.finish()

    def _record(self, *, is_whole: bool) -> None:
        """Once. Raises OSError."""
        recording, self._recording = self._recording, None
        if recording is not None:
            recording.finish(is_whole=is_whole)

    async def _pass(self, answer: Answering, data: bytes) -> None:
        if not data:
            return
        if not self.beginning:
            self.beginning = data[:8192]
        if self._kept_size < self._keep:
            piece = data[: self._keep - self._kept_size]
            if self._takes(len(piece)):
                self._kept.append(piece)
                self._kept_size += len(piece)
            else:
                self._keep = 0
        if self._recording is not None:
            self._recording.piece(data)
        if self._threshold is not None:
            if self._threshold.is_collecting and not self._takes(len(data)):
                raise Failed("the answers of this sandbox that are read at one time are too large", was_sent=True)
            data = self._threshold.take(data)
        if data:
            await answer.send(data)

    def _takes(self, count: int) -> bool:
        """Whether there is room for so much more."""
        if not self._room.take(count):
            return False
        self._taken += count
        return True

    def _end(self, *, is_abandoned: bool = False) -> bytes:
        """What was still held back."""
        threshold, self._threshold = self._threshold, None
        if threshold is None:
            return b""
        self.answer, rest = threshold.end(is_abandoned=is_abandoned)
        self.skipped = threshold.skipped
        return rest
