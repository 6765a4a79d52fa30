"""`corral.Sandbox` and `corral.SyncSandbox`: each public method once, for what it promises."""

from __future__ import annotations

import asyncio
import errno
import os
import resource
import signal
import socket
import threading
import time
from contextlib import closing
from pathlib import Path

import pytest

from corral import (
    CommandFailed,
    CorralError,
    ExecError,
    ExecResult,
    Listener,
    Policy,
    RequestError,
    Sandbox,
    SandboxClosed,
    SyncSandbox,
)
from corral.policy.load import parse_policy
from corral.policy.model import MIB, Environment, Resources
from corral.sandbox.changes import Change, ChangeKind
from corral.sandbox.core import State
from corral.sandbox.inward import Forward
from corral.sandbox.layer import open_layer
from corral.sandbox.limits import Rlimits
from corral.sandbox.results import Stats
from tests.contain.conftest import MakeBox


@pytest.fixture(autouse=True)
def own_directories(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("XDG_STATE_HOME", str(tmp_path))
    monkeypatch.setenv("XDG_RUNTIME_DIR", str(tmp_path))


def state_of(box: Sandbox) -> State:
    """Its state now; mypy takes an attribute that was compared for constant."""
    return box.state


# ---- exec ----


async def test_exec_captures(box: Sandbox) -> None:
    result = await box.exec(["sh", "-c", "echo out; echo err >&2; exit 3"])
    assert isinstance(result, ExecResult)
    assert (result.exit_code, result.signal, result.stdout, result.stderr) == (3, None, b"out\n", b"err\n")
    assert (result.stdout_truncated, result.stderr_truncated, result.timed_out) == (False, False, False)
    assert result.text == "out\n" and result.duration > 0 and result.usage.max_rss > 0
    result = await box.exec(["sh", "-c", "printf '\\377'; kill -TERM $$"])
    assert (result.exit_code, result.signal, result.text) == (143, signal.SIGTERM, "\N{REPLACEMENT CHARACTER}")


async def test_exec_streams_to_callbacks_as_output_comes(box: Sandbox) -> None:
    seen: list[tuple[str, bytes]] = []
    first = asyncio.Event()

    def out(data: bytes) -> None:
        seen.append(("out", data))
        first.set()

    running = asyncio.create_task(
        box.exec(
            ["sh", "-c", "echo one; while [ ! -e go ]; do sleep 0.02; done; echo two >&2"],
            on_stdout=out,
            on_stderr=lambda data: seen.append(("err", data)),
        )
    )
    await asyncio.wait_for(first.wait(), 20)
    assert seen == [("out", b"one\n")] and not running.done()
    await box.write_file(f"{box.core.prepared.directory}/go", b"")
    result = await running
    assert seen == [("out", b"one\n"), ("err", b"two\n")]
    assert (result.stdout, result.stderr) == (b"one\n", b"two\n")


async def test_exec_timeout_kills_the_whole_session(box: Sandbox) -> None:
    result = await box.exec(["bash", "-c", "set -m; sleep 1001 & echo begun; sleep 1002; echo end"], timeout=1)
    assert (result.timed_out, result.signal, result.stdout) == (True, signal.SIGKILL, b"begun\n")
    assert 1 <= result.duration < 20
    # Job control gave each a process group of its own; the session is what they share.
    assert b"sleep" not in (await box.exec(["ps", "-eo", "args"])).stdout.replace(b"ps -eo", b"")
    assert not (await box.exec(["true"], timeout=30)).timed_out


async def test_exec_feeds_a_slow_reader(box: Sandbox) -> None:
    data = os.urandom(4 << 20)
    result = await box.exec(["sh", "-c", "sleep 0.5; cat"], stdin=data)
    assert result.stdout == data
    assert (await box.exec(["sh", "-c", "sleep 0.2; head -c 5"], stdin=data)).stdout == data[:5]  # goes away early
    assert (await box.exec(["cat"])).stdout == b""


async def test_output_is_capped_and_marked(make_box: MakeBox) -> None:
    box = await make_box(policy=Policy(resources=Resources(output=1000)))
    seen = bytearray()
    result = await box.exec(["sh", "-c", "head -c 5000000 /dev/zero; printf 12345 >&2"], on_stdout=seen.extend)
    assert (len(result.stdout), result.stdout_truncated) == (1000, True) and len(seen) == 1000
    assert (result.stderr, result.stderr_truncated, result.exit_code) == (b"12345", False, 0)
    exact = await box.exec(["head", "-c", "1000", "/dev/zero"])
    assert (len(exact.stdout), exact.stdout_truncated) == (1000, False)


async def test_check(box: Sandbox) -> None:
    with pytest.raises(CommandFailed, match=r"ended with 4.*sorry") as failed:
        await box.exec(["sh", "-c", "echo sorry >&2; exit 4"], check=True)
    assert failed.value.result.exit_code == 4 and isinstance(failed.value, CorralError)
    assert (await box.exec(["true"], check=True)).check().exit_code == 0


async def test_exec_env_directory_and_user(make_box: MakeBox) -> None:
    box = await make_box(
        policy=Policy(environment=Environment(allow=("PASSES",), set=(("SET", "by policy"),))),
        environment={"PASSES": "yes", "STAYS": "out", "PATH": os.defpath},
    )
    script = 'echo "$PASSES|${STAYS-unset}|$SET|$EXTRA"; pwd; id -u'
    result = await box.exec(["sh", "-c", script], env={"EXTRA": "more", "SET": "by exec"}, directory="/usr")
    assert result.text.splitlines() == ["yes|unset|by exec|more", "/usr", "1000"]
    with pytest.raises(ExecError, match="directory: /no/such: No such file"):
        await box.exec(["true"], directory="/no/such")
    for user in ("nosuch", -1, 70000, True):
        with pytest.raises(RequestError):
            await box.exec(["true"], user=user)


@pytest.mark.root
async def test_exec_as_other_users(box: Sandbox) -> None:
    for user, line in (("root", "0 /root root"), ("agent", "1000 /home/agent agent"), (4711, "4711 /home/agent agent")):
        result = await box.exec(["sh", "-c", "echo $(id -u) $HOME $USER; : >/dev/stdout"], user=user)
        assert (result.text, result.stderr) == (f"{line}\n", b"")


async def test_exec_that_cannot_start(box: Sandbox) -> None:
    with pytest.raises(ExecError, match="no-such-program: No such file or directory"):
        await box.exec(["no-such-program"])
    for argv in ([], [""]):
        with pytest.raises(RequestError, match="no command"):
            await box.exec(argv)
    assert box.state is State.RUNNING


async def test_many_execs_at_once(box: Sandbox) -> None:
    results = await asyncio.gather(*(box.exec(["sh", "-c", f"sleep 0.1; echo {n}"]) for n in range(40)))
    assert [result.text for result in results] == [f"{n}\n" for n in range(40)]


async def test_an_exec_ends_with_the_sandbox(box: Sandbox) -> None:
    running = asyncio.create_task(box.exec(["sleep", "1000"]))
    await asyncio.sleep(0.2)
    box.kill("the test says so")
    with pytest.raises(SandboxClosed, match="the test says so"):
        await running
    assert await box.wait_ended() == "the test says so"
    with pytest.raises(SandboxClosed, match="the test says so"):
        await box.exec(["true"])


# ---- processes ----


async def test_a_process_with_pipes(box: Sandbox) -> None:
    process = await box.start_process(["sh", "-c", "read a; echo got $a; echo err >&2; cat >/dev/null; exit 5"])
    await process.write(b"line\n")
    assert await process.stdout.readline() == b"got line\n"
    assert await process.stderr.readline() == b"err\n"
    process.close_stdin()
    assert (await process.wait()).code == 5
    assert (await process.wait()).code == 5  # may be asked again
    assert await process.stdout.read() == b""
    with pytest.raises(RequestError):
        await process.write(b"late")
    with pytest.raises(RequestError, match="no terminal"):
        process.resize(1, 1)


async def test_write_waits_for_a_slow_reader(box: Sandbox) -> None:
    process = await box.start_process(["sh", "-c", "while [ ! -e go ]; do sleep 0.02; done; wc -c"])
    data = bytes(1 << 20)
    writing = asyncio.create_task(process.write(data))
    await asyncio.sleep(0.3)
    assert not writing.done()
    await box.write_file(f"{box.core.prepared.directory}/go", b"")
    await writing
    process.close_stdin()
    assert await process.stdout.readline() == b"1048576\n"


async def test_write_to_a_command_that_ended_is_an_error(box: Sandbox) -> None:
    process = await box.start_process(["sh", "-c", "exec <&-; sleep 0.1"])
    with pytest.raises(RequestError, match="does not read"):
        await process.write(bytes(1 << 20))
    await process.wait()


async def test_output_flows_only_as_fast_as_it_is_read(box: Sandbox) -> None:
    process = await box.start_process(["sh", "-c", "yes | head -c 3000000; echo done >&2"])
    await asyncio.sleep(0.5)
    assert not process._exit.done()
    assert len(await process.stdout.read()) == 3_000_000
    assert (await process.wait()).code == 0


async def test_a_process_on_a_terminal(box: Sandbox) -> None:
    script = (
        "trap 'stty size; seen=1' WINCH; tty; stty size; until [ $seen ]; do sleep 0.02; done; "
        "read line; echo got $line"
    )
    process = await box.start_process(["sh", "-c", script], terminal=(33, 99))
    assert await process.stdout.readline() == b"/dev/pts/0\r\n"
    assert await process.stdout.readline() == b"33 99\r\n"
    process.resize(20, 60)
    assert await process.stdout.readline() == b"20 60\r\n"
    await process.write(b"hello\n")
    rest = await process.stdout.read()
    assert rest.endswith(b"got hello\r\n")
    assert (await process.wait()).code == 0
    with pytest.raises(KeyError):
        _ = process.stderr


async def test_signal_and_kill(box: Sandbox) -> None:
    process = await box.start_process(["sh", "-c", "trap 'echo got it' USR1; echo ready; while :; do sleep 0.02; done"])
    assert await process.stdout.readline() == b"ready\n"
    process.signal(signal.SIGUSR1)
    assert await process.stdout.readline() == b"got it\n"
    process.kill()
    result = await process.wait()
    assert (result.code, os.WTERMSIG(result.status)) == (137, signal.SIGKILL)
    process.signal(signal.SIGUSR1)  # nothing happens
    process.kill()
    with pytest.raises(ExecError):
        await (await box.start_process(["no-such-program"])).wait()


# ---- files, changes, layers ----


async def test_files(box: Sandbox, workspace: Path, tmp_path: Path) -> None:
    assert await box.read_file(str(workspace / "file.txt")) == b"original\n"
    await box.write_file(f"{workspace}/new/deep", b"inside", mode=0o755, parents=True)
    assert (await box.exec(["sh", "-c", "cat new/deep; test -x new/deep"], check=True)).stdout == b"inside"
    (tmp_path / "from-host").write_bytes(b"up")
    await box.upload(tmp_path / "from-host", f"{workspace}/uploaded")
    assert (await box.exec(["cat", "uploaded"])).stdout == b"up"
    await box.download(f"{workspace}/new", tmp_path / "down")
    assert (tmp_path / "down/deep").read_bytes() == b"inside"
    assert {entry.name for entry in await box.list_files(str(workspace))} == {"file.txt", "new", "uploaded"}
    with pytest.raises(CorralError):
        await box.read_file("/no/such")
    with closing(box.files()) as files:
        assert files.read(f"{workspace}/uploaded") == b"up"
    assert sorted(os.listdir(workspace)) == ["file.txt"]


async def test_changes_are_told_while_it_runs(box: Sandbox, workspace: Path) -> None:
    assert await box.changes() == []
    await box.exec(["sh", "-c", "rm file.txt; echo x >added"], check=True)
    told = await box.changes()
    assert all(isinstance(change, Change) for change in told)
    assert {(change.path, change.kind) for change in told} == {
        (f"{workspace}/file.txt", ChangeKind.DELETED),
        (f"{workspace}/added", ChangeKind.ADDED),
    }


async def test_keep_makes_a_layer_and_without_it_none(workspace: Path) -> None:
    async with Sandbox(workspace, keep=True) as box:
        await box.exec(["touch", "kept"], check=True)
    assert box.kept is not None and box.kept.id == box.id
    assert [change.path for change in open_layer(box.id).changes()] == [f"{workspace}/kept"]
    box.kept.discard()
    async with Sandbox(workspace, keep=True) as box:
        await box.exec(["true"])
    assert box.kept is None
    async with Sandbox(workspace) as box:
        await box.exec(["touch", "lost"], check=True)
    assert box.kept is None


# ---- freeze, stats, listeners ----


async def test_freeze_really_stops_and_thaw_resumes(box: Sandbox, workspace: Path) -> None:
    counter = f"{workspace}/counter"
    process = await box.start_process(["sh", "-c", "while :; do echo x >>counter; sleep 0.005; done"])

    async def size() -> int:
        return len(await box.read_file(counter))

    async def grows() -> bool:
        before = await size()
        for _ in range(200):
            await asyncio.sleep(0.05)
            if await size() > before:
                return True
        return False

    while not any(entry.name == "counter" for entry in await box.list_files(str(workspace))):
        await asyncio.sleep(0.02)
    assert await grows()
    await box.freeze()
    assert state_of(box) is State.FROZEN
    await asyncio.sleep(0.1)
    before = await size()
    await asyncio.sleep(1)
    assert await size() == before
    with pytest.raises(RequestError, match="thaw it first"):
        await box.exec(["true"])
    await box.thaw()
    assert state_of(box) is State.RUNNING and await grows()
    process.kill()
    assert (await process.wait()).code == 137


async def test_stats_are_plausible(box: Sandbox) -> None:
    idle = await box.stats()
    assert isinstance(idle, Stats)
    code = "x = bytearray(100 << 20)\nfor n in range(0, len(x), 4096): x[n] = 1\nprint('up', flush=True)\ninput()"
    process = await box.start_process(["/usr/bin/python3", "-c", code])
    assert await process.stdout.readline() == b"up\n"
    await box.exec(["sh", "-c", "head -c 50000000 /dev/zero >big; t=0; while [ $t -lt 300000 ]; do t=$((t+1)); done"])
    busy = await box.stats()
    assert busy.processes == idle.processes + 1
    assert busy.memory - idle.memory > 100 * MIB
    assert 50_000_000 <= busy.disk - idle.disk < 60_000_000
    assert busy.cpu_seconds > idle.cpu_seconds and busy.uptime > idle.uptime > 0
    assert busy.memory_peak is None or busy.memory_peak >= busy.memory - MIB


async def test_a_listener_leads_to_one_address_outside(make_box: MakeBox) -> None:
    async def upper(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        writer.write((await reader.read()).upper())
        writer.close()

    server = await asyncio.start_server(upper, "127.0.0.1", 0)
    port = server.sockets[0].getsockname()[1]
    box = await make_box(listeners=[Listener(8080), Listener(8081)])
    assert len(box.listeners) == 2
    with pytest.raises(RequestError, match="not an IP address"):
        Forward(asyncio.get_running_loop(), box.listeners[0], "localhost", port)
    forward = Forward(asyncio.get_running_loop(), box.listeners[0], "127.0.0.1", port)
    code = (
        "import socket,sys,threading\ns=socket.create_connection(('127.0.0.1',int(sys.argv[1])),20)\n"
        "d=sys.stdin.buffer.read()\n"
        "t=threading.Thread(target=lambda:(s.sendall(d),s.shutdown(socket.SHUT_WR)));t.start()\n"
        "while b:=s.recv(65536):sys.stdout.buffer.write(b)\n"
    )
    data = b"some text " * 300_000
    results = await asyncio.gather(*(box.exec(["/usr/bin/python3", "-c", code, "8080"], stdin=data) for _ in range(3)))
    assert [result.stdout == data.upper() for result in results] == [True] * 3, results[0].stderr
    refused = await box.exec(["/usr/bin/python3", "-c", code, str(port)])
    assert b"ConnectionRefusedError" in refused.stderr  # nothing of the host is there by itself
    forward.close()
    server.close()
    with socket.socket(fileno=os.dup(box.listeners[1])) as listener:
        listener.setblocking(False)
        connecting = asyncio.create_task(box.exec(["/usr/bin/python3", "-c", code, "8081"], stdin=b"?"))
        connection, _ = await asyncio.get_running_loop().sock_accept(listener)
        with connection:
            connection.setblocking(True)
            connection.settimeout(20)
            assert await asyncio.to_thread(connection.recv, 10) == b"?"
            connection.sendall(b"by hand")
        assert (await connecting).stdout == b"by hand"


# ---- misuse ----


async def test_a_sandbox_that_was_not_started_or_is_started_twice(workspace: Path) -> None:
    box = Sandbox(workspace)
    assert box.state is State.LAUNCHING
    with pytest.raises(SandboxClosed, match="has not been started"):
        await box.exec(["true"])
    await box.close()
    async with box:
        with pytest.raises(RequestError, match="started already"):
            await box.start()


# ---- limits of one exec ----

SHOW_LIMITS = "from resource import *; print(getrlimit(RLIMIT_NOFILE), getrlimit(RLIMIT_FSIZE), sep=';')"


async def test_limits_of_an_exec_hold_for_it_alone(box: Sandbox) -> None:
    usual = (await box.exec(["/usr/bin/python3", "-c", SHOW_LIMITS])).text
    limits: Rlimits = {resource.RLIMIT_NOFILE: 50, resource.RLIMIT_FSIZE: (1000, 2000)}
    assert (await box.exec(["/usr/bin/python3", "-c", SHOW_LIMITS], limits=limits)).text == "(50, 50);(1000, 2000)\n"
    script = "import os; os.dup2(0, 49); os.dup2(0, 50)"
    result = await box.exec(["/usr/bin/python3", "-c", script], limits=limits)
    assert b"Bad file descriptor" in result.stderr.splitlines()[-1]
    assert (await box.exec(["sh", "-c", "exec yes >/tmp/much"], limits=limits)).signal == signal.SIGXFSZ
    assert (await box.exec(["stat", "-c", "%s", "/tmp/much"])).text == "1000\n"
    busy = await box.start_process(["sh", "-c", "while :; do :; done"], limits={resource.RLIMIT_CPU: 1})
    assert os.WTERMSIG((await busy.wait()).status) in (signal.SIGXCPU, signal.SIGKILL)
    assert (await box.exec(["/usr/bin/python3", "-c", SHOW_LIMITS])).text == usual


async def test_limits_of_an_exec_can_only_be_lower(box: Sandbox) -> None:
    users = ["agent", "root"] if box.core.prepared.identity.has(0) else ["agent"]
    of_all = box.core.prepared.options.policy.resources.open_files
    for user in users:
        for above in (of_all + 1, (10, of_all + 1), resource.RLIM_INFINITY):
            with pytest.raises(ExecError) as caught:
                await box.exec(["touch", "/tmp/ran"], user=user, limits={resource.RLIMIT_NOFILE: above})
            assert (caught.value.stage, caught.value.errno) == ("rlimit", errno.EPERM)
        lowered = {resource.RLIMIT_NOFILE: (20, 40)}
        script = "ulimit -n 40 && ! (ulimit -n 41)"
        assert (await box.exec(["sh", "-c", script], user=user, limits=lowered)).exit_code == 0
    assert (await box.exec(["test", "-e", "/tmp/ran"])).exit_code == 1


@pytest.mark.parametrize(
    "limits",
    [
        {99: 1},
        {-1: 1},
        {resource.RLIMIT_NOFILE: (2, 1)},
        {resource.RLIMIT_NOFILE: -2},
        {resource.RLIMIT_NOFILE: 1 << 64},
        {resource.RLIMIT_CORE: 0},  # no limit at all where core_pattern is a pipe (core(5))
    ],
)
async def test_what_is_no_limit_is_refused(box: Sandbox, limits: Rlimits) -> None:
    with pytest.raises(RequestError, match="limits: "):
        await box.exec(["true"], limits=limits)
    assert (await box.exec(["true"])).exit_code == 0


# ---- the blocking face ----


def test_the_blocking_sandbox(workspace: Path, tmp_path: Path) -> None:
    with SyncSandbox(workspace, keep=True, label="sync") as box:
        assert box.exec(["sh", "-c", "cat; exit 3"], stdin=b"hi").exit_code == 3
        with pytest.raises(ExecError):
            box.exec(["no-such-program"])
        box.write_file(f"{workspace}/a", b"1")
        assert box.read_file(f"{workspace}/a") == b"1"
        box.upload(workspace / "file.txt", f"{workspace}/b")
        box.download(f"{workspace}/b", tmp_path / "c")
        assert (tmp_path / "c").read_text() == "original\n"
        assert {entry.name for entry in box.list_files(str(workspace))} == {"a", "b", "file.txt"}
        assert len(box.changes()) == 2 and box.stats().disk > 0
        box.freeze()
        box.thaw()
        assert len(box.id) == 8
    assert box.kept is not None and box.kept.label == "sync"
    box.close()
    with SyncSandbox(workspace) as box:
        box.kill()
        deadline = time.monotonic() + 10
        while box.box.state is not State.ENDED and time.monotonic() < deadline:
            time.sleep(0.01)
        with pytest.raises(SandboxClosed, match="killed"):
            box.exec(["true"])


def test_the_blocking_sandbox_tells_its_end(workspace: Path) -> None:
    with SyncSandbox(workspace) as box:
        with pytest.raises(TimeoutError):
            box.wait_ended(timeout=0.05)
        box.kill("enough")
        assert box.wait_ended(timeout=60) == box.wait_ended() == "enough"


def test_the_blocking_sandbox_gives_its_files(workspace: Path) -> None:
    with SyncSandbox(workspace) as box:
        with closing(box.files()) as files:
            files.write(f"{workspace}/a", b"1")
            assert files.read(f"{workspace}/a") == b"1"
        if box.box.core.prepared.identity.has(0):
            with closing(box.files(user="root")) as files:
                files.write("/root/b", b"2")
            assert box.exec(["stat", "-c", "%u", "/root/b"], user="root").text == "0\n"
    with pytest.raises(SandboxClosed):
        box.files()


def test_a_blocking_process_over_pipes(workspace: Path) -> None:
    with SyncSandbox(workspace) as box:
        script = "read a; echo $a; echo err >&2; cat; trap 'exit 5' TERM; echo ready; while :; do sleep 0.01; done"
        process = box.start_process(["sh", "-c", script], limits={resource.RLIMIT_NOFILE: 50})
        process.write(b"one\n")
        assert process.read(100) == b"one\n"
        process.write(b"two")
        process.close_stdin()
        with pytest.raises(TimeoutError):
            process.wait(timeout=0.05)
        found = b""
        while b"ready" not in found:
            found += process.read(100)
        assert found == b"twoready\n"
        process.signal(signal.SIGTERM)
        assert process.wait().code == process.wait(timeout=60).code == 5
        assert process.read() == b"" and process.read_stderr().startswith(b"err\n")
        with pytest.raises(RequestError, match="input is closed"):
            process.write(b"x")
        with pytest.raises(RequestError, match="no terminal"):
            process.resize(1, 1)
        killed = box.start_process(["sleep", "1000"])
        killed.kill()
        assert killed.wait(timeout=60).code == 137
        with pytest.raises(ExecError):
            box.start_process(["no-such-program"]).wait(timeout=60)


def test_a_blocking_process_on_a_terminal(workspace: Path) -> None:
    with SyncSandbox(workspace) as box:
        process = box.start_process(["sh", "-c", "stty size; read x; stty size; tty"], terminal=(30, 90))
        found = b""
        while b"\n" not in found:
            found += process.read(100)
        assert found == b"30 90\r\n"
        process.resize(40, 100)
        process.write(b"x\n")
        assert process.read().splitlines() == [b"x", b"40 100", b"/dev/pts/0"]
        assert process.wait(timeout=60).code == 0
        ended = box.start_process(["cat"], terminal=(30, 90))
    with pytest.raises(SandboxClosed):
        ended.wait(timeout=60)


def test_the_blocking_sandbox_from_several_threads(workspace: Path) -> None:
    results: dict[int, list[str]] = {}

    def work(number: int) -> None:
        with SyncSandbox(workspace) as own:
            results[number] = [own.exec(["echo", f"{number}.{n}"]).text for n in range(5)]
            results[number].append(shared.exec(["echo", f"shared {number}"]).text)

    with SyncSandbox(workspace) as shared:
        threads = [threading.Thread(target=work, args=(number,)) for number in range(8)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join(60)
    assert results == {number: [*(f"{number}.{n}\n" for n in range(5)), f"shared {number}\n"] for number in range(8)}


def test_an_interrupted_call_ends_its_command(workspace: Path) -> None:
    with SyncSandbox(workspace) as box:
        timer = threading.Timer(0.5, os.kill, [os.getpid(), signal.SIGINT])
        timer.start()
        with pytest.raises(KeyboardInterrupt):
            box.exec(["sleep", "1003"])
        assert "sleep" not in box.exec(["sh", "-c", "sleep 0.2 >/dev/null; ps -eo args"]).text.replace("sleep 0.2", "")


async def test_what_policy_denies_stays_covered_whatever_is_written_there(make_box: MakeBox, workspace: Path) -> None:
    """To the kernel, whoever works in the host's mount namespace may remove what is covered in another."""
    for name in ("secret", "dir/secret"):
        (workspace / name).parent.mkdir(exist_ok=True)
        (workspace / name).write_text("secret")
    denied = [f"{workspace}/{name}" for name in ("secret", "dir/secret", "later")]
    box = await make_box(policy=parse_policy(f"filesystem: {{deny: {denied}}}\n", source="test.yaml"))
    for path in denied:
        with pytest.raises(RequestError, match="mounted"):
            await box.write_file(path, b"content")
    with closing(box.files()) as files:
        for path in (*denied, f"{workspace}/dir"):
            with pytest.raises(RequestError, match="mounted"):
                files.remove(path, recursive=True)
    (workspace / "later").write_text("secret")
    look = await box.exec(["sh", "-c", f"cat {' '.join(denied)}; stat -c %F {' '.join(denied)}"])
    assert look.text == "character special file\n" * 3


async def test_what_is_missing_at_the_start_stays_denied_when_what_is_above_it_is_moved(
    make_box: MakeBox, workspace: Path
) -> None:
    denied = [f"{workspace}/{name}" for name in ("a/b/.env", "a/c")]
    policy = f"filesystem: {{deny: {denied}, restore_keeps: ['**/sleep']}}\n"
    box = await make_box(policy=parse_policy(policy, source="test.yaml"))
    begin = await box.snapshot()
    for source, target in (("a", "z"), ("a/b", "a/z")):
        rename = f"import os; os.rename({source!r}, {target!r})"
        assert (await box.exec(["python3", "-c", rename])).exit_code != 0
    await box.exec(["sh", "-c", "echo >a/new"])  # where it is one's own
    (workspace / "a" / "b").mkdir(parents=True)
    for path in denied:
        Path(path).write_text("secret")
    look = f"cat {' '.join(denied)}; stat -c %F {' '.join(denied)}; ls a"
    for _ in range(2):
        assert (await box.exec(["sh", "-c", look])).stdout.startswith(b"character special file\n" * 2)
        await box.restore(begin)
    assert (await box.exec(["ls", "a"])).text == "b\nc\n"
