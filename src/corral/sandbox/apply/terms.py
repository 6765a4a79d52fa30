"""On what terms a layer is applied: what the policy of its run demands, and where that is recorded.

They are kept with the layer, below the state directory that no sandbox is shown, so the agent cannot change them. A
layer that was begun on another is bound by the terms of both.
"""

from __future__ import annotations

import hashlib
import json
import os
import stat
from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace
from typing import TYPE_CHECKING, Any

from corral.policy.model import Apply, Policy

if TYPE_CHECKING:
    from corral.sandbox.prepare import Prepared

FILE = "terms"
_MAX = 64 << 20


@dataclass(frozen=True, slots=True)
class Terms:
    """Those of one run."""

    sandbox: str
    """Which is also its session."""
    agent: str
    version: str
    policy: str
    """The canonical form of its policy."""
    apply: Apply
    """What that demands."""
    log: str = ""
    """The directory of its log; empty where it had none."""
    origin: str = ""
    """The name of that log."""

    @property
    def policy_hash(self) -> str:
        return f"sha256:{hashlib.sha256(self.policy.encode()).hexdigest()}"


def terms_of(prepared: Prepared) -> Terms:
    """Those of a sandbox."""
    from corral.policy.canonical import canonical_form  # loads rfc8785

    policy, form = prepared.options.policy, canonical_form(prepared.options.policy).decode()
    log, origin = prepared.options.log
    return Terms(prepared.id, policy.agent.name, policy.agent.version, form, policy.apply, log, origin)


def together(before: Sequence[Terms], own: Terms) -> tuple[Terms, ...]:
    """Those of a run that was begun on a layer; the same terms are kept once."""
    return (*(each for each in before if replace(each, sandbox=own.sandbox) != own), own)


def demands(terms: Sequence[Terms], policy: Policy | None = None) -> Apply:
    """What must be asked for by any of them; a further policy can only add to that."""
    every = [each.apply for each in terms] + ([policy.apply] if policy else [])
    return Apply(tuple(dict.fromkeys(glob for each in every for glob in each.ask)))


def write(directory: int, terms: Sequence[Terms]) -> None:
    """Writes them beside a layer. Raises OSError."""
    fd = os.open(FILE, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, 0o600, dir_fd=directory)
    with open(fd, "w", encoding="ascii") as file:
        json.dump([asdict(each) for each in terms], file)


def read(directory: int) -> tuple[Terms, ...]:
    """Raises OSError or ValueError."""
    fd = os.open(FILE, os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK | os.O_CLOEXEC, dir_fd=directory)
    with open(fd, "rb") as file:
        content = file.read(_MAX + 1)
        if not stat.S_ISREG(os.fstat(fd).st_mode) or len(content) > _MAX:
            raise ValueError(f"{FILE} is not what was written")
    return from_json(json.loads(content))


def from_json(rows: Any) -> tuple[Terms, ...]:
    """What :func:`dataclasses.asdict` made of them. Raises ValueError."""
    try:
        return tuple(_one(**row) for row in rows)
    except (TypeError, KeyError) as error:
        raise ValueError(f"the terms are none: {error}") from None


def _one(*, apply: dict[str, Any], **texts: Any) -> Terms:
    count = apply["cosignatures"]
    ask, witnesses = tuple(apply["ask"]), tuple(apply["witnesses"])
    if not all(type(text) is str for text in (*texts.values(), *ask, *witnesses)) or type(count) is not int:
        raise ValueError("the terms are none")
    return Terms(apply=Apply(ask, witnesses, count), **texts)
