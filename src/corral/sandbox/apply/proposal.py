"""A proposal: exactly what applying a layer would do to the workspace, for a person to consent to.

Its hash covers each entry that would change: what it is now and what it would be, with all that a mark covers. Who has
seen a proposal consents to that hash, and to nothing else: whatever has changed since has another.
"""

from __future__ import annotations

import hashlib
import json
import os
import stat
from collections.abc import Sequence
from dataclasses import dataclass, replace

from corral.errors import RequestError
from corral.sandbox.apply.applying import Conflict, Progress, apply_steps, copy_own, host_marker, opened, recover
from corral.sandbox.apply.baseline import Baseline, relative
from corral.sandbox.apply.carrying import copy
from corral.sandbox.apply.journal import Journal, Step, components
from corral.sandbox.apply.marks import Marker, Unfit
from corral.sandbox.apply.risks import reasons
from corral.sandbox.compare import Change, ChangeKind, FileType
from corral.sandbox.copying import Room
from corral.sandbox.layer import KeptLayer
from corral.sandbox.trees import OPEN_DIRECTORY, open_components

_APPLIED = (FileType.FILE, FileType.DIRECTORY, FileType.SYMLINK)
_LAYER_MODE = 0o1777


@dataclass(frozen=True, slots=True)
class Entry:
    """One change that would be applied."""

    change: Change
    path: str
    """Relative to the workspace."""
    reasons: tuple[str, ...]
    """Why a person must look at it; none for most."""


@dataclass(frozen=True, slots=True)
class Proposal:
    """What applying would do."""

    layer: KeptLayer
    entries: tuple[Entry, ...]
    conflicts: tuple[str, ...]
    """What somebody else has changed since the run began. While there are any, nothing is applied."""
    left_out: tuple[str, ...]
    """What is never applied."""
    steps: tuple[Step, ...]
    owners: tuple[tuple[int, int], ...]
    """User and group of what each step puts there, as far as the caller can give files to others."""
    only: tuple[str, ...] = ()

    @property
    def hash(self) -> str:
        """Names exactly this."""
        rows = [[step.path, step.before, step.after, step.is_own] for step in self.steps]
        content = json.dumps([self.layer.workspace, rows]).encode("ascii")
        return f"sha256:{hashlib.sha256(content).hexdigest()}"

    @property
    def risky(self) -> tuple[Entry, ...]:
        """What a person must look at."""
        return tuple(entry for entry in self.entries if entry.reasons)

    def apply(self, consent: str, *, progress: Progress = lambda done, total: None) -> Journal:
        """Applies exactly this, and returns the journal by which it can be taken back.

        ``consent`` is the hash of the proposal that a person has seen. Raises RequestError where that is another,
        Conflict where the workspace is not what it was, CorralError where it cannot be done: nothing is changed.
        """
        if consent != self.hash:
            raise RequestError("the consent is for another proposal than this; look at what would be applied now")
        if self.conflicts:
            raise Conflict(f"{len(self.conflicts)} changes are in conflict: {'; '.join(self.conflicts[:5])}")
        self.layer.accept({step.path: step.before for step in self.steps if step.before is not None})
        return apply_steps(self.layer.workspace, self.layer.id, self.steps, _LayerSource(self), progress=progress)


def propose(layer: KeptLayer, only: Sequence[str] = ()) -> Proposal:
    """What applying a layer, or only some paths of it (relative to the workspace, with all below), would do now.

    Raises RequestError for paths in which nothing is changed, or where the layer was discarded.
    """
    recover()
    paths = tuple(_given(layer.workspace, path) for path in only)
    with opened(layer.workspace) as root, layer.reading() as parts:
        listed = [change for change in layer.changes() if change.part == "workspace"]
        for path in paths:
            if not any(_is_within(relative(layer.workspace, change.path), path) for change in listed):
                raise RequestError(f"{path}: the layer {layer.id} changes nothing there")
        upper = os.open("workspace", OPEN_DIRECTORY, dir_fd=parts)
        try:
            proposer = _Proposer(layer, root, upper, paths)
            for change in sorted(listed, key=lambda change: change.path.split("/")):
                proposer.take(change)
            return proposer.done()
        finally:
            os.close(upper)


def _given(workspace: str, path: str) -> str:
    path = os.path.normpath(os.path.join(workspace, path))
    if not f"{path}/".startswith(f"{workspace.rstrip('/')}/"):
        raise RequestError(f"{path}: it is not in the workspace {workspace}")
    return relative(workspace, path)


def _is_within(path: str, other: str) -> bool:
    return other == "" or path == other or path.startswith(f"{other}/")


def _after_marker(owner: tuple[int, int], only: Sequence[str]) -> Marker:
    """How entries of a layer are looked at: as what they would be in the workspace."""

    def wanted(below: str) -> bool:
        return not only or any(_is_within(below, each) or _is_within(each, below) for each in only)

    known = owner if os.geteuid() == 0 else (0, 0)
    return Marker(lambda status: known, _LAYER_MODE, is_layer=True, wanted=wanted)


class _Proposer:
    def __init__(self, layer: KeptLayer, root: int, upper: int, only: tuple[str, ...]) -> None:
        self._layer, self._root, self._upper, self._only = layer, root, upper, only
        self._baseline: Baseline = layer.baseline
        self._entries: list[Entry] = []
        self._conflicts: list[str] = []
        self._left_out: list[str] = []
        self._steps: list[tuple[Step, tuple[int, int]]] = []
        self._last: list[tuple[Step, tuple[int, int]]] = []
        self._tree = "/"
        self._names: tuple[str, list[str]] = ("/", [])

    def done(self) -> Proposal:
        # A directory that is closed to its owner is opened first, and one that becomes closed is so last.
        rows = (*self._steps, *reversed(self._last))
        return Proposal(
            self._layer,
            tuple(self._entries),
            tuple(self._conflicts),
            tuple(self._left_out),
            tuple(step for step, _ in rows),
            tuple(owner for _, owner in rows),
            self._only,
        )

    def take(self, change: Change) -> None:
        path = relative(self._layer.workspace, change.path)
        if not path:
            if change.entries:
                raise RequestError("there are changes that are too deep, or too many, to be listed; apply some paths")
            return
        if not self._is_wanted(change, path):
            return
        if change.file_type not in _APPLIED:
            self._left_out.append(f"{path}: a {change.file_type.value}")
            return
        try:
            if not _is_within(path, self._tree):
                self._step(change, path)
            self._entries.append(Entry(change, path, tuple(self._reasons(change, path))))
        except Unfit as error:
            self._conflicts.append(str(error))

    def _is_wanted(self, change: Change, path: str) -> bool:
        """Whether it is asked for, or a new directory that something lies in which is."""
        if not self._only or any(_is_within(path, each) for each in self._only):
            return True
        is_new = change.file_type is FileType.DIRECTORY and change.kind in (ChangeKind.ADDED, ChangeKind.CHANGED)
        return is_new and any(_is_within(each, path) for each in self._only)

    def _step(self, change: Change, path: str) -> None:
        *parents, name = components(path)
        before, status = self._before(change, path, parents, name)
        if change.kind is ChangeKind.DELETED:
            self._steps.append((Step(path, before, None), (0, 0)))
            return
        owner = self._owner(change, status)
        marker = _after_marker(owner, self._only)
        is_own = change.file_type is FileType.DIRECTORY and change.kind in (ChangeKind.MODE, ChangeKind.OWNER)
        try:
            directory = open_components(self._upper, parents)
        except OSError as error:
            raise Unfit(f"{path}: cannot read it in the layer: {error.strerror}") from None
        try:
            after = _own(marker, directory, name, path) if is_own else marker.mark(directory, name, path)
        finally:
            os.close(directory)
        if after is None:
            raise Unfit(f"{path}: it is not in the layer")
        if not is_own and change.file_type is FileType.DIRECTORY:
            self._tree = path
        step = Step(path, before, after, is_own)
        if before == after:
            return
        if is_own and (status is None or status.st_mode & 0o300 == 0o300):
            self._last.append((step, owner))
        else:
            self._steps.append((step, owner))

    def _before(
        self, change: Change, path: str, parents: list[str], name: str
    ) -> tuple[str | None, os.stat_result | None]:
        """What is there now, which must be what was there when the run began."""
        try:
            directory = open_components(self._root, parents)
        except OSError:  # its directory is another entry's
            self._absent(path)
            return None, None
        try:
            try:
                status = os.stat(name, dir_fd=directory, follow_symlinks=False)
            except FileNotFoundError:
                self._absent(path)
                return None, None
            touched: list[str] = []
            if change.kind in (ChangeKind.MODE, ChangeKind.OWNER) and stat.S_ISDIR(status.st_mode):
                before: str | None = _own(host_marker(), directory, name, path)
                if self._baseline.is_touched_itself(status):
                    touched.append(path)
            else:
                before = self._watching(touched).mark(directory, name, path)
            if touched and before != self._baseline.accepted.get(path, ""):
                self._conflicts.append(f"{touched[0]}: it was changed in the workspace since the run began")
            return before, status
        finally:
            os.close(directory)

    def _absent(self, path: str) -> None:
        if path in self._baseline.existed:
            self._conflicts.append(f"{path}: it was removed from the workspace since the run began")

    def _watching(self, touched: list[str]) -> Marker:
        """Tells what was changed since."""
        marker = host_marker()
        others = marker.watch

        def watch(path: str, status: os.stat_result) -> None:
            others(path, status)
            if self._baseline.is_touched(status):
                touched.append(path)

        return replace(marker, watch=watch)

    def _owner(self, change: Change, before: os.stat_result | None) -> tuple[int, int]:
        """What is applied belongs to whom the workspace does, or, where nobody has changed that, to whom it did."""
        top = os.fstat(self._root)
        if before is not None and change.owner_before == change.owner_after and change.kind is not ChangeKind.OWNER:
            return before.st_uid, before.st_gid
        return top.st_uid, top.st_gid

    def _reasons(self, change: Change, path: str) -> list[str]:
        parent, _, name = path.rpartition("/")
        if self._names[0] != parent:
            names: set[str] = set()
            for root in (self._root, self._upper):
                try:
                    fd = open_components(root, components(parent))
                    try:
                        names.update(os.listdir(fd))
                    finally:
                        os.close(fd)
                except OSError:
                    continue
            self._names = (parent, sorted(names))
        link = None
        if change.file_type is FileType.SYMLINK and change.kind is not ChangeKind.DELETED:
            fd = open_components(self._upper, components(parent))
            try:
                link = os.readlink(name, dir_fd=fd)
            finally:
                os.close(fd)
        return list(
            reasons(
                path,
                is_directory=change.file_type is FileType.DIRECTORY,
                link=link,
                others=self._names[1],
                is_new=change.kind is ChangeKind.ADDED,
            )
        )


def _own(marker: Marker, directory: int, name: str, path: str) -> str:
    try:
        fd = os.open(name, OPEN_DIRECTORY, dir_fd=directory)
    except OSError as error:
        raise Unfit(f"{path}: cannot read it: {error.strerror}") from None
    try:
        return marker.own_mark(fd)
    finally:
        os.close(fd)


class _LayerSource:
    """What is new comes from the layer."""

    def __init__(self, proposal: Proposal) -> None:
        self._proposal = proposal

    def copy(self, number: int, step: Step, room: Room, target: int, name: str) -> None:
        *parents, entry = components(step.path)
        marker = _after_marker(self._proposal.owners[number], self._proposal.only)
        with self._proposal.layer.reading() as parts:
            upper = open_components(parts, ["workspace", *parents])
            try:
                if step.is_own:
                    copy_own(marker, room, upper, entry, target, name)
                else:
                    copy(marker, room, upper, entry, target, name, step.path)
            finally:
                os.close(upper)
