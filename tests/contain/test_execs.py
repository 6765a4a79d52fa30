"""What runs inside: the record of every exec, whose it is, and rules about programs against those who race them."""

from __future__ import annotations

import asyncio
import hashlib
import os
import shutil
import threading
from pathlib import Path

import pytest

from corral.actions import Decision, Kind, Program, Verdict
from corral.policy.model import ExecRule, Policy, Processes
from corral.sandbox.box import Sandbox
from corral.supervisor import digests
from tests.contain.attacks import PYTHON
from tests.contain.conftest import Compile, MakeBox

ROUNDS = 1000
"""Of each race: every one executes a program, which takes milliseconds."""

MARK = r"""
#include <fcntl.h>
#include <libgen.h>
#include <stdio.h>
#include <string.h>
#include <unistd.h>
int main(int argc, char **argv) {
    char self[4096] = {0};
    readlink("/proc/self/exe", self, sizeof self - 1);
    int denied = strstr(self, "targetD") != NULL || (argc > 1 && strcmp(argv[1], "argumentD") == 0);
    if (chdir(dirname(self)) == 0 && denied)
        close(open("mark", O_CREAT | O_WRONLY, 0644));
    return denied ? 1 : 0;
}
"""


def execs(box: Sandbox) -> list[tuple[Decision, Program]]:
    """The records of programs, in their order."""
    found = []
    for decision in box.core.supervision.recent.all():
        if decision.action.kind is Kind.PROCESS_EXEC:
            assert isinstance(decision.action.subject, Program)
            found.append((decision, decision.action.subject))
    return found


def rules(workspace: Path) -> Policy:
    """Two refusals: of a program, and of an argument."""
    return Policy(
        process=Processes(
            deny=(
                ExecRule(f"{workspace}/targetD"),
                ExecRule(f"{workspace}/targetA", ("*", "argumentD", "**")),
            )
        )
    )


def exists_inside(box: Sandbox, path: Path) -> bool:
    """Looked up from the host, in the sandbox's tree."""
    return os.path.lexists(f"/proc/self/fd/{box.core.root_fd}{path}")


# ---- records ----


async def test_the_record_of_a_binary_names_the_file_its_arguments_and_its_content(box: Sandbox) -> None:
    assert (await box.exec(["/bin/sh", "-c", "cat /dev/null; true"])).exit_code == 0
    (first, shell), (second, cat) = execs(box)
    assert (shell.path, shell.argv) == (os.path.realpath("/bin/sh"), ("/bin/sh", "-c", "cat /dev/null; true"))
    real = os.path.realpath(shutil.which("cat", path="/usr/bin:/bin") or "")
    digest = hashlib.sha256(Path(real).read_bytes()).hexdigest()
    assert cat == Program(real, ("cat", "/dev/null"), digest=digest)
    assert (first.verdict, second.verdict) == (Verdict.ALLOW, Verdict.ALLOW)
    assert first.action.origin.exec == second.action.origin.exec == 1


async def test_the_record_of_a_script_names_its_interpreter(box: Sandbox, workspace: Path) -> None:
    script = "#! /bin/sh  -e \nexit 3\n"
    await box.write_file(f"{workspace}/script", script.encode(), mode=0o755)
    assert (await box.exec([f"{workspace}/script", "one"])).exit_code == 3
    ((_, program),) = execs(box)
    assert program.path == f"{workspace}/script"
    assert program.argv == (f"{workspace}/script", "one")
    assert program.interpreter == os.path.realpath("/bin/sh")
    assert program.digest == hashlib.sha256(script.encode()).hexdigest()


LARGE = 24 << 20


async def test_a_large_program_is_hashed_whole_and_again_when_it_has_changed(box: Sandbox, workspace: Path) -> None:
    for tail in (b"one", b"two"):
        content = b"#!/bin/true\n" + bytes(LARGE) + tail
        await box.write_file(f"{workspace}/large", content, mode=0o755)
        results = await asyncio.gather(*(box.exec([f"{workspace}/large"]) for _ in range(3)))
        assert [result.exit_code for result in results] == [0, 0, 0]
        found = {program.digest for _, program in execs(box)[-3:]}
        assert found == {hashlib.sha256(content).hexdigest()}


async def test_all_sandboxes_wait_for_small_programs_only(
    box: Sandbox, workspace: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The thread that answers everybody reads no more than a quarter of a MiB in one go."""
    seen = []
    make = digests._hash

    def watched(file: int, size: int) -> tuple[str, bool]:
        seen.append((threading.current_thread().name, size))
        return make(file, size)

    monkeypatch.setattr(digests, "_hash", watched)
    for size in (100 << 10, 256 << 10, (256 << 10) + 1, 1 << 20):
        await box.write_file(f"{workspace}/program", b"#!/bin/true\n".ljust(size, b"\n"), mode=0o755)
        assert (await box.exec([f"{workspace}/program"])).exit_code == 0
    own = [entry for entry in seen if entry[1] in (100 << 10, 256 << 10, (256 << 10) + 1, 1 << 20)]
    assert [name for name, _ in own] == ["corral-supervisor"] * 2 + ["corral-digest"] * 2
    async with asyncio.timeout(20):  # and its threads do not stay
        while any(thread.name == "corral-digest" for thread in threading.enumerate()):
            await asyncio.sleep(0.01)


async def test_others_go_on_while_a_large_program_is_hashed(box: Sandbox, workspace: Path) -> None:
    size = 1000 << 20
    await box.exec(["/bin/sh", "-c", f"echo '#!/bin/true' > huge; truncate -s {size} huge; chmod +x huge"], check=True)
    huge = asyncio.ensure_future(box.exec([f"{workspace}/huge"], timeout=200))
    while not any(program.argv[-1] == "go" for _, program in execs(box)):
        await box.exec(["/bin/true", "go"], timeout=60)
    assert not huge.done()
    assert (await huge).exit_code == 0
    state = hashlib.sha256(b"#!/bin/true\n")
    rest = size - 12
    while rest:
        part = min(rest, 1 << 24)
        state.update(bytes(part))
        rest -= part
    assert execs(box)[-1][1].digest == state.hexdigest()


async def test_long_and_odd_arguments_are_recorded_as_far_as_they_go(box: Sandbox) -> None:
    long = ["/bin/true", *(["x" * 300] * 400)]
    assert (await box.exec(long)).exit_code == 0
    assert (await box.exec(["/bin/true", "", "ä", "a" * 5000])).exit_code == 0
    (_, first), (_, second) = execs(box)
    assert first.truncated
    assert first.argv == tuple(long[: len(first.argv)])
    assert len(first.argv) > 100
    assert (second.argv, second.truncated) == (("/bin/true", "", "ä", "a" * 5000), False)


SAME_AS_OUTSIDE = r"""
#include <errno.h>
#include <fcntl.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/mman.h>
#include <sys/stat.h>
#include <sys/syscall.h>
#include <sys/wait.h>
#include <unistd.h>
static char *args[] = {"name", "one", NULL};
static void say(const char *what, long result) {
    printf("%s %ld\n", what, result);
    fflush(stdout);
}
#define TRY(what, ...)                                                             \
    do {                                                                           \
        pid_t pid = fork();                                                        \
        int status;                                                                \
        if (pid == 0) { syscall(__VA_ARGS__); _exit(errno); }                      \
        waitpid(pid, &status, 0);                                                  \
        say(what, WIFEXITED(status) ? WEXITSTATUS(status) : -WTERMSIG(status));    \
    } while (0)
static void make(const char *name, const char *text, int mode) {
    unlink(name);
    int fd = open(name, O_CREAT | O_WRONLY, mode);
    write(fd, text, strlen(text));
    fchmod(fd, mode);
    close(fd);
}
int main(int argc, char **argv) {
    if (argc == 3) return 6;
    char *long_name = malloc(5000);
    memset(long_name, 'x', 4999);
    long_name[4999] = 0;
    make("data", "text", 0644);
    make("empty", "", 0755);
    make("script", "#!/bin/sh\nexit 7\n", 0755);
    make("tabs", "#!\t/bin/sh\t-c\texit\n", 0755);
    make("of-script", "#!./script\n", 0755);
    make("return", "#!/bin/sh\r\nexit 7\n", 0755);
    make("gone", "#!/nowhere/sh\n", 0755);
    make("loops", "#!./loops\n", 0755);
    make("unreadable", "#!/bin/sh\nexit 7\n", 0111);
    mkdir("directory", 0755);
    symlink("/proc/self/exe", "to-self");
    symlink("circle", "circle");
    TRY("binary", SYS_execve, "/bin/true", args, environ);
    TRY("script", SYS_execve, "./script", args, environ);
    TRY("tabs", SYS_execve, "./tabs", args, environ);
    TRY("of a script", SYS_execve, "./of-script", args, environ);
    TRY("return", SYS_execve, "./return", args, environ);
    TRY("interpreter gone", SYS_execve, "./gone", args, environ);
    TRY("loops", SYS_execve, "./loops", args, environ);
    TRY("no path", SYS_execve, "", args, environ);
    TRY("absent", SYS_execve, "/nowhere/at/all", args, environ);
    TRY("absent name", SYS_execve, "./nowhere", args, environ);
    TRY("below a file", SYS_execve, "./data/x", args, environ);
    TRY("not executable", SYS_execve, "./data", args, environ);
    TRY("no program", SYS_execve, "./empty", args, environ);
    TRY("directory", SYS_execve, "./directory", args, environ);
    TRY("circle", SYS_execve, "./circle", args, environ);
    TRY("long", SYS_execve, long_name, args, environ);
    TRY("bad path", SYS_execve, (char *)8, args, environ);
    TRY("bad arguments", SYS_execve, "/bin/true", (char **)8, environ);
    char *bad[] = {"name", (char *)8, NULL};
    TRY("bad argument", SYS_execve, "/bin/true", bad, environ);
    TRY("no arguments", SYS_execve, "/bin/true", NULL, NULL);
    char *none[] = {NULL};
    TRY("empty arguments", SYS_execve, "/bin/true", none, none);
    int fd = open("/bin/true", O_RDONLY | O_CLOEXEC), path = open("/bin/true", O_PATH | O_CLOEXEC);
    int script = open("script", O_RDONLY), closing = open("script", O_RDONLY | O_CLOEXEC);
    int directory = open(".", O_RDONLY | O_DIRECTORY);
    char name[64];
    TRY("at descriptor", SYS_execveat, fd, "", args, environ, AT_EMPTY_PATH);
    TRY("at path descriptor", SYS_execveat, path, "", args, environ, AT_EMPTY_PATH);
    TRY("at script", SYS_execveat, script, "", args, environ, AT_EMPTY_PATH);
    TRY("at closing script", SYS_execveat, closing, "", args, environ, AT_EMPTY_PATH);
    TRY("at directory", SYS_execveat, directory, "script", args, environ, 0);
    TRY("at nothing", SYS_execveat, 99, "script", args, environ, 0);
    TRY("at absolute", SYS_execveat, 99, "/bin/true", args, environ, 0);
    TRY("at empty", SYS_execveat, fd, "", args, environ, 0);
    TRY("at link", SYS_execveat, AT_FDCWD, "circle", args, environ, AT_SYMLINK_NOFOLLOW);
    TRY("at odd flags", SYS_execveat, AT_FDCWD, "script", args, environ, 0x2000000);
    snprintf(name, sizeof name, "/proc/self/fd/%d", fd);
    TRY("proc descriptor", SYS_execve, name, args, environ);
    snprintf(name, sizeof name, "/dev/fd/%d", script);
    TRY("dev descriptor", SYS_execve, name, args, environ);
    snprintf(name, sizeof name, "/proc/self/fd/%d/script", directory);
    TRY("below a descriptor", SYS_execve, name, args, environ);
    TRY("working directory", SYS_execve, "/proc/self/cwd/script", args, environ);
    TRY("root", SYS_execve, "/proc/thread-self/root/bin/true", args, environ);
    if (argc == 1) {
        char *again[] = {"name", "again", NULL};
        TRY("itself", SYS_execve, "/proc/self/exe", again, environ);
        TRY("link to itself", SYS_execve, "./to-self", again, environ);
    }
    int memory = memfd_create("program", 0);
    int copy = open("/proc/self/exe", O_RDONLY);
    char buffer[65536];
    for (ssize_t n; (n = read(copy, buffer, sizeof buffer)) > 0;) write(memory, buffer, n);
    char *quiet[] = {"name", "again", "again", NULL};
    if (argc == 1 && memory >= 0) TRY("memory", SYS_execveat, memory, "", quiet, environ, AT_EMPTY_PATH);
    if (geteuid() != 0) TRY("unreadable", SYS_execve, "./unreadable", args, environ);
    return 5;
}
"""


@pytest.mark.parametrize("with_rules", [False, True])
async def test_every_way_to_execute_works_and_fails_as_outside(
    with_rules: bool, make_box: MakeBox, compile_c: Compile, workspace: Path, tmp_path: Path
) -> None:
    program = compile_c(SAME_AS_OUTSIDE, "ways")
    box = await make_box(policy=rules(workspace) if with_rules else Policy())
    inside = (await box.exec([program], directory=str(workspace), timeout=120)).text.splitlines()
    outside_directory = tmp_path / "outside"
    outside_directory.mkdir()
    process = await asyncio.create_subprocess_exec(program, cwd=outside_directory, stdout=asyncio.subprocess.PIPE)
    outside = (await process.communicate())[0].decode().splitlines()
    if os.geteuid() == 0:  # outside it is root, who needs no permission to read
        inside = [line for line in inside if not line.startswith("unreadable")]
    if not any(line.startswith("memory ") for line in inside):
        outside = [line for line in outside if not line.startswith("memory ")]  # see UNCOUNTED_MEMORY
    if with_rules:  # what cannot be read cannot be judged
        outside = [line.replace("unreadable 2", "unreadable 13") for line in outside]
    assert inside == outside
    assert "script 7" in inside


# ---- whose it is ----

DAEMON = """
import ctypes, os, sys, time
if os.fork():
    os._exit(0)
os.setsid()
if os.fork():
    os._exit(0)
ctypes.CDLL(None).prctl(15, b"innocent", 0, 0, 0)
while not os.path.exists(sys.argv[1]):
    time.sleep(0.01)
os.execv("/bin/echo", ["echo", sys.argv[2]])
"""


async def test_daemons_are_attributed_to_the_exec_they_descend_from(box: Sandbox, workspace: Path) -> None:
    go = f"{workspace}/go"
    started = [box.exec([PYTHON, "-c", DAEMON, go, f"daemon {number}"], timeout=60) for number in (1, 2)]
    tasks = [asyncio.ensure_future(each) for each in started]
    while len([1 for _, program in execs(box) if "python" in program.path]) < 2:
        await asyncio.sleep(0.01)
    await box.write_file(go, b"")
    await asyncio.gather(*tasks)

    def daemons() -> dict[str, Decision]:
        return {program.argv[-1]: decision for decision, program in execs(box) if program.path.endswith("/echo")}

    async with asyncio.timeout(30):
        while len(daemons()) < 2:
            await asyncio.sleep(0.01)
    by_argument = {
        program.argv[-1]: decision.action.origin.exec for decision, program in execs(box) if PYTHON in program.argv
    }
    for name, decision in daemons().items():
        assert decision.action.origin.exec == by_argument[name]
        process = decision.action.origin.process
        assert process is not None
        assert process.inner_pid > 1
        assert "python" in process.exe
    assert sorted(by_argument.values()) == [1, 2]


async def test_the_record_says_who_the_ancestors_are(box: Sandbox) -> None:
    await box.exec(["/bin/sh", "-c", "/bin/sh -c '/bin/true; exit 0'; exit 0"])
    *_, (decision, program) = execs(box)
    assert program.path.endswith("/true")
    process = decision.action.origin.process
    assert process is not None
    shell = os.path.realpath("/bin/sh")
    assert [ancestor.exe for ancestor in process.ancestors] == [shell, shell]
    assert process.exe == shell


# ---- rules ----


async def test_rules_refuse_by_path_and_by_arguments(make_box: MakeBox, compile_c: Compile, workspace: Path) -> None:
    compile_c(MARK, "targetA")
    compile_c(MARK, "targetD")
    box = await make_box(policy=rules(workspace))
    script = "./targetA; echo $?; ./targetD; echo $?; ./targetA argumentD; echo $?; ln -s targetD link; ./link; echo $?"
    result = await box.exec(["/bin/sh", "-c", script], directory=str(workspace))
    assert result.stdout == b"0\n126\n126\n126\n"
    assert not exists_inside(box, workspace / "mark")
    assert {denial.rule for denial in result.denials} == {"process.deny[0]", "process.deny[1]"}


async def test_a_script_is_refused_by_its_interpreter_however_deep(make_box: MakeBox, workspace: Path) -> None:
    await_deny = Policy(process=Processes(deny=(ExecRule(os.path.realpath("/bin/true")),)))
    box = await make_box(policy=await_deny)
    await box.write_file(f"{workspace}/one", b"#!/bin/true\n", mode=0o755)
    await box.write_file(f"{workspace}/two", f"#!{workspace}/one\n".encode(), mode=0o755)
    result = await box.exec(["/bin/sh", "-c", "./one; echo $?; ./two; echo $?; echo on"], directory=str(workspace))
    assert result.stdout == b"126\n126\non\n"


async def test_an_ask_holds_the_call_until_somebody_answers(make_box: MakeBox) -> None:
    policy = Policy(process=Processes(ask=(ExecRule(os.path.realpath("/bin/echo")),)))
    box = await make_box(policy=policy)
    for answer, output in ((True, "on\n"), (False, "")):
        task = asyncio.ensure_future(box.exec(["/bin/sh", "-c", "/bin/echo on; exit 0"], timeout=60))
        approvals = box.core.supervision.approvals
        async with asyncio.timeout(30):
            while not approvals.waiting():
                await asyncio.sleep(0.01)
        (waiting,) = approvals.waiting()
        assert not task.done()
        approvals.answer(waiting.number, Verdict.ALLOW if answer else Verdict.DENY, "a person")
        assert (await task).text == output


SPAWNS = r"""
import os, subprocess, sys, threading
done = threading.Event()
thread = threading.Thread(target=done.wait)
if sys.argv[1] == "threads":
    thread.start()
codes = [subprocess.run(["./targetA"]).returncode]
codes.append(os.waitstatus_to_exitcode(os.waitpid(os.posix_spawn("./targetA", ["x"], {}), 0)[1]))
try:
    codes.append(subprocess.run(["./targetD"]).returncode)
except PermissionError:
    codes.append("refused")
done.set()
print(codes, flush=True)
if sys.argv[1] == "threads":
    done.clear()
    threading.Thread(target=lambda: os.execv("./targetA", ["x"])).start()
    done.wait()
"""


@pytest.mark.parametrize("threads", ["alone", "threads"])
async def test_rules_let_programs_start_others_in_every_way(
    threads: str, make_box: MakeBox, compile_c: Compile, workspace: Path
) -> None:
    compile_c(MARK, "targetA")
    compile_c(MARK, "targetD")
    box = await make_box(policy=rules(workspace))
    result = await box.exec([PYTHON, "-c", SPAWNS, threads], directory=str(workspace), timeout=60)
    assert result.stdout == b"[0, 0, 'refused']\n", result.stderr
    assert result.exit_code == 0


BUSY = "while :; do ./targetA; done"


async def test_a_sandbox_ends_in_the_middle_of_execs(make_box: MakeBox, compile_c: Compile, workspace: Path) -> None:
    """What is traced at that moment is reaped too; the fixtures see that nothing is left over."""
    compile_c(MARK, "targetA")
    for _ in range(5):
        box = await make_box(policy=rules(workspace))
        for _ in range(4):
            await box.start_process(["/bin/sh", "-c", BUSY], directory=str(workspace))
        while len(execs(box)) < 20:
            await asyncio.sleep(0.005)
        box.kill()
        async with asyncio.timeout(30):
            await box.wait_ended()


RACE = r"""
#include <fcntl.h>
#include <pthread.h>
#include <sched.h>
#include <signal.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/mman.h>
#include <sys/syscall.h>
#include <sys/wait.h>
#include <unistd.h>
static char path[] = "./targetA", argument[] = "argumentA";
static volatile int *end, memory = -1;
static void flip(int what, int n) {
    char c = n & 1 ? 'D' : 'A';
    if (what == 0) ((volatile char *)path)[sizeof path - 2] = c;
    if (what == 1) ((volatile char *)argument)[sizeof argument - 2] = c;
    if (what == 2) syscall(SYS_renameat2, AT_FDCWD, "link1", AT_FDCWD, "link2", 2);
}
static int what;
static void *race(void *unused) {
    for (int n = 0; !*end; n++) flip(what, n);
    return NULL;
}
static int race_peer(void *unused) { race(NULL); return 0; }
static int race_memory(char *parent) {
    int fd = open(parent, O_RDWR);
    if (fd < 0) return 1;
    for (int n = 0; !*end; n++) pwrite(fd, n & 1 ? "D" : "A", 1, (off_t)(path + sizeof path - 2));
    return 0;
}
int main(int argc, char **argv) {
    int rounds = atoi(argv[2]), ran = 0, refused = 0, ended = 0, denied = 0;
    end = mmap(NULL, 4096, PROT_READ | PROT_WRITE, MAP_SHARED | MAP_ANONYMOUS, -1, 0);
    what = strcmp(argv[3], "path") == 0 ? 0 : strcmp(argv[3], "argument") == 0 ? 1 : 2;
    symlink("targetA", "link1");
    symlink("targetD", "link2");
    char name[64], *program = what == 2 ? "./link1" : path;
    pthread_t thread;
    pid_t peer = 0;
    if (strcmp(argv[1], "thread") == 0) pthread_create(&thread, NULL, race, NULL);
    if (strcmp(argv[1], "peer") == 0)
        peer = clone(race_peer, (char *)malloc(1 << 16) + (1 << 16), CLONE_VM | SIGCHLD, NULL);
    if (strcmp(argv[1], "memory") == 0) {
        snprintf(name, sizeof name, "/proc/%d/mem", getpid());
        if ((peer = fork()) == 0) _exit(race_memory(name));
    }
    if (strcmp(argv[1], "apart") == 0 && (peer = fork()) == 0) { race(NULL); _exit(0); }
    char *arguments[] = {"x", argument, NULL};
    for (int i = 0; i < rounds; i++) {
        pid_t pid = vfork();
        if (pid == 0) { execv(program, arguments); _exit(9); }
        int status;
        waitpid(pid, &status, 0);
        if (WIFSIGNALED(status)) ended++;
        else if (WEXITSTATUS(status) == 0) ran++;
        else if (WEXITSTATUS(status) == 9) refused++;
        else denied++;
    }
    *end = 1;
    if (peer) waitpid(peer, NULL, 0);
    printf("%d %d %d %d\n", ran, refused, ended, denied);
}
"""


@pytest.mark.parametrize(
    ("who", "what"),
    [("thread", "path"), ("peer", "path"), ("memory", "path"), ("thread", "argument"), ("apart", "link")],
)
async def test_no_racer_gets_a_denied_program_to_run(
    who: str, what: str, make_box: MakeBox, compile_c: Compile, workspace: Path
) -> None:
    """The outcome is checked from the host: a program that must not run would leave a mark."""
    compile_c(MARK, "targetA")
    compile_c(MARK, "targetD")
    program = compile_c(RACE, "race")
    box = await make_box(policy=rules(workspace))
    result = await box.exec([program, who, str(ROUNDS), what], directory=str(workspace), timeout=300)
    ran, refused, ended, denied = map(int, result.stdout.split())
    assert not exists_inside(box, workspace / "mark")
    assert (denied, ran + refused + ended) == (0, ROUNDS)
    assert ran > 0
    assert refused > 0
