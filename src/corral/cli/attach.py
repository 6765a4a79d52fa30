"""`corral exec`: one more command in a sandbox that another process controls.

The command's ends are made here and handed to the controller, so its bytes never pass through that process; when this
process goes away, the controller kills the command.
"""

from __future__ import annotations

import os
import signal
from collections.abc import Mapping, Sequence
from contextlib import suppress

from corral.cli.foreground import Foreground, complain
from corral.errors import CorralError, RequestError
from corral.reactor import Loop
from corral.sandbox import registry
from corral.sandbox.options import user_id


class _Attached:
    def __init__(
        self,
        connection: registry.Connection,
        argv: Sequence[str],
        env: Mapping[str, str],
        directory: str | None,
        user: int | None,
        terminal: bool | None,
    ) -> None:
        self._connection = connection
        self._argv, self._env, self._directory, self._user = argv, env, directory, user
        self._loop = Loop()
        self._foreground = Foreground(self, terminal=terminal)
        self._code = 125
        self._told: list[str] = []
        self._ended = False

    # ---- Commander ----

    def written(self, data: bytes, stream: str) -> None:
        """The process that holds the sandbox records it, and does not see this."""

    def start(self, stdio: tuple[int, int, int], terminal: bool) -> None:
        request = {
            "verb": "exec",
            "id": self._id,
            "argv": list(self._argv),
            "env": self._environment,
            "directory": self._directory,
            "user": self._user,
            "terminal": terminal,
        }
        self._connection.ask(request, stdio)

    def signal(self, number: int) -> None:
        with suppress(OSError):
            registry.send(self._connection.socket, {"verb": "signal", "id": self._id, "number": int(number)})

    def end(self, reason: str) -> None:
        self._foreground.abandon()
        complain(reason)
        self._connection.close()
        os._exit(128 + (self._foreground.interrupted or signal.SIGTERM))

    # ---- life ----

    def run(self, sandbox: str) -> int:
        self._id = sandbox
        request = {"verb": "open", "id": sandbox}
        described, fds = self._connection.ask(request if self._user is None else request | {"user": self._user})
        self._environment = described["environment"] | dict(self._env)
        self._foreground.catch_signals()
        self._loop.heed_signals()
        try:
            self._foreground.start(fds[0], described["outside"])
        finally:
            for fd in fds:
                os.close(fd)
        self._connection.socket.settimeout(None)
        self._loop.add_reader(self._connection.socket.fileno(), self._readable)
        self._foreground.finish(self._loop.run)
        for line in self._told:
            complain(line)
        return self._code

    def _readable(self) -> None:
        try:
            message, _ = self._connection.answer()
        except (CorralError, OSError) as error:
            complain(str(error))
            self._code = registry.KILLED
            self._loop.stop()
            return
        if "stopped" in message:
            self._foreground.stopped(int(message["stopped"]))
        elif "status" in message:
            if "error" in message:
                complain(message["error"])
                self._code = int(message["exit_code"])
            else:
                status = int(message["status"])
                self._code = 128 + os.WTERMSIG(status) if os.WIFSIGNALED(status) else os.WEXITSTATUS(status)
                self._told = [str(message[name]) for name in ("refused", "restored") if name in message]
            self._loop.stop()


def attach(
    name: str,
    argv: Sequence[str],
    *,
    env: Sequence[str] = (),
    directory: str | None = None,
    user: str | None = None,
    terminal: bool | None = None,
) -> int:
    """Runs ``argv`` in the live sandbox ``name`` and returns its exit code.

    Raises RequestError when there is no such sandbox or it refuses.
    """
    settings = {}
    for word in env:
        key, equals, value = word.partition("=")
        if not equals or not key.isidentifier():
            raise RequestError(f"--env {word!r}: write NAME=VALUE")
        settings[key] = value
    number = None if user is None else user_id(int(user) if user.isdecimal() else user)
    connection, entry = registry.find_sandbox(name)
    return _Attached(connection, argv, settings, directory, number, terminal).run(entry.id)
