"""What ``irreversible`` of a policy is about: requests, queries and operations that change something outside for good.

A rule without methods says where an agent may go, not what it may do there: a write that only such rules allow is put
to a person. A rule that names the method (``requests: [POST /v1/messages]``), or the statement of a query, is that
person's word already, given when the policy was written, and is not asked for once more. So is one that has the id of
an operation of a service.

It can only raise a verdict, and only of what a rule allows: what nothing allows is denied, not asked for.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace

from corral.actions import Endpoint, Meaning, Operation, Request, Verdict
from corral.policy.destinations import Destinations
from corral.policy.matching import escape_glob
from corral.policy.model import ApiRule, DataRule, NetworkRule, Permit, Policy, RequestRule

RULE = "irreversible"
"""As opinions and records name it."""
REASON = (
    "It may change something outside that cannot be taken back, and no rule of the policy names its {what}: {rule}."
)
UNSEEN = (
    "Within TLS that is passed through nobody sees whether something is changed outside: the rule for this place "
    "must say `intercept: true`, or `protocol: tls`."
)
UPLOAD_PACK = "/git-upload-pack"
_UNCLEAR = frozenset("%;?")
_ADVISORIES = frozenset(
    ("/-/npm/v1/security/advisories/bulk", "/-/npm/v1/security/audits", "/-/npm/v1/security/audits/quick")
)
"""Whole paths: no site but a registry of npm has them."""
_TUNNELS = frozenset((Permit.CONNECT, Permit.H2C, Permit.STARTTLS, Permit.UPGRADE, Permit.WEBSOCKET))
"""What begins where it can be seen, and goes on unseen."""
_CONNECT = RequestRule(("CONNECT",))


def fetches(method: str, path: str) -> bool:
    """Whether this is a POST by which a tool reads, as far as method and path say it, both as they were written: where
    git sends what it wants to have (gitprotocol-http(5)), and where `npm install` asks for known faults of packages."""
    if method != "POST":
        return False
    return path in _ADVISORIES or (path.endswith(UPLOAD_PACK) and not _UNCLEAR.intersection(path))


class NamedWrites:
    """The requests that rules of allow and ask name by their method."""

    def __init__(self, policy: Policy) -> None:
        network = policy.network
        self._destinations = Destinations(tuple(_reduced((*network.allow, *network.ask))))

    def name(self, request: Request, packed: bytes | None) -> bool:
        """Whether one of them surely names it, at its address. What asks for another method than its own is named by
        none."""
        if request.meaning is not Meaning.METHOD:
            return False
        endpoint = request.endpoint
        return bool(self._destinations.all(endpoint, packed, protocol=endpoint.protocol, request=request))


def _reduced(rules: tuple[NetworkRule, ...]) -> Iterator[NetworkRule]:
    """The rules with those of their requests only that name a method. To permit CONNECT is to name it."""
    for rule in rules:
        requests = tuple(request for request in rule.requests if request.methods)
        if Permit.CONNECT in rule.permit or rule.protocol == "connect":
            requests += (_CONNECT,)
        if requests:
            yield replace(rule, requests=requests)


def names_statement(rules: tuple[DataRule, ...]) -> bool:
    """Whether one of these rules, which name a query, says its statement."""
    return any(rule.statements for rule in rules)


def names_operation(rules: tuple[ApiRule, ...], call: Operation) -> bool:
    """Whether one of these rules, which name a call, says its operation in full. A glob does not: what else it will
    name one day, nobody has thought of."""
    return any(escape_glob(call.operation) in rule.operations for rule in rules)


def passes_unseen(rules: tuple[NetworkRule, ...], endpoint: Endpoint, *, intercepted: bool) -> bool:
    """Whether what is spoken with a destination is TLS that nobody looks into, although no rule says just that."""
    return endpoint.protocol == "tls" and not intercepted and all(rule.protocol is None for rule in rules)


def unseen_rules(policy: Policy) -> list[tuple[str, str]]:
    """The allow and ask rules under which writes can go out that nobody sees, with what is spoken: for whoever checks
    a policy. None where writes are allowed anyway."""
    if policy.irreversible is Verdict.ALLOW:
        return []
    network = policy.network
    return [
        (f"network.{field}[{index}]", unseen)
        for field, rules in (("allow", network.allow), ("ask", network.ask))
        for index, rule in enumerate(rules)
        if (unseen := ", ".join(_unseen(rule, refused=policy.irreversible is Verdict.DENY)))
    ]


def _unseen(rule: NetworkRule, *, refused: bool) -> Iterator[str]:
    """``refused``: TLS that no rule names is not passed through at all."""
    intercepted = rule.intercept or rule.requests or rule.credential
    if rule.protocol not in (None, "tls", "http", "udp"):
        yield rule.protocol
    elif not intercepted and (rule.protocol == "tls" or (rule.protocol is None and not refused)):
        yield "tls"
    yield from (permit.value for permit in rule.permit if permit in _TUNNELS)
