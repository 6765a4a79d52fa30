"""The commands of `corral`, for typer. Each does one thing by asking the package; none decides anything."""

from __future__ import annotations

import dataclasses
import inspect
import json
import sys
import time
from collections.abc import Collection
from typing import Annotated, Any

import typer

from corral.cli.foreground import printable
from corral.cli.guard import Json, guarded
from corral.cli.log_app import log_commands, replay_command
from corral.cli.options import RUN_OPTIONS, Arguments
from corral.errors import CorralError, RequestError

EXAMPLES = """
Examples:

  corral run -- bash                         a shell in the current directory, contained
  corral run -w ~/project -- pytest          the project's own tests; your files stay as they are
  corral run --user root -- apt-get install -y ./tool.deb
  corral diff                                what the last run changed
  corral policy explain exec /usr/bin/ssh    what a policy says of it, by which rule, and why
  corral pending; corral approve ID          what is held until you answer; your answer
  corral run --log records -- ./agent        keep what happens where nobody changes it
  corral replay --log records                what happened, as it happened
  corral usage --by agent --since 7d         what models and data were used, and what that cost
  corral ps; corral exec ID -- ps aux        look into a sandbox that runs elsewhere
  corral doctor                              what this machine offers and what is missing
"""

RUN_EXAMPLES = """
Examples:

  corral run -- python3 untrusted.py
  corral run -w ~/project --memory 2GiB --wall-time 15m -- make test
  corral run --service 8080=127.0.0.1:3000 -- curl http://127.0.0.1:8080/
  corral run --env API_URL=http://127.0.0.1:8080 --discard -- ./agent
  corral run --policy policy.yaml --record run.jsonl -- ./agent
"""


def _paragraph(examples: str) -> str:
    """Examples for a help text, whose lines stay as they are."""
    return examples.replace("\n\n  ", "\n\n\b\n  ")


app = typer.Typer(
    no_args_is_help=True,
    add_completion=False,
    rich_markup_mode=None,
    pretty_exceptions_enable=False,
    help="Run AI agents, and anything else that is not to be trusted, inside walls that hold.\n\n"
    + _paragraph(EXAMPLES),
)


@app.callback(invoke_without_command=True)
def _main(version: Annotated[bool, typer.Option("--version", help="Print the version.")] = False) -> None:
    if version:
        from corral import __version__

        typer.echo(f"corral {__version__}")
        raise typer.Exit


def _arguments(given: dict[str, Any]) -> Arguments:
    """What typer has read, as `corral run` takes it."""
    command = given.pop("command")
    by_name = {name.replace("_", "-"): value for name, value in given.items()}
    many = {option.name for option in RUN_OPTIONS if option.many}
    flags = {option.name for option in RUN_OPTIONS if not option.metavar}
    return Arguments(
        {name: value for name, value in by_name.items() if name not in many | flags and value is not None},
        {name: tuple(value) for name, value in by_name.items() if name in many and value},
        frozenset(name for name, value in by_name.items() if name in flags and value),
        tuple(command),
    )


@guarded
def _run(**given: Any) -> None:
    from corral.cli.run import run

    sys.exit(run(_arguments(given)))


@guarded
def _fork(**given: Any) -> None:
    from corral.cli.snapshots import fork

    sandbox = given.pop("sandbox")
    sys.exit(fork(sandbox, _arguments(given)))


def _run_signature(*before: inspect.Parameter, but: Collection[str] = ()) -> inspect.Signature:
    """The table of :mod:`corral.cli.options` as the parameters that typer reads a command's options from."""
    parameters = []
    for option in RUN_OPTIONS:
        if option.name in but:
            continue
        words = [f"--{option.name}", *([f"-{option.short}"] if option.short else [])]
        if option.metavar:
            kind: Any = list[str] | None if option.many else str | None
            value = typer.Option(None, *words, metavar=option.metavar, help=option.help)
        else:
            kind, value = bool, typer.Option(False, *words, help=option.help)
        parameters.append((option.name.replace("-", "_"), kind, value))
    parameters.append(("command", list[str], typer.Argument(..., metavar="COMMAND")))
    how = inspect.Parameter.KEYWORD_ONLY
    return inspect.Signature(
        [
            *before,
            *(inspect.Parameter(name, how, default=value, annotation=kind) for name, kind, value in parameters),
        ]
    )


_run.__signature__ = _run_signature()  # type: ignore[attr-defined]
_fork.__signature__ = _run_signature(  # type: ignore[attr-defined]
    inspect.Parameter(
        "sandbox",
        inspect.Parameter.KEYWORD_ONLY,
        default=typer.Argument(..., metavar="ID", help="Id of a live sandbox, or its beginning."),
        annotation=str,
    ),
    but=("on", "workspace"),
)
app.command(
    "run",
    context_settings={"allow_interspersed_args": False},
    help="Run COMMAND in a new sandbox. Exit code: the command's; 125 for Corral's own errors, 126 when the walls "
    "cannot be built, 137 when it was killed.\n\n" + _paragraph(RUN_EXAMPLES),
    short_help="Run a command in a new sandbox.",
)(_run)
app.command(
    "fork",
    context_settings={"allow_interspersed_args": False},
    help="Run COMMAND in a new sandbox that begins with the files that a live one has now. It has processes, a network "
    "and a policy of its own: the built-in one, or that of --policy. Options and exit codes are those of `corral run`.",
    short_help="Run a command in a copy of a live sandbox.",
)(_fork)


def _print_json(value: object) -> None:
    typer.echo(json.dumps(value, default=str))


@app.command("exec", context_settings={"allow_interspersed_args": False})
@guarded
def _exec(
    sandbox: Annotated[str, typer.Argument(metavar="ID", help="Id of a live sandbox, or its beginning.")],
    command: Annotated[list[str], typer.Argument(metavar="COMMAND")],
    user: Annotated[str | None, typer.Option("--user", "-u", help="agent, root, or a number.")] = None,
    directory: Annotated[str | None, typer.Option("--directory", "-d", help="Where to start, inside.")] = None,
    env: Annotated[list[str] | None, typer.Option("--env", "-e", metavar="NAME=VALUE")] = None,
    terminal: Annotated[bool, typer.Option("--terminal", "-t", help="Give it a terminal.")] = False,
    no_terminal: Annotated[bool, typer.Option("--no-terminal", "-T", help="Give it pipes.")] = False,
) -> None:
    """Run a command in a sandbox that runs elsewhere."""
    from corral.cli.attach import attach

    wanted = True if terminal else False if no_terminal else None
    if command[0] == "--":  # options end at ID; writing it all the same is a habit
        del command[0]
    if not command:
        raise RequestError("no command was given")
    sys.exit(attach(sandbox, command, env=env or (), directory=directory, user=user, terminal=wanted))


@app.command("ps")
@guarded
def _ps(as_json: Json = False) -> None:
    """List the live sandboxes of this user."""
    from corral.sandbox.registry import list_sandboxes

    entries = list_sandboxes()
    if as_json:
        _print_json([dataclasses.asdict(entry) for entry in entries])
        return
    from rich.console import Console
    from rich.table import Table
    from rich.text import Text

    table = Table(box=None, pad_edge=False)
    for title in ("ID", "PID", "STATE", "AGE", "WORKSPACE", "COMMAND"):
        table.add_column(title, no_wrap=title != "COMMAND")
    for entry in entries:
        age = f"{time.time() - entry.started_at:.0f} s"
        cells = (entry.id, str(entry.pid), entry.state, age, entry.workspace, entry.label)
        table.add_row(*(Text(printable(cell)) for cell in cells))
    Console().print(table)


def _one_verb(sandboxes: list[str], verb: str) -> None:
    from corral.sandbox.registry import find_sandbox

    for name in sandboxes:
        connection, entry = find_sandbox(name)
        try:
            connection.socket.settimeout(30)
            connection.ask({"verb": verb, "id": entry.id})
        finally:
            connection.close()


_Ids = Annotated[list[str], typer.Argument(metavar="ID", help="Ids of live sandboxes, or their beginnings.")]


@app.command("kill")
@guarded
def _kill(sandboxes: _Ids) -> None:
    """End sandboxes with everything in them, at once."""
    _one_verb(sandboxes, "kill")


@app.command("freeze")
@guarded
def _freeze(sandboxes: _Ids) -> None:
    """Stop every process of sandboxes where it is."""
    _one_verb(sandboxes, "freeze")


@app.command("thaw")
@guarded
def _thaw(sandboxes: _Ids) -> None:
    """Let frozen sandboxes go on."""
    _one_verb(sandboxes, "thaw")


@app.command("net")
@guarded
def _net(
    sandbox: Annotated[
        str | None, typer.Argument(metavar="[ID]", help="Id of a live sandbox, or its beginning [default: all].")
    ] = None,
    as_json: Json = False,
    watch: Annotated[bool, typer.Option("--watch", help="Go on, and print it every second.")] = False,
) -> None:
    """Show what goes through the gateway now."""
    from corral.cli.net import show_flows, watch_flows

    (watch_flows if watch else show_flows)(sandbox, as_json=as_json)


@app.command("pending")
@guarded
def _pending(
    as_json: Json = False,
    watch: Annotated[bool, typer.Option("--watch", help="Go on, and print what comes.")] = False,
) -> None:
    """List the actions that are held until you answer."""
    from corral.cli.pending import show_pending, watch_pending

    (watch_pending if watch else show_pending)(as_json=as_json)


_Held = Annotated[list[str], typer.Argument(metavar="ID", help="Ids of held actions; `corral pending` lists them.")]
_Reason = Annotated[str, typer.Option("--reason", metavar="TEXT", help="Why: recorded; a denial tells the agent.")]


@app.command("approve")
@guarded
def _approve(
    held: _Held,
    session: Annotated[bool, typer.Option("--session", help="For every equal action of the session, too.")] = False,
    reason: _Reason = "",
) -> None:
    """Let held actions happen."""
    from corral.actions import Verdict
    from corral.approvals.queue import Scope
    from corral.cli.pending import answer_all

    sys.exit(answer_all(held, Verdict.ALLOW, scope=Scope.SESSION if session else Scope.ONCE, reason=reason))


@app.command("deny")
@guarded
def _deny(
    held: _Held,
    reason: _Reason = "",
    kill: Annotated[bool, typer.Option("--kill", help="End the sandbox, too.")] = False,
) -> None:
    """Refuse held actions."""
    from corral.actions import Verdict
    from corral.cli.pending import answer_all

    sys.exit(answer_all(held, Verdict.KILL if kill else Verdict.DENY, reason=reason))


@app.command("diff")
@guarded
def _diff(
    layer: Annotated[str | None, typer.Argument(metavar="[ID]", help="A kept layer [default: the last one].")] = None,
    other: Annotated[str | None, typer.Argument(metavar="[ID]", help="Another: show what is different in it.")] = None,
    workspace_only: Annotated[bool, typer.Option("--workspace-only", help="Leave home and system trees out.")] = False,
    patch: Annotated[bool, typer.Option("--patch", help="Print the workspace's changes as a patch.")] = False,
    list_all: Annotated[bool, typer.Option("--list", help="List the kept layers instead.")] = False,
    as_json: Json = False,
) -> None:
    """Show what a run has changed, or what is different between two kept layers."""
    from corral.cli.diff import list_layers_command, show_changes

    if list_all:
        list_layers_command(as_json=as_json)
    else:
        show_changes(layer, other, workspace_only=workspace_only, patch=patch, as_json=as_json)


_Live = Annotated[str, typer.Argument(metavar="ID", help="Id of a live sandbox, or its beginning.")]


@app.command("snapshot")
@guarded
def _snapshot(
    sandbox: Annotated[
        str | None, typer.Argument(metavar="[ID]", help="Id of a live sandbox, or its beginning.")
    ] = None,
    name: Annotated[str, typer.Option("--name", metavar="TEXT", help="What to call it.")] = "",
    list_all: Annotated[
        bool, typer.Option("--list", help="Show what is kept as a tree instead: what came of what.")
    ] = False,
    as_json: Json = False,
) -> None:
    """Keep the files of a live sandbox as they are now; prints the id of the layer.

    Everything in it stands still for that moment. `corral run --on LAYER` begins there."""
    from corral.cli.snapshots import show_tree, take_snapshot

    if list_all:
        show_tree(sandbox, as_json=as_json)
    else:
        take_snapshot(sandbox, name, as_json=as_json)


@app.command("restore")
@guarded
def _restore(
    sandbox: _Live,
    layer: Annotated[str, typer.Argument(metavar="LAYER", help="A kept layer; `corral snapshot --list` shows them.")],
    as_json: Json = False,
) -> None:
    """Set the files of a live sandbox back to a snapshot, or on to any layer of its workspace.

    All that runs in it is killed, but for programs that its policy names (filesystem.restore_keeps)."""
    from corral.cli.snapshots import restore_to

    restore_to(sandbox, layer, as_json=as_json)


_ApplyLog = Annotated[
    str | None,
    typer.Option("--log", metavar="DIR", help="Where the log of the run is now, or one where it had none."),
]


@app.command("apply")
@guarded
def _apply(
    layer: Annotated[str | None, typer.Argument(metavar="[ID]", help="A kept layer [default: the last one].")] = None,
    paths: Annotated[
        list[str] | None, typer.Argument(metavar="[PATH]...", help="Only these paths, with all below.")
    ] = None,
    step: Annotated[
        int | None, typer.Option("--step", metavar="N", help="As it was after this step (filesystem.snapshot: step).")
    ] = None,
    dry_run: Annotated[bool, typer.Option("--dry-run", help="Only show what would be applied.")] = False,
    yes: Annotated[
        bool, typer.Option("--yes", "-y", help="Do not ask, unless there is something that a person must look at.")
    ] = False,
    consent: Annotated[
        str | None, typer.Option("--consent", metavar="HASH", help="Apply exactly what --dry-run has shown.")
    ] = None,
    as_patch: Annotated[bool, typer.Option("--as-patch", help="Only print it as a patch for `git apply`.")] = False,
    branch: Annotated[
        str | None,
        typer.Option("--as-git-branch", metavar="NAME", help="Commit it to a new branch instead; no file is changed."),
    ] = None,
    policy: Annotated[
        str | None,
        typer.Option("--policy", "-p", metavar="FILE", help="A policy that asks for more than that of the run."),
    ] = None,
    log: _ApplyLog = None,
    as_json: Json = False,
) -> None:
    """Make what a run has changed real in the workspace: all of it, or nothing.

    Refuses (exit code 1) where the workspace was changed since the run began.
    Asks about files that make others execute things, and those that the policy names.
    What is decided and what comes of it is recorded in the log of the run."""
    from corral.cli.apply import apply

    if as_patch and (dry_run or yes or consent or branch or log or as_json):
        raise RequestError("--as-patch only prints; leave the other options out")
    sys.exit(
        apply(
            layer,
            paths or (),
            step=step,
            dry_run=dry_run,
            yes=yes,
            consent=consent,
            as_patch=as_patch,
            branch=branch,
            policy=policy,
            log=log,
            as_json=as_json,
        )
    )


@app.command("undo")
@guarded
def _undo(
    applied: Annotated[str | None, typer.Argument(metavar="[ID]", help="What was applied [default: last].")] = None,
    list_all: Annotated[bool, typer.Option("--list", help="List what can be taken back instead.")] = False,
    forget: Annotated[
        bool, typer.Option("--forget", help="Keep it for good: drop the copies of what was there.")
    ] = False,
    log: _ApplyLog = None,
    as_json: Json = False,
) -> None:
    """Take back what was applied, as long as it is unchanged."""
    from corral.cli.apply import undo

    undo(applied, list_all=list_all, forget=forget, log=log, as_json=as_json)


@app.command("discard")
@guarded
def _discard(
    layers: Annotated[list[str] | None, typer.Argument(metavar="ID", help="Kept layers.")] = None,
    every: Annotated[bool, typer.Option("--all", help="All kept layers.")] = False,
) -> None:
    """Drop kept changes."""
    from corral.sandbox.layer import discard, list_layers

    if not layers and not every:
        raise RequestError("name the layers to discard, or --all; `corral layers` lists them")
    for name in [kept.id for kept in list_layers()] if every else layers or ():
        discard(name)
        typer.echo(f"discarded {name}")


@app.command("layers")
@guarded
def _layers(as_json: Json = False) -> None:
    """List what runs have left: layers and snapshots, with what each has added to the disk, and what holds it."""
    from corral.cli.area import show_layers

    show_layers(as_json=as_json)


@app.command("gc")
@guarded
def _gc(
    older_than: Annotated[
        str | None, typer.Option("--older-than", metavar="TIME", help="What is older than this, such as 30d.")
    ] = None,
    keep_bytes: Annotated[
        str | None,
        typer.Option("--keep-bytes", metavar="SIZE", help="The oldest, until all take no more than this: 20GiB."),
    ] = None,
    undo: Annotated[
        bool, typer.Option("--undo", help="Copies for undoing what was applied, too, by --older-than.")
    ] = False,
    dry_run: Annotated[
        bool, typer.Option("--dry-run", help="Only show what would go, and what that would free.")
    ] = False,
    as_json: Json = False,
) -> None:
    """Remove layers that may go: those that have been kept as long as their policy says, and those that are named here.

    What is pinned, in use by a live session, applied half, or named by the records of a log, stays (docs/layers.md)."""
    from corral.cli.area import gc

    try:
        gc(older_than=older_than, keep_bytes=keep_bytes, undo=undo, dry_run=dry_run, as_json=as_json)
    except KeyboardInterrupt:
        raise typer.Exit(130) from None


@app.command("pin")
@guarded
def _pin(layers: Annotated[list[str], typer.Argument(metavar="ID", help="Kept layers.")]) -> None:
    """Have layers stay, whatever their age, until `corral unpin`."""
    from corral.cli.area import pin_all

    pin_all(layers, on=True)


@app.command("unpin")
@guarded
def _unpin(layers: Annotated[list[str], typer.Argument(metavar="ID", help="Kept layers.")]) -> None:
    """Let layers go when their time comes."""
    from corral.cli.area import pin_all

    pin_all(layers, on=False)


@app.command("usage")
@guarded
def _usage(
    by: Annotated[
        str, typer.Option("--by", metavar="WHAT", help="session, agent, source, model (or operation), or day.")
    ] = "session",
    since: Annotated[
        str | None, typer.Option("--since", metavar="TIME", help="Such as 7d, 12h, or 2026-01-31T08:00.")
    ] = None,
    session: Annotated[str | None, typer.Option("--session", metavar="ID", help="Only of this session.")] = None,
    agent: Annotated[str | None, typer.Option("--agent", metavar="NAME", help="Only of this agent.")] = None,
    log: Annotated[
        str | None, typer.Option("--log", metavar="DIR", help="Add up the records of this log instead of the meter's.")
    ] = None,
    as_json: Json = False,
) -> None:
    """Show what was used through the brokers: models, data, services, with what it cost. Live sessions count."""
    from corral.cli.usage import show_usage

    show_usage(by=by, since=since, session=session, agent=agent, log=log, as_json=as_json)


policy_commands = typer.Typer(
    no_args_is_help=True, rich_markup_mode=None, help="Check, explain, test and propose policies."
)
app.add_typer(policy_commands, name="policy")
app.add_typer(log_commands, name="log")
app.command("replay")(replay_command)


@policy_commands.command("check")
@guarded
def _policy_check(
    files: Annotated[list[str], typer.Argument(metavar="FILE", help="Policy files.")], as_json: Json = False
) -> None:
    """Read policies, and print their hashes, or all faults."""
    from corral.cli.policy import check

    sys.exit(check(files, as_json=as_json))


_ACTIONS = "Such as `connect github.com:443` or `exec /usr/bin/git push`; docs/policy-commands.md has all forms."


@policy_commands.command("explain", context_settings={"allow_interspersed_args": False})
@guarded
def _policy_explain(
    action: Annotated[list[str], typer.Argument(metavar="ACTION", help=_ACTIONS)],
    policy: Annotated[
        str | None, typer.Option("--policy", "-p", metavar="FILE", help="Policy file [default: the built-in policy].")
    ] = None,
    as_json: Json = False,
) -> None:
    """Say which rule decides an action, and why."""
    from corral.cli.policy import explain

    explain(policy, action, as_json=as_json)


@policy_commands.command("test")
@guarded
def _policy_test(policy: Annotated[str, typer.Argument(metavar="FILE")], as_json: Json = False) -> None:
    """Compare a policy with the expected verdicts beside it.

    For FILE policy.yaml they are in policy.test.yaml. Exit code: 1 where a verdict is another."""
    from corral.cli.policy import test

    sys.exit(test(policy, as_json=as_json))


@policy_commands.command("schema")
@guarded
def _policy_schema() -> None:
    """Print the JSON Schema of policy files, for editors."""
    from corral.cli.policy import print_schema

    print_schema()


@policy_commands.command("learn")
@guarded
def _policy_learn(
    record: Annotated[str, typer.Argument(metavar="RECORD", help="What `corral run --record` has written.")],
) -> None:
    """Propose a policy from the record of a run.

    It is no wider than what was used, and asks where something has consequences. Read it before you use it."""
    from corral.cli.policy import learn

    learn(record)


@app.command("doctor")
@guarded
def _doctor(as_json: Json = False) -> None:
    """Try every mechanism that the walls need.

    Says what is missing on this machine, and what to do."""
    from corral.cli.doctor import examine

    sys.exit(examine(as_json=as_json))


def main() -> int:
    """Reads the words and runs what they name. Wrong words are an error of Corral's own: 125, never click's 2, which
    would look like the command's."""
    usage_error: Any = typer.BadParameter.__base__  # of typer's own click, or of the real one
    try:
        return int(app(prog_name="corral", standalone_mode=False) or 0)
    except usage_error as error:
        error.show()
        return CorralError.exit_code
