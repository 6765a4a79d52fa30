"""What the agent is told of refusals: the words, and how they are collected and written."""

from __future__ import annotations

import errno
import json
import os
import resource
from collections.abc import Iterator
from contextlib import closing, contextmanager
from dataclasses import fields, replace
from pathlib import Path
from typing import Any

import pytest

from corral.actions import (
    Access,
    Action,
    Decision,
    Endpoint,
    File,
    KernelCall,
    Kind,
    ModelCall,
    Operation,
    Origin,
    Process,
    Program,
    Query,
    Request,
    Socket,
    Subject,
    Transport,
    Verb,
    Verdict,
)
from corral.sandbox import denials as words
from corral.sandbox.denials import Denial, describe, is_told, stderr_line, summary
from corral.sandbox.notices import MAX_BYTES, MAX_DENIALS, Notices
from corral.supervisor.syscalls import REFUSALS

HTTPS = Endpoint(Transport.TCP, "192.0.2.1", 443)
TABLE = "half of the classic escape"


def decision(subject: Subject = HTTPS, kind: Kind = Kind.NET_CONNECT, *, exec: int = 1, **values: Any) -> Decision:
    process = Process(pid=70_000, inner_pid=12, started=1, exe="/usr/bin/curl")
    given: dict[str, Any] = {
        "verdict": Verdict.DENY,
        "rule": "network",
        "reason": "nothing allows it",
        "advice": "Use the mirror.",
        "decider": "policy",
        "number": 1,
        "at": 1_700_000_000.5,
    }
    return Decision(action=Action(kind, subject, Origin("box", "session", 0, exec, process)), **given | values)


def call(name: str, *, quiet: bool = False, **values: Any) -> Decision:
    given: dict[str, Any] = {"rule": "syscalls", "reason": TABLE, "advice": ""}
    return decision(KernelCall(name, errno.EPERM, TABLE, quiet), Kind.KERNEL, **given | values)


def texts(denial: Denial) -> list[str]:
    return [value for field in fields(denial) if isinstance(value := getattr(denial, field.name), str)]


# ---- words ----


def test_a_refusal_is_described() -> None:
    assert describe(decision()) == Denial(
        action="net.connect 192.0.2.1:443",
        refused="Connecting to 192.0.2.1:443 (tcp) was refused.",
        rule="network",
        reason="nothing allows it",
        instead="Use the mirror.",
        exec=1,
        pid=12,
        at=1_700_000_000.5,
        count=1,
    )


@pytest.mark.parametrize(
    "kind, subject, sentence",
    [
        (Kind.PROCESS_EXEC, Program("/usr/bin/nmap", ("nmap", "-sS")), "Running /usr/bin/nmap -sS was refused."),
        (Kind.FILE_OPEN, File("/a", Access.WRITE), "Opening /a for writing was refused."),
        (Kind.FILE_OPEN, File("/a", Access.READ), "Opening /a for reading was refused."),
        (Kind.FILE_RENAME, File("/a", Access.WRITE, "/b"), "Renaming /a to /b was refused."),
        (Kind.FILE_UNLINK, File("/a", Access.WRITE), "Removing /a was refused."),
        (Kind.NET_RESOLVE, Endpoint(Transport.UDP, name="example.org"), "Looking up example.org was refused."),
        (Kind.NET_BIND, Endpoint(Transport.UNIX, path="/s"), "Binding a socket to /s (unix) was refused."),
        (Kind.NET_SOCKET, Socket(40, 1, 0), "Making a socket of family 40, type 1, protocol 0 was refused."),
        (Kind.KERNEL, KernelCall("mount", 1, ""), "The system call mount was refused."),
        (Kind.HTTP_REQUEST, Request(HTTPS, "PUT", "/x"), "The HTTP request PUT 192.0.2.1:443/x was refused."),
        (Kind.MODEL_CALL, ModelCall("m"), "A call of the model m was refused."),
        (Kind.DATA_QUERY, Query("crm", "delete", ("people",)), "The query delete people of crm was refused."),
        (Kind.API_CALL, Operation("desk", "close", "POST"), "The operation close of desk was refused."),
        (Kind.SANDBOX_APPLY, Verb(("/a",)), "Applying the changes of this sandbox /a was refused."),
    ],
)
def test_each_kind_has_a_sentence(kind: Kind, subject: Subject, sentence: str) -> None:
    told = describe(decision(subject, kind, reason="", advice=""))
    assert told.refused == sentence
    assert told.reason and told.instead


def test_every_kind_of_action_has_words() -> None:
    assert set(words._ATTEMPTS) == set(Kind)


def test_a_kill_says_that_it_is_the_end() -> None:
    assert describe(decision(verdict=Verdict.KILL)).refused.endswith("was refused, and the sandbox ends.")


def test_a_call_is_explained_to_the_agent_and_not_to_reviewers() -> None:
    told = describe(call("chroot"))
    assert TABLE not in " ".join(texts(told))
    assert told.reason == "The mounts of this sandbox are fixed." and "workspace" in told.instead
    wrapped = describe(call("chroot", reason=f"The system call chroot is refused here: {TABLE}.", advice="Stay."))
    assert (wrapped.reason, wrapped.instead) == (told.reason, told.instead)
    raw = describe(decision(Socket(2, 3, 1), Kind.NET_SOCKET, rule="syscalls", reason=TABLE, advice="Stay."))
    assert raw.reason == "Only Unix, TCP and UDP sockets exist here." and "Use TCP or UDP" in raw.instead
    unknown = describe(call("call_999"))
    assert TABLE not in " ".join(texts(unknown)) and unknown.reason and unknown.instead


def test_a_call_that_may_be_made_is_told_why_it_was_refused_this_time() -> None:
    port = "ports below 1024 are not for agents"
    told = describe(decision(KernelCall("bind", errno.EACCES, port), Kind.KERNEL, reason=f"bind: {port}.", advice=""))
    assert told.reason == f"bind: {port}." and told.instead


def test_the_words_of_a_policy_come_first() -> None:
    told = describe(call("chroot", reason="not on a Sunday", advice="Wait."))
    assert (told.reason, told.instead) == ("not on a Sunday", "Wait.")


def test_every_refused_call_has_words_of_its_own() -> None:
    refused = {refusal.name for refusal in REFUSALS}
    assert refused - set(words._KERNEL) <= {"lsm_set_self_attr", "lookup_dcookie", "nfsservctl"}


def test_a_private_rule_tells_nothing() -> None:
    secret: dict[str, Any] = {"rule": "SECRET-rule", "reason": "SECRET-reason", "advice": "SECRET-advice"}
    told = describe(decision(private=True, **secret))
    assert told.refused == "This is not allowed in this sandbox."
    assert (told.rule, told.reason, told.instead) == ("", "", "")
    assert "SECRET" not in repr(told) + summary([told])
    assert summary([told]) == (
        "1 action was refused: net.connect 192.0.2.1:443 (This is not allowed in this sandbox). "
        "Details: /run/corral/denials.jsonl"
    )


@pytest.mark.parametrize("bad", ["\x1b[2J", "\n", "\r", "\u202e", "\u2028", "\x9b", "\udcff", "\0"])
def test_what_the_agent_wrote_cannot_move_a_cursor(bad: str) -> None:
    name = f"a{bad}b"
    program = Program(name, (name, bad), interpreter=name)
    for made in (
        decision(program, Kind.PROCESS_EXEC, rule=name, reason=name, advice=name),
        decision(File(name, Access.READ, name), Kind.FILE_RENAME),
        decision(Endpoint(Transport.UNIX, path=name)),
        call(name),
    ):
        told = describe(made)
        assert all(text.isprintable() for text in texts(told))
        assert stderr_line([told], 0, b"").count(b"\n") == 1


def test_what_the_agent_wrote_is_bounded() -> None:
    huge = "\x1b" * 1_000_000
    told = describe(decision(Program(huge, (huge,)), Kind.PROCESS_EXEC, rule=huge, reason=huge, advice=huge))
    assert all(len(text) <= 600 for text in texts(told))
    assert len(summary([told] * 1000, 5)) < 8_000


def test_the_line_says_what_by_which_rule_and_what_instead() -> None:
    told = [replace(describe(decision()), count=2), describe(call("mount"))]
    assert stderr_line(told, 0, b"") == (
        b"corral: 3 actions were refused: net.connect 192.0.2.1:443 [x2] (network: nothing allows it. Use the mirror); "
        b"kernel.mount (syscalls: The mounts of this sandbox are fixed. Use the files where they are; you may write to "
        b"the workspace, your home directory and /tmp). Details: /run/corral/denials.jsonl\n"
    )
    assert "; and 7 more" in summary(told, 7) and summary(told, 7).startswith("10 actions")
    assert "Details" not in summary(told, place="")


def test_the_line_is_a_line_of_its_own() -> None:
    told = [describe(decision())]
    assert stderr_line(told, 0, b"x").startswith(b"\ncorral: ")
    assert stderr_line(told, 0, b"\n").startswith(b"corral: ")
    assert stderr_line(told, 0, b"$", newline=b"\r\n").startswith(b"\r\ncorral: ")
    assert stderr_line([], 0, b"x") == b""


# ---- collecting ----


def test_only_refusals_are_told_and_no_quiet_ones() -> None:
    assert is_told(decision()) and is_told(decision(verdict=Verdict.KILL)) and is_told(call("mount"))
    assert not is_told(decision(verdict=Verdict.ALLOW))
    assert not is_told(call("clone3", quiet=True))


def test_equal_refusals_are_counted() -> None:
    notices = Notices()
    notices.expect(1)
    for made in (decision(), call("mount"), decision(count=40), call("clone3", quiet=True), decision(rule="other")):
        notices.write(made)
    kept, dropped = notices.take(1)
    assert [(denial.action, denial.rule, denial.count) for denial in kept] == [
        ("net.connect 192.0.2.1:443", "network", 41),
        ("kernel.mount", "syscalls", 1),
        ("net.connect 192.0.2.1:443", "other", 1),
    ]
    assert dropped == 0


def test_each_exec_has_its_own_and_is_forgotten() -> None:
    notices = Notices()
    notices.expect(1)
    notices.expect(2)
    notices.write(decision(exec=2))
    notices.write(decision(exec=3))
    notices.write(decision(exec=0))
    assert notices.take(1) == ((), 0)
    assert [denial.exec for denial in notices.take(2)[0]] == [2]
    notices.write(decision(exec=2))
    assert notices.take(2) == notices.take(3) == notices.take(0) == ((), 0)


def test_what_is_kept_of_an_exec_is_bounded() -> None:
    notices = Notices()
    notices.expect(1)
    for port in range(1, MAX_DENIALS + 51):
        notices.write(decision(replace(HTTPS, port=port), count=2))
    kept, dropped = notices.take(1)
    assert (len(kept), dropped) == (MAX_DENIALS, 100)


# ---- the file ----


@pytest.fixture
def layer(tmp_path: Path) -> Path:
    """A directory as the launcher makes it: the controller's, or, for root, that of an id of the sandbox."""
    place = tmp_path / "notices"
    place.mkdir()
    if os.geteuid() == 0:
        os.chown(place, 0x70000000, 0x70000000)
    return tmp_path


@pytest.fixture
def notices(layer: Path) -> Iterator[Notices]:
    made = Notices()
    fd = os.open(layer, os.O_RDONLY)
    made.attach(fd)
    os.close(fd)
    with closing(made):
        yield made


def read(layer: Path) -> list[dict[str, Any]]:
    text = (layer / "notices/denials.jsonl").read_text("ascii")
    assert text.endswith("\n")
    return [json.loads(line) for line in text.splitlines()]


def test_the_file_comes_with_the_first_refusal(notices: Notices, layer: Path) -> None:
    notices.write(decision(verdict=Verdict.ALLOW))
    notices.write(call("clone3", quiet=True))
    assert list((layer / "notices").iterdir()) == []
    notices.write(decision())
    notices.write(call("mount", exec=0))
    assert read(layer) == [
        {
            "action": "net.connect 192.0.2.1:443",
            "refused": "Connecting to 192.0.2.1:443 (tcp) was refused.",
            "rule": "network",
            "reason": "nothing allows it",
            "instead": "Use the mirror.",
            "exec": 1,
            "pid": 12,
            "at": 1_700_000_000.5,
            "count": 1,
        },
        {
            "action": "kernel.mount",
            "refused": "The system call mount was refused.",
            "rule": "syscalls",
            "reason": "The mounts of this sandbox are fixed.",
            "instead": "Use the files where they are; you may write to the workspace, your home directory and /tmp.",
            "exec": 0,
            "pid": 12,
            "at": 1_700_000_000.5,
            "count": 1,
        },
    ]
    assert (layer / "notices/denials.jsonl").stat().st_mode & 0o7777 == 0o444


def test_a_flood_leaves_the_file_bounded_and_a_count(notices: Notices, layer: Path) -> None:
    program = Program("/x", ("\x1b" * 4000,))
    for number in range(5_000):
        notices.write(decision(program, Kind.PROCESS_EXEC, rule=f"rule {number}", advice="y" * 400))
    assert MAX_BYTES - 4_000 < (layer / "notices/denials.jsonl").stat().st_size <= MAX_BYTES
    *told, last = read(layer)
    assert last["more"] > 0 and len(told) + last["more"] == 5_000
    notices.write(decision(count=10))
    assert read(layer)[-1]["more"] == last["more"] + 10, "the last line goes on counting, in its place"


@contextmanager
def largest_file(size: int) -> Iterator[None]:
    """The kernel refuses what makes a file larger (setrlimit(2)), as a full layer does: after a part of it."""
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, before[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)


def test_a_full_layer_leaves_no_half_line_and_is_made_up_for(notices: Notices, layer: Path) -> None:
    notices.write(decision(rule="first"))
    path = layer / "notices/denials.jsonl"
    with largest_file(path.stat().st_size + 40):
        notices.write(decision(rule="lost"))
        notices.write(decision(rule="lost", count=3))
    assert [line["rule"] for line in read(layer)] == ["first"]
    notices.write(decision(rule="second"))
    first, count, second = read(layer)
    assert (first["rule"], count["more"], second["rule"]) == ("first", 4, "second")


def test_what_cannot_be_told_is_no_fault_of_the_monitor(tmp_path: Path) -> None:
    """The record is the log's; a sink that raises would end the sandbox."""
    (tmp_path / "notices").mkdir()
    (tmp_path / "notices/denials.jsonl").mkdir()  # in the way
    made = Notices()
    fd = os.open(tmp_path, os.O_RDONLY)
    made.attach(fd)
    os.close(fd)
    made.expect(1)
    with closing(made):
        made.write(decision())
    made.write(decision())
    assert made.take(1)[0][0].count == 2


def test_an_old_file_or_a_link_is_never_followed(layer: Path, notices: Notices, tmp_path: Path) -> None:
    victim = tmp_path / "victim"
    victim.write_text("whole\n")
    (layer / "notices/denials.jsonl").symlink_to(victim)
    notices.write(decision())
    assert victim.read_text() == "whole\n"
