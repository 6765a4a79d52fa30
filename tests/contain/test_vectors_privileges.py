"""Vectors 46-48, 54: terminals, keyrings, the kernel's switches, /proc and /sys, capabilities, setuid programs."""

from __future__ import annotations

import fcntl
import os
import re
import shutil
import subprocess
import sys
import termios
from pathlib import Path

import pytest

from corral.cli.foreground import printable
from corral.sandbox.box import Sandbox
from tests.contain.attacks import PRELUDE, PYTHON, inside, numbers, refusals, still_serves, users
from tests.contain.conftest import Compile, MakeBox

NOTHING = "0" * 16

# ---- 46: terminals ----

TERMINAL = """
ioctl = IOCTL
found = {}
for command, request in (("TIOCSTI", 0x5412), ("TIOCLINUX", 0x541c), ("TIOCSETD", 0x5423)):
    payload = ctypes.create_string_buffer(b"\\x02rm -rf /\\n")
    found[command] = [call(ioctl, 0, request | high, payload) for high in (0, 1 << 32, 1 << 63, -1 << 32)]
found["name"] = os.ttyname(0)
tty = os.open("/dev/tty", os.O_RDWR)
found["device"] = os.fstat(0).st_rdev == os.stat(os.ttyname(0)).st_rdev
found["pts"] = sorted(os.listdir("/dev/pts"))
found["vhangup"] = call(VHANGUP)
found["steal"] = [attempt(fcntl.ioctl, fd, 0x540e, 1) for fd in (0, tty)]
open("/tmp/answer", "w").write(json.dumps(found))
"""


async def test_46_a_terminal_takes_no_typed_input_from_its_command(box: Sandbox) -> None:
    known = numbers("ioctl", "vhangup")
    script = TERMINAL.replace("IOCTL", str(known["ioctl"]), 1).replace("VHANGUP", str(known["vhangup"]))
    process = await box.start_process([PYTHON, "-c", PRELUDE + script], terminal=(24, 80))
    output = await process.stdout.read()
    assert (await process.wait()).code == 0, output
    assert b"rm -rf" not in output
    found = await inside(box, "tell(json.load(open('/tmp/answer')))")
    for command in ("TIOCSTI", "TIOCLINUX", "TIOCSETD"):
        assert found[command] == ["EPERM"] * 4
    # What it calls its terminal is the one of the sandbox's own instance, and the only one there.
    assert (found["name"], found["device"], found["pts"]) == ("/dev/pts/0", True, ["0", "ptmx"])
    assert found["vhangup"] == "EPERM"


async def test_46_the_callers_terminal_is_not_reachable(workspace: Path) -> None:
    """A controller with a controlling terminal, as under a shell; the command inside has none."""
    master, slave = os.openpty()
    script = f"""
import asyncio, sys
from corral.sandbox.box import Sandbox
async def main():
    open("/dev/tty").close()
    async with Sandbox({str(workspace)!r}) as box:
        command = "for way in /dev/tty /dev/pts/0 /dev/console /dev/tty0 /dev/tty1 /dev/ttyS0 /dev/vcs; do "
        command += "(: <$way) 2>/dev/null && echo opened $way; done; ls -l /proc/self/fd; ps -o tty= -p $$"
        print((await box.exec(["sh", "-c", command], stdin=b"x")).text)
asyncio.run(main())
"""
    command = [sys.executable, "-c", script]

    def log_in() -> None:
        os.setsid()
        fcntl.ioctl(slave, termios.TIOCSCTTY, 0)

    done = subprocess.run(command, preexec_fn=log_in, pass_fds=(slave,), capture_output=True, timeout=60, check=False)
    os.close(slave)
    os.close(master)
    assert done.returncode == 0, done.stderr
    assert b"pipe:" in done.stdout
    assert b"opened" not in done.stdout
    assert b"pts" not in done.stdout
    assert b"tty" not in done.stdout


SPOOFS = [
    "\x1b]0;owned\x07",
    "\x1b[2J\x1b[1;1Happrove? y",
    "a\rb",
    "\x9b31m",
    "\u202egpj.exe",
    "x\x08\x08y",
    "\x1bP+q\x1b\\",
]


@pytest.mark.parametrize("text", SPOOFS)
async def test_46_what_corral_prints_draws_nothing_on_a_terminal(text: str, box: Sandbox, workspace: Path) -> None:
    assert printable(text).isprintable()
    assert printable("plain ünïcode /path") == "plain ünïcode /path"
    command = "import sys; from corral.cli import main; sys.argv = ['corral', *sys.argv[1:]]; main()"
    for arguments in (["run", "--", f"/no/{text}"], ["run", "--workspace", f"/no/{text}", "--", "true"]):
        done = subprocess.run(
            [sys.executable, "-c", command, *arguments], cwd=workspace, capture_output=True, timeout=60, check=False
        )
        assert done.returncode in (2, 125, 126, 127)
        assert done.stderr
        for line in (done.stdout + done.stderr).decode().splitlines():
            assert not re.search(r"[\x00-\x08\x0b-\x1f\x7f-\x9f\u202e]", line), line


# ---- 47, 48: keyrings and the kernel itself ----

REFUSED = {
    "EPERM": """keyctl add_key request_key bpf perf_event_open userfaultfd init_module finit_module delete_module
      kexec_load kexec_file_load reboot swapon swapoff settimeofday clock_settime clock_adjtime adjtimex sethostname
      setdomainname acct quotactl quotactl_fd syslog iopl ioperm modify_ldt memfd_secret open_by_handle_at
      name_to_handle_at fanotify_init fanotify_mark lookup_dcookie mount umount2 pivot_root chroot fsopen fsmount
      open_tree move_mount mount_setattr vhangup process_madvise""",
    "ENOSYS": "uselib sysfs _sysctl create_module query_module nfsservctl",
}
CALLS = [(name, (0, 0, 0, 0, 0)) for names in REFUSED.values() for name in names.split()]


async def test_47_48_calls_into_the_kernels_rare_corners_are_refused(box: Sandbox) -> None:
    for user in users(box):
        found = await refusals(box, CALLS, user=user)
        expected = {name: errno for errno, names in REFUSED.items() for name in names.split()}
        expected["nfsservctl"] = "EPERM"
        assert found == {name: expected[name] for name in found}
        assert len(found) > 40


async def test_48_the_host_keeps_its_name_clock_and_modules(box: Sandbox) -> None:
    name, modules = os.uname().nodename, Path("/proc/modules").exists() and Path("/proc/modules").read_bytes()
    command = "hostname owned; date -s 2001-01-01; modprobe loop; insmod /x.ko; sysctl -w kernel.panic=1; true"
    for user in users(box):
        await box.exec(["sh", "-c", f"PATH=$PATH:/sbin:/usr/sbin; {command}"], user=user, timeout=60)
    assert os.uname().nodename == name
    assert not modules or Path("/proc/modules").read_bytes() == modules


async def test_48_personality_gives_no_weaker_memory(box: Sandbox) -> None:
    calls = [("personality", (flag,)) for flag in (0x0040000, 0x0400000, 0x0100000, 0x0040000 | 1 << 40)]
    for call in calls:
        assert await refusals(box, [call]) == {"personality": "EPERM"}


# ---- /proc and /sys ----

WALK = """
opened, tried = [], 0
for top in ("/proc/sys", "/sys", "/proc/irq", "/proc/bus", "/proc/fs", "/proc/driver", "/proc/acpi", "/proc/tty"):
    for place, _, files in os.walk(top):
        for file in files:
            path = os.path.join(place, file)
            tried += 1
            for flags in (os.O_WRONLY, os.O_RDWR, os.O_WRONLY | os.O_TRUNC):
                if not attempt(os.open, path, flags | os.O_NONBLOCK):
                    opened.append(path)
for path in glob.glob("/proc/*"):
    if not path[6:].isdecimal() and path not in ("/proc/self", "/proc/thread-self") and os.path.isfile(path):
        tried += 1
        if not attempt(os.open, path, os.O_WRONLY):
            opened.append(path)
tell([opened, tried])
"""


async def test_48_nothing_in_proc_or_sys_opens_for_writing(box: Sandbox) -> None:
    for user in users(box):
        opened, tried = await inside(box, WALK, user=user)
        assert opened == []
        assert tried > 300


async def test_48_switches_and_secrets_of_the_kernel_are_closed(box: Sandbox) -> None:
    script = """
def read(path):
    try:
        return open(path, "rb").read(4096).decode(errors="replace")
    except OSError as error:
        return name(error.errno)
def write(path):
    def put():
        fd = os.open(path, os.O_WRONLY)
        os.write(fd, b"1")
    return attempt(put)
tell({"read": {path: read(path) for path in READ}, "write": {path: write(path) for path in WRITE},
      "sys": [os.listdir("/sys"), os.listdir("/sys/devices")]})
"""
    secrets = """/proc/kcore /proc/kallsyms /proc/keys /proc/key-users /proc/kmsg /proc/timer_list /proc/sysrq-trigger
      /dev/mem /dev/kmem /dev/port /dev/kmsg /dev/vda /dev/sda /dev/loop-control /dev/fuse /dev/kvm /dev/net/tun
      /dev/vsock /proc/vmallocinfo /proc/slabinfo /proc/pagetypeinfo /proc/kpagecount /sys/kernel/notes
      /sys/fs/cgroup/cgroup.procs /sys/kernel/debug /sys/kernel/security /sys/class
      /sys/block /sys/module /sys/power""".split()
    switches = """/proc/sys/kernel/core_pattern /proc/sys/kernel/modprobe /proc/sys/vm/drop_caches
      /proc/sys/kernel/sysrq /proc/sys/fs/binfmt_misc/register /proc/sysrq-trigger /proc/sys/kernel/ns_last_pid
      /proc/sys/user/max_user_namespaces /proc/sys/kernel/hostname /proc/sys/net/ipv4/ip_forward
      /proc/sys/kernel/shmmax /proc/sys/net/ipv4/ping_group_range /proc/mtrr
      /sys/kernel/uevent_helper /sys/power/state /sys/fs/cgroup/release_agent""".split()
    answers = {"ENOENT", "EACCES", "EROFS", "EPERM", "EISDIR", "ENXIO", "EIO"}
    pattern = Path("/proc/sys/kernel/core_pattern").read_text()
    for user in users(box):
        found = await inside(box, f"READ, WRITE = {secrets!r}, {switches!r}\n{script}", user=user)
        for path, content in found["read"].items():
            assert content == "" or content in answers, (path, content[:200])
        for path, answer in found["write"].items():
            assert answer in answers, (path, answer)
        assert found["sys"] == [["devices"], ["system"]]
    assert Path("/proc/sys/kernel/core_pattern").read_text() == pattern


async def test_48_what_proc_tells_of_the_host_is_no_address_and_no_process(box: Sandbox) -> None:
    script = """
known = set()
for path in glob.glob("/proc/[0-9]*"):
    known.add(open(path + "/comm").read().strip())
tell([sorted(known), open("/proc/self/cgroup").read(), open("/proc/self/mountinfo").read(),
      attempt(os.stat, "/proc/1"), open("/proc/self/wchan").read(), attempt(open, "/proc/self/stack")])
"""
    known, groups, mounts, first, wchan, stack = await inside(box, script)
    assert set(known) == {"python3"}
    assert "corral-" not in groups
    layers = re.findall(r"(?:lowerdir\+?|upperdir|workdir)=([^,\s]*)", mounts)
    assert layers
    assert all(path.startswith("/proc/self/fd/") for path in layers)  # where they lie on the host is not told
    assert first == "ENOENT"
    assert wchan.isidentifier() or wchan == "0"
    assert stack in ("EACCES", "EPERM", "ENOENT", "")


# ---- capabilities, setuid, limits ----

GAIN = """
CAPGET, CAPSET = NUMBERS
def raised():
    header = (ctypes.c_uint32 * 2)(0x20080522, 0)
    full = (ctypes.c_uint32 * 6)(*[0xffffffff] * 6)
    return call(CAPSET, header, full)
prctl = libc.prctl
def pr(*arguments):
    ctypes.set_errno(0)
    return name(ctypes.get_errno()) if prctl(*[ctypes.c_ulong(a) for a in arguments]) < 0 else ""
uids = [attempt(os.setuid, 0), attempt(os.setresuid, 0, 0, 0), attempt(os.setgroups, [0]), attempt(os.setgid, 0)]
deadline = (ctypes.c_uint8 * 48)(*struct.pack("<IIQiIQQQ", 48, 6, 0, 0, 0, 1 << 20, 1 << 24, 1 << 24))
found = {
    "capset": raised(), "ambient": [pr(47, 2, cap, 0, 0) for cap in (0, 7, 12, 21)],
    "securebits": [pr(28, bits) for bits in (0, 0x10)], "keepcaps": pr(8, 1), "nnp": pr(38, 0, 0, 0, 0),
    "nnp is": prctl(39, 0, 0, 0, 0), "bits": prctl(27, 0, 0, 0, 0), "bounding": [prctl(23, cap) for cap in range(41)],
    "uids": uids if os.getuid() else [], "setfsuid": libc.setfsuid(-1),
    "mm": pr(35, 1, 0x1000, 0, 0), "chown": attempt(os.chown, "/tmp/own", 0, 0), "chroot": attempt(os.chroot, "/tmp"),
    "rlimits": {}, "rt": [attempt(os.sched_setscheduler, 0, policy, os.sched_param(1)) for policy in (1, 2)],
    "nice": attempt(os.setpriority, os.PRIO_PROCESS, 0, -1), "ionice": call(IOPRIO, 1, 0, 1 << 13),
    "autogroup": attempt(lambda: os.write(os.open("/proc/self/autogroup", os.O_WRONLY), b"-10")),
    "oom": attempt(lambda: os.write(os.open("/proc/self/oom_score_adj", os.O_WRONLY), b"-1000")),
    "uid_map": attempt(lambda: os.write(os.open("/proc/self/uid_map", os.O_WRONLY), b"0 0 1")),
    "trusted": attempt(os.setxattr, "/tmp/own", "trusted.x", b"x"),
    "capability": attempt(os.setxattr, "/tmp/own", "security.capability", bytes([0, 0, 0, 2] + [255] * 16)),
    "low port": attempt(lambda: socket.create_server(("127.0.0.1", 80))),
    "raw": attempt(socket.socket, socket.AF_INET, socket.SOCK_RAW, 1),
    "deadline": call(SETATTR, 0, deadline, 0),
}
for limit in ("NOFILE", "NPROC", "FSIZE", "MEMLOCK", "MSGQUEUE", "CORE", "RTPRIO", "NICE", "SIGPENDING"):
    which = getattr(resource, "RLIMIT_" + limit)
    hard = resource.getrlimit(which)[1]
    try:
        resource.setrlimit(which, (hard, hard + 1))
        if resource.getrlimit(which)[1] != hard:  # that of core dumps is answered, and stays
            found["rlimits"][limit] = hard
    except (ValueError, OSError):
        pass
tell(found)
"""


async def test_54_no_call_gains_a_privilege_or_a_limit(box: Sandbox) -> None:
    known = numbers("capget", "capset", "ioprio_set", "sched_setattr")
    script = GAIN.replace("NUMBERS", f"{known['capget']}, {known['capset']}")
    script = script.replace("IOPRIO", str(known["ioprio_set"])).replace("SETATTR", str(known["sched_setattr"]))
    for user in users(box):
        found = await inside(box, f"open('/tmp/own', 'w').close()\n{script}\nos.unlink('/tmp/own')", user=user)
        assert found["capset"] == "EPERM"
        assert set(found["ambient"]) == {"EPERM"}
        assert set(found["securebits"]) == {"EPERM"}
        assert (found["nnp"], found["nnp is"], found["keepcaps"]) == ("EINVAL", 1, "EPERM")
        assert found["bits"] & 0xEF == 0xEF
        assert set(found["bounding"]) == {0}
        assert "" not in found["uids"]
        assert found["rlimits"] == {}
        assert found["rt"] == ["EPERM", "EPERM"]
        assert (found["deadline"], found["ionice"]) == ("EPERM", "EPERM")
        assert found["nice"] in ("EACCES", "EPERM")
        for key in ("mm", "chroot", "uid_map", "trusted", "capability", "low port", "raw", "oom"):
            assert found[key] in ("EPERM", "EACCES", "EINVAL", "EOPNOTSUPP"), (key, found[key])
        if user == "agent":
            assert found["chown"] in ("EPERM", "EINVAL")


SETUID = """
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <unistd.h>
int main(void) {
    char line[256];
    FILE *status = fopen("/proc/self/status", "r");
    while (fgets(line, sizeof line, status))
        if (!strncmp(line, "Cap", 3) || !strncmp(line, "NoNew", 5)) printf("%s", line);
    printf("Id:\\t%d %d %d %d\\n", getuid(), geteuid(), getgid(), getegid());
    printf("Regain:\\t%d %d\\n", setuid(0), getuid() ? seteuid(0) : -1);
}
"""


async def test_54_a_setuid_file_gives_nothing(box: Sandbox, compile_c: Compile, workspace: Path) -> None:
    """Made by root inside, by the host's owner of the workspace, or carrying capabilities."""
    program = compile_c(SETUID)
    os.chmod(program, 0o6755)
    if os.geteuid() == 0 and shutil.which("setcap"):
        subprocess.run(["setcap", "all+ep", program], check=False)
    makers = users(box)
    for maker in makers:
        copy = f"/tmp/setuid-{maker}"
        done = await box.exec(["sh", "-c", f"cp {program} {copy} && chmod 6755 {copy}"], user=maker)
        assert done.exit_code == 0, done.stderr
        for path in (program, copy):
            for user in makers:
                wanted = 0 if user == "root" else 1000
                result = await box.exec([path], user=user)
                told = dict(line.split(":\t") for line in result.text.splitlines())
                assert {value for key, value in told.items() if key.startswith("Cap")} == {NOTHING}, told
                assert (told["NoNewPrivs"], told["Id"]) == ("1", " ".join([str(wanted)] * 4))
                assert wanted == 0 or told["Regain"] == "-1 -1"


@pytest.mark.parametrize(
    "command",
    ["su -c id root", "su root -c id", "sudo -n id", "newgrp root", "pkexec id", "sg root id", "doas id", "ping -c1 ."],
)
async def test_54_helpers_that_are_setuid_on_the_host_are_powerless(command: str, box: Sandbox) -> None:
    result = await box.exec(["sh", "-c", f"exec setsid {command}; id"], stdin=b"\nid\n", timeout=60)
    assert b"uid=0" not in result.stdout
    assert b"gid=0" not in result.stdout
    await still_serves(box)


@pytest.mark.root
async def test_54_root_inside_owns_nothing_of_the_host(make_box: MakeBox, workspace: Path) -> None:
    box = await make_box(user="root")
    stranger = workspace / "stranger"
    stranger.write_text("x")
    os.chown(stranger, 12345, 12345)
    os.chmod(stranger, 0o600)
    script = f"""
tell([attempt(open, {str(stranger)!r}), attempt(os.chmod, {str(stranger)!r}, 0o777), attempt(open, "/etc/shadow"),
      attempt(os.unlink, "/usr/bin/env"), os.geteuid()])
"""
    opened, chmod, shadow, unlink, euid = await inside(box, script)
    assert (opened, euid) == ("EACCES", 0)
    assert chmod in ("EPERM", "EOVERFLOW")  # its owner has no id inside
    assert shadow in ("ENOENT", "EACCES")
    assert unlink == ""  # in its layer
    assert os.path.exists("/usr/bin/env")
    assert box.core.prepared.identity.outside(0) != 0


LAYERS = """
ruleset = struct.pack("<QQQ", 1, 0, 0)
stacked = 0
while stacked < 20:
    fd = libc.syscall(CREATE, ruleset, ctypes.c_size_t(8), 0)
    if fd < 0 or call(RESTRICT, fd, 0):
        break
    os.close(fd)
    stacked += 1
tell(stacked)
"""


async def test_landlock_stands_behind_the_mounts(box: Sandbox) -> None:
    """Where mounts are right only the kernel's limit shows it: 16 domains can be stacked (landlock(7)), one is ours."""
    known = numbers("landlock_create_ruleset", "landlock_restrict_self")
    script = LAYERS.replace("CREATE", str(known["landlock_create_ruleset"]))
    script = script.replace("RESTRICT", str(known["landlock_restrict_self"]))
    no_new_privs = "libc.prctl(38, 1, 0, 0, 0)\n"
    outside = subprocess.run([PYTHON, "-c", PRELUDE + no_new_privs + script], capture_output=True, check=True)
    for user in users(box):
        assert await inside(box, script, user=user) == int(outside.stdout) - 1
