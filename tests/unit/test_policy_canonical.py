"""The canonical form and the hash: equal for what is equal, different for what is not."""

from __future__ import annotations

import dataclasses
import hashlib
import json
import os
import random
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from corral.actions import Verdict
from corral.policy.canonical import canonical_form, policy_hash
from corral.policy.load import parse_policy
from corral.policy.model import Environment, Filesystem, NetworkRule, Policy
from tests.unit.policy_documents import DOCUMENTS, Document, written


def parse(text: str) -> Policy:
    return parse_policy(text, source="/cfg/p.yaml")


def test_the_hash_is_that_of_the_form() -> None:
    form = canonical_form(Policy())
    assert policy_hash(Policy()) == f"sha256:{hashlib.sha256(form).hexdigest()}"
    assert json.loads(form)["version"] == 7
    assert form == json.dumps(json.loads(form), sort_keys=True, separators=(",", ":"), ensure_ascii=False).encode()


def test_the_form_holds_every_value_with_its_default() -> None:
    form = json.loads(canonical_form(Policy()))
    fields = {field.name for field in dataclasses.fields(Policy)}
    assert set(form) == fields | {"version"}
    assert form["irreversible"] == "ask"
    for name in fields - {"allow_degraded", "irreversible"}:
        assert set(form[name]) == {field.name for field in dataclasses.fields(getattr(Policy(), name))}


@pytest.mark.parametrize(
    ("one", "other"),
    [
        ("", "profile: coding-agent"),
        ("", "irreversible: ask"),
        ("", "network: {loopback: allow, deny: []}"),
        ("resources: {memory: 1GiB, wall_time: 90s}", "resources: {wall_time: 90.0, memory: 1073741824}"),
        ("resources: {cpu: 2}", "resources: {cpu: 2.0}"),
        ("network: {deny: [a.example, b.example]}", "network: {deny: [B.EXAMPLE., {name: a.example}, b.example]}"),
        ("network: {deny: ['a.example:80-81']}", "network: {deny: [{name: a.example, port: [81, 80]}]}"),
        ("network: {deny: [192.0.2.1]}", "network: {deny: [{cidr: 192.0.2.1/32}]}"),
        ("network: {resolvers: [192.0.2.1]}", "network: {resolvers: ['192.0.2.1:53', 192.0.2.1]}"),
        (
            "network: {allow: [{name: a.example, requests: [GET /x, '/y/']}]}",
            "network: {allow: [{name: a.example, intercept: true, requests: [{path: /y}, {method: [get], path: /x}]}]}",
        ),
        (
            "network: {allow: [{name: a.example, permit: [ech, no-sni], limits: {up: 1KiB}}]}",
            "network: {allow: [{name: a.example, permit: [no-sni, ech, ech], limits: {up: 1024, idle: 1h}}]}",
        ),
        ("process: {deny: [git]}", "process: {deny: [{path: '/**/git', argv: ['**']}]}"),
        ("filesystem: {deny: [/a, ./b]}", "filesystem: {deny: [/cfg/b, /x/../a]}"),
        ("environment: {allow: [B, A, B]}", "environment: {allow: [A, B]}"),
        ("environment: {set: {A: x, B: y}}", "environment: {set: {B: y, A: x}}"),
        ("log: {files: [/a, './b/*']}", "log: {files: ['/cfg/b/*', /x/../a, /a]}"),
        ("data: {deny: [{source: w, tables: [a, b]}]}", "data: {deny: [{tables: [b, a, b], source: w}]}"),
        ("data: {deny: [{source: w, statements: [SELECT]}]}", "data: {deny: [{source: w, statements: [select]}]}"),
    ],
)
def test_notation_makes_no_difference(one: str, other: str) -> None:
    assert canonical_form(parse(one)) == canonical_form(parse(other))


@pytest.mark.parametrize(
    ("one", "other"),
    [
        ("", "profile: locked"),
        ("", "allow_degraded: [landlock]"),
        ("", "irreversible: allow"),
        ("irreversible: ask", "irreversible: deny"),
        ("environment: {set: {A: x}}", "environment: {set: {A: y}}"),
        ("process: {deny: [{path: a, argv: [b, c]}]}", "process: {deny: [{path: a, argv: [c, b]}]}"),
        ("process: {deny: [{path: a, argv: [b, b]}]}", "process: {deny: [{path: a, argv: [b]}]}"),
        ("network: {deny: [a.example]}", "network: {ask: [a.example]}"),
        ("network: {deny: [a.example]}", "network: {deny: [{name: a.example, reason: Why.}]}"),
        ("network: {deny: [a.example]}", "network: {deny: ['*.a.example']}"),
        ("network: {resolvers: [192.0.2.1, 192.0.2.2]}", "network: {resolvers: [192.0.2.2, 192.0.2.1]}"),
        ("network: {allow: [a.example]}", "network: {allow: [{name: a.example, intercept: true}]}"),
        ("network: {allow: [a.example]}", "network: {allow: [{name: a.example, permit: [ech]}]}"),
        ("network: {allow: [a.example]}", "network: {allow: [{name: a.example, limits: {dial: 1}}]}"),
        (
            "network: {allow: [{name: a.example, credential: {type: git, from: 'env:A'}}]}",
            "network: {allow: [{name: a.example, credential: {type: git, from: 'env:B'}}]}",
        ),
        ("log: {files: [/a]}", "log: {files: [/a, /b]}"),
        ("agent: {version: '1'}", "agent: {version: '1.0'}"),
    ],
)
def test_what_differs_has_another_hash(one: str, other: str) -> None:
    assert policy_hash(parse(one)) != policy_hash(parse(other))


def test_each_number_and_answer_counts() -> None:
    seen = {policy_hash(Policy())}
    for section in ("resources", "network", "approvals", "autonomy", "agent"):
        values = getattr(Policy(), section)
        for field in dataclasses.fields(values):
            value = getattr(values, field.name)
            other: Any = (
                Verdict.DENY if isinstance(value, Verdict) else not value if isinstance(value, bool)
                else 7 if value is None or isinstance(value, int | float) else f"{value}x" if isinstance(value, str)
                else (NetworkRule("a.example"),)
            )  # fmt: skip
            changed = dataclasses.replace(values, **{field.name: other})
            seen.add(policy_hash(dataclasses.replace(Policy(), **{section: changed})))
    assert len(seen) == 1 + sum(
        len(dataclasses.fields(getattr(Policy(), section)))
        for section in ("resources", "network", "approvals", "autonomy", "agent")
    )


def test_secrets_are_not_in_the_form() -> None:
    policy = Policy(environment=Environment(set=(("TOKEN", "s7312345"),)))
    form = canonical_form(policy)
    assert b"s7312345" not in form
    assert json.loads(form)["environment"]["set"]["TOKEN"].startswith("sha256:")


def test_of_a_credential_only_its_place_is_in_the_form(monkeypatch: pytest.MonkeyPatch) -> None:
    text = "network: {allow: [{name: a.example, credential: {type: bearer, from: 'env:TOKEN'}}]}"
    without = canonical_form(parse(text))
    monkeypatch.setenv("TOKEN", "s7312345")
    assert canonical_form(parse(text)) == without and b"env:TOKEN" in without


def test_a_path_of_any_bytes_is_told_from_its_own_description() -> None:
    odd = Policy(filesystem=Filesystem(read=(os.fsdecode(b"/\xff"),)))
    assert json.loads(canonical_form(odd))["filesystem"]["read"] == [{"base16": "2fff"}]
    assert policy_hash(odd) != policy_hash(Policy(filesystem=Filesystem(read=("/\\xff",))))


ORDERED = {"argv", "resolvers", "upstreams", "prices", "columns"}
NAMED = {"sources", "tables", "services", "operations"}
"""Lists whose entries have names, of which none may be given twice (those of ``operations`` in services only)."""


def _shuffled(value: Any, rng: random.Random, name: str = "") -> Any:
    if isinstance(value, dict):
        keys = list(value)
        rng.shuffle(keys)
        return {key: _shuffled(value[key], rng, key) for key in keys}
    if isinstance(value, list):
        items = [_shuffled(item, rng) for item in value]
        if name not in ORDERED:
            items += rng.choices(items, k=2) if items and name not in NAMED else []
            rng.shuffle(items)
        return items
    return value


@settings(deadline=None)  # documents are large, and machines busy
@given(DOCUMENTS, st.randoms(use_true_random=False))
def test_order_and_repetition_make_no_difference(document: Document, rng: random.Random) -> None:
    assert policy_hash(parse(written(document))) == policy_hash(parse(written(_shuffled(document, rng))))
