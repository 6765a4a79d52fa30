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


@log_commands.command("keys")
@guarded
def _keys(log: _Log = None, as_json: Json = False) -> None:
    """Print the public halves of the log's keys, oldest first: give them to who verifies it."""
    from corral.cli.log import show_keys

    show_keys(log, as_json=as_json)


@log_commands.command("rotate")
@guarded
def _rotate(log: _Log = None) -> None:
    """Have a new key sign from now on; both sign for what there is."""
    from corral.cli.log import rotate

    rotate(log)


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
) -> None:
    """Make a key, and print its public half."""
    from corral.cli.log import make_key

    make_key(path, name, witness=witness)
