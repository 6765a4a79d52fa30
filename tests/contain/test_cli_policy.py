"""`corral policy` as a user meets it."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path

import pytest

from corral.actions import Action, Decision, Endpoint, Kind, Origin, Program, Transport, Verdict
from corral.monitor.jsonl import encode
from tests.contain.command_line import CommandLine, adopting_orphans

POLICY = """\
version: 1
network:
  allow: ["*.github.com:443"]
  ask:
    - name: github.com
      port: 443
      reason: pushes leave this machine
  deny:
    - {name: secret.github.com, private: true}
syscalls: {ask: [sched_setaffinity]}
"""
STAY = "Do not retry or look for another way; work with what is in the sandbox, or ask the person to allow it."
TABLE = """\
- action: connect api.github.com:443
  verdict: allow
- action: connect secret.github.com:443
  verdict: deny
  rule: network.deny[0]
"""


@pytest.fixture
def cli(tmp_path: Path, workspace: Path) -> Iterator[CommandLine]:
    with adopting_orphans():
        yield CommandLine(tmp_path, workspace)


@pytest.fixture
def policy(workspace: Path) -> str:
    (workspace / "p.yaml").write_text(POLICY)
    (workspace / "p.test.yaml").write_text(TABLE)
    return "p.yaml"


def is_plain(output: bytes) -> bool:
    """Whether nothing in it could move a cursor, and it is no traceback."""
    return all(byte >= 32 or byte == 10 for byte in output) and b"Traceback" not in output


def test_check_prints_a_hash(cli: CommandLine, policy: str) -> None:
    done = cli("policy", "check", policy, "locked")
    assert (done.returncode, done.stderr) == (0, b"")
    assert done.stdout.startswith(b"p.yaml: sha256:") and b"\nlocked: sha256:" in done.stdout
    assert b"network 1 allow, 1 ask, 1 deny" in done.stdout
    rows = json.loads(cli("policy", "check", "--json", policy).stdout)
    assert rows[0]["hash"] in done.stdout.decode() and rows[0]["problems"] == []


def test_check_tells_all_faults_of_all_files(cli: CommandLine, policy: str) -> None:
    (cli.workspace / "bad\x1b[2J.yaml").write_text("network:\n  allow: [127.1]\n  alow: []\n")
    done = cli("policy", "check", policy, "bad\x1b[2J.yaml", "none.yaml")
    assert done.returncode == 125 and b"p.yaml: sha256:" in done.stdout
    lines = done.stderr.decode().splitlines()
    assert len(lines) == 3 and all(line.startswith("corral: ") for line in lines)
    assert ":2: network.allow[0]: " in lines[0] and ":3: network.alow: " in lines[1] and "none.yaml" in lines[2]
    assert is_plain(done.stderr) and is_plain(done.stdout)
    rows = json.loads(cli("policy", "check", "--json", policy, "none.yaml").stdout)
    assert [bool(row["hash"]) for row in rows] == [True, False] and len(rows[1]["problems"]) == 1


def test_explain_names_the_rule_its_line_and_what_lost(cli: CommandLine, policy: str) -> None:
    done = cli("policy", "explain", "--policy", policy, "connect", "secret.github.com:443")
    assert (done.returncode, done.stderr) == (0, b"")
    assert done.stdout.decode().splitlines() == [
        "action:  net.connect secret.github.com:443",
        "verdict: deny",
        "rule:    network.deny[0]  (p.yaml:9)",
        "reason:  This sandbox may not connect to secret.github.com:443: its policy denies it.",
        f"instead: {STAY}",
        "private: the agent is told neither the rule nor its reason",
        "also:    allow by network.allow[0]  (p.yaml:3)",
    ]
    said = json.loads(cli("policy", "explain", "-p", policy, "--json", "connect github.com:443").stdout)
    assert (said["verdict"], said["rule"], said["where"]) == ("ask", "network.ask[0]", "p.yaml:5")
    assert said["reason"] == "pushes leave this machine" and said["others"] == [] and said["private"] is False


@pytest.mark.parametrize(
    ("words", "verdict", "rule"),
    [
        ("connect 127.0.0.1:80", "allow", "network.loopback"),
        ("connect 192.0.2.1:80", "deny", "network (nothing allows it)"),
        ("exec /usr/bin/git push --force", "allow", "process.allow[0]"),
        ("open /work/x --write", "allow", "filesystem"),
        ("syscall mount", "deny", "syscalls"),
        ("syscall no_such_call", "deny", "syscalls"),
        ("syscall read", "allow", "syscalls (free)"),
        ("syscall sched_setaffinity", "ask", "syscalls.ask[0]"),
        ("apply", "ask", "built-in"),
    ],
)
def test_explain_knows_what_the_policy_does_not_decide(
    cli: CommandLine, policy: str, words: str, verdict: str, rule: str
) -> None:
    said = json.loads(cli("policy", "explain", "--policy", policy, "--json", *words.split()).stdout)
    assert (said["verdict"], said["rule"]) == (verdict, rule)


@pytest.mark.parametrize("words", ["fly", "connect 0x7f.1:80", "connect \x1b[2J:80", "syscall connect", "open"])
def test_explain_says_what_it_understands(cli: CommandLine, words: str) -> None:
    done = cli("policy", "explain", words)
    assert (done.returncode, done.stdout) == (125, b"")
    assert done.stderr.startswith(b"corral: ") and is_plain(done.stderr)


def test_test_passes_and_fails_with_the_line(cli: CommandLine, policy: str) -> None:
    done = cli("policy", "test", policy)
    assert (done.returncode, done.stderr) == (0, b"")
    assert done.stdout.endswith(b"2 of 2 as expected\n")
    with (cli.workspace / "p.test.yaml").open("a") as table:
        table.write("- action: connect github.com:22\n  verdict: ask\n")
    done = cli("policy", "test", policy)
    assert done.returncode == 1
    wanted = "FAIL  p.test.yaml:6: connect github.com:22: deny by network (nothing allows it), not ask\n"
    assert wanted in done.stdout.decode() and done.stdout.endswith(b"2 of 3 as expected\n")
    rows = json.loads(cli("policy", "test", "--json", policy).stdout)
    assert [row["passed"] for row in rows] == [True, True, False]
    (cli.workspace / "p.test.yaml").unlink()
    done = cli("policy", "test", policy)
    assert done.returncode == 125 and b"p.test.yaml: cannot read the table" in done.stderr


def test_schema_is_json(cli: CommandLine) -> None:
    done = cli("policy", "schema")
    assert done.returncode == 0 and "network" in json.loads(done.stdout)["properties"]


def test_learn_proposes_a_policy_that_check_takes(cli: CommandLine) -> None:
    origin = Origin("box", "session")
    tried = [
        (Action(Kind.PROCESS_EXEC, Program("/usr/bin/git", ("git", "push", "\x1b[2J")), origin), Verdict.ALLOW),
        (Action(Kind.NET_CONNECT, Endpoint(Transport.TCP, "198.18.0.1", 443, "github.com"), origin), Verdict.ALLOW),
        (Action(Kind.NET_CONNECT, Endpoint(Transport.TCP, "192.0.2.1", 443), origin), Verdict.DENY),
    ]
    lines = [
        encode(Decision(action, verdict, "r", "", "", "policy", number, 0.0))
        for number, (action, verdict) in enumerate(tried, start=1)
    ]
    (cli.workspace / "record.jsonl").write_bytes(b"".join(lines))
    done = cli("policy", "learn", "record.jsonl")
    assert (done.returncode, done.stderr) == (0, b"") and is_plain(done.stdout)
    (cli.workspace / "learned.yaml").write_bytes(done.stdout)
    assert cli("policy", "check", "learned.yaml").returncode == 0
    for words, verdict in (("connect github.com:443", "ask"), ("connect 192.0.2.1:443", "deny")):
        said = json.loads(cli("policy", "explain", "-p", "learned.yaml", "--json", words).stdout)
        assert said["verdict"] == verdict
    (cli.workspace / "record.jsonl").write_bytes(lines[0] + b"\x1b[2J\n")
    done = cli("policy", "learn", "record.jsonl")
    assert done.returncode == 125 and b"record.jsonl:2: not a record" in done.stderr and is_plain(done.stderr)
