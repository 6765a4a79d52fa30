"""The work area: all that runs have left in the state directory, and the removal of what may go.

    <state>/layers     layers and snapshots (corral.sandbox.layer), and what they take (corral.sandbox.account)
    <state>/applies    copies for taking back what was applied (corral.sandbox.apply.journal)
    <state>/log, ...   the log and its contents, which have a retention of their own: nothing here touches them

**What may go by itself** is what has been kept as long as the policy of its run says (``layers.keep_for``). By age or
size it goes only where a person says so. **What is held** never goes, whatever is said, but by `corral discard` of its
id: what is pinned, what a live session has kept, what something lies on or reads, what was applied half, and what a log
still names. A log names the layers of the sessions in it until the policy that is recorded there lets them go.
"""

from __future__ import annotations

import fcntl
import os
import time
from collections.abc import Iterator, Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from datetime import datetime

from corral.errors import CorralError, RequestError
from corral.sandbox import account, claims
from corral.sandbox.account import Links, OutOfTime
from corral.sandbox.apply import journal as journals
from corral.sandbox.layer import (
    PINNED,
    KeptLayer,
    check_id,
    is_pinned,
    layer_names,
    locked,
    open_layer,
    opened,
    reap_partials,
    store,
    take_name,
)
from corral.sandbox.trees import OPEN_DIRECTORY

# ---- what is held ----


def hold(layers: int, layer: KeptLayer, now: float) -> str:
    """Why a layer must not go, or nothing. Whether something lies on it is seen only when it is to be removed."""
    if is_pinned(layers, layer.id):
        return "it is pinned"
    if layer.session and claims.is_live(layers, layer.session):
        return f"the session {layer.session} is alive"
    if why := _applying(layer.id):
        return why
    if layer.log and _is_there(os.path.join(layer.log, "checkpoint")) and not is_expired(layer, now):
        until = f"until {_time(layer.expires)}" if layer.expires else "for good"
        return f"the log {layer.log} names it {until}"
    return ""


def is_expired(layer: KeptLayer, now: float) -> bool:
    """Whether it has been kept as long as its policy says."""
    return layer.expires != 0 and layer.expires <= now


def _is_there(path: str) -> bool:
    """Who cannot tell says so."""
    try:
        os.stat(path)
    except (FileNotFoundError, NotADirectoryError):
        return False
    except OSError:
        return True
    return True


def _time(seconds: int) -> str:
    return time.strftime("%Y-%m-%d %H:%M", time.localtime(seconds))


def _applying(identifier: str) -> str:
    """Whether applying it was cut short. Who cannot tell says so."""
    for each in journals.unfinished():
        try:
            with suppress(FileNotFoundError):  # it was forgotten just now
                directory = os.open(os.path.join(journals.store(), each), OPEN_DIRECTORY)
                try:
                    if journals.read(directory, each).layer == identifier:
                        return f"applying it ({each}) was cut short"
                finally:
                    os.close(directory)
        except (OSError, CorralError):
            return f"what was applied as {each} was cut short, and nobody can tell which layer that was"
    return ""


def pin(identifier: str, *, on: bool = True) -> None:
    """Says that a layer is to stay until this is taken back. Raises RequestError where there is none."""
    with opened(check_id(identifier)) as directory:
        try:
            if on:
                flags = os.O_WRONLY | os.O_CREAT | os.O_NOFOLLOW | os.O_CLOEXEC
                os.close(os.open(PINNED, flags, 0o600, dir_fd=directory))
            else:
                with suppress(FileNotFoundError):
                    os.unlink(PINNED, dir_fd=directory)
            os.fsync(directory)
        except OSError as error:
            raise CorralError(f"layer {identifier} cannot be {'' if on else 'un'}pinned: {error.strerror}") from None


# ---- what there is ----


@dataclass(frozen=True, slots=True)
class Kept:
    """One layer, and what holds it."""

    layer: KeptLayer
    held: str
    """Why it must not go, or nothing."""

    @property
    def is_snapshot(self) -> bool:
        """Whether it was taken while its session went on."""
        return bool(self.layer.session) and self.layer.session != self.layer.id


def list_kept(now: float) -> tuple[list[Kept], list[str]]:
    """All layers of the caller, oldest first, and the ids of those that are damaged."""
    with store() as layers:
        found, damaged = _all(layers)
        return [Kept(layer, hold(layers, layer, now) or _in_use(layers, layer.id)) for layer in found], damaged


def _all(layers: int) -> tuple[list[KeptLayer], list[str]]:
    found, damaged = [], []
    for name in layer_names(layers):
        try:
            layer = open_layer(name)
            _age(layer, 0)
            found.append(layer)
        except RequestError:
            continue  # it is gone
        except (CorralError, ValueError):
            damaged.append(name)
    return sorted(found, key=lambda layer: (layer.created, layer.id)), sorted(damaged)


def _age(layer: KeptLayer, now: float) -> float:
    return now - datetime.fromisoformat(layer.created).timestamp()


_USED = "something lies on it, or reads it"


def _in_use(layers: int, identifier: str) -> str:
    try:
        with locked(layers, identifier, fcntl.LOCK_EX | fcntl.LOCK_NB):
            return ""
    except BlockingIOError:
        return _USED
    except OSError:
        return ""  # it is gone


@dataclass(frozen=True, slots=True)
class Taken:
    """What a part of the state directory takes: how many things, and their bytes on disk."""

    count: int
    bytes: int


def undo_copies() -> Taken:
    """The copies for taking back what was applied. Looks at each file."""
    return _taken(journals.store(), journals.ids())


def log_files() -> Taken:
    """The log in the state directory, with what lies beside it. Looks at each file."""
    state = os.path.dirname(journals.store())
    return _taken(state, [name for name in os.listdir(state) if name == "log" or name.startswith("log.")])


def _taken(place: str, names: Sequence[str]) -> Taken:
    directory, met = os.open(place, OPEN_DIRECTORY), Links()
    try:
        return Taken(len(names), sum(account.taken(directory, name, met) for name in names))
    finally:
        os.close(directory)


# ---- removing what may go ----


@dataclass(slots=True)
class Collected:
    """What has gone, or would go."""

    removed: list[tuple[KeptLayer, int]] = field(default_factory=list)
    """With the bytes that are free by that, once all before it are gone."""
    undos: list[tuple[str, int]] = field(default_factory=list)
    """What can be taken back no more, with the bytes of its copies."""
    held: list[tuple[KeptLayer, str]] = field(default_factory=list)
    """What would have gone, and why it does not."""
    damaged: list[str] = field(default_factory=list)
    """What nobody can read: it stays until it is discarded."""
    before: int = 0
    """Bytes of all layers."""
    after: int = 0


def collect(
    *,
    older_than: float | None = None,
    keep_bytes: int | None = None,
    undo: bool = False,
    dry_run: bool = False,
) -> Collected:
    """Removes layers that may go: what has been kept long enough, what is ``older_than`` so many seconds, and, oldest
    first, so many more that all together take no more than ``keep_bytes``; but never what is held. With ``undo`` also
    copies for taking back what was applied, by the same age. Counts everything anew.

    May be stopped at any time, and run beside others. Raises CorralError, OSError.
    """
    now, done = time.time(), Collected()
    with store() as layers:
        if not dry_run:
            reap_partials()
            journals.sweep()
            claims.reserved(layers)  # removes what dead sessions have left
        done.before = done.after = account.count(layers)
        found, done.damaged = _all(layers)
        met, left = Links(), []
        for layer in found:
            is_over = keep_bytes is not None and done.after > keep_bytes
            is_old = older_than is not None and _age(layer, now) >= older_than
            if not (is_over or is_old or is_expired(layer, now)):
                left.append(layer)
                continue
            gone = _look(layers, layer, now, met) if dry_run else _remove(layers, layer, now)
            if gone is None:
                continue  # somebody else has removed it
            if isinstance(gone, str):
                done.held.append((layer, gone))
                left.append(layer)
            else:
                done.removed.append((layer, gone))
                done.after -= gone
        if not dry_run:
            _set_next(layers, left, now)
    if undo:
        if older_than is None:
            raise RequestError("say how old the copies for undoing must be that are to go (--older-than)")
        done.undos = list(_collect_undos(now - older_than, dry_run=dry_run))
    return done


def collect_expired(layers: int, now: float, seconds: float | None = None) -> None:
    """Removes what has been kept long enough, where something may have been, and as far as there is time. Looks at no
    file where nothing is due."""
    if not account.is_due(layers, now):
        return
    deadline = None if seconds is None else time.monotonic() + seconds
    left = []
    for layer in _all(layers)[0]:
        try:
            # What is out of time has lost its name by then, and goes later.
            if is_expired(layer, now) and not isinstance(_remove(layers, layer, now, deadline), str):
                continue
        except CorralError:
            pass  # it is told by `corral gc`; here somebody wants to keep something else
        left.append(layer)
    _set_next(layers, left, now)


def _set_next(layers: int, left: Sequence[KeptLayer], now: float) -> None:
    """What is held though its time has come is looked at again in a while."""
    times = [max(layer.expires, now + 600) for layer in left if layer.expires]
    account.set_next(layers, min(times, default=None), unless_before=now)


def _look(layers: int, layer: KeptLayer, now: float, met: Links) -> int | str | None:
    why = hold(layers, layer, now) or _in_use(layers, layer.id)
    return why or account.freed(layers, layer.id, met)


def _remove(layers: int, layer: KeptLayer, now: float, deadline: float | None = None) -> int | str | None:
    """The bytes that are free now, or why it is held, or None where it is gone already.

    Whoever reads a layer, or begins on it, or links its files, has its lock: who has it alone knows that nobody does.
    """
    try:
        with locked(layers, layer.id, fcntl.LOCK_EX | fcntl.LOCK_NB) as directory:
            if not os.path.samestat(os.stat(layer.id, dir_fd=layers, follow_symlinks=False), os.fstat(directory)):
                return None
            why = hold(layers, layer, now)
            if why:
                return why
            name = take_name(layers, layer.id)
            try:
                # Who is in a hurry does not wait for one who counts, and may have been stopped.
                return account.remove(layers, name, deadline=deadline, wait=deadline is None)
            except (OutOfTime, BlockingIOError):
                return 0
    except BlockingIOError:
        return _USED
    except FileNotFoundError:
        return None
    except OSError as error:
        raise CorralError(f"layer {layer.id} cannot be removed: {error.strerror}") from None


def _collect_undos(before: float, *, dry_run: bool) -> Iterator[tuple[str, int]]:
    for journal in journals.journals():
        if datetime.fromisoformat(journal.created).timestamp() > before:
            continue
        with suppress(RequestError), journals.locked(journal.id, wait=False):  # somebody takes it back just now
            size = _taken(journals.store(), [journal.id]).bytes
            if not dry_run:
                journals.forget(journal.id)
                journals.finish(journal.id)
            yield journal.id, size
