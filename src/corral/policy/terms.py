"""On what terms a flow is let through: what all the rules that name it say of it together.

The order of rules means nothing here either. Permissions add up; TLS is ended where one rule wants that; of several
limits the tightest holds, where a value that is the default counts as not given; and of two different credentials
neither is used.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterable
from dataclasses import dataclass, field
from math import inf
from typing import Any

from corral.policy.model import Credential, FlowLimits, NetworkRule, Permit

_DEFAULT = FlowLimits()


@dataclass(frozen=True, slots=True)
class Terms:
    """Of one connection, or of one request of it."""

    rules: tuple[str, ...] = ()
    """The allow and ask rules that they come from, as records name them: ``network.allow[0]``."""
    permit: frozenset[Permit] = frozenset()
    intercept: bool = False
    """If this is TLS, it ends at the gateway, and every request in it is judged."""
    credential: Credential | None = None
    """To be put into a request. Only where it is known what is spoken."""
    limits: FlowLimits = field(default_factory=FlowLimits)
    several: bool = False
    """Its rules would put in different credentials: no request may be made."""
    judged: bool = False
    """Some rule says which requests are meant: method and path must be what they say, and nothing hidden beside."""


def combined(named: Iterable[tuple[str, NetworkRule]], denied: Iterable[NetworkRule], protocol: str | None) -> Terms:
    """The terms of a flow that ``named`` allow or ask for. ``denied`` are the denials of some of its requests."""
    labels, rules = [], []
    for label, rule in named:
        labels.append(label)
        rules.append(rule)
    found = credentials(rules, protocol)
    judged = any(rule.requests for rule in (*rules, *denied))
    return Terms(
        tuple(labels),
        frozenset(permit for rule in rules for permit in _permits(rule)),
        judged or any(rule.intercept or rule.credential for rule in rules),
        next(iter(found)) if len(found) == 1 else None,
        _tightest([rule.limits for rule in rules]),
        len(found) > 1,
        judged,
    )


def credentials(rules: Iterable[NetworkRule], protocol: str | None) -> set[Credential]:
    """What the rules would put into a request: over TLS, or in clear where the rule says ``protocol: http``. Only
    rules of one name give any."""
    return {
        rule.credential
        for rule in rules
        if rule.credential is not None
        and rule.name is not None
        and not rule.name.startswith("*")
        and (protocol == "tls" or (protocol == "http" and rule.protocol == "http"))
    }


def _permits(rule: NetworkRule) -> tuple[Permit, ...]:
    return (*rule.permit, Permit.CONNECT) if rule.protocol == "connect" else rule.permit


def _tightest(limits: list[FlowLimits]) -> FlowLimits:
    values: dict[str, Any] = {}
    for each in dataclasses.fields(FlowLimits):
        default = getattr(_DEFAULT, each.name)
        given = [value for limit in limits if (value := getattr(limit, each.name)) != default]
        if given:
            values[each.name] = min(given, key=lambda value: inf if value is None else value)
    return FlowLimits(**values)
