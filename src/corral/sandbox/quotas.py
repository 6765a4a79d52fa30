"""How much may be kept, as policy says: of one session, and of all together.

What a run may write at most (``resources.disk``) is set aside when it starts, if its changes are to be kept; so the
changes of a run that was started are never lost to a quota. What is refused is a start, or a snapshot, and nothing is
lost by that. Before anything is refused, what has been kept long enough goes.
"""

from __future__ import annotations

import time
from contextlib import suppress

from corral.errors import CorralError
from corral.policy.model import Policy
from corral.sandbox import account, claims
from corral.sandbox.area import collect_expired
from corral.sandbox.copying import Quota
from corral.sandbox.layer import KeptLayer, reap_partials, store

AT_ONCE = 1.0
"""Seconds that may go into removing what has been kept long enough; the rest is for later, unless room is needed."""
_TOTAL, _SNAPSHOTS = "layers.total_bytes", "layers.snapshot_bytes"


def reserve(session: str, policy: Policy) -> None:
    """Sets aside what the end of a session may have to keep. Raises CorralError where there is no room for that."""
    bound, need = policy.layers.total_bytes, policy.resources.disk
    if bound is None:
        return
    with store() as layers:
        for seconds in (AT_ONCE, None):
            collect_expired(layers, time.time(), seconds)
            if seconds is None:
                reap_partials()
            with account.reserving(layers) as total:
                taken = total + claims.reserved(layers)
                if taken + need <= bound:
                    claims.claim(layers, session, need)
                    return
    raise CorralError(
        f"the changes of this run could not be kept: {taken} bytes of {_TOTAL} ({bound}) are taken or set aside, and "
        f"it may write {need} (resources.disk). `corral layers` lists what is kept, `corral gc` removes what may go"
    )


def admit(layers: int, session: str, identifier: str, policy: Policy) -> Quota | None:
    """How much a layer of a session may add. Raises OSError, CorralError."""
    collect_expired(layers, time.time(), AT_ONCE)
    bounds = []
    if identifier != session:  # a snapshot, which is named while the session goes on
        claims.claim(layers, session)
        if policy.layers.snapshot_bytes is not None:
            left = policy.layers.snapshot_bytes - claims.kept(layers, session)
            bounds.append(Quota(left, _SNAPSHOTS))
    bound = _bound(layers, session, identifier, policy)
    if bound is not None:
        bounds.append(Quota(bound - account.total(layers), _TOTAL))
    return min(bounds, key=lambda quota: quota.bytes, default=None)


def enter(layers: int, kept: KeptLayer, session: str, policy: Policy) -> None:
    """Enters a layer into the account, before it has its name. Raises CorralError where others have taken its room
    meanwhile; OSError."""
    bound = _bound(layers, session, kept.id, policy)
    if not account.add(layers, kept.disk, expires=kept.expires, bound=bound):
        raise Quota(0, _TOTAL).refusal()
    claims.remember(session, kept.id, kept.disk)


def withdraw(layers: int, kept: KeptLayer) -> None:
    """It has got no name after all."""
    with suppress(OSError):  # then there is too much in the account
        account.add(layers, -kept.disk)


def _bound(layers: int, session: str, identifier: str, policy: Policy) -> int | None:
    if policy.layers.total_bytes is None or (identifier == session and claims.has_reserved(session)):
        return None
    return policy.layers.total_bytes - claims.reserved(layers)
