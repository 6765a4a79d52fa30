"""The invariants of the design (section 6) that sandbox, supervisor and monitor must hold, by their numbers.

I3, I9 and I10 are about the log, which comes with its own issue.
"""

from __future__ import annotations

import asyncio
import fcntl
import json
import os
import secrets
from collections import Counter
from collections.abc import Callable
from itertools import product
from pathlib import Path
from typing import Never

import pytest

from corral.actions import Action, Decision, Kind, Opinion, Verdict
from corral.errors import CorralError, WallError
from corral.monitor.core import Monitor
from corral.monitor.parts import Answer, Held
from corral.policy.model import Network, NetworkRule, Policy, Syscalls
from corral.sandbox import channel, paths
from corral.sandbox import prepare as preparing
from corral.sandbox.box import Sandbox
from corral.sandbox.plan import Plan
from corral.supervisor import listener, memory
from corral.supervisor.call import Call
from corral.supervisor.processes import Processes
from corral.supervisor.sockets import Copy
from tests.contain.attacks import OPEN, PRELUDE, PYTHON, inside, numbers
from tests.contain.conftest import Compile, MakeBox, own_groups, own_sandbox_processes, wait_until

_CONNECTIONS = """
import errno, json, socket
answers = {}
four, six = socket.AF_INET, socket.AF_INET6
for family, address in ((four, "192.0.2.1"), (four, "198.51.100.7"), (six, "2001:db8::1")):
    for kind in (socket.SOCK_STREAM, socket.SOCK_DGRAM):
        with socket.socket(family, kind) as s:
            s.settimeout(2)
            try:
                s.connect((address, 443))
                s.send(b"x")
                answers[f"{address} {kind}"] = "sent"
            except OSError as error:
                answers[f"{address} {kind}"] = errno.errorcode.get(error.errno, str(error))
print(json.dumps(answers))
"""


def _fingerprint(tree: Path) -> dict[str, tuple[object, ...]]:
    found: dict[str, tuple[object, ...]] = {}
    for path in [tree, *sorted(tree.rglob("*"))]:
        status = path.lstat()
        content = path.read_bytes() if path.is_file() and not path.is_symlink() else b""
        found[str(path)] = (status.st_mode, status.st_uid, status.st_gid, status.st_mtime_ns, status.st_nlink, content)
    return found


async def test_i1_no_packet_has_anywhere_to_go(make_box: MakeBox, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(preparing, "has_way_out", lambda _: False)  # what stands behind the policy's answer
    box = await make_box(policy=OPEN)
    result = await box.exec(["/usr/bin/python3", "-c", _CONNECTIONS], timeout=60, check=True)
    answers = json.loads(result.stdout)
    assert len(answers) == 6
    assert set(answers.values()) == {"ENETUNREACH"}


async def test_i1_no_descriptor_but_the_three_of_the_command_gets_in(workspace: Path, make_box: MakeBox) -> None:
    reader, writer = os.pipe()
    directory = os.open("/", os.O_RDONLY)
    for fd in (reader, writer, directory):
        os.set_inheritable(fd, True)
    try:
        box = await make_box()
        result = await box.exec(["/usr/bin/python3", "-c", "import os; print(sorted(os.listdir('/proc/self/fd')))"])
    finally:
        for fd in (reader, writer, directory):
            os.close(fd)
    # The fourth is the listing's own.
    assert result.text.strip() == "['0', '1', '2', '3']"


async def test_i1_no_file_outside_the_layer_changes(workspace: Path, make_box: MakeBox) -> None:
    (workspace / "sub").mkdir()
    (workspace / "sub/kept").write_text("kept")
    before = _fingerprint(workspace)
    box = await make_box()
    script = "echo x > file.txt; rm -r sub; ln -s /etc evil; chmod 777 .; mkfifo p; touch /tmp/t ~/h; echo done"
    assert (await box.exec(["sh", "-c", script])).text == "done\n"
    await box.close()
    assert _fingerprint(workspace) == before


# Everything that a program can do to its surroundings by a call, and what came of it on the other side.
_EFFECTS = f"""
four, one, two = socket.AF_INET, socket.SOCK_STREAM, socket.SOCK_DGRAM
def effects():
    answers = {{}}
    server, there = socket.socket(four, one), socket.socket(four, two)
    answers["bind"] = attempt(there.bind, ("127.0.0.1", 0))
    answers["bind stream"] = attempt(server.bind, ("127.0.0.1", 0))
    answers["listen"] = attempt(server.listen)
    local = socket.socket(socket.AF_UNIX, one)
    path = "/tmp/effect" + str(time.monotonic_ns())
    answers["bind path"] = attempt(local.bind, path)
    answers["listen path"] = attempt(local.listen)
    made, udp = socket.socket(four, one), socket.socket(four, two)
    answers["connect"] = attempt(made.connect, OWN.getsockname())
    answers["connect path"] = attempt(socket.socket(socket.AF_UNIX, one).connect, LOCAL.getsockname())
    answers["sendto"] = attempt(udp.sendto, b"x", UDP.getsockname())
    answers["sendmsg"] = attempt(udp.sendmsg, [b"x"], [], 0, UDP.getsockname())
    answers["mount"] = call({numbers("mount")["mount"]}, 0, 0, 0, 0, 0)
    pid = os.fork()
    if pid == 0:
        try:
            os.execv("/bin/true", ["true"])
        except OSError as error:
            os._exit(error.errno)
    answers["execve"] = name(os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]))
    arrived = Counter()
    for kind, waiting in (("connect", OWN), ("connect path", LOCAL), ("send", UDP)):
        waiting.setblocking(False)
        while not attempt(waiting.accept if kind != "send" else lambda: waiting.recv(9)):
            arrived[kind] += 1
    return [answers, arrived, os.path.lexists(path)]
from collections import Counter
OWN, LOCAL, UDP = socket.create_server(("127.0.0.1", 0)), socket.socket(socket.AF_UNIX), socket.socket(four, two)
LOCAL.bind("/tmp/own.sock"), LOCAL.listen(), UDP.bind(("127.0.0.1", 0))
while True:
    tell(effects())
    if not sys.stdin.readline():
        break
"""
_ALLOWED = {"bind", "bind stream", "listen", "bind path", "listen path", "connect", "connect path", "sendto", "sendmsg",
            "execve"}  # fmt: skip
Effects = tuple[dict[str, str], dict[str, int], bool]


class _Program:
    """A program inside that tries everything, again whenever it is told to."""

    def __init__(self, box: Sandbox) -> None:
        self._box = box

    async def start(self) -> Effects:
        """Its servers are made, and a first round, while all is well."""
        self._process = await self._box.start_process([PYTHON, "-c", PRELUDE + _EFFECTS])
        first = await self._answer()
        assert first is not None
        return first

    async def again(self) -> Effects | None:
        """What came of another round; None where its sandbox has ended."""
        await self._process.write(b"again\n")
        return await self._answer()

    async def _answer(self) -> Effects | None:
        line = await asyncio.wait_for(self._process.stdout.readline(), 60)
        if not line:
            return None
        answers, arrived, exists = json.loads(line)
        return answers, arrived, exists


def _made(effects: Effects) -> set[str]:
    return {what for what, errno in effects[0].items() if not errno}


def _decisions(box: Sandbox) -> tuple[Decision, ...]:
    box.core.supervision.flush()
    return box.core.supervision.recent.all()


async def test_i1_every_effect_has_been_decided_on(box: Sandbox) -> None:
    """As many as had an effect were allowed, no more and no fewer; and what is denied has none."""
    program = _Program(box)
    effects = await program.start()
    assert _made(effects) == _ALLOWED
    assert effects[1:] == ({"connect": 1, "connect path": 1, "send": 2}, True)
    found = Counter(one.action.kind for one in _decisions(box) if one.allowed)
    # Of these, three binds and two listens are for the servers of the test itself, and one exec is the program.
    assert found == {
        Kind.NET_BIND: 3 + 3,
        Kind.NET_LISTEN: 2 + 2,
        Kind.NET_CONNECT: 2,
        Kind.NET_SEND: 2,
        Kind.PROCESS_EXEC: 1 + 1,
    }
    monitor = box.core.supervision._monitor
    monitor._policy = lambda action: Opinion(Verdict.DENY, "the test")
    denied = await program.again()
    assert denied is not None
    assert set(denied[0].values()) == {"EACCES", "EPERM"}
    assert denied[1:] == ({}, False)
    assert Counter(one.action.kind for one in _decisions(box) if one.allowed) == found


def _raises(*_: object, **__: object) -> Never:
    raise RuntimeError("secret detail")


def _fails(*_: object, **__: object) -> Never:
    raise OSError


_PLACES: dict[str, tuple[object, str]] = {
    "the caller": (Processes, "find"),
    "its memory": (memory, "read"),
    "its descriptors": (memory, "take"),
    "the copy": (Copy, "__init__"),
    "the decision": (Monitor, "submit"),
    "the outcome": (Call, "_decided"),
}


@pytest.mark.parametrize("broken", [_raises, _fails])
@pytest.mark.parametrize("place", _PLACES)
async def test_i2_whatever_fails_nothing_is_allowed(
    box: Sandbox, monkeypatch: pytest.MonkeyPatch, place: str, broken: Callable[..., Never]
) -> None:
    program = _Program(box)
    await program.start()
    monkeypatch.setattr(*_PLACES[place], broken)
    effects = await program.again()
    monkeypatch.undo()
    if effects is None:
        assert box.core.end_reason
        return
    answers, arrived, exists = effects
    needed = {"the caller": _ALLOWED, "the decision": _ALLOWED, "the outcome": _ALLOWED}.get(
        place, _ALLOWED - {"execve"} if place != "its memory" else {"connect", "bind", "sendto", "sendmsg", "execve"}
    )
    assert not needed & _made(effects), answers
    assert answers["mount"] == "EPERM"
    assert "ENOSYS" not in answers.values()
    assert not arrived and not exists
    assert not any("secret" in one.reason for one in _decisions(box))
    again = await program.again()
    assert again is not None and _made(again) == _ALLOWED


async def test_i2_when_one_step_fails_nothing_runs_and_nothing_is_left(
    workspace: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def with_a_wall_that_cannot_stand(plan: Plan, *arguments: object, **how: object) -> bool:
        plan.sysctl("kernel/no-such-sysctl", "1")
        return True

    monkeypatch.setattr(preparing, "plan_landlock", with_a_wall_that_cannot_stand)
    with pytest.raises(WallError) as failure:
        async with Sandbox(workspace) as box:
            await box.exec(["touch", "ran"])
    assert failure.value.step == "sysctl"
    assert not (workspace / "ran").exists()
    assert wait_until(lambda: not own_sandbox_processes() and not own_groups())


async def test_i2_a_launcher_that_answers_nonsense_ends_the_sandbox(
    box: Sandbox, monkeypatch: pytest.MonkeyPatch
) -> None:
    def broken(_: object) -> None:
        raise CorralError("nonsense")

    monkeypatch.setattr(channel, "receive_report", broken)
    with pytest.raises(Exception, match="the sandbox has ended"):
        await box.exec(["true"])
    assert wait_until(lambda: not own_sandbox_processes())


async def test_i4_nothing_of_corral_is_inside(box: Sandbox) -> None:
    result = await box.exec(["ls", "-d", paths.cache_directory(), paths.state_directory()])
    assert result.exit_code == 2
    assert result.stdout == b""
    # Root's runtime directory has the name of the place where the agent is told of refusals: empty, so another one.
    runtime = paths.runtime_directory()
    assert os.listdir(runtime)
    assert (await box.exec(["ls", "-A", runtime])).stdout == b""
    processes = await box.exec(["sh", "-c", "cat /proc/1/environ /proc/1/mem /proc/1/maps /proc/1/fd/* | wc -c"])
    assert processes.text.strip() == "0"


async def test_i5_what_the_controller_asks_for_is_sealed_before_it_is_sent(
    box: Sandbox, monkeypatch: pytest.MonkeyPatch
) -> None:
    sent: list[int] = []
    send = channel.send_request

    def remember(*arguments: object, **how: object) -> None:
        memfd = how["fds"][0]  # type: ignore[index]
        sent.append(fcntl.fcntl(memfd, fcntl.F_GET_SEALS))
        send(*arguments, **how)  # type: ignore[arg-type]

    monkeypatch.setattr(channel, "send_request", remember)
    await box.exec(["true"], check=True)
    needed = fcntl.F_SEAL_WRITE | fcntl.F_SEAL_SHRINK | fcntl.F_SEAL_GROW | fcntl.F_SEAL_SEAL
    assert [seals & needed for seals in sent] == [needed]


_FLIP = r"""
#include <arpa/inet.h>
#include <pthread.h>
#include <poll.h>
#include <stdio.h>
#include <stdlib.h>
#include <sys/socket.h>
#include <unistd.h>
static struct sockaddr_in where;
static int ports[2];
static volatile int end;
static void *flip(void *unused) {
    for (unsigned n = 0; !end; n++) *(volatile unsigned short *)&where.sin_port = htons(ports[n & 1]);
    return unused;
}
int main(int argc, char **argv) {
    int servers[2], made = 0, refused = 0, reached[2] = {0};
    for (int i = 0; i < 2; i++) {
        int yes = 1;
        struct sockaddr_in own = {AF_INET, htons(ports[i] = atoi(argv[i + 1])), {htonl(0x7f000001)}};
        servers[i] = socket(AF_INET, SOCK_STREAM, 0);
        bind(servers[i], (void *)&own, sizeof own);
        listen(servers[i], 4096);
        where = own;
    }
    pthread_t thread;
    pthread_create(&thread, 0, flip, 0);
    for (int n = 0; n < 3000; n++) {
        int client = socket(AF_INET, SOCK_STREAM, 0);
        if (connect(client, (void *)&where, sizeof where)) refused++; else made++;
        close(client);
        for (int i = 0; i < 2; i++) {
            struct pollfd waiting = {servers[i], POLLIN};
            while (poll(&waiting, 1, 0) > 0) { close(accept(servers[i], 0, 0)); reached[i]++; }
        }
    }
    end = 1;
    pthread_join(thread, 0);
    printf("%d %d %d %d\n", made, refused, reached[0], reached[1]);
}
"""


async def test_i5_what_was_decided_is_what_is_done(make_box: MakeBox, compile_c: Compile) -> None:
    """A thread changes the address all the time, between one that is allowed and one that is denied."""
    rule = NetworkRule(network="127.0.0.1/32", ports=((7002, 7002),))
    box = await make_box(policy=Policy(network=Network(deny=(rule,))))
    result = await box.exec([compile_c(_FLIP, "flip"), "7001", "7002"], timeout=100, check=True)
    made, refused, allowed, denied = map(int, result.text.split())
    assert (made, denied) == (allowed, 0)
    assert made + refused == 3000 and made and refused
    decided: Counter[Verdict] = Counter()
    for one in _decisions(box):
        if one.action.kind is Kind.NET_CONNECT:
            decided[one.verdict] += one.count
    assert decided == {Verdict.ALLOW: made, Verdict.DENY: refused}


async def test_i5_the_kernel_goes_on_by_itself_only_where_registers_decide(
    make_box: MakeBox, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A call that goes on is made from memory as it is by then. Of an exec nothing is decided where no rule is, of what
    is renamed nothing ever but whether it is a directory that must be made anew, and then it does not go on."""
    box = await make_box(policy=Policy(syscalls=Syscalls(ask=("getpriority",))))
    names = Counter[str]()
    waiting: dict[int, str] = {}
    proceed, start = listener.proceed, Call.__init__

    def remember(call: Call, sandbox: object, notification: listener.Notification, name: str) -> None:
        waiting[notification.id] = name
        start(call, sandbox, notification, name)  # type: ignore[arg-type]

    def count(number: int, call: int) -> None:
        names[waiting.get(call, "rename")] += 1  # which is looked at without a Call (supervisor.moving)
        proceed(number, call)

    monkeypatch.setattr(Call, "__init__", remember)
    monkeypatch.setattr(listener, "proceed", count)
    effects = await _Program(box).start()
    assert _made(effects) == _ALLOWED
    names.pop("rename", None)  # of Python's own files of bytecode, or none
    assert names == {"setsid": 1, "execve": 2}


class _Says:
    """A part of the monitor with one opinion of one kind of action."""

    def __init__(self, verdict: Verdict, grant: str = "") -> None:
        self._verdict, self._grant = verdict, grant

    def judge(self, action: Action) -> Opinion:
        return Opinion(self._verdict if action.kind is Kind.NET_LISTEN else Verdict.ALLOW, self._verdict.name)

    def grants(self, action: Action, opinion: Opinion) -> str:
        return self._grant


async def test_i6_verdicts_only_rise(box: Sandbox) -> None:
    """Whatever two parts say, the harder one decides; nobody is there to answer, and a grant is for ``ask`` alone."""
    monitor, approvals = box.core.supervision._monitor, box.core.supervision.approvals
    process = await box.start_process(
        [PYTHON, "-c", f"{PRELUDE}\nwhile sys.stdin.readline(): tell(attempt(socket.create_server, ('127.0.0.1', 0)))"]
    )
    verdicts = (Verdict.ALLOW, Verdict.ASK, Verdict.DENY)
    for policy, risk, grant in product(verdicts, verdicts, ("", "a grant")):
        monitor._policy = _Says(policy).judge
        monitor._others = (("risk", _Says(risk).judge),)
        monitor._autonomy = _Says(Verdict.ALLOW, grant)
        await process.write(b"listen\n")
        expected = max(policy, risk)
        if expected is Verdict.ASK and not grant:
            while not approvals.held:
                await asyncio.sleep(0.005)
            (question,) = approvals.waiting()
            answer = Verdict.ALLOW if risk is Verdict.ASK else Verdict.DENY
            approvals.answer(question.number, answer, "the test")
            expected = answer
        elif expected is Verdict.ASK:
            expected = Verdict.ALLOW
        said = json.loads(await asyncio.wait_for(process.stdout.readline(), 60))
        assert said == ("" if expected is Verdict.ALLOW else "EACCES"), (policy, risk, grant)
        last = [one for one in _decisions(box) if one.action.kind is Kind.NET_LISTEN][-1]
        assert last.verdict is expected
    process.kill()
    await process.wait()


async def test_i6_no_answer_lets_a_call_through_that_the_table_refuses(
    make_box: MakeBox, monkeypatch: pytest.MonkeyPatch
) -> None:
    """What is asked for by name is what is free. What the table refuses stays refused, and no record says otherwise."""
    box = await make_box(policy=Policy(syscalls=Syscalls(ask=("unshare", "personality"))))
    known = numbers("unshare", "personality")
    script = (
        f"tell([call({known['unshare']}, 0x10000000), call({known['personality']}, 0x0040000),"
        f" call({known['unshare']}, 0x400)])"
    )
    approvals = box.core.supervision.approvals
    asked: list[str] = []
    ask = approvals.ask

    def remember(action: Action, opinion: Opinion, answered: Callable[[Answer], None]) -> Held:
        asked.append(action.name)
        return ask(action, opinion, answered)

    monkeypatch.setattr(approvals, "ask", remember)
    trying = asyncio.create_task(inside(box, script))
    while not trying.done():
        for question in approvals.waiting():
            approvals.answer(question.number, Verdict.ALLOW, "the test")
        await asyncio.sleep(0.001)
    assert asked == ["kernel.unshare"]  # a person is not asked what nobody can allow
    assert trying.result() == ["EPERM", "EPERM", ""]
    allowed = [one.action.name for one in _decisions(box) if one.action.kind is Kind.KERNEL and one.allowed]
    assert allowed == ["kernel.unshare"]
    assert approvals.held == 0


async def test_i7_every_file_effect_can_be_dropped(workspace: Path, make_box: MakeBox) -> None:
    first = await make_box()
    await first.exec(["sh", "-c", "echo changed > file.txt; echo new > new; touch ~/home /tmp/tmp"], check=True)
    await first.close()
    second = await make_box()
    result = await second.exec(["sh", "-c", "cat file.txt; ls -A . ~ /tmp"], check=True)
    assert "original" in result.text
    assert not {"new", "home", "tmp"} & set(result.text.split())


async def test_i8_a_secret_of_the_caller_is_nowhere_inside(
    workspace: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, make_box: MakeBox
) -> None:
    secret = secrets.token_hex(16)
    monkeypatch.setenv("API_KEY", secret)
    monkeypatch.setenv("AWS_SECRET_ACCESS_KEY", secret)
    (tmp_path / "credentials").write_text(secret)
    box = await make_box()
    script = f"env; cat /proc/*/environ /proc/*/cmdline 2>/dev/null; cat {tmp_path}/credentials; true"
    result = await box.exec(["sh", "-c", script], check=True)
    assert "HOME=/home/agent" in result.text
    # The command line of the search itself names a path, not the secret.
    assert secret.encode() not in result.stdout + result.stderr
