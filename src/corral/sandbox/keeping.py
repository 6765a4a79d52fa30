"""Keeping: what a sandbox has changed becomes a layer on disk, whole or not at all.

A layer is always what it changes of the host, whatever it was begun on: what its base has changed is in it, as hard
links, since nobody changes a file of a layer. So a base can be discarded, and each layer can be applied alone.
"""

from __future__ import annotations

import fcntl
import os
import pwd
import time
from contextlib import ExitStack, suppress
from dataclasses import replace
from datetime import UTC, datetime

from corral.errors import CorralError, RequestError
from corral.sandbox.apply import baseline, terms
from corral.sandbox.apply.terms import Terms, terms_of, together
from corral.sandbox.changes import changes
from corral.sandbox.copying import Copied, Quota, Since, copy_parts
from corral.sandbox.layer import (
    KeptLayer,
    check_id,
    is_changed,
    locked,
    open_parts,
    opened,
    owners_of,
    store,
    write_meta,
)
from corral.sandbox.ownership import SAME_IDS, OwnerMap
from corral.sandbox.prepare import Prepared
from corral.sandbox.quotas import admit, enter, withdraw
from corral.sandbox.trees import remove_tree


def keep(
    prepared: Prepared,
    layer: int,
    *,
    identifier: str = "",
    command: str = "",
    name: str = "",
    step: int | None = None,
    unchanged: bool = False,
    since: Since | None = None,
) -> KeptLayer | None:
    """Copies the layer of a sandbox that has ended, or stands still, to disk; None where it changes nothing.

    ``identifier`` is that of the sandbox where none is given; ``name`` is for people; ``step`` is the one after which
    it is kept. With ``unchanged`` it is also kept where it is just what it was begun on. ``since`` is what the last
    snapshot of the same sandbox, its parent, has seen; it becomes what this one has. Raises CorralError where it cannot
    be kept: nothing is left over then, and the layer in memory is still there.
    """
    if layer < 0:
        raise RequestError("the layer is gone: it was closed, or the sandbox never ran")
    if not unchanged and not is_changed(prepared, layer):
        return None
    identifier, base = check_id(identifier or prepared.id), prepared.base
    parts = tuple(part.without_base() for part in prepared.view.parts)
    scaffold = prepared.view.scaffold | (base.layer.scaffold if base else frozenset())
    owners = owners_of(prepared)
    stored = replace(owners, upper=SAME_IDS if os.geteuid() == 0 else None)
    policy = prepared.options.policy
    with store() as layers:
        quota = _admitted(layers, prepared, identifier)
        partial = f"partial-{os.getpid()}-{identifier}"
        try:
            os.mkdir(partial, 0o700, dir_fd=layers)
            with locked(layers, partial, fcntl.LOCK_EX) as directory, ExitStack() as stack:
                os.mkdir("parts", 0o700, dir_fd=directory)
                target = open_parts(directory)
                stack.callback(os.close, target)
                below = open_parts(base.directory) if base else -1
                if base:
                    stack.callback(os.close, below)
                before = _earlier(since, stack)
                seen = Since(identifier, time.time_ns()) if since is not None else None
                copied = copy_parts(
                    layer,
                    target,
                    prepared.view.parts,
                    owners,
                    scaffold,
                    base=below,
                    before=before,
                    seen=seen,
                    quota=quota,
                )
                listed = changes(parts, target, stored, scaffold, special_modes=False)
                if not listed and not unchanged:
                    remove_tree(layers, partial)
                    return None
                existed = baseline.existing({part.name: part.path for part in parts if part.is_project}, listed)
                own = terms_of(prepared)
                demanded: tuple[Terms, ...] = (own,)
                if base:
                    with suppress(FileNotFoundError):  # of one that was kept by an earlier version
                        start = baseline.read(base.directory, base.layer.began)
                        existed |= start.existed  # as it was when the first of them was kept
                        baseline.accept(directory, start.accepted)
                    with suppress(FileNotFoundError):  # the same
                        demanded = together(terms.read(base.directory), own)
                kept = replace(
                    _describe(prepared, stored, copied, len(listed), command),
                    id=identifier,
                    name=name,
                    parent=(since.layer if since else "") or (base.layer.id if base else ""),
                    session=prepared.id,
                    step=step,
                    parts=parts,
                    scaffold=scaffold,
                    began=base.layer.began if base else prepared.began,
                )
                baseline.write(directory, existed)
                terms.write(directory, demanded)
                kept = replace(kept, disk=copied.disk + _beside(directory))
                write_meta(directory, kept)
                _sync(directory)
                enter(layers, kept, prepared.id, policy)
                try:
                    os.rename(partial, identifier, src_dir_fd=layers, dst_dir_fd=layers)
                except BaseException:
                    withdraw(layers, kept)
                    raise
                os.fsync(layers)
                if since is not None and seen is not None:
                    since.layer, since.taken, since.files = seen.layer, seen.taken, seen.files
        except BaseException as error:
            with suppress(OSError):
                remove_tree(layers, partial)
            if isinstance(error, (OSError, ValueError)):
                why = getattr(error, "strerror", None) or error
                raise CorralError(f"the changes cannot be kept: {why}") from None
            raise
    return kept


_META = 8192
"""Bytes on disk of a description, nearly always; it says how much that is itself."""


def _admitted(layers: int, prepared: Prepared, identifier: str) -> Quota | None:
    try:
        return admit(layers, prepared.id, identifier, prepared.options.policy)
    except OSError as error:
        raise CorralError(f"the changes cannot be kept: {error.strerror}") from None


def _beside(directory: int) -> int:
    """Bytes on disk of what lies beside the parts."""
    names = (".", "parts", *(name for name in os.listdir(directory) if name != "parts"))
    return _META + sum(os.stat(name, dir_fd=directory).st_blocks * 512 for name in names)


def _earlier(since: Since | None, stack: ExitStack) -> tuple[int, Since] | None:
    """The parts of the last snapshot, if it is still there."""
    if since is None or not since.files:
        return None
    try:
        parts = open_parts(stack.enter_context(opened(since.layer)))
    except CorralError:
        return None
    stack.callback(os.close, parts)
    return parts, replace(since)  # as it is now, with that layer


def _describe(prepared: Prepared, owners: OwnerMap, copied: Copied, count: int, command: str) -> KeptLayer:
    try:
        user = pwd.getpwuid(os.geteuid()).pw_name
    except KeyError:
        user = str(os.geteuid())
    return KeptLayer(
        id=prepared.id,
        created=datetime.now(UTC).isoformat(timespec="milliseconds"),
        log=prepared.options.log[0],
        expires=int(time.time() + for_) + 1 if (for_ := prepared.options.policy.layers.keep_for) is not None else 0,
        workspace=prepared.directory,
        command=command or prepared.options.command or "",
        label=prepared.options.label,
        user=user,
        count=count,
        parts=prepared.view.parts,
        scaffold=prepared.view.scaffold,
        owners=owners,
        size=copied.bytes,
        entries=copied.entries,
        stripped=copied.stripped,
        dropped=copied.dropped,
    )


def _sync(directory: int) -> None:
    import ctypes

    if ctypes.CDLL(None, use_errno=True).syncfs(directory) != 0:
        error = ctypes.get_errno()
        raise OSError(error, os.strerror(error))
