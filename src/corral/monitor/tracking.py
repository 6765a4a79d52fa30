"""The steps of a session in which a model is asked, and which of them a process belongs to.

    asked ──▶ (nothing is open) ──answered──▶ open ──asked again, or the asker ends──▶ over

An asker is a process that has asked a model. A step is the asker's and the conversation's, so that several
conversations of one process (sub-agents) have each its own. What is done belongs to a step like this:

1. What an asker does itself belongs to the step that is open now. So does what its helpers do, which it had before it
   first asked: they are parts of the agent.
2. Any other process belongs for life to what it was born in: the step of its parent if that is open still, else the
   newest that was open when the kernel made it. By the time of its birth, not by when it was first noticed, and not by
   who its parent is now: neither a daemon nor an orphan gets into a later step by waiting. Who was given away by a
   process with a session of its own belongs to what the maker of the session does.
3. What a process from an earlier step starts stays in that step, unless it is just what an open tool call asks for: a
   shell that an agent keeps for all its commands.
4. Several tool calls at once are told apart by what they ask for (:mod:`corral.monitor.wanted`).

Whatever belongs to no step, or to one that is over, is unexplained. Before the first request of an exec, and outside of
its asker's descendants for what was there by then, it is the exec that explains.

Pure state but for two questions, which are parameters: what moment it is, and whether a process lives.
"""

from __future__ import annotations

import threading
from collections import OrderedDict, deque
from collections.abc import Callable, Sequence
from dataclasses import replace
from itertools import islice

from corral.actions import Origin, Program, Subject, ToolCall
from corral.monitor import moments
from corral.monitor.births import Asker, Birth, Living
from corral.monitor.moments import Identity, Moment, order
from corral.monitor.opened import Opened, bounded, find
from corral.monitor.steps import Cause, Descent

MAX_STEPS = 256
"""Steps that are remembered with their times, open or over."""
MAX_OPEN = 64
"""Open ones; beyond these the oldest is taken for over."""
MAX_ASKERS = 1024
MAX_EXECS = 4096
MAX_BIRTHS = 8192
"""Processes whose birth is remembered."""
LOOKED_AFTER = 64
"""Askers that are looked at in one go, whether they live."""
LIVING = 8
"""How many of the others may live in one go; to find that takes longer than that one is dead."""


class Tracker:
    """As :class:`corral.monitor.steps.Steps` and :class:`corral.monitor.steps.Causes`."""

    def __init__(
        self, *, now: Callable[[], Moment] = moments.now, lives: Callable[[Identity], bool] = moments.lives
    ) -> None:
        self._now, self._lives = now, lives
        self._lock = threading.Lock()
        self._last = 0
        self._epoch = 0
        self._execs: OrderedDict[int, int] = OrderedDict()
        """The step of each exec."""
        self._askers: OrderedDict[Identity, Asker] = OrderedDict()
        self._first: OrderedDict[int, Moment] = OrderedDict()
        """When an exec's first request was made."""
        self._steps: deque[Opened] = deque(maxlen=MAX_STEPS)
        self._open: OrderedDict[int, Opened] = OrderedDict()
        self._births: OrderedDict[Identity, Birth] = OrderedDict()
        self._living = Living()
        self._is_crowded = False
        """There were so many askers that some were forgotten while they lived."""

    # ---- steps ----

    def next(self) -> int:
        with self._lock:
            return self._next()

    def _next(self) -> int:
        self._last += 1
        return self._last

    def begin(self, number: int) -> int:
        with self._lock:
            step = self._execs[number] = self._next()
            if len(self._execs) > MAX_EXECS:
                self._execs.popitem(last=False)
            return step

    def of_exec(self, number: int) -> int:
        with self._lock:
            return self._execs.get(number, 0)

    def asked(self, origin: Origin, conversation: str) -> None:
        identity = identity_of(origin)
        if identity is None:
            return
        with self._lock:
            asker = self._asker(identity, origin.exec)
            self._close(asker.open.get(conversation))
            self._epoch += 1

    def answered(self, origin: Origin, conversation: str, tools: Sequence[ToolCall]) -> int:
        calls = tuple(bounded(tools))  # parsing takes time: not with the lock
        identity = identity_of(origin)
        with self._lock:
            number = self._next()
            if identity is None:
                return number
            asker = self._asker(identity, origin.exec)
            self._close(asker.open.get(conversation))
            step = Opened(number, identity, asker.exec, conversation, self._now())
            step.calls, step.only = calls, tools[0].id if len(tools) == 1 else ""
            if len(self._open) >= MAX_OPEN:
                self._close(next(iter(self._open.values())))
            asker.open[conversation] = self._open[number] = step
            self._steps.append(step)
            self._epoch += 1
            return number

    def open_in(self, origin: Origin, conversation: str) -> int:
        with self._lock:
            identity = identity_of(origin)
            asker = None if identity is None else self._askers.get(identity)
            step = None if asker is None else asker.open.get(conversation)
            return 0 if step is None else step.number

    def _asker(self, identity: Identity, exec_: int) -> Asker:
        asker = self._askers.get(identity)
        if asker is None:
            asker = self._askers[identity] = Asker(exec_, self._now())
            self._first.setdefault(exec_, asker.first)
            if len(self._first) > MAX_EXECS:
                self._first.popitem(last=False)
        self._askers.move_to_end(identity)
        if len(self._askers) > MAX_ASKERS:
            self._make_room()
        return asker

    def _make_room(self) -> None:
        oldest = list(islice(self._askers, LOOKED_AFTER))
        ended = [each for each in oldest if not self._lives(each)]
        for each in ended:
            self._drop(each)
        if not ended:
            self._is_crowded = True
            self._drop(oldest[0])

    def _drop(self, identity: Identity) -> None:
        for step in tuple(self._askers.pop(identity).open.values()):
            self._close(step)

    def _close(self, step: Opened | None) -> None:
        if step is None:
            return
        step.closed, step.calls = self._now(), ()
        self._open.pop(step.number, None)
        asker = self._askers.get(step.asker)
        if asker is not None and asker.open.get(step.conversation) is step:
            del asker.open[step.conversation]

    # ---- processes ----

    @property
    def epoch(self) -> int:
        return self._epoch

    def born(self, descent: Descent) -> None:
        if self._askers or self._first:
            with self._lock:
                self._birth(descent)

    def cause(self, descent: Descent, subject: Subject | None) -> tuple[Cause, bool]:
        with self._lock:
            identity = descent.processes[0]
            if identity in self._askers:
                return self._of_asker(identity, descent.exec, subject)
            if descent.exec not in self._first and not self._askers:
                return self._by_exec(descent.exec), True
            return self._of_birth(identity, self._birth(descent), subject)

    def cause_of(self, origin: Origin, subject: Subject | None = None) -> Origin:
        identity = identity_of(origin)
        if identity is None or not self._first:
            return origin
        with self._lock:
            birth = self._births.get(identity)
            if identity in self._askers:
                cause = self._of_asker(identity, origin.exec, subject)[0]
            elif birth is not None:
                cause = self._of_birth(identity, birth, subject)[0]
            else:
                return origin  # it was seen before anybody asked, or so long ago that it is forgotten
        return replace(origin, step=cause.step, tool=cause.tool, unexplained=cause.unexplained)

    def look_after(self) -> None:
        if self._living:
            self._look_at_living()
        if not self._open:
            return
        with self._lock:
            askers = list(dict.fromkeys(step.asker for step in self._open.values()))[:LOOKED_AFTER]
        ended = [each for each in askers if not self._lives(each)]
        if ended:
            with self._lock:
                for identity in ended:
                    if identity in self._askers:
                        self._drop(identity)
                self._epoch += 1

    def _look_at_living(self) -> None:
        with self._lock:
            processes = self._living.some()
        found: list[tuple[Identity, bool]] = []
        living = 0
        for each in processes:
            lives = self._lives(each)
            found.append((each, lives))
            living += lives
            if living >= LIVING:
                break
        with self._lock:
            self._living.looked_at(found, self._now())

    def _by_exec(self, exec_: int, *, unexplained: bool = False) -> Cause:
        return Cause(self._execs.get(exec_, 0), "", unexplained)

    def _of_asker(self, identity: Identity, exec_: int, subject: Subject | None) -> tuple[Cause, bool]:
        """Of what an asker does itself, or a part of it."""
        asker = self._askers.get(identity)
        open_steps = () if asker is None else tuple(asker.open.values())
        if not open_steps:
            birth = self._births.get(identity)
            if birth is not None and birth.step is not None and birth.step.closed is None:
                return Cause(birth.step.number, birth.tool, False), True  # another agent's tool is an agent itself
            return self._by_exec(exec_, unexplained=True), True
        if len(open_steps) == 1 and len(open_steps[0].calls) <= 1:
            return Cause(open_steps[0].number, open_steps[0].only, False), True
        found = find(open_steps, subject)
        if found is None:
            return Cause(open_steps[-1].number, "", False), False
        return Cause(found[0].number, found[1].id, False), False

    def _of_birth(self, identity: Identity, birth: Birth, subject: Subject | None) -> tuple[Cause, bool]:
        if birth.is_part:
            if birth.asker is not None:
                return self._of_asker(birth.asker, birth.exec, subject)
            return self._by_exec(birth.exec, unexplained=self._is_crowded), True
        if not birth.is_settled:
            if isinstance(subject, Program):
                self._settle(identity, birth, subject)
            elif birth.step is not None and birth.step.closed is None and not birth.tool:
                found = find(self._open_at(identity, birth), subject)
                step, tool = (birth.step, "") if found is None else (found[0], found[1].id)
                return Cause(step.number, tool, birth.is_doubtful), False
        if birth.step is None:
            return self._by_exec(birth.exec, unexplained=True), True
        return Cause(birth.step.number, birth.tool, birth.is_doubtful or birth.step.closed is not None), True

    def _settle(self, identity: Identity, birth: Birth, program: Program) -> None:
        """It executes a program: which tool call has asked for that?"""
        steps = self._open_at(identity, birth)
        if birth.needs_call:
            # What somebody else's child was found for is used up; a shell runs all that is in one command.
            own = birth.parent
            found = find(
                steps,
                program,
                lambda call: not call.taken or (own is not None and call.taken_by == own),
            )
        elif birth.tool:  # there is just one that it can be
            found = next(((step, call) for step in steps for call in step.calls if call.id == birth.tool), None)
        else:
            found = find(steps, program, lambda call: not call.taken)
            if found is None:
                found = find(steps, program)  # one tool call may start the same thing twice
        if found is not None:
            step, call = found
            birth.step, birth.tool, birth.is_settled, birth.needs_call = step, call.id, True, False
            birth.is_doubtful = False
            if not call.taken:
                call.taken, call.taken_by = True, birth.parent

    def _open_at(self, identity: Identity, birth: Birth) -> tuple[Opened, ...]:
        """Those of its steps that are open, and were when it was born."""
        if birth.covering is None:
            birth.covering = self._covering(identity, birth.asker, birth.exec)
        birth.covering = tuple(step for step in birth.covering if step.closed is None)
        return birth.covering

    # ---- births ----

    def _birth(self, descent: Descent) -> Birth:
        """What a process was born in. Its parents' births, outermost first, as they are what it has from them."""
        known: Birth | None = None
        for at in range(len(descent.processes) - 1, -1, -1):
            identity = descent.processes[at]
            if identity in self._askers and at > 0:
                known = None
                continue
            birth = self._births.get(identity)
            if birth is None:
                leader = descent.leader if at == 0 else None
                birth = self._made(identity, descent.processes[at + 1 :], known, descent.exec, leader)
                if birth.is_part and birth.asker is None:
                    known = birth
                    continue  # an ancestor of it may ask yet
                self._births[identity] = birth
                if not birth.is_part:
                    self._living.add(identity, birth)
                if len(self._births) > MAX_BIRTHS:
                    self._births.popitem(last=False)
            else:
                self._births.move_to_end(identity)
            known = birth
        if known is None:
            raise ValueError("a descent names the process itself")
        return known

    def _made(
        self,
        identity: Identity,
        ancestors: tuple[Identity, ...],
        parent: Birth | None,
        exec_: int,
        leader: Identity | None,
    ) -> Birth:
        """``parent`` is the birth of the parent, if that is there and no asker."""
        asker = next((each for each in ancestors if each in self._askers), None)
        if asker is None and parent is not None and parent.asker in self._askers:
            asker = parent.asker  # by an ancestor that is gone
        if asker is None and parent is None and leader in self._askers:
            asker = leader
        birth = Birth(asker, exec_, next(iter(ancestors), None))
        first = self._first.get(exec_) if asker is None else self._askers[asker].first
        if first is None or order(identity, first) < 0:
            birth.is_part = True
            return birth
        elif parent is None and asker is None and leader is not None and leader != identity:
            parent = self._births.get(leader)  # it was given away, but not out of its session
        if parent is not None and not parent.is_part:
            birth.step, birth.tool = parent.step, parent.tool
            if parent.step is not None and parent.step.covers(identity):
                birth.is_settled, birth.is_doubtful = parent.is_settled, parent.is_doubtful
            else:
                birth.needs_call = True
            return birth
        birth.covering = covering = self._covering(identity, asker, exec_)
        if covering:
            birth.step = covering[-1]
            birth.tool = birth.step.only if len(covering) == 1 else ""
            if asker is None and not ancestors:
                birth.is_doubtful = birth.needs_call = self._living.may_have_given_away(identity, exec_)
            return birth
        above = self._births.get(asker) if asker is not None else None
        if above is not None and above.step is not None and above.step.covers(identity):
            birth.step, birth.tool, birth.is_settled = above.step, above.tool, True
        return birth

    def _covering(self, identity: Identity, asker: Identity | None, exec_: int) -> tuple[Opened, ...]:
        """The steps that were open when it was born: of its asker, or of all of its exec."""
        return tuple(
            step
            for step in self._steps
            if (step.exec == exec_ if asker is None else step.asker == asker) and step.covers(identity)
        )


def identity_of(origin: Origin) -> Identity | None:
    """The process of an origin; None where it could not be looked at."""
    process = origin.process
    return None if process is None else Identity(process.pid, process.started)
