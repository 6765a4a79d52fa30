"""What the tests of the gateway share: sandboxes with a policy of their own, and what became of what they tried."""

from __future__ import annotations

import textwrap
from collections.abc import Callable
from pathlib import Path

from corral.actions import Decision, Flow, Kind
from corral.policy.load import parse_policy
from corral.policy.model import Policy
from corral.sandbox.box import Sandbox
from corral.sandbox.results import ExecResult
from tests.contain.conftest import wait_until

PYTHON = "/usr/bin/python3"
PATIENCE = 20.0


def policy_of(text: str, *, irreversible: str = "ask", **network: object) -> Policy:
    """A policy whose network section is ``text``, with the little internet's resolver. With ``irreversible: allow`` the
    test is about what comes behind the question whether something may be written."""
    body = textwrap.indent(textwrap.dedent(text).strip(), "  ")
    extra = "".join(f"  {name}: {value}\n" for name, value in network.items())
    whole = f"network:\n{body}\n  resolvers: [203.0.113.53]\n{extra}irreversible: {irreversible}\n"
    return parse_policy(whole, source="test.yaml")


class Accounts:
    """Keeps what is told of flows."""

    def __init__(self) -> None:
        self.flows: list[Flow] = []

    def flow(self, flow: Flow) -> None:
        self.flows.append(flow)


async def python(box: Sandbox, code: str, *arguments: str, timeout: float = PATIENCE) -> ExecResult:
    """Runs a program inside."""
    return await box.exec([PYTHON, "-c", textwrap.dedent(code), *arguments], timeout=timeout)


async def shell(box: Sandbox, command: str, timeout: float = PATIENCE) -> ExecResult:
    """Runs a shell command inside."""
    return await box.exec(["sh", "-c", command], timeout=timeout)


def decisions(box: Sandbox, *kinds: Kind) -> list[Decision]:
    """What was decided so far, of these kinds."""
    return [decision for decision in box.core.supervision.recent.all() if decision.action.kind in kinds]


def refusals(box: Sandbox, *kinds: Kind) -> list[Decision]:
    """The same, refused only."""
    return [decision for decision in decisions(box, *kinds) if not decision.allowed]


def reasons(box: Sandbox) -> str:
    """Rules and reasons of all that was refused on the network."""
    return "\n".join(
        f"{decision.action}: {decision.rule}: {decision.reason}"
        for decision in refusals(box, Kind.NET_CONNECT, Kind.NET_SEND, Kind.NET_RESOLVE, Kind.HTTP_REQUEST)
    )


def live(box: Sandbox) -> list[Flow]:
    """The flows that go on."""
    egress = box.core.supervision.egress
    assert egress is not None
    return egress.live()


def waits_for(condition: Callable[[], bool]) -> None:
    """Waits until it is so."""
    assert wait_until(condition, PATIENCE)


def ca_in(workspace: Path, ca_file: Path) -> str:
    """A copy of the little internet's CA where programs inside find it."""
    place = workspace / "internet-ca.pem"
    place.write_bytes(ca_file.read_bytes())
    return str(place)
