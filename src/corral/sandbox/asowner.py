"""Doing a piece of work as the owner of a layer's files, where the caller alone may not read them.

An ordinary user's layer can hold directories of mode 000, and files of ids from the user's subordinate range. Neither
needs a privilege: a process that makes a user namespace with the same ids has CAP_DAC_OVERRIDE over exactly these
files (user_namespaces(7)). A thread cannot make one in a process that has others, so it is done in a child process,
which costs about a tenth of a second and is used only when something turned out to be unreadable.

The child gets descriptors under their own numbers and a JSON request on its standard input; it answers with JSON.
"""

from __future__ import annotations

import json
import os
import sys
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any

from corral.errors import CorralError
from corral.sandbox.ownership import Ids
from corral.sandbox.plan import IdLine

if TYPE_CHECKING:
    import subprocess

_CLONE_NEWUSER = 0x10000000
_BOOT = "import json, sys; sys.path[:] = json.loads(sys.argv[1]); from corral.sandbox.asowner import serve; serve()"


class Helper:
    """A helper process at work; used as a context manager."""

    def __init__(self, process: subprocess.Popen[str]) -> None:
        self._process = process

    def __enter__(self) -> Helper:
        return self

    def __exit__(self, *_: object) -> None:
        self._process.__exit__(None, None, None)

    def kill(self) -> None:
        """Ends it."""
        self._process.kill()

    def result(self) -> Any:
        """What came of it. Raises CorralError."""
        assert self._process.stdout is not None  # noqa: S101 - for the type checker
        try:
            answer = json.loads(self._process.stdout.read() or '{"error": "the helper process died"}')
        except (OSError, ValueError) as error:
            self._process.kill()
            raise CorralError(f"cannot read the layer as its owner: {error}") from None
        except BaseException:
            self._process.kill()
            raise
        if "error" in answer:
            raise CorralError(str(answer["error"]))
        return answer["result"]


def call(operation: str, fds: Sequence[int], request: dict[str, Any], ids: Ids | None, *, join: int = -1) -> Any:
    """Carries out ``operation`` (see :func:`_operations`) in a user namespace with the given ids, or in the one behind
    the descriptor ``join``.

    Raises CorralError where that cannot be.
    """
    with begin(operation, fds, request, ids, join=join) as helper:
        return helper.result()


def begin(
    operation: str, fds: Sequence[int], request: dict[str, Any], ids: Ids | None = None, *, join: int = -1
) -> Helper:
    """As :func:`call`, and does not wait for the end."""
    import subprocess  # rarely needed, and slow to load

    process = subprocess.Popen(
        [sys.executable, "-I", "-c", _BOOT, json.dumps([path for path in sys.path if path]), str(join)],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        stderr=subprocess.DEVNULL,
        pass_fds=fds,
        text=True,
        cwd="/",
    )
    assert process.stdin is not None and process.stdout is not None  # noqa: S101 - for the type checker
    try:
        if process.stdout.readline() != "ready\n":
            raise CorralError("the layer holds files that only a user namespace can read, and none can be made")
        own = None
        if ids is not None and len(ids.uids) > 1:
            _map("newuidmap", process.pid, ids.uids)
            _map("newgidmap", process.pid, ids.gids)
        elif ids is not None:
            own = [lines[0].inside if lines else 0 for lines in (ids.uids, ids.gids)]
        process.stdin.write(json.dumps({"own": own, "operation": operation, "request": request}))
        process.stdin.close()
    except BaseException as error:
        process.kill()
        process.__exit__(None, None, None)
        if isinstance(error, OSError | ValueError):
            raise CorralError(f"cannot read the layer as its owner: {error}") from None
        raise
    return Helper(process)


def _map(program: str, pid: int, lines: Sequence[IdLine]) -> None:
    import shutil
    import subprocess

    path = shutil.which(program, path="/usr/bin:/bin:/usr/local/bin")
    if path is None:
        raise CorralError(f"the layer holds files of other ids, and {program} is not installed to read them")
    numbers = [str(number) for line in lines for number in (line.inside, line.outside, line.length)]
    ended = subprocess.run([path, str(pid), *numbers], stdin=subprocess.DEVNULL, capture_output=True, check=False)
    if ended.returncode != 0:
        raise CorralError(f"{program} refused: {ended.stderr.decode(errors='replace').strip()}")


def _operations() -> dict[str, Callable[[dict[str, Any]], Any]]:
    from corral.sandbox import account, between, changes, copying, patch, restore, selected

    return {
        "between": between.serve,
        "changes": changes.serve,
        "copy": copying.serve,
        "files": selected.serve,
        "measure": account.serve,
        "patch": patch.serve,
        "receive": restore.receive,
        "restore": restore.serve,
    }


def _write(path: str, text: str) -> None:
    with open(path, "w", encoding="ascii") as file:
        file.write(text)


def serve() -> None:
    """The child's side."""
    uid, gid = os.geteuid(), os.getegid()
    import ctypes

    libc = ctypes.CDLL(None, use_errno=True)
    operations, join = _operations(), int(sys.argv[2])
    if join >= 0:
        if libc.setns(join, _CLONE_NEWUSER) != 0:
            return
    elif libc.unshare(_CLONE_NEWUSER) != 0:
        return
    print("ready", flush=True)
    answer: dict[str, Any]
    try:
        message = json.loads(sys.stdin.read())
        if message["own"] is not None:
            _write("/proc/self/setgroups", "deny")
            _write("/proc/self/uid_map", f"{message['own'][0]} {uid} 1")
            _write("/proc/self/gid_map", f"{message['own'][1]} {gid} 1")
        if "become" in message["request"]:
            # Files can only be made as somebody whom their file system knows. This takes no capability away, as this
            # process was not root of its namespace before (capabilities(7)).
            user, group = message["request"]["become"]
            os.setgroups([])
            os.setresgid(group, group, group)
            os.setresuid(user, user, user)
        answer = {"result": operations[message["operation"]](message["request"])}
    except Exception as error:
        # Whatever it is, the parent must hear it, and it alone decides what to tell.
        answer = {"error": str(error) or type(error).__name__}
    sys.stdout.write(json.dumps(answer))
    sys.stdout.flush()
