"""What the supervisor decided, from the record that `corral run --record` wrote on the host.

A decision belongs to the turn whose tool call it comes from: Corral follows each process back to the answer of the
model that asked for it.
"""

import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from model_server import call_id
from script import Turn


@dataclass(frozen=True)
class Decision:
    """One line of the record; several where equal refusals are counted."""

    action: str
    subject: dict[str, object]
    verdict: str
    rule: str
    reason: str
    answered_by: str
    held: float
    count: int

    @property
    def refused(self) -> bool:
        return self.verdict in ("deny", "kill")

    @property
    def where(self) -> str:
        """Of a connection: the address and the port."""
        return f"{self.subject['address']}:{self.subject['port']}" if "address" in self.subject else ""

    @property
    def expected(self) -> bool:
        """Whether programs try this as a matter of course."""
        return self.subject.get("quiet") is True


def read(path: Path, turns: Sequence[Turn]) -> dict[str, list[Decision]]:
    """The decisions by the name of their turn; those of no turn are under an empty name."""
    names = {call_id(number): turn.name for number, turn in enumerate(turns)}
    found: dict[str, list[Decision]] = {turn.name: [] for turn in turns} | {"": []}
    for line in path.read_text(encoding="ascii").splitlines():
        told = json.loads(line)
        if "subject" not in told:  # the account of a connection or a call, not a decision
            continue
        subject = told["subject"]
        found[names.get(told["origin"]["tool"], "")].append(
            Decision(
                told["action"], subject, told["verdict"], told["rule"], told["reason"], told["answered_by"],
                told["held"], told["count"],
            )
        )  # fmt: skip
    return found
