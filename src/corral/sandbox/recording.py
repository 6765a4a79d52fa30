"""A sandbox's session in a log: who it is and what is in force, each command, and the end."""

from __future__ import annotations

import os
from collections.abc import Callable, Sequence
from functools import partial

from corral.actions import Origin
from corral.log.asciicast import Tape
from corral.log.events import ExecEnded, ExecStarted, FilesSet, SessionEnded, SessionStarted, SnapshotTaken
from corral.log.ocsf import Context
from corral.log.places import open_payloads
from corral.log.policies import note_policy
from corral.log.sink import SessionLog
from corral.log.writer import Log
from corral.monitor.records import Sink
from corral.policy.canonical import canonical_form, policy_hash
from corral.reactor import Reactor
from corral.sandbox.contents import Contents
from corral.sandbox.core import Core, Exit
from corral.sandbox.layer import KeptLayer, live_patch
from corral.sandbox.peers import Peer
from corral.sandbox.prepare import Prepared
from corral.sandbox.selected import selected_files
from corral.version import VERSION

_MICRO = 1_000_000
MAX_TITLE = 200
"""Characters of a command that name what it has written."""


def recorded(log: Log, prepared: Prepared, reactor: Reactor, sinks: Sequence[Sink] = ()) -> Core:
    """A sandbox of which everything is recorded, and which ends if it cannot be. Raises as Core; LogUnwritable."""
    try:
        recorder = Recorder(log, prepared)
    except BaseException:
        prepared.identity.release()
        raise
    contents = () if recorder.contents is None else (recorder.contents,)
    try:
        core = Core(prepared, reactor, (*sinks, recorder.session), recorder, glances=contents)
    except BaseException:
        recorder.close(-1)
        raise
    recorder.session.when_failed(core.kill)
    for each in contents:
        each.when_failed(core.kill)
    return core


class Recorder:
    """Tells a log of one sandbox: ``session`` of decisions and flows, itself of its life (``core.Chronicle``)."""

    def __init__(self, log: Log, prepared: Prepared) -> None:
        """Records that the session begins. Raises LogUnwritable."""
        options = prepared.options
        policy = options.policy
        context = Context(
            agent=policy.agent.name,
            agent_version=policy.agent.version,
            policy=policy.agent.name,
            policy_hash=policy_hash(policy),
            session=prepared.id,
            sandbox=prepared.id,
            product_version=VERSION,
        )
        self._prepared = prepared
        self.contents: Contents | None = None
        """What is kept beside the records."""
        payloads = open_payloads(log.directory) if policy.log.keep else None
        self.session = SessionLog(log, context, unawaited=frozenset(policy.log.asynchronous))
        """The sink for the monitor."""
        form = canonical_form(policy)
        self.session.record(SessionStarted(prepared.directory, options.label, form.decode()))
        if prepared.base is not None:
            self.session.record(FilesSet(prepared.base.layer.id))
        by = str(Peer(os.getpid(), os.geteuid()))
        note_policy(log, policy.agent.name, form, by, self.session.record)
        if payloads is not None:
            self.contents = Contents(self.session, payloads, policy.log, Origin(prepared.id, prepared.id))

    def exec_started(self, number: int, step: int, argv: Sequence[str], directory: str, user: int) -> None:
        self.session.record(ExecStarted(number, tuple(argv), directory, user, step))

    def exec_ended(self, number: int, step: int, result: Exit) -> None:
        usage = result.usage
        self.session.record(
            ExecEnded(
                number,
                result.status,
                str(result.error or ""),
                round(usage.user_seconds * _MICRO),
                round(usage.system_seconds * _MICRO),
                usage.max_rss,
                sum(denial.count for denial in result.denials) + result.denials_dropped,
                step,
            )
        )

    def snapshot_taken(self, layer: KeptLayer) -> None:
        self.session.record(SnapshotTaken(layer.id, layer.name, layer.parent, layer.step, layer.count, layer.size))

    def restoring(self, layer: KeptLayer, then: Callable[[Exception | None], None]) -> None:
        self.session.record(FilesSet(layer.id))
        self.session.when_safe(then)

    def tape(self, number: int, step: int, argv: Sequence[str], size: tuple[int, int] | None) -> Tape | None:
        return None if self.contents is None else self.contents.tape(number, step, " ".join(argv)[:MAX_TITLE], size)

    @property
    def is_behind(self) -> bool:
        return self.contents is not None and self.contents.is_behind

    def catch_up(self) -> None:
        if self.contents is not None:
            self.contents.catch_up()

    def close(self, layer: int) -> None:
        if self.contents is not None and layer < 0:
            self.contents.close()
        elif self.contents is not None:
            patch, files = partial(live_patch, self._prepared, layer), partial(selected_files, self._prepared, layer)
            self.contents.close(patch, files)

    def ended(self, reason: str) -> None:
        self.session.record(SessionEnded(reason))
        self.session.close()
