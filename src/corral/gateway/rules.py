"""What a policy's network rules say beside yes and no: how a flow that they let through is to be handled."""

from __future__ import annotations

from collections import Counter
from functools import lru_cache

from corral.actions import Endpoint, Request
from corral.policy.destinations import Destinations
from corral.policy.doors import broker_of, is_open
from corral.policy.matching import packed_address
from corral.policy.model import ANY_NAME, FlowLimits, Policy
from corral.policy.part import PolicyPart
from corral.policy.terms import Terms

MAX_CACHED = 1024
"""Endpoints whose terms are kept; then all are forgotten."""


class Budget:
    """Bytes that all flows of one rule together may still carry one way."""

    __slots__ = ("_left",)

    def __init__(self, total: int) -> None:
        self._left = total

    def take(self, count: int) -> bool:
        """Whether so many more may be carried. Nothing is given back."""
        self._left -= count
        return self._left >= 0


Budgets = tuple[Budget | None, Budget | None]
"""Up and down; None where there is no bound."""
SPENT = "all bytes that its rule has for this session are spent"


class Rules:
    """The network rules of one sandbox. For the gateway's thread."""

    def __init__(self, policy: Policy) -> None:
        both = (*policy.network.allow, *policy.network.ask)
        self._policy, self._part = policy, PolicyPart(policy)
        self._rules = both
        self._all = Destinations(both)
        self._terms: dict[Endpoint, Terms] = {}
        self.zone = lru_cache(MAX_CACHED)(self._zone)
        """The wildcard below which a name may be made up (``*.example.org``), the longest of several; ``""`` where a
        rule names it in full, and None where none names it."""
        self.expects_server_first = lru_cache(MAX_CACHED)(self._expects_server_first)
        """Whether a rule lets a protocol through in which the server may speak first."""
        self._budgets: dict[str, Budgets] = {}
        self.flows: Counter[str] = Counter()
        """How many flows each rule has now."""

    def terms(self, subject: Endpoint | Request) -> Terms:
        """On what terms a flow there is let through, if it is, or one request of it; it says what is spoken."""
        if isinstance(subject, Request):
            return self._part.terms(subject)
        endpoint = subject
        terms = self._terms.get(endpoint)
        if terms is None:
            if len(self._terms) >= MAX_CACHED:
                self._terms.clear()
            terms = self._terms[endpoint] = self._part.terms(endpoint)
        return terms

    def budgets(self, rule: str, limits: FlowLimits) -> Budgets:
        """What is left of the bytes of a rule."""
        found = self._budgets.get(rule)
        if found is None:
            up, down = limits.session_up, limits.session_down
            found = None if up is None else Budget(up), None if down is None else Budget(down)
            self._budgets[rule] = found
        return found

    def _zone(self, name: str) -> str | None:
        broker = broker_of(name)
        if broker is not None:
            return "" if is_open(self._policy, broker) else None
        names = [self._rules[index].name for index in self._all.naming(name, wholly=False)]
        if not names:
            return None
        if name in names or ANY_NAME in names:
            return ""
        return max((each for each in names if each is not None), key=len, default=None)

    def _expects_server_first(self, endpoint: Endpoint) -> bool:
        return self.names_protocol(endpoint, "tcp")

    def names_protocol(self, endpoint: Endpoint, protocol: str) -> bool:
        """Whether a rule for this destination has this very word for ``protocol``."""
        packed = packed_address(endpoint.address) if endpoint.address else None
        found = self._all.all(endpoint, packed, protocol=protocol)
        return any(self._rules[index].protocol == protocol for index in found)
