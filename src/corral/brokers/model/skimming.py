"""Which pieces of a stream need not be read: whole events that only say more of a text.

They are nearly all of an answer, and to take each apart costs as much as to pass it on. A piece is left out only where
it begins and ends with an event, and none of the words is in it that an event of any other kind has. So what is read
is a stream still, of the same tool calls, end and usage. What is left out is counted: an event is about a token.
"""

from __future__ import annotations

from corral.modelapi.answer import Api

_ERROR = b'"error'
_WORDS: dict[Api, tuple[bytes, ...]] = {
    Api.CHAT: (
        b"tool_calls",
        b"function_call",
        b"prompt_tokens",
        b'"finish_reason":"',
        b'"finish_reason": "',
        b"[DONE]",
        _ERROR,
    ),
    Api.RESPONSES: (
        b"output_item",
        b"response.created",
        b"response.completed",
        b"response.incomplete",
        b"response.failed",
        _ERROR,
    ),
    Api.MESSAGES: (b"content_block_st", b"message_st", b"message_delta", b"input_json_delta", _ERROR),
}


class Skimmer:
    """Of one stream, whose pieces it is asked about in order."""

    def __init__(self, api: Api) -> None:
        self._words = (*_WORDS[api], b"\r")
        self._is_between = False
        """What came until now has ended with an event. Not at the beginning, where it shows what the body is."""
        self.events = 0
        """That were left out."""

    def skips(self, data: bytes) -> bool:
        """Whether a piece need not be read."""
        if (
            self._is_between
            and data.endswith(b"}\n\n")
            and data.startswith((b"data: {", b"event: "))
            and not any(word in data for word in self._words)
        ):
            self.events += data.count(b"\n\n")
            return True
        self._is_between = data.endswith(b"\n\n")
        return False
