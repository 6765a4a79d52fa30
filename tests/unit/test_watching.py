"""Names that are watched, and what a rename or a link changes about them: against lists of all paths there can be."""

from __future__ import annotations

from itertools import product

import pytest
from hypothesis import given
from hypothesis import strategies as st

from corral.policy.matching import Paths
from corral.supervisor.watching import Move, Watch

HOOKS = "/**/.git/hooks/**"
PARTS = ("a", "b", ".git", "hooks")
SHORT = ["/" + "/".join(parts) for length in (1, 2, 3) for parts in product(PARTS, repeat=length)]
globs = st.lists(
    st.lists(st.sampled_from((*PARTS, "*", "**", "?", "\\a", "h*")), min_size=1, max_size=4).map(
        lambda parts: "/" + "/".join(parts)
    ),
    min_size=1,
    max_size=3,
)
paths = st.lists(st.sampled_from(PARTS), min_size=1, max_size=4).map(lambda parts: "/" + "/".join(parts))


@given(globs, paths)
def test_it_names_what_the_policy_names(rules: list[str], path: str) -> None:
    assert Watch(rules).names(path) == bool(Paths(tuple(rules)).all(path))


@given(globs, paths, paths)
def test_a_move_that_is_not_judged_changes_no_name(rules: list[str], old: str, new: str) -> None:
    """For whatever may lie in what is moved: the globs say the same of it before and after, or it is judged."""
    watch, named = Watch(rules), Paths(tuple(rules))
    move = watch.move(old, new)
    if move is None:
        assert not named.all(old, new)
        for below in SHORT:
            assert named.all(old + below) == named.all(new + below)
    else:
        assert move.old.startswith(old)
        assert move.new.startswith(new)
        assert named.all(move.old, move.new), "what is judged must be what the policy is about"


@given(globs, paths)
def test_a_link_that_is_not_judged_leads_to_nothing_watched(rules: list[str], path: str) -> None:
    """Or to what is watched for its own last parts, wherever it lies."""
    watch, named = Watch(rules), Paths(tuple(rules))
    alias = watch.alias(path)
    if alias:
        assert alias.startswith(path)
        assert named.all(alias)
        return
    assert not named.all(path)
    above = path.rpartition("/")[0]
    for below in SHORT:
        assert named.all(path + below) == named.all(f"{above}/~any name~{below}")


@pytest.mark.parametrize(
    ("old", "new", "expected"),
    [
        ("/w/a", "/w/b", None),
        ("/w/a", "/w/.git", Move("/w/a", "/w/.git/hooks/**")),
        ("/w/.git", "/w/a", Move("/w/.git/hooks/**", "/w/a")),
        ("/w/.git/hooks/x", "/w/.git/hooks/y", Move("/w/.git/hooks/x", "/w/.git/hooks/y")),
        ("/w/.git/config.lock", "/w/.git/config", None),
    ],
)
def test_moves_of_a_repository(old: str, new: str, expected: Move | None) -> None:
    assert Watch([HOOKS]).move(old, new) == expected


def test_what_has_no_absolute_name_is_not_watched() -> None:
    watch = Watch(["/**"])
    assert watch.names("/w")
    assert not watch.names("")
    assert not watch.names("pipe:[12]")
    assert watch.alias("") == ""
