"""A proposal: exactly what applying a layer would do to the workspace, for a person to consent to.

Its hash covers each entry that would change: what it is now and what it would be, with all that a mark covers. Who has
seen a proposal consents to that hash, and to nothing else: whatever has changed since has another.
"""

from __future__ import annotations

import hashlib
import json
import os
import stat
from collections import OrderedDict
from collections.abc import Sequence
from dataclasses import dataclass, replace

from corral.errors import RequestError
from corral.sandbox.apply.applying import Progress, apply_steps
from corral.sandbox.apply.baseline import Baseline, relative
from corral.sandbox.apply.carrying import copy
from corral.sandbox.apply.journal import Journal, Step, components
from corral.sandbox.apply.marks import Marker, Unfit, attributes
from corral.sandbox.apply.recovery import recover
from corral.sandbox.apply.risks import Names, reasons
from corral.sandbox.apply.swapping import Conflict, copy_own, host_marker, mounted_at, opened
from corral.sandbox.compare import Change, ChangeKind, FileType
from corral.sandbox.copying import Room
from corral.sandbox.layer import KeptLayer
from corral.sandbox.mounts import mounted_below
from corral.sandbox.trees import OPEN_DIRECTORY, open_components

_APPLIED = (FileType.FILE, FileType.DIRECTORY, FileType.SYMLINK)
_LAYER_MODE = 0o1777
_DIRECTORIES = 64
"""Directories whose names are remembered."""


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


def _after_marker(
    owner: tuple[int, int], only: Sequence[str], kept_mode: int, cache: dict[tuple[int, int, int, int], bytes]
) -> Marker:
    """How entries of a layer are looked at: as what they would be in the workspace."""

    def wanted(below: str) -> bool:
        return not only or any(_is_within(below, each) or _is_within(each, below) for each in only)

    return Marker(lambda status: owner, _LAYER_MODE, kept_mode, is_layer=True, wanted=wanted, cache=cache)


class _Proposer:
    def __init__(self, layer: KeptLayer, root: int, upper: int, only: tuple[str, ...]) -> None:
        self._layer, self._root, self._upper, self._only = layer, root, upper, only
        self._baseline: Baseline = layer.baseline
        self._entries: list[Entry] = []
        self._conflicts: list[str] = []
        self._left_out: list[str] = []
        self._steps: list[tuple[Step, tuple[int, int], int]] = []
        self._last: list[tuple[Step, tuple[int, int], int]] = []
        self._tree = "/"
        self._names: OrderedDict[str, Names] = OrderedDict()
        self._cache: dict[tuple[int, int, int, int], bytes] = {}
        self._mounts = mounted_below(layer.workspace)
        self._same: dict[str, bool] = {}

    def done(self) -> Proposal:
        # A directory that is closed to its owner is opened first, and one that becomes closed is so last.
        rows = (*self._steps, *reversed(self._last))
        return Proposal(
            self._layer,
            tuple(self._entries),
            tuple(self._conflicts),
            tuple(self._left_out),
            tuple(step for step, _, _ in rows),
            tuple(owner for _, owner, _ in rows),
            tuple(mode for _, _, mode in rows),
            self._only,
        )

    def take(self, change: Change) -> None:
        path = relative(self._layer.workspace, change.path)
        if not path:
            if change.entries:
                raise RequestError(
                    f"{change.entries} changes are too deep, or too many, to be listed, and so to be looked at; "
                    "nothing of this layer can be applied"
                )
            return
        if not self._is_wanted(change, path):
            return
        if change.file_type not in _APPLIED:
            self._left_out.append(f"{path}: a {change.file_type.value}")
            return
        try:
            if not _is_within(path, self._tree):
                self._step(change, path)
            link = self._link(change, path)
            self._entries.append(Entry(change, path, tuple(self._reasons(change, path, link)), link))
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
        if mounted := mounted_at(self._layer.workspace, path, self._mounts):
            raise Unfit(f"{path}: another file system is mounted there ({mounted})")
        before, status = self._before(change, path, parents, name)
        if change.kind is ChangeKind.DELETED:
            self._steps.append((Step(path, before, None), (0, 0), 0))
            return
        owner = self._owner(change, status)
        is_own = change.file_type is FileType.DIRECTORY and change.kind in (ChangeKind.MODE, ChangeKind.OWNER)
        # The sandbox cannot see to it that what is made in a directory gets its group.
        kept_mode = status.st_mode & stat.S_ISGID if is_own and status is not None else 0
        marker = _after_marker(owner, self._only, kept_mode, self._cache)
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
            self._last.append((step, owner, kept_mode))
        else:
            self._steps.append((step, owner, kept_mode))

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
            except OSError as error:
                raise Unfit(f"{path}: cannot look at it: {error.strerror}") from None
            touched: list[str] = []
            self._require_same(change, path, parents, status)
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

    def _require_same(self, change: Change, path: str, parents: list[str], status: os.stat_result) -> None:
        """What is replaced, and what it lies in, must be what was there at the start, not others of their names."""
        if change.kind is not ChangeKind.ADDED and path not in self._baseline.existed:
            raise Unfit(f"{path}: it has come to the workspace since the run began")
        above = ""
        for name in parents:
            above = f"{above}/{name}".lstrip("/")
            if above not in self._same:
                self._same[above] = self._is_same(above)
            if not self._same[above]:
                raise Unfit(f"{path}: {above} is another directory than when the run began")

    def _is_same(self, path: str) -> bool:
        which = self._baseline.existed.get(path)
        if which is None:
            return True  # new then, and applied before
        fd = open_components(self._root, components(path))
        try:
            status = os.fstat(fd)
        finally:
            os.close(fd)
        return (status.st_dev, status.st_ino) == which

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
        if os.geteuid() == 0 or top.st_gid in (os.getegid(), *os.getgroups()):
            return top.st_uid if os.geteuid() == 0 else os.geteuid(), top.st_gid
        return os.geteuid(), os.getegid()

    def _names_in(self, parent: str) -> Names:
        """What lies in a directory, in the workspace or the layer."""
        if parent not in self._names:
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
            self._names[parent] = Names(names)
            if len(self._names) > _DIRECTORIES:
                self._names.popitem(last=False)
        return self._names[parent]

    def _link(self, change: Change, path: str) -> str | None:
        if change.file_type is not FileType.SYMLINK or change.kind is ChangeKind.DELETED:
            return None
        parent, _, name = path.rpartition("/")
        fd = open_components(self._upper, components(parent))
        try:
            return os.readlink(name, dir_fd=fd)
        finally:
            os.close(fd)

    def _reasons(self, change: Change, path: str, link: str | None) -> list[str]:
        found = list(
            reasons(
                path,
                is_directory=change.file_type is FileType.DIRECTORY,
                is_deleted=change.kind is ChangeKind.DELETED,
                link=link,
                names=self._names_in(path.rpartition("/")[0]),
                is_new=change.kind is ChangeKind.ADDED,
                is_link=self._is_link,
            )
        )
        if change.kind is ChangeKind.CHANGED and self._has_access_list(path):
            found.append("its access control list would be lost")
        return found

    def _is_link(self, path: str) -> bool:
        """Whether something is a link, in the workspace or the layer."""
        *parents, name = components(path)
        for root in (self._root, self._upper):
            try:
                fd = open_components(root, parents)
            except OSError:
                continue
            try:
                if stat.S_ISLNK(os.stat(name, dir_fd=fd, follow_symlinks=False).st_mode):
                    return True
            except OSError:
                continue
            finally:
                os.close(fd)
        return False

    def _has_access_list(self, path: str) -> bool:
        *parents, name = components(path)
        try:
            fd = open_components(self._root, [*parents, name], os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK)
        except OSError:
            return False
        try:
            return any(each.startswith("system.posix_acl") for each in attributes(fd))
        finally:
            os.close(fd)


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
        proposal = self._proposal
        marker = _after_marker(proposal.owners[number], proposal.only, proposal.kept_modes[number], {})
        with self._proposal.layer.reading() as parts:
            upper = open_components(parts, ["workspace", *parents])
            try:
                if step.is_own:
                    copy_own(marker, room, upper, entry, target, name)
                else:
                    copy(marker, room, upper, entry, target, name, step.path)
            finally:
                os.close(upper)
