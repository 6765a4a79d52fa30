"""Where Corral keeps things (XDG base directories), and who may look there: only the caller."""

from __future__ import annotations

import os
import stat
import threading

from corral.errors import RequestError


def _private(path: str) -> str:
    try:
        os.makedirs(path, mode=0o700, exist_ok=True)
        status = os.lstat(path)
    except OSError as error:
        raise RequestError(f"{path} cannot be made: {error.strerror}; set HOME or the XDG directories") from None
    if not stat.S_ISDIR(status.st_mode) or status.st_uid != os.geteuid() or status.st_mode & 0o022:
        raise RequestError(f"{path} must be a directory that belongs to you and that nobody else can write to")
    return path


def _home() -> str:
    return os.environ.get("HOME") or os.path.expanduser("~")


def cache_directory() -> str:
    """What can be made again: ``$XDG_CACHE_HOME/corral``; as root ``/var/cache/corral``."""
    if os.geteuid() == 0 and "XDG_CACHE_HOME" not in os.environ:
        return _private("/var/cache/corral")
    return _private(os.path.join(os.environ.get("XDG_CACHE_HOME") or os.path.join(_home(), ".cache"), "corral"))


def state_directory() -> str:
    """What must survive: ``$XDG_STATE_HOME/corral``; as root ``/var/lib/corral``."""
    if os.geteuid() == 0 and "XDG_STATE_HOME" not in os.environ:
        return _private("/var/lib/corral")
    state = os.environ.get("XDG_STATE_HOME") or os.path.join(_home(), ".local", "state")
    return _private(os.path.join(state, "corral"))


def runtime_directory() -> str:
    """What belongs to live processes: ``$XDG_RUNTIME_DIR/corral``, ``/run/corral`` as root, else below /tmp."""
    uid = os.geteuid()
    if os.environ.get("XDG_RUNTIME_DIR") and os.path.isdir(os.environ["XDG_RUNTIME_DIR"]):
        return _private(os.path.join(os.environ["XDG_RUNTIME_DIR"], "corral"))
    return _private("/run/corral" if uid == 0 else f"/tmp/corral-{uid}")


def controller_paths() -> tuple[str, str]:
    """The directory of this process among the controllers, and the socket in it that this thread answers on."""
    directory = os.path.join(runtime_directory(), str(os.getpid()))
    return directory, os.path.join(directory, f"{threading.get_native_id()}.sock")
