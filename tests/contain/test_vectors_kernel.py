"""Vectors 37-42 and 45: system calls, other processes, namespaces, foreign ABIs, ways to exec, listeners.

Each attack is tried for real in a real sandbox, and its failure is looked at from the host where there is anything to
see there. Requests and PID 1: test_vectors_supervisor.py. Terminals, /proc, privileges: test_vectors_privileges.py.
"""

from __future__ import annotations

import os
import shutil
import signal
import textwrap
from pathlib import Path

import pytest

from corral.sandbox.box import Sandbox
from tests.contain.attacks import (
    PRELUDE,
    PYTHON,
    bystander,
    inside,
    numbers,
    refusals,
    still_serves,
    users,
    walls_script,
)
from tests.contain.conftest import Compile, MakeBox

on_x86 = pytest.mark.skipif(os.uname().machine != "x86_64", reason="this ABI exists on x86-64 only")
NEWUSER, NEWNS, NEWPID, NEWNET = 0x10000000, 0x20000, 0x20000000, 0x40000000


async def test_37_io_uring_is_refused(box: Sandbox) -> None:
    calls = [("io_uring_setup", (8, 0)), ("io_uring_enter", (0, 1, 0, 0)), ("io_uring_register", (0, 0, 0, 0))]
    for user in users(box):
        assert await refusals(box, calls, user=user) == {name: "EPERM" for name, _ in calls}


# ---- 38: other processes ----

LOOK_INTO = """
ptrace, readv, writev, getfd, kcmp, pidfd_open = NUMBERS
def look_into(pid):
    local = (ctypes.c_long * 2)(ctypes.addressof(ctypes.create_string_buffer(8)), 8)
    pidfd = libc.syscall(pidfd_open, pid, 0)
    found = {
        "attach": call(ptrace, 16, pid, 0, 0), "seize": call(ptrace, 0x4206, pid, 0, 0),
        "readv": call(readv, pid, local, 1, local, 1, 0), "writev": call(writev, pid, local, 1, local, 1, 0),
        "getfd": call(getfd, pidfd, 0, 0), "kcmp": call(kcmp, os.getpid(), pid, 0, 0, 0),
    }
    found["write mem"] = attempt(os.open, f"/proc/{pid}/mem", os.O_RDWR)
    found["root"] = attempt(os.listdir, f"/proc/{pid}/root/")
    for path in "mem fd/0 maps environ cwd exe ns/mnt".split():
        found[path] = attempt(os.open, f"/proc/{pid}/{path}", os.O_RDONLY)
    return found
"""
LOOKS = "ptrace process_vm_readv process_vm_writev pidfd_getfd kcmp pidfd_open"
BY_CALL = {"attach", "seize", "readv", "writev", "getfd", "kcmp"}


def look_into() -> str:
    known = numbers(*LOOKS.split())
    return LOOK_INTO.replace("NUMBERS", str(tuple(known[name] for name in LOOKS.split())))


def assert_closed(found: dict[str, str]) -> None:
    """Refused by the filter where a call was used; not there at all, or not for us, where a path was."""
    assert {found[key] for key in BY_CALL} == {"EPERM"}, found
    assert all(answer in ("ENOENT", "EACCES", "EPERM", "ESRCH") for answer in found.values()), found


async def test_38_pid_1_cannot_be_looked_into(box: Sandbox) -> None:
    for user in users(box):
        found = await inside(box, f"{look_into()}\ntell([look_into(1), sorted(os.listdir('/proc'))])", user=user)
        assert_closed(found[0])
        assert "1" not in found[1]  # hidepid: it is not even listed
    await still_serves(box)


async def test_38_a_terminals_leader_cannot_be_looked_into(box: Sandbox) -> None:
    """It has the agent's own id, and the exec payload was mapped in it."""
    script = f"{PRELUDE}\n{look_into()}\nopen('/tmp/answer', 'w').write(json.dumps(look_into(os.getppid())))"
    process = await box.start_process([PYTHON, "-c", script], terminal=(24, 80))
    assert (await process.wait()).code == 0, await process.stdout.read()
    assert_closed(await inside(box, "tell(json.load(open('/tmp/answer')))"))


async def test_38_another_process_of_the_agent_cannot_be_traced(box: Sandbox) -> None:
    script = """
victim = subprocess.Popen(["/bin/sleep", "60"])
tell(look_into(victim.pid))
victim.kill()
"""
    found = await inside(box, look_into() + script)
    assert {found[key] for key in BY_CALL} == {"EPERM"}
    # The same id may read its own memory through /proc, as anywhere; a second identity inside may not.
    if len(users(box)) > 1:
        script = "victim = subprocess.Popen(['/bin/sleep', '60']); print(victim.pid, flush=True); victim.wait()"
        process = await box.start_process([PYTHON, "-c", PRELUDE + script])
        pid = int(await process.stdout.readline())
        assert_closed(await inside(box, f"{look_into()}\ntell(look_into({pid}))", user="root"))
        process.kill()


async def test_38_host_processes_have_no_address_inside(box: Sandbox) -> None:
    with bystander() as victim:
        targets = [victim.pid, os.getpid(), box.core.keeper]
        script = f"""
from signal import pidfd_send_signal
def reach(pid):
    return {{"kill": attempt(os.kill, pid, 9), "group": attempt(os.killpg, pid, 9), "open": attempt(os.pidfd_open, pid),
      "proc": attempt(os.listdir, f"/proc/{{pid}}"), "limits": attempt(resource.prlimit, pid, resource.RLIMIT_CPU),
      "nice": attempt(os.setpriority, os.PRIO_PROCESS, pid, 19), "affinity": attempt(os.sched_setaffinity, pid, [0])}}
tell([reach(pid) for pid in {targets!r}])
"""
        for user in users(box):
            for found in await inside(box, script, user=user):
                assert found.pop("proc") == "ENOENT"
                assert set(found.values()) == {"ESRCH"}, found


async def test_38_another_sandbox_has_no_address_inside(make_box: MakeBox) -> None:
    """Neither its processes, its memory, its IPC objects, its abstract sockets nor its files."""
    first, second = await make_box(), await make_box()
    leave = """
libc.shmget(0x636f7272, 4096, 0o1666); libc.msgget(0x636f7272, 0o1666); libc.semget(0x636f7272, 1, 0o1666)
listener = socket.socket(socket.AF_UNIX); listener.bind("\\0corral-test"); listener.listen()
tcp = socket.create_server(("127.0.0.1", 7777))
open("/dev/shm/left", "w").write("secret"); open("/tmp/left", "w").write("secret")
print(os.getpid(), flush=True); time.sleep(600)
"""
    process = await first.start_process([PYTHON, "-c", PRELUDE + leave])
    await process.stdout.readline()
    find = """
def dial(kind, address):
    attempt_socket = socket.socket(kind)
    return attempt(attempt_socket.connect, address)
codes = []
for get in (lambda: libc.shmget(0x636f7272, 0, 0), lambda: libc.msgget(0x636f7272, 0),
            lambda: libc.semget(0x636f7272, 0, 0)):
    codes.append(name(ctypes.get_errno()) if get() < 0 else "")
tell([codes, dial(socket.AF_UNIX, "\\0corral-test"), dial(socket.AF_INET, ("127.0.0.1", 7777)),
      os.listdir("/dev/shm"), os.path.exists("/tmp/left"),
      [open(f"/proc/{pid}/cmdline").read() for pid in os.listdir("/proc") if pid.isdecimal()]])
"""
    codes, unix, tcp, shm, left, seen = await inside(second, find)
    assert (codes, unix, tcp, shm, left) == (["ENOENT"] * 3, "ECONNREFUSED", "ECONNREFUSED", [], False)
    assert not any("636f7272, 0o1666" in command for command in seen)
    links = "tell([os.readlink(f'/proc/self/ns/{kind}') for kind in ('user', 'mnt', 'pid', 'net', 'ipc', 'uts')])"
    one, other = await inside(first, links), await inside(second, links)
    host = [os.readlink(f"/proc/self/ns/{kind}") for kind in ("user", "mnt", "pid", "net", "ipc", "uts")]
    assert all(len(set(each)) == 3 for each in zip(one, other, host, strict=True))


# ---- 39, 40: namespaces and foreign ABIs ----


async def test_39_namespaces_cannot_be_made_or_entered(box: Sandbox) -> None:
    known = numbers("clone", "clone3", "unshare", "setns", "mount")
    script = f"""
def clone(flags):
    pid = libc.syscall({known["clone"]}, ctypes.c_ulong(flags | signal.SIGCHLD), None, None, None, None)
    if pid == 0:
        os._exit(0)
    code = name(ctypes.get_errno()) if pid < 0 else ""
    if pid > 0:
        os.waitpid(pid, 0)
    return code
before = {{kind: os.readlink("/proc/self/ns/" + kind) for kind in os.listdir("/proc/self/ns")}}
flags = [{NEWUSER}, {NEWUSER | NEWNS}, {NEWNS}, {NEWPID}, {NEWNET}, {NEWUSER} | 0x7e020000 - {NEWUSER}]
clone3 = (ctypes.c_ulong * 11)({NEWUSER}, 0, 0, 0, signal.SIGCHLD)
found = {{
    "plain clone": clone(0),
    "unshare": [call({known["unshare"]}, flag) for flag in [*flags, 0x80, 1 << 37]],
    "clone": [clone(flag) for flag in flags],
    "clone3": call({known["clone3"]}, clone3, 88),
    "setns": [call({known["setns"]}, os.open("/proc/self/ns/" + kind, os.O_RDONLY), 0) for kind in before],
    "setns pidfd": call({known["setns"]}, os.pidfd_open(os.getpid()), {NEWNS}),
    "mount": call({known["mount"]}, b"none", b"/tmp", b"tmpfs", 0, 0),
    "limit": attempt(lambda: open("/proc/sys/user/max_user_namespaces", "w")),
    "allowed": int(open("/proc/sys/user/max_user_namespaces").read()),
    "program": subprocess.run(["unshare", "-Ur", "true"], capture_output=True).returncode != 0,
    "same": before == {{kind: os.readlink("/proc/self/ns/" + kind) for kind in before}},
}}
tell(found)
"""
    for user in users(box):
        found = await inside(box, script, user=user)
        for key in ("unshare", "clone", "setns"):
            assert set(found[key]) == {"EPERM"}, (key, found[key])
        assert (found["clone3"], found["setns pidfd"], found["mount"]) == ("ENOSYS", "EPERM", "EPERM")
        assert found["limit"] in ("EROFS", "EACCES")
        assert (found["plain clone"], found["allowed"], found["program"], found["same"]) == ("", 0, True, True)


X32 = "int main(void) { return syscall(0x40000000 | %d, 0, 0, 0) != -1; }"
INT80 = 'int main(void) { long r; __asm__ volatile("int $0x80" : "=a"(r) : "a"(%d), "b"(%d), "c"(0)); return 0; }'


@on_x86
@pytest.mark.parametrize(
    "source",
    [
        pytest.param(X32 % 39, id="x32-getpid"),
        pytest.param(X32 % 520, id="x32-execve"),
        pytest.param(INT80 % (20, 0), id="i386-getpid"),
        pytest.param(INT80 % (102, 1), id="i386-socketcall"),
        pytest.param(INT80 % (310, NEWUSER), id="i386-unshare"),
    ],
)
async def test_40_a_foreign_abi_kills_its_caller_only(source: str, box: Sandbox, compile_c: Compile) -> None:
    program = compile_c(f"#include <unistd.h>\n{source}")
    result = await box.exec([program], timeout=30)
    assert result.signal == signal.SIGSYS
    await still_serves(box)


# ---- 41, 42: ways to exec around a check ----

# argv[1:] is the walls script; a copy of the interpreter has no name or place that a rule could know.
WAYS = {
    "memfd": "fd = os.memfd_create('x', 0)\nos.write(fd, program)\nos.execve(fd, arguments, os.environ)",
    "unlinked": """
fd = os.open("/tmp", os.O_TMPFILE | os.O_RDWR, 0o700)
os.write(fd, program)
again = os.open(f"/proc/self/fd/{fd}", os.O_RDONLY)
os.close(fd)
os.execve(again, arguments, os.environ)""",
    "proc path": "fd = os.open(PYTHON, os.O_RDONLY)\nos.execv(f'/proc/self/fd/{fd}', arguments)",
    "shm": "os.chdir(tempfile.mkdtemp(dir='/dev/shm'))\nput('x', 0o755)\nos.execv('./x', arguments)",
    "renamed": "put('ls', 0o6755)\nos.execv('./ls', arguments)",
    "hardlink": "put('a', 0o755)\nos.link('a', 'b')\nos.execv('./b', arguments)",
    "loader": """
loaders = glob.glob("/lib64/ld-linux*") + glob.glob("/lib/ld-linux*")
os.execv(loaders[0], [loaders[0], PYTHON, *arguments[1:]])""",
    "loader, noexec file": """
put("plain", 0o644)
loaders = glob.glob("/lib64/ld-linux*") + glob.glob("/lib/ld-linux*")
os.execv(loaders[0], [loaders[0], "./plain", *arguments[1:]])""",
    "shell": """os.execv('/bin/sh', ['sh', '-c', '"$@"', 'sh', PYTHON, *arguments[1:]])""",
    "script": """
program = f"#!{PYTHON}\\n{arguments[2]}".encode()
put("script", 0o755)
os.execv("./script", ["script"])""",
}


@pytest.mark.parametrize("way", WAYS)
async def test_41_42_every_way_to_exec_ends_in_the_same_walls(way: str, box: Sandbox, tmp_path: Path) -> None:
    secret = tmp_path / "secret"
    secret.mkdir()
    walls = walls_script(secret)
    script = f"""
PYTHON = {PYTHON!r}
program = open(os.path.realpath(PYTHON), "rb").read()
arguments = [PYTHON, "-c", sys.argv[1]]
def put(path, mode):
    with open(path, "wb") as file:
        file.write(program)
    os.chmod(path, mode)
os.chdir(tempfile.mkdtemp())
try:
{chr(10).join("    " + line for line in WAYS[way].splitlines())}
except OSError as error:
    tell(name(error.errno))
"""
    for user in users(box):
        plain = await inside(box, "exec(sys.argv[1])", walls, user=user)
        reached = await inside(box, script, walls, user=user)
        if way == "memfd" and reached == "ENOSYS":
            assert not box.core.prepared.groups.paths  # refused where no memory cgroup would count it
            continue
        assert reached == plain
        assert {plain[f"Cap{kind}"] for kind in ("Inh", "Prm", "Eff", "Bnd", "Amb")} == {"0" * 16}
        assert (plain["NoNewPrivs"], plain["Seccomp"], plain["Seccomp_filters"]) == ("1", "2", "1")
        assert plain["unshare"] == ["ENOENT", "EPERM"]
        assert all(plain["namespaces"][kind] != os.readlink(f"/proc/self/ns/{kind}") for kind in ("mnt", "pid", "net"))


async def test_41_an_exec_of_a_host_descriptor_is_not_possible(box: Sandbox) -> None:
    """Nothing that came from the host stands open inside: only the three pipes."""
    script = "tell({fd: os.readlink(f'/proc/self/fd/{fd}').split(':')[0] for fd in os.listdir('/proc/self/fd')[:-1]})"
    assert await inside(box, script) == {"0": "pipe", "1": "pipe", "2": "pipe"}


# ---- 45, and a tool of its trade ----


async def test_45_a_second_listener_is_refused_and_a_stricter_filter_is_not(box: Sandbox) -> None:
    seccomp = numbers("seccomp")["seccomp"]
    script = f"""
allow = (ctypes.c_ubyte * 8)(*struct.pack("<HBBI", 6, 0, 0, 0x7fff0000))
program = (ctypes.c_ubyte * 16)(*struct.pack("<H6xQ", 1, ctypes.addressof(allow)))
tell([call({seccomp}, 1, flags, program) for flags in (8, 8 | 16, 8 | 1 << 32, 0)])
"""
    assert await inside(box, script) == ["EPERM", "EPERM", "EPERM", ""]


@pytest.mark.skipif(not shutil.which("gdb"), reason="gdb is not installed here")
async def test_38_a_debugger_gets_nothing(box: Sandbox) -> None:
    result = await box.exec(["gdb", "-q", "-batch", "-p", "1"], timeout=60)
    assert b"Operation not permitted" in result.stdout + result.stderr


async def test_48_no_core_dump_reaches_a_program_of_the_host(make_box: MakeBox) -> None:
    """core(5): with a core_pattern that is a pipe, only a limit of 1 keeps the host's program from running."""
    box = await make_box()
    code = """
        import ctypes, resource, struct
        libc = ctypes.CDLL(None, use_errno=True)
        for new in ((0, 0), (1, 1), (0, 1)):
            resource.setrlimit(resource.RLIMIT_CORE, new)  # as gpg and ssh-agent do; they are told that it is done
        limit, old = struct.pack("QQ", 0, 0), ctypes.create_string_buffer(16)
        dirty = 1 << 40 | 4  # the kernel looks at the lower half
        for resource_number in (4, dirty):
            assert libc.syscall(302, 0, ctypes.c_long(resource_number), limit, old) == 0, ctypes.get_errno()
            assert libc.syscall(160, ctypes.c_long(resource_number), limit) == 0, ctypes.get_errno()
        print(struct.unpack("QQ", old.raw), resource.getrlimit(resource.RLIMIT_CORE))
        resource.setrlimit(resource.RLIMIT_NOFILE, (64, 64))  # others are set
        print(resource.getrlimit(resource.RLIMIT_NOFILE))
    """
    result = await box.exec(["/usr/bin/python3", "-c", textwrap.dedent(code)])
    assert result.text.splitlines() == ["(1, 1) (1, 1)", "(64, 64)"], result
