"""The supervisor at its limits: whatever fails, fails closed, and the other sandboxes go on.

What an attack may have won is always asked of the program inside (what did the call return?) and of the host (did
anything happen?), never of the supervisor.
"""

from __future__ import annotations

import asyncio
import gc
import json
import os
import select
import signal
import subprocess
import sys
import time
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Never

import pytest

from corral.actions import Action, Decision, Kind, Opinion, Verdict
from corral.errors import SandboxClosed
from corral.monitor.records import BURST
from corral.policy.model import Filesystem, Policy, Resources, Syscalls
from corral.sandbox.box import Sandbox
from corral.supervisor import handlers, listener, service
from corral.supervisor.call import Call
from corral.supervisor.processes import MAX_KNOWN, Processes
from corral.supervisor.sockets import Copy
from tests.contain.attacks import PRELUDE, PYTHON, inside, numbers, still_serves
from tests.contain.command_line import adopting_orphans, descendants, groups_of
from tests.contain.conftest import Compile, MakeBox, wait_until

MOUNT = numbers("mount")["mount"]
GETPRIORITY = numbers("getpriority")["getpriority"]
ASKED = Policy(syscalls=Syscalls(ask=("getpriority",)))
REFUSED = f"tell(call({MOUNT}, 0, 0, 0, 0, 0))"
LISTEN = "tell(attempt(socket.create_server, ('127.0.0.1', 0)))"
PATIENCE = 30.0


def records(box: Sandbox, kind: Kind = Kind.KERNEL) -> list[Decision]:
    box.core.supervision.flush()
    return [one for one in box.core.supervision.recent.all() if one.action.kind is kind]


async def until(condition: Callable[[], bool]) -> None:
    async with asyncio.timeout(PATIENCE):
        while not condition():
            await asyncio.sleep(0.005)


def descriptors() -> Counter[str]:
    """What this process has open, by kind. Processes that are remembered come and go, and are left out."""
    found: Counter[str] = Counter()
    for name in os.listdir("/proc/self/fd"):
        with suppress(OSError):
            kind = os.readlink(f"/proc/self/fd/{name}")
            found["pidfd" if "pidfd" in kind else kind.partition(":[")[0]] += 1
    found.pop("pidfd", None)
    return found


# ---- faults of ours ----


@pytest.mark.parametrize("error", [RuntimeError, MemoryError, RecursionError, AssertionError, OSError, TimeoutError])
async def test_a_handler_that_raises_denies_that_call_only(
    make_box: MakeBox, monkeypatch: pytest.MonkeyPatch, error: type[Exception]
) -> None:
    box, other = await make_box(), await make_box()

    def broken(call: Call) -> Never:
        if call.sandbox.name == box.id:
            raise error("secret detail")
        handler(call)
        raise AssertionError("answered already, so nothing comes of this")

    handler = handlers.HANDLERS["listen"]
    monkeypatch.setitem(handlers.HANDLERS, "listen", broken)
    assert await inside(box, LISTEN) == "EPERM"
    assert await inside(other, LISTEN) == ""
    (record,) = records(box)
    assert record.verdict is Verdict.DENY
    assert record.action.name == "kernel.listen"
    assert "secret" not in record.reason
    await still_serves(box)
    monkeypatch.undo()
    assert await inside(box, LISTEN) == ""


@pytest.mark.parametrize("place", ["find", "allowed"])
async def test_a_fault_around_a_decision_denies(box: Sandbox, monkeypatch: pytest.MonkeyPatch, place: str) -> None:
    """Before it, nobody can tell whose call this is; after it, what was allowed cannot be carried out."""

    def broken(*_: object, **__: object) -> Never:
        raise RuntimeError

    server = LISTEN[5:-1]
    process = await box.start_process(
        [PYTHON, "-c", f"{PRELUDE}\ntell(1); sys.stdin.readline(); tell([{server}, call({MOUNT}, 0, 0, 0, 0, 0)])"]
    )
    assert await process.stdout.readline() == b"1\n"
    # It is running: from here on its own execve(2) would be denied, too.
    if place == "find":
        monkeypatch.setattr(Processes, "find", broken)
    else:
        monkeypatch.setattr(Copy, "listen", broken)
    await process.write(b"go\n")
    assert json.loads(await process.stdout.readline()) == ["EPERM", "EPERM"]
    await process.wait()
    monkeypatch.undo()
    denied = [one.action.name for one in records(box)]
    assert denied == (["kernel.bind"] if place == "find" else ["kernel.listen"]) + ["kernel.mount"]
    await still_serves(box)


WORKERS = r"""
#include <errno.h>
#include <pthread.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/syscall.h>
#include <unistd.h>
/* N threads: each says "b", makes one call, and says what it got: "ok", or the errno. */
static long number;
static void say(const char *text) { write(1, text, strlen(text)); }
static void *work(void *unused) {
    char line[32];
    say("begin\n");
    long result = syscall(number, 0, 0, 0, 0, 0);
    if (result < 0)
        snprintf(line, sizeof line, "errno %d\n", errno);
    else
        strcpy(line, "ok\n");
    say(line);
    return unused;
}
int main(int argc, char **argv) {
    pthread_t threads[1000];
    int count = atoi(argv[1]);
    number = atol(argv[2]);
    for (int i = 0; i < count; i++)
        pthread_create(threads + i, NULL, work, NULL);
    for (int i = 0; i < count; i++)
        pthread_join(threads[i], NULL);
    say("all\n");
}
"""


@pytest.mark.filterwarnings("ignore::pytest.PytestUnhandledThreadExceptionWarning")
@pytest.mark.parametrize("error", [RuntimeError, SystemExit])
async def test_a_fault_of_the_loop_ends_every_sandbox(
    make_box: MakeBox, compile_c: Compile, monkeypatch: pytest.MonkeyPatch, error: type[BaseException]
) -> None:
    """Nobody would answer any more. No call that waits comes back, neither allowed nor as "no such call"."""
    program = compile_c(WORKERS, "workers")
    boxes = [await make_box(policy=ASKED) for _ in range(2)]
    processes = [await box.start_process([program, "20", str(GETPRIORITY)]) for box in boxes]
    await until(lambda: all(box.core.supervision.approvals.held == 20 for box in boxes))
    shared = service.shared()

    def broken() -> Never:
        raise error

    shared.loop.post(broken)
    for box, process in zip(boxes, processes, strict=True):
        assert "its supervisor failed" in await asyncio.wait_for(box.wait_ended(), PATIENCE)
        assert await process.stdout.read() == b"begin\n" * 20
    # The next one has another supervisor.
    assert service.shared() is not shared
    await still_serves(await make_box())


@pytest.mark.filterwarnings("ignore::pytest.PytestUnhandledThreadExceptionWarning")
async def test_who_comes_to_a_supervisor_that_has_failed_ends(
    make_box: MakeBox, monkeypatch: pytest.MonkeyPatch
) -> None:
    await make_box()
    failed = service.shared()
    failed.loop.post(lambda: sys.exit("the test ends this thread"))
    assert wait_until(lambda: not failed._thread.is_alive())
    monkeypatch.setattr(service, "shared", lambda: failed)
    try:
        late = await make_box()
        with pytest.raises(SandboxClosed):
            await late.exec(["true"], timeout=PATIENCE)
        assert "its supervisor failed" in await asyncio.wait_for(late.wait_ended(), PATIENCE)
    except SandboxClosed as error:  # as early as that
        assert "its supervisor failed" in str(error)


@pytest.mark.parametrize("error", [RuntimeError, OSError, PermissionError])
async def test_a_fault_of_one_listener_ends_its_sandbox_only(
    make_box: MakeBox, monkeypatch: pytest.MonkeyPatch, error: type[Exception]
) -> None:
    box, other = await make_box(), await make_box()
    supervised = box.core.supervision._supervised
    assert supervised is not None
    receive, fd = listener.receive, supervised.listener

    def broken(number: int) -> listener.Notification | None:
        if number == fd:
            raise error
        return receive(number)

    monkeypatch.setattr(listener, "receive", broken)
    with pytest.raises(SandboxClosed):
        await box.exec([PYTHON, "-c", "print('ran')"], timeout=PATIENCE)
    assert "lost the listener" in await asyncio.wait_for(box.wait_ended(), PATIENCE)
    await still_serves(other)


# ---- parts and sinks ----


async def test_i2_a_count_that_cannot_be_written_ends_the_sandbox(
    box: Sandbox, monkeypatch: pytest.MonkeyPatch
) -> None:
    """At the end of an exec, on the thread that controls the sandbox: it ends, and the exec's end is still told."""

    def full(**_: object) -> Never:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(box.core.supervision._records, "flush", full)
    async with asyncio.timeout(30):
        with suppress(SandboxClosed):
            await box.exec(["/bin/true"])
        await box.wait_ended()
    assert "records cannot be written" in box.core.end_reason


def set_policy(box: Sandbox, judge: Callable[[Action], Opinion]) -> Callable[[Action], Opinion]:
    """Puts another part in the policy's slot; returns the one that was there."""
    monitor = box.core.supervision._monitor
    before = monitor._policy
    setattr(monitor, "_policy", judge)  # noqa: B010
    return before


async def test_i2_a_part_of_the_monitor_that_raises_denies(make_box: MakeBox) -> None:
    box, other = await make_box(), await make_box()
    process = await box.start_process(
        [PYTHON, "-c", f"{PRELUDE}\nprint(1, flush=True); sys.stdin.readline()\n{LISTEN[:-1]} + call({MOUNT}, 0))"]
    )
    assert await process.stdout.readline() == b"1\n"

    def broken(_: Action) -> Opinion:
        raise ValueError("secret detail")

    before = set_policy(box, broken)
    await process.write(b"\n")
    assert json.loads(await process.stdout.readline()) == "EACCESEPERM"
    assert await inside(other, LISTEN) == ""
    set_policy(box, before)
    await process.wait()
    denied = [one for one in box.core.supervision.recent.all() if not one.allowed]
    assert [one.rule for one in denied] == ["policy failed"] * len(denied) and len(denied) >= 2
    assert not any("secret" in one.reason for one in denied)
    await still_serves(box)


async def test_a_record_that_cannot_be_written_ends_its_sandbox(make_box: MakeBox) -> None:
    """What cannot be recorded does not happen (I3): the call never returns."""
    box, other = await make_box(), await make_box()
    process = await box.start_process(
        [PYTHON, "-c", f"{PRELUDE}\nprint(1, flush=True); sys.stdin.readline()\n{LISTEN}; print('returned')"]
    )
    assert await process.stdout.readline() == b"1\n"

    def full(_: Decision) -> None:
        raise OSError(28, "no space")

    box.core.supervision._monitor._sink = type("Full", (), {"write": staticmethod(full)})()
    await process.write(b"\n")
    assert "its records cannot be written (OSError)" in await asyncio.wait_for(box.wait_ended(), PATIENCE)
    # It may have been told no before it died; it was not told yes.
    assert await process.stdout.read() in (b"", b'"EACCES"\n', b'"EACCES"\nreturned\n')
    await still_serves(other)


async def test_a_slow_answer_keeps_its_caller_waiting_and_nobody_else(make_box: MakeBox, compile_c: Compile) -> None:
    """One call is held for as long as it takes all others to do all that they want, and then answered."""
    box, other = await make_box(policy=ASKED), await make_box(policy=ASKED)
    slow = await box.start_process([compile_c(WORKERS, "workers"), "1", str(GETPRIORITY)])
    await until(lambda: box.core.supervision.approvals.held == 1)
    busy = f"[call({MOUNT}, 0, 0, 0, 0, 0) for _ in range(500)]; {LISTEN}"
    answers = await asyncio.gather(*(inside(place, busy) for place in (box, box, other, other)))
    assert answers == [""] * 4
    (question,) = box.core.supervision.approvals.waiting()
    box.core.supervision.approvals.answer(question.number, Verdict.ALLOW, "the test")
    assert await slow.stdout.read() == b"begin\nok\nall\n"


async def test_a_slow_part_makes_calls_late_not_wrong(make_box: MakeBox) -> None:
    """A part must not wait; one that does holds up everybody, and everybody still gets the right answer."""
    box, other = await make_box(), await make_box()
    times = []

    def slow(action: Action) -> Opinion:
        if action.kind is not Kind.PROCESS_EXEC:
            times.append(action)
            time.sleep(1)
        return before(action)

    before = set_policy(box, slow)
    script = f"tell([call({MOUNT}, 0, 0, 0, 0, 0), attempt(socket.create_server, ('127.0.0.1', 0))])"
    answers = await asyncio.gather(*(inside(place, script) for place in (box, other)))
    assert answers == [["EPERM", ""]] * 2
    assert len(times) == 3  # mount, bind, listen


# ---- floods ----

FLOOD = r"""
#include <stdio.h>
#include <stdlib.h>
#include <sys/syscall.h>
#include <sys/wait.h>
#include <unistd.h>
int main(int argc, char **argv) {
    int processes = atoi(argv[1]), calls = atoi(argv[2]), wrong = 0, status;
    for (int i = 0; i < processes; i++)
        if (fork() == 0) {
            for (int n = 0; n < calls; n++)
                if (syscall(SYS_mount, 0, 0, 0, 0, 0) != -1)
                    wrong = 1;
            printf("%d\n", getpid());
            fflush(stdout);
            _exit(wrong);
        }
    while (wait(&status) > 0)
        wrong |= status;
    return wrong ? 1 : 0;
}
"""
PROCESSES, CALLS = 4, 25_000


def resident() -> int:
    """Bytes of this process that lie in memory."""
    return int(Path("/proc/self/statm").read_text().split()[1]) * os.sysconf("SC_PAGESIZE")


async def test_a_flood_becomes_counts_and_starves_nobody(make_box: MakeBox, compile_c: Compile) -> None:
    """100,000 refused calls of several processes: every one is counted, and next to nothing is kept of them."""
    box, other = await make_box(), await make_box()
    program = compile_c(FLOOD, "flood")
    steady = f"for _ in range(300):\n    assert call({MOUNT}, 0, 0, 0, 0, 0) == 'EPERM'\ntell('done')"
    await inside(other, steady)
    gc.collect()
    before = resident()
    began = time.monotonic()
    flood = asyncio.create_task(box.exec([program, str(PROCESSES), str(CALLS)], timeout=120))
    await until(lambda: len(box.core.supervision.recent.all()) > BURST)
    assert await inside(other, steady) == "done"
    assert not flood.done(), "a flood in one sandbox must not keep another waiting until it is over"
    result = await flood
    assert result.exit_code == 0
    assert resident() - before < 64 << 20
    counted: Counter[int] = Counter()
    found = [one for one in records(box) if one.action.name == "kernel.mount"]
    for one in found:
        assert one.action.origin.process is not None and one.action.origin.process.exe == program
        counted[one.action.origin.process.inner_pid] += one.count
    assert counted == {int(pid): CALLS for pid in result.text.split()}
    assert len(counted) == PROCESSES
    # For every second that the flood took, a burst one by one and one count.
    assert len(found) <= PROCESSES * (BURST + 1) * (time.monotonic() - began + 2)
    assert max(one.count for one in found) > CALLS / 100
    assert sum(denial.count for denial in result.denials) == PROCESSES * CALLS
    assert sum(one.count for one in records(other) if one.action.name == "kernel.mount") == 600


async def test_a_storm_of_processes_is_told_apart(make_box: MakeBox, compile_c: Compile) -> None:
    """2,000 short lives, each with a call of its own: no record names another's process, and nothing is kept."""
    box = await make_box(policy=Policy(resources=Resources(processes=4096)))
    storm = r"""
    #include <stdio.h>
    #include <stdlib.h>
    #include <sys/syscall.h>
    #include <sys/wait.h>
    #include <unistd.h>
    int main(int argc, char **argv) {
        int count = atoi(argv[1]), live = 0;
        for (int i = 0; i < count; i++) {
            if (fork() == 0) {
                /* the pid in a register that nobody looks at: the record must be of the same process */
                syscall(700 + i % 300, 0, 0, 0, 0, 0);
                if (argc > 2) { printf("%d %d\n", getpid(), 700 + i % 300); fflush(stdout); }
                _exit(0);
            }
            if (++live >= 200) { wait(NULL); live--; }
        }
        while (wait(NULL) > 0);
    }
    """
    program = compile_c(storm, "storm")
    await still_serves(box)
    await asyncio.sleep(0.3)
    before = len(os.listdir("/proc/self/fd"))
    result = await box.exec([program, "2000", "tell"], timeout=60, check=True)
    made = {(int(pid), int(number)) for pid, number in (line.split() for line in result.text.splitlines())}
    assert len(made) == 2000
    seen = []
    for one in records(box):
        process = one.action.origin.process
        assert process is not None and process.exe == program and one.action.origin.exec == 2
        seen.append((process.inner_pid, int(one.action.name.rpartition(" ")[2])))
    assert len(seen) == 2000 and set(seen) == made
    await until(lambda: len(os.listdir("/proc/self/fd")) <= before + 8)


# ---- callers that die ----

MORTAL = r"""
#include <arpa/inet.h>
#include <errno.h>
#include <poll.h>
#include <signal.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/socket.h>
#include <sys/syscall.h>
#include <sys/un.h>
#include <sys/wait.h>
#include <unistd.h>
static struct sockaddr_in server = {AF_INET};
static struct sockaddr_un path = {AF_UNIX, "/tmp/mortal"};
static char *argv_true[] = {"/bin/true", 0};
static void victim(int kind, int asked) {
    struct sockaddr_un own = {AF_UNIX};
    int s;
    for (;;)
        switch (kind) {
        case 0: syscall(SYS_mount, 0, 0, 0, 0, 0); break;
        case 1: s = socket(AF_INET, SOCK_STREAM, 0); connect(s, (void *)&server, sizeof server); close(s); break;
        case 2: s = socket(AF_INET, SOCK_DGRAM, 0); sendto(s, "x", 1, 0, (void *)&server, 16); close(s); break;
        case 3: s = socket(AF_UNIX, SOCK_STREAM, 0); connect(s, (void *)&path, sizeof path); close(s); break;
        case 4: syscall(asked, 0, 0); break;
        case 5: if (vfork() == 0) { execv("/bin/true", argv_true); _exit(1); } wait(0); break;
        case 6: s = socket(AF_UNIX, SOCK_STREAM, 0);
                snprintf(own.sun_path, 100, "/tmp/own%d", getpid());
                bind(s, (void *)&own, sizeof own); listen(s, 1); unlink(own.sun_path); close(s); break;
        }
}
int main(int argc, char **argv) {
    int rounds = atoi(argv[1]), asked = atoi(argv[2]), served = 0;
    srand(argc > 3 ? atoi(argv[3]) : 1);
    signal(SIGPIPE, SIG_IGN);
    unlink(path.sun_path);
    server.sin_addr.s_addr = inet_addr("127.0.0.1");
    int tcp = socket(AF_INET, SOCK_STREAM, 0), local = socket(AF_UNIX, SOCK_STREAM, 0);
    socklen_t length = sizeof server;
    bind(tcp, (void *)&server, sizeof server); getsockname(tcp, (void *)&server, &length); listen(tcp, 4096);
    bind(local, (void *)&path, sizeof path); listen(local, 4096);
    for (int i = 0; i < rounds; i++) {
        pid_t pid = fork();
        if (pid == 0) { setpgid(0, 0); victim(i % 10 < 6 ? i % 10 : 6, asked); }
        usleep(rand() % 4000);
        kill(pid, SIGKILL);
        waitpid(pid, 0, 0);
        struct pollfd fds[2] = {{tcp, POLLIN}, {local, POLLIN}};
        while (poll(fds, 2, 0) > 0)
            for (int f = 0; f < 2; f++)
                if (fds[f].revents) { close(accept(fds[f].fd, 0, 0)); served++; }
    }
    int s = socket(AF_INET, SOCK_STREAM, 0);
    printf("%d %d\n", connect(s, (void *)&server, sizeof server), served > 0);
}
"""


@pytest.fixture
def no_collector() -> Iterator[None]:
    """What is not given back at once stays: the collector of cycles would hide it, sooner or later."""
    gc.collect()
    gc.disable()
    yield
    gc.enable()


@pytest.mark.usefixtures("no_collector")
async def test_callers_that_die_while_they_wait_leave_nothing(make_box: MakeBox, compile_c: Compile) -> None:
    box = await make_box(policy=ASKED)
    program = compile_c(MORTAL, "mortal")
    result = await box.exec([program, "140", str(GETPRIORITY)], timeout=60)  # the deputy is there from here on
    assert result.text == "0 1\n"
    supervised = box.core.supervision._supervised
    assert supervised is not None

    def nobody_waits() -> bool:
        return not supervised.open and not box.core.supervision.approvals.held

    await until(nobody_waits)
    before = descriptors()
    result = await box.exec([program, "500", str(GETPRIORITY), "7"], timeout=100)
    assert (result.exit_code, result.text) == (0, "0 1\n")
    await until(nobody_waits)
    wait_until(lambda: descriptors() <= before)
    assert not descriptors() - before
    assert len(supervised.processes._known) <= MAX_KNOWN
    await still_serves(box)


@pytest.mark.usefixtures("no_collector")
async def test_a_caller_that_dies_while_the_deputy_works_leaves_nothing(box: Sandbox) -> None:
    """The deputy is stopped meanwhile, so that each dies in the middle: of a bind, a connect, a listen, a send."""
    script = """
import select
def start(work):
    pid = os.fork()
    if pid == 0:
        work()
        os._exit(0)
    return pid
os.chdir("/tmp")
server, bound, udp = (socket.socket(socket.AF_UNIX, kind) for kind in (1, 1, 2))
server.bind("server"), server.listen(100), bound.bind("bound"), udp.bind("udp")
tell("ready")
for line in sys.stdin:
    if line == "start\\n":
        children = [start(lambda: socket.socket(socket.AF_UNIX).bind(f"/tmp/bind{os.getpid()}")) for _ in range(5)]
        children += [start(lambda: socket.socket(socket.AF_UNIX).bind(f"bind{os.getpid()}")) for _ in range(5)]
        children += [start(lambda: socket.socket(socket.AF_UNIX).connect("server")) for _ in range(5)]
        children += [start(lambda: bound.listen(1)) for _ in range(5)]
        children += [start(lambda: socket.socket(socket.AF_UNIX, 2).sendto(b"x", "udp")) for _ in range(5)]
    elif line == "kill\\n":
        for pid in children:
            os.kill(pid, 9)
            os.waitpid(pid, 0)
    tell(line)
"""
    process = await box.start_process([PYTHON, "-c", f"{PRELUDE}\n{script}"])
    supervised = box.core.supervision._supervised
    assert supervised is not None

    async def tell(word: str) -> None:
        await process.write(word.encode() + b"\n")
        await process.stdout.readline()

    assert await process.stdout.readline() == b'"ready"\n'
    (deputy,) = (pid for pid in descendants(box.core.keeper) if comm(pid) == "corral-deputy")
    for phase in ("first", "second"):
        if phase == "second":  # by now all is there that is made once
            before = descriptors()
        os.kill(deputy, signal.SIGSTOP)
        try:
            await tell("start")
            await until(lambda: len(supervised.open) == 25)
            await asyncio.sleep(0.05)
            await tell("kill")
            await until(lambda: not supervised.open)
        finally:
            os.kill(deputy, signal.SIGCONT)
    wait_until(lambda: not descriptors() - before)
    assert not descriptors() - before
    assert await inside(box, "s = socket.socket(1); tell(attempt(s.bind, '/tmp/after') + attempt(s.listen))") == ""
    process.kill()
    await process.wait()


def comm(pid: int) -> str:
    with suppress(OSError):
        return Path(f"/proc/{pid}/comm").read_text().strip()
    return ""


# ---- the controlling process ----

CONTROLLER = """
import asyncio, os, resource, sys
from corral.policy.model import Policy, Syscalls
from corral.sandbox.box import Sandbox

async def main():
    out, control = int(sys.argv[1]), int(sys.argv[2])
    async with Sandbox(sys.argv[3], policy=Policy(syscalls=Syscalls(ask=tuple(sys.argv[4].split())))) as box:
        ended = asyncio.get_running_loop().create_future()
        def run(*argv):
            nothing = os.open("/dev/null", os.O_RDONLY)
            box.core.exec(argv, (nothing, out, out), lambda exit: ended.set_result(exit))
            os.close(nothing)
        def tell(text):
            os.write(control, text.encode() + b"\\n")
        hear = lambda: asyncio.to_thread(sys.stdin.readline)
        def held():
            return box.core.supervision.approvals.held
{body}

def indent():
    pass

asyncio.run(main())
"""


class Controller:
    """A process of its own that controls one sandbox, whose programs write to a pipe that the test holds."""

    def __init__(self, directory: Path, workspace: Path, body: str, *rest: str, ask: str = "") -> None:
        for name in ("runtime", "state"):
            (directory / name).mkdir(mode=0o700, exist_ok=True)
        code = CONTROLLER.replace("{body}", "\n".join(f"        {line}" for line in body.strip("\n").split("\n")))
        env = {name: value for name, value in os.environ.items() if not name.startswith("PYTEST")}
        env["PYTHONPATH"] = ":".join(sys.path)
        env |= {"XDG_RUNTIME_DIR": str(directory / "runtime"), "XDG_STATE_HOME": str(directory / "state")}
        self._marks, marks = os.pipe()
        self._told, told = os.pipe()
        try:
            self.process = subprocess.Popen(
                [sys.executable, "-c", code, str(marks), str(told), str(workspace), ask, *rest],
                pass_fds=(marks, told),
                stdin=subprocess.PIPE,
                stderr=subprocess.PIPE,
                env=env,
            )
        finally:
            os.close(marks)
            os.close(told)
        self._buffers = {self._marks: b"", self._told: b""}

    def _lines(self, fd: int, until: Callable[[list[str]], bool], seconds: float) -> list[str]:
        deadline = time.monotonic() + seconds
        while not until(self._buffers[fd].decode().splitlines()):
            left = deadline - time.monotonic()
            if left <= 0 or not select.select([fd], [], [], left)[0]:
                break
            part = os.read(fd, 65536)
            if not part:
                break
            self._buffers[fd] += part
        return self._buffers[fd].decode().splitlines()

    def marks(self, count: int = 1 << 30, seconds: float = PATIENCE) -> list[str]:
        """What was written inside: once there are so many lines, or nobody can write any more."""
        return self._lines(self._marks, lambda lines: len(lines) >= count, seconds)

    def told(self, word: str, seconds: float = PATIENCE) -> list[str]:
        """What the controller has said, once it has said this."""
        lines = self._lines(self._told, lambda lines: word in lines, seconds)
        assert word in lines, (lines, self.why())
        return lines

    def say(self, word: str) -> None:
        assert self.process.stdin is not None
        self.process.stdin.write(word.encode() + b"\n")
        self.process.stdin.flush()

    def why(self) -> str:
        self.process.kill()
        return f"{self.process.communicate()[1]!r}"

    def close(self) -> None:
        self.process.send_signal(signal.SIGCONT)
        self.process.kill()
        self.process.communicate()
        os.close(self._marks)
        os.close(self._told)


@contextmanager
def controller(directory: Path, workspace: Path, body: str, *rest: str, ask: str = "") -> Iterator[Controller]:
    with adopting_orphans():
        process = Controller(directory, workspace, body, *rest, ask=ask)
        try:
            yield process
        finally:
            process.close()
            assert wait_until(lambda: not groups_of(process.process.pid))


HOLD = """
run(sys.argv[5], "50", sys.argv[6])
while held() < 50:
    await asyncio.sleep(0.01)
tell("held")
await hear()
"""


def test_a_controller_that_is_killed_takes_those_who_wait_with_it(
    tmp_path: Path, workspace: Path, compile_c: Compile
) -> None:
    program = compile_c(WORKERS, "workers")
    with controller(tmp_path, workspace, HOLD, program, str(GETPRIORITY), ask="getpriority") as child:
        child.told("held")
        child.process.kill()
        # To the end of the pipe: nobody inside has it any more, so nobody is there.
        assert child.marks() == ["begin"] * 50


STOP = """
run(sys.argv[5], "50", sys.argv[6])
await hear()
"""


def test_a_controller_that_is_stopped_keeps_calls_waiting_until_it_goes_on(
    tmp_path: Path, workspace: Path, compile_c: Compile
) -> None:
    wait = r"""
    #include <string.h>
    #include <sys/syscall.h>
    #include <unistd.h>
    int main(void) {
        for (int i = 0; i < 50; i++)
            if (fork() == 0) {
                write(1, "begin\n", 6);
                for (;;) { usleep(10000); syscall(SYS_mount, 0, 0, 0, 0, 0); write(1, "refused\n", 8); }
            }
        pause();
    }
    """
    program = compile_c(wait, "wait")
    with controller(tmp_path, workspace, "run(sys.argv[5])\nawait hear()", program) as child:
        child.marks(200)
        child.process.send_signal(signal.SIGSTOP)
        # Those whose answers were under way come back; then all wait.
        assert wait_until(
            lambda: not select.select([child._marks], [], [], 0.5)[0] or not child.marks(1 << 30, 0.1), 20
        )
        stopped = len(child.marks(1 << 30, 0.3))
        assert len(child.marks(1 << 30, 0.5)) == stopped
        child.process.send_signal(signal.SIGCONT)
        assert len(child.marks(stopped + 500)) >= stopped + 500
        assert set(child.marks(0)) == {"begin", "refused"}


FORK = """
run(sys.argv[5], "50", sys.argv[6])
while held() < 50:
    await asyncio.sleep(0.01)
child = os.fork()
if child == 0:
    from corral.supervisor import service
    assert service._shared is None
    supervised = box.core.supervision._supervised
    supervised.close()
    box.core.supervision.close()
    service.shared()
    tell("forked")
    import time
    time.sleep(600)
tell(str(child))
await hear()
for question in box.core.supervision.approvals.waiting():
    from corral.actions import Verdict
    box.core.supervision.approvals.answer(question.number, Verdict.ALLOW, "the test")
await ended
tell("answered")
run(sys.argv[5], "50", sys.argv[6]) if (ended := asyncio.get_running_loop().create_future()) else None
while held() < 50:
    await asyncio.sleep(0.01)
tell("again")
await hear()
"""


def test_a_forked_child_of_the_controller_answers_nothing_and_keeps_nothing_alive(
    tmp_path: Path, workspace: Path, compile_c: Compile
) -> None:
    program = compile_c(WORKERS, "workers")
    with controller(tmp_path, workspace, FORK, program, str(GETPRIORITY), ask="getpriority") as child:
        said = child.told("forked")
        pid = int(next(line for line in said + child.told("forked") if line.isdecimal()))
        try:
            assert set(child.marks(51, 0.5)) == {"begin"}
            child.say("answer")  # what the child has closed, the parent still hears
            child.told("answered")
            assert Counter(child.marks(101)) == {"begin": 50, "ok": 50, "all": 1}
            child.told("again")
            child.process.kill()
            # The end of the pipe, though the fork lives: it has the writing end, so count the lines instead.
            assert wait_until(lambda: not groups_of(child.process.pid), PATIENCE)
            os.kill(pid, 0)
        finally:
            os.kill(pid, signal.SIGKILL)
        assert Counter(child.marks()) == {"begin": 100, "ok": 50, "all": 1}


FULL = """
resource.setrlimit(resource.RLIMIT_NOFILE, (200, 200))
run(sys.argv[5], "-c", sys.argv[6])
await hear()
taken = []
try:
    while True:
        taken.append(os.open("/dev/null", os.O_RDONLY))
except OSError:
    pass
print(len(taken), file=sys.stderr)
tell_fd = control
tell("full")
await hear()
for fd in taken:
    os.close(fd)
tell("free")
await hear()
for one in box.core.supervision.recent.all():
    tell(f"{one.action.name}={one.verdict.name}={one.count}")
tell("end")
await hear()
"""
TRIES = f"""{PRELUDE}
import select
server = socket.create_server(("127.0.0.1", 0))
def tries():
    one, two = socket.socket(), socket.socket(socket.AF_UNIX)
    answers = [call({MOUNT}, 0, 0, 0, 0, 0), attempt(one.connect, server.getsockname()), attempt(two.bind, "")]
    answers.append(attempt(os.execv, "/bin/nothing", ["nothing"]))
    if answers[1] == "":
        server.settimeout(5)
        server.accept()
    tell(answers)
open("/tmp/go", "w").close()
stop = time.monotonic() + 60
tries()
while time.monotonic() < stop:
    time.sleep(0.02)
    tries()
"""


def test_a_controller_without_descriptors_left_denies_and_recovers(tmp_path: Path, workspace: Path) -> None:
    with controller(tmp_path, workspace, FULL, PYTHON, TRIES) as child:
        assert json.loads(child.marks(3)[0]) == ["EPERM", "", "", "ENOENT"]
        child.say("fill")
        child.told("full")
        start = len(child.marks(0))
        during = [json.loads(line) for line in child.marks(start + 8)[start + 1 :]]
        child.say("free")
        child.told("free")
        start = len(child.marks(0))
        after = [json.loads(line) for line in child.marks(start + 8)[start + 2 :]]
        child.say("records")
        said = child.told("end")
    # Nothing is allowed that would not be; what is refused is refused. TRIES accepts each connection that was made.
    for mount, _, _, execute in during:
        assert mount not in ("", "ENOSYS")
        assert execute not in ("", "ENOSYS")
    assert any(connect for _, connect, _, _ in during), "the table was not full"
    assert after and all(answers == ["EPERM", "", "", "ENOENT"] for answers in after), after
    # And what was refused for want of descriptors is on record.
    assert any(line.startswith("kernel.connect=DENY") for line in said), said
    assert sum(int(line.rpartition("=")[2]) for line in said if line.startswith("kernel.mount=DENY")) >= len(during)


# ---- strange callers ----

POINTERS = r"""
#include <errno.h>
#include <fcntl.h>
#include <netinet/in.h>
#include <stdio.h>
#include <string.h>
#include <sys/mman.h>
#include <sys/socket.h>
#include <sys/syscall.h>
#include <sys/un.h>
#include <sys/wait.h>
#include <unistd.h>
static long result(long value) { return value < 0 ? errno : 0; }
#define RUN(call) ({ int status; if (fork() == 0) { call; _exit(errno); } wait(&status); (long)WEXITSTATUS(status); })
int main(void) {
    setvbuf(stdout, 0, _IOFBF, 1 << 16);
    char *pages = mmap(0, 3 * 4096, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
    mprotect(pages + 4096, 4096, PROT_NONE);
    memset(pages, 'x', 4096);
    munmap(pages + 8192, 4096);
    struct sockaddr_in good = {AF_INET, htons(9), {htonl(0x7f000001)}};
    char *straddling = pages + 4096 - 8;
    memcpy(straddling, &good, 8);
    struct { const char *name; void *at; } places[] = {
        {"null", 0}, {"low", (void *)8}, {"none", pages + 4096}, {"unmapped", pages + 8192},
        {"straddling", straddling}, {"kernel", (void *)0xffff888000000000}, {"odd", (void *)0x8000000000000000},
        {"last", (void *)-1L}, {"end", (void *)0x7ffffffff000}, {"wrapping", (void *)-8L}};
    for (unsigned i = 0; i < sizeof places / sizeof *places; i++) {
        void *p = places[i].at;
        int tcp = socket(AF_INET, SOCK_STREAM, 0), udp = socket(AF_INET, SOCK_DGRAM, 0);
        int local = socket(AF_UNIX, SOCK_STREAM, 0);
        printf("%s connect %ld", places[i].name, result(connect(tcp, p, 16)));
        printf(" unix %ld", result(connect(local, p, 110)));
        printf(" bind %ld", result(bind(tcp, p, 16)));
        printf(" bind-unix %ld", result(bind(local, p, 110)));
        if (p)
            printf(" sendto %ld", result(sendto(udp, "x", 1, 0, p, 16)));
        printf(" data %ld", result(sendto(udp, p, 64, 0, (void *)&good, 16)));
        printf(" sendmsg %ld", result(sendmsg(udp, p, 0)));
        printf(" sendmmsg %ld", result(syscall(SYS_sendmmsg, udp, p, 1, 0)));
        struct iovec part = {p, 64};
        struct msghdr vectors = {&good, 16, p, 1}, data = {&good, 16, &part, 1}, name = {p, 16, &part, 0};
        struct msghdr control = {&good, 16, 0, 0, p, 64};
        printf(" vectors %ld", result(sendmsg(udp, &vectors, 0)));
        printf(" parts %ld", result(sendmsg(udp, &data, 0)));
        if (p) {
            printf(" name %ld", result(sendmsg(udp, &name, 0)));
            printf(" control %ld", result(sendmsg(udp, &control, 0)));
        }
        char *args[] = {p, 0};
        printf(" path %ld", RUN(syscall(SYS_execve, p, (char *[]){"x", 0}, (char *[]){0})));
        printf(" at %ld", RUN(syscall(SYS_execveat, AT_FDCWD, p, (char *[]){"x", 0}, (char *[]){0}, 0)));
        if (p) {
            printf(" argv %ld", RUN(syscall(SYS_execve, "/bin/true", p, (char *[]){0})));
            printf(" argument %ld", RUN(syscall(SYS_execve, "/bin/true", args, (char *[]){0})));
            printf(" environment %ld", RUN(syscall(SYS_execve, "/bin/true", (char *[]){"x", 0}, p)));
        }
        printf("\n");
        fflush(stdout);
        close(tcp), close(udp), close(local);
    }
}
"""


async def test_a_caller_without_memory_gets_what_it_gets_outside(box: Sandbox, compile_c: Compile) -> None:
    program = compile_c(POINTERS, "pointers")
    outside = subprocess.run([program], check=True, capture_output=True, timeout=60).stdout.decode()
    result = await box.exec([program], timeout=60)
    assert result.exit_code == 0
    assert result.text.splitlines() == outside.splitlines()
    assert len(outside.splitlines()) == 10
    assert outside.count(" 14") > 100  # EFAULT


CLOSED = r"""
#include <arpa/inet.h>
#include <errno.h>
#include <stdio.h>
#include <sys/prctl.h>
#include <sys/socket.h>
#include <sys/syscall.h>
#include <sys/wait.h>
#include <unistd.h>
int main(void) {
    struct sockaddr_in here = {AF_INET, 0, {htonl(0x7f000001)}};
    struct sockaddr_in there = {AF_INET, htons(9), {inet_addr("192.0.2.1")}};
    socklen_t length = sizeof here;
    int server = socket(AF_INET, SOCK_STREAM, 0), client = socket(AF_INET, SOCK_STREAM, 0);
    int out = socket(AF_INET, SOCK_STREAM, 0);
    bind(server, (void *)&here, sizeof here); getsockname(server, (void *)&here, &length); listen(server, 1);
    prctl(PR_SET_DUMPABLE, 0);
    int made = connect(client, (void *)&here, sizeof here) ? errno : 0;
    int away = connect(out, (void *)&there, sizeof there) ? errno : 0;
    int refused = syscall(SYS_mount, 0, 0, 0, 0, 0) ? errno : 0;
    int accepted = made ? 0 : accept(server, 0, 0) >= 0;
    printf("%d %d %d %d\n", made, accepted, away, refused);
    fflush(stdout);
    if (vfork() == 0) { execl("/bin/true", "true", (char *)0); _exit(errno); }
    int status; wait(&status);
    printf("%d\n", WEXITSTATUS(status));
}
"""


async def test_a_caller_that_cannot_be_looked_into_is_never_let_through_blindly(
    box: Sandbox, compile_c: Compile
) -> None:
    program = compile_c(CLOSED, "closed")
    result = await box.exec([program], timeout=60)
    first, second = result.text.splitlines()
    made, accepted, away, refused = map(int, first.split())
    decisions = box.core.supervision.recent.all()
    assert refused == 1 and away in (13, 1)
    assert (made, accepted) == (0, 1) or (made in (1, 13) and accepted == 0)
    connects = [one for one in decisions if one.action.kind is Kind.NET_CONNECT or one.action.name == "kernel.connect"]
    assert len(connects) == 2 and [one.allowed for one in connects] == [made == 0, False]
    assert Kind.KERNEL in {one.action.kind for one in decisions}
    ran = [
        one.allowed for one in decisions if one.action.kind is Kind.PROCESS_EXEC or one.action.name == "kernel.execve"
    ]
    assert ran[0] and ran[1] is (second == "0")
    for one in decisions:
        assert one.action.origin.exec == 1 and one.action.origin.process is not None


TABLES = r"""
#include <arpa/inet.h>
#include <errno.h>
#include <pthread.h>
#include <sched.h>
#include <stdio.h>
#include <sys/socket.h>
#include <sys/syscall.h>
#include <unistd.h>
static struct sockaddr_in servers[2];
static int peer(int fd) {
    struct sockaddr_in found; socklen_t length = sizeof found;
    if (getpeername(fd, (void *)&found, &length)) return -1;
    for (int i = 0; i < 2; i++) if (servers[i].sin_port == found.sin_port) return i;
    return -2;
}
static void *apart(void *unused) {
    if (unshare(CLONE_FILES)) return unused;
    int own = socket(AF_INET, SOCK_STREAM, 0);
    dup2(own, 100);  /* the same number, another socket */
    int made = connect(100, (void *)servers, sizeof *servers);
    printf("thread %d %d\n", made ? errno : 0, peer(100));
    close(100);
    printf("closed %d\n", connect(100, (void *)servers, sizeof *servers) ? errno : 0);
    return unused;
}
int main(void) {
    for (int i = 0; i < 2; i++) {
        socklen_t length = sizeof *servers;
        int server = socket(AF_INET, SOCK_STREAM, 0);
        servers[i] = (struct sockaddr_in){AF_INET, 0, {htonl(0x7f000001)}};
        bind(server, (void *)(servers + i), sizeof *servers); getsockname(server, (void *)(servers + i), &length);
        listen(server, 100);
    }
    dup2(socket(AF_INET, SOCK_STREAM, 0), 100);
    pthread_t thread;
    for (int i = 0; i < 50; i++) { pthread_create(&thread, 0, apart, 0); pthread_join(thread, 0); }
    printf("before %d\n", peer(100));
    int made = connect(100, (void *)(servers + 1), sizeof *servers);
    printf("first %d %d\n", made ? errno : 0, peer(100));
}
"""


async def test_the_descriptor_is_the_callers_own(box: Sandbox, compile_c: Compile) -> None:
    """A thread may have a table of descriptors of its own: the same number is another socket there."""
    result = await box.exec([compile_c(TABLES, "tables")], timeout=60, check=True)
    assert Counter(result.text.splitlines()) == {
        "thread 0 0": 50,
        "closed 9": 50,
        "before -1": 1,
        "first 0 1": 1,
    }


FILLED = """
taken = []
try:
    while True:
        taken.append(os.dup(0))
except OSError:
    pass
answers = [attempt(os.open, path, os.O_RDONLY) for path in ("file.txt", "/etc/hostname") for _ in range(300)]
os.close(taken.pop())
fd = os.open("file.txt", os.O_RDONLY)
tell([sorted(set(answers)), os.read(fd, 100).decode(), attempt(os.open, "file.txt", os.O_RDONLY)])
"""


async def test_a_caller_whose_table_of_descriptors_is_full_gets_none(make_box: MakeBox, workspace: Path) -> None:
    """Opened for it, but not to be given: EMFILE, as outside, and nothing stays open here."""
    policy = Policy(filesystem=Filesystem(watch=(f"{workspace}/**",)), resources=Resources(open_files=100))
    box = await make_box(policy=policy)
    before = descriptors()
    assert await inside(box, FILLED) == [["EMFILE"], "original\n", "EMFILE"]
    await still_serves(box)
    wait_until(lambda: not descriptors() - before)
    assert (descriptors() - before).total() <= 2  # the deputy, and what the agent is told


async def test_no_descriptor_of_the_supervisor_is_inherited(box: Sandbox) -> None:
    """Whatever the controlling program starts has none of the descriptors by which a sandbox is answered."""
    await inside(box, LISTEN)
    kept = []
    for name in os.listdir("/proc/self/fd"):
        try:
            target = os.readlink(f"/proc/self/fd/{name}")
            inheritable = os.get_inheritable(int(name))
        except OSError:
            continue
        if inheritable and int(name) > 2:
            kept.append(target)
    assert not [target for target in kept if "seccomp" in target or "pidfd" in target or "memfd:corral" in target]
