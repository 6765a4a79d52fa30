"""Whether the payloads that a log names are there and are what it says, and are gone where they were erased."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass

from corral.actions import Content
from corral.log.events import PayloadErased, PayloadKept
from corral.log.payload_keys import PayloadError
from corral.log.payloads import PayloadMissing, Payloads
from corral.log.records import decode

MAX_HOLDINGS = 1_000_000
_WORDS = (b'"event":"log.payload_kept"', b'"event":"log.payload_erased"')
"""A quotation mark within a text is escaped in JSON, so no text of an agent can look like them."""


class Holdings:
    """Follows the payloads of a log, read from its beginning. A ``verify.Look``, with another one in front of it."""

    def __init__(self, look: Callable[[int, bytes], str] = lambda number, entry: "") -> None:
        self._look = look
        self._kept: dict[str, tuple[int, _Holding]] = {}
        self._erased: set[str] = set()
        self.unread = 0
        """Contents that :meth:`faults` found, but could not read without the key of the store."""

    def __call__(self, number: int, entry: bytes) -> str:
        """What is wrong with entry ``number``, or nothing."""
        problem = self._look(number, entry)
        if problem or not any(word in entry for word in _WORDS):
            return problem
        try:
            event = decode(entry).event
        except (ValueError, RecursionError):
            return "it is no record"
        if isinstance(event, PayloadKept):
            if len(self._kept) >= MAX_HOLDINGS:
                return f"there are more than {MAX_HOLDINGS} payloads"
            holding = _Holding(event.content, event.size, event.expires, event.encrypted)
            self._kept[event.digest] = number, holding
        elif isinstance(event, PayloadErased):
            self._erased.add(event.digest)
        return ""

    @property
    def count(self) -> int:
        """How many there should be."""
        return len(self._kept.keys() - self._erased)

    def expires(self, digest: str) -> int | None:
        """Until when the log says that it is kept; None where it says nothing of it."""
        found = self._kept.get(digest)
        return None if found is None else found[1].expires

    def faults(self, payloads: Payloads) -> Iterator[tuple[int, str]]:
        """What is wrong with them, each with the number of the record that names it."""
        self.unread = 0
        for digest, (number, holding) in self._kept.items():
            try:
                found, size = payloads.check(digest)
            except PayloadMissing:
                if digest not in self._erased:
                    yield number, f"the content {digest} is missing, and nobody has erased it"
            except PayloadError as error:
                yield number, str(error)
            else:
                self.unread += size is None
                told = _Holding(found.content, holding.size if size is None else size, found.expires, found.encrypted)
                if digest in self._erased:
                    yield number, f"the content {digest} is there although it was erased; erase it again"
                elif told != holding:
                    yield number, f"the content {digest} is not what its record says: it is {told}, not {holding}"


@dataclass(frozen=True, slots=True)
class _Holding:
    content: Content
    size: int
    expires: int
    encrypted: bool

    def __str__(self) -> str:
        secretly = "encrypted" if self.encrypted else "plain"
        return f"{self.content.value} of {self.size} bytes, {secretly}, until {self.expires}"
