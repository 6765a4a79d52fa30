"""`corral apply` and `corral undo`: what a run has changed becomes real, once a person has seen it; and back."""

from __future__ import annotations

import json
import os
import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

from corral.actions import Opinion, Verdict
from corral.cli.diff import MARKS, detail, layer_of, write_patch
from corral.cli.foreground import complain, printable
from corral.errors import RequestError
from corral.monitor.parts import Answer
from corral.sandbox.apply import journal as journals
from corral.sandbox.apply.proposal import Entry, Proposal
from corral.sandbox.apply.proposing import propose
from corral.sandbox.apply.recording import Consent, whoever
from corral.sandbox.apply.recovery import recover
from corral.sandbox.apply.undo import forget as give_up
from corral.sandbox.apply.undo import undo as take_back
from corral.sandbox.layer import KeptLayer, is_id, list_layers

CONFLICT = 1
"""The exit code where somebody else has changed what would be changed."""


def apply(
    name: str | None,
    paths: Sequence[str],
    *,
    step: int | None = None,
    dry_run: bool,
    yes: bool,
    consent: str | None,
    as_patch: bool,
    branch: str | None,
    policy: str | None,
    log: str | None,
    as_json: bool,
) -> int:
    """Shows what would be applied, asks, and applies it. Returns the exit code.

    ``name`` is a layer, or the first of the paths. With ``step`` it is the snapshot after that step of the session that
    the layer is of."""
    if name is not None and not is_id(name):
        paths, name = (name, *paths), None
    layer = layer_of(name) if step is None else _after_step(layer_of(name), step)
    more = None
    if policy is not None:
        from corral.policy.load import load_policy  # loads pydantic

        more = load_policy(policy)
    proposal = propose(layer, [os.path.abspath(path) for path in paths], policy=more)
    if as_patch:
        write_patch(layer.patch(lambda path: proposal.holds(path), tree=proposal.tree.name))
        return 0
    if as_json and dry_run:
        print(json.dumps(_to_json(proposal)))
        return CONFLICT if proposal.conflicts else 0
    if not as_json:
        _show(proposal)
        _show_others(proposal)
    if proposal.conflicts:
        for conflict in proposal.conflicts:
            complain(f"conflict: {conflict}")
        complain("nothing was applied; name the paths to apply, or use `corral diff --patch` and merge by hand")
        return CONFLICT
    if not proposal.steps:
        complain("there is nothing to apply")
        return 0
    if dry_run:
        print(f"{proposal.hash}: pass this as --consent to apply exactly this")
        return 0
    where = f"a new branch {branch} of {proposal.workspace}" if branch is not None else proposal.workspace
    answer = consent if consent is not None else _asking(proposal, where, yes=yes, may_ask=not as_json)
    if branch is not None:
        from corral.sandbox.apply.branch import Branch

        commit = Branch(proposal, branch).commit(answer, log=_log(log))
        row = {"branch": branch, "commit": commit, "layer": layer.id, "changes": len(proposal.entries)}
        print(json.dumps(row) if as_json else printable(f"committed to {branch}: {commit}; no file was changed"))
        return 0
    journal = proposal.apply(answer, log=_log(log), progress=_progress_bar())
    if as_json:
        print(json.dumps({"applied": journal.id, "layer": layer.id, "changes": len(proposal.entries)}))
    else:
        print(f"applied; `corral undo {journal.id}` takes it back, `corral discard {layer.id}` drops the layer")
    return 0


def _after_step(layer: KeptLayer, step: int) -> KeptLayer:
    for other in list_layers():
        if other.step == step and other.session == layer.session:
            return other
    session = layer.session or layer.id
    raise RequestError(
        f"no snapshot of step {step} of {session} is kept; `corral snapshot --list {session}` shows those that are; "
        "`filesystem.snapshot: step` in the policy of a run keeps them"
    )


def _log(name: str | None) -> Path | None:
    """The log that was named. Raises RequestError where it is none."""
    if name is None:
        return None
    from corral.cli.log import directory_of

    return directory_of(name)


def _asking(proposal: Proposal, where: str, *, yes: bool, may_ask: bool) -> Consent:
    """Asks whoever is at the terminal, who has seen it."""
    risky = len(proposal.risky)
    what = f"{len(proposal.entries)} change{'s' if len(proposal.entries) != 1 else ''}"
    questions = [] if yes else [f"Apply {what} to {where}? [y/N] "]
    if risky:
        questions.append(f"{risky} of them can make others execute things, or mislead (marked !). Apply? [y/N] ")

    def consent(opinion: Opinion) -> Answer:
        if not questions:
            return Answer(Verdict.ALLOW, whoever(), "with --yes")
        if not (may_ask and sys.stdin.isatty() and sys.stderr.isatty()):
            why = f"{risky} of these changes must be looked at (marked !)" if risky else "nobody can be asked here"
            why += ": look at `corral apply --dry-run`, and pass --consent with the hash that it prints"
            return Answer(Verdict.DENY, "nobody", why)
        if not all(map(_ask, questions)):
            return Answer(Verdict.DENY, whoever(), "not applied: the answer was no")
        return Answer(Verdict.ALLOW, whoever(), "at the terminal")

    return consent


def _ask(question: str) -> bool:
    sys.stderr.write(printable(question))
    sys.stderr.flush()
    return sys.stdin.readline().strip().lower() in ("y", "yes")


def _show(proposal: Proposal) -> None:
    from rich.console import Console
    from rich.text import Text

    console = Console(soft_wrap=True)
    for entry in proposal.entries:
        change = entry.change
        mark, colour = MARKS[change.kind]
        kind = "" if change.file_type.value == "file" else f" ({change.file_type.value})"
        shown = entry.path if entry.link is None else f"{entry.path} -> {entry.link}"
        line = Text(f"{mark} ", colour) + Text(printable(shown))
        console.print(line + Text(f"{kind}  {detail(change)}".rstrip(), "dim"))
        for reason in entry.reasons:
            console.print(Text(f"  ! {printable(reason)}", "bold red"))
    for left in proposal.left_out:
        console.print(Text(f"  left out: {printable(left)}", "dim"))


def _show_others(proposal: Proposal) -> None:
    """Says where else the layer has changes that can be applied."""
    for tree, count in proposal.others:
        complain(f"{count} more in {tree}, which is applied by itself: `corral apply {proposal.layer.id} {tree}`")


def _to_json(proposal: Proposal) -> dict[str, object]:
    return {
        "layer": proposal.layer.id,
        "workspace": proposal.workspace,
        "others": dict(proposal.others),
        "consent": proposal.hash,
        "changes": [_row(entry) for entry in proposal.entries],
        "conflicts": list(proposal.conflicts),
        "left_out": list(proposal.left_out),
    }


def _row(entry: Entry) -> dict[str, object]:
    change = entry.change
    return {
        "path": entry.path,
        "kind": change.kind.value,
        "type": change.file_type.value,
        "link": entry.link,
        "reasons": list(entry.reasons),
        "below": change.entries,
    }


def _progress_bar() -> Callable[[int, int], None]:
    if not sys.stderr.isatty():
        return lambda done, total: None
    from rich.console import Console
    from rich.progress import Progress

    bar = Progress(console=Console(stderr=True), transient=True)
    task = bar.add_task("applying", total=None)

    def show(done: int, total: int) -> None:
        if not bar.live.is_started:
            bar.start()
        bar.update(task, completed=done, total=total)
        if done == total:
            bar.stop()

    return show


def undo(identifier: str | None, *, list_all: bool, forget: bool, log: str | None, as_json: bool) -> None:
    """Takes back what was applied last, or under an id; or lists what there is; or forgets it."""
    done = [journal for journal in journals.journals() if not journal.undoes]
    if list_all:
        rows = [
            {"id": each.id, "layer": each.layer, "created": each.created, "workspace": each.workspace} for each in done
        ]
        if as_json:
            print(json.dumps(rows))
        for each in () if as_json else done:
            print(printable(f"{each.id}  {each.created}  layer {each.layer}  {each.workspace}"))
        return
    recover()
    if identifier is None:
        done = [journal for journal in journals.journals() if not journal.undoes]
        if not done:
            raise RequestError("nothing is applied that could be taken back")
        identifier = done[-1].id
    with _told(as_json, identifier, "forgotten" if forget else "taken back"):
        if forget:
            if problem := give_up(identifier):
                complain(f"{identifier}: that it is forgotten could not be recorded: {problem}")
        else:
            take_back(identifier, log=_log(log), progress=_progress_bar())


@contextmanager
def _told(as_json: bool, identifier: str, what: str) -> Iterator[None]:
    yield
    print(json.dumps({"id": identifier, "done": what}) if as_json else f"{what}: {identifier}")
