"""What the vector tests share: Python that runs inside, calls by number, and looks from the host."""

from __future__ import annotations

import json
import subprocess
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from corral.policy.model import Network, NetworkRule, Policy
from corral.sandbox.box import Sandbox
from corral.supervisor.filter import find_architecture, resolve

PYTHON = "/usr/bin/python3"
OPEN = Policy(network=Network(allow=(NetworkRule(network="0.0.0.0/0"), NetworkRule(network="::/0"))))
"""A policy that refuses no address: what still holds is the sandbox's network. Never with a gateway: it would dial."""

# `call` gives 0 or the errno's name; `attempt` the same for a Python function.
PRELUDE = """
import ctypes, errno, fcntl, glob, json, mmap, os, resource, signal, socket, struct, subprocess, sys
import tempfile, threading, time
libc = ctypes.CDLL(None, use_errno=True)
libc.syscall.restype = ctypes.c_long
def name(code):
    return errno.errorcode.get(code, code) if code else ""
def call(number, *arguments):
    ctypes.set_errno(0)
    known = [ctypes.c_long(a) if isinstance(a, int) else a for a in arguments]
    return name(ctypes.get_errno()) if libc.syscall(ctypes.c_long(number), *known) < 0 else ""
def attempt(function, *arguments):
    try:
        function(*arguments)
    except OSError as error:
        return name(error.errno)
    return ""
def tell(answer):
    print(json.dumps(answer), flush=True)
"""

# Everything that makes up a process's walls, as it can see them itself.
WALLS = """
status = dict(line.split(":", 1) for line in open("/proc/self/status"))
shown = "CapInh CapPrm CapEff CapBnd CapAmb NoNewPrivs Seccomp Seccomp_filters Uid Gid Groups".split()
walls = {key: status[key].strip() for key in shown}
walls["namespaces"] = {kind: os.readlink(f"/proc/self/ns/{kind}") for kind in sorted(os.listdir("/proc/self/ns"))}
walls["root"] = [os.stat("/").st_dev, os.stat("/").st_ino]
walls["landlock"] = attempt(os.symlink, "x", "/proc/self/x") and attempt(os.mknod, "/tmp/device", 0o020600, 0x103)
walls["unshare"] = attempt(os.listdir, SECRET), call(UNSHARE, 0x10000000)
tell(walls)
"""


def numbers(*names: str) -> dict[str, int]:
    """The numbers of system calls that this machine has."""
    return resolve(find_architecture(), set(names))


def walls_script(secret: Path) -> str:
    """A script that prints its process's walls; one of them is that ``secret`` on the host is absent."""
    return f"{PRELUDE}\nSECRET = {str(secret)!r}\nUNSHARE = {numbers('unshare')['unshare']}\n{WALLS}"


async def inside(box: Sandbox, script: str, *arguments: str, **how: Any) -> Any:
    """Runs Python with :data:`PRELUDE` inside and returns what it told."""
    result = await box.exec([PYTHON, "-c", f"{PRELUDE}\n{script}", *arguments], **{"timeout": 60, **how})
    assert result.exit_code == 0, (result.exit_code, result.stdout[-2000:], result.stderr[-2000:])
    return json.loads(result.stdout)


async def refusals(box: Sandbox, calls: Iterable[tuple[str, tuple[int, ...]]], **how: Any) -> dict[str, str]:
    """What the kernel answers inside to each call, by name; "" is success."""
    wanted = list(calls)
    known = numbers(*(call for call, _ in wanted))
    table = [(call, known[call], arguments) for call, arguments in wanted if call in known]
    return dict(await inside(box, f"tell([(name, call(number, *rest)) for name, number, rest in {table!r}])", **how))


async def still_serves(box: Sandbox) -> None:
    """The sandbox lives and runs commands as ever."""
    result = await box.exec(["/bin/echo", "alive"], timeout=60)
    assert (result.exit_code, result.stdout) == (0, b"alive\n")


def users(box: Sandbox) -> list[str]:
    """Both users of a sandbox that has both, else the only one."""
    return ["agent", "root"] if box.core.prepared.identity.has(0) else ["agent"]


@contextmanager
def bystander() -> Iterator[subprocess.Popen[bytes]]:
    """A process of the same user on the host, which nothing inside may reach; must live on."""
    process = subprocess.Popen(["/bin/sleep", "600"])
    try:
        yield process
        assert process.poll() is None, "a process of the host was hit from inside"
        state = Path(f"/proc/{process.pid}/stat").read_text().rpartition(")")[2].split()[0]
        assert state in "SRD", f"a process of the host was stopped from inside: {state}"
    finally:
        process.kill()
        process.wait()
