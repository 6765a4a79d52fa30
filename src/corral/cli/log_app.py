"""The commands of `corral log`, for typer."""

from __future__ import annotations

import sys
from typing import Annotated

import typer

from corral.cli.guard import Json, guarded

log_commands = typer.Typer(
    no_args_is_help=True,
    rich_markup_mode=None,
    help="Verify what was recorded, and prove it to others.\n\n"
    "A log is a directory; where none is named, it is that of this user. `corral run --log DIR` writes one.",
)

_Log = Annotated[str | None, typer.Option("--log", metavar="DIR", help="The log [default: that of this user].")]
_Keys = Annotated[
    list[str] | None,
    typer.Option("--key", metavar="KEY", help="A key of the log, as `corral log keys` prints it; may be repeated."),
]
_Witnesses = Annotated[
    list[str] | None, typer.Option("--witness", metavar="KEY", help="The key of a witness; may be repeated.")
]
_Pkcs11 = Annotated[
    str | None,
    typer.Option(
        "--pkcs11", metavar="URI", help="An Ed25519 key on a device (RFC 7512), with module-path, pin-source."
    ),
]
_Quorum = Annotated[int, typer.Option("--quorum", min=0, help="So many witnesses must have cosigned.")]


@log_commands.command("verify")
@guarded
def _verify(
    log: _Log = None,
    key: _Keys = None,
    witness: _Witnesses = None,
    quorum: _Quorum = 0,
    earlier: Annotated[
        list[str] | None,
        typer.Option("--earlier", metavar="FILE", help="A checkpoint kept from before; the log must continue it."),
    ] = None,
    as_json: Json = False,
) -> None:
    """Compute every hash again, and name the first place that is not what was signed.

    Exit code: 1 where there is one. Whoever does not trust the log's owner passes --key and --earlier."""
    from corral.cli.log import verify

    sys.exit(
        verify(log, keys=key or (), witnesses=witness or (), quorum=quorum, earlier=earlier or (), as_json=as_json)
    )


@log_commands.command("between")
@guarded
def _between(
    old: Annotated[str, typer.Argument(metavar="OLD", help="File with the older checkpoint.")],
    new: Annotated[str, typer.Argument(metavar="NEW", help="File with the newer one.")],
    log: _Log = None,
    key: _Keys = None,
    as_json: Json = False,
) -> None:
    """Verify that one checkpoint continues another, by the hashes alone."""
    from corral.cli.log import verify_consistency

    sys.exit(verify_consistency(log, old, new, keys=key or (), as_json=as_json))


@log_commands.command("prove")
@guarded
def _prove(
    number: Annotated[int, typer.Argument(metavar="NUMBER", min=0, help="The number of the record.")],
    log: _Log = None,
    output: Annotated[str | None, typer.Option("--output", "-o", metavar="FILE", help="Where to [stdout].")] = None,
) -> None:
    """Write the proof that one record is in the log, for whoever does not have the log."""
    from corral.cli.log import prove

    prove(log, number, output)


@log_commands.command("check")
@guarded
def _check(
    proof: Annotated[str, typer.Argument(metavar="FILE", help="The proof (.tlog-proof), or - for stdin.")],
    key: Annotated[str, typer.Option("--key", metavar="KEY", help="The key of the log.")],
    entry: Annotated[
        str | None, typer.Option("--entry", metavar="FILE", help="The record [default: what the proof carries].")
    ] = None,
    witness: _Witnesses = None,
    quorum: _Quorum = 0,
    as_json: Json = False,
) -> None:
    """Verify such a proof, without the log. Exit code: 1 where it proves nothing."""
    from corral.cli.log import check

    sys.exit(check(proof, key=key, entry=entry, witnesses=witness or (), quorum=quorum, as_json=as_json))


@log_commands.command("content")
@guarded
def _content(
    digest: Annotated[
        str | None, typer.Argument(metavar="[DIGEST]", help="As the record says it [default: list them].")
    ] = None,
    log: _Log = None,
    as_json: Json = False,
) -> None:
    """Print what is kept beside the log, such as what a command wrote.

    It is written as it is, but to a terminal. What commands write is an asciicast: `corral log content DIGEST >F`, then
    `asciinema play F`."""
    from corral.cli.contents import show

    show(digest, log, as_json=as_json)


@log_commands.command("erase")
@guarded
def _erase(
    why: Annotated[str, typer.Option("--why", metavar="TEXT", help="Why; it is recorded.")],
    digests: Annotated[list[str] | None, typer.Argument(metavar="[DIGEST]...")] = None,
    expired: Annotated[bool, typer.Option("--expired", help="All that has been kept as long as it was to be.")] = False,
    by: Annotated[str | None, typer.Option("--by", metavar="NAME", help="Who [default: this user].")] = None,
    log: _Log = None,
    as_json: Json = False,
) -> None:
    """Erase content that is kept beside the log, with its salt. The log says so, and still verifies."""
    from corral.cli.contents import erase

    erase(digests or (), log, expired=expired, why=why, by=by, as_json=as_json)


@log_commands.command("encrypt")
@guarded
def _encrypt(log: _Log = None) -> None:
    """Have all content encrypted that is kept from now on."""
    from corral.cli.contents import encrypt

    encrypt(log)


@log_commands.command("keys")
@guarded
def _keys(log: _Log = None, as_json: Json = False) -> None:
    """Print the public halves of the log's keys, oldest first: give them to who verifies it."""
    from corral.cli.log import show_keys

    show_keys(log, as_json=as_json)


@log_commands.command("rotate")
@guarded
def _rotate(log: _Log = None, pkcs11: _Pkcs11 = None) -> None:
    """Have a new key sign from now on; both sign for what there is."""
    from corral.cli.log import rotate

    rotate(log, pkcs11)


@log_commands.command("checkpoint")
@guarded
def _checkpoint(log: _Log = None) -> None:
    """Print the newest checkpoint: kept elsewhere, it shows later whether anything before it was changed."""
    from corral.cli.log import show_checkpoint

    show_checkpoint(log)


@log_commands.command("key")
@guarded
def _key(
    path: Annotated[str, typer.Argument(metavar="FILE", help="A new file.")],
    name: Annotated[str, typer.Argument(metavar="NAME", help="Such as witness.example/one.")],
    witness: Annotated[bool, typer.Option("--witness", help="A key that cosigns.")] = False,
    pkcs11: _Pkcs11 = None,
) -> None:
    """Make a key, and print its public half.

    With --pkcs11 the file only names a key, which the device has and keeps; needs pip install 'corral[pkcs11]'."""
    from corral.cli.log import make_key

    make_key(path, name, witness=witness, uri=pkcs11)


@log_commands.command("cosign")
@guarded
def _cosign(
    witness: Annotated[
        list[str],
        typer.Option("--witness", metavar="URL=KEY", help="Where a witness is, and its key; repeatable."),
    ],
    log: _Log = None,
    quorum: Annotated[int, typer.Option("--quorum", min=0, help="So many must cosign.")] = 1,
    as_json: Json = False,
) -> None:
    """Have witnesses cosign what is signed now.

    Exit code: 1 where fewer than --quorum have. `corral log verify --witness KEY --quorum N` looks at it."""
    from corral.cli.log import cosign

    sys.exit(cosign(log, witness, quorum, as_json=as_json))


@log_commands.command("witness")
@guarded
def _witness(
    state: Annotated[str, typer.Argument(metavar="DIR", help="What it remembers; made where missing.")],
    key: Annotated[str, typer.Option("--key", metavar="FILE", help="Its key, of `corral log key --witness`.")],
    known: Annotated[list[str], typer.Option("--log", metavar="KEY", help="The key of a log; may be repeated.")],
    listen: Annotated[str, typer.Option("--listen", metavar="ADDRESS:PORT")] = "127.0.0.1:8451",
) -> None:
    """Be a witness: cosign what continues the logs that one has seen, and nothing else (C2SP tlog-witness)."""
    from corral.cli.log import witness

    witness(state, key, known, listen)


@log_commands.command("sessions")
@guarded
def _sessions(log: _Log = None, as_json: Json = False) -> None:
    """List the sessions of a log."""
    from corral.cli.look_back import sessions

    sessions(log, as_json=as_json)


@log_commands.command("show")
@guarded
def _show(
    log: _Log = None,
    session: Annotated[str | None, typer.Option("--session", metavar="ID", help="Of this session only.")] = None,
    start: Annotated[int, typer.Option("--from", min=0, metavar="NUMBER", help="From this record on.")] = 0,
    follow: Annotated[bool, typer.Option("--follow", "-f", help="Go on, and print what comes.")] = False,
    details: Annotated[bool, typer.Option("--details", help="All that a record says.")] = False,
    as_json: Json = False,
) -> None:
    """Print records as they stand in the log. With --json, one object a line: the number, and the record (OCSF)."""
    from corral.cli.look_back import show

    show(log, session=session, start=start, follow=follow, details=details, as_json=as_json)


_Words = Annotated[
    list[str] | None,
    typer.Argument(metavar="[WORDS]", help="Such as verdict=deny action='net.*' since=2h limit=20."),
]
_Index = Annotated[
    str | None, typer.Option("--index", metavar="URL", help="Database of the index [default: LOG.index, SQLite].")
]
_Rebuild = Annotated[bool, typer.Option("--rebuild", help="Make the index anew, from the log alone.")]


_Tool = Annotated[
    str | None, typer.Option("--tool", metavar="ID", help="Only what comes from this tool call of a model's.")
]
_Unexplained = Annotated[
    bool, typer.Option("--unexplained", help="Only what no answer of a model explains, in sessions that have one.")
]


def _with(words: list[str] | None, tool: str | None, unexplained: bool) -> list[str]:
    """The words of a filter, with those that options stand for."""
    more = [f"tool={tool}"] if tool is not None else []
    return [*(words or ()), *more, *(["unexplained=1"] if unexplained else [])]


@log_commands.command("query")
@guarded
def _query(
    words: _Words = None,
    log: _Log = None,
    details: Annotated[bool, typer.Option("--details", help="All that a record says.")] = False,
    tool: _Tool = None,
    unexplained: _Unexplained = False,
    index: _Index = None,
    rebuild: _Rebuild = False,
) -> None:
    """Look for records: by session, agent, verdict, action, rule, exe, path, destination, person (by), step, tool call
    (tool), source, model, conversation, time, ...

    Words of one name are alternatives, different names must all hold; `*` and `?` are wildcards. Keeps an index beside
    the log, made from the log."""
    from corral.cli.look_back import query

    query(log, _with(words, tool, unexplained), index=index, rebuild=rebuild, details=details)


@log_commands.command("export")
@guarded
def _export(
    words: _Words = None,
    form: Annotated[
        str,
        typer.Option(
            "--format",
            metavar="FORM",
            help="jsonl, ocsf, cef, syslog, otlp, parquet; trajectories or trajectories-parquet, for learning.",
        ),
    ] = "jsonl",
    output: Annotated[str | None, typer.Option("--output", "-o", metavar="FILE", help="Where to [stdout].")] = None,
    log: _Log = None,
    tool: _Tool = None,
    unexplained: _Unexplained = False,
    index: _Index = None,
    rebuild: _Rebuild = False,
) -> None:
    """Write records in a form that others read: all of them, or those that are looked for as with `query`.

    Trajectories are those of all sessions that have such a record: what models were asked and answered, and the
    actions that followed. Parquet needs pyarrow: pip install 'corral[parquet]'."""
    from corral.cli.look_back import export

    export(log, _with(words, tool, unexplained), index=index, rebuild=rebuild, form=form, output=output)


@log_commands.command("review")
@guarded
def _review(
    log: _Log = None,
    since: Annotated[str, typer.Option("--since", metavar="TIME", help="Such as 7d, 12h, 2026-01-31.")] = "7d",
    until: Annotated[str | None, typer.Option("--until", metavar="TIME", help="[default: now]")] = None,
    html: Annotated[str | None, typer.Option("--html", metavar="FILE", help="Write a page instead.")] = None,
) -> None:
    """Make a digest of a period: what is new, was refused, nearly happened; which sessions are unlike the others."""
    from corral.cli.look_back import review

    review(log, since=since, until=until, html=html)


@guarded
def replay_command(
    session: Annotated[
        str | None, typer.Argument(metavar="[SESSION]", help="Its id, or the beginning of it [default: the last one].")
    ] = None,
    log: _Log = None,
    speed: Annotated[float, typer.Option("--speed", help="Times as fast as it happened.")] = 1.0,
    step: Annotated[bool, typer.Option("--step", help="Begin paused; n shows the next.")] = False,
    place: Annotated[str, typer.Option("--from", metavar="PLACE", help="Such as 90s, #12, step 3, unexplained.")] = "",
    details: Annotated[bool, typer.Option("--details", help="All that a record says.")] = False,
    tree: Annotated[
        bool, typer.Option("--tree", help="Print its conversations with models, and what was done for each tool call.")
    ] = False,
    html: Annotated[str | None, typer.Option("--html", metavar="FILE", help="Write one page that plays it.")] = None,
    policy: Annotated[
        str | None, typer.Option("--policy", metavar="FILE", help="Say what this policy would have decided instead.")
    ] = None,
    rerun: Annotated[
        bool, typer.Option("--rerun", help="Run it again under --policy, with the same answers of its models.")
    ] = False,
    env: Annotated[
        list[str] | None, typer.Option("--env", "-e", metavar="NAME[=VALUE]", help="With --rerun: as of `corral run`.")
    ] = None,
    as_json: Json = False,
) -> None:
    """Play a recorded session: what was tried and decided, in its time.

    On a terminal: space pauses, n goes on by one, / searches, left and right move, + and - change the speed, q ends.
    With --policy the exit code is 1 where anything would have been decided otherwise, with --rerun where the second
    session did something else than the first."""
    from corral.cli.look_back import replay

    sys.exit(
        replay(
            session,
            log,
            speed=speed,
            step=step,
            place=place,
            details=details,
            html=html,
            policy=policy,
            is_rerun=rerun,
            variables=env or (),
            as_json=as_json,
            tree=tree,
        )
    )
