"""What a caller asks of a sandbox, checked and made definite before anything is built."""

from __future__ import annotations

import os
import stat
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

from corral.errors import RequestError
from corral.policy.model import Policy
from corral.sandbox.identity import AGENT_ID, ROOT_ID

if TYPE_CHECKING:
    from corral.brokers.model.capture import Capture

USERS = {"agent": AGENT_ID, "root": ROOT_ID}


@dataclass(frozen=True, slots=True)
class Listener:
    """A TCP listener that is created inside, in the sandbox's own network, and accepted by the controller."""

    port: int
    address: str = "127.0.0.1"


@dataclass(frozen=True, slots=True)
class Options:
    """One sandbox to be."""

    workspace: str
    policy: Policy = field(default_factory=Policy)
    user: int = AGENT_ID
    root: str | None = None
    listeners: tuple[Listener, ...] = ()
    command: str | None = None
    """The command that is to run, if known: its interpreter is shown even where PATH does not name it."""
    environment: Mapping[str, str] = field(default_factory=lambda: os.environ)
    """The caller's environment, from which the policy lets some variables pass."""
    label: str = ""
    """What `corral ps` shows beside the id."""
    on: str | None = None
    """The id of a kept layer to begin on."""
    hidden: tuple[str, ...] = ()
    """Absolute host paths that are absent inside, beside those of the policy: what Corral itself keeps there."""
    log: tuple[str, str] = ("", "")
    """The directory and the name of the log that it is recorded in, which whoever applies its changes goes on with."""
    keep: bool = False
    """Whether its changes are kept when it ends."""
    capture: Callable[[], Capture] | None = None
    """Makes what answers of models are recorded in, or given again from: one for each sandbox."""


def user_id(user: str | int) -> int:
    """The id inside of a user given by name or number. Raises RequestError for an unknown one."""
    if isinstance(user, bool) or (isinstance(user, int) and not 0 <= user < 65534):
        raise RequestError(f"user {user!r} is not an id between 0 and 65533")
    if isinstance(user, int):
        return user
    if user in USERS:
        return USERS[user]
    raise RequestError(f"user {user!r} is unknown; use agent, root, or a number")


def check_text(what: str, value: str) -> str:
    """Refuses NUL and control characters: they cannot be meant, and would draw on an operator's terminal."""
    if any(ord(character) < 32 or ord(character) == 127 for character in value):
        raise RequestError(f"{what} {value!r} holds control characters")
    return value


def _real_directory(what: str, path: str) -> str:
    check_text(what, path)
    if not path:
        raise RequestError(f"the {what} is an empty path")
    try:
        real = os.path.realpath(path, strict=True)
        status = os.stat(real)
    except OSError as error:
        raise RequestError(f"{what} {path}: {error.strerror}") from None
    if not stat.S_ISDIR(status.st_mode):
        raise RequestError(f"{what} {path} is not a directory")
    if not os.access(real, os.R_OK | os.X_OK):
        raise RequestError(f"{what} {path} is not readable for you")
    return real


_NEVER_WORKSPACE = ("/", "/usr", "/etc", "/var", "/bin", "/sbin", "/lib", "/lib64", "/opt", "/home", "/tmp", "/root")
_NEVER_BELOW = ("/proc", "/sys", "/dev", "/run")


def check_workspace(path: str) -> str:
    """The workspace's real path. Raises RequestError for one that does not exist or would show the whole host."""
    return _project("workspace", path)


def check_write(paths: Sequence[str]) -> tuple[str, ...]:
    """The real paths of directories that are shown copy-on-write. Raises RequestError as for a workspace."""
    return tuple(dict.fromkeys(_project("filesystem.write", path) for path in paths))


def _project(what: str, path: str) -> str:
    real = _real_directory(what, path)
    if real in _NEVER_WORKSPACE or any(real == tree or real.startswith(f"{tree}/") for tree in _NEVER_BELOW):
        raise RequestError(f"{what} {path}: {real} is a part of the system; name the directory of one project")
    if real == os.path.realpath(os.path.expanduser("~")):
        raise RequestError(f"{what} {path} is your home, with your keys in it; name the directory of one project")
    return real


def check_hidden(hidden: Sequence[str], shown: Sequence[str]) -> None:
    """Raises RequestError where something is to be shown that lies in what is hidden; all are real paths."""
    for path in shown:
        for place in hidden:
            if path == place or path.startswith(f"{place}/"):
                raise RequestError(f"{path} lies in {place}, which no sandbox is shown: it is of the log of this one")


def check_root(path: str | None) -> str | None:
    """The real path of an unpacked root file system. Raises RequestError for one that is none."""
    if path is None:
        return None
    real = _real_directory("root", path)
    if real == "/":
        raise RequestError("root / is the host itself; leave --root out to see its system trees")
    return real


def check_read(paths: Sequence[str]) -> tuple[str, ...]:
    """The paths to show read-only. Raises RequestError for one that does not exist."""
    for path in paths:
        check_text("path", path)
        if not os.path.isabs(path):
            raise RequestError(f"path {path} must be absolute")
        if os.path.realpath(path) == "/":
            raise RequestError(f"path {path}: the whole host cannot be shown")
        try:
            os.stat(path)
        except OSError as error:
            raise RequestError(f"path {path}: {error.strerror}") from None
    return tuple(os.path.normpath(path) for path in paths)
