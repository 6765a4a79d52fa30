"""An apply is an action: it is decided, on the terms of its run, and recorded before anything is done (I1, I3, I6)."""

from __future__ import annotations

import dataclasses
import os
import random
import shutil
import threading
from collections.abc import Callable
from pathlib import Path

import pytest

from corral.actions import Decision, Kind, Verdict
from corral.errors import CorralError, RequestError
from corral.log import writer
from corral.log.events import ApplyEnded, Outcome
from corral.log.note import KeyFile, KeyType, cosign
from corral.log.places import open_log
from corral.log.reader import Reader
from corral.log.signing import read_checkpoint, read_keys
from corral.policy.canonical import policy_hash
from corral.policy.model import Agent, Apply, Filesystem, Policy
from corral.sandbox.apply import applying, journal, recording, recovery, swapping
from corral.sandbox.apply.proposing import propose
from corral.sandbox.apply.recovery import recover
from corral.sandbox.apply.swapping import Conflict
from corral.sandbox.apply.undo import forget, undo
from corral.sandbox.layer import KeptLayer
from tests.contain.applies import CHANGES, applied, fill, killed_at, look
from tests.contain.applies import run as run_in
from tests.contain.logs import Disk, events, records, verified

pytestmark = pytest.mark.usefixtures("state")
POLICY = Policy(Agent("fixer", "7"), apply=Apply(ask=("/**/Makefile", "/deploy")))
WITNESS = KeyFile("witness.example/one", KeyType.COSIGNATURE, b"w" * 32)


@pytest.fixture
def workspace(tmp_path: Path) -> Path:
    return fill(tmp_path / "workspace")


@pytest.fixture
def place(tmp_path: Path) -> Path:
    return tmp_path / "records" / "log"


def run(workspace: Path, place: Path, script: str = CHANGES, policy: Policy = POLICY) -> KeptLayer:
    """What a recorded command has changed."""
    with open_log(place) as log:
        return run_in(workspace, script, log=log, policy=policy)


def decisions(place: Path) -> list[Decision]:
    kinds = (Kind.SANDBOX_APPLY, Kind.SANDBOX_UNDO)
    return [each for each in events(place, Decision) if each.action.kind in kinds]


def outcomes(place: Path) -> list[tuple[Outcome, str]]:
    return [(each.outcome, each.apply) for each in events(place, ApplyEnded)]


def cosigned(place: Path, key: KeyFile = WITNESS) -> None:
    """What `corral log cosign` does, with a witness of ours."""
    with open_log(place) as log:
        checkpoint = log.seal()
        found = read_checkpoint(place, read_keys(place))
        assert found is not None
        log.cosign(checkpoint.size, (cosign(found[1].text, key),))


def test_what_is_decided_and_what_comes_of_it_stands_in_the_log_of_the_run(workspace: Path, place: Path) -> None:
    layer = run(workspace, place)
    proposal = propose(layer)
    made = applied(proposal)
    undo(made.id)
    first, second = decisions(place)
    verb = first.action.subject
    assert (first.action.kind, first.verdict, first.decider) == (Kind.SANDBOX_APPLY, Verdict.ALLOW, "approvals")
    assert f"(uid {os.geteuid()}, pid {os.getpid()})" in first.answered_by
    assert dataclasses.astuple(verb) == (tuple(each.path for each in proposal.entries), layer.id, proposal.hash, "")
    assert (second.action.kind, second.verdict) == (Kind.SANDBOX_UNDO, Verdict.ALLOW)
    assert second.action.subject.source == made.id  # type: ignore[union-attr]
    undone = journal.digest_of(str(workspace), [step.__class__(step.path, step.after, step.before, step.is_own)
                                                for step in reversed(made.steps)])  # fmt: skip
    assert second.action.subject.digest == undone  # type: ignore[union-attr]
    assert [outcome for outcome, _ in outcomes(place)] == [Outcome.APPLIED, Outcome.UNDONE]
    assert outcomes(place)[0][1] == made.id
    # I10: all of them name the agent, its policy and its sandbox; and the session that it is about.
    for record in records(place):
        context = record.context
        assert (context.agent, context.agent_version, context.sandbox) == ("fixer", "7", layer.id)
        assert context.policy_hash == policy_hash(POLICY)
    assert first.action.origin.session == layer.id
    verified(place)


def test_i3_nothing_is_applied_that_is_not_recorded(
    workspace: Path, place: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    layer = run(workspace, place)
    before = look(workspace)
    # At the moment that the first file changes places, the decision is durable.
    real = swapping.exchange
    seen: list[list[Verdict]] = []

    def exchange(*words: object) -> None:
        if not seen:
            seen.append([each.verdict for each in decisions(place)])
        real(*words)  # type: ignore[arg-type]

    monkeypatch.setattr(applying, "exchange", exchange)
    undo(applied(propose(layer)).id)
    assert seen == [[Verdict.ALLOW]]
    # And what cannot be recorded is not done.
    monkeypatch.setattr(writer, "spare_bytes", lambda fd: 0)
    with pytest.raises(CorralError, match=r"not applied: .* make room"):
        applied(propose(layer))
    assert look(workspace) == before
    assert not journal.ids()


def test_a_log_that_is_gone_is_not_begun_anew(workspace: Path, place: Path, tmp_path: Path) -> None:
    layer = run(workspace, place)
    before, moved = look(workspace), tmp_path / "moved"
    shutil.move(place.parent, moved)
    with pytest.raises(CorralError, match="name where it is now with --log"):
        applied(propose(layer))
    open_log(place).close()  # another one, in its place
    with pytest.raises(CorralError, match="name where it is now with --log"):
        applied(propose(layer))
    assert look(workspace) == before
    proposal = propose(layer)
    made = proposal.apply(proposal.hash, log=moved / "log")
    assert outcomes(moved / "log") == [(Outcome.APPLIED, made.id)]
    undo(made.id)  # it is remembered
    assert len(outcomes(moved / "log")) == 2 and records(place) == []


def test_a_run_without_a_log_can_be_recorded_from_here_on(workspace: Path, place: Path) -> None:
    layer = run_in(workspace, CHANGES)
    with open_log(place) as log:
        made = propose(layer).apply(propose(layer).hash, log=log)
    assert outcomes(place) == [(Outcome.APPLIED, made.id)]
    verified(place)


def test_what_is_refused_is_recorded_too(workspace: Path, place: Path) -> None:
    layer = run(workspace, place)
    before = look(workspace)
    with pytest.raises(RequestError, match="for another proposal"):
        propose(layer).apply("sha256:0")
    (decision,) = decisions(place)
    assert decision.verdict is Verdict.DENY
    assert outcomes(place) == []
    # What fails, or is in the way, is an outcome.
    proposal = propose(layer)
    (workspace / "file.txt").write_text("mine")
    with pytest.raises(Conflict):
        applied(proposal)
    (ended,) = events(place, ApplyEnded)
    assert ended.outcome is Outcome.ROLLED_BACK and "file.txt: it was changed" in ended.error
    (workspace / "file.txt").write_text("original\n")
    assert look(workspace) == before
    verified(place)


@pytest.mark.parametrize(
    ("when", "outcome"),
    [("swapping", Outcome.ROLLED_BACK), ("done", Outcome.APPLIED), ("tell", Outcome.APPLIED)],
)
def test_a_crash_is_told_by_the_next_start(
    workspace: Path, place: Path, monkeypatch: pytest.MonkeyPatch, when: str, outcome: Outcome
) -> None:
    layer, before = run(workspace, place), look(workspace)
    child = os.fork()
    if child == 0:
        real = journal.write

        def write(each: journal.Journal) -> None:
            if when == "swapping" and each.phase is journal.Phase.DONE:
                os._exit(9)
            real(each)
            if when == "done" and each.phase is journal.Phase.DONE:
                os._exit(9)

        def tidy_up(*words: object) -> None:
            if when == "tell":
                os._exit(9)
            recovery.tidy_up(*words)  # type: ignore[arg-type]

        monkeypatch.setattr(journal, "write", write)
        monkeypatch.setattr(applying, "tidy_up", tidy_up)
        try:
            applied(propose(layer))
        finally:
            os._exit(0)
    assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 9
    recover()
    assert outcomes(place)[-1][0] is outcome
    assert (look(workspace) == before) is (outcome is Outcome.ROLLED_BACK)
    assert journal.unfinished() == []
    verified(place)


def test_wherever_it_is_killed_the_log_says_what_is(workspace: Path, place: Path) -> None:
    layer, before = run(workspace, place, "echo more >>file.txt; rm -r empty; echo x >new"), look(workspace)
    proposal, draw = propose(layer), random.Random(20261127)
    number = 1
    seen: set[Outcome] = set()
    while not killed_at(number, lambda: applied(proposal)):
        told = len(outcomes(place))
        recover()
        is_changed = look(workspace) != before
        said = outcomes(place)[told - 1 if is_changed else told :]
        if is_changed:
            (made,) = journal.journals()
            assert said[-1] == (Outcome.APPLIED, made.id), number
            assert decisions(place)[-1].verdict is Verdict.ALLOW
            undo(made.id)
        assert is_changed or all(outcome is Outcome.ROLLED_BACK for outcome, _ in said), number
        assert verified(place)
        seen.update(outcome for outcome, _ in said)
        number += draw.randrange(1, 45)
    assert seen == {Outcome.APPLIED, Outcome.ROLLED_BACK}


def test_its_traces_stay_until_what_came_of_it_is_durable(
    workspace: Path, place: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    layer, disk = run(workspace, place), Disk(monkeypatch)
    real, seen = recording.Chronicle.ended, list[list[str]]()

    def go_on() -> None:
        seen.append(journal.unfinished())
        disk.works.set()

    def ended(*words: object) -> None:
        disk.works.clear()
        threading.Timer(0.3, go_on).start()
        real(*words)  # type: ignore[arg-type]

    monkeypatch.setattr(recording.Chronicle, "ended", ended)
    made = applied(propose(layer))
    assert seen == [[made.id]]
    assert outcomes(place) == [(Outcome.APPLIED, made.id)]


def test_what_cannot_be_taken_back_is_told_when_a_person_has_seen_to_it(
    workspace: Path, place: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    layer = run(workspace, place, "echo more >>file.txt")
    child = os.fork()
    if child == 0:
        monkeypatch.setattr(applying, "tidy_up", lambda *words: None)
        real = journal.write
        monkeypatch.setattr(journal, "write", lambda each: os._exit(9) if each.phase.value == "done" else real(each))
        try:
            applied(propose(layer))
        finally:
            os._exit(0)
    os.waitpid(child, 0)
    (workspace / "file.txt").write_text("mine")
    recover()
    assert outcomes(place) == []
    (identifier,) = journal.ids()
    assert forget(identifier) == ""
    assert outcomes(place) == [(Outcome.FORGOTTEN, identifier)]
    assert (workspace / "file.txt").read_text() == "mine"


@pytest.mark.parametrize("works", [True, False])
def test_what_came_of_it_and_cannot_be_recorded_stops_what_comes_next(
    workspace: Path, place: Path, monkeypatch: pytest.MonkeyPatch, works: bool
) -> None:
    layer, before = run(workspace, place), look(workspace)

    def unwritable(*words: object) -> None:
        raise writer.LogUnwritable("make room there")

    with monkeypatch.context() as patches:
        patches.setattr(recording.Chronicle, "ended", unwritable)
        if not works:
            patches.setattr(applying, "exchange", unwritable)
        with pytest.raises(CorralError, match=r"recorded.*make room there"):
            applied(propose(layer))
        (identifier,) = journal.unfinished()
        recover()  # tries again, in vain
        (workspace / "other").touch()
        again = propose(layer)
        with pytest.raises(CorralError, match=f"corral undo --forget {identifier}"):
            applied(again)
        (workspace / "other").unlink()
        assert journal.unfinished() == [identifier]
        if not works:
            assert forget(identifier) == "make room there"
    recover()
    assert outcomes(place) == ([(Outcome.APPLIED, identifier)] if works else [])
    if works:
        undo(identifier)
    assert look(workspace) == before  # with nothing beside it
    assert journal.ids() == journal.unfinished() == []


# ---- what policy wants to be asked ----


def reasons(layer: KeptLayer, policy: Policy | None = None) -> dict[str, tuple[str, ...]]:
    return {entry.path: entry.reasons for entry in propose(layer, policy=policy).risky}


def test_what_the_policy_of_the_run_names_must_be_looked_at(workspace: Path) -> None:
    (workspace / "old" / "sub").mkdir(parents=True)
    (workspace / "old" / "sub" / "Makefile").touch()
    script = """
        mkdir -p src deploy/a tree/deploy; touch src/makefile deploy/a/script tree/deploy/x Makefile.am x.mk; rm -r old
    """
    layer = run_in(workspace, script, policy=POLICY)
    found = reasons(layer)
    assert sorted(found) == ["deploy", "deploy/a", "deploy/a/script", "old", "src/makefile"]
    assert found["src/makefile"] == ("the policy asks for it (Makefile)",)
    assert found["old"] == ("old/sub/Makefile is in it: the policy asks for it (Makefile)",)
    # One that is named here can only add to that.
    more = Policy(apply=Apply(ask=("/**/*.mk",)))
    assert sorted(reasons(layer, more)) == sorted([*found, "x.mk"])
    # So can the policy of a run that goes on; what that one leaves out still counts.
    again = run_in(workspace, "touch second.mk", on=layer, policy=more)
    assert sorted(reasons(again)) == sorted([*found, "second.mk", "x.mk"])


def test_an_agent_cannot_change_the_terms(workspace: Path, state: Path) -> None:
    """They lie where no sandbox sees them, and in no tree that is kept."""
    script = f"""
        ls {state} 2>/dev/null && exit 1
        mkdir -p {state}/corral/layers/x || true; echo '[]' >terms; touch Makefile
    """
    layer = run_in(workspace, script, policy=POLICY)
    assert sorted(reasons(layer)) == ["Makefile"]
    (state / "corral" / "layers" / layer.id / "terms").unlink()
    with pytest.raises(CorralError, match="what its policy demands is not known"):
        propose(layer)


# ---- cosignatures ----


def test_cosignatures_come_first(workspace: Path, place: Path) -> None:
    other = KeyFile("witness.example/two", KeyType.COSIGNATURE, b"v" * 32)
    demand = Apply(witnesses=(str(WITNESS.verifier), str(other.verifier)), cosignatures=2)
    layer = run(workspace, place, policy=dataclasses.replace(POLICY, apply=demand))
    before = look(workspace)

    def refused() -> None:
        with pytest.raises(RequestError, match=r"of the witnesses have cosigned .* run `corral log cosign"):
            applied(propose(layer))
        assert look(workspace) == before
        assert (decisions(place)[-1].verdict, decisions(place)[-1].rule) == (Verdict.DENY, "apply.cosignatures")

    refused()
    cosigned(place)  # by one of two
    refused()
    cosigned(place)
    cosigned(place, other)
    made = applied(propose(layer))
    undo(made.id)  # needs none
    # What was recorded since is not cosigned: that was for another state of the log.
    refused()
    cosigned(place)
    cosigned(place, KeyFile("witness.example/two", KeyType.COSIGNATURE, b"u" * 32))  # somebody else of that name
    refused()
    # Nor is what is in the log and not under a checkpoint yet.
    cosigned(place)
    cosigned(place, other)
    with open_log(place) as log:
        log.append(next(entry for _, entry in Reader(place).entries()))
        proposal = propose(layer)
        with pytest.raises(RequestError, match="0 of the witnesses"):
            proposal.apply(proposal.hash, log=log)
    assert look(workspace) == before


def test_cosignatures_of_no_log_are_not_to_be_had(workspace: Path, place: Path) -> None:
    demand = Policy(apply=Apply(witnesses=(str(WITNESS.verifier),), cosignatures=1))
    with open_log(place) as log:
        proposal = propose(run_in(workspace, CHANGES, policy=demand))
        with pytest.raises(RequestError, match="run it with --log"):
            proposal.apply(proposal.hash, log=log)
    # Named at apply, it counts for the log of the run.
    layer = run(workspace, place)
    proposal = propose(layer, policy=demand)
    with pytest.raises(RequestError, match="0 of the witnesses"):
        applied(proposal)
    cosigned(place)
    applied(proposal)


# ---- other trees ----


def test_another_tree_that_policy_lets_be_written_is_applied_by_itself(workspace: Path, tmp_path: Path) -> None:
    other = fill(tmp_path / "other")
    policy = dataclasses.replace(POLICY, filesystem=Filesystem(write=(str(other),)))
    layer = run_in(workspace, f"echo x >new; cd {other}; {CHANGES} touch Makefile", policy=policy)
    before = look(workspace), look(other)
    proposal = propose(layer)
    assert [entry.path for entry in proposal.entries] == ["new"]
    assert proposal.others == ((str(other), 11),)
    (workspace / "sub").mkdir()
    for paths in ([str(other), "new"], [str(tmp_path)], [f"{other}/tree/one"], ["sub"]):
        with pytest.raises(RequestError):
            propose(layer, paths)
    (workspace / "sub").rmdir()
    proposal = propose(layer, [str(other)])
    assert (proposal.workspace, proposal.conflicts) == (str(other), ())
    assert [entry.path for entry in proposal.risky] == ["Makefile"]
    made = applied(proposal)
    after = look(other)
    assert after["file.txt"][4] == b"original\nmore\n" and "empty" not in after and after["tree"][1] == 0o700
    assert (look(workspace), not (workspace / "new").exists()) == (before[0], True)
    assert propose(layer, [str(other)]).steps == ()
    undo(made.id)
    assert (look(workspace), look(other)) == before
    # What somebody has changed there since is a conflict, as in the workspace; and of one path alone, not.
    (other / "file.txt").write_text("mine")
    assert propose(layer, [str(other)]).conflicts == ("file.txt: it was changed in the workspace since the run began",)
    applied(propose(layer, [f"{other}/new/deep"]))
    assert (other / "new" / "deep" / "file").read_text() == "n\n" and (other / "file.txt").read_text() == "mine"


def test_a_tree_is_known_again_on_a_layer(workspace: Path, tmp_path: Path) -> None:
    other, more = fill(tmp_path / "other"), fill(tmp_path / "another")
    policy = Policy(filesystem=Filesystem(write=(str(other),)))
    first = run_in(workspace, f"cd {other}; echo more >>file.txt", policy=policy)
    # Its part has another name in the second run.
    both = Policy(filesystem=Filesystem(write=(str(more), str(other))))
    second = run_in(workspace, f"cd {other}; echo more >>file.txt; touch {more}/new", on=first, policy=both)
    applied(propose(second, [str(other)]))
    assert (other / "file.txt").read_text() == "original\nmore\nmore\n"
    applied(propose(second, [str(more)]))
    assert (more / "new").exists()


def test_a_hold_of_policy_is_no_way_around(workspace: Path, place: Path) -> None:
    """I6: a person's answer lowers ask to allow, and nothing else."""
    layer = run(workspace, place)
    asked: list[str] = []
    proposal = propose(layer)
    answer: Callable[..., object]

    def nobody(opinion: object) -> object:
        asked.append(str(opinion))
        raise OSError("the terminal is gone")

    answer = nobody
    with pytest.raises(RequestError, match="could not be asked"):
        proposal.apply(answer)  # type: ignore[arg-type]
    assert len(asked) == 1 and decisions(place)[-1].verdict is Verdict.DENY
    assert not journal.ids()


def test_a_layer_on_a_layer_is_told_to_the_logs_of_both(workspace: Path, tmp_path: Path) -> None:
    places = [tmp_path / name / "log" for name in ("first", "second")]
    with open_log(places[0]) as one, open_log(places[1]) as two:
        first = run_in(workspace, "touch first", log=one, policy=POLICY)
        second = run_in(workspace, "touch second", log=two, on=first)
        third = run_in(workspace, "touch third", log=two, on=second)
    assert [terms.sandbox for terms in third.terms] == [first.id, third.id]
    made = applied(propose(third))
    undo(made.id)
    for place in places:
        assert [outcome for outcome, _ in outcomes(place)] == [Outcome.APPLIED, Outcome.UNDONE]
        assert {each.action.origin.session for each in decisions(place)} == {third.id}
        verified(place)
    assert records(places[0])[-1].context.agent == "fixer"
