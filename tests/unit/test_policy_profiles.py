"""Profiles, and what a policy file inherits."""

from __future__ import annotations

import dataclasses
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from corral.actions import Content, Verdict
from corral.errors import PolicyError
from corral.policy.load import MAX_ANCESTORS, load_policy, parse_policy
from corral.policy.model import ExecRule, Filesystem, NetworkRule, Policy
from corral.policy.profiles import DEFAULT_PROFILE, PROFILES
from tests.unit.policy_documents import DOCUMENTS, Document, document_of, written

TIGHTENING = ("deny", "ask", "watch", "rules")


def parse(text: str) -> Policy:
    return parse_policy(text, source="/cfg/p.yaml")


def problems(path: Path) -> list[str]:
    with pytest.raises(PolicyError) as caught:
        load_policy(path)
    return list(caught.value.problems)


def tightening(policy: Policy) -> dict[str, frozenset[object]]:
    """All lists that only tighten, by section and name."""
    return {
        f"{section.name}.{name}": frozenset(getattr(getattr(policy, section.name), name))
        for section in dataclasses.fields(policy)
        for name in TIGHTENING
        if hasattr(getattr(policy, section.name), name)
    }


# --- The built-in ones ----------------------------------------------------------------------------------------------


def test_the_default_values_are_the_default_profile() -> None:
    assert PROFILES[DEFAULT_PROFILE] == Policy() == parse("profile: coding-agent") == parse("")
    assert list(PROFILES) == ["coding-agent", "rl-rollout", "locked"]


@pytest.mark.parametrize("name", PROFILES)
def test_a_profile_by_its_name(name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    Path(name).write_text("process: {allow: []}")  # left there by somebody: a bare name is never a file
    assert load_policy(name) is PROFILES[name]
    assert load_policy(f"./{name}").process.allow == ()
    assert parse(f"profile: {name}") == PROFILES[name]


def test_a_name_that_is_no_profile_is_told_with_those_that_are(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    assert "the built-in profiles are coding-agent, rl-rollout, locked" in problems(Path("lockd"))[0]


@pytest.mark.parametrize("name", PROFILES)
def test_no_profile_reaches_anything_or_weakens_a_wall(name: str) -> None:
    policy = PROFILES[name]
    assert not (policy.network.allow or policy.network.ask or policy.model.allow or policy.data.allow)
    assert not (policy.filesystem.read or policy.filesystem.write)
    assert not policy.allow_degraded
    assert policy.autonomy.level == 0


@pytest.mark.parametrize("tight", ["rl-rollout", "locked"])
def test_the_tight_profiles_are_within_the_default(tight: str) -> None:
    policy, default = PROFILES[tight], Policy()
    assert policy.network.loopback >= default.network.loopback
    assert policy.network.listen >= default.network.listen
    assert set(policy.environment.allow) <= set(default.environment.allow)
    for field in dataclasses.fields(policy.resources):
        bound, usual = getattr(policy.resources, field.name), getattr(default.resources, field.name)
        assert bound is not None
        assert usual is None or bound < usual


def test_locked_is_closed_to_itself_too() -> None:
    locked = PROFILES["locked"].network
    assert (locked.loopback, locked.listen) == (Verdict.DENY, Verdict.DENY)


def test_profiles_need_neither_pydantic_nor_yaml() -> None:
    code = "import sys, corral.policy.profiles; sys.exit(any(name in sys.modules for name in ('pydantic', 'yaml')))"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0


# --- Inheritance ----------------------------------------------------------------------------------------------------


def test_a_field_replaces_and_the_rest_stays() -> None:
    policy = parse("profile: locked\nresources: {memory: 1GiB}\nnetwork: {listen: allow}\nenvironment: {allow: []}\n")
    locked = PROFILES["locked"]
    assert policy == dataclasses.replace(
        locked,
        resources=dataclasses.replace(locked.resources, memory=1 << 30),
        network=dataclasses.replace(locked.network, listen=Verdict.ALLOW),
        environment=dataclasses.replace(locked.environment, allow=()),
    )


def test_from_another_file(tmp_path: Path) -> None:
    team, mine = tmp_path / "team" / "base.yaml", tmp_path / "mine.yaml"
    team.parent.mkdir()
    team.write_text(
        "profile: rl-rollout\n"
        "filesystem: {read: [data], deny: [secret], ask: [./a/*], watch: [w]}\n"
        "network: {allow: [a.example], ask: [b.example], deny: [c.example], listen: ask}\n"
        "process: {allow: [git], deny: [ssh]}\n"
        "syscalls: {deny: [sync]}\n"
        "detection: {rules: [rules.yaml]}\n"
        "log: {keep: {file: 30d}, files: [./a/*, ./b]}\n"
        "allow_degraded: [landlock]\n"
    )
    mine.write_text(
        "profile: ./team/base.yaml\n"
        "filesystem: {read: [data], deny: [other, ./team/secret], ask: [], watch: [v]}\n"
        "network: {allow: [d.example], ask: [e.example], deny: [f.example, c.example]}\n"
        "process: {deny: []}\n"
        "detection: {rules: [more.yaml]}\n"
        "log: {files: [./c]}\n"
    )
    policy, here = load_policy(mine), str(tmp_path)
    assert policy.filesystem == Filesystem(
        read=(f"{here}/data",),
        deny=(f"{here}/team/secret", f"{here}/other"),
        ask=(f"{here}/team/a/*",),
        watch=(f"{here}/team/w", f"{here}/v"),
        rename_directories=False,  # as the profile that the team's file starts from
    )
    assert policy.network.allow == (NetworkRule("d.example"),)
    assert policy.network.ask == (NetworkRule("b.example"), NetworkRule("e.example"))
    assert policy.network.deny == (NetworkRule("c.example"), NetworkRule("f.example"))
    assert policy.network.listen is Verdict.ASK
    assert policy.process.allow == (ExecRule("/**/git"),)
    assert policy.process.deny == (ExecRule("/**/ssh"),)
    assert policy.syscalls.deny == ("sync",)
    assert policy.detection.rules == (f"{here}/team/rules.yaml", f"{here}/more.yaml")
    # What is kept is no denial: who says it says all of it.
    assert (policy.log.keep, policy.log.files) == (((Content.FILE, 30 * 86400),), (f"{here}/c",))
    assert policy.resources == PROFILES["rl-rollout"].resources
    assert policy.allow_degraded == frozenset()


def test_faults_of_the_file_that_is_started_from_are_told_with_its_name(tmp_path: Path) -> None:
    base, mine = tmp_path / "base.yaml", tmp_path / "mine.yaml"
    base.write_text("version: 1\nresources: {cpu: 0}\n")
    mine.write_text("profile: ./base.yaml\n")
    assert problems(mine) == [f"{base}:2: resources.cpu: must be at least 0.01"]
    base.unlink()
    assert problems(mine) == [f"{base}: cannot read the policy file: No such file or directory"]


def test_a_circle_is_refused(tmp_path: Path) -> None:
    one, two = tmp_path / "one.yaml", tmp_path / "two.yaml"
    one.write_text("version: 1\nprofile: ./two.yaml\n")
    two.write_text("profile: ./link.yaml\n")
    (tmp_path / "link.yaml").symlink_to(one)
    (problem,) = problems(one)
    assert problem.startswith(f"{two}:1: profile: leads back to this file")
    one.write_text("profile: ./one.yaml")
    assert "leads back" in problems(one)[0]


def test_a_long_row_is_refused(tmp_path: Path) -> None:
    for number in range(MAX_ANCESTORS + 2):
        (tmp_path / f"{number}.yaml").write_text(f"profile: ./{number + 1}.yaml\n")
    assert "more than 8 files in a row" in problems(tmp_path / "0.yaml")[0]
    (tmp_path / f"{MAX_ANCESTORS}.yaml").write_text("profile: locked\n")
    assert load_policy(tmp_path / "0.yaml") == PROFILES["locked"]


@settings(deadline=None)  # documents are large, and machines busy
@given(DOCUMENTS)
def test_a_policy_that_is_written_out_reads_back_the_same(document: Document) -> None:
    policy = parse(written(document))
    assert parse(written(document_of(policy))) == policy


@settings(deadline=None)  # documents are large, and machines busy
@given(DOCUMENTS, DOCUMENTS)
def test_inheriting_never_loses_what_tightens(
    tmp_path_factory: pytest.TempPathFactory, base: Document, given_: Document
) -> None:
    path = tmp_path_factory.getbasetemp() / "inherited.yaml"
    path.write_text(written(base))
    inherited = load_policy(path)
    own = parse(written({**given_, "profile": "coding-agent"}))
    merged = parse(written({**given_, "profile": str(path)}))
    before, added, after = tightening(inherited), tightening(own), tightening(merged)
    assert after == {name: before[name] | added[name] for name in before}
    assert merged.allow_degraded == own.allow_degraded


@settings(deadline=None)  # documents are large, and machines busy
@given(DOCUMENTS, DOCUMENTS, st.data())
def test_adding_a_denial_never_removes_one(document: Document, other: Document, data: st.DataObject) -> None:
    before = tightening(parse(written(document)))
    lists = [(s, n) for s in other for n in TIGHTENING if isinstance(other[s], dict) and other[s].get(n)]
    if not lists:
        return
    section, name = data.draw(st.sampled_from(lists))
    more: dict[str, Any] = {**document, section: dict(document.get(section, {}))}
    more[section][name] = [*more[section].get(name, ()), *other[section][name]]
    after = tightening(parse(written(more)))
    assert all(before[key] <= after[key] for key in before)
    assert after[f"{section}.{name}"] >= before[f"{section}.{name}"]
