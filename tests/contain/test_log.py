"""What is recorded of a sandbox, and that nothing happens that cannot be (I3, I4, I9, I10)."""

from __future__ import annotations

import asyncio
import errno
import json
import os
import signal
import socket
import subprocess
from collections.abc import AsyncIterator, Iterator
from contextlib import suppress
from pathlib import Path

import pytest

from corral.actions import Decision, Kind, Verdict
from corral.approvals.queue import Ending, Scope
from corral.errors import SandboxClosed
from corral.log import writer
from corral.log.approval import action_hash
from corral.log.events import Approval, ExecEnded, ExecStarted, PolicyChanged, SessionEnded, SessionStarted
from corral.log.places import key_path, open_log
from corral.log.writer import Log
from corral.policy.canonical import policy_hash
from corral.policy.load import parse_policy
from corral.policy.model import Log as LogPolicy
from corral.policy.model import Policy, Syscalls
from corral.sandbox.box import Sandbox
from tests.contain.command_line import CommandLine, adopting_orphans
from tests.contain.conftest import wait_until
from tests.contain.logs import Disk, events, records, verified

CONNECT = "import socket; socket.create_connection(('127.0.0.1', {port})).close()"


@pytest.fixture
def cli(tmp_path: Path, workspace: Path) -> Iterator[CommandLine]:
    with adopting_orphans():
        yield CommandLine(tmp_path, workspace)


@pytest.fixture
def place(tmp_path: Path) -> Path:
    return tmp_path / "records" / "log"


@pytest.fixture
async def log(place: Path) -> AsyncIterator[Log]:
    opened = open_log(place)
    yield opened
    await asyncio.to_thread(_close, opened)


def _close(opened: Log) -> None:
    with suppress(writer.LogUnwritable):  # which is what a test wanted
        opened.close()


def test_a_run_is_recorded_from_its_beginning_to_its_end(cli: CommandLine, place: Path) -> None:
    done = cli.run(
        "--log", str(place), "--label", "a label", "--", "sh", "-c", "mount -t tmpfs x /mnt 2>/dev/null; exit 3"
    )
    assert done.returncode == 3
    found = records(place)
    assert isinstance(found[0].event, SessionStarted)
    assert found[0].event.label == "a label"
    assert isinstance(found[1].event, PolicyChanged)
    assert isinstance(found[2].event, ExecStarted)
    assert found[2].event.argv[:2] == ("sh", "-c")
    ended, last = found[-2].event, found[-1].event
    assert isinstance(ended, ExecEnded)
    assert os.waitstatus_to_exitcode(ended.status) == 3
    assert ended.denials == 1
    assert isinstance(last, SessionEnded)
    refused = [event for event in events(place, Decision) if event.verdict is Verdict.DENY]
    assert [decision.action.name for decision in refused] == ["kernel.mount"]
    assert any(decision.action.kind is Kind.PROCESS_EXEC for decision in events(place, Decision))
    assert [record.sequence for record in found] == list(range(1, len(found) + 1))
    assert verified(place) == len(found)


def test_every_record_names_agent_policy_session_and_step(cli: CommandLine, place: Path, tmp_path: Path) -> None:
    """I10."""
    text = "agent: {name: coder, version: '7'}\n"
    policy = tmp_path / "policy.yaml"
    policy.write_text(text)
    assert cli.run("--log", str(place), "--policy", str(policy), "--", "true").returncode == 0
    contexts = {record.context for record in records(place)}
    (context,) = contexts
    assert (context.agent, context.agent_version) == ("coder", "7")
    assert context.policy_hash == policy_hash(parse_policy(text, source="policy.yaml"))
    origins = [event.action.origin for event in events(place, Decision)]
    assert {(origin.session, origin.step, origin.exec) for origin in origins} == {(context.session, 1, 1)}


def test_runs_at_the_same_time_share_one_log(cli: CommandLine, place: Path) -> None:
    running = [cli.start("run", "--log", str(place), "--", "sh", "-c", f"exit {number}") for number in range(4)]
    assert [each.wait(60) for each in running] == list(range(4))
    assert len(events(place, SessionEnded)) == 4
    assert verified(place) == len(records(place))


def test_a_run_that_is_killed_leaves_a_log_that_goes_on(cli: CommandLine, place: Path) -> None:
    with cli.live("--log", str(place), "--", "sleep", "600") as (_, running):
        assert wait_until(lambda: any(events(place, Decision)))
        running.send_signal(signal.SIGKILL)
        running.wait(60)
    assert cli.run("--log", str(place), "--", "true").returncode == 0
    assert len(events(place, SessionStarted)) == 2
    assert len(events(place, SessionEnded)) == 1
    verified(place)


def test_the_log_and_its_key_are_absent_inside(cli: CommandLine, workspace: Path) -> None:
    """I4, where the log lies in the workspace itself."""
    place = workspace / "log"
    look = "cat log/keys log/checkpoint log.key; ls -A log; echo x >log/checkpoint; rm -rf log log.key; :"
    done = cli.run("--log", str(place), "--discard", "--", "sh", "-c", look)
    assert (done.returncode, done.stdout) == (0, b"")
    verified(place)


def test_the_key_of_a_log_behind_a_link_is_absent_too(cli: CommandLine, workspace: Path, tmp_path: Path) -> None:
    (tmp_path / "elsewhere").mkdir()
    (workspace / "log").symlink_to(tmp_path / "elsewhere")
    place = workspace / "log"
    done = cli.run("--log", str(place), "--discard", "--", "sh", "-c", "cat log.key log/keys")
    assert done.returncode != 0
    assert done.stdout == b""
    verified(place)


@pytest.mark.parametrize("within", ["", "tile"])
def test_a_log_is_not_a_place_to_work_in(cli: CommandLine, place: Path, within: str) -> None:
    assert cli.run("--log", str(place), "--", "true").returncode == 0
    done = cli.run("--log", str(place), "--workspace", str(place / within), "--", "cat", "keys")
    assert (done.returncode, done.stdout) == (125, b"")
    assert b"which no sandbox is shown" in done.stderr
    verified(place)


def test_secrets_are_in_no_record(cli: CommandLine, place: Path, tmp_path: Path) -> None:
    """I8: neither a credential of the gateway, nor a variable that the policy sets or passes."""
    canaries = {name: f"canary-{name}-{os.urandom(8).hex()}" for name in ("credential", "set", "passed", "file")}
    (tmp_path / "secret").write_text(canaries["file"])
    policy = tmp_path / "policy.yaml"
    policy.write_text(
        "network:\n  allow:\n"
        "    - {name: a.test, port: 443, credential: {type: bearer, from: 'env:CREDENTIAL'}}\n"
        f"    - {{name: b.test, port: 443, credential: {{type: bearer, from: 'file:{tmp_path}/secret'}}}}\n"
        f"environment: {{allow: [PASSED], set: {{GIVEN: {canaries['set']}}}}}\n"
    )
    env = {"CREDENTIAL": canaries["credential"], "PASSED": canaries["passed"]}
    script = 'test -n "$PASSED$GIVEN" && env >/dev/null && mount -t tmpfs x /mnt 2>/dev/null; exit 0'
    done = cli.run("--log", str(place), "--policy", str(policy), "--", "sh", "-c", script, env=env)
    assert done.returncode == 0, done.stderr
    assert any(event.verdict is Verdict.DENY for event in events(place, Decision))
    for path in (each for each in place.parent.rglob("*") if each.is_file()):
        content = path.read_bytes()
        assert not [name for name, canary in canaries.items() if canary.encode() in content], path


def test_a_log_that_is_not_one_is_a_clear_error(cli: CommandLine, tmp_path: Path) -> None:
    file = tmp_path / "file"
    file.write_text("")
    done = cli.run("--log", str(file), "--", "touch", "ran")
    assert done.returncode == 125
    assert b"log" in done.stderr
    assert b"Traceback" not in done.stderr


# ---- record before effect ----


@pytest.fixture
def disk(monkeypatch: pytest.MonkeyPatch, log: Log) -> Iterator[Disk]:
    made = Disk(monkeypatch)
    yield made
    made.works.set()


def listening() -> tuple[socket.socket, int]:
    server = socket.socket()
    server.bind(("127.0.0.1", 0))
    server.listen()
    return server, server.getsockname()[1]


SERVE = """
import socket, sys
server = socket.create_server(("127.0.0.1", 8000))
print("ready", flush=True)
server.accept()
print("accepted", flush=True)
"""


async def test_i3_nothing_happens_before_its_record_is_durable(workspace: Path, log: Log, disk: Disk) -> None:
    async with Sandbox(workspace, log=log) as box:
        server = await box.start_process(["/usr/bin/python3", "-c", SERVE])
        assert server.stdout is not None
        assert await server.stdout.readline() == b"ready\n"
        disk.works.clear()
        client = await box.start_process(["/usr/bin/python3", "-c", CONNECT.format(port=8000)])
        accepted = asyncio.ensure_future(server.stdout.readline())
        done, _ = await asyncio.wait([accepted], timeout=1.5)
        assert not done, "it connected although its record was not durable"
        disk.works.set()
        assert await asyncio.wait_for(accepted, 60) == b"accepted\n"
        assert (await client.wait()).code == 0
    connects = [event for event in events(log.directory, Decision) if event.action.kind is Kind.NET_CONNECT]
    assert [decision.verdict for decision in connects] == [Verdict.ALLOW]


async def test_i3_what_stays_inside_goes_on_meanwhile(workspace: Path, log: Log, disk: Disk) -> None:
    async with Sandbox(workspace, log=log) as box:
        disk.works.clear()
        result = await box.exec(["sh", "-c", "ls >/dev/null; echo done"], timeout=60)
        assert result.text == "done\n"


@pytest.mark.parametrize("error", [errno.EIO, errno.ENOSPC, errno.EROFS])
async def test_i3_a_log_that_cannot_be_written_ends_the_sandbox(
    workspace: Path, log: Log, disk: Disk, error: int
) -> None:
    box = await Sandbox(workspace, log=log).start()
    try:
        disk.error = error
        with pytest.raises(SandboxClosed, match="log cannot be written"):
            for _ in range(1000):
                await box.exec(["sh", "-c", "ls >/dev/null"], timeout=60)
    finally:
        await box.close()
    assert log.failure is not None
    assert os.strerror(error) in str(log.failure)


async def test_i3_what_waits_for_its_record_is_refused_when_that_fails(workspace: Path, log: Log, disk: Disk) -> None:
    async with Sandbox(workspace, log=log) as box:
        server = await box.start_process(["/usr/bin/python3", "-c", SERVE])
        assert server.stdout is not None
        assert await server.stdout.readline() == b"ready\n"
        disk.works.clear()
        await box.start_process(["/usr/bin/python3", "-c", CONNECT.format(port=8000)])
        await asyncio.sleep(0.5)
        disk.error = errno.EIO
        disk.works.set()
        assert await asyncio.wait_for(server.stdout.readline(), 60) == b"", "it connected without a record"
        with pytest.raises(SandboxClosed):
            await box.exec(["true"])


async def test_other_sandboxes_without_a_log_go_on(workspace: Path, log: Log, disk: Disk) -> None:
    async with Sandbox(workspace) as other, Sandbox(workspace, log=log) as box:
        disk.error = errno.EIO
        with pytest.raises(SandboxClosed):
            for _ in range(1000):
                await box.exec(["true"], timeout=60)
        assert (await other.exec(["echo", "alive"])).text == "alive\n"


async def test_a_caller_that_dies_while_its_record_is_written_leaves_nothing(
    workspace: Path, log: Log, disk: Disk
) -> None:
    async with Sandbox(workspace, log=log) as box:
        disk.works.clear()
        script = f'timeout -s KILL 0.5 /usr/bin/python3 -c "{CONNECT.format(port=9)}"; echo $?'
        result = await box.exec(["sh", "-c", script], timeout=60)
        assert result.text.strip() == "137"
        disk.works.set()
        assert (await box.exec(["echo", "alive"])).text == "alive\n"


async def test_several_sandboxes_in_one_log(workspace: Path, log: Log) -> None:
    boxes = [Sandbox(workspace, log=log) for _ in range(3)]
    await asyncio.gather(*(box.start() for box in boxes))
    await asyncio.gather(*(box.exec(["true"]) for box in boxes))
    await asyncio.gather(*(box.close() for box in boxes))
    log.seal()
    ended = [record for record in records(log.directory) if isinstance(record.event, SessionEnded)]
    assert len({record.context.session for record in ended}) == 3
    verified(log.directory)


async def test_i3_a_yes_has_no_effect_before_it_is_durable_who_said_it(workspace: Path, log: Log, disk: Disk) -> None:
    """Even where the policy has nobody wait for records of that kind."""
    policy = Policy(syscalls=Syscalls(ask=("getpriority",)), log=LogPolicy(asynchronous=tuple(Kind)))
    asking = "import os; print(os.getpriority(os.PRIO_PROCESS, 0), flush=True)"
    async with Sandbox(workspace, policy=policy, log=log) as box:
        client = asyncio.create_task(box.exec(["/usr/bin/python3", "-c", asking], timeout=60))
        queue = box.core.supervision.approvals
        assert await asyncio.to_thread(wait_until, lambda: queue.held == 1)
        disk.works.clear()
        (question,) = queue.waiting()
        queue.answer(question.number, Verdict.ALLOW, "anna (uid 7)", reason="because")
        done, _ = await asyncio.wait([client], timeout=1)
        assert not done, "it went on although the answer was not durable"
        disk.works.set()
        assert (await client).exit_code == 0
        refused = asyncio.create_task(box.exec(["/usr/bin/python3", "-c", asking], timeout=60))
        assert await asyncio.to_thread(wait_until, lambda: queue.held == 1)
    with suppress(SandboxClosed):
        await refused
    found = [record.event for record in records(log.directory)]
    yes, no = [event for event in found if isinstance(event, Approval)]
    decisions = [event for event in found if isinstance(event, Decision) and event.decider == "approvals"]
    assert (yes.by, yes.verdict, yes.scope, yes.reason) == ("anna (uid 7)", Verdict.ALLOW, Scope.ONCE, "because")
    assert (yes.question, yes.target, yes.rule) == (question.number, "kernel.getpriority", "syscalls.ask[0]")
    assert yes.action == action_hash(decisions[0].action) == no.action
    assert found.index(yes) < found.index(decisions[0])
    assert yes.origin == decisions[0].action.origin and yes.asked_at <= yes.ended_at
    assert (no.ending in (Ending.CLOSED, Ending.WITHDRAWN), no.verdict, no.by) == (True, Verdict.DENY, "nobody")
    log.seal()
    verified(log.directory)


# ---- corral log ----


def command(cli: CommandLine, *words: str) -> subprocess.CompletedProcess[bytes]:
    return cli("log", *words)


def test_an_outsider_verifies_with_a_key_and_a_checkpoint_of_before(
    cli: CommandLine, place: Path, tmp_path: Path
) -> None:
    assert cli.run("--log", str(place), "--", "true").returncode == 0
    key = command(cli, "keys", "--log", str(place)).stdout.decode().strip()
    kept = tmp_path / "kept"
    kept.write_bytes(command(cli, "checkpoint", "--log", str(place)).stdout)
    assert cli.run("--log", str(place), "--", "true").returncode == 0
    words = ("--log", str(place), "--key", key, "--earlier", str(kept))
    assert command(cli, "verify", *words).returncode == 0
    proof = command(cli, "prove", "3", "--log", str(place)).stdout
    (tmp_path / "proof").write_bytes(proof)
    done = command(cli, "check", str(tmp_path / "proof"), "--key", key, "--json")
    assert json.loads(done.stdout)["valid"] is True
    # The owner of the log and of its key writes another history from the beginning.
    for path in sorted(place.rglob("*"), reverse=True):
        path.unlink() if path.is_file() else path.rmdir()
    assert cli.run("--log", str(place), "--", "true").returncode == 0
    assert cli.run("--log", str(place), "--", "true").returncode == 0
    assert command(cli, "verify", "--log", str(place), "--key", key).returncode == 0
    done = command(cli, "verify", *words)
    assert done.returncode == 1
    assert b"consistency" in done.stdout


def test_a_session_under_another_policy_says_what_is_different(cli: CommandLine, place: Path, tmp_path: Path) -> None:
    policy = tmp_path / "policy.yaml"
    for text in ("", "syscalls: {ask: [getpriority]}\n"):
        policy.write_text(f"agent: {{name: coder, version: '7'}}\n{text}")
        assert cli.run("--log", str(place), "--policy", str(policy), "--", "true").returncode == 0
    first, changed = events(place, PolicyChanged)
    assert (first.old, changed.old, changed.by) == ("", first.new, changed.by)
    assert changed.changes == ('syscalls.ask: added "getpriority"',) and f"uid {os.geteuid()}" in changed.by
    hashes = [record.context.policy_hash for record in records(place) if isinstance(record.event, SessionStarted)]
    assert hashes == [first.new, changed.new]
    found = command(cli, "query", "event=policy.changed", "limit=5", "--details", "--log", str(place))
    assert found.stdout.count(b"begins under") == 2 and b'added "getpriority"' in found.stdout
    assert b"another policy" in cli("replay", "--json", "--log", str(place)).stdout


def test_a_new_key_signs_and_the_old_one_stays_known(cli: CommandLine, place: Path) -> None:
    assert cli.run("--log", str(place), "--", "true").returncode == 0
    before = command(cli, "keys", "--log", str(place)).stdout
    assert command(cli, "rotate", "--log", str(place)).returncode == 0
    assert cli.run("--log", str(place), "--", "true").returncode == 0
    after = command(cli, "keys", "--log", str(place)).stdout.decode().splitlines()
    assert after[0] == before.decode().strip()
    assert len(after) == 2
    assert command(cli, "verify", "--log", str(place), *(f"--key={key}" for key in after)).returncode == 0
    assert key_path(place).with_name("log.key.1").exists()


def test_a_witness_cosigns_what_continues(cli: CommandLine, place: Path, tmp_path: Path) -> None:
    assert cli.run("--log", str(place), "--", "true").returncode == 0
    key = command(cli, "keys", "--log", str(place)).stdout.decode().strip()
    own = tmp_path / "witness.key"
    verifier = command(cli, "key", str(own), "witness.example/one", "--witness").stdout.decode().strip()
    words = ("log", "witness", str(tmp_path / "memory"), "--key", str(own), "--log", key, "--listen", "127.0.0.1:0")
    with cli.start(*words) as process:
        try:
            assert process.stdout is not None
            assert process.stdout.readline().decode().strip() == verifier
            address = process.stdout.readline().decode().rpartition(" ")[2].strip()
            asked = ("--log", str(place), "--witness", f"http://{address}={verifier}")
            assert command(cli, "cosign", *asked).returncode == 0
            checked = ("--log", str(place), "--key", key, "--witness", verifier, "--quorum", "1")
            assert command(cli, "verify", *checked).returncode == 0
            assert cli.run("--log", str(place), "--", "true").returncode == 0
            done = command(cli, "verify", *checked)
            assert (done.returncode, b"cosignature" in done.stdout) == (1, True)
            assert command(cli, "cosign", *asked).returncode == 0
            assert command(cli, "verify", *checked).returncode == 0
        finally:
            process.terminate()
        assert process.wait(30) == 0


# ---- looking back ----


@pytest.fixture
def session(cli: CommandLine, place: Path) -> str:
    """A session that is over: a program was run, a call refused."""
    script = "printf 'a\\033[2J' >/dev/null; mount -t tmpfs '\033[2Jx' /mnt 2>/dev/null; exit 0"
    assert cli.run("--log", str(place), "--", "sh", "-c", script).returncode == 0
    return records(place)[0].context.session


def test_sessions_are_listed_shown_and_replayed(cli: CommandLine, place: Path, session: str, tmp_path: Path) -> None:
    words = ("--log", str(place))
    (row,) = json.loads(command(cli, "sessions", *words, "--json").stdout)
    assert (row["session"], row["refused"], row["records"]) == (session, 1, len(records(place)))
    for shown in (
        command(cli, "sessions", *words).stdout,
        command(cli, "show", *words, "--session", session[:4], "--details").stdout,
        cli("replay", session[:4], *words).stdout,
        cli("replay", *words, "--details").stdout,
        command(cli, "review", *words).stdout,
    ):
        assert b"kernel.mount" in shown or session.encode() in shown
        assert is_plain(shown)
    lines = command(cli, "show", *words, "--json").stdout.splitlines()
    assert [json.loads(line)["number"] for line in lines] == list(range(len(records(place))))
    assert command(cli, "export", "--format", "nothing", *words).returncode == 125
    table = tmp_path / "table.parquet"
    assert command(cli, "export", "--format", "parquet", "-o", str(table), *words).returncode == 0
    assert table.read_bytes()[-4:] == b"PAR1" and not table.stat().st_mode & 0o077
    found = command(cli, "export", "verdict=deny", "action=kernel.*", *words).stdout.splitlines()
    assert [json.loads(line)["record"]["kernel"]["name"] for line in found] == ["mount"]
    assert is_plain(command(cli, "query", "exe=*", *words, "--details").stdout)
    assert command(cli, "query", "colour=red", *words).returncode == 125
    page = tmp_path / "page.html"
    assert cli("replay", *words, "--html", str(page)).returncode == 0
    assert b"Content-Security-Policy" in page.read_bytes()
    assert not page.stat().st_mode & 0o077
    assert cli("replay", "no such", *words).returncode == 125
    assert command(cli, "review", *words, "--since", "yesterday").returncode == 125


def is_plain(output: bytes) -> bool:
    """Whether nothing in it could move a cursor, and it is no traceback."""
    return all(byte >= 32 or byte == 10 for byte in output) and b"Traceback" not in output


def test_what_another_policy_would_have_decided(cli: CommandLine, place: Path, session: str, tmp_path: Path) -> None:
    policy = tmp_path / "policy.yaml"
    policy.write_text("agent: {name: other}\n")
    done = cli("replay", "--log", str(place), "--policy", str(policy))
    assert (done.returncode, b"0 harder, 0 milder" in done.stdout) == (0, True)
    policy.write_text("process:\n  deny: [{path: mount}]\n")
    done = cli("replay", session, "--log", str(place), "--policy", str(policy), "--json")
    assert done.returncode == 1
    (row,) = [json.loads(line) for line in done.stdout.splitlines()]
    assert (row["was"]["verdict"], row["would_be"]["verdict"]) == ("allow", "deny")


@pytest.mark.parametrize("words", [("verify",), ("keys",), ("prove", "0"), ("checkpoint",), ("rotate",)])
def test_where_there_is_no_log_that_is_said(cli: CommandLine, tmp_path: Path, words: tuple[str, ...]) -> None:
    done = command(cli, *words, "--log", str(tmp_path / "nothing"))
    assert done.returncode == 125
    assert b"there is no log" in done.stderr
