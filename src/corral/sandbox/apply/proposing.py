"""Making a proposal: what a layer would change in a workspace as it is now, and what stands against that."""

from __future__ import annotations

import os
import stat
from collections import OrderedDict
from collections.abc import Iterable, Sequence
from dataclasses import replace

from corral.errors import RequestError
from corral.policy.model import Policy
from corral.sandbox.apply.baseline import Baseline, relative
from corral.sandbox.apply.journal import Step, components
from corral.sandbox.apply.marks import Marker, Unfit, attributes
from corral.sandbox.apply.proposal import Entry, Proposal, after_marker, is_within
from corral.sandbox.apply.recovery import recover
from corral.sandbox.apply.risks import Asked, Names, reasons
from corral.sandbox.apply.swapping import host_marker, mounted_at, opened
from corral.sandbox.apply.terms import demands
from corral.sandbox.compare import Change, ChangeKind, FileType
from corral.sandbox.layer import KeptLayer
from corral.sandbox.mounts import mounted_below
from corral.sandbox.trees import OPEN_DIRECTORY, open_components
from corral.sandbox.view import Changeable

_APPLIED = (FileType.FILE, FileType.DIRECTORY, FileType.SYMLINK)
_DIRECTORIES = 64
"""Directories whose names are remembered."""


def propose(layer: KeptLayer, only: Sequence[str] = (), *, policy: Policy | None = None) -> Proposal:
    """What applying a layer to the workspace would do now, or only some paths of it (relative to the workspace, with
    all below). Paths that lie in another tree that its policy let it write are applied to that.

    ``policy`` can demand more than those of the layer's runs, which hold in any case. Raises RequestError for paths in
    which nothing is changed, or where the layer was discarded.
    """
    recover()
    tree, paths = _chosen(layer, only)
    with opened(tree.path) as root, layer.reading() as parts:
        every = layer.changes()
        listed = [change for change in every if change.part == tree.name]
        for path in paths:
            if not any(is_within(relative(tree.path, change.path), path) for change in listed):
                raise RequestError(f"{path}: the layer {layer.id} changes nothing there")
        upper = os.open(tree.name, OPEN_DIRECTORY, dir_fd=parts)
        try:
            proposer = _Proposer(layer, tree, root, upper, paths, policy)
            for change in sorted(listed, key=lambda change: change.path.split("/")):
                proposer.take(change)
            counts = ((each.path, sum(change.part == each.name for change in every)) for each in layer.parts)
            projects = {each.path for each in layer.parts if each.is_project} - {tree.path}
            others = tuple((path, count) for path, count in counts if count and path in projects)
            return replace(proposer.done(), others=others)
        finally:
            os.close(upper)


def _chosen(layer: KeptLayer, only: Sequence[str]) -> tuple[Changeable, tuple[str, ...]]:
    """The tree that the paths lie in, and what they are called there."""
    trees = {tree.path: tree for tree in layer.parts if tree.is_project}
    paths = [os.path.normpath(os.path.join(layer.workspace, path)) for path in only]
    found = {_tree_of(path, trees, layer) for path in paths} or {layer.workspace}
    if len(found) > 1:
        raise RequestError(f"these paths lie in several trees ({', '.join(sorted(found))}); apply one after the other")
    (place,) = found
    below = tuple(relative(place, path) for path in paths)
    return trees[place], () if "" in below else below


def _tree_of(path: str, trees: Iterable[str], layer: KeptLayer) -> str:
    around = [tree for tree in trees if is_within(path, tree)]
    if not around:
        raise RequestError(f"{path}: it is not in the workspace {layer.workspace}, nor in another tree that is applied")
    return max(around, key=len)


class _Proposer:
    def __init__(
        self,
        layer: KeptLayer,
        tree: Changeable,
        root: int,
        upper: int,
        only: tuple[str, ...],
        policy: Policy | None,
    ) -> None:
        self._layer, self._place, self._root, self._upper, self._only = layer, tree, root, upper, only
        self._terms, self._policy = layer.terms, policy
        self._asked = Asked(demands(self._terms, policy).ask)
        self._baseline: Baseline = layer.baseline(tree.path)
        self._entries: list[Entry] = []
        self._conflicts: list[str] = []
        self._left_out: list[str] = []
        self._steps: list[tuple[Step, tuple[int, int], int]] = []
        self._last: list[tuple[Step, tuple[int, int], int]] = []
        self._tree = "/"
        self._names: OrderedDict[str, Names] = OrderedDict()
        self._cache: dict[tuple[int, int, int, int], bytes] = {}
        self._mounts = mounted_below(tree.path)
        self._same: dict[str, bool] = {}
        self._below = ""
        """Why what would go away with the entry at hand must be looked at."""

    def done(self) -> Proposal:
        # A directory that is closed to its owner is opened first, and one that becomes closed is so last.
        rows = (*self._steps, *reversed(self._last))
        return Proposal(
            self._layer,
            self._place,
            tuple(self._entries),
            tuple(self._conflicts),
            tuple(self._left_out),
            tuple(step for step, _, _ in rows),
            tuple(owner for _, owner, _ in rows),
            tuple(mode for _, _, mode in rows),
            self._only,
            self._terms,
            self._policy,
        )

    def take(self, change: Change) -> None:
        path = relative(self._place.path, change.path)
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
        self._below = ""
        try:
            if not is_within(path, self._tree):
                self._step(change, path)
            link = self._link(change, path)
            self._entries.append(Entry(change, path, tuple(self._reasons(change, path, link)), link))
        except Unfit as error:
            self._conflicts.append(str(error))

    def _is_wanted(self, change: Change, path: str) -> bool:
        """Whether it is asked for, or a new directory that something lies in which is."""
        if not self._only or any(is_within(path, each) for each in self._only):
            return True
        is_new = change.file_type is FileType.DIRECTORY and change.kind in (ChangeKind.ADDED, ChangeKind.CHANGED)
        return is_new and any(is_within(each, path) for each in self._only)

    def _step(self, change: Change, path: str) -> None:
        *parents, name = components(path)
        if mounted := mounted_at(self._place.path, path, self._mounts):
            raise Unfit(f"{path}: another file system is mounted there ({mounted})")
        before, status = self._before(change, path, parents, name)
        if change.kind is ChangeKind.DELETED:
            self._steps.append((Step(path, before, None), (0, 0), 0))
            return
        owner = self._owner(change, status)
        is_own = change.file_type is FileType.DIRECTORY and change.kind in (ChangeKind.MODE, ChangeKind.OWNER)
        # The sandbox cannot see to it that what is made in a directory gets its group.
        kept_mode = status.st_mode & stat.S_ISGID if is_own and status is not None else 0
        marker = after_marker(owner, self._only, kept_mode, self._cache)
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
            if not self._below and (why := self._asked(path)):
                self._below = f"{path} is in it: {why}"

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
        if why := self._asked(path) or self._below:
            found.append(why)
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
