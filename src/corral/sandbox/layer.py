"""Layers that outlive their sandbox: kept on disk until they are applied or discarded.

    <state>/layers/<id>/               mode 0700; id is the sandbox's
        meta.json                      what is told about it (format below)
        pinned                         there where it is to stay (corral.sandbox.area)
        existed, accepted              what was there of what it changes (corral.sandbox.apply.baseline)
        terms                          what its policy demands of whoever applies it (corral.sandbox.apply.terms)
        parts/workspace, parts/home... overlay upper directories, as `copying` stores them
    <state>/layers/partial-<pid>-<id>  one that is being built, or taken apart

Keeping: everything is written into the partial directory, then synced (syncfs), then renamed into place; so a layer
that has its name is whole, after a crash too. Discarding: renamed to a partial name first, so that nobody finds it any
more, then removed, by whoever comes by when its last reader is done. Whoever reads or builds holds a lock (flock) on
the directory; a partial one that nobody holds is removed by :func:`reap_partials`, at once if its process is dead.
"""

from __future__ import annotations

import fcntl
import json
import os
import re
import stat
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

from corral.errors import CorralError, RequestError
from corral.sandbox import account, paths
from corral.sandbox.apply import baseline, terms
from corral.sandbox.apply.baseline import Baseline
from corral.sandbox.apply.terms import Terms
from corral.sandbox.changes import Change, changes
from corral.sandbox.copying import Told
from corral.sandbox.extent import is_empty
from corral.sandbox.image import system_image
from corral.sandbox.ownership import OwnerMap, owner_map, owners_from_json, owners_to_json
from corral.sandbox.prepare import Prepared
from corral.sandbox.trees import OPEN_DIRECTORY
from corral.sandbox.view import Changeable

if TYPE_CHECKING:
    from corral.sandbox.between import Side

FORMAT = 1
MAX_META = 4 << 20
PINNED = "pinned"
"""The empty file in a layer that is to stay."""
_ID = re.compile(r"[a-z2-7]{8}")
_NOBODY = 0
"""The process of a partial one that is not being built."""
_FRESH = 60.0
"""Seconds in which whoever has made a partial one locks it."""
_PARTIAL = re.compile(r"partial-([0-9]{1,10})-[a-z2-7]{8}")


@dataclass(frozen=True, slots=True)
class KeptLayer:
    """A layer on disk."""

    id: str
    created: str
    """UTC, ISO 8601."""
    workspace: str
    command: str
    label: str
    user: str
    """Who ran the sandbox."""
    count: int
    """Changes when it was kept."""
    parts: tuple[Changeable, ...]
    scaffold: frozenset[str]
    owners: OwnerMap
    size: int
    """Bytes of content."""
    entries: int
    stripped: Told
    dropped: Told
    began: int = 0
    """When the run began, in nanoseconds since the epoch; 0 for one that was kept by an earlier version. Of one that
    was begun on another layer, when that one's began."""
    name: str = ""
    """What somebody has called it."""
    parent: str = ""
    """The layer that it was begun on, or the snapshot before it; which need not be there any more."""
    session: str = ""
    """The sandbox whose files it holds; nothing in one that was kept by an earlier version."""
    step: int | None = None
    """The step after which it was taken; 0 is the start. None where that was not by itself."""
    log: str = ""
    """The log whose records tell of that session, if it had one."""
    expires: int = 0
    """Seconds since the epoch, from when on it may be removed; 0 where nobody has said."""
    disk: int = 0
    """Bytes that it added to what is on the disk: files that others have too are not counted."""

    def baseline(self, tree: str) -> Baseline:
        """What a tree was like then, by paths relative to it. Raises CorralError where that was not kept, or is
        damaged."""
        with opened(self.id) as directory:
            try:
                return baseline.read(directory, self.began).within(tree)
            except (OSError, ValueError) as error:
                raise CorralError(f"layer {self.id}: what was there before it is not known: {error}") from None

    @property
    def terms(self) -> tuple[Terms, ...]:
        """What the policies of its runs demand of whoever applies it. Raises CorralError where that was not kept, or is
        damaged."""
        with opened(self.id) as directory:
            try:
                return terms.read(directory)
            except (OSError, ValueError) as error:
                raise CorralError(f"layer {self.id}: what its policy demands is not known: {error}") from None

    def accept(self, marks: Mapping[str, str]) -> None:
        """Remembers what is in the workspace, by path, and may be replaced by this layer. Raises CorralError."""
        with opened(self.id) as directory:
            try:
                baseline.accept(directory, {**baseline.read(directory, self.began).accepted, **marks})
                with store() as layers:
                    account.add(layers, os.stat(baseline.ACCEPTED, dir_fd=directory).st_blocks * 512)
            except (OSError, ValueError) as error:
                raise CorralError(f"layer {self.id}: cannot remember what was there: {error}") from None

    @contextmanager
    def reading(self) -> Iterator[int]:
        """The directory of its parts, which nobody removes meanwhile. Raises RequestError when it was discarded."""
        with opened(self.id) as directory:
            parts = open_parts(directory)
            try:
                yield parts
            finally:
                os.close(parts)

    def changes(self) -> list[Change]:
        """What it changes, compared with the host as it is now. Raises RequestError when it was discarded."""
        with self.reading() as parts:
            return self._changes(parts)

    def changes_since(self, before: KeptLayer) -> list[Change]:
        """What it shows otherwise than another layer of the same workspace. Raises RequestError for one of another, and
        when one was discarded."""
        from corral.sandbox.between import between

        if before.workspace != self.workspace:
            raise RequestError(f"layer {before.id} is of {before.workspace}, and {self.id} of {self.workspace}")
        with before.reading() as first, self.reading() as second:
            return between(before.side(first), self.side(second))

    def side(self, parts: int) -> Side:
        """What it shows, for a comparison; ``parts`` is the directory of its parts."""
        from corral.sandbox.between import Side

        return Side(tuple(_with_lowers(part) for part in self.parts), parts, self.owners, self.scaffold)

    def patch(self, wanted: Callable[[str], bool] = lambda path: True, *, tree: str = "workspace") -> bytes:
        """The changes of the workspace, or of another tree by its part, as a unified diff for `git apply`, with the
        files' own characters.

        ``wanted`` says of a path whether it is meant. Raises RequestError when it was discarded, or is too big for a
        patch.
        """
        from corral.sandbox.patch import make_patch  # loads difflib

        with self.reading() as parts:
            for part in self.parts:
                if part.name == tree:
                    listed = [change for change in self._changes(parts, (part,)) if wanted(change.path)]
                    return os.fsencode(make_patch(_with_lowers(part), parts, self.owners, listed))
        return b""

    def discard(self) -> None:
        """Drops it; see :func:`discard`."""
        discard(self.id)

    def _changes(self, parts: int, only: Sequence[Changeable] = ()) -> list[Change]:
        wanted = [_with_lowers(part) for part in only or self.parts]
        return changes(wanted, parts, self.owners, self.scaffold, special_modes=False)


def is_changed(prepared: Prepared, layer: int) -> bool:
    """Whether anything was written that a layer keeps. Fast; an ended sandbox is told from an idle one by this."""
    return not is_empty(prepared.view.parts, layer, prepared.view.scaffold)


def live_changes(prepared: Prepared, layer: int) -> list[Change]:
    """The changes of a sandbox that may still run: consistent for what nobody changes meanwhile."""
    return changes(prepared.view.parts, layer, owners_of(prepared), prepared.view.scaffold)


def live_patch(prepared: Prepared, layer: int) -> bytes:
    """What is changed in the workspace, as :meth:`KeptLayer.patch`; consistent for what nobody changes meanwhile.

    Raises CorralError.
    """
    from corral.sandbox.patch import make_patch  # loads difflib

    owners = owners_of(prepared)
    for part in prepared.view.parts:
        if part.name == "workspace":
            listed = changes((part,), layer, owners, prepared.view.scaffold)
            return os.fsencode(make_patch(part, layer, owners, listed))
    return b""


def owners_of(prepared: Prepared) -> OwnerMap:
    """How the ids of its files read inside. Raises CorralError."""
    try:
        return owner_map(prepared.identity, os.stat(prepared.directory))
    except OSError as error:
        raise CorralError(f"workspace {prepared.directory}: {error.strerror}") from None


def list_layers() -> list[KeptLayer]:
    """All kept layers of the caller, oldest first; those that cannot be understood are left out."""
    found = []
    with store() as layers:
        for name in layer_names(layers):
            with suppress(CorralError):
                found.append(open_layer(name))
    return sorted(found, key=lambda layer: (layer.created, layer.id))


def layer_names(layers: int) -> list[str]:
    """What all are called."""
    return [name for name in os.listdir(layers) if _ID.fullmatch(name)]


def open_layer(identifier: str) -> KeptLayer:
    """The kept layer of that id. Raises RequestError where there is none."""
    with opened(check_id(identifier)) as directory:
        return _read_meta(directory, identifier)


def discard(identifier: str) -> None:
    """Removes a kept layer. Where somebody still reads it (a sandbox that was begun on it), nobody finds it any more,
    and its files go when that is over. Raises RequestError where there is none, or it is pinned."""
    check_id(identifier)
    with store() as layers:
        if is_pinned(layers, identifier):
            raise RequestError(f"layer {identifier} is pinned; `corral unpin {identifier}` lets go of it")
        try:
            name = take_name(layers, identifier)
        except FileNotFoundError:
            raise _unknown(identifier) from None
        except OSError as error:
            raise CorralError(f"layer {identifier} cannot be discarded: {error.strerror}") from None
        try:
            with locked(layers, name, fcntl.LOCK_EX | fcntl.LOCK_NB):
                account.remove(layers, name, wait=False)
        except (BlockingIOError, FileNotFoundError):
            pass  # a later reap_partials removes it, or another already has
        except OSError as error:
            raise CorralError(f"layer {identifier} cannot be removed: {error.strerror}") from None


def take_name(layers: int, identifier: str) -> str:
    """Has a layer found by nobody any more, whole or not, and returns what it is called then. Raises OSError."""
    name = f"partial-{_NOBODY}-{identifier}"
    os.rename(identifier, name, src_dir_fd=layers, dst_dir_fd=layers)
    return name


def is_pinned(layers: int, identifier: str) -> bool:
    """Whether somebody has said that a layer is to stay. Who cannot tell takes it for pinned."""
    try:
        os.stat(f"{identifier}/{PINNED}", dir_fd=layers, follow_symlinks=False)
    except (FileNotFoundError, NotADirectoryError):
        return False
    except OSError:
        return True
    return True


def reap_partials(deadline: float | None = None) -> int:
    """Removes what dead processes left half-built or half-removed, until ``deadline`` (time.monotonic()); how many
    there were."""
    count = 0
    with store() as layers:
        for name in os.listdir(layers):
            match = _PARTIAL.fullmatch(name)
            if match is None or (os.path.exists(f"/proc/{match[1]}") and _is_fresh(layers, name)):
                continue
            try:
                with locked(layers, name, fcntl.LOCK_EX | fcntl.LOCK_NB):
                    account.remove(layers, name, deadline=deadline, wait=False)
                    count += 1
            except account.OutOfTime:
                break
            except OSError:
                continue  # somebody reads it still, or is at it
    return count


def _is_fresh(layers: int, name: str) -> bool:
    """Whether one whose process lives may not have been locked yet. Later, nobody holds it whom it would be locked by:
    another process has that number now, as in a container that was started again."""
    try:
        return time.time() - os.stat(name, dir_fd=layers, follow_symlinks=False).st_ctime < _FRESH
    except FileNotFoundError:
        return True


def is_id(text: str) -> bool:
    """Whether it can be a layer's id."""
    return _ID.fullmatch(text) is not None


def check_id(identifier: str) -> str:
    """Refuses what is not a layer's id; ids become file names. Raises RequestError."""
    if not is_id(identifier):
        raise RequestError(f"{identifier!r} is not a layer's id: eight characters, a to z and 2 to 7")
    return identifier


def _unknown(identifier: str) -> RequestError:
    return RequestError(f"there is no layer {identifier}; `corral layers` lists those that there are")


@contextmanager
def store() -> Iterator[int]:
    """The directory of all layers. Raises CorralError."""
    path = os.path.join(paths.state_directory(), "layers")
    try:
        os.makedirs(path, mode=0o700, exist_ok=True)
        fd = os.open(path, OPEN_DIRECTORY)
    except OSError as error:
        raise CorralError(f"{path}: {error.strerror}") from None
    try:
        yield fd
    finally:
        os.close(fd)


@contextmanager
def locked(parent: int, name: str, how: int) -> Iterator[int]:
    """A directory that is locked as flock(2) says. Raises OSError."""
    fd, owner = os.open(name, OPEN_DIRECTORY, dir_fd=parent), os.getpid()
    try:
        fcntl.flock(fd, how)
        yield fd
    finally:
        _unlock(fd, owner)


@contextmanager
def opened(identifier: str) -> Iterator[int]:
    """A layer's directory, locked for reading. It may lose its name meanwhile, but none of its files."""
    with store() as layers:
        try:
            fd = os.open(identifier, OPEN_DIRECTORY, dir_fd=layers)
        except OSError:
            raise _unknown(identifier) from None
        owner = os.getpid()
        try:
            fcntl.flock(fd, fcntl.LOCK_SH)
            # It was there when it was opened; it is whole only if it still is, now that we have the lock.
            try:
                present = os.path.samestat(os.stat(identifier, dir_fd=layers, follow_symlinks=False), os.fstat(fd))
            except OSError:
                present = False
            if not present:
                raise _unknown(identifier)
            yield fd
        finally:
            _unlock(fd, owner)


def _unlock(fd: int, owner: int) -> None:
    """A child that was forked meanwhile has the lock too: it must neither keep it for its parent nor take it away."""
    if os.getpid() == owner:
        fcntl.flock(fd, fcntl.LOCK_UN)
    os.close(fd)


def open_parts(directory: int) -> int:
    """The directory of the parts of a layer. Raises CorralError."""
    try:
        return os.open("parts", OPEN_DIRECTORY, dir_fd=directory)
    except OSError as error:
        raise CorralError(f"the layer is damaged: parts: {error.strerror}") from None


def _with_lowers(part: Changeable) -> Changeable:
    """The part with its lower trees as they are called now: a system image is made anew when the host changes."""
    cache = f"{paths.cache_directory()}/"
    lowers = []
    for lower in part.lowers:
        if lower.startswith(f"{cache}system-") and not os.path.isdir(lower):
            image = system_image(paths.cache_directory(), os.geteuid() != 0)
            lower = os.path.join(image, *lower[len(cache) :].split("/")[1:])
        lowers.append(lower)
    return replace(part, lowers=tuple(lowers))


# ---- meta.json ----


_TEXTS = ("created", "workspace", "command", "label", "user")
_NUMBERS = ("count", "size", "entries")
_OF_THE_AREA: dict[str, Any] = {"log": "", "expires": 0, "disk": 0}
"""What earlier versions did not tell, and what it is then."""


def write_meta(directory: int, kept: KeptLayer) -> None:
    """Writes what is told about a layer. Raises CorralError, OSError."""
    data: dict[str, Any] = {"format": FORMAT, "id": kept.id}
    data |= {name: getattr(kept, name) for name in (*_TEXTS, *_NUMBERS, "began", "name", "parent", "session", "step")}
    data |= {name: getattr(kept, name) for name in _OF_THE_AREA}
    data |= {
        "parts": [{"name": part.name, "path": part.path, "lowers": part.lowers} for part in kept.parts],
        "scaffold": sorted(kept.scaffold),
        "owners": owners_to_json(kept.owners),
        "stripped": {"count": kept.stripped.count, "paths": kept.stripped.paths},
        "dropped": {"count": kept.dropped.count, "paths": kept.dropped.paths},
    }
    text = json.dumps(data, indent=1)
    if len(text) > MAX_META:
        raise CorralError("the changes cannot be kept: their description is too long")
    fd = os.open("meta.json", os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, 0o600, dir_fd=directory)
    with open(fd, "w", encoding="ascii") as file:
        file.write(text)


def _read_meta(directory: int, identifier: str) -> KeptLayer:
    try:
        fd = os.open("meta.json", os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK | os.O_CLOEXEC, dir_fd=directory)
        with open(fd, "rb") as file:
            if not stat.S_ISREG(os.fstat(fd).st_mode):
                raise ValueError("meta.json is not a file")
            content = file.read(MAX_META + 1)
        if len(content) > MAX_META:
            raise ValueError("meta.json is too long")
        return _parse(json.loads(content), identifier)
    except (OSError, ValueError, TypeError, KeyError, RecursionError) as error:
        raise CorralError(f"layer {identifier} is damaged: {error}; `corral discard {identifier}` removes it") from None


def _parse(data: Any, identifier: str) -> KeptLayer:
    if _typed(data, dict)["format"] != FORMAT:
        raise ValueError(f"format {data['format']!r} is not known to this version of Corral")
    if data["id"] != identifier:
        raise ValueError("it names another layer")
    parts = []
    for row in _typed(data["parts"], list):
        name, path = _typed(row["name"], str), _typed(row["path"], str)
        if not re.fullmatch(r"[a-z-]{1,32}", name) or not os.path.isabs(path):
            raise ValueError(f"part {name!r} is none")
        lowers = tuple(_typed(lower, str) for lower in _typed(row["lowers"], list))
        if not all(os.path.isabs(lower) for lower in lowers):
            raise ValueError(f"part {name!r} lies on a relative path")
        parts.append(Changeable(name, path, lowers))
    return KeptLayer(
        id=identifier,
        **{name: _typed(data[name], str) for name in _TEXTS},
        **{name: _typed(data[name], int) for name in _NUMBERS},
        parts=tuple(parts),
        scaffold=frozenset(_typed(path, str) for path in _typed(data["scaffold"], list)),
        owners=owners_from_json(_typed(data["owners"], list)),
        stripped=_told(data["stripped"]),
        dropped=_told(data["dropped"]),
        began=_typed(data.get("began", 0), int),
        name=_typed(data.get("name", ""), str),
        parent=_typed(data.get("parent", ""), str),
        session=_typed(data.get("session", ""), str),
        step=None if data.get("step") is None else _typed(data["step"], int),
        **{name: _typed(data.get(name, usual), type(usual)) for name, usual in _OF_THE_AREA.items()},
    )


def _told(data: Any) -> Told:
    return Told(_typed(_typed(data, dict)["count"], int), [_typed(path, str) for path in _typed(data["paths"], list)])


def _typed(value: Any, wanted: type) -> Any:
    if type(value) is not wanted:
        raise ValueError(f"{value!r:.60} should be of type {wanted.__name__}")
    return value
