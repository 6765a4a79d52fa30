"""Id maps: who is who inside and out."""

from __future__ import annotations

from itertools import pairwise

from hypothesis import given
from hypothesis import strategies as st

from corral.sandbox.identity import AGENT_ID, RANGE_LENGTH, workspace_lines


@given(st.one_of(st.integers(0, 2000), st.integers(0, 0x7FFFFFFF)))
def test_the_owner_of_a_workspace_is_the_agent_and_everybody_else_keeps_their_number(owner: int) -> None:
    lines = workspace_lines(owner)
    reads_as = {}
    for line in lines:
        for outside in (line.outside, line.outside + line.length - 1):
            reads_as[outside] = line.inside + outside - line.outside
    assert reads_as[owner] == AGENT_ID
    for outside, inside in reads_as.items():
        assert outside in (owner, AGENT_ID) or inside == outside
    # A map that the kernel takes: no id twice, on either side (user_namespaces(7)).
    for side in ("inside", "outside"):
        ranges = sorted((getattr(line, side), line.length) for line in lines)
        assert all(first + length <= after for (first, length), (after, _) in pairwise(ranges))
    assert len(lines) <= 8


def test_a_workspace_of_root_belongs_to_the_agent_and_to_nobody_else() -> None:
    lines = workspace_lines(0)
    assert lines[0].outside == 0 and lines[0].inside == AGENT_ID
    assert not any(line.outside <= AGENT_ID < line.outside + line.length for line in lines)
    assert sum(line.length for line in lines) == RANGE_LENGTH - 1
