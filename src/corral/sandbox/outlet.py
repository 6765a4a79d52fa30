"""What the way out of one sandbox needs beside its policy: an authority for TLS that is looked at, secrets, brokers.

All are made before the walls are built: the certificate is shown inside, and a secret that is missing is an error of
the request. Neither the authority's key nor a secret ever is in the plan.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING

from corral.errors import RequestError
from corral.policy.doors import Broker, is_open, open_brokers
from corral.policy.model import Credential, ModelApi, Policy

if TYPE_CHECKING:
    from corral.brokers.model.capture import Capture
    from corral.brokers.service import Brokers
    from corral.brokers.setting import Opening
    from corral.brokers.setting import Setting as BrokerSetting
    from corral.credentials.secret import Secret
    from corral.gateway.authority import Authority
    from corral.gateway.egress import Egress
    from corral.monitor.core import Monitor
    from corral.monitor.records import Account, Glance
    from corral.monitor.steps import Steps
    from corral.sandbox.prepare import Prepared

NO_KEY = "kept-by-corral"
"""Where a client wants a key: the broker puts the real one in."""


@dataclass(frozen=True, slots=True)
class Outlet:
    """Of one sandbox."""

    authority: Authority | None = None
    """Whose certificates the programs inside trust."""
    secrets: Mapping[Credential, Secret] = field(default_factory=dict)
    """What is put into requests."""
    certificates: bytes = b""
    """What is to be trusted inside in place of the system's bundle; PEM."""
    environment: Mapping[str, str] = field(default_factory=dict)
    """Variables by which programs find that."""
    truststore: bytes = b""
    """The same as ``certificates`` for Java, where it is here: PKCS #12."""
    openings: Mapping[Broker, Opening] = field(default_factory=dict)
    """What its brokers are made by."""


def make_outlet(
    policy: Policy,
    environment: Mapping[str, str],
    place: str,
    *,
    java: bool = False,
    capture: Callable[[], Capture] | None = None,
) -> Outlet:
    """What ``policy`` needs. ``environment`` is the caller's, where secrets may be; ``place`` is where the certificates
    will be found inside; ``java`` is whether there are programs that want them in its form; ``capture`` makes what
    answers of models are recorded in, or given again from.

    Raises RequestError where a secret or document is missing or cannot be one.
    """
    outlet = _tls_outlet(policy, environment, place, java=java)
    if capture is not None and not is_open(policy, Broker.MODEL):
        raise RequestError("answers of models are to be recorded or given again, but the policy has no model.upstreams")
    if not open_brokers(policy):
        return outlet
    from corral.brokers.openings import prepare_openings

    openings = prepare_openings(policy, environment, None if capture is None else capture())
    return replace(outlet, openings=openings, environment={**outlet.environment, **broker_variables(policy)})


def _tls_outlet(policy: Policy, environment: Mapping[str, str], place: str, *, java: bool) -> Outlet:
    rules = (*policy.network.allow, *policy.network.ask)
    looked_at = any(rule.intercept or rule.requests or rule.credential for rule in rules)
    if not rules or not (looked_at or any(rule.requests for rule in policy.network.deny)):
        return Outlet()
    from corral.credentials.secret import load
    from corral.gateway.authority import Authority
    from corral.gateway.authority import environment as variables

    secrets = {rule.credential: load(rule.credential, environment) for rule in rules if rule.credential is not None}
    authority = Authority()
    return Outlet(authority, secrets, authority.bundle(), variables(place), authority.truststore() if java else b"")


def broker_variables(policy: Policy) -> dict[str, str]:
    """Variables by which unmodified programs find the brokers. Clients insist on a key; this one opens nothing."""
    variables = {f"CORRAL_{broker.name}_URL": broker.url for broker in open_brokers(policy)}
    spoken = {upstream.api for upstream in policy.model.upstreams}
    if ModelApi.OPENAI in spoken:
        base = f"{Broker.MODEL.url}/v1"
        variables |= {"OPENAI_BASE_URL": base, "OPENAI_API_BASE": base, "OPENAI_API_KEY": NO_KEY}
    if ModelApi.ANTHROPIC in spoken:
        variables |= {"ANTHROPIC_BASE_URL": Broker.MODEL.url, "ANTHROPIC_API_KEY": NO_KEY}
    return variables


def open_doors(prepared: Prepared, setting: Callable[[], BrokerSetting], end: Callable[[str], None]) -> Brokers | None:
    """Opens the brokers that there are; ``setting`` is made only then, in their thread. ``end`` ends the sandbox."""
    if not prepared.outlet.openings:
        return None
    from corral.brokers import service

    return service.shared().attach(setting, prepared.outlet.openings, end)


def close_doors(brokers: Brokers) -> None:
    """The sandbox is dead. Returns when all that was under way has accounted for itself."""
    from corral.brokers import service

    service.shared().detach(brokers)


def open_egress(
    prepared: Prepared,
    monitor: Monitor,
    doors: Sequence[int],
    *,
    brokers: Brokers | None,
    end: Callable[[str], None],
    settle: Callable[[Callable[[], None]], None],
    accounts: Sequence[Account],
    glances: Sequence[Glance],
    steps: Steps,
) -> Egress:
    """Opens the way out. ``doors`` are what READY has handed out for it: TCP of both families, then DNS of both; they
    are taken over. ``brokers`` stand behind doors of their own."""
    from corral.gateway import service
    from corral.gateway.egress import Egress, Setting

    egress = Egress(
        Setting(
            sandbox=prepared.id,
            session=prepared.id,
            policy=prepared.options.policy,
            monitor=monitor,
            listeners=tuple(doors[:2]),
            datagrams=tuple(doors[2:]),
            end=end,
            settle=settle,
            accounts=tuple(accounts),
            glances=tuple(glances),
            authority=prepared.outlet.authority,
            secrets=prepared.outlet.secrets,
            doors={} if brokers is None else brokers.doors,
            steps=steps,
        )
    )
    service.shared().attach(egress)
    return egress


def close_egress(egress: Egress) -> None:
    """The sandbox is dead."""
    from corral.gateway import service

    service.shared().detach(egress)
