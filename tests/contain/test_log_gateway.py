"""What leaves through the gateway leaves after its record is durable, and the log says what became of it (I3)."""

from __future__ import annotations

import asyncio
import errno
from collections.abc import AsyncIterator, Iterator
from contextlib import suppress
from pathlib import Path

import pytest

from corral.actions import Decision, Endpoint, Flow, Kind, Verdict
from corral.errors import SandboxClosed
from corral.log.places import open_log
from corral.log.writer import Log, LogUnwritable
from tests.contain.conftest import MakeBox
from tests.contain.gateway_boxes import policy_of, shell
from tests.contain.logs import Disk, events, verified
from tests.internet.world import Internet

FETCH = "curl -sS -m 60 http://web.test/"


@pytest.fixture
async def log(tmp_path: Path) -> AsyncIterator[Log]:
    opened = open_log(tmp_path / "records" / "log")
    yield opened
    with suppress(LogUnwritable):  # which is what a test wanted
        await asyncio.to_thread(opened.close)


@pytest.fixture
def disk(monkeypatch: pytest.MonkeyPatch, log: Log) -> Iterator[Disk]:
    made = Disk(monkeypatch)
    yield made
    made.works.set()


async def test_nothing_arrives_before_its_record_is_durable(
    make_box: MakeBox, internet: Internet, log: Log, disk: Disk
) -> None:
    box = await make_box(policy=policy_of("allow: [web.test]"), log=log)
    internet.clear()
    disk.works.clear()
    fetching = asyncio.ensure_future(shell(box, FETCH, timeout=90))
    done, _ = await asyncio.wait([fetching], timeout=1.5)
    assert not done
    assert not internet.records(address="web.test")
    disk.works.set()
    result = await fetching
    assert (result.exit_code, len(internet.records(address="web.test"))) == (0, 1), result.stderr
    await box.close()
    log.seal()
    decided = [each for each in events(log.directory, Decision) if isinstance(each.action.subject, Endpoint)]
    assert {each.action.kind for each in decided} >= {Kind.NET_RESOLVE, Kind.NET_CONNECT}
    assert all(each.verdict is Verdict.ALLOW for each in decided)
    (flow,) = events(log.directory, Flow)
    assert (flow.endpoint.name, flow.endpoint.port) == ("web.test", 80)
    assert flow.bytes_down > 0
    verified(log.directory)


async def test_nothing_arrives_if_it_cannot_be_recorded(
    make_box: MakeBox, internet: Internet, log: Log, disk: Disk
) -> None:
    box = await make_box(policy=policy_of("allow: [web.test]"), log=log)
    internet.clear()
    disk.works.clear()
    fetching = asyncio.ensure_future(shell(box, FETCH, timeout=90))
    await asyncio.wait([fetching], timeout=1.0)
    disk.error = errno.ENOSPC
    disk.works.set()
    with pytest.raises(SandboxClosed, match="log cannot be written"):
        await fetching
    assert not internet.records(address="web.test")


async def test_what_is_refused_is_in_the_log_with_its_reason(make_box: MakeBox, internet: Internet, log: Log) -> None:
    rules = "allow: [web.test]\ndeny: [{name: other.test, reason: not this one}]"
    box = await make_box(policy=policy_of(rules), log=log)
    internet.clear()
    assert (await shell(box, "curl -sS -m 5 http://other.test/")).exit_code != 0
    await box.close()
    log.seal()
    refused = [each for each in events(log.directory, Decision) if each.verdict is Verdict.DENY]
    assert any("other.test" in str(each.action) and "not this one" in each.reason for each in refused)
    verified(log.directory)
