"""Stopping all without a version 2 cgroup, where it takes more than one signal."""

from __future__ import annotations

import pytest

from corral.sandbox import freezer
from corral.sandbox.channel import Request


def test_what_goes_on_again_is_stopped_again(monkeypatch: pytest.MonkeyPatch) -> None:
    """A group that is orphaned just as it stops is sent SIGCONT by the kernel (setpgid(2))."""
    asked: list[Request] = []
    stopped = {7: True, 8: False}
    monkeypatch.setattr(freezer, "children", lambda _: [2])
    monkeypatch.setattr(freezer, "descendants", lambda _: list(stopped))
    monkeypatch.setattr(freezer, "_threads", lambda pid: [pid])
    monkeypatch.setattr(freezer, "_has_stopped", lambda _, tid: stopped[tid])
    stopping = freezer.Freezer(None, asked.append)
    stopping.stop()
    assert not stopping.has_stopped(1, ())
    assert asked == [Request.STOP_ALL]  # before the first was confirmed, nobody is asked again
    stopping.confirm()
    assert not stopping.has_stopped(1, ())
    assert asked == [Request.STOP_ALL, Request.STOP_ALL]
    assert not stopping.has_stopped(1, (8,))  # not before it is confirmed
    stopping.confirm()
    stopped[8] = True
    assert stopping.has_stopped(1, ())
    assert asked == [Request.STOP_ALL, Request.STOP_ALL]
