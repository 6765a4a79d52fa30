"""The demo, as a newcomer runs it: a real, unmodified agent works inside, then attacks, and everything holds."""

from __future__ import annotations

import os
import pwd
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

REPOSITORY = Path(__file__).resolve().parents[2]
AGENT = REPOSITORY / "build" / "demo-venv" / "bin" / "mini"
CORRAL = Path(sys.executable).parent / "corral"


def _command(user: str | None) -> list[str]:
    demo = [sys.executable, str(REPOSITORY / "examples/demo/demo.py"), "--corral", str(CORRAL), "--agent", str(AGENT)]
    if user is None:
        return demo
    home = pwd.getpwnam(user).pw_dir
    return ["runuser", "-u", user, "--", "env", "-i", f"HOME={home}", "PATH=/usr/local/bin:/usr/bin:/bin", *demo]


def _run(user: str | None) -> subprocess.CompletedProcess[str]:
    return subprocess.run(_command(user), capture_output=True, text=True, timeout=180, cwd="/", check=False)


@pytest.fixture(autouse=True)
def _installed() -> None:
    if not AGENT.exists():
        pytest.skip("the demo's agent is not installed; `make test` installs it into build/demo-venv")


def _check(done: subprocess.CompletedProcess[str]) -> None:
    assert done.returncode == 0, done.stdout + done.stderr
    assert "Everything held" in done.stdout
    text = " ".join(done.stdout.split())
    decided = text[text.index("What the supervisor decided") :]
    assert "denied net.connect x80 by network.deny[0]: The staging network is not for agents." in decided
    assert "denied net.connect 192.0.2.100:22 by network.ask[0]; held " in decided
    assert " answered by " in decided and "no tunnels, whatever the task" in decided
    assert "denied kernel.unshare, kernel.setns, kernel.mount" in decided


def test_an_agent_works_and_every_attack_of_it_fails() -> None:
    _check(_run(None))


def test_the_same_as_an_ordinary_user() -> None:
    if os.geteuid() != 0:
        pytest.skip("already an ordinary user: the test above was this one")
    user = os.environ.get("CORRAL_TEST_USER", "corral-test")
    try:
        pwd.getpwnam(user)
    except KeyError:
        pytest.skip(f"there is no user {user} on this machine; `make test` makes one")
    reachable = subprocess.run(["runuser", "-u", user, "--", "test", "-x", str(AGENT)], check=False)
    if reachable.returncode != 0 or shutil.which("runuser") is None:
        pytest.skip(f"the checkout lies where user {user} may not look; run `make demo` as that user instead")
    _check(_run(user))
