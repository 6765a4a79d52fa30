"""Calls that wait hold descriptors of the controller: of one sandbox never so many that others have none."""

from __future__ import annotations

import asyncio
import os
import resource
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from corral.actions import Decision, Verdict
from corral.policy.model import Filesystem, Network, Policy, Resources
from corral.sandbox.box import Sandbox
from corral.supervisor import service
from corral.supervisor.budget import PER_SOCKET_CALL, Budget
from tests.contain.attacks import inside
from tests.contain.conftest import Compile, MakeBox, wait_until

MANY = Resources(processes=4096, open_files=4096)
ASKED = Policy(network=Network(loopback=Verdict.ASK), resources=MANY)
PATIENCE = 60.0
CONNECTS = r"""
#include <arpa/inet.h>
#include <errno.h>
#include <pthread.h>
#include <stdio.h>
#include <stdlib.h>
#include <sys/socket.h>
#include <unistd.h>
/* N threads connect to one listener; with "full" it takes nobody, and they wait for ever. */
static struct sockaddr_in address = {.sin_family = AF_INET};
static int done, full, strange;
static void *work(void *unused) {
    int sock = socket(AF_INET, SOCK_STREAM, 0);
    int result = connect(sock, (void *)&address, sizeof address);
    __atomic_add_fetch(result == 0 ? &done : errno == ENFILE ? &full : &strange, 1, __ATOMIC_SEQ_CST);
    return unused;
}
int main(int argc, char **argv) {
    static pthread_t threads[4000];
    int count = atoi(argv[1]), server = socket(AF_INET, SOCK_STREAM, 0);
    socklen_t size = sizeof address;
    address.sin_addr.s_addr = htonl(INADDR_LOOPBACK);
    pthread_attr_t small;
    pthread_attr_init(&small);
    pthread_attr_setstacksize(&small, 1 << 16);
    if (bind(server, (void *)&address, size) || listen(server, argc > 2 ? 0 : 4096))
        return 1;
    getsockname(server, (void *)&address, &size);
    for (int i = 0; i < count; i++)
        if (pthread_create(threads + i, &small, work, NULL))
            return 2;
    for (int i = 0; i < count; i++)
        pthread_join(threads[i], NULL);
    printf("%d %d %d\n", done, full, strange);
    return 0;
}
"""


@pytest.fixture
def limit() -> Iterator[Callable[[int], None]]:
    """Gives this process fewer descriptors, and its supervisor a budget of as many."""
    shared = service.shared()
    before, budget = resource.getrlimit(resource.RLIMIT_NOFILE), shared.budget

    def set_limit(descriptors: int) -> None:
        resource.setrlimit(resource.RLIMIT_NOFILE, (descriptors, before[1]))
        shared.budget = Budget(descriptors)

    yield set_limit
    resource.setrlimit(resource.RLIMIT_NOFILE, before)
    shared.budget = budget


def refused(box: Sandbox) -> list[Decision]:
    box.core.supervision.flush()
    return [one for one in box.core.supervision.recent.all() if "no descriptors are left" in one.reason]


def waiting(box: Sandbox) -> int:
    return len(box.core.supervision.waiting_threads())


async def until(condition: Callable[[], bool]) -> None:
    async with asyncio.timeout(PATIENCE):
        while not condition():
            await asyncio.sleep(0.02)


OTHER = """
server = socket.create_server(("127.0.0.1", 0))
here = socket.socket(socket.AF_UNIX)
tell([attempt(socket.socket().connect, server.getsockname()), attempt(here.bind, "/tmp/here"), attempt(here.listen, 1),
    attempt(socket.socket(socket.AF_UNIX).connect, "/tmp/here"), open("file.txt").read(),
    attempt(lambda: subprocess.run(["/bin/true"], check=True))])
"""


async def test_a_thousand_waiting_threads_leave_descriptors_to_the_others(
    make_box: MakeBox, compile_c: Compile, workspace: Path, limit: Callable[[int], None]
) -> None:
    limit(1024)
    program = compile_c(CONNECTS, "connects")
    watched = Policy(filesystem=Filesystem(watch=(f"{workspace}/**",)))
    attacker, other = await make_box(policy=Policy(resources=MANY)), await make_box(policy=watched)
    attack = await attacker.start_process([program, "1000", "full"])
    # Each of them waits, or was told no; and each no is on record.
    await until(lambda: waiting(attacker) + sum(one.count for one in refused(attacker)) >= 995)
    assert all(one.verdict is Verdict.DENY and one.action.name == "kernel.connect" for one in refused(attacker))
    late = await make_box(policy=watched)
    for box in (other, late):
        assert await inside(box, OTHER, directory=str(workspace)) == ["", "", "", "", "original\n", ""]
    assert (await attacker.exec(["/bin/echo", "on"])).stdout == b"on\n"
    # A second one gets less than the first, and there is still enough.
    second = await late.start_process([program, "250", "full"])
    await until(lambda: waiting(late) + sum(one.count for one in refused(late)) >= 245)
    assert 0 < waiting(late) < waiting(attacker)
    assert await inside(other, OTHER.replace("here\"", "there\""), directory=str(workspace)) == [
        "", "", "", "", "original\n", ""]  # fmt: skip
    for process in (attack, second):
        process.kill()
        await process.wait()
    await until(lambda: service.shared().budget.held == 0)
    assert await inside(attacker, OTHER, directory=str(workspace)) == ["", "", "", "", "original\n", ""]


async def test_thousands_of_connects_are_held_and_made(make_box: MakeBox, compile_c: Compile) -> None:
    """As many as the budget has; whoever starts the first sandbox has the limit raised to what it may be."""
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    assert soft == hard or soft >= 1 << 19
    count = min(2000, soft * 3 // 4 // 2 // PER_SOCKET_CALL)
    box = await make_box(policy=ASKED)
    before = len(os.listdir("/proc/self/fd"))
    asking = asyncio.create_task(box.exec([compile_c(CONNECTS, "connects"), str(count)], timeout=120))
    queue = box.core.supervision.approvals
    await until(lambda: queue.held == count)
    assert len(os.listdir("/proc/self/fd")) <= before + count + 100  # one for each
    for question in queue.waiting():
        queue.answer(question.number, Verdict.ALLOW, "the test")
    assert (await asking).stdout == b"%d 0 0\n" % count
    assert not refused(box)


async def test_beyond_the_budget_calls_fail_and_what_is_held_is_not_lost(
    make_box: MakeBox, compile_c: Compile, limit: Callable[[int], None]
) -> None:
    limit(800)  # 600 of them for calls that wait, of which one sandbox gets half
    fits = 600 // 2 // PER_SOCKET_CALL
    box = await make_box(policy=ASKED)
    queue = box.core.supervision.approvals
    program = compile_c(CONNECTS, "connects")
    for _ in range(2):  # what was answered has given back what it held
        asking = asyncio.create_task(box.exec([program, str(fits + 50)], timeout=120))
        await until(lambda: queue.held == fits and waiting(box) == fits)
        assert (await box.exec(["/bin/echo", "on"])).stdout == b"on\n"
        for question in queue.waiting():
            queue.answer(question.number, Verdict.ALLOW, "the test")
        # Some may come so late that there is room for them again.
        while not asking.done():
            for question in queue.waiting():
                queue.answer(question.number, Verdict.ALLOW, "the test")
            await asyncio.sleep(0.01)
        done, full, strange = map(int, (await asking).stdout.split())
        assert (done + full, strange) == (fits + 50, 0) and done >= fits and full > 0
    assert sum(one.count for one in refused(box)) > 0
    assert wait_until(lambda: service.shared().budget.held == 0)


def test_something_is_left_however_many_take_all_that_they_get() -> None:
    budget = Budget(1024)
    for _ in range(5):
        held = 0
        while budget.admits(held, "connect"):
            held += PER_SOCKET_CALL
            budget.held += PER_SOCKET_CALL
        assert held > 0 and budget.admits(0, "connect")
        assert budget.admits(held, "execve") and budget.admits(held, "setsid")
    assert budget.held < 768
