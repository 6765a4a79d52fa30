"""Puts a sandbox under supervision: its monitor, with every slot and sink, and the thread that answers its calls."""

from __future__ import annotations

import threading
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING

from corral.approvals.queue import Queue, Register
from corral.monitor.core import Monitor
from corral.monitor.records import (
    Account,
    Aggregator,
    Glance,
    Keeper,
    Ledger,
    Recent,
    Several,
    Sink,
    Tally,
    unwritable,
)
from corral.monitor.steps import Causes, Execs, Steps
from corral.policy.doors import Broker, is_open
from corral.policy.model import Processes
from corral.policy.part import PolicyPart
from corral.sandbox.prepare import Prepared
from corral.supervisor import service

if TYPE_CHECKING:
    from corral.brokers.service import Brokers
    from corral.brokers.setting import Setting as BrokerSetting
    from corral.gateway.egress import Egress


class Supervision:
    """One sandbox's monitor and supervisor. Used by the thread that controls the sandbox.

    ``end`` ends the sandbox; ``hold`` is told whether the sandbox is to stand still because of a held action. Both are
    called from any thread.
    """

    def __init__(
        self,
        prepared: Prepared,
        keeper: int,
        sinks: Sequence[Sink],
        end: Callable[[str], None],
        hold: Callable[[bool], None],
        glances: Sequence[Glance] = (),
    ) -> None:
        policy = prepared.options.policy
        self.recent = Recent()
        """The latest decisions."""
        registers = [sink for sink in sinks if isinstance(sink, Register)]
        self.approvals = Queue(policy.approvals.timeout, kill=end, on_change=self.hold_if_asked, registers=registers)
        """What is held."""
        self._freeze, self._hold = policy.approvals.freeze, hold
        self._hold_lock = threading.Lock()
        self._records = Aggregator(Several(self.recent, *sinks))
        self._monitor = Monitor(
            policy=PolicyPart(policy),
            sink=self._records,
            approvals=self.approvals,
            on_kill=end,
            ledgers=[sink for sink in sinks if isinstance(sink, Ledger)],
        )
        self.steps: Steps = Execs()
        """Of this session; brokers tell it of answers."""
        self._causes: Causes | None = None
        if is_open(policy, Broker.MODEL):
            from corral.monitor.tracking import Tracker  # most sandboxes never need it

            self.steps = self._causes = Tracker()
        self._prepared, self._keeper, self._end = prepared, keeper, end
        self._supervised: service.Supervised | None = None
        self.egress: Egress | None = None
        """The way out, where there is one."""
        self.places: frozenset[str] = frozenset()
        """Paths inside of what may be left of moves, once it is closed."""
        self.brokers: Brokers | None = None
        """Those that the policy opens, once the walls stand."""
        self._accounts = tuple(sink for sink in sinks if isinstance(sink, Account))
        self._tallies = tuple(sink for sink in sinks if isinstance(sink, Tally))
        self._glances = tuple(glances)

    def start(self, listener: int, deputy: int, root: int, doors: tuple[int, ...] = ()) -> None:
        """From here on the sandbox's notified calls are answered, and what it sends is taken in at ``doors``; takes the
        descriptors over."""
        policy = self._prepared.options.policy
        supervisor = service.shared()  # first: it raises the limit of descriptors, which others look at
        if doors:
            from corral.sandbox.outlet import open_doors, open_egress  # only a policy that names destinations has one

            self.brokers = open_doors(self._prepared, self._broker_setting, self._end)
            self.egress = open_egress(
                self._prepared,
                self._monitor,
                doors,
                brokers=self.brokers,
                end=self._end,
                settle=self._settle,
                accounts=self._accounts,
                glances=self._glances,
                steps=self.steps,
            )
        self._supervised = service.Supervised(
            sandbox=self._prepared.id,
            session=self._prepared.id,
            keeper=self._keeper,
            listener_fd=listener,
            deputy_fd=deputy,
            root_fd=root,
            table=self._prepared.table,
            monitor=self._monitor,
            end=self._end,
            tick=self._records.flush,
            exec_rules=policy.process != Processes(),
            watched=(*policy.filesystem.ask, *policy.filesystem.watch),
            moves=policy.filesystem.rename_directories,
            egress=self.egress,
            causes=self._causes,
        )
        supervisor.attach(self._supervised)

    def _broker_setting(self) -> BrokerSetting:
        from corral.brokers.metering.session import metered
        from corral.brokers.setting import Setting
        from corral.sandbox.paths import state_directory

        setting = Setting(
            sandbox=self._prepared.id,
            session=self._prepared.id,
            policy=self._prepared.options.policy,
            monitor=self._monitor,
            steps=self.steps,
            tallies=self._tallies,
            keeper=next((glance for glance in self._glances if isinstance(glance, Keeper)), None),
            end=self._end,
            state=state_directory(),
        )
        return metered(setting)

    def _settle(self, callback: Callable[[], None]) -> None:
        """Calls back once the supervisor has done what it does now. From any thread."""
        if self._supervised is not None:
            self._supervised.post(callback)

    def hold_moves(self, held: bool) -> None:
        """Whether no directory may be moved for a caller; one that is being moved is not, until it may be."""
        if self._supervised is not None:
            self._supervised.moves.hold(held)

    @property
    def is_moving(self) -> bool:
        """Whether one is, so that the tree changes though all inside stands still."""
        return self._supervised is not None and self._supervised.moves.is_active

    def waiting_threads(self) -> frozenset[int]:
        """Threads (outside) that wait for an answer."""
        supervised = self._supervised
        return supervised.waiting_threads() if supervised is not None else frozenset()

    def flush(self) -> None:
        """Writes the counts of equal refusals that are still open. Where they cannot be, the sandbox ends (I3)."""
        try:
            self._records.flush(everything=True)
        except Exception as error:
            self._end(unwritable(error))

    def close(self) -> None:
        """The sandbox is dead: nobody is answered any more."""
        self.approvals.close()
        if self._supervised is not None:
            self.places = frozenset(self._supervised.moves.places)
            service.shared().detach(self._supervised)
            self._supervised = None
        if self.egress is not None:
            from corral.sandbox.outlet import close_egress

            close_egress(self.egress)
        if self.brokers is not None:
            from corral.sandbox.outlet import close_doors

            close_doors(self.brokers)
        self.flush()

    def hold_if_asked(self) -> None:
        """Has the sandbox stand still, or go on, where the policy wants it to while something is held."""
        if self._freeze:
            with self._hold_lock:
                self._hold(self.approvals.held > 0)
