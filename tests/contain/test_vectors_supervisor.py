"""Vectors 43 and 44: requests cannot be changed from inside, and PID 1 goes on serving whatever happens there."""

from __future__ import annotations

import asyncio
import signal

import pytest

from corral.errors import ExecError, RequestError
from corral.policy.model import MIB, Policy, Resources
from corral.sandbox.box import Sandbox
from corral.sandbox.core import State
from tests.contain.attacks import PRELUDE, PYTHON, bystander, inside, still_serves, users
from tests.contain.conftest import Compile, MakeBox

RACER = """
stop = time.monotonic() + float(sys.argv[1])
seen, written = set(), 0
def race():
    global written
    while time.monotonic() < stop:
        for path in glob.glob("/proc/[0-9]*/fd/*") + glob.glob("/proc/[0-9]*/map_files/*"):
            try:
                if "corral" in os.readlink(path):
                    seen.add(path)
                    fd = os.open(path, os.O_RDWR)
                    written += os.write(fd, b"CRLEXEC1 other")
                    os.close(fd)
            except OSError:
                continue
threads = [threading.Thread(target=race) for _ in range(3)]
[thread.start() for thread in threads]
print("racing", flush=True)
[thread.join() for thread in threads]
tell([sorted(seen), written])
"""


async def test_43_no_racer_inside_can_change_a_request(box: Sandbox) -> None:
    """The payload is sealed, is never open in or mapped into a process that the agent may look into."""
    racer = await box.start_process([PYTHON, "-c", PRELUDE + RACER, "3"])
    assert await racer.stdout.readline() == b"racing\n"
    for number in range(40):
        result = await box.exec(["/bin/echo", f"request {number}"], env={"TOKEN": str(number)}, timeout=30)
        assert (result.exit_code, result.text) == (0, f"request {number}\n")
    process = await box.start_process([PYTHON, "-c", PRELUDE + RACER, "0.5"], terminal=(24, 80))
    output = await process.stdout.read()
    assert (await process.wait()).code == 0
    assert b"[[], 0]" in output  # nor from beside the leader
    assert b"[[], 0]" in await racer.stdout.read()


SHARES_MEMORY = """
#include <sched.h>
#include <signal.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/mman.h>
#include <sys/wait.h>
#include <unistd.h>
static char *path;
static int flip(void *end) {
    for (long n = 0; n < 20000000 && !*(volatile int *)end; n++) strcpy(path, n & 1 ? "/bin/true" : "/bin/fals");
    return 0;
}
int main(void) {
    int *end = mmap(NULL, 65536, PROT_READ | PROT_WRITE, MAP_SHARED | MAP_ANONYMOUS, -1, 0);
    path = (char *)(end + 16);
    strcpy(path, "/bin/true");
    char *stack = malloc(1 << 16);
    pid_t peer = clone(flip, stack + (1 << 16), CLONE_VM | SIGCHLD, end);
    int ran = 0;
    for (int i = 0; i < 300; i++) {
        pid_t pid = vfork();
        if (pid == 0) { execl(path, "x", NULL); _exit(9); }
        int status;
        waitpid(pid, &status, 0);
        ran += WIFEXITED(status);
    }
    *end = 1;
    waitpid(peer, NULL, 0);
    printf("%d %d\\n", peer > 0, ran);
}
"""


async def test_43_memory_shared_with_a_peer_changes_only_ones_own_execs(box: Sandbox, compile_c: Compile) -> None:
    program = compile_c(SHARES_MEMORY)
    racing = asyncio.create_task(box.exec([program], timeout=60))
    for number in range(20):
        assert (await box.exec(["/bin/echo", str(number)], timeout=30)).text == f"{number}\n"
    assert (await racing).text == "1 300\n"


SIGNALS = """
for number in range(1, 65):
    for target in (1, -1) if sys.argv[1] == "all" else (1,):
        if target == -1 and number in (18, 19):
            continue
        try:
            os.kill(target, number)
        except OSError:
            pass
try:
    for number in (9, 19, 15):
        signal.pidfd_send_signal(os.pidfd_open(1), number)
except OSError:
    pass
for _ in range(20000):
    try:
        os.kill(1, 17)
    except OSError:
        break
tell("sent")
"""


@pytest.mark.parametrize("targets", ["init", "all"])
async def test_44_no_signal_from_inside_reaches_pid_1_or_the_host(targets: str, box: Sandbox) -> None:
    with bystander():
        for user in users(box):
            assert await inside(box, SIGNALS, targets, user=user) == "sent"
            await still_serves(box)
    assert box.state is State.RUNNING


async def test_44_stopping_everything_leaves_the_sandbox_answering(box: Sandbox) -> None:
    victim = await box.start_process(["/bin/sleep", "600"])
    assert (await box.exec(["/bin/sh", "-c", "kill -STOP -1; echo sent"], timeout=30)).text == "sent\n"
    await still_serves(box)
    victim.kill()
    assert (await victim.wait()).code == 128 + signal.SIGKILL


async def test_44_a_terminals_leader_killed_from_inside_takes_only_its_command(box: Sandbox) -> None:
    process = await box.start_process(["/bin/sh", "-c", "kill -9 $PPID; sleep 1; exit 3"], terminal=(24, 80))
    assert (await process.wait()).code == 128 + signal.SIGKILL
    await still_serves(box)


ORPHANS = """
limit = time.monotonic() + 30
made = 0
while made < 2000 and time.monotonic() < limit:
    try:
        pid = os.fork()
    except BlockingIOError:
        time.sleep(0.01)
        continue
    if pid == 0:
        try:
            os.fork()
        finally:
            os._exit(0)
    os.waitpid(pid, 0)
    made += 1
tell(made)
"""
ZOMBIES = """
import itertools
children = 0
while children < 400:
    if os.fork() == 0:
        os._exit(0)
    children += 1
print("full", flush=True)
time.sleep(600)
"""


async def test_44_a_flood_of_orphans_and_zombies_does_not_block_requests(box: Sandbox) -> None:
    zombies = await box.start_process([PYTHON, "-c", PRELUDE + ZOMBIES])
    assert await zombies.stdout.readline() == b"full\n"
    flood = asyncio.create_task(inside(box, ORPHANS))
    while not flood.done():
        await still_serves(box)
    assert flood.result() == 2000
    zombies.kill()
    await zombies.wait()
    assert set(await inside(box, "tell([pid for pid in os.listdir('/proc') if pid.isdecimal()])")) - {"1"} != set()
    assert (await box.stats()).processes <= 1


async def test_44_a_flood_of_output_and_exits_is_cut_and_marked(make_box: MakeBox) -> None:
    box = await make_box(policy=Policy(resources=Resources(output=MIB)))
    writer = "head -c 40000000 /dev/zero; head -c 40000000 /dev/zero >&2"
    floods = [box.exec(["/bin/sh", "-c", writer], timeout=60) for _ in range(3)]
    exits = [box.exec(["/bin/true"], timeout=60) for _ in range(50)]
    results = await asyncio.gather(*floods, *exits)
    for result in results[:3]:
        assert (len(result.stdout), len(result.stderr)) == (MIB, MIB)
        assert (result.stdout_truncated, result.stderr_truncated) == (True, True)
    assert {result.exit_code for result in results} == {0}


async def test_44_more_commands_at_once_than_there_are_places_are_refused(make_box: MakeBox) -> None:
    box = await make_box(policy=Policy(resources=Resources(processes=40)))
    tries = [box.exec(["/bin/sleep", "600"]) for _ in range(100)]
    tasks = [asyncio.ensure_future(each) for each in tries]
    done, running = await asyncio.wait(tasks, timeout=30, return_when=asyncio.FIRST_EXCEPTION)
    assert {type(task.exception()) for task in done} <= {ExecError, RequestError}
    assert done
    assert running
    for task in running:
        task.cancel()
    await asyncio.gather(*tasks, return_exceptions=True)
    async with asyncio.timeout(30):
        while (await box.stats()).processes > 1:
            await asyncio.sleep(0.01)
    await still_serves(box)
