"""Vectors 52 and 53, and what tries to survive: daemons, environments, kill, freeze, the controller's death."""

from __future__ import annotations

import asyncio
import json
import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest

from corral.errors import SandboxClosed
from corral.policy.model import Environment, Policy
from corral.sandbox.box import Sandbox
from corral.sandbox.cgroups import PREFIX, hierarchies
from corral.sandbox.limits import descendants
from tests.contain.attacks import PRELUDE, PYTHON, inside, still_serves, users
from tests.contain.conftest import Compile, MakeBox, own_groups, wait_until

# Left by double fork, in a session of its own, deaf to every signal that can be ignored.
DAEMON = """
if os.fork() == 0:
    os.setsid()
    if os.fork() == 0:
        for number in set(range(1, 65)) - {9, 19, 32, 33}:
            signal.signal(number, signal.SIG_IGN)
        os.chdir("/")
        for fd in range(3):
            os.close(fd)
        time.sleep(600)
    os._exit(0)
os.wait()
tell("left behind")
"""


def gone(pids: list[int]) -> bool:
    """Whether none of these runs any more."""
    return not any(os.path.exists(f"/proc/{pid}") for pid in pids)


async def daemons(box: Sandbox, count: int = 1, **how: str) -> list[int]:
    """Leaves daemons in a sandbox; returns their pids on the host, with that of the first process."""
    before = set(descendants(box.core.keeper))
    for _ in range(count):
        assert await inside(box, DAEMON, **how) == "left behind"
    born = set(descendants(box.core.keeper)) - before
    assert len(born) >= count
    return sorted(born | before)


# ---- 52: daemons ----


async def test_52_a_daemon_outlives_its_command_but_not_its_sandbox(box: Sandbox) -> None:
    pids = [pid for user in users(box) for pid in await daemons(box, 2, user=user)]
    await still_serves(box)
    assert not gone(pids)
    await box.close()
    assert gone(pids)


@pytest.mark.parametrize("end", ["kill", "close", "cancel", "frozen"])
async def test_52_no_way_to_end_a_sandbox_leaves_a_daemon(end: str, box: Sandbox) -> None:
    pids = await daemons(box, 3)
    if end == "frozen":
        await box.freeze()
    if end in ("kill", "frozen"):
        box.kill("the test says so")
        assert await box.wait_ended() == "the test says so"
    await box.close()
    assert gone(pids)
    with pytest.raises(SandboxClosed):
        await box.exec(["/bin/true"])


@pytest.mark.parametrize("way", "timeout nohup setsid at crontab batch systemd-run screen tmux".split())
async def test_52_no_service_starts_anything_later(way: str, box: Sandbox, workspace: Path) -> None:
    """cron and at run on the host, and nothing inside reaches them; the rest is inside and ends with it."""
    mark = "/tmp/corral-52-mark"
    commands = {
        "timeout": f"timeout --foreground 600 sh -c 'sleep 599; touch {mark}' &",
        "nohup": f"nohup sh -c 'sleep 599; touch {mark}' >/dev/null 2>&1 &",
        "setsid": f"setsid -f sh -c 'trap \"\" 1 2 15; sleep 599; touch {mark}' >/dev/null 2>&1",
        "at": f"echo 'touch {mark}' | at now + 1 minute",
        "crontab": f"echo '* * * * * touch {mark}' | crontab -",
        "batch": f"echo 'touch {mark}' | batch",
        "systemd-run": f"systemd-run --user --no-block touch {mark}",
        "screen": f"screen -dmS x sh -c 'sleep 599; touch {mark}'",
        "tmux": f"tmux -f /dev/null new-session -d 'sleep 599; touch {mark}'",
    }
    spools = [Path(p) for p in ("/var/spool/cron", "/var/spool/cron/crontabs", "/etc/cron.d", "/var/spool/at")]

    def listing() -> list[list[str]]:
        found = []
        for spool in spools:
            try:
                found.append(sorted(os.listdir(spool)))
            except OSError:
                found.append([])
        return found

    before = listing()
    for user in users(box):
        script = f"exec >/dev/null 2>&1; {commands[way]}\necho '* * * * * root touch {mark}' >/etc/cron.d/x; exit 0"
        await box.exec(["/bin/sh", "-c", script], user=user, timeout=60)
    pids = descendants(box.core.keeper)
    await box.close()
    assert gone(pids)
    assert listing() == before
    assert not os.path.exists(mark)


# ---- 53: environments and start-up files ----

CARRIERS = dict.fromkeys(
    """LD_PRELOAD LD_LIBRARY_PATH LD_AUDIT PYTHONPATH PYTHONSTARTUP PYTHONHOME BASH_ENV ENV GIT_DIR GIT_CONFIG_GLOBAL
    GIT_SSH_COMMAND GIT_EXEC_PATH PERL5LIB RUBYOPT NODE_OPTIONS SSH_AUTH_SOCK DBUS_SESSION_BUS_ADDRESS DOCKER_HOST
    XDG_RUNTIME_DIR AWS_SECRET_ACCESS_KEY OPENAI_API_KEY GPG_AGENT_INFO DISPLAY http_proxy IFS PS4 GCONV_PATH TMUX
    PROMPT_COMMAND""".split(),
    "/nowhere/corral-53",
)


async def test_53_the_callers_environment_does_not_pass_in(make_box: MakeBox) -> None:
    caller = {**CARRIERS, "BASH_FUNC_ls%%": "() { id; }", "PATH": "/usr/bin:/bin", "TERM": "dumb", "HOME": "/root/real"}
    box = await make_box(environment=caller)
    for user in users(box):
        result = await box.exec(["/usr/bin/env", "-0"], user=user)
        found = dict(item.split("=", 1) for item in result.text.split("\0") if item)
        assert not set(found) & set(CARRIERS)
        assert "corral-53" not in result.text
        allowed = {"PATH", "HOME", "USER", "LOGNAME", "SHELL", "TMPDIR", "CORRAL", "LANG", "TERM"}
        assert set(found) == allowed
        assert found["HOME"] in ("/home/agent", "/root")
    named = await make_box(environment=caller, policy=Policy(environment=Environment(allow=("DISPLAY",))))
    assert (await named.exec(["/usr/bin/printenv", "DISPLAY"])).text == "/nowhere/corral-53\n"


PRELOAD = """
#include <unistd.h>
#include <stdio.h>
__attribute__((constructor)) static void loaded(void) {
    FILE *file = fopen("/tmp/loaded", "a");
    if (file) { fprintf(file, "%d\\n", getpid()); fclose(file); }
}
"""
START_UP_FILES = """
import site
for path, content in {
    "/etc/ld.so.preload": "/tmp/preload.so\\n", "/home/agent/.bashrc": "touch /tmp/bashrc\\n",
    "/home/agent/.profile": "touch /tmp/profile\\n", "/etc/profile.d/x.sh": "touch /tmp/profile\\n",
    "/home/agent/.gitconfig": "[core]\\n\\tfsmonitor = touch /tmp/git\\n", "/etc/bash.bashrc": "touch /tmp/bashrc\\n",
    os.path.join(sys.argv[1], ".envrc"): "touch /tmp/envrc\\n",
    os.path.join(site.getusersitepackages(), "x.pth"): "import os; open('/tmp/pth', 'w')\\n",
    os.path.join(sys.argv[1], "sitecustomize.py"): "open('/tmp/pth', 'w')\\n",
}.items():
    try:
        os.makedirs(os.path.dirname(path), exist_ok=True)
        open(path, "w").write(content)
    except OSError:
        pass
tell("planted")
"""


def _comm(pid: int) -> str:
    return Path(f"/proc/{pid}/comm").read_text().strip()


async def test_53_start_up_files_that_an_agent_plants_act_inside_only(
    box: Sandbox, workspace: Path, compile_c: Compile, tmp_path: Path
) -> None:
    library = workspace / "preload.so"
    source = tmp_path / "preload.c"
    source.write_text(PRELOAD)
    subprocess.run(["cc", "-shared", "-fPIC", "-w", "-o", library, source], check=True)
    await box.exec(["cp", str(library), "/tmp/preload.so"], check=True)
    for user in users(box):
        assert await inside(box, START_UP_FILES, str(workspace), user=user) == "planted"
    await box.exec(["/bin/bash", "-lic", "git status; python3 -c 0"], timeout=60)
    # Inside they act, as they would anywhere; but not on the launcher's processes: static, and without environment.
    acted = (await box.exec(["/bin/cat", "/tmp/loaded"])).text.split() if len(users(box)) > 1 else ["2"]
    assert acted
    assert "1" not in acted
    if os.geteuid() == 0:  # an ordinary user may not look into them either
        first = next(pid for pid in descendants(box.core.keeper) if _comm(pid) == "corral-init")
        for pid in (box.core.keeper, first):
            assert Path(f"/proc/{pid}/environ").read_bytes() == b""
            assert ".so" not in Path(f"/proc/{pid}/maps").read_text()
    # The host's own programs see none of it.
    command = ["/bin/bash", "-lc", "git status; python3 -c 0"]
    assert subprocess.run(command, cwd=workspace, capture_output=True, timeout=60, check=False).returncode == 0
    assert not any(os.path.exists(f"/tmp/{name}") for name in ("bashrc", "profile", "git", "envrc", "pth", "loaded"))
    assert sorted(os.listdir(workspace)) == ["file.txt", "preload.so"]


# ---- surviving kill ----

STUBBORN = """
#include <sched.h>
#include <signal.h>
#include <stdio.h>
#include <stdlib.h>
#include <sys/wait.h>
#include <unistd.h>
static void stay(void) { for (;;) pause(); }
int main(void) {
    for (int n = 1; n < 65; n++) signal(n, SIG_IGN);
    signal(SIGCHLD, SIG_DFL);
    sigset_t all;
    sigfillset(&all);
    sigprocmask(SIG_SETMASK, &all, NULL);
    for (int i = 0; i < 5; i++) if (fork() == 0) { setsid(); stay(); }               /* ignores and blocks all */
    for (int i = 0; i < 5; i++) if (fork() == 0) { raise(SIGSTOP); stay(); }         /* stopped */
    for (int i = 0; i < 3; i++) if (fork() == 0) { if (vfork() == 0) stay(); stay(); } /* waits in vfork: D state */
    for (int i = 0; i < 5; i++) if (fork() == 0) { for (;;) if (fork() == 0) usleep(1000), _exit(0); else wait(0); }
    for (int i = 0; i < 3; i++) if (fork() == 0) { setpgid(0, 0); if (fork()) _exit(0); for (;;); } /* orphans, busy */
    puts("ready");
    fflush(stdout);
    stay();
}
"""


@pytest.mark.parametrize("how", ["kill", "close", "freeze", "keeper dies", "first process dies"])
async def test_kill_leaves_no_process_whatever_state_it_is_in(how: str, box: Sandbox, compile_c: Compile) -> None:
    process = await box.start_process([compile_c(STUBBORN)])
    assert await process.stdout.readline() == b"ready\n"
    pids = descendants(box.core.keeper)
    assert len(pids) > 20
    if how == "freeze":
        await box.freeze()
        box.kill()
    elif how == "keeper dies":
        os.kill(box.core.keeper, signal.SIGKILL)
    elif how == "first process dies":
        first = Path(f"/proc/{box.core.keeper}/task/{box.core.keeper}/children").read_text().split()[0]
        os.kill(int(first), signal.SIGKILL)
    elif how == "kill":
        box.kill()
    if how != "close":
        await box.wait_ended()
    await box.close()
    assert wait_until(lambda: gone(pids))
    # Where the keeper dies there is nobody but the controller to remove the groups, a moment later.
    for _ in range(100):
        if not own_groups():
            break
        await asyncio.sleep(0.02)
    assert not own_groups()


CONTROLLER = """
import asyncio, json, os, sys
from corral.sandbox.box import Sandbox
from corral.sandbox.limits import descendants
async def main():
    boxes = [await Sandbox(sys.argv[1]).start() for _ in range(3)]
    for box in boxes:
        process = await box.start_process([sys.argv[2]])
        assert await process.stdout.readline() == b"ready\\n"
    await boxes[2].freeze()
    pids = [pid for box in boxes for pid in (box.core.keeper, *descendants(box.core.keeper))]
    print(json.dumps(pids), flush=True)
    await asyncio.sleep(600)
asyncio.run(main())
"""


@pytest.mark.parametrize("number", [signal.SIGKILL, signal.SIGSEGV, signal.SIGHUP], ids=lambda n: n.name)
def test_nothing_survives_the_death_of_its_controller(
    number: signal.Signals, workspace: Path, compile_c: Compile
) -> None:
    command = [sys.executable, "-c", CONTROLLER, str(workspace), compile_c(STUBBORN)]
    with subprocess.Popen(command, stdout=subprocess.PIPE) as controller:
        assert controller.stdout is not None
        try:
            pids = json.loads(controller.stdout.readline())
            assert len(pids) > 60
            os.kill(controller.pid, number)
            controller.wait(60)  # for ever where the caller of the tests ignores SIGHUP (nohup)
        finally:
            controller.kill()
    assert wait_until(lambda: gone(pids))

    def groups() -> list[str]:
        mine = f"{PREFIX}{controller.pid}-"
        return [n for each in hierarchies() for n in os.listdir(each.parent) if n.startswith(mine)]

    assert wait_until(lambda: not groups()), groups()


async def test_a_background_processs_output_does_not_hold_an_exec_open(box: Sandbox) -> None:
    """A daemon that keeps stdout open must not keep its starter's result, nor the close, waiting."""
    script = f"{PRELUDE}\nif os.fork() == 0:\n    os.setsid()\n    time.sleep(600)\nprint('done', flush=True)"
    result = await box.exec([PYTHON, "-c", script], timeout=60)
    assert (result.exit_code, result.text, result.timed_out) == (0, "done\n", False)
    pids = descendants(box.core.keeper)
    await box.close()
    assert gone(pids)
