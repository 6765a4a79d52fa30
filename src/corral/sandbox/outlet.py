"""What the way out of one sandbox needs beside its policy: an authority for TLS that is looked at, and secrets.

Both are made before the walls are built: the certificate is shown inside, and a secret that is missing is an error of
the request. Neither the authority's key nor a secret ever is in the plan.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

from corral.policy.model import Credential, Policy

if TYPE_CHECKING:
    from corral.gateway.authority import Authority
    from corral.gateway.credentials import Secret
    from corral.gateway.egress import Egress
    from corral.monitor.core import Monitor
    from corral.monitor.records import Account, Glance
    from corral.monitor.steps import Steps
    from corral.sandbox.prepare import Prepared


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


def make_outlet(policy: Policy, environment: Mapping[str, str], place: str, *, java: bool = False) -> Outlet:
    """What ``policy`` needs. ``environment`` is the caller's, where secrets may be; ``place`` is where the certificates
    will be found inside; ``java`` is whether there are programs that want them in its form.

    Raises RequestError where a secret is missing or cannot be one.
    """
    rules = (*policy.network.allow, *policy.network.ask)
    looked_at = any(rule.intercept or rule.requests or rule.credential for rule in rules)
    if not rules or not (looked_at or any(rule.requests for rule in policy.network.deny)):
        return Outlet()
    from corral.gateway.authority import Authority
    from corral.gateway.authority import environment as variables
    from corral.gateway.credentials import load

    secrets = {rule.credential: load(rule.credential, environment) for rule in rules if rule.credential is not None}
    authority = Authority()
    return Outlet(authority, secrets, authority.bundle(), variables(place), authority.truststore() if java else b"")


def open_egress(
    prepared: Prepared,
    monitor: Monitor,
    doors: Sequence[int],
    *,
    end: Callable[[str], None],
    settle: Callable[[Callable[[], None]], None],
    accounts: Sequence[Account],
    glances: Sequence[Glance],
    steps: Steps,
) -> Egress:
    """Opens the way out. ``doors`` are what READY has handed out for it: TCP of both families, then DNS of both; they
    are taken over."""
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
            steps=steps,
        )
    )
    service.shared().attach(egress)
    return egress


def close_egress(egress: Egress) -> None:
    """The sandbox is dead."""
    from corral.gateway import service

    service.shared().detach(egress)
