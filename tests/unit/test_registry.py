"""The control socket under fire: whatever a peer sends, the controller answers or hangs up, and lives on.

The sandbox behind it is a stand-in, so that every verb can be reached without walls.
"""

from __future__ import annotations

import array
import json
import os
import socket
import struct
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import suppress
from pathlib import Path
from typing import Any, ClassVar

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from corral.errors import RequestError
from corral.reactor import Loop
from corral.sandbox import channel, registry
from corral.sandbox.channel import sealed_memfd
from corral.sandbox.core import Exit, State
from corral.sandbox.identity import Identity
from corral.sandbox.options import Options
from corral.sandbox.plan import IdLine


class StandIn:
    """As much of a Core as the server uses. Requests to the launcher are encoded, as the real one does."""

    supervision: Any  # given by tests that need one
    snapshots: Any
    is_kept_still = False
    waiting: ClassVar[list[Callable[[], None]]] = []

    class prepared:  # noqa: N801 - stands for an attribute
        id = "standinx"
        options = Options("/workspace", label="label")
        identity = Identity((IdLine(1000, 1000, 1),), (IdLine(1000, 1000, 1),))
        directory = "/workspace"
        environment = {"A": "b"}

    def __init__(self) -> None:
        self.state = State.RUNNING
        self.started_at = 1.0
        self.keeper = 0
        self.root_fd = os.open("/", os.O_PATH | os.O_CLOEXEC)
        self.killed: list[int] = []
        self.signals: list[bytes] = []
        self.commands: list[bytes] = []

    def environment(self, user: int | None = None) -> dict[str, str]:
        return dict(self.prepared.environment)

    def kill(self, reason: str) -> None:
        self.state = State.ENDED

    def when_ended(self, callback: Callable[[], None]) -> None:
        callback()

    def when_moving(self, callback: Callable[[], None]) -> None:
        if self.is_kept_still:
            self.waiting.append(callback)
        else:
            callback()

    def freeze(self) -> None:
        self.state = State.FROZEN

    def frozen(self) -> bool:
        return True

    def thaw(self) -> None:
        self.state = State.RUNNING

    def exec(self, argv: Any, stdio: Any, on_exit: Callable[[Exit], None], **how: Any) -> int:
        user = 1000 if how["user"] is None else how["user"]
        self.commands.append(channel.encode_exec(argv, how["env"], how["directory"] or "/", user, user))
        return len(self.commands)

    def signal(self, number: int, which: int) -> None:
        self.signals.append(channel._REQUEST.pack(3, number, which, 0))

    def kill_session(self, number: int) -> None:
        self.killed.append(number)


class Server:
    """A registry server in a thread of its own."""

    def __init__(self) -> None:
        self.core = StandIn()
        self.loop = Loop()
        self.crash: BaseException | None = None
        self.path = ""
        ready = threading.Event()
        self._wake, self._stop = os.pipe()
        self._thread = threading.Thread(target=self._serve, args=(ready,), daemon=True)
        self._thread.start()
        assert ready.wait(10)

    def _serve(self, ready: threading.Event) -> None:
        registry.register(self.core, self.loop)  # type: ignore[arg-type]
        self.server = registry._servers[threading.get_native_id()]
        self.path = self.server.path
        self.loop.add_reader(self._wake, self.loop.stop)
        self._poked, self.poke = os.pipe()
        self.loop.add_reader(self._poked, self._go_on)
        ready.set()
        try:
            self.loop.run()
        except BaseException as error:
            self.crash = error
        registry.unregister(self.core)  # type: ignore[arg-type]

    def _go_on(self) -> None:
        """In the loop's thread, as the real one does it."""
        os.read(self._poked, 1)
        while self.core.waiting:
            self.core.waiting.pop(0)()

    def connect(self) -> registry.Connection:
        return registry.Connection(self.path)

    def exchange(self, data: bytes, fds: list[int] | None = None) -> dict[str, Any] | None:
        """Sends raw bytes; returns the answer, or None when the server hung up."""
        connection = self.connect()
        try:
            rights = [(socket.SOL_SOCKET, socket.SCM_RIGHTS, array.array("i", fds))] if fds else []
            with suppress(BrokenPipeError):
                connection.socket.sendmsg([data], rights)
            answer = connection.socket.recv(1 << 17)
            return json.loads(answer) if answer else None
        finally:
            connection.close()

    def is_alive(self) -> bool:
        connection = self.connect()
        try:
            answer, _ = connection.ask({"verb": "list"})
            return bool(answer["sandboxes"][0]["id"] == "standinx") and self.crash is None
        finally:
            connection.close()

    def close(self) -> None:
        os.write(self._stop, b"x")
        self._thread.join(10)
        assert not self._thread.is_alive()
        assert self.crash is None, self.crash
        for fd in (self._wake, self._stop, self._poked, self.poke):
            os.close(fd)
        os.close(self.core.root_fd)
        self.loop.close()


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("XDG_RUNTIME_DIR", str(tmp_path_factory.mktemp("run")))
        made = Server()
        yield made
        made.close()
        assert not os.path.exists(os.path.dirname(made.path)), "the controller's directory is left over"


def open_descriptors() -> int:
    return len(os.listdir("/proc/self/fd"))


def eventually(condition: Callable[[], bool]) -> bool:
    """Whether it holds within some seconds; the server closes in its own time."""
    deadline = time.monotonic() + 5
    while not condition():
        if time.monotonic() > deadline:
            return False
        time.sleep(0.005)
    return True


MALFORMED = {
    "not JSON": b"hello",
    "not UTF-8": b"\xff\xfe{",
    "no object": b"[1, 2]",
    "null": b"null",
    "a number too long for an int": b'{"verb": ' + b"9" * 10000 + b"}",
    "nesting": b"[" * 100_000,
    "no verb": b"{}",
    "verb of the wrong type": b'{"verb": []}',
    "unknown verb": b'{"verb": "explode", "id": "standinx"}',
    "no id": b'{"verb": "kill"}',
    "id of the wrong type": b'{"verb": "kill", "id": {}}',
    "unknown id": b'{"verb": "kill", "id": "nobodyxx"}',
    "a signal before an exec": b'{"verb": "signal", "id": "standinx", "number": 9}',
    "an exec without descriptors": b'{"verb": "exec", "id": "standinx", "argv": ["true"]}',
    "a user that is text": b'{"verb": "open", "id": "standinx", "user": "root"}',
    "a user that is infinite": b'{"verb": "open", "id": "standinx", "user": Infinity}',
    "a user that is not there": b'{"verb": "open", "id": "standinx", "user": 7}',
    "a long message without a file": b'{"long": true}',
    "too large": b'{"verb": "list", "x": "' + b"x" * (registry.MAX_MESSAGE + 10) + b'"}',
}


@pytest.mark.parametrize("data", MALFORMED.values(), ids=MALFORMED.keys())
def test_a_malformed_message_is_refused_with_a_reason(server: Server, data: bytes) -> None:
    answer = server.exchange(data)
    assert answer is not None and answer["error"] and answer["exit_code"] == 125, answer
    assert server.core.state is State.RUNNING
    assert server.is_alive()


GOOD_EXEC: dict[str, Any] = {
    "verb": "exec",
    "id": "standinx",
    "argv": ["true"],
    "env": {},
    "directory": None,
    "user": None,
    "terminal": False,
}


@pytest.mark.parametrize(
    "wrong",
    [
        {"argv": []},
        {"argv": None},
        {"argv": 5},
        {"argv": ["a\0b"]},
        {"argv": ["\ud800"]},
        {"env": []},
        {"env": ["A=B"]},
        {"env": {"A": "\0"}},
        {"directory": 5},
        {"directory": {"x": 1}},
        {"user": 1.5},
        {"user": -1},
        {"user": 2**40},
        {"user": "agent"},
        {"user": []},
    ],
    ids=str,
)
def test_an_exec_with_wrong_types_is_refused(server: Server, wrong: dict[str, Any]) -> None:
    before = len(server.core.commands)
    answer = server.exchange(json.dumps(GOOD_EXEC | wrong).encode(), [0, 1, 2])
    assert answer is not None and answer["error"], answer
    assert len(server.core.commands) == before
    assert server.is_alive()


@pytest.mark.parametrize("wrong", [{}, {"argv": 5}, {"env": []}, {"user": []}, {"env": None}], ids=str)
def test_what_waits_for_a_snapshot_is_answered_then_whatever_it_is(server: Server, wrong: dict[str, Any]) -> None:
    """And holds one set of descriptors, not one for each time that somebody asks."""
    core = server.core
    core.waiting.clear()
    connection = server.connect()
    try:
        connection.ask({"verb": "list"})  # so that it is accepted, and its descriptor counted
        before = open_descriptors()
        core.is_kept_still = True
        registry.send(connection.socket, GOOD_EXEC | wrong, (0, 1, 2))
        for _ in range(5):
            with pytest.raises(RequestError, match="not answered yet"):
                connection.ask(GOOD_EXEC, (0, 1, 2))
        with pytest.raises(RequestError, match="not answered yet"):
            connection.ask({"verb": "snapshot", "id": "standinx"})
        assert len(core.waiting) == 1
        core.is_kept_still = False
        os.write(server.poke, b".")
        if wrong:
            with pytest.raises(RequestError):
                connection.answer()
        else:
            assert "started" in connection.answer()[0]
        assert server.is_alive()
        assert eventually(lambda: open_descriptors() <= before)
    finally:
        connection.close()
        core.is_kept_still = False
        core.waiting.clear()


@pytest.mark.parametrize("number", [-1, 2**40, 1.5e300, "x", None, [], {}], ids=str)
def test_a_signal_with_a_wrong_number_is_refused(server: Server, number: object) -> None:
    connection = server.connect()
    assert "started" in connection.ask(GOOD_EXEC, (0, 1, 2))[0]
    with pytest.raises(RequestError):
        connection.ask({"verb": "signal", "id": "standinx", "number": number})
    connection.close()
    assert server.is_alive()


def test_whoever_hangs_up_takes_its_command_along(server: Server) -> None:
    server.core.killed.clear()
    connection = server.connect()
    number = connection.ask(GOOD_EXEC, (0, 1, 2))[0]["started"]
    with pytest.raises(RequestError, match="one command a connection"):
        connection.ask(GOOD_EXEC, (0, 1, 2))
    assert not server.core.killed
    connection.close()
    assert server.is_alive()  # served after the close
    assert server.core.killed == [number]


@pytest.mark.parametrize("count", [1, 2, 4, 8, 30])
def test_descriptors_that_nobody_asked_for_are_closed(server: Server, count: int) -> None:
    assert server.is_alive()
    assert eventually(lambda: not server.server.clients)
    before = open_descriptors()
    for data in (b"garbage", b'{"verb": "list"}', b"", json.dumps(GOOD_EXEC).encode()):
        for _ in range(5):
            server.exchange(data, [0] * count)
    assert server.is_alive()
    assert eventually(lambda: open_descriptors() <= before), (open_descriptors(), before)


def test_a_long_message_travels_in_a_sealed_memfd(server: Server) -> None:
    connection = server.connect()
    connection.ask(GOOD_EXEC | {"argv": ["x" * 100_000] * 12}, (0, 1, 2))
    connection.close()
    assert len(server.core.commands[-1]) > 1_200_000
    with pytest.raises(RequestError, match="too long"):
        registry.send(connection.socket, {"x": "x" * (registry.MAX_LONG_MESSAGE + 1)})


def test_a_long_message_in_any_other_file_is_refused(server: Server, tmp_path: Path) -> None:
    message = json.dumps({"verb": "list"}).encode()
    ordinary = tmp_path / "message"
    ordinary.write_bytes(message)
    unsealed = os.memfd_create("unsealed", os.MFD_CLOEXEC | os.MFD_ALLOW_SEALING)
    os.write(unsealed, message)
    reader, writer = os.pipe()  # a read of it would never return
    sealed = sealed_memfd("sealed", message)
    file = os.open(ordinary, os.O_RDONLY)
    for fd in (unsealed, reader, file):
        answer = server.exchange(b'{"long": true}', [fd])
        assert answer is not None and "error" in answer, answer
    answer = server.exchange(b'{"long": true}', [sealed])
    assert answer is not None and "sandboxes" in answer, answer
    for fd in (unsealed, reader, writer, sealed, file):
        os.close(fd)


def test_a_peer_that_never_reads_is_dropped(server: Server) -> None:
    connection = server.connect()
    connection.socket.setblocking(False)
    with pytest.raises(OSError):
        for _ in range(100_000):
            try:
                connection.socket.send(b'{"verb": "list"}')
            except BlockingIOError:
                assert server.is_alive()
    connection.close()
    assert server.is_alive()


def test_clients_are_bounded(server: Server) -> None:
    crowd = [server.connect() for _ in range(registry.MAX_CLIENTS)]
    for connection in crowd:
        connection.ask({"verb": "list"})
    late = server.connect()
    with pytest.raises((RequestError, OSError)):
        late.ask({"verb": "list"})
    late.close()
    for connection in crowd:
        connection.ask({"verb": "list"})  # those who were there are still served
        connection.close()
    assert server.is_alive()


def test_another_user_is_turned_away(server: Server, monkeypatch: pytest.MonkeyPatch) -> None:
    real = os.geteuid()
    connection = server.connect()
    assert connection.ask({"verb": "list"})
    connection.close()
    # The peer's real id is what the kernel says; to be another user is to be asked by one.
    monkeypatch.setattr(socket.socket, "getsockopt", lambda *_: struct.pack("3i", 1, real + 1, real + 1))
    connection = server.connect()
    with pytest.raises((RequestError, OSError)):
        connection.ask({"verb": "list"})
    connection.close()
    monkeypatch.undo()
    assert server.is_alive()


@pytest.mark.skipif(os.geteuid() != 0, reason="needs to be two users; runs in the pass as root")
def test_another_user_is_turned_away_by_the_directory(server: Server) -> None:
    pid = os.fork()
    if pid == 0:
        code = 1
        try:
            os.setresuid(65534, 65534, 65534)
            server.connect()
        except PermissionError:
            code = 0
        finally:
            os._exit(code)
    assert os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]) == 0


json_values = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=8),
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(st.text(max_size=6), inner, max_size=4),
    max_leaves=8,
)
requests = st.fixed_dictionaries(
    {"verb": st.sampled_from(["list", "open", "exec", "signal", "thaw", "freeze"]) | json_values},
    optional={
        "id": st.just("standinx") | json_values,
        **dict.fromkeys(("argv", "env", "directory", "user", "terminal", "number", "long"), json_values),
    },
)


@settings(max_examples=300, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(requests.map(lambda value: json.dumps(value).encode()) | st.binary(max_size=200), st.integers(0, 4))
def test_no_message_ends_the_server(server: Server, data: bytes, count: int) -> None:
    if not data and not count:
        return  # an empty packet without descriptors is the end of a stream
    server.exchange(data, [0] * count)
    assert server.is_alive()
