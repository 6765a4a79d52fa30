"""The policies in examples/ are right, and decide as the tables beside them say."""

from __future__ import annotations

from pathlib import Path

import pytest

from corral.cli import policy as commands
from corral.policy.expectations import load_expectations, table_beside

EXAMPLES = Path(__file__).resolve().parents[2] / "examples"
POLICIES = sorted(path for path in EXAMPLES.glob("*/*.yaml") if not path.name.endswith(".test.yaml"))


def test_there_are_some() -> None:
    assert {path.stem for path in POLICIES} >= {"repository", "episode", "review", "policy"}


@pytest.mark.parametrize("path", POLICIES, ids=lambda path: f"{path.parent.name}/{path.stem}")
def test_an_example_decides_as_its_table_says(path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert commands.test(str(path), as_json=False) == 0, capsys.readouterr().out
    # A table in which all is allowed, or all refused, shows nothing.
    verdicts = {expectation.verdict for expectation in load_expectations(table_beside(str(path)))}
    assert len(verdicts) > 1


def test_every_table_has_its_policy() -> None:
    tables = set(EXAMPLES.glob("*/*.test.yaml"))
    assert tables == {Path(table_beside(str(path))) for path in POLICIES}
