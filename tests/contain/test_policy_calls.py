"""`syscalls.deny`: what it may name, a sandbox survives."""

from __future__ import annotations

from corral import Policy
from corral.policy.fields import INDISPENSABLE
from corral.policy.model import Syscalls
from corral.supervisor.allowed import allowed_names
from tests.contain.conftest import MakeBox


async def test_without_all_that_may_be_denied_a_sandbox_still_works(make_box: MakeBox) -> None:
    denied = tuple(sorted(allowed_names() - INDISPENSABLE))
    box = await make_box(policy=Policy(syscalls=Syscalls(deny=denied)))
    assert (await box.exec(["true"])).exit_code == 0
    assert (await box.exec(["sh", "-c", "true; false"])).exit_code == 1
    assert (await box.exec(["sleep", "60"], timeout=0.1)).timed_out
    assert (await box.exec(["mkdir", "new"])).exit_code != 0
    assert await box.changes() == []
