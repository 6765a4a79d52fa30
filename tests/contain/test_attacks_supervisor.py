"""Attacks on the supervisor by whoever knows its code: each was found by trying, and was one that worked."""

from __future__ import annotations

import asyncio
import subprocess
import sys
from pathlib import Path

from corral.actions import Program
from corral.monitor.records import MAX_TEXTS
from corral.sandbox.box import Sandbox
from corral.supervisor.service import MAX_REPEATED
from tests.contain.attacks import PRELUDE, PYTHON, inside, still_serves
from tests.contain.conftest import Compile, MakeBox


def programs(box: Sandbox) -> list[Program]:
    """What was executed, oldest first."""
    found = [decision.action.subject for decision in box.core.supervision.recent.all()]
    return [subject for subject in found if isinstance(subject, Program)]


PATIENCE = 30.0


async def nobody_waits(other: Sandbox) -> None:
    """The supervisor answers, whatever another sandbox does."""
    async with asyncio.timeout(PATIENCE):
        for _ in range(20):
            await still_serves(other)


CLOSES_WHAT_IT_PASSES = """
receiver = socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM)
receiver.bind("\\0full")
sender = socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM)
passed = os.open("/dev/null", os.O_RDONLY)
sender.setblocking(False)
while not attempt(sender.sendmsg, [b"x"], [], 0, "\\0full"):
    pass
sender.setblocking(True)
rights = [(socket.SOL_SOCKET, socket.SCM_RIGHTS, struct.pack("i", passed))]
answers = []
thread = threading.Thread(target=lambda: answers.append(attempt(sender.sendmsg, [b"x"], rights, 0, "\\0full")))
thread.start()
time.sleep(0.3)  # it waits, and is tried again from time to time
os.close(passed)
thread.join(10)
tell(answers)
"""


async def test_what_is_closed_while_its_message_waits_fails_that_message_only(make_box: MakeBox) -> None:
    """A message that waits for room is tried again and again, each time with the descriptors that it passes then."""
    box, other = await make_box(), await make_box()
    assert await inside(box, CLOSES_WHAT_IT_PASSES) == ["EBADF"]
    await still_serves(box)
    await still_serves(other)


MANY_NUMBERS = """
#include <stdlib.h>
#include <sys/syscall.h>
#include <unistd.h>
int main(int argc, char **argv) {
    for (int i = 0; i < 64; i++) syscall(5000);
    for (int i = 0; i < 2000; i++) syscall(2000 + i);
    write(1, "done\\n", 5);
    pause();
}
"""


async def test_a_call_of_every_number_takes_no_memory(box: Sandbox, compile_c: Compile) -> None:
    """What makes a repeated refusal cheap is kept for a few calls of a thread, and not for each of 2**30 numbers."""
    process = await box.start_process([compile_c(MANY_NUMBERS)])
    assert await process.stdout.readline() == b"done\n"
    supervised = box.core.supervision._supervised
    assert supervised is not None
    kept = [len(actor.repeated) for actor in supervised.processes._known.values()]
    assert 0 < max(kept) <= MAX_REPEATED


LONG_ARGUMENTS = """
#include <stdlib.h>
#include <string.h>
#include <sys/wait.h>
#include <unistd.h>
int main(int argc, char **argv) {
    static char text[65000];
    memset(text, 0xff, 64900);
    strcpy(text + 64900, "\\xf0\\x9f\\x98\\x80");
    char *arguments[] = {"true", text, 0};
    for (int i = 0; i < atoi(argv[1]); i++) {
        if (!vfork()) { execv("/bin/true", arguments); _exit(1); }
        wait(0);
    }
    return 0;
}
"""


async def test_records_of_long_arguments_are_kept_only_so_far(box: Sandbox, compile_c: Compile) -> None:
    """64 KiB that are no text take 256 KiB as one, and ten thousand records of that would be the memory of a host."""
    await box.exec([compile_c(LONG_ARGUMENTS), "300"], timeout=60, check=True)
    kept = [program for program in programs(box) if len(program.argv) == 2 and len(program.argv[1]) > 60000]
    assert 0 < sum(sys.getsizeof(program.argv[1]) for program in kept) <= MAX_TEXTS
    assert box.core.supervision.recent.dropped > 0


CHANGES_WITHOUT_A_TRACE = """
import hashlib, shutil
path = os.getcwd() + "/program"
shutil.copy("/bin/echo", path)
os.chmod(path, 0o755)
answers = []
for _ in range(2):
    subprocess.run([path], stdout=subprocess.DEVNULL, check=True)
    answers.append([hashlib.sha256(open(path, "rb").read()).hexdigest(), os.stat(path).st_ctime_ns])
    with open(path, "r+b") as file, mmap.mmap(file.fileno(), 0) as memory:
        at = memory.find(b" coreutils") - 3
        memory[at:at + 3] = b"EVL"
tell(answers)
"""


async def test_a_program_changed_through_its_mapping_has_another_digest(box: Sandbox) -> None:
    """On a tmpfs, as the layer is one, no time stamp tells of such a change."""
    (first, first_time), (second, second_time) = await inside(box, CHANGES_WITHOUT_A_TRACE)
    assert first != second
    assert first_time == second_time, "this file system tells; the test is about one that does not"
    assert [program.digest for program in programs(box) if program.path.endswith("/program")] == [first, second]


NAMES_A_TERMINAL = """
import stat
controller, terminal = os.openpty()
script = os.getcwd() + "/script"
with open(script, "w") as file:
    file.write(f"#!{os.ttyname(terminal)}\\n")
os.chmod(script, 0o755)
try:
    subprocess.run([script])
except OSError as error:
    tell(name(error.errno))
"""
OPERATOR = f"""
import asyncio, sys
from corral.sandbox.box import Sandbox
from tests.contain.attacks import inside

async def main():
    async with Sandbox(sys.argv[1]) as box:
        answer = await inside(box, {NAMES_A_TERMINAL!r})
    terminal = int(open("/proc/self/stat").read().rpartition(")")[2].split()[4])
    print(answer, terminal)

asyncio.run(main())
"""


def test_no_terminal_of_the_agent_becomes_the_controllers(workspace: Path) -> None:
    """A controller without a terminal gets the first one that it opens, and then the signals of who has it."""
    root = Path(__file__).parents[2]
    command = [sys.executable, "-c", OPERATOR, str(workspace)]
    found = subprocess.run(
        command,
        cwd=root,
        env={"PATH": "/usr/bin:/bin", "PYTHONPATH": ":".join(sys.path), "HOME": str(workspace.parent / "home")},
        start_new_session=True,
        capture_output=True,
        text=True,
        timeout=60,
        check=False,
    )
    assert (found.returncode, found.stdout) == (0, "EACCES 0\n"), found.stderr[-2000:]


READS_A_FIFO = """
os.mkfifo("fifo", 0o777)
os.chmod("fifo", 0o777)
with open("script", "w") as file:
    file.write(f"#!{os.getcwd()}/fifo\\n")
os.chmod("script", 0o755)
woken = threading.Event()
threading.Thread(target=lambda: (os.open("fifo", os.O_WRONLY), woken.set()), daemon=True).start()
answers = [attempt(subprocess.run, ["./script"]) for _ in range(20)]
tell([sorted(set(answers)), woken.is_set()])
"""


async def test_the_supervisor_opens_no_fifo(box: Sandbox) -> None:
    """It would look like a reader to whoever waits for one."""
    assert await inside(box, READS_A_FIFO) == [["EACCES"], False]


TAKES_THE_FLAG_AWAY = """
#include <errno.h>
#include <fcntl.h>
#include <netinet/in.h>
#include <pthread.h>
#include <signal.h>
#include <stdio.h>
#include <sys/socket.h>
#include <sys/time.h>
#include <unistd.h>
/* A connect that waits, over and over, while another thread sees to it that the socket does wait. */
static int racing;
static void *race(void *unused) { for (;;) fcntl(racing, F_SETFL, O_RDWR); return unused; }
static void nothing(int signal) {}
int main(void) {
    struct sigaction action = {.sa_handler = nothing};
    struct sockaddr_in address = {.sin_family = AF_INET, .sin_addr = {htonl(INADDR_LOOPBACK)}};
    struct sockaddr nowhere = {.sa_family = AF_UNSPEC};
    struct itimerval often = {{0, 3000}, {0, 3000}};
    socklen_t length = sizeof address;
    pthread_t thread;
    int listener = socket(AF_INET, SOCK_STREAM, 0);
    sigaction(SIGALRM, &action, 0);
    bind(listener, (void *)&address, sizeof address);
    listen(listener, 0);
    getsockname(listener, (void *)&address, &length);
    for (int i = 0; i < 4; i++)
        connect(socket(AF_INET, SOCK_STREAM | SOCK_NONBLOCK, 0), (void *)&address, sizeof address);
    racing = socket(AF_INET, SOCK_STREAM, 0);
    pthread_create(&thread, 0, race, 0);
    setitimer(ITIMER_REAL, &often, 0);
    write(1, "racing\\n", 7);
    for (int i = 0; i < 100; i++) {
        if (connect(racing, (void *)&address, sizeof address) == 0 || (errno != EINTR && errno != ETIMEDOUT))
            return 1;
        connect(racing, &nowhere, sizeof nowhere);
    }
    return 0;
}
"""


async def test_a_connect_that_waits_keeps_nobody_else_waiting(make_box: MakeBox, compile_c: Compile) -> None:
    """Made without waiting, of a socket from which another thread takes O_NONBLOCK away at that very moment."""
    box, other = await make_box(), await make_box()
    racer = await box.start_process([compile_c(TAKES_THE_FLAG_AWAY)])
    assert await racer.stdout.readline() == b"racing\n"
    await nobody_waits(other)
    assert (await asyncio.wait_for(racer.wait(), PATIENCE)).code == 0


LINGERS = """
listener = socket.create_server(("127.0.0.1", 0))
sender = socket.create_connection(listener.getsockname())
receiver = listener.accept()[0]
if os.fork() == 0:
    listener.close(); receiver.close()
    sender.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 1000))
    sender.setblocking(False)
    while not attempt(sender.send, bytes(1 << 16)):
        pass
    sender.setblocking(True)
    threading.Thread(target=attempt, args=(sender.sendmsg, [bytes(1 << 16)]), daemon=True).start()
    time.sleep(0.3)  # it waits for room: there is a copy of the socket now
    threading.Timer(0.3, os.kill, (os.getpid(), signal.SIGKILL)).start()
    os.close(sender.detach())
    time.sleep(600)
sender.close()
os.wait()
print("dead", flush=True)
time.sleep(600)
"""


async def test_a_connection_that_lingers_keeps_nobody_waiting(make_box: MakeBox) -> None:
    """Whoever closes a connection last waits as long as SO_LINGER says. That may be who had a copy of it."""
    box, other = await make_box(), await make_box()
    process = await box.start_process([PYTHON, "-c", PRELUDE + LINGERS])
    async with asyncio.timeout(PATIENCE):
        assert await process.stdout.readline() == b"dead\n"
        supervised = box.core.supervision._supervised
        assert supervised is not None
        while supervised.open:  # until the supervisor has seen that nobody waits for its copy any more
            await asyncio.sleep(0.01)
    await nobody_waits(other)
    process.kill()
