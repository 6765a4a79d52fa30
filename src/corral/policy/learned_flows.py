"""What a recorded run did outside, as rules can say it: one destination after the other, with its requests."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, field
from typing import Any

from pydantic import ValidationError

from corral.actions import Transport
from corral.policy.flow_rules import RequestRuleFile
from corral.policy.matching import escape_glob
from corral.policy.requests import read_path

MAX_REQUESTS = 500
"""Requests in all network rules together; of destinations with more only the methods are named."""
_MAX_REQUESTS = 64
"""Requests of one destination."""


@dataclass(slots=True)
class Outside:
    """What was done at one destination. All of it has consequences, so all of it is asked for."""

    place: dict[str, Any]
    """The fields of a rule that say where it is."""
    transport: Transport
    spoken: dict[str | None, dict[tuple[str, str], None]] = field(default_factory=dict)
    """By protocol (None: it was never known), the requests that were made, by method and path."""
    times: int = 0

    def protocols(self) -> dict[str | None, dict[tuple[str, str], None]]:
        """Without the connections that were judged before anybody knew what is spoken, where it was known later."""
        heard: dict[str | None, dict[tuple[str, str], None]] = {
            protocol: requests for protocol, requests in self.spoken.items() if protocol is not None
        }
        return heard if heard and self.transport is Transport.TCP else self.spoken


def requests_of(made: Iterable[tuple[str, str]], *, whole: bool) -> tuple[dict[str, str], ...]:
    """The fewest requests that can be named and hold all that were made."""
    found: dict[tuple[tuple[str, str], ...], None] = {}
    methods: dict[tuple[tuple[str, str], ...], None] = {}
    for method, path in made:
        of_method = (("method", method),) if method == method.upper() and _is_request(method=method) else ()
        methods[of_method] = None
        readings = [escape_glob(reading) for reading in read_path(path)]
        if readings and all(_is_request(path=reading) for reading in readings):
            found |= {(*of_method, ("path", reading)): None for reading in readings}
        else:
            found[of_method] = None
    if not whole or len(found) > _MAX_REQUESTS:
        found = methods
    return tuple(dict(fields) if fields else {"path": "/**"} for fields in sorted(found))


def _is_request(**fields: str) -> bool:
    try:
        RequestRuleFile.model_validate(fields)
    except ValidationError:
        return False
    return True
