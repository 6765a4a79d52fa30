"""ps, exec, kill, freeze, thaw, diff and discard, against sandboxes that another process controls."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import threading
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.contain.command_line import CommandLine, adopting_orphans, descendants
from tests.contain.conftest import wait_until


@pytest.fixture
def cli(tmp_path: Path, workspace: Path) -> Iterator[CommandLine]:
    with adopting_orphans():
        yield CommandLine(tmp_path, workspace)


@pytest.fixture
def live(cli: CommandLine) -> Iterator[str]:
    """The id of a sandbox in which nothing happens."""
    with cli.live("--", "sleep", "1000") as (name, _):
        yield name


# ---- ps ----


def test_ps_lists_what_lives(cli: CommandLine) -> None:
    assert cli.list() == []
    with cli.live("--label", "a \x1b[2Jlabel", "--user", "root", "--", "sleep", "1000") as (name, process):
        (entry,) = cli.list()
        assert entry["id"] == name and entry["pid"] == process.pid and entry["user"] == 0
        assert entry["workspace"] == str(cli.workspace) and entry["label"] == "a \x1b[2Jlabel"
        assert abs(time.time() - entry["started_at"]) < 60
        text = cli("ps", env={"COLUMNS": "300"}).stdout
        assert name.encode() in text and b"a \\x1b[2Jlabel" in text and b"\x1b" not in text
        with cli.live("--", "sleep", "1001") as (other, _):
            assert [entry["id"] for entry in cli.list()] == [name, other]  # oldest first
            assert cli.list()[1]["label"] == "sleep 1001"
    assert cli.list() == []


def test_ps_survives_a_controller_that_hangs(cli: CommandLine, live: str) -> None:
    with cli.live("--", "sleep", "1000") as (hung, process):
        process.send_signal(signal.SIGSTOP)
        try:
            assert [entry["id"] for entry in cli.list()] == [live]
            done = cli("exec", hung, "true")
            assert done.returncode == 125 and b"no live sandbox" in done.stderr
        finally:
            process.send_signal(signal.SIGCONT)


# ---- names ----


@pytest.mark.parametrize("verb", [["exec", "ID", "true"], ["kill", "ID"], ["freeze", "ID"], ["thaw", "ID"]], ids=str)
@pytest.mark.parametrize("name", ["nosuchid", "", "\x1b[31m", "../x"])
def test_an_unknown_id_is_a_clear_error(cli: CommandLine, live: str, verb: list[str], name: str) -> None:
    done = cli(*(name if word == "ID" else word for word in verb))
    assert done.returncode == 125
    assert b"corral: there is no live sandbox" in done.stderr and b"\x1b" not in done.stderr
    assert [entry["state"] for entry in cli.list()] == ["running"]


def test_a_beginning_that_only_one_id_has_is_enough(cli: CommandLine, live: str) -> None:
    assert cli("exec", live[:5], "true").returncode == 0
    with cli.live("--", "sleep", "1000") as (other, _):
        common = live[: next(at for at in range(8) if live[at] != other[at])]
        if common:
            done = cli("kill", common)
            assert done.returncode == 125 and b"several sandboxes" in done.stderr
        own = live[: len(common) + 1]
        assert cli("exec", own, "true").returncode == 0
        assert len(cli.list()) == 2


# ---- exec ----


def test_exec_is_in_the_same_place(cli: CommandLine) -> None:
    with cli.live("--", "sh", "-c", "echo here >/tmp/mark; touch added; exec sleep 1000") as (name, _):
        done = cli("exec", name, "sh", "-c", "cat /tmp/mark; pwd; ls; id -u; echo $HOME")
        assert done.stdout.decode().split() == ["here", str(cli.workspace), "added", "file.txt", "1000", "/home/agent"]
        assert (done.returncode, done.stderr) == (0, b"")


def test_exec_passes_bytes_and_codes(cli: CommandLine, live: str) -> None:
    data = os.urandom(1 << 20)
    done = cli("exec", live, "--", "sh", "-c", "tee /dev/stderr; exit 9", stdin=data)
    assert (done.returncode, done.stdout == data, done.stderr == data) == (9, True, True)
    assert cli("exec", live, "sh", "-c", "kill -9 $$").returncode == 137
    done = cli("exec", live, "no-such-program")
    assert done.returncode == 125 and b"corral: cannot start the command: exec: no-such-program" in done.stderr


def test_exec_options(cli: CommandLine, live: str) -> None:
    done = cli("exec", "-e", "A=b=c", "--directory", "/usr", live, "sh", "-c", "echo $A; pwd")
    assert done.stdout == b"b=c\n/usr\n"
    done = cli("exec", "-d", "/no/such", live, "true")
    assert done.returncode == 125 and b"directory: /no/such: No such file" in done.stderr
    for words in (["-e", "1=2"], ["-e", "NAME"], ["-u", "nosuch"], ["-u", "70000"]):
        done = cli("exec", *words, live, "true")
        assert done.returncode == 125 and done.stderr.startswith(b"corral: "), words
    for words in ([], [live], [live, "--"], [live, ""]):
        done = cli("exec", *words)
        assert done.returncode == 125 and b"Traceback" not in done.stderr, words


@pytest.mark.root
def test_exec_as_another_user(cli: CommandLine, live: str) -> None:
    done = cli("exec", "--user", "root", live, "sh", "-c", "id -u; echo $HOME $USER")
    assert done.stdout == b"0\n/root root\n"
    assert cli("exec", "--user", "4711", live, "id", "-u").stdout == b"4711\n"


def test_exec_with_a_long_command_line(cli: CommandLine, live: str) -> None:
    done = cli("exec", live, "sh", "-c", 'printf %s "$@" | wc -c', "sh", *["x" * 65_536] * 16)
    assert (done.returncode, done.stdout) == (0, b"1048576\n"), done.stderr


def test_exec_of_nothing_of_the_callers(cli: CommandLine, live: str) -> None:
    done = cli("exec", live, "sh", "-c", "env; ls -l /proc/self/fd", env={"SECRET": "s3cret"})
    assert b"s3cret" not in done.stdout and b"pipe:[" in done.stdout and b"/dev/null" not in done.stdout


def test_two_execs_at_once(cli: CommandLine, live: str) -> None:
    done: dict[int, subprocess.CompletedProcess[bytes]] = {}

    def one(number: int) -> None:
        done[number] = cli("exec", live, "sh", "-c", f"sleep 0.3; cat; exit {number}", stdin=b"%d" % number)

    threads = [threading.Thread(target=one, args=(number,)) for number in range(1, 9)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert {number: (each.returncode, each.stdout) for number, each in done.items()} == {
        number: (number, b"%d" % number) for number in range(1, 9)
    }


@pytest.mark.parametrize("number", [signal.SIGKILL, signal.SIGTERM, signal.SIGINT])
def test_a_command_dies_with_its_exec(cli: CommandLine, number: signal.Signals) -> None:
    with cli.live("--", "sleep", "1000") as (name, controller):
        before = set(descendants(controller.pid))
        process = cli.start("exec", name, "sh", "-c", "sleep 1001 & echo ready; exec sleep 1002")
        assert process.stdout is not None and process.stdout.readline() == b"ready\n"
        started = set(descendants(controller.pid)) - before
        assert len(started) == 2
        process.send_signal(number)
        process.communicate(timeout=30)
        assert process.returncode == (-9 if number == signal.SIGKILL else 128 + number)
        if number == signal.SIGKILL:  # the others are the command's to follow; a shell's background job need not
            assert wait_until(lambda: not started & set(descendants(controller.pid)))
        assert cli("exec", name, "echo", "still here").stdout == b"still here\n"


def test_an_exec_ends_when_its_sandbox_does(cli: CommandLine) -> None:
    with cli.live("--", "sleep", "1000") as (name, _):
        process = cli.start("exec", name, "sh", "-c", "echo ready; exec sleep 1000")
        assert process.stdout is not None
        process.stdout.readline()
        assert cli("kill", name).returncode == 0
        _, err = process.communicate(timeout=30)
        assert process.returncode == 137 and err.startswith(b"corral: the sandbox has ended"), err


def test_a_layer_lives_on_after_an_exec_that_changed_it(cli: CommandLine) -> None:
    with cli.live("--", "sh", "-c", "read line") as (name, process):
        assert cli("exec", name, "touch", "by-exec").returncode == 0
        assert process.stdin is not None
        process.stdin.close()
        process.stdin = None
        assert process.wait(30) != 125
        assert b"by-exec" in cli("diff", name).stdout


# ---- kill, freeze, thaw ----


def test_kill(cli: CommandLine) -> None:
    with cli.live("--", "sh", "-c", "trap '' TERM; while :; do sleep 1; done") as (name, process):
        with cli.live("--", "sleep", "1000") as (second, other):
            done = cli("kill", name, second)
            assert (done.returncode, done.stdout, done.stderr) == (0, b"", b"")
            assert cli.list() == []
            for each in (process, other):
                _, err = each.communicate(timeout=30)
                assert each.returncode == 137
                assert err == b"corral: the sandbox was ended: killed by `corral kill`\n"
            assert cli("kill", name).returncode == 125


def test_freeze_stops_it_and_thaw_lets_it_go_on(cli: CommandLine) -> None:
    # It counts into a pipe that we read, so that what counts is what runs.
    with cli.live("--", "sh", "-c", "while :; do echo x; sleep 0.01; done") as (name, process):
        assert process.stdout is not None
        os.set_blocking(process.stdout.fileno(), False)

        def counted() -> bool:
            return bool(process.stdout and process.stdout.read(1 << 16))

        assert wait_until(counted)
        assert cli("freeze", name).returncode == 0
        assert cli.list()[0]["state"] == "frozen"
        time.sleep(0.3)
        counted()  # what was still in the pipes
        time.sleep(0.5)
        assert not counted(), "it runs on"
        done = cli("exec", name, "true")
        assert done.returncode == 125 and b"the sandbox is frozen; thaw it first" in done.stderr
        done = cli("freeze", name)
        assert done.returncode == 125 and b"frozen" in done.stderr
        assert cli("thaw", name).returncode == 0
        assert wait_until(counted)
        assert cli("thaw", name).returncode == 0  # nothing to do is no error
        assert cli("exec", name, "true").returncode == 0


def test_a_frozen_sandbox_can_be_killed(cli: CommandLine) -> None:
    with cli.live("--", "sleep", "1000") as (name, process):
        assert cli("freeze", name).returncode == 0
        assert cli("kill", name).returncode == 0
        process.communicate(timeout=30)
        assert process.returncode == 137


# ---- diff, discard ----


def test_diff_list_and_discard(cli: CommandLine) -> None:
    assert cli("diff").returncode == 125
    script = "echo more >>file.txt; echo new >'a\033[31mb'; mkdir d; chmod 700 ~; echo h >~/in-home; echo t >/tmp/t"
    done = cli.run("--label", "first", "--", "sh", "-c", script)
    first = done.stderr.split(b"`corral diff ")[1].split(b"`")[0].decode()
    assert f"`corral discard {first}` drops them" in done.stderr.decode()
    second = cli.run("--", "rm", "file.txt").stderr.split(b"`corral diff ")[1].split(b"`")[0].decode()
    assert first != second

    text = cli("diff", first).stdout.decode()
    assert f"~ {cli.workspace}/file.txt  9 -> 14 bytes" in text
    assert f"+ {cli.workspace}/a\\x1b[31mb  4 bytes" in text and "\x1b" not in text
    assert f"+ {cli.workspace}/d (directory)" in text and "+ /home/agent/in-home" in text
    assert "in-home" not in cli("diff", first, "--workspace-only").stdout.decode()
    assert cli("diff").stdout == cli("diff", second).stdout  # the last one is the default
    assert cli("diff").stdout.decode() == f"- {cli.workspace}/file.txt  9 bytes\n"

    changes = {change["path"]: change for change in json.loads(cli("diff", first, "--json").stdout)}
    assert changes[f"{cli.workspace}/file.txt"]["kind"] == "changed"
    assert (changes[f"{cli.workspace}/file.txt"]["size_before"], changes["/home/agent/in-home"]["size_after"]) == (9, 2)
    patch = cli("diff", first, "--patch").stdout
    assert b"+more\n" in patch and b"in-home" not in patch
    assert json.loads(cli("diff", second, "--json").stdout)[0]["kind"] == "deleted"

    listed = json.loads(cli("diff", "--list", "--json").stdout)
    assert [layer["id"] for layer in listed] == [first, second] and listed[0]["workspace"] == str(cli.workspace)
    lines = cli("diff", "--list").stdout.decode().splitlines()
    assert [line.split()[0] for line in lines] == [first, second]

    assert cli("discard").returncode == 125
    done = cli("discard", first)
    assert (done.returncode, done.stdout.decode()) == (0, f"discarded {first}\n")
    assert cli("diff", first).returncode == 125 and cli("discard", first).returncode == 125
    assert cli("discard", "--all").returncode == 0
    assert json.loads(cli("diff", "--list", "--json").stdout) == []
    assert not os.listdir(cli.state / "corral/layers")
    assert sorted(os.listdir(cli.workspace)) == ["file.txt"]
    assert (cli.workspace / "file.txt").read_text() == "original\n"


@pytest.mark.parametrize("name", ["../layers", "x", "\x1b[31m", "aaaaaaaa", ""])
@pytest.mark.parametrize("verb", ["diff", "discard"])
def test_a_layer_that_is_none_is_a_clear_error(cli: CommandLine, verb: str, name: str) -> None:
    done = cli(verb, name)
    assert done.returncode == 125 and done.stderr.startswith(b"corral: ") and b"\x1b" not in done.stderr


def test_diff_into_a_closed_pipe_is_quiet(cli: CommandLine) -> None:
    cli.run("-q", "--", "sh", "-c", "for n in $(seq 3000); do : >added-file-number-$n; done")
    process = cli.start("diff")
    assert process.stdout is not None
    process.stdout.read(10)
    process.stdout.close()
    assert process.stderr is not None
    assert process.stderr.read() == b""
    assert process.wait(30) in (1, 141)  # rich says 1
    process.communicate()
