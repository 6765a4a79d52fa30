"""Which brokers a policy opens, made ready before the walls are built: what is missing is an error of the request."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING

from corral.brokers.setting import Opening
from corral.policy.doors import Broker, open_brokers
from corral.policy.model import Policy

if TYPE_CHECKING:
    from corral.brokers.model.capture import Capture


def prepare_openings(
    policy: Policy, environment: Mapping[str, str], capture: Capture | None = None
) -> dict[Broker, Opening]:
    """``environment`` is the controlling process's, where secrets may be; ``capture`` is what answers of models are
    recorded in, or given again from.

    Raises RequestError where a secret or a document is missing, or cannot be what it should, or a package that is an
    extra of Corral's is not installed.
    """
    return {broker: _prepare(broker, policy, environment, capture) for broker in open_brokers(policy)}


def _prepare(broker: Broker, policy: Policy, environment: Mapping[str, str], capture: Capture | None) -> Opening:
    match broker:
        case Broker.MODEL:
            from corral.brokers.model.broker import prepare as prepare_model

            return prepare_model(policy, environment, capture)
        case Broker.DATA:
            from corral.brokers.data.broker import prepare as prepare_data

            return prepare_data(policy, environment)
        case Broker.API:
            from corral.brokers.api.broker import prepare as prepare_api

            return prepare_api(policy, environment)
