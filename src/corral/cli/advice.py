"""What to do about each finding of `corral doctor`, given what explains it.

Advice is one or two commands, never more: what to do *first*. What the machine says about itself comes in a
:class:`Host`; only the name of the package manager is looked up here.
"""

from __future__ import annotations

import errno
import os
import shlex
import shutil
from collections.abc import Callable
from dataclasses import dataclass

from corral.sandbox.probes import Finding, State, Topic

FULL_MAP = 0xFFFFFFFF
"""User ids that exist where there is no user namespace around."""


@dataclass(frozen=True, slots=True)
class Host:
    """What explains failures, as read from this machine; None where a file does not exist."""

    release: str = ""
    uid: int = 1000
    user: str = "user"
    container: str = ""
    """docker, podman, kubernetes, lxc, another manager's name, or nothing."""
    userns_clone: str | None = None
    max_user_namespaces: str | None = None
    apparmor_userns: str | None = None
    lsm: str | None = None
    proc_mounts: tuple[str, ...] = ()
    """What lies over parts of /proc."""
    mapped_ids: int = FULL_MAP
    """User ids that exist in this user namespace."""
    in_sandbox: bool = False
    filtered: bool = False
    """Whether this process is under a seccomp filter of somebody else's."""
    systemd: bool = False
    cgroup_mounts: tuple[str, ...] = ()
    """Where version 2 is mounted, or version 1 with memory, pids or cpu."""
    unified: str = ""
    """Where version 2 is mounted, if it has controllers of these."""
    launcher: str = "corral-launcher"


_CONTAINER_NAMESPACES = {
    "docker": "docker run --security-opt seccomp=unconfined --security-opt apparmor=unconfined ...   "
    "(not --privileged: that gives away the host)",
    "podman": "podman run --security-opt seccomp=unconfined --security-opt label=disable ...   "
    "(not --privileged: that gives away the host)",
    "kubernetes": "in the pod: hostUsers: false; in the container's securityContext: "
    "seccompProfile: {type: Unconfined}, appArmorProfile: {type: Unconfined}",
    "lxc": "on the host: incus config set CONTAINER security.nesting=true   (lxc: lxc.include = "
    "/usr/share/lxc/config/nesting.conf), then restart the container",
}
_CONTAINER_PROC = {
    "docker": "docker run --security-opt systempaths=unconfined ...   (Docker hides parts of /proc; the kernel then "
    "refuses a new one. Not --privileged: that gives away the host)",
    "podman": "podman run --security-opt unmask=ALL ...   (Podman hides parts of /proc; the kernel then "
    "refuses a new one)",
    "kubernetes": "in the container's securityContext: procMount: Unmasked   (with hostUsers: false in the pod)",
    "lxc": "on the host: incus config set CONTAINER security.nesting=true   (so that a second, whole /proc is mounted)",
}


def apparmor_profile(launcher: str) -> str:
    """A profile that lets this one program make user namespaces, as Ubuntu ships them for browsers."""
    return (
        "abi <abi/4.0>,\ninclude <tunables/global>\n\n"
        f'profile corral-launcher "{launcher}" flags=(unconfined) {{\n'
        "  userns,\n  include if exists <local/corral-launcher>\n}\n"
    )


def _apparmor_advice(host: Host) -> list[str]:
    text = shlex.quote(apparmor_profile(host.launcher).replace("%", "%%").replace("\n", "\\n"))
    return [
        f"printf {text} | sudo tee /etc/apparmor.d/corral-launcher && "
        "sudo apparmor_parser -r /etc/apparmor.d/corral-launcher",
        "or, for every program: sudo sysctl -w kernel.apparmor_restrict_unprivileged_userns=0",
    ]


def _namespaces(finding: Finding, host: Host) -> list[str]:
    if host.in_sandbox:
        return ["run corral outside: this is a sandbox already, and sandboxes do not nest"]
    advice = []
    if host.max_user_namespaces == "0":
        advice.append(
            "sudo sysctl -w user.max_user_namespaces=15000   (it is 0; keep it in /etc/sysctl.d/60-corral.conf)"
        )
    if host.userns_clone == "0" and host.uid != 0:
        advice.append(
            "sudo sysctl -w kernel.unprivileged_userns_clone=1   (it is 0; keep it in /etc/sysctl.d/60-corral.conf)"
        )
    if advice:
        return advice
    if finding.errno == errno.ENOSPC:
        return [
            "grep . /proc/sys/user/max_*_namespaces   (one of these limits is reached, here or in an outer namespace)",
            "sudo sysctl -w user.max_user_namespaces=15000",
        ]
    if host.container:
        return [_CONTAINER_NAMESPACES.get(host.container, f"let {host.container} allow user namespaces and clone3")]
    if host.apparmor_userns == "1" and host.uid != 0:
        return _apparmor_advice(host)
    if host.filtered:
        return [
            "grep Seccomp /proc/self/status   (2: a seccomp filter of whoever started this shell forbids it; start "
            "corral elsewhere, or have that filter allow clone3, unshare, setns, mount and pivot_root)"
        ]
    if finding.errno in (errno.EINVAL, errno.ENOSYS):
        return [f"{_config('(USER|PID|NET|IPC|UTS)_NS')}   (all must be =y; this kernel is {host.release})"]
    return [
        "sudo dmesg | grep -iE 'apparmor|selinux|userns' | tail   (says which module refused)",
    ]


def _refused(finding: Finding, host: Host) -> list[str]:
    """A step inside the namespaces: where it was not permitted, the cause is that of namespaces that are refused."""
    if finding.errno in (errno.EPERM, errno.EACCES, errno.ENOSPC):
        return _namespaces(finding, host)
    return _REPORT(finding, host)


def _id_map(finding: Finding, host: Host) -> list[str]:
    if host.uid == 0 and host.mapped_ids < FULL_MAP:
        return [
            f"run corral as an ordinary user: only {host.mapped_ids} of the host's user ids exist here, and each "
            "sandbox of root needs a range of its own"
        ]
    return _refused(finding, host)


def _id_range(finding: Finding, host: Host) -> list[str]:
    if host.uid == 0:
        if host.mapped_ids < FULL_MAP:
            return _id_map(finding, host)
        return ["corral ps   (each live sandbox holds one range)", "ls -ld /run/corral   (must be root's own)"]
    if finding.state is State.MISSING:
        return [
            "sudo chmod u+s /usr/bin/newuidmap /usr/bin/newgidmap   (they write the ranges of /etc/subuid)",
            f"or do without a range: sudo sed -i /^{host.user}:/d /etc/subuid /etc/subgid",
        ]
    ranges = "--add-subuids 100000-165535 --add-subgids 100000-165535"
    return [f"sudo apt-get install uidmap && sudo usermod {ranges} {shlex.quote(host.user)}"]


def _proc(finding: Finding, host: Host) -> list[str]:
    if host.container in _CONTAINER_PROC:
        return [_CONTAINER_PROC[host.container]]
    if host.proc_mounts:
        names = " ".join(shlex.quote(path) for path in host.proc_mounts[:4])
        return [f"sudo umount {names}   (parts of /proc are hidden here; the kernel then refuses a whole one inside)"]
    return ["mount | grep /proc   (a whole, writable /proc must be mounted where corral is started)"]


def _landlock(finding: Finding, host: Host) -> list[str]:
    optional = "or do without this wall: in the policy, allow_degraded: [landlock]"
    if host.lsm is not None and "landlock" not in host.lsm.split(","):
        modules = ",".join(["landlock", *(name for name in host.lsm.split(",") if name and name != "capability")])
        return [f"add lsm={modules} to GRUB_CMDLINE_LINUX in /etc/default/grub; sudo update-grub; reboot", optional]
    return ["use a kernel of 5.13 or later with CONFIG_SECURITY_LANDLOCK=y, and landlock in its lsm= list", optional]


def _overlay(finding: Finding, host: Host) -> list[str]:
    return [
        f"use a kernel of 6.6 or later (this is {host.release}): before it, tmpfs keeps no user.overlay attributes",
        f"sudo modprobe overlay; {_config('(OVERLAY_FS|TMPFS_XATTR)')}   (=y or =m, and =y)",
    ]


def _seccomp(finding: Finding, host: Host) -> list[str]:
    if "libseccomp" in finding.seen:
        installers = {"apt-get": "libseccomp2", "dnf": "libseccomp", "zypper": "libseccomp2", "apk": "libseccomp"}
        tool = next((name for name in installers if shutil.which(name)), "apt-get")
        verb = {"apk": "add"}.get(tool, "install")
        return [f"sudo {tool} {verb} {installers[tool]}   (2.5 or later)"]
    return [f"{_config('SECCOMP_FILTER')}   (must be =y; x86-64 or arm64)"]


_DELEGATE = "/etc/systemd/system/user@.service.d"


def _limits(finding: Finding, host: Host) -> list[str]:
    if host.systemd:
        if host.uid == 0:
            return ["systemd-run --scope -p Delegate=yes corral run ...   (system.slice then gives controllers)"]
        return [
            "systemd-run --user --scope -p Delegate=yes corral run ...   (a group that is yours, as a login's is not)",
            f"sudo mkdir -p {_DELEGATE}; printf '[Service]\\nDelegate=cpu memory pids\\n' | sudo tee "
            f"{_DELEGATE}/corral.conf; sudo systemctl daemon-reload   (then log in again)",
        ]
    if not host.cgroup_mounts:
        return ["mount -t cgroup2 none /sys/fs/cgroup   (as root; no control groups are mounted here)"]
    owner, mounts = shlex.quote(host.user), " ".join(shlex.quote(path) for path in host.cgroup_mounts)
    # The shell goes one level deeper: a group with processes of its own can give its children no controllers.
    enter = (
        f"as root, in the shell that starts corral: for d in {mounts}; do mkdir -p $d/corral/shell; "
        f"chown -R {owner} $d/corral; echo $$ >$d/corral/shell/cgroup.procs; done"
    )
    if not host.unified:
        return [enter]
    give = f"echo +$c >{shlex.quote(host.unified)}/cgroup.subtree_control"
    return [f"as root: for c in memory pids cpu; do {give}; done", enter]


def _config(options: str) -> str:
    return f"zgrep -E 'CONFIG_{options}=' /proc/config.gz /boot/config-$(uname -r)"


def _say(*advice: str) -> Callable[[Finding, Host], list[str]]:
    return lambda _finding, _host: list(advice)


_REPORT = _say("report it with this output: the parts work, but not together")
_ADVICE: dict[Topic, Callable[[Finding, Host], list[str]]] = {
    Topic.KERNEL: lambda _, host: [f"use a kernel of 6.6 or later (this is {host.release})"],
    Topic.LAUNCHER: lambda _, host: [
        "pip install --force-reinstall corral",
        f"findmnt -T {shlex.quote(os.path.dirname(host.launcher) or '.')}   (must not be noexec)",
    ],
    Topic.NAMESPACES: _namespaces,
    Topic.ID_MAP: _id_map,
    Topic.ID_RANGE: _id_range,
    Topic.ROOT: _refused,
    Topic.OVERLAY: _overlay,
    Topic.FILES: _overlay,
    Topic.IDMAP: _say(
        "findmnt -T /usr; findmnt -T .   (must be ext4, xfs, btrfs, or tmpfs since Linux 6.3; not overlay)",
        "or run corral as an ordinary user, who does not need this",
    ),
    Topic.PROC: _proc,
    Topic.DEVICES: _say("ls -l /dev/null /dev/zero /dev/urandom /dev/tty   (must exist as devices, for all to use)"),
    Topic.TERMINALS: _say("sudo sysctl kernel.pty.max   (a kernel with CONFIG_UNIX98_PTYS=y)"),
    Topic.MQUEUE: _say(f"{_config('POSIX_MQUEUE')}   (must be =y)"),
    Topic.NETWORK: _refused,
    Topic.CGROUP: _limits,
    Topic.LIMITS: _limits,
    Topic.LANDLOCK: _landlock,
    Topic.SECCOMP: _seccomp,
    Topic.FOREIGN: _say("do not run untrusted programs here: the kernel's seccomp does not see calls of other ABIs"),
    Topic.WHOLE: _REPORT,
    Topic.PRIVILEGES: _REPORT,
    Topic.NESTING: _REPORT,
    Topic.INWARD: _REPORT,
    Topic.NO_ROUTE: _say("apt-get install bash   (something that can try to connect)"),
    Topic.WAY_OUT: _say(
        f"{_config('NFT_REDIR')} {_config('NF_CONNTRACK')} {_config('IPV6')}   (must be =y or =m)",
        "leave network.allow, network.ask and brokers out of policies: everything else works",
    ),
    Topic.TERMINAL: _REPORT,
    Topic.DEATH: _REPORT,
    Topic.DIRECTORIES: _say(
        "ls -ld ~/.cache ~/.local/state $XDG_RUNTIME_DIR   (must be your own, writable by nobody else)",
        "or: export XDG_CACHE_HOME=DIR XDG_STATE_HOME=DIR",
    ),
    Topic.DISK: _say("export XDG_STATE_HOME=DIR   (one on a larger file system)", "corral discard --all"),
    Topic.MEMORY: _say("in the policy: resources: {memory: 1GiB, disk: 512MiB}   (changes to files are in memory)"),
    Topic.OPEN_FILES: lambda _, host: [
        f"echo '{host.user} hard nofile 65536' | sudo tee /etc/security/limits.d/corral.conf   (then log in again)"
    ],
}


def advise(finding: Finding, host: Host) -> list[str]:
    """What to do about a finding: nothing where it is fine, otherwise one or two commands."""
    if finding.state not in (State.MISSING, State.NOTE) or finding.topic not in _ADVICE:
        return []
    return _ADVICE[finding.topic](finding, host)[:2]
