"""Budgets hold: whatever is asked at one time, by however many processes, and however a request ends."""

from __future__ import annotations

import gc
import math
import multiprocessing
import os
import re
import signal
import sqlite3
import threading
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import closing, suppress
from dataclasses import replace
from fractions import Fraction
from functools import partial
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from corral.actions import Ending, Kind, Origin, Used
from corral.brokers.metering.bounds import SOON
from corral.brokers.metering.budgets import Admission, Budgets, OverBudget, Rate
from corral.brokers.metering.ledger import UNSEEN, Ledger
from corral.brokers.metering.meter import Meter, Store
from corral.brokers.metering.prices import BILLION, Prices, billionths
from corral.brokers.metering.store import FILE, open_database
from corral.policy.model import Agent, Budget, Model, Price

ORIGIN = Origin("box-1", "session-1", 3)
USED = Used(
    ORIGIN, Kind.MODEL_CALL, "upstream", "model-a", "model.allow[0]", 1000.0, 2.0, Ending.ANSWERED, currency="USD"
)


def used(tokens: int, cost: int = 0, seconds: float = 2.0) -> Used:
    return replace(USED, input_tokens=tokens - tokens // 3, output_tokens=tokens // 3, cost=cost, seconds=seconds)


class Clock:
    def __init__(self, now: float = 1_000_000.0) -> None:
        self.now = now

    def __call__(self) -> float:
        return self.now


@pytest.fixture
def store(tmp_path: Path) -> Iterator[Store]:
    store = Store(tmp_path / "usage")
    yield store
    store.close()


def refused(call: Callable[[], object]) -> OverBudget:
    with pytest.raises(OverBudget) as caught:
        call()
    return caught.value


# ---- prices ----


TABLE = Model(
    prices=(
        Price("model-a", 3.0, 15.0, cached=0.3, written=3.75),
        Price("model-*", 0.0375, 0.15),
        Price("model-a*", 1000.0, 1000.0),
    )
)


def test_the_first_price_that_matches_holds_and_what_has_none_costs_nothing_known() -> None:
    prices = Prices(TABLE)
    assert prices.cost("model-a", 1_000_000, 0) == 3 * BILLION
    assert prices.cost("model-a2", 1_000_000, 1_000_000) == 187_500_000
    assert prices.cost("other", 1, 1) is None
    assert prices.ceiling("other", 1, 1) is None


def test_cached_and_written_input_have_their_price_or_that_of_input() -> None:
    prices = Prices(TABLE)
    assert prices.cost("model-a", 1000, 10, cached=600, written=300) == 100 * 3000 + 600 * 300 + 300 * 3750 + 150_000
    assert prices.cost("model-b", 1000, 0, cached=600, written=300) == prices.cost("model-b", 1000, 0)


def test_costs_are_rounded_up_and_bounds_down() -> None:
    assert Prices(TABLE).cost("model-b", 1, 0) == 38  # 37.5
    assert billionths(0.1) == 100_000_000
    assert billionths(0.0000000019) == 1


COUNT = st.integers(0, 10**7)


@given(COUNT, COUNT, COUNT, COUNT)
def test_what_is_reserved_is_never_less_than_what_it_costs(plain: int, cached: int, written: int, output: int) -> None:
    prices = Prices(TABLE)
    for name in ("model-a", "model-b"):
        cost = prices.cost(name, plain + cached + written, output, cached, written)
        ceiling = prices.ceiling(name, plain + cached + written, output)
        assert cost is not None and ceiling is not None and cost <= ceiling


@given(st.floats(0, 10_000, allow_nan=False), COUNT)
def test_costs_are_exact(price: float, tokens: int) -> None:
    cost = Prices(Model(prices=(Price("*", price, 0.0),))).cost("any", tokens, 0)
    exact = Fraction(repr(price)) * tokens * 1000
    assert cost is not None and exact <= cost < exact + 1


# ---- one session ----


def test_each_bound_refuses_with_its_rule_and_in_words() -> None:
    clock = Clock()

    def rule_of(budget: Budget, *before: int, cost: int | None = 0, wanted: int = 10, wait: float = 0.0) -> OverBudget:
        budgets = Budgets(Model(session=budget), clock=clock)
        for tokens in before:
            budgets.admit(tokens, tokens * 1000).settle(used(tokens, tokens * 1000))
        clock.now += wait
        return refused(lambda: budgets.admit(wanted, cost))

    error = rule_of(Budget(tokens=100), 95)
    assert error.rule == "model.session.tokens" and error.retry_after is None
    assert "100 tokens" in error.reason and "95 tokens" in error.reason and "may still fit" in error.reason
    assert "Do not ask again" in rule_of(Budget(tokens=100), 100, wanted=0).reason
    assert "more than there ever was" in rule_of(Budget(tokens=100), wanted=101).reason
    error = rule_of(Budget(money=0.0001), 95, cost=6000)
    assert error.rule == "model.session.money" and "USD" in error.reason
    error = rule_of(Budget(money=100.0), cost=None)
    assert error.rule == "model.session.money" and "no price" in error.reason and error.retry_after is None
    error = rule_of(Budget(requests=2), 1, 1)
    assert error.rule == "model.session.requests" and error.retry_after is None
    error = rule_of(Budget(requests_per_minute=2), 1, 1, wait=20.0)
    assert error.rule == "model.session.requests_per_minute" and error.retry_after == 40.0
    assert "40 seconds" in error.reason
    error = rule_of(Budget(wall_time=60.0), 1, wait=60.0)
    assert error.rule == "model.session.wall_time" and error.retry_after is None


def test_a_budget_of_nothing_gives_nothing() -> None:
    for budget in (Budget(tokens=0), Budget(requests=0), Budget(requests_per_minute=0), Budget(concurrent=0)):
        budgets = Budgets(Model(session=budget))
        assert refused(partial(budgets.admit, 1, 0)).retry_after is None


def test_what_is_reserved_counts_and_says_that_waiting_helps() -> None:
    budgets = Budgets(Model(session=Budget(tokens=100, concurrent=3)))
    first = budgets.admit(60, 0)
    error = refused(lambda: budgets.admit(60, 0))
    assert error.retry_after == SOON and "60 tokens are reserved" in error.reason and "when those" in error.reason
    first.settle(used(10))
    admissions = [budgets.admit(30, 0) for _ in range(3)]
    error = refused(lambda: budgets.admit(0, 0))
    assert error.rule == "model.session.concurrent" and error.retry_after == SOON
    del admissions


def test_what_was_used_up_for_good_is_said_before_what_passes() -> None:
    budgets = Budgets(Model(session=Budget(requests=1, requests_per_minute=1, concurrent=1)))
    with budgets.admit(1, 0):
        assert refused(lambda: budgets.admit(1, 0)).rule == "model.session.requests"


def test_settling_counts_once_and_what_was_used_not_what_was_reserved() -> None:
    budgets = Budgets(Model(session=Budget(tokens=100)))
    admission = budgets.admit(90, 7)
    admission.settle(used(20, 5))
    admission.settle(used(50, 50))
    admission.lose()
    del admission
    gc.collect()
    now = budgets.standing()
    assert (now.tokens, now.cost, now.reserved_tokens, now.reserved_cost, now.open) == (20, 5, 0, 0, 0)


def test_a_request_that_nobody_settles_costs_what_was_reserved() -> None:
    budgets = Budgets(Model(session=Budget(tokens=100)))
    with suppress(RuntimeError):
        with budgets.admit(30, 3):
            raise RuntimeError
    budgets.admit(20, 2)  # dropped at once
    gc.collect()
    now = budgets.standing()
    assert (now.tokens, now.cost, now.reserved_tokens, now.open) == (50, 5, 0, 0)


def test_what_an_upstream_says_cannot_give_anything_back() -> None:
    budgets = Budgets(Model(session=Budget(tokens=100)))
    budgets.admit(50, 50).settle(replace(USED, input_tokens=-1000, output_tokens=30, cost=-1000))
    assert (budgets.standing().tokens, budgets.standing().cost) == (30, 0)


def test_a_session_that_is_over_lets_nothing_through_and_leaves_nothing_open() -> None:
    budgets = Budgets(Model())
    admission = budgets.admit(10, 0)
    budgets.close()
    admission.settle(used(1))
    assert refused(lambda: budgets.admit(1, 0)).retry_after is None
    assert (budgets.standing().open, budgets.standing().tokens) == (0, 10)


def test_the_time_that_is_left_is_told() -> None:
    clock = Clock()
    budgets = Budgets(Model(session=Budget(wall_time=60.0)), clock=clock)
    first = budgets.admit(1, 0)
    assert first.seconds == 60.0
    clock.now += 45
    second = budgets.admit(1, 0)
    assert second.seconds == 15.0


STEP = st.tuples(st.integers(0, 3), st.integers(0, 60), st.integers(0, 60), st.floats(0, 40))


@given(st.lists(STEP, max_size=60))
def test_no_order_of_requests_exceeds_a_budget(steps: list[tuple[int, int, int, float]]) -> None:
    clock = Clock()
    budget = Budget(tokens=200, money=200 / BILLION, requests=20, requests_per_minute=5, concurrent=3)
    budgets = Budgets(Model(session=budget), clock=clock)
    admissions: list[tuple[Admission, int]] = []
    starts: list[float] = []
    really = 0
    for what, wanted, came, wait in steps:
        clock.now += wait
        if what < 2 or not admissions:
            try:
                admissions.append((budgets.admit(wanted, wanted), wanted))
            except OverBudget:
                continue
            starts.append(clock.now)
        else:
            admission, reserved = admissions.pop(came % len(admissions))
            if what == 2:
                admission.settle(used(min(came, reserved), min(came, reserved)))
                really += min(came, reserved)
            else:
                really += reserved
            del admission
        assert len(admissions) <= 3
        assert sum(1 for start in starts if start > clock.now - 60) <= 5
    now = budgets.standing()
    assert now.tokens == now.cost == really <= 200
    assert now.requests == len(starts) <= 20
    assert now.tokens + now.reserved_tokens <= 200


def test_threads_at_one_time_do_not_exceed_a_budget() -> None:
    budgets = Budgets(Model(session=Budget(tokens=1000)))
    barrier = threading.Barrier(16)

    def ask(_: int) -> int:
        barrier.wait()
        got = 0
        for _ in range(50):
            with suppress(OverBudget):
                with budgets.admit(7, 0) as admission:
                    admission.settle(used(6))
                    got += 6
        return got

    with ThreadPoolExecutor(16) as pool:
        total = sum(pool.map(ask, range(16)))
    assert total == budgets.standing().tokens
    assert 994 <= total <= 1000


# ---- the agent ----


BOUNDED = Model(agent=Budget(tokens=100), agent_period=3600.0)


def _ledger(store: Store, model: Model = BOUNDED, clock: Callable[[], float] | None = None, name: str = "a") -> Ledger:
    return Ledger(store.engine, name, model, clock=clock or Clock())


def test_sessions_of_one_agent_share_its_budget_and_those_of_another_do_not(store: Store) -> None:
    first, second = (Budgets(BOUNDED, Meter(store, Agent("a", v), BOUNDED).ledger()) for v in ("1", "2"))
    assert first.blocks
    first.admit(60, 0).settle(used(55))
    error = refused(lambda: second.admit(60, 0))
    assert error.rule == "model.agent.tokens" and "All sessions of this agent together" in error.reason
    assert second.standing().requests == 0 and second.standing().reserved_tokens == 0
    other = Budgets(BOUNDED, Meter(store, Agent("b", "1"), BOUNDED).ledger())
    other.admit(60, 0)


def test_what_an_agent_used_counts_until_the_period_is_over(store: Store) -> None:
    clock = Clock()
    ledger = _ledger(store, clock=clock)
    ledger.settle(ledger.reserve(100, 0)[0], 70, 0, 1.0)
    clock.now += 1800
    ledger.settle(ledger.reserve(30, 0)[0], 30, 0, 1.0)
    error = refused(lambda: ledger.reserve(50, 0))
    assert error.retry_after is not None and 1800 <= error.retry_after <= 1860
    clock.now += error.retry_after - 61
    refused(lambda: ledger.reserve(50, 0))
    clock.now += 61
    assert ledger.reserve(50, 0)


@pytest.mark.parametrize("second", [0.0, 0.5, 30.0, 59.9])
def test_a_minute_counts_as_long_as_any_of_it_is_within_the_period(store: Store, second: float) -> None:
    clock = Clock(60.0 * 20_000 + second)
    ledger = _ledger(store, clock=clock)
    ledger.settle(ledger.reserve(100, 0)[0], 100, 0, 1.0)
    clock.now += 3599.9
    refused(lambda: ledger.reserve(1, 0))
    clock.now += 60.2
    ledger.reserve(1, 0)


def test_a_transaction_has_the_right_to_write_from_its_beginning_on(store: Store, tmp_path: Path) -> None:
    """Else two could read the same standing, and both reserve the rest."""
    with store.engine.begin(), closing(sqlite3.connect(tmp_path / "usage" / FILE, timeout=0)) as other:
        with pytest.raises(sqlite3.OperationalError, match="locked"):
            other.execute("BEGIN IMMEDIATE")


def test_the_bounds_of_an_agent(store: Store) -> None:
    clock = Clock()

    def rule_of(name: str, budget: Budget, wait: float = 0.0) -> OverBudget:
        ledger = _ledger(store, Model(agent=budget), clock, name)
        ledger.settle(ledger.reserve(1, 1)[0], 1, 1000, 30.0)
        open_one = ledger.reserve(1, 1)
        clock.now += wait
        error = refused(lambda: ledger.reserve(1, 1))
        ledger.settle(open_one[0], 1, 1, 1.0)
        return error

    assert rule_of("money", Budget(money=1001 / BILLION)).rule == "model.agent.money"
    assert rule_of("requests", Budget(requests=2)).rule == "model.agent.requests"
    error = rule_of("minute", Budget(requests_per_minute=2), wait=10)
    assert error.rule == "model.agent.requests_per_minute" and error.retry_after == pytest.approx(50.0)
    assert rule_of("concurrent", Budget(concurrent=1)).rule == "model.agent.concurrent"
    assert rule_of("time", Budget(wall_time=50.0), wait=20).rule == "model.agent.wall_time"
    none = _ledger(store, Model(agent=Budget(requests_per_minute=0)), clock, "none")
    assert refused(lambda: none.reserve(0, 0)).retry_after is None


def test_a_reservation_is_settled_once(store: Store) -> None:
    ledger = _ledger(store)
    number, _ = ledger.reserve(50, 0)
    ledger.settle(number, 10, 5, 1.0)
    ledger.settle(number, 10, 5, 1.0)
    now = ledger.standing()
    assert (now.tokens, now.cost, now.requests, now.open, now.seconds) == (10, 5, 1, 0, 1.0)


def test_money_of_another_currency_is_not_compared(store: Store) -> None:
    model = Model(agent=Budget(money=1.0))
    dollars, euros = _ledger(store, model), _ledger(store, replace(model, currency="EUR"))
    dollars.settle(dollars.reserve(0, BILLION)[0], 0, BILLION, 0.0)
    assert euros.reserve(0, BILLION)
    refused(lambda: dollars.reserve(0, 1))


def test_what_unbounded_sessions_used_counts_for_those_that_are_bounded(store: Store) -> None:
    free = Meter(store, Agent("a", "1"), Model())
    assert free.ledger() is None
    free.used(replace(used(90), started=1000.0))
    free.used(replace(used(90), ending=Ending.REFUSED))
    free.used(replace(used(90), kind=Kind.DATA_QUERY))
    assert store.flush()
    bounded = Meter(store, Agent("a", "1"), BOUNDED)
    ledger = bounded.ledger()
    assert ledger is not None
    assert ledger.standing().tokens == 90
    bounded.used(used(90))  # its ledger counts it
    assert store.flush()
    assert ledger.standing().tokens == 90


def test_a_bounded_agent_without_a_ledger_asks_nothing() -> None:
    budgets = Budgets(BOUNDED)
    assert refused(lambda: budgets.admit(1, 0)).rule == "model.agent"
    assert budgets.standing().open == 0


def test_an_agent_whose_use_cannot_be_counted_asks_nothing(tmp_path: Path) -> None:
    store = Store(tmp_path / "usage")
    budgets = Budgets(BOUNDED, Meter(store, Agent("a", "1"), BOUNDED).ledger())
    admission = budgets.admit(10, 0)
    with closing(sqlite3.connect(tmp_path / "usage" / FILE)) as vandal:
        vandal.execute("ALTER TABLE reservations RENAME TO gone")
        vandal.commit()
        error = refused(lambda: budgets.admit(1, 0))
        assert "cannot be counted" in error.reason and error.retry_after == SOON
        admission.settle(used(7))  # does not raise
        vandal.execute("ALTER TABLE gone RENAME TO reservations")
        vandal.commit()
    assert budgets.standing().tokens == 7
    ledger = Meter(store, Agent("a", "1"), BOUNDED).ledger()
    assert ledger is not None and ledger.standing().tokens == 7  # told late, and once
    store.close()


def _spend_all(directory: str, start: object, results: object) -> None:
    store = Store(Path(directory))
    ledger = Meter(store, Agent("a", "1"), Model(agent=Budget(tokens=1000, concurrent=4))).ledger()
    budgets = Budgets(Model(agent=Budget(tokens=1000, concurrent=4)), ledger)
    start.wait()  # type: ignore[attr-defined]
    got = 0
    for _ in range(200):
        with suppress(OverBudget):
            with budgets.admit(9, 0) as admission:
                admission.settle(used(7))
                got += 7
    results.put(got)  # type: ignore[attr-defined]
    store.close()


def test_processes_at_one_time_do_not_exceed_the_budget_of_an_agent(tmp_path: Path) -> None:
    context = multiprocessing.get_context("spawn")
    start, results = context.Barrier(4), context.Queue()
    processes = [
        context.Process(target=_spend_all, args=(str(tmp_path / "usage"), start, results), daemon=True)
        for _ in range(4)
    ]
    for process in processes:
        process.start()
    total = sum(results.get(timeout=120) for _ in processes)
    for process in processes:
        process.join(60)
    assert 985 <= total <= 1000
    store = Store(tmp_path / "usage")
    now = _ledger(store, Model(agent=Budget(tokens=1))).standing()
    store.close()
    assert now.open == 0


def _reserve_and_hang(directory: str, ready: object) -> None:
    store = Store(Path(directory))
    ledger = Meter(store, Agent("a", "1"), Model(agent=Budget(tokens=100, concurrent=1))).ledger()
    assert ledger is not None
    ledger.reserve(40, 0)
    ready.set()  # type: ignore[attr-defined]
    signal.pause()


def test_a_killed_process_leaves_its_place_but_what_it_reserved_is_used(tmp_path: Path) -> None:
    context = multiprocessing.get_context("spawn")
    ready = context.Event()
    process = context.Process(target=_reserve_and_hang, args=(str(tmp_path / "usage"), ready), daemon=True)
    process.start()
    assert ready.wait(60)
    store = Store(tmp_path / "usage")
    ledger = Meter(store, Agent("a", "1"), Model(agent=Budget(tokens=100, concurrent=1))).ledger()
    assert ledger is not None
    assert refused(lambda: ledger.reserve(10, 0)).rule == "model.agent.concurrent"
    assert process.pid is not None
    os.kill(process.pid, signal.SIGKILL)
    process.join()
    refused(lambda: ledger.reserve(61, 0))  # that it died was found out, and stands
    assert ledger.reserve(60, 0)
    now = ledger.standing()
    assert (now.tokens, now.reserved_tokens, now.open, now.requests) == (40, 60, 1, 2)
    store.close()


def test_a_reservation_of_a_process_that_cannot_be_seen_is_given_up_after_a_while(store: Store) -> None:
    clock = Clock()
    ledger = _ledger(store, Model(agent=Budget(concurrent=1)), clock)
    number, _ = ledger.reserve(40, 0)
    with store.engine.begin() as connection:
        (process,) = connection.exec_driver_sql("SELECT process FROM reservations").one()
        boot, _, pid, started = process.split(" ")
        connection.exec_driver_sql("UPDATE reservations SET process = ?", (f"{boot} 1 {pid} {started}",))
    clock.now += UNSEEN - 1
    refused(lambda: ledger.reserve(1, 0))
    clock.now += 2
    assert ledger.reserve(1, 0)[0] > number


def test_no_database_is_asked_where_the_agent_is_not_bounded(store: Store) -> None:
    budgets = Budgets(Model(session=Budget(tokens=10)), _ledger(store))
    assert not budgets.blocks
    store.engine.dispose()
    with store.engine.begin() as connection:
        connection.exec_driver_sql("DROP TABLE reservations")
    budgets.admit(5, 0).settle(used(5))


@settings(max_examples=30, deadline=None)
@given(st.lists(st.tuples(st.booleans(), st.integers(0, 60), st.integers(0, 60), st.floats(0, 900)), max_size=30))
def test_no_order_of_requests_exceeds_the_budget_of_an_agent_in_any_period(
    tmp_path_factory: pytest.TempPathFactory, steps: list[tuple[bool, int, int, float]]
) -> None:
    clock = Clock()
    engine = open_database(tmp_path_factory.mktemp("meter") / "usage")
    model = Model(agent=Budget(tokens=100, requests=6), agent_period=1800.0)
    ledgers = [Ledger(engine, "a", model, clock=clock) for _ in range(2)]
    open_ones: list[tuple[int, int]] = []
    settled: list[tuple[float, int]] = []
    for asks, wanted, came, wait in steps:
        clock.now += wait
        if asks or not open_ones:
            with suppress(OverBudget):
                open_ones.append((ledgers[wanted % 2].reserve(wanted, 0)[0], wanted))
        else:
            number, reserved = open_ones.pop()
            ledgers[came % 2].settle(number, min(came, reserved), 0, 0.0)
            settled.append((clock.now, min(came, reserved)))
        recent = [tokens for at, tokens in settled if at > clock.now - 1800]
        assert sum(recent) + sum(tokens for _, tokens in open_ones) <= 100
        assert len(recent) + len(open_ones) <= 6
    engine.dispose()


# ---- rates ----


def test_a_rate_bounds_a_minute_and_what_is_at_one_time() -> None:
    clock = Clock()
    rate = Rate(3, 2, rule="data.sources[0].limits", what="queries of crm", minute="queries_per_minute", clock=clock)
    first, second = rate.admit(), rate.admit()
    error = refused(rate.admit)
    assert error.rule == "data.sources[0].limits.concurrent" and error.retry_after
    first.release()
    first.release()
    third = rate.admit()
    refused(rate.admit)
    del second, third
    gc.collect()
    clock.now += 15
    error = refused(rate.admit)
    assert error.rule == "data.sources[0].limits.queries_per_minute" and error.retry_after == 45.0
    assert re.search(r"3 queries of crm a minute\. Ask again in 45 seconds", error.reason)
    clock.now += 45
    with rate.admit(), rate.admit():
        refused(rate.admit)
    assert refused(Rate(0, 1, rule="r", what="w").admit).retry_after is None


def test_a_rate_holds_under_threads() -> None:
    rate = Rate(10_000, 4, rule="r", what="w")
    peak, lock = [0, 0], threading.Lock()

    def ask(_: int) -> None:
        for _ in range(200):
            with suppress(OverBudget), rate.admit():
                with lock:
                    peak[0] += 1
                    peak[1] = max(peak)
                with lock:
                    peak[0] -= 1

    with ThreadPoolExecutor(16) as pool:
        list(pool.map(ask, range(16)))
    assert 1 <= peak[1] <= 4
    assert not math.isinf(peak[1])
