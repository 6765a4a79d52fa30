"""What every command has: its errors in one line, and --json."""

from __future__ import annotations

import sys
from collections.abc import Callable
from functools import wraps
from typing import Annotated, ParamSpec

import typer

from corral.cli.foreground import complain
from corral.errors import CorralError

P = ParamSpec("P")
Json = Annotated[bool, typer.Option("--json", help="Print JSON.")]


def guarded(function: Callable[P, None]) -> Callable[P, None]:
    """Corral's own errors become one line and their exit code; nothing ends in a traceback that a user could mend."""

    @wraps(function)
    def call(*args: P.args, **kwargs: P.kwargs) -> None:
        try:
            function(*args, **kwargs)
        except CorralError as error:
            complain(str(error))
            raise typer.Exit(error.exit_code) from None
        except BrokenPipeError:
            sys.stderr.close()  # nobody reads any more: no second complaint at exit
            raise typer.Exit(141) from None

    return call
