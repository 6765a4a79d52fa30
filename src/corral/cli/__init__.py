"""The command line. ``main`` is the entry point; one module per command group."""

from __future__ import annotations

import os
import sys


def _fill_standard_descriptors() -> None:
    """Where the caller closed one of 0 to 2 the next file would get its number, and be taken for the command's."""
    for fd in range(3):
        try:
            os.fstat(fd)
        except OSError:
            os.open(os.devnull, os.O_RDWR)  # takes the lowest free number
    if sys.stdout is None or sys.stderr is None:
        null = open(os.devnull, "w")  # noqa: SIM115 - for as long as the process lives
        sys.stdout, sys.stderr = sys.stdout or null, sys.stderr or null


def main() -> None:
    """`corral`. Plain `corral run` goes straight to its module; everything else through typer."""
    try:
        _main()
    except KeyboardInterrupt:  # before the command's own handling was in place, or in a command without any
        sys.exit(130)
    except RuntimeError as error:  # Python 3.11 makes it of what comes within __set_name__ (PEP 487)
        if not isinstance(error.__cause__, KeyboardInterrupt):
            raise
        sys.exit(130)


def _main() -> None:
    _fill_standard_descriptors()
    os.umask(os.umask(0) & 0o077)  # one that shuts out the caller too would shut out ourselves
    words = sys.argv[1:]
    if words[:1] == ["run"]:
        from corral.cli.options import read_fast

        arguments = read_fast(words[1:])
        if arguments is not None:
            from corral.cli.run import run

            sys.exit(run(arguments))
    from corral.cli.app import main as general

    sys.exit(general())
