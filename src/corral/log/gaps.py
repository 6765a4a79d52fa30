"""Finds records that are missing: within a session their numbers have no gaps.

Looks at two fields by their place in canonical JSON, since parsing every record would take ten times as long as
verifying it. A quotation mark within a text is escaped there, so no text of an agent can look like them.
"""

from __future__ import annotations

import re

MAX_SESSIONS = 1_000_000
_FIELDS = re.compile(rb'"metadata":\{"correlation_uid":("(?:[^"\\]|\\.){0,600}")[^}]*\}[^}]*"sequence":(\d{1,16}),')


class Gaps:
    """Follows the numbers of all sessions of a log, read from its beginning. A ``verify.Look``."""

    def __init__(self) -> None:
        self._last: dict[bytes, int] = {}

    def __call__(self, number: int, entry: bytes) -> str:
        """What is wrong with entry ``number``, or nothing."""
        found = _FIELDS.search(entry)
        if found is None:
            return "it is no record"
        session, sequence = found[1], int(found[2])
        if not sequence:  # of the log itself
            return ""
        if session not in self._last and len(self._last) >= MAX_SESSIONS:
            return f"there are more than {MAX_SESSIONS} sessions"
        last = self._last.get(session, 0)
        self._last[session] = sequence
        if sequence == last + 1:
            return ""
        name = session.decode("utf-8", "replace")
        if sequence <= last:
            return f"record {sequence} of session {name} is there again, after {last}"
        return f"records {last + 1} to {sequence - 1} of session {name} are missing before it"
