"""The way out of one sandbox: its names, its attempts, its rules, and what goes on in it now.

The supervisor uses ``name_of`` and ``note`` from its own thread; all else belongs to the gateway's.
"""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial
from typing import TYPE_CHECKING

from corral.actions import Action, Attempt, Decision, Endpoint, Flow, Kind, Opinion, Origin, Request, Transport, Verdict
from corral.gateway.attempts import Attempts
from corral.gateway.names import Names
from corral.gateway.resolver import CROWDED, Resolved
from corral.gateway.rules import Rules
from corral.gateway.sockets import Place
from corral.gateway.tunnelling import Tunnelling
from corral.guarded import Guarded
from corral.monitor.core import Monitor
from corral.monitor.records import Account, Glance, unwritable
from corral.monitor.steps import Execs, Steps
from corral.policy.doors import PORT, Broker, broker_of
from corral.policy.model import Credential, Policy
from corral.policy.names import address_of

if TYPE_CHECKING:
    from corral.credentials.secret import Secret
    from corral.gateway.authority import Authority
    from corral.gateway.connection import Connection
    from corral.gateway.doors import Door
    from corral.gateway.queries import Queries
    from corral.gateway.resolver import Resolver
    from corral.monitor.parts import Held

KEPT = 300.0
"""Seconds for which what a name of a wildcard led to is used again; each look-up costs of a budget."""
MAX_FLOWS = 2048
"""Connections of one sandbox at a time; what comes beyond is reset and recorded."""


@dataclass(frozen=True, slots=True)
class Setting:
    """What one sandbox's way out is made of."""

    sandbox: str
    session: str
    policy: Policy
    monitor: Monitor
    listeners: tuple[int, ...]
    """TCP listeners of the sandbox's network, descriptors that are taken over."""
    datagrams: tuple[int, ...]
    """Sockets bound to port 53 there, the same."""
    end: Callable[[str], None]
    """Ends the sandbox. From any thread."""
    settle: Callable[[Callable[[], None]], None]
    """Calls back once the supervisor has done what it does now. From any thread."""
    accounts: Sequence[Account] = ()
    glances: Sequence[Glance] = ()
    authority: Authority | None = None
    secrets: Mapping[Credential, Secret] = field(default_factory=dict)
    """What is put into requests."""
    doors: Mapping[Broker, Door] = field(default_factory=dict)
    """Who takes connections to brokers over."""
    steps: Steps = field(default_factory=Execs)


class Egress:
    """As :class:`corral.supervisor.egress.Egress`, and what the gateway needs of a sandbox."""

    loop: Guarded
    resolver: Resolver
    buffer: memoryview
    """What all relays of the thread use."""
    queries: Queries

    def __init__(self, setting: Setting) -> None:
        self.setting = setting
        self.names = Names()
        self.tunnelling = Tunnelling()
        self.rules = Rules(setting.policy)
        self.attempts = Attempts(setting.settle)
        self.nobody = Origin(setting.sandbox, setting.session)
        self.flows: set[Connection] = set()
        self.ended = False
        self._thread = 0
        self._last: dict[str, tuple[float, Resolved]] = {}
        """What each name of a wildcard led to before, also where that was nothing, and until when it is used again."""

    # ---- the supervisor's ----

    def name_of(self, packed: bytes) -> str | None:
        """As :class:`corral.supervisor.egress.Egress`."""
        return self.names.name_of(packed)

    def note(self, attempt: Attempt) -> None:
        """As :class:`corral.supervisor.egress.Egress`."""
        self.attempts.note(attempt)

    # ---- the gateway's ----

    def start(self, loop: Guarded, resolver: Resolver, buffer: memoryview) -> None:
        """In the gateway's thread."""
        from corral.gateway.queries import Queries  # dnspython, long to load: by now the walls are being built

        self.loop, self.resolver, self.buffer = loop, resolver, buffer
        self.queries = Queries(self)
        self._thread = threading.get_ident()

    def endpoint(self, to: Place) -> Endpoint:
        """Where a connection was to go, as the supervisor says it: by name, where the address stands for one."""
        name = self.names.name_of(to[0])
        return Endpoint(Transport.TCP, "" if name is not None else address_of(to[0]), to[1], name)

    def door(self, endpoint: Endpoint) -> Door | None:
        """Who takes a connection to there over, which the supervisor has let through."""
        broker = broker_of(endpoint.name) if endpoint.port == PORT else None
        return None if broker is None else self.setting.doors.get(broker)

    def decide(
        self,
        kind: Kind,
        subject: Endpoint | Request,
        origin: Origin,
        then: Callable[[Decision], None],
        *,
        own: Opinion | None = None,
        following: Decision | None = None,
    ) -> Held | None:
        """Has the monitor decide; ``then`` is called with the decision in the gateway's thread, at once or later.

        A connection may be older than the step in which something is asked over it, so ``origin`` is looked at anew.
        """
        origin = self.setting.steps.cause_of(origin, subject)

        def decided(decision: Decision) -> None:
            if threading.get_ident() == self._thread:
                then(decision)
            else:
                self.loop.post(then, decision)

        return self.setting.monitor.submit(Action(kind, subject, origin), decided, own=own, following=following)

    def resolve(self, name: str, done: Callable[[Resolved], None]) -> None:
        """Finds the addresses of a name on the host. Below a wildcard each look-up that leaves the host tells its owner
        something, so there is a budget for them, beyond which what was found before has to do."""
        zone = self.rules.zone(name)
        if zone is None:
            done(Resolved((), 0.0, "no rule names it"))
            return
        if not zone:
            self.resolver.resolve(name, partial(self.loop.call, done), self)
            return
        before = self._last.get(name)
        if before is not None and (time.monotonic() < before[0] or self.tunnelling.again(name, zone)):
            done(before[1])
            return

        def found(resolved: Resolved) -> None:
            if resolved is not CROWDED:
                self._last[name] = (time.monotonic() + KEPT, resolved)
            done(resolved)

        self.resolver.resolve(name, partial(self.loop.call, found), self)

    def live(self) -> list[Flow]:
        """What goes on now. From any thread."""
        return [connection.flow() for connection in tuple(self.flows)]

    def account(self, flow: Flow) -> None:
        """Keeps the account of a flow that is over."""
        try:
            for account in self.setting.accounts:
                account.flow(flow)
        except Exception as error:
            self.setting.end(unwritable(error))

    def refuse(self, kind: Kind, subject: Endpoint, origin: Origin, rule: str, reason: str, advice: str = "") -> None:
        """Records what the gateway itself refuses."""
        self.decide(kind, subject, origin, _recorded, own=Opinion(Verdict.DENY, rule, reason, advice))

    def look_after(self) -> None:
        """Ends what has waited for too long."""
        now = time.monotonic()
        for connection in list(self.flows):
            connection.look_after(now)


def _recorded(decision: Decision) -> None:
    """It is refused, whatever anybody thinks of it."""
