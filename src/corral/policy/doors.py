"""The names under which brokers are found inside, and which part of a policy opens each."""

from __future__ import annotations

from enum import Enum

from corral.policy.model import Policy

PORT = 80
"""Of all of them."""
ZONE = "corral.internal"
"""Below it are the names of brokers and nothing else: no rule about destinations is about a name there."""


class Broker(Enum):
    """Who stands behind a door; the section of the policy that opens it has the same name."""

    MODEL = "model"
    DATA = "data"
    API = "api"

    @property
    def host(self) -> str:
        """Its name inside."""
        return f"{self.value}.{ZONE}"

    @property
    def url(self) -> str:
        """Where it is asked."""
        return f"http://{self.host}"


_OPENED_BY = {Broker.MODEL: "model.upstreams", Broker.DATA: "data.sources", Broker.API: "api.services"}
_BY_HOST = {broker.host: broker for broker in Broker}


def broker_of(name: str | None) -> Broker | None:
    """Whose name this is."""
    return None if name is None else _BY_HOST.get(name)


def is_reserved(name: str | None) -> bool:
    """Whether a name, in its one form, is the zone of the brokers, or below it."""
    return name is not None and (name == ZONE or name.endswith(f".{ZONE}"))


def opened_by(broker: Broker) -> str:
    """The field of a policy that opens it."""
    return _OPENED_BY[broker]


def is_open(policy: Policy, broker: Broker) -> bool:
    """Whether there is anything behind its door."""
    match broker:
        case Broker.MODEL:
            return bool(policy.model.upstreams)
        case Broker.DATA:
            return bool(policy.data.sources)
        case Broker.API:
            return bool(policy.api.services)


def open_brokers(policy: Policy) -> tuple[Broker, ...]:
    """Those that there are for a policy."""
    return tuple(broker for broker in Broker if is_open(policy, broker))
