"""The sandboxes of this machine: how another terminal finds them and talks to those who control them.

Each controlling process has one directory, ``<runtime>/<pid>``, with one socket for each of its threads that controls
sandboxes; it answers for all of that thread's.
The directory is 0700 and the peer is checked, so only the same user (and root) gets in, and never from inside a
sandbox, where nothing can even see it. Directories of dead controllers are removed by their keepers and at every start.

Protocol: SOCK_SEQPACKET, one JSON object a message, at most MAX_MESSAGE bytes; descriptors by SCM_RIGHTS. A longer one
(a long command line) comes as {"long": true} with a sealed memfd as the first descriptor.
"""

from __future__ import annotations

import array
import fcntl
import json
import os
import signal
import socket
import struct
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import suppress
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from corral.errors import CorralError, RequestError, SandboxClosed
from corral.reactor import Reactor
from corral.sandbox import cgroups, paths
from corral.sandbox.channel import sealed_memfd
from corral.sandbox.core import Core, Exit, State
from corral.sandbox.denials import set_back, summary
from corral.sandbox.options import check_text
from corral.sandbox.peers import Peer, peer_of

if TYPE_CHECKING:
    from corral.sandbox.layer import KeptLayer
    from corral.sandbox.snapshots import Taking

MAX_MESSAGE = 128 << 10
MAX_LONG_MESSAGE = 16 << 20
MAX_CLIENTS = 64
_ONE_AT_A_TIME = ("exec", "restore", "snapshot")
"""What may have to wait, and holds something until then."""
MAX_NAME = 200
"""Characters of what somebody calls a snapshot."""
KILLED = 128 + signal.SIGKILL
"""Exit code of a command that ended with its sandbox."""
_TIMEOUT = 5.0
_REAPING = 0.5
"""Seconds of a start that may go into removing what others have left; the rest is for the next."""


def reap_dead_controllers() -> None:
    """Removes what controllers that have died left behind: directories, groups, half-kept layers."""
    runtime = paths.runtime_directory()
    for name in os.listdir(runtime):
        if name.isdecimal() and not os.path.exists(f"/proc/{name}"):
            with suppress(OSError):
                for socket_name in os.listdir(os.path.join(runtime, name)):
                    os.unlink(os.path.join(runtime, name, socket_name))
                os.rmdir(os.path.join(runtime, name))
    cgroups.reap_dead()
    with suppress(OSError):
        if any(name.startswith("partial-") for name in os.listdir(os.path.join(paths.state_directory(), "layers"))):
            from corral.sandbox.layer import reap_partials  # slow to load, and seldom needed

            reap_partials(time.monotonic() + _REAPING)
    with suppress(OSError):
        if any(name.startswith("busy-") for name in os.listdir(os.path.join(paths.state_directory(), "applies"))):
            from corral.sandbox.apply.recovery import recover

            with suppress(CorralError):  # it is told by `corral apply`, which does not go on before it is mended
                recover()


@dataclass(frozen=True, slots=True)
class Entry:
    """One line of `corral ps`."""

    id: str
    pid: int
    """The controlling process."""
    state: str
    user: int
    workspace: str
    label: str
    started_at: float
    keeper: int


def _describe(core: Core) -> dict[str, Any]:
    options = core.prepared.options
    return {
        "id": core.prepared.id,
        "pid": os.getpid(),
        "state": core.state.value,
        "user": options.user,
        "workspace": core.prepared.directory,
        "label": options.label,
        "started_at": core.started_at,
        "keeper": core.keeper,
    }


def send(connection: socket.socket, message: dict[str, Any], fds: Sequence[int] = ()) -> None:
    text = json.dumps(message).encode()
    if len(text) > MAX_LONG_MESSAGE:
        raise RequestError(f"a request of {len(text)} bytes is too long; at most {MAX_LONG_MESSAGE} are passed on")
    long = -1
    if len(text) > MAX_MESSAGE:
        long = sealed_memfd("corral-message", text)
        text, fds = b'{"long": true}', (long, *fds)
    try:
        rights = [(socket.SOL_SOCKET, socket.SCM_RIGHTS, array.array("i", fds))] if fds else []
        connection.sendmsg([text], rights, socket.MSG_NOSIGNAL)
    finally:
        if long >= 0:
            os.close(long)


def _read_long(fd: int) -> bytes:
    """The content of a memfd that cannot change any more. Raises OSError or ValueError for any other file."""
    if not fcntl.fcntl(fd, fcntl.F_GET_SEALS) & fcntl.F_SEAL_WRITE or os.fstat(fd).st_size > MAX_LONG_MESSAGE:
        raise ValueError("a long message that is not sealed, or too long")
    return os.pread(fd, MAX_LONG_MESSAGE, 0)


def _receive(connection: socket.socket, limit: int = 8) -> tuple[dict[str, Any], list[int]] | None:
    data, ancillary, flags, _ = connection.recvmsg(MAX_MESSAGE, socket.CMSG_SPACE(4 * limit), socket.MSG_CMSG_CLOEXEC)
    fds = array.array("i")
    for level, kind, content in ancillary:
        if level == socket.SOL_SOCKET and kind == socket.SCM_RIGHTS:
            fds.frombytes(content[: len(content) - len(content) % fds.itemsize])
    if not data and not fds:
        return None
    try:
        message = json.loads(data)
        if message == {"long": True} and fds:
            message = json.loads(_read_long(fds[0]))
            os.close(fds.pop(0))
        if flags & (socket.MSG_TRUNC | socket.MSG_CTRUNC) or not isinstance(message, dict):
            raise ValueError("not one whole message")
    except (OSError, ValueError, RecursionError) as error:
        for fd in fds:
            os.close(fd)
        raise CorralError(f"the other side sent something that is no message: {error}") from None
    return message, list(fds)


class _Client:
    """One connection from another terminal."""

    def __init__(self, server: _Server, connection: socket.socket, peer: Peer) -> None:
        self._server, self._connection, self._peer = server, connection, peer
        self._exec: tuple[Core, int] | None = None
        self._taking: Taking | None = None
        self._waits = False
        """Whether one of these was asked for and is not answered yet."""
        connection.setblocking(False)
        server.reactor.add_reader(connection.fileno(), self._readable)

    def close(self) -> None:
        if self._connection.fileno() >= 0:
            self._server.reactor.remove_reader(self._connection.fileno())
            self._connection.close()
        if self._exec:
            core, number = self._exec
            self._exec = None
            core.kill_session(number)  # whoever asked for it is gone
        if self._taking:
            self._taking.abandoned = True
        self._server.clients.discard(self)

    def _answer(self, message: dict[str, Any], fds: Sequence[int] = ()) -> None:
        try:
            send(self._connection, message, fds)
        except OSError:
            self.close()

    def _readable(self) -> None:
        fds: list[int] = []
        try:
            received = _receive(self._connection)
            if received is None:
                self.close()
                return
            message, fds = received
            self._handle(message, fds)
        except BlockingIOError:
            pass
        except Exception as error:
            self._refuse(error)
        finally:
            for fd in fds:
                os.close(fd)

    def _refuse(self, error: Exception) -> None:
        """What has gone wrong is the answer: whatever a peer sends, the controller and its sandboxes live on."""
        if isinstance(error, CorralError):
            self._answer({"error": str(error), "exit_code": error.exit_code})
        else:
            self._answer({"error": f"the request is malformed: {error!r}", "exit_code": 125})

    def _later(self, core: Core, what: Callable[[], None], fds: Sequence[int] = ()) -> None:
        """Does it once no snapshot is being taken and no files go back, if its client still waits then; closes ``fds``
        after it."""

        def at_last() -> None:
            try:
                if self._connection.fileno() >= 0:
                    what()
            except Exception as error:
                self._refuse(error)
            finally:
                for fd in fds:
                    os.close(fd)

        core.when_moving(at_last)

    def _handle(self, message: dict[str, Any], fds: list[int]) -> None:
        verb = message["verb"]
        if verb == "list":
            self._answer({"sandboxes": [_describe(core) for core in self._server.cores.values()]})
            return
        core = self._server.cores.get(message["id"])
        if core is None:
            raise RequestError(f"there is no sandbox {message['id']!r} here")
        if self._waits and verb in _ONE_AT_A_TIME:
            raise RequestError("what was asked for before on this connection is not answered yet")
        if verb == "kill":
            core.kill("killed by `corral kill`")
            core.when_ended(lambda: self._answer({"done": True}))
        elif verb == "freeze":
            self._later(core, lambda: self._freeze(core))
        elif verb == "thaw":
            self._later(core, lambda: self._thaw(core))
        elif verb == "open":
            user = message.get("user", core.prepared.options.user)
            described = _describe(core) | {
                "environment": core.environment(user),
                "outside": core.prepared.identity.outside(user),
            }
            self._answer(described, (core.root_fd,))
        elif verb == "exec":
            self._start_moving(core, message, fds)
        elif verb == "snapshot":
            name = check_text("name", str(message.get("name", ""))[:MAX_NAME])
            self._waits = True
            self._taking = core.snapshots.take(self._taken, name=name)
        elif verb == "restore":
            from corral.sandbox.layer import open_layer

            layer = open_layer(str(message["layer"]))
            self._waits = True
            try:
                core.snapshots.restore(self._taken, layer)
            except RequestError:  # it does not fit
                self._waits = False
                raise
        elif verb == "signal" and self._exec:
            self._exec[0].signal(self._exec[1], int(message["number"]))
        elif verb in ("pending", "answer"):
            self._approvals(core, message)
        elif verb == "flows":
            self._flows(core)
        else:
            raise RequestError(f"unknown verb {verb!r}")

    def _approvals(self, core: Core, message: dict[str, Any]) -> None:
        from corral.approvals.waiting import page, take_answer  # most sandboxes are never asked for

        queue = core.supervision.approvals
        if message["verb"] == "answer":
            self._answer(take_answer(queue, message, str(self._peer)))
        else:
            self._answer(page(core.prepared.id, queue, message))

    def _flows(self, core: Core) -> None:
        from corral.monitor.jsonl import flow_fields

        egress = core.supervision.egress
        flows = [] if egress is None else egress.live()
        self._answer({"flows": [flow_fields(flow) for flow in flows], "gateway": egress is not None})

    def _wait_frozen(self, core: Core, tries: int = 2000) -> None:
        if core.state is State.ENDED or core.frozen():
            self._answer({"done": True})
        elif core.state is not State.FROZEN:
            self._answer({"error": "it was thawed before all had stopped", "exit_code": 125})
        elif tries == 0:
            core.kill("it could not be frozen")
            self._answer({"error": "it could not be frozen and was killed", "exit_code": 125})
        else:
            self._server.reactor.call_later(0.005, self._wait_frozen, core, tries - 1)

    def _freeze(self, core: Core) -> None:
        core.freeze()
        self._wait_frozen(core)

    def _thaw(self, core: Core) -> None:
        core.thaw()
        self._answer({"done": True})

    def _taken(self, result: KeptLayer | CorralError) -> None:
        self._taking, self._waits = None, False
        if isinstance(result, CorralError):
            self._answer({"error": str(result), "exit_code": result.exit_code})
        else:
            self._answer({"layer": result.id})

    def _start_moving(self, core: Core, message: dict[str, Any], fds: list[int]) -> None:
        """Starts a command, once no snapshot is being taken any more."""
        if not core.is_kept_still:
            self._start(core, message, fds)
            return
        held = [os.dup(fd) for fd in fds]
        self._waits = True

        def start() -> None:
            self._waits = False
            self._start(core, message, held)

        self._later(core, start, held)

    def _start(self, core: Core, message: dict[str, Any], fds: list[int]) -> None:
        if self._exec or len(fds) != 3:
            raise RequestError("one command a connection, with three descriptors")
        number = core.exec(
            [str(word) for word in message["argv"]],
            (fds[0], fds[1], fds[2]),
            self._ended,
            env={str(name): str(value) for name, value in message["env"].items()},
            directory=message["directory"],
            user=message["user"],
            terminal=bool(message["terminal"]),
            on_stop=lambda which: self._answer({"stopped": which}),
        )
        self._exec = (core, number)
        self._answer({"started": number})

    def _ended(self, result: Exit) -> None:
        self._exec = None
        error: dict[str, Any] = {}
        if result.error:  # a command that the end of its sandbox ended was killed, as for `corral run`
            code = KILLED if isinstance(result.error, SandboxClosed) else result.error.exit_code
            error = {"error": str(result.error), "exit_code": code}
        elif result.denials or result.denials_dropped:
            error = {"refused": summary(result.denials, result.denials_dropped)}
        restored = {"restored": set_back(result.restored)} if result.restored else {}
        self._answer({"status": result.status} | error | restored)


class _Server:
    """Answers for all sandboxes of one reactor, in its thread."""

    def __init__(self, reactor: Reactor) -> None:
        self.pid = os.getpid()
        self.reactor = reactor
        self.cores: dict[str, Core] = {}
        self.clients: set[_Client] = set()
        reap_dead_controllers()
        directory, path = paths.controller_paths()
        self.path = path
        with suppress(FileExistsError):
            os.mkdir(directory, 0o700)
        self._listener = socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        self._listener.setblocking(False)
        with suppress(FileNotFoundError):
            os.unlink(path)
        self._listener.bind(path)
        self._listener.listen(MAX_CLIENTS)
        reactor.add_reader(self._listener.fileno(), self._accept)

    def _accept(self) -> None:
        try:
            connection, _ = self._listener.accept()
        except OSError:
            return
        peer = peer_of(connection)
        if len(self.clients) >= MAX_CLIENTS or not peer.is_operator():
            connection.close()
            return
        self.clients.add(_Client(self, connection, peer))

    def close(self) -> None:
        with suppress(RuntimeError):  # the loop may be closed already
            self.reactor.remove_reader(self._listener.fileno())
        self._listener.close()
        for client in list(self.clients):
            client.close()
        with suppress(OSError):
            os.unlink(self.path)
        with suppress(OSError):  # another thread's socket may still be there
            os.rmdir(os.path.dirname(self.path))


_servers: dict[int, _Server] = {}  # by native thread id; each touched by its own thread only


def register(core: Core, reactor: Reactor) -> None:
    """Makes a sandbox known to other terminals. Called in the thread of its reactor."""
    key = threading.get_native_id()
    server = _servers.get(key)
    if server is None or server.pid != os.getpid() or server.reactor is not reactor:
        server = _servers[key] = _Server(reactor)
    server.cores[core.prepared.id] = core


def unregister(core: Core) -> None:
    """Forgets a sandbox; with the last one of its thread the socket goes away."""
    server = _servers.get(threading.get_native_id())
    if server is None:
        return
    server.cores.pop(core.prepared.id, None)
    if not server.cores and server.pid == os.getpid():
        server.close()
        del _servers[threading.get_native_id()]


# ---- the other side ----


class Connection:
    """A connection to the controller of one or more sandboxes."""

    def __init__(self, path: str) -> None:
        self.socket = socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        # Not settimeout: a non-blocking connect to a server that is busy fails at once instead of waiting (unix(7)).
        self.socket.setsockopt(socket.SOL_SOCKET, socket.SO_SNDTIMEO, struct.pack("ll", int(_TIMEOUT), 0))
        try:
            self.socket.connect(path)
            self.socket.settimeout(_TIMEOUT)
        except OSError:
            self.socket.close()
            raise

    def ask(self, message: dict[str, Any], fds: Sequence[int] = ()) -> tuple[dict[str, Any], list[int]]:
        """One question, one answer. Raises RequestError with the other side's reason when it refuses."""
        send(self.socket, message, fds)
        return self.answer()

    def answer(self) -> tuple[dict[str, Any], list[int]]:
        """The next message. Raises RequestError for an error or the end of the connection."""
        try:
            received = _receive(self.socket)
        except TimeoutError:
            raise RequestError("the sandbox's controller does not answer") from None
        if received is None:
            raise RequestError("the sandbox has ended")
        message, fds = received
        if "error" in message and "status" not in message:
            raise RequestError(str(message["error"]))
        return message, fds

    def close(self) -> None:
        """Hangs up; a command that was started over this connection is killed."""
        self.socket.close()


def connections() -> Iterator[tuple[Connection, str]]:
    """Connections to all controllers of this user, with the paths of their sockets; whoever takes one closes it."""
    runtime = paths.runtime_directory()
    for name in sorted(os.listdir(runtime)):
        if not name.isdecimal():
            continue
        with suppress(OSError):
            for socket_name in os.listdir(os.path.join(runtime, name)):
                path = os.path.join(runtime, name, socket_name)
                with suppress(OSError):
                    yield Connection(path), path


def _entries() -> Iterator[tuple[Entry, str]]:
    for connection, path in connections():
        try:
            message, _ = connection.ask({"verb": "list"})
            for entry in message["sandboxes"]:
                yield Entry(**entry), path
        except (RequestError, OSError):
            continue  # a controller that ends just now, or hangs
        finally:
            connection.close()


def list_sandboxes() -> list[Entry]:
    """All sandboxes of this user on this machine whose controllers answer, oldest first."""
    return sorted((entry for entry, _ in _entries()), key=lambda entry: entry.started_at)


def find_sandbox(name: str) -> tuple[Connection, Entry]:
    """The sandbox whose id is or begins with ``name``. Raises RequestError when there is none, or more than one."""
    matches = [(entry, path) for entry, path in _entries() if name and entry.id.startswith(name)]
    if len(matches) != 1:
        what = "several sandboxes have ids that begin with" if matches else "there is no live sandbox"
        raise RequestError(f"{what} {name!r}; `corral ps` lists them")
    entry, path = matches[0]
    return Connection(path), entry


SIGNALS_PASSED_ON = (signal.SIGTERM, signal.SIGHUP, signal.SIGINT, signal.SIGQUIT, signal.SIGUSR1, signal.SIGUSR2)
"""What `corral run` and `corral exec` hand to the command instead of acting on it."""
