"""What the sandbox's verbs return."""

from __future__ import annotations

from dataclasses import dataclass

from corral.errors import CorralError
from corral.sandbox.channel import Usage
from corral.sandbox.denials import Denial


class CommandFailed(CorralError):
    """A command that was run with ``check`` ended with something other than 0; ``result`` has the rest."""

    def __init__(self, result: ExecResult) -> None:
        tail = result.stderr[-2000:].decode("utf-8", "replace")
        super().__init__(f"the command ended with {result.exit_code}{': ' if tail else ''}{tail!r}")
        self.result = result


@dataclass(frozen=True, slots=True)
class ExecResult:
    """How a captured command ended, and what it wrote."""

    exit_code: int
    """0 to 255, or 128 plus the signal that ended it."""
    signal: int | None
    """The signal that ended it, if one did."""
    stdout: bytes
    stderr: bytes
    """What the command wrote; where it was refused something, a line of Corral's own after it (``corral: ...``)."""
    stdout_truncated: bool
    """More than the policy's ``resources.output`` bytes were written; the rest was dropped."""
    stderr_truncated: bool
    timed_out: bool
    """The caller's ``timeout`` ran out and the command's session was killed."""
    usage: Usage
    duration: float
    """Seconds from the request to the exit."""
    denials: tuple[Denial, ...] = ()
    """What the command and its children were refused until it ended, equal ones counted together."""
    denials_dropped: int = 0
    """How many refusals there were beside these."""
    restored: str = ""
    """The layer to which the files were set back while it ran, if they were; stderr has a line of that."""

    @property
    def text(self) -> str:
        """stdout as text; bytes that are no UTF-8 are replaced."""
        return self.stdout.decode("utf-8", "replace")

    def check(self) -> ExecResult:
        """Returns the result itself, or raises CommandFailed when the exit code is not 0."""
        if self.exit_code != 0:
            raise CommandFailed(self)
        return self


@dataclass(frozen=True, slots=True)
class Stats:
    """What a sandbox holds and has used at this moment. None where this machine cannot tell."""

    processes: int
    memory: int
    """Bytes, the layer included."""
    memory_peak: int | None
    cpu_seconds: float
    disk: int
    """Bytes of changed files."""
    uptime: float
    """Seconds."""
