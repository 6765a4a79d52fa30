"""Reads the answer of a model from the bytes of a body, in whatever pieces they come: one JSON object, or a stream of
server-sent events (WHATWG HTML, section 9.2).

    reader = AnswerReader(Api.CHAT)
    for data in body:
        if reader.feed(data):        # a tool call is whole now, or the answer is over
            open_a_step(reader.tools)
        send_on(data)
    answer = reader.finish()

To feed costs little more than to keep: events are taken apart some at a time, and at once only where one of them
matters to whoever passes it on. What is kept is bounded, whatever comes. Nothing that comes raises.
"""

from __future__ import annotations

import json
import re
from types import ModuleType

from corral.actions import ToolCall
from corral.modelapi import chat, messages, responses
from corral.modelapi.answer import Answer, Api, Draft, as_object
from corral.modelapi.values import values_in

MAX_BODY = 32 << 20
"""Bytes of an answer that is one object."""
MAX_EVENT = 16 << 20
"""Bytes of one event of a stream."""
MAX_VALUES = 1_000_000
"""Values in one object, be it the answer or an event; with probabilities there can be many."""
_BATCH = 64 * 1024
"""Bytes of a stream that wait to be taken apart."""
_WINDOW = 64
"""Bytes of what came before in which a hint may have begun."""
_APIS: dict[Api, ModuleType] = {Api.CHAT: chat, Api.RESPONSES: responses, Api.MESSAGES: messages}
_LINE_ENDS = re.compile(rb"\r\n|\n|\r")
_BOM = b"\xef\xbb\xbf"


class AnswerReader:
    """Reads one answer. Used from one thread."""

    def __init__(self, api: Api, *, sampling: bool = False) -> None:
        """``sampling`` collects tokens, their ids and probabilities too."""
        self._api = _APIS[api]
        self._hints: tuple[bytes, ...] = self._api.HINTS
        self._draft = Draft(sampling=sampling)
        self._is_stream: bool | None = None
        self._pieces: list[bytes] = []
        self._size = 0
        self._window = b""
        self._has_line = self._is_hinted = self._is_skipping = False
        self._return = b""
        """A carriage return that may be half of a line's end."""
        self._data: list[bytes] = []
        """Lines of the event that is not over yet."""
        self._data_size = 0
        self._known = 0
        self._was_over = self._is_finished = False

    @property
    def tools(self) -> tuple[ToolCall, ...]:
        """The tool calls that are known to be whole by now."""
        return self._draft.answer(is_cut=False).tools

    @property
    def is_over(self) -> bool:
        """The answer itself has said that it is, as far as it was taken apart; what was used may follow."""
        return self._draft.is_over

    def feed(self, data: bytes) -> bool:
        """Takes what came. Returns whether one more tool call is whole with it, or the answer is over: whoever passes
        it on must know that before the agent does. Of an answer that is no stream only :meth:`finish` knows."""
        if not data or self._is_finished:
            return False
        if self._is_stream is None:
            data = self._begin(b"".join((*self._pieces, data)))
            if not data:
                return False
        if not self._is_stream:
            self._keep(data)
            return False
        return self._feed_stream(data) and self._has_news()

    def finish(self, *, is_cut: bool = False) -> Answer:
        """What was answered, when all has come; ``is_cut`` where it is known that this is only how it began."""
        if not self._is_finished:
            self._is_finished = True
            if self._is_stream:
                self._finish_stream()
            else:
                self._finish_body(b"".join(self._pieces), is_cut)
            self._pieces.clear()
            if not self._draft.is_over:
                self._draft.wrong("only its beginning was kept" if is_cut else "it broke off")
        return self._draft.answer(is_cut=is_cut)

    def _begin(self, data: bytes) -> bytes:
        """Finds out what it is by how it begins; what is left of that."""
        self._pieces.clear()
        start = data.removeprefix(_BOM).lstrip(b" \t\r\n")
        if not start or _BOM.startswith(data):
            if len(data) < _BATCH:
                self._pieces.append(data)
            return b""
        self._is_stream = start[:1] not in b"{["
        return start

    def _has_news(self) -> bool:
        known, is_over = self._draft.known_tools, self._draft.is_over
        is_news = known > self._known or (is_over and not self._was_over)
        self._known, self._was_over = known, is_over
        return is_news

    # ---- one object ----

    def _keep(self, data: bytes) -> None:
        room = MAX_BODY - self._size
        if len(data) > room:
            self._draft.wrong(f"it is longer than {MAX_BODY} bytes")
            data = data[:room]
        self._size += len(data)
        if data:
            self._pieces.append(data)

    def _finish_body(self, body: bytes, is_cut: bool) -> None:
        if not body.strip():
            self._draft.wrong("it is empty")
            return
        if values_in(body, MAX_VALUES) > MAX_VALUES:
            self._draft.wrong(f"it has more than {MAX_VALUES:,} values")
            return
        try:
            values = json.loads(body.decode("utf-8", "replace"))
        except (ValueError, RecursionError):
            if not is_cut and not self._draft.fault:
                self._draft.wrong("it is no JSON")
                return
            values = _beginning(body)
            self._draft.wrong("only its beginning was kept")
        if type(values) is not dict:
            self._draft.wrong("it is no object")
            return
        self._api.take_body(self._draft, values)

    # ---- a stream ----

    def _feed_stream(self, data: bytes) -> bool:
        """Returns whether something was taken apart."""
        if self._return:
            data, self._return = self._return + data, b""
        if data.endswith(b"\r"):
            data, self._return = data[:-1], b"\r"
        if not self._is_hinted:
            window = self._window + data
            self._is_hinted = self._has_hint(window)
            self._window = window[-_WINDOW:]
        has_line = b"\n" in data or b"\r" in data
        if self._is_skipping:
            if not has_line:
                return False
            self._is_skipping = False  # what is left of the line is no field that is known
        self._pieces.append(data)
        self._size += len(data)
        self._has_line = self._has_line or has_line
        is_due = self._has_line and (self._is_hinted or self._size >= _BATCH)
        if is_due:
            self._take()
        if self._size > MAX_EVENT:
            self._draft.wrong(f"one of its events is longer than {MAX_EVENT} bytes")
            self._pieces, self._size, self._is_skipping = [], 0, True
            self._data, self._data_size = [], 0
        return is_due

    def _has_hint(self, data: bytes) -> bool:
        return any(hint in data for hint in self._hints)

    def _take(self) -> None:
        """Takes apart all lines that are whole."""
        joined = b"".join(self._pieces)
        end = max(joined.rfind(b"\n"), joined.rfind(b"\r")) + 1
        rest = joined[end:]
        self._pieces, self._size, self._has_line = [rest] if rest else [], len(rest), False
        lines = _LINE_ENDS.split(joined[:end])
        lines.pop()  # behind the last end there is nothing
        for line in lines:
            self._line(line)
        # A hint was for an event that is over now, or for one that is not: the rest may hold its beginning.
        self._is_hinted = bool(self._data) or self._has_hint(rest)
        self._window = rest[-_WINDOW:]

    def _line(self, line: bytes) -> None:
        if not line:
            self._dispatch()
            return
        name, _, value = line.partition(b":")
        if name != b"data":
            return
        value = value.removeprefix(b" ")
        self._data_size += len(value)
        if self._data_size > MAX_EVENT:
            self._draft.wrong(f"one of its events is longer than {MAX_EVENT} bytes")
            self._data = []
            return
        self._data.append(value)

    def _dispatch(self, *, is_last: bool = False) -> None:
        if not self._data:
            self._data_size = 0
            return
        joined = b"\n".join(self._data)
        self._data, self._data_size = [], 0
        if values_in(joined, MAX_VALUES) > MAX_VALUES:
            self._draft.wrong(f"one of its events has more than {MAX_VALUES:,} values")
            return
        data = joined.decode("utf-8", "replace")
        event = {}
        if data != chat.DONE:
            try:
                event = as_object(json.loads(data))
            except (ValueError, RecursionError):
                if not is_last:
                    self._draft.wrong("one of its events is no JSON")
                return
        self._api.take_event(self._draft, data, event)

    def _finish_stream(self) -> None:
        self._pieces += [self._return, b"\n"]
        self._take()
        self._dispatch(is_last=True)  # one that nothing follows; where it is not all there, it is no JSON


def _beginning(body: bytes) -> object:
    """As much of a JSON value as its beginning says."""
    from pydantic_core import from_json  # only where it is needed: it is slow to import

    try:
        return from_json(body, allow_partial="trailing-strings")
    except (ValueError, RecursionError):
        return None


def read_answer(api: Api, body: bytes, *, is_whole: bool = True, sampling: bool = False) -> Answer:
    """The answer of a body that was kept; ``is_whole`` is False where only its beginning was."""
    reader = AnswerReader(api, sampling=sampling)
    reader.feed(body)
    return reader.finish(is_cut=not is_whole)
