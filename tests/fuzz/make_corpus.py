"""Writes the seeds of the two fuzzers: plans and exec requests as Corral's own encoders make them.

    PYTHONPATH=src python3 tests/fuzz/make_corpus.py    # into tests/fuzz/corpus/{plan,exec}

The seeds are committed, so that fuzzing needs no installed package; run this again when a layout changes. They depend
on nothing of the machine: equal sources, equal bytes.
"""

from __future__ import annotations

import resource
import sys
from pathlib import Path

from corral.gateway.capture import redirect_messages, route_messages
from corral.sandbox.channel import encode_exec
from corral.sandbox.plan import Attribute, IdLine, Idmap, Lower, Map, Origin, Plan

CORPUS = Path(__file__).parent / "corpus"
ALLOW = b"\x06\x00\x00\x00\x00\x00\xff\x7f"


def ids(plan: Plan) -> None:
    for which in (Map.SANDBOX_UID, Map.SANDBOX_GID):
        plan.id_map(which, [IdLine(1000, 1002, 1)])


def smallest() -> Plan:
    plan = Plan()
    ids(plan)
    return plan


def one_of_each() -> Plan:
    plan = Plan()
    plan.id_map(Map.SANDBOX_UID, [IdLine(0, 100000, 1000), IdLine(1000, 1002, 1)], helper="/usr/bin/newuidmap")
    plan.id_map(Map.SANDBOX_GID, [IdLine(0, 100000, 65536)], become=0)
    plan.id_map(Map.WORKSPACE_UID, [IdLine(1002, 200000, 1), IdLine(0, 100000, 1)])
    plan.id_map(Map.WORKSPACE_GID, [IdLine(1002, 200000, 1)])
    plan.cgroup(1, "/sys/fs/cgroup/pids/corral-1", [("pids.max", "100")])
    plan.cgroup(2, "/sys/fs/cgroup/corral-1", [])
    plan.wall_time(60)
    plan.remove("/run/corral/1")
    plan.prepare_outside()
    plan.layer(1 << 30, 1 << 16)
    plan.layer_directory("work", 0o700, 0, 0)
    plan.root(1 << 20, 4096)
    plan.directory("/usr")
    plan.symlink("usr/bin", "/bin")
    plan.file("/etc/hosts", b"127.0.0.1 localhost\n")
    plan.file("/dev/null")
    plan.overlay("/usr", "usr", "usr.work", [Lower("/image/usr", Idmap.SANDBOX), Lower("/usr")])
    plan.bind("/dev/null", "/dev/null", attributes=Attribute.DEVICES)
    plan.bind("home", "/home", origin=Origin.LAYER, attributes=Attribute.READ_ONLY | Attribute.NO_EXEC)
    plan.bind("/proc/sys", "/proc/sys", origin=Origin.ROOT, idmap=Idmap.WORKSPACE)
    plan.proc("/proc", "hidepid=2")
    plan.devpts("/dev/pts", "newinstance")
    plan.mqueue("/dev/mqueue")
    plan.sysctl("user/max_user_namespaces", "0")
    plan.seal_root()
    plan.pivot()
    plan.hostname("corral")
    plan.loopback()
    plan.listen("127.0.0.1", 80)
    plan.listen("::1", 443)
    plan.netlink(*route_messages())
    plan.netlink(*redirect_messages())
    plan.datagram("0.0.0.0", 53)
    plan.datagram("::", 53)
    plan.rlimit(resource.RLIMIT_NOFILE, 1024)
    plan.landlock(0xFFFF, 3, 3, [(0xF, "/"), (0xFFFF, "/tmp")])
    plan.affinity([0, 1, 1023])
    plan.filter(ALLOW * 2)
    return plan


def most() -> Plan:
    plan = Plan()
    ids(plan)
    for number in range(20):
        plan.overlay(f"/{number}", "u", "w", [Lower("/l")] * 12)
    for port in range(1, 31):
        plan.listen("127.0.0.1", port)
    plan.datagram("::", 65535)
    plan.datagram("127.0.0.1", 1)
    plan.netlink(12, bytes(16384), 64)
    for number in range(8):
        plan.cgroup(1, f"/c{number}", [("f", "v")] * 4)
    return plan


PLANS = {"smallest": smallest, "one_of_each": one_of_each, "most": most}

EXECS = {
    "smallest": encode_exec(["true"], {}, "/", 0, 0),
    "shell": encode_exec(["sh", "-c", "echo $HOME"], {"HOME": "/home/agent", "PATH": "/bin"}, "/tmp", 1000, 1000),
    "terminal": encode_exec(["vim"], {"TERM": "xterm"}, "/work", 1000, 1000, terminal=True),
    "limits": encode_exec(["make"], {}, "/", 1000, 1000, limits=[(resource.RLIMIT_CPU, 1, 2)] * 16),
    "bytes": encode_exec(["\udcff", "", "é"], {"A": ""}, "\udc80", 0xFFFFFFFF, 0xFFFFFFFF),
}


def main() -> int:
    seeds = {f"plan/{name}": make().compile() for name, make in PLANS.items()}
    seeds |= {f"exec/{name}": content for name, content in EXECS.items()}
    for name, content in seeds.items():
        path = CORPUS / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(content)
    print(f"{len(seeds)} seeds in {CORPUS}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
