"""Every error that Corral raises on purpose, by whose fault it is.

The three families decide the exit code of the command line (see ``corral.cli``): a request that is wrong
(:class:`RequestError`, 125), walls that this machine cannot build (:class:`WallError`, 126), and a sandbox that has
ended (:class:`SandboxClosed`, 125). Messages say what failed, why, and what to do; they never hold a secret.
"""

from __future__ import annotations

import os


class CorralError(Exception):
    """Base of all errors that Corral raises on purpose."""

    exit_code = 125


class RequestError(CorralError):
    """The caller asked for something that cannot be: a bad path, a bad option, a bad policy."""


class PolicyError(RequestError):
    """A policy file is wrong. ``problems`` lists every fault found, each as ``file:line: field: what is wrong``
    (for a value of the command line, without a line)."""

    def __init__(self, problems: list[str]) -> None:
        super().__init__("\n".join(problems))
        self.problems = tuple(problems)


class WallError(CorralError):
    """The walls cannot be built on this machine. Nothing was run.

    ``step`` is the launcher's name for the step that failed, ``errno`` the kernel's answer (0 where there is none).
    """

    exit_code = 126

    def __init__(self, step: str, detail: str, errno: int = 0) -> None:
        cause = f": {os.strerror(errno)}" if errno else ""
        what = f"cannot build the walls: {step}: {detail}{cause}"
        super().__init__(f"{what} (run `corral doctor` to see what is missing)")
        self.step = step
        self.detail = detail
        self.errno = errno


class SandboxClosed(CorralError):
    """The sandbox has ended; ``reason`` says why (closed, killed, out of wall time, controller gone, ...)."""

    def __init__(self, reason: str) -> None:
        super().__init__(f"the sandbox has ended: {reason}")
        self.reason = reason


class ExecError(CorralError):
    """A command could not be started inside the sandbox (no such file, not executable, bad directory).

    ``refused`` says what the monitor refused on the way, if it did.
    """

    def __init__(self, stage: str, what: str, errno: int, refused: str = "") -> None:
        about = ": ".join(part for part in (stage, what, os.strerror(errno)) if part)
        super().__init__(f"cannot start the command: {about}{'; ' if refused else ''}{refused}")
        self.stage = stage
        self.what = what
        self.errno = errno
