"""What is different between two policies is said in words, each value by its name."""

from __future__ import annotations

from dataclasses import replace

import pytest

from corral.policy.canonical import canonical_form
from corral.policy.difference import MAX_CHANGES, differences
from corral.policy.load import parse_policy
from corral.policy.model import Approvals, Environment, Log, Policy, Resources, Syscalls


def said(old: Policy, new: Policy) -> tuple[str, ...]:
    return differences(canonical_form(old), canonical_form(new))


def test_equal_policies_have_no_difference() -> None:
    assert said(Policy(), Policy()) == ()
    assert said(Policy(syscalls=Syscalls(ask=("a", "b"))), Policy(syscalls=Syscalls(ask=("b", "a", "b")))) == ()


def test_each_value_is_named() -> None:
    old = Policy(syscalls=Syscalls(ask=("mount", "getpriority")), resources=Resources(processes=10))
    new = Policy(
        syscalls=Syscalls(ask=("getpriority", "nice")),
        resources=Resources(processes=20),
        approvals=Approvals(timeout=5),
        log=Log(files=("/a/*",)),
    )
    assert said(old, new) == (
        "approvals.timeout: 300 -> 5",
        'log.files: added "/a/*"',
        "resources.processes: 10 -> 20",
        'syscalls.ask: removed "mount"',
        'syscalls.ask: added "nice"',
    )


def test_a_rule_is_said_without_what_it_leaves_open() -> None:
    new = parse_policy("network: {allow: ['example.test:443']}\n", source="x")
    (line,) = said(Policy(), new)
    assert line.startswith('network.allow: added {"name": "example.test"')
    assert "null" not in line and "[]" not in line


def test_order_counts_where_it_means_something() -> None:
    first, second = (
        parse_policy(f"network: {{resolvers: [{each}]}}\n", source="x")
        for each in ("192.0.2.1, 192.0.2.2", "192.0.2.2, 192.0.2.1")
    )
    assert said(first, second) == ("network.resolvers: in another order",)


def test_values_of_variables_are_not_said() -> None:
    (line,) = said(Policy(), replace(Policy(), environment=Environment(set=(("TOKEN", "hunter2"),))))
    assert "TOKEN" in line and "hunter2" not in line


def test_what_is_said_is_bounded() -> None:
    new = Policy(syscalls=Syscalls(ask=tuple(f"{number}" + "x" * 1000 for number in range(1000))))
    lines = said(Policy(), new)
    assert len(lines) == MAX_CHANGES and lines[-1] == f"and {1000 - MAX_CHANGES + 1} more"
    assert max(map(len, lines)) < 300


@pytest.mark.parametrize("form", [b"", b"[]", b"1", b"\xff", b"[" * 100_000])
def test_what_is_no_form_is_refused(form: bytes) -> None:
    with pytest.raises((ValueError, RecursionError)):
        differences(form, b"{}")
