"""A proposal: exactly what applying a layer would do to a workspace, for a person to consent to.

Its hash covers each entry that would change: what it is now and what it would be, with all that a mark covers. Who has
seen a proposal consents to that hash, and to nothing else: whatever has changed since has another.
"""

from __future__ import annotations

import os
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

from corral.actions import Kind
from corral.errors import CorralError
from corral.log.events import Outcome
from corral.log.writer import Log
from corral.policy.model import Policy
from corral.sandbox.apply.applying import Progress, apply_steps
from corral.sandbox.apply.baseline import relative
from corral.sandbox.apply.carrying import copy
from corral.sandbox.apply.journal import Journal, Step, components, digest_of
from corral.sandbox.apply.marks import Marker
from corral.sandbox.apply.recording import Act, Chronicle, Consent, chronicle, consent_by_hash
from corral.sandbox.apply.swapping import Conflict, copy_own
from corral.sandbox.apply.terms import Terms, demands
from corral.sandbox.compare import Change
from corral.sandbox.copying import Room
from corral.sandbox.layer import KeptLayer
from corral.sandbox.trees import open_components
from corral.sandbox.view import Changeable

_LAYER_MODE = 0o1777


@dataclass(frozen=True, slots=True)
class Entry:
    """One change that would be applied."""

    change: Change
    path: str
    """Relative to the workspace."""
    reasons: tuple[str, ...]
    """Why a person must look at it; none for most."""
    link: str | None
    """Where it leads, if it is a link."""


@dataclass(frozen=True, slots=True)
class Proposal:
    """What applying would do."""

    layer: KeptLayer
    tree: Changeable
    """Which of its trees is applied: the workspace, or another that policy lets it write."""
    entries: tuple[Entry, ...]
    conflicts: tuple[str, ...]
    """What somebody else has changed since the run began. While there are any, nothing is applied."""
    left_out: tuple[str, ...]
    """What is never applied."""
    steps: tuple[Step, ...]
    owners: tuple[tuple[int, int], ...]
    """User and group of what each step puts there."""
    kept_modes: tuple[int, ...]
    """Mode bits that each directory has in any case."""
    only: tuple[str, ...] = ()
    terms: tuple[Terms, ...] = ()
    """What the policies of its runs demand, and where that is recorded."""
    policy: Policy | None = None
    """One that demands more."""
    others: tuple[tuple[str, int], ...] = ()
    """Other trees in which the layer has changes, and how many: each is applied by itself."""

    @property
    def hash(self) -> str:
        """Names exactly this."""
        return digest_of(self.workspace, self.steps)

    @property
    def workspace(self) -> str:
        """Where it is applied."""
        return self.tree.path

    def holds(self, path: str) -> bool:
        """Whether a path is among those that were chosen."""
        return not self.only or any(is_within(relative(self.workspace, path), each) for each in self.only)

    @property
    def risky(self) -> tuple[Entry, ...]:
        """What a person must look at."""
        return tuple(entry for entry in self.entries if entry.reasons)

    def apply(
        self,
        consent: str | Consent,
        *,
        log: Log | Path | None = None,
        progress: Progress = lambda done, total: None,
    ) -> Journal:
        """Applies exactly this, and returns the journal by which it can be taken back.

        ``consent`` is the hash of the proposal that a person has seen, or asks him. That is recorded before anything is
        done, and what comes of it, in the log of the run: ``log`` where that is open or lies elsewhere now; or in that
        one, where the run had none. Raises RequestError where the consent is for another, or is refused; Conflict where
        the workspace is not what it was, CorralError where it cannot be done or recorded: nothing is changed.
        """
        with self.decided(consent, log) as records:
            before = {step.path: step.before for step in self.steps if step.before is not None}
            try:
                self.layer.accept({os.path.join(self.workspace, path): mark for path, mark in before.items()})
            except CorralError as error:
                records.ended("", Outcome.ROLLED_BACK, str(error))
                raise
            source = _LayerSource(self)
            return apply_steps(self.workspace, self.layer.id, self.steps, source, records=records, progress=progress)

    @contextmanager
    def decided(self, consent: str | Consent, log: Log | Path | None, target: str = "") -> Iterator[Chronicle]:
        """Decides and records whether it may be done, or become the branch ``target``. Raises as :meth:`apply`."""
        is_for_another = isinstance(consent, str) and consent != self.hash
        if self.conflicts and not is_for_another:
            raise Conflict(f"{len(self.conflicts)} changes are in conflict: {'; '.join(self.conflicts[:5])}")
        paths = tuple(entry.path for entry in self.entries)
        act = Act(Kind.SANDBOX_APPLY, self.layer.id, self.workspace, self.hash, paths, target)
        ask = consent_by_hash(consent, self.hash) if isinstance(consent, str) else consent
        risks = f"{len(self.risky)} of the changes must be looked at" if self.risky else ""
        more = (self.policy.apply,) if self.policy else ()
        with chronicle(act, self.terms, log, cosigned=more) as records:
            records.decide(demands(self.terms, self.policy), risks, ask)
            yield records


def is_within(path: str, other: str) -> bool:
    """Whether a path is another, or below that."""
    return other == "" or path == other or path.startswith(f"{other}/")


def after_marker(
    owner: tuple[int, int], only: Sequence[str], kept_mode: int, cache: dict[tuple[int, int, int, int], bytes]
) -> Marker:
    """How entries of a layer are looked at: as what they would be in the workspace."""

    def wanted(below: str) -> bool:
        return not only or any(is_within(below, each) or is_within(each, below) for each in only)

    return Marker(lambda status: owner, _LAYER_MODE, kept_mode, is_layer=True, wanted=wanted, cache=cache)


class _LayerSource:
    """What is new comes from the layer."""

    def __init__(self, proposal: Proposal) -> None:
        self._proposal = proposal

    def copy(self, number: int, step: Step, room: Room, target: int, name: str) -> None:
        *parents, entry = components(step.path)
        proposal = self._proposal
        marker = after_marker(proposal.owners[number], proposal.only, proposal.kept_modes[number], {})
        with self._proposal.layer.reading() as parts:
            upper = open_components(parts, [proposal.tree.name, *parents])
            try:
                if step.is_own:
                    copy_own(marker, room, upper, entry, target, name)
                else:
                    copy(marker, room, upper, entry, target, name, step.path)
            finally:
                os.close(upper)
