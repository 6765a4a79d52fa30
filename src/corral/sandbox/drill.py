"""The drill of `corral doctor`: a whole sandbox, tried from inside; and one whose controller is killed.

What each mechanism does alone is told by :mod:`corral.sandbox.probes`; here they must hold together. The controller is
killed with SIGKILL, so that nothing of its own can tidy up, and everything must be gone within :data:`DEATH_LIMIT`.
"""

from __future__ import annotations

import os
import shutil
import signal
import socket
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import suppress
from dataclasses import replace

from corral.errors import CorralError, WallError
from corral.gateway.sockets import original_destination
from corral.policy.model import Degradation, Network, NetworkRule, Policy
from corral.policy.names import address_of
from corral.sandbox.identity import AGENT_ID
from corral.sandbox.limits import descendants
from corral.sandbox.options import Listener, Options
from corral.sandbox.prepare import Prepared, prepare
from corral.sandbox.probes import Finding, State, Topic, failed, ok
from corral.sandbox.terminal import open_terminal
from corral.sandbox.trial import COMMAND_LIMIT, START_LIMIT, Trial, readable

DEATH_LIMIT = 1.0
"""Seconds after which nothing may be left of a sandbox whose controller was killed."""
_PORT = 80
_SIZE = (37, 111)


def whole() -> Iterator[Finding]:
    """What is found inside a whole sandbox, and after the death of its controller."""
    try:
        workspace = _workspace()
    except OSError as error:
        yield failed(Topic.WHOLE, error)
        return
    try:
        try:
            prepared = _prepare(workspace)
        except (CorralError, OSError) as error:
            yield failed(Topic.WHOLE, error)
            return
        started = time.perf_counter()
        try:
            with Trial(prepared.plan, prepared.identity.lease) as trial:
                trial.stand()
                trial.supervise(prepared)
                took = time.perf_counter() - started
                yield from _inside(_Whole(prepared, trial, workspace))
        except (CorralError, OSError) as error:
            yield failed(Topic.WHOLE, error)
            return
        finally:
            prepared.identity.release()
        yield _guarded(Topic.WAY_OUT, lambda: _way_out(workspace))
        yield _guarded(Topic.DEATH, lambda: _death_drill(workspace))
        yield ok(Topic.START, f"{took * 1000:.1f} ms until the walls stand", required=False)
    finally:
        shutil.rmtree(workspace, ignore_errors=True)


# doctor itself says what is missing: a wall that a policy may do without does not end its examination.
# The policy lets 192.0.2.1 pass, so that the answer to a connection is the network's.
_POLICY = Policy(network=Network(allow=(NetworkRule(network="192.0.2.1/32"),)), allow_degraded=frozenset(Degradation))


def _prepare(workspace: str, *, gateway: bool = False) -> Prepared:
    return prepare(Options(workspace, policy=_POLICY, listeners=(Listener(_PORT),)), gateway=gateway)


def _guarded(topic: Topic, probe: Callable[[], Finding]) -> Finding:
    try:
        return probe()
    except Exception as error:  # whatever it is, the other probes go on
        return failed(topic, error)


# ---- from inside ----

_FILES = """
echo more >>changed; grep -q more changed
rm gone; test ! -e gone
rm -r replaced; mkdir replaced; test -z "$(ls -A replaced)"
mv renamed other; test -s other; test ! -e renamed
echo new >new; chmod 700 new; mkdir -p one/two; mv one three; test -d three/two
ls -ldn . | { read -r mode links owner rest; test "$owner" = "$(id -u)"; }
"""
_CONNECT = """
import errno, socket
with socket.create_connection(("127.0.0.1", %(port)d), 2) as end:
    end.sendall(b"corral")
try:
    socket.create_connection(("192.0.2.1", 80), 2)
    print("connected")
except OSError as error:
    print(errno.errorcode.get(error.errno, error))
"""
_CONNECT_BASH = """
exec 3<>/dev/tcp/127.0.0.1/%(port)d && printf corral >&3 && exec 3>&-
message=$( (exec 3<>/dev/tcp/192.0.2.1/80) 2>&1 ) && echo connected && exit
case $message in *nreachable*) echo ENETUNREACH;; *) echo "$message";; esac
"""
_CHOOSE = 'if [ -x /usr/bin/python3 ]; then exec /usr/bin/python3 -ISc "$0"; fi; exec /bin/bash -c "$1"'
_LEAVE = "import socket; socket.create_connection(('192.0.2.1', 80), 2)"
_LEAVE_BASH = "exec 3<>/dev/tcp/192.0.2.1/80"
_NEST = """
cat /proc/sys/user/max_user_namespaces
if [ -x /usr/bin/unshare ]; then /usr/bin/unshare -U true 2>&1 && echo made; fi; exit 0
"""


class _Whole:
    """A sandbox as `corral run` builds it, and what is tried in it."""

    def __init__(self, prepared: Prepared, trial: Trial, workspace: str) -> None:
        self._prepared, self._trial, self._workspace = prepared, trial, workspace
        self._environment = prepared.environment | {"LC_ALL": "C", "PATH": "/usr/bin:/bin"}

    def sh(self, script: str, *arguments: str, terminal: tuple[int, int] | None = None) -> tuple[int, str]:
        argv = ["/bin/sh", "-ec", script, *arguments]
        return self._trial.run(argv, self._environment, self._prepared.directory, terminal=terminal)

    def files(self) -> Finding:
        before = _content(self._workspace)
        code, output = self.sh(_FILES)
        if code != 0:
            seen = output.strip().rpartition("\n")[2] or f"a change to a file failed (exit {code})"
            return Finding(Topic.FILES, State.MISSING, seen)
        if _content(self._workspace) != before:
            return Finding(Topic.FILES, State.MISSING, "a change made inside reached the host")
        return ok(Topic.FILES, "write, delete, replace, rename inside; the host's are as they were")

    def privileges(self) -> Finding:
        _, output = self.sh("cat /proc/self/status")
        status = {name: value.split() for name, _, value in (line.partition(":") for line in output.split("\n"))}
        wrong = [name for name in ("CapInh", "CapPrm", "CapEff", "CapBnd", "CapAmb") if int(status[name][0], 16)]
        wrong += [name for name, value in (("NoNewPrivs", "1"), ("Seccomp", "2")) if status[name] != [value]]
        wrong += ["Uid"] if set(status["Uid"]) != {str(AGENT_ID)} else []
        if wrong:
            return Finding(Topic.PRIVILEGES, State.MISSING, f"in /proc/self/status: {', '.join(wrong)}")
        return ok(Topic.PRIVILEGES, "no capability, no_new_privs, filter on, user 1000")

    def nesting(self) -> Finding:
        _, output = self.sh(_NEST)
        limit, _, rest = output.strip().partition("\n")
        if limit != "0" or "made" in rest.split():
            return Finding(Topic.NESTING, State.MISSING, f"a user namespace can be made inside (limit {limit})")
        return ok(Topic.NESTING, "limit 0, and the call is refused" if rest else "limit 0; no program to try it with")

    def apart(self) -> Finding:
        kinds = ("user", "mnt", "pid", "net", "ipc", "uts", "cgroup")
        _, output = self.sh("for kind; do readlink /proc/self/ns/$kind; done", "sh", *kinds)
        shared = {os.readlink(f"/proc/self/ns/{kind}") for kind in kinds} & set(output.split())
        if shared or len(output.split()) != len(kinds):
            return Finding(Topic.WHOLE, State.MISSING, f"shared with the host: {' '.join(sorted(shared)) or output}")
        return ok(Topic.WHOLE, f"stands, and is apart from the host in {len(kinds)} namespaces")

    def network(self) -> Iterator[Finding]:
        listener = socket.socket(fileno=os.dup(self._trial.listeners[0]))
        with listener:
            names = {"port": _PORT}
            code, output = self.sh(_CHOOSE, _CONNECT % names, _CONNECT_BASH % names)
            answer = output.strip().rpartition("\n")[2]
            yield self._accepted(listener, answer)
        if code == 0 and answer == "ENETUNREACH":
            yield ok(Topic.NO_ROUTE, "192.0.2.1: ENETUNREACH")
        elif code == 127:
            yield Finding(Topic.NO_ROUTE, State.NOTE, "not tried: neither python3 nor bash inside", required=False)
        else:
            yield Finding(Topic.NO_ROUTE, State.MISSING, f"192.0.2.1: {answer or f'exit {code}'}")

    def _accepted(self, listener: socket.socket, answer: str) -> Finding:
        if not readable(2, listener.fileno()):
            return Finding(Topic.INWARD, State.MISSING, f"no connection arrived: {answer}")
        with listener.accept()[0] as connection:
            connection.settimeout(2)
            if connection.recv(16) != b"corral":
                return Finding(Topic.INWARD, State.MISSING, "a connection arrived without its bytes")
        return ok(Topic.INWARD, f"a connection to port {_PORT} inside was accepted out here")

    def terminal(self) -> Finding:
        made = open_terminal(self._trial.root_fd, self._prepared.identity.outside(AGENT_ID), *_SIZE)
        master, made.master = made.master, -1
        _, output = self.sh("test -t 0; stty size </dev/tty", terminal=(master, made.take_slave()))
        if output.split() != [str(number) for number in _SIZE]:
            return Finding(Topic.TERMINAL, State.MISSING, output.strip() or "it says nothing")
        return ok(Topic.TERMINAL, "controlling terminal of the sandbox's own, with size")


def _content(directory: str) -> list[tuple[str, str]]:
    found = []
    for path, _, names in os.walk(directory):
        for name in names:
            with open(os.path.join(path, name), encoding="utf-8") as file:
                found.append((os.path.join(path, name), file.read()))
    return sorted(found)


def _workspace() -> str:
    path = os.path.realpath(tempfile.mkdtemp(prefix="corral-doctor-"))
    os.mkdir(f"{path}/replaced")
    for name in ("changed", "gone", "renamed", "replaced/old"):
        with open(f"{path}/{name}", "w", encoding="ascii") as file:
            file.write("old\n")
    return path


def _inside(inside: _Whole) -> Iterator[Finding]:
    yield _guarded(Topic.WHOLE, inside.apart)
    yield _guarded(Topic.FILES, inside.files)
    yield _guarded(Topic.PRIVILEGES, inside.privileges)
    yield _guarded(Topic.NESTING, inside.nesting)
    try:
        yield from inside.network()
    except (CorralError, OSError) as error:
        yield failed(Topic.INWARD, error)
    yield _guarded(Topic.TERMINAL, inside.terminal)


# ---- the way out ----


def _way_out(workspace: str) -> Finding:
    """Whether what is sent to any address arrives out here, and says where it was to go."""
    prepared = _prepare(workspace, gateway=True)
    try:
        with Trial(prepared.plan, prepared.identity.lease) as trial:
            trial.stand()
            trial.supervise(prepared)
            inside = _Whole(prepared, trial, workspace)
            code, output = inside.sh(_CHOOSE, _LEAVE, _LEAVE_BASH)
            if code == 127:
                return Finding(Topic.WAY_OUT, State.NOTE, "not tried: neither python3 nor bash inside", required=False)
            with socket.socket(fileno=os.dup(trial.listeners[1])) as listener:
                if not readable(2, listener.fileno()):
                    seen = f"a connection to 192.0.2.1 did not arrive: {output.strip() or f'exit {code}'}"
                    return Finding(Topic.WAY_OUT, State.MISSING, seen, required=False)
                with listener.accept()[0] as connection:
                    address, port = original_destination(connection)
    except WallError as error:
        return replace(failed(Topic.WAY_OUT, error), required=False)
    finally:
        prepared.identity.release()
    if (address_of(address), port) != ("192.0.2.1", 80):
        return Finding(Topic.WAY_OUT, State.MISSING, "a connection arrived without its destination", required=False)
    return ok(Topic.WAY_OUT, "a connection to 192.0.2.1 arrived at the gateway's listener, and nowhere else")


# ---- the death drill ----


def _doomed(workspace: str, writer: int) -> None:
    """The controller that is going to be killed: tells its keeper, and where its groups are, once all stands."""
    prepared = _prepare(workspace)
    trial = Trial(prepared.plan, prepared.identity.lease)
    trial.stand()
    trial.supervise(prepared)
    groups = "\n".join(path for _, path in prepared.groups.paths)
    os.write(writer, f"{trial.keeper}\n{groups}".encode())
    trial.run(["/bin/sh", "-c", "sleep 60 & sleep 60"], {"PATH": "/usr/bin:/bin"}, "/")


def _death_drill(workspace: str) -> Finding:
    reader, writer = os.pipe2(os.O_CLOEXEC)
    child = os.fork()
    if child == 0:
        with suppress(BaseException):
            os.close(reader)
            _doomed(workspace, writer)
        os._exit(1)
    os.close(writer)
    watched: list[int] = []
    try:
        lines = os.read(reader, 1 << 16).decode().split("\n") if readable(START_LIMIT, reader) else [""]
        if not lines[0]:
            raise CorralError("the sandbox for the drill did not start")
        keeper = int(lines[0])
        deadline = time.monotonic() + COMMAND_LIMIT
        while len(pids := descendants(keeper)) < 3 and time.monotonic() < deadline:
            time.sleep(0.01)
        for pid in (keeper, *pids):
            with suppress(ProcessLookupError):
                watched.append(os.pidfd_open(pid))
        os.kill(child, signal.SIGKILL)
        return _all_gone(watched, [line for line in lines[1:] if line])
    finally:
        with suppress(ProcessLookupError):
            os.kill(child, signal.SIGKILL)
        os.waitpid(child, 0)
        for fd in (reader, *watched):
            os.close(fd)


def _all_gone(watched: list[int], groups: list[str]) -> Finding:
    started = time.monotonic()
    left = set(watched)
    while left and (wait := started + DEATH_LIMIT - time.monotonic()) > 0:
        left -= set(readable(wait, *left))
    took = time.monotonic() - started
    if left:
        for fd in left:
            with suppress(OSError):
                signal.pidfd_send_signal(fd, signal.SIGKILL)
        seen = f"{len(left)} of {len(watched)} processes lived on after {DEATH_LIMIT:.0f} s"
        return Finding(Topic.DEATH, State.MISSING, seen)
    remains = [path for path in groups if os.path.exists(path)]
    if remains:
        return Finding(Topic.DEATH, State.MISSING, f"left over: {', '.join(remains)}")
    return ok(Topic.DEATH, f"kill -9: {len(watched)} processes and {len(groups)} groups gone in {took * 1000:.0f} ms")
