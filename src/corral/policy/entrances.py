"""Who may go to the names of brokers: nobody decides that but the sections of the policy that open them.

Rules about destinations say nothing of these names, neither by a wildcard around them nor by a deny: what a broker lets
through, it asks for itself, call by call. A policy file that names one is refused when it is read.
"""

from __future__ import annotations

from corral.actions import Endpoint, Kind, Opinion, Request, Transport, Verdict
from corral.policy.doors import PORT, Broker, broker_of, is_open, open_brokers, opened_by
from corral.policy.judgement import STAY_REFUSED, Judgement, Match, refused
from corral.policy.model import Policy

NO_BROKER = "brokers (no such name)"
_CALLED = {Broker.MODEL: "model", Broker.DATA: "data", Broker.API: "API"}


def name_of(broker: Broker) -> str:
    """What allows to go to a broker that is open, as records and explanations name it."""
    return f"{broker.value} (broker)"


def at_door(policy: Policy, kind: Kind, subject: Endpoint | Request) -> Judgement:
    """What becomes of looking up such a name, or of connecting to it. Nothing is ever sent there but by a connection:
    an enforcer that asks for anything else is refused."""
    endpoint = subject.endpoint if isinstance(subject, Request) else subject
    broker = broker_of(endpoint.name)
    if broker is None:
        return _refused(NO_BROKER, f"There is no broker of the name {endpoint.name}.", _others(policy))
    rule = name_of(broker)
    if not is_open(policy, broker):
        reason = f"This sandbox has no {_CALLED[broker]} broker: its policy has no `{opened_by(broker)}`."
        return _refused(f"{broker.value} (no broker)", reason, _others(policy))
    if kind is Kind.NET_RESOLVE:
        return _allowed(rule)
    if kind is Kind.NET_CONNECT and endpoint.transport is Transport.TCP and endpoint.port == PORT:
        return _allowed(rule)
    reason = f"The {_CALLED[broker]} broker speaks HTTP at port {PORT}, and nothing else."
    return _refused(rule, reason, f"Use {broker.url}.")


def _allowed(rule: str) -> Judgement:
    return Judgement(Opinion(Verdict.ALLOW, rule), (Match(Verdict.ALLOW, rule),))


def _refused(rule: str, reason: str, advice: str) -> Judgement:
    return refused(Match(Verdict.DENY, rule), reason, advice)


def _others(policy: Policy) -> str:
    urls = [broker.url for broker in open_brokers(policy)]
    return f"There is {', '.join(urls)}." if urls else STAY_REFUSED
