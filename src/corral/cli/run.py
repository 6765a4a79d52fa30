"""`corral run`: one command in a sandbox of its own, from walls to what is left of it.

This path imports neither asyncio, typer nor pydantic unless an option needs them: a whole `corral run -- true` is
meant to cost little more than starting Python.
"""

from __future__ import annotations

import os
import signal
import socket
import sys
import time
from collections.abc import Callable, Sequence
from contextlib import suppress
from dataclasses import replace
from typing import TYPE_CHECKING

from corral.cli.foreground import Foreground, complain, terminal_size
from corral.cli.options import Arguments
from corral.errors import CorralError, ExecError, RequestError, SandboxClosed
from corral.policy.model import ANY_NAME, Environment, NetworkRule, Policy
from corral.policy.profiles import PROFILES
from corral.reactor import Loop
from corral.sandbox import registry
from corral.sandbox.core import Core, Exit
from corral.sandbox.denials import set_back, summary
from corral.sandbox.options import Listener, Options, user_id
from corral.sandbox.prepare import prepare
from corral.sandbox.view import is_touched

if TYPE_CHECKING:
    from corral.brokers.model.capture import Capture
    from corral.log.asciicast import Tape
    from corral.log.writer import Log
    from corral.monitor.records import Sink
    from corral.sandbox.inward import Forward
    from corral.sandbox.layer import KeptLayer
    from corral.sandbox.prepare import Prepared

RETRY = 2.0
"""Seconds after which it is tried again to keep what could not be kept."""
_RESOURCES = ("cpu", "memory", "processes", "open-files", "disk", "wall-time")


def read_policy(arguments: Arguments) -> Policy:
    """The policy file, if one is named, with what the command line says over it."""
    policy = Policy()
    given = {name.replace("-", "_"): arguments.values[name] for name in _RESOURCES if name in arguments.values}
    named = arguments.values.get("policy", "")
    if named in PROFILES and not given:
        policy = PROFILES[named]
    elif named or given:
        from corral.policy.load import load_policy, override_resources

        if named:
            policy = load_policy(named)
        if given:
            policy = override_resources(policy, given, source="command line")
    read = tuple(os.path.abspath(path) for path in arguments.lists.get("read", ()))
    if read:
        policy = replace(policy, filesystem=replace(policy.filesystem, read=(*policy.filesystem.read, *read)))
    if "env" in arguments.lists:
        policy = replace(policy, environment=_environment(policy.environment, arguments.lists["env"]))
    if "net" in arguments.values:
        policy = _open_to_learn(policy, arguments)
    return policy


def _open_to_learn(policy: Policy, arguments: Arguments) -> Policy:
    """The policy with every name allowed. Addresses that are written out stay as they were, and so does what is
    private, special or the host's own, and whatever is denied."""
    if arguments.values["net"] != "learn":
        raise RequestError(f"--net {arguments.values['net']!r}: the one that there is is `learn`")
    if "record" not in arguments.values:
        raise RequestError("--net learn: say where to record what is used (--record FILE), for `corral policy learn`")
    if "quiet" not in arguments.flags:
        complain("--net learn: this run may reach every public name, by TLS, HTTP, SSH and plain TCP")
    rules = (*(NetworkRule(ANY_NAME, protocol=protocol) for protocol in (None, "http", "ssh", "tcp")),)
    return replace(policy, network=replace(policy.network, allow=(*policy.network.allow, *rules)))


def _environment(environment: Environment, words: Sequence[str]) -> Environment:
    allow, settings = list(environment.allow), dict(environment.set)
    for word in words:
        name, equals, value = word.partition("=")
        if not name.isidentifier() or not name.isascii():
            raise RequestError(f"--env {name!r}: this is not the name of a variable")
        if equals:
            settings[name] = value
        else:
            allow.append(name)
    return replace(environment, allow=tuple(allow), set=tuple(settings.items()))


def read_service(word: str) -> tuple[int, str, int]:
    """``PORT=IP:PORT`` as numbers. Raises RequestError for anything else."""
    inner, _, target = word.partition("=")
    host, _, port = target.rpartition(":")
    host = host.removeprefix("[").removesuffix("]")
    if not (inner.isdecimal() and port.isdecimal() and host and 0 < int(inner) < 65536 and 0 < int(port) < 65536):
        raise RequestError(f"--service {word!r}: write PORT=IP:PORT, for example 8080=127.0.0.1:3000")
    try:
        socket.inet_pton(socket.AF_INET6 if ":" in host else socket.AF_INET, host)
    except OSError:
        raise RequestError(f"--service {word!r}: {host!r} is not an IP address; names are not looked up") from None
    return int(inner), host, int(port)


def read_options(arguments: Arguments) -> tuple[Options, list[tuple[int, str, int]]]:
    """What the sandbox is to be, and where its inward services lead."""
    services = [read_service(word) for word in arguments.lists.get("service", ())]
    if len({port for port, _, _ in services}) < len(services):
        raise RequestError("--service: one port inside cannot lead to two places")
    for name in ("workspace", "root", "policy", "read", "record", "json-result", "record-models", "replay-models"):
        if "" in (arguments.values.get(name), *arguments.lists.get(name, ())):
            raise RequestError(f"--{name}: the path is empty (a variable that is not set?)")
    user = arguments.values.get("user", "agent")
    options = Options(
        workspace=arguments.values.get("workspace", "."),
        policy=read_policy(arguments),
        user=user_id(int(user) if user.isdecimal() else user),
        root=arguments.values.get("root"),
        listeners=tuple(Listener(port) for port, _, _ in services),
        command=arguments.command[0],
        environment=os.environ,
        label=arguments.values.get("label", " ".join(arguments.command)[:200]),
        on=arguments.values.get("on"),
        keep="discard" not in arguments.flags,
        capture=_capture(arguments),
    )
    return options, services


def _capture(arguments: Arguments) -> Callable[[], Capture] | None:
    """What makes the capture of answers of models, where one is wanted."""
    record, replay = arguments.values.get("record-models"), arguments.values.get("replay-models")
    if record is None and replay is None:
        return None
    if record is not None and replay is not None:
        raise RequestError("--record-models and --replay-models: answers are recorded or given again, not both")
    from pathlib import Path

    from corral.brokers.model.capture import Capture, CaptureMode

    mode = CaptureMode.RECORD if record is not None else CaptureMode.REPLAY
    return lambda: Capture(mode, Path(record or replay or ""))


class _Run:
    """The life of one `corral run`; everything happens in callbacks of the loop."""

    def __init__(self, arguments: Arguments) -> None:
        self._arguments = arguments
        self._loop = Loop()
        terminal = True if "terminal" in arguments.flags else False if "no-terminal" in arguments.flags else None
        self._foreground = Foreground(self, terminal=terminal)
        self._interrupted = ""
        self._core: Core | None = None
        self._services: list[tuple[int, str, int]] = []
        self._forwards: list[Forward] = []
        self._number = 0
        self._exit: Exit | None = None
        self._error: CorralError | None = None
        self._log: Log | None = None
        self._tape: Tape | None = None
        self._started = time.time()

    @property
    def core(self) -> Core:
        if self._core is None:
            raise SandboxClosed("it has not been started")
        return self._core

    # ---- Commander ----

    def start(self, stdio: tuple[int, int, int], terminal: bool) -> None:
        self._number = self.core.exec(
            self._arguments.command, stdio, self._ended, terminal=terminal, on_stop=self._foreground.stopped
        )
        self._tape = self.core.tape(self._number, self._arguments.command, terminal_size() if terminal else None)

    def written(self, data: bytes, stream: str) -> None:
        if self._tape is not None:
            self._tape.write(data, stream)

    def signal(self, number: int) -> None:
        self.core.signal(self._number, number)

    def end(self, reason: str) -> None:
        self._interrupted = self._interrupted or reason
        if self._core is not None:
            self._core.kill(reason)

    # ---- life ----

    def _ready(self, error: CorralError | None) -> None:
        if error:
            self._error = error
            return
        try:
            if self._interrupted:
                raise SandboxClosed(self._interrupted)
            registry.register(self.core, self._loop)
            if self._services:
                from corral.sandbox.inward import Forward

                for listener, (_, host, port) in zip(self.core.listeners, self._services, strict=True):
                    self._forwards.append(Forward(self._loop, listener, host, port))
            prepared = self.core.prepared
            self._foreground.start(self.core.root_fd, prepared.identity.outside(prepared.options.user))
        except CorralError as failure:
            self._error = failure
            self.core.kill(str(failure))

    def _ended(self, result: Exit) -> None:
        self._exit = result
        self._error = result.error
        self.core.kill("closed")

    def run(self) -> int:
        self._foreground.catch_signals()
        self._loop.heed_signals()
        try:
            options, self._services = read_options(self._arguments)
            prepared = prepare(self._open_log(options))
            if self._interrupted:
                prepared.identity.release()
                raise SandboxClosed(self._interrupted)
            self._core = core = self._make(prepared)
            core.when_ready(self._ready)
            core.when_ended(self._loop.stop)
            self._foreground.finish(self._loop.run)
            for forward in self._forwards:
                forward.close()
            registry.unregister(core)
            self._close_chronicle()
            kept = self._keep()
            core.close_layer()
            self._close_log()
        except CorralError as error:
            self._foreground.abandon()
            self._close_log()
            complain(str(error))
            return self._interrupted_code() or error.exit_code
        except BaseException:
            self._foreground.abandon()
            if self._core is not None:
                self._core.kill("corral failed")
            raise
        return self._conclude(core, kept)

    def _open_log(self, options: Options) -> Options:
        """Opens the log, where there is to be one, and hides it from the sandbox."""
        if "log" not in self._arguments.values:
            return options
        from pathlib import Path

        from corral.log.places import files_of, make_payloads, open_log

        self._log = open_log(Path(self._arguments.values["log"]))
        if options.policy.log.keep:
            make_payloads(self._log.directory)
        place = (str(self._log.directory), self._log.origin)
        return replace(options, hidden=files_of(self._log.directory), log=place)

    def _make(self, prepared: Prepared) -> Core:
        if self._log is None:
            return Core(prepared, self._loop, self._sinks())
        from corral.sandbox.recording import recorded

        return recorded(self._log, prepared, self._loop, self._sinks())

    def _close_chronicle(self) -> None:
        if self._tape is not None:
            self._tape.close(is_whole=self._foreground.has_all)
        if self._core is not None:
            try:
                self._core.close_chronicle()
            except CorralError as error:
                self._error = self._error or error

    def _close_log(self) -> None:
        """What is recorded is signed for when this returns; if it cannot be, that is what the caller must know."""
        if self._log is not None:
            self._close_chronicle()
            try:
                self._log.close()
            except CorralError as error:
                self._error = self._error or error

    def _sinks(self) -> tuple[Sink, ...]:
        """Who is told of decisions, beside the sandbox itself."""
        path = self._arguments.values.get("record")
        if path is None:
            return ()
        from corral.monitor.jsonl import JsonLines, RecordFull

        try:
            # A new file: what is there already is somebody's record, or a link that somebody planted.
            return (JsonLines(os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, 0o600)),)
        except FileExistsError:
            raise RequestError(f"--record {path}: it exists already; a record is always a new file") from None
        except OSError as error:
            raise RequestError(f"--record {path}: {error.strerror}") from None
        except RecordFull as error:
            os.unlink(path)
            raise RequestError(f"--record {path}: {error}") from None

    def _keep(self) -> KeptLayer | None:
        """The layer, where there are changes."""
        core = self.core
        if "discard" in self._arguments.flags or self._exit is None or isinstance(self._exit.error, ExecError):
            return None
        if not is_touched(core.prepared.view, core.layer_fd):
            return None
        from corral.sandbox.keeping import keep

        return self._once_there_is_room(lambda: keep(core.prepared, core.layer_fd, since=core.since))

    def _once_there_is_room(self, keep: Callable[[], KeptLayer | None]) -> KeptLayer | None:
        """What cannot be kept is not lost as long as a person can make room: it waits, on a terminal, until there is
        some, or Ctrl-C. Elsewhere nobody would come."""
        told = False
        while True:
            try:
                return keep()
            except CorralError as error:
                if not (os.isatty(0) and os.isatty(2)):
                    raise CorralError(f"{error}. They are lost") from None
                if not told:
                    self._foreground.heed_interrupts()
                    complain(f"{error}. They are still in memory, and this is tried again; Ctrl-C drops them")
                told = True
                if self._foreground.is_interrupted(RETRY):
                    raise CorralError("the changes were not kept, and are lost") from None

    def _interrupted_code(self) -> int:
        """What a shell shows for a job that a signal ended, or 0."""
        return 128 + self._foreground.interrupted if self._foreground.interrupted else 0

    def _conclude(self, core: Core, kept: KeptLayer | None) -> int:
        error = self._error
        killed = self._exit is None or isinstance(error, SandboxClosed)
        code = 125
        if isinstance(error, SandboxClosed) or (self._exit is None and error is None):
            code = self._interrupted_code() or registry.KILLED
            complain(f"the sandbox was ended: {core.end_reason}")
        elif error:
            code = error.exit_code
            complain(str(error))
        elif self._exit:
            code = self._exit.code
        exit = self._exit
        quiet = "quiet" in self._arguments.flags or isinstance(error, ExecError)  # which says it itself
        if exit and not quiet and (exit.denials or exit.denials_dropped):
            complain(summary(exit.denials, exit.denials_dropped, place=""))
        if exit and exit.restored and not quiet:
            complain(set_back(exit.restored))
        if kept and "quiet" not in self._arguments.flags:
            sys.stderr.write(
                f"corral: {kept.count} change{'s' if kept.count != 1 else ''} kept: "
                f"`corral diff {kept.id}` shows them, `corral discard {kept.id}` drops them\n"
            )
        if "json" in self._arguments.flags or "json-result" in self._arguments.values:
            self._write_result(core, kept, code, killed)
        return code

    def _write_result(self, core: Core, kept: KeptLayer | None, code: int, killed: bool) -> None:
        import json

        usage = self._exit.usage if self._exit else None
        result = {
            "sandbox": core.prepared.id,
            "exit_code": code,
            "ended": core.end_reason if killed else "exited",
            "error": str(self._error) if self._error else None,
            "layer": kept.id if kept else None,
            "changes": kept.count if kept else 0,
            "seconds": round(time.time() - self._started, 3),
            "cpu_seconds": usage.user_seconds + usage.system_seconds if usage else None,
            "max_rss": usage.max_rss if usage else None,
            "refused": sum(denial.count for denial in self._exit.denials) + self._exit.denials_dropped
            if self._exit
            else 0,
        }
        text = json.dumps(result) + "\n"
        path = self._arguments.values.get("json-result")
        if path is None:
            sys.stderr.write(text)
            return
        try:
            with open(path, "w", encoding="utf-8") as file:
                file.write(text)
        except OSError as error:
            complain(f"--json-result {path}: {error.strerror}")


def run(arguments: Arguments) -> int:
    """Runs a command in a new sandbox and returns the exit code for the caller's shell."""
    code = _Run(arguments).run()
    with suppress(BrokenPipeError):
        sys.stdout.flush()
    # A late signal must not replace the exit code by Python's own.
    for number in registry.SIGNALS_PASSED_ON:
        signal.signal(number, signal.SIG_IGN)
    return code
