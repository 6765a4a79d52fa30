"""The meter as brokers have it: one database for a process, in which every call of every session is counted."""

from __future__ import annotations

import os
import threading
from dataclasses import replace
from pathlib import Path

from corral.brokers.metering.meter import Meter, Store
from corral.brokers.setting import Setting

_lock = threading.Lock()
_stores: dict[Path, Store] = {}


def usage_directory(state: str) -> Path:
    """Where the meter is, below Corral's own state."""
    return Path(state) / "usage"


def metered(setting: Setting) -> Setting:
    """The same, with the meter among its tallies, and the agent's ledger where the policy bounds that. What cannot be
    counted is not done: raises MeterFault."""
    directory = usage_directory(setting.state)
    with _lock:
        store = _stores.get(directory)
        if store is None:
            store = _stores[directory] = Store(directory)
    meter = Meter(store, setting.policy.agent, setting.policy.model)
    return replace(setting, tallies=(*setting.tallies, meter), ledger=meter.ledger(), flush=store.flush)


def _after_fork() -> None:
    """A child has no thread that writes."""
    global _lock
    _lock = threading.Lock()
    _stores.clear()


os.register_at_fork(after_in_child=_after_fork)
