"""What brokers say of calls is kept as far as the policy wants it, and they never wait for a disk."""

from __future__ import annotations

import os
import threading
import time
from collections.abc import Iterator, Sequence
from pathlib import Path

import pytest

from corral.actions import Content, Origin, Used
from corral.log.events import Event, PayloadKept, PayloadLost
from corral.log.gaps import Gaps
from corral.log.holdings import Holdings
from corral.log.ocsf import Context
from corral.log.payloads import Payload, Payloads, Shared
from corral.log.places import open_log, open_payloads
from corral.log.reader import Reader
from corral.log.records import decode
from corral.log.signing import read_keys
from corral.log.sink import SessionLog
from corral.log.verify import verify_log
from corral.monitor.records import Keeper, Tally
from corral.policy.model import Log as LogPolicy
from corral.sandbox import contents as module
from corral.sandbox.contents import Contents
from corral.sandbox.selected import Selected, TakenFile
from tests.unit.recorded import used

DAY = 86400.0
KEEP = LogPolicy(keep=((Content.PROMPT, DAY), (Content.RESPONSE, DAY), (Content.QUERY, DAY)), keep_bytes=100_000)
CONTEXT = Context("coder", "1", "p", "sha256:0", "s", "s", "1")
ORIGIN = Origin("s", "s", 3, 1, tool="call_1")


class Kept:
    """A log, the contents of a session of it, and what is there in the end."""

    def __init__(self, place: Path, policy: LogPolicy) -> None:
        self.place = place
        self._log = open_log(place)
        self.session = SessionLog(self._log, CONTEXT)
        self.contents = Contents(self.session, open_payloads(place), policy, Origin("s", "s"))

    def end(self) -> list[Event]:
        self.contents.close()
        self._log.close()
        look = Holdings(Gaps())
        assert verify_log(self.place, read_keys(self.place), look=look).valid
        assert not list(look.faults(open_payloads(self.place)))
        return [decode(entry).event for _, entry in Reader(self.place).entries()]

    def read(self, event: Event) -> bytes:
        assert isinstance(event, PayloadKept)
        return open_payloads(self.place).read(event.digest)


@pytest.fixture
def kept(tmp_path: Path) -> Iterator[Kept]:
    made = Kept(tmp_path / "log", KEEP)
    yield made
    made.contents.close()


def test_a_call_is_kept_with_its_account(kept: Kept) -> None:
    keeper: Keeper = kept.contents
    tally: Tally = kept.session
    prompts = [b'{"messages":[' + os.urandom(10_000).hex().encode()]
    prompts.append(prompts[0] + b"and more]}")
    assert [keeper.keeps(each) for each in Content] == [
        100_000 if each in (Content.PROMPT, Content.RESPONSE, Content.QUERY) else 0 for each in Content
    ]
    for number, prompt in enumerate(prompts, 1):
        keeper.keep(ORIGIN, Content.PROMPT, prompt, True, "model-1", number)
        keeper.keep(ORIGIN, Content.RESPONSE, b"answer", False, "model-1", number)
        tally.used(used(call=number))
    keeper.keep(ORIGIN, Content.QUERY, b"select 1", True, "hr", 3)
    keeper.keep(ORIGIN, Content.TERMINAL, b"not asked for", True, "x")
    events = kept.end()
    found = [event for event in events if isinstance(event, PayloadKept)]
    assert [(each.content, each.call, each.is_whole, each.about, each.origin) for each in found] == [
        (Content.PROMPT, 1, True, "model-1", ORIGIN),
        (Content.RESPONSE, 1, False, "model-1", ORIGIN),
        (Content.PROMPT, 2, True, "model-1", ORIGIN),
        (Content.RESPONSE, 2, False, "model-1", ORIGIN),
        (Content.QUERY, 3, True, "hr", ORIGIN),
    ]
    assert [kept.read(each) for each in found] == [prompts[0], b"answer", prompts[1], b"answer", b"select 1"]
    assert found[2].size == len(b"and more]}")
    assert [event.call for event in events if isinstance(event, Used)] == [1, 2]


def test_what_is_longer_than_the_policy_says_is_cut(kept: Kept) -> None:
    kept.contents.keep(ORIGIN, Content.RESPONSE, b"x" * 100_001, True, "m" * 1000)
    (event,) = (event for event in kept.end() if isinstance(event, PayloadKept))
    assert (event.size, event.is_whole, event.about) == (100_000, False, "m" * 200)


def test_brokers_do_not_wait_for_a_disk_and_what_is_too_much_is_counted(
    kept: Kept, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(module, "MAX_CALLS", 250_000)
    works, keep = threading.Event(), Payloads.keep

    def slow(self: Payloads, *arguments: object, **named: object) -> Payload:
        works.wait()
        return keep(self, *arguments, **named)  # type: ignore[arg-type]

    monkeypatch.setattr(Payloads, "keep", slow)
    try:
        for number in range(10):
            kept.contents.keep(ORIGIN, Content.RESPONSE, os.urandom(100_000), True, "m", number)
        for number in range(1000):
            kept.contents.keep(ORIGIN, Content.QUERY, b"", True, "m", number)
        assert not kept.contents.is_behind  # commands need not wait for it
    finally:
        works.set()
    events = kept.end()
    found = [event for event in events if isinstance(event, PayloadKept)]
    lost = {event.content: event for event in events if isinstance(event, PayloadLost)}
    assert sum(event.content is Content.RESPONSE for event in found) == 2
    assert lost[Content.RESPONSE].count == 8
    queries = sum(event.content is Content.QUERY for event in found)
    assert 0 < queries < 60
    assert sum(e.count for e in events if isinstance(e, PayloadLost) and e.content is Content.QUERY) == 1000 - queries
    assert lost[Content.RESPONSE].why == "more of it came than the disk could take"


def test_what_is_lost_is_told_while_the_session_goes_on(kept: Kept, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "MAX_CALLS", 2000)
    told = threading.Event()
    record = SessionLog.record

    def heard(self: SessionLog, event: Event) -> None:
        record(self, event)
        if isinstance(event, PayloadLost):
            told.set()

    monkeypatch.setattr(SessionLog, "record", heard)
    kept.contents.keep(ORIGIN, Content.RESPONSE, b"x" * 5000, True, "m")
    kept.contents.keep(ORIGIN, Content.RESPONSE, b"x", True, "m")
    assert told.wait(60)


def test_what_cannot_be_kept_ends_the_sandbox(kept: Kept, monkeypatch: pytest.MonkeyPatch) -> None:
    ended: list[str] = []
    kept.contents.when_failed(ended.append)

    def broken(*_: object, **__: object) -> Payload:
        raise RuntimeError("secret")

    monkeypatch.setattr(Payloads, "keep", broken)
    kept.contents.keep(ORIGIN, Content.PROMPT, b"x", True, "m")
    with pytest.raises(Exception, match="RuntimeError"):
        kept.contents.close()
    monkeypatch.undo()
    assert ended == ["what its policy wants kept cannot be kept (RuntimeError)"]
    kept.contents._failure = ""


def test_files_do_not_wait_for_the_disk_all_in_memory(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "MAX_WAITING", 2_000)
    keep, most = Payloads.keep, 0
    kept = Kept(tmp_path / "log", LogPolicy(keep=((Content.FILE, DAY),), files=("/**",), keep_bytes=1_000))

    def slow(self: Payloads, content: Content, data: bytes, *, expires: int, shared: Shared | None = None) -> Payload:
        nonlocal most
        if not most:
            while not kept.contents.is_behind:
                time.sleep(0.001)
            time.sleep(0.1)  # whoever does not wait reads more of them meanwhile
        most = max(most, kept.contents._waiting)
        return keep(self, content, data, expires=expires, shared=shared)

    def files(globs: Sequence[str], size: int) -> Selected:
        assert (globs, size) == (("/**",), 1_000)
        return Selected((TakenFile(f"/work/{n:02}", bytes(1_000), n % 2 == 0) for n in range(20)), 3)

    monkeypatch.setattr(Payloads, "keep", slow)
    kept.contents.close(files=files)
    assert most == 3_000
    events = kept.end()
    found = [event for event in events if isinstance(event, PayloadKept)]
    assert [(event.about, event.is_whole) for event in found] == [(f"/work/{n:02}", n % 2 == 0) for n in range(20)]
    (lost,) = [event for event in events if isinstance(event, PayloadLost)]
    assert (lost.content, lost.count) == (Content.FILE, 3)
