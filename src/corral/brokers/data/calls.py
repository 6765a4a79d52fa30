"""One query, from its text to its result, with everything that must happen on the way.

A change that is held is done first, in a transaction that stays open; what it has done is shown to the person who is
asked; and only a yes is the end of that transaction by COMMIT. Everything else, also that nobody waits any more, is its
end by ROLLBACK.
"""

from __future__ import annotations

import asyncio
import json
import time
from collections.abc import Mapping
from dataclasses import dataclass

from corral.actions import Action, Content, Decision, Ending, Kind, Opinion, Origin, Query, Used, Verdict
from corral.brokers.data.faults import Fault, QueryRefused, SourceFault, TooMuch
from corral.brokers.data.plans import NeedsKeys, Plans
from corral.brokers.data.pool import Pool
from corral.brokers.data.rewriting import Read
from corral.brokers.data.scope import Scope
from corral.brokers.data.sessions import Change, Changed, Rows, Session
from corral.brokers.data.template import Value, check_parameters
from corral.brokers.data.writing import Write
from corral.brokers.metering.bounds import OverBudget
from corral.brokers.metering.budgets import Rate, Slot
from corral.brokers.setting import Setting
from corral.policy.document import escaped
from corral.policy.model import Dialect, Source

MAX_PREVIEW = 4000
"""Characters of what a person is shown of a change."""
_SHOWN_ROWS = 10
_AT_ONCE = 500
"""Characters of a query that is compiled while everybody else waits: some milliseconds."""
_STATUS = {Fault.TIME: 504, Fault.BUSY: 503, Fault.UNREACHABLE: 502, Fault.CANCELLED: 503, Fault.PRIVILEGE: 403}


@dataclass(frozen=True, slots=True)
class Outcome:
    """What is answered."""

    status: int
    """Of HTTP."""
    body: str
    """JSON."""
    retry_after: float | None = None


class Failed(Exception):
    """There is no result."""

    def __init__(
        self, status: int, kind: str, reason: str, ending: Ending, *, rule: str = "", retry_after: float | None = None
    ) -> None:
        super().__init__(reason)
        self.status, self.kind, self.reason, self.ending = status, kind, reason, ending
        self.rule, self.retry_after = rule, retry_after

    @property
    def outcome(self) -> Outcome:
        error: dict[str, object] = {"type": self.kind, "message": self.reason}
        return Outcome(self.status, json.dumps({"error": error}), self.retry_after)


@dataclass(slots=True)
class _Account:
    """What is known of a query so far."""

    statement: str = "unknown"
    rule: str = ""
    personal: tuple[str, ...] = ()
    began: float = 0.0
    rows: int = 0
    """That were given, or have been changed."""


class Desk:
    """One source in one sandbox."""

    def __init__(self, source: Source, number: int, password: str, setting: Setting) -> None:
        """``number`` is its place in the policy. Raises RequestError."""
        self.source, self.scope = source, Scope(source)
        self._setting = setting
        self._where = f"data.sources[{number}]"
        self._plans = Plans(self.scope, asks_for_keys=source.dialect is Dialect.MYSQL)
        self._pool = Pool(source, self.scope, password)
        self._looking, self._compiling = asyncio.Lock(), asyncio.Lock()
        self._is_looked_at = False
        limits = source.limits
        self._rate = Rate(
            limits.queries_per_minute,
            limits.concurrent,
            rule=f"{self._where}.limits",
            what=f"queries of {source.name}",
            minute="queries_per_minute",
        )

    async def close(self) -> None:
        """Ends what runs."""
        await self._pool.close()

    async def ask(self, text: str, parameters: object, origin: Origin) -> Outcome:
        """Answers a query, and accounts for it."""
        origin = self._setting.steps.cause_of(origin, Query(self.source.name, ""))
        number = self._setting.next_call()
        self._keep(text, parameters, origin, number)
        account, began = _Account(), time.time()
        started = time.monotonic()
        outcome, ending, reason = Outcome(500, ""), Ending.ABANDONED, "its client is gone"
        try:
            outcome = await self._answer(text, parameters, origin, account)
            ending, reason = Ending.ANSWERED, ""
        except Failed as failed:
            outcome, ending, reason = failed.outcome, failed.ending, failed.reason
            account.rule = failed.rule or account.rule
        except asyncio.CancelledError:
            raise
        except Exception as error:  # ours: what it says may be of the source
            ending, reason = Ending.FAILED, f"the broker failed ({type(error).__name__})"
            outcome = Failed(500, "server_error", "The broker failed.", ending).outcome
        finally:
            used = Used(
                origin,
                Kind.DATA_QUERY,
                self.source.name,
                account.statement,
                account.rule,
                began,
                time.monotonic() - started,
                ending,
                first=max(0.0, account.began - started) if account.began else 0.0,
                status=outcome.status if ending is not Ending.ABANDONED else 0,
                reason=reason,
                rows=account.rows,
                bytes_up=len(text.encode("utf-8", "replace")),
                bytes_down=len(outcome.body.encode()),
                personal=account.personal,
                call=number,
            )
            self._setting.account(used)
        return outcome

    def _keep(self, text: str, parameters: object, origin: Origin, number: int) -> None:
        keeper = self._setting.keeper
        most = 0 if keeper is None else keeper.keeps(Content.QUERY)
        if keeper is None or most <= 0:
            return
        data = json.dumps({"sql": text, "parameters": parameters}, ensure_ascii=False).encode("utf-8", "replace")
        keeper.keep(origin, Content.QUERY, data[:most], len(data) <= most, self.source.name, number)

    async def _answer(self, text: str, parameters: object, origin: Origin, account: _Account) -> Outcome:
        try:
            slot = self._rate.admit()
        except OverBudget as over:
            raise Failed(
                429, "rate_limit", over.reason, Ending.REFUSED, rule=over.rule, retry_after=over.retry_after
            ) from None
        with slot:
            try:
                plan = await self._plan(text)
                values = check_parameters(parameters)
                account.statement = "select" if isinstance(plan, Read) else plan.word
                if isinstance(plan, Read):
                    return await self._read(plan, plan.query.fill(values), origin, account)
                return await self._write(plan, _filled(plan, values), origin, account, slot)
            except QueryRefused as refused:
                account.rule = account.rule or f"{self._where} (its scope)"
                raise Failed(400, "refused", f"{_sentence(refused)}", Ending.REFUSED) from None
            except TooMuch as much:
                raise Failed(422, "too_much", str(much), Ending.REFUSED, rule=f"{self._where}.limits") from None
            except SourceFault as fault:
                raise Failed(
                    _STATUS.get(fault.fault, 400), fault.fault.name.lower(), _sentence(fault), Ending.FAILED
                ) from None

    async def _look(self) -> None:
        """Looks at the source before the first query is compiled."""
        async with self._looking:
            if self._is_looked_at:
                return
            session = await self._pool.lease(writes=False)
            try:
                self.scope.plain = await self._pool.use(session, lambda: session.plain(self.scope.tables))
            finally:
                self._pool.give_back(session, writes=False)
            self._is_looked_at = True

    async def _plan(self, text: str) -> Read | Write:
        if not self._is_looked_at:
            await self._look()
        try:
            return await self._find(text)
        except NeedsKeys as needed:
            table = needed.table
        session = await self._pool.lease(writes=False)
        try:
            keys = await self._pool.use(session, lambda: session.keys(table))
        finally:
            self._pool.give_back(session, writes=False)
        self._plans.keys[table] = keys
        return await self._find(text)

    async def _find(self, text: str) -> Read | Write:
        if len(text) <= _AT_ONCE or text in self._plans:
            return self._plans.find(text)
        async with self._compiling:
            return await asyncio.to_thread(self._plans.find, text)

    async def _decide(self, query: Query, origin: Origin, account: _Account, own: Opinion | None = None) -> None:
        decision = await self._setting.decide(Kind.DATA_QUERY, query, origin, own=own)
        account.rule = decision.rule
        if not decision.allowed:
            raise Failed(403, "denied", _refusal(decision), Ending.REFUSED)

    # ---- select ----

    async def _read(self, plan: Read, sql: str, origin: Origin, account: _Account) -> Outcome:
        await self._decide(Query(self.source.name, "select", plan.tables), origin, account)
        account.personal = plan.personal
        session = await self._pool.lease(writes=False)
        try:
            rows = await self._pool.use(session, lambda: session.read(sql))
        finally:
            self._pool.give_back(session, writes=False)
        account.began = time.monotonic()
        truncated = "true" if rows.truncated else "false"
        account.rows = len(rows.rows)
        return Outcome(200, f'{{{_listed(rows, plan.names)},"truncated":{truncated}}}')

    # ---- changes ----

    async def _write(self, plan: Write, change: Change, origin: Origin, account: _Account, slot: Slot) -> Outcome:
        query = Query(self.source.name, plan.word, plan.tables)
        holds = self.source.hold_writes
        if holds and self._setting.monitor.foresee(Action(Kind.DATA_QUERY, query, origin)) >= Verdict.DENY:
            holds = False  # nothing is tried that is refused anyway
        if not holds:
            await self._decide(query, origin, account)
        session = await self._pool.lease(writes=True, held=holds)
        try:
            account.personal = plan.personal
            changed = await self._pool.use(session, lambda: session.change(change))
            is_agreed = False
            try:
                if holds:
                    slot.release()  # nobody else is to wait for a person; changes that are held have their own bound
                    shown = Query(query.source, query.statement, query.tables, _preview(change, changed))
                    await self._decide(shown, origin, account, self._asking())
                is_agreed = True
            finally:
                if not is_agreed:
                    await self._roll_back(session)
            await self._commit(session, changed.affected, account)
        finally:
            self._pool.give_back(session, writes=True)
        account.began = time.monotonic()
        given = _chosen(plan, changed)
        return Outcome(200, f'{{"affected":{changed.affected}{given}}}')

    def _asking(self) -> Opinion:
        return Opinion(
            Verdict.ASK,
            f"{self._where}.hold_writes",
            "It changes data outside: a person must see the rows and agree.",
        )

    async def _commit(self, session: Session, affected: int, account: _Account) -> None:
        """To its end, also where its client is gone meanwhile: what was done is on record as what was done."""
        work = asyncio.ensure_future(self._pool.use(session, lambda: session.finish(commit=True)))
        try:
            await asyncio.shield(work)
        except asyncio.CancelledError:
            session.is_broken = True
            await asyncio.wait([work])
            if not work.cancelled() and work.exception() is None:
                account.rows = affected
            raise
        account.rows = affected

    async def _roll_back(self, session: Session) -> None:
        """Whatever else happens: what is not agreed to must not stay open, nor be committed with what comes next."""
        work = asyncio.ensure_future(self._pool.use(session, lambda: session.finish(commit=False)))
        try:
            await asyncio.shield(work)
        except asyncio.CancelledError:
            session.is_broken = True
            raise
        except SourceFault:
            session.is_broken = True


def _filled(plan: Write, values: Mapping[str, Value]) -> Change:
    before = "" if plan.before is None else plan.before.fill(values)
    return Change(plan.word, plan.change.fill(values), plan.gives_back, before, plan.count)


def _listed(rows: Rows, names: frozenset[str]) -> str:
    columns = [name if name in names else f"column{place}" for place, name in enumerate(rows.columns, 1)]
    return f'"columns":{json.dumps(columns, ensure_ascii=False)},"rows":[{",".join(rows.rows)}]'


def _chosen(plan: Write, changed: Changed) -> str:
    """What the statement asked to be given back."""
    if not plan.returned or changed.after is None:
        return ""
    places = [plan.table.columns.index(column) for column in plan.returned]
    names = json.dumps([column.name for column in plan.returned], ensure_ascii=False)
    rows = [json.loads(row) for row in changed.after.rows]
    picked = json.dumps([[row[place] for place in places] for row in rows], ensure_ascii=False)
    truncated = "true" if changed.after.truncated else "false"
    return f',"columns":{names},"rows":{picked},"truncated":{truncated}'


def _preview(change: Change, changed: Changed) -> str:
    """What a person sees of a change, in lines: how much, which rows, the statement as it was run."""
    count = f"{changed.affected:,} row{'' if changed.affected == 1 else 's'}: {change.word}"
    lines = [count]
    for word, rows in (("before", changed.before), ("after", changed.after)):
        if rows is None or (word == "after" and change.word == "delete"):
            continue
        lines += [f"{word}: {row[:400]}" for row in rows.rows[:_SHOWN_ROWS]]
        if len(rows.rows) > _SHOWN_ROWS or rows.truncated:
            lines.append(f"{word}: ... and more")
    lines.append(f"run: {change.sql[:1500]}")
    text = "\n".join(map(escaped, lines))  # what an agent or a row says is no line of its own
    return text if len(text) <= MAX_PREVIEW else f"{text[:MAX_PREVIEW]} [...]"


def _refusal(decision: Decision) -> str:
    if decision.private:
        return "This is not allowed."
    return " ".join(part for part in (decision.reason or "This is not allowed.", decision.advice) if part)


def _sentence(error: Exception) -> str:
    text = str(error)
    return f"{text[:1].upper()}{text[1:]}."
