"""The meter counts each call once, whoever writes beside it, and what it could not count it says."""

from __future__ import annotations

import json
import multiprocessing
import sqlite3
import stat
import threading
import time
from collections.abc import Iterator
from contextlib import closing
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from corral.actions import Ending, Kind, Origin, Used
from corral.brokers.metering import meter as meter_module
from corral.brokers.metering.meter import BURST, Meter, Store
from corral.brokers.metering.store import FILE, LARGEST, MeterFault
from corral.brokers.metering.usage import By, Sums, Usage, Wanted, add_up, read_usage
from corral.cli.app import app
from corral.cli.usage import groups_of, usage_directory
from corral.errors import RequestError
from corral.log.note import KeyFile, KeyType
from corral.log.ocsf import Context
from corral.log.records import Record, encode
from corral.log.writer import Log
from corral.monitor.records import Tally
from corral.policy.model import Agent, Model

DAY = 86400
USED = Used(
    Origin("box-1", "session-1", 3),
    Kind.MODEL_CALL,
    "upstream",
    "model-a",
    "model.allow[0]",
    20_000 * DAY + 100.0,
    2.0,
    Ending.ANSWERED,
    status=200,
    input_tokens=100,
    output_tokens=20,
    cached_tokens=40,
    written_tokens=10,
    cost=1_500_000_001,
    currency="USD",
    bytes_up=500,
    bytes_down=300,
)
ROWS = replace(USED, kind=Kind.DATA_QUERY, source="crm", name="select", input_tokens=0, output_tokens=0, cost=0, rows=7)


@pytest.fixture
def store(tmp_path: Path) -> Iterator[Store]:
    store = Store(tmp_path / "usage", clock=lambda: 20_000.0 * DAY)
    yield store
    store.close()


def _read(tmp_path: Path, by: By = By.SESSION, **wanted: Any) -> Usage:
    return read_usage(tmp_path / "usage", by, Wanted(**wanted))


def test_it_is_a_tally(store: Store) -> None:
    assert isinstance(Meter(store, Agent(), Model()), Tally)


def test_calls_are_added_up_by_what_is_asked_for(store: Store, tmp_path: Path) -> None:
    meter, other = Meter(store, Agent("coder", "1"), Model()), Meter(store, Agent("tester", "2"), Model())
    meter.used(USED)
    meter.used(replace(USED, name="model-b", status=429, cost=1))
    meter.used(ROWS)
    other.used(
        replace(USED, origin=Origin("box-2", "session-2"), ending=Ending.FAILED, currency="EUR", started=DAY * 19_990.0)
    )
    other.used(replace(USED, origin=Origin("box-2", "session-2"), ending=Ending.REFUSED, cost=0, estimated=True))
    assert store.flush()
    by_session = _read(tmp_path)
    assert [(group.key, group.sums.requests, group.sums.errors, group.sums.refused) for group in by_session.groups] == [
        (("session-1",), 3, 1, 0),
        (("session-2",), 2, 1, 1),
    ]
    first = by_session.groups[0].sums
    assert (first.input_tokens, first.output_tokens, first.cached_tokens, first.written_tokens) == (200, 40, 120, 30)
    assert (first.rows, first.bytes_up, first.bytes_down, first.seconds) == (7, 1500, 900, 6.0)
    assert by_session.total.cost == {"USD": 1_500_000_002, "EUR": 1_500_000_001}
    assert by_session.total.estimated == 1
    assert [group.key for group in _read(tmp_path, By.AGENT).groups] == [("coder", "1"), ("tester", "2")]
    assert {group.key for group in _read(tmp_path, By.SOURCE).groups} == {
        ("model.call", "upstream"),
        ("data.query", "crm"),
    }
    assert {group.key[1] for group in _read(tmp_path, By.MODEL).groups} == {"model-a", "model-b", "select"}
    assert [group.key for group in _read(tmp_path, By.DAY).groups] == [("2024-09-24",), ("2024-10-04",)]
    assert _read(tmp_path, agent="tester").total.requests == 2
    assert _read(tmp_path, session="session-1").total.requests == 3
    assert _read(tmp_path, since=20_000.0 * DAY).total.requests == 4


def test_where_nothing_was_counted_nothing_is_made(tmp_path: Path) -> None:
    assert _read(tmp_path) == Usage((), Sums(), 0)
    assert not (tmp_path / "usage").exists()


def test_only_its_owner_can_read_it(store: Store, tmp_path: Path) -> None:
    Meter(store, Agent(), Model()).used(USED)
    assert store.flush()
    assert stat.S_IMODE((tmp_path / "usage").stat().st_mode) == 0o700
    modes = {path.name: stat.S_IMODE(path.stat().st_mode) for path in (tmp_path / "usage").iterdir()}
    assert FILE in modes and f"{FILE}-wal" in modes
    assert set(modes.values()) == {0o600}


def test_what_others_can_read_or_is_a_link_is_not_used(tmp_path: Path) -> None:
    directory = tmp_path / "usage"
    Store(directory).close()
    (directory / FILE).chmod(0o644)
    with pytest.raises(MeterFault, match="nobody else"):
        Store(directory)
    (directory / FILE).rename(tmp_path / "elsewhere")
    (tmp_path / "elsewhere").chmod(0o600)
    (directory / FILE).symlink_to(tmp_path / "elsewhere")
    with pytest.raises(MeterFault, match="must belong to you"):
        Store(directory)
    (directory / FILE).unlink()
    directory.chmod(0o755)
    with pytest.raises(MeterFault, match="nobody else"):
        Store(directory)


def test_what_is_no_meter_of_this_version_is_not_used(tmp_path: Path) -> None:
    directory = tmp_path / "usage"
    Store(directory).close()
    with closing(sqlite3.connect(directory / FILE)) as database:
        database.execute("UPDATE state SET version = 99")
        database.commit()
    with pytest.raises(MeterFault, match="another version"):
        Store(directory)
    (directory / FILE).write_bytes(b"not a database" * 100)
    with pytest.raises(MeterFault, match="cannot be used"):
        Store(directory)


def test_names_and_numbers_from_inside_do_no_harm(store: Store, tmp_path: Path) -> None:
    meter = Meter(store, Agent(), Model())
    for name in ("\ud800", "a\0b", "x" * 10_000, "'; DROP TABLE calls; --"):
        meter.used(replace(USED, name=name))
    for _ in range(3):
        meter.used(replace(USED, input_tokens=1 << 200, cost=1 << 200, output_tokens=-5, bytes_up=-1, seconds=-3.0))
    assert store.flush()
    usage = _read(tmp_path, By.MODEL)
    assert usage.total.requests == 7
    assert usage.total.input_tokens == 3 * LARGEST + 400
    assert usage.total.output_tokens == 80
    assert max(len(group.key[1]) for group in usage.groups) == 200


def test_a_flood_of_refusals_is_few_rows_and_still_all_of_them(store: Store, tmp_path: Path) -> None:
    meter = Meter(store, Agent(), Model())
    with store._ready:  # the thread takes them at one time
        for number in range(500):
            meter.used(replace(USED, name=f"invented-{number}", ending=Ending.REFUSED, status=403))
    assert store.flush()
    usage = _read(tmp_path, By.MODEL)
    assert usage.total.refused == usage.total.requests == 500
    assert len(usage.groups) == BURST + 1


def test_what_is_old_becomes_sums_of_days_that_say_the_same(tmp_path: Path) -> None:
    now = [20_000.0 * DAY]
    store = Store(tmp_path / "usage", keep_days=30, clock=lambda: now[0])
    meter = Meter(store, Agent("coder", "1"), Model())
    for number in range(20):
        meter.used(replace(USED, name=f"model-{number % 2}", started=now[0] + number))
    assert store.flush()
    before = {by: _read(tmp_path, by) for by in (By.AGENT, By.MODEL, By.SOURCE, By.DAY)}
    for days in (31, 40):  # folded twice: into what is there, too
        now[0] = (20_000.0 + days) * DAY
        meter.used(
            replace(USED, origin=Origin("b", "new"), started=20_000.0 * DAY + 5 if days == 31 else now[0], cost=0)
        )
        assert store.flush()
    with store.engine.begin() as connection:
        assert connection.exec_driver_sql("SELECT count(*) FROM calls").scalar() == 1
        assert connection.exec_driver_sql("SELECT count(*), sum(requests) FROM days").one() == (3, 21)
    for by, usage in before.items():
        after = _read(tmp_path, by)
        assert after.total.requests == usage.total.requests + 2
        assert after.total.cost == usage.total.cost
    assert {group.key: group.sums.requests for group in _read(tmp_path).groups} == {("",): 21, ("new",): 1}
    assert _read(tmp_path, session="session-1").groups == ()
    store.close()


def test_while_it_cannot_be_written_calls_wait_and_what_is_too_much_is_told(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(meter_module, "MOST", 10)
    monkeypatch.setattr(meter_module, "_RETRY", 0.01)
    store = Store(tmp_path / "usage")
    meter = Meter(store, Agent(), Model())
    with closing(sqlite3.connect(tmp_path / "usage" / FILE)) as vandal:
        vandal.execute("ALTER TABLE calls RENAME TO gone")
        vandal.commit()
        for _ in range(15):
            meter.used(USED)
        assert not store.flush(0.3)
        assert "cannot be used" in store.fault and "1500000001" not in store.fault
        vandal.execute("ALTER TABLE gone RENAME TO calls")
        vandal.commit()
    assert store.flush()
    assert store.close() == 0
    usage = _read(tmp_path)
    assert (usage.total.requests, usage.lost) == (10, 5)


def test_closing_writes_what_waits_and_says_what_it_could_not(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(meter_module, "_RETRY", 0.01)
    monkeypatch.setattr(meter_module, "_LAST_WORDS", 0.1)
    store = Store(tmp_path / "usage")
    meter = Meter(store, Agent(), Model())
    for _ in range(2500):
        meter.used(USED)
    assert store.close() == 0
    assert _read(tmp_path).total.requests == 2500
    store = Store(tmp_path / "usage")
    with closing(sqlite3.connect(tmp_path / "usage" / FILE)) as vandal:
        vandal.execute("DROP TABLE calls")
        vandal.commit()
    Meter(store, Agent(), Model()).used(USED)
    assert store.close() == 1


def _count(directory: str, number: int, start: Any) -> None:
    store = Store(Path(directory))
    meter = Meter(store, Agent("coder", "1"), Model())
    start.wait()
    for _ in range(500):
        meter.used(replace(USED, origin=Origin("box", f"session-{number}"), started=time.time()))
    assert store.close() == 0


def test_processes_write_at_one_time(tmp_path: Path) -> None:
    context = multiprocessing.get_context("spawn")
    start = context.Barrier(4)
    processes = [
        context.Process(target=_count, args=(str(tmp_path / "usage"), n, start), daemon=True) for n in range(4)
    ]
    for process in processes:
        process.start()
    for process in processes:
        process.join(120)
        assert process.exitcode == 0
    assert {group.key[0]: group.sums.requests for group in _read(tmp_path).groups} == {
        f"session-{n}": 500 for n in range(4)
    }


def test_threads_count_at_one_time(store: Store, tmp_path: Path) -> None:
    meter = Meter(store, Agent(), Model())

    def count() -> None:
        for _ in range(300):
            meter.used(USED)

    threads = [threading.Thread(target=count) for _ in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert store.flush()
    assert _read(tmp_path).total.requests == 2400


# ---- corral usage ----


@pytest.fixture
def home(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("XDG_STATE_HOME", str(tmp_path))
    return tmp_path


def _run(*words: str) -> None:
    with pytest.raises(SystemExit) as ended:
        app(["usage", *words], prog_name="corral")
    assert not ended.value.code


def test_the_command_shows_what_was_used_while_it_is(home: Path, capsys: pytest.CaptureFixture[str]) -> None:
    _run()
    assert capsys.readouterr().out == "nothing was used\n"
    store = Store(usage_directory())
    meter = Meter(store, Agent("coder", "1"), Model())
    meter.used(USED)
    meter.used(replace(USED, name="\x1b[2J\u202eevil", estimated=True))
    assert store.flush()
    _run("--by", "model")
    out = capsys.readouterr().out
    assert "\x1b" not in out and "\u202e" not in out and "\\x1b[2J" in out
    assert "3.0000 USD" in out and "1 requests the tokens are estimates" in out
    _run("--by", "agent", "--json")
    found = json.loads(capsys.readouterr().out)
    assert found["groups"][0]["key"] == ["coder", "1"]
    assert found["total"]["cost"] == {"USD": "3.000000002"}
    _run("--since", "1d", "--json")
    assert json.loads(capsys.readouterr().out)["groups"] == []
    store.close()


def test_the_command_says_that_something_is_missing(home: Path, capsys: pytest.CaptureFixture[str]) -> None:
    store = Store(usage_directory())
    Meter(store, Agent(), Model()).used(USED)
    store._lost = 4
    store.close()
    _run()
    assert "4 calls could not be counted" in capsys.readouterr().err


def test_the_command_refuses_what_it_does_not_know(home: Path, capsys: pytest.CaptureFixture[str]) -> None:
    for words in (("--by", "colour"), ("--since", "yesterday"), ("--log", str(home))):
        with pytest.raises(SystemExit) as ended:
            app(["usage", *words], prog_name="corral")
        assert ended.value.code == RequestError.exit_code
    assert capsys.readouterr().out == ""


def test_records_of_a_log_add_up_to_the_same(store: Store, tmp_path: Path) -> None:
    context = Context("coder", "1", "policy", "sha256:00", "session-1", "box-1", "0.1.0")
    calls = [
        replace(USED, cost=number, name=f"m{number % 3}", started=DAY * (20_000.0 + number)) for number in range(9)
    ]
    meter = Meter(store, Agent("coder", "1"), Model())
    for call in calls:
        meter.used(call)
    assert store.flush()
    records = [Record(call, context, 1, 0, 0, frozenset()) for call in calls]
    for by in By:
        for wanted in (Wanted(), Wanted(DAY * 20_004.5), Wanted(agent="other"), Wanted(session="session-1")):
            found = read_usage(tmp_path / "usage", by, wanted)
            assert add_up(groups_of(records, by, wanted), by) == found


def test_the_command_adds_up_a_log(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    context = Context("coder", "1", "policy", "sha256:00", "session-1", "box-1", "0.1.0")
    with Log(tmp_path / "log", KeyFile("log.example/one", KeyType.ED25519, b"k" * 32)) as log:
        for number in range(1, 4):
            log.append(
                encode(replace(USED, cost=number), context, sequence=number, at=USED.started, monotonic_ns=number)
            )
        log.append(b"no record")
        log.seal()
    _run("--log", str(tmp_path / "log"), "--by", "agent", "--json")
    found = json.loads(capsys.readouterr().out)
    assert found["groups"][0]["key"] == ["coder", "1"]
    assert (found["total"]["requests"], found["total"]["input_tokens"]) == (3, 300)
    assert found["total"]["cost"] == {"USD": "0.000000006"}
