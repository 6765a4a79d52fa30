"""The doctor's advice: what each failure says to do, given what the machine says about itself."""

from __future__ import annotations

import errno
import json
import os
import subprocess
from collections.abc import Iterator
from pathlib import Path

import pytest

from corral.cli import doctor
from corral.cli.advice import Host, advise, apparmor_profile
from corral.errors import WallError
from corral.sandbox import probes
from corral.sandbox.cgroups import Controller, Hierarchy
from corral.sandbox.probes import Finding, State, Topic

MISSING = State.MISSING


def missing(topic: Topic, number: int = errno.EPERM, seen: str = "") -> Finding:
    return Finding(topic, MISSING, seen, errno=number)


@pytest.mark.parametrize(
    ("finding", "host", "expected"),
    [
        (missing(Topic.NAMESPACES), Host(userns_clone="0"), "kernel.unprivileged_userns_clone=1"),
        (missing(Topic.NAMESPACES, errno.ENOSPC), Host(max_user_namespaces="0"), "user.max_user_namespaces=15000"),
        (missing(Topic.NAMESPACES, errno.ENOSPC), Host(max_user_namespaces="9"), "max_*_namespaces"),
        (missing(Topic.NAMESPACES, errno.EACCES), Host(apparmor_userns="1"), "/etc/apparmor.d/corral-launcher"),
        (missing(Topic.ID_MAP, errno.EACCES), Host(apparmor_userns="1"), "/etc/apparmor.d/corral-launcher"),
        (missing(Topic.ROOT, errno.EACCES), Host(apparmor_userns="1"), "/etc/apparmor.d/corral-launcher"),
        (missing(Topic.NAMESPACES), Host(container="docker"), "--security-opt seccomp=unconfined"),
        (missing(Topic.NAMESPACES, errno.ENOSYS), Host(container="docker"), "--security-opt seccomp=unconfined"),
        (missing(Topic.NAMESPACES), Host(container="kubernetes"), "hostUsers: false"),
        (missing(Topic.NAMESPACES), Host(container="lxc"), "security.nesting=true"),
        (missing(Topic.NAMESPACES), Host(container="systemd-nspawn"), "systemd-nspawn"),
        (missing(Topic.NAMESPACES, errno.EINVAL), Host(), "CONFIG_(USER|PID|NET|IPC|UTS)_NS"),
        (missing(Topic.NAMESPACES), Host(), "dmesg"),
        (missing(Topic.NAMESPACES, errno.ENOSYS), Host(filtered=True), "Seccomp"),
        (missing(Topic.NAMESPACES), Host(in_sandbox=True, container="docker"), "do not nest"),
        (missing(Topic.PROC), Host(container="docker"), "--security-opt systempaths=unconfined"),
        (missing(Topic.PROC), Host(container="podman"), "unmask=ALL"),
        (missing(Topic.PROC), Host(container="kubernetes"), "procMount: Unmasked"),
        (missing(Topic.PROC), Host(proc_mounts=("/proc/kcore", "/proc/a b")), "umount /proc/kcore '/proc/a b'"),
        (missing(Topic.PROC), Host(), "/proc must be mounted"),
        (missing(Topic.ID_MAP), Host(uid=0, mapped_ids=1), "as an ordinary user"),
        (missing(Topic.ID_RANGE), Host(uid=0, mapped_ids=65536), "as an ordinary user"),
        (missing(Topic.ID_RANGE), Host(), "chmod u+s /usr/bin/newuidmap"),
        (missing(Topic.LANDLOCK, 0), Host(lsm="capability,yama,apparmor"), "lsm=landlock,yama,apparmor "),
        (missing(Topic.LANDLOCK, 0), Host(lsm="lockdown,capability,landlock"), "CONFIG_SECURITY_LANDLOCK"),
        (missing(Topic.LANDLOCK, 0), Host(), "CONFIG_SECURITY_LANDLOCK"),
        (missing(Topic.SECCOMP, 0, "libseccomp.so.2 cannot be used"), Host(), "libseccomp"),
        (missing(Topic.SECCOMP, errno.EINVAL), Host(), "CONFIG_SECCOMP_FILTER"),
        (missing(Topic.OVERLAY, errno.EINVAL), Host(release="5.15.0"), "5.15.0"),
        (missing(Topic.IDMAP, errno.EINVAL), Host(uid=0), "findmnt -T /usr"),
        (missing(Topic.LAUNCHER, errno.ENOENT), Host(), "pip install"),
        (Finding(Topic.LIMITS, State.NOTE, ""), Host(systemd=True), "systemd-run --user --scope -p Delegate=yes"),
        (Finding(Topic.LIMITS, State.NOTE, ""), Host(systemd=True, uid=0), "systemd-run --scope -p Delegate=yes"),
        (Finding(Topic.LIMITS, State.NOTE, ""), Host(systemd=True), "Delegate=cpu memory pids"),
        (Finding(Topic.LIMITS, State.NOTE, ""), Host(cgroup_mounts=("/cg",)), "/cg"),
        (Finding(Topic.LIMITS, State.NOTE, ""), Host(), "mount -t cgroup2"),
        (Finding(Topic.OPEN_FILES, State.NOTE, ""), Host(user="eve"), "eve hard nofile"),
    ],
)
def test_advice_names_the_cause(finding: Finding, host: Host, expected: str) -> None:
    assert expected in "\n".join(advise(finding, host))


def test_the_advice_without_systemd_works_on_version_2(tmp_path: Path) -> None:
    """In a fake tree: files are what a group has. The shell must not be in the group that gives controllers."""
    (tmp_path / "cgroup.subtree_control").touch()
    host = Host(user=str(os.geteuid()), cgroup_mounts=(str(tmp_path),), unified=str(tmp_path))
    for line in advise(Finding(Topic.LIMITS, State.NOTE, ""), host):
        subprocess.run(["sh", "-ec", line.partition(": ")[2]], check=True)
    assert (tmp_path / "cgroup.subtree_control").read_text() == "+cpu\n"  # the last of what was written to it
    assert (tmp_path / "corral/shell/cgroup.procs").read_text().strip().isdecimal()
    assert not (tmp_path / "corral/cgroup.procs").exists()


def test_absent_or_harmless_switches_are_not_blamed() -> None:
    for host in (Host(), Host(userns_clone="1", max_user_namespaces="15000", apparmor_userns="0")):
        text = "\n".join(advise(missing(Topic.NAMESPACES), host))
        assert "sysctl" not in text
        assert "apparmor.d" not in text


def test_what_binds_ordinary_users_only_is_not_told_to_root() -> None:
    host = Host(uid=0, userns_clone="0", apparmor_userns="1")
    text = "\n".join(advise(missing(Topic.NAMESPACES), host))
    assert "userns_clone" not in text
    assert "apparmor.d" not in text


def test_both_switches_are_named_when_both_are_off() -> None:
    text = "\n".join(advise(missing(Topic.NAMESPACES), Host(userns_clone="0", max_user_namespaces="0")))
    assert "unprivileged_userns_clone=1" in text
    assert "max_user_namespaces=15000" in text


def test_privileged_containers_are_never_advised() -> None:
    for container in ("docker", "podman", "kubernetes", "lxc"):
        for topic in (Topic.NAMESPACES, Topic.PROC):
            for line in advise(missing(topic), Host(container=container)):
                assert "--privileged" not in line.replace("not --privileged", "").replace("Not --privileged", "")


def test_a_profile_is_for_the_launcher_alone() -> None:
    text = apparmor_profile("/opt/a b/corral-launcher")
    assert '"/opt/a b/corral-launcher" flags=(unconfined)' in text
    assert "userns," in text


def test_the_command_for_a_profile_writes_just_that() -> None:
    host = Host(apparmor_userns="1", launcher="/opt/it's 100%/corral-launcher")
    command = advise(missing(Topic.NAMESPACES), host)[0]
    printed = subprocess.run(["sh", "-c", command.partition(" | ")[0]], stdout=subprocess.PIPE, text=True, check=True)
    assert printed.stdout == apparmor_profile(host.launcher)


@pytest.mark.parametrize("topic", list(Topic))
@pytest.mark.parametrize("host", [Host(), Host(uid=0, container="docker", mapped_ids=1), Host(systemd=True)])
def test_every_missing_part_has_one_or_two_lines_of_advice(topic: Topic, host: Host) -> None:
    if topic is not Topic.START:
        assert 1 <= len(advise(missing(topic), host)) <= 2
    for state in (State.OK, State.UNTRIED):
        assert advise(Finding(topic, state, ""), host) == []


def test_an_old_kernel_counts_unless_files_were_seen_to_change() -> None:
    works = Finding(Topic.FILES, State.OK, "")
    assert doctor.kernel_finding("6.6.0-rc1", []).state is State.OK
    assert doctor.kernel_finding("10.0", []).state is State.OK
    assert doctor.kernel_finding("5.15.0-91-generic", []).state is MISSING
    assert doctor.kernel_finding("5.14.0-427.el9", [works]).state is State.NOTE
    assert doctor.kernel_finding("nonsense", []).state is MISSING


def test_missing_controllers_are_a_note_with_what_stands_in() -> None:
    nothing = doctor.limits_finding(())
    assert (nothing.state, nothing.required) == (State.NOTE, False)
    assert "RLIMIT_DATA" in nothing.seen
    every = doctor.limits_finding((Hierarchy(2, "/cg", frozenset(Controller)),))
    assert every.state is State.OK
    assert "memory v2" in every.seen


@pytest.fixture
def outcome(monkeypatch: pytest.MonkeyPatch) -> Iterator[list[Finding]]:
    found = [Finding(Topic.KERNEL, State.OK, "6.18"), Finding(Topic.LIMITS, State.NOTE, "less", required=False)]
    monkeypatch.setattr(doctor, "findings", lambda: found)
    monkeypatch.setattr(doctor, "read_host", lambda: Host(container="docker"))
    yield found


def test_notes_are_no_failure(outcome: list[Finding], capsys: pytest.CaptureFixture[str]) -> None:
    assert doctor.examine(as_json=False) == 0
    assert capsys.readouterr().out.rstrip().endswith("everything that the walls need works here")


def test_one_missing_wall_is_126_and_says_what_comes_first(
    outcome: list[Finding], capsys: pytest.CaptureFixture[str]
) -> None:
    outcome += [missing(Topic.PROC, seen="proc: /proc (EPERM)"), missing(Topic.LANDLOCK, 0)]
    assert doctor.examine(as_json=False) == 126
    last = capsys.readouterr().out.rstrip().rpartition("\n")[2]
    assert "nothing runs here" in last
    assert "systempaths=unconfined" in last


def test_output_is_plain_ascii_marks_without_markup_or_control_characters(
    outcome: list[Finding], capsys: pytest.CaptureFixture[str]
) -> None:
    outcome.append(missing(Topic.WHOLE, seen="[bold]x[/bold] \x1b[2J :smile:"))
    doctor.examine(as_json=False)
    out = capsys.readouterr().out
    assert "[bold]x[/bold] \\x1b[2J :smile:" in out
    assert "\x1b" not in out
    assert out.isascii()


def test_json_is_a_list_of_objects(outcome: list[Finding], capsys: pytest.CaptureFixture[str]) -> None:
    outcome.append(missing(Topic.PROC))
    assert doctor.examine(as_json=True) == 126
    rows = json.loads(capsys.readouterr().out)
    assert [row["state"] for row in rows] == ["ok", "note", "missing"]
    assert set(rows[0]) == {"name", "required", "state", "seen", "todo"}
    assert rows[0]["todo"] == []
    assert rows[2]["todo"]


def test_a_failure_keeps_step_and_errno() -> None:
    finding = probes.failed(Topic.OVERLAY, WallError("overlay", "/tree", errno.EINVAL))
    assert (finding.state, finding.step, finding.errno) == (MISSING, "overlay", errno.EINVAL)
    assert finding.seen == "overlay: /tree (EINVAL)"
