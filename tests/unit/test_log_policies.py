"""A session under another policy than the agent's last one is a record, and nothing that fails makes it one less."""

from __future__ import annotations

from pathlib import Path

import pytest

from corral.log.events import PolicyChanged
from corral.log.policies import note_policy
from corral.log.records import encode
from corral.log.writer import Log, LogUnwritable
from tests.unit.logs import KEY
from tests.unit.recorded import CONTEXT

FIRST, SECOND = b'{"timeout":1}', b'{"timeout":2}'


class Sessions:
    """Begins sessions in a log."""

    def __init__(self, log: Log) -> None:
        self.log = log
        self.told: list[PolicyChanged] = []

    def begin(self, form: bytes, agent: str = "coder") -> PolicyChanged | None:
        """What was recorded, if anything; when all that follows is done, too."""
        before = len(self.told)
        note_policy(self.log, agent, form, "anna", self._record)
        self.log.append(b"so that what waits for the record before is done")
        assert len(self.told) <= before + 1
        return self.told[-1] if len(self.told) > before else None

    def _record(self, event: PolicyChanged) -> None:
        self.told.append(event)
        self.log.submit(encode(event, CONTEXT, sequence=1, at=1.0, monotonic_ns=1))


def test_changes_are_told_per_agent(tmp_path: Path) -> None:
    with Log(tmp_path / "log", KEY) as log:
        sessions = Sessions(log)
        first = sessions.begin(FIRST)
        assert (
            first is not None
            and first.old == ""
            and first.changes == ("no earlier policy of this agent is known here",)
        )
        assert sessions.begin(FIRST) is None
        assert sessions.begin(FIRST, "another") is not None
        changed = sessions.begin(SECOND)
        assert changed is not None and (changed.old, changed.by) == (first.new, "anna")
        assert changed.changes == ("timeout: 1 -> 2",)
        assert sessions.begin(SECOND) is None and sessions.begin(FIRST, "another") is None
    with Log(tmp_path / "log", KEY) as log:
        assert Sessions(log).begin(SECOND) is None
        back = Sessions(log).begin(FIRST)
        assert back is not None and back.changes == ("timeout: 2 -> 1",)


def test_killed_before_the_record_was_durable_it_is_told_again(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with Log(tmp_path / "log", KEY) as log:
        sessions = Sessions(log)
        sessions.begin(FIRST)
        with monkeypatch.context() as patch:
            patch.setattr("corral.log.policies._keep", lambda path, form, error: None)
            assert sessions.begin(SECOND) is not None
        # Nobody knows whether the session under the second one had any effect: going back to the first is a change.
        again = sessions.begin(FIRST)
        assert again is not None and again.changes == ("nothing; that it was in force before could not be kept",)
        assert sessions.begin(FIRST) is None


def test_what_is_kept_and_cannot_be_read_is_a_change(tmp_path: Path) -> None:
    with Log(tmp_path / "log", KEY) as log:
        sessions = Sessions(log)
        sessions.begin(FIRST)
        (kept,) = (log.directory / "journal" / "policies").iterdir()
        kept.write_bytes(b"\0" * 40)
        told = sessions.begin(FIRST)
        assert told is not None and told.changes == ("what is known of the earlier one cannot be read",)
        kept.unlink()
        kept.with_name(f"{kept.name}.old").unlink()
        told = sessions.begin(FIRST)
        assert told is not None and told.old == ""
        kept.unlink()
        kept.mkdir()
        with pytest.raises(LogUnwritable, match="which policy is in force"):
            sessions.begin(SECOND)
