"""`corral doctor` on this machine, as it is and with one thing taken away at a time."""

from __future__ import annotations

import errno
import json
import os
import pwd
import shutil
import signal
import struct
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest

import corral
from corral.sandbox import drill, probes
from corral.sandbox.probes import State, Topic

ROOT = os.geteuid() == 0
USER = "corral-test"
USERADD = ("useradd", "--create-home", "--key", "SUB_UID_COUNT=0", "--key", "SUB_GID_COUNT=0")
"""As tests/as_user.sh: without a range of subordinate ids."""
PACKAGES = str(Path(corral.__file__).parent.parent)
EXAMINE = "import sys; from corral.cli.doctor import examine; sys.exit(examine(as_json=True))"
# Answers one call with an errno, as a container's seccomp profile does: load nr; if it is the call, the errno; allow.
REFUSE = """
import ctypes, struct, sys
number, answer = int(sys.argv[1]), int(sys.argv[2])
rows = ((0x20, 0, 0, 0), (0x15, 0, 1, number), (6, 0, 0, 0x50000 | answer), (6, 0, 0, 0x7fff0000))
program = b"".join(struct.pack("<HBBI", *row) for row in rows)
class Program(ctypes.Structure):
    _fields_ = (("length", ctypes.c_ushort), ("instructions", ctypes.c_char_p))
libc = ctypes.CDLL(None, use_errno=True)
assert libc.prctl(38, 1, 0, 0, 0) == 0
assert libc.prctl(22, 2, ctypes.byref(Program(4, program)), 0, 0) == 0
"""


@dataclass
class Patient:
    """One user of this machine, with directories of its own."""

    uid: int
    gid: int
    directory: str
    python: str

    def run(
        self, code: str = EXAMINE, *arguments: str, before: str = "", as_root: str = ""
    ) -> tuple[int, list[dict[str, Any]]]:
        """Exit code and findings. ``before`` is shell that goes first, ``as_root`` shell that root does before that."""
        names = ("HOME", "TMPDIR", "XDG_CACHE_HOME", "XDG_STATE_HOME")
        environment = {name: f"{self.directory}/{name}" for name in names}
        for path in environment.values():
            os.makedirs(path, mode=0o700, exist_ok=True)
            if ROOT:
                os.chown(path, self.uid, self.gid)
        environment |= {"PATH": os.defpath + ":/usr/sbin:/sbin", "PYTHONPATH": PACKAGES}
        command = [self.python, "-c", code, *arguments]
        if before:
            command = ["sh", "-c", f'{before} "$@"', "sh", *command]
        if self.uid != os.geteuid():
            command = ["setpriv", f"--reuid={self.uid}", f"--regid={self.gid}", "--clear-groups", "--", *command]
        if as_root:
            command = ["unshare", "-m", "sh", "-c", f'{as_root} && exec "$@"', "sh", *command]
        done = subprocess.run(command, env=environment, cwd="/", stdout=subprocess.PIPE, timeout=120)
        assert os.listdir(environment["TMPDIR"]) == []
        return done.returncode, json.loads(done.stdout)


def of(topic: Topic, rows: list[dict[str, Any]]) -> dict[str, Any]:
    (row,) = [row for row in rows if row["name"] == topic.value]
    return row


def missing(rows: list[dict[str, Any]]) -> list[str]:
    return [row["name"] for row in rows if row["state"] == "missing"]


def _python(uid: int, gid: int) -> str:
    """One that the user can execute: this one may lie in root's home."""
    for program in (sys.executable, "/usr/bin/python3"):
        command = ["/bin/sh", "-c", f'test "$({program} -c "print(1)" 2>/dev/null)" = 1']
        if subprocess.run(command, cwd="/", user=uid, group=gid, extra_groups=[]).returncode == 0:
            return program
    raise AssertionError("no Python that an ordinary user can execute")


@pytest.fixture(params=["root", "user"])
def patient(request: pytest.FixtureRequest) -> Iterator[Patient]:
    if not ROOT and request.param == "root":
        pytest.skip("needs root")
    uid, gid, python = os.geteuid(), os.getegid(), sys.executable
    if ROOT and request.param == "user":
        try:
            entry = pwd.getpwnam(USER)
        except KeyError:
            subprocess.run([*USERADD, USER], check=True)
            entry = pwd.getpwnam(USER)
        uid, gid = entry.pw_uid, entry.pw_gid
        python = _python(uid, gid)
    directory = tempfile.mkdtemp(prefix="corral-patient-")
    os.chmod(directory, 0o755)
    if ROOT:
        os.chown(directory, uid, gid)
    yield Patient(uid, gid, directory, python)
    shutil.rmtree(directory)


def test_this_machine_has_all_that_is_required(patient: Patient) -> None:
    code, rows = patient.run()
    assert missing(rows) == []
    assert code == 0
    assert {row["state"] for row in rows} <= {"ok", "note"}
    tried = {row["name"] for row in rows}
    expected = set(Topic) - {Topic.CGROUP, Topic.IDMAP, Topic.FOREIGN}
    assert {topic.value for topic in expected} <= tried
    assert (Topic.IDMAP.value in tried) == (patient.uid == 0)


LEFT = """
import contextlib, io, json, os
from corral.cli import doctor
from corral.sandbox.limits import descendants
with contextlib.redirect_stdout(io.StringIO()):
    code = doctor.examine(as_json=True)
groups = [name for hierarchy in doctor.cgroups.hierarchies() for name in os.listdir(hierarchy.parent)]
own = [name for name in groups if name.startswith(f"corral-{os.getpid()}-")]
print(json.dumps([{"left": descendants(os.getpid()) + own, "descriptors": len(os.listdir("/proc/self/fd"))}]))
"""


def test_it_leaves_no_process_no_group_and_no_descriptor(patient: Patient) -> None:
    _, rows = patient.run(LEFT)
    assert rows[0]["left"] == []
    # Three, the lock on the system image, that of the listing, two of the supervisor, one to spare.
    assert rows[0]["descriptors"] <= 8


def test_no_user_namespaces_left(patient: Patient) -> None:
    script = "echo 0 >/proc/sys/user/max_user_namespaces && exec"
    code, rows = patient.run(before=f"""exec unshare -Ur sh -c '{script} "$@"' sh""")
    assert code == 126
    finding = of(Topic.NAMESPACES, rows)
    assert finding["state"] == "missing"
    assert "ENOSPC" in finding["seen"]
    assert "user.max_user_namespaces" in finding["todo"][0]
    assert of(Topic.WHOLE, rows)["state"] == "untried"


@pytest.mark.root
def test_parts_of_proc_are_hidden(patient: Patient) -> None:
    code, rows = patient.run(as_root="mount -t tmpfs none /proc/irq")
    assert code == 126
    finding = of(Topic.PROC, rows)
    assert (finding["state"], finding["seen"]) == ("missing", "proc: /proc (EPERM)")
    assert "systempaths=unconfined" in finding["todo"][0] or "/proc/irq" in finding["todo"][0]


@pytest.mark.parametrize(
    ("number", "answer", "topic", "todo"),
    [
        (444, errno.EOPNOTSUPP, Topic.LANDLOCK, "landlock"),  # landlock_create_ruleset
        (435, errno.ENOSYS, Topic.NAMESPACES, ""),  # clone3, as Docker answers it
    ],
)
def test_a_refused_call_is_named(patient: Patient, number: int, answer: int, topic: Topic, todo: str) -> None:
    code, rows = patient.run(REFUSE + EXAMINE, str(number), str(answer))
    assert code == 126
    finding = of(topic, rows)
    assert finding["state"] == "missing"
    assert todo in finding["todo"][0]
    if topic is Topic.LANDLOCK:  # a policy may do without, so the rest is tried
        assert of(Topic.FILES, rows)["state"] == "ok"
        assert any("allow_degraded" in line for line in finding["todo"])


def test_few_open_files_are_a_note(patient: Patient) -> None:
    code, rows = patient.run(before="ulimit -n 1000 && exec")
    assert code == 0
    finding = of(Topic.OPEN_FILES, rows)
    assert (finding["state"], finding["required"]) == ("note", False)
    assert "1000" in finding["seen"]


def test_a_launcher_that_is_not_there(patient: Patient) -> None:
    code, rows = patient.run("from corral.sandbox import launcher; launcher._PROGRAM = '/nonexistent'\n" + EXAMINE)
    assert code == 126
    assert missing(rows) == [Topic.LAUNCHER.value]
    assert "pip install" in of(Topic.LAUNCHER, rows)["todo"][0]


def test_directories_that_others_can_write_to(patient: Patient) -> None:
    spoil = "import os; os.chmod(os.environ['XDG_STATE_HOME'], 0o700); d = os.environ['XDG_STATE_HOME'] + '/corral'\n"
    code, rows = patient.run(spoil + "os.mkdir(d); os.chmod(d, 0o777)\n" + EXAMINE)
    assert code == 126
    assert Topic.DIRECTORIES.value in missing(rows)
    assert "ls -ld" in of(Topic.DIRECTORIES, rows)["todo"][0]


# ---- probes that must be able to fail ----


@pytest.mark.skipif(os.uname().machine != "x86_64", reason="these ABIs exist on x86-64 only")
def test_a_filter_that_lets_foreign_calls_through_is_noticed(monkeypatch: pytest.MonkeyPatch) -> None:
    allow_all = struct.pack("<HBBI", 0x06, 0, 0, 0x7FFF0000)
    monkeypatch.setattr(probes, "compile_filter", lambda: allow_all)
    found = {finding.topic: finding.state for finding in probes.filters()}
    assert found == {Topic.SECCOMP: State.OK, Topic.FOREIGN: State.MISSING}


def test_a_process_that_lives_on_is_noticed_and_ended() -> None:
    survivor = subprocess.Popen(["sleep", "60"])
    watched = os.pidfd_open(survivor.pid)
    try:
        finding = drill._all_gone([watched], [])
        assert finding.state is State.MISSING
        assert "1 of 1 processes" in finding.seen
        assert survivor.wait(5) == -signal.SIGKILL
    finally:
        os.close(watched)
        survivor.kill()
        survivor.wait()


def test_a_group_that_is_left_over_is_noticed(tmp_path: Path) -> None:
    assert drill._all_gone([], [str(tmp_path)]).state is State.MISSING
    assert drill._all_gone([], [str(tmp_path / "gone")]).state is State.OK
